"""efficient_lm: efficient transformers in JAX, from a config to a measured result."""
