"""Section 4, Edits: models.json and .env are changed as text, and what an edit does not touch stays byte for byte."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aicarousel as a
from fakes import ROOT

PRETTY = '{\n  "groq": {\n    "default": "m",\n    "models": [\n      "m",\n      "n"\n    ]\n  }\n}\n'

SET = [
    # text, path, value, after
    ('{"a": 1}', ["a"], 2, '{"a": 2}'),
    ('{"a": 1}', ["b"], 2, '{"a": 1, "b": 2}'),
    ('{"a":1,"b":2}', ["c"], 3, '{"a":1,"b":2,"c":3}'),
    ('{}', ["a"], {"b": 1}, '{\n  "a": {"b": 1}\n}'),
    ('{"a": {}}', ["a", "b"], 1, '{"a": {"b": 1}}'),
    ('{"a": []}', ["a", 0], "x", '{"a": ["x"]}'),
    ('{"a": {"x": 1}}', ["b", "c", "d"], [1], '{"a": {"x": 1}, "b": {"c": {"d": [1]}}}'),
    ('{ "a" : 1 , "b" :\t2 }', ["c"], 3, '{ "a" : 1 , "b" :\t2, "c" :\t3 }'),
    ('{\n\t"a": 1\n}', ["b"], 2, '{\n\t"a": 1,\n\t"b": 2\n}'),
    ('{\r\n  "a": {\r\n    "x": 1\r\n  }\r\n}\r\n', ["b"], {"y": [1]}, '{\r\n  "a": {\r\n    "x": 1\r\n  },\r\n  "b": {\r\n    "y": [\r\n      1\r\n    ]\r\n  }\r\n}\r\n'),
    (PRETTY, ["groq", "models", 2], "o", PRETTY.replace('"n"\n', '"n",\n      "o"\n')),
    (PRETTY, ["groq", "enabled"], False, PRETTY.replace("    ]\n", '    ],\n    "enabled": false\n')),
    (PRETTY, ["groq", "models"], ["p", "q"], PRETTY.replace('"m",\n      "n"', '"p",\n      "q"')),
    (PRETTY, ["new"], {"k": ["a"]}, PRETTY.replace("  }\n}", '  },\n  "new": {\n    "k": [\n      "a"\n    ]\n  }\n}')),
    ('\ufeff{"a": "\\"}"}', ["b"], 'é"', '\ufeff{"a": "\\"}", "b": "é\\""}'),
    ('{"a\\u0041": 1}', ["aA"], 2, '{"a\\u0041": 2}'),
    ('{"a": [1, [2, {"b": null}]]}', ["a", 1, 1, "b"], True, '{"a": [1, [2, {"b": true}]]}'),
]


@pytest.mark.parametrize("text,path,value,after", SET)
def test_a_value_is_set_in_the_way_its_neighbours_are_written(text: str, path: list[Any], value: Any, after: str) -> None:
    assert a.set_json(text, path, value) == after


CUT = [
    ('{"a": 1, "b": 2, "c": 3}', ["a"], '{"b": 2, "c": 3}'),
    ('{"a": 1, "b": 2, "c": 3}', ["b"], '{"a": 1, "c": 3}'),
    ('{"a": 1, "b": 2, "c": 3}', ["c"], '{"a": 1, "b": 2}'),
    ('{"a": 1}', ["a"], '{}'),
    ('{"a": [1, 2]}', ["a", 1], '{"a": [1]}'),
    (PRETTY, ["groq", "models", 0], PRETTY.replace('"m",\n      "n"', '"n"')),
    (PRETTY, ["groq", "models", 1], PRETTY.replace('"m",\n      "n"', '"m"')),
    (PRETTY, ["groq", "models"], PRETTY.replace(',\n    "models": [\n      "m",\n      "n"\n    ]', "")),
]


@pytest.mark.parametrize("text,path,after", CUT)
def test_a_member_goes_with_one_comma(text: str, path: list[Any], after: str) -> None:
    assert a.cut_json(text, path) == after


def test_order_moves_members_with_all_that_is_in_them_and_leaves_what_is_between() -> None:
    text = '{\n  "a": {"x":  1},\n\n  "b": [ 2 ]  ,\n  "c": 3\n}\n'
    assert a.order_json(text, [], [2, 0, 1]) == '{\n  "c": 3,\n\n  "a": {"x":  1}  ,\n  "b": [ 2 ]\n}\n'
    assert a.order_json('{"m": ["a", {"id": "b"}]}', ["m"], [1, 0]) == '{"m": [{"id": "b"}, "a"]}'
    text = (ROOT / "models.json").read_text()
    assert a.order_json(text, [], range(len(json.loads(text)))) == text


values = st.recursive(st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=4), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=12)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=3), values, min_size=1, max_size=4), values, st.sampled_from([None, 2, "\t"]), st.integers(0, 2**32), st.booleans())
def test_any_edit_of_any_file_means_what_it_says(tree: dict[str, Any], value: Any, indent: Any, seed: int, crlf: bool) -> None:
    chance = random.Random(seed)
    text = json.dumps(tree, indent=indent, ensure_ascii=chance.random() < 0.5)
    text = text.replace("\n", "\r\n") if crlf else text
    holder, path = tree, []
    while True:                                  # a random place: an existing member, or a new one
        names = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        name = chance.choice([*names, "new" if isinstance(holder, dict) else len(holder)])
        path.append(name)
        if name not in names or not isinstance(holder[name], (dict, list)) or chance.random() < 0.5:
            break
        holder = holder[name]
    there = name in names
    if there:
        cut = json.loads(a.cut_json(text, path))
    changed = a.set_json(text, path, value)
    order = chance.sample(range(len(names)), len(names))
    ordered = json.loads(a.order_json(text, path[:-1], order))
    for step in path[:-1]:
        ordered = ordered[step]
    assert (list(ordered) if isinstance(holder, dict) else ordered) == [names[index] if isinstance(holder, dict) else holder[index] for index in order]
    if there:
        kept = holder[name]
        del holder[name]
        assert cut == tree
        if isinstance(holder, dict):
            holder[name] = kept
        else:
            holder.insert(name, kept)
    if isinstance(holder, dict) or there:
        holder[name] = value
    else:
        holder.append(value)
    assert json.loads(changed) == tree


ENV = "# keys\nexport A='one'  # first\n\nB=two # second\n#C=old\nA=\"three\"\nD=\n"

ENV_SET = [
    (ENV, "A", "new", ENV.replace('"three"', "new")),
    (ENV, "B", "new", ENV.replace("B=two # second", "B=new # second")),
    (ENV, "D", "new", ENV.replace("D=\n", "D=new\n")),
    (ENV, "C", "new", ENV + "C=new\n"),
    ("", "A", "x", "A=x\n"),
    ("A=1", "B", "x", "A=1\nB=x\n"),
    ("A=1\r\n", "B", "x", "A=1\r\nB=x\r\n"),
    ("A=1\r\nB=2\r\n", "A", "x", "A=x\r\nB=2\r\n"),
    ("A= # none yet\n", "A", "x", "A= x # none yet\n"),
    ("\ufeffA=1\n", "A", "x", "\ufeffA=x\n"),
    ("A='it # is'\n", "A", "x", "A=x\n"),
    ("", "A", 'a#b"c\\d\'', 'A="a#b\\"c\\\\d\'"\n'),
]


@pytest.mark.parametrize("text,name,value,after", ENV_SET)
def test_a_variable_is_set_in_its_line(text: str, name: str, value: str, after: str) -> None:
    changed = a.set_dotenv(text, name, value)
    assert changed == after and a.parse_dotenv(changed)[name] == value
    assert {**a.parse_dotenv(text), name: value} == a.parse_dotenv(changed)


@pytest.mark.parametrize("name,after", [("A", "# keys\n\nB=two # second\n#C=old\nD=\n"), ("B", ENV.replace("B=two # second\n", "")), ("C", ENV)])
def test_a_variable_goes_with_its_lines(name: str, after: str) -> None:
    assert a.cut_dotenv(ENV, name) == after


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20), st.sampled_from(["A", "B", "C", "D", "E"]))
def test_every_secret_reads_back_as_it_was_set(value: str, name: str) -> None:
    assert a.parse_dotenv(a.set_dotenv(ENV, name, value)) == {**a.parse_dotenv(ENV), name: value}
