"""What this machine has: devices and processes, the fastest precision, memory, a name to put beside a number."""

import os
import platform
import sys
from pathlib import Path

import torch

from .errors import UserError


def start(device, precision):
    """The Accelerator of this process and its precision, for a run's settings `device` and `precision`.

    Plain `python` has one process; torchrun and `accelerate launch` start several.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise UserError("device=cuda: no CUDA GPU was found; leave device out to use the CPU")
    cpu = device == "cpu" or not cuda
    if precision == "auto":
        precision = auto_precision("cpu" if cpu else "cuda")
    if precision == "fp16" and cpu:
        raise UserError("precision=fp16 needs a GPU; use bf16 or fp32")
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        AcceleratorState._reset_state(True)            # one process may run several scripts (a notebook, the tests)
    # Without cpu=True, torchrun on a machine without a GPU would train separate models without a word.
    accelerator = Accelerator(cpu=cpu, mixed_precision="no" if precision == "fp32" else precision)
    if int(os.environ.get("WORLD_SIZE", 1)) != accelerator.num_processes:
        raise UserError(f"{os.environ['WORLD_SIZE']} processes were started, but {accelerator.num_processes} work "
                        "together")
    return accelerator, precision


def fast_bf16():
    """Whether this CPU multiplies bfloat16 in hardware. Without, bf16 on a CPU is far slower than fp32."""
    if platform.machine() in ("x86_64", "AMD64"):
        try:
            flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        except OSError:
            return False
        return "avx512_bf16" in flags or "amx_bf16" in flags
    return False


def auto_precision(device):
    """bf16 on CPUs that have it and on GPUs from compute capability 8.0 (A100, 30xx), fp16 on older GPUs (T4)."""
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if fast_bf16() else "fp32"


def device_name(device="cpu"):
    """A short name such as "2 CPU cores (AMD EPYC)" or "Tesla T4"."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    cores = min(torch.get_num_threads(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 10**6)
    return f"{cores} CPU core{'s' * (cores > 1)} ({model})"


def peak_memory_mb(device="cpu"):
    """The most memory this process has held so far, in MB: resident on a CPU, allocated on a GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:                                # Windows
        import psutil  # accelerate depends on it

        return psutil.Process().memory_info().peak_wset / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
