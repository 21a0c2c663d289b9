"""Linear attention with a decay: one function, several implementations."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._core import dispatch, recurrence
from pallas_kernels.gated_linear_attention.support import TABLE


def gated_linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T N V"],
    g: Float[Array, "B T N"] | Float[Array, "B T N K"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B N K V"] | None = None,
    output_final_state: bool = False,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | tuple[str, ...] = "auto",
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"] | None]:
    """S_t = exp(g_t) S_(t-1) + k_t v_t^T, o_t = scale S_t^T q_t; `ref` is its definition.

    q, k: H heads; v and g: N, a multiple of H (value head n reads query and key head n // (N / H)).
    g: natural logarithm of the decay, at most 0; one a head, or one a key feature; None: no decay.
    scale: of q; None: K ** -0.5.
    initial_state: of the row's first document; None: zeros. The final state is of its last.
    segment_ids: document of each token; each starts from zeros; 0 is padding and changes nothing.
    implementation: "auto", a name, or names in order of preference; `explain` tells the choice.
    Returns (o in the dtype of v, fp32 final state or None). Differentiable in q, k, v, g and
    initial_state, also from the final state. ValueError for shapes, dtypes and decays that do not
    fit, and for an implementation that cannot run here.
    """
    choice = explain(
        q, k, v, g, initial_state=initial_state, segment_ids=segment_ids,
        implementation=implementation,
    )  # fmt: skip
    q, k, v, g, initial_state, segment_ids = recurrence.alike(
        q, k, v, g, initial_state, segment_ids
    )
    o, final_state = choice.implementation.load()(
        q, k, v, None if g is None else g.astype(jnp.float32),
        scale=recurrence.number("gated_linear_attention", scale, q.shape[-1]),
        initial_state=initial_state,
        documents=None if segment_ids is None else recurrence.documents(segment_ids),
    )  # fmt: skip
    return o.astype(v.dtype), final_state if output_final_state else None


def explain(
    q, k, v, g=None, *, initial_state=None, segment_ids=None, implementation="auto"
) -> dispatch.Choice:
    """Which implementation `gated_linear_attention` takes for these arguments, and why.

    Arrays may be jax.ShapeDtypeStruct. `str()` of the result is one line for people.
    """
    recurrence.check("gated_linear_attention", q, k, v, g, initial_state, segment_ids)
    facts = recurrence.facts(q, v, g, segment_ids)
    return dispatch.choose("gated_linear_attention", TABLE, facts, implementation)
