"""Load LoRA Stack counts what core patched, whatever format a file is in."""

from __future__ import annotations

import pytest

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
CORE_BLOCK = "input_blocks.1.1.transformer_blocks.0"
LAYERS = ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "attn2.to_v")
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


def kohya(layer):
    return "lora_unet_" + f"{BLOCK}.{layer}".replace(".", "_")


def processor(layer, prefix=""):
    return f"{prefix}{BLOCK}.{layer}".replace(".to_", ".processor.to_").removesuffix(".0")


def core_name(layer):
    return f"diffusion_model.{CORE_BLOCK}.{layer}"


def lora(up, down):
    def tensors(name, out, into, torch):
        return {f"{name}{up}": torch.randn(out, 2), f"{name}{down}": torch.randn(2, into)}

    return tensors


def kohya_lora(name, out, into, torch):
    return {**lora(".lora_up.weight", ".lora_down.weight")(name, out, into, torch), f"{name}.alpha": torch.tensor(2.0)}


def dora(name, out, into, torch):
    return {**kohya_lora(name, out, into, torch), f"{name}.dora_scale": torch.ones(out, 1)}


def loha(name, out, into, torch):
    return {f"{name}.hada_w{n}_{side}": torch.randn(*shape)
            for n in (1, 2) for side, shape in (("a", (out, 2)), ("b", (2, into)))}  # fmt: skip


def lokr(name, out, into, torch):
    return {f"{name}.lokr_w1": torch.randn(2, 2), f"{name}.lokr_w2_a": torch.randn(out // 2, 2),
            f"{name}.lokr_w2_b": torch.randn(2, into // 2), f"{name}.alpha": torch.tensor(2.0)}  # fmt: skip


def oft(name, out, into, torch):
    return {f"{name}.oft_blocks": torch.zeros(out // 4, 4, 4), f"{name}.alpha": torch.tensor(1.0)}


def boft(name, out, into, torch):
    return {f"{name}.oft_blocks": torch.zeros(1, out // 4, 4, 4), f"{name}.rescale": torch.ones(out, 1)}


def glora(name, out, into, torch):
    shapes = {"a1": (into, 2), "a2": (2, into), "b1": (into, 2), "b2": (2, out)}
    return {f"{name}.{part}.weight": torch.randn(*shape) for part, shape in shapes.items()}


def difference(name, out, into, torch):
    return {f"{name}.diff": torch.randn(out, into)}


# Name of a layer of the UNet, its tensors, and the text encoder's name where the format has one.
FORMATS = {
    "kohya": (kohya, kohya_lora, "lora_te_" + TEXT.replace(".", "_")),
    "old diffusers": (processor, lora("_lora.up.weight", "_lora.down.weight"), None),
    "diffusers": (lambda layer: processor(layer, "unet."), lora(".lora.up.weight", ".lora.down.weight"), None),
    "diffusers with text": (
        lambda layer: processor(layer, "unet."),
        lora(".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
        f"text_encoder.{TEXT}",
    ),
    "peft": (core_name, lora(".lora_B.weight", ".lora_A.weight"), f"text_encoders.clip_l.transformer.{TEXT}"),
    "peft of an adapter": (core_name, lora(".lora_B.default.weight", ".lora_A.default.weight"), None),
    "bare peft": (core_name, lora(".lora_B", ".lora_A"), None),
    "LoHa": (kohya, loha, None),
    "LoKr": (kohya, lokr, None),
    "LoKr of lycoris": (lambda layer: kohya(layer).replace("lora_unet", "lycoris"), lokr, None),
    "DoRA": (kohya, dora, None),
    "OFT": (kohya, oft, None),
    "BOFT": (kohya, boft, None),
    "GLoRA": (kohya, glora, None),
    "difference": (core_name, difference, None),
}
# What trainers put beside modules that core does not read.
BESIDE = {
    "none": (),
    "bundled embedding": ("bundle_emb.cat.string_to_param.*", "bundle_emb.dog.clip_l"),
    "magnitude of peft": (core_name("attn1.to_q") + ".lora_magnitude_vector",),
}


def file_of(kind, model, clip, strange=0):
    """Tensors of each layer; the last `strange` layers are none of this model's."""
    import torch

    name_of, tensors, text = FORMATS[kind]
    shapes = model.model.state_dict()
    made = {}
    for index, layer in enumerate(LAYERS):
        name = name_of(layer)
        if index >= len(LAYERS) - strange:
            name = name.replace("own_blocks", "own_absent_blocks").replace("input_blocks", "absent_blocks")
        made |= tensors(name, *shapes[f"{core_name(layer)}.weight"].shape, torch)
    if text:
        made |= tensors(text, *clip.cond_stage_model.state_dict()[f"clip_l.transformer.{TEXT}.weight"].shape, torch)
    return made


def patched_by_core(core, model, clip, name, caplog):
    """How many weights core's loader patched, and the tensors that it says it did not load."""
    caplog.clear()
    new_model, new_clip = core.LoraLoader().load_lora(model, clip, name, 1.0, 1.0)
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("lora key not loaded: ")]
    return {**new_model.patches, **new_clip.patcher.patches}, {
        text.removeprefix("lora key not loaded: ") for text in said
    }


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("kind", FORMATS)
def test_counted_modules_are_what_core_patched(kind, beside, parts, core, engine, written, caplog):
    import torch

    tensors = file_of(kind, *parts) | {name: torch.ones(4) for name in BESIDE[beside]}
    name = written(tensors)
    patches, not_loaded = patched_by_core(core, *parts, name, caplog)
    module = engine("models.lora")
    model, clip, (match,) = module.apply_stack(*parts, [module.LoraChoice(name, 1.0)])
    assert match.matched == match.total == len(patches) == len(LAYERS) + (FORMATS[kind][2] is not None)
    assert {**model.patches, **clip.patcher.patches}.keys() == patches.keys()
    assert set(match.unread) == not_loaded == set(BESIDE[beside])
    assert len(match.warnings()) == bool(BESIDE[beside])


@pytest.mark.parametrize("kind", FORMATS)
def test_modules_of_another_model_are_counted_in_every_format(kind, parts, core, engine, written, caplog):
    name = written(file_of(kind, *parts, strange=2))
    patches, not_loaded = patched_by_core(core, *parts, name, caplog)
    module = engine("models.lora")
    match = module.apply_stack(*parts, [module.LoraChoice(name, 1.0)])[2][0]
    assert (match.matched, match.total) == (len(patches), len(patches) + 2)
    assert not_loaded
    assert not match.unread
    assert [f"{match.matched} of {match.total} modules" in text for text in match.warnings()] == [True]


def test_a_weight_and_its_bias_are_one_module(parts, engine, written):
    import torch

    name = core_name("norm1")
    width = parts[0].model.state_dict()[f"{name}.weight"].shape[0]
    file = written({f"{name}.w_norm": torch.ones(width), f"{name}.b_norm": torch.ones(width)})
    module = engine("models.lora")
    match = module.apply_stack(*parts, [module.LoraChoice(file, 1.0)])[2][0]
    assert (match.matched, match.total) == (1, 1)


def test_a_damaged_module_of_another_model_stops_nothing(parts, core, engine, written):
    """Core never comes to it; one of this model's stops core too, and is told in words."""
    import torch

    module = engine("models.lora")
    sound = file_of("kohya", *parts)
    name = written({**sound, "lora_unet_absent.lora_up.weight": torch.ones(2, 2)})
    core.LoraLoader().load_lora(*parts, name, 1.0, 1.0)
    match = module.apply_stack(*parts, [module.LoraChoice(name, 1.0)])[2][0]
    assert (match.matched, match.total) == (5, 6)
    name = written({key: value for key, value in sound.items() if key != f"{kohya('attn1.to_q')}.lora_down.weight"})
    with pytest.raises(KeyError):
        core.LoraLoader().load_lora(*parts, name, 1.0, 1.0)
    with pytest.raises(engine("common.errors").ModelFileError, match="lacks the tensor"):
        module.apply_stack(*parts, [module.LoraChoice(name, 1.0)])


def test_the_record_says_what_has_no_effect(parts, node, written):
    import torch

    name = written({**file_of("old diffusers", *parts, strange=1), "bundle_emb.cat.clip_l": torch.ones(4)})
    slots = {f"lora_{n}": "None" for n in range(2, 5)} | {f"strength_{n}": 1.0 for n in range(1, 5)}
    model, clip = node("SpeedLabLoraStack").apply(*parts, lora_1=name, **slots)
    cond = node("SpeedLabTextEncode").encode(clip, "a lake")[0]
    record = node("SpeedLabProfileSampler").sample(
        model, 1, 1, 1.0, "euler", "normal", cond, cond, {"samples": torch.zeros(1, 4, 8, 8)}
    )["result"][1]
    assert record.request["loras"] == [f"{name} at 1: 3 of 4 modules"]
    assert any("3 of 4 modules match" in text for text in record.warnings)
    assert any("bundle_emb.cat.clip_l" in text for text in record.warnings)
