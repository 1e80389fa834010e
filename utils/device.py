"""What this machine has: devices and processes, the fastest precision, memory, a name to put beside a number."""

import functools
import multiprocessing
import os
import platform
import sys
import warnings
from pathlib import Path

import torch

from .errors import UserError


def start(device, precision):
    """The Accelerator of this process and its precision, for a run's settings `device` and `precision`.

    Plain `python` has one process; torchrun and `accelerate launch` start several.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    kind = choose(device)
    if kind == "cuda":
        check_gpus(os.environ)
    elif kind == "cpu" and device == "auto" and (why := unused_gpu()):
        warn(why)
    if precision == "auto":
        precision = auto_precision(kind)
    if kind == "cpu" and precision == "fp16":
        raise UserError("precision=fp16 needs a GPU; use bf16 or fp32")
    if kind == "mps" and precision != "fp32":
        raise UserError(f"precision={precision}: on a Mac's GPU this course computes in fp32; leave precision out")
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        AcceleratorState._reset_state(True)            # one process may run several scripts (a notebook, the tests)
    # Without cpu=True, torchrun on a machine without a GPU would train separate models without a word.
    accelerator = Accelerator(cpu=kind == "cpu", mixed_precision="no" if precision == "fp32" else precision)
    if int(os.environ.get("WORLD_SIZE", 1)) != accelerator.num_processes:
        raise UserError(f"{os.environ['WORLD_SIZE']} processes were started, but {accelerator.num_processes} work "
                        "together")
    return accelerator, precision


def choose(device="auto"):
    """"cuda", "mps" (the GPU of a Mac, for one process alone) or "cpu": what a run's setting `device` means here."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available() and not several, "cpu": True}
    kind = next(kind for kind in there if there[kind]) if device == "auto" else device
    if not there[kind]:
        if kind == "cuda":
            why = unused_gpu() or "no CUDA GPU was found"
            raise UserError(f"device=cuda: {why}; leave device out to take what there is")
        raise UserError(f"device=mps: no GPU of a Mac was found{' that several processes can share' * several}; leave "
                        "device out to take what there is")
    return kind


# ------------------------------------------------------------------ a device without float64
def home(device):
    """Where images, noise, schedules and solvers of a run on this device are: MPS has no float64 and only networks."""
    return torch.device("cpu") if device.type == "mps" else device


def device_of(net):
    """The device on which a network is given its input."""
    return home(next(net.parameters()).device)


def put(module, device):
    """A module on the device. With MPS that is a network alone, which is called from the CPU; a process stays there."""
    if device.type != "mps":
        return module.to(device)
    if any(True for _ in module.parameters()):
        from accelerate.utils import recursively_apply

        def there(x):
            return (x.float() if x.dtype == torch.float64 else x).to(device)

        module.to(device)
        module.register_forward_pre_hook(lambda _, *given: recursively_apply(there, given), with_kwargs=True)
        module.register_forward_hook(lambda _, args, output: recursively_apply(torch.Tensor.cpu, output))
    return module


# ------------------------------------------------------------------ several processes
# What mpirun tells each of several processes; torchrun needs none of it.
FOREIGN = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def check_processes(environment):
    """UserError if variables promise several processes that cannot find each other."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", *FOREIGN):
        if not environment.get(name, "0").isdecimal():
            raise UserError(f"{name}={environment[name]} must be a whole number: unset {name}, or start with torchrun")
    size = int(environment.get("WORLD_SIZE", 1))
    absent = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if size > 1 and absent:
        raise UserError(f"WORLD_SIZE={size} promises {size} processes, but {absent[0]} is not set: start them with "
                        f"`torchrun --nproc_per_node {size}`, or unset WORLD_SIZE")
    for name in FOREIGN:
        if "WORLD_SIZE" not in environment and (size := int(environment.get(name, 1))) > 1:
            raise UserError(f"{name}={size} promises {size} processes, which would not know each other: start them "
                            f"with `torchrun --nproc_per_node {size}` instead of mpirun, or unset {name}")


def check_gpus(environment):
    """UserError if more processes were started on this machine than it has GPUs: NCCL's own error names neither."""
    gpus = torch.cuda.device_count()
    started = max(int(environment.get("LOCAL_WORLD_SIZE", 1)), int(environment.get("LOCAL_RANK", 0)) + 1)
    if started > gpus:
        raise UserError(f"{started} processes were started here, but the GPUs are {gpus}, and each needs its own: "
                        f"start with `torchrun --nproc_per_node {max(gpus, 1)}`, or add device=cpu")


KNOWN_GPUS = Path("/proc/driver/nvidia/gpus")          # where Linux' NVIDIA driver lists what it has found


def unused_gpu():
    """Why this machine's NVIDIA GPU cannot be used, in one line; None if it can, is hidden, or is not there.

    torch counts GPUs by NVML, which any driver answers; whether it can use them it asks CUDA, which may want a newer.
    """
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    if torch.version.cuda:
        with warnings.catch_warnings(action="ignore"):
            found = torch.cuda.device_count()
        why = f"cannot use it; its driver is probably older than CUDA {torch.version.cuda} wants"
        how = "update it, or install a torch for an older CUDA"
        return f"an NVIDIA GPU is there, but torch {torch.__version__} {why}: {how}" if found else None
    if KNOWN_GPUS.is_dir() and any(KNOWN_GPUS.iterdir()) and not torch.version.hip:
        return f"an NVIDIA GPU is there, but torch {torch.__version__} was built without CUDA: install one with it"
    return None


@functools.cache
def warn(why):
    """Say once that the CPU computes although there is a GPU: of several processes, the first says it."""
    if os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None:
        print(f"warning: {why}; the CPU computes, which takes longer", file=sys.stderr, flush=True)


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
    kind = torch.device(device).type
    if kind == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if kind == "cpu" and fast_bf16() else "fp32"


def device_name(device="cpu", processes=1):
    """A name such as "2 CPU cores (AMD EPYC)", "Tesla T4" or "GPU of Apple M2", for so many processes like this one."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_name(device)
    if kind == "mps":
        return f"GPU of {torch.backends.mps.get_name()}"
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    cores = processes * torch.get_num_threads()
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    return f"{cores} CPU core{'s' * (cores > 1)} ({model})"


def move(tensor, device):
    """A tensor on this device. On the way from the CPU to a GPU nothing waits: it is copied from pinned memory."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def wait_for(device):
    """Return when the device has done all that it was given. A CPU has, when a call returns."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


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
