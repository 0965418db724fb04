"""Tracing whole denoisers: counts, edges, costs, digests, and what is refused."""

from __future__ import annotations

import copy
import gc
import logging
import math
import subprocess
import sys
import warnings
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from bare import Recurrent
from denoisers import PUBLISHED, TINY, build, published, traced
from diffusers.configuration_utils import FrozenDict
from torch import nn
from transformers import BatchEncoding

from sedimo.codec import from_plain, to_plain
from sedimo.errors import InputError
from sedimo.graph.layers import weight_layers
from sedimo.graph.model import DenoiserGraph, inspect_summary
from sedimo.graph.trace import trace_denoiser

SMALL_LAYERS = 1e-3  # share of the operations that a published count may leave out


def edges_of(graph: DenoiserGraph, name: str) -> list[str]:
    """Names of the nodes that feed a node, first argument first."""
    position = [node.name for node in graph.nodes].index(name)
    return [graph.nodes[source].name for source, target in graph.edges if target == position]


@pytest.fixture(scope="module")
def dit_graph(tiny_dit: nn.Module) -> DenoiserGraph:
    return trace_denoiser(tiny_dit)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_denoisers_have_their_number_of_layers(name: str) -> None:
    assert len(weight_layers(published(name))) == PUBLISHED[name][2]


DEAR = ("SDXL", "PixArt-XL")  # three times SD 1.5 of the same blocks; traced for `test_groups.py`, too


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in DEAR)) for n in PUBLISHED])
def test_published_denoisers_trace_with_every_layer_in_use(name: str) -> None:
    graph = traced(name)
    assert len(graph.layers) == PUBLISHED[name][2]
    assert all(node.macs >= node.params > 0 for node in graph.layers)
    assert {layer for group in graph.groups for layer in group.layers} == set(graph.layer_index)


def test_numbers_of_weights_are_the_published_ones() -> None:
    """From the sizes in the released code of Qua2SeDiMo (2024), table of section 1.1 in bytes."""
    counts = {"DiT-XL/2": 716_986_368, "PixArt-XL": 610_228_224, "SD 1.5": 859_077_120, "SDXL": 2_565_880_320}
    for name, n_weights in counts.items():
        assert sum(math.prod(layer.shape) for layer in weight_layers(published(name)).values()) == n_weights


def test_macs_of_dit_xl_are_the_published_ones() -> None:
    """118.64 G at 256 x 256 pixels (Peebles and Xie, 2023, table 4, there called flops), small layers aside."""
    assert traced("DiT-XL/2").macs == pytest.approx(118.64e9, rel=SMALL_LAYERS)


@pytest.mark.parametrize("name", TINY)
def test_other_architectures_trace_with_every_layer_in_use(name: str) -> None:
    graph = traced(name)
    assert set(graph.layer_index) == set(weight_layers(build(*TINY[name])))
    assert all(node.macs > 0 for node in graph.layers), graph.notes
    assert sum(len(group.layers) for group in graph.groups) == len(graph.layers)
    is_reached = {target for _, target in graph.edges} | {source for source, _ in graph.edges}
    assert is_reached == set(range(len(graph.nodes)))


def test_a_block_of_dit_is_wired_as_published(dit_graph: DenoiserGraph) -> None:
    block = "transformer_blocks.1"
    assert edges_of(dit_graph, f"{block}.norm1.modulate_0") == ["transformer_blocks.0.add_1", f"{block}.norm1.linear"]
    for layer in ("to_q", "to_k", "to_v"):
        assert edges_of(dit_graph, f"{block}.attn1.{layer}") == [f"{block}.norm1.modulate_0"]
    attention = f"{block}.attn1.attention_0"
    assert edges_of(dit_graph, attention) == [f"{block}.attn1.{layer}" for layer in ("to_q", "to_k", "to_v")]
    assert edges_of(dit_graph, f"{block}.attn1.to_out.0") == [attention]
    added = {f"{block}.attn1.to_out.0", "transformer_blocks.0.add_1", f"{block}.norm1.linear"}
    assert set(edges_of(dit_graph, f"{block}.add_0")) == added  # the gate of the residual comes from norm1.linear
    assert set(edges_of(dit_graph, f"{block}.modulate_0")) == {f"{block}.add_0", f"{block}.norm1.linear"}
    assert edges_of(dit_graph, f"{block}.ff.net.0.proj") == [f"{block}.modulate_0"]
    assert edges_of(dit_graph, f"{block}.ff.net.2") == [f"{block}.ff.net.0.proj"]


def test_layers_of_dit_are_labelled(dit_graph: DenoiserGraph) -> None:
    node = dit_graph.layer_index["transformer_blocks.1.attn1.to_out.0"]
    assert (node.operation, node.block) == ("transformer_blocks.attn1.to_out", "transformer_blocks.1")
    assert (node.layer_type, node.shape) == ("Linear", (32, 32))
    assert dit_graph.layer_index["pos_embed.proj"].block == ""
    assert dit_graph.layer_index["pos_embed.proj"].layer_type == "Conv2d"


def test_macs_of_dit_by_hand(dit_graph: DenoiserGraph) -> None:
    tokens, width = 16, 32  # an 8 x 8 latent in patches of 2
    macs = {node.name: node.macs for node in dit_graph.nodes}
    assert macs["pos_embed.proj"] == tokens * width * 4 * 2 * 2
    assert macs["transformer_blocks.1.norm1.linear"] == 6 * width * width
    assert macs["transformer_blocks.1.attn1.to_q"] == tokens * width * width
    assert macs["transformer_blocks.1.attn1.attention_0"] == tokens * tokens * 16 * 2 * 2
    assert macs["transformer_blocks.1.ff.net.2"] == tokens * 4 * width * width
    assert macs["transformer_blocks.1.add_0"] == 0
    embedder = "norm1.emb.timestep_embedder.linear_1"
    assert macs[f"transformer_blocks.0.{embedder}"] == 2 * macs[f"transformer_blocks.1.{embedder}"]  # called twice


def test_tied_timestep_embedders_are_found(dit_graph: DenoiserGraph) -> None:
    embedder = "norm1.emb.timestep_embedder"
    wanted = {tuple(f"transformer_blocks.{block}.{embedder}.linear_{i}" for block in (0, 1)) for i in (1, 2)}
    assert set(dit_graph.ties) == wanted


def test_digest_does_not_depend_on_weights_batch_dtype_or_argument_order(
    tiny_dit: nn.Module, dit_graph: DenoiserGraph
) -> None:
    other = copy.deepcopy(tiny_dit)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    examples = {
        "class_labels": torch.zeros(3, dtype=torch.long),
        "timestep": torch.zeros(3, dtype=torch.long),
        "hidden_states": torch.zeros(3, 4, 8, 8, dtype=torch.bfloat16),
    }
    assert trace_denoiser(other.bfloat16(), example_inputs=examples).digest == dit_graph.digest


def test_digest_is_the_same_in_another_process() -> None:
    code = (
        "import torch; from bare import Recurrent; from sedimo.graph.trace import trace_denoiser; "
        "print(trace_denoiser(Recurrent(), example_inputs={'tokens': torch.zeros(1, 7, 8)}).digest)"
    )
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    here = trace_denoiser(Recurrent(), example_inputs={"tokens": torch.zeros(1, 7, 8)})
    assert done.stdout.strip() == here.digest
    assert done.stderr == ""


def test_graph_survives_its_record(dit_graph: DenoiserGraph) -> None:
    assert from_plain(DenoiserGraph, to_plain(dit_graph)) == dit_graph


def test_summary_has_the_promised_keys(dit_graph: DenoiserGraph) -> None:
    summary = inspect_summary(dit_graph)
    promised = {"denoiser", "n_layers", "n_decisions", "n_nodes", "n_edges", "n_groups", "params", "macs", "layers"}
    assert promised <= summary.keys()
    assert (summary["n_layers"], summary["n_decisions"]) == (21, 19)
    layers = summary["layers"]
    assert isinstance(layers, list)
    assert {"name", "operation", "block", "shape", "params", "macs"} <= layers[0].keys()


def test_tracing_is_silent_and_leaves_the_denoiser_as_it_was(
    tiny_dit: nn.Module, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    denoiser = copy.deepcopy(tiny_dit).train()
    before = {name: (parameter, parameter.clone()) for name, parameter in denoiser.named_parameters()}
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING):
        warnings.simplefilter("always")
        trace_denoiser(denoiser)
    assert [str(w.message) for w in caught] == []
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")
    assert denoiser.training
    assert all(before[n][0] is p and torch.equal(before[n][1], p) for n, p in denoiser.named_parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in denoiser.modules())


def test_real_weights_are_not_copied(tiny_dit: nn.Module) -> None:
    denoiser = copy.deepcopy(tiny_dit)
    shapes = {tuple(p.shape) for p in denoiser.parameters() if p.dim() > 1}
    allocated = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.device.type == "cpu":
                allocated.append(tuple(result.shape))
            return result

    from sedimo.graph.layers import meta_twin

    with Recorder():
        twin = meta_twin(denoiser)
    assert not shapes & set(allocated)
    assert all(t.is_meta for t in (*twin.parameters(), *twin.buffers()))
    gc.collect()


def test_a_bare_module_traces_with_example_inputs() -> None:
    graph = trace_denoiser(Recurrent(), example_inputs={"tokens": torch.zeros(5, 7, 8)})
    assert graph.layer_index["again"].macs == 3 * 7 * 8 * 8
    assert graph.layer_index["unused"].macs == 0
    assert graph.nodes[-1].name == "unused"
    assert graph.ties == (("again", "head"),)
    assert graph.layer_index["blocks.1.2"].block == "blocks.1"
    assert any("bare" in note for note in graph.notes)
    assert any("unused" in note for note in graph.notes)
    assert edges_of(graph, "head")[0].startswith("add_")


class Conditioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(8, 8), nn.Linear(4, 8)

    def forward(self, tokens: torch.Tensor, conditions: Mapping[str, Sequence[torch.Tensor]]) -> torch.Tensor:
        return self.image(tokens) + self.text(conditions["texts"][0])


@pytest.mark.parametrize("kind", [dict, FrozenDict, BatchEncoding, UserDict])
def test_example_inputs_may_hold_mappings_of_any_kind(kind: Callable[[dict[str, object]], object]) -> None:
    conditions = kind({"texts": [torch.zeros(2, 4)]})
    graph = trace_denoiser(Conditioned(), example_inputs={"tokens": torch.zeros(2, 8), "conditions": conditions})
    assert edges_of(graph, graph.nodes[-1].name) == ["image", "text"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_denoisers_trace(tiny_dit: nn.Module, dtype: torch.dtype, dit_graph: DenoiserGraph) -> None:
    assert trace_denoiser(copy.deepcopy(tiny_dit).to(dtype)).edges == dit_graph.edges


def test_an_unknown_argument_is_named_with_the_remedy() -> None:
    with pytest.raises(InputError, match=r"requires the arguments tokens,.*example_inputs=\{\"tokens\""):
        trace_denoiser(Recurrent())


def test_a_capture_helps_where_names_do_not() -> None:
    calls = []

    def capture() -> dict[str, object]:
        calls.append(1)
        return {"tokens": torch.zeros(2, 3, 8), "foreign": 1}

    assert trace_denoiser(Recurrent(), capture=capture).layer_index["again"].macs == 3 * 3 * 8 * 8
    assert calls == [1]


def test_a_capture_is_not_called_in_vain(tiny_dit: nn.Module, dit_graph: DenoiserGraph) -> None:
    def capture() -> dict[str, object]:
        raise AssertionError

    assert trace_denoiser(tiny_dit, capture=capture) == dit_graph


def test_foreign_example_inputs_are_refused(tiny_dit: nn.Module) -> None:
    with pytest.raises(InputError, match=r"latents.*hidden_states, timestep"):
        trace_denoiser(tiny_dit, example_inputs={"latents": torch.zeros(1, 4, 8, 8)})


def test_example_inputs_change_the_sizes(tiny_dit: nn.Module, dit_graph: DenoiserGraph) -> None:
    bigger = trace_denoiser(tiny_dit, example_inputs={"hidden_states": torch.zeros(1, 4, 16, 16)})
    name = "transformer_blocks.1.attn1.to_q"
    assert bigger.layer_index[name].macs == 4 * dit_graph.layer_index[name].macs


def test_example_inputs_that_do_not_fit_are_explained(tiny_dit: nn.Module) -> None:
    with pytest.raises(InputError, match=r"forward fails.*Conv2d expects size 4"):
        trace_denoiser(tiny_dit, example_inputs={"hidden_states": torch.zeros(1, 5, 8, 8)})


def test_a_module_without_weights_is_refused() -> None:
    with pytest.raises(InputError, match="no Linear or Conv weight"):
        trace_denoiser(nn.SiLU(), example_inputs={"input": torch.zeros(1)})


def test_packed_weights_of_others_are_refused(tiny_dit: nn.Module) -> None:
    denoiser = copy.deepcopy(tiny_dit)
    denoiser.proj_out_1.weight = nn.Parameter(torch.zeros(1024, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InputError, match=r"proj_out_1.*\(64, 32\).*quantized already"):
        trace_denoiser(denoiser)


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens + 1


def test_a_module_that_uses_no_layer_is_refused() -> None:
    with pytest.raises(InputError, match="Idle uses none of its layers"):
        trace_denoiser(Idle(), example_inputs={"tokens": torch.zeros(1, 4)})


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.linear(tokens)
        return hidden if float(hidden.sum()) > 0 else -hidden


def test_a_forward_that_depends_on_values_is_refused() -> None:
    with pytest.raises(InputError, match="Branching"):
        trace_denoiser(Branching(), example_inputs={"tokens": torch.zeros(1, 4)})
