"""``python -m megatron_sts.launch.slurm_task WORDS``: what the batch script's srun starts; WORDS are megatron-sts's own.

With STS_LAUNCHER=torchrun it is the one task of its node, meets those of the others, keeps the node's ranks as torchrun does,
and says in one line why they ended; with STS_LAUNCHER=srun it becomes a rank. WORDS end with the run's folder. Must not know
torch until ranks start, nor what a rank does.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_sts.launch import outcome
from megatron_sts.launch.cause import Failure, first, words_in
from megatron_sts.launch.environment import node_name
from megatron_sts.launch.failure import LAUNCHED, claim, is_lost
from megatron_sts.launch.terminated import TERM_IS_HELD

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

CPP_LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"
MEET_S = "STS_MEET_S"
"""The environment variable with the seconds within which all nodes come: one that has to fetch an image is slow to start."""


def main() -> int:
    """Does the work of this task, and returns its exit status."""
    # Before anything makes a thread. What is started from here inherits it: nothing dies of a signal for the ranks.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGTERM))
    os.environ[TERM_IS_HELD] = "1"
    if warning := unlike_asked(os.environ, len(os.sched_getaffinity(0))):
        print(f"megatron-sts: warning: {warning}", file=sys.stderr, flush=True)
    is_head = os.environ["SLURM_NODEID"] == "0"
    host = meeting_host(os.environ["STS_MEETING_HOSTS"].split(), is_head=is_head)
    command = [sys.executable, "-m", "megatron_sts", *sys.argv[1:]]
    if os.environ["STS_LAUNCHER"] == "srun":
        become_rank(command, host)
    return keep_ranks(command, host, is_head=is_head)


def meeting_host(candidates: Iterable[str], *, is_head: bool) -> str:
    """The first of the candidates that names the first node from here.

    A name may not resolve; on another node, one that resolves to that node's own loopback (127.0.1.1, as Debian's installer
    writes) would lead back to it.
    """
    known = [host for host in candidates if _addresses(host)]
    for host in known:
        if is_head or not all(address.is_loopback for address in _addresses(host)):
            return host
    if not known:
        raise SystemExit(
            f"megatron-sts: error: {socket.gethostname()}: the first node is known as {' '.join(candidates)}, and none of "
            "these resolves here; set MASTER_ADDR to an address of it that every node reaches"
        )
    return known[0]  # nodes that are all on one machine


def _addresses(host: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]


def agent_address(host: str, node: int) -> str:
    """What torch numbers nodes by, in the order of text; only that of the first node is ever called.

    So ranks stand in SLURM's order of nodes, which knows the network, and rank 0 beside the batch script, which reads what it
    wrote: on a shared file system others see it later.
    """
    return host if node == 0 else f"~{node:06d}"


def unlike_asked(environment: Mapping[str, str], num_cpus: int) -> str:
    """What to say if this task may not use as many CPUs as were asked for it; empty if it may."""
    asked = int(environment["STS_CPUS_PER_TASK"])
    if num_cpus >= asked:
        return ""
    threads = environment.get("OMP_NUM_THREADS", "1")
    return (
        f"task {environment['SLURM_PROCID']} on {environment.get('SLURMD_NODENAME') or node_name()} may use "
        f"{num_cpus} of the {asked} CPUs that were asked for it; its ranks have {threads} threads each: they will wait for each "
        "other (see --cpus-per-task, and your site's TaskPlugin)"
    )


def become_rank(command: list[str], host: str) -> NoReturn:
    """This process, from here on, is the rank whose number is the task's."""
    given = os.environ
    os.environ.update(
        RANK=given["SLURM_PROCID"],
        LOCAL_RANK=given["SLURM_LOCALID"],
        WORLD_SIZE=given["SLURM_NTASKS"],
        LOCAL_WORLD_SIZE=given["STS_RANKS_PER_NODE"],
        GROUP_RANK=given["SLURM_NODEID"],
        MASTER_ADDR=host,
    )
    os.execv(command[0], command)


def keep_ranks(command: Sequence[str], host: str, *, is_head: bool) -> int:
    """Starts this node's ranks with torch's elastic agent once all nodes have come, and waits for them; the exit status of the
    one that failed first."""
    level = os.environ.get(CPP_LOG_LEVEL)
    os.environ[CPP_LOG_LEVEL] = (
        level or "ERROR"
    )  # read at the import; below it are stack frames about a store that is gone
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    from megatron_sts.launch import meeting

    if level is None:
        del os.environ[CPP_LOG_LEVEL]  # ranks have their own
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # tens of lines about a rank that failed
    os.environ[LAUNCHED] = str(os.getpid())  # ranks end with this process, which says why
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5")
    port, meet_s, run_dir = int(os.environ["MASTER_PORT"]), meet_within_s(os.environ), Path(command[-1])
    try:
        # Kept until the end: the first node's is the server on which torch's agents meet, and where they see who is there.
        store = meeting.meet(meeting.node_member(os.environ, host, port, MEET_S), meet_s)
        elastic_launch(_agent(host, port, meet_s, is_head=is_head), command[0])(*command[1:])
        del store
    except meeting.MeetingError as error:
        if error.is_echo:  # the first node says it
            return 1
        return _give_up(run_dir, str(error), error.nodes)
    except ChildFailedError as error:
        cause = first([_failure(rank, found) for rank, found in error.failures.items()])
        if cause.words.get("is_first", True):  # else the task of another node says it
            print(f"megatron-sts: error: {node_name()}: {cause.describe()}", file=sys.stderr, flush=True)
        return 2 if cause.status == 2 else 1
    except Exception as error:  # of the agents' own meeting: it has many, and their tracebacks say no more
        known = outcome.read(run_dir)
        if is_lost(error) and known and known.outcome == "failed":
            # The first node's task has ended with the store, because its ranks failed, or it is dead: what is known of that says more.
            print(f"megatron-sts: error: {node_name()}: {known.cause}", file=sys.stderr, flush=True)
            return 1
        told = " ".join(f"{type(error).__name__}: {error}".split())
        return _give_up(run_dir, f"{node_name()}: torch's agents on the nodes lost each other at {host}:{port}: {told}")
    return 0


def meet_within_s(environment: Mapping[str, str]) -> int:
    """Seconds within which all nodes have to come."""
    given = environment.get(MEET_S, "600")
    if not given.isdecimal() or given == "0":
        raise SystemExit(f"megatron-sts: error: {MEET_S}={given}: not a number of seconds; give a whole one above 0")
    return int(given)


def _agent(host: str, port: int, meet_s: int, *, is_head: bool) -> LaunchConfig:
    from torch.distributed.launcher.api import LaunchConfig

    given = os.environ
    num_nodes = int(given["SLURM_NNODES"])
    return LaunchConfig(
        min_nodes=num_nodes,
        max_nodes=num_nodes,
        nproc_per_node=int(given["STS_RANKS_PER_NODE"]),
        run_id=f"{given['SLURM_JOB_ID']}.{given.get('SLURM_RESTART_COUNT', '0')}",
        rdzv_backend="c10d",
        rdzv_endpoint=f"{host}:{port}",
        # Who hosts the store is known: torch would compare names, which nodes with several interfaces confuse.
        rdzv_configs={"is_host": is_head, "timeout": meet_s, "join_timeout": meet_s},
        max_restarts=0,
        monitor_interval=0.1,
        local_addr=agent_address(host, int(given["SLURM_NODEID"])),
    )


def _give_up(run_dir: Path, told: str, nodes: Sequence[str] = ()) -> int:
    """Says why there are no ranks, also in the run's outcome: another start may find all nodes. The exit status."""
    print(f"megatron-sts: error: {told}", file=sys.stderr, flush=True)
    claim(run_dir, told, requeue=True, nodes=nodes)
    return 1


def _failure(rank: int, found: Any) -> Failure:
    return Failure(rank, found.exitcode, time.time(), words_in(found.error_file_data))


if __name__ == "__main__":
    sys.exit(main())
