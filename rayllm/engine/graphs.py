"""Decode steps as CUDA graphs: a step is some hundred small kernels, and starting them takes longer than they do.

Shapes: B rows, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rayllm.engine.views import DecodeInput


class DecodeGraphs:
    """Captures `step` once for each shape of its input and replays it from then on.

    Replays read weights and caches where they lay at capture: new weights are to be copied there. What a call returns
    holds until the next.
    """

    def __init__(self, step: Callable[[DecodeInput], Tensor]) -> None:
        self._step = step
        self._graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, DecodeInput, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, given: DecodeInput) -> Tensor:
        if given.shape not in self._graphs:
            self._graphs[given.shape] = self._capture(given)
        graph, static, logits_BV = self._graphs[given.shape]
        static.numbers_5B.copy_(given.numbers_5B)
        static.rows_PR.copy_(given.rows_PR)
        graph.replay()
        return logits_BV

    def _capture(self, given: DecodeInput) -> tuple[torch.cuda.CUDAGraph, DecodeInput, Tensor]:
        static = replace(given, numbers_5B=given.numbers_5B.clone(), rows_PR=given.rows_PR.clone())
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up in a first run, which must not be captured
            self._step(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits_BV = self._step(static)
        return graph, static, logits_BV
