"""Number formats as values: what a weight may become, and how many bytes that takes.

A `Format` is written as `kmc4`, `uaq3`, `uaq4g64`, `kma4a8` or `fp16`. Limits and sizes are computed from
family and bits, never typed. This module touches no tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

from sedimo.errors import InputError

Family = Literal["uaq", "kmc", "kma", "fp"]

MIN_BITS, MAX_BITS = 2, 8
FULL_BITS = 16
_PATTERN = re.compile(r"(uaq|kmc|kma)(\d{1,9})(?:g(\d{1,9}))?(?:a(\d{1,9}))?|fp16(?:a(\d{1,9}))?", re.ASCII)
_CHOICES = "Choose one of uaq2..uaq8 (with an optional group size, uaq4g64), kmc2..kmc8, kma2..kma8, or fp16."


@dataclass(frozen=True, slots=True)
class Format:
    """A number format: family, weight bits, group size along the input, activation bits.

    `uaq` is uniform affine per output channel (or per group of `group_size` inputs), `kmc` a codebook per
    output channel, `kma` one codebook per tensor, `fp` the untouched 16-bit weight.

    Example:
        >>> str(Format.parse("uaq4g64")), Format.parse("kmc3").n_levels
        ('uaq4g64', 8)

    Raises:
        InputError: bits, group size or activation bits outside the rules.
    """

    family: Family
    bits: int
    group_size: int | None = None
    activation_bits: int = FULL_BITS

    def __post_init__(self) -> None:
        """Refuses combinations that no quantizer implements."""
        if self.family == "fp":
            if self.bits != FULL_BITS or self.group_size is not None:
                raise InputError(f"an unquantized format is written 'fp16', got {self.bits} bits. {_CHOICES}")
        elif not MIN_BITS <= self.bits <= MAX_BITS:
            raise InputError(f"bits must lie in {MIN_BITS}..{MAX_BITS}, got {self.bits}. {_CHOICES}")
        if self.group_size is not None and (self.family != "uaq" or self.group_size < 2):
            raise InputError(
                f"a group size is for uaq and at least 2, got {self.family} with {self.group_size}. {_CHOICES}"
            )
        if self.activation_bits != FULL_BITS and not MIN_BITS <= self.activation_bits <= MAX_BITS:
            raise InputError(
                f"activation bits must lie in {MIN_BITS}..{MAX_BITS}, or be {FULL_BITS}, got {self.activation_bits}."
            )

    @classmethod
    def parse(cls, text: str) -> Format:
        """The format that a string such as `kmc4a8` names.

        Raises:
            InputError: the string is not a format.
        """
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise InputError(f"{text!r} is not a format. {_CHOICES}")
        family, bits, group, activation, full_activation = match.groups()
        if family is None:
            return cls("fp", FULL_BITS, None, int(full_activation or FULL_BITS))
        return cls(cast("Family", family), int(bits), int(group) if group else None, int(activation or FULL_BITS))

    def __str__(self) -> str:
        """The text that `parse` reads."""
        group = f"g{self.group_size}" if self.group_size else ""
        activation = f"a{self.activation_bits}" if self.activation_bits != FULL_BITS else ""
        return f"{self.family}{self.bits}{group}{activation}"

    def __plain__(self) -> str:
        """A format is written as its text in records."""
        return str(self)

    @classmethod
    def __from_plain__(cls, plain: object, place: str) -> Format:
        """Reads the text back."""
        if not isinstance(plain, str):
            raise InputError(f"{place} must be a format such as 'kmc4', got {plain!r}")
        return cls.parse(plain)

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is changed at all."""
        return self.family != "fp"

    @property
    def n_levels(self) -> int:
        """Number of different codes, 2^bits."""
        return 1 << self.bits

    @property
    def qmin(self) -> int:
        """Least code."""
        return 0

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


FP16 = Format("fp", FULL_BITS)

PAPER_FORMATS = tuple(Format.parse(f"{family}{bits}") for family in ("uaq", "kmc", "kma") for bits in (3, 4))
WIDE_FORMATS = (
    *(Format("uaq", bits) for bits in (2, 3, 4, 5, 6, 8)),
    *(Format("uaq", bits, 64) for bits in (3, 4, 5, 6)),
    *(Format("kmc", bits) for bits in (2, 3, 4, 5)),
    *(Format("kma", bits) for bits in (2, 3, 4, 5, 6)),
    FP16,
)
NAMED_SETS = {"paper": PAPER_FORMATS, "wide": WIDE_FORMATS}


def parse_formats(formats: str | Iterable[str | Format]) -> tuple[Format, ...]:
    """Formats from the name of a set (`paper`, `wide`), a comma-separated text, or a list.

    Raises:
        InputError: empty, a duplicate, or not a format.
    """
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
        >>> [str(f) for f in with_activations([Format("uaq", 4), FP16], [8, 16])]
        ['uaq4a8', 'uaq4', 'fp16a8', 'fp16']

    Raises:
        InputError: a format that has activation bits already, a width that is neither 2..8 nor 16, or one given twice.
    """
    widths = tuple(bits)
    if not widths or len(set(widths)) != len(widths):
        raise InputError(f"widths of activations must be one or more different numbers, got {list(widths)}")
    found = []
    for number_format in formats:
        if number_format.activation_bits != FULL_BITS:
            raise InputError(f"format {number_format} has activation bits already; leave them out of one of the two")
        found += [replace(number_format, activation_bits=width) for width in widths]
    return tuple(found)


def paper_bytes(number_format: Format, shape: Sequence[int]) -> int:
    """Bytes of a weight `[out, in, ...]` in the accounting of Qua2SeDiMo, parameters at 16 bits.

    Source:
        Mills et al. 2024, Qua2SeDiMo (arXiv 2412.14628), size accounting of the released code:
        floor(n b / 8) for the codes, 2 P C / 8 for scale and zero point (per group here), 2^b P / 8 per codebook.

    Example:
        >>> paper_bytes(Format.parse("uaq3"), (1152, 256))
        115200
    """
    n_weights, n_channels = math.prod(shape), shape[0]
    parameter_bytes = FULL_BITS // 8
    if not number_format.is_quantized:
        return n_weights * parameter_bytes
    payload = n_weights * number_format.bits // 8
    if number_format.family == "uaq":
        n_groups = number_format.n_groups(n_weights // n_channels)
        return payload + 2 * parameter_bytes * n_channels * n_groups
    n_codebooks = n_channels if number_format.family == "kmc" else 1
    return payload + number_format.n_levels * parameter_bytes * n_codebooks


def count_bops(macs: int, number_format: Format) -> int:
    """Bit operations [BOPs] of `macs` multiply-accumulates: times weight bits times activation bits.

    Codebooks count with 16 weight bits, because looked-up weights are multiplied in 16 bits.

    Source:
        Mills et al. 2024, Qua2SeDiMo (arXiv 2412.14628), accounting of the released code; also that of PTQD.

    Example:
        >>> count_bops(1000, Format.parse("uaq4a8")), count_bops(1000, Format.parse("kmc4a8"))
        (32000, 128000)
    """
    weight_bits = number_format.bits if number_format.family == "uaq" else FULL_BITS
    return macs * weight_bits * number_format.activation_bits


def row_bytes(bits: int, n_inputs: int) -> int:
    """Bytes of one packed row: nothing is wasted beyond its last byte."""
    return (n_inputs * bits + 7) // 8


def stored_bytes(number_format: Format, shape: Sequence[int], *, codebook_bytes: int = 2) -> int:
    """Bytes of the tensors that replace a weight `[out, in, ...]` in memory and in the file.

    `codebook_bytes` is 4 for the rare codebook that does not fit the normal range of float16.
    """
    n_weights, n_channels = math.prod(shape), shape[0]
    if not number_format.is_quantized:
        return n_weights * FULL_BITS // 8
    n_inputs = n_weights // n_channels
    payload = n_channels * row_bytes(number_format.bits, n_inputs)
    if number_format.family == "uaq":
        n_groups = number_format.n_groups(n_inputs)
        per_group = 2 + 1 if number_format.group_size else 4 + 2  # float16, uint8 | float32, int16
        return payload + n_channels * n_groups * per_group
    n_codebooks = n_channels if number_format.family == "kmc" else 1
    return payload + number_format.n_levels * codebook_bytes * n_codebooks
