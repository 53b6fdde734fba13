"""A server of this pack talks to nobody, and nobody but this machine talks to it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

pytestmark = pytest.mark.server

# Python runs this before anything else in the server's process: what leads to another machine is noted and refused.
GUARD = """
import os, sys, traceback
NOTES = os.environ["SPEEDLAB_TEST_NOTES"]
HERE = {"127.0.0.1", "::1", "localhost", "0.0.0.0", "", None}

def guard(event, arguments):
    if event in ("socket.connect", "socket.sendto"):
        address = arguments[1]
        if not isinstance(address, tuple) or address[0] in HERE:
            return
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        address = arguments[0]
        if address in HERE or address in (b"127.0.0.1", b"localhost"):
            return
    else:
        return
    with open(NOTES, "a") as notes:
        notes.write(f"{event} {address!r}\\n{''.join(traceback.format_stack())}\\n")
    raise OSError(101, "Network is unreachable")

with open(NOTES, "a") as notes:
    notes.write("guarded\\n")
sys.addaudithook(guard)
"""


@pytest.fixture(scope="module")
def guarded(start_server, tmp_path_factory):
    """A server whose process refuses every connection to another machine; `notes` says which were tried."""
    guard = tmp_path_factory.mktemp("guard")
    (guard / "sitecustomize.py").write_text(GUARD)
    notes = guard / "notes.txt"
    environment = {"PYTHONPATH": str(guard), "SPEEDLAB_TEST_NOTES": str(notes)}
    return start_server(env=environment), notes


@pytest.mark.full
def test_a_whole_prompt_runs_with_the_network_cut_off(guarded, graph):
    api, notes = guarded
    entry = api.run(graph(tiny=False))
    assert entry["status"]["status_str"] == "success", entry["status"]
    lines = notes.read_text().splitlines()
    assert lines and set(lines) == {"guarded"}, "\n".join(lines)


@pytest.mark.full
def test_the_guard_would_see_a_connection(guarded, tmp_path):
    import os
    import subprocess
    import sys

    notes = tmp_path / "other.txt"
    environment = {**os.environ, "PYTHONPATH": str(guarded[1].parent), "SPEEDLAB_TEST_NOTES": str(notes)}
    script = "import socket; socket.create_connection(('192.0.2.1', 80), 2)"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert "Network is unreachable" in done.stderr and "192.0.2.1" in notes.read_text()


def test_a_started_server_listens_on_loopback_alone(server):
    """Linux tells every listening socket; elsewhere the machine's own address is tried."""
    port = server.server.port
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    if tables[0].is_file():
        rows = [line.split() for table in tables if table.is_file() for line in table.read_text().splitlines()[1:]]
        listening = {row[1].rpartition(":")[0] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")}
        assert listening == {"0100007F"}
    else:
        with pytest.raises(OSError):
            socket.create_connection((socket.gethostbyname(socket.gethostname()), port), 2)
