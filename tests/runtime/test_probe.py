"""The probe on machines that do not exist: an importer stands in for what is installed."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.precision import PrecisionConfig
from megatron_sts.config.schema import RunConfig
from megatron_sts.runtime import components, probe
from megatron_sts.runtime.kernels import Kernels, choose_kernels

A100 = probe.Gpu("A100", (8, 0), 80 * 2**30)
H100 = probe.Gpu("H100", (9, 0), 80 * 2**30)
B200 = probe.Gpu("B200", (10, 0), 180 * 2**30)


def importer(**modules: Any) -> components.Importer:
    """Imports only these; an exception as value is raised."""

    def load(name: str) -> ModuleType:
        found = modules.get(name.replace(".", "__"), ModuleNotFoundError(f"No module named {name!r}", name=name))
        if isinstance(found, BaseException):
            raise found
        return found

    return load


def torch_with(*gpus: probe.Gpu, cuda: str | None = "13.0", broken_driver: bool = False) -> SimpleNamespace:
    """A torch that sees these GPUs; ``cuda`` None: built without CUDA."""
    properties = [
        SimpleNamespace(name=g.name, major=g.capability[0], minor=g.capability[1], total_memory=g.memory_bytes)
        for g in gpus
    ]
    return SimpleNamespace(
        __version__="9.9",
        cuda=SimpleNamespace(
            is_available=lambda: bool(gpus) and not broken_driver,
            device_count=lambda: len(gpus),
            get_device_properties=lambda i: properties[i],
            nccl=SimpleNamespace(version=lambda: (2, 30, 7)),
        ),
        version=SimpleNamespace(cuda=cuda),
        distributed=SimpleNamespace(is_nccl_available=lambda: cuda is not None),
    )


ENGINE: dict[str, Any] = {
    "transformer_engine": SimpleNamespace(__version__="2.20"),
    "transformer_engine__pytorch": object(),
}
APEX: dict[str, Any] = dict.fromkeys(("apex", "apex__optimizers", "amp_C", "fused_weight_gradient_mlp_cuda"), object())
TORCH_ONLY = Kernels("torch", "torch", "torch", "torch", "off", "megatron-core", ())


def without(modules: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: module for name, module in modules.items() if name not in names}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets only these distributions be installed, by their versions."""

    def install(**versions: str) -> None:
        named = {name.replace("_", "-"): version for name, version in versions.items()}
        monkeypatch.setattr(components, "installed_version", named.get)

    return install


def test_machine_with_nothing() -> None:
    machine = probe.probe(importer())
    assert (machine.device, machine.backend, machine.gpus, machine.cuda_version) == ("cpu", "gloo", (), None)
    missing = [c for c in machine.components if c.name != "megatron-core"]
    assert not any(c.available for c in missing) and all(c.problem and c.install for c in missing)
    assert machine.component("torch").problem == "no module torch"
    assert machine.kernels == TORCH_ONLY


def test_machine_with_everything() -> None:
    machine = probe.probe(importer(torch=torch_with(H100, H100), **ENGINE, **APEX))
    assert (machine.device, machine.backend, machine.nccl_version) == ("cuda", "nccl", "2.30.7")
    assert machine.gpus == (H100, H100)
    apex, engine = machine.component("apex"), machine.component("transformer-engine")
    assert apex.available and apex.parts == ("amp_C", "fused_weight_gradient_mlp_cuda")
    assert engine.version == "2.20" and not engine.problem and not engine.install
    te = "transformer-engine"
    recipes = ("tensorwise", "delayed", "blockwise")
    assert machine.kernels == Kernels(te, te, te, te, "apex", "megatron-core, fused", recipes)


INSTALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # What can be imported -> the kernels that differ from torch's, beside the cross entropy that any GPU has fused.
    "no GPU": ({"torch": torch_with(), **ENGINE, **APEX}, {"cross_entropy": "megatron-core"}),
    "torch without CUDA": ({"torch": torch_with(cuda=None), **ENGINE}, {"cross_entropy": "megatron-core"}),
    "broken driver": ({"torch": torch_with(H100, broken_driver=True), **APEX}, {"cross_entropy": "megatron-core"}),
    "GPU alone": ({"torch": torch_with(H100)}, {}),
    "apex": ({"torch": torch_with(H100), **APEX}, {"optimizer": "apex", "gradient_accumulation_fusion": "apex"}),
    "apex without amp_C": (
        {"torch": torch_with(H100), **without(APEX, "amp_C")},
        {"gradient_accumulation_fusion": "apex"},
    ),
    "apex without fusion": (
        {"torch": torch_with(H100), **without(APEX, "fused_weight_gradient_mlp_cuda")},
        {"optimizer": "apex"},
    ),
    "another apex's extension": ({"torch": torch_with(H100), "amp_C": object()}, {}),
    "Pyramid apex": ({"torch": torch_with(H100), "apex": object()}, {}),
    "emulation": ({"torch": torch_with(H100), "torchao": object()}, {"fp8_recipes": ("emulate",)}),
    "old GPU": (
        {"torch": torch_with(A100), **ENGINE},
        dict.fromkeys(("linear", "norm", "attention", "optimizer"), "transformer-engine"),
    ),
    "two kinds of GPU": (
        {"torch": torch_with(H100, A100), **ENGINE},
        dict.fromkeys(("linear", "norm", "attention", "optimizer"), "transformer-engine"),
    ),
}


@pytest.mark.parametrize("name", INSTALLS)
def test_kernels_of_every_install(name: str) -> None:
    modules, different = INSTALLS[name]
    expected = replace(TORCH_ONLY, **{"cross_entropy": "megatron-core, fused", **different})
    assert probe.probe(importer(**modules)).kernels == expected


PARTIAL_ERRORS = [
    AssertionError(), FileNotFoundError("lib.so"), OSError("a\nundefined symbol"), ImportError("x"), RuntimeError("y"),
]  # fmt: skip


@pytest.mark.parametrize("error", PARTIAL_ERRORS, ids=repr)
@pytest.mark.parametrize(
    "name", ["torch", "transformer_engine__pytorch", "amp_C", "flash_attn", "torchao", "tensorboard"]
)
def test_a_broken_install_is_named(name: str, error: Exception) -> None:
    modules = {"torch": torch_with(H100), **ENGINE, **APEX, name: error}
    shown = {"transformer_engine__pytorch": "transformer-engine", "amp_C": "apex"}.get(name, name.replace("_", "-"))
    broken = probe.probe(importer(**modules)).component(shown)
    assert type(error).__name__ in broken.problem and "\n" not in broken.problem and broken.install


def test_partial_wheels_of_the_engine_are_named(installed: Callable[..., None]) -> None:
    broken = importer(torch=torch_with(H100), transformer_engine__pytorch=AssertionError("no core"))
    installed(transformer_engine_cu13="2.20.2")
    problem = components.transformer_engine(broken).problem
    assert problem.startswith(
        "partial install: transformer-engine-cu13 2.20.2 without transformer-engine-torch (Assert"
    )
    installed(transformer_engine_torch="2.20.2")
    problem = components.transformer_engine(broken).problem
    assert "transformer-engine-torch 2.20.2 without its kernels, transformer-engine-cu13" in problem
    installed(transformer_engine_torch="2.20.2", transformer_engine_cu13="2.20.2")
    assert components.transformer_engine(broken).problem == "AssertionError: no core"


def test_pyramid_apex_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    requires = components.importlib.metadata.requires
    monkeypatch.setattr(
        components.importlib.metadata, "requires", lambda name: ["pyramid>1.1"] if name == "apex" else requires(name)
    )
    apex = probe.probe(importer(torch=torch_with(), apex=object())).component("apex")
    assert not apex.available
    assert "Pyramid" in apex.problem and "amp_C" in apex.problem
    assert "pip" not in apex.install and "never pip install apex" in apex.install["source"]


def test_apex_in_part_says_what_is_missing() -> None:
    modules = without(APEX, "fused_weight_gradient_mlp_cuda")
    apex = probe.probe(importer(torch=torch_with(H100), **modules)).component("apex")
    assert apex.available and apex.parts == ("amp_C",)
    assert apex.problem.startswith("built without all CUDA extensions; no fused_weight_gradient_mlp_cuda")


@pytest.mark.parametrize(
    ("torch", "problem"),
    [
        (torch_with(cuda=None), "torch is built without CUDA"),
        (torch_with(), "no device"),
        (torch_with(H100, broken_driver=True), "a device, but torch cannot use it: is the driver as new as this CUDA?"),
        (torch_with(H100), ""),
    ],
)
def test_cuda(torch: SimpleNamespace, problem: str) -> None:
    cuda = components.cuda(importer(torch=torch))
    assert (cuda.problem, cuda.available, bool(cuda.install)) == (problem, not problem, bool(problem))


@pytest.mark.parametrize("name", ["is_available", "device_count", "get_device_properties"])
@pytest.mark.parametrize("error", [RuntimeError("CUDA error: unknown error"), AssertionError(), OSError("libcuda.so")])
def test_a_driver_that_fails_is_named_and_no_gpu_is_used(name: str, error: Exception) -> None:
    def fail(*_: int) -> None:
        raise error

    torch = torch_with(H100)
    setattr(torch.cuda, name, fail)
    machine = probe.probe(importer(torch=torch))
    assert (machine.gpus, machine.device) == ((), "cpu")
    cuda = machine.component("cuda")
    assert not cuda.available and cuda.problem.startswith(type(error).__name__) and cuda.install


@pytest.mark.parametrize(
    ("capability", "cuda", "recipes"),
    [
        ((8, 0), "13.0", ()),
        ((8, 9), "13.0", ("tensorwise", "delayed")),
        ((9, 0), "12.8", ("tensorwise", "delayed")),
        ((9, 0), "12.9", ("tensorwise", "delayed", "blockwise")),
        ((10, 0), "13.0", ("tensorwise", "delayed", "blockwise", "mxfp8")),
        ((9, 0), None, ("tensorwise", "delayed")),
    ],
)
def test_fp8_recipes(capability: tuple[int, int], cuda: str | None, recipes: tuple[str, ...]) -> None:
    assert probe.fp8_recipes(capability, cuda) == recipes


@pytest.mark.parametrize(
    ("fp8", "modules", "reason"),
    [
        ("tensorwise", {}, "FP8 needs a CUDA device"),
        ("tensorwise", {"torch": torch_with()}, "FP8 needs a CUDA device"),
        ("tensorwise", {"torch": torch_with(H100)}, "Transformer Engine is not usable (no module"),
        (
            "tensorwise",
            {"torch": torch_with(A100), **ENGINE},
            "A100 with CUDA 13.0 offers no recipe; set precision.fp8=off",
        ),
        ("mxfp8", {"torch": torch_with(H100), **ENGINE}, "offers tensorwise, delayed, blockwise"),
        ("emulate", {"torch": torch_with()}, "torchao is not usable (no module torchao.float8)"),
    ],
)
def test_fp8_is_refused_where_it_cannot_run(fp8: str, modules: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as refused:
        probe.check_fp8(PrecisionConfig.model_validate({"fp8": fp8}), importer(**modules))
    assert str(refused.value).startswith(f"precision.fp8={fp8}: ") and reason in str(refused.value)


def test_fp8_is_allowed_where_it_can_run() -> None:
    probe.check_fp8(PrecisionConfig(), importer())
    probe.check_fp8(PrecisionConfig(fp8="tensorwise"), importer(torch=torch_with(H100), **ENGINE))
    probe.check_fp8(PrecisionConfig(fp8="emulate"), importer(torchao__float8=object()))
    probe.check_fp8(PrecisionConfig(fp8="mxfp8"), importer(torch=torch_with(B200), **ENGINE))


def test_engine_attention_over_several_ranks_takes_no_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = {"name": "one", "steps": 1, "optimizer": {"lr": 1.0}, "data": {"mode": "words"},
             "batch": {"global_batch_size": 1, "micro_batch_size": 1, "sequence_length": 8}}  # fmt: skip
    language = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "ffn_hidden_size": 8, "vocab_size": 8}
    written = {"model": {"vision": None, "language": language}, "stages": [stage]}

    def check(params: str, size: int, *usable: str) -> None:
        parallel, precision = {"context_parallel_size": size}, {"params": params}
        config = RunConfig.model_validate({**written, "parallel": parallel, "precision": precision})
        kernels = choose_kernels(config.kernels, config.precision, set(usable), ())
        monkeypatch.setattr(probe, "kernels_for", lambda _: kernels)
        assert probe.check_usable(config) is kernels

    check("fp32", 1, "cuda", "transformer-engine")
    check("bf16", 2, "cuda", "transformer-engine")
    check("fp32", 2, "cuda")
    with pytest.raises(ConfigError, match="context_parallel_size=2: Transformer Engine's attention over several"):
        check("fp32", 2, "cuda", "transformer-engine")
