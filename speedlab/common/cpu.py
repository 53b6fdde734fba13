"""What a CPU can do: code that was compiled for another one may not run here, or computes in another way."""

from __future__ import annotations

import hashlib
import platform
import re
import sys
from functools import cache
from pathlib import Path

_FLAGS = re.compile(r"^(?:flags|Features)\s*:(.*)$", re.MULTILINE)
# Those that compilers write code for; a kernel lists many more, of its own and of the machine's security.
_USED = re.compile(
    r"(?:s?sse|avx|amx|fma|f16c|bmi|abm|popcnt|movbe|adx|gfni|aes|vaes|v?pclmul|sha|xop|asimd|fp(?:hp)?$|sve|sme(?!p)|i8mm|bf16)"
)


@cache
def instructions() -> tuple[str, ...]:
    """The kind of CPU and its sets of instructions, sorted; where the system lists none, the CPU's model."""
    try:
        found = _FLAGS.search(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        found = None
    words = {word for word in found[1].split() if _USED.match(word)} if found else {platform.processor()}
    return platform.machine(), *sorted(words)


def instructions_word() -> str:
    """Eight hex digits for those instructions."""
    return hashlib.sha256(" ".join(instructions()).encode()).hexdigest()[:8]


@cache
def cpu_name() -> str:
    """The CPU's name as the system gives it."""
    if sys.platform.startswith("linux"):
        try:
            lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine() or "CPU"
