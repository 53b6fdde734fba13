// Shows what SpeedLab's measuring nodes say on the nodes themselves. Text only, never markup.
import { atBirthInVue } from "./dom.js";

const HEIGHTS = {
  SpeedLabBenchmark: 320,
  SpeedLabProfileReport: 320,
  SpeedLabCompareImages: 60,
  SpeedLabCompareLatents: 60,
};
const TABLES = ["SpeedLabProfileReport", "SpeedLabBenchmark"];
const WIDGET = "speedlab_text";

function textWidget(node, height) {
  // The columns of a table must stay under each other; the other texts are sentences.
  const wrap = TABLES.includes(node.comfyClass) ? "pre" : "pre-wrap";
  const known = node.widgets?.find((widget) => widget.name === WIDGET);
  if (known) return known;
  const element = document.createElement("pre");
  element.className = "sl-text";
  element.style.whiteSpace = wrap;
  const widget = node.addDOMWidget(WIDGET, WIDGET, element, {
    serialize: false, // not part of the prompt
    getMinHeight: () => height,
  });
  widget.serialize = false; // nor of the saved workflow
  node.setSize([Math.max(node.size[0], node.computeSize()[0]), Math.max(node.size[1], node.computeSize()[1])]);
  return widget;
}

/** Have measuring nodes show their text. */
export function prepareNode(nodeType, nodeData) {
  const height = HEIGHTS[nodeData.name];
  if (!height) return;
  atBirthInVue(nodeType, (node) => textWidget(node, height));
  const original = nodeType.prototype.onExecuted;
  nodeType.prototype.onExecuted = function (output) {
    original?.apply(this, arguments);
    if (output?.text) textWidget(this, height).element.textContent = output.text.join("\n");
  };
}
