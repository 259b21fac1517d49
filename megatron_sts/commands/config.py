"""``megatron-sts config``: what every config key means, takes and defaults to."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from megatron_sts.commands.arguments import Commands, add_command, add_json

if TYPE_CHECKING:
    from megatron_sts.config.describe import Key


def add(commands: Commands) -> None:
    """The arguments."""
    config = add_command(
        commands,
        "config",
        run,
        help="say what a config key means, takes and defaults to",
        description="Without KEY: all keys. With a section: its keys. Otherwise a whole key (stages.finetune.lds.alpha) or its "
        "end (lds.alpha, alpha).",
    )
    config.add_argument("key", metavar="KEY", nargs="?", help="dotted, as in overrides")
    config.add_argument("--schema", action="store_true", help="print the JSON Schema of config files, for editors")
    add_json(config)


def run(args: argparse.Namespace) -> int:
    """Print what was asked for."""
    from megatron_sts.config.describe import find, keys
    from megatron_sts.config.errors import ConfigError
    from megatron_sts.config.schema import RunConfig

    if args.schema:
        if args.key or args.json:
            raise ConfigError("--schema: takes neither KEY nor --json, it is JSON and whole")
        print(json.dumps(RunConfig.model_json_schema(), indent=2))
        return 0
    found = keys() if args.key is None else find(args.key)
    if args.json:
        print(json.dumps([asdict(key) for key in found]))
    else:
        _print(found, is_short=args.key is None)
    return 0


def _print(found: list[Key] | tuple[Key, ...], *, is_short: bool) -> None:
    """``is_short``: a line a key; else all that is known."""
    from rich.console import Console
    from rich.markup import escape
    from rich.padding import Padding

    console = Console(highlight=False, soft_wrap=is_short)
    for key in found:
        default = "must be given" if key.default is None else f"default {key.default}"
        if is_short:
            console.print(
                f"[bold]{escape(key.name)}[/]"
                + ("" if key.is_section else f"  {escape(key.values)}; {escape(default)}")
            )
            continue
        console.print(f"[bold]{escape(key.name)}[/]  {escape(key.values)}; {escape(default)}")
        if key.meaning:
            console.print(Padding(escape(key.meaning), (0, 0, 0, 4)))
