// Builds elements. Text always goes in as text: nothing here, nor anywhere in this extension, parses markup.
import { t } from "./i18n.js";

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if ((value ?? false) === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "text") element.textContent = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => (child ?? false) !== false));
  return element;
}

/** An HTML element: `text` is its text, `onclick` and the like are listeners, the rest attributes. */
export const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);

export const div = (name, ...children) => el("div", { class: name }, ...children);

export const dot = (name, ...words) => el("span", null, el("i", { class: `sl-dot ${name}` }), ...words);

export const figure = (name, value) => el("span", null, `${t(name)} `, el("b", null, value));

// What `download` names is saved.
export const link = (text, href, download, attributes = {}) => el("a", { class: "sl-button", href, download, text, ...attributes });

export const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

export const button = (act, text, onclick, attributes = {}) =>
  el("button", { "data-act": act, text, onclick, ...attributes, class: `sl-button ${attributes.class ?? ""}` });

export function copyButton(label, text) {
  const copy = button("copy", label, async () => {
    try {
      await navigator.clipboard.writeText(text());
    } catch {
      // Browsers have a clipboard only on this machine or behind https.
      const area = el("textarea");
      area.value = text();
      copy.after(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    copy.textContent = t("copied");
    setTimeout(() => (copy.textContent = label), 1500);
  });
  return copy;
}

export const useStyles = () => document.head.append(el("link", { rel: "stylesheet", href: new URL("../speedlab.css", import.meta.url) }));
