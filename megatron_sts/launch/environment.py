"""Is this process a rank that torchrun or srun started? Must not know torch."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

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
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        return Rank(rank, int(environment.get("LOCAL_RANK", "0")), world_size)
    num_tasks = int(environment.get("SLURM_NTASKS", "1"))
    if "SLURM_PROCID" in environment and "MASTER_ADDR" in environment and num_tasks > 1:
        return Rank(int(environment["SLURM_PROCID"]), int(environment.get("SLURM_LOCALID", "0")), num_tasks)
    return None


def join(rank: Rank, environment: MutableMapping[str, str]) -> None:
    """Give torch.distributed the variables it reads, whichever launcher this rank has."""
    environment.update(RANK=str(rank.rank), LOCAL_RANK=str(rank.local_rank), WORLD_SIZE=str(rank.world_size))
    environment.setdefault("MASTER_PORT", DEFAULT_PORT)
