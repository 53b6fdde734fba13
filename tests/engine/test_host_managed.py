"""The managed host, made for real by venv and pip, out of tiny wheels instead of torch and ComfyUI."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import http.server
import importlib.metadata
import io
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from speedlab_tools.host import (
    ComfyServer,
    HostError,
    ServerError,
    environment,
    from_environment,
    managed,
    pack_root,
    packages,
    release,
    resolve,
)
from speedlab_tools.host import resolve as resolve_function
from speedlab_tools.host.base import environment_python
from speedlab_tools.host.managed import CheckEnvironment, ManagedHost, ManagedSpec, NexfortEnvironment
from speedlab_tools.host.progress import Reporter

TREE = {
    "inner/_comfyui/main.py": "print('main')\n",
    "inner/_comfyui/comfy/__init__.py": "",
    "inner/_comfyui/requirements.txt": "# theirs\nsl-torch\nsl-theirs>=1\n",
    "inner/_comfyui/extra_model_paths.yaml": "left: out\n",
}
HOST = ("sl-torch==1.0", "sl-vision==1.0", "sl-theirs==1.0", "sl-own==1.0")
STAGES = ["environment", "comfyui", "packages", "test-packages"]
NOWHERE = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}


def build_wheel(folder: Path, name: str, version: str = "1.0", files: Mapping[str, str] | None = None) -> Path:
    """A real, minimal wheel."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    content = dict(files or {f"{module}.py": f"version = {version!r}\n"})
    content[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    content[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    rows = []
    for path, text in content.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        rows.append(f"{path},sha256={digest},{len(text.encode())}")
    content[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,"]) + "\n"
    target = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w") as archive:
        for path, text in content.items():
            archive.writestr(path, text)
    return target


def write_lock(path: Path, index: Path, *packages: str, sha256: str = "") -> Path:
    """A lock file of packages `name==version`, with the hashes of their wheels, or with one that is wrong."""
    lines = ["# made for a test"]
    for package in packages:
        wheel = index / f"{package.replace('-', '_').replace('==', '-')}-py3-none-any.whl"
        lines.append(f"{package} \\\n    --hash=sha256:{sha256 or hashlib.sha256(wheel.read_bytes()).hexdigest()}")
    path.write_text("\n".join(lines) + "\n")
    return path


def site_packages(venv: Path) -> Path:
    return next(path for pattern in ("lib/python*", "Lib") for path in venv.glob(f"{pattern}/site-packages"))


def versions(folder: Path) -> dict[str, str]:
    """What a site-packages folder holds, by name, as Python itself reads it."""
    return {found.metadata["Name"]: found.version for found in importlib.metadata.distributions(path=[str(folder)])}


@dataclasses.dataclass
class Site:
    """A set-up in a temporary folder: its spec, where its wheels come from, and what it said last."""

    root: Path
    spec: ManagedSpec
    index: Path
    said: str = ""

    def host(self) -> ManagedHost:
        self.stream = io.StringIO()
        return ManagedHost(self.root, spec=self.spec, reporter=Reporter(self.stream), want_dev=True)

    def ensure(self) -> list[str]:
        """Set up; which stages did work."""
        host = self.host()
        before = {name: self._stamp(name) for name in STAGES}
        try:
            host.ensure()
        finally:
            self.said = self.stream.getvalue()
        return [name for name in STAGES if self._stamp(name) != before[name]]

    def site_packages(self) -> Path:
        return site_packages(self.root / "venv")

    def _stamp(self, name: str) -> int:
        path = self.root / "stamps" / f"{name}.json"
        return path.stat().st_mtime_ns if path.exists() else 0


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    for name in ("sl-torch", "sl-vision", "sl-theirs", "sl-own", "sl-dev", "sl-more"):
        build_wheel(folder, name)
    build_wheel(folder, "sl-torch", "2.0")
    build_wheel(folder, "sl-engine", files=TREE)
    return folder


def pip_settings(index: Path) -> dict[str, str]:
    return {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_CACHE_DIR": "1",
    }


def use(monkeypatch: pytest.MonkeyPatch, settings: Mapping[str, str]) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, index: Path) -> Iterator[Site]:
    """A finished set-up; tests work on copies of it."""
    folder = tmp_path_factory.mktemp("made")
    spec = ManagedSpec(
        wheel="sl-engine==1.0",
        wheel_sha256=hashlib.sha256((index / "sl_engine-1.0-py3-none-any.whl").read_bytes()).hexdigest(),
        wheel_folder="inner/_comfyui",
        lock=write_lock(folder / "host.txt", index, *HOST),
        test_lock=write_lock(folder / "test.txt", index, "sl-dev==1.0"),
        disk_gb=0.1,
    )
    site = Site(folder / "cache", spec, index)
    with pytest.MonkeyPatch.context() as patch:
        use(patch, pip_settings(index))
        assert site.ensure() == STAGES
    yield site


@pytest.fixture
def site(made: Site, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    use(monkeypatch, pip_settings(index))
    root = tmp_path / "cache"
    shutil.copytree(made.root, root, symlinks=True)
    lock, test_lock = (Path(shutil.copy2(path, tmp_path)) for path in (made.spec.lock, made.spec.test_lock))
    return Site(root, dataclasses.replace(made.spec, lock=lock, test_lock=test_lock), index)


@pytest.mark.full
def test_onediffs_environment_is_set_up_by_the_same_stages(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull})
    stream = io.StringIO()

    def onediff(*lines: str) -> NexfortEnvironment:
        lock = write_lock(tmp_path / "lock.txt", index, *lines)
        return NexfortEnvironment(tmp_path / "onediff", lock=lock, reporter=Reporter(stream))

    with pytest.raises(HostError, match=r"sl-torch==1\.0 \(for OneDiff and nexfort\)"):
        onediff("sl-torch==1.0", "sl-vision==1.0").prepare()
    use(monkeypatch, pip_settings(index))
    onediff("sl-torch==1.0", "sl-vision==1.0").prepare()
    assert "[1/2] Python environment: ready" in stream.getvalue(), "it went on where it had ended"
    use(monkeypatch, NOWHERE)
    said = stream.getvalue()
    onediff("sl-torch==1.0", "sl-vision==1.0").prepare()
    assert stream.getvalue() == said
    assert versions(site_packages(tmp_path / "onediff" / "venv"))["sl-torch"] == "1.0"
    assert onediff("sl-torch==2.0").missing() == "OneDiff and nexfort: what it is made from has changed"


def test_checks_have_an_environment_of_their_own(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, pip_settings(index))
    stream = io.StringIO()
    lock = write_lock(tmp_path / "lock.txt", index, "sl-dev==1.0")
    found = CheckEnvironment(tmp_path / "check", lock=lock, reporter=Reporter(stream))
    found.prepare()
    assert versions(site_packages(tmp_path / "check" / "venv")).keys() >= {"sl-dev"} and found.python.exists()
    assert "40 MB to fetch once" in stream.getvalue() and not (tmp_path / "check" / "comfyui").exists()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server with release 9.9.9 of a tiny ComfyUI, and that number for the newest."""
    folder = tmp_path / "repository"
    archives = folder / "archive" / "refs" / "tags"
    archives.mkdir(parents=True)
    with zipfile.ZipFile(archives / "v9.9.9.zip", "w") as archive:
        for path, text in TREE.items():
            archive.writestr(path.replace("inner/_comfyui", "ComfyUI-9.9.9"), text)
    (folder / "latest").write_text('{"tag_name": "v9.9.9"}')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(release, "REPOSITORY", url)
    monkeypatch.setattr(release, "_ANSWERS", f"{url}/latest")
    yield url
    server.shutdown()
    server.server_close()


@pytest.fixture
def of_release(made: Site, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ManagedHost]:
    """A managed host of a release, with tiny packages for ours and for PyTorch."""
    use(monkeypatch, pip_settings(index))
    own = tmp_path / "pack"
    own.mkdir()
    (own / "requirements.txt").write_text("sl-own\n")
    (own / "requirements-dev.txt").write_text("sl-dev\n")
    monkeypatch.setattr(managed, "pack_root", lambda: own)
    monkeypatch.setattr(managed, "_TORCH", ("sl-torch==",))

    def build(version: str, stream: io.StringIO | None = None, want_dev: bool = False) -> ManagedHost:
        reporter = Reporter(io.StringIO() if stream is None else stream)
        return ManagedHost(tmp_path / "cache", spec=made.spec, reporter=reporter, want_dev=want_dev, version=version)

    return build


@pytest.mark.usefixtures("repository")
@pytest.mark.full
def test_a_release_comes_from_comfyuis_own_repository(
    of_release: Callable[..., ManagedHost], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    host = of_release(release.version_of(release.NEWEST), stream).ensure()
    assert host.managed and host.comfyui == tmp_path / "cache" / "releases" / "9.9.9" / "comfyui"
    assert (host.comfyui / "main.py").is_file()
    found = versions(site_packages(host.python.parents[1]))
    assert found["sl-torch"] == "1.0", "the locked one, though the index has 2.0"
    assert found.keys() >= {"sl-theirs", "sl-own"} and "sl-dev" not in found
    said = stream.getvalue()
    assert "Setting up ComfyUI 9.9.9 from http" in said and re.search("sha256 [0-9a-f]{64}", said)
    use(monkeypatch, NOWHERE)
    monkeypatch.setattr(release, "REPOSITORY", "http://127.0.0.1:9")
    assert of_release("9.9.9").missing() == "" and of_release("9.9.9").ensure() == host
    assert of_release("9.9.9", want_dev=True).missing() == "packages of tests and checks: not done yet"


@pytest.mark.usefixtures("repository")
def test_a_release_that_cannot_be_had_is_told_with_what_else_there_is(
    of_release: Callable[..., ManagedHost], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HostError, match=r"9\.9\.8 could not be fetched .*404.*--comfyui PATH"):
        of_release("9.9.8").ensure()
    monkeypatch.setattr(release, "_ANSWERS", "http://127.0.0.1:9/latest")
    with pytest.raises(HostError, match=r"which release of ComfyUI is the newest .*Name one.*--comfyui PATH"):
        release.version_of(release.NEWEST)


def test_what_is_set_up_is_named_with_whose_it_is(made: Site) -> None:
    assert f"Setting up ComfyUI {made.spec.comfyui} from {made.spec.wheel_is}" in made.said
    assert made.spec.wheel_is.startswith(f"the PyPI package {ManagedSpec.wheel.replace('==', ' ')}, in which ")
    source = from_environment().comfyui / "comfyui_version.py"
    if from_environment().managed:
        assert f'"{ManagedSpec.comfyui}"' in source.read_text(encoding="utf-8")


def test_a_finished_set_up(made: Site) -> None:
    assert "[4/4] packages of tests and checks: done" in made.said
    assert "2.2 GB to fetch once" in made.said
    host = made.host().host()
    assert host.managed and host.python.exists() and (host.comfyui / "main.py").is_file()
    assert not (host.comfyui / "extra_model_paths.yaml").exists()
    assert (
        dict.fromkeys(("sl-torch", "sl-vision", "sl-theirs", "sl-own", "sl-dev"), "1.0").items()
        <= versions(made.site_packages()).items()
    )
    assert made.host().missing() == ""


def test_the_second_time_nothing_happens(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, NOWHERE)
    assert site.host().missing() == ""
    assert site.ensure() == [] and site.said == ""


def test_a_new_lock_runs_its_own_stage_only(site: Site) -> None:
    site.spec.lock.write_text(site.spec.lock.read_text() + "\n# a comment\n")
    assert site.ensure() == []
    write_lock(site.spec.test_lock, site.index, "sl-dev==1.0", "sl-more==1.0")
    assert site.ensure() == ["test-packages"]
    assert "sl-more" in versions(site.site_packages())


def test_a_package_with_another_hash_is_refused(site: Site) -> None:
    write_lock(site.spec.test_lock, site.index, "sl-more==1.0", sha256="0" * 64)
    with pytest.raises(HostError, match=r"sl-more==1\.0 \(packages of tests and checks\) has sha256 [0-9a-f]{64}"):
        site.ensure()
    assert "sl-more" not in versions(site.site_packages())
    assert site.host().missing() == "packages of tests and checks: not done yet"


def test_a_demo_needs_no_test_package(site: Site, tmp_path: Path) -> None:
    spec = dataclasses.replace(site.spec, test_lock=tmp_path / "nowhere.txt")
    stream = io.StringIO()
    assert ManagedHost(site.root, spec=spec, reporter=Reporter(stream)).missing() == ""
    with pytest.raises(HostError, match=r"nowhere\.txt cannot be read"):
        ManagedHost(site.root, spec=spec, reporter=Reporter(stream), want_dev=True).ensure()


def missing_of(lock: str, requirements: str) -> list[str]:
    """Requirement lines for which the lock has no version, or one that the line does not admit."""
    locked: dict[str, list[str]] = {}
    for line in packages.requirement_lines((pack_root() / "locks" / lock).read_text()):
        name, version = line.split()[0].split("==")
        locked.setdefault(canonicalize_name(name), []).append(version)
    wanted = {line: Requirement(line) for line in packages.requirement_lines(requirements)}
    found = {line: locked.get(canonicalize_name(one.name), []) for line, one in wanted.items()}
    return [
        line for line, one in wanted.items() if not found[line] or not all(map(one.specifier.contains, found[line]))
    ]


@pytest.mark.parametrize(
    ("lock", "sources"),
    [("host.txt", ["locks/host.in", "requirements.txt"]), ("test.txt", ["requirements-dev.txt"]),
     ("onediff.txt", ["locks/onediff.in"]), ("check.txt", ["locks/check.in"])],
)  # fmt: skip
def test_the_locks_hold_what_the_pack_asks_for(lock: str, sources: list[str]) -> None:
    """Each requirement is locked, in a version that it admits; each line has a hash."""
    blocks = [block for block in re.split(r"\n(?=\S)", (pack_root() / "locks" / lock).read_text()) if block[0] != "#"]
    assert blocks and all("--hash=sha256:" in block for block in blocks)
    for source in sources:
        assert missing_of(lock, (pack_root() / source).read_text()) == []
    assert missing_of(lock, "sl-no-such-package") and missing_of("host.txt", "torch>=99")


def test_the_lock_holds_what_the_managed_comfyui_asks_for() -> None:
    """A package that was installed by hand hides one that the lock lacks; ComfyUI's own list does not."""
    host = from_environment()
    if not host.managed:
        pytest.skip("the packages of a ComfyUI of one's own are not locked")
    assert missing_of("host.txt", (host.comfyui / "requirements.txt").read_text()) == []


def _drop_python(site: Site) -> None:
    environment_python(site.root / "venv").unlink()


def _drop_environment(site: Site) -> None:
    """What errors tell the user to do where a package is damaged."""
    (site.site_packages() / "sl_vision.py").unlink()
    (site.site_packages() / "sl_theirs.py").write_text("")
    shutil.rmtree(site.root / "venv")


def _drop_stamp(site: Site) -> None:
    (site.root / "stamps" / "packages.json").unlink()


def _drop_main(site: Site) -> None:
    (site.root / "comfyui" / "main.py").unlink()


def _drop_source_and_cut_wheel(site: Site) -> None:
    shutil.rmtree(site.root / "comfyui")
    kept = next((site.root / "downloads").glob("*.whl"))
    kept.write_bytes(kept.read_bytes()[:-100])


def _drop_source(site: Site) -> None:
    shutil.rmtree(site.root / "comfyui")
    shutil.rmtree(site.root / "downloads")
    (site.root / "comfyui.new" / "half").mkdir(parents=True)


@pytest.mark.parametrize(
    ("damage", "stages"),
    [
        pytest.param(_drop_python, ["environment", "packages", "test-packages"], marks=pytest.mark.full),
        (_drop_environment, ["environment", "packages", "test-packages"]),
        (_drop_stamp, ["packages"]),
        (_drop_main, ["comfyui"]),
        (_drop_source_and_cut_wheel, ["comfyui"]),
        (_drop_source, ["comfyui"]),
    ],
)
def test_what_was_deleted_is_made_anew_and_the_rest_is_kept(site: Site, damage, stages: list[str]) -> None:
    damage(site)
    assert site.host().missing() != ""
    assert site.ensure() == stages
    assert site.host().missing() == ""
    assert (site.site_packages() / "sl_vision.py").read_text() == "version = '1.0'\n"
    assert (site.site_packages() / "sl_theirs.py").read_text() == "version = '1.0'\n"
    assert (site.root / "comfyui" / "main.py").is_file() and not (site.root / "comfyui.new").exists()


def test_the_kept_wheel_is_unpacked_again_without_network(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, NOWHERE)
    _drop_main(site)
    assert site.ensure() == ["comfyui"]


@pytest.mark.full
def test_a_new_environment_that_was_interrupted_still_lacks_its_packages(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(site.root / "venv")
    use(monkeypatch, {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull})
    with pytest.raises(HostError):
        site.ensure()
    assert site.host().missing() == "ComfyUI's packages: not done yet"
    use(monkeypatch, pip_settings(site.index))
    assert site.ensure() == ["packages", "test-packages"]


def test_a_pip_killed_while_unpacking_is_not_believed(site: Site) -> None:
    """What an ended pip leaves: files, those of the wheel's dist-info too, but not what pip adds last; no stamp."""
    _drop_stamp(site)
    info = site.site_packages() / "sl_torch-1.0.dist-info"
    (info / "INSTALLER").unlink()
    assert (info / "METADATA").is_file() and (info / "RECORD").is_file()
    (site.site_packages() / "sl_torch.py").write_text("half")
    assert site.ensure() == ["packages"]
    assert (site.site_packages() / "sl_torch.py").read_text() == "version = '1.0'\n"
    assert (info / "INSTALLER").is_file()


def test_another_torch_is_put_back_once_the_stamp_is_deleted(site: Site) -> None:
    python = environment_python(site.root / "venv")
    subprocess.run([python, "-m", "pip", "install", "-q", "sl-torch==2.0"], check=True)
    _drop_stamp(site)
    assert site.ensure() == ["packages"]
    assert versions(site.site_packages())["sl-torch"] == "1.0"


def test_a_damaged_package_is_named_with_the_folder_to_delete(site: Site, tmp_path: Path) -> None:
    """The set-up does not look into packages; the server that cannot import one says what to do."""
    host = site.host().host()
    (host.comfyui / "comfy" / "cli_args.py").write_text('parser.add_argument("--base-directory")\n')
    for cpu, words in ((None, "torch does not import"), (True, "exit code 1")):
        (host.comfyui / "main.py").write_text("import torch\n")
        server = ComfyServer(host, pack=tmp_path, base=tmp_path / "base", cpu=cpu)
        with pytest.raises(ServerError, match=words) as caught:
            server.start()
        assert "No module named 'torch'" in str(caught.value)
        assert f"delete {site.root / 'venv'} and run `python run.py setup`" in str(caught.value)


def test_a_wheel_with_another_sha256_is_refused(site: Site, made: Site) -> None:
    site.spec = dataclasses.replace(site.spec, wheel_sha256="0" * 64)
    with pytest.raises(HostError, match="sha256") as caught:
        site.ensure()
    assert "sl-engine==1.0" in str(caught.value) and made.spec.wheel_sha256 in str(caught.value)
    assert not list((site.root / "downloads").glob("*.whl"))
    assert (site.root / "comfyui" / "main.py").is_file(), "what was there stays"


def test_without_network_it_says_so_and_resumes(site: Site, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _drop_source(site)
    use(monkeypatch, NOWHERE)
    with pytest.raises(HostError, match="Could not fetch sl-engine") as caught:
        site.ensure()
    assert "network" in str(caught.value) and "same command again" in str(caught.value)
    use(monkeypatch, pip_settings(index))
    assert site.ensure() == ["comfyui"]


def test_two_at_once_do_not_collide(site: Site) -> None:
    _drop_stamp(site)
    _drop_source(site)
    errors: list[BaseException] = []
    said: list[str] = []

    def go() -> None:
        stream = io.StringIO()
        try:
            ManagedHost(site.root, spec=site.spec, reporter=Reporter(stream), want_dev=True).ensure()
        except BaseException as error:
            errors.append(error)
        said.append(stream.getvalue())

    threads = [threading.Thread(target=go) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sum("ComfyUI's packages: done" in text for text in said) == 1
    assert site.host().missing() == ""


def test_a_cache_that_cannot_be_written(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    site.root = tmp_path / "file" / "cache"
    with pytest.raises(HostError, match="SPEEDLAB_CACHE") as caught:
        site.ensure()
    assert str(site.root) in str(caught.value)


def test_python_without_ensurepip(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    real = environment.importlib.util.find_spec
    monkeypatch.setattr(
        environment.importlib.util, "find_spec", lambda name, *rest: None if name == "ensurepip" else real(name, *rest)
    )
    site.root = tmp_path / "other"
    with pytest.raises(HostError, match=f"python{sys.version_info.major}.{sys.version_info.minor}-venv"):
        site.ensure()


def test_install_puts_in_only_what_is_missing(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[resolve_function.__module__]
    own = tmp_path / "pack"
    own.mkdir()
    (own / "requirements.txt").write_text("sl-own\nsl-more>=1\n")
    monkeypatch.setattr(module, "pack_root", lambda: own)
    path, python = str(site.root / "comfyui"), environment_python(site.root / "venv")
    arguments = {"python": python, "env": {}, "reporter": Reporter(io.StringIO())}
    with pytest.raises(HostError) as caught:
        resolve(path, **arguments)
    assert "sl-more>=1 (missing)" in str(caught.value) and "pip install 'sl-more>=1'" in str(caught.value)
    assert "sl-more" not in versions(site.site_packages())
    host = resolve(path, install=True, **arguments)
    assert not host.managed and host.origin == "from --comfyui"
    assert "sl-more" in versions(site.site_packages())
