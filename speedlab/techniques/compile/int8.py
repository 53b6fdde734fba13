"""Which layers of a network run in 8 bits, with which ranges: measured on evaluations of the user's own run.

A UNet in 8 bits throughout draws another image, and how much a layer's rounding matters cannot be told from the layer:
what an outer block rounds is seen at once, and much of what an inner one rounds is not. So groups of layers are rounded
and the error of the prediction is measured; the group with the largest error is split, again and again. The layers with
the largest errors stay in floating point until the compiled program's own error, on evaluations that gave no ranges, is
within a limit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .rounding import Range, rounded_input, rounded_weight

# Of an evaluation's rounding twice that of bf16 is allowed. A CPU without bf16 computes it in fp32, without an error.
LIMIT_OF_BF16, LEAST_LIMIT = 2.0, 0.01
# Parts that are small, and in which rounding is seen in each pixel: the step's and size's embeddings, and both ends.
KEPT = ("time_embed.", "label_emb.", ".emb_layers.", "input_blocks.0.", "network.out.")
POINTS, SIDE, SMALL = 8, 64, 32
_MOST_SPLITS, _MOST_PROGRAMS = 24, 5
_TO_AIM_AT = 0.85
# A group whose error is this small beside the limit needs no closer look.
_SMALL_ERROR = 0.15

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Quantised:
    """Ranges of the inputs of those layers that run in 8 bits, by the names of their weights, and what was measured."""

    ranges: Mapping[str, Range]
    layers: int
    kept_by_error: int
    error: float
    bf16: float
    limit: float
    evaluations: int
    seconds: float
    kept: bool = False

    def to_bytes(self) -> bytes:
        """For the disk."""
        return json.dumps({name: value for name, value in asdict(self).items() if name != "kept"}).encode()

    @classmethod
    def from_bytes(cls, data: bytes, kept: bool) -> Quantised:
        """What `to_bytes` wrote; `kept` says that an earlier run did."""
        found = json.loads(data)
        ranges = {name: (low, high) for name, (low, high) in found.pop("ranges").items()}
        return cls(ranges, **found, kept=kept)

    def words(self) -> str:
        """For the record."""
        kept = self.layers - len(self.ranges)
        errors = f"bf16: {self.bf16:.2%}, limit: {self.limit:.2%}"
        measured = f"measured on {self.evaluations} evaluations of the run that was calibrated, in {self.seconds:.1f} s"
        if self.kept:
            measured = f"kept on disk by an earlier run, which measured {self.evaluations} evaluations"
        if not self.ranges:
            return (
                f"none of {self.layers} layers runs in 8 bits, for each choice was beyond the limit ({errors}; "
                f"{measured})"
            )
        return (
            f"{len(self.ranges)} of {self.layers} layers run in 8 bits and {kept} in floating point, "
            f"{self.kept_by_error} of them for their error. Error of the prediction: {self.error:.2%} ({errors}); "
            f"{measured}"
        )


def rules() -> str:
    """By what a choice is made; one that is kept on disk by other rules is not taken. The first number is raised where
    the way of measuring changes."""
    return json.dumps([1, LIMIT_OF_BF16, LEAST_LIMIT, KEPT, POINTS, SIDE, SMALL, _MOST_SPLITS, _MOST_PROGRAMS])


def walk(
    inputs: Inputs, sampling: Any, sigmas: Sequence[float], channels: int, evaluate: Callable[[int, Inputs], Any]
) -> list[Inputs]:
    """Inputs of evaluations at `sigmas`, from the first one's on: Euler steps of each row by itself, without guidance.

    `evaluate` gives the prediction for the inputs at a place of `sigmas`.
    """
    found, x = [], inputs["x"]
    for place, sigma in enumerate(sigmas):
        level = torch.tensor([sigma], dtype=torch.float32, device=x.device).expand(len(x))
        scale = sampling.calculate_input(level[:1], torch.ones(1, 1, 1, 1, device=x.device))
        if place == 0:
            latent = x[:, :channels].float() / scale
        scaled = torch.cat([(latent * scale).to(x.dtype), x[:, channels:]], dim=1)
        given = {**inputs, "x": scaled, "timesteps": sampling.timestep(level).to(inputs["timesteps"].dtype)}
        found.append(given)
        denoised = sampling.calculate_denoised(level, evaluate(place, given).float(), latent)
        after = sigmas[place + 1] if place + 1 < len(sigmas) else sigma
        latent = latent + (latent - denoised) * (after / sigma - 1.0)
    return found


def points(sigmas: torch.Tensor, now: float, least: float) -> list[float]:
    """Some of a run's sigmas from `now` on. A run of very few steps has too few: then more, by equal factors."""
    left = [float(sigma) for sigma in sigmas if least < float(sigma) <= now * (1 + 1e-4)]
    if len(left) < POINTS // 2:
        last = min([now / 4.0, *left[-1:]])
        return [now * (last / now) ** (n / (POINTS // 2 - 1)) for n in range(POINTS // 2)]
    count = min(POINTS, len(left))
    return [left[round(n * (len(left) - 1) / (count - 1))] for n in range(count)]


def of_few_rows(inputs: Inputs) -> Inputs:
    """The first and the last row, which belong to different conds, and of a large latent the first corner."""
    rows = sorted({0, len(inputs["x"]) - 1})
    few = {name: tensor[rows].clone() for name, tensor in inputs.items()}
    # Residuals of a ControlNet are of the whole latent.
    return few if len(few) > len({"x", "timesteps", "context", "y"} & set(few)) else _corner(few, SIDE)


def _corner(inputs: Inputs, side: int) -> Inputs:
    return {**inputs, "x": inputs["x"][:, :, :side, :side].contiguous()}


def calibrate(
    target: torch.nn.Module,
    walked: Callable[[Callable[[int, Inputs], Any]], list[Inputs]],
    compiled: Callable[[Mapping[str, Range], torch.dtype | None], Callable[..., Any]],
    cancel: Callable[[], None],
) -> tuple[Quantised, Callable[..., Any]]:
    """What of `target` runs in 8 bits, and its program. `compiled` makes one with ranges, or of a type that computes;
    `walked` gives inputs of a run. Those at even places give ranges, the others are what errors are measured on."""
    began = time.perf_counter()
    layers = {
        f"{name}.weight": module
        for name, module in target.named_modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
    }
    seen: dict[str, Range] = {}

    def evaluate(place: int, inputs: Inputs) -> Any:
        cancel()
        with _ranges_into(seen, layers if place % 2 == 0 else {}):
            return _first(target(*inputs.values()))

    inputs = walked(evaluate)
    fit = [name for name in seen if not any(word in name for word in KEPT)]
    held = inputs[1::2]
    exact = [_first(program(*given.values())) for program in [compiled({}, torch.float32)] for given in held]

    def error_of(program: Callable[..., Any]) -> float:
        return _error([_first(program(*given.values())) for given in held], exact)

    bf16 = error_of(compiled({}, torch.bfloat16))
    limit = max(LIMIT_OF_BF16 * bf16, LEAST_LIMIT)
    groups = _groups(target, {name: layers[name] for name in fit}, seen, _small(inputs[::2]), limit, cancel)
    aim, error, chosen = _TO_AIM_AT * limit, 0.0, dict(seen)
    for _ in range(_MOST_PROGRAMS):
        cancel()
        chosen = {name: seen[name] for name in fit if name in _within(groups, aim)}
        program = compiled(chosen, None)
        error = error_of(program)
        if error <= limit or not chosen:
            break
        aim *= 0.8 * limit / error
    else:
        chosen, program = {}, compiled({}, None)
    found = Quantised(
        chosen, len(layers), len(fit) - len(chosen), error, bf16, limit, len(inputs), time.perf_counter() - began
    )
    return found, program


def _first(found: Any) -> torch.Tensor:
    return found[0] if isinstance(found, tuple) else found


def _error(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """Root mean square, over the evaluations, of each one's relative error."""
    each = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, exact, strict=True)]
    return (sum(value**2 for value in each) / len(each)) ** 0.5


@contextmanager
def _hooked(handles: Sequence[Any]) -> Iterator[None]:
    """Take hooks away at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _ranges_into(seen: dict[str, Range], layers: Mapping[str, torch.nn.Module]) -> AbstractContextManager[None]:
    """Widen the ranges in `seen` by what the layers get."""

    def look(name: str) -> Callable[[Any, Any], None]:
        def hook(_module: Any, inputs: Any) -> None:
            low, high = (float(end) for end in inputs[0].aminmax())
            before = seen.get(name, (0.0, 0.0))
            seen[name] = min(low, before[0]), max(high, before[1])

        return hook

    return _hooked([module.register_forward_pre_hook(look(name)) for name, module in layers.items()])


def _rounded(layers: Mapping[str, torch.nn.Module], ranges: Mapping[str, Range]) -> AbstractContextManager[None]:
    """The layers compute with inputs and weights of 8 bits."""

    def hook_of(name: str) -> Callable[[Any, Any, Any], torch.Tensor]:
        def hook(module: Any, inputs: Any, _result: Any) -> torch.Tensor:
            kind = inputs[0].dtype
            x, weight = rounded_input(inputs[0].float(), ranges[name]), rounded_weight(module.weight.float())
            if isinstance(module, torch.nn.Linear):
                return torch.nn.functional.linear(x.to(kind), weight.to(kind), module.bias)
            return module._conv_forward(x.to(kind), weight.to(kind), module.bias)

        return hook

    return _hooked([module.register_forward_hook(hook_of(name)) for name, module in layers.items()])


def _small(inputs: Sequence[Inputs]) -> Inputs:
    """One batch of a row from the middle and one from the end of a run: many evaluations need not be large."""
    two = [(inputs[len(inputs) // 2], 0), (inputs[-1], -1)]
    plain = {"x", "timesteps", "context", "y"}
    batch = {name: torch.stack([given[name][row] for given, row in two]) for name in two[0][0]}
    return batch if set(batch) - plain else _corner(batch, SMALL)


def _groups(
    target: torch.nn.Module,
    layers: Mapping[str, torch.nn.Module],
    ranges: Mapping[str, Range],
    inputs: Inputs,
    limit: float,
    cancel: Callable[[], None],
) -> list[tuple[float, list[str]]]:
    """Layers by how much the prediction errs where they are rounded, those with much error by themselves."""
    exact = list(_first(target(*inputs.values())))

    def measured(names: list[str]) -> tuple[float, list[str]]:
        cancel()
        with _rounded({name: layers[name] for name in names}, ranges):
            return _error(list(_first(target(*inputs.values()))), exact), names

    groups = [measured(list(layers))] if layers else []
    for _ in range(_MOST_SPLITS):
        large = [group for group in groups if len(group[1]) > 1 and group[0] > _SMALL_ERROR * limit]
        if not large:
            break
        worst = max(large, key=lambda group: group[0])
        groups.remove(worst)
        middle = len(worst[1]) // 2
        groups += [measured(worst[1][:middle]), measured(worst[1][middle:])]
    return groups


def _within(groups: Sequence[tuple[float, list[str]]], limit: float) -> set[str]:
    """As many layers as err no more than `limit` together; rounding of layers adds up as noise does."""
    chosen: set[str] = set()
    total = 0.0
    for error, names in sorted(groups, key=lambda group: group[0]):
        total += error**2
        if total > limit**2:
            break
        chosen.update(names)
    return chosen
