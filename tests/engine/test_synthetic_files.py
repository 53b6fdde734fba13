"""Synthetic model files without ComfyUI: layout, determinism, writing."""

from __future__ import annotations

import hashlib
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from speedlab_tools.__main__ import main
from speedlab_tools.synthetic import (
    FAMILY_NAMES,
    CheckpointSpec,
    lora_state_dict,
    shapes,
    taesd_state_dicts,
    write_lora,
    write_taesd,
)
from speedlab_tools.synthetic.files import Layout, Weight, describe, draw, write_weights

ROOT = Path(__file__).resolve().parents[2]
UNET, VAE = "model.diffusion_model.", "first_stage_model."


def small_layout() -> Layout:
    layout = Layout()
    layout.conv("conv", 8, 16)
    layout.norm("norm", 16)
    layout.linear("linear", 16, 3)
    layout["positions"] = Weight((1, 5), integer=True)
    layout["scale"] = Weight((), mean=2.5)
    return layout


def parameters(spec: CheckpointSpec, prefix: str) -> int:
    return sum(math.prod(shape) for name, shape in shapes(spec).items() if name.startswith(prefix))


@pytest.mark.parametrize(("family", "unet"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684)])
def test_full_layouts_have_the_published_parameter_counts(family: str, unet: int) -> None:
    spec = CheckpointSpec(family, "full")  # type: ignore[arg-type]
    assert parameters(spec, UNET) == unet
    assert parameters(spec, VAE) == 83_653_863


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_small_keeps_encoders_and_shrinks_the_unet(family: str) -> None:
    small, full = CheckpointSpec(family, "small"), CheckpointSpec(family, "full")  # type: ignore[arg-type]
    outside = {name: shape for name, shape in shapes(full).items() if not name.startswith(UNET)}
    assert {name: shape for name, shape in shapes(small).items() if not name.startswith(UNET)} == outside
    assert parameters(small, UNET) < 0.2 * parameters(full, UNET)


@pytest.mark.parametrize("field", ["family", "size", "dtype"])
def test_unknown_choices_are_refused(field: str) -> None:
    values = {"family": "sd15", field: "nonsense"}
    with pytest.raises(ValueError, match=f"{field} 'nonsense'.*choose one of"):
        CheckpointSpec(**values)  # type: ignore[arg-type]


def test_a_draw_depends_on_seed_and_name_only() -> None:
    weight = Weight((300, 200), std=2.0, mean=1.0)
    threads = torch.get_num_threads()
    first = draw("a", weight, 0, torch.float32, "cpu")
    try:
        torch.set_num_threads(1)
        assert torch.equal(draw("a", weight, 0, torch.float32, "cpu"), first)
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(draw("b", weight, 0, torch.float32, "cpu"), first)
    assert not torch.equal(draw("a", weight, 1, torch.float32, "cpu"), first)
    assert first.mean().item() == pytest.approx(1.0, abs=0.05)
    assert first.std().item() == pytest.approx(2.0, rel=0.02)
    # The bytes are a promise to every machine that compares its results with another's.
    digest = hashlib.sha256(draw("a", weight, 0, torch.float16, "cpu").numpy().tobytes()).hexdigest()
    assert digest == "4db5f38054864127901454a147ae4117b6d46f673cdfc1235bbb44d75e8ac74a"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_files_hold_what_was_drawn(tmp_path: Path, dtype: torch.dtype) -> None:
    layout, metadata, seen = small_layout(), describe("test", a=1), []
    path = write_weights(
        tmp_path / "new" / "x.safetensors", layout, 3, dtype, metadata, lambda done, total: seen.append((done, total))
    )
    found = load_file(path)
    assert found.keys() == layout.keys()
    for name, weight in layout.items():
        assert torch.equal(found[name], draw(name, weight, 3, dtype, "cpu"))
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == metadata
    assert "SpeedLab" in metadata["modelspec.title"]
    assert "random weights" in metadata["modelspec.title"]
    assert seen[-1][0] == seen[-1][1] == sum(tensor.nbytes for tensor in found.values())
    again = write_weights(tmp_path / "again.safetensors", layout, 3, dtype, metadata)
    assert again.read_bytes() == path.read_bytes()


def test_an_equal_file_is_kept_and_any_other_replaced(tmp_path: Path) -> None:
    layout, path = small_layout(), tmp_path / "x.safetensors"
    calls: list[int] = []

    def write(seed: int) -> bytes:
        calls.clear()
        write_weights(
            path, layout, seed, torch.float32, describe("test", seed=seed), lambda done, _: calls.append(done)
        )
        return path.read_bytes()

    whole = write(0)
    assert calls
    assert write(0) == whole
    assert not calls
    path.write_bytes(whole[:-7])
    assert write(0) == whole
    path.write_bytes(b"something else")
    assert write(0) == whole
    assert write(1) != whole
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "x.safetensors"
    with pytest.raises(OSError, match=r"cannot write .*x\.safetensors.*choose another folder"):
        write_weights(target, small_layout(), 0, torch.float32, describe("test"))


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_weights(tmp_path / "x.safetensors", small_layout(), 0, torch.float32, describe("test"), interrupt)
    assert list(tmp_path.iterdir()) == []


def test_lora_files_equal_their_state_dict(tmp_path: Path) -> None:
    spec = CheckpointSpec("sd15")
    found = load_file(write_lora(tmp_path / "lora.safetensors", spec, rank=2, seed=5))
    made = lora_state_dict(spec, rank=2, seed=5)
    assert found.keys() == made.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in made.items())
    assert not any(name.startswith("lora_te") for name in lora_state_dict(spec, text_encoder=False))
    with pytest.raises(ValueError, match="rank 0"):
        write_lora(tmp_path / "bad.safetensors", spec, rank=0)


def test_taesd_files_differ_by_name(tmp_path: Path) -> None:
    encoder, decoder = write_taesd(tmp_path, "taesdxl")
    assert (encoder.name, decoder.name) == ("taesdxl_encoder.safetensors", "taesdxl_decoder.safetensors")
    made = taesd_state_dicts("taesdxl")
    assert torch.equal(load_file(decoder)["1.weight"], made[1]["1.weight"])
    assert not torch.equal(taesd_state_dicts("taesd")[1]["1.weight"], made[1]["1.weight"])


def test_the_command_line_writes_and_reports(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "speedlab_tools", "synthetic", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    target = tmp_path / "lora.safetensors"
    done = run("lora", str(target), "--family", "sd15", "--rank", "1", "--no-text-encoder")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(target)
    assert target.is_file()
    (tmp_path / "file").touch()
    failed = run("taesd", str(tmp_path / "file"))
    assert failed.returncode == 1
    assert "error: cannot write" in failed.stderr


def test_the_command_leaves_logs_of_its_caller_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where PyTorch is loaded, models of demo and bench are written in this very process."""
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    for _ in range(2):
        assert main(["synthetic", "taesd", str(tmp_path)]) == 0
    assert (root.level, list(root.handlers)) == before
    assert capsys.readouterr().err.count("is already there") == 2
