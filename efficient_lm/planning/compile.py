"""The step of a config, traced and compiled ahead of time for a topology that nobody need own."""

import math
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efficient_lm.config import Config
from efficient_lm.data.batch import empty_batch
from efficient_lm.errors import ConfigError
from efficient_lm.inference.load import abstract_arrays
from efficient_lm.model.definition import ModelDefinition, define
from efficient_lm.parallel.check import check_mesh
from efficient_lm.parallel.mesh import make_mesh
from efficient_lm.parallel.mixing import use_mesh
from efficient_lm.parallel.rules import ROWS, TOKENS, batch_sharding, parameter_shardings
from efficient_lm.planning.topologies import Topology
from efficient_lm.training.optimizer import make_optimizer
from efficient_lm.training.state import TrainState, abstract_state, make_initializer
from efficient_lm.training.step import jit_train_step, make_train_step

SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Program:
    """A step before compilation.

    inputs: trees of ShapeDtypeStruct with shardings by what they are ("parameters", "optimizer",
    "batch", ...). tokens: tokens that a step works on, over all devices. traced: of `jax.jit`, its
    flat arguments are those of `inputs` in order.
    """

    kind: str
    mesh: Mesh
    definition: ModelDefinition
    inputs: dict[str, Any]
    tokens: int
    traced: Any


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a program; bytes are of one device.

    fits: whether the compiler accepted it; if not, `arguments` is None and `temporaries` what it
    asked for. host: bytes that wait in the memory of the host. largest: the largest buffers of
    temporaries, (bytes, arrays that take turns in it). text: HLO after optimization, or None where
    it cannot be read.
    """

    fits: bool
    arguments: int | None
    temporaries: int
    code: int
    host: int
    largest: list[tuple[int, str]]
    text: str | None
    seconds: float


def train_inputs(
    config: Config, topology: Topology
) -> tuple[Mesh, ModelDefinition, dict[str, Any]]:
    """(mesh, definition, arguments of a training step as in `Program.inputs`); nothing is traced.

    ConfigError where mesh, rows, tokens, heads or features do not divide.
    """
    mesh = make_mesh(config.parallel, topology.devices)
    definition = define(config.model)
    check_mesh(config, definition, mesh)
    optimizer = make_optimizer(config.optimizer, definition.parameters, config.training.steps)
    initial = make_initializer(config, definition, optimizer)
    state = abstract_state(initial, definition, mesh, config.parallel.rules)
    data = config.data
    inputs = {name: getattr(state, name) for name in TrainState.__dataclass_fields__}
    shape, sharding = (data.batch_size, data.sequence_length), batch_sharding(mesh)
    inputs["batch"] = {
        name: jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)
        for name, x in empty_batch(1, 1).items()
    }
    return mesh, definition, inputs


def train_program(config: Config, topology: Topology) -> Program:
    """The very step that training takes, on the mesh of `config.parallel` over the topology."""
    mesh, definition, inputs = train_inputs(config, topology)
    optimizer = make_optimizer(config.optimizer, definition.parameters, config.training.steps)
    lengths = np.ones(config.model.vocabulary_size, np.int32)
    step = make_train_step(config, definition, optimizer, mesh, lengths)
    state = TrainState(**{name: inputs[name] for name in TrainState.__dataclass_fields__})
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jit_train_step(step, state).trace(state, inputs["batch"])
    tokens = config.data.batch_size * config.data.sequence_length
    return Program("train", mesh, definition, inputs, tokens, traced)


def decode_program(config: Config, topology: Topology, batch: int, context: int) -> Program:
    """One greedy step of decoding `batch` rows with room for `context` tokens each.

    Weights are as `efficient_lm.load` keeps them (matrices in model.dtype, every layer apart),
    placed by the same rules as in training; rows of the cache are split as rows of a batch are,
    its heads over `tensor`. ConfigError where rows do not divide or the context is too long.
    """
    mesh = make_mesh(config.parallel, topology.devices)
    copies = math.prod(mesh.shape[axis] for axis in ROWS)
    if batch % copies:
        raise ConfigError(
            f"--batch={batch} rows cannot be split over {copies} devices ({', '.join(ROWS)}); "
            f"make it a multiple of {copies}"
        )
    if any(mesh.shape[axis] > 1 for axis in TOKENS):
        raise ConfigError(
            "a step of decoding has one token a row, which no mesh axis can split; set "
            "config.parallel.sequence and ring to 1"
        )
    if not 1 <= context <= config.model.max_length:
        raise ConfigError(
            f"--context={context}; allowed: 1 to config.model.max_length={config.model.max_length}"
        )
    definition = define(config.model, scan=False)
    shardings = parameter_shardings(mesh, definition.parameters, config.parallel.rules)
    parameters = jax.tree.map(
        lambda leaf, sharding: leaf.update(sharding=sharding),
        abstract_arrays(definition),
        shardings,
    )

    def model_of(arrays):
        model = definition.bind(arrays)
        use_mesh(model, mesh, config.parallel)
        return model

    def step(arrays, state, token):
        output = model_of(arrays)(token[:, None], state=state)
        return jnp.argmax(output.logits[:, 0], axis=-1).astype(jnp.int32), output.state

    def place(leaf):
        heads = leaf.ndim == 4 and leaf.shape[1] % mesh.shape["tensor"] == 0
        spec = PartitionSpec(ROWS, "tensor") if heads else PartitionSpec(ROWS)
        return leaf.update(sharding=NamedSharding(mesh, spec))

    token = jax.ShapeDtypeStruct(
        (batch,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(ROWS))
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        state = jax.eval_shape(
            lambda arrays: model_of(arrays).init_state(batch, context), parameters
        )
        state = jax.tree.map(place, state)
        traced = jax.jit(step, donate_argnums=1).trace(parameters, state, token)
    inputs = {"parameters": parameters, "cache": state, "batch": token}
    return Program("decode", mesh, definition, inputs, batch, traced)


def compile_program(program: Program) -> Compiled:
    """Compile it; a program that is too large for the memory is a result too, not an error.

    ConfigError where what waits in the memory of the host is too large for that: then the compiler
    says nothing of the rest.
    """
    with tempfile.TemporaryDirectory() as directory:
        # Written files can be read for every backend, and also where the program does not fit;
        # `as_text` of JAX 0.10 cannot for some chips.
        options = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
        begin = time.perf_counter()
        needed = None
        try:
            with jax.sharding.use_abstract_mesh(program.mesh.abstract_mesh):
                lowered = program.traced.lower()
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            _check_host(str(error))
            needed = _needed(str(error))
            if needed is None:
                raise
        seconds = time.perf_counter() - begin
        text = _read(Path(directory), "*after_optimizations.txt")
        total, largest = _memory_report(Path(directory))
    if needed is not None:
        return Compiled(False, None, total or needed, 0, 0, largest, text, seconds)
    analysis = compiled.memory_analysis()
    return Compiled(
        True,
        analysis.argument_size_in_bytes,
        analysis.temp_size_in_bytes,
        analysis.generated_code_size_in_bytes,
        analysis.host_temp_size_in_bytes,
        largest,
        text,
        seconds,
    )


def bytes_per_device(tree: Any) -> int:
    """Bytes of a tree of ShapeDtypeStructs with shardings on the device that holds most."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _check_host(message: str) -> None:
    """ConfigError where this is the compiler's message that an array exceeds the host's memory."""
    found = re.search(r"size=(\d+)\) would exceed memory \(size=(\d+)\).*\.host ", message)
    if found:
        asked, available = (int(n) / 2**30 for n in found.groups())
        raise ConfigError(
            f"what config.model.remat=offload keeps takes {asked:.1f} GiB of the host's memory for "
            f"each device, of {available:.1f} GiB; use more devices, fewer tokens a step or "
            "config.model.remat=full"
        )


def _needed(message: str) -> int | None:
    """Bytes that a program asks for, of the compiler's message that it is too large; else None."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\)", message)
    found = found or re.search(r"Used ([\d.]+)([KMGT]?) of", message)
    return int(float(found.group(1)) * SIZES[found.group(2)]) if found else None


def _memory_report(directory: Path) -> tuple[int | None, list[tuple[int, str]]]:
    """(bytes of all temporaries, the largest of them) of the compiler's report on memory."""
    text = _read(directory, "*memory-usage-report.txt")
    if text is None:
        return None, []
    section = text.partition("Memory Space: default")[2].partition("Memory Space:")[0]
    total = re.search(r"Total bytes: (\d+)", section)
    rows = re.findall(r"; +([\d.]+)([KMGT]?)i?B; +\d+; +\d+; (.*)", section)
    largest = [(int(float(n) * SIZES[unit]), arrays) for n, unit, arrays in rows[:8]]
    return int(total.group(1)) if total else None, largest


def _read(directory: Path, pattern: str) -> str | None:
    """The largest file of that name: the step's own module among small helpers."""
    files = sorted(directory.glob(pattern), key=lambda path: path.stat().st_size)
    return files[-1].read_text() if files else None
