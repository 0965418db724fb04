"""One SVG for light and dark: charts are drawn in placeholder colours that become CSS custom properties.

matplotlib knows no `var(--ink)`. So every role has a colour that nobody would choose, and `themed_svg` replaces
these by the property of the role. The page's style sheet says what the roles look like.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from html import escape

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

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
