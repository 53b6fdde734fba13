"""How many bytes of tensors are alive at once during a forward, counted and not estimated.

On the `meta` device a forward allocates nothing and computes nothing, yet makes and drops the tensors that a real one
would: the count holds for any device whose attention keeps no matrix of scores (SDPA's fused kernels). Workspace that
a kernel takes for itself, as cuDNN may, is not seen.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations inside make: `peak` is the most that was alive at once.

    Tensors that exist before are not counted. `least` leaves out storages that are smaller.
    """

    def __init__(self, least: int = 0) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._least = least
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What is an argument was there before this operation: an operation in place or a view makes nothing new.
        given = {self._key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and self._key(leaf) not in given:
                self._count(leaf.untyped_storage())
        return result

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or size < self._least:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


# What ComfyUI hangs on a layer while it pages its weights (dynamic VRAM): handles of memory that a copy would free.
_PAGING = (
    "_v", "_v_signature", "_v_weight", "_v_bias", "_v_block", "_pin_state", "_pins", "_prefetch",
    "weight_lowvram_function", "bias_lowvram_function",
)  # fmt: skip


def on_meta(network: torch.nn.Module) -> torch.nn.Module:
    """A copy of a network's structure on the `meta` device; no weight is copied, no hook comes along."""
    memo: dict[int, Any] = {}
    for weight in network.parameters():
        memo[id(weight)] = torch.nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
    for buffer in network.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    for part in network.modules():
        # Neither hooks, nor what ComfyUI does to offloaded weights in use: that holds patches with tensors of its own.
        left_out = [part._forward_hooks, part._forward_pre_hooks]
        left_out += [getattr(part, name) for name in ("weight_function", "bias_function") if hasattr(part, name)]
        for thing in left_out:
            memo[id(thing)] = type(thing)()
        for name in _PAGING:
            handle = part.__dict__.get(name)
            if not isinstance(handle, (type(None), bool, int, float, str, bytes)):
                memo[id(handle)] = None
    result = copy.deepcopy(network, memo)
    for part in result.modules():
        for name in _PAGING:
            part.__dict__.pop(name, None)
    return result


def peak_bytes(forward: Callable[[], Any]) -> int:
    """Bytes alive at the worst moment of `forward`, its result included."""
    with torch.inference_mode(), LiveBytes() as count:
        result = forward()
    del result
    return count.peak


def fused_attention(_function: Any, query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """In place of attention on `meta`: what a fused kernel returns, and nothing beside it."""
    return torch.empty_like(query)
