"""The smallest of each kind of thing that may be added: what writing one takes, for tests to put into the tuples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from sedimo.allocation.table import build_table
from sedimo.lab.bench import InForce
from sedimo.methods import method
from sedimo.quant.families.family import CostEstimate, Family, Words
from sedimo.settings import option
from sedimo.treatments.treatment import Treatment


class Step(Family):
    """One step size for the whole weight; codes count steps from its least value up."""

    name, words = "toy", Words("one grid for the whole layer")

    def tensors(self, number_format, n_channels, n_inputs):
        return {"low": (torch.float32, (1, 1)), "step": (torch.float32, (1, 1))}

    def fit(self, rows, formats, weight):
        low, high = (t.float().reshape(1, 1) for t in weight.detach().cpu().aminmax())
        return {f: {"low": low, "step": ((high - low) / f.qmax).clamp(min=1e-30)} for f in formats}

    def codes(self, rows, number_format, parameters):
        return ((rows - parameters["low"]) / parameters["step"]).round().clamp(0, number_format.qmax).byte()

    def dequantize(self, number_format, tensors):
        return tensors["codes"] * tensors["step"] + tensors["low"]


class ForeignStep(Step):
    """The same as another program has it: in blocks of 32 weights, written differently, not in our own checkpoint."""

    name, widths, is_foreign = "theirs", (4, 8), True

    @property
    def spelling(self):
        return "t{bits}_K"

    def refusal(self, number_format, shape):
        n_inputs = math.prod(shape[1:])
        return "" if n_inputs % 32 == 0 else f"rows of {n_inputs} weights are no blocks of 32"


TOY, FOREIGN = Step(), ForeignStep()


@dataclass(frozen=True)
class ToyKnobs:
    factor: float = option(2.0, "--toy", help="How many times the last weight.")


@dataclass(frozen=True)
class LargerWeight(InForce):
    """Does harm rather than good, which nobody asks a toy about."""

    factor: float

    def enter(self, denoiser, *, is_stored):
        *_, layer = (module for module in denoiser.modules() if isinstance(module, nn.Linear))
        before, layer.weight = layer.weight, nn.Parameter(self.factor * layer.weight.detach(), requires_grad=False)
        return lambda: setattr(layer, "weight", before)

    def __str__(self):
        return f"the last weight {self.factor:g} times"


TOY_TREATMENT = Treatment(
    "toy",
    method.Words("makes a weight larger", source="this file"),
    ToyKnobs,
    lambda _lab, knobs: LargerWeight(knobs.factor),
)


def _by_missing_bits(lab, _task):
    """A bit that a format lacks costs the same in every layer."""
    bank = lab.estimated
    table = build_table(
        "toy", bank.space, bank.candidates, lambda c: CostEstimate(16.0 - c.format.bits, 0.0, 1), {}, unit="bits"
    )
    return method.Finding(bank, table)


TOY_METHOD = method.Method(
    name="toy",
    words=method.Words(
        "the bits that layers lack, all alike", cost="how many bits it lacks", sees="bits", misses="all else"
    ),
    runs_pipeline=False,
    is_blind=True,
    price=lambda _lab, _task: method.Price(seconds=0.1),
    measure=_by_missing_bits,
)
