"""The UNet as it is trained: thin factors in place of large layers, under the names of the checkpoint.

What a factored layer computes is what the merged one computes in ComfyUI, for a fraction of the arithmetic.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..drawn import factors
from ..drawn.factors import SD15, Model
from ..files import draw
from ..unet import IN_CHANNELS, OUT_CHANNELS

# Of every model that draws, on every level.
CHANNELS = SD15.unet.model_channels
EMB = 4 * CHANNELS
_SIZE_WIDTH = 256
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


def _conv(model: Model, name: str, fan_in: int, fan_out: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    shape = (fan_out, fan_in, kernel, kernel)
    rank = factors.rank_of(name, shape, model)
    if rank is None:
        return nn.Conv2d(fan_in, fan_out, kernel, stride, kernel // 2)
    return Factored(shape, rank, bias=True, stride=stride)


def _linear(model: Model, name: str, fan_in: int, fan_out: int, bias: bool = True) -> nn.Module:
    rank = factors.rank_of(name, (fan_out, fan_in), model)
    assert rank is not None
    return Factored((fan_out, fan_in), rank, bias)


def _mlp(model: Model, name: str, fan_in: int) -> nn.Sequential:
    return nn.Sequential(_linear(model, f"{name}.0", fan_in, EMB), nn.SiLU(), _linear(model, f"{name}.2", EMB, EMB))


class _HandsOn(nn.Module):
    """The skip connection of a block that leaves out the skip."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :CHANNELS]


class ResBlock(nn.Module):
    def __init__(self, model: Model, name: str, fan_in: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, fan_in), nn.SiLU(), _conv(model, f"{name}.in_layers.2", fan_in, CHANNELS)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), _linear(model, f"{name}.emb_layers.1", EMB, CHANNELS))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, CHANNELS), nn.SiLU(), nn.Identity(),
            _conv(model, f"{name}.out_layers.3", CHANNELS, CHANNELS),
        )  # fmt: skip
        skip = f"{name}.skip_connection"
        if fan_in == CHANNELS:
            self.skip_connection: nn.Module = nn.Identity()
        else:
            self.skip_connection = _HandsOn() if model.hands_on(skip) else _conv(model, skip, fan_in, CHANNELS, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    def __init__(self, model: Model, name: str, context: int) -> None:
        super().__init__()
        self.heads = model.heads
        self.to_q = _linear(model, f"{name}.to_q", CHANNELS, CHANNELS, bias=False)
        self.to_k = _linear(model, f"{name}.to_k", context, CHANNELS, bias=False)
        self.to_v = _linear(model, f"{name}.to_v", context, CHANNELS, bias=False)
        self.to_out = nn.Sequential(_linear(model, f"{name}.to_out.0", CHANNELS, CHANNELS))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class _Gated(nn.Module):
    def __init__(self, model: Model, name: str) -> None:
        super().__init__()
        self.proj = _linear(model, f"{name}.proj", CHANNELS, 8 * CHANNELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class _FeedForward(nn.Module):
    def __init__(self, model: Model, name: str) -> None:
        super().__init__()
        last = _linear(model, f"{name}.net.2", 4 * CHANNELS, CHANNELS)
        self.net = nn.Sequential(_Gated(model, f"{name}.net.0"), nn.Identity(), last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class _Block(nn.Module):
    def __init__(self, model: Model, name: str) -> None:
        super().__init__()
        self.attn1 = Attention(model, f"{name}.attn1", CHANNELS)
        self.attn2 = Attention(model, f"{name}.attn2", model.unet.context_dim)
        self.ff = _FeedForward(model, f"{name}.ff")
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(CHANNELS) for _ in range(3))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        n = self.norm1(x)
        x = x + self.attn1(n, n)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    def __init__(self, model: Model, name: str, depth: int) -> None:
        super().__init__()
        self.linear = model.unet.linear_projection
        self.norm = nn.GroupNorm(32, CHANNELS, eps=1e-6)
        self.proj_in = self._projection(model, f"{name}.proj_in")
        self.transformer_blocks = nn.ModuleList(
            [_Block(model, f"{name}.transformer_blocks.{number}") for number in range(depth)]
        )
        self.proj_out = self._projection(model, f"{name}.proj_out")

    def forward(self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        h = self.norm(x)
        h = self.proj_in(_rows(h)) if self.linear else _rows(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h) if self.linear else h
        h = h.transpose(1, 2).unflatten(2, (height, width))
        return x + (h if self.linear else self.proj_out(h))

    def _projection(self, model: Model, name: str) -> nn.Module:
        if self.linear:
            return _linear(model, name, CHANNELS, CHANNELS)
        return _conv(model, name, CHANNELS, CHANNELS, 1)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).transpose(1, 2)


class _Plain(nn.Conv2d):
    def forward(self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x)


class _Down(nn.Module):
    def __init__(self, model: Model, name: str) -> None:
        super().__init__()
        self.op = _conv(model, f"{name}.op", CHANNELS, CHANNELS, stride=2)

    def forward(self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class _Up(nn.Module):
    def __init__(self, model: Model, name: str) -> None:
        super().__init__()
        self.conv = _conv(model, f"{name}.conv", CHANNELS, CHANNELS)

    def forward(self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def embed_time(t: torch.Tensor, width: int = CHANNELS) -> torch.Tensor:
    """Cosines and sines of timesteps, as Stable Diffusion has them; of sizes too, in SDXL."""
    half = width // 2
    angles = t[:, None] * torch.exp(-math.log(10000.0) * torch.arange(half) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def embed_whole(pooled: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """What SDXL is told beside the tokens: the whole text's encoding, and six sizes an image (n, 6)."""
    return torch.cat([pooled, embed_time(sizes.flatten(), _SIZE_WIDTH).unflatten(0, sizes.shape).flatten(1)], dim=1)


class UNet(nn.Module):
    """A model's UNet, with the checkpoint's names."""

    def __init__(self, seed: int = 0, model: Model = SD15) -> None:
        super().__init__()
        state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        self.model, config = model, model.unet
        self.time_embed = _mlp(model, "time_embed", CHANNELS)
        if config.adm_channels is not None:
            self.label_emb = nn.Sequential(_mlp(model, "label_emb.0", config.adm_channels))
        inputs: list[nn.Module] = [nn.ModuleList([_Plain(IN_CHANNELS, CHANNELS, 3, padding=1)])]
        depths, levels = iter(config.depth_in), len(config.channel_mult)
        for level in range(levels):
            for _ in range(config.num_res_blocks):
                name = f"input_blocks.{len(inputs)}"
                parts: list[nn.Module] = [ResBlock(model, f"{name}.0", CHANNELS)]
                if depth := next(depths):
                    parts.append(Transformer(model, f"{name}.1", depth))
                inputs.append(nn.ModuleList(parts))
            if level + 1 < levels:
                inputs.append(nn.ModuleList([_Down(model, f"input_blocks.{len(inputs)}.0")]))
        self.input_blocks = nn.ModuleList(inputs)
        middle: list[nn.Module] = [ResBlock(model, "middle_block.0", CHANNELS)]
        if config.depth_middle >= 0:
            middle.append(Transformer(model, "middle_block.1", config.depth_middle))
            middle.append(ResBlock(model, "middle_block.2", CHANNELS))
        self.middle_block = nn.ModuleList(middle)
        outputs: list[nn.Module] = []
        depths = iter(config.depth_out)
        for level in reversed(range(levels)):
            for position in range(config.num_res_blocks + 1):
                name = f"output_blocks.{len(outputs)}"
                parts = [ResBlock(model, f"{name}.0", 2 * CHANNELS)]
                if depth := next(depths):
                    parts.append(Transformer(model, f"{name}.1", depth))
                if level and position == config.num_res_blocks:
                    parts.append(_Up(model, f"{name}.{len(parts)}"))
                outputs.append(nn.ModuleList(parts))
        self.output_blocks = nn.ModuleList(outputs)
        self.out = nn.Sequential(nn.GroupNorm(32, CHANNELS), nn.SiLU(), nn.Conv2d(CHANNELS, OUT_CHANNELS, 3, padding=1))
        self._start(seed)
        torch.random.set_rng_state(state)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, whole: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The noise in `x` (scaled to a variance of about 1) at timesteps `t`; `whole`: see `embed_whole`."""
        emb = self.time_embed(embed_time(t))
        if whole is not None:
            emb = emb + self.label_emb(whole)
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
        """Residual branches begin gently, and where they are added to a trained model at nothing. What hands the noise
        on is the random UNet's, whose detail is left out."""
        for name, parameter in self.named_parameters():
            if name.endswith((".out_layers.3.second", ".proj_out.second", ".to_out.0.second", ".net.2.second")):
                parameter.mul_(0.0 if self._is_added(name) else _GENTLE)
            elif name == "label_emb.0.2.second":
                parameter.zero_()
            parameter.requires_grad_(not self.model.shares(name))
        own = dict(self.named_parameters())
        layout = factors.unet(self.model)
        for name in (*(f"{layer}.{part}" for layer in self.model.dense for part in ("weight", "bias")),
                     "out.0.weight", "out.0.bias"):  # fmt: skip
            own[name].copy_(draw(name, layout[name], seed, torch.float32, "cpu"))
        group = CHANNELS // 32
        own["out.2.weight"][:, group:] = 0.0
        last = f"output_blocks.{self.model.last_block}.0.out_layers.3"
        own[f"{last}.second"][:group] = 0.0

    def _is_added(self, branch: str) -> bool:
        """Whether a branch is the way from what is added into what is the base's."""
        whole, inside, _ = branch.partition(".transformer_blocks.")
        into_base = not inside or self.model.source(f"{whole}.proj_out.second") is not None
        return self.model.base is not None and self.model.source(branch) is None and into_base


def _run(block: nn.Module, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    assert isinstance(block, nn.ModuleList)
    for part in block:
        x = part(x, emb, context)
    return x
