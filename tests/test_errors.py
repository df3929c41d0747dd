"""Every way a Chat client can be told of an error: status, envelope, content type, and that nothing private shows.

Secrets are planted where a provider or an operator would have them: keys, base URLs, headers, and providers that say them aloud.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from fakes import (DONE, ROLE, Chunk, Close, End, Gateway, Head, Pause, Provider, Reply, Script, Silence, answer, chat_answer, chat_body, content, frame, healthy, opened)

PLAIN_KEY = "hunter2 correct horse".replace(" ", "-") + "-0001"     #: looks like no vendor's key: only its value gives it away
VENDOR_KEY = "sk-proj-planted0123456789abcdefghijkl"
HEADER_SECRET = "planted-header-value-0002"
PATH_SECRET = "planted-path-0003"
TRACE = 'Traceback (most recent call last):\n  File "/srv/planted/app.py", line 5, in <module>\nKeyError'
ALOUD = f"Incorrect key {PLAIN_KEY} (Authorization: Bearer {VENDOR_KEY}) for org-planted12345 with {HEADER_SECRET}"


def error(message: str, status: int, *headers: tuple[str, str], **fields: Any) -> list[Any]:
    """Steps of a provider's error that says all its secrets."""
    told = [("set-cookie", f"session={PLAIN_KEY}"), ("www-authenticate", f"Bearer {VENDOR_KEY}"), ("x-upstream-url", "http://planted.internal"), ("server", "planted-server")]
    return answer({"error": {"message": f"{message} {ALOUD}", "type": "x", **fields}}, status, [*told, *headers])


def in_stream(name: str, *steps: Any) -> list[Any]:
    """Steps of a stream whose first words reach the client before the rest comes."""
    return opened(ROLE, content("first words"), Pause(f"{name} goes on"), *steps)


HTML = f"<html><title>502</title><body><h1>Bad gateway</h1> {ALOUD} at http://planted.internal:8080/x</body></html>".encode()
ERROR_EVENT = frame({"error": {"message": f"Overloaded. {ALOUD}", "code": PLAIN_KEY}})

#: What the only provider does, the statuses the client may see, and the code of the error.
PROVIDERS: dict[str, tuple[Script, tuple[int, ...], str | None]] = {
    "rate": (error("Slow down.", 429, ("retry-after", "300")), (429,), "rate_limit_exceeded"),
    "quota": (error("You exceeded your current quota.", 429, code="insufficient_quota"), (429,), "insufficient_quota"),
    "payment": (error("Insufficient credits.", 402), (429,), "insufficient_quota"),
    "credential": (error("Wrong key.", 401), (502,), "credential_rejected"),
    "forbidden": (error("Forbidden.", 403), (502, 503), None),
    "model": (error("The model does not exist.", 404, code="model_not_found"), (404,), "model_not_found"),
    "request": (error("Bad field.", 400), (400,), None),
    "request with secrets everywhere": (error("Bad field.", 400, code=PLAIN_KEY, param=VENDOR_KEY, type=HEADER_SECRET), (400,), None),
    "unprocessable": (error("Bad field.", 422, param="messages"), (400, 422), None),
    "too long": (error("This model's maximum context length is 100 tokens.", 400, code="context_length_exceeded"), (400,), "context_length_exceeded"),
    "too large": (answer(HTML, 413, [("content-type", "text/html")]), (413,), "request_too_large"),
    "server": (error("Oops.", 500), (502,), None),
    "traceback": (answer(TRACE.encode(), 500, [("content-type", "text/plain")]), (502,), None),
    "traceback in JSON": (answer({"detail": TRACE}, 500), (502,), None),
    "HTML": (answer(HTML, 502, [("content-type", "text/html")]), (502,), None),
    "HTML with 200": (answer(HTML, 200, [("content-type", "text/html")]), (502,), None),
    "overloaded": (error("Overloaded.", 503), (503,), "server_is_overloaded"),
    "overloaded, 529": (error("Overloaded.", 529), (503,), "server_is_overloaded"),
    "redirect": (answer(b"", 302, [("location", f"http://planted.internal/{PLAIN_KEY}")]), (502,), None),
    "no content": ([Head(204)], (502,), None),
    "error with 200": (answer({"error": {"message": f"Oops. {ALOUD}"}}), (502,), None),
    "empty with 200": (answer(chat_answer("")), (502,), None),
    "not JSON": (answer(f"{{nonsense {ALOUD}".encode(), 200, [("content-type", "application/json")]), (502,), None),
    "not HTTP": ([f"SSH-2.0-{PLAIN_KEY}\r\n\r\n".encode(), Close()], (502,), None),
    "head junk": ([f"HTTP/1.1 200 OK\r\nX: {PLAIN_KEY}\nY\r\n\r\n".encode(), Close()], (502,), None),
    "closed": ([Close()], (502,), None),
    "silent": ([Silence()], (504,), "timeout"),
    "stalled": (opened(ROLE, Silence()), (504,), "timeout"),
    "cut": ([Head(200, [("content-length", "999")]), b'{"choices"', Close()], (502,), None),
}
#: What comes after the first words of a stream, and what of it the client can tell by the code.
STREAMS: dict[str, tuple[list[Any], str | None]] = {
    "error event": ([ERROR_EVENT, End()], None),
    "error event and done": ([ERROR_EVENT, DONE, End()], None),
    "garbage": ([f"data: {{nonsense {ALOUD}\n\n".encode(), End()], None),
    "HTML": ([b"data: " + HTML + b"\n\n", End()], None),
    "cut": ([Close()], None),
    "ended": ([End()], None),
    "silent": ([Silence()], "timeout"),
    "bad chunk": ([Chunk(b""), f"{PLAIN_KEY}\r\n".encode(), Close()], None),
}
PRIVATE = [PLAIN_KEY, VENDOR_KEY, HEADER_SECRET, PATH_SECRET, "planted", "127.0.0.1", "Traceback", "File \"", "<html", "<h1", "aicarousel.py"]


@pytest.fixture(scope="module")
def gateway(module_provider: Provider, module_gateway_factory: Callable[..., Gateway]) -> Gateway:
    """A gateway with a provider for each case; a model's name is the provider's."""
    scripts = {**{f"p{number}": script for number, (script, _, _) in enumerate(PROVIDERS.values())},
               **{f"s{number}": in_stream(name, *[Chunk(step) if isinstance(step, bytes) and name != "bad chunk" else step for step in steps])
                  for number, (name, (steps, _)) in enumerate(STREAMS.items())}, "well": healthy(), "refused": []}
    models: dict[str, Any] = {"carousel": {"fallback": "none", "maxWait": 0, "unknownModel": "reject"}}
    for name, script in scripts.items():
        url = module_provider.refusing() if name == "refused" else module_provider.listen(name, script)
        models[name] = {"baseUrl": url.replace("/v1", f"/{PATH_SECRET}/v1"), "default": "m", "enableFallback": False, "models": ["m"], "keys": ["env:PLANTED_KEY"],
                        "headers": {"X-Planted-Token": HEADER_SECRET}, "timeouts": {"firstByte": 0.4, "idle": 0.4}}
    return module_gateway_factory(models, {"PLANTED_KEY": PLAIN_KEY, "OPENAI_API_KEY": VENDOR_KEY}, arguments=["--log-level", "debug"])


def check_error(shown: Any, code: str | None) -> dict[str, Any]:
    """OpenAI's envelope; the error in it."""
    assert isinstance(shown, dict) and set(shown) == {"error"}, shown
    told: dict[str, Any] = shown["error"]
    assert {"message", "type", "param", "code"} <= set(told) <= {"message", "type", "param", "code", "attempts"}, told
    assert isinstance(told["message"], str) and 5 < len(told["message"]) < 3000 and isinstance(told["type"], str)
    assert all(told[name] is None or isinstance(told[name], str) for name in ("param", "code"))
    assert code is None or told["code"] == code, told
    for row in told.get("attempts", []):
        assert set(row) == {"provider", "model", "status", "reason", "ms"} and row["reason"]
    return told


def check_private(reply: Reply, *, also: tuple[str, ...] = ()) -> None:
    """Nothing of what was planted shows, in the head or in the body."""
    for word in (*PRIVATE, *also):
        assert word.encode() not in reply.raw, f"{word!r} in {reply.raw!r}"


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", [*PROVIDERS, "refused"])
def test_provider_fails(gateway: Gateway, name: str, streamed: bool) -> None:
    """Before anything went out: a status, never a stream, and never the provider's 401."""
    _, statuses, code = PROVIDERS.get(name, ([], (502,), None))
    provider = name if name == "refused" else f"p{list(PROVIDERS).index(name)}"
    reply = gateway.chat(f"{provider}/m", stream=streamed)
    assert reply.status in statuses and reply.complete, reply.raw
    assert reply.headers["content-type"] == "application/json" and reply.headers["x-aicarousel-request-id"]
    told = check_error(reply.json, code)
    check_private(reply)
    if reply.status in (429, 503):
        assert int(reply.headers["retry-after"]) >= 1
    if reply.headers["x-aicarousel-attempts"] != "0":
        assert {row["provider"] for row in told["attempts"]} == {provider}


@pytest.mark.parametrize("name", STREAMS)
def test_stream_breaks(gateway: Gateway, module_provider: Provider, name: str) -> None:
    """After the first words: what came, then one error event."""
    steps, code = STREAMS[name]
    with gateway.start_chat(f"s{list(STREAMS).index(name)}/m") as client:
        client.read_until(b"first words")
        module_provider.release(f"{name} goes on")
        reply = client.read_all()
    assert reply.status == 200 and reply.streamed and reply.complete and not reply.done, reply.raw
    assert reply.text == "first words" and sum("error" in chunk for chunk in reply.chunks) == 1
    check_error(reply.chunks[-1], code)
    check_private(reply)


CHAT = "/v1/chat/completions"
SOUND = json.dumps(chat_body("well/m")).encode()
#: Requests that never reach a provider: method, path, body, headers, key, status, code.
REQUESTS: dict[str, tuple[str, str, Any, dict[str, str], str | None, int, str | None]] = {
    "no key": ("POST", CHAT, SOUND, {}, "", 401, "invalid_api_key"),
    "wrong key": ("POST", CHAT, SOUND, {}, PLAIN_KEY, 401, "invalid_api_key"),
    "provider's key": ("POST", CHAT, SOUND, {}, VENDOR_KEY, 401, "invalid_api_key"),
    "no JSON": ("POST", CHAT, f"{{{PLAIN_KEY}".encode(), {}, None, 400, None),
    "bad field": ("POST", CHAT, {**chat_body("well/m"), "temperature": PLAIN_KEY}, {}, None, 400, "invalid_type"),
    "bad role": ("POST", CHAT, {"messages": [{"role": PLAIN_KEY, "content": "Hi"}]}, {}, None, 400, "invalid_value"),
    "no messages": ("POST", CHAT, {"model": "well/m"}, {}, None, 400, None),
    "unknown model": ("POST", CHAT, chat_body("no-such-model"), {}, None, 404, "model_not_found"),
    "unknown model in the list": ("GET", "/v1/models/no-such-model", None, {}, None, 404, "model_not_found"),
    "unknown path": ("GET", f"/nothing/{PLAIN_KEY}", None, {}, None, 404, "not_found"),
    "wrong method": ("DELETE", CHAT, None, {}, None, 405, "method_not_allowed"),
    "form": ("POST", CHAT, SOUND, {"content-type": "text/plain"}, None, 415, None),
    "foreign page": ("POST", CHAT, SOUND, {"origin": f"http://{PLAIN_KEY}.test"}, None, 403, "forbidden"),
    "foreign host": ("POST", CHAT, SOUND, {"host": f"{PLAIN_KEY}.test"}, None, 421, "forbidden"),
    "bad host": ("POST", CHAT, SOUND, {"host": f"{PLAIN_KEY}@x"}, None, 400, None),
    "too large": ("POST", CHAT, b"", {"content-length": "99999999"}, None, 413, "request_too_large"),
    "other expectation": ("POST", CHAT, b"x", {"expect": PLAIN_KEY}, None, 417, None),
    "bad length": ("POST", CHAT, b"x", {"content-length": PLAIN_KEY}, None, 400, None),
    "other coding": ("POST", CHAT, None, {"content-type": "application/json", "transfer-encoding": PLAIN_KEY}, None, 501, None),
    "long target": ("GET", f"/v1/models?{PLAIN_KEY}{'a' * 9000}", None, {}, None, 414, None),
    "fragment": ("GET", f"/v1/models#{PLAIN_KEY}", None, {}, None, 400, None),
    "large head": ("GET", "/v1/models", None, {"x": PLAIN_KEY + "a" * 70_000}, None, 431, None),
    "line end in a header": ("GET", "/v1/models", None, {"x": f"{PLAIN_KEY}\nX: y"}, None, 400, None),
    "deep health without key": ("GET", "/health?deep=1", None, {}, "", 401, "invalid_api_key"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_request_fails(gateway: Gateway, module_provider: Provider, name: str) -> None:
    method, path, body, headers, key, status, code = REQUESTS[name]
    before = len(module_provider.requests)
    reply = gateway.request(method, path, body, headers, key=key)
    assert reply.status == status and reply.complete and reply.headers["content-type"] == "application/json", reply.raw
    told = check_error(reply.json, code)
    assert told["type"] == "invalid_request_error" and "attempts" not in told
    check_private(reply, also=(gateway.key,))
    assert len(module_provider.requests) == before


def test_no_provider_at_all(gateway_factory: Callable[..., Gateway]) -> None:
    models = {"mine": {"baseUrl": f"http://127.0.0.1:9/{PATH_SECRET}/v1", "default": "m", "enableFallback": False, "models": ["m"], "keys": ["env:NOT_SET_ANYWHERE"]}}
    gateway = gateway_factory(models, {"SOME_KEY": PLAIN_KEY})
    for streamed in (False, True):
        reply = gateway.chat(stream=streamed)
        assert reply.status == 503 and reply.headers["content-type"] == "application/json"
        told = check_error(reply.json, "no_route")
        assert "mine" in told["message"] and "attempts" not in told
        check_private(reply)


def test_secret_at_the_place_where_a_message_is_cut(module_provider: Provider, gateway_factory: Callable[..., Gateway]) -> None:
    """Half a secret is still one: wherever it stands in a long message, no larger part of it shows."""
    def play(request: Any) -> list[Any]:
        padding = "x" * request.json["seed"]
        return answer({"error": {"message": f"{padding}{PLAIN_KEY} and {VENDOR_KEY}"}}, 400)

    module_provider.script("padded", play)
    gateway = gateway_factory({"padded": {"baseUrl": module_provider.url("padded"), "default": "m", "enableFallback": False, "models": ["m"], "keys": ["env:PLANTED_KEY"]}},
                              {"PLANTED_KEY": PLAIN_KEY})
    for length in range(0, 4200, 14):
        reply = gateway.chat("padded/m", seed=length)
        assert reply.status == 400
        for secret in (PLAIN_KEY, VENDOR_KEY):
            assert secret[:14].encode() not in reply.body, (length, reply.body[-200:])
    gateway.stop()
    assert PLAIN_KEY[:14] not in gateway.log and VENDOR_KEY[:14] not in gateway.log


def test_the_log_holds_no_secret(gateway: Gateway) -> None:
    """The last one: what all the others left in the log."""
    key = gateway.key
    assert gateway.stop() == 0
    log = gateway.log
    assert "attempt.failed" in log and "outcome=error" in log
    for word in (PLAIN_KEY, VENDOR_KEY, HEADER_SECRET, PATH_SECRET, key, "Bearer sk", "org-planted"):
        assert word not in log, [line for line in log.splitlines() if word in line][:3]
    assert " ERROR " not in log
    assert all(line[:2] == "20" for line in log.splitlines()), "every entry is one line"
