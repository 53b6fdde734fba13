"""Fuzzing of what reads through ComfyUI: model files, their names, and the routes on a socket."""

from __future__ import annotations

from pathlib import Path

import pytest

from speedlab_tools.stress import readers as traps
from speedlab_tools.stress.fuzz import Target, fuzz, judge
from speedlab_tools.stress.web_routes import SECRET, Request, route_targets

INPUTS = 300


@pytest.fixture
def models(model_files):
    """The models folder; files that a test puts there are removed again."""
    folders = [model_files / "checkpoints", model_files / "vae"]
    before = {path for folder in folders for path in folder.iterdir()}
    yield model_files
    for path in {path for folder in folders for path in folder.iterdir()} - before:
        path.unlink()


def test_the_trap_works_where_a_loader_runs_code():
    assert traps.trap_works()


def test_no_model_file_breaks_a_loader_or_runs_code(models, comfy):
    for target in traps.model_targets(models):
        tally = fuzz(target, INPUTS)
        assert not tally.defects, target.name
        # Any text may name a tensor, so that counting modules has nothing to refuse.
        mostly = "fine" if target.name == "tensor names" else "refused"
        assert tally.inputs == INPUTS and tally.counts[mostly] > INPUTS / 2


def test_code_in_a_pickle_would_be_seen(models, comfy, monkeypatch):
    """The same target with a loader that runs what it loads."""
    import pickle

    import torch

    monkeypatch.setattr(torch, "load", lambda path, **_: pickle.loads(Path(path).read_bytes()))
    target = next(t for t in traps.model_targets(models) if t.name == "pickle file")
    assert "code of a pickle was run" in judge(target, pickle.dumps({"state_dict": traps.Trap()})).reason


def test_no_request_breaks_a_route_or_leads_out(comfy, base_dir, tmp_path):
    with route_targets(tmp_path / "secret.txt") as (target,):
        tally = fuzz(target, INPUTS)
        assert not tally.defects
        assert tally.counts["fine"] and tally.counts["refused"]
        for kind in ("no-such", "rot13", "utf-16"):
            headers = {"Content-Type": f"application/json; charset={kind}"}
            assert judge(target, Request("POST", "/speedlab/prune", b'{"keep": 0}', headers)).verdict == "refused"
        headers = {"Content-Type": "application/json"}
        assert judge(target, Request("POST", "/speedlab/prune", b'{"keep": 0}', headers)).verdict == "fine"


def test_a_server_error_and_a_secret_given_away_would_be_seen(comfy, base_dir, tmp_path, monkeypatch):
    from speedlab.web import routes
    from speedlab.web.library import RunLibrary

    with route_targets(tmp_path / "secret.txt") as (target,):
        monkeypatch.setattr(RunLibrary, "shown", lambda self, run_id: SECRET.decode())
        assert "gave away" in judge(target, Request("GET", "/speedlab/runs/20260102-030405-0123abcd")).reason
        monkeypatch.setattr(routes, "_library", lambda: 1 / 0)
        assert "answered 500" in judge(target, Request("GET", "/speedlab/runs")).reason
    assert isinstance(target, Target)
