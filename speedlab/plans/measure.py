"""One run of one cell on one prompt: encode, sample, decode, save, through the engine behind the nodes.

A prompt of a given length: cut or filled to a number of tokens, start and end of each chunk included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..common.core import core_nodes
from ..common.errors import SpeedLabError
from ..measure.context import NodeContext
from ..measure.peaks import MemoryPeak, rss_to_grow_from
from ..measure.record import RunRecord, memory_dict
from ..measure.store import RunStore
from ..measure.timeline import Block, measured
from ..models import text as conditioning
from ..models.loading import family_of
from ..sampling.complete import merge_memory, save_pngs
from ..sampling.ensemble import EnsembleRequest, Expert, sample_ensemble
from ..sampling.profiled import ProfiledLatent, ProfileOptions, SamplingRequest, profile_sampling
from ..vae import decode as decoding
from ..vae import taesd
from .growth import growth_gb
from .plan_text import SweepTextError
from .reload import Reloader
from .settings import CellSettings
from .techniques import DECODERS, WEIGHTS, NodeTable, Parts, attach, options_of


@dataclass(frozen=True)
class Prompt:
    """A text with its seed; a blank `negative` is none."""

    text: str
    negative: str
    seed: int


@dataclass(frozen=True)
class Prepared:
    """A cell ready to run: its parts with every technique attached, and the decoder's options."""

    parts: Parts
    settings: CellSettings
    decoder: dict[str, Any]


@dataclass(frozen=True)
class OneRun:
    """One picture's (or batch's) times in milliseconds. `record` is the sampler's, with memory over all phases."""

    record: RunRecord
    encode_ms: float
    sample_ms: float
    decode_ms: float
    save_ms: float
    pictures: Any
    decode_info: dict[str, Any]
    files: tuple[str, ...]
    rss_growth_gb: float | None = None

    @property
    def total_ms(self) -> float:
        """Text to saved picture, with every move of weights to the device."""
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
    if settings.weights is not None:
        wanted = options_of(settings.weights, WEIGHTS, nodes)
        parts = reloader.parts_in(wanted.get("precision", "auto"), wanted.get("memory_format"))
    for technique in settings.techniques:
        parts = attach(parts, technique, nodes)
    if settings.decoder.name == "full":
        decoding.require_vae(parts.vae)
    conditioning.require_clip(parts.clip)
    if settings.handoff is not None:
        conditioning.require_clip(parts.refiner_clip)
    return Prepared(parts, settings, options_of(settings.decoder, DECODERS[settings.decoder.name], nodes))


def check_sampler(settings: CellSettings) -> None:
    """Raise SweepTextError for a sampler or scheduler that this ComfyUI does not have."""
    import difflib

    import comfy.samplers

    known = comfy.samplers.KSampler
    for what, name, names in (
        ("sampler", settings.sampler, known.SAMPLERS), ("scheduler", settings.scheduler, known.SCHEDULERS),
    ):  # fmt: skip
        if name not in names:
            close = difflib.get_close_matches(name, names, n=3)
            raise SweepTextError(f"There is no {what} '{name}'. Choose {', '.join(close or names)}.")


def run_once(
    prepared: Prepared, prompt: Prompt, context: NodeContext, store: RunStore, picture_id: str, first_picture: int,
    on_step: Callable[[int], None],
) -> OneRun:  # fmt: skip
    """Make one prompt's pictures and measure each phase. Pictures of a later repeat replace those of an earlier one."""
    parts, settings = prepared.parts, prepared.settings
    text = prompt.text
    if settings.prompt_tokens is not None:
        text = prompt_of_length(parts.clip, text, settings.prompt_tokens)
    resident = rss_to_grow_from()
    with measured("text_encode", conditioning.device_of(parts.clip)) as encoded:
        base = _expert(parts.model, parts.clip, text, prompt.negative)
        refiner = None
        if settings.handoff is not None:
            refiner = _expert(parts.refiner, parts.refiner_clip, text, prompt.negative)
    latent = core_nodes().EmptyLatentImage().generate(settings.width, settings.height, settings.batch)[0]
    sampled = _sample(base, refiner, latent, prompt.seed, settings, ProfileOptions(part=True, on_step=on_step), context)
    device = taesd.decode_device() if settings.decoder.name == "tiny" else parts.vae.device
    with measured("decode", device) as decoded:
        result = _decode(prepared, sampled.latent)
    with measured("save") as saved:
        files = save_pngs(result.images, picture_id, context, store, first_picture)
    run = (sampled.record.summary.get("run") or {}).get("median")
    return OneRun(
        record=_with_memory(sampled.record, encoded, decoded),
        encode_ms=encoded.ms,
        sample_ms=float(run or 0.0),
        decode_ms=decoded.ms,
        save_ms=saved.ms,
        pictures=result.images[:1].float().cpu(),
        decode_info=dict(result.info),
        files=tuple(path.relative_to(store.root.parent).as_posix() for path in files),
        rss_growth_gb=growth_gb(
            resident, (encoded.peak, decoded.before, decoded.peak), sampled.record.memory.get("sample", {})
        ),
    )


def _expert(model: Any, clip: Any, text: str, negative: str) -> Expert:
    """A model with its prompt. No negative is zeroed conditioning on SDXL, and the encoded empty text elsewhere."""
    positive = conditioning.encode(clip, text)
    if not negative.strip() and family_of(model).startswith("SDXL"):
        return Expert(model, positive, core_nodes().ConditioningZeroOut().zero_out(positive)[0])
    return Expert(model, positive, conditioning.encode(clip, negative))


def _sample(
    base: Expert, refiner: Expert | None, latent: dict[str, Any], seed: int, settings: CellSettings,
    options: ProfileOptions, context: NodeContext,
) -> ProfiledLatent:  # fmt: skip
    """The base alone, or base and refiner where the cell hands over."""
    chosen = (seed, settings.steps, settings.cfg, settings.sampler, settings.scheduler)
    if refiner is not None and settings.handoff is not None:
        return sample_ensemble(base, refiner, latent, EnsembleRequest(*chosen, settings.handoff), options, context)
    return profile_sampling(
        base.model, SamplingRequest(*chosen), base.positive, base.negative, latent, options, context
    )


def _decode(prepared: Prepared, latent: dict[str, Any]) -> decoding.Decoded:
    parts = prepared.parts
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
