"""From the options of a command to the orders of the verbs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from sedimo.api.blocks import BlocksOrder
from sedimo.api.bops_order import BopsOrder
from sedimo.api.comparing import COMPARED, CompareOrder
from sedimo.api.explore_order import ExploreOrder
from sedimo.api.inspection import read_recipe
from sedimo.api.order import (
    DEFAULT_SEARCH,
    DYNAMIC_ACTIVATIONS,
    HYBRID,
    UNIFORM,
    ActivationOrder,
    BudgetOrder,
    Compute,
    Order,
    SamplingOrder,
)
from sedimo.api.search_order import SearchOrder
from sedimo.api.smooth_order import DEFAULT_SHARE, SmoothOrder
from sedimo.api.sweep_order import SweepOrder
from sedimo.errors import InputError
from sedimo.measurement.calibration import CalibrationOptions
from sedimo.measurement.reconstruction import ReconstructionOptions
from sedimo.measurement.trial import ObjectiveName
from sedimo.quant.formats import Format, parse_formats, with_activations
from sedimo.quant.rounding import RoundingSchedule
from sedimo.sensitivity.orthogonality import DEFAULT_IMPORTANCE, ImportanceOptions


def order_of(options: Mapping[str, Any]) -> Order:
    """The order of `sedimo quantize` and `sedimo run`."""
    recipe = options["recipe"]
    return Order(
        source=options["source"],
        out=options["out"],
        budget=budget_of(options),
        method=options["method"],
        formats=formats_text_of(options),
        ends=options["ends"],
        streams=not options["whole_layers"],
        recipe=None if recipe is None else read_recipe(str(recipe)),
        store=options["store"],
        variant=options["variant"],
        sampling=sampling_of(options),
        compute=compute_of(options),
        link=options["link"],
        check=not options["no_check"],
        search=search_of(options) if "trials" in options else DEFAULT_SEARCH,
        importance=importance_of(options) if "beta" in options else DEFAULT_IMPORTANCE,
        activations=activations_of(options) if "act_ranges" in options else DYNAMIC_ACTIVATIONS,
        smooth=smooth_order_of(options),
        reconstruct=reconstruction_of(options),
        keep_db=options.get("keep_db"),
        keep=options.get("keep"),
        minutes=options.get("minutes"),
        compensate=options["compensate"],
    )


def smooth_order_of(options: Mapping[str, Any]) -> SmoothOrder | None:
    """How to smooth, if at all.

    Raises:
        InputError: a share without `--smooth`.
    """
    alpha, share = options["smooth"], options["smooth_share"]
    if alpha is None and share is not None:
        raise InputError("--smooth-share says which layers to smooth: give --smooth 0.7, too")
    return None if alpha is None else SmoothOrder(alpha, DEFAULT_SHARE if share is None else share)


def reconstruction_of(options: Mapping[str, Any]) -> ReconstructionOptions | None:
    """How rounding is learned, or None when it is not asked for.

    Raises:
        InputError: steps without `--reconstruct`.
    """
    n_steps = options["reconstruct_steps"]
    if not options["reconstruct"]:
        if n_steps is not None:
            raise InputError("--reconstruct-steps says how long to learn the rounding: give --reconstruct, too")
        return None
    return ReconstructionOptions() if n_steps is None else ReconstructionOptions(RoundingSchedule(n_steps=n_steps))


def importance_of(options: Mapping[str, Any]) -> ImportanceOptions:
    """Knobs of the method orthogonality."""
    names = ("beta", "tau", "tail_mean")
    return ImportanceOptions(**{name: options[name] for name in names}, objective=options["importance_of"])


def activations_of(options: Mapping[str, Any]) -> ActivationOrder:
    """How activations are rounded.

    Raises:
        InputError: what belongs to static ranges, without them.
    """
    method, symmetric = options["act_ranges"], options["act_symmetric"]
    if method == "dynamic":
        if options["act_steps"] or options["act_by_timestep"]:
            raise InputError("--act-steps and --act-by-timestep are for static ranges: give --act-ranges min-max, too")
        return ActivationOrder(symmetric)
    chosen = CalibrationOptions(
        method, options["act_steps"], symmetric=symmetric, by_timestep=options["act_by_timestep"]
    )
    return ActivationOrder(symmetric, chosen)


def search_of(options: Mapping[str, Any]) -> SearchOrder:
    """How recipes are searched by measuring."""
    return SearchOrder(
        n_trials=options["trials"],
        n_rounds=options["refine"],
        seed=options["study_seed"],
        target=options["target"],
        prior=options["prior"],
        confidence=options["confidence"],
        level=options["level"],
    )


def explore_order_of(options: Mapping[str, Any]) -> ExploreOrder:
    """The order of `sedimo explore`."""
    names = ("source", "store", "trials", "ends", "sampler", "low_bits", "high_bits", "study_seed", "prior")
    return ExploreOrder(
        **{name: options[name] for name in names},
        formats=formats_text_of(options),
        streams=not options["whole_layers"],
        objectives=cast("tuple[ObjectiveName, ...]", tuple(_parts(options["objective"]))),
        sampling=sampling_of(options),
        compute=compute_of(options),
        variant=options["variant"],
        executor=options["executor"],
        activations=activations_of(options),
        smooth=smooth_order_of(options),
        workers=options["workers"],
    )


def blocks_order_of(options: Mapping[str, Any]) -> BlocksOrder:
    """The order of `sedimo blocks`."""
    names = ("source", "store", "objective", "keep_db", "keep", "bits", "variant")
    return BlocksOrder(
        **{name: options[name] for name in names},
        number_format=Format.parse(options["number_format"]),
        sampling=sampling_of(options),
        compute=compute_of(options),
        activations=activations_of(options),
        smooth=smooth_order_of(options),
    )


def compare_order_of(options: Mapping[str, Any]) -> CompareOrder:
    """The order of `sedimo compare`."""
    names = ("source", "store", "ends", "variant", "n_fresh", "n_trials", "compensate")
    methods = COMPARED if options["methods"] == "all" else tuple(_parts(options["methods"]))
    return CompareOrder(
        **{name: options[name] for name in names},
        bits=tuple(sorted(set(_numbers(options["bits"])))),
        bops=bops_of(options),
        formats=formats_text_of(options),
        streams=not options["whole_layers"],
        methods=methods,
        sampling=sampling_of(options),
        compute=compute_of(options),
        activations=activations_of(options),
        smooth=smooth_order_of(options),
    )


def sweep_order_of(options: Mapping[str, Any]) -> SweepOrder:
    """The order of `sedimo sweep`."""
    names = ("question", "source", "store", "signal", "variant")
    number_format, values = options["number_format"], tuple(_parts(options["values"]))
    if options["values"] and not values:
        raise InputError(f"--values are separated by commas, such as 1,2,5; got {options['values']!r}")
    return SweepOrder(
        **{name: options[name] for name in names},
        values=values,
        number_format=None if number_format is None else Format.parse(number_format),
        activations=activations_of(options),
        share=options["smooth_share"],
        sampling=replace(sampling_of(options), n_check_seeds=options["n_fresh"]),
        compute=compute_of(options),
    )


def budget_of(options: Mapping[str, Any]) -> BudgetOrder:
    """The budget."""
    return BudgetOrder(options["bits"], options["stored_bits"], options["n_bytes"], bops_of(options))


def bops_of(options: Mapping[str, Any]) -> BopsOrder | None:
    """The limit of bit operations, if there is one."""
    return None if options["bops"] is None else BopsOrder.parse(options["bops"])


def formats_text_of(options: Mapping[str, Any]) -> str:
    """The formats to choose from, each with each width of activations that was asked for."""
    formats, act = options["formats"], options["act"]
    if act is None:
        return str(formats)
    if options.get("recipe") is not None or str(options.get("method")).startswith((UNIFORM, HYBRID)):
        raise InputError(
            "--act widens --formats; a recipe or a single format has its own: write uniform:uaq4a8 or hybrid:uaq4a8"
        )
    widths = [part.removeprefix("a") for part in _parts(act)]
    if not widths or not all(width.isdecimal() for width in widths):
        raise InputError(f"widths of activations are written such as a8 or a4,a6,a8; got {act!r}")
    return ",".join(map(str, with_activations(parse_formats(formats), map(int, widths))))


def sampling_of(options: Mapping[str, Any]) -> SamplingOrder:
    """How to sample."""
    return SamplingOrder(
        n_seeds=options["seeds"],
        first_seed=options["seed"],
        n_steps=options["steps"],
        conditions=_conditions(options["prompts"]),
        guidance=options["guidance"],
        resolution=options["resolution"],
    )


def compute_of(options: Mapping[str, Any]) -> Compute:
    """Dtype and device."""
    return Compute(options["dtype"], options["device"])


def formats_of(changes: Iterable[str]) -> dict[str, str]:
    """Formats by layer from texts such as `proj_out_2=uaq8`."""
    found: dict[str, str] = {}
    for text in changes:
        layer, separator, number_format = text.partition("=")
        if not (layer and separator and number_format):
            raise InputError(f"a change is written LAYER=FORMAT, such as proj_out_2=uaq8; got {text!r}")
        if found.setdefault(layer, number_format) != number_format:
            raise InputError(f"layer {layer!r} is given two formats: {found[layer]} and {number_format}")
    return found


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in _parts(text))
    except ValueError as error:
        raise InputError(f"bits are numbers separated by commas, such as 3.0,3.5,4.0; got {text!r}") from error


def _conditions(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise InputError(f"{path} holds no prompt: one per line is expected")
    return lines
