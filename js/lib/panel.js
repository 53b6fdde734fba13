// What a sampler shows on itself: step times while it runs, then the whole profile.
import { legend, memoryStrip, StepChart } from "./chart.js";
import { div, el, figure } from "./dom.js";
import { duration, isNumber, liveBars, rate, recordBars, remaining, timeToGo } from "./figures.js";
import { t } from "./i18n.js";
import { addElement, grow, redraw } from "./nodes.js";
import { memoryLine, notesOf, phaseBar, statusBadge } from "./parts.js";

const MIN_HEIGHT = 256;
const MARGIN = 10; // that ComfyUI leaves around such a widget where the widget does not tell
const panels = new WeakMap();

export function panelOf(node) {
  let panel = panels.get(node);
  if (!panel) {
    panel = new Panel();
    panels.set(node, panel);
    const shown = panel;
    let widget = null; // ComfyUI may ask for its height while it adds it
    widget = addElement(node, "speedlab_profile", panel.element, { hideOnZoom: false, getMinHeight: () => Math.max(MIN_HEIGHT, shown.height + 2 * (widget?.margin ?? MARGIN)) });
    widget.label = t("open_chart"); // in an app
    grow(node);
    redraw();
    // Warnings may need more lines than the last run's, or wrap at another width.
    const watch = new ResizeObserver(() => shown.measure() && grow(node));
    watch.observe(panel.below);
  }
  return panel;
}

class Panel {
  constructor() {
    this.runId = null;
    this.height = 0; // that all of it needs
    this.title = el("span", { class: "sl-title" });
    this.figure = el("b", { class: "sl-figure" });
    this.progress = el("i");
    this.chart = new StepChart();
    this.below = div("sl-below", div("sl-notes", t("not_run")));
    this.element = div("sl-panel", div("sl-head", this.title, this.figure), div("sl-progress", this.progress), this.chart.element, this.below);
  }

  /** Find the height that all of it needs with the chart at its smallest; whether that is another one. */
  measure() {
    const { element, below, chart } = this;
    if (!element.offsetHeight) return false; // off the screen, or folded away
    const smallest = parseFloat(getComputedStyle(chart.element).minHeight);
    const end = below.offsetTop + below.offsetHeight + parseFloat(getComputedStyle(element).paddingBottom);
    const height = Math.ceil(end - (chart.element.offsetHeight - smallest)) + 1; // offsets are rounded
    const isOther = height !== this.height;
    this.height = height;
    return isOther;
  }

  /** A live state: {run_id, run, runs, warmup, total, steps, summary, queued, state}. */
  showLive(state) {
    const { steps, total, run, runs, summary, queued } = state;
    const bars = liveBars(steps);
    const running = state.state === "running";
    // On a GPU these are the times at which the host handed work over; what the GPU took comes with the result.
    this.#show(state, bars, running ? runName(state) : "", state.state, running, { total });
    if (queued) this.figure.append(` (${t("queued")})`);
    this.figure.title = queued ? t("queued_title") : "";
    this.progress.style.width = `${total * runs ? Math.min(100, (100 * (total * run + steps.length)) / (total * runs)) : 0}%`;
    const toGo = running ? timeToGo(state) : null;
    this.below.replaceChildren(
      div(
        "sl-live-line",
        el("span", null, t("step_of", { n: Math.min(steps.length, total), total })),
        running ? el("span", { class: "sl-eta", text: toGo === null ? t("starting") : t("eta", { time: remaining(toGo) }) }) : statusBadge(state.state),
      ),
      legend(bars),
    );
  }

  /** A profile as the sampler returns it. */
  showProfile(profile) {
    const bars = recordBars(profile);
    const { status } = profile;
    const summary = profile.summary ?? {};
    this.#show(profile, bars, profile.plan ?? "", status);
    this.title.prepend(statusBadge(status) ?? "");
    this.element.dataset.run = profile.run_id;
    this.figure.title = "";
    this.progress.style.width = "0";
    this.below.replaceChildren(
      ...[memoryStrip(profile.step_memory), legend(bars, summary), phaseBar(profile.phases_ms), div("sl-facts", memoryLine(profile.memory), spreadLine(summary)), notesOf(profile)].filter(Boolean),
    );
  }

  #show({ run_id, summary }, bars, title, state, isLive = false, options = {}) {
    this.runId = run_id;
    this.element.classList.toggle("sl-live", isLive);
    Object.assign(this.element.dataset, { steps: bars.length, state });
    this.title.textContent = this.title.title = title;
    this.figure.textContent = rate(summary?.it_per_s);
    this.chart.draw(bars, { stepMs: summary?.step_time_ms, ...options });
  }
}

function runName({ run, runs, warmup }) {
  if (run < warmup) return t("warmup_of", { n: run + 1, total: warmup });
  return runs - warmup > 1 ? t("run_of", { n: run - warmup + 1, total: runs - warmup }) : t("sampling");
}

function spreadLine(summary) {
  const facts = [["first_eval", summary.first_eval_ms]];
  if (summary.repeats > 1) facts.push(["spread", summary.run?.std]);
  return div("sl-memory", facts.filter(([, ms]) => isNumber(ms)).map(([name, ms]) => figure(name, duration(ms))));
}

// The shape that a sampler returns.
export const fromRecord = (record) => ({ ...record, plan: record.request?.plan, memory: record.memory?.overall });
