"""A stack of LoRAs, applied in order as chained core LoraLoader nodes would, with matched keys counted."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ModelFileError
from .loading import find_model_file, readable, refuse_unsafe

log = logging.getLogger(__name__)

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
    matched: int
    total: int


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
        matched = _count_matches(model, clip, weights)
        if matched == 0:
            raise ModelFileError(
                f"LoRA {path.name} matches no key of this model (0 of {total} modules). It was made for another "
                "model family, or it is no LoRA: choose one for this checkpoint, or set the line to None."
            )
        new_model, new_clip = comfy.sd.load_lora_for_models(model, clip, weights, choice.strength, choice.strength)
    if matched < total:
        log.warning("SpeedLab: LoRA %s: %d of %d modules match this model; the rest has no effect.",
                    path.name, matched, total)  # fmt: skip
    else:
        log.info("SpeedLab: LoRA %s: all %d modules match.", path.name, total)
    return new_model, new_clip, LoraMatch(choice.name, min(matched, total), total)


def _count_matches(model: Any, clip: Any | None, weights: dict[str, Any]) -> int:
    """Modules of the file that map to a weight of the UNet or the text encoder, by core's own key maps."""
    import comfy.lora
    import comfy.lora_convert

    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    present = set(model.model.state_dict())
    if clip is not None:
        key_map = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, key_map)
        present |= set(clip.cond_stage_model.state_dict())
    found = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(weights)), key_map, log_missing=False)
    targets = (key if isinstance(key, str) else key[0] for key in found)
    return sum(1 for target in targets if target in present)
