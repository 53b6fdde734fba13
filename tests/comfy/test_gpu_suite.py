"""The GPU suite on a CPU: models whose activations stay near 1, and every block from end to end on tiny ones."""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def gpu(name: str) -> ModuleType:
    """A module of the suite; it can be imported where ComfyUI can."""
    return importlib.import_module(f"speedlab_tools.gpu.{name}")


# What is measured small: each runner, variants apart and in turns, one after the other and with a capped GPU.
BLOCKS = (
    "peak", "work-sdxl", "sdxl-fp16", "kernels", "profiler", "cap-4gb", "offload", "alone-attention-slow",
    "compile-model", "compile-cudagraphs", "tour", "batch-sdxl", "refiner",
)  # fmt: skip
# On a CPU these have no kernel, no package or no such mode; that, too, is a row.
CANNOT = (
    "alone-attention-slow/attention-xformers", "alone-attention-slow/attention-flash_attn",
    "alone-attention-slow/attention-sage", "alone-attention-slow/attention-sage3",
    "alone-attention-slow/attention-kitchen_int8", "compile-cudagraphs/cudagraphs",
)  # fmt: skip


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sdxl_refiner"])
def test_activations_of_the_full_depth_stay_near_one(comfy: ModuleType, family: Any) -> None:
    """Each block of the full-depth network, one level as wide as the next; widths change the fan-in alone."""
    from speedlab_tools.synthetic.files import draw
    from speedlab_tools.synthetic.spec import CheckpointSpec, architecture
    from speedlab_tools.synthetic.unet import unet_layout

    full = architecture(CheckpointSpec(family, "full")).unet
    config = replace(full, channel_mult=(1,) * len(full.channel_mult))
    weights = {name: draw(name, w, 0, torch.float32, "cpu") for name, w in unet_layout(config).items()}
    detected = comfy.model_detection.detect_unet_config(dict(weights), "")
    unet = comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(
        **detected, num_head_channels=64, device="cpu", operations=comfy.ops.disable_weight_init
    )
    unet.load_state_dict(weights)
    seen: list[float] = []
    blocks = [*unet.input_blocks, unet.middle_block, *unet.output_blocks]
    layers = [layer for block in blocks for layer in block]
    for layer in layers:
        layer.register_forward_hook(lambda _module, _inputs, out: seen.append(float(out.std())))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, 16, 16, generator=generator)
    context = torch.randn(1, 77, config.context_dim, generator=generator)
    label = None if config.adm_channels is None else torch.randn(1, config.adm_channels, generator=generator)
    predicted = unet(noise, torch.tensor([500.0]), context=context, y=label)
    assert len(seen) == len(layers)
    assert min(seen) > 0.8, min(seen)
    assert max(seen) < 2.5, max(seen)
    assert predicted.std().item() == pytest.approx(1.0, abs=0.3)


def suite(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "speedlab_tools.gpu", "--small", "--repeats", "1", "--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))


@pytest.mark.full
@pytest.mark.timeout(2400)
def test_blocks_of_every_runner_run_from_end_to_end(comfy: ModuleType, tmp_path: Path) -> None:
    """That each stack of all blocks can be read is shown in tests/engine/test_gpu_suite.py."""
    from speedlab_tools.gpu import plan
    from speedlab_tools.gpu.suite import RUNNERS

    only = ("--only", *BLOCKS)
    done = suite(tmp_path, "--minutes", "35", *only)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = tmp_path.glob("*_gpu-small.json")
    document = json.loads(path.read_text())
    rows = {row["id"]: row for row in document["rows"]}
    blocks = plan.chosen(plan.BLOCKS, BLOCKS)
    assert {block.runner for block in blocks} == RUNNERS.keys() and document["started"] == {}
    expected = {block.row(variant) for block in blocks for variant in block.variants}
    assert expected <= rows.keys()
    assert {name: row.get("error") for name, row in rows.items() if row["status"] != "ok"}.keys() == set(CANNOT)
    assert all(rows[name]["status"] == "unavailable" for name in CANNOT)
    exact, stock = rows["sdxl-fp16/exact"], rows["sdxl-fp16/stock"]
    assert stock["ratio"] == 1.0 and stock["relative_error"] == 0.0 and exact["relative_error"] < 0.05
    assert exact["ratio"] == pytest.approx(stock["picture_s"] / exact["picture_s"], rel=0.01)
    flop = rows["work-sdxl/step"]["flop_per_step"] * exact["steps"]
    assert 0.0 < exact["tflops"] == pytest.approx(flop / exact["sampling_s"] / 1e12, rel=0.05, abs=2e-3)
    assert rows["sdxl-fp16/sdxl-fastest"].get("tflops") is None
    assert rows["sdxl-fp16/sdxl-fastest-deepcache"]["relative_error"] > 0.0
    assert rows["offload/sequential-tiny"]["samples"] and rows["kernels/exact"]["kernels"]
    assert 0.5 < rows["kernels/stock"]["steps_over_wall"] <= 1.0
    assert len(rows["tour-lora/compile"]["stages"]) == 5 and len(rows["tour-size/compile"]["stages"]) == 5
    assert rows["batch-sdxl/stock-1"]["status"] == "ok"
    with path.with_suffix(".csv").open(newline="") as file:
        assert {row["id"] for row in csv.DictReader(file)} == rows.keys()
    (trace,) = tmp_path.glob("*-trace.json.gz")
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert "no figure below says anything of a real one" in done.stdout
    assert "What did not run:" in done.stdout and "not measured" in done.stdout

    before = path.read_text()
    again = suite(tmp_path, *only)
    assert again.returncode == 0 and json.loads(path.read_text())["rows"] == json.loads(before)["rows"]
    assert "[1/" not in again.stdout, "nothing is measured twice"


@pytest.mark.full
def test_a_call_without_time_writes_what_it_has_and_says_what_is_left(comfy: ModuleType, tmp_path: Path) -> None:
    done = suite(tmp_path, "--minutes", "0.001", "--only", "peak", "sdxl-fp16")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "7 measurements are left; the same command goes on with peak/fp16" in done.stdout
    # On a CPU ComfyUI has none, whether it knows the word or not.
    (path,) = tmp_path.glob("*_gpu-small.json")
    paged = json.loads(path.read_text())["env"]["dynamic_vram"]
    assert paged is (False if hasattr(importlib.import_module("comfy.cli_args"), "enables_dynamic_vram") else None)
    assert f"dynamic VRAM {'not there' if paged is None else 'off'}" in done.stdout


class Aimdo:
    """comfy_aimdo.control as `main.py` calls it: 0.4.13, or with `ids_alone` that of 0.4.9."""

    def __init__(self, works: bool = True, ids_alone: bool = False) -> None:
        self.works, self.ids_alone, self.calls = works, ids_alone, []

    def init(self, implementation: Any = None, simple_vram_headroom: Any = None, nvml_pressure: bool = False) -> bool:
        self.calls.append(("init", "torch" in sys.modules, simple_vram_headroom, nvml_pressure))
        return True

    def init_devices(self, devices: Any) -> bool:
        devices = list(devices)
        if self.ids_alone and any(isinstance(device, tuple) for device in devices):
            raise TypeError("int() argument must be a string, a bytes-like object or a real number, not 'tuple'")
        self.calls.append(("devices", devices))
        return self.works


class PlainAimdo(Aimdo):
    def init(self) -> bool:  # type: ignore[override]
        return super().init()


@pytest.fixture
def as_on_a_gpu(comfy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `main.py` asks of a ComfyUI with a card, with `aimdo` for the library. Returns the module of the switch."""
    import comfy.model_management as mm
    import comfy.model_patcher as patchers

    switch = importlib.import_module("speedlab_tools.host.dynamic_vram")

    def ready(aimdo: Any, **arguments: Any) -> SimpleNamespace:
        args = {"enable_dynamic_vram": False, "reserve_vram": 2.0, "vram_headroom": 0.5, **arguments}
        cli = SimpleNamespace(args=SimpleNamespace(**args), enables_dynamic_vram=lambda: args.get("wanted", True))
        management = SimpleNamespace(aimdo_enabled=False)
        for name, module in (
            ("comfy.cli_args", cli), ("comfy_aimdo.control", aimdo), ("comfy.memory_management", management)
        ):  # fmt: skip
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(patchers, "CoreModelPatcher", patchers.ModelPatcher, raising=False)
        monkeypatch.setattr(patchers, "ModelPatcherDynamic", "dynamic", raising=False)
        for name, value in (
            ("is_nvidia", lambda: args.get("nvidia", True)), ("is_amd", lambda: not args.get("nvidia", True)),
            ("rocm_version", args.get("rocm", (0, 0))), ("torch_version_numeric", args.get("torch", (2, 12))),
            ("get_all_torch_devices", lambda: [torch.device("cuda", 0), torch.device("cuda", 1)]),
        ):  # fmt: skip
            monkeypatch.setattr(mm, name, value, raising=False)
        return SimpleNamespace(switch=switch, is_on=lambda: (management.aimdo_enabled, patchers.CoreModelPatcher))

    return ready


GIB = 1024**3


@pytest.mark.parametrize("aimdo, init, devices", [
    (Aimdo(), (2 * GIB, True), [(0, GIB // 2), (1, GIB // 2)]),
    (Aimdo(ids_alone=True), (2 * GIB, True), [0, 1]),
    (PlainAimdo(), (None, False), [(0, GIB // 2), (1, GIB // 2)]),
])  # fmt: skip
def test_dynamic_vram_is_switched_on_as_main_does(as_on_a_gpu: Any, aimdo: Any, init: Any, devices: Any) -> None:
    gpus = as_on_a_gpu(aimdo)
    assert gpus.switch.begin() and gpus.switch.finish()
    assert [call[2:] if call[0] == "init" else call[1] for call in aimdo.calls] == [init, devices]
    assert gpus.is_on() == (True, "dynamic")


@pytest.mark.parametrize("arguments, said", [
    ({"nvidia": False, "rocm": (7, 2)}, "ROCm 7.14"), ({"torch": (2, 7)}, "PyTorch 2.8"),
    ({"broken": True}, "comfy-aimdo"),
])  # fmt: skip
def test_where_main_leaves_dynamic_vram_off_the_suite_does(
    as_on_a_gpu: Any, caplog: pytest.LogCaptureFixture, arguments: Any, said: str
) -> None:
    gpus = as_on_a_gpu(Aimdo(works="broken" not in arguments), **arguments)
    caplog.set_level("INFO")
    assert gpus.switch.begin() and not gpus.switch.finish()
    assert said in caplog.text
    assert gpus.is_on()[0] is False and gpus.is_on()[1] != "dynamic"


def test_a_comfyui_that_wants_none_gets_none(as_on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    aimdo = Aimdo()
    gpus = as_on_a_gpu(aimdo, wanted=False)
    assert not gpus.switch.begin()
    monkeypatch.setitem(sys.modules, "comfy.cli_args", SimpleNamespace(args=SimpleNamespace()))  # as in 0.3.75
    assert not gpus.switch.begin() and aimdo.calls == []


def test_main_switches_on_nothing_that_the_suite_does_not_know(comfy: ModuleType) -> None:
    """ComfyUI's own main.py: what it calls of comfy-aimdo, and what it sets."""
    text = (Path(importlib.import_module("nodes").__file__).parent / "main.py").read_text(encoding="utf-8")
    called = {name for name in re.findall(r"comfy_aimdo\.control\.(\w+)", text) if not name.startswith("set_log_")}
    set_here = set(re.findall(r"^\s+comfy\.(model_patcher|memory_management)\.(\w+) = ", text, re.M))
    has_it = hasattr(importlib.import_module("comfy.cli_args"), "enables_dynamic_vram")
    assert called == ({"init", "init_devices"} if has_it else set())
    names = {("model_patcher", "CoreModelPatcher"), ("memory_management", "aimdo_enabled")}
    assert set_here == (names if has_it else set())


@pytest.mark.full
def test_under_dynamic_vram_models_come_from_a_file_as_users_have_them(comfy: ModuleType, base_dir: Path) -> None:
    models = gpu("models")
    files, built = models.Models(torch.device("cpu"), True, from_files=True), models.Models(torch.device("cpu"), True)
    (loaded,), (made,) = files.together([("sd15", "fp16")]), built.together([("sd15", "fp16")])
    ours, theirs = (parts.model.model.diffusion_model.state_dict() for parts in (loaded, made))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    if hasattr(loaded.model, "cached_patcher_init"):
        assert loaded.model.cached_patcher_init is not None, "Compile Model loads it a second time"
    assert [path.name for path in base_dir.rglob("speedlab_gpu_*")] == ["speedlab_gpu_sd15_fp16.safetensors"]
    del loaded, ours
    files.together([("refiner", "fp16")])
    assert [path.name for path in base_dir.rglob("speedlab_gpu_*")] == ["speedlab_gpu_refiner_fp16.safetensors"]
    files.together([])
    assert not [*base_dir.rglob("speedlab_gpu_*")]


def test_under_dynamic_vram_no_smaller_gpu_is_claimed(engine: Any, bench: Any, monkeypatch: Any) -> None:
    plan, pictures = gpu("plan"), gpu("measure_models")
    monkeypatch.setattr(pictures, "dynamic_vram", lambda: True)
    pictures.run(bench, plan.Block("cap", "images", "", (plan.Variant("plan", "stock"),), apart=True, cap_gb=4.0))
    row = bench.journal.rows["cap/plan"]
    assert row["status"] == "unavailable" and "dynamic VRAM" in row["error"]


@pytest.mark.full
def test_a_plan_of_the_command_line_is_measured_beside_stock(comfy: ModuleType, tmp_path: Path) -> None:
    done = suite(tmp_path, "--try", "mine=deepcache(2)+tiny", "dynamic_cfg(0.5)", "--model", "sd15")
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = tmp_path.glob("*_gpu-small.json")
    document = json.loads(path.read_text())
    rows = {row["id"]: row for row in document["rows"]}
    names = ("stock", "mine", "dynamic_cfg(0.5)")
    assert [rows[f"try-sd15-fp16/{name}"]["status"] for name in names] == ["ok"] * 3 and len(rows) == 3
    assert rows["try-sd15-fp16/mine"]["plan"] == "deepcache(2)+tiny" and not document["complete"]
    assert all(rows[f"try-sd15-fp16/{name}"]["ratio"] > 0 for name in names)


@pytest.fixture
def bench(engine: Any, pack: ModuleType, tiny: SimpleNamespace, tmp_path: Path) -> Any:
    """The tools of a call, with a journal of its own."""
    journal = gpu("report").open_journal(
        tmp_path, [], {"device": "a GPU", "torch": "2.11.0"}, {}, small=True, again=False
    )
    tools = gpu("bench")
    return tools.Bench(pack, journal, tools.Settings(tmp_path, 60.0, 1, True), began=_now())


def _now() -> float:
    import time

    return time.monotonic()


def test_a_failing_measurement_is_a_row_and_the_next_block_runs(engine: Any, bench: Any, monkeypatch: Any) -> None:
    plan, runner = gpu("plan"), gpu("suite")
    ran: list[str] = []

    def breaks(tools: Any, block: Any) -> None:
        with tools.into_row(block, block.variants[0]):
            raise MemoryError("no room")
        raise ValueError("outside of any variant")

    monkeypatch.setitem(runner.RUNNERS, "breaks", breaks)
    monkeypatch.setitem(runner.RUNNERS, "works", lambda tools, block: ran.append(block.id))
    variants = (plan.Variant("first"), plan.Variant("second"))
    blocks = [plan.Block("one", "breaks", "", variants), plan.Block("two", "works", "", variants)]
    assert not runner.run(bench, blocks, lambda _text: None)
    rows = bench.journal.rows
    assert (rows["one/first"]["status"], rows["one/second"]["status"]) == ("oom", "error")
    assert rows["one/second"]["error"] == "ValueError: outside of any variant" and bench.journal.started == {}
    assert ran == ["two"]


def test_a_device_lost_outside_of_any_variant_does_not_come_again_for_ever(
    engine: Any, bench: Any, monkeypatch: Any
) -> None:
    plan, runner = gpu("plan"), gpu("suite")

    def breaks(tools: Any, block: Any) -> None:
        raise RuntimeError(
            "CUDA error: out of memory" if block.id == "full" else "CUDA error: unspecified launch failure"
        )

    monkeypatch.setitem(runner.RUNNERS, "breaks", breaks)
    variants = (plan.Variant("first"), plan.Variant("second"))
    assert runner.run(bench, [plan.Block("full", "breaks", "", variants)], lambda _text: None)
    assert {row["status"] for row in bench.journal.rows.values()} == {"oom"}
    lost = plan.Block("lost", "breaks", "", variants)
    with pytest.raises(gpu("bench").LostDeviceError):
        runner.run(bench, [lost], lambda _text: None)
    assert [variant.name for variant in bench.pending(lost)] == ["second"]


def test_a_row_inside_its_own_row_counts_as_one_start(engine: Any, bench: Any) -> None:
    plan = gpu("plan")
    block = plan.Block("one", "images", "", (plan.Variant("first"),))
    with bench.into_row(block, block.variants[0]):
        with bench.into_row(block, block.variants[0]):
            assert bench.journal.started == {"one/first": 1}
        assert bench.journal.started == {"one/first": 1}
    assert bench.journal.started == {}


def test_what_needs_another_allocator_is_left_to_another_process(engine: Any, bench: Any, monkeypatch: Any) -> None:
    plan, runner, tools = gpu("plan"), gpu("suite"), gpu("bench")
    ran: list[str] = []

    def works(bench: Any, block: Any) -> None:
        ran.append(block.id)
        bench.write(block, block.variants[0])

    monkeypatch.setitem(runner.RUNNERS, "works", works)
    variants = (plan.Variant("variant"),)
    blocks = [
        plan.Block("graphs", "works", "", variants, own_allocator=True), plan.Block("plain", "works", "", variants),
    ]  # fmt: skip
    chosen = ["cudaMallocAsync"]
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: chosen[0])
    monkeypatch.setattr(bench, "device", torch.device("cuda"))
    with pytest.raises(tools.OtherAllocatorError):
        runner.run(bench, blocks, lambda _text: None)
    assert ran == ["plain"]
    bench.journal.drop(["plain/variant"])
    chosen[0] = "native"
    monkeypatch.setattr(bench, "settings", replace(bench.settings, native=True))
    assert not runner.run(bench, blocks, lambda _text: None), "the other block belongs to a process as users have it"
    assert ran == ["plain", "graphs"]
    monkeypatch.setattr(bench, "settings", replace(bench.settings, native=False))
    assert runner.run(bench, blocks, lambda _text: None) and ran == ["plain", "graphs", "plain"]
    bench.journal.drop(["graphs/variant"])
    chosen[0] = "cudaMallocAsync"  # by the user's own settings, also where the suite asks for the other
    monkeypatch.setattr(bench, "settings", replace(bench.settings, native=True))
    assert runner.run(bench, blocks, lambda _text: None) and ran == ["plain", "graphs", "plain"]
    row = bench.journal.rows["graphs/variant"]
    assert row["status"] == "unavailable" and "--disable-cuda-malloc" in row["error"]


def test_a_block_that_is_never_done_in_time_is_given_up(engine: Any, bench: Any, monkeypatch: Any) -> None:
    plan, runner, tools = gpu("plan"), gpu("suite"), gpu("bench")

    def slow(bench: Any, block: Any) -> None:
        raise tools.OutOfTimeError("the time of this call is over")

    monkeypatch.setitem(runner.RUNNERS, "slow", slow)
    block = plan.Block("slow", "slow", "", (plan.Variant("variant"),))
    late = replace(block, id="late", needs_s=1e6)
    for _ in range(3):
        assert not runner.run(bench, [late], lambda _text: None) and bench.journal.started == {}, "it had no time"
    assert not runner.run(bench, [block], lambda _text: None) and bench.pending(block)
    assert runner.run(bench, [block], lambda _text: None)
    assert "no result in its time, twice" in bench.journal.rows["slow/variant"]["error"] and bench.journal.started == {}


@pytest.mark.full
@pytest.mark.parametrize(
    ("rounds", "kept", "end"),
    [
        (2, False, "OutOfTimeError"),
        (3, True, "LostDeviceError"),
    ],
)
def test_what_ends_between_rounds_keeps_what_is_enough(
    engine: Any, bench: Any, monkeypatch: Any, rounds: int, kept: bool, end: str
) -> None:
    plan, pictures, tools = gpu("plan"), gpu("measure_models"), gpu("bench")
    monkeypatch.setattr(bench, "settings", replace(bench.settings, repeats=5))
    left = iter([None] * (2 + 2 * rounds))

    def check_time() -> None:
        if next(left, "over") == "over":
            raise getattr(tools, end)("over")

    monkeypatch.setattr(bench, "check_time", check_time)
    block = plan.Block(
        "some", "images", "", (plan.Variant("stock"), plan.Variant("cached", "deepcache(2)")), dtype="fp32"
    )
    with pytest.raises(getattr(tools, end)):
        pictures.run(bench, block)
    rows = bench.journal.rows
    assert [rows[name]["n"] for name in rows] == ([rounds] * 2 if kept else [])
    if kept:
        assert rows["some/cached"]["ratio"] > 0


def test_a_lost_device_ends_the_process_with_its_row_written(engine: Any, bench: Any, monkeypatch: Any) -> None:
    plan, runner = gpu("plan"), gpu("suite")

    def breaks(tools: Any, block: Any) -> None:
        with tools.into_row(block, block.variants[0]):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(runner.RUNNERS, "breaks", breaks)
    block = plan.Block("one", "breaks", "", (plan.Variant("first"), plan.Variant("second")))
    with pytest.raises(gpu("bench").LostDeviceError):
        runner.run(bench, [block], lambda _text: None)
    assert bench.journal.rows["one/first"]["status"] == "error" and "one/second" not in bench.journal.rows


def test_a_capped_gpu_is_given_back(engine: Any, bench: Any) -> None:
    import comfy.model_management as mm

    pictures = gpu("measure_models")
    before = mm.EXTRA_RESERVED_VRAM
    with pytest.raises(KeyError), pictures._gpu_of(4.0, bench.device):
        raise KeyError
    assert before == mm.EXTRA_RESERVED_VRAM


@pytest.fixture
def measured(engine: Any, bench: Any, monkeypatch: Any) -> Any:
    """Measure variants on the tiny model; gives rows by name, with the runs that they are of."""
    plan, pictures = gpu("plan"), gpu("measure_models")
    monkeypatch.setattr(bench, "settings", replace(bench.settings, repeats=3))
    seen: dict[str, Any] = {}
    real = pictures.fields_of
    monkeypatch.setattr(
        pictures,
        "fields_of",
        lambda b, block, one, stock: seen.update({one.variant.name: one}) or real(b, block, one, stock),
    )

    def measure(**stacks: str) -> tuple[dict[str, Any], dict[str, Any]]:
        variants = tuple(plan.Variant(name, stack) for name, stack in stacks.items())
        with torch.inference_mode():
            pictures.run(bench, plan.Block("some", "images", "", variants, dtype="fp32"))
        return {name.partition("/")[2]: row for name, row in bench.journal.rows.items()}, seen

    return measure


@pytest.mark.full
def test_a_row_tells_the_figures_of_benchmarks_record(engine: Any, measured: Any) -> None:
    """Steps over the rate is the sampling time, phases add up to the image's time, and sampling ran under a trace."""
    rows, seen = measured(stock="stock", cached="deepcache(2)")
    for name, row in rows.items():
        assert row["status"] == "ok" and row["n"] == 3
        assert row["steps"] / row["it_per_s"] == pytest.approx(row["sampling_s"], rel=0.01)
        assert row["steps"] * row["step_time_s"] == pytest.approx(row["sampling_s"], rel=0.01)
        assert row["picture_min_s"] <= row["picture_s"] <= row["picture_max_s"]
        records = [run.record for (run,) in seen[name].repeats]
        assert all(len(record.steps) == row["steps"] for record in records)
        for sample, record in zip(row["samples"], records, strict=True):
            moved = sum(record.phases_ms[phase] for phase in ("to_device", "prepare")) / 1000.0
            parts = moved + sum(sample[phase] for phase in ("encode", "sampling", "decode"))
            assert parts == pytest.approx(sample["total"], abs=1e-4)
    assert rows["stock"]["ratio"] == 1.0 and rows["stock"]["relative_error"] == 0.0
    assert rows["cached"]["ratio"] == pytest.approx(rows["stock"]["picture_s"] / rows["cached"]["picture_s"], rel=0.01)
    assert rows["cached"]["relative_error"] > 0.0


@pytest.mark.full
def test_a_row_is_named_by_what_ran_and_says_why(engine: Any, measured: Any) -> None:
    asked = "deepcache(cache_interval=2,cache_branch_id=32)"
    row = measured(stock="stock", deep=asked)[0]["deep"]
    assert row["asked"] == asked != row["plan"] and "deepcache" in row["plan"] and "32" not in row["plan"]
    assert "cache_branch_id" in row["note"] or "branch" in row["note"]


@pytest.mark.full
def test_a_variant_that_fails_is_a_row_and_the_others_are_measured_with_their_weights_in_place(
    engine: Any, bench: Any, measured: Any, monkeypatch: Any
) -> None:
    made: list[str] = []
    tools = gpu("bench")
    real = tools.run_once

    def noted(prepared: Any, *args: Any) -> Any:
        made.append(prepared.settings.plan.partition("(")[0])
        if made[-1] == "dynamic_cfg" and made.count("dynamic_cfg") == 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(prepared, *args)

    monkeypatch.setattr(tools, "run_once", noted)
    rows, _ = measured(stock="stock", large="dynamic_cfg(0.5)", cached="deepcache(2)")
    assert {name: row["status"] for name, row in rows.items()} == {"stock": "ok", "large": "oom", "cached": "ok"}
    assert made == [
        *("stock", "dynamic_cfg", "deepcache"), *("stock", "dynamic_cfg", "deepcache", "deepcache"),
        *("deepcache", "stock"), *("deepcache", "stock"),
    ], "in turn, and one image more where the failure had taken the weights away"  # fmt: skip


@pytest.mark.parametrize(("peak", "share"), [(4.0, 50.0), (1.0, None)])
def test_a_share_is_never_above_the_peak(
    engine: Any, bench: Any, monkeypatch: Any, caplog: Any, peak: float, share: float | None
) -> None:
    plan, pictures = gpu("plan"), gpu("measure_models")
    block = plan.Block("some", "images", "", (plan.Variant("stock"),), dtype="fp32")
    known = {"flop_per_step": 1e12, "tflops": peak}
    monkeypatch.setattr(bench.journal, "value", lambda row, name: known[name])
    record = SimpleNamespace(summary={"step_time_ms": 500.0})
    told = pictures._rates(bench, block, plan.Variant("stock"), record)
    assert told == {"tflops": 2.0, "peak_share": share}
    assert ("above the measured peak" in caplog.text) == (share is None)


def test_nan_is_an_error_and_no_time(engine: Any, measured: Any, monkeypatch: Any) -> None:
    tools = gpu("bench")
    real = tools.run_once

    def bad(*args: Any) -> Any:
        run = real(*args)
        return replace(run, latent=run.latent * float("nan"))

    monkeypatch.setattr(tools, "run_once", bad)
    (row,) = measured(stock="stock")[0].values()
    assert row["status"] == "error" and "NaN" in row["error"] and "picture_s" not in row
