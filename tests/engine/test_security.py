"""The promises of SECURITY.md that need no ComfyUI, and that each promise there names tests that exist."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from speedlab.common.errors import ResultsError
from speedlab.measure.store import RunStore
from speedlab.web.library import RunLibrary
from speedlab_tools.client.files import save_image
from speedlab_tools.stress.fuzz import HOSTILE_TEXTS

ROOT = Path(__file__).resolve().parents[2]
# What runs in a process of its own, on the command line, may start programs and talk to servers.
OUTSIDE_COMFYUI = ("bench", "host", "stress", "synthetic")
NAMED_TEST = re.compile(r"^- `(tests/[\w/]+\.py)::(\w+)`$", re.MULTILINE)


def sources(inside_only: bool):
    """Every source file of the pack with its syntax tree."""
    for folder in (ROOT / "nodes", ROOT / "speedlab"):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(ROOT).parts
            # The sweep runs inside of ComfyUI, although it lies with the benchmarks.
            outside = parts[1] in OUTSIDE_COMFYUI and "sweep" not in parts
            if not (inside_only and outside):
                yield path, ast.parse(path.read_text(encoding="utf-8"))


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def called(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def test_every_promise_names_tests_that_exist():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    promises = re.split(r"^\*\*", text.partition("## Not promised")[0], flags=re.MULTILINE)[1:]
    assert len(promises) >= 7
    for promise in promises:
        named = NAMED_TEST.findall(promise)
        assert named, promise.splitlines()[0]
        for file, test in named:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            assert any(isinstance(node, ast.FunctionDef) and node.name == test for node in tree.body), (file, test)


def test_no_source_file_runs_or_unpickles_what_it_reads():
    banned = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads",
              "torch.load", "pickle.Unpickler", "marshal.loads", "yaml.load", "numpy.load", "joblib.load"}  # fmt: skip
    for path, tree in sources(inside_only=False):
        # The proof that the trap for pickles springs.
        allowed = {"pickle.loads"} if path.match("stress/model_files.py") else set()
        assert not (set(called(tree)) & banned) - allowed, path
        keywords = [keyword for node in ast.walk(tree) if isinstance(node, ast.Call) for keyword in node.keywords]
        assert not any(keyword.arg == "shell" for keyword in keywords), path


def test_what_runs_inside_comfyui_imports_no_network_client():
    banned = ("socket", "ssl", "urllib.request", "http", "requests", "httpx", "ftplib", "smtplib", "websocket",
              "websockets", "huggingface_hub", "subprocess", "multiprocessing", "pip")  # fmt: skip
    seen = 0
    for path, tree in sources(inside_only=True):
        seen += 1
        names = {name for name in imported(tree) if name}
        assert not [n for n in names for b in banned if n == b or n.startswith(f"{b}.")], path
        # aiohttp serves the routes; its client has no place here.
        assert not [n for n in names if n.startswith("aiohttp") and n not in ("aiohttp", "aiohttp.web")], path
        assert "aiohttp.ClientSession" not in set(called(tree)), path
    assert seen > 80


def test_the_browser_side_never_parses_text_as_html():
    banned = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|srcdoc"
        r"|\beval\(|new Function|https?://(?!www\.w3\.org/)"
    )
    files = sorted((ROOT / "js").rglob("*.js"))
    assert len(files) > 5
    for path in files:
        code = re.sub(r"^\s*(//|\*|/\*).*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert not banned.search(code), f"{path}: {banned.search(code)}"


@pytest.mark.parametrize("name", HOSTILE_TEXTS)
def test_no_run_id_leads_out(tmp_path, name):
    store = RunStore(tmp_path / "output")
    library = RunLibrary(store)
    for act in (store.json_path, store.trace_path, store.read, library.text, library.delete):
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
    assert (tmp_path / "secret").is_file() and json.loads(record.to_json())


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "..", "a/b/c", "", "x" * 3])
def test_pictures_are_saved_inside_their_folder(tmp_path, name):
    folder = tmp_path / "pictures"
    folder.mkdir()
    assert save_image(folder, name, b"x").resolve().parent == folder
    assert save_image(folder, name, b"y").resolve().parent == folder
    assert len(list(folder.iterdir())) == 2 and len(list(tmp_path.iterdir())) == 1
