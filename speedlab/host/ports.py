"""Ports on this machine's own address."""

from __future__ import annotations

import socket
import sys

from .base import ServerError

ADDRESS = "127.0.0.1"


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return int(probe.getsockname()[1])


def require_free(port: int) -> None:
    """Raises ServerError that names the port where something uses it, or it is no port."""
    if not 0 < port < 65536:
        raise ServerError(f"{port} is no port; take one from 1 to 65535.")
    with socket.socket() as probe:
        probe.settimeout(1.0)
        if probe.connect_ex((ADDRESS, port)) == 0:
            raise ServerError(f"Port {port} is in use by another program. Close that one or choose another port.")
    with socket.socket() as probe:
        # A server that has just ended must not count; on Windows the same option would allow to steal a port.
        if sys.platform == "win32":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
        except OSError as error:
            raise ServerError(
                f"Port {port} cannot be used ({error.strerror}). Close the program that has it or choose another port."
            ) from error
