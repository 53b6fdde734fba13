"""The routes under /speedlab/ on a real server: what they answer, and what they refuse."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import pytest

pytestmark = pytest.mark.server


def ask(server, path, body=None, method=None, **headers):
    """(status, headers, bytes) of a request with exactly these headers."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def run_id(server):
    """A run of the real main job."""
    prompt = {
        "1": {"class_type": "SpeedLabCheckpointLoader", "inputs": {
            "ckpt_name": "speedlab_demo_sd15.safetensors", "precision": "auto", "memory_format": "contiguous"}},
        "2": {"class_type": "SpeedLabTextEncode", "inputs": {"clip": ["1", 1], "text": "<img src=x onerror=alert(1)>"}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "5": {"class_type": "SpeedLabProfileSampler", "inputs": {
            "model": ["1", 0], "seed": 1, "steps": 2, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal",
            "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["4", 0], "denoise": 1.0,
            "detail": "timing", "warmup": 0, "repeats": 1, "nvtx": True}},
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "SpeedLabProfileReport", "inputs": {"profile": ["5", 1], "images": ["6", 0]}},
    }  # fmt: skip
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]
    return entry["outputs"]["7"]["speedlab"][0]["run_id"]


def test_a_run_that_is_gone_can_be_asked_for_without_a_failed_request(server, run_id):
    """The page of a workflow that names it would have an error in its console."""
    gone = "/speedlab/runs/20200101-000000-0000000b"
    assert ask(server, gone)[0] == 404
    assert ask(server, f"{gone}?if_there")[::2] == (204, b"")
    there, name = ask(server, f"/speedlab/runs/{run_id}?if_there"), ask(server, "/speedlab/runs/nothing?if_there")
    assert there[0] == 200 and json.loads(there[2])["run_id"] == run_id
    assert name[0] in (204, 400, 404, 409)
    assert [ask(server, f"{gone}/file/images/0{query}")[0] for query in ("", "?if_there")] == [404, 204]
    assert ask(server, f"{gone}/workflow")[0] == 404
    status, _, why = ask(server, f"{gone}/workflow?if_there")
    assert status == 200 and gone.rpartition("/")[2] in json.loads(why)["error"]


def test_a_run_of_schema_1_is_shown_with_the_rate_of_its_steps_and_downloaded_as_it_is(server, run_id):
    old_id = "20250101-000000-0000000a"
    told = server.record(run_id)
    wrong = {**told["summary"], "it_per_s": 1e6, "step_median_ms": 0.001}
    path = server.output / "speedlab" / "runs" / f"{old_id}.json"
    path.write_text(json.dumps({**told, "run_id": old_id, "schema": 1, "summary": wrong}))
    try:
        shown = server.get(f"/speedlab/runs/{old_id}")
        assert (shown["schema"], shown["summary"]["steps"]) == (2, 2)
        assert 2 / shown["summary"]["it_per_s"] == pytest.approx(told["phases_ms"]["sample"] / 1000.0, rel=0.01)
        (listed,) = (run for run in server.get("/speedlab/runs?limit=200")["runs"] if run["run_id"] == old_id)
        assert listed["it_per_s"] == shown["summary"]["it_per_s"]
        assert (shown["phases_ms"]["total"], listed["total_ms"]) == (None, None), "it meant something else"
        assert ask(server, f"/speedlab/runs/{old_id}?download=1")[2] == path.read_bytes()
    finally:
        path.unlink()


def test_a_run_is_listed_read_and_its_files_are_served(server, run_id):
    page = server.get("/speedlab/runs?limit=1")
    assert page["runs"][0]["run_id"] == run_id
    assert set(page) == {"runs", "files", "skipped", "next_offset"}
    assert server.get("/api/speedlab/runs?q=euler+64x64")["runs"][0]["run_id"] == run_id
    assert server.get("/speedlab/runs?q=nothing-like-it")["runs"] == []
    assert server.get(f"/speedlab/runs/{run_id}")["run_id"] == run_id
    status, headers, _ = ask(server, f"/speedlab/runs/{run_id}?download=1")
    assert (status, headers["Content-Disposition"]) == (200, f'attachment; filename="{run_id}.json"')
    for kind in ("images", "chart"):
        status, headers, data = ask(server, f"/speedlab/runs/{run_id}/file/{kind}/0")
        assert (status, headers["Content-Type"], data[1:4]) == (200, "image/png", b"PNG")
        assert headers["X-Content-Type-Options"] == "nosniff"
    assert page["runs"][0]["position"] == 0
    for query, told in (("", None), ("?download=1", f'attachment; filename="{run_id}.html"')):
        status, headers, data = ask(server, f"/speedlab/runs/{run_id}/page{query}")
        assert (status, headers["Content-Disposition"]) == (200, told)
        assert headers["Content-Type"] == "text/html; charset=utf-8"
        assert b"data:image/png;base64," in data and "sandbox" in headers["Content-Security-Policy"]
    assert list(server.get(f"/speedlab/runs/{run_id}/workflow")) == ["prompt"], "it was queued without a canvas"
    # Of nodes that always run again ComfyUI writes NaN into the image, which is no JSON.
    assert b"NaN" in (server.output / "speedlab" / "images" / f"{run_id}_000.png").read_bytes()
    for query in ("", "?if_there"):
        assert b"NaN" not in ask(server, f"/speedlab/runs/{run_id}/workflow{query}")[2]
    status, headers, data = ask(server, "/speedlab/results.csv")
    assert status == 200 and run_id.encode() in data and headers["Content-Type"] == "text/csv"


def test_a_trace_is_handed_over_as_the_file_it_is(server, run_id):
    """Served as gzip-encoded, a browser would save it unpacked under a name that says packed."""
    path = server.output / "speedlab" / "runs" / f"{run_id}.json"
    record = json.loads(path.read_text())
    trace = server.output / "speedlab" / "runs" / f"{run_id}.trace.json.gz"
    trace.write_bytes(b"\x1f\x8b packed")
    record["artifacts"]["trace"] = f"speedlab/runs/{trace.name}"
    path.write_text(json.dumps(record))
    status, headers, data = ask(server, f"/speedlab/runs/{run_id}/file/trace/0")
    assert (status, data) == (200, b"\x1f\x8b packed")
    assert headers["Content-Encoding"] is None
    assert headers["Content-Disposition"] == f'attachment; filename="{trace.name}"'


@pytest.mark.parametrize(
    "path",
    ["/speedlab/runs/..%2f..%2fresults", "/speedlab/runs/%2e%2e", "/speedlab/runs/C:%5cx", "/speedlab/runs/a%00b",
     "/speedlab/runs?offset=-1", "/speedlab/runs?limit=many", "/speedlab/runs/20260101-000000-00000000",
     "/speedlab/runs/20260101-000000-00000000/file/images/-1", "/speedlab/runs/20260101-000000-00000000/page",
     "/speedlab/runs/..%2f..%2fresults/page", "/speedlab/runs/20260101-000000-00000000/workflow",
     "/speedlab/runs/%2fetc%2fpasswd"],
)  # fmt: skip
def test_what_is_no_run_is_refused(server, path):
    status, _, data = ask(server, path)
    assert status in (400, 404, 409)
    assert b"root:" not in data


def test_delete_wants_a_post_with_json_from_this_site(server, run_id):
    record = server.output / "speedlab" / "runs" / f"{run_id}.json"
    body = {"run_ids": [run_id]}
    assert ask(server, "/speedlab/delete")[0] in (404, 405)
    assert ask(server, "/speedlab/delete", body, **{"Content-Type": "text/plain"})[0] == 400
    assert ask(server, "/speedlab/delete", body, **{"Content-Type": "application/x-www-form-urlencoded"})[0] == 400
    assert ask(server, "/speedlab/delete", body, **JSON, Origin="http://evil.example")[0] == 403
    assert ask(server, "/speedlab/delete", b"{", **JSON)[0] == 400
    assert ask(server, "/speedlab/delete", b"[]", **JSON)[0] == 400
    assert ask(server, "/speedlab/delete", {"run_ids": run_id}, **JSON)[0] == 400
    assert ask(server, "/speedlab/prune", {"keep": -1}, **JSON)[0] == 400
    assert ask(server, "/speedlab/prune", {"keep": True}, **JSON)[0] == 400
    assert ask(server, "/speedlab/live", {"client_id": "", "on": True}, **JSON)[0] == 400
    assert record.is_file()
    status, _, data = ask(server, "/speedlab/delete", {"run_ids": [run_id, "../x"]}, **JSON)
    answer = json.loads(data)
    assert (status, answer["deleted"], list(answer["failed"])) == (200, [run_id], ["../x"])
    assert not record.exists()
    assert not list((server.output / "speedlab").rglob(f"{run_id}*"))


def test_a_body_in_letters_that_nobody_knows_is_refused_in_words(server):
    for charset in ("no-such", "rot13", "utf-16"):
        status, _, data = ask(
            server, "/speedlab/prune", {"keep": 0}, **{"Content-Type": f"application/json; charset={charset}"}
        )
        assert status == 400 and "not JSON" in json.loads(data)["error"]


def test_a_body_that_is_not_packed_as_it_says_is_refused_in_words(server):
    status, _, data = ask(server, "/speedlab/prune", {"keep": 0}, **JSON, **{"Content-Encoding": "gzip"})
    assert status == 400 and "packed" in json.loads(data)["error"]


def test_the_table_is_not_served_through_a_link(server, run_id, tmp_path):
    folder = server.output / "speedlab"
    folder.rename(tmp_path / "outside")
    try:
        folder.symlink_to(tmp_path / "outside", target_is_directory=True)
        status, _, data = ask(server, "/speedlab/results.csv")
        assert status == 409 and "leads out" in json.loads(data)["error"]
    finally:
        folder.unlink(missing_ok=True)
        (tmp_path / "outside").rename(folder)


def test_only_the_routes_that_are_needed_answer(server, run_id):
    """Reading is GET, changing is POST; nothing else of this pack answers, and nothing goes by asking."""
    before = server.get("/speedlab/runs")["files"]
    for method, path in (("PUT", "/speedlab/runs"), ("DELETE", f"/speedlab/runs/{run_id}"), ("POST", "/speedlab/runs"),
                         ("GET", "/speedlab/prune"), ("POST", f"/speedlab/runs/{run_id}/file/images/0"),
                         ("PATCH", "/speedlab/results.csv"), ("GET", "/speedlab"), ("GET", "/speedlab/delete"),
                         ("POST", f"/speedlab/{run_id}")):  # fmt: skip
        assert ask(server, path, b"{}" if method != "GET" else None, method, **JSON)[0] in (404, 405), (method, path)
    assert server.get("/speedlab/runs")["files"] == before
