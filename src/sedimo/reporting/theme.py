"""The colours of a page in light and dark, and charts that take them: one SVG for both.

Bits are an ordinal ramp (yellow, green, blue; told apart without red-green vision and in grey print), in which
more bits stand out more: darker on paper, brighter on a dark screen. `on...` is the ink on such a cell. A test
holds every pair to the contrast that WCAG 2.2 asks for.

matplotlib knows no `var(--ink)`. So every role has a colour that nobody would choose, and `themed_svg` replaces
these by the property of the role. The page's style sheet says what the roles look like.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping
from html import escape
from typing import Literal

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

_COLOURS = {  # role: on paper, on a dark screen
    "paper": ("#ffffff", "#14171b"),
    "card": ("#f5f6f8", "#1e2227"),
    "ink": ("#1a1e23", "#e7e9ec"),
    "muted": ("#59626d", "#a4adb8"),
    "grid": ("#e2e5ea", "#323941"),
    "surface": ("#ffffff", "#14171b"),
    "accent": ("#bf3f0a", "#ff9558"),
    "accent-soft": ("#e39a72", "#9c6544"),
    "other": ("#4d6075", "#9db2c9"),
    "good": ("#1a6b3c", "#74cf9b"),
    "bad": ("#a3242b", "#ff9a97"),
    "b2": ("#fdeaa8", "#3d4796"),
    "b3": ("#cbe8a6", "#2b66a8"),
    "b4": ("#84cfb8", "#2c92b4"),
    "b5": ("#45b2c6", "#45b5b0"),
    "b6": ("#1f78b4", "#7ecb9f"),
    "b7": ("#2b5ba6", "#a9dc98"),
    "b8": ("#27388c", "#d2ea9c"),
    "b16": ("#131a45", "#fff7c9"),
    "on2": ("#10202a", "#ffffff"),
    "on3": ("#10202a", "#ffffff"),
    "on4": ("#10202a", "#04141a"),
    "on5": ("#071d26", "#04141a"),
    "on6": ("#ffffff", "#04141a"),
    "on7": ("#ffffff", "#04141a"),
    "on8": ("#ffffff", "#04141a"),
    "on16": ("#ffffff", "#04141a"),
    "edge": ("#8d97a3", "#69737f"),
}
LIGHT = {role: light for role, (light, _) in _COLOURS.items()}
DARK = {role: dark for role, (_, dark) in _COLOURS.items()}
PLACEHOLDER = {role: f"#fe01{i:02x}" for i, role in enumerate(_COLOURS)}
BIT_LEVELS = (2, 3, 4, 5, 6, 7, 8, 16)

INK, MUTED, GRID = PLACEHOLDER["ink"], PLACEHOLDER["muted"], PLACEHOLDER["grid"]
SURFACE, ACCENT, SOFT, OTHER = (PLACEHOLDER[role] for role in ("surface", "accent", "accent-soft", "other"))

_STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), MUTED),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor", "svg.fonttype"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.grid", "legend.frameon", "text.parse_math"), False),
    **dict.fromkeys(("axes.axisbelow", "axes.unicode_minus"), True),
    "grid.color": GRID,
    "grid.linewidth": 1.0,
    "font.family": "sans-serif",
    "font.size": 12,
    "svg.hashsalt": "sedimo",
}


def bit_level(bits: float) -> int:
    """The level of the colour ramp that is nearest to a number of bits."""
    return min(BIT_LEVELS, key=lambda level: (abs(level - bits), level))


def bit_colour(bits: float, role: Literal["b", "on"] = "b") -> str:
    """The placeholder of a number of bits, or of the ink that is read `on` its colour."""
    return PLACEHOLDER[f"{role}{bit_level(bits)}"]


def properties(colours: Mapping[str, str]) -> str:
    """The colours as CSS custom properties."""
    return " ".join(f"--{role}: {colour};" for role, colour in colours.items())


def themed_svg(
    draw: Callable[[Figure], None], *, width: float, height: float, title: str, description: str, prefix: str
) -> str:
    """An SVG element that takes its colours from the page.

    `draw` fills a figure of `width` x `height` pixels; `prefix` keeps its ids apart from those of other charts.
    """
    rc = matplotlib.rc_context(_STYLE)  # type: ignore[arg-type]  # the stubs list every key as a literal
    with rc, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the reader's fonts draw the text
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")  # 72 points make an inch
        FigureCanvasSVG(figure)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for role, colour in PLACEHOLDER.items():
        svg = svg.replace(colour, f"var(--{role})")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href="|url\()#', rf"\1#{prefix}-", svg)
    svg = re.sub(r"(font: [^;\"]*?px) [^;\"]+", r"\1 var(--sans)", svg)
    view_box = re.search(r'viewBox="[^"]+"', svg)
    opening = (
        f'<svg class="chart" xmlns:xlink="http://www.w3.org/1999/xlink" {view_box.group() if view_box else ""} '
        f'style="max-width:{width:.0f}px" role="img" aria-label="{escape(title)}. {escape(description)}">'
    )
    return re.sub(r"^<svg[^>]*>", lambda _: opening, svg, count=1)
