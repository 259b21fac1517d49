"""The command line: parses arguments and hands over. Imports nothing heavy, and knows nothing of how a command works."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_sts import __version__
from megatron_sts.config.errors import ConfigError, refuse

PROGRAM = "megatron-sts"
BAD_USAGE = 2
"""Exit status for wrong arguments and wrong configs."""


class _Parser(argparse.ArgumentParser):
    """Errors are one line; options may stand between and behind the overrides."""

    def error(self, message: str) -> NoReturn:
        _fail(f"{message} (see {self.prog} --help)")
        raise SystemExit(BAD_USAGE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = _build_parser()
    args, rest = parser.parse_known_args(argv)
    takes_overrides = args.command in (_train, _plan, _generate, _eval)
    unknown = [word for word in rest if word.startswith("-") or not takes_overrides]
    if unknown:
        parser.error(f"unrecognized argument {unknown[0]!r}")
    if takes_overrides:
        args.overrides += rest
    args.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return args.command(args)
    except ConfigError as error:
        _fail(str(error))
        return BAD_USAGE
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away: no complaint at exit
        return 1


def _fail(message: str) -> None:
    print(f"{PROGRAM}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM, description="Train multimodal LLMs on megatron-core with the Sparse Training Scheme."
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_plan(commands)
    _add_data(commands)
    _add_generate(commands)
    _add_eval(commands)
    _add_convert(commands)
    _add_verify(commands)
    _add_report(commands)
    _add_doctor(commands)
    return parser


def _add_train(commands: argparse._SubParsersAction[_Parser]) -> None:
    train = commands.add_parser(
        "train",
        help="train a model, on local ranks or as a rank of torchrun/srun",
        description="Train a model. Under torchrun or srun this process is one rank; otherwise it starts local ranks. "
        "Resumes from RUN_DIR if that holds a checkpoint.",
    )
    _add_config(train)
    train.add_argument(
        "--nproc", type=_positive, metavar="N", help="local ranks (default: as many as the config needs)"
    )
    train.add_argument("--run-dir", type=Path, metavar="DIR", help="where the run is written (default: runs/NAME)")
    train.add_argument(
        "--dry-run", action="store_true", help="check the config and print what it comes to; run nothing"
    )
    train.add_argument("--json", action="store_true", help="with --dry-run: one JSON object on stdout")
    train.set_defaults(command=_train)


def _add_plan(commands: argparse._SubParsersAction[_Parser]) -> None:
    plan = commands.add_parser(
        "plan",
        help="plan the pipeline layout, and show what layer skipping gains with it",
        description="Plan the pipeline layout of a run for its layer skipping (what parallel.layout=auto chooses), and show "
        "the speed-up of each sampler with its best layout. Runs nothing.",
    )
    _add_config(plan)
    plan.add_argument("--nproc", type=_positive, metavar="N", help="ranks (default: as many as the config needs)")
    plan.add_argument("--json", action="store_true", help="one JSON object on stdout")
    plan.set_defaults(command=_plan)


def _add_config(command: _Parser) -> None:
    command.add_argument("config", metavar="CONFIG", type=Path, help="YAML file, or a folder that holds config.yaml")
    command.add_argument("overrides", metavar="key.path=value", nargs="*", help="config values that replace the file's")


def _add_data(commands: argparse._SubParsersAction[_Parser]) -> None:
    data = commands.add_parser("data", help="prepare datasets", description="Prepare datasets.")
    prepare = data.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "prepare",
        help="turn a LLaVA JSON and its pictures into shards for data.source=energon",
        description="Turn a LLaVA JSON and its pictures into WebDataset shards that Energon reads. Entries that cannot be "
        "used are left out and listed in DIR/rejected.jsonl. Goes on where an interrupted run stopped.",
    )
    prepare.add_argument(
        "source", metavar="JSON", type=Path, help="a list of {id, image, conversations}, or one a line"
    )
    prepare.add_argument("--images", type=Path, metavar="DIR", help="folder of the pictures (default: the JSON's)")
    prepare.add_argument("--out", type=Path, metavar="DIR", required=True, help="where the dataset is written")
    prepare.add_argument("--shard-size-mb", type=_positive, metavar="N", default=256, help="MiB a shard (default: 256)")
    prepare.add_argument(
        "--num-workers", type=_positive, metavar="N", help="worker processes (default: one a CPU core)"
    )
    prepare.set_defaults(command=_data_prepare)


def _add_generate(commands: argparse._SubParsersAction[_Parser]) -> None:
    generate = commands.add_parser(
        "generate",
        help="ask a trained model something and print its answer",
        description="Ask a trained model something and print its answer. Greedy unless a temperature is given. In this process, "
        "or on as many local ranks as --nproc or overrides like parallel.tensor_model_parallel_size=2 ask for.",
    )
    generate.add_argument(
        "source", metavar="SOURCE", type=Path, help="a run's folder, a checkpoint or a weights folder"
    )
    generate.add_argument(
        "overrides", metavar="key.path=value", nargs="*", help="config values that replace the model's"
    )
    generate.add_argument(
        "--prompt", metavar="TEXT", required=True, help="the question; <image> says where an image stands"
    )
    generate.add_argument(
        "--image", type=Path, metavar="FILE", action="append", default=[], help="an image, in order; may be repeated"
    )
    generate.add_argument(
        "--max-new-tokens", type=_positive, metavar="N", default=256, help="longest answer, in tokens (default: 256)"
    )
    generate.add_argument(
        "--temperature", type=float, metavar="T", default=0.0, help="draw tokens (default: 0, greedy)"
    )
    generate.add_argument("--top-p", type=float, metavar="P", default=1.0, help="draw from the likeliest share P")
    generate.add_argument("--top-k", type=int, metavar="K", default=0, help="draw from the K likeliest tokens")
    generate.add_argument("--seed", type=int, metavar="N", default=0, help="of what is drawn (default: 0)")
    generate.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end the answer before this text; may be repeated"
    )
    generate.add_argument(
        "--vtc", action="store_true", help="compress images as at the end of the last stage (default: see all tokens)"
    )
    generate.add_argument("--nproc", type=_positive, metavar="N", help="local ranks (default: as many as needed)")
    generate.set_defaults(command=_generate)


def _add_eval(commands: argparse._SubParsersAction[_Parser]) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="ask a checkpoint the questions of public benchmarks",
        description="Ask a checkpoint the questions of public benchmarks, greedily and with LLaVA-1.5's prompts, and score the "
        "answers with the official metrics. Benchmarks: gqa, vqav2, scienceqa, scienceqa_img, pope, mme (PATH: the folder of "
        "its official files) and scenes (embedded, no PATH). Started again, it asks only what has no answer yet.",
    )
    evaluate.add_argument(
        "source", metavar="CHECKPOINT", type=Path, help="a run's folder, one of its checkpoints, or a folder of weights"
    )
    evaluate.add_argument(
        "overrides", metavar="key.path=value", nargs="*", help="config values that replace the checkpoint's"
    )
    evaluate.add_argument(
        "--benchmark", metavar="NAME=PATH", action="append", required=True, help="what to ask; may be repeated"
    )
    evaluate.add_argument(
        "--images",
        metavar="NAME=DIR",
        action="append",
        default=[],
        help="a benchmark's images, if not in their usual place",
    )
    evaluate.add_argument("--out", type=Path, metavar="DIR", help="answers and results (default: eval/ in the run)")
    evaluate.add_argument("--nproc", type=_positive, metavar="N", help="local ranks (default: as many as needed)")
    evaluate.add_argument(
        "--max-new-tokens", type=_positive, metavar="N", default=128, help="longest answer, in tokens (default: 128)"
    )
    evaluate.set_defaults(command=_eval)


def _add_convert(commands: argparse._SubParsersAction[_Parser]) -> None:
    convert = commands.add_parser(
        "convert",
        help="Hugging Face models in and out",
        description="Turn Hugging Face models into weights folders that any parallel layout loads, and back. "
        "Goes on where an interrupted call stopped.",
    )
    directions = convert.add_subparsers(required=True, metavar="COMMAND")
    to_sts = directions.add_parser(
        "hf-to-sts",
        help="a LLaVA, a text model, or a vision and a text model that a fresh projector joins",
        description="Write a weights folder for model.vision.init, model.projector.init and model.language.init, with "
        "the model section that belongs to it in config.yaml.",
    )
    to_sts.add_argument("--hf", type=Path, metavar="DIR", help="a whole model")
    to_sts.add_argument("--hf-vision", type=Path, metavar="DIR", help="a vision model; goes with --hf-language")
    to_sts.add_argument("--hf-language", type=Path, metavar="DIR", help="a text model; goes with --hf-vision")
    to_sts.add_argument("--sts", type=Path, metavar="DIR", required=True, help="where the weights folder is written")
    to_sts.set_defaults(command=_convert_to_sts)
    to_hf = directions.add_parser(
        "sts-to-hf",
        help="a weights folder or a checkpoint",
        description="Write a folder for transformers' from_pretrained, with tokenizer, processor and chat template.",
    )
    to_hf.add_argument(
        "--sts",
        type=Path,
        metavar="DIR",
        required=True,
        help="a weights folder, a run (its newest checkpoint) or a checkpoint",
    )
    to_hf.add_argument("--hf", type=Path, metavar="DIR", required=True, help="where the Hugging Face folder is written")
    to_hf.set_defaults(command=_convert_to_hf)


def _add_verify(commands: argparse._SubParsersAction[_Parser]) -> None:
    verify = commands.add_parser(
        "verify",
        help="compare a converted model with the original in transformers",
        description="Run transformers and megatron-sts in fp32 on the same random tokens and images, and print the largest "
        "difference of their logits. Exits with 1 if it is larger than rounding explains.",
    )
    verify.add_argument("--hf", type=Path, metavar="DIR", required=True, help="a Hugging Face folder")
    verify.add_argument("--sts", type=Path, metavar="DIR", required=True, help="a weights folder")
    verify.set_defaults(command=_verify)


def _add_report(commands: argparse._SubParsersAction[_Parser]) -> None:
    report = commands.add_parser(
        "report",
        help="write what a run came to, or compare two runs",
        description="Write report.html into each run's folder. Two folders, dense then STS, are also compared: "
        "comparison.json, comparison.md and comparison.png.",
    )
    report.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=Path, help="folder that train wrote")
    report.add_argument("--out", type=Path, metavar="DIR", help="where to compare (default: the folder above both)")
    report.set_defaults(command=_report)


def _add_doctor(commands: argparse._SubParsersAction[_Parser]) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="show what this machine has and what is missing for what",
        description="Show what this machine has, which kernels will be used, and what is missing for what.",
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object on stdout")
    doctor.set_defaults(command=_doctor)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _train(args: argparse.Namespace) -> int:
    if args.json and not args.dry_run:
        raise ConfigError("--json: goes with --dry-run only")
    from megatron_sts.commands import train as command

    return command.train(args.config, args.overrides, args.run_dir, args.nproc, dry_run=args.dry_run, as_json=args.json)


def _plan(args: argparse.Namespace) -> int:
    from megatron_sts.commands import plan

    return plan.plan(args.config, args.overrides, args.nproc, as_json=args.json)


def _data_prepare(args: argparse.Namespace) -> int:
    from megatron_sts.data import prepare

    num_workers = args.num_workers or os.cpu_count() or 1
    return prepare.command(args.source, args.images, args.out, args.shard_size_mb, num_workers)


def _generate(args: argparse.Namespace) -> int:
    for option, value, off in (("--top-p", args.top_p, 1.0), ("--top-k", args.top_k, 0)):
        if args.temperature == 0 and value != off:
            refuse(option, value, "nothing is drawn at --temperature=0", "give a temperature, as 1, or remove it")
    from megatron_sts.commands import generate as generation

    sampling = generation.Sampling(args.temperature, args.top_p, args.top_k, args.seed)
    asked = generation.Asked(
        args.source, args.overrides, args.prompt, args.image, args.max_new_tokens, args.stop, sampling, args.vtc
    )
    return generation.generate(asked, args.nproc, args.argv)


def _eval(args: argparse.Namespace) -> int:
    from megatron_sts.commands import evaluate as benchmarks

    asked = benchmarks.Asked(args.source, args.overrides, args.benchmark, args.images, args.out, args.max_new_tokens)
    return benchmarks.evaluate(asked, args.nproc)


def _convert_to_sts(args: argparse.Namespace) -> int:
    from megatron_sts.commands import convert as command

    return command.to_sts(args.hf, args.hf_vision, args.hf_language, args.sts)


def _convert_to_hf(args: argparse.Namespace) -> int:
    from megatron_sts.commands import convert as command

    return command.to_hf(args.sts, args.hf)


def _verify(args: argparse.Namespace) -> int:
    from megatron_sts.convert import verify

    return verify.command(args.hf, args.sts)


def _report(args: argparse.Namespace) -> int:
    from megatron_sts.commands import report as command

    return command.report(args.run_dirs, args.out)


def _doctor(args: argparse.Namespace) -> int:
    from megatron_sts.commands import doctor
    from megatron_sts.runtime import probe

    machine = probe.probe()
    doctor.print_json(machine) if args.json else doctor.print_table(machine)
    return 0
