"""A budget of stored bytes binds what is really in the file."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file, save_file

from sedimo.allocation.budget import BudgetSettings
from sedimo.checkpoint.reading import open_checkpoint
from sedimo.checkpoint.validation import tensor_specs
from sedimo.errors import InputError
from sedimo.jobs import quantize as job
from sedimo.jobs.quantize import QuantizeSettings
from sedimo.jobs.settings import FormatSettings
from sedimo.lab.bench import SourceSettings

WEIGHTS = "diffusion_pytorch_model.safetensors"


def run(source, out, formats="kma4,fp16", method="error", **budget):
    settings = QuantizeSettings(
        SourceSettings(str(source)), BudgetSettings(**budget), out, method, FormatSettings(formats), check=False
    )
    return job.run(settings)


def bytes_of_layers(folder, recipe):
    """Bytes of all Linear and Conv weights in a written file, shared ones once."""
    checkpoint = open_checkpoint(folder)
    tensors = tensor_specs(checkpoint.headers)
    plain = [tensors[f"{n}.weight"].n_bytes for n, entry in recipe.items() if not entry.is_quantized]
    return checkpoint.stored_bytes + sum(plain)


def test_layers_left_alone_in_float32_count_as_they_are_stored(tiny_pipeline_folder, tmp_path):
    source = tiny_pipeline_folder / "transformer"
    result = run(source, tmp_path / "out", stored_bits=10.0)
    choice = result.allocation
    left = [n for n, f in choice.choice.items() if not f.is_quantized]
    assert 0 < len(left) < len(choice.choice)
    assert bytes_of_layers(tmp_path / "out", choice.choice) == choice.used_bytes <= choice.budget_bytes
    assert choice.stored_bits == pytest.approx(8 * choice.used_bytes / result.finding.table.total_params)


def test_a_codebook_that_float16_cannot_hold_is_not_smuggled_over_the_budget(tiny_pipeline_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_pipeline_folder / "transformer", source)
    weights = load_file(source / WEIGHTS)
    weights["proj_out_1.weight"] *= 1e7
    save_file(weights, source / WEIGHTS, metadata={"format": "pt"})
    plain = run(tiny_pipeline_folder / "transformer", tmp_path / "plain", method="uniform:kma4")
    budget = plain.written.stored_bytes
    run(source, tmp_path / "enough", method="uniform:kma4", n_bytes=budget + 32)
    with pytest.raises(InputError, match=r"32 more than was estimated.*Lower the budget by 32 bytes"):
        run(source, tmp_path / "short", method="uniform:kma4", n_bytes=budget)
    assert not (tmp_path / "short").exists()
