"""The repository keeps its promises: scripts parse, and what README.md names exists and is understood."""

import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_sts.cli import build_parser
from megatron_sts.config.load import load
from megatron_sts.config.resolve import resolve

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "launch/slurm/README.md",
    ROOT / "megatron_sts/cost/README.md",
    ROOT / "megatron_sts/evaluate/README.md",
    ROOT / "megatron_sts/lds/README.md",
    ROOT / "megatron_sts/plan/README.md",
    ROOT / "megatron_sts/report/README.md",
    ROOT / "megatron_sts/vtc/README.md",
    *sorted(ROOT.glob("examples/*/README.md")),
]
SCRIPTS = sorted([*ROOT.glob("launch/**/*.sh"), *ROOT.glob("launch/**/*.sbatch"), *ROOT.glob("examples/*/*.sh"), ROOT / "tests/run.sh", ROOT / ".ci/run"])  # fmt: skip
PLACES = ("megatron_sts/", "examples/", "tools/", "tests/", "launch/", ".ci/")


def named_commands() -> list[str]:
    """Command lines in the documents' bash blocks."""
    blocks = [block for path in DOCUMENTS for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.S)]
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


def named_paths() -> set[str]:
    """Paths of this repository in the documents: in backticks, links and commands."""
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    words = set(re.findall(r"[\w./-]+", text))
    return {word.rstrip(".") for word in words if word.startswith(PLACES)} | set(
        re.findall(r"\]\(([A-Z][\w.]+)\)", text)
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_script_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("script", ["launch/local.sh", "tests/run.sh"])
def test_script_explains_itself(script: str) -> None:
    result = subprocess.run(["bash", ROOT / script, "--help"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage:")


@pytest.mark.parametrize("words", [[], ["/nowhere"]])
def test_local_refuses_before_installing(words: list[str]) -> None:
    result = subprocess.run(["bash", ROOT / "launch/local.sh", *words], capture_output=True, text=True)
    assert result.returncode == 2


@pytest.mark.parametrize("name", sorted(named_paths()))
def test_named_path_exists(name: str) -> None:
    assert (ROOT / name).exists()


@pytest.mark.parametrize("line", named_commands())
def test_named_command_is_understood(line: str) -> None:
    words = shlex.split(re.sub(r"\[.*?\]", "", line), comments=True)
    if "megatron_sts" in words:
        words = ["megatron-sts", *words[words.index("megatron_sts") + 1 :]]
    if words[0] == "megatron-sts":
        args, rest = build_parser().parse_known_args(words[1:])
        assert not [word for word in rest if "=" not in word] and args.run
    elif words[0] in ("bash", "sbatch", "torchrun"):
        assert any((ROOT / word).is_file() for word in words[1:])
    elif words[0] == "python":
        script = runpy.run_path(str(ROOT / words[1]), run_name="looked at")
        script["arguments"]().parse_args(words[2:])
    else:
        pytest.fail(f"no check for {words[0]}")


def test_named_config_resolves(tmp_path: Path) -> None:
    [text] = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "config.yaml").write_text(text)
    assert resolve(load(tmp_path)).world_size == 2
    overrides = ["stages.alignment.vtc.keep_ratio=0.25", "stages.*.vtc=null", "stages.*.lds=null"]
    assert resolve(load(tmp_path, overrides)).stage("alignment").tokens(0).of_image(0) == 144
