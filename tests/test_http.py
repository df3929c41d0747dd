"""Section 28: heads judged, framing decided, bodies read: what h11 would let pass and this gateway does not."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from aicarousel import (MAX_CLIENT_HEADERS, MAX_HEAD_BYTES, MAX_PROVIDER_HEADERS, REASON_PHRASES, BadHttp, BodyReader, Framing, answer_framing, find_head_end, header_value,
                        parse_answer_head, parse_request_head, request_framing)

LENGTH = "content-length: 5\r\n"


def request_head(*lines: str, start: str = "POST /v1/chat/completions HTTP/1.1", host: str = "Host: a\r\n") -> bytes:
    """A head; each line brings its own line end."""
    return f"{start}\r\n{host}{''.join(lines)}\r\n".encode("latin-1")


# ------------------------------------------------------------------ where a head ends

@pytest.mark.parametrize(("buffer", "end"), [
    (b"", 0), (b"G", 0), (b"GET / HTTP/1.1\r\nHost: a\r\n", 0), (b"GET / HTTP/1.1\r\nHost: a\r\n\r", 0),
    (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", 27), (b"GET / HTTP/1.1\r\nHost: a\r\n\r\nbody\r\n\r\n", 27), (b"\r\n\r\n", 4),
    (b"x" * MAX_HEAD_BYTES, 0), (b"x" * (MAX_HEAD_BYTES - 4) + b"\r\n\r\n", MAX_HEAD_BYTES), (b"x" * (MAX_HEAD_BYTES - 4) + b"\r\n\r\n" + b"y" * 100_000, MAX_HEAD_BYTES),
])
def test_where_a_head_ends(buffer: bytes, end: int) -> None:
    assert find_head_end(buffer) == find_head_end(bytearray(buffer)) == end


@pytest.mark.parametrize(("buffer", "status"), [
    (b"x" * (MAX_HEAD_BYTES + 1), 431), (b"x" * (MAX_HEAD_BYTES - 3) + b"\r\n\r\n", 431), (b"x" * 10**6, 431),
    (b"GET / HTTP/1.1\nHost: a\n\n", 400), (b"GET / HTTP/1.1\r\nHost: a\n\n", 400), (b"GET / HTTP/1.1\nHost: a\n\nmore", 400),
])
def test_a_head_that_cannot_become_one(buffer: bytes, status: int) -> None:
    with pytest.raises(BadHttp) as caught:
        find_head_end(buffer)
    assert caught.value.status == status


@pytest.mark.parametrize("buffer", [b"GET / HTTP/1.1\nHost: a\n\r\n", b"GET / HTTP/1.1\r\nHost: a\n\r\n"])
def test_a_head_that_ends_in_lf_crlf_is_refused_at_once(buffer: bytes) -> None:
    with pytest.raises(BadHttp):
        find_head_end(buffer)


# ------------------------------------------------------------------ request heads

GOOD: list[tuple[bytes, tuple[str, str, str, dict[str, str]]]] = [
    (request_head(start="GET / HTTP/1.1"), ("GET", "/", "1.1", {"host": "a"})),
    (request_head(LENGTH), ("POST", "/v1/chat/completions", "1.1", {"host": "a", "content-length": "5"})),
    (request_head("CONTENT-LENGTH:\t 12 \r\n"), ("POST", "/v1/chat/completions", "1.1", {"host": "a", "content-length": "12"})),
    (request_head("Content-Length: 0\r\n", "X-A: b\r\n"), ("POST", "/v1/chat/completions", "1.1", {"host": "a", "content-length": "0", "x-a": "b"})),
    (request_head("X-A: 1\r\n", "x-a: 2\r\n"), ("POST", "/v1/chat/completions", "1.1", {"host": "a", "x-a": "1, 2"})),
    (request_head("X-A:\r\n", "X-B: a: b,c \t \r\n"), ("POST", "/v1/chat/completions", "1.1", {"host": "a", "x-a": "", "x-b": "a: b,c"})),
    (request_head("X-A: caf\xe9\r\n"), ("POST", "/v1/chat/completions", "1.1", {"host": "a", "x-a": "caf\xe9"})),
    (request_head("Transfer-Encoding: chunked\r\n"), ("POST", "/v1/chat/completions", "1.1", {"host": "a", "transfer-encoding": "chunked"})),
    (request_head(start="GET /a?b=%20&c HTTP/1.0", host=""), ("GET", "/a?b=%20&c", "1.0", {})),
    (request_head(start="OPTIONS * HTTP/1.1"), ("OPTIONS", "*", "1.1", {"host": "a"})),
    (request_head(*(f"x-{number}: 1\r\n" for number in range(MAX_CLIENT_HEADERS - 1)), start="GET / HTTP/1.1"),
     ("GET", "/", "1.1", {"host": "a", **{f"x-{number}": "1" for number in range(MAX_CLIENT_HEADERS - 1)}})),
]


@pytest.mark.parametrize(("head", "expected"), GOOD, ids=range(len(GOOD)))
def test_heads_that_are_read(head: bytes, expected: tuple[Any, ...]) -> None:
    assert parse_request_head(head) == expected
    assert parse_request_head(head) == expected, "the second time too"


BAD: list[tuple[bytes, int]] = [
    (request_head("X-A: b\nTransfer-Encoding: chunked\r\n"), 400),
    (request_head("X-A: b\n"), 400),
    (request_head("X-A: b\rX-B: c\r\n"), 400),
    (request_head("X-A: b\r\r\n"), 400),
    (request_head(start="GET / HTTP/1.1\n"), 400),
    (request_head(LENGTH, "X-A: b\nY: c\r\n"), 400),
    (request_head(LENGTH, "Content-Length: 6\r\n"), 400),
    (request_head(LENGTH, LENGTH), 400),
    (request_head("Content-Length: 5, 6\r\n"), 400),
    (request_head("Content-Length: -5\r\n"), 400),
    (request_head("Content-Length: +5\r\n"), 400),
    (request_head("Content-Length: 0x5\r\n"), 400),
    (request_head("Content-Length: 5.0\r\n"), 400),
    (request_head("Content-Length:\r\n"), 400),
    (request_head("Content-Length: 5 5\r\n"), 400),
    (request_head("Content-Length : 5\r\n"), 400),
    (request_head(" Content-Length: 5\r\n", host=""), 400),
    (request_head("Transfer-Encoding: gzip\r\n"), 501),
    (request_head("Transfer-Encoding: gzip, chunked\r\n"), 501),
    (request_head("Transfer-Encoding: identity\r\n"), 501),
    (request_head("Transfer-Encoding: chunked\r\n", "Transfer-Encoding: chunked\r\n"), 501),
    (request_head("Transfer-Encoding: chunked, chunked\r\n"), 501),
    (request_head("Host: b\r\n"), 400),
    (request_head(host=""), 400),
    (request_head("Authorization: Bearer a\r\n", "authorization: Bearer b\r\n"), 400),
    (request_head("X-Api-Key: a\r\n", "x-api-key: a\r\n"), 400),
    (request_head("Content-Type: application/json\r\n", "Content-Type: text/plain\r\n"), 400),
    (request_head("Origin: http://a\r\n", "Origin: http://b\r\n"), 400),
    (request_head("Expect: 100-continue\r\n", "Expect: 100-continue\r\n"), 400),
    (request_head("X A: b\r\n"), 400),
    (request_head("no colon\r\n"), 400),
    (request_head(": b\r\n"), 400),
    (request_head("X-A: a\0b\r\n"), 400),
    (request_head("X-A: a\x7fb\r\n", "X-\xe9: c\r\n"), 400),
    (request_head(start="GET /"), 400),
    (request_head(start="GET / HTTP/1.1 x"), 400),
    (request_head(start="GET  / HTTP/1.1"), 400),
    (request_head(start="GET /a b HTTP/1.1"), 400),
    (request_head(start="G@T / HTTP/1.1"), 400),
    (request_head(start="GET / HTTP/2"), 400),
    (request_head(start="GET / http/1.1"), 400),
    (request_head(start="HTTP/1.1 200 OK"), 400),
    (request_head(start=""), 400),
    (b"\r\n\r\n", 400),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    (request_head(*(f"x-{number}: 1\r\n" for number in range(MAX_CLIENT_HEADERS))), 431),
    (request_head(*("x: 1\r\n" for _ in range(20_000))), 431),
]


@pytest.mark.parametrize(("head", "status"), BAD, ids=range(len(BAD)))
def test_heads_that_are_refused(head: bytes, status: int) -> None:
    for _ in range(2):
        with pytest.raises(BadHttp) as caught:
            parse_request_head(head)
        assert caught.value.status == status and len(str(caught.value)) < 300


#: Long enough not to be kept.
PADDING = [f"X-Padding-{number}: {'p' * 900}\r\n" for number in range(6)]


def judged(*lines: str, **more: str) -> Any:
    """What becomes of a head: its parts, or the status of its refusal."""
    try:
        method, target, version, headers = parse_request_head(request_head(*lines, **more))
    except BadHttp as error:
        return error.status
    return method, target, version, {name: value for name, value in headers.items() if not name.startswith("x-padding")}


VARIED = [[], ["X-A: b\r\n"], ["Authorization: Bearer a\r\n"], ["Transfer-Encoding: chunked\r\n"], ["Host: b\r\n"], ["X-A: b\nc: d\r\n"], ["X-A: b\r\n folded\r\n"], [" 6\r\n"],
          ["Expect: 100-continue\r\n"], ["Content-Length : 6\r\n"], ["X: content-length: 7\r\n"], ["Content-Length: 5, 6\r\n"], ["Content-Length: x\r\n"]]


@pytest.mark.parametrize("lines", VARIED)
@pytest.mark.parametrize("length", ["Content-Length: 5\r\n", "content-length:5\r\n", "Content-Length: \t5\t\r\n", "Content-Length: 0\r\n", "Content-Length: 005\r\n", "Content-Length: 123456789012345\r\n"])
def test_a_kept_head_gives_what_one_that_is_not_kept_gives(length: str, lines: list[str]) -> None:
    for ordered in ([length, *lines], [*lines, length]):
        expected = judged(*ordered, *PADDING)
        assert judged(*ordered) == judged(*ordered) == expected


@pytest.mark.parametrize("second", [
    "Content-Length: 0\r\n",
    "Content-Length: 5\r\n",
    "Content-Length: 0, 0\r\n",
    "Content-Length: 6\r\n", "content-length: 50\r\n", "Content-Length: 5, 6\r\n"])
def test_two_lengths_are_refused_in_any_order_and_however_long_the_head(second: str) -> None:
    assert [judged(LENGTH, second), judged(second, LENGTH), judged(*PADDING, LENGTH, second), judged(*PADDING, second, LENGTH)] == [400] * 4


def test_kept_heads_never_mix_clients_or_lengths() -> None:
    for number in range(600):                      # more than are kept
        lines = [f"Authorization: Bearer sk-{number % 7}\r\n", f"Content-Length: {number}\r\n", f"X-Session-Id: {number % 300}\r\n"]
        _, _, _, headers = parse_request_head(request_head(*lines))
        assert headers == {"host": "a", "authorization": f"Bearer sk-{number % 7}", "content-length": str(number), "x-session-id": str(number % 300)}
        headers["authorization"] = headers["injected"] = "Bearer of another"
        headers.pop("host")
    assert parse_request_head(request_head("Authorization: Bearer sk-1\r\n", LENGTH))[3] == {"host": "a", "authorization": "Bearer sk-1", "content-length": "5"}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["Content-Length", "Host", "X-A", "Transfer-Encoding", "authorization", " X", "Content-Length "]), max_size=4),
       st.lists(st.sampled_from(["5", "0", "5\r\n 6", "chunked", "a\r", "a\n", "", "content-length: 5", "5\r\nexpect: 6"]), min_size=4, max_size=4))
def test_keeping_heads_changes_no_judgement(names: list[str], values: list[str]) -> None:
    lines = [f"{name}: {value}\r\n" for name, value in zip(names, values)]
    if "".join(lines).lower().count("content-length: ") < 2:          # see the test of two lengths
        assert judged(*lines) == judged(*lines, *PADDING)


@pytest.mark.parametrize(("version", "headers", "framing"), [
    ("1.1", {}, Framing("none")),
    ("1.1", {"content-length": "0"}, Framing("length", 0)),
    ("1.1", {"content-length": "5"}, Framing("length", 5)),
    ("1.0", {"content-length": "5"}, Framing("length", 5)),
    ("1.1", {"transfer-encoding": "chunked"}, Framing("chunked")),
    ("1.1", {"transfer-encoding": " Chunked "}, Framing("chunked")),
    ("1.1", {"transfer-encoding": "chunked", "content-length": "5"}, 400),
    ("1.1", {"transfer-encoding": "", "content-length": "5"}, 400),
    ("1.0", {"transfer-encoding": "chunked"}, 501),
    ("1.1", {"transfer-encoding": "gzip, chunked"}, 501),
    ("1.1", {"transfer-encoding": "chunked, chunked"}, 501),
    ("1.1", {"transfer-encoding": "xchunked"}, 501),
    ("1.1", {"transfer-encoding": ""}, 501),
    *[("1.1", {"content-length": wrong}, 400) for wrong in ("", "-1", "+5", "5 ", "0x5", "5,5", "\u0665", "9" * 16, "1e3", "5_0")],
])
def test_how_a_request_body_ends(version: str, headers: dict[str, str], framing: Framing | int) -> None:
    if isinstance(framing, Framing):
        assert request_framing(version, headers) == framing
        return
    with pytest.raises(BadHttp) as caught:
        request_framing(version, headers)
    assert caught.value.status == framing


# ------------------------------------------------------------------ answers of providers

def answer_head(*lines: str, start: str = "HTTP/1.1 200 OK") -> bytes:
    return f"{start}\r\n{''.join(lines)}\r\n".encode("latin-1")


@pytest.mark.parametrize(("head", "expected"), [
    (answer_head(), (200, [])),
    (answer_head("Content-Type: a\r\n", "X-A: 1\r\n", "x-a: 2\r\n"), (200, [("content-type", "a"), ("x-a", "1"), ("x-a", "2")])),
    (answer_head("Set-Cookie: caf\xe9 \r\n"), (200, [("set-cookie", "caf\xe9")])),
    (answer_head(start="HTTP/1.1 529 Site is overloaded"), (529, [])),
    (answer_head(start="HTTP/1.1 429 "), (429, [])),
    (answer_head(start="HTTP/1.1 429"), (429, [])),
    (answer_head(LENGTH, start="HTTP/1.0 200 OK"), (200, [("content-length", "5")])),
    (answer_head(start="HTTP/1.1 999 X"), (999, [])),
    (answer_head(*("x: 1\r\n" for _ in range(MAX_PROVIDER_HEADERS))), (200, [("x", "1")] * MAX_PROVIDER_HEADERS)),
])
def test_answer_heads_that_are_read(head: bytes, expected: tuple[int, list[tuple[str, str]]]) -> None:
    assert parse_answer_head(head) == expected


@pytest.mark.parametrize("head", [
    answer_head(start="HTTP/1.1 101 Switching Protocols"), answer_head(start="HTTP/1.1 100 Continue"), answer_head(start="HTTP/2 200"), answer_head(start="ICY 200 OK"),
    answer_head(start="HTTP/1.1 20 OK"), answer_head(start="HTTP/1.1 2000 OK"), answer_head(start="HTTP/1.1 OK"), answer_head(start="HTTP/1.1 -20 OK"), answer_head(start=""),
    answer_head("X: a\nY: b\r\n"), answer_head("X: a\rb\r\n"), answer_head("X: a\0b\r\n"), answer_head("X : a\r\n"), answer_head("colon less\r\n"),
    answer_head(LENGTH, "Content-Length: 6\r\n"), answer_head("Content-Length: x\r\n"), answer_head("Transfer-Encoding: gzip\r\n"),
    answer_head(*("x: 1\r\n" for _ in range(MAX_PROVIDER_HEADERS + 1))), answer_head(*("x: 1\r\n" for _ in range(20_000))),
    b"SSH-2.0-OpenSSH_9.6\r\n\r\n", b"<html>\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"\x15\x03\x03\x00\x02\x02\x28\r\n\r\n",
])
def test_answer_heads_that_are_refused(head: bytes) -> None:
    with pytest.raises(BadHttp):
        answer_framing(*parse_answer_head(head))


@pytest.mark.parametrize("head", [
    answer_head("Content-Type: a\r\n folded\r\n", "X: b\r\n"), answer_head("Content-Length: 5\r\n 6\r\n"), answer_head("X: a\r\n : b\r\n"), answer_head(" X: a\r\n"),
    answer_head("X: caf\xe9 \xa0\x85\r\n"), answer_head("X: \t a b\t\r\n"), answer_head("X:\r\n"), answer_head("Connection: close\r\n", "connection: Keep-Alive\r\n"),
    answer_head("Content-Length: 5, 6\r\n"), answer_head("Content-Length: 5\r\n", "Content-Length: 0\r\n"), answer_head("Content-Length: 5\r\n", "Content-Length: 5\r\n"),
    answer_head("Content-Length: +5\r\n"), answer_head("Transfer-Encoding: chunked\r\n", "Content-Length: 5\r\n"), answer_head("X : a\r\n"), answer_head(": a\r\n"),
    answer_head("colonless\r\n"),
    answer_head("X: a\r\n", "colonless\r\n"),
])
def test_an_answer_head_of_a_known_shape_is_what_a_long_one_is(head: bytes) -> None:
    def judged_answer(head: bytes) -> Any:
        try:
            status, headers = parse_answer_head(head)
            return status, [pair for pair in headers if not pair[0].startswith("x-padding")], answer_framing(status, headers)
        except BadHttp:
            return "refused"

    long = head[:-2] + "".join(PADDING).encode() + b"\r\n"
    assert judged_answer(head) == judged_answer(head) == judged_answer(long)


def test_heads_of_one_shape_keep_their_own_values() -> None:
    for number in range(600):
        head = answer_head(f"Content-Length: {number}\r\n", f"X-Request-Id: req_{number % 7}\r\n", "X-A: 1\r\n" * (number % 3))
        assert parse_answer_head(head) == (200, [("content-length", str(number)), ("x-request-id", f"req_{number % 7}"), *[("x-a", "1")] * (number % 3)])
    assert parse_answer_head(answer_head("Connection: close\r\n"))[1] == [("connection", "close")] and parse_answer_head(answer_head("Connection: x\r\n"))[1] == [("connection", "x")]
    assert [parse_answer_head(answer_head("X: 1\r\n", start=f"HTTP/1.1 {status} X"))[0] for status in (200, 429, 200, 500)] == [200, 429, 200, 500]


CL, TE = "content-length", "transfer-encoding"


@pytest.mark.parametrize(("status", "headers", "framing"), [
    (200, [(CL, "5")], Framing("length", 5)),
    (200, [(CL, "0")], Framing("length", 0)),
    (200, [(TE, "chunked")], Framing("chunked")),
    (200, [(TE, "Chunked ")], Framing("chunked")),
    (200, [("x", "y")], Framing("eof")),
    (200, [], Framing("eof")),
    (500, [], Framing("eof")),
    (204, [], Framing("none")),
    (204, [(CL, "5")], Framing("none")),
    (304, [(CL, "5")], Framing("none")),
    (204, [(TE, "chunked")], Framing("none")),
    (200, [(CL, "5"), (CL, "5")], None),
    (200, [(CL, "5"), (CL, "6")], None),
    (200, [(CL, "5"), (TE, "chunked")], None),
    (204, [(CL, "5"), (TE, "chunked")], None),
    (200, [(TE, "chunked"), (TE, "chunked")], None),
    (200, [(TE, "gzip, chunked")], None),
    (200, [(TE, "identity")], None),
    (200, [(TE, "")], None),
    *[(200, [(CL, wrong)], None) for wrong in ("", "-1", "5;", " ", "5, 5", "9" * 16)],
])
def test_how_an_answers_body_ends(status: int, headers: list[tuple[str, str]], framing: Framing | None) -> None:
    if framing is not None:
        assert answer_framing(status, headers) == framing
        return
    with pytest.raises(BadHttp):
        answer_framing(status, headers)


# ------------------------------------------------------------------ bodies

def read(framing: Framing, pieces: Iterable[bytes]) -> tuple[bytes, bool, bytes]:
    """The body, whether it ended, and what came after its end; fed as the transport does, until done."""
    reader, body, behind = BodyReader(framing), b"", b""
    for piece in pieces:
        if reader.done:
            behind += piece
        else:
            body += reader.feed(piece)
    if not reader.done:
        body += reader.feed(b"")                # a fault may be told at the next call
    return body, reader.done, reader.rest + behind if reader.done else b""


def each_byte(data: bytes) -> list[bytes]:
    return [data[index:index + 1] for index in range(len(data))]


BODIES: list[tuple[str, Framing, bytes, tuple[bytes, bool, bytes]]] = [
    ("length", Framing("length", 5), b"hello", (b"hello", True, b"")),
    ("length, more behind it", Framing("length", 5), b"helloHTTP/1.1 200", (b"hello", True, b"HTTP/1.1 200")),
    ("length, too short", Framing("length", 9), b"hello", (b"hello", False, b"")),
    ("length nought", Framing("length", 0), b"", (b"", True, b"")),
    ("none", Framing("none"), b"", (b"", True, b"")),
    ("to the end of the connection", Framing("eof"), b"hello\r\n0\r\n\r\n", (b"hello\r\n0\r\n\r\n", False, b"")),
    ("chunked", Framing("chunked"), b"5\r\nhello\r\n0\r\n\r\n", (b"hello", True, b"")),
    ("chunks", Framing("chunked"), b"5\r\nhello\r\n1\r\n \r\n00A\r\n0123456789\r\n0\r\n\r\n", (b"hello 0123456789", True, b"")),
    ("sizes of either case", Framing("chunked"), b"a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\n\r\n", (b"01234567890123456789", True, b"")),
    ("white space behind a size", Framing("chunked"), b"5 \t\r\nhello\r\n0 \r\n\r\n", (b"hello", True, b"")),
    ("eight digits", Framing("chunked"), b"00000005\r\nhello\r\n00000000\r\n\r\n", (b"hello", True, b"")),
    ("line ends inside", Framing("chunked"), b"8\r\n\r\n0\r\n\r\n\n\r\n0\r\n\r\n", (b"\r\n0\r\n\r\n\n", True, b"")),
    ("no chunk at all", Framing("chunked"), b"0\r\n\r\n", (b"", True, b"")),
    ("trailers", Framing("chunked"), b"5\r\nhello\r\n0\r\nX-A: b\r\nX-B: c\r\n\r\n", (b"hello", True, b"")),
    ("chunked, more behind it", Framing("chunked"), b"1\r\nx\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", (b"x", True, b"HTTP/1.1 200 OK\r\n\r\n")),
    ("trailers, more behind them", Framing("chunked"), b"0\r\nA: b\r\n\r\nmore\r\n", (b"", True, b"more\r\n")),
    ("end missing", Framing("chunked"), b"5\r\nhello\r\n", (b"hello", False, b"")),
    ("last chunk without its blank line", Framing("chunked"), b"5\r\nhello\r\n0\r\n", (b"hello", False, b"")),
    ("trailers without an end", Framing("chunked"), b"0\r\nA: b\r\n", (b"", False, b"")),
    ("a small chunk cut: it comes whole or not at all", Framing("chunked"), b"5\r\nhello\r\n6\r\n worl", (b"hello", False, b"")),
    ("a small chunk without its line end", Framing("chunked"), b"5\r\nhello", (b"", False, b"")),
    ("a large chunk cut: it comes as it comes", Framing("chunked"), b"5\r\nhello\r\n1001\r\n worl", (b"hello worl", False, b"")),
    ("size cut", Framing("chunked"), b"5\r\nhello\r\n1", (b"hello", False, b"")),
    ("a huge chunk announced", Framing("chunked"), b"ffffffff\r\nhello", (b"hello", False, b"")),
]


@pytest.mark.parametrize(("framing", "stream", "expected"), [row[1:] for row in BODIES], ids=[row[0] for row in BODIES])
def test_bodies_whole_by_bytes_and_cut_everywhere(framing: Framing, stream: bytes, expected: tuple[bytes, bool, bytes]) -> None:
    assert read(framing, [stream]) == expected
    assert read(framing, each_byte(stream)) == expected
    for cut in range(len(stream) + 1):
        assert read(framing, [stream[:cut], stream[cut:]]) == expected, f"cut at {cut}"


@pytest.mark.parametrize(("framing", "stream"), [row[1:3] for row in BODIES if row[3][1] and row[1].kind in ("length", "chunked")], ids=[row[0] for row in BODIES if row[3][1] and row[1].kind in ("length", "chunked")])
def test_a_body_is_done_at_its_last_byte_and_not_before(framing: Framing, stream: bytes) -> None:
    body, _, behind = read(framing, [stream])
    end = len(stream) - len(behind)
    for cut in range(end):
        part, done, _ = read(framing, [stream[:cut]])
        assert not done and body.startswith(part)
    assert read(framing, [stream[:end]]) == (body, True, b"")


BROKEN = [
    b"x\r\n", b"5x\r\nhello\r\n", b"-5\r\nhello\r\n", b"+5\r\n", b"0x5\r\nhello", b" 5\r\nhello", b"\r\n5\r\nhello", b"\n", b"5\nhello\r\n", b"5\rhello", b"5 5\r\n", b"g\r\n",
    b"5;a=b\r\nhello\r\n", b"5 ;a\r\nhello\r\n", b"0;a\r\n\r\n", b"5;\r\nhello", b"5;a\rb\r\nhello",
    b"123456789\r\n", b"fffffffffffffffff\r\n", b"000000000\r\n", b"5" + b" " * 50,
    b"5\r\nhelloX\r\n", b"5\r\nhello\n0\r\n", b"5\r\nhello\r0", b"5\r\nhello0\r\n\r\n", b"3\r\nhello\r\n0\r\n\r\n",
    b"0\r\n\n", b"0\r\nA: b\nC: d\n", b"0\r\n" + b"x" * (MAX_HEAD_BYTES + 1), b"0\r\n" + b"A: b\r\n" * 20_000,
    b"HTTP/1.1 200 OK\r\n", b"<html>\r\n", b"data: x\n\n",
]


@pytest.mark.parametrize("stream", BROKEN, ids=range(len(BROKEN)))
def test_broken_chunks_are_refused_whole_and_by_bytes(stream: bytes) -> None:
    for pieces in ([stream], each_byte(stream), [stream[:4], stream[4:]]):
        with pytest.raises(BadHttp):
            read(Framing("chunked"), [b"2\r\nok\r\n", *pieces])


def test_white_space_behind_a_size_has_one_bound() -> None:
    stream = b"2" + b" " * 40 + b"\r\nok\r\n0\r\n\r\n"
    seen = set()
    for pieces in ([stream], each_byte(stream)):
        try:
            seen.add(read(Framing("chunked"), pieces))
        except BadHttp:
            seen.add("refused")
    assert len(seen) == 1


def chunked(*chunks: bytes, size: bytes = b"%x") -> bytes:
    return b"".join(size % len(chunk) + b"\r\n" + chunk + b"\r\n" for chunk in chunks)


EVENTS = [b'data: {"n":%d}\n\n' % number for number in range(300)]
MANY = {                            # long pieces with many chunks, which are taken in bulk where they can be
    "events": EVENTS,
    "events with CRLF": [event.replace(b"\n", b"\r\n") for event in EVENTS],
    "one with CRLF among many": [*EVENTS[:100], b"a\r\nb", *EVENTS[100:]],
    "one that looks like chunks": [*EVENTS[:100], b"5\r\nhello\r\n0\r\n\r\n", *EVENTS[100:]],
    "ends of payloads in CR or LF": [b"a\r", b"\n", b"b\r", b"\r\n", b"\n"] * 300,
    "every byte its own": [b"%c" % byte for byte in b"".join(EVENTS)],
    "hex digits": [b"a" * 16, b"10", b"5"] * 300,
    "large ones": [b"x" * 70_000, b"y" * 3000, b"z"] * 2,
    "few": [b"x" * 1000, b"y" * 1000, b"z" * 1000],
}


@pytest.mark.parametrize("size", [b"%x", b"%X", b"%08x", b"%x ", b"%x\t"])
@pytest.mark.parametrize("name", MANY)
def test_many_chunks_at_once(name: str, size: bytes) -> None:
    stream = chunked(*MANY[name], size=size) + b"0\r\nX: y\r\n\r\nbehind"
    expected = (b"".join(MANY[name]), True, b"behind")
    for step in (len(stream), 65536, 4096, 2049, 1000, 37):
        assert read(Framing("chunked"), [stream[start:start + step] for start in range(0, len(stream), step)]) == expected


@pytest.mark.parametrize("wrong", [b"5 5", b"0000000005", b"123456789", b"-5", b"+5", b"0x5", b"5_0", b"5;a", b"", b" 5", b"\x005", b"\xd9\xa5"])
def test_a_bad_size_among_many_chunks_is_refused(wrong: bytes) -> None:
    stream = chunked(*EVENTS) + wrong + b"\r\nhello\r\n" + chunked(*EVENTS) + b"0\r\n\r\n"
    for step in (len(stream), 3000, 100):
        with pytest.raises(BadHttp):
            read(Framing("chunked"), [stream[start:start + step] for start in range(0, len(stream), step)])


def test_the_last_chunk_ends_a_body_among_many() -> None:
    stream = chunked(*EVENTS) + b"0\r\n\r\n" + chunked(*EVENTS)
    assert read(Framing("chunked"), [stream]) == (b"".join(EVENTS), True, chunked(*EVENTS))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.lists(st.integers(0, 300), max_size=5), st.binary(max_size=6))
def test_any_chunks_cut_anywhere_give_the_same_body(chunks: list[bytes], cuts: list[int], behind: bytes) -> None:
    stream = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n" + behind
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    assert read(Framing("chunked"), [stream[start:end] for start, end in zip(places, places[1:])]) == (b"".join(chunks), True, behind)


# ------------------------------------------------------------------ what we write

@pytest.mark.parametrize(("text", "value"), [
    ("plain", "plain"), (" a b ", "a b"), ("a\r\nX: b", "aX: b"), ("a\nb\0c\x7f", "abc"), ("caf\u00e9", "caf\u00e9"), ("\u65e5\u672c", "??"), ("\ud800", "?"), ("a\tb", "a\tb"), ("", ""), ("\r\n", ""),
])
def test_a_header_value_is_one_line_of_latin_1(text: str, value: str) -> None:
    assert header_value(text) == value and value.encode("latin-1") is not None


def test_every_status_this_gateway_answers_has_a_phrase() -> None:
    assert {200, 204, 400, 401, 403, 404, 405, 408, 411, 413, 415, 417, 421, 422, 429, 431, 500, 501, 502, 503, 504, 529} <= set(REASON_PHRASES)
    assert all(phrase.isascii() and phrase.isprintable() for phrase in REASON_PHRASES.values())
