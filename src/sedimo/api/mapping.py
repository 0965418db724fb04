"""The result layer by layer and step by step, for the report: what was measured on the way, and noise on the result."""

from __future__ import annotations

from sedimo.allocation.problem import Allocation
from sedimo.api.measuring import MeasuredTable
from sedimo.api.opening import Opened
from sedimo.bank import SILENT, Progress
from sedimo.measurement.smoothing import Smoothing
from sedimo.measurement.study import Study
from sedimo.measurement.trajectory import TRAJECTORY_SAMPLES, TrajectoryProbe, probe_trajectory
from sedimo.reporting.building import reference_format
from sedimo.reporting.maps import (
    ChannelRanges,
    Maps,
    NoiseMap,
    Repetition,
    local_map,
    recipe_map,
    repetition,
    trajectory_lines,
)
from sedimo.sensitivity.blocks import blocks_of

N_RANGES = 4  # smoothed layers whose ranges are drawn


def probe_result(
    opened: Opened, measured: MeasuredTable, allocation: Allocation, study: Study, progress: Progress = SILENT
) -> TrajectoryProbe:
    """The noise of the chosen recipe at all blocks and along the trajectory, on the first of the checked seeds."""
    bank = measured.bank
    plan = opened.order.sampling.checking(opened.pipe).first(TRAJECTORY_SAMPLES)
    blocks = tuple(blocks_of(bank.space))
    return probe_trajectory(opened.pipe, bank, allocation.recipe, plan, blocks, study=study, progress=progress)


def maps_of(
    opened: Opened, measured: MeasuredTable, allocation: Allocation, probe: TrajectoryProbe | None = None
) -> Maps:
    """All maps of a job; those of the result if it was probed."""
    return Maps(
        recipe=None if probe is None else recipe_map(probe),
        trajectory=None if probe is None else trajectory_lines(probe),
        local=_local(measured, allocation),
        repetition=_repetition(opened, measured, allocation),
        ranges=() if opened.smoothing is None else _ranges(opened.smoothing),
        blocks=None if measured.blocks is None else measured.blocks.as_curves(),
    )


def _ranges(smoothing: Smoothing) -> tuple[ChannelRanges, ...]:
    """Of the smoothed layers whose channels were most unequal, the ranges before and after."""
    spread = {name: max(one.exponents) - min(one.exponents) for name, one in smoothing.layers.items()}
    shown = sorted((name for name in spread if name in smoothing.ranges), key=lambda name: -spread[name])[:N_RANGES]
    pairs = [(name, smoothing.ranges[name], smoothing.ranges_after(name)) for name in shown]
    return tuple(ChannelRanges(name, a.low, a.high, b.low, b.high) for name, a, b in pairs)


def _local(measured: MeasuredTable, allocation: Allocation) -> tuple[NoiseMap, ...]:
    """Local noise at the chosen formats, and with the same format everywhere, which compares the blocks themselves."""
    found = next((probe.sqnr for probe in measured.probes if probe.sqnr is not None), None)
    if found is None:
        return ()
    table, same = measured.table, reference_format(measured.table, allocation)
    everywhere = {name: same for name in table.layers if (name, same) in table.index}
    return (
        local_map(found, table, allocation.choice),
        local_map(found, table, everywhere, number_format=str(same)),
    )


def _repetition(opened: Opened, measured: MeasuredTable, allocation: Allocation) -> Repetition | None:
    found = next((probe.orthogonality for probe in measured.probes if probe.orthogonality is not None), None)
    if found is None:
        return None
    return repetition(found, measured.table, allocation.choice, opened.order.importance)
