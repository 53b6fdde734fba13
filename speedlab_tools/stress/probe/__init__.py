"""A custom node for the server that is stressed: what a run could have left in the process, as JSON.

Copied into that server's custom_nodes; it is no part of the pack.
"""

import gc
import json
import re
import threading
from collections import Counter
from typing import Any

import torch

from .measures import StressDigest, StressMeasures
from .memory import StressMemory

# Objects that live for one run and have to be gone after it.
_OF_A_RUN = (
    ".speedlab.techniques.", ".speedlab.patching.", ".speedlab.sampling.profiled", ".speedlab.sampling.run_record",
    ".speedlab.measure.profile_window", ".speedlab.measure.trace",
)  # fmt: skip
# Which programs were compiled of a network is remembered as long as it lives.
_OF_A_NETWORK = ".speedlab.techniques.compile.program.Programs"


class StressProbe:
    """Looks at the process and at the model that the stressed prompts ran on."""

    RETURN_TYPES = ()
    FUNCTION = "look"
    OUTPUT_NODE = True
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    @classmethod
    def IS_CHANGED(cls, model: Any) -> float:
        return float("nan")

    def look(self, model: Any) -> dict[str, Any]:
        seen = {"model": _model(model), "flags": _flags(), "threads": _threads(), "objects": _objects()}
        return {"ui": {"text": [json.dumps(seen, sort_keys=True)]}}


def _model(model: Any) -> dict[str, Any]:
    base = model.model
    modules = list(base.modules())
    return {
        "wrappers": {site: sorted(map(str, keys)) for site, keys in model.wrappers.items() if keys},
        "callbacks": {site: sorted(map(str, keys)) for site, keys in model.callbacks.items() if keys},
        "options": sorted(model.model_options),
        "transformer_options": sorted(model.model_options.get("transformer_options", {})),
        "attachments": sorted(map(str, model.attachments)),
        "object_patches": sorted(map(str, model.object_patches)),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules),
        "own_forwards": sum("forward" in vars(m) for m in modules),
        "modules": len(modules),
        "attributes": sorted(vars(base)),
        "dtypes": sorted({str(p.dtype) for p in base.parameters()}),
        "training": base.diffusion_model.training,
    }


def _flags() -> dict[str, Any]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return {
        "matmul_tf32": matmul.allow_tf32,
        "fp16_accumulation": getattr(matmul, "allow_fp16_accumulation", None),
        "cudnn_tf32": cudnn.allow_tf32,
        "cudnn_benchmark": cudnn.benchmark,
        "deterministic": cudnn.deterministic,
        "mkldnn": torch.backends.mkldnn.enabled,
        "autocast": [torch.is_autocast_enabled(), torch.is_autocast_enabled("cpu")],
        "default_dtype": str(torch.get_default_dtype()),
        "precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
    }


def _threads() -> list[str]:
    # Pools of the server's own loop grow by use; names are counted without their numbers.
    names = (f"{type(t).__name__} {re.sub('[0-9]+', '', t.name)}" for t in threading.enumerate())
    return sorted(name for name in names if "asyncio_" not in name)


def _objects() -> dict[str, int]:
    gc.collect()
    kinds = Counter(f"{type(o).__module__}.{type(o).__qualname__}" for o in gc.get_objects())
    return {
        kind: count
        for kind, count in kinds.items()
        if any(part in kind for part in _OF_A_RUN) and not kind.endswith(_OF_A_NETWORK)
    }


NODE_CLASS_MAPPINGS = {
    "SpeedLabStressProbe": StressProbe,
    "SpeedLabStressMemory": StressMemory,
    "SpeedLabStressMeasures": StressMeasures,
    "SpeedLabStressDigest": StressDigest,
}
