"""The text that names a pipeline in every measurement: equal pipelines have one, different ones do not."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import EulerDiscreteScheduler

import sedimo
from sedimo.lab.measuring import setting_of


@pytest.fixture
def pipe(tiny_pipeline_folder):
    return sedimo.load(tiny_pipeline_folder)


def test_a_copy_elsewhere_is_the_same_pipeline(tiny_pipeline_folder, tmp_path):
    moved = tmp_path / "another name"
    shutil.copytree(tiny_pipeline_folder, moved)
    first, second = sedimo.load(tiny_pipeline_folder), sedimo.load(moved)
    assert first.name != second.name
    assert first.identity == second.identity
    plan = first.default_sampling([0], 1)
    assert setting_of(first, plan, weights_digest="w").key == setting_of(second, plan, weights_digest="w").key


def test_the_denoiser_has_no_part_in_it(pipe):
    before = pipe.identity
    with torch.no_grad():
        next(pipe.denoiser.parameters()).add_(1.0)
    assert pipe.identity == before


def test_another_network_is_another_pipeline(pipe):
    before = pipe.identity
    with torch.no_grad():
        pipe.pipeline.vae.decoder.conv_out.bias.add_(1e-3)
    assert pipe.identity != before


def test_another_scheduler_or_setting_is_another_pipeline(pipe):
    before = pipe.identity
    pipe.pipeline.scheduler.register_to_config(timestep_spacing="leading")
    assert pipe.identity != before
    pipe.pipeline.scheduler = EulerDiscreteScheduler()
    assert "EulerDiscreteScheduler" in pipe.identity


def test_settings_that_were_not_given_count_in_any_order(pipe):
    names = ["beta_end", "clip_sample", "timestep_spacing"]
    found = []
    for listed in (names, names[::-1], names[:2]):
        pipe.pipeline.scheduler.register_to_config(_use_default_values=listed)
        assert pipe.pipeline.scheduler.config["_use_default_values"] == listed
        found.append(pipe.identity)
    assert found[0] == found[1] != found[2]
