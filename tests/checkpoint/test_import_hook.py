"""`import sedimo` teaches diffusers its quantizer in either order of imports, and is cheap."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

from diffusers.quantizers.base import DiffusersQuantizer

from sedimo.checkpoint import diffusers_plugin

IS_REGISTERED = """
from diffusers.quantizers import auto
assert auto.AUTO_QUANTIZER_MAPPING["sedimo"].__name__ == "SedimoQuantizer"
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["sedimo"].__name__ == "SedimoConfig"
from diffusers.quantizers.base import DiffusersQuantizer
assert issubclass(auto.AUTO_QUANTIZER_MAPPING["sedimo"], DiffusersQuantizer)
print("registered")
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_registers_at_once_if_diffusers_is_there_already():
    assert run("from diffusers.quantizers import auto; import sedimo" + IS_REGISTERED) == "registered"


def test_registers_when_diffusers_comes_later_and_disturbs_nobody():
    code = """
import sedimo, importlib, importlib.util, inspect, sys
from sedimo._import_hook import install
install()
assert len([f for f in sys.meta_path if type(f).__module__ == "sedimo._import_hook"]) == 1
spec = importlib.util.find_spec("diffusers.quantizers.auto")
assert spec.origin.endswith("auto.py") and spec.name == "diffusers.quantizers.auto"
from diffusers.quantizers import auto
assert "class DiffusersAutoQuantizer" in inspect.getsource(auto)
assert list(auto.AUTO_QUANTIZER_MAPPING)[-1] == "sedimo" and "torchao" in auto.AUTO_QUANTIZER_MAPPING
importlib.reload(auto)
"""
    assert run(code + IS_REGISTERED) == "registered"


def test_a_loader_of_many_modules_registers_with_one():
    code = """
import sedimo, sys
from importlib.machinery import PathFinder, ModuleSpec

class Archive:  # finds and loads all modules of diffusers by itself, as loaders of frozen programs do
    own = {}
    def find_spec(self, name, path, target=None):
        found = PathFinder.find_spec(name, path) if name.startswith("diffusers.quantizers") else None
        if found is None:
            return None
        self.own[name] = found.loader
        return ModuleSpec(name, self, origin=found.origin, is_package=found.submodule_search_locations is not None)
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        if hasattr(module, "__path__"):
            module.__path__ = [self.own[module.__name__].path.rpartition("/")[0]]
        self.own[module.__name__].exec_module(module)

sys.meta_path.append(Archive())
sys.meta_path.insert(1, sys.meta_path.pop())
"""
    assert run(code + IS_REGISTERED) == "registered"


def test_registers_when_our_own_module_brings_diffusers():
    assert run("import sedimo.checkpoint.weights" + IS_REGISTERED) == "registered"


def test_import_is_cheap_and_brings_nothing_heavy():
    code = """
import sys
before = set(sys.modules)
import sedimo
heavy = {"torch", "diffusers", "numpy", "numba", "scipy", "transformers"} & set(sys.modules)
assert not heavy, heavy
print(len(set(sys.modules) - before))
"""
    assert int(run(code)) < 100  # modules, most of them of Python itself; 62 were found, and torch has thousands


def test_loading_a_checkpoint_brings_no_quantizer_and_no_solver(packed_pipeline_folder):
    code = f"""
import sys, sedimo
from diffusers import DiTTransformer2DModel
DiTTransformer2DModel.from_pretrained({str(packed_pipeline_folder / "transformer")!r})
ours = {{m.split(".")[1] for m in sys.modules if m.startswith("sedimo.")}}
assert ours <= {{"_import_hook", "errors", "codec", "pipelines", "quant", "checkpoint"}}, ours
assert "numba" not in sys.modules
print("light")
"""
    assert run(code) == "light"


def test_a_diffusers_that_is_too_old_is_said_and_left_alone(monkeypatch, caplog):
    monkeypatch.delattr(DiffusersQuantizer, "maybe_update_state_dict")
    old = ModuleType("auto")
    diffusers_plugin.register(old)
    assert "too old" in caplog.text
    assert not hasattr(old, "AUTO_QUANTIZER_MAPPING")
