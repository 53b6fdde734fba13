"""Queue, retries and one result a task: the ledger, and the driver's loop with workers that follow a script."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speedlab.common.errors import ResultsError
from speedlab_tools.fleet.driver import HOPELESS, Fleet, FleetProgress, Limits
from speedlab_tools.fleet.folder import FleetFolder, Keeper
from speedlab_tools.fleet.messages import Done, Event, Failed, FleetError, Gone, Ready
from speedlab_tools.fleet.pool import MOST_FAILURES, Ledger
from speedlab_tools.fleet.tasks import Payload, Task, Work


def test_tasks_are_given_in_order_and_end_once():
    ledger = Ledger(range(3), 2)
    first, second = ledger.take("a"), ledger.take("b")
    assert (first.task, second.task, first.attempt) == (0, 1, 1)
    assert ledger.answered(first.ticket) == first
    assert ledger.answered(first.ticket) is None and ledger.late == 1
    assert ledger.left == 2 and ledger.waiting == 1


def test_a_lost_task_goes_to_another_worker_first():
    ledger = Ledger(range(2), 3)
    lost = ledger.take("a")
    assert ledger.lost(lost.ticket) is None
    assert ledger.take("a", ["a", "b"]).task == 1
    again = ledger.take("b", ["a", "b"])
    assert (again.task, again.attempt) == (0, 2)
    assert ledger.lost(again.ticket) is None
    assert ledger.take("a", ["a", "b"]).attempt == 3, "every colleague has lost it too"


def test_a_task_is_given_up_after_its_last_attempt():
    ledger = Ledger(range(1), 2)
    assert ledger.lost(ledger.take("a").ticket) is None
    last = ledger.take("a")
    assert ledger.lost(last.ticket) == last
    assert ledger.lost(last.ticket) is None
    assert ledger.left == 0 and ledger.take("a") is None
    assert ledger.answered(last.ticket) is None, "its row is written already"


def test_a_late_answer_counts_where_it_is_the_first():
    ledger = Ledger(range(1), 3)
    slow = ledger.take("a")
    ledger.lost(slow.ticket)
    assert ledger.answered(slow.ticket) == slow
    assert ledger.take("b") is None, "nobody makes it again"
    assert ledger.left == 0


def test_of_two_answers_the_first_one_counts():
    ledger = Ledger(range(1), 3)
    slow = ledger.take("a")
    ledger.lost(slow.ticket)
    retry = ledger.take("b")
    assert ledger.answered(slow.ticket) == slow
    assert ledger.answered(retry.ticket) is None
    assert ledger.lost(retry.ticket) is None and ledger.left == 0 and ledger.late == 1


@settings(deadline=None, max_examples=300)
@given(tasks=st.integers(0, 6), attempts=st.integers(1, 3), moves=st.lists(st.tuples(
    st.sampled_from(["take", "answer", "lose"]), st.integers(0, 30)), max_size=120))  # fmt: skip
def test_whatever_happens_every_task_ends_exactly_once(tasks, attempts, moves):
    ledger, given_out, ended = Ledger(range(tasks), attempts), [], Counter()
    names = ["a", "b", "c"]
    for move, number in moves:
        if move == "take":
            hand_out = ledger.take(names[number % 3], names)
            given_out += [hand_out] if hand_out else []
        elif given_out:
            hand_out = given_out[number % len(given_out)]
            end = (ledger.answered if move == "answer" else ledger.lost)(hand_out.ticket)
            ended.update([end.task] if end else [])
        assert all(hand_out.attempt <= attempts for hand_out in given_out)
        assert len(ended) + ledger.left == tasks
    while ledger.left:
        hand_out = next((h for name in names if (h := ledger.take(name, names))), None)
        open_ones = [hand_out] if hand_out else [h for h in given_out if h.task not in ended]
        for one in open_ones:
            end = ledger.answered(one.ticket) or ledger.lost(one.ticket)
            ended.update([end.task] if end else [])
    assert set(ended.values()) <= {1} and len(ended) == tasks


class ScriptedCrew:
    """Workers that do what a script says. `script(worker, hire, job)` gives the answers to one job, in order."""

    def __init__(self, script, starts=None):
        self.script, self.starts = script, starts or (lambda worker, hire: [ready(worker)])
        self.events, self.hired, self.dismissed, self.given = deque(), [], [], []

    def hire(self, worker, hire):
        self.hired.append((worker, hire))
        self.events += [Event(worker, hire, None, answer) for answer in self.starts(worker, hire)]

    def give(self, worker, hire, job):
        self.given.append((worker, hire, job))
        self.events += [Event(worker, hire, job.ticket, answer) for answer in self.script(worker, hire, job)]

    def dismiss(self, worker, hire):
        self.dismissed.append((worker, hire))

    def wait(self, timeout_s):
        return [self.events.popleft()] if self.events else []


def ready(worker):
    return Ready(f"machine of {worker}", "http://127.0.0.1:1", 1, 2)


def picture_of(job):
    return Done((f"picture of {job.graph['text']}".encode(),), (), 0.5)


def work_of(number):
    tasks = tuple(Task(n, f"{n + 1:05d}", f"prompt {n}", None, n, f"key{n}") for n in range(number))
    return Work(tasks, lambda task: Payload({"text": task.prompt}, {}))


def run(tmp_path, crew, number=4, workers=("w1", "w2"), attempts=3, clock=None):
    """A whole run; the manifest's rows."""
    work = work_of(number)
    with FleetFolder(tmp_path) as folder:
        todo = folder.open({}, work.tasks, restart=False, accept=False)
        options = {} if clock is None else {"clock": clock}
        fleet = Fleet(work, todo, crew, workers, Keeper(folder), Limits(10.0, 20.0, attempts),
                      FleetProgress(number, number - len(todo), io.StringIO()), **options)  # fmt: skip
        try:
            fleet.run()
        finally:
            folder.write_manifest()
    return [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]


def check_whole(tmp_path, rows, number=4):
    assert [row["index"] for row in rows] == list(range(number))
    assert {row["status"] for row in rows} == {"ok"}
    for row in rows:
        (picture,) = row["pictures"]
        data = (tmp_path / picture["file"]).read_bytes()
        assert data == f"picture of prompt {row['index']}".encode()
        assert picture["sha256"] == hashlib.sha256(data).hexdigest()
    assert len(list((tmp_path / "pictures").iterdir())) == number


def test_the_manifest_is_in_order_whatever_the_answers_are(tmp_path):
    held = []

    def script(worker, hire, job):
        held.append(Event(worker, hire, job.ticket, picture_of(job)))
        return []

    crew = ScriptedCrew(script)
    crew.wait = lambda timeout_s: [crew.events.popleft()] if crew.events else [held.pop()]
    rows = run(tmp_path, crew, 5)
    check_whole(tmp_path, rows, 5)
    assert {row["worker"] for row in rows} == {"w1", "w2"}
    assert {row["machine"] for row in rows} == {"machine of w1", "machine of w2"}
    assert all(row["attempts"] == 1 and row["comfyui_seconds"] == 0.5 for row in rows)


def test_the_prompt_of_a_lost_worker_goes_to_another_one(tmp_path):
    crew = ScriptedCrew(lambda worker, hire, job: [Gone("killed") if (worker, hire) == ("w1", 1) else picture_of(job)])
    rows = run(tmp_path, crew)
    check_whole(tmp_path, rows)
    assert [row["attempts"] for row in rows] == [2, 1, 1, 1]
    assert rows[0]["worker"] == "w2"
    assert ("w1", 2) in crew.hired and crew.dismissed == [("w1", 1)]


def test_a_prompt_that_costs_every_worker_gets_a_row_that_says_so(tmp_path):
    def script(worker, hire, job):
        return [Gone("out of memory") if job.graph["text"] == "prompt 1" else picture_of(job)]

    rows = run(tmp_path, ScriptedCrew(script), 8)
    assert [row["status"] for row in rows] == ["ok", "lost", *["ok"] * 6]
    assert rows[1]["attempts"] == 3 and rows[1]["pictures"] == []
    assert "3 workers were lost on it" in rows[1]["error"] and "out of memory" in rows[1]["error"]


@pytest.mark.parametrize("workers", [("w1",), ("w1", "w2")])
def test_prompts_that_cost_every_worker_do_not_keep_the_others_from_running(tmp_path, workers):
    bad = {"prompt 1", "prompt 2", "prompt 3", "prompt 4"}

    def script(worker, hire, job):
        return [Gone("out of memory") if job.graph["text"] in bad else picture_of(job)]

    rows = run(tmp_path, ScriptedCrew(script), 9, workers)
    assert [row["status"] for row in rows] == ["ok", *["lost"] * 4, *["ok"] * 4]
    rows = run(tmp_path, again := ScriptedCrew(script), 9, workers)
    assert [row["status"] for row in rows] == ["ok", *["lost"] * 4, *["ok"] * 4], "tried again, and no end before that"
    assert {job.graph["text"] for _, _, job in again.given} == bad


def test_a_worker_that_loses_what_others_do_is_given_up(tmp_path):
    crew = ScriptedCrew(lambda worker, hire, job: [Gone("its card") if worker == "w2" else picture_of(job)])
    check_whole(tmp_path, run(tmp_path, crew, 12), 12)
    assert sum(worker == "w2" for worker, _ in crew.hired) == MOST_FAILURES


def test_an_answer_that_comes_after_the_retry_is_dropped(tmp_path):
    """The first worker is overdue; its answer comes when another one has made the picture."""
    now = [0.0]
    late = []

    def script(worker, hire, job):
        if job.graph["text"] == "prompt 0" and not late:
            late.append(Event(worker, hire, job.ticket, Done((b"late",), (), 1.0)))
            now[0] += 1000.0
            return []
        return [picture_of(job)]

    crew = ScriptedCrew(script)
    told = iter([1])

    def wait(timeout_s):
        if crew.events:
            return [crew.events.popleft()]
        return [late[0]] if late and next(told, None) else []

    crew.wait = wait
    rows = run(tmp_path, crew, clock=lambda: now[0])
    check_whole(tmp_path, rows)


def test_a_late_answer_that_is_the_first_is_taken(tmp_path):
    """The worker is thought lost, answers all the same, and no retry is made of it."""

    def script(worker, hire, job):
        return [Gone("silent"), picture_of(job)] if (worker, hire) == ("w1", 1) else [picture_of(job)]

    def starts(worker, hire):
        return [ready(worker)] if hire == 1 else []

    crew = ScriptedCrew(script, starts)
    rows = run(tmp_path, crew, 1, workers=("w1",))
    check_whole(tmp_path, rows, 1)
    assert len(crew.given) == 1 and rows[0]["attempts"] == 1


def test_a_worker_that_does_not_answer_is_replaced(tmp_path):
    """It never starts, then it never answers a task; both times another start does the work."""
    now = [0.0]

    def script(worker, hire, job):
        return [] if hire == 2 else [picture_of(job)]

    crew = ScriptedCrew(script, lambda worker, hire: [] if hire == 1 else [ready(worker)])
    wait = crew.wait

    def passing(timeout_s):
        now[0] += timeout_s
        return wait(timeout_s)

    crew.wait = passing
    rows = run(tmp_path, crew, workers=("w1",), clock=lambda: now[0])
    check_whole(tmp_path, rows)
    assert crew.hired == [("w1", 1), ("w1", 2), ("w1", 3)]
    assert crew.dismissed == [("w1", 1), ("w1", 2)]
    assert [row["attempts"] for row in rows] == [2, 1, 1, 1]


def test_a_machine_that_is_not_fit_is_given_up_and_the_others_go_on(tmp_path):
    def starts(worker, hire):
        return [Gone("no such model here")] if worker == "w2" else [ready(worker)]

    crew = ScriptedCrew(lambda w, h, job: [picture_of(job)], starts)
    check_whole(tmp_path, run(tmp_path, crew, 12), 12)
    assert sum(worker == "w2" for worker, _ in crew.hired) == MOST_FAILURES


def test_no_worker_left_ends_with_the_reason_and_keeps_what_was_done(tmp_path):
    gone = Gone("the card fell off")

    def script(worker, hire, job):
        return [picture_of(job)] if job.graph["text"] == "prompt 0" else [gone]

    def starts(worker, hire):
        return [ready(worker)] if hire == 1 else [gone]

    with pytest.raises(FleetError, match="No worker is left") as caught:
        run(tmp_path, ScriptedCrew(script, starts), workers=("w1",), attempts=9)
    assert "the card fell off" in str(caught.value)
    rows = run(tmp_path, crew := ScriptedCrew(lambda w, h, job: [picture_of(job)]))
    check_whole(tmp_path, rows)
    assert len(crew.given) == 3, "the first one was there"


def test_a_graph_that_fails_for_all_ends_early_and_one_that_fails_does_not(tmp_path):
    with pytest.raises(FleetError, match="failed alike"):
        run(tmp_path / "all", ScriptedCrew(lambda w, h, job: [Failed("no such sampler")]), 20)
    rows = (tmp_path / "all" / "manifest.jsonl").read_text().splitlines()
    assert HOPELESS <= len(rows) < 20

    def script(worker, hire, job):
        return [Failed("too long") if job.graph["text"] == "prompt 2" else picture_of(job)]

    rows = run(tmp_path / "one", ScriptedCrew(script))
    assert [row["status"] for row in rows] == ["ok", "ok", "error", "ok"]
    assert rows[2]["error"] == "too long" and rows[2]["attempts"] == 1


def test_a_disk_that_is_full_ends_the_fleet(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("speedlab_tools.fleet.folder.write_atomically", full)
    with pytest.raises(ResultsError, match="No space left"):
        run(tmp_path, ScriptedCrew(lambda w, h, job: [picture_of(job)]))


def test_a_record_that_makes_no_sense_is_that_prompts_error(tmp_path):
    def script(worker, hire, job):
        broken = Done((b"x",), ('{"schema": 1}',), 0.1)
        return [broken if job.graph["text"] == "prompt 1" else picture_of(job)]

    rows = run(tmp_path, ScriptedCrew(script))
    assert [row["status"] for row in rows] == ["ok", "error", "ok", "ok"]
    assert "record" in rows[1]["error"]
