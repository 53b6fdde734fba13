"""What a series has done so far, kept beside its results, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speedlab.common.errors import ResultsError
from speedlab.measure.record import csv_row
from speedlab.measure.store import RunStore, write_atomically

from .results import Outcome

_KEY_DIGITS = 16


def series_key(what: Mapping[str, Any]) -> str:
    """The name of a series: equal for equal scenarios, settings and models."""
    text = json.dumps(what, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_DIGITS]


class Journal:
    """One series' finished parts: scenario and graph number -> the run ids and pictures that it left."""

    def __init__(self, out: Path, key: str) -> None:
        self.path = out / "speedlab" / "series" / f"{key}.json"
        self.done: dict[str, dict[str, list[str]]] = self._read()

    def _read(self) -> dict[str, dict[str, list[str]]]:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            return {
                str(part): {name: [str(item) for item in entry[name]] for name in ("runs", "pictures")}
                for part, entry in data.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            # Without a whole journal nothing is known to be done; running again is safe.
            return {}

    def finished(self, part: str, runs: list[str], pictures: list[Path]) -> None:
        """Note a part whose rows are written. Raises OSError."""
        self.done[part] = {"runs": runs, "pictures": [str(path) for path in pictures]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self.done, indent=1).encode())

    def recall(self, part: str, out: Path, outcome: Outcome) -> bool:
        """Add what a finished part left to `outcome`; False where it is not finished, or its records are gone."""
        entry = self.done.get(part)
        if entry is None:
            return False
        store = RunStore(out)
        try:
            records = [store.read(run_id) for run_id in entry["runs"]]
        except ResultsError:
            return False
        outcome.rows += [csv_row(record) for record in records]
        outcome.records += [store.json_path(record.run_id) for record in records]
        outcome.pictures += [Path(path) for path in entry["pictures"] if _is_file(path)]
        outcome.table = store.csv_path
        return True

    def close(self) -> None:
        """The series is whole: the same command starts a new one."""
        self.path.unlink(missing_ok=True)


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # names that no file can have
        return False
