"""Every technique's help page says when it is the wrong choice, in both languages."""

from __future__ import annotations

from pathlib import Path

import pytest

PAGES = Path(__file__).resolve().parents[2] / "js" / "docs"
TECHNIQUES = (
    "Attention", "CompileModel", "CompileVAE", "DeepCache", "DynamicCFG", "Forecast", "MemoryPlan", "Precision",
    "TinyVAEDecode",
)  # fmt: skip


@pytest.mark.parametrize("name", TECHNIQUES)
@pytest.mark.parametrize(
    ("file", "heading"), [("{}.md", "## When it is the wrong choice"), ("{}/zh.md", "## 何时不该使用")]
)
def test_a_page_says_when_it_is_the_wrong_choice(name: str, file: str, heading: str) -> None:
    text = (PAGES / file.format(f"SpeedLab{name}")).read_text(encoding="utf-8")
    assert text.count(f"\n{heading}\n") == 1
    section = text.partition(f"\n{heading}\n")[2].strip().partition("\n## ")[0]
    assert len(section) > 40
