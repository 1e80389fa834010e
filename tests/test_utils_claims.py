"""Claims: what they decide, whom they train, what they write."""

import functools
import json
import math
import multiprocessing
import os
import signal
from types import SimpleNamespace

import pytest
import torch

import utils
from conftest import load
from utils import Arm, Claim, Rows, UserError, above, below, claims
from utils.parallel import Workers

INF, NAN = math.inf, math.nan


# ------------------------------------------------------------------ below
@pytest.mark.parametrize("a, b, factor, holds", [
    ([1.0, 1.1, 1.2], [2.0, 2.3, 2.1], 1, True),
    ([2.0, 2.3, 2.1], [1.0, 1.1, 1.2], 1, False),                                # the wrong way
    ([1.0, 1.1, 2.2], [2.0, 2.3, 2.1], 1, False),                                # one seed disagrees
    ([1.0, 1.0, 1.0], [1.01, 1.5, 3.0], 1, False),                               # every seed, but t = 1.4
    ([1.0, 5.0, 9.0], [1.1, 5.15, 9.1], 1, True),                                # seeds differ, pairs do not: t = 7
    ([1.0, 5.0, 9.0], [1.1, 5.2, 9.1], 1, False),                                # t = 4.0; three seeds need 4.30
    ([1.0, 1.1, 1.2], [2.0, 2.3, 2.1], 0.5, False),                              # a size that is claimed too
    ([0.7, 0.8, 0.7], [2.0, 2.3, 2.1], 0.5, True),
    ([1.0, 2.0, 3.0], [2.0, 3.0, 4.0], 1, True), ([0.1, 0.2, 0.3], [0.2, 0.3, 0.4], 1, True),      # no variance
    ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 1, False), ([2.0, 3.0, 4.0], [1.0, 2.0, 3.0], 1, False),
    ([1.0, 1.0], [2.0, 2.0], 1, False), ([1.0], [2.0], 1, False), ([], [], 1, False),              # too few seeds
    ([1.0, 1.1, 1.2], [INF, INF, INF], 1, True), ([1.0, 1.1, 1.2], [2.0, NAN, 2.1], 1, True),      # b diverged
    ([1.0, 1.1, 2.2], [INF, 2.0, 2.1], 1, False),                                # it did, but where it did not it won
    ([INF, 1.0, 1.1], [2.0, 2.0, 2.1], 1, False), ([1.0, 1.0, NAN], [INF, INF, INF], 1, False),    # a diverged
    ([INF] * 3, [INF] * 3, 1, False),
])
def test_below_wants_every_seed_and_a_paired_test(a, b, factor, holds):
    assert below(a, b, factor) is holds
    negative = ([-x for x in a], [-x for x in b])
    assert above(*negative, factor) is holds                                     # whoever diverged loses here too


def test_p_is_that_of_the_paired_t_test():
    a, b = [1.0, 5.0, 9.0, 2.0], [1.1, 5.3, 9.1, 2.2]
    gaps = [x - y for x, y in zip(a, b)]
    t = 0.175 / (torch.tensor(gaps).double().std() / 2).item()
    assert t == pytest.approx(3.6556, abs=1e-3)
    assert claims.p_value(gaps) == pytest.approx(0.0354, abs=2e-4)               # of a table, 3 degrees of freedom


def test_below_of_other_seeds_is_a_mistake():
    with pytest.raises(ValueError, match="seeds"):
        below([1.0, 2.0, 3.0], [2.0, 3.0])


# ------------------------------------------------------------------ rows
def rows():
    """Two arms, three seeds (not in order), at two numbers of steps."""
    return Rows([{"arm": arm, "seed": seed, "steps": steps, "fid": base + 0.1 * seed + 10 / steps}
                 for seed in (2, 0, 1) for arm, base in (("new", 1.0), ("old", 2.0)) for steps in (5, 10)],
                axes=("arm", "seed", "steps"))


def test_values_come_one_a_seed_in_their_order():
    assert rows().values("fid", arm="new", steps=10) == pytest.approx([2.0, 2.1, 2.2])
    assert rows().mean("fid", arm="new", steps=5) == pytest.approx(3.1)
    assert rows().by("steps", "fid", arm="old") == {5: pytest.approx([4.0, 4.1, 4.2]), 10: pytest.approx([3, 3.1, 3.2])}
    with pytest.raises(ValueError, match="one more axis"):                       # 5 and 10 steps of each seed
        rows().values("fid", arm="new")
    for wrong in ({"arm": "newer"}, {"arm": "new", "steps": 7}):
        with pytest.raises(KeyError):                                            # not: all() of nothing is true
            rows().values("fid", **wrong)
    with pytest.raises(KeyError):
        rows().values("fit", arm="new", steps=5)


def test_rows_are_compared_by_seed():
    assert rows().below("new", "old", "fid", steps=5) and not rows().below("old", "new", "fid", steps=5)
    assert rows().above("old", "new", "fid", steps=5) and not rows().below("new", "old", "fid", factor=0.7, steps=5)
    assert rows().below(10, 5, "fid", by="steps", arm="new")
    other = Rows(row for row in rows() if (row["arm"], row["seed"]) != ("old", 1))
    with pytest.raises(ValueError, match="seeds"):
        other.below("new", "old", "fid", steps=5)


def test_a_table_in_a_row_unfolds():
    table = Rows([{"arm": "x", "seed": seed, "fid": {"160": 9.0 + seed, "0.5": 4.0}} for seed in range(3)])
    assert table.unfold("fid", "steps").values("fid", arm="x", steps=160) == [9, 10, 11]
    assert table.unfold("fid", "steps").by("steps", "fid", arm="x") == {160: [9, 10, 11], 0.5: [4, 4, 4]}


def test_rows_as_text():
    assert rows().table()[0].split() == "new, steps 5 fid 3.1 +- 0.1".split()
    assert rows().line(rows()[1]).split() == "new, seed 2, steps 10 fid 2.2".split()
    assert claims.mean_std([1.0]) == "1" and claims.mean_std([1.0, INF], 1) == "inf +- inf"
    assert claims.mean_std([0.00112, 0.00112, 0.00113], 2) == "0.00 +- 0.00"
    assert claims.mean_std([0.00112, 0.00112, 0.00113]) == "0.001123 +- 5.8e-06"


# ------------------------------------------------------------------ a small lesson, and what its claim does
CONFIG = """
mlp: {size: 3}              # values
train: {steps: 2, batch_size: 2, lr: 0.1, preview_every: 1, save_every: 1, resume: false}
reproduce: {seeds: 3, workers: 1, n: 8}
quick: {reproduce: {n: 4}}
smoke: {train: {steps: 1}}
"""
TRAIN = """
import os
import signal
from types import SimpleNamespace
import torch
from model import Loss, Net
from utils import EMA, Run

def main(argv=None):
    run = Run(__file__, argv)
    net = Net(**run.config.mlp)
    ema, data = EMA(net, 0.0), SimpleNamespace(batch_size=2, batch=lambda *_: (torch.ones(2, 3), torch.ones(2)))
    run.track(net=net)                                 # no optimizer: to import the first one takes a process seconds
    for step, (x, _) in run.steps(data):
        loss = Loss()(net, x) * (float("nan") if run.config.train.lr > 1 else 1)
        net.zero_grad()
        loss.backward()
        net.w.data -= run.config.train.lr * net.w.grad
        ema.update(net)
        run.log(error=loss)
        if run.every(run.config.train.preview_every):
            raise AssertionError("arms draw no previews")
    return run.finish(ema, mlp=run.config.mlp)
"""
MODEL = """
import torch

class Net(torch.nn.Module):
    def __init__(self, size=3):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(size))

class Loss:
    target = 1.0
    def __call__(self, net, x):
        return (net.w - self.target).square().sum()
"""
REPRODUCE = """
import functools
import torch
import train
from model import Loss, Net
from utils import Arm, Claim, cli, figure, save_figure

TARGET = -1.0

class Down(Loss):
    target = TARGET

class To(Loss):
    def __init__(self, target):
        self.target = target

ARMS = {"up": [], "slow, up": ["lr=0.01"], "down": Arm(Loss=Down), "away": ["lr=2"],
        "far": Arm(["lr=0.2"], Loss=functools.partial(To, 9.0))}

def load(run, weights, Loss=Loss):
    return Loss(), weights.load(Net(**weights.config["mlp"]))

def measure(run, loss, net, arm, seed):
    return {"w": float(net.w.detach().mean()) + 0.001 * seed, "target": loss.target, "by_n": {"1": 1.0},
            "net": [net.w.detach()], "publish": run.settings.publish}

def area(run, width, height, seed):
    return {"area": width * height + seed * run.config.reproduce.n}

def main(argv=None):
    claim = Claim(__file__, argv, sections=("mlp",))
    rows = claim.arms(ARMS, train=train.main, load=load, measure=measure, keys=["threads=1"])
    claim.judge("a", "down is below up", paper="-1 against 1", holds=rows.below("down", "up", "w"), ratio=float("inf"))
    claim.judge("b", "up is below down", holds=rows.below("up", "down", "w"))
    claim.exact("c", "2 + 2 is 4", holds=2 + 2 == 4, value=4)
    claim.each(area, jobs=[{"width": 1}, {"width": 2}], height=[5, 6], seed=claim.seeds, keys=["n=10"])
    claim.note("floor", 0.5)
    return claim.finish(plot=plot, headline="w in a phrase", n=claim.cfg.n)

def plot(claim, path):
    fig, ax = figure()
    ax.plot(claim.rows.values("w", arm="up"))
    ax.set(xlabel=f"{claim.notes['floor']} {claim.cfg.n}")
    return save_figure(fig, path)

if __name__ == "__main__":
    cli(main)
"""


@pytest.fixture
def small(tmp_path):
    """The folder of a lesson with five arms, one of them with a class of its own and one that runs away."""
    folder = tmp_path / "lesson_98"
    (folder / "results").mkdir(parents=True)
    for name, text in (("config.yaml", CONFIG), ("train.py", TRAIN), ("model.py", MODEL), ("reproduce.py", REPRODUCE)):
        (folder / name).write_text(text)
    return folder


def trainings(folder):
    """The numbered folders of the arms that were trained."""
    return sorted(str(p.parent.relative_to(folder / "runs" / "claim")) for p in folder.rglob("run.json"))


def test_a_claim_from_arms_to_json(small, capsys):
    reproduce = load(small, "reproduce")
    content = reproduce.main(["publish=true", "mlp.size=4"])
    printed = capsys.readouterr().out
    written = json.loads((small / "results" / "claim.json").read_text())
    assert written == content and (small / "results" / "claim.png").exists()
    assert {k: (v["verdict"], v["holds"]) for k, v in written["claims"].items()} == {
        "a": ("reproduced", True), "b": ("not reproduced at this scale", False), "c": ("exact", True)}
    assert written["claims"]["a"]["paper"] == "-1 against 1" and written["claims"]["a"]["ratio"] is None
    assert written["claims"]["a"]["rule"] == claims.RULE and "drawn" in written["claims"]["c"]["rule"]
    assert written["notes"] == {"floor": 0.5} and written["settings"]["n"] == 8 and written["seeds"] == 3
    w = Rows(written["rows"]).by("arm", "w")
    assert w["up"] == pytest.approx([0.36, 0.361, 0.362], abs=1e-3) and w["down"][0] == pytest.approx(-0.36, abs=1e-3)
    assert w["far"][0] == pytest.approx(9 * 0.64, abs=1e-2)
    assert w["away"] == [INF] * 3                                                # null in JSON
    row = Rows(written["rows"]).where(arm="away", seed=1)[0]
    assert row["diverged"] and row["target"] is None and row["by_n"] == {"1": None}
    row = Rows(written["rows"]).where(arm="down", seed=1)[0]
    assert row["target"] == -1 and "net" not in row and row["publish"] is False
    areas = Rows(written["rows"]).where(height=6)
    assert areas.values("area", width=2) == [12, 22, 32] and areas.values("area", width=1) == [6, 16, 26]
    results = json.loads((small / "results" / "results.json").read_text())
    assert results["headline"] == "w in a phrase" and results["claim"]["n"] == 8
    assert results["claim"]["verdicts"] == {"a": "reproduced", "b": "not reproduced at this scale", "c": "exact"}
    weights = utils.Weights(next(small.glob("runs/claim/up_2/001/weights.safetensors")), "lesson_98")
    assert weights.config["mlp"].size == 4                                       # of a section that the arms take over
    assert "(a) reproduced: down is below up" in printed and "the paper: -1 against 1" in printed
    assert [line.split() for line in printed.splitlines() if line.startswith("up, seed 1")][0][:5] == [
        "up,", "seed", "1", "w", "0.36111"]                                        # as it arrives
    assert any(line.split()[:5] == ["up", "w", "0.3611", "+-", "0.001"] for line in printed.splitlines())


def test_arms_are_reused_and_one_whose_class_changed_is_trained_anew(small):
    reproduce = load(small, "reproduce")
    claim = Claim(reproduce.__file__, [], sections=("mlp",))
    few = {name: reproduce.ARMS[name] for name in ("up", "down", "far")}
    first = claim.train(few, train=reproduce.train.main, seeds=[0])
    assert len(trainings(small)) == 3 and first["up", 0].parent.parent.name == "up_0"
    assert claim.train(few, train=reproduce.train.main, seeds=[0]) == first
    source = (small / "reproduce.py").read_text()
    (small / "reproduce.py").write_text(source.replace("def area", "def areas"))
    assert claim.train(few, train=reproduce.train.main, seeds=[0]) == first      # not of the arms
    (small / "reproduce.py").write_text(source.replace("TARGET = -1.0", "TARGET = -2.0"))
    again = claim.train(few, train=reproduce.train.main, seeds=[0])              # what the class needs has changed
    assert [again[job] == first[job] for job in first] == [True, False, True]
    (small / "reproduce.py").write_text(source.replace("self.target = target", "self.target = 2 * target"))
    again = claim.train(few, train=reproduce.train.main, seeds=[0])
    assert [again[job] == first[job] for job in first] == [True, True, False]
    far = Arm(few["far"].keys, Loss=functools.partial(reproduce.To, 8.0))        # another value
    assert claim.train({"far": far}, train=reproduce.train.main, seeds=[0])["far", 0] not in (
        first["far", 0], again["far", 0])
    (small / "model.py").write_text(MODEL.replace("square()", "abs()"))
    assert claim.train(few, train=reproduce.train.main, seeds=[0])["up", 0] != first["up", 0]


def test_a_name_is_replaced_during_the_training_only(small):
    reproduce = load(small, "reproduce")
    claim, before = Claim(reproduce.__file__, []), reproduce.train.Loss
    claim.train({"down": reproduce.ARMS["down"], "away": Arm(["lr=2"], Loss=reproduce.Down)},
                train=reproduce.train.main, seeds=[0])
    assert reproduce.train.Loss is before
    with pytest.raises(KeyError, match="Lost"):                                  # a slip of the pen
        claim.train({"down": Arm(Lost=reproduce.Down)}, train=reproduce.train.main, seeds=[0])


def test_weights_that_overflow_count_as_a_loss_that_ran_away(small):
    reproduce = load(small, "reproduce")
    arm = Arm(Loss=functools.partial(reproduce.To, 1e6))                         # 3.6e5 in fp16 is infinite
    rows = Claim(reproduce.__file__, []).arms({"huge": arm, "up": []}, reproduce.train.main, reproduce.measure,
                                              reproduce.load, seeds=[0])
    assert rows[0]["diverged"] and rows[0]["w"] == INF and rows[0]["net"] is None and "diverged" not in rows[1]


def test_samples_that_are_not_finite_count_as_an_arm_that_diverged(small):
    from utils.images import check_finite

    reproduce = load(small, "reproduce")

    def measure(run, loss, net, arm, seed):
        check_finite(torch.full((2, 1, 4, 4), INF if arm == "wild" else 0.0))
        return {"w": 1.0}

    rows = Claim(reproduce.__file__, ["workers=1"]).arms({"wild": [], "up": []}, reproduce.train.main, measure,
                                                         reproduce.load, seeds=[0])
    assert rows[0]["diverged"] and rows[0]["w"] == INF and rows[1]["w"] == 1.0 and "diverged" not in rows[1]


def test_any_other_error_of_an_arm_stops_the_claim(small):
    reproduce = load(small, "reproduce")
    with pytest.raises(UserError, match="lr"):
        Claim(reproduce.__file__, []).train({"up": ["lrr=1"]}, train=reproduce.train.main)


@pytest.mark.parametrize("argv", [["smoke=true"], ["quick=true"], ["seeds=2"]])
def test_a_quick_look_has_no_verdict(small, argv):
    content = load(small, "reproduce").main(["publish=true", *argv])
    assert {one["verdict"] for one in content["claims"].values()} == {"no verdict from a quick look", "exact"}
    assert (small / "results" / "claim.json").exists() == (argv == ["seeds=2"])  # of smoke and quick runs nothing is
    assert (small / "results" / "results.json").exists() == (argv == ["seeds=2"])


def test_two_claims_have_two_letters(small):
    claim = Claim(load(small, "reproduce").__file__, [])
    claim.judge("a", "one", True)
    with pytest.raises(ValueError, match="two claims"):
        claim.exact("a", "two", True)
    claim.exact("b", "three", 2 + 2 == 5)
    assert claim.claims["b"]["verdict"] == "not exact"


def test_keys_that_go_to_no_arm_are_refused(small):
    file = load(small, "reproduce").__file__
    with pytest.raises(UserError, match="^mlp.size=4: reproduce.py does not read mlp.size; leave it out$"):
        Claim(file, ["mlp.size=4"])
    claim = Claim(file, ["mlp.size=4", "train.lr=0.1", "n=3"], sections=("mlp",))
    assert claim.run.config.mlp.size == 4


def test_the_published_network_or_that_of_an_arm(small):
    reproduce = load(small, "reproduce")
    claim = Claim(reproduce.__file__, [])
    with pytest.raises(UserError, match="train that arm first"):
        utils.published(claim.run, "up")
    paths = claim.train({"up": [], "down": reproduce.ARMS["down"]}, train=reproduce.train.main)
    assert utils.published(claim.run, "up").path == paths["up", 0]
    assert utils.arm_weights(claim.run, "down", 2).path == paths["down", 2]
    (small / "results" / "weights.safetensors").write_bytes(paths["up", 1].read_bytes())
    assert utils.published(claim.run, "up").path == small / "results" / "weights.safetensors"
    smoke = Claim(reproduce.__file__, ["smoke=true"])
    smoke.train({"up": []}, train=reproduce.train.main, seeds=[0])
    assert utils.published(smoke.run, "up").path.is_relative_to(small / "runs" / "smoke")


def test_processes_measure_what_one_process_does(small, launch):
    beside = launch(small / "reproduce.py", "workers=2", "runs=beside", "seeds=1")
    alone = load(small, "reproduce").main(["runs=alone", "seeds=1"])
    assert beside.wait() == 0, beside.err
    printed = beside.out
    beside = json.loads((small / "beside" / "claim" / "claim.json").read_text())
    assert beside["rows"] == alone["rows"] and beside["claims"] == alone["claims"]
    assert "up, seed 0" in printed and "trained for" not in printed
    folders = [{p.name for p in (small / name / "claim").iterdir() if p.is_dir()} for name in ("alone", "beside")]
    assert folders[0] == folders[1] and len(folders[0]) == 5                    # marked alike in every process


def test_a_published_claim_can_be_drawn_again(small):
    reproduce = load(small, "reproduce")
    reproduce.main(["publish=true"])
    again = utils.saved(small / "results" / "claim.json")
    assert again.claims["a"]["holds"] and list(again.seeds) == [0, 1, 2] and again.rows.below("down", "up", "w")
    assert reproduce.plot(again, small / "again.png").read_bytes() == (small / "results" / "claim.png").read_bytes()


# ------------------------------------------------------------------ small things
def test_what_the_arms_take_from_the_command_line():
    argv = ["unet.channels=8", "train.lr=1", "smoke=true", "--gpu", "device=cpu", "seeds=5", "n=3", "ddpm.t=3"]
    assert claims.own(argv, ("unet",)) == ["unet.channels=8", "train.lr=1", "smoke=true", "--gpu", "device=cpu"]
    # An arm is what the claim says on every device: the GPU's overlay is laid only where the reader asks for it.
    assert claims.own(["device=cuda", "seeds=5"]) == ["gpu=false", "device=cuda"]
    assert claims.own(["gpu=true"]) == ["gpu=true"] and claims.own(["gpu=auto"]) == ["gpu=auto"]


def test_folders_of_arms():
    assert [claims.folder_name(name, 3) for name in ("FM-OT", "n = 6, 7", "4/64", 0.1)] == [
        "FM-OT_3", "n_6_7_3", "4_64_3", "0.1_3"]


def test_verdict_needs_seeds_and_a_full_run():
    def cfg(**given):
        return SimpleNamespace(**{"quick": False, "smoke": False, "seeds": 3, **given})

    assert utils.claims.verdict(True, cfg()) == "reproduced"
    assert utils.claims.verdict(False, cfg()) == "not reproduced at this scale"
    for given in ({"quick": True}, {"smoke": True}, {"seeds": 2}):
        assert "reproduced" not in utils.claims.verdict(True, cfg(**given))


def test_deviations_over_seeds():
    assert utils.deviation([5.0]) == 0 and utils.deviation([1.0, float("inf")]) == float("inf")
    assert utils.deviation([1.0, 2.0, 3.0]) == pytest.approx(1.0)          # n - 1 in the denominator
    assert utils.pooled([1.0, 2.0, 3.0], [10.0, 12.0, 14.0]) == pytest.approx(2.5 ** 0.5)


def test_claims_are_plain_json(tmp_path):
    claim = {"a": [1.0, float("inf"), (float("nan"), "x")], 0.5: {"b": -float("inf")}}
    assert json.loads(utils.claims.save_json(claim, tmp_path / "claim.json").read_text()) == {
        "a": [1.0, None, [None, "x"]], "0.5": {"b": None}}
    assert torch.equal(torch.randn(3, generator=utils.seeded(4)), torch.randn(3, generator=utils.seeded(4)))


# ------------------------------------------------------------------ processes
@pytest.fixture
def forked(monkeypatch):
    """Workers begin as copies of this process, which has torch. How they really begin: the tests with `launch`."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: {"spawn": context}[kind])


def test_workers_are_kept_for_the_next_work_and_ended_by_an_error(forked):
    workers = Workers(2)
    assert list(Workers(1).run(os.getpid, [()] * 2)) == [os.getpid()] * 2 == list(workers.run(os.getpid, [()])) * 2
    first = set(workers.run(os.getpid, [()] * 8))
    again = set(workers.run(os.getpid, [()] * 8))
    assert os.getpid() not in first | again and len(first | again) <= 2          # not two more
    assert list(workers.run(pow, [(2, i) for i in range(9)])) == [2 ** i for i in range(9)]
    with pytest.raises(ZeroDivisionError):
        list(workers.run(divmod, [(1, 1), (1, 0), (1, 1)]))
    assert workers._pool is None
    assert not multiprocessing.active_children()


def test_a_worker_that_is_killed_ends_the_work_with_one_line(forked):
    workers = Workers(2)
    with pytest.raises(UserError, match="ended from outside.*workers=1"):
        list(workers.run(_die, [(i,) for i in range(4)]))
    assert workers._pool is None and not multiprocessing.active_children()
    assert list(workers.run(pow, [(2, 3), (2, 4)])) == [8, 16]                   # and the next work has new ones
    workers.close()


def _die(i):
    """Job 2 is killed as the system kills a process for want of memory."""
    if i == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return i


def test_a_script_without_a_guard_is_told_so(tmp_path, launch):
    script = tmp_path / "mine.py"
    script.write_text("from utils import cli\nfrom utils.parallel import parallel\n\n"
                      "cli(lambda: print(list(parallel(pow, [(2, 3), (2, 4)], 2))))\n", encoding="utf-8")
    process = launch(script)
    assert process.wait() == 2, process.err            # it once started processes for ever
    last = process.err.splitlines()[-1]
    assert last.startswith("error: ") and "__main__" in last and "ended from outside" not in process.out
