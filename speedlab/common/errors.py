"""Errors that a user reads: what happened, which file or setting, what to do."""

from __future__ import annotations


class SpeedLabError(RuntimeError):
    """An error with a message written for the user of a node or of the command line."""


class ModelFileError(SpeedLabError):
    """A model file is missing, truncated, unsafe or of another kind than asked for."""


class ResultsError(SpeedLabError):
    """Results cannot be read or written; the message names the path."""


class UnavailableError(SpeedLabError):
    """An option cannot run here; the message names what to install or to pick instead."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
