"""The virtual environment of a managed host: made with the running Python, checked by running its own."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .base import HostError, clean_python_environment, environment_python
from .progress import Reporter, run_logged


def identity() -> Mapping[str, str]:
    """What an environment made here is bound to."""
    return {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "system": platform.system(),
        "machine": platform.machine(),
    }


def make_environment(folder: Path, log: Path, reporter: Reporter, label: str, inherit: Sequence[int] = ()) -> None:
    """Make a virtual environment with pip, in place of what is there. Raises HostError with what to do."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise HostError(no_venv())
    if folder.exists():
        shutil.rmtree(folder)
    base = getattr(sys, "_base_executable", "") or sys.executable  # never the environment that is being replaced
    outcome = run_logged(
        [base, "-m", "venv", str(folder)],
        log=log,
        reporter=reporter,
        label=label,
        env=clean_python_environment(os.environ),
        pass_fds=inherit,
    )
    if "ensurepip" in outcome.text:
        raise HostError(no_venv())
    fault = environment_fault(folder)
    if outcome.code or fault:
        raise HostError(
            f"Could not make a virtual environment in {folder} with {base}: {outcome.text.strip() or fault}"
        )


def environment_fault(folder: Path) -> str:
    """What is wrong with an environment, "" where its Python runs, has pip and is of the version that runs here."""
    python = environment_python(folder)
    if not python.exists():
        return f"{python} is missing"
    command = [str(python), "-c", "import sys, pip; print('%d.%d' % sys.version_info[:2])"]
    env = clean_python_environment(os.environ)
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"its Python does not run ({error})"
    if answer.returncode != 0:
        return f"its Python does not run ({(answer.stderr.strip().splitlines() or ['no message'])[-1]})"
    wanted, found = identity()["python"], answer.stdout.strip()
    return "" if found == wanted else f"it has Python {found} instead of {wanted}"


def no_venv() -> str:
    """What to do where Python cannot make virtual environments."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return (
        f"{sys.executable} cannot make virtual environments: its ensurepip is missing. On Debian and Ubuntu run "
        f"`sudo apt install python{version}-venv`; elsewhere use a complete Python 3.10 or newer. Or pass your own "
        "ComfyUI with --comfyui."
    )
