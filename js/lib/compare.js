// Two runs beside each other, A the earlier one, and several over time.
import { legend, StepChart } from "./chart.js";
import { kernelName, section, settingName, settingsOf, table, when } from "./detail.js";
import { div, dot, el, svg } from "./dom.js";
import { duration, gigabytes, hasMedian, isNumber, KINDS, phasesOf, rate, recordBars } from "./figures.js";
import { t } from "./i18n.js";
import { phaseBar, statusBadge } from "./parts.js";
import { listRuns, readRun } from "./server.js";

const KERNELS = 15;
const OFFERED = 100;
// Different in every run and said elsewhere.
const NOT_SETTINGS = new Set(["sampled_as", "plan", "plan_named"]);

/** The page that compares two records. */
export function compareView(a, b) {
  const bars = [recordBars(a.steps ?? []), recordBars(b.steps ?? [])];
  const longest = Math.max(...[a, b].map((run) => phasesOf(run.phases_ms).reduce((sum, [, ms]) => sum + ms, 0)));
  return div(
    "sl-detail sl-compare",
    div("sl-pair", nameOf("A", a), nameOf("B", b)),
    verdict(a, b),
    table(["", "A", "B", "B / A"], figures(a, b), "sl-figures"),
    section(t("steps"), el("div", null, stepCharts(bars, [a, b]), legend(bars.flat()))),
    section(t("phases"), div("sl-two", [a, b].map((run, n) => [letter(n), phaseBar(run.phases_ms, longest) ?? "–"]))),
    section(t("kernels"), kernels(a, b)),
    section(t("differences"), differences(a, b) ?? div("sl-hint", t("no_differences"))),
  );
}

const letter = (n) => el("span", null, "AB"[n]);

function nameOf(which, run) {
  return el("div", null, el("b", { class: "sl-letter" }, which), el("span", { title: run.run_id, text: run.request?.plan ?? run.run_id }), statusBadge(run.status));
}

// What the user waits for decides; how much of it is sampling tells what sampling faster could still gain.
function verdict(a, b) {
  const [totals, sampled] = ["total", "sample"].map((name) => [a, b].map((run) => run.phases_ms?.[name]));
  if (!totals.every(isPositive)) return div("sl-verdict", sampled.every(isPositive) ? t("no_verdict_but_sampling", { ratio: words(...sampled) }) : t("no_verdict"));
  const [share_a, share_b] = totals.map((total, index) => (isPositive(sampled[index]) ? Math.round((100 * sampled[index]) / total) : "–"));
  const text = t("verdict", { ratio: words(...totals), time_a: duration(totals[0]), time_b: duration(totals[1]), share_a, share_b });
  // A ratio, and never good or bad: two runs are two moments of a machine. `run.py compare` judges, from three sessions of each.
  const repeated = [a, b].every((run) => run.summary?.repeats > 1);
  return el("div", null, mixture(a, b), div("sl-verdict", text), div("sl-hint", t(repeated ? "within_sessions" : "single_runs")));
}

// What differs besides what is compared: then the ratio is not of the techniques alone.
function mixture(a, b) {
  const told = [
    ["mixed_machine", (run) => run.env_hash],
    ["mixed_size", (run) => `${run.request?.width}x${run.request?.height}, ${run.request?.batch}`],
    ["mixed_steps", (run) => run.summary?.steps],
    ["mixed_checkpoint", (run) => run.request?.checkpoint?.name],
  ].filter(([, read]) => read(a) !== read(b));
  return told.length ? div("sl-hint sl-mixed", t("mixed", { what: told.map(([name]) => t(name)).join(", ") })) : null;
}

const unique = (...names) => [...new Set(names)];
const isPositive = (value) => isNumber(value) && value > 0;

const words = (before, after) =>
  after <= before ? t("times_faster", { times: (before / after).toFixed(2) }) : t("times_slower", { times: (after / before).toFixed(2) });

function figures(a, b) {
  const rows = [
    [t("total"), (run) => run.phases_ms?.total, duration],
    [t("speed"), (run) => run.summary?.it_per_s, rate],
    [t("step_time"), (run) => run.summary?.step_time_ms, duration],
    ...KINDS.map((kind) => [kindName(kind, [a, b]), (run) => run.summary?.step_kinds?.[kind]?.median_ms, duration]),
    [t("first_eval"), (run) => run.summary?.first_eval_ms, duration],
    ...unique(...[a, b].flatMap((run) => phasesOf(run.phases_ms).map(([name]) => name))).map((name) => [t(`phase_${name}`), (run) => run.phases_ms?.[name], duration]),
    [t("vram"), (run) => run.memory?.overall?.peak_allocated_gb, gigabytes],
    [t("ram"), (run) => run.memory?.overall?.peak_rss_gb, gigabytes],
  ];
  return rows
    .map(([name, read, write]) => [name, read(a), read(b), write])
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

function kernels(a, b) {
  const times = [a, b].map((run) => new Map((run.kernels ?? []).map((kernel) => [kernel.name, kernel.ms])));
  const both = unique(...times.flatMap((one) => [...one.keys()])).map((name) => [name, ...times.map((one) => one.get(name))]);
  const most = ([, before = 0, after = 0]) => Math.max(before, after);
  const rows = both
    .sort((x, y) => most(y) - most(x))
    .slice(0, KERNELS)
    .map(([name, before, after]) => [kernelName(name), duration(before), duration(after), ratio(before, after)]);
  return table([t("kernel"), "A", "B", "B / A"], rows, "sl-kernels");
}

function differences(a, b) {
  const [before, after] = [settingsOf(a), settingsOf(b)];
  const rows = unique(...before.keys(), ...after.keys()).filter((name) => !NOT_SETTINGS.has(name) && before.get(name) !== after.get(name)).map((name) => [settingName(name), before.get(name) ?? "–", after.get(name) ?? "–"]);
  return table([t("setting"), "A", "B"], rows, "sl-differences");
}

/** The same as a tab of the bottom panel: of the two runs that the sidebar has chosen, else of the newest two. */
export class CompareTab {
  picked = [];

  render(container) {
    this.choices = ["A", "B"].map((letter) => el("select", { class: "sl-filter", "aria-label": letter, onchange: () => this.show(this.choices.map((one) => one.value)) }));
    this.place = el("div");
    container.replaceChildren(el("div", { class: "sl-tab sl-bottom", tabindex: "0" }, div("sl-tools", this.choices), this.place));
    this.show(this.picked, true);
  }

  /** There may be a new run, or others were chosen. */
  show(picked = this.picked, here = this.place?.isConnected) {
    this.picked = picked;
    if (here) this.#choose(picked).catch((error) => this.place.replaceChildren(t("failed", { why: error.message })));
  }

  async #choose(picked) {
    const { runs } = await listRuns(0, OFFERED, "");
    const names = new Map(runs.map((run) => [run.run_id, `${when(run.timestamp)} · ${run.plan}`]));
    const chosen = [...(picked.length === 2 ? picked : [...names.keys()].slice(0, 2))].sort();
    this.choices.forEach((choice, n) => {
      choice.replaceChildren(...unique(...names.keys(), ...chosen).map((id) => el("option", { value: id, text: names.get(id) ?? id })));
      choice.value = chosen[n];
    });
    const both = this.choices.every((choice) => choice.value);
    this.place.replaceChildren(both ? compareView(...(await Promise.all(chosen.map(readRun)))) : t("no_runs"));
  }
}

const OVER_TIME = [
  ["total", "total_ms", duration],
  ["speed", "it_per_s", rate],
  ["memory", "peak_gb", gigabytes],
];

/** Lines of the list by date: a chart for each figure, a colour for each plan. */
export function timeView(lines) {
  const runs = [...lines].sort((a, b) => (a.run_id < b.run_id ? -1 : 1));
  const plans = unique(...runs.map((run) => run.plan));
  const colour = (plan) => `sl-${KINDS[plans.indexOf(plan) % KINDS.length]}`;
  const charts = OVER_TIME.map(([name, key, write]) => {
    const known = runs.map((run) => run[key]).filter(isPositive);
    if (!known.length) return null;
    const [least, most] = [Math.min(...known), Math.max(...known)];
    // A line without length and with round ends: a dot that no stretching makes an egg.
    const dots = runs.map((run, n) => isPositive(run[key]) && svg("path", { class: colour(run.plan), d: `M${n + 0.5} ${1.1 - run[key] / most}h0` }));
    const label = `${t(name)}: ${write(least)} – ${write(most)}`;
    return section(label, svg("svg", { class: "sl-dots", viewBox: `0 0 ${runs.length} 1.1`, preserveAspectRatio: "none", role: "img", "aria-label": label }, dots));
  });
  const rows = runs.map((run) => [when(run.timestamp), dot(colour(run.plan), run.plan), ...OVER_TIME.map(([, key, write]) => write(run[key]))]);
  const head = ["date", "plan", ...OVER_TIME.map(([name]) => name)].map((name) => t(name));
  return div("sl-detail sl-over-time", el("h3", null, t("over_time")), charts, div("sl-hint", t("over_time_hint")), table(head, rows, "sl-figures"));
}
