"""Compile Model with OneDiff and nexfort on ComfyUI's real UNet, in a Python that has them.

usage: nexfort_child.py PACK COMFYUI BASE ANSWER, where ANSWER gets what it saw as JSON
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

SIZES = ((8, 8), (16, 8))
STEPS = 2


class Messages(logging.Handler):
    """The pack's sentences, kept."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    def taken(self) -> list[str]:
        said, self.said = self.said, []
        return said


def load_package(name: str, folder: Path) -> None:
    """Load a package whose parent folder is not on sys.path."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def load_file(name: str, path: Path) -> ModuleType:
    """Load a file as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def relative(a: Any, b: Any) -> float:
    """Largest difference, relative to the largest value of `b`."""
    return float((a - b).abs().max() / b.abs().max())


@contextmanager
def forwards_of(network: Any) -> Iterator[list[int]]:
    """How often the network's own Python forward runs inside."""
    count, code = [0], type(network)._forward.__code__

    def see(frame: FrameType, event: str, _argument: Any) -> None:
        if event == "call" and frame.f_code is code:
            count[0] += 1

    sys.setprofile(see)
    try:
        yield count
    finally:
        sys.setprofile(None)


class Child:
    """A model with a UNet of few blocks, for each is compiled four times, and what is asked of it."""

    def __init__(self, comfy: ModuleType) -> None:
        self.comfy = comfy
        self.compile = importlib.import_module("speedlab.techniques.compile.attach")
        self.tiny = load_file("tiny_unet", Path(__file__).parents[1] / "comfy" / "tiny_unet.py").build("slim")
        self.model, self.network = self.tiny.model, self.tiny.unet
        self.messages = Messages()
        logging.getLogger("speedlab").addHandler(self.messages)
        logging.getLogger("speedlab").setLevel(logging.INFO)

    def config(self, **settings: Any) -> Any:
        return self.compile.CompileConfig("onediff_nexfort", **settings)

    def sample(self, model: Any, size: tuple[int, int], **options: Any) -> Any:
        return self.tiny.sample(model, steps=STEPS, size=size, **options)

    def left_behind(self) -> list[str]:
        """Attributes that a run has left in the network's parts."""
        return [name for part in self.network.modules() for name in ("forward", "_forward") if name in vars(part)]

    def compared(self, compiled: Any, plain: Any, size: tuple[int, int]) -> dict[str, Any]:
        """One run compiled, twice, against one that is not."""
        eager = self.sample(plain, size)
        self.messages.taken()
        begun = time.monotonic()
        first = self.sample(compiled, size)
        seconds = time.monotonic() - begun
        said = self.messages.taken()
        with forwards_of(self.network) as python:
            again = self.sample(compiled, size)
        with forwards_of(self.network) as of_eager:
            self.sample(plain, size)
        return {
            "size": size,
            "error": max(relative(first, eager), relative(again, eager)),
            "compiled": programs_in(said),
            "compiled_again": programs_in(self.messages.taken()),
            "python_forwards": python[0],
            "python_forwards_eager": of_eager[0],
            "first_s": round(seconds, 1),
            "left": self.left_behind(),
        }

    def under_a_lora(self, compiled: Any) -> dict[str, Any]:
        weights = lora_of(self.network)
        plain = self.comfy.sd.load_lora_for_models(self.model, None, weights, 1.0, 0.0)[0]
        with_lora = self.comfy.sd.load_lora_for_models(compiled, None, weights, 1.0, 0.0)[0]
        without = self.sample(self.model, SIZES[0])
        seen = self.compared(with_lora, plain, SIZES[0])
        seen["effect"] = relative(self.sample(plain, SIZES[0]), without)
        seen["after"] = relative(self.sample(compiled, SIZES[0]), without)
        return seen

    def kept(self) -> int:
        """Networks in the form that is compiled which are still alive: one for each program that is kept."""
        kind = importlib.import_module("speedlab.techniques.compile.program").PureNetwork
        gc.collect()
        return sum(isinstance(thing, kind) for thing in gc.get_objects())

    def cancelled(self, compiled: Any) -> dict[str, Any]:
        """A cancel in the middle of a compiled run."""
        stop = self.comfy.model_management.InterruptProcessingException
        before = {name: id(part) for name, part in self.network.named_parameters()}

        def callback(step: int, *_rest: Any) -> None:
            raise stop()

        raised = False
        try:
            self.sample(compiled, SIZES[0], callback=callback)
        except stop:
            raised = True
        same = before == {name: id(part) for name, part in self.network.named_parameters()}
        return {"raised": raised, "left": self.left_behind(), "same_weights": same}

    def refused(self) -> dict[str, str]:
        """The messages of what must be refused."""
        import torch

        from speedlab.techniques.compile.backends import CompileOptions, onediff, onediff_nexfort

        class Broken(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                raise RuntimeError("this layer is broken")

        options = CompileOptions(example=(torch.zeros(1, 4, 8, 8),))
        return {
            "freeze_weights": message(
                lambda: self.compile.attach_compile(self.model, self.config(freeze_weights=True))
            ),
            "freezing": message(lambda: onediff.checked_mode("jit:freezing")),
            "inductor_freezing": message(lambda: onediff.checked_mode("O2:inductor-freezing")),
            "unknown": message(lambda: onediff.checked_mode("jit:faster")),
            "broken": message(lambda: onediff_nexfort.compile(Broken(), options)),
        }


def lora_of(network: Any) -> dict[str, Any]:
    """A LoRA for all attention, of rank 2."""
    import torch

    generator, state = torch.Generator().manual_seed(3), {}
    for name, weight in network.state_dict().items():
        if name.endswith(("attn1.to_q.weight", "attn2.to_v.weight")):
            key, size = "lora_unet_" + name.removesuffix(".weight").replace(".", "_"), weight.shape[1]
            state[f"{key}.lora_up.weight"] = 0.3 * torch.randn(weight.shape[0], 2, generator=generator)
            state[f"{key}.lora_down.weight"] = size**-0.5 * torch.randn(2, size, generator=generator)
    return state


def programs_in(said: list[str]) -> int:
    """How many programs the record was told of."""
    return sum(text.startswith("SpeedLab: Compile: onediff_nexfort compiled the network") for text in said)


def message(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return str(error)
    return ""


def modes() -> dict[str, Any]:
    """nexfort's own words against those that the adapter lets pass, and what its freezing does to changed weights."""
    import nexfort.fx_compiler.mode as own
    import torch
    from onediff.infer_compiler import compile as onediff_compile

    from speedlab.techniques.compile.backends import MODES, onediff, onediff_nexfort

    rejected = []
    for word in onediff.MODE_WORDS:
        try:
            own.list_mode_options(word)
        except ValueError:
            rejected.append(word)
    for device in ("cpu", "cuda"):
        for mode in MODES:
            own.list_mode_options(onediff_nexfort.nexfort_mode(mode, torch.device(device)))

    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (2.0 * self.weight)

    def follows(mode: str) -> bool:
        layer, x = Doubled(4, 4).eval(), torch.ones(1, 4)
        compiled = onediff_compile(layer, backend="nexfort", options={"mode": mode, "dynamic": False})
        compiled(x)
        layer.weight.mul_(3.0)
        return torch.allclose(compiled(x), layer(x))

    known = {*own._mode_options, *own._O2_mode_options, *own._O3_mode_options}
    return {
        "rejected": rejected,
        "not_known_here": sorted(known - set(onediff.MODE_WORDS)),
        "jit_follows_weights": follows("jit"),
        "freezing_follows_weights": follows("jit:freezing"),
    }


def main(pack: str, comfyui: str, base: str, answer: str) -> None:
    sys.path[:] = [comfyui, *(entry for entry in sys.path[1:] if entry)]
    from comfy.cli_args import args

    args.cpu, args.base_directory = True, base
    comfy = importlib.import_module("comfy")
    for name in ("comfy.sd", "comfy.sample", "comfy.utils", "folder_paths"):
        importlib.import_module(name)
    load_package("speedlab", Path(pack) / "speedlab")
    import torch

    with torch.inference_mode():  # as ComfyUI runs its nodes
        child = Child(comfy)
        imported_at_start = sorted({"onediff", "nexfort"} & sys.modules.keys())
        compiled = child.compile.attach_compile(child.model, child.config())
        imported_by_attach = sorted({"onediff", "nexfort"} & sys.modules.keys())
        seen = {
            "imported": [imported_at_start, imported_by_attach],
            "network": f"{type(child.network).__module__}.{type(child.network).__name__}",
            "sizes": [child.compared(compiled, child.model, size) for size in SIZES],
            "lora": child.under_a_lora(compiled),
            "kept": child.kept(),
            "cancelled": child.cancelled(compiled),
            "refused": child.refused(),
            "modes": modes(),
            "versions": {name: sys.modules[name].__version__ for name in ("torch", "onediff", "nexfort")},
        }
    Path(answer).write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
