"""What the arguments of several commands have in common. Light: every start of the program imports it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

type Commands = argparse._SubParsersAction[argparse.ArgumentParser]
"""Where ``add`` of each command's file puts its parser."""

Run = Callable[[argparse.Namespace], int]
"""Does what was asked and returns the exit status. Imports what it needs itself, so that ``--help`` is there at once."""


def add_command(commands: Commands, name: str, run: Run, *, help: str, description: str) -> argparse.ArgumentParser:
    """A command that ``run`` carries out."""
    parser = commands.add_parser(name, help=help, description=description)
    parser.set_defaults(run=run)
    return parser


def add_group(commands: Commands, name: str, *, help: str, description: str) -> Commands:
    """A command that only holds others."""
    return commands.add_parser(name, help=help, description=description).add_subparsers(
        required=True, metavar="COMMAND"
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """The config of a run, and what replaces its values."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file, or a folder that holds config.yaml")
    add_overrides(parser, "the file's")


def add_overrides(parser: argparse.ArgumentParser, replaced: str) -> None:
    """They may stand anywhere behind the first argument; ``cli.main`` collects them."""
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help=f"config values that replace {replaced}")


def add_nproc(parser: argparse.ArgumentParser, default: str = "as many as needed") -> None:
    """Local ranks."""
    parser.add_argument("--nproc", type=positive, metavar="N", help=f"local ranks (default: {default})")


def add_max_new_tokens(parser: argparse.ArgumentParser, default: int) -> None:
    """The bound of an answer."""
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        default=default,
        help=f"longest answer, in tokens (default: {default})",
    )


def add_hardware(parser: argparse.ArgumentParser, what: str, default: str = "") -> None:
    """What seconds are predicted on."""
    parser.add_argument(
        "--hardware", metavar="NAME", help=f"{what}: h100, h200, a100, or a YAML file of the same form{default}"
    )
    parser.add_argument(
        "--assume",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="what no config says and seconds depend on, such as tp_comm_overlap=true (all: megatron_sts/plan/README.md)",
    )


def add_json(parser: argparse.ArgumentParser, when: str = "") -> None:
    """For programs instead of people."""
    parser.add_argument("--json", action="store_true", help=f"{when}one JSON object on stdout")


def add_folder(parser: argparse.ArgumentParser, name: str, help: str, *, required: bool = False) -> None:
    """An option that takes a folder."""
    parser.add_argument(name, type=Path, metavar="DIR", required=required, help=help)


def positive(text: str) -> int:
    """A number of things."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)
