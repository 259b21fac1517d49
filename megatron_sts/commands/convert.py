"""``megatron-sts convert``: what was asked for, and what came of it in a line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_sts.commands.arguments import Commands, add_command, add_folder, add_group
from megatron_sts.commands.interrupted import say_interrupted
from megatron_sts.config.errors import ConfigError, refuse
from megatron_sts.config.run_folder import is_of_run


def add(commands: Commands) -> None:
    """``convert``, from and to each format."""
    directions = add_group(
        commands,
        "convert",
        help="models of Hugging Face and megatron-core in and out",
        description="Turn models of Hugging Face or megatron-core into weights folders that any parallel layout loads, and back. "
        "Goes on where an interrupted call stopped.",
    )
    to_sts = add_command(
        directions,
        "hf-to-sts",
        lambda args: convert_to_sts(args.hf, args.hf_vision, args.hf_language, args.sts),
        help="a LLaVA, a text model, or a vision and a text model that a fresh projector joins",
        description="Write a weights folder for model.vision.init, model.projector.init and model.language.init, with "
        "the model section that belongs to it in config.yaml.",
    )
    add_folder(to_sts, "--hf", "a whole model")
    add_folder(
        to_sts,
        "--hf-vision",
        "a vision model; goes with --hf-language. How pictures become squares is then the run's choice (model.vision.processing)",
    )
    add_folder(to_sts, "--hf-language", "a text model; goes with --hf-vision")
    add_folder(to_sts, "--sts", "where the weights folder is written", required=True)
    to_hf = add_command(
        directions,
        "sts-to-hf",
        lambda args: convert_to_hf(args.sts, args.hf),
        help="a weights folder or a checkpoint",
        description="Write a folder for transformers' from_pretrained, with tokenizer, processor and chat template.",
    )
    add_folder(
        to_hf,
        "--sts",
        "a weights folder, a run (its newest checkpoint), a checkpoint, or RUN_DIR/checkpoints/STAGE[/best]",
        required=True,
    )
    add_folder(to_hf, "--hf", "where the Hugging Face folder is written", required=True)
    _add_mcore(directions)


def _add_mcore(directions: Commands) -> None:
    to_sts = add_command(
        directions,
        "mcore-to-sts",
        lambda args: convert_mcore_to_sts(args.mcore, args.config, args.tokenizer, args.sts),
        help="a checkpoint of megatron-core's LLaVAModel or MimoModel",
        description="Write a weights folder of a torch_dist checkpoint, from any parallel layout. Only weights are read, and "
        "nothing is unpickled that could run code.",
    )
    add_folder(to_sts, "--mcore", "a checkpoint, or a folder of Megatron-LM's checkpoints (its newest)", required=True)
    to_sts.add_argument(
        "--config",
        type=Path,
        metavar="CONFIG",
        required=True,
        help="a config whose model section describes it: YAML file, or a folder that holds config.yaml",
    )
    add_folder(
        to_sts,
        "--tokenizer",
        "a Hugging Face tokenizer to keep beside the weights; sts-to-hf and generate need it there",
    )
    add_folder(to_sts, "--sts", "where the weights folder is written", required=True)
    to_mcore = add_command(
        directions,
        "sts-to-mcore",
        lambda args: convert_sts_to_mcore(args.sts, args.like, args.mcore),
        help="a weights folder or a checkpoint, for megatron-core's LLaVAModel or MimoModel",
        description="Write a torch_dist checkpoint without optimizer, which any parallel layout loads.",
    )
    add_folder(
        to_mcore,
        "--sts",
        "a weights folder, a run (its newest checkpoint), a checkpoint, or RUN_DIR/checkpoints/STAGE[/best]",
        required=True,
    )
    add_folder(
        to_mcore,
        "--like",
        "a checkpoint of the script that will load it: which names the weights get. What it holds is not read",
        required=True,
    )
    add_folder(to_mcore, "--mcore", "where the folder of a checkpoint is written", required=True)


def convert_to_sts(hf: Path | None, vision: Path | None, language: Path | None, sts: Path) -> int:
    """From one Hugging Face folder, or from two halves. Returns the exit status."""
    from megatron_sts.convert import hf_to_sts

    for field, path in (("--hf", hf), ("--hf-vision", vision), ("--hf-language", language)):
        _check_folder(field, path)
    if (hf is None) == (vision is None and language is None):
        raise ConfigError("--hf: give it alone, or --hf-vision and --hf-language together")
    if hf is not None:
        return _run(lambda: hf_to_sts.convert(hf_to_sts.whole(hf), sts), sts)
    if vision is None or language is None:
        missing = "--hf-vision" if vision is None else "--hf-language"
        raise ConfigError(f"{missing}: missing; give both halves, or a whole model as --hf")
    return _run(lambda: hf_to_sts.convert(hf_to_sts.two_halves(vision, language), sts), sts)


def convert_to_hf(sts: Path, hf: Path) -> int:
    """From a weights folder, a run's folder or a checkpoint. Returns the exit status."""
    from megatron_sts.convert import sts_to_hf
    from megatron_sts.convert.sources import open_source

    _check_source(sts)
    source = open_source(sts)
    status = _run(lambda: sts_to_hf.convert(source, hf), hf)
    if not status and source.extras.lacks_tokenizer:
        print(f"{hf} has no tokenizer: the run's is a SentencePiece file, which transformers does not read")
    return status


def convert_mcore_to_sts(mcore: Path, config: Path, tokenizer: Path | None, sts: Path) -> int:
    """From a checkpoint of megatron-core. Returns the exit status."""
    from megatron_sts.convert import mcore_to_sts

    for field, path in (("--mcore", mcore), ("--tokenizer", tokenizer)):
        _check_folder(field, path)
    origin = mcore_to_sts.open_origin(mcore, config, tokenizer)
    return _run(lambda: mcore_to_sts.convert(origin, sts), sts)


def convert_sts_to_mcore(sts: Path, like: Path, mcore: Path) -> int:
    """Into a checkpoint of megatron-core. Returns the exit status."""
    from megatron_sts.convert import sts_to_mcore

    _check_source(sts)
    _check_folder("--like", like)
    target = sts_to_mcore.plan(sts, like)
    return _run(lambda: sts_to_mcore.convert(target, mcore), mcore)


def _run(convert: Callable[[], bool], out: Path) -> int:
    try:
        is_new = convert()
    except KeyboardInterrupt:
        return say_interrupted(out)
    print(f"{'converted' if is_new else 'is converted already'}: {out}")
    return 0


def _check_source(path: Path) -> None:
    """A checkpoint may be named by its stage, and needs no folder of that name."""
    if not is_of_run(path):
        _check_folder("--sts", path)


def _check_folder(field: str, path: Path | None) -> None:
    if path is not None and not path.is_dir():
        refuse(field, path, "no such folder", "correct it")
