"""Maps of a size that people have: 28 blocks by 50 steps, and 300 layers; from seeds."""

from __future__ import annotations

import math

import numpy as np
from report_examples import estimate

from sedimo.reporting.measured_maps import ChannelRanges, NoiseMap, Repetition, TrajectoryLines


def noise_map(n_blocks=28, n_steps=50, number_format="") -> NoiseMap:
    rng = np.random.default_rng(3)
    depth, progress = np.mgrid[0:n_blocks, 0:n_steps] / [[[n_blocks]], [[n_steps]]]
    values = 32 - 14 * depth - 6 * progress + 3 * np.sin(9 * depth) + rng.normal(0, 0.7, depth.shape)
    values[0] = math.inf
    blocks = ("pos_embed.proj", *(f"transformer_blocks.{i}" for i in range(n_blocks - 2)), "proj_out_2")
    return NoiseMap(
        blocks=blocks[:n_blocks],
        timesteps=tuple(float(t) for t in np.linspace(999, 19, n_steps).round()),
        sqnr_db=tuple(map(tuple, values.tolist())),
        standard_error=tuple(map(tuple, np.full(values.shape, 0.4).tolist())),
        n=8,
        number_format=number_format,
    )


def trajectory_lines(n_steps=50) -> TrajectoryLines:
    t = np.linspace(0, 1, n_steps)
    rng = np.random.default_rng(4)
    lines = [level + rng.normal(0, 0.2, n_steps) for level in (18 - 5 * t, 18 - 11 * t**0.7, 40 - 27 * t**0.4)]
    return TrajectoryLines(
        tuple(float(x) for x in np.linspace(999, 19, n_steps).round()),
        *(tuple(estimate(float(v), 0.5 + 0.4 * float(x), 8) for v, x in zip(line, t, strict=True)) for line in lines),
    )


def repetition(n_blocks=27, n_steps=10) -> Repetition:
    """Eleven layers a block, and three outside."""
    rng = np.random.default_rng(5)
    attention = [f"attn{a}.{p}" for a in (1, 2) for p in ("to_q", "to_k", "to_v", "to_out.0")]
    inside = ["norm1.linear", *attention, "ff.net.0.proj", "ff.net.2"]
    names = [("pos_embed.proj", ""), *((f"blocks.{b}.{x}", f"blocks.{b}") for b in range(n_blocks) for x in inside)]
    names += [("caption.linear", ""), ("proj_out", "")]
    n = len(names)
    kinds, place = np.arange(n) % len(inside), np.arange(n) / n
    alike = 0.35 * (kinds[:, None] == kinds) + 0.6 * np.exp(-np.abs(place[:, None] - place) * 6)
    matrices = [np.clip(alike + rng.normal(0, 0.04, (n, n)) - 0.15 * s, 0, 1) for s in (0.5, 0, 1)]
    rows = np.triu_indices(n, 1)
    theta = np.exp(-3 * matrices[0].mean(0) / matrices[0].mean(0).max())
    theta /= theta.max()
    per_step = np.clip(theta + rng.normal(0, 0.05, (n_steps, n)), 0, 1) * np.linspace(1, 0.6, n_steps)[:, None]
    per_step[:, 0] = math.nan
    return Repetition(
        layers=tuple(name for name, _ in names),
        blocks=tuple(block for _, block in names),
        bits=tuple(float(b) for b in np.where(theta > np.median(theta), 6, rng.integers(2, 5, n))),
        timesteps=tuple(float(x) for x in np.linspace(999, 99, n_steps).round()),
        n=32,
        upper={
            name: tuple(m[rows].round(3).tolist()) for name, m in zip(("mean", "first", "last"), matrices, strict=True)
        },
        theta=tuple(theta.tolist()),
        standard_error=tuple(np.full(n, 0.02).tolist()),
        per_step=tuple(map(tuple, per_step.tolist())),
        converged=tuple(1 - 0.5 * 0.6 ** np.arange(n_steps)),
    )


def channel_ranges(n_channels=1152) -> ChannelRanges:
    rng = np.random.default_rng(6)
    scale = np.exp(rng.normal(0, 0.5, n_channels))
    scale[rng.integers(0, n_channels, 8)] *= 14
    low, high = -scale * rng.uniform(0.6, 1.4, n_channels), scale * rng.uniform(0.6, 1.4, n_channels)
    smooth = np.maximum(-low, high) ** 0.7
    return ChannelRanges(
        "transformer_blocks.3.ff.net.2", *(tuple(v.tolist()) for v in (low, high, low / smooth, high / smooth))
    )
