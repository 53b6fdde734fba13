"""A node that lets the memory run out at a chosen tensor operation of the prompts after it."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_counting: list["_Counting"] = []


class _Counting(TorchDispatchMode):
    """Counts every operation of this thread and raises at number `at` (0: never), once."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (injected)")
        return func(*args, **(kwargs or {}))


class StressMemory:
    """Ends an earlier count, tells it, and with `at` 0 or more starts another. All prompts run in one thread."""

    RETURN_TYPES = ()
    FUNCTION = "count"
    OUTPUT_NODE = True
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"at": ("INT", {"default": -1, "min": -1, "max": 2**31})}}

    @classmethod
    def IS_CHANGED(cls, at: int) -> float:
        return float("nan")

    def count(self, at: int) -> dict[str, Any]:
        counted = 0
        while _counting:
            ended = _counting.pop()
            ended.__exit__(None, None, None)
            counted = ended.count
        if at >= 0:
            _counting.append(_Counting(at))
            _counting[-1].__enter__()
        return {"ui": {"text": [str(counted)]}}
