"""A table of what was held: runs test files and prints cases x columns, for a person who wants to see that none is left out.

    raise SystemExit(matrix.show(["tests/test_x.py"], place))     # place: a test's item -> (row, column), None for what is no case
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

Place = Callable[[pytest.Item], "tuple[str, str] | None"]
WORDS = {"passed": "held", "failed": "FAILED", "skipped": "SKIPPED"}


class _Tally:
    """A pytest plugin that keeps what came of each case: row -> column -> word; several tests of one cell are all held, or the cell is not."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.cells: dict[str, dict[str, str]] = {}
        self.others: list[str] = []             #: tests that are no case of the table and did not pass

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, Any, None]:
        report = (yield).get_result()
        if report.when != "call" and report.passed:
            return
        where, word = self.place(item), WORDS[report.outcome]
        if where is not None:
            row = self.cells.setdefault(where[0], {})
            row[where[1]] = word if row.get(where[1], "held") == "held" else row[where[1]]
        elif word != "held":
            self.others.append(item.nodeid)


def show(files: Sequence[Path | str], place: Place, columns: Sequence[str], arguments: Sequence[str] = ()) -> int:
    """Runs the tests of `files`, prints the table; 0 when every case was held and none skipped. A - stands where there is no such case."""
    tally = _Tally(place)
    status = pytest.main(["-q", "-p", "no:cacheprovider", "--disable-warnings", *map(str, files), *arguments], plugins=[tally])
    width = max(map(len, tally.cells), default=4)
    print("\n" + "case".ljust(width), *columns, sep="  ")
    for row, cells in tally.cells.items():
        print(row.ljust(width), *(cells.get(column, "-").ljust(len(column)) for column in columns), sep="  ")
    words = [word for cells in tally.cells.values() for word in cells.values()]
    print(f"\n{len(tally.cells)} cases, {len(words)} cells: {words.count('held')} held, {words.count('FAILED')} failed, {words.count('SKIPPED')} skipped"
          + (f"; besides: {', '.join(tally.others)}" if tally.others else ""))
    return 0 if words and words.count("held") == len(words) and not tally.others and status == 0 else 1

