"""Every pair of techniques, in both orders: it equals a plain reference, or it is refused by a message naming both.

A technique has a `node`, as a user puts it on a model, and an `oracle`: the same image made another way. Attention,
Precision and compiling change no image, so theirs is the bare model; what a test sees of them is what they do.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from .deepcache_oracle import PlainCache, with_oracle, with_plain_cache
from .forecast_oracle import Plain, published_plan, with_forecasts
from .tiny_unet import TinyUNet, build, fill, relative

Patch = Callable[[Any], Any]
# Forecast leaves out nothing of fewer steps.
STEPS, STOP_AT = 10, 0.5
# What caching may add to the latent, wide enough that a random UNet has cached steps.
ADAPTIVE = 0.3
# One row alone, another kernel or another layout against the same row: rounding, carried through ten steps.
SAME = 3e-5
DIFFERENT = 1e-4
REFUSED = {
    frozenset({"Dynamic CFG", "EasyCache"}),
    frozenset({"Forecast", "DeepCache"}),
    frozenset({"Forecast", "EasyCache"}),
}
OURS = ("DeepCache", "Dynamic CFG", "Forecast", "Attention", "Precision")
CORE = ("LoRA", "ControlNet", "FreeU", "TorchCompileModel", "EasyCache", "PerturbedAttention")
ALL = (*OURS, *CORE)


@dataclass(frozen=True)
class Technique:
    """`changes`: whether the image is another one with it. `watch` yields a check that it was at work."""

    node: Patch
    oracle: Patch
    changes: bool = True
    conds: Callable[[list], list] = lambda cond: cond
    watch: Callable[[], Any] = nullcontext


LAYOUT = "slim"


@pytest.fixture(scope="module")
def tiny(comfy: ModuleType) -> TinyUNet:
    return build(LAYOUT)


def _same(model: Any) -> Any:
    return model


def _core_module(name: str) -> ModuleType:
    """Loaded as ComfyUI's `load_custom_node` does, under its path without .py: patches carry that as their module."""
    spec = importlib.util.find_spec(f"comfy_extras.{name}")
    assert spec is not None and spec.origin is not None
    where = str(Path(spec.origin).with_suffix(""))
    if where not in sys.modules:
        found = importlib.util.spec_from_file_location(where, spec.origin)
        assert found is not None and found.loader is not None
        sys.modules[where] = importlib.util.module_from_spec(found)
        found.loader.exec_module(sys.modules[where])
    return sys.modules[where]


def _core_node(module: str, name: str, *values: Any) -> Patch:
    def patch(model: Any) -> Any:
        node = getattr(_core_module(module), name)
        if hasattr(node, "execute"):
            made = node.execute(model, *values)
            return getattr(made, "args", made)[0]
        return getattr(node(), node.FUNCTION)(model, *values)[0]

    return patch


def _lora_state(tiny: TinyUNet) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    state = {}
    for name, weight in tiny.unet.state_dict().items():
        if name.endswith(("attn1.to_q.weight", "attn2.to_v.weight", "out_layers.3.weight")):
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            state[f"{key}.lora_up.weight"] = 0.3 * torch.randn(weight.shape[0], 2, generator=generator)
            size = weight[0].numel()
            state[f"{key}.lora_down.weight"] = size**-0.5 * torch.randn(2, size, generator=generator)
    return state


def _with_lora(tiny: TinyUNet) -> Patch:
    import comfy.sd

    return lambda model: comfy.sd.load_lora_for_models(model, None, _lora_state(tiny), 1.0, 0.0)[0]


def _merged(tiny: TinyUNet) -> Patch:
    """The LoRA multiplied into the weights of a model of its own."""
    merged = build(LAYOUT)
    state = _lora_state(tiny)
    for name, weight in merged.unet.named_parameters():
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if f"{key}.lora_up.weight" in state:
            delta = state[f"{key}.lora_up.weight"] @ state[f"{key}.lora_down.weight"]
            weight.data.add_(delta.reshape(weight.shape))

    def patch(model: Any) -> Any:
        clone = merged.model.clone()
        clone.model_options = model.clone().model_options
        clone.wrappers, clone.attachments = model.clone().wrappers, dict(model.attachments)
        return clone

    return patch


def _control(tiny: TinyUNet, window: tuple[float, float] = (0.0, 1.0)) -> Callable[[list], list]:
    import comfy.cldm.cldm
    import comfy.controlnet

    config = dict(tiny.model.model.model_config.unet_config)
    config.pop("out_channels")
    lists = {key: list(value) if isinstance(value, list) else value for key, value in config.items()}
    network = comfy.cldm.cldm.ControlNet(**{**lists, "hint_channels": 3, "device": torch.device("cpu")})
    fill(network, 5)
    net = comfy.controlnet.ControlNet(network.eval(), load_device=torch.device("cpu"))
    hint = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(2))

    def controlled(cond: list) -> list:
        applied = net.copy().set_cond_hint(hint, 0.6, window)
        return [[tensor, {**extra, "control": applied, "control_apply_to_uncond": True}] for tensor, extra in cond]

    return controlled


def _compiled(model: Any) -> Any:
    """Core's TorchCompileModel, traced by the real compiler front end and run without generated code, for speed."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    clone = model.clone()
    set_torch_compile_wrapper(clone, backend="eager")
    return clone


@contextmanager
def _counting_graphs() -> Iterator[Callable[[], bool]]:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    try:
        yield lambda: counters["stats"]["unique_graphs"] > 0
    finally:
        torch._dynamo.reset()


def _cond_only_later(model: Any) -> Any:
    """Uncond is evaluated at every step and not used from STOP_AT on."""

    def post_cfg(args: dict) -> torch.Tensor:
        sigmas = args["model_options"]["transformer_options"]["sample_sigmas"][:-1]
        step = int((sigmas >= args["sigma"][0] * (1 - 1e-5)).sum()) - 1
        if step < STOP_AT * STEPS:
            return args["denoised"]
        # What later post-CFG functions add (perturbed attention) comes on top; they are given this result.
        return args["cond_denoised"]

    clone = model.clone()
    functions = clone.model_options.get("sampler_post_cfg_function", [])
    clone.model_options = {
        **clone.model_options,
        "sampler_post_cfg_function": [post_cfg, *functions],
        "disable_cfg1_optimization": True,
    }
    return clone


@pytest.fixture(scope="module")
def techniques(tiny: TinyUNet, pack: ModuleType) -> dict[str, Technique]:
    def engine(name: str) -> ModuleType:
        return importlib.import_module(f"speedlab.techniques.{name}")

    deepcache, dynamic_cfg = engine("deepcache.attach"), engine("guidance.dynamic_cfg")
    forecast = engine("forecast.attach")
    attention, precision = engine("attention.attach"), engine("precision.attach")
    backends = engine("attention.backends").BACKENDS
    both = precision.PrecisionConfig(memory_format="channels_last", linear="onednn")

    @contextmanager
    def split_at_work() -> Iterator[Callable[[], bool]]:
        calls: list[int] = []
        real = backends["split"]
        object.__setattr__(real, "run", _counted(real.run, calls))
        try:
            yield lambda: bool(calls)
        finally:
            object.__setattr__(real, "run", real.run.inner)

    @contextmanager
    def channels_last_at_work() -> Iterator[Callable[[], bool]]:
        # Written to and not read: a compiled model would be compiled again for each entry of a list that grows.
        layouts = {True: False, False: False}
        conv = tiny.unet.out[2]

        def note(module: Any, inputs: tuple) -> None:
            layouts[inputs[0].is_contiguous(memory_format=torch.channels_last)] = True

        handle = conv.register_forward_pre_hook(note)
        try:
            yield lambda: layouts[True] and not layouts[False]
        finally:
            handle.remove()

    return {
        "DeepCache": Technique(
            lambda model: deepcache.attach_deepcache(model, deepcache.DeepCacheConfig(interval=3, branch=1)),
            lambda model: with_oracle(tiny, model, interval=3, branch=1),
        ),
        "Dynamic CFG": Technique(
            lambda model: dynamic_cfg.attach_dynamic_cfg(model, dynamic_cfg.DynamicCFGConfig(stop_at=STOP_AT)),
            _cond_only_later,
        ),
        "Forecast": Technique(
            lambda model: forecast.attach_forecast(model, forecast.ForecastConfig("fixed")),
            lambda model: with_forecasts(model, Plain(published_plan(STEPS))),
        ),
        "Attention": Technique(
            lambda model: attention.attach_attention(model, attention.AttentionConfig("split")),
            _same, changes=False, watch=split_at_work,
        ),
        "Precision": Technique(
            lambda model: precision.attach_precision(model, both),
            _same, changes=False, watch=channels_last_at_work,
        ),
        "LoRA": Technique(_with_lora(tiny), _merged(tiny)),
        "ControlNet": Technique(_same, _same, conds=_control(tiny)),
        "FreeU": Technique(*[_core_node("nodes_freelunch", "FreeU", 1.3, 1.4, 0.9, 0.2)] * 2),
        "TorchCompileModel": Technique(_compiled, _same, changes=False, watch=_counting_graphs),
        "EasyCache": Technique(*[_core_node("nodes_easycache", "EasyCacheNode", 1.0, 0.1, 0.95, False)] * 2),
        "PerturbedAttention": Technique(*[_core_node("nodes_pag", "PerturbedAttentionGuidance", 3.0)] * 2),
    }  # fmt: skip


def _counted(function: Callable[..., Any], calls: list[int]) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return function(*args, **kwargs)

    counted.inner = function  # type: ignore[attr-defined]
    return counted


def _sample(tiny: TinyUNet, model: Any, *used: Technique) -> torch.Tensor:
    positive = tiny.cond(1)
    for technique in used:
        positive = technique.conds(positive)
    # Self-attention needs more than one pixel in the middle block to choose from.
    return tiny.sample(model, steps=STEPS, size=(16, 16), positive=positive)


@dataclass(frozen=True)
class Known:
    """Images that several tests compare with, each made once."""

    tiny: TinyUNet
    techniques: dict[str, Technique]
    made: dict[tuple[str, ...], torch.Tensor] = field(default_factory=dict)

    def reference(self, *names: str) -> torch.Tensor:
        """Two techniques by their oracles. Those that patch weights go first, as a checkpoint would bring them."""
        ordered = tuple(sorted(names, key=lambda name: (name != "LoRA", ALL.index(name))))
        if ordered not in self.made:
            first, second = (self.techniques[name] for name in ordered)
            self.made[ordered] = _sample(self.tiny, second.oracle(first.oracle(self.tiny.model)), first, second)
        return self.made[ordered]

    def alone(self, name: str) -> torch.Tensor:
        """One technique by its node. What changes no image gives stock's, so that is made with no node."""
        technique = self.techniques[name]
        key = (name,) if technique.changes else ()
        if key not in self.made:
            self.made[key] = _sample(self.tiny, (technique.node if key else _same)(self.tiny.model), technique)
        return self.made[key]


@pytest.fixture(scope="module")
def known(tiny: TinyUNet, techniques: dict[str, Technique]) -> Known:
    return Known(tiny, techniques)


# Here alone a compiled model has ComfyUI's attention for CPUs, at each of which dynamo begins a new graph.
_BROKEN = ("TorchCompileModel", "LoRA")


def _base(tiny: TinyUNet, *names: str) -> Any:
    """The model that a stack of techniques is put on."""
    whole = "TorchCompileModel" in names and "Attention" not in names and names != _BROKEN
    return _sdpa(tiny.model) if whole else tiny.model


def _tier(pair: tuple[str, str]) -> Any:
    """Every day each pair in one of its orders, and one with a compiler, which takes long; with `--all` the others."""
    first, second = map(ALL.index, pair)
    daily = (first < second) == ((first + second) % 2 == 0)
    if "TorchCompileModel" in pair:
        daily = pair == ("TorchCompileModel", "FreeU")
    return pytest.param(*pair, marks=() if daily else pytest.mark.full)


def _each(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.full if name == "TorchCompileModel" else ()) for name in names]


@pytest.mark.parametrize(("first", "second"), map(_tier, itertools.permutations(ALL, 2)))
def test_pair(tiny: TinyUNet, techniques: dict[str, Technique], known: Known, first: str, second: str) -> None:
    a, b = techniques[first], techniques[second]
    model = b.node(a.node(_base(tiny, first, second)))
    if frozenset({first, second}) in REFUSED:
        with pytest.raises(Exception, match=rf"(?s){first}.*{second}|{second}.*{first}"):
            _sample(tiny, model, a, b)
        return
    with a.watch() as a_works, b.watch() as b_works:
        picture = _sample(tiny, model, a, b)
        assert a_works is None or a_works(), f"{first} did nothing"
        assert b_works is None or b_works(), f"{second} did nothing"
    assert relative(picture, known.reference(first, second)) < SAME
    for one, other in ((a, second), (b, first)):
        if one.changes:
            assert relative(picture, known.alone(other)) > DIFFERENT, "one does nothing"


@pytest.mark.parametrize("order", ["first", pytest.param("last", marks=pytest.mark.full)])
@pytest.mark.parametrize("other", _each(ALL[1:]))
def test_adaptive_deepcache(
    tiny: TinyUNet, techniques: dict[str, Technique], pack: ModuleType, other: str, order: str
) -> None:
    """With a line through features, and steps that are chosen by what caching missed."""
    deepcache = importlib.import_module("speedlab.techniques.deepcache.attach")
    config = deepcache.DeepCacheConfig(
        interval=3, branch=1, schedule="adaptive", features="extrapolate", tolerance=ADAPTIVE
    )
    technique, stack = techniques[other], [lambda model: deepcache.attach_deepcache(model, config)]
    model = _base(tiny, other)
    for node in [*stack, technique.node] if order == "first" else [technique.node, *stack]:
        model = node(model)
    if other in ("Forecast", "EasyCache"):
        with pytest.raises(Exception, match=rf"(?s)DeepCache.*{other}|{other}.*DeepCache"):
            _sample(tiny, model, technique)
        return
    with technique.watch() as works:
        picture = _sample(tiny, model, technique)
        assert works is None or works(), f"{other} did nothing"
    plain = PlainCache(tiny, tolerance=ADAPTIVE, by_line=True)
    if other == "Dynamic CFG":
        plain.alone_from = STOP_AT * STEPS
    reference = _sample(tiny, with_plain_cache(technique.oracle(tiny.model), plain), technique)
    assert 0 < len(plain.cached) < STEPS - 2
    assert relative(picture, reference) < SAME


@pytest.mark.parametrize("order", ["first", pytest.param("last", marks=pytest.mark.full)])
@pytest.mark.parametrize("other", _each(name for name in ALL if name not in ("Precision", "EasyCache")))
def test_convolutions_as_products(
    tiny: TinyUNet, techniques: dict[str, Technique], known: Known, pack: ModuleType, monkeypatch: pytest.MonkeyPatch,
    other: str, order: str,
) -> None:  # fmt: skip
    """As on a CPU in the inner levels of large models, where Precision is asked for them, with everything else."""
    names = ("cpu.conv_as_matmul", "precision.attach")
    conv, precision = (importlib.import_module(f"speedlab.techniques.{name}") for name in names)
    monkeypatch.setattr(conv, "_FEWEST_WEIGHTS", 1)
    monkeypatch.setattr(conv, "most_pixels_here", lambda: 1 << 30)
    technique, calls = techniques[other], []
    real = conv.convolve
    monkeypatch.setattr(conv, "convolve", lambda *args: calls.append(1) or real(*args))
    config = precision.PrecisionConfig(convolution="matmul", linear="onednn")
    stack = [lambda model: precision.attach_precision(model, config), technique.node]
    model = _base(tiny, other)
    for node in stack if order == "first" else reversed(stack):
        model = node(model)
    picture = _sample(tiny, model, technique, techniques["Precision"])
    # Of a compiled model Precision still reaches what the compiler leaves out.
    assert calls or other == "TorchCompileModel"
    assert relative(picture, known.reference(other, "Precision")) < SAME


@pytest.mark.full
@pytest.mark.parametrize("order", ["compiled last", "compiled first"])
def test_graphs_of_a_compiled_model(tiny: TinyUNet, techniques: dict[str, Technique], order: str) -> None:
    """A whole-model graph for full steps and one for cached steps; Dynamic CFG adds one of each with half the rows."""
    from torch._dynamo.utils import counters

    stack = [techniques[name].node for name in ("DeepCache", "Dynamic CFG")]

    def graphs(patches: list[Patch]) -> int:
        model = _sdpa(tiny.model)
        for patch in [*patches, _compiled] if order == "compiled last" else [_compiled, *patches]:
            model = patch(model)
        with _counting_graphs():
            for _ in range(2):  # a second run needs none anew
                tiny.sample(model, steps=STEPS, size=(16, 16))
            assert not counters["graph_break"]
            return int(counters["stats"]["unique_graphs"])

    assert [graphs(stack[:1]), graphs(stack[1:]), graphs(stack)] == [2, 2, 4]
    assert graphs([techniques["Forecast"].node]) == graphs([]) == 1


def _sdpa(model: Any) -> Any:
    """ComfyUI's default attention on a CPU breaks graphs by itself."""
    from comfy.ldm.modules.attention import attention_pytorch

    def override(function: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("transformer_options", None)
        return attention_pytorch(*args, **kwargs)

    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    return clone


@pytest.mark.full
def test_with_the_node_itself(tiny: TinyUNet, techniques: dict[str, Technique]) -> None:
    """TorchCompileModel as a user has it: generated code."""
    deepcache = techniques["DeepCache"].node
    plain = tiny.sample(deepcache(tiny.model), steps=4, size=(16, 16))
    model = _core_node("nodes_torch_compile", "TorchCompileModel", "inductor")(deepcache(_sdpa(tiny.model)))
    with _counting_graphs():
        assert relative(tiny.sample(model, steps=4, size=(16, 16)), plain) < SAME


def test_the_matrix_in_the_documents() -> None:
    """It says of each pair what the tests show."""
    page = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
    lines = [line.strip("|").split("|") for line in page.read_text(encoding="utf-8").splitlines()]
    table = [[cell.strip() for cell in line] for line in lines if len(line) == len(ALL)]
    (header, *rows) = [row for row in table if set(row[1]) - {"-"} or row[0] in ALL]
    said = {
        frozenset({row[0], header[column]}): cell for row in rows for column, cell in enumerate(row) if column and cell
    }
    shown = {frozenset(pair): "✓" for pair in itertools.combinations(ALL, 2)}
    assert said == shown | dict.fromkeys(REFUSED, "refused")
