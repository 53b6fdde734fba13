"""`python -m speedlab_tools.synthetic.train STAGE`: see docs/drawn-model.md."""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image

from speedlab.common.errors import SpeedLabError

from ..drawn import packed
from ..drawn.factors import FAMILIES, Model
from . import autoencoder, data, diffusion
from .begin import from_base
from .net import UNet, embed_whole
from .optimiser import Muon
from .state import Training, run

_Net = TypeVar("_Net", bound=torch.nn.Module)
SEED = 0
CAPTIONS = 3000
DROPPED = 0.1
CFG = 3.0
SIDE = 128
SHEET = 16
DECODER_RATE, UNET_RATE = 5e-4, 1e-3


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m speedlab_tools.synthetic.train", description=__doc__)
    parser.add_argument("stage", nargs="?", choices=("all", *STAGES), default="all")
    parser.add_argument("--family", choices=tuple(FAMILIES), default="sd15", help="which of the models (sd15)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the training's state, log and sheets")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--captions", type=int, default=CAPTIONS, help="how many captions to encode and train on")
    parser.add_argument("--until", type=int, default=1000, help="train to this step")
    parser.add_argument(
        "--side", type=int, default=None, help="side of the pictures in pixels (128; to examine: as trained)"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=None)
    parser.add_argument("--cool", type=int, default=None, metavar="STEP", help="let the rate fall from this step on")
    parser.add_argument("--from-noise", action="store_true", help="train on noise with no signal at the last timestep")
    parser.add_argument("--start", type=Path, default=None, help="packed factors to begin with")
    parser.add_argument("--fp32", action="store_true", help="compute in fp32 instead of bf16 autocast")
    parser.add_argument("--packed", type=Path, default=None, help="the packed factors to write or to read")
    parser.add_argument("--raw", action="store_true", help="pack the UNet's last weights instead of their average")
    parser.add_argument("--count", type=int, default=256, help="how many held-out captions to examine")
    parser.add_argument("--cfg", type=float, default=CFG)
    parser.add_argument("--sheet-every", type=int, default=500)
    return parser.parse_args(argv)


def train_decoder(args: argparse.Namespace) -> None:
    """Stage 1: TAESD's decoder."""
    if FAMILIES[args.family].base is not None:
        raise SpeedLabError(f"the family {args.family} has the decoder of the model that it begins with")
    net = _channels_last(autoencoder.decoder(args.seed))
    rate = args.rate or DECODER_RATE
    training = Training(net, torch.optim.Adam(net.parameters(), rate, (0.9, 0.99)), rate, warm_up=50)
    _resume(training, args, "decoder")

    def loss_of(step: int) -> tuple[torch.Tensor, int]:
        noisy, pictures = autoencoder.batch(args.seed, step, args.batch, args.side)
        with _autocast(args):
            loss = autoencoder.loss(net, noisy.to(memory_format=torch.channels_last), pictures)
        return loss, args.batch

    run(training, args.out, "decoder", args.until, loss_of, about={"side": args.side, "batch": args.batch},
        cool_from=args.cool)  # fmt: skip


def train_unet(args: argparse.Namespace) -> None:
    """Stage 2: the UNet."""
    model = FAMILIES[args.family]
    pool = _pool(args, model)
    net = _channels_last(UNet(args.seed, model))
    rate = args.rate or UNET_RATE
    training = Training(net, Muon(net.named_parameters(), rate), rate, warm_up=100)
    if not _resume(training, args, "unet") and model.base is not None:
        training.warm_start(from_base(net, pool, _pool(args, model.base)), 0)
    training.on({"side": args.side, "from_noise": args.from_noise})

    def loss_of(step: int) -> tuple[torch.Tensor, int]:
        clean, context, pooled = pool.batch(args.seed, step, args.batch, args.side, DROPPED)
        rng = data.world.generator(args.seed, data.NOISES, step)
        t = diffusion.draw_timesteps(args.batch, rng)
        noise = torch.from_numpy(rng.standard_normal(clean.shape)).float()
        if args.from_noise:
            noise = diffusion.without_signal(clean, noise)
        noisy = diffusion.add_noise(clean, noise, t).to(memory_format=torch.channels_last)
        whole = embed_whole(pooled, data.draw_sizes(args.batch, rng)) if model.unet.adm_channels else None
        with _autocast(args):
            predicted = net(noisy, torch.from_numpy(t).float(), context, whole)
        return (predicted.float() - noise).square().mean(), args.batch

    def sheet() -> None:
        write_sheet(args, pool, training)

    about = {"side": args.side, "batch": args.batch, "from_noise": int(args.from_noise)}
    run(training, args.out, "unet", args.until, loss_of, about=about,
        sheet=sheet, sheet_every=args.sheet_every, cool_from=args.cool)  # fmt: skip


def write_sheet(args: argparse.Namespace, pool: data.Pool, training: Training) -> None:
    """A sheet of samples of the averaged weights, for captions of the pool."""
    net = _channels_last(UNet(args.seed, pool.model))
    net.load_state_dict(training.ema)
    (context, pooled), (empty, empty_pooled) = pool.given(slice(1, 1 + SHEET)), pool.given(slice(0, 1))
    whole = None
    if pool.model.unet.adm_channels:
        both = torch.cat([pooled, empty_pooled.expand_as(pooled)])
        whole = embed_whole(both, torch.tensor(data.SIZES).float().expand(len(both), -1))
    decoder = autoencoder.decoder(args.seed)
    if pool.model.base is not None:
        decoder.load_state_dict(packed.unpack(packed.load_packed(model=pool.model.base)[0])[1])
    elif (args.out / "decoder.pt").is_file():
        decoder.load_state_dict(torch.load(args.out / "decoder.pt", weights_only=True)["ema"])
    with torch.no_grad(), _autocast(args):
        latents = diffusion.sample(
            lambda x, t, given: net(x, t, given, whole), context, empty, args.side // 8, 25, CFG, seed=args.seed
        )
        pictures = decoder(latents).float().clamp(0, 1)
    rows = pictures.unflatten(0, (-1, 8)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    (args.out / "sheets").mkdir(exist_ok=True)
    path = args.out / "sheets" / f"{training.step:06d}.png"
    Image.fromarray((rows * 255).round().to(torch.uint8).numpy()).save(path)


def _pool(args: argparse.Namespace, model: Model, encode: data.Encode | None = None) -> data.Pool:
    """The captions of a model; those of its base, which it begins with, lie beside its own."""
    name = "captions" if model is FAMILIES[args.family] else f"captions_{model.family}"
    return data.open_pool(args.out / name, args.seed, args.captions, encode, model=model)


def _channels_last(net: _Net) -> _Net:
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _resume(training: Training, args: argparse.Namespace, stage: str) -> bool:
    """Go on with the folder's state; where there is none, begin with packed factors if any are named."""
    path = args.out / f"{stage}.pt"
    if path.is_file():
        training.load(path)
    elif args.start is not None:
        tensors, about = packed.load_packed(args.start, FAMILIES[args.family])
        unet, decoder = packed.unpack(tensors)
        if stage == "unet":
            training.warm_start(unet, int(about["step"]))
        else:
            training.warm_start(decoder, 0)
    return path.is_file() or args.start is not None


def _autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=not args.fp32)


def encode_captions(args: argparse.Namespace) -> None:
    """Stage 0: ComfyUI's text encoders on every caption, once."""
    from .captions import encoder

    model = FAMILIES[args.family]
    for each in (model, model.base):
        if each is not None:
            _pool(args, each, encoder(args.out, each))


def pack(args: argparse.Namespace) -> None:
    """Stage 3: the averaged weights in 8 bits."""
    model = FAMILIES[args.family]
    stages = ("decoder", "unet") if model.base is None else ("unet",)
    for stage in stages:
        if not (args.out / f"{stage}.pt").is_file():
            raise SpeedLabError(f"{args.out} holds no trained {stage}; run the stage {stage} first")
    kept = {stage: torch.load(args.out / f"{stage}.pt", weights_only=True) for stage in stages}
    decoder = kept["decoder"]["ema"] if "decoder" in kept else {}
    tensors = packed.pack(kept["unet"]["net" if args.raw else "ema"], decoder, model)
    path = args.packed or model.packed
    packed.save_packed(path, tensors, kept["unet"]["step"], side_of(args.out), model)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, step {kept['unet']['step']}")


def side_of(folder: Path) -> int:
    """The side of the pictures that the UNet was trained on last, from its log."""
    with (folder / "unet.csv").open(newline="") as file:
        return int(list(csv.DictReader(file))[-1]["side"])


def examine(args: argparse.Namespace) -> None:
    """Stage 4: ComfyUI's own sampling of held-out captions, read by the examiner."""
    from .examine import examine as read

    model = FAMILIES[args.family]
    side = args.side or int(packed.load_packed(args.packed, model)[1]["side"])
    read(args.packed, args.out, args.seed, args.count, side, args.cfg, model)


STAGES = {
    "captions": encode_captions, "decoder": train_decoder, "unet": train_unet, "pack": pack, "examine": examine,
}  # fmt: skip
# What `all` runs. Pictures of 64x64 teach words, colours and places for a quarter of the arithmetic.
Plan = tuple[tuple[str, dict[str, float]], ...]
PLAN: Plan = (
    ("captions", {}),
    ("decoder", {"side": 128, "batch": 8, "until": 2500, "cool": 2000}),
    ("unet", {"side": 64, "batch": 32, "until": 1500}),
    ("unet", {"side": 128, "batch": 24, "until": 2700}),
    ("unet", {"side": 256, "batch": 8, "until": 3600, "cool": 3100}),
    ("unet", {"side": 256, "batch": 8, "until": 4400, "cool": 4000, "rate": 7e-4, "from_noise": True}),
    ("pack", {}),
    ("examine", {}),
)
# What is taken of a base knows pictures of 256x256 from noise, and begins there.
PLAN_WITH_BASE: Plan = (
    ("captions", {"captions": 1000}),
    ("unet", {"captions": 1000, "side": 256, "batch": 8, "until": 400, "cool": 250, "rate": 7e-4, "from_noise": True}),
    ("pack", {}),
    ("examine", {}),
)


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    plan = PLAN if FAMILIES[args.family].base is None else PLAN_WITH_BASE
    try:
        for stage, changes in plan if args.stage == "all" else ((args.stage, {}),):
            given = argparse.Namespace(**{**vars(args), **changes})
            if stage != "examine":
                given.side = given.side or SIDE
            STAGES[stage](given)
    except (SpeedLabError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    raise SystemExit(main())
