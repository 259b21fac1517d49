"""Dense against sparse: what two runs of the same config cost and how good they became. Measures nothing itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from megatron_sts.config.differences import differences
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.precision import PrecisionConfig
from megatron_sts.report.losses import NUM_LOSSES, are_last_sparse, last_losses, stage_losses
from megatron_sts.report.run import Line, Run

Comparison = dict[str, Any]
"""JSON-ready: ``runs.{dense,sts}.{num_ranks,stages,losses,num_losses,sparse_losses,accuracy,standard_error,pope_f1,mme_accuracy_plus}``, ``ratios`` (STS / dense),
``ways``: where the runs were cut up and spread over ranks differently, field, dense, STS; ``labels``: what the two are called, for both are
dense, or neither, where ranks or micro-batches are compared; and ``no_accuracy``: null, or the sentence why accuracies are left out (both
runs' are then empty)."""


def compare(dense: Run, sts: Run) -> Comparison:
    """Compares two finished runs; if both were evaluated, also on the split that they were evaluated on first.

    Raises:
        ConfigError: a run is not finished or not fully logged, or the two do not match.
    """
    stages = [[stage["name"] for stage in run.config["stages"]] for run in (dense, sts)]
    if stages[0] != stages[1]:
        raise ConfigError(
            f"{sts.folder}: has stages {stages[1]}, {dense.folder} has {stages[0]}; compare runs of one config"
        )
    _check_same(dense, sts)
    for run in (dense, sts):
        _check_ended(run)
    without = [str(run.folder) for run in (dense, sts) if run.evaluation is None]
    if not without:
        _check_evaluated_alike(dense, sts)
    runs = {name: describe(run, with_accuracy=not without) for name, run in (("dense", dense), ("sts", sts))}
    ways = list(differences(_way(dense), _way(sts), ""))
    ways_of = [[field.removeprefix("."), in_dense, in_sts] for field, in_dense, in_sts in ways]
    lack = f"no accuracy: {' and '.join(without)} {'hold' if len(without) == 2 else 'holds'} no evaluation.json"
    return {
        "runs": runs,
        "ratios": ratios(runs["dense"], runs["sts"]),
        "ways": ways_of,
        "labels": _labels(dense, sts),
        "no_accuracy": lack if without else None,
    }


def _labels(dense: Run, sts: Run) -> list[str]:
    """By their folders, unless one is dense and one is not."""
    if not _is_sparse(dense) and _is_sparse(sts):
        return ["dense", "STS"]
    names = [run.folder.absolute().name for run in (dense, sts)]
    return names if names[0] != names[1] else ["first", "second"]


def _is_sparse(run: Run) -> bool:
    return any(stage.get("vtc") or stage.get("lds") for stage in run.config["stages"])


SHARED = ("seed", "model", "precision", "data", "stages")
"""Sections of the config that two compared runs have in common, save each stage's vtc and lds. How the same steps were spread over
ranks and cut into micro-batches (``parallel``, ``batch.micro_batch_size``, ``batch.balance``) changes no sample and no loss, save that packed rows hold
others and that padding may be longer: it changes times, which then say so.
"""
WAYS_OF_BATCH = ("micro_batch_size", "balance")
"""Earlier versions have no ``balance``: ``off``."""


def _way(run: Run) -> dict[str, Any]:
    """How a run's steps were spread over ranks and cut into micro-batches."""
    sizes = [
        {"name": stage["name"], "batch": {key: stage["batch"].get(key, "off") for key in WAYS_OF_BATCH}}
        for stage in run.config["stages"]
    ]
    return {"parallel": {**run.config["parallel"], "timeout_s": None}, "stages": sizes}


def _check_same(dense: Run, sts: Run) -> None:
    """Ratios mean something only if nothing but VTC and LDS differs, and how ranks shared the work."""
    for section in SHARED:
        dense_value, sts_value = dense.config[section], sts.config[section]
        if section == "stages":
            dense_value, sts_value = (
                [
                    {**stage, "vtc": None, "lds": None, "batch": {**stage["batch"], **dict.fromkeys(WAYS_OF_BATCH)}}
                    for stage in stages
                ]
                for stages in (dense_value, sts_value)
            )
        elif section == "precision":  # what an earlier version did not have stands at its default
            unsaid = PrecisionConfig().model_dump(mode="json")
            dense_value, sts_value = ({**unsaid, **value} for value in (dense_value, sts_value))
        for field, in_dense, in_sts in differences(dense_value, sts_value, section):
            raise ConfigError(
                f"{sts.folder}: {field}={json.dumps(in_sts)}, {dense.folder} has {json.dumps(in_dense)}; compare runs of "
                "one config, vtc and lds aside"
            )


def _check_ended(run: Run) -> None:
    """As far as they came, two runs would be compared at different places of their schedules."""
    for stage in run.config["stages"]:
        name = stage["name"]
        done = run.steps[name][-1]["step"] + 1 if name in run.steps else 0
        if done != run.num_steps(name):
            raise ConfigError(
                f"{run.folder}: has come to step {done} of {run.num_steps(name)} of stage {name}; "
                "a comparison needs finished runs: train it to its end, or report each run alone"
            )


def _check_evaluated_alike(dense: Run, sts: Run) -> None:
    settings = [(run.evaluation or {})["settings"] for run in (dense, sts)]
    if settings[0] != settings[1]:
        raise ConfigError(
            f"{sts.folder}: was evaluated with {settings[1]}, {dense.folder} with {settings[0]}; use the same settings"
        )


def describe(run: Run, *, with_accuracy: bool) -> Comparison:
    """Costs and losses by stage, and accuracy by family on the first split (all splits under ``splits``)."""
    split, families, splits = None, {}, {}
    if with_accuracy and run.evaluation is not None:
        splits = run.evaluation["splits"]
        split = run.evaluation["settings"]["splits"][0]
        families = splits[split]
    return {
        "folder": run.folder.name,
        "split": split,
        "num_ranks": run.config["resolved"]["world_size"],
        "stages": {name: stage_costs(run, name) for name in run.steps},
        "losses": {name: stage_losses(run, name) for name in run.steps},
        "num_losses": {name: len(last_losses(run, name)) for name in run.steps},
        "sparse_losses": [name for name in run.steps if are_last_sparse(run, name)],
        "accuracy": {name: found["accuracy"] for name, found in families.items()},
        "left_out_of_mean": run.config["evaluation"].get("left_out_of_mean", []),
        "standard_error": {name: found["standard_error"] for name, found in families.items()},
        "pope_f1": families.get("existence", {}).get("f1"),
        "mme_accuracy_plus": families.get("paired", {}).get("accuracy_plus"),
        "mme_standard_error_plus": families.get("paired", {}).get("standard_error_plus"),
        "splits": splits,
    }


def stage_costs(run: Run, stage: str) -> Comparison:
    """FLOPs and seconds summed over the steps of a stage, throughput and the largest memory peak.

    Raises:
        ConfigError: a step has no line, so that sums would be wrong.
    """
    lines = run.steps[stage]
    if (expected := run.num_steps(stage)) != len(lines):
        raise ConfigError(
            f"{run.folder}: stage {stage} has lines for {len(lines)} of {expected} steps; "
            "a comparison needs a finished run with logging.interval_steps=1"
        )
    wall_s = _sum(lines, "step_time_s")
    return {
        "flops_executed": _sum(lines, "flops_executed"),
        "flops_dense": _sum(lines, "flops_dense"),
        "wall_s": wall_s,
        "tokens_per_s": _sum(lines, "tokens") / wall_s,
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in lines),
    }


def ratios(dense: Comparison, sts: Comparison) -> Comparison:
    """STS / dense: FLOPs and wall-clock of all stages and of each, accuracy by family and of the means. None: x / 0, or not known."""

    def costs(key: str, *stages: str) -> float | None:
        return _ratio(*(sum(run["stages"][name][key] for name in stages) for run in (sts, dense)))

    names = list(dense["stages"])
    return {
        "flops": costs("flops_executed", *names),
        "wall": costs("wall_s", *names),
        "rank_time": _ratio(
            *(sum(run["stages"][name]["wall_s"] for name in names) * run["num_ranks"] for run in (sts, dense))
        ),
        "accuracy_mean": _ratio(mean_accuracy(sts), mean_accuracy(dense)) if dense["accuracy"] else None,
        "accuracy": {name: _ratio(sts["accuracy"][name], value) for name, value in dense["accuracy"].items()},
        "stages": {name: {"flops": costs("flops_executed", name), "wall": costs("wall_s", name)} for name in names},
    }


def mean_accuracy(run: Comparison) -> float:
    """Over the families that are not left out."""
    kept = [value for name, value in run["accuracy"].items() if name not in run["left_out_of_mean"]]
    return sum(kept) / len(kept)


def _ratio(value: float, base: float) -> float | None:
    return value / base if base else None


def _sum(lines: list[Line], key: str) -> float:
    return sum(line[key] for line in lines)


Row = tuple[str, str, str, str]
"""What is compared, dense, STS, STS / dense."""


def table_rows(comparison: Comparison) -> list[Row]:
    """The comparison as the rows of its table, costs by stage first."""
    dense, sts, ratio = comparison["runs"]["dense"], comparison["runs"]["sts"], comparison["ratios"]
    rows = []
    for name in dense["stages"]:
        rows += _stage_rows(name, dense["stages"][name], sts["stages"][name])
        rows += _loss_rows(name, dense["losses"][name], sts["losses"][name])
    flops, seconds = (
        [sum(stage[key] for stage in run["stages"].values()) for run in (dense, sts)] for key in ("flops_executed", "wall_s")
    )  # fmt: skip
    rows += [
        ("all stages: FLOPs", f"{flops[0]:.3g}", f"{flops[1]:.3g}", _times(ratio["flops"])),
        ("all stages: wall-clock", f"{seconds[0]:.1f} s", f"{seconds[1]:.1f} s", _times(ratio["wall"])),
    ]
    if dense["num_ranks"] != sts["num_ranks"]:
        rows.append(("all stages: wall-clock x ranks", "", "", _times(ratio["rank_time"])))
    return rows + (_accuracy_rows(dense, sts, ratio) if dense["accuracy"] else [])


def _accuracy_rows(dense: Comparison, sts: Comparison, ratio: Comparison) -> list[Row]:
    rows = [
        (
            f"accuracy: {name}{_mark(dense, name)}",
            _share(dense, name),
            _share(sts, name),
            _times(ratio["accuracy"][name]),
        )
        for name in dense["accuracy"]
    ]
    without = " (without *)" if dense["left_out_of_mean"] else ""
    means = [f"{mean_accuracy(run):.3f}" for run in (dense, sts)]
    rows += [(f"accuracy: mean{without}", means[0], means[1], _times(ratio["accuracy_mean"]))]
    for key, label in (("pope_f1", "POPE F1"), ("mme_accuracy_plus", "MME acc+")):
        if dense[key] is not None and sts[key] is not None:
            rows.append((label, f"{dense[key]:.3f}", f"{sts[key]:.3f}", _times(_ratio(sts[key], dense[key]))))
    return rows


def _stage_rows(name: str, dense: Comparison, sts: Comparison) -> list[Row]:
    shown: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("FLOPs", "flops_executed", lambda value: f"{value:.3g}"),
        ("wall-clock", "wall_s", lambda value: f"{value:.1f} s"),
        ("tokens/s", "tokens_per_s", lambda value: f"{value:,.0f}"),
        ("peak memory", "peak_memory_bytes", lambda value: f"{value / 2**20:,.0f} MiB"),
    )
    return [
        (f"{name}: {label}", write(dense[key]), write(sts[key]), _times(_ratio(sts[key], dense[key])))
        for label, key, write in shown
    ]


LOSSES = {
    "last_loss": "training loss",
    "last_validation_loss": "validation loss, last",
    "best_validation_loss": "validation loss, lowest",
}


def _loss_rows(name: str, dense: Comparison, sts: Comparison) -> list[Row]:
    """n/a: not finite, or (validation) not measured by that run."""
    rows: list[Row] = []
    for key, label in LOSSES.items():
        if key in dense or key in sts:
            both = dense.get(key), sts.get(key)
            ratio = None if None in both else _ratio(sts[key], dense[key])
            shown = ["n/a" if value is None else f"{value:.4f}" for value in both]
            rows.append((f"{name}: {label}", shown[0], shown[1], _times(ratio)))
    return rows


def _mark(run: Comparison, family: str) -> str:
    return " *" if family in run["left_out_of_mean"] else ""


def _share(run: Comparison, family: str) -> str:
    return f"{run['accuracy'][family]:.3f} ± {run['standard_error'][family]:.3f}"


def _times(ratio: float | None) -> str:
    return "n/a" if ratio is None else f"{ratio:.3f}"


def markdown(comparison: Comparison) -> str:
    """The table as Markdown."""
    first, second = comparison["labels"]
    lines = [f"# {title(comparison)}", "", f"| | {first} | {second} | {second} / {first} |", "|---|---:|---:|---:|"]
    lines += [f"| {' | '.join(row)} |" for row in table_rows(comparison)]
    lines += [*(f"\n{line}" for line in remarks(comparison)), ""]
    return "\n".join(lines)


def title(comparison: Comparison) -> str:
    """What is compared."""
    first, second = comparison["labels"]
    return "Dense and STS" if first == "dense" and second == "STS" else f"{first} and {second}"


def remarks(comparison: Comparison) -> list[str]:
    """What a reader of the table has to know, in sentences."""
    is_fewer = any(number < NUM_LOSSES for run in comparison["runs"].values() for number in run["num_losses"].values())
    losses = f"Training losses are means of {'at most ' if is_fewer else ''}a stage's last {NUM_LOSSES} steps"
    stages = [stage for run in comparison["runs"].values() for stage in run["stages"].values()]
    costs = "FLOPs and seconds are sums over all steps"
    if any(stage["flops_executed"] != stage["flops_dense"] for stage in stages):
        costs += "; tokens/s count the tokens that VTC leaves, so that fewer of them may be more samples a second"
    if sparse := dict.fromkeys(name for run in comparison["runs"].values() for name in run["sparse_losses"]):
        losses += f", in {' and '.join(sparse)} with tokens or layers left out"
    if any("last_validation_loss" in stage for run in comparison["runs"].values() for stage in run["losses"].values()):
        losses += "; validation losses are of models with all of them"
    lack, split = comparison["no_accuracy"], comparison["runs"]["dense"]["split"]
    accuracies = [] if split is None else [f"Accuracies are on split `{split}`, ± one standard error."]
    return [*accuracies, f"{costs}.", f"{losses}.", *ways_apart(comparison), *([] if lack is None else [lack])]


def ways_apart(comparison: Comparison) -> list[str]:
    """A sentence where the runs were not run alike, so that times and memory compare more than the scheme; else nothing."""
    if not comparison["ways"]:
        return []
    fields = ", ".join(f"{field} {json.dumps(dense)} and {json.dumps(sts)}" for field, dense, sts in comparison["ways"])
    dense, sts = (comparison["runs"][name]["num_ranks"] for name in ("dense", "sts"))
    what = "Not run alike" if dense == sts else f"Not run alike, on {dense} and {sts} ranks"
    return [f"{what}, so that seconds, tokens/s and memory compare that too: {fields}."]
