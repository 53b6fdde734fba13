"""The library of runs in the browser: thousands of them, by keyboard, several at once, and handed on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import SIDE, serious

pytestmark = pytest.mark.browser

MANY = 10_000
PANEL = "document.querySelector('.sl-panel')"


def made_up_id(number: int) -> str:
    """Later numbers are newer, and all are newer than what a test runs."""
    return f"20991231-{number // 3600:02d}{number // 60 % 60:02d}{number % 60:02d}-{number:08x}"


def write_run(folder: Path, number: int) -> Path:
    steps = [{"index": i, "sigma": 1.0, "gpu_ms": None, "cpu_ms": 50.0, "evals": 1, "cond_rows": 1, "uncond_rows": 1,
              "cached": False, "model": "base"} for i in range(4)]  # fmt: skip
    record = {
        "schema": 2, "run_id": made_up_id(number), "timestamp": "2099-12-31T10:00:00+0000", "status": "ok",
        "error": None, "env": {"device": "a GPU"}, "env_hash": "0", "steps": steps,
        "phases_ms": {"text_encode": 100.0, "sample": 200.0, "decode": 50.0, "total": 350.0 + number},
        "request": {"plan": f"plan|{number % 2}", "width": 512, "height": 768, "batch": 1, "sampler": "euler",
                    "scheduler": "normal", "steps": 4},
        "summary": {"steps": 4, "it_per_s": 20.0, "step_time_ms": 50.0},
        "memory": {"overall": {"peak_rss_gb": 1.5}}, "step_memory": {"peak_rss_gb": [1.0, 1.2, 1.5, 1.4]},
    }  # fmt: skip
    path = folder / f"{made_up_id(number)}.json"
    path.write_text(json.dumps(record))
    return path


@pytest.fixture
def made_up(server):
    """Write runs 0 to n - 1 beside those of other tests, and take them away again."""
    written: list[Path] = []

    def write(n: int) -> None:
        folder = server.base / "output" / "speedlab" / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        written.extend(write_run(folder, number) for number in range(n))

    yield write
    for path in written:
        path.unlink(missing_ok=True)


def open_sidebar(canvas: Any) -> Any:
    """The list, with the keyboard in it."""
    canvas.evaluate("() => app.extensionManager.command.execute('SpeedLab.ShowRuns')")
    canvas.page.wait_for_selector(".sl-tab .sl-row[data-run]", timeout=60_000)
    canvas.page.locator(".sl-list").focus()
    return canvas.page.locator(".sl-list")


def active(canvas: Any) -> str:
    return canvas.evaluate("() => document.querySelector('.sl-active')?.dataset.run")


def has_file(canvas: Any, number: int) -> bool:
    return (canvas.output / "speedlab" / "runs" / f"{made_up_id(number)}.json").is_file()


def has_row(canvas: Any, number: int) -> None:
    canvas.page.wait_for_selector(f".sl-row[data-run='{made_up_id(number)}']", timeout=60_000)


def test_ten_thousand_runs_are_a_few_elements_and_go_by_keyboard(open_canvas, made_up):
    canvas = open_canvas()
    made_up(MANY)
    page = canvas.page
    runs = open_sidebar(canvas)
    rows = "() => document.querySelectorAll('.sl-row').length"
    has_row(canvas, MANY - 1)
    files = json.loads(page.request.get(f"{canvas.url}/speedlab/runs?limit=1").text())["files"]
    assert files >= MANY
    # Every place has its height, so that the scroll bar reaches all of them, and only what is seen is there.
    assert canvas.evaluate("() => document.querySelector('.sl-list').scrollHeight") >= 62 * MANY
    assert 5 < canvas.evaluate(rows) < 60
    runs.press("ArrowDown")
    runs.press("ArrowDown")
    runs.press("ArrowUp")
    assert active(canvas) == made_up_id(MANY - 2)
    assert (
        canvas.evaluate("() => document.querySelector('.sl-list').getAttribute('aria-activedescendant')") == "sl-run-1"
    )
    for share in (0.5, 0.9):
        place = int(MANY * share)
        runs.evaluate("(list, top) => { list.scrollTop = top; }", 62 * place)
        has_row(canvas, MANY - 1 - place)
        assert canvas.evaluate(rows) < 60
    runs.press("Home")
    has_row(canvas, MANY - 1)
    assert canvas.evaluate("() => document.querySelector('.sl-list').scrollTop") == 0

    # Shift chooses from where one stands, Space and Ctrl one by one, Escape none.
    for _ in range(3):
        runs.press("Shift+ArrowDown")
    picked = "() => document.querySelectorAll('.sl-row[aria-selected=true]').length"
    assert canvas.evaluate(picked) == 4
    runs.press("Escape")
    assert canvas.evaluate(picked) == 0
    runs.press("Home")
    runs.press(" ")
    page.locator(f".sl-row[data-run='{made_up_id(MANY - 3)}']").click(modifiers=["Control"])
    assert canvas.evaluate(picked) == 2
    page.locator(f".sl-row[data-run='{made_up_id(MANY - 6)}']").click(modifiers=["Shift"])
    assert canvas.evaluate(picked) == 4

    canvas.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("[data-act=copy]").click()
    page.wait_for_function("() => document.querySelector('[data-act=copy]').textContent === 'Copied'")
    copied = canvas.evaluate("() => navigator.clipboard.readText()").splitlines()
    assert [line.split(" | ")[-1].strip(" |") for line in copied] == [made_up_id(MANY - n) for n in (3, 4, 5, 6)]
    assert copied[0].startswith("| 2099-12-31 10:00 | plan\\|1 | - | 512x768 x1 | 4 steps | euler/normal | 10.347 s |")

    page.locator("[data-act=over_time]").click()
    page.wait_for_selector(".sl-over-time")
    dots = "() => [...document.querySelectorAll('.sl-dots')].map((chart) => chart.querySelectorAll('path').length)"
    assert canvas.evaluate(dots) == [4, 4, 4], "text to image, speed and memory of four runs"
    cells = page.locator(".sl-over-time tbody tr").first.locator("td").all_text_contents()
    assert cells[0].endswith(" · plan|0")
    assert cells[1:] == ["10.3 s", "20.00 it/s", "1.50 GB"], "by date, the oldest first"
    assert serious(canvas, ".sl-over-time") == []
    page.keyboard.press("Escape")

    # Enter opens, Escape leads back to the same place.
    runs.press("Home")
    runs.press("End")
    runs.press("Home")
    runs.press("ArrowDown")
    runs.press("Enter")
    page.wait_for_selector(f".sl-detail[data-run='{made_up_id(MANY - 2)}']")
    assert page.locator(".sl-detail .sl-strip").get_attribute("aria-label") == "RAM a step: 1.00 GB \u2013 1.50 GB"
    page.wait_for_function("() => document.querySelector('[data-act=workflow]').title.includes('saved none')")
    assert page.locator("[data-act=workflow]").is_disabled()
    page.keyboard.press("Escape")
    assert canvas.evaluate("() => document.activeElement.className") == "sl-list"
    has_row(canvas, MANY - 2)
    assert active(canvas) == made_up_id(MANY - 2)

    # Delete asks; the answer no keeps, and neither reaches the nodes that are chosen on the canvas.
    canvas.evaluate("() => app.canvas.selectItems?.(app.graph.nodes) ?? app.canvas.selectNodes(app.graph.nodes)")
    nodes = canvas.evaluate("() => app.graph.nodes.length")
    assert nodes > 0
    runs.press("Escape")
    runs.press("Delete")
    file = canvas.output / "speedlab" / "runs" / f"{made_up_id(MANY - 2)}.json"
    page.keyboard.press("Escape")
    assert file.is_file() and canvas.evaluate("() => document.activeElement.className") == "sl-list"
    assert canvas.evaluate(picked) == 0, "a question that is answered with no chooses nothing"
    # Asked about one run, left, and asked about the next: that one it is.
    runs.press("ArrowDown")
    runs.press("Delete")
    runs.focus()
    runs.press("ArrowUp")
    runs.press("Delete")
    # A prompt that ends has the list read again; the question stays.
    canvas.evaluate("() => app.api.dispatchCustomEvent('execution_success', {})")
    page.wait_for_timeout(1000)
    page.keyboard.press("Enter")
    page.wait_for_function(f"() => !document.querySelector(`.sl-row[data-run='{made_up_id(MANY - 2)}']`)")
    assert not file.exists() and has_file(canvas, MANY - 3)
    assert canvas.evaluate("() => app.graph.nodes.length") == nodes
    # Sent to the list alone: ComfyUI would queue what is on the canvas, and keep the next test waiting.
    runs.evaluate("(list) => list.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', ctrlKey: true}))")
    page.wait_for_timeout(300)
    assert page.locator(".sl-detail").count() == 0, "ComfyUI's own key, which queues"

    # A filter leaves what matches, wherever it stands.
    page.locator(".sl-filter").fill("plan|0")
    plans = "[...document.querySelectorAll('.sl-plan')].map((plan) => plan.title)"
    page.wait_for_function(f"() => {plans}.length > 5 && {plans}.every((plan) => plan === 'plan|0')")


FOCUS = """() => {
  const style = getComputedStyle(document.activeElement.querySelector(".sl-active") ?? document.activeElement);
  return style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
}"""


@pytest.mark.parametrize(
    ("server", "palette"),
    [("pinned", "dark"), pytest.param("newest", "light", marks=pytest.mark.full)],
    indirect=["server"],
)  # fmt: skip
def test_a_run_is_handed_on_opened_again_and_compared_below(open_canvas, small, made_up, palette):
    canvas = open_canvas(**{"Comfy.ColorPalette": palette})
    page = canvas.page
    workflow = small(steps=3, seed=71 + (palette == "light"))
    # Core's nodes encode and decode: their times come from ComfyUI's progress. A text of its own for each of them, as
    # ComfyUI answers the second of two nodes that are given the same from its cache.
    for node in workflow["nodes"]:
        if node["type"] == "SpeedLabTextEncode":
            node["type"] = "CLIPTextEncode"
            node["widgets_values"] = [f"{palette} field {node['id']}"]
    canvas.drop(workflow, "small")
    canvas.queue()
    run = canvas.evaluate(f"() => {PANEL}.dataset.run")
    record = json.loads((canvas.output / "speedlab" / "runs" / f"{run}.json").read_text())
    assert record["phases_ms"]["total"] > record["phases_ms"]["core_text_encode"] > 0
    peaks = record["step_memory"]["peak_rss_gb"]
    strip = page.locator(".sl-panel .sl-strip").get_attribute("aria-label")
    assert strip.startswith("RAM a step: ") and f"{max(peaks):.2f} GB" in strip
    assert "estimated" in page.locator(".sl-panel .sl-phases").text_content()
    assert serious(canvas, ".sl-panel") == []

    made_up(2)
    runs = open_sidebar(canvas)
    runs.press("ArrowDown")
    assert canvas.evaluate(FOCUS), "the row with the keyboard is marked"
    page.wait_for_function(f"() => document.querySelector(`[data-run='{run}'] .sl-thumb`)?.naturalWidth === {SIDE}")
    assert page.locator(f".sl-row[data-run='{made_up_id(0)}'] .sl-thumb").count() == 0, "it saved no image"
    page.locator(f".sl-row[data-run='{run}'] .sl-mark").click()
    page.locator(f".sl-row[data-run='{made_up_id(0)}'] .sl-mark").click()
    assert serious(canvas, ".sl-tab") == []
    page.locator(f".sl-row[data-run='{run}'] .sl-plan").click()
    page.wait_for_selector(f".sl-detail[data-run='{run}']")
    page.wait_for_function("() => !document.querySelector('[data-act=workflow]').disabled")
    page.keyboard.press("Tab")
    assert canvas.evaluate(FOCUS), "and so is what Tab leads to"
    assert serious(canvas, ".sl-tab") == []

    # The page of the run, opened from a disk, without anything else.
    with page.expect_download() as download:
        page.locator("[data-act=page]").click()
    file = canvas.output / f"{run}-{palette}.html"
    download.value.save_as(file)
    alone = page.context.new_page()
    asked: list[str] = []
    alone.on("request", lambda request: asked.append(request.url))
    alone.goto(file.as_uri())
    assert alone.evaluate("() => document.images[0].naturalWidth") == SIDE
    assert [url for url in asked if not url.startswith(("data:", file.as_uri()))] == []
    assert alone.locator("rect").count() == 3 and alone.locator("polyline").count() == 1
    total = f"{record['phases_ms']['total']:.1f}"
    assert total in alone.locator("table").first.text_content()
    alone.close()

    # The workflow comes back as another one's tab, as it was queued.
    canvas.evaluate("() => app.graph.clear()")
    page.locator("[data-act=workflow]").click()
    page.wait_for_function("() => (app.rootGraph ?? app.graph).nodes.length > 3", timeout=60_000)
    again = canvas.evaluate("() => (app.rootGraph ?? app.graph).serialize()")
    assert {(n["id"], n["type"]) for n in again["nodes"]} == {(n["id"], n["type"]) for n in workflow["nodes"]}
    assert again["id"] != workflow["id"], "a tab of its own"
    page.wait_for_function(f"() => {PANEL}?.dataset.run === '{run}'")

    # The same comparison as a tab of the bottom panel, with the two that are chosen.
    canvas.evaluate("() => app.extensionManager.command.execute('Workspace.ToggleBottomPanelTab.speedlab-compare')")
    page.wait_for_selector(".sl-bottom .sl-compare", timeout=60_000)
    chosen = canvas.evaluate("() => [...document.querySelectorAll('.sl-bottom select')].map((one) => one.value)")
    assert chosen == sorted([run, made_up_id(0)])
    assert "from text to image" in page.locator(".sl-bottom .sl-verdict").text_content()
    assert serious(canvas, ".sl-bottom") == []
    page.locator(".sl-bottom select").first.select_option(made_up_id(1))
    page.wait_for_function(
        "(id) => document.querySelector(`.sl-bottom .sl-pair span[data-run='${id}']`)", arg=made_up_id(1)
    )


def test_the_plain_case_is_one_screen_where_the_frontend_has_an_app_mode(open_canvas, small):
    canvas = open_canvas(**{"Comfy.VueNodes.Enabled": True})
    page = canvas.page
    workflow = small(steps=3, seed=91)
    canvas.drop(workflow, "small")
    screen = workflow["extra"]["linearData"]
    kept = canvas.evaluate("() => (app.rootGraph ?? app.graph).serialize().extra.linearData")
    assert kept == screen, "also where nothing reads it"
    version = canvas.evaluate("() => window.__COMFYUI_FRONTEND_VERSION__ ?? '0'")
    if tuple(map(int, version.split(".")[:2])) < (1, 49):
        return
    canvas.evaluate("() => app.extensionManager.command.execute('Comfy.ToggleLinear')")
    page.wait_for_selector("[data-testid=app-mode-widget-item] .sl-panel", timeout=60_000)
    assert page.locator("[data-testid=app-mode-widget-item]").count() == len(screen["inputs"])
    labels = page.locator("[data-testid=builder-widget-label]").all_text_contents()
    assert {"Prompt", "Negative", "Chart", "preset"} <= set(labels)
    canvas.queue()
    assert canvas.evaluate(f"() => {PANEL}.querySelectorAll('.sl-bar').length") == 3
    canvas.shot("app")
