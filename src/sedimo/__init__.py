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
    "Lab": "sedimo.jobs.face",
    "MissingExtraError": "sedimo.errors",
    "QuantizedTensor": "sedimo.quant.tensor",
    "Recipe": "sedimo.space",
    "Sampling": "sedimo.pipelines.adapter",
    "SamplingSettings": "sedimo.lab.seeds",
    "SearchSpace": "sedimo.space",
    "SedimoError": "sedimo.errors",
    "SensitivityTable": "sedimo.allocation.table",
    "SmoothingSettings": "sedimo.treatments.smoothing",
    "StateError": "sedimo.errors",
    "Study": "sedimo.lab.study",
    "UnsupportedError": "sedimo.errors",
    "allocate": "sedimo.allocation.solve",
    "evaluate": "sedimo.jobs.evaluate",
    "fit": "sedimo.jobs.face",
    "load": "sedimo.jobs.face",
    "memory_bytes": "sedimo.jobs.face",
    "quantize": "sedimo.jobs.face",
    "quantize_weight": "sedimo.quant.fitting",
    "replace": "sedimo.jobs.face",
    "report": "sedimo.jobs.face",
    "search_space": "sedimo.space",
    "smooth": "sedimo.treatments.smoothing",
    "trace": "sedimo.lab.bench",
}

_OLD = dict.fromkeys(("attribute", "explore", "probe"), "sedimo.jobs.face")  # end with the next release

__all__ = [  # the literal table above is the list; a test holds both together
    *sorted(_HOME),
]


def __getattr__(name: str) -> object:
    """Loads a public name from its home."""
    home = _HOME.get(name) or _OLD.get(name)
    if home is None:
        raise AttributeError(f"module 'sedimo' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


install()
