"""Output folders: complete, atomic, honest about what was linked, and changed layer by layer without refitting."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel
from huggingface_hub import ModelCardData, metadata_load
from safetensors.torch import load_file

from packed_weights import OWNER, TIED, check_checkpoint, denoise, random_packed
from sedimo.checkpoint.contents import packed_layers
from sedimo.checkpoint.reading import read_packed
from sedimo.checkpoint.weights import replace_weights
from sedimo.checkpoint.writing import (
    Origin,
    WriteOptions,
    card_of,
    write_checkpoint,
)
from sedimo.errors import InputError, StateError
from sedimo.pipelines import folder as folder_module
from sedimo.pipelines.folder import new_folder, place_file

ORIGIN = Origin("zoo:tiny", "jacobian", '{"sedimo_recipe":1,"layers":{}}', "smoothed by 0.5")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def source(tiny_pipeline_folder, tmp_path) -> Path:
    shutil.copytree(tiny_pipeline_folder, tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("the base model's card")
    (tmp_path / "source" / "LICENSE").write_text("terms")
    return tmp_path / "source"


def inode(path: Path) -> int:
    return path.stat().st_ino


def names(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_a_pipeline_folder(source, packed_dit, tmp_path):
    out = tmp_path / "out"
    written = write_checkpoint(source, out, packed_dit, ORIGIN, component="transformer")
    assert names(out) == names(source) | {"README.base.md", "sedimo_recipe.json"}
    assert (out / "model_index.json").read_bytes() == (source / "model_index.json").read_bytes()
    assert (out / "vae" / WEIGHTS).read_bytes() == (source / "vae" / WEIGHTS).read_bytes()
    assert (out / "README.base.md").read_text() == "the base model's card"
    assert json.loads((out / "sedimo_recipe.json").read_text())["sedimo_recipe"] == 1
    assert "_name_or_path" not in json.loads((out / "transformer" / "config.json").read_text())
    assert written.denoiser_folder == out / "transformer"
    assert written.linked == ()
    assert set(written.copied) == names(source) - {"README.md"} - {f"transformer/{n}" for n in ("config.json", WEIGHTS)}
    assert written.file_bytes == (out / "transformer" / WEIGHTS).stat().st_size
    assert written.file_bytes > written.stored_bytes + written.plain_bytes
    assert written.stored_bytes == sum(w.stored_bytes for n, w in packed_layers(packed_dit).items() if n != TIED)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    pipe = DiffusionPipeline.from_pretrained(out)
    assert torch.equal(denoise(pipe.transformer), denoise(packed_dit))


def test_the_card_tells_what_a_reader_needs(source, packed_dit, tmp_path):
    write_checkpoint(
        source, tmp_path / "out", packed_dit, ORIGIN, component="transformer", options=WriteOptions(link=True)
    )
    card = (tmp_path / "out" / "README.md").read_text()
    data = ModelCardData(**metadata_load(tmp_path / "out" / "README.md"))
    assert (data.library_name, data.base_model, data.tags) == ("diffusers", "zoo:tiny", ["sedimo", "quantized"])
    assert data.base_model_relation == "quantized"
    for text in (
        "DiffusionPipeline.from_pretrained",
        "import sedimo",
        "| `transformer_blocks.attn1.to_q` | 2 | 2,048 |",
        "- method: jacobian\n- before packing: smoothed by 0.5\n- `sedimo_recipe.json` in this folder",
        "4 linked to the source folder, 1 copied",
        "21 layers, 1 of them sharing the weight of another",
    ):
        assert text in card, text
    assert "| `transformer_blocks.attn1.to_q` |" in card
    assert "transformer_blocks.0" not in card


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"# A model",
        b"---\ntags: sedimo\n---\n",
        b"---\ntags:\n- sedimo\n---\n",
        b"---\n[: }\n---\n",
        b"---\na text\n---\n",
        b"---\n\xff\n---\n",
    ],
)
def test_foreign_cards_are_not_taken_for_ours(text, tmp_path):
    (tmp_path / "README.md").write_bytes(text)
    assert card_of(tmp_path / "README.md") == {}


def test_cards_of_the_first_release_are_known(tmp_path):
    card = (
        "---",
        "library_name: diffusers",
        'base_model: "a/b"',
        "base_model_relation: quantized",
        "tags:",
        "- sedimo",
    )
    (tmp_path / "README.md").write_text("\n".join([*card, "- quantized", "---", ""]))
    assert card_of(tmp_path / "README.md")["base_model"] == "a/b"


def test_links_share_the_files_and_copies_do_not(source, packed_dit, tmp_path):
    options = WriteOptions(link=True)
    written = write_checkpoint(source, tmp_path / "out", packed_dit, ORIGIN, component="transformer", options=options)
    assert f"vae/{WEIGHTS}" in written.linked
    assert "model_index.json" in written.copied
    assert inode(tmp_path / "out" / "vae" / WEIGHTS) == inode(source / "vae" / WEIGHTS)
    assert inode(tmp_path / "out" / "model_index.json") != inode(source / "model_index.json")
    copied = write_checkpoint(source, tmp_path / "two", packed_dit, ORIGIN, component="transformer")
    assert copied.linked == ()
    assert inode(tmp_path / "two" / "vae" / WEIGHTS) != inode(source / "vae" / WEIGHTS)


def test_links_fall_back_to_copies(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert place_file(tmp_path / "link", tmp_path / "b", link=True)
    assert inode(tmp_path / "b") == inode(tmp_path / "a"), "a symbolic link is followed"
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("another device")))
    assert not place_file(tmp_path / "a", tmp_path / "c", link=True)
    assert (tmp_path / "c").read_text() == "x"


def test_a_denoiser_folder_and_shards(source, packed_dit, tmp_path):
    out = tmp_path / "out"
    written = write_checkpoint(
        source / "transformer", out, packed_dit, Origin("here"), options=WriteOptions(max_shard_size=20_000)
    )
    assert len(list(out.glob("*.safetensors"))) > 3
    assert written.file_bytes == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert torch.equal(denoise(DiTTransformer2DModel.from_pretrained(out)), denoise(packed_dit))
    assert "DiTTransformer2DModel.from_pretrained" in (out / "README.md").read_text()


def test_a_source_with_variants_only(source, packed_dit, tmp_path):
    vae = source / "vae"
    (vae / WEIGHTS).rename(vae / "diffusion_pytorch_model.fp16.safetensors")
    written = write_checkpoint(source, tmp_path / "out", packed_dit, ORIGIN, component="transformer")
    assert f"vae/{WEIGHTS}" in written.copied
    DiffusionPipeline.from_pretrained(tmp_path / "out")
    shutil.copy(vae / "diffusion_pytorch_model.fp16.safetensors", vae / WEIGHTS)
    (vae / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    options = WriteOptions(variant="fp16", link=True)
    write_checkpoint(source, tmp_path / "two", packed_dit, ORIGIN, component="transformer", options=options)
    chosen = vae / "diffusion_pytorch_model.fp16.safetensors"
    assert inode(tmp_path / "two" / "vae" / WEIGHTS) == inode(chosen)
    assert sorted(path.name for path in (tmp_path / "two" / "vae").iterdir()) == ["config.json", WEIGHTS]


def test_components_outside_the_folder_are_not_followed(source, packed_dit, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "file").write_text("x")
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps({**index, "../secret": ["diffusers", "AutoencoderKL"]}))
    written = write_checkpoint(source, tmp_path / "deep" / "out", packed_dit, ORIGIN, component="transformer")
    assert not any("secret" in name for name in (*written.linked, *written.copied))
    assert names(tmp_path / "deep") == {f"out/{name}" for name in names(tmp_path / "deep" / "out")}


def test_an_output_in_use_is_left_alone(source, packed_dit, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(InputError, match="is not an empty folder"):
        write_checkpoint(source, out, packed_dit, ORIGIN, component="transformer")
    assert names(out) == {"precious"}
    write_checkpoint(source, out, packed_dit, ORIGIN, component="transformer", options=WriteOptions(overwrite=True))
    assert "precious" not in names(out)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is not an empty folder"):
        write_checkpoint(source, tmp_path / "file", packed_dit, ORIGIN, component="transformer")
    for place in (source, source / "inside", tmp_path):
        with pytest.raises(InputError, match="outside the source folder"):
            write_checkpoint(source, place, packed_dit, ORIGIN, component="transformer")
    with pytest.raises(InputError, match=r"no config\.json"):
        write_checkpoint(source, tmp_path / "no", packed_dit, ORIGIN, component="unet")
    with pytest.raises(InputError, match=r"no model_index\.json"):
        write_checkpoint(source / "transformer", tmp_path / "no", packed_dit, ORIGIN, component=".")


def test_a_failure_leaves_nothing_behind(source, packed_dit, tiny_dit, tmp_path, monkeypatch):
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match="no weight of the denoiser is packed"):
        write_checkpoint(source, tmp_path / "out", copy.deepcopy(tiny_dit), ORIGIN, component="transformer")
    assert {path.name for path in tmp_path.iterdir()} == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(folder_module, "_settle", fail)
    options = WriteOptions(overwrite=True)
    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(source, tmp_path / "out", packed_dit, ORIGIN, component="transformer", options=options)
    assert names(tmp_path / "out") == {"old"}
    assert {path.name for path in tmp_path.iterdir()} == {*before, "out"}


def test_an_exchange_that_fails_restores_the_old_folder(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("x")
    rename = Path.rename

    def refuse_the_new(self: Path, target: Path) -> Path:
        if (self / "new").exists():
            raise OSError("refused")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new)
    with pytest.raises(OSError, match="refused"), new_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("y")
    assert names(out) == {"old"}


def test_what_another_one_wrote_meanwhile_is_kept(tmp_path):
    out = tmp_path / "out"

    def write() -> None:
        with new_folder(out) as folder:
            (folder / "mine").write_text("x")
            out.mkdir()
            (out / "theirs").write_text("y")

    with pytest.raises(InputError, match="exists already"):
        write()
    assert names(out) == {"theirs"}


def test_folders_and_files_have_ordinary_permissions(tmp_path):
    (tmp_path / "usual").mkdir()
    (tmp_path / "usual" / "file").write_text("x")
    (tmp_path / "private").write_text("x")
    (tmp_path / "private").chmod(0o600)
    with new_folder(tmp_path / "new") as folder:
        (folder / "file").write_text("x")
        (folder / "file").chmod(0o600)
        place_file(tmp_path / "private", folder / "linked", link=True)
    for name in ("", "file"):
        assert (tmp_path / "new" / name).stat().st_mode == (tmp_path / "usual" / name).stat().st_mode
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600


def test_changing_one_layer_keeps_every_other_byte(source, packed_dit, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    write_checkpoint(source, first, packed_dit, ORIGIN, component="transformer")
    assert packed_layers(packed_dit)["proj_out_1"].format.family != "uaq", "the new tensors have other names"
    fresh = random_packed((64, 32), "uaq3", seed=7)
    written = write_checkpoint(first, second, {"proj_out_1": fresh}, ORIGIN, component="transformer")
    before, after = (load_file(folder / "transformer" / WEIGHTS) for folder in (first, second))
    changed = {name for name in before.keys() | after.keys() if name.startswith("proj_out_1.weight")}
    assert before.keys() - changed == after.keys() - changed
    assert all(
        torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype
        for name in before.keys() - changed
    )
    checkpoint = check_checkpoint(second / "transformer")
    assert torch.equal(read_packed(checkpoint)["proj_out_1"].dequantize(), fresh.dequantize())
    loaded = DiffusionPipeline.from_pretrained(second).transformer
    assert str(packed_layers(loaded)["proj_out_1"].format) == "uaq3"
    assert written.stored_bytes == checkpoint.stored_bytes
    assert (second / "README.base.md").read_text() == "the base model's card", "not that of the packed source"
    assert (second / "vae" / WEIGHTS).read_bytes() == (source / "vae" / WEIGHTS).read_bytes()


def test_changing_a_shared_or_an_unpacked_layer(source, packed_dit, tmp_path):
    plain = packed_dit.get_submodule("proj_out_2")
    plain.weight = torch.nn.Parameter(plain.weight.dequantize(), requires_grad=False)
    replace_weights(packed_dit, {})
    first, second = tmp_path / "first", tmp_path / "second"
    write_checkpoint(source / "transformer", first, packed_dit, ORIGIN)
    shape = tuple(packed_layers(packed_dit)[TIED].shape)
    changes = {TIED: random_packed(shape, "uaq3"), "proj_out_2": random_packed((16, 32), [(8, "kmc2"), (24, "uaq2")])}
    options = WriteOptions(max_shard_size=20_000)
    write_checkpoint(first, second, changes, ORIGIN, options=options)
    loaded = DiTTransformer2DModel.from_pretrained(second)
    assert loaded.get_submodule(TIED).weight is loaded.get_submodule(OWNER).weight
    assert str(packed_layers(loaded)[OWNER].format) == "uaq3"
    assert torch.equal(packed_layers(loaded)["proj_out_2"].dequantize(), changes["proj_out_2"].dequantize())
    pair = {TIED: random_packed(shape), OWNER: random_packed(shape)}
    with pytest.raises(InputError, match="share one weight"):
        write_checkpoint(first, tmp_path / "no", pair, ORIGIN)
    with pytest.raises(InputError, match="has no layer 'nowhere'"):
        write_checkpoint(first, tmp_path / "no", {"nowhere": random_packed((4, 4))}, ORIGIN)
    with pytest.raises(InputError, match="has no layer 'pos_embed'"):
        write_checkpoint(first, tmp_path / "no", {"pos_embed": random_packed((4, 4))}, ORIGIN)
    with pytest.raises(InputError, match=r"'proj_out_1' has a weight of shape \(64, 32\), the new one has \(4, 4\)"):
        write_checkpoint(first, tmp_path / "no", {"proj_out_1": random_packed((4, 4))}, ORIGIN)
    with pytest.raises(StateError, match="is not packed"):
        write_checkpoint(source / "transformer", tmp_path / "no", changes, ORIGIN)
    assert not (tmp_path / "no").exists()
