"""Attention on a CPU out of oneDNN's matrix products, a block of scores at a time.

SDPA's kernel for CPUs hands small products to MKL, which leaves the wide vector units of other makers' processors
unused (see `onednn_linear`). Here the scores of as many queries as stay in the cache are made, weighted and used before
the next ones (the tiling of Rabe and Staats, 2021, along the queries alone), all of it in fp32 whatever the model's
dtype: equal to SDPA to rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .layer_forwards import is_traced
from .onednn_linear import linear, why_not

# Scores in one block: 4 MB of fp32, which a core's share of the cache holds.
_SCORES = 1 << 20
_FEWEST_QUERIES = 64


def missing(device: torch.device) -> str | None:
    """What this attention lacks on a device; None where it can run."""
    if device.type != "cpu":
        return f"it is for processors, and this model runs on {device.type}"
    return why_not() or None


def onednn_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """Attention of q [B, H, queries, size], k and v [B, H, keys, size] without a mask; q's dtype and shape.

    Inside code that a compiler traces it is SDPA, which the compiler knows.
    """
    if is_traced():
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    batch, heads, queries, size = q.shape
    keys, width = k.shape[-2], v.shape[-1]
    rows = min(queries, max(_FEWEST_QUERIES, _SCORES // max(keys, 1)))
    scaled = q.float() * (size**-0.5 if scale is None else scale)
    # Tokens first, as the layer behind reads it.
    out = torch.empty(batch, queries, heads, width, dtype=q.dtype, device=q.device)
    for picture in range(batch):
        for head in range(heads):
            query, key = scaled[picture, head].contiguous(), k[picture, head].float().contiguous()
            value = v[picture, head].float().t().contiguous()
            for start in range(0, queries, rows):
                part = slice(start, start + rows)
                out[picture, part, head] = linear(torch.softmax(linear(query[part], key), dim=-1), value)
    return out.transpose(1, 2)
