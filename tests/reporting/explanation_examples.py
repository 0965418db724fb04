"""Realistic explanations for the tests of reports: of the DiT in `report_examples`, and one as large as SDXL's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
from report_examples import dit_summary, estimate

from sedimo.methods.predictor.quality import FoldRow, Insight, PredictorRow
from sedimo.methods.search import Round
from sedimo.metrics.estimate import Estimate
from sedimo.reporting.explanation import (
    CurvePoint,
    Explanation,
    FinalistRow,
    FormatShare,
    score_boxes,
    verdict_of,
)
from sedimo.reporting.figures import ScoreBox
from sedimo.reporting.summary import Summary

BAND = "3.4 to 3.6 bits"
_BASELINES = {
    "additive model": (0.93, 0.61),
    "ridge on one-hot choices": (0.92, 0.55),
    "sum of ablation costs": (0.9, 0.58),
    "weight error": (0.84, 0.21),
    "average bits": (0.87, 0.02),
}


def interval(value: float, half: float, n: int) -> Estimate:
    return Estimate(value, half / 1.96, value - half, value + half, n)


def quality(predictor: str, subset: str, srcc: float, n: int, *, is_used: bool = False) -> PredictorRow:
    half = 1.9 * (1 - srcc**2) / n**0.5 + 0.004
    other = None if is_used else interval((0.95 if subset == "all" else 0.74) - srcc, 0.8 * half, n)
    return PredictorRow(
        predictor,
        subset,
        n,
        srcc=interval(srcc, half, n),
        kendall_tau=interval(0.78 * srcc, half, n),
        ndcg_at_10=interval(0.4 + 0.55 * srcc, half, n),
        mae=interval(1.1 - 0.9 * srcc, 0.4 * half, n),
        is_used=is_used,
        advantage=other,
    )


def predictor_rows() -> tuple[PredictorRow, ...]:
    rows = [quality("graph network", s, v, n, is_used=True) for s, v, n in (("all", 0.95, 480), (BAND, 0.74, 96))]
    for name, values in _BASELINES.items():
        rows += [quality(name, s, v, n) for s, v, n in zip(("all", BAND), values, (480, 96), strict=True)]
    return tuple(rows)


def boxes(names: Mapping[str, float], seed: int, *, spread: float = 0.5, n: int = 54) -> tuple[ScoreBox, ...]:
    """Scores around the given means; what is worse is also wider."""
    rng = np.random.default_rng(seed)
    return score_boxes(
        {k: (m - spread * (0.4 + abs(min(m, 0))) * rng.gamma(2.0, 0.5, n)).tolist() for k, m in names.items()}
    )


def curve(n_random: int, seed: int = 3) -> tuple[CurvePoint, ...]:
    rng = np.random.default_rng(seed)
    bits = rng.uniform(3.05, 4.25, n_random)
    random = tuple(
        CurvePoint(f"random {i}", "random", float(b), estimate(float(v), 0.3, 64))
        for i, (b, v) in enumerate(zip(bits, 6.1 * (bits - 2.85) + rng.normal(0.4, 0.9, n_random), strict=True))
    )
    uniform = (("uaq3", 3.12, 1.0), ("kmc3", 3.54, 4.6), ("kma3", 3.01, 0.4), ("uaq4", 4.12, 7.3), ("kmc4", 4.2, 9.9))
    return (
        *random,
        *(CurvePoint(f"uniform {f}", "uniform", b, estimate(v, 0.26, 64)) for f, b, v in uniform),
        *(
            CurvePoint("ablation", "uniform", b, estimate(v, 0.29, 64))
            for b, v in ((3.25, 7.1), (3.5, 9.1), (4.0, 12.2))
        ),
        CurvePoint("weight error", "uniform", 3.5, estimate(7.4, 0.3, 64)),
        *(
            CurvePoint("graph network", "this", b, estimate(v, 0.28, 64))
            for b, v in ((3.1, 5.3), (3.25, 7.9), (3.5, 10.2), (3.75, 11.9), (4.0, 13.1), (4.25, 14.2))
        ),
    )


def insights() -> tuple[Insight, ...]:
    adaln = tuple(f"transformer_blocks.{i}.norm1.linear" for i in range(6))
    queries = tuple(f"transformer_blocks.{i}.attn1.{q}" for i in range(6) for q in ("to_q", "to_k"))
    texts = (
        "The AdaLN projections (`norm1.linear`) cause most of the loss: they hold 32 % of the weights, and 5 bits "
        "instead of 3 there help more than anywhere else.",
        "The last layer, `proj_out_2`, must not go below 8 bits.",
        "Queries and keys of self-attention can do with 2 bits.",
        "Block 3 wants a grid in groups rather than a codebook.",
        "One codebook for the whole layer is enough for `pos_embed.proj`.",
    )
    found = (
        (adaln, "kmc3", "kmc5", 2.4, (1.7, 3.1), estimate(2.9, 0.21, 64)),
        (("proj_out_2",), "uaq8", "kmc3", -4.1, (-5.2, -3.0), estimate(-3.6, 0.4, 64)),
        (queries, "kmc3", "kmc2", 0.1, (-0.3, 0.5), estimate(-0.62, 0.14, 64)),
        (("transformer_blocks.3.ff.net.2",), "kmc3", "uaq3g64", 0.15, (-0.1, 0.4), estimate(0.08, 0.12, 64)),
        (("pos_embed.proj",), "kmc4", "kma4", -0.02, (-0.1, 0.06), None),
    )
    return tuple(
        Insight(text, d, a, b, p, low, high, m, verdict_of(p, m))
        for text, (d, a, b, p, (low, high), m) in zip(texts, found, strict=True)
    )


def shares(summary: Summary) -> tuple[FormatShare, ...]:
    counts: dict[str, dict[str, int]] = {}
    for cost in summary.chosen:
        operation, text = summary.table.operations[cost.decision], str(cost.format)
        found = counts.setdefault(operation.removeprefix("transformer_blocks."), {})
        found[text] = found.get(text, 0) + len(summary.table.layers[cost.decision])
    groups = {name: summary.operations[name] for name in counts if name in summary.operations}
    return tuple(
        FormatShare(name, counts[name], summary.params(group), summary.paper_bits(group))
        for name, group in groups.items()
    )


@cache
def dit_explanation() -> Explanation:
    summary = dit_summary()
    rng = np.random.default_rng(5)
    means = {"norm1.linear": -1.9, "proj_out_2": -1.2, "ff.net.2": -0.5}
    operations = {name: means.get(name, float(rng.normal(0.2, 0.25))) for name in summary.operations}
    blocks = {f"transformer_blocks.{i}": m for i, m in enumerate((-0.9, -0.2, 0.1, -0.6, 0.2, -0.1))}
    folds = tuple(
        FoldRow(
            f, h, subset, *(estimate(float(v), 0.03, 96) for v in rng.normal((0.9 - 0.05 * h, 0.7, 0.9, 0.4), 0.03))
        )
        for subset in ("all", "3.25 to 3.75 bits")
        for f in range(4)
        for h in range(5)
    )
    return Explanation(
        predictor="graph network",
        target="SQNR [dB]",
        n_trials=480,
        objective="final_latents",
        operation_boxes=boxes(operations, 1),
        block_boxes=boxes({**blocks, "outside blocks": 0.1}, 2),
        format_shares=shares(summary),
        predictors=predictor_rows(),
        folds=folds,
        curve=curve(400),
        insights=insights(),
        rounds=tuple(
            Round(i, 480 + 40 * i, estimate(v, 0.28, 64), p)
            for i, (v, p) in enumerate(((9.1, 9.9), (9.8, 10.4), (10.2, 10.3)), start=1)
        ),
        finalists=(
            FinalistRow("built by the predictor", 3.49, estimate(10.3, 0.28, 16), None),
            FinalistRow("by jacobian alone", 3.5, estimate(9.9, 0.3, 16), estimate(0.4, 0.12, 16)),
        ),
        notes=("12 of 492 trials diverged and were left out.",),
    )


@cache
def large_explanation() -> Explanation:
    """34 operations, 87 blocks, 20 formats."""
    rng = np.random.default_rng(8)
    inner = [f"transformer_blocks.{a}.{q}" for a in ("attn1", "attn2") for q in ("to_q", "to_k", "to_v", "to_out.0")]
    names = [f"{k}.{n}" for k in ("down", "mid", "up") for n in (*inner, "ff.net.0.proj", "ff.net.2", "resnets.conv1")]
    names.append("a_rather_long_module_path.with_many_parts.time_embedding.linear_1")
    blocks = [f"down_blocks.{i}.{k}.{j}" for i in range(3) for j in range(2) for k in ("resnets", "attentions")]
    blocks += [f"down_blocks.2.attentions.{i}.transformer_blocks.{j}" for i in range(2) for j in range(10)]
    blocks += ["mid_block.resnets.0", *(f"mid_block.attentions.0.transformer_blocks.{j}" for j in range(10))]
    blocks += [f"up_blocks.0.attentions.{i}.transformer_blocks.{j}" for i in range(3) for j in range(10)]
    blocks += [f"up_blocks.{i}.{k}.{j}" for i in range(2) for j in range(3) for k in ("resnets", "attentions")]
    formats = [*(f"uaq{b}" for b in (2, 3, 4, 5, 6, 8)), *(f"uaq{b}g64" for b in (3, 4, 5, 6)), "fp16"]
    formats += [*(f"kmc{b}" for b in (2, 3, 4, 5)), *(f"kma{b}" for b in (2, 3, 4, 5, 6))]

    def share(name: str) -> FormatShare:
        counts = {f: int(n) for f, n in zip(formats, rng.poisson(rng.gamma(0.5, 2.0, len(formats))), strict=True)}
        return FormatShare(name, counts | {"kmc3": 1 + counts["kmc3"]}, 10**7, float(rng.uniform(2.5, 6)))

    return replace(
        dit_explanation(),
        operation_boxes=boxes(_random_means(names, rng), 4, n=400),
        block_boxes=boxes(_random_means(blocks, rng), 5, n=200),
        format_shares=tuple(share(name) for name in names),
        curve=curve(500),
    )


def _random_means(names: Sequence[str], rng: np.random.Generator) -> dict[str, float]:
    return {name: float(rng.normal(0, 0.6)) for name in names}


def explained(explanation: Explanation) -> Summary:
    summary = dit_summary()
    return replace(summary, evidence=replace(summary.evidence, explanation=explanation))
