"""Streams of a U-Net's skips, from the search space to the checkpoint that diffusers loads."""

from __future__ import annotations

import json
import random

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

import sedimo
from running import run, run_json
from sedimo.bank import fit_bank
from sedimo.checkpoint.inputs import smoothed_layers
from sedimo.lab.bench import weights_of
from sedimo.lab.exchange import weight_changes
from sedimo.lab.lab import Lab
from sedimo.methods.error import error_table
from sedimo.methods.jacobian import jacobian_table, probe_jacobian
from sedimo.methods.orthogonality import orthogonality_table, probe_orthogonality
from sedimo.methods.predictor.features import Choices, graph_features, split_streams
from sedimo.methods.sqnr import probe_sqnr, sqnr_table
from sedimo.methods.taps import Changes, Taps
from sedimo.pipelines.trajectory import record
from sedimo.quant.formats import FP16, Format
from sedimo.space import Recipe
from sedimo.treatments.error_feedback import measure_moments
from tolerances import FLOAT32_NETWORK, FLOAT32_SAMPLING

FORMATS = "uaq3,kmc3,kma4,uaq4g64,fp16"
SKIP = "up_blocks.1.resnets.1.conv1"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A U-Net of 16 and 24 channels whose weights need float32."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 24),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    )
    place = tmp_path_factory.mktemp("unet") / "pipeline"
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def made(folder):
    """Pipeline, graph, space, and a bank fitted in full."""
    pipe = sedimo.load(folder)
    graph = sedimo.trace(pipe)
    space = sedimo.search_space(graph, FORMATS)
    return pipe, graph, space, sedimo.fit(pipe, space)


def drawn(space, seed):
    generator = random.Random(seed)
    return {d.name: generator.choice(d.formats) for d in space.decisions}


def test_dequantized_streams_are_their_slices_quantized_alone(made):
    pipe, _, space, bank = made
    choice = drawn(space, 1)
    packed = bank.quantize(space.recipe(choice))
    streams = [d for d in space.decisions if d.stream is not None]
    assert len(streams) == 16
    assert {d.layers[0].rpartition(".")[2] for d in streams} == {"conv1", "conv_shortcut"}
    for d in streams:
        if d.layers[0] not in packed:
            assert choice[d.name] == FP16
            continue
        piece = pipe.denoiser.get_parameter(f"{d.layers[0]}.weight")[:, d.stream.start : d.stream.stop].detach()
        alone = sedimo.quantize_weight(piece, choice[d.name]).dequantize() if choice[d.name].is_quantized else piece
        got = packed[d.layers[0]].dequantize()[:, d.stream.start : d.stream.stop]
        assert torch.equal(got, alone), d.name
        if choice[d.name].is_quantized:
            assert torch.equal(bank.quantized(d.name, choice[d.name]).dequantize(), alone)
            error = float((got - piece).double().square().sum() / piece.double().square().sum())
            assert bank.index[d.name, choice[d.name]].error == pytest.approx(error)


@pytest.mark.parametrize("seed", range(4))
def test_stored_bytes_of_streams_are_those_of_the_tensors(made, seed):
    pipe, _, space, bank = made
    choice = drawn(space, seed)
    recipe = space.recipe(choice)
    packed = bank.quantize(recipe)
    left = [w for w in space.weights if w.layers[0] not in packed]
    by_hand = sum(w.stored_bytes for w in packed.values())
    by_hand += sum(pipe.denoiser.get_parameter(f"{w.layers[0]}.weight").nbytes for w in left)
    assert by_hand == bank.stored_bytes(recipe) == sum(bank.index[key].stored_bytes for key in choice.items())
    assert sum(bank.index[key].paper_bytes for key in choice.items()) == space.paper_bytes(recipe)
    assert sum(w.paper_bytes for w in packed.values()) + sum(w.params * 2 for w in left) == space.paper_bytes(recipe)


def test_fits_of_streams_are_kept_and_whole_layers_can_be_had_too(made, tmp_path, monkeypatch):
    pipe, _, space, bank = made
    recipe = space.recipe(drawn(space, 2))
    weights = weights_of(pipe)
    first = fit_bank(weights, space, cache=tmp_path).quantize(recipe)
    monkeypatch.setattr("sedimo.bank.fit_parameters", None)  # a second fit would fail
    again = fit_bank(weights, space, cache=tmp_path)
    assert again.index == bank.index
    for layer, weight in again.quantize(recipe).items():
        assert torch.equal(weight.dequantize(), first[layer].dequantize())
    monkeypatch.undo()
    whole = again.quantize(Recipe({SKIP: Format("kma", 4)}))[SKIP]
    weight = pipe.denoiser.get_parameter(f"{SKIP}.weight").detach()
    assert torch.equal(whole.dequantize(), sedimo.quantize_weight(weight, "kma4").dequantize())


def test_first_order_noise_of_a_stream_is_that_of_its_slice_perturbed(made):
    """<G, dW>^2 by hooks against the derivative of <u, output> along the slice's change, sample by sample."""
    pipe, _, space, bank = made
    denoiser = pipe.denoiser
    call = record(pipe, pipe.default_sampling([0, 1], 2)).calls[1]
    chosen = [d for d in space.decisions if d.stream is not None]
    changes = {
        d.name: Changes(d.layers, weight_changes(bank, denoiser, d.name).flatten(2), stream=d.stream) for d in chosen
    }
    direction = torch.randn(call.output.shape, generator=torch.Generator().manual_seed(1))
    with Taps(denoiser, changes) as taps:
        taps.begin(call.output.device)
        products, _ = taps.products([denoiser(**call.inputs)[0]], [direction], n_samples=len(direction))
        found = {name: one.square() for name, one in products.items()}
    for d in chosen:
        name = f"{d.layers[0]}.weight"
        weight = denoiser.get_parameter(name).detach()
        for column, (_, change) in enumerate(bank.changes(d.name)):
            whole = torch.zeros_like(weight)
            whole[:, d.stream.start : d.stream.stop] = change
            for row in range(2):
                step = torch.zeros((), requires_grad=True)
                output = functional_call(denoiser, {name: weight + step * whole}, kwargs=dict(call.inputs))[0]
                (slope,) = torch.autograd.grad((output[row] * direction[row]).sum(), step)
                assert float(found[d.name][row, column]) == pytest.approx(float(slope) ** 2, rel=FLOAT32_SAMPLING)


def test_local_noise_of_a_stream_is_that_of_its_slice_replaced(made):
    pipe, _, space, bank = made
    sampling = pipe.default_sampling([0, 1, 2], 2)
    probe = probe_sqnr(Lab(pipe, bank), sampling)
    table = sqnr_table(space, bank.candidates, probe)
    assert table.streams == space.streams
    module, read = pipe.denoiser.get_submodule(SKIP), []
    handle = module.register_forward_hook(lambda _, args, output: read.append((args[0], output)))
    with torch.no_grad():
        for call in record(pipe, sampling).calls:
            pipe.denoiser(**call.inputs)
    handle.remove()
    for d in (d for d in space.decisions if d.layers == (SKIP,)):
        for number_format, change in bank.changes(d.name):
            whole = torch.zeros_like(module.weight)
            whole[:, d.stream.start : d.stream.stop] = change
            ratios = []
            for inputs, output in read:
                noise = torch.nn.functional.conv2d(inputs, whole, padding=1).flatten(1).double().square().sum(1)
                ratios.append((noise / output.flatten(1).double().square().sum(1)).mean())
            expected = float(torch.stack(ratios).mean().detach())
            assert table.index[d.name, number_format].cost == pytest.approx(expected, rel=FLOAT32_NETWORK)


def test_all_tables_of_single_decisions_have_costs_of_streams(made):
    pipe, graph, space, bank = made
    sampling = pipe.default_sampling([0, 1, 2, 3], 2)
    jacobian = probe_jacobian(Lab(pipe, bank), sampling, n_directions=1)
    layers = [layer for weight in space.weights for layer in weight.layers]
    repetition = probe_orthogonality(Lab(pipe), layers, sampling)
    theta = orthogonality_table(space, bank.candidates, repetition)
    tables = [jacobian_table(space, bank.candidates, jacobian), error_table(space, bank.candidates), theta]
    for table in tables:
        choice = sedimo.allocate(table, bits=4.0)
        assert choice.recipe == space.recipe(choice.choice)
        assert choice.used_bytes == space.paper_bytes(choice.recipe) <= 4.0 * space.params / 8
        assert choice.bops == space.bops(choice.recipe)
    assert {d.name for d in space.decisions if d.stream} <= jacobian.numbers.keys()
    one, uaq3 = sedimo.search_space(graph, "uaq3,fp16", streams=False), Format("uaq", 3)
    of_whole = orthogonality_table(one, sedimo.fit(pipe, one).candidates, repetition)
    split = sum(theta.index[f"{SKIP}[{part}]", uaq3].cost for part in ("0:16", "16:32"))
    whole_cost = of_whole.index[SKIP, uaq3].cost  # of one family alone: without the bits that uaq wastes against kmc
    assert whole_cost <= split <= whole_cost * 14 / 13
    features = graph_features(split_streams(graph, space), Choices(space), bank.index)
    assert (features.decision >= 0).sum() == len(space.decisions)


def test_a_checkpoint_of_streams_loads_in_diffusers_bit_for_bit(made, folder, tmp_path):
    _, _, space, bank = made
    recipe = space.recipe(drawn(space, 3))
    pipe = sedimo.load(folder)
    sedimo.replace(pipe, recipe, bank=bank)
    pipe.save_pretrained(tmp_path / "out")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out").unet
    packed = bank.quantize(recipe)
    assert packed
    assert any(len(w.parts) == 2 for w in packed.values())
    for layer, weight in packed.items():
        got = loaded.get_parameter(f"{layer}.weight")
        assert got.formats == weight.formats
        assert torch.equal(got.dequantize(), weight.dequantize())
    config = json.loads((tmp_path / "out/unet/config.json").read_text())["quantization_config"]["layers"]
    split = [layer for layer, entry in recipe.layers.items() if not isinstance(entry, Format)]
    assert split
    assert all(
        [(p["start"], p["stop"], p["format"]) for p in config[layer]["parts"]]
        == [(p.start, p.stop, str(p.format)) for p in recipe.layers[layer]]
        for layer in split
    )


def test_the_job_writes_shows_and_repeats_streams(folder, tmp_path):
    sampling = ("--seeds", 2, "--steps", 2, "--formats", "uaq3,kmc3,kmc5,fp16")
    out, again = tmp_path / "out", tmp_path / "again"
    run("quantize", folder, "--bits", 4.2, "--method", "error", *sampling, "--no-check", "-o", out)
    layers = {layer["name"]: layer["format"] for layer in run_json("inspect", out)["layers"]}
    split = [name for name, text in layers.items() if "|" in text]
    assert split
    assert all(text.startswith("0..") for name, text in layers.items() if name in split)
    run("quantize", folder, "--recipe", out / "sedimo_recipe.json", "--no-check", "-o", again)
    assert run_json("diff", out, again) == {"differences": []}
    first, second = load_file(out / WEIGHTS), load_file(again / WEIGHTS)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)
    name = split[0]
    refused = run("change", out, f"{name}[0:24]=uaq6", "--source", folder, "-o", tmp_path / "no", code=3).stderr
    assert f"give {name}=uaq6" in " ".join(refused.split())
    run("change", out, f"{name}=uaq6", "--source", folder, "-o", tmp_path / "changed")
    (difference,) = run_json("diff", out, tmp_path / "changed")["differences"]
    assert (difference["layer"], difference["first"], difference["second"]) == (name, layers[name], "uaq6")


def test_layers_stay_whole_where_that_is_asked_for_or_inputs_are_rounded(folder, tmp_path):
    order = ("quantize", folder, "--bits", 4.2, "--method", "error", "--seeds", 2, "--steps", 2, "--no-check")
    for name, options in {
        "whole": ("--formats", "uaq3,kmc3,kmc5,fp16", "--whole-layers"),
        "rounded": ("--formats", "uaq3,uaq4,uaq5", "--act", "a8"),
    }.items():
        run(*order, *options, "-o", tmp_path / name)
        assert not any("|" in layer["format"] for layer in run_json("inspect", tmp_path / name)["layers"])
    run("quantize", folder, "--method", "uniform:kmc4", "--no-check", "-o", tmp_path / "uniform")
    formats = {layer["format"] for layer in run_json("inspect", tmp_path / "uniform")["layers"]}
    assert formats <= {"kmc4", "fp16"}


def test_convolutions_are_smoothed_and_then_learned(folder, tmp_path):
    """While rounding is learned, weights are no parameters of their layers."""
    order = ("--method", "uniform:uaq3", "--smooth", "0.7", "--smooth-share", "1", "--reconstruct")
    out, quick = tmp_path / "out", ("--reconstruct-steps", "2", "--seeds", "2", "--steps", "2", "--no-check")
    found = run_json("quantize", folder, *order, *quick, "-o", out)
    layers = found["smoothing"]["layers"]
    modules = dict(sedimo.load(folder).denoiser.named_modules())
    assert any(how == "divided" for name, how in layers.items() if isinstance(modules[name], nn.Conv2d))
    assert found["reconstruction"]["blocks"]
    assert smoothed_layers(DDIMPipeline.from_pretrained(out).unet) == layers


def test_streams_are_compensated_by_the_moments_of_their_own_inputs(made, tmp_path):
    """What probes are told of a stream is what the packed layer has there, and it disturbs the layer less."""
    pipe, _, space, bank = made
    plan = pipe.default_sampling(range(3), 2)
    moments = measure_moments(Lab(pipe, bank), plan, tmp_path)
    ours = bank.compensating(moments)
    choice = drawn(space, 5)
    packed = ours.quantize(space.recipe(choice))
    streams = [d for d in space.decisions if d.stream is not None and choice[d.name].is_quantized]
    assert len(streams) > 8
    for d in streams:
        piece = slice(d.stream.start, d.stream.stop)
        exact = bank.weights.read(d.layers[0])[:, piece]
        found = packed[d.layers[0]].dequantize()[:, piece] - exact
        assert torch.equal(found, dict(ours.changes(d.name))[choice[d.name]])
        (block,) = moments.blocks(d.layers[0])
        width = exact[0, 0].numel()
        own = block[piece.start * width : piece.stop * width, piece.start * width : piece.stop * width]
        rows, nearest = (c.reshape(len(c), -1) for c in (found, dict(bank.changes(d.name))[choice[d.name]]))
        assert ((rows @ own) * rows).sum() < ((nearest @ own) * nearest).sum()
