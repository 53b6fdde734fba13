"""ComfyUI and this pack in the running process, on a Python that may lack what only servers and video need."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

from speedlab.common.errors import SpeedLabError

from . import dynamic_vram
from .base import pack_root

PACK_NAME = "speedlab_pack"
_ROOT = pack_root()
# What ComfyUI imports to run an image model, by module, with what to install for it.
NEEDED = {
    "torch": "torch", "numpy": "numpy", "PIL": "pillow", "safetensors": "safetensors", "transformers": "transformers",
    "einops": "einops", "scipy": "scipy", "psutil": "psutil", "yaml": "pyyaml", "tqdm": "tqdm", "torchsde": "torchsde",
    "torchvision": "torchvision", "filelock": "filelock",
}  # fmt: skip
NEEDED_SINCE_033 = {"comfy_aimdo": "comfy-aimdo", "comfy_kitchen": "comfy-kitchen"}
# What stands for a driver: NVIDIA's, that of Windows in its Linux, AMD's.
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
# Imported by ComfyUI for video and sound alone; binaries, so a carried wheel of it fits one Python only.
_UNUSED = ("av", "torchaudio")


class _Absent(ModuleType):
    """Stands for a package that is not installed and that nothing here uses: names can be imported, not called."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": self._refuse, "__module__": self.__name__})

    def _refuse(self, *_args: object, **_options: object) -> None:
        raise ImportError(f"{self.__name__} is not installed")


class _AbsentFinder:
    """Finds modules of absent packages. Stands behind all other finders."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name.partition(".")[0] not in self._names:
            return None
        return importlib.util.spec_from_loader(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: object) -> ModuleType:
        return _Absent(spec.name)  # type: ignore[attr-defined]

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def start(comfyui: Path, base: Path, wheels: Path | None = None, native_allocator: bool = False) -> ModuleType:
    """Import ComfyUI as `enter` does, and this pack, which is returned."""
    enter(comfyui, base, wheels, native_allocator=native_allocator)
    return load_pack()


def enter(
    comfyui: Path, base: Path, wheels: Path | None = None, *, native_allocator: bool = False, on_cpu: bool = False
) -> None:
    """Import ComfyUI with `base` as its base directory; without a GPU, or where `on_cpu` says so, it uses the CPU.

    `wheels` is a folder of unpacked packages that stands behind those installed. Torch must not be imported yet, so
    that ComfyUI can choose its allocator and switch on dynamic VRAM as its `main.py` does, unless `native_allocator`
    asks for PyTorch's own allocator. Raises SpeedLabError for packages that are missing.
    """
    for kind in ("checkpoints", "loras", "vae", "vae_approx", "controlnet", "embeddings"):
        (base / "models" / kind).mkdir(parents=True, exist_ok=True)
    for name in ("input", "output", "temp", "user", "custom_nodes"):
        (base / name).mkdir(exist_ok=True)
    # This pack's `nodes/` must not stand for ComfyUI's module of that name.
    kept = [part for part in sys.path if Path(part or ".").resolve() != _ROOT]
    sys.path[:] = [str(comfyui), *kept, *([str(wheels)] if wheels is not None else [])]
    _require_packages(comfyui)
    sys.meta_path.append(_AbsentFinder(tuple(n for n in _UNUSED if importlib.util.find_spec(n) is None)))  # type: ignore[arg-type]
    args = importlib.import_module("comfy.cli_args").args
    args.base_directory = str(base)
    is_first = "torch" not in sys.modules
    args.cpu = on_cpu or not _may_have_gpu()
    if is_first and not native_allocator and shutil.which("nvidia-smi") and importlib.util.find_spec("cuda_malloc"):
        importlib.import_module("cuda_malloc")
    pages = is_first and dynamic_vram.begin()
    import torch

    args.cpu = on_cpu or not torch.cuda.is_available()
    importlib.import_module("nodes")
    if pages and not args.cpu:
        dynamic_vram.finish()
    importlib.import_module("comfy.utils").set_progress_bar_enabled(False)


def _may_have_gpu() -> bool:
    """Whether a driver of a GPU is there: all that can be known before PyTorch is imported."""
    return bool(shutil.which("nvidia-smi")) or any(Path(path).exists() for path in _DRIVERS)


def _require_packages(comfyui: Path) -> None:
    listed = comfyui / "requirements.txt"
    asked = listed.read_text(encoding="utf-8") if listed.is_file() else ""
    needed = NEEDED | {module: package for module, package in NEEDED_SINCE_033.items() if package in asked}
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise SpeedLabError(
            f"{sys.executable} lacks {', '.join(missing)}. Install them. Where there is no network, make on another "
            "machine the folder that brings ComfyUI and its pure-Python packages (python run.py gpu --pack), and "
            "use a Python that has the others."
        )


class _EngineFinder:
    """Gives the pack the `speedlab` that is imported already, so that nodes and callers share one set of modules."""

    def __init__(self) -> None:
        self._specs: dict[str, object] = {}

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        head, _, engine = name.partition(".")
        if head != PACK_NAME or engine.partition(".")[0] not in ("speedlab", "speedlab_tools"):
            return None
        return importlib.util.spec_from_loader(name, self)  # type: ignore[arg-type]

    def create_module(self, spec: object) -> ModuleType:
        name: str = spec.name  # type: ignore[attr-defined]
        module = importlib.import_module(name.removeprefix(f"{PACK_NAME}."))
        self._specs[name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run already; the import system wrote another spec into it."""
        assert module.__spec__ is not None
        module.__spec__ = self._specs.pop(module.__spec__.name)  # type: ignore[assignment]


def load_pack() -> ModuleType:
    """The pack as a package of a name of its own, as ComfyUI loads it, without its folder on sys.path.

    Its engine is the `speedlab` of this process. ComfyUI must be importable.
    """
    if PACK_NAME in sys.modules:
        return sys.modules[PACK_NAME]
    sys.meta_path.insert(0, _EngineFinder())  # type: ignore[arg-type]
    return load_package(PACK_NAME, _ROOT)


def load_package(name: str, folder: Path) -> ModuleType:
    """A folder as a package of that name, without its parent on sys.path."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
