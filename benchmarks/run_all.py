"""Runs every benchmark that docs/results quotes, one after the other, and keeps their output under runs/.

    python benchmarks/run_all.py            # about five hours on two cores; a killed run goes on

`peers.py` needs the extra `peers`; it is left out, with a note, when that is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RUNS = Path("runs")
COMMANDS = (
    ("kmeans", ["kmeans.py", "--json", "runs/kmeans.json"]),
    ("bank", ["bank.py", "--out", "runs/bank.json"]),
    ("trace", ["trace.py"]),
    ("allocation", ["allocation.py"]),
    ("size", ["size.py"]),
    ("orthogonality", ["orthogonality.py", "--samples", "12", "--timesteps", "1", "--json", "runs/orthogonality.json"]),
    ("recipes", ["recipes.py", "--out", "runs/recipes.json", "--images", "5000"]),
    ("gnn", ["gnn.py"]),
    ("gnn_scale", ["gnn_scale.py", "--json", "runs/gnn_scale.json"]),
    ("predictor", ["predictor.py", "--out", "runs/predictor.json"]),
    ("peers", ["peers.py", "--out", "runs/peers.json"]),
)


def main() -> int:
    """Runs all; the exit code is the number of failures."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    RUNS.mkdir(exist_ok=True)
    failures = 0
    for name, (script, *arguments) in COMMANDS:
        if name == "peers" and importlib.util.find_spec("sdnq") is None:
            print("peers: left out, pip install 'sedimo[peers]' brings them")
            continue
        print(f"{name} ...", flush=True)
        with (RUNS / f"{name}.log").open("w") as log:
            done = subprocess.run([sys.executable, HERE / script, *arguments], stdout=log, stderr=subprocess.STDOUT)
        failures += done.returncode != 0
        print(f"{name}: {'done' if done.returncode == 0 else 'FAILED'}, see {RUNS / name}.log", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main())
