"""The contact sheet: an image of every cell, with time, memory and quality under each."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..measure.page import image_url
from ..measure.peaks import GROWTH
from ..measure.record import csv_row
from ..measure.store import RunStore, write_image
from ..sampling.complete import to_bytes
from .axes import Axis
from .cell_record import CellRuns

SIDE = 256
_PAD, _LINE, _TITLE = 8, 16, 28
_INK, _PAPER, _FAILED = (32, 32, 32), (255, 255, 255), (225, 225, 225)
_MOST_PIXELS = 16000


def thumbnail(images: Any) -> Any:
    """Up to four images [B, H, W, 3] side by side in a square of 256 pixels, as a PIL image."""
    from PIL import Image, ImageOps

    pixels = to_bytes(images[:4])
    columns = 1 if len(pixels) == 1 else 2
    side = SIDE // columns
    sheet = Image.new("RGB", (SIDE, SIDE if len(pixels) != 2 else side), _PAPER)
    for index, array in enumerate(pixels):
        image = ImageOps.contain(Image.fromarray(array), (side, side))
        sheet.paste(image, (index % columns * side, index // columns * side))
    return sheet


def data_url(image: Any) -> str:
    """A thumbnail as a small JPEG that a page shows without asking for it."""
    data = io.BytesIO()
    image.resize((image.width // 2, image.height // 2)).save(data, "JPEG", quality=75)
    return image_url("jpeg", data.getvalue())


def contact_sheet(
    cells: Sequence[CellRuns], thumbnails: Mapping[tuple[int, int], Any], axis_x: Axis, axis_y: Axis
) -> Any:
    """The whole sheet as an IMAGE tensor [1, H, W, 3] in 0..1: x from left to right, y from top to bottom."""
    import numpy
    import torch
    from PIL import Image, ImageDraw

    font = _font()
    box_width, box_height = SIDE + _PAD, SIDE + 4 * _LINE + _PAD
    left = 0 if axis_y.name == "none" else 110
    width = left + box_width * len(axis_x.values) + _PAD
    height = _TITLE + box_height * len(axis_y.values) + _PAD
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, value in enumerate(axis_x.values):
        text = _short(f"{axis_x.name} {value.label}".strip())
        draw.text((left + index * box_width + _PAD, 6), text, fill=_INK, font=font)
    if left:
        for index, value in enumerate(axis_y.values):
            top = _TITLE + index * box_height + SIDE // 2
            draw.multiline_text((_PAD, top), f"{axis_y.name}\n{_short(value.label, 14)}", fill=_INK, font=font)
    for runs in cells:
        x, y = left + runs.cell.x * box_width + _PAD, _TITLE + runs.cell.y * box_height
        image = thumbnails.get((runs.cell.x, runs.cell.y))
        if image is None:
            draw.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), fill=_FAILED)
            draw.text((x + 12, y + SIDE // 2), runs.status, fill=_INK, font=font)
        else:
            sheet.paste(image, (x, y))
        draw.multiline_text((x, y + SIDE + 4), "\n".join(caption(runs)), fill=_INK, font=font, spacing=3)
    if max(sheet.size) > _MOST_PIXELS:
        sheet.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    pixels = numpy.asarray(sheet).astype(numpy.float32) / 255.0
    return torch.from_numpy(pixels.copy()).unsqueeze(0)


def caption(runs: CellRuns) -> list[str]:
    """Time and spread, memory, quality of a cell, a line each."""
    if runs.record is None or runs.status != "ok":
        return [_short(runs.error or runs.status)]
    row = csv_row(runs.record)
    spread = f" ±{float(row['time_std_s']):.2f}" if int(row["repeats"] or 1) > 1 else ""
    memory = row["max_vram_gb"] or runs.record.memory.get("overall", {}).get(GROWTH)
    kind = "VRAM" if row["max_vram_gb"] else "more RAM"
    used = "memory unknown" if memory is None else f"{float(memory):.2f} GB {kind}"
    lines = [f"{float(row['time_s']):.2f} s{spread}", used]
    if runs.quality is not None:
        lpips = "" if runs.quality.lpips is None else f", LPIPS {runs.quality.lpips:.3f}"
        lines.append(f"PSNR {runs.quality.psnr:.1f} dB, SSIM {runs.quality.ssim:.3f}{lpips}")
    elif runs.baseline is runs.cell:
        lines.append("baseline")
    return lines


def keep_image(store: RunStore, folder: str, name: str, image: Any) -> str:
    """Save one IMAGE [1, H, W, 3] under the results; returns the path below ComfyUI's output. Raises ResultsError."""
    from PIL import Image

    path = store.folder(folder) / name
    write_image(path, Image.fromarray(to_bytes(image)[0]))
    return path.relative_to(store.root.parent).as_posix()


def _short(text: str, most: int = 38) -> str:
    line = text.splitlines()[0] if text else ""
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _font() -> Any:
    """DejaVu Sans, which matplotlib brings, else Pillow's own small font."""
    from PIL import ImageFont

    try:
        import matplotlib

        return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 12)
    except (ImportError, OSError):
        return ImageFont.load_default()
