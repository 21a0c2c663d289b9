"""The notebook quickstart.ipynb as a script; `python -m colab.build` writes one from the other."""

# %% [markdown]
# # efficient_lm in a few minutes
#
# Train a small language model on the source of Python's own standard library, look at its curves,
# sample from it, and see what it finds hard. No download; under 4 minutes on 2 idle CPU cores.
#
# What this notebook can not show is speed: 0.9 million parameters on a CPU say nothing about how a
# billion of them run on an accelerator. The README has those numbers.

# %%
import importlib.util
import subprocess
import sys

REPOSITORY = (
    "https://github.com/efficient-lm/efficient_lm.git"  # read only where it is not installed
)

if importlib.util.find_spec("efficient_lm") is None:
    subprocess.run(["git", "clone", "--depth=1", REPOSITORY, "efficient_lm_source"], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "./efficient_lm_source"], check=True
    )

# %%
STEPS = 300
WORKDIR = "runs/notebook"

# %% [markdown]
# ## A config names the run
#
# Plain nested fields; a wrong one is refused at once, with the nearest name that exists. Here three
# layers see 64 bytes back and every fourth sees all of the context.

# %%
from efficient_lm.config import Config, layer

local, whole = layer("attention", window=64), layer("attention")

config = Config.from_dict(
    {
        "model": {
            "vocabulary_size": 256,
            "embed_dim": 128,
            "num_layers": 4,
            "max_length": 1024,
            "layers": (local, local, local, whole),
        },
        "data": {
            "source": "python_stdlib",
            "sequence_length": 256,
            "batch_size": 8,
            "valid_fraction": 0.02,
        },
        "optimizer": {
            "name": "muon",
            "learning_rate": 5e-3,
            "schedule": {"name": "wsd", "warmup_steps": 10, "decay_fraction": 0.5,
                         "final_fraction": 0.0},
        },
        "training": {"steps": STEPS},
        "evaluation": {"every": max(1, STEPS // 4), "batches": 4, "batch_size": 16},
    }
)  # fmt: skip

# %%
from efficient_lm.errors import ConfigError

try:
    Config.from_dict({"model": {"embed_dims": 256}})
except ConfigError as error:
    print(error)

# %% [markdown]
# ## Train
#
# Run this cell again and it resumes: it finds that nothing is left to do.

# %%
from efficient_lm.training.loop import train

summary = train(config, WORKDIR)

# %%
import matplotlib.pyplot as plt

from efficient_lm.training.metrics import read_metrics

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2))
for split, style in (("train", "-"), ("valid", "o-")):
    rows = read_metrics(WORKDIR, split)
    left.plot([r["step"] for r in rows], [r["bits_per_byte"] for r in rows], style, label=split)
left.set(title="bits per byte", xlabel="step")
left.legend()
rows = read_metrics(WORKDIR, "train")
right.plot([r["step"] for r in rows], [r["learning_rate"] for r in rows])
right.set(title="learning rate", xlabel="step")
plt.show()

# %% [markdown]
# ## Use it
#
# `load` gives the same three things for a run and for a converted Hugging Face checkpoint.

# %%
import efficient_lm as elm

model, tokenizer, config = elm.load(WORKDIR)
logits = model(tokenizer.encode("def main(")[None]).logits  # [B, T] -> fp32 [B, T, V]
print(logits.shape, "most likely next:", repr(tokenizer.decode([int(logits[0, -1].argmax())])))

# %%
for temperature in (0.0, 0.5, 1.0):
    text = elm.generate(
        model, tokenizer, "class ", max_new_tokens=160, temperature=temperature, seed=1
    )
    print(f"--- temperature {temperature}\nclass {text}\n")

# %% [markdown]
# ## What it finds hard
#
# Each byte of a text it has not seen, darker where the model was more surprised. Indentation and
# the ends of common words are easy; where a new name begins is not.

# %%
import html

import jax
import jax.numpy as jnp
from IPython.display import HTML, display

TEXT = '''
def count_words(lines):
    """Return a dictionary from each word to how often it occurs in lines."""
    counts = {}
    for line in lines:
        for word in line.split():
            counts[word] = counts.get(word, 0) + 1
    return counts
'''

ids = tokenizer.encode(TEXT)
log_probabilities = jax.nn.log_softmax(model(ids[None, :-1]).logits[0])
bits = -log_probabilities[jnp.arange(len(ids) - 1), ids[1:]] / jnp.log(2.0)
spans = "".join(
    f'<span style="background:rgba(196,98,45,{min(float(b) / 8, 1):.2f})">{html.escape(c)}</span>'
    for c, b in zip(TEXT[1:], bits, strict=True)
)
display(HTML(f"<pre>{spans}</pre>"))
print(f"{float(bits.mean()):.2f} bits per byte")

# %% [markdown]
# ## What context is worth
#
# The loss by place in the window: the first bytes must be guessed from almost nothing.

# %%
import itertools

import numpy as np

from efficient_lm.evaluation.run import evaluate_run

metrics = evaluate_run(WORKDIR, limit=12)["metrics"]
bits = np.array(metrics["position_loss"], float) / np.log(2)
edges = 2 ** np.arange(9)  # places 1, 2-3, 4-7, ...
means = [bits[a - 1 : b - 1].mean() for a, b in itertools.pairwise(edges)]
plt.figure(figsize=(5.5, 3))
plt.step(edges, [*means, means[-1]], where="post")
plt.xscale("log", base=2)
plt.ylim(bottom=0)
plt.title("bits per byte")
plt.xlabel("bytes of context")
plt.show()

# %% [markdown]
# ## An honest table
#
# Prediction is compression, so a compressor is a fair judge. gzip sees each file of the validation
# split whole and adapts to it; the model sees at most 256 bytes and was trained for a minute.

# %%
import gzip

from efficient_lm.data.sources import read_documents

files = [text.encode() for text in read_documents(config.data, "valid")]
size = sum(map(len, files))
table = {
    "uniform": 8.0,
    "gzip -9, file by file": 8 * sum(len(gzip.compress(file, 9)) for file in files) / size,
    f"this model, {summary['step']} steps": summary["valid"]["bits_per_byte"],
}
for name, value in table.items():
    print(f"{name:28} {value:5.2f} bits per byte")

# %% [markdown]
# ## Masks are an algebra
#
# `&` and `|` combine masks; every implementation of attention reads the result as plain data, and
# `explain` says which one runs here, and why the others do not.

# %%
from efficient_lm import masks
from pallas_kernels.attention import explain

segments = jnp.array([[1] * 9 + [2] * 15], jnp.int32)
pictures = {
    "Causal()": masks.Causal(),
    "SlidingWindow(5)": masks.SlidingWindow(5),
    "Causal() & Segments(ids)": masks.Causal() & masks.Segments(segments),
    "PrefixLM(8)": masks.PrefixLM(jnp.array([8], jnp.int32)),
    "BlockCausal(6)": masks.BlockCausal(6),
}
figure, grid = plt.subplots(1, len(pictures), figsize=(13, 2.8))
for axes, (name, mask) in zip(grid, pictures.items(), strict=True):
    axes.imshow(mask.lower().dense(24, 24)[0], cmap="Blues", vmax=1.4)
    axes.set_title(name, fontsize=9)
    axes.axis("off")
plt.show()

q = jax.ShapeDtypeStruct((8, 1024, 16, 128), jnp.bfloat16)
print(explain(q, q, q, mask=masks.SlidingWindow(512).lower()))

# %% [markdown]
# ## Where next
#
# - `runs/notebook/report.html` after `efficient_lm.training.report.write_report("runs/notebook")`
# - the same from a shell: `python -m efficient_lm.train --config=configs/quickstart.py
#   --workdir=runs/quickstart`
# - CONTRIBUTING.md: a new mixer is one file; the tests find it by its name
