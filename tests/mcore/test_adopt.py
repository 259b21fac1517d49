"""``LayerSkipper`` without a pipeline: a mask a micro-batch, layers of another class, recomputation; and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import LayerNormImpl, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_sts import lds, vtc
from megatron_sts.config.errors import ConfigError
from megatron_sts.lds.mask import draw_mask
from megatron_sts.lds.placement import placed
from megatron_sts.mcore import adopt, groups
from megatron_sts.mcore.adopt import LayerSkipper, LdsConfig
from megatron_sts.runtime.dist import process_group

NUM_LAYERS, NUM_STEPS, NUM_MICROBATCHES = 4, 3, 3
DRAWN = {"alpha": 0.6, "schedule": "constant"}


def config(**settings: Any) -> TransformerConfig:
    plain = {"num_layers": NUM_LAYERS, "hidden_size": 32, "num_attention_heads": 2, "use_cpu_initialization": True}
    return TransformerConfig(**plain | {"attention_dropout": 0.0, "hidden_dropout": 0.0} | settings)


class HalvedLayer(TransformerLayer):
    """Someone's own layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, context = super().forward(*args, **kwargs)
        return 0.5 * output, context


class DiscardingLayer(HalvedLayer):
    """The reference: computes, and gives its input where ``skips(layer)``."""

    skips: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, context = super().forward(*args, **kwargs)
        hidden_states = args[0] if args else kwargs["hidden_states"]
        return (hidden_states + 0.0 * output if type(self).skips(self.layer_number - 1) else output), context


def block_of(module: type) -> TransformerBlockSubmodules:
    layer = ModuleSpec(module=module, submodules=get_gpt_layer_local_spec().submodules)
    return TransformerBlockSubmodules(layer_specs=[layer] * NUM_LAYERS, layer_norm=LayerNormImpl)


def batches() -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    while True:
        yield torch.randint(64, (2, 9), generator=generator)


def forward_step(iterator: Iterator[torch.Tensor], model: torch.nn.Module, before: Any = None) -> Any:
    if before is not None:
        before()
    rows = next(iterator)
    losses = model(rows[:, :-1], torch.arange(8).expand(2, 8), None, labels=rows[:, 1:])
    return losses, lambda output: (output.mean(), output.detach().mean())


def train(
    skipper: LayerSkipper | None, settings: TransformerConfig, step_forward: Any, saved: list[Any] | None = None
) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step. ``saved`` gets what a checkpoint would hold of the optimizer."""
    torch.manual_seed(3)
    spec = block_of(DiscardingLayer) if skipper is None else skipper.layer_spec(block_of(HalvedLayer))
    model = GPTModel(settings, spec, 64, 16, position_embedding_type="rope")
    ddp_config = DistributedDataParallelConfig(overlap_grad_reduce=True)
    wrap = DistributedDataParallel if skipper is None else skipper.data_parallel
    chunk = wrap(settings, ddp_config, model)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=0.0), [chunk])
    settings.finalize_model_grads_func, settings.no_sync_func = finalize_model_grads, chunk.no_sync
    run = get_forward_backward_func() if skipper is None else skipper.schedule([chunk], optimizer)
    iterator, found = batches(), []
    for step in range(NUM_STEPS):
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        losses = run(
            forward_step_func=partial(step_forward, step) if skipper is None else forward_step,
            data_iterator=iterator,
            model=[chunk],
            num_microbatches=NUM_MICROBATCHES,
            seq_length=8,
            micro_batch_size=2,
            forward_only=False,
        )
        _, norm, _ = optimizer.step()
        found.append((torch.stack(losses).mean().item(), float(norm)))
    if saved is not None:
        saved.append(optimizer.sharded_state_dict(model.sharded_state_dict()))
    return found


@pytest.mark.parametrize(
    ("granularity", "recompute"),
    [
        ("microbatch", {}),
        ("step", {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
    ],
    ids=["a mask a micro-batch", "full recompute"],
)
def test_skipping_is_computing_and_discarding(granularity: str, recompute: dict[str, Any]) -> None:
    """Layers that a whole step skips have a zero gradient in the reference, so Adam must see one here too."""
    drawn = LdsConfig(**DRAWN, granularity=granularity, skipped_update="zero_grad")
    masks = [
        draw_mask(drawn, 7, 0, step, NUM_STEPS, placed(((NUM_LAYERS,),), 0.0), NUM_MICROBATCHES)
        for step in range(NUM_STEPS)
    ]
    assert any(any(mask.idle) for mask in masks) and any(len(set(mask.rows)) > 1 for mask in masks) == (not recompute)
    microbatch = 0

    def counted(step: int, iterator: Any, model: Any) -> Any:
        nonlocal microbatch
        row = masks[step].row(microbatch % NUM_MICROBATCHES)
        microbatch += 1
        DiscardingLayer.skips = row.__getitem__
        return forward_step(iterator, model)

    with process_group(60.0):
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        settings = config(**recompute)
        skipper = LayerSkipper(settings, drawn, num_steps=NUM_STEPS, num_microbatches=NUM_MICROBATCHES, seed=7)
        found, expected = train(skipper, settings, None), train(None, config(**recompute), counted)
        groups.destroy()
    assert found == expected
    assert len(set(found)) == NUM_STEPS


def test_checkpoints_hold_layers_that_some_steps_skipped() -> None:
    """megatron-core saves one count of Adam's steps for all parameters, and refuses what differs."""
    saved: list[Any] = []
    with process_group(60.0):
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        skipper = LayerSkipper(config(), LdsConfig(**DRAWN), num_steps=NUM_STEPS, seed=7)
        train(skipper, config(), None, saved)
        groups.destroy()
    assert saved[0]["state"]["common_step"] == NUM_STEPS


@pytest.mark.parametrize(
    ("settings", "skipping"),
    [
        ({"num_moe_experts": 2}, {}),
        ({"mtp_num_layers": 1}, {}),
        ({"cuda_graph_impl": "local"}, {}),
        ({"recompute_granularity": "full"}, {"granularity": "microbatch"}),
        ({"fp8": "hybrid", "fp8_recipe": "delayed"}, {}),
    ],
    ids=str,
)
def test_refused(settings: dict[str, Any], skipping: dict[str, Any]) -> None:
    plain = config()
    for name, value in settings.items():
        setattr(plain, name, value)
    name = list(settings)[-1]
    with pytest.raises(ConfigError, match=f"^{name}={settings[name]}: .*; "):
        LayerSkipper(plain, LdsConfig(**skipping), num_steps=2)


@pytest.mark.parametrize("library", [lds, vtc], ids=["lds", "vtc"])
def test_the_library_is_what_its_readme_shows(library: ModuleType) -> None:
    readme = Path(library.__file__ or "").with_name("README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", readme, re.S)
    exec(code, names := {})
    if library is lds:
        assert names["gate"].skips(5) == names["mask"].rows[0][5]
    else:
        assert names["visual"].shape == (144, 1024)
        assert vtc.position_ids(names["is_visual"], [names["kept"]], 576, "original")[-1] == 577
    tables = readme.partition("\n# As a library\n")[2]
    named = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", tables, re.M))))
    assert named <= {*library.__all__, *adopt.__all__} and named >= set(library.__all__)
    assert all(getattr(library, name).__name__ == name for name in library.__all__)
