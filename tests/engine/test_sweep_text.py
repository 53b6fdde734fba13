"""The texts of the Benchmark node, its grid and the search for the largest batch: properties and the errors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speedlab.plans.axes import AXES, NONE, CellSettings, baseline_of, make_cells, parse_axis
from speedlab.plans.batch_search import BatchSearch, predicted_bytes, saturation_point, too_large
from speedlab.plans.plan_text import (
    MAIN,
    PlanText,
    SweepTextError,
    TechniqueText,
    parse_plan,
    parse_stack,
    parse_technique,
)
from speedlab.plans.sweep import largest_note, saturation_notes

names = st.from_regex(r"[a-z_][a-z0-9_]{0,12}", fullmatch=True)
values = st.from_regex(r"[A-Za-z0-9_.:/-]{1,12}", fullmatch=True)
techniques = st.builds(TechniqueText, names, st.dictionaries(st.one_of(st.just(MAIN), names), values, max_size=4))
plans = st.builds(PlanText, names, st.lists(techniques, min_size=1, max_size=4, unique_by=lambda t: t.name).map(tuple))
GIB = 2**30


@given(plans)
def test_a_plan_reads_back_what_it_says(plan):
    if plan.techniques == (TechniqueText("stock"),):
        return
    assert parse_plan(plan.words()) == plan


def test_a_technique_stands_once_in_a_plan():
    with pytest.raises(SweepTextError, match="has deepcache twice"):
        parse_plan("fast=deepcache(3)+tiny+deepcache(5)")
    assert len(parse_plan("settings(steps=4)+settings(cfg=2)").techniques) == 2


@given(techniques, st.sampled_from([" ", "  ", "\t"]))
def test_blanks_do_not_matter(technique, blank):
    spaced = (
        technique.words()
        .replace("(", f"{blank}({blank}")
        .replace(",", f"{blank},{blank}")
        .replace("=", f"{blank}={blank}")
    )
    assert parse_technique(blank + spaced + blank) == technique


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused_with_a_message(text):
    for parse in (parse_plan, parse_stack, parse_technique, *(lambda t, a=axis: parse_axis(a, t) for axis in AXES)):
        try:
            parse(text)
        except SweepTextError as error:
            assert str(error)


@given(st.lists(st.integers(1, 10000), min_size=1, max_size=20, unique=True), st.sampled_from([",", "\n", " ,\n "]))
def test_numbers_keep_their_order_whatever_parts_them(numbers, separator):
    axis = parse_axis("steps", separator.join(map(str, numbers)))
    assert [value.apply(CellSettings()).steps for value in axis.values] == numbers
    assert axis.baseline is None


@given(st.integers(8, 2048), st.integers(8, 2048))
def test_resolutions(width, height):
    (value,) = parse_axis("resolution", f"{8 * width}x{8 * height}").values
    settings = value.apply(CellSettings())
    assert (settings.width, settings.height) == (8 * width, 8 * height)


def test_what_each_axis_sets():
    def only(axis: str, text: str) -> CellSettings:
        (value,) = parse_axis(axis, text).values
        return value.apply(CellSettings())

    sampled = only("sampler", "dpmpp_2m/karras@20")
    assert (sampled.sampler, sampled.scheduler, sampled.steps) == ("dpmpp_2m", "karras", 20)
    assert only("sampler", "euler").steps == CellSettings().steps
    assert only("precision", "fp16").weights == TechniqueText("weights", {MAIN: "fp16"})
    assert only("deepcache_interval", "3").techniques == (TechniqueText("deepcache", {MAIN: "3"}),)
    assert only("deepcache_interval", "off") == CellSettings()
    assert only("cfg_stop_at", "0.5").techniques[0].name == "dynamic_cfg"
    assert only("offload", "model").techniques[0].name == "memory_plan"
    assert only("compile", "(backend=inductor, mode=default)").techniques[0].options["mode"] == "default"
    assert only("decoder", "taesd").decoder == TechniqueText("tiny", {MAIN: "taesd"})
    assert only("decoder", "full(tile_size=512, overlap=32)").decoder.options == {"tile_size": "512", "overlap": "32"}
    assert only("handoff", "0.8").handoff == 0.8
    assert (only("sigmas", "simple").scheduler, only("sigmas", "simple").sigmas) == ("simple", None)
    assert (only("sigmas", "karras").scheduler, only("sigmas", "karras").sigmas) == ("karras", None)
    assert only("sigmas", "ays").sigmas == TechniqueText("ays")
    assert only("sigmas", "gits(1.1)").schedule == "gits(1.1)"
    assert only("sigmas", "karras(rho=5)").sigmas == TechniqueText("karras", {"rho": "5"})
    assert only("plan", "a=settings(sigmas=ays(SDXL), steps=10)").sigmas == TechniqueText("ays", {MAIN: "SDXL"})
    assert only("plan", "a=settings(sigmas=ays, scheduler=simple)").schedule == "simple"
    assert only("prompt_tokens", "77").prompt_tokens == 77
    fast = only("plan", "fast=weights(fp16)+attention(sdpa)+tiny+settings(steps=30, sampler=ddim)")
    assert (fast.plan, fast.steps, fast.sampler, fast.decoder.name) == ("fast", 30, "ddim", "tiny")
    assert fast.weights is not None and [t.name for t in fast.techniques] == ["attention"]


@pytest.mark.parametrize(
    ("axis", "text", "words"),
    [
        ("nonsense", "1", "The axes are batch"),
        ("steps", " , \n", "no values"),
        ("steps", "1.5", "no whole number"),
        ("cfg", "nan", "no number"),
        ("cfg", "101", "choose 0 to 100"),
        ("batch", "0", "choose 1 to 4096"),
        ("batch", "max, 4", "max stands last"),
        ("batch", "1, *max", "no baseline"),
        ("batch", "max@0", "a limit of 1 to 4096"),
        ("batch", "1, max@8192", "a limit of 1 to 4096"),
        ("batch", "5, max@3", "above the limit"),
        ("batch", "max@" + "9" * 5000, "no whole number"),
        ("resolution", "9" * 5000, "no resolution"),
        ("sampler", "euler@" + "9" * 5000, "no sampler"),
        ("steps", "9" * 5000, "no whole number|choose 1 to"),
        ("resolution", "512x", "no resolution"),
        ("resolution", "32x64", "multiples of 8 from 64"),
        ("steps", "*1, *2", "more than one baseline"),
        ("deepcache_interval", "0", "choose 1 to 100"),
        ("handoff", "2", "0 to 1"),
        ("sigmas", "simple(rho=5)", "no such schedule"),
        ("sigmas", "ays(steps=10)", "leave steps out"),
        ("sigmas", "gits(", "without its partner"),
        ("prompt_tokens", "1", "choose 2 to"),
        ("plan", "=deepcache", "no name before"),
        ("plan", "a=deepcache(3", "without its partner"),
        ("plan", "a=deepcache(3)+", "is no technique"),
        ("plan", "a=deepcache(x=1,x=2)", "more than one option"),
        ("plan", "a=settings(speed=2)", "the settings of a plan are"),
    ],
)
def test_what_cannot_be_is_said(axis, text, words):
    with pytest.raises(SweepTextError, match=words):
        parse_axis(axis, text)


def test_an_open_end():
    axis = parse_axis("batch", "1, 2, max")
    assert axis.open_end and axis.most is None and [v.label for v in axis.values] == ["1", "2"]
    assert parse_axis("batch", "max@16").most == parse_axis("batch", "MAX@16").most == 16
    assert [v.label for v in parse_axis("batch", "max").values] == ["1"]


def test_the_grid_and_its_baselines():
    x, y = parse_axis("steps", "1, 2, *3"), parse_axis("cfg", "5, 6")
    cells = make_cells(CellSettings(), x, y)
    assert [(c.settings.steps, c.settings.cfg) for c in cells] == [(1, 5), (2, 5), (3, 5), (1, 6), (2, 6), (3, 6)]
    # A mark on one axis alone compares along that axis.
    assert [baseline_of(c, x, y) for c in cells] == [(2, 0)] * 3 + [(2, 1)] * 3
    both = parse_axis("cfg", "5, *6")
    assert {baseline_of(c, x, both) for c in cells} == {(2, 1)}
    none = parse_axis("steps", "1, 2")
    assert {baseline_of(c, none, NONE) for c in make_cells(CellSettings(), none, NONE)} == {(0, 0)}
    with pytest.raises(SweepTextError, match="Both axes"):
        make_cells(CellSettings(), x, x)


def test_off_takes_a_technique_out_and_a_value_keeps_its_other_options():
    base = CellSettings().with_stack(parse_plan("deepcache(cache_interval=3,cache_branch_id=2)+freeu").techniques)
    off, two = (value.apply(base) for value in parse_axis("deepcache_interval", "off, 2").values)
    assert [t.name for t in off.techniques] == ["freeu"]
    assert {t.name: t.options for t in two.techniques}["deepcache"] == {"cache_branch_id": "2", MAIN: "2"}
    (plain,) = parse_axis("precision", "off").values
    assert plain.apply(CellSettings(weights=TechniqueText("weights", {MAIN: "fp16"}))).weights is None


def test_samplers_name_their_rows():
    cells = make_cells(CellSettings(), parse_axis("sampler", "euler, heun"), NONE)
    assert [cell.plan() for cell in cells] == ["sampler=euler", "sampler=heun"]


@pytest.mark.parametrize(
    ("other", "values"),
    [("steps", "euler@30, heun"), ("scheduler", "euler/karras, heun"), ("sigmas", "euler/karras, heun")],
)
def test_a_sampler_that_sets_the_other_axis_too_is_refused(other, values):
    samplers, axis = parse_axis("sampler", values), parse_axis(other, "10, 20" if other == "steps" else "normal")
    for x, y in ((samplers, axis), (axis, samplers)):
        with pytest.raises(SweepTextError, match=f"sets {other} too"):
            make_cells(CellSettings(), x, y)


def test_a_search_ends_at_an_error():
    search = BatchSearch()
    for batch, status in ((1, "ok"), (2, "ok"), (4, "error")):
        search.note(batch, status)
    assert search.next() is None
    note = largest_note(search, "a")
    assert note == "a: The search for the largest batch ended in an error at batch 4. Batch 2 fits."


def test_plan_names_tell_cells_apart():
    cells = make_cells(
        CellSettings(), parse_axis("plan", "a=deepcache\nb=stock"), parse_axis("attention", "sdpa, split")
    )
    assert [c.plan() for c in cells] == [
        "a, attention=sdpa", "b, attention=sdpa", "a, attention=split", "b, attention=split"
    ]  # fmt: skip
    # The axis is applied behind the plan whichever axis it stands on.
    flipped = make_cells(CellSettings(), parse_axis("attention", "sdpa"), parse_axis("plan", "a=attention(split)"))
    assert flipped[0].settings.techniques == (TechniqueText("attention", {MAIN: "sdpa"}),)


@given(st.integers(1, 3000), st.lists(st.integers(1, 64), max_size=4))
def test_the_search_finds_the_largest_that_fits(largest, first):
    search = BatchSearch()
    for batch in first:
        search.tried(batch, batch <= largest)
    tries = 0
    while (batch := search.next()) is not None:
        assert batch not in search.fits | search.fails
        search.tried(batch, batch <= largest)
        tries += 1
    assert max(search.fits) == largest
    assert tries <= 2 * largest.bit_length() + 8


def test_the_search_ends_where_nothing_fits_and_at_a_limit():
    search = BatchSearch()
    search.tried(2, False)
    assert search.next() == 1
    search.tried(1, False)
    assert search.next() is None
    limited = BatchSearch(most=6)
    for batch in (1, 2, 4, 6):
        limited.tried(batch, True)
    assert limited.next() is None


def test_memory_is_predicted_by_a_line():
    assert predicted_bytes({1: 3 * GIB}, GIB, 4) == 8 * GIB
    assert predicted_bytes({1: 3 * GIB, 2: 4 * GIB}, GIB, 4) == 5 * GIB
    assert predicted_bytes({1: 3 * GIB, 2: 3 * GIB}, GIB, 4) == 4 * GIB
    assert predicted_bytes({}, GIB, 4) == 0
    assert too_large(7 * GIB, GIB, GIB, 10 * GIB) is None
    assert "more than 80% of the 10.7 GB" in (too_large(9 * GIB, GIB, GIB, 10 * GIB) or "")


def test_the_saturation_point():
    assert saturation_point({1: 10.0, 2: 19.0, 4: 20.0, 8: 19.9}) == 2
    assert saturation_point({1: 20.0, 2: 19.9, 4: 19.8}) == 1
    # The best is the largest that was measured, or there is too little beyond it.
    assert saturation_point({1: 47.5, 2: 68.0}) is None
    assert saturation_point({1: 10.0, 2: 19.5, 4: 20.0}) is None
    assert saturation_point({1: 20.0, 2: 19.0}) is None
    assert saturation_point({1: 10.0}) is None


@given(st.dictionaries(st.integers(1, 64), st.floats(0.1, 1e4), max_size=8))
def test_saturation_is_claimed_only_with_a_larger_size_that_gains_nothing(rates):
    point = saturation_point(rates)
    if point is None:
        return
    assert len(rates) >= 3 and point < max(rates)
    assert all(rates[batch] <= rates[point] / 0.95 for batch in rates if batch > point)
    assert rates[max(rates)] < max(rates.values()) or max(rates.values()) in [rates[b] for b in rates if b < max(rates)]


def cell_runs(batch, rate, repeats):
    """Of a cell only what the note reads."""
    (cell,) = make_cells(CellSettings(), parse_axis("batch", str(batch)), NONE)
    record = SimpleNamespace(summary={"images_per_min": rate})
    return SimpleNamespace(cell=cell, record=record, repeats=[()] * repeats, status="ok")


def test_saturation_needs_repeats():
    rates = {1: 10.0, 2: 20.0, 4: 20.1, 8: 19.9}
    (note,) = saturation_notes([cell_runs(batch, rate, 2) for batch, rate in rates.items()])
    assert note == "Throughput saturates at batch 2: 20.0 images a minute, best 20.1, batch 8 19.9."
    assert saturation_notes([cell_runs(batch, rate, 1) for batch, rate in rates.items()]) == []
    assert saturation_notes([cell_runs(1, 47.5, 5), cell_runs(2, 68.0, 5)]) == []


def test_the_largest_batch_is_claimed_only_where_the_next_one_ran_out_of_memory():
    def told(outcomes, **options):
        search = BatchSearch(**options)
        for batch, status, was_tried in outcomes:
            search.note(batch, status, was_tried)
        assert search.next() is None
        return largest_note(search, "")

    fits = [(1, "ok", True), (2, "ok", True), (4, "ok", True)]
    assert told([*fits, (8, "oom", True), (6, "oom", True), (5, "oom", True)]) == "The largest batch that fits is 4."
    for text, options in (
        ("the limit given is 4", {"most": 4}),
        ("none is tried above 4", {"most": 4, "limited": False}),
    ):
        assert told(fits, **options) == f"Batch 4 fits; whether a larger one does is not known: {text}."
    predicted = told([*fits, (8, "oom", False), (6, "oom", False), (5, "oom", False)])
    assert predicted == (
        "Batch 4 fits; whether a larger one does is not known: batch 5 was not tried, because it would run out of "
        "memory by prediction."
    )
    assert told([(2, "oom", True), (1, "oom", True)]) == "No batch size fits."
