"""What this machine has, found by trying it. Must not know what a run needs, and never fails on a machine with nothing."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from megatron_sts import __version__
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.schema import PrecisionConfig

Importer = Callable[[str], ModuleType]

BROKEN_INSTALL_ERRORS = (ImportError, AssertionError, AttributeError, OSError, RuntimeError)
"""What importing or asking a partial installation may raise."""
APEX_EXTENSIONS = ("amp_C", "fused_layer_norm_cuda", "fused_weight_gradient_mlp_cuda")
"""NVIDIA apex as built with its CUDA extensions. ``import apex`` proves nothing: PyPI's apex is a Pyramid toolkit."""

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Component:
    """One thing that may be installed."""

    name: str
    available: bool
    version: str | None
    problem: str
    """Why it is not usable; empty if it is."""
    needed_for: str
    hint: str
    """How to get it."""


@dataclass(frozen=True)
class Gpu:
    """One CUDA device."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int


@dataclass(frozen=True)
class Kernels:
    """Which library computes what in the language model."""

    linear: str
    norm: str
    attention: str
    optimizer: str
    fp8_recipes: tuple[str, ...]
    """Usable values of precision.fp8, besides off."""


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
    gpus = _gpus(importer)
    cuda_version, nccl_version = _cuda_versions(importer)
    components = (
        _module("torch", "everything", "pip install torch", importer),
        _megatron_core(),
        _transformer_engine(importer),
        _apex(importer),
        _module(
            "flash_attn",
            "an alternative attention kernel inside transformer-engine",
            "pip install flash-attn",
            importer,
        ),
        _module("sentencepiece", "tokenizers", "pip install sentencepiece", importer),
        _module("tensorboard", "logging.tensorboard", "pip install tensorboard", importer),
    )
    return Machine(
        megatron_sts=__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=_memory_bytes(),
        device="cuda" if gpus else "cpu",
        backend="nccl" if gpus else "gloo",
        cuda_version=cuda_version,
        nccl_version=nccl_version,
        gpus=gpus,
        components=components,
        kernels=choose_kernels(components, gpus, cuda_version),
    )


def transformer_engine_status(importer: Importer = importlib.import_module) -> tuple[bool, str]:
    """Whether Transformer Engine can be imported, and its version or else why not.

    Partial installs raise AssertionError, FileNotFoundError or OSError rather than ImportError. torch goes first: TE's
    libraries need the ones that torch has loaded.
    """
    try:
        importer("torch")
        importer("transformer_engine.pytorch")
        return True, str(importer("transformer_engine").__version__)
    except Exception as error:
        return False, _why(error)


def choose_kernels(components: tuple[Component, ...], gpus: tuple[Gpu, ...], cuda_version: str | None) -> Kernels:
    """Transformer Engine where it is and a GPU too, else torch; apex's fused optimizer if only that is there."""
    has = {component.name: component.available for component in components}
    if not gpus or not has["transformer-engine"]:
        optimizer = "apex" if gpus and has["apex"] else "torch"
        return Kernels("torch", "torch", "torch", optimizer, ())
    engine = "transformer-engine"
    return Kernels(engine, engine, engine, engine, fp8_recipes(min(gpu.capability for gpu in gpus), cuda_version))


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
    if fp8 == "off":
        return
    gpus, (cuda_version, _) = _gpus(importer), _cuda_versions(importer)
    if not gpus:
        raise ConfigError(f"precision.fp8={fp8}: FP8 needs a CUDA device (Hopper or newer); set precision.fp8=off")
    usable, reason = transformer_engine_status(importer)
    if not usable:
        raise ConfigError(
            f"precision.fp8={fp8}: Transformer Engine is not usable ({reason}); install it or set precision.fp8=off"
        )
    recipes = fp8_recipes(min(gpu.capability for gpu in gpus), cuda_version)
    if fp8 not in recipes:
        raise ConfigError(
            f"precision.fp8={fp8}: {gpus[0].name} with CUDA {cuda_version} offers {', '.join(recipes) or 'no recipe'}; "
            f"set precision.fp8={recipes[0] if recipes else 'off'}"
        )


def _why(error: BaseException) -> str:
    """The last line of an exception, short enough for a table."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"no module {error.name}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip()[:200]}" if lines else type(error).__name__


def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _module(name: str, needed_for: str, hint: str, importer: Importer) -> Component:
    """A package whose import is proof enough. A broken one may raise anything."""
    try:
        module = importer(name)
    except Exception as error:
        return Component(name.replace("_", "-"), False, None, _why(error), needed_for, hint)
    version = getattr(module, "__version__", None) or _installed_version(name)
    return Component(name.replace("_", "-"), True, None if version is None else str(version), "", needed_for, "")


def _megatron_core() -> Component:
    """By its metadata: importing it takes seconds and is the business of one room."""
    version, wanted = _installed_version("megatron-core"), _wanted_megatron_core()
    problem = "not installed" if version is None else ""
    if version and wanted and version.split("+")[0] != wanted:
        problem = f"version {version} is not the {wanted} that this package is written for"
    hint = f"pip install megatron-core{f'=={wanted}' if wanted else ''}" if problem else ""
    return Component("megatron-core", not problem, version, problem, "everything", hint)


def _wanted_megatron_core() -> str | None:
    try:
        requirements = importlib.metadata.requires("megatron-sts") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    pinned = [line.partition("==")[2] for line in requirements if line.startswith("megatron-core==")]
    return pinned[0] if pinned else None


def _transformer_engine(importer: Importer) -> Component:
    available, said = transformer_engine_status(importer)
    hint = (
        "pip install --no-build-isolation -e '.[fp8]' (needs the CUDA toolkit's headers), or NVIDIA's PyTorch container"
    )
    return Component(
        "transformer-engine",
        available,
        said if available else None,
        "" if available else said,
        "precision.fp8, fused kernels on GPUs",
        "" if available else hint,
    )


def _apex(importer: Importer) -> Component:
    """NVIDIA's apex, by the CUDA extensions that are of use."""
    missing = []
    for extension in APEX_EXTENSIONS:
        try:
            importer("torch")
            importer(extension)
        except BROKEN_INSTALL_ERRORS:
            missing.append(extension)
    problem = f"no {', '.join(missing)}" if missing else ""
    if missing and _is_pyramid_apex():
        problem = "the installed apex is PyPI's Pyramid toolkit, not NVIDIA's; " + problem
    hint = "build github.com/NVIDIA/apex with its CUDA extensions, or use NVIDIA's PyTorch container (not pip install apex)"
    version = None if missing else _installed_version("apex")
    return Component(
        "apex",
        not missing,
        version,
        problem,
        "fused Adam and gradient accumulation without transformer-engine",
        hint if missing else "",
    )


def _is_pyramid_apex() -> bool:
    try:
        requirements = importlib.metadata.requires("apex") or []
    except importlib.metadata.PackageNotFoundError:
        return False
    return any(requirement.lower().startswith("pyramid") for requirement in requirements)


def _gpus(importer: Importer) -> tuple[Gpu, ...]:
    try:
        cuda = importer("torch").cuda
        properties = [cuda.get_device_properties(i) for i in range(cuda.device_count())] if cuda.is_available() else []
    except BROKEN_INSTALL_ERRORS:  # a driver that torch cannot talk to
        return ()
    return tuple(Gpu(p.name, (p.major, p.minor), p.total_memory) for p in properties)


def _cuda_versions(importer: Importer) -> tuple[str | None, str | None]:
    """CUDA and NCCL that torch was built with."""
    try:
        torch = importer("torch")
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
        return torch.version.cuda, nccl
    except BROKEN_INSTALL_ERRORS:
        return None, None


def _memory_bytes() -> int:
    """Of the machine, or the container's limit where that is lower."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):
        return machine
