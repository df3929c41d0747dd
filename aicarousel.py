#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["h11>=0.16", "certifi"]
# ///
"""AICarousel: one address for many LLM APIs.

Clients speak OpenAI Chat Completions to it; it turns through providers, keys and models until one answers, and streams
the answer on as it comes.  Start it with `python aicarousel.py serve`; README.md tells the rest.  It is one module, copied
to a machine and run: Python 3.11 and the package h11 are all it needs, certifi is used where present.
It fetches nothing for clients, phones nowhere, and connects to the configured providers alone.

Contents
     1  Vocabulary          records and words every section may use
     2  Errors              three families: for the client, the policy, the operator
     3  Presets             what is known of each provider: one row each
     4  Configuration       models.json, .env, environment and flags -> Config
     5  Failures            what an answer or a broken connection means
     7  Routing policy      which route, in which order, what cools for how long
     8  Event streams       server-sent events, incremental and bounded
    10  OpenAI Chat         requests checked, streams watched on their way through
    12  Anthropic Messages  the envelope of its errors
    14  World               time, chance, the network, alarms
    15  HTTP                heads by h11, bodies by hand
    16  Store               SQLite: gateway keys, usage, migrations
    17  Transport           the providers' side: connections, TLS, proxies, deadlines
    18  Server              the clients' side: accept, keep-alive, limits, drain
    19  Relay               attempts, commit, pump, keep-alives, cancellation
    20  Pages               the front page, the list of models
    21  Endpoints           the running whole, its URLs and who may call them
    25  Command line        serve, key, status, call, db, config

Life of a request
    Server reads it (18) -> admit and check (21) -> plan (7) -> attempt (19)
    -> Transport.request (17) -> failure: classify (5), cool (7), next route | success: commit, pump -> settle (16)

Promises
    Nothing is retried after commit.  No secret is logged.  Pure sections never touch the outside world.
    What is broken never looks whole: a stream without its proper ending ends in an error event.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and __spec__ is None and sys.argv[1:2] == ["serve"] and hasattr(os, "memfd_create"):
    # The syntax tree of a script stays in memory for as long as it runs, here some 15 MB; that of an imported module does not.
    # So a server hands its compiled code on to itself, before anything else is loaded: 20 ms, for half the memory. Same process, same flags,
    # and the module path as it is, which spares the second start the search for site packages (-S).
    import marshal
    from importlib.util import MAGIC_NUMBER
    _fd = os.memfd_create("aicarousel", 0)
    with open(_fd, "wb", closefd=False) as _file:
        _file.write(MAGIC_NUMBER + bytes(12) + marshal.dumps(sys._getframe().f_code))
    _code = (f"import os, sys; sys.path[:] = {sys.path!r}; from importlib import machinery, util; l = machinery.SourcelessFileLoader('aicarousel', '/proc/self/fd/{_fd}'); "
             f"m = util.module_from_spec(util.spec_from_loader('aicarousel', l)); m.__file__ = {os.path.abspath(__file__)!r}; sys.modules['aicarousel'] = m; "
             f"l.exec_module(m); os.close({_fd}); raise SystemExit(m.main())")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:-len(sys.argv)], "-S", "-c", _code, *sys.argv[1:]])

import asyncio
import base64
import contextlib
import email.utils
import errno
import fnmatch
import functools
import hashlib
import hmac
import json
import logging
import mmap
import queue
import random
import re
import secrets
import signal
import socket
import sqlite3
import ssl
import threading
import time
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

try:
    import h11
except ImportError:
    h11 = None      # type: ignore[assignment]    # only serving needs it, and says so
try:
    import certifi
except ImportError:
    certifi = None  # type: ignore[assignment]    # the system's authorities alone then

__version__ = "0.1.0"

__all__ = [
    # 2. Errors
    "ConfigError",
    "GatewayError",
    # 4. Configuration
    "Config",
    "load_config",
    # 25. Command line
    "main",
    "serve",
]


##############################################################################
# 1. Vocabulary                                             pure | uses -
##############################################################################
# Records and words every section may use.  A record here is a value: it is made once, never changed, and says
# nothing about how it is stored or sent.  Words are those of the README: client, provider, credential, route, attempt.
# One more word: a frozen dataclass with slots, its units in its names, a line for every field that is not plain.

Json = dict[str, Any]
Headers = list[tuple[str, str]]

Format = Literal["chat", "responses", "messages"]
FORMAT_NAMES: tuple[str, ...] = ("chat", "responses", "messages")

#: Why an attempt ended badly; what follows from each is the table FAILURE_RULES.
Kind = Literal["request", "fit", "model", "credential", "payment", "rate", "server", "network", "parameter"]


@dataclass(frozen=True, slots=True)
class Price:
    """USD per million tokens; None where unknown."""
    input: float | None = None
    output: float | None = None
    cache_read: float | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """Requests and tokens a provider grants per minute and per day; None where unknown or unlimited."""
    rpm: int | None = None
    rpd: int | None = None
    tpm: int | None = None
    tpd: int | None = None


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds until an attempt is given up, by phase."""
    connect_s: float = 10.0
    first_byte_s: float = 60.0      #: request sent -> response head; for streams also the first event
    idle_s: float = 90.0            #: between two pieces of an answer under way
    total_s: float = 600.0          #: one whole answer that is not streamed
    stream_total_s: float = 3600.0  #: one whole streamed answer


@dataclass(frozen=True, slots=True)
class Model:
    """A model as one provider offers it; None where nothing is known."""
    id: str                         #: the name sent on the wire
    alias: str | None = None        #: a second name clients may use
    context: int | None = None      #: tokens, prompt and answer together
    max_output: int | None = None
    vision: bool | None = None
    tools: bool | None = None
    reasoning: bool | None = None
    price: Price | None = None
    limits: Limits | None = None


@dataclass(frozen=True, slots=True)
class PayloadRule:
    """Edits of request bodies for the models that match a glob."""
    models: str
    default: Mapping[str, Any]
    override: Mapping[str, Any]
    drop: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Credential:
    """One secret for one provider; `id` is what may be logged."""
    id: str                                  #: provider/number, e.g. groq/2
    secret: str = field(repr=False, default="")   #: "" for providers that need none
    label: str = ""
    source: str = ""                         #: where it came from, e.g. env:GROQ_API_KEY_2
    proxy: str | None = None                 #: None: the provider's; "": none
    headers: tuple[tuple[str, str], ...] = ()
    models: tuple[str, ...] = ("*",)
    excluded_models: tuple[str, ...] = ()
    prefix: str = ""                         #: clients may name this credential's models with it; never sent upstream


@dataclass(frozen=True, slots=True)
class Provider:
    """One entry of models.json with its preset's facts filled in."""
    name: str
    preset: Preset
    base_url: str                            #: no trailing slash
    format: Format
    default: str
    enable_fallback: bool
    models: tuple[Model, ...]
    credentials: tuple[Credential, ...]
    enabled: bool = True
    headers: tuple[tuple[str, str], ...] = ()
    proxy: str | None = None                 #: None: the environment's; "": none
    timeouts: Timeouts = Timeouts()
    limits: Limits | None = None
    max_concurrent: int | None = None
    rules: tuple[PayloadRule, ...] = ()
    why_out: str = ""                        #: why it takes no part, "" when it does


@dataclass(frozen=True, slots=True)
class Route:
    """One way to serve a model.  `keys` are the names cooldowns of this route can stand under."""
    provider: Provider
    credential: Credential
    model: Model
    id: str                                  #: e.g. groq/2:openai/gpt-oss-120b
    keys: tuple[str, ...]                    #: scopes, widest first: provider, credential, model, route


def make_route(provider: Provider, credential: Credential, model: Model) -> Route:
    """The route through `credential` to `model`, with its cooldown keys worked out."""
    return Route(provider, credential, model, f"{credential.id}:{model.id}", (
        f"provider {provider.name}", f"credential {credential.id}", f"model {provider.name}:{model.id}", f"route {credential.id}:{model.id}"))


#: Where each scope of a failure stands in Route.keys.
SCOPES: Mapping[str, int] = {"provider": 0, "credential": 1, "model": 2, "route": 3}


@dataclass(slots=True)
class Usage:
    """Tokens of one answer.  `input` counts all prompt tokens, `cached` and `cache_write` are parts of it, `reasoning` is part of `output`."""
    input: int = 0
    output: int = 0
    cached: int = 0
    cache_write: int = 0
    reasoning: int = 0
    estimated: bool = False


@dataclass(slots=True)
class Attempt:
    """One try of one route, as it is told to the client, the log and the usage table."""
    route: Route
    started_at: float
    status: int = 0                 #: what the provider answered, 0 when it did not
    reason: str = ""                #: "" when it served
    detail: str = ""                #: the provider's words, secrets removed
    ms: int = 0

    def public(self) -> Json:
        """What errors may tell of this attempt: no key, no URL."""
        return {"provider": self.route.provider.name, "model": self.route.model.id, "status": self.status or None, "reason": self.reason, "ms": self.ms}


##############################################################################
# 2. Errors                                                 pure | uses 1
##############################################################################
# Three audiences, three families: GatewayError for the client, UpstreamFailure for the policy, ConfigError for the
# operator.  Whose fault it is lies in the type, never in the text.  No text here holds a secret or a URL.
# One more client error: a subclass with its status, code and type; every format's envelope picks it up by itself.

@dataclass(slots=True, eq=False)
class GatewayError(Exception):
    """An answer to the client that is an error.  `message` is safe to show; `attempts` are Attempt.public() rows."""
    message: str
    status: int = 500
    code: str | None = None
    type: str = "server_error"
    param: str | None = None
    retry_after_s: float | None = None
    attempts: list[Json] = field(default_factory=list)

    def __str__(self) -> str:
        return self.message

    def redact(self, secrets: Collection[str]) -> None:
        """Take secrets out of whatever of this a provider may have written."""
        self.message = redact(self.message, secrets)
        self.code = redact(self.code, secrets) if self.code else self.code
        self.param = redact(self.param, secrets) if self.param else self.param


def bad_request(message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> GatewayError:
    """The client sent something that no provider could answer."""
    return GatewayError(message, status, code, "invalid_request_error", param)


def unauthorized(message: str) -> GatewayError:
    """The gateway key is missing or unknown."""
    return GatewayError(message, 401, "invalid_api_key", "invalid_request_error")


def forbidden(message: str, *, status: int = 403) -> GatewayError:
    """The caller may not do this: a foreign page, a wrong host."""
    return GatewayError(message, status, "forbidden", "invalid_request_error")


def unknown_model(message: str) -> GatewayError:
    """Nothing here serves the model that was named."""
    return GatewayError(message, 404, "model_not_found", "invalid_request_error", "model")


def too_large(message: str) -> GatewayError:
    """The body is over the limit."""
    return GatewayError(message, 413, "request_too_large", "invalid_request_error")


def no_route(message: str, *, status: int = 503, retry_after_s: float | None = None) -> GatewayError:
    """No route can be tried now; `message` says why each was left out."""
    rate = status == 429
    return GatewayError(message, status, "rate_limit_exceeded" if rate else "no_route", "rate_limit_error" if rate else "server_error", None, retry_after_s)


@dataclass(slots=True, eq=False)
class UpstreamFailure(Exception):
    """How one attempt ended badly: what the transport saw (`phase`, `status`) and what it meant (`kind`, `reason`), two facts.

    scope: which of Route.keys cools, "" for none.  cool_s: how long, None to guess.  proven: the provider named the time.
    reason: the finer word (rate_day, model_capacity, timeout...), shown to users.  detail: the provider's words, secrets removed.
    """
    kind: Kind
    reason: str
    detail: str = ""
    status: int = 0
    phase: str = ""                 #: connect, head, first_event, idle, body, "" when the answer itself was the failure
    scope: str = ""
    cool_s: float | None = None
    proven: bool = False
    code: str | None = None         #: the provider's own code, for the client's envelope
    param: str | None = None

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


#: What looks like a secret wherever it stands: vendor prefixes, bearer values, long opaque words after "key".
_SECRET = re.compile(r"\b(?:sk|csk|gsk|xai|nvapi|fw|hf|tgp|gh[opsu]|github_pat|pplx|r8)[-_][A-Za-z0-9_\-]{8,}|\bAIza[\w\-]{20,}|\bAQ\.[\w\-]{20,}|\beyJ[\w\-]+\.[\w\-.]+"
                     r"|(?<=[Bb]earer )[^\s\"',;]{12,}|\borg[-_][A-Za-z0-9]{6,}")


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` without any of `secrets` (by value) and without what looks like a secret or an organisation id (by pattern)."""
    for secret in secrets:
        if len(secret) >= 6 and secret in text:
            text = text.replace(secret, "***")
    return _SECRET.sub("***", text)


class ConfigError(Exception):
    """A mistake in models.json, .env or a flag: what was found where, what was expected.  Exit status 2, no traceback."""

    def __init__(self, where: str, found: str, expected: str) -> None:
        super().__init__(f"{where}: found {found}; expected {expected}")
        self.where, self.found, self.expected = where, found, expected


##############################################################################
# 3. Presets                                                pure | uses 1
##############################################################################
# What is known of each provider: one row each, data only, in the order in which they are tried when there is no
# models.json.  A row says only what differs from Preset's defaults.  Names and limits age fast: live answers win over them.
# Source: public catalogues and vendor pages, read 2026-11.  Guarded by tests/test_presets.py.
# One more provider: one more row; a provider that behaves like CUSTOM_PRESET needs none, only its entry in models.json.

@dataclass(frozen=True, slots=True, eq=False)
class Preset:
    """Facts about one provider.  Compared by identity, so that what holds one can be a key."""
    title: str
    base_url: str = ""                       #: the path of a format follows it: /chat/completions, /messages, /responses
    key_variables: tuple[str, ...] = ()      #: each also as NAME_2 .. NAME_50 and as a comma list
    key_page: str = ""
    format: Format = "chat"
    other_urls: Mapping[str, str] = field(default_factory=dict)   #: format -> base URL, for formats besides `format`
    models: tuple[Model, ...] = ()           #: best first; their `limits` are those of the free tier
    default: str = ""                        #: "" where only the machine itself knows its models
    keyless: bool = False
    auth_header: str = "authorization"
    auth_scheme: str = "Bearer"              #: "" for the bare key
    headers: tuple[tuple[str, str], ...] = ()
    bucket: Literal["account", "model", "machine"] = "account"    #: what a rate limit counts against; model: (account, model)
    rejects: tuple[str, ...] = ()            #: request fields that are answered by 400 or 422
    message_rejects: tuple[str, ...] = ()    #: the same within a message
    renames: Mapping[str, str] = field(default_factory=dict)      #: request fields that go by another name
    max_field: Literal["", "max_tokens", "max_completion_tokens"] = ""   #: the only spelling it knows, "" where both are
    system_role: Literal["", "system"] = "system"                 #: what role developer becomes, "" to leave it
    stream_options: bool = True              #: whether include_usage may be asked for
    first_byte_s: float = 60.0
    idle_s: float = 90.0
    free_limits: Limits | None = None        #: of the free tier; per model where `bucket` is model
    retired: Mapping[str, str] = field(default_factory=dict)      #: model id or glob -> when
    needs: tuple[str, ...] = ()              #: further variables that fill {NAME} in the URLs
    gone: str = ""                           #: why the whole service cannot be used any more
    check: tuple[str, str] = ("GET", "/models")   #: cheapest call that proves a key; /chat/completions: with one token of output
    name: str = ""                           #: its key in PRESETS


def _known_model(model_id: str, context: int, max_output: int, can: str, price: tuple[float | None, ...] = (), limits: Limits | None = None) -> Model:
    """A model of a preset.  `can`: letters of t(ools), v(ision), r(easoning); `price`: USD per million in, out, cache read."""
    return Model(model_id, None, context, max_output, "v" in can, "t" in can, "r" in can, Price(*price) if price else None, limits)


def _retired(when_by_names: Mapping[str, str]) -> dict[str, str]:
    """`when` of each name; several names of one date stand in one line, parted by spaces."""
    return {name: when for names, when in when_by_names.items() for name in names.split()}


_FREE = (0.0, 0.0)
_LITE_DAY = Limits(rpm=15, rpd=500, tpm=250_000)
_ONE_TOKEN = ("POST", "/chat/completions")   # where the model list answers any key, or none

_ROWS: Mapping[str, Preset] = {
    "gemini": Preset(
        "Google Gemini API (AI Studio)", "https://generativelanguage.googleapis.com/v1beta/openai",
        ("GEMINI_API_KEY", "GOOGLE_API_KEY", "GOOGLE_GENERATIVE_AI_API_KEY"), "https://aistudio.google.com/app/api-keys",
        default="gemini-3.5-flash-lite", bucket="model", first_byte_s=90.0,
        check=_ONE_TOKEN,                    # some new keys list models and yet cannot generate
        rejects=("store", "metadata", "prompt_cache_key", "parallel_tool_calls", "logit_bias"),
        models=(
            _known_model("gemini-3.5-flash-lite", 1048576, 65536, "tvr", (0.3, 2.5, 0.03), _LITE_DAY),
            _known_model("gemini-3.1-flash-lite", 1048576, 65536, "tvr", (0.25, 1.5, 0.025), _LITE_DAY),
            _known_model("gemini-3.8-flash", 1048576, 65536, "tvr", (0.75, 3.75, 0.075), Limits(rpm=5, rpd=20, tpm=250_000)),
            _known_model("gemma-4-31b-it", 262144, 32768, "tvr", _FREE, Limits(rpm=15, rpd=1500)),
        ),
        retired=_retired({
            "gemini-1.5-*": "2025", "gemini-2.0-flash gemini-2.0-flash-lite": "2026-06-01", "gemini-3-pro-preview": "2026-03-09",
            "gemini-3.1-flash-lite-preview": "2026-05-25", "gemini-2.5-pro gemini-2.5-flash": "2026-12-01, then routed to newer models",
            "gemma-3-*": "2026",
        })),
    "groq": Preset(
        "GroqCloud", "https://api.groq.com/openai/v1", ("GROQ_API_KEY",), "https://console.groq.com/keys",
        default="openai/gpt-oss-120b", bucket="model", first_byte_s=30.0, free_limits=Limits(30, 1000, 8_000, 200_000),
        rejects=("logprobs", "top_logprobs", "logit_bias", "store", "metadata"), message_rejects=("name", "reasoning_content", "reasoning"),
        models=(
            _known_model("openai/gpt-oss-120b", 131072, 65536, "tr", (0.15, 0.6, 0.075)),
            _known_model("qwen/qwen3.8-27b", 131072, 16384, "tvr", (0.8, 4.0)),
            _known_model("openai/gpt-oss-20b", 131072, 65536, "tr", (0.075, 0.3, 0.0375)),
        ),
        retired=_retired({
            "llama-3.1-70b-versatile": "2025-01", "gemma2-9b-it mixtral-8x7b-32768": "2025", "moonshotai/kimi-k2-instruct-0905": "2026-07",
            "qwen/qwen3-32b meta-llama/llama-4-scout-17b-16e-instruct": "2026-07-17",
            "llama-3.3-70b-versatile llama-3.1-8b-instant": "2026-08-16",
        })),
    "openrouter": Preset(
        "OpenRouter", "https://openrouter.ai/api/v1", ("OPENROUTER_API_KEY",), "https://openrouter.ai/settings/keys",
        default="nvidia/nemotron-3-ultra-550b-a55b:free", first_byte_s=120.0, free_limits=Limits(rpm=20, rpd=50), check=("GET", "/key"),
        other_urls={"messages": "https://openrouter.ai/api/v1", "responses": "https://openrouter.ai/api/v1"},
        models=(
            _known_model("nvidia/nemotron-3-ultra-550b-a55b:free", 1000000, 65536, "tr", _FREE),
            _known_model("google/gemma-4-31b-it:free", 262144, 32768, "tvr", _FREE),
            _known_model("cohere/north-mini-code:free", 256000, 64000, "tr", _FREE),
            _known_model("nvidia/nemotron-3.5-super-vl:free", 1000000, 131072, "tvr", _FREE),
            _known_model("openrouter/free", 200000, 4096, "tvr", _FREE),
        ),
        retired=_retired({
            "qwen/qwen3-coder:free openai/gpt-oss-20b:free meta-llama/llama-3.3-70b-instruct:free": "2026-09",
            "moonshotai/kimi-k2:free z-ai/glm-4.5-air:free google/gemini-2.0-flash-exp:free": "2026-07", "qwen/qwen3.8-27b:free": "2026-11",
        })),
    "cerebras": Preset(
        "Cerebras Inference", "https://api.cerebras.ai/v1", ("CEREBRAS_API_KEY",), "https://cloud.cerebras.ai/platform/",
        default="gpt-oss-120b", bucket="model", first_byte_s=30.0, free_limits=Limits(rpm=5, tpm=30_000, tpd=1_000_000),
        rejects=("store", "metadata", "logit_bias", "frequency_penalty", "presence_penalty", "service_tier", "reasoning", "enable_thinking"),
        message_rejects=("reasoning_content",),
        models=(
            _known_model("gpt-oss-120b", 131072, 40960, "tr", (0.35, 0.75)),
            _known_model("qwen-3.8-27b", 131072, 40960, "tvr", (0.99, 1.49)),
        ),
        retired=_retired({
            "llama3.1-70b": "2025-01-17", "qwen-3-235b-a22b": "2025-07-29", "deepseek-r1-distill-llama-70b": "2025-08-12",
            "llama-4-maverick-17b-128e-instruct": "2025-10-15", "llama-4-scout-17b-16e-instruct": "2025-11-03", "qwen-3-coder-480b": "2025-11-05",
            "qwen-3-235b-a22b-thinking-2507": "2025-11-14", "zai-glm-4.6": "2026-01-20", "qwen-3-32b llama-3.3-70b": "2026-02-16",
            "llama3.1-8b qwen-3-235b-a22b-instruct-2507": "2026-05-27", "zai-glm-4.7": "2026-08-17", "gemma-4-31b": "2026-09",
        })),
    "ollama": Preset(                        # OLLAMA_API_KEY is the cloud's: it is never sent to the local server
        "Ollama (local)", "http://127.0.0.1:11434/v1", keyless=True,
        default="gemma3:1b", bucket="machine", first_byte_s=300.0, max_field="max_tokens",
        other_urls={"messages": "http://127.0.0.1:11434/v1", "responses": "http://127.0.0.1:11434/v1"},
        models=(
            _known_model("gemma3:1b", 32768, 8192, "", _FREE),
            _known_model("llama3.2:latest", 131072, 8192, "t", _FREE),
            _known_model("gpt-oss:20b", 131072, 32768, "tr", _FREE),
        )),
    "ollama-cloud": Preset(
        "Ollama Cloud", "https://ollama.com/v1", ("OLLAMA_API_KEY", "OLLAMA_CLOUD_API_KEY"), "https://ollama.com/settings/keys",
        default="gpt-oss:120b", first_byte_s=300.0, max_field="max_tokens", check=("GET", "https://ollama.com/api/usage"),
        models=(
            _known_model("gpt-oss:120b", 131072, 32768, "tr", (0.15, 0.6, 0.014)),
            _known_model("glm-5.3-flash", 1000000, 131072, "tvr", (0.15, 0.5, 0.03)),
            _known_model("deepseek-v4.1-flash", 1048576, 384000, "tvr", (0.15, 0.6, 0.003)),
            _known_model("gemma4:31b", 262144, 262144, "tvr", (0.14, 0.4, 0.05)),
        ),
        retired=_retired({"glm-4.6 glm-4.7 qwen3-coder:480b deepseek-v3.1:671b kimi-k2:1t minimax-m2 gemma3:* devstral-*": "2026-09"})),
    "huggingface": Preset(
        "Hugging Face Inference Providers", "https://router.huggingface.co/v1",
        ("HF_TOKEN", "HUGGINGFACE_API_KEY", "HUGGINGFACE_API_TOKEN", "HUGGINGFACE_HUB_TOKEN"),
        "https://huggingface.co/settings/tokens/new?ownUserPermissions=inference.serverless.write&tokenType=fineGrained",
        default="openai/gpt-oss-120b", first_byte_s=120.0, max_field="max_tokens", check=("GET", "https://huggingface.co/api/whoami-v2"),
        models=(
            _known_model("openai/gpt-oss-120b", 131072, 32768, "tr", (0.25, 0.69)),
            _known_model("zai-org/GLM-5.3-Flash", 1048576, 131072, "tvr", (0.15, 0.5)),
            _known_model("Qwen/Qwen3.8-27B", 262144, 32768, "tvr", (0.4, 3.0)),
            _known_model("google/gemma-4-31B-it", 262144, 32768, "tvr", (0.14, 0.4)),
        )),
    "openai": Preset(
        "OpenAI", "https://api.openai.com/v1", ("OPENAI_API_KEY",), "https://platform.openai.com/api-keys",
        default="gpt-6-luna", bucket="model", first_byte_s=180.0, idle_s=180.0, max_field="max_completion_tokens", system_role="",
        other_urls={"responses": "https://api.openai.com/v1"},
        models=(
            _known_model("gpt-6-luna", 1050000, 128000, "tvr", (0.1, 0.5, 0.01)),
            _known_model("gpt-5.6-luna", 1050000, 128000, "tvr", (0.2, 1.2, 0.02)),
            _known_model("gpt-6.1-terra", 1050000, 128000, "tvr", (1.0, 5.0, 0.05)),
            _known_model("gpt-6.1-sol", 1050000, 128000, "tvr", (2.0, 10.0, 0.1)),
        ),
        retired=_retired({
            "gpt-3.5-turbo gpt-4 gpt-4-turbo gpt-4.1-nano o1 o3-mini o4-mini": "2026-10-23", "gpt-5-codex gpt-5-chat-latest": "2026-07-23",
            "gpt-5 gpt-5-mini gpt-5-nano gpt-5-pro": "2026-12-11", "gpt-5.4-nano": "2027-04-01",
        })),
    "anthropic": Preset(                     # ANTHROPIC_AUTH_TOKEN is left out: clients of this gateway keep their gateway key in it
        "Anthropic Claude API", "https://api.anthropic.com/v1", ("ANTHROPIC_API_KEY",), "https://platform.claude.com/settings/keys",
        format="messages", default="claude-haiku-5-5", bucket="model", first_byte_s=120.0,
        auth_header="x-api-key", auth_scheme="", headers=(("anthropic-version", "2023-06-01"),),
        models=(
            _known_model("claude-haiku-5-5", 1000000, 128000, "tvr", (0.1, 0.5, 0.01)),
            _known_model("claude-sonnet-5-5", 1000000, 128000, "tvr", (2.0, 10.0, 0.1)),
            _known_model("claude-opus-5-5", 1000000, 128000, "tvr", (4.0, 20.0, 0.2)),
            _known_model("claude-haiku-4-5", 200000, 64000, "tvr", (1.0, 5.0, 0.1)),
        ),
        retired=_retired({"claude-3-*": "2025-2026", "claude-sonnet-4-5": "2026-11-30", "claude-mythos-preview": "2026-06-09"})),
    "github-copilot": Preset(                # GITHUB_TOKEN is left out: every build machine has one, and it is not meant for this
        "GitHub Copilot", "https://api.githubcopilot.com", ("COPILOT_GITHUB_TOKEN", "GITHUB_COPILOT_TOKEN"),
        default="gpt-6-luna", first_byte_s=120.0, idle_s=180.0, rejects=("store",), max_field="max_completion_tokens",
        other_urls={"messages": "https://api.githubcopilot.com/v1", "responses": "https://api.githubcopilot.com"},
        headers=(("openai-intent", "conversation-edits"),),
        models=(
            _known_model("gpt-6-luna", 922000, 128000, "tvr", (0.1, 0.5, 0.01)),
            _known_model("claude-haiku-5.5", 128000, 16000, "tvr", (0.1, 0.5, 0.01)),
            _known_model("gemini-3.8-flash", 200000, 64000, "tvr", (0.75, 3.75, 0.075)),
            _known_model("mai-code-1.1-flash", 128000, 128000, "tvr", (0.2, 1.2, 0.02)),
        ),
        retired=_retired({
            "gpt-4.1": "2026-06-01", "gpt-5 gpt-5-codex": "2026-02-17", "gpt-5.1*": "2026-04", "claude-sonnet-4": "2026-05-01",
            "grok-code-fast-1": "2026-05-15", "claude-sonnet-4.6": "2026-09-01",
            "gpt-5-mini gpt-5.4 gpt-5.4-mini gpt-5.5 grok-4.5 gemini-3.7-flash": "2026-10-19", "claude-opus-4.8 claude-opus-5 gpt-5.6-terra": "2026-11-16",
        })),
    "deepseek": Preset(
        "DeepSeek", "https://api.deepseek.com/v1", ("DEEPSEEK_API_KEY",), "https://platform.deepseek.com/api_keys",
        default="deepseek-flash", first_byte_s=180.0, rejects=("store",), max_field="max_tokens", check=("GET", "https://api.deepseek.com/user/balance"),
        other_urls={"messages": "https://api.deepseek.com/anthropic/v1"},
        models=(
            _known_model("deepseek-flash", 1000000, 384000, "tvr", (0.3, 1.2, 0.006)),
            _known_model("deepseek-v4-pro", 1000000, 384000, "tr", (1.32, 3.96, 0.044)),
        ),
        retired=_retired({"deepseek-chat deepseek-reasoner": "2026-07-24", "deepseek-v4-flash deepseek-v4-flash-vision-exp": "2026-09-10"})),
    "mistral": Preset(                       # usage comes with the last chunk unasked
        "Mistral La Plateforme", "https://api.mistral.ai/v1", ("MISTRAL_API_KEY",), "https://console.mistral.ai/api-keys",
        default="mistral-small-latest", max_field="max_tokens", stream_options=False, free_limits=Limits(rpm=60, tpm=500_000),
        rejects=("store", "user", "logit_bias", "logprobs", "top_logprobs", "stream_options"), message_rejects=("reasoning_content",),
        renames={"seed": "random_seed"},
        models=(
            _known_model("mistral-small-latest", 262144, 256000, "tvr", (0.15, 0.6, 0.015)),
            _known_model("ministral-8b-latest", 262144, 128000, "tv", (0.15, 0.15, 0.015)),
            _known_model("devstral-latest", 262144, 262144, "t", (0.4, 2.0, 0.04)),
            _known_model("mistral-medium-latest", 262144, 262144, "tvr", (1.5, 7.5, 0.15)),
        )),
    "xai": Preset(
        "xAI Grok", "https://api.x.ai/v1", ("XAI_API_KEY",), "https://console.x.ai/team/default/api-keys",
        default="grok-4.3", idle_s=180.0, rejects=("store", "logit_bias"), max_field="max_completion_tokens",
        other_urls={"responses": "https://api.x.ai/v1"},
        models=(
            _known_model("grok-4.3", 1000000, 30000, "tvr", (1.25, 2.5, 0.2)),
            _known_model("grok-4.7", 500000, 500000, "tvr", (2.0, 6.0, 0.5)),
        ),
        retired=_retired({"grok-3 grok-4-0709 grok-4-fast-* grok-4-1-fast-* grok-code-fast-1": "2026-05-15"})),
    "together": Preset(
        "Together AI", "https://api.together.ai/v1", ("TOGETHER_API_KEY", "TOGETHERAI_API_KEY"), "https://api.together.ai/settings/api-keys",
        default="openai/gpt-oss-120b", rejects=("store",), max_field="max_tokens",
        models=(
            _known_model("openai/gpt-oss-120b", 131072, 131072, "tr", (0.15, 0.6)),
            _known_model("zai-org/GLM-5.3-Flash", 1048575, 400000, "tvr", (0.15, 0.5, 0.03)),
            _known_model("Qwen/Qwen3.5-9B", 262144, 65536, "tvr", (0.17, 0.25)),
        )),
    "fireworks": Preset(
        "Fireworks AI", "https://api.fireworks.ai/inference/v1", ("FIREWORKS_API_KEY",), "https://app.fireworks.ai/settings/users/api-keys",
        default="accounts/fireworks/models/glm-5p3-flash", rejects=("store",), max_field="max_tokens",
        check=("GET", "https://api.fireworks.ai/v1/accounts/fireworks/models?pageSize=1"),   # its /models fails for accounts without deployments
        other_urls={"messages": "https://api.fireworks.ai/inference/v1"},
        models=(
            _known_model("accounts/fireworks/models/glm-5p3-flash", 1048573, 131072, "tvr", (0.15, 0.5, 0.03)),
            _known_model("accounts/fireworks/models/deepseek-v4p1-flash", 1000000, 384000, "tvr", (0.3, 1.2, 0.006)),
            _known_model("accounts/fireworks/models/minimax-m3p1-flash", 1000000, 512000, "tvr", (0.15, 0.6, 0.015)),
        )),
    "nvidia": Preset(
        "NVIDIA NIM (build.nvidia.com)", "https://integrate.api.nvidia.com/v1", ("NVIDIA_API_KEY", "NVIDIA_NIM_API_KEY"),
        "https://build.nvidia.com/settings/api-keys",
        default="nvidia/nemotron-3-ultra-550b-a55b", first_byte_s=300.0, idle_s=300.0, rejects=("store",), max_field="max_tokens",
        free_limits=Limits(rpm=40), check=_ONE_TOKEN,
        models=(
            _known_model("nvidia/nemotron-3-ultra-550b-a55b", 1000000, 65536, "tr", _FREE),
            _known_model("nvidia/nemotron-3.5-lightning-30b-a3b", 262144, 262144, "tr", _FREE),
            _known_model("z-ai/glm-5.3-flash", 1000000, 131072, "tvr", _FREE),
            _known_model("openai/gpt-oss-20b", 131072, 32768, "tr", _FREE),
        ),
        retired=_retired({"meta/llama-3.3-70b-instruct deepseek-ai/deepseek-v4-* z-ai/glm-5.2 minimaxai/minimax-m3 qwen/qwen3-coder-480b*": "2026-09"})),
    "sambanova": Preset(
        "SambaNova Cloud", "https://api.sambanova.ai/v1", ("SAMBANOVA_API_KEY",), "https://cloud.sambanova.ai/apis",
        default="gpt-oss-120b", rejects=("store",), max_field="max_tokens", free_limits=Limits(rpm=20, rpd=20, tpd=200_000), check=_ONE_TOKEN,
        models=(
            _known_model("gpt-oss-120b", 131072, 131072, "tr", (0.22, 0.59)),
            _known_model("gemma-4-31B-it", 131072, 131072, "v", (0.38, 1.15)),
            _known_model("MiniMax-M2.7", 196608, 131072, "tr", (0.6, 2.4)),
        )),
    "cloudflare": Preset(
        "Cloudflare Workers AI", "https://api.cloudflare.com/client/v4/accounts/{CLOUDFLARE_ACCOUNT_ID}/ai/v1",
        ("CLOUDFLARE_API_TOKEN", "CLOUDFLARE_API_KEY"), "https://dash.cloudflare.com/profile/api-tokens",
        default="@cf/openai/gpt-oss-120b", rejects=("store",), needs=("CLOUDFLARE_ACCOUNT_ID",),
        check=("GET", "https://api.cloudflare.com/client/v4/user/tokens/verify"),
        other_urls={"responses": "https://api.cloudflare.com/client/v4/accounts/{CLOUDFLARE_ACCOUNT_ID}/ai/v1"},
        models=(
            _known_model("@cf/openai/gpt-oss-120b", 128000, 16384, "tr", (0.35, 0.75)),
            _known_model("@cf/zai-org/glm-4.7-flash", 131072, 131072, "tr", (0.0605, 0.4)),
            _known_model("@cf/google/gemma-4-26b-a4b-it", 256000, 16384, "tvr", (0.1, 0.3, 0.05)),
            _known_model("@cf/qwen/qwen3.8-27b", 262144, 262144, "tvr", (0.45, 3.2, 0.05)),
        )),
    "zai": Preset(
        "Z.ai / GLM", "https://api.z.ai/api/paas/v4", ("ZAI_API_KEY", "ZHIPU_API_KEY"), "https://z.ai/manage-apikey/apikey-list",
        default="glm-4.7-flash", rejects=("store",), max_field="max_tokens", check=_ONE_TOKEN,
        other_urls={"messages": "https://api.z.ai/api/anthropic/v1"},
        models=(
            _known_model("glm-4.7-flash", 200000, 131072, "tr", _FREE),
            _known_model("glm-5.3-flash", 1000000, 131072, "tvr", (0.15, 0.5, 0.03)),
            _known_model("glm-5.3", 1000000, 131072, "tr", (1.4, 4.4, 0.26)),
        )),
    "moonshot": Preset(
        "Moonshot / Kimi", "https://api.moonshot.ai/v1", ("MOONSHOT_API_KEY", "KIMI_API_KEY"), "https://platform.moonshot.ai/console/api-keys",
        default="kimi-k2.6", rejects=("store",), max_field="max_tokens", check=("GET", "/users/me/balance"),
        other_urls={"messages": "https://api.moonshot.ai/anthropic/v1"},
        models=(
            _known_model("kimi-k2.6", 262144, 262144, "tvr", (0.95, 4.0, 0.16)),
            _known_model("kimi-k3.1-pro", 1048576, 1048576, "tvr", (2.0, 10.0, 0.2)),
            _known_model("kimi-k3", 1048576, 131072, "tvr", (3.0, 15.0, 0.3)),   # the documented output, not the catalogues' 1M
        ),
        retired=_retired({"moonshot-v1-* kimi-k2.5": "2026-08-31", "kimi-k2-*": "2026"})),
    "minimax": Preset(
        "MiniMax", "https://api.minimax.io/v1", ("MINIMAX_API_KEY",), "https://platform.minimax.io",
        default="MiniMax-M3.1-Flash", max_field="max_tokens", check=_ONE_TOKEN,
        other_urls={"messages": "https://api.minimax.io/anthropic/v1"},
        models=(
            _known_model("MiniMax-M3.1-Flash", 1000000, 524288, "tvr", (0.15, 0.6, 0.015)),
            _known_model("MiniMax-M3", 1000000, 524288, "tvr", (0.3, 1.2, 0.06)),
            _known_model("MiniMax-M2.7", 204800, 131072, "tr", (0.3, 1.2, 0.06)),
        )),
    "qwen": Preset(
        "Alibaba Model Studio (Qwen, DashScope)", "https://dashscope-intl.aliyuncs.com/compatible-mode/v1", ("DASHSCOPE_API_KEY",),
        "https://modelstudio.console.alibabacloud.com",
        default="qwen3.8-flash", idle_s=600.0, rejects=("store",), max_field="max_tokens",
        other_urls={"messages": "https://dashscope-intl.aliyuncs.com/apps/anthropic/v1"},
        models=(
            _known_model("qwen3.8-flash", 1000000, 131072, "tvr", (0.15, 0.47, 0.016)),
            _known_model("qwen3.7-flash", 1000000, 131072, "tvr", (0.03, 0.13, 0.003)),
            _known_model("qwen3.8-max", 1000000, 131072, "tvr", (2.0, 6.0, 0.25)),
        )),
    "lmstudio": Preset(
        "LM Studio (local)", "http://127.0.0.1:1234/v1", ("LMSTUDIO_API_KEY", "LM_STUDIO_API_KEY"), keyless=True,
        bucket="machine", first_byte_s=300.0, other_urls={"responses": "http://127.0.0.1:1234/v1"}),
    "vllm": Preset(
        "vLLM server (local)", "http://127.0.0.1:8000/v1", ("VLLM_API_KEY",), keyless=True,
        bucket="machine", first_byte_s=300.0, other_urls={"responses": "http://127.0.0.1:8000/v1"}),
    "llamacpp": Preset(
        "llama.cpp server (local)", "http://127.0.0.1:8080/v1", ("LLAMA_CPP_API_KEY",), keyless=True,
        bucket="machine", first_byte_s=300.0, rejects=("store",)),
    "github-models": Preset(
        "GitHub Models (retired)", "https://models.github.ai/inference",
        gone="another provider: GitHub Models was retired on 2026-07-30 and its address answers 410 Gone"),
}

PRESETS: Mapping[str, Preset] = MappingProxyType({name: replace(row, name=name) for name, row in _ROWS.items()})

#: What is assumed of a provider that has no row.
CUSTOM_PRESET = Preset("Custom provider", name="custom")

#: The models.json a newcomer starts with: what can be had without paying, widest free allowance first, own machine last.
DEFAULT_MODELS: Mapping[str, Json] = MappingProxyType({
    name: {"default": PRESETS[name].default, "enableFallback": True, "models": [model.id for model in PRESETS[name].models]}
    for name in ("gemini", "groq", "openrouter", "cerebras", "ollama")})


##############################################################################
# 4. Configuration                                          pure | uses 1-3
##############################################################################
# models.json, the environment and the flags become one Config, or one ConfigError that says where, found, expected.
# Three layers: checkers (`_want_*`: a value and its place -> the value as we keep it, or a complaint), tables of
# fields that name a checker each, and `_make_*`, which join what was checked with presets and variables.
# No complaint repeats what may be a secret.  Guarded by tests/test_config.py: a row per rule.
# One more field: a line in its table.  One more setting: a field of Settings, a line in _SETTINGS, a README line.

@dataclass(frozen=True, slots=True)
class Carousel:
    """How the carousel turns: the reserved entry of models.json."""
    strategy: str = "round-robin"
    affinity: str = "auto"
    fallback: str = "chain"
    max_attempts: int = 6
    max_wait_s: float = 30.0
    tool_stream: str = "held"
    unknown_model: str = "carousel"
    echo_model: bool = False
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)   #: name or glob -> what it stands for, in order


@dataclass(frozen=True, slots=True)
class Settings:
    """Values of this server, not of what is routed where."""
    host: str = "127.0.0.1"
    port: int = 7123
    log_level: str = "info"
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()                    #: further names a Host header may hold
    api_keys: tuple[str, ...] = field(default=(), repr=False)   #: gateway keys that stand in the environment
    tls_cert: str = ""
    tls_key: str = ""
    https_proxy: str = field(default="", repr=False)       #: for https:// providers; may hold a password
    http_proxy: str = field(default="", repr=False)        #: for http:// providers
    no_proxy: tuple[str, ...] = ()
    no_auth: bool = False
    demo: bool = False


@dataclass(frozen=True, slots=True)
class Config:
    """All that was configured, valid as a whole; an edit makes a new one."""
    providers: tuple[Provider, ...]          #: in rotation order
    active: tuple[Provider, ...]             #: those of them that take part
    carousel: Carousel
    settings: Settings
    origins: Mapping[str, str]               #: "groq.default", "groq.keys.1", "settings.port" -> "environment PORT", "default", ...
    warnings: tuple[str, ...]
    looked_for: tuple[str, ...]              #: key variables that were not set
    secrets: frozenset[str] = field(repr=False)
    models_path: str


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name most like `name`, "" when none is."""
    import difflib
    by_lower = {word.lower(): word for word in known}
    close = difflib.get_close_matches(name.lower(), by_lower, 1)
    return by_lower[close[0]] if close else ""


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only be this machine."""
    return re.fullmatch(r"localhost\.?|[\w.-]+\.localhost|127(\.\d{1,3}){3}|\[?::1\]?", host.lower(), re.ASCII) is not None


def find_alias(name: str, aliases: Collection[str]) -> str:
    """The alias that `name` falls under: itself, else the most specific glob, else ""."""
    if name in aliases:
        return name
    globs = [alias for alias in aliases if re.search(r"[*?[]", alias) and fnmatch.fnmatchcase(name, alias)]
    return max(globs, key=lambda glob: len(re.sub(r"[*?\[\]]", "", glob)), default="")


def parse_dotenv(text: str) -> dict[str, str]:
    """Variables of a .env file: NAME=value lines, `export` allowed, # comments, "..." with escapes, '...' as it is; the last of a name wins."""
    values = {}
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text.removeprefix("\ufeff")), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _DOTENV_LINE.fullmatch(line)
        if match is None:
            raise ConfigError(f".env line {number}", "something else", 'NAME=value, with quotes closed on the same line and # comments after a space')
        values[match["name"]] = _dotenv_value(match)
    return values


_DOTENV_LINE = re.compile(r"""\s*(?:export\s+)?(?P<name>[A-Za-z_][A-Za-z0-9_]*)\s*=\s*
    (?:"(?P<double>(?:[^"\\]|\\.)*)"|'(?P<single>[^']*)'|(?P<plain>(?!["'])(?:(?!\s\#).)*?|\#.*?))(?:\s+\#.*|\s*)""", re.VERBOSE)


def _dotenv_value(match: re.Match[str]) -> str:
    """The value of a line, its quotes undone."""
    if match["double"] is not None:
        return re.sub(r"\\(.)", lambda escape: {"n": "\n", "t": "\t", "r": "\r"}.get(escape[1], escape[1]), match["double"])
    plain = match["single"] if match["single"] is not None else match["plain"]
    return "" if match["single"] is None and plain.startswith("#") else plain


# Checkers.

_UNSHOWN = "a string, not shown here"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a value stands: a file, variable or flag, and the path in it."""
    source: str
    path: str = ""

    def at(self, step: str | int) -> _Place:
        """The place of a member."""
        plain = isinstance(step, str) and re.fullmatch(r"[\w-]+", step)
        tail = f".{step}" if plain else f"[{json.dumps(step, ensure_ascii=False)}]"
        return _Place(self.source, (self.path + tail).removeprefix("."))

    def refuse(self, found: str, expected: str) -> ConfigError:
        """The complaint about what stands here.  Under keys, headers and proxy no string is shown: a secret may have slipped a line."""
        where = f"{self.source}: {redact(self.path)}" if self.path else self.source
        hidden = found.startswith("string ") and re.search(r"\.(keys|headers|proxy)\b", self.path)
        return ConfigError(where, _UNSHOWN if hidden else redact(found), expected)


_Want = Callable[[Any, _Place], Any]


def _shown(value: Any) -> str:
    """A value as complaints show it: its kind, and itself where it is short and plain."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (dict, list)):
        return f"an object with {len(value)} fields" if isinstance(value, dict) else f"a list of {len(value)}"
    text = json.dumps(value)
    return f"{'string' if isinstance(value, str) else 'number'} {text if len(text) <= 80 else text[:77] + '...'}"


def _shown_kind(value: Any) -> str:
    """A value that may be a secret, by its kind alone."""
    return _UNSHOWN if isinstance(value, str) else _shown(value)


def _one_of(name: str, known: Iterable[str]) -> str:
    """What a name should have been."""
    known = list(known)
    close = nearest(name, known)
    return (f'did you mean "{close}"? ' if close else "") + "one of: " + ", ".join(known)


def _want_text(value: Any, place: _Place) -> str:
    if isinstance(value, str) and value and value == value.strip() and value.isprintable():
        return value
    raise place.refuse(_shown(value), "a string that is not empty, printable, without spaces around it")


def _want_flag(value: Any, place: _Place) -> bool:
    if isinstance(value, bool):
        return value
    raise place.refuse(_shown(value), "true or false")


def _want_whole(low: int, high: int = 1_000_000_000) -> _Want:
    def check(value: Any, place: _Place) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        raise place.refuse(_shown(value), f"a whole number from {low} to {high}")
    return check


def _want_number(low: float, high: float, unit: str) -> _Want:
    def check(value: Any, place: _Place) -> float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high:
            return float(value)
        raise place.refuse(_shown(value), f"{unit}, a number from {low:g} to {high:g}")
    return check


def _want_word(*words: str) -> _Want:
    def check(value: Any, place: _Place) -> str:
        if isinstance(value, str) and value in words:
            return value
        raise place.refuse(_shown(value), _one_of(str(value), words))
    return check


def _want_list(item: _Want, least: int = 0) -> _Want:
    def check(value: Any, place: _Place) -> tuple[Any, ...]:
        if isinstance(value, list) and len(value) >= least:
            return tuple(item(member, place.at(number)) for number, member in enumerate(value))
        raise place.refuse(_shown_kind(value), f"a list of at least {least}" if least else "a list")
    return check


class _Field(NamedTuple):
    """A field of a JSON object: the name we keep it under, and its checker."""
    name: str
    want: _Want


def _want_object(fields: Mapping[str, _Field], required: Sequence[str] = ()) -> _Want:
    """Checker of an object with these fields; gives a dict of those present, under the names we keep them by."""
    def check(value: Any, place: _Place) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise place.refuse(_shown_kind(value), "an object")
        for name in value:
            if name not in fields:
                raise place.at(name).refuse("an unknown field", _one_of(name, fields))
        for name in required:
            if name not in value:
                raise place.at(name).refuse("nothing", f'the field "{name}", which is required')
        return {fields[name].name: fields[name].want(member, place.at(name)) for name, member in value.items()}
    return check


def _want_record(make: Callable[..., Any], fields: Mapping[str, _Field], required: Sequence[str] = ()) -> _Want:
    """Checker of an object that becomes a record."""
    check = _want_object(fields, required)
    return lambda value, place: make(**check(value, place))


def _want_model(value: Any, place: _Place) -> dict[str, Any]:
    """A model as a string or an object; gives the fields that were set."""
    return {"id": _want_text(value, place)} if not isinstance(value, dict) else _want_object(_MODEL_FIELDS, ("id",))(value, place)


def _want_key(value: Any, place: _Place) -> dict[str, Any]:
    """A credential as env:NAME or an object; `variable` is the NAME."""
    return {"variable": _want_reference(value, place)} if not isinstance(value, dict) else _want_object(_KEY_FIELDS, ("key",))(value, place)


def _want_reference(value: Any, place: _Place) -> str:
    """The NAME of env:NAME.  A key typed here is refused unseen: this file is shown, shared and committed."""
    match = re.fullmatch(r"env:([A-Za-z_][A-Za-z0-9_]*)", value) if isinstance(value, str) else None
    if match:
        return match[1]
    name = variable_name(place.path.split(".keys", 1)[0], "API_KEY")
    raise place.refuse(_shown_kind(value), f'"env:NAME"; keys do not belong in this file: put {name}=<the key> in .env and write "env:{name}" here')


def _want_url(value: Any, place: _Place) -> str:
    """An http or https base URL, its last slash cut."""
    if _split_url(value).scheme not in ("http", "https"):
        shown = _shown_kind if re.search("[@?]", str(value)) else _shown
        raise place.refuse(shown(value), "an address like https://host/v1, without user name, query or fragment")
    return value.rstrip("/")


def _want_proxy(value: Any, place: _Place) -> str:
    """An http:// proxy, or "" for none.  It may hold a password, so it is never shown."""
    if value == "":
        return ""
    text = value if not isinstance(value, str) or "://" in value else f"http://{value}"
    url = _split_url(text, user=True)
    if url.scheme != "http" or url.path.strip("/"):
        raise place.refuse(_shown_kind(value), 'a proxy like http://host:3128, or "" for none; other kinds of proxy are not supported')
    return text.rstrip("/")


class _Url(NamedTuple):
    """The parts of a plain URL; all empty for anything else."""
    scheme: str = ""
    host: str = ""
    path: str = ""
    port: int | None = None
    password: str = ""


def _split_url(text: Any, *, user: bool = False) -> _Url:
    """A URL without query and fragment, in its parts; `user`: whether user:password@ may stand in it."""
    from urllib.parse import unquote, urlsplit
    if not isinstance(text, str) or re.search(r"[^!-~]|[?#\\]", text):
        return _Url()
    try:
        parts = urlsplit(text)
        url = _Url(parts.scheme, parts.hostname or "", parts.path, parts.port, unquote(parts.password or ""))
    except ValueError:
        return _Url()
    return url if url.host and (user or "@" not in parts.netloc) else _Url()


#: Headers that are the transport's own, or that a credential carries.
_OWN_HEADERS = frozenset("authorization connection content-encoding content-length expect host keep-alive proxy-authorization "
                         "te trailer transfer-encoding upgrade".split())


def _want_headers(value: Any, place: _Place) -> tuple[tuple[str, str], ...]:
    """Extra request headers.  Values may be secrets and are never shown."""
    if not isinstance(value, dict):
        raise place.refuse(_shown_kind(value), "an object of header names and values")
    seen: set[str] = set()
    for name, text in value.items():
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or name.lower() in seen:
            raise place.at(name).refuse("a name that is no header name, or twice there", "a header name of letters, digits and -, once")
        if name.lower() in _OWN_HEADERS:
            raise place.at(name).refuse("a header the gateway sets itself", 'another header; for a key use "keys"')
        if not isinstance(text, str) or not re.fullmatch(r"(?:[!-~](?:[ -~]*[!-~])?)?", text):
            raise place.at(name).refuse(_shown_kind(text), "one line of printable ASCII")
        seen.add(name.lower())
    return tuple(value.items())


def _want_edits(value: Any, place: _Place) -> dict[str, Any]:
    """Request fields a rule sets."""
    if not isinstance(value, dict):
        raise place.refuse(_shown(value), "an object of request fields and values")
    for name in value:
        _want_editable(name, place.at(name))
    return value


def _want_editable(value: Any, place: _Place) -> str:
    if value in ("model", "messages", "stream"):
        raise place.refuse(_shown(value), "a request field other than model, messages and stream")
    return _want_text(value, place)


def _want_aliases(value: Any, place: _Place) -> dict[str, tuple[str, ...]]:
    """Names and what they stand for; a list is tried in order."""
    if not isinstance(value, dict):
        raise place.refuse(_shown(value), "an object of names and what they stand for")
    targets = _want_list(_want_text, 1)
    aliases = {_want_text(name, place.at(name)): targets(text if isinstance(text, list) else [text], place.at(name)) for name, text in value.items()}
    for name in aliases:
        if name in _ALL_MODELS:
            raise place.at(name).refuse("a name that already stands for the whole carousel", "another name")
    ended: set[str] = set()
    for name in aliases:
        _refuse_cycle([name], aliases, ended, place)
    return aliases


_ALL_MODELS = ("aicarousel", "auto")


def _refuse_cycle(trail: list[str], aliases: Mapping[str, tuple[str, ...]], ended: set[str], place: _Place) -> None:
    """Follows an alias to its ends, past those known to end.

    A glob that matches its own target is no cycle: "claude-*" may stand for claude-haiku-5-5, and that is then a model.
    """
    for target in aliases[trail[-1]]:
        alias = "" if target in _ALL_MODELS else find_alias(target, aliases)
        if alias == trail[-1] != target or not alias or alias in ended:
            continue
        if alias in trail or len(trail) > 20:
            raise place.at(trail[0]).refuse("a circle, or a chain too long: " + " -> ".join([*trail, target]), "an alias that ends at a provider or a model")
        _refuse_cycle([*trail, alias], aliases, ended, place)
    ended.add(trail[-1])


# Fields.

_COUNT = _want_whole(1)
_DOLLARS = _want_number(0, 100_000, "USD per million tokens")
_SECONDS = _want_number(0.001, 86_400, "seconds")

_PRICE_FIELDS = {"input": _Field("input", _DOLLARS), "output": _Field("output", _DOLLARS), "cacheRead": _Field("cache_read", _DOLLARS)}
_LIMITS = _want_record(Limits, {name: _Field(name, _COUNT) for name in ("rpm", "rpd", "tpm", "tpd")})

_MODEL_FIELDS = {
    "id": _Field("id", _want_text),
    "alias": _Field("alias", _want_text),
    "context": _Field("context", _COUNT),
    "maxOutput": _Field("max_output", _COUNT),
    "vision": _Field("vision", _want_flag),
    "tools": _Field("tools", _want_flag),
    "reasoning": _Field("reasoning", _want_flag),
    "price": _Field("price", _want_record(Price, _PRICE_FIELDS)),
    "limits": _Field("limits", _LIMITS),
}

_KEY_FIELDS = {
    "key": _Field("variable", _want_reference),
    "label": _Field("label", _want_text),
    "proxy": _Field("proxy", _want_proxy),
    "headers": _Field("headers", _want_headers),
    "models": _Field("models", _want_list(_want_text, 1)),
    "excludedModels": _Field("excluded_models", _want_list(_want_text)),
    "prefix": _Field("prefix", _want_text),
    "disabled": _Field("disabled", _want_flag),
}

_TIMEOUT_FIELDS = {
    "connect": _Field("connect_s", _SECONDS),
    "firstByte": _Field("first_byte_s", _SECONDS),
    "idle": _Field("idle_s", _SECONDS),
    "total": _Field("total_s", _SECONDS),
    "streamTotal": _Field("stream_total_s", _SECONDS),
}

_RULE_FIELDS = {
    "models": _Field("models", _want_text),
    "default": _Field("default", _want_edits),
    "override": _Field("override", _want_edits),
    "drop": _Field("drop", _want_list(_want_editable)),
}

_PROVIDER_FIELDS = {
    "baseUrl": _Field("base_url", _want_url),
    "allowHttp": _Field("allow_http", _want_flag),
    "preset": _Field("preset", _want_text),
    "format": _Field("format", _want_word(*FORMAT_NAMES)),
    "enabled": _Field("enabled", _want_flag),
    "default": _Field("default", _want_text),
    "enableFallback": _Field("enable_fallback", _want_flag),
    "models": _Field("models", _want_list(_want_model, 1)),
    "keys": _Field("keys", _want_list(_want_key)),
    "headers": _Field("headers", _want_headers),
    "proxy": _Field("proxy", _want_proxy),
    "timeouts": _Field("timeouts", _want_object(_TIMEOUT_FIELDS)),
    "limits": _Field("limits", _LIMITS),
    "maxConcurrent": _Field("max_concurrent", _want_whole(1, 10_000)),
    "rules": _Field("rules", _want_list(_want_record(lambda models="*", default=None, override=None, drop=(): PayloadRule(
        models, default or {}, override or {}, drop), _RULE_FIELDS))),
}

_CAROUSEL_FIELDS = {
    "strategy": _Field("strategy", _want_word("round-robin", "fill-first", "priority", "fastest", "cheapest", "most-quota")),
    "affinity": _Field("affinity", _want_word("auto", "on", "off")),
    "fallback": _Field("fallback", _want_word("chain", "same-model", "none")),
    "maxAttempts": _Field("max_attempts", _want_whole(1, 50)),
    "maxWait": _Field("max_wait_s", _want_number(0, 3600, "seconds")),
    "toolStream": _Field("tool_stream", _want_word("held", "live")),
    "unknownModel": _Field("unknown_model", _want_word("carousel", "reject")),
    "echoModel": _Field("echo_model", _want_flag),
    "aliases": _Field("aliases", _want_aliases),
}


# The file.

def _parse_models(text: str, source: str) -> dict[str, Any]:
    """The object in models.json; names that stand twice in one object are refused, as one of them would be lost."""
    place = _Place(source)
    try:
        tree = json.loads(text.removeprefix("\ufeff"), object_pairs_hook=tuple, parse_float=_want_finite, parse_constant=_want_finite)
        plain = _untangle(tree, place)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source}: line {error.lineno} column {error.colno}", f"invalid JSON ({error.msg})",
                          "JSON, without comments and without a comma after the last member") from error
    except (ValueError, RecursionError) as error:
        raise place.refuse("NaN, or a number or a nesting beyond all measure", "ordinary JSON") from error
    if not isinstance(plain, dict):
        raise place.refuse(_shown(plain), "an object with a provider per field")
    if not plain:
        raise place.refuse("an empty object", "at least one provider")
    return plain


def _want_finite(text: str) -> float:
    """A number of the file; NaN and what is too large for a float are no JSON a provider could read."""
    if abs(float(text)) < float("inf"):
        return float(text)
    raise ValueError(text)


def _untangle(value: Any, place: _Place) -> Any:
    """JSON with its objects, so far tuples of pairs, as dicts."""
    if isinstance(value, list):
        return [_untangle(member, place.at(number)) for number, member in enumerate(value)]
    if not isinstance(value, tuple):
        return value
    plain: dict[str, Any] = {}
    for name, member in value:
        if name in plain:
            raise place.at(name).refuse("the same name twice", "each name once")
        plain[name] = _untangle(member, place.at(name))
    return plain


def _want_provider_name(name: str, place: _Place) -> str:
    if name.lower() in ("carousel", *_ALL_MODELS):
        raise place.refuse("a reserved name", 'another name for a provider; the settings of the carousel stand under "carousel"')
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise place.refuse("a name that cannot be a provider's", "letters, digits, - _ and .")
    return name


def _preset_of(name: str, entry: Mapping[str, Any], place: _Place) -> Preset:
    """The preset an entry names, else that of its own name, else the one for custom providers."""
    wanted = entry.get("preset", name)
    if wanted not in PRESETS:
        if "preset" in entry:
            raise place.at("preset").refuse(_shown(wanted), _one_of(wanted, PRESETS))
        return CUSTOM_PRESET
    if PRESETS[wanted].gone:
        raise place.refuse(PRESETS[wanted].title, PRESETS[wanted].gone)
    return PRESETS[wanted]


# Variables.

@dataclass(slots=True)
class _Load:
    """One load_config under way: where it may look, and what it notes besides the values."""
    environment: Mapping[str, str]
    dotenv: Mapping[str, str]
    origins: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    looked_for: list[str] = field(default_factory=list)
    secrets: set[str] = field(default_factory=set)

    def look(self, variable: str) -> tuple[str, str]:
        """(value, origin) of a variable, two empty strings when it is unset or blank.  One that is blank in the environment hides that of .env."""
        for source, values in (("environment", self.environment), (".env", self.dotenv)):
            if variable in values:
                value = values[variable].strip()
                return (value, f"{source} {variable}") if value else ("", "")
        return "", ""

    def note(self, name: str, fields: Iterable[str], given: Collection[str], source: str) -> None:
        """Notes where each field of an entry came from."""
        for json_name in fields:
            self.origins[f"{name}.{json_name}"] = f"{source} {name}.{json_name}" if json_name in given else "default"


def variable_name(name: str, ending: str) -> str:
    """The variable of a provider: my-vllm, BASE_URL -> MY_VLLM_BASE_URL."""
    return re.sub(r"[^A-Z0-9]+", "_", name.upper()).strip("_") + "_" + ending


def _split_list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _want_secret(text: str, place: _Place) -> str:
    """A key as it can be sent in a header."""
    if re.fullmatch(r"[!-~]+", text):
        return text
    raise place.refuse("a value with spaces, control or non-ASCII characters inside", "the key alone, as its provider shows it")


def _numbered(variables: Iterable[str]) -> list[str]:
    """NAME, NAME_1 .. NAME_50 of each variable; gaps are allowed, 50 is where looking ends."""
    return [name for variable in variables for name in (variable, *(f"{variable}_{number}" for number in range(1, 51)))]


# Providers.

def _make_provider(load: _Load, name: str, entry: Mapping[str, Any], place: _Place, own_port: int) -> Provider:
    """A provider from its checked entry, its preset and its variables."""
    preset = _preset_of(name, entry, place)
    wire = entry.get("format", preset.format)
    base_url = _choose_base_url(load, name, entry, preset, wire, place, own_port)
    models, default = _choose_models(load, name, entry, preset, place)
    base_url, unset = _fill_url(load, base_url, preset)
    credentials, keys_out = _choose_credentials(load, name, entry, preset, base_url)
    enabled, switch = _choose_enabled(load, name, entry)
    out = (switch if not enabled else f"no model: name one in models.json or in {variable_name(name, 'MODEL')}" if not default
           else f"no account: {unset} is not set" if unset
           else keys_out or ("" if wire == "chat" else f"it speaks the format {wire}, which comes with the next version"))
    timeouts = replace(Timeouts(first_byte_s=preset.first_byte_s, idle_s=preset.idle_s), **entry.get("timeouts", {}))
    return Provider(name, preset, base_url, wire, default, entry["enable_fallback"], models, credentials, enabled, entry.get("headers", ()),
                    entry.get("proxy"), timeouts, entry.get("limits"), entry.get("max_concurrent"), entry.get("rules", ()), out)


def _choose_base_url(load: _Load, name: str, entry: Mapping[str, Any], preset: Preset, wire: str, place: _Place, own_port: int) -> str:
    """Variable, else entry, else preset; https unless the host is this machine or the entry allows it."""
    known = preset.base_url if wire == preset.format else preset.other_urls.get(wire, "")
    url, where = _overriding_url(load, name, own_port)
    if not url and "base_url" in entry:
        url, where = entry["base_url"], place.at("baseUrl")
    if not url and not known:
        raise _lacking_url(name, preset, wire, place)
    url = _mend_url(url, known, wire) if url else known
    if _split_url(url).scheme != "https" and not is_loopback(_split_url(url).host) and not entry.get("allow_http"):
        raise where.refuse(_shown(url), 'https://, as keys would travel in the clear; in a network you trust set "allowHttp": true')
    return url


def _overriding_url(load: _Load, name: str, own_port: int) -> tuple[str, _Place]:
    """The URL in <NAME>_BASE_URL.  One that leads back to this gateway is meant for its clients, and left out."""
    variable = variable_name(name, "BASE_URL")
    value, origin = load.look(variable)
    where = _Place(origin)
    url = _want_url(value, where) if value else ""
    if is_loopback(_split_url(url).host) and _split_url(url).port == own_port:
        load.warnings.append(f"{origin} leads to this gateway itself and is not used for {name}")
        return "", where
    if url:
        load.origins[f"{name}.baseUrl"] = origin
    return url, where


def _lacking_url(name: str, preset: Preset, wire: str, place: _Place) -> ConfigError:
    """The complaint that no base URL is known."""
    if preset is not CUSTOM_PRESET:
        spoken = ", ".join((preset.format, *preset.other_urls))
        return place.at("format").refuse(f'"{wire}", which {preset.title} is not known to speak', f"one of: {spoken}; or a baseUrl that speaks it")
    close = nearest(name, PRESETS)
    hint = f'; or did you mean the provider "{close}"?' if close else ""
    return place.at("baseUrl").refuse("nothing", f'"baseUrl", as "{name}" is not a built-in provider{hint}')


def _mend_url(url: str, known: str, wire: str) -> str:
    """Adds the /v1 people leave out: where the preset has it and the URL has no path, and where clients of Messages never write it."""
    path = _split_url(url).path
    lacks = not path.strip("/") or (wire == "messages" and not re.search(r"/v\d+\w*$", path))
    return f"{url}/v1" if known.endswith("/v1") and lacks else url


def _fill_url(load: _Load, url: str, preset: Preset) -> tuple[str, str]:
    """(URL with its {NAME} filled in, the first variable that was not set)."""
    unset = ""
    for variable in preset.needs:
        value, origin = load.look(variable)
        if value and not re.fullmatch(r"[\w.-]+", value, re.ASCII):
            raise _Place(origin).refuse("a value with characters no account id has", "letters, digits, - _ and .")
        if not value and "{" + variable + "}" in url:
            load.looked_for.append(variable)
            unset = unset or variable
        url = url.replace("{" + variable + "}", value) if value else url
    return url, unset


def _choose_models(load: _Load, name: str, entry: Mapping[str, Any], preset: Preset, place: _Place) -> tuple[tuple[Model, ...], str]:
    """(models, default); a listed model takes what the preset knows of it, an object says the rest.

    The preset's limits are those of free plans and are not taken over: a paid key would be throttled by them.
    """
    known = {model.id: replace(model, limits=None) for model in preset.models}
    models = [replace(known.get(row["id"], Model(row["id"])), **row) for row in entry["models"]]
    default = entry["default"]
    _refuse_twice(models, place)
    if models and default not in [model.id for model in models]:
        raise place.at("default").refuse(_shown(default), 'a model of "models"; ' + _one_of(default, [model.id for model in models]))
    value, origin = load.look(variable_name(name, "MODEL"))
    if value:
        default, load.origins[f"{name}.default"] = _want_text(value, _Place(origin)), origin
        if default not in [model.id for model in models]:
            models.insert(0, known.get(default, Model(default)))
    _warn_retired(load, name, models, preset, place)
    return tuple(models), default


def _refuse_twice(models: Sequence[Model], place: _Place) -> None:
    """Two models of one provider cannot go by the same id or alias."""
    seen: set[str] = set()
    for number, model in enumerate(models):
        for step, word in (("id", model.id), ("alias", model.alias)):
            if word is not None and word in seen:
                raise place.at("models").at(number).refuse(f'the {step} "{word}", which stands there already', "each model once")
            seen |= {word} if word else set()


def _warn_retired(load: _Load, name: str, models: Sequence[Model], preset: Preset, place: _Place) -> None:
    """Notes the models the provider has withdrawn, each with what may replace it."""
    for model in models:
        glob = find_alias(model.id, preset.retired)
        if glob:
            other = nearest(model.id, [known.id for known in preset.models]) or preset.default
            load.warnings.append(f"{place.source}: {name}: model {model.id} is withdrawn ({preset.retired[glob]}); try {other}")


def _choose_enabled(load: _Load, name: str, entry: Mapping[str, Any]) -> tuple[bool, str]:
    """(enabled, what switched it off); <NAME>_ENABLED stands above the file."""
    variable = variable_name(name, "ENABLED")
    value, origin = load.look(variable)
    if not value:
        return entry.get("enabled", True), "switched off in models.json"
    if value.lower() not in _SWITCH:
        raise _Place(origin).refuse(_shown(value), "true or false")
    load.origins[f"{name}.enabled"] = origin
    return _SWITCH[value.lower()], f"switched off by {variable}"


_SWITCH: Mapping[str, bool] = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


class _Found(NamedTuple):
    """A key that is set, with what its entry says of it."""
    secret: str
    variable: str
    origin: str
    options: Mapping[str, Any] = MappingProxyType({})


def _choose_credentials(load: _Load, name: str, entry: Mapping[str, Any], preset: Preset, base_url: str) -> tuple[tuple[Credential, ...], str]:
    """(credentials, why there is none).  An empty list of keys says that none is needed."""
    found, lacking = _listed_keys(load, name, entry["keys"]) if "keys" in entry else _usual_keys(load, name, preset, base_url)
    first: dict[str, _Found] = {}
    for key in found:
        first.setdefault(key.secret, key)
    if first:
        load.origins.update({f"{name}.keys.{number}": key.origin for number, key in enumerate(first.values(), 1)})
        return tuple(Credential(f"{name}/{number}", key.secret, source=f"env:{key.variable}", **key.options)
                     for number, key in enumerate(first.values(), 1)), ""
    needs_none = not entry["keys"] if "keys" in entry else preset.keyless or is_loopback(_split_url(base_url).host)
    if needs_none:
        return (Credential(f"{name}/1"),), ""
    load.looked_for += lacking
    return (), f"no key: {' or '.join(lacking)} is not set" if lacking else "no key: every key is disabled"


def _keys_in(load: _Load, variables: Iterable[str], options: Mapping[str, Any]) -> list[_Found]:
    """The keys in these variables; one variable may hold several, parted by commas."""
    found = []
    for variable in variables:
        value, origin = load.look(variable)
        found += [_Found(_want_secret(part, _Place(origin)), variable, origin, options) for part in _split_list(value)]
    load.secrets |= {key.secret for key in found}
    return found


def _listed_keys(load: _Load, name: str, keys: Sequence[Mapping[str, Any]]) -> tuple[list[_Found], list[str]]:
    """Keys an entry lists that are set and not disabled, and the variables that are not set."""
    found, lacking = [], []
    for key in keys:
        options = {option: value for option, value in key.items() if option not in ("variable", "disabled")}
        here = _keys_in(load, [key["variable"]], options)
        if not here:
            lacking.append(redact(key["variable"]))
            load.warnings.append(f"{name}: {redact(key['variable'])} is not set; that key is left out")
        found += here if not key.get("disabled") else []
    return found, lacking


def _usual_keys(load: _Load, name: str, preset: Preset, base_url: str) -> tuple[list[_Found], list[str]]:
    """Keys in the preset's variables; an entry of another name has its own variable first, and never sends the preset's keys to a foreign host."""
    families = [preset.key_variables]
    if PRESETS.get(name) is not preset:
        families = [(variable_name(name, "API_KEY"),), *(families if _split_url(base_url).host == _split_url(preset.base_url).host else ())]
    for variables in families:
        found = _keys_in(load, _numbered(variables), {})
        if found:
            return found, []
    return [], [variable for variables in families for variable in variables]


# Settings.

class _Setting(NamedTuple):
    """One setting: its name in Settings and among the flags ("": no flag), its variables (first set wins), the checker of its text."""
    name: str
    flag: str
    variables: tuple[str, ...]
    want: _Want


def _want_port(value: Any, place: _Place) -> int:
    if re.fullmatch(r"[0-9]{1,5}", str(value)) and int(value) <= 65535:
        return int(value)
    raise place.refuse(_shown(value), "a port number from 0 to 65535")


def _want_host(value: Any, place: _Place) -> str:
    if re.fullmatch(r"[\w.:%-]+|\[[\w.:%-]+\]", str(value), re.ASCII):
        return str(value).strip("[]")
    raise place.refuse(_shown(value), "a host name or an address, without scheme and port")


def _want_parts(item: _Want) -> _Want:
    """Checker of a comma list, or of a list a flag gathered."""
    def check(value: Any, place: _Place) -> tuple[Any, ...]:
        return tuple(item(part, place) for part in _split_list(value if isinstance(value, str) else ",".join(value)))
    return check


def _want_origin(value: Any, place: _Place) -> str:
    if re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[\w.\[\]:-]+", value, re.ASCII):
        return value
    raise place.refuse(_shown(value), "an origin like https://app.example:8443, without a path, or *")


def _want_allowed_host(value: Any, place: _Place) -> str:
    if re.fullmatch(r"[\w.\[\]:-]+", value, re.ASCII):
        return value.lower()
    raise place.refuse(_shown(value), "host names parted by commas")


def _want_gateway_key(value: Any, place: _Place) -> str:
    """A gateway key that is not trivial to guess."""
    if value == "test-key" or len(value) < 16:
        found = "the key test-key" if value == "test-key" else f"a key of {len(value)} characters"
        raise place.refuse(found, "keys that cannot be guessed: 16 characters or more")
    return _want_secret(value, place)


_SETTINGS = (
    _Setting("host", "host", ("AICAROUSEL_HOST",), _want_host),
    _Setting("port", "port", ("PORT",), _want_port),
    _Setting("log_level", "log_level", ("AICAROUSEL_LOG_LEVEL",), _want_word("debug", "info", "warning", "error")),
    _Setting("cors_origins", "cors_origin", ("AICAROUSEL_CORS_ORIGIN",), _want_parts(_want_origin)),
    _Setting("allowed_hosts", "", ("AICAROUSEL_ALLOWED_HOSTS",), _want_parts(_want_allowed_host)),
    _Setting("api_keys", "", ("API_KEYS",), _want_parts(_want_gateway_key)),
    _Setting("tls_cert", "tls_cert", ("AICAROUSEL_TLS_CERT",), _want_text),
    _Setting("tls_key", "tls_key", ("AICAROUSEL_TLS_KEY",), _want_text),
    _Setting("https_proxy", "", ("https_proxy", "HTTPS_PROXY"), _want_proxy),
    _Setting("http_proxy", "", ("http_proxy", "HTTP_PROXY"), _want_proxy),
    _Setting("no_proxy", "", ("no_proxy", "NO_PROXY"), _want_parts(_want_text)),
    _Setting("no_auth", "no_auth", (), _want_flag),
    _Setting("demo", "demo", (), _want_flag),
)


def _make_settings(load: _Load, flags: Mapping[str, Any]) -> Settings:
    """Settings by flag, else environment, else .env, else default."""
    values = {}
    for row in _SETTINGS:
        value, origin = flags.get(row.flag), f"flag --{row.flag.replace('_', '-')}"
        if value is None or value is False or value == []:
            value, origin = next(filter(all, map(load.look, row.variables)), (None, "default"))
        if value is not None:
            values[row.name] = row.want(value, _Place(origin))
        load.origins[f"settings.{row.name}"] = origin
    settings = Settings(**values)
    if bool(settings.tls_cert) != bool(settings.tls_key):
        there, lacking = ("tls_cert", "tls_key") if settings.tls_cert else ("tls_key", "tls_cert")
        raise _Place(load.origins[f"settings.{there}"]).refuse(f"{there} without {lacking}", "both, or neither")
    load.secrets |= set(settings.api_keys)
    return settings


# The whole.

def load_config(models_text: str | None, *, models_path: str, environment: Mapping[str, str], dotenv: Mapping[str, str],
                flags: Mapping[str, Any]) -> Config:
    """The configuration that these say together.

    models_text: contents of models.json, None when there is none.    models_path: its name for complaints.
    flags: options of the command line by name (host, port, log_level, cors_origin, no_auth, demo, demo_url, tls_cert, tls_key), None where not given.
    raises: ConfigError.
    """
    load = _Load(environment, dotenv)
    settings = _make_settings(load, flags)
    place = _Place(models_path)
    tree = _parse_models(models_text, models_path) if models_text is not None else {}
    carousel = _make_carousel(load, tree.pop("carousel", {}), place.at("carousel"))
    priority, origin = load.look("PROVIDERS_PRIORITY")
    entries = _checked_entries(load, tree, place) if tree else _preset_entries(load, _split_list(priority))
    providers = [_make_provider(load, name, entries[name], place.at(name) if tree else _Place("built-in provider", name), settings.port)
                 for name in _ordered(load, entries, _split_list(priority), _Place(origin))]
    if settings.demo:
        providers = _with_demo(providers, str(flags.get("demo_url") or ""))
    _gather_secrets(load, providers, settings)
    return Config(tuple(providers), tuple(provider for provider in providers if not provider.why_out), carousel, settings, load.origins,
                  tuple(load.warnings), tuple(dict.fromkeys(load.looked_for)), frozenset(load.secrets), models_path)


def _make_carousel(load: _Load, value: Any, place: _Place) -> Carousel:
    """The carousel from its entry."""
    carousel = Carousel(**_want_object(_CAROUSEL_FIELDS)(value, place))
    load.note("carousel", _CAROUSEL_FIELDS, value, "models.json")
    return carousel


def _checked_entries(load: _Load, tree: Mapping[str, Any], place: _Place) -> dict[str, dict[str, Any]]:
    """The providers' entries of models.json, each field checked."""
    want = _want_object(_PROVIDER_FIELDS, ("default", "enableFallback", "models"))
    entries = {}
    for name, value in tree.items():
        entries[name] = want(value, place.at(_want_provider_name(name, place.at(name))))
        load.note(name, _PROVIDER_FIELDS, value, "models.json")
    return entries


def _preset_entries(load: _Load, priority: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Without a file: the presets a variable speaks of, each with its own models."""
    entries = {}
    for name, preset in PRESETS.items():
        spoken_of = preset.key_variables if not preset.keyless else ()
        spoken_of += tuple(variable_name(name, ending) for ending in (("BASE_URL", "MODEL", "ENABLED") if preset.keyless else ()))
        named = any(load.look(variable)[0] for variable in _numbered(spoken_of))
        if not preset.gone and (named or name in priority):
            entries[name] = {"default": preset.default, "enable_fallback": True, "models": tuple({"id": model.id} for model in preset.models)}
            load.note(name, _PROVIDER_FIELDS, (), "")
        elif not preset.gone and not preset.keyless:
            load.looked_for += preset.key_variables
    return entries


def _ordered(load: _Load, entries: Collection[str], priority: Sequence[str], place: _Place) -> list[str]:
    """Names of the entries, those of PROVIDERS_PRIORITY first."""
    for name in priority:
        if name not in entries and (name not in PRESETS or PRESETS[name].gone):
            raise place.refuse(_shown(name), _one_of(name, entries or [known for known, preset in PRESETS.items() if not preset.gone]))
        if name not in entries:
            load.warnings.append(f"{place.source} names {name}, which is not in models.json")
    return list(dict.fromkeys([*(name for name in priority if name in entries), *entries]))


def _with_demo(providers: Sequence[Provider], url: str) -> list[Provider]:
    """The providers and the built-in one that answers offline: last, or first when nothing else answers."""
    if any(provider.name == "demo" for provider in providers):
        raise _Place("flag --demo").refuse('a provider named "demo" in models.json', "another name for it, or no --demo")
    demo = Provider("demo", CUSTOM_PRESET, url.rstrip("/"), "chat", "demo", True, (Model("demo"),), (Credential("demo/1"),), proxy="")
    return [*providers, demo] if any(not provider.why_out for provider in providers) else [demo, *providers]


def _gather_secrets(load: _Load, providers: Sequence[Provider], settings: Settings) -> None:
    """Adds what else is secret: passwords of proxies, and values of headers whose name says so."""
    proxies = [settings.https_proxy, settings.http_proxy]
    headers: list[tuple[str, str]] = []
    holders: list[Provider | Credential] = [*providers, *(credential for provider in providers for credential in provider.credentials)]
    for holder in holders:
        proxies.append(holder.proxy or "")
        headers += holder.headers
    load.secrets |= {_split_url(proxy, user=True).password for proxy in proxies}
    load.secrets |= {value for name, value in headers if re.search("key|token|secret|auth|cookie|password", name, re.IGNORECASE)}
    load.secrets.discard("")


##############################################################################
# 5. Failures                                               pure | uses 1-3
##############################################################################
# What came back from a provider, made into an UpstreamFailure: which kind, which finer reason, what cools, for how long.
# A failure is judged once, from top to bottom: rows of _SIGNS (words and codes of one provider, or too plain to mistake),
# overflow words, money words, day words, capacity words, and the status last.  Only evidence names a time: read_reset.
# One more provider's quirk: a row in _SIGNS and one in tests/test_failures.py.  One more reason: a line in REASONS.
# Source: the providers' own error pages and captured bodies; RFC 9110 for Retry-After.

@dataclass(frozen=True, slots=True)
class Rule:
    """What follows from a kind."""
    goes_on: bool          #: is the next route tried?
    scope: str             #: which of Route.keys cools where the reason does not say, "" for none
    first_cool_s: float    #: the first guess when the provider named no time; doubles with each failure in a row
    cap_s: float           #: where doubling ends
    again: bool            #: once more on the same route when nothing else is left?


#: Guesses end at ten minutes, but for credentials and money: those change by somebody's hand only, so one look an hour is enough.
FAILURE_RULES: Mapping[Kind, Rule] = MappingProxyType({
    "request":    Rule(False, "",           0.0,    0.0,    False),
    "parameter":  Rule(False, "",           0.0,    0.0,    False),
    "fit":        Rule(True,  "",           0.0,    0.0,    False),
    "model":      Rule(True,  "model",      60.0,   600.0,  False),
    "credential": Rule(True,  "credential", 3600.0, 3600.0, False),
    "payment":    Rule(True,  "credential", 3600.0, 3600.0, False),
    "rate":       Rule(True,  "route",      1.0,    600.0,  False),
    "server":     Rule(True,  "route",      5.0,    600.0,  True),
    "network":    Rule(True,  "provider",   5.0,    600.0,  False),
})


@dataclass(frozen=True, slots=True)
class Reason:
    """A finer word than the kind, shown to users."""
    kind: Kind
    scope: str                           #: a scope, "" for none, or "bucket": whatever the provider's limits are counted by
    first_cool_s: float | None = None    #: the first guess where the kind's does not suit; becomes UpstreamFailure.cool_s, not proven


REASONS: Mapping[str, Reason] = MappingProxyType({
    "auth_invalid":           Reason("credential", "credential"),
    "auth_refreshable":       Reason("credential", "credential", 60.0),   # a new token ends it sooner
    "billing":                Reason("payment",    "credential"),
    "permission_model":       Reason("model",      "route", 600.0),
    "region_blocked":         Reason("credential", "provider"),
    "provider_gone":          Reason("model",      "provider", 600.0),
    "rate_minute":            Reason("rate",       "bucket"),
    "rate_day":               Reason("rate",       "bucket", 600.0),
    "tier_capacity":          Reason("rate",       "bucket"),             # 498: this service tier is full, others are not
    "request_over_tpm":       Reason("fit",        ""),
    "model_capacity":         Reason("server",     "route"),
    "model_gone":             Reason("model",      "model"),
    "endpoint_unsupported":   Reason("model",      "model", 600.0),
    "capability_missing":     Reason("fit",        ""),
    "bad_param":              Reason("parameter",  ""),
    "bad_request":            Reason("request",    ""),
    "context_overflow":       Reason("fit",        ""),
    "payload_too_large":      Reason("fit",        ""),
    "content_policy":         Reason("request",    ""),
    "tool_generation_failed": Reason("server",     ""),                   # chance, not health: nothing cools
    "server_error":           Reason("server",     "route"),
    "client_cancelled":       Reason("server",     ""),                   # 499 from a proxy on the way
    "empty_answer":           Reason("server",     "route"),
    "not_json":               Reason("server",     "route"),
    "bad_stream":             Reason("server",     "route"),
    "cut":                    Reason("server",     "route"),
    "too_big":                Reason("server",     "route"),
    "timeout":                Reason("network",    "provider"),
    "refused":                Reason("network",    "provider"),
    "dns":                    Reason("network",    "provider"),
    "tls":                    Reason("network",    "provider"),
    "reset":                  Reason("network",    "provider"),
    "proxy":                  Reason("network",    "provider"),
    "protocol":               Reason("network",    "provider"),
})


# What a body says ----------------------------------------------------------------------------------------------------

_BODY_MAX_BYTES = 65536
_WORDS_MAX = 16384                 # characters the word tests look at: errors say what they mean early
_MESSAGE_MAX = 2000
_PLAIN_MAX = 200                   # of HTML and plain text: pages of proxies, not messages
_WRAPPERS = ("error", "errors", "detail", "message", "base_resp", "response")
_MESSAGE_KEYS = ("message", "msg", "detail", "error", "status_msg", "title", "error_description")
#: Fields that repeat what the client or the model wrote: their words must not decide anything.
_ECHOES = frozenset({"flagged_input", "failed_generation", "input", "links", "user_id"})
_HTML = re.compile(r"\s*<(?:!doctype|html|head|body|center|title|h1|\?xml|!--)", re.I)
_SCRIPTS = re.compile(r"<(script|style)\b.*?</\1\s*>", re.I | re.S)
_TAG = re.compile(r"<[^<>]*>")
_SSE_DATA = re.compile(r"^data:[ ]?([\[{].*)$", re.M)


@dataclass(frozen=True, slots=True)
class _Facts:
    """A body as far as it can be understood."""
    message: str = ""
    code: str | None = None
    param: str | None = None
    words: str = ""                #: a line `key=value` for every word in the body, for the tests; plain text as it is
    data: Any = None               #: parsed JSON, None where there is none
    html: bool = False


def error_text(body: bytes) -> tuple[str, str | None, str | None]:
    """Message, code and param of an error body of any shape, secrets masked."""
    facts = _read_facts(body[:_BODY_MAX_BYTES])
    return facts.message, facts.code, facts.param


def _read_facts(body: bytes) -> _Facts:
    text = body.decode("utf-8", "replace").lstrip("\ufeff").strip()
    data = _parse(text)
    if isinstance(data, (dict, list)):
        return _facts_of(data)
    if isinstance(data, str):
        text = data
    html = bool(_HTML.match(text))
    if html:
        text = " ".join(_TAG.sub(" ", _SCRIPTS.sub(" ", text[:8192])).split())
    return _Facts(_clean(text, _PLAIN_MAX), words=text[:_WORDS_MAX], html=html)


def _parse(text: str) -> Any:
    """JSON in `text`, also as the first data line of an event stream; None if there is none."""
    framed = _SSE_DATA.search(text) if text.startswith(("data:", "event:", ":")) else None
    try:
        return json.loads(framed.group(1) if framed else text)
    except (ValueError, RecursionError):
        return None


def _facts_of(data: Any) -> _Facts:
    inner = _unwrap(data)
    if not isinstance(inner, dict):
        outer = data if isinstance(data, dict) else {}
        return _Facts(_clean(inner if isinstance(inner, str) else "", _MESSAGE_MAX), _read_code(outer), None, _list_words(data), data)
    message = next((inner[key] for key in _MESSAGE_KEYS if isinstance(inner.get(key), str) and inner[key]), "")
    where = inner.get("loc")
    param = inner.get("param")
    if isinstance(where, list) and where:     # FastAPI names the field in loc, not in the text
        param = str(where[-1])
        message = f"{param}: {message}"
    elif message == "Provider returned error":
        message = _upstream_message(inner) or message
    param = _clean(param, 200) if isinstance(param, str) else ""
    return _Facts(_clean(message, _MESSAGE_MAX), _read_code(inner), param or None, _list_words(data), data)


def _unwrap(value: Any) -> Any:
    """The innermost object, or text, that holds the words of an error."""
    for _ in range(6):
        if isinstance(value, list):
            value = value[0] if value else ""
            continue
        inner = next((value[key] for key in _WRAPPERS if isinstance(value.get(key), (dict, list)) and value[key]), None) if isinstance(value, dict) else None
        if inner is None:
            return value
        value = inner
    return value


def _upstream_message(error: Json) -> str:
    """What OpenRouter's own provider said, which stands in metadata.raw as text or as JSON in text."""
    metadata = error.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, dict) else None
    if not isinstance(raw, str):
        return ""
    data = _parse(raw[:_BODY_MAX_BYTES])
    inner = _unwrap(data) if isinstance(data, (dict, list)) else None
    if isinstance(inner, dict):
        inner = next((inner[key] for key in _MESSAGE_KEYS if isinstance(inner.get(key), str)), None)
    said, around = inner if isinstance(inner, str) and inner else raw, error.get("message")
    return f"{around}: {said}" if isinstance(around, str) and around and around not in said else said


def _read_code(error: Json) -> str | None:
    """The provider's own code; a code that only repeats the HTTP status is none."""
    metadata = error.get("metadata")
    found = (error.get("code"), error.get("status_code"), metadata.get("error_type") if isinstance(metadata, dict) else None, error.get("status"))
    for code in found:
        if isinstance(code, (str, int)) and not isinstance(code, bool):
            word = _clean(str(code)[:100], 100)
            if word and not re.fullmatch(r"\d{1,3}", word):
                return word
    return None


def _list_words(data: Any) -> str:
    """Every text and number in `data` as a line `key=value`."""
    lines: list[str] = []
    waiting: deque[tuple[str, Any]] = deque([("", data)])
    while waiting and len(lines) < 500:
        key, value = waiting.popleft()
        if isinstance(value, dict):
            waiting.extend((str(name), inner) for name, inner in list(value.items())[:100] if name not in _ECHOES)
        elif isinstance(value, list):
            waiting.extend((key, inner) for inner in value[:50])
        elif isinstance(value, str):
            lines.append(f"{key}={value[:4000]}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            lines.append(f"{key}={str(value)[:40]}")
    return "\n".join(lines)[:_WORDS_MAX]


def _clean(text: str, most: int) -> str:
    """`text` that can be shown and stored: secrets masked, no lone surrogates, not longer than `most`."""
    return redact(text[: 2 * most]).encode("utf-8", "replace").decode("utf-8").strip()[:most]


# What it means -------------------------------------------------------------------------------------------------------

class _Row(NamedTuple):
    """`reason` when the preset, the status and the words all match; a scope given here wins over the reason's."""
    presets: str                   #: names with blanks between, or *
    statuses: tuple[int, ...]      #: () for any
    pattern: re.Pattern[str]
    reason: str
    scope: str | None = None


def _has(words: str) -> re.Pattern[str]:
    return re.compile(words, re.I | re.M)


def _coded(*codes: str) -> re.Pattern[str]:
    """A code where a field, the text (z.ai: "[1113][...") or the end of the text (MiniMax: "... (1008)") names it."""
    any_of = "|".join(codes)
    return _has(rf"^(?:code|status_code)=(?:{any_of})$|^message=\[(?:{any_of})\]|\((?:{any_of})\)\s*$")


_ANY = _has("")
_SIGNS: tuple[_Row, ...] = (
    # one provider each
    _Row("cerebras", (400, 413), _has(r"\A\Z"), "context_overflow"),
    _Row("cerebras", (413,), _ANY, "context_overflow"),
    _Row("cerebras", (400,), _has(r"^code=wrong_api_format$"), "bad_param"),
    _Row("fireworks", (412,), _ANY, "billing"),
    _Row("openrouter", (), _has(r"free-models-per-day"), "rate_day", "credential"),
    _Row("openrouter", (), _has(r"free-models-per-min"), "rate_minute", "credential"),
    _Row("openrouter", (403,), _has(r"key limit"), "billing"),
    _Row("openrouter", (403,), _has(r"^reasons=|^error_type=(?:content_policy_violation|refusal)$|moderation|flagged"), "content_policy"),
    _Row("openrouter", (404,), _has(r"support (?:tool use|image input|the requested|parameters)"), "capability_missing"),
    _Row("openrouter", (413,), _has(r"payload too large"), "payload_too_large"),
    _Row("openrouter", (), _has(r"^error_type=(?:context_length_exceeded|token_limit_exceeded|max_tokens_exceeded|string_too_long)$"), "context_overflow"),
    _Row("openrouter", (), _has(r"^message=token limit reached"), "context_overflow"),
    _Row("openrouter", (), _has(r"^error_type=payment_required$"), "billing"),
    _Row("openrouter", (), _has(r"^error_type=authentication$"), "auth_invalid"),
    _Row("openrouter", (), _has(r"^error_type=permission_denied$"), "permission_model"),
    _Row("openrouter", (), _has(r"^error_type=(?:content_policy_violation|refusal)$"), "content_policy"),
    _Row("openrouter", (), _has(r"^error_type=not_found$"), "model_gone"),
    _Row("openrouter", (), _has(r"^error_type=payload_too_large$"), "payload_too_large"),
    _Row("openrouter", (), _has(r"^error_type=(?:provider_overloaded|provider_unavailable)$"), "model_capacity"),
    _Row("openrouter", (429,), _has(r"^provider_name=|upstream"), "model_capacity", "model"),
    _Row("gemini", (401, 403), _has(r"location|country|region"), "region_blocked"),
    _Row("gemini huggingface nvidia", (403,), _ANY, "auth_invalid"),
    _Row("gemini", (429,), _has(r"resource has been exhausted \(e\.g\. check quota\)"), "model_capacity"),
    _Row("github-copilot", (401,), _ANY, "auth_refreshable"),
    _Row("github-copilot", (403,), _ANY, "permission_model"),
    _Row("github-copilot", (413,), _ANY, "context_overflow"),
    _Row("github-copilot", (429,), _has(r"user_global_rate_limited|global rate limit"), "rate_minute"),
    _Row("github-models", (410,), _ANY, "provider_gone"),
    _Row("huggingface", (429,), _ANY, "rate_minute", "route"),
    _Row("cloudflare", (), _coded("10000"), "auth_invalid"),
    _Row("cloudflare", (), _coded("4006"), "rate_day", "credential"),
    _Row("cloudflare", (), _coded("3040"), "model_capacity"),
    _Row("cloudflare", (), _coded("5007"), "model_gone"),
    _Row("mistral", (), _coded("3505"), "model_capacity"),
    _Row("mistral", (), _coded("1300"), "rate_minute"),
    _Row("zai", (), _coded("100[0-4]"), "auth_invalid"),
    _Row("zai", (), _coded("1113"), "billing"),
    _Row("zai", (), _coded("130[23]"), "rate_minute"),
    _Row("zai", (), _coded("1305"), "model_capacity"),
    _Row("zai", (), _coded("1308", "1309", "1310", "1316", "1317"), "rate_day"),
    _Row("zai", (), _coded("1261"), "context_overflow"),
    _Row("zai", (), _coded("1211"), "model_gone"),
    _Row("zai", (), _coded("1301"), "content_policy"),
    _Row("minimax", (), _coded("1004", "2049"), "auth_invalid"),
    _Row("minimax", (), _coded("1008"), "billing"),
    _Row("minimax", (), _coded("2056"), "rate_day"),
    _Row("minimax", (), _coded("1002", "1039"), "rate_minute"),
    _Row("minimax", (), _coded("1000", "1013"), "server_error"),
    _Row("qwen", (), _has(r"#token-limit"), "rate_minute"),
    _Row("qwen", (), _has(r"AllocationQuota\.FreeTierOnly"), "billing", "route"),
    # anybody: signs too plain to mistake
    _Row("*", (498,), _ANY, "tier_capacity"),
    _Row("*", (499,), _ANY, "client_cancelled"),
    _Row("*", (429,), _has(r"^quotaValue=0$|\blimit: 0\b"), "permission_model"),
    _Row("*", (), _has(r"^quotaId=.*PerDay"), "rate_day"),
    _Row("*", (), _has(r"^quotaId=.*PerMinute"), "rate_minute"),
    _Row("gemini", (429,), _has(r"current quota"), "rate_minute"),
    _Row("*", (413, 429), _has(r"request too large(?=[^\n]{0,300}(?:\bTPM\b|tokens per min))"), "request_over_tpm"),
    _Row("*", (400, 422, 500, 502), _has(r"tool_use_failed|MALFORMED_FUNCTION_CALL|failed to parse tool call arguments"), "tool_generation_failed"),
    _Row("*", (400, 401, 403, 404, 451, 502), _has(r"unsupported_country|(?:country|region|territory|user location)\b[^.\n]{0,30}not supported"
                                                   r"|not (?:available|supported) in your (?:country|region|location)"), "region_blocked"),
    _Row("*", (400, 403, 422, 502), _has(r"\bcontent_filter\b|content_policy_violation|data_inspection_failed|ResponsibleAIPolicyViolation|^blockReason="
                                         r"|moderation_blocked"
                                         r"|flagged by (?:our |the )?(?:moderation|content)|violat\w+ (?:our |the )?(?:usage|content) polic"),
         "content_policy"),
    _Row("*", (400, 403, 500, 502), _has(r"API_KEY_INVALID|ACCESS_TOKEN_TYPE_UNSUPPORTED|api key (?:not valid|expired|is invalid)"
                                         r"|(?:incorrect|invalid|wrong) (?:x-)?api[ -]key"
                                         r"|invalid_api_key|wrong_api_key|invalid_authentication"), "auth_invalid"),
    _Row("*", (400, 404, 405, 422), _has(r"unsupported_api_for_model|only supported in v1/responses|not a chat model|please use (?:the )?/?v1/responses"),
         "endpoint_unsupported"),
    _Row("*", (400, 404, 422, 500, 501), _has(r"does not support (?:tools?|function|image|images|vision|multimodal|audio|json|response_format|structured)\b"
                                              r"|not a multimodal model|(?:image|tool|function)[\w ]{0,20} (?:is|are) not supported (?:by|for|with) this model"
                                              r"|no endpoints found that support|enable-auto-tool-choice"), "capability_missing"),
    _Row("*", (400, 403, 404, 422), _has(r"model_decommissioned|model_not_found|model_not_supported|model_not_available|model_not_active|DeploymentNotFound"
                                         r"|unknown model|no such model|not a valid model|requested model[^.\n]{0,80}(?:does not exist|not supported)"
                                         r"|\bmodel\b[^.\n]{0,80}(?:decommissioned|no longer available|end of life)"),
         "model_gone"),
    _Row("*", (413,), _has(r"request_too_large"), "payload_too_large"),
    _Row("*", (400, 413), re.compile(r"\A(?=.*string_above_max_length)(?=.*\nparam=(?:messages|input|prompt|instructions))", re.I | re.S), "context_overflow"),
)

_OVERFLOW = _has(
    r"prompt (?:is )?too long|prompt exceeds max length|input is too long|too many tokens"
    r"|exceeds? (?:the |this |its |your )?(?:model'?s )?(?:available |maximum )?context (?:window|length|size|limit)|exceeds? the maximum number of tokens"
    r"|maximum context length is [0-9,]+|maximum allowed input length|input token count[^\n]{0,80}exceeds the maximum|maximum prompt length is [0-9,]+"
    r"|reduce the length of the (?:messages|input|prompt)|is longer than the model'?s context length|prompt token count of \S+ exceeds the limit"
    r"|too large for model with [0-9,]+ maximum context length|context window exceeds limit|exceeded model token limit|range of input length should be"
    r"|greater than the context length|exceeded (?:max )?context length|context window exceeded|ContextWindowExceededError"
    r"|input length and [`'\"]?max_tokens[`'\"]? exceed|context[_ ]length[_ ]exceeded"
    r"|model_max_prompt_tokens_exceeded|exceed_context_size_error|token_limit_exceeded")
_RATE_WORDS = _has(r"rate limit|too many requests|tokens per (?:min|minute|day)|throttl")
_MONEY = _has(
    r"insufficient[_ ](?:quota|balance|credit|credits|funds)|credit balance is too low|exceeded_current_quota|exceeded (?:your )?current quota"
    r"|billing_(?:error|hard_limit|not_active)"
    r"|payment[_ ]required|(?:all|out of|of your|more) (?:available |included |prepaid )*credits|used all [^.\n]{0,20}credits"
    r"|monthly (?:included credits|spending limit)"
    r"|free monthly usage limit|no resource package|account\b[^\n]{0,80}\b(?:is suspended|not active|in arrears)|FreeTierOnly")
#: A rate limit told by name rather than by status, as errors inside a 200 do.
_RATE_NAMES = _has(r"=(?:rate_limit_(?:exceeded|error|reached_error)|rate_limited|too_many_requests(?:_error)?|RESOURCE_EXHAUSTED|RateLimitReached)$")
_DAY = _has(r"per[-_ ]?day|\b(?:TPD|RPD)\b|\bdaily\b|\bweekly\b|\bmonthly\b"
            r"|(?:session|hourly|weekly|daily) usage limit|\d-hour usage limit|usage limit reached")
_CAPACITY = _has(
    r"overloaded|capacity[_ ](?:temporarily )?exceeded|(?:at|over|no|out of|insufficient) (?:available )?capacity|capacity exceeded"
    r"|queue_exceeded|high (?:traffic|demand)|server busy|maximum pending requests|rate-limited upstream"
    r"|\bResourceExhausted\b|resource has been exhausted|loading model|no healthy upstream")
_LIMIT_REQUESTED = re.compile(r"Limit:? (\d{1,12}),(?: Used:? \d{1,12},)? Requested:? (\d{1,12})", re.I)
_PERMISSION = _has(r"\bmodel\b|subscription|upgrade|\bplan\b|policy|permissions?_error|model_permission")
_RETIRED = _has(r"decommissioned|end of life|deprecated|retired|no longer (?:available|supported)|shut ?down")
#: Providers whose 503 means that something broke, not that they are full.
_BROKEN_AT_503 = "cerebras groq huggingface github-copilot ollama-cloud".split()

#: What a status means when the body does not tell.  Any other is server_error: the next provider may well serve it.
_BY_STATUS: Mapping[int, str] = MappingProxyType({
    **dict.fromkeys((400, 406, 411, 414, 415, 416, 417, 422, 431), "bad_request"),
    401: "auth_invalid",
    402: "billing",
    403: "auth_invalid",
    404: "model_gone",
    405: "endpoint_unsupported",
    410: "model_gone",
    412: "billing",
    413: "payload_too_large",
    420: "rate_minute",
    429: "rate_minute",
    451: "region_blocked",
    503: "model_capacity",
    529: "model_capacity",
})


def classify(preset_name: str, bucket: str, status: int, headers: Mapping[str, str], body: bytes, *, utc: float) -> UpstreamFailure:
    """What an answer that is no success means.  `headers` has lower case names; `bucket` is what the preset says limits count against."""
    if 300 <= status < 400:
        return _fail("server_error", bucket, status, detail="redirect refused")
    facts = _read_facts(body[:_BODY_MAX_BYTES])
    if status < 300:
        return _judge_success(preset_name, bucket, status, facts, utc)
    return _judge(preset_name, bucket, status, headers, facts, utc)


def _judge_success(preset_name: str, bucket: str, status: int, facts: _Facts, utc: float) -> UpstreamFailure:
    """A success that is none: its headers name no time, whatever they hold (Retry-After has been seen on good answers)."""
    if facts.data is not None and facts.message:
        return classify_error(preset_name, bucket, facts.data, utc=utc)
    return _fail("not_json" if facts.message else "empty_answer", bucket, status, detail=facts.message)


def classify_error(preset_name: str, bucket: str, error: Any, *, utc: float) -> UpstreamFailure:
    """What an error inside a 200 or in a stream means; `error` is the parsed body or event."""
    facts = _facts_of(error) if isinstance(error, (dict, list)) else _Facts(_clean(str(error or ""), _MESSAGE_MAX), words=str(error or "")[:_WORDS_MAX])
    return _judge(preset_name, bucket, _inner_status(error), {}, facts, utc)


#: The status an error type stands for, where an error inside a 200 carries no number.
_TYPE_STATUS: Mapping[str, int] = MappingProxyType({
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "timeout_error": 504,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "invalid_prompt": 400,
    "context_length_exceeded": 400,
    "overloaded_error": 529,
})


def _inner_status(error: Any) -> int:
    """The status an error object names, by number or by type; 502 if it names none."""
    places = [place for place in (_unwrap(error), error, error.get("error") if isinstance(error, dict) else None) if isinstance(place, dict)]
    for place in places:
        for key in ("code", "status_code", "http_code", "status"):
            number = str(place.get(key))[:8]
            if re.fullmatch(r"[45]\d\d", number):
                return int(number)
    names = [str(place.get(key)) for place in places for key in ("code", "type")]
    return next((_TYPE_STATUS[name] for name in names if name in _TYPE_STATUS), 502)


def _judge(preset_name: str, bucket: str, status: int, headers: Mapping[str, str], facts: _Facts, utc: float) -> UpstreamFailure:
    reason, scope = _find_reason(preset_name, status, facts)
    if headers.get("x-should-retry", "").strip().lower() == "true" and REASONS[reason].kind in ("request", "parameter"):
        reason, scope = "server_error", None       # the provider knows its own statuses better than a table does
    param = facts.param
    if reason == "bad_param":
        param = _named_field(facts) or param
    failure = _fail(reason, bucket, status, detail=facts.message, scope=scope, code=facts.code, param=param)
    return _time(failure, headers, facts, utc)


def _time(failure: UpstreamFailure, headers: Mapping[str, str], facts: _Facts, utc: float) -> UpstreamFailure:
    """`failure` with the time that its provider named, where a time can mean an end of it."""
    if failure.reason == "model_gone" and (failure.status == 410 or _RETIRED.search(facts.words)):
        failure.cool_s = FAILURE_RULES["model"].cap_s      # said, not guessed from a 404: no need to look again soon
    if not failure.scope or failure.kind not in ("rate", "payment", "server"):
        return failure
    if failure.kind != "rate":       # the windows say nothing about an overload or an empty purse
        headers = {name: value for name, value in headers.items() if "retry-after" in name}
    wait_s = read_reset(headers, facts.data, facts.words, utc=utc)
    if wait_s is not None:
        failure.cool_s, failure.proven = wait_s, True
    return failure


def _fail(reason: str, bucket: str, status: int, *, detail: str = "", scope: str | None = None, phase: str = "",
          code: str | None = None, param: str | None = None) -> UpstreamFailure:
    known = REASONS[reason]
    scope = known.scope if scope is None else scope
    if scope == "bucket":
        scope = "route" if bucket == "model" else "credential"
    return UpstreamFailure(known.kind, reason, detail, status, phase, scope, known.first_cool_s if scope else None, False, code, param)


def transport_failure(reason: str, phase: str, detail: str = "") -> UpstreamFailure:
    """A failure of the way there or back; `reason` is one of REASONS, `phase` where it happened."""
    return _fail(reason, "", 0, detail=_clean(detail, _MESSAGE_MAX), phase=phase)


def _find_reason(preset_name: str, status: int, facts: _Facts) -> tuple[str, str | None]:
    """Reason, and the scope where a row names one."""
    words = facts.words
    for row in _SIGNS:
        if (row.presets == "*" or preset_name in row.presets.split()) and (not row.statuses or status in row.statuses) and row.pattern.search(words):
            return row.reason, row.scope
    if _over_allowance(status, words):
        return "request_over_tpm", None
    if status not in (401, 402, 403) and _OVERFLOW.search(words) and not _RATE_WORDS.search(words):
        return "context_overflow", None
    if status == 402 or _MONEY.search(words):
        return "billing", None
    if status == 429 or _RATE_NAMES.search(words):
        return _find_rate(words), None
    if status >= 500 and _CAPACITY.search(words):
        return "model_capacity", None
    return _by_status(preset_name, status, facts), None


def _find_rate(words: str) -> str:
    if _DAY.search(words):
        return "rate_day"
    return "model_capacity" if _CAPACITY.search(words) else "rate_minute"


def _over_allowance(status: int, words: str) -> bool:
    """Is one request larger than all that a whole window grants?"""
    found = _LIMIT_REQUESTED.search(words) if status in (413, 429) else None
    return found is not None and int(found.group(2)) > int(found.group(1))


def _by_status(preset_name: str, status: int, facts: _Facts) -> str:
    if facts.html and status in (400, 403, 422):        # a page of something on the way: the API never saw the request
        return "server_error"
    if status == 403 and _PERMISSION.search(facts.words):
        return "permission_model"
    if status in (400, 422) and _named_field(facts):
        return "bad_param"
    if status == 503 and preset_name in _BROKEN_AT_503:
        return "server_error"
    if preset_name in ("fireworks", "nvidia") and status in (500, 504):
        return "model_capacity" if preset_name == "fireworks" or status == 504 else "server_error"
    return _BY_STATUS.get(status, "server_error")


#: A field that this provider does not take, as the text names it.
_FIELD = _has(
    r"(?:unsupported|unknown|unrecognized|unexpected)(?: request)?(?: keyword)? (?:parameters?|values?|arguments?|names?|fields?|key)"
    r"(?: supplied)?:? ?[\"'`]?([A-Za-z_][\w.\[\]-]*)"
    r"|property [\"'`]([\w.]+)[\"'`] is unsupported|(?<![\w.])([\w.]{1,80}): extra inputs are not permitted"
    r"|[\"'`]([\w.]+)[\"'`] (?:is|are) (?:not supported|deprecated|not permitted)"
    r"|argument not supported(?: on this model)?: ?[\"'`]?(\w+)|does not support (?:the )?(?:parameter )?[\"'`]?(effort|temperature|top_p|top_k|thinking)\b")
_REFUSED = _has(r"not supported|unsupported|not permitted|extra_forbidden|unknown_parameter|not allowed|deprecated")
_CORE_FIELDS = frozenset({"messages", "input", "model", "prompt", "contents", "system", "tools", "file"})


def _named_field(facts: _Facts) -> str | None:
    """The one optional field the provider says it does not know; None when it complains about something else."""
    found = _FIELD.search(facts.words)
    name = next((group for group in found.groups() if group), None) if found else None
    if name is None and facts.param and _REFUSED.search(facts.words):
        name = facts.param
    return name if name and re.split(r"[.\[]", name)[0] not in _CORE_FIELDS else None


# When it ends --------------------------------------------------------------------------------------------------------

_DAY_S = 86400.0
_UNIT_S: Mapping[str, float] = MappingProxyType({
    "n": 1e-9, "u": 1e-6, "µ": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": _DAY_S, "w": 7 * _DAY_S, "mo": 30 * _DAY_S,
})
_SPAN_TEXT = r"\d{1,9}(?:\.\d{1,12})?\s?(?:milliseconds?|months?|minutes?|mins?|seconds?|secs?|hours?|hrs?|weeks?|days?|ms|us|µs|ns|s|m|h|d|w)(?![a-z])"
_SPAN = re.compile(r"(\d{1,9}(?:\.\d{1,12})?)\s?([a-zµ]+)", re.I)
_SPANS = re.compile(rf"(?:{_SPAN_TEXT}[\s,]{{0,2}})+", re.I)
_DECIMAL = re.compile(r"\d{1,15}(?:\.\d{1,20})?")
_INSTANT_TEXT = r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d(?::\d\d)?)(?:\.\d{1,12})?\s?(Z|UTC|GMT|[+-]\d\d:?\d\d)?"
_INSTANT = re.compile(_INSTANT_TEXT, re.I)
_SAID_SPAN = re.compile(rf"(?:try again|retry|resets?|wait|available)[^\d\n.;]{{0,30}}(?<!-)((?:{_SPAN_TEXT}(?:\s?,)?(?:\s?and)?\s?)+)", re.I)
_SAID_INSTANT = re.compile(rf"(?:resets?|try again|retry|until|available|renews?)[^\d\n]{{0,40}}{_INSTANT_TEXT}", re.I)
_SAID_INSTANT_ZH = re.compile(rf"{_INSTANT_TEXT}[^\d\n]{{0,6}}(?:重置|恢复)")
_LONG_WORDS = _has(r"week|month|quota|usage limit|\bplan\b|allocation|credits|\bdays\b")
_PER_DAY_QUOTA = _has(r"^quotaId=.*PerDay")
_UTC_DAY_QUOTA = _has(r"free-models-per-day|^code=4006$|daily free allocation")
_RETRY_KEYS = frozenset({"retrydelay", "retry_after", "retryafter", "retry_after_seconds"})


def read_reset(headers: Mapping[str, str], body_json: Any, text: str, *, utc: float) -> float | None:
    """Seconds until the provider says the route is free, the largest of all its hints; None if it says nothing that can be believed.

    headers: lower case names, of an answer that is no success.  text: its words.  utc: now, in seconds since 1970.
    """
    words = _list_words(body_json) if isinstance(body_json, (dict, list)) else text
    if _PER_DAY_QUOTA.search(words):
        return _pacific_midnight_s(utc)      # Gemini goes on saying seconds when the day is spent
    waits = [*_header_waits(headers, utc), *_header_waits(_inner_headers(body_json), utc), *_field_waits(body_json, utc), *_said_waits(text or words, utc)]
    longest_s = 32 * _DAY_S if _LONG_WORDS.search(text or words) else _DAY_S
    wait_s = max((wait for wait in waits if 0.0 < wait <= longest_s), default=None)
    if wait_s is None and _UTC_DAY_QUOTA.search(f"{words}\n{text}"):
        return _DAY_S - utc % _DAY_S
    return wait_s


def _read_wait(value: str, utc: float) -> float | None:
    """Seconds from now in any form of a header value: a number, a duration, a date; None for junk."""
    value = value.strip()[:80]
    if _DECIMAL.fullmatch(value):
        number = float(value)
        if number > 1e9:                    # an instant: in milliseconds when it has the digits for it
            return (number / 1000.0 if number > 1e12 else number) - utc
        return number
    if _SPANS.fullmatch(value):
        return _sum_spans(value)
    found = _INSTANT.fullmatch(value)
    return _until(found, utc) if found else _until_http_date(value, utc)


def _sum_spans(text: str) -> float:
    """Seconds of joined spans, Go's "2m59.56s" as well as "2 hours and 5 minutes"."""
    return sum(float(number) * _unit_s(unit.lower()) for number, unit in _SPAN.findall(text))


def _unit_s(unit: str) -> float:
    if unit.startswith(("mil", "ms")):
        return _UNIT_S["ms"]
    return _UNIT_S["mo"] if unit.startswith("mo") else _UNIT_S[unit[0]]


def _until(found: re.Match[str], utc: float) -> float | None:
    """Seconds from now to a written instant; one without a zone is Beijing's, as z.ai writes it."""
    day, clock, zone = found.groups()
    zone = "+08:00" if zone is None else "+00:00" if zone.upper() in ("Z", "UTC", "GMT") else zone
    try:
        return datetime.fromisoformat(f"{day}T{clock}{zone}").timestamp() - utc
    except (ValueError, OverflowError):
        return None


def _until_http_date(value: str, utc: float) -> float | None:
    if not re.match(r"[A-Za-z]{3,9},? ", value):
        return None
    try:
        moment = email.utils.parsedate_to_datetime(value)
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp() - utc
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _header_waits(headers: Mapping[str, str], utc: float) -> list[float]:
    """Waits that headers name outright, and those of windows with nothing left."""
    waits: list[float | None] = []
    unsure: list[float] = []
    for name, value in headers.items():
        if name == "retry-after-ms":
            number = value.strip()          # of more than float() would: OpenRouter's copies may hold control characters
            waits.append(float(number) / 1000.0 if _DECIMAL.fullmatch(number) else None)
        elif name.endswith("retry-after"):
            waits.append(_read_wait(value, utc))
        elif "ratelimit" in name and "reset" in name:
            left, wait_s = headers.get(name.replace("reset", "remaining")), _read_wait(value, utc)
            if left is None and wait_s is not None:
                unsure.append(wait_s)
            elif left is not None and re.fullmatch(r"\s*(?:0+(?:\.0*)?|-\d+)\s*", left):
                waits.append(wait_s)
    sure = [wait for wait in waits if wait is not None]
    return sure or sorted(wait for wait in unsure if wait > 0)[:1]     # which window was it? the soonest costs least if wrong


def _inner_headers(data: Any) -> dict[str, str]:
    """Headers that OpenRouter copies into error.metadata.headers."""
    error = data.get("error") if isinstance(data, dict) else None
    metadata = error.get("metadata") if isinstance(error, dict) else None
    found = metadata.get("headers") if isinstance(metadata, dict) else None
    return {str(name).lower(): str(value)[:80] for name, value in found.items()} if isinstance(found, dict) else {}


def _field_waits(data: Any, utc: float) -> list[float]:
    """Waits in fields such as Gemini's RetryInfo.retryDelay."""
    lines = (line.partition("=") for line in _list_words(data).split("\n"))
    waits = (_read_wait(value, utc) for key, _, value in lines if key.lower() in _RETRY_KEYS)
    return [wait for wait in waits if wait is not None]


def _said_waits(text: str, utc: float) -> list[float]:
    """Waits told in words: "try again in 9m38.016s", "resets in 13 days", "will reset at 2026-08-06 20:06:00"."""
    text = text[:_WORDS_MAX]
    instants = (_until(found, utc) for pattern in (_SAID_INSTANT, _SAID_INSTANT_ZH) for found in pattern.finditer(text))
    return [*(_sum_spans(found.group(1)) for found in _SAID_SPAN.finditer(text)), *(wait for wait in instants if wait is not None)]


def _pacific_midnight_s(utc: float) -> float:
    """Seconds to the next midnight in California, by the rule of 2007: summer time from the second Sunday of March to the first of November.

    Time zone data is missing on some machines, and this one rule is all that is needed.
    """
    today = datetime.fromtimestamp(utc - 8 * 3600.0, timezone.utc).replace(hour=0, minute=0, second=0, microsecond=0)
    waits = ((day + timedelta(hours=7 if _is_summer(day) else 8)).timestamp() - utc for day in (today + timedelta(days=n) for n in range(3)))
    return next(wait for wait in waits if wait > 0)


def _is_summer(midnight: datetime) -> bool:
    """Does this day begin in summer time?  The days of change begin in the old one."""
    march, november = midnight.replace(month=3, day=8), midnight.replace(month=11, day=1)
    starts, ends = (first + timedelta(days=(6 - first.weekday()) % 7) for first in (march, november))
    return starts < midnight <= ends


# What the client is told when every route failed ---------------------------------------------------------------------

class _Answer(NamedTuple):
    """The answer when all that went wrong is in `blames`; the first row that holds it all is taken."""
    blames: frozenset[str]
    status: int
    code: str
    type: str
    lead: str


def _all(blames: str, status: int, code: str, type: str, lead: str) -> _Answer:
    return _Answer(frozenset(blames.split()), status, code, type, lead)


_ANSWERS: tuple[_Answer, ...] = (
    _all("rate tpm", 429, "rate_limit_exceeded", "rate_limit_error", "Every provider tried is at its rate limit."),
    _all("payment", 429, "insufficient_quota", "rate_limit_error", "Every provider tried wants money or has no quota left."),
    _all("rate tpm payment", 429, "rate_limit_exceeded", "rate_limit_error", "Every provider tried is at its limit."),
    _all("timeout", 504, "timeout", "server_error", "No provider answered in time."),
    _all("overloaded", 503, "server_is_overloaded", "server_error", "Every provider tried is overloaded."),
    _all("overloaded rate tpm payment", 503, "server_is_overloaded", "server_error", "Every provider tried is overloaded or at its limit."),
    _all("model", 404, "model_not_found", "invalid_request_error", "No provider tried has this model."),
    _all("credential", 502, "credential_rejected", "server_error", "The provider rejected the gateway's credential."),
    _all("region", 403, "region_blocked", "invalid_request_error", "No provider tried serves this region."),
    _all("context tpm", 400, "context_length_exceeded", "invalid_request_error", "The request is too long for every model tried."),
    _all("bytes", 413, "request_too_large", "invalid_request_error", "The request is too large for every provider tried."),
    _all("capability", 400, "unsupported", "invalid_request_error", "No model tried can do what the request asks for."),
    _all("context tpm bytes capability", 400, "context_length_exceeded", "invalid_request_error", "The request does not fit any model tried."),
)
_MIXED = _all("", 502, "upstream_failed", "server_error", "No provider tried could answer.")
_BLAMES: Mapping[str, str] = MappingProxyType({
    "region_blocked": "region",
    "permission_model": "credential",
    "model_capacity": "overloaded",
    "tier_capacity": "overloaded",
    "context_overflow": "context",
    "payload_too_large": "bytes",
    "request_over_tpm": "tpm",
    "capability_missing": "capability",
    "timeout": "timeout",
})
_URL = re.compile(r"\(?\bhttps?://[^\s\"'<>]+")
_RETRY_AFTER_S = 5.0       # a wait worth trying when no provider named one
_LISTED_MAX = 6


def answer_for(failures: Sequence[UpstreamFailure], attempts: Sequence[Attempt]) -> GatewayError:
    """What the client is told when every route failed: its own mistake in the provider's words, else what all failures have in common."""
    rows = [attempt.public() for attempt in attempts]
    if failures and failures[-1].kind in ("request", "parameter"):
        return _refusal(failures[-1], rows)
    blames = {_blame(failure) for failure in failures}
    answer = next((row for row in _ANSWERS if blames and blames <= row.blames), _MIXED)
    if answer.code == "context_length_exceeded":
        words = [failure.detail for failure in failures if failure.reason == "context_overflow" and failure.detail]
        return GatewayError(words[-1] if words else answer.lead, answer.status, answer.code, answer.type, None, None, rows)
    return GatewayError(_tell(answer.lead, failures, attempts), answer.status, answer.code, answer.type,
                        "model" if answer.status == 404 else None, _retry_after_s(answer, failures), rows)


def _refusal(failure: UpstreamFailure, rows: list[Json]) -> GatewayError:
    """The provider's own complaint about the request, with its status if that is one for the client."""
    status = failure.status if 400 <= failure.status < 500 and failure.status != 401 else 400
    message = failure.detail or f"The provider refused the request with status {failure.status}."
    return GatewayError(message, status, failure.code, "invalid_request_error", failure.param, None, rows)


def _blame(failure: UpstreamFailure) -> str:
    """The word under which failures are compared."""
    if failure.status == 429 and failure.kind not in ("payment", "fit"):
        return "rate"
    if failure.reason in _BLAMES:
        return _BLAMES[failure.reason]
    if failure.kind == "server" and failure.status in (408, 504, 524):
        return "timeout"
    return "overloaded" if failure.status in (498, 503, 529) else failure.kind


def _retry_after_s(answer: _Answer, failures: Sequence[UpstreamFailure]) -> float | None:
    """The smallest time a provider named, where waiting can help at all."""
    if answer.status not in (429, 503):
        return None
    named = [failure.cool_s for failure in failures if failure.proven and failure.cool_s is not None]
    return min(named, default=FAILURE_RULES["payment"].first_cool_s if answer.code == "insufficient_quota" else _RETRY_AFTER_S)


def _tell(lead: str, failures: Sequence[UpstreamFailure], attempts: Sequence[Attempt]) -> str:
    """`lead`, what became of each attempt, and the provider's words if there was but one."""
    told = [f"{attempt.route.provider.name}/{attempt.route.model.id}: {attempt.reason or 'failed'}" + (f" ({attempt.status})" if attempt.status else "")
            for attempt in attempts]
    if len(told) > _LISTED_MAX:
        told[_LISTED_MAX:] = [f"and {len(told) - _LISTED_MAX} more"]
    words = _URL.sub("(link)", failures[0].detail) if len(failures) == 1 else ""
    said = f" The provider said: {words}" if words and failures[0].status and not failures[0].phase else f" What happened: {words}." if words else ""
    return lead + (f" {'; '.join(told)}." if told else "") + said


##############################################################################
# 7. Routing policy                                         pure | uses 1-5
##############################################################################
# Which routes, in which order, and why not the others: functions of configuration and state, with `now` handed in.
# A Catalogue is worked out once per configuration; resolve() turns a model name into a Choice; plan() orders its routes for
# one request; cool() and clear() keep the cooldowns.  Nothing here logs, sleeps or picks at random: jitter arrives.
# Guessed cooldowns end with a probe: one real request is let through, the others wait for what it finds.

CAROUSEL_NAMES = frozenset({"", "aicarousel", "auto", "router-maestro"})
_FAMILIES = (("gpt-", "openai"), ("chatgpt-", "openai"), ("o1", "openai"), ("o3", "openai"), ("o4", "openai"), ("claude-", "anthropic"), ("gemini-", "gemini"))
_MAX_COOLDOWNS = 10_000

#: Routes of one provider that serve one request, by model and within a model by credential.
Group = tuple[tuple[Route, ...], ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """What a model name stands for: groups in order, and how they may turn.  `turn_name` is what the rotation is counted under."""
    turn_name: str
    groups: tuple[Group, ...]
    rotates: bool                   #: the first provider moves from request to request
    explicit: bool                  #: the client named a model, an alias or a provider


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Every name clients may use, worked out from one configuration."""
    whole: tuple[Group, ...]
    providers: Mapping[str, Provider]
    models: Mapping[str, tuple[Group, ...]]             #: by id, alias and prefixed id
    aliases: Mapping[str, tuple[str, ...]]
    rejects_unknown: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """Ordered routes for one request, why others were left out, and when the first of those is free."""
    routes: tuple[Route, ...]
    skipped: tuple[tuple[Route, str], ...]
    free_at: float | None


@dataclass(slots=True)
class Cooldown:
    """Why and until when something is left out; it stays after its end, with its strikes, until a success."""
    key: str
    kind: str
    reason: str
    until_at: float
    strikes: int
    proven: bool
    probing: bool = False


@dataclass(slots=True)
class RoutingState:
    """What routing remembers between requests; owned by the relay, lives as long as the process."""
    cooling: dict[str, Cooldown] = field(default_factory=dict)
    turns: dict[str, str] = field(default_factory=dict)     #: turn name -> provider that served last
    refused: dict[str, frozenset[str]] = field(default_factory=dict)    #: model key -> request fields it has refused


def build_catalogue(config: Config) -> Catalogue:
    """Work out all names of a configuration."""
    models: dict[str, list[Group]] = {}
    whole = []
    for provider in config.active:
        group = _group_of(provider, _chain_models(provider))
        if any(group):
            whole.append(group)
        for model in provider.models:
            for name in {model.id, model.alias or model.id}:
                models.setdefault(name, []).append(_group_of(provider, (model,)))
        for credential in provider.credentials:
            for model in provider.models if credential.prefix else ():
                if not _may_use(credential, model.id):
                    continue
                models.setdefault(credential.prefix + model.id, []).append(((make_route(provider, credential, model),),))
    return Catalogue(tuple(whole), {provider.name: provider for provider in config.active}, {name: tuple(groups) for name, groups in models.items()},
                     config.carousel.aliases, config.carousel.unknown_model == "reject")


def _chain_models(provider: Provider) -> tuple[Model, ...]:
    """The default first, then the list, when the provider falls back inside itself."""
    first = next((model for model in provider.models if model.id == provider.default), Model(provider.default))
    return (first, *(model for model in provider.models if model.id != first.id)) if provider.enable_fallback else (first,)


def _group_of(provider: Provider, models: Sequence[Model]) -> Group:
    """The routes of some models of a provider, one tuple of credentials per model."""
    return tuple(tuple(make_route(provider, credential, model) for credential in provider.credentials if _may_use(credential, model.id)) for model in models)


def _may_use(credential: Credential, model_id: str) -> bool:
    if credential.models == ("*",) and not credential.excluded_models:
        return True
    return any(fnmatch.fnmatchcase(model_id, glob) for glob in credential.models) and not any(fnmatch.fnmatchcase(model_id, glob) for glob in credential.excluded_models)


def resolve(catalogue: Catalogue, name: str | None, *, may_be_alias: bool = True) -> Choice:
    """What a model name stands for, by the rules of README "Naming a model". Raises GatewayError 404 when unknown names are refused."""
    if name is None or name in CAROUSEL_NAMES:
        return Choice("*", catalogue.whole, True, False)
    alias = find_alias(name, catalogue.aliases) if may_be_alias else ""
    if alias:
        return _resolve_alias(catalogue, alias, catalogue.aliases[alias])
    for mark in "/:":
        head, found, rest = name.partition(mark)
        if found and rest and head in catalogue.providers:
            return Choice(name, (_named_group(catalogue.providers[head], rest),), False, True)
    if name in catalogue.providers:
        provider = catalogue.providers[name]
        return Choice(name, (_group_of(provider, _chain_models(provider)),), False, True)
    if name in catalogue.models:
        return Choice(f"model {name}", catalogue.models[name], True, True)
    for prefix, family in _FAMILIES:
        if name.startswith(prefix) and family in catalogue.providers:
            return Choice(name, (_named_group(catalogue.providers[family], name),), False, True)
    if catalogue.rejects_unknown:
        known = [*catalogue.models, *catalogue.aliases, *catalogue.providers]
        from difflib import get_close_matches
        close = ", ".join(get_close_matches(name[:200], known, 3, 0.3)) or "none"
        raise unknown_model(f"The model {name[:200]!r} is not known here. Nearest: {close}.")
    return Choice("*", catalogue.whole, True, False)


def _resolve_alias(catalogue: Catalogue, name: str, targets: Sequence[str]) -> Choice:
    """Each target's groups, one after the other. Configuration has refused cycles; a glob that covers its own target means the plain model."""
    choices = [resolve(catalogue, target, may_be_alias=find_alias(target, catalogue.aliases) != name) for target in targets]
    if len(choices) == 1:
        return Choice(choices[0].turn_name, choices[0].groups, choices[0].rotates, True)
    return Choice(f"alias {name}", tuple(group for choice in choices for group in choice.groups), False, True)


def _named_group(provider: Provider, wire_model: str) -> Group:
    """The routes to a model that need not be listed."""
    model = next((model for model in provider.models if wire_model in (model.id, model.alias)), Model(wire_model))
    return _group_of(provider, (model,))


def plan(catalogue: Catalogue, choice: Choice, state: RoutingState, now: float, *, strategy: str, fallback: str) -> Plan:
    """Order the routes of one request: those that are free, then guessed cooldowns as a last resort, soonest end first.

    Proven cooldowns are left out, `free_at` tells when the first of them ends.
    """
    groups = _turned(choice, state, strategy)
    if choice.explicit and fallback != "none":
        groups = (*groups, *_fallback_groups(catalogue, choice, state, strategy, fallback))
    seen: set[str] = set()
    ready: list[Route] = []
    late: list[tuple[float, Route]] = []
    skipped: list[tuple[Route, str]] = []
    free_at: float | None = None
    for group in groups:
        for model_routes in group:
            for route in _credentials_turned(model_routes, state):
                if route.id in seen:
                    continue
                seen.add(route.id)
                cooldown = hindrance(state, route, now) if state.cooling else None
                if cooldown is None:
                    ready.append(route)
                    continue
                skipped.append((route, f"{cooldown.reason}, {'probing' if cooldown.until_at <= now else f'{cooldown.until_at - now:.0f} s left'}"))
                if cooldown.proven and cooldown.until_at > now:
                    free_at = min(cooldown.until_at, free_at or cooldown.until_at)
                else:
                    late.append((cooldown.until_at, route))
    late.sort(key=lambda pair: pair[0])
    return Plan((*ready, *(route for _, route in late)), tuple(skipped), free_at)


def _turned(choice: Choice, state: RoutingState, strategy: str) -> tuple[Group, ...]:
    """The groups, starting behind the provider that served last."""
    groups = choice.groups
    if not choice.rotates or strategy != "round-robin" or len(groups) < 2:
        return groups
    last = state.turns.get(choice.turn_name)
    for index, group in enumerate(groups, 1):
        if provider_of(group) == last:
            return (*groups[index:], *groups[:index])
    return groups


def provider_of(group: Group) -> str:
    """The provider whose routes these are, "" for none."""
    return next((routes[0].provider.name for routes in group if routes), "")


def _credentials_turned(routes: tuple[Route, ...], state: RoutingState) -> tuple[Route, ...]:
    """The routes of one model, starting behind the credential that served it last."""
    if len(routes) < 2:
        return routes
    last = state.turns.get(routes[0].keys[2])
    for index, route in enumerate(routes, 1):
        if route.credential.id == last:
            return (*routes[index:], *routes[:index])
    return routes


def _fallback_groups(catalogue: Catalogue, choice: Choice, state: RoutingState, strategy: str, fallback: str) -> tuple[Group, ...]:
    """Where an explicit choice goes when its own routes fail: the same model elsewhere, then (chain) the carousel."""
    ids = dict.fromkeys(routes[0].model.id for group in choice.groups for routes in group[:1] if routes)
    same = tuple(group for model_id in ids for group in catalogue.models.get(model_id, ()))
    if fallback == "same-model":
        return same
    return (*same, *_turned(Choice("*", catalogue.whole, True, False), state, strategy))


def hindrance(state: RoutingState, route: Route, now: float) -> Cooldown | None:
    """The cooldown that keeps `route` out for longest, proven ones before guesses; one that has ended but is being probed counts too."""
    found = [cooldown for key in route.keys if (cooldown := state.cooling.get(key)) is not None and (cooldown.until_at > now or cooldown.probing)]
    return max(found, key=lambda cooldown: (cooldown.proven and cooldown.until_at > now, cooldown.until_at)) if found else None


def is_listed(route: Route) -> bool:
    """Whether configuration knows the model: of names that clients make up nothing is remembered."""
    return route.model in route.provider.models or route.model.id == route.provider.default


def begin_attempt(state: RoutingState, choice: Choice, route: Route) -> None:
    """Remember that `route` is being asked: the turn moves on, and ended cooldowns of it are being probed."""
    if choice.rotates:
        state.turns[choice.turn_name] = route.provider.name
    if len(route.provider.credentials) > 1 and is_listed(route):
        state.turns[route.keys[2]] = route.credential.id
    for key in route.keys if state.cooling else ():
        if key in state.cooling:
            state.cooling[key].probing = True


def end_probe(state: RoutingState, route: Route) -> None:
    """The attempt on `route` ended without saying anything about it."""
    for key in route.keys if state.cooling else ():
        if key in state.cooling:
            state.cooling[key].probing = False


def clear(state: RoutingState, route: Route) -> None:
    """A success of `route` ends every cooldown over it."""
    for key in route.keys if state.cooling else ():
        state.cooling.pop(key, None)


def learn_refused(state: RoutingState, route: Route, failure: UpstreamFailure, body: Mapping[str, Any]) -> bool:
    """Remember the one optional field that a provider refused; whether the same request without it is worth another try."""
    name = re.split(r"[.\[]", failure.param or "")[0]
    known = state.refused.get(route.keys[2], frozenset())
    if failure.kind != "parameter" or name in known or name in _ESSENTIAL_FIELDS or name not in body or not is_listed(route):
        return False
    state.refused[route.keys[2]] = known | {name}
    return True


#: Fields whose loss would change what is asked for.
_ESSENTIAL_FIELDS = frozenset({"model", "messages", "stream", "tools", "tool_choice", "response_format", "functions", "input", "prompt", "system", "n"})


def cool(state: RoutingState, route: Route, failure: UpstreamFailure, now: float, *, jitter: float) -> Cooldown | None:
    """Note a failure: how long what is left out, None when nothing cools. `jitter` is 0..1 and moves guesses by up to a fifth.

    Failures that arrive while their cooldown runs (requests sent before it) do not add strikes.
    """
    end_probe(state, route)
    if not failure.scope or (failure.scope in ("model", "route") and not is_listed(route)):
        return None
    rule = FAILURE_RULES[failure.kind]
    key = route.keys[SCOPES[failure.scope]]
    before = state.cooling.get(key)
    if before is not None and before.until_at > now and not failure.proven:
        return before
    strikes = before.strikes + 1 if before is not None else 1
    if failure.proven and failure.cool_s is not None:
        span_s = failure.cool_s
    else:
        first_s = failure.cool_s if failure.cool_s is not None else rule.first_cool_s
        span_s = min(rule.cap_s, first_s * 2.0 ** min(strikes - 1, 20) * (0.8 + 0.4 * jitter))
    if len(state.cooling) >= _MAX_COOLDOWNS and key not in state.cooling:
        del state.cooling[min(state.cooling, key=lambda name: state.cooling[name].until_at)]
    state.cooling[key] = cooldown = Cooldown(key, failure.kind, failure.reason, now + span_s, strikes, failure.proven)
    return cooldown


##############################################################################
# 8. Event streams                                          pure | uses 1-2
##############################################################################
# Nothing here waits: feed() returns what a chunk completes and keeps the rest.  Bytes are held until a frame is whole and
# text is decoded per frame, so a chunk may end inside a UTF-8 sequence or between CR and LF.
# Source: WHATWG HTML, 9.2 Server-sent events.  Guarded by tests/test_sse.py: every sample, cut at every byte.

#: One server-sent event larger than this is a fault of the provider (images in answers stay under it).
MAX_EVENT_BYTES = 8 * 1024 * 1024

_BLANK_LINE = re.compile(rb"\r\n\r\n|\n\n|\r\r(?!\n)|\n\r\n|\r\n\n")
_LINE_END = re.compile(r"\r\n|\n|\r")


class Event(NamedTuple):
    """One server-sent event: its name ("" when the stream gave none), its data, and the frame as it came with its blank line."""
    name: str
    data: str
    raw: bytes


class FrameSplitter:
    """Cuts a byte stream into whole SSE frames, blank line included; what is unfinished stays inside."""

    __slots__ = ("rest", "_began", "_searched")

    def __init__(self) -> None:
        self.rest = b""
        self._began = False     # past the byte order mark
        self._searched = 0      # no blank line ends before here

    def feed(self, chunk: bytes) -> bytes:
        """All frames that `chunk` completes, as one piece of bytes. Raises UpstreamFailure past MAX_EVENT_BYTES."""
        buffer = self.rest + chunk if self.rest else chunk
        if not self._began and buffer:
            if buffer[:3] != b"\xef\xbb\xbf"[:len(buffer[:3])]:
                self._began = True
            elif len(buffer) < 3:
                self.rest = buffer
                return b""
            else:
                buffer, self._began = buffer[3:], True
        cut = buffer.rfind(b"\n\n") + 2
        if cut < 2 or buffer.find(b"\r", cut) >= 0:
            cut = max(cut if cut >= 2 else 0, self._last_blank(buffer, cut if cut >= 2 else self._searched))
        self.rest = buffer[cut:]
        self._searched = max(0, len(self.rest) - 3)
        if len(self.rest) > MAX_EVENT_BYTES:
            raise UpstreamFailure("server", "too_big", f"one event is larger than {MAX_EVENT_BYTES} bytes", phase="body")
        return buffer[:cut]

    @staticmethod
    def _last_blank(buffer: bytes, start: int) -> int:
        """Where the last blank line at or after `start` ends, 0 for none; a CR in last place may be half of a CRLF."""
        end = 0
        for match in _BLANK_LINE.finditer(buffer, start):
            if match.end() < len(buffer) or buffer[-1:] != b"\r":
                end = match.end()
        return end


def split_frames(block: bytes) -> list[bytes]:
    """The frames of a block that FrameSplitter.feed returned, each with its blank line; a last one may lack it."""
    if b"\r" not in block:
        frames = [frame + b"\n\n" for frame in block.split(b"\n\n")]
        tail = frames.pop()[:-2]
        return frames + [tail] if tail else frames
    frames, start = [], 0
    for match in _BLANK_LINE.finditer(block):
        frames.append(block[start:match.end()])
        start = match.end()
    return frames + [block[start:]] if start < len(block) else frames


def read_frame(frame: bytes) -> Event:
    """Name and data of one frame; data is "" for comments and frames without any."""
    name, data = "", []
    for line in _LINE_END.split(frame.decode("utf-8", "replace")):
        label, _, value = line.partition(":")
        value = value[1:] if value[:1] == " " else value
        if label == "data":
            data.append(value)
        elif label == "event":
            name = value
    return Event(name, "\n".join(data), frame)


class EventReader:
    """Bytes in, whole events out: FrameSplitter and read_frame together, for readers that look at every event."""

    __slots__ = ("_splitter",)

    def __init__(self) -> None:
        self._splitter = FrameSplitter()

    def feed(self, chunk: bytes) -> list[Event]:
        """Events with data that `chunk` completes, in order."""
        return [event for event in map(read_frame, split_frames(self._splitter.feed(chunk))) if event.data]

    def close(self) -> list[Event]:
        """The unfinished last event, if its data is whole JSON: some providers leave out the last blank line."""
        event = read_frame(self._splitter.rest)
        self._splitter.rest = b""
        return [event] if whole_json(event.data) or event.data.strip() == "[DONE]" else []


def whole_json(text: str) -> bool:
    """Whether `text` is one complete JSON value."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def write_event(data: Json, name: str = "") -> bytes:
    """One SSE frame with compact JSON; `name` adds an event line."""
    head = b"event: " + name.encode() + b"\n" if name else b""
    return head + b"data: " + dump_json(data) + b"\n\n"


def dump_json(value: Any) -> bytes:
    """Compact ASCII JSON: safe for lone surrogates, which UTF-8 is not."""
    return _ENCODER.encode(value).encode("ascii")


_ENCODER = json.JSONEncoder(separators=(",", ":"))


##############################################################################
# 10. OpenAI Chat                                           pure | uses 1-3, 8
##############################################################################
# Chat Completions as clients send it and providers answer it, relayed in the provider's own bytes.  ChatPassage watches a
# stream go by and looks closely only where an event differs from the one before it in more than its text.
# Source: OpenAI API reference, Chat Completions, read 2026-11; how streams end: README "What a broken stream looks like".

#: Body fields that other gateways obey and this one never does; they are not forwarded either.
ROUTING_FIELDS = frozenset({"api_base", "base_url", "api_key", "headers", "extra_headers", "extra_body", "custom_llm_provider", "mock_response", "fallbacks", "user_config"})

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_NUMBER = (int, float)
_CHAT_FIELDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "model": ((str,), "a string"),
    "stream": ((bool,), "a boolean"),
    "stream_options": ((dict,), "an object"),
    "max_tokens": ((int,), "an integer"),
    "max_completion_tokens": ((int,), "an integer"),
    "n": ((int,), "an integer"),
    "temperature": (_NUMBER, "a number"),
    "top_p": (_NUMBER, "a number"),
    "presence_penalty": (_NUMBER, "a number"),
    "frequency_penalty": (_NUMBER, "a number"),
    "seed": ((int,), "an integer"),
    "stop": ((str, list), "a string or a list"),
    "tools": ((list,), "a list"),
    "tool_choice": ((str, dict), "a string or an object"),
    "parallel_tool_calls": ((bool,), "a boolean"),
    "response_format": ((dict,), "an object"),
    "logprobs": ((bool,), "a boolean"),
    "top_logprobs": ((int,), "an integer"),
    "logit_bias": ((dict,), "an object"),
    "user": ((str,), "a string"),
    "metadata": ((dict,), "an object"),
    "reasoning_effort": ((str,), "a string"),
}
_ANYTHING: tuple[tuple[type, ...], str] = ((object,), "")
_AT_LEAST_ONE = ("max_tokens", "max_completion_tokens", "n")


def check_chat_request(body: Any) -> Json:
    """The body when it is a Chat request by its structure. Raises GatewayError 400 that names the first field that is not."""
    if not isinstance(body, dict):
        raise bad_request("The body must be a JSON object.")
    for name, value in body.items():
        types, expected = _CHAT_FIELDS.get(name, _ANYTHING)
        if value is not None and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types and object not in types)):
            raise bad_request(f"{name} must be {expected}.", param=name, code="invalid_type")
    for name in _AT_LEAST_ONE:
        if body.get(name) is not None and body[name] < 1:
            raise bad_request(f"{name} must be at least 1.", param=name, code="invalid_value")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad_request("messages must be a list with at least one message.", param="messages", code="invalid_type")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]")
    for index, tool in enumerate(body.get("tools") or ()):
        if not isinstance(tool, dict) or not isinstance(tool.get("type", "function"), str):
            raise bad_request(f"tools[{index}] must be an object with a type.", param=f"tools[{index}]", code="invalid_type")
        function = tool.get("function")
        if tool.get("type", "function") == "function" and (not isinstance(function, dict) or not isinstance(function.get("name"), str)):
            raise bad_request(f"tools[{index}].function must be an object with a name.", param=f"tools[{index}].function", code="invalid_type")
    return body


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict):
        raise bad_request(f"{where} must be an object.", param=where, code="invalid_type")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        raise bad_request(f"{where}.role must be one of {', '.join(sorted(_ROLES))}.", param=f"{where}.role", code="invalid_value")
    if content is not None and not isinstance(content, str):
        if not isinstance(content, list) or any(not isinstance(part, dict) or not isinstance(part.get("type"), str) for part in content):
            raise bad_request(f"{where}.content must be a string or a list of parts with a type.", param=f"{where}.content", code="invalid_type")
    if content is None and role in ("system", "developer", "user"):
        raise bad_request(f"{where}.content is missing.", param=f"{where}.content", code="missing_required_parameter")
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        raise bad_request(f"{where}.tool_call_id is missing.", param=f"{where}.tool_call_id", code="missing_required_parameter")
    calls = message.get("tool_calls")
    if calls is not None and (not isinstance(calls, list) or not all(map(_is_call, calls))):
        raise bad_request(f"{where}.tool_calls must be a list of calls with id and function.", param=f"{where}.tool_calls", code="invalid_type")


def _is_call(call: Any) -> bool:
    if not isinstance(call, dict) or not isinstance(call.get("id"), str):
        return False
    function = call.get("function", call.get("custom"))
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def chat_pass_request(raw: bytes, body: Json, wire_model: str, preset: Preset, refused: Collection[str] = ()) -> tuple[bytes, tuple[str, ...]]:
    """The provider's body for a Chat request that passes through, and the names of the fields left out.

    in: the client's bytes and the same parsed    out: those bytes with another model, or new ones where more has to change
    refused: fields this model has been seen to refuse, beyond those the preset knows
    """
    dropped = [name for name in (*preset.rejects, *refused) if name in body]
    changes: Json = {} if body.get("model") == wire_model else {"model": wire_model}
    if body.get("stream") and preset.stream_options and not (body.get("stream_options") or {}).get("include_usage"):
        changes["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
    messages = _fit_messages(body["messages"], preset)
    if messages is not body["messages"]:
        changes["messages"] = messages
    other_max = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}.get(preset.max_field)
    renamed = {name: other for name, other in preset.renames.items() if name in body}
    changes |= {other: body[name] for name, other in renamed.items()}
    removed = {*dropped, *renamed, *ROUTING_FIELDS.intersection(body)}
    if other_max in body:
        removed.add(other_max)
        changes.setdefault(preset.max_field, body.get(preset.max_field) or body[other_max])
    if not removed:
        spliced = splice_fields(raw, body, changes)
        if spliced is not None:
            return spliced, ()
    return dump_json({name: value for name, value in {**body, **changes}.items() if name not in removed}), tuple(dropped)


def _fit_messages(messages: list[Json], preset: Preset) -> list[Json]:
    """The messages without fields the provider rejects and with its word for developer; the same list when nothing changes."""
    unwanted = set(preset.message_rejects)
    rename = preset.system_role if any(message["role"] == "developer" for message in messages) else ""
    if not rename and not any(unwanted.intersection(message) for message in messages):
        return messages
    fitted = [{name: value for name, value in message.items() if name not in unwanted} for message in messages]
    return [{**message, "role": rename} if rename and message["role"] == "developer" else message for message in fitted]


_MODEL_KEY = re.compile(rb'"(?:m|\\u006[dD])(?:o|\\u006[fF])(?:d|\\u0064)(?:e|\\u0065)(?:l|\\u006[cC])"')     # however its letters are escaped
_MODEL_FIELD = re.compile(rb'"model"\s*:\s*"((?:[^"\\]|\\.)*)"')


def splice_fields(raw: bytes, body: Json, changes: Json) -> bytes | None:
    """`raw` with changed or added top-level fields, without writing the rest anew; None where that is not safe."""
    if not changes:
        return raw
    new = dict(changes)
    if "model" in new and "model" in body:
        if raw.count(b'"model"') != 1 or (b"\\u00" in raw and len(_MODEL_KEY.findall(raw)) != 1) or not (match := _MODEL_FIELD.search(raw)):
            return None
        raw = raw[:match.start(1)] + dump_json(new.pop("model"))[1:-1] + raw[match.end(1):]
    if any(name in body for name in new):
        return None
    if new:
        raw = raw.rstrip()[:-1].rstrip() + b"," + dump_json(new)[1:]
    return raw


def chat_error(error: GatewayError) -> Json:
    """The envelope of an error, as a body and as an event in a stream."""
    attempts = {"attempts": error.attempts} if error.attempts else {}
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code, **attempts}}


def chat_usage(body: Json) -> Usage | None:
    """Usage of an answer or a chunk, wherever the provider puts it; None when there is none."""
    own = body.get("x_groq")
    usage = body.get("usage") or (own.get("usage") if isinstance(own, dict) else None)
    if not isinstance(usage, dict):
        return None
    prompt, output = usage.get("prompt_tokens_details") or {}, usage.get("completion_tokens_details") or {}
    cached = prompt.get("cached_tokens") if isinstance(prompt, dict) else None
    return Usage(_count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")), _count(cached or usage.get("prompt_cache_hit_tokens")),
                 _count(prompt.get("cache_write_tokens") if isinstance(prompt, dict) else None), _count(output.get("reasoning_tokens") if isinstance(output, dict) else None))


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


#: What a delta or a message must hold one of to be an answer at all.
_CONTENT_FIELDS = ("content", "tool_calls", "reasoning_content", "reasoning", "reasoning_text", "reasoning_details", "thinking", "refusal", "function_call", "audio", "images", "annotations")
#: Stops that may rightly come with nothing to show.
_SILENT_STOPS = frozenset({"length", "content_filter", "max_tokens"})


_CONTENT_START = re.compile(rb'"content"\s*:\s*"')
_STRING_END = re.compile(rb'(?:[^"\\]|\\.)*"')


#: Above this a block is a flood: its events are compared as one, and a text that is no JSON string would pass.
_MANY_EVENTS_BYTES = 4096


def _is_string(frame: bytes, start: int, end: int) -> bool:
    """Whether frame[start:end] is the inside of a JSON string: no bare quote, control character or wrong escape."""
    return _STRING_INSIDE.fullmatch(frame, start, end) is not None


_STRING_INSIDE = re.compile(rb'(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*')


def _content_bytes(part: Any) -> int:
    """How much of an answer a delta or a message holds, for an estimate."""
    if not isinstance(part, dict):
        return 0
    return sum(len(value.encode("utf-8", "replace")) if isinstance(value, str) else len(dump_json(value)) for name in _CONTENT_FIELDS if (value := part.get(name)))


def _has_content(part: Any) -> bool:
    return isinstance(part, dict) and any(part.get(name) for name in _CONTENT_FIELDS)


def find_chat_error(body: Any) -> Any:
    """The part of a 200 body or of a stream event that says it is an error, None when it is not one."""
    if isinstance(body, list) and len(body) == 1:
        return find_chat_error(body[0])
    if not isinstance(body, dict):
        return None
    status = body.get("base_resp")
    if isinstance(status, dict) and status.get("status_code") not in (None, 0):
        return body
    if body.get("error") or (body.get("object") == "error") or (body.get("type") == "error") or (body.get("success") is False and body.get("errors")):
        return body
    choices = body.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return body if isinstance(first, dict) and (first.get("finish_reason") == "error" or first.get("error")) else None


def _error_in_json(raw: bytes) -> Any:
    """What find_chat_error finds in a body, None when it is not JSON."""
    try:
        return find_chat_error(json.loads(raw))
    except (ValueError, RecursionError):
        return None


def judge_chat_answer(body: Any) -> tuple[str, Usage | None]:
    """Whether a whole body is a Chat answer: ("", usage) when it is, else why not (not_json, empty_answer)."""
    if not isinstance(body, dict) or not isinstance(body.get("choices"), list):
        return "not_json", None
    choices = [choice for choice in body["choices"] if isinstance(choice, dict) and isinstance(choice.get("message"), dict)]
    if len(choices) != len(body["choices"]):
        return "not_json", None
    if not any(_has_content(choice["message"]) or str(choice.get("finish_reason")) in _SILENT_STOPS for choice in choices):
        return "empty_answer", None
    return "", chat_usage(body)


class ChatPassage:
    """A provider's Chat stream on its way through: feed() and close() give what may go to the client, attributes tell what was seen.

    Only whole events leave.  Nothing leaves after the end, after an error, or after garbage.
    """

    __slots__ = ("content", "done", "usage", "error", "broken", "n_content_bytes", "n_signs", "_reason", "_unfinished", "_finished", "_wants_usage", "_n_prompt_tokens", "_usage_shown", "_echo", "_frames", "_prefix", "_suffix", "_last", "_called")

    def __init__(self, *, wants_usage: bool, echo_model: str | None = None, n_prompt_tokens: int = 0) -> None:
        """n_prompt_tokens: an estimate, for a client that wants usage from a provider that tells none."""
        self.content = False                #: something of the answer itself has come
        self.done = False                   #: the end mark has come
        self.usage: Usage | None = None
        self.error: Any = None              #: what find_chat_error found
        self.broken = ""                    #: why the stream cannot be trusted further: not_json, too_big
        self.n_content_bytes = 0            #: for an estimate where no usage comes
        self.n_signs = 0                    #: grows with every sign of life: events, and comments once an event has come
        self._reason: str | None = None     #: the first finish reason
        self._unfinished: set[str] = set()  #: choices that have begun and not finished
        self._finished: set[str] = set()
        self._wants_usage = wants_usage
        self._n_prompt_tokens = n_prompt_tokens
        self._usage_shown = False
        self._echo = echo_model
        self._frames = FrameSplitter()
        self._prefix = self._suffix = b""   #: what the last event of plain text had around its text
        self._last: Json = {}
        self._called = False

    @property
    def finish(self) -> str | None:
        """The first finish reason, once every choice that has begun has one."""
        return self._reason if not self._unfinished else None

    def feed(self, chunk: bytes) -> bytes:
        """What of `chunk`, and of what was kept before it, may go to the client now."""
        if self.done or self.error or self.broken:
            return b""
        try:
            block = self._frames.feed(chunk)
        except UpstreamFailure as failure:
            self.broken = failure.reason
            return b""
        if not block:
            return b""
        return self._look(block)

    def close(self) -> bytes:
        """The provider's connection has ended: what is still owed to the client. Sets `broken` to cut or empty_answer when it ended wrongly."""
        if self.error or self.broken:
            return b""
        rest = self._frames.rest
        if not self.n_signs and rest.lstrip()[:1] in (b"{", b"["):
            self.error, self.broken = _error_in_json(rest), "not_json"      # a body that is no stream at all
            return b""
        event = read_frame(rest)
        out = self._look(rest + b"\n\n") if not self.done and event.data and (event.data.strip() == "[DONE]" or whole_json(event.data)) else b""
        if self.done or self.error or self.broken:
            return out
        if self.finish is not None:
            self.done = True
            return out + self._end()
        self.broken = "cut" if self.content else "empty_answer"
        return out

    def _look(self, block: bytes) -> bytes:
        """Every event of the block; a run of plain text is passed on as one. One loop kept whole: it runs per event."""
        frames = split_frames(block) if b"\r" in block else None
        position, out, try_run = 0, [], True
        while position < len(block) and not (self.done or self.error or self.broken):
            end = self._end_of_run(block, position) if try_run else 0
            try_run = bool(end)
            if not end:
                end = position + len(frames.pop(0)) if frames else block.find(b"\n\n", position) + 2
                end = end if end > position else len(block)
                frame, learned = block[position:end], self._prefix
                out.append(self._look_at(frame))
                try_run = self._prefix is not learned
            else:
                out.append(block[position:end])
                frames = None if frames is None else split_frames(block[end:])
            position = end
        self.n_signs += self.content
        return b"".join(out)

    def _end_of_run(self, block: bytes, position: int) -> int:
        """Where a run of events that differ in nothing but their text ends, 0 where none of some length begins."""
        prefix, suffix = self._prefix, self._suffix
        if not prefix or len(block) - position < _MANY_EVENTS_BYTES or not block.startswith(prefix, position):
            return 0
        end = block.rfind(suffix, position) + len(suffix)
        n_frames = block.count(suffix + prefix, position, end) + 1
        if block.count(b"\n", position, end) != 2 * n_frames:
            return 0
        self.n_content_bytes += end - position - n_frames * (len(prefix) + len(suffix))
        return end

    def _look_at(self, frame: bytes) -> bytes:
        """One event; when it is the last one with another text it needs no closer look."""
        prefix, suffix = self._prefix, self._suffix
        if prefix and frame.startswith(prefix) and frame.endswith(suffix) and _is_string(frame, len(prefix), len(frame) - len(suffix)):
            self.n_content_bytes += len(frame) - len(prefix) - len(suffix)
            return frame
        event = read_frame(frame)
        if event.data:
            return self._take(event)
        self.n_signs += bool(self.n_signs)
        return frame if self.content else b""

    def _take(self, event: Event) -> bytes:
        """One event with data."""
        self.n_signs += 1
        if event.data.strip() == "[DONE]":
            self.done = True
            return self._end(event.raw) if self.finish is not None or self.content else b""
        try:
            chunk = json.loads(event.data)
        except (ValueError, RecursionError):
            chunk = None
        found = find_chat_error(chunk) if event.name != "error" else chunk or {"error": event.data}
        if found is not None or not isinstance(chunk, dict):
            if self.finish is not None:
                self.done = True            # an error behind a proper end changes nothing that was said
                return self._end()
            self.error, self.broken = found, "" if found is not None else "not_json"
            return b""
        return self._take_chunk(chunk, event.raw)

    def _take_chunk(self, chunk: Json, raw: bytes) -> bytes:
        self.usage = chat_usage(chunk) or self.usage
        self._usage_shown = self._usage_shown or isinstance(chunk.get("usage"), dict)
        choices = chunk.get("choices")
        if choices is not None and (not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices)):
            self.broken = "not_json"
            return b""
        if not choices:
            only_usage = isinstance(choices, list) and chunk.get("usage") and not self._wants_usage
            return b"" if only_usage else self._named(chunk, raw)
        self._last = chunk
        for choice in choices:
            part, reason = choice.get("delta") or choice.get("message"), choice.get("finish_reason")
            self.content = self.content or _has_content(part)
            self.n_content_bytes += _content_bytes(part)
            self._called = self._called or bool(isinstance(part, dict) and part.get("tool_calls"))
            index = str(choice.get("index"))
            if isinstance(reason, str) and reason:
                self._reason = self._reason or reason
                self._unfinished.discard(index)
                self._finished.add(index)
            elif index not in self._finished:
                self._unfinished.add(index)
        if self.finish in _SILENT_STOPS:
            self.content = True
        self._learn(choices, raw)
        return self._named(chunk, raw)

    def _learn(self, choices: Any, raw: bytes) -> None:
        """Keep what stands around the text of a plain text event, so that the next like it need no look."""
        self._prefix = self._suffix = b""
        delta = choices[0].get("delta") if len(choices) == 1 and isinstance(choices[0], dict) else None
        text = delta.get("content") if isinstance(delta, dict) else None
        if not isinstance(delta, dict) or not isinstance(text, str) or not text or self._echo or not raw.endswith(b"\n\n") or b"\r" in raw:
            return
        if any(delta.get(name) for name in _CONTENT_FIELDS[1:]) or choices[0].get("finish_reason") or raw.count(b'"content"') != 1:
            return
        start = _CONTENT_START.search(raw)
        end = _STRING_END.match(raw, start.end()) if start else None
        if start and end and raw.count(b"\n") == 2:
            self._prefix, self._suffix = raw[:start.end()], raw[end.end() - 1:]

    def _named(self, chunk: Json, raw: bytes) -> bytes:
        """The frame, under the client's own model name when it is to be echoed."""
        return write_event({**chunk, "model": self._echo}) if self._echo and "model" in chunk else raw

    def _owed_usage(self) -> bytes:
        """The usage chunk that the client asked for and the provider left out or put elsewhere; an estimate where it told nothing."""
        usage = self.usage or Usage(self._n_prompt_tokens, max(1, self.n_content_bytes // 4), estimated=True)
        told = {"prompt_tokens": usage.input, "completion_tokens": usage.output, "total_tokens": usage.input + usage.output}
        chunk: Json = {**{name: self._last.get(name) for name in ("id", "object", "created", "model")}, "choices": [], "usage": told}
        return self._named(chunk, write_event(chunk))

    def _end(self, mark: bytes = b"") -> bytes:
        """The end mark; before it the finish chunk that a provider left out, without which some clients ask again for ever."""
        owed, reason = b"", "tool_calls" if self._called else "stop"
        for index in sorted(self._unfinished):
            head = {name: self._last.get(name) for name in ("id", "object", "created", "model")}
            chunk = {**head, "choices": [{"index": int(index) if index.isdigit() else 0, "delta": {}, "finish_reason": reason}]}
            owed += self._named(chunk, write_event(chunk))
        self._unfinished.clear()
        self._reason = self._reason or reason
        if self._wants_usage and not self._usage_shown and self._last:
            owed += self._owed_usage()
        return owed + (mark if mark.endswith((b"\n\n", b"\r\n\r\n", b"\r\r")) else b"data: [DONE]\n\n")


##############################################################################
# 12. Anthropic Messages                                    pure | uses 1-2
##############################################################################
# The envelope of errors for clients that speak Messages.  Source: Anthropic API reference, Errors, read 2026-11.

_MESSAGES_ERROR_TYPES: Mapping[int, str] = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error", 529: "overloaded_error",
}


def messages_error(error: GatewayError) -> Json:
    """The envelope of an error, as a body and as an event in a stream."""
    kind = _MESSAGES_ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


##############################################################################
# 14. World                                                 I/O | uses 1
##############################################################################
# The only way to time, chance and the network: nothing below asks `time`, `random` or a resolver by itself, so a test can
# hand in its own.  Waits are Alarms: pushing one back is one attribute write, not a task and not a new timer per chunk.

@dataclass(slots=True)
class World:
    """Time, chance and the network as the gateway sees them; one for the life of the process."""
    clock: Callable[[], float]                      #: monotonic seconds: the event loop's clock
    utc: Callable[[], float]                        #: seconds since the epoch
    sleep: Callable[[float], Awaitable[None]]
    random: Callable[[], float]                     #: 0.0 <= x < 1.0
    dial: Callable[..., Awaitable[Any]]             #: asyncio's create_connection


def real_world() -> World:
    """The world as it is. Call inside a running event loop."""
    loop = asyncio.get_running_loop()
    return World(loop.time, time.time, asyncio.sleep, random.random, loop.create_connection)


def _ring_nobody() -> None:
    """What a stopped alarm calls."""


class Alarm:
    """Calls `ring` once, when `set` was not called again in time.  Its timer is kept and looks at `due_at` when it fires."""

    __slots__ = ("due_at", "_loop", "_ring", "_timer")

    def __init__(self, ring: Callable[[], None]) -> None:
        self.due_at = float("inf")
        self._loop = asyncio.get_running_loop()
        self._ring = ring
        self._timer: asyncio.TimerHandle | None = None

    def set(self, after_s: float) -> None:
        """Ring `after_s` seconds from now, whatever was set before."""
        self.due_at = due_at = self._loop.time() + after_s
        timer = self._timer
        if timer is None or timer.when() > due_at:
            if timer is not None:
                timer.cancel()
            self._timer = self._loop.call_at(due_at, self._look)

    def rest(self) -> None:
        """Do not ring until set again; the timer is left to run out, which is cheaper than cancelling it."""
        self.due_at = float("inf")

    def stop(self) -> None:
        """Never ring again, and hold nothing: an alarm and what it rings would else keep each other until a garbage collection."""
        self.rest()
        self._ring = _ring_nobody
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self.due_at == float("inf"):
            return
        if self._loop.time() >= self.due_at:
            self.due_at = float("inf")
            self._ring()
        else:
            self._timer = self._loop.call_at(self.due_at, self._look)


##############################################################################
# 15. HTTP                                                  I/O | uses 1-2
##############################################################################
# Heads by h11 on both sides, bodies by hand: h11 is the judge of what may stand in a head, and costs too much per chunk
# of a body.  h11 is lenient in four ways that are closed here: bare LF or CR as a line end, Content-Length together with
# Transfer-Encoding, chunk extensions, and no cap on the number of headers.  Source: RFC 9112.

MAX_HEAD_BYTES = 64 * 1024
MAX_CLIENT_HEADERS = 100
MAX_PROVIDER_HEADERS = 200

_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]{0,8}\r\n")
_CONTENT_LENGTH = re.compile(r"[0-9]{1,15}")


class BadHttp(Exception):
    """A message that breaks HTTP; `status` is what a client is told, `answerable` whether it can still be told."""

    def __init__(self, why: str, status: int = 400) -> None:
        super().__init__(why)
        self.status = status


class Framing(NamedTuple):
    """How the end of a body is known: kind is none, length, chunked or eof."""
    kind: str
    n_bytes: int = 0


def find_head_end(buffer: bytes | bytearray) -> int:
    """Where the head in `buffer` ends (behind its blank line), 0 when it is not whole. Raises BadHttp when it cannot become one."""
    end = buffer.find(b"\r\n\r\n") + 4
    if end >= 4 and end <= MAX_HEAD_BYTES:
        return end
    if end > MAX_HEAD_BYTES or len(buffer) > MAX_HEAD_BYTES:
        raise BadHttp("the head is too large", 431)
    if _BARE_END.search(buffer):
        raise BadHttp("a line of the head ends without CR LF")
    return 0


_BARE_END = re.compile(rb"\n\n|(?<!\r)\n\r\n")


def check_lines(head: bytes, max_headers: int) -> None:
    """Raises BadHttp for a lone CR or LF and for too many headers; h11 would take both."""
    n_lines = head.count(b"\r\n")
    if head.count(b"\n") != n_lines or head.count(b"\r") != n_lines:
        raise BadHttp("a lone CR or LF in the head")
    if n_lines - 2 > max_headers:
        raise BadHttp(f"more than {max_headers} headers", 431)


def parse_request_head(head: bytes) -> tuple[str, str, str, dict[str, str]]:
    """Method, target, version and headers of a request head. Header names are lower case; repeated ones are joined, but for the
    few that must be alone. Raises BadHttp."""
    lengths = list(_LENGTH_LINE.finditer(head))
    if len(lengths) > 1 or (lengths and lengths[0][1] is None):
        raise BadHttp("Content-Length is not one number")       # h11 would join equal ones
    length = lengths[0] if lengths else None
    plain = head[:length.start(1)] + b"0" + head[length.end(1):] if length else head
    method, target, version, headers = (_known_request_head if len(head) <= _KEPT_HEAD_BYTES else _judge_request_head)(plain)
    return method, target, version, {**headers, "content-length": length[1].decode("ascii")} if length else dict(headers)


def _judge_request_head(head: bytes) -> tuple[str, str, str, Mapping[str, str]]:
    """What h11 and this section's own rules make of a head."""
    check_lines(head, MAX_CLIENT_HEADERS)
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
    try:
        connection.receive_data(head)
        event = connection.next_event()
    except h11.RemoteProtocolError as error:
        raise BadHttp(str(error), error.error_status_hint) from error
    if type(event) is not h11.Request:
        raise BadHttp("not a request")
    headers: dict[str, str] = {}
    for name_bytes, value_bytes in event.headers.raw_items():
        name = name_bytes.decode("ascii").lower()
        if name in headers:
            if name in _ALONE:
                raise BadHttp(f"{name} is given twice")
            headers[name] += ", " + value_bytes.decode("latin-1")
        else:
            headers[name] = value_bytes.decode("latin-1")
    return event.method.decode("ascii"), event.target.decode("latin-1"), event.http_version.decode("ascii"), headers


#: A client sends the same head again and again but for its length; what h11 has judged byte for byte needs no second judgement.
_known_request_head = functools.lru_cache(maxsize=256)(_judge_request_head)
_KEPT_HEAD_BYTES = 4096
_LENGTH_LINE = re.compile(rb"\ncontent-length[ \t]*:(?:[ \t]*([0-9]{1,15})[ \t]*(?=\r\n))?", re.IGNORECASE)
_ALONE = frozenset({"authorization", "content-length", "content-type", "expect", "host", "origin", "transfer-encoding", "x-api-key"})


def parse_answer_head(head: bytes) -> tuple[int, list[tuple[str, str]]]:
    """Status and headers (names lower case) of a provider's answer. Raises BadHttp."""
    check_lines(head, MAX_PROVIDER_HEADERS)
    if len(head.translate(None, _NOT_IN_VALUES)) != len(head):
        raise BadHttp("a control character in the head")
    lines = head.split(b"\r\n")
    shape, values = [lines[0]], []
    for line in lines[1:-2]:
        name, colon, value = line.partition(b":")
        shape.append(name + b":0" if colon and name.lower() not in _FRAMING_FIELDS else line)
        values.append(value)
    judge = _known_answer_shape if len(head) <= _KEPT_HEAD_BYTES else _judge_answer_shape
    status, names = judge(b"\r\n".join(shape) + b"\r\n\r\n")
    if len(names) != len(values):
        raise BadHttp("folded or repeated framing lines in the head")
    return status, [(name, value.decode("latin-1").strip(" \t")) for name, value in zip(names, values)]


def _judge_answer_shape(head: bytes) -> tuple[int, tuple[str, ...]]:
    """Status and names as h11 reads them."""
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
    try:
        connection.receive_data(head)
        event = connection.next_event()
    except h11.RemoteProtocolError as error:
        raise BadHttp(str(error)) from error
    if type(event) is not h11.Response:
        raise BadHttp("not an answer")
    return event.status_code, tuple(name.decode("ascii").lower() for name, _ in event.headers.raw_items())


#: A provider's heads differ in their values: a date, an id, what is left of a limit.  h11 judges each shape once: the status line,
#: the names, and what frames the body; values without control characters are what h11 takes too.
_known_answer_shape = functools.lru_cache(maxsize=256)(_judge_answer_shape)
_FRAMING_FIELDS = frozenset({b"connection", b"transfer-encoding"})
_NOT_IN_VALUES = bytes([*range(9), 11, 12, *range(14, 32), 127])


def request_framing(version: str, headers: Mapping[str, str]) -> Framing:
    """How the body of a request ends. Raises BadHttp where two readers could disagree."""
    coding = headers.get("transfer-encoding")
    length = headers.get("content-length")
    if coding is not None:
        if length is not None:
            raise BadHttp("Content-Length together with Transfer-Encoding")
        if version != "1.1" or coding.strip().lower() != "chunked":
            raise BadHttp("Transfer-Encoding must be exactly chunked, and only in HTTP/1.1", 501)
        return Framing("chunked")
    if length is None:
        return Framing("none")
    if not _CONTENT_LENGTH.fullmatch(length):
        raise BadHttp("Content-Length is not a number")
    return Framing("length", int(length))


def answer_framing(status: int, headers: Collection[tuple[str, str]]) -> Framing:
    """How the body of a provider's answer ends. Raises BadHttp where it is ambiguous."""
    coding = length = None
    for name, value in headers:
        if name == "content-length":
            if length is not None:
                raise BadHttp("two Content-Lengths")
            length = value
        elif name == "transfer-encoding":
            if coding is not None or value.strip().lower() != "chunked":
                raise BadHttp("a Transfer-Encoding other than chunked")
            coding = value
    if coding is not None and length is not None:
        raise BadHttp("Content-Length together with Transfer-Encoding")
    if status in (204, 304):
        return Framing("none")
    if length is None:
        return Framing("eof" if coding is None else "chunked")
    if not _CONTENT_LENGTH.fullmatch(length):
        raise BadHttp("Content-Length is not a number")
    return Framing("length", int(length))


class BodyReader:
    """Takes the bytes behind a head and gives the body's: feed() until `done`; `rest` is what came after the end."""

    __slots__ = ("done", "rest", "bad", "_framing", "_left", "_trailer_bytes", "_in_trailer", "_after_chunk")

    def __init__(self, framing: Framing) -> None:
        self.rest = b""
        self.bad = ""                   #: what is wrong behind the pieces given out last
        self._framing = framing.kind
        self._left = framing.n_bytes
        self._in_trailer = self._after_chunk = False
        self._trailer_bytes = 0
        self.done = framing.kind == "none" or (framing.kind == "length" and not framing.n_bytes)

    def feed(self, data: bytes) -> bytes:
        """The body bytes in `data`. Raises BadHttp when the framing is broken: at the next call when good bytes came before."""
        if self.bad:
            raise BadHttp(self.bad)
        if self._in_trailer:
            self.rest += data
            self._end_trailer()
            return b""
        if self._framing == "chunked":
            return self._feed_chunked(data)
        if self._framing == "eof":
            return data
        body = data[:self._left]
        self._left -= len(body)
        if not self._left:
            self.done, self.rest = True, data[len(body):]
        return body

    def _feed_chunked(self, data: bytes) -> bytes:
        """Walks from chunk to chunk.  One loop kept whole: it runs once per event of a stream."""
        buffer = self.rest + data if self.rest else data
        pieces: list[bytes] = []
        position, n_bytes, left = 0, len(buffer), self._left
        in_bulk = n_bytes < _BULK_BYTES         # whether many chunks at once were looked for
        while True:
            if left:
                end = min(position + left, n_bytes)
                pieces.append(buffer[position:end])
                left -= end - position
                position = end
                self._after_chunk = not left
                if left:
                    break
            if self._after_chunk and buffer.startswith(b"\r\n", position):
                position, self._after_chunk = position + 2, False
            if not in_bulk and not self._after_chunk:
                position, in_bulk = _take_small_chunks(buffer, position, pieces), True
            size = None if self._after_chunk else _CHUNK_SIZE.match(buffer, position)
            if size is None:
                if not (_PART_OF_END if self._after_chunk else _PART_OF_SIZE).fullmatch(buffer, position):
                    self.bad = "a chunk that does not end or begin as it should"
                    if not pieces:
                        raise BadHttp(self.bad)
                break
            left = int(size[1], 16)
            if left <= _HELD_BYTES and left and n_bytes - size.end() < left + 2:
                left = 0                        # a small chunk is taken when it is whole: what looks at events gets whole ones
                break
            position = size.end()
            if not left:
                self._in_trailer = True
                break
        self._left, self.rest = left, buffer[position:]
        if self._in_trailer:
            self._end_trailer()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def give_up(self) -> bytes:
        """What of the last chunk has come, when no more will."""
        size = None if self._framing != "chunked" or self._left or self._after_chunk or self._in_trailer or self.bad else _CHUNK_SIZE.match(self.rest)
        held, self.rest = self.rest[size.end():size.end() + int(size[1], 16)] if size else b"", b""
        return held

    def _end_trailer(self) -> None:
        """Trailers are read and thrown away; their blank line ends the body."""
        while not self.done:
            end = self.rest.find(b"\r\n")
            if end < 0:
                if len(self.rest) + self._trailer_bytes > MAX_HEAD_BYTES or b"\n" in self.rest:
                    raise BadHttp("bad trailers")
                return
            self._trailer_bytes += end + 2
            self.done = end == 0
            self.rest = self.rest[end + 2:]


def _take_small_chunks(buffer: bytes, position: int, pieces: list[bytes]) -> int:
    """Adds the payloads of the whole chunks from `position` on, where no payload holds a CR LF; where it stopped."""
    parts = buffer[position:].rsplit(b"\r\n")      # the same as split here, in half the time
    n_taken = (len(parts) - 1) // 2 * 2
    sizes, payloads = parts[0:n_taken:2], parts[1:n_taken:2]
    known = {size: int(size, 16) for size in set(sizes) if _SIZE.fullmatch(size)}
    if len(payloads) < 4 or list(map(known.get, sizes)) != list(map(len, payloads)) or 0 in known.values():
        return position
    pieces += payloads
    return len(buffer) - sum(map(len, parts[n_taken:])) - 2 * (len(parts) - n_taken - 1)


_BULK_BYTES = 2048      #: reads shorter than this hold too few chunks for it to pay
_HELD_BYTES = 4096      #: chunks up to this size are given out whole
_SIZE = re.compile(rb"[0-9A-Fa-f]{1,8}")
_PART_OF_SIZE = re.compile(rb"[0-9A-Fa-f]{0,8}[ \t]{0,8}\r?")
_PART_OF_END = re.compile(rb"\r?")

_FIELD_JUNK = {code: None for code in (*range(0, 9), *range(10, 32), 127)}


def header_value(text: str) -> str:
    """`text` as it may stand in a header we write: one line of printable Latin-1."""
    return text.translate(_FIELD_JUNK).encode("latin-1", "replace").decode("latin-1").strip()


REASON_PHRASES: Mapping[int, str] = {
    200: "OK", 204: "No Content", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed",
    408: "Request Timeout", 411: "Length Required", 413: "Content Too Large", 415: "Unsupported Media Type", 417: "Expectation Failed", 421: "Misdirected Request",
    422: "Unprocessable Content", 426: "Upgrade Required", 429: "Too Many Requests", 431: "Request Header Fields Too Large", 500: "Internal Server Error",
    501: "Not Implemented", 502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout", 529: "Overloaded",
}


##############################################################################
# 16. Store                                                 I/O | uses 2
##############################################################################
# One SQLite file: gateway keys and a row per request.  Routing never depends on it being healthy.  Keys are written
# durably (synchronous=FULL) before anyone sees them; usage goes through one thread, so that no request waits for a disk.
# Two traps.  Never os.open() and close the database, its -wal or its -shm: that drops the locks of every other connection
# of this process (sqlite.org/howtocorrupt.html, 2.2).  Never shorten keys.epoch: a server has it mapped and would get SIGBUS.
# One more step of the schema: a row at the end of _MIGRATIONS; rows that were released are never edited.
# A database made by the seed (version 0, with api_keys, provider_settings, _migrations) passes the first step untouched.

_STORE_LOG = logging.getLogger("aicarousel.store")
_COMMAND_BUSY_S = 5.0
_WRITER_BUSY_S = 1.0       #: the writer thread tries again anyway, and close() should not wait long for it
_RING_BUSY_S = 0.2         #: the one read that may happen on the event loop
_RING_RETRY_S = 1.0
_BATCH_S = 0.1            #: rows are on disk within 0.3 s: this, and the time of one transaction
_RETRY_S = 1.0
_WARN_EVERY_S = 30.0
_MAX_WAITING_ROWS = 10_000
_MAX_COUNT = 10 ** 12      #: no honest count is larger; keeps what providers claim inside SQLite's integers, sums too
_EPOCH_BYTES = 8


class _Migration(NamedTuple):
    """One step of the schema; its number is its place in _MIGRATIONS, from 1."""
    name: str
    up: tuple[str, ...]
    down: tuple[str, ...]


_MIGRATIONS: tuple[_Migration, ...] = (
    # Columns and index names are the seed's.  Going down keeps everything: a key must never be lost.
    _Migration("keys", (
        """CREATE TABLE IF NOT EXISTS api_keys (
            id INTEGER PRIMARY KEY AUTOINCREMENT, key_hash TEXT NOT NULL UNIQUE, key_prefix TEXT NOT NULL, name TEXT,
            created_at TEXT DEFAULT (datetime('now')), last_used_at TEXT, is_active INTEGER DEFAULT 1, usage_count INTEGER DEFAULT 0)""",
        "CREATE INDEX IF NOT EXISTS idx_api_keys_hash ON api_keys(key_hash)",
        "CREATE INDEX IF NOT EXISTS idx_api_keys_active ON api_keys(is_active)",
    ), ()),
    # key_id refers to no table, so that a deleted key leaves its usage behind.
    _Migration("usage", (
        """CREATE TABLE usage (
            id INTEGER PRIMARY KEY, request_id TEXT NOT NULL UNIQUE, at_utc TEXT NOT NULL, key_id INTEGER NOT NULL, key_name TEXT NOT NULL,
            client_format TEXT NOT NULL, model TEXT NOT NULL, provider TEXT NOT NULL, credential TEXT NOT NULL, wire_model TEXT NOT NULL, route TEXT NOT NULL,
            input INTEGER NOT NULL, output INTEGER NOT NULL, cached INTEGER NOT NULL, cache_write INTEGER NOT NULL, reasoning INTEGER NOT NULL,
            cost_usd REAL, estimated INTEGER NOT NULL, status INTEGER NOT NULL, outcome TEXT NOT NULL, first_ms INTEGER, total_ms INTEGER NOT NULL,
            attempts INTEGER NOT NULL, streamed INTEGER NOT NULL)""",
        "CREATE INDEX idx_usage_at ON usage(at_utc)",
    ), ("DROP TABLE usage",)),
)

#: What an operator reads for SQLite's result codes: what was found, what was expected.
_DATABASE_TROUBLE: Mapping[str, tuple[str, str]] = {
    "SQLITE_NOTADB": ("a file that is not a database", "an AICarousel database; restore a backup or move this file away"),
    "SQLITE_CORRUPT": ("a damaged database", "a whole one; restore a backup or move this file away"),
    "SQLITE_BUSY": ("a database locked by another program", "it to be free; close that program and try again"),
    "SQLITE_LOCKED": ("a database locked by another program", "it to be free; close that program and try again"),
    "SQLITE_FULL": ("a full disk", "room for the database"),
    "SQLITE_READONLY": ("a database that may not be written", "a file and folder this user may write"),
    "SQLITE_CANTOPEN": ("a database that cannot be opened", "a file and folder this user may read and write"),
    "SQLITE_IOERR": ("a disk that fails to read or write", "a working disk with room"),
}


@contextlib.contextmanager
def _plain_trouble(path: Path) -> Iterator[None]:
    """Raises ConfigError for everything SQLite or the file system has against the database at `path`."""
    try:
        yield
    except sqlite3.Error as error:
        # Extended codes, such as SQLITE_IOERR_WRITE, begin with the name of the plain one.
        name = "_".join(getattr(error, "sqlite_errorname", "").split("_")[:2])
        found, expected = _DATABASE_TROUBLE.get(name, (f"an unusable database ({error})", "an AICarousel database"))
        raise ConfigError(str(path), found, expected) from error
    except OSError as error:
        raise ConfigError(str(error.filename or path), error.strerror or str(error), "a file and folder this user may read and write") from error


# Opening and schema

def _make_folder_of(path: Path) -> None:
    """Make the folders above `path` that are missing, 0700.  One that exists keeps its mode: it may be shared with other things."""
    for folder in reversed(path.absolute().parents):
        if not folder.exists():
            folder.mkdir(mode=0o700, exist_ok=True)


def _make_private(path: Path) -> None:
    """Make the database's file (0600) and folder where missing, and close an existing file to others."""
    _make_folder_of(path)
    if path.exists():
        _require_file(path)
    else:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    for suffix in ("", "-wal", "-shm"):      # SQLite gives new -wal and -shm files the mode of the database
        with contextlib.suppress(FileNotFoundError, PermissionError):
            Path(f"{path}{suffix}").chmod(0o600)


def _open_for_reading(path: Path, busy_s: float) -> sqlite3.Connection:
    """A connection that makes and changes no database, and whose closing moves no WAL; it may leave a -wal and -shm behind."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=busy_s, isolation_level=None)


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Everything or nothing of what is executed inside; waits for the write lock at its start, where waiting is safe."""
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


def _version_of(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _checked_version(connection: sqlite3.Connection, path: Path) -> int:
    """The schema's version.  Raises ConfigError when a newer program made it, since its rules are unknown here."""
    connection.execute("SELECT count(*) FROM sqlite_master")      # has the whole schema read, so that damage shows here
    version = _version_of(connection)
    if version > len(_MIGRATIONS):
        raise ConfigError(str(path), f"schema version {version}", f"at most {len(_MIGRATIONS)}; a newer AICarousel made it: use that one, or restore a backup")
    return version


def _write_backup(connection: sqlite3.Connection, path: Path) -> Path:
    """A whole copy beside the database, on disk before this returns; half a copy is removed."""
    stem = f"{path.stem}-backup-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-v{_version_of(connection)}"
    copy, n_copies = path.with_name(f"{stem}.db"), 1
    while copy.exists():
        n_copies += 1
        copy = path.with_name(f"{stem}-{n_copies}.db")
    handle = os.open(copy, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    with contextlib.ExitStack() as undo:
        undo.callback(copy.unlink)
        undo.callback(os.close, handle)
        connection.execute("VACUUM INTO ?", (str(copy),))     # takes an empty file, and does not sync it
        os.fsync(handle)
        undo.pop_all()
    os.close(handle)
    return copy


def _bring_up_to_date(connection: sqlite3.Connection, path: Path) -> list[str]:
    """Names of the migrations that were applied, each in a transaction of its own, after a backup of what there was."""
    pending = _MIGRATIONS[_checked_version(connection, path):]
    if pending and connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        _write_backup(connection, path)
    done = []
    for version, migration in enumerate(pending, len(_MIGRATIONS) - len(pending) + 1):
        with _transaction(connection):
            if _version_of(connection) < version:      # where files cannot be locked, another process may have been faster
                for statement in migration.up:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {version}")
                done.append(migration.name)
    return done


def _connect(path: Path, busy_s: float) -> sqlite3.Connection:
    """A connection to an existing or new private file, of whatever schema."""
    _make_private(path)
    with contextlib.ExitStack() as undo:
        connection = undo.enter_context(contextlib.closing(sqlite3.connect(path, timeout=busy_s, isolation_level=None)))
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA cache_size = -256")      # KiB; everything here is small, and idle memory is looked at
        _checked_version(connection, path)
        undo.pop_all()
    return connection


def open_database(path: Path, *, busy_s: float = _COMMAND_BUSY_S) -> sqlite3.Connection:
    """A connection to the database at `path`, made if missing, its schema up to date.

    Autocommit, WAL.  Raises ConfigError for a file that is damaged, locked, newer than this program or not to be written.
    """
    with _plain_trouble(path), contextlib.ExitStack() as undo:
        connection = undo.enter_context(contextlib.closing(_connect(path, busy_s)))
        if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal" or _version_of(connection) < len(_MIGRATIONS):
            # Going to WAL answers "locked" at once when two processes try it together, so one waits here.
            with _locked_epoch(path):
                connection.execute("PRAGMA journal_mode = WAL")
                _bring_up_to_date(connection, path)
        undo.pop_all()
    return connection


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(str(path), "something that is no file" if path.exists() else "no database", "a database made by serve or key create")


@contextlib.contextmanager
def _existing_database(path: Path) -> Iterator[sqlite3.Connection]:
    """The database at `path` as it is, for commands that must not make one."""
    with _plain_trouble(path):
        _require_file(path)
        with contextlib.closing(_connect(path, _COMMAND_BUSY_S)) as connection:
            yield connection


@contextlib.contextmanager
def _readable_database(path: Path) -> Iterator[sqlite3.Connection]:
    """The database for reading only; an older schema is brought up to date first."""
    if schema_version(path) < len(_MIGRATIONS):
        open_database(path).close()
    with _plain_trouble(path), contextlib.closing(_open_for_reading(path, _COMMAND_BUSY_S)) as connection:
        yield connection


def schema_version(path: Path) -> int:
    """The version of the schema at `path`; 0 for a database made by the seed."""
    with _plain_trouble(path):
        _require_file(path)
        with contextlib.closing(_open_for_reading(path, _COMMAND_BUSY_S)) as connection:
            return _checked_version(connection, path)


def migrate(path: Path) -> list[str]:
    """Names of the schema steps that were missing and are now applied, after a backup."""
    with _existing_database(path) as connection, _locked_epoch(path):
        return _bring_up_to_date(connection, path)


def rollback(path: Path) -> str | None:
    """Name of the newest schema step, now undone after a backup; None when none is left.  The next start applies it again."""
    with _existing_database(path) as connection, _locked_epoch(path):
        version = _version_of(connection)
        if version == 0:
            return None
        _write_backup(connection, path)
        with _transaction(connection):
            for statement in _MIGRATIONS[version - 1].down:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {version - 1}")
        return _MIGRATIONS[version - 1].name


def backup(path: Path) -> Path:
    """A new whole copy of the database, beside it."""
    with _existing_database(path) as connection:
        return _write_backup(connection, path)


# Gateway keys
#
# The key epoch is a counter of 8 bytes, little-endian, in keys.epoch beside the database.  Every key command adds one after
# its commit; a server has the file mapped and compares 8 bytes per request, which costs no system call.

@dataclass(frozen=True, slots=True)
class GatewayKey:
    """What is known of one key; the key itself is nowhere."""
    id: int                    #: 0 for one given by API_KEYS
    prefix: str                #: first 7 characters and "..."
    name: str
    created_utc: str
    last_used_utc: str         #: "" when never
    active: bool
    n_used: int                #: requests that ended, however they ended


_KEY_COLUMNS = "id, key_prefix, name, created_at, last_used_at, is_active, usage_count"


def _hash_of(key: str) -> str:
    # surrogatepass: a header may hold anything, and no text may raise here
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _iso_utc(stored: str | None) -> str:
    """SQLite's `2026-01-31 10:00:00` as ISO 8601, "" for nothing."""
    return f"{stored.replace(' ', 'T')}Z" if stored and "T" not in stored else stored or ""


def _key_from(row: Sequence[Any]) -> GatewayKey:
    number, prefix, name, created, last_used, active, n_used = row
    return GatewayKey(number, prefix, name or "", _iso_utc(created), _iso_utc(last_used), bool(active), n_used or 0)


def _open_epoch(path: Path) -> int:
    """A descriptor of the epoch file of the database at `path`, made with 8 zero bytes where missing."""
    handle = os.open(path.with_name("keys.epoch"), os.O_RDWR | os.O_CREAT, 0o600)
    if os.fstat(handle).st_size < _EPOCH_BYTES:
        os.ftruncate(handle, _EPOCH_BYTES)
    return handle


@contextlib.contextmanager
def _locked_epoch(path: Path) -> Iterator[int]:
    """The epoch file, while no other process of ours changes keys or schema.  Not to be nested: it would wait for itself."""
    handle = _open_epoch(path)
    try:
        try:
            import fcntl
            fcntl.flock(handle, fcntl.LOCK_EX)
        except ImportError:
            pass        # no such lock on this system; SQLite's own still keeps the data whole
        yield handle
    finally:
        os.close(handle)


@contextlib.contextmanager
def _changing_keys(path: Path) -> Iterator[sqlite3.Connection]:
    """One transaction on the keys: on the disk, and known to running servers, before the block is left."""
    with contextlib.closing(open_database(path)) as connection, _plain_trouble(path), _locked_epoch(path) as epoch:
        connection.execute("PRAGMA synchronous = FULL")
        with _transaction(connection):
            yield connection
        count = int.from_bytes(os.read(epoch, _EPOCH_BYTES), "little") + 1
        os.lseek(epoch, 0, os.SEEK_SET)
        os.write(epoch, count.to_bytes(_EPOCH_BYTES + 1, "little")[:_EPOCH_BYTES])


def _checked_key(key: str) -> str:
    """`key`, a secret the operator chose.  Raises ConfigError, without the key, for one that is weak or does not fit a header."""
    if not (16 <= len(key) <= 512 and key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError("gateway key", f"{len(key)} characters", "16 to 512 printable ASCII characters without spaces")
    return key


def create_key(path: Path, name: str, *, length: int = 64, key: str | None = None) -> tuple[str, GatewayKey]:
    """A new gateway key and its row; durable and valid in running servers before this returns.

    length: hex characters after "sk-".  key: a secret to store instead of a drawn one.
    """
    if not 32 <= length <= 128:
        raise ConfigError("key length", str(length), "32 to 128 hex characters")
    if not name.isprintable():
        raise ConfigError("key name", ascii(name), "printable characters")
    secret = f"sk-{secrets.token_hex((length + 1) // 2)[:length]}" if key is None else _checked_key(key)
    with _changing_keys(path) as connection:
        if connection.execute("SELECT 1 FROM api_keys WHERE key_hash = ?", (_hash_of(secret),)).fetchone():
            raise ConfigError("gateway key", "one that exists already", "a new one")
        number = connection.execute(
            "INSERT INTO api_keys (key_hash, key_prefix, name) VALUES (?, ?, ?)", (_hash_of(secret), f"{secret[:7]}...", name)).lastrowid
        row = connection.execute(f"SELECT {_KEY_COLUMNS} FROM api_keys WHERE id = ?", (number,)).fetchone()
    return secret, _key_from(row)


def list_keys(path: Path) -> list[GatewayKey]:
    """All keys, revoked ones too, oldest first."""
    with _readable_database(path) as connection:
        return [_key_from(row) for row in connection.execute(f"SELECT {_KEY_COLUMNS} FROM api_keys ORDER BY id")]


def revoke_key(path: Path, key_id: int) -> bool:
    """Whether there is such a key; it is refused from now on and stays listed."""
    with _changing_keys(path) as connection:
        return connection.execute("UPDATE api_keys SET is_active = 0 WHERE id = ?", (min(key_id, _MAX_COUNT),)).rowcount > 0


def delete_key(path: Path, key_id: int) -> bool:
    """Whether there was such a key; it is gone, its usage rows stay."""
    with _changing_keys(path) as connection:
        return connection.execute("DELETE FROM api_keys WHERE id = ?", (min(key_id, _MAX_COUNT),)).rowcount > 0


def _read_active_keys(path: Path) -> dict[str, tuple[str, GatewayKey]]:
    """Hash -> (hash, key) of the keys that are valid; none when there is no database yet."""
    if not path.exists():
        return {}
    with contextlib.closing(_open_for_reading(path, _RING_BUSY_S)) as connection:
        rows = connection.execute(f"SELECT key_hash, {_KEY_COLUMNS} FROM api_keys WHERE is_active").fetchall()
    return {row[0]: (row[0], _key_from(row[1:])) for row in rows}


class KeyRing:
    """The valid gateway keys in memory, as fresh as the key epoch.  Owner: the gateway; for the event loop's thread alone.

    Trouble with the files is logged once and never raised: the keys known before stay valid, and it is tried again every second.
    """

    def __init__(self, path: Path, static_keys: Iterable[str], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._static: dict[str, tuple[str, GatewayKey]] = {}
        self._keys: dict[str, tuple[str, GatewayKey]] = {}
        self.accept(static_keys)
        self._epoch: mmap.mmap | bytes = b""      #: b"" while it could not be mapped
        self._seen: bytes | None = None           #: the epoch `_keys` belongs to, None to read them again
        self._files = (0, 0)
        self._retry_at = float("-inf")
        self._failing = False
        self._reload()

    def find(self, key: str) -> GatewayKey | None:
        """The key's row, None for a key that is unknown or revoked.  Compared in constant time, by hash."""
        if self._epoch[:] != self._seen:
            self._reload()
        digest = _hash_of(key)
        stored, found = self._keys.get(digest, ("", None))
        return found if hmac.compare_digest(stored, digest) else None

    def accept(self, static_keys: Iterable[str]) -> None:
        """From now on take these keys, besides those of the database, and no other static ones."""
        before, stamp = self._static, GatewayKey(0, "...", "API_KEYS", "", "", True, 0)      # no prefix: such a key may be short
        self._static = {digest: (digest, stamp) for digest in (_hash_of(key) for key in static_keys if key)}
        self._keys = {**{digest: row for digest, row in self._keys.items() if digest not in before}, **self._static}

    def any_key(self) -> bool:
        """Whether any key at all would be accepted."""
        if self._epoch[:] != self._seen:
            self._reload()
        return bool(self._keys)

    def refresh(self) -> None:
        """Notice that the database or the epoch file was replaced or removed, which the mapping cannot tell.  For a slow timer."""
        if self._identity() != self._files:
            self._unmap()
            self._reload()

    def close(self) -> None:
        """Give the mapping back.  A closed ring must not be asked again."""
        self._unmap()

    def _identity(self) -> tuple[int, int]:
        """Inodes of the two files, 0 for a missing one."""
        numbers = [0, 0]
        for place, path in enumerate((self._path, self._path.with_name("keys.epoch"))):
            with contextlib.suppress(OSError):
                numbers[place] = path.stat().st_ino
        return numbers[0], numbers[1]

    def _unmap(self) -> None:
        if isinstance(self._epoch, mmap.mmap):
            self._epoch.close()
        self._epoch, self._seen = b"", None

    def _map(self) -> None:
        _make_folder_of(self._path)
        handle = _open_epoch(self._path)
        try:
            self._epoch = mmap.mmap(handle, _EPOCH_BYTES, access=mmap.ACCESS_READ)
        finally:
            os.close(handle)

    def _reload(self) -> None:
        now = self._clock()
        if now < self._retry_at:
            return
        self._retry_at = now + _RING_RETRY_S
        trouble: sqlite3.Error | OSError | None = None
        try:
            if not self._epoch:
                self._map()
        except OSError as error:        # a folder that may only be read: keys are read again every second instead
            trouble = error
        # Taken before the read: a change in between then causes one read too many, never one too few.
        epoch, files = self._epoch[:], self._identity()
        try:
            self._keys = {**_read_active_keys(self._path), **self._static}
            self._seen, self._files = epoch or None, files
        except (sqlite3.Error, OSError) as error:
            trouble = error
        if trouble is None:
            self._retry_at = float("-inf")
        elif not self._failing:
            _STORE_LOG.warning("keys.failed path=%s error=%s kept=%d", self._path, trouble, len(self._keys))
        self._failing = trouble is not None


# Usage

class UsageRow(NamedTuple):
    """One request that ended, served or not.  Field names are the columns of the table `usage`."""
    request_id: str
    at_utc: str                #: ISO 8601, when the request came
    key_id: int                #: GatewayKey.id, 0 for none
    key_name: str
    client_format: str
    model: str                 #: as the client asked
    provider: str              #: this and the next three: "" when no route served
    credential: str            #: its id
    wire_model: str
    route: str                 #: its id
    input: int
    output: int
    cached: int
    cache_write: int
    reasoning: int
    cost_usd: float | None     #: None where no price is known
    estimated: bool            #: the counts are guesses
    status: int
    outcome: str               #: ok, error, client_closed...
    first_ms: int | None       #: until the first content, None when there was none
    total_ms: int
    attempts: int
    streamed: bool


_INSERT_USAGE = f"INSERT OR IGNORE INTO usage ({', '.join(UsageRow._fields)}) VALUES ({', '.join('?' * len(UsageRow._fields))})"


def _as_column(value: object) -> str | int | float | None:
    """`value` in a form SQLite takes whatever a client or provider put there: one odd row must not hold up all others."""
    if value is None or isinstance(value, float):
        return value
    if isinstance(value, int):
        return max(0, min(int(value), _MAX_COUNT))
    return str(value).encode("utf-8", "replace").decode("utf-8")      # JSON may bring half a surrogate pair


def _insert_usage(connection: sqlite3.Connection, rows: Collection[UsageRow]) -> None:
    """Store `rows` and count them for their keys; a request that is stored already is not counted again."""
    n_before = connection.total_changes
    try:
        connection.executemany(_INSERT_USAGE, rows)
        new_rows = rows if connection.total_changes - n_before == len(rows) else None
    except (OverflowError, UnicodeError, sqlite3.ProgrammingError):
        new_rows = None
    if new_rows is None:                # a repeated or an odd row: one by one
        connection.execute("ROLLBACK")
        connection.execute("BEGIN IMMEDIATE")
        new_rows = [row for row in rows if connection.execute(_INSERT_USAGE, [_as_column(value) for value in row]).rowcount > 0]
    used: dict[int, tuple[int, str]] = {}
    for row in new_rows:
        n_requests, last = used.get(row.key_id, (0, ""))
        used[row.key_id] = n_requests + 1, max(last, row.at_utc)
    connection.executemany(
        "UPDATE api_keys SET usage_count = coalesce(usage_count, 0) + ?, last_used_at = max(coalesce(last_used_at, ''), coalesce(datetime(?), ''))"
        " WHERE id = ?",
        [(n_requests, last, key_id) for key_id, (n_requests, last) in used.items()])


class UsageWriter:
    """Usage rows on their way to the database.  Owner: the gateway; one thread, asleep while nothing is queued.

    While the database refuses, up to 10,000 rows are kept and tried again every second; `n_dropped` counts older ones given up.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._queue: queue.SimpleQueue[UsageRow | threading.Event | None] = queue.SimpleQueue()
        self._hurry = threading.Event()
        self.n_dropped = 0
        # What follows belongs to the thread.
        self._rows: deque[UsageRow] = deque()
        self._flushes: list[threading.Event] = []
        self._connection: sqlite3.Connection | None = None
        self._failing = self._stopping = False
        self._warned_at = float("-inf")
        self._thread = threading.Thread(target=self._run, name="usage-writer", daemon=True)
        self._thread.start()

    def put(self, row: UsageRow) -> None:
        """Queue `row`; never waits, never raises."""
        self._queue.put(row)

    def flush(self, timeout_s: float) -> bool:
        """Whether everything queued before this call is on disk within `timeout_s`."""
        done = threading.Event()
        self._queue.put(done)
        self._hurry.set()
        return done.wait(timeout_s)

    def close(self, timeout_s: float = 2.0) -> None:
        """Write what is queued, if the database lets it, and end the thread."""
        self._queue.put(None)
        self._hurry.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopping:
            if not self._rows:
                self._take(self._queue.get())
            # Rows pile up in the queue meanwhile: a thread woken by each would cost a busy server more than the writing.
            self._hurry.wait(_RETRY_S if self._failing else _BATCH_S)
            self._hurry.clear()
            while not self._queue.empty() and (self._failing or len(self._rows) < _MAX_WAITING_ROWS):
                self._take(self._queue.get())
            self._settle()
        if self._rows:
            _STORE_LOG.warning("usage.lost path=%s rows=%d", self._path, len(self._rows))
        self._disconnect()

    def _take(self, item: UsageRow | threading.Event | None) -> None:
        if item is None:
            self._stopping = True
        elif isinstance(item, UsageRow):
            self._rows.append(item)
        else:
            self._flushes.append(item)

    def _settle(self) -> None:
        """Write what was taken; on trouble keep it, within bounds."""
        self._failing = bool(self._rows) and not self._write()
        while len(self._rows) > _MAX_WAITING_ROWS:
            self._rows.popleft()
            self.n_dropped += 1
        if not self._rows:
            while self._flushes:
                self._flushes.pop().set()

    def _write(self) -> bool:
        try:
            if self._connection is None:
                self._connection = open_database(self._path, busy_s=_WRITER_BUSY_S)
            with _transaction(self._connection):
                _insert_usage(self._connection, self._rows)
        except (sqlite3.Error, ConfigError) as error:
            self._disconnect()
            self._warn(error)
            return False
        self._rows.clear()
        return True

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _warn(self, error: sqlite3.Error | ConfigError) -> None:
        now = self._clock()
        if now - self._warned_at >= _WARN_EVERY_S:
            self._warned_at = now
            _STORE_LOG.warning("usage.failed path=%s error=%s waiting=%d dropped=%d", self._path, error, len(self._rows), self.n_dropped)


def totals(path: Path, day_utc: str | None = None) -> dict[str, int]:
    """Counts for `status`: keys, and requests and tokens of one UTC day (`2026-01-31`, default today) and of all days."""
    with _readable_database(path) as connection:
        active, revoked = connection.execute("SELECT coalesce(sum(is_active), 0), coalesce(sum(NOT is_active), 0) FROM api_keys").fetchone()
        n_ever = connection.execute("SELECT count(*) FROM usage").fetchone()[0]
        n_today, n_input, n_output = connection.execute(
            "SELECT count(*), coalesce(sum(input), 0), coalesce(sum(output), 0) FROM usage"
            " WHERE at_utc >= date(coalesce(?, 'now')) AND at_utc < date(coalesce(?, 'now'), '+1 day')", (day_utc, day_utc)).fetchone()
    return {"keys_active": active, "keys_revoked": revoked, "requests": n_ever, "requests_today": n_today, "input_today": n_input, "output_today": n_output}


##############################################################################
# 17. Transport                                             I/O | uses 1-2, 5, 14-15
##############################################################################
# The providers' side: one request, one Answer.  Every way a connection can fail leaves here as an UpstreamFailure and as
# nothing else.  Connections are pooled per (origin, proxy) and come back to the pool only when their answer was whole, its
# framing unambiguous and not one byte came after it; a byte or an end that arrives while a connection waits spoils it.
# Deadlines are one Alarm per connection: it aborts the transport, the pending read ends, and the phase tells what for.

MAX_ANSWER_BYTES = 32 * 1024 * 1024
_MAX_INFORMATIONAL = 20
_READ_BYTES = 128 * 1024
_POOL_IDLE_S = 60.0
_POOL_SIZE = 256


class Origin(NamedTuple):
    """Where connections go and by which proxy; the key of the pool."""
    scheme: str
    host: str
    port: int
    proxy: str = ""          #: http://[user:password@]host:port, "" for none


def split_url(url: str) -> tuple[str, str, int, str]:
    """Scheme, host (no brackets), port and path of an http(s) URL that configuration has checked."""
    from urllib.parse import urlsplit
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80), parts.path


def no_proxy_covers(host: str, no_proxy: Sequence[str]) -> bool:
    """Whether NO_PROXY (hosts, .domains and *) names `host`."""
    names = [name.lower().lstrip(".") for name in no_proxy]
    return any(name == "*" or host.lower() == name or host.lower().endswith("." + name) for name in names)


class _Inbox(asyncio.StreamReader):
    """A StreamReader that notices what arrives while nothing was asked for."""

    parked = False
    spoiled = False

    def feed_data(self, data: Any) -> None:
        self.spoiled = self.spoiled or self.parked
        super().feed_data(data)

    def feed_eof(self) -> None:
        self.spoiled = self.spoiled or self.parked
        super().feed_eof()


class _ResumingContext(ssl.SSLContext):
    """A client context that offers each host its last session: asyncio gives no other place to say so."""

    sessions: dict[str, ssl.SSLSession]

    def wrap_bio(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, server_side: bool = False, server_hostname: str | bytes | None = None,
                 session: ssl.SSLSession | None = None) -> ssl.SSLObject:
        return super().wrap_bio(incoming, outgoing, server_side, server_hostname, session or self.sessions.get(str(server_hostname)))


def make_client_context() -> ssl.SSLContext:
    """Verifying context with the system's authorities and certifi's. Costs some 40 ms, so there is one for the process."""
    context = _ResumingContext(ssl.PROTOCOL_TLS_CLIENT)
    context.sessions = {}
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    if certifi is not None and "SSL_CERT_FILE" not in os.environ:
        context.load_verify_locations(cadata=certifi.contents())
    context.set_alpn_protocols(["http/1.1"])
    return context


class _Line:
    """One connection to a provider: its streams, its alarm, and why it was aborted if it was."""

    __slots__ = ("origin", "inbox", "writer", "alarm", "phase", "timed_out", "n_used")

    def __init__(self, origin: Origin, inbox: _Inbox, writer: asyncio.StreamWriter) -> None:
        self.origin, self.inbox, self.writer = origin, inbox, writer
        self.alarm = Alarm(self._ring)
        self.phase = ""
        self.timed_out = ""
        self.n_used = 0

    def watch(self, phase: str, within_s: float) -> None:
        """From now on silence of `within_s` seconds is a timeout in `phase`."""
        self.phase = phase
        self.alarm.set(within_s)

    def close(self) -> None:
        self.alarm.stop()
        self.writer.transport.abort()

    def _ring(self) -> None:
        self.timed_out = self.phase
        self.writer.transport.abort()

    async def read(self) -> bytes:
        """Some bytes, b"" at the end. Raises UpstreamFailure for a timeout or a broken connection."""
        try:
            data = await self.inbox.read(_READ_BYTES)
        except ssl.SSLError as error:
            raise transport_failure("tls", self.phase, error.reason or "TLS error") from error
        except OSError as error:
            raise self._lost(error.strerror or type(error).__name__) from error
        if not data and self.timed_out:
            raise self._lost("")
        return data

    def _lost(self, detail: str) -> UpstreamFailure:
        if self.timed_out:
            return transport_failure("timeout", self.timed_out, f"nothing came in time ({self.timed_out})")
        return transport_failure("reset", self.phase, detail or "connection reset")


class Answer:
    """A provider's answer under way: head read, body to come by read().  End it with release() or abort(), both safe to repeat."""

    __slots__ = ("status", "headers", "_transport", "_line", "_body", "_pending", "_inflate", "_eof_ends", "_reusable", "_failure", "_ended")

    def __init__(self, transport: Transport, line: _Line, status: int, headers: Headers, framing: Framing, pending: bytes) -> None:
        self.status, self.headers = status, headers
        self._transport, self._line = transport, line
        self._body = BodyReader(framing)
        self._pending = pending
        self._eof_ends = framing.kind == "eof"
        self._failure: UpstreamFailure | None = None
        self._ended = False
        fields = dict(headers)
        self._inflate = _make_inflater(fields["content-encoding"]) if "content-encoding" in fields else None
        self._reusable = not self._eof_ends and "close" not in fields.get("connection", "").lower()
        if self._body.done:
            self._body.rest, self._pending = self._pending, b""

    def header(self, name: str) -> str:
        """The first value of a header, "" when absent."""
        return next((value for key, value in self.headers if key == name), "")

    def watch(self, phase: str, within_s: float) -> None:
        """From now on silence of `within_s` seconds is a timeout in `phase`; call again at each sign of life."""
        self._line.watch(phase, within_s)

    async def read(self) -> bytes:
        """The next piece of the body, inflated; b"" at its end. Raises UpstreamFailure when it is cut, broken or too slow."""
        while not self._body.done:
            if self._failure is not None:
                raise self._failure
            try:
                piece = await self._read_piece()
            except UpstreamFailure as failure:
                self._failure, piece = failure, self._body.give_up()    # what came before the break is given out first
            if piece and self._inflate is not None:
                piece = self._inflate(piece)
            if piece:
                return piece
        if self._inflate is not None:
            self._inflate(b"")
        return b""

    async def _read_piece(self) -> bytes:
        """What one read brings of the body, perhaps nothing."""
        if self._body.bad:
            raise transport_failure("protocol", "body", self._body.bad)
        data, self._pending = self._pending or await self._line.read(), b""
        if not data:
            if not self._eof_ends:
                raise transport_failure("cut", "body", "the connection ended inside the answer")
            self._body.done = True
        try:
            return self._body.feed(data)
        except BadHttp as error:
            raise transport_failure("protocol", "body", str(error)) from error

    async def read_all(self, max_bytes: int = MAX_ANSWER_BYTES, *, idle_s: float, within_s: float) -> bytes:
        """The whole body, in `within_s` at the most. Blank pieces are keep-alives; once something else came the rest must follow within `idle_s`."""
        pieces: list[bytes] = []
        n_bytes, ends_at = 0, self._transport.clock() + within_s
        if not self._pending:
            self.watch("idle", min(idle_s, within_s))
        while piece := await self.read():
            if not n_bytes and not piece.strip():
                self.watch("idle", min(idle_s, max(ends_at - self._transport.clock(), 0.0)))
                continue
            n_bytes += len(piece)
            if n_bytes > max_bytes:
                raise transport_failure("too_big", "body", f"an answer larger than {max_bytes} bytes")
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def read_start(self, max_bytes: int, *, idle_s: float) -> bytes:
        """Up to `max_bytes` of the body, and what had come when it broke off: for the bodies of errors."""
        body = b""
        self.watch("idle", idle_s)
        try:
            while len(body) < max_bytes and (piece := await self.read()):
                body += piece
        except UpstreamFailure:
            self._reusable = False
        return body[:max_bytes]

    def release(self) -> None:
        """Give the connection back when the answer was whole and nothing follows it; close it otherwise."""
        self._end(self._reusable and self._body.done and not self._body.rest and not self._pending)

    def abort(self) -> None:
        """Close the connection at once: the client has gone or the answer is of no use."""
        self._end(False)

    def _end(self, reusable: bool) -> None:
        if self._ended:
            return                      # the line may be another request's by now
        self._ended = True
        self._transport.take_back(self._line, reusable)


def _make_inflater(coding: str) -> Callable[[bytes], bytes] | None:
    """A function that inflates piece by piece, None for plain bodies; its output is capped, and b"" checks the end."""
    coding = coding.strip().lower()
    if coding in ("", "identity"):
        return None
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise transport_failure("protocol", "head", f"content-encoding {coding[:20]} was not asked for")
    engine, n_bytes = zlib.decompressobj(wbits=47), 0

    def inflate(piece: bytes) -> bytes:
        nonlocal n_bytes
        if not piece and not engine.eof:
            raise transport_failure("cut", "body", "a compressed answer ended early")
        try:
            plain = engine.decompress(piece, MAX_ANSWER_BYTES - n_bytes + 1) if piece else b""
        except zlib.error as error:
            raise transport_failure("protocol", "body", "the answer is not compressed as it says") from error
        n_bytes += len(plain)
        if n_bytes > MAX_ANSWER_BYTES:
            raise transport_failure("too_big", "body", f"an answer larger than {MAX_ANSWER_BYTES} bytes when inflated")
        if engine.unused_data:
            raise transport_failure("protocol", "body", "something follows the compressed answer")
        return plain

    return inflate


class Transport:
    """All connections to providers; one for the life of the process."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.clock = world.clock
        self._pool: dict[Origin, deque[_Line]] = {}
        self._context: ssl.SSLContext | None = None

    async def request(self, origin: Origin, message: bytes, timeouts: Timeouts) -> Answer:
        """Send one whole request (head and body) and wait for the head of its answer.

        A pooled connection that dies before a byte of the answer is replaced by a fresh one, once.  Raises UpstreamFailure.
        """
        line = self._pooled(origin)
        if line is not None:
            try:
                return await self._ask(line, message, timeouts)
            except UpstreamFailure as failure:
                if failure.phase != "stale":
                    raise
        return await self._ask(await self._connect(origin, timeouts.connect_s), message, timeouts)

    def take_back(self, line: _Line, reusable: bool) -> None:
        """A connection whose answer has ended: keep it for the next request to its origin, or close it."""
        if line.origin.scheme == "https":
            self._remember_session(line)
        if not reusable:
            line.close()
            return
        lines = self._pool.setdefault(line.origin, deque())
        line.inbox.parked = True
        line.alarm.set(_POOL_IDLE_S)
        line.phase = "parked"
        lines.append(line)
        if len(lines) > _POOL_SIZE:
            lines.popleft().close()

    def close(self) -> None:
        """Close what waits in the pool."""
        for lines in self._pool.values():
            for line in lines:
                line.close()
        self._pool.clear()

    def n_parked(self) -> int:
        """How many connections wait in the pool."""
        return sum(map(len, self._pool.values()))

    def _pooled(self, origin: Origin) -> _Line | None:
        """The connection used last of those that are still good; the spoiled ones are closed on the way."""
        lines = self._pool.get(origin)
        while lines:
            line = lines.pop()
            if line.inbox.spoiled or line.timed_out or line.writer.is_closing():
                line.close()
                continue
            line.inbox.parked = False
            return line
        self._pool.pop(origin, None)
        return None

    async def _ask(self, line: _Line, message: bytes, timeouts: Timeouts) -> Answer:
        """Write the request and read the head of the answer; the line is closed when that fails or is cancelled."""
        fresh, line.n_used = not line.n_used, line.n_used + 1
        line.watch("head", timeouts.first_byte_s)
        buffer = b""
        try:
            line.writer.write(message)
            for _ in range(_MAX_INFORMATIONAL + 1):
                while not (end := find_head_end(buffer)):
                    data = await line.read()
                    if not data:
                        raise transport_failure("cut", "head", "the connection ended before an answer")
                    buffer += data
                    if buffer[:7] != b"HTTP/1."[:len(buffer)]:
                        raise BadHttp("what came is not HTTP/1")
                head, buffer = buffer[:end], buffer[end:]
                if head[8:11] == b" 10" and head[11:12] != b"1":
                    continue
                status, headers = parse_answer_head(head)
                return Answer(self, line, status, headers, answer_framing(status, headers), buffer)
            raise transport_failure("protocol", "head", "informational answers without end")
        except UpstreamFailure as failure:
            line.close()
            if not fresh and not buffer and failure.reason in ("cut", "reset"):
                failure.phase = "stale"
            raise
        except BadHttp as error:
            line.close()
            raise transport_failure("protocol", "head", str(error)) from error
        except BaseException:
            line.close()
            raise

    async def _connect(self, origin: Origin, connect_s: float) -> _Line:
        """A fresh connection, through the proxy when there is one, with TLS when the scheme asks for it."""
        try:
            async with asyncio.timeout(connect_s):
                return await self._open_by_proxy(origin) if origin.proxy else await self._open(origin, origin.host, origin.port, origin.scheme == "https")
        except TimeoutError as error:
            raise transport_failure("timeout", "connect", f"no connection within {connect_s:g} s") from error
        except socket.gaierror as error:
            raise transport_failure("dns", "connect", f"{origin.host}: {error.strerror}") from error
        except ssl.SSLError as error:
            raise transport_failure("tls", "connect", getattr(error, "verify_message", "") or error.reason or "TLS handshake failed") from error
        except ConnectionRefusedError as error:
            raise transport_failure("refused", "connect", "connection refused") from error
        except OSError as error:
            told = str(error)           # asyncio joins the errors of several addresses into one that has no number of its own
            refused = 0 < told.count("[Errno ") == told.count(f"[Errno {errno.ECONNREFUSED}]")
            raise transport_failure("refused" if refused else "reset", "connect", "connection refused" if refused else error.strerror or "no connection") from error

    async def _open(self, origin: Origin, host: str, port: int, tls: bool) -> _Line:
        loop = asyncio.get_running_loop()
        inbox = _Inbox(limit=2 * _READ_BYTES, loop=loop)
        protocol = asyncio.StreamReaderProtocol(inbox, loop=loop)
        secure = {"ssl": self._tls_context(), "server_hostname": host} if tls else {}
        transport, _ = await self._world.dial(lambda: protocol, host, port, happy_eyeballs_delay=0.25, **secure)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return _Line(origin, inbox, asyncio.StreamWriter(transport, protocol, inbox, loop))

    async def _open_by_proxy(self, origin: Origin) -> _Line:
        """A tunnel by CONNECT, then TLS inside it."""
        from urllib.parse import unquote, urlsplit
        proxy = urlsplit(origin.proxy)
        line = await self._open(origin, proxy.hostname or "", proxy.port or 80, False)
        target = f"[{origin.host}]:{origin.port}" if ":" in origin.host else f"{origin.host}:{origin.port}"
        login = ""
        if proxy.username:
            word = base64.b64encode(f"{unquote(proxy.username)}:{unquote(proxy.password or '')}".encode()).decode()
            login = f"Proxy-Authorization: Basic {word}\r\n"
        line.phase = "connect"
        line.writer.write(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{login}\r\n".encode("ascii"))
        buffer = b""
        try:
            while not (end := find_head_end(buffer)):
                data = await line.read()
                if not data:
                    raise transport_failure("cut", "connect", "the proxy closed the connection")
                buffer += data
            status = parse_answer_head(buffer[:end])[0]
            if not 200 <= status < 300 or buffer[end:]:
                raise transport_failure("proxy", "connect", f"the proxy answered {status}")
            if origin.scheme == "https":
                await line.writer.start_tls(self._tls_context(), server_hostname=origin.host)
        except BadHttp as error:
            line.close()
            raise transport_failure("protocol", "connect", f"the proxy: {error}") from error
        except BaseException:
            line.close()
            raise
        return line

    def _tls_context(self) -> ssl.SSLContext:
        if self._context is None:
            self._context = make_client_context()
        return self._context

    def _remember_session(self, line: _Line) -> None:
        """TLS 1.3 hands out its ticket after the handshake, so a session is taken when an answer is done."""
        secure = line.writer.get_extra_info("ssl_object")
        if isinstance(self._context, _ResumingContext) and secure is not None and secure.session is not None:
            self._context.sessions[line.origin.host] = secure.session


##############################################################################
# 18. Server                                                I/O | uses 1-2, 14-15
##############################################################################
# The clients' side: accept, read one request at a time, hand it to the application, write its answer.  What the server
# decides by itself is HTTP and nothing else: framing, limits, keep-alive, order of pipelined answers, draining.
# The application (section 21) gives `admit`, called with the head alone, so that a body nobody may send is never read.

MAX_BODY_BYTES = 32 * 1024 * 1024
MAX_TARGET_BYTES = 8 * 1024
MAX_CONNECTIONS = 4096
_HEAD_S = 10.0
_BODY_S = 60.0
_IDLE_S = 75.0
_WRITE_STALL_S = 60.0
_LINGER_S = 1.0
_READ_BYTES_CLIENT = 64 * 1024
_TARGET = re.compile(r"[!\"$-~]+")        # printable ASCII without # (and no space)


@dataclass(slots=True)
class Request:
    """One request of a client. `headers` have lower-case names; `path` is what authentication and routing both look at."""
    method: str
    path: str
    query: str
    headers: dict[str, str]
    version: str = "1.1"
    peer: str = ""
    received_at: float = 0.0
    body: bytes = b""
    secure: bool = False
    key: Any = None                         #: what the application found the caller to be
    answer_headers: Headers = field(default_factory=list)   #: sent with whatever answers this request


class Sink(Protocol):
    """Where an answer goes: whole by respond(), or piece by piece by start(), write() and finish()."""
    @property
    def head_sent(self) -> bool: ...
    @property
    def interrupted(self) -> str: ...

    def respond(self, status: int, headers: Headers, body: bytes) -> None: ...
    def start(self, status: int, headers: Headers) -> None: ...
    def write(self, data: bytes) -> None: ...
    def finish(self) -> None: ...
    def cut(self) -> None: ...
    async def flush(self) -> None: ...


class Application(Protocol):
    """What a server serves. `admit` raises GatewayError (or returns the handler) before the body is read; `explain` renders errors."""

    def admit(self, request: Request) -> Callable[[Request, Exchange], Awaitable[None]]: ...
    def explain(self, request: Request | None, error: GatewayError) -> tuple[Headers, bytes]: ...


class _ClientInbox(asyncio.StreamReader):
    """A StreamReader that tells at once when the client has gone."""

    on_gone: Callable[[], object] | None = None
    lost = False            #: the connection itself is gone, both ways

    def feed_eof(self) -> None:
        super().feed_eof()
        if self.on_gone is not None:
            self.on_gone()

    def set_exception(self, exc: Exception) -> None:
        super().set_exception(exc)
        if self.on_gone is not None:
            self.on_gone()


class _ClientProtocol(asyncio.StreamReaderProtocol):
    """Tells the inbox when the connection is lost: aborting a transport after that fails inside asyncio."""

    inbox: _ClientInbox

    def connection_lost(self, exc: Exception | None) -> None:
        self.inbox.lost = True
        super().connection_lost(exc)


class Exchange:
    """One request's answer on its way to the client; the server's Sink."""

    __slots__ = ("head_sent", "finished", "keep_alive", "interrupted", "_link", "_answer_headers", "_head_only", "_chunked", "_plain_version", "_unsent")

    def __init__(self, link: _Link, request: Request, keep_alive: bool) -> None:
        self._link = link
        self._answer_headers = request.answer_headers
        self._head_only = request.method == "HEAD"
        self._plain_version = request.version != "1.1"
        self._chunked = False
        self._unsent = b""              # the head of a streamed answer goes out together with its first piece
        self.head_sent = self.finished = False
        self.keep_alive = keep_alive
        self.interrupted = ""           #: why the server wants this answer to end now, "" when it does not

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a whole answer."""
        head = self._head(status, headers, f"content-length: {len(body)}\r\n" if status != 204 else "")
        self._link.write(head if self._head_only else head + body)
        self.head_sent = self.finished = True

    def start(self, status: int, headers: Headers) -> None:
        """Send the head of an answer whose length nobody knows yet."""
        if self._plain_version:
            self.keep_alive = False
        self._chunked = not self._plain_version and not self._head_only
        self._unsent = self._head(status, headers, "transfer-encoding: chunked\r\n" if not self._plain_version else "")
        self.head_sent = True

    def write(self, data: bytes) -> None:
        """Send a piece of the body; never waits, flush() does."""
        if data and not self._head_only:
            framed = b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data
            if self._unsent:
                framed, self._unsent = self._unsent + framed, b""
            self._link.write(framed)

    def finish(self) -> None:
        """End the body properly."""
        if not self.finished:
            self.finished = True
            last, self._unsent = self._unsent + (b"0\r\n\r\n" if self._chunked else b""), b""
            if last:
                self._link.write(last)

    def cut(self) -> None:
        """End the body so that the client sees it is not whole: for formats that have no error event."""
        self.finished, self.keep_alive = True, False
        self._link.close()

    async def flush(self) -> None:
        """Wait while the client reads slower than we write. Raises ConnectionError when it has gone or stalls."""
        await self._link.flush()

    def cancel_when_gone(self) -> None:
        """From now on the client's leaving cancels the current task, which is the one that works for it."""
        task = asyncio.current_task()
        assert task is not None
        self._link.inbox.on_gone = task.cancel

    def _head(self, status: int, headers: Headers, length: str) -> bytes:
        if not self._link.server.open:
            self.keep_alive = False
        lines = [f"HTTP/1.1 {status} {REASON_PHRASES.get(status, 'Unknown')}\r\n"]
        lines += [f"{name}: {value}\r\n" for name, value in (*headers, *self._answer_headers)]
        goes_on = "" if self.keep_alive and not self._plain_version else f"connection: {'keep-alive' if self.keep_alive else 'close'}\r\n"
        lines += [length, self._link.server.date_line(), goes_on, "\r\n"]
        return "".join(lines).encode("latin-1")


class _Link:
    """One connection of a client, for its whole life."""

    __slots__ = ("server", "inbox", "writer", "alarm", "task", "exchange", "_answered", "_buffer", "_peer", "_write_alarm", "_secure")

    def __init__(self, server: Server, inbox: _ClientInbox, writer: asyncio.StreamWriter) -> None:
        self.server, self.inbox, self.writer = server, inbox, writer
        self.alarm = Alarm(self._ring)
        self._write_alarm = Alarm(self.close)
        self.task: asyncio.Task[None] | None = None
        self.exchange: Exchange | None = None
        self._answered = False          # an error has been sent that ends this connection
        self._buffer = b""
        self._peer = str((writer.get_extra_info("peername") or ("",))[0])
        self._secure = writer.get_extra_info("ssl_object") is not None

    def write(self, data: bytes) -> None:
        self.writer.write(data)

    def close(self) -> None:
        """End the connection at once."""
        if not self.inbox.lost:
            self.writer.transport.abort()

    async def flush(self) -> None:
        transport = self.writer.transport
        if transport.is_closing():
            raise ConnectionResetError("the client has gone")
        if transport.get_write_buffer_size() > 65536:
            self._write_alarm.set(_WRITE_STALL_S)
            try:
                await self.writer.drain()
            finally:
                self._write_alarm.rest()

    async def serve(self) -> None:
        """Requests one after another until either side ends the connection."""
        with contextlib.suppress(ConnectionError):      # the client has gone: nobody is left to tell
            while await self._serve_one():
                pass
            await self._linger()

    def end(self) -> None:
        """Close, and hold nothing any more."""
        self.alarm.stop()
        self._write_alarm.stop()
        self.close()

    async def _serve_one(self) -> bool:
        """Read and answer one request; whether the connection goes on."""
        request: Request | None = None
        try:
            head = await self._read_head()
            if head is None:
                return False
            request = self._read_request(head)
            framing = request_framing(request.version, request.headers)
            self.exchange = Exchange(self, request, _keeps_alive(request))
            handler = self.server.application.admit(request)
            if framing.kind == "length" and framing.n_bytes > self.server.max_body_bytes:
                raise too_large(f"the body is larger than {self.server.max_body_bytes} bytes")
            request.body = await self._read_body(request, framing)
        except BadHttp as error:
            self._refuse(request, bad_request(f"Bad HTTP request: {error}.", status=error.status), close=True)
            return False
        except GatewayError as error:
            unread = request is None or _has_body(request)      # what follows is a body nobody will read
            self._refuse(request, error, close=unread)
            exchange, self.exchange = self.exchange, None
            return not unread and exchange is not None and exchange.keep_alive
        self.alarm.rest()
        await handler(request, self.exchange)
        exchange, self.exchange = self.exchange, None
        self.inbox.on_gone = None
        await self.flush()
        return exchange.keep_alive and exchange.finished and self.server.open

    async def _read_head(self) -> bytes | None:
        """The bytes of the next head, None when the client has nothing more to say."""
        self._buffer = self._buffer.lstrip(b"\r\n")       # RFC 9112 2.2: empty lines before a request line are ignored
        self.alarm.set(_HEAD_S if self._buffer else _IDLE_S)
        while not (end := find_head_end(self._buffer)):
            data = await self.inbox.read(_READ_BYTES_CLIENT)
            if not data:
                return None
            if self._buffer:
                self._buffer += data
                continue
            self._buffer = data.lstrip(b"\r\n")
            if self._buffer and b"\r\n\r\n" not in data:
                self.alarm.set(_HEAD_S)
        head, self._buffer = self._buffer[:end], self._buffer[end:]
        return head

    def _read_request(self, head: bytes) -> Request:
        method, target, version, headers = parse_request_head(head)
        if len(target) > MAX_TARGET_BYTES:
            raise BadHttp("the request target is too long", 414)
        if not _TARGET.fullmatch(target) or "%00" in target:
            raise BadHttp("the request target has characters that may not stand there")
        if version not in ("1.0", "1.1"):
            raise BadHttp("HTTP version not supported", 505)
        if not target.startswith("/"):
            scheme, _, rest = target.partition("://")
            if scheme.lower() not in ("http", "https") or not rest:
                raise BadHttp("the request target must be a path")
            target = "/" + rest.partition("/")[2]
        path, _, query = target.partition("?")
        return Request(method, path, query, headers, version, self._peer, self.server.clock(), b"", self._secure)

    async def _read_body(self, request: Request, framing: Framing) -> bytes:
        """The whole body, within the limits."""
        reader = BodyReader(framing)
        if reader.done:
            return b""
        expects = request.headers.get("expect")
        if expects is not None:
            if expects.lower() != "100-continue":
                raise bad_request("Only Expect: 100-continue is understood.", status=417)
            if not self._buffer and request.version == "1.1":
                self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if len(self._buffer) < framing.n_bytes or framing.kind == "chunked":
            self.alarm.set(_BODY_S)
        pieces, n_bytes = [], 0
        while not reader.done:
            data, self._buffer = self._buffer or await self.inbox.read(_READ_BYTES_CLIENT), b""
            if not data:
                raise ConnectionResetError("the client left inside its request")
            piece = reader.feed(data)
            if reader.bad:
                raise BadHttp(reader.bad)
            n_bytes += len(piece)
            if n_bytes > self.server.max_body_bytes:
                raise too_large(f"the body is larger than {self.server.max_body_bytes} bytes")
            pieces.append(piece)
        self._buffer = reader.rest
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _refuse(self, request: Request | None, error: GatewayError, *, close: bool) -> None:
        """Answer an error that was found before a handler ran."""
        exchange = self.exchange or Exchange(self, request or Request("GET", "/", "", {}), False)
        if close:
            exchange.keep_alive = False
        headers, body = self.server.application.explain(request, error)
        exchange.respond(error.status, headers, body)
        self._answered = close

    async def apologise(self) -> None:
        """A bug of ours has ended the handler: say so while nothing has gone out, else end so that the answer does not look whole."""
        with contextlib.suppress(ConnectionError):
            if self.exchange is None or not self.exchange.head_sent:
                self._refuse(None, GatewayError("The gateway failed at this request; its log says where.", 500, "internal_error"), close=True)
                await self._linger()

    async def _linger(self) -> None:
        """Read on for a moment after the last answer: a reset sent because of unread bytes could destroy it on its way."""
        transport = self.writer.transport
        if transport.is_closing():
            return
        # From here on drain() means that everything has gone out; a TLS transport pauses at its mark, a plain one above it.
        transport.set_write_buffer_limits(high=1 if self._secure else 0)
        self.alarm.rest()
        self._write_alarm.set(_WRITE_STALL_S)
        await self.writer.drain()
        self._write_alarm.rest()
        if self.inbox.at_eof():
            return
        if self.writer.can_write_eof():
            self.writer.write_eof()
        self.alarm.set(_LINGER_S)
        for _ in range(256):
            if not await self.inbox.read(_READ_BYTES_CLIENT):
                return

    def _ring(self) -> None:
        """The client was too slow with its request, or has been idle for long enough."""
        if (self._buffer or self.exchange is not None) and not self._answered:
            self._refuse(None, GatewayError("The request did not arrive in time.", 408, "request_timeout", "invalid_request_error"), close=True)
            self.writer.close()
        else:
            self.close()


def _keeps_alive(request: Request) -> bool:
    wish = request.headers.get("connection", "").lower()
    return "keep-alive" in wish if request.version == "1.0" else "close" not in wish


def _has_body(request: Request) -> bool:
    return "transfer-encoding" in request.headers or request.headers.get("content-length", "0").strip("0") != ""


class Server:
    """A listening HTTP server around one application."""

    def __init__(self, application: Application, world: World, *, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self.application = application
        self.clock = world.clock
        self.max_body_bytes = max_body_bytes
        self.open = True
        self._utc = world.utc
        self._date = (0, "")
        self._links: set[_Link] = set()
        self._listeners: list[asyncio.Server] = []
        self._done = asyncio.Event()

    async def listen(self, sockets: Sequence[socket.socket], context: ssl.SSLContext | None = None) -> None:
        """Accept connections on bound sockets; TLS when a context is given."""
        loop = asyncio.get_running_loop()

        def accept() -> asyncio.StreamReaderProtocol:
            inbox = _ClientInbox(limit=_READ_BYTES_CLIENT, loop=loop)
            protocol = _ClientProtocol(inbox, self._begin, loop=loop)
            protocol.inbox = inbox
            return protocol

        for listening in sockets:
            self._listeners.append(await loop.create_server(accept, sock=listening, ssl=context, backlog=1024))

    def date_line(self) -> str:
        """The Date header, written anew once a second."""
        second = int(self._utc())
        if second != self._date[0]:
            self._date = (second, f"date: {email.utils.formatdate(second, usegmt=True)}\r\n")
        return self._date[1]

    def n_connections(self) -> int:
        """How many clients are connected."""
        return len(self._links)

    async def drain(self, within_s: float) -> None:
        """Stop accepting, let answers under way finish, interrupt what is left after `within_s` seconds, close everything."""
        self.open = False
        for listener in self._listeners:
            listener.close()
        for link in list(self._links):
            if link.exchange is None:
                link.writer.close()             # what is still on its way to a slow reader gets there
        await self._wait_for_links(within_s)
        for link in list(self._links):
            if link.exchange is not None and link.task is not None:
                link.exchange.interrupted = "the gateway is shutting down"
                link.task.cancel()
        await self._wait_for_links(2.0)
        for link in list(self._links):
            link.close()

    async def _wait_for_links(self, within_s: float) -> None:
        if self._links:
            self._done.clear()
            try:
                await asyncio.wait_for(self._done.wait(), within_s)
            except TimeoutError:
                return

    async def _begin(self, inbox: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The life of one connection; the only place that catches what nobody expected."""
        assert isinstance(inbox, _ClientInbox)
        if len(self._links) >= MAX_CONNECTIONS or not self.open:
            writer.transport.abort()
            return
        link = _Link(self, inbox, writer)
        link.task = asyncio.current_task()
        self._links.add(link)
        peer_socket = writer.get_extra_info("socket")
        if peer_socket is not None and peer_socket.family in (socket.AF_INET, socket.AF_INET6):
            peer_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await link.serve()
        except asyncio.CancelledError:
            link.close()
        except Exception:
            logging.getLogger("aicarousel.server").exception("connection.failed")
            await link.apologise()
        finally:
            link.end()
            self._links.discard(link)
            if not self._links:
                self._done.set()


##############################################################################
# 19. Relay                                                 I/O | uses 1-5, 7-8, 10, 14-15, 17
##############################################################################
# One request from its plan to its settled usage.  Two marks are kept apart: head sent (keep-alives may have gone out) and
# committed (content went out).  Until commit every failure leads to the next route; after it the client gets its format's
# error event and nothing is left looking complete.  Relay meets clients only through a Sink.
# Relay owns the routing state; the pure rules that change it are section 7's.

_KEEP_ALIVE_FIRST_S = 4.5
_KEEP_ALIVE_S = 12.0
_AFTER_FINISH_S = 2.0           #: how long to wait for usage and [DONE] once a finish reason has come
_AFTER_END_S = 0.25             #: how long to wait for the end of the body once the end mark has come
_ERROR_BODY_BYTES = 64 * 1024
_ERROR_BODY_S = 5.0
_RETRY_PAUSE_S = 0.2
_BYTES_PER_TOKEN = 4
_MAX_TARGETS = 4096
_KEEP_ALIVE_COMMENT = b": keep-alive\n\n"
#: Provider headers that clients may see.
_RELAYED_HEADERS = ("x-request-id", "request-id", "openai-processing-ms")
_RELAYED_PREFIXES = ("x-ratelimit-", "anthropic-ratelimit-")
EVENT_STREAM_HEADERS: Headers = [("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-cache"), ("x-accel-buffering", "no")]


@dataclass(slots=True)
class Job:
    """One request as the relay needs it. `raw` is the client's body, `body` the same parsed and checked."""
    id: str
    raw: bytes
    body: Json
    model: str | None
    stream: bool
    received_at: float
    key_id: int = 0
    key_name: str = ""
    may_fall_back: bool = True
    idempotency_key: str = ""


@dataclass(slots=True)
class Settled:
    """How a job ended, for the log line and the usage row."""
    job: Job
    attempts: list[Attempt]
    outcome: str                    #: ok, error, client_closed
    status: int
    usage: Usage
    first_ms: int
    total_ms: int

    @property
    def route(self) -> Route | None:
        """The route that served, else the one tried last."""
        return self.attempts[-1].route if self.attempts else None


class Relay:
    """Attempts, commit and pump for all requests; one for the life of the process."""

    def __init__(self, world: World, transport: Transport, settle: Callable[[Settled], None], user_agent: str) -> None:
        self.world = world
        self.transport = transport
        self.settle = settle
        self.state = RoutingState()
        self.config: Config
        self.catalogue: Catalogue
        self._user_agent = user_agent
        self._targets: dict[str, tuple[Provider, tuple[Origin, str]]] = {}

    def configure(self, config: Config) -> None:
        """Route by `config` from now on; requests under way finish on what they began with."""
        self.config, self.catalogue = config, build_catalogue(config)
        self._targets = {}

    async def run(self, job: Job, sink: Sink) -> None:
        """Answer one request. Raises only CancelledError and ConnectionError: the client has gone."""
        await _Run(self, job, sink).go()

    def message(self, route: Route, job: Job, body: bytes) -> tuple[Origin, bytes]:
        """Where a request goes and its bytes, head and body. The head's fixed part is written once per route."""
        known = self._targets.get(route.id)
        if known is not None and known[0] is route.provider:
            target = known[1]
        else:                           # a request under way may still be on the configuration before
            target = self._make_target(route)
            if len(self._targets) >= _MAX_TARGETS:
                self._targets.clear()
            self._targets[route.id] = route.provider, target
        own = f"Idempotency-Key: {job.idempotency_key}\r\n" if job.idempotency_key else ""
        accept = "text/event-stream" if job.stream else "application/json"
        return target[0], f"{target[1]}{own}Accept: {accept}\r\nContent-Length: {len(body)}\r\n\r\n".encode("latin-1") + body

    def _make_target(self, route: Route) -> tuple[Origin, str]:
        provider, credential, settings = route.provider, route.credential, self.config.settings
        scheme, host, port, path = split_url(provider.base_url)
        proxy = credential.proxy if credential.proxy is not None else provider.proxy
        if proxy is None:
            proxy = settings.https_proxy if scheme == "https" else settings.http_proxy
            proxy = "" if is_loopback(host) or no_proxy_covers(host, settings.no_proxy) else proxy
        name = f"[{host}]" if ":" in host else host
        name += "" if port == {"https": 443, "http": 80}[scheme] else f":{port}"
        secret = [(provider.preset.auth_header, f"{provider.preset.auth_scheme} {credential.secret}".strip())] if credential.secret else []
        fixed = [("Host", name), ("User-Agent", self._user_agent), ("Content-Type", "application/json"), ("Accept-Encoding", "identity"), *secret,
                 *provider.preset.headers, *provider.headers, *credential.headers]
        lines = {label.lower(): f"{label}: {header_value(value)}\r\n" for label, value in fixed}    # later ones win
        return Origin(scheme, host, port, proxy or ""), f"POST {path}/chat/completions HTTP/1.1\r\n{''.join(lines.values())}"


class _Run:
    """The work on one job."""

    __slots__ = ("_relay", "_job", "_sink", "_config", "_catalogue", "_keeper", "_attempts", "_failures", "_committed", "_usage", "_n_content_bytes",
                 "_first_ms", "_outcome", "_status", "_cooled", "_dropped", "_choice", "_sent_at", "_log")

    def __init__(self, relay: Relay, job: Job, sink: Sink) -> None:
        self._relay, self._job, self._sink = relay, job, sink
        self._config, self._catalogue = relay.config, relay.catalogue
        self._keeper = Alarm(self._keep_alive) if job.stream else None
        self._attempts: list[Attempt] = []
        self._failures: list[UpstreamFailure] = []
        self._committed = False
        self._usage: Usage | None = None
        self._n_content_bytes = 0
        self._first_ms = 0
        self._outcome, self._status = "error", 500
        self._cooled: set[str] = set()
        self._dropped: tuple[str, ...] = ()
        self._choice: Choice
        self._sent_at = 0.0
        self._log = logging.getLogger("aicarousel.relay")

    async def go(self) -> None:
        """Serve, and settle whatever happens."""
        if self._keeper is not None:
            self._keeper.set(_KEEP_ALIVE_FIRST_S)
        try:
            await self._serve()
        except GatewayError as error:
            self._refuse(error)
        except asyncio.CancelledError:
            reason = self._sink.interrupted
            if not reason:
                self._note_leaving()
                raise
            asyncio.current_task().uncancel()       # type: ignore[union-attr]
            self._refuse(no_route(f"Interrupted: {reason}.", retry_after_s=5))
        except ConnectionError:
            self._note_leaving()
            raise
        finally:
            if self._keeper is not None:
                self._keeper.stop()
            self._settle()

    def _note_leaving(self) -> None:
        """The client has gone; that says nothing of an answer that was whole by then."""
        if self._outcome != "ok":
            self._outcome, self._status = "client_closed", 499

    async def _serve(self) -> None:
        """Try the routes of the plan in order until one serves. Raises GatewayError when none does."""
        self._choice = resolve(self._catalogue, self._job.model)
        waiting = deque((await self._plan()).routes)
        n_max, retried = self._config.carousel.max_attempts, False
        while waiting and len(self._attempts) < n_max:
            route = waiting.popleft()
            if self._cooled.intersection(route.keys):
                continue                # another attempt of this request has just shown that it is out
            failure = await self._try(route)
            if failure is None or self._committed:
                return
            self._failures.append(failure)
            rule = FAILURE_RULES[failure.kind]
            if learn_refused(self._relay.state, route, failure, self._job.body):
                waiting.appendleft(route)
                continue
            if not rule.goes_on:
                break
            if rule.again and not waiting and not retried and len(self._attempts) == 1 and failure.reason != "timeout":
                retried = True
                self._cooled.clear()
                waiting.append(route)
                await self._relay.world.sleep(_RETRY_PAUSE_S * (0.5 + self._relay.world.random()))
        raise answer_for(self._failures, self._attempts)

    async def _plan(self) -> Plan:
        """The plan, after a wait where the first proven cooldown ends soon enough. Raises GatewayError when there is nothing to wait for."""
        relay, carousel = self._relay, self._config.carousel
        give_up_at = relay.world.clock() + carousel.max_wait_s
        while True:
            now = relay.world.clock()
            found = plan(self._catalogue, self._choice, relay.state, now, strategy=carousel.strategy,
                         fallback=carousel.fallback if self._job.may_fall_back else "none")
            if found.routes:
                return found
            if found.free_at is None:
                raise no_route("No provider takes part: " + ("; ".join(f"{provider.name}: {provider.why_out}" for provider in self._config.providers[:8] if provider.why_out)
                                                            or "none has a usable key") + ".")
            if found.free_at > give_up_at:
                why = "; ".join(f"{route.provider.name}/{route.model.id}: {reason}" for route, reason in found.skipped[:6])
                raise no_route(f"Every route is waiting for its limit to reset ({why}).", status=429, retry_after_s=found.free_at - now)
            await relay.world.sleep(max(found.free_at - now, 0.01))

    async def _try(self, route: Route) -> UpstreamFailure | None:
        """One attempt: None when it served, else how it failed. After commit the client has been told by then."""
        relay, state = self._relay, self._relay.state
        attempt = Attempt(route, relay.world.clock())
        self._attempts.append(attempt)
        begin_attempt(state, self._choice, route)
        answer: Answer | None = None
        try:
            body, self._dropped = chat_pass_request(self._job.raw, self._job.body, route.model.id, route.provider.preset, state.refused.get(route.keys[2], ()))
            origin, message = relay.message(route, self._job, body)
            self._sent_at = relay.world.clock()
            answer = await relay.transport.request(origin, message, route.provider.timeouts)
            attempt.status = answer.status
            if answer.status != 200:
                raise await self._read_failure(answer, route)
            await (self._relay_stream if self._job.stream else self._relay_whole)(answer, attempt)
            answer.release()
        except UpstreamFailure as failure:
            if answer is not None:
                answer.abort()
            self._note(attempt, failure)
            return failure
        except BaseException:
            if answer is not None:
                answer.abort()
            end_probe(state, route)
            attempt.ms = self._ms_since(attempt.started_at)
            attempt.reason = "" if self._outcome == "ok" else "client_closed"
            raise
        attempt.ms = self._ms_since(attempt.started_at)
        self._outcome, self._status = "ok", 200
        return None

    async def _read_failure(self, answer: Answer, route: Route) -> UpstreamFailure:
        """What an answer other than 200 means."""
        body = await answer.read_start(_ERROR_BODY_BYTES, idle_s=_ERROR_BODY_S)
        answer.release()
        return classify(route.provider.preset.name, route.provider.preset.bucket, answer.status, dict(answer.headers), body, utc=self._relay.world.utc())

    def _note(self, attempt: Attempt, failure: UpstreamFailure) -> None:
        """Write a failed attempt down and cool what it proves to be out."""
        relay, route = self._relay, attempt.route
        failure.detail = redact(failure.detail, self._config.secrets)
        attempt.reason, attempt.detail = failure.reason, failure.detail
        attempt.status = failure.status or attempt.status
        attempt.ms = self._ms_since(attempt.started_at)
        cooldown = cool(relay.state, route, failure, relay.world.clock(), jitter=relay.world.random())
        if cooldown is not None:
            self._cooled.add(cooldown.key)
        self._log.warning("attempt.failed req=%s route=%s status=%s reason=%s detail=%s cools=%s", self._job.id, route.id, attempt.status or "-", failure.reason,
                          log_text(failure.detail), f"{cooldown.key} {cooldown.until_at - relay.world.clock():.0f}s" if cooldown else "-")

    async def _relay_whole(self, answer: Answer, attempt: Attempt) -> None:
        """A body that is not streamed: read whole, judged, then sent on as it came."""
        route = attempt.route
        timeouts = route.provider.timeouts
        body = await answer.read_all(idle_s=timeouts.idle_s, within_s=max(timeouts.total_s - (self._relay.world.clock() - self._sent_at), 0.0))
        try:
            parsed = json.loads(body)
        except (ValueError, RecursionError):
            raise self._bad_answer(route, "not_json", error_text(body)[0]) from None
        error = find_chat_error(parsed)
        if error is not None:
            raise self._in_answer(route, error)
        why, usage = judge_chat_answer(parsed)
        if why:
            raise self._bad_answer(route, why, "")
        self._usage = usage
        self._n_content_bytes = len(body)
        if self._config.carousel.echo_model and self._job.model:
            body = dump_json({**parsed, "model": self._job.model})
        self._commit(route)
        self._sink.respond(200, [("content-type", "application/json"), *self._headers(answer, attempt)], body)

    async def _relay_stream(self, answer: Answer, attempt: Attempt) -> None:
        """Pump a stream: hold until content, then pass on what each read completes. One loop kept whole: it runs once per read."""
        sink, keeper, timeouts = self._sink, self._keeper, attempt.route.provider.timeouts
        assert keeper is not None
        passage = ChatPassage(wants_usage=bool((self._job.body.get("stream_options") or {}).get("include_usage")),
                              echo_model=self._job.model if self._config.carousel.echo_model else None, n_prompt_tokens=len(self._job.raw) // _BYTES_PER_TOKEN)
        held, n_signs, ends_at = b"", 0, self._sent_at + timeouts.stream_total_s
        while not (passage.done or passage.error or passage.broken):
            failure: UpstreamFailure | None = None
            try:
                chunk = await answer.read()
            except UpstreamFailure as caught:
                chunk, failure = b"", caught
            out = passage.feed(chunk) if chunk else passage.close()
            if passage.n_signs != n_signs:
                n_signs = passage.n_signs
                answer.watch("idle", min(timeouts.idle_s if passage.finish is None else _AFTER_FINISH_S, max(ends_at - self._relay.world.clock(), 0.0)))
            if not self._committed and passage.content and not passage.error and not passage.broken:
                out, held = held + out, b""
                self._start_stream(answer, attempt)
            if not self._committed:
                held += out
            elif out:
                sink.write(out)
                keeper.set(_KEEP_ALIVE_S)
                await sink.flush()
            self._usage, self._n_content_bytes = passage.usage, passage.n_content_bytes
            if failure is not None and not passage.done:
                self._break_off(failure, attempt)
        await self._end_stream(passage, answer, attempt)

    def _start_stream(self, answer: Answer, attempt: Attempt) -> None:
        """Commit, and send the head if no keep-alive has."""
        self._commit(attempt.route)
        if not self._sink.head_sent:
            self._sink.start(200, [*EVENT_STREAM_HEADERS, *self._headers(answer, attempt)])

    async def _end_stream(self, passage: ChatPassage, answer: Answer, attempt: Attempt) -> None:
        """Finish a stream that ended rightly, or raise what was wrong with it."""
        if passage.error is not None:
            self._break_off(self._in_answer(attempt.route, passage.error), attempt)
        if passage.broken or not self._committed:
            self._break_off(self._bad_answer(attempt.route, passage.broken or "empty_answer", ""), attempt)
        self._sink.finish()
        self._outcome, self._status = "ok", 200         # whole, even if the client leaves before the provider's connection has ended too
        if self._keeper is not None:
            self._keeper.rest()
        answer.watch("idle", _AFTER_END_S)
        await answer.read_start(_ERROR_BODY_BYTES, idle_s=_AFTER_END_S)

    def _break_off(self, failure: UpstreamFailure, attempt: Attempt) -> None:
        """Raise `failure`; when content has gone out already, tell the client first."""
        if self._committed:
            failure.detail = redact(failure.detail, self._config.secrets)
            attempt.reason, attempt.detail = failure.reason, failure.detail
            attempt.ms = self._ms_since(attempt.started_at)
            self._refuse(answer_for([failure], [attempt]))
        raise failure

    def _in_answer(self, route: Route, error: Any) -> UpstreamFailure:
        """The failure that a 200 answer or a stream carries inside."""
        return classify_error(route.provider.preset.name, route.provider.preset.bucket, error, utc=self._relay.world.utc())

    @staticmethod
    def _bad_answer(route: Route, reason: str, detail: str) -> UpstreamFailure:
        """A 200 that is no answer."""
        return transport_failure(reason, "body" if reason in ("cut", "too_big") else "", detail[:300])

    def _commit(self, route: Route) -> None:
        """From here on there is no other route; and this one works, whatever was held against it."""
        self._committed = True
        clear(self._relay.state, route)
        self._first_ms = self._ms_since(self._job.received_at)

    def _headers(self, answer: Answer, attempt: Attempt) -> Headers:
        """The headers that tell what was decided, and the provider's that clients may see."""
        overhead_ms = (self._sent_at - self._job.received_at) * 1000.0 if len(self._attempts) == 1 else (attempt.started_at - self._job.received_at) * 1000.0
        headers = [("x-aicarousel-request-id", self._job.id), ("x-aicarousel-provider", attempt.route.provider.name),
                   ("x-aicarousel-model", header_value(attempt.route.model.id)), ("x-aicarousel-attempts", str(len(self._attempts))),
                   ("x-aicarousel-overhead-ms", f"{overhead_ms:.1f}")]
        if self._dropped:
            headers.append(("x-aicarousel-dropped", ",".join(self._dropped)))
        if self._usage is None and not self._job.stream:
            headers.append(("x-aicarousel-estimated", "1"))
        return headers + [(name, value) for name, value in answer.headers if name in _RELAYED_HEADERS or name.startswith(_RELAYED_PREFIXES)]

    def _refuse(self, error: GatewayError) -> None:
        """Tell the client that it failed: by status while nothing went out, else by an event, and a proper end of the body."""
        error.redact(self._config.secrets)
        self._outcome, self._status = "error", error.status
        if self._sink.head_sent:
            self._sink.write(write_event(chat_error(error)))
            self._sink.finish()
            return
        self._sink.respond(error.status, [*error_headers(error), ("x-aicarousel-request-id", self._job.id), ("x-aicarousel-attempts", str(len(self._attempts)))],
                           dump_json(chat_error(error)))

    def _keep_alive(self) -> None:
        """Nothing has gone out for a while: say that we are still here."""
        if not self._sink.head_sent:
            self._sink.start(200, [*EVENT_STREAM_HEADERS, ("x-aicarousel-request-id", self._job.id)])
        self._sink.write(_KEEP_ALIVE_COMMENT)
        if self._keeper is not None:
            self._keeper.set(_KEEP_ALIVE_S)

    def _settle(self) -> None:
        """One usage row and one log line, for every request that reached a plan."""
        if self._usage is None:
            served = self._committed
            self._usage = Usage(len(self._job.raw) // _BYTES_PER_TOKEN if served else 0, self._n_content_bytes // _BYTES_PER_TOKEN if served else 0, estimated=served)
        self._relay.settle(Settled(self._job, self._attempts, self._outcome, self._status, self._usage, self._first_ms, self._ms_since(self._job.received_at)))

    def _ms_since(self, at: float) -> int:
        return round((self._relay.world.clock() - at) * 1000)


def error_headers(error: GatewayError) -> Headers:
    """Content type and, where the error says when to come back, Retry-After in whole seconds."""
    again = [("retry-after", str(max(1, -int(-error.retry_after_s // 1))))] if error.retry_after_s is not None else []
    return [("content-type", "application/json"), *again]


def log_text(text: str) -> str:
    """`text` as it may stand in a log line: one line, no control characters, not endless."""
    return "".join(character if character.isprintable() else "?" for character in text[:300]) or "-"


##############################################################################
# 20. Pages                                                 pure | uses 1-4
##############################################################################
# What is read by people and by tools rather than by models: the front page, the list of models.

FRONT_PAGE = """AICarousel {version}: one address for many LLM APIs.

  Chat Completions   POST /v1/chat/completions
  models             GET  /v1/models
  health             GET  /health

Point an OpenAI client at this address with /v1 behind it, use a gateway key (python aicarousel.py key create NAME)
and the model name aicarousel.  README.md tells the rest.
"""

#: When the list of models was made up; clients want some number.
_CREATED_S = 1_790_000_000


def list_models(config: Config) -> list[Json]:
    """Every name a client may use: aicarousel, the aliases, and each provider/model that takes part. Limits where they are known."""
    smallest = min((model.context for provider in config.active for model in provider.models[:1] if model.context), default=None)
    rows = [_model_row("aicarousel", "aicarousel", Model("aicarousel", context=smallest))]
    rows += [_model_row(alias, "aicarousel", Model(alias)) for alias in config.carousel.aliases if "*" not in alias]
    for provider in config.active:
        rows += [_model_row(f"{provider.name}/{model.id}", provider.name, model) for model in provider.models]
    return rows


def _model_row(name: str, owner: str, model: Model) -> Json:
    limits = {"context_length": model.context, "max_input_tokens": model.context, "max_completion_tokens": model.max_output, "max_tokens": model.max_output}
    return {"id": name, "object": "model", "created": _CREATED_S, "owned_by": owner, **{label: value for label, value in limits.items() if value}}


def find_model(config: Config, name: str) -> Json | None:
    """One row of the list; bare ids, aliases of models and provider names are known too."""
    for row in list_models(config):
        if row["id"] == name:
            return row
    for provider in config.active:
        for model in provider.models:
            if name in (model.id, model.alias, f"{provider.name}:{model.id}"):
                return _model_row(name, provider.name, model)
        if name == provider.name:
            return _model_row(name, provider.name, Model(name))
    return None


def as_messages_model(row: Json) -> Json:
    """A row as Anthropic's list has it."""
    shown = {"type": "model", "id": row["id"], "display_name": row["id"], "created_at": "2026-09-21T14:13:20Z"}
    return {**shown, **{name: row[name] for name in ("max_input_tokens", "max_tokens") if name in row}}


##############################################################################
# 21. Endpoints                                             I/O | uses 1-5, 7-8, 10, 12, 14-20
##############################################################################
# Gateway is the running whole; it is the Application a Server serves.  `admit` looks at the head alone: host, origin,
# path, method, content type, key, in this order.  A handler parses, calls, renders, and stays short.
# One more endpoint: a handler and a row in _ENDPOINTS; README and tests/test_docs.py name it.

MISSING_KEY = "Missing API key. Include it as 'Authorization: Bearer sk-xxx' or 'x-api-key: sk-xxx'"
INVALID_KEY = "Invalid API key"
_KEY_HEADERS = ("x-api-key", "api-key", "x-goog-api-key")
_JSON: Headers = [("content-type", "application/json")]
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,255})(?::([0-9]{1,5}))?")
_ADDRESS = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}|\[[0-9A-Fa-f:.]+\]")


class _Endpoint(NamedTuple):
    """What answers a path: method -> handler name, and whether a gateway key is needed."""
    handlers: Mapping[str, str]
    needs_key: bool = True


_ENDPOINTS: Mapping[str, _Endpoint] = {
    "/v1/chat/completions": _Endpoint({"POST": "chat_completions"}),
    "/v1/models": _Endpoint({"GET": "models", "HEAD": "models"}, False),
    "/v1/models/": _Endpoint({"GET": "model", "HEAD": "model"}, False),         # with an id behind it
    "/chat": _Endpoint({"POST": "plain_chat"}),
    "/health": _Endpoint({"GET": "health", "HEAD": "health"}, False),
    "/": _Endpoint({"GET": "front_page", "HEAD": "front_page"}, False),
}


class Gateway:
    """The running whole: configuration, keys, relay and usage. Owner of everything that lives as long as the process."""

    def __init__(self, config: Config, keys: KeyRing, usage: UsageWriter, world: World) -> None:
        self.config = config
        self.keys = keys
        self.usage = usage
        self.world = world
        self.transport = Transport(world)
        self.relay = Relay(world, self.transport, self._settle, f"aicarousel/{__version__}")
        self.relay.configure(config)
        self.n_requests = 0
        self._id_prefix = secrets.token_hex(4)      # with the count behind it: unique over restarts, and no system call per request
        self._good_hosts: set[str] = set()
        self._began_at = world.clock()
        self._log = logging.getLogger("aicarousel.relay")

    def reconfigure(self, config: Config) -> None:
        """Go on with another configuration; address, port and TLS stay what they were."""
        self._good_hosts.clear()
        self.keys.accept(config.settings.api_keys)
        self.config = replace(config, settings=replace(config.settings, host=self.config.settings.host, port=self.config.settings.port))
        self.relay.configure(self.config)

    def close(self) -> None:
        """Let go of connections; the usage writer and the key ring belong to the caller."""
        self.transport.close()

    # Admission.

    def admit(self, request: Request) -> Callable[[Request, Exchange], Awaitable[None]]:
        """The handler for a request, by its head alone. Raises GatewayError for everything that may not go on."""
        self._check_host(request)
        self._check_origin(request)
        endpoint = self._find_endpoint(request.path)
        if endpoint is None:
            raise GatewayError(f"There is nothing at {request.path[:200]}.", 404, "not_found", "invalid_request_error")
        if request.method == "OPTIONS" and self.config.settings.cors_origins:
            return self.preflight
        handler = endpoint.handlers.get(request.method)
        if handler is None:
            request.answer_headers.append(("allow", ", ".join(endpoint.handlers)))
            raise GatewayError(f"{request.path[:200]} takes {', '.join(endpoint.handlers)}, not {request.method[:20]}.", 405, "method_not_allowed", "invalid_request_error")
        if request.method == "POST":
            _check_content_type(request)
        if endpoint.needs_key:
            request.key = self._authenticate(request)
        return getattr(self, handler)

    def _check_host(self, request: Request) -> None:
        """Refuse hosts this server does not go by: a page whose name was rebound to this machine cannot fake its Host."""
        if request.headers.get("host") in self._good_hosts:
            return
        match = _HOST.fullmatch(request.headers.get("host", "") if request.version == "1.1" or "host" in request.headers else "localhost")
        if match is None:
            raise bad_request("The Host header is not a host name.")
        host, settings = match[1].lower(), self.config.settings
        rebindable = not _ADDRESS.fullmatch(host)
        if is_loopback(host) or host in (settings.host.lower(), f"[{settings.host.lower()}]", *settings.allowed_hosts) or (not rebindable and not is_loopback(settings.host)):
            if len(self._good_hosts) < 64:
                self._good_hosts.add(match[0])
            return
        raise forbidden(f"This server does not go by the name {host[:100]}; AICAROUSEL_ALLOWED_HOSTS can list it.", status=421)

    def _check_origin(self, request: Request) -> None:
        """Refuse pages of other origins unless --cors-origin lists them."""
        origin = request.headers.get("origin")
        if origin is None:
            return
        own = f"{'https' if request.secure else 'http'}://{request.headers.get('host', '')}"
        allowed = self.config.settings.cors_origins
        if origin in allowed or "*" in allowed:
            request.answer_headers += [("access-control-allow-origin", header_value(origin)), ("vary", "origin"),
                                       ("access-control-expose-headers", "x-aicarousel-request-id, x-aicarousel-provider, x-aicarousel-model, retry-after")]
        elif origin != own:
            raise forbidden("Pages of other origins may not call this server; --cors-origin can allow one.")

    @staticmethod
    def _find_endpoint(path: str) -> _Endpoint | None:
        """The row of a path, with or without /v1."""
        if path.startswith(("/v1/models/", "/models/")) and not path.endswith("/"):
            return _ENDPOINTS["/v1/models/"]
        return None if path.endswith("/models/") else _ENDPOINTS.get(path) or _ENDPOINTS.get("/v1" + path)

    def _authenticate(self, request: Request) -> GatewayKey | None:
        """The gateway key of a request, None where none is asked for. Raises GatewayError 401."""
        if self.config.settings.no_auth:
            return None
        shown = request.headers.get("authorization", "")
        shown = shown[7:].strip() if shown[:7].lower() == "bearer " else ""
        shown = shown or next((request.headers[name].strip() for name in _KEY_HEADERS if request.headers.get(name)), "")
        if not shown:
            raise unauthorized(MISSING_KEY)
        key = self.keys.find(shown)
        if key is None:
            raise unauthorized(INVALID_KEY)
        return key

    def explain(self, request: Request | None, error: GatewayError) -> tuple[Headers, bytes]:
        """An error in the envelope of the path it was asked at."""
        error.redact(self.config.secrets)
        speaks_messages = request is not None and "/messages" in request.path
        return error_headers(error), dump_json(messages_error(error) if speaks_messages else chat_error(error))

    # Handlers.

    async def preflight(self, request: Request, exchange: Exchange) -> None:
        """CORS: what a page of an allowed origin may send."""
        exchange.respond(204, [("access-control-allow-methods", "GET, POST, OPTIONS"), ("access-control-max-age", "86400"),
                               ("access-control-allow-headers", "Content-Type, Authorization, x-api-key, anthropic-version")], b"")

    async def front_page(self, request: Request, exchange: Exchange) -> None:
        """GET /: what this is."""
        exchange.respond(200, [("content-type", "text/plain; charset=utf-8")], FRONT_PAGE.format(version=__version__).encode())

    async def health(self, request: Request, exchange: Exchange) -> None:
        """GET /health: alive; with ?deep=1 and a key, the state of every provider. Never asks a provider."""
        state: Json = {"status": "ok", "service": "aicarousel", "version": __version__, "uptime_s": round(self.world.clock() - self._began_at, 1)}
        if "deep=1" in request.query.split("&"):
            try:
                self._authenticate(request)
            except GatewayError as error:
                headers, body = self.explain(request, error)
                return exchange.respond(error.status, headers, body)
            state |= {"requests": self.n_requests, "providers": self.provider_states()}
        exchange.respond(200, _JSON, dump_json(state))

    def provider_states(self) -> list[Json]:
        """Each provider: whether it takes part, and what of it cools."""
        now, active = self.world.clock(), set(self.relay.catalogue.providers)
        rows = []
        for provider in self.config.providers:
            names = {f"provider {provider.name}", *(f"credential {credential.id}" for credential in provider.credentials)}
            cooling = [{"scope": cooldown.key.partition(" ")[0], "key": cooldown.key.partition(" ")[2], "kind": cooldown.kind, "reason": cooldown.reason,
                        "until_s": round(cooldown.until_at - now, 1), "proven": cooldown.proven}
                       for cooldown in self.relay.state.cooling.values() if cooldown.until_at > now
                       and (cooldown.key in names or cooldown.key.partition(" ")[2].startswith((f"{provider.name}:", f"{provider.name}/")))]
            state = "out" if provider.name not in active else "cooling" if cooling else "ready"
            rows.append({"name": provider.name, "state": state, "why": provider.why_out or None, "models": len(provider.models), "keys": len(provider.credentials), "cooling": cooling})
        return rows

    async def models(self, request: Request, exchange: Exchange) -> None:
        """GET /v1/models, in Anthropic's shape for its clients."""
        rows = list_models(self.config)
        if "anthropic-version" in request.headers:
            data = [as_messages_model(row) for row in rows]
            body: Json = {"data": data, "has_more": False, "first_id": data[0]["id"], "last_id": data[-1]["id"]}
        else:
            body = {"object": "list", "data": rows}
        exchange.respond(200, _JSON, dump_json(body))

    async def model(self, request: Request, exchange: Exchange) -> None:
        """GET /v1/models/{id}; ids may hold slashes."""
        from urllib.parse import unquote
        name = unquote(request.path.partition("/models/")[2])
        row = find_model(self.config, name)
        if row is None:
            error = unknown_model(f"The model {name[:200]!r} is not known here.")
            body = messages_error(error) if "anthropic-version" in request.headers else chat_error(error)
            return exchange.respond(404, _JSON, dump_json(body))
        exchange.respond(200, _JSON, dump_json(as_messages_model(row) if "anthropic-version" in request.headers else row))

    async def chat_completions(self, request: Request, exchange: Exchange) -> None:
        """POST /v1/chat/completions."""
        raw = request.body.removeprefix(b"\xef\xbb\xbf")
        try:
            body = check_chat_request(parse_body(raw))
        except GatewayError as error:
            headers, answer = self.explain(request, error)
            return exchange.respond(error.status, headers, answer)
        await self._relay(request, exchange, exchange, raw, body)

    async def plain_chat(self, request: Request, exchange: Exchange) -> None:
        """POST /chat: a bare list of messages in, text out."""
        try:
            body = check_chat_request({"messages": parse_body(request.body), "stream": True})
        except GatewayError as error:
            return exchange.respond(error.status, [("content-type", "text/plain; charset=utf-8")], error.message.encode())
        await self._relay(request, exchange, PlainTextSink(exchange), dump_json(body), body)

    async def _relay(self, request: Request, exchange: Exchange, sink: Sink, raw: bytes, body: Json) -> None:
        """Hand a checked request to the relay; when the client leaves, the work on it is cancelled."""
        self.n_requests += 1
        key = request.key
        job = Job(f"{self._id_prefix}{self.n_requests:08x}", raw, body, body.get("model"), bool(body.get("stream")), request.received_at,
                  key.id if key else 0, key.name if key else "", request.headers.get("x-aicarousel-no-fallback") not in ("1", "true"),
                  header_value(request.headers.get("idempotency-key", ""))[:200])
        exchange.cancel_when_gone()
        await self.relay.run(job, sink)

    def _settle(self, settled: Settled) -> None:
        """One usage row and one log line per request."""
        job, route, usage = settled.job, settled.route, settled.usage
        self._log.info("req=%s key=%s model=%s route=%s attempts=%d status=%d outcome=%s in=%d out=%d first_ms=%d total_ms=%d", job.id, log_text(job.key_name),
                       log_text(job.model or "-"), log_text(route.id) if route else "-", len(settled.attempts), settled.status, settled.outcome, usage.input, usage.output,
                       settled.first_ms, settled.total_ms)
        self.usage.put(UsageRow(
            request_id=job.id, at_utc=datetime.fromtimestamp(self.world.utc(), timezone.utc).isoformat(timespec="milliseconds"), key_id=job.key_id, key_name=job.key_name,
            client_format="chat", model=job.model or "", provider=route.provider.name if route else "", credential=route.credential.id if route else "",
            wire_model=route.model.id if route else "", route=route.id if route else "", input=usage.input, output=usage.output, cached=usage.cached,
            cache_write=usage.cache_write, reasoning=usage.reasoning, cost_usd=None, estimated=usage.estimated, status=settled.status, outcome=settled.outcome,
            first_ms=settled.first_ms or None, total_ms=settled.total_ms, attempts=len(settled.attempts), streamed=job.stream))


class PlainTextSink:
    """A Sink that takes a Chat stream and passes on its text alone, for POST /chat.  Its head waits for the first text: a keep-alive has no text."""

    __slots__ = ("_exchange", "_events", "_head")

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._events = EventReader()
        self._head: tuple[int, Headers] = (200, [])

    @property
    def head_sent(self) -> bool:
        return self._exchange.head_sent

    @property
    def interrupted(self) -> str:
        return self._exchange.interrupted

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """An error before any text."""
        self._exchange.respond(status, self._as_text(headers), json.loads(body)["error"]["message"].encode("utf-8", "replace"))

    def start(self, status: int, headers: Headers) -> None:
        self._head = (status, headers)

    @staticmethod
    def _as_text(headers: Headers) -> Headers:
        return [("content-type", "text/plain; charset=utf-8"), *((name, value) for name, value in headers if name != "content-type")]

    def _pass_on(self, text: str) -> None:
        if not self._exchange.head_sent:
            self._exchange.start(self._head[0], self._as_text(self._head[1]))
        self._exchange.write(text.encode("utf-8", "replace"))

    def write(self, data: bytes) -> None:
        for event in self._events.feed(data):
            chunk = {} if event.data.strip() == "[DONE]" else json.loads(event.data)
            if "error" in chunk:
                return self.cut()       # text has no error event: a body without its end is the only sign there is
            for choice in chunk.get("choices") or ():
                text = (choice.get("delta") or {}).get("content")
                if isinstance(text, str) and text:
                    self._pass_on(text)

    def finish(self) -> None:
        self._pass_on("")
        self._exchange.finish()

    def cut(self) -> None:
        self._exchange.cut()

    async def flush(self) -> None:
        if not self._exchange.finished:
            await self._exchange.flush()


def _check_content_type(request: Request) -> None:
    """Only JSON: what a page can send without asking first is not JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise bad_request("Send the body as JSON, with the header Content-Type: application/json.", status=415)


def parse_body(raw: bytes) -> Any:
    """A request body as JSON. Raises GatewayError 400 for what is not, NaN and Infinity included."""
    try:
        value = _DECODER.decode(raw.decode("utf-8"))
        if raw.count(b"[") + raw.count(b"{") > _MAX_DEPTH and _is_deeper(value, _MAX_DEPTH):
            raise RecursionError
        return value
    except UnicodeDecodeError:
        raise bad_request("The body is not UTF-8.") from None
    except RecursionError:
        raise bad_request("The body is nested too deeply.") from None
    except ValueError as error:
        raise bad_request(f"The body is not valid JSON: {str(error)[:200]}.") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _refuse_twins(pairs: list[tuple[str, Any]]) -> Json:
    """An object, unless a key stands in it twice: two readers could disagree about what it says."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return made


def _is_deeper(value: Any, n_levels: int) -> bool:
    """Whether containers stand inside each other more than `n_levels` deep; level by level, so that depth cannot exhaust the stack."""
    level = [value]
    while level and n_levels >= 0:
        level = [child for parent in level for child in (parent.values() if type(parent) is dict else parent) if type(child) in (dict, list)]
        n_levels -= 1
    return bool(level)


_MAX_DEPTH = 100
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_refuse_twins)


class Demo:
    """A provider that answers offline, for `serve --demo`: an Application on a loopback port of its own."""

    ANSWER = ("This is the demo provider of AICarousel. It answers offline and says the same to everyone: the gateway works, "
              "this text was streamed to you word by word, and with a provider key in .env a real model will answer here.")

    def __init__(self, world: World) -> None:
        self._world = world

    def admit(self, request: Request) -> Callable[[Request, Exchange], Awaitable[None]]:
        """Only chat completions live here."""
        if request.method != "POST" or request.path != "/v1/chat/completions":
            raise GatewayError("The demo provider answers POST /v1/chat/completions.", 404)
        return self._answer

    def explain(self, request: Request | None, error: GatewayError) -> tuple[Headers, bytes]:
        """Errors as OpenAI has them."""
        return _JSON, dump_json(chat_error(error))

    async def _answer(self, request: Request, exchange: Exchange) -> None:
        body = parse_body(request.body)
        words = re.findall(r"\S+\s*", self.ANSWER)
        head = {"id": f"chatcmpl-{secrets.token_hex(6)}", "created": int(self._world.utc()), "model": "demo"}
        usage = {"prompt_tokens": len(request.body) // 4, "completion_tokens": len(words), "total_tokens": len(request.body) // 4 + len(words)}
        if not body.get("stream"):
            message = {"role": "assistant", "content": self.ANSWER}
            whole = {**head, "object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}
            return exchange.respond(200, _JSON, dump_json(whole))
        exchange.cancel_when_gone()
        exchange.start(200, EVENT_STREAM_HEADERS)
        for number, word in enumerate(words):
            delta = {"role": "assistant", "content": word} if not number else {"content": word}
            exchange.write(write_event({**head, "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}))
            await self._world.sleep(0.03)
        exchange.write(write_event({**head, "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}))
        exchange.write(write_event({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage}) + b"data: [DONE]\n\n")
        exchange.finish()


##############################################################################
# 25. Command line                                          I/O | uses 1-5, 8, 14-21
##############################################################################
# Arguments, commands, main.  A command reads its arguments, calls what does the work and prints; exit status 0 fine,
# 1 failed, 2 asked wrongly.  What is printed on stdout is the answer, what is printed on stderr is about it.
# One more command: a function, a row in _COMMANDS, its arguments in make_parser; README names it.

_WATCH_S = 0.5
_TRIM_AFTER_S = 0.3
_LOG_BATCH_S = 0.1
_DRAIN_S = 30.0
_H11_AT_LEAST = (0, 16)


class Home(NamedTuple):
    """Where configuration and state live."""
    folder: Path
    data: Path

    @property
    def models_path(self) -> Path:
        """models.json, which need not exist."""
        return self.folder / "models.json"

    @property
    def env_path(self) -> Path:
        """.env, which need not exist."""
        return self.folder / ".env"

    @property
    def database_path(self) -> Path:
        """The state database."""
        return self.data / "aicarousel.db"


def find_home(named: str | None) -> Home:
    """--home, else AICAROUSEL_HOME, else the program's folder if it holds a models.json, else the XDG folders."""
    named = named or os.environ.get("AICAROUSEL_HOME")
    program = Path(__file__).resolve().parent
    if named or (program / "models.json").is_file():
        folder = Path(named).expanduser().resolve() if named else program
        return Home(folder, folder / "data")
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    state = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return Home(config / "aicarousel", state / "aicarousel")


def _read_text(path: Path) -> str | None:
    """The text of a configuration file, None when there is none. Raises ConfigError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), getattr(error, "strerror", None) or "bytes that are not UTF-8", "a readable text file") from error


def read_config(home: Home, flags: Mapping[str, Any]) -> Config:
    """The configuration of a home folder. Raises ConfigError."""
    return load_config(_read_text(home.models_path), models_path=str(home.models_path), environment=os.environ, dotenv=parse_dotenv(_read_text(home.env_path) or ""), flags=flags)


# Serving.

async def serve(home: Home, flags: Mapping[str, Any], *, stop: asyncio.Event | None = None, ready: Callable[[Gateway, int], None] | None = None) -> int:
    """Run the gateway until `stop` is set or a signal comes; the exit status. Raises ConfigError before it listens.

    flags: what the command line set, by the names of Settings. ready: called with the gateway and its port once it listens.
    """
    world, stop = real_world(), stop or asyncio.Event()
    demo = Server(Demo(world), world) if flags.get("demo") else None
    if demo is not None:
        [demo_socket] = bind("127.0.0.1", 0)
        await demo.listen([demo_socket])
        flags = {**flags, "demo_url": f"http://127.0.0.1:{demo_socket.getsockname()[1]}/v1"}
    seen = _stamps_of(home)             # before they are read: an edit from here on is noticed
    config = read_config(home, flags)
    logging.getLogger("aicarousel").setLevel(config.settings.log_level.upper())
    open_database(home.database_path).close()
    keys = KeyRing(home.database_path, config.settings.api_keys)
    _check_exposure(config, keys)
    context = _server_context(config.settings)
    sockets = bind(config.settings.host, config.settings.port)
    new_key = None if keys.any_key() or config.settings.no_auth else create_key(home.database_path, "first")[0]
    usage = UsageWriter(home.database_path)
    gateway = Gateway(config, keys, usage, world)
    server = Server(gateway, world)
    await server.listen(sockets, context)
    port = sockets[0].getsockname()[1]
    wanted = _handle_signals(stop)
    _announce(home, gateway, port, new_key)
    if ready is not None:
        ready(gateway, port)
    watcher = asyncio.create_task(_watch(home, flags, gateway, stop, wanted, seen))
    asyncio.get_running_loop().call_later(_TRIM_AFTER_S, _trim_memory)
    again = False
    try:
        await stop.wait()
        again = watcher.done() and not watcher.cancelled() and watcher.result()
        logging.getLogger("aicarousel.server").info("draining connections=%d", server.n_connections())
        await server.drain(1.0 if again else _DRAIN_S)
    finally:
        watcher.cancel()
        if demo is not None:
            await demo.drain(0.0)
        gateway.close()
        await asyncio.get_running_loop().run_in_executor(None, usage.close)
        keys.close()
    if again:
        os.execv(sys.executable, [sys.executable, __file__, *sys.argv[1:]])
    return 0


def _trim_memory() -> None:
    """Give back what compiling this file has left free, some 12 MB, where the C library can."""
    import ctypes
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-8, 1)
        ctypes.CDLL(None).malloc_trim(0)


def bind(host: str, port: int) -> list[socket.socket]:
    """Listening sockets for every address of `host`. Raises ConfigError in plain words when the port is taken."""
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(socket.getaddrinfo(host or "127.0.0.1", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)):
            listening = socket.socket(family, kind, protocol)
            sockets.append(listening)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listening.bind((address[0], sockets[0].getsockname()[1] if port == 0 and len(sockets) > 1 else port, *address[2:]))
            listening.setblocking(False)
    except OSError as error:
        for listening in sockets:
            listening.close()
        raise ConfigError(f"address {host}:{port}", error.strerror or str(error), "an address of this machine and a port that is free (another one: --port)") from error
    return sockets


def _check_exposure(config: Config, keys: KeyRing) -> None:
    """Refuse to listen where others can reach while nothing keeps them out. Raises ConfigError."""
    host = config.settings.host
    if is_loopback(host):
        return
    if config.settings.no_auth:
        raise ConfigError(f"--host {host}", "--no-auth", "a loopback address: without keys only this machine may connect")
    if not keys.any_key():
        raise ConfigError(f"--host {host}", "no gateway key", "at least one before others can connect: python aicarousel.py key create NAME")


def _server_context(settings: Settings) -> ssl.SSLContext | None:
    """TLS toward clients, when a certificate is given. Raises ConfigError."""
    if not settings.tls_cert and not settings.tls_key:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError("--tls-cert, --tls-key", error.strerror or type(error).__name__, "a PEM certificate chain and its key, readable") from error
    return context


def _announce(home: Home, gateway: Gateway, port: int, new_key: str | None) -> None:
    """What a person wants to know right after the start."""
    settings = gateway.config.settings
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"{'https' if settings.tls_cert else 'http'}://{'127.0.0.1' if settings.host in ('', '0.0.0.0') else host}:{port}"
    lines = [f"AICarousel {__version__} listening on {address}", f"home: {home.folder}"]
    active = [f"{provider.name} ({len(provider.credentials)} keys)" if len(provider.credentials) > 1 else provider.name for provider in gateway.config.active]
    if active:
        lines.append(f"providers: {', '.join(active)}")
    if not any(credential.secret for provider in gateway.config.active for credential in provider.credentials):
        lines += ["No provider key was found. Looked for: " + ", ".join(gateway.config.looked_for or ("none",)),
                  f"Put one as NAME=value into {home.env_path}; it is picked up while the server runs."
                  + ("" if settings.demo else " To try without any: serve --demo")]
    lines += [f"warning: {warning}" for warning in gateway.config.warnings]
    if settings.no_auth:
        lines.append("warning: --no-auth: every program on this machine can use the providers")
    if new_key:
        lines += ["", "A gateway key was made. It is shown only now:", f"  {new_key}", "", *client_recipes(address, new_key)]
    print("\n".join(lines), flush=True)


def client_recipes(address: str, key: str) -> list[str]:
    """What to paste into which client."""
    return [
        "Claude Code:",
        f"  export ANTHROPIC_BASE_URL={address} ANTHROPIC_AUTH_TOKEN={key} ANTHROPIC_MODEL=aicarousel",
        "Codex CLI, in ~/.codex/config.toml, with AICAROUSEL_KEY set to the key:",
        '  model = "aicarousel"',
        '  model_provider = "aicarousel"',
        "  [model_providers.aicarousel]",
        '  name = "AICarousel"',
        f'  base_url = "{address}/v1"',
        '  env_key = "AICAROUSEL_KEY"',
        '  wire_api = "responses"',
        "Cline:",
        f"  provider OpenAI Compatible, base URL {address}/v1, model aicarousel, the key as API key",
        "curl:",
        f"  curl {address}/v1/chat/completions -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' \\",
        '    -d \'{"model": "aicarousel", "stream": true, "messages": [{"role": "user", "content": "Hello"}]}\'',
    ]


def _handle_signals(stop: asyncio.Event) -> asyncio.Event:
    """SIGTERM and SIGINT stop; SIGHUP sets the event that is returned, which asks for a reload."""
    loop, wanted = asyncio.get_running_loop(), asyncio.Event()
    if threading.current_thread() is threading.main_thread():
        for name, action in (("SIGTERM", stop.set), ("SIGINT", stop.set), ("SIGHUP", wanted.set)):
            loop.add_signal_handler(getattr(signal, name), action)
    return wanted


async def _watch(home: Home, flags: Mapping[str, Any], gateway: Gateway, stop: asyncio.Event, wanted: asyncio.Event, seen: list[tuple[int, int, int]]) -> bool:
    """Load the configuration anew when its files are no longer as `seen` or `wanted` is set; True when the program itself changed."""
    log, program = logging.getLogger("aicarousel.config"), Path(__file__)
    seen_program = _stamp(program)
    while not stop.is_set():
        await gateway.world.sleep(_WATCH_S)
        gateway.keys.refresh()
        stamps = _stamps_of(home)
        if stamps != seen or wanted.is_set():
            seen = stamps
            wanted.clear()
            try:
                gateway.reconfigure(read_config(home, flags))
                log.info("reloaded providers=%s", ",".join(provider.name for provider in gateway.config.active) or "none")
                for warning in gateway.config.warnings:
                    log.warning("%s", log_text(warning))
            except ConfigError as error:
                log.error("kept the old configuration: %s", error)
        if flags.get("reload") and _stamp(program) != seen_program:
            stop.set()
            return True
    return False


def _stamps_of(home: Home) -> list[tuple[int, int, int]]:
    """What changes when the configuration is edited."""
    return [_stamp(home.models_path), _stamp(home.env_path)]


def _stamp(path: Path) -> tuple[int, int, int]:
    """What changes when a file is edited or replaced."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return found.st_mtime_ns, found.st_size, found.st_ino


class _LineFormatter(logging.Formatter):
    """Time, level, logger, message on one line; the written second is kept for the records that share it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")
        self._second = (0, "")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        second = int(record.created)
        if second != self._second[0]:
            self._second = (second, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second)))
        return f"{self._second[1]},{int(record.msecs):03d}"


class _QueueLog(logging.Handler):
    """Hands records to a thread that formats and writes them, so that no request waits for a terminal or a disk."""

    def __init__(self) -> None:
        super().__init__()
        self._records: queue.SimpleQueue[logging.LogRecord | None] = queue.SimpleQueue()
        self._hurry = threading.Event()
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record; never waits."""
        self._records.put(record)

    def close(self) -> None:
        """Write what is left."""
        self._records.put(None)
        self._hurry.set()
        self._thread.join(2.0)
        super().close()

    def _write(self) -> None:
        going = True
        while going:
            batch = [self._records.get()]
            self._hurry.wait(_LOG_BATCH_S)      # a thread woken by each record would cost a busy server more than the writing
            while not self._records.empty():
                batch.append(self._records.get())
            going = None not in batch
            text = "".join(self.format(record) + "\n" for record in batch if record is not None)
            with contextlib.suppress(OSError, ValueError):      # stderr is gone or full: the log is not worth a failure
                sys.stderr.write(text)
                sys.stderr.flush()


def set_up_logging() -> None:
    """Log lines of this program to stderr, through a thread; `serve` sets the level it is configured for."""
    handler = _QueueLog()
    handler.setFormatter(_LineFormatter())
    root = logging.getLogger("aicarousel")
    root.handlers[:] = [handler]
    root.propagate = False
    # The stack walk, thread and process of a record are never shown here: Logging HOWTO, "Optimization".
    logging.raiseExceptions = logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None


# Commands.

def _h11_trouble() -> str:
    """Why serving is impossible, "" when h11 is there and new enough."""
    remedy = "Install it: python -m pip install 'h11>=0.16' (or run with uv: uv run aicarousel.py serve)"
    if h11 is None:
        return f"AICarousel needs the Python package h11 to serve. {remedy}"
    version = tuple(int(part) for part in re.findall(r"\d+", h11.__version__)[:2])
    return f"AICarousel needs h11 0.16 or newer, found {h11.__version__}. {remedy}" if version < _H11_AT_LEAST else ""


def _flags_of(arguments: Any) -> dict[str, Any]:
    """What the command line set, by the names of Settings; what it left out is not there."""
    names = ("host", "port", "log_level", "demo", "no_auth", "cors_origin", "tls_cert", "tls_key", "reload")
    return {name: value for name in names if (value := getattr(arguments, name, None)) is not None and value is not False}


def _serve_command(arguments: Any) -> int:
    trouble = _h11_trouble()
    if trouble:
        print(trouble, file=sys.stderr)
        return 2
    home, flags = find_home(arguments.home), _flags_of(arguments)
    set_up_logging()
    try:
        return asyncio.run(serve(home, flags))
    except KeyboardInterrupt:
        return 0
    finally:
        logging.shutdown()


_LOG_LEVELS = ("debug", "info", "warning", "error")


def _key_command(arguments: Any) -> int:
    path = find_home(arguments.home).database_path
    open_database(path).close()
    if arguments.action == "create":
        key, row = create_key(path, arguments.name, length=arguments.length)
        print(json.dumps({"id": row.id, "name": row.name, "key": key}) if arguments.json else f"{key}\n(id {row.id}, name {row.name}; it is shown only now)", flush=True)
        return 0
    if arguments.action == "list":
        return _print_keys(list_keys(path), arguments.json)
    found = (revoke_key if arguments.action == "revoke" else delete_key)(path, arguments.id)
    done = "revoked" if arguments.action == "revoke" else "deleted"
    text = f"key {arguments.id} {done}" if found else f"there is no key {arguments.id}"
    print(json.dumps({"id": arguments.id, "done": found}) if arguments.json else text, file=sys.stdout if found or arguments.json else sys.stderr)
    return 0 if found else 1


def _print_keys(rows: Sequence[GatewayKey], as_json: bool) -> int:
    fields = ("id", "prefix", "name", "created", "last_used", "active", "usage")
    table = [(row.id, row.prefix, row.name, row.created_utc, row.last_used_utc, row.active, row.n_used) for row in rows]
    if as_json:
        print(json.dumps([dict(zip(fields, values)) for values in table], indent=1))
        return 0
    cells = [fields, *(tuple("-" if value in (None, "") else "yes" if value is True else "no" if value is False else str(value) for value in values) for values in table)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(fields))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return 0


def _database_command(arguments: Any) -> int:
    path = find_home(arguments.home).database_path
    if arguments.action == "migrate":
        if not path.exists():
            open_database(path).close()
            print("made a new database")
            return 0
        print("\n".join(migrate(path)) or "nothing to do")
        return 0
    undone = rollback(path)
    print(f"rolled back: {undone}" if undone else "nothing to roll back")
    return 0 if undone else 1


def _status_command(arguments: Any) -> int:
    home = find_home(arguments.home)
    config = read_config(home, _flags_of(arguments))
    state = describe_status(home, config)
    if arguments.json:
        print(json.dumps(state, indent=1))
        return 0
    counts = state["database"]
    print(f"AICarousel {__version__}", f"home      {home.folder}", f"models    {home.models_path if home.models_path.exists() else 'no models.json: presets with a key in the environment'}",
          f"database  {home.database_path}, " + (f"schema {counts['schema']}" if counts else "not made yet"), f"server    {state['server']}", sep="\n")
    if counts:
        print(f"keys      {counts['keys_active']} active, {counts['keys_revoked']} revoked", f"requests  {counts['requests']}, {counts['requests_today']} today", sep="\n")
    print("providers")
    for row in state["providers"] or [{"name": "none", "state": "out", "why": "no key was found: " + ", ".join(config.looked_for), "models": 0, "keys": 0}]:
        print(f"  {row['name']:<16} {row['state']:<8} {row['models']} models, {row['keys']} keys" + (f"  ({row['why']})" if row["why"] else ""))
    for warning in config.warnings:
        print(f"warning: {warning}")
    return 0


def describe_status(home: Home, config: Config) -> Json:
    """What `status` shows, as it is without asking any provider."""
    database = {**totals(home.database_path), "schema": schema_version(home.database_path)} if home.database_path.exists() else None
    providers = [{"name": provider.name, "state": "out" if provider.why_out else "active", "why": provider.why_out, "models": len(provider.models), "keys": sum(bool(credential.secret) for credential in provider.credentials)}
                 for provider in config.providers]
    return {"version": __version__, "home": str(home.folder), "models": str(home.models_path), "database": database, "server": _probe_server(config.settings),
            "port": config.settings.port, "providers": providers, "warnings": list(config.warnings)}


def _probe_server(settings: Settings) -> str:
    """Whether a gateway answers on the configured port of this machine."""
    status, body = _ask_http("http" if not settings.tls_cert else "https", "127.0.0.1", settings.port, "GET", "/health", None, {}, 1.0)
    return f"running on port {settings.port}" if status == 200 and b'"aicarousel"' in body else f"not running on port {settings.port}"


def _ask_http(scheme: str, host: str, port: int, method: str, path: str, body: bytes | None, headers: Mapping[str, str], timeout_s: float) -> tuple[int, bytes]:
    """One request to a gateway; (0, reason) when nothing answers."""
    import http.client
    maker = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
    connection = maker(host, port, timeout=timeout_s)
    try:
        connection.request(method, path, body, dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        return 0, str(error).encode()
    finally:
        connection.close()


def _config_command(arguments: Any) -> int:
    config = read_config(find_home(arguments.home), _flags_of(arguments))
    rows = describe_config(config)
    if arguments.json:
        print(json.dumps([{"name": name, "value": value, "origin": origin} for name, value, origin in rows], indent=1))
        return 0
    for name, value, origin in rows:
        print(f"{name} = {json.dumps(value, ensure_ascii=False)}" + (f"    # {origin}" if arguments.origin else ""))
    return 0


def describe_config(config: Config) -> list[tuple[str, Any, str]]:
    """Every value in force with its origin; secrets by their source alone."""
    rows: list[tuple[str, Any, str]] = []
    for group, record in (("settings", config.settings), ("carousel", config.carousel)):
        for name in record.__dataclass_fields__:
            value = getattr(record, name)
            if name in ("api_keys", "https_proxy", "http_proxy"):
                value = "set, not shown" if value else ""
            rows.append((f"{group}.{name}", _plain(value), _origin_of(config, group, name)))
    for provider in config.providers:
        shown = {"base_url": provider.base_url, "format": provider.format, "enabled": provider.enabled, "default": provider.default, "enable_fallback": provider.enable_fallback,
                 "models": [model.id for model in provider.models], "keys": [credential.source or "none needed" for credential in provider.credentials],
                 "timeouts": _plain(provider.timeouts), "state": provider.why_out or "takes part"}
        rows += [(f"{provider.name}.{name}", value, _origin_of(config, provider.name, name)) for name, value in shown.items()]
    return rows


def _origin_of(config: Config, group: str, name: str) -> str:
    """Where a value comes from; origins are kept under the names of models.json."""
    if name == "keys":
        found = [origin for path, origin in config.origins.items() if path.startswith(f"{group}.keys.")]
        return ", ".join(dict.fromkeys(found)) or "default"
    if name == "state":
        return "-"
    first, *rest = name.removesuffix("_s").split("_")
    return config.origins.get(f"{group}.{name}") or config.origins.get(f"{group}.{first}{''.join(word.capitalize() for word in rest)}", "default")


def _plain(value: Any) -> Any:
    """A configuration value as JSON can show it."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return list(value) if isinstance(value, (tuple, frozenset)) else value


def _call_command(arguments: Any) -> int:
    """Ask a running gateway one thing; the answer on stdout, who served it on stderr."""
    config = read_config(find_home(arguments.home), {})
    try:
        scheme, host, port, path = split_url(arguments.server or f"{'https' if config.settings.tls_cert else 'http'}://127.0.0.1:{config.settings.port}")
    except ValueError as error:
        raise ConfigError("--server", str(error), "the address of a gateway, such as http://127.0.0.1:7123") from error
    if scheme not in ("http", "https") or not host:
        raise ConfigError("--server", arguments.server, "the address of a gateway, such as http://127.0.0.1:7123")
    key = arguments.key or os.environ.get("AICAROUSEL_KEY", "")
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    body: Json = {"model": arguments.model, "messages": [*messages, {"role": "user", "content": arguments.prompt}], "stream": arguments.stream}
    body |= {name: value for name, value in (("temperature", arguments.temperature), ("max_tokens", arguments.max_tokens)) if value is not None}
    if arguments.stream:
        body["stream_options"] = {"include_usage": True}
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    import http.client
    connection = (http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection)(host, port, timeout=600)
    try:
        connection.request("POST", path.rstrip("/").removesuffix("/v1") + "/v1/chat/completions", dump_json(body), headers)
        return _print_answer(connection.getresponse(), arguments.stream)
    except (KeyError, IndexError, TypeError, AttributeError, json.JSONDecodeError):
        print(f"What answers at {host}:{port} is no gateway.", file=sys.stderr)
        return 1
    except (OSError, http.client.HTTPException) as error:
        print(f"No answer from {host}:{port}: {error}. Is the gateway running (python aicarousel.py serve)?", file=sys.stderr)
        return 1
    finally:
        connection.close()


def _print_answer(answer: Any, stream: bool) -> int:
    """Print an answer of the gateway; the exit status."""
    usage, failed, ended = None, False, True
    if answer.status != 200 or not stream:
        body = json.loads(answer.read() or b"{}")
        failed, usage = answer.status != 200, body.get("usage")
        print(body["error"]["message"] if failed else body["choices"][0]["message"].get("content") or json.dumps(body["choices"][0]["message"]), file=sys.stderr if failed else sys.stdout)
    else:
        reader, ended = EventReader(), False
        while chunk := answer.read1(65536):
            for event in reader.feed(chunk):
                ended = ended or event.data == "[DONE]"
                data = {} if event.data == "[DONE]" else json.loads(event.data)
                if "error" in data:
                    failed = True
                    print(f"\n{data['error']['message']}", file=sys.stderr)
                usage = data.get("usage") or usage
                for choice in data.get("choices") or ():
                    print(choice["delta"].get("content") or "", end="", flush=True)
        print()
    if not ended and not failed:
        print("The answer ended before it was whole.", file=sys.stderr)
    told = {name: answer.getheader(f"x-aicarousel-{name}") for name in ("provider", "model", "attempts")}
    print(" ".join(f"{name}={value}" for name, value in told.items() if value) + (f" in={usage.get('prompt_tokens')} out={usage.get('completion_tokens')}" if usage else ""), file=sys.stderr)
    return 1 if failed or not ended else 0


_COMMANDS: Mapping[str, Callable[[Any], int]] = {
    "serve": _serve_command,
    "key": _key_command,
    "status": _status_command,
    "call": _call_command,
    "db": _database_command,
    "config": _config_command,
}


def make_parser() -> Any:
    """The command line, as argparse knows it."""
    import argparse
    parser = argparse.ArgumentParser(prog="aicarousel.py", description="AICarousel: one address for many LLM APIs.")
    parser.add_argument("--version", action="version", version=f"AICarousel {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--home", metavar="DIR", help="where models.json, .env and data/ live")
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print JSON")

    served = commands.add_parser("serve", parents=[common], help="run the gateway")
    served.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    served.add_argument("--port", type=int, help="port to listen on (default 7123; 0 for any)")
    served.add_argument("--log-level", choices=_LOG_LEVELS, help="how much is logged (default info)")
    served.add_argument("--reload", action="store_true", help="start again when aicarousel.py changes")
    served.add_argument("--demo", action="store_true", help="add a provider that answers offline")
    served.add_argument("--no-auth", action="store_true", help="ask no gateway key (loopback only)")
    served.add_argument("--cors-origin", action="append", dest="cors_origin", metavar="ORIGIN", help="let pages of this origin call (may repeat)")
    served.add_argument("--tls-cert", metavar="FILE", help="serve HTTPS with this certificate chain")
    served.add_argument("--tls-key", metavar="FILE", help="the certificate's private key")

    actions = commands.add_parser("key", help="gateway keys").add_subparsers(dest="action", required=True, metavar="ACTION")
    created = actions.add_parser("create", parents=[common, as_json], help="make a key and print it once")
    created.add_argument("name", nargs="?", default="default")
    created.add_argument("--length", type=int, default=64, help="hex characters behind sk- (32 to 128, default 64)")
    actions.add_parser("list", parents=[common, as_json], help="show all keys")
    for action, told in (("revoke", "refuse a key from now on"), ("delete", "remove a key")):
        actions.add_parser(action, parents=[common, as_json], help=told).add_argument("id", type=int)

    commands.add_parser("status", parents=[common, as_json], help="what is configured and what runs")

    called = commands.add_parser("call", parents=[common], help="ask a running gateway one thing")
    called.add_argument("prompt")
    called.add_argument("-m", "--model", default="aicarousel")
    called.add_argument("-k", "--key", help="gateway key (default: AICAROUSEL_KEY)")
    called.add_argument("--server", metavar="URL", help="address of the gateway (default: this machine)")
    called.add_argument("-t", "--temperature", type=float)
    called.add_argument("--max-tok", type=int, dest="max_tokens", metavar="N")
    called.add_argument("-s", "--system", metavar="TEXT")
    called.add_argument("--stream", action="store_true")

    actions = commands.add_parser("db", help="the state database").add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("migrate", parents=[common], help="bring it up to date (a backup is made first)")
    actions.add_parser("rollback", parents=[common], help="undo the last step (a backup is made first)")

    actions = commands.add_parser("config", help="the configuration").add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("show", parents=[common, as_json], help="every value in force").add_argument("--origin", action="store_true", help="where each value comes from")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    os.umask(0o077)
    arguments = make_parser().parse_args(argv)
    try:
        return _COMMANDS[arguments.command](arguments)
    except ConfigError as error:
        print(f"aicarousel: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
