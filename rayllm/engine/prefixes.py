"""The prompts that the cache holds, for those who run on from them and for those to come. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field

MIN_SHARED = 16
"""Fewer tokens in common are computed anew."""


@dataclass(eq=False, slots=True)
class Prefix:
    """Tokens whose first `num_cached` lie in row `row_idx` of the prompts' cache; `num_users` sequences run on from
    there, or wait to."""

    row_idx: int
    token_ids: tuple[int, ...]
    must_clear: bool
    """Whether the row may hold what is not a number."""
    num_cached: int = 0
    shortest_cut: int = 0
    """The least it can be cut to: what was further back may have been overwritten."""
    num_users: int = 0
    has_logits: bool = True
    """Whether the runner knows what follows the tokens."""
    is_sound: bool = False
    """Whether what follows was seen to be a number."""

    @property
    def is_ready(self) -> bool:
        return self.num_cached == len(self.token_ids)


@dataclass
class PrefixTable:
    """The rows of the prompts' cache; of those without users, the one not used for longest makes room for a new one."""

    num_rows: int
    _used: dict[tuple[int, ...], Prefix] = field(default_factory=dict)  # the longest unused first
    _unsound_rows: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self._used)

    def find(self, token_ids: tuple[int, ...]) -> Prefix | None:
        """The prefix of exactly these tokens, ready or in the making, after which the next token can be drawn."""
        prefix = self._used.get(token_ids)
        if prefix is None or not prefix.has_logits:
            return None
        self._used[token_ids] = self._used.pop(token_ids)
        return prefix

    def find_shared(self, token_ids: tuple[int, ...]) -> tuple[Prefix, int] | None:
        """The prefix that has most in common with these tokens, and how many of them; at least one is left over."""
        best: tuple[Prefix, int] | None = None
        for prefix in self._used.values():
            shared = min(_num_shared(prefix.token_ids, token_ids), len(token_ids) - 1)
            is_whole = prefix.is_ready and prefix.is_sound and shared >= prefix.shortest_cut
            if is_whole and shared >= MIN_SHARED and (best is None or shared > best[1]):
                best = (prefix, shared)
        return best

    def claim(self, token_ids: tuple[int, ...]) -> Prefix | None:
        """A row for these tokens; None while all have users, or these very tokens have."""
        given_up = self._used.get(token_ids)
        if given_up is None and len(self._used) == self.num_rows:
            given_up = next((prefix for prefix in self._used.values() if not prefix.num_users), None)
            if given_up is None:
                return None
        if given_up is None:
            row_idx = min(set(range(self.num_rows)) - {prefix.row_idx for prefix in self._used.values()})
        elif given_up.num_users:
            return None
        else:
            row_idx = given_up.row_idx
            self._forget(given_up)
        prefix = self._used[token_ids] = Prefix(row_idx, token_ids, must_clear=row_idx in self._unsound_rows)
        self._unsound_rows.discard(row_idx)
        return prefix

    def clear(self) -> None:
        """Forget all: none may have users."""
        for prefix in list(self._used.values()):
            assert not prefix.num_users
            self._forget(prefix)

    def _forget(self, prefix: Prefix) -> None:
        del self._used[prefix.token_ids]
        if not prefix.is_sound:
            self._unsound_rows.add(prefix.row_idx)


def _num_shared(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of what two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
