"""The only room that imports megatron-core. Importing it readies the process: CUDA as it is, or the CPU stand-in."""

import logging
import warnings

from megatron_sts.runtime.device import current_device

# megatron-core announces missing optional kernels and its own deprecations on every rank; `doctor` says it once, in order.
warnings.filterwarnings("ignore", module=r"megatron\.")
# It passes these on from torch at every load, which a user can do nothing about.
warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")
# torch's next names of what megatron-core calls by its old ones.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
# The distributed optimizer's fp32 shards are views, and Adam looks for gradients of those that a step skips.
warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
logging.getLogger("megatron").setLevel(logging.ERROR)
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

if not current_device().is_cuda:
    from megatron_sts.mcore import cpu

    cpu.install()
