"""Second moments of layers' inputs over whole runs: what the errors of a weight's columns do to one another.

The pipeline runs at full precision and its own code calls the denoiser; of the inputs only X^T X is kept, and of wide
layers only square blocks on the diagonal of it, so that all of them together stay small.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from sedimo.bank import Bank
from sedimo.codec import content_key
from sedimo.errors import InputError, StateError
from sedimo.lab.bench import InForce
from sedimo.lab.exchange import hooked
from sedimo.lab.lab import Lab
from sedimo.methods.method import Price, Words
from sedimo.pipelines.adapter import Sampling
from sedimo.quant.fitting import DAMPING, FEEDBACK_VERSION
from sedimo.settings import option
from sedimo.treatments.treatment import Treatment

MOMENTS_VERSION = 2
MOST_BYTES = 1 << 30  # of all moments together, unless that would make blocks narrower than the least
MOST_COLUMNS, LEAST_COLUMNS = 1024, 256  # of a block
MOST_POSITIONS = 256  # of a sample, in one call
SECONDS_BETWEEN_SAVES = 60.0  # of unfinished sums, which may take a gibibyte
_CALL_FACTOR = 2.0  # a call whose inputs are looked at, in plain ones
_SECONDS_PER_FEEDBACK = 1e-7  # of one weight in one format on one core
_SECONDS_PER_FACTOR = 3e-10  # of a block of n columns, per n cubed


@dataclass(frozen=True)
class ErrorFeedback(InForce):
    """Codes by error feedback from second moments by weight, in a file; `key` names what they were measured on.

    Weights without moments (grouped convolutions, layers that were never called) keep their nearest codes.
    """

    path: Path
    key: str

    def blocks(self, weight: str) -> Sequence[torch.Tensor]:
        """Blocks `[n, n]` on the diagonal of the moments of a weight's columns, in order; none if it has no moments."""
        try:
            with safe_open(self.path, framework="pt") as file:
                n_blocks = sum(name.rpartition(".")[0] == weight for name in file.keys())  # noqa: SIM118 -- no mapping
                return [file.get_tensor(f"{weight}.{index}") for index in range(n_blocks)]
        except (SafetensorError, OSError) as error:
            raise StateError(f"{self.path} is damaged or gone: {error!r}. Delete it to measure it again") from error

    def on(self, bank: Bank) -> Bank:
        """The bank whose codes are chosen by these moments."""
        return bank.compensating(self)

    def __str__(self) -> str:
        return "codes by error feedback"


def measure_moments(lab: Lab, on: Sampling, folder: Path) -> ErrorFeedback:
    """Error feedback from the inputs of all weights over a plan; what a folder holds is not measured again."""
    layers = {layer: weight.name for weight in lab.space.weights for layer in weight.layers}
    columns = block_columns(_columns(lab))
    setting = lab.setting(on, weights_digest=lab.weights.digest)
    how = {"columns": columns, "positions": MOST_POSITIONS, "damping": DAMPING, "feedback": FEEDBACK_VERSION}
    key = content_key({"moments": MOMENTS_VERSION, "setting": setting, "layers": layers, **how})
    place = folder / f"moments-{key[:32]}.safetensors"
    if place.exists():
        return ErrorFeedback(place, key)
    begun, sums, pipe = place.with_suffix(".begun.safetensors"), _Sums(columns), lab.pipe
    n_added = sums.take_up(begun, next(pipe.denoiser.parameters()).device)  # batches, before the work was stopped
    hooks = {layer: functools.partial(sums.add, layer, weight) for layer, weight in layers.items()}
    n_left, saved = on.n_batches - n_added, time.monotonic()
    with lab.parts().stage("second moments of inputs", n_left) as stop, hooked(pipe.denoiser, hooks):
        for n_done, batch in enumerate(itertools.islice(on.batches(), n_added, None), n_added + 1):
            pipe.sample(batch)
            lab.progress.advance(1)
            if stop.is_set or time.monotonic() - saved >= SECONDS_BETWEEN_SAVES:
                sums.save(n_done, begun)
                saved = time.monotonic()
            stop.check(f"interrupted: sums so far are saved in {begun}; run the same command again to go on")
    sums.save(on.n_batches, place)
    for left in (begun, *folder.glob(f"{place.stem}.*.tmp")):  # also by runs that were killed while they wrote
        left.unlink(missing_ok=True)
    return ErrorFeedback(place, key)


def block_columns(n_columns: Sequence[int]) -> int:
    """How wide blocks may be, so that all moments together stay within their bytes as far as that can be."""
    width = MOST_COLUMNS
    while width > LEAST_COLUMNS and moments_bytes(n_columns, width) > MOST_BYTES:
        width //= 2
    return width


def moments_bytes(n_columns: Sequence[int], width: int) -> int:
    """What the moments of weights of so many columns take, in blocks of a width [bytes]."""
    return sum(4 * n * min(n, width) for n in n_columns)


def _columns(lab: Lab) -> list[int]:
    return [math.prod(weight.shape[1:]) for weight in lab.space.weights]


class _Sums:
    """Running sums of X^T X by weight, in blocks on the diagonal of so many columns."""

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._n_calls: Counter[str] = Counter()
        self.blocks: dict[str, torch.Tensor] = {}  # by weight and number, `proj.0`

    def save(self, n_added: int, path: Path) -> None:
        """Keeps the sums over so many batches, in place of older ones."""
        tensors = {name: block.cpu() for name, block in self.blocks.items()}
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, draft, metadata={"n_added": str(n_added), "n_calls": json.dumps(self._n_calls)})
            with contextlib.suppress(FileNotFoundError):  # another process has finished meanwhile
                draft.replace(path)
        except (OSError, SafetensorError) as error:
            draft.unlink(missing_ok=True)
            raise StateError(f"second moments cannot be kept in {path}: {error}. Make room, run it again") from error

    def take_up(self, path: Path, device: torch.device) -> int:
        """Goes on with the sums that were kept; over how many batches they are, 0 where none can be read."""
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                # copies lie in memory as sums do that were never kept: an unaligned block is summed to other bits
                found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 -- no mapping
                facts = file.metadata()
        except (OSError, SafetensorError):
            return 0
        self.blocks, self._n_calls = found, Counter(json.loads(facts["n_calls"]))
        return int(facts["n_added"])

    def add(self, layer: str, weight: str, module: nn.Module, args: tuple[torch.Tensor, ...], _output: object) -> None:
        """The hook of a layer. Which positions are looked at is drawn anew at each of its calls."""
        self._n_calls[layer] += 1
        for rows in _rows(module, args[0].detach(), f"{layer} {self._n_calls[layer]}"):
            for i, part in enumerate(torch.split(rows, self._columns, dim=1)):
                name, width = f"{weight}.{i}", part.shape[1]
                if name not in self.blocks:
                    self.blocks[name] = part.new_zeros(width, width)
                total = self.blocks[name].addmm_(part.T, part)
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


@dataclass(frozen=True, slots=True)
class FeedbackSettings:
    """Whether codes are chosen by error feedback; where nothing is said, the method may bring it along."""

    compensate: bool = option(
        True,
        "--compensate",
        no="--no-compensate",
        help="Codes that make up for one another's errors; default: with --method auto.",
    )


def feed_back(lab: Lab, _settings: FeedbackSettings) -> ErrorFeedback:
    """Error feedback from moments of inputs, on samples of their own: what is fitted to some is judged on others."""
    _refuse_unsampled(lab)
    if lab.cache is None:
        raise InputError("moments of inputs are kept beside a study: give the lab one")
    return measure_moments(lab, lab.seeds.moments, lab.cache)


def _refuse_unsampled(lab: Lab) -> None:
    lab.refuse_unsampled("--compensate runs the pipeline to see inputs of layers", "Leave it out")


def _price(lab: Lab, _settings: FeedbackSettings) -> Price:
    """A run of some samples with sums beside it, factors of the sums, rounding of every format, and what is kept."""
    _refuse_unsampled(lab)
    timing, columns = lab.time_calls(lab.seeds.moments), _columns(lab)
    width, n_formats = block_columns(columns), max(len(d.formats) for d in lab.space.decisions)
    running = _CALL_FACTOR * timing.n_calls * timing.seconds_per_call
    factors = _SECONDS_PER_FACTOR * sum(n * min(n, width) ** 2 for n in columns)
    rounding = _SECONDS_PER_FEEDBACK * lab.space.params * n_formats
    n_bytes = moments_bytes(columns, width)
    return Price(running + factors + rounding, timing.n_calls, 2 * n_bytes, n_bytes)


ERROR_FEEDBACK = Treatment(
    name="error_feedback",
    words=Words(
        "chooses codes that make up for one another's errors in what a layer gives",
        source="Frantar et al. 2022, GPTQ (arXiv 2210.17323)",
    ),
    knobs=FeedbackSettings,
    apply=feed_back,
    price=_price,
    is_wanted=lambda settings: settings.compensate,
)
