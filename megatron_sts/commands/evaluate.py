"""``megatron-sts eval``: public benchmarks."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_sts.commands.arguments import (
    Commands,
    add_command,
    add_folder,
    add_max_new_tokens,
    add_nproc,
    add_overrides,
)
from megatron_sts.launch import fork


def add(commands: Commands) -> None:
    """The arguments."""
    evaluate = add_command(
        commands,
        "eval",
        run,
        help="ask a checkpoint the questions of public benchmarks",
        description="Ask a checkpoint the questions of public benchmarks, greedily and with LLaVA-1.5's prompts, and score the "
        "answers with the official metrics. Benchmarks: gqa, vqav2, scienceqa, scienceqa_img, pope, mme (PATH: the folder of "
        "its official files) and scenes (embedded, no PATH). Started again, it asks only what has no answer yet.",
    )
    evaluate.add_argument(
        "source", metavar="CHECKPOINT", type=Path, help="a run's folder, one of its checkpoints, or a folder of weights"
    )
    add_overrides(evaluate, "the checkpoint's")
    evaluate.add_argument(
        "--benchmark", metavar="NAME=PATH", action="append", required=True, help="what to ask; may be repeated"
    )
    evaluate.add_argument(
        "--images",
        metavar="NAME=DIR",
        action="append",
        default=[],
        help="a benchmark's images, if not in their usual place",
    )
    add_folder(evaluate, "--out", "answers and results (default: eval/ in the run)")
    add_nproc(evaluate)
    add_max_new_tokens(evaluate, 128)


def run(args: argparse.Namespace) -> int:
    """Ask, score and print."""
    fork.stay_single_threaded()
    with fork.uncollected():
        from megatron_sts.commands.exams import Asked, evaluate

    asked = Asked(args.source, args.overrides, args.benchmark, args.images, args.out, args.max_new_tokens)
    return evaluate(asked, args.nproc)
