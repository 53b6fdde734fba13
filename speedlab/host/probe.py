"""What a ComfyUI and its Python can do, found by looking: command line flags, and whether torch sees a device."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from .base import ServerError

_DEVICE_SCRIPT = """
import importlib.util, torch
for extension in ("torch_npu", "torch_mlu"):
    if importlib.util.find_spec(extension):
        __import__(extension)
found = []
for owner, name in ((torch, "cuda"), (torch, "xpu"), (torch, "npu"), (torch, "mlu"), (torch.backends, "mps")):
    part = getattr(owner, name, None)
    if part is not None and hasattr(part, "is_available") and part.is_available():
        found.append(name)
print("devices:" + ",".join(found))
"""


def flags(comfyui: Path) -> frozenset[str]:
    """The command line flags of a ComfyUI, such as "--base-directory". Raises ServerError where they cannot be read."""
    source = comfyui / "comfy" / "cli_args.py"
    try:
        text = source.read_text(encoding="utf-8")
    except OSError as error:
        raise ServerError(f"{source} cannot be read ({error.strerror}); {comfyui} is no whole ComfyUI.") from error
    return frozenset(re.findall(r"""["'](--[a-z0-9][a-z0-9_-]*)["']""", text))


def has_device(python: Path, env: Mapping[str, str]) -> bool:
    """Whether torch in that Python sees a device besides the CPU. Raises ServerError where torch does not import.

    Asked in a process of its own, which takes a second or two, and then remembered.
    """
    visible = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ONEAPI_DEVICE_SELECTOR")
    key = (python, *(env.get(name) for name in visible))
    if key not in _KNOWN:
        _KNOWN[key] = _run_device_script(python, env)
    return _KNOWN[key]


_KNOWN: dict[tuple[Path | str | None, ...], bool] = {}


def _run_device_script(python: Path, env: Mapping[str, str]) -> bool:
    try:
        answer = subprocess.run(
            [str(python), "-c", _DEVICE_SCRIPT], capture_output=True, text=True, timeout=180, env=dict(env)
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServerError(f"{python} does not run ({error}).") from error
    line = next((line for line in answer.stdout.splitlines() if line.startswith("devices:")), None)
    if answer.returncode != 0 or line is None:
        last = "\n".join("  " + text for text in answer.stderr.strip().splitlines()[-5:])
        raise ServerError(f"torch does not import in {python}:\n{last or '  no message'}")
    return line != "devices:"
