"""What a person does with SpeedLab in ComfyUI's real frontend: drop a workflow, queue it, watch, look back, compare."""

from __future__ import annotations

import json
import time
from decimal import ROUND_HALF_UP, Decimal

import pytest

from speedlab_tools.host import pack_root
from speedlab_tools.scenarios.blueprints import BLUEPRINTS, blueprint_ui
from speedlab_tools.scenarios.catalog import TEMPLATES

from .conftest import OUTSIDE, SIDE, screens, serious

pytestmark = pytest.mark.browser

PANEL = "document.querySelector('.sl-panel')"
SIDEBAR_OPEN = ".sl-tab"


def open_sidebar(canvas) -> None:
    canvas.evaluate("() => app.extensionManager.command.execute('SpeedLab.ShowRuns')")
    canvas.page.wait_for_selector(f"{SIDEBAR_OPEN} .sl-row[data-run]", timeout=20_000)


def has_chart(template: str) -> bool:
    """Whether the image of a template is a chart of figures, which it keeps as a comment, and not of its graph."""
    from PIL import Image

    with Image.open(pack_root() / "workflows" / f"{template}.jpg") as image:
        return "comment" in image.info


def live_steps(seen: list[str]) -> list[int]:
    return [int(entry.split()[1]) for entry in seen if entry.startswith("running")]


def fit(canvas, zoom: float = 1.0, node_type: str = "SpeedLabProfileSampler") -> None:
    """Bring the sampler into the middle of the canvas."""
    canvas.evaluate(
        """([kind, zoom]) => {
          const node = (app.canvas.graph ?? app.graph).nodes.find((n) => n.type === kind);
          const view = app.canvas.canvas.getBoundingClientRect();
          app.canvas.ds.scale = zoom;
          app.canvas.ds.offset = [view.width / zoom / 2 - node.pos[0] - node.size[0] / 2 + 60,
                                  view.height / zoom / 2 - node.pos[1] - node.size[1] / 2];
          app.canvas.setDirty(true, true);
        }""",
        [node_type, zoom],
    )
    canvas.page.wait_for_timeout(600)


@pytest.mark.parametrize("templates", [True, pytest.param(False, marks=pytest.mark.full)], ids=["templates", "others"])
def test_every_shipped_workflow_drops_in_and_becomes_its_api_file(open_canvas, workflows, templates, request):
    """On the newest frontend each node once: all templates, and of the others what has a node that no other had."""
    canvas = open_canvas()
    newest = request.node.callspec.params["server"] == "newest"
    seen = {node["class_type"] for name in TEMPLATES for node in workflows[name][1].values()}
    for name, (ui, api) in workflows.items():
        if (name in TEMPLATES) is not templates:
            continue
        kinds = {node["class_type"] for node in api.values()}
        if newest and not templates and kinds <= seen:
            continue
        seen |= kinds
        canvas.drop(ui, name)
        # Not `has_errors`: the newest frontend also marks a loader whose file this server lacks.
        unknown = canvas.evaluate(
            "() => (app.rootGraph ?? app.graph).nodes.map((n) => n.type)"
            ".filter((type) => !LiteGraph.registered_node_types[type])"
        )
        assert unknown == [], name
        assert not templates or canvas.evaluate(OUTSIDE) == [], name
        if templates and not newest and not has_chart(TEMPLATES[name]):
            canvas.template_image(TEMPLATES[name])
        made = canvas.evaluate("async () => (await app.graphToPrompt()).output")
        for node in (*made.values(), *api.values()):
            node["_meta"].pop("speedlab", None)
            node["_meta"].pop("cnr_id", None)  # newer frontends say which pack a node came from
        assert made == api, name


def test_a_model_that_is_missing_can_be_fetched(open_canvas, workflows):
    """ComfyUI's own dialog names each file that the workflow's loaders want, and where it is published. One of these
    two has another name there."""
    canvas = open_canvas()
    canvas.offer()
    workflow, _ = workflows["sdxl-few-steps"]
    canvas.drop(workflow, "few-steps")
    named = [model for node in workflow["nodes"] for model in node["properties"].get("models", [])]
    models = {model["name"]: model["url"] for model in named}
    assert len(models) == 2 and sum(url.endswith(name) for name, url in models.items()) == 1
    for name in models:
        # The canvas is no text of the page: this is the dialog's.
        canvas.page.wait_for_function("(name) => document.body.innerText.includes(name)", arg=name, timeout=20_000)
    deadline = time.monotonic() + 20
    while not canvas.offered >= set(models.values()) and time.monotonic() < deadline:
        canvas.page.wait_for_timeout(200)
    assert canvas.offered >= set(models.values()), "beside those of the workflow that ComfyUI opens with"


BLUEPRINT = """async () => {
  const graph = app.rootGraph ?? app.graph, node = graph.nodes[0];
  const shown = Object.fromEntries(node.widgets.map((widget) => [widget.name, widget.value]));
  const preview = LiteGraph.createNode("PreviewImage");
  graph.add(preview);
  node.connect(0, preview, 0);
  return [shown, (await app.graphToPrompt()).output];
}"""


def test_a_blueprint_has_its_settings_on_its_face(open_canvas):
    canvas = open_canvas()
    for blueprint in BLUEPRINTS:
        canvas.drop(blueprint_ui(blueprint), blueprint.name)
        shown, made = canvas.evaluate(BLUEPRINT)
        api = blueprint.graph.to_api()
        for one in blueprint.promoted:
            assert shown[one.name] == api[str(one.node.id)]["inputs"][one.input], one.name
        # Newer frontends give the inner nodes other ids.
        inside = {node["_meta"]["title"]: node for key, node in made.items() if ":" in key}
        for node in api.values():
            wanted = {name: value for name, value in node["inputs"].items() if not isinstance(value, list)}
            now = inside[node["_meta"]["title"]]
            assert now["class_type"] == node["class_type"]
            assert {name: now["inputs"][name] for name in wanted} == wanted


SEND_LIVE = """(queued) => {
  const node = String(app.graph.nodes.find((n) => n.type === 'SpeedLabProfileSampler').id);
  app.api.dispatchCustomEvent('speedlab.step', {
    node, run_id: `live-${queued}`, run: 0, runs: 1, warmup: 0, total: 4, first: 0, steps: [[500, 2]], state: 'running',
    summary: { steps: 1, step_time_ms: 500, it_per_s: 2 }, queued,
  });
}"""


def record_of(canvas, run_id: str) -> dict:
    return json.loads((canvas.output / "speedlab" / "runs" / f"{run_id}.json").read_text())


def fixed(value: float, digits: int) -> str:
    """JavaScript's toFixed: the larger of two equally near, where Python takes the even one."""
    return str(Decimal(value).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def rate(record: dict) -> str:
    per_s = record["summary"]["it_per_s"]
    return f"{fixed(per_s, 2)} it/s" if per_s >= 1 else f"{fixed(1 / per_s, 2)} s/it"


def duration(ms: float) -> str:
    return f"{fixed(ms, 0)} ms" if ms < 1000 else f"{fixed(ms / 1000, 2 if ms < 10_000 else 1)} s"


def verdict(a: dict, b: dict) -> str:
    """What the sidebar has to say: the whole time decides, and sampling is a share of it."""
    before, after = (run["phases_ms"]["total"] for run in (a, b))
    assert min(before, after) > 100
    shares = [round(100 * run["phases_ms"]["sample"] / run["phases_ms"]["total"]) for run in (a, b)]
    ratio = (
        f"{fixed(before / after, 2)} times as fast" if after <= before else f"{fixed(after / before, 2)} times as long"
    )
    return (
        f"B {'is' if after <= before else 'takes'} {ratio} as A from text to image ({duration(after)} against "
        f"{duration(before)}). Sampling is {shares[0]} % of A and {shares[1]} % of B."
    )


def test_a_run_is_shown_live_kept_listed_and_compared(open_canvas, small):
    """The whole way in the classic renderer on the dark theme."""
    canvas = open_canvas()
    # A text of its own: one that the prompt before had would come from the cache, and no whole time with it.
    canvas.drop(small(steps=6, text="the whole way"), "small")
    steps = live_steps(canvas.queue())
    assert steps == sorted(steps) and len(set(steps)) >= 3, f"the chart did not grow: {steps}"
    first = canvas.evaluate(f"() => {PANEL}.dataset.run")
    assert canvas.evaluate(f"() => {PANEL}.querySelectorAll('.sl-bar').length") == 6
    told = record_of(canvas, first)
    assert canvas.evaluate(f"() => {PANEL}.querySelector('.sl-figure').textContent") == rate(told)
    sampling_s = told["phases_ms"]["sample"] / 1000
    assert told["summary"]["steps"] / told["summary"]["it_per_s"] == pytest.approx(sampling_s, rel=0.01)
    assert canvas.evaluate(f"() => {PANEL}.querySelectorAll('.sl-stack i').length") >= 2
    fit(canvas, 1.15)
    canvas.shot("node-dark")

    box = canvas.page.locator(".sl-panel .sl-bar").nth(2).bounding_box()
    canvas.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = canvas.page.locator(".sl-panel .sl-tip").text_content()
    assert tip.startswith("Step 3 ·") and tip.endswith("· 1 evaluation, 1+1 rows")

    saved = json.loads(canvas.evaluate("() => JSON.stringify((app.rootGraph ?? app.graph).serialize())"))
    node = next(n for n in saved["nodes"] if n["type"] == "SpeedLabProfileSampler")
    assert node["properties"]["speedlab_run"] == first
    assert "phases_ms" not in str(saved), "a saved workflow keeps the run's id, not the run"

    canvas.evaluate("() => { app.graph.nodes.find((n) => n.type === 'SpeedLabProfileSampler').widgets[0].value = 5; }")
    # Another text, so that its encoding is part of the time and not of the cache.
    canvas.evaluate(
        "() => app.graph.nodes.filter((n) => n.type.includes('Encode')).forEach((n) => { n.widgets[0].value += ' 2'; })"
    )
    canvas.queue()
    second = canvas.evaluate(f"() => {PANEL}.dataset.run")
    # An undo, or a way to another tab and back: the workflow as it was before the run.
    canvas.evaluate("(graph) => app.loadGraphData(graph)", saved)
    canvas.page.wait_for_function(f"(run) => {PANEL}?.dataset.run === run", arg=second, timeout=20_000)
    open_sidebar(canvas)
    listed = canvas.evaluate("() => [...document.querySelectorAll('.sl-row')].map((row) => row.dataset.run)")
    assert listed[:2] == [second, first]
    when = canvas.page.locator(f".sl-row[data-run='{second}'] .sl-sub").text_content()
    assert when.startswith(canvas.evaluate(DAY, record_of(canvas, second)["timestamp"])), "today's runs have a date"
    assert canvas.evaluate(PLACEHOLDER), "the filter's hint is not cut off"
    canvas.shot("sidebar")
    figures = (
        "(id) => [...document.querySelectorAll(`.sl-row[data-run='${id}'] .sl-numbers > *`)].map((e) => e.textContent)"
    )
    for run_id in (second, first):
        its = record_of(canvas, run_id)
        assert canvas.evaluate(figures, run_id)[:2] == [rate(its), duration(its["phases_ms"]["total"])]
    # A run whose whole time is not known shows the sampling's, by name; steps taken are not always those asked for.
    file = canvas.output / "speedlab" / "runs" / f"{first}.json"
    known = file.read_text()
    its = json.loads(known)
    its["phases_ms"]["total"], its["request"]["steps"] = None, 9
    file.write_text(json.dumps(its))
    canvas.page.locator(".sl-tools .pi-refresh").click()
    canvas.page.wait_for_function(f"() => ({figures})('{first}')[1]?.startsWith('Sampling')")
    assert canvas.evaluate(figures, first)[1] == f"Sampling {duration(its['phases_ms']['sample'])}"
    assert "6 steps (9 asked for)" in canvas.page.locator(f".sl-row[data-run='{first}'] .sl-sub").text_content()
    file.write_text(known)

    # As in a benchmark's record: the spread of all samplings is no second sampling time.
    file = canvas.output / "speedlab" / "runs" / f"{second}.json"
    data = json.loads(file.read_text())
    data["summary"]["run"]["median"] *= 3
    file.write_text(json.dumps(data))
    for row in (0, 1):
        canvas.page.locator(".sl-row .sl-mark").nth(row).click()
    canvas.page.locator("[data-act=compare]").click()
    compared = canvas.page.locator(".sl-compare")
    compared.wait_for()
    assert compared.locator(".sl-chart").count() == 2
    pixels = "[...document.querySelectorAll('.sl-compare img')].map((one) => one.naturalWidth).join()"
    canvas.page.wait_for_function(f"() => {pixels} === '{SIDE},{SIDE},{SIDE},{SIDE}'")
    slider, over = compared.get_by_label("A over B"), compared.locator(".sl-over img").nth(1)
    assert over.get_attribute("alt") == "A" and "50%" in over.get_attribute("style")
    slider.press("Home")
    slider.press("ArrowRight")
    assert "99%" in over.get_attribute("style"), "one part of a hundred of A"
    assert serious(canvas, ".sl-compare") == []
    assert "seed" in compared.locator(".sl-differences").text_content()
    assert compared.locator(".sl-verdict").text_content() == verdict(told, record_of(canvas, second))
    canvas.shot("compare")
    canvas.page.locator("[data-act=back]").click()

    canvas.page.locator(f".sl-row[data-run='{second}'] .sl-plan").click()
    detail = canvas.page.locator(f".sl-detail[data-run='{second}']")
    detail.wait_for()
    picture = detail.locator(".sl-pictures img").first
    picture.scroll_into_view_if_needed()
    canvas.page.wait_for_function(f"() => document.querySelector('.sl-pictures img')?.naturalWidth === {SIDE}")
    canvas.shot("detail")
    assert canvas.evaluate(GAP) >= 4, "the arrow stands apart from the words"
    detail.locator("summary").click()
    detail.locator("details td").first.wait_for()
    assert canvas.evaluate(LINES, "accelerators") == 1, "a word of a setting's name is whole"
    record = canvas.output / "speedlab" / "runs" / f"{second}.json"
    detail.locator("[data-act=delete]").click()
    assert record.is_file(), "the first click only asks"
    detail.locator("[data-act=yes]").click()
    canvas.page.locator(f".sl-row[data-run='{first}']").wait_for()
    canvas.page.locator(f".sl-row[data-run='{second}']").wait_for(state="detached")
    assert not record.exists()

    canvas.page.locator(".sl-filter").fill("no such plan")
    canvas.page.wait_for_function("() => !document.querySelector('.sl-row')")
    canvas.page.locator(".sl-filter").fill(f"{SIDE}x{SIDE} stock")
    canvas.page.locator(f".sl-row[data-run='{first}']").wait_for()

    # What a run on a GPU sends: host times, which are no measured ones.
    for queued, words in ((True, "2.00 it/s (queued)"), (False, "2.00 it/s")):
        canvas.evaluate(SEND_LIVE, queued)
        assert canvas.evaluate(f"() => {PANEL}.querySelector('.sl-figure').textContent") == words


RESULT = """(run_id) => {
  const {id, nodes} = app.rootGraph ?? app.graph, of = (kind) => nodes.find((one) => one.type === kind);
  const node = String(of("SpeedLabProfileSampler").id), total = 2;
  const live = {node, workflow: id, run_id, run: 0, runs: 1, warmup: 0, total, summary: {}, queued: false};
  app.api.dispatchCustomEvent("speedlab.step", {...live, first: 0, steps: [[500, 2]], state: "running"});
  const steps = [0, 1].map((index) => ({index, cpu_ms: 500, evals: 1, cond_rows: 1, uncond_rows: 1}));
  const speedlab = [{run_id, workflow: id, status: "ok", plan: "late", steps, summary: {}, warnings: ["Late."]}];
  app.api.dispatchCustomEvent("executed", {node, display_node: node, output: {text: [""], speedlab}});
  app.api.dispatchCustomEvent("speedlab.step", {...live, first: 1, steps: [[500, 2]], state: "ok"});
}"""
CELLS = """(run_id) => {
  const node = String(app.graph.nodes.find((one) => one.type === "SpeedLabProfileSampler").id);
  const speedlab = [{run_id, status: "ok", plan: "a cell", cell: "x"}];
  const output = {text: ["of another workflow"], speedlab, speedlab_workflow: ["another"]};
  app.api.dispatchCustomEvent("executed", {node, display_node: node, output});
}"""


def test_a_result_that_overtakes_the_last_step_ends_the_live_chart(open_canvas, small):
    """Also where the workflow is loaded again, as an undo and another tab do; cells of a Benchmark are no profile."""
    canvas = open_canvas()
    canvas.drop(small(seed=51), "small")
    run = "20990101-000000-000000aa"
    for happened in ("result", "undo", "cells"):
        if happened == "result":
            canvas.evaluate(RESULT, run)
        elif happened == "undo":
            canvas.evaluate("() => app.loadGraphData((app.rootGraph ?? app.graph).serialize())")
            canvas.page.wait_for_function(f"() => {PANEL}?.dataset.state", timeout=20_000)
        else:
            canvas.evaluate(CELLS, "20990101-000000-000000bb")
        shown = canvas.evaluate(f"() => ({{...{PANEL}.dataset}})")
        assert (shown["run"], shown["state"], shown["steps"]) == (run, "ok", "2")
    assert "Late." in canvas.page.locator(".sl-panel .sl-notes").text_content()


DAY = """(text) =>
  new Date(text.replace(/([+-]\\d\\d)(\\d\\d)$/, "$1:$2")).toLocaleDateString([], {dateStyle: "short"}) + ", "
"""
PLACEHOLDER = """() => {
  const input = document.querySelector(".sl-filter"), style = getComputedStyle(input);
  const pen = document.createElement("canvas").getContext("2d");
  pen.font = `${style.fontSize} ${style.fontFamily}`;
  const room = input.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
  return pen.measureText(input.placeholder).width <= room;
}"""
GAP = """() => {
  const button = document.querySelector("[data-act=back]"), words = document.createRange();
  words.selectNodeContents(button.lastChild);
  return words.getBoundingClientRect().left - button.firstChild.getBoundingClientRect().right;
}"""
LINES = """(name) => {
  const cell = [...document.querySelectorAll(".sl-detail details td")].find((one) => one.textContent === name);
  const words = document.createRange();
  words.selectNodeContents(cell);
  return new Set([...words.getClientRects()].filter((box) => box.width).map((box) => Math.round(box.top))).size;
}"""
# Where the sampler lies on the screen, and the panel on it.
PLACES = """() => {
  const node = app.graph.nodes.find((one) => one.type === "SpeedLabProfileSampler");
  const view = app.canvas.canvas.getBoundingClientRect(), {scale, offset} = app.canvas.ds;
  const panel = document.querySelector(".sl-panel").getBoundingClientRect();
  const left = view.left + (node.pos[0] + offset[0]) * scale, top = view.top + (node.pos[1] + offset[1]) * scale;
  return {node: [left, top, left + node.size[0] * scale, top + node.size[1] * scale],
          panel: [panel.left, panel.top, panel.right, panel.bottom]};
}"""


# The record comes when ComfyUI has drawn all and waits for somebody to touch the canvas.
LATE = """(() => {
  const real = window.fetch;
  window.fetch = async (asked, ...rest) => {
    if (String(asked.url ?? asked).includes("/speedlab/runs/")) await new Promise((done) => setTimeout(done, 2000));
    return real(asked, ...rest);
  };
})()"""


@screens("pinned-vue", full=("pinned-classic", "newest-classic", "newest-vue"))
def test_a_page_that_is_loaded_again_shows_the_last_run_in_its_place(open_canvas, small, vue):
    """ComfyUI keeps a workflow as it was when somebody last touched it; a run since then changed nothing of that."""
    canvas = open_canvas(**{"Comfy.VueNodes.Enabled": vue})
    canvas.drop(small(seed=61 + vue), "small")
    canvas.queue()
    run = canvas.evaluate(f"() => {PANEL}.dataset.run")
    canvas.page.add_init_script(LATE)
    for touched in (False, False, True):
        if touched:
            fit(canvas)
            canvas.evaluate("() => { app.graph.nodes.find((n) => n.type === 'SpeedLabProfileReport').pos[0] += 40; }")
            canvas.page.mouse.click(700, 120)
        canvas.reload()
        canvas.page.wait_for_function(f"(run) => {PANEL}?.dataset.run === run", arg=run, timeout=20_000)
        canvas.page.wait_for_timeout(1000)
        places = canvas.evaluate(PLACES)
        node, panel = places["node"], places["panel"]
        assert panel[2] - panel[0] >= 0.8 * (node[2] - node[0]), f"as wide as its node: {places}"
        edge = 3
        assert panel[0] >= node[0] - edge and panel[2] <= node[2] + edge, f"on its node: {places}"
        assert panel[1] >= node[1] - edge, f"on its node: {places}"
        assert canvas.evaluate(f"() => {PANEL}.querySelectorAll('.sl-bar').length") == 4


def test_the_vue_renderer_on_the_light_theme_and_a_reload(open_canvas, small):
    canvas = open_canvas(**{"Comfy.VueNodes.Enabled": True, "Comfy.ColorPalette": "light"})
    canvas.drop(small(seed=11), "small")
    canvas.page.wait_for_selector("[data-node-id]", timeout=20_000)
    steps = live_steps(canvas.queue())
    assert len(set(steps)) >= 2, f"the chart did not grow: {steps}"
    inside = canvas.page.locator("[data-node-id] .sl-panel")
    assert inside.count() == 1, "the panel is part of a node of the Vue renderer"
    box = inside.bounding_box()
    assert box["width"] > 150 and box["height"] > 150
    fit(canvas, 1.0)
    canvas.shot("node-light")
    run = canvas.evaluate(f"() => {PANEL}.dataset.run")

    workflow = canvas.evaluate("() => (app.rootGraph ?? app.graph).serialize()")
    canvas.open()
    canvas.drop(workflow, "again")
    canvas.page.wait_for_function(f"(run) => {PANEL}?.dataset.run === run", arg=run, timeout=20_000)
    assert canvas.evaluate(f"() => {PANEL}.querySelectorAll('.sl-bar').length") == 4


def test_a_sampler_inside_a_subgraph_and_a_second_one_beside_it(open_canvas, small):
    """Both samplers show their own run; the inner one has an id such as 12:5."""
    canvas = open_canvas()
    canvas.drop(small(steps=2, seed=21), "small")
    canvas.evaluate(
        """() => {
          const graph = app.rootGraph ?? app.graph;
          const sampler = graph.nodes.find((n) => n.type === "SpeedLabProfileSampler");
          const loader = graph.nodes.find((n) => n.type === "SpeedLabCheckpointLoader");
          const other = LiteGraph.createNode("SpeedLabProfileSampler");
          graph.add(other);
          sampler.inputs.forEach((input, slot) => {
            const link = graph.links.get?.(input.link) ?? graph.links[input.link];
            if (link) graph.getNodeById(link.origin_id).connect(link.origin_slot, other, slot);
          });
          other.widgets.find((w) => w.name === "steps").value = 3;
          const report = LiteGraph.createNode("SpeedLabProfileReport");
          graph.add(report);
          other.connect(1, report, 0);
          graph.convertToSubgraph(new Set([sampler]));
          window.slOther = other;
        }"""
    )
    ids = canvas.evaluate("async () => Object.keys((await app.graphToPrompt()).output)")
    assert any(":" in node_id for node_id in ids), ids
    canvas.queue()
    shown = canvas.evaluate(
        """() => {
          const outer = (app.rootGraph ?? app.graph).nodes.find((n) => n.subgraph);
          const inner = outer.subgraph.nodes.find((n) => n.type === "SpeedLabProfileSampler");
          const panel = (node) => node.widgets.find((w) => w.name === "speedlab_profile")?.element.dataset;
          return [{...panel(inner)}, {...panel(window.slOther)}];
        }"""
    )
    assert [entry["steps"] for entry in shown] == ["2", "3"]
    assert shown[0]["run"] != shown[1]["run"]
    assert [entry["state"] for entry in shown] == ["ok", "ok"]


def test_in_chinese_with_the_live_chart_off_and_one_run_kept(open_canvas, small):
    canvas = open_canvas(**{"Comfy.Locale": "zh", "SpeedLab.LiveChart": False, "SpeedLab.KeepRuns": 1})
    canvas.evaluate(
        "() => { window.slEvents = 0; app.api.addEventListener('speedlab.step', () => (window.slEvents += 1)); }"
    )
    canvas.drop(small(steps=2, seed=31), "small")
    canvas.queue()
    assert canvas.evaluate("() => window.slEvents") == 0
    assert canvas.evaluate(f"() => {PANEL}.querySelectorAll('.sl-bar').length") == 2
    assert "中位数" in canvas.evaluate(f"() => {PANEL}.textContent") or "采样" in canvas.evaluate(
        f"() => {PANEL}.textContent"
    )
    canvas.page.wait_for_function(
        "async () => (await (await app.api.fetchApi('/speedlab/runs')).json()).runs.length === 1", timeout=20_000
    )


def test_a_warning_under_the_chart_is_read_whole_on_the_smallest_node(open_canvas, small):
    """In the classic renderer, where a node has the height that it is given; made as small as dragging makes it."""
    canvas = open_canvas()
    canvas.drop(small(steps=2, seed=41), "small")
    canvas.queue()
    shrink = """() => {
      const node = app.graph.nodes.find((n) => n.type === "SpeedLabProfileSampler");
      node.setSize(node.computeSize());
      node.setDirtyCanvas(true, true);
    }"""
    canvas.evaluate(shrink)
    # The same texts again: their encoding comes from the cache, and a warning says what that means for the time.
    canvas.evaluate("() => { app.graph.nodes.find((n) => n.type === 'SpeedLabProfileSampler').widgets[0].value = 42; }")
    canvas.queue()
    fit(canvas)
    assert "in its cache" in canvas.page.locator(".sl-panel .sl-notes").text_content()
    for again in (False, True):
        if again:
            canvas.evaluate(shrink)
            canvas.page.wait_for_timeout(600)
        notes = canvas.page.locator(".sl-panel .sl-notes").bounding_box()
        panel = canvas.page.locator(".sl-panel").bounding_box()
        assert notes["height"] > 20, "the warning takes more than a line"
        assert notes["y"] + notes["height"] <= panel["y"] + panel["height"], "the warning ends below the panel"
        assert canvas.evaluate(f"() => {PANEL}.scrollHeight <= {PANEL}.clientHeight"), "nothing is left to scroll to"
        top, height, whole = canvas.evaluate(
            """() => {
              const node = app.graph.nodes.find((n) => n.type === "SpeedLabProfileSampler");
              const widget = node.widgets.find((w) => w.name === "speedlab_profile");
              return [widget.y, widget.element.offsetHeight, node.size[1]];
            }"""
        )
        assert top + height <= whole, "the panel reaches out of its node"
        assert canvas.page.locator(".sl-panel .sl-plot").bounding_box()["height"] >= 60
    canvas.reload()
    canvas.page.wait_for_selector(".sl-panel .sl-bar", timeout=20_000)
    assert "in its cache" in canvas.page.locator(".sl-panel .sl-notes").text_content(), "of the record too"
