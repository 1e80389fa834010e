"""Hold the pages to what GitHub, Jupyter and Colab can show.

    python -m tools.pages                what is wrong with any page, one line each; exit 1 if there is anything
    python -m tools.pages lesson_05a     the same for one lesson

GitHub runs Markdown first and looks for maths in what comes out: a backslash before punctuation is gone by then,
pairs of `_` and `*` are emphasis, and a `$` that touches a letter or a digit is a dollar. So every page, and every
text of its notebook, is rendered here with GitHub's own Markdown (cmark-gfm), and the maths that comes out is compared
with the maths that was written. What Markdown lets through must also be known to MathJax and fit the column.
"""
import re
import sys
from collections import namedtuple
from difflib import SequenceMatcher
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import cmarkgfm
from cmarkgfm.cmark import Options

from tools import cells, frontpage, notebook

ROOT = Path(__file__).resolve().parent.parent
COLUMN = 838                                           # pixels of text on a page of GitHub,
CODE = 98                                              # or characters of code
WORDS = 2500                                           # of a lesson, outside of <details>
BESIDE = "README.md", "CONTRIBUTING.md", "REFERENCE.md"
ORDER = ["The paper in three sentences", "The idea and its equations", "Run it", "Results", "The claim",
         "What is new since lesson", "From equation to line", "Differences from the paper", "If it looks wrong",
         "Questions readers ask", "Exercises"]         # the first lesson has nothing that it is new since

# Every command that the pages use, all of letters. MathJax (GitHub, Jupyter, Colab) knows them; a new one comes here
# after a look at it. Not among them: \operatorname and \newcommand, which GitHub refuses.
GREEK = """alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi pi rho sigma tau phi varphi
    chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell nabla partial infty varnothing dots ldots
    cdots hbar""".split()
BETWEEN = """mid to gets leftarrow rightarrow sim approx propto le ge lt gt ne in times cdot pm bmod equiv odot circ
    Rightarrow mapsto ll gg ast land parallel star oplus otimes subset setminus top""".split()
NAMES = "log ln exp sin cos tan arctan min max dim sup inf det lim arg gcd tanh Pr".split()
BIG = "sum prod int bigcup".split()
DELIMITERS = "lbrace rbrace Vert lVert rVert vert lvert rvert langle rangle lfloor rfloor lceil rceil prime".split()
SPACES = {"quad": 1, "qquad": 2, "thinspace": 1 / 6, "enspace": 0.5}
ACCENTS = "bar tilde hat dot ddot vec overline widehat widetilde sqrt underbrace overbrace boxed not".split()
FONTS = "text mathrm mathbb mathcal mathbf boldsymbol texttt textbf textit mathsf mathit".split()
STACKED = "frac tfrac dfrac binom underset overset".split()
SIZES = "left right big Big bigg Bigg bigl bigr Bigl Bigr middle displaystyle textstyle limits nolimits".split()
ROWS = "begin end cr".split()
KNOWN = {*GREEK, *BETWEEN, *NAMES, *BIG, *DELIMITERS, *SPACES, *ACCENTS, *FONTS, *STACKED, *SIZES, *ROWS}


# ---------------------------------------------------------------------- the maths as it was written
Formula = namedtuple("Formula", "text display line alone")
# Fences, comments and inline code hold no maths.
NO_MATHS = (r"(?ms:^[ >]*(?P<fence>`{3,}|~{3,})(?:(?!`*$).)*$.*?^[ >]*(?P=fence)[`~]*[ ]*$)|(?s:<!--.*?-->)"
            r"|(?<!`)(?P<tick>`+)(?!`)(?s:.+?)(?<!`)(?P=tick)(?!`)")
WRITTEN = re.compile(NO_MATHS + r"|"
                     r"(?s:\$\$(?P<display>.+?)\$\$)|(?<!\\)\$(?P<inline>(?!\s)(?:(?!\n\n)[^$])+?)(?<!\s)\$")


def written(page):
    """The formulas of a page, in order."""
    for match in WRITTEN.finditer(page):
        text = match["display"] or match["inline"]
        if text:
            before, after = page[:match.start()], page[match.end():]
            alone = re.search(r"(\A|\n[ >]*\n)[ >]*\Z", before) and re.match(r"[ ]*(\n[ >]*(\n|\Z)|\Z)", after)
            yield Formula(text, bool(match["display"]), before.count("\n") + 1, bool(alone))


# ---------------------------------------------------------------------- the page as GitHub shows it
Run = namedtuple("Run", "text line tags end")          # a stretch of text, the tags around it, the tag that ends it
Table = namedtuple("Table", "rows line")               # rows of cells of pieces (kind, text or width)


class Page(HTMLParser):
    """A rendered page: stretches of text between two tags, tables, pictures, headings, the number of words."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.runs, self.tables, self.pictures, self.headings = [], [], [], []
        self.open, self.text, self.words, self.line = [], "", 0, 1
        self.code = []                                 # blocks of code: [line, language, text]
        self.feed(cmarkgfm.github_flavored_markdown_to_html(
            text, Options.CMARK_OPT_UNSAFE | Options.CMARK_OPT_SOURCEPOS))
        self.close()
        self.end_run("")

    def end_run(self, tag):
        if self.text and not {"code", "pre"} & set(self.open):
            self.runs.append(Run(self.text, self.line, tuple(self.open), tag))
        self.text = ""

    def handle_starttag(self, tag, attributes):
        self.end_run(tag)
        attributes = dict(attributes)
        if "data-sourcepos" in attributes:
            self.line = int(attributes["data-sourcepos"].partition(":")[0])
        if tag == "table":
            self.tables.append(Table([], self.line))
        elif tag == "tr" and "table" in self.open:
            self.tables[-1].rows.append([])
        elif tag in ("td", "th") and "table" in self.open:
            self.tables[-1].rows[-1].append([])
        elif re.fullmatch(r"h\d", tag):
            self.headings.append("")
        elif tag == "pre":
            self.code.append([self.line, attributes.get("lang", ""), ""])
        elif tag == "img":
            self.pictures.append((self.line, attributes))
            self.piece("picture", int(attributes.get("width", COLUMN)))
        if tag not in ("img", "br", "hr", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        self.end_run("/" + tag)
        if tag in self.open:
            del self.open[len(self.open) - 1 - self.open[::-1].index(tag):]

    def handle_data(self, data):
        self.text += data
        if not {"details", "pre"} & set(self.open):
            self.words += len(re.sub(r"\$[^$]+\$", "formula", data).split())
        if self.open and re.fullmatch(r"h\d", self.open[0]):
            self.headings[-1] += data
        if self.open[-2:] == ["pre", "code"]:
            self.code[-1][2] += data
        self.piece("code" if "code" in self.open else "bold" if {"th", "strong"} & set(self.open) else "text", data)

    def piece(self, kind, what):
        if {"td", "th"} & set(self.open):
            self.tables[-1].rows[-1][-1].append((kind, what))


page_of = cache(Page)


# As GitHub looks for maths in a stretch of text: a sign that touches a letter or a digit is a dollar.
SHOWN = re.compile(r"\$\$(?P<display>[^$]+)\$\$|(?<![\w$\\-])\$(?P<inline>(?!\s)[^$\n]+?(?<!\s))\$(?![\w$])")


def shown(page):
    """The formulas that GitHub finds in a rendered page, in order, each with the stretch of text that holds it."""
    for run in page.runs:
        for match in SHOWN.finditer(run.text):
            yield " ".join((match["display"] or match["inline"]).split()), bool(match["display"]), run


# ---------------------------------------------------------------------- rules for one formula
def flaws(formula):
    """What is wrong with a formula as it is written."""
    text = formula.text
    for sign in sorted(set(re.findall(r"\\[^a-zA-Z]", text))):
        yield f"Markdown eats the backslash of {sign}: use a command of letters: \\Vert, \\lbrace, \\cr, \\quad"
    for name in sorted(set(re.findall(r"\\([a-zA-Z]+)", text)) - KNOWN):
        yield f"\\{name} is not among the commands of tools/pages.py: see that GitHub shows it, then add it there"
    if not formula.display and "\n" in text:
        yield "a formula within a sentence stands on one line"
    if re.search(r"[<>](?! )|(?<! )[<>]", text):
        yield "< and > have a space on both sides, or are \\lt and \\gt"
    if formula.display and not formula.alone:
        yield "a display stands alone, with an empty line before and after it"
    if formula.display and (start := re.search(r"\n\s*[-+*=#>]", text)):
        yield f"a line that begins with {start[0].strip()} is a list or a heading to Markdown"
    if text.count("{") != text.count("}") or text.count("\\left") - text.count("\\leftarrow") != len(
            re.findall(r"\\right(?!arrow)", text)) or text.count("\\begin") != text.count("\\end"):
        yield "braces, \\left and \\right, or \\begin and \\end do not pair"
    if formula.display and (width := formula_width(text)) > COLUMN:
        yield f"about {width:.0f} px wide, the column has {COLUMN}: break it"


# ---------------------------------------------------------------------- widths, roughly
EM = 19                                                # pixels: MathJax makes maths as tall as the text


def formula_width(text):
    """Pixels that a formula takes, give or take a fifth: the widest of its rows."""
    text = re.sub(r"\\(begin|end)\{\w+\}", "", text)
    return EM * max(row_width(row) for row in re.split(r"\\cr\b", text))


def row_width(text):
    """The width of a row in units of the font's size."""
    total, stack = 0.0, tokens(text)

    def argument():
        """The next token or group, taken off the stack."""
        while stack and stack[0].isspace():
            stack.pop(0)
        if not stack:
            return ""
        first = stack.pop(0)
        if first != "{":
            return first
        depth, taken = 1, []
        while stack and depth:
            depth += {"{": 1, "}": -1}.get(stack[0], 0)
            taken.append(stack.pop(0))
        return "".join(taken[:-1])

    while stack:
        token = stack.pop(0)
        name = token[1:]
        if token in "{}&" or token.isspace() or name in SIZES:
            continue
        if token in "_^":
            small = row_width(argument())
            if stack and stack[0] in "_^" and stack[0] != token:                 # one above the other
                stack.pop(0)
                small = max(small, row_width(argument()))
            total += 0.7 * small
        elif name in STACKED:
            top, bottom = row_width(argument()), row_width(argument())
            total += max(top, bottom) * (0.7 if name == "tfrac" else 1) + 0.25
        elif name in FONTS:
            total += 0.5 * len(argument()) if name != "mathbb" and name != "mathcal" else 0.7 * len(argument())
        elif name in ACCENTS:
            total += row_width(argument()) + (0.85 if name == "sqrt" else 0)
        elif token[0] == "\\":
            total += (SPACES[name] if name in SPACES else 0.5 * len(name) + 0.17 if name in NAMES else
                      1.2 if name in BIG else 1.2 if name in BETWEEN else 0.5 if name in DELIMITERS else 0.58)
        else:
            total += {"=": 1.33, "<": 1.33, ">": 1.33, "+": 1.2, "-": 1.2, ",": 0.45, ".": 0.28, ";": 0.45, "'": 0.3,
                      "(": 0.39, ")": 0.39, "[": 0.28, "]": 0.28, "|": 0.28, "!": 0.28, "/": 0.5, ":": 0.8,
                      }.get(token, 0.75 if token.isupper() else 0.52)
    return total


def tokens(text):
    return re.findall(r"\\[a-zA-Z]+|\\.|\s+|.", text, re.DOTALL)


@cache
def font(mono, bold):
    import matplotlib
    from PIL import ImageFont

    name = f"DejaVuSans{'Mono' if mono else ''}{'-Bold' if bold else ''}.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf", name)), 16)


def table_width(table):
    """Pixels that a table needs at least: of each column the widest thing that cannot be broken.

    Words break at spaces and hyphens. They are measured in DejaVu Sans, which is a tenth wider than what GitHub
    uses; code is set at 85 %, and a cell has 13 px on both sides.
    """
    columns = max(len(row) for row in table)
    width = 1.0
    for number in range(columns):
        cells = [row[number] for row in table if number < len(row)]
        width += 27 + max((piece_width(*piece) for cell in cells for piece in cell), default=0)
    return width


def piece_width(kind, what):
    """The widest part of a piece of a cell that cannot be broken."""
    if kind == "picture":
        return what
    if kind == "code":
        return 11 + 0.85 * max((font(True, False).getlength(word) for word in what.split()), default=0)
    found = [formula_width(match["inline"] or match["display"]) for match in SHOWN.finditer(what)]
    for word in re.split(r"\s+|(?<=-)", SHOWN.sub(" ", what)):
        found.append(0.9 * font(False, kind == "bold").getlength(word))
    return max(found)


# ---------------------------------------------------------------------- what is wrong: (line, sentence)
def wrong_maths(text):
    """What GitHub, Jupyter or Colab would not show as it was meant."""
    page, formulas = page_of(text), list(written(text))
    flawed = {formula: list(flaws(formula)) for formula in formulas}
    for formula in formulas:
        yield from ((formula.line, f"{brief(formula.text)}: {flaw}") for flaw in flawed[formula])
    found = list(shown(page))
    want, have = [(" ".join(one.text.split()), one.display) for one in formulas], [one[:2] for one in found]
    for action, a, b, c, d in SequenceMatcher(None, want, have, autojunk=False).get_opcodes():
        if action == "insert":
            yield found[c][2].line, f"GitHub takes this for maths: {brief(found[c][0])}"
        elif action != "equal":
            out = ", ".join(brief(one) for one, _ in have[c:d]) or "text"
            yield from ((formula.line, f"{brief(formula.text)} comes out as {out}")
                        for formula in formulas[a:b] if not flawed[formula])
    for formula, _, run in found:
        if "a" in run.tags:
            yield run.line, f"{brief(formula)}: GitHub shows no maths within a link"
        if run.end in ("/em", "/strong") and run.text.endswith(formula + "$"):
            yield run.line, f"{brief(formula)}: at the very end of emphasis it stays a dollar: let a full stop follow"
    backticks = [run.line for run in page.runs if run.end == "code" and run.text.endswith("$")]
    for line in backticks + [line for line, language, _ in page.code if language == "math"]:
        yield line, "maths in backticks is GitHub's alone: write $...$ or $$...$$"


def wide_tables(text):
    """Tables whose right side GitHub cuts off."""
    for table in page_of(text).tables:
        if (width := table_width(table.rows)) > COLUMN:
            head = ", ".join(" ".join(str(what) for _, what in cell) for cell in table.rows[0])
            yield table.line, f"the table of {brief(head)} is about {width:.0f} px wide, the column has {COLUMN}"


def wide_code(text):
    """Lines of code of which GitHub shows the beginning only. It draws Mermaid, so that is no code."""
    for line, language, code in page_of(text).code:
        if language != "mermaid":
            for number, row in enumerate(code.splitlines(), 1):
                if len(row) > CODE:
                    yield line + number, f"{len(row)} characters of code on a line, the column has {CODE}: {brief(row)}"


def too_many_words(text):
    """A page is read in one sitting: what is longer is folded."""
    if (words := page_of(text).words) > WORDS:
        yield 1, f"{words:,} words outside <details>, at most {WORDS:,}"


def riddles(text):
    """Turns of phrase that the course does not use."""
    for match in re.finditer(r"\bin\s+the\s+place\s+of\b", text):
        yield text.count("\n", 0, match.start()) + 1, "write 'instead of', not 'in the place of'"


def blind_pictures(text):
    """Pictures that say nothing to whoever cannot see them."""
    for line, attributes in page_of(text).pictures:
        if len(attributes.get("alt") or "") < 4:
            yield line, f"the picture {attributes.get('src')} has no alt text"


def broken_links(text, page, root=ROOT):
    """Links and pictures of the page (a path within root) that lead nowhere."""
    for target, line in targets(text):
        if re.match(r"[a-z]+:", target):               # another host
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (root / page).parent / path if path else root / page
        if path.startswith("/") or not file.exists() or not file.resolve().is_relative_to(root.resolve()):
            yield line, f"{target}: there is no such file"
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text(encoding="utf-8")):
            yield line, f"{target}: there is no such heading"


def targets(text):
    """(target, line) of the links and pictures of a page; code and maths hold none."""
    for pattern in (cells.PICTURE, cells.SOURCE, cells.LINK, cells.ANCHOR):
        for match in pattern.finditer(text):
            if match["target"]:
                yield match["target"], text.count("\n", 0, match.start("target")) + 1


def anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in page_of(text).headings}


def wrong_order(text):
    """The sections of a lesson, in the order in which it is read."""
    found = re.findall(r"^## +(.+?) *$", re.sub(NO_MATHS, "", text), re.M)
    names = [next((name for name in ORDER if title.startswith(name)), title) for title in found]
    if names not in (ORDER, [name for name in ORDER if name != "What is new since lesson"]):
        yield 1, f"its sections are {', '.join(names)}; they should be {', '.join(ORDER)}"


def brief(text, most=60):
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most - 3] + "..."


# ---------------------------------------------------------------------- all pages
def lessons(root=ROOT):
    """The folders of the finished lessons."""
    return [lesson["folder"] for lesson in frontpage.load_lessons(root) if lesson["state"] == "ready"]


def texts_of_notebook(root, lesson):
    """(line in README.md, text) of every text cell that tools/notebook.py builds from the page."""
    made, lines = notebook.make(root, lesson)
    return [(lines[cell.id], cell.source) for cell in made.cells if cell.cell_type == "markdown"]


# What the tests hold every page to, and what they hold those of the lessons to besides.
HELD = wrong_maths, wide_tables, wide_code, riddles, blind_pictures, broken_links
WANTED = too_many_words, wrong_order


def problems(root, page, rules=HELD + WANTED):
    """What is wrong with a page and with the texts of its notebook, one line each."""
    text, lesson = (root / page).read_text(encoding="utf-8"), page.rpartition("/")[0]
    found = [one for rule in rules if lesson or rule not in WANTED
             for one in (rule(text, page, root) if rule is broken_links else rule(text))]
    for start, cell in texts_of_notebook(root, lesson) if lesson and wrong_maths in rules else ():
        found += [(start + line - 1, f"{what} (in the notebook)") for line, what in wrong_maths(cell)
                  if not any(what == known for _, known in found)]
    return [f"{page}:{line}: {what}" for line, what in sorted(found)]


def pages(root=ROOT):
    """Every page: those of the finished lessons and those beside them."""
    return [*BESIDE, *(f"{folder}/README.md" for folder in lessons(root))]


def main(argv=None, root=ROOT):
    argv = sys.argv[1:] if argv is None else argv
    if any(name.startswith("-") for name in argv):
        print(__doc__)
        return 0 if argv in (["-h"], ["--help"]) else 2
    folders = [notebook.folder_of(root, name) for name in argv]
    for name, folder in zip(argv, folders):
        if folder is None:
            print(f"error: no lesson {name} with a README.md", file=sys.stderr)
            return 2
    names = [f"{folder}/README.md" for folder in folders] or pages(root)
    lines = [line for name in names for line in problems(root, name)]
    print("\n".join(lines) if lines else f"{len(names)} pages: nothing is wrong")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
