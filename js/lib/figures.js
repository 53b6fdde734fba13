// Numbers: how they are written, and what is derived from step times.
import { t } from "./i18n.js";

export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

export function duration(ms) {
  if (!isNumber(ms)) return "–";
  if (ms < 10) return `${ms.toFixed(2)} ms`;
  if (ms < 1000) return `${ms.toFixed(ms < 100 ? 1 : 0)} ms`;
  const seconds = ms / 1000;
  if (seconds < 100) return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
  const minutes = Math.floor(Math.round(seconds) / 60);
  return `${minutes} min ${Math.round(seconds) - minutes * 60} s`;
}

/** Time to go, without digits that nobody believes. */
export function remaining(ms) {
  const seconds = Math.ceil(ms / 1000);
  if (seconds < 60) return `${seconds} s`;
  const [hours, minutes] = [Math.floor(seconds / 3600), Math.floor((seconds % 3600) / 60)];
  return hours ? `${hours} h ${minutes} min` : `${minutes} min ${seconds % 60} s`;
}

export function rate(perSecond) {
  if (!isNumber(perSecond) || perSecond <= 0) return "–";
  return perSecond >= 1 ? `${perSecond.toFixed(perSecond < 100 ? 2 : 0)} it/s` : `${(1 / perSecond).toFixed(2)} s/it`;
}

/** Steps taken, and those asked for where a scheduler made others. */
export function stepsText(taken, asked) {
  if (!isNumber(taken)) return "";
  if (isNumber(asked) && asked !== taken) return t("n_steps_of", { n: taken, asked });
  return t(taken === 1 ? "n_steps_one" : "n_steps", { n: taken });
}

export const gigabytes = (value) => (isNumber(value) ? `${value.toFixed(value < 10 ? 2 : 1)} GB` : "–");

export const KINDS = ["full", "cached", "forecast", "cfg_off", "first"];

// The kinds of speedlab/measure/summary.py, and a colour of its own for the first step, which also prepares.
function kindsOf(steps) {
  const anyUncond = steps.some((one) => one.uncond);
  const off = ({ uncond, idle }) => (anyUncond && !uncond && !idle ? "cfg_off" : "full");
  const kindOf = (one, index) => (one.forecast ? "forecast" : one.cached ? "cached" : index ? off(one) : "first");
  return steps.map((one, index) => ({ ms: one.ms, kind: kindOf(one, index), step: one.step }));
}

/** The bars of a record: {ms, kind, step}. Device time where there is one. */
export const recordBars = ({ steps }) =>
  kindsOf((steps ?? []).map((step) => {
    const { evals, uncond_rows } = step;
    const forecast = evals > 0 && step.cond_rows === 0 && uncond_rows === 0;
    return { ms: [step.gpu_ms, step.cpu_ms, 0].find(isNumber), forecast, cached: step.cached, uncond: uncond_rows > 0, idle: !(evals > 0), step };
  }));

// Live steps are [ms, flags]; see speedlab/web/live.py.
export const liveBars = (steps) => kindsOf(steps.map(([ms, flags]) => ({ ms, cached: flags & 1, uncond: flags & 2, forecast: flags & 4 })));

// Of one step `median_ms` is its time.
export const hasMedian = (stat) => (stat?.samples ?? stat?.steps) > 1;

/** Steps but the first, where compilation and warm-up show; a single step stands for itself. */
export const later = (bars) => (bars.length > 1 ? bars.slice(1) : bars).map((bar) => bar.ms);

/** Milliseconds until all runs of a live state are done; null before the first step. */
export function timeToGo({ steps, total, run, runs }) {
  if (!steps.length) return null;
  const usual = later(liveBars(steps));
  const mean = usual.reduce((sum, ms) => sum + ms, 0) / usual.length;
  return mean * (Math.max(0, total - steps.length) + Math.max(0, runs - 1 - run) * total);
}

/** At most `most` bars: neighbours are averaged, the commonest kind wins. */
export function binned(bars, most = 200) {
  const size = Math.ceil(bars.length / most);
  if (size <= 1) return bars.map((bar, index) => ({ ...bar, from: index, to: index }));
  const bins = [];
  for (let from = 0; from < bars.length; from += size) {
    const part = bars.slice(from, from + size);
    const count = (kind) => part.filter((bar) => bar.kind === kind).length;
    const kind = [...KINDS].sort((a, b) => count(b) - count(a))[0];
    bins.push({ ms: part.reduce((sum, bar) => sum + bar.ms, 0) / part.length, kind, from, to: from + part.length - 1 });
  }
  return bins;
}

const PHASES = ["load", "compile", "text_encode", "core_text_encode", "free", "to_device", "prepare", "sample", "decode", "after_sampling", "save"];

/** [name, ms] of a record's phases that took time, in the order of the run. */
export const sumOf = (parts) => parts.reduce((sum, [, ms]) => sum + ms, 0);
export const phasesOf = (phases) => PHASES.map((name) => [name, phases?.[name]]).filter(([, ms]) => isNumber(ms) && ms > 0);

export function barText(bar) {
  const which = bar.to > bar.from ? t("steps_range", { from: bar.from + 1, to: bar.to + 1 }) : t("step_n", { n: bar.from + 1 });
  const parts = [which, duration(bar.ms), t(`kind_${bar.kind}`)];
  if (bar.step) {
    if (isNumber(bar.step.sigma)) parts.push(`σ ${bar.step.sigma.toPrecision(3)}`);
    parts.push(t(bar.step.evals === 1 ? "rows_one" : "rows", { evals: bar.step.evals, cond: bar.step.cond_rows, uncond: bar.step.uncond_rows }));
  }
  return parts.join(" · ");
}
