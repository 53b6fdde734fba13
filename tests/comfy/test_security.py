"""No code of a model file runs, and no name leads out of a models folder, whatever node is given it."""

from __future__ import annotations

import pickle

import pytest

from speedlab_tools.stress.fuzz import HOSTILE_TEXTS

RAN: list[str] = []


class Trap:
    """A pickle of this runs `spring` in a loader that runs code."""

    def __reduce__(self):
        return spring, ()


def spring() -> None:
    RAN.append("ran")


@pytest.fixture
def pickles(model_files):
    """A pickle that runs code in every place that a node reads, and a pair that core reads by its name."""
    import torch

    places = ["checkpoints/trap.ckpt", "loras/trap.pt", "vae/trap.pt", "vae_approx/trap_decoder.pth",
              "vae_approx/taesd3_encoder.pth", "vae_approx/taesd3_decoder.pth"]  # fmt: skip
    for number, place in enumerate(places):
        path = model_files / place
        if number % 2:
            torch.save({"1.weight": torch.zeros(1), "trap": Trap()}, path)
        else:
            path.write_bytes(pickle.dumps({"state_dict": Trap()}))
    RAN.clear()
    yield model_files
    for place in places:
        (model_files / place).unlink()


def readers(node, tiny):
    """Every node that opens a model file, on its trap."""
    slots = {f"lora_{n}": "None" for n in range(2, 5)} | {f"strength_{n}": 1.0 for n in range(1, 5)}
    return {
        "checkpoint": lambda: node("SpeedLabCheckpointLoader").load("trap.ckpt", "auto", "contiguous"),
        "lora": lambda: node("SpeedLabLoraStack").apply(tiny.model, None, lora_1="trap.pt", **slots),
        "vae": lambda: node("SpeedLabVAELoader").load("trap.pt", "auto"),
        "pair": lambda: node("SpeedLabVAELoader").load("taesd3", "auto"),
        "tiny": lambda: node("SpeedLabTinyVAEDecode").decode(tiny.latent(), "trap", 1, 0, tiny.model),
    }


READERS = ("checkpoint", "lora", "vae", "pair", "tiny")


@pytest.mark.parametrize("reader", READERS)
def test_no_pickle_is_run_whatever_node_reads_it(pickles, node, tiny, engine, reader):
    with pytest.raises(engine("common.errors").ModelFileError):
        readers(node, tiny)[reader]()
    assert not RAN


def test_the_trap_would_be_seen(pickles):
    pickle.loads((pickles / "checkpoints" / "trap.ckpt").read_bytes())
    assert RAN


@pytest.mark.parametrize("reader", READERS)
def test_every_pickle_is_refused_where_torch_could_run_its_code(pickles, node, tiny, engine, monkeypatch, reader):
    """A PyTorch before 2.4: it lacks the list of allowed names, and core would load the file as any pickle."""
    import comfy.utils
    import torch

    monkeypatch.delattr(torch.serialization, "add_safe_globals")
    monkeypatch.setattr(comfy.utils, "ALWAYS_SAFE_LOAD", False, raising=False)  # newer ComfyUIs have it no more
    with pytest.raises(engine("common.errors").ModelFileError, match="could run code from it"):
        readers(node, tiny)[reader]()
    assert not RAN


LEADING_OUT = [text for text in HOSTILE_TEXTS if text.strip() not in ("", "*")]


@pytest.mark.parametrize("kind", ["checkpoints", "loras", "vae", "vae_approx"])
def test_no_name_of_a_model_leads_out(model_files, engine, kind):
    find, error = engine("models.loading").find_model_file, engine("common.errors").ModelFileError
    outside = model_files.parent / "a.safetensors"
    outside.write_bytes(b"outside")
    inside = model_files / kind / "inside.safetensors"
    inside.write_bytes(b"inside")
    try:
        assert find(kind, "inside.safetensors") == inside
        upwards = ("../a.safetensors", "../../a.safetensors", "sub/../../../a.safetensors", "..\\..\\a.safetensors")
        drives = ("C:\\a.safetensors", "c:a.safetensors", "\\a.safetensors", "\\\\host\\a.safetensors")
        for name in (*LEADING_OUT, *upwards, *drives, str(outside), "a.safetensors\0.png"):
            with pytest.raises(error) as caught:
                find(kind, name)
            assert str(caught.value).strip()
    finally:
        outside.unlink()
        inside.unlink()
