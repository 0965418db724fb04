"""A denoiser of two blocks whose noise is known: operations matter by a plan, and recipes are measured with error."""

from __future__ import annotations

import numpy as np

from sedimo.bank import Candidate
from sedimo.graph.model import DenoiserGraph, Group, Node
from sedimo.methods.predictor.features import Choices, graph_features, picked
from sedimo.methods.predictor.training import TrainingSet
from sedimo.space import search_space

N_BLOCKS = 3
IMPORTANCE = {"blocks.query": 1.0, "blocks.key": 0.3, "blocks.out": 8.0, "head": 30.0}


def planted_graph():
    nodes, edges, groups, last = [], [], [], None
    for block in range(N_BLOCKS):
        path, first = f"blocks.{block}", len(nodes)
        for name in ("query", "key"):
            nodes.append(Node(f"{path}.{name}", "layer", f"blocks.{name}", path, 64 * 64, "Linear", (64, 64)))
        nodes.append(Node(f"{path}.attention", "attention", "blocks.attention", path, 100))
        nodes.append(Node(f"{path}.out", "layer", "blocks.out", path, 64 * 64, "Linear", (64, 64)))
        edges += [(first, first + 2), (first + 1, first + 2), (first + 2, first + 3)]
        edges += [] if last is None else [(last, first), (last, first + 1)]
        last = first + 3
        layers = tuple(f"{path}.{name}" for name in ("query", "key", "out"))
        groups.append(Group(f"{path}.attention", "self_attention", layers, f"{path}.out", 2))
    nodes.append(Node("head", "layer", "head", "", 64 * 16, "Linear", (16, 64)))
    edges.append((last, len(nodes) - 1))
    groups.append(Group("head", "other", ("head",), "head", 0))
    return DenoiserGraph("Planted", tuple(nodes), tuple(edges), tuple(groups))


def planted_choices(formats="uaq3,uaq4,kmc3,kmc4"):
    return Choices(search_space(planted_graph(), formats))


def candidates_of(choices):
    space = choices.space
    found = {}
    for d in space.decisions:
        for f in d.formats:
            error = 4.0 ** -(f.bits - 1) * (0.7 if f.family == "kmc" else 1.0)
            found[d.name, f] = Candidate(d.name, f, error, 0.0, 0, d.paper_bytes(f), d.stored_bytes(f))
    return found


def true_costs(choices):
    """What each option really adds, `[D, K]`."""
    candidates = candidates_of(choices)
    return choices.array(lambda d, f: IMPORTANCE[d.operation] * candidates[d.name, f].error)


def random_codes(choices, n, seed=0):
    generator = np.random.default_rng(seed)
    limits = [len(d.formats) for d in choices.space.decisions]
    share = generator.uniform(size=(n, 1))
    low = generator.uniform(size=(n, len(limits))) < share
    codes = np.stack([generator.integers(0, k, n) for k in limits], axis=1)
    return np.where(low, 2 * (codes // 2) % np.array(limits), codes)


def quality_of(choices, codes, *, error_db=0.0, seed=1):
    noise = picked(true_costs(choices), codes).sum(axis=1)
    return -10 * np.log10(noise / 100) + error_db * np.random.default_rng(seed).standard_normal(len(codes))


def planted_set(n=80, *, error_db=0.3, seed=0, formats="uaq3,uaq4,kmc3,kmc4"):
    choices = planted_choices(formats)
    candidates = candidates_of(choices)
    codes = random_codes(choices, n, seed)
    quality = quality_of(choices, codes, error_db=error_db, seed=seed + 1)
    return TrainingSet(
        features=graph_features(planted_graph(), choices, candidates),
        choices=choices,
        prior=choices.array(lambda d, f: candidates[d.name, f].error),
        codes=codes,
        quality=quality,
        target=quality - 2 * choices.paper_bits(codes),
    )
