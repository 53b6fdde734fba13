"""Fixtures of every tier. Nothing of ComfyUI is mocked: `comfy` is the real package, in this process, on the CPU."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
REAL_TAESD = ROOT.parent / "shared" / "models" / "vae_approx"
DEMO_CHECKPOINT = "speedlab_demo_sd15.safetensors"


def _load_package(name: str, folder: Path) -> ModuleType:
    """Load a folder as a package without putting its parent on sys.path, where `nodes/` would shadow ComfyUI's."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_load_package("speedlab", ROOT / "speedlab")
_load_package("speedlab_tools", ROOT / "speedlab_tools")

# How fast examples are drawn says what else the machine does, not whether the code is right.
hypothesis.settings.register_profile("speedlab", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("speedlab")


# Two processes take whole files in this order: what is long goes first, so that neither waits at the end.
_LONGEST_FIRST = ("onediff", "server", "browser", "comfy", "engine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _LONGEST_FIRST.index(item.path.parent.name))


def comfyui_path() -> Path:
    path = os.environ.get("SPEEDLAB_COMFYUI") or os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.fail("No ComfyUI to test against: run the tests with `python run.py test`, or set COMFYUI_PATH.")
    return Path(path)


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """Generated model files, kept between runs; every file is keyed by what it is made from."""
    root = Path(os.environ.get("SPEEDLAB_CACHE") or Path.home() / ".cache" / "speedlab")
    folder = root / "demo-models"  # those of `bench` and `demo`: 5 GB are written once
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's base directory for this process: empty models, input and output folders."""
    base = tmp_path_factory.mktemp("comfy-base")
    for kind in ("checkpoints", "loras", "vae", "vae_approx", "controlnet", "embeddings"):
        (base / "models" / kind).mkdir(parents=True)
    for name in ("input", "output", "temp", "user", "custom_nodes"):
        (base / name).mkdir()
    return base


def _keep_for_good() -> None:
    """Modules stay to the end. Without this each of the many collections walks through PyTorch's million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def comfy(base_dir: Path) -> ModuleType:
    """The real `comfy` package, imported once in this process."""
    if "comfy" not in sys.modules:
        sys.path.insert(0, str(comfyui_path()))
        cli_args = importlib.import_module("comfy.cli_args")
        import torch

        cli_args.args.cpu = not torch.cuda.is_available()
        cli_args.args.base_directory = str(base_dir)
    for name in ("comfy.sd", "comfy.sample", "comfy.utils", "folder_paths", "nodes"):
        importlib.import_module(name)
    _keep_for_good()
    return sys.modules["comfy"]


@pytest.fixture(scope="session")
def pack(comfy: ModuleType) -> ModuleType:
    """The pack under a package name of its own, as ComfyUI loads it."""
    from speedlab_tools.host.inprocess import load_pack

    return load_pack()


@pytest.fixture(scope="session")
def small_checkpoint(cache_dir: Path) -> Callable[[str], Path]:
    """The small checkpoint of a family: real layout, random weights. One process writes it, others wait."""
    synthetic = importlib.import_module("speedlab_tools.synthetic")

    def written(family: str) -> Path:
        path = cache_dir / "checkpoints" / f"speedlab_demo_{family}.safetensors"
        with FileLock(cache_dir / f"{family}.lock"):
            return synthetic.write_checkpoint(path, synthetic.CheckpointSpec(family=family, size="small"))

    return written


@pytest.fixture(scope="session")
def demo_checkpoint(small_checkpoint: Callable[[str], Path]) -> Path:
    return small_checkpoint("sd15")


@pytest.fixture(scope="session")
def vega_checkpoint(small_checkpoint: Callable[[str], Path]) -> Path:
    """The smallest layout of the SDXL family."""
    return small_checkpoint("vega")


@pytest.fixture(scope="session")
def taesd_files(cache_dir: Path) -> Path:
    """A folder with encoder and decoder of taesd and taesdxl: their layout, random weights."""
    synthetic = importlib.import_module("speedlab_tools.synthetic")
    folder = cache_dir / "vae_approx"
    with FileLock(cache_dir / "taesd.lock"):
        for name in ("taesd", "taesdxl"):
            synthetic.write_taesd(folder, name)
    return folder


@pytest.fixture
def real_taesd(model_files: Path, taesd_files: Path) -> Iterator[Path]:
    """The published TAESD weights in place of the made-up ones, for what only a real image shows."""
    if not REAL_TAESD.is_dir():
        pytest.skip(f"needs the published TAESD weights, which are not in {REAL_TAESD}")
    folder = model_files / "vae_approx"
    for file in REAL_TAESD.glob("*.safetensors"):
        (folder / file.name).unlink(missing_ok=True)
        link(file, folder)
    yield folder
    for file in REAL_TAESD.glob("*.safetensors"):
        (folder / file.name).unlink()
    for file in taesd_files.glob("*.safetensors"):
        link(file, folder)


def link(source: Path, folder: Path, name: str | None = None) -> Path:
    """Make a file appear in a models folder: a link where the system allows one, else a copy."""
    target = folder / (name or source.name)
    if not target.exists():
        try:
            target.symlink_to(source)
        except OSError:
            shutil.copy2(source, target)
    return target


@pytest.fixture(scope="session")
def model_files(base_dir: Path, demo_checkpoint: Path, taesd_files: Path) -> Path:
    """The models folder of this process, with the demo checkpoint and TAESD."""
    models = base_dir / "models"
    link(demo_checkpoint, models / "checkpoints", DEMO_CHECKPOINT)
    for file in taesd_files.glob("*.safetensors"):
        link(file, models / "vae_approx")
    return models


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine on which nothing was timed yet, and the folder that gets what is."""
    monkeypatch.setattr("speedlab.common.measured.folder", lambda: tmp_path / "measured")
    return tmp_path / "measured"
