// SpeedLab in the browser: profiles on the samplers, the sidebar with all runs, the settings.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { CompareTab } from "./lib/compare.js";
import { useStyles } from "./lib/dom.js";
import * as front from "./lib/front.js";
import { loadWords, t } from "./lib/i18n.js";
import { RunsTab } from "./lib/runs.js";
import * as samplers from "./lib/samplers.js";
import { pruneRuns } from "./lib/server.js";
import * as texts from "./lib/texts.js";

const LIVE = "SpeedLab.LiveChart";
const KEEP = "SpeedLab.KeepRuns";
const runs = new RunsTab();
const compare = new CompareTab();
runs.onPick = (ids) => compare.show(ids);

const setting = (id, fallback) => app.extensionManager?.setting?.get(id) ?? fallback;
const wantsLive = () => setting(LIVE, true) !== false;

/** After a prompt queued here: keep as many runs as the setting says, and show the new ones. */
async function afterPrompt() {
  const keep = Math.floor(Number(setting(KEEP, 0)));
  if (keep > 0) await pruneRuns(keep).catch((error) => console.warn("SpeedLab:", error.message));
  runs.refresh();
  compare.show();
}

app.registerExtension({
  name: "SpeedLab",
  settings: [
    {
      id: LIVE,
      category: ["SpeedLab", "Profile", "LiveChart"],
      name: "Live chart while sampling",
      tooltip: "Shows the time of each step on the sampler while it runs.",
      type: "boolean",
      defaultValue: true,
      onChange: (wanted) => samplers.announce(wanted !== false),
    },
    {
      id: KEEP,
      category: ["SpeedLab", "Profile", "KeepRuns"],
      name: "Runs to keep (0 keeps all)",
      tooltip:
        "After a run queued from this browser the oldest runs beyond this number are deleted, with their images, charts and traces in output/speedlab. The table results.csv keeps its rows.",
      type: "number",
      defaultValue: 0,
      attrs: { min: 0, max: 1000000, step: 1 },
    },
  ],
  commands: [{ id: "SpeedLab.ShowRuns", label: "Show SpeedLab runs", icon: "pi pi-gauge", function: () => app.extensionManager.sidebarTab?.toggleSidebarTab?.("speedlab"), }],
  // A frontend without a bottom panel leaves it aside.
  bottomPanelTabs: [{ id: "speedlab-compare", title: "SpeedLab", type: "custom", render: (element) => compare.render(element), }],
  menuCommands: [{ path: ["View"], commands: ["SpeedLab.ShowRuns"] }],
  beforeRegisterNodeDef: (nodeType, nodeData) => samplers.noteType(nodeData),
  nodeCreated(node) {
    samplers.nodeCreated(node);
    texts.nodeCreated(node);
    front.nodeCreated(node);
  },
  afterConfigureGraph() {
    samplers.restoreAll();
    texts.restoreAll();
    front.restoreAll();
  },
  async setup() {
    useStyles();
    samplers.listen(wantsLive);
    texts.listen();
    front.listen();
    api.addEventListener("execution_success", afterPrompt);
    await loadWords();
    app.extensionManager.registerSidebarTab({
      id: "speedlab",
      icon: "pi pi-gauge",
      title: "SpeedLab",
      tooltip: t("tab_tooltip"),
      type: "custom",
      render: (element) => runs.render(element),
      destroy: () => runs.destroy(),
    });
  },
});
