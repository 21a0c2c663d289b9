"""The training step on a mesh of TPU chips, compiled ahead of time on a host without one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.config import Config
from efficient_lm.model.definition import define
from efficient_lm.parallel.mesh import make_mesh
from efficient_lm.parallel.rules import batch_sharding
from efficient_lm.planning.compile import compile_program, train_program
from efficient_lm.planning.topologies import find_topology
from efficient_lm.training.optimizer import make_optimizer
from efficient_lm.training.state import abstract_state, make_initializer
from efficient_lm.training.step import make_train_step
from pallas_kernels._core.compat import tpu_devices


@pytest.mark.parametrize("fsdp", [1, 2])
def test_each_chip_attends_to_its_own_rows_by_splash(fsdp):
    config = Config.from_dict(
        {
            "model": {"vocabulary_size": 256, "embed_dim": 128, "num_layers": 2, "max_length": 256,
                      "dtype": "bfloat16", "mixers": {"attention": {"num_heads": 2}}},
            "data": {"sequence_length": 256, "batch_size": 8},
            "parallel": {"fsdp": fsdp},
        }
    )  # fmt: skip
    mesh = make_mesh(config.parallel, tpu_devices("v5e:2x2"))
    definition = define(config.model)
    optimizer = make_optimizer(config.optimizer, definition.parameters, config.training.steps)
    initial = make_initializer(config, definition, optimizer)
    rows = jax.ShapeDtypeStruct((8, 256), jnp.int32, sharding=batch_sharding(mesh))
    batch = dict.fromkeys(("tokens", "labels", "positions", "segment_ids"), rows)
    batch["weights"] = rows.update(dtype=jnp.float32)
    step = make_train_step(config, definition, optimizer, mesh, np.ones(256, np.int32))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(step).lower(abstract_state(initial, definition, mesh), batch)
    text = lowered.compile().as_text()
    results = re.findall(r"= ([^=]*) custom-call\(.*tpu_custom_call", text)
    shapes = {shape for result in results for shape in re.findall(r"bf16\[([\d,]+)\]", result)}
    assert shapes == {"2,2,256,64"}  # 2 of 8 rows on each of 4 chips: [B, N, T, H]
    assert ("all-gather" in text) == (fsdp > 1)


def test_remat_keeps_what_attention_computed():
    calls = {}
    for remat in ("full", "mixer"):
        config = Config.from_dict(
            {
                "model": {"vocabulary_size": 256, "embed_dim": 128, "max_length": 256,
                          "num_layers": 2, "dtype": "bfloat16", "remat": remat,
                          "mixers": {"attention": {"num_heads": 2}}},
                "data": {"sequence_length": 256, "batch_size": 8, "mask_across_documents": False},
            }
        )  # fmt: skip
        compiled = compile_program(train_program(config, find_topology("v5e:2x2")))
        calls[remat] = compiled.text.count('custom_call_target="tpu_custom_call"')
    assert calls == {"full": 4, "mixer": 3}  # the forward pass of attention once or twice
