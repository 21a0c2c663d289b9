"""How near decoding comes to the memory bandwidth: `python experiments/decode_speed/run.py`.

A decode step must read every weight (but the embedding, of which it reads a row a sequence) and the
keys and values of all tokens so far. The JSON compares these bytes a second with what the device
copies and reads at best, measured here, and with its data sheet.
"""

import json
import math
import re
import sys
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from efficient_lm.cli import run_door
from efficient_lm.config import ModelConfig
from efficient_lm.errors import ConfigError
from efficient_lm.inference.decode import CHUNK
from efficient_lm.inference.engine import Generator, bucket
from efficient_lm.inference.model import Model
from efficient_lm.inference.speed import PROMPT, DecodeTimer, random_model, state_bytes
from efficient_lm.training.manifest import versions
from pallas_kernels._core import timing

# Bytes a second by the vendors' data sheets.
DATA_SHEET = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.04e12, "B200": 8.0e12}
MODELS = {  # Llama 3 shapes, and one for CPUs
    "8b": {"embed_dim": 4096, "num_layers": 32, "vocabulary_size": 128_256, "hidden_dim": 14_336,
           "num_heads": 32, "num_key_value_heads": 8},
    "1b": {"embed_dim": 2048, "num_layers": 16, "vocabulary_size": 128_256, "hidden_dim": 8192,
           "num_heads": 32, "num_key_value_heads": 8},
    "tiny": {"embed_dim": 64, "num_layers": 2, "vocabulary_size": 512, "hidden_dim": 128,
             "num_heads": 4, "num_key_value_heads": 2},
}  # fmt: skip


def make_config(name: str, max_length: int) -> ModelConfig:
    """The shapes of a model, in bf16."""
    shape = dict(MODELS[name])
    hidden = {"dense": {"hidden_dim": shape.pop("hidden_dim")}}
    heads = {k: shape.pop(k) for k in ("num_heads", "num_key_value_heads")}
    return ModelConfig(
        **shape,
        max_length=max_length,
        mixers={"attention": heads | {"rope": {"theta": 500_000.0}}},
        ffns=hidden,
        tie_embeddings=False,
        dtype="bfloat16",
    )


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
    timer = DecodeTimer(model, batch, context, chunks)
    looped, single, slots = timer.seconds_a_step(), timer.seconds_a_dispatch(), timer.slots
    generator = Generator(
        model,
        NoText(model.config.vocabulary_size),
        [np.arange(PROMPT) + row for row in range(batch)],
        max_new_tokens=slots - PROMPT,
        temperature=0,
    )
    generator.run()
    engine = generator.speed.decode_seconds / (slots - PROMPT - 1)

    weights = sum(x.nbytes for x in jax.tree.leaves(model.arrays))
    weights -= model.arrays["embedding"].nbytes
    a_token = batch * state_bytes(model.config, 1)
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
        "compile_seconds": timer.compile_seconds,
        "large_copies": large_copies(timer.decode.as_text(), a_token * slots // 64),
    }


def main() -> None:
    """Measure every batch and context, print a table, write JSON."""
    if MODEL.value not in MODELS:
        raise ConfigError(f"--model={MODEL.value}; allowed: {', '.join(MODELS)}")
    device = jax.devices()[0]
    sheet = next((v for k, v in DATA_SHEET.items() if k in device.device_kind), None)
    roofs = bandwidth_roofs(ROOF_BYTES.value) | {"data_sheet": sheet}
    contexts = [int(context) for context in CONTEXT.value]
    longest = 2 * bucket(max(contexts) + CHUNKS.value * CHUNK)
    model = random_model(make_config(MODEL.value, longest))
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
