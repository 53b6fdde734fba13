"""Hand-outs, losses and retries: the pool with workers that follow a script, and with real Ray actors."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speedlab.common.errors import ResultsError
from speedlab_tools.fleet import FleetError
from speedlab_tools.fleet.cluster import open_cluster
from speedlab_tools.fleet.pool import HOPELESS, MOST_FAILURES, Limits, Pool
from speedlab_tools.fleet.tasks import Payload, Task, Work
from speedlab_tools.fleet.worker import Done, Failed, Ready
from speedlab_tools.fleet.writer import Writer
from speedlab_tools.host.progress import Reporter

RAY = pytest.mark.skipif(sys.platform != "linux", reason="the test packages have Ray on Linux alone")
# Whoever does not answer at once is overdue.
NO_PATIENCE = {"task_s": 0.0, "start_s": 0.0, "grace_s": 0.0}


class RayError(Exception):
    """What Ray says of a process that ended."""


class RayTaskError(RayError):
    """What Ray makes of an exception that a method raised."""

    @property
    def cause(self):
        return RuntimeError(*self.args)


Gone, Killed = RayTaskError, RayError


@dataclass(eq=False)
class Reference:
    """What a call will give: `answer` None until there is one, `task` None for a start."""

    answer: object
    task: str | None


class ScriptedRay:
    """What the pool uses of Ray; `script(worker, start, text)` gives an answer or an error, None for no answer.

    `starts(worker, start)` says how a start ends; both count starts from 1. `pick` chooses which calls have ended.
    """

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, script, starts=None, pick=None):
        self.script, self.starts = script, starts or (lambda worker, start: ready(worker))
        self.pick = pick or (lambda references: references)
        self.started, self.given, self.killed, self.stopped, self.options = [], [], [], [], {}

    def remote(self, **options):
        self.options = options
        return lambda kind: SimpleNamespace(remote=lambda name: ScriptedActor(self, name))

    def wait(self, references, num_returns, timeout):
        assert 1 <= num_returns <= len(references)
        ended = self.pick([one for one in references if one.answer is not None])[:num_returns]
        return ended, [one for one in references if one not in ended]

    def get(self, reference):
        if isinstance(reference.answer, Exception):
            raise reference.answer
        return reference.answer

    def kill(self, actor, no_restart):
        self.killed.append((actor.name, no_restart))
        for reference in actor.silent:
            reference.answer = Done((b"late",), (), 1.0)


class ScriptedActor:
    def __init__(self, ray, name):
        self.ray, self.name, self.silent = ray, name, []
        self.run, self.start = self, SimpleNamespace(options=self.start_options)
        self.stop = SimpleNamespace(remote=lambda: self.call(self.ray.stopped.append(name) or "stopped"))

    def call(self, answer, task=None):
        reference = Reference(answer, task)
        self.silent += [reference] if answer is None else []
        return reference

    def start_options(self, retry_exceptions):
        assert retry_exceptions

        def remote():
            for _ in range(1 + self.ray.options["max_task_retries"]):
                self.ray.started.append(self.name)
                answer = self.ray.starts(self.name, self.ray.started.count(self.name))
                if not isinstance(answer, Exception):
                    break
            return self.call(answer)

        return SimpleNamespace(remote=remote)

    def options(self, max_task_retries):
        assert max_task_retries == 0, "the prompt goes to another worker"
        return SimpleNamespace(remote=self.remote)

    def remote(self, graph, extra, timeout_s):
        self.ray.given.append((self.name, graph["text"]))
        return self.call(self.ray.script(self.name, self.ray.started.count(self.name), graph["text"]), graph["text"])


def ready(worker):
    return Ready(f"machine of {worker}", "http://127.0.0.1:1", 1, 2)


def picture_of(text):
    return Done((f"image of {text}".encode(),), (), 0.5)


def all_well(worker, start, text):
    return picture_of(text)


def work_of(number):
    tasks = tuple(Task(n, f"{n + 1:05d}", f"prompt {n}", None, n, f"key{n}") for n in range(number))
    return Work(tasks, lambda task: Payload({"text": task.prompt}, {}))


def run(folder, ray, number=4, workers=("w1", "w2"), limits=None, specs=None, kind=object, work=None):
    """A whole run; the manifest's rows."""
    work = work or work_of(number)
    limits = Limits(**{"task_s": 100.0, "start_s": 100.0, "attempts": 3, **(limits or {})})
    specs = specs or {name: name for name in workers}
    with Writer(folder) as writer:
        todo = writer.open({}, work.tasks, restart=False, accept=False)
        pool = Pool(ray, specs, False, work, todo, writer, limits, Reporter(io.StringIO()), kind)
        try:
            with contextlib.closing(pool):
                pool.run()
        finally:
            writer.write_manifest()
            (folder / "said").write_text(pool.reporter.stream.getvalue())
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def check_whole(folder, rows, number=4):
    assert [row["index"] for row in rows] == list(range(number))
    assert {row["status"] for row in rows} == {"ok"}
    for row in rows:
        (picture,) = row["pictures"]
        data = (folder / picture["file"]).read_bytes()
        assert data == f"image of prompt {row['index']}".encode()
        assert picture["sha256"] == hashlib.sha256(data).hexdigest()
    assert len(list((folder / "pictures").iterdir())) == number


def test_tasks_are_given_in_order_each_once(tmp_path):
    ray = ScriptedRay(all_well)
    check_whole(tmp_path, run(tmp_path, ray))
    assert [text for _, text in ray.given] == [f"prompt {n}" for n in range(4)]
    assert ray.started == ray.stopped == ["w1", "w2"] and ray.killed == [("w1", True), ("w2", True)]
    assert ray.options["max_restarts"] == -1, "Ray restarts what died"
    said = (tmp_path / "said").read_text()
    assert "w1 is ready on machine of w1: process 1, ComfyUI 2 at http://127.0.0.1:1" in said and "4/4 done" in said


def test_the_manifest_is_in_order_whatever_the_answers_are(tmp_path):
    """The one that was given last answers first."""
    starts_first = lambda ended: [one for one in ended if one.task is None] or ended[-1:]  # noqa: E731
    ray = ScriptedRay(all_well, pick=starts_first)
    rows = run(tmp_path, ray, 5)
    check_whole(tmp_path, rows, 5)
    journal = [json.loads(line)["index"] for line in (tmp_path / "fleet.jsonl").read_text().splitlines()]
    assert journal == [1, 2, 3, 4, 0]
    assert {row["worker"] for row in rows} == {"w1", "w2"}
    assert {row["machine"] for row in rows} == {"machine of w1", "machine of w2"}
    assert all(row["attempts"] == 1 and row["comfyui_seconds"] == 0.5 for row in rows)


@pytest.mark.parametrize("loss", [Gone("no memory"), Killed("end of file")])
def test_the_prompt_of_a_lost_worker_goes_to_another_one(tmp_path, loss):
    ray = ScriptedRay(lambda worker, start, text: loss if (worker, start) == ("w1", 1) else picture_of(text))
    rows = run(tmp_path, ray)
    check_whole(tmp_path, rows)
    assert [row["attempts"] for row in rows] == [2, 1, 1, 1]
    assert rows[0]["worker"] == "w2"
    assert ray.started == ["w1", "w2", "w1"], "it is started again"
    assert (
        f"w1 is lost, starting it again: {'its process ended' if loss.args[0] == 'end of file' else 'no memory'}"
        in (tmp_path / "said").read_text()
    )


def test_a_worker_does_not_get_the_prompt_that_it_lost_while_another_may_do_it(tmp_path):
    """The other one is busy: the worker that is back takes the prompts behind that one meanwhile."""
    ray = ScriptedRay(
        lambda worker, start, text: Gone("no memory") if (worker, text) == ("w1", "prompt 0") else picture_of(text),
        pick=lambda ended: [one for one in ended if one.task != "prompt 1"] or ended,
    )
    check_whole(tmp_path, run(tmp_path, ray))
    numbers = [(worker, int(text.split()[1])) for worker, text in ray.given]
    assert numbers == [("w1", 0), ("w2", 1), ("w1", 2), ("w1", 3), ("w2", 0)]


def test_a_worker_gets_a_prompt_again_that_every_other_one_lost_too(tmp_path):
    losses = iter([Gone("1"), Gone("2")])
    ray = ScriptedRay(lambda worker, start, text: next(losses, picture_of(text)))
    (row,) = run(tmp_path, ray, 1)
    assert row["status"] == "ok" and row["attempts"] == 3
    assert sorted(worker for worker, _ in ray.given[:2]) == ["w1", "w2"]


def test_a_prompt_that_costs_every_worker_gets_a_row_that_says_so(tmp_path):
    def script(worker, start, text):
        return Gone("out of memory") if text == "prompt 1" else picture_of(text)

    rows = run(tmp_path, ScriptedRay(script), 8)
    assert [row["status"] for row in rows] == ["ok", "lost", *["ok"] * 6]
    assert rows[1]["attempts"] == 3 and rows[1]["pictures"] == []
    assert "3 workers were lost on it" in rows[1]["error"] and "out of memory" in rows[1]["error"]


@pytest.mark.parametrize("workers", [("w1",), ("w1", "w2")])
def test_prompts_that_cost_every_worker_do_not_keep_the_others_from_running(tmp_path, workers):
    bad = {"prompt 1", "prompt 2", "prompt 3", "prompt 4"}

    def script(worker, start, text):
        return Gone("out of memory") if text in bad else picture_of(text)

    rows = run(tmp_path, ScriptedRay(script), 9, workers)
    assert [row["status"] for row in rows] == ["ok", *["lost"] * 4, *["ok"] * 4]
    rows = run(tmp_path, again := ScriptedRay(script), 9, workers)
    assert [row["status"] for row in rows] == ["ok", *["lost"] * 4, *["ok"] * 4], "tried again, and no end before that"
    assert {text for _, text in again.given} == bad


def test_a_worker_that_loses_what_others_do_is_given_up(tmp_path):
    ray = ScriptedRay(lambda worker, start, text: Gone("its GPU") if worker == "w2" else picture_of(text))
    check_whole(tmp_path, run(tmp_path, ray, 12), 12)
    assert ray.started.count("w2") == MOST_FAILURES and ("w2", True) in ray.killed


def test_a_worker_that_loses_one_now_and_then_is_kept(tmp_path):
    number = itertools.count()

    def script(worker, start, text):
        return Gone("now and then") if worker == "w2" and next(number) % 2 else picture_of(text)

    ray = ScriptedRay(script)
    check_whole(tmp_path, run(tmp_path, ray, 24), 24)
    assert ray.started.count("w2") > MOST_FAILURES and ray.stopped == ["w1", "w2"]


def test_an_answer_that_comes_after_the_retry_is_dropped(tmp_path):
    """The first worker is overdue; its answer comes when it was killed, before another one has made the image."""
    first = itertools.count()
    ray = ScriptedRay(lambda worker, start, text: picture_of(text) if text != "prompt 0" or next(first) else None)
    rows = run(tmp_path, ray, limits=NO_PATIENCE)
    check_whole(tmp_path, rows)
    assert [row["attempts"] for row in rows] == [2, 1, 1, 1] and rows[0]["worker"] == "w2"
    journal = (tmp_path / "fleet.jsonl").read_text().splitlines()
    assert len(journal) == 4, "one row each"


def test_an_answer_that_is_there_counts_however_long_it_took(tmp_path):
    ray = ScriptedRay(all_well)
    rows = run(tmp_path, ray, 1, workers=("w1",), limits=NO_PATIENCE)
    check_whole(tmp_path, rows, 1)
    assert len(ray.given) == 1 and rows[0]["attempts"] == 1


def test_a_worker_that_does_not_answer_is_killed_and_started_again(tmp_path):
    ray = ScriptedRay(lambda worker, start, text: None if start == 1 else picture_of(text))
    rows = run(tmp_path, ray, workers=("w1",), limits=NO_PATIENCE)
    check_whole(tmp_path, rows)
    assert ray.started == ["w1", "w1"] and ray.killed == [("w1", False), ("w1", True)]
    assert [row["attempts"] for row in rows] == [2, 1, 1, 1]
    assert "it took longer than 0 s for a task and does not answer" in (tmp_path / "said").read_text()


def test_a_worker_that_never_starts_is_given_up_and_the_others_go_on(tmp_path):
    starts = lambda worker, start: ready(worker) if worker == "w1" else None  # noqa: E731
    ray = ScriptedRay(all_well, starts)
    check_whole(tmp_path, run(tmp_path, ray, limits=NO_PATIENCE))
    assert ("w2", True) in ray.killed and ray.stopped == ["w1"]
    assert "w2 is lost, it is given up: it took longer than 0 s for starting" in (tmp_path / "said").read_text()


def test_a_machine_that_is_not_fit_is_given_up_and_the_others_go_on(tmp_path):
    starts = lambda worker, start: Gone("no such model here") if worker == "w2" else ready(worker)  # noqa: E731
    ray = ScriptedRay(all_well, starts)
    check_whole(tmp_path, run(tmp_path, ray, 12), 12)
    assert ray.started.count("w2") == MOST_FAILURES
    assert "w2 is lost, it is given up: no such model here" in (tmp_path / "said").read_text()


def test_a_start_that_fails_at_first_is_tried_again(tmp_path):
    ray = ScriptedRay(all_well, lambda worker, start: Gone("busy") if start < MOST_FAILURES else ready(worker))
    check_whole(tmp_path, run(tmp_path, ray, workers=("w1",)))
    assert ray.started == ["w1"] * MOST_FAILURES


def test_no_worker_left_ends_with_the_reason_and_keeps_what_was_done(tmp_path):
    gone = Gone("the GPU fell off")
    ray = ScriptedRay(
        lambda worker, start, text: picture_of(text) if text == "prompt 0" else gone,
        lambda worker, start: ready(worker) if start == 1 else gone,
    )
    with pytest.raises(FleetError, match="No worker is left") as caught:
        run(tmp_path, ray, workers=("w1",), limits={"attempts": 9})
    assert "the GPU fell off" in str(caught.value)
    rows = run(tmp_path, again := ScriptedRay(all_well))
    check_whole(tmp_path, rows)
    assert len(again.given) == 3, "the first one was there"


def test_a_graph_that_fails_for_all_ends_early_and_one_that_fails_does_not(tmp_path):
    ray = ScriptedRay(lambda worker, start, text: Failed("no such sampler"))
    with pytest.raises(FleetError, match="failed alike"):
        run(tmp_path / "all", ray, 20)
    assert ray.stopped == ["w1", "w2"], "nobody is left behind"
    rows = (tmp_path / "all" / "manifest.jsonl").read_text().splitlines()
    assert HOPELESS <= len(rows) < 20

    def script(worker, start, text):
        return Failed("too long") if text == "prompt 2" else picture_of(text)

    rows = run(tmp_path / "one", ScriptedRay(script))
    assert [row["status"] for row in rows] == ["ok", "ok", "error", "ok"]
    assert rows[2]["error"] == "too long" and rows[2]["attempts"] == 1


def test_a_disk_that_is_full_ends_the_fleet(tmp_path, monkeypatch):
    ray = ScriptedRay(all_well)

    def full(path, data):
        raise OSError(28, "No space left on device")

    def script(worker, start, text):
        monkeypatch.setattr("speedlab_tools.fleet.writer.write_atomically", full)
        return picture_of(text)

    ray.script = script
    with pytest.raises(ResultsError, match="No space left"):
        run(tmp_path, ray)
    assert ray.stopped == ["w1", "w2"]


def test_a_record_that_makes_no_sense_is_that_prompts_error(tmp_path):
    def script(worker, start, text):
        return Done((b"x",), ('{"schema": 1}',), 0.1) if text == "prompt 1" else picture_of(text)

    rows = run(tmp_path, ScriptedRay(script))
    assert [row["status"] for row in rows] == ["ok", "error", "ok", "ok"]
    assert "record" in rows[1]["error"]


@settings(deadline=None, max_examples=100)
@given(tasks=st.integers(1, 6), attempts=st.integers(1, 3), workers=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_whatever_happens_every_task_ends_exactly_once(tasks, attempts, workers, seed):
    """Answers, failures, losses, deaths and silence in any order, and calls that end in any order."""
    dice, number = random.Random(seed), itertools.count()

    def anything(worker, start, text):
        # No two alike, else the fleet ends early.
        why = f"reason {next(number)}"
        return dice.choice([picture_of(text), picture_of(text), Failed(why), Gone(why), Killed(why), None])

    def starts(worker, start):
        return dice.choice([ready(worker), ready(worker), Gone("does not start"), None])

    def some(ended):
        return dice.sample(ended, dice.randint(min(1, len(ended)), len(ended)))

    names = [f"w{place}" for place in range(workers)]
    limits = {"attempts": attempts, "task_s": 0.0, "start_s": 100.0, "grace_s": dice.choice([0.0, 1e9])}
    if limits["grace_s"]:  # whoever is silent would be waited for without end
        anything_said, starts_said = anything, starts
        anything = lambda *call: anything_said(*call) or Gone(f"reason {next(number)}")  # noqa: E731
        starts = lambda *call: starts_said(*call) or ready(call[0])  # noqa: E731
    else:
        limits["start_s"] = 0.0
    ray, ended = ScriptedRay(anything, starts, some), True
    with tempfile.TemporaryDirectory() as folder:
        try:
            rows = run(Path(folder), ray, tasks, names, limits)
        except FleetError as error:
            # Silence is alike for whoever is silent, and three tasks that fail alike end the fleet.
            assert "No worker is left" in str(error) or "failed alike" in str(error)
            rows, ended = (
                [json.loads(line) for line in (Path(folder) / "manifest.jsonl").read_text().splitlines()],
                False,
            )
        journal = (Path(folder) / "fleet.jsonl").read_text().splitlines()
    indexes = [row["index"] for row in rows]
    assert indexes == sorted(set(indexes)) and len(journal) == len(indexes)
    assert not ended or indexes == list(range(tasks))
    given_out = Counter(text for _, text in ray.given)
    assert all(row["attempts"] == given_out[row["prompt"]] <= attempts for row in rows)
    assert all(row["attempts"] == attempts for row in rows if row["status"] == "lost")


class RealWorker:
    """An actor whose prompts tell it what to do; `folder` remembers its processes and what was done once."""

    def __init__(self, spec):
        self.name, self.folder, self.orders = spec
        self.started = False

    def starts(self, name):
        path = self.folder / f"starts-{name}"
        return [int(line) for line in path.read_text().splitlines()] if path.is_file() else []

    async def start(self):
        with (self.folder / f"starts-{self.name}").open("a") as file:
            file.write(f"{os.getpid()}\n")
        if self.orders.get("start") == self.name:
            raise RuntimeError("no such model here")
        self.started = True
        return Ready(self.name, "http://127.0.0.1:1", os.getpid(), 0)

    async def run(self, graph, extra, timeout_s):
        text = graph["text"]
        if not self.started:
            raise RuntimeError("its process ended")
        order = self.orders.get(text)
        if order == "wait":
            while len(self.starts("w2")) < MOST_FAILURES:
                await asyncio.sleep(0.05)
        elif order is not None and not (self.folder / order).exists():
            (self.folder / order).touch()
            if order == "gone":
                raise RuntimeError("ComfyUI ended")
            if order == "silent":
                await asyncio.sleep(10_000)
            os.kill(os.getpid(), signal.SIGKILL)
        return Done((f"image of {text}".encode(),), (), 0.5)

    async def stop(self):
        pass


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two workers for the tests of this file."""
    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    with open_cluster(None, 2) as made:
        # Ray's processes do not know this file.
        made.ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield made
    made.ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    signal.signal(signal.SIGTERM, handler)
    os.environ.clear()
    os.environ.update(before)


def run_on_ray(cluster, folder, orders, number=6, **limits):
    """Rows, and the processes in which each worker was started."""
    specs = {name: (name, folder, orders) for name in ("w1", "w2")}
    rows = run(folder / "out", cluster.ray, number, limits=limits, specs=specs, kind=RealWorker)
    pids = {name: [int(pid) for pid in (folder / f"starts-{name}").read_text().splitlines()] for name in specs}
    return rows, pids


@RAY
@pytest.mark.parametrize("order", ["killed", "gone"])
def test_ray_restarts_a_worker_that_died_and_its_prompt_goes_to_the_other(cluster, tmp_path, order):
    rows, _ = run_on_ray(cluster, tmp_path, {"prompt 0": order}, 30)
    check_whole(tmp_path / "out", rows, 30)
    assert [row["attempts"] for row in rows] == [2] + [1] * 29
    said = (tmp_path / "out" / "said").read_text()
    lost = said.partition(" is lost, starting it again: ")[0][-2:]
    assert rows[0]["worker"] != lost
    reason = "ComfyUI ended" if order == "gone" else "its process ended (Actor"
    assert f"{lost} is lost, starting it again: {reason}" in said


@RAY
def test_ray_restarts_a_worker_that_was_killed_because_it_did_not_answer(cluster, tmp_path):
    rows, _ = run_on_ray(cluster, tmp_path, {"prompt 0": "silent"}, 1, task_s=1.0, grace_s=0.0, attempts=9)
    check_whole(tmp_path / "out", rows, 1)
    assert rows[0]["attempts"] >= 2
    assert "for a task and does not answer" in (tmp_path / "out" / "said").read_text()


@RAY
def test_ray_tries_a_start_three_times(cluster, tmp_path):
    rows, pids = run_on_ray(cluster, tmp_path, {"start": "w2", "prompt 0": "wait"})
    check_whole(tmp_path / "out", rows, 6)
    assert len(pids["w2"]) == MOST_FAILURES and {row["worker"] for row in rows} == {"w1"}


@RAY
def test_a_lost_worker_works_on_in_a_new_process(cluster, tmp_path):
    """The only one: Ray makes it anew, and it gets the rest."""
    specs = {"w1": ("w1", tmp_path, {"prompt 1": "killed", "prompt 3": "silent"})}
    limits = {"task_s": 5.0, "grace_s": 0.0, "attempts": 9}
    rows = run(tmp_path / "out", cluster.ray, 5, limits=limits, specs=specs, kind=RealWorker)
    check_whole(tmp_path / "out", rows, 5)
    pids = (tmp_path / "starts-w1").read_text().split()
    assert len(set(pids)) >= 3, "one that died, one that was killed, one that made the rest"


@RAY
@pytest.mark.parametrize("wait_s", [0.0, pytest.param(3.0, marks=pytest.mark.full)])
def test_a_worker_that_dies_between_two_prompts_is_started_again(cluster, tmp_path, wait_s):
    """Its next prompt comes while it is dead, or to the process that Ray has made in its place."""
    starts, work, killed = tmp_path / "starts-w1", work_of(4), []

    def build(task):
        if task.index == 1 and not killed:
            killed.append(int(starts.read_text()))
            os.kill(killed[0], signal.SIGKILL)
            time.sleep(wait_s)
        return work.build(task)

    rows = run(tmp_path / "out", cluster.ray, limits={"attempts": 9}, specs={"w1": ("w1", tmp_path, {})},
               kind=RealWorker, work=Work(work.tasks, build))  # fmt: skip
    check_whole(tmp_path / "out", rows)
    assert len(set(starts.read_text().split())) == 2
    assert "w1 is lost, starting it again: its process ended" in (tmp_path / "out" / "said").read_text()
