"""The main job by its order: done, or only planned, and shown. What `quantize` and `run` share."""

from __future__ import annotations

from sedimo.api import job
from sedimo.api.order import Order
from sedimo.cli import console, show


def carry_out(order: Order, *, is_dry: bool, as_json: bool) -> None:
    """Runs the job, or tells what it would take, and prints either as JSON or as tables."""
    if is_dry:
        with console.progress() as progress:
            plan = job.plan(order, progress)
        console.print_json(plan.as_json()) if as_json else show.plan(plan)
        return
    with console.progress() as progress:
        result = job.run(order, progress, command=console.command_line())
    console.print_json(result.as_json()) if as_json else show.result(result)
