// One run in full.
import { app } from "../../../scripts/app.js";
import { legend, memoryStrip, StepChart } from "./chart.js";
import { button, copyButton, div, el, link } from "./dom.js";
import { duration, gigabytes, isNumber, rate, recordBars, stepsText } from "./figures.js";
import { t } from "./i18n.js";
import { memoryPeaks, notesOf, peakTexts, phaseBar, picture, statusBadge } from "./parts.js";
import { fileUrl, jsonUrl, pageUrl, readWorkflow } from "./server.js";

const KERNELS = 12;

export function detailView(record, line, remove) {
  const { request = {}, summary = {}, artifacts = {} } = record;
  const bars = recordBars(record);
  const chart = new StepChart();
  chart.draw(bars, { stepMs: summary.step_time_ms });
  return el(
    "div",
    { class: "sl-detail", "data-run": record.run_id },
    el("h3", null, statusBadge(record.status), request.plan ?? record.run_id),
    request.label && request.label !== request.plan && div("sl-sub sl-label", t("asked_as", { label: request.label })),
    div("sl-sub", settingsLine(record)),
    div("sl-big", bigFigure(duration(record.phases_ms?.total), "total"), bigFigure(rate(summary.it_per_s), "speed"), memoryPeaks(record.memory?.overall).slice(0, 1).map(([name, value]) => bigFigure(gigabytes(value), name))),
    bars.length ? [chart.element, memoryStrip(record.step_memory), legend(bars, summary)] : null,
    phaseBar(record.phases_ms),
    section(t("memory"), memoryTable(record.memory)),
    section(t("kernels"), kernelTable(record.kernels)),
    pictures(record.run_id, artifacts.images),
    notesOf(record),
    section(t("settings"), settingsTable(record)),
    div(
      "sl-tools sl-wrap",
      openButton(record.run_id),
      link("HTML", pageUrl(record.run_id), "", { "data-act": "page", title: t("page_title") }),
      copyButton(t("markdown"), () => line.markdown),
      link("JSON", jsonUrl(record.run_id), ""),
      Object.entries(artifacts).map(([kind, value]) => kind !== "images" && links(record.run_id, kind, value)),
      remove,
    ),
    artifacts.trace && div("sl-hint", t("trace_hint")),
  );
}

// Puts the workflow of a run on the canvas. Its image holds it; why there is none stands on the button.
function openButton(runId) {
  const open = button("workflow", t("open_workflow"), null, { disabled: true });
  readWorkflow(runId).then(
    ({ workflow, prompt, error = "" }) => {
      open.title = error;
      open.disabled = Boolean(error);
      open.onclick = () => (workflow ? app.loadGraphData(workflow, true, true, runId) : app.loadApiJson(prompt, runId));
    },
    (error) => (open.title = error.message),
  );
  return open;
}

export function when(timestamp) {
  // Python writes the zone without a colon, which not every browser reads.
  const date = new Date(String(timestamp).replace(/([+-]\d\d)(\d\d)$/, "$1:$2"));
  return isNaN(date) ? "" : date.toLocaleString([], { dateStyle: "short", timeStyle: "short" });
}

const bigFigure = (value, name) => value !== "–" && el("div", null, el("b", null, value), el("span", null, t(name)));

export const section = (title, content) => content && el("section", null, el("h4", null, title), content);

/** The name of a setting, which may break behind a dot or an underscore. */
export const settingName = (name) => el("span", null, name.split(/(?<=[._])/).map((part) => [part, el("wbr")]));

export function table(head, rows, name = "") {
  if (!rows.length) return null;
  return el(
    "table",
    { class: `sl-table ${name}` },
    el("thead", null, el("tr", null, head.map((cell) => el("th", null, cell)))),
    el("tbody", null, rows.map((row) => el("tr", null, row.map((cell) => el("td", null, cell))))),
  );
}

function memoryTable(memory) {
  const rows = Object.entries(memory ?? {}).map(([phase, peaks]) => [t(`phase_${phase}`), peakTexts(peaks).join(" · ")]);
  return table([t("phase"), t("peak")], rows.filter(([, peaks]) => peaks));
}

export const kernelName = (name) => el("span", { class: "sl-name", title: name, text: name });

export function kernelTable(kernels) {
  const rows = (kernels ?? []).slice(0, KERNELS).map((kernel) => [kernelName(kernel.name), kernel.family, kernel.calls, duration(kernel.ms), share(kernel.share)]);
  return table(["kernel", "family", "calls", "time", "share"].map((name) => t(name)), rows, "sl-kernels");
}

/** Made when somebody unfolds it. */
export function folded(title, make) {
  const one = el("details", null, el("summary", null, title));
  one.addEventListener("toggle", () => one.append(make()), { once: true });
  return one;
}

export const share = (percent) => (isNumber(percent) ? `${percent.toFixed(1)} %` : "");

export function pictures(runId, images) {
  if (!Array.isArray(images) || !images.length) return null;
  return div("sl-pictures", images.slice(0, 8).map((_, n) => el("a", { href: fileUrl(runId, "images", n), target: "_blank" }, picture(runId, n, { alt: t("picture_n", { n: n + 1 }) }))));
}

function links(runId, kind, value) {
  const values = [value].flat();
  const name = ["chart", "charts", "trace"].includes(kind) ? t(`open_${kind}`) : kind;
  return values.filter((path) => typeof path === "string").map((path, index) => link(values.length > 1 ? `${name} ${index + 1}` : name, fileUrl(runId, kind, index), null, { target: "_blank", title: path }));
}

export function settingsLine({ request = {}, env = {}, summary = {} }) {
  const size = isNumber(request.width) ? `${request.width}×${request.height} ×${request.batch}` : "";
  return [request.checkpoint?.name, size, request.sampler && `${request.sampler}/${request.scheduler}`, stepsText(summary.steps ?? request.steps, request.steps), env.device].filter(Boolean).join(" · ");
}

export const settingsOf = (record) => new Map([...flat(record.request ?? {}, ""), ...flat(record.env ?? {}, "env.")]);

function* flat(value, prefix) {
  for (const [name, entry] of Object.entries(value)) {
    const key = prefix + name;
    if (entry && typeof entry === "object" && !Array.isArray(entry)) yield* flat(entry, `${key}.`);
    else if ((entry ?? "") !== "") yield [key, [entry].flat().map((item) => (typeof item === "object" ? JSON.stringify(item) : item)).join(", ")];
  }
}

function settingsTable(record) {
  const rows = [...settingsOf(record)].filter(([name]) => name !== "sampled_as").map(([name, value]) => [settingName(name), value]);
  return folded(t("n_settings", { n: rows.length }), () => table([t("setting"), t("value")], rows));
}
