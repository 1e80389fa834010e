"""tools/judges.py: a tiny training, the moved images, and a bad judge that must not take the real one's place."""

import pytest
import torch
from safetensors import safe_open

from tools import judges
from utils import UserError, classify, cli, digits, scores
from utils.scores import WIDTHS, Judge


def few(model):
    """Accuracy on a tenth of the test set, for judges that nobody keeps."""
    x, y = digits("test").first(1000)
    return (model(x).argmax(1) == y).float().mean().item()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Both judges after nine steps each, written to a file of their own."""
    before = judges.JUDGES.read_bytes()
    out = tmp_path_factory.mktemp("judges") / "new" / "judges.safetensors"
    state = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judges, "accuracy", few)
        report = judges.main(["epochs=0.02", f"out={out}"])
    torch.set_rng_state(state)
    assert judges.JUDGES.read_bytes() == before
    return out, report


# ------------------------------------------------------------------ the training
def test_the_file_holds_both_judges(tiny):
    out, report = tiny
    assert set(report) == set(WIDTHS) and all(0.05 < value < 0.994 for value in report.values())
    with safe_open(out, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        assert file.metadata() == {name: f"{value:.4f}" for name, value in report.items()}
    assert all(value.dtype == torch.float16 for value in tensors.values() if value.is_floating_point())
    wanted = {f"{name}.{key}" for name, width in WIDTHS.items() for key in Judge(width).state_dict()}
    assert set(tensors) == wanted


def test_the_file_loads_and_scores_as_reported(tiny, monkeypatch):
    out, report = tiny
    monkeypatch.setattr(scores, "JUDGES", out)
    scores.judge.cache_clear()
    try:
        for name in WIDTHS:
            model = scores.judge(name)
            assert not model.training and not any(p.requires_grad for p in model.parameters())
            assert few(model) == pytest.approx(report[name], abs=1e-4)     # what is stored is measured
    finally:
        scores.judge.cache_clear()


def test_the_same_seed_gives_the_same_judge(monkeypatch):
    monkeypatch.setattr(judges, "accuracy", lambda model: 0.5)
    first, second = (judges.train("labels", epochs=0.004, batch_size=64)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert judges.SEEDS["features"] != judges.SEEDS["labels"] and WIDTHS["features"] != WIDTHS["labels"]


def test_the_committed_judges_reach_the_target():
    for name in WIDTHS:
        assert judges.accuracy(scores.judge(name)) >= judges.TARGET


# ------------------------------------------------------------------ moved images
def test_moved_keeps_shape_range_and_background():
    torch.manual_seed(0)
    x, _ = digits("train").first(500)
    y = judges.moved(x)
    assert y.shape == x.shape and y.dtype == x.dtype and y.isfinite().all()
    assert y.min() >= -1 - 1e-6 and y.max() <= 1 + 1e-6
    assert y.mean().item() == pytest.approx(x.mean().item(), abs=0.02)     # digits neither leave nor grow
    assert (y[:, :, 0, 0] < -0.99).float().mean() > 0.99                   # what comes in at the edge is black


def test_moved_moves_each_image_its_own_way():
    torch.manual_seed(0)
    one = digits("train").first(1)[0]
    y = judges.moved(one.expand(64, -1, -1, -1))
    assert ((y - one).abs().mean(dim=(1, 2, 3)) > 0.01).all()
    assert ((y[1:] - y[:-1]).abs().mean(dim=(1, 2, 3)) > 0.01).all()


def test_moved_keeps_the_label():
    torch.manual_seed(0)
    x, labels = digits("test").first(2000)
    digit, _ = classify(judges.moved(x))
    assert (digit == labels).float().mean() > 0.985
    for k in range(10):
        assert (digit[labels == k] == k).float().mean() > 0.95, f"moved {k} is read as another digit"


def test_moved_stays_within_its_bounds():
    """A dot in the middle goes 2 pixels away in each direction, and a little farther where the turn adds to it."""
    torch.manual_seed(0)
    x = torch.full((2000, 1, 28, 28), -1.0)
    x[:, :, 13:15, 13:15] = 1
    mass = judges.moved(x)[:, 0] + 1
    total, place = mass.sum((1, 2)), torch.arange(28.0) - 13.5
    down = (mass.sum(2) * place).sum(1) / total
    right = (mass.sum(1) * place).sum(1) / total
    for shift in (down, right):
        assert 1.5 < shift.abs().max() < 3 and abs(shift.mean()) < 0.15


# ------------------------------------------------------------------ the real judge's place
def bad_training(name, *_, **__):
    return Judge(WIDTHS[name]), 0.5


@pytest.mark.parametrize("spelling", ["default", "full path", "another spelling", "a link"])
def test_a_bad_judge_is_not_kept_in_the_real_ones_place(spelling, tmp_path, monkeypatch):
    real = tmp_path / "utils" / "judges.safetensors"
    real.parent.mkdir()
    real.write_bytes(b"the real judges")
    (tmp_path / "link").symlink_to(real.parent)
    monkeypatch.setattr(judges, "JUDGES", real)
    monkeypatch.setattr(judges, "train", bad_training)
    monkeypatch.chdir(tmp_path)
    out = {"default": [], "full path": [f"out={real}"], "another spelling": ["out=utils/judges.safetensors"],
           "a link": ["out=link/judges.safetensors"]}[spelling]
    with pytest.raises(UserError, match="99.4"):
        judges.main(out)
    assert real.read_bytes() == b"the real judges"
    assert [path.name for path in real.parent.iterdir()] == [real.name]


def test_a_good_judge_is_kept(tmp_path, monkeypatch):
    real = tmp_path / "judges.safetensors"
    monkeypatch.setattr(judges, "JUDGES", real)
    monkeypatch.setattr(judges, "train", lambda name, *_, **__: (Judge(WIDTHS[name]), 0.9951))
    assert judges.main([]) == {"features": 0.9951, "labels": 0.9951} and real.is_file()


# ------------------------------------------------------------------ mistakes
@pytest.mark.parametrize("argument", ["epoch=1", "epochs", "epochs=", "out=", "--quick", "epochs=many", "epochs=nan",
                                      "epochs=-1", "epochs=inf"])
def test_mistakes_end_in_one_line(argument, capsys, monkeypatch):
    monkeypatch.setattr(judges, "train", lambda *_, **__: pytest.fail("trained in spite of the mistake"))
    with pytest.raises(SystemExit) as stop:
        cli(lambda: judges.main([argument]))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert argument in err and "epochs=N" in err
