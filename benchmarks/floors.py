"""Sets Tune's limits from what `quality.py --model drawn` kept: speedlab/plans/floors.json.

    python benchmarks/floors.py [--work DIR]

A plan is a way with its setting, guidance and sampler, over all its images. `close` is the largest distance up to which
plans lose at most 1 % of the attributes that all steps have right (nine of ten plans at most 3 %), `similar` 5 % (nine
of ten 12 %). SSIM and PSNR are where nine of ten plans within that distance lie. `exact` is rounding and stays, and so
does LPIPS, which this pack does not measure here.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import inprocess

from speedlab_tools.host import cache_root

FLOORS = inprocess.ROOT / "speedlab" / "plans" / "floors.json"
HELP = [inprocess.ROOT / "js" / "docs" / page for page in ("SpeedLabTune.md", "SpeedLabTune/zh.md")]
# What is lost of the attributes that all steps have right: the mean of the plans, and of all but the worst tenth.
LOSSES = {"close": (0.01, 0.03), "similar": (0.05, 0.12)}
LEAST_PLANS = 8


@dataclass(frozen=True)
class Plan:
    """Means over a plan's images; `lost` is a share of the attributes."""

    latent: float
    ssim: float
    mse: float
    lost: float


def plans_of(lines: Sequence[dict[str, Any]]) -> list[Plan]:
    """Every lossy plan of a file of `quality.py`, beside the images of all steps."""
    images: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in lines:
        *place, image = json.loads(line["key"])
        if place[0] != "behaviour" and "refused" not in line:
            images[tuple(place)][image] = line
    found = []
    for place, mine in images.items():
        whole = images.get((*place[:3], "all steps", "", ""), {})
        shared = sorted(mine.keys() & whole.keys())
        if place[3:] == ("all steps", "", "") or not shared:
            continue
        right, before = (sum(some[n]["right"] / some[n]["asked"] for n in shared) for some in (mine, whole))
        found.append(
            Plan(
                statistics.fmean(mine[n]["latent"] for n in shared),
                statistics.fmean(mine[n]["ssim"] for n in shared),
                statistics.fmean(10.0 ** (-mine[n]["psnr"] / 10.0) for n in shared),
                (before - right) / len(shared),
            )
        )
    return sorted(found, key=lambda plan: plan.latent)


def floor_of(plans: Sequence[Plan], loss: tuple[float, float]) -> dict[str, float] | None:
    """The largest distance within the loss, with SSIM and PSNR of the plans inside it; None where it is not measured.

    Where all plans are within the loss, the limit lies beyond them.
    """
    mean, most = loss
    lost = [plan.lost for plan in plans]
    held = [
        count for count in range(LEAST_PLANS, len(plans) + 1)
        if statistics.fmean(lost[:count]) <= mean and _worst_tenth(sorted(lost[:count])) <= most
    ]  # fmt: skip
    if not held or held[-1] == len(plans):
        return None
    inside = plans[: held[-1]]
    return {
        "latent": _two_digits(inside[-1].latent),
        "ssim": round(1.0 - _worst_tenth(sorted(1.0 - plan.ssim for plan in inside)), 2),
        "psnr": round(-10.0 * math.log10(_worst_tenth(sorted(plan.mse for plan in inside)))),
    }


def _worst_tenth(ordered: Sequence[float]) -> float:
    return ordered[min(math.ceil(0.9 * len(ordered)), len(ordered) - 1)]


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--work", type=Path, default=cache_root() / "quality-drawn")
    options.add_argument("--to", type=Path, default=FLOORS, help="the table to change")
    args = options.parse_args()
    files = sorted(args.work.glob("*/images.jsonl"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise SystemExit(f"{args.work} holds nothing: run `python benchmarks/quality.py --model drawn` first.")
    plans = plans_of([json.loads(line) for line in files[-1].read_text().splitlines()])
    table = json.loads(FLOORS.read_text())
    for name, loss in LOSSES.items():
        found = floor_of(plans, loss)
        if found is None:
            raise SystemExit(f"{len(plans)} plans do not tell where {name} ends: measure more of them.")
        table["floors"][name] |= found
        print(name, table["floors"][name])
    date = datetime.date.today().isoformat()
    table["calibrated"] = f"on {len(plans)} plans of the model that draws, {date}"
    args.to.write_text(text_of(table), encoding="utf-8")
    if args.to == FLOORS:
        for page in HELP:
            page.write_text(with_floors(page.read_text(encoding="utf-8"), table["floors"]), encoding="utf-8")


def text_of(table: dict[str, Any]) -> str:
    """The file's text, a floor a line."""
    lines = ",\n".join(f'  "{name}": {json.dumps(limits)}' for name, limits in table["floors"].items())
    return f'{{\n "calibrated": {json.dumps(table["calibrated"])},\n "floors": {{\n{lines}\n }}\n}}\n'


def with_floors(page: str, floors: dict[str, dict[str, float]]) -> str:
    """A help page with these limits in its table."""
    for name, limits in floors.items():
        row = f"| `{name}` | {limits['latent']:g} | {limits['ssim']:g} | {limits['psnr']:g} dB | {limits['lpips']:g} |"
        page = re.sub(rf"^\| `{name}` \|.*$", row, page, flags=re.MULTILINE)
    return page


if __name__ == "__main__":
    main()
