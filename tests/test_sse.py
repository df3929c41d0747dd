"""Section 9: event streams in every framing, cut anywhere, read the same."""
from __future__ import annotations

import json
from collections.abc import Iterable

import pytest
from hypothesis import given, settings, strategies as st

from aicarousel import Event, EventReader, FrameSplitter, UpstreamFailure, dump_json, read_frame, split_frames, whole_json, write_event
import aicarousel

BOM = b"\xef\xbb\xbf"

#: What came -> (name, data) of every event with data.
SAMPLES: dict[str, tuple[bytes, list[tuple[str, str]]]] = {
    "LF": (b"data: one\n\ndata: two\n\n", [("", "one"), ("", "two")]),
    "CRLF": (b"data: one\r\n\r\ndata: two\r\n\r\n", [("", "one"), ("", "two")]),
    "CR": (b"data: one\r\rdata: two\r\r:\n\n", [("", "one"), ("", "two")]),
    "LF then CRLF in one blank line": (b"data: one\n\r\ndata: two\r\n\n", [("", "one"), ("", "two")]),
    "another line end for every frame": (b"data: one\n\ndata: two\r\rdata: three\r\n\r\ndata: four\n\n", [("", "one"), ("", "two"), ("", "three"), ("", "four")]),
    "byte order mark": (BOM + b"data: one\n\n", [("", "one")]),
    "byte order mark and CRLF": (BOM + b"data: one\r\n\r\ndata: two\r\n\r\n", [("", "one"), ("", "two")]),
    "byte order mark is text further on": (b"data: " + BOM + b"one\n\n", [("", "\ufeffone")]),
    "no space after the colon": (b"event:x\ndata:one\n\n", [("x", "one")]),
    "one space goes, the next stays": (b"data:  one\n\n", [("", " one")]),
    "tab is no space": (b"data:\tone\n\n", [("", "\tone")]),
    "several data lines": (b"data: one\ndata: two\ndata: three\n\n", [("", "one\ntwo\nthree")]),
    "several data lines, CRLF": (b"data: one\r\ndata: two\r\n\r\n", [("", "one\ntwo")]),
    "several data lines, CR": (b"data: one\rdata: two\r\r:\n\n", [("", "one\ntwo")]),
    "an empty data line between two": (b"data: one\ndata:\ndata: two\n\n", [("", "one\n\ntwo")]),
    "data without a colon is an empty line": (b"data: one\ndata\n\n", [("", "one\n")]),
    "no data is no event": (b"event: ping\n\ndata:\n\ndata: \n\ndata\n\n", []),
    "comments": (b": hello\n\n:\n\n: a\n: b\ndata: one\n\n: data: two\n\n", [("", "one")]),
    "event, id and retry": (b"event: error\nid: 7\nretry: 100\ndata: one\n\ndata: two\n\n", [("error", "one"), ("", "two")]),
    "the last event name wins": (b"event: a\nevent: b\ndata: one\n\n", [("b", "one")]),
    "unknown fields": (b"x: y\nDATA: no\n data: no\ndata: one\nfoo\n\n", [("", "one")]),
    "colons inside": (b'event: a:b\ndata: {"a": "b:c"}\n\n', [("a:b", '{"a": "b:c"}')]),
    "blank lines in a row": (b"\n\n\ndata: one\n\n\n\n\ndata: two\n\n", [("", "one"), ("", "two")]),
    "blank lines in a row, CRLF": (b"\r\n\r\n\r\ndata: one\r\n\r\n\r\ndata: two\r\n\r\n", [("", "one"), ("", "two")]),
    "UTF-8 of two, three and four bytes": ("data: caf\u00e9 \u65e5\u672c \U0001f642\n\n".encode(), [("", "caf\u00e9 \u65e5\u672c \U0001f642")]),
    "not UTF-8": (b"data: a\xff\xfeb\n\ndata: \xe6\x97\n\n", [("", "a\ufffd\ufffdb"), ("", "\ufffd")]),
    "what only looks like a line end": ("data: a\u2028b\u2029c\u0085d\x0be\x0cf\n\n".encode(), [("", "a\u2028b\u2029c\u0085d\x0be\x0cf")]),
    "NUL": (b"data: a\0b\n\n", [("", "a\0b")]),
    "end mark": (b"data: [DONE]\n\n", [("", "[DONE]")]),
}


def read_all(pieces: Iterable[bytes]) -> list[tuple[str, str]]:
    """Name and data of the events that these pieces bring."""
    reader = EventReader()
    events = [event for piece in pieces for event in reader.feed(piece)]
    return [(event.name, event.data) for event in [*events, *reader.close()]]


def each_byte(data: bytes) -> list[bytes]:
    return [data[index:index + 1] for index in range(len(data))]


@pytest.mark.parametrize("name", SAMPLES)
def test_every_framing_whole_by_bytes_and_cut_everywhere(name: str) -> None:
    stream, expected = SAMPLES[name]
    assert read_all([stream]) == expected
    assert read_all(each_byte(stream)) == expected
    for cut in range(len(stream) + 1):
        assert read_all([stream[:cut], stream[cut:]]) == expected, f"cut at {cut}"
        assert read_all([stream[:cut], b"", stream[cut:cut + 1], stream[cut + 1:]]) == expected, f"cut around {cut}"


@pytest.mark.parametrize("name", SAMPLES)
def test_no_byte_is_lost_and_only_whole_frames_leave(name: str) -> None:
    stream = SAMPLES[name][0]
    plain = stream.removeprefix(BOM)
    for cut in range(len(stream) + 1):
        splitter = FrameSplitter()
        first, second = splitter.feed(stream[:cut]), splitter.feed(stream[cut:])
        assert first + second + splitter.rest == plain
        assert plain.startswith(first) and (not first or first.endswith((b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n")))
        assert b"".join(split_frames(first)) == first and b"".join(split_frames(second)) == second


@pytest.mark.parametrize("name", SAMPLES)
def test_frames_and_events_agree(name: str) -> None:
    stream, expected = SAMPLES[name]
    frames = split_frames(stream.removeprefix(BOM))
    events = [read_frame(frame) for frame in frames]
    assert [(event.name, event.data) for event in events if event.data] == expected
    assert [event.raw for event in events] == frames


UNFINISHED = [                              # the last frame, without its blank line -> is it given at the end?
    (b'data: {"a": 1}', True),
    (b'data: {"a": 1}\n', True),
    (b'data: {"a": 1}\r\n', True),
    (b'data: {"a": 1}\r\n\r', True),
    (b'data: {"a": 1}\r\r', True),
    (b"data: [DONE]", True),
    (b"data:[DONE]\r", True),
    (b"data: 5", True),
    (b'data: {"a": ', False),
    (b'data: {"a": "caf\xc3', False),
    (b"data: words", False),
    (b"data: [DONE", False),
    (b": comment", False),
    (b"data:", False),
    (b"dat", False),
    (BOM[:2], False),
    (b"", False),
]


@pytest.mark.parametrize(("rest", "given_out"), UNFINISHED)
def test_an_unfinished_last_frame_counts_when_its_json_is_whole(rest: bytes, given_out: bool) -> None:
    reader = EventReader()
    before = [] if rest == BOM[:2] else reader.feed(b"data: first\n\n")
    assert reader.feed(rest) == [] and len(before) == (rest != BOM[:2])
    assert [bool(event.data) for event in reader.close()] == [True] * given_out
    assert reader.close() == [], "given out once"


def test_an_event_has_a_bound_however_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aicarousel, "MAX_EVENT_BYTES", 100)
    for chunk in (1, 7, 64, 1000):
        splitter = FrameSplitter()
        with pytest.raises(UpstreamFailure) as caught:
            for start in range(0, 1000, chunk):
                splitter.feed((b"data: " + b"x" * 994)[start:start + chunk])
        assert (caught.value.reason, caught.value.kind, caught.value.phase) == ("too_big", "server", "body")
    splitter = FrameSplitter()
    frame = b"data: " + b"x" * 92 + b"\n\n"
    assert [splitter.feed(piece) for piece in each_byte(frame * 3)].count(frame) == 3, "100 bytes fit"
    assert splitter.feed(frame * 50) == frame * 50, "whole frames do not add up"


def test_the_bound_is_what_an_answer_with_images_needs() -> None:
    assert aicarousel.MAX_EVENT_BYTES == 8 * 1024 * 1024
    splitter = FrameSplitter()
    frame = b'data: {"image": "' + b"A" * (8 * 1024 * 1024 - 100) + b'"}\n\n'
    out = [splitter.feed(frame[start:start + 65536]) for start in range(0, len(frame), 65536)]
    assert b"".join(out) == frame and splitter.rest == b""
    with pytest.raises(UpstreamFailure):
        for _ in range(200):
            splitter.feed(b"x" * 65536)


WRITTEN = [
    ({"a": 1}, "", b'data: {"a":1}\n\n'),
    ({"a": [1, None, True]}, "error", b'event: error\ndata: {"a":[1,null,true]}\n\n'),
    ({"a": "two\nlines\r\u2028"}, "", b'data: {"a":"two\\nlines\\r\\u2028"}\n\n'),
    ({"a": "caf\u00e9 \U0001f642"}, "", b'data: {"a":"caf\\u00e9 \\ud83d\\ude42"}\n\n'),
    ({"a": "\ud800"}, "", b'data: {"a":"\\ud800"}\n\n'),
]


@pytest.mark.parametrize(("data", "name", "raw"), WRITTEN)
def test_what_is_written_reads_back(data: dict[str, object], name: str, raw: bytes) -> None:
    assert write_event(data, name) == raw
    event = read_frame(raw)
    assert event == Event(name, event.data, raw) and json.loads(event.data) == data


@pytest.mark.parametrize(("text", "whole"), [("{}", True), (" [1, 2] ", True), ('"a"', True), ("null", True), ("", False), ("{", False), ("[DONE]", False), ("{} {}", False),
                                             ("[" * 100_000, False)])
def test_whole_json(text: str, whole: bool) -> None:
    assert whole_json(text) is whole


def test_dump_json_keeps_order_big_numbers_and_stays_ascii() -> None:
    assert dump_json({"z": 12345678901234567890, "a": 0.1, "\u00e9": "\u65e5"}) == b'{"z":12345678901234567890,"a":0.1,"\\u00e9":"\\u65e5"}'


# Any text, framed any way, cut anywhere.

LINE = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12)
EVENTS = st.lists(st.tuples(LINE.filter(lambda name: not name.startswith(" ")), st.lists(LINE, min_size=1, max_size=3).filter(lambda lines: any(lines) or len(lines) > 1)), max_size=5)


@st.composite
def framed(draw: st.DrawFn) -> tuple[bytes, list[tuple[str, str]]]:
    """A stream and the events in it."""
    events = draw(EVENTS)
    ends = draw(st.sampled_from([["\n"], ["\r\n"], ["\r"], ["\n", "\r\n"]]))
    end = st.sampled_from(ends)
    text = draw(st.sampled_from(["", "\ufeff"]))
    for name, lines in events:
        fields = [("event", name)] * bool(name) + [("data", line) for line in lines]
        for noise in draw(st.lists(st.sampled_from([":", ": OPENROUTER PROCESSING", "id: 1", "retry: 10", "x"]), max_size=2)):
            text += noise + draw(end)
        for label, value in fields:
            space = " " if value.startswith(" ") or draw(st.booleans()) else ""
            text += f"{label}:{space}{value}{draw(end)}"
        text += draw(end)
    return text.encode() + b":\n\n", [(name, "\n".join(lines)) for name, lines in events]


@settings(max_examples=250, deadline=None)
@given(framed(), st.lists(st.integers(0, 400), max_size=6))
def test_any_text_framed_any_way_and_cut_anywhere_reads_the_same(sample: tuple[bytes, list[tuple[str, str]]], cuts: list[int]) -> None:
    stream, events = sample
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    assert read_all(stream[start:end] for start, end in zip(places, places[1:])) == events
    assert read_all(each_byte(stream)) == events


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=20), max_size=8))
def test_any_bytes_at_all_are_cut_without_loss(pieces: list[bytes]) -> None:
    splitter = FrameSplitter()
    out = [splitter.feed(piece) for piece in pieces]
    assert b"".join(out) + splitter.rest == b"".join(pieces).removeprefix(BOM)
    assert all(b"".join(split_frames(block)) == block for block in out)
    whole = FrameSplitter()
    assert whole.feed(b"".join(pieces)) == b"".join(out) or b"\r" in b"".join(pieces)


# ---------------------------------------------------------------- runs of frames that differ in one string

PREFIX, SUFFIX = b'data: {"t":"', b'"}\n\n'


def run_of(*texts: str) -> bytes:
    return b"".join(b"data: " + json.dumps({"t": text}, separators=(",", ":")).encode() + b"\n\n" for text in texts)


@given(st.lists(st.text(min_size=1, max_size=8) | st.sampled_from(['"', "\\", '","', '",', ',"', "\\\\", "\n", '"}\n\n', "\ud800", "\u2028", "data: "]), min_size=2, max_size=6),
       st.binary(max_size=20), st.booleans())
def test_a_run_is_read_as_its_events_one_by_one_and_written_so(texts: list[str], around: bytes, more: bool) -> None:
    before = around.replace(b"\n", b"") + b"\n\n" if around else b""
    run = run_of(*texts)
    behind = b'data: {"end":1}\n\n' if more else b""
    assert aicarousel.read_alike(before + run + behind, len(before), PREFIX, SUFFIX) == (texts, len(before) + len(run))
    assert aicarousel.write_alike(PREFIX[:-1], texts, SUFFIX[1:]) == run


@pytest.mark.parametrize("block", [
    b"", run_of("one"), run_of("one", ""), run_of("one") + b": comment\n\n" + run_of("two"), run_of("one") + b'data: {"u":"two"}\n\n' + run_of("three"),
    b'data: {"t":"a\\"}\n\n' + run_of("b"), b'data: {"t":"a"b"}\n\n' + run_of("c"), b'data: {"t":"a\x01b"}\n\n' + run_of("c"), b'data: {"t":"a","b":"c"}\n\n' + run_of("d"),
    b'data: {"t":"a\\x"}\n\n' + run_of("b"), b'data: {"t":"\xff"}\n\n' + run_of("b"), b'data: {"t":"a\\"}\n\ndata: {"t":"b","c"}\n\n', b' ' + run_of("one", "two"),
    b'data: {"t":"one"}\n\nevent: x\ndata: {"t":"two"}\n\n', b'data: {"t":"one"}\ndata: {"t":"two"}\n\n',
], ids=range(15))
def test_what_is_no_run_is_left_to_a_closer_look(block: bytes) -> None:
    assert aicarousel.read_alike(block, 0, PREFIX, SUFFIX) == ([], 0)


def result_of(read: object, raw: bytes) -> object:
    try:
        return read(raw)            # type: ignore[operator]
    except ValueError as error:
        return type(error), str(error)


@pytest.mark.parametrize("raw", [
    b'{"a": [1, 2.5]}', b' {"a": 1}', b'{"a": 1}\n', b'{"a": 1}x', b'{"a": }', b'{"a": "\xff"}', b'{"a": "\xed\xa0\x80"}', '{"a": "\u00e9"}'.encode(), '{"a": 1}'.encode("utf-16-le"),
    '{"a": 1}'.encode("utf-8-sig"), b"{", b"[1]", b"", b"nothing", b'{"a": NaN}'], ids=range(15))
def test_bytes_are_read_as_json_loads_reads_them(raw: bytes) -> None:
    assert repr(result_of(aicarousel.load_json, raw)) == repr(result_of(json.loads, raw))
