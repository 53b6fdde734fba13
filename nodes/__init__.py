"""SpeedLab's nodes: each module ends in a `NODES` tuple; a node class names inputs, tooltips and outputs, no more."""

from __future__ import annotations

from . import (
    accelerate,
    benchmark,
    compare,
    compile,
    decode,
    ensemble,
    load,
    measure,
    memory,
    optimise,
    queue,
    sample,
    text,
)

_MODULES = (
    load, text, queue, accelerate, optimise, compile, memory, sample, ensemble, decode, measure, benchmark, compare,
)  # fmt: skip

NODE_CLASS_MAPPINGS = {node.NODE_ID: node for module in _MODULES for node in module.NODES}
for _plans in (accelerate.Accelerate, benchmark.Benchmark, benchmark.Tune):
    _plans.pack_nodes = NODE_CLASS_MAPPINGS
NODE_DISPLAY_NAME_MAPPINGS = {node_id: node.DISPLAY_NAME for node_id, node in NODE_CLASS_MAPPINGS.items()}
