"""Prints the lines of each source file and fails when one grows past the limit.

A file over 700 lines is two files.
"""

from __future__ import annotations

import sys
from pathlib import Path

LIMIT_LINES = 700
ROOT = Path(__file__).parent.parent
FOLDERS = ("src", "tests", "benchmarks", "scripts", "zoo")


def main() -> int:
    """Prints a table and returns the exit code."""
    files = [f for folder in FOLDERS for f in (ROOT / folder).rglob("*.py")]
    lines = {f.relative_to(ROOT): len(f.read_text().splitlines()) for f in files}
    too_long = {f: n for f, n in lines.items() if n > LIMIT_LINES}
    for folder in FOLDERS:
        count = [n for f, n in lines.items() if f.parts[0] == folder]
        print(f"{folder:12s} {len(count):4d} files {sum(count):7d} lines")
    for file, n in sorted(too_long.items()):
        print(f"{file}: {n} lines, at most {LIMIT_LINES}")
    return 1 if too_long else 0


if __name__ == "__main__":
    sys.exit(main())
