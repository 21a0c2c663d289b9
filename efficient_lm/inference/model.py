"""A model with its arrays, ready to call and to decode with."""

from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from efficient_lm.config import ModelConfig
from efficient_lm.errors import UserError
from efficient_lm.inference.decode import Programs
from efficient_lm.model.definition import ModelDefinition, define, unstack
from efficient_lm.model.language_model import LanguageModel, Output


class Model:
    """`model(tokens).logits`: fp32 [B, T, V] for int32 tokens [B, T]; compiled once a shape.

    config: the ModelConfig. arrays: nested dict of parameters with every layer apart, so that a
    decode step reads each weight where it lies; slicing layers out of stacked arrays would copy
    all weights once a token. definition: the structure; `definition.bind(arrays)` is the module.
    """

    def __init__(self, definition: ModelDefinition, arrays: dict[str, Any]):
        self.definition = definition
        self.arrays = arrays

    @classmethod
    def from_arrays(cls, config: ModelConfig, arrays: dict[str, Any]) -> "Model":
        """A model from the arrays of a run: layers are unstacked, dtypes stay as they are.

        Unstacking device arrays makes a copy of them; NumPy arrays are cut into views.
        """
        return cls(define(config, scan=False), unstack(arrays))

    def with_arrays(self, arrays: dict[str, Any]) -> "Model":
        """The same model with newer arrays (stacked or not); compiled programs are shared."""
        new = Model(self.definition, unstack(arrays))
        new.__dict__["programs"] = self.programs
        return new

    @property
    def config(self) -> ModelConfig:
        """The model's part of the config."""
        return self.definition.config

    @cached_property
    def programs(self) -> Programs:
        """The compiled functions of this structure, whatever the arrays."""
        return Programs(self.definition)

    @property
    def module(self) -> LanguageModel:
        """The Flax NNX module, bound to the arrays."""
        return self.definition.bind(self.arrays)

    def __call__(self, tokens: Any, *, segment_ids: Any = None, positions: Any = None) -> Output:
        """Logits of every token's successor; causal, without dropout.

        tokens: [B, T] integers in any form (array, NumPy array, list of lists of one length).
        segment_ids: document of each token, 0 = padding. positions: default 0, 1, 2, ...

        Raises:
          UserError: not [B, T], not integers, empty, an id outside the vocabulary, T > max_length,
            or segment_ids or positions of another shape.
        """
        tokens = _integers(tokens, "tokens")
        if not isinstance(tokens, jax.core.Tracer):
            self._check(tokens)
        rest = [
            None if x is None else _integers(x, name)
            for name, x in (("segment_ids", segment_ids), ("positions", positions))
        ]
        for name, x in zip(("segment_ids", "positions"), rest, strict=True):
            if x is not None and x.shape != tokens.shape:
                raise UserError(
                    f"{name} has shape {x.shape}; it must be that of tokens, {tokens.shape}"
                )
        return self.programs.forward(self.arrays, tokens, *rest)

    def _check(self, tokens) -> None:
        limit, length = self.config.vocabulary_size, self.config.max_length
        if tokens.shape[1] > length:
            raise UserError(
                f"tokens are {tokens.shape[1]} long; the context of this model is {length}"
            )
        if not tokens.size:
            raise UserError(f"tokens has shape {tokens.shape}; give at least one row and token")
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < limit:
            raise UserError(
                f"token ids lie in [{int(tokens.min())}, {int(tokens.max())}]; this model has "
                f"ids 0 to {limit - 1}"
            )


def _integers(values: Any, name: str) -> Int[Array, "B T"]:
    """int32 [B, T] from anything array-like; UserError for other shapes and types."""
    try:
        array = values if isinstance(values, jax.Array) else np.asarray(values)
    except ValueError:
        raise UserError(
            f"{name} has rows of different lengths; pad them and mark the padding by "
            "segment_ids=0, or call the model row by row"
        ) from None
    if array.ndim != 2 or not jnp.issubdtype(array.dtype, jnp.integer):
        raise UserError(
            f"{name} has shape {array.shape} and type {array.dtype}; it must be [B, T] integers"
        )
    return jnp.asarray(array, jnp.int32)
