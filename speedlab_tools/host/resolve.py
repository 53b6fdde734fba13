"""Which ComfyUI to use: the one asked for, the one this pack lies in, else a managed one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .base import COMFYUI_VARIABLE, Host, HostError, cache_root, is_comfyui, pack_locations, pack_root
from .managed import ManagedHost, ManagedSpec
from .packages import quoted, requirement_lines
from .progress import Reporter
from .release import version_of

# Runs in the other interpreter, which reads versions and markers with `packaging` or the copy of it inside pip.
_SCRIPT = """
import importlib.metadata, json, sys
try:
    from packaging.requirements import Requirement
except ImportError:
    try:
        from pip._vendor.packaging.requirements import Requirement
    except ImportError:
        sys.exit("it has neither pip nor packaging, install one of them")
lines, strict = json.load(sys.stdin)
lacks = {}
for line in lines:
    wanted = Requirement(line)
    if wanted.marker and not wanted.marker.evaluate():
        continue
    try:
        have = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        have = None
    if not have:
        lacks[line] = "missing"
    elif strict and not wanted.specifier.contains(have, prereleases=True):
        lacks[line] = "has " + have
json.dump(lacks, sys.stdout)
"""


def lacking(python: Path, requirements: Sequence[str], *, strict: bool) -> dict[str, str]:
    """The requirements that `python` does not meet, each with "missing" or "has VERSION".

    `strict` compares versions too, not only names. Raises HostError where the interpreter does not answer.
    """
    asked = json.dumps([list(requirements), strict])
    try:
        answer = subprocess.run([str(python), "-c", _SCRIPT], input=asked, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"{python} does not run ({error}).") from error
    if answer.returncode != 0:
        last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        raise HostError(f"{python} could not say which packages it has: {last}")
    lacks: dict[str, str] = json.loads(answer.stdout)
    return lacks


def own_interpreter(comfyui: Path) -> Path | None:
    """The interpreter that a ComfyUI brings along: a venv in its folder, or the portable Windows build's."""
    scripts = ("venv/bin/python", ".venv/bin/python", "venv/Scripts/python.exe", ".venv/Scripts/python.exe")
    candidates = [*(comfyui / script for script in scripts), comfyui.parent / "python_embeded" / "python.exe"]
    return next((path for path in candidates if path.exists()), None)


def resolve(
    comfyui: str | None = None,
    want_dev: bool = False,
    *,
    install: bool = False,
    managed: bool = False,
    version: str | None = None,
    env: Mapping[str, str] | None = None,
    python: Path | None = None,
    locations: Sequence[Path] | None = None,
    spec: ManagedSpec | None = None,
    reporter: Reporter | None = None,
) -> Host:
    """The host to use, ready to run.

    In this order: `comfyui` (a path); COMFYUI_PATH; the ComfyUI whose custom_nodes holds this pack; a managed one,
    which is set up here. The first three run on `python` (default: the running interpreter) and nothing is installed
    there unless `install` is set; `managed` skips all three, and so does `version`, which asks for a managed one of
    that release of ComfyUI, or of its newest. `want_dev` asks for what tests and checks need as well.
    Raises HostError: not a ComfyUI, packages missing (with the command that installs them), a set-up that failed.
    """
    source = os.environ if env is None else env
    say = Reporter() if reporter is None else reporter
    own = not managed and version is None
    chosen = choose(comfyui, source, pack_locations() if locations is None else locations) if own else None
    if chosen is None:
        number = None if version is None else version_of(version)
        return ManagedHost(cache_root(source), spec=spec, reporter=say, want_dev=want_dev, version=number).ensure()
    path, origin = chosen
    host = Host(path, Path(sys.executable) if python is None else python, False, origin)
    _require_packages(host, want_dev, install, say)
    return host


def ready(comfyui: str | None, managed: bool, env: Mapping[str, str] | None = None) -> Host | None:
    """The host that `resolve` would give, where nothing has to be set up for it. Raises HostError as `choose`."""
    source = os.environ if env is None else env
    chosen = None if managed else choose(comfyui, source, pack_locations())
    if chosen is not None:
        return Host(chosen[0], Path(sys.executable), False, chosen[1])
    kept = ManagedHost(cache_root(source))
    return None if kept.missing() else kept.host()


def choose(comfyui: str | None, env: Mapping[str, str], locations: Sequence[Path]) -> tuple[Path, str] | None:
    """The user's own ComfyUI and where it was named, None for a managed one. Raises HostError for a wrong path."""
    for given, origin in ((comfyui, "--comfyui"), (env.get(COMFYUI_VARIABLE), COMFYUI_VARIABLE)):
        if given is not None and (given.strip() or origin == "--comfyui"):
            return _checked(given, origin), f"from {origin}"
    for location in locations:
        if location.parent.name == "custom_nodes" and is_comfyui(location.parent.parent):
            return location.parent.parent, "the one whose custom_nodes holds this pack"
    return None


def _checked(given: str, origin: str) -> Path:
    if not given.strip():
        raise HostError(f"{origin} is empty; it takes the folder of a ComfyUI, the one with main.py.")
    path = Path(given).expanduser().absolute()
    if is_comfyui(path):
        return path
    if not path.exists():
        raise HostError(f"{origin} names {path}, which does not exist.")
    inner = next((path / name for name in ("ComfyUI", "comfyui") if is_comfyui(path / name)), None)
    hint = f" Did you mean {inner}?" if inner else ""
    raise HostError(f"{origin} names {path}, which is no ComfyUI: it has no main.py beside a comfy folder.{hint}")


def _require_packages(host: Host, want_dev: bool, install: bool, reporter: Reporter) -> None:
    lacks = _lacks(host, want_dev)
    if not lacks:
        return
    command = [str(host.python), "-m", "pip", "install", *lacks]
    if not install:
        raise HostError(_missing_text(host, lacks, command))
    reporter.line(f"Installing {len(lacks)} packages, as --install says: {quoted(command)}")
    if subprocess.run(command).returncode != 0:
        raise HostError(f"That command failed; pip says why above: {quoted(command)}")
    left = _lacks(host, want_dev)
    if left:
        raise HostError(f"{host.python} still lacks {_in_words(left)}. Install them by hand.")


def _lacks(host: Host, want_dev: bool) -> dict[str, str]:
    own = [pack_root() / "requirements.txt", *([pack_root() / "requirements-dev.txt"] if want_dev else [])]
    theirs = host.comfyui / "requirements.txt"
    # Versions of ComfyUI's own packages are the user's business: a newer frontend, say, is no fault.
    lines = requirement_lines(theirs.read_text(encoding="utf-8")) if theirs.is_file() else ["torch"]
    lacks = lacking(host.python, lines, strict=False)
    for path in own:
        lacks |= lacking(host.python, requirement_lines(path.read_text(encoding="utf-8")), strict=True)
    return lacks


def _in_words(lacks: Mapping[str, str]) -> str:
    return ", ".join(f"{requirement} ({state})" for requirement, state in lacks.items())


def _missing_text(host: Host, lacks: Mapping[str, str], command: Sequence[str]) -> str:
    text = [f"{host.python} cannot run ComfyUI at {host.comfyui} ({host.origin}): it lacks {_in_words(lacks)}."]
    other = own_interpreter(host.comfyui)
    # Not resolved: the python of every environment links to the same base.
    if other is not None and os.path.normcase(other.absolute()) != os.path.normcase(host.python.absolute()):
        command_there = quoted([str(other), str(pack_root() / "run.py"), *sys.argv[1:]])
        text.append(f"That ComfyUI has an interpreter of its own; with it: {command_there}")
    text.append(f"Install them yourself:  {quoted(command)}")
    text.append("or let this command do it: add --install")
    text.append("or use a ComfyUI of this pack's own, apart from yours: add --managed")
    return "\n  ".join(text)
