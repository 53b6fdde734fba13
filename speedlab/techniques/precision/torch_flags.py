"""PyTorch's process-wide speed flags: set for a while, then put back exactly as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Restore = Callable[[], None]


@dataclass(frozen=True)
class Flag:
    """A flag: `exists` in this PyTorch; `set` switches it and returns what puts the former state back."""

    exists: Callable[[], bool]
    set: Callable[[bool], Restore]


@contextmanager
def flags_set(wanted: Mapping[str, bool]) -> Iterator[None]:
    """Switch the named FLAGS on or off; afterwards, whatever happened, each is as it was before."""
    with ExitStack() as stack:
        for name, on in wanted.items():
            stack.callback(FLAGS[name].set(on))
        yield


def _plain(owner: Any, name: str) -> Flag:
    def exists() -> bool:
        try:
            getattr(owner, name)
        except AttributeError:
            return False
        return True

    def switch(on: bool) -> Restore:
        before = getattr(owner, name)
        setattr(owner, name, on)
        return lambda: setattr(owner, name, before)

    return Flag(exists, switch)


def _precisions(*owners: Any) -> Restore:
    """What puts back `fp32_precision` of each owner; PyTorch before 2.9 has none."""
    before = [(owner, owner.fp32_precision) for owner in owners if hasattr(owner, "fp32_precision")]

    def restore() -> None:
        for owner, precision in before:
            owner.fp32_precision = precision

    return restore


def _readable(read: Callable[[], Any]) -> Any | None:
    """None where PyTorch refuses to answer, as it does once a program has used its newer interface."""
    try:
        return read()
    except RuntimeError:
        return None


def _set_precision(owners: tuple[Any, ...], on: bool) -> None:
    for owner in owners:
        owner.fp32_precision = "tf32" if on else "ieee"


def _switch_tf32(on: bool) -> Restore:
    """The older interface sets the newer one too, so it is used unless that would leave the two in disagreement."""
    matmul = torch.backends.cuda.matmul
    newer = _precisions(*(owner for owner in (matmul, _mkldnn_matmul()) if owner is not None))
    if _readable(lambda: matmul.allow_tf32) is None:
        _set_precision((matmul,), on)
        return newer
    before, level = matmul.allow_tf32, _readable(torch.get_float32_matmul_precision)
    matmul.allow_tf32 = on

    def restore() -> None:
        matmul.allow_tf32 = before
        if level is not None:  # there are three levels behind the two values of the flag
            torch.set_float32_matmul_precision(level)
        newer()

    return restore


def _mkldnn_matmul() -> Any | None:
    return getattr(torch.backends.mkldnn, "matmul", None)


def _switch_cudnn_tf32(on: bool) -> Restore:
    cudnn = torch.backends.cudnn
    parts = tuple(part for part in (getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None)) if part is not None)
    newer = _precisions(*parts)
    before = _readable(lambda: cudnn.allow_tf32)
    if before is None:
        _set_precision(parts, on)
        return newer
    cudnn.allow_tf32 = on

    def restore() -> None:
        cudnn.allow_tf32 = before
        newer()

    return restore


FLAGS: dict[str, Flag] = {
    "tf32": Flag(lambda: True, _switch_tf32),
    "cudnn_tf32": Flag(lambda: True, _switch_cudnn_tf32),
    "cudnn_benchmark": _plain(torch.backends.cudnn, "benchmark"),
    "fp16_accumulation": _plain(torch.backends.cuda.matmul, "allow_fp16_accumulation"),
}
