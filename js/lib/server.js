// What the extension asks its own server; see speedlab/web/routes.py.
import { api } from "../../../scripts/api.js";

/** A run's record; null for one that was deleted, without the browser calling that a failed request. */
export async function findRun(runId) {
  const response = await api.fetchApi(`${ofRun(runId)}?if_there`);
  return response.status === 204 ? null : answer(response);
}

/** The address of a file that ComfyUI names: filename, subfolder, type. */
export const viewUrl = (file) => api.apiURL(`/view?${new URLSearchParams(file)}`);

async function answer(response) {
  if (response.ok) return response.json();
  const { error } = await response.json().catch(() => ({}));
  throw new Error(error ?? `${response.status} ${response.statusText}`);
}

const ask = (path, options) => api.fetchApi(path, options).then(answer);

const post = (path, body) => ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

export const listRuns = (offset, limit, words) => ask(`/speedlab/runs?${new URLSearchParams({ offset, limit, q: words })}`);

const ofRun = (runId) => `/speedlab/runs/${encodeURIComponent(runId)}`;
export const readRun = (runId) => ask(ofRun(runId));
/** {workflow, prompt}: what the run's image keeps of its graph; or {error}, why there is neither. */
export const readWorkflow = (runId) => ask(`${ofRun(runId)}/workflow?if_there`);
export const deleteRuns = (runIds) => post("/speedlab/delete", { run_ids: runIds });
export const pruneRuns = (keep) => post("/speedlab/prune", { keep });
export const announceLive = (clientId, on) => post("/speedlab/live", { client_id: clientId, on });

export const jsonUrl = (runId) => api.apiURL(`${ofRun(runId)}?download=1`);
export const pageUrl = (runId) => api.apiURL(`${ofRun(runId)}/page?download=1`);
export const fileUrl = (runId, kind, index = 0) => api.apiURL(`${ofRun(runId)}/file/${encodeURIComponent(kind)}/${index}`);
export const csvUrl = () => api.apiURL("/speedlab/results.csv");
