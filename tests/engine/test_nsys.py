"""`run.py nsys` with a stand-in for nsys on the PATH: its arguments, its reports, and what happens without it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from speedlab_tools import nsys
from speedlab_tools.cli.main import main
from speedlab_tools.host import pack_root
from speedlab_tools.host.base import Host
from speedlab_tools.host.progress import Reporter

# Records its arguments, runs the command as nsys does, writes the report file, and prints summaries from it.
STAND_IN = """#!{python}
import json, os, pathlib, subprocess, sys
log = pathlib.Path(os.environ["NSYS_LOG"])
log.open("a").write(json.dumps([sys.argv[1:], os.environ.get("NSYS_NVTX_PROFILER_REGISTER_ONLY")]) + "\\n")
if sys.argv[1] == "stats":
    assert pathlib.Path(sys.argv[-1]).is_file()
    print("SUMMARY of", *[a for a in sys.argv if a.startswith("--report")])
    sys.exit(0)
options = []
arguments = sys.argv[2:]
while arguments and arguments[0].startswith("-"):
    options.append(arguments.pop(0))
code = subprocess.run(arguments, env={{**os.environ, "NSYS_PROFILING_SESSION_ID": "1"}}).returncode
output = next(o.split("=", 1)[1] for o in options if o.startswith("--output="))
if not os.environ.get("NSYS_NO_REPORT"):
    pathlib.Path(output + ".nsys-rep").write_text("report")
sys.exit(code)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """An `nsys` on the PATH and the calls that it recorded."""
    if sys.platform == "win32":
        pytest.skip("the stand-in is a script with a #! line")
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "nsys"
    script.write_text(STAND_IN.format(python=sys.executable))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    log = tmp_path / "calls"
    monkeypatch.setenv("NSYS_LOG", str(log))
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return lambda: [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture
def python(tmp_path):
    """A Python in whose place a script notes what it was asked to run, and ends with the code in BENCH_CODE."""
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\nimport json, os, pathlib, sys\n"
        f"pathlib.Path({str(tmp_path / 'bench')!r}).write_text(json.dumps([sys.argv[1:], os.getcwd(), "
        "os.environ.get('NSYS_PROFILING_SESSION_ID')]))\n"
        "sys.exit(int(os.environ.get('BENCH_CODE', '0')))\n"
    )
    script.chmod(0o755)
    return Host(tmp_path, script, False, "test")


def run(host, *arguments):
    return nsys.run(host, arguments, dict(os.environ), Reporter(sys.stdout))


def test_it_runs_the_benchmark_under_nsys_and_prints_both_summaries(stand_in, python, tmp_path, capfd):
    out = tmp_path / "results"
    assert run(python, "txt2img-default", "--steps", "3", "--out", str(out)) == 0
    (profile, register_only), (stats, _) = stand_in()
    report = next((out / "speedlab" / "nsys").glob("*.nsys-rep"))
    assert profile[:2] == ["profile", "--trace=cuda,nvtx"]
    for option in ("--capture-range=nvtx", "--nvtx-capture=sl/run@speedlab", f"--output={report.with_suffix('')}"):
        assert option in profile
    assert register_only == "0"
    command = profile[profile.index(str(python.python)) :]
    assert command[1:] == ["-m", "speedlab_tools", "bench", "txt2img-default", "--steps", "3", "--out", str(out)]
    assert stats == ["stats", "--report=nvtx_pushpop_sum", "--report=cuda_gpu_kern_sum", "--force-export=true",
                     str(report)]  # fmt: skip
    assert json.loads((tmp_path / "bench").read_text()) == [command[1:], str(pack_root()), "1"]
    text = capfd.readouterr().out
    assert "SUMMARY of --report=nvtx_pushpop_sum --report=cuda_gpu_kern_sum" in text
    assert f"report: {report}" in text


def test_whole_records_without_a_range(stand_in, python, tmp_path):
    assert run(python, "txt2img-default", "--whole", "--out", str(tmp_path)) == 0
    (profile, _), _ = stand_in()
    assert not any("capture" in argument for argument in profile)
    assert "--whole" not in profile


def test_a_failed_benchmark_still_prints_what_was_recorded(stand_in, python, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("BENCH_CODE", "3")
    assert run(python, "txt2img-default", "--out", str(tmp_path)) == 3
    assert "SUMMARY" in capfd.readouterr().out


def test_without_a_report_it_says_why(stand_in, python, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("NSYS_NO_REPORT", "1")
    assert run(python, "txt2img-default", "--out", str(tmp_path)) == 1
    assert "nothing was recorded" in capfd.readouterr().out
    assert len(stand_in()) == 1


def test_an_output_folder_in_the_way_is_named(stand_in, python, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(nsys.HostError, match="file"):
        run(python, "txt2img-default", "--out", str(tmp_path / "file"))


def test_without_nsys_it_says_what_to_install(tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path), "SPEEDLAB_CACHE": str(tmp_path / "cache")}
    answer = subprocess.run(
        [sys.executable, str(pack_root() / "run.py"), "--managed", "nsys", "txt2img-default"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert answer.returncode == 1
    assert "there is no 'nsys' on the PATH" in answer.stderr and "developer.nvidia.com" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not (tmp_path / "cache").exists(), "nothing is set up for a command that cannot run"


@pytest.mark.parametrize("arguments", [(), ("--whole",)])
def test_a_scenario_is_asked_for(arguments, capsys):
    assert main(["nsys", *arguments]) == 2
    assert "name a scenario" in capsys.readouterr().err


def test_help_needs_no_nsys(tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path), "SPEEDLAB_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, str(pack_root() / "run.py"), "nsys", "--help"]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0 and "--whole" in answer.stdout


def test_the_page_names_what_the_command_uses():
    from speedlab.measure.nvtx import NAMES

    page = (Path(pack_root()) / "docs" / "nsight.md").read_text(encoding="utf-8")
    for words in (*nsys.REPORTS, f"--nvtx-capture={nsys.CAPTURE}", "-t cuda,nvtx", *(f"`{name}`" for name in NAMES)):
        assert words in page
