"""Finds example inputs of a denoiser by trying them on a copy without weights.

A size that is not known is a large number until a layer receives it: the layer's weight tells what it should
have been. A form of an argument (image or tokens, present or absent) that fails is exchanged for the one with
which the denoiser gets farthest. Nothing is computed: all tensors lie on the meta device.

What an argument looks like is told by its name alone; nothing here knows an architecture. It has one or more *forms*,
most likely first, whose sizes come from the denoiser's config, or have still to be found out.
"""

from __future__ import annotations

import inspect
import math
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sedimo.errors import InputError
from sedimo.graph.layers import LAYERS

_MAX_RUNS = 40  # of all modules, in all attempts together, before giving up
_MAX_LEARNED = 64  # sizes in one attempt
_SIZE_OF_NO_CONSEQUENCE = 64  # of an argument that no layer and no sum reads
_NO_LIMIT = 1 << 62  # an open end of a slice is 2^63 - 1
_SMALL_REST = 100_000  # known sizes that are added to an unknown one stay below
_WITH_BATCH = ("hidden_states", "sample", "encoder_hidden_states", "timestep")
_MISMATCHES = (
    r"size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\)",
    r"Expected size (\d+) but got size (\d+)",
    r"Expected (\d+) in dimension \d+ but got (\d+)",
    r"Given normalized_shape=\[(\d+)\].*got input of size\[(?:\d+, )*(\d+)\]",
    r"broadcast a dimension of length (\d+) at -1.* broadcastable to \[(?:\d+, )*(\d+)\]",
)
_LATENTS_SIZE = 64  # height and width where the config does not say: 512 pixels behind a VAE of factor 8
_FRAMES = 8
_TOKENS = 77  # of CLIP
_TEXT_KEYS = {  # config entries with the number of tokens
    "encoder_hidden_states_t5": ("text_len_t5",),
    "encoder_hidden_states": ("text_len", "max_text_seq_length", "num_embeddings", "max_sequence_length"),
}

FIRST_UNKNOWN = 1_000_000_007  # far above any real size, so that an unknown size is recognised in products and sums
_NEXT_UNKNOWN = 137_000_011  # no small multiples of each other
_DTYPES = {"int": torch.int64, "bool": torch.bool, "complex": torch.complex64}

# A tensor as axes in letters, a number, or a container of forms; entries of a dictionary have sizes of their own:
# B samples, C width of the argument, H W latents, h w latents in patches, N image tokens, T text tokens, F frames,
# D width of a head, d half of it, A axes of a position. `8H` is a multiple, `BF` a product; `number h` is no tensor.
Form = str | int | list["Form"] | tuple["Form", ...] | dict[str, "Form"]

_LATENTS: tuple[Form, ...] = ("B C H W", "B N C", "B C F H W", "B F C H W", "B C H", "B C")
_UNET_CONDITIONS: Form = {"text_embeds": "B C", "time_ids": "B 6", "image_embeds": "B C", "hint": "B C 8H 8W"}
_ROWS: tuple[tuple[str, tuple[Form, ...]], ...] = (
    ("hidden_states sample", _LATENTS),
    ("x", (["C 1 H W"], *_LATENTS)),
    ("t timestep timesteps timestep_r r_timestep target_timestep", ("int B", "B", "int B N")),
    ("timestep_ratio guidance", ("B",)),
    ("class_labels", ("int B", "B C")),
    ("encoder_hidden_states", ("B T C", "B C", "BF T C")),
    ("encoder_hidden_states_t5 encoder_hidden_states_2 encoder_hidden_states_image image_embeds", ("B T C",)),
    (
        "encoder_attention_mask encoder_attention_mask_2 encoder_hidden_states_mask encoder_mask text_embedding_mask "
        "text_embedding_mask_t5",
        ("int B T", "bool B T", "B T"),
    ),
    (
        "pooled_projections pooled_embeds pooled_text_emb proj_embedding image_embeddings added_time_ids timestep_cond",
        ("B C",),
    ),
    ("clip_text_pooled global_hidden_states", ("B 1 C",)),
    ("cap_feats", (["T C"],)),
    ("input_ids", ("int B H W", "int B T")),
    ("control_hidden_states image_latents", ("B C F H W", "B C H W")),
    ("context_latents", ("B N C",)),
    # an U-Net that reads only some conditions is not disturbed by the others
    ("added_cond_kwargs", (_UNET_CONDITIONS, {"resolution": "B 2", "aspect_ratio": "B 1"})),
    ("original_size target_size crop_coords", ("B 2",)),
    ("micro_conds", ("B 5",)),
    ("image_meta_size", ("B 6",)),
    ("style fps", ("int B",)),
    ("image_rotary_emb", (("N D", "N D"), "complex h w d")),
    ("rotary_embedding", (("N D", "N D"),)),
    ("img_ids", ("N A", "B N A")),
    ("txt_ids", ("T A", "B T A")),
    ("img_shapes", ([(1, "number h", "number w")], [[(1, "number h", "number w")]])),
    ("padding_mask", ("B 1 H W",)),
    ("condition_mask", ("B 1 F H W",)),
    ("num_frames", (1,)),  # together the number of image tokens
    ("height", ("number h",)),
    ("width", ("number w",)),
)
Forms = Mapping[str, Form]  # by the argument's name
ARGUMENTS: Mapping[str, tuple[Form, ...]] = {name: forms for names, forms in _ROWS for name in names.split()}
_USUAL = frozenset(  # passed from the start even where the signature makes them optional
    """timestep timesteps encoder_hidden_states encoder_hidden_states_t5 text_embedding_mask text_embedding_mask_t5
    pooled_projections pooled_embeds image_meta_size style img_ids txt_ids num_frames height width""".split()  # noqa: SIM905  # a table is read like a sentence
)
_SIZES_OF = {  # arguments whose sizes are those of another one
    **dict.fromkeys(
        ("encoder_attention_mask", "encoder_hidden_states_mask", "encoder_mask", "text_embedding_mask", "txt_ids"),
        "encoder_hidden_states",
    ),
    "encoder_attention_mask_2": "encoder_hidden_states_2",
    "text_embedding_mask_t5": "encoder_hidden_states_t5",
    "image_latents": "sample",
}


class Sizes:
    """Sizes by what they are of; unknown ones are handed out as large distinct numbers until they are learned."""

    def __init__(
        self, config: Mapping[str, object], dtype: torch.dtype, batch: int = 1, learned: Mapping[str, int] | None = None
    ) -> None:
        self.config, self.dtype, self.batch, self.learned = config, dtype, batch, dict(learned or {})
        self.unknown: dict[str, int] = {}

    def make(self, form: Form, of: str) -> object:
        """An example of the argument `of` in one of its forms."""
        if isinstance(form, dict):
            return {name: self.make(one, name) for name, one in form.items()}
        if isinstance(form, list | tuple):
            made = [self.make(one, of) for one in form]
            return made if isinstance(form, list) else tuple(made)
        if isinstance(form, int):
            return form
        first, *others = axes = form.split()
        letters = self._letters(_SIZES_OF.get(of, of), has_width="C" in form)
        if first == "number":
            return letters[others[0]]
        factors = (re.findall(r"\d+|\D", axis) for axis in (others if first in _DTYPES else axes))
        shape = [math.prod(int(part) if part.isdigit() else letters[part] for part in parts) for parts in factors]
        return torch.empty(shape, dtype=_DTYPES.get(first, self.dtype), device="meta")

    def _letters(self, of: str, *, has_width: bool) -> dict[str, int]:
        axes, heads = self.config.get("axes_dims_rope"), self._configured("num_attention_heads")
        head = self._configured("attention_head_dim", "head_dim", default=0)
        head = head or self._configured("hidden_size", "inner_dim") // heads
        frames = self._configured("sample_frames", "num_frames", "video_length", default=_FRAMES)
        area = self.config.get("sample_size")
        if not (isinstance(area, list | tuple) and len(area) >= 2):
            sides = (("sample_height", "sample_size"), ("sample_width", "sample_size"))
            area = [self._configured(*names, default=_LATENTS_SIZE) for names in sides]
        patch = self.config.get("patch_size")
        patch = patch[-1] if isinstance(patch, list | tuple) and patch else patch
        patch = patch if isinstance(patch, int) and patch > 0 else 1
        height, width = int(area[-2]), int(area[-1])
        rows, columns = max(height // patch, 1), max(width // patch, 1)
        letters = {"B": self.batch, "H": height, "W": width, "h": rows, "w": columns, "N": rows * columns}
        letters["F"] = (frames - 1) // self._configured("temporal_compression_ratio") + 1
        letters["T"] = self._configured(*_TEXT_KEYS.get(of, ()), default=_TOKENS)
        letters |= {"D": head, "d": head // 2, "A": len(axes) if isinstance(axes, list | tuple) else 3}
        return letters | ({"C": self.width(of)} if has_width else {})

    def width(self, of: str) -> int:
        """Number of channels or features of argument `of`."""
        fresh = FIRST_UNKNOWN + _NEXT_UNKNOWN * len(self.unknown)
        return self.learned[of] if of in self.learned else self.unknown.setdefault(of, fresh)

    def _configured(self, *keys: str, default: int = 1) -> int:
        """The first positive integer among some config entries (the first element of a sequence)."""
        for key in keys:
            value = self.config.get(key)
            value = value[0] if isinstance(value, list | tuple) and value else value
            if isinstance(value, int) and value > 0:
                return value
        return default


class _SizeLearned(Exception):  # noqa: N818  # not an error: it ends an attempt that has taught something
    """A size was learned; the attempt starts again with it."""


def signature_names(denoiser: nn.Module) -> tuple[dict[str, bool], bool]:
    """The forward's argument names, each with whether it is required; and whether any other name is accepted."""
    parameters = inspect.signature(denoiser.forward).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name: p.default is p.empty for p in named}, any(p.kind is p.VAR_KEYWORD for p in parameters)


def find_inputs(twin: nn.Module, given: Mapping[str, object]) -> dict[str, object]:
    """Inputs by argument name with which the weightless denoiser runs; `given` ones are used as they are."""
    return _Search(twin, given).run()


def batch_size(inputs: Mapping[str, object]) -> int:
    """The number of samples in the inputs of one call."""
    tensors = [inputs[name] for name in _WITH_BATCH if name in inputs] or list(inputs.values())
    sizes = (t.shape[0] for t in tensors if isinstance(t, torch.Tensor) and t.dim() and t.shape[0])
    return next(sizes, 1)


def first_line(error: Exception) -> str:
    """The type of an error of foreign code and the first line of its text."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:300]


class _Search:
    """Hill climbing over the forms of the arguments."""

    def __init__(self, twin: nn.Module, given: Mapping[str, object]) -> None:
        names, _ = signature_names(twin)
        unknown = [name for name, required in names.items() if required and name not in ARGUMENTS and name not in given]
        if unknown:
            raise InputError(f"it requires the arguments {', '.join(unknown)}, for which no example is known")
        self._twin, self._fixed = twin, dict(given)
        if "return_dict" in names:
            self._fixed.setdefault("return_dict", False)
        self._known = {n: required for n, required in names.items() if n in ARGUMENTS and n not in self._fixed}
        self._layers = {name: module for name, module in twin.named_modules() if isinstance(module, LAYERS)}
        config = getattr(twin, "config", None)
        self._config = dict(config) if isinstance(config, Mapping) else {}  # of a diffusers model
        floating = (p.dtype for p in twin.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)
        self._dtype = next(floating, torch.get_default_dtype())
        self._modules_left = _MAX_RUNS * sum(1 for _ in twin.modules())

    def run(self) -> dict[str, object]:
        """The first inputs with which the forward comes to its end."""
        first = {name: ARGUMENTS[name][0] for name, required in self._known.items() if required or name in _USUAL}
        latents = self._first_form_of_latents()
        attempt = self._attempt({n: latents if n in ("hidden_states", "sample") else f for n, f in first.items()}, {})
        while attempt.failure is not None:
            best = max((self._changed(attempt, f) for f in self._neighbours(attempt.forms)), key=lambda a: a.progress)
            if best.progress <= attempt.progress:
                raise InputError(
                    f"its forward fails with the examples {_describe(attempt.inputs)}: {first_line(attempt.failure)}"
                ) from attempt.failure
            attempt = best
        attempt = self._use_idle_layers(attempt)
        sizes = attempt.sizes
        sizes.learned = {**dict.fromkeys(sizes.unknown, _SIZE_OF_NO_CONSEQUENCE), **sizes.learned}
        return self._inputs(attempt.forms, sizes)

    def _first_form_of_latents(self) -> Form:
        """An image where the config tells its size, a video where the first layer is three-dimensional, else tokens."""
        layer = next(iter(self._layers.values()), None)
        if isinstance(layer, nn.Conv3d):
            return "B C F H W"
        has_area = any(self._config.get(key) is not None for key in ("sample_size", "sample_height"))
        return "B C H W" if has_area or isinstance(layer, nn.Conv2d) else "B N C"

    def _use_idle_layers(self, attempt: _Attempt) -> _Attempt:
        """Adds optional arguments that bring layers to life which would not run otherwise."""
        for name in self._known:
            if self._layers.keys() <= attempt.layers_run:
                break
            if name in attempt.forms or name.endswith("mask"):
                continue
            for form in ARGUMENTS[name]:
                trial = self._changed(attempt, {**attempt.forms, name: form})
                if trial.failure is None and len(trial.layers_run) > len(attempt.layers_run):
                    attempt = trial
                    break
        return attempt

    def _neighbours(self, forms: Forms) -> Iterator[Forms]:
        yield forms
        for name, required in self._known.items():
            yield from ({**forms, name: form} for form in ARGUMENTS[name] if forms.get(name) != form)
            if name in forms and not required:
                yield {n: f for n, f in forms.items() if n != name}

    def _changed(self, before: _Attempt, forms: Forms) -> _Attempt:
        """Another attempt, with the sizes learned so far except those of arguments whose form changes."""
        if forms == before.forms or self._modules_left <= 0:
            return before
        changed = {name for name in {*before.forms, *forms} if before.forms.get(name) != forms.get(name)}
        return self._attempt(forms, {of: size for of, size in before.sizes.learned.items() if of not in changed})

    def _inputs(self, forms: Forms, sizes: Sizes) -> dict[str, object]:
        return {**{name: sizes.make(form, name) for name, form in forms.items()}, **self._fixed}

    def _attempt(self, forms: Forms, learned: Mapping[str, int]) -> _Attempt:
        sizes = Sizes(self._config, self._dtype, batch_size(self._fixed), learned)
        for _ in range(_MAX_LEARNED):
            attempt = _Attempt(forms, sizes)
            try:
                attempt.inputs = self._inputs(forms, sizes)
                with torch.no_grad(), attempt.watching(self._twin), _NoHugeTables():  # type: ignore[no-untyped-call]  # as below
                    self._twin(**attempt.inputs)
            except _SizeLearned:
                continue
            except Exception as error:  # noqa: BLE001  # foreign code fails in any way; it is reported
                if attempt.learn_from_message(str(error)):
                    continue
                attempt.failure = error
            finally:
                self._modules_left -= attempt.n_modules_run
            break
        return attempt


class _NoHugeTables(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its modes untyped
    """Refuses real tensors of a size that is still unknown, such as tables of rotary positions."""

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        named = kwargs if isinstance(kwargs, dict) else {}
        values = pytree.arg_tree_leaves(*args, **named)
        tensors = [v for v in values if isinstance(v, torch.Tensor)]
        is_meta = any(v.is_meta for v in tensors) or str(named.get("device")) == "meta"
        if not is_meta and any(isinstance(v, int | float) and FIRST_UNKNOWN <= v < _NO_LIMIT for v in values):
            raise ValueError(f"{func} would make a table of a size that is not known")
        return func(*args, **named)


class _Attempt:
    """One run of a denoiser with some forms: how far it gets, its failure if any, and the sizes that it teaches."""

    def __init__(self, forms: Forms, sizes: Sizes) -> None:
        self.forms, self.sizes = forms, sizes
        self.inputs: Mapping[str, object] = {}
        self.n_modules_run = 0
        self.layers_run: set[str] = set()
        self.failure: Exception | None = None

    @property
    def progress(self) -> tuple[float, int]:
        """Modules that ran, and the line of the denoiser's own forward that was reached."""
        if self.failure is None:
            return float("inf"), 0
        frames = traceback.walk_tb(self.failure.__traceback__)  # the outermost forward is a user module's or diffusers'
        lines = (line for frame, line in frames if frame.f_code.co_name == "forward" and "self" in frame.f_locals)
        return self.n_modules_run, next(lines, 0)

    @contextmanager
    def watching(self, denoiser: nn.Module) -> Iterator[None]:
        """Sees every module that runs within the context, and learns unknown sizes from what it receives."""
        with ExitStack() as stack:
            for name, module in denoiser.named_modules():
                stack.enter_context(module.register_forward_pre_hook(partial(self._look, name)))
            yield

    def _look(self, name: str, module: nn.Module, arguments: tuple[object, ...]) -> None:
        is_layer, received = isinstance(module, LAYERS), arguments[0] if arguments else None
        axis, size = _expected_width(module, received) if isinstance(received, torch.Tensor) else (-1, None)
        if isinstance(received, torch.Tensor) and size is not None and received.shape[axis] != size:
            if self._learn(received.shape[axis], size):
                raise _SizeLearned
            if is_layer:
                raise ValueError(
                    f"a {type(module).__name__} expects size {size} in dimension {axis}, got {tuple(received.shape)}"
                )
        if is_layer:
            self.layers_run.add(name)
        self.n_modules_run += 1

    def _learn(self, got: int, wanted: int) -> bool:
        """Solves got = factor * unknown + rest for the unknown that makes it `wanted`."""
        open_sizes = [(got % size, of, got // size) for of, size in self.sizes.unknown.items()]
        for rest, of, factor in sorted(open_sizes):
            size, remainder = divmod(wanted - rest, factor) if factor else (0, 1)
            if of not in self.sizes.learned and rest < _SMALL_REST and size > 0 and remainder == 0:
                self.sizes.learned[of] = size
                return True
        return False

    def learn_from_message(self, message: str) -> bool:
        """Learns a size from an error about two sizes that should be equal."""
        match = next((found for pattern in _MISMATCHES if (found := re.search(pattern, message))), None)
        if match is None:
            return False
        wanted, got = sorted(map(int, match.groups()))
        return self._learn(got, wanted)


def _expected_width(module: nn.Module, received: torch.Tensor) -> tuple[int, int | None]:
    """The axis that holds the features of a layer's or norm's input, and their number; None where any will do."""
    if isinstance(module, nn.Linear):
        return -1, module.in_features
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        n_dims = len(module.kernel_size) + 2
        if received.dim() != n_dims:
            raise ValueError(f"a {type(module).__name__} expects {n_dims} dimensions, got {tuple(received.shape)}")
        return 1, module.in_channels
    weight = module._parameters.get("weight")
    is_norm = "Norm" in type(module).__name__ and not hasattr(module, "num_groups")
    return -1, weight.numel() if is_norm and weight is not None and weight.dim() == 1 else None


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(str(n) if n < FIRST_UNKNOWN else "?" for n in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}={_describe(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(_describe, value)) + ")"
    return repr(value)
