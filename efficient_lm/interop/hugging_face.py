"""Checkpoints of Hugging Face: config.json and sharded safetensors, to and from our arrays."""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from efficient_lm.config import ModelConfig, layer_pattern
from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.interop import layout, llama3, qwen3, qwen3_5, qwen3_next, shards
from efficient_lm.interop.family import MODEL_TENSORS, Family, differences
from efficient_lm.interop.layout import Layout
from efficient_lm.model.definition import ModelDefinition, define

FAMILIES = (llama3.FAMILY, qwen3.FAMILY, qwen3_5.FAMILY, qwen3_next.FAMILY)
CONFIG_FILE = "config.json"
# Fields of it that hold more than one value.
CONTAINERS = {
    "architectures": (list, "a list"),
    "layer_types": (list, "a list"),
    "rope_parameters": (dict, "an object"),
    "rope_scaling": (dict, "an object"),
}
SHARD_BYTES = 5 * 10**9
# Buffers that older checkpoints stored; they follow from the config.
DERIVED_TENSORS = re.compile(r".*rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Slot:
    """One tensor of the checkpoint and its place in our arrays.

    name: of the stored tensor; paths, layouts: of the parameters of ours that it holds.
    repeat: index on their leading axis "layers", or None.
    """

    name: str
    paths: tuple[tuple[str, ...], ...]
    layouts: tuple[Layout, ...]
    repeat: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored tensor."""
        return layout.stored_shape(self.layouts)

    def parts_of(self, arrays: dict[str, Any]) -> list[np.ndarray]:
        """Its parts of our arrays, views."""
        parts = [np.asarray(_leaf(arrays, path)) for path in self.paths]
        return parts if self.repeat is None else [part[self.repeat] for part in parts]


def family_of(given: dict[str, Any]) -> Family:
    """The family of a config.json; ConfigError lists the supported ones."""
    architecture = (given.get("architectures") or [None])[0]
    for family in FAMILIES:
        if architecture == family.architecture:
            return family
        if architecture is None and given.get("model_type") == family.model_type:
            return family
    supported = ", ".join(family.architecture for family in FAMILIES)
    raise ConfigError(
        f"architecture {architecture or given.get('model_type')!r} is not supported; "
        f"supported: {supported}"
    )


def read_config(directory: Path) -> dict[str, Any]:
    """config.json; CheckpointError if there is none or it is no JSON object.

    Of a model for more than text, the fields of the text model in it.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give the folder of a Hugging Face model")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from None
    if not isinstance(given, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    text = given.get("text_config")
    for fields in (given, text if isinstance(text, dict) else {}):
        for name, (kind, what) in CONTAINERS.items():
            if not isinstance(fields.get(name), (kind, type(None))):
                raise CheckpointError(f"{path} has {name}={fields[name]!r}; it must be {what}")
    architecture = (given.get("architectures") or [None])[0]
    for family in FAMILIES:
        if family.whole and isinstance(given.get("text_config"), dict):
            whole, model_type = family.whole
            if architecture == whole or (not architecture and given["model_type"] == model_type):
                return family.text_alone(given)
    return given


def read_model(directory: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """(model, arrays) of a checkpoint; arrays keep their dtypes and are NumPy, bf16 included.

    `model.dtype` is bfloat16 for bf16 checkpoints, float32 for others. All names, shapes and
    dtypes are checked before data is read; then one tensor is read at a time into its place.
    Errors: ConfigError for models that we cannot compute, CheckpointError for damaged folders.
    """
    directory = Path(directory).expanduser()
    given = read_config(directory)
    family = family_of(given)
    model = family.read(given)
    tensors = shards.scan(directory)
    whole = any(name.startswith(family.prefix) for name in tensors)

    def rename(name: str) -> str:
        return re.sub(r"^model\.", family.prefix, name) if whole else name

    embedding = tensors.get(rename(MODEL_TENSORS["embedding"][0]))
    if embedding is not None and embedding.dtype == "BF16":
        model = dataclasses.replace(model, dtype="bfloat16")
    definition = define(model)
    slots = {rename(slot.name): slot for slot in slots_of(definition, family)}
    tensors = {n: t for n, t in tensors.items() if not DERIVED_TENSORS.fullmatch(n)}
    for name in left_out(family, tensors):
        del tensors[name]
    head = MODEL_TENSORS["head"][0]
    # Some tied checkpoints store the head all the same, as Qwen3-0.6B does.
    copies = {head: tensors.pop(head)} if model.tie_embeddings and head in tensors else {}
    _check(directory, slots, tensors)
    arrays = _allocate(definition, slots, tensors)
    for name, tensor in shards.read(tensors):
        slot = slots[name]
        parts = layout.split(tensor, slot.layouts)
        for target, part in zip(slot.parts_of(arrays), parts, strict=True):
            _bits(target)[...] = _bits(part)
    for name, tensor in shards.read(copies):
        if not np.array_equal(tensor, arrays["embedding"]):
            raise CheckpointError(
                f"{directory}: tie_word_embeddings=true, but {name} differs from "
                f"{rename(MODEL_TENSORS['embedding'][0])}; set it to false in {CONFIG_FILE}"
            )
    return model, arrays


def write_model(
    directory: str | Path,
    model: ModelConfig,
    arrays: dict[str, Any],
    original: dict[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write config.json and safetensors into an existing folder; the inverse of `read_model`.

    `original`: the config.json that the model came with. It is written again where it still
    describes `model`; fields that we do not have (token ids) are kept from it in any case.
    Returns the config.json written. ConfigError if no supported architecture fits the model.
    """
    directory = Path(directory)
    family = family_of(original) if original else _fitting_family(model)
    definition = define(model)
    slots = sorted(slots_of(definition, family), key=lambda slot: _natural(slot.name))
    names = {dtype: name for name, dtype in shards.DTYPES.items()}
    infos = {}
    for slot in slots:
        dtypes = {array.dtype for array in slot.parts_of(arrays)}
        if len(dtypes) > 1:
            raise CheckpointError(
                f"{slot.name} would join {' and '.join('/'.join(path) for path in slot.paths)}, "
                f"which are of {' and '.join(sorted(map(str, dtypes)))}; they must have one dtype"
            )
        infos[slot.name] = shards.TensorInfo(directory, slot.shape, names[dtypes.pop()])
    by_name = {slot.name: slot for slot in slots}

    def stored(name: str) -> np.ndarray:
        slot = by_name[name]
        return layout.join([_bits(array) for array in slot.parts_of(arrays)], slot.layouts)

    config = dict(original or {})
    if not original or differences(model, family.read(original)):
        config = {n: v for n, v in config.items() if not n.startswith("rope_")}
        config |= family.write(model)
    dtype = str(arrays["embedding"].dtype)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    shards.write(directory, infos, stored, shard_bytes)
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return config


def left_out(family: Family, tensors: Mapping[str, Any]) -> list[str]:
    """Names of tensors that belong to other parts of a model than its text model."""
    pattern = re.compile(family.other_tensors) if family.other_tensors else None
    return [name for name in tensors if pattern and pattern.fullmatch(name)]


def slots_of(definition: ModelDefinition, family: Family) -> Iterator[Slot]:
    """Every tensor of the checkpoint; ConfigError for a parameter that the family lacks."""
    pattern = layer_pattern(definition.config)
    places = len(definition.parameters["stack"].get("period", {}))
    blocks: dict[tuple[str, ...], dict[str, Any]] = {}
    for path, leaf in _leaves(definition.parameters):
        block = path[:3] if path[0] == "stack" else ()
        blocks.setdefault(block, {})[".".join(path[len(block) :])] = leaf
    for block, leaves in blocks.items():
        table, prefixes = MODEL_TENSORS, {None: ""}
        if block:
            place = int(block[2])
            layers: dict[int | None, int] = {None: _scanned(definition) + place}
            if block[1] == "period":
                repeats = next(iter(leaves.values())).shape[0]
                layers = {r: r * places + place for r in range(repeats)}
            prefixes = {r: f"model.layers.{number}." for r, number in layers.items()}
            mixer = pattern[next(iter(layers.values())) % len(pattern)].mixer
            table = family.layer_tensors(mixer)
        for ours in leaves:
            if ours not in table:
                path = "/".join((*block, *ours.split(".")))
                raise ConfigError(f"{family.architecture} has no counterpart of {path}")
        sizes = {
            ours: {n: s for n, s in zip(leaf.axes, leaf.shape, strict=True) if n != "layers"}
            for ours, leaf in leaves.items()
        }
        every_size = {name: size for own in sizes.values() for name, size in own.items()}
        held: dict[str, list[tuple[tuple[str, ...], Layout]]] = {}
        for ours in table:
            if ours in leaves:
                name, stored = table[ours]
                one = Layout(stored, tuple(sizes[ours]), every_size | sizes[ours])
                held.setdefault(name, []).append(((*block, *ours.split(".")), one))
        for name, parts in held.items():
            paths, layouts = zip(*parts, strict=True)
            for repeat, prefix in prefixes.items():
                yield Slot(prefix + name, paths, layouts, repeat)


def _scanned(definition: ModelDefinition) -> int:
    """Number of layers in the scan."""
    return definition.config.num_layers - len(definition.parameters["stack"].get("rest", {}))


def _fitting_family(model: ModelConfig) -> Family:
    """The family that can express a model of ours; ConfigError says why none does."""
    reasons = []
    for family in FAMILIES:
        try:
            family.write(model)
        except ConfigError as error:
            reasons.append(str(error))
        else:
            return family
    raise ConfigError(" | ".join(reasons))


def _check(directory: Path, slots: dict[str, Slot], tensors: dict[str, shards.TensorInfo]) -> None:
    """CheckpointError unless names, shapes and dtypes are those that the model needs."""
    problems = {
        "missing": sorted(set(slots) - set(tensors)),
        "unexpected": sorted(set(tensors) - set(slots)),
        "of another shape": [
            f"{name} {list(tensors[name].shape)} instead of {list(slot.shape)}"
            for name, slot in slots.items()
            if name in tensors and tensors[name].shape != slot.shape
        ],
        f"of a dtype other than {', '.join(shards.DTYPES)}": [
            f"{n} {t.dtype}" for n, t in tensors.items() if t.dtype not in shards.DTYPES
        ],
    }
    found = [
        f"{len(names)} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for what, names in problems.items()
        if names
    ]
    if found:
        raise CheckpointError(f"{directory}: tensors do not fit {CONFIG_FILE}; {'; '.join(found)}")


def _allocate(
    definition: ModelDefinition, slots: dict[str, Slot], tensors: dict[str, shards.TensorInfo]
) -> dict[str, Any]:
    """Empty arrays of the dtypes stored; CheckpointError if layers of one parameter differ."""
    dtypes: dict[tuple[str, ...], set[str]] = {}
    for name, slot in slots.items():
        for path in slot.paths:
            dtypes.setdefault(path, set()).add(tensors[name].dtype)
    arrays: dict[str, Any] = {}
    for path, leaf in _leaves(definition.parameters):
        if len(dtypes[path]) > 1:
            raise CheckpointError(
                f"{'/'.join(path)} is stored as {', '.join(sorted(dtypes[path]))} in different "
                "layers; it must have one dtype"
            )
        node = arrays
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = np.empty(leaf.shape, shards.DTYPES[next(iter(dtypes[path]))])
    return arrays


def _bits(array: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers: copies are bitwise, and fast for bf16 too."""
    return array.view(f"u{array.dtype.itemsize}")


def _natural(name: str) -> list:
    """Sort key with layer 10 after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _leaf(tree: dict[str, Any], path: tuple[str, ...]) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def _leaves(tree: dict[str, Any], prefix: tuple[str, ...] = ()):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*prefix, name))
        else:
            yield (*prefix, name), value
