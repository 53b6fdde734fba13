// What the extension asks its own server; see speedlab/web/routes.py.
import { api } from "../../../scripts/api.js";

/** A run's record; null for one that was deleted, without the browser calling that a failed request. */
export async function findRun(runId) {
  const response = await api.fetchApi(`/speedlab/runs/${encodeURIComponent(runId)}?if_there`);
  return response.status === 204 ? null : answer(response);
}

/** The address of a file that ComfyUI names: filename, subfolder, type. */
export const viewUrl = (file) => api.apiURL(`/view?${new URLSearchParams(file)}`);

async function answer(response) {
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(body.error ?? `${response.status} ${response.statusText}`);
  return body;
}

function post(path, body) {
  const headers = { "Content-Type": "application/json" };
  return api.fetchApi(path, { method: "POST", headers, body: JSON.stringify(body) }).then(answer);
}

export function listRuns(offset, limit, words) {
  const query = new URLSearchParams({ offset, limit, q: words });
  return api.fetchApi(`/speedlab/runs?${query}`).then(answer);
}

const ofRun = (runId) => `/speedlab/runs/${encodeURIComponent(runId)}`;
export const readRun = (runId) => api.fetchApi(ofRun(runId)).then(answer);
/** {workflow, prompt}: what the run's image keeps of its graph; an error says why there is neither. */
export const readWorkflow = (runId) => api.fetchApi(`${ofRun(runId)}/workflow`).then(answer);
export const deleteRuns = (runIds) => post("/speedlab/delete", { run_ids: runIds });
export const pruneRuns = (keep) => post("/speedlab/prune", { keep });
export const announceLive = (clientId, on) => post("/speedlab/live", { client_id: clientId, on });

/** Addresses for links and pictures. */
export const jsonUrl = (runId) => api.apiURL(`${ofRun(runId)}?download=1`);
export const pageUrl = (runId) => api.apiURL(`${ofRun(runId)}/page?download=1`);
export const fileUrl = (runId, kind, index = 0) => api.apiURL(`${ofRun(runId)}/file/${encodeURIComponent(kind)}/${index}`);
export const csvUrl = () => api.apiURL("/speedlab/results.csv");
