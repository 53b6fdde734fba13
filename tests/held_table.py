"""A table that this process may read and not write, as one that a spreadsheet holds open."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_VERSION_3 = 0x20080522
_DAC_OVERRIDE = 1 << 1


@contextmanager
def held(table: Path) -> Iterator[None]:
    """Take away the right to write the table: from this thread alone where the user is root, who may write all."""
    mode = table.stat().st_mode
    table.chmod(0o444)
    root = sys.platform == "linux" and os.geteuid() == 0
    before = _capabilities() if root else None
    try:
        if before is not None:
            _set_capabilities([before[0] & ~_DAC_OVERRIDE, *before[1:]])
        with _must_be_refused(table):
            yield
    finally:
        if before is not None:
            _set_capabilities(before)
        table.chmod(mode)


@contextmanager
def _must_be_refused(table: Path) -> Iterator[None]:
    try:
        table.open("ab").close()
    except PermissionError:
        yield
        return
    raise AssertionError(f"{table} can still be written: this system has no way to hold it")


def _capabilities() -> list[int]:
    """Effective, permitted and inheritable capabilities of this thread, then their upper halves."""
    data = (ctypes.c_uint32 * 6)()
    _call("capget", data)
    return list(data)


def _set_capabilities(values: list[int]) -> None:
    _call("capset", (ctypes.c_uint32 * 6)(*values))


def _call(name: str, data: ctypes.Array) -> None:
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    if getattr(ctypes.CDLL(None, use_errno=True), name)(header, data):
        raise OSError(ctypes.get_errno(), name)
