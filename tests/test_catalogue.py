"""Every mistake of the catalogue, every worked example and every property of the translation has a test that bears its number.

A number stands in the name of a test or in the id of a row: m40 is the mistake, E7 the example, P9 (or property_9) the property.
"""
from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
BOOK = HERE.parents[1] / "shared" / "translation.md"
FILES = ("test_hub", "test_translate_chat", "test_format_messages", "test_format_responses", "test_format_chat", "test_estimate", "test_translation", "test_properties", "test_server")
NUMBERS = {"m": range(1, 126), "E": range(1, 19), "P": range(1, 14)}


def test_every_number_has_a_test() -> None:
    found = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *(str(HERE / f"{name}.py") for name in FILES)],
                           capture_output=True, text=True, timeout=120, cwd=HERE.parent)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    names = " ".join(line.partition("::")[2] for line in found.stdout.splitlines()).replace("_", " ")
    borne = set(re.findall(r"(?<![A-Za-z0-9])([mEP][0-9]+)(?![A-Za-z0-9])", names))
    assert [kind + str(number) for kind, numbers in NUMBERS.items() for number in numbers if kind + str(number) not in borne] == []


@pytest.mark.skipif(not BOOK.exists(), reason="the specification is not beside the checkout (../shared/translation.md)")
def test_the_numbers_are_those_of_the_specification() -> None:
    text = BOOK.read_text(encoding="utf-8")
    parts = dict(zip(re.findall(r"^## (\d+)\. ", text, re.M), re.split(r"^## \d+\. .*$", text, flags=re.M)[1:], strict=True))
    assert sorted(map(int, re.findall(r"^\| (\d+) \| ", parts["7"], re.M))) == list(NUMBERS["m"])
    assert sorted(map(int, re.findall(r"^\*\*E(\d+)\. ", parts["5"], re.M))) == list(NUMBERS["E"])
    assert sorted(map(int, re.findall(r"^(\d+)\. \*\*", parts["10"], re.M))) == list(NUMBERS["P"])
