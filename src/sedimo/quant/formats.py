"""Number formats as values: what a weight may become, and how many bytes that takes.

A `Format` is written as `kmc4`, `uaq3`, `uaq4g64`, `kma4a8` or `fp16`. What a kind of format can and how it is
written, its family says (`quant/families/`); limits and sizes are computed from there, never typed.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sedimo.errors import InputError
from sedimo.quant import families
from sedimo.quant.families.family import Family
from sedimo.quant.packing import row_bytes

MIN_BITS, MAX_BITS = 2, 8  # of activations; those of weights are the family's
FULL_BITS = 16


@functools.cache
def _pattern(spelling: str) -> re.Pattern[str]:
    before, after = map(re.escape, spelling.split("{bits}"))
    return re.compile(rf"{before}(\d{{1,9}}){after}(?:g(\d{{1,9}}))?(?:a(\d{{1,9}}))?", re.ASCII)


def _lie_in(widths: Sequence[int]) -> str:
    """Such as `lie in 2..8` or `be one of 4, 8`."""
    if len(widths) > 1 and len(widths) == widths[-1] - widths[0] + 1:
        return f"lie in {widths[0]}..{widths[-1]}"
    return f"be {'one of ' if len(widths) > 1 else ''}{', '.join(map(str, widths))}"


def _choices() -> str:
    """All formats that there are, for people."""
    found = []
    for family in families.FAMILIES:
        texts = [family.spelling.format(bits=bits) for bits in (family.widths[0], family.widths[-1])]
        group = f" (with an optional group size, {family.spelling.format(bits=4)}g64)" if family.takes_groups else ""
        found.append("..".join(dict.fromkeys(texts)) + group)
    return f"Choose one of {', '.join(found[:-1])}, or {found[-1]}."


@dataclass(frozen=True, slots=True)
class Format:
    """A number format: family by its name, weight bits, group size along the input, activation bits.

    Example:
        >>> str(Format.parse("uaq4g64")), Format.parse("kmc3").n_levels
        ('uaq4g64', 8)

    Raises:
        InputError: no such family, or bits, group size or activation bits outside its rules.
    """

    family: str
    bits: int
    group_size: int | None = None
    activation_bits: int = FULL_BITS

    def __post_init__(self) -> None:
        family = self.numerics
        if self.bits not in family.widths:
            raise InputError(f"bits must {_lie_in(family.widths)}, got {self.bits}. {_choices()}")
        if self.group_size is not None and (not family.takes_groups or self.group_size < 2):
            grouped = " and ".join(f.name for f in families.FAMILIES if f.takes_groups)
            rule, found = f"is for {grouped} and at least 2", f"{self.family} with {self.group_size}"
            raise InputError(f"a group size {rule}, got {found}. {_choices()}")
        if self.activation_bits != FULL_BITS and not MIN_BITS <= self.activation_bits <= MAX_BITS:
            rule = f"lie in {MIN_BITS}..{MAX_BITS}, or be {FULL_BITS}"
            raise InputError(f"activation bits must {rule}, got {self.activation_bits}.")

    @classmethod
    def parse(cls, text: str) -> Format:
        """The format that a string such as `kmc4a8` names.

        Raises:
            InputError: the string is not a format.
        """
        for family in families.FAMILIES:
            match = _pattern(family.spelling).fullmatch(text)
            if match is not None:
                bits, group, activation = match.groups()
                return cls(family.name, int(bits), int(group) if group else None, int(activation or FULL_BITS))
        raise InputError(f"{text!r} is not a format. {_choices()}")

    def __str__(self) -> str:
        weight = self.numerics.spelling.format(bits=self.bits)
        group = f"g{self.group_size}" if self.group_size else ""
        activation = f"a{self.activation_bits}" if self.activation_bits != FULL_BITS else ""
        return f"{weight}{group}{activation}"

    def __plain__(self) -> str:
        return str(self)

    @classmethod
    def __from_plain__(cls, plain: object, place: str) -> Format:
        if not isinstance(plain, str):
            raise InputError(f"{place} must be a format such as 'kmc4', got {plain!r}")
        return cls.parse(plain)

    @property
    def numerics(self) -> Family:
        """The family that it belongs to, which owns all about its numbers."""
        return families.family_named(self.family)

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is changed at all."""
        return self.bits < FULL_BITS

    @property
    def n_levels(self) -> int:
        """Number of different codes, 2^bits."""
        return 1 << self.bits

    @property
    def qmax(self) -> int:
        """Greatest code, 2^bits - 1."""
        return self.n_levels - 1

    @property
    def weight_format(self) -> Format:
        """The same format with activations left at 16 bits."""
        return replace(self, activation_bits=FULL_BITS)

    @property
    def changes(self) -> tuple[str, ...]:
        """What it changes, each by itself: the weight (`uaq4`), the activations (`a8`)."""
        weight = (str(self.weight_format),) if self.is_quantized else ()
        return weight if self.activation_bits == FULL_BITS else (*weight, f"a{self.activation_bits}")

    def n_groups(self, n_inputs: int) -> int:
        """Number of groups of a row of `n_inputs` weights (the last one may be shorter)."""
        return 1 if self.group_size is None else math.ceil(n_inputs / self.group_size)


FP16 = Format.parse("fp16")

PAPER_FORMATS = tuple(map(Format.parse, ["uaq3", "uaq4", "kmc3", "kmc4", "kma3", "kma4"]))
_WIDE = (
    "uaq2 uaq3 uaq4 uaq5 uaq6 uaq8 uaq3g64 uaq4g64 uaq5g64 uaq6g64 kmc2 kmc3 kmc4 kmc5 kma2 kma3 kma4 kma5 kma6 fp16"
)
WIDE_FORMATS = tuple(map(Format.parse, _WIDE.split()))
NAMED_SETS = {"paper": PAPER_FORMATS, "wide": WIDE_FORMATS}


def parse_formats(formats: str | Iterable[str | Format]) -> tuple[Format, ...]:
    """Formats from the name of a set (`paper`, `wide`), a comma-separated text, or a list."""
    if isinstance(formats, str):
        if formats in NAMED_SETS:
            return NAMED_SETS[formats]
        formats = [part.strip() for part in formats.split(",")]
    found = tuple(f if isinstance(f, Format) else Format.parse(f) for f in formats)
    if not found or len(set(found)) != len(found):
        raise InputError(f"formats must be a non-empty list without duplicates, got {[str(f) for f in found]}")
    return found


def with_activations(formats: Iterable[Format], bits: Iterable[int]) -> tuple[Format, ...]:
    """Each format at each width of activations [bits]; 16 leaves activations alone.

    Example:
        >>> [str(f) for f in with_activations([Format.parse("uaq4"), FP16], [8, 16])]
        ['uaq4a8', 'uaq4', 'fp16a8', 'fp16']
    """
    widths, asked = tuple(bits), tuple(formats)
    if not widths or len(set(widths)) != len(widths):
        raise InputError(f"widths of activations must be one or more different numbers, got {list(widths)}")
    for number_format in asked:
        if number_format.activation_bits != FULL_BITS:
            raise InputError(f"format {number_format} has activation bits already; leave them out of one of the two")
    return tuple(replace(f, activation_bits=width) for f in asked for width in widths)


def paper_bytes(number_format: Format, shape: Sequence[int]) -> int:
    """Bytes of a weight `[out, in, ...]` in the accounting of Qua2SeDiMo, parameters at 16 bits.

    Source:
        Mills et al. 2024, Qua2SeDiMo (arXiv 2412.14628), size accounting of the released code:
        floor(n b / 8) for the codes, 2 bytes for each number stored beside them: scale, zero point, centroid.

    Example:
        >>> paper_bytes(Format.parse("uaq3"), (1152, 256))
        115200
    """
    n_weights, n_channels = math.prod(shape), shape[0]
    payload = n_weights * number_format.bits // 8 if number_format.is_quantized else 0
    beside = number_format.numerics.tensors(number_format, n_channels, n_weights // n_channels)
    return payload + sum(FULL_BITS // 8 * math.prod(size) for _, size in beside.values())


def count_bops(macs: int, number_format: Format) -> int:
    """Bit operations [BOPs] of `macs` multiply-accumulates: times weight bits times activation bits.

    Codebooks count with 16 weight bits, because looked-up weights are multiplied in 16 bits.

    Source:
        Mills et al. 2024, Qua2SeDiMo (arXiv 2412.14628), accounting of the released code; also that of PTQD.

    Example:
        >>> count_bops(1000, Format.parse("uaq4a8")), count_bops(1000, Format.parse("kmc4a8"))
        (32000, 128000)
    """
    weight_bits = number_format.bits if number_format.numerics.is_uniform else FULL_BITS
    return macs * weight_bits * number_format.activation_bits


def stored_bytes(number_format: Format, shape: Sequence[int]) -> int:
    """Bytes of the tensors that replace a weight `[out, in, ...]` in memory and in the file.

    Tensors whose dtype depends on the weight have the usual one here.
    """
    n_weights, n_channels = math.prod(shape), shape[0]
    n_inputs = n_weights // n_channels
    payload = n_channels * row_bytes(number_format.bits, n_inputs) if number_format.is_quantized else 0
    beside = number_format.numerics.tensors(number_format, n_channels, n_inputs)
    return payload + sum(dtype.itemsize * math.prod(size) for dtype, size in beside.values())
