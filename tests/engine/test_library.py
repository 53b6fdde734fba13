"""The library of runs: pages, filters, hostile files and names, deleting and pruning."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from speedlab.common.errors import ResultsError
from speedlab.measure.store import RunStore
from speedlab.web import library as library_module
from speedlab.web.library import RunLibrary, UnknownRunError


def run_id(number: int) -> str:
    return f"20260101-{number // 3600:02d}{number // 60 % 60:02d}{number % 60:02d}-{number:08x}"


def record(number: int, plan: str = "stock", **changes) -> dict:
    return {
        "schema": 2,
        "run_id": run_id(number),
        "timestamp": "2026-01-01T10:00:00+0000",
        "status": "ok",
        "error": None,
        "env": {"device": "a GPU"},
        "env_hash": "0",
        "request": {"plan": plan, "width": 512, "height": 768, "sampler": "euler", "scheduler": "normal", "steps": 20},
        "phases_ms": {"sample": 1000.0, "total": 1500.0},
        "steps": [{"index": i, "cpu_ms": 50.0} for i in range(20)],
        "summary": {"it_per_s": 20.0},
        "memory": {"overall": {"peak_allocated_gb": None, "peak_rss_gb": 2.5}},
        **changes,
    }


@pytest.fixture
def store(tmp_path):
    made = RunStore(tmp_path / "output")
    made.runs.mkdir(parents=True)
    return made


def put(store, number: int, **changes) -> str:
    data = record(number, **changes)
    (store.runs / f"{run_id(number)}.json").write_text(json.dumps(data))
    return data["run_id"]


def test_pages_go_from_the_newest_to_the_end(store):
    for number in range(7):
        put(store, number)
    library = RunLibrary(store)
    first = library.page(0, 3)
    second = library.page(first.next_offset, 3)
    third = library.page(second.next_offset, 3)
    assert [run.run_id for page in (first, second, third) for run in page.runs] == [run_id(n) for n in range(6, -1, -1)]
    assert third.next_offset is None
    run = first.runs[0]
    assert (run.plan, run.it_per_s, run.total_ms, run.peak_gb, run.peak_kind) == ("stock", 20.0, 1500.0, 2.5, "ram")


def test_words_are_looked_for_in_every_text_and_the_size(store):
    put(store, 1, plan="DeepCache")
    put(store, 2, plan="stock")
    library = RunLibrary(store)
    assert [run.plan for run in library.page(text="deep 512x768").runs] == ["DeepCache"]
    assert len(library.page(text="EULER").runs) == 2
    assert library.page(text="heun").runs == ()


def test_half_written_foreign_and_mislabelled_files_are_skipped_and_counted(store, tmp_path):
    put(store, 1)
    whole = json.dumps(record(2))
    (store.runs / f"{run_id(2)}.json").write_text(whole[: len(whole) // 2])
    (store.runs / f"{run_id(3)}.json").write_text(json.dumps(record(4)))  # another run's record
    (store.runs / f"{run_id(5)}.json").write_bytes(b"\xff\xfe")
    (store.runs / f"{run_id(6)}.json").write_text("[" * 100_000)
    (store.runs / "notes.txt").write_text("mine")
    outside = tmp_path / "outside.json"
    outside.write_text(json.dumps(record(7)))
    (store.runs / f"{run_id(7)}.json").symlink_to(outside)
    strange = record(8, request=[1], summary="x", memory=None, phases_ms={"total": "cached"}, env=3, artifacts=[])
    (store.runs / f"{run_id(8)}.json").write_text(json.dumps(strange))
    (store.runs / ".20260101-000000-x.tmp").write_text("being written")
    page = RunLibrary(store).page()
    assert [run.run_id for run in page.runs] == [run_id(8), run_id(1)]
    assert page.runs[0].it_per_s is None
    assert page.skipped == 6


def test_a_record_that_a_killed_process_left_half_written_is_counted_after_an_hour(store):
    put(store, 1)
    for age, name in ((0, ".20260101-000000-new.tmp"), (7200, ".20260101-000000-old.tmp"), (7200, ".hidden")):
        (store.runs / name).write_text("half")
        os.utime(store.runs / name, (time.time() - age,) * 2)
    page = RunLibrary(store).page()
    assert [run.run_id for run in page.runs] == [run_id(1)] and page.skipped == 1


@pytest.mark.parametrize("text", ['{"schema": 1, "x": ' + "9" * 5000 + "}", "[" * 100_000, '{"schema": NaN}'])
def test_a_hostile_record_fails_alone(store, text):
    put(store, 1)
    hostile = run_id(2)
    (store.runs / f"{hostile}.json").write_text(text)
    library = RunLibrary(store)
    assert [run.run_id for run in library.page().runs] == [run_id(1)]
    for call in (library.text, library.delete):
        with pytest.raises(ResultsError):
            call(hostile)


def test_a_trace_belongs_to_its_record(store):
    name = f"{run_id(1)}.trace.json.gz"
    mine = put(store, 1, artifacts={"trace": f"speedlab/runs/{name}"})
    (store.runs / name).write_bytes(b"packed")
    library = RunLibrary(store)
    assert library.page().skipped == 0
    assert library.artifact(mine, "trace").name == name
    library.delete(mine)
    assert list(store.runs.iterdir()) == []


def test_a_changed_file_is_read_again_and_a_gone_one_forgotten(store):
    put(store, 1, plan="before")
    library = RunLibrary(store)
    assert library.page().runs[0].plan == "before"
    put(store, 1, plan="afterwards")
    assert library.page().runs[0].plan == "afterwards"
    (store.runs / f"{run_id(1)}.json").unlink()
    assert library.page().runs == ()


def test_deleting_removes_what_the_run_made_and_nothing_else(store):
    mine = put(store, 1, artifacts={
        "images": [f"speedlab/images/{run_id(1)}_000.png", "speedlab/images/other.png"],
        "chart": f"speedlab/charts/{run_id(1)}.png",
        "results": "speedlab/results.csv",
    })  # fmt: skip
    for name in (f"images/{mine}_000.png", "images/other.png", f"charts/{mine}.png", "results.csv"):
        path = store.root / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    library = RunLibrary(store)
    assert library.artifact(mine, "chart").name == f"{mine}.png"
    library.delete(mine)
    left = sorted(path.name for path in store.root.rglob("*") if path.is_file())
    assert left == ["other.png", "results.csv"]
    with pytest.raises(UnknownRunError):
        library.delete(mine)


def test_pruning_keeps_the_newest_and_everything_that_is_no_record(store):
    for number in range(5):
        put(store, number)
    foreign = store.runs / f"{run_id(0)[:-1]}f.json"
    foreign.write_text("{}")
    library = RunLibrary(store)
    assert library.prune(0) == []
    assert library.prune(2) == [run_id(2), run_id(1), run_id(0)]
    assert sorted(path.name for path in store.runs.iterdir()) == sorted(
        [f"{run_id(3)}.json", f"{run_id(4)}.json", foreign.name]
    )


def test_pruning_goes_by_the_time_of_writing(store):
    """Ids hold the local time, which goes backwards once a year, and where somebody sets the clock."""
    for number in (7, 8, 9, 0):
        path = store.runs / f"{put(store, number)}.json"
        os.utime(path, ns=(number or 10,) * 2)
    assert RunLibrary(store).prune(2) == [run_id(8), run_id(7)]


@pytest.mark.parametrize("name", ["runs", "images/l.png"])
def test_a_link_to_itself_is_no_traceback(store, name):
    put(store, 0, artifacts={"images": ["speedlab/images/l.png"]})
    path = store.root / name
    if name == "runs":
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(path)
    library = RunLibrary(store)
    acts = (library.page, lambda: library.artifact(run_id(0), "images"), lambda: library.delete(run_id(0)))
    for act in acts if name == "runs" else acts[1:2]:
        with pytest.raises((ResultsError, UnknownRunError)):
            act()
    if name != "runs":
        library.delete(run_id(0))


def test_a_runs_folder_that_is_a_link_out_is_refused(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    store = RunStore(tmp_path / "output")
    store.root.mkdir(parents=True)
    store.runs.symlink_to(elsewhere, target_is_directory=True)
    with pytest.raises(ResultsError, match="leads out"):
        RunLibrary(store).page()


def test_ten_thousand_runs_open_only_what_is_shown(store, monkeypatch):
    """A first look opens the files of its page alone; each file is opened once. benchmarks/library.py has the times."""
    text = json.dumps(record(0))
    for number in range(10_000):
        (store.runs / f"{run_id(number)}.json").write_text(text.replace(run_id(0), run_id(number)))
    opened: list[Path] = []
    real = library_module._read

    def read(path: Path) -> str:
        opened.append(path)
        return real(path)

    monkeypatch.setattr(library_module, "_read", read)
    library = RunLibrary(store)

    def opens(work) -> int:
        opened.clear()
        assert len(work().runs) > 0
        return len(opened)

    assert opens(lambda: library.page(0, 50)) == 50
    assert opens(lambda: library.page(0, 50)) == 0
    assert opens(lambda: library.page(9950, 50)) == 50
    assert opens(lambda: library.page(text=run_id(3))) == 9900
    assert opens(lambda: library.page(text=run_id(4))) == 0


STEP = {"index": 0, "sigma": 14.6, "gpu_ms": None, "cpu_ms": 100.0, "evals": 1, "cond_rows": 1, "uncond_rows": 1,
        "cached": False, "model": "base"}  # fmt: skip
SUMMARY = {"steps": 2, "it_per_s": 10.0, "step_time_ms": 100.0}


def with_image(store, number: int, texts: dict[str, str], **changes) -> str:
    """A run whose image keeps these texts as core's Save Image does."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    folder = store.root / "images"
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / f"{run_id(number)}_000.png", pnginfo=info)
    steps = [STEP, {**STEP, "index": 1}]
    artifacts = {"images": [f"speedlab/images/{run_id(number)}_000.png"]}
    known = {"artifacts": artifacts, "steps": steps, "summary": SUMMARY, "step_memory": {"peak_rss_gb": [None, 1.5]}}
    return put(store, number, **{**known, **changes})


def test_a_run_becomes_one_page_that_needs_nothing_else(store):
    made = with_image(store, 1, {}, request={"plan": "<script>alert(1)</script>", "steps": 2, "width": 64})
    page = RunLibrary(store).page_of(made)
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "http" not in page.replace('http-equiv="Content', ""), "no address of anything"
    assert page.count("data:image/png;base64,") == 1
    assert page.count("<rect") == 2 and page.count("<polyline") == 1, "a bar a step, and the memory that is known"
    assert "Times of 2 steps, the longest 100.0 ms<" in page and "None" not in page
    assert "10.00 it/s" in page and "RAM of the process, peak of each step: 1.50 to 1.50 GB" in page


def test_a_page_of_a_record_of_another_shape_is_refused_in_words(store):
    for number, strange in enumerate(({"steps": [{"index": "first"}]}, {"steps": [{**STEP, "sigma": 10**400}]})):
        made = put(store, number, **{"summary": SUMMARY, **strange})
        with pytest.raises(ResultsError, match="not as this pack writes one"):
            RunLibrary(store).page_of(made)


def test_a_first_step_beyond_the_bars_of_a_page_is_told_with_where_they_end(store):
    made = put(store, 1, steps=[{**STEP, "cpu_ms": 900.0}, STEP, STEP], summary=SUMMARY)
    assert "Times of 3 steps, the longest 900.0 ms; bars end at 220.0 ms" in RunLibrary(store).page_of(made)


def test_the_workflow_of_a_run_is_read_from_its_image(store):
    graph = {"nodes": [], "id": "an open one's", "extra": "\u00e4"}
    made = with_image(store, 1, {"workflow": json.dumps(graph), "prompt": "no JSON", "other": "{}"})
    read = RunLibrary(store).workflow(made)["workflow"]
    assert (read.pop("id") == graph.pop("id"), read) == (False, graph)


def test_the_workflow_of_a_run_shows_that_run_and_not_the_one_before(store):
    """When it was queued its nodes named the run before."""
    old = {"speedlab_run": run_id(9), "kept": 1}
    report, other = {"type": "SpeedLabProfileReport"}, {"type": "KSampler", "properties": old}
    sampler = {"type": "SpeedLabProfileSampler", "properties": old}
    inner = {"definitions": {"subgraphs": [{"nodes": [sampler, 3]}, None, {"nodes": {}}]}}

    def shown(number: int, **graph) -> list:
        made = with_image(store, number, {"workflow": json.dumps(graph)})
        read = RunLibrary(store).workflow(made)["workflow"]
        subgraphs = read.get("definitions", {}).get("subgraphs", [])
        return [node.get("properties") for node in [*read["nodes"], *(subgraphs[0]["nodes"][:1] if subgraphs else [])]]

    named = {"speedlab_run": run_id(1)}
    assert shown(1, nodes=[report, sampler, other]) == [named, {"kept": 1} | named, old]
    assert shown(2, nodes=[report], **inner) == [{"speedlab_run": run_id(2)}, {"kept": 1, "speedlab_run": run_id(2)}]
    # Of two samplers nothing tells which one made the image.
    assert shown(3, nodes=[sampler, report, sampler]) == [{"kept": 1}, {}, {"kept": 1}]
    strange = [{"type": ["SpeedLabProfileSampler"]}, {"type": "SpeedLabEnsembleSampler", "properties": [1]}]
    assert shown(4, nodes=strange) == [None, {"speedlab_run": run_id(4)}]


def test_why_a_run_has_no_workflow_is_said(store):
    without = with_image(store, 1, {})
    none = put(store, 2)
    cut = with_image(store, 3, {"workflow": "{}" * 50})
    image = store.root / "images" / f"{run_id(3)}_000.png"
    image.write_bytes(image.read_bytes()[:60])
    library = RunLibrary(store)
    for made, why in ((without, "keeps no workflow"), (none, "saved none"), (cut, "keeps no workflow")):
        with pytest.raises(UnknownRunError, match=why):
            library.workflow(made)


def test_positions_tell_where_runs_stand_among_all_files(store):
    for number in range(5):
        put(store, number, plan="odd" if number % 2 else "even")
    (store.runs / f"{run_id(9)}.json").write_text("{")
    library = RunLibrary(store)
    assert library.page(0, 3).positions == (1, 2, 3), "the file at 0 is no record"
    found = library.page(0, 50, "odd")
    assert found.positions == (2, 4) and [run.run_id for run in found.runs] == [run_id(3), run_id(1)]
    (store.runs / "notes.txt").write_text("mine")
    pages = [library.page(offset, 2) for offset in (0, 3, 5)]
    assert [page.skipped for page in pages] == [2, 0, 0], "a file counts in one page"


def test_a_run_as_a_row_in_markdown_keeps_its_columns(store):
    put(store, 1, plan="a|b *c*\n[d](e)", summary={**SUMMARY, "it_per_s": 1 / 3})
    (run,) = RunLibrary(store).page().runs
    assert run.markdown() == (
        f"| 2026-01-01 10:00 | a\\|b \\*c\\* \\[d](e) | - | 512x768 x? | 2 steps | euler/normal | 1.500 s | "
        f"0.3333 it/s | 2.50 GB RAM | a GPU | ok | {run_id(1)} |"
    )
    put(store, 2, request={"plan": "long " * 100}, summary={}, status="error", phases_ms={}, memory={})
    run = RunLibrary(store).page().runs[0]
    assert run.markdown() == (
        f"| 2026-01-01 10:00 | {('long ' * 100).strip()} | {'- | ' * 7}a GPU | error | {run_id(2)} |"
    )
