"""lmms-eval asks a trained run through our adapter, and hears what ``megatron-sts eval`` hears."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.benchmarks import official_files
from tests.evaluate.benchmarks.tiny_run import answers, megatron_sts, train

pytest.importorskip(
    "lmms_eval", reason="lmms-eval is not installed; bash tests/evaluate/lmms.sh runs these tests with it"
)

TASK = Path(__file__).parent / "lmms_task"
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2"]
LAYOUTS = {
    "1 rank": [],
    "2 copies": [],
    "tp 2": ["parallel.tensor_model_parallel_size=2"],
    "pp 2": ["parallel.pipeline_model_parallel_size=2"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/tiny, its answers to POPE, and the task ``sts_local``, which asks three of POPE's questions."""
    folder = tmp_path_factory.mktemp("lmms")
    train(folder)
    official_files.pope(folder / "pope", ("random",))
    done = megatron_sts(
        folder, "eval", "runs/tiny", "--benchmark", "pope=pope", "--max-new-tokens", "4", "--out", "said"
    )
    assert done.returncode == 0, done.stderr
    write_task(folder, answers(folder / "said", "pope"))
    return folder


def write_task(folder: Path, said: dict[str, str]) -> None:
    """The first document's reference is what the model says; the others' references are something else."""
    [picture] = (folder / "pope" / "val2014").iterdir()
    questions = [json.loads(line) for line in (folder / "pope" / "coco_pope_random.json").read_text().splitlines()][:3]
    documents = [
        {"question": entry["text"], "picture": str(picture), "answer": said["random/1"] if number == 0 else "nothing"}
        for number, entry in enumerate(questions)
    ]
    data = folder / "task" / "documents.jsonl"
    data.parent.mkdir()
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for path in TASK.iterdir():
        if path.is_file():
            (data.parent / path.name).write_text(path.read_text().replace("DATA", str(data)))


def lmms(
    folder: Path, launcher: list[str], out: Path, model_args: list[str], task: str = "task"
) -> subprocess.CompletedProcess[str]:
    arguments = ",".join(["checkpoint=runs/tiny", *model_args])
    command = [sys.executable, *launcher, "-m", "lmms_eval", "--model", "megatron_sts", "--model_args", arguments]
    command += ["--tasks", "sts_local", "--include_path", task, "--output_path", str(out), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    return subprocess.run(command, cwd=folder, env=os.environ | offline, capture_output=True, text=True, timeout=300)


def run_lmms(folder: Path, launcher: list[str], out: Path, model_args: list[str]) -> list[dict[str, Any]]:
    """The documents as lmms-eval logged them, in their order."""
    done = lmms(folder, launcher, out, model_args)
    found = list(out.glob("**/*samples_sts_local.jsonl"))
    assert len(found) == 1, done.stderr
    [results] = out.glob("**/*results.json")
    assert json.loads(results.read_text())["results"]["sts_local"]["exact_match,none"] == pytest.approx(1 / 3)
    return sorted(map(json.loads, found[0].read_text().splitlines()), key=lambda sample: sample["doc_id"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_local_task(folder: Path, layout: str, tmp_path: Path) -> None:
    """Three documents: unequally many on two ranks."""
    samples = run_lmms(folder, [] if layout == "1 rank" else TORCHRUN, tmp_path, LAYOUTS[layout])
    said = answers(folder / "said", "pope")
    heard = [sample["filtered_resps"] for sample in samples]
    assert [text[0].strip() if isinstance(text, list) else text.strip() for text in heard] == [
        said[f"random/{number}"] for number in (1, 2, 3)
    ]


@pytest.mark.slow
def test_a_document_that_one_rank_cannot_show_ends_all_with_its_line(folder: Path, tmp_path: Path) -> None:
    """lmms-eval alone would print it and end with status 0."""
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in (folder / "task").iterdir():
        bad.joinpath(path.name).write_text(path.read_text().replace(str(folder / "task"), str(bad)))
    rows = [json.loads(line) for line in (bad / "documents.jsonl").read_text().splitlines()]
    rows[1]["picture"] = str(bad / "absent.jpg")  # of rank 1
    (bad / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = lmms(folder, TORCHRUN, tmp_path / "out", LAYOUTS["pp 2"], str(bad))
    assert done.returncode != 0 and not list(tmp_path.glob("out/**/*results.json"))
    assert done.stderr.count("megatron-sts: error: rank 1 cannot make requests of its task") == 1, done.stderr
    assert "absent.jpg" in done.stderr
