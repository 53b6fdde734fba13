"""ComfyUI runs prompts in a thread of its own; inference mode, autocast, profilers and tracers belong to one each."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

SETTINGS = {"seed": 3, "steps": 4, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}


def in_worker(work: Callable[[], Any]) -> Any:
    """What `work` returns, or its error, in inference mode of another thread, as ComfyUI's executor calls nodes."""
    came: dict[str, Any] = {}

    def run() -> None:
        try:
            with torch.inference_mode():
                came["result"] = work()
        except BaseException as error:
            came["error"] = error

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    worker.join()
    if "error" in came:
        raise came["error"]
    return came["result"]


def state() -> tuple[Any, ...]:
    """What a run may set in this thread, or in the process."""
    return (
        torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"), torch.get_num_threads(), torch.backends.cudnn.benchmark,
        torch.backends.cuda.matmul.allow_tf32, torch.autograd._profiler_enabled(), torch.jit.is_tracing(),
    )  # fmt: skip


@pytest.fixture
def sample(node: Any, tiny: Any) -> Callable[..., tuple[torch.Tensor, Any]]:
    """Latent and record of Profile Sampler."""

    def run(model: Any = None, **changes: Any) -> tuple[torch.Tensor, Any]:
        out = node("SpeedLabProfileSampler").sample(
            model=model or tiny.model, positive=tiny.cond(1), negative=tiny.cond(2), latent_image=tiny.latent(),
            **{**SETTINGS, **changes},
        )  # fmt: skip
        latent, record, *_ = out["result"]
        return latent["samples"], record

    return run


PLANS: dict[str, tuple[str, tuple[Any, ...]] | None] = {
    "stock": None,
    "DeepCache": ("SpeedLabDeepCache", (2, 0, 0.0, 1.0, "uniform")),
    "Dynamic CFG": ("SpeedLabDynamicCFG", ("fixed", 0.5, 0.99)),
    "Attention": ("SpeedLabAttention", ("split",)),
    "autocast": ("SpeedLabPrecision", (*("keep",) * 5, "bf16", "keep")),
    "flags": ("SpeedLabPrecision", ("on", "on", "on", "keep", "channels_last", "off", "keep")),
    "Compile Model": ("SpeedLabCompileModel", ("jit_trace", "auto", "default", "auto", "error")),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_technique_gives_the_same_bits_in_the_worker(sample: Any, node: Any, tiny: Any, name: str) -> None:
    def run() -> tuple[torch.Tensor, tuple[Any, ...], tuple[Any, ...]]:
        before, plan = state(), PLANS[name]
        model = tiny.model
        if plan is not None:
            made = node(plan[0])
            model = getattr(made, made.FUNCTION)(model, *plan[1])[0]
        return sample(model)[0], before, state()

    worker, before, after = in_worker(run)
    assert before == after
    here, before, after = run()
    assert before == after
    assert torch.equal(worker, here)
    assert torch.isfinite(worker).all()


def test_operators_are_counted_in_the_worker_as_here(sample: Any) -> None:
    """A profiler that records the thread that started it would see nothing of a run in another."""

    def calls() -> dict[str, int]:
        return {row["name"]: row["calls"] for row in sample(detail="kernels")[1].kernels}

    sample(detail="kernels")
    worker = in_worker(calls)
    assert worker == calls() and worker["aten::convolution"] > 0


def test_a_cancel_of_another_thread_ends_the_run_and_leaves_nothing(sample: Any, tiny: Any) -> None:
    """The server's thread takes the request, the worker samples."""
    mm = importlib.import_module("comfy.model_management")
    under_way, cancelled = threading.Event(), threading.Event()

    def wait(executor: Any, *args: Any, **kwargs: Any) -> Any:
        under_way.set()
        assert cancelled.wait(60)
        return executor(*args, **kwargs)

    model = tiny.model.clone()
    model.add_wrapper_with_key("predict_noise", "wait", wait)
    before = state()

    def cancel() -> None:
        assert under_way.wait(60)
        mm.interrupt_current_processing()
        cancelled.set()

    other = threading.Thread(target=cancel)
    other.start()
    with pytest.raises(mm.InterruptProcessingException):
        in_worker(lambda: sample(model))
    other.join()
    assert state() == before
    plain = sample()[0]
    assert torch.equal(in_worker(lambda: sample()[0]), plain)
