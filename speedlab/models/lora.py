"""A stack of LoRAs, applied in order as chained core LoraLoader nodes would, with matched modules counted.

Formats of LoRA files are core's business: what a file holds, and what of it fits, is asked of core's own mapping.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..common.errors import ModelFileError
from .loading import find_model_file, readable, refuse_unsafe
from .weights import is_plain, logical_shape

log = logging.getLogger(__name__)

LORAS = "speedlab.loras"

# What core's loader raises about a module that lacks a tensor or has one of another shape than its format's.
_DAMAGED = (KeyError, ValueError, RuntimeError, TypeError, AttributeError)


@dataclass(frozen=True)
class LoraChoice:
    """One line of the stack: a file in models/loras and its strength on UNet and text encoder."""

    name: str
    strength: float


@dataclass(frozen=True)
class LoraMatch:
    """How much of a LoRA found its place: modules, and `unread` tensors that core reads from no LoRA, by name.

    `unsure`: of the matched modules those whose weights are packed, in another size by what they say of themselves.
    """

    name: str
    strength: float
    matched: int
    total: int
    unread: tuple[str, ...] = ()
    unsure: int = 0

    def describe(self) -> str:
        """Name, strength and counts, for the record."""
        return f"{self.name} at {self.strength:g}: {self.matched} of {self.total} modules"

    def warnings(self) -> list[str]:
        """What a user should know about a LoRA of which a part has no effect."""
        notes = []
        if self.matched < self.total:
            notes.append(
                f"LoRA {self.name}: {self.matched} of {self.total} modules match this model; the rest has no effect."
            )
        if self.unsure:
            notes.append(
                f"LoRA {self.name}: {self.unsure} of its modules change quantised weights that seem to have another "
                "size. Where the image looks as without the LoRA, it was made for another model family."
            )
        if self.unread:
            notes.append(
                f"LoRA {self.name}: ComfyUI reads {len(self.unread)} of its tensors from no LoRA ({self.unread[0]} for "
                "one), so they have no effect. Embeddings belong in models/embeddings."
            )
        return notes


@dataclass(frozen=True)
class LoraContent:
    """The modules that a LoRA file changes, by core's names of formats, and tensors that are part of no format."""

    modules: frozenset[str]
    unread: tuple[str, ...]


def apply_stack(model: Any, clip: Any | None, choices: Sequence[LoraChoice]) -> tuple[Any, Any | None, list[LoraMatch]]:
    """Patch clones of `model` and `clip` with each LoRA in turn; strength 0 leaves a LoRA out, as core does.

    Returns the very objects given when nothing is to be done. Raises ModelFileError for a file that is missing,
    truncated or unsafe, or that matches no key of the model.
    """
    matches = []
    for choice in choices:
        if choice.strength == 0:
            continue
        model, clip, match = _apply(model, clip, choice)
        matches.append(match)
    return model, clip, matches


class _Read(dict[str, Any]):
    """Weights that know which of them were taken out."""

    def __init__(self, weights: Mapping[str, Any]) -> None:
        super().__init__(weights)
        self.taken: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        self.taken.add(name)
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """As a dict does; what is there counts as taken."""
        if name in self:
            self.taken.add(name)
        return super().get(name, default)


def content_of(weights: Mapping[str, Any]) -> LoraContent:
    """What a LoRA file holds for whatever model.

    Core's loader looks for the tensors of all formats under the names of a model's layers. Here it looks under every
    name that the tensors could stand for, which are what comes before one of their separators; where it finds a patch,
    there is a module.
    """
    import comfy.lora

    names = {name[:end] for name in weights for end, sign in enumerate(name) if sign in "._" and end}
    read = _Read(weights)
    try:
        found = set(comfy.lora.load_lora(read, {name: f"{name}.weight" for name in names}, log_missing=False))
    except _DAMAGED:
        # A module lacks a tensor. Where it is none of the model's, core never comes to it, and the others count.
        found = set().union(*(_patched_by(read, name) for name in names))
    # Weight and bias of one layer are one module.
    modules = frozenset(_layer(key.removesuffix(".weight")) for key in found)
    return LoraContent(modules, tuple(name for name in weights if name not in read.taken))


def _patched_by(weights: _Read, name: str) -> set[str]:
    import comfy.lora

    target = f"{name}.weight"
    try:
        return set(comfy.lora.load_lora(weights, {name: target}, log_missing=False))
    except _DAMAGED:
        return {target}


def _layer(key: str) -> str:
    return key.removesuffix(".weight").removesuffix(".bias")


def _apply(model: Any, clip: Any | None, choice: LoraChoice) -> tuple[Any, Any | None, LoraMatch]:
    import comfy.lora_convert
    import comfy.sd
    import comfy.utils

    path = find_model_file("loras", choice.name)
    refuse_unsafe(path)
    with readable(path, "LoRA"):
        weights = comfy.utils.load_torch_file(str(path), safe_load=True)
        if not isinstance(weights, dict) or not weights:
            raise ModelFileError(f"{path.name} holds no weights.")
        converted = comfy.lora_convert.convert_lora(dict(weights))
        content = content_of(converted)
        total = len(content.modules)
        matched, unsure, foreign = _count_matches(model, clip, converted)
        if foreign:
            raise ModelFileError(
                f"LoRA {path.name} was made for another model family: it changes {foreign}, but in another size than "
                "this model has. Choose one for this checkpoint, or set the line to None."
            )
        if matched == 0:
            raise ModelFileError(
                f"LoRA {path.name} matches no key of this model (0 of {total} modules). It was made for another "
                "model family, or it is no LoRA: choose one for this checkpoint, or set the line to None."
            )
        new_model, new_clip = comfy.sd.load_lora_for_models(model, clip, weights, choice.strength, choice.strength)
    match = LoraMatch(choice.name, choice.strength, matched, total, content.unread, unsure)
    for warning in match.warnings():
        log.warning("SpeedLab: %s", warning)
    if matched == total:
        log.info("SpeedLab: LoRA %s: all %d modules match.", path.name, total)
    new_model.set_attachments(LORAS, (*(model.get_attachment(LORAS) or ()), match))
    return new_model, new_clip, match


def _count_matches(model: Any, clip: Any | None, weights: dict[str, Any]) -> tuple[int, int, str | None]:
    """Modules of the (converted) file that fit a weight of the UNet or the text encoder, by core's own key maps.

    Beside the count how many of them are uncertain, and the name of a cross-attention weight that has another
    size: its width is the family's.
    """
    import comfy.lora

    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    present = _weights_of(model.model)
    if clip is not None:
        key_map = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, key_map)
        present |= _weights_of(clip.cond_stage_model)
    found = comfy.lora.load_lora(weights, key_map, log_missing=False)
    # A layer's weight and bias are one module; parts of one weight (offsets) are a module each.
    matched: set[tuple[Any, ...]] = set()
    unsure: set[tuple[Any, ...]] = set()
    foreign = None
    for key, patch in found.items():
        target = key if isinstance(key, str) else key[0]
        if target not in present:
            continue
        module = (_layer(target), *(() if isinstance(key, str) else key[1:]))
        if isinstance(key, str) and not _fits(patch, logical_shape(present[target])):
            if is_plain(present[target]):
                foreign = target if "attn2" in target else foreign
                continue
            unsure.add(module)
        matched.add(module)
    return len(matched), len(unsure), foreign


def _weights_of(network: Any) -> dict[str, Any]:
    """What core may patch, by name. The parameters themselves: a state dict shows what packed ones are stored as."""
    return {**network.state_dict(), **dict(network.named_parameters())}


def _fits(patch: Any, shape: tuple[int, ...]) -> bool:
    """Whether a plain LoRA's matrices, or a difference, make a weight of this shape; other kinds are left to core."""
    if isinstance(patch, tuple):
        return patch[0] != "diff" or tuple(patch[1][0].shape) == shape
    if getattr(patch, "name", None) != "lora":
        return True
    up, down, _alpha, middle, _dora_scale, *reshape = patch.weights
    if middle is not None or any(reshape):
        return True
    return bool(up.shape[0] * math.prod(down.shape[1:]) == math.prod(shape))
