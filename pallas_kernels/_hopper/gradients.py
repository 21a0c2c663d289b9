"""Gradients of a chunk's queries, keys, values and gates on Hopper, all chunks at once.

Three warpgroups share the tiles of a chunk: one for the queries, one for the keys, and one for the
values or, with the delta rule, whose values' gradient is known already, for the inverse.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._hopper.tiles import (
    CHUNK,
    DOWN,
    MATRIX,
    SQUARE,
    TILE,
    across,
    down,
    exp_where,
    places,
    product,
    tiles,
)

PROGRAMS = 132  # multiprocessors of an H100 or H200; each program takes chunk after chunk

# Vectors from which the gradients of the decays are put together, see `combine`.
QUERY, KEY, BEFORE, AFTER, FROM_STATE, FROM_CHUNK = range(6)


def combine(dots, chunks):
    """Gradient of the log decay [B, N, T] from the vectors of `gradients`.

    The decay between two tokens of a chunk is exp(G_i - G_j), so G_i gets q_i dq_i - k_i dk_i, and
    2 s_i where the delta rule takes s_i from the state. All decays of the chunk get the product of
    the state after it with its gradient. A sum from the end makes the gradient of g of that of G.
    """
    B, N, count, T = dots.shape
    dots = jnp.moveaxis(dots.reshape(B, N, count, chunks, -1), 2, 0)
    local = dots[QUERY] - dots[KEY]
    if count > FROM_STATE:
        local = local + 2.0 * (dots[FROM_STATE] + dots[FROM_CHUNK])
    total = jnp.sum(dots[BEFORE] + dots[AFTER], axis=-1, keepdims=True)
    later = jnp.tril(jnp.ones((CHUNK, CHUNK), jnp.float32))
    from_end = jnp.einsum("bncs,st->bnct", local, later, precision="highest")
    return (from_end + total).reshape(B, N, T)


@functools.partial(jax.jit, static_argnames="scale")
def gradients(q, k, values, d_out, d_v, states, d_states, summed, gates, beta, documents, *, scale):
    """(d_q, d_k [B, T, N, K], d_v or d_beta, dots fp32 [B, N, 4 or 6, T]) of every chunk.

    values [B, T, N, V]: what was written into the state. d_v, beta: with the delta rule alone,
    which gives d_beta fp32 [B, N, T]; without it the result has d_v instead. states, d_states
    [B, N, T/64, V, K] before and after each chunk; summed, gates from `prepare`.
    """
    B, T, H, K = q.shape
    N, V = values.shape[2:]
    chunks, dtype = T // CHUNK, q.dtype
    delta = d_v is not None
    shared, parts = N // H, V // TILE

    total = B * N * chunks
    programs = min(PROGRAMS, total)

    def kernel(*refs):
        refs = iter(refs)
        inputs = [next(refs) for _ in range(8)]
        q_ref, k_ref, values_ref, d_out_ref, states_ref, d_states_ref, summed_ref, gates_ref = (
            inputs
        )
        d_v_ref, beta_ref = (next(refs) if delta else None for _ in range(2))
        documents_ref = next(refs) if documents is not None else None
        d_q_ref, d_k_ref, dots_ref, last_ref = (next(refs) for _ in range(4))

        def body(
            q_s, k_s, summed_s, gates_s, beta_s, documents_s,
            values_s, d_out_s, states_s, d_states_s, d_v_s, third_s, out_s,
            tokens_ready, tokens_free, part_ready, part_free, third_ready,
        ):  # fmt: skip
            me, program = lax.axis_index("wg"), lax.axis_index("program")
            count = (total - program + programs - 1) // programs
            i, j = places()

            class Item:
                """One chunk of one value head."""

                def __init__(self, step):
                    item = program + step * programs
                    row, self.chunk = item // chunks, lax.rem(item, chunks)
                    self.batch, self.n = row // N, lax.rem(row, N)
                    self.head = self.n // shared
                    self.tokens = pl.ds(self.chunk * CHUNK, CHUNK)
                    self.place = (self.batch, self.n, self.chunk)

                def decay(self, transposed=False, strict=False):
                    """exp(G_i - G_j) for j <= i of one document, or its transpose."""
                    difference = down(summed_s) - across(summed_s)
                    low, high = (j, i) if transposed else (i, j)
                    keep = low > high if strict else low >= high
                    if documents is not None:
                        keep = keep & (down(documents_s) == across(documents_s))
                    return exp_where(keep, -difference if transposed else difference)

                def gate(self, which, columns):
                    return down(gates_s.at[which], columns)

                def put_dot(self, which, vector):
                    dots_ref[self.batch, self.n, which, self.tokens] = vector

                def finish(self, result, target_ref, place):
                    """Copy [C, K] to the output, through shared memory."""
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out_s.at[place][...] = result.astype(dtype)
                    plgpu.commit_smem()
                    target = target_ref.at[self.batch, self.tokens, self.n]
                    plgpu.copy_smem_to_gmem(out_s.at[place], target)

            def fetch_part(item, part):
                features, barrier = pl.ds(part * TILE, TILE), part_ready.at[part]

                def get(source, target):
                    plgpu.copy_gmem_to_smem(source, target.at[part], barrier)

                get(d_out_ref.at[item.batch, item.tokens, item.n, features], d_out_s)
                get(values_ref.at[item.batch, item.tokens, item.n, features], values_s)
                get(states_ref.at[(*item.place, features)], states_s)
                get(d_states_ref.at[(*item.place, features)], d_states_s)
                if delta:
                    get(d_v_ref.at[item.batch, item.tokens, item.n, features], d_v_s)

            def fetch_tokens(item):
                def get(source, target):
                    plgpu.copy_gmem_to_smem(source, target, tokens_ready)

                get(q_ref.at[item.batch, item.tokens, item.head], q_s)
                get(k_ref.at[item.batch, item.tokens, item.head], k_s)
                get(summed_ref.at[item.batch, item.n, item.tokens], summed_s)
                get(gates_ref.at[item.place], gates_s)
                if delta:
                    get(beta_ref.at[item.batch, item.n, item.tokens], beta_s)
                if documents is not None:
                    get(documents_ref.at[item.batch, item.tokens], documents_s)

            def rows(source):
                return plgpu.load(source, layout=MATRIX).astype(jnp.float32)

            def over_parts(products, between=None, first=True, last=True):
                """products(part) for each; its tiles are waited for first, and freed at last."""
                for part in range(parts):
                    if first:
                        plgpu.barrier_wait(part_ready.at[part])
                    issued = products(part)
                    if between is not None:
                        between(part)
                    if part and last:
                        plgpu.wgmma_wait(issued)
                        plgpu.barrier_arrive(part_free.at[part - 1])
                plgpu.wgmma_wait(0)
                if last:
                    plgpu.barrier_arrive(part_free.at[parts - 1])

            @pl.when(me == 0)
            def queries():
                if delta:
                    plgpu.set_max_registers(160, action="decrease")

                @pl.loop(0, count)
                def _(step):
                    item = Item(step)

                    def products(read, shown):
                        overlaps = []

                        def issue(part):
                            plgpu.wgmma(read, d_out_s.at[part], states_s.at[part])
                            plgpu.wgmma(shown, d_out_s.at[part], values_s.at[part].T)
                            return 2

                        def overlap(part):
                            for start in range(0, K, TILE):
                                both = (x.at[part, :, pl.ds(start, TILE)] for x in
                                        (states_s, d_states_s))  # fmt: skip
                                one, other = (rows(x) for x in both)
                                overlaps.append(jnp.sum(one * other, axis=1))

                        over_parts(issue, overlap)
                        return read[...], shown[...], sum(overlaps[1:], overlaps[0])

                    read, shown, overlap = pl.run_scoped(
                        products, plgpu.ACC((CHUNK, K), jnp.float32), plgpu.ACC(SQUARE, jnp.float32)
                    )
                    plgpu.barrier_wait(tokens_ready)
                    item.put_dot(BEFORE, overlap * gates_s[0, CHUNK - 1])
                    d_scores = (shown * item.decay() * scale).astype(dtype)

                    def update(accumulator):
                        plgpu.wgmma(accumulator, d_scores, k_s)

                    d_q = pl.run_state(update)(plgpu.ACC.init(read * item.gate(0, K) * scale))
                    item.put_dot(QUERY, jnp.sum(d_q * rows(q_s), axis=1))
                    plgpu.barrier_arrive(tokens_free)
                    item.finish(d_q, d_q_ref, 0)

                plgpu.wait_smem_to_gmem(0)

            @pl.when(me == 1)
            def keys():
                if delta:
                    plgpu.set_max_registers(192, action="increase")

                @pl.loop(0, count)
                def _(step):
                    item = Item(step)

                    # In two turns: with all three at once registers do not suffice, and the
                    # compiler would wait for each matrix product before it issues the next.
                    def earlier(shown, *replaced):
                        def issue(part):
                            plgpu.wgmma(shown, values_s.at[part], d_out_s.at[part].T)
                            if delta:
                                plgpu.wgmma(replaced[0], d_v_s.at[part], states_s.at[part])
                            return 1 + delta

                        over_parts(issue, last=False)
                        return [x[...] for x in (shown, *replaced)]

                    def later(written):
                        def issue(part):
                            plgpu.wgmma(written, values_s.at[part], d_states_s.at[part])
                            return 1

                        over_parts(issue, first=False)
                        return written[...]

                    wide = plgpu.ACC((CHUNK, K), jnp.float32)
                    shown, *replaced = pl.run_scoped(
                        earlier, plgpu.ACC(SQUARE, jnp.float32), *[wide] * delta
                    )
                    plgpu.barrier_wait(tokens_ready)
                    d_scores = (shown * item.decay(transposed=True) * scale).astype(dtype)
                    if delta:
                        taken = replaced[0] * item.gate(0, K)
                        item.put_dot(FROM_STATE, -jnp.sum(taken * rows(k_s), axis=1))
                    d_k = pl.run_scoped(later, wide) * item.gate(1, K)
                    item.put_dot(AFTER, jnp.sum(d_k * rows(k_s), axis=1))
                    if delta:
                        d_k = d_k - taken
                        plgpu.barrier_wait(third_ready)

                    def update(accumulator):
                        plgpu.wgmma(accumulator, d_scores, q_s)
                        if delta:
                            plgpu.wgmma(accumulator, third_s, k_s)

                    d_k = pl.run_state(update)(plgpu.ACC.init(d_k))
                    item.put_dot(KEY, jnp.sum(d_k * rows(k_s), axis=1))
                    plgpu.barrier_arrive(tokens_free)
                    item.finish(d_k, d_k_ref, 1)

                plgpu.wait_smem_to_gmem(0)

            def third():
                if delta:
                    plgpu.set_max_registers(152, action="decrease")
                first = Item(0)
                fetch_tokens(first)
                for part in range(parts):
                    fetch_part(first, part)

                @pl.loop(0, count)
                def _(step):
                    item, following = Item(step), Item(step + 1)

                    @pl.when(step > 0)
                    def _():
                        plgpu.barrier_wait(tokens_free)
                        fetch_tokens(item)

                    finish = (of_inverse if delta else of_values)(item)

                    @pl.when(step + 1 < count)
                    def _():
                        for part in range(parts):
                            plgpu.barrier_wait(part_free.at[part])
                            fetch_part(following, part)

                    finish()

                plgpu.wait_smem_to_gmem(0)

            def of_inverse(item):
                """Gradient of k_i . k_j through the inverse, and d_beta from its diagonal."""

                def products(lower, upper):
                    def issue(part):
                        plgpu.wgmma(lower, d_v_s.at[part], values_s.at[part].T)
                        plgpu.wgmma(upper, values_s.at[part], d_v_s.at[part].T)
                        return 2

                    over_parts(issue)
                    return lower[...], upper[...]

                square = plgpu.ACC(SQUARE, jnp.float32)
                lower, upper = pl.run_scoped(products, square, square)
                plgpu.barrier_wait(tokens_ready)
                weight = plgpu.load(beta_s, layout=DOWN, optimized=False)
                diagonal = jnp.sum(jnp.where(i == j, lower, 0.0), axis=1)
                last_ref[item.batch, item.n, item.tokens] = diagonal / (weight * weight)
                lower = -lower * item.decay(strict=True)
                upper = -upper * item.decay(transposed=True, strict=True)
                third_s[...] = (lower + upper).astype(dtype)
                plgpu.commit_smem()
                plgpu.barrier_arrive(third_ready)

                def finish():
                    item.put_dot(FROM_CHUNK, jnp.sum(lower * product(k_s, k_s.T), axis=1))
                    plgpu.barrier_arrive(tokens_free)

                return finish

            def of_values(item):
                """Gradient of the values: from the state after the chunk, and from its queries."""
                plgpu.barrier_wait(tokens_ready)
                scores = product(k_s, q_s.T) * item.decay(transposed=True) * scale
                scores = scores.astype(dtype)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for part in range(parts):
                    plgpu.barrier_wait(part_ready.at[part])
                    kept = product(k_s, d_states_s.at[part].T, (CHUNK, TILE)) * item.gate(1, TILE)

                    def update(accumulator, part=part):
                        plgpu.wgmma(accumulator, scores, d_out_s.at[part])

                    d_value = pl.run_state(update)(plgpu.ACC.init(kept))
                    plgpu.barrier_arrive(part_free.at[part])
                    third_s.at[part][...] = d_value.astype(dtype)
                plgpu.barrier_arrive(tokens_free)
                plgpu.commit_smem()
                for part in range(parts):
                    features = pl.ds(part * TILE, TILE)
                    target = last_ref.at[item.batch, item.tokens, item.n, features]
                    plgpu.copy_smem_to_gmem(third_s.at[part], target)
                return lambda: None

            pl.when(me == 2)(third)

        operand, part = tiles((CHUNK, K), dtype), tiles((parts, CHUNK, TILE), dtype)
        state, vector = tiles((parts, TILE, K), dtype), plgpu.SMEM((CHUNK,), jnp.float32)
        pl.run_scoped(
            body,
            operand,
            operand,
            vector,
            plgpu.SMEM((2, CHUNK), jnp.float32),
            vector if delta else None,
            plgpu.SMEM((CHUNK,), jnp.int32) if documents is not None else None,
            part,
            part,
            state,
            state,
            part if delta else None,
            tiles(SQUARE, dtype) if delta else part,
            tiles((2, CHUNK, K), dtype),
            plgpu.Barrier(num_arrivals=4 + delta + (documents is not None)),
            plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier(num_arrivals=4 + delta, num_barriers=parts),
            plgpu.Barrier(num_arrivals=3, num_barriers=parts),
            plgpu.Barrier(num_arrivals=1),
            collective_axes="wg",
        )

    queries = jax.ShapeDtypeStruct((B, T, N, K), dtype)
    last = jax.ShapeDtypeStruct((B, N, T), jnp.float32) if delta else values
    operands = [q, k, values, d_out, states, d_states, summed, gates]
    operands += [d_v, beta] * delta + [documents] * (documents is not None)
    d_q, d_k, dots, last = plgpu.kernel(
        kernel,
        out_type=[
            queries,
            queries,
            jax.ShapeDtypeStruct((B, N, 4 + 2 * delta, T), jnp.float32),
            jax.ShapeDtypeStruct(last.shape, last.dtype),
        ],
        grid=(programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*operands)
    return d_q, d_k, last, dots
