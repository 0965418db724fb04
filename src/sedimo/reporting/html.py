"""One HTML file that holds the whole report: no network, no script, readable in light, dark and on paper."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from sedimo.errors import InputError
from sedimo.pipelines.folder import write_file
from sedimo.quant.formats import Format
from sedimo.reporting import charts, phrasing
from sedimo.reporting.explanation_page import explanation_view
from sedimo.reporting.glossary import EXPLANATION_GLOSSARY, GLOSSARY
from sedimo.reporting.images import AMPLIFICATION, SMALL_PIXELS, show_pictures
from sedimo.reporting.map_chart import mark_svg, panel_svg
from sedimo.reporting.maps_view import maps_view
from sedimo.reporting.palette import DARK, LIGHT, properties
from sedimo.reporting.placement import OUTSIDE, Panel, panels
from sedimo.reporting.rounding import count, duration, share
from sedimo.reporting.summary import Choice, Sizes, Summary
from sedimo.reporting.tables import bits_bar, comparison, decision_lines
from sedimo.reporting.theme import bit_level

MAX_BYTES = 5_000_000
_PICTURE_BYTES = 3_200_000
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")

Theme = Literal["light", "dark"]


def write_report(summary: Summary, path: str | Path) -> Path:
    """Writes the report of a summary and returns its path; an existing file is replaced at once or not at all.

    Raises:
        InputError: the folder does not exist, or the report would exceed 5 MB.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise InputError(f"the report's folder must exist, got {str(target.parent)!r}. Create it first.")
    content = render(summary).encode()
    if len(content) >= MAX_BYTES:
        raise InputError(
            f"a report must stay under {MAX_BYTES} bytes, this one has {len(content)}; give fewer recipes."
        )
    write_file(target, content)
    return target


def render(summary: Summary, *, theme: Theme | None = None) -> str:
    """The report as HTML text; `theme` fixes light or dark, which is otherwise the reader's setting."""
    return page("report.html.j2", _context(summary, theme))


def page(template: str, context: Mapping[str, object]) -> str:
    """A template of this package, filled; the style is the report's unless the context has its own."""
    environment = Environment(
        loader=FunctionLoader(_resource),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = _prose
    environment.filters["breakable"] = _breakable
    filled = environment.get_template(template).render({"theme": None, "style": Markup(_style()), **context})
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", filled)


def _context(summary: Summary, theme: Theme | None) -> dict[str, object]:
    shown = panels(summary.decisions)
    pictures = show_pictures(summary.evidence.pictures, budget_bytes=_PICTURE_BYTES)
    compared = comparison(summary)
    is_tiny = bool(pictures) and pictures[0].is_small
    found, cost_name = summary.evidence.explanation, "noise" if summary.choice.is_noise else "cost"
    return {
        "s": summary,
        "x": explanation_view(found, here=summary.sizes.paper_bits) if found else None,
        "maps": maps_view(summary.evidence.maps),
        "theme": theme,
        "style": Markup(_style() + ("\n" + _resource("explanation.css") if found else "")),  # our own constants
        "headline": phrasing.headline(summary),
        "tiles": phrasing.tiles(summary),
        "decided": phrasing.decision_sentences(summary),
        "reasons": phrasing.reason_sentences(summary),
        "warnings": phrasing.warning_sentences(summary),
        "method_text": phrasing.method_sentence(summary),
        "cost_name": cost_name,
        "bar": bits_bar(summary),
        "levels": sorted({bit_level(d.format.bits) for d in summary.decisions}),
        "marks": _marks(summary),
        "has_copies": any(cell.is_copy for panel in shown for cell in panel.cells),
        "panels": [{"title": _panel_title(p), "svg": Markup(panel_svg(p, cost_name=cost_name))} for p in shown],
        "table": decision_lines(summary),
        "charts": _charts(summary),
        "cost": compared,
        "pictures": pictures,
        "n_pictures_left_out": len(summary.evidence.pictures) - len(pictures),
        "amplification": AMPLIFICATION,
        "card_width": 18 if is_tiny else 24,
        "facts": _facts(summary),
        "notes": [*summary.choice.notes, *summary.provenance.notes],
        "glossary": (*GLOSSARY, *EXPLANATION_GLOSSARY) if found else GLOSSARY,
        "footer": _footer(summary),
        "small_pixels": SMALL_PIXELS,
    }


def _charts(summary: Summary) -> Mapping[str, Markup]:
    evidence = summary.evidence
    has_noise = any(g.n_reference and g.reference_cost > 0 for g in summary.operations)
    n_measured = sum("sqnr_db" in r.measures for r in evidence.recipes)
    drawn = {
        "operations": charts.operations_chart(summary) if has_noise else "",
        "blocks": charts.blocks_chart(summary) if has_noise and len(summary.blocks) > 1 else "",
        "recipes": charts.recipes_chart(summary) if n_measured > 1 else "",
        "frontier": charts.frontier_chart(summary) if len(evidence.frontier) > 1 else "",
        "agreement": charts.agreement_chart(summary),
    }
    return {name: Markup(svg) for name, svg in drawn.items()}  # texts in them are escaped


def _marks(summary: Summary) -> list[dict[str, object]]:
    found: dict[str, Format] = {}
    for decision in summary.decisions:
        found.setdefault(phrasing.family(decision.format), decision.format)
    order = [name for name in phrasing.FAMILIES if name in found and name != "fp"]
    return [{"svg": Markup(mark_svg(found[name])), "text": phrasing.FAMILIES[name], "name": name} for name in order]


def _panel_title(panel: Panel) -> str:
    return (
        "Layers outside all blocks"
        if panel.kind == OUTSIDE
        else f"{len(panel.columns)} \N{MULTIPLICATION SIGN} {panel.kind}"
    )


def _facts(summary: Summary) -> list[tuple[str, str]]:
    choice, origin = summary.choice, summary.provenance
    found = [
        ("Sensitivity by", choice.method),
        ("Chosen by", choice.rule if choice.decided_by == choice.rule else f"{choice.rule}, at most {_limits(choice)}"),
        ("Bit operations", _operations(summary.sizes)),
        ("Denoiser", summary.denoiser),
        ("Seeds", origin.seeds),
        *((key.removeprefix("n_").replace("_", " ").capitalize(), value) for key, value in origin.sampling.items()),
        ("Time", ", ".join(f"{name} {duration(value)}" for name, value in origin.seconds.items())),
        ("Machine", origin.machine),
        ("Versions", ", ".join(f"{name} {version}" for name, version in origin.versions.items())),
        ("Made", origin.created),
    ]
    return [(key, value) for key, value in found if value]


def _limits(choice: Choice) -> str:
    accounting = "as in the papers" if choice.accounting == "paper" else "as stored"
    size = "" if choice.budget_bits is None else f"{choice.budget_bits:.3f} bits per weight {accounting}"
    bops = "" if choice.budget_bops is None else f"{count(choice.budget_bops)} bit operations"
    return " and ".join(text for text in (size, bops) if text)


def _operations(sizes: Sizes) -> str:
    """Of one sample and call; nothing where nobody counted."""
    if not sizes.full_bops:
        return ""
    return (
        f"{count(sizes.bops)} a sample and denoiser call, {share(sizes.bops / sizes.full_bops)} of those at 16 bits; "
        f"the products of attention are {count(sizes.attention_bops)} of them in any case"
    )


def _footer(summary: Summary) -> str:
    created = summary.provenance.created
    return f"Made by Sedimo{' on ' + created if created else ''}. This page needs no network."


def _style() -> str:
    light, dark = properties(LIGHT), properties(DARK)
    inks = " ".join(
        f"svg.map .b{n} {{ fill: var(--b{n}); }} svg.map text.on{n}, svg.map .on{n}.filled {{ fill: var(--on{n}); }} "
        f"svg.map .on{n}.line {{ stroke: var(--on{n}); }}"
        for n in (2, 3, 4, 5, 6, 7, 8, 16)
    )
    return (
        f":root {{ {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
        f':root[data-theme="light"] {{ color-scheme: light; {light} }}\n'
        f':root[data-theme="dark"] {{ color-scheme: dark; {dark} }}\n'
        f"{_resource('report.css')}\n{inks}\n"
        f"@media print {{ :root, :root[data-theme] {{ color-scheme: light; {light} }} }}"
    )


def _prose(text: str) -> Markup:
    """Escaped text in which backticks become code and asterisks emphasis."""
    parts: Sequence[str] = text.split("`")
    if len(parts) % 2 == 0:
        return Markup(escape(text))
    made = [
        f"<code>{escape(part)}</code>" if i % 2 else re.sub(r"\*([^*]+)\*", r"<em>\1</em>", str(escape(part)))
        for i, part in enumerate(parts)
    ]
    return Markup("".join(made))  # every part was escaped


def _breakable(name: str) -> Markup:
    """An escaped dotted name that may be broken after its dots."""
    return Markup(".<wbr>").join(name.split("."))  # join escapes the parts


def _resource(name: str) -> str:
    return resources.files("sedimo.reporting").joinpath("templates", name).read_text(encoding="utf-8")
