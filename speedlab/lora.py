"""A stack of LoRAs, applied in order as chained core LoraLoader nodes would, with matched keys counted."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ModelFileError
from .loading import find_model_file, readable, refuse_unsafe

log = logging.getLogger(__name__)

LORAS = "speedlab.loras"

# What follows a module's name in the tensor names of LoRA, LoCon, LoHa, LoKr, DoRA, OFT and diff files.
_TENSOR_SUFFIX = re.compile(
    r"\.(processor\.)?(lora_(up|down|mid|A|B|magnitude_vector)|lora_linear_layer|lora|alpha|dora_scale|scale|"
    r"hada_\w+|lokr_\w+|oft_\w+|a1|a2|b1|b2|bora_\w+|diff|diff_b|w_norm|b_norm|set_weight|reshape_weight|"
    r"on_input|on_output)(\..*)?$"
)


@dataclass(frozen=True)
class LoraChoice:
    """One line of the stack: a file in models/loras and its strength on UNet and text encoder."""

    name: str
    strength: float


@dataclass(frozen=True)
class LoraMatch:
    """How much of a LoRA found its place."""

    name: str
    strength: float
    matched: int
    total: int

    def describe(self) -> str:
        """Name, strength and counts, for the record."""
        return f"{self.name} at {self.strength:g}: {self.matched} of {self.total} modules"

    def warning(self) -> str:
        """What a user should know about a LoRA that matches only in part."""
        return f"LoRA {self.name}: {self.matched} of {self.total} modules match this model; the rest has no effect."


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


def modules_in(tensor_names: Iterable[str]) -> int:
    """The number of modules that a LoRA file changes, told from its tensor names."""
    return len({_TENSOR_SUFFIX.sub("", name) for name in tensor_names})


def _apply(model: Any, clip: Any | None, choice: LoraChoice) -> tuple[Any, Any | None, LoraMatch]:
    import comfy.sd
    import comfy.utils

    path = find_model_file("loras", choice.name)
    refuse_unsafe(path)
    with readable(path, "LoRA"):
        weights = comfy.utils.load_torch_file(str(path), safe_load=True)
        if not isinstance(weights, dict) or not weights:
            raise ModelFileError(f"{path.name} holds no weights.")
        total = modules_in(weights)
        matched, foreign = _count_matches(model, clip, weights)
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
    match = LoraMatch(choice.name, choice.strength, min(matched, total), total)
    if matched < total:
        log.warning("SpeedLab: %s", match.warning())
    else:
        log.info("SpeedLab: LoRA %s: all %d modules match.", path.name, total)
    new_model.set_attachments(LORAS, (*(model.get_attachment(LORAS) or ()), match))
    return new_model, new_clip, match


def _count_matches(model: Any, clip: Any | None, weights: dict[str, Any]) -> tuple[int, str | None]:
    """Modules of the file that fit a weight of the UNet or the text encoder, by core's own key maps.

    Beside the count the name of a cross-attention weight that has another size: its width is the family's.
    """
    import comfy.lora
    import comfy.lora_convert

    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    present = {key: tuple(value.shape) for key, value in model.model.state_dict().items()}
    if clip is not None:
        key_map = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, key_map)
        present |= {key: tuple(value.shape) for key, value in clip.cond_stage_model.state_dict().items()}
    found = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(weights)), key_map, log_missing=False)
    matched, foreign = 0, None
    for key, patch in found.items():
        target = key if isinstance(key, str) else key[0]
        if target not in present:
            continue
        if isinstance(key, str) and not _fits(patch, present[target]):
            foreign = target if "attn2" in target else foreign
            continue
        matched += 1
    return matched, foreign


def _fits(patch: Any, shape: tuple[int, ...]) -> bool:
    """Whether a plain LoRA's up and down matrices make a weight of this shape; other kinds are left to core."""
    if getattr(patch, "name", None) != "lora":
        return True
    up, down, _alpha, middle, *_ = patch.weights
    if middle is not None:
        return True
    return bool(up.shape[0] * math.prod(down.shape[1:]) == math.prod(shape))
