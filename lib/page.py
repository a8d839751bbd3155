"""A page is a list of blocks; it becomes HTML that opens from disk and needs nothing else, or markdown.

A text in a block is a str, a Code (a command or a name, set as it is), or a tuple of both. Whatever is in it
is shown, never interpreted: both renderers escape it.
"""
import html
import re
from itertools import zip_longest
from typing import NamedTuple


class Code(str):
    """A command, or a name as a file has it."""


class Heading(NamedTuple):
    level: int
    text: object


class Paragraph(NamedTuple):
    text: object


class Table(NamedTuple):
    caption: str
    header: list
    rows: list            # the first cell names the row
    folded: bool = False  # in HTML: opened by a click


class Figure(NamedTuple):
    svg: str      # of lib/charts.py, with a title of its own
    table: Table  # the same in numbers


class Quotes(NamedTuple):
    texts: list


NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+(e-?\d+)?( [±×] [\d.]+)?|–?")


def right_aligned(table):
    """Per column: has it numbers alone?"""
    columns = zip_longest(*table.rows, fillvalue="")
    return [all(not isinstance(cell, tuple) and NUMBER.fullmatch(cell) for cell in column)
            for column in columns]


def count(n):
    return "–" if n is None else f"{n:,.0f}"


def places(value, n):
    """With n decimal places."""
    return "–" if value is None else f"{value:.{n}f}"


# --- HTML -----------------------------------------------------------------------------------------

# Colours by Okabe and Ito, told apart by all eyes; lighter ones on a dark ground.
CSS = """
:root { color-scheme: light dark; --ground: #fdfdfb; --ink: #1d1d1b; --faint: #5c5c57; --line: #d9d9d2;
  --shade: #f2f2ec; --c1: #0072b2; --c2: #c44e00; --c3: #00805c; --c4: #a8487e; --c5: #8a6100; --c6: #3b3b38 }
@media screen and (prefers-color-scheme: dark) { :root { --ground: #171716; --ink: #e6e6e1; --faint: #a3a39c;
  --line: #3a3a37; --shade: #232321; --c1: #56b4e9; --c2: #f0883e; --c3: #2fbf91; --c4: #e09cc4;
  --c5: #e6b422; --c6: #c9c9c4 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 1.0625rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif }
main { max-width: 42rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1, h2, h3 { line-height: 1.25; text-wrap: balance; overflow-wrap: anywhere }
h1 { font-size: 1.9rem; margin: 0 0 1rem }
h2 { font-size: 1.35rem; margin: 3rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line) }
h3 { font-size: 1.0625rem; margin: 2rem 0 .5rem }
p { margin: .75rem 0; overflow-wrap: anywhere }
code { font: .88em/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  background: var(--shade); border-radius: .2em; padding: .1em .3em; overflow-wrap: anywhere }
code span { display: inline-block; max-width: 100% } thead span { white-space: nowrap }
td code { background: none; padding: 0 }
.scroll { overflow-x: auto }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--c1); outline-offset: 2px }
table { border-collapse: collapse; min-width: 100%; font-size: .9rem; line-height: 1.4;
  font-variant-numeric: tabular-nums }
figcaption { color: var(--faint); font-size: .9rem; padding-bottom: .3rem }
th, td { text-align: left; vertical-align: top; padding: .32rem .8rem .32rem 0;
  border-bottom: 1px solid var(--line) }
th:last-child, td:last-child { padding-right: 0 }
thead th { font-weight: 600; color: var(--faint); vertical-align: bottom;
  border-bottom: 1.5px solid var(--faint) }
tbody th { font-weight: 500 }
.n { text-align: right; white-space: nowrap }
thead .n { white-space: normal }
summary { cursor: pointer; color: var(--faint); font-size: .9rem }
details { margin: .75rem 0 }
figure { margin: 1.5rem 0 }
svg { display: block; width: 100%; max-width: 38rem; height: auto; overflow: visible }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  fill: var(--ink) }
svg .tick, svg .label { fill: var(--faint) } svg .end { text-anchor: end } svg .middle { text-anchor: middle }
svg .grid { stroke: var(--line) } svg .chance { stroke: var(--faint); stroke-dasharray: 5 4 }
svg path, svg line { fill: none; stroke-width: 1.2; stroke-linejoin: round } svg .strong { stroke-width: 2.2 }
svg .c1 { stroke: var(--c1) } svg .c2 { stroke: var(--c2) } svg .c3 { stroke: var(--c3) }
svg .c4 { stroke: var(--c4) } svg .c5 { stroke: var(--c5) } svg .c6 { stroke: var(--c6) }
svg .faint { stroke-opacity: .55 } svg .d1 { stroke-dasharray: 8 3 } svg .d2 { stroke-dasharray: 2 3 }
svg .d3 { stroke-dasharray: 9 3 2 3 } svg .body { fill: var(--shade) } svg circle { fill: var(--ground) }
blockquote { margin: 1rem 0; padding: .1rem 0 .1rem 1rem; border-left: 3px solid var(--line);
  white-space: pre-wrap; overflow-wrap: anywhere }
@media (max-width: 30rem) { body { font-size: 1rem } main { padding: 1.5rem 1rem 3rem } }
@media print { body { font-size: 10pt } main { max-width: none; padding: 0 } .scroll { overflow: visible }
  h2, h3, figcaption { break-after: avoid } tr, svg, blockquote { break-inside: avoid }
  details::details-content { content-visibility: visible; display: block } }
"""


def to_html(title, blocks):
    """The page forbids itself to load anything, should an escape ever be forgotten."""
    body = "\n".join(HTML[type(block)](block) for block in blocks)
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f"""<meta http-equiv="Content-Security-Policy" content="default-src 'none'; """
            f"""style-src 'unsafe-inline'">\n"""
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escaped(title)}</title>\n<style>{CSS}</style>\n</head>\n"
            f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n")


def escaped(text):
    """A text as HTML."""
    if isinstance(text, tuple):
        return "".join(map(escaped, text))
    return f"<code>{whole_words(text)}</code>" if isinstance(text, Code) else html.escape(text)


def whole_words(text):
    """Lines end between words, not after the - of a flag or of GPT-2."""
    return " ".join(f"<span>{html.escape(word)}</span>" for word in text.split(" "))


def html_table(table):
    classes = [' class="n"' if right else "" for right in right_aligned(table)]

    def row(cells):
        names = ['th scope="row"', *["td"] * (len(cells) - 1)]
        return "<tr>" + "".join(f"<{name}{kind}>{breakable(escaped(cell))}</{name.split()[0]}>"
                                for name, kind, cell in zip(names, classes, cells)) + "</tr>"
    head = "".join(f'<th scope="col"{kind}>{whole_words(cell)}</th>'
                   for kind, cell in zip(classes, table.header))
    body = "\n".join(map(row, table.rows))
    caption = escaped(table.caption)  # outside of what scrolls
    grid = (f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0"><table>\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>")
    if table.folded:
        return f"<details><summary>{caption}</summary>\n{grid}</details>"
    return f"<figure><figcaption>{caption}</figcaption>\n{grid}</figure>"


def breakable(text):
    return text.replace("_", "_<wbr>")  # long names of tasks


HTML = {
    Heading: lambda block: f"<h{block.level}>{escaped(block.text)}</h{block.level}>",
    Paragraph: lambda block: f"<p>{escaped(block.text)}</p>",
    Table: html_table,
    Figure: lambda block: f"<figure>{block.svg}</figure>\n" + html_table(block.table._replace(folded=True)),
    Quotes: lambda block: "\n".join(f"<blockquote>{escaped(text)}</blockquote>" for text in block.texts),
}


# --- markdown -------------------------------------------------------------------------------------

def to_markdown(blocks):
    return "\n\n".join(MARKDOWN[type(block)](block) for block in blocks) + "\n"


def marked(text, in_table=False):
    """A text as markdown, on one line."""
    if isinstance(text, tuple):
        return "".join(marked(part, in_table) for part in text)
    line = " ".join(text.splitlines())
    if isinstance(text, Code):
        fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
        blank = " " * ("`" in line)
        line = f"{fence}{blank}{line}{blank}{fence}"
        return line.replace("|", r"\|") if in_table else line
    line = re.sub(r"[\\`*\[\]<>|&~$]|\b_|_\b", r"\\\g<0>", line)
    line = re.sub(r"^(\s*)([-+=#])(?=\s|$|\2)", r"\1\\\2", line)  # would begin a list or a heading
    return re.sub(r"^(\s*\d+)([.)])(?=\s|$)", r"\1\\\2", line)


def markdown_table(table):
    lines = [[marked(cell, in_table=True) for cell in row] for row in (table.header, *table.rows)]
    lines.insert(1, ["---:" if right else "---" for right in right_aligned(table)])
    return marked(table.caption) + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


MARKDOWN = {
    Heading: lambda block: "#" * block.level + " " + marked(block.text),
    Paragraph: lambda block: marked(block.text),
    Table: markdown_table,
    Figure: lambda block: markdown_table(block.table),
    Quotes: lambda block: "\n\n".join("\n".join(f"> {marked(line.strip())}" for line in text.splitlines())
                                      for text in block.texts),
}
