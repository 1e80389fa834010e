"""What a lesson's model.py takes from earlier lessons, and the text of the earlier.py beside it.

    import earlier                                              # lesson 05: UNet
    from earlier import Attention, ResBlock, noise_like         # lesson 05

A line names one origin: the lesson in whose model.py these definitions stand. `earlier.UNet` is for one thing only,
the base of a subclass under the same name, `class UNet(earlier.UNet)`. `build` collects these definitions and all
that they need, also through the origin's own lines, word for word with the comments right above them, and puts the
lessons in such an order that a class comes after its base. `tools.lineage` writes the result and checks it.
"""

import ast
import io
import re
import symtable
import sys
import tokenize
from dataclasses import dataclass, field

from utils.syntax import KINDS, docstring

WIDTH = 120
LINE = re.compile(r"# lesson (\d\d[a-z]?)((?:: \w+(?:, \w+)*)?)")
HELP = {"import": "write `import earlier  # lesson 05: UNet`", "from": "write `from earlier import X, Y  # lesson 05`"}


@dataclass(eq=False)
class Item:
    """A top-level statement of a model.py that gives something a name."""
    lesson: str                         # folder of the lesson
    names: tuple
    node: ast.AST
    first: int                          # with the comment lines right above it
    text: list                          # its lines
    copied: bool = False                # marked as a copy: it has another owner
    needs: set = field(default_factory=set)             # names that it looks up outside itself
    bases: set = field(default_factory=set)             # X of each `class X(earlier.X)` in it


@dataclass(eq=False)
class Model:
    """One model.py: what it defines, takes and imports."""
    lesson: str
    items: list = field(default_factory=list)
    names: dict = field(default_factory=dict)           # name: [Item]
    imports: dict = field(default_factory=dict)         # name: {(module, name or None, asname)} of libraries
    rows: dict = field(default_factory=dict)            # name: row of that import
    lines: list = field(default_factory=list)           # (row, number of the origin, names) of `from earlier import`
    taken: dict = field(default_factory=dict)           # name: (number of the origin, row)
    bases: dict = field(default_factory=dict)           # the same of `import earlier`
    used: set = field(default_factory=set)              # names that the file looks up
    problems: list = field(default_factory=list)        # (row, text)


# --- reading ---------------------------------------------------------------------------------------------------
def looked_up(text):
    """The names that a piece of source looks up outside its functions and comprehensions."""
    found, tables = set(), [symtable.symtable(text, "model.py", "exec")]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        found |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_referenced() and symbol.is_global()}
    return found


def bound(node):
    """The names that a top-level statement binds, definitions and imports aside."""
    if isinstance(node, KINDS):
        return (node.name,)
    inside, stack = [], [node]
    while stack:
        part = stack.pop()
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            inside.append((part.lineno, part.col_offset, part.id))
        elif isinstance(part, KINDS):
            inside.append((part.lineno, part.col_offset, part.name))
        elif not isinstance(part, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            stack += ast.iter_child_nodes(part)
    return tuple(dict.fromkeys(name for _, _, name in sorted(inside)))


def earlier_bases(node):
    """(class, X) for each class statement in `node` that has the base `earlier.X`."""
    for part in ast.walk(node):
        if isinstance(part, ast.ClassDef):
            yield from ((part, base.attr) for base in part.bases if isinstance(base, ast.Attribute)
                        and isinstance(base.value, ast.Name) and base.value.id == "earlier")


def read(lesson, text, tree, comments):
    """The Model of a file that parses. comments: {row: comment}."""
    model, lines = Model(lesson), text.splitlines()
    model.used = looked_up(text)
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            read_import(model, node, comments)
        elif not isinstance(node, ast.Expr) and (names := bound(node)):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            while first > 1 and re.match("#(?! ?-{4})", lines[first - 2]):          # a ruled heading stays behind
                first -= 1
            source = lines[first - 1:node.end_lineno]
            above = lines[first - 1:node.lineno]
            item = Item(lesson, names, node, first, source, any(line.startswith("# Copied from ") for line in above),
                        looked_up("\n".join(source)), {x for _, x in earlier_bases(node)})
            model.items.append(item)
            for name in names:
                model.names.setdefault(name, []).append(item)
    check_shape(model, tree)
    return model


def read_import(model, node, comments):
    """Add one top-level import to the model."""
    if isinstance(node, ast.Import) and any(alias.name == "earlier" for alias in node.names):
        text = (comments.get(node.lineno) or "").partition("  # noqa")[0]
        parts = [LINE.fullmatch(part if part.startswith("# ") else f"# {part}") for part in text.split("; ")]
        if len(node.names) > 1 or node.names[0].asname or not all(part and part[2] for part in parts):
            model.problems.append((node.lineno, f"`import earlier` does not say whose classes it builds on: "
                                                f"{HELP['import']}"))
            return
        for part in parts:
            for name in part[2][2:].split(", "):
                if name in model.bases:
                    model.problems.append((node.lineno, f"names {name} twice"))
                model.bases[name] = part[1], node.lineno
    elif isinstance(node, ast.ImportFrom) and node.module == "earlier" and not node.level:
        found = [match for row in dict.fromkeys((node.lineno, node.end_lineno))
                 if (match := LINE.fullmatch((comments.get(row) or "").partition("  # noqa")[0])) and not match[2]]
        names = [alias.name for alias in node.names]
        if len(found) != 1:
            model.problems.append((node.lineno, f"the import from earlier does not name its origin: {HELP['from']}"))
        elif "*" in names or any(alias.asname for alias in node.names):
            model.problems.append((node.lineno, "imports from earlier as * or under another name: use their names"))
        else:
            number = found[0][1]
            if any(number == other for _, other, _ in model.lines):
                model.problems.append((node.lineno, f"a second line for lesson {number}: one line an origin"))
            model.lines.append((node.lineno, number, names))
            for name in names:
                if name in model.taken:
                    model.problems.append((node.lineno, f"imports {name} from earlier twice"))
                model.taken[name] = number, node.lineno
    else:
        for alias in node.names:
            if isinstance(node, ast.Import):
                name, entry = alias.asname or alias.name.split(".")[0], (alias.name, None, alias.asname)
            else:
                name, entry = alias.asname or alias.name, ("." * node.level + (node.module or ""), alias.name,
                                                           alias.asname)
            model.imports.setdefault(name, set()).add(entry)
            model.rows[name] = node.lineno


def check_shape(model, tree):
    """How a model.py may use `earlier`: at its top, and `earlier.X` as the base of a class X."""
    top = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and node not in top:
            if "earlier" in {getattr(node, "module", None), *(alias.name for alias in node.names)}:
                model.problems.append((node.lineno, "imports earlier inside a block: write it at the top of the file"))
    bases = list(earlier_bases(tree))
    fine = {base.value for part, x in bases for base in part.bases if isinstance(base, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "earlier" and node not in fine:
            model.problems.append((node.lineno, "uses `earlier` other than as the base in `class X(earlier.X)`: write "
                                                "`super()`, or import the name from earlier"))
    for part, x in bases:
        if part.name != x:
            model.problems.append((part.lineno, f"class {part.name}(earlier.{x}) has a name of its own: import {x} "
                                                f"from earlier and write `class {part.name}({x})`"))
        elif x not in model.bases:
            model.problems.append((part.lineno, f"earlier.{x} has no origin: {HELP['import'].replace('UNet', x)}"))
    for x in model.bases.keys() - {x for _, x in bases}:
        model.problems.append((model.bases[x][1], f"names {x}, but there is no `class {x}(earlier.{x})`: drop it"))
    for name in model.taken.keys() & (model.names.keys() | model.imports.keys()):
        model.problems.append((model.taken[name][1], f"imports {name} from earlier and gives that name to something "
                                                     "else too"))


# --- writing ---------------------------------------------------------------------------------------------------
@dataclass
class Built:
    text: str                           # of earlier.py; empty where nothing is taken
    problems: list                      # (row of model.py, what is wrong)
    items: list                         # of the earlier lessons, in the order of the file


class Builder:
    """Collects what the model.py of `lesson` takes. models: {folder: Model}; numbers: {"05a": folder} in order."""

    def __init__(self, models, numbers, lesson):
        self.models, self.numbers, self.lesson, self.problems = models, numbers, lesson, []
        self.number = {folder: number for number, folder in numbers.items()}
        self.found, self.links, self.imports = {}, {}, {}   # item: row asking; (item, name or base): item; name: entry

    def resolve(self, lesson, name, row, base=False):
        """The items that `name` means in the model.py of `lesson`; [] where it is no definition."""
        model = self.models[lesson]
        if name in model.names and not base:
            items = model.names[name]
            if not items[-1].copied:
                return items
            origin = re.search(r"# Copied from (\S+)/model\.py: (\w+)$", "\n".join(items[-1].text), re.MULTILINE)
            if origin and origin[1] in self.models and origin[1] != lesson and origin[2] == name:
                return self.models[origin[1]].names.get(name, [])
            return items
        lines = model.bases if base else model.taken
        if name not in lines:
            return []
        number, here = lines[name]
        return self.owned(number, name, here if lesson == self.lesson else row, lesson)

    def owned(self, number, name, row, lesson):
        """The items of a name that an import line of `lesson` takes from lesson `number`."""
        folder, path = self.numbers.get(number), f"{lesson}/model.py takes {name} from lesson {number}"
        who = path if lesson != self.lesson else f"takes {name} from lesson {number}"
        model = self.models.get(folder)
        if folder is None or model is None:
            self.problems.append((row, f"{who}, which is not " + ("written yet" if folder else "in lessons.yaml")))
        elif folder == lesson:
            self.problems.append((row, f"{who}, which is this lesson"))
        elif name in model.names and not model.names[name][-1].copied:
            return model.names[name]
        elif name in model.taken:
            self.problems.append((row, f"{who}, which took it from lesson {model.taken[name][0]}: name that one"))
        elif name in model.names:
            owner = self.resolve(folder, name, row)
            number = self.number[owner[-1].lesson] if owner and owner[-1].lesson != folder else None
            self.problems.append((row, f"{who}, where it is a copy: name its first owner"
                                       + (f", lesson {number}" if number else "")))
        else:
            self.problems.append((row, f"{who}, but {folder}/model.py does not define it"))
        return []

    def follow(self, items, row):
        """Add items and all that they need."""
        for item in items:
            if item in self.found:
                continue
            self.found[item] = row
            model = self.models[item.lesson]
            for name in sorted(item.needs - {"earlier"}):
                if name in model.names or name in model.taken:
                    needed = self.resolve(item.lesson, name, row)
                    self.links[item, name] = needed
                    self.follow(needed, row)
                elif name in model.imports:
                    if self.imports.setdefault(name, model.imports[name]) != model.imports[name]:
                        self.problems.append((row, f"{item.lesson}/model.py imports another {name} than the lessons "
                                                   "before it: use one import for it in all of them"))
            for name in sorted(item.bases):
                needed = self.resolve(item.lesson, name, row, base=True)
                self.links[item, f"earlier.{name}"] = needed
                self.follow(needed, row)

    def sorted(self):
        """The items in the order of the file: each lesson after those it takes from, ties in the register's order."""
        lessons = {item.lesson for item in self.found}
        before = {lesson: set() for lesson in lessons}
        for lesson in lessons:
            lines = *self.models[lesson].taken.values(), *self.models[lesson].bases.values()
            before[lesson] = {self.numbers.get(number) for number, _ in lines} & lessons - {lesson}
        order, rank = [], {folder: place for place, folder in enumerate(self.numbers.values())}
        while before:
            free = [lesson for lesson, others in before.items() if others <= set(order)]
            if not free:
                self.problems.append((1, f"{' and '.join(sorted(before))} take from each other: move what they share "
                                         "to the older one"))
                free = list(before)
            order.append(min(free, key=lambda lesson: (rank.get(lesson, len(rank)), lesson)))
            del before[order[-1]]
        return sorted(self.found, key=lambda item: (order.index(item.lesson), item.first))

    def check_names(self, items):
        """One name, one meaning: a name may come twice only as a class and its subclass `class X(earlier.X)`."""
        last, own = {}, self.models[self.lesson]
        for item in items:
            for name in item.names:
                other = last.get(name)
                if other and other.lesson != item.lesson:
                    based = name in item.bases and isinstance(item.node, ast.ClassDef)
                    if not based or self.links.get((item, f"earlier.{name}"), [None])[-1] is not other:
                        self.problems.append((self.found[item], (
                            f"needs {name} of {other.lesson} and {name} of {item.lesson}: two meanings of one name, so "
                            "rename one" + (f", or write `class {name}(earlier.{name})`"
                                            if isinstance(item.node, ast.ClassDef) and not based else ""))))
                last[name] = item
        for name in last.keys() & self.imports.keys():
            self.problems.append((self.found[last[name]], f"needs {name} of {last[name].lesson} and the import {name}: "
                                                          "rename the first"))
        asked = [(f"{item.lesson}'s {item.names[0]}", name, needed, self.found[item])
                 for (item, name), needed in self.links.items() if not name.startswith("earlier.")]
        asked += [("model.py", name, self.resolve(self.lesson, name, lines[name][1], base), lines[name][1])
                  for base, lines in ((False, own.taken), (True, own.bases)) for name in lines]
        for who, name, needed, row in asked:
            if needed and last[name].lesson != needed[-1].lesson:
                self.problems.append((row, f"{who} means {name} of {needed[-1].lesson}, but in earlier.py it would "
                                           f"find {name} of {last[name].lesson}: take that one, or rename one"))

    def build(self):
        own = self.models[self.lesson]
        for base, lines in ((False, own.taken), (True, own.bases)):
            for name, (_, row) in lines.items():
                self.follow(self.resolve(self.lesson, name, row, base), row)
        self.problems = list(dict.fromkeys(self.problems))
        items = self.sorted()
        known = list(self.problems)
        self.check_names(items)
        self.problems = known + [problem for problem in dict.fromkeys(self.problems) if problem not in known]
        return Built(self.text(items) if items else "", self.problems, items)

    def text(self, items):
        """The file."""
        based = any(item.bases for item in items)
        imports = {entry for entries in self.imports.values() for entry in entries} | ({("sys", None, None)} if based
                                                                                        else set())
        number = self.number.get(self.lesson, "")
        head = (f'"""What lesson {number} takes from earlier lessons, word for word.\n\n'
                "Written by `python -m tools.lineage sync` from the import lines of model.py. Do not edit it: change "
                "a definition\nwhere it stands, in the file named above it, and run the command again.\n\"\"\"\n")
        parts = [head] + ([import_block(imports)] if imports else [])
        if based:
            parts.append("earlier = sys.modules[__name__]         # this module, for `class X(earlier.X)`\n")
        text, before = "\n".join(parts), None
        for item in items:
            small = not isinstance(item.node, KINDS)
            close = (before and small and not isinstance(before.node, KINDS) and before.lesson == item.lesson)
            if close:
                text += "\n" if before.first + len(before.text) < item.first else ""
            else:
                text += f"\n\n# {item.lesson}/model.py\n"
            text += "\n".join(item.text) + "\n"
            before = item
        return text


def build(models, numbers, lesson):
    """What earlier.py of `lesson` holds."""
    return Builder(models, numbers, lesson).build()


def import_block(entries):
    """Import statements in the order that ruff's isort rule asks for."""
    def natural(text):
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text.lower())]

    def member(name):
        kind = 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
        return kind, natural(name)

    groups = {}
    for module, name, asname in entries:
        top = module.split(".")[0]
        groups.setdefault(0 if top == "__future__" else 1 if top in sys.stdlib_module_names else 2, []).append(
            (module, name, asname))
    blocks = []
    for _, group in sorted(groups.items()):
        rows = [f"import {module}" + (f" as {asname}" if asname else "") for module, name, asname in
                sorted((entry for entry in group if entry[1] is None), key=lambda e: (natural(e[0]), e[2] or ""))]
        for module in sorted({entry[0] for entry in group if entry[1]}, key=natural):
            plain = sorted((name for m, name, asname in group if m == module and name and not asname), key=member)
            row = f"from {module} import {', '.join(plain)}"
            if plain and len(row) > WIDTH:
                row = f"from {module} import (\n" + "".join(f"    {name},\n" for name in plain) + ")"
            rows += [row] if plain else []
            rows += [f"from {module} import {name} as {asname}" for m, name, asname in
                     sorted((e for e in group if e[0] == module and e[1] and e[2]), key=lambda e: member(e[1]))]
        blocks.append("\n".join(rows))
    return "\n\n".join(blocks) + "\n"


def rows(text, tree):
    """({row: code}, {row: comment}) of a file; no docstrings and blank lines among the code."""
    code, comments, lines = {}, {}, text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        row, end = token.start[0], token.end[0]
        if token.type == tokenize.COMMENT:
            comments[row] = token.string
            if row in code:
                code[row] = lines[row - 1][:token.start[1]].rstrip()
        elif (row not in code or end > row) and token.string.strip():
            code.update((row, lines[row - 1].rstrip()) for row in range(row, end + 1) if row not in code)
    docs = {row for doc in docstrings(tree) for row in range(doc.lineno, doc.end_lineno + 1)}
    return {row: line for row, line in code.items() if row not in docs and line.strip()}, comments


def docstrings(tree):
    """Every docstring in a tree."""
    return [doc for node in ast.walk(tree) if isinstance(node, (ast.Module, *KINDS)) and (doc := docstring(node))]
