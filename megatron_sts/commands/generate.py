"""``megatron-sts generate``: a question to a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_sts.commands.arguments import Commands, add_command, add_max_new_tokens, add_nproc, add_overrides
from megatron_sts.config.errors import refuse
from megatron_sts.launch import fork


def add(commands: Commands) -> None:
    """The arguments."""
    generate = add_command(
        commands,
        "generate",
        run,
        help="ask a trained model something and print its answer",
        description="Ask a trained model something and print its answer. Greedy unless a temperature is given. In this process, "
        "or on as many local ranks as --nproc or overrides like parallel.tensor_model_parallel_size=2 ask for.",
    )
    generate.add_argument(
        "source", metavar="SOURCE", type=Path, help="a run's folder, a checkpoint or a weights folder"
    )
    add_overrides(generate, "the model's")
    generate.add_argument(
        "--prompt", metavar="TEXT", required=True, help="the question; <image> says where an image stands"
    )
    generate.add_argument(
        "--image",
        type=Path,
        metavar="FILE",
        action="append",
        default=[],
        help="an image; may be repeated. They take the places <image> in order; if there are more images than places, the first "
        "ones stand before the prompt",
    )
    add_max_new_tokens(generate, 256)
    _add_sampling(generate)
    generate.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end the answer before this text; may be repeated"
    )
    generate.add_argument(
        "--vtc", action="store_true", help="compress images as at the end of the last stage (default: see all tokens)"
    )
    add_nproc(generate)


def _add_sampling(generate: argparse.ArgumentParser) -> None:
    generate.add_argument(
        "--temperature", type=float, metavar="T", default=0.0, help="draw tokens (default: 0, greedy)"
    )
    generate.add_argument("--top-p", type=float, metavar="P", default=1.0, help="draw from the likeliest share P")
    generate.add_argument("--top-k", type=int, metavar="K", default=0, help="draw from the K likeliest tokens")
    generate.add_argument("--seed", type=int, metavar="N", default=0, help="of what is drawn (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Ask, on this process or on local ranks."""
    for option, value, off in (("--top-p", args.top_p, 1.0), ("--top-k", args.top_k, 0)):
        if args.temperature == 0 and value != off:
            refuse(option, value, "nothing is drawn at --temperature=0", "give a temperature, as 1, or remove it")
    try:
        args.prompt.encode("utf-8")
    except UnicodeEncodeError:  # Python keeps bytes that are no text as halves of surrogate pairs
        refuse(
            "--prompt", ascii(args.prompt), "not all of it is text", "write it in the shell's encoding, mostly UTF-8"
        )
    fork.stay_single_threaded()
    with fork.uncollected():
        from megatron_sts.commands.answer import Asked, Sampling, ask

    sampling = Sampling(args.temperature, args.top_p, args.top_k, args.seed)
    asked = Asked(
        args.source, args.overrides, args.prompt, args.image, args.max_new_tokens, args.stop, sampling, args.vtc
    )
    return ask(asked, args.nproc)
