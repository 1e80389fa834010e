"""The contract of REFERENCE.md, checked for every lesson that lessons.yaml calls ready.

What a lesson's mathematics must satisfy stands in its own test_lesson_NN.py. Who may import whom, copies and the
table of what is new are checked by tools/lineage.py, the front page by test_tools_frontpage.py.
"""

import ast
import functools
import hashlib
import inspect
import itertools
import json
import math
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver as Adaptive

from conftest import load
from tools import frontpage, lineage, notebook, pages
from utils import UserError, Weights, cli, images
from utils.claims import RULE
from utils.config import OVERLAYS
from utils.files import lesson_name

ROOT = Path(__file__).resolve().parent.parent
REGISTER = lineage.load_lessons(ROOT)
READY = [lesson for lesson in REGISTER if lesson["state"] == "ready"]
SCRIPTS = ("train", "sample", "reproduce")
SOURCES = ("model.py", "train.py", "sample.py", "reproduce.py")
LINES = {"train.py": 90, "sample.py": 85, "model.py": 300}
NEW_LINES = 150                                        # of code in model.py; more with a reason in lessons.yaml
VERDICTS = ("reproduced", "not reproduced at this scale", "exact", "not exact")
NO_VERDICT = "no verdict from a quick look"
PUBLISHED = ("samples.png", "denoising.gif", "loss.png", "claim.png", "claim.json", "results.json",
             "weights.safetensors")
TRAINED = {"loss.png", "weights.safetensors"}          # of a lesson that publishes a training of its own
HEADINGS = pages.ORDER
LOCAL = ("gpu=false", "device=cpu", "threads=1")       # alike on every machine
NOISY = {"03": ["steps=2"], "04": ["steps=1"],         # at each of many levels; below: with noise on the way, too
         "06": ["steps=10", "eta=1.0"], "20": ["steps=3", "churn=3.0"], "21": ["model=1-rf", "steps=3", "noise=1.0"]}
MB = 1e6


@pytest.fixture(scope="module", params=READY, ids=[lesson["number"] for lesson in READY])
def entry(request):
    """The lesson's entry in the register."""
    return request.param


@pytest.fixture(scope="module")
def folder(entry):
    """The lesson's folder."""
    return ROOT / entry["folder"]


def text(folder, name):
    """A file of the lesson; the test fails if it is not there."""
    assert (folder / name).is_file(), f"{folder.relative_to(ROOT)}/{name} is missing"
    return (folder / name).read_text(encoding="utf-8")


def tree(folder, name):
    """A script of the lesson as a syntax tree."""
    return ast.parse(text(folder, name), f"{folder.name}/{name}")


def weights_file(folder):
    """The published weights: the lesson's own or, where config.yaml has sample.published, those of the lesson named."""
    named = yaml.safe_load(text(folder, "config.yaml"))["sample"].get("published")
    return (folder / (named or "results/weights.safetensors")).resolve()


@functools.cache
def house():
    """Every definition of every lesson."""
    return lineage.load(ROOT)


def git(*arguments):
    """What git answers; the test is skipped where there is no repository."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


# ------------------------------------------------------------------ files
def test_register_has_a_ready_lesson():
    assert READY


@pytest.mark.parametrize("name", [*SOURCES, "config.yaml", "README.md", "notebook.ipynb"])
def test_file_exists(folder, name):
    assert (folder / name).is_file(), f"{name} is missing"


@pytest.mark.parametrize("name", PUBLISHED)
def test_result_is_published(folder, name):
    if name in TRAINED and weights_file(folder).parent != folder / "results":
        assert not (folder / "results" / name).exists(), f"results/{name} of a lesson with another one's weights"
        return
    assert (folder / "results" / name).is_file(), f"results/{name} is missing"


def test_weights_are_those_of_a_ready_lesson(folder):
    assert weights_file(folder).parent in [ROOT / lesson["folder"] / "results" for lesson in READY]


def test_no_large_file_in_git():
    names = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    sizes = {name: (ROOT / name).stat().st_size for name in names if (ROOT / name).is_file()}
    assert sizes and {name: size for name, size in sizes.items() if size > 1.5 * MB} == {}


def test_what_a_run_writes_is_not_in_git():
    assert [name for name in git("ls-files").splitlines() if re.search(r"(^|/)(runs|data|__pycache__)/", name)] == []


def test_notebook_is_small(folder):
    assert len(text(folder, "notebook.ipynb").encode()) < notebook.MAX_NOTEBOOK   # what it holds: test_tools_notebook


@pytest.mark.parametrize("name", ["samples.png", "denoising.gif", "loss.png", "claim.png"])
def test_pictures_are_pictures(folder, name):
    if name in TRAINED and weights_file(folder).parent != folder / "results":
        return
    with Image.open(folder / "results" / name) as picture:
        assert min(picture.size) > 50
        assert picture.convert("L").getextrema() != (0, 0)
        if name.endswith(".gif"):
            assert 5 < picture.n_frames <= 24 and picture.info.get("loop") == 0
            assert (folder / "results" / name).stat().st_size <= MB / 4


# ------------------------------------------------------------------ published numbers and weights
def published_results(folder):
    return json.loads(text(folder, "results/results.json"))


def test_every_number_says_how_it_was_made(folder):
    results = published_results(folder)
    entries = {name: one for name, one in results.items() if name != "headline"}
    own = weights_file(folder).parent == folder / "results"
    assert all(isinstance(one, dict) for one in entries.values()) and ("train" in entries) == own
    for name, one in entries.items():
        missing = {"command", "seed", "device", "torch", "code"} - set(one)
        assert not missing, f"{name} lacks {sorted(missing)}"
        command = one["command"]
        assert re.match(r"(python|torchrun|accelerate) .*\b(train|sample|reproduce)\.py", command), f"{name}: {command}"
        assert "smoke" not in command and "quick" not in command, f"{name}: {command}"
        assert re.fullmatch(r"[0-9a-f]{12}", one["code"]), f"{name}: {one['code']}"
        assert isinstance(one["seed"], int) and one["device"] and one["torch"]
    assert not own or entries["train"]["steps"] > 0 and entries["train"]["minutes"] > 0
    for name, one in entries.items():
        if "fid" in one:                               # a score is read beside n, floor and network calls
            assert {"n", "fid_floor", "nfe"} <= set(one), f"{name}: a FID without n, floor or nfe"
            assert math.isfinite(one["fid"]) and one["n"] >= 1000, f"{name}: FID of n = {one['n']}"


def test_headline(folder):
    assert frontpage.headline(published_results(folder)) != frontpage.NOTHING


def test_headline_stands_in_the_readme(folder):
    """The number on the front page is the one that the lesson prints."""
    headline = frontpage.headline(published_results(folder))
    numbers = re.findall(r"FID (\d+(?:\.\d+)?)", headline) or [headline]
    page = text(folder, "README.md")
    assert [number for number in numbers if not re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", page)] == []


def flaws(claim):
    """What is wrong with a published claim.json: one sentence, one rule, one verdict each; no quick look."""
    claims = claim.get("claims")
    if not isinstance(claims, dict) or not claims:
        yield "it has no claims"
        return
    for letter, one in claims.items():
        if not re.fullmatch(r"[a-z]\d?", letter):
            yield f"({letter}) is not a letter"
        yield from (f"({letter}) has no {key}" for key in ("sentence", "rule", "verdict") if not one.get(key))
        if len(one.get("sentence", "").split()) < 4:
            yield f"({letter}) is not a sentence"
        if one.get("rule", "").startswith('"below"') and one["rule"] != RULE:
            yield f"({letter}) was judged by another rule than that of utils.claims"
        if one.get("verdict") not in VERDICTS:
            yield f"({letter}) has the verdict {one.get('verdict')!r}"
    yield from (f"it is of a {size} run" for size in ("quick", "smoke") if claim.get("settings", {}).get(size))


def test_published_claims(folder):
    assert list(flaws(json.loads(text(folder, "results/claim.json")))) == []


@pytest.mark.parametrize("change, flaw", [
    ({}, None),
    ({"verdict": "not exact"}, None),
    ({"verdict": NO_VERDICT}, "(a) has the verdict 'no verdict from a quick look'"),
    ({"verdict": "reproduced in part"}, "(a) has the verdict 'reproduced in part'"),
    ({"rule": ""}, "(a) has no rule"),
    ({"rule": RULE}, None),
    ({"rule": '"below" and "above": by the means'}, "(a) was judged by another rule than that of utils.claims"),
    ({"sentence": "Yes"}, "(a) is not a sentence"),
])
def test_flaws_of_a_claim(change, flaw):
    one = {"sentence": "A is below B", "rule": "in every seed", "verdict": "reproduced", **change}
    assert list(flaws({"claims": {"a": one}})) == ([flaw] if flaw else [])
    assert list(flaws({"a": one})) == ["it has no claims"]
    assert "it is of a quick run" in flaws({"claims": {"a": one}, "settings": {"quick": True}})


def test_weights_are_small_and_say_what_they_are(folder):
    path = weights_file(folder)
    assert path.is_file() and path.stat().st_size <= 1.5 * MB
    with safe_open(path, "pt") as file:
        meta = file.metadata()
        dtypes = {file.get_tensor(key).dtype for key in file.keys()}
        assert all(bool(file.get_tensor(key).isfinite().all()) for key in file.keys())
    assert torch.float16 in dtypes and not {dtype for dtype in dtypes if dtype.is_floating_point} - {torch.float16}
    assert path.parent.parent.name in meta["lesson"]
    config = json.loads(meta["config"])
    assert config and all(isinstance(section, dict) for section in config.values())
    assert set(config) <= set(yaml.safe_load(text(folder, "config.yaml")))


def test_samples_at_once_from_the_published_weights(folder, tmp_path, capsys):
    """As right after a clone: no runs; the network is rebuilt from the file, and every weight fits."""
    before = snapshot(folder)
    x = load(folder, "sample").main([*LOCAL, f"runs={tmp_path}", "n=4", "steps=3"])
    assert "published weights" in capsys.readouterr().out
    assert x.shape == (4, 1, 28, 28) and x.isfinite().all() and x.std() > 0.05
    assert [path.name for path in tmp_path.rglob("*.png")] == ["samples.png"]
    assert snapshot(folder) == before


# ------------------------------------------------------------------ README.md
def test_an_image_has_its_own_noise(folder, entry, tmp_path):
    """Image 3 of a seed is the same for any n and batch: its start, and every noise on its way.

    Equal in the mean: rounding differs with the batch, and a step from pure noise can make it 160 times as large.
    What looks at a whole batch keeps only the noise: the steps of dopri5 in lessons 07, 21 and 39, and lesson 07's
    corrections, whose size is a mean over the batch.
    """
    def draw(n, batch, seed=0):
        return load(folder, "sample").main([*LOCAL, f"runs={tmp_path}", "weights=published", f"n={n}", f"batch={batch}",
                                            f"seed={seed}", *NOISY.get(entry["number"], ["steps=10"])])

    few, more, others = draw(4, 3), draw(5, 5), draw(4, 3, seed=1)
    gap = lambda a, b: float((a - b).abs().mean())
    assert max(map(gap, few, more)) < 1e-4
    assert min(itertools.starmap(gap, [*itertools.combinations(more, 2), *zip(few, others)])) > 1e-2, "two are alike"


def test_headings(folder, entry):
    page = re.sub(r"^(```|~~~).*?^\1", "", text(folder, "README.md"), flags=re.S | re.M)
    found, parent = re.findall(r"^## +(.+?) *$", page, flags=re.M), (entry["parents"] or [None])[0]
    order = [f"{name} {parent}" if "new since" in name else name
             for name in HEADINGS if parent or "new since" not in name]
    assert len(found) == len(order) and all(re.match(rf"{re.escape(name)}(?!\w)", title)
                                            for title, name in zip(found, order)), found
    assert len(re.findall(r"^# ", page, flags=re.M)) == 1


def test_pictures_come_from_results(folder):
    """That they exist, as all links must, and what else a page must hold to: test_tools_pages.py."""
    found = [attributes["src"] for _, attributes in pages.page_of(text(folder, "README.md")).pictures]
    badge = "https://colab.research.google.com/assets/colab-badge"
    assert found and [name for name in found if not re.match(rf"results/[^/]+$|{badge}", name)] == []


def test_readme_is_finished(folder):
    page = text(folder, "README.md")
    assert not re.search(r"@@|\bTODO\b|\bTBD\b|\bXXX\b", page), "a placeholder is left"
    lesson = folder.relative_to(ROOT).as_posix()
    assert f"colab.research.google.com/github/{frontpage.REPOSITORY}/blob/main/{lesson}/notebook.ipynb" in page
    assert "$" in page


# ------------------------------------------------------------------ config.yaml
def test_config_has_its_sections(folder):
    config = yaml.safe_load(text(folder, "config.yaml"))
    assert {"train", "sample", "reproduce", "gpu", "smoke"} <= set(config)
    assert set(config) - {*SCRIPTS, *OVERLAYS}, "no section for a network"
    assert {"n", "steps", "weights", "out", "gif", "npz", "metrics"} <= set(config["sample"])
    for overlay in set(OVERLAYS) & set(config):
        for section, keys in config[overlay].items():
            assert set(keys) <= set(config[section]), f"{overlay}: {section} has no such key"


def test_every_key_has_a_comment(folder):
    section, bare = None, []
    for line in text(folder, "config.yaml").splitlines():
        if match := re.match(r"(\w+):", line):
            section = match[1]
        elif (match := re.match(r"  (\w+):", line)) and section not in OVERLAYS and not re.search(r" # *\S", line):
            bare.append(f"{section}.{match[1]}")
    assert bare == []


# ------------------------------------------------------------------ scripts
@pytest.mark.parametrize("name", LINES)
def test_length(folder, name):
    assert len(text(folder, name).splitlines()) <= LINES[name]


def test_new_lines_of_code(folder, entry):
    """What the paper adds can be read in one sitting; where it is more, the register says why."""
    new = lineage.new_lines(house(), entry["folder"])
    assert 0 < new <= NEW_LINES or len(entry.get("over", "").split()) > 3, f"{new} new lines of code in model.py"
    assert new > NEW_LINES or "over" not in entry, f"{new} new lines: lessons.yaml needs no `over`"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(folder, script, capsys):
    with pytest.raises(SystemExit) as stop:
        load(folder, script).main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    config = yaml.safe_load(text(folder, "config.yaml"))
    for key in [*config[script], "seed", "device", "threads", "publish"]:
        assert re.search(rf"^  {key}=.* \S", out, flags=re.M), f"--help does not explain {key}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_key(folder, script, tmp_path, capsys):
    module = load(folder, script)
    with pytest.raises(UserError, match="no_such_key"):
        module.main(["no_such_key=1", f"runs={tmp_path}"])
    with pytest.raises(UserError, match="seed"):
        module.main(["sead=1", f"runs={tmp_path}"])
    with pytest.raises(UserError, match="seed takes a whole number"):
        module.main(["seed=soon", f"runs={tmp_path}"])
    with pytest.raises(SystemExit) as stop:            # as the last lines of every script have it
        module.cli(lambda: module.main(["no_such_key=1", f"runs={tmp_path}"]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.fullmatch(r"error: .*no_such_key.*\n", error) and module.cli is cli
    assert text(folder, f"{script}.py").endswith('\n\n\nif __name__ == "__main__":\n    cli(main)\n')
    assert list(tmp_path.iterdir()) == []              # refused before a run began


def test_sampling_does_not_import_the_training(folder):
    assert "train" not in imported(tree(folder, "sample.py"))


def test_reproduce_uses_the_claim_of_utils(folder):
    """One shape for all: what `Claim` does is not written again."""
    module = tree(folder, "reproduce.py")
    calls = {ast.unparse(node.func).rpartition(".")[2] for node in ast.walk(module) if isinstance(node, ast.Call)}
    assert "Claim" in calls and calls & {"judge", "exact"} and "finish" in calls
    own = {node.name for node in ast.walk(module) if isinstance(node, ast.FunctionDef)}
    assert own & {"verdict", "save_json", "deviation", "pooled", "train_arm", "published"} == set()


def imported(module):
    """The modules that a syntax tree imports."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("name", SOURCES)
def test_docstrings(folder, name):
    assert ast.get_docstring(tree(folder, name)), f"{name} has no docstring"
    assert name != "model.py" or undocumented(tree(folder, name), methods=True) == []


ADDRESS = re.compile(r"\b(Eqs?\.|Algs?\.|Algorithm|Secs?\.|Section|App\.|Appendix|Tables?|Figs?\.|Figure|Theorem|"
                     r"Prop\.|Proposition|Lemma|Corollary|Techniques?)\s+\(?([A-Z]?[.-]?\d|[A-Z]\b|[IVX]+\b)")
NAMED = re.compile(r"(\b[A-Z][\w-]*|\bet al\.|\(\d{4}\)),\s*$")           # DDPM, Eq. (4); Ho et al. (2020), Sec. 2
OFFICIAL = re.compile(r"\bofficial code:\s+[A-Za-z_]\w+")                  # a class or function that no paper describes


def without_address(module, named):
    """Public definitions whose docstring gives no address in a paper.

    named: for a lesson without a paper. An address stands behind the name of a paper, or is a name in official code.
    """
    def has(doc):
        if named and OFFICIAL.search(doc):
            return True
        return any(not named or NAMED.search(doc[:match.start()]) for match in ADDRESS.finditer(doc))

    return [name for name, node in public(module, methods=True) if not has(ast.get_docstring(node) or "")]


def test_every_definition_has_its_address(folder, entry):
    """In the lesson's paper, or behind the name of another one; a lesson without a paper names one, or the code."""
    assert without_address(tree(folder, "model.py"), named=entry["paper"] is None) == []


@pytest.mark.parametrize("doc, plain, named", [
    ("The forward process, Eq. (4).", True, False), ("Eqs. (6) and (7).", True, False), ("Alg. 2.", True, False),
    ("Sec. 3.2 and\n    App. B.", True, False), ("Table 1.", True, False), ("Technique 3.", True, False),
    ("One step (DDPM, Eq. (4)).", True, True), ("As in Ho et al. (2020),\n    Sec. 2.", True, True),
    ("As there (official code: time_shift).", False, True), ("As in the official code.", False, False),
    ("The equation of the paper.", False, False), ("Eq. of the section.", False, False), ("Fig., above", False, False),
])
def test_what_an_address_is(doc, plain, named):
    module = ast.parse(f"def f():\n    \"\"\"{doc}\"\"\"\ndef _g(): pass\nclass _C:\n    def m(self): pass\n")
    assert without_address(module, False) == ([] if plain else ["f"])
    assert without_address(module, True) == ([] if named else ["f"])


def not_met(module, met=()):
    """["line: name"] of what a reader of a model.py meets before it is defined. met: methods of earlier.py.

    Names of the file, and methods of another class of the file. A class is read as a whole: `self.x` may stand above
    `def x`. Two definitions that need each other have no order. A name that is local there is another one.
    """
    uses, place = [], {name: -1 for name in met}
    for i, node in enumerate(module.body):
        parts, definition = list(ast.walk(node)), isinstance(node, ast.FunctionDef | ast.ClassDef)
        stored = {part.id for part in parts if isinstance(part, ast.Name) and not isinstance(part.ctx, ast.Load)}
        local = {part.arg for part in parts if isinstance(part, ast.arg)} | (stored if definition else set())
        methods = {part.name for part in parts if isinstance(part, ast.FunctionDef) and part is not node}
        for name in {node.name, *methods} if definition else stored:
            place.setdefault(name, i)
        uses.append({(part.id if isinstance(part, ast.Name) else part.attr): part.lineno for part in parts
                     if isinstance(part, ast.Name) and part.id not in local
                     or isinstance(part, ast.Attribute) and not ast.unparse(part.value).startswith(("self", "super"))})
    return [f"{line}: {name}" for i, seen in enumerate(uses) for name, line in seen.items()
            if (j := place.get(name, -1)) > i and not any(place.get(back) == i for back in uses[j])]


def test_a_name_is_used_after_the_reader_has_met_it(folder):
    earlier = ast.parse(text(folder, "earlier.py")) if (folder / "earlier.py").exists() else ast.Module([])
    known = {node.name for node in ast.walk(earlier) if isinstance(node, ast.FunctionDef)}
    assert not_met(tree(folder, "model.py"), known) == []


@pytest.mark.parametrize("source, found", [
    ("def f(): return g()\ndef g(): pass", ["1: g"]), ("def g(): pass\ndef f(): return g()", []),
    ("class A:\n    x = [WIDTH]\nWIDTH = 3", ["2: WIDTH"]), ("def f(x: Net): pass\nclass Net: pass", ["1: Net"]),
    ("def f(net): return net.body(0)\nclass Net:\n    def body(self, x): pass", ["1: body"]),
    ("class Net:\n    def __init__(self): self.body()\n    def body(self): super().body()", []),
    ("def f(n): return g(n - 1)\ndef g(n): return f(n - 1)", []), ("def f(g): return g()\ndef g(): pass", []),
    ("def f():\n    \"\"\"What g is for.\"\"\"\ndef g(): pass", []), ("def f(x): return x.known()\nknown = 3", []),
])
def test_what_is_not_met(source, found):
    assert not_met(ast.parse(source), {"known"}) == found


def public(module, methods=False):
    """(name, node) of the public functions, classes and, if asked for, methods; forward() is told by its class."""
    definitions = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    found = [(node.name, node) for node in module.body if isinstance(node, definitions)]
    if methods:
        found += [(f"{name}.{node.name}", node) for name, owner in list(found) if isinstance(owner, ast.ClassDef)
                  for node in owner.body if isinstance(node, definitions) and node.name != "forward"]
    return [(name, node) for name, node in found if not re.search(r"(^|\.)_", name)]


def undocumented(module, methods=False):
    """Public functions and classes of a syntax tree without a docstring."""
    return [name for name, node in public(module, methods) if not ast.get_docstring(node)]


@pytest.mark.parametrize("path", sorted((ROOT / "utils").glob("*.py")), ids=lambda path: path.name)
def test_docstrings_of_utils(path):
    module = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(module) and undocumented(module) == []


def test_convention_box(folder):
    assert "Convention" in (ast.get_docstring(tree(folder, "model.py")) or "")
    assert "Convention" in text(folder, "README.md")


PLACE = re.compile(r"""(?<![\w.:/~])/(home|root|Users|work|tmp|mnt|data|opt|usr|var|content|workspace)(?=[/\s"')])"""
                   r"|\b[A-Z]:\\\\?\w")


def test_no_path_of_a_machine(folder):
    files = [folder / name for name in (*SOURCES, "config.yaml", "README.md")] + sorted(folder.glob("results/*.json"))
    found = [f"{path.name}: {match[0]}" for path in files if path.is_file()
             for match in PLACE.finditer(path.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize("name", SOURCES)
def test_no_device_is_hard_coded(folder, name):
    for node in ast.walk(tree(folder, name)):
        assert not (isinstance(node, ast.Constant) and isinstance(node.value, str)
                    and re.fullmatch(r"(cuda|mps)(:\d+)?", node.value)), f"{name}:{node.lineno}: {node.value}"
        assert not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                    and node.func.attr == "cuda"), f"{name}:{node.lineno}: .cuda("


def test_training_never_leaves_training_mode(folder):
    for node in ast.walk(tree(folder, "train.py")):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            off = node.func.attr == "train" and [getattr(a, "value", None) for a in node.args] == [False]
            assert node.func.attr != "eval" and not off, f"train.py:{node.lineno}: sample with ema.module instead"


# ------------------------------------------------------------------ networks
NARROW = {"UNet": ("channels", (1, 2, 3, 7), {"groups": 1}), "DiT": ("dim", (2, 6, 9), {"heads": 1}),
          "MMDiT": ("dim", (2, 6, 9), {"heads": 1}),
          "Flux": ("frequencies", (1, 7), {"dim": 16, "heads": 2, "axes": (4, 2, 2)})}


def test_a_width_that_the_embeddings_cannot_hold_is_said_at_once(folder):
    """Else it is NaN, or an error of shapes in the first step."""
    model = load(folder, "model")
    for name, (key, wrong, others) in NARROW.items():
        if network := getattr(model, name, None):
            asked = inspect.signature(network).parameters.keys()
            others = others | dict.fromkeys(asked & {"vocabulary", "length"}, 9)
            others = others | dict.fromkeys(asked & {"sigmas"}, torch.ones(2))
            for width in wrong:
                with pytest.raises(ValueError, match=f"{key}={width} must be "):
                    network(**others, **{key: width})
            if name == "UNet":
                assert network(**others, channels=4).time[0].weight.shape == (16, 4)


def test_such_a_width_is_one_line_for_the_reader(launch, tmp_path):
    process = launch("lesson_05/train.py", "smoke=true", "channels=3", "groups=1", f"runs={tmp_path / 'runs'}")
    assert "channels=3 must be even and at least 4" in process.error() and not (tmp_path / "runs").exists()


def test_attention_fits_into_fp16(folder):
    """q k^T alone is 230,000 here, above the 65,504 of fp16; the scaled one is not. SDPA sees to it by itself."""
    model, x = load(folder, "model"), torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.group_norm(x, 4)           # every row: mean 0, variance 1
    told = {"CrossAttention": [x.half()], "MaskedAttention": [(x.half(), torch.ones(1, 4, dtype=torch.bool))]}
    for name, arguments in (("Attention", (64, 1)), ("CrossAttention", (64, 64, 1, 64)),
                            ("MaskedAttention", (64, 64, 1, 64))):
        if not hasattr(model, name):
            continue
        layer = getattr(model, name)(*arguments).half()
        for key, weight in layer.named_parameters():
            if key.partition(".")[0] in ("qkv", "q", "k") and weight.dim() == 2:
                weight.data.copy_(60 * torch.eye(64).repeat(len(weight) // 64, 1))
        image = name == "Attention" and hasattr(layer, "norm")                          # lesson 05's
        out = layer(x.half().mT[..., None] if image else x.half(), *told.get(name, []))
        assert out.isfinite().all(), name


# ------------------------------------------------------------------ train, sample, reproduce, in one process
def snapshot(folder):
    """What the scripts must leave alone: results/, what git sees, and the readers' own smoke runs."""
    files = [path for part in ("results", "runs/smoke") for path in sorted((folder / part).rglob("*"))]
    seen = {path: hashlib.md5(path.read_bytes()).hexdigest() for path in files if path.is_file()}
    checkout = (ROOT / ".git").exists()
    status = git("status", "--porcelain", "--untracked-files=all", "--", str(folder)) if checkout else ""
    return seen, status


def fewer_points(reproduce):
    """Where lesson 01 looks at the exact reverse step: 8 points of the line, not 100."""
    class Few(reproduce.Mixture):
        def draw(self, n, generator):
            return super().draw(min(n, 8), generator)

    return {"Mixture": Few}


# Names of reproduce.py whose values say how much is computed and stand in no config.yaml.
SMALLER = {"01": fewer_points, "39": lambda reproduce: {"FEW": (8, 16)}}


@pytest.fixture(scope="module")
def chain(folder, entry, tmp_path_factory):
    """train -> sample -> reproduce in smoke size, one after the other, into a folder of their own.

    Solvers with a step size of their own take large steps, for what they reach is tested in the lessons they are of.
    """
    runs, before = tmp_path_factory.mktemp("runs"), snapshot(folder)
    keys = ["smoke=true", *LOCAL, f"runs={runs}"]
    calls, drawn, write, solver, patch = [], set(), images._write, Adaptive.__init__, pytest.MonkeyPatch()
    hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda net, _: note(net))

    def note(net):                                     # a network that learns is called: is all of it in training mode?
        if torch.is_grad_enabled() and any(p.requires_grad for p in net.parameters()):
            calls.append((net, all(part.training for part in net.modules())))

    def once(path, save):                              # an arm's pictures are those that train.py has drawn
        if path.name not in drawn:
            write(path, save)
        return drawn.add(path.name) or path

    patch.setattr(images, "_write", once)
    patch.setattr(Adaptive, "__init__", lambda self, **how: solver(self, **{**how, "rtol": 1.0, "atol": 1.0}))
    reproduce = load(folder, "reproduce")
    for name, value in SMALLER.get(entry["number"], lambda _: {})(reproduce).items():
        patch.setattr(reproduce, name, value)
    try:
        trained = load(folder, "train").main(keys)
        hook.remove()
        sampled = load(folder, "sample").main([*keys, "n=100", "out=mine.png", "gif=way.gif", "npz=array.npz",
                                               "metrics=true"])
        claim = reproduce.main(keys)
    finally:
        hook.remove()
        patch.undo()
    return SimpleNamespace(runs=runs / "smoke", trained=trained, sampled=sampled, claim=claim, calls=calls,
                           untouched=snapshot(folder) == before)


def test_training_returns_and_writes(chain, folder):
    result, config = chain.trained, yaml.safe_load(text(folder, "config.yaml"))
    steps = config["smoke"]["train"]["steps"]
    assert result.steps == steps and result.parameters > 0
    assert math.isfinite(result.loss) and result.images_per_second > 0 and result.peak_memory_mb > 0
    assert result.weights == chain.runs / "001" / "weights.safetensors"
    written = {path.name for path in result.weights.parent.iterdir()}
    assert {"weights.safetensors", "metrics.jsonl", "loss.png", "results.json", "run.json"} <= written
    lines = [json.loads(line) for line in (result.weights.parent / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == steps and all(math.isfinite(value) for line in lines for value in line.values())
    every = (config["train"] | config["smoke"]["train"])["preview_every"]
    assert 0 < every < steps, "the smoke overlay must draw a preview before the last step"
    assert len([name for name in written if name.startswith("preview_")]) >= steps // every


def test_network_learns_in_training_mode_at_every_step(chain):
    """Sampling a preview must not leave the network in evaluation mode: dropout would stay off."""
    assert chain.calls, "no network was called with gradients"
    net = type(chain.calls[0][0])                      # two trainings in a row have two of them
    assert len([one for one, _ in chain.calls if type(one) is net]) >= chain.trained.steps
    assert sorted({type(one).__name__ for one, training in chain.calls if not training}) == []


def test_sampling_returns_and_writes(chain):
    x, run = chain.sampled, chain.runs / "001"         # beside the weights that it used
    assert torch.is_tensor(x) and x.shape == (100, 1, 28, 28) and x.isfinite().all() and not x.requires_grad
    written = {path.name for path in run.iterdir()}
    assert {"mine.png", "way.gif", "array.npz", "results.json"} <= written and "samples.png" not in written
    array = np.load(run / "array.npz")["arr_0"]
    assert array.dtype == np.uint8 and array.shape == (100, 28, 28, 1)
    assert np.abs(array[..., 0] - ((x[:, 0].float().cpu().clamp(-1, 1) + 1) * 127.5).numpy()).max() <= 0.51
    with Image.open(run / "way.gif") as way:
        assert way.n_frames > 1
    results = json.loads((run / "results.json").read_text())
    scored = [one for name, one in results.items() if name.startswith("sample")]
    assert len(scored) == 1 and scored[0]["n"] == 100 and scored[0]["fid"] > scored[0]["fid_floor"] > 0
    assert all(0 <= scored[0][key] <= 1 for key in ("precision", "recall", "confidence"))      # none is written over
    for one in (results["train"], *scored):
        assert {"command", "seed", "device", "torch", "code"} <= set(one)
        assert str(chain.runs.parent) not in json.dumps(one), "the command tells a path of this machine"


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder of three class folders with colour images."""
    place = tmp_path_factory.mktemp("shapes")
    for c, name in enumerate(("circle", "square", "star")):
        (place / name).mkdir()
        for k in range(40):
            Image.new("RGB", (30, 24), (80 * c, 6 * k, 200)).save(place / name / f"{k}.png")
    return place


def test_own_images(folder, shapes, tmp_path):
    """data=FOLDER trains and draws in the network's size, in colour where it can, or is refused in one line."""
    config = yaml.safe_load(text(folder, "config.yaml"))
    places = {key: name for name, keys in config.items() if name not in (*SCRIPTS, *OVERLAYS) for key in keys}
    if "image_size" not in places and "shape" not in places:
        with pytest.raises(UserError, match=f"data={shapes}: the captions of this lesson name digits"):
            load(folder, "train").main([*LOCAL, "smoke=true", f"data={shapes}", f"runs={tmp_path}"])
        assert not list(tmp_path.iterdir())
        return
    shape = (3 if "image_channels" in places or "image_size" not in places else 1, 20, 20)
    keys = [f"image_size={shape[1]}"] if "image_size" in places else [f"digits.shape={list(shape)}"]
    keys += ["image_channels=3"] * (shape[0] == 3 and "image_channels" in places)
    keys += ["start="] * ("start" in config["train"]) + ["c_out=6"] * ("c_out" in places)
    keys += ["dit.patch=4"] * ("dit" in config)        # that of the smoke overlay does not divide 20
    common = [*LOCAL, "smoke=true", f"runs={tmp_path}"]
    trained = load(folder, "train").main([*common, *keys, f"data={shapes}", "steps=3", "preview_every=2"])
    weights = Weights(trained.weights, lesson_name(folder))
    assert weights.data.name == f"{shapes.name}/" and weights.data.classes == ["circle", "square", "star"]
    assert tuple(weights.data.shape) == shape and 0 < weights.data.images <= 108
    assert all(getattr(section, "classes", 3) == 3 for section in weights.config.values())
    x = load(folder, "sample").main([*common, "n=2", "gif=way.gif"])
    assert x.shape == (2, *shape) and x.isfinite().all()


def test_reproduce_returns_and_writes(chain, folder):
    written = {path.name: path for path in chain.runs.rglob("claim.*")}
    assert {"claim.json", "claim.png"} <= set(written)
    claims = json.loads(written["claim.json"].read_text())["claims"]
    assert list(chain.claim["claims"]) == list(claims)
    assert {one["verdict"] for one in claims.values()} <= {NO_VERDICT, "exact", "not exact"}, "a smoke run judges"
    published = json.loads(text(folder, "results/claim.json"))["claims"]
    assert {letter: one["sentence"] for letter, one in claims.items()} == {
        letter: one["sentence"] for letter, one in published.items()}, "results/claim.json tells of other claims"


def test_results_and_checkout_stay_as_they_were(chain):
    assert chain.untouched
