"""What a host is: a ComfyUI source tree and the Python that runs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from speedlab.common.errors import SpeedLabError

CACHE_VARIABLE = "SPEEDLAB_CACHE"
# Where the user called run.py from.
CALLED_FROM = "SPEEDLAB_CALLED_FROM"
COMFYUI_VARIABLE = "COMFYUI_PATH"


class HostError(SpeedLabError):
    """There is no usable ComfyUI here; the message says why and what to do."""


class ServerError(HostError):
    """A ComfyUI server did not start, or cannot; the message holds the end of its log where there is one."""


@dataclass(frozen=True)
class Host:
    """A ComfyUI (the folder with main.py) and the Python that runs it.

    `managed` says that this pack made both, in its cache folder; `origin` says in words where they come from.
    """

    comfyui: Path
    python: Path
    managed: bool
    origin: str

    @property
    def remedy(self) -> str:
        """What to do where a package of this host is damaged."""
        if self.managed:
            return f"If a package is damaged, delete {self.python.parents[1]} and run `python run.py setup`."
        return f"If a package is damaged, repair it with {self.python} -m pip, or use --managed."


def pack_root() -> Path:
    """The folder of this pack: the one that holds `__init__.py`, `nodes/` and `run.py`."""
    return Path(__file__).resolve().parents[2]


def pack_locations() -> tuple[Path, ...]:
    """Where this pack lies, as it was called and with links followed: a linked pack has two places."""
    called = Path(os.path.abspath(__file__)).parents[2]  # noqa: PTH100 - Path.resolve() would follow the links
    return tuple(dict.fromkeys((called, pack_root())))


def as_called(path: Path) -> Path:
    """A path of the command line, which is relative to where the user stands, as an absolute one."""
    return (Path(os.environ.get(CALLED_FROM) or Path.cwd()) / path.expanduser()).absolute()


def cache_root(env: Mapping[str, str] | None = None) -> Path:
    """The folder of everything this pack keeps outside its clone: SPEEDLAB_CACHE, else ~/.cache/speedlab."""
    chosen = (os.environ if env is None else env).get(CACHE_VARIABLE, "").strip()
    return Path(chosen).expanduser().absolute() if chosen else Path.home() / ".cache" / "speedlab"


def environment_python(folder: Path, windows: bool | None = None) -> Path:
    """The interpreter inside a virtual environment."""
    on_windows = sys.platform == "win32" if windows is None else windows
    return folder / "Scripts" / "python.exe" if on_windows else folder / "bin" / "python"


def is_comfyui(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfy").is_dir()


def child_environment(host: Host, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a command on this host: what it needs to find the host again, and a clean module path.

    This pack's root never stays on PYTHONPATH: its `nodes/` would shadow ComfyUI's module of that name.
    """
    result = dict(os.environ if env is None else env)
    isolated = clean_python_environment(result) if host.managed else result
    kept = [
        part
        for part in isolated.get("PYTHONPATH", "").split(os.pathsep)
        if part and Path(part).resolve() != pack_root()
    ]
    isolated.pop("PYTHONPATH", None)
    if kept:
        isolated["PYTHONPATH"] = os.pathsep.join(kept)
    isolated.update(
        SPEEDLAB_COMFYUI=str(host.comfyui),
        SPEEDLAB_PYTHON=str(host.python),
        SPEEDLAB_MANAGED="1" if host.managed else "0",
        SPEEDLAB_CACHE=str(cache_root(env)),
    )
    return isolated


def clean_python_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The environment without what would let another Python's packages leak into a virtual environment."""
    leaks = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "__PYVENV_LAUNCHER__")
    return {name: value for name, value in env.items() if name not in leaks}


def from_environment(env: Mapping[str, str] | None = None) -> Host:
    """The host that `run.py` chose, or the folder in COMFYUI_PATH with this Python. Raises HostError without either."""
    source = os.environ if env is None else env
    comfyui = source.get("SPEEDLAB_COMFYUI") or source.get(COMFYUI_VARIABLE)
    python = source.get("SPEEDLAB_PYTHON") or sys.executable
    if not comfyui:
        raise HostError(
            "No ComfyUI was chosen for this command. Start it through `python run.py`, or name a ComfyUI folder in "
            f"{COMFYUI_VARIABLE}."
        )
    managed = source.get("SPEEDLAB_MANAGED") == "1"
    return Host(Path(comfyui), Path(python), managed, "chosen by run.py")
