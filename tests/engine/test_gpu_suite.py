"""The GPU suite's plan, results file and report, and the process that starts it."""

from __future__ import annotations

import csv
import importlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from speedlab.common.errors import ResultsError
from speedlab.plans.axes import CellSettings
from speedlab.plans.plan_text import parse_stack
from speedlab_tools.cli.arguments import parse
from speedlab_tools.gpu import ALLOCATOR_VARIABLE, NATIVE, OTHER_ALLOCATOR, plan
from speedlab_tools.gpu import command as gpu
from speedlab_tools.gpu.report import COLUMNS, NOT_MEASURED, TARGETS, Journal, open_journal, text
from speedlab_tools.host import inprocess, pack_root
from speedlab_tools.host.base import Host, HostError
from speedlab_tools.host.progress import Reporter

ENV = {"device": "NVIDIA Test Card 80GB", "torch": "2.11.0+cu130", "comfyui": "0.3.75"}
SETTINGS = {"repeats": 5, "small": False}


def rows_of_the_plan() -> list[str]:
    return [block.row(variant) for block in plan.BLOCKS for variant in block.variants]


def test_rows_have_names_of_their_own_and_every_stack_can_be_read() -> None:
    rows = rows_of_the_plan()
    assert len(set(rows)) == len(rows)
    for block in (*plan.BLOCKS, *plan.small(plan.BLOCKS)):
        assert block.model in plan.WORKLOADS
        for variant in block.variants:
            parse_stack(variant.stack)


def test_every_target_is_of_a_row_that_the_plan_measures() -> None:
    rows = rows_of_the_plan()
    for target in TARGETS:
        assert target.row in rows and target.field in COLUMNS


def test_the_plan_holds_what_is_to_be_measured() -> None:
    by_id = {block.id: block for block in plan.BLOCKS}
    for name in ("sdxl-fp16", "sdxl-bf16"):
        assert [variant.name for variant in by_id[name].variants] == [
            "stock",
            "exact",
            "sdxl-fastest",
            "sdxl-fastest-deepcache",
        ]
        assert plan.WORKLOADS[by_id[name].model] == CellSettings(1024, 1024, steps=30, cfg=5.0)
    assert plan.WORKLOADS["sd15"].width == plan.WORKLOADS["sd15"].height == 512
    assert [by_id[f"cap-{gb}gb"].cap_gb for gb in (8, 6, 4)] == [8.0, 6.0, 4.0]
    assert {variant.prefetch for variant in by_id["offload"].variants} == {True, False}
    # Stock stands in every block of images that runs in turns, or there would be no ratio of the same minutes.
    for block in plan.BLOCKS:
        if block.runner == "images" and not block.apart:
            assert plan.STOCK in [variant.stack for variant in block.variants], block.id


def test_small_stacks_trace_and_keep_the_rest() -> None:
    exact = next(b for b in plan.small(plan.BLOCKS) if b.id == "sdxl-fp16").variants[1]
    assert exact.stack == "precision(memory_format=channels_last,cudnn_benchmark=on)+compile(jit_trace)"
    assert not any("inductor" in variant.stack for block in plan.small(plan.BLOCKS) for variant in block.variants)


def test_blocks_are_chosen_by_their_beginning() -> None:
    assert [block.id for block in plan.chosen(plan.BLOCKS, ["cap-", "peak"])] == [
        "peak",
        "cap-8gb",
        "cap-6gb",
        "cap-4gb",
    ]
    with pytest.raises(ValueError, match="'nope'"):
        plan.chosen(plan.BLOCKS, ["peak", "nope"])


def new_journal(folder: Path, again: bool = False, **env: str) -> Journal:
    return open_journal(folder, [], {**ENV, **env}, SETTINGS, small=False, again=again)


def test_each_row_is_on_disk_at_once_and_the_next_call_goes_on(tmp_path: Path) -> None:
    journal = new_journal(tmp_path)
    journal.write("a/stock", {"picture_s": 2.5, "samples": [{"total": 2.5}], "note": "x, y"})
    document = json.loads(journal.path.read_text())
    assert document["rows"][0]["samples"] == [{"total": 2.5}] and document["complete"] is False
    with journal.path.with_suffix(".csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert tuple(row) == COLUMNS
    assert (row["id"], row["picture_s"], row["note"], row["device"]) == ("a/stock", "2.5", "x, y", ENV["device"])
    again = new_journal(tmp_path)
    assert again.path == journal.path and again.value("a/stock", "picture_s") == 2.5
    assert new_journal(tmp_path, again=True).rows == {}
    assert new_journal(tmp_path, device="Other GPU").rows == {}
    assert new_journal(tmp_path, torch="2.12.0").rows == {}


def test_rows_with_and_without_dynamic_vram_stand_in_files_of_their_own(tmp_path: Path) -> None:
    plain = new_journal(tmp_path)
    plain.write("a/stock", {"picture_s": 2.5})
    paged = open_journal(tmp_path, [], {**ENV, "dynamic_vram": True}, SETTINGS, small=False, again=False)
    assert paged.rows == {}
    paged.write("a/stock", {"picture_s": 1.5})
    assert "_dynamic-vram_" in paged.path.name and paged.rows["a/stock"]["dynamic_vram"] is True
    assert "dynamic VRAM on" in text(paged, []) and "dynamic VRAM not there" in text(plain, [])
    assert new_journal(tmp_path).value("a/stock", "picture_s") == 2.5
    assert open_journal(
        tmp_path, [], {**ENV, "dynamic_vram": True}, SETTINGS, small=False, again=False
    ).value("a/stock", "picture_s") == 1.5  # fmt: skip


def test_earlier_results_elsewhere_go_on_in_the_new_folder(tmp_path: Path) -> None:
    new_journal(tmp_path / "old").write("a/stock", {"picture_s": 2.5})
    moved = open_journal(tmp_path / "new", [tmp_path / "old"], ENV, SETTINGS, small=False, again=False)
    moved.write("a/other", {})
    assert set(new_journal(tmp_path / "new").rows) == {"a/stock", "a/other"}
    assert set(new_journal(tmp_path / "old").rows) == {"a/stock"}


def test_what_ends_the_process_twice_is_given_up_and_what_was_left_in_order_is_not(tmp_path: Path) -> None:
    journal = new_journal(tmp_path)
    journal.begin("a/bad")
    journal.begin("a/good")
    journal.withdraw("a/good")
    journal = new_journal(tmp_path)
    journal.give_up()
    assert journal.rows == {}, "one end of the process may have been the caller's limit"
    journal.begin("a/bad")
    journal = new_journal(tmp_path)
    journal.give_up()
    assert journal.rows["a/bad"]["status"] == "died" and set(journal.rows) == {"a/bad"}
    assert journal.value("a/bad", "picture_s") is None


def test_a_block_that_no_call_is_long_enough_for_ends_with_the_second(tmp_path: Path) -> None:
    journal = new_journal(tmp_path)
    assert not journal.overran("compile-slow")
    again = new_journal(tmp_path)
    again.give_up()
    assert again.overran("compile-slow") and again.started == {} and again.rows == {}
    again.overran("compile-slow")
    again.progressed("compile-slow")
    again.overran("compile-slow")
    again.drop(["compile-slow/variant"])
    assert again.started == {}


def test_plans_that_record_cuda_graphs_are_known() -> None:
    own = {block.id for block in plan.BLOCKS if block.own_allocator}
    assert own == {"compile-reduce-overhead", "compile-cudagraphs", "compile-max-autotune"}
    assert not any(block.own_allocator for block in plan.small(plan.BLOCKS))
    assert plan.tried(["a=tiny", "b=compile(inductor,mode=max-autotune)"], "sdxl", "fp16").own_allocator
    assert not plan.tried(["compile(inductor,mode=max-autotune-no-cudagraphs)"], "sdxl", "fp16").own_allocator


def test_rows_are_measured_anew_where_asked_or_where_the_plan_is_another(tmp_path: Path) -> None:
    journal = new_journal(tmp_path)
    for name in ("a/stock", "a/stock-1", "a/stocks", "b/stock"):
        journal.write(name, {"plan": "stock"})
    journal.drop_others({"a/stock": "stock", "b/stock": "tiny", "c/none": "tiny"})
    assert set(journal.rows) == {"a/stock", "a/stock-1", "a/stocks"}
    journal.drop(["a/stock"])
    assert set(journal.rows) == {"a/stocks"}


def test_plans_of_the_command_line_stand_beside_stock() -> None:
    block = plan.tried(["mine=compile(inductor)+tiny", "deepcache(3)"], "sdxl", "bf16")
    assert [(variant.name, variant.stack) for variant in block.variants] == [
        ("stock", "stock"), ("mine", "compile(inductor)+tiny"), ("deepcache(3)", "deepcache(3)"),
    ]  # fmt: skip
    answer = gpu_command("--try", "mine=tiny(")
    assert answer.returncode == 1 and "parenthesis" in answer.stderr and "Traceback" not in answer.stderr


def gpu_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(pack_root() / "run.py"), "gpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("content", ["", "[]", '{"rows": 3}', '{"env": {}, "settings": {}, "rows": [7]}'])
def test_a_results_file_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    path = new_journal(tmp_path).path
    path.write_text(content)
    with pytest.raises(ResultsError, match=r"_gpu\.json holds no results"):
        new_journal(tmp_path)


def test_the_report_judges_what_was_measured_and_says_what_was_not(tmp_path: Path) -> None:
    journal = new_journal(tmp_path)
    journal.write("sdxl-fp16/sdxl-fastest", {"picture_s": 0.95, "ratio": 2.1})
    journal.write("peak/bf16", {"tflops": 700.0})
    journal.write("alone-exact/compile", {"status": "error", "error": "CompileError: no"})
    said = text(journal, plan.BLOCKS)
    lines = said.splitlines()
    assert any(
        line.startswith("sdxl-fastest, text to image") and "0.95 s" in line and "stretch too" in line for line in lines
    )
    assert any(line.startswith("sdxl-fastest over stock") and line.endswith("missed") for line in lines)
    assert sum(NOT_MEASURED in line for line in lines) == len(TARGETS) - 2 + 1
    assert "bf16 700.0 TFLOP/s" in said and f"fp16 {NOT_MEASURED}" in said
    assert "alone-exact/compile: error: CompileError: no" in said
    assert f"{len(rows_of_the_plan()) - 3} measurements are left" in said


def test_tiny_models_reach_no_target(tmp_path: Path) -> None:
    journal = open_journal(tmp_path, [], ENV, {"small": True}, small=True, again=False)
    journal.write("sdxl-fp16/sdxl-fastest", {"picture_s": 0.01, "ratio": 9.0})
    said = text(journal, plan.BLOCKS)
    assert "reached" not in said and journal.path.name.endswith("_gpu-small.json")


def test_a_package_for_video_may_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, inprocess._AbsentFinder(("absent_codec",))])
    try:
        module: Any = importlib.import_module("absent_codec.container")
        assert isinstance(module.InputContainer, type)
        with pytest.raises(ImportError, match=r"absent_codec\.container is not installed"):
            module.InputContainer()
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("absent_other")
    finally:
        for name in [name for name in sys.modules if name.startswith("absent_codec")]:
            del sys.modules[name]


def test_the_folder_for_offline_machines_takes_pure_wheels_alone(tmp_path: Path) -> None:
    source = tmp_path / "wheels"
    source.mkdir()
    with zipfile.ZipFile(source / "pure-1-py3-none-any.whl", "w") as archive:
        archive.writestr("pure/__init__.py", "VALUE = 3\n")
    gpu._unpack_wheels(source, tmp_path / "target")
    assert (tmp_path / "target" / "pure" / "__init__.py").is_file()
    (source / "fast-1-cp312-cp312-manylinux_2_17_x86_64.whl").write_bytes(b"")
    with pytest.raises(HostError, match="no pure-Python wheel"):
        gpu._unpack_wheels(source, tmp_path / "target")


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.png").write_bytes(b"")
    with pytest.raises(HostError, match="something else"):
        gpu.make_pack(tmp_path, Reporter())


@pytest.mark.parametrize(
    ("codes", "starts", "code"),
    [
        ([0], 1, 0),
        ([75, 139, 0], 3, 0),
        ([75, 3], 2, 3),
        ([130], 1, 130),
        ([143], 1, 143),
        ([75] * 6, 6, 1),
        ([75, 76, 75, 0], 4, 0),
        ([75] * 5 + [76, 0], 7, 0),
        ([76, 76], 2, 76),
    ],
)
def test_a_lost_device_is_gone_on_with_by_another_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, codes: list[int], starts: int, code: int
) -> None:
    commands: list[list[str]] = []
    allocators: list[str | None] = []

    def child(command: list[str], env: dict[str, str], **_: Any) -> int:
        commands.append(command)
        allocators.append(env.get(ALLOCATOR_VARIABLE))
        return codes[len(commands) - 1]

    monkeypatch.setattr(gpu, "run_child", child)
    monkeypatch.setattr(gpu, "_host", lambda *_: (Host(tmp_path, Path(sys.executable), False, "test"), None))
    assert gpu.run(["--again", "--minutes", "3", "--small"], None, False, False, Reporter()) == code
    assert len(commands) == starts
    # From the one on that asked for PyTorch's own allocator.
    asked = codes.index(OTHER_ALLOCATOR) + 1 if OTHER_ALLOCATOR in codes else starts
    assert allocators == [None] * asked + [NATIVE] * (starts - asked)
    assert "--again" in commands[0] and not any("--again" in command for command in commands[1:])
    given = [parse("gpu", command[3:])[0] for command in commands]
    assert all(0 < one.minutes <= 3 and one.small for one in given)


def test_help_and_the_list_need_no_torch_and_no_host(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-X", "importtime", str(pack_root() / "run.py"), "--managed", "gpu", *arguments]
        env = {"SPEEDLAB_CACHE": str(tmp_path / "cache")}
        return subprocess.run(command, capture_output=True, text=True, env=env)

    for arguments in (["--help"], ["--list"], ["--list", "--only", "cap-"]):
        answer = run(*arguments)
        assert answer.returncode == 0 and not (tmp_path / "cache").exists()
        assert "| torch" not in answer.stderr
    assert answer.stdout.count("a GPU of") == len(answer.stdout.splitlines()) == 3
    wrong = run("--only", "nope")
    assert wrong.returncode == 1 and "no block begins with 'nope'" in wrong.stderr
