"""An HTML page of a sweep or a tune, whole in one file: notes, images, a table, the environment."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from ..measure.page import html_table, image_url
from ..sampling.complete import to_bytes

_STYLE = """:root{color-scheme:light dark}body{font:14px sans-serif;margin:2em;max-width:110em}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{border:1px solid #8888;padding:.3em .6em;
text-align:left}img{max-width:100%}"""


def html_page(
    title: str, notes: Sequence[str], table: tuple[Sequence[str], Sequence[Sequence[str]]],
    images: Sequence[tuple[str, Any]], env: Mapping[str, Any],
) -> str:  # fmt: skip
    """The page; every text is escaped. `table` is header and rows, `images` are names with IMAGE tensors."""
    header, rows = table
    facts = [(str(name), str(value)) for name, value in env.items() if value is not None]
    shown = "".join(f'<p><img alt="{html.escape(name)}" src="{_inline(image)}"></p>' for name, image in images)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>
<h1>{html.escape(title)}</h1><ul>{"".join(f"<li>{html.escape(note)}</li>" for note in notes)}</ul>
{shown}{html_table(rows, header)}
<h2>Environment</h2>{html_table(facts)}</html>
"""


def _inline(image: Any) -> str:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(to_bytes(image)[0]).save(data, "PNG")
    return image_url("png", data.getvalue())
