"""Patchers of other kinds where the real ones cannot run.

DynamicPatcher: ComfyUI's dynamic VRAM. The real class, `ModelPatcherDynamic`, needs a GPU and gives way to ModelPatcher
on a CPU. This one was written after reading it in ComfyUI 0.33.0 (comfy/model_patcher.py): it calls itself dynamic, is
cloned as a plain patcher on weights that `cached_patcher_init` loads again, and loading leaves LoRAs in
`weight_lowvram_function` and nothing in `weight_function`. It pages nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

NO_WAY = "Cannot create non-dynamic delegate: cached_patcher_init is not initialized."


class WholePatcher(ModelPatcher):
    """A plain patcher with what newer ModelPatchers have."""

    def is_dynamic(self) -> bool:
        return False

    def get_clone_model_override(self) -> Any:
        return self.model, (self.backup, {}, self.object_patches_backup, self.pinned)


class DynamicPatcher(ModelPatcher):
    """What is_dynamic() and clone() of the real one do, and what its load() leaves at the layers."""

    cached_patcher_init: Any = None

    def is_dynamic(self) -> bool:
        return True

    def clone(self, disable_dynamic: bool = False, model_override: Any = None) -> Any:
        if disable_dynamic and model_override is None:
            if self.cached_patcher_init is None:
                raise RuntimeError(NO_WAY)
            again = self.cached_patcher_init[0](*self.cached_patcher_init[1], disable_dynamic=True)
            if len(self.cached_patcher_init) > 2:
                again = again[self.cached_patcher_init[2]]
            model_override = again.get_clone_model_override()
        clone = super().clone()
        clone.cached_patcher_init = self.cached_patcher_init
        if disable_dynamic:
            clone.__class__ = WholePatcher
            clone.model, (clone.backup, *_, clone.object_patches_backup, clone.pinned) = model_override
        return clone

    def load(
        self,
        device_to: Any = None,
        lowvram_model_memory: Any = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
        dirty: bool = False,
    ) -> None:
        assert not force_patch_weights
        assert not full_load
        for name, module in self.model.named_modules():
            if not hasattr(module, "comfy_cast_weights"):
                continue
            module.comfy_cast_weights = True
            for weight in ("weight", "bias"):
                patches = self.patches.get(f"{name}.{weight}")
                setattr(module, f"{weight}_lowvram_function", patches)
                setattr(module, f"{weight}_function", [])
        self.model.device = device_to
        self.model.current_weight_patches_uuid = self.patches_uuid

    def partially_load(self, device_to: Any, extra_memory: Any = 0, force_patch_weights: bool = False) -> None:
        assert not force_patch_weights
        self.unpatch_model(self.offload_device, unpatch_weights=False)
        self.patch_model(load_weights=False)
        self.load(device_to)

    def partially_unload(self, device_to: Any, memory_to_free: Any = 0, force_patch_weights: bool = False) -> int:
        assert not force_patch_weights
        return 0

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        super().unpatch_model(device_to=None, unpatch_weights=False)


def as_dynamic(patcher: Any, init: Any = None) -> Any:
    """A clone of a plain patcher that is under dynamic VRAM; `init` is how its loader makes it anew."""
    clone = patcher.clone()
    clone.__class__ = DynamicPatcher
    clone.cached_patcher_init = init
    return clone


def as_whole(patcher: Any) -> Any:
    """What a loader gives with `disable_dynamic`."""
    clone = patcher.clone()
    clone.__class__ = WholePatcher
    return clone


def is_at_rest(model: torch.nn.Module) -> bool:
    """Whether nobody has put a model under dynamic VRAM."""
    return not any(hasattr(module, "weight_lowvram_function") for module in model.modules())


class GgufPatcher(ModelPatcher):
    """How ComfyUI-GGUF's patcher (its nodes.py, read in November 2026) clones and loads: to its own class whatever that
    of the one at hand is, and with nothing but the device by place."""

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        mine, self.__class__ = self.__class__, GgufPatcher
        try:
            clone = super().clone(*args, **kwargs)
        finally:
            self.__class__ = mine
        clone.__class__ = GgufPatcher
        return clone

    def load(self, *args: Any, force_patch_weights: bool = False, **kwargs: Any) -> None:
        super().load(*args, force_patch_weights=True, **kwargs)
