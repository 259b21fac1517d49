"""Is this process a rank that torchrun or srun started? Must not know torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from megatron_sts.config.errors import refuse

DEFAULT_PORT = "29500"


@dataclass(frozen=True)
class Rank:
    """Place of this process among all ranks of the run."""

    rank: int
    local_rank: int
    world_size: int


def rank_from(environment: Mapping[str, str]) -> Rank | None:
    """The rank that torchrun (RANK, WORLD_SIZE) or srun (SLURM_PROCID, SLURM_NTASKS, MASTER_ADDR) made this process.

    A batch script has SLURM_PROCID too: only a MASTER_ADDR says that its tasks are meant to be ranks.

    Raises:
        ConfigError: it is a rank, and where ranks meet is not said, or a number is none.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        if "MASTER_ADDR" not in environment:
            refuse("RANK", environment["RANK"], "with WORLD_SIZE it makes this process a rank, but there is no MASTER_ADDR",
                   "set that too, as torchrun does, or unset both if something left them behind")  # fmt: skip
        return Rank(*(_number(environment, name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    if "SLURM_PROCID" in environment and "MASTER_ADDR" in environment and _number(environment, "SLURM_NTASKS", "1") > 1:
        return Rank(*(_number(environment, name) for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")))
    return None


def _number(environment: Mapping[str, str], name: str, default: str = "0") -> int:
    given = environment.get(name, default)
    if not given.isdecimal():
        refuse(name, given, "not a number, and it says which rank this process is", "correct it, or unset it")
    return int(given)


def node_name() -> str:
    """This machine's name: SLURM's, where there is one, which knows it by no other."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def join(rank: Rank, environment: MutableMapping[str, str]) -> None:
    """Give torch.distributed the variables it reads, whichever launcher this rank has."""
    environment.update(RANK=str(rank.rank), LOCAL_RANK=str(rank.local_rank), WORLD_SIZE=str(rank.world_size))
    environment.setdefault("MASTER_PORT", DEFAULT_PORT)
