"""The colours of a report in light and dark, by role.

Bits are an ordinal ramp (yellow, green, blue; told apart without red-green vision and in grey print), in which
more bits stand out more: darker on paper, brighter on a dark screen. `on...` is the ink on such a cell. A test
holds every pair to the contrast that WCAG 2.2 asks for.
"""

from __future__ import annotations

from collections.abc import Mapping

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
