"""``megatron-sts convert`` and ``verify``: what was asked for, and what came of it in a line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from megatron_sts.config.checks import refuse
from megatron_sts.config.errors import ConfigError

INTERRUPTED = 130


def to_sts(hf: Path | None, vision: Path | None, language: Path | None, sts: Path) -> int:
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


def to_hf(sts: Path, hf: Path) -> int:
    """From a weights folder, a run's folder or a checkpoint. Returns the exit status."""
    from megatron_sts.convert import sts_to_hf
    from megatron_sts.convert.sources import open_source

    _check_folder("--sts", sts)
    source = open_source(sts)
    status = _run(lambda: sts_to_hf.convert(source, hf), hf)
    if not status and source.extras.lacks_tokenizer:
        print(f"{hf} has no tokenizer: the run's is a SentencePiece file, which transformers does not read")
    return status


def _run(convert: Callable[[], bool], out: Path) -> int:
    try:
        is_new = convert()
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on with {out}", file=sys.stderr)
        return INTERRUPTED
    print(f"{'converted' if is_new else 'is converted already'}: {out}")
    return 0


def _check_folder(field: str, path: Path | None) -> None:
    if path is not None and not path.is_dir():
        refuse(field, path, "no such folder", "correct it")
