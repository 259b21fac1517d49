"""``megatron-sts verify``: is a converted model the same as the original?"""

from __future__ import annotations

import argparse

from megatron_sts.commands.arguments import Commands, add_command, add_folder


def add(commands: Commands) -> None:
    """The arguments."""
    verify = add_command(
        commands,
        "verify",
        run,
        help="compare a converted model with the original in transformers",
        description="Run transformers and megatron-sts in fp32 on the same random tokens and pictures, most of which are "
        "not square and go through the folder's own image processor there, and print the largest "
        "difference of their logits. Exits with 1 if it is larger than rounding explains.",
    )
    add_folder(verify, "--hf", "a Hugging Face folder", required=True)
    add_folder(verify, "--sts", "a weights folder", required=True)


def run(args: argparse.Namespace) -> int:
    """Print the largest difference; 1 if rounding does not explain it."""
    from megatron_sts.convert import verify

    return verify.command(args.hf, args.sts)
