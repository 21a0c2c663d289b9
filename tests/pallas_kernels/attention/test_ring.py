"""Ring attention on eight devices: equal to attention on one, linear in memory, balanced."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from efficient_lm import masks
from pallas_kernels._core.compat import tpu_devices
from pallas_kernels._core.testing import errors_against
from pallas_kernels.attention import attention, ring
from pallas_kernels.attention.ring import ring_attention
from pallas_kernels.attention.tile import merge

T = 64
SEGMENTS = jnp.array(
    [[1] * 13 + [2] * 30 + [3] * 21, [1] * 64, [1] * 7 + [0] * 10 + [2] * 47], jnp.int32
)
CAUSAL = masks.Causal()
# name: (mask, devices, key heads, sinks, soft-cap)
CASES = {
    "one_device": (CAUSAL & masks.Segments(SEGMENTS), 1, 2, True, 2.0),
    "causal_2": (CAUSAL, 2, 4, False, None),
    "causal_4_multi_query": (CAUSAL, 4, 1, True, None),
    "causal_8_grouped": (CAUSAL, 8, 2, True, 1.5),
    "segments_2": (CAUSAL & masks.Segments(SEGMENTS), 2, 2, False, None),
    "segments_8": (CAUSAL & masks.Segments(SEGMENTS), 8, 2, True, None),
    "full_4": (masks.Full(), 4, 2, True, None),
    "full_segments_8": (masks.Segments(SEGMENTS), 8, 2, False, 2.0),
    "window_of_one_token": (masks.SlidingWindow(1), 4, 2, True, None),
    "window_in_two_shards_8": (masks.SlidingWindow(6) & masks.Segments(SEGMENTS), 8, 2, True, None),
    "window_of_one_shard": (masks.SlidingWindow(17), 4, 2, False, None),
    "window_in_four_shards_8": (masks.SlidingWindow(20), 8, 2, False, None),
    "window_of_nearly_all": (masks.SlidingWindow(60), 4, 2, False, None),
    "prefix_4": (masks.PrefixLM(jnp.array([5, 40, 0], jnp.int32)), 4, 2, False, None),
    "blocks_that_divide_no_shard": (masks.BlockCausal(7), 8, 2, False, None),
    "blocks_that_divide_shards": (masks.BlockDiagonal(8) & CAUSAL, 4, 2, False, None),
}


def ring_mesh(devices):
    return Mesh(np.array(jax.devices()[:devices]), ("ring",))


def sharded(devices, mask, **options):
    """Ring attention of whole arrays (q, k, v, sinks) on so many devices."""
    tokens, whole = PartitionSpec(None, "ring"), PartitionSpec()

    def local(q, k, v, sinks, mask):
        return ring_attention(q, k, v, mask=mask, sinks=sinks, axis_name="ring", **options)

    specs = jax.tree.map(lambda array: tokens if array.ndim == 2 else whole, mask)
    run = jax.shard_map(
        local,
        mesh=ring_mesh(devices),
        in_specs=(tokens, tokens, tokens, whole, specs),
        out_specs=tokens,
        check_vma=False,
    )
    return lambda q, k, v, sinks=None: run(q, k, v, sinks, mask)


def inputs(B=3, N=4, K=2, H=8, T=T, sinks=False, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    q, cotangent = (jax.random.normal(key, (B, T, N, H), dtype) for key in keys[:2])
    k, v = (jax.random.normal(key, (B, T, K, H), dtype) for key in keys[2:4])
    sinks = jax.random.normal(keys[4], (N,)) if sinks else None
    return {"q": q, "k": k, "v": v, "sinks": sinks}, cotangent


@pytest.mark.parametrize("case", CASES)
def test_equals_attention_on_one_device(case):
    """Values and every gradient; an odd batch, documents and padding that begin within chunks."""
    mask, devices, K, sinks, soft_cap = CASES[case]
    arguments, cotangent = inputs(K=K, sinks=sinks)
    options = {"mask": mask.lower(), "soft_cap": soft_cap, "implementation": "ref"}
    whole = functools.partial(attention, **options)
    options["implementation"] = "xla"
    errors = errors_against(whole, sharded(devices, **options), arguments, cotangent)
    assert max(errors.values()) < 1e-5, errors


def test_bfloat16_is_as_near_as_attention_on_one_device():
    """Merging in fp32 costs nothing."""
    arguments, cotangent = inputs(dtype=jnp.bfloat16, H=32)
    options = {"mask": CAUSAL.lower(), "implementation": "xla"}
    reference = functools.partial(attention, mask=CAUSAL.lower(), implementation="ref")
    one = errors_against(reference, functools.partial(attention, **options), arguments, cotangent)
    four = errors_against(reference, sharded(4, **options), arguments, cotangent)
    assert all(four[name] < 1.5 * one[name] for name in one), (four, one)


def test_merge_of_nothing_is_nothing():
    """Zeros, and no NaN, where neither part has a key."""
    out, lse = jnp.ones((3, 2)), jnp.array([0.0, -jnp.inf, -jnp.inf])
    empty = jnp.zeros((3, 2)), jnp.array([-jnp.inf, 1.0, -jnp.inf])
    merged, total = merge((jnp.where(lse[:, None] == 0, out, 0.0), lse), empty)
    np.testing.assert_array_equal(merged, [[1, 1], [0, 0], [0, 0]])
    np.testing.assert_array_equal(total, [0.0, 1.0, -jnp.inf])


@pytest.mark.parametrize("devices", [2, 8])
def test_zigzag_puts_chunks_where_it_says(devices):
    tokens = jnp.arange(4 * devices)[None]
    mesh, spec = ring_mesh(devices), PartitionSpec(None, "ring")

    def there_and_back(tokens):
        parts = ring._to_zigzag("ring", devices, tokens)
        return parts[:, 0], ring._from_zigzag("ring", devices, parts)

    run = jax.shard_map(there_and_back, mesh=mesh, in_specs=spec, out_specs=(spec, spec))
    parts, back = run(tokens)
    np.testing.assert_array_equal(back, tokens)
    for rank in range(devices):
        chunks = parts[:, 2 * rank : 2 * rank + 2] // 2
        np.testing.assert_array_equal(chunks[:, 0], [rank, 2 * devices - 1 - rank])


def test_memory_is_linear_in_the_length_of_a_shard():
    def temporary_bytes(devices, T):
        run = sharded(devices, CAUSAL.lower())
        place = jax.NamedSharding(ring_mesh(devices), PartitionSpec(None, "ring"))
        q, k = (
            jax.ShapeDtypeStruct((1, T, heads, 16), jnp.float32, sharding=place) for heads in (4, 2)
        )
        step = jax.jit(jax.grad(lambda *arrays: run(*arrays).sum(), (0, 1, 2)))
        return step.lower(q, k, k).compile().memory_analysis().temp_size_in_bytes

    sizes = {
        (devices, T): temporary_bytes(devices, T)
        for devices, T in ((4, 2**15), (4, 2**16), (8, 2**16))
    }
    assert sizes[4, 2**16] < 2.1 * sizes[4, 2**15], sizes
    assert sizes[8, 2**16] < 1.1 * sizes[4, 2**15], sizes
    assert sizes[4, 2**15] < 4 * (2**15 // 4) ** 2, sizes  # one head's scores within a shard


def test_only_inputs_output_and_log_sum_exp_are_kept():
    """Nothing of the hops, also under a policy that keeps what kernels name "attention"."""
    arguments, _ = inputs(T=128)
    run = sharded(4, CAUSAL.lower())
    policy = jax.checkpoint_policies.save_only_these_names("attention")
    for function, copies in ((run, 4), (jax.checkpoint(run, policy=policy), 4)):
        _, pull = jax.eval_shape(
            lambda q, k, v, function=function: jax.vjp(function, q, k, v),
            arguments["q"], arguments["k"], arguments["v"],
        )  # fmt: skip
        elements = sum(leaf.size for leaf in jax.tree.leaves(pull))
        size = arguments["q"].size  # q, out; k and v at half the heads; lse at 1 / H
        assert elements <= (copies - 1) * size + size / 8 + 100, (elements / size, copies)


def equations(jaxpr, times=1):
    """(equation, how often it runs) of a jaxpr and those inside it."""
    for equation in jaxpr.eqns:
        yield equation, times
        inner = times * equation.params.get("length", 1)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield from equations(value, inner)


def work_of_a_device(devices, mask=CAUSAL, T=512, gradient=False):
    """(FLOPs of products, bytes sent) of one device for B = 1, N = 4, K = 2, H = 8, fp32."""
    run = sharded(devices, mask.lower(), implementation="xla")
    function = jax.grad(lambda *a: run(*a).sum(), (0, 1, 2)) if gradient else run
    arguments, _ = inputs(B=1, T=T)
    jaxpr = jax.make_jaxpr(function)(*(arguments[name] for name in "qkv"))
    flops = sent = 0
    for equation, times in equations(jaxpr.jaxpr):
        if equation.primitive.name == "ppermute":
            sent += times * sum(4 * variable.aval.size for variable in equation.invars)
        if equation.primitive.name == "dot_general":
            left = equation.invars[0].aval
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = np.prod([left.shape[axis] for axis in contracted])
            flops += 2 * times * equation.outvars[0].aval.size * depth
    return flops, sent


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_bytes_sent(devices):
    """Keys and values at their own few heads, R - 1 times; their gradients come home in R."""
    token = 4 * 512 // devices * 8  # bytes of one head of a shard
    zigzag = (4 + 2 * 2 + 4) * token  # q, k, v there, the output back
    lap = 2 * 2 * token
    assert work_of_a_device(devices)[1] == zigzag + (devices - 1) * lap
    both = 2 * zigzag + 2 * (devices - 1) * lap + devices * lap
    assert work_of_a_device(devices, gradient=True)[1] == both
    assert work_of_a_device(devices, masks.Full())[1] == (devices - 1) * lap
    assert work_of_a_device(devices, masks.SlidingWindow(10))[1] == lap  # one neighbour


def test_a_causal_mask_costs_every_device_half():
    """2R + 1 of 4R blocks (two of them diagonal), the same for all as the program is."""
    for gradient in (False, True):
        for devices in (4, 8):
            half = work_of_a_device(devices, gradient=gradient)[0]
            whole = work_of_a_device(devices, masks.Full(), gradient=gradient)[0]
            assert half / whole <= (2 * devices + 1) / (4 * devices), (devices, half / whole)


def test_a_window_costs_no_more_than_its_corner_of_the_next_shard():
    flops = 4 * 4 * 8  # of a pair of tokens
    assert work_of_a_device(8, masks.SlidingWindow(17))[0] <= flops * (64 * 64 + 16 * 16)


def test_heads_may_be_split_over_another_axis():
    """As after the all-to-all of Ulysses; the gradients of sinks are of their own heads."""
    arguments, cotangent = inputs(sinks=True)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("ring", "sequence"))
    split, heads = PartitionSpec(None, "ring", "sequence"), PartitionSpec("sequence")

    def local(q, k, v, sinks):
        return ring_attention(q, k, v, mask=CAUSAL.lower(), sinks=sinks, axis_name="ring")

    run = jax.shard_map(
        local, mesh=mesh, in_specs=(split, split, split, heads), out_specs=split, check_vma=False
    )
    whole = functools.partial(attention, mask=CAUSAL.lower(), implementation="ref")
    positional = lambda q, k, v, sinks: run(q, k, v, sinks)  # noqa: E731
    errors = errors_against(whole, positional, arguments, cotangent)
    assert max(errors.values()) < 1e-5, errors


def test_users_errors_are_one_line():
    arguments, _ = inputs(T=60)
    q, k, v = arguments["q"], arguments["k"], arguments["v"]
    with pytest.raises(
        ValueError, match=r"a length of 60 over 4 devices; .* a multiple of 8, such"
    ):
        sharded(4, CAUSAL.lower())(q, k, v)
    indexed = CAUSAL.lower(key_index=jnp.zeros((1, 60), jnp.int32))
    with pytest.raises(ValueError, match="the mask has index arrays"):
        sharded(4, indexed)(q, k, v)


def test_tpu_chips_compute_while_keys_travel():
    """Compiled for four chips: every send within a loop begins before its kernels and ends after.

    Both directions take splash, which sees only causal and full masks.
    """
    mesh = Mesh(np.array(tpu_devices("v5e:2x2")), ("ring",))
    tokens = PartitionSpec(None, "ring")
    run = jax.shard_map(
        functools.partial(ring_attention, mask=CAUSAL.lower(), axis_name="ring"),
        mesh=mesh, in_specs=(tokens,) * 3, out_specs=tokens, check_vma=False,
    )  # fmt: skip
    place = jax.NamedSharding(mesh, tokens)
    q, k = (
        jax.ShapeDtypeStruct((1, 1024, heads, 64), jnp.bfloat16, sharding=place) for heads in (2, 1)
    )
    step = jax.jit(jax.grad(lambda *a: run(*a).astype(jnp.float32).sum(), (0, 1, 2)))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = step.lower(q, k, k).compile().as_text()
    loops = [part for part in text.split("\n\n") if "collective-permute-start(" in part]
    loops = [part for part in loops if not part.startswith("ENTRY")]
    assert len(loops) == 2, [part[:80] for part in loops]
    for loop in loops:
        events = [
            name
            for line in loop.splitlines()
            for name in ("collective-permute-start(", "collective-permute-done(", "tpu_custom_call")
            if name in line
        ]
        order = [next(group) for _, group in itertools.groupby(events)]
        assert order == list(dict.fromkeys(order)), order  # all starts, all kernels, all ends
        assert order[1] == "tpu_custom_call"
