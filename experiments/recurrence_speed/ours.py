"""Time this library's recurrent ops, one JSON line a shape, op and pass.

"forward_backward" is the output and all gradients of one jitted function. Errors are relative norms
against the fp32 reference, for the first row of the batch.
"""

import json
import sys

import jax
import jax.numpy as jnp

from experiments.recurrence_speed import shapes
from pallas_kernels import gated_delta_rule, gated_linear_attention
from pallas_kernels._core import testing, timing

COMPARED_OPS = ("gated_delta_rule", "scalar_decay", "kda")
COMPARED = 4096  # tokens up to which the reference, token by token, takes seconds


def main() -> int:
    """Every row; a failing one becomes a line with its error. 2 without a GPU."""
    if jax.default_backend() != "gpu":
        print(f"error: these kernels need a GPU; this is {jax.default_backend()}", file=sys.stderr)
        return 2
    names, ops, only = (json.loads(argument) for argument in sys.argv[1:])
    print(json.dumps({"environment": timing.environment()}), flush=True)
    for shape in shapes.SHAPES:
        for op in ops:
            if shape.name in names and op in shape.ops:
                shape = shape._replace(passes=tuple(x for x in shape.passes if x in only))
                for row in measure(shape, op):
                    print(json.dumps({"shape": shape.name, "op": op} | row), flush=True)
    return 0


def inputs(shape, op="gated_delta_rule"):
    """q, k, v in bf16, fp32 g and beta, and a cotangent."""
    B, T, H, N, D = shape.sizes
    keys = jax.random.split(jax.random.key(0), 6)
    q, k = (jax.random.normal(key, (B, T, H, D)) for key in keys[:2])
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v, cotangent = (jax.random.normal(key, (B, T, N, D)) for key in keys[2:4])
    g = jax.nn.log_sigmoid(jax.random.normal(keys[4], (B, T, N, D) if op == "kda" else (B, T, N)))
    beta = jax.random.uniform(keys[5], (B, T, N))
    q, k, v, cotangent = (x.astype(jnp.bfloat16) for x in (q, k, v, cotangent))
    return (q, k, v, g, beta), cotangent


def functions(op, implementation="auto"):
    """The op as a function of those of (q, k, v, g, beta) that it has, and their places."""
    if op in ("gated_delta_rule", "delta_rule", "kda"):
        places = (0, 1, 2, 4) if op == "delta_rule" else (0, 1, 2, 3, 4)

        def run(q, k, v, *gates):
            g = gates[0] if len(gates) == 2 else None
            return gated_delta_rule(q, k, v, g, gates[-1], implementation=implementation)[0]

    else:
        places = (0, 1, 2, 3) if op == "scalar_decay" else (0, 1, 2)

        def run(q, k, v, g=None):
            return gated_linear_attention(q, k, v, g, implementation=implementation)[0]

    return run, places


def measure(shape, op):
    """Rows of both passes."""
    arguments, cotangent = inputs(shape, op)
    run, places = functions(op)
    arguments = tuple(arguments[place] for place in places)

    def both(run):
        def function(arguments, cotangent):
            out, pull = jax.vjp(run, *arguments)
            return out, pull(cotangent.astype(out.dtype))

        return jax.jit(function)

    passes = {
        "forward": (jax.jit(run), arguments),
        "forward_backward": (both(run), (arguments, cotangent)),
    }
    for name, (function, given) in passes.items():
        if name not in shape.passes:
            continue
        try:
            time = timing.measure(function, *given)
            yield {"pass": name, "milliseconds": time.median, "minimum": time.minimum}
        except Exception as error:
            yield {"pass": name, "error": f"{type(error).__name__}: {error}"[:300]}
    if shape.sizes[1] <= COMPARED and op in COMPARED_OPS and len(shape.passes) == 2:
        reference, _ = functions(op, "ref")
        first = jax.tree.map(lambda x: x[:1], (arguments, cotangent))
        found = both(run)(*first)
        expected = both(reference)(*jax.tree.map(lambda x: x.astype(jnp.float32), first))
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        errors = [testing.relative_error(jax.device_get(x).astype("float32"), y) for x, y in pairs]
        yield {"pass": "errors", "relative_errors": errors}


if __name__ == "__main__":
    sys.exit(main())
