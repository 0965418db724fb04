"""Every way in which a checkpoint can be wrong has its own message, in diffusers' loader and in ours."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from packed_weights import OWNER, check_checkpoint, random_packed
from sedimo.checkpoint import diffusers_plugin
from sedimo.checkpoint.contents import packed_layers
from sedimo.checkpoint.layout import read_configuration
from sedimo.checkpoint.reading import is_packed, open_checkpoint, read_packed
from sedimo.checkpoint.validation import make_seal
from sedimo.checkpoint.weights import replace_weights
from sedimo.errors import InputError, StateError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def edit_config(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "config.json"
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))


def edit_layer(name: str, **fields: object) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, lambda c: c["quantization_config"]["layers"][name].update(fields))


def edit_part(name: str, **fields: object) -> Callable[[Path], None]:
    return lambda folder: edit_config(
        folder, lambda c: c["quantization_config"]["layers"][name]["parts"][0].update(fields)
    )


def edit_quantization(**fields: object) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, lambda c: c["quantization_config"].update(fields))


def edit_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / WEIGHTS
        path.write_bytes(change(path.read_bytes()))

    return edit


def flip_bit_of(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = bytearray((folder / WEIGHTS).read_bytes())
        size = int.from_bytes(data[:8], "little")
        data[8 + size + json.loads(data[8 : 8 + size])[name]["data_offsets"][0]] ^= 1
        (folder / WEIGHTS).write_bytes(data)

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object], *, sealed: bool = True) -> Callable[[Path], None]:
    """Changes tensors; `sealed` writes a seal that fits them, as an attacker or a broken writer would."""

    def edit(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            metadata = file.metadata()
        change(tensors)
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        seal = make_seal(tensors, read_configuration(config, place=""))
        save_file(tensors, folder / WEIGHTS, metadata=seal if sealed else metadata)

    return edit


def rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


KMC, UAQ, GROUPED, KMA = "proj_out_1", "pos_embed.proj", "proj_out_2", "transformer_blocks.0.attn1.to_v"
BIAS = "proj_out_1.bias"


@pytest.fixture
def folder(tiny_dit, tmp_path) -> Path:
    denoiser = copy.deepcopy(tiny_dit)
    formats = {KMC: "kmc3", UAQ: "uaq3", GROUPED: "uaq3g16", KMA: "kma5", OWNER: "kmc4"}
    shapes = {name: tuple(denoiser.get_submodule(name).weight.shape) for name in formats}
    replace_weights(denoiser, {name: random_packed(shapes[name], text) for name, text in formats.items()})
    denoiser.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


DEFECTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "other version": (edit_quantization(format_version=2), "format version 2; this Sedimo reads version 1"),
    "version as text": (edit_quantization(format_version="1"), "format version '1'"),
    "no version": (lambda f: edit_config(f, lambda c: c["quantization_config"].pop("format_version")), "version None"),
    "unknown field": (edit_quantization(bits=4), r"unknown fields \['bits'\]"),
    "layers are a list": (edit_quantization(layers=[]), "layers must be an object, got"),
    "recipe beside layers": (edit_quantization(recipe={"proj_out_1": "kma2"}), "recipe"),
    "unknown layer field": (edit_layer(KMC, group=4), r"unknown fields \['group'\]"),
    "unknown kind": (edit_layer(KMC, kind="Embedding"), "kind must be one of"),
    "wrong kind": (edit_layer(KMC, kind="Conv2d"), "a Conv2d weight has 4 positive sizes"),
    "no format": (edit_part(KMC, format="int4"), "'int4' is not a format"),
    "format of one bit": (edit_part(KMC, format="kmc1"), "bits must lie in 2..8"),
    "gap between parts": (edit_part(KMC, start=1), "must cover the 32 input channels"),
    "overlong part": (edit_part(KMC, stop=33), "must cover the 32 input channels"),
    "codebook dtype of uaq": (edit_part(UAQ, codebook="float16"), "'codebook' belongs to kmc and kma"),
    "no codebook dtype": (edit_part(KMC, codebook=None), "'codebook' belongs to kmc and kma"),
    "values dtype of kmc": (edit_part(KMC, values="float16"), "'values' belongs to fp16"),
    "tie to nowhere": (edit_layer(KMC, same_as="x"), "unknown fields"),
    "tie to an unpacked layer": (
        lambda f: edit_config(f, lambda c: c["quantization_config"]["layers"].update(x={"same_as": "nowhere"})),
        "which is no packed layer",
    ),
    "config lies about the shape": (edit_layer(KMC, shape=[65, 32]), "belongs to another checkpoint"),
    "config of another recipe": (edit_part(KMC, format="kmc4"), "belongs to another checkpoint"),
    "foreign weights file": (
        lambda f: save_file(load_file(f / WEIGHTS), f / WEIGHTS, metadata={"format": "pt"}),
        "foreign file: its metadata has no 'sedimo_format'",
    ),
    "file of another version": (
        edit_bytes(lambda b: b.replace(b'"sedimo_format":"1"', b'"sedimo_format":"7"')),
        "format version '7'",
    ),
    "damaged codes": (flip_bit_of(f"{KMC}.weight.0.codes"), f"'{KMC}.weight.0.codes' is damaged: its checksum"),
    "damaged bias": (flip_bit_of(BIAS), f"'{BIAS}' is damaged: its checksum"),
    "missing packed tensor": (
        edit_tensors(lambda t: t.pop(f"{KMC}.weight.0.codebook")),
        f"lacks packed tensors: '{KMC}.weight.0.codebook'",
    ),
    "missing tensor": (edit_tensors(lambda t: t.pop(BIAS), sealed=False), "missing|lacks tensors of the model: "),
    "extra tensor": (
        edit_tensors(lambda t: t.update(stowaway=torch.ones(2)), sealed=False),
        "extra|holds tensors that the model does not have: 'stowaway'",
    ),
    "codes of another shape": (
        edit_tensors(lambda t: t.update({f"{KMC}.weight.0.codes": torch.zeros(64, 13, dtype=torch.uint8)})),
        r"must be torch.uint8 \[64, 12\] by config.json, the file has torch.uint8 \[64, 13\]",
    ),
    "codes of another dtype": (
        edit_tensors(lambda t: t.update({f"{KMC}.weight.0.codes": torch.zeros(64, 12, dtype=torch.int8)})),
        "the file has torch.int8",
    ),
    "codebook with NaN": (
        edit_tensors(lambda t: t[f"{KMC}.weight.0.codebook"].view(-1)[3:4].fill_(float("nan"))),
        f"{KMC}.weight.0.codebook holds NaN or infinity",
    ),
    "infinite scale": (
        edit_tensors(lambda t: t[f"{UAQ}.weight.0.scale"].fill_(float("inf"))),
        f"{UAQ}.weight.0.scale holds NaN or infinity",
    ),
    "unsorted codebook": (
        edit_tensors(lambda t: t[f"{KMA}.weight.0.codebook"].copy_(-t[f"{KMA}.weight.0.codebook"])),
        f"{KMA}.weight.0.codebook must be sorted",
    ),
    "zero point out of range": (
        edit_tensors(lambda t: t[f"{GROUPED}.weight.0.zero_point"].fill_(8)),
        r"zero_point must lie in 0\.\.7, got 8",
    ),
    "no weights file": (lambda f: (f / WEIGHTS).unlink(), "Error no file named|no weights"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_each_defect_has_its_own_error_in_both_readers(name, folder):
    edit, message = DEFECTS[name]
    edit(folder)
    errors = (StateError, OSError) if name == "no weights file" else StateError
    with pytest.raises(errors, match=message):
        DiTTransformer2DModel.from_pretrained(folder)
    with pytest.raises((StateError, InputError), match=message):
        check_checkpoint(folder)


MODEL_DEFECTS = {
    "bias of another shape": (
        edit_tensors(lambda t: t.update({BIAS: torch.zeros(63)})),
        rf"'{BIAS}' must be torch.float32 \[64\] for this model, the file has torch.float32 \[63\]",
    ),
    "integers for a bias": (
        edit_tensors(lambda t: t.update({BIAS: torch.zeros(64, dtype=torch.int32)})),
        "the file has torch.int32",
    ),
    "missing tensor, sealed": (edit_tensors(lambda t: t.pop(BIAS)), f"lacks tensors of the model: '{BIAS}'"),
    "renamed tensor, sealed": (edit_tensors(lambda t: rename(t, BIAS, "proj.bias")), "lacks tensors of the model"),
    "extra tensor, sealed": (
        edit_tensors(lambda t: t.update(stowaway=torch.ones(2))),
        "holds tensors that the model does not have: 'stowaway'",
    ),
    "another model": (
        lambda f: edit_config(f, lambda c: c.update(num_layers=1)),
        "holds tensors that the model does not have: 'transformer_blocks.1.attn1",
    ),
    "another width": (
        lambda f: edit_config(f, lambda c: c.update(attention_head_dim=8)),
        r"layer '.*' is (Conv2d|Linear) \(.*\) by config.json, the model has (Conv2d|Linear) \(",
    ),
}


@pytest.mark.parametrize("name", MODEL_DEFECTS)
def test_what_contradicts_the_model_is_refused(name, folder):
    edit, message = MODEL_DEFECTS[name]
    edit(folder)
    with pytest.raises(StateError, match=message):
        DiTTransformer2DModel.from_pretrained(folder)


def shards(folder: Path, size: int = 20_000) -> list[Path]:
    DiTTransformer2DModel.from_pretrained(folder).save_pretrained(folder, max_shard_size=size)
    (folder / WEIGHTS).unlink()
    return sorted(folder.glob("*.safetensors"))


def edit_header(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + size :]

    return edit


def first_tensor(header: dict) -> dict:
    return next(entry for name, entry in header.items() if name != "__metadata__")


CUTS = {
    "truncated": (lambda b: b[:-1], "not fully covered"),
    "cut in the header": (lambda b: b[:500], "invalid header length"),
    "empty": (lambda b: b"", "header too small|empty"),
    "a text": (lambda b: b"version https://git-lfs.github.com/spec/v1\n" * 9, "header too large"),
    "too long": (lambda b: b + b"x", "not fully covered"),
    "damaged header": (lambda b: b[:8] + b"]" + b[9:], "invalid (start|JSON)"),
    "lying shape": (
        edit_header(lambda h: first_tensor(h).update(shape=[1 << 40])),
        "invalid shape, data type, or offset",
    ),
    "lying dtype": (edit_header(lambda h: first_tensor(h).update(dtype="F64")), "invalid shape, data type"),
    "unknown dtype": (edit_header(lambda h: first_tensor(h).update(dtype="F7")), "unknown variant `F7`"),
    "hole": (edit_header(lambda h: h.pop(BIAS, None) or h.popitem()), "invalid offset|not fully covered"),
    "negative size": (edit_header(lambda h: first_tensor(h).update(shape=[-1])), "invalid JSON"),
    "no offsets": (edit_header(lambda h: first_tensor(h).pop("data_offsets")), "missing field"),
    "header of a list": (lambda b: (2).to_bytes(8, "little") + b"[]", "invalid"),
    "metadata of numbers": (edit_header(lambda h: h.update(__metadata__={"a": 1})), "invalid"),
}


@pytest.mark.parametrize("name", CUTS)
def test_damaged_files_of_shards(name, folder):
    change, message = CUTS[name]
    path = shards(folder)[1]
    path.write_bytes(change(path.read_bytes()))
    for reader in (DiTTransformer2DModel.from_pretrained, check_checkpoint):
        with pytest.raises(StateError, match=f"{path.name} is not a complete safetensors file: .*({message})"):
            reader(folder)


@pytest.mark.parametrize("name", CUTS)
def test_a_damaged_single_file(name, folder):
    """diffusers opens it before it asks us, and says which file; our own reader says what is wrong."""
    change, message = CUTS[name]
    edit_bytes(change)(folder)
    with pytest.raises(OSError, match=rf"{WEIGHTS}|git-lfs"):
        DiTTransformer2DModel.from_pretrained(folder)
    with pytest.raises(StateError, match=f"is not a complete safetensors file: .*({message})"):
        check_checkpoint(folder)


def test_missing_exchanged_and_doubled_shards(folder, tmp_path):
    paths = shards(folder)
    backup = {path: path.read_bytes() for path in paths}
    paths[0].unlink()
    with pytest.raises(OSError, match=r"-00001-of-"):
        DiTTransformer2DModel.from_pretrained(folder)
    paths[0].write_bytes(backup[paths[1]])
    with pytest.raises(StateError, match="lies in both"):
        DiTTransformer2DModel.from_pretrained(folder)
    paths[0].write_bytes(backup[paths[0]])
    index = folder / f"{WEIGHTS}.index.json"
    plain = json.loads(index.read_text())
    plain["weight_map"]["stowaway"] = paths[0].name
    index.write_text(json.dumps(plain))
    with pytest.raises(StateError, match=r"disagree about \['stowaway'\]"):
        DiTTransformer2DModel.from_pretrained(folder)


def test_shards_of_two_checkpoints_do_not_mix(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    edit_tensors(lambda t: t[BIAS].add_(1))(tmp_path / "other")
    ours, theirs = shards(folder), shards(tmp_path / "other")
    shutil.copy(theirs[0], ours[0])
    with pytest.raises(StateError, match="not written together"):
        DiTTransformer2DModel.from_pretrained(folder)


def test_headers_are_judged_before_a_parameter_is_made(folder, monkeypatch):
    shards(folder)
    monkeypatch.setattr(diffusers_plugin, "assemble", lambda *_: pytest.fail("a tensor was made"))
    edit_config(folder, lambda c: c.update(num_layers=1))
    with pytest.raises(StateError, match="does not have"):
        DiTTransformer2DModel.from_pretrained(folder)


def test_sizes_that_would_need_all_memory_are_refused_by_arithmetic(folder):
    huge = 1 << 60
    edit_layer(KMC, shape=[huge, 32])(folder)
    configuration = read_configuration(
        json.loads((folder / "config.json").read_text())["quantization_config"], place="here"
    )
    path = folder / WEIGHTS
    tensors = dict(load_file(path))
    save_file(tensors, path, metadata=make_seal(tensors, configuration))
    for reader in (DiTTransformer2DModel.from_pretrained, check_checkpoint):
        with pytest.raises(StateError, match=rf"must be torch.uint8 \[{huge}, 12\] by config.json"):
            reader(folder)


def test_padding_bits(tiny_dit, tmp_path):
    denoiser = copy.deepcopy(tiny_dit)
    shape = (32, 4, 2, 2)
    replace_weights(denoiser, {"pos_embed.proj": random_packed(shape, [(1, "kmc3"), (3, "kmc3")])})
    denoiser.save_pretrained(tmp_path)
    name = "pos_embed.proj.weight.0.codes"  # 4 codes of 3 bits: 4 bits of padding
    edit_tensors(lambda t: t[name][5, 1].bitwise_or_(0x10))(tmp_path)
    with pytest.raises(StateError, match=rf"{name} has set bits after the last code"):
        DiTTransformer2DModel.from_pretrained(tmp_path)


def test_a_dtype_without_a_tensor_in_torch_is_refused(folder):
    edit_bytes(edit_header(lambda h: h[f"{KMC}.weight.0.codes"].update(dtype="F8_E8M0")))(folder)
    with pytest.raises(StateError, match=rf"'{KMC}.weight.0.codes' of .*: dtype must be one of BOOL.*got 'F8_E8M0'"):
        open_checkpoint(folder)


def test_reading_without_a_model(folder):
    checkpoint = check_checkpoint(folder)
    loaded = packed_layers(DiTTransformer2DModel.from_pretrained(folder))
    read = read_packed(checkpoint, dtype=torch.bfloat16)
    assert read.keys() == loaded.keys()
    for name, weight in read.items():
        assert torch.equal(weight.dequantize(), loaded[name].dequantize().bfloat16())
    header = int.from_bytes((folder / WEIGHTS).read_bytes()[:8], "little")
    assert checkpoint.file_bytes == 8 + header + checkpoint.stored_bytes + checkpoint.plain_bytes
    assert checkpoint.stored_bytes == sum(weight.stored_bytes for weight in read.values())
    assert is_packed(folder)


def test_folders_that_are_not_packed(tiny_pipeline_folder, tmp_path):
    assert not is_packed(tiny_pipeline_folder / "transformer")
    assert not is_packed(tmp_path)
    with pytest.raises(StateError, match="is not packed"):
        open_checkpoint(tiny_pipeline_folder / "transformer")
    with pytest.raises(InputError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
