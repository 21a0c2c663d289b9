"""Time the training step of nanoGPT's model.py with torch, one JSON line a batch size.

The step is that of its train.py: autocast, forward, backward, clip by the global norm, fused AdamW
from its `configure_optimizers`; the batch is one of random tokens. Nothing is read back between
steps, which its own bench.py does.
"""

import argparse
import json
import statistics
import sys
import time

import torch


def main() -> None:
    """Time each batch size; a failing one becomes a line with its error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--shape", type=json.loads, required=True, help="GPTConfig fields")
    parser.add_argument("--batch_sizes", type=json.loads, required=True)
    parser.add_argument("--steps", type=int, required=True, help="a repetition")
    parser.add_argument("--repetitions", type=int, required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--no_compile", action="store_true")
    arguments = parser.parse_args()
    sys.path.insert(0, arguments.peer)
    for batch_size in arguments.batch_sizes:
        torch._dynamo.reset()  # otherwise a second size compiles for sizes of any kind
        row = {"batch_size": batch_size, "dtype": arguments.dtype}
        row["compiled"] = not arguments.no_compile
        try:
            row |= measure(arguments, batch_size)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:500]
        print(json.dumps(row), flush=True)


def measure(arguments, batch_size: int) -> dict:
    """Seconds a step: the median over repetitions of the mean within one."""
    from model import GPT, GPTConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    config = GPTConfig(**arguments.shape)
    raw = GPT(config).to(device)
    optimizer = raw.configure_optimizers(
        weight_decay=0.1, learning_rate=6e-4, betas=(0.9, 0.95), device_type=device
    )
    model = raw if arguments.no_compile else torch.compile(raw, dynamic=False)
    context = torch.autocast(device, dtype=getattr(torch, arguments.dtype),
                             enabled=arguments.dtype != "float32")  # fmt: skip
    size = (batch_size, config.block_size)
    tokens, labels = (torch.randint(config.vocab_size, size, device=device) for _ in range(2))

    def step():
        with context:
            _, loss = model(tokens, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(raw.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    began = time.perf_counter()
    step()
    wait()
    first = time.perf_counter() - began
    for _ in range(arguments.steps):
        step()
    times = []
    for _ in range(arguments.repetitions):
        wait()
        began = time.perf_counter()
        for _ in range(arguments.steps):
            loss = step()
        wait()
        times.append((time.perf_counter() - began) / arguments.steps)
    row = {
        "step_seconds": statistics.median(times),
        "step_seconds_best": min(times),
        "first_step_seconds": first,
        "parameters": raw.get_num_params(),  # without position embeddings
        "loss": float(loss),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    if device == "cuda":
        row["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    return row


if __name__ == "__main__":
    main()
