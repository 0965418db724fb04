"""What a diffusers pipeline is told to draw: class numbers, prompts, or nothing.

A condition is always text in Sedimo's records; this module turns it into the arguments of a pipeline's
call and refuses what the pipeline cannot understand.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from sedimo.errors import InputError, StateError
from sedimo.pipelines.adapter import PipelineObject

PROMPTS = (
    "a photograph of a red apple on a wooden table",
    "a small dog running over a green meadow",
    "a city street at night in the rain",
    "a portrait of an old man with a grey beard",
    "a sailing boat on a calm blue sea",
    "a bowl of fruit, oil painting",
    "snow-covered mountains under a clear sky",
    "a white cat sleeping on a grey sofa",
)
_N_DEFAULT_CLASSES = 10
_TASK = "text-to-image"
_GOLDEN = (math.sqrt(5) - 1) / 2


def call_parameters(pipeline: PipelineObject) -> Mapping[str, inspect.Parameter]:
    """Parameters of the pipeline's call, by name."""
    return inspect.signature(type(pipeline).__call__).parameters


def _condition_kind(pipeline: PipelineObject) -> Literal["none", "class", "prompt"]:
    parameters = call_parameters(pipeline)
    if "prompt" in parameters:
        return "prompt"
    if "class_labels" not in parameters:
        return "none"
    is_required = parameters["class_labels"].default is inspect.Parameter.empty
    return "class" if is_required or _n_classes(pipeline) is not None else "none"


def default_conditions(pipeline: PipelineObject, n: int) -> tuple[str, ...]:
    """At most `n` conditions that suit the pipeline: its classes, or prompts; empty if it takes none.

    Prompts are those that its text encoder names (`task_specific_params` of its config, entry "text-to-image"), or
    plain ones. Up to ten classes are taken in order; of more, neighbours in the result are far apart in number,
    because neighbouring ImageNet classes are alike.
    """
    kind = _condition_kind(pipeline)
    if kind == "none":
        return ()
    if kind == "prompt":
        prompts = _task_settings(pipeline).get("prompts", [])
        if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
            raise StateError(
                f"the text encoder's config must give {_TASK}.prompts as a list of texts, got {prompts!r:.80}"
            )
        return tuple(prompts)[:n] or PROMPTS[:n]
    classes = sorted(set(_labels(pipeline).values()))
    classes = classes or list(range(min(_N_DEFAULT_CLASSES, _n_classes(pipeline) or _N_DEFAULT_CLASSES)))
    n_classes, stride = len(classes), 1
    if n_classes > _N_DEFAULT_CLASSES:
        stride = next(s for s in itertools.count(round(n_classes * _GOLDEN)) if math.gcd(s, n_classes) == 1)
    return tuple(str(classes[i * stride % n_classes]) for i in range(min(n, n_classes)))


def default_guidance(pipeline: PipelineObject) -> float | None:
    """The guidance scale that the text encoder names beside its prompts; None: that of the pipeline's call."""
    scale = _task_settings(pipeline).get("guidance_scale")
    if scale is None:
        return None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise StateError(f"the text encoder's config must give {_TASK}.guidance_scale as a number, got {scale!r:.80}")
    return float(scale)


def condition_arguments(pipeline: PipelineObject, conditions: Sequence[str | None]) -> dict[str, object]:
    """The arguments that carry one condition per sample into the pipeline's call."""
    kind, name = _condition_kind(pipeline), type(pipeline).__name__
    texts = [c for c in conditions if c is not None]
    if kind == "none":
        if texts:
            raise InputError(f"{name} is unconditional and takes no conditions, got {texts[0]!r}; leave them out")
        return {}
    if len(texts) != len(conditions):
        wanted = "a prompt" if kind == "prompt" else "a class number or label"
        raise InputError(f"{name} needs {wanted} for each sample; give Sampling(conditions=...) at least one")
    if kind == "prompt":
        return {"prompt": texts}
    return {"class_labels": [_class_number(pipeline, text) for text in texts]}


def _class_number(pipeline: PipelineObject, text: str) -> int:
    labels, n_classes, name = _labels(pipeline), _n_classes(pipeline), type(pipeline).__name__
    if text in labels:
        return labels[text]
    if not text.isdecimal():
        known = ", ".join(list(labels)[:8]) or "none: this pipeline has no label names"
        raise InputError(f"{name} has no class {text!r}; give a class number or a label ({known})")
    number = int(text)
    if n_classes is not None and number >= n_classes:
        raise InputError(f"{name} has classes 0..{n_classes - 1}, got {number}")
    return number


def _task_settings(pipeline: PipelineObject) -> Mapping[str, object]:
    """Transformers' field for what a model was made to be given, task by task."""
    config = getattr(getattr(pipeline, "text_encoder", None), "config", None)
    tasks = getattr(config, "task_specific_params", None)
    settings = tasks.get(_TASK, {}) if isinstance(tasks, dict) else {}
    if not isinstance(settings, dict):
        raise StateError(f"the text encoder's config must give {_TASK} as an object, got {settings!r:.80}")
    return settings


def _labels(pipeline: PipelineObject) -> Mapping[str, int]:
    return getattr(pipeline, "labels", None) or {}


def _n_classes(pipeline: PipelineObject) -> int | None:
    denoiser = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    config = getattr(denoiser, "config", {})
    return config.get("num_embeds_ada_norm") or config.get("num_class_embeds")
