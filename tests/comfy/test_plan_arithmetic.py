"""What Memory Plan adds up before anything runs: what holds for every plan, checked on many."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

sizes = st.integers(0, 10**13)
part = st.tuples(sizes, sizes, sizes)
# At least one part on the device, among others wherever they lie.
drawn = st.builds(
    lambda here, others, place: [*others[:place], (*here, True), *others[place:]],
    part,
    st.lists(st.builds(lambda sizes, on: (*sizes, on), part, st.booleans()), max_size=3),
    st.integers(0, 3),
)


@pytest.fixture(scope="session")
def predictions(engine):
    return engine("memory.predict")


@given(parts=drawn)
def test_each_way_of_offloading_needs_no_more_than_the_one_before(predictions, parts):
    listed = [predictions.Part("phase", *part) for part in parts]
    made = [predictions.predict(listed, offload) for offload in predictions.OFFLOADS]
    assert made[0].peak >= made[1].peak >= made[2].peak
    here = [part for part in listed if part.on_device]
    for prediction in made:
        assert [phase.activations for phase in prediction.phases] == [part.activations for part in here]
        assert prediction.worst.total == prediction.peak == max(phase.total for phase in prediction.phases)
    assert {phase.weights for phase in made[0].phases} == {sum(part.weights for part in here)}
    assert [phase.weights for phase in made[1].phases] == [part.weights for part in here]
    assert [phase.weights for phase in made[2].phases] == [min(part.streamed, part.weights) for part in here]


@given(part=st.sampled_from(["text", "unet", "vae", "none such"]), counted=st.integers(-1, 10**14))
def test_a_measured_factor_stays_between_what_was_measured(predictions, part, counted):
    rows = [factor for _, factor in predictions._measured().get(("cpu", part), ())]
    factor = predictions.measured_factor("cpu", part, counted)
    assert factor == 1.0 if not rows or counted <= 0 else min(rows) <= factor <= max(rows)
