// One run in full.
import { app } from "../../../scripts/app.js";
import { legend, memoryStrip, StepChart } from "./chart.js";
import { button, copyButton, el } from "./dom.js";
import { duration, gigabytes, isNumber, rate, recordBars, stepsText } from "./figures.js";
import { t } from "./i18n.js";
import { memoryPeaks, phaseBar, statusBadge } from "./parts.js";
import { fileUrl, jsonUrl, pageUrl, readWorkflow } from "./server.js";

const KERNELS = 12;

/** The page of a record; `line` is its line of the list, `remove` its delete button. */
export function detailView(record, line, remove) {
  const { request = {}, summary = {}, artifacts = {} } = record;
  const bars = recordBars(record.steps ?? []);
  const chart = new StepChart();
  chart.draw(bars, { stepMs: summary.step_time_ms });
  const notes = [record.error, ...(record.warnings ?? [])].filter(Boolean).join("\n");
  return el(
    "div",
    { class: "sl-detail", "data-run": record.run_id },
    el("h3", null, request.plan ?? record.run_id, statusBadge(record.status)),
    request.label && request.label !== request.plan ? el("div", { class: "sl-sub sl-label", text: t("asked_as", { label: request.label }) }) : null,
    el("div", { class: "sl-sub", text: settingsLine(record) }),
    el("div", { class: "sl-big" }, bigFigure(duration(record.phases_ms?.total), t("total")), bigFigure(rate(summary.it_per_s), t("speed")), ...memoryPeaks(record.memory?.overall).slice(0, 1).map(([name, value]) => bigFigure(gigabytes(value), t(name)))),
    bars.length ? [chart.element, memoryStrip(record.step_memory), legend(bars, summary)] : null,
    phaseBar(record.phases_ms),
    section(t("memory"), memoryTable(record.memory)),
    section(t("kernels"), kernelTable(record.kernels)),
    pictures(record.run_id, artifacts.images),
    notes ? el("div", { class: "sl-notes", text: notes }) : null,
    section(t("settings"), settingsTable(record)),
    el(
      "div",
      { class: "sl-tools sl-wrap" },
      openButton(record.run_id),
      el("a", { class: "sl-button", "data-act": "page", href: pageUrl(record.run_id), download: "", title: t("page_title"), text: "HTML" }),
      copyButton(t("markdown"), () => line.markdown),
      el("a", { class: "sl-button", href: jsonUrl(record.run_id), download: "", text: "JSON" }),
      ...Object.entries(artifacts).flatMap(([kind, value]) => (kind === "images" ? [] : links(record.run_id, kind, value))),
      remove,
    ),
    artifacts.trace ? el("div", { class: "sl-hint", text: t("trace_hint") }) : null,
  );
}

// Puts the workflow of a run on the canvas. Its image holds it; why there is none stands on the button.
function openButton(runId) {
  const open = button("workflow", t("open_workflow"), null, { disabled: true });
  readWorkflow(runId).then(
    ({ workflow, prompt }) => {
      open.disabled = false;
      open.onclick = () => (workflow ? app.loadGraphData(workflow, true, true, runId) : app.loadApiJson(prompt, runId));
    },
    (error) => (open.title = error.message),
  );
  return open;
}

/** A record's time as people here write it. */
export function when(timestamp) {
  // Python writes the zone without a colon, which not every browser reads.
  const date = new Date(String(timestamp).replace(/([+-]\d\d)(\d\d)$/, "$1:$2"));
  if (Number.isNaN(date.getTime())) return "";
  return date.toLocaleString([], { dateStyle: "short", timeStyle: "short" });
}

function bigFigure(value, label) {
  return value === "–" ? null : el("div", null, el("b", { text: value }), el("span", { text: label }));
}

export function section(title, content) {
  return content ? el("section", null, el("h4", { text: title }), content) : null;
}

/** The name of a setting, which may break behind a dot or an underscore. */
export function settingName(name) {
  return el("span", null, name.split(/(?<=[._])/).flatMap((part) => [part, el("wbr")]));
}

/** Rows of texts as a table, the first row its head. */
export function table(rows, name = "") {
  const [head, ...body] = rows;
  return el(
    "table",
    { class: `sl-table ${name}` },
    el("thead", null, el("tr", null, head.map((cell) => el("th", { text: cell })))),
    el("tbody", null, body.map((row) => el("tr", null, row.map((cell) => (cell instanceof Node ? el("td", null, cell) : el("td", { text: cell })))))),
  );
}

function memoryTable(memory) {
  const rows = Object.entries(memory ?? {}).map(([phase, peaks]) => {
    const known = memoryPeaks(peaks);
    return known.length ? [t(`phase_${phase}`), known.map(([name, value]) => `${t(name)} ${gigabytes(value)}`).join(" · ")] : null;
  });
  const some = rows.filter(Boolean);
  return some.length ? table([[t("phase"), t("peak")], ...some]) : null;
}

export function kernelTable(kernels) {
  if (!kernels?.length) return null;
  const rows = kernels.slice(0, KERNELS).map((kernel) => [
    el("span", { class: "sl-name", title: kernel.name, text: kernel.name }),
    kernel.family ?? "",
    String(kernel.calls ?? ""),
    duration(kernel.ms),
    share(kernel.share),
  ]);
  return table([[t("kernel"), t("family"), t("calls"), t("time"), t("share")], ...rows], "sl-kernels");
}

export const share = (percent) => (isNumber(percent) ? `${percent.toFixed(1)} %` : "");

export function pictures(runId, images) {
  if (!Array.isArray(images) || !images.length) return null;
  return el(
    "div",
    { class: "sl-pictures" },
    images.slice(0, 8).map((_, index) => {
      const href = fileUrl(runId, "images", index);
      return el("a", { href, target: "_blank", rel: "noopener" }, el("img", { src: href, loading: "lazy", alt: t("picture_n", { n: index + 1 }) }));
    }),
  );
}

const KNOWN_LINKS = ["chart", "charts", "trace"];

function links(runId, kind, value) {
  const values = Array.isArray(value) ? value : [value];
  const name = KNOWN_LINKS.includes(kind) ? t(`open_${kind}`) : kind;
  return values.filter((path) => typeof path === "string").map((path, index) => el("a", { class: "sl-button", href: fileUrl(runId, kind, index), target: "_blank", rel: "noopener", title: path, text: values.length > 1 ? `${name} ${index + 1}` : name }));
}

export function settingsLine({ request = {}, env = {}, summary = {} }) {
  const size = isNumber(request.width) ? `${request.width}×${request.height} ×${request.batch}` : "";
  return [request.checkpoint?.name, size, request.sampler && `${request.sampler}/${request.scheduler}`, stepsText(summary.steps ?? request.steps, request.steps), env.device].filter(Boolean).join(" · ");
}

/** Everything that was set, as [name, text], flat. */
export function settingsOf(record) {
  return new Map([...flat(record.request ?? {}, ""), ...flat(record.env ?? {}, "env.")]);
}

function* flat(value, prefix) {
  for (const [name, entry] of Object.entries(value)) {
    const key = prefix + name;
    if (entry && typeof entry === "object" && !Array.isArray(entry)) yield* flat(entry, `${key}.`);
    else if (entry !== null && entry !== undefined && entry !== "") yield [key, Array.isArray(entry) ? entry.map((item) => (typeof item === "object" ? JSON.stringify(item) : item)).join(", ") : String(entry)];
  }
}

function settingsTable(record) {
  const rows = [...settingsOf(record)].filter(([name]) => name !== "sampled_as").map(([name, value]) => [settingName(name), value]);
  return rows.length ? el("details", null, el("summary", { text: t("n_settings", { n: rows.length }) }), table([[t("setting"), t("value")], ...rows])) : null;
}
