"""Entries of the configuration: written shortly, read strictly, described from what lies in the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from packed_weights import FORMATS, OWNER, TIED, random_packed
from sedimo.checkpoint.contents import describe, flatten_state, narrowed, packed_layers
from sedimo.checkpoint.layout import Configuration, entry_of, read_configuration
from sedimo.codec import to_json
from sedimo.errors import StateError
from sedimo.quant.parts import TensorSpec


def read_layers(layers):
    plain = {"quant_method": "sedimo", "format_version": 1, "layers": layers}
    return read_configuration(plain, place="here")


def test_the_written_form_is_the_specified_one():
    weight = random_packed((8, 16), [(4, "kmc3"), (2, "fp16"), (10, "uaq4g4")], wide=torch.float32)
    assert to_json(entry_of(weight)) == (
        '{"kind":"Linear","parts":[{"codebook":"float32","format":"kmc3","start":0,"stop":4},'
        '{"format":"fp16","start":4,"stop":6,"values":"float32"},{"format":"uaq4g4","start":6,"stop":16}],'
        '"shape":[8,16]}'
    )


pieces = st.lists(st.tuples(st.integers(1, 9), st.sampled_from((*FORMATS, "fp16"))), min_size=1, max_size=4)


@given(pieces, st.integers(1, 4), st.sampled_from([(), (3,), (2, 2)]))
def test_entries_survive_the_file(parts, n_channels, kernel):
    weight = random_packed((n_channels, sum(n for n, _ in parts), *kernel), parts)
    told = Configuration({"a.b": entry_of(weight)}, {"a.b": "a.b", "c": "a.b"})
    assert told.plain["layers"]["c"] == {"same_as": "a.b"}
    again = read_configuration(told.plain, place="here")
    assert again == told
    assert again.key == Configuration(told.layers, dict(reversed(told.owners.items()))).key
    assert told.layers["a.b"].stored_bytes == weight.stored_bytes
    assert told.layers["a.b"].n_weights == weight.numel()
    assert told.tensors == {
        f"a.b.weight.{i}.{field}": TensorSpec(t.dtype, tuple(t.shape))
        for i, part in enumerate(weight.parts)
        for field, t in part.tensors.items()
    }


def test_ties_are_described_once(packed_dit):
    found = describe(packed_dit)
    assert found.owners[TIED] == OWNER
    assert found.owners.keys() - found.layers.keys() == {TIED}
    assert found.layers["pos_embed.proj"].kind == "Conv2d"


def entry_with(number_format):
    return {"kind": "Linear", "shape": [4, 4], "parts": [{"start": 0, "stop": 4, "format": number_format}]}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("kmc4", "must be an object"),
        (None, "must be an object"),
        (5, "must be an object"),
        (["same_as"], "must be an object"),
        (entry_with("uaq4a8"), "no activation bits.*got uaq4a8"),
        (entry_with("uaq\N{ARABIC-INDIC DIGIT FOUR}"), "is not a format"),
        (entry_with("uaq" + "4" * 5000), "is not a format"),
        ({"kind": "Linear", "shape": [0, 4], "parts": []}, "2 positive sizes"),
        ({"kind": "Linear", "shape": [4, 4], "parts": []}, "must cover the 4 input channels"),
        ({"kind": "Linear", "shape": [4, 4, 1], "parts": []}, "2 positive sizes"),
        ({"kind": "Linear", "shape": [4.0, 4], "parts": []}, "must be of type int"),
        ({"kind": "Linear", "shape": [True, 4], "parts": []}, "must be of type int"),
        ({"kind": "Linear", "parts": []}, "lacks the fields"),
        ({"same_as": 3}, "must be of type str"),
        ({"same_as": "here"}, "is no packed layer"),
        ({"same_as": "here", "kind": "Linear", "shape": [4, 4], "parts": []}, "unknown fields"),
    ],
)
def test_wrong_entries_are_refused(entry, message):
    with pytest.raises(StateError, match=message):
        read_layers({"here": entry})


def test_backward_and_overlapping_parts_are_refused():
    for edges in ([(0, 3), (2, 4)], [(0, 4), (4, 4)], [(2, 4), (0, 2)], [(0, 5), (5, 4)], [(-1, 4)]):
        parts = [{"start": a, "stop": b, "format": "uaq4"} for a, b in edges]
        with pytest.raises(StateError, match=r"must cover the 4 input channels|must be a range"):
            read_layers({"here": {"kind": "Linear", "shape": [4, 4], "parts": parts}})


def test_saving_notices_weights_exchanged_behind_our_back(packed_dit):
    told = describe(packed_dit)
    shape = tuple(packed_layers(packed_dit)[TIED].shape)
    tied = packed_dit.get_submodule(TIED)
    tied.weight = nn.Parameter(random_packed(shape), requires_grad=False)
    with pytest.raises(StateError, match="does not share the weight"):
        flatten_state(packed_dit.state_dict(), told)
    untied = {name: owner for name, owner in told.owners.items() if name != TIED}
    with pytest.raises(StateError, match="is packed but not described"):
        flatten_state(packed_dit.state_dict(), replace(told, owners=untied))
    tied.weight = nn.Parameter(torch.zeros(shape), requires_grad=False)
    with pytest.raises(StateError, match="has no packed weight"):
        flatten_state(packed_dit.state_dict(), told)
    packed_dit.proj_out_1.weight = nn.Parameter(random_packed((64, 32), "kma2"), requires_grad=False)
    with pytest.raises(StateError, match="has a packed weight of another layout"):
        flatten_state(packed_dit.state_dict(), replace(told, owners={"proj_out_1": "proj_out_1"}))


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0.5, -0.0, 65504.0, 2.0**-24], torch.float16),
        ([65536.0, 2.0**-100], torch.bfloat16),
        ([1.0 + 2.0**-12], torch.float32),
        ([float("nan")], torch.float32),
        ([float("inf")], torch.float16),
    ],
)
def test_narrowing_is_exact_or_does_nothing(values, dtype):
    tensor = torch.tensor(values)
    short = narrowed(tensor)
    assert short.dtype == dtype
    assert torch.equal(short.float().nan_to_num(), tensor.nan_to_num())
    assert narrowed(torch.tensor([3])).dtype == torch.int64
