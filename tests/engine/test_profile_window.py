"""Which steps are profiled."""

from __future__ import annotations

import pytest

from speedlab.measure.profile_window import choose_window
from speedlab.measure.trace import StepRow


def rows(plan: str, evals: int = 1, without: int = 0):
    """F is a full step, c a cached one, - one without an evaluation; the last `without` steps have no uncond."""
    count = len(plan)
    return [
        StepRow(n, 1.0, None, 1.0, 0 if kind == "-" else evals, 1, int(n < count - without), kind == "c")
        for n, kind in enumerate(plan)
    ]


def owners(table):
    return [row.index for row in table for _ in range(row.evals)]


@pytest.mark.parametrize(
    ("plan", "steps"),
    [
        ("FFFFFFFF", (1, 2, 3)),
        ("FFF", (1, 2)),
        ("FF", (1,)),
        ("F", (0,)),
        ("FccFccFcc", (3, 4, 5)),
        ("FccFc", (0, 1, 2)),  # the only whole interval
        ("Fc", (0, 1)),
        ("FccF", (0, 1, 2)),
        ("FFFFFcFcFF", (4, 5)),  # a window that begins late
        ("FFccFFFF", (1, 2, 3)),
        ("--FFFFF", (3, 4, 5)),
    ],
)
def test_the_steps(plan, steps):
    table = rows(plan)
    window = choose_window(table, owners(table))
    assert window.steps == steps
    assert [owners(table)[n] for n in range(window.first, window.end)] == list(steps)


def test_all_evaluations_of_a_step_belong_to_it():
    table = rows("FFFFF", evals=2)
    window = choose_window(table, owners(table))
    assert (window.first, window.end) == (2, 8)


def test_no_evaluation_no_window():
    assert choose_window(rows("--"), []) is None
    assert choose_window([], []) is None


def test_a_long_interval_is_cut_and_says_so():
    table = rows("F" + "c" * 30)
    window = choose_window(table, owners(table))
    assert window.steps == tuple(range(8))
    assert "first 8" in window.notes[0]


def test_steps_without_guidance_outside_the_window_are_told():
    table = rows("FFFFFFFF", without=4)
    assert "4 of 8 steps ran without" in choose_window(table, owners(table)).notes[0]
    assert choose_window(rows("FFFF", without=4), owners(rows("FFFF"))).notes == ()
