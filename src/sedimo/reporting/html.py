"""A page as one HTML file: no network, no script, readable in light, dark and on paper."""

from __future__ import annotations

import base64
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape
from numpy.typing import NDArray
from PIL import Image

from sedimo.errors import InputError
from sedimo.metrics.estimate import Estimate
from sedimo.pipelines.folder import write_file
from sedimo.quant.formats import Format
from sedimo.reporting.drawing import draw
from sedimo.reporting.page import Cell, Page, Picture, Table, png, say
from sedimo.reporting.theme import BIT_LEVELS, DARK, LIGHT, bit_level
from sedimo.reporting.words import Value, mark, plain

MAX_BYTES = 5_000_000
_PICTURE_BYTES = 3_200_000  # of all pictures in a page
_AMPLIFICATION, _GREY = 2, 128  # of differences
_SMALL_PIXELS = 96  # up to this edge, pixels are kept as they are and shown enlarged
_LARGEST_PIXELS = 384
_JPEG_QUALITY = 88
_MOST_INTERVALS = 3  # columns of them that have room beside their values
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_LOOKS = {
    "better": "better",
    "confirmed": "better",
    "worse": "worse",
    "refuted": "worse",
    "no difference shown": "open",
    "not measured": "open",
}
_SIGNS = {"confirmed": "✓", "refuted": "✗", "open": "?", "not measured": "–"}  # noqa: RUF001


def write_page(page: Page, path: str | Path) -> Path:
    """Writes a page and returns its path; an existing file is replaced at once or not at all."""
    target = Path(path)
    if not target.parent.is_dir():
        raise InputError(f"the report's folder must exist, got {str(target.parent)!r}. Create it first.")
    content = render(page).encode()
    if len(content) >= MAX_BYTES:
        raise InputError(
            f"a report must stay under {MAX_BYTES} bytes, this one has {len(content)}; give fewer recipes."
        )
    write_file(target, content)
    return target


def render(page: Page, *, theme: Literal["light", "dark"] | None = None) -> str:
    """The page as HTML text; `theme` fixes light or dark, which is otherwise the reader's setting."""
    environment = Environment(
        loader=FunctionLoader(_resource),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(prose=_prose, plain=plain, mark=mark, level=bit_level, fitting=fitting)
    environment.filters.update(cell=_cell, is_wide=_is_wide)
    environment.filters.update(
        groups=lambda rows: [(key, [*inside]) for key, inside in itertools.groupby(rows, lambda row: row.group)],
        kind=lambda block: type(block).__name__,
        chart=lambda figure: Markup(draw(figure)),  # texts in it are escaped
        json_uri=lambda text: _data_uri("application/json", text.encode()),
    )
    words = {"looks": _LOOKS, "signs": _SIGNS, "amplification": _AMPLIFICATION}
    style = Markup(_style())  # our own constants
    filled = environment.get_template("page.html.j2").render(page=page, theme=theme, style=style, **words)
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", filled)


def _cell(value: Value | Cell, column: Cell) -> Markup:
    """A cell of a table with the look of its kind."""
    cell = value if isinstance(value, Cell) else Cell(value)
    kind = cell.kind or column.kind
    text, quiet = say(value, column)
    shown = escape(text)
    if kind == "name" and text:
        shown = Markup("<code>{}</code>").format(Markup(".<wbr>").join(text.split(".")))  # join escapes the parts
    elif isinstance(cell.value, Format):
        shown = Markup('<span class="tag b{0}">{1}</span>').format(bit_level(cell.value.bits), text)
    elif kind == "verdict" and text in _LOOKS:
        shown = Markup('<span class="{}">{}</span>').format(_LOOKS[text], text)
    return shown + Markup(' <span class="interval">{}</span>').format(quiet) if quiet else shown


def _is_wide(table: Table) -> bool:
    """Whether intervals have to stand below their values."""
    first = [cell.value if isinstance(cell, Cell) else cell for row in table.rows[:1] for cell in row.cells]
    return sum(isinstance(value, Estimate) for value in first) > _MOST_INTERVALS


def fitting(
    pictures: Sequence[Picture], budget_bytes: int = _PICTURE_BYTES
) -> list[tuple[str, Mapping[str, str], bool]]:
    """The first pictures that fit in so many bytes of the page: label, data URIs by what they show, if it is small."""
    found: list[tuple[str, Mapping[str, str], bool]] = []
    for picture in pictures:
        reference, quantized = picture.reference, picture.quantized
        for array in (reference, quantized):
            if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.shape != reference.shape:
                raise InputError(
                    f"picture {picture.label!r} must be two uint8 arrays [height, width, 3] of one size, "
                    f"got {array.dtype} {array.shape} beside {reference.shape}."
                )
        change = _GREY + _AMPLIFICATION * (quantized.astype(np.int16) - reference)
        arrays = {"full precision": reference, "quantized": quantized, "difference": np.clip(change, 0, 255)}
        is_small = max(reference.shape[:2]) <= _SMALL_PIXELS
        uris = {what: _image_uri(array.astype(np.uint8), is_small=is_small) for what, array in arrays.items()}
        budget_bytes -= sum(map(len, uris.values()))
        if budget_bytes < 0:
            break
        found.append((picture.label, uris, is_small))
    return found


def _image_uri(array: NDArray[np.uint8], *, is_small: bool) -> str:
    if is_small:
        return _data_uri("image/png", png(array))
    image, buffer = Image.fromarray(np.ascontiguousarray(array)), io.BytesIO()
    image.thumbnail((_LARGEST_PIXELS, _LARGEST_PIXELS), Image.Resampling.LANCZOS)
    image.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    return _data_uri("image/jpeg", buffer.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _style() -> str:
    light, dark = (" ".join(f"--{role}: {colour};" for role, colour in each.items()) for each in (LIGHT, DARK))
    levels = " ".join(f".b{n} {{ background: var(--b{n}); color: var(--on{n}); }}" for n in BIT_LEVELS)
    return (
        f":root {{ {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
        f':root[data-theme="light"] {{ color-scheme: light; {light} }}\n'
        f':root[data-theme="dark"] {{ color-scheme: dark; {dark} }}\n'
        f"{_resource('page.css')}\n{levels}\n"
        f"@media print {{ :root, :root[data-theme] {{ color-scheme: light; {light} }} }}"
    )


def _prose(text: str) -> Markup:
    """Escaped text in which backticks become code, asterisks emphasis, and `95 %` stays together."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    made = [str(escape(part)) for part in parts]
    made[1::2] = [f"<code>{part}</code>" for part in made[1::2]]
    emphasised = [re.sub(r"\*([^*]+)\*", r"<em>\1</em>", part) for part in made[::2]]
    made[::2] = [re.sub(r"(?<=\d) (?=%)", "&nbsp;", part) for part in emphasised]
    return Markup("".join(made))  # every part was escaped


def _resource(name: str) -> str:
    return resources.files("sedimo.reporting").joinpath(name).read_text(encoding="utf-8")
