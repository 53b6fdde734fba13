"""Fixtures of the browser tier: a real ComfyUI with its real frontend in headless Chromium.

`SPEEDLAB_PICTURES=1` writes the images of the help pages and of the README into js/docs/images and docs/images.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from speedlab_tools.client.files import demo_drawn
from speedlab_tools.host import ComfyServer, from_environment, pack_root
from speedlab_tools.scenarios.drawn import CAPTIONS, CFG, CHECKPOINTS, side

# Images for people show what the model that draws made.
PICTURES = bool(os.environ.get("SPEEDLAB_PICTURES"))
DEMO_CHECKPOINT = CHECKPOINTS["sd15"] if PICTURES else "speedlab_demo_sd15.safetensors"
SIDE = side() if PICTURES else 64
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Locale": "en",
    "Comfy.Minimap.Visible": False,
    "Comfy.ColorPalette": "dark",
    "Comfy.VueNodes.Enabled": False,
    "SpeedLab.LiveChart": True,
    "SpeedLab.KeepRuns": 0,
    "Comfy.Graph.CanvasInfo": False,
}
DROP = """({text, name}) => {
  const data = new DataTransfer();
  data.items.add(new File([text], name, {type: "application/json"}));
  const canvas = document.querySelector("#graph-canvas") ?? document.querySelector("canvas");
  for (const kind of ["dragenter", "dragover", "drop"])
    canvas.dispatchEvent(new DragEvent(kind,
      {dataTransfer: data, bubbles: true, cancelable: true, clientX: 600, clientY: 400}));
}"""
READY = """() => {
  const manager = window.app?.extensionManager;
  const tabs = manager?.getSidebarTabs?.() ?? manager?.sidebarTab?.sidebarTabs;
  return Boolean(tabs?.some?.((tab) => tab.id === "speedlab"));
}"""
# The frontend covers the page while it works. Covered again before the first cover has faded out, it takes away the
# wrong one and fails at the end of that.
UNCOVERED = "() => !document.querySelector('.p-blockui-mask')"
# Nodes that reach out of the group that they begin in. Of the Vue renderer's the elements count.
OUTSIDE = """() => {
  const graph = app.rootGraph ?? app.graph, out = [];
  for (const group of graph.groups ?? graph._groups) {
    const right = group.pos[0] + group.size[0], bottom = group.pos[1] + group.size[1];
    for (const node of graph.nodes) {
      const [x, y] = node.pos;
      if (x < group.pos[0] || x > right || y < group.pos[1] || y > bottom) continue;
      const drawn = document.querySelector(`[data-node-id="${node.id}"]`);
      const width = drawn?.offsetWidth ?? node.size[0], height = drawn ? drawn.offsetHeight - 30 : node.size[1];
      if (x + width > right || y + height > bottom)
        out.push(`${node.title}: ends at ${Math.round(x + width)}, ${Math.round(y + height)} of ${right}, ${bottom}`);
    }
  }
  return out;
}"""
WATCH = """() => {
  window.slSeen = [];
  clearInterval(window.slTimer);
  window.slTimer = setInterval(() => {
    const panel = document.querySelector(".sl-panel");
    const now = panel ? `${panel.dataset.state} ${panel.dataset.steps}` : "none";
    if (window.slSeen.at(-1) !== now) window.slSeen.push(now);
  }, 25);
}"""


@dataclass
class Canvas:
    """A page with ComfyUI in it, and what went wrong there."""

    page: Any
    url: str
    output: Path
    faults: list[str] = field(default_factory=list)
    # Addresses of models whose size the frontend asked for, to offer them.
    offered: set[str] = field(default_factory=set)
    loaded: bool = False

    def offer(self) -> None:
        """Answer from here on for the host of models, where the frontend asks how large a file is."""

        def answer(route: Any) -> None:
            if route.request.method == "HEAD":
                self.offered.add(route.request.url)
            route.fulfill(status=200, headers={"content-length": "1000000", "access-control-allow-origin": "*"})

        self.page.route(re.compile("^https://huggingface[.]co/"), answer)

    def open(self) -> None:
        self.loaded = False
        self.page.goto(self.url)
        self._arrive()

    def reload(self) -> None:
        """Load the page again, as F5 does: what ComfyUI has kept of the workflow comes back."""
        self.page.wait_for_timeout(1500)  # it keeps changes with some delay
        self.loaded = False
        self.page.reload()
        self._arrive()

    def _arrive(self) -> None:
        self.page.wait_for_function(READY, timeout=90_000)
        self.page.wait_for_function(UNCOVERED, timeout=90_000)
        self.page.wait_for_timeout(500)
        self.loaded = True

    def drop(self, workflow: dict[str, Any], name: str) -> None:
        """Drop a workflow file onto the canvas, as a person does."""
        self.page.evaluate(DROP, {"text": json.dumps(workflow), "name": f"{name}.json"})
        self.page.wait_for_function(
            "(id) => (app.rootGraph ?? app.graph).id === id", arg=workflow["id"], timeout=30_000
        )
        self.page.wait_for_function(UNCOVERED, timeout=30_000)
        self.page.wait_for_timeout(300)

    def evaluate(self, script: str, argument: Any = None) -> Any:
        return self.page.evaluate(script, argument)

    def queue(self, timeout_s: float = 120.0) -> list[str]:
        """Queue what is on the canvas and wait for its end; what the first panel showed meanwhile."""
        before = self.evaluate("() => document.querySelector('.sl-panel')?.dataset.run ?? ''")
        self.evaluate(
            "() => { window.slDone = 0; for (const name of ['execution_success', 'execution_error'])"
            " app.api.addEventListener(name, () => (window.slDone += 1)); }"
        )
        self.evaluate(WATCH)
        self.evaluate("async () => { await app.queuePrompt(0, 1); }")
        self.page.wait_for_function("() => window.slDone > 0", timeout=timeout_s * 1000)
        self.page.wait_for_function(
            "(old) => { const run = document.querySelector('.sl-panel')?.dataset.run; return run && run !== old; }",
            arg=before,
            timeout=20_000,
        )
        return self.evaluate("() => window.slSeen")

    def shot(self, name: str, folder: str = "docs/images", clip: Any = None) -> None:
        """Save an image for people, where that was asked for; else only see that one can be taken."""
        picture = self.page.screenshot(clip=clip, timeout=60_000)
        assert picture[1:4] == b"PNG"
        if PICTURES:
            save_png(picture, pack_root() / folder / f"{name}.png")

    def template_image(self, name: str) -> None:
        """The whole graph as `workflows/<name>.jpg` where images were asked for; else a check that it can be made."""
        import base64
        import io

        from PIL import Image

        taken = base64.b64decode(self.evaluate(_WHOLE_GRAPH).partition(",")[2])
        image = Image.open(io.BytesIO(taken)).convert("RGB")
        assert image.getextrema() != ((0, 0), (0, 0), (0, 0))
        if PICTURES:
            image.thumbnail((900, 600))
            image.save(pack_root() / "workflows" / f"{name}.jpg", quality=80, optimize=True)


# All nodes and groups as the canvas draws them, without what lies over it.
_WHOLE_GRAPH = """() => {
  const graph = app.rootGraph ?? app.graph, boxes = [...graph.nodes, ...(graph.groups ?? graph._groups)];
  for (const node of graph.nodes) node.has_errors = false;
  const left = Math.min(...boxes.map((b) => b.pos[0])), top = Math.min(...boxes.map((b) => b.pos[1])) - 40;
  const right = Math.max(...boxes.map((b) => b.pos[0] + b.size[0]));
  const bottom = Math.max(...boxes.map((b) => b.pos[1] + b.size[1]));
  const view = app.canvas, canvas = view.canvas, before = [canvas.width, canvas.height];
  view.low_quality_zoom_threshold = 0;
  view.min_font_size_for_lod = 0;
  view.resize(1800, Math.max(700, Math.min(1200, 1760 * (bottom - top) / (right - left) + 40)));
  const scale = Math.min((canvas.width - 40) / (right - left), (canvas.height - 40) / (bottom - top));
  const shift = [canvas.width / scale - (right - left), canvas.height / scale - (bottom - top)];
  view.ds.scale = scale;
  view.ds.offset = [shift[0] / 2 - left, shift[1] / 2 - top];
  view.deselectAll?.();
  view.draw(true, true);
  const data = canvas.toDataURL("image/png");
  view.resize(...before);
  view.setDirty(true, true);
  return data;
}"""


def save_png(data: bytes, path: Path) -> None:
    """A screenshot in 256 colours, spread over all that it has: a third of the size, and no difference to see."""
    import io

    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    palette = image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    palette.save(path, optimize=True)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium of the system.

    Not for the whole session: while Playwright is open this thread counts as inside an event loop, and every test
    of another tier that calls `asyncio.run` would fail.
    """
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        message = (
            "the browser tests need Chromium (Debian and Ubuntu: apt-get install chromium; elsewhere Chromium or "
            f"Google Chrome on PATH under one of the names {', '.join(BROWSERS)})"
        )
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(message)
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # No request leaves this machine: what the frontend asks of other hosts is refused, and is its business. Not by
        # a route of Playwright, with which Chromium keeps no file of the frontend from one page to the next.
        hosts = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server", hosts]
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


def _frontends() -> Any:
    spec = importlib.util.spec_from_file_location("speedlab_frontends", Path(__file__).with_name("frontends.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SERVERS = pytest.StashKey[dict[str, ComfyServer]]()


@pytest.fixture(scope="session")
def servers(request: pytest.FixtureRequest) -> Iterator[dict[str, ComfyServer]]:
    """The servers that the modules here share, by their frontend; each starts with the first test that asks for it."""
    request.config.stash[SERVERS] = running = {}
    yield running
    _stop(running)


def _stop(running: dict[str, ComfyServer]) -> None:
    while running:
        running.popitem()[1].stop()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the servers with the last test of this folder: the tests that follow need their memory."""
    if nextitem is None or nextitem.path.parent != item.path.parent:
        _stop(item.config.stash.get(SERVERS, {}))


@pytest.fixture(scope="module", params=["pinned", pytest.param("newest", marks=pytest.mark.full)])
def server(
    request: pytest.FixtureRequest,
    servers: dict[str, ComfyServer],
    tmp_path_factory: pytest.TempPathFactory,
    demo_checkpoint: Path,
    cache_dir: Path,
) -> ComfyServer:
    """A server with the frontend that ComfyUI pins, and one with the newest."""
    if request.param not in servers:
        base = tmp_path_factory.mktemp(f"browser-{request.param}")
        folder = base / "models" / "checkpoints"
        folder.mkdir(parents=True)
        (folder / DEMO_CHECKPOINT).symlink_to(demo_drawn()[0] if PICTURES else demo_checkpoint)
        extra = []
        if request.param == "newest":
            extra = ["--front-end-root", str(_frontends().newest_static(cache_dir.parent))]
        started = ComfyServer(from_environment(), pack=pack_root(), base=base, extra_args=extra)
        started.start()
        servers[request.param] = started
    return servers[request.param]


def screens(*everyday: str, full: Sequence[str] = ()) -> Any:
    """Frontends and renderers of a test, such as "pinned-vue". Each pair of them has some test, and none has all."""
    cases = [(case, ()) for case in everyday] + [(case, pytest.mark.full) for case in full]
    return pytest.mark.parametrize(
        ("server", "vue"),
        [
            pytest.param(case.split("-")[0], case.endswith("vue"), id=case, marks=marks)
            for case, marks in cases
        ],
        indirect=["server"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def context(chromium: Any) -> Iterator[Any]:
    """One for all pages of a module, so that the frontend's files are read once."""
    opened = chromium.new_context()
    opened.set_default_navigation_timeout(180_000)  # a machine that works on other things too is slow
    yield opened
    opened.close()


@pytest.fixture
def open_canvas(server: ComfyServer, context: Any) -> Iterator[Callable[..., Canvas]]:
    """Open ComfyUI with the given settings. Fails at the end of the test for what the browser complained about."""
    canvases: list[Canvas] = []

    def start(width: int = 1600, height: int = 1000, **settings: Any) -> Canvas:
        for name, value in {**SETTINGS, **settings}.items():
            body = json.dumps(value).encode()
            header = {"Content-Type": "application/json"}
            urllib.request.urlopen(
                urllib.request.Request(f"{server.url}/settings/{name}", body, header), timeout=30
            ).close()
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": height})
        # Nothing of an earlier test but the files of the frontend.
        known = {"origin": server.url, "storageTypes": "cookies,local_storage,indexeddb,cache_storage,service_workers"}
        context.new_cdp_session(page).send("Storage.clearDataForOrigin", known)
        page.add_init_script("localStorage.vueNodesBannerDismissed = true")  # which lies over the top of ComfyUI
        canvas = Canvas(page, server.url, server.base / "output")
        canvases.append(canvas)
        page.on("console", lambda message: _note(canvas, message.type, message.text, message.location))
        page.on("pageerror", lambda error: _note(canvas, "error", f"{error}\n{error.stack or ''}", {}))
        canvas.open()
        return canvas

    yield start
    for canvas in canvases:
        canvas.page.close()
    faults = [fault for canvas in canvases for fault in canvas.faults]
    assert not faults, "the browser's console has errors:\n" + "\n".join(faults)


def _note(canvas: Canvas, kind: str, text: str, location: Any) -> None:
    """Keep errors: all that name this pack, and of the frontend's own those that come after it has loaded."""
    place = str((location or {}).get("url", ""))
    here = not place.startswith("http") or place.startswith(canvas.url)
    ours = here and "speedlab" in f"{text} {place}".lower()
    # The newest frontend asks this server for a job list that it does not have, and lives without it.
    # It also asks other hosts how large models are, which it does not reach here.
    missing = any(words in text for words in ("Failed to load resource", "JobsApiError", "Error fetching file size"))
    if kind != "error" or (missing and not ours):
        return
    # PrimeVue removes the mask over the page late on a slow machine, and may fail: no code of this pack is in that.
    mask = "primevue/blockui" in text and "removeMask" in text
    if ours or (canvas.loaded and not mask):
        canvas.faults.append(f"{text} ({place})")


def serious(canvas: Any, inside: str) -> list[str]:
    """What axe-core finds inside an element that keeps somebody from using it."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(canvas.page, context=inside, options={"resultTypes": ["violations"]}).response["violations"]
    return [
        f"{one['id']}: {node['html'][:160]} {node['failureSummary'][:300]}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


@pytest.fixture(scope="session")
def workflows() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Every shipped workflow by the scenario that it is of: (drag-in file, API file)."""
    folder = pack_root() / "workflows"
    found = {}
    for path in sorted([*folder.glob("*.json"), *folder.glob("scenarios/*.json")]):
        workflow = json.loads(path.read_text("utf-8"))
        scenario = workflow["extra"]["speedlab"]["scenario"]
        found[scenario] = (workflow, json.loads((folder / "api" / f"{scenario}.json").read_text("utf-8")))
    return found


@pytest.fixture
def small(workflows: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """The plain workflow with the demo checkpoint and small settings."""

    def make(steps: int = 4, seed: int = 1, text: str = "") -> dict[str, Any]:
        workflow = json.loads(json.dumps(workflows["txt2img-default"][0]))
        captions = iter((CAPTIONS[0], "") if PICTURES else ())
        for node in workflow["nodes"]:
            values = node.get("widgets_values")
            if node["type"] == "SpeedLabCheckpointLoader":
                values[0] = DEMO_CHECKPOINT
            if node["type"] == "EmptyLatentImage":
                values[:2] = [SIDE, SIDE]
            if node["type"] == "SpeedLabProfileSampler":
                values[0], values[2] = seed, steps
                if PICTURES:
                    values[3:6] = CFG, "dpmpp_2m", "karras"
            if node["type"] == "SpeedLabTextEncode" and (text or PICTURES):
                values[0] = next(captions, f"{text} {node['id']}")
        return workflow

    return make
