"""Prefetch to devices: same batches, sharded, and the state of the batch last handed out."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from efficient_lm.config import DataConfig
from efficient_lm.data import pipeline, tokenizers
from efficient_lm.data.prefetch import prefetch_to_device

CONFIG = DataConfig(source="induction", sequence_length=8, batch_size=8)


def host_batches(config=CONFIG):
    return pipeline.make_train_iterator(config, tokenizers.make_tokenizer(config))


def place(batch):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    return jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))


@pytest.mark.parametrize("size", [0, 1, 3])
def test_same_batches_and_exact_resume(size, tmp_path):
    (tmp_path / "a.txt").write_text("".join(map(str, range(900))))
    for config in (
        CONFIG,
        DataConfig(source="text", paths=(str(tmp_path / "a.txt"),), sequence_length=16,
                   batch_size=8, packing="first_fit"),
    ):  # fmt: skip
        expected = [next(it) for it in [host_batches(config)] for _ in range(12)]
        iterator = prefetch_to_device(host_batches(config), place, size)
        states = [iterator.get_state()]
        for batch in expected[:8]:
            arrays = next(iterator)
            assert len(arrays["tokens"].sharding.device_set) == 8
            for name in batch:
                np.testing.assert_array_equal(arrays[name], batch[name])
            states.append(json.loads(json.dumps(iterator.get_state())))
        for stop, state in enumerate(states):
            again = prefetch_to_device(host_batches(config), place, size)
            next(again)  # a state also replaces what is prefetched
            again.set_state(state)
            assert again.get_state() == state
            for batch in expected[stop:]:
                np.testing.assert_array_equal(next(again)["tokens"], batch["tokens"])


def test_batches_are_made_ahead():
    class Counting:
        made = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.made += 1
            return {"tokens": np.full((8, 1), self.made, np.int32)}

        def get_state(self):
            return {"made": self.made}

        def set_state(self, state):
            self.made = state["made"]

    source = Counting()
    iterator = prefetch_to_device(source, place, 2)
    assert next(iterator)["tokens"][0, 0] == 1
    assert source.made == 3 and iterator.get_state() == {"made": 1}


def test_the_end_is_handed_on():
    class Two:
        def __init__(self):
            self.left = 2

        def __iter__(self):
            return self

        def __next__(self):
            if not self.left:
                raise StopIteration
            self.left -= 1
            return {"tokens": np.zeros((8, 1), np.int32)}

        def get_state(self):
            return {"left": self.left}

        def set_state(self, state):
            self.left = state["left"]

    assert len(list(prefetch_to_device(Two(), place, 5))) == 2


def test_an_iterator_alive_at_exit_ends_silently(tmp_path):
    (tmp_path / "a.txt").write_text("".join(map(str, range(900))))
    program = f"""
from efficient_lm.config import DataConfig
from efficient_lm.data import pipeline, tokenizers
alive = []
for packing in ("first_fit", "concat_then_split"):
    config = DataConfig(source="text", paths=("{tmp_path}/a.txt",), packing=packing)
    alive.append(pipeline.make_train_iterator(config, tokenizers.ByteTokenizer()))
    next(alive[-1])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
