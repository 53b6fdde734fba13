"""What the suite measures, the most useful first: blocks of variants, as data."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass, replace

from speedlab.plans.axes import CellSettings
from speedlab.plans.plan_text import STOCK, parse_plan, parse_stack

from ..scenarios.scenario import S0_SETTINGS, S1_SETTINGS

# Every step is computed in whole, so the images are stock's up to rounding.
EXACT = "attention(auto)+precision(memory_format=channels_last,cudnn_benchmark=on)+compile(inductor)"
FASTEST = "compile(inductor)+dynamic_cfg(0.75)+tiny"
FASTEST_DEEPCACHE = "compile(inductor)+deepcache(3)+dynamic_cfg(0.75)+tiny"
WITHIN = "deepcache(3)+dynamic_cfg(0.75)+memory_plan(auto,budget_gb={budget:g})+tiny"


@dataclass(frozen=True)
class Variant:
    """One thing to measure: a stack of techniques as Benchmark writes them; `stock` is ComfyUI's own nodes alone.

    `whole`: each step computes cond and uncond in full, so operations a second are known. `prefetch`: whether
    streamed weights are copied ahead. `handoff`: the share of the steps after which the refiner goes on.
    """

    name: str
    stack: str = STOCK
    whole: bool = True
    prefetch: bool = True
    batch: int = 1
    handoff: float | None = None

    @property
    def is_stock(self) -> bool:
        """Whether this is ComfyUI's own nodes alone."""
        return self.stack == STOCK and self.handoff is None

    @property
    def plan(self) -> str:
        """What is asked for."""
        return self.stack if self.handoff is None else f"ensemble({self.handoff:g})"


@dataclass(frozen=True)
class Block:
    """Variants that are measured together. `runner` names the kind of measurement, `needs_s` what a fast GPU takes
    about: a block that no longer fits is left to the next call. `apart`: variants run one after the other, each from an
    empty device, in place of in turns. `cap_gb`: the GPU is made to look this large. `own_allocator`: it records CUDA
    graphs, which need PyTorch's memory allocator in place of the one that ComfyUI chooses.
    """

    id: str
    runner: str
    shows: str
    variants: tuple[Variant, ...]
    model: str = "sdxl"
    dtype: str = "fp16"
    needs_s: float = 20.0
    apart: bool = False
    cap_gb: float | None = None
    own_allocator: bool = False

    def row(self, variant: Variant) -> str:
        """The id of a variant's row."""
        return f"{self.id}/{variant.name}"


WORKLOADS = {
    "sdxl": CellSettings(1024, 1024, steps=30, cfg=S1_SETTINGS.cfg),
    "sd15": CellSettings(512, 512, steps=30, cfg=S0_SETTINGS.cfg),
    "refiner": CellSettings(1024, 1024, steps=30, cfg=S1_SETTINGS.cfg),
}
_SMALL = CellSettings(64, 64, steps=2, cfg=S0_SETTINGS.cfg)

_STOCK = Variant(STOCK)
_EXACT = Variant("exact", EXACT)
_PLANS = (
    _STOCK,
    _EXACT,
    Variant("sdxl-fastest", FASTEST, whole=False),
    Variant("sdxl-fastest-deepcache", FASTEST_DEEPCACHE, whole=False),
)
_COMPILED = Variant("compile", "compile(inductor)")


def _attention(*names: str) -> tuple[Variant, ...]:
    return tuple(Variant(f"attention-{name}", f"attention({name})") for name in names)


def _alone(id: str, shows: str, *variants: Variant, needs_s: float = 50.0, model: str = "sdxl") -> Block:
    return Block(id, "images", shows, (_STOCK, *variants), model=model, needs_s=needs_s)


def _cap(gb: float) -> Block:
    variants = (_STOCK, Variant("plan", WITHIN.format(budget=gb), whole=False))
    shows = f"a GPU of {gb:g} GB: stock, and the plan that fits"
    return Block(f"cap-{gb:g}gb", "images", shows, variants, apart=True, cap_gb=gb, needs_s=40.0)


def _cold(name: str, options: str, needs_s: float) -> Block:
    variant = Variant(name, f"compile({options})")
    shows, graphs = f"compile({options}): cold, found again, warm", _records_graphs(variant.stack)
    return Block(f"compile-{name}", "compile", shows, (variant,), needs_s=needs_s, own_allocator=graphs)


def _records_graphs(stack: str) -> bool:
    """Whether a stack of techniques records CUDA graphs."""
    return re.search(r"\(cudagraphs|mode=(reduce-overhead|max-autotune)(?!-no)", stack) is not None


BLOCKS: tuple[Block, ...] = (
    Block(
        "peak", "peak", "matrix product and memory copy", (Variant("fp16"), Variant("bf16"), Variant("copy")),
        needs_s=5.0,
    ),
    Block("work-sdxl", "work", "operations of a step", (Variant("step"),), needs_s=25.0),
    Block("sdxl-fp16", "images", "SDXL 1024x1024, 30 steps, fp16", _PLANS, needs_s=180.0),
    Block("kernels", "kernels", "where a step's time goes", (_STOCK, _PLANS[2], _EXACT), needs_s=30.0),
    Block("sdxl-bf16", "images", "SDXL 1024x1024, 30 steps, bf16", _PLANS, dtype="bf16", needs_s=180.0),
    Block("profiler", "overhead", "Profile Sampler against KSampler", (Variant("timing"),), needs_s=45.0),
    *(_cap(gb) for gb in (8.0, 6.0, 4.0)),
    Block(
        "offload", "images", "weights on the host, streamed or in turns",
        (
            Variant("sequential-tiny", "memory_plan(sequential)+tiny"),
            Variant("sequential-tiny-no-prefetch", "memory_plan(sequential)+tiny", prefetch=False),
            Variant("sequential", "memory_plan(sequential)"),
            Variant("model", "memory_plan(model)"),
        ),
        apart=True, needs_s=90.0,
    ),
    _alone(
        "alone-attention", "attention backends",
        *_attention("auto", "sdpa", "sdpa_flash", "sdpa_mem_efficient", "sdpa_cudnn"),
        needs_s=60.0,
    ),
    _alone(
        "alone-exact", "techniques that keep the image",
        _COMPILED,
        Variant("channels-last", "precision(memory_format=channels_last)"),
        Variant("cudnn-benchmark", "precision(cudnn_benchmark=on)"),
        Variant("fp16-accumulation", "precision(fp16_accumulation=on)"),
        Variant("compile-vae", "compile_vae(inductor)"),
        needs_s=70.0,
    ),
    _alone(
        "alone-lossy", "techniques that change the image",
        Variant("dynamic-cfg", "dynamic_cfg(0.75)", whole=False),
        Variant("deepcache-2", "deepcache(2)", whole=False),
        Variant("deepcache-3", "deepcache(3)", whole=False),
        Variant("deepcache-5", "deepcache(5)", whole=False),
        Variant("tiny-vae", "tiny"),
        needs_s=50.0,
    ),
    Block("work-sd15", "work", "operations of a step", (Variant("step"),), "sd15", needs_s=15.0),
    _alone(
        "sd15-fp16", "SD 1.5 512x512, 30 steps, fp16",
        _EXACT,
        Variant("fastest", FASTEST, whole=False),
        Variant("fastest-deepcache", FASTEST_DEEPCACHE, whole=False),
        needs_s=70.0, model="sd15",
    ),
    Block("sd15-bf16", "images", "SD 1.5 512x512, 30 steps, bf16", (_STOCK, _EXACT), "sd15", "bf16", 50.0),
    _cold("blocks", "inductor,scope=blocks", 70.0),
    _cold("model", "inductor,scope=model", 90.0),
    _cold("reduce-overhead", "inductor,mode=reduce-overhead", 80.0),
    _cold("cudagraphs", "cudagraphs", 30.0),
    _cold("dynamic", "inductor,dynamic=true", 80.0),
    Block("tour-lora", "tour_lora", "LoRAs on and off a compiled model", (_COMPILED,), needs_s=70.0),
    Block("tour-size", "tour_size", "sizes of a compiled model", (_COMPILED,), needs_s=80.0),
    Block("batch-sdxl", "batches", "images a minute by batch", (_STOCK, _EXACT), needs_s=80.0),
    Block("batch-sd15", "batches", "images a minute by batch", (_STOCK, _EXACT), "sd15", needs_s=80.0),
    Block("refiner", "images", "base and refiner together", (Variant("ensemble", handoff=0.8, whole=False),),
          apart=True, needs_s=40.0),
    _alone(
        "alone-attention-slow", "attention without a fused kernel, and from packages",
        *_attention("sdpa_math", "sub_quadratic", "split", "xformers", "flash_attn", "sage", "sage3", "kitchen_int8"),
        needs_s=120.0,
    ),
    # These try many kernels for each product and may take a call for themselves.
    _cold("max-autotune-no-cudagraphs", "inductor,mode=max-autotune-no-cudagraphs", 420.0),
    _cold("max-autotune", "inductor,mode=max-autotune", 420.0),
)  # fmt: skip


def small(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """The same blocks for tiny models on a CPU: no fp16, which it only stores, and tracing in place of a
    compiler that takes a minute a graph."""

    def traced(variant: Variant) -> Variant:
        # A trace takes no attention of another node.
        stack = variant.stack.replace("inductor", "jit_trace")
        return replace(variant, stack=stack.removeprefix("attention(auto)+") if "jit_trace" in stack else stack)

    return tuple(
        replace(
            block,
            dtype=block.dtype.replace("fp16", "fp32"),
            variants=tuple(map(traced, block.variants)),
            own_allocator=False,
        )
        for block in blocks
    )


def workload_of(model: str, variant: Variant, is_small: bool) -> CellSettings:
    """What a variant makes with a model. Raises SweepTextError."""
    plain = _SMALL if is_small else WORKLOADS[model]
    asked = replace(plain, plan=variant.plan, batch=variant.batch, handoff=variant.handoff)
    return asked.with_stack(parse_stack(variant.stack))


def tried(plans: Iterable[str], model: str, dtype: str) -> Block:
    """A block of plans as the user wrote them, `name=stack`, in turns with stock. Raises SweepTextError."""
    read = [parse_plan(text) for text in plans]
    variants = tuple(Variant(one.name, "+".join(t.words() for t in one.techniques), whole=False) for one in read)
    for variant in variants:
        workload_of(model, variant, False)
    graphs = any(_records_graphs(variant.stack) for variant in variants)
    shows = "plans of the command line"
    return Block(f"try-{model}-{dtype}", "images", shows, (_STOCK, *variants), model, dtype, own_allocator=graphs)


def blocks_of(options: Namespace) -> tuple[Block, ...]:
    """What a command line asks for. Raises ValueError, SweepTextError."""
    if options.plans:
        return (tried(options.plans, options.model, options.dtype),)
    return chosen(BLOCKS, options.only)


def chosen(blocks: Iterable[Block], only: Iterable[str]) -> tuple[Block, ...]:
    """The blocks whose id begins with one of `only`; all where that is empty. Raises ValueError for a word of none."""
    every, words = tuple(blocks), tuple(only)
    for word in words:
        if not any(block.id.startswith(word) for block in every):
            raise ValueError(f"no block begins with '{word}'. There are {', '.join(b.id for b in every)}.")
    return tuple(b for b in every if not words or any(b.id.startswith(word) for word in words))
