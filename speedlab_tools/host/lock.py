"""One set-up at a time in a cache folder.

The operating system holds the lock, so a process that dies, however it dies, leaves none behind. On POSIX a child that
inherits the descriptor holds it too: a pip that outlives its killed parent keeps the next set-up waiting until it ends.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from .base import HostError

_FAR = 1 << 20  # Windows locks bytes and then nobody reads them: lock one beyond the text


class SetupLock:
    """`with SetupLock(path):` waits for the lock, and gives it back."""

    def __init__(
        self,
        path: Path,
        *,
        wait_s: float = 3600.0,
        on_wait: Callable[[str], None] | None = None,
        poll_s: float = 0.5,
    ) -> None:
        self.path = path
        self.wait_s = wait_s
        self.poll_s = poll_s
        self._on_wait = on_wait
        self._descriptor: int | None = None

    @property
    def inherit(self) -> tuple[int, ...]:
        """Descriptors that a child process should inherit to hold the lock as well."""
        return () if self._descriptor is None or sys.platform == "win32" else (self._descriptor,)

    def __enter__(self) -> SetupLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._wait(descriptor)
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            _unlock(descriptor)
            os.close(descriptor)

    def _wait(self, descriptor: int) -> None:
        begun = time.monotonic()
        say_at = 0.0
        while not self._try(descriptor):
            owner = _owner(self.path)
            waited = time.monotonic() - begun
            if waited >= say_at and self._on_wait is not None:
                self._on_wait(f"Another set-up ({owner}) is at work in {self.path.parent}; waiting, {waited:.0f} s")
                say_at = waited + 15.0
            if waited >= self.wait_s:
                raise HostError(
                    f"Another set-up ({owner}) has held {self.path} for more than {self.wait_s:.0f} s. "
                    "End that process, then run the same command again."
                )
            time.sleep(self.poll_s)

    def _try(self, descriptor: int) -> bool:
        try:
            return _try_lock(descriptor)
        except OSError as error:
            raise HostError(
                f"The file system of {self.path.parent} cannot lock files ({error.strerror}). "
                "Set SPEEDLAB_CACHE to a folder on a local disk."
            ) from error


def _owner(path: Path) -> str:
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        text = ""
    return f"process {text}" if text.isdigit() else "of another process"


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        os.lseek(descriptor, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True

    def _unlock(descriptor: int) -> None:
        os.lseek(descriptor, _FAR, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(descriptor: int) -> None:
        """Nothing: closing gives the lock back, and only when no child still holds the descriptor."""
