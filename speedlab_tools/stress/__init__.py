"""Trying to break this pack on purpose: fuzzing of everything that it reads, and faults on a running server."""
