"""Holds aicarousel.py to its contents list, its banners and what they allow.

Run as a script it prints the outline with today's line numbers: python tests/test_layout.py
"""
from __future__ import annotations

import ast
import re
import symtable
import sys
from pathlib import Path
from typing import NamedTuple

PATH = Path(__file__).resolve().parent.parent / "aicarousel.py"
SOURCE = PATH.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
BANNER = re.compile(r"^#{78}\n# (\d+)\. (.+?) +(pure|I/O) \| uses (.+)\n#{78}\n", re.M)
OUTSIDE = {"asyncio", "ssl", "socket", "sqlite3", "h11", "certifi", "time", "random", "os", "open", "print", "log", "input", "logging", "threading", "mmap", "signal", "secrets", "queue"}
IMPORTED = {alias.asname or alias.name.partition(".")[0] for node in ast.walk(TREE) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}


class Section(NamedTuple):
    number: int
    title: str
    pure: bool
    uses: frozenset[int]
    line: int


def read_numbers(text: str) -> frozenset[int]:
    """The numbers of "1-3, 8": all of them, or none for "-"."""
    found: set[int] = set()
    for part in text.replace("-\n", "").split(","):
        first, _, last = part.strip().partition("-")
        if first:
            found |= set(range(int(first), int(last or first) + 1))
    return frozenset(found)


SECTIONS = [Section(int(match[1]), match[2], match[3] == "pure", read_numbers("" if match[4].strip() == "-" else match[4]), SOURCE.count("\n", 0, match.start()) + 2)
            for match in BANNER.finditer(SOURCE)]


def section_at(line: int) -> Section | None:
    return next((section for section in reversed(SECTIONS) if section.line <= line), None)


def defined_names(node: ast.stmt) -> list[str]:
    """Names that a module-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, (ast.AnnAssign, ast.AugAssign)) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


HOME: dict[str, Section] = {name: section for node in TREE.body for name in defined_names(node) if (section := section_at(node.lineno))}


def globals_of(table: symtable.SymbolTable) -> set[str]:
    """Module-level names read anywhere inside one function or class."""
    own = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global() and symbol.is_referenced()}
    return own.union(*map(globals_of, table.get_children()))


def names_of_statement(node: ast.stmt) -> set[str]:
    """Names a module-level statement reads when the module is imported: tables, bases, decorators, defaults."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        parts: list[ast.AST] = [*node.decorator_list, *node.args.defaults, *(default for default in node.args.kw_defaults if default)]
    elif isinstance(node, ast.ClassDef):
        parts = [*node.decorator_list, *node.bases, *(keyword.value for keyword in node.keywords), *(item for item in node.body if isinstance(item, (ast.Assign, ast.AnnAssign)))]
        parts = [part.value if isinstance(part, ast.AnnAssign) and part.value else part for part in parts if not (isinstance(part, ast.AnnAssign) and part.value is None)]
    else:
        parts = [node.value] if isinstance(node, ast.AnnAssign) and node.value else [] if isinstance(node, ast.AnnAssign) else [node]
    return {name.id for part in parts for name in ast.walk(part) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Load)}


def complaints(names: set[str], here: Section, what: str) -> list[str]:
    wrong = []
    for name in sorted(names):
        there = HOME.get(name, here)
        if there.number != here.number and (there.number not in here.uses or name.startswith("_") and not name.startswith("__")):
            wrong.append(f"{what} ({here.number}. {here.title}) uses {name} ({there.number}. {there.title})")
        if here.pure and name in OUTSIDE and name not in HOME:
            wrong.append(f"{what} ({here.number}. {here.title}, pure) touches {name}")
    return wrong


def test_there_are_sections_and_they_are_numbered_upward() -> None:
    numbers = [section.number for section in SECTIONS]
    assert len(numbers) > 10 and numbers == sorted(set(numbers))


def test_contents_and_banners_agree() -> None:
    contents = [(int(match[1]), match[2].strip()) for match in re.finditer(r"^ {4,5}(\d+)  (\S.*?)(?:  .*)?$", ast.get_docstring(TREE, clean=False) or "", re.M)]
    assert contents == [(section.number, section.title) for section in SECTIONS]


def test_every_banner_uses_only_sections_above_it() -> None:
    known = {section.number for section in SECTIONS}
    for section in SECTIONS:
        assert all(number < section.number for number in section.uses), section
        assert section.uses & known or not section.uses, section


def test_every_banner_is_followed_by_what_to_know() -> None:
    lines = SOURCE.splitlines()
    for section in SECTIONS:
        assert lines[section.line + 1].startswith("# ") and len(lines[section.line + 1]) > 40, section


def test_functions_and_classes_use_only_what_their_banner_allows() -> None:
    wrong: list[str] = []
    for table in symtable.symtable(SOURCE, "aicarousel.py", "exec").get_children():
        here = section_at(table.get_lineno())
        if here is not None:
            wrong += complaints(globals_of(table), here, table.get_name())
    assert not wrong, "\n".join(wrong)


def test_module_level_statements_use_only_what_their_banner_allows() -> None:
    wrong: list[str] = []
    for node in TREE.body:
        here = section_at(node.lineno)
        if here is not None and not isinstance(node, (ast.Import, ast.ImportFrom)):
            wrong += complaints(names_of_statement(node), here, f"line {node.lineno}")
    assert not wrong, "\n".join(wrong)


def test_every_name_is_defined_once() -> None:
    seen: dict[str, int] = {}
    for node in TREE.body:
        if section_at(node.lineno) is None:
            continue
        for name in defined_names(node):
            assert name not in seen, f"{name} is defined at lines {seen[name]} and {node.lineno}"
            seen[name] = node.lineno


def test_what_is_shown_to_others_has_a_docstring() -> None:
    wrong = []
    for node in ast.walk(TREE):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_") and node in TREE.body and not ast.get_docstring(node):
            wrong.append(f"{node.name} at line {node.lineno}")
    assert not wrong, wrong


def test_no_function_is_longer_than_a_screen() -> None:
    wrong = [f"{node.name}: {node.end_lineno - node.lineno + 1} lines" for node in ast.walk(TREE)
             if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno and node.end_lineno - node.lineno + 1 > 62]
    assert not wrong, wrong


def test_only_the_standard_library_h11_and_certifi_are_imported() -> None:
    modules = {(node.module or "").partition(".")[0] if isinstance(node, ast.ImportFrom) else alias.name.partition(".")[0]
               for node in ast.walk(TREE) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    assert modules - sys.stdlib_module_names <= {"h11", "certifi"}


def test_exceptions_are_caught_whole_only_at_the_top_of_a_connection() -> None:
    broad = [section_at(node.lineno).title for node in ast.walk(TREE)      # type: ignore[union-attr]
             if isinstance(node, ast.ExceptHandler) and isinstance(node.type, ast.Name) and node.type.id == "Exception"]
    assert set(broad) <= {"Server"}, broad
    assert not [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.ExceptHandler) and node.type is None]


def outline() -> str:
    rows = []
    for section, after in zip(SECTIONS, [*(next_one.line for next_one in SECTIONS[1:]), SOURCE.count("\n") + 1]):
        uses = ", ".join(map(str, sorted(section.uses))) or "-"
        rows.append(f"{section.number:>3}  {section.title:<20} line {section.line:>5}  {after - section.line:>5} lines  {'pure' if section.pure else 'I/O':<4}  uses {uses}")
    return "\n".join(rows)


if __name__ == "__main__":
    print(outline())
