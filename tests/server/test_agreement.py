"""The numbers of a run agree with each other, and with the clock of the server that ran it.

Every technique alone and every pair of them, alone or beside a third, small, on one server.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

pytestmark = pytest.mark.server

STEPS, SIZE = 4, 64
COUNTED = ("text_encode", "free", "to_device", "prepare", "sample", "decode", "save")
words = itertools.count()
Prompt = dict[str, Any]


@dataclass
class Run:
    """What a prompt does: its work, counted, and the names of what runs in it, in the order of the record."""

    steps: int = STEPS
    evals: tuple[int, ...] = (1,) * STEPS
    uncond: tuple[bool, ...] = (True,) * STEPS
    batch: int = 1
    repeats: int = 1
    warmup: int = 0
    tiny: bool = True
    denoise: float = 1.0
    plan: list[str] = field(default_factory=list)
    did_nothing: str = ""

    @property
    def whole_steps(self) -> int:
        """Those of the whole schedule, of which the run takes the last ones."""
        return int(self.steps / self.denoise)


def put(prompt: Prompt, number: str, class_type: str, **inputs: Any) -> None:
    """A node between the model and the sampler."""
    prompt[number] = {"class_type": class_type, "inputs": {"model": prompt["5"]["inputs"]["model"], **inputs}}
    prompt["5"]["inputs"]["model"] = [number, 0]


def heun(prompt: Prompt, run: Run) -> None:
    prompt["5"]["inputs"]["sampler_name"] = "heun"
    # The second evaluation of a step is at the noise of the next one; the last step has none.
    run.evals = tuple(1 if step == 0 else 2 for step in range(run.steps))


def one_step(prompt: Prompt, run: Run) -> None:
    prompt["5"]["inputs"]["steps"] = run.steps = 1
    run.evals, run.uncond = (1,), (True,)


def img2img(prompt: Prompt, run: Run) -> None:
    prompt["5"]["inputs"]["denoise"] = run.denoise = 0.5


def batch(prompt: Prompt, run: Run) -> None:
    prompt["4"]["inputs"]["batch_size"] = run.batch = 3


def warmup(prompt: Prompt, run: Run) -> None:
    prompt["5"]["inputs"]["warmup"] = run.warmup = 1


def repeats(prompt: Prompt, run: Run) -> None:
    prompt["5"]["inputs"]["repeats"] = run.repeats = 2


def offload(prompt: Prompt, run: Run) -> None:
    prompt["22"] = {"class_type": "SpeedLabMemoryPlan", "inputs": {
        "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "offload": "model", "budget_gb": 0.0}}  # fmt: skip
    prompt["5"]["inputs"]["model"] = ["22", 0]
    for encode in ("2", "3"):
        prompt[encode]["inputs"]["clip"] = ["22", 1]
    if not run.tiny:
        prompt["6"]["inputs"]["vae"] = ["22", 2]
    run.plan.append("memory_plan(offload=model)")


def compiled(prompt: Prompt, run: Run) -> None:
    put(prompt, "23", "SpeedLabCompileModel", backend="jit_trace", scope="auto", mode="default", dynamic="auto",
        on_failure="error")  # fmt: skip
    run.plan.append("compile(backend=jit_trace, scope=model, mode=default, dynamic=auto)")


def deepcache(prompt: Prompt, run: Run) -> None:
    put(prompt, "20", "SpeedLabDeepCache", cache_interval=2, cache_branch_id=0, start_percent=0.0, end_percent=1.0,
        schedule="uniform")  # fmt: skip
    if run.steps == 1:
        run.did_nothing = "DeepCache"
        return
    run.plan.append("deepcache(cache_interval=2, cache_branch_id=0, start_percent=0, end_percent=1, schedule=uniform)")


def dynamic_cfg(prompt: Prompt, run: Run) -> None:
    put(prompt, "21", "SpeedLabDynamicCFG", mode="fixed", stop_at=0.5, similarity=0.99)
    skipped, kept = run.whole_steps - run.steps, run.whole_steps // 2
    run.uncond = tuple(skipped + step < kept for step in range(run.steps))
    run.plan.append("dynamic_cfg(mode=fixed, stop_at=0.5)")


def full_decode(prompt: Prompt, run: Run) -> None:
    """In place of Tiny VAE, with which all others decode."""
    prompt["6"] = {"class_type": "SpeedLabVAEDecode", "inputs": {
        "samples": ["5", 0], "vae": ["1", 2], "slicing": False, "tile_size": 0, "overlap": 64,
        "precision": "auto"}}  # fmt: skip
    run.tiny = False


# In the order in which they are put into a graph: what counts steps comes after what sets them.
CHANGES: dict[str, Callable[[Prompt, Run], None]] = {
    "one step": one_step,
    "heun": heun,
    "img2img": img2img,
    "batch": batch,
    "warmup": warmup,
    "repeats": repeats,
    "full decode": full_decode,
    "offload": offload,
    "compile": compiled,
    "deepcache": deepcache,
    "dynamic cfg": dynamic_cfg,
}
PAIRS = list(itertools.combinations(CHANGES, 2))
EVERYDAY = {
    ("deepcache", "dynamic cfg"), ("compile", "dynamic cfg"), ("compile", "deepcache"), ("heun", "dynamic cfg"),
    ("img2img", "dynamic cfg"), ("warmup", "repeats"), ("full decode", "offload"), ("heun", "deepcache"),
}  # fmt: skip
assert set(PAIRS) >= EVERYDAY


def in_threes() -> list[tuple[str, ...]]:
    """Groups of three that hold all pairs which are left: each takes the most of them that a group can."""

    def pairs(group: tuple[str, ...]) -> set[tuple[str, ...]]:
        return left & {*itertools.combinations(group, 2)}

    left, groups = set(PAIRS) - EVERYDAY, []
    while left:
        groups.append(max(itertools.combinations(CHANGES, 3), key=lambda group: len(pairs(group))))
        left -= pairs(groups[-1])
    return groups


CASES = [
    pytest.param(names, id=" and ".join(names) or "plain", marks=pytest.mark.full if len(names) == 3 else ())
    for names in ((), *((name,) for name in CHANGES), *sorted(EVERYDAY), *in_threes())
]


def queued(server: Any, prompt: Prompt) -> tuple[dict[str, Any], float]:
    """The history entry of a prompt, and the seconds that the server took for it by its own clock."""
    entry = server.run(prompt)
    stamps = {kind: data["timestamp"] for kind, data in entry["status"]["messages"] if "timestamp" in data}
    ended = stamps.get("execution_success", stamps.get("execution_error"))
    return entry, (ended - stamps["execution_start"]) / 1000.0


def spent_s(phases: dict[str, Any], names: tuple[str, ...] = COUNTED) -> float:
    return sum(phases[name] for name in names if isinstance(phases.get(name), (int, float))) / 1000.0


def accounted_s(record: dict[str, Any]) -> float:
    """Seconds of a prompt that its record tells: the phases, loading, compiling, and each repeat of sampling."""
    phases = record["phases_ms"]
    repeated_s = (sum(record["summary"]["runs_ms"]) - phases["sample"]) / 1000.0
    return spent_s(phases) + spent_s(phases, ("load", "compile")) + repeated_s


@pytest.fixture(scope="module")
def build(graph_of: Callable[..., Prompt]) -> Callable[..., tuple[Prompt, Run]]:
    """A graph with these changes, and what it does; with texts of its own, so that no phase comes from a cache."""

    def make(names: tuple[str, ...], **sampler: Any) -> tuple[Prompt, Run]:
        prompt, run = graph_of(size=SIZE, text=f"a tree {next(words)}", **{"steps": STEPS, **sampler}), Run()
        prompt["3"]["inputs"]["text"] = f"blurred {next(words)}"
        for name in CHANGES:
            if name in names:
                CHANGES[name](prompt, run)
        return prompt, run

    return make


@pytest.fixture(scope="module")
def overhead_s(server: Any, build: Any) -> float:
    """What the server takes for a prompt beside all phases: one that takes no step, three times, the longest."""
    found = []
    for number in range(4):
        # At its first use Dynamic CFG looks once a process at what is fast on this CPU.
        prompt, _ = build((), denoise=0.0) if number else build(("dynamic cfg",))
        entry, wall_s = queued(server, prompt)
        phases = server.record(entry["outputs"]["7"]["speedlab"][0]["run_id"])["phases_ms"]
        found.append(wall_s - spent_s(phases, ("load", *COUNTED)))
    return max(found[1:])


@pytest.mark.parametrize("names", CASES)
def test_numbers_agree(server: Any, build: Any, overhead_s: float, names: tuple[str, ...]) -> None:
    if "offload" in names:  # the plan is made once, and is no part of the image's time
        server.run(build(names)[0])
    for left in (2, 1, 0):
        prompt, run = build(names)
        entry, wall_s = queued(server, prompt)
        assert entry["status"]["status_str"] == "success", entry["status"]
        shown = entry["outputs"]["7"]["speedlab"][0]
        record = server.record(shown["run_id"])
        ran_s = accounted_s(record)
        # What is in no number is the server's own work. Another process may have held the CPU between two nodes, not
        # three times in turn. How long a warm-up took is in no number.
        if run.warmup or ran_s >= 0.97 * wall_s - 2.0 * overhead_s:
            break
        assert left, f"{wall_s - ran_s:.3f} of {wall_s:.3f} s are in no number"
    assert ran_s <= wall_s + 0.005
    with (server.output / "speedlab" / "results.csv").open(newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["run_id"] == record["run_id"])
    phases, summary, steps = record["phases_ms"], record["summary"], record["steps"]
    # Rate and step time are the sampling time over the steps, on every surface.
    assert summary["steps"] == len(steps) == int(row["steps"]) == run.steps
    sampling_s = phases["sample"] / 1000.0
    for rate, step_s in ((summary["it_per_s"], summary["step_time_ms"] / 1000.0),
                         (shown["summary"]["it_per_s"], shown["summary"]["step_time_ms"] / 1000.0),
                         (float(row["it_per_s"]), float(row["step_time_s"]))):  # fmt: skip
        assert run.steps / rate == pytest.approx(sampling_s, rel=0.01)
        assert run.steps * step_s == pytest.approx(sampling_s, rel=0.01)
    first_run_s = sum(step["cpu_ms"] for step in steps) / 1000.0
    assert first_run_s == pytest.approx(summary["runs_ms"][0] / 1000.0, rel=0.01)
    # The phases add up to the time.
    time_s = spent_s(phases)
    assert float(row["time_s"]) == pytest.approx(time_s, rel=0.01)
    assert phases["total"] / 1000.0 == pytest.approx(time_s, rel=0.01)
    assert shown["phases_ms"] == phases
    assert summary["repeats"] == int(row["repeats"]) == len(summary["runs_ms"]) == run.repeats
    # Work is counted, not estimated.
    assert [step["evals"] for step in steps] == list(run.evals)
    assert [step["cond_rows"] for step in steps] == [run.batch * evals for evals in run.evals]
    counts = [run.batch * evals if kept else 0 for evals, kept in zip(run.evals, run.uncond, strict=True)]
    assert [step["uncond_rows"] for step in steps] == counts
    # The plan's name is what ran.
    ran = "+".join([*run.plan, *(["tiny_vae(taesd)"] if run.tiny else [])])
    assert row["plan"] == record["request"]["plan"] == shown["plan"] == (ran or "stock")
    assert row["accelerators"] == ran
    if run.did_nothing:
        assert any(run.did_nothing in warning for warning in record["warnings"])
    assert (record["roofline"] or {}).get("peak_share") is None


@pytest.mark.full
def test_no_share_of_a_peak_is_above_the_whole(server: Any, build: Any) -> None:
    prompt, _ = build((), detail="kernels")
    record = server.record(queued(server, prompt)[0]["outputs"]["7"]["speedlab"][0]["run_id"])
    assert record["roofline"]["tflops"] > 0.0
    share = record["roofline"]["peak_share"]
    assert share is None or 0.0 < share <= 100.0
    # The steps that are looked at once more are in no time.
    assert record["summary"]["steps"] / record["summary"]["it_per_s"] == pytest.approx(
        record["phases_ms"]["sample"] / 1000.0, rel=0.01
    )


def test_a_text_from_the_cache_leaves_the_time_empty(server: Any, build: Any) -> None:
    """Nobody knows what a repeat would have paid for it; no figure is better than one that is too small."""
    prompt, _ = build(())
    server.run(prompt)
    prompt["5"]["inputs"]["seed"] = 2
    entry = server.run(prompt)
    record = server.record(entry["outputs"]["7"]["speedlab"][0]["run_id"])
    assert record["phases_ms"]["text_encode"] == "cached" and record["phases_ms"]["total"] is None
    assert record["summary"]["it_per_s"] > 0
