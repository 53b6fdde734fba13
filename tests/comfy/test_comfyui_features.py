"""What this pack takes from ComfyUI, each by name: with another ComfyUI the list says what is gone.

Names are collected from the source; behaviour that no name tells is probed on a tiny model.
"""

from __future__ import annotations

import ast
import importlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("comfy", "comfy_execution", "comfyui_version", "folder_paths", "latent_preview", "nodes", "node_helpers")
# The pack asks for these before it uses them, and does without.
ASKED_FOR = {"comfy.memory_management"}


def names_in(source: str, file: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names of ComfyUI's modules that a source text uses, each with `file:line`."""
    tree = ast.parse(source)
    known: dict[str, str] = {}
    for part in ast.walk(tree):
        if isinstance(part, ast.Import):
            for name in part.names:
                if name.name.partition(".")[0] in MODULES:
                    known[name.asname or name.name.partition(".")[0]] = (
                        name.name if name.asname else name.name.partition(".")[0]
                    )
                    yield name.name, f"{file}:{part.lineno}"
        elif isinstance(part, ast.ImportFrom) and not part.level and (part.module or "").partition(".")[0] in MODULES:
            for name in part.names:
                known[name.asname or name.name] = f"{part.module}.{name.name}"
                yield f"{part.module}.{name.name}", f"{file}:{part.lineno}"
    for part in ast.walk(tree):
        dotted = _dotted(part, known) if isinstance(part, ast.Attribute) else None
        if dotted is not None:
            yield dotted, f"{file}:{part.lineno}"


def _dotted(part: ast.AST, known: dict[str, str]) -> str | None:
    if isinstance(part, ast.Attribute):
        before = _dotted(part.value, known)
        return None if before is None else f"{before}.{part.attr}"
    if isinstance(part, ast.Name):
        return known.get(part.id)
    # The pack reaches ComfyUI's `nodes` by a function, for it has a package of that name itself.
    is_nodes = isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id == "core_nodes"
    return "nodes" if is_nodes else None


def missing(dotted: str) -> str:
    """The first part of a dotted name that is not there; "" where all is, as far as modules and classes go."""
    parts = dotted.split(".")
    found: Any = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(parts[:number]))
            except ImportError:
                return ".".join(parts[:number])
        found = getattr(found, part)
        if not isinstance(found, (type, type(importlib))):
            return ""
    return ""


@pytest.fixture(scope="module")
def used() -> dict[str, list[str]]:
    """Every name of ComfyUI's that the pack uses, with the places."""
    places = defaultdict(list)
    for folder in (ROOT / "speedlab", ROOT / "nodes"):
        for path in sorted(folder.rglob("*.py")):
            for dotted, place in names_in(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))):
                places[dotted].append(place)
    return places


def test_every_name_that_the_pack_uses_is_there(comfy, used):
    gone = {dotted: places for dotted, places in used.items() if dotted not in ASKED_FOR and missing(dotted)}
    assert not gone, "\n".join(f"{dotted}: {', '.join(places[:3])}" for dotted, places in sorted(gone.items()))


def test_the_list_is_no_empty_one(comfy, used):
    for name in ("comfy.model_management.unload_all_models", "nodes.common_ksampler", "folder_paths.get_full_path",
                 "comfy.ldm.modules.diffusionmodules.openaimodel.apply_control", "comfy.samplers.CFGGuider",
                 ):  # fmt: skip
        assert any(dotted == name or dotted.startswith(name) for dotted in used), name
    source = (
        "import comfy.utils\nimport comfy.sd as s\ns.no_such_thing()\ncomfy.utils.ProgressBar(1)\ncore_nodes().Gone"
    )
    lacking = {missing(dotted) for dotted, _ in names_in(source)} - {""}
    assert lacking == {"comfy.sd.no_such_thing", "nodes.Gone"}


PATCHER = (
    "add_wrapper_with_key", "remove_wrappers_with_key", "get_wrappers", "wrappers", "callbacks", "set_attachments",
    "get_attachment", "attachments", "clone", "get_model_object", "model_dtype", "load_device", "offload_device",
    "patches", "patches_uuid", "object_patches", "model_options", "set_model_compute_dtype", "add_patches",
    "set_model_attn2_patch", "model_size", "loaded_size", "detach", "partially_load", "hook_patches",
)  # fmt: skip
TRANSFORMER_OPTIONS = ("cond_or_uncond", "uuids", "sigmas", "sample_sigmas")


@pytest.mark.parametrize("name", PATCHER)
def test_the_model_patcher_has(tiny, name):
    assert hasattr(tiny.model, name)


@pytest.fixture(scope="module")
def seen(tiny, core, engine) -> dict[str, list[Any]]:
    """One run of the stock sampler with a wrapper at every site: what each was given, and the attention's override."""
    site, attach = engine("patching.wrappers").Site, engine("patching.wrappers").attach
    calls: dict[str, list[Any]] = defaultdict(list)

    def wrapper(name: str) -> Any:
        def around(executor: Any, *args: Any, **kwargs: Any) -> Any:
            calls[name].append((executor.class_obj, args, kwargs))
            return executor(*args, **kwargs)

        return around

    def attention(function: Any, *args: Any, **kwargs: Any) -> Any:
        calls["attention"].append(kwargs)
        return function(*args, **kwargs)

    model = attach(tiny.model, "features", {place: wrapper(place.value) for place in site})
    model.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = attention
    with torch.inference_mode():
        core.common_ksampler(model, 1, 2, 5.0, "euler", "normal", tiny.cond(1), tiny.cond(2), tiny.latent())
    return calls


@pytest.mark.parametrize(
    ("site", "times"),
    [("outer_sample", 1), ("prepare_sampling", 1), ("sampler_sample", 1), ("predict_noise", 2), ("calc_cond_batch", 2),
     ("apply_model", 2), ("diffusion_model", 2)],
)  # fmt: skip
def test_a_wrapper_runs_at(seen, site, times):
    """On a tiny model the conditioned and the unconditioned half of an evaluation go together."""
    assert len(seen[site]) == times


def test_the_sites_are_those_that_the_engine_names(comfy, engine):
    known = importlib.import_module("comfy.patcher_extension").WrappersMP
    values = {value for name, value in vars(known).items() if name.isupper()}
    assert {site.value for site in engine("patching.wrappers").Site} <= values


def test_wrappers_are_given_what_they_look_at(seen):
    guider = seen["outer_sample"][0][0]
    assert hasattr(guider, "cfg") and hasattr(guider, "model_patcher") and "transformer_options" in guider.model_options
    assert hasattr(seen["predict_noise"][0][0], "cfg"), "guidance is switched off by the guider's cfg"
    base = seen["apply_model"][0][0]
    for name in ("diffusion_model", "model_sampling", "latent_format", "get_dtype"):
        assert hasattr(base, name), name


@pytest.mark.parametrize("name", TRANSFORMER_OPTIONS)
def test_the_transformer_options_tell(seen, name):
    _, args, kwargs = seen["apply_model"][0]
    options = kwargs.get("transformer_options") or next(a for a in reversed(args) if isinstance(a, dict))
    assert name in options


def test_an_override_computes_the_attention(seen):
    assert seen["attention"]


def test_blocks_dispatch_by_type(comfy):
    """DeepCache and Compile Model go through the network's blocks as ComfyUI does."""
    model = importlib.import_module("comfy.ldm.modules.diffusionmodules.openaimodel")
    operations = importlib.import_module("comfy.ops").disable_weight_init
    network = model.UNetModel(
        image_size=8, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=[1], channel_mult=[1],
        num_heads=4, transformer_depth=[1], transformer_depth_output=[1, 1], transformer_depth_middle=1,
        context_dim=32, use_spatial_transformer=True, operations=operations,
    )  # fmt: skip
    for name in ("input_blocks", "middle_block", "output_blocks", "out", "time_embed", "_forward"):
        assert hasattr(network, name), name


def test_a_node_knows_where_it_runs(comfy):
    """Outside of a prompt there is no context; inside, phases are noted under the prompt's id."""
    context = importlib.import_module("comfy_execution.utils").get_executing_context
    assert context() is None


def test_an_interrupt_is_an_exception_of_its_own(comfy):
    mm = importlib.import_module("comfy.model_management")
    mm.interrupt_current_processing(True)
    with pytest.raises(mm.InterruptProcessingException):
        mm.throw_exception_if_processing_interrupted()
    mm.throw_exception_if_processing_interrupted()
