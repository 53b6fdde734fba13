"""Tune and Accelerate in ComfyUI's real frontend: the front while it grows, a plan's image, its way to the node."""

from __future__ import annotations

import json
from typing import Any

import pytest

from speedlab_tools.client.graph import Graph
from speedlab_tools.scenarios.canvas import to_ui

from .conftest import DEMO_CHECKPOINT, screens, serious

pytestmark = pytest.mark.browser

FRONT = "document.querySelector('.sl-panel:has(.sl-scatter)')"
PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAUEBAAAACwAAAAAAQABAAACAkQBADs="
SETTINGS: dict[str, Any] = {
    "positive": "a tree", "negative": "", "width": 64, "height": 64, "batch": 1, "steps": 2, "cfg": 4.0,
    "sampler_name": "euler", "scheduler": "normal", "seed": "7", "quality": "any", "budget_minutes": 4.0,
    "budget_gb": 0.0, "candidates": "dynamic_cfg(0.5)",
}  # fmt: skip
PLANS = """(kinds) => (app.rootGraph ?? app.graph).nodes.filter((n) => n.type === 'SpeedLabAccelerate')
  .map((n) => ['preset', 'custom'].map((name) => n.widgets.find((w) => w.name === name).value))"""
SELECT = """(number) => {
  const nodes = (app.rootGraph ?? app.graph).nodes.filter((n) => n.type === 'SpeedLabAccelerate');
  app.canvas.deselectAll?.();
  if (number !== null) app.canvas.selectNode(nodes[number]);
}"""
SEND = """(state) => {
  const node = String((app.rootGraph ?? app.graph).nodes.find((n) => n.type === 'SpeedLabTune').id);
  app.api.dispatchCustomEvent('speedlab.tune', {node, workflow: (app.rootGraph ?? app.graph).id, ...state});
}"""


def workflow(accelerates: int) -> dict[str, Any]:
    """Tune behind a loader, with so many Accelerate nodes beside it."""
    graph = Graph()
    loaded = graph.add("SpeedLabCheckpointLoader", group="Load", ckpt_name=DEMO_CHECKPOINT)
    for number in range(accelerates):
        graph.add(
            "SpeedLabAccelerate", group="Load", title=f"Accelerate {number}", model=loaded["model"], preset="fast"
        )
    parts = {name: loaded[name] for name in ("model", "clip", "vae")}
    graph.add("SpeedLabTune", group="Measure", **parts, **SETTINGS)
    return to_ui(graph, name="tune", note="tune", extra={})


def point(plan: str, seconds: float, error: float, **more: Any) -> dict[str, Any]:
    return {"name": f"{plan} @ 2", "plan": plan, "set": {}, "s": seconds, "error": error, "best": False, "good": True,
            **more}  # fmt: skip


STATE = {
    "state": "running", "stock_s": 8.0, "floor": 0.1,
    "points": [
        point("deepcache(3)", 4.0, 0.05, best=True),
        point("tiny", 6.0, 0.0),
        point("deepcache(5)", 3.0, 0.3, good=False, set={"steps": 12}),
    ],
}  # fmt: skip


def click(canvas: Any, name: str | None) -> str:
    """Choose a point where one is named, then press the button; what the front says then."""
    # A click on a node selects it, so the front looks at the selection when the pointer comes.
    canvas.page.locator(".sl-panel:has(.sl-scatter)").dispatch_event("pointerenter")
    if name is not None:
        canvas.page.locator(f".sl-point[aria-label^='{name} @ 2']").dispatch_event("click")
    canvas.page.locator(".sl-panel .sl-primary").dispatch_event("click")
    return canvas.page.locator(".sl-panel [role=status]").text_content()


@screens("pinned-vue", full=("newest-classic",))
def test_a_plan_of_the_front_goes_to_accelerate(open_canvas: Any, vue: bool) -> None:
    canvas = open_canvas(**{"Comfy.VueNodes.Enabled": vue})
    canvas.drop(workflow(2), "tune")
    for number, one in enumerate(STATE["points"]):
        canvas.evaluate(SEND, {**STATE, "points": STATE["points"][: number + 1], "pictures": {one["name"]: PIXEL}})
    canvas.page.wait_for_function(f"() => {FRONT}?.dataset.points === '3'")
    if vue:
        assert canvas.page.locator("[data-node-id] .sl-scatter").count() == 1, "part of a node of the Vue renderer"
    dots = canvas.evaluate(f"() => [...{FRONT}.querySelectorAll('.sl-point')].map((d) => [...d.classList].at(-1))")
    assert dots == ["sl-best", "sl-good", "sl-far"]
    words = canvas.page.locator(".sl-panel .sl-notes").first
    assert words.text_content() == "deepcache(3) @ 2: 4.00 s (2.00 times as fast), error 0.0500"
    canvas.page.locator(".sl-point[aria-label^='tiny']").dispatch_event("pointerenter")
    assert words.text_content().startswith("tiny @ 2: 6.00 s (1.33 times as fast)")
    assert canvas.evaluate(f"() => {FRONT}.querySelector('img').src") == PIXEL
    canvas.page.locator(".sl-point[aria-label^='tiny']").dispatch_event("pointerleave")
    assert words.text_content().startswith("deepcache(3)")

    canvas.evaluate(SELECT, None)
    assert "select the one" in click(canvas, None)
    canvas.evaluate(SELECT, 1)
    assert click(canvas, None) == "Accelerate 1 has this plan now. "
    assert canvas.evaluate(PLANS) == [["fast", ""], ["custom", "deepcache(3)"]]
    canvas.evaluate(SELECT, 0)
    assert "Set steps 12 on the sampler" in click(canvas, "deepcache(5)")
    assert canvas.evaluate(PLANS) == [["custom", "deepcache(5)"], ["custom", "deepcache(3)"]]
    made = canvas.evaluate("async () => (await app.graphToPrompt()).output")
    sent = sorted(n["inputs"]["custom"] for n in made.values() if n["class_type"] == "SpeedLabAccelerate")
    assert sent == ["deepcache(3)", "deepcache(5)"]
    canvas.evaluate(SEND, {**STATE, "state": "cut", "pictures": {}})
    said = canvas.page.locator(".sl-panel [role=status]")
    assert "Cut off" in said.text_content()
    tiny = canvas.page.locator(".sl-point[aria-label^='tiny']")
    assert tiny.get_attribute("aria-label").endswith("(within the distance asked for)")
    tiny.focus()
    canvas.evaluate(SEND, {**STATE, "pictures": {}})
    assert said.text_content() == "", "it goes on"
    assert canvas.evaluate("() => document.activeElement.dataset.name") == "tiny @ 2", "the keyboard is where it was"
    assert serious(canvas, ".sl-panel") == []
    canvas.reload()
    canvas.page.wait_for_function(f"() => {FRONT}?.dataset.points === '3'", timeout=20_000)
    assert words.text_content().startswith("deepcache(3) @ 2: 4.00 s")
    assert canvas.evaluate(f"() => {FRONT}.querySelector('img').src") == PIXEL


@screens(full=("pinned-classic", "newest-vue"))
def test_a_tune_draws_while_it_runs_and_a_cancel_keeps_its_best(open_canvas: Any, vue: bool) -> None:
    canvas = open_canvas(**{"Comfy.VueNodes.Enabled": vue})
    canvas.drop(workflow(1), "tune")
    canvas.evaluate("async () => { await app.queuePrompt(0, 1); }")
    canvas.page.wait_for_function(f"() => Number({FRONT}?.dataset.points) >= 1", timeout=240_000)
    assert canvas.evaluate(f"() => {FRONT}.dataset.state") == "running"
    canvas.evaluate("async () => { await app.api.interrupt(); }")
    canvas.page.wait_for_function(f"() => {FRONT}.dataset.state !== 'running'", timeout=60_000)
    assert canvas.evaluate(f"() => {FRONT}.dataset.state") == "cut"
    assert canvas.evaluate(f"() => {FRONT}.querySelector('img').src").startswith("data:image/jpeg;base64,")
    assert click(canvas, None).startswith("Accelerate 0 has this plan now.")
    ((preset, plan),) = canvas.evaluate(PLANS)
    kept = [json.loads(path.read_text()) for path in (canvas.output / "speedlab" / "tuned").glob("*.json")]
    assert preset == "custom" and plan == kept[-1]["plan"]

    # It goes on where it stopped.
    canvas.evaluate("async () => { await app.queuePrompt(0, 1); }")
    canvas.page.wait_for_function(f"() => {FRONT}.dataset.state === 'done'", timeout=240_000)
    assert canvas.evaluate(f"() => {FRONT}.querySelectorAll('.sl-point.sl-best').length") == 1
