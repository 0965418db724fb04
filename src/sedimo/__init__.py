"""Sedimo decides how many bits each weight of a diffusion model deserves, and writes the smaller checkpoint.

This is the one public door. Names are loaded when they are first used, so that `import sedimo` costs
milliseconds; its one side effect is a hook that teaches diffusers to load Sedimo's checkpoints.
"""

from __future__ import annotations

import importlib

from sedimo._import_hook import install

__version__ = "0.1.0"

_HOME = {
    "Allocation": "sedimo.allocation.problem",
    "Bank": "sedimo.bank",
    "DenoiserGraph": "sedimo.graph.model",
    "Format": "sedimo.quant.formats",
    "InputError": "sedimo.errors",
    "MissingExtraError": "sedimo.errors",
    "QuantizedTensor": "sedimo.quant.tensor",
    "Recipe": "sedimo.space",
    "Sampling": "sedimo.pipelines.adapter",
    "SearchSpace": "sedimo.space",
    "SedimoError": "sedimo.errors",
    "SensitivityTable": "sedimo.sensitivity.table",
    "StateError": "sedimo.errors",
    "Study": "sedimo.measurement.study",
    "UnsupportedError": "sedimo.errors",
    "allocate": "sedimo.allocation.solve",
    "attribute": "sedimo.api.attributing",
    "evaluate": "sedimo.api.comparison",
    "explore": "sedimo.api.verbs",
    "fit": "sedimo.api.verbs",
    "load": "sedimo.api.verbs",
    "memory_bytes": "sedimo.api.verbs",
    "probe": "sedimo.api.probing",
    "quantize": "sedimo.api.verbs",
    "quantize_weight": "sedimo.quant.quantization",
    "report": "sedimo.api.verbs",
    "search_space": "sedimo.space",
    "smooth": "sedimo.api.smoothing",
    "trace": "sedimo.api.verbs",
}

__all__ = [  # the literal table above is the list; a test holds both together
    *sorted(_HOME),
]


def __getattr__(name: str) -> object:
    """Loads a public name from its home."""
    if name not in _HOME:
        raise AttributeError(f"module 'sedimo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


install()
