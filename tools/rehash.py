"""Keep published results after a change that moved nothing: prove it, then write the new hashes of the code.

    git worktree add ../before COMMIT                 the code that made the results, in a folder of its own
    python -m tools.rehash ../before                  every lesson with published results
    python -m tools.rehash ../before lesson_05 05a    these lessons

For every lesson, old and new code draw samples of one seed from the published weights, each with its own `utils` and
its own copy of the weights file. Only where they are equal bit for bit, the entries of results/results.json that were
made by other code (`python -m tools.frontpage --stale`) get the present hash. Equal samples say nothing about a
training or a claim: whoever runs this has shown by tests or by a second look that those did not move either, and says
so in the commit.
"""
import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.frontpage import load_lessons, load_results
from tools.lineage import Mistake, find, load
from utils import code_hash, write_json

ROOT = Path(__file__).resolve().parent.parent
DRAW = """
import os, sys, torch
sys.path.insert(0, os.getcwd())
torch.set_num_threads(1)
import sample
x = sample.main(["gpu=false", "device=cpu", "threads=1", "weights=published", "n=4", "seed=3", f"runs={sys.argv[1]}"])
torch.save(x.float().cpu(), os.path.join(sys.argv[1], "samples.pt"))
"""


def draw(root, folder):
    """Samples of seed 3 from a lesson's published weights, drawn by the code under `root`. (4, 1, 28, 28)."""
    import torch

    with tempfile.TemporaryDirectory() as place:
        process = subprocess.run([sys.executable, "-c", DRAW, place], cwd=root / folder, text=True, capture_output=True,
                                 env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"})
        if process.returncode:
            last = (process.stderr.strip().splitlines() or ["no message"])[-1]
            raise Mistake(f"{folder} cannot be sampled in {root}: {last}")
        return torch.load(Path(place) / "samples.pt", weights_only=True)


def stale(root, folder):
    """The names of a lesson's results that were made by other code than the present."""
    return [name for name, entry in load_results(root, folder).items()
            if isinstance(entry, dict) and entry.get("code") != code_hash(root / folder, entry.get("script"))]


def rehash(root, folder):
    """Write the present hash into every entry of a lesson's results.json. Returns the names of those it changed."""
    names, path = stale(root, folder), root / folder / "results" / "results.json"
    results = load_results(root, folder)
    for name in names:
        results[name]["code"] = code_hash(root / folder, results[name].get("script"))
    if names:
        write_json(path, results)
    return names


def main(argv=None, root=ROOT, draw=draw):
    parser = argparse.ArgumentParser(prog="python -m tools.rehash", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the commit that made the results")
    parser.add_argument("lessons", nargs="*", metavar="lesson")
    args = parser.parse_args(argv)
    try:
        before = args.before.resolve()
        if not (before / "lessons.yaml").exists():
            raise Mistake(f"{args.before} is no checkout of this project: make one with `git worktree add`")
        if before == root.resolve():
            raise Mistake(f"{args.before} is this checkout: name one of the commit before the change")
        house = load(root)
        folders = [find(house, name)["folder"] for name in args.lessons] or [
            lesson["folder"] for lesson in load_lessons(root) if load_results(root, lesson["folder"])]
        moved = []
        for folder in folders:
            if not stale(root, folder):
                print(f"{folder}: nothing is stale", flush=True)
                continue
            old, new = draw(before, folder), draw(root, folder)
            if old.shape == new.shape and bool((old == new).all()):
                print(f"{folder}: the same samples; new hash for {', '.join(rehash(root, folder))}", flush=True)
            else:
                gap = float((old - new).abs().max()) if old.shape == new.shape else "of another shape"
                print(f"{folder}: OTHER SAMPLES (largest difference {gap}); nothing was changed", flush=True)
                moved.append(folder)
        return 1 if moved else 0
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
