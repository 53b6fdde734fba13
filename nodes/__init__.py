"""SpeedLab's nodes: each module ends in a `NODES` tuple; a node class names inputs, tooltips and outputs, no more."""

from __future__ import annotations

from . import accelerate, compare, compile, decode, load, measure, optimise, sample, text

_MODULES = (load, text, accelerate, optimise, compile, sample, decode, measure, compare)

NODE_CLASS_MAPPINGS = {node.NODE_ID: node for module in _MODULES for node in module.NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node_id: node.DISPLAY_NAME for node_id, node in NODE_CLASS_MAPPINGS.items()}
