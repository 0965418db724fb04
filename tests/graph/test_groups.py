"""Groups: what belongs together, roots, hops, and how large groups fall apart."""

from __future__ import annotations

from collections import Counter

import pytest
from denoisers import traced
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sedimo.errors import InputError
from sedimo.graph.groups import find_groups, split_groups
from sedimo.graph.model import DenoiserGraph, Group, Node
from sedimo.graph.trace import trace_denoiser

OPTIONS = 6  # of Qua2SeDiMo


@pytest.fixture(scope="module")
def dit(tiny_dit: nn.Module) -> DenoiserGraph:
    return trace_denoiser(tiny_dit)


@pytest.fixture(scope="module")
def pixart() -> DenoiserGraph:
    return traced("PixArt with sizes")


@pytest.fixture(scope="module")
def flux() -> DenoiserGraph:
    return traced("FLUX")


def group_of(graph: DenoiserGraph, layer: str) -> Group:
    return next(g for g in graph.groups if layer in g.layers)


def short(group: Group, prefix: str) -> set[str]:
    return {name.removeprefix(prefix + ".") for name in group.layers}


def test_attention_of_dit_is_the_published_group(dit: DenoiserGraph) -> None:
    group = group_of(dit, "transformer_blocks.1.attn1.to_q")
    wanted = {"norm1.linear", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"}
    assert short(group, "transformer_blocks.1") == wanted
    assert (group.kind, group.hop, group.root) == ("self_attention", 4, "transformer_blocks.1.attn1.to_out.0")


def test_other_groups_of_dit_are_the_published_ones(dit: DenoiserGraph) -> None:
    feed_forward = group_of(dit, "transformer_blocks.1.ff.net.2")
    assert (feed_forward.kind, feed_forward.hop, len(feed_forward.layers)) == ("feed_forward", 1, 2)
    embedder = group_of(dit, "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1")
    assert (embedder.kind, embedder.hop, len(embedder.layers)) == ("embedding", 1, 2)
    assert group_of(dit, "proj_out_1").layers == ("proj_out_1", "proj_out_2")
    assert group_of(dit, "pos_embed.proj").kind == "embedding"


def test_groups_of_pixart_are_the_published_ones(pixart: DenoiserGraph) -> None:
    counts = Counter(g.kind for g in pixart.groups)
    assert counts == {"embedding": 3, "self_attention": 2, "cross_attention": 2, "feed_forward": 2, "other": 1}
    cross = group_of(pixart, "transformer_blocks.0.attn2.to_k")
    assert short(cross, "transformer_blocks.0.attn2") == {"to_q", "to_k", "to_v", "to_out.0"}
    assert "adaln_single.linear" in group_of(pixart, "adaln_single.emb.timestep_embedder.linear_1").layers


def test_number_of_groups_of_pixart_xl_is_the_published_one() -> None:
    graph = traced("PixArt-XL")
    n_split = sum(g.kind == "cross_attention" for g in graph.groups)  # cut in two by the authors
    assert len(graph.groups) + n_split == 116


def test_joint_attention_of_flux_is_one_group(flux: DenoiserGraph) -> None:
    group = group_of(flux, "transformer_blocks.0.attn.to_q")
    assert group.kind == "self_attention"
    assert {"norm1.linear", "norm1_context.linear", "attn.add_k_proj", "attn.to_add_out"} <= short(
        group, "transformer_blocks.0"
    )
    assert len(group.layers) == 10
    single = group_of(flux, "single_transformer_blocks.0.attn.to_q")
    assert {"norm.linear", "proj_out"} <= short(single, "single_transformer_blocks.0")


def test_a_residual_block_ends_in_its_addition() -> None:
    graph = traced("UNet2D")
    plain = group_of(graph, "mid_block.resnets.0.conv1")
    assert short(plain, "mid_block.resnets.0") == {"conv1", "time_emb_proj", "conv2"}
    assert (plain.kind, plain.root, plain.hop) == ("residual", "mid_block.resnets.0.conv2", 2)
    widened = group_of(graph, "down_blocks.1.resnets.0.conv1")
    assert short(widened, "down_blocks.1.resnets.0") == {"conv1", "time_emb_proj", "conv2", "conv_shortcut"}
    assert (widened.kind, widened.root, widened.hop) == ("residual", "down_blocks.1.resnets.0.add_1", 3)


@pytest.mark.parametrize("name", ["Hunyuan", "SD3", "Sana", "Wan", "UNet with text"])
def test_every_group_is_connected_and_every_layer_is_in_one(name: str) -> None:
    graph = traced(name)
    layers = [layer for group in graph.groups for layer in group.layers]
    assert sorted(layers) == sorted(graph.layer_index)
    kinds = Counter(g.kind for g in graph.groups)
    assert kinds["self_attention"] >= 1
    assert kinds["feed_forward"] >= 1
    for group in graph.groups:
        assert is_connected(graph, group), group


def is_connected(graph: DenoiserGraph, group: Group) -> bool:
    """Whether the layers hang together through nodes that are no other layers."""
    index = {node.name: i for i, node in enumerate(graph.nodes)}
    members = {index[name] for name in group.layers}
    allowed = members | {i for i, node in enumerate(graph.nodes) if node.kind != "layer"}
    reached, stack = set(), [min(members)]
    while stack:
        i = stack.pop()
        if i not in reached:
            reached.add(i)
            stack += [b if a == i else a for a, b in graph.edges if i in (a, b) and {a, b} <= allowed]
    return members <= reached


def test_splitting_cuts_attention_in_scores_and_values(pixart: DenoiserGraph) -> None:
    parts = split_groups(pixart, n_options=OPTIONS, max_variants=OPTIONS**3)
    halves = [g for g in parts if "transformer_blocks.0.attn2" in g.name]
    prefix = "transformer_blocks.0.attn2"
    assert [short(g, prefix) for g in halves] == [{"to_q", "to_k"}, {"to_v", "to_out.0"}]
    assert [(g.root, g.hop) for g in halves] == [(f"{prefix}.attention_0", 1), (f"{prefix}.to_out.0", 2)]


def test_splitting_leaves_small_groups_alone(dit: DenoiserGraph) -> None:
    assert split_groups(dit, n_options=OPTIONS, max_variants=OPTIONS**5) == dit.groups


@pytest.mark.parametrize("max_variants", [6, 36, 216, 1296])
def test_split_groups_are_small_connected_and_complete(flux: DenoiserGraph, max_variants: int) -> None:
    parts = split_groups(flux, n_options=OPTIONS, max_variants=max_variants)
    assert all(OPTIONS ** len(g.layers) <= max_variants for g in parts)
    assert sorted(layer for g in parts for layer in g.layers) == sorted(flux.layer_index)
    assert all(is_connected(flux, g) for g in parts)


def test_too_few_variants_for_one_layer_are_refused(dit: DenoiserGraph) -> None:
    with pytest.raises(InputError, match="max_variants=5, n_options=6"):
        split_groups(dit, n_options=6, max_variants=5)


@given(st.integers(2, 14), st.data())
def test_random_graphs_fall_into_connected_groups(n: int, data: st.DataObject) -> None:
    kinds = data.draw(st.lists(st.sampled_from(["layer", "layer", "add", "attention"]), min_size=n, max_size=n))
    pairs = [(i, j) for j in range(n) for i in range(j)]
    edges = tuple(sorted(data.draw(st.sets(st.sampled_from(pairs))), key=lambda e: (e[1], e[0])))
    blocks = data.draw(st.lists(st.sampled_from(["", "blocks.0", "blocks.1"]), min_size=n, max_size=n))
    nodes = []
    for i, (kind, block) in enumerate(zip(kinds, blocks, strict=True)):
        name = f"{block}.m{i % 3}.n{i}".lstrip(".")
        shape = (4, 4) if kind == "layer" else ()
        macs = data.draw(st.sampled_from([16, 64])) if kind == "layer" else 0
        nodes.append(Node(name, kind, "x", block, macs, "Linear" if shape else None, shape))
    graph = DenoiserGraph("Random", tuple(nodes), edges, find_groups(nodes, edges))
    layers = [layer for g in graph.groups for layer in g.layers]
    assert sorted(layers) == sorted(graph.layer_index)
    assert all(is_connected(graph, g) for g in graph.groups)
    parts = split_groups(graph, n_options=3, max_variants=9)
    assert all(is_connected(graph, g) and len(g.layers) <= 2 for g in parts)
