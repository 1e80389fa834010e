"""What this machine has: device, the precision that is fastest on it, memory, a name to put beside a number."""

import os
import platform
import resource
import sys
from pathlib import Path

import torch


def fast_bf16():
    """Whether this CPU multiplies bfloat16 in hardware. Without, bf16 on a CPU is far slower than fp32."""
    if platform.machine() in ("x86_64", "AMD64"):
        try:
            flags = Path("/proc/cpuinfo").read_text()
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
        for line in Path("/proc/cpuinfo").read_text().splitlines():
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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
