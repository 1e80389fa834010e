"""Write the generated parts of README.md from lessons.yaml and the published results.

    python -m tools.frontpage            rewrite the parts between the markers
    python -m tools.frontpage --check    change nothing; exit 1 when README.md is stale
    python -m tools.frontpage --stale    list results measured with code that has changed since
    python -m tools.frontpage --repository owner/name    the course has moved to there: rename it in lessons.yaml, in
                                         every badge, link and notebook

A generated part stands between `<!-- frontpage:NAME:start -->` and `<!-- frontpage:NAME:end -->`;
NAME is `lessons`, `gpu`, `paths`, `roadmap` or `map`. Everything outside the markers is left alone.
"""
import argparse
import json
import re
import sys
from pathlib import Path

from tools.lineage import mermaid, register

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = register(ROOT)["repository"]               # on GitHub; every link to it is made from this

# What `python -m tools.gpu_check` has measured: {name of the GPU: {"torch": version, "rows": [...]}}.
GPU = "tools/gpu.json"

NOTHING = "—"
WIDTH = 160                                            # pixels of an animation in the table, which has 838 in all


def number_key(number):
    """Sort key of a lesson number: "05" < "05a" < "06"."""
    digits, letter = re.fullmatch(r"(\d+)([a-z]?)", number).groups()
    return int(digits), letter


def load_lessons(root=ROOT):
    """The entries of lessons.yaml in the order of their numbers."""
    return sorted(register(root)["lessons"], key=lambda lesson: number_key(lesson["number"]))


def load_results(root, folder):
    """What a lesson has published in results/results.json; empty when there is no such file."""
    path = root / folder / "results" / "results.json"
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise SystemExit(f"{folder}/results/results.json is not valid JSON: {error}") from None
    if not isinstance(results, dict):
        raise SystemExit(f"{folder}/results/results.json must hold one JSON object")
    return results


def table(header, rows):
    """A Markdown table."""
    def line(cells):
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])


def title_link(lesson):
    """The title, linked to the paper where there is one."""
    return f"[{lesson['title']}]({lesson['paper']})" if lesson["paper"] else lesson["title"]


def named(lesson):
    """Number and name, linked to the lesson; below it the date, linked to the paper."""
    date = f"<br>[{lesson['date']}]({lesson['paper']})" if lesson["paper"] else f"<br>{lesson['date'] or ''}"
    return f"[**{lesson['number']}** {lesson['name']}]({lesson['folder']})" + date.removesuffix("<br>")


def animation(root, lesson):
    """The picture of the denoising trajectory, linked to the lesson."""
    folder = lesson["folder"]
    gif = f"{folder}/results/denoising.gif"
    if not (root / gif).exists():
        return NOTHING
    return f'<a href="{folder}"><img src="{gif}" width="{WIDTH}" alt="{lesson["name"]}: noise becomes digits"></a>'


def colab(root, lesson):
    """The link that opens the lesson's notebook in Colab."""
    notebook = f"{lesson['folder']}/notebook.ipynb"
    if not (root / notebook).exists():
        return NOTHING
    return f"[open](https://colab.research.google.com/github/{REPOSITORY}/blob/main/{notebook})"


def headline(results):
    """The lesson's result in one phrase: its `headline`, else the lowest FID of those with the most samples."""
    if results.get("headline"):
        return results["headline"]
    scored = [entry for name, entry in results.items() if re.match("sample(?!.*_gpu$)", name)
              and isinstance(entry, dict)
              and all(entry.get(key) is not None for key in ("fid", "fid_floor", "n", "nfe"))]
    if not scored:
        return NOTHING
    best = min(scored, key=lambda entry: (-entry["n"], entry["fid"]))
    return (f"FID {best['fid']:.2f} (floor {best['fid_floor']:.2f}; n = {best['n']:,}; "
            f"{best['nfe']:,} network calls)")


def minutes(entry):
    """Minutes of a training on a CPU, with the number of cores where it is not one: "12 on 2 cores"."""
    if not isinstance(entry, dict) or entry.get("minutes") is None:
        return NOTHING
    cores = re.search(r"\b(\d+) CPU cores", entry.get("device", ""))
    return f"{entry['minutes']:.{1 if entry['minutes'] < 10 else 0}f}" + (f" on {cores[1]} cores" if cores else "")


def lessons_table(root=ROOT):
    """The finished lessons in the order of their numbers, by which one looks them up."""
    rows = []
    for lesson in load_lessons(root):
        if lesson["state"] == "ready":
            results = load_results(root, lesson["folder"])
            rows.append([named(lesson), lesson["teaches"], animation(root, lesson), headline(results),
                         minutes(results.get("train")), colab(root, lesson)])
    wide = "Sampling" + "&nbsp;" * 20                  # GitHub lets pictures shrink, so a word keeps the column open
    return table(["Lesson", "What it teaches", wide, "Result", "CPU minutes", "Colab"],
                 rows) if rows else "No lesson is finished yet."


def paths_table(root=ROOT):
    """The ways through the finished lessons; what is planned joins them when it is finished."""
    ready = {lesson["number"]: lesson for lesson in load_lessons(root) if lesson["state"] == "ready"}
    rows = []
    for path in register(root).get("paths", []):
        steps = [ready[number] for number in path["lessons"] if number in ready]
        if steps:
            links = " → ".join(f"[{lesson['number']}]({lesson['folder']})" for lesson in steps)
            rows.append([f"**{path['name']}**", links, f"{path['hours'] * len(steps):g}", path["what"]])
    return table(["Path", "Lessons", "Hours", "What you can do then"], rows) if rows else "No path is finished yet."


def gpu_table(root=ROOT):
    """What has been measured on GPUs, a table for each, or the sentence that nothing has."""
    path = root / GPU
    measured = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not measured:
        return ("Not yet measured on a GPU: with an NVIDIA card of any kind, `python -m tools.gpu_check` measures all "
                "lessons in ten minutes.")
    return "\n\n".join(f"<details><summary>Measured on one {device}, torch {found['torch']}, by <code>python -m "
                       f"tools.gpu_check</code></summary>\n\n{gpu_rows(found['rows'])}\n\n</details>"
                       for device, found in measured.items())


def gpu_rows(rows):
    """The table of one GPU's measurements, with what its numbers mean."""
    header = ["Lesson", "Precision", "Images/s", "Minutes to train", "Memory", "Loss", "Seconds for 2,048 samples"]
    return table(header, map(gpu_cells, rows)) + (
        "\n\nTrained for some seconds with the section `gpu`; minutes to train: all its images at that speed. Loss: of "
        "the first and the last steps. About: from fewer samples.")


def gpu_cells(row):
    """One row of it."""
    if "error" in row:
        return [row["lesson"], row["error"], *[NOTHING] * 5]
    seconds = row["sample_seconds"] * 2048 / row["samples"]
    return [row["lesson"], row["precision"], f"{row['images_per_second']:,.0f}", f"{row['minutes']:.3g}",
            f"{row['memory_gb']:.2g} GB", "{:.3g} to {:.3g}".format(*row["loss"]),
            f"{'about ' * (row['samples'] < 2048)}{seconds:.3g}"]


def roadmap_table(root=ROOT):
    """The planned lessons in order of number."""
    planned = [lesson for lesson in load_lessons(root) if lesson["state"] == "planned"]
    if not planned:
        return "Every lesson is finished."
    rows = [[lesson["number"], lesson["date"] or NOTHING, lesson["name"], title_link(lesson), lesson["teaches"]]
            for lesson in planned]
    return table(["Lesson", "Date", "Name", "Paper", "What it teaches"], rows)


def field_map(root=ROOT):
    """The family of the finished lessons in Mermaid. GitHub draws it in a frame where relative links lead nowhere."""
    base = f"https://github.com/{REPOSITORY}/tree/main/"
    ready = [lesson for lesson in load_lessons(root) if lesson["state"] == "ready"]
    return f"```mermaid\n{mermaid(ready, base)}\n```"


PARTS = {"lessons": lessons_table, "gpu": gpu_table, "paths": paths_table, "roadmap": roadmap_table, "map": field_map}


def render(text, root=ROOT):
    """The text of README.md with every generated part written anew."""
    for name, make in PARTS.items():
        start, end = f"<!-- frontpage:{name}:start -->", f"<!-- frontpage:{name}:end -->"
        if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
            raise SystemExit(f"README.md needs {start} and after it {end}, each once")
        before, rest = text.split(start)
        after = rest.split(end)[1]
        text = f"{before}{start}\n\n{make(root)}\n\n{end}{after}"
    return text


def stale_results(root=ROOT, code_hash=None):
    """One line for each entry of a results.json that was measured with other code than today's."""
    if code_hash is None:
        from utils import code_hash
    lines = []
    for lesson in load_lessons(root):
        for name, entry in load_results(root, lesson["folder"]).items():
            if not isinstance(entry, dict) or "code" not in entry:
                continue
            present = code_hash(root / lesson["folder"], entry.get("script"))    # model.py and the script that ran
            if entry["code"] != present:
                lines.append(f"{lesson['folder']}/results/results.json: '{name}' was measured with code "
                             f"{entry['code']}, the code is now {present}")
    return lines


def rename(root, new):
    """Write another name of the repository wherever the present one stands. Returns the files that were changed."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", new):
        raise SystemExit(f"error: --repository takes owner/name, as in github.com/owner/name, not {new!r}")
    pattern, changed = re.compile(rf"(?<![\w.-]){re.escape(register(root)['repository'])}(?![\w-])"), []
    for path in [root / "lessons.yaml", *root.glob("*.md"), *root.glob("lesson_*/**/README.md"),
                 *root.glob("lesson_*/**/notebook.ipynb")]:
        text = path.read_text(encoding="utf-8")
        if text != (text := pattern.sub(new, text)):
            path.write_text(text, encoding="utf-8", newline="\n")
            changed.append(path.relative_to(root).as_posix())
    return changed


def main(argv=None, root=ROOT):
    parser = argparse.ArgumentParser(prog="python -m tools.frontpage", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--check", action="store_true", help="change nothing; exit 1 when README.md is stale")
    which.add_argument("--stale", action="store_true", help="list results measured with other code; exit 1 if any")
    which.add_argument("--repository", metavar="owner/name", help="rename the repository in all that names it")
    args = parser.parse_args(argv)

    if args.repository:
        print("\n".join(f"{path} rewritten" for path in rename(root, args.repository)) or "nothing to rename")
        return 0
    if args.stale:
        lines = stale_results(root)
        print("\n".join(lines) if lines else "every recorded result belongs to the present code")
        return 1 if lines else 0

    readme = root / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = render(old, root)
    if args.check:
        if old != new:
            print("README.md is stale: run `python -m tools.frontpage`", file=sys.stderr)
        return int(old != new)
    if old != new:
        readme.write_text(new, encoding="utf-8")
    print("README.md rewritten" if old != new else "README.md is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
