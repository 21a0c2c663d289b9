"""Bytes and seconds of a step by arithmetic alone, to choose what is worth compiling."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from efficient_lm.config import Config, ParallelConfig
from efficient_lm.model.definition import ModelDefinition, define
from efficient_lm.parallel.check import check_mesh
from efficient_lm.parallel.mesh import axis_sizes, make_mesh
from efficient_lm.parallel.rules import ROWS, TOKENS, parameter_shardings
from efficient_lm.planning.collectives import Collective
from efficient_lm.planning.compile import bytes_per_device, train_program
from efficient_lm.planning.count import count
from efficient_lm.planning.roofline import bounds, link_seconds
from efficient_lm.planning.topologies import Topology

# What is alive at once in the backward pass: widths of a token, layers of gathered weights, and
# fp32 copies of the unembedding's gradient, which each device sums whole. Found by compiling
# Llama-3-8B for v5e, v5p and TPU7x with 1, 4 and 8 rows a device (libtpu 0.0.52): within 10%.
ALIVE_FFN, ALIVE_STREAM, ALIVE_LAYERS, ALIVE_HEADS = 4, 4, 2, 1


@dataclass(frozen=True)
class Estimate:
    """Of one device: bytes by kind, and the least seconds of a step by resource."""

    memory: dict[str, float]
    seconds: dict[str, float | None]

    @property
    def total(self) -> float:
        """All bytes."""
        return sum(self.memory.values())


class Estimator:
    """Estimates for variants of one config on one topology that differ in mesh, remat and batch."""

    def __init__(self, config: Config, topology: Topology):
        self.topology = topology
        self.definition = define(config.model)
        self._costs: dict[str, tuple[float, float, float, float]] = {}
        self._meshes: dict[ParallelConfig, Mesh] = {}
        self._parameters: dict[ParallelConfig, float] = {}
        self._optimizer: float | None = None

    def costs(self, config: Config) -> tuple[float, float, float, float]:
        """A token's (FLOPs, saved bytes, split bytes) and whole bytes, of one traced row."""
        remat = config.model.remat
        if remat not in self._costs:
            row = dataclasses.replace(
                config,
                data=dataclasses.replace(config.data, batch_size=1),
                optimizer=dataclasses.replace(config.optimizer, accumulation_steps=1),
                parallel=ParallelConfig(),
            )
            one = dataclasses.replace(self.topology, devices=self.topology.devices[:1])
            program = train_program(row, one)
            batch = [name == "batch" for name, tree in program.inputs.items()
                     for _ in jax.tree.leaves(tree)]  # fmt: skip
            work, tokens = count(program.traced.jaxpr, batch), config.data.sequence_length
            sizes = {name: bytes_per_device(tree) for name, tree in program.inputs.items()}
            self._optimizer = (sizes["optimizer"] + sizes["average"]) / sizes["parameters"]
            self._costs[remat] = (work.total() / tokens, work.saved_bytes / tokens,
                                  work.split_bytes / tokens, work.whole_bytes)  # fmt: skip
        return self._costs[remat]

    def __call__(self, config: Config) -> Estimate:
        """The estimate for a variant; ConfigError where something does not divide."""
        topology, model = self.topology, config.model
        check_mesh(config, self.definition, self._mesh(config.parallel))
        flops, saved, split, whole = self.costs(config)
        sizes = axis_sizes(config.parallel, len(topology.devices))
        rows, tokens_split = (math.prod(sizes[a] for a in axes) for axes in (ROWS, TOKENS))
        steps, tensor = config.optimizer.accumulation_steps, sizes["tensor"]
        tokens = config.data.batch_size * config.data.sequence_length / rows / tokens_split
        alive = tokens / steps
        parameters = self._parameter_bytes(config.parallel)
        layer = self._layer_bytes() * 2 / 4 / tensor  # in bf16
        width = self._widest() * ALIVE_FFN / tensor + model.embed_dim * ALIVE_STREAM
        head = 4.0 * model.vocabulary_size * model.embed_dim if len(topology.devices) > 1 else 0.0
        memory = {
            "parameters": parameters,
            "optimizer": parameters * self._optimizer,
            "gradients": parameters * (2 if steps > 1 else 1),
            "saved activations": saved * alive / self._shared(config, sizes),
            "other temporaries": 2 * width * alive + ALIVE_LAYERS * layer + ALIVE_HEADS * head,
        }
        devices = len(topology.devices)
        traffic = split * tokens / tensor + whole * steps / tensor
        traffic += 2 * (1 + self._optimizer) * parameters
        step_flops = flops * config.data.batch_size * config.data.sequence_length / devices
        link = self._link(config)
        return Estimate(memory, bounds(topology, step_flops, traffic, link))

    def _shared(self, config: Config, sizes: dict[str, int]) -> float:
        """In how many parts the tensor axis cuts what is saved; the stream itself stays whole."""
        stream = 2.0 * config.model.embed_dim * config.model.num_layers
        _, saved, _, _ = self.costs(config)
        rest = max(saved - stream, 0.0)
        return saved / (stream + rest / sizes["tensor"]) if saved > stream else 1.0

    def _parameter_bytes(self, parallel: ParallelConfig) -> float:
        if parallel not in self._parameters:
            mesh = self._mesh(parallel)
            shardings = parameter_shardings(mesh, self.definition.parameters, parallel.rules)
            leaves = zip(_arrays(self.definition), jax.tree.leaves(shardings), strict=True)
            self._parameters[parallel] = float(
                sum(math.prod(s.shard_shape(x.shape)) * 4 for x, s in leaves)
            )
        return self._parameters[parallel]

    def _layer_bytes(self) -> float:
        """fp32 bytes of one layer's matrices, whole."""
        total = sum(4.0 * x.size for x in _arrays(self.definition) if x.inputs)
        return total / self.definition.config.num_layers

    def _widest(self) -> int:
        """Features of the widest hidden matrix, of one token."""
        widths = [math.prod(n for a, n in zip(x.axes, x.shape, strict=True) if a in x.outputs)
                  for x in _arrays(self.definition) if x.inputs]  # fmt: skip
        return max(widths, default=self.definition.config.embed_dim)

    def collectives(self, config: Config) -> list[Collective]:
        """Those that the sharding rules imply for a step; a compiler may choose others."""
        sizes = axis_sizes(config.parallel, len(self.topology.devices))
        model, steps = config.model, config.optimizer.accumulation_steps
        split_rows, split_tokens = (math.prod(sizes[a] for a in axes) for axes in (ROWS, TOKENS))
        tokens = config.data.batch_size * config.data.sequence_length / split_rows / split_tokens
        alive = tokens / steps
        again = 1 if model.remat == "none" else 2
        weights = 2.0 * self.definition.count() / sizes["tensor"]
        stream = 2.0 * alive * model.embed_dim
        split = ("fsdp", *TOKENS) if config.parallel.rules != "replicated" else ()
        rest = tuple(axis for axis in (*ROWS, *TOKENS) if axis not in split)
        own = weights / math.prod(sizes[axis] for axis in split)
        heads = 2.0 * alive * 2 * self._heads_width() / sizes["tensor"]
        per_layer = model.num_layers * steps
        implied = [
            ("all-gather", split, weights, again * steps),
            ("reduce-scatter", split, weights, steps),
            ("all-reduce", rest, own, steps),
            ("all-reduce", ("tensor",), stream, 2 * (again + 1) * per_layer),
            ("all-to-all", ("sequence",), heads, 2 * (again + 1) * per_layer),
            ("collective-permute", ("ring",), heads / 2, (again + 1) * per_layer * sizes["ring"]),
        ]
        result = []
        for kind, axes, size, times in implied:
            axes = tuple(axis for axis in axes if sizes[axis] > 1)
            if axes:
                group = _group(self._mesh(config.parallel), axes)
                result.append(Collective(kind, size, times, axes, True, group, "rules"))
        return result

    def _link(self, config: Config) -> float | None:
        """Seconds of those collectives, one after another."""
        devices = list(self._mesh(config.parallel).devices.flat)
        seconds = 0.0
        for one in self.collectives(config):
            each = link_seconds(one, devices, self.topology)
            if each is None:
                return None
            seconds += each * one.times
        return seconds

    def _heads_width(self) -> int:
        """Features of a token that sequence parallelism exchanges: at most those of all heads."""
        widths = [math.prod(n for a, n in zip(x.axes, x.shape, strict=True)
                            if a in ("heads", "key_value_heads", "head_dim"))
                  for x in _arrays(self.definition) if "heads" in x.axes]  # fmt: skip
        return max(widths, default=self.definition.config.embed_dim)

    def _mesh(self, parallel: ParallelConfig) -> Mesh:
        if parallel not in self._meshes:
            self._meshes[parallel] = make_mesh(parallel, self.topology.devices)
        return self._meshes[parallel]


def _arrays(definition: ModelDefinition) -> list[Any]:
    """The parameters with their metadata."""
    return jax.tree.leaves(definition.parameters, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _group(mesh: Mesh, axes: tuple[str, ...]) -> tuple[int, ...]:
    """Partitions along some axes, from the first one."""
    places = np.arange(mesh.size).reshape(tuple(mesh.shape.values()))
    first = tuple(slice(None) if axis in axes else 0 for axis in mesh.shape)
    return tuple(int(i) for i in places[first].reshape(-1))
