"""Peak memory and time of decoding on a CPU, and of a staged batch against pictures one by one.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/memory.py [--cells SUBSTRING] [--long]

Every cell runs in a fresh process: models are loaded, a small decode warms up the libraries, the kernel's high-water
mark of the resident set is reset, and then the cell runs. `peak_rss_gb` is that mark, so it counts every page that the
process touched, mapped files too; a thread beside it samples how much of it was anonymous memory (`peak_anon_gb`) and
how much mapped files (`peak_file_gb`). `over_gb` is the peak above what the process held before. Results go to one
CSV; cells that it holds already are not run again. `--long` adds the tiled decode of 4096x4096 pixels.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import inprocess

# A script's folder comes first on the path, and a script beside this one has the name of a package that ComfyUI uses.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

VAE, CHECKPOINT = "speedlab_demo_vae.safetensors", "speedlab_demo_vega.safetensors"
PROMPTS = ("a tree", "a house by the sea", "a dog", "a bee on lavender")
SAMPLE_EVERY_S = 0.005
FIELDS = ("peak_rss_gb", "over_gb", "before_gb", "peak_anon_gb", "peak_file_gb", "pictures_gb")


@dataclass(frozen=True)
class Cell:
    """One measurement. `what` is full, tiny, core_tiny, staged or one_by_one; sizes are pixels."""

    what: str
    size: int
    batch: int = 1
    slicing: bool = False
    tile_size: int = 0
    steps: int = 0

    @property
    def name(self) -> str:
        """What the CSV and `--cells` know it by."""
        way = "-sliced" if self.slicing else f"-tile{self.tile_size}" if self.tile_size else ""
        return f"{self.what}{way}-{self.size}-b{self.batch}"


CELLS = (
    Cell("full", 512),
    Cell("full", 1024),
    Cell("full", 256, batch=16),
    *(Cell("full", 256, batch=batch, slicing=True) for batch in (1, 4, 16)),
    Cell("full", 1024, tile_size=512),
    Cell("full", 2048, tile_size=512),
    *(Cell("tiny", size) for size in (512, 1024, 2048, 4096)),
    Cell("tiny", 512, batch=16),
    *(Cell("core_tiny", size) for size in (512, 1024, 2048)),
    Cell("one_by_one", 256, batch=len(PROMPTS), steps=4),
    Cell("staged", 256, batch=len(PROMPTS), steps=4),
)
LONG_CELLS = (Cell("full", 4096, tile_size=512),)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cells", default="", metavar="SUBSTRING", help="only the cells whose name holds this")
    options.add_argument("--size", type=int, metavar="N", help="try out: no picture larger than this")
    options.add_argument("--long", action="store_true", help="also the cells that take half an hour")
    options.add_argument("--base", type=Path, default=Path.home() / ".cache" / "speedlab" / "benchmarks")
    options.add_argument("--results", type=Path, default=inprocess.ROOT / "benchmarks" / "results")
    options.add_argument("--csv", type=Path, help="go on with this file instead of today's")
    options.add_argument("--run", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.run:
        print(json.dumps(run_cell(Cell(**json.loads(args.run)), args.base)))
        return
    cells = [cell for cell in (*CELLS, *(LONG_CELLS if args.long else ())) if args.cells in cell.name]
    if args.size:
        cells = [cell for cell in cells if cell.size <= args.size]
    write_models(args.base)
    path = args.csv or args.results / result_file()
    for cell in cells:
        if cell.name in done_cells(path):
            print(f"{cell.name}: in {path.name} already")
            continue
        append(path, measure(cell, args.base))
    summarise(path)


def write_models(base: Path) -> None:
    """The VAE, checkpoint and tiny decoders that the cells need, with random weights unless real ones lie there."""
    from speedlab_tools import synthetic

    synthetic.write_vae(base / "models" / "vae" / VAE)
    synthetic.write_checkpoint(base / "models" / "checkpoints" / CHECKPOINT, synthetic.CheckpointSpec(family="vega"))
    approx = base / "models" / "vae_approx"
    if not (approx / "taesdxl_decoder.safetensors").exists():
        print(f"No TAESDXL in {approx}: random weights, which take the same time and memory.")
        synthetic.write_taesd(approx, "taesdxl")


def measure(cell: Cell, base: Path) -> dict[str, Any]:
    """Run one cell in a process of its own."""
    print(f"{cell.name} ...", end=" ", flush=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--base", str(base), "--run", json.dumps(asdict(cell))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    if done.returncode != 0:
        sys.exit(f"failed:\n{done.stderr[-3000:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{row['seconds']:.2f} s, peak {row['peak_rss_gb']:.3f} GB, {row['over_gb']:.3f} GB over what was loaded")
    return row


def run_cell(cell: Cell, base: Path) -> dict[str, Any]:
    """Measure in this process: load, warm up, reset the mark, run."""
    pack = inprocess.start(base)
    import torch

    with torch.inference_mode():
        work = prepare(cell, pack)
        with watched() as seen:
            started = time.perf_counter()
            images = work()
            seconds = time.perf_counter() - started
    digest = hashlib.sha256((images.clamp(0, 1) * 255).to(torch.uint8).contiguous().numpy().tobytes()).hexdigest()
    seen["pictures_gb"] = images.numel() * images.element_size() / 1e9
    return {
        "cell": cell.name,
        **asdict(cell),
        "seconds": round(seconds, 3),
        **{name: round(seen[name], 4) for name in FIELDS},
        "pictures_sha256": digest[:16],
        **environment(),
    }


def environment() -> dict[str, Any]:
    """Where it ran."""
    import torch

    from speedlab.measure.environment import device_name

    threads = torch.get_num_threads()
    return {"device": device_name(torch.device("cpu")), "torch": torch.__version__, "threads": threads}


def prepare(cell: Cell, pack: Any) -> Callable[[], Any]:
    """Load what the cell needs and return the work to be measured, which gives pictures [B, H, W, 3]."""
    import torch

    nodes = {name: node() for name, node in pack.NODE_CLASS_MAPPINGS.items()}
    if cell.what in ("staged", "one_by_one"):
        return prepare_prompts(cell, nodes)
    generator = torch.Generator().manual_seed(0)
    samples = {"samples": 5.0 * torch.randn(cell.batch, 4, cell.size // 8, cell.size // 8, generator=generator)}
    decode: Callable[[dict[str, Any]], Any]
    if cell.what == "tiny":

        def decode(latent: dict[str, Any]) -> Any:
            return nodes["SpeedLabTinyVAEDecode"].decode(latent, "taesdxl", 1, cell.tile_size)[0]
    elif cell.what == "core_tiny":
        core = core_nodes()
        small = core.VAELoader().load_vae("taesdxl")[0]

        def decode(latent: dict[str, Any]) -> Any:
            return core.VAEDecode().decode(small, latent)[0]
    else:
        vae = nodes["SpeedLabVAELoader"].load(VAE, "fp32")[0]

        def decode(latent: dict[str, Any]) -> Any:
            return nodes["SpeedLabVAEDecode"].decode(latent, vae, cell.slicing, cell.tile_size, 64, "auto")[0]

    decode({"samples": samples["samples"][:1, :, :8, :8]})
    return lambda: decode(samples)


def prepare_prompts(cell: Cell, nodes: dict[str, Any]) -> Callable[[], Any]:
    """Four prompts with their seeds, as a staged batch or one after the other."""
    import torch

    model, clip, vae, _ = nodes["SpeedLabCheckpointLoader"].load(CHECKPOINT, "auto", "contiguous")
    core = core_nodes()
    empty = {"samples": torch.zeros(1, 4, cell.size // 8, cell.size // 8)}
    seeds = range(1, len(PROMPTS) + 1)

    def sample(seed: int, positive: Any, negative: Any) -> dict[str, Any]:
        return core.KSampler().sample(model, seed, cell.steps, 5.0, "euler", "normal", positive, negative, empty)[0]

    def decode(latent: dict[str, Any]) -> Any:
        return nodes["SpeedLabVAEDecode"].decode(latent, vae, False, 0, 64, "auto")[0]

    def free(value: list[Any], what: str) -> list[Any]:
        return nodes["SpeedLabFreeMemory"].free(value, [what])["result"][0]

    def staged() -> Any:
        queue = nodes["SpeedLabPromptQueue"].encode(clip, "\n".join(PROMPTS), "", "\n".join(map(str, seeds)))
        positives = free(queue[0], "text_encoders")
        latents = free([sample(*one) for one in zip(queue[2], positives, queue[1], strict=True)], "diffusion")
        return torch.cat([decode(latent) for latent in latents])

    def one_by_one() -> Any:
        pictures = []
        for text, seed in zip(PROMPTS, seeds, strict=True):
            positive = core.CLIPTextEncode().encode(clip, text)[0]
            negative = core.ConditioningZeroOut().zero_out(positive)[0]
            pictures.append(decode(sample(seed, positive, negative)))
        return torch.cat(pictures)

    decode({"samples": torch.zeros(1, 4, 8, 8)})
    return staged if cell.what == "staged" else one_by_one


def core_nodes() -> Any:
    """ComfyUI's own `nodes` module."""
    import importlib

    return importlib.import_module("nodes")


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Peaks in GB of the block: the kernel's own mark of the resident set, and its sampled parts."""
    import gc

    from speedlab.measure.peaks import measure_peak, rss_bytes

    gc.collect()
    seen = {"peak_anon_gb": 0.0, "peak_file_gb": 0.0, "before_gb": (rss_bytes() or 0) / 1e9}
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(SAMPLE_EVERY_S):
            anonymous, mapped = resident_parts()
            seen["peak_anon_gb"] = max(seen["peak_anon_gb"], anonymous / 1e9)
            seen["peak_file_gb"] = max(seen["peak_file_gb"], mapped / 1e9)

    thread = threading.Thread(target=sample, daemon=True)
    with measure_peak("cpu") as reading:
        thread.start()
        try:
            yield seen
        finally:
            stop.set()
            thread.join()
    seen["peak_rss_gb"] = (reading.peak.rss or 0) / 1e9
    seen["over_gb"] = seen["peak_rss_gb"] - seen["before_gb"]


def resident_parts() -> tuple[int, int]:
    """Bytes of the resident set that are anonymous, and that belong to mapped files or shared memory (Linux)."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0, 0
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Rss")}
    return sizes.get("RssAnon", 0), sizes.get("RssFile", 0) + sizes.get("RssShmem", 0)


def result_file() -> str:
    """Today's CSV, named by device and torch."""
    from speedlab.measure.environment import cpu_name

    versions = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True, check=True
    )
    return inprocess.result_name("memory-decode", cpu_name(), versions.stdout.strip(), time.strftime("%Y-%m-%d"))


def done_cells(path: Path) -> dict[str, dict[str, str]]:
    """The rows that the CSV holds, by cell."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["cell"]: row for row in csv.DictReader(file)}


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one row, so that an interrupted run goes on where it stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def summarise(path: Path) -> None:
    """The figures that the table is made for, of the cells that are there."""
    rows = done_cells(path)

    def ratio(over: str, under: str, column: str) -> str | None:
        if over not in rows or under not in rows:
            return None
        return f"{float(rows[over][column]) / max(float(rows[under][column]), 1e-9):.2f}"

    lines: Sequence[tuple[str, str | None]] = [
        *((f"tiny is faster than full at {s}", ratio(f"full-{s}-b1", f"tiny-{s}-b1", "seconds")) for s in (512, 1024)),
        *((f"tiny over full, peak at {s}", ratio(f"tiny-{s}-b1", f"full-{s}-b1", "over_gb")) for s in (512, 1024)),
        ("core's tiny is faster than full at 1024", ratio("full-1024-b1", "core_tiny-1024-b1", "seconds")),
        ("core's tiny over full, peak at 1024", ratio("core_tiny-1024-b1", "full-1024-b1", "over_gb")),
        ("sliced batch 16 over batch 1, peak", ratio("full-sliced-256-b16", "full-sliced-256-b1", "over_gb")),
        ("tiled 2048 over 1024, peak", ratio("full-tile512-2048-b1", "full-tile512-1024-b1", "over_gb")),
        ("tiled 4096 over 2048, peak", ratio("full-tile512-4096-b1", "full-tile512-2048-b1", "over_gb")),
        ("tiny 4096 over 1024, peak", ratio("tiny-4096-b1", "tiny-1024-b1", "over_gb")),
        ("staged over one by one, peak", ratio("staged-256-b4", "one_by_one-256-b4", "peak_rss_gb")),
    ]
    for text, value in lines:
        if value is not None:
            print(f"{text}: {value}")
    pair = [rows[name]["pictures_sha256"] for name in ("staged-256-b4", "one_by_one-256-b4") if name in rows]
    if len(pair) == 2:
        print(f"staged pictures equal one by one: {pair[0] == pair[1]}")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
