"""What the curves of blocks say, in sentences; backticks mark names."""

from __future__ import annotations

from sedimo.reporting.maps import BlockCurves
from sedimo.reporting.rounding import number, with_error


def headline(b: BlockCurves) -> str:
    """Which block gains most when it is spared, if any is shown to."""
    shown = [row for row in b.rows if row.alone_kept.low > 0]
    whole = f"All blocks at `{b.number_format}` have {with_error(b.everything, 'dB')} SQNR"
    if not shown:
        return f"{whole}; no single block is shown to gain by staying at 16 bits."
    best = max(shown, key=lambda row: row.alone_kept.value)
    return f"{whole}; leaving `{best.block}` alone at 16 bits gains most, {with_error(best.alone_kept, 'dB')}."


def hybrid_sentence(b: BlockCurves) -> str:
    """Which blocks stay at 16 bits and what that gains; empty when none do."""
    if b.hybrid is None or b.hybrid_gain is None:
        return ""
    names = ", ".join(f"`{name}`" for name in b.kept)
    return (
        f"Chosen by {b.rule}: {names} {'stays' if len(b.kept) == 1 else 'stay'} at 16 bits, which makes "
        f"{number(b.paper_bits)} bits per weight. On {b.hybrid.n} fresh seeds that has {with_error(b.hybrid, 'dB')}, "
        f"{with_error(b.hybrid_gain, 'dB', signed=True)} against all blocks at `{b.number_format}`, paired."
    )
