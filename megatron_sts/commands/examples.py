"""``megatron-sts examples``: which there are, and what each needs and gives."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron_sts.commands.arguments import Commands, add_command, add_json

if TYPE_CHECKING:
    from megatron_sts.cards.card import Card


def add(commands: Commands) -> None:
    """The arguments."""
    examples = add_command(
        commands,
        "examples",
        run,
        help="list the examples: what for, what they need and give, and how",
        description="Without NAME: all examples. With one: its card, as its README begins with it.",
    )
    examples.add_argument("name", metavar="NAME", nargs="?", help="of an example, or its folder")
    add_json(examples)


def run(args: argparse.Namespace) -> int:
    """Print what was asked for."""
    from megatron_sts.cards.shelf import read_cards

    cards = read_cards(args.name)
    if args.json:
        facts = [{"name": name, **card.model_dump(mode="json")} for name, card in cards.items()]
        print(json.dumps({"examples": facts} if args.name is None else facts[0]))
    elif args.name is None:
        _print_list(cards)
    else:
        _print_card(*cards.values())
    return 0


def _print_list(cards: Mapping[str, Card]) -> None:
    """A table, and below it the commands, each in a line that can be copied."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    from megatron_sts.cards.head import needs_in_words

    console = Console(highlight=False)
    table = Table(Column("example", no_wrap=True), "what for", "needs", "status")
    for name, card in cards.items():
        in_part = [f"in part {evidence.status}" for evidence in card.evidence[1:]]
        table.add_row(name, escape(card.purpose), needs_in_words(card.needs), "; ".join([card.status, *in_part]))
    console.print(table)
    width = max(map(len, cards))
    for name, card in cards.items():
        console.print(f"{name:{width}}  [bold]{escape(card.command)}[/]", soft_wrap=True)


def _print_card(card: Card) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from megatron_sts.cards.head import needs_in_words, result_in_words, status_in_words, steps_in_words

    console = Console(highlight=False)
    table = Table.grid("", "", padding=(0, 2))
    table.add_row("needs", needs_in_words(card.needs))
    table.add_row("a step", steps_in_words(card.needs))
    for evidence in card.evidence:
        table.add_row("status", escape(status_in_words(evidence)))
        table.add_row("expected", escape("\n".join(map(result_in_words, evidence.results))))
    console.print(f"[bold]{escape(card.title)}[/]", escape(card.purpose), table, sep="\n")
    console.print(f"[bold]{escape(card.command)}[/]", soft_wrap=True)
