"""Files of a command: checking a checkpoint before a server starts, linking it, demo models, the output folder.

The ComfyUI that a command talks to: one it starts itself, or one that runs already (`--server`).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speedlab.common.errors import first_line

from ..drawn_files import CHECKPOINTS, TINY_VAES, beside
from ..host import ComfyServer, HostError, cache_root, from_environment, pack_root
from .errors import BenchError

ROOT = pack_root()
MODEL_SUFFIXES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin")
MAX_HEADER = 100_000_000
# Smallest layout of each family, so that a demo checkpoint is written in seconds.
DEMO_FAMILIES = {"sd15": "sd15", "sdxl": "vega", "refiner": "sdxl_refiner"}


def users_path(value: str | Path, option: str) -> Path:
    """A path as a user wrote it, with `~` for a home folder. Raises BenchError where that user is not known."""
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise BenchError(f"{option}: {value} names no home folder: {first_line(error)}") from error


def is_file(path: Path) -> bool:
    """Whether a file lies there, as far as this user may know; no name is an error."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def looks_like_path(value: str) -> bool:
    """Whether a --checkpoint or --vae value means a file of this machine rather than a name the server knows."""
    return value.startswith((".", "~")) or Path(value).is_absolute() or is_file(Path(value))


def check_model_file(value: str | Path, option: str = "--checkpoint") -> Path:
    """The absolute path of a model file that is whole, as far as its header tells; BenchError otherwise."""
    path = users_path(value, option)
    try:
        if not path.exists():
            raise BenchError(f"{option}: there is no file {path}")
        if path.is_dir():
            raise BenchError(f"{option}: {path} is a folder; name the model file in it")
        if path.suffix.lower() not in MODEL_SUFFIXES:
            raise BenchError(f"{option}: {path.name} is no model file: known endings are {', '.join(MODEL_SUFFIXES)}")
        if path.suffix.lower() in (".safetensors", ".sft"):
            _check_safetensors(path, option)
        elif path.stat().st_size < 1024:
            raise BenchError(f"{option}: {path} has only {path.stat().st_size} bytes: it is cut off or a placeholder")
        elif _is_cut_zip(path):
            raise BenchError(f"{option}: {path} is cut off: its archive has no end; copy or download it again")
    except OSError as error:
        raise BenchError(f"{option}: {path} cannot be read: {error.strerror or error}") from error
    # Not where a link leads to: downloaders keep files under names without an ending, and link to them.
    return path.parent.resolve() / path.name


def _is_cut_zip(path: Path) -> bool:
    """Whether a pickled checkpoint begins as the archive that torch writes but has lost that archive's end."""
    with path.open("rb") as file:
        begins = file.read(2) == b"PK"
    return begins and not zipfile.is_zipfile(path)


def _check_safetensors(path: Path, option: str) -> None:
    """The sizes that a safetensors header promises against the file's own."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            hint = " (it looks like a web page or a Git LFS pointer)" if start.lstrip()[:1] in (b"<", b"v") else ""
            raise BenchError(f"{option}: {path} is cut off or no safetensors file: its header is not whole{hint}")
        try:
            header = json.loads(file.read(length))
            ends = [_end_of(entry) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise BenchError(f"{option}: {path} is no safetensors file: its header is unreadable") from error
    if not ends:
        raise BenchError(f"{option}: {path} holds no weights")
    whole = 8 + length + max(ends)
    if size != whole:
        what = f"has {size} bytes instead of {whole}"
        raise BenchError(f"{option}: {path} is cut off or damaged: it {what}; copy or download it again")


def _end_of(entry: Any) -> int:
    """Where a tensor ends, counted from the end of the header. Raises TypeError, LookupError, ValueError."""
    start, end = entry["data_offsets"]
    if type(start) is not int or type(end) is not int or not 0 <= start <= end:
        raise ValueError("offsets are whole numbers in order")
    return end


def link_model(source: Path, folder: Path, name: str = "") -> str:
    """Make a model file appear in `folder`, under another name if one is given, by link, hard link or copy, whichever
    works first; returns its name."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / (name or source.name)
    if target.exists() or target.is_symlink():
        target.unlink()
    for make in (target.symlink_to, target.hardlink_to):
        with contextlib.suppress(OSError, NotImplementedError):
            make(source.resolve())
            return target.name
    shutil.copy2(source, target)
    return target.name


def _synthetic(*arguments: str) -> None:
    if "torch" in sys.modules:
        with contextlib.redirect_stdout(io.StringIO()):
            code = importlib.import_module("speedlab_tools.__main__").main(("synthetic", *arguments))
        if code != 0:
            raise BenchError(f"writing the demo model failed (exit code {code}); the reason stands above")
        return
    # A process of its own: it needs torch, whose memory this one would keep while the server is measured.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "speedlab_tools", "synthetic", *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        raise BenchError(f"writing the demo model failed (exit code {done.returncode}); the reason stands above")


def demo_checkpoint(family: str) -> Path:
    """The demo checkpoint of a scenario's family in the cache; written on first use."""
    layout = DEMO_FAMILIES[family]
    path = cache_root() / "demo-models" / "checkpoints" / f"speedlab_demo_{layout}.safetensors"
    _synthetic("checkpoint", str(path), "--family", layout, "--size", "small")
    return path


def demo_drawn(family: str = "sd15") -> list[Path]:
    """A model that draws in the cache, built on first use: its checkpoint, and its Tiny VAE's two files."""
    models = cache_root() / "demo-models" / "drawn"
    _synthetic("drawn", str(models), "--family", family)
    tiny = (models / "vae_approx" / f"{TINY_VAES[family]}_{part}.safetensors" for part in ("encoder", "decoder"))
    return [models / "checkpoints" / CHECKPOINTS[family], *tiny]


def demo_drawn_refiner(base: Path) -> Path:
    """SDXL's model that draws under a refiner's name: of two loaders with one name ComfyUI would run one."""
    return base.with_name(link_model(base, base.parent, beside(base.name, "refiner")))


def demo_drawn_vae(base: Path, name: str) -> Path:
    """The autoencoder of a model that draws, under the name that a scenario asks for. `base`: its checkpoint."""
    own = base.parents[1] / "vae" / beside(base.name, "vae")
    return own.with_name(link_model(own, own.parent, name))


def _tiny_name(family: str) -> str:
    return TINY_VAES.get(family, TINY_VAES["sdxl"])


def demo_tiny_vae(family: str) -> list[Path]:
    """A Tiny VAE with random weights for a family, in the cache: encoder and decoder."""
    name = _tiny_name(family)
    folder = cache_root() / "demo-models" / "vae_approx"
    _synthetic("taesd", str(folder), "--name", name)
    return [folder / f"{name}_{part}.safetensors" for part in ("encoder", "decoder")]


def demo_controlnet(size: str = "small") -> Path:
    """A ControlNet with random weights for the SD 1.5 demo checkpoint of that size, in the cache."""
    name = beside(CHECKPOINTS["sd15"], "controlnet") if size == "drawn" else "speedlab_demo_controlnet.safetensors"
    path = cache_root() / "demo-models" / "controlnet" / name
    _synthetic("controlnet", str(path), "--family", DEMO_FAMILIES["sd15"], "--size", size)
    return path


def demo_lora(family: str, kind: str, size: str = "small") -> Path:
    """A LoRA with random weights for the demo checkpoint of a family and size, in the cache; `kind`: lora or lora_2."""
    base = CHECKPOINTS[family] if size == "drawn" else f"speedlab_demo_{DEMO_FAMILIES[family]}.safetensors"
    path = cache_root() / "demo-models" / "loras" / beside(base, kind)
    seed = "1" if kind == "lora" else "2"
    _synthetic("lora", str(path), "--family", DEMO_FAMILIES[family], "--size", size, "--seed", seed)
    return path


def demo_vae(name: str) -> Path:
    """A VAE with random weights that is finite in fp16, in the cache under the name that a scenario asks for."""
    path = cache_root() / "demo-models" / "vae" / name
    _synthetic("vae", str(path))
    return path


def has_tiny_vae(family: str, folders: Iterable[Path]) -> bool:
    """Whether a Tiny VAE decoder that fits the family lies in `vae_approx` of one of the models folders."""
    pattern = f"{_tiny_name(family)}_decoder.*"
    return any(path.is_file() for folder in folders for path in (folder / "vae_approx").glob(pattern))


def prepare_output(folder: Path) -> Path:
    """Create the output folder and prove that it can be written; BenchError with the path otherwise."""
    try:
        folder = users_path(folder, "--out").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"speedlab")
    except (OSError, RuntimeError) as error:  # before Python 3.13 a link to itself is a RuntimeError
        reason = getattr(error, "strerror", None) or first_line(error)
        raise BenchError(f"--out: cannot write to {folder}: {reason}. Choose another folder with --out") from error
    return folder


def save_image(folder: Path, name: str, data: bytes) -> Path:
    """Write a fetched image as `<name>.png`, with a number where that is taken; returns its path."""
    stem, number = Path(name).name, 0
    path = folder / f"{stem}.png"
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.png"
    path.write_bytes(data)
    return path


@dataclass(frozen=True)
class ServerOptions:
    """How to reach a server: `url` of a running one, or `port` and `out` for one to start. None is a free port."""

    url: str | None
    port: int | None
    out: Path


@dataclass(frozen=True)
class Target:
    """A server that answers. `process` is the one started here, None where it runs already."""

    url: str
    process: ComfyServer | None = None

    @property
    def pid(self) -> int | None:
        """The process id of a server started here."""
        running = self.process.process if self.process is not None else None
        return None if running is None else running.pid

    def tail(self, lines: int = 15) -> str:
        """The end of the server's log, empty for a server of someone else."""
        return "" if self.process is None else "\n".join(self.process.tail(lines))


def kept_models() -> Path:
    """The models folder of `run.py serve`: what the user put there is seen here too."""
    return cache_root() / "serve" / "models"


def model_folders() -> list[Path]:
    """The models folders that a server started here looks into."""
    folders = [kept_models()]
    with contextlib.suppress(HostError):
        host = from_environment()
        if not host.managed:
            folders.append(host.comfyui / "models")
    return folders


@contextlib.contextmanager
def open_server(options: ServerOptions, models: Mapping[str, Sequence[Path]]) -> Iterator[Target]:
    """Yield a server that answers; one started here is stopped in the end.

    `models` are files to show to a started server: folder below `models/` -> files. HostError where none starts.
    """
    if options.url is not None:
        yield Target(options.url)
        return
    host = from_environment()
    # A base directory of its own for each run: two runs at once must not share a database or a list of model paths.
    with tempfile.TemporaryDirectory(prefix="speedlab-", ignore_cleanup_errors=True) as folder:
        base = Path(folder)
        for kind, files in models.items():
            for file in files:
                link_model(file, base / "models" / kind)
        print(f"Starting ComfyUI ({host.comfyui}) ...", flush=True)
        server = ComfyServer(
            host,
            pack=pack_root(),
            base=base,
            output=options.out,
            models=kept_models() if kept_models().is_dir() else None,
            port=options.port,
            log=options.out / "speedlab" / "server.log",
        )
        with server:
            if server.threads is not None:
                print(f"Threads: {server.threads.words}.", flush=True)
            yield Target(server.url, server)
