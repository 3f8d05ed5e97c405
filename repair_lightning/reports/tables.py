"""A table and how it is written: Markdown and LaTeX by pandas; the page's template shows it as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Table:
    """A title, the cells as texts or numbers, and what a reader must know of them.

    The columns may have two levels: what comes again for each group, and the groups above it.
    """

    title: str
    frame: pd.DataFrame
    note: str = ""
    id: str = ""

    def flat(self) -> pd.DataFrame:
        """The cells under one line of titles: `OP, N = 30`."""
        columns = [", ".join(filter(None, one[::-1])) if isinstance(one, tuple) else one for one in self.frame.columns]
        return self.frame.set_axis(columns, axis=1)

    def text(self, form: str = "pipe") -> str:
        """The cells in a form of `tabulate`'s, Markdown by default; the first column is left-aligned."""
        cells = self.flat().map(lambda cell: str(cell).replace("|", r"\|"))
        align = ["left", *["right"] * (len(cells.columns) - 1)]
        return cells.to_markdown(index=False, disable_numparse=True, colalign=align, tablefmt=form)


def markdown(tables: Sequence[Table], lead: Sequence[str], remarks: Sequence[str]) -> str:
    """Some sentences, the tables, and remarks as a list."""
    parts = list(lead)
    for table in tables:
        parts += [f"## {table.title}", table.text(), table.note]
    parts.append("\n".join(f"- {remark}" for remark in remarks))
    return "\n\n".join(filter(None, parts)) + "\n"


def latex(tables: Sequence[Table]) -> str:
    """The tables as a document that compiles as it is, and serves a paper by `\\input` where the packages `standalone`
    and `booktabs` are loaded."""
    texts = [r"\documentclass[varwidth=\maxdimen, border=6pt]{standalone}", r"\usepackage{booktabs}", r"\begin{document}"]
    for table in tables:
        columns = "l" + "r" * (len(table.frame.columns) - 1)
        cells = table.frame.to_latex(index=False, escape=True, column_format=columns, multicolumn_format="c")
        texts.append(rf"\textbf{{{table.title}}}\par\smallskip")
        texts.append(cells.replace("±", r"$\pm$") + r"\par\bigskip" + "\n")
    return "\n".join([*texts, r"\end{document}", ""])
