"""What all reports share: colours, numbers in words, tables, and parts of figures."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from oodprompt.files import write_atomically
from oodprompt.log import optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, RED, GREY, GREEN = "#3465a4", "#cc3333", "#888888", "#4e9a06"


# ---- numbers and names in words


def percent(value: float | None) -> str:
    """A fraction in per cent with one decimal, as tables show it; "-" for None."""
    return "-" if value is None else f"{100 * value:.1f} %"


def whole_percent(value: float) -> str:
    """A fraction in whole per cent; with one decimal where rounding would make it all or nothing."""
    hundredths = 100 * value
    if hundredths in (0, 100) or 0.5 < hundredths < 99.5:
        return f"{hundredths:.0f} %"
    return f"{min(max(hundredths, 0.1), 99.9):.1f} %"


def number(value: float | None) -> str:
    """A number with two decimals and a true minus sign; "none" for None."""
    return "none" if value is None else f"{value:.2f}".replace("-", "−")


def signed(value: float) -> str:
    """A number with two decimals and its sign; "0.00" where it rounds to zero."""
    return f"{value:+.2f}".replace("-", "−") if abs(value) >= 0.005 else "0.00"


def count(quantity: int, noun: str, plural: str = "") -> str:
    """A quantity of something: "1 image", "2,000 images"; ``plural`` where an s does not make it."""
    return f"{quantity:,} {noun if quantity == 1 else plural or noun + 's'}"


def listing(words: Sequence[str], most: int = 8) -> str:
    """The words as "a, b and c"; of more than ``most``, the first ones and how many others there are."""
    words = list(words) if len(words) <= most else [*words[:most], f"{len(words) - most} more"]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" and {words[-1]}"


# ---- tables


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown. Cells are written as they are, except that ``|``, which would end a cell, is escaped."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return tabulate(cells, headers=header, tablefmt="github", disable_numparse=True)


# ---- parts of figures


def literal(text: str) -> str:
    """A user's text for a figure. Two dollar signs would enclose a formula, so they are escaped."""
    return text.replace("$", r"\$")


def new_figure(width: float, height: float, layout: Any = "constrained") -> Figure:
    """An empty figure of that size in inches. Matplotlib is imported here: a run need not wait for it before it trains."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def epoch_axis(axes: Axes) -> None:
    """The x axis counts epochs: its name, whole numbers only, and a faint grid."""
    axes.set_xlabel("epoch")
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)


def bar_axis(axes: Axes, label: str) -> None:
    """Horizontal bars of accuracies in per cent: the first on top, with room for the number beside a bar of 100."""
    axes.set_xlim(0, 114)
    axes.set_xlabel(label)
    axes.invert_yaxis()


def write_in_cells(
    axes: Axes, values: Sequence[Sequence[float]], is_dark: Callable[[float], bool], fontsize: int
) -> None:
    """Write each number of an image of a matrix into its cell, in white where the colour of the cell ``is_dark``."""
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            colour = "white" if is_dark(value) else "black"
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=fontsize)


def draw(path: str | Path, make: Callable[[], Figure | None]) -> list[Path]:
    """Draw a figure and save it as PNG, or say in a line why not; returns the paths of what was written.

    Where ``make`` returns None there is nothing to draw.
    """
    path = Path(path)
    with optional(path.name):
        if (figure := make()) is not None:
            write_figure(figure, path)
            return [path]
    return []


def write_figure(figure: Figure, path: str | Path) -> None:
    """Save a figure as PNG. The file appears whole or not at all; raises ``UserError`` where it cannot be written."""
    buffer = io.BytesIO()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).print_png(buffer)
    write_atomically(path, buffer.getvalue())
