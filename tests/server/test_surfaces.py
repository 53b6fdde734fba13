"""One run on every surface that tells its speed: the same numbers, to the digits that each writes."""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from speedlab.measure import charts
from speedlab.measure.record import from_json
from speedlab_tools.bench.html import html_page
from speedlab_tools.bench.results import Outcome
from speedlab_tools.compare import command
from speedlab_tools.scenarios.catalog import find

pytestmark = pytest.mark.server

RATE, STEP_MS = re.compile(r"([\d.]+) it/s"), re.compile(r"a step ([\d.]+) ms")
ASKED, TAKEN = 7, 8  # ddim_uniform goes through 1,000 noise levels in strides of a whole number
COUNTED = ("text_encode", "to_device", "prepare", "sample", "decode", "save")


@pytest.fixture(scope="module")
def told(server: Any, graph_of: Any) -> dict[str, Any]:
    """What the server told of one run: the nodes' texts, the record, its row and its line in the library."""
    prompt = graph_of(text="a lamp by a window", steps=ASKED, sampler_name="ddim", scheduler="ddim_uniform")
    prompt["3"]["inputs"]["text"] = "dark"
    entry = server.run(prompt)
    run_id = entry["outputs"]["7"]["speedlab"][0]["run_id"]
    table = server.output / "speedlab" / "results.csv"
    with table.open(newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["run_id"] == run_id)
    return {
        "summary": server.texts(entry, "5"),
        "report": server.texts(entry, "7"),
        "shown": entry["outputs"]["7"]["speedlab"][0],
        "record": json.loads((server.output / "speedlab" / "runs" / f"{run_id}.json").read_text()),
        "route": server.get(f"/speedlab/runs/{run_id}"),
        "listed": next(run for run in server.get("/speedlab/runs")["runs"] if run["run_id"] == run_id),
        "row": row,
        "table": table,
    }


def test_nodes_record_row_and_library(told: dict[str, Any]) -> None:
    record = told["record"]
    phases, summary, row, listed = record["phases_ms"], record["summary"], told["row"], told["listed"]
    sampling_s, rate, step_ms = phases["sample"] / 1000.0, summary["it_per_s"], summary["step_time_ms"]
    assert (summary["steps"], record["request"]["steps"]) == (TAKEN, ASKED)
    assert summary["steps"] / rate == pytest.approx(sampling_s, rel=0.001)
    for text in (told["summary"], told["report"]):
        assert float(RATE.findall(text)[-1]) == pytest.approx(rate, abs=0.005)
        assert float(STEP_MS.findall(text)[-1]) == pytest.approx(step_ms, abs=0.0501)
        assert f"{TAKEN} steps in {sampling_s:.3f} s" in text
    assert f"{TAKEN} steps ({ASKED} asked for)" in told["report"]
    in_report = dict(re.findall(r"^(.+?) {2,}([\d.]+) ", told["report"], re.MULTILINE))
    assert float(in_report["text to image"]) == pytest.approx(phases["total"], abs=0.0501)
    assert float(in_report["sampling"]) == pytest.approx(phases["sample"], abs=0.0501)
    assert phases["total"] == pytest.approx(sum(phases[name] for name in COUNTED), rel=0.001)
    assert told["route"] == record
    assert (told["shown"]["phases_ms"], told["shown"]["summary"]) == (phases, summary)
    assert (listed["it_per_s"], listed["total_ms"], listed["sample_ms"]) == (rate, phases["total"], phases["sample"])
    assert (listed["steps"], listed["steps_asked"]) == (TAKEN, ASKED)
    assert (int(row["steps"]), float(row["it_per_s"])) == (TAKEN, pytest.approx(rate, rel=1e-5))
    assert float(row["step_time_s"]) == pytest.approx(step_ms / 1000.0, rel=1e-5)
    assert float(row["time_s"]) == pytest.approx(phases["total"] / 1000.0, rel=1e-5)


def test_charts(told: dict[str, Any]) -> None:
    record = from_json(json.dumps(told["record"]))
    rate, step_ms = record.summary["it_per_s"], record.summary["step_time_ms"]
    (steps,) = charts.figure_of(record, charts.STEPS).axes
    assert f", {rate:.3g} it/s" in steps.get_title(loc="left")
    words = [text.get_text() for text in steps.get_legend().get_texts()]
    assert words[0] == f"sampling / steps {step_ms:.1f} ms"
    assert words[1] == f"{TAKEN} full, median {record.summary['step_kinds']['full']['median_ms']:.1f} ms"
    assert steps.get_lines()[0].get_ydata()[0] == step_ms
    assert sum(bar.get_height() for bar in steps.patches[:TAKEN]) == pytest.approx(record.phases_ms["sample"], rel=0.01)
    (phases,) = charts.figure_of(record, charts.PHASES).axes
    names = [label.get_text() for label in phases.get_yticklabels()]
    seconds = [float(text.get_text().strip(" s")) for text in phases.texts]
    drawn = dict(zip(names, seconds, strict=True))
    assert {name: drawn[name] for name in COUNTED if name in drawn} == {
        name: pytest.approx(record.phases_ms[name] / 1000.0, abs=0.0051) for name in COUNTED if record.phases_ms[name]
    }


def cells(page: str) -> Iterator[list[str]]:
    for line in re.findall(r"<tr>(.+?)</tr>", page, re.DOTALL):
        yield re.findall(r"<t[hd]>(.*?)</t[hd]>", line, re.DOTALL)


def seconds_of(cell: str) -> float:
    return float(cell.removesuffix(" s"))


def test_the_page_of_bench_and_compare(told: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    record, row = told["record"], told["row"]
    total_s, step_s = record["phases_ms"]["total"] / 1000.0, record["summary"]["step_time_ms"] / 1000.0
    runs = told["table"].parent / "runs"
    outcome = Outcome("txt2img-default", [row], records=[runs / f"{record['run_id']}.json"])
    header, line, *_ = cells(html_page([find("txt2img-default")], [outcome], []))
    page = dict(zip(header, line, strict=True))
    assert seconds_of(page["time"]) == pytest.approx(total_s, abs=0.0051)
    assert seconds_of(page["step time"]) == pytest.approx(step_s, abs=0.00051)
    assert float(page["images/min"]) == pytest.approx(60.0 / total_s, abs=0.0051)
    assert (page["steps"], page["plan"]) == (str(TAKEN), record["request"]["plan"])
    # The same run twice as long on the other side.
    paths = []
    for name, factor in (("a", 1.0), ("b", 2.0)):
        paths.append(tmp_path / f"{name}.csv")
        with paths[-1].open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            time_s = f"{factor * float(row['time_s']):.6g}"
            writer.writerow({**row, "time_s": time_s, "run_id": row["run_id"][:-1] + name})
    assert command.run(argparse.Namespace(a=str(paths[0]), b=str(paths[1]), across=False, strict=False)) == 0
    compared = capsys.readouterr().out
    found = re.search(r"([\d.]+) s +([\d.]+) s +([\d.]+) ", compared)
    assert found, compared
    a_s, b_s, ratio = map(float, found.groups())
    assert (a_s, b_s, ratio) == (
        pytest.approx(total_s, abs=0.0051), pytest.approx(2.0 * total_s, abs=0.0051), pytest.approx(2.0, abs=0.0005)
    )  # fmt: skip
