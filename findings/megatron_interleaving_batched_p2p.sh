#!/usr/bin/env bash
# Finding: megatron-core's interleaved schedule on two pipeline ranks gives wrong gradients with its default settings, silently.
# Versions: megatron-core 0.19.2, torch 2.14.1 (CPU, gloo).
# Behaviour: with two ranks a rank's next and previous neighbour are the same process. By default (batch_p2p_comm=True) the tensors of
#   both streams go to it in one batch, and are mixed up: losses are finite and gradients wrong by a large factor. overlap_p2p_comm=True
#   with batch_p2p_comm=False is right. megatron.training's argument parser refuses the first; megatron.core's config takes it without
#   a word. Seen over gloo; NCCL was not tried. (megatron-core asks for CUDA: the script answers with the CPU in a few places.)
# Output: one rank: gradient norm 0.3588
#   two ranks, overlap_p2p_comm=True, batch_p2p_comm=False: gradient norm 0.3588
#   two ranks, default: gradient norm 737.2558
# What to do: set both flags, or use more than two pipeline ranks.
set -euo pipefail
work=$(mktemp -d)
# shellcheck source=findings/venv.bash
. "$(dirname "${BASH_SOURCE[0]}")/venv.bash" torch==2.14.1 megatron-core==0.19.2
cat > finding.py <<'EOF'
"""Gradient norm of four micro-batches through four layers; PIPELINE ranks with two chunks each."""

import contextlib
import os

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class OnCpu(TorchFunctionMode):
    """device="cuda" means the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = CPU
        return function(*args, **kwargs)


torch.cuda.current_device = lambda: CPU
torch.cuda.synchronize = lambda *args: None
OnCpu().__enter__()
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel import random  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402


class Tracker:
    """Random states for initialisation; nothing is random afterwards."""

    is_initialized, get_states, reset, add = lambda _: True, lambda _: {}, lambda _: None, lambda *_: None
    fork = lambda *_: contextlib.nullcontext()  # noqa: E731


random._CUDA_RNG_STATE_TRACKER, random._CUDA_RNG_STATE_TRACKER_INITIALIZED = Tracker(), True
LENGTH, VOCABULARY, MICROBATCHES = 16, 64, 4
ranks, chunks = int(os.environ["WORLD_SIZE"]), 2 if int(os.environ["WORLD_SIZE"]) > 1 else None
flags = {"overlap_p2p_comm": True, "batch_p2p_comm": False} if os.environ["FLAGS"] == "right" else {}
torch.distributed.init_process_group("gloo")
parallel_state.initialize_model_parallel(1, ranks, chunks)
config = TransformerConfig(
    num_layers=4, hidden_size=32, num_attention_heads=4, use_cpu_initialization=True, pipeline_dtype=torch.float32,
    pipeline_model_parallel_size=ranks, virtual_pipeline_model_parallel_size=chunks, attention_dropout=0.0,
    hidden_dropout=0.0, gradient_accumulation_fusion=False, bias_dropout_fusion=False, masked_softmax_fusion=False, **flags,
)
models = []
for chunk in range(chunks or 1):
    number = chunk if chunks else None
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=number)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=number)
    models.append(GPTModel(
        config, get_gpt_layer_local_spec(), VOCABULARY, LENGTH, pre_process=first, post_process=last, vp_stage=number,
        position_embedding_type="rope", share_embeddings_and_output_weights=False,
    ))  # fmt: skip
for model in models:  # the same weights in every layout
    layers = {f"decoder.layers.{i}.": layer.layer_number for i, layer in enumerate(model.decoder.layers)}
    for name, parameter in model.named_parameters():
        number = next((number for prefix, number in layers.items() if name.startswith(prefix)), 0)
        seed = 1000 * number + sum(map(ord, name.split(".", 3)[-1] if number else name))
        parameter.data.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(seed))


def batches():
    for number in range(MICROBATCHES):
        yield torch.randint(0, VOCABULARY, (1, LENGTH + 1), generator=torch.Generator().manual_seed(number))


def step(iterator, model):
    words = next(iterator)
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril().logical_not()
    output = model(words[:, :-1].contiguous(), torch.arange(LENGTH)[None], mask, labels=words[:, 1:].contiguous())
    return output, lambda losses: (losses.mean(), {})


get_forward_backward_func()(
    forward_step_func=step, data_iterator=[batches() for _ in models] if chunks else batches(), model=models,
    num_microbatches=MICROBATCHES, seq_length=LENGTH, micro_batch_size=1, forward_only=False,
)  # fmt: skip
squares = sum(p.grad.double().square().sum() for model in models for p in model.parameters() if p.grad is not None)
torch.distributed.all_reduce(squares)
if torch.distributed.get_rank() == 0:
    print(float(squares.sqrt()))
torch.distributed.destroy_process_group()
EOF
norm() { FLAGS=$2 OMP_NUM_THREADS=1 timeout 300 torchrun --standalone --nproc-per-node "$1" finding.py 2>log || { tail -5 log >&2; exit 1; }; }
one=$(norm 1 right) right=$(norm 2 right) default=$(norm 2 default)
printf 'one rank: gradient norm %.4f\n' "$one"
printf 'two ranks, overlap_p2p_comm=True, batch_p2p_comm=False: gradient norm %.4f\n' "$right"
printf 'two ranks, default: gradient norm %.4f\n' "$default"
python -c 'import sys
one, right, default = map(float, sys.argv[1:])
assert abs(right / one - 1) < 1e-4 and not abs(default / one - 1) < 0.1, "behaves otherwise now"' "$one" "$right" "$default"
