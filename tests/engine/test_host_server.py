"""What surrounds a server process: ports, folders, links, model paths. The process itself is tried in tests/server."""

from __future__ import annotations

import dataclasses
import json
import socket
import sys
from pathlib import Path

import pytest

from speedlab_tools.host import ComfyServer, Host, ServerError, layout
from speedlab_tools.host.server import _TAKEN, flags, require_free


def failing(path: Path, code: str) -> Host:
    """A ComfyUI that is broken: its main.py ends at once."""
    (path / "comfy").mkdir(parents=True)
    (path / "comfy" / "cli_args.py").write_text('parser.add_argument("--base-directory")\n')
    (path / "main.py").write_text(code)
    return Host(path, Path(sys.executable), True, "test")


def test_an_occupied_port_is_named_before_anything_starts(tmp_path: Path) -> None:
    host = failing(tmp_path / "c", "")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = ComfyServer(host, pack=tmp_path, base=tmp_path / "base", port=port, cpu=True)
        with pytest.raises(ServerError, match=f"Port {port} is in use"):
            server.start()
    assert server.process is None and not (tmp_path / "base").exists()
    require_free(port)


@pytest.mark.parametrize("port", [-1, 0, 65536])
def test_no_port(port: int) -> None:
    with pytest.raises(ServerError, match="no port"):
        require_free(port)


def test_a_server_that_dies_shows_the_end_of_its_log(tmp_path: Path) -> None:
    pack = tmp_path / "pack"
    pack.mkdir()
    host = failing(tmp_path / "c", "for n in range(100): print('line', n)\nraise SystemExit('no module named torch')\n")
    server = ComfyServer(host, pack=pack, base=tmp_path / "base", cpu=True)
    with pytest.raises(ServerError) as caught, server:
        pass
    text = str(caught.value)
    assert "exit code 1" in text and "no module named torch" in text and str(server.log_path) in text
    assert "line 99" in text and "line 60\n" not in text
    assert server.process is None and len(server.tail(5)) == 5


def test_a_busy_port_in_the_log_is_recognised() -> None:
    assert any(sign in "error while attempting to bind: address already in use" for sign in _TAKEN)


def test_an_old_comfyui_is_refused(tmp_path: Path) -> None:
    host = failing(tmp_path / "c", "")
    (host.comfyui / "comfy" / "cli_args.py").write_text("")
    with pytest.raises(ServerError, match="too old"):
        ComfyServer(host, pack=tmp_path, base=tmp_path / "base", cpu=True).start()
    (host.comfyui / "comfy" / "cli_args.py").unlink()
    with pytest.raises(ServerError, match=r"cli_args\.py"):
        flags(host.comfyui)


def test_a_base_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ServerError, match="cannot be made") as caught:
        layout.make_base(tmp_path, tmp_path / "file" / "base")
    assert str(tmp_path / "file" / "base") in str(caught.value)


def test_a_base_gets_the_images_of_comfyui_and_keeps_its_own(tmp_path: Path) -> None:
    (tmp_path / "c" / "input").mkdir(parents=True)
    (tmp_path / "base" / "input").mkdir(parents=True)
    for name in ("example.png", "other.png"):
        (tmp_path / "c" / "input" / name).write_text("theirs")
    (tmp_path / "base" / "input" / "other.png").write_text("mine")
    layout.make_base(tmp_path / "c", tmp_path / "base")
    texts = {path.name: path.read_text() for path in (tmp_path / "base" / "input").iterdir()}
    assert texts == {"example.png": "theirs", "other.png": "mine"}
    assert (tmp_path / "base" / "models" / "vae_approx").is_dir()


def test_the_pack_is_linked_once(tmp_path: Path) -> None:
    pack, base = tmp_path / "pack", tmp_path / "base"
    pack.mkdir()
    layout.make_base(tmp_path, base)
    link = layout.link_pack(pack, base)
    assert link == base / "custom_nodes" / "ComfyUI-SpeedLab" and link.resolve() == pack
    assert layout.link_pack(pack, base) == link
    other = tmp_path / "other"
    other.mkdir()
    assert layout.link_pack(other, base).resolve() == other
    assert pack.is_dir()


def test_a_pack_that_already_lies_there_is_not_linked(tmp_path: Path) -> None:
    layout.make_base(tmp_path, tmp_path)
    pack = tmp_path / "custom_nodes" / "its-own-name"
    pack.mkdir()
    assert layout.link_pack(pack, tmp_path) == pack
    assert [path.name for path in (tmp_path / "custom_nodes").iterdir()] == ["its-own-name"]


def test_another_copy_of_the_pack_is_not_overwritten(tmp_path: Path) -> None:
    layout.make_base(tmp_path, tmp_path / "base")
    there = tmp_path / "base" / "custom_nodes" / "ComfyUI-SpeedLab"
    there.mkdir()
    with pytest.raises(ServerError, match="another copy"):
        layout.link_pack(tmp_path, tmp_path / "base")
    assert there.is_dir()


def test_where_no_link_can_be_made_the_pack_is_copied_and_kept_fresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    pack, base = tmp_path / "pack", tmp_path / "base"
    (pack / ".git").mkdir(parents=True)
    (pack / "__init__.py").write_text("one")
    layout.make_base(tmp_path, base)
    copy = layout.link_pack(pack, base)
    assert (copy / "__init__.py").read_text() == "one" and not (copy / ".git").exists()
    (pack / "__init__.py").write_text("two")
    assert (layout.link_pack(pack, base) / "__init__.py").read_text() == "two"


def test_model_paths(tmp_path: Path) -> None:
    models = tmp_path / "mödels $HOME"
    for name in ("checkpoints", "vae_approx", "unet", "diffusion_models", ".hidden"):
        (models / name).mkdir(parents=True)
    (models / "readme.txt").write_text("")
    text = layout.models_config({"mine": models})
    assert json.loads(text)["mine"] == {
        "checkpoints": str(models / "checkpoints"),
        "diffusion_models": f"{models / 'diffusion_models'}\n{models / 'unet'}",
        "vae_approx": str(models / "vae_approx"),
    }
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(text) == json.loads(text)
    with pytest.raises(ServerError, match="does not exist"):
        layout.models_config({"mine": tmp_path / "nowhere"})


def test_nothing_in_extra_args_opens_the_server_to_the_network(tmp_path: Path) -> None:
    host = failing(tmp_path / "c", "")
    server = ComfyServer(
        host, pack=tmp_path, base=tmp_path / "base", cpu=True, extra_args=["--listen", "0.0.0.0", "--fast"]
    )
    arguments = server._arguments()
    assert arguments[len(arguments) - arguments[::-1].index("--listen")] == "127.0.0.1"
    assert "--cpu" in arguments and "--fast" in arguments


@pytest.mark.parametrize("managed", [True, False])
def test_torch_that_does_not_import_is_reported_with_a_remedy(tmp_path: Path, managed: bool) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    host = dataclasses.replace(failing(tmp_path / "c", ""), managed=managed)
    server = ComfyServer(host, pack=tmp_path, base=tmp_path / "base", env={"PYTHONPATH": str(tmp_path)})
    with pytest.raises(ServerError, match=r"libcudart\.so\.13") as caught:
        server.start()
    assert ("run `python run.py setup`" in str(caught.value)) is managed
    assert ("use --managed" in str(caught.value)) is not managed
