"""Compare with nanoGPT: `python experiments/nanogpt/run.py cpu|gpu|speed --out=result.json`."""

import argparse
from pathlib import Path

import record

ARMS = ("cpu", "gpu", "speed")


def main() -> None:
    """Run one arm and write its JSON, also when the arm ends early."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--peer", type=Path, help="a clone of github.com/karpathy/nanoGPT")
    parser.add_argument("--data", type=Path, help="tinyshakespeare as one text file")
    parser.add_argument("--seeds", type=int, default=2, help="runs of ours, seeds 0, 1, ...")
    parser.add_argument("--sweep", action="store_true", help="gpu: several variants, seed 0")
    parser.add_argument("--seconds", type=float, default=280.0, help="start nothing new after")
    parser.add_argument(
        "--change", action="append", default=[], metavar="FIELD=VALUE",
        help="cpu, gpu: a field of the config, such as model.dropout=0.3; repeatable",
    )  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: does the code run?")
    arguments = parser.parse_args()
    if arguments.arm != "speed" and arguments.data is None:
        parser.error("--data is missing: the file of github.com/karpathy/char-rnn, "
                     "data/tinyshakespeare/input.txt")  # fmt: skip
    for name in ("peer", "data"):
        path = getattr(arguments, name)
        if path is not None and not path.exists():
            parser.error(f"--{name}={path} does not exist")
    with record.Record(arguments.out, arguments.arm, arguments.peer) as result:
        if arguments.arm == "speed":
            import speed

            speed.run(result, arguments)
        else:
            import quality

            quality.run(result, arguments)


if __name__ == "__main__":
    main()
