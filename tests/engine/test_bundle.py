"""`run.py bundle`: what is kept compiled comes out as it went in, on a machine like this one and on no other."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from speedlab_tools import bundle
from speedlab_tools.__main__ import main

TORCH = bundle._version("torch").lower().replace("+", "-")
OPENVINO = f"compiled/openvino-torch{TORCH}-cpu-{bundle.instructions_word()}"
INDUCTOR = f"compiled/inductor-torch{TORCH}-cpu-{bundle.instructions_word()}"
KEPT = {f"{OPENVINO}/ab.graph": b"graph" * 1000, f"{OPENVINO}/cd.int8": b"{}", f"{INDUCTOR}/fx/cd/ef.so": bytes(50),
        "measured/cpu-12345678.json": b"{}"}  # fmt: skip
LEFT = (f"compiled/openvino-torch{TORCH}-cpu-00000000/ab.graph", "compiled/openvino-torch1.0-cpu/ab.graph",
        f"{INDUCTOR}/locks/a.lock", f"{OPENVINO}/ab.graph.12.tmp")  # fmt: skip


def written(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def held(user: Path) -> dict[str, bytes]:
    root = user / "speedlab"
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    written(tmp_path / "here" / "speedlab", {**KEPT, **dict.fromkeys(LEFT, b"x")})
    file = tmp_path / "kept.zip"
    assert main(["bundle", "pack", str(file), "--user", str(tmp_path / "here")]) == 0
    return file


@pytest.fixture
def there(tmp_path: Path) -> Path:
    (tmp_path / "there").mkdir()
    return tmp_path / "there"


def changed(file: Path, change: Callable[[dict[str, Any], dict[str, bytes]], None]) -> None:
    """The bundle with another manifest or other files, and checksums of the zip that fit."""
    with zipfile.ZipFile(file) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(files.pop(bundle.MANIFEST))
    change(manifest, files)
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in {**files, bundle.MANIFEST: json.dumps(manifest).encode()}.items():
            archive.writestr(name, data)


def test_what_fits_comes_out_as_it_went_in(packed: Path, there: Path, capsys: Any) -> None:
    """Without locks, files half written, and what is of another PyTorch or CPU; what is there stays."""
    mine = written(there / "speedlab", {f"{OPENVINO}/cd.int8": b"mine"})
    assert main(["bundle", "unpack", str(packed), "--user", str(there)]) == 0
    assert held(there) == {**KEPT, f"{OPENVINO}/cd.int8": b"mine"}
    assert "3 files" in capsys.readouterr().out.splitlines()[-1] and sorted(there.iterdir()) == [mine]


def _other(**changes: Any) -> Callable[[dict[str, Any], dict[str, bytes]], None]:
    return lambda manifest, _files: manifest["machine"].update(changes)


def _version(name: str, number: str) -> Callable[[dict[str, Any], dict[str, bytes]], None]:
    return lambda manifest, _files: manifest["machine"]["versions"].update({name: number})


def _named(name: str) -> Callable[[dict[str, Any], dict[str, bytes]], None]:
    def change(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
        old = f"{OPENVINO}/cd.int8"
        manifest["files"][name], files[name] = manifest["files"].pop(old), files.pop(old)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_other(instructions=[*bundle.instructions(), "amx_tomorrow"]), "this CPU lacks amx_tomorrow"),
        (_other(instructions=bundle.instructions()[:-1]), f"that CPU lacks {bundle.instructions()[-1]}"),
        (_other(system="plan9"), "plan9 there"),
        (_version("torch", "1.0"), "torch 1.0 there"),
        (_version("openvino", "1.0"), "openvino 1.0 there"),
        (_version("python", "2.7"), "python 2.7 there"),
        (lambda manifest, _files: manifest.update(schema=99), "another version of this pack"),
        (lambda manifest, _files: manifest.pop("files"), "no bundle"),
        (lambda manifest, _files: manifest.update(machine=[]), "no bundle"),
        (lambda _manifest, files: files.update({f"{OPENVINO}/ab.graph": b"graph" * 999 + b"grapf"}), "is damaged"),
        (lambda _manifest, files: files.update({f"{OPENVINO}/ab.graph": b"longer" * 1000}), "is damaged"),
        (lambda _manifest, files: files.pop(f"{OPENVINO}/ab.graph"), "is damaged"),
        (lambda _manifest, files: files.update(more=b"code"), "is damaged"),
        *((_named(name), "outside") for name in
          ("../a.so", "compiled/../../a.so", "/tmp/a.so", "C:/a.so", "compiled\\..\\a.so", "compiled//a.so", "./a.so")),
        (_named("a\0b"), "no bundle"),
    ],
)  # fmt: skip
def test_a_wrong_one_is_refused_in_words(
    packed: Path, there: Path, tmp_path: Path, capsys: Any, change: Any, words: str
) -> None:
    changed(packed, change)
    before = sorted(tmp_path.rglob("*"))
    assert main(["bundle", "unpack", str(packed), "--user", str(there)]) == 1
    said = capsys.readouterr().err
    assert words in said and "compiled here at first use" in said and said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before, "nothing is placed"


def test_what_is_cut_off_damaged_or_no_zip_is_refused(packed: Path, there: Path, capsys: Any) -> None:
    whole = packed.read_bytes()
    place = whole.index(b"ab.graph") + 32  # of its data
    for data in (b"", b"text", whole[: len(whole) // 2], whole[:place] + bytes(8) + whole[place + 8 :]):
        packed.write_bytes(data)
        assert main(["bundle", "unpack", str(packed), "--user", str(there)]) == 1
        assert "damaged, or no bundle" in capsys.readouterr().err
    assert list(there.iterdir()) == []


def test_a_link_out_of_the_folder_is_not_followed(packed: Path, there: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "elsewhere").mkdir()
    (there / "speedlab").mkdir()
    (there / "speedlab" / "compiled").symlink_to(tmp_path / "elsewhere")
    assert main(["bundle", "unpack", str(packed), "--user", str(there)]) == 1
    assert "outside" in capsys.readouterr().err and list((tmp_path / "elsewhere").iterdir()) == []


def test_what_cannot_be_done_is_said(tmp_path: Path, packed: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        (["pack", "a.zip", "--user", str(tmp_path / "nowhere")], "is no folder"),
        (["pack", str(tmp_path / "a.zip"), "--user", str(tmp_path / "empty")], "Nothing is kept"),
        (["pack", str(tmp_path / "no" / "a.zip"), "--user", str(tmp_path / "here")], "cannot be written"),
        (["unpack", str(tmp_path / "no.zip"), "--user", str(tmp_path / "empty")], "cannot be unpacked"),
    ):
        assert main(["bundle", *arguments]) == 1
        assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("*.tmp")) and not list((tmp_path / "empty").iterdir())
