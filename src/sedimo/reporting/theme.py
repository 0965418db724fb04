"""The colours of a page in light and dark, and how charts take them: one SVG for both.

Bits are an ordinal ramp (yellow, green, blue; told apart without red-green vision and in grey print), in which
more bits stand out more: darker on paper, brighter on a dark screen. `on...` is the ink on such a cell. A test
holds every pair to the contrast that WCAG 2.2 asks for.

matplotlib knows no `var(--ink)`. So every role has a colour that nobody would choose, and `drawing` replaces
these by the property of the role. The page's style sheet says what the roles look like.
"""

from __future__ import annotations

from typing import Literal

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


def bit_level(bits: float) -> int:
    """The level of the colour ramp that is nearest to a number of bits."""
    return min(BIT_LEVELS, key=lambda level: (abs(level - bits), level))


def bit_colour(bits: float, role: Literal["b", "on"] = "b") -> str:
    """The placeholder of a number of bits, or of the ink that is read `on` its colour."""
    return PLACEHOLDER[f"{role}{bit_level(bits)}"]
