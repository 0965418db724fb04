"""Variants of groups: enumeration, sizes, and every record that is refused."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from sedimo.allocation.variant_table import (
    GroupVariants,
    Variant,
    VariantTable,
    build_variant_table,
    enumerate_variants,
    variant_sizes,
)
from sedimo.bank import Candidate
from sedimo.errors import InputError, StateError
from sedimo.methods.error import error_table
from sedimo.quant.formats import FP16, Format, parse_formats
from sedimo.space import Decision, SearchSpace

FORMATS = parse_formats("uaq3,kmc4,fp16")


def decision(name: str, shape=(64, 32), macs=5000, formats=FORMATS) -> Decision:
    return Decision(name, (name,), "op", "block", shape, macs, tuple(formats))


A, B, C = decision("a"), decision("b", (128, 16), 7, FORMATS[:2]), decision("c", (8, 4, 3, 3), 10**12)


def group_of(*decisions: Decision, name="group", **changes) -> GroupVariants:
    choice = enumerate_variants(decisions)
    cost = np.linspace(1.0, 2.0, len(choice))
    names, formats = tuple(d.name for d in decisions), tuple(d.formats for d in decisions)
    group = GroupVariants(name, names, formats, choice, cost, cost / 10, *variant_sizes(decisions, choice))
    return replace(group, **changes)


def space_of(*decisions: Decision) -> SearchSpace:
    return SearchSpace("Toy", "", decisions)


def test_variants_are_all_combinations_in_lexicographic_order():
    found = enumerate_variants([A, B, C])
    assert found.dtype == np.int8
    assert found.tolist() == [list(v) for v in itertools.product(range(3), range(2), range(3))]


def test_many_decisions_of_one_format_are_one_variant():
    """More of them than an array may have axes."""
    single = [decision(f"d{i}", formats=FORMATS[:1]) for i in range(100)]
    assert enumerate_variants([A, *single]).shape == (3, 101)


def test_too_many_variants_are_refused_before_they_are_made():
    assert len(enumerate_variants([A, B], max_variants=6)) == 6
    with pytest.raises(InputError, match=r"may have 5 variants .* got 6 of up to 3 for a, b\. Split the group"):
        enumerate_variants([A, B], max_variants=5)
    with pytest.raises(
        InputError, match=r"may have 300000 variants .* got 4\.23912e\+28 of up to 3 for d0, .* d4 and 55 more\."
    ):
        enumerate_variants([decision(f"d{i}") for i in range(60)])


def test_more_formats_than_a_column_can_number_are_refused():
    formats = [Format("uaq", 4, size) for size in range(2, 130)]
    with pytest.raises(InputError, match="at most 127 formats per decision, got 128 of up to 128"):
        enumerate_variants([decision("d", formats=formats)])
    assert enumerate_variants([decision("d", formats=formats[1:])]).max() == 126


def test_sizes_are_sums_over_the_decisions_as_a_table_counts_them():
    decisions = [A, B, C]
    candidates = [
        Candidate(d.name, f, 0.1, 0.0, 0, d.paper_bytes(f), d.stored_bytes(f)) for d in decisions for f in d.formats
    ]
    table = error_table(space_of(*decisions), candidates)
    choice = enumerate_variants(decisions)
    paper, stored, bops = variant_sizes(decisions, choice)
    assert (paper.dtype, paper.shape) == (np.int64, (18,))
    for row, columns in enumerate(choice):
        entries = [table.index[d.name, d.formats[j]] for d, j in zip(decisions, columns, strict=True)]
        assert paper[row] == sum(e.paper_bytes for e in entries)
        assert stored[row] == sum(e.stored_bytes for e in entries)
        assert bops[row] == sum(e.bops for e in entries)


def test_sizes_of_a_bank_come_before_those_of_shapes():
    """A codebook of 32 bits is larger than the format says."""
    index = {("b", f): Candidate("b", f, 0.1, 0.0, 0, 1000 + f.bits, 2000 + f.bits) for f in B.formats}
    paper, stored, bops = variant_sizes([B], enumerate_variants([B]), candidates=index)
    assert (paper.tolist(), stored.tolist()) == ([1003, 1004], [2003, 2004])
    assert bops.tolist() == variant_sizes([B], enumerate_variants([B]))[2].tolist()


def test_a_variant_is_a_row():
    group = group_of(A, B)
    paper, stored, bops = (int(sizes[5]) for sizes in (group.paper_bytes, group.stored_bytes, group.bops))
    kmc4 = Format.parse("kmc4")
    assert group[5] == Variant({"a": FP16, "b": kmc4}, 2.0, 0.2, paper, stored, bops)
    assert len(group) == 6


def test_forbidden_variants_and_unknown_errors_are_allowed():
    group = group_of(A, cost=np.array([1.0, np.inf, 0.0]), standard_error=np.array([0.0, math.nan, math.nan]))
    assert math.isinf(group[1].cost)
    assert math.isnan(group[2].standard_error)


def test_a_selection_of_variants_is_allowed():
    full = group_of(A, B)
    names = ("choice", "cost", "standard_error", "paper_bytes", "stored_bytes", "bops")
    some = replace(full, **{name: getattr(full, name)[[4, 1]] for name in names})
    assert [some[i] for i in (0, 1)] == [full[i] for i in (4, 1)]


def spoiled(array, row, value):
    changed = array.copy()
    changed[row] = value
    return changed


GOOD = group_of(A, B)
NOTHING = {
    "choice": GOOD.choice[:0],
    **{n: getattr(GOOD, n)[:0] for n in ("cost", "standard_error", "paper_bytes", "stored_bytes", "bops")},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decisions": ("a", "a")}, r"different names, got \('a', 'a'\)"),
        ({"decisions": (), "formats": ()}, r"one or more different names, got \(\)"),
        ({"formats": (FORMATS,)}, "2 decisions need as many rows of formats, got 1"),
        ({"formats": (FORMATS, ())}, r"b must have one or more different formats, got \[\]"),
        ({"formats": (FORMATS, (FP16, FP16))}, r"b must have .* got \['fp16', 'fp16'\]"),
        ({"choice": GOOD.choice[:, :1]}, r"choice must be integer of shape \(6, 2\), got int8 of shape \(6, 1\)"),
        ({"choice": GOOD.choice[:5]}, r"choice must be .* got int8 of shape \(5, 2\)"),
        ({"choice": GOOD.choice.astype(np.float64)}, "choice must be integer .* got float64"),
        ({"cost": GOOD.cost[:5]}, r"choice must be integer of shape \(5, 2\)"),
        ({"cost": GOOD.cost.astype(np.int64)}, "cost must be floating"),
        ({"standard_error": GOOD.cost[:, None]}, r"standard_error must be floating of shape \(6,\)"),
        ({"paper_bytes": GOOD.cost}, "paper_bytes must be integer .* got float64"),
        ({"stored_bytes": GOOD.stored_bytes[:2]}, "stored_bytes must be integer"),
        ({"bops": GOOD.cost}, "bops must be integer"),
        (NOTHING, "at least one variant"),
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
def test_bad_records_are_refused(changes, message):
    with pytest.raises(StateError, match=f"variants of group 'group': .*{message}"):
        replace(GOOD, **changes)


def test_a_table_knows_layers_and_weights_of_its_decisions():
    twins = replace(B, layers=("b", "twin"))
    table = build_variant_table("gnn", space_of(A, twins, C), [group_of(A, twins), group_of(C, name="alone")])
    assert (table.method, table.denoiser) == ("gnn", "Toy")
    assert table.layers == {"a": ("a",), "b": ("b", "twin"), "c": ("c",)}
    assert table.total_params == 64 * 32 + 128 * 16 + 8 * 4 * 9


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([group_of(A, B)], r"every decision must be in a group \(of its own.*missing: c\."),
        ([group_of(A, B), group_of(B, C, name="other")], r"in one group, found in several: b\."),
        ([group_of(A, B), group_of(C)], r"different names, found twice: group\."),
        ([group_of(A, B, C, decision("d"))], r"decisions that Toy does not have: d\."),
        ([], r"missing: a, b, c\."),
    ],
)
def test_groups_that_do_not_share_out_the_decisions_are_refused(groups, message):
    with pytest.raises(InputError, match=message):
        build_variant_table("gnn", space_of(A, B, C), groups)


def test_a_long_list_of_names_is_cut():
    names = [f"d{i}" for i in range(8)]
    with pytest.raises(InputError, match=r"missing: d0, d1, d2, d3, d4 and 3 more\."):
        VariantTable("gnn", "Toy", (), {name: (name,) for name in names}, len(names))
