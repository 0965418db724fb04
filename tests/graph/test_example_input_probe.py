"""Example inputs: sizes from the config, from layers, from errors; forms by trial."""

from __future__ import annotations

import pytest
import torch
from denoisers import TINY, build, published
from torch import nn

from sedimo.errors import InputError
from sedimo.graph.example_inputs import ARGUMENTS, FIRST_UNKNOWN, Sizes, find_inputs
from sedimo.graph.layers import meta_twin


def shapes(inputs: dict[str, object]) -> dict[str, object]:
    return {name: tuple(v.shape) if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}


def found(name: str, **given: object) -> dict[str, object]:
    return shapes(find_inputs(meta_twin(build(*TINY[name])), given))


def test_inputs_of_sd15_are_those_of_its_pipeline() -> None:
    assert shapes(find_inputs(meta_twin(published("SD 1.5")), {})) == {
        "sample": (1, 4, 64, 64),
        "timestep": (1,),
        "encoder_hidden_states": (1, 77, 768),
        "return_dict": False,
    }


def test_added_conditions_are_found_where_they_are_mandatory() -> None:
    conditions = found("UNet with added conditions")["added_cond_kwargs"]
    assert isinstance(conditions, dict)
    assert conditions["text_embeds"].shape == (1, 20)
    assert conditions["time_ids"].shape == (1, 6)
    conditions = found("PixArt with sizes")["added_cond_kwargs"]
    assert isinstance(conditions, dict)
    assert {name: tuple(v.shape) for name, v in conditions.items()} == {"resolution": (1, 2), "aspect_ratio": (1, 1)}


@pytest.mark.parametrize(
    ("denoiser", "argument", "shape"),
    [
        ("FLUX", "hidden_states", (1, 4096, 4)),
        ("FLUX", "img_ids", (4096, 3)),
        ("FLUX", "txt_ids", (77, 3)),
        ("FLUX", "guidance", (1,)),
        ("FLUX", "pooled_projections", (1, 20)),
        ("SD3", "pooled_projections", (1, 64)),
        ("SD3", "encoder_hidden_states", (1, 77, 24)),
        ("Hunyuan", "encoder_hidden_states", (1, 77, 40)),
        ("Hunyuan", "encoder_hidden_states_t5", (1, 256, 48)),
        ("Hunyuan", "text_embedding_mask_t5", (1, 256)),
        ("Hunyuan", "style", (1,)),
        ("Sana", "encoder_hidden_states", (1, 77, 12)),
        ("Wan", "hidden_states", (1, 4, 8, 64, 64)),
        ("Wan", "encoder_hidden_states", (1, 77, 16)),
        ("UNet2D with classes", "class_labels", (1,)),
        ("UNet with guidance embedding", "timestep_cond", (1, 12)),
    ],
)
def test_sizes(denoiser: str, argument: str, shape: tuple[int, ...]) -> None:
    assert found(denoiser)[argument] == shape


def test_arguments_that_a_config_does_not_want_stay_away() -> None:
    assert "class_labels" not in found("UNet2D")
    assert "timestep_cond" not in found("UNet with text")


def test_given_inputs_are_taken_as_they_are() -> None:
    given = torch.empty(2, 5, 24, device="meta")
    inputs = found("UNet with text", encoder_hidden_states=given)
    assert inputs["encoder_hidden_states"] == (2, 5, 24)
    assert inputs["sample"] == (2, 4, 16, 16)  # found, with the same number of samples


def test_no_real_table_of_an_unknown_size_is_made():
    asked = []

    class Positional(nn.Module):
        def __init__(self):
            super().__init__()
            self.text = nn.Linear(24, 8)
            self.proj = nn.Linear(8, 8)

        def forward(self, hidden_states, encoder_hidden_states):
            width = encoder_hidden_states.shape[-1]
            if width > 1000:
                asked.append(width)
            table = torch.arange(width).float().mean()  # on the CPU, whatever the inputs are
            return self.proj(hidden_states) + self.text(encoder_hidden_states).mean() + float(table >= 0)

    with torch.device("meta"):
        denoiser = Positional()
    with pytest.raises(InputError, match="a table of a size that is not known"):
        find_inputs(denoiser, {})
    assert asked, "the unknown size reached the table"


def test_no_size_remains_unknown() -> None:
    for name in TINY:
        for value in found(name).values():
            sizes = value if isinstance(value, tuple) else ()
            assert all(size < FIRST_UNKNOWN for size in sizes if isinstance(size, int))


class Reader(nn.Module):
    """Reads its text only through a sum and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)
        self.joined = nn.Linear(30, 4)

    def forward(
        self, hidden_states: torch.Tensor, pooled_projections: torch.Tensor, proj_embedding: torch.Tensor
    ) -> torch.Tensor:
        hidden = self.layer(hidden_states) + pooled_projections[:, None]
        both = torch.cat([hidden.mean(1), proj_embedding.repeat(1, 2)], 1)
        return self.joined(both)


def test_sizes_are_learned_from_sums_concatenations_and_multiples() -> None:
    inputs = shapes(find_inputs(meta_twin(Reader()), {}))
    assert inputs == {"hidden_states": (1, 4096, 12), "pooled_projections": (1, 12), "proj_embedding": (1, 9)}


class Vague(Reader):
    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, style: int, magic: str) -> torch.Tensor:
        return hidden_states


def test_unknown_required_arguments_are_listed() -> None:
    with pytest.raises(InputError, match="requires the arguments magic, for which"):
        find_inputs(meta_twin(Vague()), {})


class Impossible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("never satisfied\nmore")


def test_a_forward_that_always_fails_is_reported_with_its_reason() -> None:
    with pytest.raises(InputError, match=r"hidden_states=float32\[1, .*RuntimeError: never satisfied$"):
        find_inputs(meta_twin(Impossible()), {})


def test_sizes_come_from_the_config() -> None:
    config = {"sample_size": [16, 32], "patch_size": (1, 2, 2), "sample_frames": 49, "temporal_compression_ratio": 4}
    sizes = Sizes(config, torch.float32)
    assert (sizes.make("H W F h w", "any").shape, sizes.make("N", "any").shape) == ((16, 32, 13, 8, 16), (128,))
    wide = Sizes({"sample_height": 8, "sample_width": 12, "text_len": 5}, torch.float32)
    assert wide.make("H W", "any").shape == (8, 12)
    assert (wide.make("T", "encoder_hidden_states").shape, wide.make("T", "other").shape) == ((5,), (77,))


def test_a_form_is_axes_in_letters_or_a_container_of_forms() -> None:
    sizes = Sizes({"sample_size": 16}, torch.float16, batch=3, learned={"hint": 5})
    made = sizes.make([{"hint": "B C 8H W"}, ("int BF", 1, "number h")], "x")
    assert made[0]["hint"].shape == (3, 5, 128, 16)
    assert (made[0]["hint"].dtype, made[1][0].dtype) == (torch.float16, torch.int64)
    assert (made[1][0].shape, *made[1][1:]) == ((24,), 1, 16)


def test_unknown_sizes_differ_and_stay() -> None:
    sizes = Sizes({}, torch.float32, learned={"c": 7})
    first, second = sizes.width("a"), sizes.width("b")
    assert first != second
    assert (sizes.width("a"), sizes.width("c")) == (first, 7)
    assert second % first > 100_000


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_form_can_be_built(name: str) -> None:
    sizes = Sizes({"num_attention_heads": 2, "attention_head_dim": 8}, torch.float16, learned={name: 4, "sample": 4})
    for form in ARGUMENTS[name]:
        assert sizes.make(form, name) is not None
