"""Which folder holds a checkpoint of megatron-core, as Megatron-LM lays them out. Torch-free; knows nothing of what is in it."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_sts.config.errors import refuse

TRACKER = "latest_checkpointed_iteration.txt"
"""In the folder of a run: the number of its newest checkpoint, or ``RELEASE``."""
RELEASE = "release"
"""The name of a checkpoint that begins training, without step or optimizer."""
FORMAT = "torch_dist"
_CONFIG = "metadata.json"


def find_checkpoint(folder: Path, field: str) -> Path:
    """A checkpoint itself, or the newest one of a run; ``field`` is what the user calls ``folder``.

    Raises:
        ConfigError: there is none, or it is of another format.
    """
    path = _newest(folder, field) if (folder / TRACKER).is_file() else folder
    if not (path / _CONFIG).is_file():
        why, remedy = _other_format(path)
        refuse(field, path, why, remedy)
    try:
        found = json.loads((path / _CONFIG).read_text(encoding="utf-8"))["sharded_backend"]
    except (ValueError, KeyError, TypeError) as error:
        refuse(field, path, f"its {_CONFIG} is damaged ({error})", "copy it again")
    if found != FORMAT:
        refuse(field, path, f"is of the format {found}", f"have the megatron-core that wrote it save it as {FORMAT}")
    return path


def _newest(folder: Path, field: str) -> Path:
    said = (folder / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    if said != RELEASE and not said.isdecimal():
        refuse(field, folder, f"its {TRACKER} says {said[:40]!r}, no iteration", "give one of its checkpoints")
    path = folder / (RELEASE if said == RELEASE else f"iter_{int(said):07d}")
    if not path.is_dir():
        refuse(field, folder, f"its {TRACKER} says {said}, but there is no {path.name}", "give one of its checkpoints")
    return path


def _other_format(path: Path) -> tuple[str, str]:
    """Why a folder without ``metadata.json`` is not read, and what to do."""
    if next(path.glob("mp_rank_*"), None) is not None:
        why = "is of the format torch, whose files are pickles and may run code"
        return why, f"save it again with Megatron-LM's --ckpt-convert-format {FORMAT}"
    if (path / ".metadata").is_file():
        return f"is an unfinished checkpoint, or of another format than {FORMAT}", "give another"
    return f"holds neither a checkpoint of megatron-core nor {TRACKER}", "give the folder that has either"
