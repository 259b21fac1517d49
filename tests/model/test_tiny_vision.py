"""The embedded vision tower fits the architecture that its README names, tensor by tensor."""

from importlib.resources import as_file, files

import torch
from safetensors.torch import load_file

from megatron_sts.config.resolve import resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import groups
from megatron_sts.mcore.weights import named_weights
from megatron_sts.model.init import build_model
from megatron_sts.runtime.dist import process_group
from tests.dist.launch import run_ranks


def check_tower() -> None:
    width = {"hidden_size": 128, "num_attention_heads": 4}
    vision = {"num_layers": 4, **width, "image_size": 64, "patch_size": 8, "feature_layer": -1, "init": "tiny/vision"}
    language = {"num_layers": 1, **width, "ffn_hidden_size": 128, "vocab_size": 64}
    batch = {"global_batch_size": 1, "micro_batch_size": 1, "sequence_length": 128}
    stage = {"name": "only", "steps": 1, "optimizer": {"lr": 1e-3}, "batch": batch}
    run = RunConfig.model_validate({"model": {"vision": vision, "language": language}, "stages": [stage]})
    with process_group(60):
        resolved = resolve(run)
        groups.initialize(resolved.config.parallel, 0)
        weights = dict(named_weights(build_model(resolved, SkipGate())))
        groups.destroy()
    with as_file(files("megatron_sts.model") / "tiny" / "vision.safetensors") as path:
        shipped = load_file(path)
    assert shipped.keys() == {name for name in weights if name.startswith("vision.")}
    for name, tensor in shipped.items():
        assert tensor.dtype is torch.bfloat16 and tensor.isfinite().all()
        torch.testing.assert_close(weights[name].detach(), tensor.float(), rtol=0, atol=0)
    print("same")


def test_embedded_tower_loads_exactly() -> None:
    assert "same" in run_ranks(check_tower, 1, 100)[0]
