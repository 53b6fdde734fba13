"""Does the everyday tier notice a wrong line? `python tests/mutations.py` changes 30 of the engine, one at a time.

Each change is made in a copy of the source, where the test files that are named for it run until the first failure.
Afterwards the tests that failed run once more on the copy as it was, all of them in one process: there they have to
pass. The outcome is `tests/mutations.csv`. It takes half an hour; ComfyUI is the one that `run.py test` uses, or
`--comfyui PATH`. Numbers as arguments run those lines alone and renew their rows.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).with_suffix(".csv")
COLUMNS = ("number", "kind", "file", "line", "becomes", "tests", "outcome", "failed")
NEEDED = 28


@dataclass(frozen=True)
class Mutation:
    """`line` stands once in `speedlab/<file>`; `tests` are files below `tests/`."""

    kind: str
    file: str
    line: str
    becomes: str
    tests: tuple[str, ...]


_SAMPLING = ("comfy/test_deepcache_sampling.py",)
_CFG = ("comfy/test_dynamic_cfg.py",)
_CONV = ("engine/test_conv_as_matmul.py",)
MUTATIONS = (
    Mutation("sign", "patching/schedule.py", "threshold = sigma * (1.0 - _RELATIVE_TOLERANCE)",
             "threshold = sigma * (1.0 + _RELATIVE_TOLERANCE)", ("engine/test_schedule.py",)),
    Mutation("rounding", "patching/schedule.py", "return math.floor(fraction * steps + 1e-9)",
             "return math.floor(fraction * steps)", ("engine/test_schedule.py",)),
    Mutation("off by one", "techniques/deepcache/schedule.py", "return frozenset(range(first, end, config.interval))",
             "return frozenset(range(first, end, config.interval + 1))", ("engine/test_deepcache_schedule.py",)),
    Mutation("sign", "patching/position.py", "steps_before(share, part.total) - part.first, 0)",
             "steps_before(share, part.total) + part.first, 0)", ("engine/test_deepcache_schedule.py",)),
    Mutation("factor", "techniques/cpu/conv_as_matmul.py", "(size + 2 * padding - dilation",
             "(size + padding - dilation", _CONV),
    Mutation("comparison", "techniques/cpu/conv_as_matmul.py", "pixels * _CHANNELS <= most * weight.shape[0]",
             "pixels * _CHANNELS >= most * weight.shape[0]", _CONV),
    Mutation("skipped restore", "patching/layer_forwards.py", 'del layer.__dict__["forward"]', "pass", _CONV),
    Mutation("fraction", "measure/summary.py", "{1000.0 / step_ms:.6g}", "{step_ms / 1000.0:.6g}",
             ("engine/test_summary.py",)),
    Mutation("direction", "vae/attempts.py", "weights[-shared:] *= _ramp(shared).flip(0)",
             "weights[-shared:] *= _ramp(shared)", ("engine/test_vae_tiles.py",)),
    Mutation("condition", "measure/store.py", "for waiting in waited if waiting.run_id not in known",
             "for waiting in waited if waiting.run_id in known", ("engine/test_store.py",)),
    Mutation("sign", "plans/batch_search.py", "return int(max(top - start, 0) + slope",
             "return int(max(top - start, 0) - slope", ("engine/test_sweep_text.py",)),
    Mutation("dropped clone", "techniques/deepcache/features.py", "_Entry(step, chunk.clone(),", "_Entry(step, chunk,",
             (*_SAMPLING, "comfy/test_deepcache_patches.py")),
    Mutation("comparison", "techniques/deepcache/features.py", "if evaluation.source <= e.step <= evaluation.step]",
             "if evaluation.source <= e.step]", (*_SAMPLING, "comfy/test_schedule_places.py")),
    Mutation("skipped clear", "techniques/deepcache/features.py", "if position.went_back:", "if False:",
             (*_SAMPLING, "comfy/test_schedule_places.py")),
    Mutation("comparison", "techniques/deepcache/attach.py", "if evaluation.step != evaluation.source:",
             "if evaluation.step == evaluation.source:", _SAMPLING),
    Mutation("sign", "techniques/deepcache/forward.py", 'options["transformer_index"] += _transformers_left_out',
             'options["transformer_index"] -= _transformers_left_out', ("comfy/test_deepcache_patches.py",)),
    Mutation("comparison", "techniques/guidance/dynamic_cfg.py", "place >= steps_before(config.stop_at, total)",
             "place > steps_before(config.stop_at, total)", _CFG),
    Mutation("any for all", "techniques/guidance/dynamic_cfg.py", "dim=1).min())", "dim=1).max())", _CFG),
    Mutation("skipped restore", "techniques/guidance/rows.py", "        guider.cfg = cfg\n", "        pass\n", _CFG),
    Mutation("skipped restore", "techniques/precision/torch_flags.py", "return lambda: setattr(owner, name, before)",
             "return lambda: None", ("comfy/test_precision_flags.py",)),
    Mutation("dropped copy", "techniques/precision/attach.py", "return out.contiguous() if isinstance",
             "return out if isinstance", ("comfy/test_precision_flags.py", "comfy/test_precision_cpu.py")),
    Mutation("condition", "techniques/attention/attach.py", "    run.safe = True\n", "    run.safe = False\n",
             ("comfy/test_attention.py",)),
    Mutation("swapped", "techniques/attention/attach.py", "q.shape[-1] if skip_reshape else q.shape[-1] // heads",
             "q.shape[-1] // heads if skip_reshape else q.shape[-1]", ("comfy/test_attention.py",)),
    Mutation("fraction", "vae/attempts.py", "max(present // 2 //", "max(present // 4 //",
             ("comfy/test_decode_fitting.py",)),
    Mutation("skipped restore", "memory/streaming.py", "module.comfy_cast_weights = True", "pass",
             ("comfy/test_memory_streaming.py",)),
    Mutation("skipped restore", "memory/streaming.py", "            module._parameters[name] = home",
             "            pass", ("comfy/test_memory_streaming.py",)),
    Mutation("off by one", "sampling/ensemble.py", "_part(following, out, request, sigmas, start=first)",
             "_part(following, out, request, sigmas, start=first + 1)", ("comfy/test_ensemble.py",)),
    Mutation("cond for uncond", "measure/trace.py", "for which in cond_or_uncond if which == 1",
             "for which in cond_or_uncond if which == 0", ("comfy/test_profile_sampler.py",)),
    Mutation("factor", "models/lora.py", "weights, choice.strength, choice.strength)", "weights, choice.strength, 1.0)",
             ("comfy/test_loading.py",)),
    Mutation("stale key", "techniques/compile/program.py",
             'return getattr(patcher.model, "current_weight_patches_uuid", None) or patcher.patches_uuid', "return 0",
             ("comfy/test_compile_backends.py",)),
)  # fmt: skip


def source(root: Path, mutation: Mutation) -> Path:
    """The file of a mutation below a copy of this repository."""
    return root / "speedlab" / mutation.file


def mutated(text: str, mutation: Mutation) -> str:
    """The source with its one line changed. Raises ValueError where that line does not stand there once."""
    if text.count(mutation.line) != 1:
        raise ValueError(f"speedlab/{mutation.file} has {text.count(mutation.line)} times: {mutation.line}")
    return text.replace(mutation.line, mutation.becomes)


def copy_tree(target: Path) -> None:
    """The files that git knows or would take in."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


class Runner:
    """Runs tests of a copy with the Python and ComfyUI of `run.py test`."""

    def __init__(self, tree: Path, comfyui: str | None) -> None:
        sys.path.insert(0, str(ROOT))
        from speedlab_tools.check import PYTEST
        from speedlab_tools.host.base import child_environment
        from speedlab_tools.host.progress import Reporter
        from speedlab_tools.host.resolve import resolve

        host = resolve(comfyui, True, install=False, managed=False, reporter=Reporter())
        self._command = [str(host.python), "-c", PYTEST, "-q", "-p", "no:cacheprovider", "-m", "not full"]
        self._env = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **child_environment(host)}
        self._tree = tree

    def __call__(self, *arguments: str) -> tuple[int, str]:
        """pytest's exit code and output."""
        done = subprocess.run(
            [*self._command, *arguments],
            cwd=self._tree,
            env={**os.environ, **self._env},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr


def try_one(tree: Path, run: Runner, mutation: Mutation) -> tuple[str, str]:
    """`red` and the test that failed, or `green`; `broken` and the end of the output where no test could run."""
    path = source(tree, mutation)
    before = path.read_text(encoding="utf-8")
    path.write_text(mutated(before, mutation), encoding="utf-8")
    try:
        code, output = run("-x", *(f"tests/{name}" for name in mutation.tests))
    finally:
        path.write_text(before, encoding="utf-8")
    failed = re.findall(r"^FAILED (\S.*?)(?: - .*)?$", output, flags=re.MULTILINE)
    if code == 1 and failed:
        return "red", failed[0]
    return ("green", "") if code == 0 else ("broken", " | ".join(output.strip().splitlines()[-5:]))


def main() -> int:
    """Exit code 0 where enough mutations are red and their tests are green without them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("numbers", nargs="*", type=int)
    parser.add_argument("--comfyui")
    options = parser.parse_args()
    say = sys.stdout.write
    rows: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory(prefix="speedlab-mutations-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        run = Runner(tree, options.comfyui)
        for number, mutation in enumerate(MUTATIONS, start=1):
            if options.numbers and number not in options.numbers:
                continue
            began = time.monotonic()
            outcome, failed = try_one(tree, run, mutation)
            told = (str(number), mutation.kind, f"speedlab/{mutation.file}", mutation.line.strip(),
                    mutation.becomes.strip(), " ".join(mutation.tests), outcome, failed)  # fmt: skip
            rows.append(dict(zip(COLUMNS, told, strict=True)))
            seconds = time.monotonic() - began
            say(f"{number:2} {outcome:6} {seconds:5.0f} s  {mutation.kind}, {mutation.file}: {failed}\n")
            sys.stdout.flush()
        red = [row for row in rows if row["outcome"] == "red"]
        code, output = run(*sorted({row["failed"] for row in red})) if red else (1, "")
    say(f"{len(red)} of {len(rows)} red; without a change these tests {'pass' if code == 0 else 'FAIL'}\n")
    if code:
        say(output[-3000:])
    if code == 0:
        write(rows)
    return 0 if code == 0 and (options.numbers or len(red) >= NEEDED) else 1


def write(rows: Sequence[Mapping[str, str]]) -> None:
    """The outcome, with the rows of lines that were not tried this time as they are."""
    known: dict[str, Mapping[str, str]] = {}
    if RESULT.is_file():
        with RESULT.open(newline="", encoding="utf-8") as file:
            known = {row["number"]: row for row in csv.DictReader(file)}
    known |= {row["number"]: row for row in rows}
    with RESULT.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(known[number] for number in sorted(known, key=int))


if __name__ == "__main__":
    sys.exit(main())
