"""The UNet as it is trained: thin factors in place of large layers, under the names of the checkpoint.

What a factored layer computes is what the merged one computes in ComfyUI, for a fraction of the arithmetic.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..drawn import factors
from ..files import draw
from ..unet import IN_CHANNELS, OUT_CHANNELS

CHANNELS, HEADS, CONTEXT = factors.UNET.model_channels, 8, factors.UNET.context_dim
EMB = 4 * CHANNELS
# What a residual branch adds at the start, of its usual strength.
_GENTLE = 0.2


class Factored(nn.Module):
    """A convolution or a linear layer through `rank` channels."""

    def __init__(self, shape: tuple[int, ...], rank: int, bias: bool, stride: int = 1) -> None:
        super().__init__()
        fan_in = math.prod(shape[1:])
        self.first = nn.Parameter(torch.randn(rank, *shape[1:]) / math.sqrt(fan_in))
        self.second = nn.Parameter(torch.randn(shape[0], rank) / math.sqrt(rank))
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None
        self.stride, self.padding = stride, shape[-1] // 2 if len(shape) == 4 else 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.first.dim() == 2:
            return F.linear(F.linear(x, self.first), self.second, self.bias)
        thin = F.conv2d(x, self.first, None, self.stride, self.padding)
        return F.conv2d(thin, self.second[:, :, None, None], self.bias)


def _conv(name: str, fan_in: int, fan_out: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    shape = (fan_out, fan_in, kernel, kernel)
    rank = factors.rank_of(name, shape)
    if rank is None:
        return nn.Conv2d(fan_in, fan_out, kernel, stride, kernel // 2)
    return Factored(shape, rank, bias=True, stride=stride)


def _linear(name: str, fan_in: int, fan_out: int, bias: bool = True) -> nn.Module:
    rank = factors.rank_of(name, (fan_out, fan_in))
    assert rank is not None
    return Factored((fan_out, fan_in), rank, bias)


class ResBlock(nn.Module):
    def __init__(self, name: str, fan_in: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, fan_in), nn.SiLU(), _conv(f"{name}.in_layers.2", fan_in, CHANNELS)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), _linear(f"{name}.emb_layers.1", EMB, CHANNELS))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, CHANNELS), nn.SiLU(), nn.Identity(), _conv(f"{name}.out_layers.3", CHANNELS, CHANNELS)
        )
        same = fan_in == CHANNELS
        self.skip_connection = nn.Identity() if same else _conv(f"{name}.skip_connection", fan_in, CHANNELS, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    def __init__(self, name: str, context: int) -> None:
        super().__init__()
        self.to_q = _linear(f"{name}.to_q", CHANNELS, CHANNELS, bias=False)
        self.to_k = _linear(f"{name}.to_k", context, CHANNELS, bias=False)
        self.to_v = _linear(f"{name}.to_v", context, CHANNELS, bias=False)
        self.to_out = nn.Sequential(_linear(f"{name}.to_out.0", CHANNELS, CHANNELS))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class _Gated(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.proj = _linear(f"{name}.proj", CHANNELS, 8 * CHANNELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class _FeedForward(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        last = _linear(f"{name}.net.2", 4 * CHANNELS, CHANNELS)
        self.net = nn.Sequential(_Gated(f"{name}.net.0"), nn.Identity(), last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class _Block(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(f"{name}.attn1", CHANNELS), Attention(f"{name}.attn2", CONTEXT)
        self.ff = _FeedForward(f"{name}.ff")
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(CHANNELS) for _ in range(3))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        n = self.norm1(x)
        x = x + self.attn1(n, n)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, CHANNELS, eps=1e-6)
        self.proj_in = _conv(f"{name}.proj_in", CHANNELS, CHANNELS, 1)
        self.transformer_blocks = nn.ModuleList([_Block(f"{name}.transformer_blocks.0")])
        self.proj_out = _conv(f"{name}.proj_out", CHANNELS, CHANNELS, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        h = self.transformer_blocks[0](h, context)
        h = h.transpose(1, 2).unflatten(2, (height, width))
        return x + self.proj_out(h)


class _Plain(nn.Conv2d):
    def forward(self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x)


class _Down(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.op = _conv(f"{name}.op", CHANNELS, CHANNELS, stride=2)

    def forward(self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class _Up(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.conv = _conv(f"{name}.conv", CHANNELS, CHANNELS)

    def forward(self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def embed_time(t: torch.Tensor) -> torch.Tensor:
    """Cosines and sines of the timestep, as Stable Diffusion has them."""
    half = CHANNELS // 2
    angles = t[:, None] * torch.exp(-math.log(10000.0) * torch.arange(half) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class UNet(nn.Module):
    """The UNet of `factors.UNET`, with the checkpoint's names."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        config = factors.UNET
        self.time_embed = nn.Sequential(
            _linear("time_embed.0", CHANNELS, EMB), nn.SiLU(), _linear("time_embed.2", EMB, EMB)
        )
        inputs: list[nn.Module] = [nn.ModuleList([_Plain(IN_CHANNELS, CHANNELS, 3, padding=1)])]
        depths, levels = iter(config.depth_in), len(config.channel_mult)
        for level in range(levels):
            name = f"input_blocks.{len(inputs)}"
            parts: list[nn.Module] = [ResBlock(f"{name}.0", CHANNELS)]
            if next(depths):
                parts.append(Transformer(f"{name}.1"))
            inputs.append(nn.ModuleList(parts))
            if level + 1 < levels:
                inputs.append(nn.ModuleList([_Down(f"input_blocks.{len(inputs)}.0")]))
        self.input_blocks = nn.ModuleList(inputs)
        self.middle_block = nn.ModuleList(
            [ResBlock("middle_block.0", CHANNELS), Transformer("middle_block.1"), ResBlock("middle_block.2", CHANNELS)]
        )
        outputs: list[nn.Module] = []
        depths = iter(config.depth_out)
        for level in reversed(range(levels)):
            for position in range(2):
                name = f"output_blocks.{len(outputs)}"
                parts = [ResBlock(f"{name}.0", 2 * CHANNELS)]
                if next(depths):
                    parts.append(Transformer(f"{name}.1"))
                if level and position:
                    parts.append(_Up(f"{name}.{len(parts)}"))
                outputs.append(nn.ModuleList(parts))
        self.output_blocks = nn.ModuleList(outputs)
        self.out = nn.Sequential(nn.GroupNorm(32, CHANNELS), nn.SiLU(), nn.Conv2d(CHANNELS, OUT_CHANNELS, 3, padding=1))
        self._start(seed)
        torch.random.set_rng_state(state)

    def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The noise in `x` (scaled to a variance of about 1) at timesteps `t`."""
        emb = self.time_embed(embed_time(t))
        skips = []
        for block in self.input_blocks:
            x = _run(block, x, emb, context)
            skips.append(x)
        x = _run(self.middle_block, x, emb, context)
        for block in self.output_blocks:
            x = _run(block, torch.cat([x, skips.pop()], dim=1), emb, context)
        return self.out(x)

    @torch.no_grad()
    def _start(self, seed: int) -> None:
        """Residual branches begin gently. What hands the noise on is the random UNet's, whose detail is left out."""
        for name, parameter in self.named_parameters():
            if name.endswith((".out_layers.3.second", ".proj_out.second", ".to_out.0.second", ".net.2.second")):
                parameter.mul_(_GENTLE)
        own = dict(self.named_parameters())
        layout = factors.unet()
        for name in (*(f"{layer}.{part}" for layer in factors.DENSE for part in ("weight", "bias")),
                     "out.0.weight", "out.0.bias"):  # fmt: skip
            own[name].copy_(draw(name, layout[name], seed, torch.float32, "cpu"))
        group = CHANNELS // 32
        own["out.2.weight"][:, group:] = 0.0
        last = f"output_blocks.{factors.LAST_BLOCK}.0.out_layers.3"
        own[f"{last}.second"][:group] = 0.0


def _run(block: nn.Module, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    assert isinstance(block, nn.ModuleList)
    for part in block:
        x = part(x, emb, context)
    return x
