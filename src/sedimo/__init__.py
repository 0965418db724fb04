"""Sedimo decides how many bits each weight of a diffusion model deserves, and writes the smaller checkpoint.

This is the one public door; its names are those of `__init__.pyi`, which type checkers and editors read, too. They are
loaded when they are first used, so that `import sedimo` costs milliseconds; its one side effect is a hook that teaches
diffusers to load Sedimo's checkpoints.
"""

from __future__ import annotations

import lazy_loader

from sedimo._import_hook import install

__version__ = "0.1.0"

__getattr__, _, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = sorted({*_names} - {"attribute", "explore", "probe"})  # old names, which end with the next release


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


install()
