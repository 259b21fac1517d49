"""The scripts in findings parse and say at their heads what was seen. None is run here: they install what they are about."""

import re
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "findings"
SCRIPTS = sorted(FOLDER.glob("*.sh"))


def test_there_are_some() -> None:
    assert len(SCRIPTS) >= 9


@pytest.mark.parametrize("script", [*SCRIPTS, FOLDER / "venv.bash"], ids=lambda path: path.stem)
def test_it_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_its_head_says_what_was_seen_with_what(script: Path) -> None:
    text = script.read_text()
    head = text.split("set -euo pipefail")[0]
    words = ["# Finding: ", "# Versions: ", "# Behaviour: ", "# Output: ", "# What to do: "]
    assert [head.count(word) for word in words] == [1] * len(words)
    assert sorted(words, key=head.index) == words
    [packages] = re.findall(r'^\. "\$\(dirname .*/venv\.bash" (.*)$', text, re.M)
    for package in packages.removeprefix("--no-deps ").split():
        name, version = package.split("==")
        assert f"{name} {version}" in head
    assert "megatron_sts" not in text
