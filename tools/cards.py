"""Checks the examples' cards, or with --write renews them: numbers of what is planned only, and the head of each README.

Planned numbers are those of ``megatron-sts plan EXAMPLE --hardware h100``. They are renewed, with today's date and the commit of the
code, where one has moved by more than 2 %. What was measured is written by hand, and stays. A new
example that is planned only may begin with a copy of another's card: all its numbers are renewed. Without --write it says what is not as it should
be, and ends with status 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_sts.cards.card import Card, Evidence, Figure, Needs, Result, Status, read_card, write_card
from megatron_sts.cards.head import END, readme_head
from megatron_sts.cards.shelf import examples_folder, read_cards
from megatron_sts.commands.bytes import GIB, outline_bytes
from megatron_sts.commands.seconds import outline_run
from megatron_sts.config.load import load
from megatron_sts.plan.hardware import load_hardware
from megatron_sts.plan.resolved import resolve_planned
from megatron_sts.plan.timing.run import run_time
from megatron_sts.plan.timing.workload import ASSUMED

HARDWARE = "h100"
OF_PLAN = "steps alone, without starting, waiting for data, checkpoints and evaluation"
PLAN_RTOL = 0.02
"""By what share a planned number may move before its card is wrong: less than readers of three digits mind, and a fourth of the least
uncertainty that the model of hardware states."""
RATIO_RTOL = 0.05
"""Of planned ratios STS / dense: seven of eight that were measured on one H200 were within 3.4 %, the last, FP8 with 3/4 of the layers skipped, 14 % off
(megatron_sts/plan/README.md)."""


def planned(example: Path) -> tuple[Needs, tuple[Result, ...]]:
    """What the plan says of an example, to four digits."""
    hardware = load_hardware(HARDWARE)
    resolved = resolve_planned(load(example))
    time = outline_run(hardware, run_time(hardware, resolved), ASSUMED)
    stages = outline_bytes(resolved, hardware.device.memory_gib)["stages"].values()
    peak_bytes = max(rank["total_bytes"] for stage in stages for rank in stage["memory_per_rank"])
    needs = Needs(
        devices=time["num_gpus"],
        device="H100 GPU",
        memory_gib=_rounded(peak_bytes / GIB),
        hours=_uncertain(time["hours"], time["uncertainty"]),
        step_s={name: _uncertain(stage["step_time_s"], stage["uncertainty"]) for name, stage in time["stages"].items()},
    )
    has_one_layout = resolved.config.parallel.pipeline_model_parallel_size == 1  # else dense ones differ
    return needs, tuple(_ratios(time["stages"], with_seconds=has_one_layout))


def _ratios(stages: dict[str, Any], *, with_seconds: bool) -> Iterator[Result]:
    for name, stage in stages.items():
        dense = stage["dense"]
        sparse_flops, dense_flops = (
            each["tflops_per_gpu"]["causal_half"] * each["step_time_s"] for each in (stage, dense)
        )
        yield Result(what=f"FLOPs, STS / dense, {name}", value=_rounded(sparse_flops / dense_flops), tolerance=0.001)
        if with_seconds:
            ratio = stage["step_time_s"] / dense["step_time_s"]
            yield Result(
                what=f"seconds, STS / dense, {name}", value=_rounded(ratio), tolerance=_rounded(RATIO_RTOL * ratio, 2)
            )


def renewed(card: Card, example: Path) -> tuple[Card, list[str]]:
    """The card as it should be, and what of it was not so. Measured ones are as they should be."""
    if card.status is not Status.PLANNED:
        return card, []
    needs, results = planned(example)
    old = card.evidence[0]
    wrong = [
        f"{name}: {was:g}, planned now {now:g}"
        for (name, was), now in zip(
            numbers(card.needs, old.results).items(), numbers(needs, results).values(), strict=False
        )
        if abs(was - now) > PLAN_RTOL * abs(now)
    ]
    if list(numbers(card.needs, old.results)) != list(numbers(needs, results)):
        wrong.append("other stages than the config's")
    if not wrong:
        return card, []
    today = datetime.now(UTC).date()
    fresh = Evidence(status=Status.PLANNED, of=OF_PLAN, date=today, commit=_commit(), results=results)
    return card.model_copy(update={"needs": needs, "evidence": (fresh, *card.evidence[1:])}), wrong


def numbers(needs: Needs, results: tuple[Result, ...]) -> dict[str, float]:
    """All that the plan says, by name; tolerances too, which are its stated uncertainties."""
    figures = {"hours": needs.hours, **{f"seconds a step, {name}": step for name, step in needs.step_s.items()}}
    figures |= {result.what: result for result in results}
    found = {"devices": float(needs.devices), "GiB": needs.memory_gib or 0.0}
    for name, figure in figures.items():
        found |= {name: figure.value, f"{name}, tolerance": figure.tolerance or 0.0}
    return found


def check(example: Path, *, write: bool) -> list[str]:
    """What of an example's card and README is not as it should be; ``write``: it is mended."""
    card, wrong = renewed(read_card(example), example)
    readme = example / "README.md"
    text, head = readme.read_text(encoding="utf-8"), readme_head(card)
    if not text.startswith(head):
        wrong.append("README.md does not begin with the card")
    if write and wrong:
        write_card(card, example)
        _, _, rest = text.partition(END) if END in text else text.partition("\n\n")
        readme.write_text(f"{head}\n{rest.lstrip()}", encoding="utf-8")
    return wrong


def _uncertain(value: float, uncertainty: float) -> Figure:
    return Figure(value=_rounded(value), tolerance=_rounded(value * uncertainty, 2))


def _rounded(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def _commit() -> str:
    head = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(head, cwd=Path(__file__).parent, check=True, capture_output=True, text=True).stdout.strip()


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("examples", nargs="*", metavar="NAME", help="examples (default: all that have a card)")
    parser.add_argument("--write", action="store_true", help="renew cards and READMEs")
    return parser


def main() -> None:
    args = arguments().parse_args()
    is_wrong = False
    for name in args.examples or read_cards():
        wrong = check(examples_folder() / name, write=args.write)
        is_wrong |= bool(wrong)
        for line in wrong:
            print(f"{name}: {line}{' (renewed)' if args.write else ''}")
    sys.exit(1 if is_wrong and not args.write else 0)


if __name__ == "__main__":
    main()
