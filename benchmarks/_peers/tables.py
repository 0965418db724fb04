"""The tables and the JSON of the comparison: numbers only, no measuring."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from _peers.evaluation import Row, best_of
from sedimo.metrics.signal import PairedDifference, paired_difference

SEDIMO = "sedimo"


def print_rows(rows: Sequence[Row]) -> None:
    """All rows by size."""
    print("\nbits stored per distinct Linear/Conv weight, as the tool stores equal layers and with each once")
    print(f"{'tool':15}{'recipe':34}{'stored':>7}{'once':>7}{'SQNR dB':>9}{'+-se':>6}{'pooled':>8}{'r>.5':>6}  layers")
    for row in sorted(rows, key=lambda r: (r.size.bits_once, r.tool)):
        s, size = row.summary, row.size
        layers = " ".join(f"{n}x{f}" for f, n in sorted(size.formats.items(), key=lambda x: -x[1])[:4])
        print(
            f"{row.tool:15}{row.label:34}{size.bits:7.3f}{size.bits_once:7.3f}{s.sqnr_db:9.2f}{s.standard_error:6.2f}"
            f"{s.sqnr_pooled_db:8.2f}{s.n_decorrelated:6d}  {layers}{_facts(row)}"
        )


def _facts(row: Row) -> str:
    check = "" if row.own_forward_db > 50 or row.own_forward_db != row.own_forward_db else "  OWN FORWARD DIFFERS"
    return "".join(f"  {k}={v}" for k, v in row.facts.items()) + check


def compare(rows: Sequence[Row], method: str) -> list[dict[str, object]]:
    """Sedimo minus each peer on the same seeds, at the largest Sedimo recipe of at most equal stored bits.

    Twice: with equal layers counted once for both (`once`, the harder of the two for Sedimo), and as each tool stores
    them (`as_stored`). None where no Sedimo recipe was made that small.
    """
    ours = [r for r in rows if r.tool == SEDIMO and r.label.split()[0] == method]
    peers = sorted((r for r in rows if r.tool != SEDIMO), key=lambda r: r.size.bits_once)
    return [
        {
            "peer": peer.tool,
            "recipe": peer.label,
            "bits_once": peer.size.bits_once,
            "bits_as_stored": peer.size.bits,
            "sqnr_db": peer.summary.sqnr_db,
            "once": _beside(best_of(ours, peer.size.bits_once), peer),
            "as_stored": _beside(best_of(ours, peer.size.bits), peer),
        }
        for peer in peers
    ]


def _beside(row: Row | None, peer: Row) -> dict[str, object] | None:
    if row is None:
        return None
    difference = paired_difference(row.powers, peer.powers)
    mine = {"sedimo": row.label, "bits": row.size.bits_once, "sqnr_db": row.summary.sqnr_db}
    return mine | _plain(difference) | {"verdict": _verdict(difference)}


def _plain(d: PairedDifference) -> dict[str, object]:
    return {"difference_db": d.mean_db, "standard_error": d.standard_error, "low": d.low, "high": d.high, "n": d.n}


def _verdict(difference: PairedDifference) -> str:
    if difference.low > 0:
        return "ahead"
    return "behind" if difference.high < 0 else "level"


def print_comparison(entries: Sequence[Mapping[str, object]], method: str) -> None:
    """The paired differences of one method."""
    if not entries:
        return
    print(f"\nSedimo ({method}) minus peer, paired over seeds: its largest recipe of at most the peer's stored bits,")
    print("equal layers counted once for both; in the last column as each tool stores them")
    head = f"{'peer':10}{'recipe':34}{'bits':>6}{'dB':>7}{'Sedimo':>8}{'dB':>7}{'difference':>12}{'95 %':>18}"
    print(f"{head}  {'':7}{'as stored':>10}")
    for e in entries:
        left = f"{e['peer']:10}{e['recipe']:34}{e['bits_once']:6.2f}{e['sqnr_db']:7.2f}"
        print(left + _shown(e["once"]) + _shown_briefly(e["as_stored"]))


def _shown(found: Mapping[str, object] | None) -> str:
    if found is None:
        return f"{'no Sedimo recipe was made that small':>45}  {'':7}"
    interval = f"{found['low']:+.2f} .. {found['high']:+.2f}"
    left = f"{found['bits']:8.3f}{found['sqnr_db']:7.2f}{found['difference_db']:+12.2f}{interval:>18}"
    return f"{left}  {found['verdict']:7}"


def _shown_briefly(found: Mapping[str, object] | None) -> str:
    return f"{'-':>10}" if found is None else f"{found['difference_db']:+10.2f} {found['verdict']}"


def plain_row(row: Row) -> dict[str, object]:
    """A row for the JSON file."""
    s, size = row.summary, row.size
    return {
        "tool": row.tool,
        "version": row.version,
        "recipe": row.label,
        "bits_as_stored": size.bits,
        "bits_once": size.bits_once,
        "bytes_as_stored": size.n_bytes,
        "bytes_once": size.n_bytes_once,
        "formats": dict(size.formats),
        "sqnr_db": s.sqnr_db,
        "standard_error": s.standard_error,
        "interval": [s.interval_low, s.interval_high],
        "n": s.n,
        "n_decorrelated": s.n_decorrelated,
        "sqnr_pooled_db": s.sqnr_pooled_db,
        "pooled_standard_error": s.pooled_standard_error,
        "quantize_seconds": row.seconds,
        "own_forward_db": row.own_forward_db if math.isfinite(row.own_forward_db) else str(row.own_forward_db),
        "facts": dict(row.facts),
    }
