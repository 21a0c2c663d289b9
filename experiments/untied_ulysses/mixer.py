"""Memory of one Llama-3-8B attention mixer alone on TPU chips, compiled ahead of time, bf16.

`python experiments/untied_ulysses/mixer.py --out=x.json`: Ulysses and UPipe, forward and backward.
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import run
from flax import nnx

from efficient_lm.config import Config, layer_options
from efficient_lm.mixers.attention import Attention
from efficient_lm.model.context import Context
from efficient_lm.parallel.exchange import parameters_of, rebuild
from efficient_lm.parallel.mesh import make_mesh
from efficient_lm.parallel.mixing import use_mesh
from pallas_kernels._core.compat import tpu_devices


def main() -> None:
    """Compile every method in both directions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--topology", default="v5p:2x2x1")
    parser.add_argument("--length", type=int, default=524_288)
    parser.add_argument("--methods", nargs="+", default=["ulysses", "upipe4", "upipe8"])
    arguments = parser.parse_args()
    values = {
        "command": " ".join(["experiments/untied_ulysses/mixer.py", *sys.argv[1:]]),
        "versions": run.versions(),
        "topology": arguments.topology,
        "rows": [],
    }
    for backward in (False, True):
        for name in arguments.methods:
            analysis = compiled(arguments.topology, arguments.length, name, backward)
            row = {
                "what": "mixer alone",
                "length": arguments.length,
                "method": name,
                "backward": backward,
                "temporary_bytes": int(analysis.temp_size_in_bytes),
            }
            values["rows"].append(row)
            arguments.out.write_text(json.dumps(values, indent=1) + "\n")
            print(json.dumps(row), flush=True)


def compiled(topology: str, length: int, name: str, backward: bool):
    """What the compiler says of the memory; the backward pass computes the forward pass again."""
    devices = tpu_devices(topology)
    fields = run.make_config("8b", length, 1, 1, **run.method(name, len(devices)))
    fields["model"]["mixers"]["attention"]["implementation"] = "xla"
    config = Config.from_dict(fields)
    mesh, parts = make_mesh(config.parallel, devices), SimpleNamespace()
    use_mesh(parts, mesh, config.parallel)
    options = layer_options(config.model)[0][1]
    graph, parameters = parameters_of(
        nnx.eval_shape(lambda: Attention(config.model, options, nnx.Rngs(0)))
    )

    def forward(arrays, x, positions):
        mixer = rebuild(graph, {p: leaf.replace(arrays[p]) for p, leaf in parameters.items()})
        context = Context(positions, shard=parts.shard, mix=parts.mix, split=parts.split)
        return parts.mix(mixer, x, context, None)[0]

    def loss(*given):
        again = jax.checkpoint(forward, policy=jax.checkpoint_policies.nothing_saveable)
        return jnp.sum(again(*given).astype(jnp.float32) ** 2)

    def struct(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    tokens = jax.P(None, "sequence")
    given = (
        {p: struct(leaf.shape, jnp.float32, jax.P()) for p, leaf in parameters.items()},
        struct((1, length, config.model.embed_dim), jnp.bfloat16, tokens),
        struct((1, length), jnp.int32, tokens),
    )
    function = jax.grad(loss, argnums=(0, 1)) if backward else forward
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).lower(*given).compile().memory_analysis()


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
