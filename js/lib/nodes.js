// Finds nodes of the workflow on the canvas.
import { app } from "../../../scripts/app.js";

export const rootGraph = () => app.rootGraph ?? app.graph;

export const kindOf = (node) => node?.comfyClass ?? node?.type;

/** Whether the Vue renderer draws nodes: it shows only the widgets that a node is born with. */
export const isVue = () => Boolean(window.LiteGraph?.vueNodesMode);

/** Whether a workflow, by its id, is the one on the canvas; one without an id is taken to be. */
export const isHere = (workflow) => !workflow || !rootGraph()?.id || workflow === rootGraph().id;

/** The node of an execution id such as "12" or, inside subgraphs, "12:3". */
export function findNode(executionId) {
  const path = String(executionId).split(":");
  const last = path.pop();
  return path.reduce((graph, id) => graph?.getNodeById(id)?.subgraph, rootGraph())?.getNodeById(last) ?? null;
}

/** The same of a workflow; null where that is not the one on the canvas. */
export const nodeHere = (workflow, executionId) => (isHere(workflow) ? findNode(executionId) : null);

/** The id of the node that shows the result of an `executed` message: an expanded node's is its parent's. */
export const shownOn = (detail) => detail?.display_node ?? detail?.node;

/** Give a node a widget that is an element, part neither of the prompt nor of the saved workflow. */
export function addElement(node, name, element, options) {
  const widget = node.addDOMWidget(name, name, element, { serialize: false, ...options });
  widget.serialize = false;
  return widget;
}

/** Make a node as wide and tall as its widgets need; one that is larger stays so. */
export function grow(node) {
  const wanted = node.computeSize();
  const size = [0, 1].map((side) => Math.max(node.size[side], wanted[side]));
  if (size.every((length, side) => length === node.size[side])) return;
  node.setSize(size);
  node.setDirtyCanvas?.(true, true);
}

/** Draw all anew: a widget that came by itself has no place until then. */
export function redraw() {
  app.canvas?.setDirty(true, true);
  requestAnimationFrame(() => app.canvas?.setDirty(true, true));
}
