"""Fuzzing of what reads texts and files: it finds what is broken, and finds nothing here."""

from __future__ import annotations

import csv
import subprocess
import sys

import pytest

from speedlab.common.errors import ResultsError, SpeedLabError
from speedlab_tools.host import pack_root
from speedlab_tools.stress import fuzz as outcome
from speedlab_tools.stress.command import write_faults, write_fuzz
from speedlab_tools.stress.fuzz import Tally, Target, draw, fuzz, judge, of_bytes, of_json, of_text
from speedlab_tools.stress.readers import pure_targets
from speedlab_tools.stress.writers import FaultTally

INPUTS = 250


def raising(error):
    def call(_given):
        raise error

    return Target("x", lambda rng: None, call)


@pytest.mark.parametrize(
    ("error", "verdict", "words"),
    [
        (SpeedLabError("say what to do"), "refused", ""),
        (ResultsError("also ours"), "refused", ""),
        (SpeedLabError("  "), "defect", "without a word"),
        (SpeedLabError("Traceback (most recent call last):\n  x"), "defect", "shows a traceback"),
        (ValueError("not ours"), "defect", "ValueError"),
        (RecursionError(), "defect", "RecursionError"),
        (outcome.Broken("leads out"), "defect", "leads out"),
    ],
)
def test_outcomes_are_told_apart(error, verdict, words):
    judged = judge(raising(error), None)
    assert judged.verdict == verdict and words in judged.reason


_SLOW_AND_HANGING = """
import time
from speedlab_tools.stress import fuzz
from speedlab_tools.stress.fuzz import Target, judge

fuzz.SLOW_S = 0.05

def busy(_given):
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass

def hang(_given):
    try:
        time.sleep(30)
    except Exception:  # a reader that catches everything is stopped all the same
        time.sleep(30)

assert "CPU time" in judge(Target("x", lambda rng: None, busy), None).reason
fuzz.HANGS_AFTER_S = 0.1
started = time.monotonic()
assert "no answer" in judge(Target("x", lambda rng: None, hang), None).reason
assert time.monotonic() - started < 20
"""


def test_a_slow_reader_and_one_that_hangs_are_defects():
    """In a process of its own, as the command runs: a signal that interrupts is none of the other tests' business, and
    libraries that they loaded may have left this process with a signal stack that is gone."""
    subprocess.run([sys.executable, "-c", _SLOW_AND_HANGING], cwd=pack_root(), check=True, timeout=120)


def test_a_planted_defect_is_found_and_its_input_comes_again():
    def reader(text):
        if "\0" in text:
            raise ValueError("embedded null")

    target = Target("planted", of_text(["a file name"]), reader)
    tally = fuzz(target, 2000)
    assert tally.inputs == 2000 and tally.counts["defect"] > 0
    (first, count), *_ = tally.defects.values()
    assert "\0" in draw(target, first) and count == tally.counts["defect"]
    assert draw(target, first) == draw(target, first)
    assert draw(target, first, seed=1) != draw(target, first, seed=2)


def test_samples_stay_as_they_are():
    sample = {"a": [1, {"b": None}]}
    make = of_json([sample])
    made = [draw(Target("x", make, print), index) for index in range(300)]
    assert sample == {"a": [1, {"b": None}]}
    assert sum(value != sample for value in made) > 200
    assert sum(value == sample for value in made) > 3, "now and then a whole sample, so that readers are seen to read"
    assert draw(Target("y", of_bytes([b"abc"]), print), 5) is not None


def test_nothing_that_reads_is_broken(tmp_path):
    broken = {}
    read = 0
    for target in pure_targets(tmp_path):
        tally = fuzz(target, INPUTS)
        read += tally.inputs
        assert tally.counts["fine"], f"{target.name} reads nothing at all"
        if tally.defects:
            broken[target.name] = tally.defects
    assert not broken
    assert read >= 14 * INPUTS


def test_the_figures_are_kept_as_a_table(tmp_path):
    tally = Tally("axis")
    tally.counts.update(fine=3, refused=4)
    path = write_fuzz(tmp_path / "results", [tally], 7)
    with path.open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (row["reader"], row["inputs"], row["refused"], row["defects"], row["seed"]) == ("axis", "7", "4", "0", "7")
    faults = write_faults(tmp_path / "results", [FaultTally("cancelled", 10, 9, 8, ["one"])], 7)
    with faults.open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (row["fault"], row["faults"], row["runs"], row["halves"], row["broken"]) == (
        "cancelled",
        "10",
        "9",
        "8",
        "1",
    )
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResultsError, match="cannot write"):
        write_fuzz(tmp_path / "file", [tally], 7)
