// What a sampler shows on itself: step times while it runs, then the whole profile.
import { legend, memoryStrip, StepChart } from "./chart.js";
import { el } from "./dom.js";
import { duration, isNumber, liveBars, rate, recordBars, remaining, timeToGo } from "./figures.js";
import { t } from "./i18n.js";
import { redraw } from "./nodes.js";
import { memoryLine, phaseBar, statusBadge } from "./parts.js";

const WIDGET = "speedlab_profile";
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
    widget = node.addDOMWidget(WIDGET, WIDGET, panel.element, {
      serialize: false, // not part of the prompt
      hideOnZoom: false,
      getMinHeight: () => Math.max(MIN_HEIGHT, shown.height + 2 * (widget?.margin ?? MARGIN)),
      getValue: () => "",
      setValue: () => {},
    });
    widget.serialize = false; // nor of the saved workflow
    grow(node);
    redraw();
    // What a run has to say, warnings first of all, may need more lines than the last one's, or wrap at another width.
    const watch = new ResizeObserver(() => shown.measure() && grow(node));
    watch.observe(panel.below);
  }
  return panel;
}

/** Make the node as tall and wide as its widgets need; a node that is larger stays so. */
function grow(node) {
  const wanted = node.computeSize();
  const size = [Math.max(node.size[0], wanted[0]), Math.max(node.size[1], wanted[1])];
  if (size[0] === node.size[0] && size[1] === node.size[1]) return;
  node.setSize(size);
  node.setDirtyCanvas?.(true, true);
}

class Panel {
  constructor() {
    this.runId = null;
    this.height = 0; // that all of it needs
    this.title = el("span", { class: "sl-title" });
    this.figure = el("b", { class: "sl-figure" });
    this.progress = el("i");
    this.chart = new StepChart();
    this.below = el("div", { class: "sl-below" }, el("div", { class: "sl-notes", text: t("not_run") }));
    this.element = el(
      "div",
      { class: "sl-panel" },
      el("div", { class: "sl-head" }, this.title, this.figure),
      el("div", { class: "sl-progress" }, this.progress),
      this.chart.element,
      this.below,
    );
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
    this.element.dataset.steps = state.steps.length;
    this.element.dataset.state = state.state;
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
      el(
        "div",
        { class: "sl-live-line" },
        el("span", { text: t("step_of", { n: Math.min(state.steps.length, state.total), total: state.total }) }),
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
    this.element.dataset.steps = bars.length;
    this.element.dataset.state = profile.status;
    this.element.dataset.run = profile.run_id;
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
        el("div", { class: "sl-facts" }, memoryLine(profile.memory), spreadLine(summary)),
        text ? el("div", { class: "sl-notes", text }) : null,
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
  return el(
    "div",
    { class: "sl-memory" },
    facts.filter(([, ms]) => isNumber(ms)).map(([name, ms]) => el("span", null, `${t(name)} `, el("b", { text: duration(ms) }))),
  );
}

/** A record on disk in the shape that a sampler returns. */
export function fromRecord(record) {
  return {
    run_id: record.run_id,
    status: record.status,
    plan: record.request?.plan,
    phases_ms: record.phases_ms,
    steps: record.steps,
    summary: record.summary,
    memory: record.memory?.overall,
    step_memory: record.step_memory,
    warnings: record.warnings,
  };
}
