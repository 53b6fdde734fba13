"""Weights that are on the device only while they work: two slots, and a copy that runs ahead of the computation.

While layer i computes out of one slot, the layer that will follow is copied into the other one on a second stream;
layer i - 1 has left by then. So at most two layers are on the device, whatever runs ahead. Which layer follows is
learnt from the forward before, so blocks that a technique skips are not copied. Between two forwards every weight is
at home.

Works on any device: without streams of its own (a CPU) the copies are made in place of being queued.

What is streamed: the networks of a model, cut into layers, in the order of registration. The small modules between two
layers count as one together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

Restored = list[tuple[torch.nn.Module, str, torch.nn.Parameter]]


@dataclass
class Residency:
    """What was on the device at once, at most, and how much was copied; for tests and for `plan`'s reader."""

    layers: int = 0
    nbytes: int = 0
    copies: int = 0
    copied_bytes: int = 0
    missed: int = 0


class _Queue:
    """A second stream of the device, or nothing on a device that has none."""

    def __init__(self, device: torch.device) -> None:
        api = getattr(torch, device.type, None) if device.type in ("cuda", "xpu") else None
        self._api, self._device = api, device
        self._stream = api.Stream(device=device) if api is not None else None

    def copying(self) -> Any:
        return self._api.stream(self._stream) if self._api is not None else nullcontext()

    def mark(self, copied: bool) -> Any:
        """An event behind what was queued so far: of copies, or of the computation."""
        if self._api is None:
            return None
        event = self._api.Event()
        event.record(self._stream if copied else self._api.current_stream(self._device))
        return event

    def copies_wait_for(self, event: Any) -> None:
        if event is not None and self._stream is not None:
            self._stream.wait_event(event)

    def computation_waits_for(self, event: Any) -> None:
        if event is not None and self._api is not None:
            self._api.current_stream(self._device).wait_event(event)


@dataclass
class _Slot:
    """A buffer on the device, the layer whose weights are in it, and the events that say when it may be touched."""

    buffer: torch.Tensor
    layer: int | None = None
    views: list[torch.nn.Parameter] = field(default_factory=list)
    filled: Any = None
    released: Any = None


class NetworkStream:
    """Streams one network. `install` hooks it up, `remove` takes every hook off; weights are home in between."""

    # Off only to measure what copying ahead is worth.
    prefetch = True

    def __init__(self, network: torch.nn.Module, device: torch.device, keep_cast: bool = False) -> None:
        self.network, self.device, self._keep_cast = network, device, keep_cast
        self.layers = layers_of(network)
        self.residency = Residency()
        self._first = 0
        self._follows = {index: index + 1 for index in range(len(self.layers) - 1)}
        self._size = max((layer.nbytes for layer in self.layers), default=0)
        self._queue: _Queue | None = None
        self._slots: tuple[_Slot, _Slot] | None = None
        self._working: _Slot | None = None
        self._home: Restored = []
        self._uncast: list[torch.nn.Module] = []
        self._depth = 0
        self._handles: list[Any] = []

    def install(self) -> None:
        """Hook the network: its call opens and closes the slots, each layer's call brings its weights in."""
        if self._handles or not self.layers:
            return
        self._handles = [
            self.network.register_forward_pre_hook(lambda *_: self._begin()),
            self.network.register_forward_hook(lambda *_: self._end(), always_call=True),
        ]
        for index, layer in enumerate(self.layers):
            for module in layer.modules:
                self._handles.append(module.register_forward_pre_hook(lambda *_, index=index: self._enter(index)))

    def remove(self) -> None:
        """Take all hooks off, and bring home what a forward that never ended may have left."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.settle()

    def settle(self) -> None:
        """Bring home what a forward that never ended may have left; nothing to do after one that did.

        PyTorch calls no hook after an error that is no Exception, and a cancel may be such a one.
        """
        if self._depth or self._home or self._slots is not None:
            self._depth = 1
            self._end()

    def _begin(self) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        if self._queue is None:
            self._queue = _Queue(self.device)
        # Not inference tensors, whatever the mode: a weight made outside of inference mode stays usable outside.
        with torch.inference_mode(False):
            slots = tuple(_Slot(torch.empty(self._size, dtype=torch.uint8, device=self.device)) for _ in range(2))
        allocated = self._queue.mark(copied=False)
        for slot in slots:
            slot.released = allocated
        self._slots = (slots[0], slots[1])
        self._fetch(self._slots[0], self._first)

    def _end(self) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth:
            return
        self._leave()
        if self._queue is not None and self._slots is not None:
            # A copy that was not waited for may still run; the memory below goes back to the allocator.
            self._queue.computation_waits_for(self._queue.mark(copied=True))
        self._slots = None

    def _enter(self, index: int) -> None:
        """Before layer `index` computes: its weights in, those of the one before out, and the next one on its way."""
        if self._slots is None or self._queue is None:  # called on its own, outside of the network
            return
        if self._working is not None and self._working.layer == index:
            return
        before = self._working.layer if self._working is not None else None
        self._leave()
        slot = next((slot for slot in self._slots if slot.layer == index), None)
        if slot is None:
            slot = next((slot for slot in self._slots if slot.layer is None), self._slots[0])
            for wrong in self._slots:
                if wrong.layer is not None:
                    self._drop(wrong)
                    self.residency.missed += 1
            self._fetch(slot, index)
        if before is None:
            self._first = index
        else:
            self._follows[before] = index
        self._queue.computation_waits_for(slot.filled)
        self._swap_in(slot)
        following = self._follows.get(index) if self.prefetch else None
        if following is not None and following != index:
            self._fetch(self._slots[1] if slot is self._slots[0] else self._slots[0], following)

    def _fetch(self, slot: _Slot, index: int) -> None:
        """Queue the copy of a layer's weights into a free slot."""
        assert self._queue is not None and self._slots is not None
        self._queue.copies_wait_for(slot.released)
        slot.layer = index
        with torch.inference_mode(False), torch.no_grad(), self._queue.copying():
            slot.views = _copied(self.layers[index], slot.buffer)
        slot.filled = self._queue.mark(copied=True)
        resident = [self.layers[one.layer] for one in self._slots if one.layer is not None]
        seen = self.residency
        seen.layers = max(seen.layers, len(resident))
        seen.nbytes = max(seen.nbytes, sum(layer.nbytes for layer in resident))
        seen.copies += 1
        seen.copied_bytes += self.layers[index].nbytes

    def _swap_in(self, slot: _Slot) -> None:
        assert slot.layer is not None
        weights = list(movable(self.layers[slot.layer]))
        self._working = slot
        for (module, name, home), view in zip(weights, slot.views, strict=True):
            self._home.append((module, name, home))
            module._parameters[name] = view
        for module in {module for module, *_ in weights}:
            if not self._keep_cast and _is_whole(module):
                # On the device they are what a loaded model's are, and so is the way they are used.
                module.comfy_cast_weights = module.prev_comfy_cast_weights
                self._uncast.append(module)

    def _leave(self) -> None:
        """Bring the working layer's weights home and free its slot."""
        for module, name, home in self._home:
            module._parameters[name] = home
        self._home.clear()
        for module in self._uncast:
            module.comfy_cast_weights = True  # type: ignore[assignment]
        self._uncast.clear()
        if self._working is not None:
            self._drop(self._working)
            self._working = None

    def _drop(self, slot: _Slot) -> None:
        slot.layer, slot.views = None, []
        if self._queue is not None:
            slot.released = self._queue.mark(copied=False)


def _is_whole(module: torch.nn.Module) -> bool:
    """Whether ComfyUI casts a module's weights because they are offloaded, and all of them are streamed instead."""
    return hasattr(module, "prev_comfy_cast_weights") and all(
        weight is None or is_movable(weight) for weight in module._parameters.values()
    )


def _copied(layer: Layer, buffer: torch.Tensor) -> list[torch.nn.Parameter]:
    """The layer's weights in `buffer`, with the strides that they have at home, so that results are the same bits."""
    views, offset = [], 0
    for _module, _name, home in movable(layer):
        flat = buffer[offset : offset + home.nbytes].view(home.dtype)
        offset += aligned(home.nbytes)
        strides = home.stride() if home.is_contiguous() else torch.empty_like(home, device="meta").stride()
        view = flat.as_strided(home.shape, strides)
        view.copy_(home, non_blocking=True)
        views.append(torch.nn.Parameter(view, requires_grad=False))
    return views


class ModelStream:
    """All networks of one ComfyUI model."""

    def __init__(self, networks: Iterable[torch.nn.Module], device: torch.device, keep_cast: bool = False) -> None:
        """`keep_cast`: weights are cast in use even where they are loaded, to another compute dtype."""
        self.streams = tuple(NetworkStream(network, device, keep_cast) for network in networks)

    def install(self) -> None:
        for stream in self.streams:
            stream.install()

    def remove(self) -> None:
        for stream in self.streams:
            stream.remove()

    def settle(self) -> None:
        for stream in self.streams:
            stream.settle()

    @property
    def residency(self) -> Residency:
        """The most of any network, since they run one at a time."""
        total = Residency()
        for stream in self.streams:
            seen = stream.residency
            total.layers, total.nbytes = max(total.layers, seen.layers), max(total.nbytes, seen.nbytes)
            total.copies += seen.copies
            total.copied_bytes += seen.copied_bytes
            total.missed += seen.missed
        return total


# One residual block, one transformer block, one layer of a text encoder: what is loaded and dropped as a whole.
_LAYERS = frozenset(
    {"ResBlock", "BasicTransformerBlock", "CLIPLayer", "T5Block", "TransformerBlock", "ResnetBlock", "AttnBlock"}
)
_ALIGNMENT = 512  # what PyTorch gives allocations of their own on a GPU: kernels are chosen by alignment too
# Small modules in a row go together up to this, so that a network without known layers is cut as well.
_LARGEST_GROUP = 48_000_000


@dataclass(frozen=True)
class Layer:
    """Modules whose weights come and go together; `nbytes` with alignment."""

    name: str
    modules: tuple[torch.nn.Module, ...]
    nbytes: int


def networks(model: torch.nn.Module) -> tuple[torch.nn.Module, ...]:
    """The parts of a ComfyUI model that are called as modules, one at a time, and hold nearly all of its weights.

    The UNet of a diffusion model, each transformer of a text encoder, decoder and encoder of a VAE.
    """
    unet = getattr(model, "diffusion_model", None)
    if isinstance(unet, torch.nn.Module):
        return (unet,)
    halves = [
        part for name in ("encoder", "decoder") if isinstance(part := getattr(model, name, None), torch.nn.Module)
    ]
    if halves:
        return tuple(halves)
    return tuple(part for name, part in model.named_modules() if name.rsplit(".", 1)[-1] == "transformer")


def layers_of(network: torch.nn.Module) -> tuple[Layer, ...]:
    """Cut a network into layers; the small modules between two of them count as one together."""
    layers: list[Layer] = []
    between: list[torch.nn.Module] = []

    def close() -> None:
        if between:
            layers.append(_layer(f"between {len(layers)}", between))
            between.clear()

    for name, module, is_layer in _pieces(network, ""):
        if is_layer:
            close()
            layers.append(_layer(name, [module]))
        else:
            between.append(module)
            if sum(weight.nbytes for *_, weight in _weights(between)) >= _LARGEST_GROUP:
                close()
    close()
    return tuple(layer for layer in layers if layer.nbytes)


def _pieces(module: torch.nn.Module, name: str) -> Iterator[tuple[str, torch.nn.Module, bool]]:
    if type(module).__name__ in _LAYERS:
        yield name, module, True
        return
    # A text encoder looks its embeddings up outside of its own call; ComfyUI casts them there.
    if module._parameters and not isinstance(module, torch.nn.Embedding):
        yield name, module, False
    for child_name, child in module.named_children():
        yield from _pieces(child, f"{name}.{child_name}" if name else child_name)


def _layer(name: str, modules: Sequence[torch.nn.Module]) -> Layer:
    return Layer(name, tuple(modules), sum(aligned(weight.nbytes) for *_, weight in _weights(modules)))


def movable(layer: Layer) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Parameter]]:
    """Module, name and weight of everything in a layer that can be copied byte by byte.

    Quantised weights are tensors of a class of their own: those stay where they are and ComfyUI casts them in use.
    """
    yield from _weights(layer.modules)


def _weights(modules: Sequence[torch.nn.Module]) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Parameter]]:
    for top in modules:
        # A module that is no layer holds only what it owns itself: its children are pieces of their own.
        parts = top.modules() if type(top).__name__ in _LAYERS else (top,)
        for part in parts:
            for name, weight in part._parameters.items():
                if weight is not None and is_movable(weight):
                    yield part, name, weight


def is_movable(weight: torch.Tensor) -> bool:
    """Whether a weight is bytes in memory, and not a quantised tensor of a class of its own or a placeholder."""
    return type(weight.data) is torch.Tensor and not weight.is_meta


def aligned(nbytes: int) -> int:
    """The bytes that a tensor of `nbytes` takes in a slot."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def weight_bytes(module: Any) -> int:
    """Bytes of all parameters and buffers of a module, each counted once, by its dtype."""
    seen: dict[int, int] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        seen[id(tensor)] = tensor.nbytes  # a quantised tensor counts its values, and takes less
    return sum(seen.values())


def streamed_bytes(model: torch.nn.Module) -> int:
    """The most that streaming keeps of a model's weights on the device: two slots of the largest layer.

    What lies outside of the networks is cast for each use by ComfyUI; the largest such weight counts too.
    """
    inside: set[int] = set()
    largest = 0
    for layer in (layer for network in networks(model) for layer in layers_of(network)):
        largest = max(largest, layer.nbytes)
        inside.update(id(weight) for *_, weight in movable(layer))
    outside = [weight.nbytes for weight in model.parameters() if id(weight) not in inside]
    return max([2 * largest, *outside])
