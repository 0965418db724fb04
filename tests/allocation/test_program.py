"""Each trap of the solver, one by one."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from allocation_tables import random_table, scaled, table_of
from scipy.optimize import milp

from sedimo.allocation import program, solve
from sedimo.allocation.program import MAX_SOLVES, Answer, solve_checked, solve_highs
from sedimo.allocation.solve import Budget, allocate, make_problem
from sedimo.allocation.table import Cost
from sedimo.errors import InputError, SedimoError
from sedimo.quant.formats import FP16, Format

UAQ3 = Format.parse("uaq3")


@pytest.mark.parametrize("factor", [1e-30, 1e-9, 1e9, 1e30])
def test_tiny_and_huge_costs_give_the_same_recipe(factor):
    table = random_table(60, seed=11)
    plain, changed = allocate(table, bits=3.6), allocate(scaled(table, factor), bits=3.6)
    assert changed.choice == plain.choice
    assert changed.gap <= 1e-4
    assert changed.used_bytes >= 0.995 * changed.budget_bytes


def test_without_scaling_tiny_costs_would_be_lost():
    """What the scaling is for: HiGHS calls anything optimal when all costs drown in its tolerances."""
    table = scaled(random_table(60, seed=11), 1e-9)
    problem = make_problem(table, Budget(allocate(table, bits=3.6).budget_bytes))
    raw, good = solve_highs(problem, 1.0, 1e-4), allocate(table, bits=3.6)
    assert problem.total_cost(raw.choice) > 1.05 * good.objective


def test_a_spread_of_twelve_decades_does_not_matter():
    table = random_table(30, seed=12)
    extreme = Cost("huge", UAQ3, 1e9, 0.0, 0, 10, 10, 0), Cost("huge", FP16, 0.0, 0.0, 0, 20, 20, 0)
    params = {**table.params, "huge": 10}
    found = allocate(table_of([*table.costs, *extreme], params), bits=3.5)
    assert found.choice["huge"] == FP16
    assert found.gap <= 1e-4
    assert found.used_bytes >= 0.99 * found.budget_bytes


def one_byte_over():
    """Two decisions of a gigabyte: the better pair takes one byte more than the budget."""
    sizes = {("a", FP16): 600_000_001, ("a", UAQ3): 100, ("b", FP16): 400_000_000, ("b", UAQ3): 200}
    entries = [Cost(d, f, 0.0 if f == FP16 else 1.0, 0.0, 0, n, n, 0) for (d, f), n in sizes.items()]
    return table_of(entries, {"a": 1_000_000, "b": 1_000_000})


def test_an_answer_within_tolerance_but_over_budget_is_mended():
    table, budget = one_byte_over(), Budget(1_000_000_000)
    raw = solve_highs(make_problem(table, budget), 1.0, 0.0)
    assert make_problem(table, budget).used(raw.choice)[0] == budget.size_bytes + 1  # the trap is real
    found = solve.allocate_within(table, budget, gap=0.0)
    assert found.used_bytes <= budget.size_bytes
    assert found.objective == 1.0


def stubborn(excess_column: int):
    calls = []

    def solver(problem, unit, gap):
        calls.append(int(problem.limit[0]))
        return Answer(np.full(len(problem.rows), excess_column, dtype=np.int64), -math.inf)

    return solver, calls


def test_an_answer_over_budget_is_asked_for_again_at_most_thrice(monkeypatch):
    problem = make_problem(random_table(5, seed=1), Budget(20_000))
    solver, calls = stubborn(problem.cost.shape[1] - 1)
    monkeypatch.setattr(program, "solve_highs", solver)
    solved = solve_checked(problem, 1.0, 1e-4)
    assert len(calls) == solved.n_solves == MAX_SOLVES == 4
    assert calls[0] == 20_000
    assert all(later < earlier for earlier, later in itertools.pairwise(calls))


def test_a_solver_that_never_fits_is_replaced_by_exchanges(monkeypatch):
    table = random_table(8, seed=1)
    monkeypatch.setattr(program, "solve_highs", stubborn(3)[0])
    found = allocate(table, bits=3.5)
    assert found.used_bytes <= found.budget_bytes
    assert found.n_solves in (1, MAX_SOLVES)
    assert found.objective <= allocate(table, bits=3.5, rule="greedy").objective


def test_a_solver_that_finds_nothing_does_not_prove_anything(monkeypatch):
    table = random_table(30, seed=1)
    monkeypatch.setattr(program, "solve_highs", lambda *_: Answer(None, math.inf))
    found = allocate(table, bits=3.5)
    assert found.bound < found.objective
    assert found.objective == allocate(table, bits=3.5, rule="greedy").objective


def test_the_bound_is_that_of_the_first_call(monkeypatch):
    """Later calls see lowered limits: their bounds are too high."""
    problem = make_problem(random_table(5, seed=1), Budget(20_000))
    bounds = iter([1.0, 2.0, 3.0, 4.0])

    def solver(current, unit, gap):
        return Answer(np.full(5, problem.cost.shape[1] - 1, dtype=np.int64), next(bounds))

    monkeypatch.setattr(program, "solve_highs", solver)
    assert solve_checked(problem, 1.0, 1e-4).bound == 1.0


def test_a_failing_solver_says_so(monkeypatch):
    class Failed:
        status, message, x, mip_dual_bound = 4, "numerical trouble", None, None

    monkeypatch.setattr(program, "milp", lambda *_args, **_kwargs: Failed())
    with pytest.raises(SedimoError, match=r"gave up on 8 decisions .* numerical trouble"):
        allocate(random_table(8, seed=1), bits=3.5)


def test_a_budget_beyond_64_bits_limits_nothing():
    table = random_table(8, seed=1)
    free = allocate(table, bits=32.0)
    for budget in ({"bits": 1e300}, {"budget_bytes": 1 << 70}, {"bits": 1e30, "budget_bops": 1 << 80}):
        found = allocate(table, **budget)
        assert (found.choice, found.objective) == (free.choice, free.objective)


def test_a_solver_that_stops_early_with_nothing_says_so(monkeypatch):
    class Stopped:
        status, message, x, mip_dual_bound = 1, "node limit", None, None

    monkeypatch.setattr(program, "milp", lambda *_args, **_kwargs: Stopped())
    with pytest.raises(SedimoError, match=r"no choice for 8 decisions .* does not prove that there is none"):
        allocate(random_table(8, seed=1), bits=3.5)


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (lambda *_: Answer(np.full(8, 3, dtype=np.int64), -math.inf), "which proves nothing"),
        (lambda *_: Answer(None, math.inf), "no choice of formats keeps the budget"),
    ],
)
def test_answers_that_never_fit_are_not_taken_for_a_proof(monkeypatch, solver, message):
    monkeypatch.setattr("sedimo.allocation.program.repair", lambda *_: None)
    monkeypatch.setattr(program, "solve_highs", solver)
    with pytest.raises(InputError, match=message):
        allocate(random_table(8, seed=1), bits=3.5)


_PRINTS = """
import ctypes, io, json, os, sys
from sedimo.allocation.program import silenced_stdout
libc = ctypes.CDLL(None)
print("before"); libc.puts(b"before in C")
{replace}
with silenced_stdout():
    libc.puts(b"noise in C"); os.write(1, b"noise on the descriptor\\n"); print("noise in Python")
sys.stdout = sys.__stdout__
libc.puts(b"after in C"); libc.fflush(None); print(json.dumps("after"))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="calls the C library by its POSIX name")
@pytest.mark.parametrize(
    "replace", ["", "sys.stdout = io.StringIO()", "sys.stdout = None", "sys.stdout = type('Odd', (), {})()"]
)
def test_compiled_code_cannot_print(replace):
    """Also when `sys.stdout` has no descriptor, as in notebooks and under test runners."""
    code = _PRINTS.format(replace=replace)
    if "None" in replace or "Odd" in replace:
        code = code.replace('; print("noise in Python")', "")
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=buffered)
    assert "noise" not in result.stdout
    assert sorted(result.stdout.split("\n")) == sorted(["before", "before in C", "after in C", json.dumps("after"), ""])


@pytest.mark.skipif(sys.platform == "win32", reason="closes a POSIX descriptor")
def test_a_closed_standard_output_is_no_obstacle():
    code = "import os\nfrom sedimo.allocation.program import silenced_stdout as quiet\nos.close(1)\nwith quiet(): pass"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_descriptor_returns_after_an_error(capfd):
    from sedimo.allocation.program import silenced_stdout

    with pytest.raises(ValueError, match="inside"), silenced_stdout():
        raise ValueError("inside")
    sys.stdout.write("visible again")
    sys.stdout.flush()
    assert "visible again" in capfd.readouterr().out


def test_solving_prints_nothing(capfd, monkeypatch):
    def noisy(*arguments, **keywords):
        os.write(1, b"noise")
        return milp(*arguments, **keywords)

    monkeypatch.setattr(program, "milp", noisy)
    assert allocate(random_table(40, seed=2), bits=3.5, gap=0.0).n_solves == 1
    assert capfd.readouterr().out == ""


def test_an_answer_that_never_fits_is_mended_rather_than_thrown_away(monkeypatch):
    """Here the exact choice beats the exchanges; the solver hands it out with one format too large."""
    table = random_table(6, seed=128)
    exact, greedy = allocate(table, bits=3.3, gap=0.0), allocate(table, bits=3.3, rule="greedy")
    assert exact.objective < 0.9 * greedy.objective

    def spoiled(problem, unit, gap):
        names = sorted(table.by_decision)
        formats = [[row.variant(i)[row.name] for i in range(len(row))] for row in problem.rows]
        columns = [row.index(exact.choice[name]) for name, row in zip(names, formats, strict=True)]
        columns[names.index("layer0")] = len(problem.rows[names.index("layer0")]) - 1
        return Answer(np.array(columns), -math.inf)

    monkeypatch.setattr(program, "solve_highs", spoiled)
    assert allocate(table, bits=3.3).objective < 0.95 * greedy.objective
