"""The records on disk as a library: listed in pages, filtered, looked up, deleted, kept to a number.

Everything is read from the record files, which any program may have put there: a file that is half written
or not a record of this pack is skipped and counted, and no path in a record leads out of the pack's folder.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from uuid import uuid4

from ..common.errors import ResultsError, SpeedLabError, first_line
from ..measure.page import run_page
from ..measure.record import RUN_ID, RunRecord, from_json, loosely_from_json, shown_json
from ..measure.store import RunStore, leads_into

log = logging.getLogger(__name__)

MAX_PAGE = 200
_MAX_RECORD_BYTES = 64 * 1024 * 1024
_MAX_TEXT, _MAX_PLAN = 200, 2000
# Of a page that is sent to others: with a batch of large images it would be too large for an e-mail.
_MAX_IMAGES, _MAX_IMAGE_BYTES = 8, 32 * 1024 * 1024
_KINDS = {".png": "png", ".jpg": "jpeg", ".webp": "webp"}
_LEFT_OVER_S = 3600.0
# What of a saved workflow shows a run, and the property that names it; see js/lib/samplers.js.
_SAMPLERS, _REPORT, _PROPERTY = (
    ("SpeedLabProfileSampler", "SpeedLabEnsembleSampler"),
    "SpeedLabProfileReport",
    "speedlab_run",
)
# What Markdown takes for more than a letter.
_MARKUP, _ESCAPED = re.compile(r"([\\|`*_<\[])"), r"\\\1"
# Where this pack lays what belongs to a run; only there, and only under the run's own id, is anything deleted.
_ARTIFACT_FOLDERS = ("images", "charts")
_TRACE = ".trace.json.gz"


class UnknownRunError(ResultsError):
    """There is no such run, or no such file of it."""


@dataclass(frozen=True)
class RunSummary:
    """One line of the list. Texts are clipped, numbers are numbers: the file may hold anything."""

    run_id: str
    timestamp: str
    status: str
    plan: str
    scenario: str
    checkpoint: str
    sampler: str
    steps: float | None
    steps_asked: float | None
    width: float | None
    height: float | None
    batch: float | None
    it_per_s: float | None
    sample_ms: float | None
    total_ms: float | None
    peak_gb: float | None
    peak_kind: str
    device: str
    images: int

    def markdown(self) -> str:
        """The line as a row of a table in Markdown: date, plan, checkpoint, size, steps, sampler, seconds from text to
        image, steps a second, peak of memory, device, status, run id."""
        memory = "" if self.peak_gb is None else f"{self.peak_gb:.2f} GB {self.peak_kind.upper()}"
        total = "" if self.total_ms is None else f"{self.total_ms / 1000.0:.3f} s"
        rate = "" if self.it_per_s is None else f"{self.it_per_s:.4g} it/s"
        known = None not in (self.width, self.height)
        size = f"{_plain(self.width)}x{_plain(self.height)} x{_plain(self.batch) or '?'}" if known else ""
        steps = "" if self.steps is None else f"{_plain(self.steps)} steps"
        texts = (self.timestamp[:16].replace("T", " "), self.plan, self.checkpoint, size, steps,
                 self.sampler, total, rate, memory, self.device, self.status, self.run_id)  # fmt: skip
        return f"| {' | '.join(_MARKUP.sub(_ESCAPED, ' '.join(text.split())) or '-' for text in texts)} |"

    def matches(self, words: Sequence[str]) -> bool:
        """Whether every lower-case word occurs in one of the texts."""
        return all(word in self._searched for word in words)

    @cached_property
    def _searched(self) -> str:
        texts = [value for field in fields(self) if isinstance(value := getattr(self, field.name), str)]
        return " ".join([*texts, f"{_plain(self.width)}x{_plain(self.height)}"]).lower()


@dataclass(frozen=True)
class Page:
    """Part of the list, newest first. `next_offset` is None at the end; `skipped` files are no records of ours, those
    that have no run's name among them with the first page alone.

    `positions` tell for each run where it stands among all files.
    """

    runs: tuple[RunSummary, ...]
    files: int
    skipped: int
    next_offset: int | None
    positions: tuple[int, ...]


@dataclass(frozen=True)
class _Known:
    mtime_ns: int
    size: int
    summary: RunSummary | None


_index: dict[Path, dict[str, _Known]] = {}
_index_lock = threading.Lock()


class RunLibrary:
    """What lies under a store's `runs`, with an index that is kept while files stay as they are."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        with _index_lock:
            self._known = _index.setdefault(store.runs, {})

    def page(self, offset: int = 0, limit: int = 50, text: str = "") -> Page:
        """Up to `limit` runs that match all words of `text`, from file `offset` of the newest first.

        Without words only the files of the page are opened, so a first look at very many runs is quick.
        """
        words = text.lower().split()
        files, foreign = self._files()
        limit = max(1, min(limit, MAX_PAGE))
        runs: list[RunSummary] = []
        positions: list[int] = []
        position = max(0, offset)
        skipped = 0 if position else foreign
        while position < len(files) and len(runs) < limit:
            name, mtime_ns, size = files[position]
            position += 1
            summary = self._summary(name, mtime_ns, size)
            if summary is None:
                skipped += 1
            elif summary.matches(words):
                runs.append(summary)
                positions.append(position - 1)
        after = position if position < len(files) else None
        return Page(tuple(runs), len(files), skipped, after, tuple(positions))

    def text(self, run_id: str) -> str:
        """A record's JSON as it lies on disk. Raises UnknownRunError, ResultsError."""
        path = self._path(run_id)
        if not path.is_file() or path.is_symlink():
            raise UnknownRunError(f"There is no run {run_id} in {self._store.runs}.")
        text = _read(path)
        if loosely_from_json(text).run_id != run_id:
            raise ResultsError(f"{path} is the record of another run.")
        return text

    def shown(self, run_id: str) -> str:
        """A record's JSON as this version shows it: of an old one with the rate computed from its steps.

        Raises UnknownRunError, ResultsError.
        """
        return shown_json(self.text(run_id))

    def artifact(self, run_id: str, kind: str, index: int = 0) -> Path:
        """The file that a record names, of kind `images`, `chart`, `trace`. Raises UnknownRunError, ResultsError."""
        paths = _artifact_paths(_mapping(loosely_from_json(self.text(run_id)).artifacts).get(kind))
        if not 0 <= index < len(paths):
            raise UnknownRunError(f"Run {run_id} has no {kind} {index}.")
        path = self._inside(paths[index])
        if path is None or not path.is_file():
            raise UnknownRunError(f"The {kind} of run {run_id} is not there any more.")
        return path

    def page_of(self, run_id: str) -> str:
        """A run as one HTML page with its images in it. Raises UnknownRunError, ResultsError."""
        record = from_json(self.text(run_id))
        images = []
        for index, name in enumerate(_artifact_paths(record.artifacts.get("images"))[:_MAX_IMAGES]):
            kind = _KINDS.get(PurePosixPath(name).suffix.lower())
            # One that is gone, or is no image, is left out: the figures are whole without it.
            with suppress(UnknownRunError, OSError):
                path = self.artifact(run_id, "images", index)
                if kind is not None and path.stat().st_size <= _MAX_IMAGE_BYTES:
                    images.append((kind, path.read_bytes()))
        return run_page(record, images)

    def workflow(self, run_id: str) -> dict[str, Any]:
        """What a run's first image keeps of its graph: `workflow` as the canvas has it, `prompt` as it was queued.

        The workflow is one of its own and names this run: when it was queued, its nodes showed the run before.
        Raises UnknownRunError where no image is left or it keeps neither, ResultsError.
        """
        if not _artifact_paths(_mapping(loosely_from_json(self.text(run_id)).artifacts).get("images")):
            raise UnknownRunError(
                "The workflow of a run is kept in its image, and this run saved none. Connect the image to Profile "
                "Report to have it saved."
            )
        texts = png_texts(self.artifact(run_id, "images"))
        found = {name: data for name in ("workflow", "prompt") if (data := _json_object(texts.get(name)))}
        if not found:
            raise UnknownRunError(
                "The image of this run keeps no workflow: ComfyUI runs with --disable-metadata, or another program "
                "saved the image."
            )
        if "workflow" in found:
            _name_run(found["workflow"], run_id)
        return found

    def delete(self, run_id: str) -> None:
        """Remove a run's record and what it made. Its row in the CSV stays. Raises UnknownRunError, ResultsError."""
        record = loosely_from_json(self.text(run_id))
        path = self._path(run_id)
        try:
            # The record goes first: files without a record are never listed, a record without files is.
            path.unlink()
        except FileNotFoundError as error:
            raise UnknownRunError(f"There is no run {run_id} in {self._store.runs}.") from error
        except OSError as error:
            raise ResultsError(f"{path} cannot be deleted: {error.strerror or first_line(error)}.") from error
        self._known.pop(path.name, None)
        for file in self._own_files(record):
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                log.warning("SpeedLab: %s could not be deleted: %s", file, first_line(error))

    def prune(self, keep: int) -> list[str]:
        """Delete the runs written longest ago down to `keep`; 0 keeps all. Returns the ids. Files that are no records
        stay. By the time of writing, not by the id: the local time in that goes backwards once a year."""
        if keep <= 0:
            return []
        files = sorted(self._files()[0], key=lambda file: (file[1], file[0]), reverse=True)
        runs = [summary.run_id for summary in (self._summary(*file) for file in files) if summary]
        deleted = []
        for run_id in runs[keep:]:
            try:
                self.delete(run_id)
                deleted.append(run_id)
            except SpeedLabError as error:
                log.warning("SpeedLab: run %s was not removed: %s", run_id, first_line(error))
        return deleted

    def _path(self, run_id: str) -> Path:
        path = self._store.json_path(run_id)
        self._require_inside()
        return path

    def _require_inside(self) -> None:
        base = self._store.root.parent.resolve()
        if not leads_into(base, self._store.runs):
            raise ResultsError(f"{self._store.runs} is a link that leads out of {base}; SpeedLab does not follow it.")

    def _files(self) -> tuple[list[tuple[str, int, int]], int]:
        """Name, time and size of every file with a run id for a name, newest first, and how many others lie there."""
        self._require_inside()
        found: list[tuple[str, int, int]] = []
        foreign = 0
        try:
            with os.scandir(self._store.runs) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or RUN_ID.fullmatch(entry.name.removesuffix(_TRACE)):
                        foreign += _is_left_over(entry)
                        continue  # a record that is being written, or a trace beside its record
                    details = _regular(entry)
                    if details is None or not RUN_ID.fullmatch(entry.name.removesuffix(".json")):
                        foreign += 1
                    else:
                        found.append((entry.name, details.st_mtime_ns, details.st_size))
        except FileNotFoundError:
            return [], 0
        except OSError as error:
            raise ResultsError(f"{self._store.runs} cannot be read: {error.strerror or first_line(error)}.") from error
        for gone in self._known.keys() - {name for name, _, _ in found}:
            self._known.pop(gone, None)
        return sorted(found, reverse=True), foreign

    def _summary(self, name: str, mtime_ns: int, size: int) -> RunSummary | None:
        known = self._known.get(name)
        if known is None or (known.mtime_ns, known.size) != (mtime_ns, size):
            known = _Known(mtime_ns, size, _summary_of(self._store.runs / name, size))
            self._known[name] = known
        return known.summary

    def _inside(self, relative: str) -> Path | None:
        """A path of a record, which is relative to the output folder, if it lies in this pack's; else None."""
        posix, windows = PurePosixPath(relative), PureWindowsPath(relative)
        strange = "\0" in relative or "\\" in relative or windows.drive or windows.root
        if strange or posix.is_absolute() or ".." in posix.parts:
            return None
        root = self._store.root.resolve()
        path = self._store.root.parent / posix
        try:
            return path if leads_into(root, path) and not path.is_symlink() else None
        except (OSError, ValueError):  # letters that no file name can have
            return None

    def _own_files(self, record: RunRecord) -> Iterator[Path]:
        for value in _mapping(record.artifacts).values():
            for relative in _artifact_paths(value):
                path = self._inside(relative)
                if path is None or not path.name.startswith(record.run_id):
                    continue
                folders = [self._store.root / folder for folder in _ARTIFACT_FOLDERS]
                if path.parent in folders or path == self._store.trace_path(record.run_id):
                    yield path


def png_texts(path: Path) -> dict[str, str]:
    """The texts that stand before the pixels of a PNG file; none of another file, or of one that breaks off."""
    texts: dict[str, str] = {}
    with path.open("rb") as file:
        if file.read(8) != b"\x89PNG\r\n\x1a\n":
            return texts
        while len(head := file.read(8)) == 8 and head[4:] != b"IDAT":
            size = int.from_bytes(head[:4], "big")
            if size > _MAX_RECORD_BYTES:
                break
            data = file.read(size + 4)[:-4]
            if head[4:] == b"tEXt":
                name, _, text = data.partition(b"\0")
                texts[name.decode("latin-1")] = text.decode("latin-1")
    return texts


def _json_object(text: str | None) -> dict[str, Any] | None:
    """What is an object of JSON; NaN, which ComfyUI writes into prompts and no browser reads, becomes null."""
    try:
        return _mapping(json.loads(text or "null", parse_constant=lambda _: None)) or None
    except (ValueError, RecursionError):
        return None


def _artifact_paths(value: Any) -> list[str]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [path for path in values if isinstance(path, str) and path]


def _is_left_over(entry: os.DirEntry[str]) -> bool:
    """Whether a record was begun long ago and never ended: its process was killed while it wrote."""
    if not entry.name.endswith(".tmp"):
        return False
    try:
        return time.time() - entry.stat(follow_symlinks=False).st_mtime > _LEFT_OVER_S
    except OSError:
        return False


def _regular(entry: os.DirEntry[str]) -> os.stat_result | None:
    if not entry.name.endswith(".json"):
        return None
    try:
        details = entry.stat(follow_symlinks=False)
    except OSError:
        return None
    return details if stat.S_ISREG(details.st_mode) else None


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_RECORD_BYTES:
            raise ResultsError(f"{path} is too large to be a record.")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UnknownRunError(f"There is no {path}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} cannot be read: {first_line(error)}.") from error


def _summary_of(path: Path, size: int) -> RunSummary | None:
    try:
        record = loosely_from_json(_read(path)) if size <= _MAX_RECORD_BYTES else None
    except ResultsError:
        return None
    if record is None or record.run_id != path.stem:
        return None
    request, summary, overall = _mapping(record.request), _mapping(record.summary), _mapping(record.memory)
    peaks, phases = _mapping(overall.get("overall")), _mapping(record.phases_ms)
    vram = _number(peaks.get("peak_allocated_gb"))
    return RunSummary(
        run_id=record.run_id,
        timestamp=_text(record.timestamp),
        status=_text(record.status),
        plan=_text(request.get("plan"), _MAX_PLAN),
        scenario=_text(request.get("scenario")),
        checkpoint=_text(_mapping(request.get("checkpoint")).get("name")),
        sampler="/".join(filter(None, (_text(request.get("sampler")), _text(request.get("scheduler"))))),
        # Some schedulers take other than the steps asked for.
        steps=_number(summary.get("steps")) or _number(request.get("steps")),
        steps_asked=_number(request.get("steps")),
        width=_number(request.get("width")),
        height=_number(request.get("height")),
        batch=_number(request.get("batch")),
        it_per_s=_number(summary.get("it_per_s")),
        sample_ms=_number(phases.get("sample")),
        total_ms=_number(phases.get("total")),
        peak_gb=_number(peaks.get("peak_rss_gb")) if vram is None else vram,
        peak_kind="ram" if vram is None else "vram",
        device=_text(_mapping(record.env).get("device")),
        images=len(_artifact_paths(_mapping(record.artifacts).get("images"))),
    )


def _name_run(workflow: dict[str, Any], run_id: str) -> None:
    """Give a workflow an id that no open one has, and its nodes this run; of several samplers it may be any one's."""
    workflow["id"] = str(uuid4())
    graphs = [workflow, *_mappings(_mapping(workflow.get("definitions")).get("subgraphs"))]
    nodes = [node for graph in graphs for node in _mappings(graph.get("nodes"))]
    one = sum(node.get("type") in _SAMPLERS for node in nodes) == 1
    for node in nodes:
        if node.get("type") in (*_SAMPLERS, _REPORT):
            properties = {k: v for k, v in _mapping(node.get("properties")).items() if k != _PROPERTY}
            node["properties"] = properties | ({_PROPERTY: run_id} if one else {})


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _mappings(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _text(value: Any, most: int = _MAX_TEXT) -> str:
    return value[:most] if isinstance(value, str) else ""


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 else None


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
