"""Time flash-linear-attention's kernels (torch, Triton), one JSON line a shape, op and pass."""

import importlib.metadata
import json
import sys

import torch
import torch.nn.functional as F
from shapes import SHAPES
from triton.testing import do_bench


def main() -> None:
    """Every row; a failing one becomes a line with its error."""
    names, ops, only = (json.loads(argument) for argument in sys.argv[1:])
    versions = {
        name: importlib.metadata.version(name)
        for name in ("torch", "triton", "flash-linear-attention")
    }
    print(json.dumps({"environment": versions}), flush=True)
    for shape in SHAPES:
        for op in ops:
            if shape.name in names and op in shape.ops:
                shape = shape._replace(passes=tuple(x for x in shape.passes if x in only))
                for row in measure(shape, op):
                    print(json.dumps({"shape": shape.name, "op": op} | row), flush=True)


def measure(shape, op):
    """Rows of both passes; forward_backward is the sum of the two, timed apart."""
    torch.manual_seed(0)
    B, T, H, N, D = shape.sizes

    def normal(*sizes):
        return torch.randn(*sizes, device="cuda", dtype=torch.bfloat16)

    q, k = (F.normalize(normal(B, T, H, D), dim=-1) for _ in range(2))
    v = normal(B, T, N, D)
    g = F.logsigmoid(torch.randn(B, T, N, *[D] * (op == "kda"), device="cuda"))
    beta = torch.rand(B, T, N, device="cuda", dtype=torch.bfloat16)
    arguments = {
        "gated_delta_rule": (q, k, v, g, beta), "scalar_decay": (q, k, v, g), "plain": (q, k, v),
        "delta_rule": (q, k, v, beta), "kda": (q, k, v, g, beta),
    }[op]  # fmt: skip
    run = function(op)
    try:
        with torch.no_grad():
            forward = do_bench(lambda: run(*arguments), return_mode="median")
        yield {"pass": "forward", "milliseconds": forward}
    except Exception as error:
        yield {"pass": "forward", "error": f"{type(error).__name__}: {error}"[:300]}
        return
    if "forward_backward" not in shape.passes:
        return
    try:
        leaves = [x.detach().requires_grad_() for x in arguments]
        out = run(*leaves)
        cotangent = torch.randn_like(out)
        backward = do_bench(
            lambda: out.backward(cotangent, retain_graph=True), return_mode="median",
            grad_to_none=leaves,
        )  # fmt: skip
        yield {"pass": "forward_backward", "milliseconds": forward + backward}
    except Exception as error:
        yield {"pass": "forward_backward", "error": f"{type(error).__name__}: {error}"[:300]}


def function(op):
    """fla's chunk form of the op, as a function that returns the output."""
    if op == "gated_delta_rule":
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule as run
    elif op == "scalar_decay":
        from fla.ops.simple_gla import chunk_simple_gla as run
    elif op == "kda":
        from fla.ops.kda import chunk_kda as run
    elif op == "delta_rule":
        from fla.ops.delta_rule import chunk_delta_rule as run
    else:
        from fla.ops.linear_attn import chunk_linear_attn

        return lambda q, k, v: chunk_linear_attn(q, k, v, normalize=False)[0]
    return lambda *arguments: run(*arguments)[0]


if __name__ == "__main__":
    main()
