"""Which implementation of attention runs where: the declared support table."""

from dataclasses import dataclass, replace

from pallas_kernels._core.compat import Target
from pallas_kernels._core.dispatch import Condition, Implementation
from pallas_kernels.attention import splash, splash_parts
from pallas_kernels.attention.mask import Mask, Term

BIAS_BYTES = 2**30  # of a dense mask, up to which cudnn is worth its memory
DECODING = 16  # queries, up to which reading the keys dominates
SCALAR_BYTES = 900 * 2**10  # of the 1 MiB of a TPU core that its tables of blocks may take


@dataclass(frozen=True)
class Facts:
    """What the choice of an implementation depends on; sizes as in `attention`."""

    target: Target
    dtype: str
    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    mask: Mask
    soft_cap: bool
    sinks: bool

    @property
    def static_term(self) -> Term | None:
        """The only term of a mask over 0, 1, 2, ... queries and keys, else None."""
        indexed = self.mask.query_index is not None or self.mask.key_index is not None
        return None if indexed or len(self.mask.terms) != 1 else self.mask.terms[0]


def is_plain(term: Term | None, segments: bool = False) -> bool:
    """Whether `term` is all keys, causal or a causal window, with segments only if asked for."""
    if term is None or (term.window is not None and not term.causal):
        return False
    return term == Term(term.causal, term.window, segments=segments and term.segments)


TABLE = (
    Implementation(
        "cudnn",
        "pallas_kernels.attention.cudnn:attention",
        platforms=("gpu",),
        dtypes=("bfloat16", "float16"),
        conditions=(
            Condition("an NVIDIA GPU", lambda f: f.target.compute_capability is not None),
            Condition("no soft-cap", lambda f: not f.soft_cap),
            Condition("no sinks", lambda f: not f.sinks),
            Condition(
                "a head dimension that is a multiple of 8, at most 256 (128 before Hopper)",
                lambda f: (
                    f.H % 8 == 0
                    and (256 if (f.target.compute_capability or 0) >= 9 else 128) >= f.H
                ),
            ),
            Condition(
                "even lengths, unless the mask is causal, a causal window or full",
                lambda f: is_plain(f.static_term) or (f.T % 2 == 0 and f.S % 2 == 0),
            ),
        ),
        advice=(
            Condition(f"more than {DECODING} queries", lambda f: f.T > DECODING),
            Condition(
                "even lengths, without which it has no backward pass",
                lambda f: f.T % 2 == 0 and f.S % 2 == 0,
            ),
            Condition(
                "a dense mask of at most 1 GiB, unless it is causal, a causal window or full",
                lambda f: is_plain(f.static_term) or 2 * f.B * f.T * f.S <= BIAS_BYTES,
            ),
        ),
    ),
    Implementation(
        "splash",
        "pallas_kernels.attention.splash:attention",
        platforms=("tpu",),
        dtypes=("bfloat16", "float32"),
        conditions=(
            Condition(
                "a mask that is full, causal or a causal window, with or without segments, "
                "and no index arrays",
                lambda f: is_plain(f.static_term, segments=True),
            ),
            Condition("a head dimension that is a multiple of 64", lambda f: f.H % 64 == 0),
            Condition(
                "a table of the mask's blocks of at most 900 KiB (up to 2^18 causal tokens)",
                lambda f: (
                    f.static_term is None
                    or splash.table_bytes(f.static_term, f.T, f.S) <= SCALAR_BYTES
                ),
            ),
        ),
        advice=(Condition(f"more than {DECODING} queries", lambda f: f.T > DECODING),),
    ),
    Implementation(
        "splash_parts",
        "pallas_kernels.attention.splash_parts:attention",
        platforms=("tpu",),
        dtypes=("bfloat16", "float32"),
        conditions=(
            Condition(
                "a mask that is full or causal, with or without segments, and no index arrays",
                lambda f: is_plain(f.static_term, segments=True) and f.static_term.window is None,
            ),
            Condition("a head dimension that is a multiple of 64", lambda f: f.H % 64 == 0),
            Condition(
                f"lengths that are multiples of {splash_parts.SIZES[-1]}",
                lambda f: f.T % splash_parts.SIZES[-1] == f.S % splash_parts.SIZES[-1] == 0,
            ),
            Condition("no sinks", lambda f: not f.sinks),
        ),
    ),
    Implementation(
        "xla", "pallas_kernels.attention.xla:attention", platforms=("cpu", "gpu", "tpu")
    ),
    Implementation(
        "ref", "pallas_kernels.attention.ref:attention", platforms=("cpu", "gpu", "tpu")
    ),
)

# The backward pass by itself, for callers that hold only a part of the keys.
GRADIENTS = tuple(
    replace(row, function=row.function.replace(":attention", ":gradients")) for row in TABLE
)
