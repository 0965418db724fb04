"""What a denoiser's arguments look like, by their names alone; nothing here knows an architecture.

An argument has one or more *forms*, most likely first. A form is built from `Sizes`, which answers from the
denoiser's config, or with a size that the probe has still to find out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

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
