"""Second moments of layers' inputs over whole runs: what the errors of a weight's columns do to one another.

The pipeline runs at full precision and its own code calls the denoiser; of the inputs only X^T X is kept, and of wide
layers only square blocks on the diagonal of it, so that all of them together stay small.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from sedimo.quant.compensation import DAMPING, FEEDBACK_VERSION
from sedimo.space import SearchSpace

MOMENTS_VERSION = 2
MOST_BYTES = 1 << 30  # of all moments together, unless that would make blocks narrower than the least
MOST_COLUMNS, LEAST_COLUMNS = 1024, 256  # of a block
MOST_POSITIONS = 256  # of a sample, in one call
_INDEX = "index.json"


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
            StateError: a file is damaged or gone.
        """
        if weight not in self._known:
            return ()
        path = self.folder / _file_name(weight)
        try:
            found = load_file(path)
            return [found[str(index)] for index in range(len(found))]
        except (SafetensorError, KeyError, OSError) as error:
            raise self._damaged(path, error) from error

    @cached_property
    def _known(self) -> frozenset[str]:
        path = self.folder / _INDEX
        try:
            return frozenset(json.loads(path.read_text()))
        except (ValueError, TypeError, OSError) as error:
            raise self._damaged(path, error) from error

    def _damaged(self, path: Path, error: Exception) -> StateError:
        return StateError(f"{path} is damaged or gone: {error!r}. Delete {self.folder} to measure it again")


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
    columns = block_columns([math.prod(weight.shape[1:]) for weight in space.weights])
    setting = setting_of(adapter, sampling, weights_digest=weights_digest)
    how = {"columns": columns, "positions": MOST_POSITIONS, "damping": DAMPING, "feedback": FEEDBACK_VERSION}
    key = content_key({"moments": MOMENTS_VERSION, "setting": setting, "layers": layers, **how})
    place = folder / f"moments-{key[:32]}"
    if not place.exists():
        _write(_measure(adapter, layers, sampling, columns, progress), place)
    return FoldedMoments(place, key)


def block_columns(n_columns: Sequence[int]) -> int:
    """How wide blocks may be, so that all moments together stay within their bytes as far as that can be."""
    width = MOST_COLUMNS
    while width > LEAST_COLUMNS and moments_bytes(n_columns, width) > MOST_BYTES:
        width //= 2
    return width


def moments_bytes(n_columns: Sequence[int], width: int) -> int:
    """What the moments of weights of so many columns take, in blocks of a width [bytes]."""
    return sum(4 * n * min(n, width) for n in n_columns)


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
        self._columns = columns
        self._n_calls: Counter[str] = Counter()
        self.blocks: dict[str, list[torch.Tensor]] = {}

    def add(self, layer: str, weight: str, module: nn.Module, args: tuple[torch.Tensor, ...], _output: object) -> None:
        """The hook of a layer. Which positions are looked at is drawn anew at each of its calls."""
        self._n_calls[layer] += 1
        for rows in _rows(module, args[0].detach(), f"{layer} {self._n_calls[layer]}"):
            parts = torch.split(rows, self._columns, dim=1)
            if weight not in self.blocks:
                self.blocks[weight] = [part.new_zeros(part.shape[1], part.shape[1]) for part in parts]
            for total, part in zip(self.blocks[weight], parts, strict=True):
                total.addmm_(part.T, part)
                if not torch.isfinite(total.diagonal()).all():  # all others are smaller than the largest of these
                    raise InputError(
                        f"the inputs of layer {layer!r} hold NaN, infinity or numbers too large to be squared at full "
                        "precision: use another --dtype, or leave the codes uncompensated"
                    )


def _rows(module: nn.Module, inputs: torch.Tensor, call: str) -> Iterator[torch.Tensor]:
    """What meets each row of the weight, float32 `[n, N]`, in portions; nothing for what has no such form.

    Of more than `MOST_POSITIONS` tokens or pixels, which are much alike, so many are drawn by the name of the call.
    """
    if isinstance(module, nn.Linear):
        rows = inputs if inputs.ndim > 1 else inputs.unsqueeze(0)
        tokens = rows.reshape(len(rows), -1, rows.shape[-1])
        yield tokens[:, _drawn(tokens.shape[1], call, inputs.device)].flatten(0, 1).float()
    elif isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == 1:
        yield from _patches(module, inputs, call)


def _patches(module: nn.Conv1d | nn.Conv2d, inputs: torch.Tensor, call: str) -> Iterator[torch.Tensor]:
    """The inputs of a convolution under its kernel at the positions that are looked at, image by image."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    is_flat = isinstance(module, nn.Conv1d)
    padded = padded.unsqueeze(2) if is_flat else padded
    sizes = (module.kernel_size, module.dilation, module.stride)
    kernel, dilation, stride = ((1, *size) if is_flat else size for size in sizes)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    height, width = ((n - r) // s + 1 for n, r, s in zip(padded.shape[2:], reach, stride, strict=True))
    taken = _drawn(height * width, call, inputs.device)
    tops, lefts = taken // width * stride[0], taken % width * stride[1]
    rows = tops[:, None] + torch.arange(kernel[0], device=inputs.device) * dilation[0]
    columns = lefts[:, None] + torch.arange(kernel[1], device=inputs.device) * dilation[1]
    for image in padded:
        patches = image[:, rows[:, :, None], columns[:, None, :]]  # C n kh kw
        yield patches.transpose(0, 1).flatten(1).float()


def _drawn(n: int, call: str, device: torch.device) -> torch.Tensor:
    """At most `MOST_POSITIONS` of n positions."""
    if n <= MOST_POSITIONS:
        return torch.arange(n, device=device)
    seed = int(hashlib.sha256(call.encode()).hexdigest()[:12], 16)
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:MOST_POSITIONS].to(device)


def _write(moments: Mapping[str, Sequence[torch.Tensor]], place: Path) -> None:
    """Writes a folder whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f"{place.name}.", suffix=".tmp", dir=place.parent))
    try:
        for weight, blocks in moments.items():
            tensors = {str(index): block.cpu().contiguous() for index, block in enumerate(blocks)}
            save_file(tensors, draft / _file_name(weight))
        (draft / _INDEX).write_text(json.dumps(sorted(moments)))
        draft.replace(place)
    except (OSError, SafetensorError) as error:
        if not place.exists():  # else another process was quicker
            raise StateError(
                f"second moments cannot be kept in {place}: {error}. Make room, and run it again"
            ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # gone already where it took its place


def _file_name(weight: str) -> str:
    return f"{hashlib.sha256(weight.encode()).hexdigest()[:32]}.safetensors"
