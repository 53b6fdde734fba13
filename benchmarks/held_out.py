"""Whether Tune's floor holds on seeds that it has not seen, drawn from what `quality.py --model drawn` kept.

    python benchmarks/held_out.py [--work DIR]

Each draw stands for a tune: two images for the choice and two held-out ones of those that were kept; the fastest plan
that holds the floor on both pairs is taken, as Tune takes it, and then judged by all other images. No tune runs: every
plan is known on every image, so that nothing depends on which plans a search tries. Writes `tune-held-out`.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import random
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import inprocess

from speedlab.measure.environment import cpu_name, result_stem
from speedlab.plans.tune_request import HELD_OUT
from speedlab.plans.tune_search import FLOORS, Floor, Look, Tried, holds
from speedlab.plans.tune_space import Candidate
from speedlab_tools.host import cache_root

CHOICE, DRAWS = 2, 1000
COLUMNS = ["sampler", "scheduler", "steps", "quality", "images", "plans", "draws", "with_a_choice", "held",
           "chosen_most", "date"]  # fmt: skip
Plan = Mapping[int, Look]


def plans_of(lines: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], dict[str, Plan]]:
    """Of each sampler the plans that have every image, by way, setting and guidance."""
    found: dict[tuple[Any, ...], dict[str, dict[int, Look]]] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        *place, image = json.loads(line["key"])
        if place[0] != "behaviour" and "refused" not in line:
            look = Look(line["cpu_s"], line["latent"], line["ssim"], line["psnr"])
            found[tuple(place[:3])][" ".join(filter(None, place[3:]))][image] = look
    return {
        case: {name: plan for name, plan in plans.items() if len(plan) == max(map(len, plans.values()))}
        for case, plans in found.items()
    }


def _within(plan: Plan, images: Sequence[int], floor: Floor) -> bool:
    return holds(Tried(Candidate(""), 0.0, {image: plan[image] for image in images}).mean, floor)


def drawn(plans: Mapping[str, Plan], floor: Floor, seed: int) -> tuple[str, bool] | None:
    """The choice of one draw, and whether it holds the floor on the images that it was not drawn with."""
    every = sorted(next(iter(plans.values())))
    seen = random.Random(seed).sample(every, CHOICE + HELD_OUT)
    good = [name for name, plan in plans.items()
            if _within(plan, seen[:CHOICE], floor) and _within(plan, seen[CHOICE:], floor)]  # fmt: skip
    if not good:
        return None
    best = min(good, key=lambda name: statistics.median(plans[name][image].seconds for image in seen))
    return best, _within(plans[best], [image for image in every if image not in seen], floor)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--work", type=Path, default=cache_root() / "quality-drawn")
    options.add_argument("--results", type=Path, default=inprocess.ROOT / "benchmarks" / "results")
    args = options.parse_args()
    files = sorted(args.work.glob("*/images.jsonl"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise SystemExit(f"{args.work} holds nothing: run `python benchmarks/quality.py --model drawn` first.")
    date = datetime.date.today().isoformat()
    with (args.results / f"{result_stem(cpu_name(), None)}{date}_tune-held-out.csv").open(
        "w", encoding="utf-8", newline=""
    ) as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for case, plans in plans_of([json.loads(line) for line in files[-1].read_text().splitlines()]).items():
            for quality in ("close", "similar"):
                chosen = [one for seed in range(DRAWS) if (one := drawn(plans, FLOORS[quality], seed)) is not None]
                names = [name for name, _ in chosen]
                row = dict(zip(COLUMNS, (
                    *case, quality, len(next(iter(plans.values()))), len(plans), DRAWS, len(chosen),
                    f"{statistics.fmean(held for _, held in chosen):.4f}" if chosen else "",
                    max(names, key=names.count, default=""), date,
                ), strict=True))  # fmt: skip
                writer.writerow(row)
                print(*row.values())


if __name__ == "__main__":
    main()
