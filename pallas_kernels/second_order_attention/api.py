"""Second-order attention: one function, several implementations."""

from jaxtyping import Array, Float, Int

from pallas_kernels._core import compat, dispatch, recurrence
from pallas_kernels.second_order_attention.support import TABLE, Facts
from pallas_kernels.second_order_attention.terms import feature_count

OP = "second_order_attention"


def second_order_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T N V"],
    g: Float[Array, "B T N"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B N P V1"] | None = None,
    output_final_state: bool = False,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | tuple[str, ...] = "auto",
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N P V1"] | None]:
    """Attention with weights (scale q_i . k_j)^2 exp(sum of g after j), normalised; see `ref`.

    q, k: H heads; v and g: N, a multiple of H (value head n reads query and key head n // (N / H)).
    g: natural logarithm of each head's decay, at most 0; None: no decay.
    scale: None: K ** -0.5. It cancels, but for the clamp of the sum of weights at SMALLEST_SUM.
    initial_state: [B, N, K (K + 1) / 2, V + 1], of the row's first document; None: zeros. The final
        state is of its last.
    segment_ids: document of each token; each starts from zeros; 0 is padding and changes nothing.
    implementation: "auto", a name, or names in order of preference; `explain` tells the choice.
    Returns (o in the dtype of v, state in fp32 or None). Differentiable in all arrays. ValueError
    for shapes, dtypes and decays that do not fit, and for an implementation that cannot run here.
    """
    choice = explain(
        q, k, v, g, initial_state=initial_state, output_final_state=output_final_state,
        segment_ids=segment_ids, implementation=implementation,
    )  # fmt: skip
    q, k, v, g, initial_state, segment_ids = recurrence.alike(
        q, k, v, g, initial_state, segment_ids
    )
    o, final_state = choice.implementation.load()(
        q, k, v, g,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state,
        documents=None if segment_ids is None else recurrence.documents(segment_ids),
    )  # fmt: skip
    return o.astype(v.dtype), final_state if output_final_state else None


def explain(
    q, k, v, g=None, *, initial_state=None, output_final_state=False, segment_ids=None,
    implementation="auto",
) -> dispatch.Choice:  # fmt: skip
    """Which implementation `second_order_attention` takes for these arguments, and why.

    Arrays may be jax.ShapeDtypeStruct. `str()` of the result is one line for people.
    """
    recurrence.check(OP, q, k, v, g, None, segment_ids, vector=False)
    B, T, _, K = q.shape
    N, V = v.shape[2:]
    state = (B, N, feature_count(K), V + 1)
    if initial_state is not None:
        recurrence.check_kind(OP, "initial_state", initial_state)
    if initial_state is not None and initial_state.shape != state:
        raise ValueError(
            f"{OP}: initial_state has shape {initial_state.shape}; it must be {state}: a row for "
            "each product of two key features, a column for each value feature and one for the sum"
        )
    facts = Facts(
        compat.target(), v.dtype.name, T, K, output_final_state or initial_state is not None
    )
    return dispatch.choose(OP, TABLE, facts, implementation)
