"""`run.py stress` as a person calls it."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from speedlab_tools.host.base import CALLED_FROM

ROOT = Path(__file__).resolve().parents[2]


def stress(*arguments, cwd):
    """The command as run.py starts it: from the pack's root, for somebody who stands in `cwd`."""
    comfyui = os.environ.get("SPEEDLAB_COMFYUI") or os.environ.get("COMFYUI_PATH")
    environment = {**os.environ, CALLED_FROM: str(cwd), "SPEEDLAB_COMFYUI": str(comfyui)}
    command = [sys.executable, "-m", "speedlab_tools", "stress", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.full
def test_it_prints_and_keeps_its_figures(tmp_path):
    done = stress("--inputs", "400", "--faults", "0", "--soak", "0", "--out", "figures", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "400 inputs, 0 defects" in done.stdout
    (path,) = (tmp_path / "figures").iterdir()
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20 and sum(int(row["inputs"]) for row in rows) == 400
    assert {"routes", "pickle file", "axis", "record"} <= {row["reader"] for row in rows}
    assert not any(int(row["defects"]) for row in rows)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [(("--inputs", "-1"), 2, "numbers from 0 on"), (("--inputs", "0", "--faults", "0", "--soak", "0"), 2, "not 0 all"),
     (("--soak", "3"), 2, "at least 20 prompts"),
     pytest.param(("--only", "no such reader", "--inputs", "1"), 1, "No reader's name holds", marks=pytest.mark.full)],
)  # fmt: skip
def test_mistakes_are_sentences(tmp_path, arguments, code, words):
    done = stress(*arguments, cwd=tmp_path)
    assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
