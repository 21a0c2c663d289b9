"""Named shapes of the op: odd ones for tests, real models' for benchmarks."""

from typing import NamedTuple


class Case(NamedTuple):
    """rows M, features D, vocabulary V, and what the loss adds."""

    rows: int
    features: int
    vocabulary: int
    soft_cap: float | None = None
    z_loss: float = 0.0
    chunk_logits: int = 2**24


TESTS = {
    "one_chunk": Case(6, 8, 11),
    "odd": Case(13, 7, 37, chunk_logits=100),
    "one_row_or_column_a_chunk": Case(5, 4, 9, chunk_logits=1),
    "chunks_divide": Case(16, 8, 32, chunk_logits=128),
    "soft_cap": Case(13, 8, 37, soft_cap=3.0, chunk_logits=150),
    "z_loss": Case(13, 8, 37, z_loss=1e-2, chunk_logits=150),
    "both": Case(21, 16, 19, soft_cap=5.0, z_loss=1e-3, chunk_logits=64),
}

BENCHMARKS = {
    "tinyshakespeare_cpu": Case(768, 128, 65),
    "quickstart_bytes": Case(4096, 128, 256),
    "gpt2_124m": Case(16 * 1024, 768, 50304, chunk_logits=2**26),
    "qwen3_0.6b": Case(8 * 1024, 1024, 151936, chunk_logits=2**26),
    "llama3_8b": Case(8 * 1024, 4096, 128256, chunk_logits=2**26),
}
