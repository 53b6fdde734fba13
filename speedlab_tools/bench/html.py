"""A series as one HTML file: tables, images inside it, published figures beside measured ones, the environment.

Every text goes through Jinja's autoescape: plan names, prompts and errors come from users and from servers.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speedlab.common.errors import ResultsError, UnavailableError
from speedlab.common.tables import HEADER, NOTHING, RAM_COLUMN, cells, seconds
from speedlab.measure.page import image_url
from speedlab.measure.record import from_json

from ..client.errors import BenchError
from ..scenarios.overrides import MARK
from ..scenarios.scenario import SOURCES, Scenario
from .results import Outcome

_LARGE = 100_000  # bytes

TEMPLATE = Path(__file__).with_name("report.html.j2")
MORE = ("min", "max", "std", "images/min", "PSNR", "SSIM", "status")
_ENV = (
    "device", "device_memory_gb", "driver", "torch", "cuda", "comfyui", "speedlab", "python", "platform",
    "attention", "allocator", "cpu", "cpu_threads", "cpus", "ram_gb",
)  # fmt: skip


@dataclass(frozen=True)
class Section:
    """One scenario of the page."""

    scenario: Scenario
    rows: list[list[str]]
    images: list[tuple[str, str]]
    error: str | None
    is_small: bool


def html_page(scenarios: Sequence[Scenario], outcomes: Sequence[Outcome], notes: Sequence[str]) -> str:
    """The page. Raises UnavailableError without Jinja, which PyTorch brings."""
    try:
        import jinja2
    except ImportError as error:
        raise UnavailableError("The HTML page needs Jinja: pip install jinja2") from error
    engine = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = engine.from_string(TEMPLATE.read_text(encoding="utf-8"))
    by_id = {scenario.id: scenario for scenario in scenarios}
    sections = [_section(by_id[outcome.name], outcome) for outcome in outcomes]
    return str(
        template.render(
            sections=sections,
            header=[*HEADER, RAM_COLUMN, *MORE],
            environments=environments(outcomes),
            notes=notes,
            sources=SOURCES,
            made=time.strftime("%Y-%m-%d %H:%M"),
        )
    )


def write_html(path: Path, page: str) -> None:
    """Write the page. Raises BenchError naming the path."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise BenchError(f"--html: cannot write {path}: {error.strerror or error}") from error


def environments(outcomes: Sequence[Outcome]) -> list[list[tuple[str, str]]]:
    """The different machines and versions that the records name, each as (fact, value)."""
    known: dict[str, list[tuple[str, str]]] = {}
    for path in (path for outcome in outcomes for path in outcome.records):
        try:
            record = from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ResultsError):
            continue  # a record that was deleted since takes only its facts with it, not the page
        env: Any = record.env
        facts = [(name, str(env[name])) for name in _ENV if env.get(name) is not None]
        known.setdefault(record.env_hash, facts)
    return list(known.values())


def _section(scenario: Scenario, outcome: Outcome) -> Section:
    images = [(path.stem, _inline(path)) for path in outcome.images if path.is_file()]
    small = any(row.get("scenario", "").endswith(MARK) for row in outcome.rows)
    return Section(scenario, [_row(row) for row in outcome.rows], images, outcome.error, small)


def _row(row: dict[str, str]) -> list[str]:
    def number(name: str, form: str) -> str:
        return form.format(float(row[name])) if row.get(name) else NOTHING

    times = [row.get(f"time_{name}_s") if row.get("repeats") != "1" else None for name in MORE[:3]]
    spread = [seconds(float(time_s)) if time_s else NOTHING for time_s in times]  # one run has none
    status = f"{row.get('status', '')}: {row['error']}" if row.get("error") else row.get("status", "")
    quality = [number("psnr", "{:.1f} dB"), number("ssim", "{:.4f}")]
    return [*cells(row), *spread, number("images_per_min", "{:.2f}"), *quality, status]


def _inline(path: Path) -> str:
    """An image inside the page; a large one as JPEG, because the PNG itself lies beside the page."""
    data, kind = path.read_bytes(), "png"
    if len(data) > _LARGE:
        with suppress(ImportError, OSError):  # without Pillow, or where it cannot read the file, as it is
            from PIL import Image

            smaller = io.BytesIO()
            with Image.open(path) as image:
                image.convert("RGB").save(smaller, "JPEG", quality=85)
            data, kind = smaller.getvalue(), "jpeg"
    return image_url(kind, data)
