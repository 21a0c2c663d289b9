"""What a batch is."""

import numpy as np
from jaxtyping import Float32, Int32

# tokens, labels, segment_ids, positions: int32 [B, T]; weights: float32 [B, T]
Batch = dict[str, Int32[np.ndarray, "B T"] | Float32[np.ndarray, "B T"]]


def empty_batch(rows: int, sequence_length: int) -> Batch:
    """A batch of padding: segment ids and weights 0."""
    shape = (rows, sequence_length)
    names = ("tokens", "labels", "segment_ids", "positions")
    batch: Batch = {name: np.zeros(shape, np.int32) for name in names}
    batch["weights"] = np.zeros(shape, np.float32)
    return batch
