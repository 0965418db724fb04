"""What a target is: everything about one place where results run.

A target lives in one file, which makes one constant of the class `Target`; `targets.TARGETS` lists them all. Help,
checks and the main job read that tuple, and nothing else names a target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sedimo.bank import Bank
from sedimo.checkpoint.writing import Finish, Origin, WriteOptions, WrittenCheckpoint
from sedimo.lab.lab import Lab
from sedimo.methods.method import Words
from sedimo.quant.tensor import QuantizedTensor
from sedimo.space import Recipe, SearchSpace


@dataclass(frozen=True)
class Packed:
    """A decided model: its recipe, the packed weights by layer, the bank behind them, and where it came from."""

    lab: Lab
    bank: Bank
    recipe: Recipe
    weights: Mapping[str, QuantizedTensor]
    origin: Origin


@dataclass(frozen=True)
class Target:
    """One place where results run.

    `families` are the families of formats that it has. `write` writes a decided model whole or not at all, under names
    that its readers expect, and calls what it is given before the result takes its place; `verify` reads that folder
    and raises a `StateError` unless it holds what was decided; `constrain` ties and bans decisions, with notes.
    """

    name: str
    words: Words
    families: tuple[str, ...]
    write: Callable[[Packed, Path, WriteOptions, Finish], WrittenCheckpoint]
    verify: Callable[[Packed, Path], None]
    constrain: Callable[[SearchSpace], SearchSpace] = lambda space: space

    def write_verified(
        self, packed: Packed, out: Path, options: WriteOptions, finish: Finish | None = None
    ) -> WrittenCheckpoint:
        """Writes a decided model to `out`, where nothing appears unless what was written is what was decided."""

        def verified(folder: Path, written: WrittenCheckpoint) -> None:
            self.verify(packed, folder)
            if finish is not None:
                finish(folder, written)

        return self.write(packed, out, options, verified)
