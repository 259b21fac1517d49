"""A GPT of megatron-core in a training loop of one's own: interleaved pipeline, overlapped DDP, distributed optimizer."""

import argparse
import os
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist

import megatron_sts.mcore  # noqa: F401  lets megatron-core run without CUDA, over gloo; with CUDA it changes nothing

# isort: split
from megatron import core
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig

STAGES, CHUNKS = 2, 4
VOCABULARY, LENGTH = 128, 32
MICRO_BATCHES, MICRO_BATCH_SIZE = 4, 2

Batch = tuple[torch.Tensor, torch.Tensor]


def batches(seed: int) -> Iterator[Batch]:
    """Tokens and labels [b, s]: rows that count up from somewhere."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        start = torch.randint(VOCABULARY, (MICRO_BATCH_SIZE, 1), generator=generator)
        rows = (start + torch.arange(LENGTH + 1)) % VOCABULARY
        yield rows[:, :-1].cuda(), rows[:, 1:].cuda()


def loss_function(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    loss = losses.float().mean()
    return loss, loss.detach().clone()


def forward_step(iterator: Iterator[Batch], model: torch.nn.Module):
    tokens, labels = next(iterator)
    positions = torch.arange(LENGTH, device=tokens.device).expand_as(tokens)
    return model(tokens, positions, None, labels=labels), loss_function


def main() -> None:
    num_steps = arguments().parse_args().steps
    core.parallel_state.initialize_model_parallel(1, STAGES, CHUNKS)
    core.tensor_parallel.model_parallel_cuda_manual_seed(1234)
    torch.manual_seed(1234 + core.parallel_state.get_pipeline_model_parallel_rank())
    config = TransformerConfig(
        num_layers=8,
        hidden_size=64,
        num_attention_heads=4,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=not torch.cuda.is_available(),
        pipeline_model_parallel_size=STAGES,
        virtual_pipeline_model_parallel_size=CHUNKS,
        pipeline_dtype=torch.float32,
        deallocate_pipeline_outputs=True,
        overlap_p2p_comm=True,
        batch_p2p_comm=False,
    )
    ddp_config = core.distributed.DistributedDataParallelConfig(
        overlap_grad_reduce=True, overlap_param_gather=True, use_distributed_optimizer=True
    )
    spec = get_gpt_layer_with_transformer_engine_spec() if torch.cuda.is_available() else get_gpt_layer_local_spec()
    chunks = []
    for number in range(CHUNKS):
        first, last = (
            is_end(ignore_virtual=False, vp_stage=number)
            for is_end in (core.parallel_state.is_pipeline_first_stage, core.parallel_state.is_pipeline_last_stage)
        )
        model = partial(GPTModel, pre_process=first, post_process=last, vp_stage=number)
        chunk = model(config, spec, VOCABULARY, LENGTH, position_embedding_type="rope").cuda()
        chunks.append(core.distributed.DistributedDataParallel(config, ddp_config, chunk))
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=3e-3, clip_grad=1.0, use_distributed_optimizer=True), chunks
    )
    config.finalize_model_grads_func = core.distributed.finalize_model_grads
    config.no_sync_func = [chunk.no_sync for chunk in chunks]
    config.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]
    forward_backward = core.pipeline_parallel.get_forward_backward_func()

    iterators = [batches(seed=core.parallel_state.get_data_parallel_rank()) for _ in chunks]
    for step in range(num_steps):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        losses = forward_backward(
            forward_step_func=forward_step,
            data_iterator=iterators,
            model=chunks,
            num_microbatches=MICRO_BATCHES,
            seq_length=LENGTH,
            micro_batch_size=MICRO_BATCH_SIZE,
            forward_only=False,
        )
        _, grad_norm, _ = optimizer.step()
        if losses:  # on the last pipeline stage
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
