"""What the `gpu` overlay of every lesson would cost on a free T4: an estimate from counted work, not a measurement.

    python -m tools.gpu_budget                    all ready lessons
    python -m tools.gpu_budget lesson_05 05c      these lessons
    python -m tools.gpu_budget 05 unet.channels=96 steps=5000        with other values

The lesson's own train.py does one step of each of its loops on torch's device "meta", where tensors have shapes and
types but no numbers, so that it takes no time. A step costs the sum over its operations of the longer of two:

- what it computes, if it is a convolution or a matrix product: 20 TFLOP/s in fp16, 6 in fp32 (a T4's peaks: 65 and 8);
- the bytes of the tensors that it reads and writes: 220 GB/s (peak: 320);

but at least 10 microseconds an operation, in which Python starts it. Types are those of autocast on CUDA. Adam and the
average of the weights are included; start, previews, evaluations and checkpoints are not. Memory: weights, gradients,
Adam's moments and the average, and what the forward pass keeps for the backward pass.
"""

import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from types import MethodType
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tools.frontpage import load_lessons
from utils import Run, UserError, cli, config, data
from utils.files import ROOT

MINUTES, MEMORY = 20, 12e9                             # what an overlay may take; a T4 has 15 GB
RATE = {"fp16": 20e12, "fp32": 6e12}                   # operations a second
TRAFFIC, START = 220e9, 10e-6                          # bytes a second; seconds
META = torch.device("meta")

# Keys that make the tool quick and no step cheaper. What stands between two loops grows with such a number.
QUICKER = {"04": {"ncsn.sigma_1": 16.9}, "21": {"train.pairs": 128},
           **dict.fromkeys(("05e", "32", "34"), {"captions.images": 500})}


# ------------------------------------------------------------------ what CUDA's autocast does, on "meta"
# https://docs.pytorch.org/docs/stable/amp.html: of its lists what the lessons use.
T = torch.Tensor
HALF = {F.linear, F.conv2d, torch.conv2d, F.conv_transpose2d, torch.matmul, T.matmul, T.__matmul__, torch.bmm, T.bmm,
        torch.einsum, F.scaled_dot_product_attention}
FULL = {F.group_norm, F.layer_norm, F.rms_norm, F.softmax, torch.softmax, T.softmax, F.mse_loss, F.softplus, torch.exp,
        T.exp, torch.log, T.log, torch.pow, T.pow, T.__pow__, torch.rsqrt, T.rsqrt, torch.sum, T.sum, T.norm,
        torch.cumsum, T.cumsum, T.prod, torch.expm1, T.expm1}


class Autocast(TorchFunctionMode):
    """Casts the floats that these functions are given, as CUDA's autocast would."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        to = torch.float16 if func in HALF else torch.float32 if func in FULL else None
        if to:
            args, kwargs = cast(args, to), cast(kwargs or {}, to)
        return func(*args, **(kwargs or {}))


def cast(value, to):
    """Arguments with their floating tensors as this type; float64 stays."""
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(to)
    if isinstance(value, (list, tuple)):
        return type(value)(cast(item, to) for item in value)
    return {key: cast(item, to) for key, item in value.items()} if isinstance(value, dict) else value


class Numberless(TorchFunctionMode):
    """What cannot be done without numbers: a copy from "meta" to the CPU is empty, a question is answered by yes."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is T.cpu and args[0].is_meta:
            return torch.empty(args[0].shape, dtype=args[0].dtype)
        if func is T.copy_ and args[1].is_meta and not args[0].is_meta:
            return args[0]
        if func is T.__bool__ and args[0].is_meta:
            return True
        if func is F.scaled_dot_product_attention and args[0].is_meta:             # no matrix of weights in memory
            return torch.ops.aten._scaled_dot_product_efficient_attention(*args, None, True, **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))


# ------------------------------------------------------------------ seeing the work
@dataclass
class Phase:
    """One step of a loop, or what stands between two loops, and how often it is done."""

    times: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0                               # of the GPU
    kernels: int = 0

    def total(self):
        """Seconds of them all: of the GPU, or of Python where that is slower."""
        return self.times * max(self.seconds, START * self.kernels)


class Work(TorchDispatchMode):
    """Adds every operation on "meta" to the newest phase."""

    known = {}                                         # of an operation on tensors like these: what it gives and costs

    def __init__(self, rate):
        super().__init__()
        self.rate, self.phases = rate, [Phase()]
        self.parameters, self.kept = 0, 0              # of the largest optimizer; bytes, for the backward pass

    def add(self, flops, moved):
        phase = self.phases[-1]
        phase.flops += flops
        phase.seconds += max(flops / self.rate, moved / TRAFFIC)
        phase.kernels += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, key = kwargs or {}, None
        given = [*leaves([args, kwargs])]
        if func.is_view or not given:
            return func(*args, **kwargs)
        if not func._schema.is_mutable and all(one.is_meta for one in given):
            key = func, like(args), like(kwargs)
            if key in self.known:
                out, flops, moved = self.known[key]
                self.add(flops, moved)
                return made(out)
        out = func(*args, **kwargs)
        tensors = [one for one in [*given, *leaves(out)] if one.is_meta]
        if tensors:
            count = flop_registry.get(func.overloadpacket)
            cost = count(*args, **kwargs, out_val=out) if count else 0, sum(one.nbytes for one in tensors)
            self.add(*cost)
            if key:
                self.known[key] = like(out), *cost
        return out


@dataclass(frozen=True)
class Like:
    """What a tensor on "meta" is."""

    size: tuple
    stride: tuple
    dtype: torch.dtype


def like(value):
    """Arguments or results with every tensor as a `Like`: hashable."""
    if isinstance(value, torch.Tensor):
        return Like(tuple(value.shape), value.stride(), value.dtype)
    if isinstance(value, dict):
        return tuple((key, like(item)) for key, item in value.items())
    return tuple(map(like, value)) if isinstance(value, (list, tuple)) else value


def made(value):
    """Tensors as `value` describes them."""
    if isinstance(value, Like):
        return torch.empty_strided(value.size, value.stride, dtype=value.dtype, device=META)
    return tuple(map(made, value)) if isinstance(value, tuple) else value


def leaves(value):
    """The tensors in arguments."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)


class Sketch(Run):
    """A run that does one step of each loop, on "meta"."""

    is_main = False                                    # no files, no pictures, not a word

    def __init__(self, file, argv, work, precision, between):
        super().__init__(file, argv)
        self.device, self.work, self.precision, self.between = META, work, precision, between
        self.kept = {}

    def prepare(self, *objects):
        modules = [item for item in objects if isinstance(item, torch.nn.Module)]
        for item in objects:
            if item in modules:
                item.to(META)
                if self.precision == "fp16" and any(True for _ in item.parameters()):
                    item.forward = MethodType(in_half(type(item).forward), item)
            else:
                size = sum(p.numel() for group in item.param_groups for p in group["params"])
                # Adam reads four numbers a parameter and writes three; fp16's gradients are scaled back before.
                item.step = partial(self.work.add, 0, (28 + 8 * (self.precision == "fp16")) * size)
                item.zero_grad = lambda: [module.zero_grad() for module in modules]
                self.work.parameters = max(self.work.parameters, size)
        return objects[0] if len(objects) == 1 else objects

    def steps(self, data, until=None):
        end = self.settings.steps if until is None else until
        if self.step < end:
            self.work.phases.append(Phase(end - self.step))
            with torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor):
                yield self.step, tuple(part.to(META) for part in data.batch(self.step))
            self.work.kept, self.kept = max(self.work.kept, sum(one.nbytes() for one in self.kept.values())), {}
            self.work.phases.append(Phase(self.between))
            self.step = end

    def keep(self, tensor):
        """Remember what the forward pass keeps for the backward pass, weights aside."""
        if tensor.is_meta and not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            self.kept[storage._cdata] = storage
        return tensor

    def backward(self, loss):
        loss.backward()

    def clip_grad_norm(self, parameters, bound):
        return torch.nn.utils.clip_grad_norm_(parameters, bound)

    def nothing(self, *args, **kwargs):
        """What a run does beside training."""

    track = log = every = output = publish = nothing

    def finish(self, ema, **networks):
        self._release()


def in_half(forward):
    """A network's `forward` under autocast, its output in float32."""
    def half(self, *args, **kwargs):
        with Autocast():
            out = forward(self, *args, **kwargs)
        return cast(out, torch.float32)
    return half


# ------------------------------------------------------------------ a lesson
read_once = cache(data.read_idx)


@contextmanager
def quickly():
    """Weights are left as memory gives them; MNIST is read once."""
    with ExitStack() as stack:
        for name in dir(torch.nn.init):
            if name.endswith("_") and not name.startswith("_"):
                stack.enter_context(mock.patch.object(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor))
        stack.enter_context(mock.patch.object(data, "read_idx", read_once))
        yield


@contextmanager
def scripts(folder):
    """Lets `import train` be that of this lesson; afterwards the modules are those from before."""
    names = [path.stem for path in folder.glob("*.py")]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def estimate(lesson, root=ROOT, keys=()):
    """One row of the table: a dict. lesson: its entry in lessons.yaml; keys: of train.py, laid over the overlay."""
    folder, quicker = root / lesson["folder"], QUICKER.get(lesson["number"], {})
    cfg = config.load(folder / "config.yaml", "train", ["gpu=true", *keys])
    precision = "fp32" if cfg.train.precision == "fp32" else "fp16"               # a T4 has no bf16
    scale = [getattr(cfg[section], key) / value for (section, key), value in
             ((name.split("."), value) for name, value in quicker.items()) if section == "train"]
    work = Work(RATE[precision])
    with quickly(), scripts(folder):
        train = import_module("train")
        train.Run = partial(Sketch, work=work, precision=precision, between=(scale or [1])[0])
        with Numberless(), work:
            train.main(["gpu=true", "device=cpu", *keys, "precision=fp32",
                        *(f"{key}={value}" for key, value in quicker.items())])
    loops = work.phases[1::2]
    return {"lesson": lesson["folder"], "precision": precision, "batch": cfg.train.batch_size,
            "steps": cfg.train.steps, "parameters": work.parameters,
            "gflop": sum(loop.times * loop.flops for loop in loops) / cfg.train.steps / 1e9,
            "memory": 20 * work.parameters + work.kept, "ms": sum(map(Phase.total, loops)) / cfg.train.steps * 1e3,
            "minutes": sum(map(Phase.total, work.phases)) / 60}


def chosen(names, root=ROOT):
    """The entries of the ready lessons with these names (lesson_05, 05c); of all of them, if none is named."""
    ready = [lesson for lesson in load_lessons(root) if lesson["state"] == "ready"]
    names = [name.rstrip("/") for name in names]
    for name in names:
        if not any(name in (lesson["number"], lesson["folder"]) for lesson in ready):
            raise UserError(f"{name} is no ready lesson: write it as lesson_05, lesson_05/sublesson_c or 05c")
    return [lesson for lesson in ready if not names or {lesson["number"], lesson["folder"]} & set(names)]


def rows(argv=(), root=ROOT):
    """The rows of the lessons that are named, or of all; key=value holds for each of them."""
    for lesson in chosen([item for item in argv if "=" not in item], root):
        yield estimate(lesson, root, [item for item in argv if "=" in item])


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        return print(__doc__)
    print("Estimates for a T4, not measured: `python -m tools.gpu_budget --help` says how.\n")
    print("lesson                precision  batch  parameters  GFLOP a step   memory     steps  ms a step  minutes")
    for row in rows(argv):
        print("{lesson:22}{precision:>9}{batch:7}{parameters:12,}{gflop:14,.1f}{0:8.1f} GB{steps:9,}{ms:11.1f}"
              "{minutes:9.1f}".format(row["memory"] / 1e9, **row), flush=True)


if __name__ == "__main__":
    cli(main)
