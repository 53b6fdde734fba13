"""Which model files a command uses: the user's own, a name on a server, or demo models written on first use."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..client.client import ComfyClient
from ..client.errors import BenchError
from ..client.files import (
    check_model_file,
    demo_checkpoint,
    demo_controlnet,
    demo_drawn,
    demo_drawn_refiner,
    demo_drawn_vae,
    demo_lora,
    demo_tiny_vae,
    demo_vae,
    has_tiny_vae,
    looks_like_path,
    model_folders,
)
from ..scenarios import drawn
from ..scenarios.scenario import Scenario

DRAWS = (
    "The checkpoint is the demo model that draws simple scenes: a small one, with a small model's times, and images "
    "only as large as those it was trained on. LoRAs and ControlNets with random weights change them a little. "
    "Give your own with --checkpoint FILE."
)
NOISE = (
    "The checkpoint is a demo with random weights: the image is noise, the times are real. "
    "Give your own with --checkpoint FILE."
)


# Options that name a model beside the checkpoint, and the folder below `models/` that holds such files.
OTHER_MODELS = {"vae": "vae", "controlnet": "controlnet", "refiner": "checkpoints", "lora": "loras", "lora_2": "loras"}


@dataclass(frozen=True)
class ModelChoice:
    """The names that the graph uses (checkpoints by scenario id, others by kind, made-up LoRAs by family too), and the
    files that a started server must be shown.
    """

    checkpoints: dict[str, str]
    others: dict[str, str]
    files: dict[str, list[Path]]
    notes: tuple[str, ...] = ()
    demo_loras: dict[str, dict[str, str]] = field(default_factory=dict)

    def others_of(self, scenario: Scenario) -> dict[str, str]:
        """The models beside the checkpoint, by kind. A LoRA fits one family only."""
        return {**self.demo_loras.get(scenario.family, {}), **self.others}


def choose_models(args: argparse.Namespace, scenarios: Sequence[Scenario]) -> ModelChoice:
    """Check the model options, and write demo models where a server is started without a checkpoint."""
    files: dict[str, list[Path]] = {}
    notes: list[str] = []
    named: dict[str, str | None] = {}
    demo_loras: dict[str, dict[str, str]] = {}
    for option, folder in (("checkpoint", "checkpoints"), *OTHER_MODELS.items()):
        value, flag = getattr(args, option, None), f"--{option.replace('_', '-')}"
        if value is None or not looks_like_path(value):
            named[option] = value
        elif args.server:
            raise BenchError(f"{flag} {value}: with --server it is a name that the server knows, not a file")
        else:
            path = check_model_file(value, flag)
            files.setdefault(folder, []).append(path)
            named[option] = path.name
    checkpoints = {entry.id: named["checkpoint"] for entry in scenarios if named["checkpoint"] is not None}
    drawing: list[Scenario] = []
    if named["checkpoint"] is None and not args.server:
        drawing = [entry for entry in scenarios if drawn.is_there(entry.family)]
        drawn_files = {family: demo_drawn(family) for family in dict.fromkeys(entry.family for entry in drawing)}
        files["vae_approx"] = [path for paths in drawn_files.values() for path in paths[1:]]
        for entry in scenarios:
            path = drawn_files[entry.family][0] if entry in drawing else demo_checkpoint(entry.family)
            checkpoints[entry.id] = path.name
            if path not in files.setdefault("checkpoints", []):
                files["checkpoints"].append(path)
        notes += [DRAWS] if drawing else []
        notes += [NOISE] if len(drawing) < len(scenarios) else []
    if not args.server:
        random_tiny, more = tiny_vae_files([entry for entry in scenarios if entry not in drawing])
        files["vae_approx"] = [*files.get("vae_approx", ()), *random_tiny]
        notes += more
        if named["controlnet"] is None and any(entry.file("controlnet") for entry in scenarios):
            path = demo_controlnet("drawn" if any(entry.file("controlnet") for entry in drawing) else "small")
            files["controlnet"], named["controlnet"] = [path], path.name
            notes.append(f"No ControlNet given with --controlnet: using random weights ({path.name}).")
        if named["refiner"] is None and any(entry.file("refiner") for entry in scenarios):
            own = any(entry.file("refiner") for entry in drawing)
            path = demo_drawn_refiner(drawn_files["sdxl"][0]) if own else demo_checkpoint("refiner")
            files.setdefault("checkpoints", []).append(path)
            named["refiner"] = path.name
            what = "the model that draws once more" if own else "random weights"
            notes.append(f"No refiner given with --refiner: using {what} ({path.name}).")
        for entry in scenarios:
            for kind in ("lora", "lora_2"):
                mine = demo_loras.setdefault(entry.family, {})
                if entry.file(kind) is not None and named[kind] is None and kind not in mine:
                    path = demo_lora(entry.family, kind, "drawn" if entry in drawing else "small")
                    files.setdefault("loras", []).append(path)
                    mine[kind] = path.name
                    notes.append(f"No LoRA given with --{kind.replace('_', '-')}: using random weights ({path.name}).")
        if named["vae"] is None:
            vaes = {vae.default: drawn_files[one.family][0] for one in drawing if (vae := one.file("vae")) is not None}
            files["vae"], more = vae_files(scenarios, vaes)
            notes += more
    _refuse_equal_names(files)
    known = {key: name for key, name in checkpoints.items() if name}
    others = {kind: name for kind in OTHER_MODELS if (name := named[kind])}
    return ModelChoice(known, others, files, tuple(notes), demo_loras)


def _refuse_equal_names(files: Mapping[str, Sequence[Path]]) -> None:
    """ComfyUI knows a file by its name, so of two with one name in a folder it would load one twice."""
    for folder, paths in files.items():
        seen: dict[str, Path] = {}
        for path in paths:
            other = seen.setdefault(path.name.lower(), path)
            if other.resolve() != path.resolve():
                raise BenchError(
                    f"{other} and {path} have the same name, and ComfyUI would see one of them in models/{folder}. "
                    "Rename one, or link it under another name."
                )


def tiny_vae_files(scenarios: Iterable[Scenario]) -> tuple[list[Path], list[str]]:
    """Random Tiny VAEs for the scenarios that need one where the models folders have none, and what to say of it."""
    files: list[Path] = []
    for family in sorted({entry.family for entry in scenarios if entry.plan.decoder == "tiny"}):
        if not has_tiny_vae(family, model_folders()):
            files += demo_tiny_vae(family)
    names = ", ".join(path.name for path in files if "decoder" in path.name)
    return files, [
        f"No Tiny VAE in models/vae_approx: using random weights ({names}); its image is noise."
    ] if files else []


def vae_files(scenarios: Iterable[Scenario], drawing: Mapping[str, Path]) -> tuple[list[Path], list[str]]:
    """VAEs for the scenarios that name one which the models folders lack, and what to say of them.

    `drawing` has the checkpoints of models that draw by the VAE's name, whose own stands in; others are random.
    """
    wanted = {entry.default for scenario in scenarios if (entry := scenario.file("vae")) is not None}
    files: list[Path] = []
    notes: list[str] = []
    for name in sorted(wanted):
        if any((folder / "vae" / name).is_file() for folder in model_folders()):
            continue
        base = drawing.get(name)
        files.append(demo_vae(name) if base is None else demo_drawn_vae(base, name))
        what = "random weights; its image is noise" if base is None else "that of the model that draws"
        notes.append(f"No {name} in models/vae: using {what}. Give your own with --vae FILE.")
    return files, notes


async def server_checkpoint(client: ComfyClient, scenario: Scenario) -> str:
    """The checkpoint of a running server where none was named: the scenario's own, else its demo, else an error."""
    return await _on_server(client, scenario, "checkpoint", lambda name: not name.endswith("refiner.safetensors"))


async def server_refiner(client: ComfyClient, scenario: Scenario) -> str:
    """The refiner of a running server where none was named: the scenario's own, else a demo one, else an error."""
    return await _on_server(client, scenario, "refiner", lambda name: name.endswith("refiner.safetensors"))


async def _on_server(client: ComfyClient, scenario: Scenario, kind: str, is_demo: Callable[[str], bool]) -> str:
    info = await client.object_info("SpeedLabCheckpointLoader")
    if not info:
        raise BenchError(f"the server at {client.url} has no SpeedLab nodes: install the pack there and restart it")
    spec = info["SpeedLabCheckpointLoader"]["input"]["required"]["ckpt_name"]
    names = spec[0] if isinstance(spec[0], list) else spec[1].get("options", [])
    wanted = scenario.file(kind)
    demos = [name for name in names if name.startswith("speedlab_demo_") and is_demo(name)]
    for name in ([wanted.default] if wanted else []) + demos:
        if name in names:
            return str(name)
    raise BenchError(f"name a {kind} with --{kind}; the server has: {', '.join(names) or 'none'}")
