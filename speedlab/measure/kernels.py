"""Which kernels (on a GPU) or operators (on a CPU) the profiled steps spent their time in, from a trace's events.

Kernel and operator names in plain language: which family of work it is, and what the parts of a name say.

Names are the libraries' own and change between versions, so this reads words that have been stable for years and says
nothing where it knows nothing. A family follows from the words alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from . import nvtx
from .torch_trace import ANNOTATION, KERNEL, OPERATOR, Interval, Span, intersection, length, merged, self_times

KERNELS = "kernels"
OPERATORS = "operators"
_LONGEST_NAME = 400
_COMPILED = ("## Call CompiledFxGraph", "Torch-Compiled Region", "CompiledFunction")
_COPY_KINDS = ("HtoD", "DtoH", "DtoD", "PtoP", "HtoH", "HtoA", "AtoH")


@dataclass(frozen=True)
class KernelReport:
    """What a trace tells. `rows` is the record's `kernels[]`; shares are percent and add up to 100."""

    unit: str
    rows: tuple[dict[str, Any], ...]
    families: tuple[dict[str, Any], ...]
    runtime: tuple[dict[str, Any], ...]
    device: dict[str, Any] | None
    wall_ms: float
    total_ms: float
    between_ms: float | None


@dataclass
class _Row:
    calls: int = 0
    us: float = 0.0


def analyse(spans: Sequence[Span]) -> KernelReport:
    """Tables of one trace whose sampling lies in a span `sl/sample`."""
    window = _window(spans)
    inside = [span for span in spans if window[0] <= span.start <= window[1]]
    device = [span for span in spans if span.is_device and span.start >= window[0]]
    if device:
        timed: Iterable[tuple[str, float]] = ((span.name, span.duration) for span in device)
        between = None
    else:
        nested = [span for span in inside if span.category in (OPERATOR, ANNOTATION)]
        own = list(zip(nested, self_times(nested), strict=True))
        timed = ((span.name, us) for span, us in own if span.category == OPERATOR)
        between = sum(us for span, us in own if span.category == ANNOTATION) / 1000.0
    rows = _table(timed)
    total = sum(row["ms"] for row in rows)
    return KernelReport(
        unit=KERNELS if device else OPERATORS,
        rows=tuple(rows),
        families=tuple(_families(rows)),
        runtime=tuple(_runtime(inside)),
        device=_device_activity(device, inside, window) if device else None,
        wall_ms=round((window[1] - window[0]) / 1000.0, 4),
        total_ms=round(total, 4),
        between_ms=None if between is None else round(between, 4),
    )


def _window(spans: Sequence[Span]) -> Interval:
    """From the first profiled evaluation to the last; the GPU may still be working when the host is done."""
    samples = [span for span in spans if span.name == nvtx.SAMPLE and span.category == ANNOTATION]
    if samples:
        return samples[0].start, samples[0].end
    return (min((s.start for s in spans), default=0.0), max((s.end for s in spans), default=0.0))


def _table(timed: Iterable[tuple[str, float]]) -> list[dict[str, Any]]:
    by_name: dict[str, _Row] = {}
    for name, us in timed:
        row = by_name.setdefault(_display_name(name), _Row())
        row.calls += 1
        row.us += us
    total = sum(row.us for row in by_name.values())
    ordered = sorted(by_name.items(), key=lambda item: (-item[1].us, item[0]))
    return [
        {
            "name": name,
            "family": family_of(name),
            "calls": row.calls,
            "ms": round(row.us / 1000.0, 4),
            "share": round(100.0 * row.us / total, 6) if total > 0 else 0.0,
            "reading": reading(name),
        }
        for name, row in ordered
    ]


def _display_name(name: str) -> str:
    """A compiled graph's name holds a hash that differs from machine to machine."""
    return "compiled graph (torch.compile)" if name.startswith(_COMPILED) else name[:_LONGEST_NAME]


def _families(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    tables = []
    for family, meaning in FAMILIES.items():
        mine = [row for row in rows if row["family"] == family]
        if mine:
            tables.append(
                {
                    "family": family,
                    "calls": sum(row["calls"] for row in mine),
                    "ms": round(sum(row["ms"] for row in mine), 4),
                    "share": round(sum(row["share"] for row in mine), 6),
                    "meaning": meaning,
                }
            )
    return sorted(tables, key=lambda table: (table["family"] == OTHER, -table["share"]))


def _runtime(inside: Sequence[Span]) -> list[dict[str, Any]]:
    by_name: dict[str, _Row] = {}
    for span in inside:
        if span.is_runtime:
            row = by_name.setdefault(span.name, _Row())
            row.calls += 1
            row.us += span.duration
    ordered = sorted(by_name.items(), key=lambda item: (-item[1].us, item[0]))
    return [{"name": name, "calls": row.calls, "ms": round(row.us / 1000.0, 4)} for name, row in ordered]


def _device_activity(device: Sequence[Span], inside: Sequence[Span], window: Interval) -> dict[str, Any]:
    end = max(window[1], *(span.end for span in device))
    wall = end - window[0]
    computing = merged((s.start, s.end) for s in device if s.category == KERNEL)
    copying = merged((s.start, s.end) for s in device if s.category != KERNEL)
    busy = length(merged([*computing, *copying]))
    waits = length(merged((s.start, s.end) for s in inside if s.is_runtime and "Synchronize" in s.name))
    overlap = length(intersection(computing, copying))
    copied = length(copying)
    return {
        "busy_ms": round(busy / 1000.0, 4),
        "busy_share": _percent(busy, wall),
        "host_wait_ms": round(waits / 1000.0, 4),
        "host_wait_share": _percent(waits, wall),
        "copies": {
            "ms": round(copied / 1000.0, 4),
            "overlap_ms": round(overlap / 1000.0, 4),
            "overlap_share": _percent(overlap, copied),
            "kinds": _copy_kinds(device),
        },
    }


def _percent(part: float, whole: float) -> float | None:
    return round(100.0 * part / whole, 4) if whole > 0 else None


def _copy_kinds(device: Sequence[Span]) -> list[dict[str, Any]]:
    kinds: dict[str, dict[str, Any]] = {}
    for span in device:
        if span.category == KERNEL:
            continue
        kind = next((word for word in _COPY_KINDS if word in span.name), "memset" if "memset" in span.category else "")
        entry = kinds.setdefault(kind or "other", {"kind": kind or "other", "calls": 0, "ms": 0.0, "bytes": 0})
        entry["calls"] += 1
        entry["ms"] = round(entry["ms"] + span.duration / 1000.0, 4)
        entry["bytes"] += int(span.args.get("bytes") or 0)
    return sorted(kinds.values(), key=lambda entry: -entry["ms"])


GEMM = "GEMM"
ATTENTION = "attention"
CONVOLUTION = "convolution"
NORMALISATION = "normalisation"
ELEMENTWISE = "element-wise"
COPY = "copy"
OTHER = "other"

FAMILIES: dict[str, str] = {
    GEMM: "matrix products of linear layers; on a GPU in half precision or TF32 they run on tensor cores",
    ATTENTION: "every position compared with every other; grows with the square of the image's area",
    CONVOLUTION: "3x3 and 1x1 filters over the image; grows with its area",
    NORMALISATION: "means and variances (group norm, layer norm); limited by memory speed",
    ELEMENTWISE: "one number at a time (additions, activations); limited by memory speed, and what compilers fuse",
    COPY: "moving or converting numbers without computing: between host and GPU, dtypes or memory layouts",
    OTHER: "everything else, such as views of the same numbers and reserving memory",
}

_TRITON = re.compile(r"^triton_(poi|per|red|tem|mm|for|spl|unk)\w*?_(?:fused_)?(.*)", re.IGNORECASE)
# The first family whose words stand in the name wins, so the order is part of the meaning: "fmha_cutlass" is attention
# although cutlass is a library of matrix products, and a convolution may be called an implicit gemm.
_WORDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        COPY,
        re.compile(r"memcpy|memset|nchwtonhwc|nhwctonchw|converttensor|batchedcopy|direct_copy_kernel"),
    ),
    (ATTENTION, re.compile(r"flash|fmha|attention|attn|softmax|scaled_dot|\bsdpa|\bmha_|qk_int8")),
    (CONVOLUTION, re.compile(r"conv(?!ert)|fprop|dgrad|wgrad|winograd|implicit_gemm|im2col|depthwise")),
    (
        NORMALISATION,
        re.compile(r"group_?norm|layer_?norm|batch_?norm|rms_?norm|rowwisemoments|computefusedparams|norm_"),
    ),
    (GEMM, re.compile(r"gemm|gemv|cutlass|cublas|nvjet|splitk|xmma|tensorop|_mm_|matmul|\bmm\b|gett_|ck_tile|cijk_")),
    (ELEMENTWISE, re.compile(r"elementwise|pointwise|silu|gelu|sigmoid|activation|binary|unary")),
    (COPY, re.compile(r"copy|transpose|permute|contiguous|fill")),
)
_OPERATOR_TEXTS = {
    GEMM: "mm addmm bmm baddbmm matmul linear addmv mv dot _scaled_mm _addmm_activation einsum _int_mm "
    "_linear_pointwise mkldnn_linear",
    NORMALISATION: "var var_mean mean native_norm linalg_vector_norm norm std",
    ELEMENTWISE: "add add_ sub sub_ mul mul_ div div_ exp exp_ log neg pow sqrt rsqrt sin cos tanh relu relu_ clamp "
    "clamp_ where addcmul addcdiv reciprocal abs lerp rsub erf square maximum minimum isfinite ne eq gt "
    "lt ge le masked_fill masked_fill_ leaky_relu hardtanh bitwise_and bitwise_or logical_and logical_or "
    "logical_not",
    COPY: "copy_ to _to_copy clone contiguous cat stack index index_select gather repeat fill_ zero_ zeros ones "
    "full pad constant_pad_nd roll flip item _local_scalar_dense zeros_like ones_like full_like",
    # These only look at the same numbers in another way, or reserve memory.
    OTHER: "expand expand_as slice narrow chunk split split_with_sizes view reshape _reshape_alias _unsafe_view "
    "as_strided transpose permute unsqueeze squeeze select empty empty_like empty_strided new_empty "
    "resize_ t flatten unflatten unbind movedim resolve_conj resolve_neg detach lift_fresh alias "
    "result_type",
}
_OPERATORS = {family: frozenset(text.split()) for family, text in _OPERATOR_TEXTS.items()}
_ARCHITECTURES = {
    "volta": "Volta",
    "turing": "Turing",
    "ampere": "Ampere",
    "ada": "Ada",
    "hopper": "Hopper",
    "blackwell": "Blackwell",
}
_BY_SM = ((100, "Blackwell"), (90, "Hopper"), (89, "Ada"), (80, "Ampere"), (75, "Turing"), (70, "Volta"))
# Instruction shapes of tensor cores, m x n x k run together behind the accumulator's letter: s16816 is 16x8x16 into
# fp32, h884 is 8x8x4 into fp16.
_INSTRUCTION = re.compile(r"(?<![a-z0-9])([sdhi])(16816|16832|1688|884|16864|8816|168256)(?![0-9])")
_ACCUMULATORS = {"s": "fp32", "d": "fp64", "h": "fp16", "i": "int32"}
_SHAPES = {"16816": "16x8x16", "16832": "16x8x32", "1688": "16x8x8", "884": "8x8x4", "16864": "16x8x64",
           "8816": "8x8x16", "168256": "16x8x256"}  # fmt: skip
_DTYPES = (
    ("bf16", re.compile(r"(?<![a-z0-9])(bf16|bfloat16)|bfloat16")),
    ("tf32", re.compile(r"tf32")),
    ("fp16", re.compile(r"(?<![a-z0-9])(fp16|f16|half)(?![0-9a-z])|_f16_|hgemm|half_t")),
    ("fp8", re.compile(r"e4m3|e5m2|fp8")),
    ("int8", re.compile(r"(?<![a-z0-9])(int8|i8|s8)(?![0-9a-z])")),
    ("fp32", re.compile(r"(?<![a-z0-9])(fp32|f32|sgemm|float)(?![0-9a-z])|sgemm")),
)
_LAYOUTS = {"nn": "neither input transposed", "nt": "the second input transposed",
            "tn": "the first input transposed", "tt": "both inputs transposed"}  # fmt: skip


def family_of(name: str) -> str:
    """One of FAMILIES for a GPU kernel or a CPU operator."""
    if name.startswith(("aten::", "mkldnn::", "onednn::", "xformers::", "flash_attn::", "inductor::", "prims::")):
        return _operator_family(name.split("::", 1)[1])
    triton = _TRITON.match(name)
    if triton is not None:
        return _triton_family(triton.group(1).lower(), triton.group(2).lower())
    return _by_words(name.lower())


def reading(name: str) -> str | None:
    """What a GPU kernel's name says, in words; None where it says nothing that is known here."""
    if name.startswith("aten::"):
        return None
    lower = name.lower()
    parts = [*_library(lower), *_architecture(lower), *_arithmetic(lower), *_tiling(lower)]
    return ", ".join(parts) or None


def _operator_family(base: str) -> str:
    for family, names in _OPERATORS.items():
        if base in names:
            return family
    return _by_words(base)


def _by_words(lower: str) -> str:
    return next((family for family, words in _WORDS if words.search(lower)), OTHER)


def _triton_family(kind: str, fused: str) -> str:
    """Inductor tells the kind of its kernels: pointwise, reduction (persistent or looped), template, foreach."""
    if kind in ("tem", "mm"):
        if "attention" in fused:
            return ATTENTION
        return CONVOLUTION if "conv" in fused else GEMM
    if kind in ("per", "red", "spl"):
        if "softmax" in fused:
            return ATTENTION
        return NORMALISATION if re.search(r"norm|var_mean|mean", fused) else OTHER
    copies = {"", "_to_copy", "clone", "cat", "copy", "copy_", "_unsafe_view", "permute", "transpose", "view"}
    words = set(re.sub(r"_\d+$", "", fused).split("__"))
    return COPY if words <= copies else ELEMENTWISE


def _library(lower: str) -> Sequence[str]:
    for word, text in (
        ("fmha_cutlass", "memory-efficient attention (CUTLASS)"),
        ("flash_fwd", "FlashAttention, forward"),
        ("triton_poi", "element-wise kernel that a compiler fused (Triton)"),
        ("triton_per", "reduction that a compiler fused (Triton)"),
        ("triton_red", "reduction that a compiler fused (Triton)"),
        ("triton_tem", "matrix product from a compiler's template (Triton)"),
        ("nvjet", "cuBLAS matrix product"),
        ("cublaslt::splitkreduce", "adds up the parts of a matrix product that was split along its depth"),
        ("fprop", "convolution, forward"),
        ("cudnn", "cuDNN"),
        ("cutlass", "CUTLASS"),
        ("sgemm", "matrix product without tensor cores"),
    ):
        if word in lower:
            return (text,)
    return ()


def _architecture(lower: str) -> Sequence[str]:
    for word, text in _ARCHITECTURES.items():
        if re.search(rf"(?<![a-z]){word}(?![a-z])", lower):
            return (f"written for {text}",)
    found = re.search(r"(?:sm_?|cutlass_?)(\d{2,3})(?![0-9x])", lower)
    if found is None:
        return ()
    number = int(found.group(1))
    name = next((text for least, text in _BY_SM if number >= least), None)
    return (f"written for {name} (compute capability {number // 10}.{number % 10})",) if name else ()


def _arithmetic(lower: str) -> Sequence[str]:
    dtype = next((text for text, pattern in _DTYPES if pattern.search(lower)), None)
    plain = lower.replace("gemm", "_gemm").replace("fprop", "_fprop")
    instruction = _INSTRUCTION.search(plain)
    if instruction is None:
        return (f"{dtype} numbers",) if dtype else ()
    numbers = dtype or ("tf32" if instruction.group(2) == "1688" else "fp16")
    shape, accumulator = _SHAPES[instruction.group(2)], _ACCUMULATORS[instruction.group(1)]
    return (f"{numbers} numbers on tensor cores, {shape} at a time, added up in {accumulator}",)


def _tiling(lower: str) -> Sequence[str]:
    parts = []
    tile = re.search(r"(?<![0-9])(\d{2,3})x(\d{2,3})(?![0-9])", lower)
    if tile is not None:
        parts.append(f"tiles of {tile.group(1)}x{tile.group(2)}")
    stages = re.search(r"stages_?(\d+)x(\d+)", lower) or re.search(r"_(32|64|128)x([2-9])(?![0-9])", lower)
    if stages is not None:
        parts.append(f"{stages.group(2)} tiles in flight, {stages.group(1)} deep")
    layout = re.search(r"_(nn|nt|tn|tt)(?:_|$|\b)", lower)
    if layout is not None:
        parts.append(_LAYOUTS[layout.group(1)])
    return parts
