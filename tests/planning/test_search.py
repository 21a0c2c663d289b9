"""Variants and advice for Llama-3-8B on pods; the estimate stands in for the compiler."""

import dataclasses

import pytest

from configs.llama3 import get_config
from efficient_lm.config import Config
from efficient_lm.errors import ConfigError
from efficient_lm.planning import advice, search, tables
from efficient_lm.planning.compile import bytes_per_device, train_inputs
from efficient_lm.planning.estimate import Estimator
from efficient_lm.planning.topologies import find_topology


def llama(rows=512, **changes):
    values = get_config("8b")
    values.update_from_flattened_dict({"data.batch_size": rows} | changes)
    return Config.from_config_dict(values)


@pytest.fixture
def estimated(monkeypatch):
    """Plans of the estimate alone, and the configs they were made of."""
    made = []

    def plan(config, topology):
        estimate = Estimator(config, topology)(config)
        made.append(config)
        fits = estimate.total <= topology.chip.memory
        return {"memory": {"fits": fits, "total": estimate.total},
                "roofline": {"seconds": estimate.seconds, "mfu_bound": 0.5}}  # fmt: skip

    for module in (search, advice):
        monkeypatch.setattr(module, "make_plan", plan)
    return plan, made


def test_llama_8b_on_pods_agrees_with_arithmetic():
    whole = llama()
    count = (
        2 * 128_256 * 4096
        + 4096
        + 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336 + 2 * 4096)
    )
    for name, devices in (("v5e:16x16", 256), ("v5p:8x8x8", 512), ("tpu7x:4x4x4", 128)):
        mesh, definition, inputs = train_inputs(whole, find_topology(name))
        assert mesh.size == devices and definition.count() == count
        assert bytes_per_device(inputs["parameters"]) == pytest.approx(
            4 * count / devices, rel=0.02
        )
        assert bytes_per_device(inputs["optimizer"]) == pytest.approx(8 * count / devices, rel=0.02)


def advise(estimated, config, name):
    topology = find_topology(name)
    plan = estimated[0](config, topology)
    assert not plan["memory"]["fits"]
    return advice.advise(config, topology, plan)


def test_advice_keeps_less_before_all_else(estimated):
    line = advise(estimated, llama(256, **{"model.remat": "none"}), "v5e:16x16")
    # 69 GiB are saved; products and dots save 21, the mixers' outputs fit.
    assert line.startswith("--config.model.remat=mixer (compiled: ")


def test_then_it_takes_more_microbatches(estimated):
    line = advise(estimated, llama(2048), "v5e:16x16")
    assert line.startswith("--config.optimizer.accumulation_steps=4 (compiled: ")


def test_then_it_splits_the_parameters(estimated):
    line = advise(estimated, llama(256, **{"parallel.data": 64, "parallel.fsdp": 4}), "v5e:16x16")
    assert line.startswith("--config.parallel.data=1 --config.parallel.fsdp=-1 (compiled: ")


def test_at_last_it_takes_more_chips(estimated):
    line = advise(estimated, llama(4), "v5e:2x2")
    assert line.startswith("--topology=v5e:4x4 --config.data.batch_size=16 (compiled: ")


def test_what_no_pod_holds_gets_no_advice(estimated):
    topology = find_topology("v5e:8x8")
    tiny = dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, memory=2**20))
    plan = estimated[0](llama(64), tiny)
    assert advice.advise(llama(64), tiny, plan).startswith("none found")


def test_search_compiles_the_best_of_those_that_fit(estimated):
    rows = search.search(llama(), find_topology("v5e:16x16"))
    compiled = [row for row in rows if "plan" in row]
    assert len(compiled) == len(estimated[1]) == search.COMPILED == rows.index(rows[3])
    assert all(row["fits"] for row in compiled)
    times = [search.middle(row["seconds"]) for row in rows if row["fits"]]
    assert times == sorted(times)
    last = next(i for i, row in enumerate(rows) if not row["fits"])
    assert not any(row["fits"] for row in rows[last:])
    given = {"data": 1, "fsdp": 256, "sequence": 1, "tensor": 1}
    assert any(row["mesh"] == given and row["remat"] == "full" for row in rows)
    assert all(row["mesh"]["sequence"] == 1 for row in rows)  # rows for every device
    shown = tables.search_text(rows)
    assert "variants" in shown and "compiled" in shown and "estimated" in shown


def test_search_splits_tokens_where_rows_are_few(estimated):
    rows = search.search(llama(4), find_topology("v5e:4x4"))
    meshes = {tuple(row["mesh"].values()) for row in rows}
    assert (1, 4, 4, 1) in meshes and (1, 2, 4, 2) in meshes
    assert all(mesh[0] * mesh[1] <= 4 for mesh in meshes)  # rows
    assert all(32 % (mesh[2] * mesh[3]) == 0 for mesh in meshes)  # heads


def test_a_search_without_room_says_so(estimated):
    topology = find_topology("v5e:2x2")
    rows = search.search(llama(8), topology)
    assert not any(row["fits"] for row in rows) and not estimated[1]
    assert "none fits" in tables.search_text(rows)
    with pytest.raises(ConfigError, match="no mesh divides 256 devices and a batch of 3 rows"):
        search.search(llama(3, **{"data.sequence_length": 8191}), find_topology("v5e:16x16"))


def test_decoding_is_advised_to_fewer_rows():
    rows = [{"kind": "cache", "bytes": 80}, {"kind": "parameters", "bytes": 40}]
    plan = {"memory": {"rows": rows, "total": 120, "available": 100}, "step": {"batch": 16},
            "mesh": {"dcn": 1, "data": 2, "fsdp": 1}}  # fmt: skip
    assert advice.advise_decoding(plan).startswith("--batch=12 ")
    plan["memory"]["available"] = 30
    assert "parallel.tensor" in advice.advise_decoding(plan)
