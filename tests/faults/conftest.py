"""Clusters, databases and the command line are those of ``tests/cli``; studies of ``searching``."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("cli", "searching"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
