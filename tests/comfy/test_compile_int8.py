"""Compile Model in 8 bits: int8 kernels run, the error is measured and within the limit, and the worst layers stay."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from speedlab_tools import bundle

from . import tiny_unet
from .test_composition import _control
from .tiny_unet import TinyUNet

SIZE, STEPS = (16, 16), 4
# Of latents of a random network, whose errors CFG 5 and each step multiply; those of two seeds are at 1.4.
ALIKE = 0.25


@pytest.fixture(scope="module")
def unet(comfy: Any) -> TinyUNet:
    with torch.inference_mode():
        return tiny_unet.build("mini")


@pytest.fixture
def program(engine: Any) -> Iterator[Any]:
    """The module of programs, with none yet."""
    module = engine("techniques.compile.program")
    module._programs.clear()
    yield module
    module._programs.clear()


@pytest.fixture
def compiled(engine: Any, program: Any) -> Callable[..., Any]:
    attach = engine("techniques.compile.attach")
    return lambda model, backend="openvino", **more: attach.attach_compile(
        model, attach.CompileConfig(backend, **{"quantize": "int8", **more})
    )


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def choices(program: Any, network: Any) -> list[Any]:
    """What was measured of a network."""
    return [found for programs in program._programs[network].values() for found in programs.quantised.values()]


def forget(base: Path, damaged: bool = False) -> None:
    """Choices that are kept on disk, as after a restart: gone, or damaged."""
    for path in (base / "user" / "speedlab" / "compiled").glob("openvino-*/*.int8"):
        path.write_bytes(path.read_bytes()[:-1]) if damaged else path.unlink()


def noted(record: Any) -> list[str]:
    return list(record.warnings)


def kernels(program: Any, network: Any) -> list[Counter[str]]:
    """By program: how many convolutions and linear layers compute in which type, as OpenVINO says."""
    found = []
    for programs in program._programs[network].values():
        for each in programs.by_key.values():
            nodes = [node.get_rt_info() for node in each._request.get_compiled_model().get_runtime_model().get_ops()]
            kinds = [node for node in nodes if node["layerType"].value in ("Convolution", "FullyConnected")]
            found.append(Counter(node["runtimePrecision"].value for node in kinds))
    return found


def test_int8_kernels_run_and_the_record_says_so(
    unet: TinyUNet,
    node: Any,
    compiled: Any,
    program: Any,
    base_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second prompt of another seed, size and number of rows keeps what was chosen, and so does another process, in
    whose folder a bundle was unpacked."""
    import folder_paths

    forget(base_dir)
    plain = compiled(unet.model, quantize="off")
    before = unet.sample(plain, steps=STEPS, size=SIZE)
    model = compiled(unet.model)
    seen = []
    for seed in (1, 2, 3):
        if seed == 3:  # as a process that has nothing yet, and begins with another prompt
            image = unet.sample(model, steps=STEPS, size=SIZE)
            (choice,) = choices(program, unet.unet)
            program._programs.clear()
            bundle.pack(base_dir / "user", tmp_path / "kept.zip")
            bundle.unpack(tmp_path / "kept.zip", tmp_path / "user")
            monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
        latent = {"samples": torch.zeros(1, 4, *SIZE)}
        record = node("SpeedLabProfileSampler").sample(
            model, seed, STEPS, 5.0, "euler", "normal", unet.cond(seed), unet.cond(2), latent
        )["result"][1]
        told = [text for text in noted(record) if "8 bits" in text]
        assert len(told) == 1
        seen.append(told[0])
    (kept,) = choices(program, unet.unet)
    assert seen[0] == seen[1] and "measured on" in seen[0] and "kept on disk" in seen[2]
    assert any("from the graph kept on disk" in text for text in noted(record))
    assert kept.kept and list(kept.ranges.items()) == list(choice.ranges.items())
    assert torch.equal(unet.sample(model, steps=STEPS, size=SIZE), image)
    words = (
        rf"{len(choice.ranges)} of {choice.layers} layers run in 8 bits and .* in floating point.*{choice.error:.2%}"
    )
    assert re.search(words, seen[0]) and "limit" in seen[0]
    assert 0 < choice.error <= choice.limit
    assert len(choice.ranges) > choice.layers / 3
    in_8_bits = kernels(program, unet.unet)[-1]
    assert in_8_bits["u8"] + in_8_bits["i8"] == len(choice.ranges)
    for settings in ({"size": SIZE}, {"size": (24, 16), "cfg": 1.0}, {"size": SIZE, "batch": 2}):
        exact = unet.sample(steps=STEPS, **settings)
        assert 0 < distance(unet.sample(model, steps=STEPS, **settings), exact) < ALIKE
    assert choices(program, unet.unet) == [kept]
    assert torch.equal(unet.sample(plain, steps=STEPS, size=SIZE), before)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in unet.unet.modules())


@pytest.mark.full
def test_measuring_stands_apart_from_sampling(
    unet: TinyUNet, node: Any, compiled: Any, program: Any, base_dir: Path
) -> None:
    forget(base_dir)
    latent = {"samples": torch.zeros(1, 4, *SIZE)}
    first, again = (
        node("SpeedLabProfileSampler").sample(
            compiled(unet.model), 1, STEPS, 5.0, "euler", "normal", unet.cond(1), unet.cond(2), latent
        )["result"][1]
        for _ in range(2)
    )
    (choice,) = choices(program, unet.unet)
    assert first.phases_ms["compile"] >= 1000.0 * choice.seconds
    assert again.phases_ms["compile"] is None
    assert "quantize=int8" in str(first.request["accelerators"])


@pytest.mark.full
def test_a_damaged_choice_is_measured_anew_and_repeats(
    unet: TinyUNet, compiled: Any, program: Any, base_dir: Path, caplog: Any
) -> None:
    forget(base_dir)
    found = []
    for _ in range(2):
        image = unet.sample(compiled(unet.model), steps=STEPS, size=SIZE)
        found.append((image, choices(program, unet.unet)[0]))
        program._programs.clear()
        forget(base_dir, damaged=True)
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].ranges == found[1][1].ranges and not found[1][1].kept
    assert caplog.text.count("is damaged") == 1


def test_a_layer_with_outliers_stays_in_floating_point(comfy: Any, compiled: Any, program: Any) -> None:
    """One channel's values are a thousand times as large as the others, and count a thousandth of them."""
    name = "output_blocks.3.0.out_layers"
    unet = tiny_unet.build("mini")
    norm, conv = unet.unet.get_submodule(f"{name}.0"), unet.unet.get_submodule(f"{name}.3")
    unet.sample(compiled(unet.model), steps=STEPS, size=SIZE)
    (choice,) = choices(program, unet.unet)
    assert f"network.{name}.3.weight" in choice.ranges
    program._programs.clear()
    norm.weight[0] *= 1000.0
    norm.bias[0] = 1000.0
    conv.weight[:, 0] /= 1000.0
    exact = unet.sample(steps=STEPS, size=SIZE)
    assert distance(unet.sample(compiled(unet.model), steps=STEPS, size=SIZE), exact) < ALIKE
    (hostile,) = choices(program, unet.unet)
    assert hostile.ranges and f"network.{name}.3.weight" not in hostile.ranges
    assert not hostile.kept and hostile.kept_by_error > 0 and hostile.error <= hostile.limit
    assert f"{hostile.kept_by_error} of them for their error" in hostile.words()


@pytest.mark.full
def test_no_choice_within_the_limit(
    unet: TinyUNet, node: Any, compiled: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record credits the program that ran, and tells why."""
    int8 = engine("techniques.compile.int8")
    monkeypatch.setattr(int8, "LEAST_LIMIT", 1e-9)
    monkeypatch.setattr(int8, "LIMIT_OF_BF16", 0.0)
    record = node("SpeedLabProfileSampler").sample(
        compiled(unet.model), 1, STEPS, 5.0, "euler", "normal", unet.cond(1), unet.cond(2),
        {"samples": torch.zeros(1, 4, *SIZE)},
    )["result"][1]  # fmt: skip
    assert any("none of" in text and "beyond the limit" in text for text in noted(record))
    assert "backend=openvino" in str(record.request["accelerators"])
    assert "quantize" not in str(record.request["accelerators"])


@pytest.mark.full
def test_a_lora_is_measured_anew(unet: TinyUNet, compiled: Any, program: Any) -> None:
    weights = {k: v for k, v in unet.model.model.state_dict().items() if "attn" in k and v.ndim > 1}
    generator = torch.Generator().manual_seed(3)
    patches = {k: ("diff", (0.05 * torch.randn(v.shape, generator=generator),)) for k, v in weights.items()}
    patched = unet.model.clone()
    patched.add_patches(patches, 1.0)
    found = []
    for model in (unet.model, patched, unet.model):
        exact = unet.sample(model, steps=STEPS, size=SIZE)
        image = unet.sample(compiled(model), steps=STEPS, size=SIZE)
        (choice,) = choices(program, unet.unet)
        assert 0 < distance(image, exact) < ALIKE
        found.append((image, dict(choice.ranges)))
    assert choice.kept, "the weights without the LoRA are those that were measured"
    assert found[0][1] != found[1][1]
    assert found[0][1] == found[2][1] and torch.equal(found[0][0], found[2][0])


@pytest.mark.full
def test_deepcache_and_dynamic_cfg(unet: TinyUNet, compiled: Any, program: Any, engine: Any) -> None:
    """Both programs have layers in 8 bits, by one choice."""
    deepcache, guidance = engine("techniques.deepcache.attach"), engine("techniques.guidance.dynamic_cfg")

    def stack(model: Any) -> Any:
        model = deepcache.attach_deepcache(model, deepcache.DeepCacheConfig(interval=3, branch=1, start=0.2))
        return guidance.attach_dynamic_cfg(model, guidance.DynamicCFGConfig(stop_at=0.5))

    expected = unet.sample(stack(unet.model), steps=7, size=SIZE)
    model = compiled(stack(unet.model))
    found = unet.sample(model, steps=7, size=SIZE)
    assert len(choices(program, unet.unet)) == 1
    assert 0 < distance(found, expected) < ALIKE
    counts = kernels(program, unet.unet)
    assert len(counts) == 2 and all(count["u8"] + count["i8"] > 0 for count in counts)
    with unet.counted() as calls:
        assert torch.equal(unet.sample(model, steps=7, size=SIZE), found)
    assert calls == []


@pytest.mark.full
def test_controlnet_widens_the_ranges(unet: TinyUNet, compiled: Any, program: Any) -> None:
    model, control = compiled(unet.model), {"positive": _control(unet, (0.0, 1.0))(unet.cond(1))}
    for conds in ({}, control, {}):
        expected = unet.sample(steps=STEPS, size=SIZE, **conds)
        found = unet.sample(model, steps=STEPS, size=SIZE, **conds)
        assert 0 < distance(found, expected) < ALIKE
    without, with_control = choices(program, unet.unet)
    assert without.ranges != with_control.ranges


@pytest.mark.full
def test_in_a_worker_thread(unet: TinyUNet, compiled: Any) -> None:
    found: list[torch.Tensor] = []
    model = compiled(unet.model)
    thread = threading.Thread(target=lambda: found.append(unet.sample(model, steps=STEPS, size=SIZE)))
    thread.start()
    thread.join()
    assert torch.equal(unet.sample(model, steps=STEPS, size=SIZE), found[0])


def test_bf16_is_refused(comfy: Any, compiled: Any, engine: Any) -> None:
    """OpenVINO makes no int8 kernels of a graph in bf16."""
    unet = tiny_unet.build("mini")
    unet.unet.to(torch.bfloat16)
    with pytest.raises(engine("common.errors").SpeedLabError, match=r"openvino.*bfloat16.*fp32.*quantize to off"):
        unet.sample(compiled(unet.model), steps=1, size=SIZE)


@pytest.mark.parametrize("backend", ["inductor", "cudagraphs", "jit_trace", "onnxruntime"])
def test_other_backends_refuse(unet: TinyUNet, compiled: Any, engine: Any, backend: str) -> None:
    with pytest.raises(engine("common.errors").UnavailableError, match=rf"{backend} has no quantize int8.*openvino"):
        compiled(unet.model, backend)


@pytest.mark.full
def test_the_model_that_draws(
    core: ModuleType, model_files: Path, cache_dir: Path, compiled: Any, program: Any
) -> None:
    """Most of its layers run in 8 bits, within the limit, and the caption's attributes are drawn as before."""
    from speedlab.measure.drawn.accuracy import accuracy
    from speedlab_tools.scenarios import drawn
    from speedlab_tools.synthetic.drawn import packed

    checkpoint = packed.write_drawn(cache_dir / "drawn")[0]
    linked = model_files / "checkpoints" / "int8.safetensors"
    linked.symlink_to(checkpoint)
    try:
        model, clip, vae = core.CheckpointLoaderSimple().load_checkpoint(linked.name)
    finally:
        linked.unlink()
    text, side = drawn.CAPTIONS[1], drawn.side() // 8
    conds = [core.CLIPTextEncode().encode(clip, words)[0] for words in (text, "")]

    def sample(model: Any) -> tuple[torch.Tensor, float]:
        latent = {"samples": torch.zeros(1, 4, side, side)}
        found = core.common_ksampler(model, 3, 8, drawn.CFG, "dpmpp_2m", "karras", *conds, latent)[0]["samples"]
        right = accuracy(vae.decode(found), [text])
        assert right is not None
        return found, right

    exact, before = sample(model)
    found, after = sample(compiled(model))
    (choice,) = choices(program, model.model.diffusion_model)
    assert 0 < choice.error <= choice.limit < 0.05
    assert len(choice.ranges) > 0.7 * choice.layers
    assert distance(found, exact) < 0.15 and after >= before - 0.2
