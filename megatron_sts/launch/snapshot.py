"""Which code a job was submitted with: version, commit and what differs from it. Must not know torch."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import megatron_sts

PACKAGE = Path(megatron_sts.__file__).parent


def write(folder: Path) -> str:
    """Writes ``code.json``, and ``code.diff`` if the checkout differs from its commit; returns both in a few words."""
    facts: dict[str, object] = {"version": megatron_sts.__version__, "package": str(PACKAGE)}
    commit = _git("rev-parse", "HEAD").strip()
    words = f"megatron-sts {megatron_sts.__version__}, no git checkout"
    if commit:
        diff = _git("diff", "--binary", "HEAD")
        new = _git("ls-files", "--others", "--exclude-standard").splitlines()
        facts |= {"commit": commit, "is_changed": bool(diff), "untracked": new}
        words = f"commit {commit[:12]}{' with changes' if diff else ''}"
        if diff:
            (folder / "code.diff").write_text(diff, encoding="utf-8", errors="surrogateescape")
    (folder / "code.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return words


def _git(*words: str) -> str:
    """What git says about the package's checkout; nothing where it is none, or there is no git."""
    command = ["git", "-C", str(PACKAGE.parent), *words]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="surrogateescape", timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
