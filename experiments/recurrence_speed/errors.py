"""Errors of the gated delta rule in bf16 beside a torch peer's, against the recurrence in float64.

python -m experiments.recurrence_speed.errors --out=FILE, on a CPU, with torch and transformers. All
sides get the same arrays: q, k, v and the output's cotangent in bf16, g and beta in fp32.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from experiments.recurrence_speed import shapes
from experiments.recurrence_speed.ours import inputs
from pallas_kernels import gated_delta_rule
from pallas_kernels._core import testing, timing
from pallas_kernels.gated_delta_rule import mosaic_tpu

SHAPE = shapes.Shape("B1_T512", (1, 512, 2, 4, 128))
NAMES = ("o", "d_q", "d_k", "d_v", "d_g", "d_beta")


def main(arguments: list[str] | None = None) -> int:
    """Write all rows; the exit code is 2 without the peer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    flags = parser.parse_args(arguments)
    missing = [x for x in ("torch", "transformers") if importlib.util.find_spec(x) is None]
    if missing:
        print(f"errors: the peer needs {' and '.join(missing)}: pip install torch transformers",
              file=sys.stderr)  # fmt: skip
        return 2
    given = sys.argv[1:] if arguments is None else arguments
    environment = timing.environment()
    environment["versions"] |= {x: importlib.metadata.version(x) for x in ("torch", "transformers")}
    report = {
        "command": "python -m experiments.recurrence_speed.errors " + " ".join(given),
        "environment": environment,
        "seed": 0,
        "shape": dict(zip("BTHND", SHAPE.sizes, strict=True)),
        "rows": [],
    }
    for case, change in CASES.items():
        tokens, cotangent = inputs(SHAPE)
        tokens = change(*tokens)
        truth = recurrence(*(np.asarray(x, np.float64) for x in (*tokens, cotangent)))
        for side, function in SIDES.items():
            found = function(tokens, cotangent)
            errors = {
                name: testing.relative_error(np.asarray(x, np.float64), truth[name])
                for name, x in zip(NAMES, found, strict=True)
            }
            report["rows"].append({"case": case, "side": side, "relative_errors": errors})
            print(json.dumps(report["rows"][-1]), flush=True)
            flags.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["rows"]))
    return 0


def recurrence(q, k, v, g, beta, d_o) -> dict:
    """Output and gradients of `pallas_kernels.gated_delta_rule.ref`, step by step in float64."""
    T, H, N, scale = q.shape[1], q.shape[2], v.shape[2], q.shape[3] ** -0.5
    q, k = (np.repeat(x, N // H, axis=2) for x in (q, k))
    decay = np.exp(g)[..., None, None]
    state, before, error = np.zeros((q.shape[0], N, q.shape[3], v.shape[3])), [], []
    found = dict(zip(NAMES, map(np.zeros_like, (v, q, k, v, g, beta)), strict=True))
    for t in range(T):
        before.append(state)
        state = decay[:, t] * state
        error.append(v[:, t] - np.einsum("bnkv,bnk->bnv", state, k[:, t]))
        state = state + k[:, t, :, :, None] * (beta[:, t, :, None] * error[t])[:, :, None]
        found["o"][:, t] = scale * np.einsum("bnkv,bnk->bnv", state, q[:, t])
    d_state = np.zeros_like(state)
    for t in reversed(range(T)):
        decayed, update = decay[:, t] * before[t], beta[:, t, :, None] * error[t]
        written = decayed + k[:, t, :, :, None] * update[:, :, None]
        found["d_q"][:, t] = scale * np.einsum("bnkv,bnv->bnk", written, d_o[:, t])
        d_state += scale * q[:, t, :, :, None] * d_o[:, t, :, None]
        d_update = np.einsum("bnkv,bnk->bnv", d_state, k[:, t])
        d_error = beta[:, t, :, None] * d_update
        found["d_v"][:, t] = d_error
        found["d_beta"][:, t] = np.sum(d_update * error[t], axis=-1)
        found["d_k"][:, t] = np.einsum("bnkv,bnv->bnk", d_state, update)
        found["d_k"][:, t] -= np.einsum("bnkv,bnv->bnk", decayed, d_error)
        d_state = d_state - k[:, t, :, :, None] * d_error[:, :, None]
        found["d_g"][:, t] = np.sum(d_state * decayed, axis=(2, 3))
        d_state = decay[:, t] * d_state
    for name in ("d_q", "d_k"):  # of all value heads that share a key head
        found[name] = found[name].reshape(*q.shape[:2], H, N // H, -1).sum(axis=3)
    return found


def similar_keys(q, k, v, g, beta):
    """Any two keys have a cosine of 0.999, nearly all is replaced, hardly anything decays."""
    common, own = k[:, :1, :1].astype(jnp.float32), k.astype(jnp.float32)
    k = 0.999**0.5 * common + 0.001**0.5 * own
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    return q, k.astype(q.dtype), v, 1e-3 * g, 0.9 + 0.1 * beta


CASES = {
    "random": lambda *tokens: tokens,
    "keys of cosine 0.999": similar_keys,
    "decays near 0": lambda q, k, v, g, beta: (q, k, v, 20 * g, beta),
    "decays near 1": lambda q, k, v, g, beta: (q, k, v, 1e-4 * g, beta),
}


def ours(run, tokens, cotangent):
    """Output and gradients of a JAX function of the tokens."""

    @jax.jit
    def both(tokens, cotangent):
        o, pull = jax.vjp(run, *tokens)
        return o, *pull(cotangent)

    return both(tokens, cotangent)


def portable(*tokens, implementation):
    """By the public function, the recurrence in fp32 or XLA's chunks."""
    return gated_delta_rule(*tokens, implementation=implementation)[0]


def interpreted(*tokens):
    """By the TPU kernels, run in Python."""
    o, _ = mosaic_tpu.gated_delta_rule(
        *tokens,
        scale=tokens[0].shape[-1] ** -0.5,
        initial_state=None,
        documents=None,
        interpret=True,
    )
    return o.astype(tokens[2].dtype)


def peer(name, tokens, cotangent, autocast=False):
    """Output and gradients of the torch function `name` of transformers.

    It casts to fp32 and rounds the output; autocast: operands and results of products are bf16.
    """
    import torch
    from transformers.models.qwen3_next import modeling_qwen3_next

    def tensor(x):
        exact = torch.from_numpy(np.array(x, np.float32))
        return exact.to(torch.bfloat16) if x.dtype == jnp.bfloat16 else exact

    leaves = [tensor(x).requires_grad_() for x in tokens]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        o, _ = getattr(modeling_qwen3_next, name)(*leaves)
    o.backward(tensor(cotangent))
    return [x.detach().float().numpy() for x in (o, *(leaf.grad for leaf in leaves))]


SIDES = {
    "ours: recurrence, fp32": functools.partial(
        ours, functools.partial(portable, implementation="ref")
    ),
    "ours: XLA": functools.partial(ours, functools.partial(portable, implementation="xla")),
    "ours: TPU kernel, interpreted": functools.partial(ours, interpreted),
    "torch: recurrence, fp32": functools.partial(peer, "torch_recurrent_gated_delta_rule"),
    "torch: chunks, fp32": functools.partial(peer, "torch_chunk_gated_delta_rule"),
    "torch: chunks, autocast": functools.partial(
        peer, "torch_chunk_gated_delta_rule", autocast=True
    ),
}


def table(rows: list[dict]) -> str:
    """Of the output / of the worst gradient, in thousandths; a line a side, a column a case."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    lines = ["| | " + " | ".join(cases) + " |", "| --- " + "| ---: " * len(cases) + "|"]
    cells: dict[str, list[str]] = {}
    for row in rows:
        o, *gradients = (1e3 * row["relative_errors"][name] for name in NAMES)
        cells.setdefault(row["side"], []).append(f"{o:.1f} / {max(gradients):.1f}")
    lines += ["| " + " | ".join([side, *found]) + " |" for side, found in cells.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
