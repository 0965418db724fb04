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

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

LIGHT: Mapping[str, str] = {
    "paper": "#ffffff",
    "card": "#f5f6f8",
    "ink": "#1a1e23",
    "muted": "#59626d",
    "grid": "#e2e5ea",
    "surface": "#ffffff",
    "accent": "#bf3f0a",
    "accent-soft": "#e39a72",
    "other": "#4d6075",
    "good": "#1a6b3c",
    "bad": "#a3242b",
    "b2": "#fdeaa8",
    "b3": "#cbe8a6",
    "b4": "#84cfb8",
    "b5": "#45b2c6",
    "b6": "#1f78b4",
    "b7": "#2b5ba6",
    "b8": "#27388c",
    "b16": "#131a45",
    "on2": "#10202a",
    "on3": "#10202a",
    "on4": "#10202a",
    "on5": "#071d26",
    "on6": "#ffffff",
    "on7": "#ffffff",
    "on8": "#ffffff",
    "on16": "#ffffff",
    "edge": "#8d97a3",
}

DARK: Mapping[str, str] = {
    "paper": "#14171b",
    "card": "#1e2227",
    "ink": "#e7e9ec",
    "muted": "#a4adb8",
    "grid": "#323941",
    "surface": "#14171b",
    "accent": "#ff9558",
    "accent-soft": "#9c6544",
    "other": "#9db2c9",
    "good": "#74cf9b",
    "bad": "#ff9a97",
    "b2": "#3d4796",
    "b3": "#2b66a8",
    "b4": "#2c92b4",
    "b5": "#45b5b0",
    "b6": "#7ecb9f",
    "b7": "#a9dc98",
    "b8": "#d2ea9c",
    "b16": "#fff7c9",
    "on2": "#ffffff",
    "on3": "#ffffff",
    "on4": "#04141a",
    "on5": "#04141a",
    "on6": "#04141a",
    "on7": "#04141a",
    "on8": "#04141a",
    "on16": "#04141a",
    "edge": "#69737f",
}


def properties(colours: Mapping[str, str]) -> str:
    """The colours as CSS custom properties."""
    return " ".join(f"--{role}: {colour};" for role, colour in colours.items())


BIT_LEVELS = (2, 3, 4, 5, 6, 7, 8, 16)
ROLES = (
    *("ink", "muted", "grid", "surface", "accent", "accent-soft", "other"),
    *(f"b{n}" for n in BIT_LEVELS),
    *(f"on{n}" for n in BIT_LEVELS),
)
PLACEHOLDER = {role: f"#fe01{i:02x}" for i, role in enumerate(ROLES)}
POINTS_PER_INCH = 72

INK, MUTED, GRID = PLACEHOLDER["ink"], PLACEHOLDER["muted"], PLACEHOLDER["grid"]
SURFACE, ACCENT, SOFT, OTHER = (PLACEHOLDER[role] for role in ("surface", "accent", "accent-soft", "other"))

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sedimo",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 1.0,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
}


def bit_level(bits: float) -> int:
    """The level of the colour ramp that is nearest to a number of bits."""
    return min(BIT_LEVELS, key=lambda level: (abs(level - bits), level))


def bit_colour(bits: float) -> str:
    """The placeholder of a number of bits."""
    return PLACEHOLDER[f"b{bit_level(bits)}"]


def bit_ink(bits: float) -> str:
    """The placeholder of the ink that is read on the colour of a number of bits."""
    return PLACEHOLDER[f"on{bit_level(bits)}"]


def themed_svg(
    draw: Callable[[Figure], None], *, width: float, height: float, title: str, description: str, prefix: str
) -> str:
    """An SVG element that takes its colours from the page.

    `draw` fills a figure of `width` x `height` pixels; `prefix` keeps its ids apart from those of other charts.
    """
    rc = matplotlib.rc_context(_STYLE)  # type: ignore[arg-type]  # the stubs list every key as a literal
    with rc, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the reader's fonts draw the text
        figure = Figure(figsize=(width / POINTS_PER_INCH, height / POINTS_PER_INCH), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _cleaned(buffer.getvalue(), title, description, prefix, width)


def _cleaned(svg: str, title: str, description: str, prefix: str, width: float) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
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
