"""The pages, rendered as GitHub does; and tools/pages.py, which says what GitHub would show wrong."""
from pathlib import Path

import pytest

from tools import pages

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------------------- the real pages

@pytest.mark.parametrize("page", pages.pages())
def test_page_is_shown_as_it_was_meant(page):
    assert pages.problems(ROOT, page) == []


def test_every_page_is_looked_at():
    """No rule is idle: the pages have maths in sentences and displays, tables, code, pictures and links."""
    names = pages.pages()
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in names]
    formulas = [formula for text in texts for formula in pages.written(text)]
    assert len(names) == 3 + len(pages.lessons()) and {"README.md", "lesson_05/sublesson_a/README.md"} <= set(names)
    assert len(formulas) > 1500 and sum(formula.display for formula in formulas) > 60
    for text in texts[3:]:
        page = pages.page_of(text)
        assert page.tables and page.pictures and page.headings and list(pages.targets(text))
    assert sum(bool(pages.page_of(text).code) for text in texts) > 3
    cells = pages.texts_of_notebook(ROOT, "lesson_13")
    assert len([formula for _, cell in cells for formula in pages.written(cell)]) > 30


# ------------------------------------------------------------------------------------------- the rules

@pytest.mark.parametrize("text, complaint", [
    (r"Fine: $x_t$, ($a_{t-1}$), *with $\bar\alpha_t$ in it*, $\lbrace 0, 1 \rbrace$ and $\Vert x \Vert^2$.", None),
    ("Fine:\n\n$$a = b \\cr\nc$$\n\n> and $x$\n>\n> $$y_i$$\n\n- too\n\n  $$z$$", None),
    ("Costs 5$ or `$x$`:\n\n```bash\necho $HOME $a\\,b$\n```\n<!-- cell: python\n'$a\\,b$' -->", None),
    (r"$a\,b$", r"eats the backslash of \,"),
    (r"$\|x\|$", r"eats the backslash of \|"),
    ("$$a \\\\\nb$$", r"eats the backslash of \\"),
    (r"$D^*$ and $E^*$", "comes out as text"),                         # the stars pair
    (r"$\mathbb{E}_{x}$ and $\mathbb{E}_{y}$", "comes out as text"),    # the underscores pair
    ("a$x$", "comes out as text"),
    ("$x$s", "comes out as text"),
    ("9$x$", "comes out as text"),
    ("-$x$", "comes out as text"),
    ("$x$2", "comes out as text"),
    (r"\$x and y\$", "GitHub takes this for maths"),
    ("$a <b c> d$", "have a space on both sides"),                      # a tag of HTML
    ("$a<b$", "have a space on both sides"),
    ("$[a](b)$", "comes out as text"),                                  # a link
    ("| a |\n|---|\n| $p(x|y)$ |", "comes out as text"),                # a cell ends at the bar
    ("$x\n+ y$", "stands on one line"),
    ("$$x\n+ y$$", "a line that begins with +"),
    ("$$x\n- y$$", "a line that begins with -"),
    ("so:\n$$x$$", "a display stands alone"),
    ("$$x$$\nis", "a display stands alone"),
    ("so $$x$$.", "a display stands alone"),
    ("$$x$$\n$$y$$", "a display stands alone"),
    (r"$\alhpa$", r"\alhpa is not among the commands"),
    (r"$\operatorname{div} v$", r"\operatorname is not among the commands"),
    (r"$\frac{a}{b$", "do not pair"),
    (r"$\left(a$", "do not pair"),
    (r"$\begin{aligned} a$", "do not pair"),
    ("$$" + r"\frac{a + b + c + d}{e} = " * 12 + "$$", "px wide, the column has 838"),
    ("*the end is $x$*", "at the very end of emphasis"),
    ("[a $x$](https://example.org)", "no maths within a link"),
    ("$`x`$", "maths in backticks"),
    ("```math\nx\n```", "maths in backticks"),
])
def test_maths(text, complaint):
    found = [what for _, what in pages.wrong_maths(text)]
    assert found == [] if complaint is None else any(complaint in what for what in found), found


def test_the_line_of_a_problem_is_named(tmp_path):
    text = "# Title\n\nfine\n\n$a\\,b$\n\n| a |\n|---|\n| `" + "x" * 200 + "` |\n"
    assert [line for line, _ in pages.wrong_maths(text)] == [5]
    assert [line for line, _ in pages.wide_tables(text)] == [7]


def row(*cells):
    return "| a |" + " b |" * (len(cells) - 1) + "\n|" + "---|" * len(cells) + "\n| " + " | ".join(cells) + " |\n"


@pytest.mark.parametrize("cells, wide", [
    (["word " * 300], False),                                           # words wrap
    (["word " * 300] * 6, False),
    (["`" + "x" * 85 + "`"], False), (["`" + "x" * 105 + "`"], True),   # code without a space does not
    (["x" * 15] * 5, False), (["x" * 15] * 7, True),
    (["**" + "x" * 15 + "**"] * 6, True),                               # bold is wider
    (['<img src="a.png" width="160" alt="a picture">'] * 4, False),
    (['<img src="a.png" width="160" alt="a picture">'] * 5, True),
    (["![a picture](a.png)"], True),                                    # as wide as it happens to be
    ([r"$\frac{a + b + c}{d} + e + f$"] * 4, False), ([r"$\frac{a + b + c}{d} + e + f$"] * 7, True),
])
def test_width_of_a_table(cells, wide):
    assert bool(list(pages.wide_tables(row(*cells)))) == wide


@pytest.mark.parametrize("formula, pixels", [                           # as Chromium shows them with MathJax 3
    (r"x_t = \sqrt{\bar\alpha_t} x_0 + \sqrt{1 - \bar\alpha_t} \epsilon", 220),
    (r"\tilde\beta_t = \frac{1-\bar\alpha_{t-1}}{1-\bar\alpha_t} \beta_t", 160),
    (r"L_\text{simple} = \mathbb E_{t, x_0, \epsilon}\left\Vert \epsilon - \epsilon_\theta(x_t, t) \right\Vert^2", 290),
])
def test_width_of_a_formula(formula, pixels):
    assert pages.formula_width(formula) == pytest.approx(pixels, rel=0.2)


@pytest.mark.parametrize("rule, good, bad", [
    (pages.wide_code, "```\n" + "x" * 98 + "\n```\n\n```mermaid\n" + "x" * 200 + "\n```", "```\n" + "x" * 99 + "\n```"),
    (pages.riddles, "instead of, in its place", "a U-Net in\nthe place of a RefineNet"),
    (pages.blind_pictures, "![A digit](a.png)", "![](a.png)"),
    (pages.blind_pictures, '<img src="a.png" alt="A digit">', '<img src="a.png">'),
    (pages.too_many_words, "<details>\n\n" + "word " * 2501 + "\n\n</details>\n\nword " + "`code` $a + b$ " * 1200,
     "word " * 2501),
    (pages.wrong_order, "".join(f"## {name} 01\n" for name in pages.ORDER), "## Results\n## Run it\n"),
])
def test_rule(rule, good, bad):
    assert list(rule(good)) == [] and len(list(rule(bad))) == 1


@pytest.mark.parametrize("target, wrong", [
    ("other.md", None), ("other.md#a-heading", None), ("#here", None), ("lesson", None),
    ("https://example.org/x", None), ("missing.md", "no such file"), ("#there", "no such heading"),
    ("other.md#a-headline", "no such heading"),
    ("../outside.md", "no such file"), ("/other.md", "no such file"),
])
def test_links(tmp_path, target, wrong):
    (tmp_path / "root/lesson").mkdir(parents=True)
    (tmp_path / "root/other.md").write_text("# A `heading`\n")
    (tmp_path / "outside.md").write_text("outside\n")
    for text in (f"# Here\n[x]({target})\n", f"# Here\n![x]({target})\n", f'# Here\n<a href="{target}">x</a>\n',
                 f'# Here\n<img src="{target}">\n'):
        (tmp_path / "root/page.md").write_text(text)
        found = list(pages.broken_links(text, "page.md", tmp_path / "root"))
        assert found == [] if wrong is None else found[0] == (2, f"{target}: there is {wrong}"), text
    assert list(pages.broken_links(f"`[x]({target})`\n", "page.md", tmp_path / "root")) == []


# ------------------------------------------------------------------------------------------- the command

def test_command(capsys):
    assert pages.main(["--help"]) == 0 and "python -m tools.pages" in capsys.readouterr().out
    assert pages.main(["lesson_77"]) == 2 and "no lesson lesson_77" in capsys.readouterr().err
    assert pages.main(["05b"]) in (0, 1)
    out = capsys.readouterr().out
    assert out.startswith("lesson_05/sublesson_b/README.md:") or out == "1 pages: nothing is wrong\n"
