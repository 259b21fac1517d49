"""Prints what ``probe`` found, for people or for programs. Must not probe anything itself."""

from __future__ import annotations

import dataclasses
import json

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_sts.runtime.components import Component
from megatron_sts.runtime.probe import Machine

KERNEL_ROWS = {
    "linear": "linear layers",
    "norm": "norms",
    "attention": "attention",
    "optimizer": "optimizer",
    "gradient_accumulation_fusion": "gradient accumulation fusion",
    "cross_entropy": "cross entropy (in bf16)",
}


def print_json(machine: Machine) -> None:
    """One JSON object on stdout."""
    print(json.dumps(dataclasses.asdict(machine)))


def print_table(machine: Machine) -> None:
    """Tables on stdout: the machine, what is installed, which kernels, and how to get what is missing."""
    console = Console()
    console.print(_machine(machine), _components(machine), _kernels(machine))
    for component in machine.components:
        if component.install:
            console.print(f"[bold]{component.name}[/] ({escape(component.needed_for)}):")
        for platform, command in component.install.items():
            console.print(f"  {platform}: {escape(command)}", soft_wrap=True, highlight=False)


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left", show_header=len(columns) > 2)


def _machine(machine: Machine) -> Table:
    table = _table("This machine", "what", "value")
    table.add_row("megatron-sts", machine.megatron_sts)
    table.add_row("python", f"{machine.python}, {machine.platform}")
    table.add_row("cores, memory", f"{machine.cores}, {_gib(machine.memory_bytes)}")
    table.add_row("runs on", f"{machine.device}, collectives by {machine.backend}")
    table.add_row("CUDA, NCCL of torch", f"{machine.cuda_version or 'none'}, {machine.nccl_version or 'none'}")
    for index, gpu in enumerate(machine.gpus):
        table.add_row(
            f"GPU {index}", f"{gpu.name}, capability {gpu.capability[0]}.{gpu.capability[1]}, {_gib(gpu.memory_bytes)}"
        )
    return table


def _components(machine: Machine) -> Table:
    table = _table("Installed", "package", "version", "needed for", "state")
    for component in machine.components:
        table.add_row(component.name, component.version or "-", component.needed_for, _state(component))
    return table


def _state(component: Component) -> str:
    if component.available and not component.problem:
        return "[green]ok[/]"
    state = "in part" if component.available else "not usable"
    return f"[yellow]{state}:[/] {escape(component.problem)}"


def _kernels(machine: Machine) -> Table:
    table = _table("Kernels that will be used", "what", "from")
    for what, label in KERNEL_ROWS.items():
        table.add_row(label, getattr(machine.kernels, what))
    table.add_row("precision.fp8", ", ".join(("off", *machine.kernels.fp8_recipes)))
    return table


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
