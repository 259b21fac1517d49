"""A run as one self-contained HTML page. Knows no torch and fetches nothing."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from typing import Any

from omegaconf import OmegaConf

from megatron_sts.report.facts import facts_of
from megatron_sts.report.figures import as_svg, planned_figure, run_figures, times_figure, utilisation_figure
from megatron_sts.report.planned import SHARES, Planned, beside_plan
from megatron_sts.report.run import Line, Run
from megatron_sts.report.times import times
from megatron_sts.report.utilisation import utilisation
from megatron_sts.report.why import HEADINGS, NOTHING, Finding, findings, rows

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2rem .6rem;text-align:right}"
    "td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}"
    "pre{background:#f6f6f6;padding:1rem;overflow:auto}"
)

SHOWN_RATES = {"images_per_s": ",.1f", "tflops_per_device": ".3g", "mfu": ".1%"}
"""Fields of a step's line that the page shows, and how."""
STAGE_COLUMNS = (
    "stage",
    "steps",
    "last loss",
    "layers executed",
    "tokens/s",
    "images/s",
    "TFLOP/s a device",
    "MFU",
    "seconds",
)


VALIDATION_COLUMNS = ("stage", "validations", "last loss", "lowest loss", "after step", "samples", "seconds")


def run_page(run: Run, planned: Planned | None = None) -> str:
    """Stages, curves, accuracy and config of a run; and what ``plan`` says of its steps, if that is given."""
    sections = [
        ("Stages", table(STAGE_COLUMNS, _stage_rows(run))),
        *((("Validation", table(VALIDATION_COLUMNS, _validation_rows(run))),) if run.validations else ()),
        *_why_sections(run, planned),
        *((name, as_svg(figure)) for name, figure in (run_figures(run) if run.steps else {}).items()),
        *((("Where the time goes", as_svg(times_figure(spent))),) if (spent := times(run)) else ()),
        *_planned_sections(run, planned),
        *((("Executed layers", as_svg(utilisation_figure(used))),) if (used := utilisation(run)) else ()),
        *(_accuracy_sections(run.evaluation) if run.evaluation else ()),
        ("Config", f"<pre>{html.escape(OmegaConf.to_yaml(OmegaConf.create(run.config)))}</pre>"),
    ]
    return page(f"Run {run.folder.resolve().name}", sections)


def page(title: str, sections: Iterable[tuple[str, str]]) -> str:
    """A whole page of sections, each a title and its HTML."""
    name = html.escape(title)
    body = "\n".join(f"<h2>{html.escape(heading)}</h2>\n{content}" for heading, content in sections)
    return f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style></head>\n<body><h1>{name}</h1>\n{body}\n</body></html>\n'


def _stage_rows(run: Run) -> Iterable[tuple[str, ...]]:
    for name, lines in run.steps.items():
        seconds, loss = sum(line["step_time_s"] for line in lines), lines[-1]["loss"]
        yield (
            name,
            f"{lines[-1]['step'] + 1} of {run.num_steps(name)}",
            "n/a" if loss is None else f"{loss:.3f}",
            f"{_executed(run, lines):.1%}",
            f"{sum(line['tokens'] for line in lines) / seconds:,.0f}",
            *(_mean_rate(lines, field, form) for field, form in SHOWN_RATES.items()),
            f"{seconds:.1f}",
        )


def _validation_rows(run: Run) -> Iterable[tuple[str, ...]]:
    for name, found in run.validations.items():
        last, known = found[-1]["loss"], [line for line in found if line["loss"] is not None]
        lowest = min(known, key=lambda line: float(line["loss"]), default=None)
        yield (
            name,
            str(len(found)),
            "n/a" if last is None else f"{last:.4f}",
            *(("n/a", "n/a") if lowest is None else (f"{lowest['loss']:.4f}", str(lowest["step"]))),
            f"{found[-1]['samples']:,}",
            f"{sum(line['seconds'] for line in found):.1f}",
        )


def _mean_rate(lines: list[Line], field: str, form: str) -> str:
    """Over the seconds of the steps that have it."""
    known = [line for line in lines if line.get(field) is not None]
    seconds = sum(line["step_time_s"] for line in known)
    return format(sum(line[field] * line["step_time_s"] for line in known) / seconds, form) if known else "n/a"


def _executed(run: Run, lines: list[Line]) -> float:
    return 1 - sum(line["layers_skipped"] for line in lines) / (run.num_layers * len(lines))


def _why_sections(run: Run, planned: Planned | None) -> Iterable[tuple[str, str]]:
    """What each stage loses, most first, below where its seconds went."""
    for facts in facts_of(run, planned):
        told = "".join(map(_listed, findings(facts)))
        yield (
            f"Why {facts.stage} is not faster",
            table(HEADINGS, rows(facts)) + (f"<ol>{told}</ol>" if told else f"<p>{NOTHING}</p>"),
        )


def _listed(finding: Finding) -> str:
    remedies = "".join(f"<li>{html.escape(remedy)}</li>" for remedy in finding.remedies)
    return f"<li>{html.escape(finding.line)}<ul>{remedies}</ul></li>"


def _planned_sections(run: Run, planned: Planned | None) -> Iterable[tuple[str, str]]:
    if planned is None or not (found := beside_plan(run, planned)):
        return
    rows = [
        (
            f"{stage}: {name}",
            *_measured_beside(beside.measured[name], predicted, None if name in SHARES else beside.uncertainty),
        )
        for stage, beside in found.items()
        for name, predicted in beside.planned.items()
    ]
    yield (
        "Measured beside planned",
        f"<p>{html.escape(_planned_where(planned))}</p>"
        + table(("", "measured", "planned", "plan's uncertainty", "measured / planned"), rows)
        + as_svg(planned_figure(found)),
    )


def _planned_where(planned: Planned) -> str:
    """On what a prediction is for, and with what in mind."""
    assumed = ", ".join(f"{key}={json.dumps(value)}" for key, value in planned["assumptions"].items())
    return (
        f"Planned for {planned['num_gpus']} x {planned['hardware']}, as megatron-sts plan models it: it is not known whether the run "
        f"was on that. Assumed: {assumed}."
    )


def _measured_beside(measured: float | None, planned: float, uncertainty: float | None) -> tuple[str, str, str, str]:
    shown, sure = f"{planned:.4g}", "" if uncertainty is None else f"± {uncertainty:.0%}"
    if measured is None:
        return "n/a", shown, sure, "n/a"
    return f"{measured:.4g}", shown, sure, f"{measured / planned:.3f}" if planned else "n/a"


def _accuracy_sections(evaluation: dict[str, Any]) -> Iterable[tuple[str, str]]:
    for split, families in evaluation["splits"].items():
        rows = [
            (name, f"{found['accuracy']:.3f}", f"{found['standard_error']:.3f}", str(found["num_questions"]))
            for name, found in families.items()
        ]
        yield f"Accuracy: {split}", table(("family", "accuracy", "standard error", "questions"), rows)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """As HTML; everything is escaped."""

    def row(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + row(header, "th") + "".join(row(cells, "td") for cells in rows) + "</table>"
