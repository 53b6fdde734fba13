// The sidebar tab: the runs of this server, one in full, two compared, or several over time.
import { compareView, timeView } from "./compare.js";
import { detailView, when } from "./detail.js";
import { button, copyButton, div, el, link } from "./dom.js";
import { duration, gigabytes, isNumber, rate, stepsText } from "./figures.js";
import { t } from "./i18n.js";
import { picture, statusBadge } from "./parts.js";
import { csvUrl, deleteRuns, listRuns, readRun } from "./server.js";

const PAGE = 100;
const TYPING_MS = 250;
const ROW = 62; // height of a row and the gap below it, as in the style sheet
const AROUND = 8; // rows that are made beyond the edges of what is seen

export class RunsTab {
  constructor() {
    this.words = "";
    this.picked = new Map(); // run id -> its line of the list, in the order of choosing
    this.asked = 0;
    this.thumbs = new Map(); // of the rows that are shown: drawing anew asks for none again
    this.onPick = () => {};
    this.#forget();
  }

  // Of thousands of runs those seen are known, by their place among all files.
  #forget(files = 0) {
    this.files = files;
    this.known = new Map();
    this.order = Array.from({ length: files }, (_, place) => place); // shown, or to be asked for
    this.skipped = 0;
    this.best = 0;
  }

  render(container) {
    this.filter = el("input", { class: "sl-filter", type: "search", placeholder: t("filter"), title: t("filter_title"), "aria-label": t("filter"), value: this.words, oninput: () => this.#typed() });
    this.rows = el("div", { class: "sl-rows", role: "presentation" });
    this.list = el(
      "div",
      { class: "sl-list", tabindex: 0, "aria-label": t("runs"), onkeydown: (event) => this.#key(event), onclick: (event) => this.#click(event), onscroll: () => this.#drawSoon() },
      this.rows,
    );
    this.note = el("div", { class: "sl-notes", role: "status" });
    this.bar = div("sl-bar-row");
    const refresh = button("refresh", "", () => this.load(), { class: "pi pi-refresh", title: t("refresh"), "aria-label": t("refresh") });
    const tools = div("sl-tools", this.filter, refresh, link("CSV", csvUrl(), "results.csv", { title: t("csv_title") }));
    this.listPage = div("sl-page sl-runs", tools, this.bar, this.list, this.note);
    this.root = div("sl-tab", this.listPage);
    container.replaceChildren(this.root);
    this.active = this.anchor = 0;
    this.watch = new ResizeObserver(() => this.#drawSoon());
    this.watch.observe(this.list);
    this.load();
  }

  destroy() {
    clearTimeout(this.timer);
    this.watch?.disconnect();
    this.root = null;
  }

  /** There may be a new run: look, unless the user reads something else. */
  refresh() {
    if (this.root?.isConnected && this.root.firstChild === this.listPage) this.load();
  }

  #typed() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      this.words = this.filter.value;
      this.active = this.anchor = this.list.scrollTop = 0;
      this.load();
    }, TYPING_MS);
  }

  /** Ask for the list anew, from its top. */
  load() {
    return this.#fetch(0, (page) => {
      const was = this.#runAt(this.active)?.run_id; // keys may have moved on meanwhile
      this.#forget(page.files);
      const kept = page.runs.findIndex((run) => run.run_id === was);
      if (kept >= 0) this.active = this.anchor = kept;
    });
  }

  async #fetch(offset, first) {
    const asked = ++this.asked;
    const isLate = () => asked !== this.asked || !this.root; // another question was asked meanwhile
    this.fetching = true;
    try {
      const page = await listRuns(offset, PAGE, this.words);
      if (isLate()) return;
      // A run that came or went meanwhile has moved the places of all others.
      if (!first && page.files !== this.files) return this.load();
      this.note.textContent = "";
      first?.(page);
      this.#take(page, offset);
    } catch (error) {
      if (!isLate()) this.note.textContent = t("failed", { why: error.message });
      return;
    } finally {
      if (asked === this.asked) this.fetching = false;
    }
    this.#drawAll();
    return true;
  }

  #take({ runs, skipped, next_offset }, from) {
    const to = next_offset ?? this.files;
    const many = this.order.length;
    for (const run of runs) {
      this.known.set(run.position, run);
      this.best = Math.max(this.best, run.it_per_s ?? 0);
      if (this.picked.has(run.run_id)) this.picked.set(run.run_id, run);
    }
    if (runs.length < to - from) this.order = this.order.filter((place) => place < from || place >= to || this.known.has(place));
    // Of pages that overlap no file counts twice.
    this.skipped += from ? Math.min(skipped, many - this.order.length) : skipped;
  }

  get #ids() {
    return [...this.picked.keys()];
  }

  #runAt(index) {
    return this.known.get(this.order[index]);
  }

  #drawSoon() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      if (this.root) this.#draw();
    });
  }

  #draw() {
    const { list, order } = this;
    const many = order.length;
    this.active = Math.max(0, Math.min(this.active, many - 1));
    this.rows.style.height = `${many * ROW}px`;
    const from = Math.max(0, Math.floor(list.scrollTop / ROW) - AROUND);
    const to = Math.min(many, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + AROUND);
    const shown = Array.from({ length: Math.max(0, to - from) }, (_, n) => from + n);
    const thumbs = new Map();
    this.rows.replaceChildren(...shown.map((index) => this.#row(index, thumbs)));
    this.thumbs = thumbs;
    const active = this.rows.querySelector(".sl-active")?.id ?? "";
    // Without a run in it a list of choices would be none.
    const isList = this.rows.querySelector("[role=option]");
    list.role = isList ? "listbox" : "group";
    list.ariaMultiSelectable = isList ? "true" : null;
    list.setAttribute("aria-activedescendant", active);
    const unknown = shown.find((index) => !this.#runAt(index));
    if (unknown !== undefined && !this.fetching) this.#fetch(order[unknown]);
    const skipped = this.skipped ? t("skipped", { n: this.skipped }) : "";
    if (!this.fetching) this.note.textContent ||= many ? skipped : `${t(this.words ? "no_match" : "no_runs")} ${skipped}`;
  }

  #row(index, thumbs) {
    const run = this.#runAt(index);
    const place = `top:${index * ROW}px`;
    if (!run) return el("div", { class: "sl-row", role: "presentation", style: place });
    const isPicked = this.picked.has(run.run_id);
    const thumb = run.images > 0 && (this.thumbs.get(run.run_id) ?? picture(run.run_id, 0, { class: "sl-thumb", alt: "" }));
    if (thumb) thumbs.set(run.run_id, thumb);
    const size = isNumber(run.width * run.height) ? `${run.width}×${run.height}` : "";
    const facts = [size, run.batch > 1 ? `×${run.batch}` : "", stepsText(run.steps, run.steps_asked), run.sampler];
    const share = this.best && run.it_per_s ? (100 * run.it_per_s) / this.best : 0;
    return el(
      "div",
      { class: `sl-row${index === this.active ? " sl-active" : ""}`, id: `sl-run-${index}`, role: "option", "aria-selected": String(isPicked), "aria-setsize": this.order.length, "aria-posinset": index + 1, "data-run": run.run_id, "data-index": index, style: place },
      el("i", { class: `sl-mark${isPicked ? " pi pi-check" : ""}`, title: t("pick") }),
      thumb,
      div(
        "sl-what",
        el("div", { class: "sl-plan", title: run.plan }, statusBadge(run.status), run.plan || run.run_id),
        div("sl-sub", [when(run.timestamp), ...facts].filter(Boolean).join(" · ")),
        div("sl-speed", el("i", { style: `width:${share.toFixed(1)}%` })),
      ),
      div("sl-numbers", el("b", null, rate(run.it_per_s)), timeOf(run), el("span", null, isNumber(run.peak_gb) && `${gigabytes(run.peak_gb)} ${t(run.peak_kind)}`)),
    );
  }

  #click(event) {
    const row = event.target.closest("[data-index]");
    if (!row) return;
    const index = Number(row.dataset.index);
    this.active = index;
    if (event.shiftKey) return this.#pickRange(this.anchor, index);
    this.anchor = index;
    if (event.ctrlKey || event.metaKey || event.target.closest(".sl-mark")) this.#pick(index);
    else this.#open(this.#runAt(index));
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey) return; // ComfyUI's, such as the one that queues
    const page = Math.max(1, Math.floor(this.list.clientHeight / ROW) - 1);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    const run = this.#runAt(this.active);
    if (event.key in moves) this.#move(this.active + moves[event.key], event.shiftKey);
    else if (event.key === "Enter" && run) this.#open(run);
    else if (event.key === " " && run) this.#pick((this.anchor = this.active));
    else if (event.key === "Delete" && run) {
      // Without a choice it is about this run, chosen while it is asked about.
      const alone = this.alone || !this.picked.size;
      this.drawn = "";
      this.#pickOnly(alone ? [run] : [...this.picked.values()], alone);
      this.bar.querySelector("[data-act=delete]").click();
    } else if (event.key === "Escape" && this.picked.size) this.#pickOnly([]);
    else return;
    // These keys mean other things to the canvas, such as deleting nodes.
    event.preventDefault();
    event.stopPropagation();
  }

  #move(to, extend) {
    this.active = Math.max(0, Math.min(to, this.order.length - 1));
    if (!extend) this.anchor = this.active;
    const top = this.active * ROW;
    this.list.scrollTop = Math.min(top, Math.max(this.list.scrollTop, top + ROW - this.list.clientHeight));
    if (extend) this.#pickRange(this.anchor, this.active);
    this.#draw();
  }

  #pick(index) {
    const run = this.#runAt(index);
    if (!this.picked.delete(run.run_id)) this.picked.set(run.run_id, run);
    this.#pickOnly([...this.picked.values()]);
  }

  async #pickRange(a, b) {
    const { known } = this;
    const wanted = this.order.slice(Math.min(a, b), Math.max(a, b) + 1);
    for (const place of wanted) {
      if (!known.has(place) && this.order.includes(place) && !(await this.#fetch(place))) break;
      if (known !== this.known) return; // runs came or went: these places are other runs' now
    }
    this.#pickOnly(wanted.map((place) => known.get(place)).filter(Boolean));
  }

  #pickOnly(runs, alone = false) {
    this.alone = alone;
    this.picked = new Map(runs.map((run) => [run.run_id, run]));
    this.#drawAll();
    this.onPick(this.#ids);
  }

  #drawAll() {
    this.#drawBar();
    this.#draw();
  }

  #drawBar() {
    const n = this.picked.size;
    const ids = this.#ids.join();
    if (ids === this.drawn && this.bar.querySelector("[data-act=yes]")) return; // not answered yet
    this.drawn = ids;
    if (!n) return this.bar.replaceChildren(el("span", { class: "sl-hint", text: this.order.length > 1 ? t("pick_hint") : "" }));
    const needing = (act, enabled, run) => button(act, t(act), run, { disabled: !enabled, title: enabled ? "" : t(`needs_${act}`), class: act === "compare" ? "sl-primary" : "" });
    const picked = [...this.picked.values()];
    this.bar.replaceChildren(
      el("span", { class: "sl-hint", text: t("n_picked", { n }) }),
      needing("compare", n === 2, () => this.#compare()),
      needing("over_time", n > 1, () => this.#show(timeView(picked))),
      copyButton(t("markdown"), () => picked.map((run) => run.markdown).join("\n")),
      confirming(n, () => this.#delete(this.#ids), () => {
        if (this.alone) this.#pickOnly([]);
        this.list.focus();
      }),
    );
  }

  #delete(runIds) {
    this.list.focus();
    return this.#try(async () => {
      const [reason] = Object.values((await deleteRuns(runIds)).failed);
      runIds.forEach((id) => this.picked.delete(id));
      await this.load();
      this.onPick(this.#ids);
      if (reason) throw new Error(reason);
    });
  }

  #showList() {
    this.root.replaceChildren(this.listPage);
    this.list.scrollTop = this.scrollTop;
    this.list.focus();
  }

  #back() {
    this.#showList();
    this.load();
  }

  #show(...content) {
    this.scrollTop = this.list.scrollTop;
    const back = button("back", "", () => this.#back());
    back.append(el("i", { class: "pi pi-arrow-left" }), t("back"));
    const onkeydown = (event) => event.key === "Escape" && this.#back();
    this.root.replaceChildren(el("div", { class: "sl-page", onkeydown }, el("div", { class: "sl-tools" }, back), ...content));
    back.focus();
  }

  #open(line) {
    this.#try(async () => {
      const record = await readRun(line.run_id);
      const remove = confirming(1, () => {
        this.#showList();
        this.#delete([line.run_id]);
      });
      this.#show(detailView(record, line, remove));
    });
  }

  #compare() {
    // In the order of their dates, so that B is what was tried later.
    this.#try(async () => this.#show(compareView(...(await Promise.all(this.#ids.sort().map(readRun))))));
  }

  async #try(work) {
    try {
      await work();
    } catch (error) {
      this.note.textContent = t("failed", { why: error.message });
    }
  }
}

// The time from text to image; where it is not known the sampling's, which says so.
function timeOf({ total_ms, sample_ms }) {
  if (isNumber(total_ms)) return el("span", { title: t("total"), text: duration(total_ms) });
  return el("span", null, isNumber(sample_ms) && `${t("phase_sample")} ${duration(sample_ms)}`);
}

/** A button that asks before it deletes `n` runs; `stay` is for the answer no. */
function confirming(n, act, stay = () => {}) {
  const place = el("span", { class: "sl-confirm" });
  const rest = () => place.replaceChildren(button("delete", t("delete"), ask));
  const no = () => {
    rest();
    stay();
  };
  const ask = () => {
    place.replaceChildren(el("span", null, t("delete_really", { n })), button("yes", t("delete"), act, { class: "sl-danger" }), button("no", t("keep"), no));
    place.querySelector("[data-act=yes]").focus();
  };
  place.onkeydown = (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    no();
  };
  rest();
  return place;
}
