"""The command line: parses arguments and hands over to ``commands``. Imports nothing heavy, and knows no command's arguments."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from megatron_sts import __version__
from megatron_sts.commands import (
    config,
    convert,
    data,
    doctor,
    dryrun,
    evaluate,
    examples,
    generate,
    launch_slurm,
    plan,
    report,
    sweep,
    train,
    verify,
)
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.nearest import nearest

COMMANDS = (
    train,
    sweep,
    launch_slurm,
    plan,
    dryrun,
    data,
    generate,
    evaluate,
    convert,
    verify,
    report,
    examples,
    config,
    doctor,
)
"""In the order of ``--help``. Each declares its arguments (``add``) and imports what it needs when it runs."""

PROGRAM = "megatron-sts"
BAD_USAGE = 2
"""Exit status for wrong arguments and wrong configs."""


class _Parser(argparse.ArgumentParser):
    """Errors are one line; options may stand between and behind the overrides. Parsed arguments have ``options``: the command's."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        found, rest = super().parse_known_args(args, namespace)
        if "options" not in found:  # the innermost command comes first
            found.options = [option for option in self._option_string_actions if option.startswith("--")]
        return found, rest

    def error(self, message: str) -> NoReturn:
        _fail(f"{message} (see {self.prog} --help)")
        raise SystemExit(BAD_USAGE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    takes_overrides = "overrides" in args
    unknown = [word for word in rest if word.startswith("-") or not takes_overrides]
    if unknown:
        parser.error(f"unrecognized argument {unknown[0]!r}{_meant(unknown[0], args.options, takes_overrides)}")
    if takes_overrides:
        args.overrides += rest
    try:
        return int(args.run(args))
    except ConfigError as error:
        _fail(str(error))
        return BAD_USAGE
    except KeyboardInterrupt:
        print(f"{PROGRAM}: stopped by SIGINT", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away: no complaint at exit
        return 1
    except OSError as error:  # a folder that cannot be written, a full disk
        if error.filename is None or isinstance(error, FileNotFoundError):
            raise
        _fail(f"{error.filename}: {error.strerror}")
        return 1


def _meant(word: str, options: Sequence[str], takes_overrides: bool) -> str:
    """What somebody who wrote it wanted, if that can be guessed."""
    name, equals, value = word.partition("=")
    key = name.removeprefix("--")
    if takes_overrides:
        from megatron_sts.config.schema import RunConfig

        if key.partition(".")[0] in RunConfig.model_fields:
            return f"; overrides have no dashes: {key}={value if equals else 'VALUE'}"
    closest = nearest(name, options)
    return f"; did you mean {closest}?" if closest else ""


def _fail(message: str) -> None:
    print(f"{PROGRAM}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def build_parser() -> argparse.ArgumentParser:
    """All commands with their arguments."""
    parser: argparse.ArgumentParser = _Parser(
        prog=PROGRAM, description="Train multimodal LLMs on megatron-core with the Sparse Training Scheme."
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
