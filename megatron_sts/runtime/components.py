"""What may be installed, each found by trying it. A partial or broken install is named and never fails the caller."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType

from megatron_sts.runtime.kernels import APEX_ADAM, APEX_FUSION

logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's import warns of what it registers there

Importer = Callable[[str], ModuleType]

CONTAINER = "docker run --gpus all nvcr.io/nvidia/pytorch:<newest>-py3"
"""NVIDIA's PyTorch container, which has torch, Transformer Engine, apex and flash-attn built to fit each other."""
ENGINE_LIBRARIES = ("transformer-engine-cu13", "transformer-engine-cu12")
"""The wheels with Transformer Engine's kernels; ``transformer-engine-torch`` ties them to torch."""


@dataclass(frozen=True)
class Component:
    """One thing that may be installed."""

    name: str
    available: bool
    version: str | None
    problem: str
    """Why it is not usable, or not in full; empty if it is."""
    needed_for: str
    install: Mapping[str, str] = field(default_factory=dict)
    """How to get it, by platform: pip, container, source. Empty if it is there."""
    parts: tuple[str, ...] = ()
    """apex: the extensions that work."""


def look(importer: Importer) -> tuple[Component, ...]:
    """Every component, whether usable or not."""
    return (
        _module("torch", "everything", {"pip": "pip install torch"}, importer),
        cuda(importer),
        _nccl(importer),
        _megatron_core(),
        transformer_engine(importer),
        apex(importer),
        _module(
            "flash_attn",
            "an alternative attention kernel inside transformer-engine",
            {"pip": "pip install --no-build-isolation flash-attn", "container": CONTAINER},
            importer,
        ),
        _module("torchao", "precision.fp8=emulate", {"pip": "pip install -e '.[emulate]'"}, importer),
        _module("sentencepiece", "tokenizers", {"pip": "pip install sentencepiece"}, importer),
        _module("tensorboard", "logging.tensorboard", {"pip": "pip install tensorboard"}, importer),
    )


def transformer_engine(importer: Importer) -> Component:
    """Transformer Engine by its torch modules.

    Partial installs raise AssertionError, FileNotFoundError or OSError rather than ImportError. torch goes first: TE's
    libraries need the ones that torch has loaded.
    """
    name, needed_for = "transformer-engine", "precision.fp8, fused kernels on GPUs"
    try:
        importer("torch")
        importer("transformer_engine.pytorch")
        return Component(name, True, str(importer("transformer_engine").__version__), "", needed_for)
    except Exception as error:
        install = {
            "pip": "pip install --no-build-isolation -e '.[fp8]' (builds for 15 minutes; needs CUDA's headers)",
            "container": CONTAINER,
            "source": "NVTE_FRAMEWORK=pytorch pip install --no-build-isolation "
            "git+https://github.com/NVIDIA/TransformerEngine.git@stable",
        }
        return Component(name, False, None, _why_no_engine(error), needed_for, install)


def _why_no_engine(error: Exception) -> str:
    """What is missing of it, from the wheels that are there, and what the import said."""
    libraries = [f"{name} {version}" for name in ENGINE_LIBRARIES if (version := installed_version(name))]
    binding, said = installed_version("transformer-engine-torch"), why(error)
    if libraries and binding is None:
        return f"partial install: {', '.join(libraries)} without transformer-engine-torch ({said})"
    if binding is not None and not libraries:
        return (
            f"partial install: transformer-engine-torch {binding} without its kernels, {ENGINE_LIBRARIES[0]} ({said})"
        )
    return said


def apex(importer: Importer) -> Component:
    """NVIDIA's apex, by the CUDA extensions that are of use. ``import apex`` proves nothing: PyPI's is a Pyramid toolkit."""
    problems = {extension: _problem(extension, importer) for extension in (APEX_ADAM, APEX_FUSION)}
    if not problems[APEX_ADAM]:
        problems[APEX_ADAM] = _problem("apex.optimizers", importer)
    parts = tuple(extension for extension, problem in problems.items() if not problem)
    problem = ", ".join(f"no {extension} ({problem})" for extension, problem in problems.items() if problem)
    if problem and _is_pyramid_apex():
        problem = "the installed apex is PyPI's Pyramid toolkit, not NVIDIA's; " + problem
    elif len(parts) < len(problems) and not _problem("apex", importer):
        problem = "built without all CUDA extensions; " + problem
    install = {
        "container": CONTAINER,
        "source": "git clone https://github.com/NVIDIA/apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "
        "pip install --no-build-isolation ./apex (never pip install apex)",
    }
    return Component(
        "apex",
        bool(parts),
        installed_version("apex") if parts else None,
        problem,
        "fused Adam and gradient accumulation without transformer-engine",
        install if problem else {},
        parts,
    )


def installed_version(distribution: str) -> str | None:
    """By its metadata; says nothing about whether it can be imported."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def why(error: BaseException) -> str:
    """The last line of an exception, short enough for a table."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"no module {error.name}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip()[:200]}" if lines else type(error).__name__


def _problem(module: str, importer: Importer) -> str:
    """Why it cannot be imported; a broken one may raise anything. torch goes first, which extensions link to."""
    try:
        importer("torch")
        importer(module)
    except Exception as error:
        return why(error)
    return ""


def _module(name: str, needed_for: str, install: Mapping[str, str], importer: Importer) -> Component:
    """A package whose import is proof enough. A broken one may raise anything."""
    shown = name.replace("_", "-")
    try:
        module = importer(name)
    except Exception as error:
        return Component(shown, False, None, why(error), needed_for, install)
    version = getattr(module, "__version__", None) or installed_version(name)
    return Component(shown, True, None if version is None else str(version), "", needed_for)


def cuda(importer: Importer) -> Component:
    """CUDA that torch was built for, with devices that all answer. A broken driver may raise anything."""
    needed_for, version = "GPUs", None
    try:
        torch = importer("torch")
        version = torch.version.cuda
        problem = "" if torch.cuda.is_available() else "torch is built without CUDA" if version is None else "no device"
        if problem == "no device" and torch.cuda.device_count():
            problem = "a device, but torch cannot use it: is the driver as new as this CUDA?"
        if not problem:
            for index in range(torch.cuda.device_count()):
                torch.cuda.get_device_properties(index)
    except Exception as error:
        problem = why(error)
    install = {
        "pip": "pip install torch (Linux wheels are built for CUDA), and NVIDIA's driver",
        "container": CONTAINER,
    }
    return Component("cuda", not problem, version, problem, needed_for, install if problem else {})


def _nccl(importer: Importer) -> Component:
    needed_for, version = "collectives between GPUs", None
    try:
        torch = importer("torch")
        problem = "" if torch.distributed.is_nccl_available() else "torch is built without NCCL"
        version = None if problem else ".".join(map(str, torch.cuda.nccl.version()))
    except Exception as error:
        problem = why(error)
    install = {"pip": "pip install torch", "container": CONTAINER}
    return Component("nccl", not problem, version, problem, needed_for, install if problem else {})


def _megatron_core() -> Component:
    """By its metadata: importing it takes seconds and is the business of one room."""
    version, wanted = installed_version("megatron-core"), _wanted_megatron_core()
    problem = "not installed" if version is None else ""
    if version and wanted and version.split("+")[0] != wanted:
        problem = f"version {version} is not the {wanted} that this package is written for"
    install = {"pip": f"pip install megatron-core{f'=={wanted}' if wanted else ''}"} if problem else {}
    return Component("megatron-core", not problem, version, problem, "everything", install)


def _wanted_megatron_core() -> str | None:
    try:
        requirements = importlib.metadata.requires("megatron-sts") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    pinned = [line.partition("==")[2] for line in requirements if line.startswith("megatron-core==")]
    return pinned[0] if pinned else None


def _is_pyramid_apex() -> bool:
    try:
        requirements = importlib.metadata.requires("apex") or []
    except importlib.metadata.PackageNotFoundError:
        return False
    return any(requirement.lower().startswith("pyramid") for requirement in requirements)
