"""What a run does around sampling and each evaluation where functions are compiled graph by graph."""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...common.errors import UnavailableError
from .backends import dynamo
from .graphs import BLOCKS, Part, blocks_of, blocks_that_gain, swapped_in, whole
from .program import NETWORKS, weights_word
from .run import Run

# Whose weights are in code that was compiled with them, by the network's id: the last ones.
_frozen: OrderedDict[int, Hashable] = OrderedDict()


class GraphEngine:
    """Compiled functions for the blocks of a network, or for all of it."""

    def __init__(self, run: Run, patcher: Any, by_blocks: bool, every_block: bool = True) -> None:
        self.run, self.network = run, patcher.model.diffusion_model
        self.parts: list[Part] = []
        if run.options.freeze and getattr(patcher, "hook_patches", None):
            reason = UnavailableError(f"{run.backend.NAME} with freeze_weights cannot follow hooks that change weights")
            run.fail(type(self.network).__name__, reason, "Switch freeze_weights off, or take the hooks out.")
            return
        weights = _frozen_weights(self.network, patcher) if run.options.freeze else None
        if not by_blocks:
            self.parts = whole(self.network, run, weights)
            return
        kinds = BLOCKS if every_block else blocks_that_gain(run.options)
        if kinds != BLOCKS:
            run.note(
                "residual blocks run uncompiled: on a CPU they are convolutions, which PyTorch computes well as they "
                "are. Scope blocks compiles them too.",
                logging.INFO,
            )
        self.parts = blocks_of(self.network, run, weights, kinds)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Once a run: weights that differ in nothing but their numbers."""
        with dynamo.without_gradients(self.network):
            yield
        self._tell_outcome()

    @contextmanager
    def evaluating(self, _options: dict[str, Any]) -> Iterator[None]:
        """Once an evaluation: compiled code in place of the network's own, and out again."""
        options = self.run.options
        graphs = dynamo.GRAPHS_PER_KIND_STATIC if options.dynamic is False else dynamo.GRAPHS_PER_KIND
        if self.run.backend.uses_cuda_graphs(options):
            torch.compiler.cudagraph_mark_step_begin()
        limits = dynamo.limits(graphs, options.device, freeze=options.freeze, folder=options.folder)
        with limits, swapped_in(self.parts, self.run):
            yield

    def _tell_outcome(self) -> None:
        name, graphs = self.run.backend.NAME, self.run.graphs
        if not self.run.eager:
            kept = "all compiled code was found again" if graphs == 0 else f"{graphs} graphs were compiled"
            if self.run.from_disk:
                kept += f", {self.run.from_disk} of them from code kept on disk"
            self.run.note(f"{name}: {kept}, for {self.run.parts} kinds of {len(self.parts)} parts.", logging.INFO)


def give_back(network: Any) -> None:
    """Release code that was compiled with the weights of a network."""
    _give_back(id(network))


def _give_back(number: int) -> None:
    word = _frozen.pop(number, None)
    if word is not None:
        dynamo.forget(word)


def _frozen_weights(network: Any, patcher: Any) -> Hashable:
    """A word for the weights that code is compiled with. Code with others, or of networks before the last, is released:
    each holds its weights once more, and a function has room for few."""
    weights = (id(network), weights_word(patcher))
    before = _frozen.get(id(network))
    if before is None:
        # Another network may get the number of one that is gone.
        weakref.finalize(network, _give_back, id(network)).atexit = False
    stale = [] if before in (None, weights) else [before]
    _frozen[id(network)] = weights
    _frozen.move_to_end(id(network))
    while len(_frozen) > NETWORKS:
        stale.append(_frozen.popitem(last=False)[1])
    for word in stale:
        dynamo.forget(word)
    return weights
