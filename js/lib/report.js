// What Profile Report and Benchmark show on themselves: pictures, plots in the colours of the page, tables.
import { legend, StepChart } from "./chart.js";
import { kernelTable, pictures, section, settingsLine, share, table } from "./detail.js";
import { el, svg } from "./dom.js";
import { duration, gigabytes, isNumber, phasesOf, rate, recordBars, stepsText } from "./figures.js";
import { t } from "./i18n.js";
import { memoryPeaks, statusBadge } from "./parts.js";
import { csvUrl, jsonUrl, viewUrl } from "./server.js";

const APART = ["load", "compile"]; // phases that are no part of the time from text to image

/** A record as Profile Report shows it. */
export function reportFace(record) {
  const { request = {}, summary = {} } = record;
  const bars = recordBars(record.steps ?? []);
  const chart = new StepChart();
  chart.draw(bars, { stepMs: summary.step_time_ms });
  return [
    el("div", { class: "sl-head" }, el("b", { class: "sl-title" }, request.plan ?? record.run_id, statusBadge(record.status)), el("b", { class: "sl-figure", text: rate(summary.it_per_s) })),
    el("div", { class: "sl-hint", text: settingsLine(record) }),
    pictures(record.run_id, record.artifacts?.images),
    notes([record.error, ...(record.warnings ?? [])].filter(Boolean)),
    section(t("phases"), phaseTable(record)),
    bars.length ? [chart.element, legend(bars, summary), folded(stepsText(bars.length), () => stepTable(bars))] : null,
    section(t("kernels"), kernelTable(record.kernels)),
    el("div", { class: "sl-tools" }, link("JSON", jsonUrl(record.run_id), ""), link("CSV", csvUrl(), "results.csv")),
  ];
}

function phaseTable({ phases_ms: phases = {}, memory = {} }) {
  const timed = phasesOf(phases);
  const longest = Math.max(...timed.map(([, ms]) => ms));
  const peak = (name) => memoryPeaks(memory[name]).map(([kind, gb]) => `${t(kind)} ${gigabytes(gb)}`)[0] ?? "";
  const rows = timed.map(([name, ms]) => [
    t(`phase_${name}`),
    el("i", { class: `sl-part sl-ph-${name}`, style: `width:${((100 * ms) / longest).toFixed(1)}%` }),
    duration(ms),
    isNumber(phases.total) && !APART.includes(name) ? share((100 * ms) / phases.total) : "",
    peak(name),
  ]);
  const kept = Object.entries(phases).filter(([, value]) => value === "cached");
  rows.push(...kept.map(([name]) => [t(`phase_${name}`), "", t("kind_cached"), "", ""]));
  if (isNumber(phases.total)) rows.push([t("total"), "", duration(phases.total), "", peak("overall")]);
  return rows.length ? table([[t("phase"), "", t("time"), t("share"), t("peak")], ...rows], "sl-figures sl-parts") : null;
}

function stepTable(bars) {
  const rows = bars.map(({ ms, kind, step }, index) => [
    String(index + 1),
    isNumber(step.sigma) ? step.sigma.toFixed(4) : "",
    duration(ms),
    t(`kind_${kind}`),
    `${step.evals}`,
    `${step.cond_rows}+${step.uncond_rows}`,
  ]);
  return table([["", "σ", t("time"), t("kind"), t("evaluations"), t("cond_uncond")], ...rows], "sl-figures");
}

/** Something that is made when somebody unfolds it. */
function folded(title, make) {
  const one = el("details", { class: "sl-fold" }, el("summary", { text: title }));
  one.addEventListener("toggle", () => one.append(make()), { once: true });
  return one;
}

function notes(lines) {
  return lines.length ? el("div", { class: "sl-notes", text: lines.join("\n") }) : null;
}

const link = (text, href, download) => el("a", { class: "sl-button", href, download, text });

/** A sweep as Benchmark tells it: `speedlab_sweep` of its result. */
export function sweepFace({ header, rows, notes: lines, plot, sheet, page }) {
  const address = viewUrl(sheet);
  return [
    el("a", { href: address, target: "_blank", rel: "noopener" }, el("img", { class: "sl-sheet", src: address, alt: t("contact_sheet") })),
    el("div", { class: "sl-tools" }, link(t("open_page"), viewUrl(page), page.filename), link("CSV", csvUrl(), "results.csv")),
    el("div", { class: "sl-wide", tabindex: "0", role: "region", "aria-label": t("results") }, table([header, ...rows], "sl-figures")),
    notes(lines),
    ...plot.panels.map((panel) => section(panel.name, plotOf(plot, panel))),
  ];
}

const COLOURS = 8;
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [520, 190, 50, 12, 10, 42];

/** One quantity over the values of an axis, with the range from minimum to maximum of each point. */
function plotOf({ axis, labels, at, lines }, { from_zero: fromZero, series }) {
  const points = series.flatMap((one) => one.points);
  if (!points.length) return null;
  const marks = ticks(fromZero ? 0 : Math.min(...points.map((one) => one[2])), Math.max(...points.map((one) => one[3])));
  const [bottom, top, first, last] = [marks[0], marks.at(-1), Math.min(...at), Math.max(...at)];
  const y = (value) => TOP + ((HEIGHT - TOP - BOTTOM) * (top - value)) / (top - bottom);
  const x = (index) => LEFT + 24 + ((WIDTH - LEFT - RIGHT - 48) * (last > first ? (at[index] - first) / (last - first) : 0.5));
  const every = Math.ceil((labels.length * (2 + Math.max(...labels.map(short).map((label) => label.length))) * 7) / (WIDTH - LEFT));
  const word = (text, name, place) => svg("text", { class: name, ...place, text });
  const drawing = svg(
    "svg",
    { class: "sl-graph", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": points.map(([index, value]) => `${labels[index]}: ${plain(value)}`).join(", ") },
    marks.map((mark) => [svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(mark), y2: y(mark) }), word(plain(mark), "sl-y", { x: LEFT - 6, y: y(mark) + 4 })]),
    labels.map((label, index) => (index % every ? null : word(short(label), "sl-x", { x: x(index), y: HEIGHT - BOTTOM + 17 }))),
    word(axis, "sl-x", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 6 }),
    series.map((one, number) =>
      svg(
        "g",
        { class: `sl-line${number % COLOURS}` },
        lines ? svg("polyline", { points: one.points.map(([index, value]) => `${x(index)},${y(value)}`).join(" ") }) : null,
        one.points.map(([index, value, low, high]) => [
          high > low ? svg("line", { x1: x(index), x2: x(index), y1: y(low), y2: y(high) }) : null,
          svg("circle", { cx: x(index), cy: y(value), r: 4 }, svg("title", { text: `${one.label} ${labels[index]}: ${plain(value)}` })),
        ]),
      ),
    ),
  );
  const named = series.some((one) => one.label);
  return el("div", null, drawing, named ? el("div", { class: "sl-legend" }, series.map((one, number) => el("span", null, el("i", { class: `sl-dot sl-line${number % COLOURS}` }), one.label))) : null);
}

const plain = (value) => String(Number(value.toPrecision(4)));
const short = (label) => (label.length > 20 ? `${label.slice(0, 19)}…` : label);

/** About five round values from below the smallest to above the largest. */
function ticks(low, high) {
  const rough = (high - low) / 4 || Math.abs(high) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((one) => one * power >= rough) * power;
  const [first, last] = [Math.floor(low / step), Math.max(Math.ceil(high / step), Math.floor(low / step) + 1)];
  return Array.from({ length: last - first + 1 }, (_, index) => (first + index) * step);
}
