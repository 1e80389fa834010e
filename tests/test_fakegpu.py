"""Every lesson on a GPU that is not there (fakegpu.py): nothing mixes devices, no step of a training waits for it.

And on the GPU of a Mac that is not there, which has no float64. Two reproduce.py run here, one on each, because all of
them take four minutes of a core more: FAKEGPU=all runs those too.
"""

import json
import os

import numpy as np
import pytest
import torch

from conftest import ROOT, load
from fakegpu import FakeGPU, every_step, waits
from tools import lineage
from utils import EMA, Weights, config, device_of
from utils.checkpoint import read_checkpoint
from utils.device import home, put
from utils.run import Run

READY = {one["number"]: one["folder"] for one in lineage.load_lessons(ROOT) if one["state"] == "ready"}
KINDS = ("cuda", "mps")
CLAIMS = [(number, kind) for number in READY for kind in KINDS
          if os.environ.get("FAKEGPU") == "all" or (number, kind) in (("02", "cuda"), ("23", "mps"))]
CHEAPER = {"04": ["sigma_1=50"], **dict.fromkeys(("05e", "32", "34"), ["captions.images=500"])}    # to build a network


def install(report, **how):
    """The code that a process runs first."""
    return (f"import sys; sys.path.append({str(ROOT / 'tests')!r}); import fakegpu; "
            f"fakegpu.watch(fakegpu.install({str(report)!r}, **{how!r})); fakegpu.cheap()")


@pytest.fixture
def start(launch, tmp_path):
    """start(script, *argv, kind="mps"): run it on the pretended GPU; its report is `tmp_path / "report"`."""
    def run(script, *argv, before="", **how):
        return launch(script, f"runs={tmp_path / 'runs'}", *argv, before=install(tmp_path / "report", **how) + before)
    return run


# ------------------------------------------------------------------ the pretence
@pytest.fixture
def gpu(tmp_path):
    """Tensors of this process may lie on the GPU; yields what the CPU waited for."""
    with FakeGPU(tmp_path / "report"):
        yield lambda: [what for _, what, _ in waits(tmp_path / "report")]


def test_a_tensor_knows_where_it_is(gpu):
    x = torch.zeros(2, 3, device="cuda")
    for y in (x + 1, x[0], x.T, x.detach(), x.double(), torch.randn_like(x), x.new_zeros(1), x.sum(), x.clone().add_(1),
              torch.stack([x, x]), x.to(torch.float64), torch.nn.Parameter(torch.zeros(2)).to("cuda"), x.split(1)[1],
              x[torch.tensor([1, 0], device="cuda")], torch.nn.Linear(3, 1).to("cuda")(x), x * torch.tensor(2.0)):
        assert y.device == torch.device("cuda", 0) and y.is_cuda and not y.is_cpu
    for y in (x.cpu(), torch.zeros_like(x, device="cpu"), torch.zeros(2), x.to("cpu"), torch.zeros(2).copy_(x[:, 0])):
        assert y.device == torch.device("cpu") and not y.is_cuda
    assert x.is_cuda


def test_parameters_move_with_their_gradients(gpu):
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).to("cuda")
    net(torch.ones(4, 3, device="cuda")).square().sum().backward()
    assert all(p.is_cuda and p.grad.is_cuda for p in net.parameters()) and all(b.is_cuda for b in net.buffers())
    net.to("cpu")(torch.ones(4, 3))


OTHER = torch.Generator()


@pytest.mark.parametrize("what", [
    lambda x, y: x + y, lambda x, y: torch.cat([x, y]), lambda x, y: x @ y[:, None], lambda x, y: y[x.long()],
    lambda x, y: torch.where(x > 0, x, y), lambda x, y: torch.randn(3, device="cuda", generator=OTHER),
    lambda x, y: torch.randn_like(x, generator=OTHER), lambda x, y: x.numpy(), lambda x, y: torch.nn.Linear(3, 1)(x),
    lambda x, y: torch.nn.functional.mse_loss(x, y), lambda x, y: torch.stack([x[0], y[0]]), lambda x, y: x.mul_(y),
    lambda x, y: x.__setitem__(x > 0, y), lambda x, y: setattr(torch.nn.Parameter(y), "grad", x),
])
def test_what_cuda_refuses_is_refused(gpu, what):
    with pytest.raises((RuntimeError, TypeError), match="device|cuda"):
        what(torch.ones(3, device="cuda"), torch.ones(3))


@pytest.mark.parametrize("what", [
    lambda x, y: x * y[0], lambda x, y: y[0] - x, lambda x, y: x[y.long()], lambda x, y: x.copy_(y),
    lambda x, y: torch.where(x > 0, x, y[0]), lambda x, y: x.type_as(x), lambda x, y: x.view_as(y),
    lambda x, y: x.__setitem__(0, y[0]) or x,
])
def test_what_cuda_allows_is_allowed(gpu, what):
    assert what(torch.ones(3, device="cuda"), torch.ones(3)).is_cuda


def test_waits_are_counted(gpu):
    x = torch.arange(3.0, device="cuda")
    assert gpu() == []
    for y in (x.clone(), x + 1, x[1:], x[x.long()], torch.where(x > 1, x, 0), x.to("cuda"),
              torch.zeros(3).pin_memory().to("cuda", non_blocking=True)):
        assert y.is_cuda
    assert gpu() == []
    assert (float(x[0]), bool(x[0] == 0), x.tolist(), len(x[x > 1]), len(x.nonzero())) == (0, True, [0, 1, 2], 1, 2)
    assert gpu() == ["read by the CPU"] * 5
    for y in (torch.zeros(3).to("cuda"), torch.zeros(3).to("cuda", non_blocking=True), torch.tensor(1.0, device="cuda"),
              x[torch.tensor([0])]):
        assert y.is_cuda
    assert gpu()[5:8] == ["copied to the GPU"] * 3 and gpu()[8:] == ["index copied to the GPU"]


@pytest.mark.parametrize("what", [
    lambda x: x.double(), lambda x: x.to(torch.float64), lambda x: torch.zeros(2, dtype=torch.float64, device="mps"),
    lambda x: x.cpu().double().to("mps"), lambda x: x.new_ones(2, dtype=torch.float64), lambda x: x.type(torch.float64),
    lambda x: torch.linspace(0, 1, 3, device="mps", dtype=torch.float64), lambda x: x.sum(dtype=torch.float64),
    lambda x: torch.polar(x, x).to(torch.complex128), lambda x: torch.nn.Linear(3, 1).double().to("mps"),
    lambda x: torch.tensor(np.ones(2), device="mps"), lambda x: torch.rand(3, device="mps").numpy(),
])
def test_a_mac_has_no_float64(what):
    with FakeGPU(kind="mps"):
        x = torch.ones(3, device="mps")
        assert x.device == torch.device("mps", 0) and x.is_mps and not x.is_cuda and not x.is_cpu
        assert (x * torch.tensor(2.0, dtype=torch.float64)).is_mps and x.cpu().double().is_cpu
        with pytest.raises(TypeError, match="float64|mps:0"):
            what(x)


def test_a_network_on_a_mac_is_called_from_the_cpu():
    """What goes in is moved, float64 as float32, what comes out is moved back; a copy of the network does so, too."""
    seen = []

    class Net(torch.nn.Linear):
        def forward(self, x, told, scale=1.0):
            seen[:] = [x, *told[:2], self.weight]
            return super().forward(x * told[0]) * scale, told[1]

    with FakeGPU(kind="mps"):
        mac, process = torch.device("mps"), torch.nn.Module()
        process.register_buffer("abar", torch.ones(2, dtype=torch.float64))
        net = put(Net(3, 2), mac)
        assert put(process, mac).abar.is_cpu and process.abar.dtype == torch.float64
        assert home(mac) == device_of(net) == torch.device("cpu") and home(torch.device("cuda")).type == "cuda"
        for one in (net, EMA(net).module.to(mac)):     # torch does not tell the mode of a copied parameter
            x = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
            out, same = one(x, (torch.ones(4, 1), torch.arange(4), None), scale=torch.tensor(2.0))
            assert all(tensor.is_mps for tensor in seen) and seen[0].dtype == torch.float32
            assert out.is_cpu and same.is_cpu and torch.equal(same, torch.arange(4))
        net(x, (torch.ones(4, 1), None))[0].sum().backward()
        assert x.grad.is_cpu and x.grad.dtype == torch.float64 and net.weight.grad.is_mps


@pytest.mark.parametrize("keys, error", [
    (["precision=bf16"], "on a Mac's GPU this course computes in fp32"), (["device=cuda"], "no CUDA GPU was found")])
def test_what_a_mac_cannot_do(start, keys, error):
    assert error in start("lesson_05/train.py", "smoke=true", *keys, kind="mps").error()


def test_samples_of_a_mac_are_those_of_a_cpu(start, launch, tmp_path):
    keys, found = ("weights=published", "n=3", "steps=3", "npz=x.npz", "precision=fp32"), {}
    for name, process in (("mac", start(*(script := ("lesson_05/sample.py", *keys)), "device=mps", kind="mps")),
                          ("cpu", launch(*script, f"runs={tmp_path / 'cpu'}"))):
        assert process.wait() == 0, process.err
        assert ("GPU of a Mac found" in process.out) == (name == "mac")
        found[name] = np.load(next((tmp_path / ("runs" if name == "mac" else "cpu")).rglob("x.npz")))["arr_0"]
    assert np.array_equal(found["mac"], found["cpu"]) and found["cpu"].std() > 30


# ------------------------------------------------------------------ what it must catch, in lesson 05
NOISE = "torch.stack([torch.randn(x.shape[1:], generator=one) for one in generator])"


@pytest.mark.parametrize("script, name, old, new, error", [
    ("sample.py", "earlier.py", NOISE + ".to(x.device)", NOISE, "same device"),
    ("train.py", "model.py", "(len(x0),), device=x0.device)     # Alg. 1, line 3", "(len(x0),))", "same device"),
    ("sample.py", "earlier.py", NOISE, NOISE.replace("=one", "=one, device=x.device"), "for generator"),
    ("train.py", "model.py", 'self.register_buffer("abar", torch.cat([abar, abar.new_ones(1)]), persistent=False)',
     "self.abar = torch.cat([abar, abar.new_ones(1)])", "indices should be"),
    ("train.py", "train.py", "run.log(loss=loss)", "run.log(loss=loss.numpy())", "numpy"),
])
def test_mutations_are_caught(start, lesson, script, name, old, new, error):
    text = (lesson / name).read_text(encoding="utf-8")
    assert text.count(old) == 1
    (lesson / name).write_text(text.replace(old, new), encoding="utf-8")
    weights = ["n=2", "steps=2", f"weights={ROOT}/lesson_05/results/weights.safetensors"]
    process = start(lesson / script, "gpu=true", "smoke=true", *(weights if script == "sample.py" else ["steps=2"]))
    assert process.wait() == 2 and error in process.err, process.err


def test_a_wait_in_every_step_is_seen(start, lesson, tmp_path):
    text = (lesson / "train.py").read_text(encoding="utf-8")
    (lesson / "train.py").write_text(text.replace("run.log(loss=loss)", "run.log(loss=float(loss))"), encoding="utf-8")
    assert start(lesson / "train.py", "gpu=true", "smoke=true", "steps=3", "log_every=9", "save_every=0").wait() == 0
    line = text[:text.index("run.log(loss=loss)")].count("\n") + 1
    found = every_step(tmp_path / "report", "optimizer.step()")
    assert len(found) == 1 and found[0].startswith("read by the CPU") and found[0].endswith(f"train.py:{line}"), found


def test_a_gpu_publishes_numbers_only(start, lesson):
    """Neither weights nor pictures go over the CPU's, and its numbers stand beside theirs. A checkpoint is saved."""
    (lesson / "results").mkdir()
    (lesson / "results" / "weights.safetensors").write_bytes(b"those of a CPU")
    (lesson / "results" / "results.json").write_text('{"train": {"minutes": 10}, "sample_2": {"fid": 2.7}}')
    trained = start(lesson / "train.py", "smoke=true", "steps=4", "publish=true")
    assert trained.wait() == 0 and "not published: weights.safetensors" in trained.out, trained.out + trained.err
    drawn = start(lesson / "sample.py", "smoke=true", "n=100", "steps=2", "metrics=true", "publish=true")
    assert drawn.wait() == 0 and list((lesson.parent / "runs").rglob("last.pt")), drawn.err
    results = json.loads((lesson / "results" / "results.json").read_text(encoding="utf-8"))
    assert results.pop("train") == {"minutes": 10} and results.pop("sample_2") == {"fid": 2.7}
    assert {name: one["device"] for name, one in results.items()} == dict.fromkeys(["train_gpu", "sample_2_gpu"],
                                                                                   "Tesla T4")
    assert {path.name for path in (lesson / "results").iterdir()} - {".results.lock", ".lock"} == {
        "results.json", "weights.safetensors"}
    assert (lesson / "results" / "weights.safetensors").read_bytes() == b"those of a CPU"


STOP = """
import os, signal
from utils.run import Run
log = Run.log
def stop(self, **values):
    log(self, **values)
    if self.step + 1 == 2:
        os.kill(os.getpid(), signal.SIGTERM)
Run.log = stop
"""


@pytest.mark.parametrize("first, then", [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_training_goes_on_on_another_machine(start, launch, tmp_path, first, then):
    """With the network that it had: the overlay stays laid, or not laid. Nothing is lost on the way."""
    def train(kind, runs, *argv, before=""):
        keys = *argv, "threads=1", f"runs={tmp_path / runs}"
        process = (launch if kind == "cpu" else start)("lesson_05/train.py", *keys, before=before)
        assert process.wait() == (130 if before else 0), process.err
        return process.out

    keys, laid = ("smoke=true", "steps=4", "preview_every=0", "precision=fp32"), first == "cuda"
    cpu = ["device=cpu"] * (first == "cpu")
    train(first, "moved", *keys, *cpu, before=STOP)
    folder = tmp_path / "moved" / "smoke" / "001"
    assert (json.loads(read_checkpoint(folder / "last.pt", "lesson_05")["config"])["train"]["gpu"] is True) == laid
    out = train(then, "moved", "smoke=true", "--resume", f"device={then}")
    assert f"resumed 001 after step 2, device={then} (before: {'auto' if laid else 'cpu'})" in out
    train("cpu", "straight", f"gpu={str(laid).lower()}", *keys, "device=cpu")
    moved, straight = (Weights(tmp_path / runs / "smoke" / "001" / "weights.safetensors", "lesson_05")
                       for runs in ("moved", "straight"))
    assert vars(moved.config["unet"]) == vars(straight.config["unet"]) and moved.config["unet"].attention == [14] * laid
    assert moved.state.keys() == straight.state.keys()
    assert all(torch.equal(moved.state[key], straight.state[key]) for key in moved.state)
    assert set(json.loads((folder / "results.json").read_text(encoding="utf-8"))) == {
        "train" if then == "cpu" else "train_gpu"}


# ------------------------------------------------------------------ every lesson
every_lesson = pytest.mark.parametrize("number", list(READY))


def short_preview(number):
    """The keys of train.py that let its preview take few steps."""
    return {"02": ["preview_steps=2"], "04": ["sample.steps=1"], "21": []}.get(number, ["sample.steps=2"])


@every_lesson
def test_training(start, tmp_path, number):
    """With a preview, in fp16 as on a T4; no step waits for the GPU. The overlay's large network is built below."""
    steps = 4 if number in ("21", "34") else 3         # two loops
    process = start(f"{READY[number]}/train.py", "gpu=true", "smoke=true", f"steps={steps}", "log_every=9",
                    "save_every=0", f"preview_every={steps}", *short_preview(number))
    assert process.wait() == 0, process.err
    wanted = config.load(ROOT / READY[number] / "config.yaml", "train", ["gpu=true"]).train.precision
    assert f"Tesla T4, {wanted.replace('auto', 'fp16')}" in process.out, process.out
    muon = ("03", "04", "05", "05b", "06", "13", "20", "39")                    # see every_step
    scaled = "optimizer.step()" if number in muon else ""
    assert every_step(tmp_path / "report", scaled) == []


def test_training_with_times_by_importance(start):
    process = start(f"{READY['09']}/train.py", "smoke=true", "steps=2", "ddpm.objective=vlb", "importance=true")
    assert process.wait() == 0, process.err


@every_lesson
def test_sampling(start, tmp_path, number):
    """From the published weights; the clock waits for the GPU, before and after."""
    process = start(f"{READY[number]}/sample.py", "weights=published", "n=4",
                    f"steps={1 if number in ('03', '04') else 3}")
    assert process.wait() == 0, process.err
    assert "published weights" in process.out
    assert [what for _, what, _ in waits(tmp_path / "report")].count("synchronize") >= 2


@every_lesson
def test_on_a_mac(start, tmp_path, number):
    """Networks on a device without float64, all else on the CPU: a training with its preview, published weights."""
    steps, few = 3 if number in ("21", "34") else 1, 1 if number in ("03", "04") else 2
    trained = start(f"{READY[number]}/train.py", "smoke=true", f"steps={steps}", f"preview_every={steps}",
                    "save_every=0", *short_preview(number), kind="mps")
    drawn = start(f"{READY[number]}/sample.py", "weights=published", "n=4", f"steps={few}", kind="mps")
    assert trained.wait() == 0, trained.err
    assert "GPU of Apple M2, fp32" in trained.out and "section `gpu`" not in trained.out, trained.out
    results = next((tmp_path / "runs").rglob("results.json"))
    assert set(json.loads(results.read_text(encoding="utf-8"))) == {"train_mps"}
    assert drawn.wait() == 0, drawn.err


@pytest.mark.parametrize("number, kind", CLAIMS)
def test_claim(start, number, kind):
    process = start(f"{READY[number]}/reproduce.py", "smoke=true", kind=kind)
    assert process.wait() == 0, process.err
    assert "GPU found" not in process.out              # the arms are what the claim says


class Built(Exception):
    """The networks of a training are there."""


@every_lesson
def test_the_gpus_network_can_be_built(tmp_path, monkeypatch, number):
    """With the whole overlay; its weights are left as memory gives them, which takes no time."""
    def prepare(self, *objects):
        raise Built(sum(p.numel() for one in objects if isinstance(one, torch.nn.Module) for p in one.parameters()))

    for name in dir(torch.nn.init):
        if name.endswith("_") and not name.endswith("__"):
            monkeypatch.setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)
    monkeypatch.setattr(Run, "prepare", prepare)
    sizes = {}
    for gpu in ("true", "false"):
        with pytest.raises(Built) as built:
            load(READY[number], "train").main([f"gpu={gpu}", "device=cpu", "precision=fp32", "threads=1",
                                               f"runs={tmp_path}", *CHEAPER.get(number, [])])
        sizes[gpu], = built.value.args
    assert sizes["true"] >= sizes["false"] > 0
