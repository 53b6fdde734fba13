// The sidebar tab: the runs of this server, one of them in full, or two beside each other.
import { el } from "./dom.js";
import { compareView } from "./compare.js";
import { detailView } from "./detail.js";
import { duration, gigabytes, isNumber, rate, stepsText } from "./figures.js";
import { t } from "./i18n.js";
import { statusBadge } from "./parts.js";
import { csvUrl, deleteRuns, listRuns, readRun } from "./server.js";

const PAGE = 40;
const TYPING_MS = 250;

export class RunsTab {
  constructor() {
    this.words = "";
    this.picked = [];
    this.runs = [];
    this.asked = 0;
  }

  render(container) {
    this.filter = el("input", {
      class: "sl-filter",
      type: "search",
      placeholder: t("filter"),
      title: t("filter_title"),
      "aria-label": t("filter"),
      value: this.words,
      oninput: () => this.#typed(),
    });
    this.list = el("div", { class: "sl-list" });
    this.note = el("div", { class: "sl-notes" });
    this.bar = el("div", { class: "sl-bar-row" });
    this.listPage = el(
      "div",
      { class: "sl-page" },
      el(
        "div",
        { class: "sl-tools" },
        this.filter,
        el("button", { class: "sl-button pi pi-refresh", title: t("refresh"), "aria-label": t("refresh"), onclick: () => this.load() }),
        el("a", { class: "sl-button", href: csvUrl(), download: "results.csv", title: t("csv_title"), text: "CSV" }),
      ),
      this.bar,
      this.list,
      this.note,
    );
    this.root = el("div", { class: "sl-tab" }, this.listPage);
    container.replaceChildren(this.root);
    this.load();
  }

  destroy() {
    clearTimeout(this.timer);
    this.root = null;
  }

  /** There may be a new run: look, unless the user is reading something else. */
  refresh() {
    if (this.root?.isConnected && this.root.firstChild === this.listPage) this.load();
  }

  #typed() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      this.words = this.filter.value;
      this.load();
    }, TYPING_MS);
  }

  async load(offset = 0) {
    const asked = ++this.asked;
    try {
      const page = await listRuns(offset, PAGE, this.words);
      if (asked !== this.asked || !this.root) return; // a later question was asked meanwhile
      this.runs = offset ? [...this.runs, ...page.runs] : page.runs;
      this.#drawList(page);
    } catch (error) {
      if (asked === this.asked && this.root) this.note.textContent = t("failed", { why: error.message });
    }
  }

  #drawList(page) {
    const best = Math.max(...this.runs.map((run) => run.it_per_s ?? 0), 0);
    const more = page.next_offset !== null;
    this.list.replaceChildren(
      ...this.runs.map((run) => this.#row(run, best)),
      ...(more ? [el("button", { class: "sl-button sl-more", text: t("more"), onclick: () => this.load(page.next_offset) })] : []),
    );
    const notes = [];
    if (!this.runs.length) notes.push(this.words ? t("no_match") : t("no_runs"));
    if (page.skipped) notes.push(t("skipped", { n: page.skipped }));
    this.note.textContent = notes.join(" ");
    this.#drawBar();
  }

  #row(run, best) {
    const mark = el("input", {
      type: "checkbox",
      title: t("pick"),
      "aria-label": t("pick"),
      onclick: (event) => event.stopPropagation(),
      onchange: (event) => this.#pick(run.run_id, event.target.checked),
    });
    mark.checked = this.picked.includes(run.run_id);
    const size = isNumber(run.width) && isNumber(run.height) ? `${run.width}×${run.height}` : "";
    const facts = [size, isNumber(run.batch) && run.batch > 1 ? `×${run.batch}` : "", run.sampler, stepsText(run.steps, run.steps_asked)];
    const share = best && run.it_per_s ? (100 * run.it_per_s) / best : 0;
    return el(
      "div",
      { class: "sl-row", "data-run": run.run_id, tabindex: "0", role: "button", onclick: () => this.#open(run.run_id), onkeydown: (event) => event.key === "Enter" && event.target === event.currentTarget && this.#open(run.run_id) },
      mark,
      el(
        "div",
        { class: "sl-what" },
        el("div", { class: "sl-plan", title: run.plan }, run.plan || run.run_id, statusBadge(run.status)),
        el("div", { class: "sl-sub", text: [when(run.timestamp), ...facts].filter(Boolean).join(" · ") }),
        el("div", { class: "sl-speed" }, el("i", { style: `width:${share.toFixed(1)}%` })),
      ),
      el(
        "div",
        { class: "sl-numbers" },
        el("b", { text: rate(run.it_per_s) }),
        timeOf(run),
        el("span", { text: isNumber(run.peak_gb) ? `${gigabytes(run.peak_gb)} ${t(run.peak_kind)}` : "" }),
      ),
    );
  }

  #pick(runId, checked) {
    this.picked = this.picked.filter((id) => id !== runId);
    if (checked) this.picked = [...this.picked, runId].slice(-2);
    for (const row of this.list.querySelectorAll(".sl-row")) {
      row.querySelector("input").checked = this.picked.includes(row.dataset.run);
    }
    this.#drawBar();
  }

  #drawBar() {
    const [first, second] = this.picked;
    if (!first) return this.bar.replaceChildren(el("span", { class: "sl-hint", text: this.runs.length > 1 ? t("pick_two") : "" }));
    this.bar.replaceChildren(
      el("button", { class: "sl-button sl-primary", "data-act": "compare", text: t("compare"), disabled: !second, onclick: () => this.#compare() }),
      confirming(t("delete"), t("delete_really", { n: this.picked.length }), () => this.#delete(this.picked)),
    );
  }

  async #delete(runIds) {
    try {
      const { deleted, failed } = await deleteRuns(runIds);
      for (const row of this.list.querySelectorAll(".sl-row")) if (deleted.includes(row.dataset.run)) row.remove();
      this.picked = this.picked.filter((id) => !runIds.includes(id));
      await this.load();
      const reasons = Object.values(failed);
      if (reasons.length) this.note.textContent = t("failed", { why: reasons[0] });
    } catch (error) {
      this.note.textContent = t("failed", { why: error.message });
    }
  }

  #show(...content) {
    const back = el("button", { class: "sl-button", "data-act": "back" }, el("i", { class: "pi pi-arrow-left" }), t("back"));
    back.addEventListener("click", () => {
      this.root.replaceChildren(this.listPage);
      this.load();
    });
    this.root.replaceChildren(el("div", { class: "sl-page" }, el("div", { class: "sl-tools" }, back), ...content));
  }

  async #open(runId) {
    try {
      const record = await readRun(runId);
      const remove = confirming(t("delete"), t("delete_really", { n: 1 }), async () => {
        this.root.replaceChildren(this.listPage);
        await this.#delete([runId]);
      });
      this.#show(detailView(record, remove));
    } catch (error) {
      this.note.textContent = t("failed", { why: error.message });
    }
  }

  async #compare() {
    try {
      // In the order of their dates, so that B is what was tried later.
      const [first, second] = await Promise.all([...this.picked].sort().map(readRun));
      this.#show(compareView(first, second));
    } catch (error) {
      this.note.textContent = t("failed", { why: error.message });
    }
  }
}

// The time from text to image; where it is not known the sampling's, which says so.
function timeOf({ total_ms, sample_ms }) {
  if (isNumber(total_ms)) return el("span", { title: t("total"), text: duration(total_ms) });
  return el("span", { text: isNumber(sample_ms) ? `${t("phase_sample")} ${duration(sample_ms)}` : "" });
}

/** A button that asks before it acts. */
function confirming(label, question, act) {
  const place = el("span", { class: "sl-confirm" });
  const rest = () => place.replaceChildren(el("button", { class: "sl-button", "data-act": "delete", text: label, onclick: ask }));
  const ask = () =>
    place.replaceChildren(
      el("span", { text: question }),
      el("button", { class: "sl-button sl-danger", "data-act": "yes", text: label, onclick: act }),
      el("button", { class: "sl-button", "data-act": "no", text: t("keep"), onclick: rest }),
    );
  rest();
  return place;
}

/** A record's time as people here write it. */
export function when(timestamp) {
  // Python writes the zone without a colon, which not every browser reads.
  const date = new Date(String(timestamp).replace(/([+-]\d\d)(\d\d)$/, "$1:$2"));
  if (Number.isNaN(date.getTime())) return "";
  return date.toLocaleString([], { dateStyle: "short", timeStyle: "short" });
}
