// The step chart: bars in SVG, which stretches with its box, and words in HTML, which does not.
import { div, dot, el, svg } from "./dom.js";
import { barText, binned, duration, gigabytes, hasMedian, isNumber, KINDS, later } from "./figures.js";
import { t } from "./i18n.js";

const WIDTH = 1000;
const HEIGHT = 100;
// A first step that compiles takes minutes; drawn to scale it would flatten all others.
const CLIP = 2.2;

function ceiling(bars) {
  const all = Math.max(...bars.map((bar) => bar.ms), 0);
  const usual = later(bars).sort((a, b) => a - b);
  const high = usual[Math.floor((usual.length - 1) * 0.95)] ?? 0;
  return { top: (high > 0 ? Math.min(all, high * CLIP) : all) * 1.08 || 1, clipped: high > 0 && all > high * CLIP };
}

export const legend = (bars, summary = null) =>
  div("sl-legend", KINDS.filter((kind) => bars.some((bar) => bar.kind === kind)).map((kind) => dot(`sl-${kind}`, wordOf(kind, summary))));

function wordOf(kind, summary) {
  const stat = summary?.step_kinds?.[kind];
  const name = hasMedian(stat) ? "kind_median" : "kind_one";
  return isNumber(stat?.median_ms) ? t(name, { kind: t(`kind_${kind}`), value: duration(stat.median_ms) }) : t(`kind_${kind}`);
}

/** Memory peaks of a record's steps from zero up, the device's where they are known; null without any. */
export function memoryStrip(peaks) {
  const [name, values] = [["vram", peaks?.peak_allocated_gb], ["ram", peaks?.peak_rss_gb]].find(([, list]) => list?.some(isNumber)) ?? [];
  if (!values) return null;
  const known = values.filter(isNumber);
  const most = Math.max(...known);
  const bars = values.map((gb, n) => (gb > 0 ? `M${n} 1V${1 - gb / most / 1.1}h1V1z` : ""));
  const text = t("memory_a_step", { name: t(name), range: [...new Set([Math.min(...known), most].map(gigabytes))].join(" – ") });
  const words = el("span", { class: "sl-axis", text });
  const point = ({ target, offsetX }) => {
    const n = Math.floor((offsetX / target.clientWidth) * values.length);
    words.textContent = `${t("step_n", { n: n + 1 })} · ${gigabytes(values[n])}`;
  };
  const plot = svg("svg", { viewBox: `0 0 ${values.length} 1`, preserveAspectRatio: "none" }, svg("path", { d: bars.join("") }));
  return el("div", { class: "sl-strip", role: "img", "aria-label": text, onpointermove: point, onpointerleave: () => (words.textContent = text) }, plot, words);
}

export class StepChart {
  constructor() {
    this.plot = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", class: "sl-plot" });
    this.top = el("span", { class: "sl-axis" });
    this.tip = div("sl-tip");
    this.element = el("div", { class: "sl-chart", role: "img" }, this.plot, this.top, this.tip);
    this.bins = [];
    this.plot.addEventListener("pointermove", (event) => this.#point(event));
    this.plot.addEventListener("pointerleave", () => this.#leave());
  }

  /** `stepMs` is the summary's time of a step, drawn as a line; `total` the steps in all. */
  draw(bars, { stepMs = null, total = bars.length, scaleTo = null } = {}) {
    this.bins = binned(bars);
    const perBin = this.bins.length ? this.bins[0].to - this.bins[0].from + 1 : 1;
    this.slots = Math.max(1, this.bins.length, Math.ceil(total / perBin));
    this.slot = WIDTH / this.slots;
    const { top, clipped } = ceiling(scaleTo ?? bars);
    this.y = (ms) => HEIGHT - Math.min(1, ms / top) * HEIGHT;
    this.plot.replaceChildren(
      ...this.bins.map((bar, n) => this.#rect(`bar sl-${bar.kind}`, n + 0.09, 0.82, this.y(bar.ms), HEIGHT - this.y(bar.ms))),
      ...this.bins.flatMap((bar, n) => (bar.ms > top ? this.#rect("cut", n, 1, 9, 3) : [])),
      ...(isNumber(stepMs) && bars.length > 2 ? [this.#line(this.y(stepMs))] : []),
    );
    this.top.textContent = bars.length ? `${clipped ? "> " : ""}${duration(top / 1.08)}` : "";
    this.resting = isNumber(stepMs) ? t("step_time_is", { value: duration(stepMs) }) : "";
    if (!this.pointed) this.tip.textContent = this.resting;
    this.element.setAttribute("aria-label", t("chart_label", { n: bars.length, value: duration(stepMs) }));
  }

  #rect(name, at, width, y, height) {
    return svg("rect", { class: `sl-${name}`, x: at * this.slot, width: width * this.slot, y, height });
  }

  #line(y) {
    return svg("line", { class: "sl-mean", x1: 0, x2: WIDTH, y1: y, y2: y, "vector-effect": "non-scaling-stroke" });
  }

  #point(event) {
    const box = this.plot.getBoundingClientRect();
    const index = Math.floor(((event.clientX - box.left) / box.width) * this.slots);
    const bar = this.bins[index];
    this.#leave();
    if (!bar) return;
    this.pointed = true;
    this.tip.textContent = barText(bar);
    this.plot.querySelectorAll(".sl-bar")[index]?.classList.add("sl-on");
  }

  #leave() {
    this.pointed = false;
    this.tip.textContent = this.resting ?? "";
    this.plot.querySelector(".sl-on")?.classList.remove("sl-on");
  }
}
