"""Numbers as honest text: as many digits as the standard error justifies, units people read at a glance."""

from __future__ import annotations

import math

from sedimo.metrics.estimate import Estimate

MINUS = "\N{MINUS SIGN}"
_THIN = "\N{NARROW NO-BREAK SPACE}"
_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")
_COUNT_UNITS = ("", "k", "M", "G", "T", "P")
_LEAST_PLAIN, _MOST_PLAIN = 1e-3, 1e5  # beyond these, powers of ten read better


def number(value: float, standard_error: float = math.nan, *, signed: bool = False) -> str:
    """A value with the digits that its error justifies: two of the error if it starts with 1 or 2, else one.

    Without an error, three significant digits.

    Example:
        >>> number(9.7349, 0.3), number(9.7349, 0.013), number(9.7349)
        ('9.7', '9.735', '9.73')
    """
    if not math.isfinite(value):
        return _special(value)
    known = math.isfinite(standard_error) and standard_error > 0
    digits = _digits_of_error(standard_error) if known else _digits_for(value, 3)
    return _fixed(value, digits, signed=signed)


def with_error(estimate: Estimate, unit: str = "", *, signed: bool = False) -> str:
    """Value and half-width of the 95 % interval: `9.7 ± 0.6 dB`; without an interval, the value alone."""
    suffix = f"{_THIN}{unit}" if unit else ""
    half = half_width(estimate)
    if half is None or not math.isfinite(estimate.value):
        return f"{number(estimate.value, estimate.standard_error, signed=signed)}{suffix}"
    digits = _digits_of_error(estimate.standard_error)
    exponent = _exponent(max(abs(estimate.value), half))
    if exponent == 0:
        return f"{_plain(estimate.value, digits, signed=signed)} ± {_plain(half, digits)}{suffix}"
    value, half, digits = estimate.value / 10.0**exponent, half / 10.0**exponent, digits + exponent
    return f"({_plain(value, digits, signed=signed)} ± {_plain(half, digits)}){_power(exponent)}{suffix}"


def interval(estimate: Estimate, unit: str = "") -> str:
    """The 95 % interval: `9.1 to 10.3 dB`, or nothing when there is none."""
    if half_width(estimate) is None:
        return ""
    digits = _digits_of_error(estimate.standard_error)
    exponent = _exponent(max(abs(estimate.low), abs(estimate.high)))
    low, high = (_plain(v / 10.0**exponent, digits + exponent) for v in (estimate.low, estimate.high))
    suffix = f"{_THIN}{unit}" if unit else ""
    return f"{low} to {high}{suffix}" if exponent == 0 else f"({low} to {high}){_power(exponent)}{suffix}"


def half_width(estimate: Estimate) -> float | None:
    """Half of the 95 % interval, or None when there is no finite one."""
    half = (estimate.high - estimate.low) / 2
    return half if math.isfinite(half) and half > 0 else None


def byte_size(n_bytes: float) -> str:
    """Bytes with three significant digits in decimal units: `4.27 MB`."""
    sign, value = (MINUS if n_bytes < 0 else ""), abs(float(n_bytes))
    unit = 0
    while value >= 999.5 and unit < len(_BYTE_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    text = f"{value:.0f}" if unit == 0 else _fixed(value, _digits_for(value, 3))
    return f"{sign}{text}{_THIN}{_BYTE_UNITS[unit]}"


def count(n: float) -> str:
    """A count with three significant digits and thousands as letters: `1.23 T`."""
    unit = 0
    while abs(n) >= 999.5 and unit < len(_COUNT_UNITS) - 1:
        n, unit = n / 1000, unit + 1
    return f"{n:.3g}{_THIN}{_COUNT_UNITS[unit]}" if unit else f"{n:.3g}"


def bits(value: float) -> str:
    """Bits per weight with two decimals; whole numbers stay whole."""
    return f"{value:.0f}" if value == round(value) else f"{value:.2f}"


def share(value: float) -> str:
    """A share in percent with two significant digits: `43 %`, `0.052 %`."""
    percent = 100 * value
    if percent != 0 and abs(percent) < 1e-3:
        return f"< 0.001{_THIN}%"
    text = f"{percent:.0f}" if abs(percent) >= 9.95 else _fixed(percent, _digits_for(percent, 2))
    return f"{text}{_THIN}%"


def duration(seconds: float) -> str:
    """Seconds as `0.4 s`, `37 s`, `4 min 05 s`, `2 h 03 min`."""
    if seconds < 10:
        return f"{seconds:.1f}{_THIN}s"
    if seconds < 90:
        return f"{seconds:.0f}{_THIN}s"
    if seconds < 5400:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes}{_THIN}min {rest:02d}{_THIN}s"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours}{_THIN}h {rest:02d}{_THIN}min"


def _digits_of_error(error: float) -> int:
    """Decimals that show two digits of an error starting with 1 or 2, else one."""
    if not (math.isfinite(error) and error > 0):
        return 2
    first, exponent = f"{error:.6e}".split("e")
    return -int(exponent) + (1 if float(first) < 3 else 0)


def _digits_for(value: float, n_significant: int) -> int:
    return n_significant if value == 0 else n_significant - 1 - int(f"{value:.{n_significant - 1}e}".split("e")[1])


def _fixed(value: float, digits: int, *, signed: bool = False) -> str:
    """`value` rounded to `digits` decimals (negative: tens), very small and large ones with a power of ten."""
    exponent = _exponent(abs(value))
    if exponent == 0:
        return _plain(value, digits, signed=signed)
    return f"{_plain(value / 10.0**exponent, digits + exponent, signed=signed)}{_power(exponent)}"


def _plain(value: float, digits: int, *, signed: bool = False) -> str:
    if not math.isfinite(value):
        return _special(value)
    rounded = round(value, digits)
    sign = MINUS if rounded < 0 else "+" if signed and rounded > 0 else ""
    return f"{sign}{abs(rounded):.{max(digits, 0)}f}"


def _exponent(size: float) -> int:
    """The power of ten to take out of a number of this size; 0 when it reads well as it is."""
    if size == 0 or not math.isfinite(size) or _LEAST_PLAIN <= size < _MOST_PLAIN:
        return 0
    return math.floor(math.log10(size))


def _power(exponent: int) -> str:
    return f" \N{MULTIPLICATION SIGN} 10{superscript(exponent)}"


def superscript(exponent: int) -> str:
    """An exponent in raised digits, for where no markup is possible."""
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _special(value: float) -> str:
    return "not a number" if math.isnan(value) else "∞" if value > 0 else f"{MINUS}∞"
