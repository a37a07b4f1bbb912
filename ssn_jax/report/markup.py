"""Pages as blocks: a table or pictures as Markdown, and as HTML that needs nothing else."""

import base64
from collections.abc import Sequence
import dataclasses
import html as html_lib
import pathlib
import re

NOTHING = '–'


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
      head: the columns' names.
      lines: cells; the first is the line's name.
      quiet: the lines' numbers that stand back: what is published, and differences to it.
    """

    head: list[str]
    lines: list[list[str]] = dataclasses.field(default_factory=list)
    quiet: set[int] = dataclasses.field(default_factory=set)

    def add(self, *cells: str, quiet: bool = False) -> None:
        """Appends a line."""
        if quiet:
            self.quiet.add(len(self.lines))
        self.lines.append(list(cells))


def markdown(blocks: Sequence[tuple], folder: str) -> str:
    """The page as Markdown; `folder` is where the figures are, from the page.

    Blocks are ('heading', level, text), ('text', text), ('table', Table) and ('pictures', figures),
    which are pairs: a file's name in the folder, and what is seen on it.
    """

    def clean(text: str) -> str:
        return re.sub(r'([\\`*\[\]<|])', r'\\\1', text)

    lines = []
    for kind, *content in blocks:
        match kind:
            case 'heading':
                lines += ['#' * content[0] + ' ' + clean(content[1]), '']
            case 'text':
                lines += [clean(content[0]), '']
            case 'table':
                (table,) = content
                lines += [f'| {" | ".join(table.head)} |', '|---' * len(table.head) + '|']
                for i, cells in enumerate(table.lines):
                    marked = [clean(c) for c in cells]
                    if i in table.quiet:
                        marked = [f'*{c}*' if c else '' for c in marked]
                    lines.append(f'| {" | ".join(marked)} |')
                lines.append('')
            case 'pictures':
                for name, caption in content[0]:
                    caption = clean(caption)
                    lines += [f'![{caption}]({folder}/{name})', '', caption, '']
    return '\n'.join(lines)


# Wide tables and rows of figures scroll by themselves, so that a page fits any screen.
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 0 1rem 3rem;
  max-width: 75rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; } h3 { font-size: 1.05rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid; vertical-align: bottom; }
tbody tr { border-top: 1px solid #8884; }
tbody tr.quiet { border-top: 0; opacity: .7; font-style: italic; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; flex: 1 1 20rem; max-width: 45rem; min-width: 0; }
img { max-width: 100%; height: auto; background: white; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; }
"""


def html(blocks: Sequence[tuple], folder: pathlib.Path) -> str:
    """The page as HTML with its figures, read from `folder`, inside; it runs and loads nothing."""
    clean = html_lib.escape
    parts = []
    for kind, *content in blocks:
        match kind:
            case 'heading':
                parts.append(f'<h{content[0]}>{clean(content[1])}</h{content[0]}>')
            case 'text':
                parts.append(f'<p>{clean(content[0])}</p>')
            case 'table':
                (table,) = content
                head = ''.join(f'<th scope="col">{clean(c)}</th>' for c in table.head)
                parts.append(f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>')
                for i, cells in enumerate(table.lines):
                    quiet = ' class="quiet"' if i in table.quiet else ''
                    parts.append(
                        f'<tr{quiet}>{"".join(f"<td>{clean(c)}</td>" for c in cells)}</tr>'
                    )
                parts.append('</tbody></table></div>')
            case 'pictures':
                parts.append('<div class="figures">')
                for name, caption in content[0]:
                    encoded = base64.b64encode((folder / name).read_bytes()).decode()
                    caption = clean(caption)
                    parts.append(
                        f'<figure><img alt="{caption}" src="data:image/png;base64,{encoded}">'
                        f'<figcaption>{caption}</figcaption></figure>'
                    )
                parts.append('</div>')
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return '\n'.join(
        [
            '<!doctype html>',
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            f'<title>{clean(blocks[0][2])}</title><style>{STYLE}</style></head><body>',
            *parts,
            '</body></html>\n',
        ]
    )
