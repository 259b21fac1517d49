"""What Ctrl-C means to commands that go on where they stopped."""

from __future__ import annotations

import sys
from pathlib import Path

INTERRUPTED = 130
"""Exit status, as a shell gives it to a command that SIGINT ended."""


def say_interrupted(out: Path) -> int:
    """Tells how to go on; returns the exit status."""
    print(f"interrupted; the same command goes on with {out}", file=sys.stderr)
    return INTERRUPTED
