"""Which tiles of the score matrix a mask leaves empty, known before any array is."""

import math

import numpy as np

from pallas_kernels.attention.mask import Mask, Term

EMPTY, PARTIAL, FULL = 0, 1, 2


def tile_state(mask: Mask, queries: range, keys: range) -> int:
    """EMPTY if no pair of the tile is allowed, FULL if all are, PARTIAL if unknown or mixed.

    Ranges of token indices; with index arrays in `mask` only its terms can tell.
    """
    static = mask.query_index is None and mask.key_index is None
    states = [_term_state(term, queries, keys, static) for term in mask.terms]
    state = max(states, default=EMPTY)
    return min(state, PARTIAL) if mask.key_index is not None else state


def _term_state(term: Term, queries: range, keys: range, static: bool) -> int:
    conditions = [PARTIAL] * (term.segments + term.prefix)
    if static:
        first_q, last_q, first_k, last_k = queries[0], queries[-1], keys[0], keys[-1]
        if term.causal:
            conditions.append(_state(last_k <= first_q, first_k <= last_q))
        if term.window is not None:
            reach = term.window
            conditions.append(_state(last_q - first_k < reach, first_q - last_k < reach))
        for size in term.block_causal:
            conditions.append(
                _state(last_k // size <= first_q // size, first_k // size <= last_q // size)
            )
        for size in term.block_diagonal:
            first, last = max(first_q, first_k) // size, min(last_q, last_k) // size
            one = min(first_q, first_k) // size == max(last_q, last_k) // size
            conditions.append(_state(one, first <= last))
    elif term != Term(segments=term.segments, prefix=term.prefix):
        conditions.append(PARTIAL)
    return min(conditions, default=FULL)


def _state(every: bool, some: bool) -> int:
    return FULL if every else PARTIAL if some else EMPTY


def panels(mask: Mask, T: int, S: int, size: int) -> tuple[tuple[range, range], ...]:
    """Blocks of `size` queries, each with the range of keys that it may attend to (or range(0))."""
    result = []
    for start in range(0, T, size):
        queries = range(start, min(start + size, T))
        used = [
            keys
            for keys in (range(k, min(k + size, S)) for k in range(0, S, size))
            if tile_state(mask, queries, keys) != EMPTY
        ]
        keys = range(used[0].start, used[-1].stop) if used else range(0)
        result.append((queries, keys))
    return tuple(result)


def visits(mask: Mask, T: int, S: int, query_chunk: int, key_chunk: int) -> np.ndarray:
    """Tiles to visit, int32 [P, 3]: row, column and whether it is the first of its row."""
    result = []
    for row in range(math.ceil(T / query_chunk)):
        queries = range(row * query_chunk, min((row + 1) * query_chunk, T))
        columns = [
            column
            for column in range(math.ceil(S / key_chunk))
            if tile_state(
                mask, queries, range(column * key_chunk, min((column + 1) * key_chunk, S))
            )
            != EMPTY
        ]
        result += [(row, column, i == 0) for i, column in enumerate(columns)]
    return np.asarray(result, np.int32).reshape(-1, 3)
