"""What clients can do to the gateway, by group: raw HTTP, bodies, JSON, keys, paths, pages, injection, addresses.  One gateway serves all of it.

    python tests/test_hostile.py        runs every group, here and in the files beside, and prints a table: cases, held, seconds

A test's group is the word behind `test_`.  The groups slow, storm, idle, fds, drain and reload are in test_hostile_load.py, fuzz in test_fuzz.py, secrets in
test_secrets.py, chromium in test_browser.py, storage and clock in test_storage.py.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [folder for folder in (str(HERE), str(HERE.parent)) if folder not in sys.path]

from dialects import PATHS  # noqa: E402
from fakes import FAKE_KEY, TEXT, Client, Gateway, Provider, Reply, answer, chat_answer, chat_body, healthy  # noqa: E402
from house import entry  # noqa: E402
from test_server import replies_in  # noqa: E402

CHAT = PATHS["chat"]
Json = dict[str, Any]
NEVER = (500, 502, 503, 504)        #: what nothing a client sends may bring about


def say(request: Any) -> Any:
    """A healthy answer that also says what a provider must not: cookies, allowances, whence it came."""
    told = [("set-cookie", "session=planted"), ("access-control-allow-origin", "*"), ("server", "planted"), ("alt-svc", 'h3=":443"'), ("openai-organization", "planted"),
            ("x-upstream-url", "http://planted.internal"), ("strict-transport-security", "max-age=1"), ("location", "http://planted.internal"), ("via", "planted"), ("connection", "keep-alive, x-planted"), ("x-planted", "1")]
    return answer(chat_answer(), 200, told)


@pytest.fixture(scope="module")
def gateway(module_provider: Provider, module_gateway_factory: Callable[..., Gateway]) -> Gateway:
    provider = module_provider
    redirects = {f"moved{status}": answer(b"", status, [("location", provider.url("trap") + "/chat/completions")]) for status in (301, 302, 303, 307, 308)}
    scripts = {"well": healthy(), "loud": say, "trap": healthy(), **redirects}
    models = {name: entry(provider.script(name, script)) for name, script in scripts.items()}
    made = module_gateway_factory({"carousel": {"fallback": "none", "maxWait": 0, "unknownModel": "reject"}, **models}, {"FAKE_KEY": FAKE_KEY})
    return made


def body_of(client: str, model: str = "well/m", **more: Any) -> Json:
    """The least request of a format."""
    said: Json = {"input": "Hi"} if client == "responses" else {"messages": [{"role": "user", "content": "Hi"}]}
    return {"model": model, **said, **({"max_tokens": 100} if client == "messages" else {}), **more}


def check_envelope(reply: Reply, client: str = "chat") -> str:
    """An error is JSON in its client's own form; its message."""
    assert reply.headers["content-type"] == "application/json", reply.raw
    told = reply.json
    if client == "messages":
        assert told["type"] == "error" and set(told["error"]) >= {"type", "message"}, told
    else:
        assert set(told) == {"error"} and {"message", "type", "param", "code"} <= set(told["error"]), told
    message = told["error"]["message"]
    assert isinstance(message, str) and 5 < len(message) < 3000 and "Traceback" not in message
    return message


def talk(gateway: Gateway, raw: bytes, n_answers: int = 1) -> tuple[list[Reply], Client]:
    """What comes back for some bytes: so many answers are waited for, then writing ends, and nothing more may come."""
    with gateway.connect() as client:
        try:
            client.send(raw)
            client.read_until(lambda told: sum(reply.status != 100 for reply in replies_in(told)) >= n_answers, 5.0)
            client.socket.shutdown(1)
        except OSError:         # it has been answered and closed before all was sent
            pass
        client.read_all(5.0)
    assert client.ended in ("eof", "reset"), f"no end: {client.ended} {bytes(client.raw)[:300]!r}"
    return replies_in(bytes(client.raw)), client


# ---------------------------------------------------------------- corpus: raw HTTP messages

SMUGGLED = b"GET /v1/models?smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
ASK = json.dumps(body_of("chat")).encode()


def head(*lines: str | bytes, start: str = f"POST {CHAT} HTTP/1.1", host: str = "Host: localhost", end: bytes = b"\r\n") -> bytes:
    """A head with the key and these lines; KEY stands for the gateway's."""
    rows = [start, host, "Authorization: Bearer KEY", "Content-Type: application/json", *lines]
    return end.join(row if isinstance(row, bytes) else row.encode("latin-1") for row in rows if row) + end * 2


def sized(body: bytes = ASK) -> str:
    return f"Content-Length: {len(body)}"


def chunks(*parts: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + end


TE = "Transfer-Encoding: chunked"
WHOLE = chunks(ASK)
#: Raw bytes and the statuses that answer them, one for each request that was understood.
CORPUS: dict[str, tuple[bytes, list[int]]] = {}


def case(name: str, raw: bytes, *statuses: int) -> None:
    assert name not in CORPUS, name
    CORPUS[name] = (raw, list(statuses))


case("as it should be", head(sized()) + ASK, 200)
case("chunked as it should be", head(TE) + WHOLE, 200)
# Two readers could disagree about where the body ends: refused, and what follows is never a request.
for order in ([TE, sized()], [sized(), TE], [TE, "Content-Length: 0"], ["Content-Length: 0", TE], [TE, f"Content-Length: {len(WHOLE)}"]):
    case(f"both: {order}", head(*order) + WHOLE + SMUGGLED, 400)
for coding in ("xchunked", "chunkedx", "chunked, identity", "identity, chunked", "gzip, chunked", "chunked, chunked", "chunked;q=1", '"chunked"', "identity", "", "gzip", "chunked,", ",chunked", "chun ked", "c"):
    case(f"coding {coding!r}", head(f"Transfer-Encoding: {coding}") + WHOLE + SMUGGLED, 501)
for coding in ("\x0bchunked", "chunked\x00", "\x00chunked", "chun\rked", "chunked\x7f", "chunked\x0c"):
    case(f"coding {coding!r}", head(f"Transfer-Encoding: {coding}") + WHOLE + SMUGGLED, 501 if coding == "chunked\x7f" else 400)
for coding in ("Chunked", "CHUNKED", " chunked", "\tchunked\t", "chunked "):
    case(f"coding {coding!r}", head(f"Transfer-Encoding:{coding}") + WHOLE, 200)
for name in ("Transfer-Encoding ", " Transfer-Encoding", "Transfer-Encoding\t", "Transfer\tEncoding", "Transfer-Enc\x00oding", "Transfer-Encoding\x0b", "Transfer-Encoding\xa0", "\x00Transfer-Encoding"):
    case(f"coding named {name!r}", head(sized(b"x" * 5), f"{name}: chunked") + WHOLE + SMUGGLED, 400)
case("coding named with _", head(sized(), "Transfer_Encoding: chunked") + ASK, 200)
case("coding twice", head(TE, TE) + WHOLE + SMUGGLED, 501)
case("coding twice, one other", head(TE, "Transfer-Encoding: identity") + WHOLE + SMUGGLED, 501)
case("coding in 1.0", head(TE, start=f"POST {CHAT} HTTP/1.0") + WHOLE + SMUGGLED, 501)
for length in ("+5", "-5", "0x5", "5.0", "5e1", "5,5", "5, 6", "5 5", "05x", "", "\x0b5", "5\x00", "\u0665".encode().decode("latin-1"), "9" * 16, "1_0", "5;", "5\x0c", "0b1", "NaN"):
    case(f"length {length!r}", head(f"Content-Length: {length}") + ASK + SMUGGLED, 400)
for second in ("Content-Length: 5", "content-length: 6", "CONTENT-LENGTH: 0", "Content-Length: 5, 5"):
    case(f"two lengths, {second}", head("Content-Length: 5", second) + ASK + SMUGGLED, 400)
for name in ("Content-Length ", " Content-Length", "Content-Length\t", "Content\x00-Length"):
    case(f"length named {name!r}", head(f"{name}: {len(ASK)}") + ASK + SMUGGLED, 400)
case("leading zeros", head(f"Content-Length: 000{len(ASK)}") + ASK, 200)
case("longest length", head("Content-Length: " + "9" * 15) + ASK, 413)
case("body without a length", head() + ASK, 400)
# Lines: a lone CR or LF, folded lines, junk in names and values.
for name, line in {"LF smuggles a coding": b"X: a\nTransfer-Encoding: chunked", "LF smuggles a length": b"X: a\nContent-Length: 0", "CR in a value": b"X: a\rb", "CR before CRLF": b"X: a\r", "LF in a name": b"X\nY: a",
                   "LF at the end of a line": b"X: a\nY: b", "only LF": b"\n", "CR alone": b"\r", "NUL in a value": b"X: a\x00b", "NUL in a name": b"X\x00: a", "no colon": b"nonsense", "no name": b": a",
                   "space in a name": b"X Y: a", "space before the colon": b"X : a", "beyond ASCII in a name": b"X\xe9: a", "quote in a name": b'"X": a', "brace in a name": b"{X}: a", "at in a name": b"X@: a",
                   "vertical tab in a value": b"X: a\x0bb", "DEL in a value": b"X: a\x7fb", "escape in a value": b"X: \x1b[31m"}.items():
    case(f"line: {name}", head(sized(), line) + ASK + SMUGGLED, *([200, 200] if name in ("DEL in a value", "escape in a value") else [400]))
for name, line in {"value": b"X: a\r\n b", "by tab": b"X: a\r\n\tb", "length": b"X: a\r\n Content-Length: 0", "empty": b"X:\r\n a", "coding": b"Transfer-Encoding:\r\n chunked"}.items():
    case(f"folded {name}", head(line, *([] if name == "coding" else [sized()])) + (WHOLE if name == "coding" else ASK) + SMUGGLED, 400)
case("folded first line", head(start=f"POST {CHAT} HTTP/1.1\r\n X: a"), 400)
case("all lines end in LF", head(sized(), end=b"\n") + ASK, 400)
case("all lines end in CR", head(sized(), end=b"\r") + ASK)
case("blank lines first", b"\r\n\r\n" + head(sized()) + ASK, 200)
case("LF first", b"\n" + head(sized()) + ASK, 200)
case("many blank lines", b"\r\n" * 20_000 + head(sized()) + ASK, 200)
# Sizes.
case("99 headers", head(sized(), *(f"X-{number}: a" for number in range(96))) + ASK, 200)
case("101 headers", head(sized(), *(f"X-{number}: a" for number in range(97))) + ASK, 431)
case("5,000 headers", head(*("X: a" for _ in range(5000))), 431)
case("20,000 short headers", head(*("a:" for _ in range(20_000))), 431)
case("a header of 60 KB", head(sized(), "X: " + "a" * 60_000) + ASK, 200)
case("a header of 70 KB", head(sized(), "X: " + "a" * 70_000) + ASK, 431)
case("a name of 70 KB", head("X" * 70_000 + ": a"), 431)
case("a header without end", b"POST / HTTP/1.1\r\nX: " + b"a" * 300_000, 431)
case("a method of 70 KB", b"A" * 70_000 + b" / HTTP/1.1\r\n\r\n", 431)
case("a target of 8 KB", head(sized(), start=f"POST {CHAT}?{'a' * (8192 - len(CHAT) - 1)} HTTP/1.1") + ASK, 200)
case("a target over 8 KB", head(sized(), start=f"POST {CHAT}?{'a' * 8192} HTTP/1.1") + ASK, 414)
case("a megabyte of junk", bytes(range(32, 127)) * 10_000, 431)
case("zeros", bytes(100_000), 431)
case("high bytes", b"\xff" * 100_000, 431)
# Targets.
for target in ("*", "localhost:80", "v1/models", "ftp://localhost/v1/models", "http://", "http:/v1/models", "file:///etc/passwd", "/v1/models#x", "/v1/models?%00", "/v1/models%00", "/v1/m\u00f6dels", "/v1/models\x07",
               "/v1/models\x7f", "/v1/models?\x00", "\\v1\\models", "?", "#", "javascript:x", "data:,x", "//"):
    refused = target not in ("//",)
    case(f"target {target!r}", head(start=f"GET {target} HTTP/1.1"), 400 if refused else 404)
for target in ("http://localhost/v1/models", "HTTP://evil.test:99/v1/models", "https://u:p@localhost/v1/models"):
    case(f"target {target!r}", head(start=f"GET {target} HTTP/1.1"), 200)
case("target with a space", head(start="GET /v1/models ?a HTTP/1.1"), 400)
case("two spaces", head(start="GET  /v1/models HTTP/1.1"), 400)
case("tab in the first line", head(start="GET\t/v1/models HTTP/1.1"), 400)
case("no target", head(start="GET HTTP/1.1"), 400)
case("space behind the version", head(start="GET /v1/models HTTP/1.1 "), 400)
# Host.
for host in ("", "Host:", "Host: a b", "Host: localhost, localhost", "Host: localhost\r\nHost: localhost", "Host: localhost\r\nhost: evil.test", "Host: u@localhost", "Host: localhost/", "Host: http://localhost", "Host: [::1",
             "Host: localhost:99999999", "Host: localhost:-1", "Host: localhost:", "Host : localhost", "Host: caf\u00e9", "Host: \x00", "Host: ;", "Host: %6c%6f%63alhost"):
    case(f"host {host!r}", head(start="GET /v1/models HTTP/1.1", host=host), 400)
for host in ("evil.test", "127.0.0.1.evil.test", "localhost.evil.test", "0.0.0.0", "0", "2130706433", "0x7f000001", "127.1", "[::]", "192.168.1.5", "169.254.169.254", "xn--lcalhost-83a", "-", "."):
    case(f"host {host!r}", head(start="GET /v1/models HTTP/1.1", host=f"Host: {host}"), 421)
# Expectations, versions, methods.
case("expects to go on", head(sized(), "Expect: 100-continue") + ASK, 200)
case("expects twice", head(sized(), "Expect: 100-continue", "Expect: 100-continue") + ASK, 400)
for expected in ("100-continue, 100-continue", "200-ok", "100", "", "100-continue; x"):
    case(f"expects {expected!r}", head(sized(), f"Expect: {expected}") + ASK, 417)
case("expects, and is refused", head("Content-Length: 99999999", "Expect: 100-continue"), 413)
case("expects, and has no key", head(sized(), "Expect: 100-continue").replace(b"KEY", b"sk-0") + ASK, 401)
for version, status in {"HTTP/2.0": 505, "HTTP/1.2": 505, "HTTP/0.9": 505, "HTTP/3.0": 505, "HTTP/1.10": 400, "HTTP/1": 400, "HTTP/x.y": 400, "http/1.1": 400, "HTTP/1.1\x00": 400, "ICY/1.1": 400, "HTTP/-1.1": 400, "HTTP/1,1": 400}.items():
    case(f"version {version!r}", head(start=f"GET /v1/models {version}"), status)
case("version 1.0", head(start="GET /v1/models HTTP/1.0", host=""), 200)
case("HTTP/0.9 without a version", b"GET /v1/models\r\n\r\n", 400)
case("preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505)
case("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n", 400)
case("SSH", b"SSH-2.0-OpenSSH_9.6\r\n\r\n", 400)
case("SMTP", b"EHLO localhost\r\nMAIL FROM:<a@b>\r\n\r\n", 400)
case("an answer", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 400)
for method, status in {"G\x01T": 400, "GE T": 400, "": 400, "G@T": 400, "TRACE": 405, "CONNECT": 405, "BREW": 405, "get": 405, "PUT": 405, "DELETE": 405, "PATCH": 405, "OPTIONS": 405, "PROPFIND": 405}.items():
    case(f"method {method!r}", head(start=f"{method} /v1/models HTTP/1.1"), status)
# Chunks.
for name, body in {"extension": b"5;a=b\r\nhello\r\n0\r\n\r\n", "extension with CR": b"5;a=\rb\r\nhello\r\n0\r\n\r\n", "quoted extension": b'5;a="\r\n"\r\nhello\r\n0\r\n\r\n', "size junk": b"zz\r\nhello\r\n0\r\n\r\n",
                   "negative": b"-5\r\nhello\r\n0\r\n\r\n", "signed": b"+5\r\nhello\r\n0\r\n\r\n", "0x": b"0x5\r\nhello\r\n0\r\n\r\n", "no size": b"\r\nhello\r\n0\r\n\r\n", "size of 9 digits": b"000000005\r\nhello\r\n0\r\n\r\n",
                   "beyond 64 bits": b"ffffffffffffffff5\r\nhello\r\n", "LF behind the size": b"5\nhello\r\n0\r\n\r\n", "CR behind the size": b"5\rhello\r\n0\r\n\r\n", "LF behind the data": b"5\r\nhello\n0\r\n\r\n",
                   "data too long": b"4\r\nhello\r\n0\r\n\r\n", "junk behind the data": b"5\r\nhelloXX0\r\n\r\n", "space first": b" 5\r\nhello\r\n0\r\n\r\n", "underscore": b"1_0\r\nhello\r\n0\r\n\r\n", "comma": b"5,\r\nhello\r\n",
                   "NUL": b"5\x00\r\nhello\r\n", "LF in the trailers": b"0\r\nX: a\nY: b\r\n\r\n", "endless trailers": b"0\r\n" + b"X: a\r\n" * 20_000}.items():
    case(f"chunk: {name}", head(TE) + body + SMUGGLED, 400)
case("chunk: size in capitals, padded", head(TE) + b"%08X  \r\n%b\r\n0\r\n\r\n" % (len(ASK), ASK), 200)
case("chunk: trailers", head(TE) + WHOLE[:-2] + b"X: a\r\nContent-Length: 5\r\n\r\n", 200)
case("chunk: one byte each", head(TE) + chunks(*(bytes([byte]) for byte in ASK)), 200)
case("chunk: no last one", head(TE) + WHOLE[:-5])
case("chunk: larger than all", head(TE) + b"7fffffff\r\nhello")
# Pipelining: answered in order, and nothing behind a refusal that leaves a body unread.
case("pipelined", (head(sized()) + ASK) * 3, 200, 200, 200)
case("pipelined, both kinds", head(TE) + WHOLE + head(start="GET /v1/models HTTP/1.1") + head(sized()) + ASK, 200, 200, 200)
case("pipelined behind close", head(sized(), "Connection: close") + ASK + SMUGGLED, 200)
case("pipelined behind a bad one", head("nonsense") + SMUGGLED, 400)
case("pipelined behind an unknown path", head(start="GET /nothing HTTP/1.1") + head(start="GET /v1/models HTTP/1.1"), 404, 200)
case("pipelined behind a wrong key with a body", head(sized()).replace(b"KEY", b"sk-0") + ASK + SMUGGLED, 401)
case("pipelined behind a large body", head("Content-Length: 99999999") + ASK + SMUGGLED, 413)
case("pipelined behind bad JSON", head("Content-Length: 1") + b"{" + head(start="GET /v1/models HTTP/1.1"), 400, 200)
case("a body that is a request", head(sized(SMUGGLED)) + SMUGGLED, 400)
case("GET with a body", head(sized(), start="GET /v1/models HTTP/1.1") + ASK + head(start="GET /v1/models HTTP/1.1"), 200, 200)
case("nothing", b"")
case("half a head", head(sized())[:60])
case("half a body", head(sized()) + ASK[:10])
case("upgrade", head(sized(), "Connection: upgrade", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__") + ASK, 200)
case("websocket", head("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13", start="GET /v1/responses HTTP/1.1"), 426)
case("keep-alive and close", head(sized(), "Connection: keep-alive, close") + ASK + SMUGGLED, 200)
case("two keys", head(sized(), "Authorization: Bearer KEY") + ASK + SMUGGLED, 400)


@pytest.mark.parametrize("name", CORPUS)
def test_corpus(gateway: Gateway, module_provider: Provider, name: str) -> None:
    raw, expected = CORPUS[name]
    before = len(module_provider.requests)
    replies, client = talk(gateway, raw.replace(b"KEY", gateway.key.encode()), len(expected))
    statuses = [reply.status for reply in replies if reply.status != 100]
    assert statuses == expected, (statuses, bytes(client.raw)[:600])
    assert not set(statuses) & set(NEVER)
    for reply in replies:
        if reply.status >= 400:
            check_envelope(reply)
    assert len(module_provider.requests) - before <= statuses.count(200)


#: Heads that never become a request; PATH is each format's.
UNREAD: dict[str, tuple[str, int]] = {"head too large": ("POST PATH HTTP/1.1\r\nX: " + "a" * 70_000, 431), "too many headers": ("POST PATH HTTP/1.1\r\nHost: a\r\n" + "a: b\r\n" * 200 + "\r\n", 431), "lone LF": ("POST PATH HTTP/1.1\r\nHost: a\nX: b\r\n\r\n", 400),
          "version": ("POST PATH HTTP/3.0\r\nHost: a\r\n\r\n", 505), "coding": ("POST PATH HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n", 501), "target": ("POST PATH?" + "a" * 9000 + " HTTP/1.1\r\nHost: a\r\n\r\n", 414),
          "no host": ("POST PATH HTTP/1.1\r\n\r\n", 400), "expectation": ("POST PATH HTTP/1.1\r\nHost: localhost\r\nExpect: x\r\nContent-Type: application/json\r\nx-api-key: KEY\r\nContent-Length: 1\r\n\r\n", 417)}


@pytest.mark.parametrize("client", PATHS)
@pytest.mark.parametrize("name", UNREAD)
def test_corpus_speaks_the_clients_format(gateway: Gateway, name: str, client: str) -> None:
    """Also where no more than the first line could be read."""
    raw, status = UNREAD[name]
    [reply], _ = talk(gateway, raw.replace("PATH", PATHS[client]).replace("KEY", gateway.key).encode())
    assert reply.status == status and reply.headers["connection"] == "close"
    check_envelope(reply, client)


# ---------------------------------------------------------------- body

def large(client: Client, raw: bytes, piece: bytes, n_bytes: int) -> Reply:
    """Sends on until it is answered."""
    client.send(raw)
    sent = 0
    try:
        while sent < n_bytes:
            client.send(piece)
            sent += len(piece)
    except OSError:
        pass
    return client.read_all(5.0)


BODIES: dict[str, tuple[list[str], bytes, int, int]] = {      # lines of the head, what is sent again and again, up to how much, the status
    "length over the limit, nothing sent": (["Content-Length: 33554433"], b"", 0, 413),
    "length over the limit, sent anyway": (["Content-Length: 200000000"], b"a" * 65_536, 1 << 23, 413),
    "length over the limit, expected": (["Content-Length: 33554433", "Expect: 100-continue"], b"", 0, 413),
    "chunks over the limit": ([TE], b"10000\r\n" + b"a" * 65_536 + b"\r\n", 1 << 27, 413),
    "one chunk over the limit": ([TE, "X: 1"], b"7fffffff\r\n" + b"a" * 65_536, 1 << 27, 413),
}


@pytest.mark.parametrize("client", PATHS)
@pytest.mark.parametrize("name", BODIES)
def test_body_too_large(gateway: Gateway, module_provider: Provider, name: str, client: str) -> None:
    lines, piece, n_bytes, status = BODIES[name]
    before = len(module_provider.requests), gateway.rss_bytes()
    if name == "one chunk over the limit":
        raw, piece = head(*lines, start=f"POST {PATHS[client]} HTTP/1.1") + b"7fffffff\r\n", b"a" * 65_536
    else:
        raw = head(*lines, start=f"POST {PATHS[client]} HTTP/1.1")
    with gateway.connect() as link:
        reply = large(link, raw.replace(b"KEY", gateway.key.encode()), piece, n_bytes) if n_bytes else large(link, raw.replace(b"KEY", gateway.key.encode()), b"", 0)
    assert reply.status == status and link.ended in ("eof", "reset"), reply.raw[:300]
    check_envelope(reply, client)
    assert len(module_provider.requests) == before[0] and gateway.rss_bytes() - before[1] < 160 << 20


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "identity, gzip", "zstd"])
def test_body_compressed(gateway: Gateway, coding: str) -> None:
    """Nothing is ever inflated for a client: a bomb is so many bytes of no JSON."""
    import gzip
    raw = gzip.compress(json.dumps(body_of("chat", padding="a" * 10_000_000)).encode())
    reply = gateway.request("POST", CHAT, raw, {"content-encoding": coding})
    assert reply.status == 400 and "UTF-8" in check_envelope(reply) or reply.status == 415


# ---------------------------------------------------------------- json

def nested(depth: int, opening: str = "[", closing: str = "]", inside: str = "") -> str:
    return opening * depth + inside + closing * depth


def with_field(client: str, field: str) -> bytes:
    """A sound body with one more field in front, as text."""
    return ("{" + field + ", " + json.dumps(body_of(client))[1:]).encode("utf-8", "surrogatepass")


#: What a body may say; {..} around a field stands for a sound body with it.
JSONS: dict[str, str | bytes] = {
    "empty": b"", "blank": b" \n\t ", "text": b"hello", "cut": b'{"model": "well/m", "messages": [', "single quotes": b"{'model': 'm'}", "comment": b'{} // x', "two values": b"{}{}", "trailing comma": b'{"a": 1,}',
    "list": b"[]", "null": b"null", "number": b"5", "string": b'"x"', "true": b"true", "empty object": b"{}", "NaN": b"NaN", "UTF-16": "{}".encode("utf-16"), "UTF-32": "{}".encode("utf-32"), "Latin-1": b'{"a": "\xe9"}',
    "overlong": b'{"a": "\xc0\xaf"}', "surrogate in UTF-8": b'{"a": "\xed\xa0\x80"}', "cut UTF-8": b'{"a": "\xe2\x82', "beyond Unicode": b'{"a": "\xf4\x90\x80\x80"}', "NULs": bytes(100), "form": b"model=m&messages=x", "XML": b"<?xml version='1.0'?><a/>",
    "multipart": b"--x\r\nContent-Disposition: form-data\r\n\r\n{}\r\n--x--", "deep lists": nested(100_000).encode(), "deep and cut": b"[" * 1_000_000, "deep objects": nested(50_000, '{"a":', "}", "1").encode(),
    "deep mixture": nested(60_000, '[{"a":', "}]", "1").encode(), "pickle": b"\x80\x04\x95\x1f\x00\x00\x00", "a key only": b'{"a"}', "an open string": b'{"a": "', "an escape cut": b'{"a": "\\u00', "minus": b"-", "bare word": b"{a: 1}",
    "{NaN}": '"temperature": NaN', "{Infinity}": '"x": Infinity', "{-Infinity}": '"x": [{"y": -Infinity}]', "{float beyond all}": '"temperature": 1e999', "{minus float beyond all}": '"x": {"y": [-1e400]}', "{5000 digits}": f'"seed": {"9" * 5000}',
    "{5000 digits, minus}": f'"x": [-{"1" * 5000}]', "{deep}": f'"x": {nested(100_000)}', "{deep inside the limit of the parser}": f'"x": {nested(900)}', "{deep objects}": '"x": ' + nested(500, '{"a":', "}", "1"), "{twice}": '"model": "trap/m"',
    "{stream twice}": '"stream": true, "stream": false', "{twice inside}": '"metadata": {"a": "1", "a": "2"}', "{control}": '"user": "\x01"', "{leading zero}": '"n": 01', "{hex}": '"n": 0x1', "{plus}": '"n": +1', "{dot}": '"n": .5', "{bad escape}": r'"user": "\x41"',
}
#: What is sound, or at least harmless: answered.
HARMLESS: dict[str, str] = {
    "{lone surrogate}": r'"user": "\ud800"', "{surrogates the wrong way}": r'"user": "\udc00\ud800"', "{NUL}": r'"user": "a\u0000b"', "{long key}": f'"{"k" * 50_000}": 1', "{many keys}": ", ".join(f'"k{number}": {number}' for number in range(5000)),
    "{long string}": f'"user": "{"u" * 200_000}"', "{4000 digits}": f'"seed2": {"9" * 4000}', "{small float}": '"x": 1e-400', "{precision}": '"x": 0.1000000000000000055511151231257827021181583404541015625',
    "{prototype}": '"__proto__": {"admin": true}, "constructor": {"prototype": {}}', "{nesting below the limit}": f'"x": {nested(90)}',
}


@pytest.mark.parametrize("client", PATHS)
@pytest.mark.parametrize("name", JSONS)
def test_json_refused(gateway: Gateway, module_provider: Provider, name: str, client: str) -> None:
    text = JSONS[name]
    before = len(module_provider.requests)
    began = time.monotonic()
    reply = gateway.post(PATHS[client], text if isinstance(text, bytes) else with_field(client, text))
    assert reply.status == 400 and time.monotonic() - began < 5.0, reply.raw[:300]
    check_envelope(reply, client)
    assert len(module_provider.requests) == before


@pytest.mark.parametrize("client", PATHS)
@pytest.mark.parametrize("name", HARMLESS)
def test_json_harmless(gateway: Gateway, name: str, client: str) -> None:
    """Served, or refused by name: no part of it breaks anything, and what goes on is ASCII."""
    reply = gateway.post(PATHS[client], with_field(client, HARMLESS[name]))
    assert reply.status in (200, 400), reply.raw[:300]
    if reply.status == 400:
        check_envelope(reply, client)
    else:
        json.loads(reply.body)


# ---------------------------------------------------------------- auth

WRONG = "sk-" + "0" * 64
#: Headers that show no valid key. GOOD stands for the gateway's.
NO_KEYS: dict[str, list[tuple[str, str]]] = {
    "nothing": [], "empty": [("authorization", "")], "scheme alone": [("authorization", "Bearer")], "scheme and blanks": [("authorization", "Bearer   ")], "no scheme": [("authorization", "GOOD")], "basic": [("authorization", "Basic GOOD")],
    "token": [("authorization", "Token GOOD")], "no space": [("authorization", "BearerGOOD")], "tab": [("authorization", "Bearer\tGOOD")], "another header": [("x-auth-token", "GOOD")], "cookie": [("cookie", "key=GOOD; authorization=Bearer GOOD")],
    "forwarded": [("x-forwarded-authorization", "Bearer GOOD")], "proxy": [("proxy-authorization", "Bearer GOOD")], "unknown": [("authorization", f"Bearer {WRONG}")], "one less": [("authorization", "Bearer LESS")], "one more": [("authorization", "Bearer GOODa")],
    "prefix": [("authorization", "Bearer SHORT")], "prefix alone": [("authorization", "Bearer sk-")], "upper case": [("authorization", "Bearer UPPER")], "doubled": [("authorization", "Bearer GOOD, Bearer GOOD")], "joined": [("authorization", "Bearer GOODGOOD")],
    "quoted": [("authorization", 'Bearer "GOOD"')], "in brackets": [("authorization", "Bearer <GOOD>")], "hash": [("authorization", "Bearer HASH")], "SQL": [("authorization", "Bearer ' OR '1'='1")], "SQL, union": [("x-api-key", "x' UNION SELECT 1,2,3 --")],
    "SQL, statement": [("api-key", "'; DROP TABLE api_keys; --")], "wildcard": [("authorization", "Bearer sk-%")], "underscores": [("authorization", "Bearer " + "_" * 67)], "glob": [("authorization", "Bearer *")], "regular expression": [("authorization", "Bearer .*")],
    "null": [("authorization", "Bearer null")], "undefined": [("authorization", "Bearer undefined")], "true": [("authorization", "Bearer true")], "beyond ASCII": [("authorization", "Bearer sk-\u00e9\u00ff")], "full width": [("authorization", "Bearer \u00ef\u00bc\u00b3k")],
    "20 KB": [("authorization", "Bearer " + "a" * 20_000)], "template": [("authorization", "Bearer ${GOOD}")], "provider's": [("authorization", f"Bearer {FAKE_KEY}")], "zero": [("x-api-key", "0")], "path": [("x-api-key", "../../etc/passwd")],
    "wrong wins": [("authorization", f"Bearer {WRONG}"), ("x-api-key", "GOOD")], "wrong x-api-key wins": [("x-api-key", WRONG), ("api-key", "GOOD")],
}


def shown(gateway: Gateway, rows: Iterable[tuple[str, str]]) -> bytes:
    import hashlib
    words = {"GOOD": gateway.key, "LESS": gateway.key[:-1], "SHORT": gateway.key[:20], "UPPER": gateway.key.upper(), "HASH": hashlib.sha256(gateway.key.encode()).hexdigest()}
    text = "".join(f"{name}: {value}\r\n" for name, value in rows)
    for word, value in words.items():
        text = text.replace(word, value)
    return text.encode("latin-1")


@pytest.mark.parametrize("client", PATHS)
@pytest.mark.parametrize("name", NO_KEYS)
def test_auth_refused(gateway: Gateway, module_provider: Provider, name: str, client: str) -> None:
    before = len(module_provider.requests)
    raw = gateway.request_bytes("POST", PATHS[client], body_of(client), key="").replace(b"\r\n\r\n", b"\r\n" + shown(gateway, NO_KEYS[name]) + b"\r\n", 1)
    [reply], _ = talk(gateway, raw)
    assert reply.status == 401
    message = check_envelope(reply, client)
    assert "API key" in message and gateway.key not in message and WRONG not in message
    assert len(module_provider.requests) == before


@pytest.mark.parametrize("query", ["key=GOOD", "api_key=GOOD", "access_token=GOOD", "authorization=Bearer%20GOOD", "x-api-key=GOOD", "token=GOOD"])
def test_auth_in_a_query_is_none(gateway: Gateway, query: str) -> None:
    assert gateway.post(f"{CHAT}?{query.replace('GOOD', gateway.key)}", body_of("chat"), key="").status == 401


def test_auth_in_a_body_is_none(gateway: Gateway) -> None:
    for field in ("api_key", "key", "authorization"):
        assert gateway.post(CHAT, body_of("chat", **{field: gateway.key}), key="").status == 401


def test_auth_does_not_stick_to_a_connection(gateway: Gateway) -> None:
    """Each request shows its key, also behind one that did."""
    ask = json.dumps(body_of("chat")).encode()
    good = head(sized(ask)).replace(b"KEY", gateway.key.encode()) + ask
    bare = b"GET /health?deep=1 HTTP/1.1\r\nHost: localhost\r\n\r\n"
    replies, _ = talk(gateway, good + bare + good + bare, 4)
    assert [reply.status for reply in replies] == [200, 401, 200, 401]


def test_auth_ends_with_the_key(gateway: Gateway) -> None:
    """On a connection that stays open, within a second."""
    made = gateway.command("key", "create", "short-lived")
    key = made.stdout.split()[0]
    with gateway.connect() as client:
        for expected in (200, 401):
            client.raw.clear()
            client.send(gateway.request_bytes("GET", "/health?deep=1", key=key, close=False))
            client.read_until(lambda raw: len(replies_in(raw)) == 1)
            assert client.reply().status == expected
            if expected == 200:
                number = made.stdout.partition("(id ")[2].split(",")[0]
                assert gateway.command("key", "revoke", number).returncode == 0


def test_auth_compares_in_constant_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A key is looked up by its hash, and the hashes are compared by hmac.compare_digest; a time is not measured here, as none shows."""
    import aicarousel
    path = tmp_path / "aicarousel.db"
    aicarousel.open_database(path).close()
    key, _ = aicarousel.create_key(path, "x")
    ring, compared = aicarousel.KeyRing(path, []), []
    real = aicarousel.hmac.compare_digest
    monkeypatch.setattr(aicarousel.hmac, "compare_digest", lambda one, other: compared.append((len(one), len(other))) or real(one, other))
    assert ring.find(key) and not ring.find(key[:-1] + "x") and not ring.find("")
    assert [other for _, other in compared] == [64] * 3
    ring.close()


# ---------------------------------------------------------------- paths

NOWHERE = ("//v1/models", "/v1//models", "/v1/./models", "/v1/../v1/models", "/%76%31/models", "/v1%2fmodels", "/v1/models%2f..", "/V1/models", "/v1/Models", "/v1/models/", "/v1/models;x", "/v1/models.json", "/v1/chat/completions/", "/v1/chat",
           "/v1", "/v1/", "/v2/models", "/v1/v1/models", "/api", "/api/anthropic", "/api/anthropic/", "/api/anthropic/v1/chat/completions", "/api/anthropic/admin/stats", "/api/anthropic/../../admin/stats", "/etc/passwd", "/../../etc/passwd",
           "/..%2f..%2fetc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/.env", "/models.json", "/.git/config", "/aicarousel.py", "/data/aicarousel.db", "/admin", "/admin/", "/admin/keys", "/admin/config", "/metrics/", "/favicon.ico", "/robots.txt",
           "/v1/files", "/v1/engines", "/v1/audio/speech", "/v1/responses/resp_1", "/v1/messages/batches", "/wp-login.php", "/?x", "/*", "/v1/models?", "/CON", "/\\..\\..", "/v1/models/..%2f..%2fadmin%2fstats")
#: Administration by every way that might slip past the check.
ADMIN_WAYS = ("/admin/stats", "/admin/explain", "/admin/quota", "/admin/routes", "/v1/admin/stats", "//admin/stats", "/admin//stats", "/Admin/stats", "/admin/stats/", "/admin/./stats", "/admin%2fstats", "/%61dmin/stats", "/admin/stats;x=1", "/x/../admin/stats")


@pytest.mark.parametrize("path", NOWHERE)
def test_paths(gateway: Gateway, path: str) -> None:
    """One parsed path is what authentication and routing look at; no file is ever served."""
    replies, _ = talk(gateway, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {gateway.key}\r\nConnection: close\r\n\r\n".encode())
    assert [reply.status for reply in replies] == ([200] if path in ("/?x", "/v1/models?") else [404]), replies[0].raw[:300]
    assert b"root:" not in replies[0].raw and FAKE_KEY.encode() not in replies[0].raw


@pytest.mark.parametrize("path", ADMIN_WAYS)
def test_paths_of_administration(gateway: Gateway, path: str) -> None:
    """An ordinary key, no key, and headers that claim to be somebody."""
    for key in (gateway.key, ""):
        for headers in ({}, {"x-forwarded-for": "127.0.0.1", "x-original-url": "/health", "x-rewrite-url": "/health"}, {"host": "localhost"}, {"x-http-method-override": "GET"}):
            reply = gateway.request("GET", path, headers=headers, key=key)
            assert reply.status in (401, 403, 404), reply.raw
            check_envelope(reply)


# ---------------------------------------------------------------- browser: what pages of other origins can send

ORIGINS = ("http://evil.test", "https://evil.test", "null", "file://", "http://127.0.0.1", "http://localhost:1", "http://127.0.0.1.evil.test", "https://127.0.0.1:PORT", "http://localhost:PORT", "chrome-extension://abcdefgh", "http://127.0.0.1:PORT.evil.test")
SIMPLE_TYPES = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "text/plain; application/json")


@pytest.mark.parametrize("origin", ORIGINS)
def test_browser_origin(gateway: Gateway, module_provider: Provider, origin: str) -> None:
    before, headers = len(module_provider.requests), {"origin": origin.replace("PORT", str(gateway.port))}
    for reply in (gateway.post(CHAT, body_of("chat"), headers=headers), gateway.post(CHAT, body_of("chat"), headers={**headers, "content-type": "text/plain"}), gateway.get("/v1/models", headers=headers),
                  gateway.get("/", headers=headers), gateway.request("OPTIONS", CHAT, headers={**headers, "access-control-request-method": "POST", "access-control-request-private-network": "true"}),
                  gateway.request("GET", "/v1/responses", headers={**headers, "upgrade": "websocket", "connection": "upgrade, close"})):
        assert reply.status == 403 and not [name for name in reply.headers if name.startswith("access-control")], reply.raw
        check_envelope(reply)
    assert len(module_provider.requests) == before


@pytest.mark.parametrize("kind", SIMPLE_TYPES)
def test_browser_simple_request(gateway: Gateway, module_provider: Provider, kind: str) -> None:
    """What needs no preflight is no JSON, even where no origin is named."""
    before = len(module_provider.requests)
    assert gateway.post(CHAT, body_of("chat"), headers={"content-type": kind}).status == 415
    assert len(module_provider.requests) == before


@pytest.mark.parametrize("host", ["evil.test", "evil.test:PORT", "localhost.evil.test", "127.0.0.1.nip.io"])
def test_browser_rebinding(gateway: Gateway, host: str) -> None:
    for path in ("/", "/health", "/v1/models", "/admin/stats"):
        reply = gateway.get(path, headers={"host": host.replace("PORT", str(gateway.port))})
        assert reply.status == 421
        check_envelope(reply)


@pytest.mark.parametrize(("site", "mode", "status"), [("cross-site", "no-cors", 403), ("same-site", "no-cors", 403), ("cross-site", "websocket", 403), ("cross-site", "", 403), ("cross-site", "navigate", 200), ("none", "navigate", 200), ("same-origin", "cors", 200)])
def test_browser_embedding(gateway: Gateway, site: str, mode: str, status: int) -> None:
    """An image or a script of another page's names no origin, but modern browsers say where it comes from."""
    for path in ("/", "/health", "/v1/models"):
        assert gateway.get(path, headers={"sec-fetch-site": site, **({"sec-fetch-mode": mode} if mode else {})}).status == status


def test_browser_finds_loopback_alone(gateway: Gateway) -> None:
    listening = [line.split()[1] for line in Path(f"/proc/{gateway.pid}/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A" and int(line.split()[1].split(":")[1], 16) == gateway.port]
    assert listening == [f"0100007F:{gateway.port:04X}"]


# ---------------------------------------------------------------- inject: both ways

FORWARDED = {"cookie": "a=b", "x-forwarded-for": "10.0.0.1", "x-forwarded-host": "evil.test", "x-real-ip": "10.0.0.1", "forwarded": "for=10.0.0.1", "referer": "http://evil.test", "openai-organization": "org-1", "openai-project": "p", "x-custom": "1",
             "proxy-authorization": "Basic eDp5", "x-api-key": "sk-client", "x-goog-api-key": "sk-client", "http-referer": "http://evil.test", "x-title": "evil", "via": "1.1 evil", "te": "trailers", "accept-language": "de", "user-agent": "evil/1", "accept-encoding": "br",
             "x-original-url": "/admin", "content-encoding": "identity", "x-stainless-lang": "python"}
OVERRIDES = {"api_base": "http://TRAP", "base_url": "http://TRAP", "api_key": "sk-x", "headers": {"x-evil": "1"}, "extra_headers": {"authorization": "Bearer x"}, "extra_body": {"model": "x"}, "custom_llm_provider": "openai", "mock_response": "pwned",
             "fallbacks": ["trap/m"], "user_config": {"model_list": []}, "proxy": "http://TRAP", "timeout": 0.001, "api_version": "1", "organization": "org-1", "deployment_id": "x", "azure_endpoint": "http://TRAP"}


@pytest.mark.parametrize("name", FORWARDED)
def test_inject_headers_to_providers(gateway: Gateway, module_provider: Provider, name: str) -> None:
    before = len(module_provider.calls("well"))
    headers = {name: FORWARDED[name]} if name != "x-api-key" else {name: gateway.key}
    assert gateway.post(CHAT, body_of("chat"), headers=headers).status == 200
    [sent] = module_provider.calls("well")[before:]
    assert FORWARDED[name] not in (value for key, value in sent.header_list if key != "accept-encoding") and gateway.key not in str(sent.header_list)
    assert set(sent.headers) <= {"host", "user-agent", "content-type", "accept-encoding", "authorization", "accept", "content-length", "idempotency-key"}
    assert sent.headers["authorization"] == f"Bearer {FAKE_KEY}" and sent.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("name", OVERRIDES)
def test_inject_by_fields(gateway: Gateway, module_provider: Provider, name: str) -> None:
    before, traps = len(module_provider.calls("well")), len(module_provider.calls("trap"))
    value = json.loads(json.dumps(OVERRIDES[name]).replace("http://TRAP", module_provider.url("trap")))
    reply = gateway.post(CHAT, body_of("chat", **{name: value}))
    assert reply.status in (200, 400)
    if reply.status == 200:
        assert reply.text == TEXT
        [sent] = module_provider.calls("well")[before:]
        assert sent.headers["authorization"] == f"Bearer {FAKE_KEY}" and "x-evil" not in sent.headers and sent.json["model"] == "m"
        assert name not in sent.json or name in ("proxy", "timeout", "api_version", "organization", "deployment_id", "azure_endpoint")       # words of SDKs, not of routers: the provider's to judge
    assert len(module_provider.calls("trap")) == traps


@pytest.mark.parametrize("name", ["idempotency-key", "anthropic-beta", "anthropic-version", "x-session-id", "x-request-id", "user-agent"])
def test_inject_lines_into_heads(gateway: Gateway, module_provider: Provider, name: str) -> None:
    """Whatever a header of the client's holds, a provider's request has the lines it should."""
    before = len(module_provider.calls("well"))
    for value in ("a\x0bx-evil: 1", "a\x0cb", "\u00e9\u00ff", "a" * 5000, "a\tb", "%0d%0ax-evil: 1", "\\r\\nx-evil: 1"):
        raw = gateway.request_bytes("POST", CHAT, body_of("chat")).replace(b"\r\n\r\n", f"\r\n{name}: {value}\r\n\r\n".encode("latin-1"), 1)
        [reply], _ = talk(gateway, raw)
        assert reply.status == (400 if value[1] in "\x0b\x0c" else 200), (value, reply.raw)
    for sent in module_provider.calls("well")[before:]:
        assert "x-evil" not in sent.headers and all(line == line.strip() and "\n" not in line and "\r" not in line for _, line in sent.header_list)


@pytest.mark.parametrize("client", PATHS)
def test_inject_headers_to_clients(gateway: Gateway, client: str) -> None:
    reply = gateway.post(PATHS[client], body_of(client, "loud/m"))
    assert reply.status == 200 and "planted" not in str(reply.header_list)
    allowed = {"content-type", "content-length", "date", "connection", "transfer-encoding", "retry-after", "cache-control"}
    assert not [name for name in reply.headers if name not in allowed and not name.startswith(("x-aicarousel-", "x-ratelimit-", "anthropic-ratelimit-", "x-request-id"))], reply.headers


@pytest.mark.parametrize("text", ["x\n2026-01-01 00:00:00,000 ERROR forged", "x\r\nforged", "x\u2028forged", "x\x1b[2Jforged", "x\x85forged", "\u202eforged", "x\x00forged"])
def test_inject_log_lines(gateway: Gateway, text: str) -> None:
    """One line per entry, whatever a client calls its model."""
    before = gateway.log.count("forged")
    for client in PATHS:
        gateway.post(PATHS[client], body_of(client, text))
    gateway.get("/v1/models/x%0aforged")
    ends_at = time.monotonic() + 5.0
    while gateway.log.count("forged") < before + 3 and time.monotonic() < ends_at:
        time.sleep(0.02)
    lines = gateway.log.split("\n")
    assert all(line[:2] == "20" and line.isprintable() for line in lines if line), [line for line in lines if not line.isprintable()]


# ---------------------------------------------------------------- ssrf: addresses a client names

def pictured(client: str, url: str) -> Json:
    """A request with an image at `url`."""
    if client == "chat":
        return body_of(client, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])
    if client == "messages":
        return body_of(client, messages=[{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": url}}]}])
    return body_of(client, input=[{"role": "user", "content": [{"type": "input_image", "image_url": url}]}])


@pytest.mark.parametrize("client", PATHS)
@pytest.mark.parametrize("url", ["TRAP/image.png", "http://169.254.169.254/latest/meta-data", "file:///etc/passwd", "gopher://127.0.0.1:6379/_x"])
def test_ssrf_images(gateway: Gateway, module_provider: Provider, client: str, url: str) -> None:
    """The gateway fetches nothing: a URL goes to the provider as it is, or nowhere."""
    traps, opened = len(module_provider.calls("trap")), len(module_provider.calls("well"))
    reply = gateway.post(PATHS[client], pictured(client, url.replace("TRAP", module_provider.url("trap"))))
    assert reply.status in (200, 400) and b"root:" not in reply.body
    assert len(module_provider.calls("trap")) == traps and len(module_provider.calls("well")) - opened == (reply.status == 200)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_ssrf_redirects(gateway: Gateway, module_provider: Provider, status: int) -> None:
    traps = len(module_provider.calls("trap"))
    reply = gateway.chat(f"moved{status}/m")
    assert reply.status == 502 and "location" not in reply.headers and module_provider.base.encode() not in reply.raw
    assert len(module_provider.calls("trap")) == traps


# ---------------------------------------------------------------- after all of it

def test_corpus_left_no_trace_behind(gateway: Gateway) -> None:
    """The last one: it serves, and nothing of all this was a bug of its own."""
    assert gateway.chat("well/m").text == TEXT
    assert gateway.stop() == 0
    assert "Traceback" not in gateway.log and not [line for line in gateway.log.splitlines() if line.split()[2] == "ERROR"]
    assert gateway.key not in gateway.log and FAKE_KEY not in gateway.log


# ---------------------------------------------------------------- the table

FILES = ("test_hostile.py", "test_hostile_load.py", "test_fuzz.py", "test_secrets.py", "test_browser.py", "test_storage.py")


class Tally:
    """Counts the outcome of each case, by group."""

    def __init__(self) -> None:
        self.cases, self.held, self.seconds = Counter[str](), Counter[str](), Counter[str]()
        self.others: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        file, _, name = report.nodeid.partition("::test_")
        words = name.split("[")[0].split("_")
        group = ("clock" if "clock" in words else "storage") if file.endswith("test_storage.py") else words[0]
        self.seconds[group] += report.duration
        if report.when == "call" or report.outcome != "passed":
            self.cases[group] += report.when == "call" or report.outcome == "skipped"
            self.held[group] += report.when == "call" and report.passed
        if report.outcome != "passed":
            self.others.append(f"{report.outcome}: {report.nodeid}")


def main() -> int:
    """Runs every group and prints the table; 0 when every case held and none was skipped."""
    tally = Tally()
    status = pytest.main(["-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", *(str(HERE / name) for name in FILES if (HERE / name).exists()), *sys.argv[1:]], plugins=[tally])
    print(f"{'group':<12}{'cases':>8}{'held':>8}{'seconds':>10}")
    for group in tally.cases:
        print(f"{group:<12}{tally.cases[group]:>8}{tally.held[group]:>8}{tally.seconds[group]:>10.1f}")
    print(f"{'all':<12}{sum(tally.cases.values()):>8}{sum(tally.held.values()):>8}{sum(tally.seconds.values()):>10.1f}")
    print("\n".join(tally.others))
    return 0 if status == 0 and tally.held == tally.cases else 1


if __name__ == "__main__":
    raise SystemExit(main())
