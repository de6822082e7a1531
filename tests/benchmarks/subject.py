"""What a benchmark runs on: DeiT-Ti and photographs beside the checkout, or any."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dsm_tune.config import TuneConfig

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def parser(description: str) -> argparse.ArgumentParser:
    """Options that say what to run on."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--model", default="deit_tiny_patch16_224")
    found.add_argument("--checkpoint", default=str(SHARED / "deit_tiny_patch16_224.safetensors"))
    found.add_argument("--images", default=str(SHARED / "photos"))
    found.add_argument("--seed", type=int, default=0)
    return found


def config(options: argparse.Namespace, **changes: object) -> TuneConfig:
    """The configuration of a tune on the subject; ends with a reason where it is not at hand."""
    for file in (options.checkpoint, options.images):
        if not Path(file).exists():
            sys.exit(f"skipped: {file} is not here; name --checkpoint and --images")
    named = {"model": options.model, "checkpoint": options.checkpoint, "images": options.images}
    return TuneConfig.from_dict({**named, "seed": options.seed, **changes})
