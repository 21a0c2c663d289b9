"""Checkpoints: exact, atomic, and honest about damage."""

import errno
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.config import CheckpointingConfig
from efficient_lm.errors import CheckpointError
from efficient_lm.training import manifest, storage
from efficient_lm.training.checkpoint import Checkpointer, CheckpointReader, open_for_reading


class Moments(NamedTuple):
    count: jax.Array
    mu: dict
    nothing: tuple


def make_state(seed=0, devices=8, rows=16):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))
    rng = np.random.default_rng(seed)

    def put(array, *spec):
        return jax.device_put(array, jax.NamedSharding(mesh, jax.P(*spec)))

    kernel = rng.standard_normal((rows, 8)).astype(np.float32)
    parameters = {
        "layers": [{"kernel": put(kernel, "data")}, {"kernel": put(kernel.T + 1, None, "data")}],
        "scale": put(rng.standard_normal(5).astype(np.float32).astype(jnp.bfloat16)),
        "empty": put(np.zeros((0, 3), np.float32)),
    }
    optimizer = (Moments(put(np.int32(seed)), {"m": put(kernel * 2, None, "data")}, ()), ())
    return {
        "step": put(np.int32(seed)),
        "parameters": parameters,
        "optimizer": optimizer,
        "key": put(np.array([seed, 7], np.uint32)),
    }


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        assert one.sharding == other.sharding
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def write(workdir, *steps, metrics=None, **options):
    with Checkpointer(workdir, CheckpointingConfig(**options)) as checkpointer:
        for step in steps:
            checkpointer.save(
                step, make_state(step), iterator={"at": step}, config={"a": (1, 2)},
                metrics=metrics and metrics[step], wait=True,
            )  # fmt: skip
    return Path(workdir) / "checkpoints"


def test_restores_every_bit_and_the_rest(tmp_path):
    write(tmp_path, 3, metrics={3: {"loss": np.float32(1.5)}})
    restored = open_for_reading(tmp_path).restore(abstract(make_state(0)))
    assert_same(restored.state, make_state(3))
    assert restored.step == 3
    assert restored.iterator == {"at": 3}
    assert restored.config == {"a": [1, 2]}
    assert restored.metrics == {"loss": 1.5}
    assert restored.versions["jax"] == jax.__version__


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_restores_onto_another_device_count(tmp_path, devices):
    write(tmp_path, 3)
    target = make_state(0, devices)
    restored = open_for_reading(tmp_path).restore(abstract(target))
    assert_same(restored.state, make_state(3, devices))


def test_part_alone_is_read_and_cast(tmp_path):
    directory = write(tmp_path, 3) / "3" / "arrays"
    for path in (directory / "optimizer").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")  # inference must not even look at it
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding),
        make_state(0, devices=2)["parameters"],
    )
    got = open_for_reading(tmp_path).restore_part("parameters", wanted)
    expected = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), make_state(3, devices=2)["parameters"]
    )
    assert_same(got, expected)
    with pytest.raises(CheckpointError, match="no part 'average'; it has: "):
        open_for_reading(tmp_path).restore_part("average", wanted)


def test_arrays_may_be_donated_and_changed_once_save_returns(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)
    with Checkpointer(tmp_path, CheckpointingConfig()) as checkpointer:
        for step in range(1, 4):
            state = make_state(step, rows=40_000)
            state["host"] = np.full(100_000, step)
            host = state["host"]
            checkpointer.save(step, state, iterator={}, config={})
            del state["host"]
            host[:] = -1
            jax.block_until_ready(overwrite(state))
            for leaf in jax.tree.leaves(state):
                leaf.delete()
        checkpointer.wait()
        target = abstract(make_state(0, rows=40_000)) | {"host": np.zeros(100_000, int)}
        for step in range(1, 4):
            restored = checkpointer.restore(target, step).state
            assert (restored.pop("host") == step).all()
            assert_same(restored, make_state(step, rows=40_000))


def test_keeps_the_last_and_the_best(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: np.nan, 4: 2.0, 5: 2.5, 6: 2.6}
    metrics = {step: {"loss": loss} for step, loss in losses.items()}
    write(tmp_path, *losses, metrics=metrics, keep_last=2, keep_best=2)
    assert open_for_reading(tmp_path).steps() == [2, 4, 5, 6]


def test_without_metrics_only_the_last_are_kept(tmp_path):
    write(tmp_path, 1, 2, 3, 4, keep_last=2, keep_best=1)
    assert open_for_reading(tmp_path).steps() == [3, 4]


def test_going_on_from_an_earlier_step_gives_up_the_later_ones(tmp_path):
    write(tmp_path, 1, 2, 3, keep_last=3)
    write(tmp_path, 2, keep_last=3)
    assert open_for_reading(tmp_path).steps() == [1, 2]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def largest(directory, part):
    return max((directory / "arrays" / part).rglob("*/d/*"), key=lambda p: p.stat().st_size)


def forged_manifest(directory):
    path = directory / "manifest.json"
    path.write_text(path.read_text().replace("orbax", "0rbax"))


DAMAGES = {
    "one bit of an array": (lambda d: flip(largest(d, "parameters")), "wrong checksum"),
    "one bit of an optimizer array": (lambda d: flip(largest(d, "optimizer")), "wrong checksum"),
    "array file cut off": (lambda d: os.truncate(largest(d, "parameters"), 99), "99 bytes instead"),
    "empty array file": (lambda d: os.truncate(largest(d, "parameters"), 0), "0 bytes instead of"),
    "array file deleted": (lambda d: largest(d, "parameters").unlink(), "is missing"),
    "part deleted": (lambda d: shutil.rmtree(d / "arrays/optimizer"), "is missing and"),
    "index deleted": (lambda d: (d / "arrays/parameters/manifest.ocdbt").unlink(), "is missing"),
    "metadata is garbage": (
        lambda d: (d / "arrays/parameters/_METADATA").write_bytes(b"\x00garbage"),
        "bytes instead",
    ),
    "manifest deleted": (lambda d: (d / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest empty": (lambda d: os.truncate(d / "manifest.json", 0), "not a manifest"),
    "manifest cut off": (lambda d: os.truncate(d / "manifest.json", 500), "not a manifest"),
    "manifest is another JSON": (lambda d: (d / "manifest.json").write_text("[1]"), "not a mani"),
    "manifest is binary": (lambda d: (d / "manifest.json").write_bytes(b"\xff\x00"), "not a mani"),
    "manifest changed": (forged_manifest, "manifest.json is damaged (wrong checksum)"),
    "manifest is a directory": (
        lambda d: ((d / "manifest.json").unlink(), (d / "manifest.json").mkdir()),
        "manifest.json is unreadable",
    ),
    "directory empty": (lambda d: (shutil.rmtree(d), d.mkdir()), "manifest.json is missing"),
    "half-written": (lambda d: d.rename(d.with_name("3.saving")), "its save was cut off"),
}


@pytest.fixture(scope="module")
def three_checkpoints(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    write(workdir, 1, 2, 3)
    return workdir


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path, three_checkpoints, damage
):
    shutil.copytree(three_checkpoints, tmp_path, dirs_exist_ok=True)
    spoil, reason = DAMAGES[damage]
    spoil(tmp_path / "checkpoints" / "3")
    told = []
    reader = CheckpointReader(tmp_path, warn=told.append)
    restored = reader.restore(abstract(make_state(0)))
    assert restored.step == 2
    assert_same(restored.state, make_state(2))
    (line,) = told
    assert str(tmp_path / "checkpoints" / "3") in line
    assert reason in line
    assert "\n" not in line
    with pytest.raises(CheckpointError, match="no good checkpoint"):
        reader.restore(abstract(make_state(0)), step=3)


def test_when_none_is_good_each_is_told_with_its_reason(tmp_path, three_checkpoints):
    shutil.copytree(three_checkpoints, tmp_path, dirs_exist_ok=True)
    directory = tmp_path / "checkpoints"
    flip(largest(directory / "1", "parameters"))
    (directory / "2" / "manifest.json").unlink()
    os.truncate(largest(directory / "3", "optimizer"), 5)
    with pytest.raises(CheckpointError) as raised:
        CheckpointReader(tmp_path, warn=lambda line: None).restore(abstract(make_state(0)))
    assert re.search("3: .*5 bytes.*; 2: .*missing.*; 1: .*checksum", str(raised.value))
    assert "\n" not in str(raised.value)


def test_a_damaged_checkpoint_is_replaced_when_the_run_comes_by_again(tmp_path, three_checkpoints):
    shutil.copytree(three_checkpoints, tmp_path, dirs_exist_ok=True)
    flip(largest(tmp_path / "checkpoints" / "3", "parameters"))
    (tmp_path / "checkpoints" / "9.saving").mkdir()
    config = CheckpointingConfig(keep_last=2)
    with Checkpointer(tmp_path, config, warn=lambda line: None) as checkpointer:
        assert checkpointer.restore(abstract(make_state(0))).step == 2
        checkpointer.save(3, make_state(3), iterator={}, config={}, wait=True)
        assert_same(checkpointer.restore(abstract(make_state(0)), 3).state, make_state(3))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_the_last_good_checkpoint_survives_damage_and_pruning(tmp_path, three_checkpoints):
    shutil.copytree(three_checkpoints, tmp_path, dirs_exist_ok=True)
    for step in ("2", "3"):
        flip(largest(tmp_path / "checkpoints" / step, "parameters"))
    config = CheckpointingConfig(keep_last=2, keep_best=0)
    with Checkpointer(tmp_path, config, warn=lambda line: None) as checkpointer:
        assert checkpointer.restore(abstract(make_state(0))).step == 1
        checkpointer.save(4, make_state(4), iterator={}, config={}, wait=True)
        assert checkpointer.steps() == [1, 4]


def test_saves_killed_at_any_moment_lose_nothing(tmp_path):
    from killed_saves import MOMENTS

    script = Path(__file__).with_name("killed_saves.py")
    subprocess.run([sys.executable, "-W", "ignore", script, tmp_path], check=True)
    for moment, (_, saving, expected) in MOMENTS.items():
        told, found = [], (tmp_path / moment / "checkpoints").iterdir()
        begun = any(not path.name.isdigit() for path in found)
        with Checkpointer(tmp_path / moment, CheckpointingConfig(), warn=told.append) as writer:
            restored = writer.restore(abstract(make_state(0)))
            assert restored.step in expected, moment
            assert_same(restored.state, make_state(restored.step))
            # A kill by the clock can also come before anything is written.
            lost = restored.step < saving and (begun or not moment.startswith("after_"))
            assert len(told) == lost, moment
            writer.save(5, make_state(5), iterator={}, config={}, wait=True)
        names = {path.name for path in (tmp_path / moment / "checkpoints").iterdir()}
        assert all(name.isdigit() for name in names), moment


def test_a_newer_format_is_refused(tmp_path, three_checkpoints):
    shutil.copytree(three_checkpoints, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoints" / "3" / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(CheckpointError, match=r"has format version 99; .* install a newer"):
        open_for_reading(tmp_path).restore(abstract(make_state(0)))


def test_a_state_that_does_not_fit_says_which_arrays(three_checkpoints):
    wanted = abstract(make_state(0, rows=24))
    wanted["parameters"]["extra"] = jax.ShapeDtypeStruct((3,), jnp.float32)
    wanted["parameters"]["scale"] = jax.ShapeDtypeStruct((5,), jnp.float32)
    del wanted["step"]
    with pytest.raises(CheckpointError) as raised:
        open_for_reading(three_checkpoints).restore(wanted)
    head, *lines = str(raised.value).splitlines()
    assert "checkpoints/3 does not fit this config; give the config that wrote it or" in head
    assert [line.strip() for line in lines] == [
        "optimizer.0.mu.m: float32[16,8] in the checkpoint, wanted float32[24,8]",
        "parameters.extra: missing in the checkpoint, wanted float32[3]",
        "parameters.layers.0.kernel: float32[16,8] in the checkpoint, wanted float32[24,8]",
        "parameters.layers.1.kernel: float32[8,16] in the checkpoint, wanted float32[8,24]",
        "parameters.scale: bfloat16[5] in the checkpoint, wanted float32[5]",
        "values.step: unexpected, int32[] in the checkpoint",
    ]


def test_many_differences_are_cut_short(three_checkpoints):
    wanted = {"parameters": {f"w{i}": jax.ShapeDtypeStruct((), jnp.float32) for i in range(40)}}
    with pytest.raises(CheckpointError) as raised:
        open_for_reading(three_checkpoints).restore(wanted)
    assert len(str(raised.value).splitlines()) == 12
    assert str(raised.value).endswith("and 38 more")


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A directory of two megabytes; where mounting is not allowed, writes fail by injection."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path]
    if shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0:
        yield tmp_path
        subprocess.run(["umount", tmp_path], check=True)
        return

    write = manifest.write

    def write_if_small(directory, content):
        if sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) > 2**21:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(directory, content)

    monkeypatch.setattr(manifest, "write", write_if_small)
    yield tmp_path


def test_a_full_disk_stops_the_save_and_not_the_run(small_disk, caplog):
    told = []
    big = make_state(2, rows=60_000)
    checkpointer = Checkpointer(small_disk, CheckpointingConfig(), warn=told.append)
    checkpointer.save(1, make_state(1), iterator={}, config={}, wait=True)
    checkpointer.save(2, big, iterator={}, config={})
    checkpointer.save(3, make_state(3), iterator={}, config={})  # the run goes on
    checkpointer.wait()
    (line,) = told
    assert re.search(r"disk full: checkpoint 2 in .* needs about [\d,]+ bytes, [\d,]+ are", line)
    assert checkpointer.steps() == [1, 3]
    with pytest.raises(CheckpointError, match=r"disk full: checkpoint 4 .* earlier .* are kept"):
        checkpointer.save(4, big, iterator={}, config={}, wait=True)
    checkpointer.save(5, big, iterator={}, config={})
    with pytest.raises(CheckpointError, match="disk full: checkpoint 5"):
        checkpointer.close()
    assert checkpointer.steps() == [1, 3]
    assert_same(checkpointer.restore(abstract(make_state(0))).state, make_state(3))
    assert not caplog.text  # no traceback of a library's thread beside our line


def test_what_ends_after_a_failed_save_is_not_told(caplog, monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    storage._pass_over_closed_loops.__wrapped__()
    closed, other = (SimpleNamespace(exc_value=RuntimeError(text))
                     for text in ("Event loop is closed", "another"))  # fmt: skip
    for ended in (closed, other):
        sys.unraisablehook(ended)
    assert told == [other]
    late = "Future exception was never retrieved: %s"
    logging.getLogger("asyncio").error(late, "7.saving/arrays.orbax-checkpoint-tmp")
    logging.getLogger("asyncio").error(late, "another")
    assert [record.args for record in caplog.records] == [("another",)]


def test_places_without_checkpoints_are_told_in_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"no work directory .*/nothing; give"):
        open_for_reading(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*/checkpoints; train"):
        open_for_reading(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write to .* give another --workdir"):
        Checkpointer(tmp_path / "file" / "run", CheckpointingConfig())
    with pytest.raises(CheckpointError, match="is a URL; mount the bucket"):
        Checkpointer("gs://bucket/run", CheckpointingConfig())
    with Checkpointer(tmp_path / "new", CheckpointingConfig()) as checkpointer:
        assert checkpointer.restore(abstract(make_state(0))) is None
        with pytest.raises(TypeError, match=r"values.key is a PRNG key; save"):
            checkpointer.save(1, {"key": jax.random.key(0)}, iterator={}, config={})
        with pytest.raises(TypeError, match=r"values.name is no array"):
            checkpointer.save(1, {"name": "text"}, iterator={}, config={})
