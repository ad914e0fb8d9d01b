"""Where things are in the repository and under its output folder."""

import os
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
CI = REPO / "ci"
#: Everything that is made: git-ignored, and safe to delete while no lab is up.
OUT = REPO / "out"
HOST_IMAGES = OUT / "lab-image"
GUEST_IMAGES = OUT / "images"


def lab_state():
    """The folder of the running lab: out/lab, or $LAB_DIR for a second one beside it."""
    return Path(os.environ.get("LAB_DIR") or OUT / "lab").resolve()


def cargo_target():
    """Cargo's output folder."""
    return Path(os.environ.get("CARGO_TARGET_DIR") or REPO / "target").resolve()
