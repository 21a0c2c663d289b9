"""Plans of small models for TPU topologies: memory, fit, collectives, decoding and the door."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from efficient_lm.config import Config
from efficient_lm.errors import ConfigError
from efficient_lm.planning import estimate, tables
from efficient_lm.planning.compile import compile_program, train_program
from efficient_lm.planning.planner import make_plan
from efficient_lm.planning.report import write_report
from efficient_lm.planning.topologies import find_topology
from efficient_lm.training.state import TrainState

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


def test_the_compiler_counts_the_same_arguments_where_nothing_is_padded(v5e, plan):
    rows = kinds(make_plan(config(data=4, fsdp=1), v5e))  # 128 features: whole lanes
    exact = rows["parameters"] + rows["optimizer"] + rows["batch"]
    assert rows["padding of these"] <= 0.02 * exact
    assert kinds(plan)["padding of these"] > 0.02 * exact  # pieces of 32


def test_the_step_leaves_the_state_where_training_has_it(v5e):
    program = train_program(config(), v5e)
    state, _ = program.traced.out_info
    for name in TrainState.__dataclass_fields__:
        places = jax.tree.map(lambda leaf: leaf.sharding, program.inputs[name])
        assert jax.tree.map(lambda leaf: leaf.sharding, getattr(state, name)) == places, name


def test_collectives_of_fsdp_are_read_with_their_axis(plan):
    rows = {(row["kind"], row["axes"]): row for row in plan["collectives"]["rows"]}
    gathered = rows["all-gather", "fsdp"]
    matrices = 2 * 2 * (4 * 128 * 128 + 3 * 128 * 384)  # bf16, once forward and once again
    assert 2 * matrices <= gathered["bytes"] <= 3 * matrices
    assert gathered["seconds"] > 0


def test_tensor_parallelism_communicates_along_its_own_axis(v5e):
    rows = make_plan(config(tensor=2), v5e)["collectives"]["rows"]
    assert any("tensor" in row["axes"] and row["kind"] == "all-reduce" for row in rows)


def test_ulysses_exchanges_four_arrays_in_each_pass_of_each_layer(v5e):
    rows = make_plan(config(fsdp=2, sequence=2), v5e)["collectives"]["rows"]
    (row,) = [row for row in rows if row["kind"] == "all-to-all"]
    passes, layers = 3, 2  # forward, again, backward
    assert (row["axes"], row["count"]) == ("sequence", 4 * passes * layers)
    assert row["bytes"] == row["count"] * (8 // 2) * (128 // 2) * 2 * 64 * 2  # q of a device, bf16


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
    with pytest.raises(ConfigError, match="--batch=6 rows cannot be split over 4"):
        make_plan(config(), v5e, decode=(6, 64))


def test_the_compilers_refusal_is_a_plan_too(v5e):
    plan = make_plan(config(rows=65536, remat="none"), v5e)
    assert not plan["memory"]["fits"]
    assert plan["memory"]["total"] > v5e.chip.memory
    assert plan["memory"]["largest_temporaries"] and plan["collectives"]["rows"]
    text = tables.text({**plan, "advice": "--config.model.remat=full"})
    assert "does not fit" in text and "the largest term is saved activations" in text
    assert "nearest change that would fit: --config.model.remat=full" in text


def test_too_much_for_the_memory_of_the_host_is_said_so(v5e):
    message = "RESOURCE_EXHAUSTED: Allocation (size=274877906944) would exceed memory (size=1374389"
    message += "53472) :: %s0 = inlined_call_operand.host [shape: bf16[1024,8192,128,128]"

    class Refused:  # a real one compiles for a minute
        def lower(self):
            raise jax.errors.JaxRuntimeError(message)

    program = replace(train_program(config(), v5e), traced=Refused())
    with pytest.raises(ConfigError, match=r"offload keeps takes 256.0 GiB .* of 128.0 GiB; use"):
        compile_program(program)


def test_estimates_are_near_what_compiles(v5e, plan):
    guess = estimate.Estimator(config(), v5e)(config())
    rows = kinds(plan)
    for kind in ("parameters", "optimizer", "gradients", "saved activations"):
        assert guess.memory[kind] == pytest.approx(rows[kind], rel=0.02), kind
    assert guess.seconds["compute"] == pytest.approx(
        plan["roofline"]["seconds"]["compute"], rel=0.05
    )


def test_without_readable_hlo_collectives_come_from_the_rules(monkeypatch):
    from efficient_lm.planning import compile

    monkeypatch.setattr(compile, "_read", lambda directory, pattern: None)
    given = make_plan(config(), find_topology("local"))
    assert given["collectives"]["source"].startswith("the sharding rules")
    assert {row["kind"] for row in given["collectives"]["rows"]} == {"all-gather", "reduce-scatter"}


def test_batches_and_meshes_that_do_not_divide_are_refused(v5e):
    with pytest.raises(ConfigError, match="= 6 rows cannot be split over 4 devices"):
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
