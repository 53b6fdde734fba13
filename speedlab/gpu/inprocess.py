"""ComfyUI and this pack in the running process, on a Python that may lack what only servers and video need."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

from ..errors import SpeedLabError
from .options import ALLOCATOR_VARIABLE, NATIVE

PACK_NAME = "speedlab_pack"
# What ComfyUI imports to run an image model, by module, with what to install for it.
NEEDED = {
    "torch": "torch", "numpy": "numpy", "PIL": "pillow", "safetensors": "safetensors", "transformers": "transformers",
    "einops": "einops", "scipy": "scipy", "psutil": "psutil", "yaml": "pyyaml", "tqdm": "tqdm", "torchsde": "torchsde",
    "torchvision": "torchvision", "filelock": "filelock",
}  # fmt: skip
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


def start(comfyui: Path, base: Path, wheels: Path | None = None) -> ModuleType:
    """Import ComfyUI with `base` as its base directory, and this pack, which is returned.

    `wheels` is a folder of unpacked packages that stands behind those installed. Torch must not be imported yet, so
    that ComfyUI can choose its allocator as its `main.py` does, unless PyTorch's own is asked for. Raises
    SpeedLabError for packages that are missing.
    """
    root = Path(__file__).resolve().parents[2]
    for kind in ("checkpoints", "loras", "vae", "vae_approx"):
        (base / "models" / kind).mkdir(parents=True, exist_ok=True)
    for name in ("input", "output", "temp", "user"):
        (base / name).mkdir(exist_ok=True)
    # This pack's `nodes/` must not stand for ComfyUI's module of that name.
    kept = [part for part in sys.path if Path(part or ".").resolve() != root]
    sys.path[:] = [str(comfyui), *kept, *([str(wheels)] if wheels is not None else [])]
    _require_packages()
    sys.meta_path.append(_AbsentFinder(tuple(n for n in _UNUSED if importlib.util.find_spec(n) is None)))  # type: ignore[arg-type]
    args = importlib.import_module("comfy.cli_args").args
    args.base_directory = str(base)
    native = os.environ.get(ALLOCATOR_VARIABLE) == NATIVE
    if (
        not native
        and "torch" not in sys.modules
        and shutil.which("nvidia-smi")
        and importlib.util.find_spec("cuda_malloc")
    ):
        importlib.import_module("cuda_malloc")
    import torch

    args.cpu = not torch.cuda.is_available()
    importlib.import_module("nodes")
    importlib.import_module("comfy.utils").set_progress_bar_enabled(False)
    return _load_package(PACK_NAME, root)


def _require_packages() -> None:
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise SpeedLabError(
            f"{sys.executable} lacks {', '.join(missing)}. Install them. Where there is no network, make on another "
            "machine the folder that brings ComfyUI and its pure-Python packages (python run.py gpu --pack), and "
            "use a Python that has the others."
        )


def _load_package(name: str, folder: Path) -> ModuleType:
    """A folder as a package of that name, without its parent on sys.path."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
