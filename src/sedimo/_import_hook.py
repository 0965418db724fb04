"""Teaches diffusers to load Sedimo's checkpoints the moment diffusers is there; imports neither it nor torch.

`import sedimo` calls `install`. If `diffusers.quantizers.auto` is already imported, the quantizer is registered
at once; otherwise a finder waits on `sys.meta_path`, lets the ordinary import machinery find that one module, and has
its loader register right after the module ran. Registering writes two dictionary entries; diffusers is not patched.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_TARGET = "diffusers.quantizers.auto"
_PLUGIN = "sedimo.checkpoint.diffusers_plugin"


def install() -> None:
    """Registers the quantizer now or as soon as diffusers is imported; calling it again changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if _TARGET in sys.modules:
        _register(sys.modules[_TARGET])


def _register(auto: ModuleType) -> None:
    under_way = sys.modules.get(_PLUGIN)
    if under_way is not None and not hasattr(under_way, "register"):
        return  # the plugin itself is importing diffusers, and calls install() when it is complete
    importlib.import_module(_PLUGIN).register(auto)


class _Finder:
    """Finds one module by asking everybody else, and has its loader register once it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TARGET:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                if module.__name__ == _TARGET:  # some loaders load all modules of an archive
                    _register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one loader
        return spec
