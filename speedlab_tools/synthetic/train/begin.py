"""Where a model with a base begins: with the base's weights, and its attention fitted to the other text encoders."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

from ..drawn import factors, packed
from ..drawn.factors import Tensors
from .data import Pool
from .net import UNet

# Of the mean square of the encodings: enough that directions which captions hardly use stay small.
_RIDGE = 1e-3
_ROWS = 64


def from_base(net: UNet, own: Pool, theirs: Pool) -> Tensors:
    """Weights to begin with. `own` and `theirs` are the same captions in the encodings of the model and of its base.

    Keys and values read the base's encodings, as far as a matrix finds these in the model's own. Heads are cut anew
    from the same channels.
    """
    model, base = net.model, net.model.base
    assert base is not None
    unet = packed.unpack(packed.load_packed(model=base)[0])[0]
    seen = translation(_tokens(own), _tokens(theirs))
    given = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for name, tensor in factors.with_base(given, unet, model).items():
        source = model.source(name)
        value = tensor if source is None or model.shares(name) else unet[source]
        if name.endswith((".attn2.to_k.first", ".attn2.to_v.first")) and source is not None:
            value = value @ seen.T
        elif name.endswith(".to_q.second") and source is not None:
            value = value * math.sqrt(base.heads / model.heads)  # logits are divided by the root of a head's width
        given[name] = value.reshape(given[name].shape)
    return given


def _tokens(pool: Pool) -> Iterator[torch.Tensor]:
    for start in range(0, len(pool.encoded), _ROWS):
        yield pool.given(slice(start, start + _ROWS))[0].flatten(0, 1)


def translation(own: Iterable[torch.Tensor], theirs: Iterable[torch.Tensor]) -> torch.Tensor:
    """The matrix (own width x their width) that makes `theirs` of `own` with the least square error."""
    squares = torch.zeros((), dtype=torch.float64)
    both = torch.zeros((), dtype=torch.float64)
    for x, y in zip(own, theirs, strict=True):
        squares = squares + x.T @ x
        both = both + x.T @ y
    squares.diagonal().add_(_RIDGE * squares.diagonal().mean())
    return torch.linalg.solve(squares, both).float()
