"""ComfyUI's dynamic VRAM: weights that it pages in layer by layer, and clones of such models that it loads whole.

A compiler needs weights that stay in place. Core's own compile node takes a clone on a second set of weights for that,
made anew by the loader's `cached_patcher_init`; so does this module, and all such clones of a model share one set.
"""

from __future__ import annotations

import weakref
from typing import Any
from weakref import WeakKeyDictionary

from ..common.core import is_dynamic, is_out_of_memory
from ..common.errors import UnavailableError, first_line

# The set of weights that is loaded whole, by the module that is paged, and what its patchers share beside it.
_whole: WeakKeyDictionary[Any, weakref.ref[Any]] = WeakKeyDictionary()
_shared: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def loaded_whole(patcher: Any, who: str) -> Any:
    """`patcher` itself where ComfyUI loads it whole, else a clone on weights of its own that is.

    Raises UnavailableError, naming `who` needs it, where the model's loader left no way to load it again.
    """
    if not is_dynamic(patcher):
        return patcher
    known = _whole.get(patcher.model)
    model = None if known is None else known()
    try:
        override = None if model is None else (model, _shared[model])
        clone = patcher.clone(disable_dynamic=True, model_override=override)
    except Exception as error:  # a loader raises whatever reading its file raises
        if is_out_of_memory(error):
            raise
        raise UnavailableError(
            f"{who} needs weights that stay in place, and under ComfyUI's dynamic VRAM that takes loading the model a "
            f"second time, which its loader does not support ({first_line(error)}). Load it with Load Checkpoint or "
            "Load VAE, or start ComfyUI with --disable-dynamic-vram."
        ) from error
    if model is None:
        model, shared = clone.get_clone_model_override()
        _whole[patcher.model], _shared[model] = weakref.ref(model), shared
    return clone


def is_paged(network: Any) -> bool:
    """Whether ComfyUI pages weights of `network`: what it left at its layers holds its patches or pages."""
    return any(getattr(part, name, None) is not None for part in network.modules() for name in _AT_LAYERS)


_AT_LAYERS = ("weight_lowvram_function", "bias_lowvram_function", "_v")
