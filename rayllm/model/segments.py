"""Sequences that share rows without seeing each other: where each token stands, and what it may look back to.

A segment is a run of tokens that is a sequence of its own, or one that continues a prefix: another segment of the
same tensor, which any number of segments may continue (a prompt and its samples). Positions count from the start of
the whole sequence, prefix included, so a token's numbers are those it would have in a row of its own.

Shapes: N tokens, those of all rows one after the other; R pieces, Q queries, S keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_Made = TypeVar("_Made")

QUERIES_PER_PIECE = 128
KEYS_PER_BUCKET = 64


def take_rows(x_Nx: Tensor, row_idx: Tensor) -> Tensor:
    """``x_Nx[row_idx]``, with a gradient that adds up in a fixed order, and faster than that of indexing: rows taken
    more than once, as the keys of a prompt are, would else give other last bits from run to run."""
    taken: Tensor = F.embedding(row_idx, x_Nx.flatten(1))
    return taken.view(*row_idx.shape, *x_Nx.shape[1:])


class Segment(NamedTuple):
    """Tokens ``start : start + length``, behind the ``prefix_len`` tokens from ``prefix_start`` on."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_len: int = 0


@dataclass(frozen=True)
class Lengths:
    """Segments as kernels for sequences of any length take them: queries lie as they are, keys are gathered."""

    key_idx_S: Tensor
    query_ends: Tensor
    key_ends: Tensor
    max_queries: int
    max_keys: int


@dataclass(frozen=True)
class Pieces:
    """Up to Q queries of a segment each, with the keys that any of them sees; alike in size, to be attended at once."""

    query_idx_RQ: Tensor
    key_idx_RS: Tensor
    is_seen_R1QS: Tensor


class Segments:
    """The segments of one forward, which tile its tokens in order.

    ``positions_N`` count from the start of a token's sequence; ``before_N`` is the token before each (-1: none).
    A token sees ``own_start_N`` up to itself, and ``prefix_start_N`` up to but not including ``prefix_end_N``, as far
    as its window reaches.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device | str = "cpu") -> None:
        ends = [0, *(s.start + s.length for s in segments)]
        assert all(s.start == end and s.length > 0 for s, end in zip(segments, ends, strict=False)), "segments tile"
        assert all(s.prefix_start + s.prefix_len <= s.start for s in segments), "a prefix stands before what follows it"
        self.segments, self.num_tokens, self.device = tuple(segments), ends[-1], torch.device(device)
        self.max_positions = max(s.prefix_len + s.length for s in segments)
        starts, lengths, prefix_starts, prefix_lens = (np.array(column) for column in zip(*segments, strict=True))
        token_N = np.arange(self.num_tokens)
        own_N = np.repeat(starts, lengths)
        prefix_start_N, prefix_len_N = np.repeat(prefix_starts, lengths), np.repeat(prefix_lens, lengths)
        before_N = np.where(
            token_N > own_N, token_N - 1, np.where(prefix_len_N > 0, prefix_start_N + prefix_len_N, 0) - 1
        )
        self.positions_N = self._place(token_N - own_N + prefix_len_N)
        self.before_N = self._place(before_N)
        self.own_start_N = self._place(own_N)
        self.prefix_start_N = self._place(prefix_start_N)
        self.prefix_end_N = self._place(prefix_start_N + prefix_len_N)
        self._made: dict[int, Any] = {}

    @staticmethod
    def from_ids(segment_ids_BT: Tensor) -> Segments:
        """Segments of rows: neighbours of one id belong together, and none reaches into the next row."""
        num_rows, num_tokens = segment_ids_BT.shape
        is_first_BT = torch.ones(num_rows, num_tokens, dtype=torch.bool)
        is_first_BT[:, 1:] = (segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]).cpu()
        starts = [*is_first_BT.flatten().nonzero().flatten().tolist(), num_rows * num_tokens]
        return Segments([Segment(a, b - a) for a, b in pairwise(starts)], segment_ids_BT.device)

    @staticmethod
    def of_rows(lengths: Sequence[Sequence[int]], row_len: int) -> Segments:
        """Segments of rows of `row_len` tokens that hold sequences of some lengths end to end: the last are cut off at
        the row's end, and what is left of a row is a segment of its own."""
        segments = []
        for row_idx, row in enumerate(lengths):
            at = 0
            for length in (*row, row_len):
                taken = min(length, row_len - at)
                if taken > 0:
                    segments.append(Segment(row_idx * row_len + at, taken))
                    at += taken
        return Segments(segments)

    def to(self, device: torch.device | str) -> Segments:
        """The same segments for tokens on another device."""
        return self if self.device == torch.device(device) else Segments(self.segments, device)

    @cached_property
    def lengths(self) -> Lengths:
        key_idx = [_key_indices(s, 0, s.prefix_len + s.length) for s in self.segments]
        num_queries, num_keys = [s.length for s in self.segments], [len(idx) for idx in key_idx]

        def ends(lengths: list[int]) -> Tensor:
            return self._place(np.cumsum([0, *lengths], dtype=np.int32))

        return Lengths(
            self._place(np.concatenate(key_idx)), ends(num_queries), ends(num_keys), max(num_queries), max(num_keys)
        )

    def pieces(self, window: int) -> tuple[list[Pieces], Tensor]:
        """Pieces by size, and where each of the N tokens stands among all their queries, laid end to end."""
        window = min(window, self.max_positions)  # wider ones are alike
        return self.remember(window, lambda: self._cut(window))

    def remember(self, window: int, make: Callable[[], _Made]) -> _Made:
        """What an attention kernel needs to know of a window, made once for all layers that have it."""
        if window not in self._made:
            self._made[window] = make()
        return cast(_Made, self._made[window])

    def _cut(self, window: int) -> tuple[list[Pieces], Tensor]:
        by_size: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]] = {}
        for segment in self.segments:
            for first in range(0, segment.length, QUERIES_PER_PIECE):
                last = min(first + QUERIES_PER_PIECE, segment.length)
                begin, end = max(0, segment.prefix_len + first - window), segment.prefix_len + last
                queries = np.arange(segment.start + first, segment.start + last)
                position_Q = np.arange(segment.prefix_len + first, end)
                piece = (queries, position_Q, _key_indices(segment, begin, end), np.arange(begin, end))
                by_size.setdefault((_rounded(last - first), _rounded(end - begin)), []).append(piece)
        batches, place_N, num_before = [], np.zeros(self.num_tokens, dtype=np.int64), 0
        for (num_queries, num_keys), pieces in sorted(by_size.items()):
            query_idx = np.zeros((len(pieces), num_queries), dtype=np.int64)
            key_idx = np.zeros((len(pieces), num_keys), dtype=np.int64)
            is_seen = np.zeros((len(pieces), 1, num_queries, num_keys), dtype=bool)
            is_seen[..., 0] = True  # what is only there to fill up sees something: no row of scores is empty
            for r, (queries, position_Q, keys, position_S) in enumerate(pieces):
                query_idx[r, : len(queries)], key_idx[r, : len(keys)] = queries, keys
                ago_QS = position_Q[:, None] - position_S
                is_seen[r, 0, : len(queries), : len(keys)] = (ago_QS >= 0) & (ago_QS <= window)
                place_N[queries] = num_before + r * num_queries + np.arange(len(queries))
            batches.append(Pieces(self._place(query_idx), self._place(key_idx), self._place(is_seen)))
            num_before += query_idx.size
        return batches, self._place(place_N)

    def _place(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def _key_indices(segment: Segment, begin: int, end: int) -> np.ndarray:
    """Where the positions ``begin : end`` of a segment's sequence lie."""
    position = np.arange(begin, end)
    in_prefix = position < segment.prefix_len
    return np.where(in_prefix, segment.prefix_start + position, segment.start + position - segment.prefix_len)


def _rounded(size: int) -> int:
    return -(-size // KEYS_PER_BUCKET) * KEYS_PER_BUCKET
