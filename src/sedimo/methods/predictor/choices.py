"""Recipes as integers: which of its formats each decision takes. What all predictors read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from sedimo.allocation.table import SensitivityTable
from sedimo.bank import Candidate
from sedimo.errors import InputError
from sedimo.quant.formats import FP16, Format
from sedimo.quant.parts import entry_text
from sedimo.space import Decision, Recipe, SearchSpace

Codes = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Choices:
    """The options of a space, numbered: option k of decision d is `space.decisions[d].formats[k]`.

    Arrays over options are `[D, K]` with K the largest number of options; what is beyond a decision's own is padding.
    """

    space: SearchSpace

    @property
    def n_decisions(self) -> int:
        """D."""
        return len(self.space.decisions)

    @cached_property
    def n_options(self) -> int:
        """K, the largest number of options of a decision."""
        return max(len(d.formats) for d in self.space.decisions)

    @cached_property
    def exists(self) -> npt.NDArray[np.bool_]:
        """Whether there is such an option, `[D, K]`."""
        n = np.array([len(d.formats) for d in self.space.decisions])
        return np.arange(self.n_options)[None] < n[:, None]

    @cached_property
    def _columns(self) -> tuple[Mapping[Format, int], ...]:
        return tuple({f: k for k, f in enumerate(d.formats)} for d in self.space.decisions)

    def codes(self, recipes: Iterable[Recipe]) -> Codes:
        """The option of each decision under each recipe, `[T, D]`.

        Raises:
            InputError: a format that the space does not offer for a layer.
        """
        rows = [self._row(recipe) for recipe in recipes]
        return np.array(rows, dtype=np.int64).reshape(len(rows), self.n_decisions)

    def recipe(self, codes: Sequence[int] | Codes) -> Recipe:
        """The recipe of one row of codes `[D]`."""
        pairs = zip(self.space.decisions, codes, strict=True)
        return self.space.recipe({d.name: d.formats[int(k)] for d, k in pairs})

    def choice(self, codes: Sequence[int] | Codes) -> dict[str, Format]:
        """The format of each decision under one row of codes `[D]`."""
        return {d.name: d.formats[int(k)] for d, k in zip(self.space.decisions, codes, strict=True)}

    def array(self, value: Callable[[Decision, Format], float], padding: float = 0.0) -> Values:
        """A number for every option, `[D, K]`."""
        found = np.full((self.n_decisions, self.n_options), padding)
        for i, decision in enumerate(self.space.decisions):
            found[i, : len(decision.formats)] = [value(decision, f) for f in decision.formats]
        return found

    def costs(self, table: SensitivityTable) -> Values:
        """The costs of a table, `[D, K]`; 0 where there is no option.

        Raises:
            InputError: the table has no cost for an option.
        """
        missing = [(d.name, str(f)) for d in self.space.decisions for f in d.formats if (d.name, f) not in table.index]
        if missing:
            raise InputError(f"the {table.method} table has no cost for {missing[0][0]} at {missing[0][1]}")
        return self.array(lambda d, f: table.index[d.name, f].cost)

    def errors(self, candidates: Mapping[tuple[str, Format], Candidate]) -> Values:
        """Relative weight errors, `[D, K]`; 0 where there is no option."""
        return self.array(lambda d, f: candidates[d.name, f].error)

    @cached_property
    def paper_bytes(self) -> Values:
        """Bytes of each option in the papers' accounting, `[D, K]` [bytes]."""
        return self.array(lambda d, f: d.paper_bytes(f))

    def paper_bits(self, codes: Codes) -> Values:
        """Average paper bits of recipes `[T, D]`, `[T]`."""
        found: Values = 8 * picked(self.paper_bytes, codes).sum(axis=1) / self.space.params
        return found

    def _row(self, recipe: Recipe) -> list[int]:
        row = []
        for decision, columns in zip(self.space.decisions, self._columns, strict=True):
            number_format = recipe.format_of(decision.layers[0], decision.stream)
            if number_format is None or number_format not in columns:
                entry = entry_text(recipe.layers.get(decision.layers[0], FP16))
                raise InputError(f"{decision.name} cannot take {entry} in this space; the recipe is of another")
            row.append(columns[number_format])
        return row


def picked(values: Values, codes: Codes) -> Values:
    """Of values over options `[D, K]` those that recipes `[T, D]` take, `[T, D]`."""
    found: Values = values[np.arange(values.shape[0])[None], codes]
    return found
