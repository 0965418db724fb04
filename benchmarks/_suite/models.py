"""The models that are compared: those of the suite, by half, and the embedded ones."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

DEVELOPMENT, HELD_BACK, ZOO = "development", "held back", "zoo"
HALVES = (DEVELOPMENT, HELD_BACK, ZOO)
EMBEDDED = ("cifar-dit", "cifar-ldm")
_GUIDANCE = {"dit": 4.0, "unet": 3.0, "pixels": None}  # of designs that were trained for it


@dataclass(frozen=True, slots=True)
class Model:
    """A model by its source, its half of the suite, and the guidance that it is sampled with (None: its default)."""

    name: str
    source: str
    half: str
    guidance: float | None


def known_models(suite: Path) -> list[Model]:
    """All models of the suite and the embedded ones; those of the suite may not be trained yet."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "zoo"))
    from training.suite import DESIGNS

    found = []
    for design in DESIGNS:
        guidance = _GUIDANCE[design.kind] if design.is_guided else (1.0 if design.kind == "dit" else None)
        half = HELD_BACK if design.is_held_back else DEVELOPMENT
        found.append(Model(design.name, str(suite / design.name), half, guidance))
    return found + [Model(name, f"zoo:{name}", ZOO, None) for name in EMBEDDED]


def is_there(model: Model) -> bool:
    """Whether the model can be opened."""
    return model.half == ZOO or (Path(model.source) / "model_index.json").is_file()
