"""The command line: arguments, wording of errors, model files, tables and progress."""

from __future__ import annotations

import csv
import io
import json
import struct
from pathlib import Path

import pytest

from speedlab.common.tables import format_table, seconds
from speedlab.measure.store import new_run_id
from speedlab_tools import __main__ as cli
from speedlab_tools import demo as cmd_demo
from speedlab_tools.bench.models import choose_models
from speedlab_tools.cli.arguments import parse
from speedlab_tools.client import errors, files
from speedlab_tools.client.events import Event, ProgressLine, progress_text
from speedlab_tools.scenarios.catalog import find
from speedlab_tools.scenarios.overrides import Overrides, adapt
from speedlab_tools.scenarios.scenario import STOCK


def safetensors(path, *, extra: int = 0, header: bytes | None = None):
    """A file with one tensor of four bytes; `extra` bytes too many or too few."""
    text = header or json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    data = struct.pack("<Q", len(text)) + text + b"\0" * max(4 + extra, 0)
    path.write_bytes(data)
    return path


OTHER = json.dumps({"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()


def test_a_whole_model_file_passes_also_through_dots(tmp_path):
    (tmp_path / "sub").mkdir()
    path = safetensors(tmp_path / "model.safetensors")
    assert files.check_model_file(f"{tmp_path}/sub/../model.safetensors") == path.resolve()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "there is no file"),
        (lambda p: p.mkdir(), "is a folder"),
        (lambda p: safetensors(p, extra=-2), "cut off or damaged: it has .* bytes instead of"),
        (lambda p: safetensors(p, extra=3), "cut off or damaged"),
        (lambda p: p.write_bytes(b"abc"), "header is not whole"),
        (lambda p: p.write_bytes(b"<!doctype html><html>" + b" " * 200), "web page"),
        (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" + b"x" * 90), "Git LFS"),
        (lambda p: safetensors(p, header=b"{not json"), "header is unreadable"),
        (lambda p: safetensors(p, header=b"[1, 2]"), "header is unreadable"),
        (lambda p: safetensors(p, header=b'{"__metadata__": {}}'), "holds no weights"),
    ],
)
def test_broken_model_files_are_named_before_a_server_starts(tmp_path, make, words):
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(errors.BenchError, match=words) as caught:
        files.check_model_file(path)
    assert str(path) in str(caught.value)


def test_pickles_and_foreign_endings(tmp_path):
    with pytest.raises(errors.BenchError, match=r"\.txt is no model file"):
        files.check_model_file(_written(tmp_path / "notes.txt", b"x"))
    with pytest.raises(errors.BenchError, match="only 3 bytes"):
        files.check_model_file(_written(tmp_path / "tiny.ckpt", b"abc"))
    with pytest.raises(errors.BenchError, match="archive has no end"):
        files.check_model_file(_written(tmp_path / "half.ckpt", b"PK\x03\x04" + b"\0" * 4096))
    files.check_model_file(_written(tmp_path / "old.ckpt", b"\x80\x02" + b"\0" * 4096))


def _written(path, data: bytes):
    path.write_bytes(data)
    return path


def test_what_is_a_path_and_what_a_name(tmp_path):
    path = safetensors(tmp_path / "model.safetensors")
    assert files.looks_like_path(str(path))
    assert files.looks_like_path("./missing.safetensors")
    assert files.looks_like_path("../up.safetensors")
    assert not files.looks_like_path("sd15/model.safetensors")


def test_models_are_linked_under_their_own_name_and_replaced(tmp_path):
    first, second = tmp_path / "one", tmp_path / "two"
    for folder, data in ((first, b"1"), (second, b"2")):
        folder.mkdir()
        (folder / "m.safetensors").write_bytes(data)
    for source in (first, second):
        assert files.link_model(source / "m.safetensors", tmp_path / "models") == "m.safetensors"
    assert (tmp_path / "models" / "m.safetensors").read_bytes() == b"2"


def test_a_link_of_a_downloader_keeps_its_ending(tmp_path):
    """Hugging Face's cache: snapshots/x/model.safetensors leads to blobs/<sha256>."""
    blob = tmp_path / "blobs" / ("0" * 64)
    blob.parent.mkdir()
    safetensors(blob)
    (tmp_path / "model.safetensors").symlink_to(blob)
    path = files.check_model_file(tmp_path / "model.safetensors")
    assert files.link_model(path, tmp_path / "models") == "model.safetensors"
    assert (tmp_path / "models" / "model.safetensors").read_bytes() == blob.read_bytes()


def test_two_files_of_one_name_are_refused(tmp_path):
    paths = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        paths.append(str(safetensors(tmp_path / name / "lora.safetensors", header=None if name == "one" else OTHER)))
    args = parse("bench", ["sd15-lora-stack", "--lora", paths[0], "--lora-2", paths[1]])[0]
    with pytest.raises(errors.BenchError, match="the same name") as caught:
        choose_models(args, [find("sd15-lora-stack")])
    assert paths[0] in str(caught.value) and paths[1] in str(caught.value)


@pytest.mark.parametrize("text", ["~nosuchuser/x.safetensors", "/" + "x" * 300 + ".safetensors"])
def test_a_path_that_cannot_be_is_told_in_words(text):
    assert files.looks_like_path(text)
    with pytest.raises(errors.BenchError, match="--checkpoint"):
        files.check_model_file(text)
    with pytest.raises(errors.BenchError, match="--out"):
        files.prepare_output(Path(text))


def test_an_output_folder_that_is_a_link_to_itself_is_named(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(errors.BenchError, match=r"--out: cannot write to .*loop"):
        files.prepare_output(tmp_path / "loop")


def test_an_unwritable_output_folder_is_named(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    with pytest.raises(errors.BenchError, match=r"--out: cannot write to .*file"):
        files.prepare_output(blocker / "out")
    assert files.prepare_output(tmp_path / "a" / "b").is_dir()


def test_pictures_never_replace_each_other(tmp_path):
    names = [files.save_image(tmp_path, "50 steps, 0.9", b"p").name for _ in range(3)]
    assert names == ["50 steps, 0.9.png", "50 steps, 0.9-1.png", "50 steps, 0.9-2.png"]


def test_overrides_change_the_settings_and_files():
    scenario = adapt(
        find("sdxl-tiny-vae"), Overrides(width=64, steps=2, seed=5, repeats=3), "mine.safetensors", {"vae": "v.pt"}
    )
    assert (scenario.settings.width, scenario.settings.height, scenario.settings.steps) == (64, 1024, 2)
    assert {prompt.seed for prompt in scenario.settings.prompts} == {5}
    api = scenario.graph().to_api()
    loader = next(node for node in api.values() if node["class_type"] == "SpeedLabCheckpointLoader")
    assert loader["inputs"]["ckpt_name"] == "mine.safetensors"
    plain = adapt(find("profile-nvtx"), Overrides(), None, {"vae": "v.pt"}).graph().to_api()
    vae = next(key for key, node in plain.items() if node["class_type"] == "SpeedLabVAELoader")
    assert next(n for n in plain.values() if n["class_type"] == "SpeedLabVAEDecode")["inputs"]["vae"] == [vae, 0]


@pytest.mark.parametrize(
    ("option", "value"),
    [("width", 100), ("height", 8), ("steps", 0), ("batch", 0), ("repeats", 0), ("warmup", -1), ("seed", 2**64)],
)
def test_settings_that_no_node_takes_are_refused(option, value):
    with pytest.raises(errors.BenchError, match=f"--{option} {value}"):
        Overrides(**{option: value}).check()


def test_unknown_scenarios_end_with_code_2(capsys):
    assert cli.main(["bench", "txt2img-defualt"]) == 2
    assert "Did you mean txt2img-default" in capsys.readouterr().err


def test_errors_end_with_code_1_and_one_line(capsys, tmp_path):
    code = cli.main(["bench", "txt2img-default", "--checkpoint", str(tmp_path / "no.ckpt"), "--out", str(tmp_path)])
    assert code == 1
    assert capsys.readouterr().err.startswith("error: --checkpoint: there is no file")
    assert cli.main(["demo", "--width", "100"]) == 1
    assert "multiples of 8" in capsys.readouterr().err


def test_a_file_is_no_checkpoint_for_a_server_of_someone_else(capsys, tmp_path):
    path = safetensors(tmp_path / "model.safetensors")
    command = ["bench", "txt2img-default", "--server", "http://127.0.0.1:9", "--checkpoint", str(path)]
    assert cli.main([*command, "--out", str(tmp_path)]) == 1
    assert "a name that the server knows" in capsys.readouterr().err


def test_a_server_that_does_not_answer_is_named(capsys, tmp_path):
    assert cli.main(["bench", "txt2img-default", "--server", "127.0.0.1:9", "--out", str(tmp_path)]) == 1
    assert "no answer from ComfyUI at http://127.0.0.1:9" in capsys.readouterr().err


def test_scenarios_lists_every_id(capsys):
    assert cli.main(["scenarios"]) == 0
    text = capsys.readouterr().out
    for name in ("txt2img-default", "profile-nvtx", "sdxl-tiny-vae", "models/checkpoints/sd_xl_base_1.0.safetensors"):
        assert name in text


def test_the_workflows_check_passes(capsys):
    assert cli.main(["workflows", "--check"]) == 0


ROW = {
    "plan": "stock", "max_vram_gb": "7.4", "time_s": "3.72", "step_time_s": "0.147", "batch": "1", "width": "512",
    "height": "512", "steps": "20", "cfg": "8", "peak_rss_gb": "2.5", "status": "ok",
}  # fmt: skip


def test_a_table_row_has_the_columns_of_the_article():
    header, rule, row = format_table([ROW]).splitlines()
    assert header.split("  ")[0] == "plan"
    assert [part for part in header.split("  ") if part.strip()][-1].strip() == "cfg"
    assert set(rule) == {"-", " "}
    assert row.split() == ["stock", "7.40", "GB", "3.72", "s", "0.147", "s", "1", "512x512", "20", "8"]


def test_without_vram_there_is_a_dash_and_the_ram():
    table = format_table([{**ROW, "max_vram_gb": ""}])
    assert "max RSS" in table
    assert table.splitlines()[-1].split()[1] == "-"
    assert table.endswith("2.50 GB")


def test_a_failed_run_shows_its_status():
    assert " oom " in format_table([{**ROW, "status": "oom", "time_s": ""}])


def test_a_long_name_of_a_plan_stands_under_the_table():
    stack = "+".join(f"technique_{number}(option=value,other=7)" for number in range(8))
    rows = [ROW, {**ROW, "plan": stack, "asked": "fast"}, {**ROW, "plan": stack}]
    lines = format_table(rows).splitlines()
    assert max(map(len, lines[:5])) < 130 and max(map(len, lines)) < 130
    assert lines[3].startswith("fast [1] ") and "technique_0" in lines[4] and "[2]" in lines[4]
    notes = " ".join(line.strip() for line in lines[5:]).replace(" + ", "+").replace("+ ", "+")
    assert notes == f"[1] fast was asked for; what ran is {stack} [2] {stack}"


def test_seconds_are_readable():
    assert [seconds(value) for value in (None, 0.1471, 3.72, 125.0)] == ["-", "0.147 s", "3.72 s", "2 min 5 s"]


def test_progress_text_tells_step_and_time_left():
    assert progress_text("x", 5, 20, 10.0) == "x  [######..................] step 5/20, 30 s left"
    assert "left" not in progress_text("x", 20, 20, 40.0)


def test_progress_in_a_file_is_a_few_lines():
    stream = io.StringIO()
    line = ProgressLine("run", {"4": {"class_type": "KSampler"}, "5": {"class_type": "VAEDecode"}}, stream)
    line(Event(0.0, "executing", "4"))
    for value in range(1, 21):
        line(Event(float(value), "progress", "4", value, 20))
    line(Event(21.0, "progress", "5", 1, 1))
    line.done()
    assert [text.split("step ")[1] for text in stream.getvalue().splitlines()] == [
        "1/20, 19 s left", "5/20, 15 s left", "10/20, 10 s left", "15/20, 5 s left", "20/20",
    ]  # fmt: skip


def test_rejections_are_put_into_words():
    graph = {"1": {"class_type": "CheckpointLoaderSimple", "_meta": {"title": "Load"}}}
    body = {
        "error": {"type": "prompt_outputs_failed_validation", "message": "Prompt outputs failed validation"},
        "node_errors": {
            "1": {
                "class_type": "CheckpointLoaderSimple",
                "errors": [
                    {
                        "type": "value_not_in_list",
                        "message": "Value not in list",
                        "details": "",
                        "extra_info": {
                            "input_name": "ckpt_name",
                            "input_config": [["a.ckpt", "b.ckpt"], {}],
                            "received_value": "c.ckpt",
                        },
                    },
                    {"type": "required_input_missing", "message": "Required input is missing", "details": "clip"},
                ],
            }
        },
    }
    lines = errors.describe_rejection(body, graph).splitlines()
    assert lines == [
        "the server refused the graph: Prompt outputs failed validation",
        "  node 1, Load (CheckpointLoaderSimple): 'c.ckpt' is no choice of 'ckpt_name'; the server has a.ckpt, b.ckpt",
        "  node 1, Load (CheckpointLoaderSimple): Required input is missing: clip",
    ]
    assert "no_such" in errors.describe_rejection({"error": {"message": "m", "details": "no_such"}}, {})
    assert "no reason given" in errors.describe_rejection({}, {})


def test_failures_name_node_title_and_reason():
    error = errors.failure_from_status(
        {"node_id": "4", "node_type": "KSampler", "exception_message": "too small\n", "traceback": ["a", "b"]},
        {"4": {"_meta": {"title": "My sampler"}}},
    )
    assert str(error) == "node 4, My sampler (KSampler), failed: too small"
    assert error.trace == "ab"


@pytest.mark.parametrize(
    ("stock", "best", "ratio", "rounds"),
    [
        ([6.0], [3.0], 2.0, "one round, which shows no spread"),
        ([6.0, 9.0], [3.0, 3.0], 2.0, "lower median of 2 rounds"),
        ([6.0, 9.0, 4.0], [3.0, 3.0, 1.6], 2.5, "median of 3 rounds"),
    ],
)
def test_the_demo_tells_the_median_round(make_record, tmp_path, capsys, stock, best, ratio, rounds):
    def runs(plan, totals):
        times = [seconds * 1000.0 for seconds in totals]
        made = [make_record(run_id=new_run_id(), phases_ms={"total": ms}, summary={"totals_ms": [ms]}) for ms in times]
        return [cmd_demo.DemoRun(plan, record, (tmp_path / f"{plan.name}.png",)) for record in made]

    found = cmd_demo.result_of(runs(STOCK, stock), runs(cmd_demo.PLANS[-1], best))
    assert found.ratio(found.runs[1]) == pytest.approx(ratio) and found.of_rounds == rounds
    cmd_demo.report(found, tmp_path)
    told = capsys.readouterr().out
    assert f"{ratio:.2f} times as fast as stock ({rounds})" in told and "was asked for" not in told
    with (tmp_path / "speedlab" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["time_s"]) / float(rows[1]["time_s"]) == pytest.approx(ratio), "the table says the same"
