// Shows what SpeedLab's measuring nodes say on the nodes themselves. Text only, never markup.
import { app } from "../../scripts/app.js";

const HEIGHTS = {
  SpeedLabBenchmark: 320,
  SpeedLabProfileReport: 320,
  SpeedLabProfileSampler: 90,
  SpeedLabCompareImages: 60,
  SpeedLabCompareLatents: 60,
};
const WIDGET = "speedlab_text";

function textWidget(node, height) {
  // The report is a table, whose columns must stay under each other; the other texts are sentences.
  const wrap = ["SpeedLabProfileReport", "SpeedLabBenchmark"].includes(node.comfyClass) ? "pre" : "pre-wrap";
  const known = node.widgets?.find((widget) => widget.name === WIDGET);
  if (known) return known;
  const element = document.createElement("pre");
  element.style.cssText =
    "margin:0;padding:6px;overflow:auto;font:11px/1.35 monospace;" +
    `white-space:${wrap};` +
    "color:var(--input-text,inherit);background:var(--comfy-input-bg,transparent);border-radius:4px";
  const widget = node.addDOMWidget(WIDGET, WIDGET, element, {
    serialize: false, // not part of the prompt
    getMinHeight: () => height,
  });
  widget.serialize = false; // nor of the saved workflow
  node.setSize([Math.max(node.size[0], node.computeSize()[0]), Math.max(node.size[1], node.computeSize()[1])]);
  return widget;
}

app.registerExtension({
  name: "SpeedLab.Text",
  beforeRegisterNodeDef(nodeType, nodeData) {
    const height = HEIGHTS[nodeData.name];
    if (!height) return;
    const original = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      original?.apply(this, arguments);
      if (output?.text) textWidget(this, height).element.textContent = output.text.join("\n");
    };
  },
});
