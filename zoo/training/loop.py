"""One training loop for all embedded models: a time budget, an average of the weights, a resumable state.

The learning rate follows the share of the time budget that is spent, not a number of steps, so that the
decay ends when the time does on any machine.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

logger = logging.getLogger(__name__)

LossFunction = Callable[[int, torch.Generator], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Budget:
    """How long and how fast to train. `learning_rate` is the peak."""

    minutes: float
    learning_rate: float
    weight_decay: float = 0.01
    warmup_steps: int = 100
    ema_decay: float = 0.999
    save_every_seconds: float = 120.0


def _learning_rate(budget: Budget, step: int, spent: float) -> float:
    warmup = min(1.0, (step + 1) / budget.warmup_steps)
    decay = 0.5 * (1 + math.cos(math.pi * min(1.0, spent)))
    return budget.learning_rate * warmup * max(decay, 0.01)


def atomic_save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file whole or not at all."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, temporary, metadata=metadata)
    temporary.replace(path)


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers, a shared one once (a state dict would list it once per user)."""
    return itertools.chain(model.parameters(), model.buffers())


class _State:
    """Model, its running average, the optimizer, and where they are kept between two runs."""

    def __init__(self, model: nn.Module, budget: Budget, path: Path) -> None:
        self.model, self.path, self.budget = model, path, budget
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=budget.learning_rate, betas=(0.9, 0.99), weight_decay=budget.weight_decay
        )
        self.step, self.seconds = 0, 0.0
        if path.exists():
            self._load()

    def update_average(self) -> None:
        decay = min(self.budget.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            pairs = zip(_tensors(self.average), _tensors(self.model), strict=True)
            for mean, value in pairs:
                if mean.is_floating_point():
                    mean.lerp_(value, 1 - decay)
                else:
                    mean.copy_(value)

    def save(self) -> None:
        moments = {}
        for index, parameter in enumerate(self.parameters):
            state = self.optimizer.state[parameter]
            moments |= {f"optimizer.{index}.{k}": state[k] for k in ("exp_avg", "exp_avg_sq", "step")}
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()} | moments
        progress = json.dumps({"step": self.step, "seconds": self.seconds})
        atomic_save(tensors, self.path, {"progress": progress})

    def _load(self) -> None:
        with safe_open(self.path, "pt") as file:
            progress = json.loads(file.metadata()["progress"])
        tensors = load_file(self.path)
        self.step, self.seconds = progress["step"], progress["seconds"]
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        self.average.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("average.")})
        for index, parameter in enumerate(self.parameters):
            self.optimizer.state[parameter] = {
                k: tensors[f"optimizer.{index}.{k}"] for k in ("exp_avg", "exp_avg_sq", "step")
            }
        logger.info("resumed at step %d after %.1f minutes", self.step, self.seconds / 60)


def train(model: nn.Module, loss_function: LossFunction, budget: Budget, path: Path, *, seed: int) -> nn.Module:
    """Trains until the time budget is spent and returns the averaged model.

    `loss_function(step, generator)` draws its own batch. The state at `path` is written every few minutes
    and picked up by the next call.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    state = _State(model, budget, path)
    generator = torch.Generator().manual_seed(seed + state.step)
    last_save, running = time.monotonic(), 0.0
    while state.seconds < budget.minutes * 60:
        started = time.monotonic()
        for group in state.optimizer.param_groups:
            group["lr"] = _learning_rate(budget, state.step, state.seconds / (budget.minutes * 60))
        loss = loss_function(state.step, generator)
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(state.parameters, 1.0)
        state.optimizer.step()
        state.step += 1
        state.update_average()
        state.seconds += time.monotonic() - started
        running = float(loss.detach()) if state.step == 1 else 0.98 * running + 0.02 * float(loss.detach())
        if state.step % 50 == 0:
            logger.info("step %d, %.1f min, loss %.4f", state.step, state.seconds / 60, running)
        if time.monotonic() - last_save > budget.save_every_seconds:
            state.save()
            last_save = time.monotonic()
    state.save()
    return state.average
