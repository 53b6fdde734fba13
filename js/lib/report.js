// What Profile Report and Benchmark show on themselves.
import { folded, kernelTable, pictures, section, settingsLine, share, table } from "./detail.js";
import { div, dot, el, link, svg } from "./dom.js";
import { duration, isNumber, phasesOf, rate, recordBars, stepsText } from "./figures.js";
import { t } from "./i18n.js";
import { notesOf, peakTexts, statusBadge } from "./parts.js";
import { csvUrl, jsonUrl, pageUrl, viewUrl } from "./server.js";

const APART = ["load", "compile"]; // phases that are no part of the time from text to image

export function reportFace(record) {
  const { request = {}, summary = {} } = record;
  const bars = recordBars(record);
  return [
    div("sl-head", el("b", { class: "sl-title", title: request.plan }, statusBadge(record.status), request.plan ?? record.run_id), el("b", { class: "sl-figure" }, rate(summary.it_per_s))),
    div("sl-hint", settingsLine(record)),
    pictures(record.run_id, record.artifacts?.images),
    notesOf(record),
    section(t("phases"), phaseTable(record)),
    bars.length && folded(stepsText(bars.length), () => stepTable(bars)),
    section(t("kernels"), kernelTable(record.kernels)),
    div("sl-tools", link("HTML", pageUrl(record.run_id), "", { title: t("page_title") }), link("JSON", jsonUrl(record.run_id), ""), link("CSV", csvUrl(), "results.csv")),
  ];
}

function phaseTable({ phases_ms: phases = {}, memory = {} }) {
  const timed = phasesOf(phases);
  const longest = Math.max(...timed.map(([, ms]) => ms));
  const peak = (name) => peakTexts(memory[name])[0] ?? "";
  const bar = (name, ms) => el("i", { class: `sl-part sl-ph-${name}`, style: `width:${((100 * ms) / longest).toFixed(1)}%` });
  const rows = timed.map(([name, ms]) => [t(`phase_${name}`), bar(name, ms), duration(ms), !APART.includes(name) && share((100 * ms) / phases.total), peak(name)]);
  for (const [name, value] of Object.entries(phases)) if (value === "cached") rows.push([t(`phase_${name}`), "", t("kind_cached"), "", ""]);
  if (isNumber(phases.total)) rows.push([t("total"), "", duration(phases.total), "", peak("overall")]);
  return table([t("phase"), "", t("time"), t("share"), t("peak")], rows, "sl-figures sl-parts");
}

function stepTable(bars) {
  const rows = bars.map(({ ms, kind, step }, index) => [index + 1, isNumber(step.sigma) && step.sigma.toFixed(4), duration(ms), t(`kind_${kind}`), `${step.evals} · ${step.cond_rows}+${step.uncond_rows}`]);
  return table(["", "σ", t("time"), t("kind"), t("evaluations")], rows, "sl-figures");
}

export function sweepFace({ header, rows, notes, plot, sheet, page }) {
  const address = viewUrl(sheet);
  return [
    el("a", { href: address, target: "_blank" }, el("img", { class: "sl-sheet", src: address, alt: t("contact_sheet") })),
    div("sl-tools", link(t("open_page"), viewUrl(page), page.filename), link("CSV", csvUrl(), "results.csv")),
    el("div", { class: "sl-wide", tabindex: "0", role: "region", "aria-label": t("results") }, table(header, rows, "sl-figures")),
    div("sl-notes", notes.join("\n")),
    ...plot.panels.map((panel) => section(panel.name, plotOf(plot, panel))),
  ];
}

const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [520, 190, 50, 508, 10, 148];

/** One quantity over the values of an axis, with the range from minimum to maximum of each point. */
function plotOf({ axis, labels, at, lines }, { marks, series }) {
  if (!marks.length) return null;
  const y = (value) => BOTTOM - ((BOTTOM - TOP) * (value - marks[0])) / (marks.at(-1) - marks[0]);
  const x = (index) => LEFT + 24 + (RIGHT - LEFT - 48) * at[index];
  const names = labels.map((label) => (label.length > 20 ? `${label.slice(0, 19)}…` : label));
  const every = Math.ceil((names.length * (2 + Math.max(...names.map((name) => name.length))) * 7) / (RIGHT - LEFT));
  const text = ([index, value]) => `${labels[index]}: ${plain(value)}`;
  const drawing = svg(
    "svg",
    { class: "sl-graph", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": series.flatMap((one) => one.points.map(text)).join(", ") },
    marks.map((mark) => [line(LEFT, RIGHT, y(mark), y(mark)), svg("text", { class: "sl-y", x: LEFT - 6, y: y(mark) + 4, text: plain(mark) })]),
    names.map((text, index) => (index % every ? null : svg("text", { x: x(index), y: BOTTOM + 17, text }))),
    svg("text", { x: (LEFT + RIGHT) / 2, y: HEIGHT - 6, text: axis }),
    series.map((one, number) =>
      svg(
        "g",
        { class: `sl-line${number % 8}` },
        lines ? svg("polyline", { points: one.points.map(([index, value]) => `${x(index)},${y(value)}`).join(" ") }) : null,
        one.points.map((point) => [
          line(x(point[0]), x(point[0]), y(point[2]), y(point[3])),
          svg("circle", { cx: x(point[0]), cy: y(point[1]), r: 4 }, svg("title", { text: `${one.label} ${text(point)}` })),
        ]),
      ),
    ),
  );
  return el("div", null, drawing, div("sl-legend", series.map((one, number) => one.label && dot(`sl-line${number % 8}`, one.label))));
}

const line = (x1, x2, y1, y2) => svg("line", { x1, x2, y1, y2 });
const plain = (value) => String(Number(value.toPrecision(4)));
