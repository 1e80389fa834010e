"""`Claim`: what a reproduce.py measures, judges, prints and writes. One sentence, one criterion, one verdict.

    claim = Claim(__file__, argv, sections=("flow", "unet"))
    rows = claim.arms(ARMS, train=train.main, load=load, measure=measure)
    claim.judge("a", "The straight path needs at most 0.8 of the calls of score matching",
                paper="142 against 242 (Table 1)", holds=rows.below("OT", "SM", "calls", factor=0.8))
    return claim.finish(plot=plot)

What runs in parallel processes (train, load, measure, the functions of `each`) stands at the top level of a file.
"""

import ast
import functools
import hashlib
import itertools
import json
import math
import re
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from .config import Section
from .errors import Diverged, UserError
from .files import read_json, update_json, write_json
from .parallel import Workers
from .run import Run, trained
from .seeds import generators
from .syntax import KINDS, dump

RULE = '"below" and "above": in every seed, and p < 0.05 in a two-sided paired t-test over the seeds'
ALWAYS = ("train", "gpu", "device", "smoke")           # what the arms take from the command line of reproduce.py


class Claim:
    """One call of a lesson's reproduce.py: `.run`, its section of the configuration `.cfg`, and the `.seeds`.

    What was found stands in `.rows`, `.claims` and `.notes`. file, argv: as for `Run`. sections: those of config.yaml
    whose keys on the command line (unet.channels=48) also go to the arms.
    """

    def __init__(self, file, argv=None, sections=()):
        _only_mnist(sys.argv[1:] if argv is None else argv)
        self.run, self.file, self.sections = Run(file, argv), str(file), tuple(sections)
        _only_mnist([f"data={getattr(self.run.config.train, 'data', 'mnist')}"])           # config.yaml may say it, too
        self.run.check_given(("train", *self.sections))
        self.cfg, self.seeds = self.run.settings, range(self.run.settings.seeds)
        self.cfg.publish = self.cfg.publish and not (self.cfg.quick or self.cfg.smoke)
        self.run.open_folder("claim")
        self.rows, self.claims, self.notes = Rows(), {}, {}
        self._start, self._tables, self._trained = time.perf_counter(), [], []
        self._workers = Workers(self.cfg.workers)

    # ------------------------------------------------------------------ measuring
    def train(self, arms, train, keys=(), seeds=None):
        """Train every arm with every seed, or take it from an earlier call: {(arm, seed): weights file}.

        arms: {name: keys of train.py, or an `Arm`}. keys: for all arms. seeds: the claim's, if not given.
        The file of an arm whose loss ran away is None.
        """
        return {job: path for job, path, _ in self._arms(arms, train, keys, seeds, None, None)}

    def arms(self, arms, train, measure, load=None, keys=(), seeds=None):
        """`train`, and a row of numbers for every arm and seed; an arm whose loss ran away has infinity everywhere.

        measure(run, weights, arm=name, seed=seed) -> {name: number}, where weights is a `Weights`, or, with
        load(run, weights) -> process, net: measure(run, process, net, arm=name, seed=seed). The classes that an `Arm`
        puts in are handed to load by their names: load(run, weights, DDPM=BoundDDPM).
        """
        rows = Rows(axes=("arm", "seed"))
        for (arm, seed), path, found in self._arms(arms, train, keys, seeds, load, measure):
            rows.append({"arm": arm, "seed": seed, **({"diverged": True} if path is None else found)})
            self.run.say(rows.line(rows[-1]))
        for row in rows:
            if row.get("diverged"):
                row.update({key: _infinite(value) for other in rows for key, value in other.items() if key not in row})
        return self._keep(rows)

    def _arms(self, arms, train, keys, seeds, load, measure):
        """Yield ((name, seed), weights file, numbers)."""
        jobs = [(name, seed) for seed in (self.seeds if seeds is None else seeds) for name in arms]
        given = [(self.file, self.run.argv, self.sections, train, name, arms[name], seed, list(keys), load, measure)
                 for name, seed in jobs]
        for job, (path, found) in zip(jobs, self._workers.run(_one_arm, given)):
            self._trained += [path] * bool(path)
            yield job, path, found

    def each(self, function, jobs=None, keys=(), **axes):
        """A row for every combination of the axes: function(run, **combination) -> {name: number}, in parallel.

        each(fid, sampler=["Euler", "Heun"], steps=[18, 35], seed=claim.seeds) calls fid(run, sampler=, steps=, seed=).
        jobs: a list of combinations, each of which the axes multiply. keys: laid over the command line for these.
        """
        axes = {name: [one] if isinstance(one, (str, int, float)) else list(one) for name, one in axes.items()}
        jobs = [{**job, **dict(zip(axes, values))} for job in ([{}] if jobs is None else jobs)
                for values in itertools.product(*axes.values())]
        given = [(self.file, [*self.run.argv, *keys], function, job) for job in jobs]
        rows = Rows(axes=dict.fromkeys(name for job in jobs for name in job))
        for job, found in zip(jobs, self._workers.run(_one_job, given)):
            rows.append({**job, **found})
            self.run.say(rows.line(rows[-1]))
        return self._keep(rows)

    def _keep(self, rows):
        self._tables.append(rows)
        self.rows += rows
        return rows

    # ------------------------------------------------------------------ judging
    def judge(self, letter, sentence, holds, paper="", rule=RULE, **numbers):
        """The verdict of one sentence. holds: its criterion. paper: what it reports. numbers: what decided."""
        self._add(letter, sentence, paper, rule, verdict(holds, self.cfg), holds, numbers)

    def exact(self, letter, sentence, holds, paper="", **numbers):
        """The same for an identity or a closed form, which is computed and not drawn."""
        self._add(letter, sentence, paper, "computed, not drawn", "exact" if holds else "not exact", holds, numbers)

    def _add(self, letter, sentence, paper, rule, verdict, holds, numbers):
        if letter in self.claims:
            raise ValueError(f"there are two claims ({letter})")
        self.claims[letter] = {"sentence": sentence, "paper": paper, "rule": rule, "verdict": verdict,
                               "holds": bool(holds), **numbers}

    def note(self, name, value):
        """Keep what is measured without a verdict."""
        self.notes[name] = value

    # ------------------------------------------------------------------ the end
    def finish(self, plot=None, headline="", **record):
        """Print the table; write claim.json, claim.png by plot(claim, path), and the entry of results.json.

        headline: the lesson's result in a phrase, for the front page. record: further numbers of the entry.
        Returns the content of claim.json.
        """
        self._workers.close()
        content = plain({
            "claims": self.claims, "notes": self.notes, "rows": self.rows, "seeds": len(self.seeds),
            "settings": {k: v for k, v in vars(self.cfg).items() if k not in ("runs", "publish", "workers", "quick")},
            "training_minutes": round(sum(map(_minutes, self._trained)), 1),
            "minutes": round((time.perf_counter() - self._start) / 60, 1)})
        self.run.say(self.text())
        self.run.output(save_json, content, "claim.json")
        if plot:
            self.run.output(plot, self, "claim.png")
        self.run.record("claim", minutes=content["minutes"], verdicts={
            letter: one["verdict"] for letter, one in self.claims.items()}, **plain(record))
        if headline and self.cfg.publish and self.run.compute.type == "cpu":
            with update_json(self.run.lesson / "results" / "results.json") as results:
                results["headline"] = headline
        return content

    def text(self):
        """The means with their deviations over the seeds, then the claims with their verdicts."""
        lines = [line for rows in self._tables for line in ("", *rows.table())] + [""]
        for letter, one in self.claims.items():
            lines.append(f"({letter}) {one['verdict']}: {one['sentence']}")
            lines += [f"    the paper: {one['paper']}"] if one["paper"] else []
        return "\n".join(lines)


class Arm:
    """An arm that needs other classes than the lesson's: Arm(["lr=1e-3"], DDPM=BoundDDPM).

    keys: of train.py. names: what train.py's names stand for while it trains; classes or functions at the top level of
    a file, or a functools.partial of one.
    """

    def __init__(self, keys=(), **names):
        self.keys, self.names = list(keys), names


class Rows(list):
    """What was measured: dicts of axes (arm, seed, steps, ...) and numbers."""

    def __init__(self, rows=(), axes=()):
        super().__init__(rows)
        self.axes = tuple(axes)

    def where(self, **axes):
        """The rows with these values."""
        return Rows((row for row in self if all(row.get(k) == v for k, v in axes.items())), self.axes)

    def values(self, key, **axes):
        """The numbers called `key` of the rows with these axes, one a seed, in the order of the seeds."""
        return [value for _, value in self._by_seed(key, axes)]

    def _by_seed(self, key, axes):
        rows = [row for row in self.where(**axes) if key in row or row.get("diverged")]
        if not rows:
            raise KeyError(f"no row has {key} with {axes}")
        found = sorted(((row.get("seed", 0), math.inf if row.get(key) is None else row[key]) for row in rows),
                       key=lambda one: one[0])
        if len(dict(found)) < len(found):
            raise ValueError(f"{axes} leaves several rows a seed: name one more axis")
        return found

    def by(self, axis, key, **axes):
        """{value of the axis: `values`}."""
        found = dict.fromkeys(row[axis] for row in self.where(**axes) if axis in row and key in row)
        return {value: self.values(key, **axes, **{axis: value}) for value in found}

    def unfold(self, key, axis):
        """A number for each entry of a table: {"fid": {"160": 9.1, "320": 4.2}} makes two rows, 160 and 320."""
        return Rows(({**{k: v for k, v in row.items() if not isinstance(v, dict)}, axis: _number(name), key: value}
                     for row in self for name, value in row.get(key, {}).items()), (*self.axes, axis))

    def mean(self, key, **axes):
        """The mean over the seeds."""
        return statistics.mean(self.values(key, **axes))

    def below(self, a, b, key, factor=1.0, by="arm", **axes):
        """`below` for the rows where `by` is a and those where it is b, with the same seeds."""
        return below(*self._pair(a, b, key, by, axes), factor)

    def above(self, a, b, key, factor=1.0, by="arm", **axes):
        """`above` for the rows where `by` is a and those where it is b, with the same seeds."""
        return above(*self._pair(a, b, key, by, axes), factor)

    def _pair(self, a, b, key, by, axes):
        of_a, of_b = (dict(self._by_seed(key, {**axes, by: one})) for one in (a, b))
        if list(of_a) != list(of_b):
            raise ValueError(f"{a} has the seeds {list(of_a)}, {b} has {list(of_b)}")
        return list(of_a.values()), list(of_b.values())

    def line(self, row):
        """One row as text: axes, then numbers."""
        axes = [f"{k} {v}" if isinstance(v, (int, float)) else str(v) for k, v in row.items()
                if k in self.axes and v is not None]
        return f"{', '.join(axes):32} " + "   ".join(
            f"{k} " + (f"{v:.5g}" if _is_number(v) else ", ".join(f"{x}: {y:.4g}" for x, y in v.items()))
            for k, v in row.items() if k not in self.axes
            and (_is_number(v) or isinstance(v, dict) and v and all(map(_is_number, v.values()))))

    def table(self):
        """A line for every combination of axes: the means over the seeds with their deviations."""
        groups = {}
        for row in self:
            groups.setdefault(tuple((k, row.get(k)) for k in self.axes if k != "seed"), []).append(row)
        lines = {self.line(dict(axes)): "   ".join(
            f"{key} {mean_std([row[key] for row in rows if _is_number(row.get(key))])}"
            for key, value in rows[0].items() if key not in self.axes and _is_number(value))
            for axes, rows in groups.items()}
        return [name + numbers for name, numbers in lines.items() if numbers]


def _only_mnist(argv):
    for argument in argv:
        if re.fullmatch("-*(train[.])?data=(?!mnist$).*", argument):
            raise UserError(f"{argument}: what reproduce.py judges are claims about MNIST; train.py and sample.py take "
                            "other images")


# ------------------------------------------------------------------ verdicts and statistics
def verdict(holds, cfg):
    """"reproduced" or "not reproduced at this scale"; or that there is none, of a quick look or too few seeds."""
    if cfg.quick or cfg.smoke or cfg.seeds < 3:
        return "no verdict from a quick look"
    return "reproduced" if holds else "not reproduced at this scale"


def below(a, b, factor=1.0):
    """Whether a is below factor * b in every seed, and p < 0.05 in a two-sided paired t-test over the seeds.

    a, b: a number for each seed, in the same order; a is the one that should win. Infinite or not a number means that
    an arm diverged: if a did in any seed, it has not won; else, if b did, b has lost. Fewer than 3 seeds: False.
    """
    a, b = list(a), list(b)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values against {len(b)}: not of the same seeds")
    if len(a) < 3 or not all(map(math.isfinite, a)):
        return False
    gaps = [x - factor * y for x, y in zip(a, b) if math.isfinite(y)]
    return all(gap < 0 for gap in gaps) and (len(gaps) < len(a) or p_value(gaps) < 0.05)


def above(a, b, factor=1.0):
    """Whether a is above factor * b: `below` upside down. Here too a should win, and an arm that diverged has lost."""
    return below([-x for x in a], [-y for y in b], factor)


def p_value(gaps):
    """p of a two-sided t-test that paired differences have mean 0."""
    from scipy.stats import ttest_1samp

    size = max(map(abs, gaps))
    if max(gaps) - min(gaps) <= 1e-9 * size:           # all alike: t is infinite, or 0 / 0
        return 0.0 if size else 1.0
    return float(ttest_1samp(gaps, 0.0).pvalue)


def deviation(values):
    """Standard deviation over the seeds; 0 for a single one, infinite if an arm diverged."""
    if not all(map(math.isfinite, values)):
        return math.inf
    return statistics.stdev(values) if len(values) > 1 else 0.0


def pooled(*arms):
    """The pooled standard deviation of arms of values: the root of the mean of their variances."""
    return math.sqrt(statistics.mean(deviation(arm) ** 2 for arm in arms))


def mean_std(values, digits=None):
    """"1.234 +- 0.056" over the seeds, with this many digits after the point; of a single value the value."""
    numbers = [statistics.mean(values)] + [deviation(values)] * (len(values) > 1)
    return " +- ".join(f"{x:.{4 - 2 * i}g}" if digits is None else f"{x:.{digits}f}" for i, x in enumerate(numbers))


def seeded(seed, n=None):
    """A CPU generator of random numbers: the same noise on every device. n: a list of one for each of n images."""
    return torch.Generator().manual_seed(seed) if n is None else generators(seed, n)


# ------------------------------------------------------------------ in a process of its own
def job_run(file, argv):
    """The `Run` of one job of a claim: the claim's folder, and nothing is published from here."""
    run = Run(file, argv)
    run.settings.publish = False
    run.open_folder("claim")
    return run


def _one_job(file, argv, function, job):
    return function(job_run(file, argv), **job)


def _one_arm(file, argv, sections, train, name, arm, seed, keys, load, measure):
    """Weights file and numbers of one arm; None, None if its loss or its samples ran away."""
    run = job_run(file, argv)
    arm = arm if isinstance(arm, Arm) else Arm(arm)
    folder = run.folder / (folder_name(name, seed) + mark(file, arm))
    try:
        path = trained(functools.partial(_train, train, arm.names), folder, [
            *own(argv, sections), "preview_every=0", f"seed={seed}", *keys, *arm.keys], run.lesson)
        if measure is None:
            return path, None
        weights = run.read(path)
        parts = load(run, weights, **arm.names) if load else weights
        return path, measure(run, *(parts if isinstance(parts, tuple) else (parts,)), arm=name, seed=seed)
    except Diverged:                                   # its loss, or its samples
        return None, None


def _train(train, names, argv):
    """train(argv), while these names of its file stand for something else."""
    file = getattr(train, "func", train).__globals__
    before = {name: file[name] for name in names}      # a name that train.py does not use is a mistake: KeyError
    try:
        file.update(names)
        return train(argv)
    finally:
        file.update(before)


def own(argv, sections=()):
    """Those arguments of reproduce.py that also go to train.py: of these sections, and the device and the overlays.

    The GPU's overlay is for a reader's training, not for an arm: it is laid only where the command line asks for it.
    """
    taken = [a for a in argv if re.split("[.=]", a.lstrip("-"))[0] in (*sections, *ALWAYS)]
    return taken if any(re.match("-*gpu(=|$)", a) for a in taken) else ["gpu=false", *taken]


def folder_name(arm, seed):
    """Where an arm is trained, in the claim's folder."""
    return f"{re.sub('[^A-Za-z0-9.+-]+', '_', str(arm)).strip('_')}_{seed}"


def arm_weights(run, arm, seed=0):
    """The `Weights` of an arm that was trained in this call or an earlier one."""
    name = folder_name(arm, seed)
    found = [*run.folder.glob(f"{name}/**/weights.safetensors"), *run.folder.glob(f"{name}@*/**/weights.safetensors")]
    if not found:
        raise UserError(f"there are no weights of {arm}, seed {seed}, in {run.folder}: train that arm first")
    return run.read(max(found, key=lambda path: path.stat().st_mtime))


def published(run, arm, seed=0):
    """The `Weights` that the lesson published; in smoke mode, or where there are none, those of an arm."""
    if run.settings.smoke or not run.published.exists():
        return arm_weights(run, arm, seed)
    return run.read(run.published)


def mark(file, arm):
    """"" or a hash of what an arm puts in, with all that it needs from `file`: after a change it is trained anew."""
    if not arm.names:
        return ""
    text, found, top = _described(arm.names), {}, {}
    for node in ast.parse(Path(file).read_text(encoding="utf-8")).body:
        names = [node.name] if isinstance(node, KINDS) else [
            n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        top.update((name, [*top.get(name, []), node]) for name in names)
    todo = re.findall(r"\w+", text)
    while todo:
        if (name := todo.pop()) in top and name not in found:
            found[name] = dump(top[name])
            todo += [n.id for node in top[name] for n in ast.walk(node) if isinstance(n, ast.Name)]
    return "@" + hashlib.sha256((text + str(sorted(found.items()))).encode()).hexdigest()[:8]


def _described(item):
    """A class, a function or a functools.partial, or a dict of them, as text without addresses."""
    if isinstance(item, dict):
        return str({name: _described(one) for name, one in item.items()})
    if isinstance(item, functools.partial):
        return f"{_described(item.func)}({', '.join(map(_described, item.args))}, {_described(item.keywords)})"
    return getattr(item, "__qualname__", repr(item))


# ------------------------------------------------------------------ claim.json
def plain(value):
    """A value as JSON can hold it: infinity and NaN become null, what holds tensors is left out."""
    if isinstance(value, (dict, Section)):
        return {str(k): plain(v) for k, v in dict(value).items() if not _has_tensor(v)}
    if isinstance(value, (list, tuple, range)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_json(claim, path):
    """Write a claim as JSON, for `run.output`. Returns the path."""
    write_json(path, plain(claim))
    return path


def saved(path):
    """A claim.json as the claim that wrote it, to be judged and drawn again: .claims, .rows, .notes, .cfg, .seeds."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    return SimpleNamespace(claims=content["claims"], rows=Rows(content["rows"]), notes=content["notes"],
                           cfg=Section(**content["settings"]), seeds=range(content["seeds"]))


def _has_tensor(value):
    if isinstance(value, (list, tuple)):
        return any(map(_has_tensor, value))
    return isinstance(value, torch.Tensor)


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(name):
    """160 for 160 and "160" (JSON makes every key a text), "ot" for "ot"."""
    try:
        return float(name) if not float(name).is_integer() else int(float(name))
    except ValueError:
        return name


def _infinite(value):
    """A measured value as an arm that diverged has it."""
    if isinstance(value, dict):
        return {key: _infinite(one) for key, one in value.items()}
    return math.inf if _is_number(value) else None


def _minutes(path):
    """How long an arm took to train, also if that was in an earlier call."""
    found = read_json(path.parent / "results.json")
    entry = found.get("train") or found.get("train_gpu")
    return entry.get("minutes", 0) if isinstance(entry, dict) else 0
