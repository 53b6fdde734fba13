// Pieces that the node and the sidebar both show: phases and memory of a run.
import { div, dot, el, figure } from "./dom.js";
import { duration, gigabytes, isNumber, phasesOf, sumOf } from "./figures.js";
import { t } from "./i18n.js";
import { fileUrl } from "./server.js";

/** A bar of phases with a legend; `longest` ms fill the width. */
export function phaseBar(phases, longest = null) {
  const parts = phasesOf(phases);
  const sum = sumOf(parts);
  if (!sum) return null;
  const width = (ms) => `width:${((100 * ms) / (longest ?? sum)).toFixed(2)}%`;
  const name = ([phase, ms]) => `${t(`phase_${phase}`)} ${duration(ms)}`;
  return div(
    "sl-phases",
    div("sl-stack", parts.map((part) => el("i", { class: `sl-ph-${part[0]}`, style: width(part[1]), title: name(part) }))),
    div("sl-legend", parts.filter(([, ms]) => ms >= sum * 0.004).map((part) => dot(`sl-ph-${part[0]}`, name(part)))),
  );
}

export function memoryPeaks(memory) {
  const { peak_allocated_gb: vram, peak_reserved_gb: reserved, peak_rss_gb: ram } = memory ?? {};
  return Object.entries({ vram, "vram_reserved": reserved, ram }).filter(([, value]) => isNumber(value));
}

export const peakTexts = (memory) => memoryPeaks(memory).map(([name, value]) => `${t(name)} ${gigabytes(value)}`);

export function memoryLine(memory) {
  const peaks = memoryPeaks(memory).map(([name, value]) => figure(name, gigabytes(value)));
  return peaks.length > 0 && div("sl-memory", peaks);
}

/** An image of a run; nothing where its file is gone. */
export const picture = (runId, index, attributes) =>
  el("img", { src: `${fileUrl(runId, "images", index)}?if_there`, loading: "lazy", onerror: ({ target }) => (target.style.display = "none"), ...attributes });

/** What a run has to say, a line each. */
export function notesOf({ error, warnings }) {
  const lines = [error, ...(warnings ?? [])].filter(Boolean);
  return lines.length ? div("sl-notes", lines.join("\n")) : null;
}

/** A word for how a run ended, nothing where it ended well. */
export function statusBadge(status) {
  if (!status || status === "ok") return null;
  const known = ["oom", "cancelled", "error"].includes(status);
  return el("span", { class: "sl-badge", text: known ? t(`status_${status}`) : status });
}
