"""tools/frontpage.py, the register lessons.yaml, and the front page."""
import copy
import json
import re
from pathlib import Path

import pytest
import yaml

from tools import frontpage

ROOT = Path(__file__).resolve().parent.parent
KEYS = {"number", "folder", "name", "title", "date", "paper", "parents", "teaches", "state"}
# A release without a paper of its own names the paper it builds on; its date is the release's.
RELEASES = {"14a", "14b"}


# ---------------------------------------------------------------------------------------------- lessons.yaml

def register():
    return frontpage.register(ROOT)["lessons"]


def problems(lessons):
    """Everything wrong with a register, as a list of sentences."""
    found = []
    numbers = [lesson.get("number") for lesson in lessons]
    for lesson in lessons:
        number = lesson.get("number")

        def wrong(what, number=number):
            found.append(f"{number}: {what}")

        if set(lesson) - {"over"} != KEYS:             # `over`: only where model.py is longer than it should be
            wrong(f"keys {sorted((set(lesson) - {'over'}) ^ KEYS)} are missing or unknown")
            continue
        if not isinstance(number, str) or not re.fullmatch(r"\d\d[a-z]?", number):
            wrong("number is not two digits and perhaps a letter, as a string")
            continue
        if numbers.count(number) > 1:
            wrong("number is not unique")
        letter = f"/sublesson_{number[2:]}" if number[2:] else ""
        if lesson["folder"] != f"lesson_{number[:2]}{letter}":
            wrong(f"folder {lesson['folder']} does not fit the number")
        for key in ("name", "title", "teaches", *({"over"} & set(lesson))):
            if not isinstance(lesson[key], str) or not lesson[key].strip():
                wrong(f"{key} is empty")
            elif "\n" in lesson[key] or "|" in lesson[key]:
                wrong(f"{key} holds a line break or a bar")
        if len(lesson["teaches"]) > 90:
            wrong(f"teaches has {len(lesson['teaches'])} characters")
        if lesson["state"] not in ("planned", "ready"):
            wrong(f"state {lesson['state']!r} is neither planned nor ready")

        date, paper = lesson["date"], lesson["paper"]
        if date is None:
            if paper is not None:
                wrong("has a paper and no date")
        elif not isinstance(date, str) or not re.fullmatch(r"20(1[5-9]|2\d)-(0[1-9]|1[0-2])", date):
            wrong(f"date {date!r} is not a month from 2015 on")
        if paper is not None:
            arxiv = re.fullmatch(r"https://arxiv\.org/abs/(\d\d)(\d\d)\.\d{4,5}", paper)
            if not arxiv:
                wrong(f"paper {paper} is not an arXiv page")
            elif number not in RELEASES and date != f"20{arxiv[1]}-{arxiv[2]}":
                wrong(f"date {date} is not the month of {paper}")

        parents = lesson["parents"]
        if not isinstance(parents, list) or len(set(parents)) != len(parents):
            wrong("parents is not a list of different numbers")
        elif not parents and number != "01":
            wrong("has no parent")
        for parent in parents:
            if parent not in numbers:
                wrong(f"parent {parent!r} does not exist")

    parents = {lesson["number"]: lesson["parents"] for lesson in lessons if set(lesson) >= KEYS}
    done = set()
    while True:                                        # take away lessons whose parents are all taken away
        free = {number for number in parents if number not in done
                and all(parent in done or parent not in parents for parent in parents[number])}
        if not free:
            break
        done |= free
    if len(done) < len(parents):
        found.append(f"parents go in a circle among {sorted(set(parents) - done)}")
    return found


def test_register_is_well_formed():
    assert problems(register()) == []


def test_register_is_in_order_and_complete():
    numbers = [lesson["number"] for lesson in register()]
    assert numbers == sorted(numbers)
    whole = [int(number) for number in numbers if len(number) == 2]
    assert whole == list(range(1, len(whole) + 1))     # no gap
    for number in numbers:
        assert number[:2] in numbers                   # 05a needs 05


def test_ready_lessons_have_a_folder():
    ready = [lesson for lesson in register() if lesson["state"] == "ready"]
    assert ready
    for lesson in ready:
        for name in ("README.md", "model.py", "train.py", "sample.py", "reproduce.py", "config.yaml"):
            assert (ROOT / lesson["folder"] / name).exists(), f"{lesson['folder']}/{name}"


@pytest.mark.parametrize("change, complaint", [
    (dict(number="01"), "not unique"),
    (dict(folder="lesson_5"), "folder"),
    (dict(date="2020-13"), "not a month"),
    (dict(date="2020-07"), "not the month of"),
    (dict(date=None), "no date"),
    (dict(parents=["77"]), "does not exist"),
    (dict(parents=[]), "no parent"),
    (dict(parents=["39"]), "circle"),                  # 39 descends from 07, and 07 from 05
    (dict(parents=["05"]), "circle"),
    (dict(teaches="x" * 91), "91 characters"),
    (dict(state="done"), "neither"),
    (dict(over=" "), "over is empty"),
    (dict(more="x"), "unknown"),
])
def test_problems_are_found(change, complaint):
    lessons = copy.deepcopy(register())
    next(lesson for lesson in lessons if lesson["number"] == "05").update(change)
    assert any(complaint in problem for problem in problems(lessons))


# ------------------------------------------------------------------------------------------- generated parts

def lesson(number, **other):
    folder = f"lesson_{number[:2]}" + (f"/sublesson_{number[2:]}" if number[2:] else "")
    return {"number": number, "folder": folder, "name": f"Name {number}", "title": f"Title {number}",
            "date": "2020-06", "paper": "https://arxiv.org/abs/2006.00001", "parents": [],
            "teaches": f"Teaches {number}.", "state": "ready", **other}


README = "".join(f"# {name}\n<!-- frontpage:{name}:start -->\nOUTDATED\n<!-- frontpage:{name}:end -->\n"
                 for name in frontpage.PARTS) + "the end\n"


def dump(root, lessons):
    (root / "lessons.yaml").write_text(yaml.safe_dump({"repository": "some-one/a.course", "lessons": lessons}))


@pytest.fixture
def root(tmp_path):
    lessons = [
        lesson("01", date=None, paper=None, state="planned"),
        lesson("02", date="2021-05"),
        lesson("03", date="2019-07", parents=["01"]),
        lesson("03a", date="2022-01", parents=["03"]),
        lesson("10", parents=["03"], state="planned"),
    ]
    dump(tmp_path, lessons)
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    results = tmp_path / "lesson_03" / "results"
    results.mkdir(parents=True)
    (results / "denoising.gif").write_bytes(b"GIF89a")
    (results.parent / "notebook.ipynb").write_text("{}")
    publish(tmp_path, headline="FID 2.5 (floor 0.5; n = 2,048; 50 network calls)",
            train={"minutes": 9.3, "device": "2 CPU cores", "code": "abc"},
            sample={"n": 64, "code": "old", "script": "sample"})
    return tmp_path


def publish(root, folder="lesson_03", **results):
    path = root / folder / "results" / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results), encoding="utf-8")


def rows(text):
    """The cells of a Markdown table, without its two head lines."""
    lines = text.splitlines()
    assert lines[0].count(" | ") == lines[1].count(" | ")
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[2:]]
    assert all(len(row) == lines[0].count("|") - 1 for row in cells)
    return [[cell.strip() for cell in row] for row in cells]


def test_lessons_table(root):
    table = rows(frontpage.lessons_table(root))
    assert [row[0] for row in table] == [              # by number, finished lessons only
        "[**02** Name 02](lesson_02)<br>[2021-05](https://arxiv.org/abs/2006.00001)",
        "[**03** Name 03](lesson_03)<br>[2019-07](https://arxiv.org/abs/2006.00001)",
        "[**03a** Name 03a](lesson_03/sublesson_a)<br>[2022-01](https://arxiv.org/abs/2006.00001)"]
    assert table[1][1] == "Teaches 03."
    assert '<img src="lesson_03/results/denoising.gif" width="160" alt="Name 03: ' in table[1][2]
    assert table[1][3:] == ["FID 2.5 (floor 0.5; n = 2,048; 50 network calls)", "9.3 on 2 cores", (
        f"[open](https://colab.research.google.com/github/{frontpage.REPOSITORY}/blob/main/lesson_03/notebook.ipynb)")]
    assert table[0][1:] == ["Teaches 02.", "—", "—", "—", "—"]          # nothing published


@pytest.mark.parametrize("change, cell", [
    (dict(paper=None), "[**02** Name 02](lesson_02)<br>2021-05"),
    (dict(paper=None, date=None), "[**02** Name 02](lesson_02)"),
])
def test_lesson_without_a_paper(root, change, cell):
    dump(root, [lesson("02", **{"date": "2021-05"} | change)])
    assert rows(frontpage.lessons_table(root))[0][0] == cell


@pytest.mark.parametrize("entry, cell", [
    ({"minutes": 4.25, "device": "1 CPU core (AMD EPYC)"}, "4.2"),
    ({"minutes": 12.4, "device": "2 CPU cores (AMD EPYC)"}, "12 on 2 cores"),
    ({"minutes": 12.6}, "13"),
    ({"minutes": None}, "—"),
    ({}, "—"),
])
def test_minutes_of_training(root, entry, cell):
    publish(root, train=entry)
    assert rows(frontpage.lessons_table(root))[1][4] == cell


def test_paths_show_what_is_finished(root):
    register = frontpage.register(root) | {"paths": [
        {"name": "Up", "what": "Climb.", "hours": 1.5, "lessons": ["03a", "10", "02"]},
        {"name": "Down", "what": "Descend.", "hours": 2, "lessons": ["01", "10"]}]}
    assert "|" not in frontpage.paths_table(root)
    (root / "lessons.yaml").write_text(yaml.safe_dump(register))
    assert rows(frontpage.paths_table(root)) == [
        ["**Up**", "[03a](lesson_03/sublesson_a) → [02](lesson_02)", "3", "Climb."]]


def test_every_lesson_is_on_one_path():
    """But for the first side steps of lesson 05; a new lesson is put on the path that it continues."""
    paths = yaml.safe_load((ROOT / "lessons.yaml").read_text(encoding="utf-8"))["paths"]
    numbers = [number for path in paths for number in path["lessons"]]
    ready = {lesson["number"] for lesson in register() if lesson["state"] == "ready"}
    assert len(numbers) == len(set(numbers)) and set(numbers) <= {lesson["number"] for lesson in register()}
    assert ready - set(numbers) == {"05a", "05b"}
    for path in paths:
        assert set(path) == {"name", "what", "hours", "lessons"} and 0 < path["hours"] < 10


def test_what_was_measured_on_a_gpu(root):
    """One sentence until there is something."""
    assert frontpage.gpu_table(root).startswith("Not yet measured on a GPU: ") and "\n" not in frontpage.gpu_table(root)
    (root / "tools").mkdir()
    row = {"lesson": "03", "precision": "fp16", "images_per_second": 1234.5, "minutes": 12.345, "memory_gb": 2.51,
           "loss": [1.02, 0.03456], "samples": 2048, "sample_seconds": 20.0}
    (root / frontpage.GPU).write_text(json.dumps({
        "Tesla T4": {"torch": "2.14",
                     "rows": [row, row | {"lesson": "03a", "samples": 512}, {"lesson": "02", "error": "no"}]},
        "NVIDIA L4": {"torch": "2.15", "rows": [row | {"precision": "bf16"}]}}))
    t4, l4 = frontpage.gpu_table(root).split("</details>")[:2]
    assert "one Tesla T4, torch 2.14" in t4 and "one NVIDIA L4, torch 2.15" in l4 and "Not yet" not in t4
    table = "\n".join(line for line in t4.splitlines() if line.startswith("|"))
    assert rows(table) == [["03", "fp16", "1,234", "12.3", "2.5 GB", "1.02 to 0.0346", "20"],
                           ["03a", "fp16", "1,234", "12.3", "2.5 GB", "1.02 to 0.0346", "about 80"],
                           ["02", "no", *["—"] * 5]]
    assert "| bf16 |" in l4 and "| bf16 |" not in t4


def test_headline_is_made_from_the_scores(root):
    few = {"fid": 3.456, "fid_floor": 0.151, "n": 2048, "nfe": 10}
    many = {"fid": 1.234, "fid_floor": 0.152, "n": 2048, "nfe": 1000}
    publish(root, sample_10=few, sample_1000=many, sample_10_gpu=many | {"fid": 0.9},  # not the published weights'
            sample_50={"fid": 0.1},                    # lacks n and floor
            claim={**few, "fid": 0.1})                                         # an arm is not the lesson's result
    assert rows(frontpage.lessons_table(root))[1][3] == "FID 1.23 (floor 0.15; n = 2,048; 1,000 network calls)"
    publish(root, headline="Said by hand", sample_10=few)
    assert rows(frontpage.lessons_table(root))[1][3] == "Said by hand"


def test_a_bar_in_a_headline_does_not_break_the_table(root):
    publish(root, headline="E|x|\nsmall")
    assert rows(frontpage.lessons_table(root))[1][3] == r"E\|x\| small"


def test_unreadable_results_name_the_file(root):
    (root / "lesson_03" / "results" / "results.json").write_text("{")
    with pytest.raises(SystemExit, match="lesson_03/results/results.json"):
        frontpage.lessons_table(root)


def test_roadmap(root):
    assert rows(frontpage.roadmap_table(root)) == [
        ["01", "—", "Name 01", "Title 01", "Teaches 01."],
        ["10", "2020-06", "Name 10", "[Title 10](https://arxiv.org/abs/2006.00001)", "Teaches 10."],
    ]


def test_nothing_finished_or_nothing_planned(root):
    for state, function in (("planned", frontpage.lessons_table), ("ready", frontpage.roadmap_table)):
        dump(root, [lesson("01", state=state)])
        assert "|" not in function(root)


def test_map_is_a_mermaid_diagram(root):
    lines = frontpage.field_map(root).splitlines()
    assert lines[0] == "```mermaid" and lines[-1] == "```"
    assert [line for line in lines if line.startswith("```")] == ["```mermaid", "```"]
    assert "graph TD" in lines and any("L03 --> L03a" in line for line in lines)
    for name, shown in (("02", True), ("03a", True), ("01", False), ("10", False)):      # finished lessons only
        assert any(f'L{name}["{name}<br>Name {name}"]' in line for line in lines) == shown
    assert not any("L01" in line or "L10" in line for line in lines)


def test_numbers_sort_as_numbers():
    numbers = ["10", "05b", "05", "06", "05a"]
    assert sorted(numbers, key=frontpage.number_key) == ["05", "05a", "05b", "06", "10"]


# ---------------------------------------------------------------------------------------------- the command

def test_write_then_check(root, capsys):
    assert frontpage.main(["--check"], root) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "python -m tools.frontpage" in message
    assert (root / "README.md").read_text(encoding="utf-8") == README  # --check writes nothing

    assert frontpage.main([], root) == 0
    text = (root / "README.md").read_text(encoding="utf-8")
    assert "OUTDATED" not in text and text.endswith("the end\n") and "FID 2.5" in text
    assert frontpage.main(["--check"], root) == 0
    frontpage.main([], root)
    assert (root / "README.md").read_text(encoding="utf-8") == text    # writing twice changes nothing


@pytest.mark.parametrize("change", [
    lambda root: publish(root, headline="FID 9.9 (floor 0.5; n = 2,048; 50 network calls)"),
    lambda root: (root / "lesson_03" / "results" / "denoising.gif").unlink(),
    lambda root: (root / "lessons.yaml").write_text(
        (root / "lessons.yaml").read_text().replace("Teaches 10.", "Teaches more.")),
    lambda root: (root / "README.md").write_text(
        (root / "README.md").read_text(encoding="utf-8").replace("FID 2.5", "FID 0.1"), encoding="utf-8"),
])
def test_stale_readme_is_caught(root, change):
    frontpage.main([], root)
    change(root)
    assert frontpage.main(["--check"], root) == 1


def test_the_repository_is_renamed_wherever_it_is_named(root, capsys):
    notebook, page = root / "lesson_03/sublesson_a/notebook.ipynb", root / "lesson_03/README.md"
    notebook.parent.mkdir()
    notebook.write_text('{"a": "https://github.com/some-one/a.course.git", "b": "/some-one/a.course-2"}')
    page.write_text("[code](https://github.com/some-one/a.course/tree/main), [other](handsome-one/a.course)\n")
    assert frontpage.main(["--repository", "else/the.fork"], root) == 0
    assert frontpage.register(root)["repository"] == "else/the.fork" and len(frontpage.load_lessons(root)) == 5
    assert notebook.read_text() == '{"a": "https://github.com/else/the.fork.git", "b": "/some-one/a.course-2"}'
    assert page.read_text() == "[code](https://github.com/else/the.fork/tree/main), [other](handsome-one/a.course)\n"
    assert capsys.readouterr().out.split() == [word for path in (
        "lessons.yaml", "lesson_03/README.md", "lesson_03/sublesson_a/notebook.ipynb") for word in (path, "rewritten")]
    for bad in ("fork", "a/b/c", "https://github.com/a/b", "a /b"):
        with pytest.raises(SystemExit, match="owner/name"):
            frontpage.main(["--repository", bad], root)


def test_the_name_of_the_repository_stands_only_where_it_is_renamed():
    folders = [ROOT, *ROOT.glob("lesson_*"), *ROOT.glob("lesson_*/sublesson_*"), ROOT / "utils", ROOT / "tools",
               ROOT / "tests"]
    files = [path for folder in folders for path in folder.iterdir()
             if path.suffix in (".py", ".md", ".ipynb", ".yaml", ".toml", ".txt") or path.name == "Makefile"]
    named = {path.relative_to(ROOT).as_posix() for path in files
             if frontpage.REPOSITORY in path.read_text(encoding="utf-8")}
    assert {"lessons.yaml", "README.md", "lesson_05/README.md", "lesson_05/notebook.ipynb"} <= named
    assert not [name for name in named if not name.endswith((".md", "notebook.ipynb")) and name != "lessons.yaml"]


@pytest.mark.parametrize("marker", ["<!-- frontpage:map:start -->", "<!-- frontpage:map:end -->"])
def test_missing_or_double_marker_is_an_error(root, marker):
    for text in (README.replace(marker, ""), README + marker):
        with pytest.raises(SystemExit, match="frontpage:map"):
            frontpage.render(text, root)


def test_results_of_other_code_are_listed(root):
    lines = frontpage.stale_results(root, code_hash=lambda folder, script: "abc")
    assert len(lines) == 1
    assert "lesson_03/results/results.json" in lines[0] and "'sample'" in lines[0]
    assert len(frontpage.stale_results(root, code_hash=lambda folder, script: "new")) == 2
    # each entry is compared with the code of the script that made it
    assert frontpage.stale_results(root, code_hash=lambda folder, script: "old" if script == "sample" else "abc") == []

    publish(root, headline="FID 2.5", train={"minutes": 9.3})          # nothing recorded, nothing stale
    assert frontpage.stale_results(root, code_hash=lambda folder, script: pytest.fail("not needed")) == []


def test_stale_command_asks_utils(root, capsys):
    from utils import code_hash
    folder = root / "lesson_03"
    for name in ("model", "train", "sample"):
        (folder / f"{name}.py").write_text(f"name = {name!r}\n")
    publish(root, train={"code": code_hash(folder, "train"), "script": "train"},
            sample={"code": code_hash(folder, "sample"), "script": "sample"})
    assert frontpage.main(["--stale"], root) == 0
    (folder / "sample.py").write_text("name = 'sampler'\n")
    capsys.readouterr()
    assert frontpage.main(["--stale"], root) == 1
    assert "'sample'" in (out := capsys.readouterr().out) and "'train'" not in out
    (folder / "model.py").write_text("name = 'other'\n")
    frontpage.main(["--stale"], root)
    assert "'train'" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- the real pages

def test_readme_is_fresh(capsys):
    assert frontpage.main(["--check"]) == 0, capsys.readouterr().err


def test_front_page_begins_with_the_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^```bash\n(.*?)^```", text, flags=re.S | re.M)[1]
    assert "make lesson_05" in block and "make test" in block
    assert text.index("make lesson_05") < text.index("| ")            # before the first table


def test_licence():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.startswith("MIT License") and "2026 Zero-to-Hero: Diffusion Models contributors" in text
