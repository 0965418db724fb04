"""What a pipeline is asked for when nobody says what to draw."""

import math

import pytest

from sedimo.errors import StateError
from sedimo.lab.seeds import SamplingSettings, Seeds
from sedimo.pipelines.conditions import PROMPTS

pytest_plugins = ["tiny_pipelines"]

OWN = {"prompts": ["a b", "x y z"], "guidance_scale": 3}


@pytest.fixture
def suit(text_to_image, monkeypatch):
    """Lets the text encoder's config name settings for a task."""

    def name(settings, task="text-to-image"):
        config = text_to_image.pipeline.text_encoder.config
        monkeypatch.setattr(config, "task_specific_params", {task: settings}, raising=False)
        return text_to_image

    return name


def test_prompts_and_guidance_of_the_text_encoder_are_the_default(suit):
    plan = suit(OWN).default_sampling(range(5), 3)
    assert (plan.conditions, plan.guidance) == (("a b", "x y z"), 3.0)
    assert suit(OWN).default_sampling(range(1), 3).conditions == ("a b",)


def test_what_is_ordered_comes_before_the_default(suit):
    pipe = suit(OWN)
    assert Seeds(SamplingSettings(), pipe.default_sampling).search.guidance == 3.0
    ordered = Seeds(SamplingSettings(conditions=("q",), guidance=0.0), pipe.default_sampling).search
    assert (ordered.conditions, ordered.guidance) == (("q",), 0.0)


@pytest.mark.parametrize("settings", [{}, {"prompts": []}, {"guidance_scale": None}])
def test_an_encoder_that_names_nothing_gets_plain_prompts(suit, settings):
    plan = suit(settings).default_sampling(range(99), 3)
    assert (plan.conditions, plan.guidance) == (PROMPTS, None)


def test_settings_for_other_tasks_do_not_count(suit):
    assert suit(OWN, task="summarization").default_sampling(range(99), 3).conditions == PROMPTS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": "a cat"}, "prompts as a list of texts, got 'a cat'"),
        ({"prompts": ["a cat", 3]}, "prompts as a list of texts"),
        ({"guidance_scale": "3"}, "guidance_scale as a number, got '3'"),
        ({"guidance_scale": math.inf}, "guidance_scale as a number, got inf"),
        ({"guidance_scale": True}, "guidance_scale as a number, got True"),
        (["a cat"], r"text-to-image as an object, got \['a cat'\]"),
    ],
)
def test_damaged_settings_are_refused(suit, settings, message):
    with pytest.raises(StateError, match=message):
        suit(settings).default_sampling(range(3), 3)
