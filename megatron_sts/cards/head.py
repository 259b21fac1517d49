"""A card in words: cells for tables, and the head of its example's README."""

from __future__ import annotations

from megatron_sts.cards.card import Card, Evidence, Figure, Needs, Result

BEGIN, END = "<!-- card -->\n", "<!-- /card -->\n"
UNITS = (("h", 1), ("min", 60), ("s", 3600))


def readme_head(card: Card) -> str:
    """Markdown: the README's first lines, up to a line that ends them."""
    rows = [("needs", needs_in_words(card.needs)), ("a step", steps_in_words(card.needs))]
    for evidence in card.evidence:
        rows.append(("status", status_in_words(evidence)))
        labels = ("expected", *[""] * (len(evidence.results) - 1))
        rows += zip(labels, map(result_in_words, evidence.results), strict=True)
    lines = ["| | |", "|---|---|", *(f"| {label} | {text} |" for label, text in rows)]
    block = "\n".join([*lines, "", "```bash", card.command, "```"])
    return f"# {card.title}\n\n{BEGIN}{block}\n{END}"


def needs_in_words(needs: Needs) -> str:
    """Devices, memory and time."""
    devices = f"{needs.devices} {needs.device}{'s' if needs.devices > 1 else ''}"
    memory = "memory not known" if needs.memory_gib is None else f"{needs.memory_gib:.3g} GiB of each"
    if "CPU" in needs.device:
        memory = memory.replace("of each", "a rank")
    return f"{devices}, {memory}, {_duration(needs.hours)}"


def steps_in_words(needs: Needs) -> str:
    """Seconds of each stage's steps."""
    return ", ".join(f"{stage} {figure_in_words(step)} s" for stage, step in needs.step_s.items())


def status_in_words(evidence: Evidence) -> str:
    """How, when and with what code."""
    of = f": {evidence.of}" if evidence.of else ""
    return f"{evidence.status} ({evidence.date}, {evidence.commit}){of}"


def result_in_words(result: Result) -> str:
    """Name, number, unit and tolerance."""
    exact = "" if result.tolerance else ", exactly"
    return f"{result.what}: {figure_in_words(result)}{f' {result.unit}' if result.unit else ''}{exact}"


def figure_in_words(figure: Figure) -> str:
    """A number as far as it is known: to two digits of its tolerance, or one if the second is 0; exact ones as they are."""
    if figure.tolerance is None:
        return f"{figure.value:.3g}"
    if not figure.tolerance:
        return f"{figure.value:g}"
    mantissa, _, exponent = f"{figure.tolerance:.1e}".partition("e")
    decimals = max(0, (0 if mantissa.endswith("0") else 1) - int(exponent))
    return f"{figure.value:.{decimals}f} ± {figure.tolerance:.{decimals}f}"


def _duration(hours: Figure) -> str:
    unit, factor = next((unit, factor) for unit, factor in UNITS if hours.value * factor >= 1 or unit == "s")
    tolerance = None if hours.tolerance is None else hours.tolerance * factor
    return f"{figure_in_words(Figure(value=hours.value * factor, tolerance=tolerance))} {unit}"
