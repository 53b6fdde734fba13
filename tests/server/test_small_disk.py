"""A real disk that is full, and one that can only be read, under a real server's output folder."""

from __future__ import annotations

import errno
import os
from random import Random

import pytest

from speedlab_tools.stress.faults import fill_real_disk, make_read_only
from speedlab_tools.stress.small_disk import NoSmallDiskError, small_disk
from speedlab_tools.stress.writers import fill_small_disk

pytestmark = pytest.mark.server
CHECKPOINT = "speedlab_demo_sd15.safetensors"


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    try:
        mounted = small_disk(tmp_path_factory.mktemp("small") / "disk", 64)
        disk = mounted.__enter__()
    except NoSmallDiskError as error:
        pytest.skip(str(error))
    yield disk
    mounted.__exit__(None, None, None)
    assert not os.path.ismount(disk.path)


@pytest.fixture(scope="module")
def api(start_server, disk):
    api = start_server(output=disk.path)
    yield api
    api.server.stop()


def test_the_disk_is_as_small_as_it_says(disk):
    disk.fill(8192)
    with pytest.raises(OSError) as full, (disk.path / "more").open("wb", buffering=0) as file:
        for _ in range(100):
            file.write(bytes(4096))
    assert full.value.errno == errno.ENOSPC
    (disk.path / "more").unlink()
    disk.empty()
    disk.set_writable(False)
    with pytest.raises(OSError) as closed:
        (disk.path / "more").touch()
    assert closed.value.errno == errno.EROFS
    disk.set_writable(True)
    (disk.path / "more").touch()
    (disk.path / "more").unlink()


@pytest.mark.full
def test_a_disk_that_fills_up_is_told_and_costs_no_run(api, disk):
    tally = fill_real_disk(api.url, disk, CHECKPOINT, 8, Random(5))
    assert not tally.broken
    assert tally.faults == 8 and tally.runs >= 2
    assert tally.halves >= 2, "some prompts did not find room"


@pytest.mark.full
def test_a_folder_that_can_only_be_read_is_told_and_costs_no_run(api, disk):
    tally = make_read_only(api.url, disk, CHECKPOINT, 3, Random(6))
    assert not tally.broken
    assert tally.halves == tally.faults == 3 and tally.runs == 2


def test_writers_on_a_disk_that_fills_up_lose_no_run(disk):
    tally = fill_small_disk(disk, 8, Random(7))
    assert not tally.broken
    assert tally.faults == 8 and tally.runs > 0
