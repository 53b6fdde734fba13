"""A real disk that is full or read-only: a small tmpfs, mounted for a while."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from speedlab.common.errors import SpeedLabError

_FILLER = "filler.bin"
_PAGE = 4096


class NoSmallDiskError(SpeedLabError):
    """No small disk can be mounted here; the message says why."""


class SmallDisk:
    """A mounted tmpfs at `path`. Fill it, free it, and switch writing off and on."""

    def __init__(self, path: Path, prefix: Sequence[str]) -> None:
        self.path, self._prefix = path, prefix

    def fill(self, leave: int) -> None:
        """Leave so many bytes free, to the page. What was filled before counts as free. Raises OSError."""
        filler = self.path / _FILLER
        filler.unlink(missing_ok=True)
        free = os.statvfs(self.path).f_bavail * os.statvfs(self.path).f_frsize
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(free - leave, _PAGE))

    def empty(self) -> None:
        """Give back what `fill` took."""
        (self.path / _FILLER).unlink(missing_ok=True)

    def set_writable(self, writable: bool) -> None:
        """Mount it again for reading alone, or for writing again. Raises NoSmallDiskError."""
        _call([*self._prefix, "mount", "-o", f"remount,{'rw' if writable else 'ro'}", str(self.path)])


@contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[SmallDisk]:
    """A disk of that size at `path`, gone afterwards with all that is on it.

    Raises NoSmallDiskError where this system has none, or this user may not mount one (root may, and whoever may use
    sudo without a password).
    """
    if sys.platform != "linux":
        raise NoSmallDiskError("A small disk cannot be mounted: only Linux has tmpfs.")
    path.mkdir(parents=True, exist_ok=True)
    options = f"size={megabytes}m,mode=700,uid={os.getuid()},gid={os.getgid()}"
    prefix = _mount(["mount", "-t", "tmpfs", "-o", options, "speedlab-stress", str(path)])
    try:
        yield SmallDisk(path, prefix)
    finally:
        # Lazily: a process that still has a file open there shall not keep it from going.
        _call([*prefix, "umount", "--lazy", str(path)])


def _mount(command: Sequence[str]) -> Sequence[str]:
    """Mount as this user, else by sudo; what stands before the commands that follow."""
    try:
        _call(command)
        return ()
    except NoSmallDiskError as error:
        if os.geteuid() == 0:
            raise
        try:
            _call(["sudo", "-n", *command])
        except NoSmallDiskError:
            raise error from None
        return ("sudo", "-n")


def _call(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoSmallDiskError(f"A small disk cannot be mounted: {error}") from error
    if done.returncode:
        raise NoSmallDiskError(f"A small disk cannot be mounted: {done.stderr.strip() or done.returncode}")
