"""The choice of an implementation, its reasons and its errors."""

import inspect
import logging
from dataclasses import dataclass

import jax
import pytest

from pallas_kernels._core import compat, tuning
from pallas_kernels._core.compat import Target
from pallas_kernels._core.dispatch import Condition, Implementation, choose


@dataclass(frozen=True)
class Facts:
    target: Target
    dtype: str = "float32"
    size: int = 1


TABLE = (
    Implementation(
        "fast", "math:sin", ("gpu",), ("bfloat16",),
        conditions=(Condition("an even size", lambda f: f.size % 2 == 0),),
        advice=(Condition("a size above 10", lambda f: f.size > 10),),
    ),
    Implementation("portable", "math:cos", ("cpu", "gpu")),
)  # fmt: skip
CPU, GPU = Target("cpu", "cpu"), Target("gpu", "NVIDIA H200", 9.0)


def test_auto_takes_the_first_that_can_run():
    assert choose("op", TABLE, Facts(GPU, "bfloat16", 12)).name == "fast"
    assert choose("op", TABLE, Facts(CPU, "bfloat16", 12)).name == "portable"
    assert choose("op", TABLE, Facts(GPU, "bfloat16", 13)).name == "portable"


def test_advice_binds_auto_alone():
    facts = Facts(GPU, "bfloat16", 2)
    choice = choose("op", TABLE, facts)
    assert choice.name == "portable"
    assert choice.passed_over == {"fast": "it is chosen only with a size above 10"}
    assert choose("op", TABLE, facts, "fast").name == "fast"


def test_reasons_are_told():
    choice = choose("op", TABLE, Facts(GPU, "float32", 3))
    assert str(choice) == (
        "op: portable; not fast: it needs dtype bfloat16 (given float32) and an even size"
    )
    assert choose("op", TABLE, Facts(CPU)).passed_over["fast"] == "it needs gpu (this is cpu)"


def test_named_implementation_that_cannot_run_raises_with_alternatives():
    with pytest.raises(ValueError) as error:
        choose("op", TABLE, Facts(CPU), "fast")
    assert str(error.value) == (
        "op: 'fast' cannot run: it needs gpu (this is cpu); can run here: portable"
    )


def test_tuple_is_an_order_of_preference():
    assert choose("op", TABLE, Facts(CPU), ("fast", "portable")).name == "portable"
    with pytest.raises(ValueError, match="'fast' cannot run"):
        choose("op", TABLE, Facts(CPU), ("fast",))


@pytest.mark.parametrize("given", ["fastest", ("portable", "fastest"), (), None, 3, ([],)])
def test_unknown_names(given):
    with pytest.raises(ValueError, match="allowed: 'auto', 'fast'"):
        inspect.unwrap(choose)("op", TABLE, Facts(CPU), given)  # which tests alone check by type


def test_a_choice_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        for _ in range(3):
            choose("logged_once", TABLE, Facts(CPU))
    assert len(caplog.records) == 1


def test_implementation_is_imported_when_loaded():
    assert TABLE[1].load()(0.0) == 1.0
    with pytest.raises(ModuleNotFoundError):
        Implementation("gone", "no_such_module:f", ("cpu",)).load()


def test_target_follows_the_abstract_mesh():
    """A program compiled for a device that this host lacks is dispatched for that device."""
    assert compat.target().platform == "cpu"
    device = jax.sharding.AbstractDevice("NVIDIA H200", None, "cuda")
    kinds = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=kinds, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert compat.target() == Target("gpu", "NVIDIA H200", 9.0)


def test_tuned_parameters_match_whole_shapes(tmp_path, monkeypatch):
    (tmp_path / "op" / "tuned").mkdir(parents=True)
    (tmp_path / "op" / "tuned" / "nvidia_h200.json").write_text(
        '[{"implementation": "fast", "shape": {"T": 8}, "parameters": {"chunk": 4}}]'
    )
    monkeypatch.setattr(tuning.resources, "files", lambda package: tmp_path)
    assert tuning.lookup("op", "fast", "NVIDIA H200", {"T": 8}) == {"chunk": 4}
    assert tuning.lookup("op", "fast", "NVIDIA H200", {"T": 9}) is None
    assert tuning.lookup("op", "fast", "NVIDIA B200", {"T": 8}) is None
