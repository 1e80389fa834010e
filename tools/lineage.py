"""Keep self-contained lessons from drifting apart, and show what each one adds.

    python -m tools.lineage check [lesson ...]     every rule below; one line for each breach
    python -m tools.lineage sync [lesson ...]      write earlier.py, rewrite copies after their origin improved, pin
                                               new adaptations, fill the table of what is new in each README
    python -m tools.lineage sync --accept lesson_09/model.py:UNet
                                               pin the changed origin of UNet, after a look at both
    python -m tools.lineage diff lesson_09     what the lesson adds to its parent (also: 09, 05a, lesson_05a)
    python -m tools.lineage tree [--mermaid]   the tree of lessons in lessons.yaml

What model.py takes from earlier lessons it imports, one line an origin:

    import earlier                                              # lesson 05: UNet
    from earlier import Attention, ResBlock, noise_like         # lesson 05

`sync` writes these definitions and all that they need into the earlier.py beside it (tools/earlier.py). A line names
the owner, the lesson in whose model.py the definition stands, and every definition has one owner. `earlier.UNet` is
for the subclass of the same name, `class UNet(earlier.UNet)`. The scripts import from model, not from earlier.

What a script, or a method of a fresh class, has from another lesson is marked in the comment right above it:

    # Copied from lesson_05/train.py: main
    # Adapted from lesson_05/model.py: UNet -- adds a class embedding (Sec. 2)

A copy equals its origin as a syntax tree, docstrings and comments aside; its origin is the first owner. An
adaptation gives its reason after `--` (a long one goes on in lines that start with `#   `), and the origin's
hash is kept in lineage.lock, so that a change there asks for a second look here. Equal definitions in two scripts
from eight lines of code on need a marker. Imports across the borders between lessons, utils and tools are an error.
"""
import argparse
import ast
import difflib
import functools
import hashlib
import itertools
import os
import re
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tools import earlier
from utils.syntax import KINDS, dump

ROOT = Path(__file__).resolve().parent.parent
FILES = ("model.py", "train.py", "sample.py", "reproduce.py")
TWIN_LINES = 8                          # equal definitions in scripts need a marker from this many lines of code on
MODEL_IMPORTS = {"torch", "einops", "numpy", "torchdiffeq", *sys.stdlib_module_names}
LOCK = "lineage.lock"                   # one line for each adaptation: "adapted <- origin hash"
START, END = "<!-- lineage:start -->", "<!-- lineage:end -->"
MARKER = re.compile(r"# (Copied|Adapted) from (lesson_\d+(?:/sublesson_[a-z])?/\w+\.py): (\w+(?:\.\w+)?)(?: -- (.+))?")
LIKE_A_MARKER = re.compile(r"#+\W*(copied|adapted)\s+from\W+lesson", re.IGNORECASE)
SYNC = "run `python -m tools.lineage sync`"


class Mistake(Exception):
    """Something that keeps a command from running: one line, exit code 2."""


# --- reading the lessons ---------------------------------------------------------------------------------------
@dataclass(eq=False)
class Definition:
    path: str                           # lesson_05/model.py
    name: str                           # UNet, or DDPM.q_sample for a method
    node: ast.AST
    lines: list                         # of the whole file
    owner: "Definition | None"          # the class of a method
    rows_of_code: dict = field(default_factory=dict)    # {row: line}: no docstrings, comments or blank lines
    kind: str = ""                      # of its marker: "Copied", "Adapted" or, without one, empty
    origin: str = ""                    # label of the definition that the marker names
    reason: str = ""
    rows: range = range(0)              # the marker's lines in the file, counted from 1

    def __post_init__(self):
        self.label, self.lesson, self.short = f"{self.path}: {self.name}", self.path.rpartition("/")[0], self.node.name
        self.first = min([self.node.lineno, *(decorator.lineno for decorator in self.node.decorator_list)])
        self.last = self.node.end_lineno
        self.code = dump(self.node)
        self.hash = hashlib.sha256(self.code.encode()).hexdigest()[:8]
        self.size = len(self.rows_of_code)


@dataclass
class House:
    root: Path
    lessons: list                       # the entries of lessons.yaml
    folders: list                       # of the lessons that exist
    defs: dict = field(default_factory=dict)            # label: Definition
    models: dict = field(default_factory=dict)          # folder: tools.earlier.Model of its model.py
    code: dict = field(default_factory=dict)            # path: {row: line of code}
    files: dict = field(default_factory=dict)           # path: (text, syntax tree)
    problems: list = field(default_factory=list)        # (path, line, what could not be read)

    @functools.cached_property
    def numbers(self):
        """{"05a": folder}, older lessons first: in the order of the register, but each after its parents."""
        waiting, numbers = list(self.lessons), {}
        while waiting:
            known = {lesson["number"] for lesson in waiting}
            entry = next((lesson for lesson in waiting if not known.intersection(lesson["parents"])), waiting[0])
            numbers[entry["number"]] = entry["folder"]
            waiting.remove(entry)
        return numbers

    def earlier(self, folder):
        """What earlier.py of a lesson holds, as tools.earlier builds it."""
        return earlier.build(self.models, self.numbers, folder)

    def parent(self, lesson):
        return next((entry for entry in self.lessons if entry["number"] in lesson["parents"][:1]), None)


def register(root):
    """lessons.yaml: the name of the repository and the lessons."""
    try:
        text = (root / "lessons.yaml").read_text(encoding="utf-8")
        found = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError:
        raise Mistake(f"there is no lessons.yaml in {root}") from None
    except yaml.YAMLError as error:
        raise Mistake(f"lessons.yaml: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or not isinstance(found.get("lessons"), list):
        raise Mistake("lessons.yaml must hold `lessons:` and below it their entries")
    return found


def load_lessons(root):
    """The entries of lessons.yaml."""
    return register(root)["lessons"]


def load(root):
    """Read every lesson under `root`."""
    files = [*root.glob("lesson_*/*.py"), *root.glob("lesson_*/sublesson_*/*.py")]
    house = House(root, load_lessons(root), sorted({file.parent.relative_to(root).as_posix() for file in files}))
    for folder, name in itertools.product(house.folders, FILES):
        if (root / folder / name).exists():
            read_file(house, f"{folder}/{name}")
    return house


def parse(house, path):
    """(text, tree) of a file, read once; a file that does not parse is a problem and counts as empty."""
    if path not in house.files:
        text = (house.root / path).read_text(encoding="utf-8")
        try:
            house.files[path] = text, ast.parse(text)
        except SyntaxError as error:
            house.problems.append((path, error.lineno or 1, f"is not Python: {error.msg}"))
            house.files[path] = "", ast.parse("")
    return house.files[path]


def definitions(tree):
    """(node, class or None) of every function, class and method in a module, in order."""
    for node in tree.body:
        if isinstance(node, KINDS):
            yield node, None
            if isinstance(node, ast.ClassDef):
                yield from ((inner, node) for inner in node.body if isinstance(inner, KINDS))


def read_file(house, path):
    """Add the definitions of one file, with their markers, to the house."""
    text, tree = parse(house, path)
    lines, (code, comments) = text.splitlines(), earlier.rows(text, tree)
    house.code[path] = code
    if path.endswith("/model.py"):
        folder = path.rpartition("/")[0]
        house.models[folder] = earlier.read(folder, text, tree, comments)

    unused = {row for row, comment in comments.items() if LIKE_A_MARKER.match(comment)}
    for node, owner in definitions(tree):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        d = Definition(path, f"{owner.name}.{node.name}" if owner else node.name, node, lines,
                       house.defs[f"{path}: {owner.name}"] if owner else None,
                       {row: code[row] for row in range(first, node.end_lineno + 1) if row in code})
        if d.label in house.defs:                               # a property's setter: it goes with its class
            continue
        house.defs[d.label] = d
        row = d.first - 1
        while row in comments and lines[row - 1].lstrip().startswith("#"):     # up through the comment right above
            if (match := MARKER.fullmatch(comments[row])) and not d.kind:
                d.kind, d.origin, d.reason, end = match[1], f"{match[2]}: {match[3]}", match[4] or "", row + 1
                while d.reason and end < d.first and re.match(r"#  +\S", comments[end]):
                    d.reason, end = f"{d.reason} {comments[end][1:].strip()}", end + 1
                d.rows = range(row, end)
                unused.discard(row)
            row -= 1
        if d.owner and d.owner.kind == "Copied":                # what stands in a copied class came with it
            d.kind = d.origin = d.reason = ""
    house.problems += [(path, row, "this marker cannot be used: write `# Copied from lesson_NN/FILE.py: NAME` or "
                        "`# Adapted from lesson_NN/FILE.py: NAME -- REASON`, once, right above a definition")
                       for row in unused]


# --- check -----------------------------------------------------------------------------------------------------
def check(root, only=None):
    """Every breach of the rules as one line, `file:line: what is wrong: what to do`. only: folders of some lessons."""
    house = load(root)
    rules = check_earlier, check_markers, check_twins, check_pins, check_imports, check_tables
    found = {problem for rule in rules for problem in rule(house)}.union(house.problems)
    return [f"{path}:{line}: {text}" for path, line, text in sorted(found) if only is None or belongs(path, text, only)]


def belongs(path, text, folders):
    """Whether a problem is one of these lessons'; in lineage.lock the line says whose it is."""
    return path.rpartition("/")[0] in folders or path == LOCK and text.partition(":")[0].strip("`").rpartition("/")[
        0] in folders


def check_earlier(house):
    """model.py takes what is there from those who own it, and earlier.py is what `sync` would write."""
    for folder, model in house.models.items():
        path, file = f"{folder}/model.py", house.root / folder / "earlier.py"
        built = house.earlier(folder)
        yield from ((path, row, text) for row, text in model.problems + built.problems)
        handed_on = imported_from_model(house, folder)
        for row, _, names in model.lines:
            if idle := [name for name in names if name not in model.used | handed_on]:
                yield path, row, f"takes {', '.join(idle)}, which neither model.py nor a script uses: drop it"
        for name in model.imports.keys() - model.used - handed_on:      # ruff cannot say so: F401 is off in model.py
            if all(module != "__future__" for module, _, _ in model.imports[name]):
                yield path, model.rows[name], f"imports {name} and does not use it: drop it"
        if model.problems or built.problems:
            continue
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if text and not built.text:
            yield f"{folder}/earlier.py", 1, f"model.py takes nothing from earlier: {SYNC}, which removes this file"
        elif built.text and not file.exists():
            yield path, 1, f"there is no earlier.py beside it: {SYNC}"
        elif text != built.text:
            line = next((row for row, (a, b) in enumerate(itertools.zip_longest(
                text.splitlines(), built.text.splitlines()), 1) if a != b), 1)
            yield f"{folder}/earlier.py", line, f"differs from what model.py takes: do not edit it, {SYNC}"


def imported_from_model(house, folder):
    """The names that the scripts of a lesson import from its model."""
    names = set()
    for file in (house.root / folder).glob("*.py"):
        if file.name in ("model.py", "earlier.py"):
            continue
        for node in ast.walk(parse(house, f"{folder}/{file.name}")[1]):
            if isinstance(node, ast.ImportFrom) and node.module == "model":
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "model":
                names.add(node.attr)
    return names


def taken_from(house, d):
    """The label of the definition that `d` is a copy of, by its own marker or by its class's; None if it is not."""
    if d.kind:
        return d.origin if d.kind == "Copied" else None
    origin = house.defs.get(f"{d.owner.origin}.{d.short}") if d.owner else None
    return origin.label if origin and (d.owner.kind == "Copied" or origin.code == d.code) else None


def first_owner(house, label):
    """Follow copies back to the definition that is nobody's copy."""
    seen = set()
    while label not in seen and label in house.defs and (back := taken_from(house, house.defs[label])):
        seen.add(label)
        label = back
    return label


def check_markers(house):
    """A marker names an original in another lesson; a copy equals it, an adaptation does not and says why."""
    for d in house.defs.values():
        if not d.kind:
            continue
        origin, copied, here = house.defs.get(d.origin), d.kind == "Copied", (d.path, d.rows[0])
        if copied and not d.owner and d.path.endswith("/model.py"):
            number = owner_number(house, d.origin)
            yield *here, f"{d.name} is a copy: import it, `from earlier import {d.name}  # lesson {number}`"
            continue
        if copied and d.reason:
            yield *here, f"{d.name} is marked as a copy but gives a reason: write `Adapted`, or drop the reason"
        if not copied and not d.reason:
            yield *here, f"{d.name} does not say what was adapted: add ` -- REASON` to the marker"
        if origin is None:
            yield *here, f"there is no {d.origin}: " + (taken_by(house, d.origin)
                                                       or f"correct the marker of {d.name}")
        elif origin.lesson == d.lesson:
            yield *here, f"{d.origin} is in the same lesson: import it"
        elif taken_from(house, origin):
            yield *here, f"{d.origin} is itself a copy: name its first owner, {first_owner(house, d.origin)}"
        elif copied and origin.short != d.short:
            yield *here, f"{d.name} is a copy under another name: call it {origin.short}, or write `Adapted`"
        elif copied and origin.code != d.code:
            yield *here, f"{d.name} differs from {d.origin}: {SYNC} to renew it, or write `Adapted ... -- REASON`"
        elif not copied and origin.code == d.code:
            yield *here, f"{d.name} equals {d.origin}: write `# Copied from {d.origin}`"


def owner_number(house, label):
    """The number of the lesson that owns what a marker names, as far as known; else "NN"."""
    path, _, name = first_owner(house, label).partition(": ")
    folder = path.rpartition("/")[0]
    own = next((number for number, place in house.numbers.items() if place == folder), "NN")
    return house.models[folder].taken.get(name, (own,))[0] if folder in house.models else own


def taken_by(house, label, seen=()):
    """Who owns what a marker names, if the named model.py has it from an earlier lesson: as advice, or ''."""
    path, _, name = label.partition(": ")
    first, dot, method = name.partition(".")
    model, owner = house.models.get(path.removesuffix("/model.py")), house.defs.get(f"{path}: {first}")
    if not model:
        return ""
    if owner is None:
        number = model.taken.get(first, (None,))[0]
        return f"name its owner, {house.numbers[number]}/model.py: {name}" if number in house.numbers else ""
    for base in map(ast.unparse, getattr(owner.node, "bases", [])):         # a method that the class inherits
        lines, base = (model.bases, base[8:]) if base.startswith("earlier.") else (model.taken, base)
        number = lines.get(base, (None,))[0]
        place = f"{house.numbers[number]}/model.py" if number in house.numbers else path
        found = f"{place}: {base}{dot}{method}"
        if found in house.defs:
            return f"name its owner, {found}"
        if found not in (label, *seen) and (further := taken_by(house, found, (label, *seen))):
            return further
    return ""


def has_owner(d):
    """Whether a definition of model.py belongs to one lesson alone, so that an equal one elsewhere is an error.

    Classes and functions do, whatever their length, and methods of more than one line: where a class gives names of
    its own a meaning, `return Level(...)` of two networks can be the same code and not the same thing.
    """
    return d.path.endswith("/model.py") and (not d.owner or d.size > 2)


def check_twins(house):
    """Equal definitions in different lessons of which none says that it comes from the other."""
    age, flagged = {folder: place for place, folder in enumerate(house.numbers.values())}, set()
    for rule in has_owner, lambda d: d.size >= TWIN_LINES:
        groups = {}
        for d in filter(rule, house.defs.values()):
            base = house.models[d.lesson].bases.get(d.name, ("",))[0] if d.path.endswith("/model.py") else ""
            groups.setdefault((d.code.replace(f"name={d.short!r}", "", 1), base), []).append(d)     # names may differ
        for group in groups.values():
            labels = {d.label for d in group}
            own = [d for d in group if not taken_from(house, d) and not (d.owner and d.owner.label in flagged)]
            own.sort(key=lambda d: (d.kind, age.get(d.lesson, len(age)), d.path))
            for d in own[1:]:
                first = own[0]
                if d.lesson != first.lesson and d.origin not in labels and d.label not in flagged:
                    flagged.add(d.label)
                    yield d.path, d.first, f"{d.name} equals {first.label} ({d.size} lines): {advice(house, d, first)}"


def advice(house, d, first):
    """What to do about `d`, which equals `first`."""
    number = next((number for number, folder in house.numbers.items() if folder == first.lesson), "NN")
    if not d.owner and not first.owner and d.path.endswith("/model.py") and first.path.endswith("/model.py"):
        return f"take it, `from earlier import {first.name}  # lesson {number}`, or let the other one take it from here"
    rename = "" if d.short == first.short else f"call it {first.short} and "
    inherit = ", or inherit it" if d.owner and first.owner and d.path.endswith("/model.py") else ""
    return f"{rename}write `# Copied from {first.label}` above it{inherit}, or mark the other one"


def read_lock(house):
    """{"adapted <- origin": (hash, line)} of lineage.lock."""
    path = house.root / LOCK
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {line.rpartition(" ")[0]: (line.rpartition(" ")[2], row)
            for row, line in enumerate(lines, 1) if not line.startswith("#")}


def adaptations(house):
    """{"adapted <- origin": definition}."""
    return {f"{d.label} <- {d.origin}": d for d in house.defs.values() if d.kind == "Adapted"}


def check_pins(house):
    """The origin of an adaptation is still the one that its author looked at."""
    lock, adapted = read_lock(house), adaptations(house)
    for key, d in adapted.items():
        if key not in lock and d.origin in house.defs:
            yield d.path, d.rows[0], f"{d.name} is not pinned to its origin yet: {SYNC}"
        elif key in lock and d.origin in house.defs and lock[key][0] != house.defs[d.origin].hash:
            yield d.path, d.rows[0], (f"{d.origin} changed after {d.name} was adapted from it: look at both, then "
                                      f"{SYNC[:-1]} --accept {d.path}:{d.name}`")
    for key in lock.keys() - adapted.keys():
        yield LOCK, lock[key][1], f"`{key}` belongs to no marker: {SYNC}"


def imported(node):
    """(module, relative level) of what a syntax node imports; a mention of sys.path counts as one."""
    if isinstance(node, ast.Import):
        return [(alias.name, 0) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [(f"{node.module or ''}.{alias.name}".lstrip("."), node.level) for alias in node.names]
    touched = isinstance(node, ast.Attribute) and node.attr == "path" and ast.unparse(node) == "sys.path"
    return [("sys.path", 0)] if touched else []


def check_imports(house):
    """Who may import whom."""
    lessons = [file for folder in house.folders for file in (house.root / folder).glob("*.py")]
    for file in [*lessons, *(house.root / "utils").rglob("*.py")]:
        path, in_lesson = file.relative_to(house.root).as_posix(), file in lessons
        for node in ast.walk(parse(house, path)[1]):
            for name, level in imported(node):
                top, here = name.split(".")[0], (path, node.lineno)
                if name == "sys.path":
                    yield *here, "touches sys.path: leave it alone; scripts find their own model, utils is installed"
                elif in_lesson and level:
                    yield *here, "relative import: lessons run as scripts; write `from model import ...`"
                elif top == "tools" and not level:
                    yield *here, "imports tools: only tools and tests may"
                elif in_lesson and top == "earlier" and file.name != "model.py":
                    yield *here, ("imports earlier: write `from model import ...`" if file.name != "earlier.py" else
                                  "imports earlier: earlier.py stands alone")
                elif in_lesson and file.name in ("model.py", "earlier.py") and top not in {*MODEL_IMPORTS, "earlier"}:
                    yield *here, (f"imports {top}: {file.name} may import torch, einops, numpy, torchdiffeq and the "
                                  "standard library only, so that model.py and earlier.py can be copied out together")
                elif in_lesson and re.match(r"lesson_\d", top):
                    yield *here, f"imports {top}: copy what you need under `# Copied from ...`, or read its weights"
                elif not in_lesson and (re.match(r"lesson_\d", top)
                                        or not level and f"{top}.py" in (*FILES, "earlier.py")):
                    yield *here, f"imports {top}, a lesson's code: let the lesson hand over what utils needs"


# --- the table in README.md ------------------------------------------------------------------------------------
def table(house, lesson):
    """What is new in a lesson, from its markers, as a Markdown table."""
    folder, parent, new, adapted, copied = lesson["folder"], house.parent(lesson), [], [], {}
    for d in house.defs.values():
        if d.lesson != folder:
            continue
        file = d.path.rpartition("/")[2]
        if not d.kind and (file in ("sample.py", "reproduce.py") or d.name == "main"):
            continue                                   # command lines and measurements are new in every lesson
        if d.kind:
            path, _, name = d.origin.partition(": ")
            link = f"[{path.rpartition('/')[0]}]({os.path.relpath(path, folder).replace(os.sep, '/')})"
            if d.kind == "Copied":
                copied.setdefault((file, link), []).append(f"`{d.name}`")
            else:
                renamed = "" if name == d.name else f"`{name}` in "
                adapted.append(f"| adapted | `{file}` | `{d.name}` | from {renamed}{link}: {escape(d.reason)} |")
        elif not d.owner:
            text = (ast.get_docstring(d.node) or "").split("\n\n")[0]
            new.append(f"| **new** | `{file}` | `{d.name}` | {escape(text)}{built_on(house, d)} |")
    lines = [line for line in house.models[folder].lines if line[1] in house.numbers] if folder in house.models else []
    same = [f"| taken | `model.py` | `{'`, `'.join(names)}` | from {link_to(house, number, folder)} |"
            for _, number, names in lines]
    same += [f"| copied | `{file}` | {', '.join(names)} | from {link} |" for (file, link), names in copied.items()]
    note = [f"Lesson {parent['number']} is not written yet: what comes from no other lesson counts as new.\n"
            ] if parent and parent["state"] != "ready" else []
    return "\n".join([*note, "| | file | definition | |", "|---|---|---|---|", *new, *adapted, *same])


def link_to(house, number, folder):
    """A Markdown link from a lesson's page to the model.py of lesson `number`."""
    origin = house.numbers[number]
    return f"[{origin}]({os.path.relpath(f'{origin}/model.py', folder).replace(os.sep, '/')})"


def built_on(house, d):
    """Which classes of earlier lessons a class of model.py extends, as a sentence, or ''."""
    found = []
    if isinstance(d.node, ast.ClassDef) and d.path.endswith("/model.py"):
        model = house.models[d.lesson]
        for base in map(ast.unparse, d.node.bases):
            lines, name = (model.bases, base[8:]) if base.startswith("earlier.") else (model.taken, base)
            if name in lines and lines[name][0] in house.numbers:
                found.append(f"`{name}` of {link_to(house, lines[name][0], d.lesson)}")
    return f" Extends {' and '.join(found)}." if found else ""


def escape(text):
    """Docstring or reason as one Markdown table cell."""
    return re.sub(r"([|*<\\])", r"\\\1", " ".join(text.split()))


def fill(house, lesson):
    """(README.md as it is, as it should be, (line, problem) or None). Only a lesson with a parent needs the table."""
    path, parent, problem = house.root / lesson["folder"] / "README.md", house.parent(lesson), None
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    before, start, rest = text.partition(START + "\n")
    _, end, after = rest.partition(END)
    heading = f"What is new since lesson {parent['number']}" if parent else ""
    line = before.count("\n") + 1 if start else 1
    if not end:
        asked = text and parent
        return text, text, (line, f"needs a section `## {heading}` with the lines {START} and {END}") if asked else None
    if not re.match(heading + r"\b", (re.findall(r"^#+ (.*)$", before, re.MULTILINE) or [""])[-1]) and parent:
        problem = line, f"the table of what is new stands under another heading: call it `## {heading}`"
    return text, f"{before}{start}{table(house, lesson)}\n{end}{after}", problem


def check_tables(house):
    """Every lesson is in the register, and its README has the table that the markers give."""
    registered = {lesson["folder"]: lesson for lesson in house.lessons}
    for folder in house.folders:
        if folder not in registered:
            yield "lessons.yaml", 1, f"{folder} is not in the register: add it"
            continue
        old, new, problem = fill(house, registered[folder])
        if old != new and not problem:
            problem = old[:old.index(START)].count("\n") + 1, f"the table of what is new is stale: {SYNC}"
        if problem:
            yield f"{folder}/README.md", *problem


# --- sync ------------------------------------------------------------------------------------------------------
def sync(root, accept=(), only=None):
    """Write earlier.py, rewrite copies, pin adaptations, fill tables. Returns what was done, one line each.

    only: the folders of some lessons; the others keep their files and pins.
    """
    house, done, plan = load(root), [], []
    accept = {re.sub(r":\s*", ": ", label) for label in accept}
    if unknown := accept - {d.label for d in adaptations(house).values()}:
        raise Mistake(f"--accept: {unknown.pop()} is not an adapted definition; write lesson_NN/FILE.py:NAME")
    if house.problems:                                          # half-read lessons would lose their pins and rows
        return done
    only = set(house.folders) if only is None else set(only)

    for d in house.defs.values():
        if d.lesson not in only or d.path.endswith("/model.py") and not d.owner:
            continue
        origin = house.defs.get(d.origin) if d.kind == "Copied" else None
        if (origin and origin.code != d.code and origin.short == d.short and origin.lesson != d.lesson
                and not taken_from(house, origin)):
            shift = d.node.col_offset - origin.node.col_offset              # a method may come from a function
            plan.append((d, [" " * shift + line if line and shift > 0 else line[max(-shift, 0):]
                             for line in origin.lines[origin.first - 1:origin.last]]))
    for d, source in sorted(plan, key=lambda pair: -pair[0].first):         # from the bottom up: the rows stay valid
        d.lines[d.first - 1:d.last] = source
        (root / d.path).write_text("\n".join(d.lines) + "\n", encoding="utf-8")
        done.append(f"{d.path}:{d.first}: {d.name} rewritten from {d.origin}")

    house = load(root)
    for folder in house.models.keys() & only:
        file, built = root / folder / "earlier.py", house.earlier(folder)
        old = file.read_text(encoding="utf-8") if file.exists() else ""
        if house.models[folder].problems or built.problems or old == built.text:
            continue
        if built.text:
            file.write_text(built.text, encoding="utf-8", newline="\n")
        else:
            file.unlink()
        done.append(f"{folder}/earlier.py: {'written' if built.text else 'removed'}")

    lock, adapted = read_lock(house), adaptations(house)
    pins = {key: value for key, (value, _) in lock.items() if key.partition(":")[0].rpartition("/")[0] not in only}
    for key, d in adapted.items():
        origin = house.defs.get(d.origin)
        if d.lesson not in only:
            continue
        if key in lock and (d.label not in accept or origin is None):
            pins[key] = lock[key][0]
        elif origin:
            pins[key] = origin.hash
            done.append(f"{LOCK}: {key} pinned")
    if pins or lock:
        text = "# The origin each adaptation was made from, as a hash; written by `python -m tools.lineage sync`\n"
        (root / LOCK).write_text(text + "".join(f"{key} {pins[key]}\n" for key in sorted(pins)), encoding="utf-8")

    for lesson in house.lessons:
        old, new, problem = fill(house, lesson)
        if old != new and not problem and lesson["folder"] in only & set(house.folders):
            (root / lesson["folder"] / "README.md").write_text(new, encoding="utf-8")
            done.append(f"{lesson['folder']}/README.md: table of what is new filled")
    return done


# --- new code --------------------------------------------------------------------------------------------------
def code_of(d, leave=()):
    """{row: line of code} of a definition without some rows."""
    return {row: line for row, line in d.rows_of_code.items() if row not in leave}


def added(before, after):
    """How many of the lines `after` are not in `before`, in this order; indentation aside."""
    before, after = ([line.strip() for line in lines] for lines in (before, after))
    same = difflib.SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks()
    return len(after) - sum(block.size for block in same)


def new_in(house, d):
    """The number of new lines of code in a class or function.

    All of a fresh one or a subclass; of an adaptation those that its origin does not have; of a copied method none.
    """
    total, done = 0, set()
    for inner in (inner for inner in house.defs.values() if inner.owner is d and inner.kind):
        done.update(range(inner.first, inner.last + 1))
        total += new_in(house, inner)
    if d.kind == "Copied":
        return 0
    rest, origin = code_of(d, done).values(), house.defs.get(d.origin) if d.kind else None
    return total + (added(origin.rows_of_code.values(), rest) if origin else len(rest))


def constants(house, path):
    """{row: line of code} of a file outside its definitions and imports."""
    taken = {row for node in house.files[path][1].body if isinstance(node, (*KINDS, ast.Import, ast.ImportFrom))
             for row in range(min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]),
                              node.end_lineno + 1)}
    return {row: line for row, line in house.code[path].items() if row not in taken}


def new_lines(house, folder, file="model.py"):
    """The number of new lines of code in a lesson's model.py: docstrings, comments, blanks and imports aside."""
    path = f"{folder}/{file}"
    return len(constants(house, path)) + sum(new_in(house, d) for d in house.defs.values()
                                             if d.path == path and not d.owner)


def sizes(house, folder):
    """(lines of model.py, new lines of code in it), which the contract bounds."""
    return len((house.root / folder / "model.py").read_text(encoding="utf-8").splitlines()), new_lines(house, folder)


# --- diff ------------------------------------------------------------------------------------------------------
def registered(lessons, name):
    """The entry of lessons.yaml that "09", "05a", "lesson_05a" or "lesson_05/sublesson_a" means."""
    match = re.fullmatch(r"(?:\./)?(?:lesson_)?(\d+)(?:/?(?:sublesson_)?([a-z]))?/?", name)
    number = f"{int(match[1]):02}{match[2] or ''}" if match else name
    entry = next((lesson for lesson in lessons if lesson["number"] == number), None)
    if entry is None:
        raise Mistake(f"there is no lesson {name!r} in lessons.yaml; write 05, 05a or lesson_05/sublesson_a, say")
    return entry


def find(house, name):
    """The entry of a lesson that is written."""
    entry = registered(house.lessons, name)
    if entry["folder"] not in house.folders:
        raise Mistake(f"lesson {entry['number']} ({entry['name']}) is not written yet: there is no {entry['folder']}")
    return entry


def diff(root, name):
    """What a lesson adds to its parent as code, docstrings and comments aside, as (style, line) pairs."""
    house = load(root)
    lesson = find(house, name)
    parent, folder = house.parent(lesson) or {"folder": ""}, lesson["folder"]
    for path, line, text in house.problems:
        raise Mistake(f"{path}:{line}: {text}")
    yield "title", f"{folder}, {lesson['name']}" + (f": what is new since {parent['folder']}, {parent['name']}"
                                                    if parent["folder"] else "")
    if parent["folder"] not in house.folders:
        why = f"Its parent, lesson {parent['number']}, is not written yet" if parent["folder"] else "It has no parent"
        yield "quiet", f"{why}: compared with an empty file."

    for file in FILES:
        path = f"{folder}/{file}"
        mine, theirs = ({d.name: d for d in house.defs.values() if d.path == f"{place}/{file}" and not d.owner}
                        for place in (folder, parent["folder"]))
        if path not in house.code:
            continue
        model = house.models[folder] if file == "model.py" else None
        if not mine and not (model and (model.taken or constants(house, path))):
            continue
        yield "title", f"\n{path}: {count(new_lines(house, folder, file))}"
        kept = set(mine)
        if model:
            for _, number, names in model.lines:
                yield "quiet", f"  = {', '.join(names)}   from {house.numbers.get(number, f'lesson {number}')}"
            kept |= {name for item in house.earlier(folder).items for name in item.names}
        if rows := constants(house, path):
            yield "what", f"  + constants: {count(len(rows))}"
            yield from (("add", f"    + {line}") for line in rows.values())

        def same_as(d, theirs=theirs):
            """The file that holds the same definition, or None."""
            if not d.kind:
                return theirs[d.name].path if d.name in theirs and theirs[d.name].code == d.code else None
            return d.origin.partition(": ")[0] if d.kind == "Copied" else None

        for origin, group in itertools.groupby(mine.values(), same_as):
            if origin:
                yield "quiet", f"  = {', '.join(d.name for d in group)}   as in {origin}"
                continue
            for d in group:
                before, number = house.defs.get(d.origin), count(new_in(house, d))
                yield "what", f"  ~ {d.name}: {number}, from {d.origin}: {d.reason}" if d.kind else (
                    f"  + {d.name}: {number}")
                if before:
                    yield from changes(shown(house, before), shown(house, d, before))
                else:
                    yield from (("add", f"    + {line}") for line in shown(house, d))
        used = {d.origin for d in mine.values()}
        before = [d.name for d in theirs.values() if d.label not in used]
        before += list(house.models[parent["folder"]].taken) if model and parent["folder"] in house.models else []
        if gone := [name for name in before if name not in kept]:
            yield "del", f"  - {', '.join(gone)}   left out"


def count(number):
    return f"{number} new line{'' if number == 1 else 's'} of code"


def shown(house, d, before=None):
    """The code of a definition; a method copied from a third place takes one line."""
    rows = dict(d.rows_of_code)
    for inner in (inner for inner in house.defs.values() if inner.owner is d and inner.kind == "Copied"):
        if not (before and inner.origin.startswith(f"{before.label}.")):
            rows = {row: line for row, line in rows.items() if not inner.first <= row <= inner.last}
            rows[inner.node.lineno] = f"{' ' * inner.node.col_offset}= {inner.short}   as in {inner.origin}"
    return [rows[row] for row in sorted(rows)]


def changes(before, after):
    """A unified diff in which the name of the function around it sets each hunk apart."""
    for line in list(difflib.unified_diff(before, after, n=2, lineterm=""))[2:]:
        if not line.startswith("@@"):
            yield {"+": "add", "-": "del"}.get(line[0], ""), f"    {line[0]} {line[1:]}"
        elif (start := int(re.search(r"\+(\d+)", line)[1])) > 1:
            heads = [text.strip() for text in after[:start - 1] if re.match(r"\s*(async def|def|class) ", text)]
            yield "quiet", f"    ... {heads[-1] if heads else ''}"


def paint(pairs, colour):
    """The lines of a diff, with or without colour."""
    codes = {"title": "1", "quiet": "2", "what": "1;36", "add": "32", "del": "31"}
    return [f"\033[{codes[style]}m{line.rstrip()}\033[0m" if colour and style in codes else line.rstrip()
            for style, line in pairs]


# --- tree ------------------------------------------------------------------------------------------------------
def tree(lessons, number=None, indent=""):
    """The lessons as lines of text, each under its first parent."""
    children = [lesson for lesson in lessons if lesson["parents"][:1] == ([number] if number else [])]
    for lesson in children:
        branch, bar = ("", "") if number is None else ("└─ ", "   ") if lesson is children[-1] else ("├─ ", "│  ")
        date = f", {lesson['date']}" if lesson.get("date") else ""
        also = f"  (also from {', '.join(lesson['parents'][1:])})" if lesson["parents"][1:] else ""
        ready = "  [ready]" if lesson["state"] == "ready" else ""
        yield f"{indent}{branch}{lesson['number']} {lesson['name']}{date}{ready}{also}"
        yield from tree(lessons, lesson["number"], indent + bar)


def mermaid(lessons, base=""):
    """The tree as a Mermaid graph, further parents dotted. Ready lessons have a class and link to `base` + folder."""
    lines = ['%%{init: {"flowchart": {"nodeSpacing": 20, "rankSpacing": 40}}}%%', "graph TD"]
    numbers = {lesson["number"] for lesson in lessons}
    ready = [lesson for lesson in lessons if lesson["state"] == "ready"]
    for lesson in lessons:
        rows = [lesson["number"], *textwrap.wrap(lesson["name"], 12, break_long_words=False, break_on_hyphens=False)]
        rows = [row.replace("#", "#35;").replace('"', "#quot;").replace("<", "#lt;") for row in rows]
        lines.append(f'  L{lesson["number"]}["{"<br>".join(rows)}"]')
    for lesson in lessons:
        lines += [f"  L{parent} {'-.->' if further else '-->'} L{lesson['number']}"
                  for further, parent in enumerate(lesson["parents"]) if parent in numbers]
    if ready:
        lines += [f'  click L{lesson["number"]} "{base}{lesson["folder"]}"' for lesson in ready]
        lines += ["  classDef ready fill:#cdeac0,stroke:#2f6b2f,color:#102a10",
                  f"  class {','.join('L' + lesson['number'] for lesson in ready)} ready"]
    return "\n".join(lines)


# --- command line ----------------------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Mistake(f"{message}; see `python -m tools.lineage --help`")


def main(argv=None, root=ROOT):
    parser = Parser(prog="python -m tools.lineage", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{check,sync,diff,tree}")
    commands.add_parser("check").add_argument("lessons", metavar="lesson", nargs="*")
    command = commands.add_parser("sync")
    command.add_argument("lessons", metavar="lesson", nargs="*")
    command.add_argument("--accept", metavar="lesson_NN/FILE.py:NAME", action="append", default=[])
    commands.add_parser("diff").add_argument("lesson")
    commands.add_parser("tree").add_argument("--mermaid", action="store_true")
    try:
        args, problems = parser.parse_args(argv), []
        if args.command == "tree":
            lessons = load_lessons(root)
            lines = [mermaid(lessons)] if args.mermaid else tree(lessons)
        elif args.command == "diff":
            lines = paint(diff(root, args.lesson), sys.stdout.isatty() and "NO_COLOR" not in os.environ)
        else:
            only = None
            if args.lessons:
                house = House(root, load_lessons(root), [path.relative_to(root).as_posix() for path in (
                    *root.glob("lesson_*"), *root.glob("lesson_*/sublesson_*")) if path.is_dir()])
                only = {find(house, name)["folder"] for name in args.lessons}
            done, lost = sync(root, args.accept, only) if args.command == "sync" else [], []
            if args.command == "sync":                          # lines have moved: so do the links to them
                from tools import lines as links
                pages, lost = links.write(root, sorted(only) if only else None)
                done += [f"{page}: links to lines rewritten" for page in pages]
            problems = check(root, only) + lost
            lines = done + problems or ["lineage: all in order"]
        print("\n".join(lines), flush=True)
        return 1 if problems else 0
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    except BrokenPipeError:                                     # ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
