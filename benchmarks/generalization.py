"""The default beside its parts and rivals on models that differ: what of it holds for a model nobody has looked at?

    python zoo/train.py suite --data DIR --minutes 12 --work WORK --start PIPELINE
    python benchmarks/generalization.py --suite WORK/suite --work DIR --out DIR [--models NAME ...]
    python benchmarks/generalization.py --out DIR --summary

Every method chooses among formats `wide` at 3.0, 3.5, 4.0 and 5.0 stored bits, and is measured on the same 32 fresh
seeds of 10 steps, SQNR of the final latents in float32. `default` is what `sedimo quantize` does; `signed` and
`summed` are two of the rules that it chooses from. Codes are by error feedback, but for the rows of nearest codes
(`jacobian, nearest codes` was the default before) and ModelOpt, whose auto_quantize rounds as ModelOpt does. `uniform`
is the best uniform recipe of at most the budget, with error feedback, chosen on the fresh seeds themselves, which
favours it. One model after the other; a finished one has a JSON and is skipped, an unfinished one goes on.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path

import torch

from _suite.measuring import measure_model
from _suite.models import EMBEDDED, is_there, known_models
from _suite.summary import print_summary
from sedimo.cli.console import ConsoleProgress

_PACKAGES = ("torch", "diffusers", "numpy", "scipy", "nvidia-modelopt")
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_tile", "amx_bf16")


def machine() -> dict[str, object]:
    """Processor, threads and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(facts.get("flags", "").split())
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "processor": facts.get("model name", platform.processor() or platform.machine()),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, help="folder of the trained models; without it the embedded ones alone")
    parser.add_argument("--work", type=Path, default=Path("runs/generalization"), help="a study per model")
    parser.add_argument("--out", type=Path, default=Path("runs/generalization/results"), help="a JSON per model")
    parser.add_argument("--models", nargs="+", help="their names; all that are there by default")
    parser.add_argument("--summary", action="store_true", help="print the tables of all JSON files, measure nothing")
    arguments = parser.parse_args()
    if arguments.summary:
        print_summary(sorted(arguments.out.glob("*.json")), arguments.models)
        return
    known = {m.name: m for m in known_models(arguments.suite or Path())}
    if arguments.suite is None:
        known = {name: known[name] for name in EMBEDDED}
    unknown = [name for name in arguments.models or () if name not in known]
    if unknown:
        sys.exit(f"no such models: {', '.join(unknown)}; known are {', '.join(known)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.models or known:
        path = arguments.out / f"{name}.json"
        if path.exists() or not is_there(known[name]):
            print(f"{name}: {'finished before' if path.exists() else 'not trained yet'}", flush=True)
            continue
        begin = time.perf_counter()
        found = measure_model(known[name], arguments.work / name, ConsoleProgress())
        text = json.dumps({**found, "machine": machine(), "command": "python " + " ".join(sys.argv)}, indent=1)
        part = path.with_suffix(".part")
        part.write_text(text + "\n")
        part.replace(path)
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
