"""The command line of run.py."""

from __future__ import annotations

import ast
import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from speedlab.measure.record import CSV_COLUMNS
from speedlab_tools.check import durations
from speedlab_tools.cli import main as cli
from speedlab_tools.cli.arguments import COMMANDS, parse
from speedlab_tools.cli.main import PYTEST, UsageError, pytest_arguments, run_child, take_apart
from speedlab_tools.host import pack_root
from speedlab_tools.host.progress import Reporter

RUN = pack_root() / "run.py"


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("COMFYUI_PATH", "SPEEDLAB_CACHE")}
    return subprocess.run([sys.executable, str(RUN), *arguments], capture_output=True, text=True, env={**clean, **env})


def test_without_arguments_it_lists_its_commands(tmp_path: Path) -> None:
    answer = run(SPEEDLAB_CACHE=str(tmp_path / "cache"))
    assert answer.returncode == 0 and answer.stderr == ""
    for name in COMMANDS:
        assert f"  {name} " in answer.stdout
    assert run("--help").stdout == run().stdout
    assert not (tmp_path / "cache").exists(), "help sets nothing up"


@pytest.mark.parametrize(
    ("command", "option"),
    [("bench", "--checkpoint"), ("serve", "--port"), ("test", "--all"), ("fleet", "--prompts"), ("stress", "--soak")],
)
def test_help_of_a_command_sets_nothing_up(tmp_path: Path, command: str, option: str) -> None:
    answer = run("--managed", command, "--help", SPEEDLAB_CACHE=str(tmp_path / "cache"))
    assert answer.returncode == 0 and option in answer.stdout and not (tmp_path / "cache").exists()


def test_arguments_are_checked_before_anything_is_set_up(tmp_path: Path) -> None:
    answer = run("--managed", "bench", "--steps", "many", "a", SPEEDLAB_CACHE=str(tmp_path / "cache"))
    assert answer.returncode == 2 and "--steps" in answer.stderr and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "txt2img-defualt"], "Did you mean txt2img-default"),
        (["bench", "txt2img-default", "nonsense"], "no scenario 'nonsense'"),
        (["fleet", "nonsense", "--cells", "--out", "x"], "no scenario 'nonsense'"),
        (["nsys", "nonsense"], "no scenario 'nonsense'"),
        (["demo", "--checkpoint", "./nowhere.safetensors"], "there is no file"),
        (["bench", "txt2img-default", "--vae", "./nowhere.safetensors"], "--vae: there is no file"),
    ],
)
def test_what_is_not_there_is_told_before_anything_is_set_up(tmp_path: Path, arguments: list[str], words: str) -> None:
    answer = run("--managed", *arguments, SPEEDLAB_CACHE=str(tmp_path / "cache"))
    assert answer.returncode in (1, 2) and words in answer.stderr and answer.stderr.startswith("run.py: ")
    assert not (tmp_path / "cache").exists()


def test_scenarios_and_compare_need_no_comfyui(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    answer = run("--managed", "scenarios", SPEEDLAB_CACHE=str(cache))
    assert answer.returncode == 0 and "txt2img-default" in answer.stdout
    table = tmp_path / "a.csv"
    row = {"plan": "stock", "time_s": "2.0", "run_id": "r", "status": "ok", "device": "CPU"}
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS)
        writer.writeheader()
        writer.writerow(dict.fromkeys(CSV_COLUMNS, "") | row)
    answer = run("--managed", "compare", str(table), str(table), SPEEDLAB_CACHE=str(cache))
    assert answer.returncode == 0 and "stock" in answer.stdout, answer.stderr
    assert not cache.exists()


def test_checks_run_in_the_python_that_has_their_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPEEDLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cli, "lacking", lambda *_args, **_options: {})
    assert cli._python_of_checks(Reporter()) == Path(sys.executable)
    monkeypatch.setattr(cli, "lacking", lambda *_args, **_options: {"ruff": "missing"})
    monkeypatch.setattr(cli.CheckEnvironment, "prepare", lambda self: self.root.mkdir(parents=True))
    assert cli._python_of_checks(Reporter()).is_relative_to(tmp_path / "cache" / "check")
    assert not (tmp_path / "cache" / "comfyui").exists()


def test_what_a_command_passes_on_keeps_its_order() -> None:
    options, rest = parse("test", ["tests/engine", "--all", "-k", "store", "-q", "-n", "0"])
    assert options.all and rest == ["tests/engine", "-k", "store", "-q", "-n", "0"]
    options, rest = parse("serve", ["--port", "1", "--lowvram", "--output-directory", "x"])
    assert options.port == 1 and rest == ["--lowvram", "--output-directory", "x"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["fly"], 2, "no command 'fly'"),
        (["bensh"], 2, "Did you mean bench?"),
        (["--comfyui"], 2, "takes the folder"),
        (["demo", "--managed", "--comfyui", "x"], 2, "exclude"),
        (["check", "spelling"], 2, "check has no spelling"),
        (["demo", "--comfyui", "no-such-folder"], 1, "does not exist"),
        (["--comfyui-version"], 2, "takes a release of ComfyUI"),
        (["--comfyui-version", "latest", "demo"], 2, "such as 0.33.0, or newest, not 'latest'"),
        (["--comfyui-version=0.33.0", "demo", "--comfyui", "x"], 2, "exclude"),
    ],
)
def test_mistakes_are_sentences(arguments: list[str], code: int, words: str) -> None:
    answer = run(*arguments)
    assert answer.returncode == code and words in answer.stderr
    assert answer.stderr.startswith("run.py: ") and "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "ignored"),
    [
        ([], True),
        (["--all"], False),
        (["tests/onediff"], False),
        (["tests/engine", "-q"], True),
        (["--all", "-q"], False),
    ],
)
def test_onediff_is_tested_only_where_asked_for(arguments: list[str], ignored: bool) -> None:
    """Its environment is 3 GB to fetch: no call fetches that by itself."""
    options, rest = parse("test", arguments)
    given = pytest_arguments(rest, everything=options.all)
    assert ("--ignore=tests/onediff" in given) is ignored and "--all" not in given
    assert [one for one in given if one != "--ignore=tests/onediff"] == [one for one in arguments if one != "--all"]


def test_a_wrong_comfyui_path_names_the_variable(tmp_path: Path) -> None:
    answer = run("test", COMFYUI_PATH=str(tmp_path))
    assert answer.returncode == 1 and f"COMFYUI_PATH names {tmp_path}" in answer.stderr


def test_arguments_of_a_command_pass_untouched() -> None:
    call = take_apart(
        ["--install", "bench", "txt2img-default", "--checkpoint", "a b", "--comfyui=/c", "-h", "--", "--managed"]
    )
    assert call.command == "bench" and call.comfyui == "/c" and call.install and not call.managed and not call.help
    assert call.arguments == ("txt2img-default", "--checkpoint", "a b", "-h", "--", "--managed")
    assert take_apart([]).help and take_apart(["-h", "demo"]).help
    with pytest.raises(UsageError):
        take_apart(["--comfyui"])


def test_an_old_python_gets_a_sentence() -> None:
    """Everything up to the version check must parse on Pythons that are long gone."""
    source = RUN.read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 4))
    assert "annotations" not in source


def test_the_exit_code_is_passed_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit(7)"]
    assert run_child(command, cwd=tmp_path, env=os.environ) == 7


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_child_too(tmp_path: Path, sign: signal.Signals, code: int) -> None:
    inner = "import pathlib,os,time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)"
    outer = (
        f"import os, sys, pathlib, signal; sys.path.insert(0, {str(pack_root())!r}); "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from speedlab_tools.check import run_child; "
        f"sys.exit(run_child([sys.executable, '-c', {inner!r}], cwd=pathlib.Path('.'), env=os.environ))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", outer], cwd=tmp_path, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    pid = tmp_path / "pid"
    while not pid.exists() or not pid.read_text():
        assert process.poll() is None
        signal.sigtimedwait([], 0.05) if hasattr(signal, "sigtimedwait") else None
    process.send_signal(sign)
    assert process.wait(30) == code
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_tests_do_not_see_our_nodes_folder_as_comfyuis(tmp_path: Path) -> None:
    test = tmp_path / "test_path.py"
    body = f"assert '' not in sys.path and {str(tmp_path)!r} not in sys.path"
    test.write_text(f"import sys\n\ndef test_it():\n    {body}\n")
    command = [sys.executable, "-c", PYTEST, "-q", "--import-mode=importlib", "-p", "no:cacheprovider", str(test)]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout


def test_ci_runs_the_two_commands() -> None:
    script = (pack_root() / ".ci" / "run").read_text(encoding="utf-8")
    assert "set -euo pipefail" in script and "run.py check" in script and "run.py test" in script
    if sys.platform != "win32":
        assert os.access(pack_root() / ".ci" / "run", os.X_OK)


def test_the_longest_tests_are_listed_and_files_added_up(tmp_path: Path) -> None:
    report = tmp_path / "results.xml"
    cases = [("tests.a", "short", 0.5), ("tests.b", "long", 4.0), ("tests.a", "other", 1.0)]
    lines = "".join(f'<testcase classname="{file}" name="{name}" time="{time}"/>' for file, name, time in cases)
    report.write_text(f"<testsuites><testsuite>{lines}</testsuite></testsuites>")
    told = [line.split() for line in durations(report, longest=2).splitlines()]
    assert told == [
        ["3", "tests,", "5.5", "s"], [], ["4.0", "tests.b", "long"], ["1.0", "tests.a", "other"], [],
        ["4.0", "tests.b"], ["1.5", "tests.a"],
    ]  # fmt: skip
