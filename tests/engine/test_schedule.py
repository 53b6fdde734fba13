"""Step positions and fractions: pure arithmetic, checked over its whole range."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speedlab.patching.schedule import StepTracker, order_of, step_of, steps_before


@st.composite
def schedules(draw):
    ratios = draw(st.lists(st.floats(1.01, 2.0), min_size=1, max_size=60))
    sigmas = [0.03]
    for ratio in ratios:
        sigmas.append(sigmas[-1] * ratio)
    return [*reversed(sigmas), 0.0]


@given(schedules())
def test_every_sigma_of_the_schedule_is_its_own_step(sigmas):
    for index, sigma in enumerate(sigmas[:-1]):
        assert step_of(sigma, sigmas) == index


@given(schedules(), st.floats(0.0, 1.0))
def test_a_sigma_between_two_steps_belongs_to_the_earlier(sigmas, where):
    for index in range(len(sigmas) - 2):
        high, low = sigmas[index], sigmas[index + 1]
        between = low + (high - low) * (0.01 + 0.98 * where)
        if between > low * 1.0001:
            assert step_of(between, sigmas) == index


def test_a_sigma_above_the_schedule_is_the_first_step_and_below_it_the_last():
    assert step_of(99.0, [10.0, 5.0, 1.0, 0.0]) == 0
    assert step_of(0.001, [10.0, 5.0, 1.0, 0.0]) == 2


def test_the_rounding_of_an_exp_log_round_trip_does_not_move_a_step():
    assert step_of(5.0 * (1 + 3e-7), [10.0, 5.0, 1.0, 0.0]) == 1


def test_a_schedule_without_steps_is_refused():
    for make in (lambda: step_of(1.0, [1.0]), lambda: StepTracker((1.0,))):
        with pytest.raises(ValueError, match="two sigmas"):
            make()


@given(schedules())
def test_a_rising_schedule_names_steps_from_below(sigmas):
    rising = [0.0001, *sigmas[-2::-1]]
    assert order_of(sigmas) == "falls" and order_of(rising) == "rises"
    for index, sigma in enumerate(rising[:-1]):
        assert step_of(sigma, rising) == index
        assert step_of((sigma * rising[index + 1]) ** 0.5, rising) == index


@st.composite
def any_schedules(draw):
    """Falling, rising, flipped, joined, repeated, or in no order at all; few values, so that many stand twice."""
    value = st.sampled_from([0.03, 0.5, 1.0, 2.0, 3.5, 6.0, 9.0, 14.6])
    free = st.lists(value, min_size=2, max_size=16)
    part = st.lists(value, min_size=1, max_size=8, unique=True).map(
        lambda some: sorted(some, reverse=draw(st.booleans()))
    )
    joined = st.lists(part, min_size=1, max_size=4).map(lambda parts: [s for some in parts for s in some])
    sigmas = draw(st.one_of(free, joined.filter(lambda some: len(some) > 1)))
    return tuple(sigmas) if draw(st.booleans()) else (*sigmas, 0.0)


def run_through(sigmas, evaluations, callback=True):
    """The steps that a tracker finds. `evaluations(i)`: the sigmas of sampler step i before and behind its callback."""
    tracker, found = StepTracker(sigmas), []
    for index in range(len(sigmas) - 1):
        before, behind = evaluations(index)
        found += [tracker.locate(sigma) for sigma in before]
        if callback:
            tracker.step_done(index)
        found += [tracker.locate(sigma) for sigma in behind]
    return found, tracker


@given(any_schedules())
def test_a_sampler_of_one_evaluation_a_step_counts_right_in_any_schedule(sigmas):
    found, tracker = run_through(sigmas, lambda i: ([sigmas[i]], []))
    assert found == list(range(len(sigmas) - 1))
    assert not tracker.went_back


@given(any_schedules())
def test_a_look_at_the_next_sigma_belongs_to_the_next_step_in_any_schedule(sigmas):
    """As Heun evaluates."""
    steps = len(sigmas) - 1
    found, tracker = run_through(sigmas, lambda i: ([sigmas[i]], [sigmas[i + 1]]))
    assert found == [step for i in range(steps) for step in (i, min(i + 1, steps - 1))]
    assert not tracker.went_back


@given(any_schedules())
def test_an_evaluation_in_the_middle_of_a_step_belongs_to_it_in_any_schedule(sigmas):
    """As DPM-Solver-2 evaluates; the middle of a step that leads to 0 is left out, as samplers do."""
    pairs = list(itertools.pairwise(sigmas))
    middles = [[(a * b) ** 0.5] if b > 0 else [] for a, b in pairs]
    found, _ = run_through(sigmas, lambda i: ([sigmas[i]], middles[i]))
    expected = [step for i, middle in enumerate(middles) for step in [i] * (1 + len(middle))]
    # A middle that is the very sigma of the step behind cannot be told from a look ahead.
    unclear = {i for i, middle in enumerate(middles) if middle and any(abs(middle[0] - s) < 1e-4 * s for s in sigmas)}
    if not unclear:
        assert found == expected


@given(any_schedules(), st.integers(1, 2))
def test_evaluations_within_a_step_are_its_own_where_a_sigma_follows_itself_or_the_step_is_unknown(sigmas, count):
    """As DPM-Solver-2 and SEEDS evaluate, in a schedule that falls but for sigmas that stand twice in a row."""
    falling = sorted({*sigmas, 20.0}, reverse=True)
    sigmas = tuple(itertools.chain(*([sigma] * (1 + (n % 3 == len(sigmas) % 3)) for n, sigma in enumerate(falling))))
    within = [
        [a ** (1 - k / (count + 1)) * b ** (k / (count + 1)) for k in range(1, count + 1)] if b > 0 else []
        for a, b in itertools.pairwise(sigmas)
    ]
    found, _ = run_through(sigmas, lambda i: ([sigmas[i]], within[i]))
    expected = [i for i, some in enumerate(within) for _ in range(1 + len(some))]
    if len(set(sigmas[:2])) == 2:
        assert found == expected
    else:  # nothing had shown yet what the sampler does, and what it does next shows that it was misunderstood
        known = [step for step in found if step is not None]
        assert found == known + [None] * (len(found) - len(known))
        assert len(known) <= 1 + 2 * (1 + count)


def ahead(sigmas, index):
    """As Heun++ evaluates behind its callback."""
    steps, end = len(sigmas) - 1, sigmas[-1]
    if sigmas[index + 1] == end:
        return []
    return [sigmas[index + 1]] if sigmas[index + 2] == end else list(sigmas[index + 1 : index + 3])[: steps - index]


@given(schedules(), st.booleans())
def test_looks_two_sigmas_ahead_belong_to_their_steps(sigmas, flipped):
    sigmas = tuple(sigmas if not flipped else [0.0001, *sigmas[-2::-1]])
    steps = len(sigmas) - 1
    found, tracker = run_through(sigmas, lambda i: ([sigmas[i]], ahead(sigmas, i)))
    assert [found.count(step) for step in range(steps)] == [min(step + 1, 3) for step in range(steps)]
    assert not tracker.went_back


@given(any_schedules())
def test_a_sampler_without_a_callback_counts_right_where_no_sigma_follows_itself(sigmas):
    if any(a == b for a, b in itertools.pairwise(sigmas)):
        return
    found, _ = run_through(sigmas, lambda i: ([sigmas[i]], []), callback=False)
    assert found == list(range(len(sigmas) - 1))


def test_a_sampler_that_adds_noise_again_goes_back():
    """A restart: sigmas of a falling schedule, of which a stretch comes twice."""
    tracker = StepTracker((14.0, 9.0, 5.0, 2.0, 1.0, 0.0))
    seen = []
    for index, sigma in enumerate((14.0, 9.0, 5.0, 2.0, 9.0, 5.0, 2.0, 1.0)):
        seen.append((tracker.locate(sigma), tracker.went_back))
        tracker.step_done(index)
    assert seen == [(0, False), (1, False), (2, False), (3, False), (1, True), (2, False), (3, False), (4, False)]


def test_what_a_mixed_schedule_does_not_lead_through_has_no_place():
    tracker = StepTracker((14.0, 5.0, 9.0, 1.0, 0.0))
    assert tracker.order == "mixed" and tracker.locate(14.0) == 0
    assert tracker.locate(float("nan")) is None and tracker.locate(20.0) is None
    assert tracker.locate(0.5) is None, "a later step leads there, and this sampler has not come to it"


def test_parts_of_a_schedule_run_one_after_another_go_on_counting():
    """A sampler that calls another one for each part, whose callback begins again at 0."""
    sigmas = (14.0, 5.0, 9.0, 5.0, 9.0, 5.0, 0.0)
    tracker, seen = StepTracker(sigmas), []
    for step, sigma in enumerate(sigmas[:-1]):
        seen.append(tracker.locate(sigma))
        tracker.step_done(step % 2)
    assert seen == list(range(6))


@pytest.mark.parametrize(
    ("fraction", "steps", "expected"),
    [
        (0.75, 20, 15),
        (0.0, 20, 0),
        (1.0, 20, 20),
        (0.7, 10, 7),
        (0.3, 10, 3),
        (0.29, 10, 2),
        (0.5, 7, 3),
        (0.55, 20, 11),
        (0.58, 50, 29),  # 28.999999999999996
    ],
)
def test_fractions_count_whole_steps(fraction, steps, expected):
    assert steps_before(fraction, steps) == expected
