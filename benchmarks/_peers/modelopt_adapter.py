"""NVIDIA ModelOpt: the recipe of `auto_quantize` (gradient scores, linear programme), simulated and counted.

Its own `effective_bits` counts codes only; here the scales are counted too, one per block or channel in the
checkpoint's float16, as `mtq.compress` stores them. Budget and count include every copy of equal layers.

The loss is a mean squared error on the denoiser's output. Against the recorded output itself its gradient would be
zero at full precision, and every score with it; so the target is the recorded output plus unit noise, which samples
the Fisher information that ModelOpt's score is derived from.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from _peers.weights import FP16_BYTES, LAYER_TYPES, Quantized, QuantizedLayer
from sedimo.pipelines.adapter import DenoiserCall
from sedimo.pipelines.trajectory import output_tensor

PACKAGE = "nvidia-modelopt"


@dataclass(frozen=True, slots=True)
class Options:
    """The budget handed to ModelOpt [its effective bits], and the factor on the loss."""

    effective_bits: float
    loss_scale: float = 1e5

    @property
    def label(self) -> str:
        """Name of the row."""
        scale = "" if self.loss_scale != 1 else " loss unscaled"
        return f"auto_quantize {self.effective_bits:g}{scale}"


ROWS = (Options(4.5), Options(5.0), Options(6.0), Options(5.0, loss_scale=1.0))


def quantize(denoiser: nn.Module, options: Options, calls: Sequence[DenoiserCall], scratch: Path) -> Quantized:
    """Searches on recorded calls and simulates the recipe in `denoiser`, which is consumed.

    ModelOpt keeps its scores in the folder `scratch` and reuses them for another budget.
    """
    import modelopt.torch.quantization as mtq

    def loss(output: torch.Tensor, call: DenoiserCall) -> torch.Tensor:
        return torch.nn.functional.mse_loss(output, _target(call)) * options.loss_scale

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        model, state = mtq.auto_quantize(
            denoiser.requires_grad_(requires_grad=True),
            constraints={"effective_bits": options.effective_bits},
            quantization_formats=[
                copy.deepcopy(mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG),
                copy.deepcopy(mtq.INT8_WEIGHT_ONLY_CFG),
            ],
            data_loader=calls,
            forward_step=lambda model, call: output_tensor(model(**call.inputs)),
            loss_func=loss,
            num_calib_steps=1,  # weight-only formats: the ranges are those of the weights
            num_score_steps=len(calls),
            checkpoint=str(scratch / f"scores-{options.loss_scale:g}.pth"),
        )
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LAYER_TYPES)}
    found = {n: _read(m) for n, m in layers.items() if m.weight_quantizer.is_enabled}
    facts = {"effective_bits": f"{state['best']['constraints']['effective_bits']:.4f}"}
    return Quantized(found, model, facts=facts)


def _target(call: DenoiserCall) -> torch.Tensor:
    generator = torch.Generator().manual_seed(call.step)
    return call.output + torch.randn(call.output.shape, generator=generator)


@torch.no_grad()
def _read(layer: nn.Module) -> QuantizedLayer:
    quantizer, weight = layer.weight_quantizer, layer.weight.detach()
    bits = int(quantizer.num_bits)
    block = (quantizer.block_sizes or {}).get(-1)
    n_bytes = (weight.numel() * bits + 7) // 8 + quantizer.amax.numel() * FP16_BYTES
    return QuantizedLayer(quantizer(weight).detach().clone(), n_bytes, f"int{bits}" + (f"b{block}" if block else ""))
