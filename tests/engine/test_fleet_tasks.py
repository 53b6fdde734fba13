"""A fleet's order: prompts files, tasks and their graphs, the command line. No Ray, no server."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from speedlab.common.errors import UnavailableError
from speedlab.plans.axes import AXES, parse_axis, written_values
from speedlab_tools.bench.runner import parts_of
from speedlab_tools.cli.arguments import parse
from speedlab_tools.fleet import FleetError
from speedlab_tools.fleet.cluster import Cluster, import_ray
from speedlab_tools.fleet.command import worker_count
from speedlab_tools.fleet.tasks import Work, _baselines, cell_work, prompt_work, read_prompts
from speedlab_tools.scenarios.catalog import SCENARIOS, find
from speedlab_tools.scenarios.overrides import MAX_SEED
from speedlab_tools.scenarios.scenario import Prompt

PROMPTS = (Prompt("00001", "a tree", 7), Prompt("00002", "a cat", 8, "blurry"))
MAKES_PICTURES = "txt2img-default"


def write(folder, text, name="prompts.txt"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_text_file_has_one_prompt_a_line_and_counted_seeds(tmp_path):
    path = write(tmp_path, "\ufeffa tree \r\n\r\n  \n a {red|blue} cat\u2028here\n# no comment")
    prompts = read_prompts(path, seed=41, negative="blurry")
    assert [prompt.text for prompt in prompts] == ["a tree", "a {red|blue} cat\u2028here", "# no comment"]
    assert [prompt.seed for prompt in prompts] == [41, 42, 43]
    assert {prompt.negative for prompt in prompts} == {"blurry"}
    assert prompts == read_prompts(path, seed=41, negative="blurry")
    # As the scenario's own prompt: none is zeroed conditioning, a blank one is encoded.
    assert {p.negative for p in read_prompts(path, seed=41, negative=None)} == {None}
    assert {p.negative for p in read_prompts(path, seed=41, negative="")} == {""}


def test_seeds_begin_again_where_they_end(tmp_path):
    path = write(tmp_path, "a\nb\n")
    assert [prompt.seed for prompt in read_prompts(path, seed=MAX_SEED, negative=None)] == [MAX_SEED, 0]


def test_json_lines_may_name_negative_and_seed(tmp_path):
    lines = [
        {"prompt": "a"}, {"prompt": "b", "seed": MAX_SEED}, {"prompt": "c", "negative": None},
        {"prompt": "d", "negative": " "}, {"prompt": "e\nf", "negative": "g", "seed": 0},
    ]  # fmt: skip
    path = write(tmp_path, "\n\n".join(map(json.dumps, lines)), "p.JSONL")
    prompts = read_prompts(path, seed=5, negative="n")
    assert [prompt.text for prompt in prompts] == ["a", "b", "c", "d", "e\nf"]
    assert [prompt.seed for prompt in prompts] == [5, MAX_SEED, 7, 8, 0]
    assert [prompt.negative for prompt in prompts] == ["n", "n", None, None, "g"]


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "no JSON object"), ("[1]", '"prompt" is missing'), ('{"prompt": 1}', '"prompt" is missing'),
        ('{"prompt": " "}', '"prompt" is missing'), ('{"prompt": "a", "sead": 1}', "no field 'sead'"),
        ('{"prompt": "a", "seed": -1}', '"seed" is'), ('{"prompt": "a", "seed": true}', '"seed" is'),
        ('{"prompt": "a", "seed": 1.5}', '"seed" is'), ('{"prompt": "a", "seed": 18446744073709551616}', '"seed" is'),
        ('{"prompt": "a", "negative": 3}', '"negative" is'), ('{"prompt": "\\ud800"}', "half a character"),
        ("[" * 100_000, "no JSON object"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(tmp_path, line, words):
    path = write(tmp_path, '{"prompt": "fine"}\n\n' + line, "p.jsonl")
    with pytest.raises(FleetError, match="line 3") as caught:
        read_prompts(path, seed=0, negative=None)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "text, words", [("", "no prompt"), (" \n\n", "no prompt"), (b"\xff\xfe\x00a", "no UTF-8 text")]
)
def test_a_file_without_prompts_is_named(tmp_path, text, words):
    with pytest.raises(FleetError, match=words):
        read_prompts(write(tmp_path, text), seed=0, negative=None)
    with pytest.raises(FleetError, match="cannot read"):
        read_prompts(tmp_path / "none.txt", seed=0, negative=None)


def test_a_task_queues_what_bench_queues():
    scenario = find(MAKES_PICTURES)
    work = prompt_work(scenario, PROMPTS, models={})
    for task, prompt in zip(work.tasks, PROMPTS, strict=True):
        alone = scenario.with_settings(replace(scenario.settings, prompts=(prompt,)))
        ((_, graph),) = parts_of(alone)
        assert work.build(task).graph == graph
        assert (task.prompt, task.seed, task.negative) == (prompt.text, prompt.seed, prompt.negative)
        assert work.build(task).extra["extra_pnginfo"]["speedlab"]["scenario"] == scenario.id


def test_the_key_tells_tasks_apart_that_make_other_pictures():
    scenario = find(MAKES_PICTURES)
    more = scenario.with_settings(replace(scenario.settings, steps=21))
    other = [replace(PROMPTS[0], seed=9), replace(PROMPTS[0], text="b"), replace(PROMPTS[0], negative="c")]
    keys = [task.key for task in prompt_work(scenario, [PROMPTS[0], *other], models={"a": 1}).tasks]
    keys += [
        prompt_work(more, PROMPTS[:1], models={"a": 1}).tasks[0].key,
        prompt_work(scenario, PROMPTS[:1], models={"a": 2}).tasks[0].key,
        prompt_work(scenario, PROMPTS[:1], models={"a": 1}, small=True).tasks[0].key,
    ]
    assert len(set(keys)) == len(keys)
    assert prompt_work(scenario, PROMPTS[:1], models={"a": 1}).tasks[0].key == keys[0]


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=list(SCENARIOS))
def test_every_scenario_takes_prompts_or_says_why_not(scenario):
    try:
        work = prompt_work(scenario, PROMPTS, models={}, small=True)
    except FleetError as error:
        assert scenario.id in str(error) and "--cells" in str(error)
    else:
        first, second = (json.dumps(work.build(task).graph) for task in work.tasks)
        assert "a tree" in first and "a tree" not in second
    tasks = cell_work(scenario, models={}, small=True).tasks
    assert len(tasks) >= len(parts_of(scenario, True))
    assert len({task.key for task in tasks}) == len({task.name for task in tasks}) == len(tasks)


def test_the_cells_of_a_grid_are_one_task_each():
    work = cell_work(find("xy-grid"), models={})
    names = [task.name for task in work.tasks]
    assert len(names) == 9
    assert names[0] == "xy-grid, steps 10, cfg 5" and names[-1] == "xy-grid, steps 30, cfg 11"
    seen = set()
    for task in work.tasks:
        (node,) = (n for n in work.build(task).graph.values() if n["class_type"] == "SpeedLabBenchmark")
        inputs = node["inputs"]
        for axis in ("x", "y"):
            values = parse_axis(inputs[f"axis_{axis}"], inputs[f"values_{axis}"])
            assert len(values.values) == 1 and values.baseline is None
        seen.add((inputs["values_x"], inputs["values_y"]))
    assert seen == {(x, y) for x in ("10", "20", "30") for y in ("5", "8", "11")}


def values_of(work: Work) -> dict[str, tuple[str, str]]:
    found = {}
    for task in work.tasks:
        (node,) = (n for n in work.build(task).graph.values() if n["class_type"] == "SpeedLabBenchmark")
        assert (node["inputs"]["warmup"], node["inputs"]["repeats"]) == (0, 1)
        found[task.name] = node["inputs"]["values_x"], node["inputs"]["values_y"]
    return found


def test_for_quality_each_cell_runs_beside_its_baseline():
    found = values_of(cell_work(find("xy-grid"), models={}, quality=True))
    assert len(found) == 9 and found["xy-grid, steps 20, cfg 8"] == ("20", "8")
    assert found["xy-grid, steps 30, cfg 8"] == ("*20\n30", "8")
    assert found["xy-grid, steps 30, cfg 11"] == ("*20\n30", "*8\n11")


@pytest.mark.parametrize(
    ("x", "y", "baselines"),
    [("10, *20", "5, 8", ("20", None)), ("10, 20", "5, *8", (None, "8")), ("*10, 20", "5, *8", ("10", "8")),
     ("10, 20", "5, 8", ("10", "5"))],
)  # fmt: skip
def test_baselines_are_those_of_benchmark(x, y, baselines):
    inputs = {"axis_x": "steps", "values_x": x, "axis_y": "cfg", "values_y": y}
    assert _baselines(inputs) == baselines
    assert _baselines({**inputs, "axis_y": "none", "values_y": ""})[0] == (baselines[0] or "10")


def test_a_search_for_the_largest_batch_stays_whole():
    tasks = cell_work(find("sd15-throughput"), models={}).tasks
    assert [task.name for task in tasks] == ["sd15-throughput, batch 1, 2, 4, max"]
    with pytest.raises(FleetError, match="searches for the most that fits"):
        cell_work(find("sd15-throughput"), models={}, quality=True)


def test_plans_are_split_at_lines_alone():
    text = "*stock=stock\nfast=attention(sdpa)+settings(steps=4,cfg=2)\n"
    assert written_values("plan", text) == ["*stock=stock", "fast=attention(sdpa)+settings(steps=4,cfg=2)"]
    assert written_values("steps", "1, *2\n3") == ["1", "*2", "3"]
    assert "plan" in AXES


def test_a_missing_ray_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnavailableError, match="pip install ray"):
        import_ray(embedded=True)


@pytest.mark.parametrize(
    "line", [["a"], ["a", "--out", "o"], ["a", "--out", "o", "--prompts", "p", "--cells"], ["a", "--prompts", "p"],
             ["a", "--cells", "--out", "o", "--workers", "0"], ["a", "--cells", "--out", "o", "--timeout", "nan"]],
)  # fmt: skip
def test_a_command_line_that_makes_no_sense_is_refused(line, capsys):
    with pytest.raises(SystemExit) as caught:
        parse("fleet", line)
    assert caught.value.code == 2


def test_the_help_says_what_times_are_worth(capsys):
    with pytest.raises(SystemExit):
        parse("fleet", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Times of workers that share a machine are not to be compared" in text


def test_more_workers_than_the_cluster_has_are_refused():
    cluster = Cluster(None, False, gpus=2, cpus=8, nodes=3)
    assert worker_count(None, cluster, True) == 2 and worker_count(None, cluster, False) == 3
    assert worker_count(8, cluster, False) == 8
    with pytest.raises(FleetError, match="the cluster has 2 GPUs"):
        worker_count(3, cluster, True)
    with pytest.raises(FleetError, match="the cluster has 8 CPUs"):
        worker_count(9, cluster, False)
