// Shows what measuring nodes say on themselves. Text only, never markup.
import { api } from "../../../scripts/api.js";
import { el } from "./dom.js";
import { t } from "./i18n.js";
import { Kept } from "./kept.js";
import { addElement, grow, isVue, kindOf, nodeHere, redraw, shownOn } from "./nodes.js";
import { reportFace, sweepFace } from "./report.js";
import { findRun } from "./server.js";

const REPORT = "SpeedLabProfileReport";
const BENCHMARK = "SpeedLabBenchmark";
// What needs more room is scrolled to, so that a node stays in its group.
const HEIGHTS = { [REPORT]: 420, [BENCHMARK]: 420, SpeedLabCompareImages: 60, SpeedLabCompareLatents: 60 };
const MARGIN = 20; // that ComfyUI leaves above and below such a widget
const WIDGET = "speedlab_text";
const outputs = new Kept(16, "SpeedLab.Outputs");

export const isReport = (node) => kindOf(node) === REPORT;

function faceOf(node) {
  const known = node.widgets?.find((widget) => widget.name === WIDGET);
  if (known) return known;
  const kind = kindOf(node);
  // Scrolled by keys too, and by the wheel without the canvas.
  const element = el("div", { class: "sl-face widget-expands", style: `min-height: ${HEIGHTS[kind]}px`, tabindex: "0", role: "region", "aria-label": t("results"), "data-capture-wheel": "true" });
  const widget = addElement(node, WIDGET, element, { hideOnZoom: false, getMinHeight: () => HEIGHTS[kind] + MARGIN });
  grow(node);
  return widget;
}

/** The face shows the images: ComfyUI's own preview of them would make the node as tall again. */
function hidePreview(node) {
  node.hideOutputImages = true; // the Vue renderer's, where it knows that; speedlab.css where not
  node.onDrawBackground = () => {}; // the classic one's
}

function show(node, content) {
  const { element } = faceOf(node);
  if (typeof content === "string") element.textContent = content;
  else element.replaceChildren(...content.flat().filter(Boolean));
  redraw();
}

export function nodeCreated(node) {
  const kind = kindOf(node);
  if (HEIGHTS[kind] > 60) hidePreview(node);
  // Else the classic renderer gives Benchmark's room to its text boxes.
  if (kind === BENCHMARK || (isVue() && kind in HEIGHTS)) faceOf(node);
}

/** Show a run on a Profile Report; where its record is gone or damaged, the text that the node returned. */
export async function showRun(node, runId, text) {
  try {
    const record = await findRun(runId);
    if (record) return show(node, reportFace(record));
  } catch (error) {
    console.warn("SpeedLab:", error.message);
  }
  if (text) show(node, text);
}

function tell({ workflow, id, text, sweep }) {
  const node = nodeHere(workflow, id);
  if (kindOf(node) in HEIGHTS) show(node, sweep ? sweepFace(sweep) : text.join("\n"));
}

function onExecuted({ detail }) {
  const { text, speedlab_sweep: sweeps, speedlab_workflow: workflows } = detail?.output ?? {};
  if (!workflows) return; // another's, or one whose run comes with its id
  const said = { workflow: workflows.at(-1), id: shownOn(detail), text, sweep: sweeps?.at(-1) };
  if (said.workflow) outputs.set(`${said.workflow}/${said.id}`, said);
  tell(said);
}

export const restoreAll = () => outputs.forEach(tell);

export const listen = () => api.addEventListener("executed", onExecuted);
