"""A ModelPatcher that follows a memory plan wherever ComfyUI loads it.

ComfyUI decides when a model is loaded and with how much room; this class steers it through the arguments of its own
methods. Clones keep the plan, and so do the plain ones that ComfyUI makes of a model under its dynamic VRAM; there the
plan itself does nothing, for ComfyUI keeps what fits and evicts on demand. Other patchers of the same weights, without
a plan, are not affected: ComfyUI detaches this one before it loads another.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..common.core import is_dynamic
from ..patching.compiled import is_compiled_in_place, refusal_of_streaming
from ..patching.wrappers import SharedState
from .streaming import ModelStream, networks

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher as _Patcher
else:
    _Patcher = object  # the real base is the class of the patcher at hand, which may be another than ModelPatcher

Offload = Literal["none", "model", "sequential"]
# ComfyUI's own word for "nothing fits": every weight stays offloaded.
_NO_ROOM = 0.1


@dataclass
class Group:
    """The models that one Memory Plan node was given: they take turns on the device. Known by their weights."""

    members: list[weakref.ref[Any]] = field(default_factory=list)
    streams: weakref.WeakSet[ModelStream] = field(default_factory=weakref.WeakSet)

    def holds(self, model: Any) -> bool:
        """Whether `model` (a torch module inside a patcher) is one of the group."""
        return any(member() is model for member in self.members)

    def add(self, model: Any) -> None:
        if not self.holds(model):
            self.members.append(weakref.ref(model))

    def settle(self) -> None:
        """Bring home the weights that a forward cut off in the middle left on the device."""
        for stream in tuple(self.streams):
            stream.settle()

    def unload(self, but: Any = None) -> None:
        """Take the group's models off the device, all but `but`; nothing else is touched."""
        import comfy.model_management as mm

        mine = [
            one for one in mm.current_loaded_models
            if _weights(one) is not None and _weights(one) is not but and self.holds(_weights(one))
            and not is_dynamic(one.model)
            # Beside another model a streamed one may stay: it has nothing on the device, and loading it again would
            # lock all its weights in the host's memory again.
            and (but is None or one.model_loaded_memory() > 0)
        ]  # fmt: skip
        for device in {one.device for one in mine}:
            others = [one for one in mm.current_loaded_models if not any(one is own for own in mine)]
            mm.free_memory(1e30, device, keep_loaded=others)

    def is_paged(self) -> bool:
        """Whether a model of the group is loaded under ComfyUI's dynamic VRAM, which no plan unloads."""
        import comfy.model_management as mm

        return any(self.holds(_weights(one)) and is_dynamic(one.model) for one in mm.current_loaded_models)


def _weights(loaded: Any) -> Any:
    patcher = loaded.model
    return None if patcher is None else getattr(patcher, "model", None)


@dataclass(frozen=True)
class Placement(SharedState):
    """What a plan says about one model: how it is offloaded, and with which others it takes turns."""

    offload: Offload
    group: Group

    @property
    def streams(self) -> bool:
        """Whether weights come to the device layer by layer."""
        return self.offload == "sequential"

    def settle(self) -> None:
        """Bring home what a forward of the group that was cut off left on the device."""
        self.group.settle()


class _Planned(_Patcher):
    """Mixed into a patcher's class; see `planned`."""

    placement: Placement
    stream: ModelStream | None = None

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        copy = super().clone(*args, **kwargs)
        if not isinstance(copy, _Planned):  # some patchers clone to a class of their choice
            copy.__class__ = _planned_class(type(copy))
        copy.placement = self.placement
        return copy

    def model_patches_models(self) -> Any:
        # The first thing that ComfyUI asks of a model that it is about to load, before it counts the free memory.
        if not is_dynamic(self):
            self.placement.group.unload(but=self.model)
        return super().model_patches_models()

    def partially_load(self, device_to: Any, extra_memory: Any = 0, *args: Any, **kwargs: Any) -> Any:
        if self._streams() and self._loaded_by_another():
            self.unpatch_model(self.offload_device, unpatch_weights=True)
        return super().partially_load(device_to, extra_memory, *args, **kwargs)

    def load(
        self, device_to: Any = None, lowvram_model_memory: Any = 0, force_patch_weights: bool = False,
        full_load: bool = False, **kwargs: Any,
    ) -> Any:  # fmt: skip
        # By keyword, as ComfyUI calls it: other packs' patchers take nothing but the device by place.
        kwargs.update(
            lowvram_model_memory=lowvram_model_memory, force_patch_weights=force_patch_weights, full_load=full_load
        )
        if not self._streams():
            return super().load(device_to, **kwargs)
        if any(map(is_compiled_in_place, networks(self.model))):
            raise refusal_of_streaming()
        # Patches go into the weights at home, once, so that what is streamed is what a loaded model has.
        kwargs.update(lowvram_model_memory=_NO_ROOM, force_patch_weights=True, full_load=False)
        result = super().load(device_to, **kwargs)
        self._patch_all()
        if self.stream is None:
            keep_cast = bool(getattr(self, "force_cast_weights", False))
            self.stream = ModelStream(networks(self.model), self.load_device, keep_cast)
            self.stream.install()
            self.placement.group.streams.add(self.stream)
        return result

    def patch_weight_to_device(self, key: str, device_to: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not self._streams() or key not in self.patches:
            return super().patch_weight_to_device(key, device_to, *args, **kwargs)
        import comfy.utils

        if key in self.backup:  # patched already: ComfyUI would patch what it has patched
            return comfy.utils.get_attr(self.model, key)
        # Computed where a loaded model's patches are, one weight at a time: the same bits.
        result = super().patch_weight_to_device(key, self.load_device, *args, **kwargs)
        weight = comfy.utils.get_attr(self.model, key)
        home = self.offload_device
        if weight.device != home:
            comfy.utils.set_attr_param(self.model, key, weight.to(home))
        return result

    def detach(self, *args: Any, **kwargs: Any) -> Any:
        self._stop_streaming()
        return super().detach(*args, **kwargs)

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        if unpatch_weights:
            self._stop_streaming()
        return super().unpatch_model(device_to, unpatch_weights)

    def _streams(self) -> bool:
        return self.placement.streams and not is_dynamic(self)

    def _loaded_by_another(self) -> bool:
        """Whether weights are on the device, or patched in use, as another patcher of this model left them."""
        model = self.model
        by_use = model.model_lowvram and not self.patches.keys() <= self.backup.keys()
        return model.model_loaded_weight_memory > 0 or by_use

    def _stop_streaming(self) -> None:
        if self.stream is not None:
            self.stream.remove()
            self.stream = None

    def _patch_all(self) -> None:
        """Patch what ComfyUI has left, and tell it so, should it load these weights onto the device later."""
        for key in self.patches:
            self.patch_weight_to_device(key)
            name = key.rpartition(".")[0]
            self.model.get_submodule(name).comfy_patched_weights = True


_classes: dict[type, type] = {}


def _planned_class(base: type) -> type:
    if base not in _classes:
        _classes[base] = type(f"Planned{base.__name__}", (_Planned, base), {"unplanned": base})
    return _classes[base]


def planned(patcher: Any, placement: Placement) -> Any:
    """A clone of `patcher` that is loaded as `placement` says; `patcher` itself is untouched."""
    clone = unplanned(patcher)
    clone.__class__ = _planned_class(type(clone))
    clone.placement = placement
    return clone


def unplanned(patcher: Any) -> Any:
    """A clone of `patcher` without any plan that it may carry."""
    clone = patcher.clone()
    if isinstance(clone, _Planned):
        clone.__class__ = type(clone).unplanned
        del clone.placement
    return clone


def is_planned(patcher: Any) -> bool:
    """Whether a memory plan steers this patcher."""
    return isinstance(patcher, _Planned)
