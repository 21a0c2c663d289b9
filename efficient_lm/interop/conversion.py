"""A Hugging Face folder becomes a work directory of ours, and a work directory becomes one."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from efficient_lm.config import Config, DataConfig
from efficient_lm.data.tokenizers import has_tokenizer
from efficient_lm.errors import CheckpointError
from efficient_lm.inference.load import read_config
from efficient_lm.interop import hugging_face, shards
from efficient_lm.model.definition import define
from efficient_lm.training.checkpoint import Checkpointer, open_for_reading

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
# Kept in the work directory, so that an export gives back what we do not use ourselves.
ORIGINALS = "hugging_face"
ORIGINAL_FILES = ("config.json", "generation_config.json")


def to_workdir(source: str | Path, workdir: str | Path) -> list[str]:
    """Convert a Hugging Face folder into a new work directory that `load` and the doors read.

    Parameters keep the dtype of the checkpoint. Returns lines that say what was done and what was
    not. Errors: ConfigError, CheckpointError (also when `workdir` is not empty).
    """
    source, workdir = Path(source).expanduser(), Path(workdir).expanduser()
    with _new_directory(workdir) as partial:
        model, arrays = hugging_face.read_model(source)
        data = DataConfig(sequence_length=min(DataConfig.sequence_length, model.max_length))
        lines = [f"{source} has no tokenizer.json: converted without a tokenizer"]
        if has_tokenizer(source):
            _copy(source, partial / "tokenizer", TOKENIZER_FILES)
            data = dataclasses.replace(data, tokenizer=str(workdir / "tokenizer"))
            lines = []
        _copy(source, partial / ORIGINALS, ORIGINAL_FILES)
        config = Config.from_dict(Config(model=model, data=data).to_dict())
        with _lean_saving(), Checkpointer(partial, config.checkpointing) as checkpointer:
            checkpointer.save(
                0, {"parameters": arrays}, iterator={}, config=config.to_dict(), wait=True
            )
        (partial / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    given = hugging_face.read_config(source)
    family = hugging_face.family_of(given)
    others = hugging_face.left_out(family, shards.scan(source))
    if others:
        lines.append(f"left out {len(others)} tensors beside the text model, such as {others[0]}")
    unread = family.unread(given)
    if unread:
        lines.append(f"fields of config.json that have no meaning here: {', '.join(unread)}")
    leaves = jax.tree.leaves(arrays)
    count, dtypes = sum(x.size for x in leaves), sorted({str(x.dtype) for x in leaves})
    lines.append(f"wrote {workdir}: {count:,} parameters ({', '.join(dtypes)})")
    return lines


def from_workdir(workdir: str | Path, target: str | Path) -> list[str]:
    """Write the newest checkpoint of a work directory as a new Hugging Face folder.

    Runs of ours are exported when one of the supported architectures can express their config.
    Returns and raises as `to_workdir`.
    """
    workdir, target = Path(workdir).expanduser(), Path(target).expanduser()
    config = read_config(workdir)
    original = None
    if (workdir / ORIGINALS).is_dir():
        original = hugging_face.read_config(workdir / ORIGINALS)
    with _new_directory(target) as partial:
        arrays = read_parameters(workdir, config)
        _copy(workdir / ORIGINALS, partial, ORIGINAL_FILES)
        written = hugging_face.write_model(partial, config.model, arrays, original)
        _copy(workdir / "tokenizer", partial, TOKENIZER_FILES)
    lines = []
    if not (workdir / "tokenizer" / "tokenizer.json").is_file():
        ours = has_tokenizer(workdir / "tokenizer")
        how = "with a tokenizer that only efficient_lm reads" if ours else "without a tokenizer"
        lines.append(f"{workdir} has no tokenizer.json: exported {how}")
    return [*lines, f"wrote {target}: {written['architectures'][0]}"]


def read_parameters(workdir: Path, config: Config) -> dict[str, Any]:
    """Parameters of the newest checkpoint in host memory, in the dtypes saved.

    As `load` does, it takes their moving average where the run kept one.
    """
    reader = open_for_reading(workdir)
    parts = reader.parts()
    part = "average" if "average" in parts else "parameters"
    saved = parts.get(part, {})
    host = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])

    def abstract(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        dtype = saved.get(name, leaf).dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=host)

    shapes = jax.tree_util.tree_map_with_path(
        abstract, define(config.model).parameters, is_leaf=lambda leaf: not isinstance(leaf, dict)
    )
    return reader.restore_part(part, shapes)


def _lean_saving() -> contextlib.AbstractContextManager:
    """Saving without a second copy: orbax else copies host arrays and buffers compressed ones."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.memory.deepcopy_host_arrays = False
    context.array.saving.use_compression = False
    return context


@contextlib.contextmanager
def _new_directory(path: Path) -> Iterator[Path]:
    """A folder beside `path` that takes its name at the end, or vanishes on an error."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists and is not empty; give a new folder")
    partial = path.with_name(path.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        where = error.filename or partial
        raise CheckpointError(
            f"cannot convert to {path}: {error.strerror or error} ({where})"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    """Copy those files of `names` that `source` has."""
    target.mkdir(exist_ok=True)
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
