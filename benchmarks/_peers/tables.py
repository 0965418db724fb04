"""The tables and the JSON of the comparison: numbers only, no measuring."""

from __future__ import annotations

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

    Equal layers count once for both: the harder of the two counts for Sedimo.
    """
    ours = [r for r in rows if r.tool == SEDIMO and r.label.split()[0] == method]
    found: list[dict[str, object]] = []
    for peer in sorted((r for r in rows if r.tool != SEDIMO), key=lambda r: r.size.bits_once):
        row = best_of(ours, peer.size.bits_once)
        entry: dict[str, object] = {
            "peer": peer.tool,
            "recipe": peer.label,
            "peer_bits_once": peer.size.bits_once,
            "peer_bits_as_stored": peer.size.bits,
            "peer_db": peer.summary.sqnr_db,
        }
        if row is not None:
            difference = paired_difference(row.powers, peer.powers)
            entry |= {"sedimo": row.label, "sedimo_bits": row.size.bits_once, "sedimo_db": row.summary.sqnr_db}
            entry |= _plain(difference) | {"verdict": _verdict(difference)}
        found.append(entry)
    return found


def _plain(d: PairedDifference) -> dict[str, object]:
    return {"difference_db": d.mean_db, "standard_error": d.standard_error, "low": d.low, "high": d.high, "n": d.n}


def _verdict(difference: PairedDifference) -> str:
    if difference.low > 0:
        return "ahead"
    return "behind" if difference.high < 0 else "level"


def print_comparison(entries: Sequence[Mapping[str, object]], method: str) -> None:
    """The paired differences of one method."""
    print(f"\nSedimo ({method}) minus peer, paired over seeds, largest Sedimo recipe of at most the peer's bits (once)")
    print(f"{'peer':15}{'recipe':34}{'bits':>6}{'dB':>7}{'Sedimo bits':>13}{'dB':>7}{'difference':>12}{'95 %':>18}")
    for e in entries:
        left = f"{e['peer']:15}{e['recipe']:34}{e['peer_bits_once']:6.2f}{e['peer_db']:7.2f}"
        if "sedimo" not in e:
            print(left + "   no Sedimo recipe was made that small")
            continue
        interval = f"{e['low']:+.2f} .. {e['high']:+.2f}"
        ours = f"{e['sedimo_bits']:13.3f}{e['sedimo_db']:7.2f}"
        print(f"{left}{ours}{e['difference_db']:+12.2f}{interval:>18}  {e['verdict']}")


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
        "own_forward_db": None if row.own_forward_db != row.own_forward_db else row.own_forward_db,
        "facts": dict(row.facts),
    }
