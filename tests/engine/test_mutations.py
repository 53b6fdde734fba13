"""The list of wrong lines: each stands in today's source, and the committed outcome is of this list."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parent.parent / "mutations.py"


@pytest.fixture(scope="module")
def mutations():
    spec = importlib.util.spec_from_file_location("speedlab_mutations", PATH)
    module = sys.modules["speedlab_mutations"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_line_stands_once_in_the_source(mutations):
    for mutation in mutations.MUTATIONS:
        text = mutations.source(mutations.ROOT, mutation).read_text(encoding="utf-8")
        compile(mutations.mutated(text, mutation), mutation.file, "exec")
        assert all((PATH.parent / name).is_file() for name in mutation.tests)


def test_the_committed_outcome_is_of_this_list(mutations):
    with mutations.RESULT.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    listed = [(f"speedlab/{one.file}", one.line.strip(), one.becomes.strip()) for one in mutations.MUTATIONS]
    assert [(row["file"], row["line"], row["becomes"]) for row in rows] == listed
    assert sum(row["outcome"] == "red" for row in rows) >= mutations.NEEDED
