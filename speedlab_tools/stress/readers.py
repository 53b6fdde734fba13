"""The readers of model files and of their names, which go through ComfyUI's loaders. Needs ComfyUI in this process.

The readers of texts and files that need no ComfyUI.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from speedlab.common.errors import SpeedLabError
from speedlab.measure.context import NodeContext
from speedlab.measure.peaks import MemoryPeak
from speedlab.measure.record import csv_row, from_json
from speedlab.measure.store import RunStore
from speedlab.measure.timeline import PhaseEntry
from speedlab.models.loading import find_model_file, load_checkpoint, load_vae
from speedlab.plans.axes import AXES, NONE, CellSettings, baseline_of, make_cells, parse_axis
from speedlab.plans.plan_text import parse_plan
from speedlab.sampling.prompt_queue import read_queue
from speedlab.web.library import RunLibrary, RunSummary

from ..bench.results import Journal
from ..bench.results import Outcome as SeriesOutcome
from ..client.client import json_object
from ..client.errors import describe_rejection, failure_from_status
from ..client.files import check_model_file
from ..compare.csv_tables import compare, read_table, runs_of
from . import samples as valid
from .fuzz import Broken, Maker, Target, of_bytes, of_json, of_json_text, of_text

_executed: list[str] = []
_TENSORS = ("lora_unet_down_blocks_0_attentions_0.lora_up.weight", "a.b.processor.lora_A.default.weight", "x.hada_w1_a")
_NAMES = ("a.safetensors", "sub/a.safetensors", "../a.safetensors", "..\\a.ckpt", "/etc/passwd", "C:\\a.ckpt")


class Trap:
    """A pickle of this runs `leave_trace` when it is loaded by a loader that runs code."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return leave_trace, ("executed",)


def leave_trace(what: str) -> None:
    """Leave a trace of having been run."""
    _executed.append(what)


def model_targets(models: Path) -> list[Target]:
    """All of them; `models` is a models folder that ComfyUI looks into."""
    weights = of_bytes([valid.safetensors()])

    def checkpoint(data: bytes) -> object:
        (models / "checkpoints" / "fuzz.safetensors").write_bytes(data)
        return load_checkpoint("fuzz.safetensors", "auto", "contiguous")

    def vae(data: bytes) -> object:
        (models / "vae" / "fuzz.safetensors").write_bytes(data)
        return load_vae("fuzz.safetensors", "auto")

    def pickled(data: bytes) -> None:
        (models / "checkpoints" / "fuzz.ckpt").write_bytes(data)
        _executed.clear()
        try:
            load_checkpoint("fuzz.ckpt", "auto", "contiguous")
        finally:
            if _executed:
                raise Broken("code of a pickle was run")

    return [
        Target("checkpoint file", weights, checkpoint),
        Target("VAE file", weights, vae),
        Target("pickle file", of_bytes(_pickles()), pickled),
        Target("tensor names", of_text(_TENSORS), _tensor_reader),
        Target("model names", of_text(_NAMES), _name_reader(models)),
    ]


def _tensor_reader(name: str) -> object:
    import torch

    from speedlab.models.lora import content_of

    return content_of({name: torch.zeros(1), "b.lora_up.weight": torch.zeros(1, 1)})


def _name_reader(models: Path) -> Callable[[str], object]:
    (models / "checkpoints" / "a.safetensors").write_bytes(valid.safetensors())
    inside = (models / "checkpoints").resolve()

    def read(name: str) -> object:
        path = find_model_file("checkpoints", name)
        if not path.resolve().is_relative_to(inside):
            raise Broken(f"{name!r} leads to {path}")
        return path

    return read


def _pickles() -> list[bytes]:
    """Weights as torch writes them, in both formats, and pickles that run code."""
    import torch

    made = [pickle.dumps({"state_dict": Trap()}, protocol) for protocol in (2, 4)]
    for new in (True, False):
        for content in ({"state_dict": {"a": torch.zeros(2)}}, {"a": torch.zeros(2), "trap": Trap()}):
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=new)
            made.append(file.getvalue())
    return made


def trap_works() -> bool:
    """Whether the trap works at all: a loader that runs code is caught by it."""
    _executed.clear()
    pickle.loads(pickle.dumps(Trap()))  # noqa: S301 - the proof that the trap works
    return bool(_executed)


_AXIS_TEXTS = (
    "10, 20, 30", "*512, 768x512", "1, 2, max@8", "euler, dpmpp_2m/karras@20", "fp16, *bf16", "0.5, off", "2\n3\n*5",
    "(cache_interval=3, schedule=nonuniform), off", "tiny(decoder=taesd), full", "inductor(mode=max-autotune)",
    "stock\nfast=deepcache(3)+dynamic_cfg(stop_at=0.5)+tiny",
)  # fmt: skip
_PLANS = ("stock", "fast=deepcache(3)+tiny", "a=settings(steps=4,cfg=1)+compile(backend=inductor, mode=default)")


def pure_targets(folder: Path) -> list[Target]:
    """All of them; files are written under `folder`."""
    return [
        Target("safetensors header", of_bytes([valid.safetensors()]), _file_reader(folder / "a.safetensors")),
        Target("header values", _headers, _file_reader(folder / "b.safetensors")),
        Target("record", of_json_text([valid.record_json()]), _read_record),
        Target("record bytes", of_bytes([valid.record().to_json().encode()]), _stored_record(folder / "records")),
        Target("run library", of_json_text([valid.record_json()]), _library_reader(folder / "library")),
        Target("results table", of_text([valid.table()]), _table_reader(folder / "table.csv")),
        Target("table cells", _cells, _table_reader(folder / "cells.csv")),
        Target("series journal", of_json_text([_journal()]), _journal_reader(folder / "series")),
        Target("prompt context", _context_of, _read_context),
        Target("server answers", of_json([_rejection(), _failure()]), _read_answer),
        Target("axis", _axes, _read_axes),
        Target("plan", of_text(_PLANS), parse_plan),
        Target("server bodies", of_bytes([b'{"a": {"b": [1, 2]}}', b"[1, 2]"]), json_object),
        Target("prompt queue", _queue_texts, lambda texts: read_queue(*texts)),
    ]


def _file_reader(path: Path) -> Callable[[bytes], object]:
    def read(data: bytes) -> object:
        path.write_bytes(data)
        return check_model_file(path)

    return read


def _headers(rng: Random) -> bytes:
    """A file whose header is whole JSON with values that no writer would give."""
    sample = valid.safetensors()
    length = int.from_bytes(sample[:8], "little")
    text = of_json_text([json.loads(sample[8 : 8 + length])])(rng).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + sample[8 + length :]


def _read_record(text: str) -> None:
    record = from_json(text)
    "".join(csv_row(record).values()).encode()
    record.to_json().encode()
    if from_json(record.to_json()).to_json() != record.to_json():
        raise Broken("a record that was read does not come back the same")


def _stored_record(folder: Path) -> Callable[[bytes], object]:
    store = RunStore(folder)
    store.check_writable()

    def read(data: bytes) -> object:
        store.json_path(valid.RUN_ID).write_bytes(data)
        return csv_row(store.read(valid.RUN_ID))

    return read


def _library_reader(folder: Path) -> Callable[[str], object]:
    store = RunStore(folder)
    store.check_writable()
    path = store.json_path(valid.RUN_ID)
    inside = store.root.resolve()

    def artifact(library: RunLibrary, kind: str) -> None:
        found = library.artifact(valid.RUN_ID, kind)
        if not found.resolve().is_relative_to(inside):
            raise Broken(f"{found} leads out")

    def read(text: str) -> object:
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        library = RunLibrary(store)
        page = library.page(text="euler")
        if any(not isinstance(run, RunSummary) for run in page.runs) or page.files != 1:
            raise Broken("the list holds something that is no run")
        for kind in ("images", "chart", "trace"):
            # To be refused is fine here, and more is to be tried afterwards.
            with contextlib.suppress(SpeedLabError):
                artifact(library, kind)
        library.delete(valid.RUN_ID)
        return page

    return read


def _table_reader(path: Path) -> Callable[[str], object]:
    def read(text: str) -> object:
        path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
        found = runs_of(read_table(path), path)
        entries, _ = compare(found, found)
        return [(entry.name, entry.is_regression) for entry in entries]

    return read


def _cells(rng: Random) -> str:
    """A table of this pack's columns with numbers that no run gives."""
    lines = valid.table().splitlines()
    words = [line.split(",") for line in lines]
    hostile = ("nan", "inf", "-1", "1e308", "1e-308", "9" * 400, "0", "", "1_0", "x", " 1", "1e200")
    for _ in range(rng.randint(1, 4)):
        row = rng.randrange(1, 3)
        words[row][rng.randrange(len(words[row]))] = rng.choice(hostile)
    return "\r\n".join(",".join(line) for line in words) + "\r\n"


def _journal() -> dict[str, Any]:
    return {"txt2img-default/0": {"runs": [valid.RUN_ID], "pictures": ["a.png"]}}


def _journal_reader(folder: Path) -> Callable[[str], object]:
    path = Journal(folder, "series").path
    path.parent.mkdir(parents=True, exist_ok=True)
    RunStore(folder).write(valid.record())

    def read(text: str) -> object:
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        journal = Journal(folder, "series")
        return [journal.recall(part, folder, SeriesOutcome("x")) for part in list(journal.done)]

    return read


def _context_of(rng: Random) -> tuple[Any, Any, Any]:
    node = rng.choice(("1", "2", "3", "4", "5", 3, None, "99"))
    return of_json([valid.prompt()])(rng), of_json([valid.extra()])(rng), node


def _read_context(given: tuple[Any, Any, Any]) -> None:
    context = NodeContext.of(*given)
    entries = [PhaseEntry("text_encode", "2", 10.0, MemoryPeak()), PhaseEntry("load", "1", 1.0, MemoryPeak())]
    context.ancestors()
    context.scenario()
    context.workflow_id()
    context.checkpoint_name()
    context.is_output_used(0)
    context.concerning(entries)
    for phase in ("load", "text_encode", "decode"):
        context.phase_ms(phase, entries)


def _rejection() -> dict[str, Any]:
    reason = {"type": "value_not_in_list", "message": "m", "details": "d",
              "extra_info": {"input_name": "a", "input_config": [["x"], {}], "received_value": "y"}}  # fmt: skip
    return {"error": {"message": "m", "details": "d"}, "node_errors": {"1": {"class_type": "X", "errors": [reason]}}}


def _failure() -> dict[str, Any]:
    return {"node_id": "1", "node_type": "X", "exception_message": "m", "exception_type": "E", "traceback": ["a"]}


def _read_answer(data: Any) -> None:
    if isinstance(data, dict):
        describe_rejection(data, valid.prompt())
        str(failure_from_status(data, valid.prompt()))


def _axes(rng: Random) -> tuple[str, str]:
    return rng.choice((*AXES, *AXES, "step", "")), of_text(_AXIS_TEXTS)(rng)


def _read_axes(given: tuple[str, str]) -> None:
    axis = parse_axis(*given)
    for cell in make_cells(CellSettings(), axis, NONE):
        baseline_of(cell, axis, NONE)


def _queue_texts(rng: Random) -> tuple[str, str, str]:
    words: Maker = of_text(("a tree\na house", "a\n\nb", "x"))
    return words(rng), words(rng), of_text(("1", "1\n2", "18446744073709551615"))(rng)
