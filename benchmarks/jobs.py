"""Jobs that the scripts of this folder time in turn: each run is a row of a CSV when it ends; figures at the end."""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import inprocess  # noqa: F401 - it makes the pack's packages importable

from speedlab.plans.in_turn import Series, own_failure, turns
from speedlab.sampling.profiled import failure_message, failure_status

COLUMNS = ["part", "job", "size", "steps", "round", "seconds", "latent_error", "threshold", "device", "torch"]
FIGURES = ["figure", "measured", "limit", "share_of_limit", "target", "reached", "device", "torch", "date"]


@dataclass
class Job(Series[float]):
    """One timed call. `run` gives a latent, which is compared with the latent of `against`, a job of the same part.

    `warm` is called untimed before the first run in this process, unless that run is the cold one, round 0.
    """

    part: str
    name: str
    size: int
    steps: int
    run: Callable[[], Any]
    rounds: int
    against: str = "stock"
    warm: Callable[[], Any] | None = None


class Rows:
    """Runs jobs in turn, keeps each result on disk, and leaves out what is there already."""

    def __init__(self, path: Path, facts: dict[str, str], minutes: float) -> None:
        self.path, self.facts = path, facts
        self.deadline = time.monotonic() + 60 * minutes
        self.latents: dict[tuple[str, int, str], Any] = {}
        self.ran: set[tuple[str, int, str]] = set()
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))

    def done(self, job: Job, number: int) -> bool:
        return any(
            (row["part"], row["job"], row["size"], row["round"]) == (job.part, job.name, str(job.size), str(number))
            for row in self.rows
        )

    def run(self, job: Job, number: int, threshold: float | None = None) -> None:
        """One timed run of a job, unless it was done before or the time for repeats is over."""
        reference = (job.part, job.size, job.against)
        if self.done(job, number) or (number > 0 and time.monotonic() > self.deadline):
            return
        key = (job.part, job.size, job.name)
        if number > 0 and job.warm is not None and key not in self.ran:
            job.warm()
        self.ran.add(key)
        start = time.perf_counter()
        latent = job.run()
        seconds = time.perf_counter() - start
        if job.name == job.against:
            self.latents[reference] = latent
        known = self.latents.get(reference)
        error = "" if known is None else f"{relative_error(latent, known):.6f}"
        self.keep(job, number, seconds, error, threshold)

    def keep(self, job: Job, number: int, seconds: float, error: str = "", threshold: float | None = None) -> None:
        """Add what was measured to the rows and to the file."""
        row = {
            "part": job.part, "job": job.name, "size": str(job.size), "steps": str(job.steps), "round": str(number),
            "seconds": f"{seconds:.3f}", "latent_error": error,
            "threshold": "" if threshold is None else f"{threshold:g}", **self.facts,
        }  # fmt: skip
        self.rows.append(row)
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(f"{job.part} {job.size}: {job.name}, round {number}: {seconds:.2f} s, latent error {error or '-'}")

    def all_in_turn(self, jobs: list[Job]) -> None:
        """Round by round; a job that fails leaves the others alone, and the same call tries it again."""
        for turn in turns(jobs, max(job.rounds for job in jobs)):
            job = turn.series
            with own_failure(partial(_failed, job)):
                self.run(job, turn.number)

    def median(self, part: str, job: str, size: int, column: str = "seconds") -> float | None:
        values = [
            float(row[column])
            for row in self.rows
            if (row["part"], row["job"], row["size"]) == (part, job, str(size)) and row[column]
        ]
        return statistics.median(values) if values else None


def _failed(job: Job, error: Exception) -> str:
    job.status, job.error = failure_status(error), failure_message(error)
    print(f"{job.part} {job.size}: {job.name}: {job.status}: {job.error}")
    return job.status


def relative_error(latent: Any, reference: Any) -> float:
    """Root mean square of the difference over that of the reference."""
    return float((latent - reference).double().pow(2).mean().sqrt() / reference.double().pow(2).mean().sqrt())


def write(path: Path, rows: Iterator[tuple] | list[tuple], facts: dict[str, str]) -> None:
    """The figures as CSV and on the screen."""
    date = time.strftime("%Y-%m-%d")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIGURES)
        writer.writeheader()
        for figure, measured, limit, target in rows:
            if measured is None:
                continue
            row = {
                "figure": figure, "measured": f"{measured:.4f}" if measured >= 0.001 else f"{measured:.1e}",
                "limit": "" if limit is None else f"{limit:.4f}",
                "share_of_limit": "" if limit is None else f"{measured / limit:.3f}",
                "target": "" if target is None else f"{target:.3f}",
                "reached": "" if target is None else ("yes" if measured >= target else "no"), **facts, "date": date,
            }  # fmt: skip
            writer.writerow(row)
            shown = [f"{row['measured']:>9}", f"limit {row['limit']:>7}" if limit else " " * 13]
            print(f"{figure:<75} {' '.join(shown)} {'target ' + row['target'] if target else '':<14} {row['reached']}")
