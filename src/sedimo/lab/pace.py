"""How long work takes on this machine, told before it starts.

Seconds come from one timed denoiser call (see `Lab.time_calls`) and one timed fit. Where the number of operations alone
says that a call would take too long, none is timed.
"""

from __future__ import annotations

import torch

from sedimo.lab.lab import SAMPLE_CHANNELS, Lab

PATIENCE_SECONDS = 30 * 60
ROWS_PER_SAMPLE = 2  # with guidance
FASTEST_MACS_PER_SECOND = {"cpu": 5e11, "other": 1e15}  # of any such device: a lower bound of time


def seconds_of_fits(lab: Lab) -> float:
    """Seconds of fitting every format in full."""
    return sum(d.params * len(d.formats) for d in lab.space.decisions) * lab.seconds_per_fit


def seconds_of_estimates(lab: Lab) -> float:
    """Seconds of errors from some output channels, and of fitting the chosen formats."""
    decisions = lab.space.decisions
    sampled = sum(min(1.0, SAMPLE_CHANNELS / d.shape[0]) * d.params * len(d.formats) for d in decisions)
    return (sampled + lab.space.params) * lab.seconds_per_fit


def too_slow(what: str, seconds: float, how_sure: str = "about") -> str:
    """That something takes too long, in words."""
    return f"{what} would take {how_sure} {max(1, round(seconds / 60))} minutes"


def why_too_slow(lab: Lab, n_rows: int, what: str) -> str | None:
    """Whether operations alone say that so many denoiser rows take longer than half an hour."""
    device = lab.subject.compute.device or ("cuda" if torch.cuda.is_available() else "cpu")
    speed = FASTEST_MACS_PER_SECOND.get(device, FASTEST_MACS_PER_SECOND["other"])
    seconds = ROWS_PER_SAMPLE * n_rows * lab.graph.macs / speed
    return too_slow(what, seconds, "at least") if seconds > PATIENCE_SECONDS else None
