"""tools/rehash.py: published results keep their place only after a proof that nothing moved."""

import json

import pytest
import torch

from tools import rehash
from utils import code_hash

MODEL = '"""A lesson."""\n\n\ndef double(x):\n    """Twice x."""\n    return {}\n'


@pytest.fixture
def checkouts(tmp_path):
    """(before, after): a lesson whose code was written otherwise, with two published results and a headline."""
    roots = []
    for name, body in (("before", "2 * x"), ("after", "x + x")):
        root = tmp_path / name
        folder = root / "lesson_05"
        (folder / "results").mkdir(parents=True)
        (root / "lessons.yaml").write_text('lessons: [{number: "05", folder: lesson_05, parents: [], state: ready}]\n')
        (folder / "model.py").write_text(MODEL.format(body))
        (folder / "train.py").write_text('"""Train."""\n')
        (folder / "sample.py").write_text('"""Sample."""\n')
        roots.append(root)
    before, after = roots
    results = {"train": {"code": code_hash(before / "lesson_05", "train"), "script": "train", "loss": 0.25},
               "sample_50": {"code": code_hash(before / "lesson_05", "sample"), "script": "sample", "fid": 2.5},
               "headline": "FID 2.5"}
    (after / "lesson_05" / "results" / "results.json").write_text(json.dumps(results))
    return before, after


def published(root):
    return json.loads((root / "lesson_05" / "results" / "results.json").read_text())


def test_equal_samples_renew_the_hashes_and_nothing_else(checkouts, capsys):
    before, after = checkouts
    old, drawn = published(after), []
    x = torch.randn(4, 1, 28, 28)
    assert rehash.main([str(before)], root=after, draw=lambda root, folder: drawn.append((root, folder)) or x) == 0
    assert drawn == [(before, "lesson_05"), (after, "lesson_05")]
    new = published(after)
    assert {name: new[name]["code"] for name in ("train", "sample_50")} == {
        "train": code_hash(after / "lesson_05", "train"), "sample_50": code_hash(after / "lesson_05", "sample")}
    for results in (old, new):
        for name in ("train", "sample_50"):
            results[name].pop("code")
    assert new == old
    assert "new hash for train, sample_50" in capsys.readouterr().out
    assert rehash.main([str(before), "05"], root=after, draw=lambda *_: pytest.fail("nothing is stale")) == 0


@pytest.mark.parametrize("change", [lambda x: x + 1e-7, lambda x: x[:3]])
def test_other_samples_change_nothing(checkouts, capsys, change):
    before, after = checkouts
    old, x = published(after), torch.rand(4, 1, 28, 28)
    assert rehash.main([str(before)], root=after, draw=lambda root, _: x if root == before else change(x)) == 1
    assert published(after) == old and "OTHER SAMPLES" in capsys.readouterr().out


def test_mistakes_are_one_line(checkouts, tmp_path, capsys):
    before, after = checkouts
    for argv, said in (([str(tmp_path / "nowhere")], "is no checkout"), ([str(after)], "is this checkout"),
                       ([str(before), "06"], "no lesson '06'")):
        assert rehash.main(argv, root=after, draw=lambda *_: None) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1
    (before / "lesson_05" / "sample.py").write_text('raise ValueError("broken")\n')
    assert rehash.main([str(before)], root=after) == 2      # the real draw: a process in the lesson's folder
    assert "lesson_05 cannot be sampled" in capsys.readouterr().err
