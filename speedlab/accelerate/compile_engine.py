"""What a run does around sampling and each evaluation where functions are compiled graph by graph."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .backends import dynamo
from .compile_graphs import blocks_of, swapped_in, whole
from .compile_run import Run


class GraphEngine:
    """Compiled functions for the blocks of a network, or for all of it."""

    def __init__(self, run: Run, network: torch.nn.Module, by_blocks: bool) -> None:
        self.run, self.network = run, network
        self.parts = blocks_of(network, run) if by_blocks else whole(network, run)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Once a run: weights that differ in nothing but their numbers."""
        with dynamo.without_gradients(self.network):
            yield
        self._tell_outcome()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Once an evaluation: compiled code in place of the network's own, and out again."""
        options = self.run.options
        graphs = dynamo.GRAPHS_PER_KIND_STATIC if options.dynamic is False else dynamo.GRAPHS_PER_KIND
        if self.run.backend.uses_cuda_graphs(options):
            torch.compiler.cudagraph_mark_step_begin()
        with dynamo.limits(graphs, freeze=options.freeze, folder=options.folder), swapped_in(self.parts, self.run):
            yield

    def _tell_outcome(self) -> None:
        name, graphs = self.run.backend.NAME, self.run.graphs
        if not self.run.eager:
            kept = "all compiled code was found again" if graphs == 0 else f"{graphs} graphs were compiled"
            self.run.note(f"{name}: {kept}, for {self.run.parts} kinds of {len(self.parts)} parts.", logging.INFO)
