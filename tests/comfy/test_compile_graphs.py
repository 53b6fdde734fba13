"""Compile Model, graph by graph: what is compiled when, counted by dynamo. The graphs themselves run as they are."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from . import tiny_unet
from .tiny_unet import relative

SIZE = (16, 16)
# Kinds of blocks in the tiny SD 1.5: residual blocks by their channels, transformers by theirs.
KINDS = 9
# Graphs of a first image: three kinds stand at two levels, so that they get a second graph, for any size.
FIRST = 12
TRANSFORMERS = 3


@pytest.fixture(scope="module")
def unet(comfy: Any) -> Any:
    with torch.inference_mode():  # as ComfyUI loads models
        return tiny_unet.build("sd15")


@pytest.fixture(scope="module")
def slim(comfy: Any) -> Any:
    """For what is compiled as a whole: a third of the blocks, and of the time."""
    with torch.inference_mode():
        return tiny_unet.build("slim")


@pytest.fixture
def compiled(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The engine with fresh counters; graphs run as dynamo captured them, for making C++ of each takes seconds."""
    dynamo, inductor = engine("techniques.compile.backends.dynamo"), engine("techniques.compile.backends.inductor")
    monkeypatch.setattr(inductor, "_compile_graph", lambda _options, graph, _inputs: graph.forward)
    # Dynamo tells this logger of every step, and a test runner would keep it all.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    torch._dynamo.reset()
    dynamo._functions.clear()
    yield engine("techniques.compile.attach")
    torch._dynamo.reset()
    dynamo._functions.clear()


@pytest.fixture
def graphs(engine: Any) -> Any:
    """Graphs compiled since the last call."""
    count = engine("techniques.compile.backends.dynamo").COUNT
    seen = [count.graphs]

    def new() -> int:
        seen[0], before = count.graphs, seen[0]
        return seen[0] - before

    return new


def lora(model: Any, strength: float, part: str = "attn") -> Any:
    clone = model.clone()
    weights = {k: v for k, v in model.model.state_dict().items() if part in k and k.endswith("weight") and v.ndim > 1}
    generator = torch.Generator().manual_seed(3)
    patches = {k: ("diff", (0.05 * torch.randn(v.shape, generator=generator),)) for k, v in weights.items()}
    assert len(clone.add_patches(patches, strength)) == len(patches) > 0
    return clone


def test_blocks_equal_eager_and_leave_the_model_as_it_was(unet: Any, compiled: Any, graphs: Any) -> None:
    before = list(unet.model.model.state_dict())
    gradients = [p.requires_grad for p in unet.unet.parameters()]
    model = compiled.attach_compile(unet.model, compiled.CompileConfig(scope="blocks"))
    eager = unet.sample(steps=2, size=SIZE)
    assert relative(unet.sample(model, steps=2, size=SIZE), eager) < 1e-5
    assert graphs() == FIRST
    assert torch.equal(unet.sample(steps=2, size=SIZE), eager)  # a clone without the node stays eager
    unet.sample(model, steps=3, size=SIZE)
    assert graphs() == 0
    assert list(unet.model.model.state_dict()) == before
    assert [p.requires_grad for p in unet.unet.parameters()] == gradients
    assert not any({"forward", "_forward"} & vars(m).keys() for m in unet.unet.modules())


def test_a_lora_costs_no_graph_and_acts(unet: Any, compiled: Any, graphs: Any) -> None:
    config = compiled.CompileConfig(scope="blocks")
    unet.sample(compiled.attach_compile(unet.model, config), steps=2, size=SIZE)
    assert graphs() == FIRST
    plain = unet.sample(steps=2, size=SIZE)
    for model in (
        lora(unet.model, 1.0), lora(unet.model, 0.4), lora(unet.model, 1.0, "in_layers"),
        lora(lora(unet.model, 0.5), 1.0, "ff"), unet.model,
    ):  # fmt: skip
        eager = unet.sample(model, steps=2, size=SIZE)
        assert torch.equal(eager, plain) == (model is unet.model)
        # The node before and behind the LoRA.
        after = unet.sample(compiled.attach_compile(model, config), steps=2, size=SIZE)
        assert relative(after, eager) < 1e-5
    behind = lora(compiled.attach_compile(unet.model, config), 1.0)
    assert (
        relative(unet.sample(behind, steps=2, size=SIZE), unet.sample(lora(unet.model, 1.0), steps=2, size=SIZE)) < 1e-5
    )
    assert graphs() == 0


@pytest.mark.full
def test_a_second_checkpoint_of_the_family_costs_no_graph(unet: Any, compiled: Any, graphs: Any) -> None:
    config = compiled.CompileConfig(scope="blocks")
    unet.sample(compiled.attach_compile(unet.model, config), steps=1, size=SIZE)
    other = tiny_unet.build("sd15", seed=5)
    graphs()
    assert relative(
        other.sample(compiled.attach_compile(other.model, config), steps=2, size=SIZE), other.sample(steps=2, size=SIZE)
    ) < 1e-5  # fmt: skip
    assert graphs() == 0


@pytest.mark.parametrize("first, second", [("contiguous", "channels_last"), ("channels_last", "contiguous")])
def test_another_layout_makes_no_code_for_any_layout(
    unet: Any, compiled: Any, engine: Any, monkeypatch: pytest.MonkeyPatch, first: str, second: str
) -> None:
    """At one function dynamo would take strides that it has seen in two kinds for changing ones, and inductor leaves
    convolutions alone whose strides change."""
    precision, inductor = engine("techniques.precision.attach"), engine("techniques.compile.backends.inductor")
    with_symbols: list[bool] = []

    def compile_graph(_options: Any, graph: Any, inputs: list[Any]) -> Any:
        with_symbols.append(any(isinstance(value, torch.SymInt) for value in inputs))
        return graph.forward

    monkeypatch.setattr(inductor, "_compile_graph", compile_graph)
    seen = []
    for layout in (first, second):
        config = precision.PrecisionConfig(memory_format=layout)
        model = compiled.attach_compile(precision.attach_precision(unet.model, config), compiled.CompileConfig())
        result = unet.sample(model, steps=1, size=SIZE)
        assert relative(result, unet.sample(steps=1, size=SIZE)) < 1e-5
        seen.append(sum(with_symbols))
        with_symbols.clear()
    # Kinds of transformers that stand at two levels have code for any size; the sampler's other kinds have none.
    assert seen[0] == seen[1] > 0


_TOURS = [
    pytest.param("blocks", "auto", 5, marks=pytest.mark.full),
    pytest.param("blocks", "true", 2, marks=pytest.mark.full),
    pytest.param("model", "true", 2, marks=pytest.mark.full),
]


@pytest.mark.parametrize("scope, dynamic, budget", _TOURS)
def test_a_tour_of_sizes_stays_in_its_budget(
    unet: Any, slim: Any, compiled: Any, graphs: Any, scope: str, dynamic: str, budget: int
) -> None:
    """Four resolutions, CFG 2 to 1 to 2, batch 1 to 4: at most `budget` graphs a kind, and 0 when all comes again."""
    unet = unet if scope == "blocks" else slim
    model = compiled.attach_compile(unet.model, compiled.CompileConfig(dynamic=dynamic, scope=scope))
    kinds = KINDS if scope == "blocks" else 1

    def tour() -> None:
        for size in ((16, 16), (24, 16), (16, 32), (32, 32)):
            unet.sample(model, steps=1, size=size)
        for cfg in (2.0, 1.0, 2.0):
            unet.sample(model, steps=1, size=(16, 32), cfg=cfg)
        for batch in (1, 2, 3, 4):
            last = unet.sample(model, steps=1, size=(16, 16), batch=batch)
        assert relative(last, unet.sample(steps=1, size=(16, 16), batch=4)) < 1e-5

    tour()
    assert graphs() <= budget * kinds
    tour()
    assert graphs() == 0


@pytest.mark.parametrize("allocator, refused", [("cudaMallocAsync", True), ("native", False)])
def test_cuda_graphs_need_pytorchs_own_allocator(
    engine: Any, monkeypatch: pytest.MonkeyPatch, allocator: str, refused: bool
) -> None:
    """Known before the run, and with the remedy: recording fails in the middle of it otherwise."""
    backends = engine("techniques.compile.backends")
    inductor, cudagraphs = backends.load("inductor"), backends.load("cudagraphs")
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: allocator)
    for backend in (inductor, cudagraphs):
        monkeypatch.setattr(backend, "available", lambda: (True, ""))
    card = torch.device("cuda")
    for backend, mode in ((inductor, "reduce-overhead"), (inductor, "max-autotune"), (cudagraphs, "default")):
        able, reason = backends.usable(backend, backends.CompileOptions(mode, device=card))
        assert able is not refused
        assert ("--disable-cuda-malloc" in reason and "inductor in the mode default" in reason) is refused
    assert backends.usable(inductor, backends.CompileOptions("default", device=card)) == (True, "")
    assert backends.usable(inductor, backends.CompileOptions("reduce-overhead", device=torch.device("cpu"))) == (
        True,
        "",
    )


@pytest.mark.parametrize("behaviour", ["error", "eager"])
def test_the_limit_of_graphs_is_never_silent(
    unet: Any, compiled: Any, engine: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any, behaviour: str
) -> None:
    monkeypatch.setattr(engine("techniques.compile.backends.dynamo"), "GRAPHS_PER_KIND_STATIC", 1)
    config = compiled.CompileConfig(scope="blocks", dynamic="false", on_failure=behaviour)
    model = compiled.attach_compile(unet.model, config)
    if behaviour == "error":  # in the first image already, where three kinds stand at two sizes
        with pytest.raises(engine("techniques.compile.run").CompileError, match=r"limit of graphs.*dynamic to auto"):
            unet.sample(model, steps=1, size=SIZE)
    else:
        assert relative(unet.sample(model, steps=1, size=(24, 24)), unet.sample(steps=1, size=(24, 24))) < 1e-5
        assert "went on uncompiled" in caplog.text
    assert torch._dynamo.config.recompile_limit == 8
    assert not torch._dynamo.config.fail_on_recompile_limit_hit


@pytest.mark.full
def test_values_that_change_each_step_are_no_guards(unet: Any, slim: Any, compiled: Any, graphs: Any) -> None:
    """A counter of another node in the options would compile anew at each call in core's whole-model compile."""

    def counting(executor: Any, x: Any, timesteps: Any, context: Any, y: Any, control: Any, options: dict, **kw: Any):
        options["count"] = options.get("count", 0) + 1 + int(timesteps[0])
        return executor(x, timesteps, context, y, control, options, **kw)

    for unet_of, scope, expected in ((unet, "blocks", FIRST), (slim, "model", 1)):
        model = compiled.attach_compile(unet_of.model, compiled.CompileConfig(scope=scope))
        model.add_wrapper_with_key("diffusion_model", "test", counting)
        unet_of.sample(model, steps=6, size=SIZE)
        assert graphs() == expected, scope


@pytest.mark.full
def test_split_conds_and_patches_of_blocks(unet: Any, compiled: Any, graphs: Any) -> None:
    model = compiled.attach_compile(unet.model, compiled.CompileConfig(scope="blocks"))
    model.set_model_attn2_patch(lambda q, k, v, extra: (q, k * 0.5, v))
    model.set_model_input_block_patch(lambda h, extra: h * 1.01)
    plain = unet.model.clone()
    plain.set_model_attn2_patch(lambda q, k, v, extra: (q, k * 0.5, v))
    plain.set_model_input_block_patch(lambda h, extra: h * 1.01)
    eager = unet.sample(plain, steps=2, size=SIZE)
    assert relative(unet.sample(model, steps=2, size=SIZE), eager) < 1e-5
    assert not torch.equal(eager, unet.sample(steps=2, size=SIZE))
    with unet.split():
        assert relative(unet.sample(model, steps=2, size=SIZE), eager) < 1e-5
    assert 0 < graphs() <= 2 * KINDS + 4


def test_a_replaced_attention_stays_and_other_blocks_are_compiled(unet: Any, compiled: Any, graphs: Any) -> None:
    def replace(model: Any) -> Any:
        clone = model.clone()
        clone.set_model_attn1_replace(lambda q, k, v, extra: v * 0.5, "middle", 0)
        return clone

    eager = unet.sample(replace(unet.model), steps=2, size=SIZE)
    model = replace(compiled.attach_compile(unet.model, compiled.CompileConfig(scope="blocks")))
    assert relative(unet.sample(model, steps=2, size=SIZE), eager) < 1e-5
    assert graphs() >= KINDS - 1


@pytest.mark.parametrize("node_first", [True, pytest.param(False, marks=pytest.mark.full)])
@pytest.mark.parametrize("technique", ["deepcache", "dynamic_cfg", "attention", "precision"])
def test_with_each_technique_in_either_order(
    slim: Any, compiled: Any, engine: Any, technique: str, node_first: bool
) -> None:
    def attach(model: Any) -> Any:
        if technique == "deepcache":
            deepcache = engine("techniques.deepcache.attach")
            return deepcache.attach_deepcache(model, deepcache.DeepCacheConfig(interval=2))
        if technique == "dynamic_cfg":
            dynamic_cfg = engine("techniques.guidance.dynamic_cfg")
            return dynamic_cfg.attach_dynamic_cfg(model, dynamic_cfg.DynamicCFGConfig(stop_at=0.5))
        if technique == "attention":
            attention = engine("techniques.attention.attach")
            return attention.attach_attention(model, attention.AttentionConfig("sdpa_math"))
        precision = engine("techniques.precision.attach")
        return precision.attach_precision(model, precision.PrecisionConfig(memory_format="channels_last"))

    config = compiled.CompileConfig(scope="blocks")
    eager = slim.sample(attach(slim.model), steps=4, size=SIZE)
    if node_first:
        model = attach(compiled.attach_compile(slim.model, config))
    else:
        model = compiled.attach_compile(attach(slim.model), config)
    assert relative(slim.sample(model, steps=4, size=SIZE), eager) < 1e-4
    assert relative(slim.sample(attach(slim.model), steps=4, size=SIZE), eager) == 0
    assert relative(slim.sample(model, steps=4, size=SIZE), eager) < 1e-4


@pytest.mark.full
def test_attention_with_compile_needs_no_graph_a_run(slim: Any, compiled: Any, engine: Any, graphs: Any) -> None:
    attention = engine("techniques.attention.attach")
    for scope, backends in (("blocks", ("auto", "sdpa", "split")), ("model", ("sdpa",))):
        for backend in backends:
            model = attention.attach_attention(slim.model, attention.AttentionConfig(backend))
            model = compiled.attach_compile(model, compiled.CompileConfig(scope=scope))
            slim.sample(model, steps=2, size=SIZE)
            graphs()
            slim.sample(model, steps=3, size=SIZE)
            assert graphs() == 0, (scope, backend)
    model = attention.attach_attention(slim.model, attention.AttentionConfig("split"))
    model = compiled.attach_compile(model, compiled.CompileConfig(scope="model"))
    with pytest.raises(engine("common.errors").SpeedLabError, match=r"Attention Backend's split.*scope to blocks"):
        slim.sample(model, steps=1, size=SIZE)


def test_deepcache_on_a_whole_graph_is_refused_by_both_names(unet: Any, compiled: Any, engine: Any) -> None:
    deepcache = engine("techniques.deepcache.attach")
    model = compiled.attach_compile(unet.model, compiled.CompileConfig(scope="model"))
    model = deepcache.attach_deepcache(model, deepcache.DeepCacheConfig(interval=2))
    with pytest.raises(engine("common.errors").UnavailableError, match=r"DeepCache and Compile Model.*scope blocks"):
        unet.sample(model, steps=2, size=SIZE)


def test_cores_compile_beside_ours_is_refused(unet: Any, compiled: Any, engine: Any) -> None:
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = compiled.attach_compile(unet.model, compiled.CompileConfig(scope="blocks"))
    set_torch_compile_wrapper(model=model, backend="eager")
    with pytest.raises(engine("common.errors").UnavailableError, match=r"TorchCompileModel"):
        unet.sample(model, steps=1, size=SIZE)


@pytest.mark.full
def test_controlnet_residuals_reach_compiled_blocks(unet: Any, compiled: Any) -> None:
    """`get_control` gives residuals that a forward pops."""
    import comfy.controlnet

    class Control(comfy.controlnet.ControlBase):
        def get_control(self, x: Any, t: Any, cond: Any, batched: int, options: dict) -> dict:
            generator = torch.Generator().manual_seed(1)
            middle = 0.5 * torch.randn(x.shape[0], 64, x.shape[2] // 8, x.shape[3] // 8, generator=generator)
            return {"input": [], "middle": [middle], "output": []}

        def get_models(self) -> list:
            return []

        def copy(self) -> Any:
            return self

    positive = [[unet.cond(1)[0][0], {**unet.cond(1)[0][1], "control": Control(), "control_apply_to_uncond": True}]]
    plain = unet.sample(steps=2, size=SIZE)
    eager = unet.sample(steps=2, size=SIZE, positive=positive)
    assert not torch.equal(plain, eager)
    for scope in ("blocks", "model"):
        model = compiled.attach_compile(unet.model, compiled.CompileConfig(scope=scope))
        assert relative(unet.sample(model, steps=2, size=SIZE, positive=positive), eager) < 1e-5, scope


def test_a_cancel_while_compiling_stops_and_leaves_nothing(
    unet: Any, compiled: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as mm

    def cancelling(_options: Any, graph: Any, _inputs: Any) -> Any:
        mm.interrupt_current_processing()
        return graph.forward

    monkeypatch.setattr(engine("techniques.compile.backends.inductor"), "_compile_graph", cancelling)
    model = compiled.attach_compile(unet.model, compiled.CompileConfig(scope="blocks"))
    count = engine("techniques.compile.backends.dynamo").COUNT
    before = count.graphs
    with pytest.raises(mm.InterruptProcessingException):
        unet.sample(model, steps=2, size=SIZE)
    assert count.graphs == before + 1
    assert not any({"forward", "_forward"} & vars(m).keys() for m in unet.unet.modules())
    assert "speedlab.compile" not in str(model.model_options.get("transformer_options", {}).keys())


@pytest.mark.parametrize("behaviour", ["error", "eager"])
def test_a_failure_names_backend_part_cause_and_remedy(
    unet: Any, compiled: Any, engine: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any, behaviour: str
) -> None:
    def failing(_options: Any, _graph: Any, _inputs: Any) -> Any:
        raise RuntimeError("the compiler fell over\nand more lines")

    monkeypatch.setattr(engine("techniques.compile.backends.inductor"), "_compile_graph", failing)
    model = compiled.attach_compile(unet.model, compiled.CompileConfig(scope="blocks", on_failure=behaviour))
    if behaviour == "error":
        with pytest.raises(engine("common.errors").SpeedLabError) as raised:
            unet.sample(model, steps=1, size=SIZE)
        text = str(raised.value)
        for words in ("inductor", "ResBlock input_blocks.1.0", "the compiler fell over", "another backend", "eager"):
            assert words in text
        assert "more lines" not in text
    else:
        assert torch.equal(unet.sample(model, steps=2, size=SIZE), unet.sample(steps=2, size=SIZE))
        assert caplog.text.count("went on uncompiled") == 1


def test_on_a_cpu_residual_blocks_stay_as_they_are_unless_asked_for(
    unet: Any, compiled: Any, graphs: Any, caplog: Any
) -> None:
    caplog.set_level(logging.INFO)
    model = compiled.attach_compile(unet.model, compiled.CompileConfig())
    assert relative(unet.sample(model, steps=2, size=SIZE), unet.sample(steps=2, size=SIZE)) < 1e-5
    assert graphs() == TRANSFORMERS
    assert caplog.text.count("residual blocks run uncompiled") == 1
    model = compiled.attach_compile(unet.model, compiled.CompileConfig(scope="blocks"))
    unet.sample(model, steps=2, size=SIZE)
    assert graphs() == FIRST - TRANSFORMERS
    assert caplog.text.count("residual blocks run uncompiled") == 1


def test_all_blocks_are_worth_it_with_frozen_weights_and_on_a_card(engine: Any, compiled: Any) -> None:
    parts, options = engine("techniques.compile.graphs"), engine("techniques.compile.backends").CompileOptions
    cpu, card = torch.device("cpu"), torch.device("cuda")
    assert parts.blocks_that_gain(options(device=cpu, freeze=True)) == parts.BLOCKS
    assert parts.blocks_that_gain(options(device=card)) == parts.BLOCKS
    assert parts.ResBlock not in parts.blocks_that_gain(options(device=cpu))


def test_sdxl_blocks(compiled: Any, comfy: Any) -> None:
    unet = tiny_unet.build("sdxl")
    model = compiled.attach_compile(unet.model, compiled.CompileConfig(scope="blocks"))
    assert relative(unet.sample(model, steps=2, size=SIZE), unet.sample(steps=2, size=SIZE)) < 1e-5


def test_settings_that_make_no_sense_are_refused(unet: Any, compiled: Any, engine: Any) -> None:
    unavailable = engine("common.errors").UnavailableError
    with pytest.raises(ValueError, match="backend is 'fast'"):
        compiled.CompileConfig(backend="fast")
    with pytest.raises(unavailable, match="no mode max-autotune"):
        compiled.attach_compile(unet.model, compiled.CompileConfig("jit_trace", mode="max-autotune"))
    with pytest.raises(unavailable, match="as a whole"):
        compiled.attach_compile(unet.model, compiled.CompileConfig("jit_trace", scope="blocks"))
    with pytest.raises(unavailable, match="CUDA graphs need an NVIDIA GPU"):
        compiled.attach_compile(unet.model, compiled.CompileConfig("cudagraphs"))


@pytest.mark.full
def test_frozen_code_of_other_weights_is_let_go(slim: Any, compiled: Any, engine: Any) -> None:
    """Each holds its weights once more, and a function has room for sixteen."""
    functions = engine("techniques.compile.backends.dynamo")._functions
    config = compiled.CompileConfig(freeze_weights=True)
    counts, held = set(), []
    for number in range(1, 5):
        model = compiled.attach_compile(lora(slim.model, 0.05 * number), config)
        slim.sample(model, steps=1, size=(8, 8))
        counts.add(len(functions))
        held.append(weakref.ref(slim.unet.input_blocks[3][1].transformer_blocks[0].attn1.to_q.weight))
    assert len(counts) == 1
    del model
    slim.sample(steps=1, size=(8, 8))
    gc.collect()
    assert [ref() for ref in held[:-1]] == [None] * 3


def test_frozen_weights_and_hooks_that_change_them_are_refused(unet: Any, compiled: Any, engine: Any) -> None:
    import comfy.hooks

    hook = comfy.hooks.create_hook_lora(lora={}, strength_model=1.0, strength_clip=0.0)
    model = compiled.attach_compile(unet.model, compiled.CompileConfig(freeze_weights=True))
    name = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    weight = unet.model.model.state_dict()[name]
    model.add_hook_patches(hook.hooks[0], {name: ("diff", (torch.ones_like(weight),))}, 1.0)
    with pytest.raises(
        engine("common.errors").SpeedLabError, match=r"freeze_weights cannot follow hooks.*freeze_weights off"
    ):
        unet.sample(model, steps=1, size=(8, 8))


@pytest.mark.full
def test_fewer_graphs_than_cores_compile_over_a_tour(
    slim: Any, compiled: Any, graphs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRAs added, changed, switched and removed, and other sizes: what comes after the first image."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel
    from torch._dynamo.utils import counters
    from torch._inductor import compile_fx

    monkeypatch.setattr(compile_fx, "compile_fx", lambda graph, _inputs, **_settings: graph.forward)

    def added(make: Any) -> int:
        torch._dynamo.reset()
        counters.clear()
        first = 0
        for strength, part, size in (
            (0.0, "", (16, 16)), (0.5, "attn", (16, 16)), (1.0, "attn", (16, 24)), (1.0, "in_layers", (16, 16)),
            (1.0, "ff", (24, 24)), (0.0, "", (16, 16)), (0.5, "attn", (16, 16)),
        ):  # fmt: skip
            model = lora(slim.model, strength, part) if strength else slim.model.clone()
            slim.sample(make(model), steps=1, size=size)
            first = first or counters["stats"]["unique_graphs"]
        return int(counters["stats"]["unique_graphs"]) - first

    core = added(lambda model: TorchCompileModel.execute(model, "inductor").args[0])
    for scope in ("auto", "model"):
        ours = added(lambda model, scope=scope: compiled.attach_compile(model, compiled.CompileConfig(scope=scope)))
        assert ours < core
