// Two runs beside each other, A the earlier one, and several over time.
import { legend, StepChart } from "./chart.js";
import { kernelName, section, settingName, settingsOf, table, when } from "./detail.js";
import { div, dot, el, svg } from "./dom.js";
import { duration, gigabytes, hasMedian, isNumber, KINDS, phasesOf, rate, recordBars, stepsText, sumOf } from "./figures.js";
import { t } from "./i18n.js";
import { phaseBar, picture, statusBadge } from "./parts.js";
import { findRun, listRuns } from "./server.js";

const KERNELS = 15;
const OFFERED = 100;
const NOT_SETTINGS = new Set(["sampled_as", "plan", "plan_named"]);

export function compareView(...runs) {
  const bars = runs.map(recordBars);
  const longest = Math.max(...runs.map((run) => sumOf(phasesOf(run.phases_ms))));
  return div(
    "sl-detail sl-compare",
    div("sl-pair", runs.map(nameOf)),
    verdict(runs),
    images(runs),
    table(["", "A", "B", "B / A"], figures(runs), "sl-figures"),
    section(t("steps"), el("div", null, stepCharts(bars, runs), legend(bars.flat()))),
    section(t("phases"), div("sl-two", runs.map((run, n) => [letter(n), phaseBar(run.phases_ms, longest) ?? "–"]))),
    section(t("kernels"), kernels(runs)),
    section(t("differences"), differences(runs) ?? div("sl-hint", t("no_differences"))),
  );
}

const letter = (n) => el("span", null, "AB"[n]);

function nameOf(run, n) {
  return el("div", null, el("b", { class: "sl-letter" }, "AB"[n]), statusBadge(run.status), el("span", { title: run.request?.plan, "data-run": run.run_id, text: run.request?.plan ?? run.run_id }));
}

// Their first images side by side, and A over B as far as the slider says.
function images(runs) {
  const shown = (n) => picture(runs[n].run_id, 0, { alt: "AB"[n] });
  if (!runs.every((run) => run.artifacts?.images?.length)) return null;
  const over = shown(0);
  const move = () => (over.style.clipPath = `inset(0 ${100 - slider.value}% 0 0)`);
  const slider = el("input", { type: "range", value: 50, "aria-label": t("slider"), title: t("slider"), oninput: move });
  move();
  return el("div", null, div("sl-sides", shown(0), shown(1)), div("sl-over", shown(1), over, slider));
}

// What the user waits for decides; sampling's share tells what sampling faster could still gain.
function verdict(runs) {
  const [totals, sampled] = ["total", "sample"].map((name) => runs.map(at(`phases_ms.${name}`)));
  if (!totals.every(isPositive)) return div("sl-verdict", sampled.every(isPositive) ? t("no_verdict_but_sampling", { ratio: words(...sampled) }) : t("no_verdict"));
  const [share_a, share_b] = totals.map((total, index) => (isPositive(sampled[index]) ? Math.round((100 * sampled[index]) / total) : "–"));
  const text = t("verdict", { ratio: words(...totals), time_a: duration(totals[0]), time_b: duration(totals[1]), share_a, share_b });
  // A ratio, never good or bad: `run.py compare` judges.
  const repeated = runs.every((run) => run.summary?.repeats > 1);
  return el("div", null, mixture(...runs), div("sl-verdict", text), div("sl-hint", t(repeated ? "within_sessions" : "single_runs")));
}

// What differs besides what is compared: then the ratio is not of the techniques alone.
function mixture(a, b) {
  const diff = [
    ["mixed_machine", "env_hash"],
    ["mixed_size", "request.width", "request.height", "request.batch"],
    ["mixed_steps", "summary.steps"],
    ["mixed_checkpoint", "request.checkpoint.name"],
  ].filter(([, ...paths]) => paths.some((path) => at(path)(a) !== at(path)(b)));
  return diff.length ? div("sl-hint sl-mixed", t("mixed", { what: diff.map(([name]) => t(name)).join(", ") })) : null;
}

const at = (path) => (run) => path.split(".").reduce((part, name) => part?.[name], run);
const unique = (...names) => [...new Set(names)];
const isPositive = (value) => isNumber(value) && value > 0;

const words = (before, after) =>
  after <= before ? t("times_faster", { times: (before / after).toFixed(2) }) : t("times_slower", { times: (after / before).toFixed(2) });

function figures(runs) {
  const phases = unique(...runs.flatMap((run) => phasesOf(run.phases_ms).map(([name]) => name)));
  return [
    [t("total"), "phases_ms.total", duration],
    [t("speed"), "summary.it_per_s", rate],
    [t("step_time"), "summary.step_time_ms", duration],
    ...KINDS.map((kind) => [kindName(kind, runs), `summary.step_kinds.${kind}.median_ms`, duration]),
    [t("first_eval"), "summary.first_eval_ms", duration],
    ...phases.map((name) => [t(`phase_${name}`), `phases_ms.${name}`, duration]),
    [t("vram"), "memory.overall.peak_allocated_gb", gigabytes],
    [t("ram"), "memory.overall.peak_rss_gb", gigabytes],
  ]
    .map(([name, path, write]) => [name, ...runs.map(at(path)), write])
    .filter(([, before, after]) => isNumber(before) || isNumber(after))
    .map(([name, before, after, write]) => [name, write(before), write(after), ratio(before, after)]);
}

// A median where both runs have more than one step of the kind.
function kindName(kind, runs) {
  const medians = runs.map((run) => run.summary?.step_kinds?.[kind]).filter(Boolean).every(hasMedian);
  return medians ? t("kind_median", { kind: t(`kind_${kind}`), value: "" }).trim() : t(`kind_${kind}`);
}

const ratio = (before, after) => (isPositive(before) && isNumber(after) ? (after / before).toFixed(2) : "");

function stepCharts(bars, runs) {
  const scaleTo = bars.flatMap((run) => run.slice(1));
  const total = Math.max(...bars.map((run) => run.length));
  return bars.map((run, index) => {
    const chart = new StepChart();
    chart.draw(run, { total, stepMs: runs[index].summary?.step_time_ms, scaleTo: scaleTo.length ? scaleTo : null });
    return div("sl-two", letter(index), chart.element);
  });
}

function kernels(runs) {
  const times = runs.map((run) => new Map((run.kernels ?? []).map((kernel) => [kernel.name, kernel.ms])));
  const both = unique(...times.flatMap((one) => [...one.keys()])).map((name) => [name, ...times.map((one) => one.get(name))]);
  const most = ([, before = 0, after = 0]) => Math.max(before, after);
  const rows = both
    .sort((x, y) => most(y) - most(x))
    .slice(0, KERNELS)
    .map(([name, before, after]) => [kernelName(name), duration(before), duration(after), ratio(before, after)]);
  return table([t("kernel"), "A", "B", "B / A"], rows, "sl-kernels");
}

function differences(runs) {
  const [before, after] = runs.map(settingsOf);
  const rows = unique(...before.keys(), ...after.keys()).filter((name) => !NOT_SETTINGS.has(name) && before.get(name) !== after.get(name)).map((name) => [settingName(name), before.get(name) ?? "–", after.get(name) ?? "–"]);
  return table([t("setting"), "A", "B"], rows, "sl-differences");
}

/** The tab of the bottom panel: the two runs chosen in the sidebar, else the newest two. */
export class CompareTab {
  picked = [];

  render(container) {
    this.choices = ["A", "B"].map((letter) => el("select", { class: "sl-filter", "aria-label": letter, onchange: () => this.show(this.choices.map((one) => one.value)) }));
    this.place = el("div");
    container.replaceChildren(el("div", { class: "sl-tab sl-bottom", tabindex: "0" }, div("sl-tools", this.choices), this.place));
    this.show(this.picked, true);
  }

  show(picked = this.picked, here = this.place?.isConnected) {
    this.picked = picked;
    if (here) this.#choose(picked).catch((error) => this.place.replaceChildren(t("failed", { why: error.message })));
  }

  async #choose(picked) {
    const asked = (this.asked = {}); // of two questions the later one is answered
    const { runs } = await listRuns(0, OFFERED, "");
    if (asked !== this.asked) return;
    const names = new Map(runs.map((run) => [run.run_id, `${when(run.timestamp)} · ${run.plan} · ${stepsText(run.steps)}`]));
    const chosen = [...(picked.length === 2 ? picked : [...names.keys()].slice(0, 2))].sort();
    this.choices.forEach((choice, n) => {
      choice.replaceChildren(...unique(...names.keys(), ...chosen).map((id) => el("option", { value: id, text: names.get(id) ?? id })));
      choice.value = chosen[n];
    });
    if (chosen.length < 2) return this.place.replaceChildren(t(chosen.length ? "needs_compare" : "no_runs"));
    const records = await Promise.all(chosen.map(findRun));
    if (asked !== this.asked) return;
    if (records.includes(null)) return this.show([]); // deleted meanwhile
    this.place.replaceChildren(compareView(...records));
  }
}

const OVER_TIME = [["total", "total_ms", duration], ["speed", "it_per_s", rate], ["memory", "peak_gb", gigabytes]];

export function timeView(lines) {
  const runs = [...lines].sort((a, b) => (a.run_id < b.run_id ? -1 : 1));
  const plans = unique(...runs.map((run) => run.plan));
  // Turned by the golden angle, so that of any number no two are alike.
  const colour = (plan) => `--sl-plan: hsl(${Math.round(plans.indexOf(plan) * 137.5) % 360} 55% 52%)`;
  const charts = OVER_TIME.map(([name, key, write]) => {
    const known = runs.map((run) => run[key]).filter(isPositive);
    if (!known.length) return null;
    const [least, most] = [Math.min(...known), Math.max(...known)];
    // A line without length, with round ends: a dot, however stretched.
    const dots = runs.map((run, n) => isPositive(run[key]) && svg("path", { style: colour(run.plan), d: `M${n + 0.5} ${1.1 - run[key] / most}h0` }));
    const label = `${t(name)}: ${write(least)} – ${write(most)}`;
    return section(label, svg("svg", { class: "sl-dots", viewBox: `0 0 ${runs.length} 1.1`, preserveAspectRatio: "none", role: "img", "aria-label": label }, dots));
  });
  const rows = runs.map((run) => [el("span", { style: colour(run.plan) }, dot("sl-of-plan", `${when(run.timestamp)} · ${run.plan}`)), ...OVER_TIME.map(([, key, write]) => write(run[key]))]);
  const head = [["plan"], ...OVER_TIME].map(([name]) => t(name));
  return div("sl-detail sl-over-time", el("h3", null, t("over_time")), charts, div("sl-hint", t("over_time_hint")), table(head, rows, "sl-figures"));
}
