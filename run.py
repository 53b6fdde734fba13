"""SpeedLab's one entry point: `python run.py demo`, `python run.py test`; without arguments it lists its commands.

Needs Python 3.10 or newer and nothing else. This file keeps to words that any Python understands, so that an old one
gets a sentence instead of a syntax error.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - it runs before anything is installed
    sys.stderr.write("run.py needs Python 3.10 or newer; this is Python " + sys.version.split()[0] + ".\n")
    sys.exit(1)

import os

# Absolute, with links kept: a pack that is linked into custom_nodes lies in that ComfyUI.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120

from speedlab_tools.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
