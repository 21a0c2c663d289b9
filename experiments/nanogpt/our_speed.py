"""Time our training step on a batch of random tokens, one JSON line a variant."""

import argparse
import json
import sys
from functools import partial

import jax
import numpy as np

from efficient_lm import masks
from efficient_lm.config import Config, layer_options
from efficient_lm.evaluation.results import attempt
from efficient_lm.training.step_time import compile_step, time_step
from pallas_kernels.attention import explain


def main() -> None:
    """Time each variant; a failing one becomes a line with its error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, required=True, help="a repetition")
    parser.add_argument("--repetitions", type=int, required=True)
    parser.add_argument("--roof", help="dtype of the matrix products whose rate is measured first")
    arguments = parser.parse_args()
    if arguments.roof:
        from pallas_kernels._core.timing import matmul_flops

        print(json.dumps({"name": "roof", "flops": matmul_flops(arguments.roof)}), flush=True)
    for variant in json.load(sys.stdin):
        measured = partial(measure, variant, arguments.steps, arguments.repetitions)
        print(json.dumps(attempt({"name": variant["name"]}, measured)), flush=True)


def measure(variant: dict, steps: int, repetitions: int) -> dict:
    """Seconds a step: the median over repetitions of the mean within one.

    variant: `config`, nested fields of Config, and `scan`, whether layers are scanned.
    """
    config = Config.from_dict(variant["config"])
    # One device, as the peer; the first also where there are more.
    compiled = compile_step(config, jax.devices()[:1], variant["scan"])
    return time_step(compiled, steps, repetitions) | {
        "attention": attention_choice(config),
        "device": jax.devices()[0].device_kind,
    }


def attention_choice(config: Config) -> str:
    """Which implementation the first layer's attention takes, and why."""
    _, options, _ = layer_options(config.model)[0]
    heads, key_value_heads, head_dim = options.sizes(config.model)
    rows = (config.data.batch_size, config.data.sequence_length)
    query = jax.ShapeDtypeStruct((*rows, heads, head_dim), config.model.dtype)
    key = jax.ShapeDtypeStruct((*rows, key_value_heads, head_dim), config.model.dtype)
    mask = masks.Causal()
    if config.data.mask_across_documents:
        mask = mask & masks.Segments(np.ones(rows, np.int32))
    choice = explain(query, key, key, mask=mask.lower(), implementation=options.implementation)
    return str(choice)


if __name__ == "__main__":
    main()
