// Leads events and results to their nodes, and gives a reloaded workflow its last profiles back.
import { api } from "../../../scripts/api.js";
import { Kept } from "./kept.js";
import { findNode, isHere, isVue, kindOf, nodeHere, redraw, rootGraph, shownOn } from "./nodes.js";
import { fromRecord, panelOf } from "./panel.js";
import { announceLive, findRun } from "./server.js";
import { isReport, showRun } from "./texts.js";

// All that a saved workflow keeps of a run: its id.
const PROPERTY = "speedlab_run";
const RUN_ID = /^\d{8}-\d{6}-[0-9a-f]{8}$/;
const KEPT = 64;

const samplers = new Set(); // node types
const states = new Kept(KEPT); // node's execution id -> live state
const profiles = new Kept(KEPT); // run id -> profile
// Workflow id and node's execution id -> run id: ComfyUI keeps a workflow as it was when somebody last touched it, for
// other tabs, undo and a reload alike, without the runs since.
const lastRuns = new Kept(KEPT, "SpeedLab.LastRuns");

const isSampler = (node) => samplers.has(kindOf(node));
const shows = (node) => isSampler(node) || isReport(node);
const hasSampler = (node) => node.subgraph?.nodes.some((inner) => isSampler(inner) || hasSampler(inner));

/** Learn from the server's description of a node whether it returns profiles. */
export function noteType(nodeData) {
  if (nodeData.name.startsWith("SpeedLab") && nodeData.output?.includes("SPEEDLAB_PROFILE")) samplers.add(nodeData.name);
}

export function nodeCreated(node) {
  if (!isVue()) return;
  if (isSampler(node)) panelOf(node);
  if (!node.subgraph) return;
  // A subgraph node is born with its inner nodes and gets its widgets when it is configured.
  const configured = node.onConfigure;
  node.onConfigure = function (...given) {
    configured?.apply(this, given);
    if (hasSampler(this)) panelOf(this);
  };
}

/** The panels that show what a sampler measures: its own, and one on the face of each subgraph that it is in. */
function panelsOf(node, executionId) {
  const path = String(executionId).split(":");
  const hosts = path.slice(1).map((_, index) => findNode(path.slice(0, index + 1).join(":")));
  return [node, ...hosts.filter(Boolean)].map(panelOf);
}

const showLive = (node, executionId, state) => panelsOf(node, executionId).forEach((panel) => panel.showLive(state));

function show(node, executionId, profile, text) {
  node.properties[PROPERTY] = profile.run_id;
  if (isReport(node)) return showRun(node, profile.run_id, text);
  for (const panel of panelsOf(node, executionId)) panel.showProfile(profile);
  redraw();
}

function onStep({ detail }) {
  if (!detail?.run_id || profiles.has(detail.run_id)) return; // the result overtook the last message
  const before = states.get(detail.node);
  const goesOn = before?.run_id === detail.run_id && before.run === detail.run && detail.first <= before.steps.length;
  const steps = goesOn ? before.steps.slice(0, detail.first) : [];
  // Messages sent while this page was loading are gone: their steps are shown as the first one known.
  while (steps.length < detail.first) steps.push(detail.steps[0] ?? [0, 0]);
  const state = { ...detail, steps: steps.concat(detail.steps), total: Math.max(detail.total, steps.length + detail.steps.length) };
  states.set(detail.node, state);
  const node = nodeHere(detail.workflow, detail.node);
  if (isSampler(node)) showLive(node, detail.node, state);
}

function onExecuted({ detail }) {
  // A sampler that ran for each item of a list returns a profile for each; the last one is shown.
  const profile = detail?.output?.speedlab?.at?.(-1);
  if (!profile?.steps) return; // Benchmark's names only its runs
  const { workflow, run_id } = profile;
  const id = shownOn(detail);
  profiles.set(run_id, profile);
  if (workflow) lastRuns.set(`${workflow}/${id}`, run_id);
  const node = nodeHere(workflow, id);
  if (shows(node)) show(node, id, profile, detail.output.text?.at(-1));
}

/** Show the last profile on every sampler of the workflow just loaded. */
export function restoreAll(graph = rootGraph(), prefix = "") {
  for (const node of graph?.nodes ?? graph?._nodes ?? []) {
    if (node.subgraph) restoreAll(node.subgraph, `${prefix}${node.id}:`);
    else if (shows(node)) restore(node, `${prefix}${node.id}`);
  }
}

async function restore(node, executionId) {
  const state = states.get(executionId);
  const runs = state?.state === "running" && !profiles.has(state.run_id);
  if (runs && state.workflow && isHere(state.workflow)) return showLive(node, executionId, state);
  const runId = lastRuns.get(`${rootGraph()?.id}/${executionId}`) ?? node.properties?.[PROPERTY];
  if (typeof runId !== "string" || !RUN_ID.test(runId)) return;
  try {
    const record = profiles.has(runId) ? null : await findRun(runId);
    const profile = profiles.get(runId) ?? (record && fromRecord(record));
    // Deleted, or measured on another machine; or meanwhile a run has begun, or the node is gone.
    if (!profile || !node.graph || (!isReport(node) && panelOf(node).runId)) return;
    profiles.set(runId, profile);
    show(node, executionId, profile);
  } catch {
    // A record that cannot be read: nothing to show.
  }
}

let announced = null;

/** Tell the server whether this page shows live charts, once for each connection. */
export function announce(wanted, again = false) {
  const now = `${api.clientId} ${wanted}`;
  if (!api.clientId || (!again && announced === now)) return;
  announced = now;
  announceLive(api.clientId, wanted).catch(() => (announced = null));
}

export function listen(wantsLive) {
  api.addEventListener("speedlab.step", onStep);
  api.addEventListener("executed", onExecuted);
  api.addEventListener("status", () => announce(wantsLive()));
  api.addEventListener("reconnected", () => announce(wantsLive(), true));
  announce(wantsLive());
}
