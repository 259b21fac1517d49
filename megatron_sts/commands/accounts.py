"""What ``dryrun`` found, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from megatron_sts.dry.account import Account

GIB, TERA = 2**30, 1e12
NUM_SHOWN = 12
"""Modules that a table lists."""


def print_accounts(accounts: Sequence[Account]) -> None:
    """One row a rank; of a single one also modules and communication."""
    if not accounts:
        return
    console = Console()
    first = accounts[0]
    console.print(
        f"stage {first.stage}, step {first.step}: {first.num_microbatches} micro-batches of rows of {first.sequence_length} tokens, "
        f"{first.world_size} ranks; {sum(account.seconds for account in accounts):.1f} s of processor time"
    )
    for note in first.notes:
        console.print(f"note: {note}")
    console.print(_ranks(accounts))
    if len(accounts) == 1:
        console.print(_modules(first))
    console.print(_traffic(accounts))


def _ranks(accounts: Iterable[Account]) -> Table:
    table = Table("rank", "pp", title="one step of each rank: TFLOP and GiB")
    for heading in ("FLOPs", "again", "weights", "grads", "Adam", "saved", "peak", "passes"):
        table.add_column(heading, justify="right")
    table.caption = (
        "again: recomputed. weights: with copies in FP8. saved: most that backward passes wait for. peak: of all that is in memory. "
        "passes: most forward passes of chunks that wait for their backward passes"
    )
    for account in accounts:
        work, memory = account.total_work, account.memory
        weights_bytes = memory.weights_bytes + memory.fp8_weights_bytes
        sizes = (
            weights_bytes, memory.gradients_bytes, memory.optimizer_bytes, memory.activations_bytes, memory.peak_bytes,
        )  # fmt: skip
        table.add_row(
            str(account.rank),
            str(account.pp_rank),
            f"{work.model / TERA:.1f}",
            f"{work.recomputed / TERA:.1f}",
            *(f"{size / GIB:.2f}" for size in sizes),
            str(account.max_passes_in_flight),
        )
    return table


def _modules(account: Account) -> Table:
    """Those that compute or hold most."""
    saved = account.memory.activations_by_module
    names = sorted({*account.work, *saved}, key=lambda name: -account.work_of(name).model - saved.get(name, 0))
    table = Table(title=f"modules of rank {account.rank}, layers summed: TFLOP and GiB")
    table.add_column("module", overflow="fold")
    for heading in ("forward", "backward", "again", "saved"):
        table.add_column(heading, justify="right")
    for name in names[:NUM_SHOWN]:
        work = account.work.get(name)
        flops = (
            ("", "", "")
            if work is None
            else tuple(f"{n / TERA:.3f}" for n in (work.forward, work.backward, work.recomputed))
        )
        table.add_row(name, *flops, f"{saved.get(name, 0) / GIB:.3f}")
    if len(names) > NUM_SHOWN:
        table.caption = f"and {len(names) - NUM_SHOWN} more (--json)"
    return table


def _traffic(accounts: Iterable[Account]) -> Table:
    table = Table("rank", "group", "kind", title="communication")
    for heading in ("ranks", "times", "GiB"):
        table.add_column(heading, justify="right")
    for account in accounts:
        for one in account.traffic:
            size = f"{one.bytes / GIB:.3f}"
            table.add_row(str(account.rank), one.group, one.kind, str(one.group_size), str(one.count), size)
    return table
