"""What `run.py` starts in the host's Python: `python -m speedlab_tools COMMAND ...`, for commands that need ComfyUI."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from speedlab.common.errors import SpeedLabError

from .cli.arguments import COMMANDS, UsageError, parse
from .host.base import CALLED_FROM
from .host.child import INTERRUPTED
from .scenarios.catalog import UnknownScenarioError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (1: an error, 2: wrong arguments, 130: interrupted)."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    name, *rest = sys.argv[1:] if arguments is None else arguments or [""]
    note = "interrupted"
    try:
        options, _ = parse(name, rest)
        command = COMMANDS[name]
        if command.runs is None:
            raise UsageError(f"`python run.py {name}` runs this command.")
        note = command.interrupted
        stands = os.environ.get(CALLED_FROM)
        if command.moves and stands is not None and Path(stands).is_dir():
            os.chdir(stands)
        module, _, function = command.runs.partition(":")
        return int(getattr(importlib.import_module(f".{module}", __package__), function)(options))
    except (UsageError, UnknownScenarioError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (SpeedLabError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(note, file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
