// Leads events and results to the nodes that they belong to, and gives a reloaded workflow its last profiles back.
import { api } from "../../../scripts/api.js";
import { findNode, isHere, isVue, kindOf, redraw, rootGraph, shownOn } from "./nodes.js";
import { fromRecord, panelOf } from "./panel.js";
import { announceLive, findRun } from "./server.js";
import { isReport, showRun } from "./texts.js";

// All that a saved workflow keeps of a run: its id.
const PROPERTY = "speedlab_run";
const RUN_ID = /^\d{8}-\d{6}-[0-9a-f]{8}$/;
const KEPT = 64;
// Outlives a reload of the page, and not the browser's tab.
const STORAGE = "SpeedLab.LastRuns";

const samplers = new Set(); // node types
const states = new Map(); // node's execution id -> live state
const profiles = new Map(); // run id -> profile
const lastRuns = new Map(); // workflow id and node's execution id -> run id, for workflows in other tabs
// The same, of this page before it was reloaded: ComfyUI keeps a workflow as it was when somebody last touched it, so
// that the id of a run that came later is not in it.
const beforeReload = new Map(stored());

const isSampler = (node) => samplers.has(kindOf(node));
const hasSampler = (node) => node.subgraph?.nodes.some((inner) => isSampler(inner) || hasSampler(inner));

function keep(map, key, value) {
  map.delete(key);
  map.set(key, value);
  if (map.size > KEPT) map.delete(map.keys().next().value);
}

function stored() {
  try {
    return JSON.parse(sessionStorage.getItem(STORAGE)) ?? [];
  } catch {
    return []; // switched off in this browser, or not of ours
  }
}

function store(key, runId) {
  const runs = new Map(stored());
  keep(runs, key, runId);
  try {
    sessionStorage.setItem(STORAGE, JSON.stringify([...runs]));
  } catch {
    // Full, or switched off: then a reload shows the run that the workflow names.
  }
}

/** Learn from the server's description of a node whether it returns profiles. */
export function noteType(nodeData) {
  if (nodeData.name.startsWith("SpeedLab") && nodeData.output?.includes("SPEEDLAB_PROFILE")) samplers.add(nodeData.name);
}

/** A node was made. */
export function nodeCreated(node) {
  if (!isVue()) return;
  if (isSampler(node)) panelOf(node);
  if (!node.subgraph) return;
  // Here as well, but a subgraph node is born with its inner nodes and gets its widgets when it is configured.
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
  keep(profiles, profile.run_id, profile);
  node.properties[PROPERTY] = profile.run_id;
  if (isReport(node)) return showRun(node, profile.run_id, text);
  for (const panel of panelsOf(node, executionId)) panel.showProfile(profile, warningsOf(text));
  redraw();
}

// The summary's first lines say what the panel draws; what follows are warnings.
const warningsOf = (text) => (text ?? "").split("\n").filter((line) => line.endsWith(".")).join("\n");

function onStep({ detail }) {
  if (!detail?.run_id || !isHere(detail.workflow)) return;
  if (profiles.has(detail.run_id)) return; // the result overtook the last message
  const before = states.get(detail.node);
  const goesOn = before?.run_id === detail.run_id && before.run === detail.run && detail.first <= before.steps.length;
  const steps = goesOn ? before.steps.slice(0, detail.first) : [];
  // Messages that were sent while this page was loading are gone; their steps are shown as of the first one known.
  while (steps.length < detail.first) steps.push(detail.steps[0] ?? [0, 0]);
  const state = { ...detail, steps: steps.concat(detail.steps), total: Math.max(detail.total, steps.length + detail.steps.length) };
  keep(states, detail.node, state);
  const node = findNode(detail.node);
  if (isSampler(node)) showLive(node, detail.node, state);
}

function onExecuted({ detail }) {
  // A sampler that ran for each item of a list returns a profile for each; the last one is shown.
  const profile = detail?.output?.speedlab?.at?.(-1);
  if (!profile) return;
  const key = `${profile.workflow}/${shownOn(detail)}`;
  if (!isHere(profile.workflow)) {
    keep(profiles, profile.run_id, profile);
    keep(lastRuns, key, profile.run_id);
    return;
  }
  const node = findNode(shownOn(detail));
  if (!isSampler(node) && !isReport(node)) return;
  show(node, shownOn(detail), profile, detail.output.text?.at(-1));
  if (profile.workflow) store(key, profile.run_id);
}

/** Show the last profile on every sampler of the workflow just loaded. */
export function restoreAll(graph = rootGraph(), prefix = "") {
  for (const node of graph?.nodes ?? graph?._nodes ?? []) {
    if (node.subgraph) restoreAll(node.subgraph, `${prefix}${node.id}:`);
    else if (isSampler(node) || isReport(node)) restore(node, `${prefix}${node.id}`);
  }
}

async function restore(node, executionId) {
  const state = states.get(executionId);
  if (state?.state === "running" && state.workflow && isHere(state.workflow)) {
    return showLive(node, executionId, state);
  }
  const key = `${rootGraph()?.id}/${executionId}`;
  const runId = lastRuns.get(key) ?? beforeReload.get(key) ?? node.properties?.[PROPERTY];
  beforeReload.delete(key);
  if (typeof runId !== "string" || !RUN_ID.test(runId)) return;
  try {
    const record = profiles.has(runId) ? null : await findRun(runId);
    const profile = profiles.get(runId) ?? (record && fromRecord(record));
    // Deleted, or measured on another machine; or meanwhile a run has begun, or the node is gone.
    if (profile && node.graph && (isReport(node) || !panelOf(node).runId)) show(node, executionId, profile);
  } catch {
    // A record that cannot be read: nothing to show.
  }
}

let announced = null;

/** Tell the server whether this page shows live charts, once for each connection. */
export function announce(wanted, again = false) {
  if (!api.clientId || (!again && announced === `${api.clientId} ${wanted}`)) return;
  announced = `${api.clientId} ${wanted}`;
  announceLive(api.clientId, wanted).catch(() => (announced = null));
}

/** Listen; `wantsLive` tells whether live charts are switched on. */
export function listen(wantsLive) {
  api.addEventListener("speedlab.step", onStep);
  api.addEventListener("executed", onExecuted);
  api.addEventListener("status", () => announce(wantsLive()));
  api.addEventListener("reconnected", () => announce(wantsLive(), true));
  announce(wantsLive());
}
