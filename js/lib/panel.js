// What a sampler shows on itself: step times while it runs, then the whole profile.
import { legend, memoryStrip, StepChart } from "./chart.js";
import { div, el, figure } from "./dom.js";
import { duration, isNumber, liveBars, rate, recordBars, remaining, timeToGo } from "./figures.js";
import { t } from "./i18n.js";
import { addElement, grow, redraw } from "./nodes.js";
import { memoryLine, phaseBar, statusBadge } from "./parts.js";

const MIN_HEIGHT = 256;
const MARGIN = 10; // that ComfyUI leaves around such a widget where the widget does not tell
const panels = new WeakMap();

/** The node's panel, added to it at first use. */
export function panelOf(node) {
  let panel = panels.get(node);
  if (!panel) {
    panel = new Panel();
    panels.set(node, panel);
    const shown = panel;
    let widget = null; // ComfyUI may ask for its height while it adds it
    widget = addElement(node, "speedlab_profile", panel.element, {
      hideOnZoom: false,
      getMinHeight: () => Math.max(MIN_HEIGHT, shown.height + 2 * (widget?.margin ?? MARGIN)),
    });
    grow(node);
    redraw();
    // What a run has to say, warnings first of all, may need more lines than the last one's, or wrap at another width.
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

  /** Find the height that all of the panel needs with the chart at its smallest; whether that is another one. */
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
    this.runId = state.run_id;
    const bars = liveBars(state.steps);
    const running = state.state === "running";
    this.element.classList.toggle("sl-live", running);
    Object.assign(this.element.dataset, { steps: state.steps.length, state: state.state });
    this.title.textContent = running ? runName(state) : "";
    // On a GPU these are the times at which the host handed work over; what the GPU took comes with the result.
    this.figure.textContent = rate(state.summary?.it_per_s) + (state.queued ? ` (${t("queued")})` : "");
    this.figure.title = state.queued ? t("queued_title") : "";
    const all = state.total * state.runs;
    const done = state.total * state.run + state.steps.length;
    this.progress.style.width = `${all ? Math.min(100, (100 * done) / all) : 0}%`;
    this.chart.draw(bars, { total: state.total, stepMs: state.summary?.step_time_ms });
    const toGo = running ? timeToGo(state) : null;
    this.below.replaceChildren(
      div(
        "sl-live-line",
        el("span", null, t("step_of", { n: Math.min(state.steps.length, state.total), total: state.total })),
        running ? el("span", { class: "sl-eta", text: toGo === null ? t("starting") : t("eta", { time: remaining(toGo) }) }) : statusBadge(state.state),
      ),
      legend(bars),
    );
  }

  /** A finished profile, as the sampler returns it or as `fromRecord` makes it of a record. */
  showProfile(profile, text = "") {
    this.runId = profile.run_id;
    const bars = recordBars(profile.steps ?? []);
    const summary = profile.summary ?? {};
    this.element.classList.remove("sl-live");
    Object.assign(this.element.dataset, { steps: bars.length, state: profile.status, run: profile.run_id });
    this.title.replaceChildren(profile.plan ?? "", statusBadge(profile.status) ?? "");
    this.title.title = profile.plan ?? "";
    this.figure.textContent = rate(summary.it_per_s);
    this.figure.title = "";
    this.progress.style.width = "0";
    this.chart.draw(bars, { stepMs: summary.step_time_ms });
    this.below.replaceChildren(
      ...[
        memoryStrip(profile.step_memory),
        legend(bars, summary),
        phaseBar(profile.phases_ms),
        div("sl-facts", memoryLine(profile.memory), spreadLine(summary)),
        text ? div("sl-notes", text) : null,
      ].filter(Boolean),
    );
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

/** A record on disk in the shape that a sampler returns. */
export function fromRecord({ run_id, status, request, phases_ms, steps, summary, memory, step_memory }) {
  return { run_id, status, plan: request?.plan, phases_ms, steps, summary, memory: memory?.overall, step_memory };
}
