"""A GPU that is not there: every tensor knows its device; the values lie on the CPU, in fp32.

    before = "import sys; sys.path.append(TESTS); import fakegpu; fakegpu.install(FILE)"    for conftest's `launch`

From then on this process believes in one Tesla T4: torch.cuda.is_available() holds, device="cuda" makes a tensor that
says so, `.to` moves it, and what CUDA refuses is refused: two devices in one operation, an index on the GPU for a
tensor on the CPU, a generator of the CPU for noise on the GPU, numpy. What makes the CPU wait for the GPU is written to
FILE, a line each: the step of the training ("-" outside), what it was, file and line (`waits` reads them).

kind="mps" pretends the GPU of a Mac instead, a device without float64: no such tensor is made, moved or computed there.

Nothing of CUDA is touched, so it runs with any build of torch. Autocast of "cuda" leaves tensors of the CPU alone, so
sums are those of fp32; the GradScaler of fp16, its steps and its state are the real ones. It sees the calls that Python
makes: what a function of torch does inside is not looked at.
"""

import itertools
import os
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

ROOT, LIBRARY = str(Path(__file__).resolve().parent.parent), str(Path(os.__file__).parent)
CPU = torch.device("cpu")
T = torch.Tensor
HERE = {T, torch.nn.Parameter, torch.nn.Buffer, torch.Generator}

# What a tensor says about itself, wherever it lies.
PLAIN = {getattr(T, name).__get__ for name in (
    "shape", "dtype", "ndim", "requires_grad", "is_leaf", "layout", "grad_fn", "is_sparse", "itemsize",
    "is_quantized", "is_meta", "is_mkldnn", "is_nested", "_version", "_backward_hooks", "output_nr")} | {
    T.size, T.dim, T.numel, T.stride, T.__len__, T.is_floating_point, torch.is_floating_point, T.is_complex,
    torch.is_complex, T.is_contiguous, T.element_size, T.storage_offset, torch.numel, T.__hash__, T.is_set_to,
    torch._has_compatible_shallow_copy_type}
# A number comes to the CPU, or a size that depends on values: it waits until the GPU is done.
READS = {T.item, T.tolist, T.__bool__, T.__float__, T.__int__, T.__index__, T.__contains__, T.__repr__, T.__format__,
         T.nonzero, torch.nonzero, torch.argwhere, T.equal, torch.equal, T.allclose, torch.allclose, T.unique,
         torch.unique, T.masked_select, torch.masked_select, torch.bincount, torch.histc, torch.is_nonzero}
# Not even a single number of the CPU may enter these.
STRICT = {torch.cat, torch.stack, torch.matmul, T.matmul, T.__matmul__, torch.bmm, torch.mm, torch.nn.functional.linear,
          torch.nn.functional.conv2d, torch.nn.functional.embedding, torch.gather, T.gather, T.index_select}
LIKE = {T.view_as, T.expand_as, T.reshape_as}          # take the shape of another tensor, and nothing else of it


def leaves(value):
    """The tensors and generators in arguments."""
    kind = type(value)                                 # isinstance(x, Tensor) runs Python code, and this runs always
    if kind in HERE:
        yield value
    elif issubclass(kind, (list, tuple)):
        for item in value:
            yield from leaves(item)
    elif issubclass(kind, dict):
        for item in value.values():
            yield from leaves(item)


def on_gpu(device):
    return device is not None and torch.device(device).type in ("cuda", "mps")


class FakeGPU(TorchFunctionMode):
    """Between Python and torch. mine, pinned: tensors on the GPU, and those of the CPU in memory that it can read."""

    def __init__(self, report=None, kind="cuda"):
        super().__init__()
        self.gpu = torch.device(kind, 0)
        self.mine, self.pinned, self.step, self.report = {}, {}, "-", report

    def on(self, tensor):
        """Whether a tensor is on the GPU."""
        return id(tensor) in self.mine

    def mark(self, value, gpu=True, known=None):
        """Put the tensors in `value` on one side; returns it. known: ids of those that stay where they are."""
        for tensor in leaves(value):
            if known is None or id(tensor) not in known:
                self._remember(self.mine, tensor) if gpu else self.mine.pop(id(tensor), None)
                if gpu and self.gpu.type == "mps" and tensor.dtype in (torch.float64, torch.complex128):
                    raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support "
                                    f"float64. Please use float32 instead. ({self.place()})")
        return value

    @staticmethod
    def _remember(where, tensor):
        key = id(tensor)
        where[key] = weakref.ref(tensor, lambda _: where.pop(key, None))

    def place(self):
        """File and line of the code that is running, Python's own and its packages' aside."""
        frame = sys._getframe(1)
        while frame:
            name = frame.f_code.co_filename
            if name != __file__ and not name.startswith((LIBRARY, "<")) and "site-packages" not in name:
                return f"{name.removeprefix(ROOT + os.sep)}:{frame.f_lineno}"
            frame = frame.f_back
        return "?"

    def wait(self, what):
        """Here the CPU waits for the GPU."""
        if self.report:
            with open(self.report, "a", encoding="utf-8") as file:
                file.write(f"{self.step} {what}, {self.place()}\n")

    def refuse(self, text):
        raise RuntimeError(f"{text} ({self.place()})")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in PLAIN:
            return func(*args, **kwargs)
        first = args[0] if args else None
        mine = self.on(first)
        if func in SPECIAL:
            return SPECIAL[func](self, func, mine, args, dict(kwargs))
        found = [*leaves(args), *leaves(kwargs)] if kwargs else list(leaves(args))
        tensors = [one for one in found if type(one) is not torch.Generator]
        gpus = [one for one in tensors if id(one) in self.mine]
        kwargs = dict(kwargs)
        wanted = kwargs.get("device")
        target = bool(gpus) if wanted is None or isinstance(wanted, T) else on_gpu(wanted)
        if target and "device" in kwargs:
            kwargs["device"] = CPU
        if gpus and len(gpus) < len(tensors):
            target = self.mixed(func, first, mine, args, tensors)
        if target and len(found) > len(tensors) and any(
                type(one) is torch.Generator and not on_gpu(one.device) for one in found):
            self.refuse(f"Expected a '{self.gpu.type}' device type for generator but found 'cpu'")
        if gpus and (func in READS or func is T.__getitem__ and self.by_mask(args[1])):
            self.wait("read by the CPU")
        if target and func in (torch.tensor, torch.as_tensor) and len(gpus) < max(len(tensors), 1):
            self.wait("copied to the GPU")
        out = func(*args, **kwargs)
        if target and isinstance(out, T) and any(out is one for one in tensors) and not self.on(out) and wanted:
            out = out.clone()                          # torch.as_tensor of a tensor on the other side
        return self.mark(out, True, {id(one) for one in tensors}) if target else out

    def by_mask(self, index):
        return any(isinstance(one, T) and one.dtype in (torch.bool, torch.uint8) for one in leaves([index]))

    def mixed(self, func, first, mine, args, tensors):
        """Both sides in one call: whether what comes out is on the GPU, or an error as CUDA gives it."""
        strangers = [one for one in tensors if not self.on(one)]
        if func in LIKE:
            return mine
        if func in (T.__getitem__, T.__setitem__):
            index = list(leaves([args[1]]))
            if any(self.on(one) != mine and (one.dim() or not mine) for one in index):
                if not mine:
                    self.refuse("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
                self.wait("index copied to the GPU")
            if func is T.__setitem__ and isinstance(args[2], T) and self.on(args[2]) != mine:
                if index and args[2].dim():
                    self.refuse("Expected all tensors to be on the same device in __setitem__")
                self.wait("copied to the GPU" if mine else "read by the CPU")
            return mine
        if func in (torch.tensor, torch.as_tensor, torch.autograd.backward, T.backward):
            return mine
        if func in STRICT or any(one.dim() for one in strangers):
            self.refuse("Expected all tensors to be on the same device, but found at least two devices, "
                        f"{self.gpu} and cpu, in {getattr(func, '__name__', func)}")
        return True

    # ------------------------------------------------------------------ what is about devices
    def device(self, func, mine, args, kwargs):
        return self.gpu if mine else func(*args)

    def is_cuda(self, func, mine, args, kwargs):
        return mine and self.gpu.type == "cuda"

    def is_mps(self, func, mine, args, kwargs):
        return mine and self.gpu.type == "mps"

    def is_cpu(self, func, mine, args, kwargs):
        return not mine

    def get_device(self, func, mine, args, kwargs):
        return 0 if mine else -1

    def numpy(self, func, mine, args, kwargs):
        if mine:
            raise TypeError(f"can't convert {self.gpu} device type tensor to numpy. Use Tensor.cpu() ({self.place()})")
        return func(*args, **kwargs)

    def same_side(self, func, mine, args, kwargs):
        """What shares values or history with a tensor lies where it lies."""
        out = func(*args, **kwargs)
        return self.mark(out) if mine else out

    def set_data(self, func, mine, args, kwargs):
        func(*args)
        self.mark(args[0], self.on(args[1]))

    def set_grad(self, func, mine, args, kwargs):
        if isinstance(args[1], T) and self.on(args[1]) != mine:
            self.refuse("assigned grad has data located on a different device")
        func(*args)

    def copy(self, func, mine, args, kwargs):
        """x.copy_(y): any side to any side."""
        if self.on(args[1]) != mine:
            self.moved(args[1], mine, kwargs.pop("non_blocking", False) or True in args[2:])
        func(*args[:2])
        return args[0]

    def pin(self, func, mine, args, kwargs):
        if mine:
            self.refuse("cannot pin 'torch.cuda.FloatTensor': only dense CPU tensors can be pinned")
        out = args[0].clone()
        self._remember(self.pinned, out)
        return out

    def is_pinned(self, func, mine, args, kwargs):
        return id(args[0]) in self.pinned

    def to(self, func, mine, args, kwargs):
        """x.to(...), x.cpu(), x.cuda(), x.type_as(y)."""
        tensor, rest = args[0], list(args[1:])
        there = func is T.cuda or func is not T.cpu and mine
        free = kwargs.pop("non_blocking", False)
        if func in (T.to, T.type_as):
            for i, item in enumerate(rest):
                if isinstance(item, T):
                    there, rest[i] = self.on(item), item.dtype
                elif isinstance(item, (str, torch.device)):
                    there, rest[i] = on_gpu(item), CPU
            if kwargs.get("device") is not None:
                there, kwargs["device"] = on_gpu(kwargs["device"]), CPU
            out = T.to(tensor, *rest, **kwargs) if rest or kwargs else tensor
        else:
            out = tensor
        if there != mine:
            self.moved(tensor, there, free)
            out = out.clone() if out is tensor else out
        return self.mark(out, there) if out is not tensor else out

    def moved(self, tensor, to_gpu, free):
        if not (free and (not to_gpu or id(tensor) in self.pinned)):
            self.wait("copied to the GPU" if to_gpu else "read by the CPU")


SPECIAL = {
    T.device.__get__: FakeGPU.device, T.is_cuda.__get__: FakeGPU.is_cuda, T.is_mps.__get__: FakeGPU.is_mps,
    T.is_cpu.__get__: FakeGPU.is_cpu,
    T.get_device: FakeGPU.get_device, T.numpy: FakeGPU.numpy, T.__array__: FakeGPU.numpy,
    T.data.__get__: FakeGPU.same_side, T.grad.__get__: FakeGPU.same_side, T.detach: FakeGPU.same_side,
    T.__deepcopy__: FakeGPU.same_side, T.data.__set__: FakeGPU.set_data, T.grad.__set__: FakeGPU.set_grad,
    T.copy_: FakeGPU.copy, T.pin_memory: FakeGPU.pin, T.is_pinned: FakeGPU.is_pinned, T.to: FakeGPU.to,
    T.cpu: FakeGPU.to, T.cuda: FakeGPU.to, T.type_as: FakeGPU.to,
}


def install(report=None, capability=(7, 5), kind="cuda"):
    """From here on this process has a GPU. report: the file of all waits. Returns the mode."""
    mode = FakeGPU(report, kind)
    if kind == "mps":
        torch.backends.mps.is_available = torch.backends.mps.is_built = lambda: True
        torch.backends.mps.get_name = lambda: "Apple M2"
        torch.mps.synchronize = lambda: mode.wait("synchronize")
    else:
        pretend_cuda(mode, capability)
    torch.accelerator.current_accelerator = lambda *_, **__: None
    groups = torch._C._group_tensors_by_device_and_dtype

    def grouped(lists, *args):                         # by foreach: it asks in C++
        return {(mode.gpu if any(map(mode.on, leaves(one[0]))) else device, dtype): one
                for (device, dtype), one in groups(lists, *args).items()}

    torch._C._group_tensors_by_device_and_dtype = grouped
    deepcopy = torch.nn.Parameter.__deepcopy__

    def copied(self, memo):                            # torch does not ask the mode here
        return mode.mark(deepcopy(self, memo), mode.on(self))

    torch.nn.Parameter.__deepcopy__ = copied
    mode.__enter__()
    return mode


def pretend_cuda(mode, capability):
    """What torch.cuda says about it."""
    cuda = torch.cuda
    cuda.is_available, cuda.device_count, cuda.current_device = lambda: True, lambda: 1, lambda: 0
    cuda.is_initialized, cuda._lazy_init, cuda.set_device = lambda: True, lambda: None, lambda *_: None
    cuda.get_device_capability, cuda.get_device_name = lambda *_: capability, lambda *_: "Tesla T4"
    cuda.max_memory_allocated = lambda *_: 0
    cuda.get_device_properties = lambda *_: SimpleNamespace(L2_cache_size=4 << 20)
    cuda.get_rng_state, cuda.set_rng_state = lambda *_: torch.get_rng_state(), lambda *_: None
    cuda.manual_seed_all = cuda.manual_seed = lambda *_: None
    cuda.is_current_stream_capturing = lambda: False
    cuda.synchronize = lambda *_: mode.wait("synchronize")


def watch(mode):
    """Let the lines of the report begin with the step that is done: "2.40" is step 40, in the second loop."""
    from utils.run import Run

    steps, loops = Run.steps, itertools.count(1)

    def watched(self, *args, **kwargs):
        loop = next(loops)
        for step, batch in steps(self, *args, **kwargs):
            mode.step = f"{loop}.{step}"
            yield step, batch
        mode.step = "-"

    Run.steps = watched


def cheap():
    """Leave out what costs time and no device sees: the judges look at 7 x 7 pixels, figures are not drawn to files."""
    from matplotlib.figure import Figure

    from utils import scores

    def look(x, width):
        x = torch.nn.functional.avg_pool2d(x.cpu().float().clamp(-1, 1), 4).flatten(1)
        return torch.cat([x, x], dim=1)[:, :width]

    scores._unit = lambda low: 1.0
    scores._raw_features = lambda x, low, batch_size=500: look(x, 48 if low else 64)
    scores.judge = lambda name: lambda x: look(x, 10)
    Figure.savefig = lambda self, *args, **kwargs: None


def waits(report):
    """[(step or "-", what, "file:line")] of a report."""
    lines = Path(report).read_text(encoding="utf-8").splitlines() if Path(report).exists() else []
    return [(step, *rest.split(", ")) for step, _, rest in (line.partition(" ") for line in lines)]


def every_step(report, allowed=""):
    """["what, file:line"] of the waits that more than one step of a loop had.

    allowed: a line of code that may wait. fp16's scaler asks whether the gradients are finite before Muon steps, where
    torch's fused Adam looks itself, on the GPU. In other precisions there is no scaler.
    """
    steps = {}
    for step, what, place in waits(report):
        if step != "-":
            steps.setdefault((f"{what}, {place}", step.split(".")[0]), set()).add(step)
    often = {wait for (wait, _), seen in steps.items() if len(seen) > 1}
    return sorted(wait for wait in often if not allowed or code(wait) != allowed)


def code(wait):
    """The line of code that a wait names."""
    file, _, number = wait.rpartition(", ")[2].rpartition(":")
    return Path(ROOT, file).read_text(encoding="utf-8").splitlines()[int(number) - 1].split("#")[0].strip()
