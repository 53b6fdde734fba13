"""Muon for matrices, Adam for the rest.

Muon makes the momentum of a matrix orthogonal before it is a step, so that every direction is learnt at the same rate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (n, rows, columns) with all singular values near 1, by a Newton-Schulz iteration.

    Every round multiplies by a polynomial of the matrix times its transpose. These commute, so that they are gathered
    on the shorter side, and the matrix itself is multiplied once.
    """
    a, b, c = _COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    square = x @ x.mT
    identity = torch.eye(x.shape[1]).expand_as(square)
    factor = identity
    for _ in range(_ROUNDS):
        this = a * identity + b * square + c * (square @ square)
        factor = this @ factor
        square = this @ square @ this
    x = factor @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Steps of matrices have the size that Adam's would have, so that one learning rate serves both."""

    def __init__(self, named: Iterable[tuple[str, torch.nn.Parameter]], rate: float, decay: float = 0.01) -> None:
        pairs = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        matrices = [p for name, p in pairs if name.endswith((".first", ".second"))]
        others = [p for name, p in pairs if not name.endswith((".first", ".second"))]
        groups = [{"params": matrices, "muon": True}, {"params": others, "muon": False}]
        super().__init__(groups, {"lr": rate, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if group["muon"]:
                self._matrices(group)
            else:
                self._others(group)

    def _matrices(self, group: dict[str, Any], momentum: float = 0.95) -> None:
        alike = defaultdict(list)
        for parameter in group["params"]:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].mul_(momentum).add_(parameter.grad)
            alike[parameter.flatten(1).shape].append(parameter)
        for shape, parameters in alike.items():
            ahead = [p.grad.add(self.state[p]["momentum"], alpha=momentum).flatten(1) for p in parameters]
            scale = 0.2 * max(shape) ** 0.5
            for parameter, update in zip(parameters, orthogonal(torch.stack(ahead)), strict=True):
                parameter.mul_(1 - group["lr"] * group["decay"])
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)

    def _others(self, group: dict[str, Any], first: float = 0.9, second: float = 0.99) -> None:
        for parameter in group["params"]:
            state = self.state[parameter]
            if not state:
                state.update(steps=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
            state["steps"] += 1
            state["mean"].lerp_(parameter.grad, 1 - first)
            state["square"].lerp_(parameter.grad.square(), 1 - second)
            mean = state["mean"] / (1 - first ** state["steps"])
            root = (state["square"] / (1 - second ** state["steps"])).sqrt()
            parameter.sub_(group["lr"] * mean / (root + 1e-8))
