"""The words that people see: numbers as honest text, sizes, methods, the glossary.

A number has as many digits as its standard error justifies, and units that are read at a glance. `said` is the one
formatter of cells: whatever shows a page, shows the same text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from sedimo.metrics.estimate import Estimate
from sedimo.quant.families import FAMILIES
from sedimo.quant.formats import Format

Value = str | int | float | Format | Estimate | None
NumberKind = Literal["count", "bits", "fine bits", "bytes", "change of bytes", "share", "seconds"]
Kind = Literal[NumberKind, "name", "verdict", "change", "plus-minus"]  # of what does not read well as it is

MINUS = "\N{MINUS SIGN}"
THIN = "\N{NARROW NO-BREAK SPACE}"
_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")
_COUNT_UNITS = ("", "k", "M", "G", "T", "P")
NOTHING = "\N{EN DASH}"
_MARKS = {"dash": "\N{EN DASH}", "dot": "\N{BLACK CIRCLE}", "ring": "\N{WHITE CIRCLE}"}
_LEAST_PLAIN, _MOST_PLAIN = 1e-3, 1e5  # beyond these, powers of ten read better


def number(value: float, standard_error: float = math.nan, *, signed: bool = False) -> str:
    """A value with the digits that its error justifies: two of the error if it starts with 1 or 2, else one.

    Without an error, three significant digits.

    Example:
        >>> number(9.7349, 0.3), number(9.7349, 0.013), number(9.7349)
        ('9.7', '9.735', '9.73')
    """
    if not math.isfinite(value):
        return _plain(value, 0)
    known = math.isfinite(standard_error) and standard_error > 0
    digits = _digits_of_error(standard_error) if known else _digits_for(value, 3)
    return _rounded(digits, value, signed=signed)


def with_error(estimate: Estimate, unit: str = "", *, signed: bool = False) -> str:
    """Value and half-width of the 95 % interval: `9.7 ± 0.6 dB`; without an interval, the value alone."""
    half = _half_width(estimate)
    if half is None or not math.isfinite(estimate.value):
        text = number(estimate.value, estimate.standard_error, signed=signed)
    else:
        text = _rounded(_digits_of_error(estimate.standard_error), estimate.value, " ± ", half, signed=signed)
    return _in(text, unit)


def interval(estimate: Estimate, unit: str = "") -> str:
    """The 95 % interval: `9.1 to 10.3 dB`, or nothing when there is none."""
    if _half_width(estimate) is None:
        return ""
    return _in(_rounded(_digits_of_error(estimate.standard_error), estimate.low, " to ", estimate.high), unit)


def with_interval(estimate: Estimate, unit: str = "", *, signed: bool = False) -> str:
    """Value and 95 % interval: `9.7 dB (9.1 to 10.3)`; without an interval, the value alone."""
    text, limits = _in(number(estimate.value, estimate.standard_error, signed=signed), unit), interval(estimate)
    return f"{text} ({limits})" if limits else text


def byte_size(n_bytes: float) -> str:
    """Bytes with three significant digits in decimal units: `4.27 MB`."""
    value, unit = _in_thousands(n_bytes, _BYTE_UNITS)
    text = f"{abs(value):.0f}" if unit == _BYTE_UNITS[0] else _rounded(_digits_for(value, 3), abs(value))
    return _in(f"{MINUS if n_bytes < 0 else ''}{text}", unit)


def count(n: float) -> str:
    """A count with three significant digits and thousands as letters: `1.23 T`."""
    value, unit = _in_thousands(n, _COUNT_UNITS)
    return _in(f"{value:.3g}", unit)


def bits(value: float) -> str:
    """Bits per weight with two decimals; whole numbers stay whole."""
    rounded = round(value, 2)
    return f"{rounded:.0f}" if rounded == round(rounded) else f"{rounded:.2f}"


def share(value: float) -> str:
    """A share in percent with two significant digits: `43 %`, `0.052 %`."""
    percent = 100 * value
    if percent != 0 and abs(percent) < 1e-3:
        return f"< 0.001{THIN}%"
    text = f"{percent:.0f}" if abs(percent) >= 9.95 else _rounded(_digits_for(percent, 2), percent)
    return f"{text}{THIN}%"


def duration(seconds: float) -> str:
    """Seconds as `0.4 s`, `37 s`, `4 min 05 s`, `2 h 03 min`."""
    if seconds < 90:
        return _in(f"{seconds:.{1 if seconds < 10 else 0}f}", "s")
    of_seconds = seconds < 5400
    whole, rest = divmod(round(seconds if of_seconds else seconds / 60), 60)
    large, small = ("min", "s") if of_seconds else ("h", "min")
    return f"{_in(str(whole), large)} {_in(f'{rest:02d}', small)}"


def _in(text: str, unit: str) -> str:
    return f"{text}{THIN}{unit}" if unit else text


def _in_thousands(value: float, units: Sequence[str]) -> tuple[float, str]:
    """A size in the unit in which it has at most three digits."""
    index = 0
    while abs(value) >= 999.5 and index < len(units) - 1:
        value, index = value / 1000, index + 1
    return value, units[index]


def _half_width(estimate: Estimate) -> float | None:
    """Half of the 95 % interval, or None when there is no finite one."""
    half = (estimate.high - estimate.low) / 2
    return half if math.isfinite(half) and half > 0 else None


def _digits_of_error(error: float) -> int:
    """Decimals that show two digits of an error starting with 1 or 2, else one."""
    if not (math.isfinite(error) and error > 0):
        return 2
    first, exponent = f"{error:.6e}".split("e")
    return -int(exponent) + (1 if float(first) < 3 else 0)


def _digits_for(value: float, n_significant: int) -> int:
    return n_significant if value == 0 else n_significant - 1 - int(f"{value:.{n_significant - 1}e}".split("e")[1])


def _rounded(digits: int, first: float, between: str = "", second: float = 0.0, *, signed: bool = False) -> str:
    """One or two numbers with so many decimals (negative: tens), and a power of ten that both share.

    The power is taken out of what is too small or too large to read well as it is.
    """
    size = max(abs(first), abs(second))
    is_readable = size == 0 or not math.isfinite(size) or _LEAST_PLAIN <= size < _MOST_PLAIN
    exponent = 0 if is_readable else math.floor(math.log10(size))
    text = _plain(first / 10.0**exponent, digits + exponent, signed=signed)
    if between:
        text += f"{between}{_plain(second / 10.0**exponent, digits + exponent)}"
    if not exponent:
        return text
    return f"{f'({text})' if between else text} \N{MULTIPLICATION SIGN} 10{superscript(exponent)}"


def _plain(value: float, digits: int, *, signed: bool = False) -> str:
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    rounded = round(value, digits)
    sign = MINUS if rounded < 0 else "+" if signed and rounded > 0 else ""
    return f"{sign}{abs(rounded):.{max(digits, 0)}f}"


def superscript(exponent: int) -> str:
    """An exponent in raised digits, for where no markup is possible."""
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def family(number_format: Format) -> str:
    """The quantization method of a format as a page names it."""
    return f"{number_format.family} in groups" if number_format.group_size else number_format.family


def family_words(number_format: Format) -> str:
    """What that method is."""
    words = number_format.numerics.words
    return words.grouped if number_format.group_size else words.summary


def mark(number_format: Format) -> str:
    """The sign of a method: a dash is a uniform grid, three one in groups, a dot a codebook per channel, a ring one."""
    sign = _MARKS.get(number_format.numerics.words.mark, "")
    return "\N{IDENTICAL TO}" if sign and number_format.group_size else sign


def name(what: str | Format) -> str:
    """A name between backticks, whatever it contains."""
    return f"`{str(what).replace('`', chr(39))}`"


def plain(text: str) -> str:
    """Prose without the marks of names and emphasis."""
    return re.sub(r"\*([^*]+)\*", r"\1", text.replace("`", ""))


def joined(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def verdict(ahead: Estimate | None) -> str:
    """What a paired difference shows; nothing is compared with the reference itself."""
    if ahead is None:
        return "reference"
    if ahead.low > 0:
        return "better"
    return "worse" if ahead.high < 0 else "no difference shown"


def said(value: Value, kind: Kind | None = None) -> tuple[str, str]:
    """A value as text, and its interval if it has one; a dash where there is none.

    Without a kind, whole numbers have commas, others three digits, estimates their interval.

    Example:
        >>> said(1536), said(0.25, "share")[0].replace(THIN, " ")
        (('1,536', ''), '25 %')
    """
    estimated = value if isinstance(value, Estimate) else None
    plain = estimated.value if estimated else value
    if plain is None or (isinstance(plain, float) and math.isnan(plain)):
        return NOTHING, ""
    if estimated:
        if kind == "plus-minus":
            return with_error(estimated), ""
        limits = interval(estimated)
        text = number(estimated.value, estimated.standard_error, signed=kind == "change")
        return text, f"({limits})" if limits else ""
    if isinstance(plain, int | float):
        usual = number if isinstance(plain, float) else "{:,}".format
        return _SAID_BY.get(kind, usual)(plain), ""
    return str(plain), ""


_SAID_BY: Mapping[Kind | None, Callable[[float], str]] = {
    "count": count,
    "bits": bits,
    "fine bits": "{:.3f}".format,
    "bytes": byte_size,
    "change of bytes": lambda value: f"{'+' if value >= 0 else ''}{byte_size(value)}",
    "share": share,
    "seconds": duration,
}


GLOSSARY = {
    "Bits per weight": "How much memory one weight takes on average. The original has 16. *As in the papers* counts "
    "codes, scales and codebooks at 16 bits each, the way the published systems do; *as stored* counts the bytes that "
    "are really in the file.",
    "Format": f"What a layer's weights become: {', '.join(f.words.example for f in FAMILIES if f.words.example)}.",
    "Codebook": "A short list of values. Every weight is stored as the number of its entry in the list. The values "
    "are chosen by k-means, so that the weights move as little as possible.",
    "Error feedback": "A way to choose codes. The nearest code of each weight is the best for that weight, and not "
    "for the layer: where two inputs rise and fall together, the error of one weight can be cancelled by the other. "
    "With error feedback, weights are rounded one after another, and each makes up for what the ones before it "
    "missed.",
    "Decision": "One choice of a format. It covers one layer, or several whose weights are equal and stored once.",
    "Recipe": "The formats of all decisions together.",
    "Noise": "The squared difference between what the quantized and the original network compute, relative to the "
    "original's squared size: 0.1 means that a tenth of the power is error.",
    "SQNR": "Signal to quantization noise ratio: -10 log10 of the noise, in decibels, averaged over samples that both "
    "networks make from the same seeds. Higher is better; 10 dB more is a tenth of the noise, 3 dB more half.",
    "PSNR": "The same idea on finished images, relative to the brightest possible pixel.",
    "FID and KID": "Distances between a set of generated images and a set of real ones, in the features of an image "
    "classifier. Lower is better. They judge whether images look right as a whole, not whether they stay the same.",
    "95 % interval": "Where the true value lies in 95 of 100 such measurements. If the interval of a difference holds "
    "zero, the measurement shows no difference.",
    "Sensitivity": "The cost of giving one layer a certain format, while all others stay as they are.",
}

EXPLANATION_GLOSSARY = {
    "Trial": "One recipe that was really run and compared with full precision.",
    "Predictor and baseline": "A predictor tells the quality of a recipe without running it. A baseline is a simpler "
    "rule for the same task, such as the average bits or the sum of weight errors. A predictor that is no better than "
    "its baselines has learned nothing that they do not say already.",
    "Score": "What the predictor thinks of one choice, a layer at a format, with regard to the quality of the whole. "
    "Higher is better. Scores are for comparing choices with each other.",
    "Operation and block": "An operation is the part that a layer plays, such as the query of an attention. A "
    "denoiser repeats the same operations in many blocks, one after the other.",
    "Held-out recipes, fold": "Recipes that were kept from the predictor while it learned, so that it cannot know "
    "their quality by heart. The trials are divided into folds, and each fold is held out once.",
    "Band": "Recipes of nearly the same size. Within a band, bits tell nothing about quality any more; the choice of "
    "layers does.",
    "Rank correlation (SRCC)": "Spearman's: 1 if the predicted order of recipes is the measured one, 0 for guessing, "
    "negative for an order that is rather the reverse.",
    "Kendall's tau": "Another measure of order: the share of pairs of recipes in the right order less that in the "
    "wrong one.",
    "NDCG@10": "Whether the ten recipes predicted to be best are really good ones, the first counting most; 1 is "
    "perfect.",
    "Hop": "How far the graph network looks around a layer: 0 is the layer alone, 1 its direct neighbours as well, "
    "and so on, up to whole blocks.",
    "Confirmed, refuted, open": "A prediction is confirmed if the measured change goes the same way and its 95 % "
    "interval does not hold zero, refuted if it goes the other way, open if the interval holds zero.",
}


def packed_sizes(stored_bytes: int, file_bytes: int) -> str:
    """What packed layers take, and the file that they are in."""
    return f"packed: {byte_size(stored_bytes)} of packed layers in a file of {byte_size(file_bytes)}"
