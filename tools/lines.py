"""Write the links from the equations of a page to the lines of code.

    python -m tools.lines                   every finished lesson; python -m tools.lines lesson_05a for one
    python -m tools.lines --check           change nothing; exit 1 when a link is stale

In the tables under "From equation to line" a name in backticks that model.py or earlier.py defines becomes a link to
its lines: `VDM.loss` is [`VDM.loss`](model.py#L90-L104) then. A method that a class inherits leads to the class that
has it. A name followed by "in `train.py`" (or sample.py, reproduce.py) is looked for there. `python -m tools.lineage
sync` does the same.
"""
import ast
import re
import sys
from functools import cache

from tools.lineage import ROOT, Mistake, load_lessons, registered

SECTION = re.compile(r"(?<=^## From equation to line\n).*?(?=^## |\Z)", re.M | re.S)
FILES = r"(?:model|earlier|train|sample|reproduce)\.py"
NAME = re.compile(rf"\[`([^`]+)`\]\(({FILES})(?:#L[\d\-L]+)?\)|(?<!\[)`([^`]+)`")
ELSEWHERE = re.compile(rf" in \[?`({FILES})`")


@cache
def definitions(path, changed):
    """What a file defines: name or Class.name -> (first line, last line), and the bases of its classes."""
    found, bases = {}, {}

    def put(name, node):
        first = min(part.lineno for part in [node, *getattr(node, "decorator_list", [])])
        found.setdefault(name, (first, node.end_lineno))

    def assigned(node):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(
            node, ast.AnnAssign) else []
        return [part for target in targets for part in ast.walk(target)]

    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            put(node.name, node)
        for target in assigned(node):
            if isinstance(target, ast.Name):
                put(target.id, node)
        if isinstance(node, ast.ClassDef):
            bases[node.name] = [ast.unparse(base) for base in node.bases]
            for part in node.body:
                if isinstance(part, ast.FunctionDef):
                    put(f"{node.name}.{part.name}", part)
                for target in assigned(part):
                    put(f"{node.name}.{ast.unparse(target)}", part)
            for part in ast.walk(node):                # what an object holds: self.x = ..., register_buffer("x", ...)
                for target in assigned(part):
                    if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                        put(f"{node.name}.{target.attr}", part)
                if isinstance(part, ast.Call) and ast.unparse(part.func) == "self.register_buffer" and part.args:
                    put(f"{node.name}.{ast.literal_eval(part.args[0])}", part)
    return found, bases


def defined(folder, file):
    path = folder / file
    return definitions(path, path.stat().st_mtime_ns) if path.exists() else ({}, {})


def find(folder, name, files=("model.py", "earlier.py")):
    """(file, first line, last line) of a name; a method of a class may stand in its base."""
    owner, _, attribute = name.partition(".")
    for file in files:
        found, bases = defined(folder, file)
        if name in found:
            return file, *found[name]
        for base in bases.get(owner, []) if attribute else []:
            where = ("earlier.py",) if base.startswith("earlier.") else files
            if place := find(folder, f"{base.removeprefix('earlier.')}.{attribute}", where):
                return place
    return None


def linked(text, folder, mistakes=None):
    """The page with every link written anew; what a link cannot find is added to `mistakes`."""
    def one(match, after):
        name = match[1] or match[3]
        if re.fullmatch(FILES, name):
            return f"[`{name}`]({name})" if (folder / name).exists() else match[0]
        plain = re.match(r"\w+(\.\w+)*(?=\(|$)", name)
        if not plain:
            return match[0]
        place = find(folder, plain[0])
        if not place and (other := ELSEWHERE.match(after)):
            place = find(folder, plain[0], (other[1],))
        if place:
            file, first, last = place
            return f"[`{name}`]({file}#L{first}" + (f"-L{last})" if last > first else ")")
        if mistakes is not None and (match[1] or "." in plain[0] and find(folder, plain[0].partition(".")[0])):
            mistakes.append(f"{name} is not in {match[2] or 'model.py'}")
        return match[0]

    def row(line):
        return NAME.sub(lambda match: one(match, line[match.end():]), line) if line.startswith("|") else line

    return SECTION.sub(lambda section: "\n".join(map(row, section[0].split("\n"))), text)


def write(root=ROOT, folders=None, check=False):
    """Write the links of these lessons. Returns what was rewritten, or is stale, and what no link finds."""
    done, mistakes = [], []
    for folder in folders or [lesson["folder"] for lesson in load_lessons(root) if lesson["state"] == "ready"]:
        page, missing = root / folder / "README.md", []
        if not page.exists():
            continue
        old = page.read_text(encoding="utf-8")
        new = linked(old, root / folder, missing)
        mistakes += [f"{folder}/README.md: {one}" for one in missing]
        if new != old:
            done.append(f"{folder}/README.md")
            if not check:
                page.write_text(new, encoding="utf-8", newline="\n")
    return done, mistakes


def main(argv=None, root=ROOT):
    argv = list(sys.argv[1:] if argv is None else argv)
    check = "--check" in argv
    names = [name for name in argv if name != "--check"]
    if any(name.startswith("-") for name in names):
        print(__doc__)
        return 0 if names in (["-h"], ["--help"]) else 2
    try:
        folders = [registered(load_lessons(root), name)["folder"] for name in names]
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    done, mistakes = write(root, folders, check)
    for page in done:
        print(f"{page}: its links to lines are stale: run `python -m tools.lines`" if check else f"{page} rewritten",
              file=sys.stderr if check else sys.stdout)
    for mistake in mistakes:
        print(f"error: {mistake}", file=sys.stderr)
    return int(bool(mistakes or check and done))


if __name__ == "__main__":
    sys.exit(main())
