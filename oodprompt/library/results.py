"""What an evaluation says: accuracies, groups and classes as tables, and a picture."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oodprompt.reports.results import groups_figure, method_title
from oodprompt.reports.style import percent

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_GROUPS = ("class", "attribute", "num_samples", "num_train", "accuracy")


@dataclass(frozen=True)
class Results:
    """The evaluation of a run on a split; accuracies are fractions from 0 to 1. A notebook shows it as a picture.

    ``content`` has what results.json has of it: ``accuracy``, ``worst_group_accuracy``, ``groups``, ``classes``, ...
    """

    content: Mapping[str, Any]

    @property
    def accuracy(self) -> float:
        """The share of images that are classified rightly."""
        return self.content["accuracy"]

    @property
    def worst_group(self) -> float | None:
        """Worst-group accuracy: the lowest of any group (class, attribute); None where no image has an attribute."""
        return self.content["worst_group_accuracy"]

    @property
    def gap(self) -> float | None:
        """Accuracy minus worst-group accuracy; None where no image has an attribute."""
        return self.content["gap"]

    @property
    def groups(self) -> pd.DataFrame:
        """A row for each group: class, attribute, num_samples, num_train, accuracy. Empty without attributes."""
        return _frame(self.content["groups"], _GROUPS)

    @property
    def classes(self) -> pd.DataFrame:
        """A row for each class: class, num_samples, accuracy."""
        return _frame(self.content["classes"], ("class", "num_samples", "accuracy"))

    def figure(self) -> Figure:
        """Accuracy of each group, or of each class without attributes, as bars (matplotlib)."""
        return groups_figure(dict(self.content))

    def show(self) -> None:
        """Show the picture in a notebook; elsewhere print the numbers."""
        try:
            from IPython import get_ipython
            from IPython.display import display
        except ImportError:
            get_ipython = None
        if get_ipython is None or get_ipython() is None:
            print(self)
            print((self.groups if len(self.groups) else self.classes).to_string(index=False))
        else:
            display(self)

    def __str__(self) -> str:
        worst = "" if self.worst_group is None else f", worst group {percent(self.worst_group)}"
        where = f"{self.content['dataset']} ({self.content['split']}, {self.content['num_samples']:,} images)"
        return f"{method_title(dict(self.content))} on {where}: accuracy {percent(self.accuracy)}{worst}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        stream = io.BytesIO()
        self.figure().savefig(stream, format="png", dpi=80)
        picture = base64.b64encode(stream.getvalue()).decode()
        return f'<p>{html.escape(str(self))}</p><img alt="accuracy by group" src="data:image/png;base64,{picture}">'


def _frame(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(rows, columns=None if rows else pd.Index(columns))
