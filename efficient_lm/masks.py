"""Mask algebra: `(Causal() & SlidingWindow(128)) | PrefixLM(lengths)`, lowered to kernel data.

An expression is a `pallas_kernels.attention.Mask` in disjunctive normal form; `&` and `|` combine
two of them and drop conditions and terms that others imply.
"""

from dataclasses import dataclass, fields

import jax
from jaxtyping import Array, Int

from pallas_kernels.attention import Mask, Term

_ARRAYS = tuple(field.name for field in fields(Mask) if field.name != "terms")


@dataclass(frozen=True)
class MaskExpression:
    """A mask that composes with `&` and `|`; `lower()` gives the kernel's plain data."""

    mask: Mask

    def __and__(self, other: "MaskExpression") -> "MaskExpression":
        terms = tuple(_conjoin(a, b) for a in self.mask.terms for b in other.mask.terms)
        return _combine(terms, self.mask, other.mask)

    def __or__(self, other: "MaskExpression") -> "MaskExpression":
        return _combine(self.mask.terms + other.mask.terms, self.mask, other.mask)

    def lower(
        self,
        *,
        query_index: Int[Array, "b T"] | None = None,
        key_index: Int[Array, "b S"] | None = None,
    ) -> Mask:
        """The mask for tokens of these running indices; None: 0, 1, 2, ... for queries and keys."""
        arrays = {name: getattr(self.mask, name) for name in _ARRAYS}
        arrays |= {"query_index": query_index, "key_index": key_index}
        return Mask(self.mask.terms, **arrays)


jax.tree_util.register_dataclass(MaskExpression, data_fields=["mask"], meta_fields=[])


def Full() -> MaskExpression:
    """Every key."""
    return MaskExpression(Mask())


def Causal() -> MaskExpression:
    """Keys up to the query's own position."""
    return MaskExpression(Mask((Term(causal=True),)))


def SlidingWindow(size: int) -> MaskExpression:
    """The query's own key and the `size` - 1 tokens before it; no later key."""
    _positive("SlidingWindow", size)
    return MaskExpression(Mask((Term(causal=True, window=size),)))


def Segments(
    query_segments: Int[Array, "b T"], key_segments: Int[Array, "b S"] | None = None
) -> MaskExpression:
    """Keys of the query's own segment; segment 0 is padding. One array serves both by default."""
    keys = query_segments if key_segments is None else key_segments
    terms = (Term(segments=True),)
    return MaskExpression(Mask(terms, query_segments=query_segments, key_segments=keys))


def PrefixLM(prefix_length: Int[Array, "b"]) -> MaskExpression:
    """Causal, with the first `prefix_length` tokens of a row visible to all of its queries."""
    terms = (Term(causal=True), Term(prefix=True))
    return MaskExpression(Mask(terms, prefix_length=prefix_length))


def BlockCausal(size: int) -> MaskExpression:
    """Keys of the query's block of `size` tokens and of the blocks before."""
    _positive("BlockCausal", size)
    return MaskExpression(Mask((Term(block_causal=(size,)),)))


def BlockDiagonal(size: int) -> MaskExpression:
    """Keys of the query's own block of `size` tokens."""
    _positive("BlockDiagonal", size)
    return MaskExpression(Mask((Term(block_diagonal=(size,)),)))


def _positive(name: str, size: int) -> None:
    if size < 1:
        raise ValueError(f"{name}({size}): the size must be at least 1 token")


def _combine(terms: tuple[Term, ...], a: Mask, b: Mask) -> MaskExpression:
    """Terms simplified, with the arrays of both operands."""
    arrays = {}
    for name in _ARRAYS:
        left, right = getattr(a, name), getattr(b, name)
        if left is not None and right is not None and left is not right:
            raise ValueError(
                f"the two masks carry different {name}; a mask holds one such array, "
                "so build both from the same array"
            )
        arrays[name] = right if left is None else left
    return MaskExpression(Mask(_simplify(terms), **arrays))


def _conjoin(a: Term, b: Term) -> Term:
    """The term that holds where both hold, without conditions that its others imply."""
    windows = [term.window for term in (a, b) if term.window is not None]
    causal = a.causal or b.causal
    diagonal = _finest(a.block_diagonal + b.block_diagonal)
    before = _finest(a.block_causal + b.block_causal)
    window = min(windows, default=None)
    if window is not None and any(size <= window for size in diagonal):
        window = None  # a block reaches back less far than the window
    return Term(
        causal=causal,
        window=window,
        segments=a.segments or b.segments,
        prefix=a.prefix or b.prefix,
        block_causal=tuple(
            size for size in before if not causal and not any(size % d == 0 for d in diagonal)
        ),
        block_diagonal=diagonal,
    )


def _finest(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Block sizes that are no multiple of another one: staying in a block implies its multiples."""
    sizes = tuple(sorted(set(sizes)))
    return tuple(s for s in sizes if not any(s % other == 0 for other in sizes if other < s))


def _simplify(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """Unique terms, without those that are narrower than another one (a & b | a = a)."""
    terms = tuple(dict.fromkeys(_conjoin(term, term) for term in terms))
    return tuple(
        term
        for term in terms
        if not any(other != term and _conjoin(term, other) == term for other in terms)
    )
