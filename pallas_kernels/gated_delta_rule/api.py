"""The gated delta rule: one function, several implementations."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._core import dispatch, recurrence
from pallas_kernels.gated_delta_rule.support import TABLE


def gated_delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T N V"],
    g: Float[Array, "B T N"] | Float[Array, "B T N K"] | None,
    beta: Float[Array, "B T N"],
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B N K V"] | None = None,
    output_final_state: bool = False,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | tuple[str, ...] = "auto",
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"] | None]:
    """S = exp(g_t) S; S += k_t (beta_t (v_t - S^T k_t))^T; o_t = scale S^T q_t; `ref` defines it.

    q, k: H heads; v, g, beta: N, a multiple of H (value head n reads query and key head
    n // (N / H)). Keys should have norm 1, and beta lie in [0, 2], or the state may grow.
    g: natural logarithm of the decay, at most 0; one a head (Gated DeltaNet), or one a key feature
    (Kimi delta attention); None: no decay (DeltaNet).
    scale: of q; None: K ** -0.5.
    initial_state: of the row's first document; None: zeros. The final state is of its last.
    segment_ids: document of each token; each starts from zeros; 0 is padding and changes nothing.
    implementation: "auto", a name, or names in order of preference; `explain` tells the choice.
    Returns (o in the dtype of v, fp32 final state or None). Differentiable in q, k, v, g, beta and
    initial_state, also from the final state. ValueError for shapes, dtypes and decays that do not
    fit, and for an implementation that cannot run here.
    """
    choice = explain(
        q, k, v, g, beta, initial_state=initial_state, segment_ids=segment_ids,
        implementation=implementation,
    )  # fmt: skip
    q, k, v, g, beta, initial_state, segment_ids = recurrence.alike(
        q, k, v, g, beta, initial_state, segment_ids
    )
    o, final_state = choice.implementation.load()(
        q, k, v, None if g is None else g.astype(jnp.float32), beta.astype(jnp.float32),
        scale=recurrence.number("gated_delta_rule", scale, q.shape[-1]),
        initial_state=initial_state,
        documents=None if segment_ids is None else recurrence.documents(segment_ids),
    )  # fmt: skip
    return o.astype(v.dtype), final_state if output_final_state else None


def explain(
    q, k, v, g, beta, *, initial_state=None, segment_ids=None, implementation="auto"
) -> dispatch.Choice:
    """Which implementation `gated_delta_rule` takes for these arguments, and why not the others.

    Arrays may be jax.ShapeDtypeStruct. `str()` of the result is one line for people.
    """
    recurrence.check("gated_delta_rule", q, k, v, g, initial_state, segment_ids, beta=beta)
    facts = recurrence.facts(q, v, g, segment_ids)
    return dispatch.choose("gated_delta_rule", TABLE, facts, implementation)
