"""One line of the manifest: what became of one task."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

OK, ERROR, LOST = "ok", "error", "lost"
# A name that the fleet gives: nothing else in a manifest is ever opened or deleted.
PICTURE = re.compile(r"pictures/[0-9]{5,7}(-[0-9]{1,4})?\.png")


@dataclass(frozen=True)
class PictureFile:
    """A picture: its path below the output folder, sha256 and size in bytes."""

    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Row:
    """What became of a task. `status` is ok, error (ComfyUI's own), or lost (every worker that had it was lost).

    `seconds` go from hand-out to answer, `comfyui_seconds` are what ComfyUI took of them; `started` is local time.
    """

    index: int
    name: str
    prompt: str
    negative: str | None
    seed: int | None
    status: str
    pictures: tuple[PictureFile, ...]
    run_ids: tuple[str, ...]
    worker: str | None
    machine: str | None
    device: str | None
    attempts: int
    started: str | None
    seconds: float | None
    comfyui_seconds: float | None
    error: str | None
    key: str

    def line(self) -> str:
        """The row as one line of JSON, ASCII, so that no letter of a prompt can break a line."""
        return json.dumps(asdict(self)) + "\n"


def row_of(line: str) -> Row | None:
    """Read a line back; None for what is no row. Anybody may have changed the file."""
    try:
        data = json.loads(line)
        pictures = tuple(PictureFile(**picture) for picture in data.pop("pictures"))
        row = Row(**{**data, "pictures": pictures, "run_ids": tuple(data.pop("run_ids"))})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return row if _sound(row) else None


def _sound(row: Row) -> bool:
    texts: tuple[Any, ...] = (row.name, row.prompt, row.status, row.key, *row.run_ids)
    maybe: tuple[Any, ...] = (row.negative, row.worker, row.machine, row.device, row.started, row.error)
    return (
        type(row.index) is int
        and row.index >= 0
        and type(row.attempts) is int
        and all(isinstance(text, str) for text in texts)
        and all(text is None or isinstance(text, str) for text in maybe)
        and all(number is None or isinstance(number, (int, float)) for number in (row.seconds, row.comfyui_seconds))
        and all(
            isinstance(picture.file, str) and PICTURE.fullmatch(picture.file) and type(picture.bytes) is int
            and isinstance(picture.sha256, str) for picture in row.pictures
        )
    )  # fmt: skip
