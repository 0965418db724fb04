"""Tables of rows instead of batches of graphs, and networks that start where they should."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from planted import candidates_of, planted_choices, planted_graph, planted_set, random_codes
from torch import nn

from sedimo.errors import InputError
from sedimo.methods.predictor.features import Choices, graph_features
from sedimo.methods.predictor.model import CountedBatchNorm, NoiseNetwork, PaperNetwork
from sedimo.methods.predictor.noise_model import fit_noise_model
from tolerances import FLOAT32_FORMULA, FLOAT32_NETWORK, FLOAT32_SUM


def rows_of(features, codes):
    return torch.from_numpy(features.rows(codes))


def test_rows_speak_of_the_option_that_a_node_takes():
    choices, graph = planted_choices(), planted_graph()
    candidates = candidates_of(choices)
    features = graph_features(graph, choices, candidates)
    codes = random_codes(choices, 3)
    rows = features.rows(codes)
    for recipe, row in zip(codes, rows, strict=True):
        for node, index in zip(graph.nodes, row, strict=True):
            if node.kind != "layer":
                assert features.names["method"][features.codes["method"][index]] == "combine"
                assert features.error[index] == features.size[index] == 0
                continue
            d = [x.name for x in choices.space.decisions].index(node.name)
            number_format = choices.space.decisions[d].formats[recipe[d]]
            assert features.names["method"][features.codes["method"][index]] == number_format.family
            assert features.names["bits"][features.codes["bits"][index]] == str(number_format.bits)
            assert features.error[index] == pytest.approx(candidates[node.name, number_format].error)
            assert features.names["operation"][features.codes["operation"][index]] == node.operation
    options = features.row_options(choices.n_options)
    nodes = [[n.name for n in graph.nodes].index(d.name) for d in choices.space.decisions]
    assert (options[np.arange(len(nodes)), codes[0]] == rows[0][nodes]).all()


def test_roots_are_those_of_groups_of_a_hop():
    choices, graph = planted_choices(), planted_graph()
    features = graph_features(graph, choices, candidates_of(choices))
    names = np.array([n.name for n in graph.nodes])
    assert set(names[features.roots[0]]) == set(graph.layer_index)
    assert set(names[features.roots[2]]) == {"blocks.0.out", "blocks.1.out", "blocks.2.out"}
    assert features.roots[1].all()  # no group of one hop: all nodes


def test_a_space_of_another_graph_is_refused():
    graph = planted_graph()
    other = dataclasses.replace(graph, nodes=graph.nodes[:-1], edges=graph.edges[:-1], groups=graph.groups[:-1])
    with pytest.raises(InputError, match="not of this graph"):
        graph_features(other, planted_choices(), candidates_of(planted_choices()))


def test_counted_normalisation_is_that_of_repeated_rows():
    torch.manual_seed(0)
    x, counts = torch.randn(6, 5), torch.tensor([3.0, 1, 0, 4, 2, 2])
    mine, theirs = CountedBatchNorm(5), nn.BatchNorm1d(5)
    repeated = x.repeat_interleave(counts.long(), dim=0)
    for _ in range(3):
        found = mine(x, counts).repeat_interleave(counts.long(), dim=0)
        assert torch.allclose(found, theirs(repeated), atol=FLOAT32_FORMULA)
    mine.eval(), theirs.eval()
    assert torch.allclose(mine.running_var, theirs.running_var, atol=FLOAT32_SUM)
    assert torch.allclose(mine(x, counts), theirs(x), atol=FLOAT32_FORMULA)


def test_a_network_without_training_is_the_noise_model():
    data = planted_set(60)
    model = fit_noise_model(data.choices, data.prior, data.codes, data.quality)
    network = NoiseNetwork(data.features, model).eval()
    with torch.no_grad():
        _, hop_scores = network(rows_of(data.features, data.codes))
    for scores in hop_scores:
        assert np.allclose(scores.numpy(), model.predict(data.codes), atol=FLOAT32_NETWORK)


def test_fp16_contributes_nothing_whatever_the_correction():
    choices = Choices(planted_choices("uaq3,uaq4,fp16").space)
    features = graph_features(planted_graph(), choices, candidates_of(choices))
    data = planted_set(60)
    model = fit_noise_model(data.choices, data.prior, data.codes, data.quality)
    model.log_costs = choices.array(lambda _d, f: -1.0 if f.is_quantized else -np.inf, padding=-np.inf)
    network = NoiseNetwork(features, model).eval()
    nn.init.constant_(network.corrections[0].bias, 5.0)
    fp16 = [[str(f) for f in d.formats].index("fp16") for d in choices.space.decisions]
    with torch.no_grad():
        rows = rows_of(features, np.array([fp16]))
        assert network.contributions(rows, network.hops(rows)[0], 0).sum() == 0


def test_the_published_network_pools_roots_and_ranks_by_norms():
    data = planted_set(20)
    torch.manual_seed(1)
    network = PaperNetwork(data.features, n_hops=2).eval()
    with torch.no_grad():
        rows = rows_of(data.features, data.codes)
        (prediction, hop_scores), embeddings = network(rows), network.hops(rows)
    assert [h.shape for h in embeddings] == [(20, 13, 16), (20, 13, 64), (20, 13, 64)]
    roots = torch.from_numpy(data.features.roots[2])
    pooled = embeddings[2][:, roots].mean(dim=1)
    assert torch.allclose(hop_scores[2], pooled.abs().sum(dim=1))
    assert prediction.shape == (20,)
