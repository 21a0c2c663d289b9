"""The one place for differences between JAX versions, and for what JAX knows of the device."""

import inspect
import os
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Target:
    """The device that the code being traced will run on.

    platform: "cpu", "gpu" or "tpu". kind: the vendor's name, such as "NVIDIA H200" or "TPU v5e".
    compute_capability: of an NVIDIA GPU, such as 9.0; else None.
    """

    platform: str
    kind: str
    compute_capability: float | None = None


def target() -> Target:
    """The device of the abstract mesh in use, if one names it, else the first default device.

    The mesh lets a program be compiled ahead of time for a device that this host lacks.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        platform = "gpu" if abstract.platform in ("cuda", "rocm") else abstract.platform
        return Target(platform, abstract.device_kind, _capability(platform, abstract.device_kind))
    device = jax.config.jax_default_device
    if device is None:
        device = jax.devices()[0]
    elif isinstance(device, str):
        device = jax.devices(device)[0]
    capability = getattr(device, "compute_capability", None)
    return Target(device.platform, device.device_kind, float(capability) if capability else None)


def _capability(platform: str, kind: str) -> float | None:
    """Compute capability of an NVIDIA GPU that is known by name alone."""
    known = {"A100": 8.0, "L40": 8.9, "H100": 9.0, "H200": 9.0, "B200": 10.0, "GB200": 10.0}
    return next((known[name] for name in known if platform == "gpu" and name in kind), None)


def splash_attention():
    """JAX's TPU splash attention package; its place in the tree is not a public promise."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    return splash_attention


def splash_attention_gradients(kernel, q, k, v, segments, lse, out, d_out):
    """dq, dk, dv by the backward pass of a splash kernel, from any log-sum-exp and output.

    q, out, d_out [N, T, H], k, v [K, S, H], lse fp32 [N, T].
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    options = kernel.kwargs
    residuals = (
        q, k, v, segments, None, out, lse, kernel.dq_mask_info, kernel.dkv_mask_info
    )  # fmt: skip
    gradients = splash_attention_kernel._splash_attention_bwd(
        False,
        *(
            options[name]
            for name in (
                "mask_value", "is_mqa", "block_sizes", "residual_checkpoint_name",
                "mask_function", "attn_logits_soft_cap", "interpret",
            )
        ),
        residuals,
        d_out,
    )  # fmt: skip
    return gradients[3:6]


def cudnn_attention(q, k, v, mask, scale: float, causal: bool, window: int | None):
    """Output [B, T, N, H] and fp32 log-sum-exp [B, T, N] of cuDNN's attention kernel.

    mask: bool [b, T, S] or None. The public function rounds the log-sum-exp to the dtype of q.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    out, lse = cudnn.dot_product_attention(
        q, k, v,
        mask=None if mask is None else mask[:, None],
        scale=scale,
        mask_type=cudnn.MaskType.CAUSAL if causal else cudnn.MaskType.NO_MASK,
        sliding_window_length=window,
        return_residual=True,
    )  # fmt: skip
    return out, jnp.swapaxes(lse, 1, 2)


def cudnn_attention_gradients(
    q, k, v, mask, lse, out, d_out, scale: float, causal: bool, window: int | None
):
    """dq, dk, dv by cuDNN's backward kernel from any log-sum-exp [B, T, N] and output."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    unused = jnp.zeros(0, q.dtype)
    bias = unused
    if mask is not None:
        bias = cudnn.combine_bias_and_mask(None, mask[:, None], q.dtype)
    score_mod = "score_mod" in inspect.signature(cudnn._dot_product_attention_bwd_rule).parameters
    residuals = (q, k, v, bias, *[unused] * 6, *[()] * score_mod, jnp.swapaxes(lse, 1, 2), out)
    gradients = cudnn._dot_product_attention_bwd_rule(
        scale,
        42,  # seed of the dropout that there is not
        0.0,
        (mask is not None, False),  # a bias; its gradient is not wanted
        cudnn.MaskType.CAUSAL if causal else cudnn.MaskType.NO_MASK,
        cudnn.AttentionLayout.BTNH.value,
        window,
        *[None] * score_mod,
        None,  # the version, which is not read
        False,
        residuals,
        d_out,
    )
    return gradients[:3]


def tpu_devices(topology: str, slices: int = 1) -> list:
    """The devices of a TPU topology such as "v5e:2x2", which nobody need own, to compile for.

    slices: how many of them a data-center network joins.
    """
    from jax.experimental import topologies

    # Several test processes may compile at once; libtpu reads this when it is loaded.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if jax.config.jax_platforms == "cpu":  # else libtpu complains that this is no TPU host
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    several = {"num_slices": slices} if slices > 1 else {}
    description = topologies.get_topology_desc(topology_name=topology, platform="tpu", **several)
    return list(description.devices)
