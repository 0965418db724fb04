"""Compiled kernels of the exact one-dimensional k-means. Imported only when a k-means format is fitted.

The sorted distinct values x_0 < .. < x_{n-1} are cut at nodes 0 = b_0 < b_1 < .. < b_k = n; a cut costs the sum of
squared distances to the mean of each piece. The cost c(i, j) of the piece i .. j-1 comes from prefix sums of
count, value and square; it satisfies the quadrangle inequality, on which everything here rests:

* the best predecessor of a node moves right with the node;
* the least cost C(k) is convex in k. So if a path that pays a penalty for every piece is the cheapest of all
  paths and has exactly k pieces, it is an optimal cut in k pieces: it certifies itself.

`_cheapest_path` finds the cheapest path under a penalty; `_search` looks for the penalty that gives k pieces,
which is rarely more than two paths when it starts from the neighbouring row's. Where float64 prefix sums would
cancel too much, the row is marked as unsolved: `fit_distinct` solves it, about a hundred times slower, by dynamic
programming over the pieces, each layer by divide and conquer. There every cost is a pair of float64 whose sum is the
number (about 32 decimal digits), so that neither an outlier nor a large common offset cancels the small differences
that decide.

Source:
    Dekker 1971, A floating-point technique for extending the available precision;
    Grønlund et al. 2017, Fast exact k-means, k-medians and Bregman divergence clustering in 1D (arXiv
    1701.07204); Aggarwal, Schieber, Tokuyama 1994, Finding a minimum-weight k-link path in graphs with the
    concave Monge property.
"""
# ruff: noqa: ANN001, ANN202 -- numba derives the types from the signature in the decorator
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

from functools import partial

import numpy as np
from numba import njit

COUNT, SUM, SQUARE, COST = 0, 1, 2, 3  # rows of `nodes`, float64 [4, n + 1]
_EPSILON = 2.0**-52
_RELATIVE_ERROR = 1e-9  # of the optimum that is promised
_ROUNDING = _EPSILON  # of a fit's cost, relative to the sum of squares: twenty times the most that was seen
BLOCK = 32  # nodes per block; a run-time argument of the kernels, else the inner loop is unrolled, not vectorised
STOP, LIMIT, CAP = 0, 1, 2  # rows of `marks`
_FACTOR, _WORTH = 32, 8  # blocks per larger block; larger blocks that must fit in a row
_ALONE = 4  # nodes without a block
_MAX_PATHS, _MODEL_PATHS = 60, 8  # penalties tried, and those of them that follow the model C(k) = a + b / k^2
_SPLIT = 134217729.0  # 2^27 + 1

_kernel = partial(njit, cache=True, nogil=True, error_model="numpy")
_NODES, _PATH, _SCRATCH = "float64[:, ::1]", "int32[::1]", "UniTuple(float64[::1], 2)"
_PAIR = "UniTuple(float64, 2)"  # a number of double precision: high and low part
_PATHS = "UniTuple(int32[::1], 3)"  # the path being found, the nearest ones with fewer and with more pieces


@_kernel(f"{_PAIR}(float64, float64)")
def _sum_exactly(a, b):
    """The rounded sum and its rounding error."""
    high = a + b
    rest = high - a
    return high, (a - (high - rest)) + (b - rest)


@_kernel(f"int64(float32[::1], float64[::1], {_NODES})")
def _sum_prefixes(values, counts, nodes):
    """Prefix sums of count, value and square about the median, equal values merged; the number of values.

    The sums carry their rounding errors along, so that each entry is rounded only once.
    """
    s0, s1, s2 = nodes[COUNT], nodes[SUM], nodes[SQUARE]
    is_weighted = counts.shape[0] > 0
    shift = np.float64(values[values.shape[0] // 2])
    n = 1
    last = values[0]
    count, weight = 1.0, 0.0
    first, first_low, second, second_low = 0.0, 0.0, 0.0, 0.0
    s0[0] = s1[0] = s2[0] = 0.0
    for index in range(values.shape[0]):
        value = values[index]
        n += value != last
        last = value
        if is_weighted:
            count = counts[index]
        x = np.float64(value) - shift
        weight += count
        first, rest = _sum_exactly(first, count * x)
        first_low += rest
        second, rest = _sum_exactly(second, count * x * x)
        second_low += rest
        s0[n] = weight  # overwritten until the next distinct value
        s1[n] = first + first_low
        s2[n] = second + second_low
    return n


@_kernel(f"void(int64, int64, int64, float64, {_NODES}, {_PATH}, {_SCRATCH})")
def _relax_block(start, stop, high, penalty, nodes, previous, scratch):
    """Nodes start .. stop from predecessors up to `high`; the inner loop runs over nodes, and is vectorised."""
    size = stop - start + 1
    s0, s1, g = nodes[COUNT], nodes[SUM], nodes[COST]
    node0, node1 = s0[start : stop + 1], s1[start : stop + 1]
    best, best_index = scratch[0][:size], scratch[1][:size]
    for lane in range(size):
        best[lane] = np.inf
    for index in range(np.int64(previous[start - 1]), high + 1):
        base, weight, total, label = g[index], s0[index], s1[index], float(index)
        for lane in range(size):
            d = node1[lane] - total
            value = base - d * d / (node0[lane] - weight)
            is_better = value < best[lane]
            best[lane] = value if is_better else best[lane]
            best_index[lane] = label if is_better else best_index[lane]
    for lane in range(size):
        g[start + lane] = best[lane] + penalty
        previous[start + lane] = np.int32(best_index[lane])


@_kernel(f"void(int64, float64, {_NODES}, {_PATH})")
def _relax_node(node, penalty, nodes, previous):
    """One node, where pieces are so short that its predecessor may lie within the block."""
    s0, s1, s2, g = nodes[COUNT], nodes[SUM], nodes[SQUARE], nodes[COST]
    first = np.int64(previous[node - 1])
    best, best_index = np.inf, first
    for index in range(first, node):
        if g[index] + s2[index] > best + s2[node]:
            break  # the path to `index` alone already costs more
        d = s1[node] - s1[index]
        value = g[index] - d * d / (s0[node] - s0[index])
        if value < best:
            best, best_index = value, index
    g[node] = best + penalty
    previous[node] = best_index


@_kernel(f"int64(int64, int64, int64, {_NODES}, {_SCRATCH})")
def _best_predecessor(node, low, high, nodes, scratch):
    """The best predecessor of one node among low .. high; the first of equals."""
    size = high - low + 1
    if size <= 1:
        return low
    weight, total = nodes[COUNT, node], nodes[SUM, node]
    w, t, base = nodes[COUNT, low : high + 1], nodes[SUM, low : high + 1], nodes[COST, low : high + 1]
    values = scratch[0][:size]
    for lane in range(size):
        d = total - t[lane]
        values[lane] = base[lane] - d * d / (weight - w[lane])
    best = 0
    for lane in range(1, size):
        if values[lane] < values[best]:
            best = lane
    return low + best


@_kernel(f"int64(int64, int64, int64, int64, {_NODES})")
def _last_candidate(stop, node, low, limit, nodes):
    """The last possible predecessor of `stop` before `node`, at least `limit`; node - 1 when that is unknown.

    The cost of the cheapest path never falls along the nodes. So a predecessor that costs more than some known
    path to `stop` before its last penalty is out, and so are all behind it.
    """
    s0, s1, s2, g = nodes[COUNT], nodes[SUM], nodes[SQUARE], nodes[COST]
    index = min(low + stop - node, node - 1)
    near, far = s1[stop] - s1[low], s1[stop] - s1[index]
    bound = g[low] - near * near / (s0[stop] - s0[low])
    bound = min(bound, g[index] - far * far / (s0[stop] - s0[index]))
    bound += s2[stop] * (1 + 4 * _EPSILON)
    while limit < node - 1 and g[limit + 1] + s2[limit + 1] <= bound:
        limit += 1
    return limit


@_kernel(f"int64(int64, int64, int64[:, ::1], {_NODES}, {_PATH}, {_SCRATCH})")
def _reach(node, block, marks, nodes, previous, scratch):
    """The last predecessor that the nodes from `node` to the end of its block can have; n when that is unknown.

    The best predecessor of a block's last node bounds the whole block. Long rows have blocks of blocks, so that
    the search for it is short on each level. `marks` holds STOP, LIMIT and CAP of the current block of every level;
    its last level is the whole row.
    """
    low, top = np.int64(previous[node - 1]), marks.shape[1] - 1
    for level in range(top - 1, -1, -1):
        if node <= marks[STOP, level]:
            continue
        stop = min(node + block * _FACTOR**level - 1, marks[STOP, level + 1])
        limit = _last_candidate(stop, node, low, marks[LIMIT, level], nodes)
        high = min(limit, marks[CAP, level + 1])
        is_known = limit < node - 1 or high < limit
        marks[STOP, level], marks[LIMIT, level] = stop, limit
        marks[CAP, level] = _best_predecessor(stop, low, high, nodes, scratch) if is_known else marks[CAP, top]
    return marks[CAP, 0]


@_kernel(f"int64(int64, float64, int64, {_NODES}, {_PATH}, {_SCRATCH})")
def _cheapest_path(n, penalty, block, nodes, previous, scratch):
    """The cheapest path from node 0 to n when every piece costs `penalty` more; the number of its pieces.

    COST holds the cost of the cheapest path to each node minus its SQUARE.
    """
    levels = 1
    while _WORTH * block * _FACTOR**levels < n:
        levels += 1
    marks = np.zeros((3, levels + 1), dtype=np.int64)
    marks[STOP, levels], marks[CAP, levels] = n, n
    nodes[COST, 0] = 0.0
    previous[0] = 0
    node = 1
    while node <= n:
        high = _reach(node, block, marks, nodes, previous, scratch)
        if high < node:
            stop = marks[STOP, 0]
            _relax_block(node, stop, high, penalty, nodes, previous, scratch)
        else:
            stop = min(node + _ALONE - 1, marks[STOP, 0])
            for alone in range(node, stop + 1):
                _relax_node(alone, penalty, nodes, previous)
            marks[STOP, 0] = stop  # the next node begins a block
        node = stop + 1
    pieces, node = 0, n
    while node > 0:
        node = np.int64(previous[node])
        pieces += 1
    return pieces


@_kernel("float64(int64, int64, float64, float64, float64[::1], float64[::1])")
def _next_penalty(k, attempt, pieces, penalty, few, many):
    """The next penalty to try; `few` and `many` hold pieces, cost and penalty of the nearest paths on both sides.

    While one side is unknown, or the model leaves the bracket, powers and chords take over.
    """
    if attempt < _MODEL_PATHS:
        if few[2] == np.inf or many[2] == 0.0:
            return penalty * (pieces / k) ** 3
        slope = (few[1] - many[1]) / (few[0] ** -2.0 - many[0] ** -2.0)
        found = slope * ((k - 1) ** -2.0 - (k + 1) ** -2.0) / 2
        if many[2] < found < few[2]:
            return found
    return -(few[1] - many[1]) / (many[0] - few[0])  # negative: a chord


@_kernel(f"void(int64, int64, {_PATH}, {_PATH}, {_PATH})")
def _splice(k, pieces, few, many, previous):
    """A path of k pieces from two cheapest paths under one penalty, one with fewer (`pieces`), one with more.

    Where a piece of `few` encloses a piece of `many`, k - pieces places further on, the paths change over: by the
    quadrangle inequality both new paths together cost no more, so they are cheapest too.
    """
    shift, piece = k - pieces, 0
    while many[piece + 1 + shift] >= few[piece + 1]:
        piece += 1
    for index in range(1, k + 1):
        before = many[index - 1] if index - 1 <= piece + shift else few[index - 1 - shift]
        previous[many[index] if index <= piece + shift else few[index - shift]] = before


@_kernel(f"float64(int64, int64, float64, int64, {_NODES}, {_PATHS}, {_SCRATCH})")
def _search(n, k, penalty, block, nodes, paths, scratch):
    """A penalty with a cheapest path of exactly k pieces, which it leaves in `paths[0]`; -1 if it gives up.

    A chord joins two known points of the convex C(k): its slope either finds a point below it, or shows that both
    are cheapest under that penalty, and then a path of k pieces is spliced from them.
    """
    few, many = np.empty(3), np.empty(3)
    few[0], few[1], few[2] = 1, nodes[SQUARE, n] - nodes[SUM, n] ** 2 / nodes[COUNT, n], np.inf
    many[0], many[1], many[2] = n, 0.0, 0.0
    previous, few_path, many_path = paths
    few_path[0], few_path[1] = 0, n
    for node in range(n + 1):
        many_path[node] = node
    for attempt in range(_MAX_PATHS):
        pieces = _cheapest_path(n, abs(penalty), block, nodes, previous, scratch)
        if pieces == k:
            return abs(penalty)
        if penalty < 0 and (pieces <= few[0] or pieces >= many[0]):
            _splice(k, np.int64(few[0]), few_path, many_path, previous)
            return abs(penalty)
        side, path = (few, few_path) if pieces < k else (many, many_path)
        node = n
        for piece in range(pieces, -1, -1):
            path[piece] = node
            node = np.int64(previous[node])
        side[0], side[2] = pieces, abs(penalty)
        side[1] = nodes[COST, n] + nodes[SQUARE, n] - pieces * side[2]
        penalty = _next_penalty(k, attempt, pieces, abs(penalty), few, many)
    return -1.0


@_kernel(f"float64(int64, int64, float64, {_NODES}, {_PATH}, float64[::1])")
def _read_path(n, k, shift, nodes, previous, centroids):
    """Writes the means of the pieces; the sum of squared errors."""
    stop, error = n, 0.0
    for piece in range(k - 1, -1, -1):
        start = np.int64(previous[stop])
        weight = nodes[COUNT, stop] - nodes[COUNT, start]
        total = nodes[SUM, stop] - nodes[SUM, start]
        centroids[piece] = shift + total / weight
        error += nodes[SQUARE, stop] - nodes[SQUARE, start] - total * total / weight
        stop = start
    return error


@_kernel("void(float32[::1], int64, int64, float64[::1])")
def _copy_distinct(values, n, k, centroids):
    """Each distinct value is its own centroid; the last one is repeated."""
    index = 0
    centroids[0] = values[0]
    for position in range(1, values.shape[0]):
        index += values[position] != values[position - 1]
        centroids[index] = values[position]
    for rest in range(n, k):
        centroids[rest] = centroids[n - 1]


@_kernel("void(float32[:, ::1], float64[::1], int64[::1], int64, float64[:, ::1], float64[:, ::1])")
def fit_rows(rows, counts, levels, block, centroids, errors):
    """Optimal centroids of each sorted row for each number of levels, greatest number first.

    `rows` float32 `[R, N]`; `counts` `[N]` are the weights of the values, or empty; `centroids` `[R, sum of levels]`
    holds one codebook after the other; `errors` `[R, L]` becomes the sum of squared errors, -1 where unsolved.
    """
    size = rows.shape[1]
    nodes = np.empty((4, size + 1))
    previous = np.empty(size + 1, dtype=np.int32)
    paths = (previous, np.empty(size + 1, dtype=np.int32), np.empty(size + 1, dtype=np.int32))
    scratch = (np.empty(size + 1), np.empty(size + 1))  # two arrays, else the inner loop is not vectorised
    ratios = np.ones(levels.shape[0])  # penalty * k^3 over its prediction, learned from row to row
    ratios[0] = 4.4  # of a normal distribution, over the sum of squares about the mean
    for row in range(rows.shape[0]):
        n = _sum_prefixes(rows[row], counts, nodes)
        shift = np.float64(rows[row, size // 2])
        total = nodes[SQUARE, n] - nodes[SUM, n] ** 2 / nodes[COUNT, n]
        prediction, first = total, 0
        for index in range(levels.shape[0]):
            k = levels[index]
            found = centroids[row, first : first + k]
            first += k
            errors[row, index] = 0.0
            if n <= k:
                _copy_distinct(rows[row], n, k, found)
                continue
            pieces = max(min(block, (2 * n) // (5 * k)), 4)
            penalty = _search(n, k, ratios[index] * prediction / k**3, pieces, nodes, paths, scratch)
            if penalty > 0:
                errors[row, index] = _read_path(n, k, shift, nodes, previous, found)
                ratios[index] += 0.2 * (penalty * k**3 / prediction - ratios[index])
                prediction = penalty * k**3
            if penalty <= 0 or errors[row, index] * _RELATIVE_ERROR < _ROUNDING * total:
                errors[row, index] = -1.0


@_kernel(f"{_PAIR}(float64, float64)")
def _multiply_exactly(a, b):
    high = a * b
    a_high, b_high = _SPLIT * a, _SPLIT * b
    a_high, b_high = a_high - (a_high - a), b_high - (b_high - b)
    a_low, b_low = a - a_high, b - b_high
    return high, ((a_high * b_high - high) + a_high * b_low + a_low * b_high) + a_low * b_low


@_kernel(f"{_PAIR}(float64, float64, float64, float64)")
def _add_pairs(a, a_low, b, b_low):
    high, rest = _sum_exactly(a, b)
    low, rest_low = _sum_exactly(a_low, b_low)
    high, rest = _sum_exactly(high, rest + low)
    return _sum_exactly(high, rest + rest_low)


@_kernel("float64[:, ::1](float64[::1], float64[::1])")
def _sum_pairs(values, counts):
    """Rows: count, value (two), square (two); entry i is the sum over the first i values."""
    sums = np.zeros((5, values.shape[0] + 1))
    for i in range(values.shape[0]):
        first, first_low = _multiply_exactly(values[i], counts[i])
        second, second_low = _multiply_exactly(values[i], values[i])
        low_first, low_second = second_low * counts[i], 0.0
        second, low_second = _multiply_exactly(second, counts[i])
        sums[0, i + 1] = sums[0, i] + counts[i]
        sums[1, i + 1], sums[2, i + 1] = _add_pairs(sums[1, i], sums[2, i], first, first_low)
        sums[3, i + 1], sums[4, i + 1] = _add_pairs(sums[3, i], sums[4, i], second, low_second + low_first)
    return sums


@_kernel(f"{_PAIR}(int64, int64, float64[:, ::1])")
def _piece_cost(start, stop, sums):
    """Sum of squared distances of the values start .. stop-1 to their mean."""
    weight = sums[0, stop] - sums[0, start]
    total, total_low = _add_pairs(sums[1, stop], sums[2, stop], -sums[1, start], -sums[2, start])
    square, square_low = _multiply_exactly(total, total)
    square_low += 2 * total * total_low
    quotient = square / weight
    back, back_low = _multiply_exactly(quotient, weight)
    quotient_low = ((square - back) - back_low + square_low) / weight
    second, second_low = _add_pairs(sums[3, stop], sums[4, stop], -sums[3, start], -sums[4, start])
    return _add_pairs(second, second_low, -quotient, -quotient_low)


@_kernel("void(int64, int64, int64, float64[:, ::1], float64[:, ::1], float64[:, ::1], int32[::1])")
def _fill_layer(layer, first, last, sums, before, after, starts):
    """Best starts of piece number `layer`, and costs, for every stop first .. last; they move right with the stop."""
    tasks = np.empty((80, 4), dtype=np.int64)
    tasks[0] = (first, last, layer, last - 1)
    depth = 1
    while depth > 0:
        depth -= 1
        left, right, low, high = tasks[depth]
        if left > right:
            continue
        middle = (left + right) // 2
        best, best_low, best_start = np.inf, 0.0, low
        for start in range(low, min(high, middle - 1) + 1):
            cost, cost_low = _piece_cost(start, middle, sums)
            cost, cost_low = _add_pairs(cost, cost_low, before[0, start], before[1, start])
            if cost < best or (cost == best and cost_low < best_low):
                best, best_low, best_start = cost, cost_low, start
        after[0, middle], after[1, middle], starts[middle] = best, best_low, best_start
        tasks[depth] = (left, middle - 1, low, best_start)
        tasks[depth + 1] = (middle + 1, right, best_start, high)
        depth += 2


@_kernel("float64(float64[::1], float64[::1], float64[::1])")
def fit_distinct(values, counts, centroids):
    """Optimal centroids of sorted distinct values with counts, fewer centroids than values; their squared error."""
    n, k = values.shape[0], centroids.shape[0]
    sums = _sum_pairs(values, counts)
    starts = np.zeros((k, n + 1), dtype=np.int32)
    before, after = np.empty((2, n + 1)), np.empty((2, n + 1))
    for stop in range(1, n + 1):
        after[0, stop], after[1, stop] = _piece_cost(0, stop, sums)
    for layer in range(1, k):
        before, after = after, before
        first = n if layer == k - 1 else layer + 1
        _fill_layer(layer, first, n - (k - 1 - layer), sums, before, after, starts[layer])
    error, stop = after[0, n], n
    for layer in range(k - 1, -1, -1):
        start = np.int64(starts[layer, stop])
        total, _ = _add_pairs(sums[1, stop], sums[2, stop], -sums[1, start], -sums[2, start])
        centroids[layer] = total / (sums[0, stop] - sums[0, start])
        stop = start
    return max(error, 0.0)
