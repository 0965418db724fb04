"""One file per way to make weights, inputs, codes or the sampler better."""

from __future__ import annotations

from typing import Any

from sedimo.treatments.error_feedback import ERROR_FEEDBACK
from sedimo.treatments.learned_rounding import LEARNED_ROUNDING
from sedimo.treatments.smoothing import SMOOTHING
from sedimo.treatments.static_ranges import ACTIVATIONS
from sedimo.treatments.treatment import Treatment

TREATMENTS: tuple[Treatment[Any], ...] = (SMOOTHING, ERROR_FEEDBACK, ACTIVATIONS, LEARNED_ROUNDING)
