"""Where the pages are, and scripts/docs.py, which calls the command in this process whatever makes the parser."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

_spec = importlib.util.spec_from_file_location("scripts_docs", ROOT / "scripts" / "docs.py")
site = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(site)
