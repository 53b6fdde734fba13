"""The documents quote what benchmarks/results hold, their links lead somewhere, and the README stays short."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from speedlab_tools.scenarios.catalog import TEMPLATES

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\((?!https?://)([^)\s#]*)(?:#([^)\s]+))?\)")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
README_WORDS = 800


def _load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


docs_tables = _load("docs_tables")
template_images = _load("template_images")
DOCUMENTS = docs_tables.documents(ROOT)


@pytest.fixture
def copy(tmp_path):
    """The documents and results in a folder where they may be spoilt."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / docs_tables.RESULTS, tmp_path / docs_tables.RESULTS)
    for path in ROOT.glob("*.md"):
        shutil.copy(path, tmp_path)
    return tmp_path


def check(root, *more):
    return docs_tables.main(["--root", str(root), *more])


def test_every_table_and_figure_is_what_the_results_say(capsys):
    assert check(ROOT, "--check") == 0, capsys.readouterr().out


def test_a_step_of_the_profilers_details_is_sampling_time_over_steps():
    rows = docs_tables.Results(ROOT / docs_tables.RESULTS).rows("profiler-detail")
    step_ms = {(row["round"], row["detail"]): 1000.0 * float(row["sample_s"]) / int(row["steps"]) for row in rows}
    for row in rows:
        mine = step_ms[row["round"], row["detail"]]
        assert float(row["step_ms"]) == pytest.approx(mine, abs=1e-3)
        assert float(row["step_ratio"]) == pytest.approx(mine / step_ms[row["round"], "timing"], abs=1e-4)


def test_every_table_and_figure_is_shown_somewhere():
    text = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    assert [name for name in docs_tables.TABLES if f"<!-- table: {name} -->" not in text] == []
    assert [name for name in docs_tables.FIGURES if f"<!--figure:{name}-->" not in text] == []


@pytest.mark.parametrize(
    ("document", "before", "after", "part"),
    [
        ("docs/fleet.md", "| 32.1 |", "| 42.1 |", "table fleet"),
        ("README.md", "<!--figure:image-3-->6.0<", "<!--figure:image-3-->7.0<", "figure image-3"),
        ("README.zh.md", "<!--figure:image-3-->6.0<", "<!--figure:image-3-->7.0<", "figure image-3"),
    ],
)
def test_an_edit_by_hand_is_found_and_undone(copy, capsys, document, before, after, part):
    path = copy / document
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1
    path.write_text(text.replace(before, after), encoding="utf-8")
    assert check(copy, "--check") == 1
    assert capsys.readouterr().out.splitlines()[0] == f"{document}: {part} is not what the results say"
    assert after in path.read_text(encoding="utf-8")  # --check writes nothing
    assert check(copy) == 0
    assert path.read_text(encoding="utf-8") == text


def test_a_newer_result_changes_the_documents(copy, capsys):
    (old,) = (copy / docs_tables.RESULTS).glob("*_fleet.csv")
    new = old.with_name(old.name.replace("2026-11-22", "2027-01-01"))
    new.write_text(old.read_text(encoding="utf-8").replace("32.106", "33.206"), encoding="utf-8")
    old.with_name(old.name.replace("amd-epyc", "another-cpu").replace("2026", "2030")).write_text("x\n")
    assert check(copy, "--check") == 1
    assert "docs/fleet.md: table fleet" in capsys.readouterr().out
    assert check(copy) == 0
    text = (copy / "docs" / "fleet.md").read_text(encoding="utf-8")
    assert "| 33.2 |" in text and new.name in text


def test_errors_at_equal_time_are_those_of_the_best_settings():
    points = [("EasyCache", "", 1.0, 0.4), ("EasyCache", "", 4.0, 0.1), ("EasyCache", "", 3.0, 0.9),
              ("EasyCache", "stop_at 0.75", 2.0, 0.1), ("copy", "", 2.5, 0.01)]  # fmt: skip
    names = ("way", "dynamic_cfg", "cpu_s", "error_median")
    rows = [dict(zip(names, map(str, point), strict=True)) for point in points]
    front = docs_tables._front_error
    assert front(rows, "EasyCache", "", 2.5) == pytest.approx(0.2)
    assert front(rows, "EasyCache", "stop_at 0.75", 1.5) == pytest.approx(0.2)
    assert front(rows, "EasyCache", "", 0.9) == pytest.approx(0.4) and front(rows, "EasyCache", "", 5.0) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: nothing -->\n<!-- end -->\n", "no table 'nothing'"),
        ("<!--figure:nothing-->1<!--/-->", "no figure 'nothing'"),
        ("<!-- table: fleet -->\n", "no partner"),
        ("<!--figure:image-3-->6.0", "no partner"),
    ],
)
def test_a_marker_that_makes_nothing_is_an_error(text, message):
    with pytest.raises(docs_tables.DocsError, match=message):
        docs_tables.rendered(text, docs_tables.Results(ROOT / docs_tables.RESULTS))


def test_a_missing_results_file_is_named(copy, capsys):
    (path,) = (copy / docs_tables.RESULTS).glob("*_fleet.csv")
    path.unlink()
    assert check(copy, "--check") == 2
    assert "_fleet.csv" in capsys.readouterr().err


def anchors(path):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path):
    lost = []
    for target, anchor in LINK.findall(FENCE.sub("", path.read_text(encoding="utf-8"))):
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            lost.append(f"{target}#{anchor}")
    assert lost == []


def test_the_readme_is_short_and_its_translation_has_the_same_parts():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
    assert len(english.split()) <= README_WORDS
    parts = re.compile(r"^(#+) |^(\|)|^(!)|^(```)", re.MULTILINE)
    assert parts.findall(english) == parts.findall(chinese)
    for what in (r"<!--figure:([\w-]+)-->", r"\]\((docs/(?!zh\.md)[\w./]+)", r"`([a-z0-9]+(?:-[a-z0-9]+)+)`"):
        assert sorted(re.findall(what, english)) == sorted(re.findall(what, chinese))


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_templates_named_in_the_readme_are_there(name):
    """The last column of its first table: what the names of templates begin with."""
    text = (ROOT / name).read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    named = [workflow for row in rows if len(row) == 5 for workflow in re.findall(r"`([^`]+)`", row[-1])]
    there = {path.stem.partition(" - ")[0] for path in (ROOT / "workflows").glob("*.json")}
    assert named and [workflow for workflow in named if workflow not in there] == []


def test_images_of_templates_hold_the_figures_of_the_results():
    """Where this fails, `python benchmarks/template_images.py` draws them again."""
    made = template_images.images(docs_tables.Results(ROOT / docs_tables.RESULTS))
    assert made.keys() | set(template_images.GRAPHS) == TEMPLATES.keys()
    for scenario, picture in made.items():
        with Image.open(ROOT / "workflows" / f"{TEMPLATES[scenario]}.jpg") as image:
            assert image.info["comment"].decode() == picture.comment(), scenario
    chart = made["sdxl-fastest-deepcache"]
    assert chart.bars[0][1] == 1 and max(value for _, value, _ in chart.bars) > 2
    assert template_images.draw(chart)[1:4] == b"PNG"
