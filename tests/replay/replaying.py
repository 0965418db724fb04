"""Runs a case in this process and says what it left: JSON, keys, recipes, digests of tensors, texts of pages."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sqlite3
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
from click.testing import CliRunner
from commands import CASES, Case
from diffusers import AutoencoderKL, DDIMPipeline, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel
from safetensors.torch import load_file
from torch import nn

from sedimo.cli.main import main
from sedimo.codec import from_json, to_plain
from sedimo.reporting.summary import Summary, added

GOLDENS = Path(__file__).parent / "goldens"

# Instruction sets and thread counts sum in other orders. That is 1e-7 of an output in single precision, and more of
# the small differences between outputs that noise is measured as. A slip in a formula is far larger than this.
RELATIVE = 2e-3
# Differences of decibels and sums of signed terms may be near zero: of those the absolute deviation counts.
ABSOLUTE = 1e-6

# Wall times, memory of the process, and paths: different at every run.
VOLATILE = frozenset(
    {
        "seconds",
        "measuring_seconds",
        "trials_per_hour",
        "hours",
        "peak_rss_bytes",
        "out",
        "report",
        "study",
        "folder",
        "versions",
        "threads",
    }
)
VARIES = "<varies>"
# The curve of a report solves each budget to within a gap: noise decides between recipes that are nearly as good.
NEARLY_TIED = frozenset({"frontier"})
_VOLATILE_TEXT = re.compile(r"\b\d+(\.\d+)? (s|ms|min|h)\b|\b\d+\.\d+\.\d+|\d{4}-\d\d-\d\d|<root>")
_NUMBER = re.compile(r"(\d+(?:,\d{3})*(?:\.\d+)?)")
_INLINE = frozenset({"a", "abbr", "b", "code", "em", "i", "small", "span", "strong", "sub", "sup", "tspan", "wbr"})


def call(argv: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command line: the only place that knows the parser."""
    before, sys.argv = sys.argv, ["sedimo", *argv]
    try:
        result = CliRunner().invoke(main, argv)
    finally:
        sys.argv = before
    return result.exit_code, result.stdout, result.stderr


class Workshop:
    """Runs cases under one folder, each once, and those first whose folders they name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._found: dict[str, dict[str, object]] = {}
        self._cases = {case.name: case for case in CASES}
        build_pipelines(root)

    def run(self, case: Case, *, is_error: bool = False) -> dict[str, object]:
        """What the case left, as plain values."""
        if case.name not in self._found:
            here = self.root / case.name
            here.mkdir()
            argv = [self._filled(word, here) for word in case.line.split()]
            exit_code, stdout, stderr = call(argv)
            if is_error:
                found = {"exit_code": exit_code, "error": self._plain(error_text(exit_code, stderr), case)}
            elif exit_code != 0:
                raise AssertionError(f"{case.name}: exit code {exit_code}: {stderr[-2000:]}")
            else:
                output = self._plain(json.loads(stdout), case)
                found = {"output": form(output) if case.is_chaotic else output, **self._left(here, case)}
            self._found[case.name] = found
        return self._found[case.name]

    def _filled(self, word: str, here: Path) -> str:
        def folder(match: re.Match[str]) -> str:
            name = match[1]
            if name == "here":
                return str(here)
            if name in self._cases:
                self.run(self._cases[name])
            return str(self.root / name)

        return re.sub(r"\{([\w-]+)\}", folder, word)

    def _left(self, here: Path, case: Case) -> dict[str, object]:
        def each(pattern: str, read: Callable[[Path], object]) -> dict[str, object]:
            return {f.relative_to(here).as_posix(): self._plain(read(f), case) for f in sorted(here.rglob(pattern))}

        found = {
            "studies": each("study.sqlite", study_keys),
            "numbers": {} if case.is_chaotic else each("study.sqlite", study_numbers),
            "pages": {} if case.is_chaotic else each("*.html", lambda f: page_cells(self._text(f))),
            "cards": {} if case.is_chaotic else each("README.md", lambda f: self._text(f).splitlines()),
            "recipes": {} if case.is_chaotic else each("*recipe.json", read_json) | each("trials.json", read_json),
            "configs": {} if case.is_chaotic else each("out/**/config.json", packed_config),
            "tensors": {} if case.is_chaotic else each("out/**/*.safetensors", tensor_digests),
        }
        return {part: content for part, content in found.items() if content}

    def _text(self, file: Path) -> str:
        return file.read_text(encoding="utf-8").replace(str(self.root), "<root>")

    def _plain(self, value: object, case: Case) -> object:
        """The value without what varies, and without this machine's paths."""
        if isinstance(value, dict):
            hidden = VOLATILE | set(case.loose)
            return {k: VARIES if k in hidden else self._plain(v, case) for k, v in value.items()}
        if isinstance(value, list):
            return [self._plain(v, case) for v in value]
        if isinstance(value, str):
            return value.replace(str(self.root), "<root>")
        return float(f"{value:.7g}") if isinstance(value, float) else value


def build_pipelines(root: Path) -> None:
    """Saves a class-conditional latent pipeline, and an unconditional one whose U-Net concatenates streams."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )
    denoiser = DiTTransformer2DModel(
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
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 24),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    )
    for model in (vae, denoiser, unet):
        _fill(model)
    first = denoiser.transformer_blocks[0].norm1.emb.state_dict()
    for block in denoiser.transformer_blocks:
        block.norm1.emb.load_state_dict(first)  # tied
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")
    latent = DiTPipeline(denoiser, vae, scheduler, id2label={i: f"class{i}" for i in range(10)})
    latent.save_pretrained(root / "source")
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(root / "unet")


def _fill(model: nn.Module) -> None:
    """Parameters from whole numbers, which every machine draws alike: `torch.randn` differs by instruction set."""
    generator = np.random.default_rng(0)
    for name, parameter in model.named_parameters():
        drawn = generator.integers(-128, 129, size=(4, *parameter.shape)).sum(0).astype(np.float32) / 256
        fan_in = math.prod(parameter.shape[1:])
        if parameter.ndim > 1:
            drawn *= np.float32(1.5 / math.sqrt(fan_in))
        else:
            drawn = drawn / 8 + (1 if "norm" in name and name.endswith("weight") else 0)
        parameter.data.copy_(torch.from_numpy(np.ascontiguousarray(drawn, dtype=np.float32)))
    model.eval().requires_grad_(False)


def error_text(exit_code: int, stderr: str) -> str:
    """The message without the progress before it; of a command line that was not understood, only that it was not."""
    if exit_code == 2:
        return "the parser's own words"
    match = re.search(r"^\w*Error: .*", stderr, re.DOTALL | re.MULTILINE)
    text = (match[0] if match else stderr).strip()
    return text.partition("Expected one of")[0]  # what follows are the words of another library


def study_keys(file: Path) -> dict[str, list[str]]:
    """The keys of all rows by kind, 16 digits of each content key."""
    found: dict[str, list[str]] = {}
    for kind, key, _ in _rows(file):
        what, separator, _ = key.partition(":")  # these are hashed with the source's path, or with all settings
        name = f"{what}:{VARIES}" if separator and what in ("computing", "plan") else key
        found.setdefault(kind, []).append(re.sub(r"[0-9a-f]{64}", lambda m: m[0][:16], name))
    return found


def study_numbers(file: Path) -> dict[str, list[float]]:
    """Every number with a fraction that a trial, the table and the report hold, sorted: the form of rows may change."""
    found = {}
    for kind, key, text in _rows(file):
        if kind == "trial" or (kind == "record" and key in ("table", "report")):
            told = [json.loads(text), *(reckoned(text) if key == "report" else ())]
            found[f"{kind} {key[:16]}"] = sorted({float(f"{n:.6g}") for n in _fractions(told)})
    return found


def reckoned(report: str) -> list[object]:
    """What the page of a report reckons from the table and the recipe that are kept in it."""
    summary = from_json(Summary, report)
    told: list[object] = [summary.cost]
    for cost in summary.chosen:
        others = (summary.at_reference(cost), summary.step(cost, larger=True), summary.step(cost, larger=False))
        told += [summary.share([cost]), *(summary.noise_db(cost, other) for other in others if other)]
        told += [other.cost - cost.cost for other in others[1:] if other]
    for costs in (*summary.operations.values(), *summary.blocks.values()):
        referred = [other for cost in costs if (other := summary.at_reference(cost))]
        told += [summary.paper_bits(costs), summary.share(costs), added(costs).value, added(referred)]
    if summary.allocation.budget_bytes is not None:
        told.append(8 * summary.allocation.budget_bytes / summary.table.total_params)
    return list(to_plain(told))


def _rows(file: Path) -> list[tuple[str, str, str]]:
    connection = sqlite3.connect(file)
    try:
        return connection.execute("SELECT kind, key, json FROM rows ORDER BY kind, key").fetchall()
    finally:
        connection.close()


def _fractions(value: object) -> list[float]:
    if isinstance(value, dict):
        return [n for key, part in value.items() if key not in VOLATILE | NEARLY_TIED for n in _fractions(part)]
    if isinstance(value, list):
        return [n for part in value for n in _fractions(part)]
    return [value] if isinstance(value, float) and not value.is_integer() else []


def form(value: object) -> object:
    """Names of fields and types of values; of a list, its first value's."""
    if isinstance(value, dict):
        return {key: form(part) for key, part in value.items()}
    if isinstance(value, list):
        return [form(part) for part in value[:1]]
    return type(value).__name__


def read_json(file: Path) -> object:
    """The file's content."""
    return json.loads(file.read_text(encoding="utf-8"))


def packed_config(file: Path) -> object:
    """What a component's configuration says of its packed weights."""
    return read_json(file).get("quantization_config")


def tensor_digests(file: Path) -> dict[str, str]:
    """16 digits of sha256 over dtype, shape and bytes by name: the file's own header has no fixed order."""
    found = {}
    for name, tensor in sorted(load_file(file).items()):
        content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        found[name] = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + content).hexdigest()[:16]
    return found


class _Texts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.text, self.cells, self._cell, self._hidden = [], [], None, 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden += tag in ("style", "script")
        if tag not in _INLINE:
            self.handle_data(" ")
        if tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("style", "script")
        if tag in ("td", "th") and self._cell is not None:
            self.cells.append("".join(self._cell))
            self._cell = None
        if tag not in _INLINE:
            self.handle_data(" ")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text.append(data)
            if self._cell is not None:
                self._cell.append(data)


def page_cells(page: str) -> dict[str, object]:
    """The texts of all cells of tables, each once, and the text of the whole page, in which they are looked for."""
    parser = _Texts()
    parser.feed(page)
    cells = {" ".join(cell.split()) for cell in parser.cells}
    return {
        "cells": sorted(c for c in cells if c and not _VOLATILE_TEXT.search(c)),
        "text": " ".join("".join(parser.text).split()),
    }


def golden_of(found: dict[str, object]) -> dict[str, object]:
    """What is kept of a case: of pages, the cells alone."""
    pages = {name: page["cells"] for name, page in found.get("pages", {}).items()}
    return {**found, "pages": pages} if pages else found


def differences(golden: dict[str, object], found: dict[str, object]) -> list[str]:
    """Where something found is not what was recorded, in words; empty when all is held."""
    loosely = {"numbers": _missing_numbers, "pages": _missing_cells, "cards": _missing_lines}
    told: list[str] = []
    if golden.keys() != found.keys():
        told.append(f"parts differ by {sorted(golden.keys() ^ found.keys())}")
    for part in sorted(golden.keys() & found.keys()):
        if part not in loosely:
            _compare(golden[part], found[part], part, told)
            continue
        if golden[part].keys() != found[part].keys():
            told.append(f"{part}: files differ by {sorted(golden[part].keys() ^ found[part].keys())}")
        for file in sorted(golden[part].keys() & found[part].keys()):
            told += [f"{part}/{file}: {lost}" for lost in loosely[part](golden[part][file], found[part][file])]
    return told


def _compare(golden: object, found: object, place: str, told: list[str]) -> None:
    """Exactly, but for floats."""
    if isinstance(golden, dict) and isinstance(found, dict):
        if golden.keys() != found.keys():
            told.append(f"{place}: keys differ by {sorted(golden.keys() ^ found.keys())}")
        for key in sorted(golden.keys() & found.keys()):
            _compare(golden[key], found[key], f"{place}/{key}", told)
    elif isinstance(golden, list) and isinstance(found, list):
        if len(golden) != len(found):
            told.append(f"{place}: {len(golden)} values before, {len(found)} now")
        for index, (one, other) in enumerate(zip(golden, found, strict=False)):
            _compare(one, other, f"{place}/{index}", told)
    elif type(golden) is not type(found) or not (
        golden == found or (isinstance(golden, float) and near(golden, found))
    ):
        told.append(f"{place}: {golden!r} before, {found!r} now")


def _is_same(golden: object, found: object) -> bool:
    return near(golden, found) if isinstance(golden, float) else golden == found


def near(golden: float, found: float) -> bool:
    """Whether two numbers are the same but for noise of floating point."""
    return math.isclose(golden, found, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


def _missing_numbers(golden: dict[str, list[float]], found: dict[str, list[float]]) -> list[str]:
    told = [f"no row {key} any more" for key in sorted(golden.keys() - found.keys())]
    for key in sorted(golden.keys() & found.keys()):
        lost = [n for n in golden[key] if not any(near(n, other) for other in found[key])]
        told += [f"{key}: no {n} any more" for n in lost]
    return told


def _missing_cells(golden: list[str], found: dict[str, object]) -> list[str]:
    """Cells whose words do not stand side by side anywhere on the page."""
    return _missing_texts(golden, str(found["text"]).split())


def _missing_lines(golden: list[str], found: list[str]) -> list[str]:
    return _missing_texts([line for line in golden if not _VOLATILE_TEXT.search(line)], " ".join(found).split())


def _missing_texts(texts: list[str], words: list[str]) -> list[str]:
    return [f"no {text!r} any more" for text in texts if not _stands_in(text.split(), words)]


def _stands_in(text: list[str], words: list[str]) -> bool:
    """Brackets around words and commas after them are looks, not words."""
    text, words = ([word.strip("(),") or word for word in one] for one in (text, words))
    n = len(text)
    return any(all(map(_same_word, text, words[i : i + n])) for i in range(len(words) - n + 1))


def _same_word(golden: str, found: str) -> bool:
    """The same but for the last digit of a number."""
    if golden == found:
        return True
    one, other = _NUMBER.split(golden), _NUMBER.split(found)
    return one[::2] == other[::2] and all(map(_same_digits, one[1::2], other[1::2]))


def _same_digits(golden: str, found: str) -> bool:
    one, other = float(golden.replace(",", "")), float(found.replace(",", ""))
    decimals = max(len(number.partition(".")[2]) for number in (golden, found))
    return near(one, other) or (bool(decimals) and abs(one - other) < 1.5 * 10.0**-decimals)
