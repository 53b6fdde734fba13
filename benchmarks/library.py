"""How long the sidebar's list of runs takes with very many records.

    python benchmarks/library.py

Writes that many records into a temporary folder. `cold` is the first look of a server at its runs; `warm` is every
later one, while the files stay as they are. The first search opens every record once.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ["runs", "what", "calls", "median_s", "min_s", "max_s", "device", "date"]


def main() -> None:
    # The pack's `nodes` folder must not stand for ComfyUI's module, so only what is needed here comes onto the path.
    sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent)]
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=10_000)
    options.add_argument("--repeats", type=int, default=9)
    options.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), args.runs, args.repeats)
    write(rows, args.results)


def measure(folder: Path, runs: int, repeats: int) -> list[dict[str, Any]]:
    from speedlab.measure.store import RunStore
    from speedlab.web.library import RunLibrary, _index

    store = RunStore(folder)
    store.check_writable()
    fill(store.runs, runs)

    def cold() -> Any:
        _index.clear()
        return RunLibrary(store).page(0, 50)

    def search(text: str) -> Callable[[], Any]:
        return lambda: RunLibrary(store).page(text=text)

    def first_search() -> Any:
        _index.clear()
        return search("euler 17")()

    return [
        timed(what, runs, calls, work)
        for what, calls, work in (
            ("cold: first page", repeats, cold),
            ("cold: first search", 3, first_search),
            ("warm: first page", repeats, lambda: RunLibrary(store).page(0, 50)),
            ("warm: last page", repeats, lambda: RunLibrary(store).page(runs - 50, 50)),
            ("warm: search that finds nothing", repeats, search("no such run")),
        )
    ]


def fill(folder: Path, runs: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    steps = [{"index": i, "cpu_ms": 50.0, "gpu_ms": None, "evals": 1, "cached": False} for i in range(30)]
    for number in range(runs):
        run_id = f"20260101-{number // 3600:02d}{number // 60 % 60:02d}{number % 60:02d}-{number:08x}"
        record = {
            "schema": 2, "run_id": run_id, "timestamp": "2026-01-01T10:00:00+0000", "status": "ok", "error": None,
            "env": {"device": "a GPU"}, "env_hash": "0", "phases_ms": {"sample": 1000.0, "total": 1500.0},
            "request": {"plan": "stock", "width": 512, "height": 768, "sampler": "euler", "steps": 30},
            "steps": steps, "summary": {"steps": len(steps), "it_per_s": 20.0, "step_time_ms": 50.0}, "memory": {},
            "kernels": [], "artifacts": {}, "warnings": [],
        }  # fmt: skip
        (folder / f"{run_id}.json").write_text(json.dumps(record))


def timed(what: str, runs: int, calls: int, work: Callable[[], Any]) -> dict[str, Any]:
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        page = work()
        seconds.append(time.perf_counter() - start)
        if page.files != runs or page.skipped:
            raise SystemExit(f"{what}: {page.files} of {runs} files, {page.skipped} skipped")
    return {"runs": runs, "what": what, "calls": calls, "median_s": f"{statistics.median(seconds):.4f}",
            "min_s": f"{min(seconds):.4f}", "max_s": f"{max(seconds):.4f}"}  # fmt: skip


def write(rows: list[dict[str, Any]], results: Path) -> None:
    from speedlab.measure.environment import result_stem

    device = _cpu_name()
    date = time.strftime("%Y-%m-%d")
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{result_stem(device, None)}{date}_library.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({**row, "device": device, "date": date})
            print(f"{row['what']:<34} {row['median_s']} s (min {row['min_s']}, max {row['max_s']})")
    print(path)


def _cpu_name() -> str:
    from speedlab.measure.environment import device_name

    try:
        import torch

        return device_name(torch.device("cpu"))
    except ImportError:
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
