"""What this machine has, found by trying it, and what a run computes with here. Never fails on a machine with nothing."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from megatron_sts import __version__
from megatron_sts.config.errors import ConfigError, refuse
from megatron_sts.config.kernels import KernelsConfig
from megatron_sts.config.precision import PrecisionConfig
from megatron_sts.config.schema import RunConfig
from megatron_sts.runtime import components
from megatron_sts.runtime.components import Component, Importer
from megatron_sts.runtime.kernels import ENGINE, Kernels, choose_kernels

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Gpu:
    """One CUDA device."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int


@dataclass(frozen=True)
class Machine:
    """Everything ``megatron-sts doctor`` reports."""

    megatron_sts: str
    python: str
    platform: str
    cores: int
    memory_bytes: int
    device: str
    """cuda or cpu."""
    backend: str
    """Collectives: nccl or gloo."""
    cuda_version: str | None
    """That torch was built for."""
    nccl_version: str | None
    gpus: tuple[Gpu, ...]
    components: tuple[Component, ...]
    kernels: Kernels

    def component(self, name: str) -> Component:
        """The component with this name."""
        return next(component for component in self.components if component.name == name)


def probe(importer: Importer = importlib.import_module) -> Machine:
    """Look at this machine. ``importer`` stands in for the import system in tests."""
    gpus, found = _gpus(importer), components.look(importer)
    by_name = {component.name: component for component in found}
    cuda_version = by_name["cuda"].version
    return Machine(
        megatron_sts=__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=_memory_bytes(),
        device="cuda" if gpus else "cpu",
        backend="nccl" if gpus else "gloo",
        cuda_version=cuda_version,
        nccl_version=by_name["nccl"].version,
        gpus=gpus,
        components=found,
        kernels=choose_kernels(
            KernelsConfig(), PrecisionConfig(params="bf16"), _usable(gpus, found), _recipes(gpus, cuda_version)
        ),
    )


def kernels_for(config: RunConfig, importer: Importer = importlib.import_module) -> Kernels:
    """What a run computes with on this machine.

    Raises:
        ConfigError: ``kernels`` names what is not usable here.
    """
    usable, recipes = usable_here(importer)
    return choose_kernels(config.kernels, config.precision, usable, recipes)


def check_usable(config: RunConfig) -> Kernels:
    """Refuses what cannot run on this machine, before anything is started; returns what a run computes with.

    Raises:
        ConfigError: naming what is missing.
    """
    check_fp8(config.precision)
    kernels = kernels_for(config)
    _check_packing(config, kernels)
    _check_context_parallel(config, kernels)
    return kernels


def _check_packing(config: RunConfig, kernels: Kernels) -> None:
    """Transformer Engine's attention over segments takes one row."""
    for stage in config.stages if kernels.attention == ENGINE else ():
        if stage.batch.packing == "pack" and stage.batch.micro_batch_size > 1:
            refuse(
                f"stages.{stage.name}.batch.micro_batch_size",
                stage.batch.micro_batch_size,
                "packing with Transformer Engine takes one row a micro-batch",
                "set it to 1 and sequence_length that many times as long",
            )


def _check_context_parallel(config: RunConfig, kernels: Kernels) -> None:
    """Transformer Engine's kernels that span context-parallel ranks take no fp32."""
    size = config.parallel.context_parallel_size
    if kernels.attention == ENGINE and size > 1 and config.precision.params == "fp32":
        refuse("parallel.context_parallel_size", size, "Transformer Engine's attention over several ranks takes no fp32",
               "set precision.params=bf16, or kernels.layers=torch")  # fmt: skip


@functools.cache
def usable_here(importer: Importer) -> tuple[frozenset[str], tuple[str, ...]]:
    """The part of ``probe`` that decides about kernels, without imports that take seconds."""
    gpus = _gpus(importer)
    if not gpus:
        return _usable((), ()), ()
    found = components.transformer_engine(importer), components.apex(importer)
    return _usable(gpus, found), _recipes(gpus, components.cuda(importer).version)


def _usable(gpus: tuple[Gpu, ...], found: tuple[Component, ...]) -> frozenset[str]:
    """Names as ``choose_kernels`` takes them."""
    names = {name for component in found if component.available for name in (component.name, *component.parts)}
    return frozenset((names - {"cuda"}) | ({"cuda"} if gpus else set()))


def _recipes(gpus: tuple[Gpu, ...], cuda_version: str | None) -> tuple[str, ...]:
    return fp8_recipes(min(gpu.capability for gpu in gpus), cuda_version) if gpus else ()


def fp8_recipes(capability: tuple[int, int], cuda_version: str | None) -> tuple[str, ...]:
    """What Transformer Engine offers: Ada and Hopper scale by tensor; blocks need Hopper and CUDA 12.9, mxfp8 Blackwell."""
    cuda = tuple(int(part) for part in (cuda_version or "0.0").split(".")[:2])
    recipes = ["tensorwise", "delayed"] if capability >= (8, 9) else []
    if capability >= (9, 0) and cuda >= (12, 9):
        recipes.append("blockwise")
    if capability >= (10, 0):
        recipes.append("mxfp8")
    return tuple(recipes)


def check_fp8(precision: PrecisionConfig, importer: Importer = importlib.import_module) -> None:
    """Refuses FP8 where it cannot run: megatron-core without Transformer Engine would silently train in bf16.

    Raises:
        ConfigError: naming what is missing.
    """
    fp8 = precision.fp8
    if fp8 == "emulate":
        _check_emulation(importer)
    if precision.engine_recipe is None:
        return
    gpus = _gpus(importer)
    if not gpus:
        raise ConfigError(
            f"precision.fp8={fp8}: FP8 needs a CUDA device (Ada, Hopper or newer); set precision.fp8=off, or emulate"
        )
    engine = components.transformer_engine(importer)
    if not engine.available:
        raise ConfigError(
            f"precision.fp8={fp8}: Transformer Engine is not usable ({engine.problem}); install it (megatron-sts doctor "
            "says how) or set precision.fp8=off"
        )
    cuda_version = components.cuda(importer).version
    recipes = _recipes(gpus, cuda_version)
    if fp8 not in recipes:
        raise ConfigError(
            f"precision.fp8={fp8}: {gpus[0].name} with CUDA {cuda_version} offers {', '.join(recipes) or 'no recipe'}; "
            f"set precision.fp8={recipes[0] if recipes else 'off'}"
        )


def _check_emulation(importer: Importer) -> None:
    """A broken torchao may raise anything."""
    try:
        importer("torchao.float8")
    except Exception as error:
        raise ConfigError(
            f"precision.fp8=emulate: torchao is not usable ({components.why(error)}); pip install -e '.[emulate]'"
        ) from error


def _gpus(importer: Importer) -> tuple[Gpu, ...]:
    """None unless all of them answer; the component ``cuda`` says why not. Where there can be none, torch is not asked.

    A stand-in for the import system may have GPUs without a driver.
    """
    if importer is importlib.import_module and not _has_driver():
        return ()
    if not components.cuda(importer).available:
        return ()
    cuda = importer("torch").cuda
    properties = [cuda.get_device_properties(i) for i in range(cuda.device_count())]
    return tuple(Gpu(p.name, (p.major, p.minor), p.total_memory) for p in properties)


def _has_driver() -> bool:
    """NVIDIA's driver brings this library, without which torch finds no device. Loading it begins nothing on a GPU."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _memory_bytes() -> int:
    """Of the machine, or the container's limit where that is lower."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):
        return machine
