"""Exact one-dimensional k-means against two oracles, and what is stored of it."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, pairwise
from typing import NamedTuple

import kmeans1d
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sedimo.quant.families import _kmeans_kernels, kmeans
from sedimo.quant.families.kmeans import KMA, KMC, read_values, relative_error, stored_codebook
from sedimo.quant.formats import Format
from tolerances import FLOAT64_SUM

FORMAT = Format.parse("kmc4")  # codebooks tell everything themselves
OPTIMUM = 1e-9  # relative, promised by the design


class Books(NamedTuple):
    centroids: torch.Tensor
    squared_error: torch.Tensor


def fit_codebooks(rows, levels):
    return [Books(*found) for found in kmeans.fit_codebooks(rows.numpy(), levels)]


def nearest_codes(rows, codebook):
    return KMC.codes(rows, FORMAT, {"codebook": codebook})


def make_rows(kind, n_rows, n_inputs, seed, dtype=torch.float16):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n_rows, n_inputs, generator=generator)
    if kind == "heavy":
        rows = rows / torch.rand(n_rows, n_inputs, generator=generator).clamp(min=0.01)
    elif kind == "clumped":
        rows = rows * 0.01 + torch.randint(-3, 4, rows.shape, generator=generator)
    elif kind == "skewed":
        rows = rows.abs() ** 3 - 5
    return (rows * 0.02).to(dtype).to(torch.float32)


def error_of(row, centroids):
    """Squared error of a row with its nearest centroids, summed without cancellation."""
    distances = np.abs(np.asarray(row, dtype=np.float64)[:, None] - np.asarray(centroids)[None]).min(axis=1)
    return float((distances**2).sum())


def oracle_error(row, k):
    values = np.asarray(row, dtype=np.float64)
    _, centroids = kmeans1d.cluster(values, k)
    return error_of(values, centroids)


def brute_force(row, k):
    """Least squared error over all cuts of the sorted values, in exact fractions."""
    values = sorted(Fraction(float(v)) for v in row)

    def cost(part):
        mean = sum(part) / len(part)
        return sum((v - mean) ** 2 for v in part)

    cuts = combinations(range(1, len(values)), k - 1)
    return min(sum(cost(values[a:b]) for a, b in pairwise((0, *cut, len(values)))) for cut in cuts)


@pytest.mark.parametrize("kind", ["normal", "heavy", "clumped", "skewed"])
@pytest.mark.parametrize("n_inputs", [40, 300, 1152])
def test_fit_is_the_optimum_of_kmeans1d(kind, n_inputs):
    rows = make_rows(kind, 4, n_inputs, seed=n_inputs)
    levels = [k for k in (32, 16, 8, 4, 2) if k < n_inputs // 2]
    for k, books in zip(levels, fit_codebooks(rows, levels), strict=True):
        assert books.centroids.shape == (4, k)
        assert bool((books.centroids.diff(dim=1) > 0).all())
        for row, centroids, error in zip(rows, books.centroids, books.squared_error, strict=True):
            optimum = oracle_error(row, k)
            assert error_of(row, centroids) == pytest.approx(optimum, rel=OPTIMUM)
            assert float(error) == pytest.approx(optimum, rel=OPTIMUM)


@settings(max_examples=60)
@given(
    st.lists(
        st.floats(-2, 2, width=16)
        | st.sampled_from([0.0, 1.0, 1.5, 65504.0, -65504.0])
        | st.integers(-5, 5).map(lambda i: i / 8),
        min_size=3,
        max_size=9,
    ),
    st.integers(2, 5),
)
def test_fit_is_the_optimum_of_brute_force(values, k):
    """Outliers, duplicates and evenly spaced values included: exact fractions decide."""
    rows = torch.tensor([values], dtype=torch.float32)
    (books,) = fit_codebooks(rows, [k])
    n_distinct = len(set(values))
    optimum = float(brute_force(values, min(k, n_distinct)))
    assert float(books.squared_error[0]) == pytest.approx(optimum, rel=OPTIMUM, abs=0)
    assert bool((books.centroids.diff(dim=1) >= 0).all())
    # a centroid is a float64: it may miss the mean of a piece by one part in 2^53
    rounding = sum((abs(v) * 2.0**-52) ** 2 for v in values)
    assert error_of(rows[0], books.centroids[0]) == pytest.approx(optimum, rel=2 * OPTIMUM, abs=rounding)


def test_levels_fitted_together_equal_levels_fitted_alone():
    rows = make_rows("heavy", 40, 200, seed=3)
    levels = [8, 64, 4, 16]
    for k, books in zip(levels, fit_codebooks(rows, levels), strict=True):
        (alone,) = fit_codebooks(rows, [k])
        torch.testing.assert_close(books.squared_error, alone.squared_error, rtol=OPTIMUM, atol=0)
        torch.testing.assert_close(books.centroids, alone.centroids, rtol=OPTIMUM, atol=0)


def test_result_does_not_depend_on_threads():
    rows = make_rows("normal", 700, 400, seed=5)  # more than one task
    torch.set_num_threads(2)
    several = fit_codebooks(rows, [16, 8])
    torch.set_num_threads(1)
    for one, other in zip(fit_codebooks(rows, [16, 8]), several, strict=True):
        assert torch.equal(one.centroids, other.centroids)


@pytest.mark.parametrize("n_inputs", [20_000, 70_000])
def test_long_rows_use_caps_and_stay_optimal(n_inputs):
    rows = make_rows("normal", 1, n_inputs, seed=1, dtype=torch.float32)
    for k, books in zip((64, 16), fit_codebooks(rows, [64, 16]), strict=True):
        assert float(books.squared_error[0]) == pytest.approx(oracle_error(rows[0], k), rel=OPTIMUM)


@pytest.mark.parametrize(("kind", "n_inputs", "k"), [("normal", 9000, 8), ("heavy", 9000, 16), ("clumped", 700, 16)])
def test_every_node_of_a_cheapest_path_has_the_least_cost(kind, n_inputs, k):
    """The blocks and their bounds leave out no predecessor: each node against the plain recurrence."""
    row = np.sort(make_rows(kind, 1, n_inputs, seed=6, dtype=torch.float32).numpy()[0])
    nodes, previous = np.empty((4, n_inputs + 1)), np.empty(n_inputs + 1, dtype=np.int32)
    n = _kmeans_kernels._sum_prefixes(row, np.empty(0), nodes)
    count, first, second = nodes[:3, : n + 1]
    penalty = 4.4 * (second[-1] - first[-1] ** 2 / count[-1]) / k**3
    scratch = (np.empty(n + 1), np.empty(n + 1))
    _kmeans_kernels._cheapest_path(n, penalty, _kmeans_kernels.BLOCK, nodes, previous, scratch)
    cost = np.zeros(n + 1)
    for node in range(1, n + 1):
        costs = cost[:node] - (first[node] - first[:node]) ** 2 / (count[node] - count[:node])
        cost[node] = costs.min() + penalty
    np.testing.assert_allclose(nodes[_kmeans_kernels.COST, : n + 1], cost, rtol=0, atol=FLOAT64_SUM * second[-1])


@pytest.mark.parametrize("n_inputs", [33, 64, 65, 100])
@pytest.mark.parametrize("k", [8, 16])
def test_evenly_spaced_values_have_ties_and_still_k_pieces(n_inputs, k):
    rows = torch.arange(n_inputs, dtype=torch.float32).reshape(1, -1) / 64
    (books,) = fit_codebooks(rows, [k])
    whole, rest = divmod(n_inputs, k)
    optimum = sum(size * (size**2 - 1) / 12 for size in [whole + 1] * rest + [whole] * (k - rest)) / 64**2
    assert float(books.squared_error[0]) == pytest.approx(optimum, rel=FLOAT64_SUM)
    assert len(set(books.centroids[0].tolist())) == k


@pytest.mark.parametrize("seed", range(8))
def test_few_distinct_values_have_ties_and_stay_optimal(seed):
    """Integers, also mirrored, have many equal costs: often no penalty gives k pieces, and two paths are spliced."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-20, 20, (20, 60), generator=generator).float()
    rows[10:, 30:] = -rows[10:, :30]
    levels = [24, 16, 13, 8, 5, 3]
    for k, books in zip(levels, fit_codebooks(rows, levels), strict=True):
        for row, centroids, error in zip(rows, books.centroids, books.squared_error, strict=True):
            optimum = oracle_error(row, k)
            assert float(error) == pytest.approx(optimum, rel=OPTIMUM)
            assert error_of(row, centroids) == pytest.approx(optimum, rel=OPTIMUM)


@pytest.mark.parametrize(
    ("few", "many", "spliced"),
    [
        ([0, 5, 10], [0, 2, 4, 6, 10], [0, 2, 5, 10]),
        ([0, 5, 10], [0, 6, 7, 8, 10], [0, 6, 7, 10]),
        ([0, 4, 10], [0, 1, 4, 6, 8, 10], [0, 1, 4, 10]),
    ],
)
def test_splice_changes_over_where_a_piece_encloses_another(few, many, spliced):
    previous = np.full(11, -1, dtype=np.int32)
    paths = (np.array(path, dtype=np.int32) for path in (few, many))
    _kmeans_kernels._splice(len(spliced) - 1, len(few) - 1, *paths, previous)
    assert [previous[node] for node in spliced[1:]] == spliced[:-1]


def test_unsolved_rows_are_marked_by_the_kernel_and_solved_by_layers():
    """Without ties and cancellation no row needs layers; with an extreme outlier all do."""
    plain = np.sort(make_rows("normal", 20, 300, seed=2).numpy(), axis=1)
    outlier = plain.copy()
    outlier[:, -1] = 60000.0
    levels, empty = np.array([8]), np.empty(0)
    for rows, share in ((plain, 0.0), (outlier, 1.0)):
        errors = np.empty((20, 1))
        _kmeans_kernels.fit_rows(rows, empty, levels, _kmeans_kernels.BLOCK, np.empty((20, 8)), errors)
        assert float((errors < 0).mean()) == share
    (books,) = fit_codebooks(torch.from_numpy(outlier), [8])
    (inner,) = fit_codebooks(torch.from_numpy(outlier[:, :-1].copy()), [7])
    torch.testing.assert_close(books.squared_error, inner.squared_error, rtol=OPTIMUM, atol=0)
    assert bool((books.centroids[:, -1] == 60000).all())


def test_layers_agree_with_brute_force_where_float64_cancels():
    values = np.array([1e6, 1e6 + 0.25, 1e6 + 0.75, 1e6 + 1, 1e6 + 1.0625, 1e6 + 3], dtype=np.float64)
    centroids = np.empty(3)
    error = _kmeans_kernels.fit_distinct(values, np.array([1.0, 2, 1, 1, 3, 1]), centroids)
    assert error == pytest.approx(float(brute_force(np.repeat(values, [1, 2, 1, 1, 3, 1]), 3)), rel=FLOAT64_SUM)


@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e-7, 6e4, 1e30])
def test_constant_rows_come_back_exactly(value):
    rows = torch.full((3, 50), value)
    (books,) = fit_codebooks(rows, [8])
    assert books.squared_error.tolist() == [0, 0, 0]
    codebook = stored_codebook(books.centroids)
    assert torch.equal(KMC.dequantize(FORMAT, {"codes": nearest_codes(rows, codebook), "codebook": codebook}), rows)


def test_fewer_distinct_values_than_centroids_are_kept_and_the_last_repeated():
    rows = torch.tensor([[3.0, -1.0, 3.0, -1.0, 0.5]])
    (books,) = fit_codebooks(rows, [4])
    assert books.centroids.tolist() == [[-1.0, 0.5, 3.0, 3.0]]
    assert books.squared_error.tolist() == [0.0]


def test_all_negative_rows():
    rows = -make_rows("normal", 2, 100, seed=9).abs() - 1
    (books,) = fit_codebooks(rows, [8])
    assert float(books.squared_error[0]) == pytest.approx(oracle_error(rows[0], 8), rel=OPTIMUM)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensor_codebook_is_that_of_all_values_in_one_row(dtype):
    weight = make_rows("heavy", 30, 50, seed=4, dtype=dtype).to(dtype)
    weight[0, :4] = torch.tensor([0.0, -0.0, 0.0, -0.0], dtype=dtype)
    values, counts = read_values(weight)
    together = [Books(*found) for found in kmeans.fit_codebooks(values, [4, 16], counts)]
    for k, book, row in zip((4, 16), together, fit_codebooks(weight.float().reshape(1, -1), [4, 16]), strict=True):
        assert book.centroids.shape == (1, k)
        assert float(book.squared_error[0]) == pytest.approx(oracle_error(weight.float().reshape(-1), k), rel=OPTIMUM)
        torch.testing.assert_close(book.centroids, row.centroids, rtol=OPTIMUM, atol=0)
        codebook = stored_codebook(book.centroids)
        rows, parameters = weight.float().reshape(1, -1), {"codebook": codebook}
        errors = KMA.squared_errors(rows, FORMAT, parameters, KMA.codes(rows, FORMAT, parameters))
        expected = errors / rows.double().square().sum()
        assert relative_error(values, counts, codebook) == pytest.approx(float(expected), rel=FLOAT64_SUM)


def test_codebook_of_float16_where_that_is_enough():
    assert stored_codebook(torch.tensor([[-0.5, 0.0, 1e-6, 0.25]], dtype=torch.float64)).dtype == torch.float16
    assert stored_codebook(torch.tensor([[0.0, 0.0]], dtype=torch.float64)).dtype == torch.float16


@pytest.mark.parametrize(
    "centroids",
    [
        [[0.0, 1.0], [0.0, 65520.0]],  # overflows
        [[0.0, 1.0], [0.0, 1e-6]],  # subnormal, in a row of nothing larger
        [[0.0, 1.0], [1e-9, 1e-3]],  # lost to zero
        [[0.0, 1.0], [0.1, 0.1]],  # a constant row that float16 would change
    ],
)
def test_codebook_of_float32_where_float16_would_hurt(centroids):
    codebook = stored_codebook(torch.tensor(centroids, dtype=torch.float64))
    assert codebook.dtype == torch.float32
    assert codebook.tolist() == torch.tensor(centroids, dtype=torch.float32).tolist()


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.sampled_from([2, 4, 16, 32, 256]), st.booleans(), st.booleans())
def test_codes_are_the_nearest_centroid_the_lower_one_at_equal_distance(seed, k, is_shared, is_half):
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.randn(1 if is_shared else 3, k, generator=generator).half().sort().values
    codebook = codebook if is_half else codebook.float() * 1.1
    middles = (codebook[:, 1:].double() + codebook[:, :-1].double()) / 2
    rows = torch.cat([torch.randn(3, 300, generator=generator), middles.float().expand(3, -1)], dim=1).contiguous()
    codes = nearest_codes(rows, codebook)
    distances = (rows.double().unsqueeze(2) - codebook.double().unsqueeze(1)).abs()  # [3, N, K]
    assert torch.equal(distances.gather(2, codes.long().unsqueeze(2)).squeeze(2), distances.amin(dim=2))
    values = codebook.expand(3, -1).gather(1, codes.long())
    lowest = codebook.expand(3, -1).gather(1, distances.argmin(dim=2))
    assert torch.equal(values, lowest)
    errors = KMC.squared_errors(rows, FORMAT, {"codebook": codebook}, codes)
    expected = (
        (KMC.dequantize(FORMAT, {"codes": codes, "codebook": codebook}).double() - rows.double()).square().sum(dim=1)
    )
    torch.testing.assert_close(errors, expected, rtol=FLOAT64_SUM, atol=0)
