"""The short convolution: every implementation against the specification, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import bench
from pallas_kernels._core.testing import relative_error
from pallas_kernels._hopper.support import VERSION
from pallas_kernels.short_convolution import explain, ref, xla

needs_mosaic = pytest.mark.skipif(
    VERSION < (0, 11), reason="needs JAX 0.11, as CI on Python 3.12 has"
)
PACKED = ((0, 3), (1, 1), (2, 60), (3, 1), (4, 90), (0, 7))  # (document, tokens)
# (B, T, N, H, W), then what is done
CASES = {
    "one_token": ((2, 1, 1, 128, 4), {"silu": True, "unit_norm": True}),
    "less_than_the_width": ((1, 2, 2, 64, 4), {"silu": True, "bias": True}),
    "packed": (
        (2, 162, 2, 128, 4),
        {"silu": True, "unit_norm": True, "bias": True, "packed": True},
    ),
    "packed_narrow": ((1, 162, 3, 64, 3), {"silu": True, "unit_norm": True, "packed": True}),
    "many_chunks": ((1, 321, 2, 128, 2), {"silu": True}),
    "heads_joined": ((2, 65, 8, 16, 4), {"bias": True}),
}


def arguments(sizes, bias=False, packed=False, dtype=jnp.float32, **options):
    """x, weight, bias, segment_ids, a cotangent, and options."""
    B, T, N, H, W = sizes
    keys = jax.random.split(jax.random.key(0), 4)
    x, cotangent = (jax.random.normal(key, (B, T, N, H)).astype(dtype) for key in keys[:2])
    weight = 0.5 * jax.random.normal(keys[2], (N, H, W))
    segments = np.repeat(*np.array(PACKED).T)[None].repeat(B, axis=0)
    segments = jnp.asarray(segments, jnp.int32) if packed else None
    bias = jax.random.normal(keys[3], (N, H)) if bias else None
    return (x, weight, bias), segments, cotangent, {"silu": False, "unit_norm": False} | options


def results(function, given, segments, cotangent, options) -> list:
    """The output and the gradients of x, weight and bias."""

    def run(*given):
        return function(*given, segments, **options)

    y, pull = jax.vjp(run, *given)
    return jax.tree.leaves((y, pull(cotangent.astype(y.dtype))))


def worst(function, name, dtype) -> float:
    """The largest relative error of an output or gradient, against the specification in fp32."""
    sizes, options = CASES[name]
    given, segments, cotangent, options = arguments(sizes, dtype=dtype, **options)
    found = results(function, given, segments, cotangent, options)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), given)
    wanted = results(ref.short_convolution, wide, segments, cotangent, options)
    pairs = zip(found, wanted, strict=True)
    return max(relative_error(np.asarray(x, np.float32), np.asarray(y)) for x, y in pairs)


@pytest.fixture
def interpreted(monkeypatch):
    """The Hopper kernel as JAX's interpreter runs it on a CPU: unwritten memory is NaN."""
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.short_convolution import mosaic_gpu

    interpret = params.InterpretGPUParams(detect_races=True)
    monkeypatch.setattr(plgpu, "kernel", functools.partial(plgpu.kernel, interpret=interpret))
    mosaic_gpu.call.clear_cache()
    yield mosaic_gpu.short_convolution
    mosaic_gpu.call.clear_cache()


@pytest.mark.parametrize("name", CASES)
def test_shifted_sums_are_the_specification(name):
    assert worst(xla.short_convolution, name, jnp.float32) < 1e-5
    assert worst(xla.short_convolution, name, jnp.bfloat16) < 4e-3


@needs_mosaic
@pytest.mark.parametrize("name", ["one_token", "packed", "packed_narrow", "heads_joined"])
def test_the_hopper_kernel_is_the_specification(interpreted, name):
    assert worst(interpreted, name, jnp.bfloat16) < 3e-3


@needs_mosaic
def test_the_hopper_kernel_under_vmap_is_itself_for_each(interpreted):
    (x, weight, _), _, _, options = arguments((2, 70, 1, 128, 4), dtype=jnp.bfloat16, silu=True)

    def run(x, weight):
        return interpreted(x[None], weight, None, None, **options)[0]

    for wanted, found in zip(
        map(run, x, [weight] * 2), jax.vmap(run, (0, None))(x, weight), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.accelerator
@pytest.mark.parametrize("name", CASES)
def test_on_hopper(name):
    if not getattr(jax.devices()[0], "compute_capability", "").startswith("9."):
        pytest.skip("needs a Hopper GPU")

    def run(x, weight, bias, segments, **options):
        return pallas_kernels.short_convolution(
            x, weight, bias, segment_ids=segments, implementation="mosaic_gpu", **options
        )

    assert worst(run, name, jnp.bfloat16) < 3e-3


@needs_mosaic
def test_hopper_takes_its_kernel_where_it_fits():
    device = jax.sharding.AbstractDevice("NVIDIA H200", None, "cuda")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=auto, abstract_device=device)

    def given(length=200, heads=3, features=64, width=4, dtype=jnp.bfloat16):
        x = jax.ShapeDtypeStruct((2, length, heads, features), dtype)
        return x, jax.ShapeDtypeStruct((heads, features, width), jnp.float32)

    with jax.sharding.use_abstract_mesh(mesh):
        assert explain(*given()).name == "mosaic_gpu"
        assert "at least 64 tokens" in str(explain(*given(length=63)))
        assert "2 to 4 tokens" in str(explain(*given(width=5)))
        assert "float32" in str(explain(*given(dtype=jnp.float32)))
        assert explain(*given(heads=8, features=16)).name == "mosaic_gpu"
        assert "multiple of 64" in str(explain(*given(heads=8, features=16), unit_norm=True))
        jax.jit(jax.grad(lambda x, w: jnp.sum(
            pallas_kernels.short_convolution(x, w, silu=True).astype(jnp.float32)
        ))).trace(*given()).lower(lowering_platforms=("cuda",))  # fmt: skip


@pytest.mark.parametrize(
    "change, told",
    [
        ({"x": jnp.ones((2, 8, 4))}, "must be [B, T, N, H]"),
        ({"weight": jnp.ones((2, 5, 4))}, "do not fit"),
        ({"weight": jnp.ones((2, 4, 0))}, "at least one head"),
        ({"x": jnp.ones((2, 8, 2, 4), jnp.int32)}, "cast it to a floating-point dtype"),
        ({"bias": jnp.ones((4, 2))}, "bias has shape (4, 2); it must be (2, 4)"),
        ({"segment_ids": jnp.ones((2, 7), jnp.int32)}, "it must be (2, 8)"),
        ({"segment_ids": jnp.ones((2, 8))}, "cast it to integers"),
        ({"implementation": "mosaic_gpu"}, "needs gpu"),
    ],
)
def test_bad_arguments_are_told_in_one_line(change, told):
    given = {"x": jnp.ones((2, 8, 2, 4)), "weight": jnp.ones((2, 4, 4))} | change
    with pytest.raises(ValueError) as error:
        explain(**given)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_its_benchmark_runs(tmp_path):
    out = tmp_path / "x.json"
    flags = ["--op=short_convolution", f"--out={out}", "--cases=debug", "--repeats=1"]
    assert bench.main(flags) == 0
    assert '"contestant": "jax.lax:convolution"' in out.read_text()
