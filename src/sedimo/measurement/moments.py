"""Second moments of layers' inputs over whole runs: what the errors of a weight's columns do to one another.

The pipeline runs at full precision and its own code calls the denoiser; of the inputs only X^T X is kept, and of wide
layers only square blocks on the diagonal of it, so that all of them fit into a bounded space.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from sedimo.bank import SILENT, Progress
from sedimo.codec import content_key
from sedimo.errors import InputError, StateError
from sedimo.measurement.hooks import hooked
from sedimo.measurement.interrupt import graceful_interrupt
from sedimo.measurement.worker import setting_of
from sedimo.pipelines.adapter import PipelineAdapter, Sampling
from sedimo.space import SearchSpace

MOMENTS_VERSION = 1
MOST_BYTES = 2 << 30  # of all moments together
MOST_COLUMNS, LEAST_COLUMNS = 4096, 256  # of a block
MOST_POSITIONS = 256  # of a sample, in one call


@dataclass(frozen=True)
class FoldedMoments:
    """Second moments by weight, in a folder with a file for each.

    `key` names what they were measured on. Weights without moments (grouped convolutions, layers that were never
    called) have none.
    """

    folder: Path
    key: str

    def blocks(self, weight: str) -> Sequence[torch.Tensor]:
        """Blocks `[n, n]` on the diagonal of the moments of a weight's columns, in order; none if it has no moments.

        Raises:
            StateError: the file is damaged.
        """
        path = self.folder / _file_name(weight)
        if not path.exists():
            return ()
        try:
            found = load_file(path)
            return [found[str(index)] for index in range(len(found))]
        except (SafetensorError, KeyError, OSError) as error:
            raise StateError(f"{path} is damaged: {error!r}. Delete {self.folder} to measure it again") from error


def measure_moments(
    adapter: PipelineAdapter,
    space: SearchSpace,
    sampling: Sampling,
    *,
    weights_digest: str,
    folder: Path,
    progress: Progress = SILENT,
) -> FoldedMoments:
    """The second moments of the inputs of all weights of a space, over all steps of a plan; kept in a folder.

    What the folder holds already is not measured again.

    Raises:
        InputError: inputs that are not finite.
        Interrupted: the user stopped it; it begins again.
    """
    layers = {layer: weight.name for weight in space.weights for layer in weight.layers}
    shapes = {weight.name: weight.shape for weight in space.weights}
    columns = block_columns([_n_columns(shape) for shape in shapes.values()])
    setting = setting_of(adapter, sampling, weights_digest=weights_digest)
    key = content_key({"moments": MOMENTS_VERSION, "setting": setting, "layers": layers, "columns": columns})
    place = folder / f"moments-{key[:32]}"
    if not place.exists():
        sums = _measure(adapter, layers, sampling, columns, progress)
        _write({name: blocks for name, blocks in sums.items() if _is_of(blocks, shapes[name])}, place)
    return FoldedMoments(place, key)


def block_columns(n_columns: Sequence[int]) -> int:
    """How wide blocks may be, so that all moments together stay within their bytes."""
    width = MOST_COLUMNS
    while width > LEAST_COLUMNS and sum(4 * n * min(n, width) for n in n_columns) > MOST_BYTES:
        width //= 2
    return width


def _measure(
    adapter: PipelineAdapter, layers: Mapping[str, str], sampling: Sampling, columns: int, progress: Progress
) -> dict[str, list[torch.Tensor]]:
    sums = _Sums(columns)
    hooks = {layer: functools.partial(sums.add, layer, weight) for layer, weight in layers.items()}
    progress.start(sampling.n_batches, "second moments of inputs")
    with graceful_interrupt() as stop, hooked(adapter.denoiser, hooks):
        for batch in sampling.batches():
            adapter.sample(batch)
            progress.advance(1)
            stop.check("interrupted: second moments are measured in one go, and begin again")
    progress.done()
    return sums.blocks


class _Sums:
    """Running sums of X^T X by weight, in blocks on the diagonal of so many columns."""

    def __init__(self, columns: int) -> None:
        self._columns, self._n_calls = columns, 0
        self.blocks: dict[str, list[torch.Tensor]] = {}

    def add(self, layer: str, weight: str, module: nn.Module, args: tuple[torch.Tensor, ...], _output: object) -> None:
        """The hook of a layer. Which positions are looked at differs from call to call."""
        self._n_calls += 1
        for rows in _rows(module, args[0].detach(), self._n_calls):
            if not torch.isfinite(rows).all():
                raise InputError(
                    f"the inputs of layer {layer!r} hold NaN or infinity at full precision: use another --dtype, or "
                    "--no-compensate"
                )
            parts = torch.split(rows, self._columns, dim=1)
            if weight not in self.blocks:
                self.blocks[weight] = [part.new_zeros(part.shape[1], part.shape[1]) for part in parts]
            for total, part in zip(self.blocks[weight], parts, strict=True):
                total.addmm_(part.T, part)


def _rows(module: nn.Module, inputs: torch.Tensor, call: int) -> list[torch.Tensor]:
    """What meets each row of the weight, float32 `[n, N]`, in portions; none for what has no such form.

    Of more than `MOST_POSITIONS` tokens or pixels, which are much alike, every so-manieth is taken.
    """
    if isinstance(module, nn.Linear):
        tokens = inputs if inputs.ndim < 3 else inputs.flatten(1, -2)[:, _every(inputs[0, ..., 0].numel(), call)]
        return [tokens.reshape(-1, inputs.shape[-1]).float()]
    if not isinstance(module, nn.Conv1d | nn.Conv2d) or module.groups != 1:
        return []
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(inputs.float(), module._reversed_padding_repeated_twice, mode=mode)
    is_flat = isinstance(module, nn.Conv1d)
    sizes = (module.kernel_size, module.dilation, module.stride)
    kernel, dilation, stride = ((1, *size) if is_flat else size for size in sizes)
    images = padded.unsqueeze(2) if is_flat else padded
    unfolded = (F.unfold(image, kernel, dilation=dilation, stride=stride) for image in images)  # N positions
    return [columns[:, _every(columns.shape[1], call)].T for columns in unfolded]


def _every(n: int, call: int) -> slice:
    step = -(-n // MOST_POSITIONS)
    return slice(call % step, None, step)


def _n_columns(shape: Sequence[int]) -> int:
    n = 1
    for size in shape[1:]:
        n *= size
    return n


def _is_of(blocks: Sequence[torch.Tensor], shape: Sequence[int]) -> bool:
    return sum(len(block) for block in blocks) == _n_columns(shape)


def _write(moments: Mapping[str, Sequence[torch.Tensor]], place: Path) -> None:
    """Writes a folder whole or not at all."""
    draft = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    draft.mkdir(parents=True)
    for weight, blocks in moments.items():
        tensors = {str(index): block.cpu().contiguous() for index, block in enumerate(blocks)}
        save_file(tensors, draft / _file_name(weight))
    try:
        draft.replace(place)
    except OSError:
        if not place.exists():
            raise
        shutil.rmtree(draft)  # another process was quicker


def _file_name(weight: str) -> str:
    return f"{hashlib.sha256(weight.encode()).hexdigest()[:32]}.safetensors"
