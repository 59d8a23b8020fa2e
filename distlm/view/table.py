"""Tables of text: they fit into a terminal as far as their columns allow, and are whole where a program reads them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from distlm.console import printable

_GAP = "  "
_SHORTEST = 8


@dataclass(frozen=True)
class Column:
    """What may happen where the terminal is too narrow: `gives_way` is cut off, with an ellipsis; `may_go` is left out,
    the last such column first. Others stay whole."""

    title: str
    align: Literal["left", "right"] = "left"
    gives_way: bool = False
    may_go: bool = False


def table(columns: Sequence[Column], rows: Sequence[Sequence[object]], width: int | None = None) -> list[str]:
    """A header and a line for each row; None is shown as "-". `width`: in characters; None: that of the terminal, or no
    limit where stdout is none."""
    from rich.cells import cell_len

    if width is None and sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
    texts = [[column.title for column in columns]]
    texts += [["-" if cell is None else printable(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, cells)) for cells in zip(*texts, strict=True)]
    shown = list(range(len(columns)))

    def excess() -> int:
        total = sum(widths[place] for place in shown) + len(_GAP) * (len(shown) - 1)
        return total - width if width else 0

    for place, column in enumerate(columns):
        if column.gives_way:
            widths[place] = max(min(widths[place], _SHORTEST), widths[place] - max(0, excess()))
    for place in [place for place in reversed(shown) if columns[place].may_go]:
        if excess() > 0:
            shown.remove(place)
    return [
        _GAP.join(_fitted(line[place], widths[place], columns[place].align) for place in shown).rstrip()
        for line in texts
    ]


def _fitted(text: str, width: int, align: str) -> str:
    """In terminal cells, of which East Asian characters take two."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) > width:
        text = set_cell_size(text, width - 1).rstrip() + "…"
    padding = " " * (width - cell_len(text))
    return padding + text if align == "right" else text + padding
