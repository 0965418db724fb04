"""Fixtures of all tests: a tiny denoiser and its pipeline's folder, a random order, nothing left by an earlier test.

Libraries that take seconds to import are imported where they are used: the process that hands tests out to the
workers of pytest-xdist needs none of them.
"""

from __future__ import annotations

import portable  # noqa: F401  # first of all: sets what torch reads when it is imported

# isort: split
import functools
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from diffusers import DiTPipeline, DiTTransformer2DModel

# A slow or loaded machine is no failure, and where nobody looks the examples are the same each time.
settings.register_profile(
    "any machine",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
settings.load_profile("any machine")

# The networks are tiny: a second thread only waits for the first. SEDIMO_TEST_THREADS=2 shows that no test needs one.
N_THREADS = int(os.environ.get("SEDIMO_TEST_THREADS", "1"))

JOBS = ("end_to_end", "jobs", "api")  # folders whose tests do whole jobs
GRAPHS: dict[str, object] = {}  # of denoisers, by what they follow from


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "order of modules, and of tests in each: a seed (default: a new one), or 0 for the order they are written in"
    parser.addoption("--order-seed", type=int, default=None, help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Draws a seed, or takes the one that the other workers have."""
    options, given = config.option, getattr(config, "workerinput", {})
    if options.order_seed is None:
        options.order_seed = given.get("order_seed") or random.SystemRandom().randrange(1, 10**6)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """Tells a worker of pytest-xdist the seed."""
    node.workerinput["order_seed"] = node.config.option.order_seed


@pytest.hookimpl(tryfirst=True)  # before pytest brings together what shares a fixture with parameters
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seed = config.option.order_seed

    def place(name: str) -> float:
        return random.Random(f"{seed} {name}").random()

    if seed:
        items.sort(key=lambda item: (place(item.location[0]), place(item.nodeid)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.write_line(f"order: --order-seed {config.option.order_seed}; threads: {N_THREADS}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    _begin_anew()  # what fixtures of a module or a session see does not hang on who asks for them first


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Threads, seeds, switches of torch and variables are the same for each test, whatever ran before it.

    (numba has no thread count of ours: no kernel is parallel.)
    """
    variables = dict(os.environ)
    _begin_anew()
    yield
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)
    _begin_anew()


@pytest.fixture(autouse=True, scope="module")
def _graphs_read_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """The commands and verbs read the graph of one architecture once a session: to export it takes seconds.

    Reading itself is the subject of `tests/graph`, which calls it without this.
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name in JOBS or "sedimo.lab.bench" in sys.modules:
            from sedimo.lab import bench

            patch.setattr(bench, "trace_denoiser", functools.partial(_read_once, bench.trace_denoiser))
        yield


def _read_once(read, denoiser, *, example_inputs=None, capture=None):
    from sedimo.graph.layers import find_ties

    config = getattr(denoiser, "config", None)
    if config is None or example_inputs is not None:
        return read(denoiser, example_inputs=example_inputs, capture=capture)
    weights = [(name, type(p), p.shape, p.dtype) for name, p in denoiser.named_parameters()]
    key = repr((config, denoiser, weights, find_ties(denoiser), capture is None))
    if key not in GRAPHS:
        GRAPHS[key] = read(denoiser, capture=capture)
    return GRAPHS[key]


@pytest.fixture(autouse=True, scope="module")
def _sketched_charts(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where jobs are the subject, charts are filled with their numbers but not laid out and written as SVG.

    That takes half a second each, and `tests/reporting` looks at it.
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name in JOBS:
            from sedimo.reporting import drawing

            patch.setattr(drawing, "svg_of", _sketched)
        yield


def _sketched(_figure, chart):
    return f'<svg class="chart" id="{chart.name}-chart" role="img" aria-label="{chart.title}"></svg>'


def _begin_anew() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    random.seed(0)
    if "numpy" in sys.modules:
        import numpy as np

        np.random.seed(0)  # noqa: NPY002  # libraries may draw from it
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(N_THREADS)
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        torch.manual_seed(0)


def build_tiny_dit(seed: int = 0) -> DiTTransformer2DModel:
    """About 60 k parameters, two blocks, one tied timestep embedder, latents `[4, 8, 8]`, 10 classes."""
    import torch
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        norm_num_groups=8,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
    )
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # random weights that matter: the default ones barely change the output
    return model.eval().requires_grad_(False)


def build_tiny_pipeline(seed: int = 0) -> DiTPipeline:
    """A complete class-conditional latent pipeline around the tiny denoiser."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    denoiser = build_tiny_dit(seed)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    ).eval()
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")
    return DiTPipeline(denoiser, vae, scheduler, id2label={i: f"class{i}" for i in range(10)})


@pytest.fixture(scope="session")
def tiny_dit() -> DiTTransformer2DModel:
    """Shared by the whole session: deepcopy it before changing it."""
    return build_tiny_dit()


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline in float32; copy the folder before changing it."""
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    build_tiny_pipeline().save_pretrained(folder)
    return folder
