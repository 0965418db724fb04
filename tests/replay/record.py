"""Records the goldens again: `PYTHONPATH=tests python tests/replay/record.py [case ...]`; all without a name.

Only when behaviour changes on purpose: read `git diff tests/replay/goldens` and say in the commit why it is right.
"""

from __future__ import annotations

import portable  # noqa: F401  # first of all: sets what torch reads when it is imported

# isort: split
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from commands import CASES, ERRORS
from replaying import GOLDENS, Workshop, golden_of


def write(name: str, golden: object) -> None:
    """One file of sorted keys."""
    text = json.dumps(golden, indent=1, sort_keys=True, ensure_ascii=False)
    (GOLDENS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def record(names: list[str]) -> None:
    """Runs the cases of these names and writes what they left; `errors` stands for all that are refused."""
    unknown = set(names) - {case.name for case in CASES} - {"errors"}
    if unknown:
        sys.exit(f"no case is called {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        for case in CASES:
            if not names or case.name in names:
                begin = time.process_time()
                write(case.name, golden_of(workshop.run(case)))
                print(f"{case.name}: {time.process_time() - begin:.1f} s", flush=True)  # noqa: T201
        if not names or "errors" in names:
            write("errors", {case.name: workshop.run(case, is_error=True) for case in ERRORS})


if __name__ == "__main__":
    torch.set_num_threads(1)
    record(sys.argv[1:])
