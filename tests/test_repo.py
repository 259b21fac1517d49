"""The repository keeps its promises: scripts parse, and what its READMEs name exists and is understood."""

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
README = ROOT / "README.md"
PLACES = ("megatron_sts/", "examples/", "tools/", "tests/", "launch/", "findings/", ".ci/")
DOCUMENTS = [
    README,
    *sorted(
        {*(path for place in PLACES for path in ROOT.glob(f"{place}**/README.md")), *ROOT.glob("examples/study/*.md")}
    ),
]
OTHERS = {
    "training.py",
    "eval.py",
    "vqaEval.py",
    "eval_tool/calculation.py",
    "scripts/convert_gqa_for_eval.py",
    "llava/eval/eval_pope.py",
    "llava/eval/eval_science_qa.py",
    "llava/eval/m4c_evaluator.py",
    "lmms_eval/tasks/NAME/utils.py",
}
"""Code that the documents name and that is not of this repository."""
PROGRAMS = ("bash", "megatron-sts", "python", "sbatch", "torchrun")
SCRIPTS = sorted([*ROOT.glob("launch/**/*.sh"), *ROOT.glob("launch/**/*.sbatch"), *ROOT.glob("examples/*/*.sh"), ROOT / "tests/run.sh", ROOT / ".ci/run"])  # fmt: skip


def named_commands() -> list[str]:
    """Command lines in the documents' bash blocks, fenced or indented."""
    texts = [re.sub(r"\\\n\s*", "", path.read_text()) for path in DOCUMENTS]
    fenced = [line for text in texts for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]  # fmt: skip
    indented = [line for text in texts for line in re.findall(rf"^    (?:{'|'.join(PROGRAMS)}) .*$", text, re.M)]
    return list(dict.fromkeys(line.strip() for line in fenced + indented if line.strip()))


def mentioned_commands() -> list[str]:
    """Our own commands within sentences, which may leave out what they need: ``megatron-sts plan --search``."""
    return sorted({" ".join(words.split()) for path in DOCUMENTS for words in re.findall(r"`(megatron-sts [^`]+)`", path.read_text())})  # fmt: skip


def named_paths() -> set[str]:
    """Paths of this repository in the documents: in backticks and commands."""
    words = {word for path in DOCUMENTS for word in re.findall(r"[\w./-]+", path.read_text())}
    return {word.rstrip(".") for word in words if word.startswith(PLACES)}


def links(document: Path) -> list[str]:
    """What a document links to in this repository, with the heading: ``../mcore/README.md#fp8-and-kernels``."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.S)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]


def anchors(document: Path) -> set[str]:
    """The names that GitHub gives a document's headings."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


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


def test_named_code_exists() -> None:
    """Also where only the end of its path is given: ``lds/rounds.py``."""
    ours = [path.as_posix() for place in PLACES for path in (ROOT / place).rglob("*.*")]
    names = {name for path in DOCUMENTS for name in re.findall(r"`([\w./-]+\.(?:py|sh|sbatch))`", path.read_text())}
    assert {name for name in names if not any(path.endswith(f"/{name}") for path in ours)} == OTHERS


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for link in links(document):
        name, _, heading = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), link
        assert not heading or heading in anchors(target), link


def test_the_first_page_is_short_and_leads_on() -> None:
    """It fits a few screens; what it leaves to the rooms' own READMEs is a link away."""
    lines = README.read_text().splitlines()
    assert len(lines) <= 200 and all(len(line) <= 120 for line in lines)
    elsewhere = {path.relative_to(ROOT).as_posix() for path in DOCUMENTS if path.parent.parent != ROOT / "examples"}
    assert elsewhere - {"README.md"} <= {link.partition("#")[0] for link in links(README)}


def test_every_tool_is_listed() -> None:
    text = (ROOT / "tools/README.md").read_text()
    assert not [path.name for path in ROOT.glob("tools/*.py") if f"`tools/{path.name}`" not in text]


@pytest.mark.parametrize("words", mentioned_commands())
def test_mentioned_command_has_its_options(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = re.match(r"megatron-sts((?: [a-z][a-z-]*(?= |$))*)", words)
    assert command is not None
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args([*command[1].split(), "--help"])
    assert stop.value.code == 0
    assert set(re.findall(r"--[a-z][\w-]*", words)) <= set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))


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
    [text] = re.findall(r"```yaml\n(.*?)```", (ROOT / "megatron_sts/config/README.md").read_text(), re.S)
    (tmp_path / "config.yaml").write_text(text)
    assert resolve(load(tmp_path)).world_size == 2
    overrides = ["stages.alignment.vtc.keep_ratio=0.25", "stages.*.vtc=null", "stages.*.lds=null"]
    assert resolve(load(tmp_path, overrides)).stage("alignment").tokens(0).of_image(0) == 144
