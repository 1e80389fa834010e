"""Run and its rooms (checkpoint.py, log.py, weights.py): a run that is interrupted, killed, damaged or doubled loses
nothing and goes on bit for bit."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from hashlib import md5
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT, load
from utils import EMA, Run, UserError, Weights, code_hash, digits, files, ramp, save_weights, trained
from utils.checkpoint import read_checkpoint
from utils.errors import cli
from utils.files import check_names, lesson_name, numbered
from utils.run import Stopped

train, sample = load("lesson_05", "train"), load("lesson_05", "sample")
TINY = ["smoke=true", "steps=12", "save_every=4", "log_every=3", "preview_every=0", "batch_size=8", "lr=0.002",
        "warmup=2", "ema_share=0.1", "processes=1", "threads=1", "device=cpu"]


def tiny(folder, *argv):
    return [*TINY, f"runs={folder}", *argv]


def run_folder(runs, number=1):
    return runs / "smoke" / f"{number:03d}"


def outcome(folder):
    """What a training leaves that must not depend on interruptions: weights and losses."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = Weights(folder / "weights.safetensors", "lesson_05")
    return ({name: item.numpy().tobytes() for name, item in weights.state.items()}, weights.config,
            [(r["step"], r["loss"]) for r in records])


def stop_after(monkeypatch, step):
    """From now on a run of this process is asked to stop, as by Ctrl-C, after this step."""
    ask = Run._stop_wanted

    def wanted(run, log_every):
        if run.step == step:
            run._stop = True
        return ask(run, log_every)

    monkeypatch.setattr(Run, "_stop_wanted", wanted)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted run of twelve steps: its folder and its outcome."""
    runs = tmp_path_factory.mktemp("straight")
    result = train.main(tiny(runs))
    return SimpleNamespace(runs=runs, folder=result.folder, result=result, outcome=outcome(result.folder))


@pytest.fixture(autouse=True)
def no_curves(straight, monkeypatch):
    """Only the straight run draws its loss curve: that takes longer than its training."""
    monkeypatch.setattr("utils.images.save_losses", lambda records, path: path)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The folder of runs in which one was interrupted after step 9: last.pt at 9, previous.pt at 8."""
    runs = tmp_path_factory.mktemp("interrupted") / "runs"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 9)
        train.main(tiny(runs))
    return runs


@pytest.fixture
def cut(interrupted, tmp_path):
    """A copy of that folder, as if the run had begun in it."""
    runs = shutil.copytree(interrupted, tmp_path / "runs")
    made = run_folder(runs) / "run.json"
    made.write_text(made.read_text().replace(str(interrupted), str(runs)))
    return runs


def refused(*argv):
    with pytest.raises(UserError) as info:
        train.main([*argv])
    assert "\n" not in str(info.value)
    return str(info.value)


# ------------------------------------------------------------------ one run
def test_what_a_run_leaves(straight):
    names = {p.name for p in straight.folder.iterdir()}
    assert names == {".lock", ".results.lock", "last.pt", "previous.pt", "loss.png", "metrics.jsonl",
                     "results.json", "run.json", "weights.safetensors"}
    assert [step for step, _ in straight.outcome[2]] == [3, 6, 9, 12]
    assert straight.result.steps == 12 and straight.result.parameters > 1000
    entry = json.loads((straight.folder / "results.json").read_text())["train"]
    assert entry["seed"] == 0 and entry["steps"] == 12 and "runs=" not in entry["command"]
    assert {"device", "torch", "dtype", "code", "minutes", "peak_memory_mb"} <= set(entry)
    weights = load_file(straight.result.weights)
    assert all(v.dtype == torch.float16 for v in weights.values())
    assert straight.result.weights.stat().st_mode & 0o044 == 0o044     # others may read it
    assert Weights(straight.result.weights, "lesson_05").config["unet"].channels == 8


def test_same_seed_same_run_other_seed_another(straight, tmp_path):
    same, other = (train.main(tiny(tmp_path, f"seed={seed}")).folder for seed in (0, 1))
    assert (same.name, other.name) == ("001", "002")
    assert outcome(same) == straight.outcome != outcome(other)


def test_previews_do_not_change_the_run(straight, tmp_path):
    folder = train.main(tiny(tmp_path, "preview_every=6", "save_every=0")).folder
    assert outcome(folder) == straight.outcome
    assert {"preview_000006.png", "preview_000012.png"} <= {p.name for p in folder.iterdir()}
    assert not (folder / "last.pt").exists()


def test_values_of_a_line_are_means_over_its_steps(tmp_path):
    each = outcome(train.main(tiny(tmp_path / "a", "log_every=1", "steps=4")).folder)[2]
    all_ = outcome(train.main(tiny(tmp_path / "b", "log_every=4", "steps=4")).folder)[2]
    assert all_ == [(4, sum(loss for _, loss in each) / 4)]


def test_recorded_numbers_keep_their_names(tmp_path):
    run = Run(ROOT / "lesson_05" / "sample.py", ["smoke=true", f"runs={tmp_path}", "threads=1", "device=cpu"])
    run.open_folder("samples")
    run.record("sample_5", fid=2.0, precision=0.5, n=3)                # of FID, not of floating-point numbers
    run.record("sample_9", fid=1.0)
    entries = json.loads((run.folder / "results.json").read_text())
    assert list(entries) == ["sample_5", "sample_9"]
    assert entries["sample_5"] | {"fid": 2.0, "precision": 0.5, "n": 3, "script": "sample"} == entries["sample_5"]


def test_log_takes_different_values_at_different_steps(tmp_path):
    run = Run(ROOT / "lesson_05" / "train.py", tiny(tmp_path, "steps=2", "log_every=2"))
    for step, _ in run.steps(digits("test", 8, limit=100)):
        run.log(loss=torch.tensor(1.0 + step))
        if step == 0:
            run.log(extra=5.0)
    assert json.loads((run.folder / "metrics.jsonl").read_text()) | {"seconds": 0} == {
        "step": 2, "loss": 1.5, "extra": 5.0, "seconds": 0}
    run.close()


def test_ramp(capsys):
    assert [ramp(s, 2, 10) for s in (0, 1, 2, 5, 9)] == pytest.approx([0.5, 0.9, 0.8, 0.5, 0.1])
    assert ramp(0, 0, 10) == 1 and ramp(3, 10, 10) and not capsys.readouterr().err
    assert [ramp(step, 20, 10) for step in (3, 4)] == [0.2 * 0.7, 0.25 * 0.6]
    assert capsys.readouterr().err.splitlines() == [
        "warning: warmup=20 is longer than the 10 steps: the learning rate never comes to its value"]


# ------------------------------------------------------------------ weights before bookkeeping
BROKEN = {"": "results.json is empty: ", "[1]": "must hold an object of names, {...}, not a list: ",
          '{\n<<<<<<< HEAD\n "a": 1\n=======\n "a": 2\n>>>>>>> b\n}': "results.json holds a merge conflict: ",
          '{"a": 1,': "results.json is no JSON at line 1 ("}


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_results_json_does_not_cost_the_weights(straight, tmp_path, monkeypatch, text):
    from utils import run as module

    def with_damage(net, path, *rest, **config):
        path.with_name("results.json").write_text(text)
        return save_weights(net, path, *rest, **config)

    monkeypatch.setattr(module, "save_weights", with_damage)
    error = refused(*tiny(tmp_path))
    assert error.startswith("the weights are whole, ") and BROKEN[text] in error and "move it away" in error
    assert outcome(run_folder(tmp_path)) == straight.outcome
    assert (run_folder(tmp_path) / "results.json").read_text() == text                  # the reader's, to be mended


def test_a_broken_published_results_json_is_said_before_the_work(launch, lesson):
    (lesson / "results").mkdir()
    (lesson / "results" / "results.json").write_text("[]")
    argv = ["smoke=true", "publish=true", "device=cpu", "threads=1"]
    for script in ("train.py", "sample.py"):
        assert "must hold an object of names" in launch(lesson / script, *argv).error()
    assert not (lesson / "runs").exists()


def test_weights_then_numbers_then_pictures_then_publishing(launch, lesson):
    watch = "import os; old = os.replace\n" \
            "os.replace = lambda a, b: (print('WROTE', *b.parts[-3:], sep='/'), old(a, b))[1]"
    process = launch(lesson / "train.py", "smoke=true", "publish=true", "device=cpu", "threads=1", before=watch)
    assert process.wait() == 0, process.err
    wrote = [line.split("/")[-2:] for line in process.out.splitlines() if "WROTE" in line]
    run, results = "001", "results"
    assert wrote[wrote.index([run, "weights.safetensors"]):] == [
        [run, "weights.safetensors"], [run, "results.json"], [results, "results.json"], [run, "run.json"],
        [run, "loss.png"], [results, "weights.safetensors"], [results, "loss.png"], [run, "previous.pt"],
        [run, "last.pt"]]                              # at last what a longer run may go on from


def test_a_broken_matplotlib_costs_the_curve_only(launch, straight, tmp_path):
    hide = "import sys; sys.modules['matplotlib.figure'] = None"
    process = launch("lesson_05/train.py", *tiny(tmp_path), before=hide)
    assert process.wait() == 0 and "warning: no loss.png (ModuleNotFoundError" in process.err, process.err
    folder = run_folder(tmp_path)
    assert outcome(folder) == straight.outcome and not (folder / "loss.png").exists()
    assert "train" in json.loads((folder / "results.json").read_text())


# ------------------------------------------------------------------ resuming
@pytest.mark.parametrize("step", [1, 9, 12])
def test_resume_equals_the_straight_run(straight, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch, pytest.raises(Stopped, match=f"after step {step};.*--resume"):
        stop_after(patch, step)
        train.main(tiny(tmp_path))
    result = train.main([f"runs={tmp_path}", "smoke=true", "--resume"])
    assert result.folder == run_folder(tmp_path) and outcome(result.folder) == straight.outcome


def test_resume_after_two_interruptions_and_a_crash_between_checkpoints(straight, tmp_path, monkeypatch):
    for step in (5, 10):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_after(patch, step)
            train.main(tiny(tmp_path) if step == 5 else [f"runs={tmp_path}", "--resume", "--smoke"])
    folder = run_folder(tmp_path)
    (folder / "last.pt").unlink()                      # as if the last save had never been: back to step 8
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "loss": 7.0}\n{"step": 12, "lo')       # logged after the checkpoint, and cut off
    assert outcome(train.main(tiny(tmp_path, "--resume")).folder) == straight.outcome


def test_resume_carries_the_arguments_and_refuses_others(cut, straight):
    base = [f"runs={cut}", "smoke=true", "--resume"]
    assert "started with train.batch_size=8, now it is 16" in refused(*base, "batch_size=16")
    assert "steps=8, but it was saved after step 9; put a larger number" in refused(*base, "steps=8")
    assert "started with unet.channels=8, now it is 16" in refused(*base, "channels=16")
    assert outcome(train.main([*base, "log_every=3", "save_every=1", "train.resume=true"]).folder) == straight.outcome


def test_steps_and_lr_may_change_on_resume_which_is_told_and_recorded(cut, straight, monkeypatch, capsys):
    base = [f"runs={cut}", "smoke=true", "--resume"]
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 11)
        train.main([*base, "steps=14", "lr=0.003", "threads=1", "precision=fp32"])
    told = "resumed 001 after step 9, lr=0.003 (before: 0.002), precision=fp32 (before: auto), steps=14 (before: 12)\n"
    assert told in capsys.readouterr().out
    made = json.loads((run_folder(cut) / "run.json").read_text())
    assert made["changed"] == [{"step": 9, "lr": {"from": 0.002, "to": 0.003}, "steps": {"from": 12, "to": 14},
                                "precision": {"from": "auto", "to": "fp32"}}]
    assert made["config"]["train"]["steps"] == 14 and made["lesson"] == "lesson_05"
    folder = train.main(base).folder                   # what was changed stays so
    assert "resumed 001 after step 11\n" in capsys.readouterr().out
    assert [step for step, _ in outcome(folder)[2]] == [3, 6, 9, 12, 14]
    assert outcome(folder)[2][:3] == straight.outcome[2][:3] and outcome(folder)[2][3] != straight.outcome[2][3]


def test_the_overlay_of_the_gpu_is_laid_on_resume_as_it_was(tmp_path, monkeypatch):
    for gpu, attention in (("true", [14]), ("false", [])):
        runs = tmp_path / gpu
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_after(patch, 2)
            train.main([f"gpu={gpu}", *tiny(runs), "steps=3"])
        path = run_folder(runs) / "run.json"
        made = json.loads(path.read_text())
        path.write_text(json.dumps(made | {"argv": [a for a in made["argv"] if a != f"gpu={gpu}"]}))
        assert made["config"]["train"]["gpu"] == (gpu == "true")       # automatic: found, or not found, by that machine
        result = train.main([f"runs={runs}", "--resume", "smoke=true", "device=cpu", "gpu=auto"])
        assert Weights(result.weights, "lesson_05").config["unet"].attention == attention


def test_nothing_to_resume(straight, tmp_path):
    assert "nothing to resume" in refused(f"runs={tmp_path}", "--resume")
    for argv in ([], ["steps=12"], ["steps=10"], ["lr=1e-3"]):
        assert "nothing to resume: run 001 is finished, 12 steps; more of them go on from there (--resume steps=24)" \
            in refused(f"runs={straight.runs}", "--resume", "smoke=true", *argv)
    for argument in ("resume=True", "train.resume=true", "resume=yes"):
        assert "nothing to resume" in refused(f"runs={tmp_path}", argument)


def test_resume_takes_the_newest_unfinished(cut, straight):
    for number in (2, 10, 999, 1000):
        folder = run_folder(cut, number)
        folder.mkdir()
        (folder / "last.pt").write_bytes((run_folder(cut) / "last.pt").read_bytes())
    for name in ("1001x", "notes"):
        run_folder(cut).with_name(name).mkdir()
    run_folder(cut, 1001).mkdir()                      # begun, nothing saved
    assert [p.name for p in numbered(cut / "smoke")] == ["001", "002", "010", "999", "1000", "1001"]
    run_folder(cut, 1000).joinpath("run.json").write_bytes((run_folder(cut) / "run.json").read_bytes())
    assert train.main([f"runs={cut}", "smoke=true", "--resume"]).folder.name == "1000"


def test_a_finished_run_goes_on_with_more_steps(tmp_path, monkeypatch, capsys):
    folder = train.main(tiny(tmp_path, "steps=4")).folder
    weights = (folder / "weights.safetensors").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(Stopped):        # cut off, it is an unfinished one as any other
        stop_after(patch, 7)
        train.main([f"runs={tmp_path}", "smoke=true", "--resume", "steps=12"])
    assert "resumed 001 after step 4, steps=12 (before: 4)" in capsys.readouterr().out
    assert (folder / "weights.safetensors").read_bytes() == weights     # until there are better ones
    result = train.main([f"runs={tmp_path}", "smoke=true", "--resume"])
    assert "resumed 001 after step 7" in capsys.readouterr().out
    made = json.loads((folder / "run.json").read_text())
    assert result.folder == folder and (folder / "weights.safetensors").read_bytes() != weights
    assert [(change["step"], change["steps"]) for change in made["changed"]] == [(4, {"from": 4, "to": 12})]
    assert made["finished"] == 12 == json.loads((folder / "results.json").read_text())["train"]["steps"]
    assert [step for step, _ in outcome(folder)[2]] == [3, 4, 6, 9, 12]
    monkeypatch.setattr(Run, "save", lambda run: (_ for _ in ()).throw(OSError(28, "No space left", "last.pt")))
    assert train.main(tiny(tmp_path, "steps=2")).steps == 2             # its checkpoint is not worth the run
    assert "warning: no checkpoint of the end (cannot use last.pt: the disk is full" in capsys.readouterr().err


def test_a_new_run_beside_an_unfinished_one(cut):
    assert train.main(tiny(cut)).folder.name == "002"


# ------------------------------------------------------------------ two trainings in two loops
def teacher_and_student(runs, *argv):
    """Seven steps of a teacher, then five of a student that is made from new noise and learns from its average."""
    run = Run(ROOT / "lesson_05" / "train.py", tiny(runs, *argv))
    data, networks = digits("test", 8, limit=100), []

    def network():
        net = torch.nn.Linear(784, 784)
        return (*run.prepare(net, torch.optim.Adam(net.parameters(), 1e-3)), EMA(net))

    def learn(net, optimizer, ema, x, target):
        loss = (net(x + torch.randn_like(x)) - target).square().mean()
        optimizer.zero_grad()
        run.backward(loss)
        optimizer.step()
        ema.update(net)
        run.log(loss=loss)

    teacher = network()
    run.track(**dict(zip(("net", "optimizer", "ema"), teacher)))
    for step, (x0, _) in run.steps(data, until=7):
        networks.append((step, "teacher"))
        learn(*teacher, x0.flatten(1), x0.flatten(1))
    student = network()
    run.track(**dict(zip(("student", "student_optimizer", "student_ema"), student)))
    for step, (x0, _) in run.steps(data):
        networks.append((step, "student"))
        learn(*student, x0.flatten(1), teacher[2].module(x0.flatten(1)))
    return run.finish(student[2], unet=run.config.unet), networks


@pytest.fixture(scope="module")
def two_loops(tmp_path_factory):
    return teacher_and_student(tmp_path_factory.mktemp("two_loops"))


def test_two_loops_are_one_run(two_loops, tmp_path, capsys):
    result, networks = two_loops
    assert networks == [(step, "teacher") for step in range(7)] + [(step, "student") for step in range(7, 12)]
    assert [step for step, _ in outcome(result.folder)[2]] == [3, 6, 7, 9, 12]         # no line is of both
    assert result.steps == 12 and result.parameters == 784 * 785
    assert read_checkpoint(result.folder / "last.pt", "lesson_05")["step"] == 12
    assert read_checkpoint(result.folder / "previous.pt", "lesson_05")["step"] == 8
    assert outcome(teacher_and_student(tmp_path)[0].folder) == outcome(result.folder)
    out = capsys.readouterr().out
    assert out.count("training lesson_05 on") == 1 and "| 7/7 [" in out and "| 12/12 [" in out
    seconds = [record["seconds"] for record in result.records]
    assert seconds == sorted(seconds)                  # one clock


@pytest.mark.parametrize("step", [1, 6, 7, 8, 11, 12])
def test_a_run_of_two_loops_resumes_in_either(two_loops, tmp_path, monkeypatch, capsys, step):
    with monkeypatch.context() as patch, pytest.raises(Stopped, match=f"after step {step};.*--resume"):
        stop_after(patch, step)
        teacher_and_student(tmp_path)
    capsys.readouterr()
    result, networks = teacher_and_student(tmp_path, "--resume")
    assert outcome(result.folder) == outcome(two_loops[0].folder)
    assert networks == two_loops[1][step:] and result.steps == 12
    out = capsys.readouterr().out
    assert out.count(f"resumed 001 after step {step}") == 1
    assert ("| 7/7 [" in out) == (step < 7) and ("| 12/12 [" in out) == (step < 12)


def test_a_run_of_two_loops_goes_back_from_the_second_to_the_first(two_loops, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 8)                           # last.pt at 8, previous.pt at 4, before the student was made
        teacher_and_student(tmp_path)
    (run_folder(tmp_path) / "last.pt").unlink()
    result, networks = teacher_and_student(tmp_path, "--resume")
    assert outcome(result.folder) == outcome(two_loops[0].folder) and networks[0] == (4, "teacher")


def test_steps_that_would_move_the_end_of_a_loop_that_is_done_are_refused(tmp_path, monkeypatch):
    def halves(*argv):
        run, data = Run(ROOT / "lesson_05" / "train.py", tiny(tmp_path, *argv)), digits("test", 8, limit=100)
        run.track(net=torch.nn.Linear(2, 2))
        try:
            done = [[step for step, _ in run.steps(data, until=until)] for until in (run.settings.steps // 2, None)]
        finally:
            run.close()
        return done

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 5)
        halves()
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 8)
        halves("--resume", "steps=14")                 # in the first loop: its end may move
    with pytest.raises(UserError, match="its loop up to step 7 is done and would now end at 9; put steps=14 back"):
        halves("--resume", "steps=18")
    assert halves("--resume", "steps=15") == [[], list(range(8, 15))]


def test_a_checkpoint_of_the_second_loop_must_hold_what_it_trains(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 9)
        teacher_and_student(tmp_path)
    content = torch.load(run_folder(tmp_path) / "last.pt", weights_only=True)
    del content["states"]["student"]
    torch.save(content, run_folder(tmp_path) / "last.pt")
    with pytest.raises(UserError, match="does not fit: 'student'"):
        teacher_and_student(tmp_path, "--resume")


def test_a_loop_ends_with_the_run_and_names_are_used_once(tmp_path):
    run = Run(ROOT / "lesson_05" / "train.py", tiny(tmp_path, "steps=3"))
    assert [step for step, _ in run.steps(digits("test", 8, limit=100), until=99)] == [0, 1, 2]
    assert [step for step, _ in run.steps(digits("test", 8, limit=100))] == []
    run.track(net=torch.nn.Linear(2, 2), ema=None)
    with pytest.raises(ValueError, match="net is tracked already"):
        run.track(net=torch.nn.Linear(2, 2))
    run.close()


# ------------------------------------------------------------------ damaged, foreign and malicious checkpoints
def damage(path, kind):
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        content = content[:len(content) * 2 // 3]
    elif kind == "empty":
        content = b""
    elif kind == "text":
        content = b"not a checkpoint"
    else:
        start = int(len(content) * kind)               # longer than what only fills up between two tensors
        content[start:start + 200] = bytes(byte ^ 4 for byte in content[start:start + 200])
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", 0.1, 0.5, 0.8])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(cut, straight, capsys, kind):
    damage(run_folder(cut) / "last.pt", kind)
    assert outcome(train.main(tiny(cut, "--resume")).folder) == straight.outcome
    captured = capsys.readouterr()
    assert "last.pt is damaged" in captured.err and "after step 8" in captured.out


def test_two_damaged_checkpoints_are_one_error_and_nothing_is_deleted(launch, cut):
    folder = run_folder(cut)
    damage(folder / "last.pt", "truncated")
    damage(folder / "previous.pt", 0.5)
    before = {p: p.read_bytes() for p in folder.iterdir()}
    assert "no usable checkpoint" in launch("lesson_05/train.py", *tiny(cut, "--resume")).error()
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


def same(a, b):
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_every_flipped_byte_is_noticed_or_harmless(cut):
    path = run_folder(cut) / "last.pt"
    content, good = path.read_bytes(), read_checkpoint(path, "lesson_05")
    generator, noticed = torch.Generator().manual_seed(0), 0
    places = torch.randint(len(content), (20,), generator=generator).tolist() + list(range(12)) + [-1, -9, -20, -60]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        try:
            saved = read_checkpoint(path, "lesson_05")
        except UserError:
            noticed += 1
        else:
            assert same(saved, good)
    assert noticed > len(places) / 2


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("form", ["pickle", "zip", "inside"])
def test_code_in_a_checkpoint_is_never_run(cut, straight, tmp_path, capsys, form):
    last, marker = run_folder(cut) / "last.pt", tmp_path / "marker"
    if form == "pickle":
        last.write_bytes(pickle.dumps(Evil(marker)))
    else:
        content = torch.load(last, weights_only=True)
        torch.save(Evil(marker) if form == "zip" else content | {"extra": Evil(marker)}, last)
    assert outcome(train.main(tiny(cut, "--resume")).folder) == straight.outcome
    assert not marker.exists() and "damaged or no checkpoint" in capsys.readouterr().err
    if form == "zip":                                  # the trap is a real one
        torch.save(Evil(marker), last)
        torch.load(last, weights_only=False)
        assert marker.exists()


def test_foreign_checkpoints(cut, capsys):
    last = run_folder(cut) / "last.pt"
    content = torch.load(last, weights_only=True)
    torch.save(content | {"lesson": "lesson_99"}, last)
    torch.save({"step": 3}, last.with_name("previous.pt"))
    assert "no usable checkpoint" in refused(*tiny(cut, "--resume"))
    err = capsys.readouterr().err
    assert "last.pt belongs to lesson_99, not to lesson_05" in err
    assert "previous.pt is not a checkpoint of this course" in err
    del content["random"]
    torch.save(content, last)
    assert "no usable checkpoint" in refused(*tiny(cut, "--resume"))


def test_a_checkpoint_of_another_shape(cut):
    last = run_folder(cut) / "last.pt"
    content = torch.load(last, weights_only=True)
    content["states"]["net"].popitem()
    torch.save(content, last)
    assert "does not fit" in refused(*tiny(cut, "--resume"))
    assert "does not fit" in refused(*tiny(cut, "--resume"))           # and not: is being trained


# ------------------------------------------------------------------ weights files
@pytest.fixture
def weights(straight, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(straight.result.weights.read_bytes())
    return path


def test_sample_without_any_weights(launch, lesson):
    error = launch(lesson / "sample.py").error()
    assert "no weights in" in error and "python train.py" in error
    assert "there is no weights file" in launch(lesson / "sample.py", "weights=published").error()
    assert "there is no weights file nowhere.pt" in launch(lesson / "sample.py", "weights=nowhere.pt").error()


def test_sample_takes_the_newest_then_the_published_and_says_which(lesson, weights, launch):
    (lesson / "results").mkdir()
    (lesson / "results" / "weights.safetensors").write_bytes(weights.read_bytes())
    script, argv = lesson / "sample.py", ["smoke=true", "threads=1"]
    first = launch(script, *argv)
    assert first.wait() == 0 and "using the published weights: " in first.out, first.err
    assert (lesson / "runs/smoke/published/samples.png").exists()
    for number in ("009", "010"):
        (lesson / "runs/smoke" / number).mkdir()
        (lesson / "runs/smoke" / number / "weights.safetensors").write_bytes(weights.read_bytes())
    second = launch(script, *argv)
    assert second.wait() == 0 and "weights of your training run 010" in second.out, second.err
    assert (lesson / "runs/smoke/010/samples.png").exists()
    third = launch(script, *argv, "weights=published", "gif=a.gif", "npz=b.npz")
    assert third.wait() == 0 and "using the published weights: " in third.out, third.err
    assert (lesson / "runs/smoke/published/a.gif").exists() and (lesson / "runs/smoke/published/b.npz").exists()
    assert "between 2 and" in launch(script, *argv, "steps=5000").error()


def test_published_weights_may_be_those_of_another_lesson(lesson, weights, launch, tmp_path):
    (lesson / "results").mkdir()
    (lesson / "results" / "weights.safetensors").write_bytes(weights.read_bytes())
    child = shutil.copytree(lesson, tmp_path / "lesson_06", ignore=shutil.ignore_patterns("results"))
    config = (child / "config.yaml").read_text()
    argv = ["smoke=true", "threads=1"]
    refused = launch(child / "sample.py", *argv, f"weights={weights}").error()
    assert "holds weights of lesson_05, not of lesson_06:" in refused
    (child / "config.yaml").write_text(config.replace(
        "\nsample:\n", "\nsample:\n  published: ../lesson_05/results/weights.safetensors\n"))
    first = launch(child / "sample.py", *argv)
    assert first.wait() == 0 and "using the published weights: " in first.out, first.err
    assert (child / "runs/smoke/published/samples.png").exists() and not (lesson / "runs").exists()
    assert launch(child / "sample.py", *argv, f"weights={weights}").wait() == 0     # any file of that lesson will do
    (child / "config.yaml").write_text(config.replace(
        "\nsample:\n", "\nsample:\n  published: ../lesson_99/results/weights.safetensors\n"))
    assert "there is no weights file" in launch(child / "sample.py", *argv, "weights=published").error()


def test_bad_weights_files_are_one_line(launch, weights, tmp_path):
    whole, state = weights.read_bytes(), load_file(weights)
    config = json.dumps({"unet": dict(Weights(weights, "lesson_05").config["unet"]), "ddpm": {}})
    files = {
        "truncated": (whole[:len(whole) // 2], "not a readable safetensors file"),
        "empty": (b"", "not a readable safetensors file"),
        "pickle": (pickle.dumps(Evil(tmp_path / "marker")), "not a readable safetensors file"),
        "other": ({"lesson": "lesson_99", "config": config}, "holds weights of lesson_99, not of lesson_05"),
        "bare": (None, "holds weights of something else"),
        "no_config": ({"lesson": "lesson_05"}, "does not say how its network is built"),
        "shape": ({"lesson": "lesson_05", "config": config.replace('"channels": 8', '"channels": 16')},
                  "does not fit this lesson"),
        "no_section": ({"lesson": "lesson_05", "config": '{"unet": {}}'},
                       r"does not fit this lesson \(it has no section ddpm\): choose another file with weights=FILE"),
        "list": ({"lesson": "lesson_05", "config": "[1]"}, "does not say how its network is built"),
        "deep": ({"lesson": "lesson_05", "config": "[" * 100_000}, "does not say how its network is built"),
    }
    for name, (content, part) in files.items():
        path = tmp_path / f"{name}.safetensors"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save_file(state, path, metadata=content)
        if name in ("truncated", "shape"):             # as a process, and
            assert part in launch("lesson_05/sample.py", f"weights={path}", "smoke=true", f"runs={tmp_path}").error()
        with pytest.raises(UserError, match=part) as info:             # in this one
            sample.main([f"weights={path}", "smoke=true", f"runs={tmp_path}", "threads=1"])
        assert "\n" not in str(info.value) and str(path) in str(info.value) and "delete" not in str(info.value)
    assert not (tmp_path / "marker").exists()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(UserError, match="is a folder or a device, not a weights file"):
            Weights(tmp_path / name, "lesson_05")


FOREIGN = {"another key": {"wings": 2}, "channels of 0": {"channels": 0}, "a negative one": {"channels": -8},
           "far too many": {"channels": 10**6}, "a text": {"channels": "x"}, "a list": {"mults": [[1]]}}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_network_that_a_weights_file_cannot_build_is_one_line(weights, tmp_path, capsys, monkeypatch, kind):
    path, config = tmp_path / "foreign.safetensors", Weights(weights, "lesson_05").config
    save_file(load_file(weights), path, metadata={"lesson": "lesson_05", "config": json.dumps({
        "unet": {**config["unet"], **FOREIGN[kind]}, "ddpm": dict(config["ddpm"])})})
    argv = [f"weights={path}", "smoke=true", f"runs={tmp_path}", "threads=1", "device=cpu"]
    with pytest.raises(SystemExit) as stop:
        cli(lambda: sample.main(argv))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"{path} does not fit this lesson (" in error and error.count("error:") == 1, error
    assert "choose another file with weights=FILE" in error and error.count("\n") == 1
    monkeypatch.setattr(sample, "UNet", lambda **sizes: (_ for _ in ()).throw(NameError("a reader's own defect")))
    with pytest.raises(NameError):                     # keeps its traceback
        cli(lambda: sample.main([f"weights={weights}", *argv[1:]]))


def test_a_key_that_a_weights_file_lacks_is_one_line(weights, capsys):
    def main():
        weights_file = Weights(weights, "lesson_05")
        return weights_file.config["unet"].wings

    with pytest.raises(SystemExit):
        cli(main)
    assert "does not fit this lesson (AttributeError: " in capsys.readouterr().err
    with pytest.raises(AttributeError):                # after the weights are in, it is a defect of the code
        cli(lambda: setattr(loaded := Weights(weights, "lesson_05"), "loaded", True) or loaded.config["unet"].wings)


def test_values_of_a_weights_file_are_held_to_the_bounds_of_config_yaml(weights, tmp_path):
    path, config = tmp_path / "foreign.safetensors", Weights(weights, "lesson_05").config
    for section, change, part in (("unet", {"blocks": 10**8}, "unet.blocks must be a whole number from 0 to 100, not "),
                                  ("ddpm", {"timesteps": 10**12}, "ddpm.timesteps must be a whole number from 2 to"),
                                  ("unet", {"channels": 10**12}, "unet.channels must be at most 1000000000"),
                                  ("ddpm", {"beta_1": float("nan")}, "ddpm.beta_1 must be finite, not nan")):
        save_file(load_file(weights), path, metadata={"lesson": "lesson_05", "config": json.dumps({
            name: dict(config[name]) | (change if name == section else {}) for name in config})})
        with pytest.raises(UserError) as info:         # before anything of that size is built
            Run(ROOT / "lesson_05" / "sample.py", ["device=cpu", f"runs={tmp_path}"]).read(path)
        assert f"{path} does not fit this lesson (its configuration: {part}" in str(info.value)
        assert Weights(path, "lesson_05").config       # without bounds nothing is known of them


@pytest.mark.parametrize("argument, part", [
    ("unet.channels=999", "unet.channels=999: the weights decide that, and {file} has unet.channels=8; leave it out, "
                          "or train with it: python train.py unet.channels=999"),
    ("timesteps=10", "timesteps=10: the weights decide that, and {file} has ddpm.timesteps=20"),
    ("train.lr=1", "train.lr=1: sample.py does not read train.lr; leave it out"),
    ("reproduce.seeds=1", "reproduce.seeds=1: sample.py does not read reproduce.seeds; leave it out")])
def test_what_the_weights_decide_or_nobody_reads_is_refused(weights, tmp_path, argument, part):
    with pytest.raises(UserError) as info:
        sample.main(["smoke=true", f"weights={weights}", f"runs={tmp_path}", "device=cpu", argument])
    assert str(info.value).startswith(part.format(file=weights))


def test_keys_of_other_sections_that_a_script_does_read(tmp_path):
    def run(script, *argv):
        return Run(ROOT / script, ["device=cpu", f"runs={tmp_path}", *argv])

    assert run("lesson_05/train.py", "unet.channels=8", "sample.steps=3").config.sample.steps == 3     # for previews
    with pytest.raises(UserError, match="^sample.n=3: train.py does not read sample.n; leave it out$"):
        run("lesson_05/train.py", "sample.n=3")
    run("lesson_05/sublesson_a/sample.py", "train.images=20").check_given()
    with pytest.raises(UserError, match="sample.py does not read train.lr"):
        run("lesson_05/sublesson_a/sample.py", "train.lr=1").check_given()
    sampling = run("lesson_05/sample.py", "steps=50")
    sampling.refuse("clip", "not given")
    with pytest.raises(UserError, match="^steps=50: bits take all steps; leave it out$"):
        sampling.refuse("steps", "bits take all steps")


def test_metrics_of_too_few_or_too_many_images_are_refused_before_anything_is_loaded(tmp_path):
    for n in (1, 99, 60_001):
        with pytest.raises(UserError, match=rf"scores \(metrics=true\) need 100 to 60000 images, not n={n}$"):
            Run(ROOT / "lesson_05" / "sample.py", ["device=cpu", f"runs={tmp_path}", "metrics=true", f"n={n}"])
    for n in (100, 60_000):
        Run(ROOT / "lesson_05" / "sample.py", ["device=cpu", f"runs={tmp_path}", "metrics=true", f"n={n}"])


def test_the_picture_goes_by_the_name_that_the_reader_gives(weights, tmp_path):
    sample.main(["smoke=true", f"weights={weights}", f"runs={tmp_path}", "device=cpu", "n=1", "out=mine.png"])
    assert [path.name for path in (tmp_path / "smoke" / "samples").iterdir()] == ["mine.png"]


DAMAGE = {"step of -5": {"step": -5}, "step of 10^9": {"step": 10**9}, "half a step": {"step": 2.5},
          "no number": {"seconds": "long"}, "no time": {"seconds": float("nan")}, "states": {"states": []},
          "config": {"config": "{"}, "sections": {"config": "[]"}, "noise": {"random": [torch.zeros(3)]},
          "no noise": {"random": []}, "records": {"records": [3]}, "scaler": {"scaler": None}, "ends": {"ends": 4}}


def test_checkpoints_with_other_parts_fall_back_to_the_one_before(cut, straight, capsys):
    last = run_folder(cut) / "last.pt"
    content = torch.load(last, weights_only=True)
    for kind, change in DAMAGE.items():
        torch.save(content | change, last)
        with pytest.raises(UserError, match="last.pt is not a checkpoint of this course"):
            read_checkpoint(last, "lesson_05")
            pytest.fail(kind)
    last.unlink()
    for make in (last.mkdir, lambda: os.mkfifo(last)):
        make()
        with pytest.raises(UserError, match="last.pt is a folder or a device, not a checkpoint"):
            read_checkpoint(last, "lesson_05")
        last.rmdir() if last.is_dir() else last.unlink()
    torch.save(content | {"step": 10**9}, last)
    assert outcome(train.main(tiny(cut, "--resume")).folder) == straight.outcome
    captured = capsys.readouterr()
    assert "last.pt is not a checkpoint of this course" in captured.err and "after step 8" in captured.out


def test_weights_of_a_larger_network_than_config_yaml_says(weights, tmp_path):
    x = sample.main([f"weights={weights}", f"runs={tmp_path}", "n=2", "steps=2", "threads=1", "device=cpu"])
    assert x.shape == (2, 1, 28, 28)                   # config.yaml's own U-Net is wider; the file decides


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    net = torch.nn.Linear(2, 2)
    save_weights(net, tmp_path / "w.safetensors", "lesson_05", unet={"channels": 3})
    before = (tmp_path / "w.safetensors").read_bytes()
    for value in (float("nan"), 1e6):                  # 1e6 is above what fp16 holds
        net.weight.data[0, 0] = value
        with pytest.raises(UserError, match="not finite"):
            save_weights(net, tmp_path / "w.safetensors", "lesson_05")
    assert (tmp_path / "w.safetensors").read_bytes() == before


SAVE = """
import sys, torch
from pathlib import Path
from utils import save_weights
net = torch.nn.Linear(2, 2)
torch.nn.init.ones_(net.weight), torch.nn.init.zeros_(net.bias)
save_weights(net, Path(sys.argv[1]), "lesson_05", unet={"channels": 3, "\xe9": "\xe9"}, ddpm={"betas": [1e-4, 0.02]})
"""


def test_equal_weights_are_equal_bytes_in_every_process(launch, tmp_path):
    """safetensors writes the names of its metadata in the order of a hash map, another one at every call."""
    (tmp_path / "script.py").write_text(SAVE, encoding="utf-8")
    done = [launch(tmp_path / "script.py", tmp_path / f"{i}.safetensors") for i in range(2)]
    assert [process.wait() for process in done] == [0, 0], done[0].err
    net = torch.nn.Linear(2, 2)
    net.load_state_dict({"weight": torch.ones(2, 2), "bias": torch.zeros(2)})
    for i in range(2, 20):
        save_weights(net, tmp_path / f"{i}.safetensors", "lesson_05", unet={"channels": 3, "\xe9": "\xe9"},
                     ddpm={"betas": [1e-4, 0.02]})
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(20)}) == 1
    file = Weights(tmp_path / "0.safetensors", "lesson_05")
    assert file.config["unet"]["\xe9"] == "\xe9" and torch.equal(file.state["weight"], torch.ones(2, 2).half())


def test_compiled_networks_leave_the_same_files(straight, tmp_path, monkeypatch):
    """By torch.compile in train.py, and by accelerate's variable; compiled and plain runs resume each other."""
    from torch._dynamo import reset

    prepare = Run.prepare

    def compiled(run, *objects):
        ready = prepare(run, *objects)
        return tuple(torch.compile(part, backend="eager") if hasattr(part, "stem") else part
                     for part in ready)

    for way in ("variable", "train.py"):
        with monkeypatch.context() as patch:
            if way == "variable":
                patch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
            else:
                patch.setattr(Run, "prepare", compiled)
            with patch.context() as stopping, pytest.raises(Stopped):
                stop_after(stopping, 5)
                train.main(tiny(tmp_path / way))
            saved = read_checkpoint(run_folder(tmp_path / way) / "last.pt", "lesson_05")["states"]
            assert not [key for name in ("net", "ema") for key in saved[name] if "_orig_mod" in key]
            if way == "variable":                      # compiled to the end; the other one goes on plain
                train.main(tiny(tmp_path / way, "--resume"))
        if way == "train.py":
            train.main(tiny(tmp_path / way, "--resume"))
        assert outcome(run_folder(tmp_path / way)) == straight.outcome
    net = torch.compile(train.UNet(**straight.outcome[1]["unet"]), backend="eager")
    assert Weights(straight.result.weights, "lesson_05").load(net) is net
    assert torch.equal(net.stem.weight.half(), load_file(straight.result.weights)["stem.weight"])
    reset()


def test_utils_of_another_checkout_is_told_from_a_lesson_copied_out(lesson, tmp_path):
    shutil.copytree(lesson, tmp_path / "copy")
    (tmp_path / "copy").rename(lesson / "sublesson_a")
    for folder in (lesson, lesson / "sublesson_a"):
        assert Run(folder / "train.py", ["device=cpu"]).lesson == folder                # no checkout of its own
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "run.py").touch()
    for folder in (lesson, lesson / "sublesson_a"):
        with pytest.raises(UserError) as info:
            Run(folder / "train.py", ["device=cpu"])
        for part in (f"{folder.name} stands in {tmp_path}", f"`utils` comes from {ROOT}", f"pip install -e {tmp_path}"):
            assert part in str(info.value)
    shutil.rmtree(tmp_path / "utils")
    (tmp_path / "utils").symlink_to(ROOT / "utils")                                     # as tools.notebook does
    assert Run(lesson / "train.py", ["device=cpu"]).lesson == lesson
    (tmp_path / "link").symlink_to(ROOT / "lesson_05")
    assert Run(tmp_path / "link" / "train.py", ["device=cpu"]).lesson == ROOT / "lesson_05"


def test_weights_and_samples_that_are_not_finite_are_one_line(launch, weights, tmp_path):
    state, bad = load_file(weights), tmp_path / "bad.safetensors"
    state["stem.weight"][0, 0, 0, 0] = float("nan")
    config = json.dumps({name: dict(section) for name, section in Weights(weights, "lesson_05").config.items()})
    save_file(state, bad, metadata={"lesson": "lesson_05", "config": config})
    with pytest.raises(UserError, match=r"bad.safetensors holds numbers that are not finite, the first in stem.weight"):
        Weights(bad, "lesson_05")
    argv = ["smoke=true", f"weights={weights}", f"runs={tmp_path}", "threads=1", "device=cpu"]
    blow_up = "import model; old = model.DDPM.sample\n" \
              "def sample(*a, **k):\n    x = old(*a, **k)\n    x[2:, 0, 3, 3] = float('inf')\n    return x\n" \
              "model.DDPM.sample = sample"
    error = launch("lesson_05/sample.py", *argv, before=blow_up).error()
    assert "2 of 4 images are not finite, the first is number 3: the sampler ran away" in error
    assert not list(tmp_path.glob("**/samples.png"))


def test_names_of_lessons():
    assert lesson_name("/a/lesson_05") == "lesson_05"
    assert lesson_name("/a/lesson_05/sublesson_a") == "lesson_05/sublesson_a"


# ------------------------------------------------------------------ a loss that is not a number
def test_nan_stops_and_keeps_the_last_good_checkpoint(launch, straight, tmp_path):
    blow_up = "import torch, utils.run as r; old = r.Run.log\n" \
              "r.Run.log = lambda run, loss: old(run, loss=loss * (float('nan') if run.step >= 10 else 1))"
    error = launch("lesson_05/train.py", *tiny(tmp_path), before=blow_up).error()
    assert "loss is nan at step 11: stopped" in error and str(run_folder(tmp_path) / "last.pt") in error
    assert read_checkpoint(run_folder(tmp_path) / "last.pt", "lesson_05")["step"] == 8
    assert outcome(train.main(tiny(tmp_path, "--resume")).folder) == straight.outcome


def test_a_diverging_run_saves_nothing_that_is_not_finite(tmp_path):
    for log_every in (3, 100):                         # seen in the loss, or in the weights
        error = refused(*tiny(tmp_path, "lr=1e30", "warmup=0", "save_every=1", f"log_every={log_every}"))
        assert "stopped; " in error and "smaller lr" in error and "step" in error
    for path in tmp_path.glob("**/*.pt"):
        for item in read_checkpoint(path, "lesson_05")["states"]["net"].values():
            assert item.isfinite().all()


# ------------------------------------------------------------------ interrupted and killed
def wait_for(condition, process, seconds=60):
    start = time.time()
    while not condition():
        assert time.time() - start < seconds, process.out + process.err
        time.sleep(0.02)


def test_ctrl_c_saves_says_how_to_go_on_and_resumes(tmp_path):
    # A real process this time, from the command line.
    folder = run_folder(tmp_path)
    command = [sys.executable, "train.py", *tiny(tmp_path), "steps=3000", "log_every=1"]
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        process = subprocess.Popen(command, cwd=ROOT / "lesson_05", stdout=out, stderr=err)
    metrics = folder / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, SimpleNamespace(out="no step", err=""))
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    error = (tmp_path / "err").read_text()
    assert "Traceback" not in error and f"go on with: python train.py --resume smoke=true runs={tmp_path}" in error
    step = read_checkpoint(folder / "last.pt", "lesson_05")["step"]
    assert 0 < step < 3000 and f"after step {step};" in error


def test_ctrl_c_once_and_twice(launch, tmp_path, straight):
    slow = "import time, utils.data as d; old = d.Images.batch\n" \
           "d.Images.batch = lambda *a: (time.sleep(0.3 if a[1] > 5 else 0), old(*a))[1]"
    metrics = run_folder(tmp_path) / "metrics.jsonl"
    process = launch("lesson_05/train.py", *tiny(tmp_path), before=slow)
    wait_for(lambda: metrics.exists() and '"step": 6' in metrics.read_text(), process)
    process.signal(signal.SIGINT)
    assert process.wait() == 130 and "go on with" in process.err and "once more" in process.err
    assert outcome(train.main(tiny(tmp_path, "--resume")).folder) == straight.outcome

    twice = slow.replace("0.3", "60")                  # hangs in step 7; a first signal waits for its end
    metrics = run_folder(tmp_path, 2) / "metrics.jsonl"
    process = launch("lesson_05/train.py", *tiny(tmp_path), before=twice)
    wait_for(lambda: metrics.exists() and '"step": 6' in metrics.read_text(), process)
    process.signal(signal.SIGTERM)
    wait_for(lambda: "once more" in process.err, process)
    process.signal(signal.SIGINT)
    assert process.wait() == 130 and process.err.endswith("stopped\n") and "Traceback" not in process.err
    assert outcome(train.main(tiny(tmp_path, "--resume")).folder) == straight.outcome


AT_SIX = """
import os, pty, signal, time, utils.data as d
old = d.Images.batch
def batch(data, step, *rest):
    if step == 6:
        HAPPENS
    time.sleep(1.1 if step in WAITS else 0)
    return old(data, step, *rest)
d.Images.batch = batch
"""
CLOSED = "read, write = os.pipe(); os.dup2(write, 1); os.close(read)"
HUNG_UP = "os.kill(os.getpid(), signal.SIGHUP); os.close(terminal); os.kill(os.getpid(), signal.SIGHUP)"


def at_six(happens, *waits):
    """Code that lets something happen as step 7 begins; these steps take more than the second in which a bar draws."""
    return AT_SIX.replace("HAPPENS", happens).replace("WAITS", str(waits))


def test_what_nobody_reads_any_more_stops_and_saves(launch, straight, tmp_path):
    """Within a second, also where the bar has drawn before, and has seen how many steps a second holds."""
    process = launch("lesson_05/train.py", *tiny(tmp_path), before=at_six(CLOSED, 5, 6))
    assert process.wait() == 130 and "stopped and saved after step 7; go on with" in process.err, process.err
    assert "Traceback" not in process.err and "Exception" not in process.err
    assert outcome(train.main(tiny(tmp_path, "--resume")).folder) == straight.outcome


def test_the_end_of_the_terminal_saves_but_not_what_nohup_started(launch, straight, tmp_path):
    # The tests may have been started with nohup, which a training would take for its own.
    before = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    before += at_six(HUNG_UP, 6) + "terminal, end = pty.openpty()\nos.dup2(end, 1), os.dup2(end, 2)\n"
    process = launch("lesson_05/train.py", *tiny(tmp_path), before=before)
    assert process.wait() == 130
    assert read_checkpoint(run_folder(tmp_path) / "last.pt", "lesson_05")["step"] == 7
    assert outcome(train.main(tiny(tmp_path, "--resume")).folder) == straight.outcome
    nohup = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + at_six(
        "os.kill(os.getpid(), signal.SIGHUP)")         # its output is a file
    process = launch("lesson_05/train.py", *tiny(tmp_path), before=nohup)
    assert process.wait() == 0 and outcome(run_folder(tmp_path, 2)) == straight.outcome


def test_head_and_terminals_without_umlauts(launch, tmp_path, straight):
    argv = ["smoke=true", f"weights={straight.result.weights}", "threads=1", "device=cpu"]
    closed = launch("lesson_05/sample.py", *argv, f"runs={tmp_path}/a", before=f"import os\n{CLOSED}")
    assert closed.wait() == 141 and closed.err == ""
    ascii_only = "import sys; sys.stdout.reconfigure(encoding='ascii', errors='strict')"
    process = launch("lesson_05/sample.py", *argv, f"runs={tmp_path}/\xe9t\xe9", before=ascii_only)
    assert process.wait() == 0 and "?t?/smoke/samples/samples.png" in process.out, process.err


KILL = """
import os, signal, utils.files as files
real, calls = {"replace": os.replace, "fsync": os.fsync}, []
def hook(name, after):
    def call(*args):
        if "last.pt" in str(args) or name == "fsync":
            calls.append(name)
            if len(calls) == AT and not after: os.kill(os.getpid(), signal.SIGKILL)
            result = real[name](*args)
            if len(calls) == AT and after: os.kill(os.getpid(), signal.SIGKILL)
            return result
        return real[name](*args)
    return call
os.replace, os.fsync = hook("replace", AFTER), hook("fsync", AFTER)
"""


def test_kill_in_the_middle_of_a_save(launch, straight, tmp_path):
    # Calls of one run: run.json and metrics.jsonl (two fsync each), then for each checkpoint
    # [rename last to previous], fsync, rename to last, fsync of the folder: 5 to 7 the first, 8 to 11 the second.
    cases = [(5, True), (8, False), (8, True), (10, False), (10, True)]
    killed = [(launch("lesson_05/train.py", *tiny(tmp_path / f"{at}{after}"),
                      before=KILL.replace("AT", str(at)).replace("AFTER", str(after))), tmp_path / f"{at}{after}")
              for at, after in cases]
    states = set()
    for process, runs in killed:
        assert process.wait() == -signal.SIGKILL, process.err
        folder = run_folder(runs)
        kept = tuple(name for name in ("last.pt", "previous.pt") if (folder / name).exists())
        states.add(kept)
        for name in kept:
            read_checkpoint(folder / name, "lesson_05")                # whole, whenever it was killed
        if kept:
            assert outcome(train.main(tiny(runs, "--resume")).folder) == straight.outcome
        else:
            assert "nothing to resume" in refused(*tiny(runs, "--resume"))
        assert not list(folder.glob(".last*")) or not kept             # leftovers are cleared away
    assert states == {(), ("last.pt",), ("previous.pt",), ("last.pt", "previous.pt")}


def test_kill_at_random_moments(launch, straight, tmp_path):
    # last.pt and previous.pt; what a kill leaves of the first save, .last.*.pt, is nothing to go on with
    runs, generator, saved = tmp_path, torch.Generator().manual_seed(time.time_ns() % 2**32), []
    for attempt in range(4):
        saved = list(run_folder(runs).glob("[lp]*.pt"))
        process = launch("lesson_05/train.py", *tiny(runs, "save_every=1"), *["--resume"] * bool(saved))
        time.sleep(0.3 + 0.4 * float(torch.rand((), generator=generator)))
        process.signal(signal.SIGKILL)
        process.wait()
        if not saved and not list(run_folder(runs).glob("[lp]*.pt")):
            runs = tmp_path / f"again_{attempt}"       # killed before the first checkpoint: nothing to go on with
    if not (run_folder(runs) / "weights.safetensors").exists():
        saved = list(run_folder(runs).glob("[lp]*.pt"))
        train.main(tiny(runs, "save_every=1", *["--resume"] * bool(saved)))
    assert [outcome(p) for p in numbered(runs / "smoke") if (p / "weights.safetensors").exists()] == [straight.outcome]


# ------------------------------------------------------------------ two at once
def test_two_trainings_at_once_and_no_resume_of_a_running_one(launch, straight, tmp_path):
    slow = "import time, utils.data as d; old = d.Images.batch\n" \
           "d.Images.batch = lambda *a: (time.sleep(60 if a[1] == 9 else 0), old(*a))[1]"
    both = [launch("lesson_05/train.py", *tiny(tmp_path), before=slow) for _ in range(2)]
    for number in (1, 2):
        wait_for(lambda: (run_folder(tmp_path, number) / "previous.pt").exists(), both[0])  # noqa: B023
    error = launch("lesson_05/train.py", *tiny(tmp_path, "--resume")).error()
    assert "is being trained by another process" in error and "without --resume" in error
    for process in both:
        process.signal(signal.SIGKILL)
        process.wait()
    assert [p.name for p in numbered(tmp_path / "smoke")] == ["001", "002"]
    for name in ("002", "001"):                        # the system let go of both
        result = train.main(tiny(tmp_path, "--resume"))
        assert result.folder.name == name and outcome(result.folder) == straight.outcome


def test_leftovers_of_killed_saves_are_removed_and_others_stay(cut, weights, tmp_path):
    process = subprocess.Popen(["sleep", "0"])
    process.wait()
    folder, samples = run_folder(cut), tmp_path / "runs2" / "smoke" / "samples"
    samples.mkdir(parents=True)
    names = {(pid, host): f".{{}}.{host}.{pid}.140{{}}" for pid in (process.pid, os.getpid())
             for host in (files._HOST, "another")}
    for place, stem, ending in ((folder, "last", ".pt"), (folder, "weights", ".safetensors"), (folder, "run", ".json"),
                                (samples, "samples", ".png")):
        for name in names.values():
            (place / name.format(stem, ending)).touch()
    (folder / ".hidden").touch()
    train.main(tiny(cut, "--resume"))
    sample.main(["smoke=true", f"weights={weights}", f"runs={samples.parent.parent}", "device=cpu", "n=1", "steps=2"])
    dead = names.pop((process.pid, files._HOST))
    for place, stem, ending in ((folder, "last", ".pt"), (folder, "weights", ".safetensors"), (folder, "run", ".json"),
                                (samples, "samples", ".png")):
        assert not (place / dead.format(stem, ending)).exists()
        assert all((place / name.format(stem, ending)).exists() for name in names.values())
    assert (folder / ".hidden").exists() and (folder / ".lock").exists()


def test_an_exception_lets_go_of_the_folder(cut):
    # A notebook keeps the last exception, and with it the run: --resume in the next cell must work.
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 10)
        try:
            train.main(tiny(cut, "--resume"))
        except Stopped as error:
            kept.append(error)
        patch.setattr(Run, "backward", lambda *a: 1 / 0)
        try:
            train.main(tiny(cut, "--resume"))
        except ZeroDivisionError as error:
            kept.append(error)
    with pytest.raises(UserError, match="now it is") as info:
        train.main(tiny(cut, "--resume", "warmup=1"))
    assert train.main(tiny(cut, "--resume")).steps == 12 and len(kept) == 2 and info


# ------------------------------------------------------------------ disks
def test_a_full_disk_keeps_the_last_checkpoint(launch, straight, tmp_path):
    # The system itself refuses files above a limit that the second checkpoint would break.
    limit = "import resource, utils.run as r; old = r.Run.save\n" \
            "def save(run):\n" \
            "    if run.step == 8: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))\n" \
            "    old(run)\n" \
            "r.Run.save = save"
    error = launch("lesson_05/train.py", *tiny(tmp_path), before=limit).error()
    assert "last.pt" in error and "larger than allowed" in error
    folder = run_folder(tmp_path)
    assert read_checkpoint(folder / "last.pt", "lesson_05")["step"] == 4 and not list(folder.glob(".last*"))
    full = "import errno, pathlib; old = pathlib.Path.write_bytes\n" \
           "def write(path, content):\n" \
           "    old(path, content[:len(content) // 2])\n" \
           "    raise OSError(errno.ENOSPC, 'No space left on device')\n" \
           "pathlib.Path.write_bytes = write"
    error = launch("lesson_05/train.py", *tiny(tmp_path, "--resume"), before=full).error()
    assert "last.pt" in error and "the disk is full; free some space" in error
    assert read_checkpoint(folder / "last.pt", "lesson_05")["step"] == 4 and not list(folder.glob(".last*"))
    full = full.replace("def write(path, content):", "def write(path, content):\n    if path.suffix == '.pt': return "
                        "old(path, content)")          # checkpoints fit, the pictures at the end do not
    assert "the disk is full" in launch("lesson_05/train.py", *tiny(tmp_path, "--resume"), before=full).error()
    assert not (folder / "weights.safetensors").exists()
    assert outcome(train.main(tiny(tmp_path, "--resume")).folder) == straight.outcome


STEMS = ("", "../a", "/a", "sub/a", "sub\\a", "c:a", ".hidden", "..", " a", "a.", "a?", "a\nb")


def test_names_that_a_reader_gives_are_plain_and_end_as_they_should():
    for key, ending in (("gif", ".gif"), ("npz", ".npz"), ("out", ".png")):
        check_names(SimpleNamespace(runs="runs", **{key: f"my digits, \xe9{ending}"}), ROOT)
        check_names(SimpleNamespace(runs="runs", **({} if key == "out" else {key: ""})), ROOT)
        taken = ["", "loss.png", "claim.png", "preview_000050.png"] * (key == "out")       # a picture there must be
        for name in [*(stem + ending for stem in STEMS), "true", "weights.safetensors", "model.py", f"a{ending}.txt",
                     *taken]:
            with pytest.raises(UserError, match=rf"must be a plain file name that ends in \{ending}, such as") as info:
                check_names(SimpleNamespace(runs="runs", **{key: name}), ROOT)
            assert str(info.value).startswith(f"{key}=")
    for runs in ("", " ", ".", "runs/..", str(ROOT)):
        with pytest.raises(UserError, match="must name a folder of its own, such as runs=runs"):
            check_names(SimpleNamespace(runs=runs), ROOT)


def test_no_name_replaces_weights_or_code(launch, lesson, weights):
    (lesson / "runs/smoke/001").mkdir(parents=True)
    shutil.copy(weights, lesson / "runs/smoke/001")
    before = {path: path.read_bytes() for path in lesson.rglob("*.*") if path.is_file()}
    for name in ("gif=weights.safetensors", "npz=../../../model.py"):
        assert "must " in launch(lesson / "sample.py", "smoke=true", "threads=1", name).error()
    assert "must name a folder" in launch(lesson / "train.py", "smoke=true", "runs=").error()
    assert {path: path.read_bytes() for path in lesson.rglob("*.*") if path.is_file()} == before


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_places_that_cannot_be_written_are_one_line(launch, weights, tmp_path):
    (tmp_path / "file").write_text("here")
    for runs, part in (("/proc/x", "/proc/x"), (tmp_path / "file", "a file stands where a folder is needed"),
                       (tmp_path / "file" / "sub", "a file stands where a folder is needed"),
                       (tmp_path / ("x" * 300), "the name is too long")):
        assert part in launch("lesson_05/train.py", *tiny(runs)).error()
    argv = ["smoke=true", f"weights={weights}", f"runs={tmp_path / 'runs'}", "threads=1"]
    assert part in launch("lesson_05/sample.py", *argv, f"gif={'x' * 300}.gif").error()
    (tmp_path / "runs" / "smoke" / "samples" / "folder.npz").mkdir(parents=True)
    assert "a device, not a file" in launch("lesson_05/sample.py", *argv, "npz=folder.npz").error()
    assert (tmp_path / "file").read_text() == "here"


# ------------------------------------------------------------------ several processes
WORKER = """
import hashlib, json, os, sys
from pathlib import Path
import torch
sys.path.insert(0, LESSON)
import train, utils
from model import DDPM
from utils.run import Run, Stopped
images, draws, stop = [], [], [4]
steps, loss, finish = Run.steps, DDPM.loss, Run.finish

def watched_steps(run, data):
    for step, (x0, labels) in steps(run, data):
        images.append([hashlib.md5(image.numpy().tobytes()).hexdigest() for image in x0])
        run._stop = run._stop or run.rank == 1 and step in stop        # one of the two is asked to stop
        yield step, (x0, labels)

def watched_loss(ddpm, net, x0):
    draws.append(hashlib.md5(torch.get_rng_state().numpy().tobytes()).hexdigest())
    return loss(ddpm, net, x0)

def watched_finish(run, ema, **networks):
    text = lambda net: hashlib.md5(b"".join(p.detach().numpy().tobytes() for p in net.parameters())).hexdigest()
    Path(OUT, f"rank{run.rank}.json").write_text(json.dumps({
        "net": text(run._tracked["net"]), "ema": text(ema.module), "images": images, "draws": draws,
        "folder": str(run.folder), "world": run.world, "stopped": stopped}))
    return finish(run, ema, **networks)

Run.steps, DDPM.loss, Run.finish = watched_steps, watched_loss, watched_finish
try:
    train.main(sys.argv[1:])
except Stopped as error:
    stopped = str(error)
stop.clear()
utils.cli(lambda: train.main([*sys.argv[1:], "--resume"]))
"""


def test_two_processes_train_one_model(launch, tmp_path):
    # One model and one folder, halves of the batches that one process sees, noise of their own; stopped by a signal
    # to one of them, resumed by both.
    script, argv = tmp_path / "worker.py", tiny(tmp_path / "runs")
    script.write_text(WORKER.replace("LESSON", repr(str(ROOT / "lesson_05"))).replace("OUT", repr(str(tmp_path))))
    (tmp_path / "torchrun.py").write_text("from torch.distributed.run import main\nmain()\n")
    done = launch(tmp_path / "torchrun.py", "--standalone", "--nproc_per_node", 2,         # its processes begin as
                  "--start_method", "fork", "--run-path", script, *argv)                   # copies that have torch
    assert done.wait() == 0, done.err
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    folder = run_folder(tmp_path / "runs")
    for rank in ranks:
        assert rank["world"] == 2 and rank["folder"] == str(folder) and len(rank["images"]) == 12
        assert rank["stopped"].startswith("stopped and saved after step 6;")
        assert "torchrun --nproc_per_node 2 train.py --resume" in rank["stopped"]
    assert ranks[0]["net"] == ranks[1]["net"] and ranks[0]["ema"] == ranks[1]["ema"] != ranks[0]["net"]
    assert len({*ranks[0]["draws"], *ranks[1]["draws"]}) == 24
    data = digits("train", 8)
    for step in range(12):
        whole = {md5(image.numpy().tobytes()).hexdigest() for image in data.batch(step)[0]}
        halves = [set(rank["images"][step]) for rank in ranks]
        assert len(halves[0]) == len(halves[1]) == 4 and halves[0] | halves[1] == whole
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()] == [3, 6, 9, 12]
    assert len(numbered(tmp_path / "runs" / "smoke")) == 1
    (folder / "weights.safetensors").unlink()          # as if it had not finished: one process must not go on alone
    assert "was trained by 2 processes, not 1" in launch("lesson_05/train.py", *argv, "--resume").error()


def test_batch_size_must_suit_the_processes(tmp_path):
    run = Run(ROOT / "lesson_05" / "train.py", tiny(tmp_path))
    run.world = 3
    with pytest.raises(UserError, match="batch_size=8 must be a multiple of the 3 processes"):
        next(run.steps(digits("test", 8, limit=100)))


# ------------------------------------------------------------------ arms of a claim
def test_trained_reuses_resumes_and_retrains(straight, tmp_path, monkeypatch):
    calls = []

    def main(argv):
        calls.append(argv)
        return train.main(argv)

    def arm(*argv):
        return trained(main, tmp_path, [*TINY, *argv], ROOT / "lesson_05")

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 7)
        arm()
    path = arm()                                       # resumed
    assert "--resume" in calls[-1] and outcome(path.parent) == straight.outcome
    assert not list(path.parent.glob("*.pt"))          # nobody goes on with it
    assert arm() == path and len(calls) == 2           # reused
    other = arm("lr=0.003")                             # another value: trained anew
    assert other.parent.name == "002" and len(calls) == 3 and arm("lr=0.003") == other and len(calls) == 3


def test_code_hash_sees_code_and_not_comments(lesson):
    first = code_hash(lesson)
    text = (lesson / "model.py").read_text()
    (lesson / "model.py").write_text("# a comment\n" + text.replace('"""', '"""More. ', 1))
    assert code_hash(lesson) == first == code_hash(ROOT / "lesson_05")
    (lesson / "model.py").write_text(text + "\nx = 1\n")
    assert code_hash(lesson) != first
