"""Schedules, windows, plans, tables and graphs: what holds for every value, checked on many."""

from __future__ import annotations

import csv
import itertools
import json
from dataclasses import fields
from datetime import datetime
from fractions import Fraction
from math import floor

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from speedlab.measure.record import CSV_COLUMNS, RunRecord, csv_row, from_json
from speedlab.measure.store import RunStore, new_run_id
from speedlab.patching.position import Part
from speedlab.patching.schedule import steps_before
from speedlab.plans.axes import NONE, CellSettings, baseline_of, make_cells, parse_axis, with_batch
from speedlab.techniques.deepcache.schedule import DeepCacheConfig, nonuniform_steps, sources
from speedlab_tools.client.graph import GROUPS, Graph, is_link, snapshot, types_match, upstream
from speedlab_tools.compare.csv_tables import compare, read_table, runs_of
from speedlab_tools.compare.drift import TURNS
from speedlab_tools.scenarios.canvas import place, to_ui, ui_to_api

# Fractions as a slider gives them: two digits.
percents = st.integers(0, 100).map(lambda n: n / 100)


@given(st.integers(1, 10_000), st.data())
def test_a_fraction_counts_steps_as_exact_arithmetic_does(steps, data):
    taken = data.draw(st.integers(0, steps))
    assert steps_before(taken / steps, steps) == taken
    hundredths = data.draw(st.integers(0, 100))
    assert steps_before(hundredths / 100, steps) == floor(Fraction(hundredths, 100) * steps)


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 1000))
def test_more_of_the_schedule_is_never_fewer_steps(a, b, steps):
    low, high = sorted((a, b))
    assert 0 <= steps_before(low, steps) <= steps_before(high, steps) <= steps


configs = st.builds(
    DeepCacheConfig,
    interval=st.integers(1, 20),
    start=percents,
    end=percents,
    schedule=st.sampled_from(["uniform", "nonuniform"]),
    center=st.integers(0, 60),
    power=st.floats(1.0, 4.0),
)


@given(configs, st.integers(1, 60), st.data())
def test_a_window_is_the_same_steps_of_the_whole_however_the_schedule_is_cut(config, total, data):
    first = data.draw(st.integers(0, total - 1))
    steps = data.draw(st.integers(1, total - first))
    plan = sources(config, steps, Part(first, total))
    low, high = (floor(Fraction(round(share * 100), 100) * total) for share in (config.start, config.end))
    inside = {step for step in range(steps) if low <= first + step < high} if config.interval > 1 else set()
    assert {step for step, source in enumerate(plan) if source is not None} == inside


@given(configs, st.integers(1, 60))
def test_no_step_takes_features_from_another_window_or_the_future(config, steps):
    plan = sources(config, steps)
    for step, source in enumerate(plan):
        if source is not None:
            assert source <= step and plan[source] == source
    full = [step for step, source in enumerate(plan) if source == step]
    if config.schedule == "uniform":
        assert all(later - earlier == config.interval for earlier, later in itertools.pairwise(full))


@given(st.integers(1, 80), st.integers(1, 40), st.integers(-40, 60), st.floats(1.0, 4.0))
def test_a_nonuniform_schedule_rises_inside_its_window_from_0(steps, count, center, power):
    assume(count <= steps)
    chosen = nonuniform_steps(steps, count, center, power)
    if chosen is not None:
        assert chosen[0] == 0 and len(chosen) == count
        assert all(earlier < later for earlier, later in itertools.pairwise(chosen))
        assert chosen[-1] < steps


numbers = st.lists(st.integers(1, 200), min_size=1, max_size=6, unique=True)
marks = st.one_of(st.none(), st.integers(0, 5))


def axis(name, values, mark):
    return parse_axis(name, ", ".join(f"{'*' if index == mark else ''}{value}" for index, value in enumerate(values)))


@given(numbers, numbers, marks, marks)
def test_a_grid_holds_every_pair_once_and_a_baseline_is_its_own(xs, ys, mark_x, mark_y):
    axis_x, axis_y = axis("steps", xs, mark_x), axis("batch", ys, mark_y)
    cells = make_cells(CellSettings(), axis_x, axis_y)
    assert [(cell.settings.steps, cell.settings.batch) for cell in cells] == [(x, y) for y in ys for x in xs]
    by_place = {(cell.x, cell.y): cell for cell in cells}
    assert len(by_place) == len(cells) and len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        base = by_place[baseline_of(cell, axis_x, axis_y)]
        assert baseline_of(base, axis_x, axis_y) == (base.x, base.y)


@given(numbers, st.integers(1, 200))
def test_a_found_batch_is_in_its_axis_once(values, batch):
    grown, at = with_batch(parse_axis("batch", ", ".join(map(str, values))), batch)
    assert grown.values[at].label == str(batch)
    assert [value.label for value in grown.values].count(str(batch)) == 1
    assert make_cells(CellSettings(), grown, NONE)[at].settings.batch == batch


# Also what Python's JSON reads and no file holds: lone surrogates.
texts = st.text(st.characters(), max_size=12) | st.sampled_from(["\ud800", "a\0b", "=1+1", 'a"b,c\r\nd', "\u2028"])
values = st.none() | st.booleans() | st.integers(-(10**15), 10**15) | st.floats(width=32) | texts
objects = st.dictionaries(texts, values | st.lists(values, max_size=2), max_size=3)
times = st.lists(st.none() | st.floats(0, 1e9), max_size=4)


@st.composite
def records(draw):
    request = {
        **draw(objects), "plan": draw(texts), "accelerators": draw(st.lists(texts, max_size=2)), "seed": draw(values),
        "checkpoint": draw(st.none() | st.fixed_dictionaries({"name": texts})), "precision": draw(st.none() | texts),
    }  # fmt: skip
    return RunRecord(
        run_id=new_run_id(), timestamp=draw(texts), status=draw(texts), error=draw(st.none() | texts),
        env=draw(objects), env_hash=draw(texts), request=request,
        phases_ms=draw(st.dictionaries(st.sampled_from(["text_encode", "decode", "save"]), st.floats(0, 1e9))),
        steps=draw(st.lists(objects, max_size=2)), summary={**draw(objects), "runs_ms": draw(times)},
        memory={"overall": draw(objects)}, quality=draw(st.none() | objects), artifacts=draw(objects),
        warnings=draw(st.lists(texts, max_size=2)),
    )  # fmt: skip


OF_THE_ROW = {"totals_ms", "step_time_ms", "it_per_s", "first_eval_ms"}


@given(records().filter(lambda record: not set(record.summary) & OF_THE_ROW))
def test_a_record_reads_back_the_same_from_bytes(record):
    data = record.to_json().encode("utf-8")
    again = from_json(data.decode("utf-8"))
    assert again.to_json().encode("utf-8") == data
    assert {field.name for field in fields(again)} <= set(json.loads(data))


@settings(max_examples=60)
@given(st.lists(records(), min_size=1, max_size=4))
def test_rows_come_back_from_the_table_as_they_were_written(tmp_path_factory, written):
    store = RunStore(tmp_path_factory.mktemp("table"))
    for record in written:
        assert store.append_csv(record)
    rows = read_table(store.csv_path)
    assert rows == [csv_row(record) for record in written]
    with store.csv_path.open(newline="", encoding="utf-8") as file:
        assert sum(1 for _ in csv.reader(file)) == len(written) + 1


cells = st.fixed_dictionaries({
    "time_s": st.floats(1e-9, 1e9),
    "run_id": st.datetimes(datetime(1980, 1, 1), datetime(2090, 1, 1)).map(lambda at: f"{at:%Y%m%d-%H%M%S}-00000000"),
    "timestamp": st.just("") | st.datetimes(datetime(1980, 1, 1), datetime(2090, 1, 1)).map(
        lambda at: f"{at:%Y-%m-%dT%H:%M:%S}+0000"),
})  # fmt: skip


@given(st.lists(cells, min_size=1, max_size=8), st.lists(cells, min_size=1, max_size=8))
def test_any_two_tables_of_times_can_be_compared(tmp_path_factory, first, second):
    path = tmp_path_factory.getbasetemp() / "compared.csv"

    def table(entries):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, CSV_COLUMNS)
            writer.writeheader()
            writer.writerows({"status": "ok", "plan": "p", **entry} for entry in entries)
        return runs_of(read_table(path), path)

    ((entry,), _) = compare(table(first), table(second))
    assert entry.ratio > 0 and (entry.low is None) == (entry.turns < TURNS or entry.mixture is not None)
    if entry.low is not None:
        assert entry.low <= entry.ratio <= entry.high


@st.composite
def graphs(draw):
    """Nodes of any kind, each socket linked to an earlier output that fits; a node that lacks one is left out."""
    graph, kinds = Graph(), sorted(snapshot())
    for _ in range(draw(st.integers(1, 24))):
        known = snapshot()[draw(st.sampled_from(kinds))]
        inputs = {}
        for entry in known.inputs:
            if entry.widget:
                plain = {"INT": 3, "FLOAT": 0.5, "BOOLEAN": True}.get(entry.type, "text")
                inputs[entry.name] = plain if entry.default is None else entry.default
                continue
            links = [node[slot] for node in graph.nodes for slot in range(len(node.signature.outputs))]
            fitting = [link for link in links if types_match(link.type, entry.type)]
            if fitting and (not entry.optional or draw(st.booleans())):
                inputs[entry.name] = draw(st.sampled_from(fitting))
        if all(entry.widget or entry.optional or entry.name in inputs for entry in known.inputs):
            graph.add(known.id, group=draw(st.sampled_from(GROUPS)), **inputs)
    assume(graph.nodes)
    return graph


@given(graphs())
def test_the_canvas_queues_the_graph_that_was_built(graph):
    ui = to_ui(graph, name="any", note="text", extra={})
    assert ui_to_api(json.loads(json.dumps(ui))) == graph.to_api()
    ids = {node["id"] for node in ui["nodes"]}
    assert len(ids) == len(ui["nodes"]) and {end for link in ui["links"] for end in (link[1], link[3])} <= ids
    for number, origin, slot, target, into, _ in ui["links"]:
        nodes = {node["id"]: node for node in ui["nodes"]}
        assert number in nodes[origin]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][into]["link"] == number
    boxes = list(place(graph).values())
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


@given(graphs(), st.data())
def test_upstream_is_whole_and_no_more(graph, data):
    api = graph.to_api()
    target = data.draw(st.sampled_from(list(api)))
    part = upstream(api, [target])
    links = {value[0] for node in part.values() for value in node["inputs"].values() if is_link(value)}
    assert set(part) == links | {target}
    assert upstream(part, [target]) == part
