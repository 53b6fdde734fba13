// Shows what SpeedLab's measuring nodes say on the nodes themselves. Text only, never markup.
import { api } from "../../../scripts/api.js";
import { el } from "./dom.js";
import { findNode, isVue, kindOf, redraw, shownOn } from "./nodes.js";

const HEIGHTS = {
  SpeedLabBenchmark: 320,
  SpeedLabProfileReport: 320,
  SpeedLabCompareImages: 60,
  SpeedLabCompareLatents: 60,
};
const TABLES = ["SpeedLabProfileReport", "SpeedLabBenchmark"];
const WIDGET = "speedlab_text";

function textWidget(node) {
  const known = node.widgets?.find((widget) => widget.name === WIDGET);
  if (known) return known;
  const kind = kindOf(node);
  // The columns of a table must stay under each other; the other texts are sentences.
  const wrap = TABLES.includes(kind) ? "pre" : "pre-wrap";
  const element = el("pre", { class: "sl-text", style: `white-space: ${wrap}` });
  const widget = node.addDOMWidget(WIDGET, WIDGET, element, {
    serialize: false, // not part of the prompt
    getMinHeight: () => HEIGHTS[kind],
  });
  widget.serialize = false; // nor of the saved workflow
  node.setSize([Math.max(node.size[0], node.computeSize()[0]), Math.max(node.size[1], node.computeSize()[1])]);
  return widget;
}

/** A node was made. */
export function nodeCreated(node) {
  if (isVue() && kindOf(node) in HEIGHTS) textWidget(node);
}

function onExecuted({ detail }) {
  const node = detail?.output?.text ? findNode(shownOn(detail)) : null;
  if (!(kindOf(node) in HEIGHTS)) return;
  textWidget(node).element.textContent = detail.output.text.join("\n");
  redraw();
}

/** Have measuring nodes show their text. */
export function listen() {
  api.addEventListener("executed", onExecuted);
}
