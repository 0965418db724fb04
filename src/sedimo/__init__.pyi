from .allocation.solve import (
    Allocation as Allocation,
    allocate as allocate,
)
from .allocation.table import SensitivityTable as SensitivityTable
from .bank import Bank as Bank
from .errors import (
    InputError as InputError,
    MissingExtraError as MissingExtraError,
    SedimoError as SedimoError,
    StateError as StateError,
    UnsupportedError as UnsupportedError,
)
from .graph.model import DenoiserGraph as DenoiserGraph
from .jobs.evaluate import evaluate as evaluate
from .jobs.public import (
    Lab as Lab,
    attribute as attribute,
    explore as explore,
    fit as fit,
    load as load,
    memory_bytes as memory_bytes,
    probe as probe,
    quantize as quantize,
    replace as replace,
    report as report,
)
from .lab.bench import trace as trace
from .lab.seeds import SamplingSettings as SamplingSettings
from .lab.study import Study as Study
from .pipelines.adapter import Sampling as Sampling
from .quant.fitting import quantize_weight as quantize_weight
from .quant.formats import Format as Format
from .quant.tensor import QuantizedTensor as QuantizedTensor
from .space import (
    Recipe as Recipe,
    SearchSpace as SearchSpace,
    search_space as search_space,
)
from .treatments.smoothing import (
    SmoothingSettings as SmoothingSettings,
    smooth as smooth,
)

__version__: str
