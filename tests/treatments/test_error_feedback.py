"""Second moments of inputs: what a change of a weight does to a layer's output, in one matrix."""

from __future__ import annotations

import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sedimo.bank import Bank, fit_bank
from sedimo.errors import InputError, Interrupted, StateError
from sedimo.lab.exchange import hooked, linear_part
from sedimo.lab.lab import Lab
from sedimo.pipelines.adapter import Sampling
from sedimo.quant.formats import Format
from sedimo.treatments import error_feedback as module
from sedimo.treatments.error_feedback import ErrorFeedback, block_columns, measure_moments
from tolerances import FLOAT32_FORMULA
from toy_pipeline import ToyAdapter, ToyDenoiser, ToyWeights, toy_space

PLAN = Sampling(seeds=(1, 2, 3), n_steps=3, batch_size=2)


def measured(adapter, folder, plan=PLAN) -> ErrorFeedback:
    bank = Bank(ToyWeights(adapter.denoiser), toy_space(adapter.denoiser), ())
    return measure_moments(Lab(adapter, bank), plan, folder)


def inputs_of(adapter, layers, plan=PLAN) -> dict[str, list[torch.Tensor]]:
    found = {layer: [] for layer in layers}
    hooks = {layer: lambda _m, args, _o, layer=layer: found[layer].append(args[0].clone()) for layer in layers}
    with hooked(adapter.denoiser, hooks):
        adapter.sample(plan)
    return found


def power_of_change(layer, change, inputs) -> float:
    """Squared norm of what a changed weight adds to the output, over all inputs: the layer's own forward pass."""
    return sum(float(linear_part(layer, x, change).double().square().sum()) for x in inputs)


@pytest.mark.parametrize("guided", [False, True])
def test_they_predict_the_power_of_any_change(guided, tmp_path):
    adapter = ToyAdapter(guided=guided)
    found = measured(adapter, tmp_path)
    generator = torch.Generator().manual_seed(0)
    users = {"conv_in": ["conv_in"], "time": ["time"], "twice": ["twice"], "out": ["out"], "first": ["first", "second"]}
    for weight, layers in users.items():
        (block,) = found.blocks(weight)
        change = torch.randn(adapter.denoiser.get_submodule(weight).weight.shape, generator=generator)
        seen = inputs_of(adapter, layers)
        wanted = sum(power_of_change(adapter.denoiser.get_submodule(name), change, seen[name]) for name in layers)
        rows = change.reshape(len(change), -1)
        assert float(((rows @ block) * rows).sum()) == pytest.approx(wanted, rel=FLOAT32_FORMULA)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 8, 3, padding=2, stride=2, dilation=2),
        nn.Conv2d(2, 8, (3, 2), padding="same", padding_mode="reflect"),
        nn.Conv2d(2, 8, 4, stride=3, padding=(1, 2), padding_mode="replicate"),
    ],
    ids=["strided", "reflected", "uneven"],
)
def test_convolutions_of_any_form(layer):
    inputs = torch.randn(3, 2, 9, 11)
    change = torch.randn_like(layer.weight)
    rows = torch.cat(list(module._rows(layer, inputs, "once")))
    wanted = power_of_change(layer, change, [inputs])
    assert float((rows @ change.reshape(8, -1).T).square().sum()) == pytest.approx(wanted, rel=FLOAT32_FORMULA)


def test_sequences_of_a_convolution():
    layer, inputs = nn.Conv1d(4, 6, 3, padding=1, stride=2, dilation=2), torch.randn(2, 4, 17)
    rows = torch.cat(list(module._rows(layer, inputs, "once")))
    wanted = power_of_change(layer, layer.weight.detach(), [inputs])
    assert float((rows @ layer.weight.detach().reshape(6, -1).T).square().sum()) == pytest.approx(
        wanted, rel=FLOAT32_FORMULA
    )


def test_of_many_positions_some_are_drawn_at_each_call_and_in_time_all(monkeypatch):
    """However many layers there are, and however often each is called."""
    monkeypatch.setattr(module, "MOST_POSITIONS", 4)
    layers = nn.ModuleDict({f"layer{i}": nn.Linear(1, 1) for i in range(8)})
    sums, seen = module._Sums(10), {name: set() for name in layers}
    for _ in range(40):
        for name, layer in layers.items():
            inputs = 2.0 ** torch.arange(12).reshape(1, 12, 1)
            sums.blocks.clear()
            sums.add(name, name, layer, (inputs,), None)
            added = int(sums.blocks[f"{name}.0"].item())
            drawn = {i for i in range(12) if added >> (2 * i) & 1}
            assert len(drawn) == 4
            seen[name] |= drawn
    assert all(positions == set(range(12)) for positions in seen.values())


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_drawn_pixels_are_those_of_the_convolution(padding_mode, monkeypatch):
    monkeypatch.setattr(module, "MOST_POSITIONS", 7)
    layer = nn.Conv2d(3, 5, 3, padding=1, stride=2, padding_mode=padding_mode, bias=False)
    inputs = torch.randn(2, 3, 9, 11)
    outputs = layer(inputs).detach().flatten(2).movedim(1, 2)  # B positions out
    for image, rows in zip(outputs, module._rows(layer, inputs, "a call"), strict=True):
        made = rows @ layer.weight.detach().reshape(5, -1).T
        assert len(made) == 7
        distance = (made[:, None] - image).abs().amax(-1)
        assert (distance.amin(1) < 1e-4).all()
        assert len(set(distance.argmin(1).tolist())) == 7


def test_images_are_taken_one_by_one():
    """Unfolded they are nine times as large: what is handed on holds one image's pixels and nothing else."""
    layer, inputs = nn.Conv2d(8, 4, 3, padding=1), torch.randn(3, 8, 32, 32)
    for rows in module._rows(layer, inputs, "a call"):
        assert rows.untyped_storage().nbytes() <= 4 * module.MOST_POSITIONS * 72


def test_half_precision_is_summed_in_float32():
    layer = nn.Linear(4, 2)
    (rows,) = module._rows(layer, torch.full((1, 3, 4), 300.0, dtype=torch.float16), "a call")
    assert rows.dtype == torch.float32


def test_layers_without_such_a_form_or_never_called_have_none(tmp_path):
    found = measured(ToyAdapter(), tmp_path)
    assert not found.blocks("grouped")
    assert not found.blocks("unused")
    assert not found.blocks("of another model")


def test_they_are_measured_once(tmp_path):
    adapter = ToyAdapter()
    first = measured(adapter, tmp_path)
    n_calls = adapter.n_calls
    second = measured(adapter, tmp_path)
    assert adapter.n_calls == n_calls
    assert second.key == first.key
    other = measured(adapter, tmp_path, Sampling(seeds=(4,), n_steps=3))
    assert other.key != first.key
    assert adapter.n_calls > n_calls


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:20]), lambda path: path.unlink()])
def test_a_damaged_or_missing_file_is_named(damage, tmp_path):
    """Else codes would silently be the nearest ones, under the same name."""
    found = measured(ToyAdapter(), tmp_path)
    damage(found.path)
    with pytest.raises(StateError, match=r"moments-.* is damaged or gone.*Delete it to measure"):
        found.blocks("time")


def test_what_a_killed_run_left_behind_is_no_obstacle(tmp_path, monkeypatch):
    first = measured(ToyAdapter(), tmp_path / "a")
    (tmp_path / "b").mkdir()
    for suffix in (".0.tmp", ".begun.0.tmp"):
        (tmp_path / "b" / first.path.name).with_suffix(suffix).write_bytes(b"half of it")
    found = measured(ToyAdapter(), tmp_path / "b")
    assert found.blocks("time")
    assert list((tmp_path / "b").iterdir()) == [found.path]

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(StateError, match=r"cannot be kept in .*No space left on device.*Make room"):
        measured(ToyAdapter(), tmp_path / "c")
    assert not list((tmp_path / "c").iterdir())


class KilledError(Exception):
    """The end of a process."""


@pytest.mark.parametrize("way", ["killed", "stopped", "stopped late"])
def test_a_run_that_was_stopped_goes_on_and_ends_bit_exactly_the_same(way, tmp_path, monkeypatch):
    """Which positions are drawn follows from how often a layer was called: that goes on, too."""
    monkeypatch.setattr(module, "MOST_POSITIONS", 5)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_SAVES", 0.0 if way == "killed" else 1e9)
    plan = Sampling(seeds=(1, 2, 3, 4, 5, 6), n_steps=3, batch_size=2)
    whole = measured(ToyAdapter(), tmp_path / "whole", plan)
    adapter = ToyAdapter()

    def stop():
        if adapter.n_calls == 4 and way == "killed":  # in the second batch of three
            raise KilledError
        if adapter.n_calls == (4 if way == "stopped" else 8) and way != "killed":
            signal.raise_signal(signal.SIGINT)

    adapter.before_call = stop
    with pytest.raises(KilledError if way == "killed" else Interrupted, match=None if way == "killed" else "to go on"):
        measured(adapter, tmp_path / "cut", plan)
    adapter.n_calls, adapter.before_call = 0, lambda: None
    cut = measured(adapter, tmp_path / "cut", plan)
    assert adapter.n_calls == {"killed": 6, "stopped": 3, "stopped late": 0}[way]
    assert cut.key == whole.key
    assert list((tmp_path / "cut").iterdir()) == [cut.path]
    sums, others = (load_file(one.path) for one in (whole, cut))
    assert sums.keys() == others.keys()
    assert all(torch.equal(sums[name], others[name]) for name in sums)


def test_unfinished_sums_that_cannot_be_read_or_kept(tmp_path, monkeypatch):
    """What is damaged is measured again; what cannot be kept ends the work."""
    first = measured(ToyAdapter(), tmp_path / "a")
    begun = (tmp_path / "b" / first.path.name).with_suffix(".begun.safetensors")
    begun.parent.mkdir()
    begun.write_bytes(b"no sums")
    assert torch.equal(measured(ToyAdapter(), tmp_path / "b").blocks("time")[0], first.blocks("time")[0])
    assert not begun.exists()
    monkeypatch.setattr(module, "SECONDS_BETWEEN_SAVES", 0.0)

    def full(_tensors, path, **_options):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(StateError, match=r"cannot be kept in .*begun.*Make room"):
        measured(ToyAdapter(), tmp_path / "c")
    assert not list((tmp_path / "c").iterdir())


def test_inputs_that_overflow_are_named_and_nothing_is_kept(tmp_path):
    denoiser = ToyDenoiser()
    with torch.no_grad():
        denoiser.first.bias.fill_(torch.nan)
    with pytest.raises(InputError, match="inputs of layer 'second' hold NaN, infinity or numbers too large"):
        measured(ToyAdapter(denoiser), tmp_path)
    assert not list(tmp_path.iterdir())


def test_wide_layers_have_blocks_on_the_diagonal(tmp_path, monkeypatch):
    adapter = ToyAdapter()
    whole = measured(adapter, tmp_path / "whole")
    monkeypatch.setattr(module, "MOST_COLUMNS", 10)
    monkeypatch.setattr(module, "LEAST_COLUMNS", 10)
    cut = measured(adapter, tmp_path / "cut")
    assert [len(block) for block in cut.blocks("time")] == [10, 10, 10, 2]
    torch.testing.assert_close(cut.blocks("time")[1], whole.blocks("time")[0][10:20, 10:20])


def test_blocks_narrow_until_all_fit():
    assert block_columns([512] * 10) == module.MOST_COLUMNS
    widths = [3072] * 800 + [12288] * 100
    width = block_columns(widths)
    assert width == module.LEAST_COLUMNS  # these many are more than the bytes even so
    some = widths[:700]
    width = block_columns(some)
    assert module.LEAST_COLUMNS <= width < module.MOST_COLUMNS
    assert module.moments_bytes(some, width) == sum(4 * n * min(n, width) for n in some)
    assert module.moments_bytes(some, 2 * width) > module.MOST_BYTES


def test_a_bank_compensates_by_them_and_says_so(tmp_path):
    """Changes that probes look at are those of the packed weights, which disturb the output less."""
    adapter = ToyAdapter()
    plain = fit_bank(ToyWeights(adapter.denoiser), toy_space(adapter.denoiser))
    moments = measured(adapter, tmp_path)
    bank = plain.compensating(moments)
    assert bank.digest != plain.digest
    assert bank.rounding(bank.activations).moments is moments
    uaq3 = Format.parse("uaq3")
    for weight in ("conv_in", "time", "twice", "first"):
        change = dict(bank.changes(weight))[uaq3]
        exact = bank.weights.read(weight)
        assert torch.equal(change, bank.quantized(weight, uaq3).dequantize() - exact)
        rows, nearest = (c.reshape(len(c), -1) for c in (change, dict(plain.changes(weight))[uaq3]))
        (block,) = moments.blocks(weight)
        assert float(((rows @ block) * rows).sum()) < float(((nearest @ block) * nearest).sum())
    assert torch.equal(dict(bank.changes("grouped"))[uaq3], dict(plain.changes("grouped"))[uaq3])
