"""The promises of SECURITY.md that need no ComfyUI, and that each promise there names tests that exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from speedlab.common.errors import ResultsError
from speedlab.measure.store import RunStore
from speedlab.web.library import RunLibrary
from speedlab_tools.client.files import save_image
from speedlab_tools.stress.fuzz import HOSTILE_TEXTS

ROOT = Path(__file__).resolve().parents[2]
NAMED_TEST = re.compile(r"^- `(tests/[\w/]+\.py)::(\w+)`$", re.MULTILINE)

# What SECURITY.md rules out inside ComfyUI, as somebody would write it.
RULED_OUT = (
    "eval(text)", "exec(text)", "import pickle", "from pickle import loads", "import marshal", "import yaml",
    "import joblib", "import torch; torch.load(path)", "import numpy; numpy.load(path)", "import os; os.system(text)",
    "import os; os.popen(text)", "import subprocess", "from multiprocessing import Process", "import pip",
    "import socket", "import ssl", "import http.client", "import urllib.request", "from urllib import request",
    "import requests", "import httpx", "import ftplib", "import smtplib", "import websocket", "import websockets",
    "import huggingface_hub", "from aiohttp import ClientSession", "import aiohttp; aiohttp.ClientSession()",
)  # fmt: skip


def test_every_promise_names_tests_that_exist():
    """They run with all others; here only that no name is out of date."""
    promises = (ROOT / "SECURITY.md").read_text(encoding="utf-8").partition("## Not promised")[0].split("\n**")[1:]
    for promise in promises:
        named = NAMED_TEST.findall(promise)
        assert named, promise.splitlines()[0]
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), (file, test)


@pytest.mark.parametrize("folder", ["speedlab/web", "nodes"])
def test_check_refuses_code_network_and_programs_inside_comfyui(folder):
    """`run.py check` asks ruff, whose settings name them; each line here is refused, and plain ones are not."""
    lines = [*RULED_OUT, "from aiohttp import web", "import os; os.replace(path, path)", "import torch"]
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--output-format", "json", "--stdin-filename", f"{folder}/new.py", "-"],
        input="\n".join(lines), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    found = [entry for entry in json.loads(done.stdout) if entry["code"].startswith(("TID251", "S"))]
    refused = {entry["location"]["row"] for entry in found}
    assert refused == set(range(1, len(RULED_OUT) + 1)), [lines[row - 1] for row in refused]


def test_the_browser_side_never_parses_text_as_html():
    banned = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|srcdoc"
        r"|\beval\(|new Function|https?://(?!www\.w3\.org/)"
    )
    assert banned.search("element.innerHTML = text")
    for path in sorted((ROOT / "js").rglob("*.js")):
        code = re.sub(r"^\s*(//|\*|/\*).*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert not banned.search(code), f"{path}: {banned.search(code)}"


NEARLY_RUN_IDS = ("20260101-000000-00000001/..", "20260101-000000-00000001\n", "20260101-000000-0000000\u0661")


@pytest.mark.parametrize("name", (*HOSTILE_TEXTS, *NEARLY_RUN_IDS))
def test_no_run_id_leads_out(tmp_path, name):
    store = RunStore(tmp_path / "output")
    library = RunLibrary(store)
    images = lambda run: library.artifact(run, "images")  # noqa: E731
    for act in (store.json_path, store.trace_path, store.read, library.text, library.delete, images):
        with pytest.raises(ResultsError):
            act(name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", HOSTILE_TEXTS)
def test_no_file_that_a_record_names_leads_out(make_record, tmp_path, name):
    (tmp_path / "secret").write_text("not for the browser")
    store = RunStore(tmp_path / "output")
    store.folder("images").joinpath("link.png").symlink_to(tmp_path / "secret")
    images = [name, f"speedlab/images/{name}", f"speedlab/images/../../../{name}", "speedlab/images/link.png"]
    record = make_record(artifacts={"images": images, "chart": name, "trace": [name]})
    store.write(record)
    library = RunLibrary(store)
    for kind, index in (*(("images", index) for index in range(4)), ("chart", 0), ("trace", 0)):
        with pytest.raises(ResultsError):
            library.artifact(record.run_id, kind, index)
    library.delete(record.run_id)
    assert (tmp_path / "secret").read_text() == "not for the browser" and json.loads(record.to_json())
    assert (store.root / "images" / "link.png").is_symlink()


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "..", "a/b/c", "", "x" * 3])
def test_pictures_are_saved_inside_their_folder(tmp_path, name):
    folder = tmp_path / "pictures"
    folder.mkdir()
    assert save_image(folder, name, b"x").resolve().parent == folder
    assert save_image(folder, name, b"y").resolve().parent == folder
    assert len(list(folder.iterdir())) == 2 and len(list(tmp_path.iterdir())) == 1
