"""Finds example inputs of a denoiser by trying them on a copy without weights.

A size that is not known is a large number until a layer receives it: the layer's weight tells what it should
have been. A form of an argument (image or tokens, present or absent) that fails is exchanged for the one with
which the denoiser gets farthest. Nothing is computed: all tensors lie on the meta device.

What an argument looks like is told by its name alone; nothing here knows an architecture. It has one or more *forms*,
most likely first, which are built from `Sizes`: the denoiser's config, or a size that has still to be found out.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from sedimo.errors import InputError

_MAX_RUNS = 40  # of all modules, in all attempts together, before giving up
_MAX_LEARNED = 64  # sizes in one attempt
_SIZE_OF_NO_CONSEQUENCE = 64  # of an argument that no layer and no sum reads
_NO_LIMIT = 1 << 62  # an open end of a slice is 2^63 - 1
_SMALL_REST = 100_000  # known sizes that are added to an unknown one stay below
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_WITH_BATCH = ("hidden_states", "sample", "encoder_hidden_states", "timestep")
_MISMATCHES = tuple(
    re.compile(pattern)
    for pattern in (
        r"size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\)",
        r"Expected size (\d+) but got size (\d+)",
        r"Expected (\d+) in dimension \d+ but got (\d+)",
        r"Given normalized_shape=\[(\d+)\].*got input of size\[(?:\d+, )*(\d+)\]",
        r"broadcast a dimension of length (\d+) at -1.* broadcastable to \[(?:\d+, )*(\d+)\]",
    )
)
DEFAULT_LATENTS = 64  # height and width where the config does not say: 512 pixels behind a VAE of factor 8
DEFAULT_FRAMES = 8
DEFAULT_TOKENS = 77  # of CLIP

FIRST_UNKNOWN = 1_000_000_007  # far above any real size, so that an unknown size is recognised in products and sums
_NEXT_UNKNOWN = 137_000_011  # no small multiples of each other


@dataclass
class Sizes:
    """Sizes by what they are of; unknown ones are handed out as large distinct numbers until they are learned."""

    config: Mapping[str, object]
    dtype: torch.dtype
    batch: int = 1
    learned: dict[str, int] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)

    def width(self, of: str) -> int:
        """Number of channels or features of argument `of`."""
        if of in self.learned:
            return self.learned[of]
        if of not in self.unknown:
            self.unknown[of] = FIRST_UNKNOWN + _NEXT_UNKNOWN * len(self.unknown)
        return self.unknown[of]

    def configured(self, keys: Sequence[str], default: int) -> int:
        """The first positive integer among some config entries (the first element of a sequence)."""
        for key in keys:
            value = self.config.get(key)
            value = value[0] if isinstance(value, list | tuple) and value else value
            if isinstance(value, int) and value > 0:
                return value
        return default

    @property
    def area(self) -> tuple[int, int]:
        """Height and width of the latents."""
        size = self.config.get("sample_size")
        if isinstance(size, list | tuple) and len(size) >= 2:
            return int(size[-2]), int(size[-1])
        height = self.configured(("sample_height", "sample_size"), DEFAULT_LATENTS)
        return height, self.configured(("sample_width", "sample_size"), DEFAULT_LATENTS)

    @property
    def frames(self) -> int:
        """Number of latent frames of a video."""
        frames = self.configured(("sample_frames", "num_frames", "video_length"), DEFAULT_FRAMES)
        ratio = self.configured(("temporal_compression_ratio",), 1)
        return (frames - 1) // ratio + 1

    @property
    def patches(self) -> tuple[int, int]:
        """Height and width of the latents in patches."""
        value = self.config.get("patch_size")
        value = value[-1] if isinstance(value, list | tuple) and value else value
        patch = value if isinstance(value, int) and value > 0 else 1
        height, width = self.area
        return max(height // patch, 1), max(width // patch, 1)

    @property
    def n_patches(self) -> int:
        """Number of image tokens."""
        return self.patches[0] * self.patches[1]

    @property
    def head_width(self) -> int:
        """Features per attention head."""
        width = self.configured(("attention_head_dim", "head_dim"), 0)
        return width or self.configured(("hidden_size", "inner_dim"), 1) // self.configured(("num_attention_heads",), 1)

    def n_tokens(self, of: str) -> int:
        """Number of text tokens of argument `of`."""
        keys = {
            "encoder_hidden_states_t5": ("text_len_t5",),
            "encoder_hidden_states": ("text_len", "max_text_seq_length", "num_embeddings", "max_sequence_length"),
        }
        return self.configured(keys.get(of, ()), DEFAULT_TOKENS)

    def floats(self, *shape: int) -> torch.Tensor:
        """A floating point tensor on the meta device."""
        return torch.empty(shape, dtype=self.dtype, device="meta")

    @staticmethod
    def integers(*shape: int) -> torch.Tensor:
        """An integer tensor on the meta device."""
        return torch.empty(shape, dtype=torch.int64, device="meta")


Form = Callable[[Sizes], object]


@dataclass(frozen=True, slots=True)
class Argument:
    """The forms of an argument; `is_usual`: passed from the start even where the signature makes it optional."""

    forms: tuple[Form, ...]
    is_usual: bool = False


def _image(of: str) -> Form:
    return lambda s: s.floats(s.batch, s.width(of), *s.area)


def _tokens(of: str) -> Form:
    return lambda s: s.floats(s.batch, s.n_patches, s.width(of))


def _video(of: str) -> Form:
    return lambda s: s.floats(s.batch, s.width(of), s.frames, *s.area)


def _frames_first(of: str) -> Form:
    return lambda s: s.floats(s.batch, s.frames, s.width(of), *s.area)


def _signal(of: str) -> Form:
    return lambda s: s.floats(s.batch, s.width(of), s.area[0])


def _vector(of: str) -> Form:
    return lambda s: s.floats(s.batch, s.width(of))


def _text(of: str) -> Form:
    return lambda s: s.floats(s.batch, s.n_tokens(of), s.width(of))


def _mask(of: str) -> tuple[Form, ...]:
    return (
        lambda s: s.integers(s.batch, s.n_tokens(of)),
        lambda s: torch.empty(s.batch, s.n_tokens(of), dtype=torch.bool, device="meta"),
        lambda s: s.floats(s.batch, s.n_tokens(of)),
    )


def _latents(of: str) -> tuple[Form, ...]:
    return (_image(of), _tokens(of), _video(of), _frames_first(of), _signal(of), _vector(of))


_PER_SAMPLE: tuple[Form, ...] = (
    lambda s: s.integers(s.batch),
    lambda s: s.floats(s.batch),
    lambda s: s.integers(s.batch, s.n_patches),
)
_GUIDANCE: tuple[Form, ...] = (lambda s: s.floats(s.batch),)
_PAIR: tuple[Form, ...] = (lambda s: s.floats(s.batch, 2),)
_LABELS: tuple[Form, ...] = (lambda s: s.integers(s.batch), _vector("class_labels"))


def _positions(n: Callable[[Sizes], int]) -> tuple[Form, ...]:
    """Position numbers of tokens, one column per axis."""

    def axes(s: Sizes) -> int:
        value = s.config.get("axes_dims_rope")
        return len(value) if isinstance(value, list | tuple) else 3

    return (lambda s: s.floats(n(s), axes(s)), lambda s: s.floats(s.batch, n(s), axes(s)))


def _rotary(s: Sizes) -> object:
    return (s.floats(s.n_patches, s.head_width), s.floats(s.n_patches, s.head_width))


def _added_embeddings(s: Sizes) -> dict[str, object]:
    """The conditions of U-Nets; one that reads only some of them is not disturbed by the others."""
    return {
        "text_embeds": s.floats(s.batch, s.width("text_embeds")),
        "time_ids": s.floats(s.batch, 6),
        "image_embeds": s.floats(s.batch, s.width("image_embeds")),
        "hint": s.floats(s.batch, s.width("hint"), *(8 * n for n in s.area)),
    }


def _added_resolution(s: Sizes) -> dict[str, object]:
    return {"resolution": s.floats(s.batch, 2), "aspect_ratio": s.floats(s.batch, 1)}


ARGUMENTS: Mapping[str, Argument] = {
    "hidden_states": Argument(_latents("hidden_states")),
    "sample": Argument(_latents("sample")),
    "x": Argument((lambda s: [s.floats(s.width("x"), 1, *s.area)], *_latents("x"))),
    "t": Argument(_PER_SAMPLE),
    "cap_feats": Argument((lambda s: [s.floats(s.n_tokens("cap_feats"), s.width("cap_feats"))],)),
    "input_ids": Argument(
        (lambda s: s.integers(s.batch, *s.area), lambda s: s.integers(s.batch, s.n_tokens("input_ids")))
    ),
    "control_hidden_states": Argument((_video("control_hidden_states"), _image("control_hidden_states"))),
    "context_latents": Argument((_tokens("context_latents"),)),
    "timestep": Argument(_PER_SAMPLE, is_usual=True),
    "timesteps": Argument(_PER_SAMPLE, is_usual=True),
    "timestep_r": Argument(_PER_SAMPLE),
    "r_timestep": Argument(_PER_SAMPLE),
    "target_timestep": Argument(_PER_SAMPLE),
    "timestep_ratio": Argument(_GUIDANCE),
    "timestep_cond": Argument((_vector("timestep_cond"),)),
    "guidance": Argument(_GUIDANCE),
    "class_labels": Argument(_LABELS),
    "encoder_hidden_states": Argument(
        (
            _text("encoder_hidden_states"),
            _vector("encoder_hidden_states"),
            lambda s: s.floats(
                s.batch * s.frames, s.n_tokens("encoder_hidden_states"), s.width("encoder_hidden_states")
            ),
        ),
        is_usual=True,
    ),
    "encoder_hidden_states_t5": Argument((_text("encoder_hidden_states_t5"),), is_usual=True),
    "encoder_hidden_states_2": Argument((_text("encoder_hidden_states_2"),)),
    "encoder_hidden_states_image": Argument((_text("encoder_hidden_states_image"),)),
    "encoder_attention_mask": Argument(_mask("encoder_hidden_states")),
    "encoder_attention_mask_2": Argument(_mask("encoder_hidden_states_2")),
    "encoder_hidden_states_mask": Argument(_mask("encoder_hidden_states")),
    "encoder_mask": Argument(_mask("encoder_hidden_states")),
    "text_embedding_mask": Argument(_mask("encoder_hidden_states"), is_usual=True),
    "text_embedding_mask_t5": Argument(_mask("encoder_hidden_states_t5"), is_usual=True),
    "pooled_projections": Argument((_vector("pooled_projections"),), is_usual=True),
    "pooled_embeds": Argument((_vector("pooled_embeds"),), is_usual=True),
    "pooled_text_emb": Argument((_vector("pooled_text_emb"),)),
    "clip_text_pooled": Argument((lambda s: s.floats(s.batch, 1, s.width("clip_text_pooled")),)),
    "proj_embedding": Argument((_vector("proj_embedding"),)),
    "global_hidden_states": Argument((lambda s: s.floats(s.batch, 1, s.width("global_hidden_states")),)),
    "image_embeddings": Argument((_vector("image_embeddings"),)),
    "image_embeds": Argument((_text("image_embeds"),)),
    "image_latents": Argument((_video("sample"), _image("sample"))),
    "added_cond_kwargs": Argument((_added_embeddings, _added_resolution)),
    "added_time_ids": Argument((_vector("added_time_ids"),)),
    "micro_conds": Argument((lambda s: s.floats(s.batch, 5),)),
    "image_meta_size": Argument((lambda s: s.floats(s.batch, 6),), is_usual=True),
    "style": Argument((lambda s: s.integers(s.batch),), is_usual=True),
    "image_rotary_emb": Argument((_rotary, lambda s: s.floats(*s.patches, s.head_width // 2).to(torch.complex64))),
    "rotary_embedding": Argument((_rotary,)),
    "img_ids": Argument(_positions(lambda s: s.n_patches), is_usual=True),
    "txt_ids": Argument(_positions(lambda s: s.n_tokens("encoder_hidden_states")), is_usual=True),
    "img_shapes": Argument((lambda s: [(1, *s.patches)], lambda s: [[(1, *s.patches)]])),
    "padding_mask": Argument((lambda s: s.floats(s.batch, 1, *s.area),)),
    "condition_mask": Argument((lambda s: s.floats(s.batch, 1, s.frames, *s.area),)),
    "original_size": Argument(_PAIR),
    "target_size": Argument(_PAIR),
    "crop_coords": Argument(_PAIR),
    "fps": Argument((lambda s: s.integers(s.batch),)),
    "num_frames": Argument((lambda _: 1,), is_usual=True),  # together the number of image tokens
    "height": Argument((lambda s: s.patches[0],), is_usual=True),
    "width": Argument((lambda s: s.patches[1],), is_usual=True),
}


class _SizeLearned(Exception):  # noqa: N818  # not an error: it ends an attempt that has taught something
    """A size was learned; the attempt starts again with it."""


@dataclass(frozen=True)
class _Attempt:
    """What came of running a denoiser with some forms: how far it got, and the failure if any."""

    forms: Mapping[str, int]
    inputs: Mapping[str, object]
    learned: Mapping[str, int]
    unresolved: frozenset[str]
    n_modules_run: int
    layers_run: frozenset[str]
    failure: Exception | None

    @property
    def progress(self) -> tuple[float, int]:
        """Modules that ran, and the line of the denoiser's own forward that was reached."""
        if self.failure is None:
            return float("inf"), 0
        return self.n_modules_run, _line_reached(self.failure)


def signature_names(denoiser: nn.Module) -> tuple[dict[str, bool], bool]:
    """The forward's argument names, each with whether it is required; and whether any other name is accepted."""
    parameters = inspect.signature(denoiser.forward).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return {p.name: p.default is p.empty for p in named}, is_open


def find_inputs(twin: nn.Module, given: Mapping[str, object]) -> dict[str, object]:
    """Inputs by argument name with which the weightless denoiser runs; `given` ones are used as they are.

    Raises:
        InputError: a required argument has a name that is not known, or no form of the known ones works.
    """
    names, _ = signature_names(twin)
    unknown = [name for name, required in names.items() if required and name not in ARGUMENTS and name not in given]
    if unknown:
        raise InputError(f"it requires the arguments {', '.join(unknown)}, for which no example is known")
    fixed = dict(given)
    if "return_dict" in names:
        fixed.setdefault("return_dict", False)
    known = [name for name in names if name in ARGUMENTS and name not in fixed]
    forms = {name: 0 for name in known if names[name] or ARGUMENTS[name].is_usual}
    for name in ("hidden_states", "sample"):
        if name in forms:
            forms[name] = _first_form_of_latents(twin)
    search = _Search(twin, fixed, {name: names[name] for name in known})
    return search.run(forms)


def batch_size(inputs: Mapping[str, object]) -> int:
    """The number of samples in the inputs of one call."""
    tensors = [inputs[name] for name in _WITH_BATCH if name in inputs] or list(inputs.values())
    sizes = (t.shape[0] for t in tensors if isinstance(t, torch.Tensor) and t.dim() and t.shape[0])
    return next(sizes, 1)


def _first_form_of_latents(twin: nn.Module) -> int:
    """An image where the config tells its size, a video where the first layer is three-dimensional, else tokens."""
    first = next((m for m in twin.modules() if isinstance(m, _LAYERS)), None)
    if isinstance(first, nn.Conv3d):
        return 2
    has_area = any(config_of(twin).get(key) is not None for key in ("sample_size", "sample_height"))
    return 0 if has_area or isinstance(first, nn.Conv2d) else 1


def config_of(denoiser: nn.Module) -> Mapping[str, object]:
    """The config of a diffusers model; empty for any other module."""
    config = getattr(denoiser, "config", None)
    return dict(config) if isinstance(config, Mapping) else {}


def _dtype_of(denoiser: nn.Module) -> torch.dtype:
    floating = (p.dtype for p in denoiser.parameters() if p.is_floating_point())
    return next((d for d in floating if d.itemsize > 1), torch.get_default_dtype())


class _Search:
    """Hill climbing over the forms of the arguments."""

    def __init__(self, twin: nn.Module, fixed: Mapping[str, object], known: Mapping[str, bool]) -> None:
        self._twin = twin
        self._fixed = fixed
        self._known = known
        self._layers = {name for name, module in twin.named_modules() if isinstance(module, _LAYERS)}
        self._batch = batch_size(fixed)
        self._modules_left = _MAX_RUNS * sum(1 for _ in twin.modules())

    def run(self, forms: Mapping[str, int]) -> dict[str, object]:
        """The first inputs with which the forward comes to its end.

        Raises:
            InputError: it does not, whatever form is exchanged.
        """
        attempt = self._attempt(forms, {})
        while attempt.failure is not None:
            best = max((self._changed(attempt, f) for f in self._neighbours(attempt.forms)), key=lambda a: a.progress)
            if best.progress <= attempt.progress:
                raise InputError(
                    f"its forward fails with the examples {_describe(attempt.inputs)}: {_first_line(attempt.failure)}"
                ) from attempt.failure
            attempt = best
        attempt = self._use_idle_layers(attempt)
        settled = {**attempt.learned, **dict.fromkeys(attempt.unresolved, _SIZE_OF_NO_CONSEQUENCE)}
        return self._build(attempt.forms, self._sizes(settled))

    def _use_idle_layers(self, attempt: _Attempt) -> _Attempt:
        """Adds optional arguments that bring layers to life which would not run otherwise."""
        for name in self._known:
            if self._layers <= attempt.layers_run:
                break
            if name in attempt.forms or name.endswith("mask"):
                continue
            for form in range(len(ARGUMENTS[name].forms)):
                trial = self._changed(attempt, {**attempt.forms, name: form})
                if trial.failure is None and len(trial.layers_run) > len(attempt.layers_run):
                    attempt = trial
                    break
        return attempt

    def _neighbours(self, forms: Mapping[str, int]) -> Iterator[dict[str, int]]:
        yield dict(forms)
        for name, required in self._known.items():
            for form in range(len(ARGUMENTS[name].forms)):
                if forms.get(name) != form:
                    yield {**forms, name: form}
            if name in forms and not required:
                yield {n: f for n, f in forms.items() if n != name}

    def _changed(self, before: _Attempt, forms: Mapping[str, int]) -> _Attempt:
        """Another attempt, with the sizes learned so far except those of arguments whose form changes."""
        if forms == before.forms or self._modules_left <= 0:
            return before
        changed = {name for name in {*before.forms, *forms} if before.forms.get(name) != forms.get(name)}
        return self._attempt(forms, {of: size for of, size in before.learned.items() if of not in changed})

    def _sizes(self, learned: Mapping[str, int]) -> Sizes:
        return Sizes(config_of(self._twin), _dtype_of(self._twin), self._batch, dict(learned))

    def _build(self, forms: Mapping[str, int], sizes: Sizes) -> dict[str, object]:
        return {**{name: ARGUMENTS[name].forms[form](sizes) for name, form in forms.items()}, **self._fixed}

    def _attempt(self, forms: Mapping[str, int], learned: Mapping[str, int]) -> _Attempt:
        sizes = self._sizes(learned)
        for _ in range(_MAX_LEARNED):
            watch = _Watch(sizes)
            inputs: dict[str, object] = {}
            failure: Exception | None = None
            try:
                inputs = self._build(forms, sizes)
                with torch.no_grad(), watch.on(self._twin), _NoHugeTables():  # type: ignore[no-untyped-call]  # as above
                    self._twin(**inputs)
            except _SizeLearned:
                continue
            except Exception as error:  # noqa: BLE001  # foreign code fails in any way; it is reported
                if watch.learn_from_message(str(error)):
                    continue
                failure = error
            finally:
                self._modules_left -= watch.n_modules_run
            break
        unresolved = frozenset(sizes.unknown) - frozenset(sizes.learned)
        ran = frozenset(watch.layers_run)
        return _Attempt(forms, inputs, sizes.learned, unresolved, watch.n_modules_run, ran, failure)


class _NoHugeTables(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its modes untyped
    """Refuses real tensors of a size that is still unknown, such as tables of rotary positions."""

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        named = kwargs if isinstance(kwargs, dict) else {}
        values = list(_leaves([*args, *named.values()]))
        tensors = [v for v in values if isinstance(v, torch.Tensor)]
        is_meta = any(v.is_meta for v in tensors) or str(named.get("device")) == "meta"
        if not is_meta and any(isinstance(v, int | float) and FIRST_UNKNOWN <= v < _NO_LIMIT for v in values):
            raise ValueError(f"{func} would make a table of a size that is not known")
        return func(*args, **named)


def _leaves(values: Iterable[object]) -> Iterator[object]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        else:
            yield value


class _Watch:
    """Sees every module that runs and learns unknown sizes from what it receives."""

    def __init__(self, sizes: Sizes) -> None:
        self.n_modules_run = 0
        self.layers_run: set[str] = set()
        self._sizes = sizes

    @contextmanager
    def on(self, denoiser: nn.Module) -> Iterator[None]:
        """Watches within the context."""
        handles = [m.register_forward_pre_hook(self._hook(name)) for name, m in denoiser.named_modules()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def look(module: nn.Module, arguments: tuple[object, ...]) -> None:
            first = arguments[0] if arguments else None
            if isinstance(first, torch.Tensor):
                self._look(module, first)
            if isinstance(module, _LAYERS):
                self.layers_run.add(name)
            self.n_modules_run += 1

        return look

    def _look(self, module: nn.Module, received: torch.Tensor) -> None:
        expected = _expected_width(module, received)
        if expected is None:
            return
        axis, size = expected
        if received.shape[axis] != size and self._learn(received.shape[axis], size):
            raise _SizeLearned
        if received.shape[axis] != size and isinstance(module, _LAYERS):
            raise ValueError(
                f"a {type(module).__name__} expects size {size} in dimension {axis}, got {tuple(received.shape)}"
            )

    def _learn(self, got: int, wanted: int) -> bool:
        """Solves got = factor * unknown + rest for the unknown that makes it `wanted`."""
        open_sizes = [(got % size, of, got // size) for of, size in self._sizes.unknown.items()]
        for rest, of, factor in sorted(open_sizes):
            size, remainder = divmod(wanted - rest, factor) if factor else (0, 1)
            if of not in self._sizes.learned and rest < _SMALL_REST and size > 0 and remainder == 0:
                self._sizes.learned[of] = size
                return True
        return False

    def learn_from_message(self, message: str) -> bool:
        """Learns a size from an error about two sizes that should be equal."""
        for pattern in _MISMATCHES:
            match = pattern.search(message)
            if match:
                first, second = int(match[1]), int(match[2])
                return self._learn(max(first, second), min(first, second))
        return False


def _expected_width(module: nn.Module, received: torch.Tensor) -> tuple[int, int] | None:
    """The axis that holds the features of a layer's or norm's input, and their number; None where any will do."""
    if isinstance(module, nn.Linear):
        return -1, module.in_features
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        n_dims = len(module.kernel_size) + 2
        if received.dim() != n_dims:
            raise ValueError(f"a {type(module).__name__} expects {n_dims} dimensions, got {tuple(received.shape)}")
        return 1, module.in_channels
    weight = module._parameters.get("weight")
    if (
        weight is not None
        and weight.dim() == 1
        and "Norm" in type(module).__name__
        and not hasattr(module, "num_groups")
    ):
        return -1, weight.numel()
    return None


def _describe(inputs: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={_describe_value(value)}" for name, value in inputs.items())


def _describe_value(value: object) -> str:
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(str(n) if n < FIRST_UNKNOWN else "?" for n in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    if isinstance(value, Mapping):
        return "{" + _describe(value) + "}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(_describe_value(v) for v in value) + ")"
    return repr(value)


def _line_reached(error: Exception) -> int:
    """The line of the outermost frame named `forward` of a diffusers or user module in an error's traceback."""
    frame = error.__traceback__
    while frame is not None:
        code = frame.tb_frame.f_code
        if code.co_name == "forward" and "self" in frame.tb_frame.f_locals:
            return frame.tb_lineno
        frame = frame.tb_next
    return 0


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]
