"""The probe on machines that do not exist: an importer stands in for what is installed."""

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.precision import PrecisionConfig
from megatron_sts.runtime import probe

H100 = probe.Gpu("H100", (9, 0), 80 * 2**30)


def importer(**modules: Any) -> probe.Importer:
    """Imports only these; an exception as value is raised."""

    def load(name: str) -> ModuleType:
        found = modules.get(name.replace(".", "__"), ModuleNotFoundError(f"No module named {name!r}", name=name))
        if isinstance(found, BaseException):
            raise found
        return found

    return load


def torch_with(*gpus: probe.Gpu) -> SimpleNamespace:
    properties = [
        SimpleNamespace(name=g.name, major=g.capability[0], minor=g.capability[1], total_memory=g.memory_bytes)
        for g in gpus
    ]
    cuda = SimpleNamespace(
        is_available=lambda: bool(gpus),
        device_count=lambda: len(gpus),
        get_device_properties=lambda i: properties[i],
        nccl=SimpleNamespace(version=lambda: (2, 30, 7)),
    )
    return SimpleNamespace(
        __version__="9.9",
        cuda=cuda,
        version=SimpleNamespace(cuda="13.0"),
        distributed=SimpleNamespace(is_nccl_available=lambda: True),
    )


ENGINE: dict[str, Any] = {
    "transformer_engine": SimpleNamespace(__version__="2.20"),
    "transformer_engine__pytorch": object(),
}


def test_machine_with_nothing() -> None:
    machine = probe.probe(importer())
    assert (machine.device, machine.backend, machine.gpus, machine.cuda_version) == ("cpu", "gloo", (), None)
    assert not any(c.available for c in machine.components if c.name != "megatron-core")
    assert machine.component("torch").problem == "no module torch"
    assert machine.kernels == probe.Kernels("torch", "torch", "torch", "torch", ())


def test_machine_with_everything() -> None:
    extensions = dict.fromkeys(probe.APEX_EXTENSIONS, object())
    machine = probe.probe(importer(torch=torch_with(H100, H100), **ENGINE, **extensions))
    assert (machine.device, machine.backend, machine.nccl_version) == ("cuda", "nccl", "2.30.7")
    assert machine.gpus == (H100, H100)
    assert machine.component("apex").available
    assert machine.component("transformer-engine").version == "2.20"
    assert machine.kernels.linear == machine.kernels.optimizer == "transformer-engine"
    assert machine.kernels.fp8_recipes == ("tensorwise", "delayed", "blockwise")


def test_engine_without_gpu_is_not_used() -> None:
    machine = probe.probe(importer(torch=torch_with(), **ENGINE))
    assert machine.component("transformer-engine").available
    assert machine.kernels.linear == "torch" and machine.kernels.fp8_recipes == ()


def test_apex_alone_gives_the_optimizer() -> None:
    machine = probe.probe(importer(torch=torch_with(H100), **dict.fromkeys(probe.APEX_EXTENSIONS, object())))
    assert (machine.kernels.linear, machine.kernels.optimizer) == ("torch", "apex")


@pytest.mark.parametrize(
    "error", [AssertionError(), FileNotFoundError("lib.so"), OSError("a\nundefined symbol"), ImportError("x")]
)
def test_partial_engine(error: Exception) -> None:
    available, why = probe.transformer_engine_status(importer(torch=object(), transformer_engine__pytorch=error))
    assert not available
    assert type(error).__name__ in why and "\n" not in why


def test_pyramid_apex_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.importlib.metadata, "requires", lambda name: ["pyramid>1.1"] if name == "apex" else [])
    apex = probe.probe(importer(torch=torch_with(), apex=object())).component("apex")
    assert not apex.available
    assert "Pyramid" in apex.problem and "amp_C" in apex.problem


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


B200 = probe.Gpu("B200", (10, 0), 180 * 2**30)
A100 = probe.Gpu("A100", (8, 0), 80 * 2**30)


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
    ],
)
def test_fp8_is_refused_where_it_cannot_run(fp8: str, modules: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as refused:
        probe.check_fp8(PrecisionConfig.model_validate({"fp8": fp8}), importer(**modules))
    assert str(refused.value).startswith(f"precision.fp8={fp8}: ") and reason in str(refused.value)


def test_fp8_is_allowed_where_it_can_run() -> None:
    probe.check_fp8(PrecisionConfig(), importer())
    probe.check_fp8(PrecisionConfig(fp8="tensorwise"), importer(torch=torch_with(H100), **ENGINE))
    probe.check_fp8(PrecisionConfig(fp8="mxfp8"), importer(torch=torch_with(B200), **ENGINE))
