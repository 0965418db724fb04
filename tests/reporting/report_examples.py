"""Realistic summaries for the tests of reports: a DiT of 57 layers and a U-Net of 282, from seeds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np

from sedimo.allocation.combine import agreement
from sedimo.allocation.solve import allocate, frontier
from sedimo.allocation.table import Cost, SensitivityTable
from sedimo.metrics.estimate import Estimate, with_interval
from sedimo.metrics.signal import PairedDifference
from sedimo.quant.formats import FP16, WIDE_FORMATS, Format, paper_bytes, stored_bytes
from sedimo.reporting.page import Picture
from sedimo.reporting.summary import Evidence, MeasuredRecipe, Provenance, Summary

Layer = tuple[str, str, str, tuple[int, ...], tuple[str, ...]]  # name, operation, block, shape, layers

_NOISE = {"uaq": 1.6, "kmc": 1.0, "kma": 1.35, "fp": 0.0}


def operation_of(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdigit())


def dit_layers(n_blocks: int = 6, hidden: int = 256) -> Iterator[Layer]:
    yield "pos_embed.proj", "pos_embed.proj", "", (hidden, 4, 2, 2), ("pos_embed.proj",)
    for name, shape in (("linear_1", (hidden, 256)), ("linear_2", (hidden, hidden))):
        layers = tuple(f"transformer_blocks.{i}.norm1.emb.timestep_embedder.{name}" for i in range(n_blocks))
        yield layers[0], operation_of(layers[0]), "transformer_blocks.0", shape, layers
    inside = {
        "norm1.linear": (6 * hidden, hidden),
        "attn1.to_q": (hidden, hidden),
        "attn1.to_k": (hidden, hidden),
        "attn1.to_v": (hidden, hidden),
        "attn1.to_out.0": (hidden, hidden),
        "ff.net.0.proj": (4 * hidden, hidden),
        "ff.net.2": (hidden, 4 * hidden),
    }
    for i in range(n_blocks):
        for local, shape in inside.items():
            name = f"transformer_blocks.{i}.{local}"
            yield name, operation_of(name), f"transformer_blocks.{i}", shape, (name,)
    yield "proj_out_1", "proj_out_1", "", (2 * hidden, hidden), ("proj_out_1",)
    yield "proj_out_2", "proj_out_2", "", (16, hidden), ("proj_out_2",)


def unet_layers() -> Iterator[Layer]:  # noqa: C901  # a table in the form of loops
    """The layers of Stable Diffusion 1.5 by name, with its blocks."""

    def plain(name: str, shape: tuple[int, ...], block: str = "") -> Layer:
        return name, operation_of(name), block, shape, (name,)

    def resnet(path: str, wide: int, inputs: int) -> Iterator[Layer]:
        yield plain(f"{path}.conv1", (wide, inputs, 3, 3), path)
        yield plain(f"{path}.time_emb_proj", (wide, 1280), path)
        yield plain(f"{path}.conv2", (wide, wide, 3, 3), path)
        if inputs != wide:
            yield plain(f"{path}.conv_shortcut", (wide, inputs, 1, 1), path)

    def attention(path: str, wide: int) -> Iterator[Layer]:
        inner = f"{path}.transformer_blocks.0"
        yield plain(f"{path}.proj_in", (wide, wide, 1, 1), path)
        for part in ("attn1", "attn2"):
            for local in ("to_q", "to_k", "to_v", "to_out.0"):
                n_inputs = 768 if part == "attn2" and local in ("to_k", "to_v") else wide
                yield plain(f"{inner}.{part}.{local}", (wide, n_inputs), inner)
        yield plain(f"{inner}.ff.net.0.proj", (8 * wide, wide), inner)
        yield plain(f"{inner}.ff.net.2", (wide, 4 * wide), inner)
        yield plain(f"{path}.proj_out", (wide, wide, 1, 1), path)

    widths = (320, 640, 1280, 1280)
    yield plain("conv_in", (320, 4, 3, 3))
    yield plain("time_embedding.linear_1", (1280, 320))
    yield plain("time_embedding.linear_2", (1280, 1280))
    for i, wide in enumerate(widths):
        for j in range(2):
            yield from resnet(f"down_blocks.{i}.resnets.{j}", wide, wide if j else (320, *widths)[i])
            if i < 3:
                yield from attention(f"down_blocks.{i}.attentions.{j}", wide)
        if i < 3:
            yield plain(f"down_blocks.{i}.downsamplers.0.conv", (wide, wide, 3, 3), f"down_blocks.{i}")
    yield from resnet("mid_block.resnets.0", 1280, 1280)
    yield from attention("mid_block.attentions.0", 1280)
    yield from resnet("mid_block.resnets.1", 1280, 1280)
    for i, wide in enumerate(reversed(widths)):
        for j in range(3):
            yield from resnet(f"up_blocks.{i}.resnets.{j}", wide, 2 * wide)
            if i > 0:
                yield from attention(f"up_blocks.{i}.attentions.{j}", wide)
        if i < 3:
            yield plain(f"up_blocks.{i}.upsamplers.0.conv", (wide, wide, 3, 3), f"up_blocks.{i}")
    yield plain("conv_out", (4, 320, 3, 3))


def make_table(layers: list[Layer], seed: int, *, formats: tuple[Format, ...] = WIDE_FORMATS) -> SensitivityTable:
    rng = np.random.default_rng(seed)
    costs = []
    for position, (name, operation, _, shape, _) in enumerate(layers):
        weights = int(np.prod(shape))
        level = 2.0 * (weights / 1e6) ** 0.7 / len(layers) ** 0.5
        level *= {"to_q": 0.15, "to_k": 0.15}.get(operation.split(".")[-1], 1.0) * float(np.exp(rng.normal(0, 0.5)))
        level *= 40.0 if "out_2" in name or "conv_out" in name else 1.0
        level *= 1.5 if "norm1" in name else 1.0 + position / len(layers)
        for f in [f for f in formats if not f.is_quantized or stored_bytes(f, shape) < 2 * weights] or [FP16]:
            noise = level * 4.0**-f.bits * _NOISE[f.family] * float(np.exp(rng.normal(0, 0.15)))
            cost = noise * (0.45 if f.group_size else 1.0)
            error = 0.12 * cost * float(np.exp(rng.normal(0, 0.3)))
            sizes = paper_bytes(f, shape), stored_bytes(f, shape)
            costs.append(Cost(name, f, cost, error, 8, *sizes, weights * 16 * f.bits))
    return SensitivityTable(
        method="ablation",
        unit="relative noise power",
        denoiser="transformer",
        costs=tuple(costs),
        layers={name: names for name, _, _, _, names in layers},
        operations={name: operation for name, operation, *_ in layers},
        blocks={name: block for name, _, block, *_ in layers},
        params={name: int(np.prod(shape)) for name, _, _, shape, _ in layers},
        settings={"objective": "final_latents"},
    )


def estimate(value: float, error: float, n: int) -> Estimate:
    return with_interval(value, error, n, n_replicates=n)


def ahead(value: float, error: float, n: int) -> PairedDifference:
    found = estimate(value, error, n)
    return PairedDifference(found.value, found.standard_error, found.low, found.high, n, n_exact=0)


def make_pictures(n: int, size: int, seed: int = 0) -> tuple[Picture, ...]:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    made = []
    for i in range(n):
        phase, tint = rng.uniform(0, 6, 3), rng.uniform(0.3, 1, 3)
        base = 0.5 + 0.4 * np.sin(6 * x[..., None] * tint + phase) * np.cos(5 * y[..., None] + phase[::-1])
        blob = np.exp(-40 * ((x - rng.uniform(0.3, 0.7)) ** 2 + (y - rng.uniform(0.3, 0.7)) ** 2))[..., None] * tint
        clean = np.clip(0.7 * base + 0.5 * blob, 0, 1)
        noisy = np.clip(clean + 0.03 * rng.normal(size=clean.shape) + 0.04 * np.roll(blob, 2, 0), 0, 1)
        made.append(Picture(f"class {i}, seed {1000 + i}", *((255 * a).astype(np.uint8) for a in (clean, noisy))))
    return tuple(made)


def dit_evidence(table: SensitivityTable, bits: float) -> Evidence:
    rng = np.random.default_rng(7)
    recipes = (
        MeasuredRecipe(
            f"ablation {bits}",
            bits,
            bits + 0.14,
            {
                "sqnr_db": estimate(10.21, 0.29, 64),
                "psnr_db": estimate(24.33, 0.41, 64),
                "fid": estimate(31.42, 0.55, 5000),
                "kid": estimate(0.01212, 0.00061, 5000),
            },
        ),
        MeasuredRecipe("error 3.5", 3.5, 3.63, {"sqnr_db": estimate(8.57, 0.3, 64)}, ahead(1.64, 0.19, 64)),
        MeasuredRecipe("jacobian 3.5", 3.5, 3.65, {"sqnr_db": estimate(9.66, 0.28, 64)}, ahead(0.2, 0.19, 64)),
        MeasuredRecipe("uniform kmc3", 3.54, 3.54, {"sqnr_db": estimate(4.64, 0.26, 64)}, ahead(5.57, 0.22, 64)),
        MeasuredRecipe("uniform uaq3", 3.12, 3.19, {"sqnr_db": estimate(1.02, 0.21, 64)}, ahead(9.19, 0.24, 64)),
    )
    predicted = np.exp(rng.normal(-1.6, 0.35, 30))
    measured = predicted**0.9 * np.exp(rng.normal(-0.1, 0.15, 30))
    return Evidence(
        recipes=recipes,
        agreement=agreement(predicted.tolist(), measured.tolist()),
        frontier=tuple((a.bits, a.objective) for a in frontier(table, [3.0, 3.25, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0])),
        pictures=make_pictures(8, 32),
        file_bytes=8_390_000,
        source_file_bytes=19_100_000,
    )


PROVENANCE = Provenance(
    command="sedimo quantize zoo:cifar-dit --bits 3.5 -o small --method ablation",
    created="2026-11-20 12:00 UTC",
    seeds="costs: 0 to 7; figures: 64 fresh seeds from 1000",
    sampling={"Steps": "10 while searching, 20 for figures", "Guidance": "none", "Computed in": "float32 on the CPU"},
    versions={"sedimo": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.1", "scipy": "1.17.1"},
    machine="2 cores, x86_64, Linux",
    seconds={"tracing": 1.3, "fitting": 12.4, "probing": 148.0, "allocation": 0.2, "checking": 61.0},
    notes=("pos_embed.proj: kmc3, kmc4, kmc5 would cost at least fp16 and were dropped",),
)


@cache
def dit_summary(bits: float = 3.5) -> Summary:
    layers = list(dit_layers())
    table = make_table(layers, 1)
    shapes = {name: shape for name, _, _, shape, _ in layers}
    return Summary("cifar-dit", table, allocate(table, bits=bits), shapes, dit_evidence(table, bits), PROVENANCE)


@cache
def unet_summary() -> Summary:
    """As after `quantize --no-check`: nothing was measured."""
    layers = list(unet_layers())
    table = make_table(layers, 2)
    shapes = {name: shape for name, _, _, shape, _ in layers}
    return Summary("stable-diffusion-v1-5/unet", table, allocate(table, bits=3.7), shapes)
