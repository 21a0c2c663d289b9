"""Loss of a nanoGPT checkpoint over its whole validation split, each label once, as JSON."""

import json
import sys
from pathlib import Path

import numpy as np
import torch


def main(directory: Path) -> None:
    """Windows of the context length that do not overlap, as our evaluation has them."""
    sys.path.insert(0, str(directory))
    from model import GPT, GPTConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    saved = torch.load(directory / "out-shakespeare-char" / "ckpt.pt", map_location=device)
    config = GPTConfig(**saved["model_args"])
    model = GPT(config).to(device).eval()
    model.load_state_dict(
        {name.removeprefix("_orig_mod."): value for name, value in saved["model"].items()}
    )
    tokens = np.fromfile(directory / "data" / "shakespeare_char" / "val.bin", np.uint16)
    tokens = torch.from_numpy(tokens.astype(np.int64)).to(device)
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, config.block_size):
            window = tokens[start : start + config.block_size + 1]
            _, loss = model(window[None, :-1], window[None, 1:])
            total, count = total + loss.item() * (len(window) - 1), count + len(window) - 1
    row = {"valid_loss": total / count, "valid_tokens": count, "step": saved["iter_num"]}
    parameters = {
        "parameters": model.get_num_params(),
        "parameters_with_positions": model.get_num_params(non_embedding=False),
    }
    print(json.dumps(row | parameters))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
