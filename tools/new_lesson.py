"""Begin a lesson: its folder, made from the folder of its parent.

    python -m tools.new_lesson 40          the lesson must be in lessons.yaml, its parent written, its folder not

Configuration and scripts are the parent's, each definition marked as a copy; change the marker to `# Adapted from ...
-- REASON` where you change the code. model.py takes what these scripts need, so the new folder runs at once and is
the parent; then write what the paper adds. README.md has the headings, and a first test is there. What is left for
you is marked TODO.
"""
import os
import re
import sys
import textwrap

from tools import lineage
from tools.frontpage import REPOSITORY
from tools.lineage import ROOT, Mistake
from utils.syntax import KINDS

SCRIPTS = ("train.py", "sample.py", "reproduce.py")
MONTHS = ("January February March April May June July August September October November December").split()

MODEL = '''{head}

Convention: TODO: what t and x_t mean here, where t = 0 is, what the network receives and predicts.
"""

{imports}
'''

README = """# Lesson {number}: {name}

[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab})

*{title}*, {written}.
{paper}

![TODO](results/denoising.gif)

## The paper in three sentences

TODO

## The idea and its equations

TODO

> **Convention.** TODO

## Run it

```bash
python sample.py                          # from the published weights
python train.py                           # TODO minutes on two CPU cores
python sample.py n=2048 metrics=true      # draw again and score
python reproduce.py                       # the claim: TODO minutes
```

## Results

TODO

## The claim

| | claim | paper | here | verdict |
|---|---|---|---|---|
| (a) | TODO | | | |

## What is new since lesson {parent}

<details>
<summary>TODO: in one line</summary>

<!-- lineage:start -->
<!-- lineage:end -->

</details>

## From equation to line

| paper | code |
|---|---|
| TODO | `model.py` |

## Differences from the paper

TODO

## If it looks wrong

TODO

## Questions readers ask

TODO

## Exercises

TODO
"""

TEST = '''"""Lesson {number}: the maths of {name}. TODO: closed forms, identities, references, before any training."""

from conftest import load

LESSON = "{folder}"


def test_two_steps_of_training_give_weights_that_draw(tmp_path):
    """To begin with. Once lessons.yaml calls the lesson ready, test_lessons.py asks for this: then leave it out."""
    smoke = "smoke=true", "gpu=false", "device=cpu", "threads=1", f"runs={{tmp_path}}"
    trained = load(LESSON, "train").main([*smoke, "steps=2"])
    x = load(LESSON, "sample").main([*smoke, "n=3", f"weights={{trained.weights}}"])
    assert x.shape == (3, 1, 28, 28) and x.isfinite().all() and x.std() > 0.01
'''


def new_lesson(root, name):
    """Write the folder and the test of a registered lesson. Returns what was written, one line each."""
    house = lineage.load(root)
    lesson = lineage.registered(house.lessons, name)
    folder, number = lesson["folder"], lesson["number"]
    parent, test = house.parent(lesson), root / f"tests/test_lesson_{number}.py"
    if (root / folder).exists():
        raise Mistake(f"{folder} exists already: a new lesson begins in a folder of its own")
    if test.exists():
        raise Mistake(f"{test.relative_to(root)} exists already: a new lesson begins with a test of its own")
    if parent is None:
        raise Mistake(f"lesson {number} has no parent in lessons.yaml: there is nothing to begin from")
    place = parent["folder"]
    for file in ("model.py", "config.yaml", *SCRIPTS):
        if not (root / place / file).exists():
            raise Mistake(f"lesson {parent['number']}, the parent, is not written: there is no {place}/{file}")
    for path, line, text in house.problems:
        raise Mistake(f"{path}:{line}: {text}")

    config = (root / place / "config.yaml").read_text(encoding="utf-8")
    files = {f"{folder}/config.yaml": moved(config, root, place, folder),
             f"{folder}/model.py": model(house, lesson, parent),
             **{f"{folder}/{file}": marked(house, f"{place}/{file}") for file in SCRIPTS},
             f"{folder}/README.md": readme(lesson, parent),
             test.relative_to(root).as_posix(): TEST.format(number=number, name=lesson["name"], folder=folder)}
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8", newline="\n")
    return [f"{path}: written" for path in files] + lineage.sync(root, only={folder})


def moved(text, root, old, new):
    """A configuration whose paths to other folders hold in another folder."""
    def path(match):
        target = (root / old / match[0]).resolve()
        return os.path.relpath(target, root.resolve() / new).replace(os.sep, "/") if target.exists() else match[0]

    return re.sub(r"(?<![\w./])\.\./[\w./]*\w", path, text)


def marked(house, path):
    """A script in which every definition is marked as a copy of its first owner."""
    text, tree = house.files[path]
    lines = text.splitlines()
    for node in reversed([node for node in tree.body if isinstance(node, KINDS)]):
        d = house.defs[f"{path}: {node.name}"]
        if d.kind != "Copied":
            first = d.rows.start if d.rows else d.first
            lines[first - 1:first - 1 + len(d.rows)] = [f"# Copied from {d.label}"]
    return "\n".join(lines) + "\n"


def model(house, lesson, parent):
    """A model.py that takes from the parent, and from those it took from, what the scripts import from it."""
    own, place = house.models[parent["folder"]], parent["folder"]
    wanted, lines = lineage.imported_from_model(house, place), {}
    for name in sorted(wanted & (own.names.keys() | own.taken.keys()), key=lambda name: (
            0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2, name)):
        number = parent["number"] if name in own.names else own.taken[name][0]
        lines.setdefault(number, []).append(name)
    rows = []
    for number in sorted(lines, key=list(house.numbers).index):
        row = f"from earlier import {', '.join(lines[number])}  # lesson {number}"
        if len(row) > 120:
            row = (f"from earlier import (  # lesson {number}\n" + "".join(f"    {name},\n" for name in lines[number])
                   + ")")
        rows.append(row)
    year = (lesson["date"] or "").partition("-")[0]
    arxiv = re.search(r"arxiv\.org/abs/([\w./-]+)", lesson["paper"] or "")
    source = ", ".join(filter(None, [f"TODO: authors {year}".strip(), f"arXiv {arxiv[1]}" if arxiv else ""]))
    head = textwrap.fill(f'"""{lesson["name"]}: {lesson["title"]} ({source}).', 120, break_long_words=False)
    return MODEL.format(head=head, imports="\n".join(rows))


def readme(lesson, parent):
    """The page with its headings."""
    year, _, month = (lesson["date"] or "").partition("-")
    written = ", ".join(filter(None, ["TODO: authors", f"{MONTHS[int(month) - 1]} {year}" if month else year]))
    colab = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/{lesson['folder']}/notebook.ipynb"
    paper = f"[Paper]({lesson['paper']}) · TODO: official code" if lesson["paper"] else "TODO: where to read about it"
    return README.format(**{**lesson, "parent": parent["number"], "written": written, "colab": colab, "paper": paper})


def main(argv=None, root=ROOT):
    argv = sys.argv[1:] if argv is None else argv
    try:
        if len(argv) != 1 or argv[0].startswith("-"):
            if argv in (["-h"], ["--help"]):
                print(__doc__)
                return 0
            raise Mistake("name one lesson of lessons.yaml: python -m tools.new_lesson 40")
        lines = new_lesson(root, argv[0])
        folder = lineage.registered(lineage.load_lessons(root), argv[0])["folder"]
        problems = lineage.check(root, only={folder})
        print("\n".join([*lines, *problems, f"Next: the TODOs of {folder}; CONTRIBUTING.md says in which order."]))
        return 1 if problems else 0
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
