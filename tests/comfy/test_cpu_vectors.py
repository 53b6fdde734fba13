"""Whether inductor may use the vector units: asked directly, and no process started for each set of instructions."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch


@pytest.fixture
def vectors(engine: Any) -> Any:
    module = engine("techniques.cpu.vectors")
    module.known_to_work.cache_clear()
    yield module
    module.known_to_work.cache_clear()


def test_it_says_what_inductors_own_test_says(vectors: Any) -> None:
    widest = vectors.widest_vectors()
    assert vectors.known_to_work() == (widest is not None and sys.platform == "linux")
    if widest is not None:
        assert widest.check_build(type(widest)._avx_code)


@pytest.mark.parametrize("lacking", ["function", "instructions", "compiler", "insides"])
def test_what_cannot_be_told_is_left_to_inductor(vectors: Any, monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    from torch._inductor import cpp_builder, cpu_vec_isa

    if lacking == "function":
        monkeypatch.setattr(vectors, "_FUNCTIONS", dict.fromkeys(vectors._FUNCTIONS, "Sleef_of_no_build"))
    elif lacking == "instructions":
        monkeypatch.setattr(cpu_vec_isa.VecAVX2, "_arch_flags", "-mof-no-processor")
        monkeypatch.setattr(cpu_vec_isa, "supported_vec_isa_list", [cpu_vec_isa.VecAVX2()])
    elif lacking == "compiler":
        monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "no-such-compiler")
    else:
        monkeypatch.delattr(cpu_vec_isa, "x86_isa_checker")
    assert vectors.known_to_work() is False


def test_the_answer_holds_while_code_is_compiled_for_a_cpu(vectors: Any, engine: Any) -> None:
    limits, config = engine("techniques.compile.backends.dynamo").limits, torch._inductor.config.cpp
    before = config.vec_isa_ok
    with limits(4, torch.device("cpu")):
        assert config.vec_isa_ok is (True if vectors.known_to_work() else before)
    with limits(4, torch.device("cuda")):
        assert config.vec_isa_ok is before
    assert config.vec_isa_ok is before
