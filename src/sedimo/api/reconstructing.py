"""Learned rounding as a part of the main job: after the recipe is decided, before it is checked and written."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from sedimo.allocation.problem import Allocation
from sedimo.api.opening import Opened
from sedimo.api.planning import N_RECONSTRUCTED
from sedimo.bank import SILENT, Bank, Progress
from sedimo.codec import to_plain
from sedimo.measurement.reconstruction import Reconstruction, plan_reconstruction, reconstruct
from sedimo.measurement.study import Study
from sedimo.reporting.summary import LearnedRounding

_BLOCK_KEYS = ("name", "nearest_error", "learned_error", "is_learned", "n_rows", "n_weights", "n_changed", "seconds")


def reconstruct_recipe(
    opened: Opened, bank: Bank, allocation: Allocation, study: Study, progress: Progress = SILENT
) -> Reconstruction | None:
    """The weights of an allocation with learned rounding; None when the order does not ask for it.

    Raises:
        InputError: the recipe has no uaq layer.
        Interrupted: Ctrl-C; finished blocks are kept in the study.
    """
    options = opened.order.reconstruct
    if options is None:
        return None
    sampling = opened.order.sampling.sampling_many(opened.pipe, N_RECONSTRUCTED)
    return reconstruct(
        opened.pipe,
        bank,
        plan_reconstruction(opened.graph, allocation.recipe),
        sampling,
        study=study,
        options=options,
        progress=progress,
    )


def learned_rounding(found: Reconstruction) -> LearnedRounding:
    """What the report tells about it."""
    return LearnedRounding(
        n_blocks=len(found.blocks),
        n_learned=sum(block.is_learned for block in found.blocks),
        n_samples=found.n_samples,
        n_steps=found.options.schedule.n_steps,
        changed_share=sum(b.n_changed for b in found.blocks if b.is_learned) / sum(b.n_weights for b in found.blocks),
        error_ratio=statistics.geometric_mean(
            [b.error / b.nearest_error for b in found.blocks if b.error > 0] or [1.0]
        ),
    )


def reconstruction_json(found: Reconstruction) -> Mapping[str, object]:
    """Plain values by name, the codes left out."""
    blocks = [{key: getattr(block, key) for key in _BLOCK_KEYS} for block in found.blocks]
    plain: Mapping[str, object] = {"n_samples": found.n_samples, "options": to_plain(found.options), "blocks": blocks}
    return plain
