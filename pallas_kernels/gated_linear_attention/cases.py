"""Named shapes of gated_linear_attention that are benchmarked: of models, and small ones."""

from pallas_kernels._core.recurrence_bench import Case

CASES = (
    Case("h128_4k", 8, 4096, 16, 16, 128, 128, tags=("train",)),
    Case("h128_4k_plain", 8, 4096, 16, 16, 128, 128, "none", tags=("train",)),
    Case("h128_4k_retention", 8, 4096, 16, 16, 128, 128, "retention", tags=("train",)),
    Case("h128_4k_vector", 8, 4096, 16, 16, 128, 128, "vector", tags=("train",)),
    Case("h128_32k", 1, 32768, 16, 16, 128, 128, tags=("train",)),
    Case("h128_32k_plain", 1, 32768, 16, 16, 128, 128, "none", tags=("train",)),
    Case("mamba2_4k", 8, 4096, 1, 32, 128, 64, tags=("train",)),
    Case("two_mamba_2k", 1, 2048, 16, 16, 2080, 65, dtype="float32", tags=("train",)),
    Case("odd", 3, 777, 2, 6, 64, 64, tags=("train",)),
    Case("one_row_cpu", 1, 512, 2, 2, 64, 64, dtype="float32", tags=("cpu",)),
    Case("plain_cpu", 1, 512, 2, 2, 64, 64, "none", dtype="float32", tags=("cpu",)),
    Case("vector_cpu", 1, 512, 2, 2, 64, 64, "vector", dtype="float32", tags=("cpu",)),
)
