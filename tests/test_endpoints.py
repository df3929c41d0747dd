"""Section 39, Endpoints: the URL table, who may call, what a body may be, and the form of each answer; over a gateway as a process."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

import pytest

import aicarousel
from fakes import (DONE, FAKE_KEY, FINISH, ROLE, TEXT, Close, Gateway, Pause, Provider, Reply, answer, chat_body, content, frame, healthy, opened, read_reply, stream)

ENV_KEYS = ("sk-env-one-0123456789", "the-second-key-of-the-team")
DEEP = {"id": "org/deep/model", "alias": "deep", "context": 131072, "maxOutput": 8192}


def entry(url: str, *models: Any) -> dict[str, Any]:
    """A provider in models.json."""
    return {"baseUrl": url, "default": "m", "enableFallback": False, "models": ["m", *models], "keys": ["env:FAKE_KEY"]}


def make_models(provider: Provider) -> dict[str, Any]:
    """The providers of this file: one that is well, and one for each way to fail; only the first is in the carousel's way."""
    scripts: dict[str, Any] = {
        "failing": answer({"error": {"message": "Oops."}}, 500),
        "refusing": answer({"error": {"message": "temperature is too high", "param": "temperature"}}, 400),
        "breaking": opened(ROLE, content("half of "), content("it"), Pause("break"), Close()),
        "erring": opened(ROLE, content("half of it"), Pause("err"), frame({"error": {"message": "overloaded"}}), Close()),
        "odd": stream(ROLE, frame({"choices": [{"index": 0, "delta": {"content": None, "tool_calls": []}}]}), content("caf\u00e9 "), frame({"choices": []}), content("\U0001f600"), FINISH, DONE),
    }
    models = {"well": entry(provider.script("well", healthy()), DEEP)}
    return {**models, **{name: entry(provider.script(name, script)) for name, script in scripts.items()},
            "carousel": {"fallback": "none", "strategy": "priority", "aliases": {"fast": ["well/m"], "claude-*": "well/m"}}}


@pytest.fixture(scope="module")
def gateway(module_provider: Provider, module_gateway_factory: Callable[..., Gateway]) -> Gateway:
    return module_gateway_factory(make_models(module_provider), {"FAKE_KEY": FAKE_KEY, "API_KEYS": ", ".join(ENV_KEYS), "AICAROUSEL_ALLOWED_HOSTS": "gateway.test, other.test"})


def check_openai_error(reply: Reply, status: int, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's envelope; the error."""
    assert reply.status == status and reply.complete, reply.raw
    assert reply.headers["content-type"] == "application/json"
    assert set(reply.json) == {"error"} and {"message", "type", "param", "code"} <= set(reply.json["error"])
    error: dict[str, Any] = reply.json["error"]
    assert error["message"] and isinstance(error["type"], str) and (code is None or error["code"] == code)
    return error


def check_messages_error(reply: Reply, status: int, kind: str) -> str:
    """An error in Anthropic's envelope; its text."""
    assert reply.status == status and reply.headers["content-type"] == "application/json", reply.raw
    assert set(reply.json) == {"type", "error"} and reply.json["type"] == "error" and set(reply.json["error"]) == {"type", "message"}
    assert reply.json["error"]["type"] == kind
    return str(reply.json["error"]["message"])


def test_flat_tools_as_cursor_sends_them_are_nested_for_the_provider(gateway: Gateway, module_provider: Provider) -> None:
    flat = [{"type": "function", "name": "f", "parameters": {"type": "object"}}]
    assert gateway.post("/v1/chat/completions", {"model": "well/m", "messages": [{"role": "user", "content": "Hi"}], "tools": flat}).status == 200
    assert module_provider.calls("well")[-1].json["tools"] == [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


# ---------------------------------------------------------------- the URL table

MESSAGES = [{"role": "user", "content": "Hi"}]
FOUND: list[tuple[str, str, Any, str]] = [      # method, path, body, content type
    ("GET", "/", None, "text/plain; charset=utf-8"),
    ("GET", "/health", None, "application/json"),
    ("GET", "/health?deep=1", None, "application/json"),
    ("GET", "/v1/models", None, "application/json"),
    ("GET", "/models", None, "application/json"),
    ("GET", "/v1/models?limit=1000", None, "application/json"),
    ("GET", "/v1/models/aicarousel", None, "application/json"),
    ("GET", "/models/aicarousel", None, "application/json"),
    ("POST", "/v1/chat/completions", {"messages": MESSAGES}, "application/json"),
    ("POST", "/chat/completions", {"messages": MESSAGES}, "application/json"),
    ("POST", "/v1/chat/completions?beta=true", {"messages": MESSAGES}, "application/json"),
    ("POST", "/chat/completions", {"messages": MESSAGES, "stream": True}, "text/event-stream; charset=utf-8"),
    ("POST", "/chat", MESSAGES, "text/plain; charset=utf-8"),
]


@pytest.mark.parametrize(("method", "path", "body", "kind"), FOUND)
def test_found(gateway: Gateway, method: str, path: str, body: Any, kind: str) -> None:
    reply = gateway.request(method, path, body)
    assert reply.status == 200 and reply.headers["content-type"] == kind and reply.complete and reply.body
    if method == "GET":
        head = gateway.request("HEAD", path)
        assert head.status == 200 and head.body == b"" and head.headers["content-type"] == kind and int(head.headers["content-length"]) > 0


@pytest.mark.parametrize("path", ["/nothing", "/v1", "/v1/", "/v1/chat", "/v1/v1/models", "//v1/models", "/V1/models", "/v1/models/", "/models/", "/v1/chat/completions/", "/health/",
                                  "/v1/./models", "/v1/%6dodels", "/v1/completion", "/admin/config", "/favicon.ico", "/../../etc/passwd", "/" + "x" * 3000])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_not_found(gateway: Gateway, method: str, path: str) -> None:
    error = check_openai_error(gateway.request(method, path, {} if method == "POST" else None), 404, "not_found")
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 300


@pytest.mark.parametrize(("method", "path", "allowed"), [
    ("POST", "/", "GET, HEAD"), ("POST", "/health", "GET, HEAD"), ("DELETE", "/v1/models", "GET, HEAD"), ("POST", "/models", "GET, HEAD"), ("PUT", "/v1/models/aicarousel", "GET, HEAD"),
    ("GET", "/v1/chat/completions", "POST"), ("HEAD", "/v1/chat/completions", "POST"), ("PATCH", "/chat/completions", "POST"), ("GET", "/chat", "POST"),
    ("OPTIONS", "/v1/models", "GET, HEAD"), ("OPTIONS", "/v1/chat/completions", "POST"), ("FROBNICATE", "/chat", "POST"), ("TRACE", "/", "GET, HEAD"),
])
def test_wrong_method(gateway: Gateway, method: str, path: str, allowed: str) -> None:
    reply = gateway.request(method, path)
    assert reply.status == 405 and reply.headers["allow"] == allowed
    if method != "HEAD":
        check_openai_error(reply, 405, "method_not_allowed")


def test_stream_left_out_means_false(gateway: Gateway) -> None:
    for fields in ({}, {"stream": False}, {"stream": None}):
        reply = gateway.post("/v1/chat/completions", {"messages": MESSAGES, **fields})
        assert not reply.streamed and reply.text == TEXT


# ---------------------------------------------------------------- health

def test_health_is_open_and_asks_no_provider(gateway: Gateway, module_provider: Provider) -> None:
    before = len(module_provider.requests)
    body = gateway.get("/health", key="").json
    assert (body["status"], body["service"], body["version"]) == ("ok", "aicarousel", aicarousel.__version__) and "providers" not in body
    assert gateway.get("/health?deep=0", key="").json.keys() == body.keys()
    deep = gateway.get("/health?a=b&deep=1").json
    assert {row["name"]: row["state"] for row in deep["providers"]}["well"] == "ready" and deep["status"] == "ok"
    assert len(module_provider.requests) == before


@pytest.mark.parametrize("key", ["", "sk-" + "0" * 64])
def test_deep_health_needs_a_key(gateway: Gateway, key: str) -> None:
    check_openai_error(gateway.get("/health?deep=1", key=key), 401, "invalid_api_key")


# ---------------------------------------------------------------- models

def test_models_in_openai_shape(gateway: Gateway) -> None:
    body = gateway.get("/v1/models", key="").json
    rows = {row["id"]: row for row in body["data"]}
    assert body["object"] == "list" and len(rows) == len(body["data"])
    assert list(rows)[0] == "aicarousel" and {"fast", "well/m", "well/org/deep/model", "failing/m"} <= rows.keys() and "claude-*" not in rows
    assert all(row["object"] == "model" and isinstance(row["created"], int) and row["owned_by"] for row in rows.values())
    deep = rows["well/org/deep/model"]
    assert (deep["context_length"], deep["max_input_tokens"], deep["max_completion_tokens"], deep["max_tokens"]) == (131072, 131072, 8192, 8192)
    assert "context_length" not in rows["well/m"]


def test_models_in_anthropic_shape(gateway: Gateway) -> None:
    body = gateway.get("/v1/models", headers={"anthropic-version": "2023-06-01"}, key="").json
    assert set(body) == {"data", "has_more", "first_id", "last_id"} and body["has_more"] is False
    assert all(row["type"] == "model" and row["display_name"] and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["created_at"]) for row in body["data"])
    ids = [row["id"] for row in body["data"]]
    assert ids == [row["id"] for row in gateway.get("/v1/models").json["data"]] and (body["first_id"], body["last_id"]) == (ids[0], ids[-1])


@pytest.mark.parametrize(("path", "name"), [
    ("aicarousel", "aicarousel"), ("fast", "fast"), ("well/m", "well/m"), ("well%2Fm", "well/m"), ("well/org/deep/model", "well/org/deep/model"),
    ("org/deep/model", "org/deep/model"), ("org%2fdeep%2Fmodel", "org/deep/model"), ("deep", "deep"), ("well", "well"), ("well:m", "well:m"), ("m?x=1", "m"),
])
@pytest.mark.parametrize("prefix", ["/v1/models/", "/models/"])
def test_one_model(gateway: Gateway, prefix: str, path: str, name: str) -> None:
    assert gateway.get(prefix + path, key="").json["id"] == name
    row = gateway.get(prefix + path, headers={"anthropic-version": "2023-06-01"}, key="").json
    assert (row["id"], row["type"]) == (name, "model")


@pytest.mark.parametrize("path", ["none", "well/none", "none/m", "claude-*", "%ff%fe", "%0d%0aX: y", "a" * 4000, "<script>alert(1)</script>".replace(" ", "%20")])
def test_unknown_model_in_the_callers_shape(gateway: Gateway, path: str) -> None:
    error = check_openai_error(gateway.get(f"/v1/models/{path.replace(' ', '%20')}"), 404, "model_not_found")
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 700
    check_messages_error(gateway.get(f"/v1/models/{path.replace(' ', '%20')}", headers={"anthropic-version": "2023-06-01"}), 404, "not_found_error")


# ---------------------------------------------------------------- POST /chat

def test_plain_chat(gateway: Gateway, module_provider: Provider) -> None:
    reply = gateway.post("/chat", [{"role": "system", "content": "Be kind."}, *MESSAGES])
    assert reply.body.decode() == TEXT and reply.complete and reply.headers["x-aicarousel-provider"] == "well"
    sent = module_provider.calls("well")[-1].json
    assert sent["messages"][0] == {"role": "system", "content": "Be kind."} and sent["model"] == "m"


PLAIN_MISTAKES: dict[str, tuple[Any, int]] = {"an object": ({"messages": MESSAGES}, 400), "nothing": (b"", 400), "empty list": ([], 400), "no JSON": (b"[", 400), "numbers": ([1], 400)}


@pytest.mark.parametrize("name", PLAIN_MISTAKES)
def test_plain_chat_refuses_in_text(gateway: Gateway, name: str) -> None:
    body, status = PLAIN_MISTAKES[name]
    reply = gateway.post("/chat", body)
    assert (reply.status, reply.headers["content-type"]) == (status, "text/plain; charset=utf-8") and reply.body and not reply.body.startswith(b"{")


@pytest.fixture(scope="module")
def plain_gateways(module_provider: Provider, module_gateway_factory: Callable[..., Gateway]) -> dict[str, Gateway]:
    """Gateways with one provider each: POST /chat cannot name one."""
    models = make_models(module_provider)
    return {name: module_gateway_factory({name: models[name]}, {"FAKE_KEY": FAKE_KEY}) for name in ("failing", "refusing", "breaking", "erring", "odd")}


@pytest.mark.parametrize(("name", "status", "text"), [("failing", 502, "failing/m"), ("refusing", 400, "temperature is too high")])
def test_plain_chat_tells_failures_in_text(plain_gateways: dict[str, Gateway], name: str, status: int, text: str) -> None:
    reply = plain_gateways[name].post("/chat", MESSAGES)
    assert (reply.status, reply.headers["content-type"]) == (status, "text/plain; charset=utf-8")
    assert text in reply.body.decode() and not reply.body.startswith(b"{") and reply.headers["x-aicarousel-request-id"]


@pytest.mark.parametrize(("name", "pause"), [("breaking", "break"), ("erring", "err")])
def test_plain_chat_that_breaks_does_not_look_whole(plain_gateways: dict[str, Gateway], module_provider: Provider, name: str, pause: str) -> None:
    gateway = plain_gateways[name]
    with gateway.connect() as client:
        client.send(gateway.request_bytes("POST", "/chat", MESSAGES))
        client.read_until(b"half of it" if name == "erring" else b"it\r\n")
        module_provider.release(pause)
        reply = client.read_all()
    assert reply.status == 200 and reply.body == b"half of it" and not reply.complete and b"error" not in reply.body


def test_plain_chat_passes_on_text_alone(plain_gateways: dict[str, Gateway]) -> None:
    reply = plain_gateways["odd"].post("/chat", MESSAGES)
    assert reply.body.decode() == "caf\u00e9 \U0001f600" and reply.complete


# ---------------------------------------------------------------- keys

GOOD, BAD = "<good>", "sk-" + "0" * 64
KEYS: dict[str, tuple[dict[str, str], int]] = {      # headers, 200 or a text
    "bearer": ({"authorization": f"Bearer {GOOD}"}, 200),
    "bearer, lower case": ({"AUTHORIZATION": f"bearer {GOOD}"}, 200),
    "bearer, upper case": ({"authorization": f"BEARER {GOOD}"}, 200),
    "bearer, spaces": ({"authorization": f"Bearer   {GOOD}  "}, 200),
    "x-api-key": ({"X-Api-Key": GOOD}, 200),
    "api-key": ({"Api-Key": GOOD}, 200),
    "x-goog-api-key": ({"X-Goog-Api-Key": GOOD}, 200),
    "from API_KEYS": ({"authorization": f"Bearer {ENV_KEYS[0]}"}, 200),
    "from API_KEYS, second": ({"x-api-key": ENV_KEYS[1]}, 200),
    "bearer wins, good": ({"authorization": f"Bearer {GOOD}", "x-api-key": BAD, "api-key": BAD, "x-goog-api-key": BAD}, 200),
    "bearer wins, bad": ({"authorization": f"Bearer {BAD}", "x-api-key": GOOD}, 401),
    "x-api-key before api-key": ({"x-api-key": BAD, "api-key": GOOD}, 401),
    "x-api-key before api-key, good": ({"x-api-key": GOOD, "api-key": BAD, "x-goog-api-key": BAD}, 200),
    "api-key before x-goog-api-key": ({"api-key": BAD, "x-goog-api-key": GOOD}, 401),
    "api-key before x-goog-api-key, good": ({"api-key": GOOD, "x-goog-api-key": BAD}, 200),
    "other scheme, then x-api-key": ({"authorization": "Basic dTpw", "x-api-key": GOOD}, 200),
    "unknown": ({"authorization": f"Bearer {BAD}"}, 401),
    "one character less": ({"authorization": f"Bearer {GOOD}-1"}, 401),
    "one character more": ({"authorization": f"Bearer {GOOD}a"}, 401),
    "twice in one": ({"authorization": f"Bearer {GOOD}, Bearer {GOOD}"}, 401),
    "quoted": ({"authorization": f'Bearer "{GOOD}"'}, 401),
    "SQL": ({"authorization": "Bearer ' OR 1=1 --"}, 401),
    "wildcard": ({"authorization": "Bearer sk-%"}, 401),
    "long": ({"authorization": "Bearer " + "a" * 20_000}, 401),
    "beyond ASCII": ({"authorization": "Bearer sk-\u00e9\u00ff"}, 401),
    "both names of API_KEYS": ({"authorization": f"Bearer {', '.join(ENV_KEYS)}"}, 401),
}
MISSING: dict[str, dict[str, str]] = {
    "nothing": {}, "empty": {"authorization": ""}, "bearer alone": {"authorization": "Bearer"}, "bearer and blank": {"authorization": "Bearer  "}, "no scheme": {"authorization": GOOD},
    "basic": {"authorization": f"Basic {GOOD}"}, "token": {"authorization": f"Token {GOOD}"}, "bearer without space": {"authorization": f"Bearer{GOOD}"},
    "empty x-api-key": {"x-api-key": ""}, "another header": {"x-auth-token": GOOD}, "cookie": {"cookie": f"key={GOOD}"}, "forwarded": {"x-forwarded-authorization": f"Bearer {GOOD}"},
}


def with_key(headers: dict[str, str], gateway: Gateway) -> dict[str, str]:
    """`headers` with the gateway's key put in."""
    return {name: value.replace(f"{GOOD}-1", gateway.key[:-1]).replace(GOOD, gateway.key) for name, value in headers.items()}


def ask(gateway: Gateway, path: str, headers: dict[str, str]) -> Reply:
    """A chat completion with just these headers for keys."""
    raw = gateway.request_bytes("POST", path, chat_body("well/m"), key="").partition(b"\r\n\r\n")
    with gateway.connect() as client:
        client.send(raw[0] + b"".join(f"\r\n{name}: {value}".encode("latin-1") for name, value in headers.items()) + b"\r\n\r\n" + raw[2])
        return client.read_all()


@pytest.mark.parametrize("name", KEYS)
def test_key(gateway: Gateway, name: str) -> None:
    headers, status = KEYS[name]
    reply = ask(gateway, "/v1/chat/completions", with_key(headers, gateway))
    if status == 200:
        assert reply.status == 200 and reply.text == TEXT
    else:
        error = check_openai_error(reply, 401, "invalid_api_key")
        assert (error["message"], error["type"], error["param"]) == ("Invalid API key", "invalid_request_error", None)


@pytest.mark.parametrize("name", MISSING)
def test_missing_key(gateway: Gateway, name: str) -> None:
    reply = ask(gateway, "/v1/chat/completions", with_key(MISSING[name], gateway))
    assert check_openai_error(reply, 401, "invalid_api_key")["message"] == "Missing API key. Include it as 'Authorization: Bearer sk-xxx' or 'x-api-key: sk-xxx'"


@pytest.mark.parametrize("query", ["key={}", "api_key={}", "access_token={}", "authorization=Bearer%20{}"])
def test_key_in_a_query_is_none(gateway: Gateway, query: str) -> None:
    check_openai_error(ask(gateway, "/v1/chat/completions?" + query.format(gateway.key), {}), 401)


@pytest.mark.parametrize("text", [aicarousel.MISSING_KEY, aicarousel.INVALID_KEY])
def test_401_for_clients_of_messages(text: str) -> None:
    assert aicarousel.messages_error(aicarousel.unauthorized(text)) == {"type": "error", "error": {"type": "authentication_error", "message": text}}


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens", "/messages"])
def test_errors_for_clients_of_messages(gateway: Gateway, path: str) -> None:
    """Also while these endpoints are not there yet."""
    reply = gateway.post(path, {"model": "m", "max_tokens": 5, "messages": MESSAGES}, key="")
    assert reply.status in (401, 404)
    check_messages_error(reply, reply.status, {401: "authentication_error", 404: "not_found_error"}[reply.status])


def test_each_request_of_a_connection_shows_its_key(gateway: Gateway) -> None:
    with gateway.connect() as client:
        for key, status in ((gateway.key, 200), (BAD, 401), (gateway.key, 200), ("", 401)):
            client.raw.clear()
            client.send(gateway.request_bytes("POST", "/v1/chat/completions", chat_body("well/m"), key=key, close=False))
            client.read_until(lambda raw: read_reply(raw, "left").complete)
            assert client.reply().status == status
            if status == 401:
                client.close()
                client = gateway.connect()


def test_no_auth(module_provider: Provider, gateway_factory: Callable[..., Gateway]) -> None:
    gateway = gateway_factory(make_models(module_provider), {"FAKE_KEY": FAKE_KEY}, arguments=["--no-auth"])
    assert gateway.post("/v1/chat/completions", chat_body("well/m"), key="").text == TEXT
    assert gateway.post("/v1/chat/completions", chat_body("well/m"), key=BAD).text == TEXT
    assert gateway.get("/health?deep=1", key="").json["providers"]
    assert gateway.post("/v1/chat/completions", chat_body("well/m"), headers={"host": "evil.test"}).status == 421
    assert gateway.post("/v1/chat/completions", chat_body("well/m"), headers={"origin": "http://evil.test"}).status == 403


# ---------------------------------------------------------------- browsers

HOSTS: dict[str, int] = {
    "localhost": 200, "localhost:{port}": 200, "LocalHost:1": 200, "localhost.": 200, "127.0.0.1": 200, "127.0.0.1:{port}": 200, "127.0.0.1:80": 200, "[::1]": 200, "[::1]:{port}": 200,
    "app.localhost": 200, "gateway.test": 200, "GATEWAY.test:8443": 200, "other.test": 200,
    "evil.test": 421, "evil.test:{port}": 421, "127.0.0.1.evil.test": 421, "localhost.evil.test": 421, "evil-localhost": 421, "gateway.test.evil": 421, "sub.gateway.test": 421,
    "192.168.1.5": 421, "192.168.1.5:{port}": 421, "0.0.0.0": 421, "[::]": 421, "[fe80::1]": 421, "2130706433": 421, "0x7f000001": 421, "127.1": 421,
    "": 400, "a b": 400, "localhost/": 400, "user@localhost": 400, "localhost:port": 400, "localhost:123456": 400, "localhost, evil.test": 400, "[::1": 400, "http://localhost": 400, "caf\u00e9": 400,
}


@pytest.mark.parametrize("host", HOSTS)
def test_host(gateway: Gateway, host: str) -> None:
    for path in ("/health", "/v1/models", "/nothing", "/"):
        with gateway.connect() as client:
            client.send(f"GET {path} HTTP/1.1\r\nHost: {host.format(port=gateway.port)}\r\nConnection: close\r\n\r\n".encode("latin-1"))
            reply = client.read_all()
        if HOSTS[host] == 200:
            assert reply.status == (404 if path == "/nothing" else 200)
        else:
            check_openai_error(reply, HOSTS[host])


@pytest.mark.parametrize("origin", ["http://evil.test", "null", "https://127.0.0.1:{port}", "http://127.0.0.1", "http://127.0.0.1:1", "http://localhost:{port}", "file://", "", "http://127.0.0.1:{port}.evil.test"])
def test_pages_of_other_origins_may_not_call(gateway: Gateway, module_provider: Provider, origin: str) -> None:
    before = len(module_provider.requests)
    headers = {"origin": origin.format(port=gateway.port)}
    for reply in (gateway.post("/v1/chat/completions", chat_body("well/m"), headers=headers), gateway.get("/v1/models", headers=headers), gateway.get("/health", headers=headers),
                  gateway.request("OPTIONS", "/v1/chat/completions", headers={**headers, "access-control-request-method": "POST"})):
        check_openai_error(reply, 403, "forbidden")
        assert not [name for name in reply.headers if name.startswith("access-control-")]
    assert len(module_provider.requests) == before


def test_pages_of_the_gateway_itself_may_call(gateway: Gateway) -> None:
    reply = gateway.post("/v1/chat/completions", chat_body("well/m"), headers={"origin": gateway.url})
    assert reply.status == 200 and not [name for name in reply.headers if name.startswith("access-control-")]


@pytest.fixture(scope="module")
def cors_gateway(module_provider: Provider, module_gateway_factory: Callable[..., Gateway]) -> Gateway:
    return module_gateway_factory(make_models(module_provider), {"FAKE_KEY": FAKE_KEY, "AICAROUSEL_CORS_ORIGIN": "https://app.test, http://localhost:5173"})


def test_cors_by_flag(module_provider: Provider, gateway_factory: Callable[..., Gateway]) -> None:
    gateway = gateway_factory(make_models(module_provider), {"FAKE_KEY": FAKE_KEY}, arguments=["--cors-origin", "https://app.test", "--cors-origin", "http://localhost:5173"])
    for origin in ("https://app.test", "http://localhost:5173"):
        assert gateway.get("/v1/models", headers={"origin": origin}).headers.get("access-control-allow-origin") == origin


@pytest.mark.parametrize("origin", ["https://app.test", "http://localhost:5173"])
def test_cors_for_listed_origins(cors_gateway: Gateway, origin: str) -> None:
    headers = {"origin": origin}
    replies = [cors_gateway.post("/v1/chat/completions", chat_body("well/m"), headers=headers), cors_gateway.post("/v1/chat/completions", chat_body("well/m"), headers=headers, stream=True),
               cors_gateway.get("/v1/models", headers=headers), cors_gateway.get("/nothing", headers=headers), cors_gateway.post("/v1/chat/completions", b"{", headers=headers),
               cors_gateway.post("/v1/chat/completions", chat_body(), headers=headers, key="")]
    assert [reply.status for reply in replies] == [200, 200, 200, 404, 400, 401]
    for reply in replies:
        assert reply.headers["access-control-allow-origin"] == origin and "origin" in reply.headers["vary"].lower()
        assert "access-control-allow-credentials" not in reply.headers
        assert sum(name == "access-control-allow-origin" for name, _ in reply.header_list) == 1


def test_preflight(cors_gateway: Gateway) -> None:
    reply = cors_gateway.request("OPTIONS", "/v1/chat/completions", key="", headers={
        "origin": "https://app.test", "access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"})
    assert reply.status == 204 and reply.body == b"" and reply.headers["access-control-allow-origin"] == "https://app.test"
    assert {"GET", "POST", "OPTIONS"} <= {word.strip() for word in reply.headers["access-control-allow-methods"].split(",")}
    assert {"content-type", "authorization", "x-api-key"} <= {word.strip().lower() for word in reply.headers["access-control-allow-headers"].split(",")}
    assert "content-length" not in reply.headers, "RFC 9110, 8.6: none in a 204"


@pytest.mark.parametrize("origin", ["https://app.test.evil", "http://app.test", "https://APP.test:444", "null"])
def test_cors_refuses_other_origins(cors_gateway: Gateway, origin: str) -> None:
    for method in ("OPTIONS", "GET"):
        reply = cors_gateway.request(method, "/v1/models", headers={"origin": origin})
        check_openai_error(reply, 403)
        assert "access-control-allow-origin" not in reply.headers


CONTENT_TYPES: dict[str, int] = {
    "application/json": 200, "application/json; charset=utf-8": 200, "Application/JSON;charset=UTF-8": 200, "application/vnd.api+json": 200,
    "text/plain": 415, "text/plain;application/json": 415, "application/x-www-form-urlencoded": 415, "multipart/form-data; boundary=x": 415, "application/jsonp": 415, "": 415, "json": 415,
}


@pytest.mark.parametrize("kind", CONTENT_TYPES)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat"])
def test_content_type(gateway: Gateway, path: str, kind: str) -> None:
    """What a page can send without asking first is refused, whether its key is right or not."""
    body: Any = MESSAGES if path == "/chat" else chat_body("well/m")
    for key in (None, ""):
        reply = gateway.post(path, body, headers={"content-type": kind}, key=key)
        assert reply.status == (CONTENT_TYPES[kind] if CONTENT_TYPES[kind] != 200 or key is None else 401), reply.raw
        if reply.status == 415:
            check_openai_error(reply, 415)


# ---------------------------------------------------------------- bodies

def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


def body_with(field: str) -> bytes:
    """A sound body with `field`, as text, in front."""
    return f'{{{field}, "model": "well/m", "messages": [{{"role": "user", "content": "Hi"}}]}}'.encode()


BAD_BODIES: dict[str, bytes] = {
    "empty": b"", "blank": b"  \n", "no JSON": b"hello", "cut": b'{"messages": [', "single quotes": b"{'messages': []}", "comment": b'{"messages": [] /* x */}', "two values": b"{} {}",
    "trailing comma": body_with('"a": [1,]'), "garbage behind": body_with('"a": 1') + b"x", "list": b"[]", "null": b"null", "true": b"true", "number": b"5", "string": b'"messages"', "object": b"{}",
    "NaN": body_with('"temperature": NaN'), "Infinity": body_with('"a": Infinity'), "-Infinity": body_with('"a": {"b": [-Infinity]}'), "NaN alone": b"NaN",
    "deep lists": nested(100_000).encode(), "deep lists inside": body_with(f'"a": {nested(100_000)}'), "deep objects": ('{"a":' * 50_000 + "1" + "}" * 50_000).encode(),
    "deep and cut": b"[" * 200_000, "integer of 5000 digits": body_with(f'"seed": {"9" * 5000}'), "integer of 5000 digits somewhere": body_with(f'"a": [{"1" * 5000}]'),
    "invalid UTF-8": body_with('"a": "\u00e9"').decode().encode("latin-1"), "overlong UTF-8": body_with('"a": "!"').replace(b"!", b"\xc0\xaf"),
    "surrogate in UTF-8": body_with('"a": "!"').replace(b"!", b"\xed\xa0\x80"), "UTF-16": body_with('"a": 1').decode().encode("utf-16"), "NUL": b"\x00" * 20, "control in a string": body_with('"a": "\x01"'),
    "messages twice": body_with('"messages": []'), "model twice": body_with('"model": "failing/m"'), "stream twice": body_with('"stream": true, "stream": false'),
    "leading zero": body_with('"n": 01'), "hex": body_with('"n": 0x1'), "lone escape": body_with(r'"a": "\x41"'), "form": b"messages=hello",
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_body(gateway: Gateway, module_provider: Provider, name: str) -> None:
    before = len(module_provider.requests)
    error = check_openai_error(gateway.post("/v1/chat/completions", BAD_BODIES[name]), 400)
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 500
    assert len(module_provider.requests) == before


USER = {"role": "user", "content": "Hi"}
WRONG_FIELDS: dict[str, tuple[dict[str, Any], str]] = {      # what is changed in a sound body, the parameter that is named
    "messages missing": ({"messages": None}, "messages"), "messages a string": ({"messages": "Hi"}, "messages"), "messages empty": ({"messages": []}, "messages"),
    "messages an object": ({"messages": USER}, "messages"), "message a string": ({"messages": [USER, "Hi"]}, "messages[1]"), "no role": ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
    "role unknown": ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0].role"), "role a list": ({"messages": [{"role": ["user"], "content": "Hi"}]}, "messages[0].role"),
    "content a number": ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"), "content null": ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    "content parts are strings": ({"messages": [{"role": "user", "content": ["Hi"]}]}, "messages[0].content"),
    "content part without type": ({"messages": [{"role": "user", "content": [{"text": "Hi"}]}]}, "messages[0].content"),
    "tool without its call": ({"messages": [{"role": "tool", "content": "5"}]}, "messages[0].tool_call_id"),
    "calls an object": ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "messages[0].tool_calls"), "call without id": ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    "model a number": ({"model": 5}, "model"), "model a list": ({"model": ["m"]}, "model"), "stream a string": ({"stream": "true"}, "stream"), "stream a number": ({"stream": 1}, "stream"),
    "stream_options a list": ({"stream": True, "stream_options": []}, "stream_options"), "max_tokens a string": ({"max_tokens": "5"}, "max_tokens"), "max_tokens a bool": ({"max_tokens": True}, "max_tokens"),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens"), "max_tokens negative": ({"max_tokens": -1}, "max_tokens"), "max_tokens a fraction": ({"max_tokens": 1.5}, "max_tokens"),
    "max_completion_tokens a list": ({"max_completion_tokens": []}, "max_completion_tokens"), "n 0": ({"n": 0}, "n"), "temperature a string": ({"temperature": "hot"}, "temperature"),
    "top_p an object": ({"top_p": {}}, "top_p"), "stop a number": ({"stop": 5}, "stop"), "tools an object": ({"tools": {}}, "tools"), "tool a string": ({"tools": ["t"]}, "tools[0]"),
    "tool without function": ({"tools": [{"type": "function"}]}, "tools[0].function"), "tool without name": ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function"),
    "tool_choice a number": ({"tool_choice": 5}, "tool_choice"), "response_format a string": ({"response_format": "json"}, "response_format"), "user a number": ({"user": 5}, "user"),
    "metadata a list": ({"metadata": []}, "metadata"), "logit_bias a list": ({"logit_bias": []}, "logit_bias"), "seed a string": ({"seed": "x"}, "seed"),
}


@pytest.mark.parametrize("name", WRONG_FIELDS)
def test_wrong_field(gateway: Gateway, module_provider: Provider, name: str) -> None:
    changes, param = WRONG_FIELDS[name]
    before = len(module_provider.requests)
    error = check_openai_error(gateway.post("/v1/chat/completions", {**chat_body("well/m"), **changes}), 400)
    assert error["param"] == param and error["type"] == "invalid_request_error" and param in error["message"]
    assert len(module_provider.requests) == before


ODD_FIELDS: dict[str, dict[str, Any]] = {       # sound, if odd: they reach the provider as they are
    "unknown fields": {"some_new_field": {"a": [1]}, "reasoning": {"effort": "low"}, "plugins": {"order": ["x"]}},
    "all fields": {"temperature": 0, "top_p": 1, "stop": ["x"], "presence_penalty": 0.5, "frequency_penalty": -0.5, "seed": 7, "user": "u", "logprobs": True, "top_logprobs": 2, "n": 1},
    "nulls": {"stop": None, "tools": None, "tool_choice": None, "response_format": None, "max_tokens": None, "user": None},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]}]},
    "tools": {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], "tool_choice": "auto", "parallel_tool_calls": False},
    "calls": {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
                           {"role": "tool", "tool_call_id": "c", "content": "5"}]},
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}},
    "large numbers": {"seed": 2 ** 70, "logit_bias": {"5": -100}, "big": 1e308}, "odd text": {"messages": [{"role": "user", "content": "\u0000\u2028\U0001f600 </script>"}]},
    "messages with model": {"messages": [{"role": "user", "content": "Hi", "model": "inner"}], "metadata": {"model": "inner"}},
}


@pytest.mark.parametrize("name", ODD_FIELDS)
def test_odd_fields_reach_the_provider(gateway: Gateway, module_provider: Provider, name: str) -> None:
    body = {**chat_body("well/m"), **ODD_FIELDS[name]}
    assert gateway.post("/v1/chat/completions", body).text == TEXT
    assert module_provider.calls("well")[-1].json == {**body, "model": "m"}


@pytest.mark.parametrize("field", sorted(aicarousel.ROUTING_FIELDS))
def test_fields_that_route_elsewhere_have_no_power(gateway: Gateway, module_provider: Provider, field: str) -> None:
    value: Any = {"headers": {"authorization": "Bearer x"}, "extra_headers": {"x": "y"}, "extra_body": {"model": "other"}, "fallbacks": ["other"], "user_config": {}}.get(field, "http://127.0.0.1:1/v1")
    assert gateway.post("/v1/chat/completions", {**chat_body("well/m"), field: value}).text == TEXT
    request = module_provider.calls("well")[-1]
    assert field not in request.json and request.json["model"] == "m" and request.headers["authorization"] == f"Bearer {FAKE_KEY}"


def test_model_is_named_once_whatever_the_spelling(gateway: Gateway, module_provider: Provider) -> None:
    r"""A key may be written "mod\u0065l"; what the provider reads is what the gateway read."""
    for raw in (r'{"mod\u0065l": "well/m", "messages": [{"role": "user", "content": "Hi"}]}',
                r'{"mod\u0065l": "well/m", "messages": [{"role": "user", "content": "Hi", "model": "inner"}]}',
                r'{"model": "failing/m", "mod\u0065l": "well/m", "messages": [{"role": "user", "content": "Hi"}]}'):
        reply = gateway.post("/v1/chat/completions", raw.encode())
        if reply.status == 200:
            sent = json.loads(module_provider.calls("well")[-1].body, object_pairs_hook=lambda pairs: pairs)
            assert [value for name, value in sent if name == "model"] == ["m"], sent
        else:
            check_openai_error(reply, 400)


@pytest.mark.parametrize("text", [r"\ud800", r"\udc00 and \ud83d", "\\ud83d\\ude00"])
@pytest.mark.parametrize("place", ['"a": "!"', '"user": "!"', '"stop": ["!"]', '"model": "well/!"', '"some!": 1', '"a": "!", "api_base": "!"'])
def test_surrogates_do_no_harm(gateway: Gateway, text: str, place: str) -> None:
    body = body_with(place.replace("!", text))
    if '"model"' in place:
        body = body.replace(b', "model": "well/m"', b"")
    reply = gateway.post("/v1/chat/completions", body)
    assert reply.status in (200, 400), reply.raw
    assert reply.status == 400 or reply.text == TEXT


def test_byte_order_mark_is_no_part_of_the_body(gateway: Gateway, module_provider: Provider) -> None:
    reply = gateway.post("/v1/chat/completions", b"\xef\xbb\xbf" + json.dumps(chat_body("well/m")).encode())
    assert reply.status in (200, 400)
    assert reply.status == 400 or not module_provider.calls("well")[-1].body.startswith(b"\xef\xbb\xbf")


def test_nesting_around_every_limit(gateway: Gateway) -> None:
    """Deep enough to be read and too deep to be written again would be a 500; `api_base` makes the body be written anew."""
    seen = set()
    for depth in (*range(10, 900, 89), *range(900, 1000)):
        reply = gateway.post("/v1/chat/completions", body_with(f'"api_base": 1, "a": {nested(depth)}'))
        assert reply.status in (200, 400), (depth, reply.raw)
        seen.add(reply.status)
    assert seen == {200, 400}


def test_mutated_bodies_are_answered_by_200_or_400(gateway: Gateway) -> None:
    """A structure that is broken is the client's mistake, whatever it is."""
    source = random.Random(20261121)
    base = {"model": "well/m", "stream": False, "temperature": 0.5, "max_tokens": 5, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "stop": ["x"],
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "t"}]}, {"role": "tool", "tool_call_id": "c", "content": "x"},
                         {"role": "assistant", "content": "a", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}], "stream_options": None}
    junk: list[Any] = [None, True, 0, -1, 2 ** 63, 1e99, "", "x", [], {}, [None], [[]], {"a": None}, ["x", 1], "\ud800", "\x00"]

    def mutate(value: Any) -> Any:
        if source.random() < 0.06:
            return source.choice(junk)
        if isinstance(value, dict):
            kept = {name: mutate(item) for name, item in value.items() if source.random() > 0.03}
            return {**kept, source.choice(["role", "content", "type", "x"]): source.choice(junk)} if source.random() < 0.03 else kept
        return [mutate(item) for item in value for _ in range(1 + (source.random() < 0.03))] if isinstance(value, list) else value

    counts: dict[int, int] = {}
    with gateway.connect() as client:
        for _ in range(500):
            client.raw.clear()
            client.send(gateway.request_bytes("POST", "/v1/chat/completions", json.dumps(mutate(base)).encode(), close=False))
            client.read_until(lambda raw: b"\r\n\r\n" in raw and (read_reply(raw, "left").complete))
            reply = client.reply()
            assert client.ended == "" and reply.status in (200, 400), reply.raw
            assert reply.streamed or "choices" in reply.json or {"message", "type", "param", "code"} <= set(reply.json["error"])
            counts[reply.status] = counts.get(reply.status, 0) + 1
    assert counts[200] > 20 and counts[400] > 100


def test_body_limit(gateway: Gateway) -> None:
    """32 MB, told before a byte of it is sent."""
    with gateway.connect() as client:
        head = gateway.request_bytes("POST", "/v1/chat/completions", headers={"content-type": "application/json", "content-length": str(32 * 1024 * 1024 + 1), "expect": "100-continue"})
        client.send(head)
        check_openai_error(client.read_all(), 413, "request_too_large")
    large = chat_body("well/m", "x" * (31 * 1024 * 1024))
    assert gateway.post("/v1/chat/completions", large).text == TEXT


def test_unknown_model_may_be_refused(module_provider: Provider, gateway_factory: Callable[..., Gateway]) -> None:
    models = make_models(module_provider)
    gateway = gateway_factory({**models, "carousel": {**models["carousel"], "unknownModel": "reject"}}, {"FAKE_KEY": FAKE_KEY})
    for name in ("org/deep/modell", "\ud800", "x" * 5000, "${jndi:x}"):
        error = check_openai_error(gateway.chat(name), 404, "model_not_found")
        assert error["param"] == "model" and len(error["message"]) < 1000
    assert "org/deep/model" in gateway.chat("org/deep/modell").error["message"]
    assert gateway.chat("auto").text == TEXT and gateway.chat(None).text == TEXT and gateway.chat("").text == TEXT


def test_nothing_of_all_this_was_a_bug_of_the_gateway(gateway: Gateway) -> None:
    """The last one: no test of this file may have made it fail by itself."""
    assert gateway.stop() == 0
    assert "Traceback" not in gateway.log and " ERROR " not in gateway.log, re.findall(r"(?m)^.* ERROR .*$|^\w*Error: .*$", gateway.log)
