"""Variants of decisions and groups: enumeration, sizes, and everything that is refused."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from allocation_tables import table_of

from sedimo.allocation.table import Cost
from sedimo.allocation.variants import Variants, check_groups, enumerate_variants
from sedimo.errors import InputError, StateError
from sedimo.quant.formats import FP16, Format, parse_formats

FORMATS = parse_formats("uaq3,kmc4,fp16")


A, B, C = {"a": FORMATS}, {"b": FORMATS[:2]}, {"c": FORMATS}
rng = np.random.default_rng(0)
TABLE = table_of(
    [
        Cost(d, f, 0.0, 0.0, 0, *(int(v) for v in rng.integers(1, 1000, 3)))
        for d, formats in (A | B | C).items()
        for f in formats
    ],
    {"a": 2048, "b": 2048, "c": 288},
)


def group_of(formats: dict[str, tuple[Format, ...]], name="group", **changes) -> Variants:
    choice = enumerate_variants(formats)
    cost = np.linspace(1.0, 2.0, len(choice))
    return replace(TABLE.group(name, formats, choice, cost, cost / 10), **changes)


def test_variants_are_all_combinations_in_lexicographic_order():
    found = enumerate_variants(A | B | C)
    assert found.dtype == np.int8
    assert found.tolist() == [list(v) for v in itertools.product(range(3), range(2), range(3))]


def test_many_decisions_of_one_format_are_one_variant():
    """More of them than an array may have axes."""
    assert enumerate_variants(A | {f"d{i}": FORMATS[:1] for i in range(100)}).shape == (3, 101)


def test_too_many_variants_are_refused_before_they_are_made():
    assert len(enumerate_variants(A | B, max_variants=6)) == 6
    with pytest.raises(InputError, match=r"may have 5 variants .* got 6 of up to 3 for a, b\. Split the group"):
        enumerate_variants(A | B, max_variants=5)
    with pytest.raises(
        InputError, match=r"may have 300000 variants .* got 4\.23912e\+28 of up to 3 for d0, .* d4 and 55 more\."
    ):
        enumerate_variants({f"d{i}": FORMATS for i in range(60)})


def test_more_formats_than_a_column_can_number_are_refused():
    formats = [Format("uaq", 4, size) for size in range(2, 130)]
    with pytest.raises(InputError, match="at most 127 formats per decision, got 128 of up to 128"):
        enumerate_variants({"d": formats})
    assert enumerate_variants({"d": formats[1:]}).max() == 126


def test_sizes_are_sums_over_the_decisions():
    group = group_of(A | B | C)
    assert (group.paper_bytes.dtype, group.paper_bytes.shape) == (np.int64, (18,))
    for row in range(len(group)):
        entries = [TABLE.index[key] for key in group.variant(row).items()]
        assert group.paper_bytes[row] == sum(e.paper_bytes for e in entries)
        assert group.stored_bytes[row] == sum(e.stored_bytes for e in entries)
        assert group.bops[row] == sum(e.bops for e in entries)


def test_a_variant_is_a_row():
    group = group_of(A | B)
    assert len(group) == 6
    assert group.variant(5) == {"a": FP16, "b": Format.parse("kmc4")}
    some = group.at([5, 1])
    assert [some.variant(i) for i in (0, 1)] == [group.variant(i) for i in (5, 1)]
    assert some.cost.tolist() == [2.0, group.cost[1]]


def test_a_decision_is_a_group_of_one():
    row = TABLE.rows[1]
    assert (row.name, [row.variant(k) for k in range(len(row))]) == ("b", [{"b": f} for f in FORMATS[:2]])
    assert row.bops.tolist() == [TABLE.index["b", f].bops for f in FORMATS[:2]]


def test_forbidden_variants_and_unknown_errors_are_allowed():
    error = np.array([0.0, math.nan, math.nan])
    group_of(A, cost=np.array([1.0, np.inf, 0.0]), standard_error=error).check()


def spoiled(array, row, value):
    changed = array.copy()
    changed[row] = value
    return changed


GOOD = group_of(A | B)
NOTHING = {
    "choice": GOOD.choice[:0],
    **{n: getattr(GOOD, n)[:0] for n in ("cost", "standard_error", "paper_bytes", "stored_bytes", "bops")},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"formats": {}}, "at least one decision"),
        ({"formats": A | {"b": ()}}, r"b must have one or more different formats, got \[\]"),
        ({"formats": A | {"b": (FP16, FP16)}}, r"b must have .* got \['fp16', 'fp16'\]"),
        ({"choice": GOOD.choice[:, :1]}, r"choice must be integer of shape \(6, 2\), got int8 of shape \(6, 1\)"),
        ({"choice": GOOD.choice[:5]}, r"choice must be .* got int8 of shape \(5, 2\)"),
        ({"choice": GOOD.choice.astype(np.float64)}, "choice must be integer .* got float64"),
        ({"cost": GOOD.cost[:5]}, r"choice must be integer of shape \(5, 2\)"),
        ({"cost": GOOD.cost.astype(np.int64)}, "cost must be floating"),
        ({"standard_error": GOOD.cost[:, None]}, r"standard_error must be floating of shape \(6,\)"),
        ({"paper_bytes": GOOD.cost}, "paper_bytes must be integer .* got float64"),
        ({"stored_bytes": GOOD.stored_bytes[:2]}, "stored_bytes must be integer"),
        ({"bops": GOOD.cost}, "bops must be integer"),
        (NOTHING, "and one variant"),
        ({"choice": spoiled(GOOD.choice, (4, 1), 2)}, "variant 4 takes format 2 of b, which has 2"),
        ({"choice": spoiled(GOOD.choice, (0, 0), -1)}, "variant 0 takes format -1 of a, which has 3"),
        ({"choice": spoiled(GOOD.choice, 3, GOOD.choice[1])}, "1 of 6 variants occur twice"),
        ({"cost": spoiled(GOOD.cost, 2, math.nan)}, "costs must be finite, or inf"),
        ({"cost": spoiled(GOOD.cost, 2, -math.inf)}, "costs must be finite, or inf"),
        ({"standard_error": -GOOD.cost}, "must not be negative"),
        ({"paper_bytes": spoiled(GOOD.paper_bytes, 0, -1)}, "must not be negative"),
        ({"stored_bytes": spoiled(GOOD.stored_bytes, 0, -1)}, "must not be negative"),
        ({"bops": spoiled(GOOD.bops, 0, -1)}, "must not be negative"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(StateError, match=f"variants of group 'group': .*{message}"):
        replace(GOOD, **changes).check()


@pytest.mark.parametrize(
    ("decisions", "groups", "message"),
    [
        ("abc", [group_of(A | B)], r"every decision must be in a group \(of its own.*missing: c\."),
        ("abc", [group_of(A | B), group_of(B | C, name="other")], r"in one group, found in several: b\."),
        ("abc", [group_of(A | B), group_of(C)], r"different names, found twice: group\."),
        ("ab", [group_of(A | B | C)], r"decisions that Toy does not have: c\."),
        ("abc", [], r"missing: a, b, c\."),
    ],
)
def test_groups_that_do_not_share_out_the_decisions_are_refused(decisions, groups, message):
    with pytest.raises(InputError, match=message):
        check_groups(groups, decisions, "Toy")


def test_a_long_list_of_names_is_cut():
    with pytest.raises(InputError, match=r"missing: d0, d1, d2, d3, d4 and 3 more\."):
        check_groups((), [f"d{i}" for i in range(8)], "Toy")
