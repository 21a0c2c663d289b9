"""Named shapes of gated_delta_rule that are benchmarked: of models, and small ones."""

import functools

from pallas_kernels._core.recurrence_bench import Case

delta = functools.partial(Case, delta=True)

CASES = (
    delta("h128_4k", 8, 4096, 16, 16, 128, 128, tags=("train",)),
    delta("h128_4k_none", 8, 4096, 16, 16, 128, 128, "none", tags=("train",)),
    delta("h128_4k_vector", 8, 4096, 16, 16, 128, 128, "vector", tags=("train",)),
    delta("h128_32k", 1, 32768, 16, 16, 128, 128, tags=("train",)),
    delta("qwen3_5_9b_8k", 1, 8192, 16, 32, 128, 128, tags=("train",)),
    delta("qwen3_5_9b_32k", 1, 32768, 16, 32, 128, 128, tags=("train",)),
    delta("qwen3_5_397b_8k", 1, 8192, 16, 64, 128, 128, tags=("train",)),
    delta("qwen3_5_397b_32k", 1, 32768, 16, 64, 128, 128, tags=("train",)),
    delta("odd", 3, 777, 2, 6, 64, 64, tags=("train",)),
    delta("one_row_cpu", 1, 512, 2, 2, 64, 64, dtype="float32", tags=("cpu",)),
    delta("grouped_cpu", 1, 512, 2, 4, 64, 64, dtype="float32", tags=("cpu",)),
    delta("vector_cpu", 1, 512, 2, 2, 64, 64, "vector", dtype="float32", tags=("cpu",)),
)
