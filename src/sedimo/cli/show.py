"""Tables for people: one function per command."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from sedimo.cli.console import duration, print_table

if TYPE_CHECKING:
    from sedimo.allocation.problem import Allocation
    from sedimo.api.changing import Change
    from sedimo.api.comparison import Evaluation
    from sedimo.api.correcting import CorrectedEvaluation
    from sedimo.api.inspection import LayerDifference
    from sedimo.api.job import JobPlan, JobResult
    from sedimo.metrics.estimate import Estimate
    from sedimo.metrics.signal import SignalSummary
    from sedimo.reporting.prediction import Prediction


def inspection(found: Mapping[str, object]) -> None:
    """Totals, then one line per operation type."""
    layers = found["layers"]
    assert isinstance(layers, Sequence)  # noqa: S101  # the verb's own record
    by_operation: dict[str, list[Mapping[str, object]]] = {}
    for layer in layers:
        by_operation.setdefault(str(layer["operation"]), []).append(layer)
    click.echo(
        f"{found['denoiser']}: {found['n_layers']} layers, {found['n_decisions']} decisions, "
        f"{found['n_groups']} groups, {count(found['params'])} weights, {count(found['macs'])} MACs a call"
    )
    is_packed = "stored_bytes" in found
    rows = [
        (
            name,
            len(members),
            _shapes(members),
            count(_sum(members, "params")),
            count(_sum(members, "macs")),
            *([_formats(members)] if is_packed else []),
        )
        for name, members in by_operation.items()
    ]
    columns = ("operation", "layers", "shape", "weights", "MACs")
    print_table("", (*columns, "formats") if is_packed else columns, rows)
    if is_packed:
        stored, file_size = (size(float(str(found[key]))) for key in ("stored_bytes", "file_bytes"))
        click.echo(f"packed: {stored} of packed layers in a file of {file_size}")


def plan(found: JobPlan) -> None:
    """What a job would take."""
    click.echo(f"{found.source}: {found.n_decisions} decisions, {found.n_formats} formats, {found.budget}")
    click.echo(f"method    {found.method} ({found.reason})")
    checked = "on fresh seeds: beside uniform recipes, block by block, step by step"
    click.echo(f"check     {f'none: {found.unchecked}' if found.unchecked else checked}")
    click.echo(f"time      about {duration(found.seconds)}, {found.denoiser_calls} denoiser calls")
    click.echo(f"memory    about {size(found.memory_bytes)} besides the loaded pipeline")
    click.echo(f"disk      about {size(found.disk_bytes)}")


def result(found: JobResult) -> None:
    """What a job did, and where its report is."""
    from sedimo.allocation.fixed import decided_by

    choice, written = found.allocation, found.written
    if found.check is not None:
        rows = [
            (
                r.name,
                f"{r.paper_bits:.2f}",
                f"{r.stored_bits:.2f}",
                _decibels(r.signals.sqnr),
            )
            for r in (found.check.this, *found.check.rivals)
        ]
        seeds = found.check.seeds
        title = f"Final latents against full precision, seeds {seeds[0]} to {seeds[-1]}, {found.check.n_steps} steps"
        print_table(title, ("recipe", "paper bits", "stored bits", "SQNR [dB] ± standard error"), rows)
    else:
        click.echo(f"The result was not sampled: {found.plan.unchecked}.")
    if found.prediction is not None:
        _prediction(found.prediction)
    if found.reconstruction is not None:
        blocks = found.reconstruction.blocks
        n_learned, n_samples = sum(block.is_learned for block in blocks), found.reconstruction.n_samples
        click.echo(f"Rounding learned in {n_learned} of {len(blocks)} blocks, from {n_samples} samples.")
    params = found.table.total_params
    before, after = size(2 * params), size(choice.stored_bits * params / 8)
    method = decided_by(choice.method, choice.rule)
    click.echo(
        f"\nmethod {method} ({found.plan.reason}); {choice.status}, gap {choice.gap:.1e}\n"
        f"{choice.paper_bits:.3f} paper bits, {choice.stored_bits:.3f} stored bits per weight; "
        f"Linear and Conv weights {before} at 16 bits -> {after}, denoiser file {size(written.file_bytes)}\n"
        f"{_operations(choice.bops, found.table.full_bops)}\n"
        f"checkpoint {written.folder}\nreport     {found.report}\n"
        f"took {duration(found.seconds)}, peak memory {size(found.peak_rss_bytes)}"
    )


def _prediction(found: Prediction) -> None:
    """What was predicted, and a warning where it proved wrong."""
    predicted, measured = found.predicted_db, found.measured_db
    text = f"Predicted {predicted.value:.1f} ± {predicted.standard_error:.1f} dB"
    if measured is None:
        click.echo(f"{text}; not measured.")
        return
    click.echo(f"{text}, measured {measured.value:.1f} ± {measured.standard_error:.1f} dB.")
    if not found.is_trusted:
        blamed = ", ".join(f"{b.decision} at {b.format}" for b in found.blamed)
        click.echo(
            f"Warning: {abs(found.difference_db):.1f} dB apart, so other predicted figures are as uncertain"
            + (f"; look at {blamed}." if blamed else ".")
        )


def allocation(found: Allocation) -> None:
    """The recipe per decision, and its certificate."""
    print_table("", ("decision", "format"), [(name, f) for name, f in found.choice.items()])
    click.echo(
        f"{found.paper_bits:.3f} paper bits, {found.stored_bits:.3f} stored bits per weight; {found.method}: "
        f"objective {found.objective:.4g}, bound {found.bound:.4g}, gap {found.gap:.1e}, {found.status}\n"
        f"{count(found.bops)} bit operations a sample and call"
    )


def allocation_json(found: Allocation) -> dict[str, object]:
    """The keys that scripts may rely on."""
    names = ("bits", "paper_bits", "stored_bits", "bops", "objective", "bound", "gap", "status", "method")
    recipe = {name: str(entry) for name, entry in found.recipe.layers.items()}
    return {"recipe": recipe, **{name: getattr(found, name) for name in names}}


def evaluation(found: Evaluation) -> None:
    """Measures with their intervals, and sizes."""
    rows = [(name, *_estimate(value)) for name, value in found.measures.items()]
    print_table("", ("measure", "value", "standard error", "95 % interval", "n"), rows)
    for name, value in found.size.items():
        click.echo(f"{name:22s} {size(value)}")
    for name, value in found.bops.items():
        click.echo(f"{name:22s} {count(value)} bit operations a call and sample")
    if found.n_exact or found.n_decorrelated:
        click.echo(f"{found.n_exact} samples are exact, {found.n_decorrelated} have more noise than half the signal")
    if found.extractor:
        click.echo(f"features by {found.extractor}; FID falls with n, so compare only figures of equal n")
    if found.corrected:
        _corrected(found.corrected)


def _corrected(found: CorrectedEvaluation) -> None:
    """Measures with the correction, and what it gains."""
    rows = [(name, *_estimate(value)) for name, value in found.measures.items()]
    rows += [(f"gain of {name}", *_estimate(value)) for name, value in found.gain.items()]
    print_table("", ("corrected", "value", "standard error", "95 % interval", "n"), rows)
    click.echo(f"{found.done}; estimated from {len(found.probe.seeds)} other seeds")


def change(found: Change) -> None:
    """What a changed checkpoint has instead of what."""
    print_table("", ("layer", "before", "after"), [(n, found.before[n], f) for n, f in found.after.items()])
    written = found.written
    click.echo(
        f"packed layers {size(written.stored_bytes)}, denoiser file {size(written.file_bytes)}: {written.folder}"
    )


def differences(found: Sequence[LayerDifference]) -> None:
    """Layers that differ."""
    if not found:
        click.echo("no layer differs")
        return
    print_table("", ("layer", "first", "second"), [(d.layer, d.first, d.second) for d in found])
    click.echo(f"{len(found)} layers differ")


def size(n_bytes: float) -> str:
    """Bytes for people.

    Example:
        >>> size(1536 * 1024)
        '1.50 MiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.2f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.2f} GiB"


def count(number: object) -> str:
    """A count for people: 1.23 M."""
    value = float(str(number))
    for unit in ("", " k", " M", " G"):
        if abs(value) < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} T"


def _operations(bops: int, full_bops: int) -> str:
    return f"{count(bops)} bit operations a sample and call, {100 * bops / full_bops:.3g} % of those at 16 bits"


def _decibels(sqnr: SignalSummary) -> str:
    return "exact" if sqnr.sqnr_db == float("inf") else f"{sqnr.sqnr_db:.2f} ± {sqnr.standard_error:.2f}"


def _estimate(value: Estimate) -> tuple[str, str, str, str]:
    return f"{value.value:.4g}", f"{value.standard_error:.2g}", f"{value.low:.4g} to {value.high:.4g}", str(value.n)


def _shapes(members: Sequence[Mapping[str, object]]) -> str:
    shapes = {"x".join(map(str, m["shape"])) for m in members}  # type: ignore[call-overload]  # a list of sizes
    return shapes.pop() if len(shapes) == 1 else f"{len(shapes)} shapes"


def _formats(members: Sequence[Mapping[str, object]]) -> str:
    """Such as `3 kmc3, uaq8`: how many layers have which format."""
    counts = Counter(str(m["format"]) for m in members)
    return ", ".join(f"{n} {name}" if n > 1 else name for name, n in sorted(counts.items()))


def _sum(members: Sequence[Mapping[str, object]], key: str) -> float:
    return sum(float(str(m[key])) for m in members)
