"""The state of a training on disk: it goes on exactly where it stopped."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

_EMA = 0.999
SAVE_SECONDS = 240.0


@dataclass
class Training:
    """A network with its optimiser, its average and how far it is. All randomness follows seed and step."""

    net: nn.Module
    optimiser: torch.optim.Optimizer
    rate: float
    warm_up: int
    step: int = 0
    begun: int = 0  # the step at which the optimiser began, and with it the rate's warm-up
    averaged: int = 0  # the step at which the average began
    images: int = 0
    seconds: float = 0.0
    pictures: dict[str, Any] = field(default_factory=dict)  # what the pictures are like that the average is of
    ema: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ema = self.ema or {name: tensor.clone() for name, tensor in self.net.state_dict().items()}

    def learn(self, loss: torch.Tensor, last: float = 1.0) -> None:
        """One step; `last` lowers the rate towards the end."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.step += 1
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * min(1.0, (self.step - self.begun) / self.warm_up) * last
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        averaged = self.step - self.averaged
        keep = min(_EMA, (1 + averaged) / (10 + averaged))
        own = self.net.state_dict()
        get_ema_multi_avg_fn(keep)(list(self.ema.values()), [own[name] for name in self.ema], self.step)

    def save(self, path: Path) -> None:
        """Write the state; the file is whole or the one before."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        torch.save(
            {
                "net": self.net.state_dict(), "optimiser": self.optimiser.state_dict(), "ema": self.ema,
                "step": self.step, "begun": self.begun, "averaged": self.averaged, "images": self.images,
                "seconds": self.seconds, "pictures": self.pictures,
            },
            temporary,
        )  # fmt: skip
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Go on with a state that `save` wrote."""
        kept = torch.load(path, map_location="cpu", weights_only=True)
        self.net.load_state_dict(kept["net"])
        self.optimiser.load_state_dict(kept["optimiser"])
        self.ema = kept["ema"]
        self.step, self.begun, self.averaged = kept["step"], kept.get("begun", 0), kept.get("averaged", 0)
        self.images, self.seconds, self.pictures = kept["images"], kept["seconds"], kept.get("pictures", {})

    def warm_start(self, tensors: Mapping[str, torch.Tensor], step: int) -> None:
        """Begin with these weights, as packed at a step; the optimiser begins anew."""
        self.step = self.begun = step
        self.net.load_state_dict(dict(tensors))
        self._average_anew()

    def on(self, pictures: dict[str, Any]) -> None:
        """Say what the pictures are like from here on. Weights that were trained on others would stay in the average
        for long, so it begins anew."""
        if pictures.items() - self.pictures.items():
            self.pictures = pictures
            self._average_anew()

    def _average_anew(self) -> None:
        self.averaged = self.step
        self.ema = {name: tensor.clone() for name, tensor in self.net.state_dict().items()}


def run(
    training: Training,
    folder: Path,
    name: str,
    until: int,
    loss_of: Callable[[int], tuple[torch.Tensor, int]],
    *,
    about: Mapping[str, Any],
    every: int = 20,
    sheet: Callable[[], None] | None = None,
    sheet_every: int = 500,
    cool_from: int | None = None,
) -> None:
    """Train to step `until`. `loss_of(step)` gives the loss and how many pictures it saw.

    From step `cool_from` on the rate falls to a twentieth. Losses go to `<name>.csv`, the state to `<name>.pt`.
    """
    state = folder / f"{name}.pt"
    saved = started = time.monotonic()
    before, losses = training.seconds, []
    while training.step < until:
        loss, images = loss_of(training.step)
        last = 1.0
        if cool_from is not None and training.step >= cool_from:
            last = 1.0 - 0.95 * (training.step - cool_from + 1) / (until - cool_from)
        training.learn(loss, last)
        training.images += images
        losses.append(loss.item())
        now = time.monotonic()
        training.seconds = before + now - started
        if training.step % every == 0 or training.step == until:
            row = {
                "step": training.step, "images": training.images, "seconds": round(training.seconds),
                "loss": round(sum(losses) / len(losses), 5), "rate": training.optimiser.param_groups[0]["lr"], **about,
            }  # fmt: skip
            _append(folder / f"{name}.csv", row)
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            losses.clear()
        if sheet is not None and training.step % sheet_every == 0:
            sheet()
        if now - saved > SAVE_SECONDS or training.step == until:
            training.save(state)
            saved = now


def _append(path: Path, row: Mapping[str, Any]) -> None:
    before: list[dict[str, Any]] = []
    if path.is_file():
        with path.open(newline="") as file:
            before = list(csv.DictReader(file))
    if before and list(before[0]) == list(row):
        before = []
        mode = "a"
    else:  # begun, or by an earlier version without all columns
        mode = "w"
    with path.open(mode, newline="") as file:
        writer = csv.DictWriter(file, list(row), restval=0, extrasaction="ignore")
        if mode == "w":
            writer.writeheader()
        writer.writerows([*before, row])
