"""Fixtures of the tests of checkpoints: packed denoisers in memory and on disk."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline, DiTTransformer2DModel

from packed_weights import OWNER, TIED, random_weights
from sedimo.checkpoint.weights import replace_weights


@pytest.fixture
def packed_dit(tiny_dit: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """The tiny denoiser with every layer packed in some format and one weight shared by two layers."""
    denoiser = copy.deepcopy(tiny_dit)
    replace_weights(denoiser, random_weights(denoiser, ties={TIED: OWNER}))
    return denoiser


@pytest.fixture(scope="session")
def _packed_pipeline_folder(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe = DiffusionPipeline.from_pretrained(tiny_pipeline_folder)
    pipe.set_progress_bar_config(disable=True)
    replace_weights(pipe.transformer, random_weights(pipe.transformer, ties={TIED: OWNER}))
    folder = tmp_path_factory.mktemp("packed") / "pipeline"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def packed_pipeline_folder(_packed_pipeline_folder: Path) -> Path:
    """A saved pipeline with a packed denoiser; read only."""
    return _packed_pipeline_folder


@pytest.fixture
def packed_folder(packed_dit: DiTTransformer2DModel, tmp_path: Path) -> Path:
    """A saved packed denoiser of the test's own."""
    packed_dit.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"
