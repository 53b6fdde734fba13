"""Where no small disk can be mounted, that is said, and never passed over."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from speedlab_tools.stress.small_disk import NoSmallDiskError, small_disk

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="small disks are mounted on Linux alone")


def programs(folder: Path, text: str) -> str:
    """A PATH on which mount and sudo are this script."""
    for name in ("mount", "sudo"):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return str(folder)


def test_a_refused_mount_is_told_in_the_systems_words(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", programs(tmp_path, "echo mount: only root can do that >&2; exit 1"))
    words = "cannot be mounted: mount: only root can do that"
    with pytest.raises(NoSmallDiskError, match=words), small_disk(tmp_path / "disk", 4):
        pytest.fail("nothing was mounted")


def test_a_system_without_mount_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoSmallDiskError, match="cannot be mounted"), small_disk(tmp_path / "disk", 4):
        pytest.fail("nothing was mounted")


def test_the_command_says_what_was_not_tried(tmp_path):
    from speedlab_tools.stress.faults import attempt

    told = []

    def make():
        raise NoSmallDiskError("A small disk cannot be mounted: only root can do that")

    assert attempt(make, told.append) is None
    assert told == ["NOT TRIED: A small disk cannot be mounted: only root can do that"]
