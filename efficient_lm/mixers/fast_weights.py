"""Fast weights: a small network for each head, trained on the tokens of a row, chunk by chunk.

Every chunk of C tokens of a document is read with the weights that the chunks before it left
(apply, then update: LaCT, arXiv 2505.23884; arXiv 2602.21204). Arrays are [B, C, N, ...] for the
tokens of a chunk and [B, N, input, output] for weights.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Weights = dict[
    str, Array
]  # "last" [.., N, Dh, Dv]; of gated features also "in", "gate" [.., Dk, Dh]
MUON = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


@dataclass(frozen=True)
class Rule:
    """How the weights learn; each of the first six switched off simplifies the ones before it."""

    update: Literal["all", "last"] = "all"  # matrices that are trained
    weight_norm: bool = True  # keep the norm of each output unit
    features: Literal["gated", "identity"] = "gated"  # of a key: silu(k W_in) * (k W_gate), or k
    learned_rate: bool = True  # a rate for each token and matrix; False: 1
    momentum: bool = True  # of the updates, by a learned share of the one before
    orthogonalize: bool = True  # updates, by Newton-Schulz iterations (Muon)
    direction: Literal["descent", "ascent"] = "descent"  # of the gradient
    inner_steps: int = 1  # updates a chunk, each from the weights that the last one left

    @property
    def is_linear(self) -> bool:
        """The weights after all chunks are a sum that needs no order: linear attention."""
        return self.update == "last" and not self.weight_norm and self.inner_steps == 1


class Chunk(NamedTuple):
    """What the weights learn from. rate: for W_in, W_last, W_gate; the last alone; or None."""

    key: Float[Array, "B C N Dk"]
    value: Float[Array, "B C N Dv"]
    rate: Float[Array, "B C N R"] | None
    share: Float[Array, "B C N"] | None  # of the momentum that is kept, averaged over the chunk


def product(form: str, x: Array, weight: Array) -> Array:
    """einsum in the dtype of x; a batch axis of x, and of the weight where it has one, is added."""
    tokens, matrix, out = form.replace("->", ",").split(",")
    batch = "b" if weight.ndim == 4 else ""
    return jnp.einsum(f"b{tokens},{batch}{matrix}->b{out}", x, weight.astype(x.dtype))


def outer(x: Float[Array, "B C N I"], y: Float[Array, "B C N O"]) -> Float[Array, "B N I O"]:
    """Sums over the chunk of x y^T for each head, in fp32 or wider."""
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    return jnp.einsum("bcni,bcno->bnio", x, y, preferred_element_type=wide)


def hidden(weights: Weights, x: Float[Array, "... C N Dk"]) -> Float[Array, "... C N Dh"]:
    """What the last matrix maps: silu(x W_in) * (x W_gate), or x itself."""
    if "in" not in weights:
        return x
    z, u = (product("cnk,nkh->cnh", x, weights[name]) for name in ("in", "gate"))
    return jax.nn.silu(z) * u


def apply(weights: Weights, x: Float[Array, "B C N Dk"]) -> Float[Array, "B C N Dv"]:
    """The network of each head."""
    return product("cnh,nhv->cnv", hidden(weights, x), weights["last"])


def gradients(rule: Rule, weights: Weights, chunk: Chunk) -> Weights:
    """-dL/dW of L = -sum_t rate_t <f(k_t), v_t>, the rate being that of each matrix."""
    key, value = chunk.key, chunk.value

    def weighed(x, place):
        if chunk.rate is None:
            return x
        return (x.astype(chunk.rate.dtype) * chunk.rate[..., place, None]).astype(x.dtype)

    h = hidden(weights, key)
    if rule.update == "last":
        return {"last": outer(weighed(h, 0), value)}
    z, u = (product("cnk,nkh->cnh", key, weights[name]) for name in ("in", "gate"))
    dh = product("cnv,nhv->cnh", value, weights["last"])
    gate = jax.nn.sigmoid(z)
    return {
        "in": outer(weighed(key, 0), dh * u * gate * (1.0 + z * (1.0 - gate))),
        "last": outer(weighed(h, 1), value),
        "gate": outer(weighed(key, 2), dh * jax.nn.silu(z)),
    }


def orthogonal(x: Float[Array, "... I O"], dtype) -> Float[Array, "... I O"]:
    """Five Newton-Schulz iterations in `dtype` towards the nearest orthogonal matrix; 0 stays 0."""
    y = x * jax.lax.rsqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True) + 1e-14)
    wide = y.dtype
    y = (y if x.shape[-2] <= x.shape[-1] else jnp.swapaxes(y, -2, -1)).astype(dtype)
    for a, b, c in MUON:
        gram = jnp.einsum("...io,...jo->...ij", y, y)
        y = a * y + (b * gram + c * gram @ gram) @ y
    return (y if x.shape[-2] <= x.shape[-1] else jnp.swapaxes(y, -2, -1)).astype(wide)


def unit_norms(weight: Float[Array, "... I O"]) -> Float[Array, "... 1 O"]:
    """L2 norm of the inputs of each output unit."""
    return jnp.sqrt(jnp.sum(weight * weight, axis=-2, keepdims=True) + 1e-24)


def learn(
    rule: Rule, initial: Weights, weights: Weights, momentum: Weights, chunk: Chunk
) -> tuple[Weights, Weights]:
    """(weights, momentum) after a chunk. initial: [N, ...], whose norms the weights keep."""
    sign = 1.0 if rule.direction == "descent" else -1.0
    for _ in range(rule.inner_steps):
        updates = gradients(rule, weights, chunk)
        if rule.momentum:
            share = jnp.mean(chunk.share, axis=1)[..., None, None]
            updates = {name: x + share * momentum[name] for name, x in updates.items()}
            momentum = updates
        if rule.orthogonalize:
            updates = {name: orthogonal(x, chunk.key.dtype) for name, x in updates.items()}
        new = {name: weights[name] + sign * x for name, x in updates.items()}
        if rule.weight_norm:
            new = {
                name: x / (unit_norms(x) + 1e-5) * unit_norms(initial[name])[None]
                for name, x in new.items()
            }
        weights = weights | new
    return weights, momentum


class Steps(NamedTuple):
    """M chunks of each row in order, and what is read after each.

    chunks: arrays [B, M, C, ...]. queries: [B, M, C, N, Dk]. valid: chunks that count, those before
    the rest; fresh: those whose document starts anew.
    """

    chunks: Chunk
    queries: Array
    valid: Bool[Array, "B M"]
    fresh: Bool[Array, "B M"]


class Learned(NamedTuple):
    """What a document's tokens changed: the weights, and the updates that momentum remembers."""

    changes: Weights
    momentum: Weights


def trained(rule: Rule, initial: Weights) -> Weights:
    """Those of the matrices that are updated."""
    return {"last": initial["last"]} if rule.update == "last" else initial


def nothing_learned(rule: Rule, initial: Weights, batch: int) -> Learned:
    """Zeros for each row."""
    zeros = {n: jnp.zeros((batch, *x.shape), x.dtype) for n, x in trained(rule, initial).items()}
    return Learned(zeros, zeros if rule.momentum else {})


def one_by_one(
    rule: Rule, initial: Weights, start: Learned, steps: Steps
) -> tuple[Float[Array, "B M C N Dv"], Learned]:
    """(what the queries of each step read after its update, what was learned at the end)."""
    zero = jax.tree.map(jnp.zeros_like, start)

    def choose(condition, new, old):
        return jax.tree.map(lambda n, o: jnp.where(condition[:, None, None, None], n, o), new, old)

    @jax.checkpoint
    def step(learned, inputs):
        chunk, query, valid, fresh = inputs
        changes, momentum = before = choose(fresh, zero, learned)
        weights = initial | {name: initial[name][None] + x for name, x in changes.items()}
        weights, momentum = learn(rule, initial, weights, momentum, chunk)
        changes = {name: weights[name] - initial[name][None] for name in changes}
        return choose(valid, Learned(changes, momentum), before), apply(weights, query)

    inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tuple(steps))
    learned, out = jax.lax.scan(step, start, inputs)
    return jnp.moveaxis(out, 0, 1), learned


def all_at_once(
    rule: Rule, initial: Weights, start: Learned, steps: Steps
) -> tuple[Float[Array, "B M C N Dv"], Learned]:
    """As `one_by_one` for rules that are linear: sums over chunks by associative scans."""
    chunks, queries, valid, fresh = steps
    batch, count = valid.shape

    def flat(x):
        return x.reshape(batch * count, *x.shape[2:])

    updates = gradients(rule, initial, jax.tree.map(flat, chunks))["last"]
    updates = updates.reshape(batch, count, *updates.shape[1:])
    valid = valid[:, :, None, None, None]
    goes_on = ~fresh[:, :, None, None, None]

    def sums(shares, x, before):
        """x_m + shares_m (x_(m-1) + shares_(m-1) (...)), with `before` as x_(-1)."""
        x = x.at[:, 0].add(shares[:, 0] * before)

        def join(a, b):
            return a[0] * b[0], b[0] * a[1] + b[1]

        return jax.lax.associative_scan(join, (shares, x), axis=1)[1]

    one = jnp.ones((), updates.dtype)
    updates, momentum = jnp.where(valid, updates, 0.0), {}
    if rule.momentum:
        share = jnp.mean(chunks.share, axis=2)[..., None, None].astype(updates.dtype)
        share = jnp.where(valid, jnp.where(goes_on, share, 0.0), one)
        updates = sums(share, updates, start.momentum["last"])
        momentum = {"last": updates[:, -1]}
    if rule.orthogonalize:
        updates = orthogonal(updates, queries.dtype)
    sign = 1.0 if rule.direction == "descent" else -1.0
    updates = sign * jnp.where(valid, updates, 0.0)
    changes = sums(jnp.where(goes_on, one, 0.0), updates, start.changes["last"])
    weights = initial | {"last": flat(initial["last"][None, None] + changes)}
    out = apply(weights, flat(queries))
    out = out.reshape(batch, count, *out.shape[1:])
    return out, Learned({"last": changes[:, -1]}, momentum)
