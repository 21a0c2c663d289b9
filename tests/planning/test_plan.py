"""Plans of small models for TPU topologies: memory, fit, collectives, decoding and the door."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from efficient_lm.config import Config
from efficient_lm.errors import ConfigError
from efficient_lm.planning import advice, estimate, search, tables
from efficient_lm.planning.compile import bytes_per_device, train_inputs
from efficient_lm.planning.planner import make_plan
from efficient_lm.planning.report import write_report
from efficient_lm.planning.topologies import find_topology

ROOT = Path(__file__).parents[2]


def config(rows=8, remat="full", optimizer=None, **parallel):
    return Config.from_dict(
        {
            "model": {"vocabulary_size": 256, "embed_dim": 128, "num_layers": 2, "max_length": 128,
                      "dtype": "bfloat16", "remat": remat,
                      "mixers": {"attention": {"num_heads": 2}}},
            "data": {"sequence_length": 128, "batch_size": rows},
            "optimizer": optimizer or {},
            "parallel": {"data": 1, "fsdp": -1} | parallel,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def v5e():
    return find_topology("v5e:2x2")


@pytest.fixture(scope="module")
def plan(v5e):
    return make_plan(config(), v5e)


def kinds(plan):
    return {row["kind"]: row["bytes"] for row in plan["memory"]["rows"]}


def by_hand():
    """Parameters of that model: tied embedding, 7 matrices and 2 norms a layer, a last norm."""
    width, hidden = 128, 384  # 8/3 of the width, rounded up to 64
    return 256 * width + 2 * (4 * width * width + 3 * width * hidden + 2 * width) + width


def test_parameter_and_optimizer_bytes_are_those_of_arithmetic(plan):
    assert plan["step"]["parameters"] == by_hand()
    rows = kinds(plan)
    assert rows["parameters"] == pytest.approx(4 * by_hand() / 4, rel=0.02)
    assert rows["optimizer"] == pytest.approx(2 * 4 * by_hand() / 4, rel=0.02)
    assert rows["batch"] == 5 * 4 * 2 * 128
    assert rows["saved activations"] == 2 * 2 * 128 * 128 * 2  # the stream, in bf16, on each of 4
    assert plan["memory"]["fits"]


def test_llama_8b_on_pods_agrees_with_arithmetic():
    sys.path.insert(0, str(ROOT))
    from configs.llama3 import get_config

    whole = Config.from_config_dict(get_config("8b"))
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


def test_the_compiler_counts_the_same_arguments_where_nothing_is_padded(v5e):
    rows = kinds(make_plan(config(data=4, fsdp=1), v5e))  # 128 features: whole lanes
    exact = rows["parameters"] + rows["optimizer"] + rows["batch"]
    assert rows["padding of these"] <= 0.02 * exact
    assert kinds(make_plan(config(), v5e))["padding of these"] > 0.02 * exact  # of 32


def test_collectives_of_fsdp_are_read_with_their_axis(plan):
    rows = {(row["kind"], row["axes"]): row for row in plan["collectives"]["rows"]}
    gathered = rows["all-gather", "fsdp"]
    matrices = 2 * 2 * (4 * 128 * 128 + 3 * 128 * 384)  # bf16, once forward and once again
    assert 2 * matrices <= gathered["bytes"] <= 3 * matrices
    assert gathered["seconds"] > 0


def test_tensor_parallelism_communicates_along_its_own_axis(v5e):
    rows = make_plan(config(tensor=2), v5e)["collectives"]["rows"]
    assert any("tensor" in row["axes"] and row["kind"] == "all-reduce" for row in rows)


def test_a_plan_of_this_host():
    local = make_plan(config(), find_topology("local"))
    assert local["memory"]["available"] is None and local["memory"]["fits"]
    assert kinds(local)["parameters"] == pytest.approx(4 * by_hand() / 8, rel=0.02)
    assert {row["axes"] for row in local["collectives"]["rows"]} == {"fsdp"}
    assert local["roofline"]["seconds"]["interconnect"] is None
    assert "how much there is, is not known" in tables.text(local)


def test_decoding_has_a_cache_and_reads_it_every_step(v5e):
    short, long = (make_plan(config(tensor=2), v5e, decode=(8, n)) for n in (64, 128))
    cache = {n: 2 * 2 * 8 * 2 * 64 * n * 2 / 4 for n in (64, 128)}  # k and v, bf16, of 2 heads
    assert kinds(short)["cache"] == pytest.approx(cache[64], rel=0.05)
    assert kinds(long)["cache"] == pytest.approx(cache[128], rel=0.05)
    more = long["memory_traffic"]["bytes"] - short["memory_traffic"]["bytes"]
    assert more >= cache[64]
    assert long["flops"]["model"] > short["flops"]["model"] > 0
    with pytest.raises(ConfigError, match="--context=512; allowed: 1 to"):
        make_plan(config(), v5e, decode=(8, 512))
    with pytest.raises(ConfigError, match=r"6 rows \(--batch\) cannot be split over 4"):
        make_plan(config(), v5e, decode=(6, 64))


def small_memory(topology, size):
    return dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, memory=size))


def test_what_does_not_fit_names_its_largest_term_and_a_change_that_fits(v5e):
    given = config(rows=64, remat="none")
    size = make_plan(config(rows=64, remat="full"), v5e)["memory"]["total"]
    tight = small_memory(v5e, 1.05 * size)
    plan = make_plan(given, tight)
    assert not plan["memory"]["fits"] and plan["memory"]["largest"] == "saved activations"
    plan["advice"] = advice.advise(given, tight, plan)
    assert "--config." in plan["advice"] and "compiled" in plan["advice"]
    text = tables.text(plan)
    assert "does not fit" in text and "the largest term is saved activations" in text
    assert f"nearest change that would fit: {plan['advice']}" in text


def test_what_no_change_of_the_step_fits_is_given_more_chips(v5e):
    whole = make_plan(config(rows=4), v5e)["memory"]["total"]
    tight = small_memory(v5e, 0.8 * whole)
    plan = make_plan(config(rows=4), tight)
    assert advice.advise(config(rows=4), tight, plan).startswith("--topology=v5e:4x")


def test_the_compilers_refusal_is_a_plan_too(v5e):
    plan = make_plan(config(rows=65536, remat="none"), v5e)
    assert not plan["memory"]["fits"]
    assert plan["memory"]["total"] > v5e.chip.memory
    assert plan["memory"]["largest_temporaries"] and plan["collectives"]["rows"]


def test_search_ranks_what_fits_first_and_compiles_the_best(v5e):
    rows = search.search(config(rows=16), v5e)
    compiled = [row for row in rows if "plan" in row]
    assert len(compiled) == search.COMPILED and rows[: len(compiled)] == compiled
    best = compiled[0]
    assert best["fits"] and best["seconds"]["overlapped"] <= compiled[-1]["seconds"]["overlapped"]
    assert {tuple(row["mesh"].values()) for row in rows} >= {(1, 4, 1, 1), (2, 2, 1, 1)}
    assert "variants" in tables.search_text(rows)
    none = search.search(config(rows=16), small_memory(v5e, 1e3))
    assert not any(row["fits"] for row in none) and "none fits" in tables.search_text(none)


def test_estimates_are_near_what_compiles(v5e, plan):
    guess = estimate.Estimator(config(), v5e)(config())
    rows = kinds(plan)
    for kind in ("parameters", "optimizer", "gradients", "saved activations"):
        assert guess.memory[kind] == pytest.approx(rows[kind], rel=0.02), kind
    assert guess.seconds["compute"] == pytest.approx(
        plan["roofline"]["seconds"]["compute"], rel=0.05
    )


def test_batches_and_meshes_that_do_not_divide_are_refused(v5e):
    with pytest.raises(ConfigError, match=r"6 rows .* cannot be split over 4 devices"):
        make_plan(config(rows=6), v5e)
    with pytest.raises(ConfigError, match="asks for 3 devices"):
        make_plan(config(fsdp=3), v5e)


def test_reports_hold_no_machine_paths(plan, tmp_path):
    paths = write_report(plan, tmp_path)
    assert [path.name for path in paths] == ["plan.json", "plan.png"]
    assert json.loads(paths[0].read_text())["mesh"]["fsdp"] == 4
    assert str(ROOT) not in paths[0].read_text() and paths[1].stat().st_size > 5000


def test_the_door_lists_known_topologies_in_one_line():
    command = [sys.executable, "-m", "efficient_lm.plan", "--config=configs/quickstart.py"]
    done = subprocess.run(
        [*command, "--topology=v4:2x2"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown topology 'v4:2x2'; known: v5e:AxB")
    assert len(done.stderr.splitlines()) == 1
