"""What a predictor trained on measured recipes knows about a denoiser: the records, and the page's parts about them.

A predictor gives a score to every choice (a decision at a format). Scores say where quality is lost, baselines say
whether the predictor is worth listening to, and insights were measured afterwards, each by itself. Every part may be
empty, and the page then leaves it out. Names of fields are those of `--json`; what contradicts itself is refused when
it is made or read. As everywhere, names stand between backticks and every claim has its interval beside it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sedimo.codec import to_json
from sedimo.errors import InputError
from sedimo.methods.predictor.quality import OVERALL, FoldRow, Insight, PredictorRow, Verdict
from sedimo.methods.search import Round
from sedimo.metrics.estimate import NORMAL_95, Estimate, ranked
from sedimo.quant.formats import Format
from sedimo.reporting.figures import ROW, WIDTH, Axis, Bar, Look, Marker, Plot, ScoreBox, Series, named, room, short
from sedimo.reporting.page import (
    Claim,
    Figure,
    Items,
    Legend,
    Row,
    Section,
    Swatch,
    Table,
    Text,
    columns,
    rows,
    section,
    titled,
)
from sedimo.reporting.placement import block_labels
from sedimo.reporting.words import interval, mark, name, number, with_interval

CurveKind = Literal["this", "random", "uniform"]
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
OBJECTIVES = {
    "final_latents": "at the final latents",
    "path": "along the whole path of denoising",
    "step": "at single steps of denoising",
    "fid": "on sets of finished images",
}
MAX_OPERATIONS = 48  # the worst ones are drawn
_MAX_NAMES = 3
_NUMBERS = re.compile(r"(?<![^.])\d+(?![^.])")  # whole parts of a dotted name
_BLOCK_WIDTH, _WIDEST = 10, 1040  # least width of a block's box, and of the page [px]
_MARKERS: tuple[Marker, ...] = ("s", "^", "v", "P", "X", "p", "h", "<", ">")  # of lines that are not this system's
_SUBSETS: tuple[Marker, ...] = ("o", "D", "s", "^", "v")  # of subsets of recipes, all of them first


@dataclass(frozen=True, slots=True)
class FormatShare:
    """The formats of the chosen recipe on one operation: number of layers per format, weights, bits per weight."""

    operation: str
    counts: Mapping[str, int]
    params: int
    paper_bits: float

    def __post_init__(self) -> None:
        for text in self.counts:
            Format.parse(text)
        if self.n_layers < 1 or min(self.counts.values()) < 0:
            raise InputError(f"the operation {self.operation!r} must have layers, got {dict(self.counts)}")

    @property
    def n_layers(self) -> int:
        """Layers of the operation."""
        return sum(self.counts.values())


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A recipe that was really measured [dB]; points of kind `this` or of one name form a line."""

    name: str
    kind: CurveKind
    bits: float
    measured: Estimate


@dataclass(frozen=True, slots=True)
class FinalistRow:
    """A recipe that could have been chosen, measured on the seeds of the final [dB].

    `behind` is what the chosen one is ahead of it, paired; None for the chosen one itself.
    """

    name: str
    paper_bits: float
    measured: Estimate
    behind: Estimate | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """All that the report's explanation tells.

    `predictor` was trained on `n_trials` measured recipes to predict `target` ("SQNR [dB]"), measured on
    `objective` (the trials' objective, such as `final_latents`). `operation_boxes`, `block_boxes` and `format_shares`
    are in the order of the denoiser.
    """

    predictor: str
    target: str
    n_trials: int
    objective: str
    operation_boxes: tuple[ScoreBox, ...] = ()
    block_boxes: tuple[ScoreBox, ...] = ()
    format_shares: tuple[FormatShare, ...] = ()
    predictors: tuple[PredictorRow, ...] = ()
    folds: tuple[FoldRow, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    insights: tuple[Insight, ...] = ()
    rounds: tuple[Round, ...] = ()
    finalists: tuple[FinalistRow, ...] = ()
    notes: tuple[str, ...] = ()


def score_boxes(values_by_name: Mapping[str, Sequence[float]]) -> tuple[ScoreBox, ...]:
    """The distribution of the scores of each name, in the order of the mapping.

    Quantiles are interpolated linearly; beside an endless score, the nearer of the two is taken.

    Example:
        >>> score_boxes({"to_q": [1.0, 2.0, 3.0]})
        (ScoreBox(name='to_q', n=3, low=1.1, q25=1.5, median=2.0, q75=2.5, high=2.9),)
    """
    found = []
    for key, values in values_by_name.items():
        ordered = np.sort(np.asarray(values, dtype=np.float64))
        if not ordered.size or np.isnan(ordered).any():
            raise InputError(f"the scores of {key!r} must be numbers, at least one, got {list(values)[:5]}")
        places = np.array(_QUANTILES) * (len(ordered) - 1)
        between = np.interp(places, np.arange(len(ordered)), ordered)
        nearest = ordered[np.floor(places + 0.5).astype(int)]
        found.append(ScoreBox(key, len(ordered), *np.where(np.isfinite(between), between, nearest).tolist()))
    return tuple(found)


def verdict_of(predicted_db: float, measured: Estimate | None) -> Verdict:
    """Whether a measured change went the way that was predicted; open when its 95 % interval holds zero.

    Example:
        >>> verdict_of(0.8, Estimate(1.1, 0.2, 0.7, 1.5, 64))
        'confirmed'
    """
    if measured is None:
        return "not measured"
    if predicted_db == 0 or math.isnan(predicted_db) or not (measured.low > 0 or measured.high < 0):
        return "open"
    return "confirmed" if (measured.low > 0) == (predicted_db > 0) else "refuted"


def matters_section(explanation: Explanation) -> Section:
    """What was found, each finding with what was predicted and measured."""
    e = explanation
    about = (
        f"{tally(e.insights)} Figures are changes of the whole recipe's quality if this alone is changed, with 95 % "
        "intervals in brackets; more is better."
    )
    findings = []
    for one in e.insights:
        figures = f"predicted {predicted(one)}"
        if one.measured is not None:
            n = one.measured.n
            on = f" on {n} sample{'' if n == 1 else 's'}" if n else ""
            figures += f" \N{MIDDLE DOT} measured {with_interval(one.measured, 'dB', signed=True)}{on}"
        findings.append(Claim(one.verdict, one.sentence, (figures, change(one))))
    return section(
        "matters",
        "What matters here",
        findings,
        Text(about, "quiet") if findings else None,
        Text(" ".join(statement(e))),
        Text("The evidence: scores, baselines and all measured recipes", "link", "#explanation"),
    )


def explanation_section(explanation: Explanation, *, here: float) -> Section:
    """Scores, measured recipes and the quality of predictors; `here` are the bits per weight of the page's recipe."""
    e = explanation
    rounds = Table(
        columns("round", "recipes measured", "best measured [dB]", "predicted for it [dB]"),
        rows((r.round, r.n_trials, r.best_db, r.predicted_db) for r in sorted(e.rounds, key=lambda r: r.round)),
        "In each round, recipes that the predictor thought best were measured, and it learned from them. Where "
        "measured and predicted come together, there is little left to gain.",
    )
    finalists = Table(
        columns("recipe", "bits", "measured [dB]", "behind the chosen one [dB]"),
        tuple(
            Row((one.name, one.paper_bits, one.measured, one.behind or "chosen"), is_marked=one.behind is None)
            for one in sorted(e.finalists, key=lambda one: -ranked(one.measured.value))
        ),
        f"Which of {len(e.finalists)} recipes became the result, measured on seeds that nothing was searched on, "
        "paired.",
    )
    return section(
        "explanation",
        "Explanation",
        Text(
            "The predictor was shown many measured recipes and had to tell the good ones from the bad. What it "
            "learned can be read back as a score for every choice, that is for every layer at every format."
        ),
        _operations_figure(e.operation_boxes) if e.operation_boxes else None,
        _blocks_figure(e.block_boxes) if e.block_boxes else None,
        _formats_figure(e.format_shares) if e.format_shares else None,
        curve_figure(e.curve, here=here),
        predictors_figure(e.predictors),
        predictors_table(
            _by_subset(sorted(e.predictors, key=lambda row: -ranked(row.srcc.value))),
            f"On held-out recipes. MAE is the mean absolute error of the predicted {e.target}; lower is better, "
            "for the others higher.",
        ),
        _folds(e.folds),
        titled("Rounds of refinement", rounds),
        titled("The final", finalists),
        Items(e.notes),
        Text("All numbers of this explanation as JSON", "link", to_json(e), "explanation.json"),
    )


def statement(explanation: Explanation) -> tuple[str, ...]:
    """Which predictor, on how many trials, how well it ranks recipes, and whether it beats its baselines."""
    e = explanation
    place = OBJECTIVES.get(e.objective, f"by the objective {name(e.objective)}")
    first = (
        f"All scores and predictions come from {name(e.predictor)}, which learned to predict {e.target} {place} from "
        f"{e.n_trials:,} measured recipes."
    )
    known = [row for row in _by_subset(e.predictors) if not math.isnan(row.srcc.value)]
    used = [row for row in known if row.is_used]
    if not used:
        return (first, "How well it ranks recipes that it has not seen was not measured.")
    parts = [f"{with_interval(row.srcc)} {_where(row)} (n = {row.n})" for row in used]
    quality = (
        f"On recipes that it had not seen, its rank correlation is {' and '.join(parts)}; 1 would be the true order, "
        "0 is guessing."
    )
    rivals = [[r for r in known if r.subset == row.subset and not r.is_used] for row in used]
    return (first, quality, *map(_standing, used, rivals))


def _standing(row: PredictorRow, rivals: Sequence[PredictorRow]) -> str:
    """Against the strongest baseline of the same recipes.

    By the 95 % interval of their difference on the same recipes; without it, by whether their own intervals overlap,
    which asks for more than it must.
    """
    if not rivals:
        return f"No baseline was measured {_where(row)}."
    best = max(rivals, key=lambda r: r.srcc.value)
    among = f", the strongest of {len(rivals)} baselines" if len(rivals) > 1 else ""
    rival = f"that of {name(best.predictor)}, {with_interval(best.srcc)}{among}"
    low, high, why = row.srcc.low - best.srcc.high, row.srcc.high - best.srcc.low, "the intervals overlap"
    if (ahead := best.advantage) is not None:
        difference = number(ahead.value, ahead.standard_error, signed=True)
        rival += f" (difference {', '.join(filter(None, (difference, interval(ahead))))})"
        low, high, why = ahead.low, ahead.high, "the interval of the difference holds zero"
    place = _where(row)
    start = f"{place[:1].upper()}{place[1:]}, its {number(row.srcc.value, row.srcc.standard_error)} is"
    if low > 0:
        return f"{start} above {rival}."
    if high < 0:
        return f"{start} below {rival}: the simpler rule ranks better there."
    side = "higher" if row.srcc.value > best.srcc.value else "not higher"
    return f"{start} {side} than {rival}; {why}, so no advantage is shown there."


def _where(row: PredictorRow) -> str:
    return "over all recipes" if row.subset == OVERALL else f"within {row.subset}"


def _by_subset(found: Sequence[PredictorRow]) -> list[PredictorRow]:
    order = [OVERALL, *dict.fromkeys(row.subset for row in found)]
    return sorted(found, key=lambda row: order.index(row.subset))


_OUTCOMES: dict[Verdict, str] = {
    "confirmed": "confirmed",
    "refuted": "refuted (it went the other way)",
    "open": "open (the measurement shows no change)",
}


def tally(insights: Sequence[Insight]) -> str:
    """How many predictions were put to the test, and how they fared."""
    found = Counter(insight.verdict for insight in insights)
    n_tested = len(insights) - found["not measured"]
    if n_tested == 0:
        return "None of these predictions was put to the test by measuring it."
    counts = [f"{found[v]} {words}" for v, words in _OUTCOMES.items() if found[v]]
    tested = f"Of these {len(insights)} predictions, {n_tested} {'was' if n_tested == 1 else 'were'}"
    if n_tested == len(insights):
        tested = "This prediction was" if n_tested == 1 else f"All {n_tested} predictions were"
    return f"{tested} put to the test by measuring that very change: {', '.join(counts)}."


def change(insight: Insight) -> str:
    """What was changed, decisions that differ in numbers only taken together.

    Example:
        >>> change(Insight("", ("blocks.0.to_q", "blocks.1.to_q"), "kmc3", "uaq8", 1.0))
        '`blocks.*.to_q` (2): `kmc3` → `uaq8`'
    """
    like: dict[str, list[str]] = {}
    for decision in insight.decisions:
        like.setdefault(_NUMBERS.sub("*", decision), []).append(decision)
    texts = [name(m[0]) if len(m) == 1 else f"{name(k)} ({len(m)})" for k, m in like.items()]
    n_more = sum(len(members) for members in list(like.values())[_MAX_NAMES:])
    shown = ", ".join(texts[:_MAX_NAMES]) + (f" and {n_more} more" if n_more else "")
    formats = f"{name(insight.from_format)} → {name(insight.to_format)}"
    return f"{shown}: {formats}" if shown else formats


def predicted(insight: Insight) -> str:
    """The predicted change with its interval [dB]."""
    low, high = insight.predicted_low, insight.predicted_high
    error = (high - low) / (2 * NORMAL_95) if math.isfinite(high - low) and high > low else math.nan
    return with_interval(Estimate(insight.predicted_db, error, low, high, 0), "dB", signed=True)


def _operations_figure(boxes: Sequence[ScoreBox]) -> Figure:
    """Scores of each type of operation, the worst median on top."""
    found = sorted(boxes, key=lambda box: (box.median, box.low))[:MAX_OPERATIONS]
    places = Axis(ticks=named([f"{short(b.name, 40)} (n = {b.n})" for b in found]))
    n_left_out = len(boxes) - len(found)
    return Figure(
        "operation-scores",
        "Scores by operation, the worst on top",
        _medians(found),
        (Plot(tuple(found), places, Axis("score, higher is better"), is_flat=True),),
        60 + ROW * len(found),
        "Each box holds the middle half of the scores of all choices for an operation (n of them); the line in it is "
        "the median, the whiskers reach from the lowest to the highest 5 %. What stands on top, or has a long whisker "
        "to the left, harms the result most when it gets a poor format. A short box means that the format hardly "
        "matters there." + (f" {n_left_out} operations with better medians are not drawn." if n_left_out else ""),
        "Where quality is lost: scores by operation",
    )


def _blocks_figure(boxes: Sequence[ScoreBox]) -> Figure:
    labels, common = block_labels([box.name for box in boxes])
    names = [short(label, 36) for label in labels]
    width = min(max(WIDTH, 70 + _BLOCK_WIDTH * len(boxes)), _WIDEST)
    along = common if common and common not in names else "block, from input to output"
    places = Axis(along, named(names, n_most=width // _BLOCK_WIDTH), are_turned=room(names) > 0)
    return Figure(
        "block-scores",
        "Scores by block, from input to output",
        _medians(boxes),
        (Plot(tuple(boxes), places, Axis("score, higher is better")),),
        270 + room(names),
        "The same for the blocks: a box that hangs lower than its neighbours is a block that deserves more bits.",
        "Scores by block, from input to output",
        width,
    )


def _medians(boxes: Sequence[ScoreBox]) -> str:
    return "; ".join(f"{b.name} median {number(b.median)}" for b in boxes)


def _formats_figure(shares: Sequence[FormatShare]) -> Figure:
    """The formats that the recipe uses on each type of operation, most bits on top."""
    found = sorted(shares, key=lambda s: -s.paper_bits)
    formats = sorted(
        {Format.parse(text) for row in found for text, n in row.counts.items() if n},
        key=lambda f: (f.bits, f.family, f.group_size or 0, f.activation_bits),
    )
    bars, texts = [], []
    for place, row in enumerate(found):
        counts = {f: row.counts[str(f)] for f in formats if row.counts.get(str(f), 0)}
        texts.append(f"{row.operation} {', '.join(f'{n} {f}' for f, n in counts.items())}")
        left = 0.0
        for f, n in counts.items():
            right = left + 100 * n / row.n_layers
            bars.append(Bar(place, left, right, 0.78, f.bits, f"{f} {mark(f)}".strip()))
            left = right
    notes = tuple(f"{s.paper_bits:.2f} bits, {s.n_layers} layer{'' if s.n_layers == 1 else 's'}" for s in found)
    places = Axis(ticks=named([short(s.operation, 40) for s in found]), notes=notes)
    return Figure(
        "format-shares",
        "Formats of the recipe by operation",
        "; ".join(texts),
        (Plot(tuple(bars), places, Axis("layers of the operation [%]", low=0, high=100), is_flat=True),),
        60 + ROW * len(found),
        "The formats that this recipe gives to the layers of each operation, most bits on top. Colours and marks are "
        "those of the map: a dash is a uniform grid, three dashes one in groups, a dot a codebook per channel, a ring "
        "one codebook per layer.",
        "What the recipe does about it",
        legend=Legend("Formats", tuple(Swatch(str(f), f.bits, f if f.is_quantized else None) for f in formats)),
    )


def curve_figure(points: Sequence[CurvePoint], *, here: float) -> Figure | None:
    """Measured quality against bits: random recipes as a cloud, this system as a line; `here` are the recipe's bits.

    Recipes whose measurement is not finite have no place in it; without any other, there is no figure.
    """
    finite = [p for p in points if math.isfinite(p.measured.value) and math.isfinite(p.bits)]
    if not finite:
        return None
    cloud = [p for p in finite if p.kind == "random"]
    lines: dict[str, list[CurvePoint]] = {}
    for point in sorted(finite, key=lambda p: (p.kind != "this", p.bits)):
        if point.kind != "random":
            lines.setdefault(point.name, []).append(point)
    series = [_series(cloud, f"{len(cloud)} random recipe{'' if len(cloud) == 1 else 's'}", "soft")] if cloud else []
    markers = itertools.cycle(_MARKERS)
    for label, line in lines.items():
        is_this = line[0].kind == "this"
        look: Look = "this" if is_this else "other"
        marker = "D" if is_this else next(markers)
        series.append(_series(line, label, look, marker, "" if len(line) == 1 else "-" if is_this else "--"))
    places = [p.bits for p in finite]
    plot = Plot(
        tuple(series),
        Axis("bits per weight, as in the papers"),
        Axis("measured SQNR [dB]"),
        here=here if min(places) <= here <= max(places) else None,
    )
    texts = [f"{p.name} {p.bits:.2f} bits {number(p.measured.value)} dB" for line in lines.values() for p in line]
    return Figure(
        "curve",
        "Measured quality against bits",
        "; ".join([*texts, f"{len(cloud)} random recipes"]),
        (plot,),
        420 + 22 * math.ceil(len(series) / 3),
        "Every point is a recipe that was really run and compared with full precision; bars are 95 % intervals. Higher "
        "at the same bits is better. The cloud shows what choosing by chance gives, the dotted line the bits of this "
        "report's recipe.",
        "Measured quality against bits",
    )


def _series(
    points: Sequence[CurvePoint], label: str, look: Look, marker: Marker = "o", line: Literal["", "-", "--"] = ""
) -> Series:
    return Series(tuple(p.measured for p in points), tuple(p.bits for p in points), label, look, marker, line=line)


def predictors_figure(found: Sequence[PredictorRow]) -> Figure | None:
    """Rank correlation of the predictor and its baselines with 95 % intervals, the best on top; none, no figure.

    Best is who ranks best on the last subset: the band is what a budget asks about.
    """
    finite = [row for row in _by_subset(found) if math.isfinite(row.srcc.value)]
    if not finite:
        return None
    ranks = {row.predictor: -math.inf for row in found} | {row.predictor: row.srcc.value for row in finite}
    names = sorted(ranks, key=lambda one: -ranks[one])
    subsets = list(dict.fromkeys(row.subset for row in _by_subset(found)))
    series = []
    for i, subset in enumerate(subsets):
        shift = 0.7 * (i - (len(subsets) - 1) / 2) / len(subsets)
        for is_used in (False, True):
            inside = [row for row in finite if row.subset == subset and row.is_used == is_used]
            series.append(
                Series(
                    tuple(row.srcc for row in inside),
                    tuple(names.index(row.predictor) + shift for row in inside),
                    "" if is_used else _subset(subset, "all held-out recipes"),
                    "this" if is_used else "other",
                    _SUBSETS[i % len(_SUBSETS)],
                    is_hollow=subset != OVERALL,
                )
            )
    values = [v for row in finite for v in (row.srcc.value, row.srcc.low) if math.isfinite(v)]
    plot = Plot(
        tuple(series),
        Axis(
            ticks=named([short(one, 44) for one in names]),
            bold=tuple(short(row.predictor, 44) for row in found if row.is_used),
        ),
        Axis("rank correlation (SRCC): 1 is the true order, 0 guessing", low=min(-0.02, *values), high=1.02),
        zero=True,
        is_flat=True,
    )
    return Figure(
        "predictors",
        "How well recipes are ranked",
        "; ".join(f"{r.predictor} {_subset(r.subset, 'all held-out recipes')} {number(r.srcc.value)}" for r in found),
        (plot,),
        90 + 30 * len(names),
        "How well the predictor and simpler rules put recipes that they have not seen in order of quality, with 95 % "
        "intervals. Telling many bits from few is easy; within a narrow band of bits, where a recipe must be chosen, "
        "it is hard, and there it counts.",
        "Can the predictor be trusted?",
    )


_QUALITY = columns("SRCC", "Kendall's tau", "NDCG@10", "MAE")


def predictors_table(found: Sequence[PredictorRow], caption: str) -> Table:
    """The quality of predictors in the order given."""
    lines = []
    for row in found:
        label = f"{row.predictor} (used here)" if row.is_used else row.predictor
        cells = (label, _subset(row.subset), row.n, row.srcc, row.kendall_tau, row.ndcg_at_10, row.mae)
        lines.append(Row(cells, row.is_used))
    return Table((*columns("predictor", "recipes", "n"), *_QUALITY), tuple(lines), caption)


def _folds(found: Sequence[FoldRow]) -> Section:
    ordered = sorted(found, key=lambda row: (row.subset != OVERALL, row.subset, row.fold, row.hop))
    titles = (*columns("fold", "hop", "recipes", "n"), *_QUALITY)
    table = Table(
        titles,
        rows((r.fold, r.hop, _subset(r.subset), r.srcc.n, r.srcc, r.kendall_tau, r.ndcg_at_10, r.mae) for r in ordered),
        "Each fold is predicted by a network trained on the other folds. Hop 0 looks at single layers, hop 1 at a "
        "layer with its neighbours, and so on.",
    )
    n_folds = len({row.fold for row in found})
    return section("", f"Quality in each of the {n_folds} folds, hop by hop", table)


def _subset(subset: str, everything: str = "all recipes") -> str:
    return everything if subset == OVERALL else subset
