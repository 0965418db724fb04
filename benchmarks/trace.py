"""Seconds and memory of tracing denoisers of published size, each in a process of its own.

    python benchmarks/trace.py [NAME ...] [--json FILE]

The denoisers are built from their configs on the meta device; no weight is downloaded. Seconds are those of
`trace_denoiser` alone (those of the CPU tell how busy the machine was beside); memory is the highest resident
set of the process, with all imports.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "graph"))
GOAL_SECONDS = 15.0
GOAL_GIB = 2.5


def measure(name: str) -> dict[str, object]:
    """Traces one denoiser in this process."""
    import torch
    from denoisers import published

    from sedimo.graph.trace import trace_denoiser

    torch.set_num_threads(2)
    denoiser = published(name)
    start, cpu_start = time.perf_counter(), time.process_time()
    graph = trace_denoiser(denoiser)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {
        "denoiser": name,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "peak_rss_gib": round(peak_rss_bytes() / 2**30, 2),
        "n_layers": len(graph.layers),
        "n_nodes": len(graph.nodes),
        "n_edges": len(graph.edges),
        "n_groups": len(graph.groups),
        "params": graph.params,
        "gmacs": round(graph.macs / 1e9, 1),
    }


def peak_rss_bytes() -> int:
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):
        return int(memory.peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def main() -> None:
    from denoisers import PUBLISHED

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(PUBLISHED))
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(measure(arguments.names[0])))
        return
    print(f"{platform.machine()}, {psutil.cpu_count(logical=False)} cores, Python {platform.python_version()}")
    rows = []
    for name in arguments.names:
        command = [sys.executable, __file__, name, "--inside"]
        row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    slow = [r["denoiser"] for r in rows if r["seconds"] > GOAL_SECONDS or r["peak_rss_gib"] > GOAL_GIB]
    print(f"goal: {GOAL_SECONDS:.0f} s and {GOAL_GIB} GiB each:", f"missed by {slow}" if slow else "reached")


if __name__ == "__main__":
    main()
