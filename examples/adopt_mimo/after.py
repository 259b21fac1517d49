"""LLaVA on megatron-core's MimoModel in a training loop of one's own: modality alignment, only the projector learns."""

import argparse
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

import megatron_sts.mcore  # noqa: F401  lets megatron-core run without CUDA, over gloo; with CUDA it changes nothing
from megatron_sts.mcore.adopt import TokenCompressor, VtcConfig

# isort: split
from megatron import core
from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.mimo import MimoModel, MimoModelConfig
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

VOCABULARY, FIRST_WORD, IMAGE, LENGTH = 64, 10, 63, 128
IMAGE_SIZE, PATCH_SIZE = 64, 8
NUM_VISUAL = (IMAGE_SIZE // PATCH_SIZE) ** 2
COMPRESSOR = TokenCompressor(VtcConfig(keep_ratio=0.5), NUM_VISUAL)
MICRO_BATCHES, MICRO_BATCH_SIZE = 2, 2

Batch = dict[str, torch.Tensor]


def config(**settings) -> TransformerConfig:
    no_dropout = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    on_cpu = {"use_cpu_initialization": not torch.cuda.is_available()}
    return TransformerConfig(num_attention_heads=4, **no_dropout, **on_cpu, **settings)


def build_model() -> MimoModel:
    language = config(num_layers=4, hidden_size=64, mrope_section=[8, 0, 0])
    vision = config(num_layers=2, hidden_size=32)
    projector = config(num_layers=1, hidden_size=64, ffn_hidden_size=64)
    language_spec = ModuleSpec(
        module=GPTModel,
        params={
            "config": language,
            "transformer_layer_spec": get_gpt_layer_local_spec(),
            "vocab_size": VOCABULARY,
            "max_sequence_length": LENGTH,
            "position_embedding_type": "mrope",
        },
    )
    encoder_spec = ModuleSpec(
        module=CLIPViTModel,
        params={
            "transformer_config": vision,
            "transformer_layer_spec": get_vit_layer_with_local_spec(),
            "ln_pre_impl": WrappedTorchNorm,
            "add_class_token": False,
            "patch_dim": PATCH_SIZE,
            "img_h": IMAGE_SIZE,
            "img_w": IMAGE_SIZE,
        },
    )
    projector_spec = ModuleSpec(
        module=MultimodalProjector,
        params={
            "config": projector,
            "submodules": MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            "projector_type": "mlp",
            "input_size": vision.hidden_size,
        },
    )
    images_spec = ModuleSpec(
        module=VisionModalitySubmodules,
        submodules={"encoders": {"clip": COMPRESSOR.encoder_spec(encoder_spec)}, "input_projections": [projector_spec]},
    )
    model = MimoModel(MimoModelConfig(language_spec, {"images": images_spec}, special_token_ids={"images": IMAGE}))
    model.model_type = ModelType.encoder_or_decoder  # schedules ask for it, and MimoModel leaves it out
    return model


def batches(seed: int) -> Iterator[Batch]:
    """Pictures of one grey each, and a text that spells how bright it is; labels and loss mask are shifted by one."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        brightness = torch.randint(8, (MICRO_BATCH_SIZE,), generator=generator)
        noise = torch.rand(MICRO_BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        pixels = brightness.view(-1, 1, 1, 1) / 8 + noise / 8
        image = [1] + [IMAGE] * COMPRESSOR.num_tokens_out + [2]
        tokens = torch.tensor([[*image, 10 + shade, 20 + shade, 30 + shade, 3] for shade in brightness.tolist()])
        positions = COMPRESSOR.position_ids(tokens[:, :-1], IMAGE)
        batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "pixels": pixels, "positions": positions}
        yield {name: tensor.cuda() for name, tensor in batch.items()}


def forward_step(iterator: Iterator[Batch], model: torch.nn.Module):
    batch = next(iterator)
    losses, _ = model(
        input_ids=batch["tokens"],
        position_ids=batch["positions"].expand(3, -1, -1),
        labels=batch["labels"],
        modality_inputs={"images": {"clip": {"x": batch["pixels"]}}},
    )
    learns = (batch["labels"] >= FIRST_WORD) & (batch["labels"] != IMAGE)

    def loss_function(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = output[learns].mean()
        return loss, loss.detach().clone()

    return losses, loss_function


def main() -> None:
    num_steps = arguments().parse_args().steps
    core.parallel_state.initialize_model_parallel()
    core.tensor_parallel.model_parallel_cuda_manual_seed(1234)
    torch.manual_seed(1234)
    model = build_model().cuda()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("input_projections" in name)
    ddp_config = core.distributed.DistributedDataParallelConfig(
        overlap_grad_reduce=True, use_distributed_optimizer=True
    )
    model = core.distributed.DistributedDataParallel(model.config, ddp_config, model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=1.0, use_distributed_optimizer=True), [model]
    )
    model.config.finalize_model_grads_func = core.distributed.finalize_model_grads
    model.config.no_sync_func = model.no_sync
    forward_backward = core.pipeline_parallel.get_forward_backward_func()

    iterator = batches(seed=core.parallel_state.get_data_parallel_rank())
    for step in range(num_steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = forward_backward(
            forward_step_func=forward_step,
            data_iterator=iterator,
            model=model,
            num_microbatches=MICRO_BATCHES,
            seq_length=LENGTH,
            micro_batch_size=MICRO_BATCH_SIZE,
            forward_only=False,
        )
        _, grad_norm, _ = optimizer.step()
        print(f"step {step} loss {torch.stack(losses).mean().item()!r} gradient norm {float(grad_norm)!r}")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    return parser


if __name__ == "__main__":
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    main()
    dist.destroy_process_group()
