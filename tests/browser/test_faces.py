"""What measuring nodes and subgraphs show on themselves, and whether they stay in the group that they are drawn in."""

from __future__ import annotations

import json

import pytest

from speedlab_tools.scenarios.blueprints import BLUEPRINTS, blueprint_ui

from .conftest import DEMO_CHECKPOINT, OUTSIDE, SIDE, screens, serious

pytestmark = pytest.mark.browser
PALETTES = {False: "dark", True: "light"}

# A node's face by its class, and what text is drawn in it at the zoom of 1.
FACE = """(kind) => {
  const node = app.graph.nodes.find((one) => one.type === kind);
  return node.widgets.find((one) => one.name === "speedlab_text")?.element;
}"""


def contrast(canvas, kind: str) -> list[str]:
    """Texts of a face that stand out from what is under them by less than WCAG's AA asks, 4.5 to 1."""
    return canvas.evaluate(
        f"""(kind) => {{
          const face = ({FACE})(kind), low = [];
          const pen = document.createElement("canvas").getContext("2d", {{willReadFrequently: true}});
          const over = (colours) => {{
            pen.clearRect(0, 0, 1, 1);
            for (const one of colours) {{ pen.fillStyle = one; pen.fillRect(0, 0, 1, 1); }}
            return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3).map((one) => {{
              const part = one / 255;
              return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
            }});
          }};
          const light = ([red, green, blue]) => 0.2126 * red + 0.7152 * green + 0.0722 * blue;
          const walk = document.createTreeWalker(face, NodeFilter.SHOW_TEXT);
          while (walk.nextNode()) {{
            const text = walk.currentNode, element = text.parentElement;
            if (!text.textContent.trim() || !element.getClientRects().length) continue;
            const under = [];
            for (let one = element; one; one = one.parentElement) {{
              under.unshift(getComputedStyle(one).backgroundColor);
              if (one !== face || face.closest("[data-node-id]")) continue;
              under.unshift(LiteGraph.NODE_DEFAULT_BGCOLOR); // the canvas draws the node under it
              break;
            }}
            const style = getComputedStyle(element), ink = element.closest("svg") ? style.fill : style.color;
            const [a, b] = [light(over(under)), light(over([...under, ink]))];
            const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            if (ratio < 4.5) low.push(`${{ratio.toFixed(2)}} ${{text.textContent.slice(0, 40)}}`);
          }}
          return low;
        }}""",
        kind,
    )


@screens("pinned-vue", full=("pinned-classic", "newest-classic"))
def test_reports_and_benchmarks_are_tables_and_plots_that_keep_to_their_group(open_canvas, workflows, vue):
    canvas = open_canvas(**{"Comfy.VueNodes.Enabled": vue, "Comfy.ColorPalette": PALETTES[vue]})
    small = json.loads(json.dumps(workflows["sweep-steps"][0]))
    for node in small["nodes"]:
        names = [slot["name"] for slot in node["inputs"] if "widget" in slot]
        if node["type"] == "SpeedLabCheckpointLoader":
            node["widgets_values"][0] = DEMO_CHECKPOINT
        if node["type"] == "SpeedLabBenchmark":
            wanted = {"values_x": "1, 2", "axis_y": "cfg", "values_y": "1, 4", "width": SIDE, "height": SIDE,
                      "batch": 1, "warmup": 0, "repeats": 1}  # fmt: skip
            for name, value in wanted.items():
                node["widgets_values"][names.index(name)] = value
    canvas.drop(small, "sweep")
    canvas.evaluate(
        """() => { window.slDone = 0; for (const name of ["execution_success", "execution_error"])
             app.api.addEventListener(name, () => (window.slDone += 1)); app.queuePrompt(0, 1); }"""
    )
    canvas.page.wait_for_function("() => window.slDone > 0", timeout=120_000)
    canvas.page.wait_for_function(f"() => ({FACE})('SpeedLabBenchmark')?.querySelector('.sl-sheet')?.naturalWidth > 0")
    look = canvas.evaluate(
        f"""() => {{
          const face = ({FACE})("SpeedLabBenchmark"), cells = (row) => [...row.children].map((one) => one.textContent);
          return {{
            first: face.firstElementChild.querySelector("img")?.className,
            head: cells(face.querySelector("thead tr")), rows: [...face.querySelectorAll("tbody tr")].map(cells),
            text: face.textContent, scrolls: face.scrollHeight > face.clientHeight,
            plots: face.querySelectorAll("svg.sl-graph").length,
            points: face.querySelector("svg.sl-graph").querySelectorAll("circle").length,
            type: parseFloat(getComputedStyle(face.querySelector("svg text")).fontSize)
              * face.querySelector("svg").clientWidth / face.querySelector("svg").viewBox.baseVal.width,
            page: face.querySelector("a[download$='.html']").href,
          }};
        }}"""
    )
    assert look["first"] == "sl-sheet", "the contact sheet is the first thing"
    assert look["head"][:3] == ["plan", "max VRAM", "time"] and len(look["rows"]) == 4
    assert "|" not in look["text"], "no Markdown"
    assert look["scrolls"] and look["plots"] >= 2 and look["points"] == 4 and look["type"] >= 10
    assert canvas.page.request.get(look["page"]).text().count("<td>") > 4 * len(look["head"])
    assert contrast(canvas, "SpeedLabBenchmark") == []
    assert serious(canvas, ".sl-face") == []
    canvas.page.wait_for_timeout(500)
    assert canvas.evaluate(OUTSIDE) == []
    # A result of another workflow whose node has this id is not shown here; this one's comes back.
    canvas.evaluate(
        """() => {
          const node = String(app.graph.nodes.find((one) => one.type === "SpeedLabBenchmark").id);
          const output = {text: ["another's"], speedlab_workflow: ["another"]};
          app.api.dispatchCustomEvent("executed", {node, display_node: node, output});
        }"""
    )
    for again in ("nothing", "undo", "reload"):
        if again == "undo":
            canvas.evaluate("() => app.loadGraphData((app.rootGraph ?? app.graph).serialize())")
        elif again == "reload":
            canvas.reload()
        rows = f"({FACE})('SpeedLabBenchmark')?.querySelectorAll('tbody tr').length"
        canvas.page.wait_for_function(f"() => {rows} === 4", timeout=20_000)


@screens("pinned-classic", full=("newest-vue",))
def test_a_report_shows_phases_and_folds_steps(open_canvas, small, vue):
    canvas = open_canvas(**{"Comfy.VueNodes.Enabled": vue, "Comfy.ColorPalette": PALETTES[vue]})
    # Texts are encoded anew: with those of a cache there is no time of it all.
    canvas.drop(small(seed=81 + vue, text="phases and steps"), "small")
    canvas.page.wait_for_timeout(500)
    assert canvas.evaluate(OUTSIDE) == [], "before a run"
    canvas.queue()
    report = "SpeedLabProfileReport"
    canvas.page.wait_for_function(f"() => ({FACE})('{report}')?.querySelector('.sl-parts')")
    canvas.page.wait_for_timeout(500)
    assert canvas.evaluate(OUTSIDE) == [], "after a run"
    phases, steps = canvas.evaluate(
        f"""() => {{
          const face = ({FACE})("{report}"), fold = face.querySelector("details");
          const words = (row) => [...row.children].map((one) => one.textContent);
          const before = [...face.querySelectorAll(".sl-parts tbody tr")].map(words);
          const folded = !fold.open && fold.querySelectorAll("tr").length === 0;
          fold.open = true;
          return new Promise((done) => setTimeout(() =>
            done([before, [folded, ...[...fold.querySelectorAll("tbody tr")].map(words)]]), 300));
        }}"""
    )
    assert canvas.evaluate(f"() => ({FACE})('{report}').querySelectorAll('.sl-pictures img').length") == 1
    names = [row[0] for row in phases]
    assert {"Sampling", "Decoding", "Text to image"} <= set(names) and names[-1] == "Text to image"
    assert steps[0] is True and [row[0] for row in steps[1:]] == ["1", "2", "3", "4"]
    assert contrast(canvas, report) == []
    assert serious(canvas, ".sl-face") == []
    assert canvas.evaluate(f"() => [...({FACE})('{report}').querySelectorAll('.sl-tools a')].map((a) => a.text)") == [
        "HTML", "JSON", "CSV",
    ]  # fmt: skip
    run = canvas.evaluate("() => document.querySelector('.sl-panel').dataset.run")
    canvas.reload()
    canvas.page.wait_for_function(f"() => ({FACE})('{report}')?.querySelector('.sl-parts')", timeout=20_000)
    assert run in canvas.evaluate(f"() => ({FACE})('{report}').querySelector('a[href*=runs]').href")


@screens("pinned-vue", full=("newest-classic",))
def test_a_subgraph_shows_the_chart_of_its_sampler(open_canvas, vue):
    canvas = open_canvas(**{"Comfy.VueNodes.Enabled": vue})
    (blueprint,) = [one for one in BLUEPRINTS if one.name == "Measured text to image"]
    canvas.drop(blueprint_ui(blueprint), "measured")
    host = "(app.rootGraph ?? app.graph).nodes.find((one) => one.subgraph)"
    canvas.evaluate(
        f"""() => {{
          const node = {host}, set = {{width: 64, height: 64, steps: 3, seed: 5, ckpt_name: "{DEMO_CHECKPOINT}"}};
          for (const widget of node.widgets) if (widget.name in set) widget.value = set[widget.name];
          const preview = LiteGraph.createNode("PreviewImage");
          preview.pos = [node.pos[0] + node.size[0] + 80, node.pos[1]];
          app.graph.add(preview);
          node.connect(0, preview, 0);
        }}"""
    )
    assert {"steps", "cfg", "sampler_name"} <= set(canvas.evaluate(f"() => {host}.widgets.map((one) => one.name)"))
    canvas.queue()
    canvas.page.wait_for_timeout(500)
    shown = f"{host}.widgets.filter((one) => one.name === 'speedlab_profile')"
    assert canvas.evaluate(f"() => {shown}.map((one) => one.element.querySelectorAll('.sl-bar').length)") == [3]
    run, box, top = canvas.evaluate(
        f"""() => {{
          const element = {shown}[0].element, box = element.getBoundingClientRect(), node = {host};
          const view = app.canvas.canvas.getBoundingClientRect(), {{scale, offset}} = app.canvas.ds;
          return [element.dataset.run, [box.left, box.top, box.right, box.bottom],
                  [view.left + (node.pos[0] + offset[0]) * scale, view.top + (node.pos[1] + offset[1]) * scale]];
        }}"""
    )
    assert box[2] - box[0] > 100 and box[3] - box[1] > 100 and box[0] >= top[0] - 3 and box[1] >= top[1] - 3
    # As text: what Playwright hands over has null where there was nothing.
    saved = json.loads(canvas.evaluate("() => JSON.stringify((app.rootGraph ?? app.graph).serialize())"))
    canvas.open()
    canvas.drop(saved, "again")
    canvas.page.wait_for_function(f"(run) => {shown}[0]?.element.dataset.run === run", arg=run, timeout=20_000)
    assert canvas.evaluate(f"() => {shown}.length") == 1


def test_a_workflow_whose_run_is_gone_loads_without_an_error(open_canvas, small):
    """The console is watched to the end of the test: a run that was deleted is asked for without a failed request."""
    canvas = open_canvas()
    workflow = small(seed=91)
    for node in workflow["nodes"]:
        if node["type"] in ("SpeedLabProfileSampler", "SpeedLabProfileReport"):
            node["properties"]["speedlab_run"] = "20200101-000000-01234567"
    asked = []
    canvas.page.on("response", lambda response: asked.append(response.status) if "01234567" in response.url else None)
    canvas.drop(workflow, "gone")
    canvas.page.wait_for_timeout(1500)
    assert asked == [204, 204]
