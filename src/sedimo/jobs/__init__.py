"""One file per thing that a command does; `JOBS` lists them, each a module that holds a `JOB`."""

from __future__ import annotations

JOBS = (
    "quantize",
    "run",
    "demo",
    "explore",
    "attribute",
    "allocate",
    "compare",
    "sweep",
    "blocks",
    "evaluate",
    "inspect",
    "diff",
    "change",
    "trials",
    "report",
)
