"""Arithmetic that is the same on every x86 machine: imported before torch and NumPy, which read these once.

Where inputs of layers are rounded, a difference in the last bit moves a number to the next step of its grid, and all
that follows from it. Recorded figures of such jobs hold on another machine only if its kernels add in the same order.

Such products take several times as long, which tests on trained models would feel: with SEDIMO_TEST_KERNELS=native each
machine takes its own. What these tests say is statistics, and holds on all.
"""

from __future__ import annotations

import os

KERNELS = {
    "ATEN_CPU_CAPABILITY": "default",  # torch's own kernels: no AVX, no fused multiply-add
    "MKL_CBWR": "COMPATIBLE",  # matrix products: one code path for all processors
    "ONEDNN_MAX_CPU_ISA": "SSE41",  # convolutions
    "OPENBLAS_CORETYPE": "NEHALEM",  # matrix products of NumPy and SciPy
    "NUMBA_CPU_NAME": "generic",
}
if os.environ.get("SEDIMO_TEST_KERNELS") != "native":
    os.environ.update(KERNELS)
