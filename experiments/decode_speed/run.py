"""How near decoding comes to the memory bandwidth: `python experiments/decode_speed/run.py`.

A decode step must read every weight (but the embedding, of which it reads a row a sequence) and the
keys and values of all tokens so far. The JSON compares these bytes a second with what the device
copies and reads at best, measured here, and with its data sheet.
"""

import json
import math
import re
import sys
import time
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from efficient_lm.cli import run_door
from efficient_lm.config import ModelConfig
from efficient_lm.errors import ConfigError
from efficient_lm.inference.decode import CHUNK, Carry, Request
from efficient_lm.inference.engine import Generator, bucket
from efficient_lm.inference.model import Model
from efficient_lm.inference.sampling import Sampling
from efficient_lm.model.definition import define
from efficient_lm.training.manifest import versions
from pallas_kernels._core import timing

# Bytes a second by the vendors' data sheets.
DATA_SHEET = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.04e12, "B200": 8.0e12}
PROMPT = 16  # tokens of the prompts for the engine

MODELS = {  # Llama 3 shapes, and one for CPUs
    "8b": {"embed_dim": 4096, "num_layers": 32, "vocabulary_size": 128_256, "hidden_dim": 14_336,
           "num_heads": 32, "num_key_value_heads": 8},
    "1b": {"embed_dim": 2048, "num_layers": 16, "vocabulary_size": 128_256, "hidden_dim": 8192,
           "num_heads": 32, "num_key_value_heads": 8},
    "tiny": {"embed_dim": 64, "num_layers": 2, "vocabulary_size": 512, "hidden_dim": 128,
             "num_heads": 4, "num_key_value_heads": 2},
}  # fmt: skip


def make_model(name: str, max_length: int) -> Model:
    """A model of random bf16 weights, drawn on the device, every layer apart."""
    shape = dict(MODELS[name])
    hidden = {"dense": {"hidden_dim": shape.pop("hidden_dim")}}
    heads = {k: shape.pop(k) for k in ("num_heads", "num_key_value_heads")}
    config = ModelConfig(
        **shape,
        max_length=max_length,
        mixers={"attention": heads | {"rope": {"theta": 500_000.0}}},
        ffns=hidden,
        tie_embeddings=False,
        dtype="bfloat16",
    )
    definition = define(config, scan=False)
    draw = jax.jit(
        lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1
    )
    keys = iter(jax.random.split(jax.random.key(0), 10_000))
    arrays = jax.tree.map(
        lambda leaf: draw(next(keys), leaf.shape) if leaf.inputs or len(leaf.shape) > 1
        else jnp.ones(leaf.shape, jnp.float32),
        definition.parameters,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )  # fmt: skip
    return Model(definition, arrays)


def filled_carry(model: Model, batch: int, context: int, slots: int) -> Carry:
    """The state behind `context` tokens of every row, with random keys and values."""

    def make(key):
        state = model.definition.bind(model.arrays).init_state(batch, slots)

        def fill(path, leaf):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                return jax.random.normal(key, leaf.shape, leaf.dtype)
            if path[-1].key == "index":
                slot = jnp.arange(slots, dtype=jnp.int32)
                filled = jnp.where(slot < context, slot, -1)
                return jnp.broadcast_to(filled[None], leaf.shape)
            return jnp.ones_like(leaf)

        layers = jax.tree_util.tree_map_with_path(fill, state["layers"])
        length = jnp.full((batch,), context, jnp.int32)
        zeros = jnp.zeros((batch,), jnp.int32)
        return Carry({"length": length, "layers": layers}, zeros, jnp.ones((), jnp.int32))

    return jax.jit(make)(jax.random.key(1))


class NoText:
    """A tokenizer that decodes to nothing, so that the engine's own cost is all there is."""

    end_of_text = None

    def __init__(self, vocabulary_size: int):
        self.vocabulary_size = vocabulary_size

    def decode(self, ids) -> str:
        return ""


def bandwidth_roofs(size: int) -> dict[str, float]:
    """Bytes a second of a large copy (read + write) and of reading an array of `size` bytes."""
    x = jnp.ones((size // 2,), jnp.bfloat16)
    read = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
    return {
        "copy": 1e9 * timing.measure_roofs().copy_gb_per_second,
        "read": 1e3 * size / timing.measure(read, x).minimum,
    }


def large_copies(text: str, elements: int) -> list[str]:
    """Copies and transposes of at least `elements` elements in compiled HLO: there should be none.

    Also those inside of fusions, where they cost nothing of their own.
    """
    found = re.findall(r"= (\w+\[([\d,]*)\])\S* (copy|copy-start|transpose)\(", text)
    large = [f"{kind} {shape}" for shape, sizes, kind in found
             if sizes and math.prod(map(int, sizes.split(","))) >= elements]  # fmt: skip
    return sorted({f"{large.count(line)} x {line}" for line in large})


def measure(model: Model, batch: int, context: int, chunks: int, roofs: dict) -> dict:
    """One row of the table."""
    config, arrays = model.config, model.arrays
    slots = bucket(context + chunks * CHUNK)
    request = Request(
        keys=jax.random.split(jax.random.key(2), batch),
        limits=jnp.full((batch,), 2**30, jnp.int32),
        stop_tokens=jnp.zeros((0,), jnp.int32),
        sampling=Sampling(temperature=0).checked(),
    )
    _, decode, compile_seconds = model.programs.generation(
        arrays, np.zeros((batch, PROMPT), np.int32), request, slots
    )
    none = np.zeros((batch,), bool)

    def run(steps: int, dispatches: int) -> float:
        """Seconds a step."""
        carry = jax.block_until_ready(filled_carry(model, batch, context, slots))
        began = time.perf_counter()
        for _ in range(dispatches):
            carry, _, tokens = decode(arrays, carry, none, np.int32(steps), request)
        jax.block_until_ready(tokens)
        return (time.perf_counter() - began) / (steps * dispatches)

    run(CHUNK, 1)
    looped = min(run(CHUNK, chunks) for _ in range(3))
    single = min(run(1, CHUNK) for _ in range(2))
    generator = Generator(
        model,
        NoText(config.vocabulary_size),
        [np.arange(PROMPT) + row for row in range(batch)],
        max_new_tokens=slots - PROMPT,
        temperature=0,
    )
    generator.run()
    engine = generator.speed.decode_seconds / (slots - PROMPT - 1)

    weights = sum(x.nbytes for x in jax.tree.leaves(arrays)) - arrays["embedding"].nbytes
    state = jax.eval_shape(lambda: model.module.init_state(batch, 1)["layers"])
    a_token = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    cache = a_token * (context + chunks * CHUNK / 2)  # the mean over the steps
    rate = (weights + cache) / looped
    return {
        "batch": batch,
        "context": context,
        "cache_slots": slots,
        "steps": chunks * CHUNK,
        "weight_bytes": weights,
        "cache_bytes": int(cache),
        "step_milliseconds": looped * 1e3,
        "tokens_per_second": batch / looped,
        "bytes_per_second": rate,
        "fraction_of_copy_roof": rate / roofs["copy"],
        "fraction_of_read_roof": rate / roofs["read"],
        "fraction_of_data_sheet": rate / roofs["data_sheet"] if roofs["data_sheet"] else None,
        "engine_step_milliseconds": engine * 1e3,
        "engine_tokens_per_second": batch / engine,
        "one_step_dispatch_milliseconds": single * 1e3,
        "compile_seconds": compile_seconds,
        "large_copies": large_copies(decode.as_text(), a_token * slots // 64),
    }


def main() -> None:
    """Measure every batch and context, print a table, write JSON."""
    if MODEL.value not in MODELS:
        raise ConfigError(f"--model={MODEL.value}; allowed: {', '.join(MODELS)}")
    device = jax.devices()[0]
    sheet = next((v for k, v in DATA_SHEET.items() if k in device.device_kind), None)
    roofs = bandwidth_roofs(ROOF_BYTES.value) | {"data_sheet": sheet}
    contexts = [int(context) for context in CONTEXT.value]
    model = make_model(MODEL.value, 2 * bucket(max(contexts) + CHUNKS.value * CHUNK))
    rows = []
    for batch in map(int, BATCH.value):
        for context in contexts:
            row = measure(model, batch, context, CHUNKS.value, roofs)
            rows.append(row)
            print(
                f"{MODEL.value} batch {batch} context {context}: "
                f"{row['step_milliseconds']:.3f} ms, {row['tokens_per_second']:,.0f} tokens/s, "
                f"{row['bytes_per_second'] / 1e9:,.0f} GB/s = "
                f"{row['fraction_of_copy_roof']:.1%} of copying; engine "
                f"{row['engine_step_milliseconds']:.3f} ms; copies {row['large_copies']}",
                flush=True,
            )
    result = {
        "command": " ".join(sys.argv),
        "date": date.today().isoformat(),
        "device": device.device_kind,
        "versions": versions(),
        "model": {"name": MODEL.value, "dtype": "bfloat16", **MODELS[MODEL.value]},
        "roofs_bytes_per_second": roofs,
        "rows": rows,
    }
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    name = f"{MODEL.value}_{device.device_kind.lower().replace(' ', '_')}.json"
    (out / name).write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {out / name}")


if __name__ == "__main__":
    MODEL = flags.DEFINE_string("model", "8b", f"Shapes: {', '.join(MODELS)}.")
    BATCH = flags.DEFINE_list("batch", ["1", "32"], "Sequences decoded at once.")
    CONTEXT = flags.DEFINE_list("context", ["1024"], "Tokens before the first measured step.")
    CHUNKS = flags.DEFINE_integer("chunks", 4, f"Dispatches of {CHUNK} steps each.")
    ROOF_BYTES = flags.DEFINE_integer("roof_bytes", 2**32, "Size of the array of the roofs.")
    OUT = flags.DEFINE_string("out", str(Path(__file__).parent / "results"), "Where JSON goes.")
    run_door(main)
