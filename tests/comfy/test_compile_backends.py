"""The other backends of Compile Model: what runs on a CPU runs here, against eager; all say what they lack."""

from __future__ import annotations

import copy
import gc
import importlib.util
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from . import tiny_unet
from .tiny_unet import relative

SIZE = (16, 16)
ON_CPU = ("jit_trace", "onnxruntime", "openvino")


@pytest.fixture(scope="module")
def unet(comfy: Any) -> Any:
    with torch.inference_mode():
        return tiny_unet.build("slim")


@pytest.fixture(scope="module")
def compiled(engine: Any) -> Any:
    return engine("techniques.compile.attach")


def lora(model: Any, strength: float) -> Any:
    clone = model.clone()
    weights = {k: v for k, v in model.model.state_dict().items() if "attn" in k and v.ndim > 1}
    generator = torch.Generator().manual_seed(3)
    patches = {k: ("diff", (0.05 * torch.randn(v.shape, generator=generator),)) for k, v in weights.items()}
    clone.add_patches(patches, strength)
    return clone


@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.full if name == "onnxruntime" else ()) for name in ON_CPU]
)
def test_equals_eager_at_any_size_and_under_a_lora(unet: Any, compiled: Any, backend: str) -> None:
    model = compiled.attach_compile(unet.model, compiled.CompileConfig(backend))
    for settings in ({"size": SIZE}, {"size": (24, 16)}, {"size": SIZE, "cfg": 1.0}, {"size": SIZE, "batch": 2}):
        eager = unet.sample(steps=2, **settings)
        assert relative(unet.sample(model, steps=2, **settings), eager) < 1e-4
    assert not any({"forward", "_forward"} & vars(part).keys() for part in unet.unet.modules())
    with_lora = lora(unet.model, 1.0)
    eager = unet.sample(with_lora, steps=2, size=SIZE)
    assert not torch.equal(eager, unet.sample(steps=2, size=SIZE))
    patched = compiled.attach_compile(with_lora, compiled.CompileConfig(backend))
    assert relative(unet.sample(patched, steps=2, size=SIZE), eager) < 1e-4
    assert relative(unet.sample(model, steps=2, size=SIZE), unet.sample(steps=2, size=SIZE)) < 1e-4


@pytest.mark.parametrize("backend", ON_CPU)
def test_patches_are_refused_by_name(unet: Any, compiled: Any, engine: Any, backend: str, caplog: Any) -> None:
    def halve(q: Any, k: Any, v: Any, extra: dict) -> Any:
        return q, k * 0.5, v

    model = compiled.attach_compile(unet.model, compiled.CompileConfig(backend))
    model.set_model_attn2_patch(halve)
    with pytest.raises(engine("common.errors").SpeedLabError, match=rf"{backend}.*attn2_patch.*halve.*inductor"):
        unet.sample(model, steps=1, size=SIZE)
    model = compiled.attach_compile(unet.model, compiled.CompileConfig(backend, on_failure="eager"))
    model.set_model_attn2_patch(halve)
    plain = unet.model.clone()
    plain.set_model_attn2_patch(halve)
    assert torch.equal(unet.sample(model, steps=1, size=SIZE), unet.sample(plain, steps=1, size=SIZE))
    assert "went on uncompiled" in caplog.text


def test_jit_trace_keeps_the_chosen_attention(unet: Any, compiled: Any, engine: Any) -> None:
    attention = engine("techniques.attention.attach")
    model = attention.attach_attention(unet.model, attention.AttentionConfig("split"))
    eager = unet.sample(model, steps=2, size=SIZE)
    traced = compiled.attach_compile(model, compiled.CompileConfig("jit_trace"))
    assert relative(unet.sample(traced, steps=2, size=SIZE), eager) < 1e-5


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_another_attention_is_refused(unet: Any, compiled: Any, engine: Any, backend: str) -> None:
    attention = engine("techniques.attention.attach")
    model = attention.attach_attention(unet.model, attention.AttentionConfig("split"))
    with pytest.raises(engine("common.errors").SpeedLabError, match=r"brings its own attention.*Attention Backend"):
        unet.sample(compiled.attach_compile(model, compiled.CompileConfig(backend)), steps=1, size=SIZE)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_weights_in_fp8_are_refused(comfy: Any, compiled: Any, engine: Any, backend: str) -> None:
    unet = tiny_unet.build("level")
    weight = unet.unet.input_blocks[0][0].weight
    weight.data = weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(engine("common.errors").SpeedLabError, match=rf"{backend} .*float8_e4m3fn.*fp32(?! or)"):
        unet.sample(compiled.attach_compile(unet.model, compiled.CompileConfig(backend)), steps=1, size=SIZE)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_autocast_is_refused_where_it_cannot_act(
    unet: Any, compiled: Any, engine: Any, node: Any, backend: str
) -> None:
    """Both orders; jit_trace records the casts."""
    precision = node("SpeedLabPrecision")
    cast = (*("keep",) * 5, "bf16", "keep")
    (model,) = precision.apply(unet.model, *cast)
    after = compiled.attach_compile(model, compiled.CompileConfig(backend))
    (before,) = precision.apply(compiled.attach_compile(unet.model, compiled.CompileConfig(backend)), *cast)
    for both in (after, before):
        with pytest.raises(engine("common.errors").SpeedLabError, match=rf"{backend}.*Precision's autocast.*inductor"):
            unet.sample(both, steps=1, size=SIZE)
    traced = compiled.attach_compile(model, compiled.CompileConfig("jit_trace"))
    plain = unet.sample(steps=2, size=SIZE)
    cast_error = relative(unet.sample(model, steps=2, size=SIZE), plain)
    assert 0.5 * cast_error < relative(unet.sample(traced, steps=2, size=SIZE), plain) < 2 * cast_error


@pytest.mark.parametrize("backend", ["openvino", pytest.param("onnxruntime", marks=pytest.mark.full)])
def test_graphs_are_found_again_and_made_anew_where_they_are_wrong(
    unet: Any, compiled: Any, engine: Any, base_dir: Path, backend: str, caplog: Any
) -> None:
    """By a process that has none yet."""
    caplog.set_level("INFO")
    folder = base_dir / "user" / "speedlab" / "compiled"

    def start(model: Any) -> torch.Tensor:
        caplog.clear()
        engine("techniques.compile.program")._programs.clear()
        config = compiled.CompileConfig(backend)
        return unet.sample(compiled.attach_compile(model, config), steps=1, size=SIZE)

    for old in folder.glob(f"{backend}-*/*"):
        old.unlink()
    wanted = start(unet.model)
    assert "in " in caplog.text and "kept on disk" not in caplog.text
    (kept,) = folder.glob(f"{backend}-*/*.graph")
    whole = kept.read_bytes()
    large = [(n, w.detach()) for n, w in unet.model.model.diffusion_model.named_parameters() if w.numel() > 512]
    assert large and not [n for n, w in large if w.std() > 0 and w.numpy().tobytes()[:256] in whole], "holds weights"
    assert torch.equal(start(unet.model), wanted)
    assert re.search(rf"{backend} compiled .* in [\d.]+ s, from the graph kept on disk", caplog.text)
    with_lora = lora(unet.model, 1.0)
    assert relative(start(with_lora), unet.sample(with_lora, steps=1, size=SIZE)) < 1e-4
    assert "kept on disk" in caplog.text, "a LoRA takes the same graph"
    kept.write_bytes(whole[: len(whole) // 2])
    assert torch.equal(start(unet.model), wanted)
    assert "is damaged" in caplog.text and "from the graph" not in caplog.text
    assert list(kept.parent.iterdir()) == [kept]


def test_only_the_very_file_that_was_kept_is_taken(engine: Any, tmp_path: Path, caplog: Any) -> None:
    """Not one that is cut off, overwritten or empty, nor a whole one of another network or of other versions."""
    kept, backends = engine("techniques.compile.backends.kept"), engine("techniques.compile.backends")
    options = backends.CompileOptions(example=(torch.ones(1, 3),), changing=((0,),), folder=tmp_path)
    made: list[bytes] = []

    def graph(target: torch.nn.Module, version: str = "1") -> tuple[bytes, bool]:
        def make() -> bytes:
            made.append(f"graph {len(made)}".encode())
            return made[-1]

        return tuple(kept.kept_or_made(target, options, {"compiler": version}, make))

    network, other = torch.nn.Linear(3, 3), torch.nn.Linear(3, 4)
    assert graph(network) == (b"graph 0", False) and graph(network) == (b"graph 0", True)
    torch.nn.init.zeros_(network.weight)
    assert graph(network) == (b"graph 0", True), "other weights take the same graph"
    (path,) = tmp_path.iterdir()
    assert graph(other) == (b"graph 1", False) and graph(network, "2") == (b"graph 2", False)
    whole = path.read_bytes()
    others = [one.read_bytes() for one in tmp_path.iterdir() if one != path]
    for damaged in (whole[: len(whole) // 2], bytes(len(whole)), b"", *others):
        path.write_bytes(damaged)
        caplog.clear()
        again = graph(network)
        assert again == (made[-1], False) and "is damaged" in caplog.text
        assert graph(network) == (made[-1], True)
    assert len(list(tmp_path.iterdir())) == 3, "nothing else is left"


@pytest.mark.full
def test_two_fixed_sizes_of_a_frozen_trace_are_both_kept(unet: Any, compiled: Any, caplog: Any) -> None:
    """With and without CFG in turn; with more than two in turn the record says what that costs."""
    caplog.set_level("INFO")
    model = compiled.attach_compile(unet.model, compiled.CompileConfig("jit_trace", freeze_weights=True))
    for cfg in (5.0, 1.0, 5.0, 1.0):
        unet.sample(model, steps=1, size=SIZE, cfg=cfg)
    assert caplog.text.count("this can take minutes") == 2 and "once more" not in caplog.text
    for size in ((8, 8), (8, 24), (24, 8), (8, 8)):
        unet.sample(model, steps=1, size=size)
    assert "once more" in caplog.text


def test_a_part_of_the_network_that_another_node_put_in_is_refused(unet: Any, compiled: Any, engine: Any) -> None:
    model = compiled.attach_compile(unet.model, compiled.CompileConfig("jit_trace"))
    model.add_object_patch("diffusion_model.middle_block", unet.unet.middle_block)
    with pytest.raises(engine("common.errors").SpeedLabError, match=r"jit_trace.*diffusion_model\.middle_block"):
        unet.sample(model, steps=1, size=SIZE)


@pytest.mark.parametrize("on_failure", ["error", "eager"])
def test_what_fails_while_it_runs_is_told_as_well(
    unet: Any, compiled: Any, engine: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any, on_failure: str
) -> None:
    def broken(*inputs: Any) -> Any:
        raise ValueError("no kernel for this size")

    engine("techniques.compile.program")._programs.clear()
    monkeypatch.setattr(engine("techniques.compile.backends.jit_trace"), "compile", lambda *a: broken)
    model = compiled.attach_compile(unet.model, compiled.CompileConfig("jit_trace", on_failure=on_failure))
    if on_failure == "error":
        with pytest.raises(engine("common.errors").SpeedLabError, match="jit_trace could not run UNetModel: no kernel"):
            unet.sample(model, steps=1, size=(16, 8))
        return
    assert torch.equal(unet.sample(model, steps=1, size=(16, 8)), unet.sample(steps=1, size=(16, 8)))
    monkeypatch.undo()
    again = compiled.attach_compile(unet.model, compiled.CompileConfig("jit_trace"))
    assert torch.isfinite(unet.sample(again, steps=1, size=(16, 8))).all(), "it is compiled anew"
    assert "could not run" in caplog.text and "went on uncompiled" in caplog.text


def test_a_cancel_that_a_library_wrapped_is_a_cancel(
    unet: Any, compiled: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO turns whatever its trace raises into an error of its own."""
    import comfy.model_management as mm

    def cancelled(*_: Any) -> Any:
        try:
            raise mm.InterruptProcessingException
        except BaseException as error:
            raise RuntimeError("Couldn't get TorchScript module by tracing.") from error

    monkeypatch.setattr(engine("techniques.compile.backends.jit_trace"), "compile", cancelled)
    engine("techniques.compile.program")._programs.clear()
    model = compiled.attach_compile(unet.model, compiled.CompileConfig("jit_trace", on_failure="eager"))
    with pytest.raises(mm.InterruptProcessingException):
        unet.sample(model, steps=1, size=(16, 8))


@pytest.mark.full
def test_frozen_traces_follow_a_lora(unet: Any, compiled: Any) -> None:
    config = compiled.CompileConfig("jit_trace", freeze_weights=True)
    for model in (unet.model, lora(unet.model, 1.0), unet.model):
        eager = unet.sample(model, steps=2, size=SIZE)
        assert relative(unet.sample(compiled.attach_compile(model, config), steps=2, size=SIZE), eager) < 1e-4


def test_sdxl_with_pooled_text(comfy: Any, compiled: Any) -> None:
    with torch.inference_mode():
        unet = tiny_unet.build("sdxl")
    model = compiled.attach_compile(unet.model, compiled.CompileConfig("jit_trace"))
    assert relative(unet.sample(model, steps=2, size=SIZE), unet.sample(steps=2, size=SIZE)) < 1e-4


@pytest.mark.parametrize(
    "backend, package",
    [
        ("onnxruntime", "onnxruntime"), ("openvino", "openvino"), ("onediff_nexfort", "onediff"),
        ("onediff_nexfort", "nexfort"), ("onediff_oneflow", "oneflow"), ("stable_fast", "sfast"),
        ("tensorrt", "torch_tensorrt"),
    ],
)  # fmt: skip
def test_a_missing_package_is_named(
    unet: Any, compiled: Any, engine: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any, backend: str, package: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    with pytest.raises(
        engine("common.errors").UnavailableError, match=rf"cannot use {backend}: .*not installed.*install"
    ):
        compiled.attach_compile(unet.model, compiled.CompileConfig(backend))
    model = compiled.attach_compile(unet.model, compiled.CompileConfig(backend, on_failure="eager"))
    assert torch.equal(unet.sample(model, steps=1, size=SIZE), unet.sample(steps=1, size=SIZE))
    assert "as on_failure asks" in caplog.text


def test_nexforts_modes_are_checked(engine: Any) -> None:
    onediff, nexfort = (
        engine("techniques.compile.backends.onediff"),
        engine("techniques.compile.backends.onediff_nexfort"),
    )
    for mode in engine("techniques.compile.backends").MODES:
        for device in ("cpu", "cuda"):
            assert "freezing" not in nexfort.nexfort_mode(mode, torch.device(device))
    with pytest.raises(ValueError, match="no mode 'faster'"):
        onediff.checked_mode("O2:faster")
    with pytest.raises(ValueError, match="later LoRA would have no effect"):
        onediff.checked_mode("max-optimize:freezing")


def test_each_torch_tensorrt_is_told_the_types_in_its_own_words(engine: Any) -> None:
    """torch-tensorrt does not run here; these are the parameters that its versions have."""

    def first(program: Any, *, enabled_precisions: Any = ()) -> None: ...
    def later(program: Any, *, enabled_precisions: Any = (), use_explicit_typing: bool = True) -> None: ...
    def newest(program: Any, **settings: Any) -> None: ...

    typing = engine("techniques.compile.backends.tensorrt")._typing
    assert typing(first, {torch.float16}) == {"enabled_precisions": {torch.float16, torch.float32}}
    assert typing(later, {torch.float16}) == {"use_explicit_typing": True}
    assert typing(newest, {torch.float16}) == {}


def test_a_backend_for_fixed_weights_refuses_a_lora(unet: Any, compiled: Any, engine: Any) -> None:
    """TensorRT does not run here; what it refuses is asked of the same code that a run asks."""
    program, run = engine("techniques.compile.program"), engine("techniques.compile.run")
    backend = engine("techniques.compile.backends.tensorrt")
    started = run.Run(backend, engine("techniques.compile.backends").CompileOptions(), falls_back=False)
    assert program._obstacle_of_model(started, unet.model) == ""
    with pytest.raises(run.CompileError, match=r"tensorrt.*takes no LoRA.*inductor"):
        program.ProgramEngine(started, lora(unet.model, 1.0))


@pytest.mark.parametrize("freeze", [False, True])
def test_a_trace_does_not_keep_the_network(unet: Any, engine: Any, freeze: bool) -> None:
    """ComfyUI lets go of models; what was compiled of them goes with them."""
    network = copy.deepcopy(unet.unet)
    example = (torch.randn(1, 4, 8, 8), torch.ones(1), torch.randn(1, tiny_unet.TOKENS, tiny_unet.CONTEXT))
    options = engine("techniques.compile.backends").CompileOptions(
        freeze=freeze, device=torch.device("cpu"), folder=None, example=example
    )
    target = engine("techniques.compile.program").PureNetwork(network, {})
    with torch.no_grad():
        program = engine("techniques.compile.backends.jit_trace").compile(target, options)
        assert torch.equal(program(*example), program(*example))
    gone = weakref.ref(network)
    del target, network
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("freeze", [False, True])
def test_a_trace_goes_with_the_program(engine: Any, freeze: bool) -> None:
    """What torch.jit.trace makes stays among the functions of the process: 26 MB for each trace of a small UNet."""
    options = engine("techniques.compile.backends").CompileOptions(freeze=freeze, example=(torch.ones(1, 3),))
    known = torch.jit._state._python_cu.get_functions
    before = len(known())
    with torch.no_grad():
        engine("techniques.compile.backends.jit_trace").compile(torch.nn.Linear(3, 3), options)
    assert len(known()) == before
    torch.jit.trace(torch.neg, torch.ones(1))
    assert len(known()) > before


def test_frozen_weights_go_with_the_program(engine: Any) -> None:
    """torch.jit.freeze would keep them until the process ends: 80 MB after these six."""
    options = engine("techniques.compile.backends").CompileOptions(freeze=True, example=(torch.ones(1, 2000),))
    compile = engine("techniques.compile.backends.jit_trace").compile

    def use() -> int:
        layer = torch.nn.Linear(2000, 2000)
        with torch.no_grad():
            program = compile(layer, options)
            assert torch.allclose(program(*options.example), layer(*options.example), atol=1e-4)
            program(*options.example)
        del program, layer
        gc.collect()
        return engine("measure.peaks").rss_bytes()

    before = use()
    for _ in range(5):
        after = use()
    assert after - before < 40e6
