"""Every kind of secret, planted wherever one can be, and looked for in everything the gateway writes: answers, logs, commands, pages, metrics, the database.

By value: what is configured.  By pattern: what looks like a secret and is known to nobody here.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

import aicarousel
from dialects import FORMATS, PATHS
from fakes import Chunk, End, Gateway, Provider, answer, chat_answer, content, frame, opened
from test_hostile import body_of



def drawn(name: str) -> str:
    """32 hex digits of its own for every secret."""
    return hashlib.sha256(name.encode()).hexdigest()[:32]


HEX = drawn("none of them")
#: A key as each provider makes them; those of a bare shape are known by value alone.
KEYS: dict[str, str] = {
    "openai": f"sk-proj-{drawn('openai')}_{drawn('openai')}", "anthropic": f"sk-ant-api03-{drawn('anthropic')}-{drawn('anthropic')}AA", "gemini": f"AIzaSy{drawn('gemini')}x", "groq": f"gsk_{drawn('groq')}groq", "openrouter": f"sk-or-v1-{drawn('openrouter')}{drawn('openrouter')}", "cerebras": f"csk-{drawn('cerebras')}cere", "deepseek": f"sk-{drawn('deepseek')}deep",
    "mistral": "qZ7mP2xL9vK4tR8wY1nB6cF3dH5jG0sA", "xai": f"xai-{drawn('xai')}{drawn('xai')}", "together": f"tgp_v1_{drawn('together')}", "fireworks": f"fw_{drawn('fireworks')[:24]}", "nvidia": f"nvapi-{drawn('nvidia')}-{drawn('nvidia')}", "sambanova": "3b9d7c41-5e62-4f0a-9c8b-d1a7e6f52c30",
    "huggingface": f"hf_{drawn('huggingface')}hugg", "zai": f"{drawn('zai 2')}.Ab3dEf6hIj9lMn2p", "moonshot": f"sk-{drawn('moonshot 2')}moon", "minimax": f"eyJhbGciOiJSUzI1NiJ9.{drawn('minimax')}.{drawn('minimax 2')}", "qwen": f"sk-{drawn('qwen')[5:]}qwen", "ollama-cloud": f"{drawn('ollama-cloud')[3:]}.olCl-{drawn('ollama-cloud')[:20]}",
}
BARE = {"mistral", "sambanova", "zai", "ollama-cloud"}
PROXY_PASSWORD = "pr0xy-p@ss-4711-word"
PROXY_LOGIN = base64.b64encode(f"someone:{PROXY_PASSWORD}".encode()).decode()
HEADER_OPAQUE, HEADER_NAMED = "c0ffee1234567890badc0de4711", "planted header token"
ENV_UNUSED = "unused-but-secret-0815"
#: What nobody here was told of: a provider's words, or a client's.
STRANGE: dict[str, str] = {
    "github oauth": f"gho_{drawn('github oauth')}", "github user": f"ghu_{drawn('github user')}", "github fine": f"github_pat_{drawn('github fine')}_{drawn('github fine')}", "copilot": f"tid={drawn('copilot')};exp=1790000000;sku=free;8kp=1:{drawn('copilot')}", "google oauth": f"ya29.{drawn('google oauth')}", "jwt": f"eyJhbGciOiJub25lIn0.{drawn('jwt')}.{drawn('jwt')}",
    "another's key": f"sk-svcacct-{drawn('anothers key 2')}{drawn('anothers key')}", "organisation": f"org-{drawn('organisation')[:24]}", "perplexity": f"pplx-{drawn('perplexity')}abc", "replicate": f"r8_{drawn('replicate')}xyz", "gitlab": f"glpat-{drawn('gitlab')[:20]}", "vercel": f"vck_{drawn('vercel')}",
}
WRAPPED: dict[str, tuple[str, str]] = {        # as somebody would write it, and the part that nobody may see
    "bearer": (f"Authorization: Bearer {HEX[:9]}.opaque.{HEX[9:]}", f"{HEX[:9]}.opaque"), "basic": (f"Authorization: Basic {base64.b64encode(b'name:passphrase').decode()}", base64.b64encode(b"name:passphrase").decode()),
    "user of a URL": ("https://bob:pl4ntedpass@host.example/x", "pl4ntedpass"), "named": ('{"api_key": "0pen-sesame-4711"}', "0pen-sesame"), "in a query": ("GET /x?api_key=0pen-query-4711&a=b", "0pen-query"), "password": ("password=letmein-4711-now", "letmein-4711"),
    "token": ("access_token: 0pen-token-4711", "0pen-token"),
}


@pytest.mark.parametrize("name", [*sorted(KEYS.keys() - BARE), *STRANGE])
def test_secrets_by_pattern(name: str) -> None:
    secret = (KEYS | STRANGE)[name]
    for text in (secret, f"Incorrect API key provided: {secret}.", f'{{"k":"{secret}"}}', f"key={secret}&x", f"({secret})", f"a,{secret},b"):
        assert secret[-8:] not in aicarousel.redact(text) and "***" in aicarousel.redact(text)


@pytest.mark.parametrize("name", WRAPPED)
def test_secrets_by_what_stands_around_them(name: str) -> None:
    text, part = WRAPPED[name]
    assert part not in aicarousel.redact(text)


@pytest.mark.parametrize("text", ["max_tokens: 123456789", "task-oriented answers", "https://host.example/v1/models", "The model gpt-5.5 does not exist", "Missing API key. Include it as 'Authorization: Bearer sk-xxx' or 'x-api-key: sk-xxx'",
                                  "req=7f3a9c0100000012 key=test model=openrouter/anthropic/claude-haiku-4.5 route=groq/2:kimi-k2", "the token limit of 8192 tokens", "a basic example", "desk-bound"])
def test_secrets_are_not_seen_where_none_are(text: str) -> None:
    assert aicarousel.redact(text) == text


def test_secrets_that_begin_like_others_go_whole() -> None:
    assert aicarousel.redact("x abcdef-4711-long y abcdef", ["abcdef", "abcdef-4711-long"]) == "x *** y ***"


# ---------------------------------------------------------------- everywhere

@pytest.fixture(scope="module")
def written(module_provider: Provider, module_gateway_factory: Callable[..., Gateway]) -> tuple[dict[str, bytes], list[str]]:
    """All that a gateway wrote while everything around it said secrets aloud, by where; and the secrets."""
    provider = module_provider
    told: list[str] = []            # filled before anything is asked

    def aloud(request: Any) -> list[Any]:
        """What the model's name asks for, with every secret in it."""
        words, kind = " | ".join(told), request.json.get("model", "")
        body = {"error": {"message": f"Failed: {words}", "type": words[:200], "code": told[0], "param": told[-1], "metadata": {"raw": words, "headers": {"authorization": told[0]}}}}
        headers = [("x-ratelimit-limit-requests", told[0]), ("x-request-id", told[1]), ("set-cookie", told[2]), ("www-authenticate", f"Bearer {told[3]}"), ("retry-after", "1"), ("openai-organization", told[4])]
        if kind == "event":
            return opened(content("first "), Chunk(frame(body)), End())
        if kind == "html":
            return answer(f"<html><title>{words}</title><body>{words}</body></html>".encode(), 502, [("content-type", "text/html"), *headers])
        if kind == "text":
            return answer(words.encode(), 500, [("content-type", "text/plain"), *headers])
        return answer(chat_answer(), 200, headers) if kind == "ok" else answer(body, int(kind), headers)

    kinds = ["ok", "event", "html", "text", "400", "422", "404", "429", "500", "402", "401"]
    models: dict[str, Any] = {"carousel": {"fallback": "none", "maxWait": 0, "unknownModel": "reject"}}
    for name in KEYS:
        models[name] = {"baseUrl": provider.script(name, aloud), "default": "ok", "enableFallback": False, "models": kinds, "keys": [f"env:PLANTED_{name.upper().replace('-', '_')}"],
                        "headers": {"X-Org": HEADER_OPAQUE, "X-Secret-Thing": HEADER_NAMED}}
    proxy = provider.listen("proxy", lambda request: answer(f"407 {PROXY_LOGIN} {PROXY_PASSWORD}".encode(), 407, [("proxy-authenticate", f"Basic {PROXY_LOGIN}")])).split("/")[2]
    models["proxied"] = {"baseUrl": "https://planted.invalid/v1", "default": "ok", "enableFallback": False, "models": ["ok"], "keys": ["env:PLANTED_OPENAI"], "proxy": f"http://someone:{quote(PROXY_PASSWORD)}@{proxy}"}
    gateway = module_gateway_factory(models, {**{f"PLANTED_{name.upper().replace('-', '_')}": key for name, key in KEYS.items()}, "SOME_PASSWORD": ENV_UNUSED, "API_KEYS": "operators-own-choice-of-key-4711"}, arguments=["--log-level", "debug"])
    admin = gateway.command("key", "create", "boss", "--admin").stdout.split()[0]
    told += [*KEYS.values(), gateway.key, admin, PROXY_PASSWORD, PROXY_LOGIN, HEADER_OPAQUE, HEADER_NAMED, ENV_UNUSED, "operators-own-choice-of-key-4711", *STRANGE.values()]
    replies: list[bytes] = []

    def ask(method: str, path: str, body: Any = None, **more: Any) -> None:
        replies.append(gateway.request(method, path, body, **more).raw)

    for place, name in enumerate(KEYS):
        for number, kind in enumerate(kinds):
            if place > 2 and kind not in ("ok", "400", "401"):      # the others say what the first three have said
                continue
            client = FORMATS[(place + number) % 3]
            for streamed in (kind in ("ok", "event"), kind in ("event", "500")):
                ask("POST", PATHS[client], body_of(client, f"{name}/{kind}", stream=streamed))
            ask("GET", "/admin/explain", key=admin)
    ask("POST", PATHS["chat"], body_of("chat", "proxied/ok"))
    ask("POST", "/chat", [{"role": told[0], "content": told[1]}])
    for secret in (*list(STRANGE.values())[:4], KEYS["mistral"], KEYS["openai"], gateway.key):      # what a client says where it should not
        for client in FORMATS:
            ask("POST", PATHS[client], body_of(client, secret))
            ask("POST", PATHS[client], body_of(client, "groq/400", user=secret, metadata={"user_id": secret}), headers={"x-session-id": secret, "idempotency-key": secret, "user-agent": secret, "cookie": secret, "anthropic-beta": secret})
            ask("POST", PATHS[client], body_of(client, "groq/ok", temperature=secret, tools=secret))
        ask("POST", PATHS["chat"], f'{{"{secret}'.encode())
        ask("POST", PATHS["chat"], body_of("chat"), key=secret)
        ask("GET", f"/v1/models/{quote(secret, safe='')}")
        ask("GET", f"/{quote(secret, safe='')}?{quote(secret)}")
        ask("GET", "/v1/models", headers={"origin": f"http://{secret[:20].lower()}.test"})
        ask("GET", f"/admin/stats?by={quote(secret)}", key=admin)
        ask("POST", "/admin/explain?format=chat", body_of("chat", secret), key=admin)
        ask("POST", "/admin/routes/reset", {"route": secret}, key=admin)
    for path, row in aicarousel._ENDPOINTS.items():
        for method in row.handlers:
            for key in (admin, None, ""):
                ask(method, path, {} if method == "POST" else None, key=key)
                ask(method, f"{path}?deep=1&heatmap=1&n=100", {} if method == "POST" else None, key=key)
    commands = [["status"], ["stats"], ["stats", "--json"], ["config", "show", "--origin", "--json"], ["provider", "list"], ["model", "list"], ["key", "list"], ["explain", "--server", gateway.url], ["quota", "--server", gateway.url],
                ["route", "list", "--server", gateway.url, "--json"], ["call", told[0]]]
    ran = [gateway.command(*words) for words in commands]
    for broken in ({"groq": {**models["groq"], "keys": [KEYS["groq"]], "models": KEYS["xai"]}}, {KEYS["openai"]: {}}, {"groq": KEYS["groq"]}, {"groq": {**models["groq"], "headers": KEYS["groq"]}}, {"groq": {**models["groq"], "proxy": [KEYS["groq"]]}},
                   {"groq": {**models["groq"], "baseUrl": f"https://bob:{PROXY_PASSWORD}@host.example/v1"}}):
        gateway.write_models(broken)
        ran.append(gateway.command("config", "show"))
    gateway.stop()
    database = b"".join(path.read_bytes() for path in (gateway.home / "data").iterdir() if path.is_file())
    found = {"answers": b"\n".join(replies), "log": gateway.log.encode(), "printed": gateway.printed.encode(), "commands": "\n".join(one.stdout + one.stderr for one in ran).encode(), "database": database}
    return found, told


@pytest.mark.parametrize("place", ["answers", "log", "printed", "commands", "database"])
def test_secrets_planted_everywhere_show_nowhere(written: tuple[dict[str, bytes], list[str]], place: str) -> None:
    """Whole, or the larger part of one. A model's name that a client made up stands in the usage table as it was, and in nothing made from it."""
    found, secrets = written
    text = found[place]
    assert len(text) > 100
    named_as_models = {*list(STRANGE.values())[:4], KEYS["mistral"], KEYS["openai"], secrets[len(KEYS)]} if place == "database" else set()
    leaked = [(secret, text[max(0, at - 200):at + 60]) for secret in secrets if secret not in named_as_models
              for part in {secret, secret[-14:], secret[:18]} if len(part) >= 12 and (at := text.find(part.encode())) >= 0]
    assert not leaked, (len(leaked), leaked[:3])
    assert b"Traceback" not in text or place == "database"
