// The extension's words, from locales/<language>/main.json, in the language of the interface.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

let words = {};

/** Fetch the words; without them keys are shown. */
export async function loadWords() {
  try {
    const answer = await api.fetchApi("/i18n");
    if (answer.ok) words = await answer.json();
  } catch (error) {
    console.warn("SpeedLab: no translations", error);
  }
}

function language() {
  const locale = app.extensionManager?.setting?.get("Comfy.Locale") || "en";
  return [locale, locale.split("-")[0], "en"].find((name) => words[name]?.speedlab) ?? "en";
}

/** The words for a key, with {name} replaced by values. */
export function t(key, values = {}) {
  const text = words[language()]?.speedlab?.[key] ?? words.en?.speedlab?.[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
}
