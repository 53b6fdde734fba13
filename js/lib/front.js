// Tune on its node: every plan tried by time and distance, live; a click picks the one for Accelerate.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { div, dot, el, svg } from "./dom.js";
import { duration } from "./figures.js";
import { t } from "./i18n.js";
import { Kept } from "./kept.js";
import { addElement, grow, isVue, kindOf, nodeHere, redraw, rootGraph } from "./nodes.js";

const LEAST = 1e-6; // error
const fronts = new WeakMap();
const states = new Kept(4, "SpeedLab.Fronts"); // by workflow and node

function frontOf(node) {
  if (!fronts.has(node)) {
    fronts.set(node, new Front());
    addElement(node, "speedlab_front", fronts.get(node).element, { getMinHeight: () => 250 });
    grow(node);
    redraw();
  }
  return fronts.get(node);
}

const isAccelerate = (node) => kindOf(node) === "SpeedLabAccelerate";
const selected = () => Object.values(app.canvas?.selected_nodes ?? {}).filter(isAccelerate);
const nodesOf = (graph) => [...(graph?.nodes ?? [])].flatMap((node) => [node, ...nodesOf(node.subgraph)]);

class Front {
  constructor() {
    this.under = []; // what was selected when the pointer came
    this.plot = div("sl-scatter");
    this.picture = el("img", { class: "sl-shown", alt: "", hidden: true });
    this.words = div("sl-notes", t("tune_not_run"));
    this.said = el("div", { class: "sl-notes", role: "status" });
    this.button = el("button", { class: "sl-button sl-primary", text: t("tune_use"), onclick: () => this.#use() });
    const legend = div("sl-legend", ["best", "good", "far", "floor"].map((kind) => dot(`sl-${kind}`, t(`tune_${kind}`))));
    this.element = el("div", { class: "sl-panel", onpointerenter: () => (this.under = selected()) }, div("sl-pick", this.plot, this.picture), legend, this.words, el("div", null, this.button), this.said);
    this.#look();
  }

  show({ state, points, stock_s, floor, pictures }) {
    const picked = points.find((one) => one.name === this.picked?.name);
    Object.assign(this, { pictures, picked, stock: stock_s, best: points.find((one) => one.best) });
    Object.assign(this.element.dataset, { state, points: points.length });
    const right = Math.max(stock_s, ...points.map((one) => one.s)) * 1.05 || 1;
    const log = (error) => Math.log10(Math.max(error, LEAST));
    const logs = [...points.map((one) => one.error), floor ?? LEAST].map(log);
    const low = Math.min(...logs) - 0.3;
    const x = (s) => (100 * s) / right;
    const y = (error) => (100 * (log(error) - low)) / (Math.max(...logs) + 0.3 - low);
    const line = (kind, path) => svg("polyline", { class: kind, points: path.map(([s, error]) => `${x(s)},${100 - y(error)}`) });
    const focused = this.plot.querySelector(":focus")?.dataset.name;
    this.plot.replaceChildren(
      svg("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none" }, floor !== null && line("sl-floor", [[0, floor], [right, floor]]), line("sl-edge", front(points))),
      ...points.map((one) => this.#dot(one, `left:${x(one.s)}%;bottom:${y(one.error)}%`)),
      el("span", { class: "sl-axis", text: duration(right * 1000) }),
      el("span", { class: "sl-axis sl-up", text: t("tune_error") }),
    );
    this.#look();
    if (focused) this.plot.querySelector(`[data-name="${CSS.escape(focused)}"]`)?.focus();
    const isCut = state === "cut";
    if (isCut || this.said.textContent === t("tune_cut")) this.said.textContent = isCut ? t("tune_cut") : "";
  }

  #dot(one, style) {
    const [look, back, onclick] = [() => this.#look(one), () => this.#look(), () => this.#look((this.picked = one))];
    const kind = one.best ? "best" : one.good ? "good" : "far";
    const label = `${this.#text(one)} (${t(`tune_${kind}`)})`;
    return el("button", { class: `sl-point sl-${kind}`, style, "aria-label": label, "data-name": one.name, onpointerenter: look, onfocus: look, onpointerleave: back, onblur: back, onclick });
  }

  #text(one) {
    const ratio = this.stock ? t("tune_ratio", { times: (this.stock / one.s).toFixed(2) }) : "";
    return t("tune_point", { name: one.name, time: duration(one.s * 1000), ratio, error: one.error.toFixed(4) });
  }

  /** Show a point; without one that which the button is about. */
  #look(one = this.picked ?? this.best) {
    this.button.disabled = !(this.picked ?? this.best);
    if (!one) return;
    this.words.textContent = this.#text(one);
    this.picture.hidden = !this.pictures[one.name];
    this.picture.src = this.pictures[one.name] ?? "";
  }

  /** Put the plan on the selected Accelerate node, or on the only one that there is. */
  #use() {
    const one = this.picked ?? this.best;
    const all = nodesOf(rootGraph()).filter(isAccelerate);
    const [node, ...more] = [selected(), this.under.filter((own) => all.includes(own)), all].find((nodes) => nodes.length) ?? [];
    if (!node || more.length) return void (this.said.textContent = t(node ? "tune_many" : "tune_none"));
    for (const [name, value] of [["custom", one.plan], ["preset", "custom"]]) {
      const widget = node.widgets.find((own) => own.name === name);
      widget.value = value;
      widget.callback?.(value, app.canvas, node);
    }
    const what = Object.entries(one.set).map((pair) => pair.join(" ")).join(", ");
    this.said.textContent = `${t("tune_used", { title: node.title })} ${what && t("tune_set", { what })}`;
    redraw();
  }
}

/** [time, error] of the points that no other one beats in both. */
const front = (points) =>
  points.filter((a) => !points.some((b) => b.s < a.s && b.error <= a.error)).sort((a, b) => a.s - b.s).map((a) => [a.s, a.error]);

export function nodeCreated(node) {
  if (isVue() && kindOf(node) === "SpeedLabTune") frontOf(node);
}

function show(state) {
  const node = nodeHere(state.workflow, state.node);
  if (kindOf(node) === "SpeedLabTune") frontOf(node).show(state);
}

function onTune({ detail }) {
  const key = `${detail.workflow}/${detail.node}`;
  // Each message brings one image.
  const state = { ...detail, pictures: { ...states.get(key)?.pictures, ...detail.pictures } };
  states.set(key, state);
  show(state);
}

export const restoreAll = () => states.forEach(show);

export const listen = () => api.addEventListener("speedlab.tune", onTune);
