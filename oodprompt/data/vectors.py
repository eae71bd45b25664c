"""Image features that come in place of images: rows of tables that lie in files and are read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_AT_ONCE = 2**16  # rows that are looked at together
_IS_UNIT = 1e-6  # rows whose length is as near to 1 as this are left as they are, bit for bit


class Vectors:
    """Tables [M_k, d] one behind the other, of any floating type, mostly mapped from files.

    ``rows(index)`` gives rows [n, d] in float32 and L2-normalised; nothing else is copied.
    """

    def __init__(self, tables: Sequence[Tensor]) -> None:
        self.tables = tuple(tables)
        self._starts = np.cumsum([0, *(len(table) for table in self.tables)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def width(self) -> int:
        """d, the number of entries of a row."""
        return int(self.tables[0].shape[1])

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Rows ``index`` [n] -> [n, d] float32, each of length 1."""
        index = np.asarray(index, dtype=np.int64)
        rows = torch.empty(len(index), self.width)
        table = np.searchsorted(self._starts, index, side="right") - 1
        for number in np.unique(table):
            mine = np.flatnonzero(table == number)
            rows[torch.from_numpy(mine)] = self._taken(int(number), index[mine] - self._starts[number])
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return torch.where((length - 1).abs() <= _IS_UNIT, rows, rows / length).numpy()

    def _taken(self, number: int, index: np.ndarray) -> Tensor:
        if len(index) and index[-1] - index[0] == len(index) - 1 and (np.diff(index) == 1).all():
            return self.tables[number][int(index[0]) : int(index[-1]) + 1].float()  # read in one go
        return self.tables[number][torch.from_numpy(index)].float()

    def unusable(self) -> Iterator[tuple[int, str]]:
        """The first row of every table that cannot be used, and why: it is not finite, or it is zero."""
        for start, table in zip(self._starts[:-1].tolist(), self.tables, strict=True):
            for first in range(0, len(table), _AT_ONCE):
                length = torch.linalg.vector_norm(table[first : first + _AT_ONCE].float(), dim=1)
                bad = torch.nonzero(~(torch.isfinite(length) & (length > 0)))
                if len(bad):
                    row = int(bad[0])
                    yield start + first + row, "is zero" if length[row] == 0 else "is not finite (NaN or infinity)"
                    break


class VectorRows:
    """Rows of a table as one view [N, d] of a split: indexed by an array as a memory-mapped file is."""

    def __init__(self, vectors: Vectors, rows: np.ndarray) -> None:
        self._vectors, self._rows = vectors, rows

    @property
    def shape(self) -> tuple[int, int]:
        return len(self._rows), self._vectors.width

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        return self._vectors.rows(self._rows[index])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._vectors.rows(self._rows)
