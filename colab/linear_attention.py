"""linear_attention.ipynb as a script; `python -m colab.build` writes one from the other."""

# %% [markdown]
# # Linear attention in pictures
#
# Softmax attention keeps every token. Linear attention keeps a matrix for each head, of one size
# however long the text. This notebook draws what such a memory holds: which tokens it mixes, how
# fast it forgets, and how many associations it can recall. No training; a minute on two CPU cores.
#
# What it can not show: speed on accelerators, and what trained models recall. `experiments/`
# (`gated_deltanet`, `two_mamba`) and the README have those numbers.

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
TRIALS = 64  # random memories that the recall curves are means of

# %% [markdown]
# ## One recurrence
#
# The memory $S$ is a matrix with a row for each feature of the keys. All of these models write
# $k_t v_t^\top$ into it and read $o_t = S_t^\top q_t$; they differ in what
# happens to what was there.
#
# - linear attention: $S_t = S_{t-1} + k_t v_t^\top$
# - with decay (RetNet, Mamba-2): $S_t = e^{g_t} S_{t-1} + k_t v_t^\top$
# - gated delta rule (Gated DeltaNet, Qwen3.5): first let the memory decay, then write only the
#   *error*, $S_t = e^{g_t} S_{t-1} + \beta_t k_t (v_t - e^{g_t} S_{t-1}^\top k_t)^\top$
#
# Two functions of `pallas_kernels` are all of them; on a GPU or a TPU the same calls run kernels.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from pallas_kernels import attention, gated_delta_rule, gated_linear_attention

RULES = {
    "linear": lambda q, k, v, g, beta: gated_linear_attention(q, k, v, scale=1.0),
    "decay": lambda q, k, v, g, beta: gated_linear_attention(q, k, v, g, scale=1.0),
    "delta rule": lambda q, k, v, g, beta: gated_delta_rule(q, k, v, None, beta, scale=1.0),
    "gated delta rule": lambda q, k, v, g, beta: gated_delta_rule(q, k, v, g, beta, scale=1.0),
}

# %% [markdown]
# ## The implied attention matrix
#
# Every rule is linear in the values, $o = A v$, so with the identity as values the output *is* the
# matrix $A$: row $t$ says how much of each earlier token is in the output at $t$. (Softmax
# attention too, with queries and keys padded to as many features as the values have.)
#
# Below, 48 tokens write under 8 keys again and again, and each reads under a key of its own choice.
# Only what was written last under a key is up to date. Softmax and linear attention mix all that
# was ever written under it; decay prefers the latest; the delta rule has overwritten the others.

# %%
from efficient_lm import masks

T, KEYS, FEATURES = 48, 8, 16
rng = np.random.default_rng(0)
unit = np.linalg.qr(rng.normal(size=(FEATURES, FEATURES)))[0][:KEYS]
written = np.concatenate([rng.permutation(KEYS) for _ in range(T // KEYS)])
read = rng.integers(KEYS, size=T)
identity = jnp.eye(T)[None, :, None]  # [1, T, 1, T]: value t is the unit vector t
log_decay = jnp.full((1, T, 1), np.log(0.93), jnp.float32)
beta = jnp.ones((1, T, 1), jnp.float32)


def implied(rule, table):
    """A [T, T] of a rule, for keys that are rows of `table` [KEYS, FEATURES]."""
    query, key = (jnp.asarray(table[ids], jnp.float32)[None, :, None] for ids in (read, written))
    return np.asarray(rule(query, key, identity, log_decay, beta)[0][0, :, 0])


def softmax(query, key, value, g, beta):
    """Attention, as a rule."""
    features = ((0, 0), (0, 0), (0, 0), (0, T - FEATURES))
    query, key = jnp.pad(8 * query, features), jnp.pad(key, features)
    return attention(query, key, value, mask=masks.Causal().lower(), scale=1.0), None


def draw(rules, table):
    """A picture for each rule."""
    grid = plt.figure(figsize=(14, 3.1), layout="constrained").subplots(1, len(rules))
    for axes, (name, rule) in zip(grid, rules.items(), strict=True):
        axes.imshow(implied(rule, table), cmap="RdBu_r", vmin=-1, vmax=1)
        axes.set(title=name, xlabel="token that wrote", xticks=[], yticks=[])
    grid[0].set_ylabel("token that reads")
    plt.show()


draw({"softmax": softmax} | RULES, unit)

# %%
newest = np.zeros((T, T))
for t in range(T):
    places = np.flatnonzero(written[: t + 1] == read[t])
    newest[t, places[-1:]] = 1.0
same = np.allclose(implied(RULES["delta rule"], unit), newest, atol=1e-4)
print("the delta rule reads the newest value under the key and no other:", same)

# %% [markdown]
# With keys that are *not* orthogonal, values leak from one key into another. The delta rule takes
# back what the memory would have answered by itself (blue: negative weights); sums can not.

# %%
similar = unit + 0.8 * unit.mean(0)
similar /= np.linalg.norm(similar, axis=1, keepdims=True)
draw({"softmax": softmax} | RULES, similar)

# %% [markdown]
# ## How fast a layer forgets
#
# In Gated DeltaNet the decay of a head is $g_t = -A\,\mathrm{softplus}(a_t + b)$, where $a_t$ comes
# from the token. As it is initialised, some heads forget within a token and some keep a hundred.

# %%
from flax import nnx

from efficient_lm.config import Config, layer
from efficient_lm.model.language_model import LanguageModel

config = Config.from_dict(
    {
        "model": {
            "vocabulary_size": 256,
            "embed_dim": 256,
            "num_layers": 4,
            "max_length": 65_536,
            "layers": (*(layer("gated_deltanet"),) * 3, layer(gate="sigmoid")),
            "mixers": {"gated_deltanet": {"num_value_heads": 8}, "attention": {"num_heads": 8}},
        }
    }
)
model = LanguageModel(config.model, nnx.Rngs(0), scan=False)
mixer = model.stack.rest[0].mixer
a_token = -jnp.exp(mixer.log_rate[...]) * jax.nn.softplus(mixer.step_bias[...])  # where a_t = 0

age = np.arange(512)
plt.figure(figsize=(6, 3), layout="constrained")
for head, rate in enumerate(np.sort(np.asarray(a_token))[::-1]):
    plt.plot(age, np.exp(rate * age), color=plt.cm.viridis(head / 8))
plt.xscale("symlog", base=2)
plt.title("what is left of a token in each head")
plt.xlabel("tokens ago")
plt.show()
print("half-lives in tokens:", np.sort(np.log(0.5) / np.asarray(a_token)).round(1))

# %% [markdown]
# ## State size against recall
#
# Write pairs of a random key and one of 64 values, then ask for each key. Random keys are not
# orthogonal, so answers leak into each other, and the larger the state, the more pairs it holds.
#
# In the upper row each key is written once. There adding up is enough, and better than the delta
# rule, which at full strength changes old answers with each write. In the lower row each key had
# another value before. Then a sum is no more than a guess between the two, in a state of any size;
# the delta rule recalls the new ones about as well as if the old ones had never been.

# %%
VALUES, MOST = 64, 64
counts = np.array([2, 4, 8, 16, 32, 64])


@jax.jit
def recalled(keys, old, new, written):
    """Share of right answers by rule [counts]; keys [rows, MOST, K], `written` [rows, 2 MOST]."""
    codes = jnp.eye(VALUES)[jnp.concatenate([old, new], axis=1)] * written[..., None]
    twice = jnp.concatenate([keys, keys], axis=1)[:, :, None]
    arguments = (twice, twice, codes[:, :, None])
    _, linear = gated_linear_attention(*arguments, scale=1.0, output_final_state=True)
    _, delta = gated_delta_rule(
        *arguments, None, written[..., None], scale=1.0, output_final_state=True
    )
    answers, asked = {}, written[:, MOST:]
    for name, state in (("linear", linear), ("delta rule", delta)):  # state [rows, 1, K, VALUES]
        guesses = jnp.einsum("btk,bkv->btv", keys, state[:, 0]).argmax(-1)
        right = ((guesses == new) * asked).sum(1) / asked.sum(1)
        answers[name] = right.reshape(len(counts), TRIALS).mean(1)
    return answers


rows = len(counts) * TRIALS
old, new = rng.integers(VALUES, size=(2, rows, MOST))
inside = np.repeat(np.arange(MOST)[None] < counts[:, None], TRIALS, axis=0).astype(np.float32)
masks_of_writes = {
    "written once": np.concatenate([0 * inside, inside], axis=1),
    "written twice": np.concatenate([inside, inside], axis=1),
}
figure, grid = plt.subplots(2, 2, figsize=(9, 5.5), sharex=True, sharey=True, layout="constrained")
for size in (8, 16, 32, 64):
    keys = rng.normal(size=(rows, MOST, size)).astype(np.float32)
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    for line, (task, mask) in zip(grid, masks_of_writes.items(), strict=True):
        accuracy = recalled(keys, old, new, mask)
        for axes, name in zip(line, accuracy, strict=True):
            axes.plot(counts, accuracy[name], "o-", label=f"{size} x {VALUES}")
            axes.set_title(f"{name}, each key {task}", fontsize=10)
        shown = {name: f"{float(values[3]):.2f}" for name, values in accuracy.items()}
        print(f"{size:2} key features, 16 pairs {task}: right answers", shown)
grid[0, 0].set_xscale("log", base=2)
grid[0, 0].set_ylim(0, 1.05)
grid[1, 0].set_xlabel("pairs")
grid[1, 0].set_ylabel("right answers")
grid[1, 1].legend(title="state", fontsize=8)
plt.show()

# %% [markdown]
# ## A state of one size
#
# The state is all that decoding carries along. Half of a sequence, and then the other half from the
# state, is the whole sequence; and its bytes do not depend on how many tokens it has seen, where
# the cache of attention grows with each.

# %%
q, k, v = jax.random.normal(jax.random.key(1), (3, 1, 96, 2, 16))
k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
g, strength = -0.05 * jnp.ones((1, 96, 2)), 0.7 * jnp.ones((1, 96, 2))
whole, _ = gated_delta_rule(q, k, v, g, strength)
halves, state = [], None
for part in (slice(0, 48), slice(48, 96)):
    inputs = (x[:, part] for x in (q, k, v, g, strength))
    o, state = gated_delta_rule(*inputs, initial_state=state, output_final_state=True)
    halves.append(o)
error = jnp.abs(jnp.concatenate(halves, axis=1) - whole).max()
print(f"largest difference of two halves to the whole: {float(error):.1e}")


# %%
blocks = {"gated_deltanet": model.stack.rest[0], "attention": model.stack.rest[3]}
print("bytes of the state of a layer")
for length in (1024, 4096, 16_384, 65_536):
    sizes = {}
    for name, block in blocks.items():
        state = jax.eval_shape(lambda m=block.mixer: m.init_state(1, length, jnp.bfloat16))  # noqa: B023
        sizes[name] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    print(f"{length:7,} tokens", {name: f"{size:,}" for name, size in sizes.items()})

# %% [markdown]
# ## Where next
#
# - Train a mixture: `python -m efficient_lm.train --config=configs/quickstart.py
#   --workdir=runs/hybrid --config.model.layers="('gated_deltanet',) * 3 + ('attention',)"`
# - The other memories: `linear_attention` (with feature maps), `mamba2`, `kda`, `two_mamba`, `ttt`
# - `experiments/gated_deltanet`: what trained models recall, and how fast they are
