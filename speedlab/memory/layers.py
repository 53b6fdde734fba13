"""What is streamed: the networks of a model, cut into units of one layer each, in the order of registration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# One residual block, one transformer block, one layer of a text encoder: what is loaded and dropped as a whole.
_LAYERS = frozenset(
    {"ResBlock", "BasicTransformerBlock", "CLIPLayer", "T5Block", "TransformerBlock", "ResnetBlock", "AttnBlock"}
)
_ALIGNMENT = 512  # what PyTorch gives allocations of their own on a GPU: kernels are chosen by alignment too
# Small modules in a row go together up to this, so that a network without known layers is cut as well.
_LARGEST_GROUP = 48_000_000


@dataclass(frozen=True)
class Unit:
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


def units_of(network: torch.nn.Module) -> tuple[Unit, ...]:
    """Cut a network into units: each layer is one, and the small modules between two layers together are one."""
    units: list[Unit] = []
    between: list[torch.nn.Module] = []

    def close() -> None:
        if between:
            units.append(_unit(f"between {len(units)}", between))
            between.clear()

    for name, module, is_layer in _pieces(network, ""):
        if is_layer:
            close()
            units.append(_unit(name, [module]))
        else:
            between.append(module)
            if sum(weight.nbytes for *_, weight in _weights(between)) >= _LARGEST_GROUP:
                close()
    close()
    return tuple(unit for unit in units if unit.nbytes)


def _pieces(module: torch.nn.Module, name: str) -> Iterator[tuple[str, torch.nn.Module, bool]]:
    if type(module).__name__ in _LAYERS:
        yield name, module, True
        return
    # A text encoder looks its embeddings up outside of its own call; ComfyUI casts them there.
    if module._parameters and not isinstance(module, torch.nn.Embedding):
        yield name, module, False
    for child_name, child in module.named_children():
        yield from _pieces(child, f"{name}.{child_name}" if name else child_name)


def _unit(name: str, modules: Sequence[torch.nn.Module]) -> Unit:
    return Unit(name, tuple(modules), sum(aligned(weight.nbytes) for *_, weight in _weights(modules)))


def movable(unit: Unit) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Parameter]]:
    """Module, name and weight of everything in a unit that can be copied byte by byte.

    Quantised weights are tensors of a class of their own: those stay where they are and ComfyUI casts them in use.
    """
    yield from _weights(unit.modules)


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
        seen[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def streamed_bytes(model: torch.nn.Module) -> int:
    """The most that streaming keeps of a model's weights on the device: two slots of the largest unit.

    What lies outside of the networks is cast for each use by ComfyUI; the largest such weight counts too.
    """
    inside: set[int] = set()
    largest = 0
    for unit in (unit for network in networks(model) for unit in units_of(network)):
        largest = max(largest, unit.nbytes)
        inside.update(id(weight) for *_, weight in movable(unit))
    outside = [weight.nbytes for weight in model.parameters() if id(weight) not in inside]
    return max([2 * largest, *outside])
