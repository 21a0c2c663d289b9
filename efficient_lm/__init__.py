"""efficient_lm: efficient transformers in JAX, from a config to a measured result."""

import importlib

_PUBLIC = {
    "Config": "efficient_lm.config",
    "Generator": "efficient_lm.inference.engine",
    "Model": "efficient_lm.inference.model",
    "generate": "efficient_lm.inference.engine",
    "load": "efficient_lm.inference.load",
    "stream": "efficient_lm.inference.engine",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str):
    """Import a public name when it is first asked for, so that importing the package is quick."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
