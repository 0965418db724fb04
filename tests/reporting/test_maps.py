"""Maps: numbers against the probes they come from, and charts that say in words and tables what they show."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from map_examples import channel_ranges, noise_map, repetition, trajectory_lines
from report_examples import dit_layers, dit_summary, estimate, make_table
from test_html import HARM, read, render

from sedimo.codec import from_json, to_json
from sedimo.errors import InputError
from sedimo.lab.study import Setting
from sedimo.methods.hybrid import BlockCurves, BlockRow
from sedimo.methods.orthogonality import DEFAULT_IMPORTANCE, OrthogonalityPart, OrthogonalityProbe, importance
from sedimo.methods.sqnr import LocalNoise, SqnrPart, SqnrProbe
from sedimo.quant.formats import FP16, Format
from sedimo.reporting import html
from sedimo.reporting.drawing import draw
from sedimo.reporting.html import MAX_BYTES
from sedimo.reporting.measured_maps import (
    ChannelRanges,
    Maps,
    blocks_page,
    convergence_figure,
    importance_figure,
    layers_axis,
    local_map,
    maps_section,
    matrix_figure,
    merged,
    noise_figure,
    ranges_figure,
    steps_axis,
    trajectory_figure,
)
from sedimo.reporting.measured_maps import repetition as repetition_of
from sedimo.reporting.page import Figure
from sedimo.reporting.theme import PLACEHOLDER

SETTING = Setting("w", "p", "step", tuple(range(8)), 2, (), None, None, "float32", "cpu")
TABLE = make_table(list(dit_layers(2)), 1)
KMC3, KMC4 = Format.parse("kmc3"), Format.parse("kmc4")
THREE_DIGITS = 5e-4  # half of the last one: the page keeps three of numbers below one


def sqnr_probe(skipped="proj_out_1"):
    """Noise of a decision: its place, a tenth for the fourth bit, doubled at the second call."""
    parts = []
    for step in (1, 2):
        noise = {
            name: {f"kmc{b}": LocalNoise(step * (i + 1) * 10.0 ** (-b), 10.0 ** (-b - 1)) for b in (3, 4)}
            for i, name in enumerate(TABLE.layers)
            if name != skipped
        }
        parts.append(SqnrPart(1000.0 / step, noise))
    return SqnrProbe(SETTING, tuple(parts))


def test_local_noise_of_a_block_is_the_mean_power_of_its_layers():
    formats = {name: KMC3 if i % 2 else KMC4 for i, name in enumerate(TABLE.layers)}
    found = local_map(sqnr_probe(), TABLE, formats)
    assert found.blocks == ("pos_embed.proj", "transformer_blocks.0", "transformer_blocks.1", "proj_out_2")
    assert (found.timesteps, found.n, found.number_format) == ((1000.0, 500.0), 8, "")
    for block, values, errors in zip(found.blocks, found.sqnr_db, found.standard_error, strict=True):
        members = [i for i, name in enumerate(TABLE.layers) if (TABLE.blocks[name] or name) == block]
        for step in (1, 2):
            power = np.mean([step * (i + 1) * 10.0 ** -(3 if i % 2 else 4) for i in members])
            error = np.mean([10.0 ** -(4 if i % 2 else 5) for i in members])
            assert values[step - 1] == pytest.approx(-10 * math.log10(power))
            assert errors[step - 1] == pytest.approx(10 / math.log(10) * error / power)


def test_what_is_not_quantized_is_exact_and_what_cannot_take_a_format_is_left_out():
    kept = {name: FP16 if TABLE.blocks[name] else KMC3 for name in TABLE.layers if name != "proj_out_2"}
    found = local_map(sqnr_probe(), TABLE, kept, number_format="kmc3")
    assert found.blocks == ("pos_embed.proj", "transformer_blocks.0", "transformer_blocks.1")
    assert set(found.sqnr_db[1]) == set(found.sqnr_db[2]) == {math.inf}
    assert set(found.standard_error[1]) == {0.0}
    assert math.isfinite(found.sqnr_db[0][0])


def test_local_noise_has_that_of_rounded_inputs_too():
    noise = {"kmc4": LocalNoise(0.003, 0.0003), "a8": LocalNoise(0.001, 0.0004)}
    parts = tuple(SqnrPart(t, dict.fromkeys(TABLE.layers, noise)) for t in (1000.0, 500.0))
    probe = SqnrProbe(SETTING, parts)
    for text, power, error in (("kmc4a8", 0.004, 0.0005), ("fp16a8", 0.001, 0.0004), ("kmc4", 0.003, 0.0003)):
        found = local_map(probe, TABLE, dict.fromkeys(TABLE.layers, Format.parse(text)))
        assert np.array(found.sqnr_db) == pytest.approx(-10 * math.log10(power))
        assert np.array(found.standard_error) == pytest.approx(10 / math.log(10) * error / power)


def test_repetition_keeps_the_matrices_and_the_bits_of_each_layer():
    layers = tuple(layer for names in TABLE.layers.values() for layer in names)
    rng, n = np.random.default_rng(0), len(layers)
    parts = tuple(
        OrthogonalityPart(
            t,
            tuple(rng.uniform(0.1, 0.9, n * (n - 1) // 2).tolist()),
            tuple(tuple(rng.uniform(3, 9, n).tolist()) for _ in range(4)),
            (layers[0],),
        )
        for t in (900.0, 500.0, 100.0)
    )
    probe = OrthogonalityProbe(SETTING, layers, parts)
    choice = {name: FP16 if "proj_out" in name else KMC3 for name in TABLE.layers}
    found = repetition_of(probe, TABLE, choice, DEFAULT_IMPORTANCE)
    for name, matrix in (("mean", probe.matrices.mean(0)), ("first", probe.matrices[0]), ("last", probe.matrices[2])):
        assert found.matrix(name) == pytest.approx(matrix, abs=THREE_DIGITS)
    assert found.bits == tuple(16 if "proj_out" in layer else 3 for layer in layers)
    assert found.theta == tuple(importance(probe))
    assert np.array(found.per_step).shape == (3, n)
    assert np.isnan(np.array(found.per_step)[:, 0]).all()
    assert len(found.converged) == 3
    assert found.converged[-1] == pytest.approx(1)


@pytest.mark.parametrize("n_channels", [1, 5, 320, 321, 5000])
def test_merged_channels_lose_no_extreme_value(n_channels):
    rng = np.random.default_rng(n_channels)
    low, high = -rng.exponential(1, n_channels), rng.exponential(1, n_channels)
    first, count, lows, highs = merged(low, high, 320)
    assert len(first) == min(n_channels, 320)
    assert count.sum() == n_channels
    for begin, size, least, greatest in zip(first.astype(int), count.astype(int), lows, highs, strict=True):
        assert (least, greatest) == (low[begin : begin + size].min(), high[begin : begin + size].max())


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (((), (), (), ()), "one value per channel"),
        (((0.0,), (1.0, 2.0), (0.0,), (1.0,)), "one value per channel"),
        (((0.0,), (1.0,), (0.5,), (0.25,)), "got 0.5 to 0.25 in channel 0"),
        (((0.0,), (math.nan,), (0.0,), (1.0,)), "got 0.0 to nan"),
    ],
)
def test_ranges_that_are_none_are_refused(ranges, message):
    with pytest.raises(InputError, match=message):
        ChannelRanges("x", *ranges)


def test_charts_say_in_words_what_they_show():
    chart = draw(noise_figure(noise_map()))
    assert (
        'role="img" aria-label="SQNR of the recipe by block and step. 28 blocks at 50 denoiser calls. Least ' in chart
    )
    assert "At the last of 50 steps: output, same inputs" in trajectory_figure(trajectory_lines()).description
    found = repetition()
    assert "Most alike are" in matrix_figure(found, "mean").description
    assert "300 layers. Most and least important:" in importance_figure(found).description
    assert "1: 0.500; 2: 0.700" in convergence_figure(found).description
    text = ranges_figure(ChannelRanges("ff", (-1, -1, -8), (1, 1, 2), (-1, -1, -2), (1, 1, 1))).description
    assert "3 channels; before largest 8.00, median channel 1.00, ratio 8.00; after largest 2.00" in text


def test_a_single_pixel_stands_for_a_cell():
    """However many cells a map has, the page stays small."""
    assert len(draw(noise_figure(noise_map(100, 200)))) < 120_000


def test_nothing_finite_is_no_chart():
    endless = replace(noise_map(2, 2), sqnr_db=((math.inf, math.inf), (-math.inf, math.nan)))
    assert noise_figure(endless) is None
    exact = estimate(math.inf, 0.0, 8)
    lines = trajectory_lines(2)
    assert trajectory_figure(replace(lines, step=(exact,) * 2, path=(exact,) * 2, latents=(exact,) * 2)) is None
    one = repetition(2, 1)
    assert convergence_figure(one) is None
    assert maps_section(Maps()) is None
    assert len(maps_section(Maps(repetition=one)).blocks) == 3  # matrix, importance, where the numbers are
    unknown = replace(one, per_step=((math.nan,) * len(one.layers),))
    assert "<svg" in draw(importance_figure(unknown))


@pytest.mark.parametrize(("n_steps", "ticks"), [(3, [0, 1, 2]), (20, [0, *range(3, 20, 2)])])
def test_steps_are_labelled_at_even_distances(n_steps, ticks):
    assert steps_axis([math.nan] * n_steps).ticks == tuple((i, str(i + 1)) for i in ticks)


@pytest.fixture(scope="module")
def whole():
    local = noise_map(8, 10), noise_map(8, 10, "kmc4")
    return Maps(noise_map(), trajectory_lines(), local, repetition(), (channel_ranges(),))


def test_a_page_of_a_large_denoiser_has_all_of_it(whole):
    summary = dit_summary()
    page = render(replace(summary, evidence=replace(summary.evidence, maps=whole)))
    reader = read(page)
    assert len(reader.ids) == len(set(reader.ids))
    assert all(link.startswith(("#", "data:image/")) for link in reader.links)
    assert not any(colour in page.lower() for colour in PLACEHOLDER.values())
    assert len(page.encode()) < MAX_BYTES / 2
    headings = re.findall(r"<h3>(.*?)</h3>", page[page.index('id="steps"') : page.index('id="cost"')])
    assert headings == [
        "Noise block by block",
        "Along the trajectory",
        "Noise at the layers&#39; own outputs, at the formats of this recipe",
        "Noise at the layers&#39; own outputs, all at <code>kmc4</code>",
        "What repeats what",
        "The first timestep alone",
        "The last timestep alone",
        "Importance, and the bits it led to",
        "Enough timesteps?",
        "Activation ranges of <code>transformer_blocks.3.ff.net.2</code>",
    ]
    assert ">exact</td>" in page
    assert 'href="#steps"' in page
    assert 'id="steps"' not in render(summary)


def captions(found):
    return [one.caption for one in maps_section(Maps(repetition=found)).blocks if isinstance(one, Figure)]


def test_from_where_on_timesteps_suffice():
    found = replace(repetition(2, 5), converged=(0.9, 0.995, 0.98, 0.995, 1.0))
    assert any("From 4 on, the rank correlation is at least 0.99." in text for text in captions(found))


def test_where_no_fewer_timesteps_suffice():
    found = replace(repetition(2, 3), converged=(0.9, 0.98, 1.0))
    assert "No fewer than all 3 keep the rank correlation at 0.99 or above." in captions(found)[-1]


def test_layers_that_do_not_tell_samples_apart_are_explained():
    one = repetition(2, 3)  # its first layer does not
    rows = [(math.nan, math.nan, *row[2:]) for row in one.per_step]
    none = [(0.5, *row[1:]) for row in one.per_step]
    texts = [captions(replace(one, per_step=tuple(r)))[0] for r in (one.per_step, rows, none)]
    assert ["The dark line is" in texts[0], "Dark lines are the 2 layers" in texts[1], "ark line" in texts[2]] == [
        *(True, True, False)
    ]


@pytest.mark.parametrize("n_most", [10, 45])
def test_labels_of_many_layers_stand_apart_and_name_outermost_blocks(n_most):
    """In a U-Net, blocks of a few layers follow each other, and one kind of them goes on after another."""
    inside = ["resnets.0"] * 3 + ["attentions.0"] + ["attentions.0.transformer_blocks.0"] * 10 + ["attentions.0"]
    names = [
        f"{stage}.{part}" for stage in ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0") for part in inside
    ]
    blocks = ("", *names, "up_blocks.0", "")
    found = replace(repetition(2, 2), layers=tuple(f"layer {i}" for i in range(len(blocks))), blocks=blocks)
    labels = ((1, "down 0"), (16, "down 1"), (31, "mid"), (46, "up 0"))
    assert layers_axis(found, n_most=n_most).ticks == labels
    assert layers_axis(found, n_most=3).ticks == labels[::2]


def test_maps_survive_being_saved(whole):
    text = to_json(whole)
    assert to_json(from_json(Maps, text)) == text


def test_names_stay_text(whole):
    ranges = (ChannelRanges(HARM, (0.0,), (1.0,), (0.0,), (1.0,)),)
    evil = Maps(replace(noise_map(2, 2), blocks=(HARM, "b")), None, (), None, ranges)
    summary = dit_summary()
    page = render(replace(summary, evidence=replace(summary.evidence, maps=evil)))
    assert read(page).tags["script"] == 0
    assert "<script" not in page


def render_blocks(curves):
    return html.render(blocks_page(curves))


def block_page(gains, *, kept=()):
    rows = tuple(
        BlockRow(name, (name,), 10, 5, estimate(20.0 - i, 0.5, 16), estimate(gain, 0.1, 16))
        for i, (name, gain) in enumerate(gains.items())
    )
    hybrid = (estimate(21.0, 0.4, 16), estimate(3.0, 0.2, 16)) if kept else (None, None)
    everything = rows[-1].up_to
    return BlockCurves(
        "zoo:x", Format.parse("uaq4"), "path", "0 to 7", 10, "rank", 0.5, rows, everything, kept, 5.0, *hybrid
    )


def test_the_page_of_blocks_tells_which_to_keep():
    page = render_blocks(block_page({"conv_in": 0.1, "blocks.0": 2.5, "blocks.1": 1.0}, kept=("blocks.0",)))
    read(page)
    assert "leaving <code>blocks.0</code> alone at 16 bits gains most, 2.50 ± 0.21" in page
    assert "threshold: 0.5 dB" in page
    assert "stays at 16 bits: 5.00 bits per weight" in page.replace(", which makes ", ": ")
    assert page.count('class="this"') == 1


def test_the_page_of_blocks_claims_nothing_that_is_not_shown():
    page = render_blocks(block_page({"conv_in": 0.1, "blocks.0": -0.1}))
    assert "no single block is shown to gain" in page
    assert "Chosen by" not in page


def test_blocks_that_diverge_have_a_page_too():
    gone = estimate(-math.inf, math.nan, 16)
    exact, nothing = estimate(math.inf, 0.0, 16), estimate(0.0, 0.0, 16)
    silent = replace(block_page({"a": 1.0}), rows=(BlockRow("a", ("a",), 1, 1, exact, nothing),), everything=exact)
    assert "<svg" not in render_blocks(silent)
    rows = (BlockRow("a", ("a",), 1, 1, gone, estimate(math.nan, math.nan, 16)),)
    page = render_blocks(replace(block_page({"a": 1.0}), rows=rows, everything=gone))
    assert "<svg" not in page
