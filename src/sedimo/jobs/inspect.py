"""Show layers, operation types, blocks, groups, sizes and MACs of a denoiser."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from sedimo.checkpoint.reading import Checkpoint, is_packed, open_checkpoint
from sedimo.graph.model import inspect_summary
from sedimo.jobs.describe import recipe_of
from sedimo.jobs.job import simple_job
from sedimo.lab.bench import trace
from sedimo.pipelines.loading import load_architecture, load_pipeline, locate
from sedimo.pipelines.weights import FileWeights, denoiser_folder, stored_dtype
from sedimo.quant.parts import entry_text
from sedimo.reporting.page import Page, Table, Text, columns, page_of, rows
from sedimo.reporting.words import count, packed_sizes
from sedimo.settings import Option


def run(
    source: Annotated[str, Option((), "A diffusers folder, a hub id, or zoo:NAME.", metavar="SRC")],
    variant: Annotated[str | None, Option(("--variant",), "Variant of the source's weights, such as fp16.")] = None,
) -> dict[str, object]:
    """Layers, operations, blocks, groups, sizes and MACs; of a packed checkpoint, the `format` of each layer, too."""
    _, folder = locate(source, variant)
    inner = denoiser_folder(folder)
    if not is_packed(inner):
        dtype = stored_dtype(FileWeights(inner, variant).files)
        return dict(inspect_summary(trace(load_pipeline(inner, device="cpu", dtype=dtype, variant=variant))))
    checkpoint = open_checkpoint(inner, variant=variant)
    graph = replace(trace(load_architecture(inner)), ties=_ties(checkpoint))
    formats = {name: entry_text(entry) for name, entry in recipe_of(checkpoint).layers.items()}
    sizes = {"file_bytes": checkpoint.file_bytes, "stored_bytes": checkpoint.stored_bytes}
    return {**inspect_summary(graph, formats), **sizes}


def _ties(checkpoint: Checkpoint) -> tuple[tuple[str, ...], ...]:
    """The sets of layers that are stored once."""
    sets: dict[str, list[str]] = {}
    for name, owner in checkpoint.configuration.owners.items():
        sets.setdefault(owner, []).append(name)
    return tuple(tuple(members) for members in sets.values() if len(members) > 1)


def page(found: Mapping[str, Any]) -> Page:
    """Totals, then one line per operation type."""
    by_operation: dict[str, list[Mapping[str, Any]]] = {}
    for layer in found["layers"]:
        by_operation.setdefault(layer["operation"], []).append(layer)
    headline = (
        f"{found['n_layers']} layers, {found['n_decisions']} decisions, {found['n_groups']} groups, "
        f"{count(found['params'])} weights, {count(found['macs'])} MACs a call"
    )
    titles = columns("operation", "layers", "shape", ("weights", "count"), ("MACs", "count"))
    lines = [
        [name, len(members), _shapes(members), *(sum(layer[key] for layer in members) for key in ("params", "macs"))]
        for name, members in by_operation.items()
    ]
    packed = ""
    if "stored_bytes" in found:
        titles = (*titles, *columns("formats"))
        formats = (_formats(layer["format"] for layer in members) for members in by_operation.values())
        lines = [[*line, text] for line, text in zip(lines, formats, strict=True)]
        packed = packed_sizes(found["stored_bytes"], found["file_bytes"])
    return page_of(found["denoiser"], headline, Table(titles, rows(lines)), Text(packed))


def _shapes(members: Sequence[Mapping[str, Any]]) -> str:
    shapes = {"x".join(map(str, m["shape"])) for m in members}
    return shapes.pop() if len(shapes) == 1 else f"{len(shapes)} shapes"


def _formats(formats: Iterable[str]) -> str:
    """Such as `3 kmc3, uaq8`: how many layers have which format."""
    return ", ".join(f"{n} {name}" if n > 1 else name for name, n in sorted(Counter(formats).items()))


JOB = simple_job(__doc__, run, page)
