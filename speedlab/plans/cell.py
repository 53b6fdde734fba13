"""One run of one cell on one prompt: encode, sample, decode, save, through the engine behind the nodes.

A prompt of a given length: cut or filled to a number of tokens, start and end of each chunk included.

The checkpoint of a graph in another precision: loaded again, with the patches of the model given.
"""

from __future__ import annotations

import difflib
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..common.core import core_nodes
from ..common.errors import SpeedLabError
from ..measure.context import NodeContext
from ..measure.peaks import MemoryPeak, growth_gb, rss_to_grow_from
from ..measure.record import RunRecord, memory_dict
from ..measure.timeline import Block, measured
from ..models import text as conditioning
from ..models.loading import SOURCE, VAE_SOURCE, CheckpointSource, family_of, load_checkpoint
from ..sampling.complete import merge_memory
from ..sampling.ensemble import EnsembleRequest, Expert, sample_ensemble
from ..sampling.profiled import ProfiledLatent, ProfileOptions, SamplingRequest, profile_sampling
from ..vae import decode as decoding
from ..vae import taesd
from .axes import CellSettings
from .plan_text import SweepTextError
from .techniques import DECODERS, WEIGHTS, NodeTable, Parts, attach_all, options_of, sigmas_of


@dataclass(frozen=True)
class Prompt:
    """A text with its seed; a blank `negative` is none."""

    text: str
    negative: str
    seed: int


@dataclass(frozen=True)
class Prepared:
    """A cell ready to run: its parts with every technique attached, and the decoder's options; None is core's own."""

    parts: Parts
    settings: CellSettings
    decoder: dict[str, Any] | None
    # Those of a schedule that is none of KSampler's.
    sigmas: Any | None = None


@dataclass(frozen=True)
class OneRun:
    """One image's (or batch's) times in milliseconds. `record` is the sampler's, with memory over all phases.

    `latent` and the first of the `images` are in the host's memory.
    """

    record: RunRecord
    encode_ms: float
    sample_ms: float
    decode_ms: float
    save_ms: float
    latent: Any
    images: Any
    decode_info: dict[str, Any]
    files: tuple[str, ...]
    rss_growth_gb: float | None = None
    # Compiling and timing of alternatives, in no other figure: no repeat pays for it again.
    compile_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        """Text to saved image, with every move of weights to the device."""
        others = [self.record.phases_ms.get(name) for name in ("to_device", "prepare")]
        extra = sum(float(ms) for ms in others if isinstance(ms, (int, float)))
        return self.encode_ms + extra + self.sample_ms + self.decode_ms + self.save_ms


def prepare(parts: Parts, settings: CellSettings, nodes: NodeTable, reloader: Reloader) -> Prepared:
    """Load and attach what the settings ask for. Raises SpeedLabError where this graph or this machine cannot."""
    if settings.handoff is not None and (parts.refiner is None or parts.refiner_clip is None):
        raise SpeedLabError(
            "The handoff axis needs a refiner: connect its checkpoint's model and clip to Benchmark's inputs refiner "
            "and refiner_clip."
        )
    if settings.handoff is not None and settings.sigmas is not None:
        raise SpeedLabError(f"The handoff axis goes with schedulers of KSampler, not with {settings.schedule}.")
    if settings.weights is not None:
        wanted = options_of(settings.weights, WEIGHTS, nodes)
        parts = reloader.parts_in(wanted.get("precision", "auto"), wanted.get("memory_format"))
    parts = attach_all(parts, settings, nodes)
    if settings.decoder.name == "full":
        decoding.require_vae(parts.vae)
    conditioning.require_clip(parts.clip)
    if settings.handoff is not None:
        conditioning.require_clip(parts.refiner_clip)
    decoder = options_of(settings.decoder, DECODERS[settings.decoder.name], nodes)
    return Prepared(parts, settings, decoder, sigmas_of(settings, parts.model, nodes))


def check_sampler(settings: CellSettings) -> None:
    """Raise SweepTextError for a sampler or scheduler that this ComfyUI does not have."""
    import comfy.samplers

    known = comfy.samplers.KSampler
    for what, name, names in (
        ("sampler", settings.sampler, known.SAMPLERS), ("scheduler", settings.scheduler, known.SCHEDULERS),
    ):  # fmt: skip
        if name not in names:
            close = difflib.get_close_matches(name, names, n=3)
            raise SweepTextError(f"There is no {what} '{name}'. Choose {', '.join(close or names)}.")


def run_once(
    prepared: Prepared, prompt: Prompt, context: NodeContext, on_step: Callable[[int], None] | None = None,
    save: Callable[[Any], Iterable[str]] | None = None,
) -> OneRun:  # fmt: skip
    """Make one prompt's images and measure each phase; `save` writes them and gives the names of the files."""
    parts, settings = prepared.parts, prepared.settings
    resident = rss_to_grow_from()
    with measured("text_encode", conditioning.device_of(parts.clip)) as encoded:
        experts = encode(prepared, prompt)
    sampled = sample(prepared, experts, prompt.seed, ProfileOptions(part=True, on_step=on_step), context)
    device = taesd.decode_device() if settings.decoder.name == "tiny" else parts.vae.device
    with measured("decode", device) as decoded:
        result = _decode(prepared, sampled.latent)
    files: Iterable[str] = ()
    with measured("save") as saved:
        if save is not None:
            files = save(result.images)
    run = (sampled.record.summary.get("run") or {}).get("median")
    return OneRun(
        record=_with_memory(sampled.record, encoded, decoded),
        encode_ms=encoded.ms,
        sample_ms=float(run or 0.0),
        decode_ms=decoded.ms,
        save_ms=0.0 if save is None else saved.ms,
        latent=sampled.latent["samples"].detach().float().cpu(),
        images=result.images[:1].float().cpu(),
        decode_info=dict(result.info),
        files=tuple(files),
        rss_growth_gb=growth_gb(
            resident, (encoded.peak, decoded.before, decoded.peak), sampled.record.memory.get("sample", {})
        ),
        compile_ms=encoded.apart_ms + float(sampled.record.phases_ms.get("compile") or 0.0) + decoded.apart_ms,
    )


def encode(prepared: Prepared, prompt: Prompt) -> tuple[Expert, Expert | None]:
    """The cell's model with the prompt, and the refiner with it where the cell hands over."""
    parts, settings, text = prepared.parts, prepared.settings, prompt.text
    if settings.prompt_tokens is not None:
        text = prompt_of_length(parts.clip, text, settings.prompt_tokens)
    base = _expert(parts.model, parts.clip, text, prompt.negative)
    if settings.handoff is None:
        return base, None
    return base, _expert(parts.refiner, parts.refiner_clip, text, prompt.negative)


def _expert(model: Any, clip: Any, text: str, negative: str) -> Expert:
    """A model with its prompt. No negative is zeroed conditioning on SDXL, and the encoded empty text elsewhere."""
    positive = conditioning.encode(clip, text)
    if not negative.strip() and family_of(model).startswith("SDXL"):
        return Expert(model, positive, core_nodes().ConditioningZeroOut().zero_out(positive)[0])
    return Expert(model, positive, conditioning.encode(clip, negative))


def sample(
    prepared: Prepared, experts: tuple[Expert, Expert | None], seed: int, options: ProfileOptions, context: NodeContext
) -> ProfiledLatent:
    """The base alone, or base and refiner where the cell hands over."""
    settings, (base, refiner) = prepared.settings, experts
    latent = core_nodes().EmptyLatentImage().generate(settings.width, settings.height, settings.batch)[0]
    chosen = (seed, settings.steps, settings.cfg, settings.sampler, settings.schedule)
    if refiner is not None and settings.handoff is not None:
        return sample_ensemble(base, refiner, latent, EnsembleRequest(*chosen, settings.handoff), options, context)
    request = SamplingRequest(*chosen, sigmas=prepared.sigmas)
    return profile_sampling(base.model, request, base.positive, base.negative, latent, options, context)


def _decode(prepared: Prepared, latent: dict[str, Any]) -> decoding.Decoded:
    parts = prepared.parts
    if prepared.decoder is None:
        return decoding.Decoded(core_nodes().VAEDecode().decode(parts.vae, latent)[0])
    if prepared.settings.decoder.name == "tiny":
        return taesd.decode_tiny(latent, taesd.TinyDecodeConfig(**prepared.decoder), parts.model)
    return decoding.decode(parts.vae, latent, decoding.DecodeConfig(**prepared.decoder))


def _with_memory(record: RunRecord, encoded: Block, decoded: Block) -> RunRecord:
    memory = merge_memory(record.memory, "text_encode", memory_dict(encoded.peak))
    between: MemoryPeak = decoded.before
    memory = merge_memory(merge_memory(memory, "decode", memory_dict(decoded.peak)), None, memory_dict(between))
    return replace(record, memory=memory)


# One token each in CLIP's vocabulary.
_FILLERS = ("sea", "sky", "sun", "tree", "light", "stone", "wind", "sand")
CHUNK = 77


def count_tokens(clip: Any, text: str) -> int:
    """Tokens of a text as the text encoder counts them, without start, end and padding."""
    chunks = next(iter(clip.tokenize(text, return_word_ids=True).values()))
    return sum(1 for chunk in chunks for token in chunk if token[2] != 0)


def prompt_of_length(clip: Any, text: str, tokens: int) -> str:
    """The words of `text`, cut or filled so that whole chunks of 77 hold `tokens`, each with its start and end."""
    wanted = max(tokens - 2 * -(-tokens // CHUNK), 0)
    words: list[str] = []
    count = 0
    for word in text.split():
        length = count_tokens(clip, word)
        if count + length > wanted:
            break
        words.append(word)
        count += length
    words += [_FILLERS[index % len(_FILLERS)] for index in range(wanted - count)]
    return " ".join(words)


_KEPT = 2
_COMPUTE_DTYPE = "manual_cast_dtype"


class Reloader:
    """Loads a graph's checkpoint in other precisions and keeps the last ones. Make one a sweep."""

    def __init__(self, parts: Parts) -> None:
        self._given = parts
        self._known: OrderedDict[tuple[str, str], Parts] = OrderedDict()

    def parts_in(self, precision: str, memory_format: str | None = None) -> Parts:
        """The parts with weights in `precision`; the very parts given where they are that already.

        Raises SpeedLabError for a model that no SpeedLab loader made or whose patches cannot be moved.
        """
        source: CheckpointSource | None = self._given.model.get_attachment(SOURCE)
        if source is None:
            raise SpeedLabError(
                "The precision axis loads the checkpoint again and does not know which: the model does not come from "
                "Load Checkpoint (SpeedLab). Use that loader, or leave the axis out."
            )
        layout = memory_format or source.memory_format
        key = (precision, layout)
        if key == (source.precision, source.memory_format):
            return self._given
        if key not in self._known:
            self._known[key] = self._load(source, precision, layout)
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def keeps(self, parts: Parts) -> bool:
        """Whether these parts are the ones given, or still kept here."""
        weights = parts.model.model
        return weights is self._given.model.model or any(weights is known.model.model for known in self._known.values())

    def _load(self, source: CheckpointSource, precision: Any, layout: str) -> Parts:
        given = self._given
        source.check_unchanged()
        loaded = load_checkpoint(source.name, precision, layout)
        model = _repatched(given.model, loaded.model)
        model.set_attachments(SOURCE, loaded.source)
        clip = given.clip
        if precision == "fp32" and clip is not None and loaded.clip is not None:
            clip = loaded.clip.clone()
            clip.patcher = _repatched(given.clip.patcher, loaded.clip.patcher)
            clip.layer_idx = given.clip.layer_idx
        vae = given.vae
        vae_source = vae.patcher.get_attachment(VAE_SOURCE) if vae is not None else None
        if loaded.vae is not None and vae_source is not None and vae_source.path == source.path:
            vae = loaded.vae
        return replace(given, model=model, clip=clip, vae=vae)


def _repatched(given: Any, fresh: Any) -> Any:
    """A clone of `given` on the weights of `fresh`: LoRAs, wrappers, options and attachments as they are."""
    import torch

    whole = [key for key, value in given.object_patches.items() if isinstance(value, torch.nn.Module)]
    inside = [key for key in whole if key.startswith("diffusion_model")]
    if inside:
        raise SpeedLabError(
            f"The model carries a module of its own weights ({inside[0]}), a compiled one say, which cannot move to "
            "other weights. Put that technique on the plan axis or into 'plan' instead of before Benchmark."
        )
    clone = fresh.clone()
    for key, patches in given.patches.items():
        clone.patches[key] = list(patches)
    if given.patches:
        clone.patches_uuid = uuid.uuid4()
    again = given.clone()
    for name in (
        "object_patches", "model_options", "wrappers", "callbacks", "attachments", "additional_models", "injections",
        "hook_patches",
    ):  # fmt: skip
        if hasattr(again, name):
            setattr(clone, name, getattr(again, name))
    # The compute dtype belongs to the weights that were loaded, not to those of the model given.
    own = {key: value for key, value in fresh.object_patches.items() if key == _COMPUTE_DTYPE}
    clone.object_patches = {k: v for k, v in again.object_patches.items() if k != _COMPUTE_DTYPE} | own
    return clone
