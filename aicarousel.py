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
     6  Quotas              what providers grant, what is used of it, when there is room
     7  Routing policy      which route, in which order, what cools for how long
     8  Event streams       server-sent events, incremental and bounded
     9  Hub                 the neutral request, parts and deltas, and every rule that formats share
    10  OpenAI Chat         requests checked, streams watched on their way through, and the six names
    11  OpenAI Responses    the same for Responses
    12  Anthropic Messages  the same for Messages
    13  Plain endpoints     /v1/completions and /v1/embeddings: what came before Chat
    14  Translation         the FORMATS table, pass-through, stream coupling, token estimate
    15  World               time, chance, the network, alarms
    16  HTTP                heads by h11, bodies by hand
    17  Store               SQLite: gateway keys and their limits, usage, statistics, migrations
    18  Transport           the providers' side: connections, TLS, proxies, deadlines
    19  Server              the clients' side: accept, keep-alive, limits, drain
    20  Relay               attempts, commit, pump, keep-alives, cancellation
    21  Pages               the front page, the list of models, statistics as text
    22  Endpoints           the running whole, its URLs and who may call them
    23  Accounts            the home folder and changes to its files, keys checked and stored, logins
    25  Bundle              the copy that needs nothing installed
    26  Set-up              the dialogue of `setup`
    27  Command line        serve, key, status, stats, call, db, config

Life of a request
    Server reads it (19) -> admit and check (22) -> plan (7) -> attempt (20)
    -> Transport.request (18) -> failure: classify (5), cool (7), next route | success: commit, pump -> settle (17)

Promises
    Nothing is retried after commit; the rest of a text may be asked for, and joined if nothing speaks against it.  No secret is logged.  Pure sections never touch the outside world.
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
import gc
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
#: What a client may speak: a provider's formats, and the plain endpoints.
ClientFormat = Literal["chat", "responses", "messages", "completions", "embeddings"]
FORMAT_NAMES: tuple[str, ...] = ("chat", "responses", "messages")

#: Why an attempt ended badly; what follows from each is the table FAILURE_RULES.
Kind = Literal["request", "fit", "model", "credential", "payment", "rate", "server", "network", "parameter"]


@dataclass(frozen=True, slots=True)
class Price:
    """USD per million tokens; None where unknown.  Tokens of a cache whose price is not stated cost what fresh ones do."""
    input: float | None = None
    output: float | None = None
    cache_read: float | None = None
    cache_write: float | None = None
    as_of: str = ""                 #: the day a preset's price was read, "" for one of models.json
    long_over: int | None = None    #: a prompt of more tokens makes the whole request dearer, by these factors; unknown ones make it unknown
    long_input: float | None = None
    long_output: float | None = None


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
class Repair:
    """An edit of requests to one model that a refusal of its provider asked for.  `none`: it was tried and did not help."""
    field: str                      #: as the provider calls it; a dot stands before a name inside an object
    how: Literal["rename", "most", "least", "drop", "none"]
    to: str | float | None = None   #: the other name, or the bound
    value: str | None = None        #: drop: the value that was refused, as compact JSON; None for any
    until_utc: float = 0.0


class ContextWindow(NamedTuple):
    """How much a model holds, as its provider told when a request did not fit."""
    n_tokens: int
    until_utc: float
    shared: bool                    #: the answer that was asked for counted too


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
    lists_models: bool = False               #: "*" is among its models: clients are shown all that it says it has


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
    changed: tuple[str, ...] = ()   #: fields left out or changed for this route, as the client is told

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


def printable(text: str) -> str:
    """`text` on one line that no terminal obeys: whatever is not printable as a question mark."""
    return text if text.isprintable() else "".join(character if character.isprintable() else "?" for character in text)


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
    completions: bool = False                #: whether it completes plain text at /completions, with any of its models
    first_byte_s: float = 60.0
    idle_s: float = 90.0
    free_limits: Limits | None = None        #: of the free tier; per model where `bucket` is model
    retired: Mapping[str, str] = field(default_factory=dict)      #: model id or glob -> when
    needs: tuple[str, ...] = ()              #: further variables that fill {NAME} in the URLs
    gone: str = ""                           #: why the whole service cannot be used any more
    check: tuple[str, str] = ("GET", "/models")   #: cheapest call that proves a key; /chat/completions: with one token of output
    continue_url: str = ""                   #: where the beginning of an answer is gone on with, where base_url does not do it
    name: str = ""                           #: its key in PRESETS


#: The day the prices of the presets were read.
PRICES_AS_OF = "2026-11-21"


def _known_model(model_id: str, context: int, max_output: int, can: str, price: tuple[float | None, ...] = (), limits: Limits | None = None, *,
                 long: tuple[Any, ...] = ()) -> Model:
    """A model of a preset.  `can`: letters of t(ools), v(ision), r(easoning); `price`: USD per million in, out, cache read, cache write.

    long: more prompt tokens than this cost more, and by which factors on what goes in and out, where they are known.
    """
    known = Price(*price, **dict(zip(("long_over", "long_input", "long_output"), long)), as_of=PRICES_AS_OF) if price else None
    return Model(model_id, None, context, max_output, "v" in can, "t" in can, "r" in can, known, limits)


def _retired(when_by_names: Mapping[str, str]) -> dict[str, str]:
    """`when` of each name; several names of one date stand in one line, parted by spaces."""
    return {name: when for names, when in when_by_names.items() for name in names.split()}


_FREE = (0.0, 0.0)
_OPENAI_LONG = (272_000, 2.0, 1.5)
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
        message_rejects=("reasoning_content",), completions=True,
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
        default="gemma3:1b", bucket="machine", first_byte_s=300.0, max_field="max_tokens", completions=True,
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
            _known_model("gpt-6-luna", 1050000, 128000, "tvr", (0.1, 0.5, 0.01), long=_OPENAI_LONG),
            _known_model("gpt-5.6-luna", 1050000, 128000, "tvr", (0.2, 1.2, 0.02), long=_OPENAI_LONG),
            _known_model("gpt-6.1-terra", 1050000, 128000, "tvr", (1.0, 5.0, 0.05), long=_OPENAI_LONG),
            _known_model("gpt-6.1-sol", 1050000, 128000, "tvr", (2.0, 10.0, 0.1), long=_OPENAI_LONG),
        ),
        retired=_retired({
            "gpt-3.5-turbo gpt-4 gpt-4-turbo gpt-4.1-nano o1 o3-mini o4-mini": "2026-10-23", "gpt-5-codex gpt-5-chat-latest": "2026-07-23",
            "gpt-5 gpt-5-mini gpt-5-nano gpt-5-pro": "2026-12-11", "gpt-5.4-nano": "2027-04-01",
        })),
    "anthropic": Preset(                     # a cache write of five minutes costs a quarter more than fresh input.  ANTHROPIC_AUTH_TOKEN is left out: clients of this gateway keep their gateway key in it
        "Anthropic Claude API", "https://api.anthropic.com/v1", ("ANTHROPIC_API_KEY",), "https://platform.claude.com/settings/keys",
        format="messages", default="claude-haiku-5-5", bucket="model", first_byte_s=120.0,
        auth_header="x-api-key", auth_scheme="", headers=(("anthropic-version", "2023-06-01"),),
        models=(
            _known_model("claude-haiku-5-5", 1000000, 128000, "tvr", (0.1, 0.5, 0.01, 0.125), long=(100_000, 5.0, 5.0)),
            _known_model("claude-sonnet-5-5", 1000000, 128000, "tvr", (2.0, 10.0, 0.1, 2.5)),
            _known_model("claude-opus-5-5", 1000000, 128000, "tvr", (4.0, 20.0, 0.2, 5.0)),
            _known_model("claude-haiku-4-5", 200000, 64000, "tvr", (1.0, 5.0, 0.1, 1.25)),
        ),
        retired=_retired({"claude-3-*": "2025-2026", "claude-sonnet-4-5": "2026-11-30", "claude-mythos-preview": "2026-06-09"})),
    "github-copilot": Preset(                # GITHUB_TOKEN is left out: every build machine has one, and it is not meant for this
        "GitHub Copilot", "https://api.githubcopilot.com", ("COPILOT_GITHUB_TOKEN", "GITHUB_COPILOT_TOKEN"),
        default="gpt-6-luna", first_byte_s=120.0, idle_s=180.0, rejects=("store",), max_field="max_completion_tokens",
        other_urls={"messages": "https://api.githubcopilot.com/v1", "responses": "https://api.githubcopilot.com"},
        headers=(("openai-intent", "conversation-edits"),),
        models=(
            _known_model("gpt-6-luna", 922000, 128000, "tvr", (0.1, 0.5, 0.01), long=(272_000,)),
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
        continue_url="https://api.deepseek.com/beta",
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
            _known_model("grok-4.3", 1000000, 30000, "tvr", (1.25, 2.5, 0.2), long=(199_999,)),
            _known_model("grok-4.7", 500000, 500000, "tvr", (2.0, 6.0, 0.5), long=(199_999,)),
        ),
        retired=_retired({"grok-3 grok-4-0709 grok-4-fast-* grok-4-1-fast-* grok-code-fast-1": "2026-05-15"})),
    "together": Preset(
        "Together AI", "https://api.together.ai/v1", ("TOGETHER_API_KEY", "TOGETHERAI_API_KEY"), "https://api.together.ai/settings/api-keys",
        default="openai/gpt-oss-120b", rejects=("store",), max_field="max_tokens", completions=True,
        models=(
            _known_model("openai/gpt-oss-120b", 131072, 131072, "tr", (0.15, 0.6)),
            _known_model("zai-org/GLM-5.3-Flash", 1048575, 400000, "tvr", (0.15, 0.5, 0.03)),
            _known_model("Qwen/Qwen3.5-9B", 262144, 65536, "tvr", (0.17, 0.25)),
        )),
    "fireworks": Preset(
        "Fireworks AI", "https://api.fireworks.ai/inference/v1", ("FIREWORKS_API_KEY",), "https://app.fireworks.ai/settings/users/api-keys",
        default="accounts/fireworks/models/glm-5p3-flash", rejects=("store",), max_field="max_tokens", completions=True,
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
        bucket="machine", first_byte_s=300.0, other_urls={"responses": "http://127.0.0.1:1234/v1"}, completions=True),
    "vllm": Preset(
        "vLLM server (local)", "http://127.0.0.1:8000/v1", ("VLLM_API_KEY",), keyless=True,
        bucket="machine", first_byte_s=300.0, other_urls={"responses": "http://127.0.0.1:8000/v1"}, completions=True),
    "llamacpp": Preset(
        "llama.cpp server (local)", "http://127.0.0.1:8080/v1", ("LLAMA_CPP_API_KEY",), keyless=True,
        bucket="machine", first_byte_s=300.0, rejects=("store",), completions=True),
    "github-models": Preset(
        "GitHub Models (retired)", "https://models.github.ai/inference",
        gone="another provider: GitHub Models was retired on 2026-07-30 and its address answers 410 Gone"),
}

PRESETS: Mapping[str, Preset] = MappingProxyType({name: replace(row, name=name) for name, row in _ROWS.items()})

#: What is assumed of a provider that has no row.
CUSTOM_PRESET = Preset("Custom provider", name="custom")

# Prices.
#
# USD per million tokens, as public catalogues gave them on PRICES_AS_OF; a price in models.json goes before.  What is free is 0, what is not known is
# None and stays unknown.  Where a price depends on more than tokens there is one: DeepSeek's of its peak hours (else half), Gemini's of before 2027-01-01
# (then double), Anthropic's cache writes of five minutes (an hour costs more); free plans of paid models count as paid.

_PRICES: Mapping[tuple[str, str], Price] = {(name, model.id): model.price for name, preset in PRESETS.items() for model in preset.models if model.price is not None}
_NO_PRICE = Price(0.0, 0.0, as_of=PRICES_AS_OF)


def price_for(provider: Provider, model: Model) -> Price | None:
    """What a model costs at a provider: by models.json, by its preset, nothing on one's own machine; None where nobody said."""
    if model.price is not None:
        return model.price
    if provider.preset.bucket == "machine" or (provider.preset.name == "openrouter" and model.id.endswith(":free")):
        return _NO_PRICE
    return _PRICES.get((provider.preset.name, model.id))


class TokenClasses(NamedTuple):
    """The tokens of an answer, each in one class alone; reasoning is a part of `output`."""
    input: int
    cached: int
    cache_write: int
    output: int


def token_classes(usage: Usage) -> TokenClasses:
    """`usage` without overlaps; a provider that claims more of the cache than its prompt holds is believed up to the prompt."""
    cached = min(usage.cached, usage.input)
    written = min(usage.cache_write, usage.input - cached)
    return TokenClasses(usage.input - cached - written, cached, written, usage.output)


def cost_usd(tokens: TokenClasses, price: Price | None) -> float | None:
    """What `tokens` cost; 0.0 for none, None where the price of any of them is unknown."""
    if not any(tokens):
        return 0.0
    if price is None:
        return None
    fresh, long = price.input, price.long_over is not None and tokens.input + tokens.cached + tokens.cache_write > price.long_over
    inward, outward = (price.long_input, price.long_output) if long else (1.0, 1.0)
    total = 0.0
    for count, rate, factor in ((tokens.input, fresh, inward), (tokens.cached, fresh if price.cache_read is None else price.cache_read, inward),
                                (tokens.cache_write, fresh if price.cache_write is None else price.cache_write, inward), (tokens.output, price.output, outward)):
        if count:
            if rate is None or factor is None:
                return None
            total += count * rate * factor
    return total / 1e6


@functools.lru_cache(maxsize=1024)
def price_text(price: Price | None) -> str:
    """A price as a usage row keeps it, "" for none: in/out/cache read/cache write, and where from."""
    if price is None:
        return ""
    rates = "/".join("-" if rate is None else f"{rate:g}" for rate in (price.input, price.output, price.cache_read, price.cache_write))
    return f"{rates} {price.as_of or 'models.json'}" + (f" (dearer over {price.long_over})" if price.long_over is not None else "")


# Keys.

class KeyForm(NamedTuple):
    """What keys of `providers` look like: of the one that it must be, or of those that it may be.  `why_not`: why such a key is of no use here."""
    pattern: str
    providers: tuple[str, ...]
    sure: bool = True
    why_not: str = ""


_NO_MODELS = "it is for administration and cannot run models"

#: Tried in this order; what nothing fits may be anybody's.
KEY_FORMS: tuple[KeyForm, ...] = (
    KeyForm(r"sk-or-v1-[0-9a-f]{64}", ("openrouter",)),
    KeyForm(r"sk-ant-api[0-9]{2}-[\w-]{80,}", ("anthropic",)),
    KeyForm(r"sk-ant-oat[0-9]{2}-.*", ("anthropic",), why_not="it belongs to a subscription, which is for the vendor's own programs"),
    KeyForm(r"sk-ant-admin[0-9]{2}-.*", ("anthropic",), why_not=_NO_MODELS),
    KeyForm(r"sk-(?:proj|svcacct)-[\w-]{20,}", ("openai",)),
    KeyForm(r"sk-admin-.*", ("openai",), why_not=_NO_MODELS),
    KeyForm(r"sk-[\w-]*T3BlbkFJ[\w-]+", ("openai",)),
    KeyForm(r"gsk_[A-Za-z0-9]{40,}", ("groq",)),
    KeyForm(r"csk-[A-Za-z0-9]{20,}", ("cerebras",)),
    KeyForm(r"AIza[\w-]{35}|AQ\.[\w-]{20,}", ("gemini",)),
    KeyForm(r"hf_[A-Za-z0-9]{30,}", ("huggingface",)),
    KeyForm(r"gh[ou]_[A-Za-z0-9]{36,}", ("github-copilot",)),
    KeyForm(r"tid=[^;]+;.*", ("github-copilot",), why_not="it expires within the hour: python aicarousel.py login github-copilot"),
    KeyForm(r"ghp_[A-Za-z0-9]{36,}|github_pat_\w{50,}", ("github-copilot",), why_not="Copilot takes no personal access tokens: python aicarousel.py login github-copilot"),
    KeyForm(r"xai-[A-Za-z0-9]{60,}", ("xai",)),
    KeyForm(r"nvapi-[\w-]{40,}", ("nvidia",)),
    KeyForm(r"fw_[A-Za-z0-9]{20,}", ("fireworks",)),
    KeyForm(r"tgp_v1_[\w-]{30,}", ("together",)),
    KeyForm(r"[0-9a-f]{32}\.[A-Za-z0-9]{16}", ("zai",)),
    KeyForm(r"sk-kimi-.*", ("moonshot",), False),
    KeyForm(r"sk-sp-.*", ("qwen",), False),
    KeyForm(r"sk-lm-.*", ("lmstudio",), False),
    KeyForm(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", ("sambanova",), False),
    KeyForm(r"sk-[0-9a-f]{32}", ("deepseek", "qwen"), False),
    KeyForm(r"sk-[A-Za-z0-9]{40,60}", ("moonshot", "openai"), False),
    KeyForm(r"[0-9a-f]{64}", ("together",), False),
    KeyForm(r"[A-Za-z0-9]{32}", ("mistral",), False),
    KeyForm(r"[\w-]{40}", ("cloudflare",), False),
    KeyForm(r"eyJ[\w-]+\.[\w-]+\..*", ("minimax",), False),
)


def clean_key(text: str) -> str:
    """A key without what people paste around it: blanks, quotes, NAME=, Bearer."""
    before = None
    while before != text:
        before, text = text, re.sub(r"^(?:(?:export\s+)?[A-Za-z_][A-Za-z0-9_]*_(?:KEY|TOKEN)\s*=|[Bb]earer\s)", "", text.strip().strip("\"'`,;"))
    return text


def key_form(key: str) -> KeyForm | None:
    """What a key looks like, None for nothing known."""
    return next((form for form in KEY_FORMS if re.fullmatch(form.pattern, key, re.ASCII)), None)


def mask_key(key: str) -> str:
    """A key as it may be shown: its first 6 and last 4 characters, of a short one nothing."""
    return f"{key[:6]}...{key[-4:]}" if len(key) >= 20 else "***"


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
# One more field: a line in its table.  One more limit: a line in Bounds, and the row that tests/test_docs.py then wants in README.  One more setting: a field of Settings, a line in _SETTINGS, a README line.

def _bound(default: float, low: float, high: float, unit: str, about: str) -> Any:
    """A field of Bounds: its default, the range it may be set in, its unit, and what README says of it."""
    return field(default=default, metadata={"low": low, "high": high, "unit": unit, "about": about})


@dataclass(frozen=True, slots=True)
class Bounds:
    """`carousel.limits` of models.json: how long, how much and how many.  This table is what checks, defaults, `config show` and README are made from.

    A field's name in models.json is its own in camel case, without _s for seconds.  What is under way keeps what it began with.
    """
    client_head_s: float = _bound(10.0, 0.1, 3600.0, "seconds", "until the head of a client's request is there")
    client_body_s: float = _bound(60.0, 0.1, 86_400.0, "seconds", "until its body is there")
    client_idle_s: float = _bound(120.0, 1.0, 86_400.0, "seconds", "a client's connection may wait for the next request")     # Codex keeps its own for 90
    client_stall_s: float = _bound(60.0, 0.1, 86_400.0, "seconds", "a client may read nothing of its answer")
    connections: int = _bound(4096, 1, 1_000_000, "connections", "of clients at the same time; further ones are closed at once")
    body_bytes: int = _bound(32 << 20, 1024, 1 << 30, "bytes", "of a request's body")
    answer_bytes: int = _bound(32 << 20, 1024, 1 << 30, "bytes", "of an answer that is not streamed, or that comes compressed")
    event_bytes: int = _bound(8 << 20, 1 << 17, 1 << 30, "bytes", "of one event of a stream, as long as it is not whole")
    keep_alive_first_s: float = _bound(4.5, 0.1, 3600.0, "seconds", "of silence until a stream's first sign of life")
    keep_alive_s: float = _bound(12.0, 0.1, 3600.0, "seconds", "of silence until each further one")
    drain_s: float = _bound(30.0, 0.0, 3600.0, "seconds", "answers under way may take to finish at SIGTERM")
    request_total_s: float = _bound(3600.0, 0.1, 86_400.0, "seconds", "one request may take over all its routes")
    retry_budget: float = _bound(0.2, 0.0, 10.0, "of the requests under way", "may be asking another route after a failure")
    retry_budget_least: int = _bound(3, 0, 10_000, "requests", "may do so however few there are")
    pool_idle_s: float = _bound(60.0, 0.1, 3600.0, "seconds", "a provider's connection is kept for the next request")
    pool_size: int = _bound(256, 0, 10_000, "connections", "kept so for each provider")
    cool_rate_s: float = _bound(1.0, 0.1, 86_400.0, "seconds", "a key or model is left out after a first 429 that names no time")
    cool_server_s: float = _bound(5.0, 0.1, 86_400.0, "seconds", "a key and model after a first `server` failure")
    cool_network_s: float = _bound(5.0, 0.1, 86_400.0, "seconds", "a provider after a first `network` failure")
    cool_model_s: float = _bound(60.0, 0.1, 86_400.0, "seconds", "a model after a first `model` failure")
    cool_most_s: float = _bound(600.0, 0.1, 86_400.0, "seconds", "where these four, doubling with each failure in a row, end")
    cool_credential_s: float = _bound(3600.0, 0.1, 86_400.0, "seconds", "a key after a `credential` failure")
    cool_payment_s: float = _bound(3600.0, 0.1, 86_400.0, "seconds", "a key after a `payment` failure")


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
    content_fallback: bool = False
    limits: Bounds = Bounds()
    resume: str = "safe"


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
    secret_commands: bool = False                          #: whether cmd: references may run


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
    secret_files: tuple[str, ...] = ()       #: what file: references name; read again when they change


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
    """A credential as a reference or an object; `variable` is the NAME of env:NAME, or the reference as it stands."""
    return {"variable": _want_reference(value, place)} if not isinstance(value, dict) else _want_object(_KEY_FIELDS, ("key",))(value, place)


def _want_reference(value: Any, place: _Place) -> str:
    """The NAME of env:NAME, or file:/path, or cmd:words.  A key typed here is refused unseen: this file is shown, shared and committed."""
    match = re.fullmatch(r"env:([A-Za-z_][A-Za-z0-9_]*)|((?:file:/|cmd:\s*[^\s])[^\r\n\0]*)", value) if isinstance(value, str) else None
    if match:
        return match[1] or match[2]
    name = variable_name(place.path.split(".keys", 1)[0], "API_KEY")
    raise place.refuse(_shown_kind(value), f'"env:NAME", "file:/path" or "cmd:program ..."; keys do not belong in this file: put {name}=<the key> in .env and write "env:{name}" here')


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
    if isinstance(value, str) and (value.partition(".")[0] in ("model", "messages", "stream") or not all(value.split("."))):
        raise place.refuse(_shown(value), "a request field other than model, messages and stream, with a dot before a name inside an object")
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

_PRICE_FIELDS = {"input": _Field("input", _DOLLARS), "output": _Field("output", _DOLLARS), "cacheRead": _Field("cache_read", _DOLLARS),
                 "cacheWrite": _Field("cache_write", _DOLLARS)}
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
    "rules": _Field("rules", _want_list(_want_record(lambda models="*", default=None, override=None, **rest: PayloadRule(
        models, default or {}, override or {}, rest.get("drop", ())), _RULE_FIELDS))),
}

def camel_name(name: str) -> str:
    """The name in models.json of a field we keep."""
    first, *rest = name.removesuffix("_s").split("_")
    return first + "".join(word.capitalize() for word in rest)


_BOUND_FIELDS = {
    camel_name(name): _Field(name, (_want_whole if isinstance(known.default, int) else functools.partial(_want_number, unit=known.metadata["unit"]))(
        known.metadata["low"], known.metadata["high"]))
    for name, known in Bounds.__dataclass_fields__.items()}

_CAROUSEL_FIELDS = {
    "strategy": _Field("strategy", _want_word("round-robin", "fill-first", "priority", "fastest", "cheapest", "most-quota")),
    "affinity": _Field("affinity", _want_word("auto", "on", "off")),
    "fallback": _Field("fallback", _want_word("chain", "same-model", "none")),
    "maxAttempts": _Field("max_attempts", _want_whole(1, 50)),
    "maxWait": _Field("max_wait_s", _want_number(0, 3600, "seconds")),
    "toolStream": _Field("tool_stream", _want_word("held", "live")),
    "unknownModel": _Field("unknown_model", _want_word("carousel", "reject")),
    "echoModel": _Field("echo_model", _want_flag),
    "contentFallback": _Field("content_fallback", _want_flag),
    "aliases": _Field("aliases", _want_aliases),
    "limits": _Field("limits", _want_record(Bounds, _BOUND_FIELDS)),
    "resume": _Field("resume", _want_word("off", "safe", "force")),
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
    secret_files: list[str] = field(default_factory=list)
    read_secret: Callable[[str], str] | None = None
    may_run: bool = False

    def resolve(self, reference: str) -> tuple[str, str]:
        """(value, origin) of a variable or of what a file:/path or cmd:words holds; two empty strings, and a warning, when that cannot be had."""
        kind, found, target = reference.partition(":")
        if not found:
            return self.look(reference)
        if kind == "cmd" and not self.may_run:
            self.warnings.append(f"{redact(reference)} is not run: AICAROUSEL_SECRET_COMMANDS=true in the environment or .env allows it")
            return "", ""
        if kind == "file":
            self.secret_files.append(target)
        try:
            return self.read_secret(reference) if self.read_secret is not None else "", redact(reference)
        except ConfigError as error:
            self.warnings.append(str(error))
            return "", ""

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
           else keys_out)
    usual = replace(Timeouts(), first_byte_s=preset.first_byte_s, idle_s=preset.idle_s)
    timeouts = replace(usual, **entry.get("timeouts", {}))
    load.origins |= {f"{name}.timeouts.{field_name}": f"models.json {name}.timeouts.{field_name}" if known.name in entry.get("timeouts", {})
                     else "default" if getattr(usual, known.name) == getattr(Timeouts(), known.name) else "built in" for field_name, known in _TIMEOUT_FIELDS.items()}
    return Provider(name, preset, base_url, wire, default, entry["enable_fallback"], models, credentials, enabled, entry.get("headers", ()),
                    entry.get("proxy"), timeouts, entry.get("limits"), entry.get("max_concurrent"), entry.get("rules", ()), out,
                    any(row["id"] == ALL_MODELS for row in entry["models"]))


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
    models = [replace(known.get(row["id"], Model(row["id"])), **row) for row in entry["models"] if row["id"] != ALL_MODELS]
    default = entry["default"]
    if len(models) < len(entry["models"]) and default not in [model.id for model in models]:
        models.insert(0, known.get(default, Model(default)))
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


#: Among the models of a provider: all that it lists.
ALL_MODELS = "*"


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
    load.origins[f"{name}.enabled"] = origin
    return _want_switch(value, _Place(origin)), f"switched off by {variable}"


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
        return tuple(Credential(f"{name}/{number}", key.secret, source=redact(key.variable) if ":" in key.variable else f"env:{key.variable}", **key.options)
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
        value, origin = load.resolve(variable)
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
            if ":" not in key["variable"]:
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


def _want_switch(value: Any, place: _Place) -> bool:
    if str(value).lower() in _SWITCH:
        return _SWITCH[str(value).lower()]
    raise place.refuse(_shown(value), "true or false")


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
    _Setting("secret_commands", "", ("AICAROUSEL_SECRET_COMMANDS",), _want_switch),
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
                flags: Mapping[str, Any], read_secret: Callable[[str], str] | None = None) -> Config:
    """The configuration that these say together.

    models_text: contents of models.json, None when there is none.    models_path: its name for complaints.
    flags: options of the command line by name (host, port, log_level, cors_origin, no_auth, demo, demo_url, tls_cert, tls_key), None where not given.
    read_secret: gives what a file:/path or cmd:words holds, or raises ConfigError.
    raises: ConfigError.
    """
    load = _Load(environment, dotenv, read_secret=read_secret)
    settings = _make_settings(load, flags)
    load.may_run = settings.secret_commands
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
                  tuple(load.warnings), tuple(dict.fromkeys(load.looked_for)), frozenset(load.secrets), models_path, tuple(load.secret_files))


def _make_carousel(load: _Load, value: Any, place: _Place) -> Carousel:
    """The carousel from its entry."""
    carousel = Carousel(**_want_object(_CAROUSEL_FIELDS)(value, place))
    load.note("carousel", _CAROUSEL_FIELDS, value, "models.json")
    load.note("carousel.limits", _BOUND_FIELDS, value.get("limits", {}), "models.json")
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


# Edits.
#
# Files that people write are changed as text: what an edit does not touch stays as it was, byte for byte.  Texts that come here have been loaded before.

class _Node(NamedTuple):
    """A value in JSON text from `start` to `end`; members of an object or list: (name or index, where the member begins, value)."""
    start: int
    end: int
    members: tuple[tuple[str | int, int, _Node], ...] | None


_BLANKS = re.compile(r"[ \t\r\n\ufeff]*")
_SCALAR = re.compile(r'"(?:[^"\\]|\\.)*"|[^\s,\]}]+')


def _skip(text: str, at: int) -> int:
    """Where the blanks from `at` on end."""
    match = _BLANKS.match(text, at)
    assert match is not None
    return match.end()


def _scan(text: str, at: int = 0) -> _Node:
    """The JSON value that begins behind the blanks at `at`."""
    start = _skip(text, at)
    close = {"{": "}", "[": "]"}.get(text[start])
    if close is None:
        match = _SCALAR.match(text, start)
        assert match is not None
        return _Node(start, match.end(), None)
    members: list[tuple[str | int, int, _Node]] = []
    at = _skip(text, start + 1)
    while text[at] != close:
        begin, name = at, len(members)
        if close == "}":
            label = _scan(text, at)
            name, at = json.loads(text[label.start:label.end]), _skip(text, label.end) + 1
        value = _scan(text, at)
        members.append((name, begin, value))
        at = _skip(text, value.end)
        at = _skip(text, at + 1) if text[at] == "," else at
    return _Node(start, at + 1, tuple(members))


def _find_node(text: str, path: Sequence[str | int]) -> tuple[_Node, list[str | int]]:
    """The value at `path`, or the deepest one on the way to it; and what of the path is left then."""
    node, rest = _scan(text), list(path)
    while rest and (found := next((child for name, _, child in node.members or () if name == rest[0]), None)) is not None:
        node = found
        del rest[0]
    return node, rest


def _dump_at(text: str, at: int, value: Any, pretty: bool) -> str:
    """JSON for a place in `text`: on one line, or in the file's own indentation."""
    if not pretty or not isinstance(value, (dict, list)) or not value:
        return json.dumps(value, ensure_ascii=False)
    indent = re.match(r"[ \t]*", text[max(text.rfind("\n", 0, at), text.rfind("\r", 0, at)) + 1:])
    unit = re.search(r"^([ \t]+)", text, re.M)
    assert indent is not None
    lines = json.dumps(value, ensure_ascii=False, indent=unit[1] if unit else "  ").split("\n")
    return ("\r\n" if "\r\n" in text else "\n").join([lines[0], *(indent[0] + line for line in lines[1:])])


def set_json(text: str, path: Sequence[str | int], value: Any) -> str:
    """`text` with `value` at `path`: in place of what stands there, else as the last member, in the way its neighbours are written."""
    node, rest = _find_node(text, path)
    if not rest:
        return text[:node.start] + _dump_at(text, node.start, value, "\n" in text[node.start:node.end]) + text[node.end:]
    for name in reversed(rest[1:]):
        value = {name: value}
    label = "" if text[node.start] == "[" else json.dumps(rest[0], ensure_ascii=False)
    if not node.members:
        inner = label + (": " if label else "") + json.dumps(value, ensure_ascii=False)
        inner = f"\n  {inner}\n" if len(path) == 1 else inner
        return text[:node.start + 1] + inner + text[node.end - 1:]
    _, begin, last = node.members[-1]
    gap = text[len(text[:begin].rstrip(" \t\r\n")):begin]
    gap = gap if "\n" in gap or len(node.members) > 1 else " "
    colon = text[_scan(text, begin).end:last.start] if label else ""
    pretty = any("\n" in text[child.start:child.end] for _, _, child in node.members)
    return text[:last.end] + "," + gap + label + colon + _dump_at(text, begin, value, pretty) + text[last.end:]


def cut_json(text: str, path: Sequence[str | int]) -> str:
    """`text` without the member at `path`, which is there."""
    holder = _find_node(text, path[:-1])[0]
    members = holder.members or ()
    index = next(number for number, (name, _, _) in enumerate(members) if name == path[-1])
    if len(members) == 1:
        start, end = holder.start + 1, holder.end - 1
    elif index + 1 < len(members):
        start, end = members[index][1], members[index + 1][1]
    else:
        start, end = members[index - 1][2].end, members[index][2].end
    return text[:start] + text[end:]


def order_json(text: str, path: Sequence[str | int], order: Sequence[int]) -> str:
    """`text` with the members at `path` in another order: `order` holds the index of each now."""
    members = _find_node(text, path)[0].members or ()
    made, at = [], 0
    for (_, begin, child), index in zip(members, order, strict=True):
        made += [text[at:begin], text[members[index][1]:members[index][2].end]]
        at = child.end
    return "".join([*made, text[at:]])


def set_dotenv(text: str, name: str, value: str) -> str:
    """The .env file `text` with `name` set: in its own line where there is one, else in a new line at the end."""
    quoted = value if re.fullmatch(r"[\w.,:/@+=*~-]+", value, re.ASCII) else '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
    lines = re.split(r"(\r\n|\r|\n)", text)
    for number in range(len(lines) - 1, -1, -2):
        line = lines[number]
        match = _DOTENV_LINE.fullmatch(line, 1 if line.startswith("\ufeff") else 0) if not line.lstrip().startswith("#") else None
        if match is not None and match["name"] == name:
            group = next(group for group in ("double", "single", "plain") if match[group] is not None)
            start, end = match.span(group) if group == "plain" else (match.start(group) - 1, match.end(group) + 1)
            comment = " " + line[start:end] if group == "plain" and line[start:end].startswith("#") else ""
            lines[number] = line[:start] + quoted + comment + line[end:]
            return "".join(lines)
    end = "\r\n" if "\r\n" in text else "\n"
    return text + (end if text and not text.endswith(("\n", "\r")) else "") + f"{name}={quoted}{end}"


def cut_dotenv(text: str, name: str) -> str:
    """The .env file `text` without the lines that set `name`."""
    lines = re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z", text)
    named = re.compile(rf"\ufeff?\s*(?:export\s+)?{re.escape(name)}\s*=", re.ASCII)
    return "".join(line for line in lines if not named.match(line))


##############################################################################
# 5. Failures                                               pure | uses 1-4
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


def failure_rules(bounds: Bounds) -> Mapping[Kind, Rule]:
    """What follows from each kind.  Credentials and money change by somebody's hand only, so one look an hour is enough, and nothing doubles."""
    most_s, credential_s, payment_s = bounds.cool_most_s, bounds.cool_credential_s, bounds.cool_payment_s
    return MappingProxyType({
        "request":    Rule(False, "",           0.0,                   0.0,          False),
        "parameter":  Rule(False, "",           0.0,                   0.0,          False),
        "fit":        Rule(True,  "",           0.0,                   0.0,          False),
        "model":      Rule(True,  "model",      bounds.cool_model_s,   most_s,       False),
        "credential": Rule(True,  "credential", credential_s,          credential_s, False),
        "payment":    Rule(True,  "credential", payment_s,             payment_s,    False),
        "rate":       Rule(True,  "route",      bounds.cool_rate_s,    most_s,       False),
        "server":     Rule(True,  "route",      bounds.cool_server_s,  most_s,       True),
        "network":    Rule(True,  "provider",   bounds.cool_network_s, most_s,       False),
    })


#: With the limits as they are where nobody has set them.
FAILURE_RULES = failure_rules(Bounds())


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
    "bad_value":              Reason("parameter",  ""),
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
    pattern: _Words
    reason: str
    scope: str | None = None


class _Words(NamedTuple):
    """A pattern, compiled when it is first looked for: most of them never are, and all of them would be a tenth of the start."""
    pattern: str

    def search(self, text: str) -> re.Match[str] | None:
        """Where it stands in `text`, in any case and on any line."""
        return re.search(self.pattern, text, re.I | re.M)


def _coded(*codes: str) -> _Words:
    """A code where a field, the text (z.ai: "[1113][...") or the end of the text (MiniMax: "... (1008)") names it."""
    any_of = "|".join(codes)
    return _Words(rf"^(?:code|status_code)=(?:{any_of})$|^message=\[(?:{any_of})\]|\((?:{any_of})\)\s*$")


_ANY = _Words("")
_SIGNS: tuple[_Row, ...] = (
    # one provider each
    _Row("cerebras", (400, 413), _Words(r"\A\Z"), "context_overflow"),
    _Row("cerebras", (413,), _ANY, "context_overflow"),
    _Row("cerebras", (400,), _Words(r"^code=wrong_api_format$"), "bad_param"),
    _Row("fireworks", (412,), _ANY, "billing"),
    _Row("openrouter", (), _Words(r"free-models-per-day"), "rate_day", "credential"),
    _Row("openrouter", (), _Words(r"free-models-per-min"), "rate_minute", "credential"),
    _Row("openrouter", (403,), _Words(r"key limit"), "billing"),
    _Row("openrouter", (403,), _Words(r"^reasons=|^error_type=(?:content_policy_violation|refusal)$|moderation|flagged"), "content_policy"),
    _Row("openrouter", (404,), _Words(r"support (?:tool use|image input|the requested|parameters)"), "capability_missing"),
    _Row("openrouter", (413,), _Words(r"payload too large"), "payload_too_large"),
    _Row("openrouter", (), _Words(r"^error_type=(?:context_length_exceeded|token_limit_exceeded|max_tokens_exceeded|string_too_long)$"), "context_overflow"),
    _Row("openrouter", (), _Words(r"^message=token limit reached"), "context_overflow"),
    _Row("openrouter", (), _Words(r"^error_type=payment_required$"), "billing"),
    _Row("openrouter", (), _Words(r"^error_type=authentication$"), "auth_invalid"),
    _Row("openrouter", (), _Words(r"^error_type=permission_denied$"), "permission_model"),
    _Row("openrouter", (), _Words(r"^error_type=(?:content_policy_violation|refusal)$"), "content_policy"),
    _Row("openrouter", (), _Words(r"^error_type=not_found$"), "model_gone"),
    _Row("openrouter", (), _Words(r"^error_type=payload_too_large$"), "payload_too_large"),
    _Row("openrouter", (), _Words(r"^error_type=(?:provider_overloaded|provider_unavailable)$"), "model_capacity"),
    _Row("openrouter", (429,), _Words(r"^provider_name=|upstream"), "model_capacity", "model"),
    _Row("gemini", (401, 403), _Words(r"location|country|region"), "region_blocked"),
    _Row("gemini huggingface nvidia", (403,), _ANY, "auth_invalid"),
    _Row("gemini", (429,), _Words(r"resource has been exhausted \(e\.g\. check quota\)"), "model_capacity"),
    _Row("github-copilot", (401,), _ANY, "auth_refreshable"),
    _Row("github-copilot", (403,), _ANY, "permission_model"),
    _Row("github-copilot", (413,), _ANY, "context_overflow"),
    _Row("github-copilot", (429,), _Words(r"user_global_rate_limited|global rate limit"), "rate_minute"),
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
    _Row("qwen", (), _Words(r"#token-limit"), "rate_minute"),
    _Row("qwen", (), _Words(r"AllocationQuota\.FreeTierOnly"), "billing", "route"),
    # anybody: signs too plain to mistake
    _Row("*", (498,), _ANY, "tier_capacity"),
    _Row("*", (499,), _ANY, "client_cancelled"),
    _Row("*", (429,), _Words(r"^quotaValue=0$|\blimit: 0\b"), "permission_model"),
    _Row("*", (), _Words(r"^quotaId=.*PerDay"), "rate_day"),
    _Row("*", (), _Words(r"^quotaId=.*PerMinute"), "rate_minute"),
    _Row("gemini", (429,), _Words(r"current quota"), "rate_minute"),
    _Row("*", (413, 429), _Words(r"request too large(?=[^\n]{0,300}(?:\bTPM\b|tokens per min))"), "request_over_tpm"),
    _Row("*", (400, 422, 500, 502), _Words(r"tool_use_failed|MALFORMED_FUNCTION_CALL|failed to parse tool call arguments"), "tool_generation_failed"),
    _Row("*", (400, 401, 403, 404, 451, 502), _Words(r"unsupported_country|(?:country|region|territory|user location)\b[^.\n]{0,30}not supported"
                                                   r"|not (?:available|supported) in your (?:country|region|location)"), "region_blocked"),
    _Row("*", (400, 403, 422, 502), _Words(r"\bcontent_filter\b|content_policy_violation|data_inspection_failed|ResponsibleAIPolicyViolation|^blockReason="
                                         r"|moderation_blocked"
                                         r"|flagged by (?:our |the )?(?:moderation|content)|violat\w+ (?:our |the )?(?:usage|content) polic"),
         "content_policy"),
    _Row("*", (400, 403, 500, 502), _Words(r"API_KEY_INVALID|ACCESS_TOKEN_TYPE_UNSUPPORTED|api key (?:not valid|expired|is invalid)"
                                         r"|(?:incorrect|invalid|wrong) (?:x-)?api[ -]key"
                                         r"|invalid_api_key|wrong_api_key|invalid_authentication"), "auth_invalid"),
    _Row("*", (400, 404, 405, 422), _Words(r"unsupported_api_for_model|only supported in v1/responses|not a chat model|please use (?:the )?/?v1/responses"),
         "endpoint_unsupported"),
    _Row("*", (400, 404, 422, 500, 501), _Words(r"does not support (?:tools?|function|image|images|vision|multimodal|audio|json|response_format|structured)\b"
                                              r"|not a multimodal model|(?:image|tool|function)[\w ]{0,20} (?:is|are) not supported (?:by|for|with) this model"
                                              r"|no endpoints found that support|enable-auto-tool-choice"), "capability_missing"),
    _Row("*", (400, 403, 404, 422), _Words(r"model_decommissioned|model_not_found|model_not_supported|model_not_available|model_not_active|DeploymentNotFound"
                                         r"|unknown model|no such model|not a valid model|requested model[^.\n]{0,80}(?:does not exist|not supported)"
                                         r"|\bmodel\b[^.\n]{0,80}(?:decommissioned|no longer available|end of life)"),
         "model_gone"),
    _Row("*", (413,), _Words(r"request_too_large"), "payload_too_large"),
    _Row("*", (400, 413), re.compile(r"\A(?=.*string_above_max_length)(?=.*\nparam=(?:messages|input|prompt|instructions))", re.I | re.S), "context_overflow"),
)

_OVERFLOW = _Words(
    r"prompt (?:is )?too long|prompt exceeds max length|input is too long|too many tokens"
    r"|exceeds? (?:the |this |its |your )?(?:model'?s )?(?:available |maximum )?context (?:window|length|size|limit)|exceeds? the maximum number of tokens"
    r"|maximum context length is [0-9,]+|maximum allowed input length|input token count[^\n]{0,80}exceeds the maximum|maximum prompt length is [0-9,]+"
    r"|reduce the length of the (?:messages|input|prompt)|is longer than the model'?s context length|prompt token count of \S+ exceeds the limit"
    r"|too large for model with [0-9,]+ maximum context length|context window exceeds limit|exceeded model token limit|range of input length should be"
    r"|greater than the context length|exceeded (?:max )?context length|context window exceeded|ContextWindowExceededError"
    r"|input length and [`'\"]?max_tokens[`'\"]? exceed|context[_ ]length[_ ]exceeded"
    r"|model_max_prompt_tokens_exceeded|exceed_context_size_error|token_limit_exceeded")
_RATE_WORDS = _Words(r"rate limit|too many requests|tokens per (?:min|minute|day)|throttl")
_MONEY = _Words(
    r"insufficient[_ ](?:quota|balance|credit|credits|funds)|credit balance is too low|exceeded_current_quota|exceeded (?:your )?current quota"
    r"|billing_(?:error|hard_limit|not_active)"
    r"|payment[_ ]required|(?:all|out of|of your|more) (?:available |included |prepaid )*credits|used all [^.\n]{0,20}credits"
    r"|monthly (?:included credits|spending limit)"
    r"|free monthly usage limit|no resource package|account\b[^\n]{0,80}\b(?:is suspended|not active|in arrears)|FreeTierOnly")
#: A rate limit told by name rather than by status, as errors inside a 200 do.
_RATE_NAMES = _Words(r"=(?:rate_limit_(?:exceeded|error|reached_error)|rate_limited|too_many_requests(?:_error)?|RESOURCE_EXHAUSTED|RateLimitReached)$")
_DAY = _Words(r"per[-_ ]?day|\b(?:TPD|RPD)\b|\bdaily\b|\bweekly\b|\bmonthly\b"
            r"|(?:session|hourly|weekly|daily) usage limit|\d-hour usage limit|usage limit reached")
_CAPACITY = _Words(
    r"overloaded|capacity[_ ](?:temporarily )?exceeded|(?:at|over|no|out of|insufficient) (?:available )?capacity|capacity exceeded"
    r"|queue_exceeded|high (?:traffic|demand)|server busy|maximum pending requests|rate-limited upstream"
    r"|\bResourceExhausted\b|resource has been exhausted|loading model|no healthy upstream")
_LIMIT_REQUESTED = re.compile(r"Limit:? (\d{1,12}),(?: Used:? \d{1,12},)? Requested:? (\d{1,12})", re.I)
_PERMISSION = _Words(r"\bmodel\b|subscription|upgrade|\bplan\b|policy|permissions?_error|model_permission")
_RETIRED = _Words(r"decommissioned|end of life|deprecated|retired|no longer (?:available|supported)|shut ?down")
#: Words for a model that is not there; with "access" in them they may be about the key.
_UNKNOWN = _Words(r"\A(?![\s\S]*access)[\s\S]*(?:model_not_found|unknown model|no such model|not a valid model|\bmodel\b[^.\n]{0,80}(?:does not exist|not found))")
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
    elif reason == "bad_value":
        param = param or _named_bounded(facts.message)[0]
    failure = _fail(reason, bucket, status, detail=facts.message, scope=scope, code=facts.code, param=param)
    return _time(failure, bucket, headers, facts, utc)


def _time(failure: UpstreamFailure, bucket: str, headers: Mapping[str, str], facts: _Facts, utc: float) -> UpstreamFailure:
    """`failure` with the time that its provider named, where a time can mean an end of it."""
    if failure.reason == "model_gone" and bucket != "machine" and (failure.status == 410 or _RETIRED.search(facts.words) or _UNKNOWN.search(facts.words)):
        failure.cool_s, failure.proven = _DAY_S, True      # said, not guessed from a 404; on a machine of one's own it may be there the next minute
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
    if status in (400, 422) and _named_bounded(facts.message) and _bounds_of(facts.message) != (None, None):
        return "bad_value"
    if status == 503 and preset_name in _BROKEN_AT_503:
        return "server_error"
    if preset_name in ("fireworks", "nvidia") and status in (500, 504):
        return "model_capacity" if preset_name == "fireworks" or status == 504 else "server_error"
    return _BY_STATUS.get(status, "server_error")


#: A field that this provider does not take, as the text names it.
_FIELD = _Words(
    r"(?:unsupported|unknown|unrecognized|unexpected)(?: request)?(?: keyword)? (?:parameters?|values?|arguments?|names?|fields?|key)"
    r"(?: supplied)?:? ?[\"'`]?([A-Za-z_][\w.\[\]-]*)"
    r"|property [\"'`]([\w.]+)[\"'`] is unsupported|(?<![\w.])([\w.]{1,80}): extra inputs are not permitted"
    r"|[\"'`]([\w.]+)[\"'`] (?:is|are) (?:not supported|deprecated|not permitted)"
    r"|argument not supported(?: on this model)?: ?[\"'`]?(\w+)|does not support (?:the )?(?:parameter )?[\"'`]?(effort|temperature|top_p|top_k|thinking)\b")
_REFUSED = _Words(r"not supported|unsupported|not permitted|extra_forbidden|unknown_parameter|not allowed|deprecated")
_CORE_FIELDS = frozenset({"messages", "input", "model", "prompt", "contents", "system", "tools", "file"})


def _named_field(facts: _Facts) -> str | None:
    """The one optional field the provider says it does not know; None when it complains about something else."""
    found = _FIELD.search(facts.words)
    name = next((group for group in found.groups() if group), None) if found else None
    if name is None and facts.param and _REFUSED.search(facts.words):
        name = facts.param
    return name if name and re.split(r"[.\[]", name)[0] not in _CORE_FIELDS else None


# What would be taken instead -----------------------------------------------------------------------------------------

#: Names for the same thing: one may stand for the other where the provider asks for it.
_TWINS: tuple[frozenset[str], ...] = (
    frozenset({"max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens"}),
    frozenset({"stop", "stop_sequences"}),
    frozenset({"seed", "random_seed"}),
)
_INSTEAD = re.compile(r"\b(?:use|try|specify|replaced by|renamed to|in favou?r of|did you mean)[: ]+[\"'`]?(\w{3,40})", re.I)
#: Fields whose loss would change what is asked for.
_ESSENTIAL_FIELDS = frozenset({"model", "messages", "stream", "tools", "tool_choice", "response_format", "functions", "input", "prompt", "system", "n"})
_BOUNDED_FIELD = re.compile(r"(?<![\w.])(max_completion_tokens|max_output_tokens|max_tokens|temperature|top_p|top_k|top_logprobs|n|presence_penalty|frequency_penalty"
                            r"|repetition_penalty|min_p|seed)(?!\w)")
_TOLD = r"[ :`'\"(=]{0,5}(-?\d[\d,]{0,15}(?:\.\d{1,12})?)"
_RANGE = re.compile(rf"[\[(]{_TOLD}`? ?(?:,|-) ?{_TOLD}`? ?[\])]|\bbetween{_TOLD}`? (?:and|to){_TOLD}|\b(?:range|from){_TOLD}(?: ?\.\. ?| to | ?- ?){_TOLD}", re.I)
_MOST = re.compile(rf"(?:<=|\u2264|\bat most|\bless than or equal to|(?:not|n't)(?: be)? (?:more|greater|larger|higher|bigger) than|\bexceeds?|\bup to"
                   rf"|\bmax(?:imum)?(?: (?:allowed|permitted|supported))?(?: (?:value|number|limit))? (?:is|of)){_TOLD}|> ?(\d[\d,]{{0,15}}), which is the maximum", re.I)
_LEAST = re.compile(rf"(?:>=|\u2265|\bat least|\bgreater than or equal to|(?:not|n't)(?: be)? (?:less|smaller|lower|fewer) than"
                    rf"|\bmin(?:imum)?(?: (?:allowed|permitted|supported))?(?: value)? (?:is|of)){_TOLD}", re.I)
_VALUE_REFUSED = re.compile(r"unsupported value|does not support [\"'`]?[\w.-]+[\"'`]? with this model", re.I)
_ONLY_DEFAULT = re.compile(r"only the default", re.I)


def _number(text: str) -> float:
    value = float(text.replace(",", "").rstrip("."))
    return int(value) if value.is_integer() else value


def _named_bounded(message: str) -> list[str]:
    """The fields with a range that a message names."""
    return _BOUNDED_FIELD.findall(message)


def _bounds_of(message: str) -> tuple[float | None, float | None]:
    """The least and the most that a message says a value may be; None where it does not."""
    found = _RANGE.search(message)
    if found:
        low, high = (_number(group) for group in found.groups() if group)
        return low, high
    least, most = _LEAST.search(message), _MOST.search(message)
    return _number(least[1]) if least else None, _number(most[1] or most[2]) if most else None


def find_cure(failure: UpstreamFailure, sent: Mapping[str, Any]) -> Repair | None:
    """The least edit of the request `sent` that its refusal asks for: another name, a value inside the range, else leaving the field out.

    None where nothing is known to help, or where it would change what is asked for.  The repair has no end yet.
    """
    if failure.kind != "parameter":
        return None
    named = failure.param or ""
    name = re.split(r"[.\[]", named)[0]
    if failure.reason == "bad_value":
        return _find_clamp([name, *_named_bounded(failure.detail)], failure.detail, sent)
    twins = next((twins for twins in _TWINS if name in twins), frozenset())
    other = next((word for word in _INSTEAD.findall(failure.detail) if word in twins and word != name), None)
    if other and name in sent and other not in sent:
        return Repair(name, "rename", other)
    if name in _ESSENTIAL_FIELDS or name not in sent:
        return None
    inner, value = named.partition(".")[2], sent[name]
    if inner and "[" not in named and isinstance(value, dict) and inner in value:
        return Repair(named, "drop")
    whole = not _VALUE_REFUSED.search(failure.detail) or _ONLY_DEFAULT.search(failure.detail) or isinstance(value, (dict, list))
    return Repair(name, "drop", None, None if whole else json.dumps(value))


def _find_clamp(names: Iterable[str], message: str, sent: Mapping[str, Any]) -> Repair | None:
    """The first of the fields whose value is outside of what the message allows, with the bound it is to be set to."""
    least, most = _bounds_of(message)
    for name in names:
        value = sent.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if most is not None and value > most:
                return Repair(name, "most", most)
            if least is not None and value < least:
                return Repair(name, "least", least)
    return None


#: How providers tell the size of a context window, the prompt and the answer asked for, when they do not fit together.
_WINDOW = re.compile(r"(?:context (?:length|window|size|limit)(?! by )[^\d\n]{0,20}|prompt length is |input length is |limit of |> ?|maximum number of tokens allowed \(|\bn_ctx[^\d\n]{0,4}"
                     r"|available context size \(|should be \[\d{1,9}, ?|exceeded model token limit: )(\d[\d,]{2,15})(?![\d,]| ?\+)", re.I)
_PROMPT = re.compile(r"\b(\d[\d,]{0,15}) in the (?:messages|prompt|input)|request has (\d[\d,]{0,15}) input tokens|exceed context limit: (\d[\d,]{0,15}) \+", re.I)
_LEAST_WINDOW, _MOST_WINDOW = 256, 100_000_000
#: Tokens of an answer that are worth asking for.
_LEAST_ROOM = 256


def told_window(message: str) -> int | None:
    """Tokens that a model holds, as its provider told when a request did not fit; None where it did not tell."""
    found = [int(number.replace(",", "")) for number in _WINDOW.findall(message[:_MESSAGE_MAX])]
    return next((number for number in found if _LEAST_WINDOW <= number <= _MOST_WINDOW), None)


def find_shrink(failure: UpstreamFailure, sent: Mapping[str, Any]) -> Repair | None:
    """A shorter answer with which the request `sent` fits after all, where the provider told prompt and window and there is room; None where not."""
    prompt, window = _PROMPT.search(failure.detail), told_window(failure.detail)
    name = next((name for name in sorted(_TWINS[0]) if isinstance(sent.get(name), int)), "")
    if failure.reason != "context_overflow" or prompt is None or window is None or not name:
        return None
    room = window - int(next(group for group in prompt.groups() if group).replace(",", ""))
    return Repair(name, "most", room) if _LEAST_ROOM <= room < sent[name] else None


def shorten(room: int) -> tuple[Repair, ...]:
    """Edits that let an answer be no longer than `room` tokens, whatever its provider calls that."""
    return tuple(Repair(name, "most", max(room, _LEAST_ROOM)) for name in sorted(_TWINS[0]))


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
_LONG_WORDS = _Words(r"week|month|quota|usage limit|\bplan\b|allocation|credits|\bdays\b")
_PER_DAY_QUOTA = _Words(r"^quotaId=.*PerDay")
_UTC_DAY_QUOTA = _Words(r"free-models-per-day|^code=4006$|daily free allocation")
_RETRY_KEYS = frozenset({"retrydelay", "retry_after", "retryafter", "retry_after_seconds"})


def read_reset(headers: Mapping[str, str], body_json: Any, text: str, *, utc: float) -> float | None:
    """Seconds until the provider says the route is free, the largest of all its hints; None if it says nothing that can be believed.

    headers: lower case names, of an answer that is no success.  text: its words.  utc: now, in seconds since 1970.
    """
    words = _list_words(body_json) if isinstance(body_json, (dict, list)) else text
    if _PER_DAY_QUOTA.search(words):
        return pacific_midnight_s(utc)      # Gemini goes on saying seconds when the day is spent
    waits = [*_header_waits(headers, utc), *_header_waits(_inner_headers(body_json), utc), *_field_waits(body_json, utc), *_said_waits(text or words, utc)]
    longest_s = 32 * _DAY_S if _LONG_WORDS.search(text or words) else _DAY_S
    wait_s = max((wait for wait in waits if 0.0 < wait <= longest_s), default=None)
    if wait_s is None and _UTC_DAY_QUOTA.search(f"{words}\n{text}"):
        return _DAY_S - utc % _DAY_S
    return wait_s


def read_wait(value: str, utc: float) -> float | None:
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
    says_when = any(name.endswith(("retry-after", "retry-after-ms")) for name in headers)
    for name, value in headers.items():
        if name == "retry-after-ms":
            number = value.strip()          # of more than float() would: OpenRouter's copies may hold control characters
            waits.append(float(number) / 1000.0 if _DECIMAL.fullmatch(number) else None)
        elif name.endswith("retry-after"):
            waits.append(read_wait(value, utc))
        elif "ratelimit" in name and "reset" in name and (not says_when or "day" in name):     # where windows refill, it is when all is back, not when some is
            left, wait_s = headers.get(name.replace("reset", "remaining")), read_wait(value, utc)
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
    waits = (read_wait(value, utc) for key, _, value in lines if key.lower() in _RETRY_KEYS)
    return [wait for wait in waits if wait is not None]


def _said_waits(text: str, utc: float) -> list[float]:
    """Waits told in words: "try again in 9m38.016s", "resets in 13 days", "will reset at 2026-08-06 20:06:00"."""
    text = text[:_WORDS_MAX]
    instants = (_until(found, utc) for pattern in (_SAID_INSTANT, _SAID_INSTANT_ZH) for found in pattern.finditer(text))
    return [*(_sum_spans(found.group(1)) for found in _SAID_SPAN.finditer(text)), *(wait for wait in instants if wait is not None)]


def pacific_midnight_s(utc: float) -> float:
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
    "unsupported": "capability",
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
    if answer.code == "unsupported":
        words = list(dict.fromkeys(failure.detail for failure in failures if failure.detail))[:_LISTED_MAX]
        return GatewayError(f"{answer.lead} {'; '.join(words)}.", answer.status, answer.code, answer.type, None, None, rows)
    return GatewayError(_tell(answer.lead, failures, attempts), answer.status, answer.code, answer.type,
                        "model" if answer.status == 404 else None, _retry_after_s(answer, failures), rows)


def withdrawn(told: Iterable[tuple[str, str]]) -> GatewayError:
    """What the client is told when every provider has said before that it has no such model; told: provider/model, and the words in which it did."""
    rows = dict.fromkeys(f"{name}: {_URL.sub('(link)', words) or 'withdrawn'}" for name, words in told)
    return unknown_model(f"No provider has this model any more. {'; '.join(list(rows)[:_LISTED_MAX])}")


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
# 6. Quotas                                                 pure | uses 1-3, 5
##############################################################################
# What providers grant, what of it is used, and when there is room again: arithmetic, with `now` handed in.
# A bucket is what a provider counts by (Preset.bucket); it holds windows: requests or tokens in a second, a minute, a day.
# A request is reserved before it goes out, settled with what it really used, released when it counted for nothing, so a
# burst is spread by what has been reserved and not by refusals.  Every limit knows where it came from and when.
# Where nothing else is known a window rolls: what fits a rolling window fits a fixed one of any beginning too.
# Source: headers and bodies as providers send them.  Guarded by tests/test_quota.py, a row per style, and tests/test_simulator.py.
# One more header style: a pattern in _HEADERS, and the presets whose windows are unlike others in the tables below it.

_SECONDS_PER: Mapping[str, float] = MappingProxyType({"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86_400.0, "month": 30 * 86_400.0})
_ALWAYS_COUNTED = (("requests", 60.0), ("tokens", 60.0), ("requests", 86_400.0), ("tokens", 86_400.0))   # so that a refusal has something to teach
_LIMIT_FIELDS = (("rpm", "requests", 60.0), ("rpd", "requests", 86_400.0), ("tpm", "tokens", 60.0), ("tpd", "tokens", 86_400.0))
_TRAVEL_S = 0.5             #: what counts at a provider counts there this much later than here, at most
_GRAINS = 128               #: a rolling window keeps no more entries than this, each of a span/128
_FREE_SLACK = 2.1           #: a key that was served more than this much of a free plan's figure is on another plan; two fixed windows meet in any rolling one
_FIRST_ASKED = 8            #: so many requests may be unanswered at a provider of unknown limits while others are full, or twice what it served in the last minute
_WRONG_MAX = 3
_SLID_MAX = 2
_ASKED_S = 0.5              #: when to look again while somebody else is asking
_MAX_WINDOWS = 16           #: of one bucket; providers have six at most
_MAX_LIMIT = 10.0 ** 12
_PATIENCE_SPANS = (3.0, 2.0)       #: spans until a learned limit grows: of windows under an hour, of longer ones; doubled by each refusal
_MAX_PATIENCE_S = 16 * 86_400.0
_TRUSTED_S = 7 * 86_400.0   #: a limit from a refusal is believed this long: a plan may have been changed
_SLOT_GROWS_S = 60.0        #: a learned concurrency cap grows by one in this time
_NEVER = float("inf")


@dataclass(slots=True, eq=False)
class Window:
    """One limit of a bucket and what counts against it.

    rolling: `used` is the sum of `entries`.  fixed: all of it ends at `resets_at`.  refill: it ebbs by limit/span.
    """
    measure: str                    #: requests, tokens, input or output
    span_s: float
    kind: str = "rolling"
    clock: str = ""                 #: utc or pacific: the midnight at which a fixed day ends; "": a span after the last reset
    configured: float = _NEVER      #: by models.json; a provider's own figure counts only below it
    known: float = _NEVER
    limit: float = _NEVER           #: the smaller of the two, in force
    source: str = ""                #: of `known`: header, refusal, learned, preset
    known_utc: float = 0.0
    used: float = 0.0
    held: float = 0.0               #: answers under way: tokens they may still bring
    at: float = 0.0                 #: refill: when `used` was right
    resets_at: float = _NEVER       #: fixed: the end; rolling: what a header said last, where that is sooner than the oldest entry ends
    grows_at: float = _NEVER        #: learned: when it may be tried whether there is more
    patience_s: float = 0.0
    n_wrong: int = 0                #: presets that refill: signs in a row that this window does not; after three of them it rolls
    n_slid: int = 0                 #: rolling: resets that a header named and that did not end all; after two of them it is asked no sooner than its entries end
    entries: list[list[float]] = field(default_factory=list)    #: [at, amount], oldest first; of windows that do not roll the latest few

    @property
    def origin(self) -> str:
        """Where the limit in force came from, "" where there is none."""
        return "configured" if self.configured <= self.known and self.configured != _NEVER else self.source


@dataclass(slots=True, eq=False)
class Bucket:
    """What a provider counts together. `limited` are the windows whose limit is known; `n_open` requests are under way."""
    key: str                        #: one of Route.keys
    windows: list[Window] = field(default_factory=list)
    limited: tuple[Window, ...] = ()
    n_open: int = 0
    n_unseen: int = 0               #: of these, those of which nothing is known yet, and their input: they may be refused
    unseen_input: int = 0
    max_open: float = _NEVER        #: configured
    learned_open: float = _NEVER    #: by a refusal at `learned_open_at`, one more with every minute since
    learned_open_at: float = 0.0


@dataclass(slots=True)
class Ledger:
    """All buckets. Owner: RoutingState. `by_id` finds a route's, its own first, by the id of the route, else of the credential."""
    buckets: dict[str, Bucket] = field(default_factory=dict)
    by_id: dict[str, tuple[Bucket, ...]] = field(default_factory=dict)
    utc_less_now: float = 0.0       #: seconds since 1970 when the monotonic clock was 0


@dataclass(slots=True, eq=False)
class Hold:
    """What one request has reserved; done once it is settled or released."""
    buckets: tuple[Bucket, ...]
    at: float
    n_input: int
    n_output: int
    done: bool = False
    seen: bool = False              #: the provider has answered


class Shortage(NamedTuple):
    """Why there is no room: what is short, when that ends (infinite: never), whether it is known or only guessed."""
    bucket: Bucket
    window: Window | None           #: None: too many requests at a time
    at: float
    proven: bool                    #: announced, refused with a figure or configured, not learned
    soft: bool                      #: only by the figures of a free plan, which a paid key does not have


class Told(NamedTuple):
    """What an answer says of one window; None where it does not."""
    measure: str
    span_s: float
    kind: str
    limit: float | None
    left: float | None
    reset_s: float | None


# Which buckets there are ---------------------------------------------------------------------------------------------

_SCOPE_OF_BUCKET: Mapping[str, str] = MappingProxyType({"account": "credential", "model": "route", "machine": "provider"})
#: Presets whose days end at a midnight.
_CLOCKS: Mapping[str, str] = MappingProxyType({"gemini": "pacific", "openrouter": "utc", "cloudflare": "utc"})
#: Presets whose windows fill up all the time, a bit each second, rather than at once.
_REFILLS = frozenset({"groq", "openai", "anthropic"})


def prepare_ledger(ledger: Ledger, providers: Iterable[Provider], *, utc_less_now: float) -> None:
    """Make the buckets of all configured routes. What was learned of those that stay is kept, the rest forgotten."""
    before, ledger.buckets, ledger.by_id, ledger.utc_less_now = ledger.buckets, {}, {}, utc_less_now

    def bucket(key: str, preset: Preset) -> Bucket:
        if key not in ledger.buckets:
            ledger.buckets[key] = made = before.get(key) or Bucket(key)
            made.max_open = _NEVER
            for window in made.windows:
                window.configured = _NEVER
            for measure, span_s in _ALWAYS_COUNTED:
                _window(made, measure, span_s, preset.name)
        return ledger.buckets[key]

    for provider in providers:
        scope = SCOPES[_SCOPE_OF_BUCKET[provider.preset.bucket]]
        for credential in provider.credentials:
            models = provider.models if any(model.id == provider.default for model in provider.models) else (*provider.models, Model(provider.default))
            for model in models:
                route = make_route(provider, credential, model)
                own = bucket(route.keys[scope], provider.preset)
                _configure(own, provider.limits, provider.preset.name)
                _presume(own, provider.preset, model.id)
                found = [own]
                if model.limits is not None:
                    found.append(bucket(route.keys[3], provider.preset))
                    _configure(found[-1], model.limits, provider.preset.name)
                if provider.max_concurrent is not None:
                    found.append(bucket(route.keys[0], provider.preset))
                    found[-1].max_open = provider.max_concurrent
                ledger.by_id[route.id] = tuple(dict.fromkeys(found))
                ledger.by_id[credential.id] = tuple(one for one in ledger.by_id[route.id] if one.key in route.keys[:2])
    for made in ledger.buckets.values():
        _sort_out(made)


def _window(bucket: Bucket, measure: str, span_s: float, preset_name: str) -> Window:
    """The window of `bucket` for one measure and span, made if missing."""
    for window in bucket.windows:
        if window.measure == measure and window.span_s == span_s:
            return window
    made = Window(measure, span_s)
    if preset_name in _REFILLS:
        made.kind = "refill"
    elif span_s == 86_400.0 and preset_name in _CLOCKS:
        made.kind, made.clock, made.resets_at = "fixed", _CLOCKS[preset_name], -_NEVER
    if len(bucket.windows) < _MAX_WINDOWS:
        bucket.windows.append(made)
    return made


def _configure(bucket: Bucket, limits: Limits | None, preset_name: str) -> None:
    for name, measure, span_s in _LIMIT_FIELDS if limits is not None else ():
        value = getattr(limits, name)
        if value is not None:
            window = _window(bucket, measure, span_s, preset_name)
            window.configured = min(window.configured, float(value))


def _presume(bucket: Bucket, preset: Preset, model_id: str) -> None:
    """Take over the figures of the preset's free plan where nothing better is known."""
    limits = next((model.limits for model in preset.models if model.id == model_id), None) or preset.free_limits
    for name, measure, span_s in _LIMIT_FIELDS if limits is not None else ():
        value = getattr(limits, name)
        if value is not None:
            window = _window(bucket, measure, span_s, preset.name)
            if not window.source:
                window.known, window.source = float(value), "preset"


def _sort_out(bucket: Bucket) -> None:
    """Work out the limits in force, and which windows matter for room."""
    for window in bucket.windows:
        window.limit = min(window.configured, window.known)
    bucket.limited = tuple(window for window in bucket.windows if window.limit != _NEVER)


# One window's arithmetic ---------------------------------------------------------------------------------------------

def _expire(window: Window, now: float, shift: float) -> None:
    """Forget what no longer counts."""
    if window.kind == "rolling":
        entries, n_ended = window.entries, 0
        while n_ended < len(entries) and entries[n_ended][0] + window.span_s + _TRAVEL_S <= now:    # as _room_at adds it up
            window.used -= entries[n_ended][1]
            n_ended += 1
        if n_ended:
            del entries[:n_ended]
            if not entries:
                window.used = 0.0
    elif window.kind == "refill":
        if window.limit != _NEVER and window.used:
            window.used = max(window.used - max(now - window.at, 0.0) * window.limit / window.span_s, 0.0)
        window.at = now
    elif now >= window.resets_at + _TRAVEL_S:
        window.used = 0.0
        window.resets_at = _next_reset(window, now, shift)


def _next_reset(window: Window, now: float, shift: float) -> float:
    """When a fixed window that has just begun ends."""
    if window.clock == "utc":
        return now + window.span_s - (now + shift) % window.span_s
    if window.clock == "pacific":
        return now + pacific_midnight_s(now + shift)
    return window.resets_at + window.span_s * ((now - window.resets_at) // window.span_s + 1.0)


def _add(window: Window, at: float, amount: float) -> None:
    """Count `amount` from `at` on."""
    window.used += amount
    entries = window.entries
    grain_s = (window.span_s if window.kind == "rolling" else 60.0) / _GRAINS
    if entries and -grain_s < at - entries[-1][0] < grain_s:
        entries[-1][0] = max(entries[-1][0], at)        # the later end: an entry must not end before all of it has
        entries[-1][1] += amount
    elif not entries or entries[-1][0] < at:
        entries.append([at, amount])
    else:                           # a header's news of what others used, which ends before what is newest here
        entries.insert(next(place for place, entry in enumerate(entries) if entry[0] >= at), [at, amount])
    if len(entries) > 2 * _GRAINS:
        entries[1][1] += entries.pop(0)[1]


def _take_back(window: Window, at: float, amount: float) -> None:
    """Uncount what was counted at `at`, as far as it still counts."""
    entry = None
    for later in reversed(window.entries):      # it is among the newest
        if later[0] < at:
            break
        entry = later
    part = min(amount, entry[1]) if entry is not None else 0.0
    if entry is not None:
        entry[1] -= part
    if window.kind != "fixed" or at >= window.resets_at - window.span_s:
        window.used = max(window.used - (part if window.kind == "rolling" else amount), 0.0)


def _cut(window: Window, used: float) -> None:
    """Count no more than `used`: the oldest goes first."""
    excess = window.used - used
    while window.kind == "rolling" and window.entries and excess > 0.0:
        part = min(window.entries[0][1], excess)
        window.entries[0][1] -= part
        excess -= part
        if window.entries[0][1] <= 0.0:
            del window.entries[0]
    window.used = used


def _room_at(window: Window, amount: float, now: float) -> float:
    """When `amount` more fits: `now` or later, infinite for never. The window is up to date."""
    limit = window.limit
    short = window.used + window.held + amount - limit
    if short <= 0.0:
        return now
    if amount > limit:
        return _NEVER
    if window.kind == "fixed":
        return window.resets_at + _TRAVEL_S
    if window.kind == "refill":
        return now + min(short / limit, 1.0) * window.span_s + _TRAVEL_S
    for at, part in window.entries:
        short -= part
        if short <= 0.0:
            return at + window.span_s + _TRAVEL_S
    return now + min(window.span_s, 5.0)        # what is under way takes it all: somebody who waits is woken when it ends


def _amounts(window: Window, n_input: int, n_output: int) -> tuple[float, float]:
    """What a request counts when it goes out, and what its answer may add."""
    if window.measure == "requests":
        return 1.0, 0.0
    return float(n_input) if window.measure != "output" else 0.0, float(n_output) if window.measure != "input" else 0.0


# Room, reserve, settle -----------------------------------------------------------------------------------------------

def find_buckets(ledger: Ledger, route: Route) -> tuple[Bucket, ...]:
    """The buckets of a route, its own first; of a model that clients made up those of its credential."""
    return ledger.by_id.get(route.id) or ledger.by_id.get(route.credential.id, ())


def find_shortage(ledger: Ledger, route: Route, n_input: int, n_output: int, now: float) -> Shortage | None:
    """What keeps a request of this size out for longest; None when there is room."""
    worst: Shortage | None = None
    for bucket in ledger.by_id.get(route.id) or find_buckets(ledger, route):
        if bucket.n_open >= bucket.max_open or (bucket.learned_open != _NEVER and bucket.n_open >= _learned_slots(bucket, now)):
            worst = _worse(worst, Shortage(bucket, None, now + 1.0, False, False))
        for window in bucket.limited:
            limit = window.limit
            if window.used + window.held + (n_input + n_output if window.measure != "requests" else 1) <= limit:
                continue                # even with what counts no longer
            _expire(window, now, ledger.utc_less_now)
            out, later = _amounts(window, n_input, n_output)
            amount = out + later if out + later <= limit else max(out, limit)       # an answer's length is a guess: it alone rules nothing out
            if window.used + window.held + amount <= limit or (window.source == "learned" and window.configured > window.known and now >= window.grows_at):
                continue
            if window.source == "refusal" and now + ledger.utc_less_now - window.known_utc > _TRUSTED_S and window.configured == _NEVER:
                continue
            origin, soft = window.origin, False
            at = min(_room_at(window, amount, now), max(window.grows_at, now))
            if window.source == "learned" and bucket.n_unseen and at != _NEVER:
                at = min(at, now + _ASKED_S)                    # they may prove that there is more
            if at != _NEVER and _resets_sooner(window):     # one request finds out whether all of it ends there
                at = min(at, max(window.resets_at + _TRAVEL_S, now + _ASKED_S))
                if not bucket.n_open and now >= window.resets_at + _TRAVEL_S:
                    continue
            elif origin == "preset":                        # and whether this key has more than the free plan
                soft = not bucket.n_open
                at = at if soft else min(at, now + _ASKED_S)
            worst = _worse(worst, Shortage(bucket, window, at, origin != "learned" and origin != "preset", soft))
    return worst


def _resets_sooner(window: Window) -> bool:
    """Has a header named a reset before which there were requests that this rolling window counts beyond it?"""
    return window.kind == "rolling" and bool(window.entries) and window.entries[0][0] < window.resets_at - 2.0 * _TRAVEL_S < _NEVER


def _worse(one: Shortage | None, other: Shortage) -> Shortage:
    return other if one is None or (one.soft, -one.at) > (other.soft, -other.at) else one


def _learned_slots(bucket: Bucket, now: float) -> float:
    return bucket.learned_open + (now - bucket.learned_open_at) // _SLOT_GROWS_S


_SPAN_WORDS: Mapping[float, str] = MappingProxyType({1.0: "second", 10.0: "10 seconds", 60.0: "minute", 3600.0: "hour", 86_400.0: "day", 30 * 86_400.0: "month"})


def span_word(span_s: float) -> str:
    """How a window's span is called: minute, day, 7 s."""
    return _SPAN_WORDS.get(span_s, f"{span_s:g} s")


def describe_ledger(ledger: Ledger, now: float) -> list[Json]:
    """Every window with a limit or with something used in it: {bucket, measure, per, limit, used, left, resets_in_s, burn_per_minute, empty_in_s, origin}; None where unknown."""
    rows = []
    for bucket in ledger.buckets.values():
        for window in bucket.windows:
            _expire(window, now, ledger.utc_less_now)
            used, limit = window.used + window.held, None if window.limit == _NEVER else window.limit
            if limit is None and used <= 0.0:
                continue
            left = None if limit is None else max(limit - used, 0.0)
            # Since the oldest of what counts, a minute at least: a single request is no trend.
            burn = used / max(now - window.entries[0][0] if window.entries else window.span_s, 60.0) * 60.0
            rows.append({"bucket": bucket.key, "measure": window.measure, "per": span_word(window.span_s), "limit": limit, "used": round(used, 1),
                         "left": None if left is None else round(left, 1), "resets_in_s": _resets_in_s(window, now), "burn_per_minute": round(burn, 1),
                         "empty_in_s": round(left / burn * 60.0) if left is not None and burn > 0.0 else None, "origin": window.origin or "counted"})
    return rows


def _resets_in_s(window: Window, now: float) -> int | None:
    """Seconds until all that counts now counts no longer, None for an empty window."""
    if window.kind == "fixed":
        return round(max(window.resets_at - now, 0.0))
    if window.kind == "refill" and window.limit != _NEVER:
        return round(window.used / window.limit * window.span_s) if window.used > 0.0 else None
    return round(max(window.entries[-1][0] + window.span_s - now, 0.0)) if window.entries else None


def forget_learned(ledger: Ledger, route: Route) -> None:
    """Forget limits that refusals taught about a route's buckets; what headers told and models.json says stays."""
    for bucket in find_buckets(ledger, route):
        bucket.learned_open = _NEVER
        for window in bucket.windows:
            if window.source in ("learned", "refusal"):
                window.known, window.source, window.grows_at = _NEVER, "", _NEVER
        _sort_out(bucket)


def share_left(ledger: Ledger, route: Route, now: float) -> float:
    """The share of its tightest window that a route has left, 1.0 where no limit is known."""
    least = 1.0
    for bucket in find_buckets(ledger, route):
        for window in bucket.limited:
            _expire(window, now, ledger.utc_less_now)
            least = min(least, 1.0 - (window.used + window.held) / window.limit)
    return max(least, 0.0)


def reserve(ledger: Ledger, route: Route, n_input: int, n_output: int, now: float) -> Hold:
    """Count a request that is about to go out on `route`."""
    hold = Hold(find_buckets(ledger, route), now, n_input, n_output)
    for bucket in hold.buckets:
        bucket.n_open += 1
        bucket.n_unseen += 1
        bucket.unseen_input += n_input
        for window in bucket.windows:
            if window.kind != "rolling" or len(window.entries) >= _GRAINS:
                _expire(window, now, ledger.utc_less_now)
            if window.measure == "requests":
                _add(window, now, 1.0)
            else:
                out, later = _amounts(window, n_input, n_output)
                if out:
                    _add(window, now, out)
                window.held += later
            if window.grows_at <= now and window.used + window.held > window.known:
                _grow(window, now)
    return hold


def settle(ledger: Ledger, hold: Hold, n_input: int, n_output: int, now: float) -> None:
    """The request was served: put what it used in place of what was reserved. A second call does nothing."""
    if hold.done:
        return
    hold.done = True
    if not hold.seen:
        _note_seen(hold)
    for bucket in hold.buckets:
        bucket.n_open -= 1
        for window in bucket.windows:
            if window.measure != "requests":
                if window.kind != "rolling":
                    _expire(window, now, ledger.utc_less_now)
                reserved, promised = _amounts(window, hold.n_input, hold.n_output)
                out, later = _amounts(window, n_input, n_output)
                window.held = max(window.held - promised, 0.0)
                if out < reserved:
                    _take_back(window, hold.at, reserved - out)
                elif out > reserved:
                    later += out - reserved
                if later:
                    _add(window, now, later)
            if window.source == "preset" and _confirmed(bucket, window) > _FREE_SLACK * window.known:
                _forget_free_plan(bucket)


def _note_seen(hold: Hold) -> None:
    """The provider has taken the request in, or it is over: it is no longer unknown what becomes of it."""
    hold.seen = True
    for bucket in hold.buckets:
        bucket.n_unseen -= 1
        bucket.unseen_input -= hold.n_input
        for window in bucket.limited:
            if window.source == "learned" and (served := _confirmed(bucket, window)) > window.known:
                window.known, window.limit = served, min(window.configured, served)


def _confirmed(bucket: Bucket, window: Window) -> float:
    """What counts in a window without the requests that may still be refused."""
    return window.used - (bucket.n_unseen if window.measure == "requests" else bucket.unseen_input if window.measure != "output" else 0)


def is_unknown(ledger: Ledger, route: Route) -> bool:
    """Whether nothing tells how much a route takes, and more has been sent there unanswered than it has lately been seen to serve."""
    for bucket in find_buckets(ledger, route)[:1]:
        if not bucket.limited and bucket.n_unseen >= _FIRST_ASKED:
            served = next((_confirmed(bucket, window) for window in bucket.windows if window.measure == "requests" and window.span_s == 60.0), 0.0)
            return bucket.n_unseen >= 2.0 * served
    return False


def _forget_free_plan(bucket: Bucket) -> None:
    """This key has more than the free plan: its figures say nothing."""
    for window in bucket.windows:
        if window.source == "preset":
            window.known, window.source = _NEVER, ""
    _sort_out(bucket)


def release(ledger: Ledger, hold: Hold, now: float) -> None:
    """The request counted for nothing: it never went out, or was refused. A second call does nothing."""
    if hold.done:
        return
    hold.done = True
    if not hold.seen:
        _note_seen(hold)
    for bucket in hold.buckets:
        bucket.n_open -= 1
        for window in bucket.windows:
            _expire(window, now, ledger.utc_less_now)
            reserved, promised = _amounts(window, hold.n_input, hold.n_output)
            window.held = max(window.held - promised, 0.0)
            _take_back(window, hold.at, reserved)


# What headers say ----------------------------------------------------------------------------------------------------

_PERIOD = r"(?:-(?:(\d{1,4})-)?(second|minute|hour|day|month))?"
_HEADERS = tuple(re.compile(pattern) for pattern in (
    rf"(?:x-)?ratelimit-(?P<field>limit|remaining|reset|renewalperiod)(?:-(?P<measure>requests|req|tokens|input-tokens|output-tokens))?{_PERIOD}",
    r"anthropic-ratelimit-(?P<measure>requests|tokens|input-tokens|output-tokens)-(?P<field>limit|remaining|reset)",
    rf"(?:x-)?(?P<measure>ratelimitbysize|tokenlimit)-(?P<field>limit|remaining|reset){_PERIOD}",
))
_MEASURES: Mapping[str | None, str] = MappingProxyType({
    None: "requests", "requests": "requests", "req": "requests", "tokens": "tokens", "input-tokens": "input", "output-tokens": "output",
    "ratelimitbysize": "tokens", "tokenlimit": "tokens",
})
#: Spans that the names do not tell and that cannot be worked out.
_NAMED_SPANS: Mapping[tuple[str, str], float] = MappingProxyType({("groq", "requests"): 86_400.0, ("groq", "tokens"): 60.0, ("anthropic", "requests"): 60.0})
_COUNT_TEXT = re.compile(r"\d{1,15}(?:\.\d{1,20})?")


@functools.lru_cache(256)
def _read_name(name: str) -> tuple[str, str, float, bool] | None:
    """(field, measure, span, whether the measure is named) of a header, span 0 where the name does not tell; None for any other header."""
    if "limit" not in name:
        return None
    found = next((found for pattern in _HEADERS if (found := pattern.fullmatch(name))), None)
    if found is None:
        return None
    *_, number, unit = (None, None, *found.groups()) if "anthropic" in name else found.groups()
    span_s = float(number or 1) * _SECONDS_PER[unit] if unit in _SECONDS_PER else 0.0
    return found["field"], _MEASURES[found["measure"]], span_s, found["measure"] is not None


def read_limits(preset_name: str, headers: Iterable[tuple[str, str]], utc: float) -> list[Told]:
    """What the headers of any answer say of its windows. Names are lower case; what cannot be understood is passed over."""
    said: dict[tuple[str, float], dict[str, str]] = {}
    for name, value in headers:
        known = _read_name(name)
        if known is not None:
            field_name, measure, span_s, named = known
            words = said.setdefault((measure, span_s), {})
            words[field_name] = value
            if not named:
                words["bare"] = value
    return [told for (measure, span_s), words in said.items() if (told := _tell_window(preset_name, measure, span_s, words, utc)) is not None]


def _tell_window(preset_name: str, measure: str, span_s: float, words: Mapping[str, str], utc: float) -> Told | None:
    limit, left, period_s = (float(value) if _COUNT_TEXT.fullmatch(value := words.get(name, "").strip()) else None for name in ("limit", "remaining", "renewalperiod"))
    reset_s = read_wait(words["reset"], utc) if "reset" in words else None
    reset_s = reset_s if reset_s is not None and 0.0 <= reset_s <= 32 * 86_400.0 else None
    if (limit is None and left is None) or limit == 0.0 or (limit or left or 0.0) > _MAX_LIMIT:
        return None                 # a limit of 0 is what projects without one are told
    span_s = span_s or _NAMED_SPANS.get((preset_name, measure), 0.0) or period_s or _guess_span(preset_name, limit, left, reset_s, "bare" in words)
    return Told(measure, span_s, "refill" if preset_name in _REFILLS else "rolling", limit, left, reset_s)


def _guess_span(preset_name: str, limit: float | None, left: float | None, reset_s: float | None, bare: bool) -> float:
    """The span that a reset hints at, a minute by default."""
    if reset_s is None:
        return 60.0
    if preset_name in _REFILLS:     # the reset is the time until all is back
        whole_s = reset_s * limit / (limit - left) if limit and left is not None and left < limit else 60.0
        return 86_400.0 if whole_s > 10_000.0 else 60.0
    return next((span for span in ((1.0, 10.0) if bare else ()) + (60.0, 3600.0) if reset_s <= span * 1.05), 86_400.0)


def feed(ledger: Ledger, route: Route, headers: Iterable[tuple[str, str]], now: float, hold: Hold | None = None) -> None:
    """Believe what an answer's headers say of the route's own bucket. `hold` is the request that was answered."""
    if hold is not None and not hold.seen:
        _note_seen(hold)
    buckets = find_buckets(ledger, route)
    told = read_limits(route.provider.preset.name, headers, now + ledger.utc_less_now) if buckets else ()
    for one in told:
        window = _window(buckets[0], one.measure, one.span_s, route.provider.preset.name)
        if window.source == "preset" and one.limit is not None and one.limit > window.known:
            _forget_free_plan(buckets[0])
        _expire(window, now, ledger.utc_less_now)
        _correct(window, one, now, now + ledger.utc_less_now, hold)
    if told:
        _sort_out(buckets[0])


def _correct(window: Window, told: Told, now: float, utc: float, hold: Hold | None) -> None:
    """Bring a window in line with what its provider says of it.

    The provider has counted what arrived before its answer: of what went out since, it may or may not know.
    """
    if told.limit is not None:
        window.known, window.source, window.known_utc, window.grows_at = told.limit, "header", utc, _NEVER
    if told.left is None or window.known == _NEVER:
        return
    truly_used = max(window.known - told.left, 0.0)
    since = _unseen(window, hold) if hold is not None else 0.0
    missing, excess = truly_used - window.used - window.held, window.used - truly_used - since
    if told.kind == "refill" and told.reset_s is not None:
        _check_refill(window, truly_used, told.reset_s, now)
    began_at = now if told.reset_s is None or told.reset_s > window.span_s else now + told.reset_s - window.span_s
    stale = _stale(window, now) if told.reset_s is not None else 0.0
    if stale > 0.0 and stale > excess:
        window.n_slid += 1
    if missing > 0.0:
        _add(window, began_at, missing)
    elif excess > 0.0:
        if 0.0 < stale <= window.used - truly_used:
            window.kind = "fixed"
        _cut(window, truly_used + since)
    if told.reset_s is None or window.kind == "refill" or (window.clock and window.kind == "fixed"):
        return
    early = bool(window.entries) and window.n_slid < _SLID_MAX and now + told.reset_s < window.entries[0][0] + window.span_s * (1.0 - 1.0 / _GRAINS) - 2.0 * _TRAVEL_S
    window.resets_at = now + told.reset_s if early or window.kind == "fixed" else _NEVER


def _check_refill(window: Window, truly_used: float, reset_s: float, now: float) -> None:
    """Does a window fill up all the time, as its preset's do? Then its reset is when all of it is back. Three times not so, and it rolls until it is."""
    full_s = truly_used / window.known * window.span_s
    if full_s < 0.1 * window.span_s:
        return                      # too little to tell: Anthropic rounds to thousands of tokens and whole seconds
    if abs(reset_s - full_s) <= max(0.25 * full_s, 0.05 * window.span_s):
        window.n_wrong = max(window.n_wrong - 1, 0) if window.kind == "rolling" else 0
        if window.kind == "rolling" and not window.n_wrong:
            window.kind, window.at = "refill", now
    else:
        window.n_wrong = min(window.n_wrong + 1, _WRONG_MAX)
        if window.kind == "refill" and window.n_wrong == _WRONG_MAX:
            _make_rolling(window, now)


def _make_rolling(window: Window, now: float) -> None:
    """From now on what counts ends a span after it went out."""
    window.kind, window.n_wrong, window.entries = "rolling", _WRONG_MAX, [entry for entry in window.entries if entry[0] > now - window.span_s]
    counted = sum(amount for _, amount in window.entries)
    if counted < window.used:
        window.entries.append([max(now, window.entries[-1][0]) if window.entries else now, window.used - counted])
    truly_used, window.used = window.used, max(counted, window.used)
    _cut(window, truly_used)


def _stale(window: Window, now: float) -> float:
    """What counts though it went out before the reset that was named last, which has passed; where all of it has ended, the window is fixed."""
    if window.kind != "rolling" or window.resets_at > now:
        return 0.0
    return sum(amount for at, amount in window.entries if now - window.span_s + 2.0 * _TRAVEL_S < at < window.resets_at - 2.0 * _TRAVEL_S)


def _unseen(window: Window, hold: Hold) -> float:
    """What was counted, besides the request that was answered, since about the time it went out."""
    counted = sum(amount for at, amount in window.entries if at >= hold.at - _TRAVEL_S)
    return max(counted - _amounts(window, hold.n_input, hold.n_output)[0], 0.0)


# What refusals say ---------------------------------------------------------------------------------------------------

_QUOTA_ID = re.compile(r'"quotaId":\s?"(\w{0,60}?)Per(Day|Minute|Hour)\w{0,60}(?:-\w{1,40})?"(?:[^\[\]]{0,400}?"quotaValue":\s?"(\d{1,12})")?')
_SAID_LIMIT = re.compile(r"(?:(\d{1,12}) )?\b(requests?|queries|(?:input |output )?tokens|free-models)[ _-]per[ _-](sec|min|hour|day)\w{0,4}"
                         r"(?: \([A-Z]{2,6}\))?(?::? limit:? (\d{1,12}))?", re.I)
_SAID_LETTERS = re.compile(r"\b([RT])P([MDH])\b")
_CONCURRENCY = re.compile(r"concurren\w{1,4}(?:[^\d\n]{0,20}?: ?(\d{1,4}))?", re.I)
_UNITS_S: Mapping[str, float] = MappingProxyType({"sec": 1.0, "min": 60.0, "hour": 3600.0, "day": 86_400.0, "m": 60.0, "h": 3600.0, "d": 86_400.0})


def read_refusal(text: str, reason: str) -> list[tuple[str, float, float | None]]:
    """(measure, span, limit or None) of every window that a refusal names; by its reason alone when it names none.

    text: the body, or the provider's words.
    """
    return _named_windows(text) or [("requests", 86_400.0 if reason == "rate_day" else 60.0, None)]


def _named_windows(text: str) -> list[tuple[str, float, float | None]]:
    found: dict[tuple[str, float], float | None] = {}
    for name, span, value in _QUOTA_ID.findall(text):
        measure = "input" if "Input" in name else "tokens" if "Token" in name else "requests"
        found[measure, _UNITS_S[span[:3].lower() if span != "Hour" else "hour"]] = float(value) if value else None
    if not found:
        for before, measure, span, after in _SAID_LIMIT.findall(text):
            word = measure.lower()
            kind = word.split()[0] if word.startswith(("input", "output")) else "tokens" if "token" in word else "requests"
            found[kind, _UNITS_S[span.lower()]] = float(after or before) if after or before else None
    if not found:
        for measure, span in _SAID_LETTERS.findall(text):
            found["requests" if measure == "R" else "tokens", _UNITS_S[span.lower()]] = None
    return [(measure, span_s, limit) for (measure, span_s), limit in found.items()]


def learn_refusal(ledger: Ledger, route: Route, failure: UpstreamFailure, text: str, now: float, hold: Hold | None = None) -> None:
    """A provider refused for its limits: what it named is believed, else a limit that is known to be used up, else the count so far must have been one.

    Call after release().  text: the body of the refusal.  hold: the request that was refused.
    """
    buckets = find_buckets(ledger, route)
    if not buckets or failure.reason not in ("rate_minute", "rate_day", "request_over_tpm"):
        return
    text = text[:16_384]
    concurrency = _CONCURRENCY.search(text)
    if concurrency:
        buckets[0].learned_open, buckets[0].learned_open_at = float(concurrency[1] or max(buckets[0].n_open, 1)), now
        return
    if hold is not None and not _named_windows(text) and any(_explains(window, hold, now, ledger.utc_less_now) for window in buckets[0].limited):
        return
    for measure, span_s, limit in read_refusal(text, failure.reason):
        window = _window(buckets[0], measure, span_s, route.provider.preset.name)
        size = sum(_amounts(window, hold.n_input, hold.n_output)) if hold is not None else 1.0
        _expire(window, now, ledger.utc_less_now)
        if limit:
            window.known, window.source, window.known_utc, window.grows_at = min(limit, _MAX_LIMIT), "refusal", now + ledger.utc_less_now, _NEVER
        if failure.reason == "request_over_tpm":
            continue
        if window.kind == "refill" and window.used + window.held < window.known:
            window.n_wrong += 1
            if window.n_wrong >= _WRONG_MAX:
                _make_rolling(window, now)
        if span_s >= 86_400.0 and failure.proven and failure.cool_s is not None and not window.clock:
            window.kind, window.entries, window.resets_at = "fixed", [], now + failure.cool_s
        if window.known != _NEVER and window.source in ("header", "refusal"):
            missing = window.known - window.used - max(size - 1.0, 0.0)     # there was less left than it asked for
            if missing > 0.0:
                _add(window, now, missing)
        elif window.used + window.held >= 1.0:
            _lower(window, _confirmed(buckets[0], window), hold.at if hold is not None else now, now, now + ledger.utc_less_now)
    _sort_out(buckets[0])


def _explains(window: Window, hold: Hold, now: float, shift: float) -> bool:
    """Had a window whose limit was told too little left for the request that was refused?"""
    _expire(window, now, shift)
    return window.origin in ("header", "refusal", "configured") and window.used + window.held + sum(_amounts(window, hold.n_input, hold.n_output)) > window.limit


def _lower(window: Window, served: float, sent_at: float, now: float, utc: float) -> None:
    """The limit must have been what was served; the longer it holds, the longer until more is tried. What went out before the last refusal came teaches no patience."""
    first_s = window.span_s * _PATIENCE_SPANS[window.span_s >= 3600.0]
    if window.source != "learned" or sent_at >= window.grows_at - window.patience_s:
        window.patience_s = min(max(window.patience_s * 2.0, first_s), _MAX_PATIENCE_S)
    window.known, window.source, window.known_utc = max(min(served, window.known if window.source == "learned" else _NEVER), 1.0), "learned", utc
    window.grows_at = now + window.patience_s


def _grow(window: Window, now: float) -> None:
    """More than was known goes out: believe it until a refusal says otherwise."""
    window.known = max(window.known + 1.0, window.known * 1.1)
    window.limit = min(window.configured, window.known)
    window.grows_at = now + window.span_s


# Across restarts -----------------------------------------------------------------------------------------------------

def ledger_rows(ledger: Ledger, now: float) -> dict[str, Json]:
    """What should outlive a restart, by bucket: limits that were told or learned, and what long windows have counted. Instants are UTC."""
    rows: dict[str, Json] = {}
    for bucket in ledger.buckets.values():
        windows = [_window_row(window, ledger.utc_less_now) for window in bucket.windows if _keeps(window, now, ledger.utc_less_now)]
        if windows:
            rows[bucket.key] = {"windows": windows}
    return rows


def _keeps(window: Window, now: float, shift: float) -> bool:
    _expire(window, now, shift)
    return window.source in ("header", "refusal", "learned") or (window.used > 0.0 and window.span_s >= 3600.0)


def _window_row(window: Window, shift: float) -> Json:
    def utc(at: float) -> float | None:
        return None if at == _NEVER else round(at + shift, 3)
    told = window.source if window.source != "preset" else ""
    return {"measure": window.measure, "span_s": window.span_s, "kind": window.kind, "known": window.known if told else None, "source": told, "known_utc": window.known_utc,
            "used": window.used, "at_utc": utc(window.at), "resets_utc": utc(window.resets_at), "grows_utc": utc(window.grows_at), "patience_s": window.patience_s,
            "entries": [[utc(at), amount] for at, amount in window.entries]}


def load_ledger(ledger: Ledger, rows: Mapping[str, Json], now: float) -> None:
    """Go on from what ledger_rows() gave, for buckets that still exist; what is not understood is passed over. Call after prepare_ledger()."""
    for key, row in rows.items():
        bucket = ledger.buckets.get(key)
        for saved in row.get("windows", ()) if bucket is not None else ():
            with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
                _load_window(bucket, saved, ledger.utc_less_now)
        if bucket is not None:
            _sort_out(bucket)


def _load_window(bucket: Bucket, saved: Json, shift: float) -> None:
    """Raises KeyError, TypeError, ValueError or AttributeError for a row of another version."""
    def at(name: str) -> float:
        return _NEVER if saved[name] is None else float(saved[name]) - shift
    entries = [[float(utc) - shift, float(amount)] for utc, amount in saved["entries"]][-2 * _GRAINS:]
    facts = dict(kind=str(saved["kind"]), used=float(saved["used"]), at=at("at_utc"), resets_at=at("resets_utc"), entries=entries)
    if saved["source"]:
        facts |= dict(known=float(saved["known"]), source=str(saved["source"]), known_utc=float(saved["known_utc"]), grows_at=at("grows_utc"), patience_s=float(saved["patience_s"]))
    window = _window(bucket, str(saved["measure"]), float(saved["span_s"]), "")
    for name, value in facts.items():
        setattr(window, name, value)


##############################################################################
# 7. Routing policy                                         pure | uses 1-6
##############################################################################
# Which routes, in which order, and why not the others: functions of configuration and state, with `now` handed in.
# A Catalogue is worked out once per configuration; resolve() turns a model name into a Choice; plan() orders its routes for
# one request; cool() and clear() keep the cooldowns.  Nothing here logs, sleeps or picks at random: jitter arrives.
# A burst is spread because every request that goes out is reserved in section 6's ledger before the next one is planned.
# Guessed cooldowns end with a probe: one real request is let through, the others wait for what it finds.

CAROUSEL_NAMES = frozenset({"", "aicarousel", "auto", "router-maestro"})
_FAMILIES = (("gpt-", "openai"), ("chatgpt-", "openai"), ("o1", "openai"), ("o3", "openai"), ("o4", "openai"), ("claude-", "anthropic"), ("gemini-", "gemini"))
_MAX_COOLDOWNS = 10_000
_MAX_SESSIONS = 10_000
_ENDLESS = float("inf")
_PROBE_S = 0.5
_LONG_S = 60.0              #: a named time that is shorter is simply kept
_SESSION_S = 3600.0         #: how long a conversation stays with its route unheard: prompt caches live no longer
_SPEED_S = 600.0            #: how long a measured speed is believed

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


class Facts(NamedTuple):
    """What planning needs to know of a request: its size in tokens, and which conversation it belongs to."""
    n_input: int = 0
    n_output: int = 0
    session: str = ""               #: "" for none
    sticks: bool = False            #: whether it should go where the conversation went before


NO_FACTS = Facts()


class Plan(NamedTuple):
    """Ordered routes for one request, why others were left out, and when the first of those is free.

    session: hit when the conversation's route leads, moved when that one is out, new when there is none yet, "" when nothing sticks.
    """
    routes: tuple[Route, ...]
    skipped: tuple[tuple[Route, str], ...]
    free_at: float | None
    session: str = ""
    proven: bool = True             #: whether `free_at` was named by a provider or configured


class Decision(NamedTuple):
    """What was decided for one request and what came of it, kept for whoever asks why."""
    id: str
    at_utc: float                   #: when it ended
    client: ClientFormat
    model: str                      #: as the client asked, "" for none
    streamed: bool
    facts: Facts
    plan: Plan | None               #: the one that was followed last, None where the name led nowhere
    attempts: Sequence[Attempt]
    passed_over: Sequence[tuple[Route, str]]
    waited_ms: int
    outcome: str                    #: "" for one that was only thought through
    status: int = 0
    first_ms: int = 0
    total_ms: int = 0
    told: str = ""                  #: what the client was told when it was refused
    wish: Wish | None = None
    models: tuple[str, ...] = ()    #: globs of the models its key may use


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
    detail: str = ""                #: the provider's words
    began_at: float = 0.0
    n_asked: int = 0                #: proven: how often it was asked all the same, once in each quarter of the span but the first


@dataclass(slots=True)
class RoutingState:
    """What routing remembers between requests; owned by the relay, lives as long as the process."""
    cooling: dict[str, Cooldown] = field(default_factory=dict)
    rules: Mapping[Kind, Rule] = field(default_factory=lambda: FAILURE_RULES)     #: with the limits in force
    turns: dict[str, str] = field(default_factory=dict)     #: turn name -> provider that served last
    repairs: dict[str, tuple[Repair, ...]] = field(default_factory=dict)    #: model key -> edits that make it take what it refused
    windows: dict[str, ContextWindow] = field(default_factory=dict)            #: model key -> what it holds
    ledger: Ledger = field(default_factory=Ledger)
    speeds: dict[str, tuple[float, float]] = field(default_factory=dict)     #: route id -> (milliseconds to the first byte, when measured)
    sessions: dict[str, tuple[str, float]] = field(default_factory=dict)     #: conversation -> (route id, when it was served), oldest first


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
                if not may_use(credential, model.id):
                    continue
                models.setdefault(credential.prefix + model.id, []).append(((make_route(provider, credential, model),),))
    return Catalogue(tuple(whole), {provider.name: provider for provider in config.active}, {name: tuple(groups) for name, groups in models.items()},
                     config.carousel.aliases, config.carousel.unknown_model == "reject")


def _chain_models(provider: Provider) -> tuple[Model, ...]:
    """The default first, then the list, when the provider falls back inside itself."""
    models = _known_models(provider)
    return models if provider.enable_fallback else models[:1]


def _known_models(provider: Provider) -> tuple[Model, ...]:
    """Every model that configuration knows of a provider, the default first."""
    first = next((model for model in provider.models if model.id == provider.default), Model(provider.default))
    return (first, *(model for model in provider.models if model.id != first.id))


def _group_of(provider: Provider, models: Sequence[Model]) -> Group:
    """The routes of some models of a provider, one tuple of credentials per model."""
    return tuple(tuple(make_route(provider, credential, model) for credential in provider.credentials if may_use(credential, model.id)) for model in models)


def may_use(credential: Credential, model_id: str) -> bool:
    """Whether a credential is for this model, by its `models` and `excludedModels`."""
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
            return Choice(name, (_globbed_group(catalogue.providers[head], rest) if "*" in rest else _named_group(catalogue.providers[head], rest),), False, True)
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


class Wish(NamedTuple):
    """How a client wants one request routed: the fields `models` and `provider` of its body."""
    models: tuple[str, ...] = ()                #: instead of where its model would fall back to
    order: tuple[str, ...] = ()                 #: providers that come first
    only: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    allow_fallbacks: bool = True                #: false: no provider but those of `order`, or the first
    require_parameters: bool = False            #: no provider that refuses a field of the request
    provider: Json | None = None                #: as it was sent, for OpenRouter


_MAX_WISHES = 50


def take_wish(body: Json) -> tuple[Json, Wish | None]:
    """A request without what it says of its routing, and that. Raises GatewayError 400 for what is neither names nor flags."""
    if "models" not in body and "provider" not in body:
        return body, None
    models, provider = body.get("models"), body.get("provider")
    if isinstance(models, str):
        models = [name.strip() for name in models.split(",")]
    if provider is not None and not isinstance(provider, dict):
        raise bad_request("provider must be an object.", param="provider", code="invalid_type")
    asked = provider or {}
    for name in ("allow_fallbacks", "require_parameters"):
        if not isinstance(asked.get(name, True), (bool, type(None))):
            raise bad_request(f"provider.{name} must be a boolean.", param=f"provider.{name}", code="invalid_type")
    wish = Wish(_wished_names(models, "models"), *(_wished_names(asked.get(name), f"provider.{name}") for name in ("order", "only", "ignore")),
                asked.get("allow_fallbacks") is not False, asked.get("require_parameters") is True, provider)
    return {name: value for name, value in body.items() if name not in ("models", "provider")}, wish


def _wished_names(value: Any, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > _MAX_WISHES or not all(isinstance(name, str) and name for name in value):
        raise bad_request(f"{where} must be a list of at most {_MAX_WISHES} names.", param=where, code="invalid_type")
    return tuple(value)


def choose(catalogue: Catalogue, name: str | None, wish: Wish) -> tuple[Catalogue, Choice]:
    """What a model name stands for under a wish, and the catalogue that is left to fall back in. Raises GatewayError 404 when nothing is left."""
    listed = [choice for word in (name, *wish.models) if word and word not in CAROUSEL_NAMES and (choice := resolve(catalogue, word)).explicit] if wish.models else []
    choice = Choice("models", tuple(group for each in listed for group in each.groups), False, True) if listed else resolve(catalogue, name)
    if wish.only or wish.ignore or (wish.order and not wish.allow_fallbacks):
        choice = replace(choice, groups=_allowed(choice.groups, wish, catalogue))
        models = {model: _allowed(groups, wish, catalogue) for model, groups in catalogue.models.items()}
        catalogue = replace(catalogue, whole=_allowed(catalogue.whole, wish, catalogue), models=models)
    if wish.order:
        places = {word.lower(): place for place, word in reversed(tuple(enumerate(wish.order)))}
        groups = sorted(choice.groups, key=lambda group: places.get(provider_of(group).lower(), len(places) + _MAX_WISHES))
        choice = replace(choice, groups=tuple(groups), rotates=False)
    if not any(routes for group in choice.groups for routes in group):
        raise GatewayError("No provider that this request allows serves its model.", 404, "no_allowed_provider", "invalid_request_error", "provider")
    return catalogue, choice


def _allowed(groups: Iterable[Group], wish: Wish, catalogue: Catalogue) -> tuple[Group, ...]:
    """Those of a wish's providers. Names that are none of ours are OpenRouter's own providers: it may be asked to keep to them."""
    def stands_in(group: Group, names: tuple[str, ...]) -> bool:
        provider, lower = next(routes[0].provider for routes in group if routes), [name.lower() for name in names]
        return provider.name.lower() in lower or provider.preset.name == "openrouter" and any(name not in catalogue.providers for name in lower)
    kept = (group for group in groups if any(group) and not provider_of(group).lower() in map(str.lower, wish.ignore))
    strict = wish.order if wish.order and not wish.allow_fallbacks else ()
    return tuple(group for group in kept if all(stands_in(group, names) for names in (wish.only, strict) if names))


def models_for_openrouter(catalogue: Catalogue, wish: Wish) -> list[str]:
    """Those of a wish's models that are no names of ours: OpenRouter may know them."""
    return [name for name in wish.models if name not in CAROUSEL_NAMES and not resolve(catalogue, name).explicit]


def wish_for_openrouter(wish: Wish, name: str) -> Json:
    """The field `provider` as OpenRouter may have it: without the name that it goes by here."""
    asked = {field: [word for word in value if word != name] if field in ("order", "only", "ignore") and value else value for field, value in (wish.provider or {}).items()}
    return {field: value for field, value in asked.items() if value != []}


def same_model(choice: Choice) -> Choice:
    """Only the routes to the first model of `choice`. Raises GatewayError 404 when the client named none."""
    first = next((route for group in choice.groups for routes in group for route in routes), None)
    if not choice.explicit:
        raise unknown_model("Name the model, as provider/model or as a model that is listed: another one's answer would not compare.")
    groups = tuple(tuple(tuple(route for route in routes if first and route.model.id == first.model.id) for routes in group) for group in choice.groups)
    return replace(choice, groups=tuple(tuple(routes for routes in group if routes) for group in groups if any(group)))


def is_allowed(route: Route, globs: Sequence[str]) -> bool:
    """Whether a key that may use the models of `globs` may use this route: by its model's id or alias, alone or behind the provider's name."""
    names = (route.model.id, f"{route.provider.name}/{route.model.id}", *((route.model.alias,) if route.model.alias else ()))
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs for name in names)


def allow_groups(groups: Sequence[Group], globs: Sequence[str]) -> tuple[Group, ...]:
    """`groups` without the routes that `globs` do not cover, and without what is empty then."""
    found = (tuple(kept for routes in group if (kept := tuple(route for route in routes if is_allowed(route, globs)))) for group in groups)
    return tuple(group for group in found if group)


def allow_catalogue(catalogue: Catalogue, globs: Sequence[str]) -> Catalogue:
    """The catalogue of a key that may use the models of `globs` alone: what a request falls back to."""
    return replace(catalogue, whole=allow_groups(catalogue.whole, globs), models={name: allow_groups(groups, globs) for name, groups in catalogue.models.items()})


def allow_choice(choice: Choice, name: str | None, globs: Sequence[str]) -> Choice:
    """What is left of a choice for such a key; a name that `globs` cover themselves, such as an alias, keeps all it stands for.  Raises GatewayError 403 for nothing."""
    if name and any(fnmatch.fnmatchcase(name, glob) for glob in globs):
        return choice
    groups = allow_groups(choice.groups, globs)
    if not groups:
        raise GatewayError(f"This key may not use {f'the model {name[:200]!r}' if name else 'any model that takes part'}; it may use: {', '.join(globs)[:500]}.",
                           403, "model_not_allowed", "invalid_request_error", "model")
    return replace(choice, groups=groups)


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


def _globbed_group(provider: Provider, glob: str) -> Group:
    """The routes to the listed models that a glob covers, the default first. Raises GatewayError 404 when it covers none."""
    models = sorted((model for model in provider.models if fnmatch.fnmatchcase(model.id, glob)), key=lambda model: model.id != provider.default)
    if not models:
        raise unknown_model(f"{provider.name} lists no model like {glob[:200]!r}.")
    return _group_of(provider, models)


def plan(catalogue: Catalogue, choice: Choice, state: RoutingState, now: float, *, strategy: str, fallback: str,
         facts: Facts = NO_FACTS, give_up_at: float = 0.0) -> Plan:
    """Order the routes of one request: those that are free, those a paid key may have room on, guessed cooldowns as a last resort, soonest end first.

    Proven cooldowns and routes without room are left out, `free_at` tells when the first of them is free.  When nothing is free and waiting
    until `give_up_at` helps, there are no routes: waiting beats asking what is known to be out.
    """
    ready: list[tuple[tuple[float, ...], Route]] = []
    soft: list[tuple[float, Route]] = []
    late: list[tuple[float, Route]] = []
    probes: list[tuple[float, Route]] = []
    waits: list[tuple[float, bool]] = []
    skipped: list[tuple[Route, str]] = []
    metric, ledger, n_full = _METRICS.get(strategy), state.ledger, 0
    asked_for: set[str] = set()
    for place, is_own, route in _candidates(catalogue, choice, state, strategy, fallback):
        cooldown = hindrance(state, route, now) if state.cooling else None
        if cooldown is not None:
            skipped.append((route, f"{cooldown.reason}, {'probing' if cooldown.until_at <= now else f'{cooldown.until_at - now:.0f} s left'}"))
            if cooldown.until_at > now and cooldown.proven:
                waits.append((cooldown.until_at, True))
                if _may_have_ended(cooldown, now):
                    probes.append((cooldown.until_at, route))
            elif cooldown.kind == "rate" and now < give_up_at and cooldown.until_at <= give_up_at:
                waits.append((max(cooldown.until_at, now + _PROBE_S), False))     # its probe will have told by then
            elif cooldown.kind == "rate" and (shortage := find_shortage(ledger, route, facts.n_input, facts.n_output, now)) is not None and not shortage.soft:
                waits.append((max(cooldown.until_at, shortage.at), False))       # refused, and counted full: asking now is in vain
            else:
                late.append((cooldown.until_at, route))
            continue
        shortage = find_shortage(ledger, route, facts.n_input, facts.n_output, now) if ledger.by_id else None
        if shortage is None:
            if is_own:
                asked_for.add(route.id)
            ready.append(((place, metric(state, route, facts, now)) if metric else (place,), route))
        elif shortage.soft:
            soft.append((shortage.at, route))
        else:
            n_full += 1
            skipped.append((route, f"quota: {tell_shortage(shortage, now)}"))
            if shortage.at != _ENDLESS:
                waits.append((shortage.at, shortage.proven))
    if n_full and now + _PROBE_S <= give_up_at:      # a line that could go nowhere else is not let loose on one of unknown limits
        paced = [pair for pair in ready if is_unknown(ledger, pair[1])]
        skipped += [(route, "quota: unknown, others are being answered") for _, route in paced]
        waits += [(now + _PROBE_S, False)] * len(paced)
        ready = [pair for pair in ready if pair not in paced] if paced else ready
    if metric:
        ready.sort(key=lambda pair: pair[0])
    soft.sort(key=lambda pair: pair[0])
    late.sort(key=lambda pair: pair[0])
    free_at, proven = min(waits) if waits else (None, True)
    routes = [route for _, route in ready]
    session = _stick(routes, asked_for, state, facts, now)
    routes += [route for _, route in soft]
    if not routes and free_at is not None and now < free_at <= give_up_at:
        return Plan((), tuple(skipped), min([free_at, *(at for at, _ in late if at > now)]), session, proven)
    if not routes and not late and probes:
        late = [min(probes, key=lambda pair: pair[0])]
    return Plan((*routes, *(route for _, route in late)), tuple(skipped), free_at, session, proven)


def _may_have_ended(cooldown: Cooldown, now: float) -> bool:
    """May a route be asked before the time that its provider named, when all others are out? Once after 25, 50 and 75 % of it: quotas are raised and paid for."""
    span_s = cooldown.until_at - cooldown.began_at
    return not cooldown.probing and cooldown.kind != "model" and cooldown.n_asked < 3 and span_s >= _LONG_S and now >= cooldown.began_at + span_s * 0.25 * (cooldown.n_asked + 1)


def _candidates(catalogue: Catalogue, choice: Choice, state: RoutingState, strategy: str, fallback: str) -> Iterator[tuple[float, bool, Route]]:
    """Every route once, in order of rotation, with its place, and whether it is what was asked for rather than a fallback.

    Routes of one place may change their order by a strategy's measure.
    """
    groups = _turned(choice, state, strategy)
    n_own = len(groups)
    if choice.explicit and fallback != "none":
        groups = (*groups, *_fallback_groups(catalogue, choice, state, strategy, fallback))
    seen: set[str] = set()
    place = 0.0
    for number, group in enumerate(groups):
        for model_routes in group:
            place += 0.0 if choice.rotates and number < n_own else 1.0
            for route in _credentials_turned(model_routes, state, strategy):
                if route.id not in seen:
                    seen.add(route.id)
                    yield place, number < n_own, route


def _turned(choice: Choice, state: RoutingState, strategy: str) -> tuple[Group, ...]:
    """The groups, starting behind the provider that served last."""
    groups = choice.groups
    if not choice.rotates or strategy in ("fill-first", "priority") or len(groups) < 2:
        return groups
    last = state.turns.get(choice.turn_name)
    for index, group in enumerate(groups, 1):
        if provider_of(group) == last:
            return (*groups[index:], *groups[:index])
    return groups


def _stick(routes: list[Route], asked_for: Collection[str], state: RoutingState, facts: Facts, now: float) -> str:
    """Put the route that served the conversation last in front, unless it is another than was asked for; what Plan.session says of it."""
    if not facts.sticks:
        return ""
    pinned, at = state.sessions.get(facts.session, ("", 0.0))
    if not pinned or now - at > _SESSION_S:
        return "new"
    for place, route in enumerate(routes):
        if route.id == pinned and pinned in asked_for:
            routes.insert(0, routes.pop(place))
            return "hit"
    return "moved"


def tell_shortage(shortage: Shortage, now: float) -> str:
    """What is short and until when, in words."""
    window = shortage.window
    if window is None:
        return f"{shortage.bucket.n_open} requests at a time"
    until = "too large for it" if shortage.at == _ENDLESS else f"{shortage.at - now:.0f} s left"
    return f"{window.limit:.0f} {window.measure} a {span_word(window.span_s)} ({window.origin}), {until}"


# What strategies order by; less is better.

def _first_ms(state: RoutingState, route: Route, facts: Facts, now: float) -> float:
    """The usual time to the first byte; 0, so that it is measured, where it is not known or was measured long ago."""
    known_ms, at = state.speeds.get(route.id, (0.0, now))
    return known_ms if now - at < _SPEED_S else 0.0


def _cost(state: RoutingState, route: Route, facts: Facts, now: float) -> float:
    """What the request would cost here, at a thousand tokens each way where its size is not known; endless where no price is."""
    price = route.model.price
    if price is None or price.input is None or price.output is None:
        return _ENDLESS
    return price.input * (facts.n_input or 1000) + price.output * (facts.n_output or 1000)


def _scarcity(state: RoutingState, route: Route, facts: Facts, now: float) -> float:
    """The share of its tightest window that is used; 0 where no limit is known."""
    return 1.0 - share_left(state.ledger, route, now)


_METRICS: Mapping[str, Callable[[RoutingState, Route, Facts, float], float]] = MappingProxyType({"fastest": _first_ms, "cheapest": _cost, "most-quota": _scarcity})


def find_session(body: Json, named: str, key_id: int, affinity: str) -> tuple[str, bool]:
    """(the conversation a request belongs to, whether it goes where that went before), "" for none; `named` is what a header says of it.

    Without a name it is known by how it begins: by the system prompt and the user's first words. A first turn then only leaves its mark
    ("on": follows one too), so that single requests that begin alike go round. Hashes are this process's own and not kept.
    """
    if affinity == "off":
        return "", False
    metadata = body.get("metadata")
    for name in (named, body.get("prompt_cache_key"), metadata.get("user_id") if isinstance(metadata, dict) else None):
        if isinstance(name, str) and name:
            return f"{key_id} {name[:512]}", True
    turns = body.get("messages") or body.get("input")
    if not isinstance(turns, list):
        return "", False
    first: Json | None = None
    for turn in turns:
        if isinstance(turn, dict) and turn.get("role") == "user":
            first = turn
            break
    if first is None:
        return "", False
    begins = body.get("system") or body.get("instructions") or (turns[0].get("content") if turns[0] is not first and isinstance(turns[0], dict) else None)
    answered = len(turns) > 1 and any(isinstance(turn, dict) and (turn.get("role") == "assistant" or turn.get("type") in ("message", "function_call") and turn.get("role") != "user") for turn in turns[1:])
    return f"{key_id} #{hash((_opening(begins), _opening(first.get('content'))))}", answered or affinity == "on"


def _opening(content: Any) -> tuple[str, int]:
    """How a prompt begins, and how much there is of it: enough to tell conversations apart."""
    if isinstance(content, list):
        texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        return texts[0][:2000] if texts else "", sum(map(len, texts))
    return (content[:2000], len(content)) if isinstance(content, str) else ("", 0)


def note_served(state: RoutingState, route: Route, facts: Facts, first_ms: float, now: float) -> None:
    """Remember how fast a route answered, and that the conversation was served there."""
    if is_listed(route):
        before_ms, at = state.speeds.get(route.id, (first_ms, now))
        state.speeds[route.id] = (before_ms * 0.7 + first_ms * 0.3 if now - at < _SPEED_S else first_ms, now)
        if len(state.speeds) > _MAX_COOLDOWNS:
            del state.speeds[next(iter(state.speeds))]
    if facts.session:
        state.sessions.pop(facts.session, None)
        state.sessions[facts.session] = (route.id, now)
        if len(state.sessions) > _MAX_SESSIONS:
            del state.sessions[next(iter(state.sessions))]


def provider_of(group: Group) -> str:
    """The provider whose routes these are, "" for none."""
    return next((routes[0].provider.name for routes in group if routes), "")


def _credentials_turned(routes: tuple[Route, ...], state: RoutingState, strategy: str) -> tuple[Route, ...]:
    """The routes of one model, starting behind the credential that served it last; fill-first drains the first of them."""
    if len(routes) < 2 or strategy == "fill-first":
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


def describe_routes(providers: Iterable[Provider], state: RoutingState, now: float) -> list[Json]:
    """Every configured route: {route, state: free, cooling or full, why, left_s, proven}."""
    rows = []
    for provider in providers:
        for group in _group_of(provider, _known_models(provider)):
            for route in group:
                cooldown, shortage = hindrance(state, route, now), find_shortage(state.ledger, route, 0, 0, now)
                row: Json = {"route": route.id, "state": "free", "why": "", "left_s": None, "proven": None}
                if cooldown is not None:
                    row |= {"state": "cooling", "why": cooldown.reason, "left_s": round(max(cooldown.until_at - now, 0.0)), "proven": cooldown.proven}
                elif shortage is not None and not shortage.soft:
                    row |= {"state": "full", "why": tell_shortage(shortage, now), "left_s": None if shortage.at == _ENDLESS else round(shortage.at - now), "proven": shortage.proven}
                rows.append(row)
    return rows


def reset_routes(providers: Iterable[Provider], state: RoutingState, glob: str) -> list[str]:
    """End the cooldowns over the routes whose id, or whose provider's name, `glob` covers, and forget the limits that refusals taught; the routes' ids."""
    found = []
    for provider in providers:
        for group in _group_of(provider, _known_models(provider)):
            for route in group:
                if fnmatch.fnmatchcase(route.id, glob) or fnmatch.fnmatchcase(provider.name, glob):
                    clear(state, route)
                    forget_learned(state.ledger, route)
                    found.append(route.id)
    return found


def forget_changed(state: RoutingState, before: Iterable[Provider], after: Iterable[Provider]) -> None:
    """End the cooldowns of keys and addresses that are no longer those that they were held against."""
    def facts(providers: Iterable[Provider]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for provider in providers:
            found[f"provider {provider.name}"] = (provider.base_url, provider.proxy)
            found |= {f"credential {credential.id}": (provider.base_url, credential.secret, credential.proxy) for credential in provider.credentials}
        return found

    now = facts(after)
    changed = {name for name, fact in facts(before).items() if now.get(name) != fact}
    for key in [key for key in state.cooling if key.replace("route ", "credential ", 1).partition(":")[0] in changed]:
        del state.cooling[key]


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
            state.cooling[key].n_asked += 1


def end_probe(state: RoutingState, route: Route) -> None:
    """The attempt on `route` ended without saying anything about it."""
    for key in route.keys if state.cooling else ():
        if key in state.cooling:
            state.cooling[key].probing = False


def clear(state: RoutingState, route: Route) -> None:
    """A success of `route` ends every cooldown over it."""
    for key in route.keys if state.cooling else ():
        state.cooling.pop(key, None)


#: How long what was learned of a model is remembered.
LEARNED_S = 7 * 86400.0
_MAX_REPAIRS = 16               #: of one model: no honest provider refuses more


def learn_repair(state: RoutingState, route: Route, failure: UpstreamFailure, sent: Mapping[str, Any], utc: float) -> Repair | None:
    """Remember what makes `route`'s model take a request that it refused; None when nothing new does, so that asking again is in vain.

    sent: the body as it went out, with the repairs known so far.  What was tried for a field and did not help is not tried again.
    """
    if failure.kind != "parameter" or not is_listed(route):
        return None
    known = repairs_of(state, route, utc)
    cure = find_cure(failure, sent)
    name = cure.field if cure else failure.param or ""
    if cure is None or any(old.how == "none" and old.field == name or old.how == "rename" and (old.to, old.field) == (name, cure.to) for old in known):
        useless = {old.field for old in known if name in (old.field, old.to) and old.how != "none"}
        if useless:
            state.repairs[route.keys[2]] = tuple(replace(old, how="none") if old.field in useless else old for old in known)
        return None
    cure = replace(cure, until_utc=utc + LEARNED_S)
    others = tuple(old for old in known if (old.field, old.how, old.value) != (cure.field, cure.how, cure.value))
    state.repairs[route.keys[2]] = (*others, cure)[-_MAX_REPAIRS:]
    return cure


def repairs_of(state: RoutingState, route: Route, utc: float) -> tuple[Repair, ...]:
    """What is remembered of `route`'s model and has not run out; also what did not help."""
    return tuple(repair for repair in state.repairs.get(route.keys[2], ()) if repair.until_utc > utc)


def repair_row(repair: Repair) -> Json:
    """A repair as it is stored and shown."""
    return {"field": repair.field, "how": repair.how, "to": repair.to, "value": repair.value, "until_utc": repair.until_utc}


def restore_learned(state: RoutingState, rows: Iterable[tuple[str, str, str]]) -> None:
    """Put back what was stored: kind, model key, JSON. Rows that another version wrote otherwise are passed over."""
    for kind, key, text in rows:
        with contextlib.suppress(ValueError, TypeError):
            value = json.loads(text)
            if kind == "repairs":
                state.repairs[key] = tuple(Repair(**row) for row in value)
            elif kind == "window":
                n_tokens, until_utc, shared = value
                state.windows[key] = ContextWindow(int(n_tokens), float(until_utc), bool(shared))


def still_listed(route: Route) -> str:
    """The name nearest to `route`'s model that its provider still lists in configuration, "" for none: what to put in its place."""
    provider = route.provider
    others = [model.id for model in (*provider.models, *provider.preset.models) if model.id != route.model.id and not find_alias(model.id, provider.preset.retired)]
    return nearest(route.model.id, others) or next(iter(others), "")


def is_withdrawn(state: RoutingState, route: Route, now: float) -> bool:
    """Whether the provider has said that it has no such model."""
    found = state.cooling.get(route.keys[SCOPES["model"]])
    return found is not None and found.kind == "model" and found.proven and found.until_at > now


def learn_window(state: RoutingState, route: Route, failure: UpstreamFailure, utc: float, *, shared: bool) -> ContextWindow | None:
    """Remember how much a model holds, when its provider told so; what configuration says is wrong both ways."""
    told = told_window(failure.detail) if failure.reason == "context_overflow" and is_listed(route) else None
    if told is None:
        return None
    before = state.windows.get(route.keys[2])
    state.windows[route.keys[2]] = window = ContextWindow(told, utc + LEARNED_S, shared or before is not None and before.shared)
    return window


def cool(state: RoutingState, route: Route, failure: UpstreamFailure, now: float, *, jitter: float) -> Cooldown | None:
    """Note a failure: how long what is left out, None when nothing cools. `jitter` is 0..1 and moves guesses by up to a fifth.

    Failures that arrive while their cooldown runs (requests sent before it) do not add strikes.
    """
    end_probe(state, route)
    if not failure.scope or (failure.scope in ("model", "route") and not is_listed(route)):
        return None
    rule = state.rules[failure.kind]
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
    state.cooling[key] = cooldown = Cooldown(key, failure.kind, failure.reason, now + span_s, strikes, failure.proven, detail=failure.detail[:300], began_at=now)
    if before is not None and before.until_at > now:        # asked all the same, and refused: the quarters go on
        cooldown.began_at, cooldown.n_asked = before.began_at, before.n_asked
    return cooldown


def cooldown_rows(state: RoutingState, now: float) -> dict[str, Json]:
    """The cooldowns that were proven and still run, by key, for a restart. Instants are UTC."""
    return {key: {"kind": cooldown.kind, "reason": cooldown.reason, "until_utc": round(cooldown.until_at + state.ledger.utc_less_now, 3), "strikes": cooldown.strikes}
            for key, cooldown in state.cooling.items() if cooldown.proven and cooldown.until_at > now}


def load_cooldowns(state: RoutingState, rows: Mapping[str, Json], now: float) -> None:
    """Go on with what cooldown_rows() gave; what has ended, or is not understood, is passed over."""
    for key, row in rows.items():
        with contextlib.suppress(KeyError, TypeError, ValueError):
            until_at = float(row["until_utc"]) - state.ledger.utc_less_now
            if until_at > now and row["kind"] in FAILURE_RULES and len(state.cooling) < _MAX_COOLDOWNS:
                state.cooling[key] = Cooldown(key, row["kind"], str(row["reason"]), until_at, int(row["strikes"]), True, began_at=now)


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

    __slots__ = ("rest", "max_bytes", "_began", "_searched")

    def __init__(self) -> None:
        self.rest = b""
        self.max_bytes = MAX_EVENT_BYTES        #: of one frame
        self._began = False     # past the byte order mark
        self._searched = 0      # no blank line ends before here

    def feed(self, chunk: bytes) -> bytes:
        """All frames that `chunk` completes, as one piece of bytes. Raises UpstreamFailure past max_bytes."""
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
        if len(self.rest) > self.max_bytes:
            raise UpstreamFailure("server", "too_big", f"one event is larger than {self.max_bytes} bytes", phase="body")
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
_LINES_ENCODER = json.JSONEncoder(separators=("\n", ":"))       # a line break stands in no JSON string


def read_alike(block: bytes, position: int, prefix: bytes, suffix: bytes) -> tuple[list[str], int]:
    """The texts of a run of frames that differ in one JSON string alone, and where the run ends; ([], position) where none of two or more begins.

    block: whole frames    prefix, suffix: what stands around the inside of that string, the frame's blank line included
    """
    none: tuple[list[str], int] = [], position
    if not block.startswith(prefix, position):
        return none
    start, stop = position + len(prefix), block.rfind(suffix, position)
    pieces = block[start:stop].split(suffix + prefix) if stop > start else []
    if len(pieces) < 2 or block.count(b"\n", position, stop + len(suffix)) != suffix.count(b"\n") * len(pieces):
        return none
    try:
        texts = json.loads(b'["%b"]' % b'"\n,"'.join(pieces))       # a quote or a backslash too many makes another count, or a line break inside a string
    except ValueError:
        return none
    return (texts, stop + len(suffix)) if len(texts) == len(pieces) and all(texts) else none


def write_alike(before: bytes, texts: Sequence[str], after: bytes) -> bytes:
    """For each text `before`, the text as a JSON string, `after`: the same bytes as one by one."""
    return before + _LINES_ENCODER.encode(texts)[1:-1].encode("ascii").replace(b"\n", after + before) + after


##############################################################################
# 9. Hub                                                    pure | uses 1-2
##############################################################################
# The neutral form between the wire formats, and every rule that all formats share, each one function here: a format's reader
# recognises shapes, its writer renders shapes, and neither pairs calls, invents ids or cleans schemas.
#     hub = X_read_request(body);  hub = recall(hub, memo);  ready = prepare(hub, profile);  body = X_write_request(ready, profile)
#     reader owns a Serialiser(source) -> deltas -> CallHolder -> X writer
# A request is a dict: model, stream, system, turns, tools, choice, parallel, max_out, sampling, stop, format, think, meta, extra, client,
# dropped.  A part is a dict with "type", a delta a dict with "delta".  Absent means absent.  `args` of a call is always the exact JSON string.
# Before editing: prepare() must stay idempotent and deterministic (prefix caches compare bytes), and must never change what it was given.
# Source: published SDK types and vendor references, read 2026-11.  Guarded by tests/test_hub.py.
# One more provider oddity: a field of Profile with a default that changes nothing, the rule that reads it, rows in _PROFILE_ROWS or MODEL_FACTS.

# ---- Profiles: what is odd about a provider, as data


@dataclass(frozen=True, slots=True)
class Profile:
    """What a target takes and how it answers, for one preset, wire model and wire format."""
    format: Format = "chat"
    preset: str = ""
    model: str = ""                          #: wire model
    family: str = ""                         #: who trusts the seals: anthropic, openai, gemini, xai, openrouter, else the preset's name
    vendor: bool = False                     #: the true Anthropic or the true OpenAI
    reject: tuple[str, ...] = ()             #: body fields that are answered by 400; outer.inner for one within another
    message_reject: tuple[str, ...] = ()     #: the same within a message
    max_field: str = "max_tokens"
    system_role: str = "system"
    late_system: str = "wrap"                #: keep: system text between turns keeps its role
    null_content: str | None = None          #: `content` beside calls
    replay: str = ""                         #: how thinking goes back: native, thinking, reasoning_content, reasoning, reasoning_details, think_tag
    must_replay: bool = False                #: refuses tool turns whose thinking is missing
    effort: tuple[str, ...] | None = None    #: allowed words, None: as is, (): never sent
    switch: str = ""                         #: how Chat says on or off: thinking, enable_thinking, chat_template_kwargs, reasoning
    schema: str = "full"                     #: json, none: what response_format may be
    schema_with_tools: bool = True           #: whether it may stand beside tools
    one_strict: bool = False                 #: `strict` must be the same on all tools
    tool_schema: str = ""                    #: gemini: only its subset
    choices: tuple[str, ...] = ("auto", "none", "required", "tool")
    required_word: str = "required"
    call_id: str = ""                        #: anthropic, openai64, mistral9
    tool_images: bool = False
    file_url: bool = False
    cache_control: bool = False
    cache_key: bool = False                  #: takes prompt_cache_key
    top_k: bool = False
    penalties: bool = True
    sampling: str = "ok"                     #: idle: only while not thinking; never
    stream_options: bool = True
    custom_tools: bool = False
    namespaces: bool = False
    hosted: bool = False                     #: its own server-run tools may be offered
    via_hub: bool = False
    own_ids: bool = False
    codex_length: str = "incomplete"
    merge_choices: bool = False
    think_tags: bool = False
    think_open: bool = False
    name_fragments: bool = False
    repeats_args: bool = False
    note_dummy: str = ""                     #: stands in for a lost thought signature on a step's first call
    thinking: tuple[str, ...] = ("adaptive", "enabled")   #: Messages: forms of `thinking` it knows
    prefill: str = "ok"                      #: no: a last assistant turn is refused; prefix: it needs a mark
    continues: str = ""                      #: how it goes on from exactly where a last assistant turn ends: last, as it stands; prefix, partial: so marked; final: vLLM's fields
    user_first: bool = False
    forced_choice: str = "ok"                #: no, not_enabled: when tools may be forced
    max_stop: int | None = None              #: how many stop strings, 0 for none
    seed_field: str = "seed"
    max_out_limit: int | None = None
    default_max_out: int = 8192
    images: bool = True
    extra_names: bool = False                #: assistant and tool messages want `name`


_TRUE_CHAT: Json = {"call_id": "openai64", "system_role": "system", "custom_tools": True, "cache_key": True, "max_stop": 4, "vendor": True,
                    "choices": ("auto", "none", "required", "tool", "allowed", "custom")}
_LOCAL: Json = {"replay": "reasoning", "top_k": True, "null_content": ""}

_PROFILE_ROWS: Mapping[str, Json] = {
    "anthropic": {"family": "anthropic", "vendor": True},
    "openai": {"family": "openai", **_TRUE_CHAT},
    "gemini": {"family": "gemini", "tool_schema": "gemini", "null_content": "", "reject": ("store", "metadata", "prompt_cache_key", "parallel_tool_calls", "logit_bias",
               "service_tier", "safety_identifier", "user", "verbosity")},
    "groq": {"reject": ("logprobs", "logit_bias", "top_logprobs", "store", "metadata", "n", "prompt_cache_key", "verbosity", "safety_identifier"),
             "message_reject": ("name", "reasoning_content", "reasoning"), "max_field": "max_completion_tokens", "penalties": False},
    "cerebras": {"reject": ("store", "metadata", "reasoning", "enable_thinking", "frequency_penalty", "presence_penalty", "logit_bias", "service_tier", "prompt_cache_key",
                 "verbosity", "safety_identifier"), "message_reject": ("reasoning_content",), "max_field": "max_completion_tokens", "penalties": False, "replay": "reasoning",
                 "schema_with_tools": False, "one_strict": True},
    "openrouter": {"family": "openrouter", "replay": "reasoning_details", "switch": "reasoning", "file_url": True, "cache_control": True, "top_k": True, "cache_key": True},
    "mistral": {"reject": ("stream_options", "store", "user", "logprobs", "top_logprobs", "logit_bias", "metadata", "service_tier", "prompt_cache_key", "verbosity",
                "safety_identifier", "max_completion_tokens"), "message_reject": ("reasoning_content", "reasoning"), "stream_options": False, "call_id": "mistral9",
                "seed_field": "random_seed", "required_word": "any", "prefill": "prefix", "continues": "prefix", "user_first": True, "extra_names": True},
    "deepseek": {"replay": "reasoning_content", "must_replay": True, "switch": "thinking", "effort": ("high", "max"), "schema": "json", "reject": ("store",), "images": False,
                 "continues": "prefix"},
    "xai": {"family": "xai", "reject": ("logit_bias", "store"), "max_field": "max_completion_tokens"},
    "huggingface": {},
    "ollama": {"replay": "reasoning", "effort": ("none", "low", "medium", "high"), "reject": ("logit_bias", "user", "n"), "top_k": True},
    "ollama-cloud": {"replay": "reasoning", "effort": ("none", "low", "medium", "high"), "schema": "json"},
    "github-copilot": {"family": "github-copilot", "merge_choices": True, "reject": ("store",), "system_role": "system"},
    "vllm": {**_LOCAL, "switch": "chat_template_kwargs", "tool_images": True, "continues": "final"},
    "llamacpp": {**_LOCAL, "replay": "reasoning_content", "switch": "chat_template_kwargs", "continues": "last"},
    "lmstudio": {**_LOCAL},
    "moonshot": {"replay": "reasoning_content", "must_replay": True, "switch": "thinking", "choices": ("auto", "none"), "own_ids": True, "tool_images": True, "reject": ("store",),
                 "continues": "partial"},
    "zai": {"replay": "reasoning_content", "switch": "thinking", "choices": ("auto",), "max_stop": 1, "reject": ("store",)},
    "minimax": {"replay": "think_tag", "reject": ("store",)},
    "qwen": {"replay": "", "switch": "enable_thinking", "reject": ("store",), "continues": "partial"},
    "together": {"top_k": True, "switch": "reasoning", "reject": ("store",)},
    "fireworks": {"top_k": True},
    "nvidia": {"stream_options": False, "reject": ("stream_options", "store", "metadata", "parallel_tool_calls")},
    "sambanova": {"reject": ("store", "n", "logit_bias"), "penalties": False},
    "cloudflare": {},
    "perplexity": {"choices": (), "user_first": True},
}

_FORMAT_ROWS: Mapping[str, Json] = {
    "chat": {},
    "messages": {"continues": "", "replay": "thinking", "system_role": "", "late_system": "wrap", "cache_control": True, "top_k": True, "custom_tools": False, "call_id": "anthropic",
                 "user_first": True,
                 "choices": ("auto", "none", "required", "tool"), "max_stop": None, "null_content": None, "tool_images": True, "file_url": True, "schema": "none", "effort": (),
                 "thinking": ("enabled",), "required_word": "any", "reject": ("context_management", "mcp_servers", "container", "inference_geo", "betas", "fallbacks", "diagnostics", "thread")},
    "responses": {"continues": "", "replay": "", "late_system": "keep", "top_k": False, "max_stop": 0, "tool_images": True, "file_url": True, "max_field": "max_output_tokens", "penalties": False,
                  "prefill": "ok", "user_first": False, "null_content": None, "cache_control": False, "reject": (), "call_id": "openai64"},
}
_CLAUDE_LEVELS = ("low", "medium", "high", "xhigh", "max")
_NEW_CLAUDE: Json = {"thinking": ("adaptive",), "sampling": "never", "effort": _CLAUDE_LEVELS, "prefill": "no", "default_max_out": 32000}
_OLD_CLAUDE: Json = {"thinking": ("enabled",), "sampling": "idle", "effort": (), "prefill": "ok", "forced_choice": "not_enabled", "default_max_out": 32000}

#: What holds for some models only: (preset glob, format glob, model globs, changes); later rows win.
MODEL_FACTS: tuple[tuple[str, str, str, Json], ...] = (
    ("anthropic", "messages", "*claude*", {"continues": "last"}),       # those that refuse a last assistant turn say so by `prefill`
    ("anthropic", "messages", "*", {"replay": "native", "late_system": "keep", "hosted": True, "schema": "full", "reject": (), "thinking": ("adaptive", "enabled"), "effort": _CLAUDE_LEVELS}),
    ("github-copilot", "messages", "*", {"family": "anthropic", "replay": "native", "schema": "full"}),
    ("openrouter", "messages", "*", {"schema": "full", "effort": _CLAUDE_LEVELS, "thinking": ("adaptive", "enabled")}),
    ("deepseek", "messages", "*", {"images": False}),
    ("*", "messages", "*claude*", _NEW_CLAUDE),
    ("*", "messages", "*fable-5* *mythos-*", {"forced_choice": "no"}),
    ("*", "messages", "*opus-4-6* *opus-4.6* *sonnet-4-6* *sonnet-4.6*", {"thinking": ("adaptive", "enabled"), "sampling": "idle", "effort": ("low", "medium", "high", "max")}),
    ("*", "messages", "*sonnet-4-0* *sonnet-4-2* *sonnet-4-5* *sonnet-4.5* *sonnet-4 *opus-4-0* *opus-4-1* *opus-4-2* *opus-4 *haiku-4-5* *haiku-4.5* *3-7-sonnet*",
     _OLD_CLAUDE),
    ("*", "messages", "*opus-4-5* *opus-4.5*", {**_OLD_CLAUDE, "effort": ("low", "medium", "high")}),
    ("*", "messages", "*claude-2* *claude-3-5* *claude-3-opus* *claude-3-sonnet* *claude-3-haiku*",
     {"thinking": (), "sampling": "ok", "effort": (), "prefill": "ok", "default_max_out": 4096, "schema": "none"}),
    ("openai", "responses", "*", {"replay": "native", "custom_tools": True, "namespaces": True, "hosted": True, "choices": _TRUE_CHAT["choices"]}),
    ("openai", "*", "o1* o3* o4* gpt-5* gpt-6*", {"max_field": "max_completion_tokens", "max_stop": 0, "sampling": "idle", "penalties": False, "effort": ("minimal", "low", "medium", "high")}),
    ("openai", "*", "gpt-5.1* gpt-5.2* gpt-5.3*", {"effort": ("none", "low", "medium", "high", "xhigh")}),
    ("openai", "*", "gpt-5.4* gpt-5.5* gpt-5.6* gpt-6*", {"effort": ("none", "minimal", "low", "medium", "high", "xhigh", "max")}),
    ("openai", "*", "gpt-4* gpt-3* chatgpt-*", {"effort": ()}),
    ("openai", "responses", "*", {"max_field": "max_output_tokens", "max_stop": 0}),
    ("xai", "responses", "*", {"replay": "native", "reject": ("reasoning.summary",)}),
    ("xai", "*", "*", {"effort": (), "max_stop": None}),
    ("xai", "chat", "*-mini*", {"effort": ("low", "high"), "penalties": False, "max_stop": 0}),
    ("xai", "chat", "grok-4* grok-5*", {"penalties": False, "max_stop": 0}),
    ("groq", "chat", "*gpt-oss*", {"effort": ("low", "medium", "high")}),
    ("groq", "chat", "*qwen*", {"effort": ("none", "low", "medium", "high")}),
    ("groq", "chat", "*llama*", {"effort": ()}),
    ("cerebras", "chat", "*gpt-oss*", {"effort": ("low", "medium", "high")}),
    ("cerebras", "chat", "*glm*", {"effort": ("none",), "replay": "think_tag"}),
    ("cerebras", "chat", "*qwen*", {"effort": ("none", "low", "medium", "high")}),
    ("gemini", "chat", "*", {"effort": ("none", "minimal", "low", "medium", "high")}),
    ("gemini", "chat", "*gemini-3*", {"note_dummy": "skip_thought_signature_validator", "effort": ("minimal", "low", "medium", "high")}),
    ("gemini", "chat", "*gemma*", {"effort": ()}),
    ("mistral", "chat", "*", {"effort": ("none", "high")}),
    ("mistral", "chat", "*codestral* *devstral* *ministral*", {"effort": ()}),
    ("github-copilot", "chat", "gpt-5* gpt-6* o3* o4*", {"max_field": "max_completion_tokens", "max_stop": 0, "sampling": "idle"}),
    ("moonshot", "chat", "*k2* moonshot-v1*", {"effort": ()}),
    ("*", "chat", "*kimi-k2*", {"own_ids": True}),
    ("vllm", "chat", "*gpt-oss*", {"effort": ("low", "medium", "high"), "switch": ""}),
)


def _profile_row(preset: str, row: Json) -> Profile:
    return Profile(preset=preset, **{"family": preset, **row})


#: Profiles by preset name, for their Chat endpoint and no model in particular.
PROFILES: Mapping[str, Profile] = MappingProxyType({name: _profile_row(name, row) for name, row in _PROFILE_ROWS.items()})


@functools.lru_cache(maxsize=1024)
def profile_for(preset: str, model: str, format: Format = "chat") -> Profile:
    """What `model` of `preset` takes when spoken to in `format`; a preset without a row has only the defaults."""
    profile = PROFILES.get(preset) or Profile(preset=preset, family=preset)
    changes: Json = {"model": model, "format": format, **_FORMAT_ROWS[format]}
    if format != "chat" and not (profile.family in ("anthropic", "openai") and profile.vendor):
        changes["vendor"] = False
    for preset_glob, format_glob, models, row in MODEL_FACTS:
        if fnmatch.fnmatchcase(preset, preset_glob) and fnmatch.fnmatchcase(format, format_glob) and any(fnmatch.fnmatchcase(model.lower(), glob) for glob in models.split()):
            changes.update(row)
    return replace(profile, **changes)


# ---- Parts and deltas

#: Reasons a delta of kind stop may carry.
STOP_REASONS: tuple[str, ...] = ("end", "length", "tool", "sequence", "filter", "refusal", "pause", "context")

_CONTENT = frozenset({"text", "think", "call", "refuse", "opaque"})


def new_hub(client: Format, model: str, stream: bool) -> Json:
    """An empty hub request, for readers to fill."""
    return {"client": client, "model": model, "stream": stream, "turns": [], "extra": {}, "meta": {}, "dropped": []}


def text_part(text: str, cache: Json | None = None) -> Json:
    """A text part."""
    return {"type": "text", "text": text, "cache": cache} if cache else {"type": "text", "text": text}


def call_part(call_id: str, name: str, args: str, kind: str = "function", namespace: str = "") -> Json:
    """A call part; `args` is the exact JSON string."""
    part = {"type": "call", "id": call_id, "name": name, "args": args, "kind": kind}
    return {**part, "namespace": namespace} if namespace else part


def result_part(call_id: str, parts: list[Json], *, error: bool = False, kind: str = "function") -> Json:
    """A tool result; it belongs into a user turn."""
    part: Json = {"type": "result", "id": call_id, "parts": parts, "kind": kind}
    return {**part, "error": True} if error else part


def start_delta(answer_id: str, model: str, usage: Json | None = None) -> Json:
    """The first delta."""
    return {"delta": "start", "id": answer_id, "model": model, **({"usage": usage} if usage else {})}


def text_delta(text: str) -> Json:
    """More of the answer's text. A delta that holds the text of many events has their texts under `pieces` too: writers give each its own event."""
    return {"delta": "text", "text": text}


def think_delta(text: str) -> Json:
    """More of the current thinking."""
    return {"delta": "think", "text": text}


def seal_delta(record: Json) -> Json:
    """The end of a thinking block: {"family", "model", "field", "data"?, "id"?}."""
    return {"delta": "seal", **record}


def refuse_delta(text: str) -> Json:
    """More of a refusal."""
    return {"delta": "refuse", "text": text}


def call_delta(call_id: str, name: str, kind: str = "function", namespace: str = "") -> Json:
    """A call opens; what was open closes."""
    delta = {"delta": "call", "id": call_id, "name": name, "kind": kind}
    return {**delta, "namespace": namespace} if namespace else delta


def args_delta(text: str) -> Json:
    """More arguments of the latest call."""
    return {"delta": "args", "text": text}


def note_delta(call_id: str, family: str, data: Any) -> Json:
    """Opaque provider data of a call."""
    return {"delta": "note", "id": call_id, "family": family, "data": data}


def cite_delta(url: str, title: str, **more: Any) -> Json:
    """A citation of the current text; more: start, end, raw, family."""
    return {"delta": "cite", "url": url, "title": title, **more}


def opaque_delta(family: str, data: Any, text: str = "") -> Json:
    """A block only its own family understands; `text` is a readable rendering."""
    return {"delta": "opaque", "family": family, "data": data, **({"text": text} if text else {})}


def usage_delta(usage: Json) -> Json:
    """Token counts: input (all of it), cached, cache_write, output, reasoning; last wins per key."""
    return {"delta": "usage", **usage}


def stop_delta(reason: str, sequence: str | None = None, details: Json | None = None) -> Json:
    """The proper end."""
    return {"delta": "stop", "reason": reason, **({"sequence": sequence} if sequence else {}), **({"details": details} if details else {})}


def error_delta(status: int, message: str, code: str | None = None, type: str = "server_error") -> Json:
    """The end by failure."""
    return {"delta": "error", "status": status, "type": type, "code": code, "message": message}


def check_deltas(deltas: Sequence[Json]) -> list[str]:
    """Where a finished stream breaks the contract of the deltas, [] when it is kept."""
    wrong: list[str] = []
    kinds = [delta["delta"] for delta in deltas]
    for index, (kind, delta) in enumerate(zip(kinds, deltas)):
        if kind == "start" and index:
            wrong.append(f"{index}: start is not first")
        if kind in ("text", "think", "refuse", "args") and not delta["text"]:
            wrong.append(f"{index}: {kind} is empty")
        if kind == "call" and not (delta["id"] and delta["name"]):
            wrong.append(f"{index}: call without id or name")
        if kind in ("args", "note") and _since_content(kinds[:index]) != "call":
            wrong.append(f"{index}: {kind} outside a call")
        if kind in ("text", "refuse", "call", "opaque", "stop") and _last_thinking(kinds[:index]) == "think":
            wrong.append(f"{index}: thinking was not sealed")
        if kind in ("stop", "error") and index != len(kinds) - 1:
            wrong.append(f"{index}: {kind} is not last")
    ids = [delta["id"] for delta in deltas if delta["delta"] == "call"]
    if len(set(ids)) != len(ids):
        wrong.append("a call id occurs twice")
    if kinds and kinds[-1] not in ("stop", "error"):
        wrong.append("no end")
    return wrong


def _since_content(kinds: list[str]) -> str:
    """The latest kind that opened something."""
    return next((kind for kind in reversed(kinds) if kind in _CONTENT or kind == "seal"), "")


def _last_thinking(kinds: list[str]) -> str:
    return next((kind for kind in reversed(kinds) if kind in ("think", "seal", "text", "refuse", "call", "opaque")), "")


def fold_deltas(deltas: Iterable[Json]) -> list[Json]:
    """The parts of a whole answer; calls without arguments get "{}"."""
    parts: list[Json] = []
    for delta in deltas:
        kind, last = delta["delta"], parts[-1] if parts else {}
        if kind in ("text", "think", "refuse"):
            part_type = "refusal" if kind == "refuse" else kind
            if last.get("type") == part_type and "seal" not in last:
                last["text"] += delta["text"]
            else:
                parts.append({"type": part_type, "text": delta["text"]})
        elif kind == "seal":
            if last.get("type") != "think" or "seal" in last:
                parts.append({"type": "think", "text": ""})
            parts[-1]["seal"] = {name: value for name, value in delta.items() if name != "delta"}
        elif kind == "call":
            parts.append(call_part(delta["id"], delta["name"], "", delta["kind"], delta.get("namespace", "")))
        elif kind == "args":
            last["args"] += delta["text"]
        elif kind == "note":
            last["note"] = {"family": delta["family"], "data": delta["data"]}
        elif kind == "cite":
            _cited(parts)["cites"].append({name: value for name, value in delta.items() if name != "delta"})
        elif kind == "opaque":
            parts.append({"type": "opaque", **{name: value for name, value in delta.items() if name != "delta"}})
    return [{**part, "args": part["args"].strip() or "{}"} if part["type"] == "call" else part for part in parts]


def _cited(parts: list[Json]) -> Json:
    """The text part that the next citation belongs to."""
    if not parts or parts[-1]["type"] != "text":
        parts.append({"type": "text", "text": ""})
    parts[-1].setdefault("cites", [])
    return parts[-1]


# ---- Reading helpers

def drop(hub: Json, *names: str) -> None:
    """Note what was left out, for the header x-aicarousel-dropped."""
    hub["dropped"].extend(name for name in names if name not in hub["dropped"])


def compact(value: Any) -> str:
    """JSON without blanks, characters as they are."""
    return _PLAIN_ENCODER.encode(value)


_PLAIN_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def is_blank(text: str) -> bool:
    """Nothing but white space."""
    return not text or text.isspace()


def empty_id(value: Any) -> bool:
    """Whether an id says nothing: missing, null, "", "null"."""
    return not isinstance(value, str) or value.strip() in ("", "null", "None", "undefined")


def rest_of(body: Json, known: Collection[str]) -> Json:
    """The fields of `body` that its reader does not know: they go to extra, prepare() warns of them."""
    return {name: value for name, value in body.items() if name not in known}


def args_text(value: Any) -> str:
    """Arguments as the hub holds them: a string as it is, an object dumped, nothing as ""."""
    return value if isinstance(value, str) else "" if value is None else compact(value)


def args_object(text: str) -> Json:
    """Arguments as an object, for formats that want one: "" is {}, a bare value {"value": ..}, what is no JSON {"_raw": ..}."""
    if is_blank(text):
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {"_raw": text}
    return value if isinstance(value, dict) else {} if value is None else {"value": value}


def freeform_args(text: str) -> str:
    """The arguments of a call to a freeform tool."""
    return compact({"input": text})


def freeform_text(args: str) -> str:
    """The text of a freeform call: its `input`, else its only string, else all of it."""
    try:
        value = json.loads(args)
    except (ValueError, RecursionError):
        return args
    if isinstance(value, dict):
        if isinstance(value.get("input"), str):
            return value["input"]
        strings = [item for item in value.values() if isinstance(item, str)]
        if len(strings) == 1:
            return strings[0]
    return value if isinstance(value, str) else args


def read_stop(value: Any) -> list[str]:
    """Stop strings of a request: a string, a list or nothing."""
    values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return [item for item in values if isinstance(item, str) and item]


_MAGIC: tuple[tuple[bytes, str], ...] = ((b"\x89PNG", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"GIF8", "image/gif"), (b"RIFF", "image/webp"), (b"%PDF", "application/pdf"))


def read_data_url(url: str) -> tuple[str, str]:
    """(mime, base64) of a data URL. Raises GatewayError 400 when it is none."""
    head, comma, body = url.partition(",")
    if not comma or head[:5].lower() != "data:":
        raise bad_request("invalid data URL")
    mime, *more = head[5:].split(";")
    if any(word.strip().lower() == "base64" for word in more):
        data = "".join(body.split())
    else:
        from urllib.parse import unquote_to_bytes
        data = base64.b64encode(unquote_to_bytes(body)).decode("ascii")
    return mime.strip().lower() or _sniff(data), data


def _sniff(data: str) -> str:
    """The mime type by the first bytes. Raises GatewayError 400."""
    try:
        head = base64.b64decode(data[:16])
    except ValueError as error:
        raise bad_request("invalid data URL") from error
    for magic, mime in _MAGIC:
        if head.startswith(magic):
            return mime
    raise bad_request("invalid data URL")


def image_part(url: str, detail: str | None = None) -> Json:
    """An image part for a URL or a data URL."""
    if url[:5].lower() == "data:":
        mime, data = read_data_url(url)
        part: Json = {"type": "image", "data": data, "mime": mime}
    else:
        part = {"type": "image", "url": url}
    return {**part, "detail": detail} if detail else part


def file_part(url: str, name: str | None = None) -> Json:
    """A file part for a URL, a data URL or bare base64 (a PDF then)."""
    part: Json = {"type": "file"}
    if url[:5].lower() == "data:":
        part["mime"], part["data"] = read_data_url(url)
    elif re.match(r"https?://", url, re.IGNORECASE):
        part["url"] = url
    else:
        part["mime"], part["data"] = "application/pdf", "".join(url.split())
    return {**part, "name": name} if name else part


def data_url(part: Json) -> str:
    """The data URL, or the plain URL, of an image or file part."""
    return f"data:{part['mime']};base64,{part['data']}" if "data" in part else part.get("url", "")


_SURROGATE = re.compile("[\ud800-\udfff]")


def mend_text(value: Any) -> Any:
    """`value`, JSON, with lone surrogates replaced everywhere; the same object when there are none."""
    try:
        compact(value).encode()
    except UnicodeEncodeError:
        return json.loads(_SURROGATE.sub("\ufffd", compact(value)))
    return value


# ---- Identifiers

_COUNTER_LIKE = re.compile(r"[:_.\-]\d{1,3}\Z")
_OWN_SUFFIX = re.compile(r"_u[0-9a-z]{8}\Z")
_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def _digits(text: str, alphabet: str, length: int) -> str:
    """`length` letters of `alphabet` that depend on `text` alone."""
    number = int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest(), "big")
    letters = []
    for _ in range(length):
        number, digit = divmod(number, len(alphabet))
        letters.append(alphabet[digit])
    return "".join(letters)


def mint(prefix: str, seed: str, number: int = 0) -> str:
    """A new id: `prefix` and 24 letters, always the same for the same seed and number."""
    return prefix + base64.b64encode(hashlib.sha256(f"{prefix}|{seed}|{number}".encode("utf-8", "replace")).digest(), b"Aa")[:24].decode()


def _hex(text: str, length: int) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:length]


def _fit_anthropic(call_id: str) -> str:
    clean = re.sub(r"[^a-zA-Z0-9_-]", "_", call_id)
    return call_id if clean == call_id else f"{clean}_{_hex(call_id, 8)}"


def _fit_openai(call_id: str) -> str:
    return call_id if len(call_id) <= 64 else f"{call_id[:40]}_{_hex(call_id, 23)}"


def _fit_mistral(call_id: str) -> str:
    return call_id if re.fullmatch(r"[a-zA-Z0-9]{9}", call_id) else _digits(call_id, _BASE62, 9)


_ID_RULES: Mapping[str, Callable[[str], str]] = {"anthropic": _fit_anthropic, "openai64": _fit_openai, "mistral9": _fit_mistral}


def fit_id(call_id: str, rule: str) -> str:
    """`call_id` as the target takes it; the same for a call and its result, and stable under repetition."""
    return _ID_RULES[rule](call_id) if rule else call_id


def unique_id(call_id: str, seen: Collection[str], seed: str, prefix: str = "call_") -> str:
    """The id a client gets: minted when there is none, lengthened when it counts or repeats, for clients key results by id across turns."""
    if empty_id(call_id):
        return mint(prefix, seed, len(seen))
    if len(call_id) < 6 or _COUNTER_LIKE.search(call_id) or call_id in seen:
        return f"{call_id}_u{_digits(f'{seed}|{call_id}|{len(seen)}', _BASE62[:10] + _BASE62[36:], 8)}"
    return call_id


def strip_own_id(call_id: str) -> str:
    """`call_id` without the suffix of unique_id."""
    return _OWN_SUFFIX.sub("", call_id)


# ---- Thinking: seals and the envelope

_ENVELOPE = "aic1."
_ANY_ENVELOPE = re.compile(r"aic\d+\.")
_FOREIGN: Json = {"family": "?", "model": "", "field": "?"}


def is_envelope(text: Any) -> bool:
    """Whether `text` is one of our envelopes, of whatever version."""
    return isinstance(text, str) and _ANY_ENVELOPE.match(text) is not None


def seal_envelope(record: Json, text: str | None = None) -> str:
    """A seal packed for a client of another family; `text` is thinking that the client is not to see."""
    body = {"o": record["family"], "m": record.get("model", ""), "f": record.get("field", "")}
    if record.get("data") is not None:
        body["d"] = record["data"]
    if text:
        body["t"] = text
    return _ENVELOPE + base64.urlsafe_b64encode(compact(body).encode("utf-8", "replace")).decode("ascii").rstrip("=")


def open_envelope(text: str) -> Json:
    """The seal of an envelope, with "text" when it held some; one that cannot be read is foreign and without data."""
    if not text.startswith(_ENVELOPE):
        return dict(_FOREIGN)
    body = text[len(_ENVELOPE):]
    try:
        fields = json.loads(base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True))
        record = {"family": fields["o"], "model": fields.get("m", ""), "field": fields["f"]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return dict(_FOREIGN)
    if not all(isinstance(value, str) for value in record.values()):
        return dict(_FOREIGN)
    return {**record, **({"data": fields["d"]} if "d" in fields else {}), **({"text": fields["t"]} if isinstance(fields.get("t"), str) else {})}


def write_seal(record: Json, own_family: str, text: str | None = None) -> str:
    """What a client's signature field holds: data of its own family as it is, else an envelope."""
    if record.get("family") == own_family and isinstance(record.get("data"), str) and record["data"]:
        return record["data"]
    return seal_envelope(record, text)


def read_seal(value: Any, own_family: str, field_name: str) -> Json | None:
    """The seal in a client's signature field, None for an empty one."""
    if not isinstance(value, str) or not value:
        return None
    if is_envelope(value):
        return open_envelope(value)
    if own_family == "anthropic" and not looks_anthropic(value):
        return dict(_FOREIGN)
    return {"family": own_family, "model": "", "field": field_name, "data": value}


def looks_anthropic(signature: str) -> bool:
    """Whether a signature may be Anthropic's: others' are Fernet tokens, dotted, or empty."""
    return bool(signature) and "." not in signature and not signature.startswith("gAAAA")


_DETAIL_FORMATS: Mapping[str, str] = {"anthropic": "anthropic-claude-v1", "openai": "openai-responses-v1", "xai": "xai-responses-v1", "gemini": "google-gemini-v1"}
_DETAIL_FAMILIES: Mapping[str, str] = {name: family for family, name in _DETAIL_FORMATS.items()}
_DETAIL_VENDORS: Mapping[str, str] = {"anthropic/": "anthropic-claude-v1", "openai/": "openai-responses-v1", "x-ai/": "xai-responses-v1", "google/": "google-gemini-v1"}


def details_of(record: Json, text: str = "") -> list[Json]:
    """The `reasoning_details` entries that carry a seal to a Chat client or provider; [] for a seal without data."""
    data, family = record.get("data"), record.get("family", "")
    if data is None:
        return []
    if record.get("field") == "reasoning_details":
        return _details_with_text(data, text) if isinstance(data, list) else []
    form = _DETAIL_FORMATS.get(family, f"{family}-v1" if family else "unknown")
    if record.get("field") == "signature":
        return [{"type": "reasoning.text", "format": form, "index": 0, "text": text, "signature": data}]
    return [{"type": "reasoning.encrypted", "format": form, "index": 0, **({"id": record["id"]} if record.get("id") else {}), "data": data}]


def _details_with_text(entries: list[Any], text: str) -> list[Json]:
    """Kept entries, the first signed text entry with the thinking's text put back."""
    rebuilt = []
    for entry in entries:
        if isinstance(entry, dict):
            if text and entry.get("type") == "reasoning.text" and not entry.get("text"):
                entry, text = {**entry, "text": text}, ""
            rebuilt.append(entry)
    return rebuilt


_DETAIL_WORDS = frozenset({"type", "text", "summary", "format", "signature", "data"})


def read_details(entries: Any) -> list[Json]:
    """Think parts of the `reasoning_details` a Chat client sends back: signed text and encrypted entries, each on its own."""
    parts: list[Json] = []
    text = ""
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict):
            continue
        entry = {name: value for name, value in entry.items() if isinstance(value, str) or name not in _DETAIL_WORDS}
        text += entry.get("text") or entry.get("summary") or ""
        form = entry.get("format") or "unknown"
        kept = {name: value for name, value in entry.items() if name not in ("text", "summary")}
        family = _DETAIL_FAMILIES.get(form, "openrouter")
        if entry.get("signature"):
            seal = {"family": family, "model": "", "field": "signature", "data": entry["signature"]} if family == "anthropic" else _details_seal(kept)
        elif entry.get("data"):
            known = family in ("openai", "xai", "anthropic")
            seal = {"family": family, "model": "", "field": "redacted" if family == "anthropic" else "encrypted", "data": entry["data"]} if known else _details_seal(kept)
        else:
            continue
        parts.append({"type": "think", "text": text, "seal": seal})
        text = ""
    return parts + [{"type": "think", "text": text}] if text else parts


def _details_seal(entry: Json) -> Json:
    return {"family": "openrouter", "model": "", "field": "reasoning_details", "data": [entry]}


def _details_for(part: Json, model: str) -> list[Json]:
    """The entries of a think part that this model's vendor made."""
    wanted = next((form for start, form in _DETAIL_VENDORS.items() if model.startswith(start)), None)
    entries = details_of(part.get("seal") or {}, part["text"])
    return [entry for entry in entries if wanted is None and entry.get("format") not in _DETAIL_FAMILIES or wanted is not None and entry.get("format", wanted) == wanted]


class Memo:
    """What clients' formats have no place for, by call id: bounded, the least recently used entry goes first.  Owned by the process; a miss is normal."""

    __slots__ = ("_entries", "_max_entries")

    def __init__(self, max_entries: int = 10_000) -> None:
        self._entries: dict[str, Json] = {}
        self._max_entries = max_entries

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: str, value: Json) -> None:
        """Keep `value`, as the newest."""
        self._entries.pop(key, None)
        self._entries[key] = value
        while len(self._entries) > self._max_entries:
            del self._entries[next(iter(self._entries))]

    def get(self, key: str) -> Json | None:
        """What is kept under `key`, which becomes the newest."""
        value = self._entries.pop(key, None)
        if value is not None:
            self._entries[key] = value
        return value


def remember(memo: Memo, parts: Sequence[Json]) -> None:
    """Keep the thinking and the notes of an answer (its folded parts) under each of its calls."""
    thinking: list[Json] = []
    for part in parts:
        if part["type"] == "think":
            thinking.append(part)
        elif part["type"] == "call":
            kept = {**({"think": thinking} if thinking else {}), **({"note": part["note"]} if "note" in part else {})}
            if kept:
                memo.put(part["id"], kept)


def recall(hub: Json, memo: Memo) -> Json:
    """The hub with thinking and notes put back into turns whose client lost them; the same hub when there is nothing to put back."""
    turns = [_recall_turn(turn, memo) if turn["role"] == "assistant" else turn for turn in hub["turns"]]
    return {**hub, "turns": turns} if any(new is not old for new, old in zip(turns, hub["turns"])) else hub


def _recall_turn(turn: Json, memo: Memo) -> Json:
    kept = {part["id"]: found for part in turn["parts"] if part["type"] == "call" and (found := memo.get(part["id"]))}
    if not kept:
        return turn
    parts = [{**part, "note": kept[part["id"]]["note"]} if part["type"] == "call" and "note" not in part and "note" in kept.get(part["id"], {}) else part for part in turn["parts"]]
    lost = not any(part["type"] == "think" and (part["text"] or (part.get("seal") or {}).get("data")) for part in parts)
    thinking = next((found["think"] for found in kept.values() if "think" in found), [])
    return {**turn, "parts": [*thinking, *parts] if lost else parts}


# ---- Turns: pairing and order

_NO_RESULT = "No result was recorded for this tool call."


def mend(turns: Sequence[Json], profile: Profile = Profile()) -> list[Json]:
    """Turns that every format takes: roles alternate, each call is answered once and directly, each result has its call, ids are unique.

    Orphan results become user text, unanswered calls get an error result; nothing else is invented or lost.  Stable under repetition.
    """
    merged = _merge_turns(_without_blanks(turns))
    merged = _named_calls(merged)
    answers, orphans = _pair(merged)
    rebuilt: list[Json] = []
    owed: list[Json] = []
    number = 0
    for turn_index, turn in enumerate(merged):
        if turn["role"] == "assistant":
            _settle(rebuilt, owed)
            calls = [part for part in turn["parts"] if part["type"] == "call"]
            owed = [answers.get(number + offset) or result_part(call["id"], [text_part(_NO_RESULT)], error=True, kind=call["kind"]) for offset, call in enumerate(calls)]
            number += len(calls)
            rebuilt.append({**turn, "parts": _calls_last(turn["parts"], profile)})
            continue
        parts: list[Json] = []
        for part_index, part in enumerate(turn["parts"]):
            if part["type"] != "result":
                parts.append(part)
            elif (turn_index, part_index) in orphans:
                parts.extend(_orphan_parts(part))
        if turn["role"] == "user":
            rebuilt.append({**turn, "parts": [*owed, *parts]})
            owed = []
        else:
            _settle(rebuilt, owed)
            owed = []
            rebuilt.append({**turn, "parts": parts})
    _settle(rebuilt, owed)
    return _trimmed_end(_merge_turns(rebuilt))


def _settle(turns: list[Json], owed: list[Json]) -> None:
    """Answers whose own user turn is not there get one."""
    if owed:
        turns.append({"role": "user", "parts": list(owed)})


def _without_blanks(turns: Sequence[Json]) -> list[Json]:
    return [{**turn, "parts": [part for part in turn["parts"] if part["type"] != "text" or not is_blank(part["text"])]} for turn in turns]


def _merge_turns(turns: Sequence[Json]) -> list[Json]:
    """Neighbours of one role made one, turns without parts left out."""
    merged: list[Json] = []
    for turn in turns:
        if turn["parts"] and merged and merged[-1]["role"] == turn["role"]:
            merged[-1] = {**merged[-1], "parts": [*merged[-1]["parts"], *turn["parts"]]}
        elif turn["parts"]:
            merged.append(turn)
    return merged


def _named_calls(turns: list[Json]) -> list[Json]:
    """Empty ids of calls filled from their place in the conversation, and those of the results that answer them in turn."""
    filled: list[Json] = []
    unnamed: deque[str] = deque()
    for number, turn in enumerate(turns):
        parts = []
        for position, part in enumerate(turn["parts"]):
            if part["type"] == "call" and empty_id(part["id"]):
                part = {**part, "id": mint("call_", f"turn {number}", position)}
                unnamed.append(part["id"])
            elif part["type"] == "result" and empty_id(part["id"]) and unnamed:
                part = {**part, "id": unnamed.popleft()}
            parts.append(part)
        filled.append({**turn, "parts": parts})
    return filled


def _pair(turns: list[Json]) -> tuple[dict[int, Json], set[tuple[int, int]]]:
    """Results by the number of the call they answer, and the places of results that answer none; repeated call ids are told apart in `turns`."""
    answers: dict[int, Json] = {}
    orphans: set[tuple[int, int]] = set()
    calls_by_id: dict[str, list[tuple[int, str]]] = {}
    taken: set[str] = {part["id"] for turn in turns for part in turn["parts"] if part["type"] == "call"}
    number = 0
    for turn_index, turn in enumerate(turns):
        for part_index, part in enumerate(turn["parts"]):
            if part["type"] == "call":
                known = calls_by_id.setdefault(part["id"], [])
                new_id = _next_id(part["id"], taken) if known else part["id"]
                known.append((number, new_id))
                taken.add(new_id)
                turn["parts"][part_index] = {**part, "id": new_id}
                number += 1
            elif part["type"] == "result":
                known = calls_by_id.get(part["id"], [])
                call = next((call for call in reversed(known) if call[0] not in answers), known[-1] if known else None)
                if call is None or empty_id(part["id"]):
                    orphans.add((turn_index, part_index))
                else:
                    answers[call[0]] = {**part, "id": call[1]}
    return answers, orphans


def _next_id(call_id: str, taken: Collection[str]) -> str:
    number = 2
    while f"{call_id}_{number}" in taken:
        number += 1
    return f"{call_id}_{number}"


def _orphan_parts(result: Json) -> list[Json]:
    """What is left of a result without a call: its text, its images."""
    texts = [part["text"] for part in result["parts"] if part["type"] == "text"]
    name = "" if empty_id(result["id"]) else f" {result['id']}"
    return [text_part(f"[tool result{name}]\n" + "\n".join(texts)), *(part for part in result["parts"] if part["type"] in ("image", "file"))]


def _is_native(part: Json, profile: Profile) -> bool:
    """Whether the target itself made this part, so that its place is to be kept."""
    return part["type"] == "opaque" and part["family"] == profile.family or part["type"] == "think" and (part.get("seal") or {}).get("family") == profile.family


def _calls_last(parts: list[Json], profile: Profile) -> list[Json]:
    """Calls behind everything else, unless the target's own blocks are among them."""
    if profile.format == "messages" and any(_is_native(part, profile) for part in parts):
        return parts
    return [part for part in parts if part["type"] != "call"] + [part for part in parts if part["type"] == "call"]


def _trimmed_end(turns: list[Json]) -> list[Json]:
    """A last assistant turn without white space at the end of its text."""
    if not turns or turns[-1]["role"] != "assistant" or turns[-1]["parts"][-1]["type"] != "text":
        return turns
    last = turns[-1]["parts"][-1]
    return [*turns[:-1], {**turns[-1], "parts": [*turns[-1]["parts"][:-1], {**last, "text": last["text"].rstrip()}]}]


# ---- System text

def late_system(turns: Sequence[Json], profile: Profile, client: str) -> list[Json]:
    """System turns in the middle as the target takes them: kept, or user text inside <system-reminder>, always in their place."""
    if profile.late_system == "keep" and (profile.format != "messages" or client == "messages"):
        return list(turns)
    wrapped = []
    for turn in turns:
        if turn["role"] == "system":
            text = "\n\n".join(part["text"] for part in turn["parts"] if part["type"] == "text")
            turn = {"role": "user", "parts": [] if is_blank(text) else [text_part(f"<system-reminder>\n{text}\n</system-reminder>")]}
        wrapped.append(turn)
    return wrapped


def system_parts(parts: Sequence[Json], profile: Profile) -> list[Json]:
    """System text without blanks and, for all but Anthropic, without Claude Code's billing block, which changes with every request."""
    billing = profile.family == "anthropic" and profile.vendor
    return [part for part in parts if not is_blank(part["text"]) and (billing or not part["text"].startswith("x-anthropic-billing-header:"))]


def system_text(hub: Json) -> str:
    """All system text in one string."""
    return "\n\n".join(part["text"] for part in hub.get("system", ()))


def _apply_tool_changes(ready: Json, profile: Profile) -> None:
    """Tools that a system turn adds or removes, where the target has no such turns."""
    if not any(part["type"] == "tool_change" for turn in ready["turns"] for part in turn["parts"]):
        return
    if profile.family == "anthropic" and profile.vendor and ready["client"] == profile.format == "messages":
        return
    tools = list(ready.get("tools", ()))
    for turn in ready["turns"]:
        for part in turn["parts"]:
            if part["type"] == "tool_change":
                removed = set(part.get("remove", ()))
                tools = [tool for tool in tools if tool["name"] not in removed] + list(part.get("add", ()))
    ready["turns"] = [{**turn, "parts": [part for part in turn["parts"] if part["type"] != "tool_change"]} for turn in ready["turns"]]
    ready["tools"] = tools
    drop(ready, "mid_conv_tools")


# ---- Parts that a target does not take

def unsupported(message: str) -> UpstreamFailure:
    """This route cannot serve the request; when none can, the client gets 400 with `message`."""
    return UpstreamFailure("fit", "unsupported", message, 400, "translate")


def document_text(part: Json) -> str:
    """A text document inside a message."""
    title = f' title="{part["title"]}"' if part.get("title") else ""
    context = f"{part['context']}\n" if part.get("context") else ""
    return f"<document{title}>\n{context}{part['text']}\n</document>"


def _opaque_parts(part: Json) -> list[Json]:
    """What other families may read of a block: its readable rendering, or the image it holds."""
    if part.get("image"):
        return [part["image"]]
    return [text_part(part["text"])] if not is_blank(part.get("text", "")) else []


_MESSAGES_IMAGES = ("image/jpeg", "image/png", "image/gif", "image/webp")


def shows_image(hub: Json) -> bool:
    """Whether the last turn holds an image, also as a tool's result."""
    parts = hub["turns"][-1]["parts"] if hub["turns"] else []
    return any(inner["type"] == "image" for part in parts for inner in (part, *part.get("parts", ())))


def _fit_image(part: Json, hub: Json, profile: Profile) -> Json:
    if not profile.images:
        drop(hub, "image")
        return text_part("[image omitted]")
    if "file_id" in part and not (profile.vendor and hub["client"] == profile.format != "chat"):
        raise unsupported("image file ids cannot be sent to this provider")
    if part.get("mime") == "image/jpg":
        part = {**part, "mime": "image/jpeg"}
    if profile.format == "messages" and "data" in part and part["mime"] not in _MESSAGES_IMAGES:
        raise unsupported(f"image type {part['mime']} is not supported")
    if "detail" in part and profile.format != "responses":
        detail = None if profile.format == "messages" else "high" if part["detail"] == "original" else part["detail"]
        part = {name: value for name, value in part.items() if name != "detail"} | ({"detail": detail} if detail else {})
    return part


def _fit_file(part: Json, hub: Json, profile: Profile) -> Json:
    cache = part.get("cache")
    if "data" in part and part.get("mime", "").startswith("text/"):
        with contextlib.suppress(ValueError):
            part = {name: value for name, value in part.items() if name not in ("data", "mime")} | {"text": base64.b64decode(part["data"]).decode("utf-8", "replace")}
    if "file_id" in part and not (profile.vendor and hub["client"] == profile.format):
        raise unsupported("file ids cannot be sent to this provider")
    if "text" in part and profile.format != "messages":
        return text_part(document_text(part), cache)
    if "url" in part and not profile.file_url:
        raise unsupported("file URLs cannot be sent to this provider")
    return part


def _fit_media(part: Json, hub: Json, profile: Profile) -> Json:
    if profile.format != "chat" or part["type"] == "video" and hub["client"] != "chat":
        raise unsupported(f"{part['type']} input is not supported by this provider")
    return part


_PART_RULES: Mapping[str, Callable[[Json, Json, Profile], Json]] = {"image": _fit_image, "file": _fit_file, "audio": _fit_media, "video": _fit_media}


def _fit_part(part: Json, hub: Json, profile: Profile) -> list[Json]:
    """A part as the target takes it, and what it became instead."""
    kind = part["type"]
    if kind == "opaque":
        return [part] if part["family"] == profile.family and part.get("format", profile.format) == profile.format else _opaque_parts(part)
    if kind == "result":
        return [{**part, "parts": [fitted for inner in part["parts"] for fitted in _fit_part(inner, hub, profile)]}]
    if kind == "refusal" and profile.format == "messages":
        return [text_part(part["text"])]
    return [_PART_RULES[kind](part, hub, profile)] if kind in _PART_RULES else [part]


def _fit_result(result: Json, images: list[Json], profile: Profile) -> Json:
    """A result for Chat and Responses: errors marked in the text; for Chat images moved to `images`, numbered."""
    parts = list(result["parts"])
    if profile.format == "chat" and not profile.tool_images:
        for index, part in enumerate(parts):
            if part["type"] in ("image", "file"):
                images.append(part)
                parts[index] = text_part(f"[image {sum(kept['type'] != 'text' for kept in images)}]")
                images.insert(len(images) - 1, parts[index])
    if result.get("error"):
        first = next((index for index, part in enumerate(parts) if part["type"] == "text"), None)
        if first is None:
            parts.insert(0, text_part("[tool error] "))
        else:
            parts[first] = {**parts[first], "text": "[tool error] " + parts[first]["text"]}
    return {name: value for name, value in result.items() if name != "error"} | {"parts": parts}


def _fit_results(turns: list[Json], profile: Profile) -> list[Json]:
    """User turns whose results hold only what their target's tool results can; images follow the last result."""
    fitted = []
    for turn in turns:
        images: list[Json] = []
        parts = [_fit_result(part, images, profile) if part["type"] == "result" else part for part in turn["parts"]]
        if images:
            behind = sum(part["type"] == "result" for part in parts)
            parts[behind:behind] = [text_part("Images returned by tools:"), *images]
        fitted.append({**turn, "parts": parts})
    return fitted


# ---- Thinking on its way back to a provider

def _replay_native(part: Json, profile: Profile) -> Json | None:
    seal = part.get("seal") or {}
    own = seal.get("family") == profile.family and seal.get("data") and seal.get("field") != "reasoning_details"
    return part if own else None


def _replay_thinking(part: Json, profile: Profile) -> Json | None:
    native = _replay_native(part, profile)
    return native or ({"type": "think", "text": part["text"]} if part["text"] and profile.must_replay else None)


def _replay_text(part: Json, profile: Profile) -> Json | None:
    text = part["text"] or (part.get("seal") or {}).get("text", "")
    return {"type": "think", "text": text} if text else None


def _replay_tag(part: Json, profile: Profile) -> Json | None:
    replayed = _replay_text(part, profile)
    return text_part(f"<think>{replayed['text']}</think>") if replayed else None


def _replay_details(part: Json, profile: Profile) -> Json | None:
    if "details" in part:
        return part
    details = _details_for(part, profile.model)
    return {"type": "think", "text": part["text"], "details": details} if details else None


_REPLAYS: Mapping[str, Callable[[Json, Profile], Json | None]] = {
    "native": _replay_native, "thinking": _replay_thinking, "reasoning_content": _replay_text, "reasoning": _replay_text, "reasoning_details": _replay_details,
    "think_tag": _replay_tag, "": lambda part, profile: None,
}


def replay_thinking(turns: Sequence[Json], profile: Profile) -> list[Json]:
    """Turns with the thinking that the target wants back, in the form it wants; text forms only since the last words of the user."""
    since = next((index for index in range(len(turns) - 1, -1, -1) if turns[index]["role"] == "user" and any(part["type"] != "result" for part in turns[index]["parts"])), -1)
    always = profile.replay in ("native", "reasoning_details", "thinking")
    replayed = []
    for index, turn in enumerate(turns):
        parts = []
        for part in turn["parts"]:
            kept = part if part["type"] != "think" else _REPLAYS[profile.replay](part, profile) if always or index > since else None
            if kept is not None:
                parts.append(kept)
        replayed.append({**turn, "parts": parts})
    return replayed


def _without_bare_thinking(turns: Sequence[Json], profile: Profile) -> list[Json]:
    """Turns without thinking that led to nothing: one that holds nothing else, and for Responses what stands last in its turn."""
    kept = []
    for turn in turns:
        parts = turn["parts"]
        while profile.format == "responses" and parts and parts[-1]["type"] == "think":
            parts = parts[:-1]
        kept.append({**turn, "parts": parts if any(part["type"] != "think" for part in parts) else []})
    return kept


def _lost_thinking(turns: Sequence[Json]) -> bool:
    """Whether a tool turn of the current loop came back without its thinking."""
    for turn in reversed(turns):
        kinds = {part["type"] for part in turn["parts"]}
        if turn["role"] == "user" and kinds - {"result"}:
            return False
        if turn["role"] == "assistant" and "call" in kinds and "think" not in kinds:
            return True
    return False


def _fit_notes(turns: Sequence[Json], profile: Profile) -> list[Json]:
    """Calls with the notes of the target's own family as bare data; a step's first call gets the stand-in for a lost one."""
    fitted = []
    for turn in turns:
        parts = []
        first = True
        for part in turn["parts"]:
            if part["type"] == "call":
                note = part.get("note") or {}
                data = note.get("data") if note.get("family") == profile.family else None
                part = {name: value for name, value in part.items() if name != "note"}
                if data is None and first and profile.note_dummy:
                    data = {"google": {"thought_signature": profile.note_dummy}}
                if data is not None:
                    part["note"] = {"family": profile.family, "data": data}
                first = False
            parts.append(part)
        fitted.append({**turn, "parts": parts})
    return fitted


# ---- Tools: names, schemas, choice

_OBJECT: Json = {"type": "object", "properties": {}}
_TEXT, _INTEGER = {"type": "string"}, {"type": "integer"}
_PAIR = {"type": "array", "items": {"type": "integer"}}


def _schema(required: str, **properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": required.split()}


#: Schemas of Anthropic's tools that the client runs and whose schema only their own models know, by the start of their type.
BUILTIN_SCHEMAS: Mapping[str, Json] = {
    "bash_": _schema("", command=_TEXT, restart={"type": "boolean"}),
    "text_editor_": _schema("command path", command=_TEXT, path=_TEXT, view_range=_PAIR, old_str=_TEXT, new_str=_TEXT, insert_line=_INTEGER, insert_text=_TEXT, file_text=_TEXT),
    "memory_": _schema("command", command=_TEXT, path=_TEXT, view_range=_PAIR, old_str=_TEXT, new_str=_TEXT, insert_line=_INTEGER, insert_text=_TEXT, file_text=_TEXT,
                       old_path=_TEXT, new_path=_TEXT),
    "computer_": _schema("action", action=_TEXT, coordinate=_PAIR, start_coordinate=_PAIR, text=_TEXT, duration={"type": "number"}, scroll_direction=_TEXT, scroll_amount=_INTEGER),
}
#: The parameters of a freeform tool where only functions exist.
FREEFORM_SCHEMA: Json = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"], "additionalProperties": False}


def flat_name(name: str, namespace: str = "") -> str:
    """One name for a tool of a namespace; `functions` is the default one and adds nothing."""
    if not namespace or namespace == "functions":
        return name
    return namespace + name if namespace.endswith("__") else f"{namespace}__{name}"


def fit_name(name: str) -> str:
    """A tool name of at most 64 letters, digits, _ and -."""
    clean = re.sub(r"[^a-zA-Z0-9_-]", "_", name) or "_"
    return clean if len(clean) <= 64 else f"{clean[:55]}_{_hex(name, 8)}"


class Names:
    """Tool names on the wire and back, for one request and target.  Worked out from the request alone, so both ways always agree."""

    __slots__ = ("_back", "_namespaces")

    def __init__(self, tools: Sequence[Json], namespaces: bool) -> None:
        self._namespaces = namespaces
        self._back: dict[str, tuple[str, str, str]] = {}
        for tool in tools:
            kind = "custom" if tool["kind"] == "custom" else tool.get("calls", "function")
            self._back.setdefault(self.wire(tool["name"], tool.get("namespace", "")), (tool["name"], tool.get("namespace", ""), kind))

    def wire(self, name: str, namespace: str = "") -> str:
        """The name a provider sees."""
        return fit_name(name if self._namespaces else flat_name(name, namespace))

    def back(self, wire: str) -> tuple[str, str, str]:
        """(name, namespace, kind of call) as the client knows them; kind is "" for a tool it never named."""
        return self._back.get(wire, (wire, "", ""))


EMPTY_NAMES = Names((), False)


def name_map(hub: Json, profile: Profile) -> Names:
    """The names of the client's tools on this target's wire."""
    return Names(hub.get("tools", ()), profile.namespaces)


def merge_tools(hub: Json, tools: Iterable[Json]) -> None:
    """More tools for the request; of two with one name the first stays.  For readers."""
    known = {(tool.get("namespace", ""), tool["name"]) for tool in hub.get("tools", ())}
    for tool in tools:
        key = (tool.get("namespace", ""), tool["name"])
        if key not in known:
            known.add(key)
            hub.setdefault("tools", []).append(tool)


def clean_schema(schema: Any, profile: Profile) -> Json:
    """Parameters as the target takes them, in the order they came."""
    if not isinstance(schema, dict) or not schema:
        return dict(_OBJECT)
    if "type" not in schema:
        schema = {"type": "object", **schema}
    if not profile.vendor and "$schema" in schema:
        schema = {name: value for name, value in schema.items() if name != "$schema"}
    if schema.get("type") == "object" and "properties" not in schema and not any(word in schema for word in ("anyOf", "oneOf", "allOf", "$ref")):
        schema = {**schema, "properties": {}}
    return gemini_schema(schema) if profile.tool_schema == "gemini" else schema


def closed_schema(schema: Any) -> Any:
    """`schema` with additionalProperties false on every object that does not say."""
    if isinstance(schema, list):
        return [closed_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: {key: closed_schema(item) for key, item in value.items()} if name in ("properties", "$defs", "definitions") and isinstance(value, dict)
              else closed_schema(value) if name in ("items", "anyOf", "oneOf", "allOf", "prefixItems", "not") else value for name, value in schema.items()}
    if (schema.get("type") == "object" or "properties" in schema) and "additionalProperties" not in schema:
        closed["additionalProperties"] = False
    return closed


_GEMINI_KEPT = ("type", "title", "description", "properties", "required", "items", "enum", "format", "nullable", "minimum", "maximum", "minItems", "maxItems", "minLength", "maxLength",
                "pattern", "anyOf")
_GEMINI_FORMATS: Mapping[str, tuple[str, ...]] = {"string": ("enum", "date-time"), "integer": ("int32", "int64"), "number": ("float", "double")}


#: What the keywords of a schema that are looked into must be.
_KEYWORDS: Mapping[str, tuple[type, ...]] = {"properties": (dict,), "$defs": (dict,), "definitions": (dict,), "description": (str,), "type": (str, list), "format": (str,), "required": (list,),
                                             "enum": (list,), "anyOf": (list,), "oneOf": (list,), "allOf": (list,)}


def sound_schema(node: Json) -> Json:
    """One node of a schema without keywords that hold what they cannot."""
    sound = {name: value for name, value in node.items() if name not in _KEYWORDS or isinstance(value, _KEYWORDS[name])}
    for name in ("type", "required"):
        if isinstance(sound.get(name), list):
            sound[name] = [word for word in sound[name] if isinstance(word, str)]
    return sound


def gemini_schema(schema: Json) -> Json:
    """The part of a schema that Gemini's function declarations understand, references inlined; a new object, stable under repetition."""
    definitions = {f"#/{place}/{name}": value for place in ("$defs", "definitions") for name, value in sound_schema(schema).get(place, {}).items()}
    return _gemini_node(schema, definitions, ())


def _gemini_node(node: Any, definitions: Json, path: tuple[str, ...]) -> Json:
    if not isinstance(node, dict):
        return {"type": "string"} if node is True or node is None else dict(_OBJECT)
    node, path = _gemini_plain(node, definitions, path)
    kept: Json = {}
    for name in [name for name in node if name in _GEMINI_KEPT]:
        value = node[name]
        if name == "properties" and isinstance(value, dict):
            value = {key: _gemini_node(item, definitions, path) for key, item in value.items()}
        elif name == "items":
            value = _gemini_node(value, definitions, path)
        elif name == "anyOf":
            value = [_gemini_node(item, definitions, path) for item in value]
        kept[name] = value
    return _gemini_checked(kept)


def _gemini_plain(node: Json, definitions: Json, path: tuple[str, ...]) -> tuple[Json, tuple[str, ...]]:
    """One node with references inlined, `allOf` united and the only member of an `anyOf` put in its place, and the references on the way."""
    node = sound_schema(node)
    while True:
        if isinstance(node.get("$ref"), str):
            target = node.pop("$ref")
            known = target in definitions and target not in path and len(path) < 16 and isinstance(definitions[target], dict)
            node, path = {**(sound_schema(definitions[target]) if known else _OBJECT), **node}, (*path, target)
        elif isinstance(node.get("allOf"), list):
            for member in node.pop("allOf"):
                if isinstance(member, dict):
                    member, path = _gemini_plain(member, definitions, path)
                    node = _gemini_united(node, member)
        elif isinstance(node.get("oneOf"), list):
            node["anyOf"] = [*(node.get("anyOf") or ()), *node.pop("oneOf")]
        elif isinstance(node.get("anyOf"), list) and any(isinstance(member, dict) and member.get("type") == "null" for member in node["anyOf"]):
            node["anyOf"] = [member for member in node["anyOf"] if not (isinstance(member, dict) and member.get("type") == "null")]
            node["nullable"] = True
        elif isinstance(node.get("anyOf"), list) and len(node["anyOf"]) == 1 and isinstance(node["anyOf"][0], dict):
            member = node.pop("anyOf")[0]
            node = {**member, **node}
        elif isinstance(node.get("type"), list):
            node = _gemini_typed(node)
        else:
            break
    if not isinstance(node.get("anyOf"), list) or not node["anyOf"]:
        node.pop("anyOf", None)
    return _gemini_words(node), path


def _gemini_united(node: Json, member: Json) -> Json:
    """`node` with what one member of its allOf adds: properties and required of both, the rest where `node` has none."""
    united = {**member, **node}
    for name in ("properties", "required"):
        if name in node and name in member:
            united[name] = {**member[name], **node[name]} if name == "properties" else list(dict.fromkeys([*node[name], *member[name]]))
    return united


def _gemini_typed(node: Json) -> Json:
    """One type per node: null becomes nullable, several become anyOf."""
    types = [name for name in node["type"] if name != "null"]
    nullable = {"nullable": True} if len(types) < len(node["type"]) else {}
    if len(types) < 2:
        return {**node, "type": types[0] if types else "string", **nullable}
    rest = {name: value for name, value in node.items() if name != "type"}
    return {"anyOf": [{"type": name} for name in types], **rest, **nullable}


def _gemini_words(node: Json) -> Json:
    """Bounds, constants and tuples in the words that are known."""
    for old, new in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(node.get(old), (int, float)) and not isinstance(node[old], bool):
            node.setdefault(new, node[old])
    if "const" in node:
        constant = node.pop("const")
        if isinstance(constant, str):
            node["enum"] = [constant]
        else:
            node["description"] = " ".join(filter(None, (node.get("description"), f"Always {compact(constant)}.")))
    if isinstance(node.get("prefixItems"), list) and node["prefixItems"] and "items" not in node:
        node["items"] = node["prefixItems"][0]
    if isinstance(node.get("items"), list):
        node["items"] = node["items"][0] if node["items"] else {"type": "string"}
    return node


def _gemini_checked(node: Json) -> Json:
    """Keywords only where they belong, and what an array or object must have."""
    kind = node.get("type")
    if "format" in node and node["format"] not in _GEMINI_FORMATS.get(kind or "", ()):
        del node["format"]
    if "enum" in node:
        if kind in ("integer", "number", "boolean"):
            del node["enum"]
        else:
            node["enum"] = [value if isinstance(value, str) else compact(value) for value in node["enum"]]
            node["type"] = "string"
            kind = "string"
    if kind == "array":
        node.setdefault("items", {"type": "string"})
    else:
        node.pop("items", None)
    if kind == "object":
        node.setdefault("properties", {})
    if "required" in node:
        node["required"] = [name for name in node["required"] if name in node.get("properties", {})]
        if not node["required"]:
            del node["required"]
    return node


def _freeform_function(tool: Json) -> Json:
    """A freeform tool where only functions exist."""
    lines = [tool.get("description", ""), 'The whole text goes in "input".']
    if tool.get("grammar"):
        lines += [f"It must match this {tool['grammar'].get('syntax', '')} grammar:", tool["grammar"].get("definition", "")]
    return {"name": tool["name"], "description": "\n".join(filter(None, lines)), "schema": dict(FREEFORM_SCHEMA), "kind": "function",
            **({"namespace": tool["namespace"]} if tool.get("namespace") else {})}


def _web_search(tool: Json, profile: Profile) -> Json | None:
    """A vendor's web search in the words of the other vendor."""
    raw = tool.get("raw") or {}
    if not str(raw.get("type", "")).startswith("web_search") or not (profile.hosted and profile.vendor):
        return None
    place = {"user_location": raw["user_location"]} if raw.get("user_location") else {}
    if profile.format == "responses":
        filters = {"filters": {"allowed_domains": raw["allowed_domains"]}} if raw.get("allowed_domains") else {}
        return {**tool, "family": "openai", "raw": {"type": "web_search", **filters, **place}}
    if profile.format == "messages":
        domains = (raw.get("filters") or {}).get("allowed_domains")
        return {**tool, "name": "web_search", "family": "anthropic",
                "raw": {"type": "web_search_20250305", "name": "web_search", **({"allowed_domains": domains} if domains else {}), **place}}
    return None


def _fit_hosted(tool: Json, profile: Profile) -> Json | None:
    """A tool of a vendor's own kind: as it is for that vendor, as a function when the client runs it, else None."""
    raw = tool.get("raw") or {}
    home = "messages" if tool.get("family") == "anthropic" else "responses"
    if profile.hosted and tool.get("family") == profile.family and home == profile.format:
        return tool
    builtin = next((schema for start, schema in BUILTIN_SCHEMAS.items() if str(raw.get("type", "")).startswith(start)), None) if home == "messages" else None
    if builtin:
        return {"name": tool["name"], "description": tool.get("description") or f"The {tool['name']} tool of the client.", "schema": builtin, "kind": "function"}
    return _web_search(tool, profile)


def _fit_tool(tool: Json, profile: Profile, own: bool) -> Json | None:
    if tool["kind"] == "hosted":
        return _fit_hosted(tool, profile)
    if tool["kind"] == "custom" and not profile.custom_tools:
        tool = _freeform_function(tool)
    if tool["kind"] == "function":
        tool = {**tool, "schema": clean_schema(tool.get("schema"), profile)}
    kept = {name: value for name, value in tool.items() if name not in ("defer", "raw") or own}
    return kept if profile.cache_control else {name: value for name, value in kept.items() if name != "cache"}


def _fit_tools(ready: Json, profile: Profile, names: Names) -> None:
    """`ready["tools"]` as the target takes them, each with its wire name; what it cannot take is dropped."""
    own = profile.vendor and ready["client"] == profile.format
    fitted: list[Json] = []
    taken: set[str] = set()
    for tool in ready.pop("tools", ()):
        if "wire" in tool:
            fitted.append(tool)
            continue
        kept = _fit_tool(tool, profile, own)
        if kept is None:
            drop(ready, f"tools.{tool['name']}")
            continue
        wire = names.wire(kept["name"], kept.get("namespace", "")) if kept["kind"] != "hosted" else kept["name"]
        if wire not in taken:
            taken.add(wire)
            fitted.append({**kept, "wire": wire})
    if profile.one_strict and len({tool.get("strict", False) for tool in fitted}) > 1:
        fitted = [{name: value for name, value in tool.items() if name != "strict"} for tool in fitted]
    if fitted:
        ready["tools"] = fitted


def _stub_tools(ready: Json, names: Names) -> None:
    """Anthropic wants tools wherever the history has calls: one stub per name, not to be called."""
    called = dict.fromkeys(part["name"] for turn in ready["turns"] for part in turn["parts"] if part["type"] == "call")
    if called:
        ready["tools"] = [{"name": name, "schema": dict(_OBJECT), "kind": "function", "wire": name} for name in called]
        ready["choice"] = {"mode": "none"}


def _fit_call(part: Json, names: Names, profile: Profile) -> Json:
    """A call or result of the history under its wire name, id and kind."""
    call_id = fit_id(strip_own_id(part["id"]) if profile.own_ids else part["id"], profile.call_id)
    own = profile.custom_tools if part["kind"] == "custom" else profile.format == "responses" and profile.vendor
    kind = part["kind"] if own else "function"
    fitted = {**part, "id": call_id, "kind": kind}
    if part["type"] == "call":
        fitted["name"] = names.wire(part["name"], part.get("namespace", ""))
        if not profile.namespaces:
            fitted.pop("namespace", None)
    return fitted


def _fit_calls(turns: Sequence[Json], names: Names, profile: Profile) -> list[Json]:
    fitted = [{**turn, "parts": [_fit_call(part, names, profile) if part["type"] in ("call", "result") else part for part in turn["parts"]]} for turn in turns]
    ids = [part["id"] for turn in fitted for part in turn["parts"] if part["type"] == "call"]
    return mend(fitted, profile) if len(set(ids)) < len(ids) else fitted


def _fit_choice(ready: Json, profile: Profile, names: Names) -> None:
    """`choice` and `parallel` in a form the target has; a forced tool that is not there is a reason to go elsewhere."""
    choice = ready.get("choice")
    tools = ready.get("tools", [])
    if choice and choice.get("mode") == "tool":
        wire = names.wire(choice.get("name", ""), choice.get("namespace", ""))
        wire = next((tool["wire"] for tool in tools if tool["wire"] in (wire, choice.get("name"))), None)
        if wire is None:
            raise unsupported(f'the forced tool "{choice.get("name", "")}" cannot be offered by this provider')
        choice = {**choice, "name": wire}
        if choice.get("kind") == "custom" and ("custom" not in profile.choices or not profile.custom_tools):
            choice.pop("kind")
    if not tools:
        ready.pop("choice", None)
        ready.pop("parallel", None)
        return
    if choice and "allowed" in choice:
        allowed = [names.wire(name) for name in choice["allowed"]]
        if "allowed" in profile.choices:
            choice = {**choice, "allowed": allowed}
        else:
            ready["tools"] = [tool for tool in tools if tool["wire"] in allowed] or tools
            choice = {name: value for name, value in choice.items() if name != "allowed"}
    word = {"any": "required"}.get(choice["mode"], choice["mode"]) if choice else ""
    if choice and word not in profile.choices:
        if word in ("required", "tool"):
            drop(ready, "tool_choice")
        choice = {"mode": "auto"} if "auto" in profile.choices and word != "none" else None
    if choice:
        ready["choice"] = choice
    else:
        ready.pop("choice", None)
    if ready.get("parallel") is not False or (choice or {}).get("mode") == "none":
        ready.pop("parallel", None)


# ---- Limits, effort, sampling, output format

EFFORTS: tuple[str, ...] = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_BUDGETS: Mapping[str, int] = {"none": 0, "minimal": 1024, "low": 2048, "medium": 8192, "high": 24576, "xhigh": 32768, "max": 65536}


def effort_of(budget: int) -> str:
    """The effort word for a thinking budget."""
    return "low" if budget <= 2048 else "medium" if budget <= 8192 else "high" if budget <= 24576 else "xhigh"


def budget_of(effort: str) -> int:
    """The thinking budget for an effort word; an unknown one counts as medium."""
    return _BUDGETS.get(effort, _BUDGETS["medium"])


def fit_effort(effort: str, allowed: Sequence[str] | None) -> str | None:
    """The nearest word the model has: downward, and only when there is none lower upward; None to leave it out."""
    if allowed is None or effort in allowed:
        return effort
    rank = EFFORTS.index(effort) if effort in EFFORTS else EFFORTS.index("medium")
    lower = [word for word in EFFORTS[:rank] if word in allowed and word != "none"]
    higher = [word for word in EFFORTS[rank:] if word in allowed]
    return lower[-1] if lower else higher[0] if higher and effort != "none" else None


def _fit_think(ready: Json, profile: Profile) -> None:
    """`ready["think"]` in the target's terms: Messages form, budget, effort, display; others mode, effort, show."""
    think = dict(ready.pop("think", None) or {})
    if think.get("effort") not in (None, *EFFORTS):     # a word of one provider, such as Groq's default
        think.pop("effort")
        drop(ready, "reasoning_effort")
    if not think:
        return
    if profile.format == "messages":
        think = _fit_claude(think, ready, profile)
    else:
        mode = think.get("mode")
        if mode == "off":
            effort = "none" if profile.effort and "none" in profile.effort else None
            if profile.format == "responses" and profile.effort and effort is None:
                effort = next(word for word in EFFORTS if word in profile.effort)
        else:
            wanted = think.get("effort") or (effort_of(think["budget"]) if mode == "on" and think.get("budget") else None)
            effort = fit_effort(wanted, profile.effort) if wanted else None
        think = {name: think[name] for name in ("mode", "show") if think.get(name)} | ({"effort": effort} if effort else {})
    if think:
        ready["think"] = think


_SUMMARY_SHOWN = {"auto": "summarized", "concise": "summarized", "detailed": "summarized", "summarized": "summarized", "omitted": "omitted"}


def _fit_claude(think: Json, ready: Json, profile: Profile) -> Json:
    """{"form", "budget"?, "effort"?, "display"?} for a model that speaks Messages."""
    mode, effort, max_out = think.get("mode"), think.get("effort"), ready["max_out"]
    fitted = fit_effort(effort, profile.effort) if effort and effort != "none" else None
    result: Json = {"effort": fitted} if fitted else {}
    if mode == "off" or effort == "none":
        return {**({"form": "disabled"} if profile.thinking else {}), **(result if profile.vendor else {})}
    if mode is None or not profile.thinking:
        return result
    if "adaptive" in profile.thinking and ("enabled" not in profile.thinking or not think.get("budget")):
        if think.get("budget") and not fitted and profile.effort != () and (guessed := fit_effort(effort_of(think["budget"]), profile.effort)):
            result["effort"] = guessed
        result["form"] = "adaptive"
    elif mode == "auto" and not effort and not think.get("budget") and ready["client"] != "messages":
        return result
    else:
        budget = min(think.get("budget") or budget_of(effort or "medium"), max_out - 1)
        if max_out <= 1024:
            return {**result, "form": "disabled"} if profile.vendor else result
        result |= {"form": "enabled", "budget": max(1024, budget)}
        if (ready.get("choice") or {}).get("mode") in ("any", "tool") and profile.forced_choice != "ok":
            drop(ready, "thinking")
            return {name: value for name, value in result.items() if name == "effort"}
    display = _SUMMARY_SHOWN.get(think.get("show") or "")
    if profile.vendor and "adaptive" in profile.thinking and display:
        result["display"] = display
    return result


def think_fields(think: Json | None, profile: Profile) -> Json:
    """The body fields that ask a Chat provider for a prepared hub's thinking."""
    if not think:
        return {}
    mode, effort = think.get("mode"), think.get("effort")
    off = mode == "off"
    if profile.switch == "reasoning":
        inner: Json = {"enabled": False} if off else {"effort": effort} if effort else {"enabled": True} if mode == "on" else {}
        if think.get("show") == "omitted" and inner and not off:
            inner["exclude"] = True
        return {"reasoning": inner} if inner else {}
    fields: Json = {}
    if profile.switch and mode in ("off", "on"):
        fields = {"thinking": {"thinking": {"type": "disabled" if off else "enabled"}}, "enable_thinking": {"enable_thinking": not off},
                  "chat_template_kwargs": {"chat_template_kwargs": {"enable_thinking": not off}}}[profile.switch]
    if effort and not (off and profile.switch):
        fields = {**fields, "reasoning_effort": effort}
    return fields


def _fit_max_out(ready: Json, profile: Profile) -> None:
    limit, asked = profile.max_out_limit, ready.get("max_out")
    if asked is None and profile.format == "messages":
        asked = min(profile.default_max_out, limit or profile.default_max_out)
    if asked is not None and limit and asked > limit:
        if ready["client"] != "messages":
            drop(ready, "max_tokens")
        asked = limit
    if asked is not None:
        ready["max_out"] = max(16, asked) if profile.format == "responses" else asked


def _fit_sampling(ready: Json, profile: Profile) -> None:
    """Sampling values that the target takes; the rest is dropped, by name when it would have made a difference."""
    given = {name: value for name, value in (ready.pop("sampling", None) or {}).items() if value is not None}
    if not given:
        return
    thinking = ready.get("think") or {}
    active = thinking.get("form") in ("enabled", "adaptive") or (profile.format != "messages" and thinking.get("effort") != "none")
    kept = {name: value for name, value in given.items() if _SAMPLING[name](profile)}
    if profile.sampling == "never" or profile.sampling == "idle" and active:
        strict = profile.format == "messages" and profile.sampling == "idle"
        kept = {name: value for name, value in kept.items() if name not in ("temperature", "top_p", "top_k") or strict and name == "top_p" and value >= 0.95}
    if profile.format == "messages":
        if kept.get("temperature", 0) > 1:
            kept["temperature"] = 1
            drop(ready, "temperature")
        if "temperature" in kept and "top_p" in kept:
            del kept["top_p"]
    drop(ready, *(name for name, value in given.items() if name not in kept and value not in (0, {}) or name in _PLAIN and name not in kept))
    if kept:
        ready["sampling"] = kept


_PLAIN = ("temperature", "top_p", "top_k", "seed")
_SAMPLING: Mapping[str, Callable[[Profile], bool]] = {
    "temperature": lambda profile: True,
    "top_p": lambda profile: True,
    "top_k": lambda profile: profile.top_k,
    "min_p": lambda profile: profile.format == "chat" and profile.top_k,
    "repetition_penalty": lambda profile: profile.format == "chat" and profile.top_k,
    "seed": lambda profile: profile.format == "chat",
    "presence_penalty": lambda profile: profile.format == "chat" and profile.penalties,
    "frequency_penalty": lambda profile: profile.format == "chat" and profile.penalties,
    "logit_bias": lambda profile: profile.format == "chat" and "logit_bias" not in profile.reject,
}


def _fit_stop(ready: Json, profile: Profile) -> None:
    stop = ready.pop("stop", None) or []
    if profile.format == "messages":
        stop = [text for text in stop if not is_blank(text)]
    kept = stop if profile.max_stop is None else stop[:profile.max_stop]
    if len(kept) < len(stop):
        drop(ready, "stop")
    if kept:
        ready["stop"] = kept


_JSON_LINE = "Answer with a single JSON object and nothing else."


def _fit_format(ready: Json, profile: Profile) -> None:
    """Structured output in the strongest form the target has; weaker forms are asked for in words."""
    wanted = ready.pop("format", None)
    if not wanted:
        return
    kind, strongest = wanted["kind"], profile.schema if profile.schema_with_tools or "tools" not in ready else "none"
    if kind == "schema" and strongest == "full":
        schema = closed_schema(wanted["schema"]) if profile.format == "messages" and ready["client"] != "messages" else wanted["schema"]
        ready["format"] = {**wanted, "name": wanted.get("name") or "output", "schema": schema}
        return
    line = _JSON_LINE
    if kind == "schema":
        drop(ready, "json_schema")
        line = f"{_JSON_LINE} It must match this JSON schema:\n{compact(wanted['schema'])}"
    elif profile.format == "messages" or strongest == "none":
        drop(ready, "response_format")
    if profile.format != "messages" and strongest != "none":
        ready["format"] = {"kind": "json"}
    spoken = kind == "json" and "format" in ready and "json" in compact([ready.get("system", ()), ready["turns"]]).lower()
    if not spoken and not any(part["text"] == line for part in ready.get("system", ())):
        ready["system"] = [*ready.get("system", ()), text_part(line)]


# ---- Cache marks, user, session, tier, fields of one format only

def last_marks(ready: Json, limit: int = 4) -> None:
    """Only the last `limit` cache marks: Anthropic takes no more, tools and system first in the count."""
    marked = [part for part in _markable(ready) if part.get("cache")]
    spare = {id(part) for part in marked[:max(0, len(marked) - limit)]}
    _map_marks(ready, lambda part: {name: value for name, value in part.items() if name != "cache"} if id(part) in spare else part)


def _markable(ready: Json) -> list[Json]:
    """Everything that may hold a cache mark, in the order in which Anthropic counts them."""
    parts = [inner for turn in ready["turns"] for part in turn["parts"] for inner in (*(part["parts"] if part["type"] == "result" else ()), part)]
    return [*ready.get("tools", ()), *ready.get("system", ()), *parts]


def _map_marks(ready: Json, change: Callable[[Json], Json]) -> None:
    """`change` done to everything that may hold a mark."""
    def inside(part: Json) -> Json:
        inner = {**part, "parts": [change(item) for item in part["parts"]]} if part["type"] == "result" else part
        return {name: value for name, value in inner.items() if name != "cache"} if "cache" in part and "cache" not in change(part) else inner
    for place in ("tools", "system"):
        if place in ready:
            ready[place] = [change(part) for part in ready[place]]
    ready["turns"] = [{**turn, "parts": [inside(part) for part in turn["parts"]]} for turn in ready["turns"]]


def _fit_marks(ready: Json, profile: Profile) -> None:
    if not profile.cache_control:
        if any("cache" in part for part in _markable(ready)):
            _map_marks(ready, lambda part: {name: value for name, value in part.items() if name != "cache"} if "cache" in part else part)
        ready["meta"].pop("cache_auto", None)
        return
    last_marks(ready)
    if profile.format == "messages" and profile.vendor and ready["client"] != "messages":
        ready["meta"].setdefault("cache_auto", {"type": "ephemeral"})
    elif profile.format != "messages":
        ready["meta"].pop("cache_auto", None)


_SESSION = re.compile(r"session_([0-9a-zA-Z-]{8,64})\Z")
_PERSONAL = re.compile(r"@|\A\+?[\d\s().-]{7,}\Z")


def session_of(user_id: Any) -> str | None:
    """The session inside Claude Code's user id, in its old form or its JSON form; None when it is another kind of id."""
    if not isinstance(user_id, str):
        return None
    if user_id.startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            session = json.loads(user_id).get("session_id")
            return session[:64] if isinstance(session, str) and session else None
    match = _SESSION.search(user_id)
    return match.group(1) if match and user_id.startswith("user_") else None


def user_id(user: Any, limit: int = 64) -> str | None:
    """A user id that may be shown to a provider: a personal or long one is hashed, Claude Code's is left out."""
    if not isinstance(user, str) or not user or session_of(user) is not None:
        return None
    return _hex(user, 64) if len(user) > limit or _PERSONAL.search(user) else user


_CLAUDE_TIERS: Mapping[str, str] = {"auto": "auto", "default": "standard_only"}
_OPENAI_TIERS = frozenset({"auto", "default", "flex", "scale", "priority", "fast"})


def _fit_meta(ready: Json, profile: Profile) -> None:
    meta = dict(ready["meta"])
    if (meta.get("n") or 1) > 1 and profile.format != "chat":
        raise unsupported("n > 1 is not supported for this model")
    same = ready["client"] == profile.format or profile.format != "messages" and ready["client"] != "messages"
    own_claude = profile.vendor and ready["client"] == profile.format == "messages"
    session = meta.get("session") or session_of(meta.get("user"))
    meta["user"] = meta.get("user") if own_claude else user_id(meta.get("user"), 128 if profile.preset == "openrouter" else 64)
    key = meta.get("cache_key") or (session if profile.family == "openai" else None)
    meta["cache_key"] = key[:64] if isinstance(key, str) and (profile.cache_key or same and ready["client"] == profile.format) else None
    if not same:
        meta["tier"] = _CLAUDE_TIERS.get(meta.get("tier") or "") if profile.format == "messages" else None
        meta.pop("speed", None)
        meta.pop("metadata", None)
    elif profile.format != "messages" and (not profile.vendor or meta.get("tier") not in _OPENAI_TIERS):
        meta["tier"] = None
    if profile.format == "messages":
        drop(ready, *(name for name in ("verbosity", "logprobs", "top_logprobs") if meta.get(name)))
    elif meta.get("verbosity") and not profile.vendor:
        drop(ready, "verbosity")
    if profile.format == "messages" or not profile.vendor:
        meta.pop("verbosity", None)
    if profile.format == "messages":
        meta = {name: value for name, value in meta.items() if name not in ("logprobs", "top_logprobs", "n")}
    ready["meta"] = {name: value for name, value in meta.items() if value is not None}


#: Fields of one client format that no other needs to hear of.
SILENT_FIELDS = frozenset((
    "stream_options metadata store prediction moderation prompt_cache_key prompt_cache_retention prompt_cache_options output_config service_tier speed context_management betas fallbacks "
    "fallback_credit_token diagnostics max_tool_calls include background client_metadata prompt_cache_breakpoint conversation reasoning citations modalities user "
    "safety_identifier previous_response_id").split())

#: Fields of one client format that only that format can serve, with what the client hears when no route speaks it.
_BOUND: tuple[tuple[str, str, Callable[[Any], bool], str], ...] = (
    ("responses", "background", lambda value: value is True, "background mode is not supported"),
    ("responses", "prompt", bool, "stored prompts are not supported by this provider"),
    ("responses", "conversation", bool, "stored conversations are not supported by this provider"),
    ("chat", "audio", bool, "audio output is not supported for this model"),
    ("chat", "modalities", lambda value: isinstance(value, list) and "audio" in value, "audio output is not supported for this model"),
    ("messages", "container", lambda value: isinstance(value, dict) and bool(value.get("id")), "containers are not supported by this provider"),
)


def _fit_extra(ready: Json, profile: Profile) -> None:
    """Fields with meaning in one format: kept for it, else refused, dropped by name, or dropped in silence."""
    extra = ready.pop("extra", None) or {}
    ready["extra"] = {profile.format: extra[profile.format]} if profile.format in extra else {}
    for client, fields in extra.items():
        if client == profile.format:
            continue
        for bound_client, name, applies, message in _BOUND:
            if bound_client == client and name in fields and applies(fields[name]):
                raise unsupported(message)
        drop(ready, *(name for name, value in fields.items() if value not in (None, False, [], {}, "") and name not in SILENT_FIELDS))
        if fields.get("store") is True and client == "chat":
            drop(ready, "store")


# ---- Edits: payload rules and repairs

class Edits(NamedTuple):
    """What is changed in requests to one model when they are otherwise ready to go; false when nothing is."""
    rules: tuple[PayloadRule, ...] = ()
    repairs: tuple[Repair, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.rules or self.repairs)


NO_EDITS = Edits()
_ABSENT: Any = object()


def edit_body(body: Json, edits: Edits) -> tuple[Json, tuple[str, ...]]:
    """A provider's body with the rules, then the repairs done to it, and what that changed; `body` itself stays as it is.

    told: `name` of a field left out, `name=value` of one that was set (`...` for what is no number or word), `old>new` of one renamed.
    """
    told: dict[str, None] = {}
    for rule in edits.rules:
        for path, value in (*((path, value) for path, value in rule.default.items() if value_at(body, path) in (None, _ABSENT)), *rule.override.items()):
            if value_at(body, path) != value:
                body = _with_value(body, path.split("."), value)
                told[_tell_set(path, value)] = None
        for path in rule.drop:
            if value_at(body, path) is not _ABSENT:
                body = _without_path(body, path.split("."))
                told[path] = None
    for repair in edits.repairs:
        value = value_at(body, repair.field)
        if value is _ABSENT or repair.how == "none":
            continue
        if repair.how == "rename":
            kept = {name: value for name, value in body.items() if name != repair.field}
            body = {str(repair.to): value, **kept}
            told[f"{repair.field}>{repair.to}"] = None
        elif repair.how == "drop":
            if repair.value is None or repair.value == json.dumps(value):
                body = _without_path(body, repair.field.split("."))
                told[repair.field] = None
        elif is_number(value) and (value > repair.to if repair.how == "most" else value < repair.to):
            body = {**body, repair.field: repair.to}
            told[_tell_set(repair.field, repair.to)] = None
    return body, tuple(told)


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def value_at(body: Any, path: str) -> Any:
    """What stands at a path of names with dots between; a mark of its own where nothing does."""
    for name in path.split("."):
        if not isinstance(body, dict) or name not in body:
            return _ABSENT
        body = body[name]
    return body


def _with_value(body: Any, names: list[str], value: Any) -> Json:
    """`body` with `value` at a path; what stands in the way of an object gives place."""
    outer = body if isinstance(body, dict) else {}
    return {**outer, names[0]: _with_value(outer.get(names[0]), names[1:], value) if len(names) > 1 else value}


def _without_path(body: Json, names: list[str]) -> Json:
    """`body` without what stands at a path, nor the objects that this leaves empty."""
    inner = _without_path(body[names[0]], names[1:]) if len(names) > 1 else {}
    return {name: value if name != names[0] else inner for name, value in body.items() if name != names[0] or inner}


def _tell_set(path: str, value: Any) -> str:
    """A field that was set, as a header may tell it: texts and objects may be private."""
    return f"{path}={json.dumps(value)}" if value is None or isinstance(value, (bool, int, float)) else f"{path}=..."


# ---- The whole preparation

def prepare(hub: Json, profile: Profile) -> Json:
    """A hub request that the profile's writer can render as it stands: every shared rule applied, names of what was lost in `dropped`.

    The request given stays as it is.  Preparing twice changes nothing.  Raises UpstreamFailure("fit") when this target cannot serve it.
    """
    if hub.get("prepared") == profile:
        return hub
    ready: Json = {**hub, "meta": dict(hub.get("meta") or {}), "dropped": list(hub["dropped"]), "prepared": profile}
    if not ready["turns"]:
        ready["turns"] = [{"role": "user", "parts": ready.pop("system", [])}]      # some clients send system text alone
    _apply_tool_changes(ready, profile)
    names = name_map(ready, profile)
    _prepare_turns(ready, profile, names)
    if "system" in ready:
        ready["system"] = system_parts(ready["system"], profile)
    _fit_tools(ready, profile, names)
    if profile.family == "anthropic" and profile.format == "messages" and "tools" not in ready:
        _stub_tools(ready, names)
    if ready.get("choice", {}).get("mode") != "none" or "tools" in hub:
        _fit_choice(ready, profile, names)
    _fit_max_out(ready, profile)
    if profile.must_replay and profile.format == "chat" and _lost_thinking(ready["turns"]):
        ready["think"] = {"mode": "off"}
    _fit_think(ready, profile)
    for rule in (_fit_sampling, _fit_stop, _fit_format, _fit_marks, _fit_meta, _fit_extra):
        rule(ready, profile)
    if not ready.get("system"):
        ready.pop("system", None)
    return ready


def _is_talk(turns: Sequence[Json]) -> bool:
    """Whether user and assistant take turns in plain text, the user first and last: no target needs that changed."""
    return len(turns) % 2 == 1 and all(turn["role"] == ("assistant" if index % 2 else "user") and turn["parts"]
                                       and all(part["type"] == "text" and not is_blank(part["text"]) for part in turn["parts"]) for index, turn in enumerate(turns))


def _prepare_turns(ready: Json, profile: Profile, names: Names) -> None:
    """`ready["turns"]`: system text placed, foreign blocks rendered, thinking chosen, turns mended, ids and names fitted."""
    if _is_talk(ready["turns"]):
        return
    turns = late_system(ready["turns"], profile, ready["client"])
    turns = [{**turn, "parts": [fitted for part in turn["parts"] for fitted in _fit_part(part, ready, profile)]} for turn in turns]
    turns = mend(turns, profile)
    if any(part["type"] == "think" for turn in turns for part in turn["parts"]):
        turns = mend(_without_bare_thinking(replay_thinking(turns, profile), profile), profile)
    turns = _fit_notes(_fit_calls(turns, names, profile), profile)
    if profile.format != "messages":
        turns = _fit_results(turns, profile)
    if turns and turns[0]["role"] == "system" and all(part["type"] == "text" for part in turns[0]["parts"]):
        first, *turns = turns               # what stood before it held nothing: it leads
        if turns:
            ready["system"] = [*ready.get("system", ()), *first["parts"]]
        else:
            turns = [{**first, "role": "user"}]
    if profile.user_first and turns and turns[0]["role"] == "assistant":
        turns.insert(0, {"role": "user", "parts": [text_part("(conversation continues)")]})
    if turns and turns[-1]["role"] == "assistant" and profile.prefill == "no":
        turns.append({"role": "user", "parts": [text_part("Continue.")]})
        drop(ready, "prefill")
    if not turns:
        raise bad_request("messages: at least one message is required", param="messages")
    ready["turns"] = turns


def without_rejected(body: Json, profile: Profile) -> tuple[Json, tuple[str, ...]]:
    """A provider's body without the fields it rejects, and the names of those that made a difference."""
    names = []
    for name in profile.reject:
        outer, _, inner = name.partition(".")
        if outer in body and (not inner or inner in (body[outer] or ())):
            rest = {key: value for key, value in body[outer].items() if key != inner} if inner else {}
            body = {**{key: value for key, value in body.items() if key != outer}, **({outer: rest} if rest else {})}
            names += [name] if outer not in SILENT_FIELDS else []
    return body, tuple(names)


# ---- Answers: how they stop, what they used, how they fail

_END, _LENGTH, _TOOL, _FILTER = "end", "length", "tool", "filter"

#: What a wire format's word for the end means; None: not the end, "error": a failure.  Unknown words mean end.
READ_STOPS: Mapping[str, Mapping[str, str | None]] = {
    "chat": {"stop": _END, "eos": _END, "end_turn": _END, "STOP": _END, "stop_sequence": _END, "length": _LENGTH, "max_tokens": _LENGTH, "model_length": _LENGTH,
             "MAX_TOKENS": _LENGTH, "tool_calls": _TOOL, "function_call": _TOOL, "tool_use": _TOOL, "content_filter": _FILTER, "SAFETY": _FILTER, "RECITATION": _FILTER,
             "PROHIBITED_CONTENT": _FILTER, "BLOCKLIST": _FILTER, "sensitive": _FILTER, "refusal": "refusal", "context_length_exceeded": "context",
             "model_context_window_exceeded": "context", "error": "error", "abort": "error", "insufficient_system_resource": "error", "MALFORMED_FUNCTION_CALL": "error",
             "network_error": "error", "": None},
    "messages": {"end_turn": _END, "max_tokens": _LENGTH, "tool_use": _TOOL, "stop_sequence": "sequence", "refusal": "refusal", "pause_turn": "pause", "compaction": "pause",
                 "model_context_window_exceeded": "context", "": None},
    "responses": {"completed": _END, "max_output_tokens": _LENGTH, "max_tokens": _LENGTH, "content_filter": _FILTER, "incomplete": _LENGTH, "failed": "error", "cancelled": "error",
                  "in_progress": None, "queued": None, "": None},
}

#: The word each format has for a stop reason; for Responses (status, reason of incomplete_details).
WRITE_STOPS: Mapping[str, Mapping[str, Any]] = {
    "chat": {"end": "stop", "length": "length", "tool": "tool_calls", "sequence": "stop", "filter": "content_filter", "refusal": "stop", "pause": "stop", "context": "length"},
    "messages": {"end": "end_turn", "length": "max_tokens", "tool": "tool_use", "sequence": "stop_sequence", "filter": "refusal", "refusal": "refusal", "pause": "pause_turn",
                 "context": "model_context_window_exceeded"},
    "responses": {"end": ("completed", None), "length": ("incomplete", "max_output_tokens"), "tool": ("completed", None), "sequence": ("completed", None),
                  "filter": ("incomplete", "content_filter"), "refusal": ("completed", None), "pause": ("completed", None), "context": ("incomplete", "max_output_tokens")},
}


def read_stop_reason(format: str, word: Any) -> str | None:
    """The hub's reason for a provider's word; None while the answer goes on, "error" for a failure."""
    return READ_STOPS[format].get(word, _END) if isinstance(word, str) else None


def correct_stop(reason: str, n_calls: int) -> str:
    """`end` with calls is `tool`, `tool` without any is `end`; a cut by length stays one."""
    return _TOOL if reason == _END and n_calls else _END if reason == _TOOL and not n_calls else reason


def _token_count(value: Any) -> int | None:
    """A token count as an integer from 0, None for what is no number."""
    if type(value) is int:
        return max(0, value)
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return max(0, int(float(value)))
    except (ValueError, OverflowError):
        return None


def _at(usage: Json, path: Sequence[str]) -> int | None:
    value: Any = usage
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return _token_count(value)


_USAGE_PLACES: Mapping[str, Mapping[str, tuple[list[str], ...]]] = {format: {key: tuple(path.split(".") for path in paths) for key, paths in places.items()} for format, places in {
    "chat": {"input": ("prompt_tokens",), "cached": ("prompt_tokens_details.cached_tokens", "prompt_cache_hit_tokens", "cached_tokens", "num_cached_tokens"),
             "cache_write": ("prompt_tokens_details.cache_write_tokens",), "output": ("completion_tokens",), "reasoning": ("completion_tokens_details.reasoning_tokens",)},
    "messages": {"input": ("input_tokens",), "cached": ("cache_read_input_tokens",), "cache_write": ("cache_creation_input_tokens",), "output": ("output_tokens",),
                 "reasoning": ("output_tokens_details.thinking_tokens",)},
    "responses": {"input": ("input_tokens",), "cached": ("input_tokens_details.cached_tokens",), "cache_write": ("input_tokens_details.cache_write_tokens",),
                  "output": ("output_tokens",), "reasoning": ("output_tokens_details.reasoning_tokens",)},
}.items()}


def read_usage(format: str, usage: Any) -> Json:
    """A provider's usage as the hub counts it; only what was told.

    Messages: input holds the uncached tokens only, and a message_delta may tell some of the keys: merge the raw objects, then read once.
    xAI leaves reasoning out of completion_tokens: it is added when only then the total fits.
    """
    if not isinstance(usage, dict):
        return {}
    told = {}
    for key, places in _USAGE_PLACES[format].items():
        for place in places:
            if (count := _at(usage, place)) is not None:
                told[key] = count
                break
    if format == "messages" and "input" in told:
        told["input"] += told.get("cached", 0) + told.get("cache_write", 0)
    total, reasoning = _token_count(usage.get("total_tokens")), told.get("reasoning", 0)
    if format == "chat" and reasoning and total is not None and total == told.get("input", 0) + told.get("output", 0) + reasoning:
        told["output"] = told.get("output", 0) + reasoning
    return told


def merge_usage(old: Json, new: Json) -> Json:
    """`old` with what `new` tells; null tells nothing."""
    return {**old, **{key: value for key, value in new.items() if value is not None}}


def write_usage(format: str, usage: Json) -> Json:
    """The usage object of a client's format, from hub counts; every number an integer, parts summing up to the whole."""
    total_in, out, reasoning = (_token_count(usage.get(key)) or 0 for key in ("input", "output", "reasoning"))
    cached = min(total_in, _token_count(usage.get("cached")) or 0)
    written = min(total_in - cached, _token_count(usage.get("cache_write")) or 0)
    if format == "messages":
        thought = {"output_tokens_details": {"thinking_tokens": reasoning}} if reasoning else {}
        return {"input_tokens": total_in - cached - written, "cache_creation_input_tokens": written, "cache_read_input_tokens": cached, "output_tokens": out, **thought}
    details_in, details_out = {"cached_tokens": cached, "cache_write_tokens": written}, {"reasoning_tokens": reasoning}
    if format == "chat":
        return {"prompt_tokens": total_in, "completion_tokens": out, "total_tokens": total_in + out, "prompt_tokens_details": details_in, "completion_tokens_details": details_out}
    return {"input_tokens": total_in, "input_tokens_details": details_in, "output_tokens": out, "output_tokens_details": details_out, "total_tokens": total_in + out}


class ErrorRow(NamedTuple):
    """How one kind of error looks to Messages clients and to the others."""
    messages_status: int
    messages_type: str
    status: int
    type: str
    code: str | None


#: What each client gets for a kind of error, before commit as a body, after commit as an event.
ERROR_ROWS: Mapping[str, ErrorRow] = {
    "bad_request": ErrorRow(400, "invalid_request_error", 400, "invalid_request_error", None),
    "overflow": ErrorRow(400, "invalid_request_error", 400, "invalid_request_error", "context_length_exceeded"),
    "too_large": ErrorRow(413, "request_too_large", 413, "invalid_request_error", None),
    "unknown_model": ErrorRow(404, "not_found_error", 404, "invalid_request_error", "model_not_found"),
    "key": ErrorRow(401, "authentication_error", 401, "invalid_request_error", "invalid_api_key"),
    "credential": ErrorRow(502, "api_error", 502, "server_error", "server_error"),
    "payment": ErrorRow(429, "rate_limit_error", 429, "rate_limit_error", "insufficient_quota"),
    "forbidden": ErrorRow(403, "permission_error", 403, "invalid_request_error", None),
    "rate": ErrorRow(429, "rate_limit_error", 429, "rate_limit_error", "rate_limit_exceeded"),
    "overloaded": ErrorRow(529, "overloaded_error", 503, "server_error", "server_is_overloaded"),
    "server": ErrorRow(502, "api_error", 502, "server_error", "server_error"),
    "timeout": ErrorRow(504, "timeout_error", 504, "server_error", "timeout"),
    "no_route": ErrorRow(503, "overloaded_error", 503, "server_error", "no_route"),
}

_CODE_KINDS: Mapping[str, str] = {
    "context_length_exceeded": "overflow", "rate_limit_exceeded": "rate", "rate_limit_error": "rate", "insufficient_quota": "payment", "usage_not_included": "payment",
    "invalid_prompt": "bad_request", "invalid_request_error": "bad_request", "model_not_found": "unknown_model", "not_found_error": "unknown_model",
    "overloaded_error": "overloaded", "server_is_overloaded": "overloaded", "slow_down": "overloaded", "timeout_error": "timeout", "timeout": "timeout",
    "authentication_error": "credential", "invalid_api_key": "credential", "billing_error": "payment", "request_too_large": "too_large", "permission_error": "forbidden",
}
_STATUS_KINDS: Mapping[int, str] = {400: "bad_request", 401: "credential", 402: "payment", 403: "forbidden", 404: "unknown_model", 405: "bad_request", 408: "timeout",
                                    409: "bad_request", 413: "too_large", 415: "bad_request", 422: "bad_request", 429: "rate", 498: "overloaded", 503: "overloaded",
                                    504: "timeout", 529: "overloaded"}


def error_kind(status: int, code: Any = None, message: str = "") -> str:
    """The row of ERROR_ROWS for what a provider said: its words first, then its code, then the status."""
    if is_overflow(message) or code == "context_length_exceeded":
        return "overflow"
    return _CODE_KINDS.get(code if isinstance(code, str) else "") or _STATUS_KINDS.get(status) or ("bad_request" if 400 <= status < 500 else "server")


def read_error(error: Any, status: int = 502) -> Json:
    """The error delta for whatever a provider put where an error belongs: an object, a list of them, a text."""
    if isinstance(error, list):
        error = error[0] if error else {}
    inner = error.get("error") if isinstance(error, dict) else None
    if isinstance(inner, (dict, str)) and inner:
        outer, error = error, inner if isinstance(inner, dict) else {**error, "message": inner}
        status = next((code for code in (outer.get("status_code"), outer.get("code")) if isinstance(code, int) and 400 <= code < 600), status)
    if isinstance(error, str):
        error = {"message": error}
    if not isinstance(error, dict):
        error = {}
    code = error.get("code")
    status = next((number for number in (_token_count(code), _token_count(error.get("status_code")), _token_count(error.get("status"))) if number and 400 <= number < 600), status)
    kind_word = code if isinstance(code, str) and code in _CODE_KINDS else error.get("type")
    message = _error_message(error)
    row = ERROR_ROWS[error_kind(status, kind_word, message)]
    told = 400 <= status < 600 and status != 502
    return error_delta(row.status if isinstance(kind_word, str) and kind_word in _CODE_KINDS or not told else status, message, row.code, row.type)


def _error_message(error: Json) -> str:
    """The words of an error object."""
    for name in ("message", "detail", "msg", "error_description"):
        value = error.get(name)
        if isinstance(value, str) and value:
            return redact(value)
        if isinstance(value, list) and value:
            return redact("; ".join(str(item.get("msg", item)) if isinstance(item, dict) else str(item) for item in value)[:500])
        if isinstance(value, dict) and value:
            return redact(compact(value)[:500])
    return "The provider reported an error."


_TOO_LONG = re.compile(
    r"context[_ ]length[_ ]exceeded|maximum context length|context window|prompt (?:is )?too long|prompt exceeds max length|input is too long|too many tokens|maximum number of tokens"
    r"|input length and `?max_tokens`? exceed|reduce the length|model_max_prompt_tokens_exceeded|exceeds the available context size|exceed_context_size_error|n_ctx"
    r"|token count.{0,40}exceeds|exceeded (?:max )?context length|string too long|string_above_max_length|maximum allowed input length|maximum prompt length is"
    r"|longer than the model'?s context length|exceeded model token limit|range of input length should be|greater than the context length|ContextWindowExceededError"
    r"|token_limit_exceeded", re.IGNORECASE)
_NOT_OVERFLOW = re.compile(r"rate.?limit|too many requests|tokens per (?:min|day)|throttl|\bTPM\b|\bTPD\b", re.IGNORECASE)
_NUMBER_IN_TEXT = re.compile(r"\d[\d,]{2,}")


def is_overflow(text: str) -> bool:
    """Whether an error's words say that the prompt does not fit the model."""
    return _TOO_LONG.search(text) is not None and _NOT_OVERFLOW.search(text) is None


def overflow_numbers(text: str) -> tuple[int | None, int | None]:
    """(tokens asked, limit) as far as an error tells them: of two numbers the larger is what was asked."""
    numbers = sorted({int(number.replace(",", "")) for number in _NUMBER_IN_TEXT.findall(text)} - {0})
    limit = re.search(r"(?:maximum context length is|maximum prompt length is|limit of|limit:|window of|>) *(\d[\d,]*)", text)
    if limit:
        bound = int(limit.group(1).replace(",", ""))
        return next((number for number in numbers if number > bound), None), bound
    return (numbers[-1], numbers[0]) if len(numbers) >= 2 else (None, None)


def overflow_message(client: Format, tokens: int, limit: int | None, max_out: int | None = None) -> str:
    """The words that make the client compact: Claude Code acts on two texts, Codex on the code beside this one."""
    limit = limit or max(1, tokens - 1)
    if client == "messages" and max_out and tokens <= limit < tokens + max_out:
        return f"input length and `max_tokens` exceed context limit: {tokens} + {max_out} > {limit}, decrease input length or `max_tokens` and try again"
    tokens = max(tokens, limit + 1)
    if client == "messages":
        return f"prompt is too long: {tokens} tokens > {limit} maximum"
    return f"This model's maximum context length is {limit} tokens. However, your messages resulted in {tokens} tokens. Please reduce the length of the messages."


def with_retry_hint(message: str, retry_after_s: float | None) -> str:
    """A rate-limit message with the wait that Codex reads from it."""
    if not retry_after_s or "try again in" in message.lower():
        return message
    return f"{message.rstrip()} Please try again in {max(1, round(retry_after_s))}s."


_CALL_TAGS = re.compile(r"<function=([\w.\-:]+)[^{\[<]*([{\[].*?)\s*(?:</function>|\Z)|<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)


def recover_call(failed_generation: Any, tool_names: Collection[str]) -> tuple[str, str] | None:
    """(name, args) of the call in Groq's `failed_generation`, when it parses and names a tool of the request."""
    if not isinstance(failed_generation, str):
        return None
    text, name = failed_generation.strip(), None
    tagged = _CALL_TAGS.search(text)
    if tagged:
        name, text = tagged.group(1), (tagged.group(2) or tagged.group(3) or "").rstrip("> \n")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    value = value[0] if isinstance(value, list) and value else value
    if name is None:
        if not isinstance(value, dict):
            return None
        name, value = value.get("name"), value.get("arguments", value.get("parameters", {}))
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return (name, compact(value)) if isinstance(value, dict) and name in tool_names else None


# ---- Streams: what readers are told, and the rules they share

class Source(NamedTuple):
    """What a stream reader is told of the answer it reads."""
    profile: Profile = Profile()
    seed: str = ""                    #: makes the ids of this answer differ from others'
    call_prefix: str = "call_"        #: of minted call ids; toolu_ for Messages clients
    names: Names = EMPTY_NAMES


class Asked(NamedTuple):
    """What a writer is told: the client's own hub request, and what the answer is stamped with."""
    hub: Json
    seed: str = ""
    created_s: int = 0
    names: Names = EMPTY_NAMES


_SCAN = {False: re.compile(r'["{}\[\]]'), True: re.compile(r'["\\]')}


class JsonScan:
    """Tells when the text fed so far holds one whole JSON object; each character is looked at once."""

    __slots__ = ("complete", "_depth", "_in_string", "_escaped")

    def __init__(self) -> None:
        self.complete = False
        self._depth = 0
        self._in_string = self._escaped = False

    def feed(self, text: str) -> bool:
        """Whether the object has closed."""
        position = 0
        if self._escaped and text:
            self._escaped, position = False, 1
        while not self.complete and (match := _SCAN[self._in_string].search(text, position)):
            position = match.end()
            mark = match.group()
            if mark == '"':
                self._in_string = not self._in_string
            elif mark == "\\":
                self._escaped = position >= len(text)
                position += 1
            else:
                self._depth += 1 if mark in "{[" else -1
                self.complete = self._depth <= 0
        return self.complete


@dataclass(slots=True)
class _Slot:
    """One call of an answer while it is being read."""
    id: str = ""
    name: str = ""
    kind: str = "function"
    namespace: str = ""
    waiting: list[Json] = field(default_factory=list)     #: deltas to give out when it opens
    scan: JsonScan = field(default_factory=JsonScan)
    done: bool = False
    shut: bool = False


class Serialiser:
    """Makes the deltas of an answer keep their contract, whatever order its provider has them in.

    The first call relays live; what comes while it is open (text, thinking, more calls) waits until its arguments are whole or the provider
    ends it.  Also here, so that no reader does it: ids, names as the client knows them, seals, the corrected stop reason, the end.
    """

    def __init__(self, source: Source) -> None:
        self.deltas: list[Json] = []
        self.n_calls = 0
        self.produced = False
        self.finished: str | None = None
        self.failed = False
        self._source = source
        self._slots: dict[Any, _Slot] = {}
        self._queue: deque[_Slot | Json] = deque()
        self._head: _Slot | None = None
        self._ids: set[str] = set()
        self._thinking = ""                     # field of the open thinking run, "" for none
        self._pending_seal: Json | None = None
        self._usage: Json = {}
        self._stop: Json = {}
        self._started = self._closed = False

    def take(self) -> list[Json]:
        """The deltas that are ready."""
        ready, self.deltas = self.deltas, []
        return ready

    def start(self, answer_id: str, model: str, usage: Json | None = None) -> None:
        """The answer begins; a second start is ignored, and so is one after content."""
        if not self._started:
            self._started = True
            self.deltas.append(start_delta(answer_id, model, usage))

    def text(self, text: str, pieces: Sequence[str] = ()) -> None:
        """Text for the reader of the answer; pieces: how it was cut, where many events are told as one."""
        if text:
            self._give({**text_delta(text), "pieces": pieces} if pieces else text_delta(text))

    def refuse(self, text: str) -> None:
        """Text of a refusal."""
        if text:
            self._give(refuse_delta(text))

    def cite(self, record: Json) -> None:
        """A citation of the text before it."""
        self._give({"delta": "cite", **record})

    def opaque(self, family: str, data: Any, text: str = "") -> None:
        """A block of the provider's own kind."""
        self._give(opaque_delta(family, data, text))

    def think(self, text: str, field_name: str) -> None:
        """Thinking that came in `field_name`."""
        if text:
            self._give({**think_delta(text), "field": field_name})

    def seal(self, record: Json) -> None:
        """The end of a thinking block; family and model are the profile's unless told."""
        self._give(seal_delta({"family": self._source.profile.family, "model": self._source.profile.model, **record}))

    def seal_later(self, record: Json) -> None:
        """What seals the thinking under way when it ends; the last one counts."""
        self._pending_seal = {"family": self._source.profile.family, "model": self._source.profile.model, **record}

    def call(self, key: Any, call_id: str = "", name: str = "", kind: str = "function", namespace: str = "") -> None:
        """A call appears under `key`, or more of its head becomes known; it opens once it has a name."""
        slot = self._slots.get(key)
        if slot is None:
            self._slots[key] = slot = _Slot(kind=kind, namespace=namespace)
            self._queue.append(slot)
        slot.id = slot.id or ("" if empty_id(call_id) else call_id)
        slot.name = slot.name or name
        slot.namespace = slot.namespace or namespace
        self._advance()

    def add_name(self, key: Any, fragment: str) -> None:
        """More of a name that comes in pieces (profile name_fragments), while its call has not opened."""
        if key in self._slots and self._slots[key] is not self._head:
            self._slots[key].name += fragment

    def args(self, key: Any, text: str) -> None:
        """Arguments of the call under `key`."""
        slot = self._slots.get(key)
        if slot is None or slot.shut or not text:
            return
        if slot is self._head:
            self._emit(args_delta(text))
        else:
            slot.waiting.append(args_delta(text))
        slot.scan.feed(text)
        self._advance()

    def note(self, key: Any, data: Any) -> None:
        """Opaque provider data of the call under `key`."""
        slot = self._slots.get(key)
        if slot is None or slot.shut:
            return
        note = note_delta(slot.id, self._source.profile.family, data)
        (self.deltas if slot is self._head else slot.waiting).append(note)

    def end_call(self, key: Any) -> None:
        """The provider said that the call under `key` is whole."""
        if key in self._slots:
            self._slots[key].done = True
            self._advance()

    def has(self, key: Any) -> bool:
        """Whether a call was seen under `key`."""
        return key in self._slots

    def whole(self, key: Any) -> bool:
        """Whether the arguments under `key` are one complete JSON object."""
        return key in self._slots and self._slots[key].scan.complete

    def named(self, key: Any) -> bool:
        """Whether the call under `key` has its name."""
        return key in self._slots and bool(self._slots[key].name)

    @property
    def counted(self) -> Json:
        """What the provider has counted so far, in the hub's keys; another object after each count."""
        return self._usage

    def usage(self, usage: Json) -> None:
        """What the provider counted; given out at the end."""
        self._usage = merge_usage(self._usage, usage)

    def finish(self, reason: str | None, sequence: str | None = None, details: Json | None = None) -> None:
        """The provider's reason to stop (a hub reason); the first one counts, the stream may go on."""
        if reason and self.finished is None:
            self.finished, self._stop = reason, stop_delta(reason, sequence, details)

    def fail(self, error: Json) -> None:
        """The provider failed; after a finish reason that no longer matters."""
        if self.finished is None and not self._closed:
            self._queue.clear()
            self._head = None
            self.failed = self._closed = True
            self.deltas.append(error)

    def close(self, *, ended: bool) -> list[Json]:
        """The last deltas. `ended`: the stream had its end mark, so that a missing finish reason is no cut."""
        if self._closed:
            return self.take()
        if self.finished is None and not (ended and (self.produced or self._slots)):
            self.fail(_CUT if self.produced or self._slots or not ended else _EMPTY)
            return self.take()
        if self.finished == "error":
            self.finished = None
            self.fail(_BROKEN)
            return self.take()
        self._release_all()
        if self._usage:
            self.deltas.append(usage_delta(self._usage))
        reason = correct_stop(self.finished or _END, self.n_calls)
        self.deltas.append({**(self._stop or stop_delta(reason)), "reason": reason})
        self._closed = True
        return self.take()

    def _give(self, delta: Json) -> None:
        if self._closed:
            return
        if self._head is None and not self._queue:
            self._emit(delta)
        else:
            self._queue.append(delta)
            self._advance()

    def _advance(self) -> None:
        """Close the head once it is whole and something waits; give out what waits up to the next call."""
        while self._queue:
            if self._head is not None:
                if not (self._head.done or self._head.scan.complete):
                    return
                self._shut_head()
            item = self._queue[0]
            if isinstance(item, _Slot):
                if not item.name:
                    return
                self._open(item)
            else:
                self._emit(item)
            self._queue.popleft()

    def _release_all(self) -> None:
        """Everything that still waits, calls without a name left out."""
        for item in self._queue:
            self._shut_head()
            if not isinstance(item, _Slot):
                self._emit(item)
            elif item.name:
                self._open(item)
        self._queue.clear()
        self._shut_head()
        self._end_thinking()

    def _shut_head(self) -> None:
        if self._head is not None:
            self._head.shut, self._head = True, None

    def _open(self, slot: _Slot) -> None:
        source = self._source
        name, namespace, kind = source.names.back(slot.name)
        slot.id = unique_id(slot.id, self._ids, source.seed, source.call_prefix)
        self._ids.add(slot.id)
        self.n_calls += 1
        self._emit(call_delta(slot.id, name, kind or slot.kind, namespace or slot.namespace))
        self.deltas.extend({**delta, "id": slot.id} if delta["delta"] == "note" else delta for delta in slot.waiting)
        slot.waiting.clear()
        self._head = slot

    def _emit(self, delta: Json) -> None:
        kind = delta["delta"]
        if kind == "think":
            field_name = delta.pop("field")
            if not self._thinking and field_name != "signature" and is_blank(delta["text"]):
                return
            self._thinking = field_name
        elif kind == "seal":
            self._thinking, self._pending_seal = "", None
        elif kind not in ("args", "cite"):
            self._end_thinking()
        self.produced = True
        self.deltas.append(delta)

    def _end_thinking(self) -> None:
        """Seal the thinking that ends here: with what came for it, else with where it came from."""
        if self._pending_seal is not None:
            self.deltas.append(seal_delta(self._pending_seal))
        elif self._thinking:
            self.deltas.append(seal_delta({"family": self._source.profile.family, "model": self._source.profile.model, "field": self._thinking}))
        self._thinking, self._pending_seal = "", None


_CUT = error_delta(502, "upstream closed the stream before finishing", "server_error")
_EMPTY = error_delta(502, "empty answer", "empty_answer")
_BROKEN = error_delta(502, "The provider stopped with an error.", "server_error")


class TagSplitter:
    """Splits <think> off the beginning of an answer's text, the same for every way the text was cut.

    mode: auto (only when the answer begins with the tag), open (it begins inside), off.
    """

    __slots__ = ("_mode", "_rest")

    def __init__(self, mode: str = "auto") -> None:
        self._mode = {"auto": "begin", "open": "inside_begin", "off": "off"}[mode]
        self._rest = ""

    @property
    def is_off(self) -> bool:
        """Whether all that comes is text."""
        return self._mode == "off"

    def stop(self) -> list[tuple[str, str]]:
        """No tags are to be expected any more, since thinking came by a field; what was kept back is text."""
        kept, self._rest = self._rest, ""
        if self._mode == "begin":
            self._mode = "off"
            return [("text", kept)] if kept else []
        self._rest = kept
        return []

    def feed(self, text: str) -> list[tuple[str, str]]:
        """("think" | "text", text) pieces, in order, none empty."""
        if self._mode == "off":
            return [("text", text)] if text else []
        self._rest += text
        done: list[tuple[str, str]] = []
        while self._step(done):
            pass
        return [piece for piece in done if piece[1]]

    def close(self) -> list[tuple[str, str]]:
        """What was kept back: thinking when the tag never closed."""
        kept, self._rest = self._rest, ""
        if not kept or self._mode == "after" and kept.isspace():
            return []
        return [("think" if self._mode.startswith("inside") else "text", kept)]

    def _step(self, done: list[tuple[str, str]]) -> bool:
        """One change of mode, False when more text is needed."""
        bare = self._rest.lstrip()
        if self._mode == "begin":
            if bare.startswith("<think>"):
                self._mode, self._rest = "inside_begin", bare[7:]
                return True
            if "<think>".startswith(bare):
                return False
        elif self._mode == "inside_begin":
            self._rest = bare
            if bare:
                self._mode = "inside"
            return bool(bare)
        elif self._mode == "inside":
            head, tag, tail = self._rest.partition("</think>")
            if tag:
                done.append(("think", head))
                self._mode, self._rest = "after", tail
                return True
            kept = next((n for n in range(min(7, len(head)), 0, -1) if "</think>".startswith(head[-n:])), 0)
            done.append(("think", head[:len(head) - kept]))
            self._rest = head[len(head) - kept:]
            return False
        elif not bare:
            self._rest = ""
            return False
        done.append(("text", self._rest if self._mode == "begin" else bare))
        self._mode, self._rest = "off", ""
        return False


class CallHolder:
    """Keeps calls back from the first fragment until something other than a call follows, so that one which dies before its end is never seen.

    That its JSON is whole is not enough: clients act on a call at its end, which writers tell when they come to what follows.  So nothing is gained
    by showing it sooner, and the next route would be lost.
    live: nothing is kept back.  Past max_bytes calls go out as they come.  A proper stop lets a call through as it is: its reason tells.
    """

    __slots__ = ("_held", "_size", "_live", "_max_bytes")

    def __init__(self, live: bool = False, max_bytes: int = 1 << 20) -> None:
        self._held: list[Json] = []
        self._size = 0
        self._live = live
        self._max_bytes = max_bytes

    @property
    def holding(self) -> bool:
        """Whether a call is kept back."""
        return bool(self._held)

    def feed(self, delta: Json) -> list[Json]:
        """What may go on to the writer."""
        kind = delta["delta"]
        if self._live or not self._held and kind != "call":
            return [delta]
        if kind == "error":
            self._held = []
            return [delta]
        self._held.append(delta)
        if kind in ("call", "args", "note"):
            self._size += len(delta.get("text", ""))
            if self._size <= self._max_bytes:
                return []
        return self.close()

    def close(self) -> list[Json]:
        """What is kept back, when the stream ended properly."""
        released, self._held, self._size = self._held, [], 0
        return released


##############################################################################
# 10. OpenAI Chat                                           pure | uses 1-3, 8-9
##############################################################################
# Chat Completions as clients send it and providers answer it, relayed in the provider's own bytes.  ChatPassage watches a
# stream go by and looks closely only where an event differs from the one before it in more than its text.
# Source: OpenAI API reference, Chat Completions, read 2026-11; how streams end: README "What a broken stream looks like".

#: Body fields that other gateways obey and this one never does; they are not forwarded either.
ROUTING_FIELDS = frozenset({"api_base", "base_url", "api_key", "headers", "extra_headers", "extra_body", "custom_llm_provider", "mock_response", "fallbacks", "user_config"})

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_NUMBER = (int, float)
CHAT_FIELDS: Mapping[str, tuple[tuple[type, ...], str]] = {
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


def check_fields(body: Any, fields: Mapping[str, tuple[tuple[type, ...], str]]) -> None:
    """Raise GatewayError 400 unless `body` is an object whose known fields are of the types that `fields` gives; unknown ones may be anything."""
    if not isinstance(body, dict):
        raise bad_request("The body must be a JSON object.")
    for name, value in body.items():
        types, expected = fields.get(name, _ANYTHING)
        if value is not None and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types and object not in types)):
            raise bad_request(f"{name} must be {expected}.", param=name, code="invalid_type")
    for name in _AT_LEAST_ONE:
        if body.get(name) is not None and body[name] < 1:
            raise bad_request(f"{name} must be at least 1.", param=name, code="invalid_value")


def check_chat_request(body: Any) -> Json:
    """The body when it is a Chat request by its structure, flat tools nested. Raises GatewayError 400 that names the first field that is not."""
    body = _nested_tools(body)
    check_fields(body, CHAT_FIELDS)
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


def chat_pass_request(raw: bytes, body: Json, wire_model: str, preset: Preset, edits: Edits = NO_EDITS) -> tuple[bytes, tuple[str, ...]]:
    """The provider's body for a Chat request that passes through, and what was left out or changed.

    in: the client's bytes and the same parsed    out: those bytes with another model, or new ones where more has to change
    """
    dropped = tuple(name for name in preset.rejects if name in body)
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
    return write_passing(raw, body, changes, removed, dropped, edits)


def write_passing(raw: bytes, body: Json, changes: Json, removed: Collection[str], dropped: tuple[str, ...], edits: Edits) -> tuple[bytes, tuple[str, ...]]:
    """A passing request in its own bytes where only `changes` have to be made, else written anew; and what is told of it: `dropped` and the edits."""
    if not removed and not edits:
        spliced = splice_fields(raw, body, changes)
        if spliced is not None:
            return spliced, ()
    made, told = edit_body({name: value for name, value in {**body, **changes}.items() if name not in removed}, edits)
    return dump_json(made), (*dropped, *told)


def _fit_messages(messages: list[Json], preset: Preset) -> list[Json]:
    """The messages without fields the provider rejects and with its word for developer; the same list when nothing changes."""
    unwanted = preset.message_rejects
    rename = preset.system_role if "developer" in [message["role"] for message in messages] else ""
    if not rename and not (unwanted and any(name in message for message in messages for name in unwanted)):
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
    n_in, n_out, n_reasoning = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")), _count(output.get("reasoning_tokens") if isinstance(output, dict) else None)
    if n_reasoning and _count(usage.get("total_tokens")) == n_in + n_out + n_reasoning:      # xAI leaves reasoning out of completion_tokens, as read_usage knows
        n_out += n_reasoning
    return Usage(n_in, n_out, _count(cached or usage.get("prompt_cache_hit_tokens")), _count(prompt.get("cache_write_tokens") if isinstance(prompt, dict) else None), n_reasoning)


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
    """Whether a whole body is a Chat answer: ("", usage) when it is, else why not (not_json, empty_answer); an empty one may have been counted."""
    if not isinstance(body, dict) or not isinstance(body.get("choices"), list):
        return "not_json", None
    choices = [choice for choice in body["choices"] if isinstance(choice, dict) and isinstance(choice.get("message"), dict)]
    if len(choices) != len(body["choices"]):
        return "not_json", None
    if not any(_has_content(choice["message"]) or str(choice.get("finish_reason")) in _SILENT_STOPS for choice in choices):
        return "empty_answer", chat_usage(body)
    return "", chat_usage(body)


class ChatPassage:
    """A provider's Chat stream on its way through: feed() and close() give what may go to the client, attributes tell what was seen.

    Only whole events leave.  Nothing leaves after the end, after an error, or after garbage.
    """

    __slots__ = ("content", "done", "usage", "error", "broken", "n_content_bytes", "n_signs", "_reason", "_unfinished", "_finished", "_wants_usage", "_n_prompt_tokens", "_usage_shown", "frames", "_echo", "_prefix", "_suffix", "_last", "_called")

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
        self.frames = FrameSplitter()
        self._prefix = self._suffix = b""   #: what the last event of plain text had around its text
        self._last: Json = {}
        self._called = False

    @staticmethod
    def part_of(choice: Json) -> Any:
        """What a choice says."""
        return choice.get("delta") or choice.get("message")

    @staticmethod
    def bare_choice(index: int, reason: str) -> Json:
        """A choice that says nothing but its end."""
        return {"index": index, "delta": {}, "finish_reason": reason}

    @property
    def finish(self) -> str | None:
        """The first finish reason, once every choice that has begun has one."""
        return self._reason if not self._unfinished else None

    @property
    def calling(self) -> bool:
        """Whether a tool call has begun and may not be whole yet."""
        return self._called and self.finish is None

    def keep_alive(self) -> bytes:
        """A comment, for silences."""
        return b": keep-alive\n\n"

    def feed(self, chunk: bytes) -> bytes:
        """What of `chunk`, and of what was kept before it, may go to the client now."""
        if self.done or self.error or self.broken:
            return b""
        try:
            block = self.frames.feed(chunk)
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
        rest = self.frames.rest
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
                self.done = True            # an error behind a proper end changes nothing that was said, and may count it
                self.usage = (chat_usage(chunk) if isinstance(chunk, dict) else None) or self.usage
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
            part, reason = self.part_of(choice), choice.get("finish_reason")
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
            chunk = {**head, "choices": [self.bare_choice(int(index) if index.isdigit() else 0, reason)]}
            owed += self._named(chunk, write_event(chunk))
        self._unfinished.clear()
        self._reason = self._reason or reason
        if self._wants_usage and not self._usage_shown and self._last:
            owed += self._owed_usage()
        return owed + (mark if mark.endswith((b"\n\n", b"\r\n\r\n", b"\r\r")) else b"data: [DONE]\n\n")


# ---- Translation: requests read into the hub

#: Fields that the hub has a place for; the rest goes to extra, for Chat providers.
_CHAT_READ_FIELDS = ROUTING_FIELDS.union((
    "model messages stream stream_options max_tokens max_completion_tokens stop tools functions tool_choice function_call parallel_tool_calls response_format "
    "reasoning_effort reasoning thinking enable_thinking chat_template_kwargs system cache_control").split())
_CHAT_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias")
#: Names in the hub's meta of fields that are what they are.
_CHAT_META: Mapping[str, str] = {
    "user": "user",
    "safety": "safety_identifier",
    "cache_key": "prompt_cache_key",
    "tier": "service_tier",
    "verbosity": "verbosity",
    "logprobs": "logprobs",
    "top_logprobs": "top_logprobs",
    "n": "n",
    "metadata": "metadata",
    "store": "store",
}
_CHAT_CHOICES: Mapping[str, str] = {"auto": "auto", "none": "none", "required": "any", "any": "any"}
#: Where an answer or a message of the history has its thinking; the first that holds text counts.
_CHAT_THINK_FIELDS = ("reasoning_content", "reasoning", "reasoning_text", "cot_summary", "thinking")
_CHAT_THINK_MODES: Mapping[str, str] = {"enabled": "on", "disabled": "off", "adaptive": "auto"}


def chat_read_request(body: Any) -> Json:
    """The hub request for a Chat body. Raises GatewayError 400.

    in:      {"model", "messages", "tools"?, ...}; tools and choices in the flat form of Responses too    out: hub request (section 9)
    dropped: `name` of messages.    kept in extra, for Chat providers only: prediction, modalities, provider, ... and what is unknown.
    """
    body = check_chat_request(body)
    hub = new_hub("chat", body.get("model") or "", body.get("stream") is True)
    if body.get("system"):
        hub["system"] = [part for part in _read_chat_parts(body["system"], "system") if part["type"] == "text"]
    for index, message in enumerate(body["messages"]):
        _read_chat_message(hub, message, f"messages[{index}]")
    tools = [_read_chat_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.get("tools") or ())]
    legacy = [function for function in body.get("functions") or () if isinstance(function, dict) and isinstance(function.get("name"), str)]
    merge_tools(hub, [*tools, *(_read_chat_tool({"type": "function", "function": function}, "functions") for function in legacy)])
    max_out = body.get("max_completion_tokens")
    found = {
        "choice": _read_chat_choice(body.get("tool_choice") if body.get("tool_choice") is not None else body.get("function_call")),
        "parallel": False if legacy and not tools else body.get("parallel_tool_calls"),
        "max_out": body.get("max_tokens") if max_out is None else max_out,
        "sampling": {name: body[name] for name in _CHAT_SAMPLING if body.get(name) is not None},
        "stop": read_stop(body.get("stop")),
        "format": _read_chat_format(body.get("response_format") or {}),
        "think": _read_chat_think(body),
        "meta": _read_chat_meta(body),
        "legacy": bool(legacy and not tools) or None,      # the answer is to hold function_call instead of tool_calls
    }
    hub.update({name: value for name, value in found.items() if value not in (None, [], {})})
    extra = _chat_extra(body)
    if extra:
        hub["extra"] = {"chat": extra}
    return hub


def _chat_object(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def _chat_inner(value: Json, name: str) -> Json:
    """The object under `name`, or the object itself where a client wrote it flat."""
    return value[name] if isinstance(value.get(name), dict) else value


def _is_flat_tool(tool: Any) -> bool:
    kind = tool.get("type", "function") if isinstance(tool, dict) else ""
    return kind in ("function", "custom") and isinstance(tool.get("name"), str) and not isinstance(tool.get(kind), dict)


def _nested_tools(body: Any) -> Any:
    """The body with tools that are flat, as Responses has them and Cursor sends them here, in the form of this format."""
    tools = body.get("tools") if isinstance(body, dict) else None
    if not isinstance(tools, list) or not any(map(_is_flat_tool, tools)):
        return body
    return {**body, "tools": [_nested_tool(tool) if _is_flat_tool(tool) else tool for tool in tools]}


def _nested_tool(tool: Json) -> Json:
    kind = tool.get("type", "function")
    return {"type": kind, kind: rest_of(tool, ("type",))}


def _read_chat_message(hub: Json, message: Json, where: str) -> None:
    role, turns = message["role"], hub["turns"]
    parts = _read_chat_parts(message.get("content"), where)
    if role in ("system", "developer"):
        texts = [part for part in parts if part["type"] == "text"]
        if turns:
            turns.append({"role": "system", "parts": texts})
        else:
            hub["system"] = [*hub.get("system", ()), *texts]
        return
    if role in ("tool", "function"):
        call_id = message["tool_call_id"] if role == "tool" else _function_id(turns, message.get("name"))
        parts, role = [result_part(call_id, parts)], "user"
        if turns and turns[-1]["role"] == "user" and all(part["type"] == "result" for part in turns[-1]["parts"]):
            turns[-1]["parts"] += parts
            return
    elif message.get("name"):
        drop(hub, "name")
    turns.append({"role": role, "parts": _read_chat_said(message, parts, where) if role == "assistant" else parts})


def _function_id(turns: Sequence[Json], name: Any) -> str:
    """The id of the last call of `name` that has no result: results of the time before tools name the function only."""
    answered = {part["id"] for turn in turns for part in turn["parts"] if part["type"] == "result"}
    calls = (part for turn in reversed(turns) for part in reversed(turn["parts"]) if part["type"] == "call")
    return next((part["id"] for part in calls if part["name"] == name and part["id"] not in answered), "")


def _read_chat_said(message: Json, content: list[Json], where: str) -> list[Json]:
    """What an assistant message holds: thinking, text, refusal, calls."""
    parts = [*_read_chat_thinking(message), *content]
    if isinstance(message.get("refusal"), str) and message["refusal"]:
        parts.append({"type": "refusal", "text": message["refusal"]})
    if isinstance(message.get("audio"), dict):
        parts.append({"type": "audio", "id": message["audio"].get("id")})
    parts += [_read_chat_call(call) for call in message.get("tool_calls") or ()]
    function = message.get("function_call")
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        parts.append(call_part(mint("call_", where), function["name"], args_text(function.get("arguments"))))
    return parts


def _read_chat_call(call: Json) -> Json:
    custom = call.get("custom")
    if isinstance(custom, dict):
        part = call_part(call["id"], custom["name"], freeform_args(args_text(custom.get("input"))), "custom")
    else:
        part = call_part(call["id"], call["function"]["name"], args_text(call["function"].get("arguments")))
    return {**part, "note": {"family": "gemini", "data": call["extra_content"]}} if call.get("extra_content") else part


def _read_chat_thinking(message: Json) -> list[Json]:
    """Think parts of an assistant message: its text by whatever name, its seals from reasoning_details.

    Text that our own stream told apart from its seal comes home to it; where several signed thoughts came back as one text, the signatures are worth nothing.
    """
    text = next((message[name] for name in _CHAT_THINK_FIELDS if isinstance(message.get(name), str) and not is_blank(message[name])), "")
    parts = read_details(message.get("reasoning_details"))
    if message.get("reasoning_opaque"):
        seal = {"family": "github-copilot", "model": "", "field": "reasoning_opaque", "data": message["reasoning_opaque"]}
        parts.append({"type": "think", "text": "", "seal": seal})
    if not text or any(part["text"] for part in parts):
        return parts
    fields = [(part.get("seal") or {}).get("field") for part in parts]
    if fields.count("signature") > 1:
        parts = [part for part, field_name in zip(parts, fields) if field_name != "signature"]
        return [{"type": "think", "text": text}, *parts]
    home = next((index for index, field_name in enumerate(fields) if field_name != "redacted"), None)
    if home is None:
        return [{"type": "think", "text": text}, *parts]
    return [*parts[:home], {**parts[home], "text": text}, *parts[home + 1:]]


def _read_chat_parts(content: Any, where: str) -> list[Json]:
    """The parts of a message's content. Raises GatewayError 400 for one of a kind that is not known."""
    if isinstance(content, str):
        return [text_part(content)] if content else []
    parts = []
    for index, part in enumerate(content if isinstance(content, list) else ()):
        place = f"{where}.content[{index}]"
        read = _CHAT_PART_READERS.get(part.get("type")) if isinstance(part, dict) else None
        if read is None:
            raise bad_request(f'{place}: unknown part type "{_chat_object(part).get("type")}"', param=place, code="invalid_value")
        made = read(part, place)
        parts.append({**made, "cache": part["cache_control"]} if isinstance(part.get("cache_control"), dict) else made)
    return parts


def _read_chat_text(part: Json, place: str) -> Json:
    if not isinstance(part.get("text") or "", str):
        raise bad_request(f"{place}.text must be a string.", param=f"{place}.text", code="invalid_type")
    return text_part(part.get("text") or "")


def _chat_source(value: Any, place: str) -> str:
    """The URL, data URL or base64 that a part cannot be without."""
    if not isinstance(value, str) or not value:
        raise bad_request(f"{place} has no source.", param=place, code="missing_required_parameter")
    return value


def _read_chat_image(part: Json, place: str) -> Json:
    image = part.get("image_url")
    if image is None and isinstance(part.get("file_id"), str):
        return {"type": "image", "file_id": part["file_id"]}
    told = image if isinstance(image, dict) else {"url": image, "detail": part.get("detail")}
    return image_part(_chat_source(told.get("url"), place), told.get("detail"))


def _read_chat_file(part: Json, place: str) -> Json:
    told = _chat_inner(part, "file")
    name = told.get("filename") if isinstance(told.get("filename"), str) else None
    if isinstance(told.get("file_id"), str):
        return {"type": "file", "file_id": told["file_id"], **({"name": name} if name else {})}
    return file_part(_chat_source(told.get("file_data") or told.get("file_url"), place), name)


def _read_chat_document(part: Json, place: str) -> Json:
    document = part.get("document_url")
    return file_part(_chat_source(document.get("url") if isinstance(document, dict) else document, place), part.get("document_name"))


def _read_chat_audio(part: Json, place: str) -> Json:
    audio = _chat_object(part.get("input_audio"))
    return {"type": "audio", "data": _chat_source(audio.get("data") or part.get("input_audio"), place), "format": audio.get("format")}


def _read_chat_thought(part: Json, place: str) -> Json:
    return {"type": "think", "text": _chat_thought_text(part.get("thinking"))}


def _chat_thought_text(thinking: Any) -> str:
    """The text of Mistral's thinking chunks."""
    if isinstance(thinking, list):
        return "".join(str(piece.get("text") or "") for piece in thinking if isinstance(piece, dict))
    return thinking if isinstance(thinking, str) else ""


_CHAT_PART_READERS: Mapping[Any, Callable[[Json, str], Json]] = {
    "text": _read_chat_text,
    "input_text": _read_chat_text,
    "output_text": _read_chat_text,
    "refusal": lambda part, place: {"type": "refusal", "text": str(part.get("refusal") or "")},
    "image_url": _read_chat_image,
    "input_image": _read_chat_image,
    "file": _read_chat_file,
    "input_file": _read_chat_file,
    "document_url": _read_chat_document,
    "input_audio": _read_chat_audio,
    "video_url": lambda part, place: {"type": "video", "raw": part},
    "thinking": _read_chat_thought,
}


def _read_chat_tool(tool: Json, where: str) -> Json:
    kind = tool.get("type") or "function"
    cache = {"cache": tool["cache_control"]} if isinstance(tool.get("cache_control"), dict) else {}
    if kind not in ("function", "custom"):
        family = "anthropic" if re.search(r"_20\d{6}\Z", kind) else kind.partition(":")[0] if ":" in kind else "openai"
        return {"name": str(tool.get("name") or kind), "kind": "hosted", "family": family, "raw": tool, **cache}
    inner = _chat_object(tool.get(kind))
    if not isinstance(inner.get("name"), str):
        raise bad_request(f"{where}.{kind} must be an object with a name.", param=f"{where}.{kind}", code="invalid_type")
    form = _chat_object(inner.get("format"))
    about, schema = inner.get("description"), inner.get("parameters")
    told = {"description": about if isinstance(about, str) else None, "schema": schema if kind == "function" and isinstance(schema, dict) else None, "strict": inner.get("strict"),
            "grammar": _chat_inner(form, "grammar") if form.get("type") == "grammar" else None}
    grammar = told["grammar"]
    if grammar:
        told["grammar"] = {"syntax": grammar.get("syntax"), "definition": grammar.get("definition")}
    return {"name": inner["name"], "kind": kind, **{name: value for name, value in told.items() if value is not None}, **cache}


def _read_chat_choice(value: Any) -> Json | None:
    """The hub's choice for tool_choice or the older function_call; None for a word nobody knows."""
    if isinstance(value, str):
        return {"mode": _CHAT_CHOICES[value]} if value in _CHAT_CHOICES else None
    if not isinstance(value, dict):
        return None
    kind = value.get("type") or "function"
    if kind == "allowed_tools":
        allowed = _chat_inner(value, "allowed_tools")
        names = [str(_chat_inner(tool, tool.get("type") or "function").get("name")) for tool in allowed.get("tools") or () if isinstance(tool, dict)]
        return {"mode": "any" if allowed.get("mode") == "required" else "auto", "allowed": names}
    if kind in _CHAT_CHOICES:
        return {"mode": _CHAT_CHOICES[kind]}
    if kind in ("function", "custom", "tool"):
        choice = {"mode": "tool", "name": str(_chat_inner(value, kind).get("name") or "")}
        return {**choice, "kind": "custom"} if kind == "custom" else choice
    return {"mode": "tool", "name": str(value.get("name") or kind), "kind": "hosted"}


def _read_chat_format(form: Json) -> Json | None:
    if form.get("type") == "json_object":
        return {"kind": "json"}
    if form.get("type") != "json_schema":
        return None
    inner = _chat_inner(form, "json_schema")
    told = {name: inner[name] for name in ("name", "strict", "description") if inner.get(name) is not None}
    return {"kind": "schema", "schema": _chat_object(inner.get("schema")), **told}


def _read_chat_think(body: Json) -> Json:
    """What was asked of thinking, by any of the words providers have for it."""
    reasoning, thinking, template = (_chat_object(body.get(name)) for name in ("reasoning", "thinking", "chat_template_kwargs"))
    effort = body.get("reasoning_effort") or reasoning.get("effort")
    budget = reasoning.get("max_tokens") or thinking.get("budget_tokens")
    flags = [flag for flag in (reasoning.get("enabled"), body.get("enable_thinking"), template.get("enable_thinking")) if isinstance(flag, bool)]
    mode = _CHAT_THINK_MODES.get(str(thinking.get("type")))
    if effort == "none" or False in flags:
        mode, effort = "off", None
    elif mode is None and (effort or budget or flags):
        mode = "on"
    effort = None if effort == "default" else effort        # Groq's word for no wish
    told = {"mode": mode, "effort": effort, "budget": budget, "show": "omitted" if reasoning.get("exclude") is True else None}
    return {name: value for name, value in told.items() if value and isinstance(value, int if name == "budget" else str)}


def _read_chat_meta(body: Json) -> Json:
    told = {name: body.get(field_name) for name, field_name in _CHAT_META.items()}
    told |= {"n": told["n"] if told["n"] != 1 else None, "logprobs": told["logprobs"] or None, "cache_auto": body.get("cache_control"),
             "include_usage": _chat_object(body.get("stream_options")).get("include_usage") is True or None}
    return {name: value for name, value in told.items() if value is not None}


#: Fields whose parts the hub knows, and those parts; what else they hold goes to extra.
_CHAT_PARTLY_READ: Mapping[str, tuple[str, ...]] = {
    "reasoning": ("effort", "max_tokens", "enabled", "exclude"),
    "thinking": ("type", "budget_tokens"),
    "chat_template_kwargs": ("enable_thinking",),
}


def _chat_extra(body: Json) -> Json:
    extra = rest_of(body, _CHAT_READ_FIELDS.union(_CHAT_SAMPLING, _CHAT_META.values()))
    for name, known in _CHAT_PARTLY_READ.items():
        more = rest_of(_chat_object(body.get(name)), known)
        if more:
            extra[name] = more
    if _chat_object(body.get("response_format")).get("type") not in (None, "text", "json_object", "json_schema"):
        extra["response_format"] = body["response_format"]
    return extra


# ---- Translation: requests written for a provider

def chat_write_request(hub: Json, profile: Profile) -> Json:
    """The Chat body for a prepared hub request (section 9, prepare).

    out:     {"model", "messages", "tools"?, ...}; what a message cannot hold in order (text behind a call) is put in front of it by prepare()
    source:  OpenAI API reference, Chat Completions, read 2026-11; providers' own words by the profile.
    """
    body: Json = {"model": profile.model or hub["model"], "messages": _write_chat_messages(hub, profile)}
    if hub.get("stream"):
        body |= {"stream": True, **({"stream_options": {"include_usage": True}} if profile.stream_options else {})}
    if hub.get("max_out") is not None:
        body[profile.max_field] = hub["max_out"]
    body |= {profile.seed_field if name == "seed" else name: value for name, value in (hub.get("sampling") or {}).items()}
    if hub.get("stop"):
        body["stop"] = hub["stop"]
    if hub.get("tools"):
        body["tools"] = [_write_chat_tool(tool) for tool in hub["tools"]]
        if hub.get("choice"):
            body["tool_choice"] = _write_chat_choice(hub["choice"], hub["tools"], profile)
        if hub.get("parallel") is False:
            body["parallel_tool_calls"] = False
    body |= think_fields(hub.get("think"), profile)
    if hub.get("format"):
        body["response_format"] = _write_chat_format(hub["format"])
    body |= _write_chat_meta(hub, profile)
    for name, value in ((hub.get("extra") or {}).get("chat") or {}).items():
        if isinstance(value, dict) and isinstance(body.get(name), dict):
            body[name] = {**value, **body[name]}
        elif name not in body and not (name == "thinking" and hub.get("think")):       # what is left of it says nothing without its type
            body[name] = value
    return body


def _write_chat_meta(hub: Json, profile: Profile) -> Json:
    """Fields beside the conversation; some have a meaning only where they were asked for, or only at OpenAI."""
    meta = hub.get("meta") or {}
    own = {"store", "metadata"} if hub["client"] != "chat" else set()
    own |= set() if profile.vendor else {"safety"}
    fields = {field_name: meta[name] for name, field_name in _CHAT_META.items() if meta.get(name) is not None and name not in own}
    return {**fields, "cache_control": meta["cache_auto"]} if meta.get("cache_auto") and hub["client"] == "chat" else fields


def _write_chat_tool(tool: Json) -> Json:
    if tool["kind"] == "hosted":
        return dict(tool["raw"])
    told = {"name": tool["wire"], "description": tool.get("description") or None}
    if tool["kind"] == "custom":
        form = {"type": "grammar", "grammar": tool["grammar"]} if tool.get("grammar") else None
        written = {"type": "custom", "custom": {name: value for name, value in (*told.items(), ("format", form)) if value is not None}}
    else:
        told |= {"parameters": tool.get("schema"), "strict": tool.get("strict")}
        written = {"type": "function", "function": {name: value for name, value in told.items() if value is not None}}
    return {**written, "cache_control": tool["cache"]} if tool.get("cache") else written


def _write_chat_choice(choice: Json, tools: Sequence[Json], profile: Profile) -> Any:
    words = {"any": profile.required_word}
    if "allowed" in choice:
        kinds = {tool["wire"]: tool["kind"] for tool in tools}
        allowed = [_named_choice(name, kinds.get(name, "function")) for name in choice["allowed"]]
        return {"type": "allowed_tools", "allowed_tools": {"mode": "required" if choice["mode"] == "any" else "auto", "tools": allowed}}
    return _named_choice(choice["name"], choice.get("kind", "function")) if choice["mode"] == "tool" else words.get(choice["mode"], choice["mode"])


def _named_choice(name: str, kind: str) -> Json:
    return {"type": kind, kind: {"name": name}} if kind in ("function", "custom") else {"type": name}


def _write_chat_format(form: Json) -> Json:
    if form["kind"] == "json":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {name: form[name] for name in ("name", "description", "schema", "strict") if name in form}}


def _write_chat_messages(hub: Json, profile: Profile) -> list[Json]:
    """The messages: system text first, results each on its own, an assistant turn in one message."""
    messages: list[Json] = []
    names: dict[str, str] = {}
    if hub.get("system"):
        messages.append({"role": profile.system_role, "content": _write_chat_content(hub["system"], "\n\n")})
    for turn in hub["turns"]:
        if turn["role"] == "assistant":
            messages.append(_write_chat_said(turn["parts"], profile))
            names |= {part["id"]: part["name"] for part in turn["parts"] if part["type"] == "call"}
            continue
        results = [part for part in turn["parts"] if part["type"] == "result"]
        messages += [_write_chat_result(part, names if profile.extra_names else {}) for part in results]
        rest = [part for part in turn["parts"] if part["type"] in _CHAT_PART_WRITERS]
        if rest:
            messages.append({"role": profile.system_role if turn["role"] == "system" else "user", "content": _write_chat_content(rest, "\n")})
    if profile.prefill == "prefix" and messages and messages[-1]["role"] == "assistant":
        messages[-1]["prefix"] = True
    rejected = set(profile.message_reject)
    return [rest_of(message, rejected) if rejected.intersection(message) else message for message in messages]


def _write_chat_content(parts: Sequence[Json], joint: str) -> str | list[Json]:
    """A string where there is only text and no mark on it, else a list of parts."""
    if all(part["type"] == "text" and not part.get("cache") for part in parts):
        return joint.join(part["text"] for part in parts)
    written = []
    for part in parts:
        made = _CHAT_PART_WRITERS[part["type"]](part)
        written.append({**made, "cache_control": part["cache"]} if part.get("cache") else made)
    return written


def _write_chat_result(part: Json, names: Mapping[str, str]) -> Json:
    inner = [item for item in part["parts"] if item["type"] in _CHAT_PART_WRITERS]
    if part.get("cache") and inner:
        inner[-1] = {**inner[-1], "cache": part["cache"]}
    name = {"name": names[part["id"]]} if part["id"] in names else {}
    return {"role": "tool", "tool_call_id": part["id"], **name, "content": _write_chat_content(inner, "\n")}


def _write_chat_image(part: Json) -> Json:
    return {"type": "image_url", "image_url": {"url": data_url(part), **({"detail": part["detail"]} if part.get("detail") else {})}}


def _write_chat_file(part: Json) -> Json:
    if "file_id" in part:
        return {"type": "file", "file": {"file_id": part["file_id"]}}
    return {"type": "file", "file": {"filename": part.get("name") or part.get("title") or "document.pdf", "file_data": data_url(part)}}


_CHAT_PART_WRITERS: Mapping[str, Callable[[Json], Json]] = {
    "text": lambda part: {"type": "text", "text": part["text"]},
    "image": _write_chat_image,
    "file": _write_chat_file,
    "audio": lambda part: {"type": "input_audio", "input_audio": {"data": part["data"], "format": part["format"]}},
    "video": lambda part: dict(part["raw"]),
}


def _write_chat_said(parts: Sequence[Json], profile: Profile) -> Json:
    """The message of an assistant turn; thinking in the field in which the provider wants it back."""
    refusals = [part["text"] for part in parts if part["type"] == "refusal"]
    spoken = ("text",) if profile.vendor else ("text", "refusal")
    texts = [{**part, "type": "text"} for part in parts if part["type"] in spoken]
    calls = [_write_chat_call(part) for part in parts if part["type"] == "call"]
    thoughts = [part for part in parts if part["type"] == "think"]
    message: Json = {"role": "assistant", "content": _write_chat_content(texts, "\n") if texts else profile.null_content if calls else None}
    details = [entry for part in thoughts for entry in part.get("details", ())]
    if details:
        message["reasoning_details"] = details
    elif thoughts and profile.replay in ("reasoning_content", "reasoning"):
        message[profile.replay] = "\n".join(part["text"] for part in thoughts)
    if refusals and profile.vendor:
        message["refusal"] = "\n".join(refusals)
    sound = next((part["id"] for part in parts if part["type"] == "audio" and part.get("id")), None)
    if sound:
        message["audio"] = {"id": sound}
    return {**message, "tool_calls": calls} if calls else message


def _write_chat_call(part: Json) -> Json:
    if part["kind"] == "custom":
        written: Json = {"id": part["id"], "type": "custom", "custom": {"name": part["name"], "input": freeform_text(part["args"])}}
    else:
        written = {"id": part["id"], "type": "function", "function": {"name": part["name"], "arguments": "{}" if is_blank(part["args"]) else part["args"]}}
    return {**written, "extra_content": part["note"]["data"]} if part.get("note") else written


# ---- Translation: answers read

@dataclass(slots=True)
class _ChatCall:
    """One call of a stream, as its provider tells it apart from others."""
    key: int
    place: tuple[Any, Any]                    #: number of the choice, index
    id: str = ""
    name: str = ""                            #: fragments so far, for providers that cut names
    sent: str = ""                            #: arguments so far, for providers that repeat them
    freeform: list[str] | None = None         #: text of a freeform call; its arguments are known at its end


class _OfferedTools:
    """The names of a request's tools, for `in` alone."""

    __slots__ = ("_names",)

    def __init__(self, names: Names) -> None:
        self._names = names

    def __contains__(self, name: Any) -> bool:
        return isinstance(name, str) and self._names.back(name)[2] != ""


_CONTENT_KEY = re.compile(r'"content"\s*:\s*"')
_scan_string: Callable[[str, int, bool], tuple[str, int]] = json.decoder.scanstring     # type: ignore[attr-defined]
_CHAT_DONE = Event("", "[DONE]", b"")


class ChatStreamReader:
    """A provider's Chat stream as deltas.

    Nothing final is said at a finish reason: usage and errors may follow it.  An event that is the last plain one with another text is not parsed,
    only its string.  `done`: the end mark or an error has come, close() may be called.
    """

    __slots__ = ("done", "_out", "_source", "_splitter", "_prefix", "_suffix", "_around", "_calls", "_plain", "_details", "_refused", "_cited", "_sources", "_ended")

    def __init__(self, source: Source) -> None:
        self.done = False
        self._out = Serialiser(source)
        self._source = source
        self._splitter: TagSplitter | None = TagSplitter("open" if source.profile.think_open else "auto")   # None: thinking comes by a field
        self._prefix = self._suffix = ""         # what the last event of plain text had around its text
        self._around: tuple[bytes, bytes] | None = None      # the same of its whole frame
        self._calls: list[_ChatCall] = []
        self._plain = False                      # thinking came as plain text, reasoning_details only repeat it
        self._details: list[Json] = []           # entries that seal the thinking under way
        self._refused = self._cited = False
        self._sources: list[Any] = []            # citations that stand outside the text
        self._ended = False

    @property
    def counted(self) -> Json:
        """What the provider has counted so far."""
        return self._out.counted

    def feed(self, event: Event) -> list[Json]:
        """The deltas of one event."""
        data = event.data
        if self._prefix and data.startswith(self._prefix) and not event.name:
            text = self._same_but_text(data)
            if text is not None:
                self._say(text)
                return self._out.take()
        data = data.strip()
        if self.done or not data:
            return []
        self._prefix = ""
        if data == "[DONE]":
            self.done = self._ended = True
            return []
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            chunk = None
        if event.name == "error":
            chunk = chunk if find_chat_error(chunk) is not None else {"error": chunk or data[:200]}
        deltas = self.take(chunk)
        if not self.done:
            self._learn(chunk, data)
            framed = self._prefix and event.raw == b"data: %b\n\n" % data.encode("utf-8", "replace")
            self._around = (b"data: " + self._prefix.encode(), b'"%b\n\n' % self._suffix.encode()) if framed else None
        return deltas

    def feed_run(self, block: bytes, position: int) -> tuple[list[Json], int]:
        """The deltas of a run of plain text events in a block of whole frames, and where it ends; ([], position) where none begins."""
        if self._around is None or not self._prefix or self.done or self._details or (self._splitter and not self._splitter.is_off):
            return [], position
        texts, end = read_alike(block, position, *self._around)
        if texts:
            self._out.text("".join(texts), texts)
        return self._out.take() if texts else [], end

    def take(self, chunk: Any) -> list[Json]:
        """The deltas of one chunk that is parsed already."""
        found = find_chat_error(chunk)
        if isinstance(chunk, dict):
            self._count(chunk)
        if found is not None or not isinstance(chunk, dict):
            self._fail(found if found is not None else {"error": "provider sent something that is not JSON"})
            return self._out.take()
        choices = chunk.get("choices")
        if choices:
            self._out.start(str(chunk.get("id") or ""), str(chunk.get("model") or ""))
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict) and (not choice.get("index") or self._source.profile.merge_choices):
                self._take_choice(choice)
        self._sources = chunk.get("search_results") or chunk.get("citations") or self._sources
        return self._out.take()

    def close(self) -> list[Json]:
        """What is owed at the end: what was kept back, usage and the stop; or an error when the stream was cut."""
        self.done = True
        if self._ended or self._out.finished is not None:
            for kind, text in self._splitter.close() if self._splitter else ():
                self._tell(kind, text)
            self._end_calls()
            self._cite_sources()
        return self._out.close(ended=self._ended)

    def _same_but_text(self, data: str) -> str | None:
        """The text of an event that is otherwise the same as the last plain one, None for any other."""
        try:
            text, end = _scan_string(data, len(self._prefix), True)
        except ValueError:
            return None
        return text if data[end:] == self._suffix else None

    def _learn(self, chunk: Json, data: str) -> None:
        """Keep what stands around the text of an event that says nothing but its text."""
        choices = chunk.get("choices")
        choice = _chat_object(choices[0]) if isinstance(choices, list) and len(choices) == 1 else {}
        delta = choice.get("delta")
        if not isinstance(delta, dict) or not isinstance(delta.get("content"), str) or choice.get("finish_reason") or choice.get("index"):
            return
        if data.count('"content"') != 1:
            return
        start = _CONTENT_KEY.search(data)
        if start and not any(delta.get(name) for name in _CHAT_DELTA_FIELDS):
            self._prefix = data[:start.end()]
            self._suffix = data[_scan_string(data, start.end(), True)[1]:]

    def _count(self, chunk: Json) -> None:
        """Usage, wherever a provider puts it; cumulative ones replace each other."""
        usage = chunk.get("usage")
        if not usage:
            choices = chunk.get("choices")
            usage = _chat_object(chunk.get("x_groq")).get("usage") or (_chat_object(choices[0]).get("usage") if isinstance(choices, list) and choices else None)
        if usage:
            self._out.usage(read_usage("chat", usage))

    def _take_choice(self, choice: Json) -> None:
        delta = choice.get("delta")
        delta = delta if isinstance(delta, dict) else _chat_object(choice.get("message"))
        if delta.keys() - _CHAT_SPOKEN:
            self._take_more(delta, choice.get("index"))
        else:
            self._take_content(delta.get("content"))
        word = choice.get("finish_reason")
        if word and not self._out.finished:
            self._finish(word, choice.get("stop_reason"))

    def _take_more(self, delta: Json, number: Any) -> None:
        """A delta with more than text, in the order in which its fields belong."""
        name = next((name for name in _CHAT_THINK_FIELDS if isinstance(delta.get(name), str) and delta[name]), "")
        if name:
            self._plain = True
            self._think(delta[name], name)
        if isinstance(delta.get("reasoning_details"), list):
            self._take_details(delta["reasoning_details"])
        if delta.get("reasoning_opaque"):
            self._out.seal_later({"field": "reasoning_opaque", "data": delta["reasoning_opaque"]})
        self._take_content(delta.get("content"))
        if isinstance(delta.get("refusal"), str) and delta["refusal"]:
            self._refused = True
            self._out.refuse(delta["refusal"])
        for annotation in delta["annotations"] if isinstance(delta.get("annotations"), list) else ():
            self._cite(_chat_inner(_chat_object(annotation), "url_citation"))
        for name in _CHAT_MEDIA:
            if delta.get(name):
                self._out.opaque("chat", {name: delta[name]})
        for call in delta["tool_calls"] if isinstance(delta.get("tool_calls"), list) else ():
            if isinstance(call, dict):
                self._take_call(call, number)
        if isinstance(delta.get("function_call"), dict):
            self._take_call({"index": "function_call", "function": delta["function_call"]}, number)

    def _take_content(self, content: Any) -> None:
        if isinstance(content, str):
            self._say(content)
        elif isinstance(content, list):
            for part in content:
                if isinstance(part, str) or isinstance(part, dict) and part.get("type") == "text":
                    self._say(part if isinstance(part, str) else str(part.get("text") or ""))
                elif isinstance(part, dict) and part.get("type") == "thinking":
                    self._think(_chat_thought_text(part.get("thinking")), "thinking")

    def _say(self, text: str) -> None:
        if not text:
            return
        if self._details:
            self._details = []
        if self._splitter is None:
            self._out.text(text)
        else:
            for kind, piece in self._splitter.feed(text):
                self._tell(kind, piece)

    def _tell(self, kind: str, text: str) -> None:
        """A piece of content; thinking inside tags counts as reasoning_content, which is where most servers put it."""
        if kind == "text":
            self._out.text(text)
        else:
            self._out.think(text, "reasoning_content")

    def _think(self, text: str, field_name: str) -> None:
        """Thinking by a field: tags in the content mean nothing from here on."""
        if self._splitter is not None and not is_blank(text):
            for kind, piece in self._splitter.close():
                self._tell(kind, piece)
            self._splitter = None
        self._out.think(text, field_name)

    def _take_details(self, entries: list[Any]) -> None:
        for entry in entries:
            if not isinstance(entry, dict):
                continue
            text = entry.get("text") or entry.get("summary")
            if isinstance(text, str) and not self._plain:
                self._think(text, "reasoning_details")
            if entry.get("signature") or entry.get("data"):
                self._details.append(rest_of(entry, ("text", "summary")))
                self._out.seal_later({"field": "reasoning_details", "data": list(self._details)})

    def _cite(self, told: Json) -> None:
        if isinstance(told.get("url"), str) and told["url"]:
            self._cited = True
            span = {name: told[key] for name, key in (("start", "start_index"), ("end", "end_index")) if isinstance(told.get(key), int)}
            self._out.cite({"url": told["url"], "title": str(told.get("title") or ""), **span})

    def _cite_sources(self) -> None:
        """Citations that stand beside the answer, when none stood in it."""
        for told in self._sources if isinstance(self._sources, list) and not self._cited else ():
            self._cite({"url": told} if isinstance(told, str) else _chat_object(told))

    def _take_call(self, call: Json, number: Any) -> None:
        inner = call.get("function") or call.get("custom")
        inner = inner if isinstance(inner, dict) else {}
        call_id = "" if empty_id(call.get("id")) else call["id"]
        name = inner["name"] if isinstance(inner.get("name"), str) else ""
        value = inner.get("arguments", inner.get("input"))
        known = self._find_call(call_id, call.get("index"), bool(name), number)
        if "custom" in call and known.freeform is None:
            known.freeform = []
        if self._source.profile.name_fragments:
            known.name += name if name != known.name else ""
            name = known.name if value else ""
        self._details = []
        self._out.call(known.key, call_id, name, "function" if known.freeform is None else "custom")
        if call.get("extra_content"):
            self._out.note(known.key, call["extra_content"])
        if value is not None:
            self._take_args(known, value)

    def _find_call(self, call_id: str, index: Any, named: bool, number: Any) -> _ChatCall:
        """The call that a fragment belongs to, a new one where it cannot be an earlier one's."""
        same = next((call for call in self._calls if call_id and call.id == call_id), None)
        if same is not None:
            return same
        place = (number, index)
        last = next((call for call in reversed(self._calls) if index is None or call.place == place), None)
        if last is not None and index is None and not (call_id or named):
            return last
        if last is not None and index is not None and not (call_id and last.id) and not (
                named and not call_id and self._out.named(last.key) and self._out.whole(last.key)):
            last.id = last.id or call_id
            return last
        self._end_calls()
        self._calls.append(_ChatCall(len(self._calls), place, call_id))
        return self._calls[-1]

    def _take_args(self, call: _ChatCall, value: Any) -> None:
        text = args_text(value)
        if call.freeform is not None:
            call.freeform.append(text)
            return
        if not isinstance(value, str) and self._out.whole(call.key):
            return
        if self._source.profile.repeats_args:
            if call.sent and text == call.sent:
                return
            call.sent += text
        self._out.args(call.key, text)

    def _end_calls(self) -> None:
        """What calls so far had kept back: a name in pieces, freeform text."""
        for call in self._calls:
            if call.name:
                self._out.call(call.key, call.id, call.name)
            if call.freeform:
                self._out.args(call.key, freeform_args("".join(call.freeform)))
                call.freeform = []

    def _finish(self, word: Any, stopped_by: Any) -> None:
        reason = read_stop_reason("chat", word)
        if reason == "error":
            self._fail({"error": f'The provider stopped with "{word}".'})
        elif reason == "end" and self._refused:
            self._out.finish("refusal")
        elif reason == "end" and isinstance(stopped_by, str) and stopped_by:
            self._out.finish("sequence", stopped_by)
        else:
            self._out.finish(reason)

    def _fail(self, found: Json) -> None:
        """An error in the stream; behind a finish reason it changes nothing that was said."""
        self.done = True
        if self._out.finished is None and not self._recover(found):
            self._out.fail(_read_chat_error(found))

    def _recover(self, found: Json) -> bool:
        """Whether the error holds a call that Groq would not pass on and the request's own tools can answer: then that is the answer."""
        generation = _chat_object(found.get("error")).get("failed_generation")
        offered: Any = _OfferedTools(self._source.names)
        call = recover_call(generation, offered) if not self._calls else None
        if call is None:
            return False
        self._out.call("recovered", "", call[0])
        self._out.args("recovered", call[1])
        self._out.finish("tool")
        return True


#: What a delta may hold without being more than text.
_CHAT_SPOKEN = frozenset({"role", "content"})
_CHAT_MEDIA = ("images", "audio")
#: Fields of a delta that say something beside its text.
_CHAT_DELTA_FIELDS = (*_CHAT_THINK_FIELDS, *_CHAT_MEDIA, "reasoning_details", "reasoning_opaque", "refusal", "annotations", "tool_calls", "function_call")


def _read_chat_error(found: Json) -> Json:
    """The error delta for what find_chat_error found."""
    status, choices = found.get("base_resp"), found.get("choices")
    if isinstance(status, dict) and not found.get("error"):
        return read_error({"message": status.get("status_msg"), "code": status.get("status_code")})
    inside = _chat_object(choices[0]).get("error") if isinstance(choices, list) and choices and not found.get("error") else None
    return read_error({"error": inside} if inside else found)


def chat_read_answer(body: Any, source: Source) -> list[Json]:
    """The deltas of a whole answer, as a stream whose one chunk holds all of it."""
    reader = ChatStreamReader(source)
    return [*reader.take(_answer_chunk(body)), *reader.feed(_CHAT_DONE), *reader.close()]


def _answer_chunk(body: Any) -> Any:
    """The body as a chunk: messages for deltas, their calls numbered."""
    if not isinstance(body, dict) or not isinstance(body.get("choices"), list):
        return body
    choices = [choice for choice in body["choices"] if isinstance(choice, dict)]
    return {**body, "choices": [{**choice, "delta": _numbered_calls(_chat_object(choice.get("message")))} for choice in choices]}


def _numbered_calls(message: Json) -> Json:
    """The message with an index for each call, and without ids that repeat: in a whole message every entry is a call of its own."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    seen: set[Any] = set()
    numbered = []
    for index, call in enumerate(calls):
        if isinstance(call, dict):
            repeated = isinstance(call.get("id"), str) and call["id"] in seen
            numbered.append({**call, "index": index, "id": None if repeated else call.get("id")})
            seen.add(str(call.get("id")))
    return {**message, "tool_calls": numbered}


# ---- Translation: answers written for a client

_KEEP_ALIVE = b": keep-alive\n\n"


class ChatStreamWriter:
    """Hub deltas as a Chat client's stream.  A delta of text is bytes around one escaped string."""

    __slots__ = ("_asked", "_head", "_tail", "_end", "_said", "_takes", "_call", "_freeform", "_usage", "_wants_usage", "_hides",
                 "_refused", "_n_calls", "_n_seals", "_n_cites", "_started", "_ended")

    def __init__(self, asked: Asked, stamp: Json | None = None) -> None:
        """stamp: what every chunk has besides its choices, where a stream has begun already."""
        stamp = stamp or {"id": mint("chatcmpl-", asked.seed), "object": "chat.completion.chunk", "created": asked.created_s, "model": asked.hub["model"]}
        self._asked = asked
        self._wants_usage = bool((asked.hub.get("meta") or {}).get("include_usage"))
        self._hides = (asked.hub.get("think") or {}).get("show") == "omitted"
        self._head = b"data: " + dump_json(stamp)[:-1] + b',"choices":['
        self._end = b']' + (b',"usage":null' if self._wants_usage else b"") + b"}\n\n"
        self._tail = b',"logprobs":null,"finish_reason":null}' + self._end
        self._said = {kind: (self._head + b'{"index":0,"delta":{"%s":' % name, b"}" + self._tail)
                      for kind, name in (("text", b"content"), ("think", b"reasoning_content")) if not (self._hides and kind == "think")}
        self._takes: Mapping[str, tuple[bytes, bytes]] = {}      # kinds of delta that need no thought now, with what goes around their text
        self._call = ""             # the open call: bare (no arguments yet), live, freeform, unsaid; "" for none
        self._freeform: list[str] = []
        self._usage: Json = {}
        self._refused = self._started = self._ended = False
        self._n_calls = self._n_seals = self._n_cites = 0

    def feed(self, delta: Json) -> list[bytes]:
        """The frames of one delta."""
        kind = delta["delta"]
        around = self._takes.get(kind)
        if around is not None:
            return [write_alike(around[0], delta.get("pieces") or (delta["text"],), around[1])]
        if "pieces" in delta:
            return [frame for text in delta["pieces"] for frame in self.feed(text_delta(text))]
        if self._ended:
            return []
        begun = []
        if not self._started and kind != "error":
            self._started, self._takes = True, self._said
            begun = [self._chunk({"role": "assistant", "content": ""})]
        write = self.WRITES.get(kind)
        return begun + (write(self, delta) if write else [])

    def close(self) -> list[bytes]:
        """What is owed when no more deltas come: nothing, unless they ended without a stop."""
        return [] if self._ended else self.feed(error_delta(502, "upstream closed the stream before finishing"))

    def keep_alive(self) -> bytes:
        """A comment, for silences."""
        return _KEEP_ALIVE

    def error(self, error: GatewayError) -> bytes:
        """The event that ends a broken stream; no end mark follows it."""
        self._ended, self._takes = True, {}
        return write_event(chat_error(error))

    def _chunk(self, delta: Json) -> bytes:
        return self._head + b'{"index":0,"delta":' + dump_json(delta) + self._tail

    def _shut(self) -> list[bytes]:
        """The end of an open call: the arguments it still owes."""
        call, self._call, self._takes = self._call, "", self._said
        if call == "freeform":
            text, self._freeform = freeform_text("".join(self._freeform)), []
            return [self._chunk({"tool_calls": [{"index": self._n_calls - 1, "custom": {"input": text}}]})]
        return [b'"{}"'.join(self._around_args())] if call == "bare" else []

    def _around_args(self) -> tuple[bytes, bytes]:
        if self._asked.hub.get("legacy"):
            return self._head + b'{"index":0,"delta":{"function_call":{"arguments":', b"}}" + self._tail
        return self._head + b'{"index":0,"delta":{"tool_calls":[{"index":%d,"function":{"arguments":' % (self._n_calls - 1), b"}}]}" + self._tail

    def _write_start(self, delta: Json) -> list[bytes]:
        return self._write_usage(delta.get("usage") or {})

    def _write_said(self, delta: Json) -> list[bytes]:
        """Text or thinking behind a call; or thinking that is not to be shown."""
        shut, around = self._shut(), self._said.get(delta["delta"])
        return [*shut, around[0] + dump_json(delta["text"]) + around[1]] if around else shut

    def _write_refusal(self, delta: Json) -> list[bytes]:
        self._refused = True
        return [*self._shut(), self._chunk({"refusal": delta["text"]})]

    def _write_seal(self, delta: Json) -> list[bytes]:
        details = [] if self._hides else _chat_details(delta, self._n_seals)
        self._n_seals += bool(details)
        return [*self._shut(), *([self._chunk({"reasoning_details": details})] if details else [])]

    def _write_call(self, delta: Json) -> list[bytes]:
        shut = self._shut()
        custom, legacy = delta["kind"] == "custom", self._asked.hub.get("legacy")
        self._n_calls += 1
        self._takes = {}
        self._call = "unsaid" if legacy and self._n_calls > 1 else "freeform" if custom else "bare"     # the old form has room for one call
        if legacy:
            return shut if self._call == "unsaid" else [*shut, self._chunk({"function_call": {"name": delta["name"], "arguments": ""}})]
        inner = {"custom": {"name": delta["name"], "input": ""}} if custom else {"function": {"name": delta["name"], "arguments": ""}}
        return [*shut, self._chunk({"tool_calls": [{"index": self._n_calls - 1, "id": delta["id"], "type": "custom" if custom else "function", **inner}]})]

    def _write_args(self, delta: Json) -> list[bytes]:
        """The first arguments of a call; later ones go by `_takes`."""
        if self._call == "freeform":
            self._freeform.append(delta["text"])
        if self._call != "bare":
            return []
        self._call, self._takes = "live", {"args": self._around_args()}
        return self.feed(delta)

    def _write_note(self, delta: Json) -> list[bytes]:
        if self._asked.hub.get("legacy") or not self._n_calls:
            return []
        return [self._chunk({"tool_calls": [{"index": self._n_calls - 1, "extra_content": delta["data"]}]})]

    def _write_cite(self, delta: Json) -> list[bytes]:
        self._n_cites += 1          # the openai SDK breaks at the second entry of a list without index
        return [*self._shut(), self._chunk({"annotations": [{"index": self._n_cites - 1, **_chat_annotation(delta)}]})]

    def _write_opaque(self, delta: Json) -> list[bytes]:
        return [*self._shut(), *([self._chunk(delta["data"])] if delta["family"] == "chat" else [])]

    def _write_usage(self, usage: Json) -> list[bytes]:
        self._usage = merge_usage(self._usage, usage)
        return []

    def _write_stop(self, delta: Json) -> list[bytes]:
        frames = self._shut()
        word, refusal = _chat_stop(delta, self._refused, self._asked.hub.get("legacy"))
        if refusal:
            frames.append(self._chunk({"refusal": refusal}))
        frames.append(self._head + b'{"index":0,"delta":{},"logprobs":null,"finish_reason":' + dump_json(word) + b"}" + self._end)
        if self._wants_usage:
            frames.append(self._head + b'],"usage":' + dump_json(write_usage("chat", self._usage)) + b"}\n\n")
        self._ended, self._takes = True, {}
        return [*frames, b"data: [DONE]\n\n"]

    def _write_error(self, delta: Json) -> list[bytes]:
        return [self.error(_delta_error(delta))]

    #: Hub deltas by kind, those that `_takes` does not see to.
    WRITES: Mapping[str, Callable[[ChatStreamWriter, Json], list[bytes]]] = {
        "start": _write_start, "text": _write_said, "think": _write_said, "refuse": _write_refusal, "seal": _write_seal, "call": _write_call,
        "args": _write_args, "note": _write_note, "cite": _write_cite, "opaque": _write_opaque,
        "usage": _write_usage, "stop": _write_stop, "error": _write_error,
    }


def chat_take_up(sent: bytes, asked: Asked) -> tuple[ChatStreamWriter, str] | None:
    """(a writer that goes on with a stream that broke off inside its text, that text); None where it did not, or holds more than thinking and one text."""
    pieces: list[str] = []
    stamp: Json = {}
    for chunk in _sent_chunks(sent):
        choices = chunk.get("choices")
        if choices == []:
            continue
        choice = choices[0] if isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict) else {"index": None}
        delta = _chat_object(choice.get("delta"))
        if choice.get("index") != 0 or choice.get("finish_reason") or any(delta.get(name) for name in _CONTENT_FIELDS if name not in _BEFORE_TEXT):
            return None
        text, thinks = delta.get("content"), any(delta.get(name) for name in _BEFORE_TEXT[1:])
        if not isinstance(text, (str, type(None))) or thinks and (pieces or text):
            return None
        if text:
            pieces.append(text)
            stamp = {name: value for name, value in chunk.items() if name not in ("choices", "usage")}
    if "<think" in "".join(pieces) or not stamp:
        return None
    writer = ChatStreamWriter(asked, stamp)
    writer.feed(start_delta("", ""))
    return writer, "".join(pieces)


#: What a delta may hold besides nothing for its stream to be taken up: text, and thinking before it.
_BEFORE_TEXT = ("content", "reasoning_content", "reasoning", "reasoning_text", "reasoning_details", "thinking")


def _sent_chunks(sent: bytes) -> Iterator[Json]:
    """The objects of a stream as the client has it."""
    for frame in split_frames(sent):
        data = read_frame(frame).data
        if data:
            yield _chat_object(json.loads(data))


def _delta_error(delta: Json) -> GatewayError:
    return GatewayError(delta["message"], delta["status"], delta["code"], delta["type"])


def _chat_details(record: Json, number: int) -> list[Json]:
    """The reasoning_details of a seal, numbered where they are of our making."""
    details = details_of(record)
    return details if record.get("field") == "reasoning_details" else [{**entry, "index": number} for entry in details]


def _chat_annotation(cite: Json) -> Json:
    span = {"start_index": cite.get("start") or 0, "end_index": cite.get("end") or 0}
    return {"type": "url_citation", "url_citation": {**span, "url": cite["url"], "title": cite.get("title") or ""}}


def _chat_stop(stop: Json, refused: bool, legacy: Any) -> tuple[str, str]:
    """(finish_reason, refusal still to be told): a refusal whose words are not known at all shows as content_filter."""
    reason = stop["reason"]
    if reason == "refusal" and not refused:
        explanation = _chat_object(stop.get("details")).get("explanation")
        return ("stop", explanation) if isinstance(explanation, str) and explanation else ("content_filter", "")
    return "function_call" if reason == "tool" and legacy else WRITE_STOPS["chat"][reason], ""


def chat_write_answer(deltas: Iterable[Json], asked: Asked) -> Json:
    """The body of an answer that is not streamed; the error's envelope when there was one."""
    told = list(deltas)
    end = told[-1] if told and told[-1]["delta"] in ("stop", "error") else error_delta(502, "upstream closed the stream before finishing")
    if end["delta"] == "error":
        return chat_error(_delta_error(end))
    usage: Json = {}
    for delta in told:
        if delta["delta"] in ("start", "usage"):
            usage = merge_usage(usage, delta if delta["delta"] == "usage" else delta.get("usage") or {})
    message = _write_chat_answer(fold_deltas(told), asked)
    word, refusal = _chat_stop(end, bool(message["refusal"]), asked.hub.get("legacy"))
    message["refusal"] = message["refusal"] or refusal or None
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": word}
    return {"id": mint("chatcmpl-", asked.seed), "object": "chat.completion", "created": asked.created_s, "model": asked.hub["model"], "choices": [choice],
            "usage": write_usage("chat", usage)}


def _write_chat_answer(parts: Sequence[Json], asked: Asked) -> Json:
    """The message of a whole answer."""
    texts = {kind: "".join(part["text"] for part in parts if part["type"] == kind) for kind in ("text", "refusal", "think")}
    calls = [_write_chat_call(part) for part in parts if part["type"] == "call"]
    message: Json = {"role": "assistant", "content": texts["text"] or (None if calls or texts["refusal"] else ""), "refusal": texts["refusal"] or None,
                     "annotations": [_chat_annotation(cite) for part in parts for cite in part.get("cites", ())]}
    if (asked.hub.get("think") or {}).get("show") != "omitted":
        details: list[Json] = []
        n_seals = 0
        for part in parts:
            sealed = _chat_details(part["seal"], n_seals) if part["type"] == "think" and "seal" in part else []
            details += sealed
            n_seals += bool(sealed)
        message |= {name: value for name, value in (("reasoning_content", texts["think"]), ("reasoning_details", details)) if value}
    for part in parts:
        if part["type"] == "opaque" and part["family"] == "chat":
            for name, value in part["data"].items():
                message[name] = _chat_joined(message.get(name), value)
    if calls and asked.hub.get("legacy"):
        return {**message, "function_call": calls[0].get("function")}
    return {**message, "tool_calls": calls} if calls else message


def _chat_joined(old: Any, new: Any) -> Any:
    """Pieces of media put together: lists and texts behind each other, objects field by field."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {**old, **{name: _chat_joined(old.get(name), value) if name in ("data", "transcript") else value for name, value in new.items()}}
    if isinstance(old, str) and isinstance(new, str):
        return old + new
    return [*old, *new] if isinstance(old, list) and isinstance(new, list) else new


##############################################################################
# 11. OpenAI Responses                                      pure | uses 1-2, 8-9
##############################################################################
# Responses as clients send it and providers answer it: requests are lists of items, answers too, streams tell of each item's birth,
# growth and end.  Items live by output_index, since some providers change an item's id between events; what `output_item.done` holds is
# the truth, the deltas before it are display.  The writer has one open item; deltas of text are bytes around one escaped string.
# Before editing: Codex runs a tool call as soon as it sees its output_item.done, so nothing half-made may be closed.
# Source: OpenAI API reference, Responses, and SDK types, read 2026-11.  Guarded by tests/test_format_responses.py.
# One more kind of item: a row in _ITEM_READERS for requests, in _CALL_ITEM_KINDS if clients run it; what has no row is opaque or dropped by name.

# ---- What a request must look like

_RESPONSES_ROLES = frozenset({"user", "assistant", "system", "developer"})
_RESPONSES_FIELDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "model": ((str,), "a string"),
    "input": ((str, list), "a string or a list"),
    "instructions": ((str, list), "a string"),
    "stream": ((bool,), "a boolean"),
    "stream_options": ((dict,), "an object"),
    "max_output_tokens": ((int,), "an integer"),
    "max_tool_calls": ((int,), "an integer"),
    "temperature": ((int, float), "a number"),
    "top_p": ((int, float), "a number"),
    "top_logprobs": ((int,), "an integer"),
    "tools": ((list,), "a list"),
    "tool_choice": ((str, dict), "a string or an object"),
    "parallel_tool_calls": ((bool,), "a boolean"),
    "reasoning": ((dict,), "an object"),
    "text": ((dict,), "an object"),
    "include": ((list,), "a list"),
    "store": ((bool,), "a boolean"),
    "background": ((bool,), "a boolean"),
    "previous_response_id": ((str,), "a string"),
    "metadata": ((dict,), "an object"),
    "user": ((str,), "a string"),
    "prompt_cache_key": ((str,), "a string"),
    "safety_identifier": ((str,), "a string"),
    "service_tier": ((str,), "a string"),
    "truncation": ((str,), "a string"),
    "prompt": ((dict,), "an object"),
}
#: Any of these makes a request without input whole: the provider holds it.
_STATE_FIELDS = ("previous_response_id", "prompt", "conversation")


def check_responses_request(body: Any) -> Json:
    """The body when it is a Responses request by its structure. Raises GatewayError 400 that names the first field that is not."""
    if not isinstance(body, dict):
        raise bad_request("The body must be a JSON object.")
    for name, value in body.items():
        types, expected = _RESPONSES_FIELDS.get(name, ((object,), ""))
        if value is not None and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types and object not in types)):
            raise bad_request(f"{name} must be {expected}.", param=name, code="invalid_type")
    if body.get("max_output_tokens") is not None and body["max_output_tokens"] < 1:
        raise bad_request("max_output_tokens must be at least 1.", param="max_output_tokens", code="invalid_value")
    items = body.get("input")
    if not items and not any(body.get(name) for name in _STATE_FIELDS):
        raise bad_request("input must be a string or a list with at least one item.", param="input", code="missing_required_parameter")
    for index, item in enumerate(items if isinstance(items, list) else ()):
        _check_item(item, f"input[{index}]")
    for index, tool in enumerate(body.get("tools") or ()):
        _check_responses_tool(tool, f"tools[{index}]")
    return body


def _check_item(item: Any, where: str) -> None:
    if not isinstance(item, dict) or not isinstance(item.get("type", "message"), str):
        raise bad_request(f"{where} must be an object with a type.", param=where, code="invalid_type")
    if item.get("type", "message") == "message":
        role, content = item.get("role"), item.get("content")
        if not isinstance(role, str) or role not in _RESPONSES_ROLES:
            raise bad_request(f"{where}.role must be one of {', '.join(sorted(_RESPONSES_ROLES))}.", param=f"{where}.role", code="invalid_value")
        if content is None and role != "assistant":
            raise bad_request(f"{where}.content is missing.", param=f"{where}.content", code="missing_required_parameter")
        if content is not None and not isinstance(content, str):
            _check_item_parts(content, f"{where}.content")
    elif item["type"] in ("function_call", "custom_tool_call") and not isinstance(item.get("name"), str):
        raise bad_request(f"{where}.name is missing.", param=f"{where}.name", code="missing_required_parameter")
    elif item["type"] in ("function_call_output", "custom_tool_call_output") and isinstance(item.get("output"), list):
        _check_item_parts(item["output"], f"{where}.output")


def _check_item_parts(parts: Any, where: str) -> None:
    if not isinstance(parts, list) or any(not isinstance(part, dict) or not isinstance(part.get("type"), str) for part in parts):
        raise bad_request(f"{where} must be a string or a list of parts with a type.", param=where, code="invalid_type")


def _check_responses_tool(tool: Any, where: str) -> None:
    if not isinstance(tool, dict) or not isinstance(tool.get("type", "function"), str):
        raise bad_request(f"{where} must be an object with a type.", param=where, code="invalid_type")
    kind = tool.get("type", "function")
    if kind in ("function", "custom") and not isinstance(_nested_form(tool, kind).get("name"), str):
        raise bad_request(f"{where}.name is missing.", param=f"{where}.name", code="missing_required_parameter")
    if kind == "namespace":
        if not isinstance(tool.get("name"), str) or not isinstance(tool.get("tools"), list):
            raise bad_request(f"{where} must be a namespace with a name and tools.", param=where, code="invalid_type")
        for index, member in enumerate(tool["tools"]):
            _check_responses_tool(member, f"{where}.tools[{index}]")


def check_responses_state(body: Json) -> None:
    """Raises GatewayError 400 for a request that only a provider which stores answers can serve; not to be asked when it goes there untouched."""
    previous = body.get("previous_response_id")
    if previous:
        raise bad_request(f"Previous response with id '{previous}' not found.", param="previous_response_id", code="previous_response_not_found")
    items = body.get("input")
    for index, item in enumerate(items if isinstance(items, list) else ()):
        if item.get("type") == "item_reference":
            raise bad_request("item references need a provider that stores responses", param=f"input[{index}]", code="unsupported_value")


def _nested_form(value: Json, name: str) -> Json:
    """The object under `name`, where clients that mix formats put it, else the object itself."""
    inner = value.get(name)
    return inner if isinstance(inner, dict) else value


def _dict_in(value: Json, name: str) -> Json:
    """The object under `name`, {} for anything else: what others send is never trusted to have its shape."""
    inner = value.get(name)
    return inner if isinstance(inner, dict) else {}


def _dicts_in(value: Json, name: str) -> list[Json]:
    """The objects in the list under `name`."""
    inner = value.get(name)
    return [item for item in inner if isinstance(item, dict)] if isinstance(inner, list) else []


def _str_in(value: Json, name: str) -> str:
    inner = value.get(name)
    return inner if isinstance(inner, str) else ""


# ---- Requests: body to hub

#: Fields that the hub has a place for; the others go to extra.
_RESPONSES_READ = frozenset((
    "model input instructions stream max_output_tokens temperature top_p tools tool_choice parallel_tool_calls reasoning text include store user safety_identifier "
    "prompt_cache_key service_tier metadata top_logprobs truncation previous_response_id").split())
#: Fields the answer repeats as they were asked, with what it says when they were not.
_ECHOED: Json = {
    "instructions": None, "max_output_tokens": None, "max_tool_calls": None, "metadata": {}, "parallel_tool_calls": True, "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None}, "service_tier": None, "store": False, "temperature": None, "text": {"format": {"type": "text"}}, "tool_choice": "auto",
    "tools": [], "top_logprobs": None, "top_p": None, "truncation": "disabled", "user": None, "prompt_cache_key": None, "safety_identifier": None, "background": False}

#: Names in the hub's meta of fields that are what they are.
_RESPONSES_META: Mapping[str, str] = {
    "user": "user", "safety": "safety_identifier", "cache_key": "prompt_cache_key", "tier": "service_tier", "metadata": "metadata", "top_logprobs": "top_logprobs"}

_INCLUDE_SEALS, _INCLUDE_LOGPROBS = "reasoning.encrypted_content", "message.output_text.logprobs"


def responses_read_request(body: Json) -> Json:
    """Hub request for a Responses body. Raises GatewayError 400 for what no provider could be sent.

    in:      {"input": str | [items], "instructions"?, "tools"?, ...}
    out:     hub request; "echo" holds the fields that the answer repeats, "extra" those only Responses providers understand.
    dropped: unknown items by their type, and compaction, which the writer of this section takes back where it can be told.
    """
    check_responses_request(body)
    check_responses_state(body)
    hub = new_hub("responses", body.get("model") or "", bool(body.get("stream")))
    hub["echo"] = {name: body[name] for name in _ECHOED if body.get(name) is not None}
    instructions = body.get("instructions")
    if instructions:
        hub["system"] = [text_part(instructions)] if isinstance(instructions, str) else _read_item_content(instructions, "instructions")
    merge_tools(hub, _read_responses_tools(body.get("tools") or ()))
    items = body.get("input") or []
    for index, item in enumerate([{"role": "user", "content": items}] if isinstance(items, str) else items):
        reader = _ITEM_READERS.get(item.get("type", "message"))
        if reader is None:
            drop(hub, f"input.{item['type']}")
        else:
            reader(hub, item, f"input[{index}]")
    _read_responses_options(hub, body)
    return hub


def _add_parts(hub: Json, role: str, *parts: Json) -> None:
    """More parts for the conversation, in the last turn when it has that role."""
    if hub["turns"] and hub["turns"][-1]["role"] == role:
        hub["turns"][-1]["parts"].extend(parts)
    else:
        hub["turns"].append({"role": role, "parts": list(parts)})


def _read_message_item(hub: Json, item: Json, where: str) -> None:
    role, parts = item["role"], _read_item_content(item.get("content"), f"{where}.content")
    if role in ("user", "assistant"):
        _add_parts(hub, role, *parts)
        return
    texts = [part for part in parts if part["type"] == "text"]
    drop(hub, *(f"input.{part['type']}" for part in parts if part["type"] != "text"))
    if any(part["type"] != "opaque" for turn in hub["turns"] for part in turn["parts"]):
        _add_parts(hub, "system", *texts)
    else:
        hub.setdefault("system", []).extend(texts)


def _read_item_content(content: Any, where: str) -> list[Json]:
    """Parts of a message or a tool's output: a string, a list of parts, or whatever else a tool gave as JSON."""
    if content is None:
        return []
    if isinstance(content, str):
        return [text_part(content)]
    if not isinstance(content, list):
        return [text_part(compact(content))]
    parts = []
    for index, part in enumerate(content):
        reader = _ITEM_PART_READERS.get(part["type"]) if isinstance(part, dict) and isinstance(part.get("type"), str) else None
        if reader is None:
            kind = part.get("type") if isinstance(part, dict) else part
            raise bad_request(f'{where}[{index}]: unknown part type "{kind}"', param=f"{where}[{index}]", code="invalid_value")
        parts.append(reader(part, f"{where}[{index}]"))
    return parts


def _read_item_text(part: Json, where: str) -> Json:
    return text_part(_str_in(part, "text"), {"type": "ephemeral"} if part.get("prompt_cache_breakpoint") else None)


def _read_item_image(part: Json, where: str) -> Json:
    detail = _str_in(part, "detail") or None
    url = _str_in(_dict_in(part, "image_url"), "url") or _str_in(part, "image_url")
    if url:
        return image_part(url, detail)
    if isinstance(part.get("file_id"), str):
        return {"type": "image", "file_id": part["file_id"], **({"detail": detail} if detail else {})}
    raise bad_request(f"{where}: image_url or file_id is required", param=where, code="missing_required_parameter")


def _read_item_file(part: Json, where: str) -> Json:
    name = {"name": part["filename"]} if isinstance(part.get("filename"), str) else {}
    if isinstance(part.get("file_data"), str):
        return file_part(part["file_data"], _str_in(part, "filename") or None)
    if isinstance(part.get("file_url"), str):
        return {"type": "file", "url": part["file_url"], **name}
    if isinstance(part.get("file_id"), str):
        return {"type": "file", "file_id": part["file_id"], **name}
    raise bad_request(f"{where}: file_data, file_url or file_id is required", param=where, code="missing_required_parameter")


def _read_item_audio(part: Json, where: str) -> Json:
    audio = _nested_form(part, "input_audio")
    return {"type": "audio", "data": _str_in(audio, "data"), "format": _str_in(audio, "format")}


_ITEM_PART_READERS: Mapping[str, Callable[[Json, str], Json]] = {
    "input_text": _read_item_text, "output_text": _read_item_text, "text": _read_item_text, "refusal": lambda part, where: {"type": "refusal", "text": _str_in(part, "refusal")},
    "input_image": _read_item_image, "image_url": _read_item_image, "input_file": _read_item_file, "input_audio": _read_item_audio}


def _joined_reasoning(item: Json) -> tuple[str, str]:
    """Summary and open thinking of a reasoning item, each in one string."""
    return "\n\n".join(_str_in(part, "text") for part in _dicts_in(item, "summary")), "".join(_str_in(part, "text") for part in _dicts_in(item, "content"))


def _read_reasoning_item(hub: Json, item: Json, where: str) -> None:
    seal = read_seal(item.get("encrypted_content"), "openai", "encrypted")
    summary, texts = _dicts_in(item, "summary"), _joined_reasoning(item)
    text = texts[0] or texts[1]
    if text or seal:
        _add_parts(hub, "assistant", {"type": "think", "text": text, **({"seal": seal} if seal else {}), **({"summary": summary} if len(summary) > 1 else {})})


def _read_function_call(hub: Json, item: Json, where: str) -> None:
    name, namespace = item["name"], _str_in(item, "namespace")
    part = call_part(_str_in(item, "call_id"), name, args_text(item.get("arguments")), "function", "" if namespace == name else namespace)
    # A tool that the hosted tool search loaded comes back in a namespace of its own name, which is not how it was offered.
    _add_parts(hub, "assistant", {**part, "raw": {"namespace": namespace}} if namespace and namespace == name else part)


def _read_custom_call(hub: Json, item: Json, where: str) -> None:
    text = item.get("input")
    args = freeform_args(text if isinstance(text, str) else args_text(text))
    _add_parts(hub, "assistant", call_part(_str_in(item, "call_id"), item["name"], args, "custom", _str_in(item, "namespace")))


def _read_shell_call(hub: Json, item: Json, where: str) -> None:
    _add_parts(hub, "assistant", call_part(_str_in(item, "call_id") or _str_in(item, "id"), "local_shell", _call_item_args(item), "shell"))


def _read_vendor_call(hub: Json, item: Json, where: str) -> None:
    name, args = ("shell", item.get("action")) if item["type"] == "shell_call" else ("apply_patch", item.get("operation"))
    _add_parts(hub, "assistant", {**call_part(_str_in(item, "call_id"), name, compact(args or {})), "raw": item})


def _read_search_call(hub: Json, item: Json, where: str) -> None:
    if _is_hosted_search(item):
        _read_hosted(hub, item, where)
    else:
        _add_parts(hub, "assistant", call_part(item["call_id"], "tool_search", _call_item_args(item), "search"))


def _is_hosted_search(item: Json) -> bool:
    """Whether the provider ran this tool search itself."""
    return item.get("execution") == "server" or not _str_in(item, "call_id")


def _read_output(hub: Json, item: Json, where: str) -> None:
    kind = {"custom_tool_call_output": "custom", "local_shell_call_output": "shell"}.get(item["type"], "function")
    call_id = _str_in(item, "call_id") or (_str_in(item, "id") if kind == "shell" else "")
    part = result_part(call_id, _read_item_content(item.get("output"), f"{where}.output"), kind=kind)
    _add_parts(hub, "user", part)


def _read_vendor_output(hub: Json, item: Json, where: str) -> None:
    output = item.get("output")
    text = output if isinstance(output, str) else compact(output) if output is not None else _str_in(item, "status")
    _add_parts(hub, "user", {**result_part(_str_in(item, "call_id"), [text_part(text)]), "raw": item})


def _read_search_output(hub: Json, item: Json, where: str) -> None:
    tools = _read_responses_tools(_dicts_in(item, "tools"))
    merge_tools(hub, [{**tool, "placed": True} for tool in tools])
    if _is_hosted_search(item):
        _read_hosted(hub, item, where)
    else:
        names = "\n".join(flat_name(tool["name"], tool.get("namespace", "")) for tool in tools)
        _add_parts(hub, "user", {**result_part(item["call_id"], [text_part(names)] if names else [], kind="search"), "raw": item})


def _read_more_tools(hub: Json, item: Json, where: str) -> None:
    merge_tools(hub, [{**tool, "placed": True} for tool in _read_responses_tools(_dicts_in(item, "tools"))])
    _add_parts(hub, "user", _opaque_item(item))


def _opaque_item(item: Json) -> Json:
    return {"type": "opaque", "family": "openai", "format": "responses", "data": item}


def _read_hosted(hub: Json, item: Json, where: str) -> None:
    """An item of a tool that the provider runs: its own family gets it back, others do not."""
    _add_parts(hub, "user" if item["type"] in _USER_ITEMS else "assistant", _opaque_item(item))


def _read_picture(hub: Json, item: Json, where: str) -> None:
    result = _str_in(item, "result")
    image = {"image": {"type": "image", "mime": f"image/{_str_in(item, 'output_format') or 'png'}", "data": result}} if result else {}
    _add_parts(hub, "user", {**_opaque_item(item), **image})


def _read_compaction(hub: Json, item: Json, where: str) -> None:
    if item["type"] == "compaction":
        drop(hub, "compaction")
    _add_parts(hub, "user", _opaque_item(item))


#: Items of a conversation that are not the model's.
_USER_ITEMS = frozenset({"mcp_approval_response", "computer_call_output"})

_ITEM_READERS: Mapping[str, Callable[[Json, Json, str], None]] = {
    "message": _read_message_item,
    "reasoning": _read_reasoning_item,
    "function_call": _read_function_call,
    "function_call_output": _read_output,
    "custom_tool_call": _read_custom_call,
    "custom_tool_call_output": _read_output,
    "local_shell_call": _read_shell_call,
    "local_shell_call_output": _read_output,
    "shell_call": _read_vendor_call,
    "shell_call_output": _read_vendor_output,
    "apply_patch_call": _read_vendor_call,
    "apply_patch_call_output": _read_vendor_output,
    "tool_search_call": _read_search_call,
    "tool_search_output": _read_search_output,
    "additional_tools": _read_more_tools,
    "image_generation_call": _read_picture,
    "compaction": _read_compaction,
    "compaction_trigger": _read_compaction,
    **dict.fromkeys(("web_search_call", "file_search_call", "code_interpreter_call", "mcp_list_tools", "mcp_call", "mcp_approval_request",
                     "mcp_approval_response", "computer_call", "computer_call_output", "program", "program_output"), _read_hosted),
}


def _read_responses_options(hub: Json, body: Json) -> None:
    """Everything beside the conversation and its tools."""
    choice = _read_responses_choice(body["tool_choice"]) if body.get("tool_choice") is not None else None
    found = {"choice": choice, "parallel": body.get("parallel_tool_calls"), "max_out": body.get("max_output_tokens"),
             "sampling": {name: body[name] for name in ("temperature", "top_p") if body.get(name) is not None} or None,
             "think": _read_reasoning_field(body.get("reasoning") or {}) or None, "format": _read_text_format(_dict_in(_dict_in(body, "text"), "format")) or None}
    hub.update({name: value for name, value in found.items() if value is not None})
    include = [name for name in body.get("include") or () if isinstance(name, str)]
    hub["meta"] = _read_responses_meta(body, include)
    extra = rest_of(body, _RESPONSES_READ)
    extra |= {"truncation": "auto"} if body.get("truncation") == "auto" else {}
    more = [name for name in include if name not in (_INCLUDE_SEALS, _INCLUDE_LOGPROBS)]
    more_reasoning = rest_of(body.get("reasoning") or {}, ("effort", "summary", "generate_summary"))
    extra |= {name: value for name, value in (("include", more), ("reasoning", more_reasoning)) if value}
    if extra:
        hub["extra"] = {"responses": extra}


def _read_responses_meta(body: Json, include: Sequence[str]) -> Json:
    meta = {name: body.get(field_name) for name, field_name in _RESPONSES_META.items()}
    meta |= {"metadata": body.get("metadata") or None, "store": body.get("store"), "verbosity": _str_in(_dict_in(body, "text"), "verbosity") or None,
             "logprobs": True if _INCLUDE_LOGPROBS in include or body.get("top_logprobs") else None}
    return {name: value for name, value in meta.items() if value is not None}


def _read_reasoning_field(reasoning: Json) -> Json:
    """What was asked of thinking: an effort asks for it, a summary alone leaves it to the model."""
    effort, show = _str_in(reasoning, "effort"), _str_in(reasoning, "summary") or _str_in(reasoning, "generate_summary")
    if effort == "none":
        return {"mode": "off"}
    shown = {"show": show} if show else {}
    return {"mode": "on", "effort": effort, **shown} if effort else {"mode": "auto", **shown} if show else {}


def _read_text_format(form: Json) -> Json:
    if form.get("type") not in ("json_schema", "json_object"):
        return {}
    if form["type"] == "json_object":
        return {"kind": "json"}
    inner = _nested_form(form, "json_schema")
    return {"kind": "schema", "schema": _dict_in(inner, "schema"), **{name: inner[name] for name in ("name", "strict", "description") if inner.get(name) is not None}}


_RESPONSES_CHOICES: Mapping[str, str] = {"auto": "auto", "none": "none", "required": "any", "any": "any"}


def _read_responses_choice(value: Any) -> Json | None:
    """The hub's choice; None for a word nobody knows."""
    if isinstance(value, str):
        return {"mode": _RESPONSES_CHOICES[value]} if value in _RESPONSES_CHOICES else None
    kind = value.get("type")
    if kind == "allowed_tools":
        allowed = _nested_form(value, "allowed_tools")
        names = [_responses_choice_name(tool) for tool in _dicts_in(allowed, "tools")]
        return {"mode": "any" if allowed.get("mode") == "required" else "auto", "allowed": names}
    if isinstance(kind, str) and kind in _RESPONSES_CHOICES:
        return {"mode": _RESPONSES_CHOICES[kind]}
    if kind in ("function", "custom", None):
        return {"mode": "tool", "name": _responses_choice_name(value), **({"kind": "custom"} if kind == "custom" else {})}
    return {"mode": "tool", "name": _responses_choice_name(value), "raw": value}


def _responses_choice_name(value: Json) -> str:
    kind = _str_in(value, "type") or "function"
    return _str_in(_nested_form(value, kind), "name") if kind in ("function", "custom") else _hosted_name(value)


def _hosted_name(raw: Json) -> str:
    """What the hub calls a hosted tool: its type, and for one of several MCP servers its label too."""
    return f"mcp_{raw['server_label']}" if raw.get("server_label") else str(raw.get("type"))


_STRING_LIST: Json = {"type": "array", "items": {"type": "string"}}
#: What functions that stand in for Codex' local shell take; the tool itself has no schema.
_LOCAL_SHELL_SCHEMA: Json = {
    "type": "object", "properties": {"command": _STRING_LIST, "workdir": {"type": "string"}, "timeout_ms": {"type": "integer"},
                                     "env": {"type": "object", "additionalProperties": {"type": "string"}}}, "required": ["command"]}


def _read_responses_tools(tools: Iterable[Json], namespace: str = "") -> list[Json]:
    """Hub tools, those of a namespace each on its own."""
    return [read for tool in tools for read in _read_responses_tool(tool, namespace)]


def _read_responses_tool(tool: Json, namespace: str) -> list[Json]:
    kind = tool.get("type") or "function"
    if kind == "namespace":
        return _read_responses_tools(_dicts_in(tool, "tools"), _str_in(tool, "name"))
    home = {"namespace": namespace} if namespace else {}
    if kind == "function":
        return [{**_read_flat_function(_nested_form(tool, "function")), **home, **_responses_tool_rest(tool)}]
    if kind == "custom":
        return [{**_read_flat_custom(_nested_form(tool, "custom")), **home, **_responses_tool_rest(tool)}]
    if kind == "local_shell":
        return [{"name": "local_shell", "description": "Runs a command on the user's machine.", "schema": _LOCAL_SHELL_SCHEMA, "kind": "function", "calls": "shell", "raw": tool}]
    if kind == "tool_search" and tool.get("execution") == "client":
        return [{**_read_flat_function({**tool, "name": "tool_search"}), "calls": "search", "raw": tool}]
    return [{"name": _hosted_name(tool), "kind": "hosted", "family": "openai", "raw": tool}]


_FUNCTION_FIELDS = frozenset({"type", "name", "description", "parameters", "strict", "format", "function", "custom"})


def _responses_tool_rest(tool: Json) -> Json:
    """The tool as sent, when it says more than the hub can hold."""
    return {**({"defer": True} if tool.get("defer_loading") else {}), **({"raw": tool} if any(tool[name] is not None for name in tool if name not in _FUNCTION_FIELDS) else {})}


def _read_flat_function(function: Json) -> Json:
    tool: Json = {"name": _str_in(function, "name"), "kind": "function"}
    if _str_in(function, "description"):
        tool["description"] = function["description"]
    if isinstance(function.get("parameters"), dict):
        tool["schema"] = function["parameters"]
    if isinstance(function.get("strict"), bool):
        tool["strict"] = function["strict"]
    return tool


def _read_flat_custom(custom: Json) -> Json:
    form = _nested_form(_dict_in(custom, "format"), "grammar")
    grammar = {"grammar": {"syntax": _str_in(form, "syntax"), "definition": form["definition"]}} if _str_in(form, "definition") else {}
    about = {"description": custom["description"]} if _str_in(custom, "description") else {}
    return {"name": _str_in(custom, "name"), "kind": "custom", **about, **grammar}


# ---- Requests: hub to body

def responses_write_request(hub: Json, profile: Profile) -> Json:
    """Responses body for a prepared hub request.

    out:     {"model", "instructions"?, "input": [items], "tools"?, ..., "store", "include"?, "stream"?}; items carry no id of their own, since
             nothing is stored that they could name.
    dropped: stop strings and penalties, which prepare() names.
    """
    own = (hub.get("extra") or {}).get("responses") or {}
    placed = _placed_tools(hub["turns"])
    tools = _write_responses_tools([tool for tool in hub.get("tools", ()) if not (tool.get("placed") and tool["wire"] in placed)], hub, profile)
    system = "\n\n".join(part["text"] for part in hub.get("system", ()))
    body: Json = {"model": profile.model or hub["model"], **({"instructions": system} if system else {}), "input": _write_input_items(hub["turns"])}
    if tools:
        body["tools"] = tools
    if "choice" in hub:
        body["tool_choice"] = _write_responses_choice(hub["choice"], hub.get("tools", ()))
    if "parallel" in hub:
        body["parallel_tool_calls"] = hub["parallel"]
    if "max_out" in hub:
        body["max_output_tokens"] = hub["max_out"]
    body |= hub.get("sampling", {})
    reasoning = {**_write_reasoning_field(hub.get("think") or {}, hub["client"]), **(own.get("reasoning") or {})}
    text = _write_text_field(hub)
    body |= {name: value for name, value in (("reasoning", reasoning), ("text", text)) if value}
    body |= {field_name: hub["meta"][name] for name, field_name in _RESPONSES_META.items() if hub["meta"].get(name) is not None}
    body |= {name: value for name, value in own.items() if name not in ("reasoning", "include")}
    include = _write_include(hub["meta"], own.get("include") or (), profile)
    body |= {**({"include": include} if include else {}), "store": hub["meta"].get("store") is True, **({"stream": True} if hub["stream"] else {})}
    if "compaction" in hub["dropped"] and any(item["type"] == "compaction" for item in body["input"]):
        hub["dropped"].remove("compaction")
    return body


def _write_include(meta: Json, more: Iterable[str], profile: Profile) -> list[str]:
    """What the answer is to hold besides: the seals of its thinking, unless it is stored or the vendor's model does not think."""
    thinks = not (profile.vendor and profile.effort == ())
    names = [_INCLUDE_SEALS] if thinks and meta.get("store") is not True else []
    return [*names, *([_INCLUDE_LOGPROBS] if meta.get("logprobs") else []), *more]


def _write_reasoning_field(think: Json, client: Format) -> Json:
    """`reasoning`; a summary is asked for unless the client could have asked and did not, or wants none shown."""
    mode, effort, show = think.get("mode"), think.get("effort"), think.get("show")
    written = {"effort": effort} if effort else {}
    if mode in (None, "off") or show == "omitted" or client == "responses" and not show:
        return written
    return {**written, "summary": show if show in ("concise", "detailed") else "auto"}


def _write_text_field(hub: Json) -> Json:
    form = hub.get("format")
    text: Json = {}
    if form:
        text["format"] = {"type": "json_object"} if form["kind"] == "json" else {
            "type": "json_schema", "name": form.get("name") or "output", **{name: form[name] for name in ("description", "schema", "strict") if name in form}}
    return {**text, **({"verbosity": hub["meta"]["verbosity"]} if hub["meta"].get("verbosity") else {})}


def _placed_tools(turns: Sequence[Json]) -> set[str]:
    """Names of the tools that stand in the conversation itself and need not be told again."""
    items = [part["data"] for turn in turns for part in turn["parts"] if part["type"] == "opaque"]
    items += [part["raw"] for turn in turns for part in turn["parts"] if part["type"] == "result" and part["kind"] == "search" and "raw" in part]
    return {tool["name"] for item in items if item.get("type") in ("additional_tools", "tool_search_output") for tool in _read_responses_tools(_dicts_in(item, "tools"))}


def _write_responses_tools(tools: Sequence[Json], hub: Json, profile: Profile) -> list[Json]:
    """Tools in their order; those of one namespace together, where its first one stood."""
    told = {tool["name"]: tool for tool in (hub.get("echo") or {}).get("tools") or () if tool.get("type") == "namespace"}
    written: list[Json] = []
    spaces: dict[str, list[Json]] = {}
    for tool in tools:
        space = tool.get("namespace")
        if not space or not profile.namespaces:
            written.append(_write_responses_tool(tool, hub["client"]))
            continue
        if space not in spaces:
            spaces[space] = []
            about = told.get(space, {}).get("description")
            written.append({"type": "namespace", "name": space, "description": about or space, "tools": spaces[space]})
        spaces[space].append(_write_responses_tool(tool, hub["client"]))
    return written


def _write_responses_tool(tool: Json, client: Format) -> Json:
    """One tool; strict is told to be off where the client's format would not have meant it, since here it is on unless told."""
    raw = tool.get("raw") or {}
    if tool["kind"] == "hosted" or tool.get("calls") and raw:
        return raw
    about = {"description": tool["description"]} if tool.get("description") else {}
    if tool["kind"] == "custom":
        form = {"format": {"type": "grammar", **tool["grammar"]}} if tool.get("grammar") else {}
        return {**raw, "type": "custom", "name": tool["wire"], **about, **form}
    strict = {"strict": tool["strict"]} if "strict" in tool else {} if client == "responses" else {"strict": False}
    nested = {name: value for name, value in raw.items() if name != "function"}
    return {**nested, "type": "function", "name": tool["wire"], **about, "parameters": tool["schema"], **strict}


def _write_responses_choice(choice: Json, tools: Sequence[Json]) -> Any:
    by_name = {tool["wire"]: tool for tool in tools}
    if "allowed" in choice:
        mode = "required" if choice["mode"] == "any" else "auto"
        return {"type": "allowed_tools", "mode": mode, "tools": [_write_responses_choice_of(name, by_name.get(name), None) for name in choice["allowed"]]}
    if choice["mode"] == "tool":
        return _write_responses_choice_of(choice["name"], by_name.get(choice["name"]), choice.get("raw"))
    return "required" if choice["mode"] == "any" else choice["mode"]


def _write_responses_choice_of(name: str, tool: Json | None, raw: Json | None) -> Json:
    kind = tool["kind"] if tool else "function"
    if kind == "hosted" and tool:
        return raw or {field_name: tool["raw"][field_name] for field_name in ("type", "server_label") if field_name in tool["raw"]}
    return raw if raw and tool and tool.get("calls") else {"type": "custom" if kind == "custom" else "function", "name": name}


def _write_input_items(turns: Sequence[Json]) -> list[Json]:
    """Items for all turns; texts and images that stand together make one message."""
    kinds = {part["id"]: part["kind"] for turn in turns for part in turn["parts"] if part["type"] == "call"}
    items: list[Json] = []
    for turn in turns:
        role = "developer" if turn["role"] == "system" else turn["role"]
        message: list[Json] = []
        for part in _without_last_thinking(turn["parts"]):
            if part["type"] in _ITEM_PART_WRITERS:
                if not message:
                    items.append({"type": "message", "role": role, "content": message})
                message.append(_ITEM_PART_WRITERS[part["type"]](part, role))
                continue
            message = []
            items.append(_ITEM_WRITERS[part["type"]](part, kinds))
    return items


def _without_last_thinking(parts: Sequence[Json]) -> Sequence[Json]:
    """A turn's parts without thinking at its end: a reasoning item must be followed by the item it led to."""
    end = len(parts)
    while end and parts[end - 1]["type"] == "think":
        end -= 1
    return parts[:end]


def _write_item_text(part: Json, role: str) -> Json:
    mark = {"prompt_cache_breakpoint": {"mode": "explicit"}} if part.get("cache") and role != "assistant" else {}
    return {"type": "output_text" if role == "assistant" else "input_text", "text": part["text"], **mark}


def _write_item_image(part: Json, role: str) -> Json:
    source = {"file_id": part["file_id"]} if "file_id" in part else {"image_url": data_url(part)}
    return {"type": "input_image", **source, **({"detail": part["detail"]} if part.get("detail") else {})}


def _write_item_file(part: Json, role: str) -> Json:
    name = part.get("name") or part.get("title")
    if "data" in part:
        return {"type": "input_file", "filename": name or "document.pdf", "file_data": data_url(part)}
    if "text" in part:
        return {"type": "input_text", "text": document_text(part)}
    source = {"file_id": part["file_id"]} if "file_id" in part else {"file_url": part["url"]}
    return {"type": "input_file", **source, **({"filename": name} if name and "url" not in part else {})}


_ITEM_PART_WRITERS: Mapping[str, Callable[[Json, str], Json]] = {
    "text": _write_item_text, "image": _write_item_image, "file": _write_item_file, "refusal": lambda part, role: {"type": "refusal", "refusal": part["text"]}}


def _write_reasoning_item(part: Json, kinds: Mapping[str, str]) -> Json:
    data, text = (part.get("seal") or {}).get("data"), part["text"]
    if not data:
        return {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}
    return {"type": "reasoning", "summary": part.get("summary") or ([{"type": "summary_text", "text": text}] if text else []), "encrypted_content": data}


def _write_call_item(part: Json, kinds: Mapping[str, str]) -> Json:
    raw = part.get("raw") or {}
    if "type" in raw:
        return {**_without_id(raw), "call_id": part["id"]}
    head: Json = {"call_id": part["id"], "name": part["name"]}
    if part["kind"] == "shell":
        return {"type": "local_shell_call", "call_id": part["id"], "status": "completed", "action": _shell_action(part["args"])}
    if part["kind"] == "search":
        return {"type": "tool_search_call", "call_id": part["id"], "execution": "client", "status": "completed", "arguments": args_object(part["args"])}
    home = {"namespace": part["namespace"]} if part.get("namespace") else raw
    if part["kind"] == "custom":
        return {"type": "custom_tool_call", **head, "input": freeform_text(part["args"]), **home}
    return {"type": "function_call", **head, "arguments": part["args"] or "{}", **home}


def _write_result_item(part: Json, kinds: Mapping[str, str]) -> Json:
    if "type" in part.get("raw", {}):
        return {**_without_id(part["raw"]), "call_id": part["id"]}
    parts = part["parts"]
    plain = all(inner["type"] == "text" for inner in parts)
    output = "\n".join(inner["text"] for inner in parts) if plain else [_ITEM_PART_WRITERS[inner["type"]](inner, "user") for inner in parts if inner["type"] in _ITEM_PART_WRITERS]
    kind = "custom" if kinds.get(part["id"]) == "custom" else part["kind"]
    return {"type": _OUTPUT_TYPES.get(kind, "function_call_output"), "call_id": part["id"], "output": output}


_OUTPUT_TYPES = {"custom": "custom_tool_call_output", "shell": "local_shell_call_output"}


def _without_id(item: Json) -> Json:
    return {name: value for name, value in item.items() if name != "id"}


def _shell_action(args: str) -> Json:
    """The action of a local_shell_call; models call its folder workdir, as the function's schema does."""
    fields = args_object(args)
    if "workdir" in fields:
        fields["working_directory"] = fields.pop("workdir")
    command = fields.get("command")
    return {"type": "exec", **fields, "command": [command] if isinstance(command, str) else command or [], "env": fields.get("env") or {}}


_ITEM_WRITERS: Mapping[str, Callable[[Json, Mapping[str, str]], Json]] = {
    "think": _write_reasoning_item, "call": _write_call_item, "result": _write_result_item, "opaque": lambda part, kinds: part["data"]}


# ---- Answers: events to deltas

#: Items that are calls for the client to run, and their kind in the hub.
_CALL_ITEM_KINDS: Mapping[str, str] = {"function_call": "function", "custom_tool_call": "custom", "local_shell_call": "shell", "tool_search_call": "search"}


def _call_item_args(item: Json) -> str:
    """The arguments of a call item as the hub holds them."""
    kind = item["type"]
    if kind == "function_call":
        return args_text(item.get("arguments"))
    if kind == "custom_tool_call":
        return freeform_args(_str_in(item, "input"))
    if kind == "local_shell_call":
        return compact({name: value for name, value in _dict_in(item, "action").items() if name != "type" and value is not None})
    return args_text(item.get("arguments")) or "{}"


@dataclass(slots=True)
class _SeenItem:
    """What was already given out of one output item."""
    key: Any
    texts: dict[int, list[str]] = field(default_factory=dict)   #: what came in deltas, by content part
    args: list[str] = field(default_factory=list)               #: the same of arguments
    n_cites: int = 0
    summary_index: int = -1                         #: of the last summary part, -1 before the first
    thought: str = ""                               #: where its thinking came from
    done: bool = False


def _identity(item: Json) -> tuple[str, str]:
    """What tells an item of the last event from one that had its own events; a call and its output may share call_id."""
    return _str_in(item, "type"), _str_in(item, "id") or _str_in(item, "call_id")


def _unsaid(whole: str, said: list[str]) -> str:
    """What a final value holds beyond its deltas; nothing where the two differ, for what was said stays said."""
    before = "".join(said)
    return whole[len(before):] if whole.startswith(before) else ""


class ResponsesStreamReader:
    """A provider's Responses stream as deltas.  `done`: the terminal event has come, nothing more will."""

    __slots__ = ("done", "_out", "_items", "_keys", "_finished_ids", "_said", "_refused", "_thinker")

    def __init__(self, source: Source) -> None:
        self.done = False
        self._out = Serialiser(source)
        self._items: dict[Any, _SeenItem] = {}
        self._keys: dict[str, Any] = {}             # item id -> key, for events that lack an index
        self._finished_ids: set[tuple[str, str]] = set()
        self._said = self._refused = False
        self._thinker: _SeenItem | None = None      # the item whose thinking came last, while nothing else has come since

    @property
    def counted(self) -> Json:
        """What the provider has counted so far."""
        return self._out.counted

    def feed(self, event: Event) -> list[Json]:
        """The deltas of one event."""
        if self.done or event.data.strip() == "[DONE]":
            return []
        try:
            value = json.loads(event.data)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            value = {"type": "error", "message": "provider sent something that is not JSON"}
        return self.take(value, event.name)

    def take(self, value: Json, name: str = "") -> list[Json]:
        """The deltas of one event that is already parsed; `name` is that of its SSE frame."""
        if self.done:
            return []
        kind = "error" if name == "error" else value.get("type") or ("error" if value.get("error") else name)
        handler = _RESPONSES_EVENTS.get(str(kind))
        if handler:
            handler(self, value)
        return self._out.close(ended=True) if self.done else self._out.take()

    def close(self) -> list[Json]:
        """The connection has ended: without a terminal event before, that is a cut, whatever marks came."""
        if self.done:
            return []
        self.done = True
        return self._out.close(ended=False)

    def _key(self, value: Json) -> Any:
        """What the event's item is known by: its index, which outlives changes of its id."""
        index, item_id = value.get("output_index"), _str_in(value, "item_id") or _str_in(_dict_in(value, "item"), "id")
        key = index if isinstance(index, (int, str)) else self._keys.get(item_id, item_id)
        if item_id:
            self._keys.setdefault(item_id, key)
        return key

    def _item(self, key: Any) -> _SeenItem:
        item = self._items.get(key)
        if item is None:
            self._items[key] = item = _SeenItem(key)
        return item

    def _begin(self, value: Json) -> None:
        response = _dict_in(value, "response")
        if not self._out.produced:
            self._out.start(_str_in(response, "id"), _str_in(response, "model"))

    def _added(self, value: Json) -> None:
        item, key = _dict_in(value, "item"), self._key(value)
        self._item(key)
        if item.get("type") in ("function_call", "custom_tool_call"):
            self._open_call(key, item)

    def _open_call(self, key: Any, item: Json) -> None:
        kind = _CALL_ITEM_KINDS[item["type"]]
        self._thinker = None
        name = {"shell": "local_shell", "search": "tool_search"}.get(kind) or _str_in(item, "name")
        self._out.call(key, _str_in(item, "call_id"), name, kind, _str_in(item, "namespace"))

    def _text(self, value: Json) -> None:
        delta = _str_in(value, "delta")
        if delta:
            self._part(value).append(delta)
            self._said, self._thinker = True, None
            self._out.text(delta)

    def _refusal(self, value: Json) -> None:
        delta = _str_in(value, "delta")
        if delta:
            self._part(value).append(delta)
            self._refused, self._thinker = True, None
            self._out.refuse(delta)

    def _part(self, value: Json) -> list[str]:
        """What has been said of the content part an event belongs to."""
        index = value.get("content_index")
        return self._item(self._key(value)).texts.setdefault(index if isinstance(index, int) else 0, [])

    def _summary(self, value: Json) -> None:
        item, index, delta = self._item(self._key(value)), value.get("summary_index") or 0, _str_in(value, "delta")
        if not delta or item.thought == "reasoning_text":
            return
        self._out.think("\n\n" + delta if item.thought and index != item.summary_index else delta, "summary_text")
        item.thought, item.summary_index, self._thinker = "summary_text", index, item

    def _thinking(self, value: Json) -> None:
        item, delta = self._item(self._key(value)), _str_in(value, "delta")
        if delta and item.thought != "summary_text":
            item.thought, self._thinker = "reasoning_text", item
            self._out.think(delta, "reasoning_text")

    def _arguments(self, value: Json) -> None:
        key, delta = self._key(value), _str_in(value, "delta")
        if delta and self._out.has(key):
            self._item(key).args.append(delta)
            self._out.args(key, delta)

    def _arguments_done(self, value: Json) -> None:
        self._whole_args(self._key(value), args_text(value.get("arguments")))

    def _input_done(self, value: Json) -> None:
        if isinstance(value.get("input"), str):
            self._whole_args(self._key(value), freeform_args(value["input"]))

    def _whole_args(self, key: Any, args: str) -> None:
        """Of all arguments what no deltas brought."""
        item = self._item(key)
        missing = _unsaid(args, item.args)
        if missing and self._out.has(key):
            item.args.append(missing)
            self._out.args(key, missing)

    def _annotation(self, value: Json) -> None:
        if isinstance(value.get("annotation"), dict):
            self._cite(self._item(self._key(value)), value["annotation"])

    def _cite(self, item: _SeenItem, annotation: Json) -> None:
        item.n_cites += 1
        span = {name: annotation[key] for name, key in (("start", "start_index"), ("end", "end_index")) if isinstance(annotation.get(key), int)}
        title = _str_in(annotation, "title") or _str_in(annotation, "filename")
        self._out.cite({"url": _str_in(annotation, "url"), "title": title, **span, "raw": annotation, "family": "openai"})

    def _item_done(self, value: Json) -> None:
        item, seen = _dict_in(value, "item"), self._item(self._key(value))
        if not item or seen.done:
            return
        seen.done = True
        self._finished_ids.add(_identity(item))
        kind, key = _str_in(item, "type"), seen.key
        if kind == "message":
            self._message_done(seen, item)
        elif kind == "reasoning":
            self._reasoning_done(seen, item)
        elif kind in _CALL_ITEM_KINDS and not (kind == "tool_search_call" and _is_hosted_search(item)):
            self._open_call(key, item)
            self._whole_args(key, _call_item_args(item))
            self._out.end_call(key)
        elif kind:
            self._thinker = None
            self._out.opaque("openai", item)

    def _message_done(self, seen: _SeenItem, item: Json) -> None:
        """Of a whole message what its deltas did not bring."""
        annotations: list[Json] = []
        for index, part in enumerate(_dicts_in(item, "content")):
            tell, name = (self._refusal, "refusal") if part.get("type") == "refusal" else (self._text, "text")
            tell({"output_index": seen.key, "content_index": index, "delta": _unsaid(_str_in(part, name), seen.texts.get(index, []))})
            annotations += _dicts_in(part, "annotations")
        for annotation in annotations[seen.n_cites:]:
            self._cite(seen, annotation)

    def _reasoning_done(self, seen: _SeenItem, item: Json) -> None:
        """Of a whole reasoning item what its deltas did not bring, and its seal."""
        if not seen.thought:
            summary, content = _joined_reasoning(item)
            seen.thought = "summary_text" if summary else "reasoning_text" if content else ""
            self._out.think(summary or content, seen.thought)
            self._thinker = seen if seen.thought else self._thinker
        if _str_in(item, "encrypted_content"):
            self._out.seal({"field": "encrypted", "data": item["encrypted_content"], **({"id": item["id"]} if _str_in(item, "id") else {})})
        elif seen is self._thinker:
            self._out.seal({"field": seen.thought})

    def _completed(self, value: Json) -> None:
        response = _dict_in(value, "response")
        status = "incomplete" if value.get("type") == "response.incomplete" else _str_in(response, "status") or "completed"
        self._begin(value)
        told = frozenset(self._finished_ids)
        for index, item in enumerate(_dicts_in(response, "output")):
            if _identity(item) not in told:
                self._item_done({"output_index": index, "item": item})
        self._out.usage(read_usage("responses", response.get("usage")))
        self._out.finish(self._reason(status, _str_in(_dict_in(response, "incomplete_details"), "reason")))
        self.done = True

    def _reason(self, status: str, detail: Any) -> str:
        """The hub's stop reason; an answer that says it is incomplete is never taken for a whole one."""
        if status == "incomplete":
            return "filter" if detail == "content_filter" else "length"
        return "refusal" if self._refused and not self._said and not self._out.n_calls else "tool" if self._out.n_calls else "end"

    def _failed(self, value: Json) -> None:
        self._out.fail(read_error(find_responses_error(value) or value))
        self.done = True


_RESPONSES_EVENTS: Mapping[str, Callable[[ResponsesStreamReader, Json], None]] = {
    "response.created": ResponsesStreamReader._begin,
    "response.in_progress": ResponsesStreamReader._begin,
    "response.output_item.added": ResponsesStreamReader._added,
    "response.output_text.delta": ResponsesStreamReader._text,
    "response.output_text.annotation.added": ResponsesStreamReader._annotation,
    "response.refusal.delta": ResponsesStreamReader._refusal,
    "response.reasoning_summary_text.delta": ResponsesStreamReader._summary,
    "response.reasoning_text.delta": ResponsesStreamReader._thinking,
    "response.function_call_arguments.delta": ResponsesStreamReader._arguments,
    "response.function_call_arguments.done": ResponsesStreamReader._arguments_done,
    "response.custom_tool_call_input.done": ResponsesStreamReader._input_done,
    "response.output_item.done": ResponsesStreamReader._item_done,
    "response.completed": ResponsesStreamReader._completed,
    "response.incomplete": ResponsesStreamReader._completed,
    "response.failed": ResponsesStreamReader._failed,
    "response.cancelled": ResponsesStreamReader._failed,
    "error": ResponsesStreamReader._failed,
}


# ---- Answers: deltas to events

class _Growth(NamedTuple):
    """How an open item grows: which delta it takes, and the event that tells it."""
    delta: str
    event: str
    place: bytes        #: fields between the item's index and the text
    tail: bytes         #: fields behind the text


_GROWTHS: Mapping[str, _Growth] = {
    "text": _Growth("text", "response.output_text.delta", b',"content_index":0', b',"logprobs":[]'),
    "refuse": _Growth("refuse", "response.refusal.delta", b',"content_index":0', b""),
    "think": _Growth("think", "response.reasoning_summary_text.delta", b',"summary_index":0', b""),
    "function": _Growth("args", "response.function_call_arguments.delta", b"", b""),
}
#: Kinds of calls whose item is told of only when its arguments are whole.
_SILENT_CALLS = frozenset({"custom", "shell", "search"})
_ITEM_PREFIXES = {"text": "msg_", "refuse": "msg_", "think": "rs_", "function": "fc_", "custom": "ctc_", "shell": "lsh_", "search": "tsc_"}


@dataclass(slots=True)
class _OpenItem:
    """The open item of the writer."""
    kind: str
    takes: str                              #: kind of delta that makes it grow
    item: Json
    index: int = -1                         #: output_index, -1 while nothing was told of it
    head: bytes = b""                       #: of its delta events, around sequence number and text
    middle: bytes = b""
    tail: bytes = b""
    pieces: list[str] = field(default_factory=list)
    cites: list[Json] = field(default_factory=list)


def _failed_error(status: int, code: Any, message: str) -> Json:
    """The error inside a failed response; its code is one that clients know, or the gateway's own."""
    known = code if isinstance(code, str) and code else {429: "rate_limit_exceeded", 400: "invalid_prompt"}.get(status, "server_error")
    return {"code": known, "message": message}


class ResponsesStreamWriter:
    """Deltas as a client's Responses stream.  `response`: the object of the last event, None before it."""

    __slots__ = ("response", "_asked", "_id", "_echo", "_sequence", "_started", "_block", "_output", "_n_items", "_usage", "_refused", "_said")

    def __init__(self, asked: Asked) -> None:
        self.response: Json | None = None
        self._asked = asked
        self._id = mint("resp_", asked.seed)
        echo = asked.hub.get("echo") or {}
        self._echo: Json = {**_ECHOED, **echo, "reasoning": {**_ECHOED["reasoning"], **(echo.get("reasoning") or {})}}
        self._sequence = 0
        self._started = False
        self._block: _OpenItem | None = None
        self._output: list[Json] = []
        self._n_items = 0
        self._usage: Json = {}
        self._refused = self._said = False

    def take_up(self, answer_id: str, output: list[Json], item: Json, pieces: list[str], sequence: int) -> None:
        """Go on inside the text of `item`, which follows the items of `output`, behind the event numbered `sequence`."""
        self._id, self._output, self._n_items, self._started, self._said = answer_id, output, len(output), True, True
        self._block = _OpenItem("text", "text", item, pieces=pieces)
        self._tell(self._block)
        self._sequence = sequence + 1

    def feed(self, delta: Json) -> list[bytes]:
        """The events of one delta."""
        kind, block = delta["delta"], self._block
        if "pieces" in delta:
            return [frame for text in delta["pieces"] for frame in self.feed(text_delta(text))]
        if block is not None and block.takes == kind:
            text = delta["text"]
            block.pieces.append(text)
            if not block.head:
                return []
            number = self._sequence
            self._sequence = number + 1
            return [b"%b%d%b%b%b" % (block.head, number, block.middle, dump_json(text), block.tail)]
        if self.response is not None:
            return []
        out = self._start()
        handler = _RESPONSES_DELTAS.get(kind)
        return out + handler(self, delta) if handler else out

    def close(self) -> list[bytes]:
        """The end of the deltas: without a stop or an error before, a failure is told."""
        return [] if self.response is not None else self.feed(error_delta(502, "upstream closed the stream before finishing"))

    def keep_alive(self) -> bytes:
        """A sign of life that parsers see: response.in_progress once more."""
        if self.response is not None:
            return b""
        return b"".join(self._start()) or self._event("response.in_progress", response=self._object("in_progress"))

    def error(self, error: GatewayError) -> bytes:
        """The failure of the whole answer, as its last event; nothing when it has ended already."""
        message = with_retry_hint(error.message, error.retry_after_s) if error.status == 429 else error.message
        return b"".join(self.feed(error_delta(error.status, message, error.code, error.type)))

    def _event(self, kind: str, /, **fields: Any) -> bytes:
        number = self._sequence
        self._sequence = number + 1
        return write_event({"type": kind, "sequence_number": number, **fields}, kind)

    def _object(self, status: str, **fields: Any) -> Json:
        """The Response object as it stands; `fields` over what holds before the end."""
        created_s = self._asked.created_s
        return {"id": self._id, "object": "response", "created_at": created_s, "status": status, "completed_at": None, "error": None, "incomplete_details": None,
                "model": self._asked.hub["model"], "output": [], "usage": None, **fields, **self._echo}

    def _start(self) -> list[bytes]:
        if self._started:
            return []
        self._started = True
        return [self._event("response.created", response=self._object("in_progress")), self._event("response.in_progress", response=self._object("in_progress"))]

    def _open(self, kind: str, item: Json, *, takes: str) -> list[bytes]:
        """A new open item; the one before is closed."""
        out = self._shut()
        self._block = _OpenItem(kind, takes, item)
        return out

    def _tell(self, block: _OpenItem) -> list[bytes]:
        """The open item is told of, and how it grows worked out."""
        block.index, self._n_items = self._n_items, self._n_items + 1
        block.item = {"id": mint(_ITEM_PREFIXES[block.kind], self._asked.seed, block.index), **block.item}
        live = _GROWTHS.get(block.kind)
        if live:
            name = live.event.encode()
            block.head = b'event: %b\ndata: {"type":"%b","sequence_number":' % (name, name)
            block.middle = b',"item_id":%b,"output_index":%d%b,"delta":' % (dump_json(block.item["id"]), block.index, live.place)
            block.tail = live.tail + b"}\n\n"
        return [self._event("response.output_item.added", output_index=block.index, item=block.item)]

    def _grow(self, kind: str, delta: Json) -> list[bytes]:
        """A first delta of text, refusal or thinking: its item opens."""
        item: Json = {"type": "reasoning", "summary": [], "encrypted_content": None} if kind == "think" else {
            "type": "message", "status": "in_progress", "role": "assistant", "content": []}
        out = self._open(kind, item, takes=kind)
        block = self._opened()
        out += self._tell(block)
        place: Json = {"item_id": block.item["id"], "output_index": block.index}
        if kind == "think":
            out.append(self._event("response.reasoning_summary_part.added", **place, summary_index=0, part={"type": "summary_text", "text": ""}))
        else:
            out.append(self._event("response.content_part.added", **place, content_index=0, part=_message_part(kind, "", [])))
            self._said, self._refused = self._said or kind == "text", self._refused or kind == "refuse"
        return out + self.feed(delta)

    def _opened(self) -> _OpenItem:
        assert self._block is not None
        return self._block

    def _text(self, delta: Json) -> list[bytes]:
        return self._grow(delta["delta"], delta)

    def _seal(self, delta: Json) -> list[bytes]:
        """The end of thinking; a seal may come without any."""
        record = {name: value for name, value in delta.items() if name not in ("delta", "id")}
        out: list[bytes] = []
        if self._block is None or self._block.kind != "think":
            out = self._open("think", {"type": "reasoning", "summary": [], "encrypted_content": None}, takes="think")
            out += self._tell(self._opened())
        return out + self._shut(seal=write_seal(record, "openai"))

    def _call(self, delta: Json) -> list[bytes]:
        kind = delta["kind"] if delta["kind"] in _SILENT_CALLS else "function"
        home = {"namespace": delta["namespace"]} if delta.get("namespace") else {}
        item = {"call_id": delta["id"], "name": delta["name"], **home}
        if kind == "function":
            out = self._open(kind, {"type": "function_call", "status": "in_progress", **item, "arguments": ""}, takes="args")
            return out + self._tell(self._opened())
        return self._open(kind, item, takes="args")

    def _cite(self, delta: Json) -> list[bytes]:
        block = self._block
        if block is None or block.kind != "text":
            return []
        note = {"type": "url_citation", "url": delta["url"], "title": delta.get("title") or delta["url"], "start_index": delta.get("start") or 0, "end_index": delta.get("end") or 0}
        if delta.get("family") == "openai" and isinstance(delta.get("raw"), dict):
            note = {**note, **delta["raw"]} if delta["raw"].get("type") == "url_citation" else delta["raw"]
        block.cites.append(note)
        return [self._event("response.output_text.annotation.added", item_id=block.item["id"], output_index=block.index, content_index=0,
                            annotation_index=len(block.cites) - 1, annotation=note)]

    def _opaque(self, delta: Json) -> list[bytes]:
        """An item of the format's own kind goes out as it came; blocks of others cannot be told here."""
        item = delta["data"]
        if delta["family"] != "openai" or not isinstance(item, dict) or item.get("type") not in _ITEM_READERS:
            return []
        out = self._shut()
        index, self._n_items = self._n_items, self._n_items + 1
        self._output.append(item)
        return [*out, self._event("response.output_item.added", output_index=index, item=item), self._event("response.output_item.done", output_index=index, item=item)]

    def _count(self, delta: Json) -> list[bytes]:
        self._usage = merge_usage(self._usage, {name: value for name, value in delta.items() if name not in ("delta", "estimated")})
        return []

    def _stop(self, delta: Json) -> list[bytes]:
        status, detail = WRITE_STOPS["responses"][delta["reason"]]
        out: list[bytes] = []
        if delta["reason"] == "refusal" and not self._refused and not self._said:
            explanation = (delta.get("details") or {}).get("explanation")
            if explanation and isinstance(explanation, str):
                out = self._text({"delta": "refuse", "text": explanation})
            else:
                status, detail = "incomplete", "content_filter"
        out += self._shut(cut=status == "incomplete")
        self.response = self._object(status, completed_at=self._asked.created_s, incomplete_details={"reason": detail} if detail else None, output=self._output,
                                     usage=write_usage("responses", self._usage) if self._usage else None)
        return [*out, self._event(f"response.{status}", response=self.response)]

    def _fail(self, delta: Json) -> list[bytes]:
        """Nothing open is closed: a client would run half a call."""
        self._block = None
        self.response = self._object("failed", error=_failed_error(delta["status"], delta.get("code"), delta["message"]))
        return [self._event("response.failed", response=self.response)]

    def _shut(self, *, cut: bool = False, seal: str | None = None) -> list[bytes]:
        """The open item is closed. `cut`: the answer ends here unfinished."""
        block, self._block = self._block, None
        if block is None:
            return []
        text = "".join(block.pieces)
        if block.kind in _SILENT_CALLS:
            return [] if cut and not whole_json(text or "{}") else self._whole_call(block, text)
        place: Json = {"item_id": block.item["id"], "output_index": block.index}
        if block.kind == "think":
            out, end = self._shut_thinking(place, text), {"summary": [{"type": "summary_text", "text": text}] if text else [], "encrypted_content": seal}
        elif block.kind == "function":
            out, text = self._shut_call(block, place, text)
            end = {"arguments": text}
        else:
            out, part = self._shut_text(block, place, text)
            end = {"content": [part]}
        status = {} if block.kind == "think" else {"status": "incomplete" if cut else "completed"}
        return [*out, self._done(block, {**block.item, **status, **end})]

    def _done(self, block: _OpenItem, item: Json) -> bytes:
        self._output.append(item)
        return self._event("response.output_item.done", output_index=block.index, item=item)

    def _shut_thinking(self, place: Json, text: str) -> list[bytes]:
        if not text:
            return []
        return [self._event("response.reasoning_summary_text.done", **place, summary_index=0, text=text),
                self._event("response.reasoning_summary_part.done", **place, summary_index=0, part={"type": "summary_text", "text": text})]

    def _shut_call(self, block: _OpenItem, place: Json, text: str) -> tuple[list[bytes], str]:
        """The end of a function call and its arguments, {} where none came."""
        out = []
        if not text.strip():
            out, text = [self._event("response.function_call_arguments.delta", **place, delta="{}")], "{}"
        return [*out, self._event("response.function_call_arguments.done", **place, name=block.item["name"], arguments=text)], text

    def _shut_text(self, block: _OpenItem, place: Json, text: str) -> tuple[list[bytes], Json]:
        """The end of a message's only part, and the part."""
        part = _message_part(block.kind, text, block.cites)
        if block.kind == "text":
            told = self._event("response.output_text.done", **place, content_index=0, text=text, logprobs=[])
        else:
            told = self._event("response.refusal.done", **place, content_index=0, refusal=text)
        return [told, self._event("response.content_part.done", **place, content_index=0, part=part)], part

    def _whole_call(self, block: _OpenItem, args: str) -> list[bytes]:
        """A call of the kinds that are told of only when whole."""
        call = block.item
        if block.kind == "custom":
            text = freeform_text(args or "{}")
            block.item = {"type": "custom_tool_call", "status": "in_progress", **call, "input": ""}
            out = self._tell(block)
            place: Json = {"item_id": block.item["id"], "output_index": block.index}
            out.append(self._event("response.custom_tool_call_input.delta", **place, delta=text))
            out.append(self._event("response.custom_tool_call_input.done", **place, input=text))
            return [*out, self._done(block, {**block.item, "status": "completed", "input": text})]
        rest = {"action": _shell_action(args)} if block.kind == "shell" else {"execution": "client", "arguments": args_object(args)}
        block.item = {"type": "local_shell_call" if block.kind == "shell" else "tool_search_call", "status": "in_progress", "call_id": call["call_id"], **rest}
        return [*self._tell(block), self._done(block, {**block.item, "status": "completed"})]


def responses_take_up(sent: bytes, asked: Asked) -> tuple[ResponsesStreamWriter, str] | None:
    """(a writer that goes on with a stream that broke off inside its text, that text); None where it did not, or holds more than thinking and one text."""
    response: Json = {}
    item: Json = {}
    output: list[Json] = []
    pieces: list[str] = []
    index, sequence = 0, -1
    for frame in split_frames(sent):
        event = read_frame(frame)
        value = json.loads(event.data) if event.data else {}
        kind = _str_in(value, "type") or event.name
        number = value.get("sequence_number")
        sequence = max(sequence, number) if isinstance(number, int) else sequence + bool(kind)
        added = _dict_in(value, "item")
        if kind in ("response.created", "response.in_progress"):
            response = _dict_in(value, "response")
        elif kind == "response.output_item.added" and added.get("type") == "message" and not item and isinstance(added.get("id"), str):
            item, index = added, value.get("output_index")
        elif kind == "response.output_text.delta" and item and isinstance(value.get("delta"), str) and value.get("content_index") == 0:
            pieces.append(value["delta"])
        elif kind == "response.output_item.done" and added.get("type") == "reasoning" and not item:
            output.append(added)
        elif kind and not (kind in _TAKEN_UP or kind.startswith("response.reasoning_") and not item or kind == "response.output_item.added" and added.get("type") == "reasoning" and not item):
            return None
    if not "".join(pieces) or index != len(output) or not isinstance(response.get("id"), str):
        return None
    writer = ResponsesStreamWriter(asked._replace(hub={**asked.hub, "model": response.get("model")}, created_s=response.get("created_at") or asked.created_s))
    writer.take_up(response["id"], output, item, pieces, sequence)
    return writer, "".join(pieces)


#: Events that may stand in a stream for it to be taken up, and tell nothing of its text.
_TAKEN_UP = frozenset({"keepalive", "response.queued", "response.content_part.added"})


def _message_part(kind: str, text: str, cites: list[Json]) -> Json:
    return {"type": "output_text", "text": text, "annotations": cites, "logprobs": []} if kind == "text" else {"type": "refusal", "refusal": text}


_RESPONSES_DELTAS: Mapping[str, Callable[[ResponsesStreamWriter, Json], list[bytes]]] = {
    "text": ResponsesStreamWriter._text, "refuse": ResponsesStreamWriter._text, "think": ResponsesStreamWriter._text, "seal": ResponsesStreamWriter._seal,
    "call": ResponsesStreamWriter._call, "cite": ResponsesStreamWriter._cite, "opaque": ResponsesStreamWriter._opaque, "usage": ResponsesStreamWriter._count,
    "stop": ResponsesStreamWriter._stop, "error": ResponsesStreamWriter._fail}


# ---- Answers that are not streamed

def responses_read_answer(body: Json, source: Source) -> list[Json]:
    """The deltas of a whole answer: a stream whose only event is the last one."""
    reader = ResponsesStreamReader(source)
    if find_responses_error(body) is not None:
        return reader.take({"type": "error", **body})
    status = body.get("status")
    if status in ("in_progress", "queued"):
        return reader.close()
    return reader.take({"type": "response.incomplete" if status == "incomplete" else "response.completed", "response": body})


def responses_write_answer(deltas: Iterable[Json], asked: Asked) -> Json:
    """The whole answer: what the last event of its stream holds."""
    writer = ResponsesStreamWriter(asked)
    for delta in deltas:
        writer.feed(delta)
    writer.close()
    assert writer.response is not None
    return writer.response


# ---- Pass-through

def find_responses_error(value: Any) -> Json | None:
    """{"error": ...} of a body or an event that says the answer failed, None for any other."""
    if isinstance(value, list) and len(value) == 1:
        return find_responses_error(value[0])
    if not isinstance(value, dict):
        return None
    response = _dict_in(value, "response") or value
    failed = value.get("type") in ("response.failed", "response.cancelled", "error") or response.get("status") in ("failed", "cancelled")
    found = response.get("error") or value.get("error")
    if found:
        return {"error": found} if isinstance(found, dict) else {"error": {"message": str(found), "code": value.get("code")}}
    if failed:
        return {"error": {"message": value.get("message") or f"The provider's answer was {response.get('status') or 'broken off'}.", "code": value.get("code")}}
    return None


def responses_usage(value: Any) -> Usage | None:
    """Usage of a Response object, or of an event that holds one; None when there is none."""
    response = value.get("response", value) if isinstance(value, dict) else None
    counts = read_usage("responses", response.get("usage")) if isinstance(response, dict) else None
    return Usage(**{name: counts[name] for name in ("input", "output", "cached", "cache_write", "reasoning") if name in counts}) if counts else None


def _is_content_item(item: Any) -> bool:
    """Whether an output item holds anything."""
    if not isinstance(item, dict):
        return False
    if item.get("type") == "message":
        return any(part.get("text") or part.get("refusal") for part in _dicts_in(item, "content"))
    if item.get("type") == "reasoning":
        return bool(item.get("summary") or item.get("content") or item.get("encrypted_content"))
    return bool(item.get("type"))


def judge_responses_answer(body: Any) -> tuple[str, Usage | None]:
    """Whether a whole body is a Responses answer: ("", usage) when it is, else why not (not_json, empty_answer); an empty one may have been counted."""
    if not isinstance(body, dict) or not isinstance(body.get("output"), list):
        return "not_json", None
    if body.get("status") in (None, "completed") and not any(map(_is_content_item, body["output"])):
        return "empty_answer", responses_usage(body)
    return "", responses_usage(body)


_TEXT_DELTA_FRAME = b"event: response.output_text.delta\n"


class ResponsesPassage:
    """A provider's Responses stream on its way through: feed() and close() give what may go to the client, attributes tell what was seen.

    Only whole events leave, as they came.  Nothing leaves after the end, after an error, or after garbage.
    """

    __slots__ = ("content", "done", "finish", "usage", "error", "broken", "n_content_bytes", "n_signs", "sequence", "frames", "_echo", "_overhead", "_began", "_open_call", "_response")

    def __init__(self, *, wants_usage: bool = True, echo_model: str | None = None, n_prompt_tokens: int = 0) -> None:
        self.content = False                #: something of the answer itself has come
        self.done = False                   #: the last event has come
        self.finish: str | None = None      #: completed or incomplete
        self.usage: Usage | None = None
        self.error: Any = None              #: what find_responses_error found
        self.broken = ""                    #: why the stream cannot be trusted further: not_json, too_big, cut, empty_answer
        self.n_content_bytes = 0            #: for an estimate where no usage comes
        self.n_signs = 0                    #: grows with every event
        self._echo = echo_model
        self.frames = FrameSplitter()
        self._overhead = 0                  # bytes around the text of the last text event that was read, 0 before one
        self.sequence = 0                   #: number of the last event
        self._began = self._open_call = False
        self._response: Json = {"object": "response", "output": []}     # the answer as it was last told

    @property
    def calling(self) -> bool:
        """Whether a tool call is open."""
        return self._open_call

    def feed(self, chunk: bytes) -> bytes:
        """What of `chunk`, and of what was kept before it, may go to the client now."""
        if self.done or self.error or self.broken:
            return b""
        try:
            block = self.frames.feed(chunk)
        except UpstreamFailure as failure:
            self.broken = failure.reason
            return b""
        return self._look(block) if block else b""

    def close(self) -> bytes:
        """The provider's connection has ended: what is still owed to the client. Sets `broken` to cut or empty_answer when it ended wrongly."""
        out = b""
        rest = self.frames.rest
        if not (self.done or self.error or self.broken) and whole_json(read_frame(rest).data):
            out = self._look(rest + b"\n\n")
        if not (self.done or self.error or self.broken):
            self.broken = "cut" if self.content else "empty_answer"
        return out

    def keep_alive(self) -> bytes:
        """A sign of life between relayed events: one that parsers see once the stream has begun, a comment before."""
        return write_event({"type": "keepalive", "sequence_number": self.sequence}, "keepalive") if self._began else b": keep-alive\n\n"

    def failed(self, error: GatewayError, shown: int | None = None) -> bytes:
        """The event that ends a broken stream, as the provider would have told it. shown: the number of the last event that the client saw, where some were held."""
        message = with_retry_hint(error.message, error.retry_after_s) if error.status == 429 else error.message
        response = {**self._response, "status": "failed", "error": _failed_error(error.status, error.code, message)}
        return write_event({"type": "response.failed", "response": response, "sequence_number": (self.sequence if shown is None else shown) + 1}, "response.failed")

    def _look(self, block: bytes) -> bytes:
        """Every event of the block; text by its name alone, once one was read."""
        out: list[bytes] = []
        for frame in split_frames(block):
            if self._overhead and frame.startswith(_TEXT_DELTA_FRAME) and frame.endswith(b"}\n\n"):
                self.n_content_bytes += max(1, len(frame) - self._overhead)
                self.n_signs += 1
                self.sequence += 1
                out.append(frame)
                continue
            event = read_frame(frame)
            if event.data:
                out.append(self._take(event))
                if self.done or self.error or self.broken:
                    break
            elif self.content:
                out.append(frame)
        return b"".join(out)

    def _take(self, event: Event) -> bytes:
        self.n_signs += 1
        if event.data.strip() == "[DONE]":
            return b""
        try:
            value = json.loads(event.data)
        except (ValueError, RecursionError):
            value = None
        if event.name == "error" and not isinstance(value, dict):
            value = {"type": "error", "message": event.data[:200]}
        if not isinstance(value, dict):
            self.broken = "not_json"
            return b""
        kind = _str_in(value, "type") or event.name
        self.error = find_responses_error(value if event.name != "error" else {"type": "error", **value})
        if self.error is not None:
            return b""
        self._notice(kind, value, event.raw)
        return self._named(value, event) if not self.broken else b""

    def _notice(self, kind: str, value: Json, raw: bytes) -> None:
        """What an event tells of the answer."""
        self._began = True
        if isinstance(value.get("sequence_number"), int):
            self.sequence = value["sequence_number"]
        if kind in ("response.created", "response.in_progress"):
            told = _dict_in(value, "response")
            self._response = {**self._response, **told, "model": self._echo or told.get("model")}
        delta = value.get("delta")
        if kind.endswith(".delta") and delta:
            n_bytes = len(delta.encode("utf-8", "replace")) if isinstance(delta, str) else 0
            self.content, self.n_content_bytes = True, self.n_content_bytes + n_bytes
            if raw.startswith(_TEXT_DELTA_FRAME):
                self._overhead = len(raw) - n_bytes
        elif kind in ("response.output_item.added", "response.output_item.done"):
            self.content = self.content or _is_content_item(value.get("item"))
            item = value.get("item")
            self._open_call = kind.endswith("added") and isinstance(item, dict) and str(item.get("type")).endswith("_call")
        elif kind in ("response.completed", "response.incomplete"):
            response = _dict_in(value, "response")
            self.usage = responses_usage(response)
            self.finish = kind.partition(".")[2]
            self.content = self.content or self.finish == "incomplete" or any(map(_is_content_item, _dicts_in(response, "output")))
            self.done = self.content
            self.broken = "" if self.content else "empty_answer"

    def _named(self, value: Json, event: Event) -> bytes:
        """The frame, under the client's own model name when it is to be echoed."""
        response = _dict_in(value, "response")
        if not self._echo or "model" not in response:
            return event.raw
        return write_event({**value, "response": {**response, "model": self._echo}}, event.name)


##############################################################################
# 12. Anthropic Messages                                    pure | uses 1-2, 8-9
##############################################################################
# Messages as clients send it and providers answer it: requests read into the hub and written from it, streams read and written, and
# MessagesPassage for streams that pass through.  Only shapes are known here; pairing, ids, seals, stops and counts are section 9's.
# A content block that is not named in _BLOCK_READERS is opaque: its own family gets it back as it came, others what section 9 makes of it.
# Source: Anthropic API reference and SDK types, Messages, read 2026-11.  Guarded by tests/test_format_messages.py.
# One more kind of block: rows in _BLOCK_READERS and _BLOCK_WRITERS; in answers a case in MessagesStreamReader._open and a row in MessagesStreamWriter.WRITES.

_OWN = "anthropic"                #: whose signatures, server blocks and citations this format carries verbatim

# ---- Checking

_MESSAGES_NUMBER = (int, float)
_MESSAGES_TYPES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "model": ((str,), "a string"),
    "max_tokens": ((int,), "an integer"),
    "messages": ((list,), "a list"),
    "system": ((str, list), "a string or a list"),
    "stream": ((bool,), "a boolean"),
    "temperature": (_MESSAGES_NUMBER, "a number"),
    "top_p": (_MESSAGES_NUMBER, "a number"),
    "top_k": ((int,), "an integer"),
    "stop_sequences": ((list,), "a list"),
    "tools": ((list,), "a list"),
    "tool_choice": ((dict,), "an object"),
    "thinking": ((dict,), "an object"),
    "output_config": ((dict,), "an object"),
    "output_format": ((dict,), "an object"),
    "metadata": ((dict,), "an object"),
    "cache_control": ((dict,), "an object"),
}
_MESSAGES_ROLES = ("assistant", "system", "user")
_THREAD_CODE = "thread_unsupported_request"


def check_messages_request(body: Any, *, threads: bool = False) -> Json:
    """The body when it is a Messages request by its structure. Raises GatewayError 400 that names the first field that is not.

    max_tokens may be missing, as in a request to count tokens.  threads: the provider keeps conversations itself (only Anthropic does).
    """
    if not isinstance(body, dict):
        raise bad_request("The body must be a JSON object.")
    if body.get("thread") is not None and not threads:
        # anthropic SDK 2.x reads the details and goes on with the whole history; without them it would lose its history silently
        raise bad_request("thread: conversations are not kept here, send the whole history.", param="thread", code=_THREAD_CODE)
    for name, value in body.items():
        types, expected = _MESSAGES_TYPES.get(name, ((object,), ""))
        if value is not None and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types and object not in types)):
            raise bad_request(f"{name} must be {expected}.", param=name, code="invalid_type")
    if body.get("model") == "" or (body.get("max_tokens") or 0) < 0:
        name, expected = ("model", "a name") if body.get("model") == "" else ("max_tokens", "0 or more")
        raise bad_request(f"{name} must be {expected}.", param=name, code="invalid_value")
    _check_blocks(body.get("system"), "system")
    if not body.get("messages"):
        raise bad_request("messages: at least one message is required", param="messages", code="invalid_type")
    for index, message in enumerate(body["messages"]):
        _check_turn(message, f"messages[{index}]")
    for index, tool in enumerate(body.get("tools") or ()):
        _check_tool(tool, f"tools[{index}]")
    return body


def _check_turn(message: Any, where: str) -> None:
    if not isinstance(message, dict):
        raise bad_request(f"{where} must be an object.", param=where, code="invalid_type")
    if message.get("role") not in _MESSAGES_ROLES:
        raise bad_request(f"{where}.role must be one of {', '.join(_MESSAGES_ROLES)}.", param=f"{where}.role", code="invalid_value")
    _check_blocks(message.get("content"), f"{where}.content")


def _check_blocks(content: Any, where: str) -> None:
    """Strings and lists of blocks pass, and so do blocks of kinds unknown here: Anthropic adds some every month."""
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise bad_request(f"{where} must be a string or a list of blocks.", param=where, code="invalid_type")
    for index, block in enumerate(content):
        place = f"{where}[{index}]"
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise bad_request(f"{place} must be a block with a type.", param=place, code="invalid_type")
        for name in _BLOCK_STRINGS.get(block["type"], ()):
            if not isinstance(block.get(name), str):
                raise bad_request(f"{place}.{name} must be a string.", param=f"{place}.{name}", code="missing_required_parameter")
        if block["type"] in ("image", "document"):
            _check_source(block.get("source"), f"{place}.source")
        if block["type"] == "tool_result":
            _check_blocks(block.get("content"), f"{place}.content")


#: What a block is nothing without.
_BLOCK_STRINGS: Mapping[str, tuple[str, ...]] = {"text": ("text",), "tool_use": ("id", "name"), "tool_result": ("tool_use_id",), "redacted_thinking": ("data",)}
_SOURCE_FIELDS: Mapping[str, str] = {"base64": "data", "text": "data", "url": "url", "file": "file_id", "content": "content"}


def _check_source(source: Any, where: str) -> None:
    field_name = _SOURCE_FIELDS.get(str(source.get("type")), "") if isinstance(source, dict) else ""
    if not field_name:
        raise bad_request(f"{where} must be an object of type {', '.join(_SOURCE_FIELDS)}.", param=where, code="invalid_value")
    value = source.get(field_name)
    if not isinstance(value, (str, list) if field_name == "content" else str):
        raise bad_request(f"{where}.{field_name} is missing.", param=f"{where}.{field_name}", code="missing_required_parameter")
    if field_name == "content":
        _check_blocks(value, f"{where}.content")


def _check_tool(tool: Any, where: str) -> None:
    if not isinstance(tool, dict) or not isinstance(tool.get("type", ""), (str, type(None))):
        raise bad_request(f"{where} must be an object.", param=where, code="invalid_type")
    if tool.get("type") in (None, "custom") and not (isinstance(tool.get("name"), str) and tool["name"]):
        raise bad_request(f"{where}.name is missing.", param=f"{where}.name", code="missing_required_parameter")
    if not isinstance(tool.get("input_schema", {}), (dict, type(None))):
        raise bad_request(f"{where}.input_schema must be an object.", param=f"{where}.input_schema", code="invalid_type")


_LONG_CONTEXT = re.compile(r"(?:\[1m\])+\Z", re.IGNORECASE)


def plain_model(name: str) -> str:
    """A model name without the [1m] that Claude Code hangs on it, once or more often."""
    return _LONG_CONTEXT.sub("", name)


# ---- Requests: reading

_THINKING_MODES: Mapping[str, str] = {"enabled": "on", "adaptive": "auto", "disabled": "off"}
_CHOICE_MODES = ("auto", "any", "none", "tool")
_SAMPLING_FIELDS = ("temperature", "top_p", "top_k")
#: What messages_read_request understands; the rest goes to extra, for the own family.
_READ_FIELDS = frozenset({"model", "max_tokens", "messages", "system", "stream", *_SAMPLING_FIELDS, "stop_sequences", "tools", "tool_choice", "thinking", "output_config",
                          "output_format", "metadata", "cache_control", "service_tier", "speed", "thread"})


def messages_read_request(body: Any) -> Json:
    """The hub request for a Messages body. Raises GatewayError 400.

    in:      {"model", "messages", "max_tokens"?, "system"?, "tools"?, ...}    out: hub request (section 9)
    kept in extra, for Messages providers only: container, mcp_servers, context_management, inference_geo, betas, ... and what is unknown.
    """
    check_messages_request(body)
    hub = new_hub("messages", body.get("model") or "", body.get("stream") is True)
    output = body.get("output_config") or {}
    choice = body.get("tool_choice") or {}
    system = _read_blocks(body.get("system"))
    for message in body["messages"]:
        parts = _read_blocks(message.get("content"))
        if message["role"] == "system" and not hub["turns"] and all(part["type"] == "text" for part in parts):
            system += parts
        else:
            hub["turns"].append({"role": message["role"], "parts": parts})
    drop(hub, *(f"system.{part['type']}" for part in system if part["type"] != "text"))
    found = {
        "system": [part for part in system if part["type"] == "text"],
        "tools": [_read_tool(tool) for tool in body.get("tools") or ()],
        "choice": _read_choice(choice),
        "parallel": False if choice.get("disable_parallel_tool_use") is True else None,
        "max_out": body.get("max_tokens"),
        "sampling": {name: body[name] for name in _SAMPLING_FIELDS if body.get(name) is not None},
        "stop": read_stop(body.get("stop_sequences")),
        "format": _read_format(output.get("format") or body.get("output_format")),
        "think": _read_thinking(body.get("thinking") or {}, output),
        "meta": _read_meta(body),
    }
    hub.update({name: value for name, value in found.items() if value not in (None, [], {})})
    rest = rest_of(body, _READ_FIELDS)
    more = {name: value for name, value in output.items() if name not in ("effort", "format")}
    hub["extra"]["messages"] = {**rest, "output_config": more} if more else rest
    for part in [part for turn in hub["turns"] for part in turn["parts"] if part["type"] == "tool_change" and part.get("named")]:
        part["add"] = part["add"] or [tool for tool in hub.get("tools", ()) if tool["name"] == part["named"]]
    return hub


def _read_choice(choice: Json) -> Json | None:
    mode = choice.get("type")
    if mode not in _CHOICE_MODES:
        return None
    return {"mode": mode, "name": str(choice.get("name", ""))} if mode == "tool" else {"mode": mode}


def _read_format(form: Any) -> Json | None:
    if not isinstance(form, dict) or not isinstance(form.get("schema"), dict):
        return None
    return {"kind": "schema", "schema": form["schema"], **({"name": form["name"]} if isinstance(form.get("name"), str) else {})}


def _read_thinking(thinking: Json, output: Json) -> Json:
    """Thinking and effort, two knobs: effort alone says nothing about thinking."""
    told = {"mode": _THINKING_MODES.get(str(thinking.get("type"))), "effort": output.get("effort"), "budget": thinking.get("budget_tokens"), "show": thinking.get("display")}
    kinds = {"budget": int}
    return {name: value for name, value in told.items() if isinstance(value, kinds.get(name, str))}


def _read_meta(body: Json) -> Json:
    user = (body.get("metadata") or {}).get("user_id")
    told = {"user": user, "session": session_of(user), "cache_auto": body.get("cache_control"), "tier": body.get("service_tier"), "speed": body.get("speed")}
    return {name: value for name, value in told.items() if value and isinstance(value, dict if name == "cache_auto" else str)}


def _read_tool(tool: Json) -> Json:
    """A tool of the client's own, or one that Anthropic runs or knows the schema of (hosted); `raw` is for the way back."""
    marks = {**({"cache": tool["cache_control"]} if tool.get("cache_control") else {}), **({"defer": True} if tool.get("defer_loading") else {})}
    if tool.get("type") not in (None, "custom"):
        return {"name": str(tool.get("name") or tool.get("mcp_server_name") or tool["type"]), "kind": "hosted", "family": _OWN, "raw": tool, **marks}
    told = {"description": about if isinstance(about := tool.get("description"), str) else None, "schema": tool.get("input_schema"), "strict": tool.get("strict")}
    return {"name": tool["name"], "kind": "function", **{name: value for name, value in told.items() if value is not None}, "raw": tool, **marks}


def _read_blocks(content: Any) -> list[Json]:
    """The parts of a system prompt, a message or a tool result."""
    if isinstance(content, str):
        return [text_part(content)]
    return [_BLOCK_READERS.get(block["type"], _read_other_block)(block) for block in content or ()]


def _object(value: Any) -> Json:
    """An object, an empty one for what is none."""
    return value if isinstance(value, dict) else {}


def _objects(value: Any) -> list[Json]:
    """The objects of a list, nothing for what is none."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _marked(part: Json, block: Json) -> Json:
    """The part with the block's cache mark."""
    return {**part, "cache": block["cache_control"]} if isinstance(block.get("cache_control"), dict) else part


def _read_text_block(block: Json) -> Json:
    part = text_part(block["text"])
    cites = [_read_citation(citation) for citation in _objects(block.get("citations"))]
    return _marked({**part, "cites": cites} if cites else part, block)


def _read_citation(citation: Json) -> Json:
    """A citation as the hub has it; one that we made up ourselves for a foreign provider has no raw form to go back to Anthropic."""
    cite = {"url": str(citation.get("url") or citation.get("source") or ""), "title": str(citation.get("title") or citation.get("document_title") or "")}
    ours = citation.get("type") == "web_search_result_location" and not citation.get("encrypted_index")
    return cite if ours else {**cite, "raw": citation, "family": _OWN}


def _read_source(source: Json) -> Json:
    """Where an image or a document lies: data and mime, text, url or file_id."""
    kind = source["type"]
    if kind == "base64":
        return {"data": "".join(source["data"].split()), "mime": source.get("media_type") or ""}
    if kind == "text":
        return {"text": source["data"], "mime": source.get("media_type") or "text/plain"}
    return {"url": source["url"]} if kind == "url" else {"file_id": source["file_id"]}


def _read_image_block(block: Json) -> Json:
    source = block["source"]
    if source["type"] == "url" and source["url"][:5].lower() == "data:":
        return _marked(image_part(source["url"]), block)
    return _read_other_block(block) if source["type"] in ("content", "text") else _marked({"type": "image", **_read_source(source)}, block)


def _read_document_block(block: Json) -> Json:
    """A file part; a document made of blocks stays opaque, since citations count its blocks."""
    if block["source"]["type"] == "content":
        return _read_other_block(block)
    told = {name: block[name] for name in ("title", "context", "citations") if block.get(name)}
    return _marked({"type": "file", **_read_source(block["source"]), **told}, block)


def _read_thinking_block(block: Json) -> Json:
    text, seal = block.get("thinking") or "", read_seal(block.get("signature"), _OWN, "signature")
    if seal is None:
        return {"type": "think", "text": text}
    hidden = seal.pop("text", "")           # thinking that the client asked not to see rides in its envelope
    return {"type": "think", "text": text or hidden, "seal": seal}


def _read_redacted_block(block: Json) -> Json:
    return {"type": "think", "text": "", "hidden": True, "seal": read_seal(block["data"], _OWN, "redacted") or {"family": "?", "model": "", "field": "?"}}


def _read_use_block(block: Json) -> Json:
    part = call_part(block["id"], block["name"], args_text(block.get("input")))
    return _marked({**part, "raw": {"caller": block["caller"]}} if block.get("caller") else part, block)


def _read_result_block(block: Json) -> Json:
    return _marked(result_part(block["tool_use_id"], _read_blocks(block.get("content")), error=block.get("is_error") is True), block)


def _read_other_block(block: Json) -> Json:
    text = _rendering(block)
    return {"type": "opaque", "family": _OWN, "format": "messages", "data": block, **({"text": text} if text else {})}


def _rendering(block: Json) -> str:
    """What other families may read of a block of Anthropic's own, "" for nothing."""
    kind = block["type"]
    if kind == "search_result":
        return f'<search_result source="{block.get("source", "")}" title="{block.get("title", "")}">\n{_inner_text(block.get("content"))}\n</search_result>'
    if kind == "document":
        told = {name: block[name] for name in ("title", "context") if block.get(name)}
        return document_text({**told, "text": _inner_text(block["source"]["content"])})
    text = _inner_text(block) if kind.endswith("_tool_result") or kind in ("tool_reference", "compaction") else ""
    return f"<summary>\n{text}\n</summary>" if kind == "compaction" and text else text


#: Where the blocks of server tools keep what can be read, in the order in which it is told.
_READABLE = ("text", "stdout", "stderr", "content", "tool_references", "source")


def _inner_text(value: Any) -> str:
    """The readable text anywhere inside a block, a line each: hits of a search by title and address."""
    if isinstance(value, list):
        return "\n".join(filter(None, map(_inner_text, value)))
    if not isinstance(value, dict):
        return value if isinstance(value, str) else ""
    if "tool_name" in value:
        return f"Tool available: {value['tool_name']}"
    if value.get("type") == "web_search_result":
        return f"{value.get('title') or ''} {value.get('url') or ''}".strip()
    if value.get("type") == "text" and "data" in value:
        return str(value["data"])
    return "\n".join(filter(None, (_inner_text(value.get(name)) for name in _READABLE)))


def _read_addition_block(block: Json) -> Json:
    """A tool that is to be offered from here on: defined here, or named and defined in the request."""
    tool = _object(block.get("tool"))
    definition = _object(tool.get("definition"))
    return {"type": "tool_change", "add": [_read_tool(definition)] if isinstance(definition.get("name"), str) else [], "named": str(tool.get("name") or ""), "raw": block}


def _read_removal_block(block: Json) -> Json:
    return {"type": "tool_change", "remove": [str(_object(block.get("tool")).get("name") or "")], "raw": block}


_BLOCK_READERS: Mapping[str, Callable[[Json], Json]] = {
    "text": _read_text_block,
    "image": _read_image_block,
    "document": _read_document_block,
    "thinking": _read_thinking_block,
    "redacted_thinking": _read_redacted_block,
    "tool_use": _read_use_block,
    "tool_result": _read_result_block,
    "tool_addition": _read_addition_block,
    "tool_removal": _read_removal_block,
}


# ---- Requests: writing

def messages_write_request(hub: Json, profile: Profile) -> Json:
    """The Messages body for a prepared hub request (section 9, prepare).

    out:     {"model", "max_tokens", "system"?, "messages", "tools"?, ...}    source: Anthropic API reference, Messages, read 2026-11.
    """
    body: Json = {"model": profile.model or plain_model(hub["model"]), "max_tokens": hub.get("max_out", profile.default_max_out)}
    if hub.get("system"):
        body["system"] = _write_content(hub["system"], hub, profile)
    body["messages"] = [{"role": turn["role"], "content": _write_content(turn["parts"], hub, profile)} for turn in hub["turns"]]
    if hub.get("tools"):
        body["tools"] = [_write_tool(tool, profile) for tool in hub["tools"]]
        choice = _write_choice(hub)
        if choice:
            body["tool_choice"] = choice
    if hub.get("stream"):
        body["stream"] = True
    body.update(hub.get("sampling") or {})
    if hub.get("stop"):
        body["stop_sequences"] = hub["stop"]
    _write_thinking(body, hub, profile)
    _write_meta(body, hub.get("meta") or {})
    own = hub["extra"].get("messages", {}) if hub["client"] == "messages" else {}
    return {**body, **{name: value for name, value in own.items() if name not in body and name != "output_config"}}


def _write_choice(hub: Json) -> Json:
    """The tool choice, which is also where parallel calls are forbidden."""
    choice = hub.get("choice") or {}
    written = {"type": choice["mode"], **({"name": choice["name"]} if choice["mode"] == "tool" else {})} if choice else {}
    if hub.get("parallel") is False and written.get("type") != "none":
        return {**(written or {"type": "auto"}), "disable_parallel_tool_use": True}
    return written


def _write_thinking(body: Json, hub: Json, profile: Profile) -> None:
    think, form = hub.get("think") or {}, hub.get("format") or {}
    if think.get("form"):
        told = {"type": think["form"], "budget_tokens": think.get("budget"), "display": think.get("display")}
        body["thinking"] = {name: value for name, value in told.items() if value}
    output = dict(hub["extra"].get("messages", {}).get("output_config") or {}) if hub["client"] == "messages" and profile.vendor else {}
    if think.get("effort"):
        output["effort"] = think["effort"]
    if form.get("kind") == "schema":
        output["format"] = {"type": "json_schema", "schema": form["schema"]}
    if output:
        body["output_config"] = output


def _write_meta(body: Json, meta: Json) -> None:
    if meta.get("user"):
        body["metadata"] = {"user_id": meta["user"]}
    for name, value in (("cache_control", meta.get("cache_auto")), ("service_tier", meta.get("tier")), ("speed", meta.get("speed"))):
        if value:
            body[name] = value


def _write_tool(tool: Json, profile: Profile) -> Json:
    """A tool; `raw` is there when it is on its way back to the family it came from."""
    if tool["kind"] == "hosted":
        written = dict(tool["raw"])
    else:
        written = {**(tool.get("raw") or {}), "name": tool["wire"]}
        if tool.get("description"):
            written["description"] = tool["description"]
        written["input_schema"] = tool.get("schema") or {"type": "object", "properties": {}}
        if tool.get("strict") and profile.vendor:
            written["strict"] = True
    written.pop("cache_control", None)
    return {**written, "cache_control": tool["cache"]} if tool.get("cache") else written


def _write_content(parts: Sequence[Json], hub: Json, profile: Profile) -> str | list[Json]:
    """The blocks of a turn; a plain string where there is one text and no more to say of it."""
    native = profile.vendor and hub["client"] == "messages"
    blocks = [_BLOCK_WRITERS[part["type"]](part, native) for part in parts]
    return blocks[0]["text"] if len(blocks) == 1 and blocks[0].keys() == {"type", "text"} else blocks


def _with_mark(block: Json, part: Json) -> Json:
    return {**block, "cache_control": part["cache"]} if part.get("cache") else block


def _write_text_block(part: Json, native: bool) -> Json:
    block = {"type": "text", "text": part["text"]}
    citations = [cite["raw"] for cite in part.get("cites") or () if native and cite.get("family") == _OWN and "raw" in cite]
    return _with_mark({**block, "citations": citations} if citations else block, part)


def _write_source(part: Json) -> Json:
    if "data" in part:
        return {"type": "base64", "media_type": part["mime"], "data": part["data"]}
    if "text" in part:
        return {"type": "text", "media_type": "text/plain", "data": part["text"]}
    return {"type": "url", "url": part["url"]} if "url" in part else {"type": "file", "file_id": part["file_id"]}


def _write_image_block(part: Json, native: bool) -> Json:
    return _with_mark({"type": "image", "source": _write_source(part)}, part)


def _write_file_block(part: Json, native: bool) -> Json:
    title = part.get("title") or part.get("name")
    told = {"title": title, "context": part.get("context"), "citations": part.get("citations") if native else None}
    return _with_mark({"type": "document", "source": _write_source(part), **{name: value for name, value in told.items() if value}}, part)


def _write_thinking_block(part: Json, native: bool) -> Json:
    """Thinking for the family that made it; text without a seal goes only where the profile says so, under an empty signature."""
    seal = part.get("seal") or {}
    data = seal.get("data") if isinstance(seal.get("data"), str) else ""
    if seal.get("field") == "redacted":
        return {"type": "redacted_thinking", "data": data}
    return {"type": "thinking", "thinking": part["text"], "signature": data}


def _write_use_block(part: Json, native: bool) -> Json:
    block = {"type": "tool_use", "id": part["id"], "name": part["name"], "input": args_object(part["args"])}
    return _with_mark({**block, **part["raw"]} if native and part.get("raw") else block, part)


def _write_result_block(part: Json, native: bool) -> Json:
    block: Json = {"type": "tool_result", "tool_use_id": part["id"]}
    inner = [_BLOCK_WRITERS[item["type"]](item, native) for item in part["parts"] if item["type"] != "text" or not is_blank(item["text"])]
    if inner:
        block["content"] = inner[0]["text"] if len(inner) == 1 and inner[0].keys() == {"type", "text"} else inner
    return _with_mark({**block, "is_error": True} if part.get("error") else block, part)


def _write_opaque_block(part: Json, native: bool) -> Json:
    return dict(part["data"])


def _write_change_block(part: Json, native: bool) -> Json:
    return dict(part["raw"])


_BLOCK_WRITERS: Mapping[str, Callable[[Json, bool], Json]] = {
    "text": _write_text_block,
    "refusal": _write_text_block,
    "image": _write_image_block,
    "file": _write_file_block,
    "think": _write_thinking_block,
    "call": _write_use_block,
    "result": _write_result_block,
    "opaque": _write_opaque_block,
    "tool_change": _write_change_block,
}


# ---- Answers: reading

@dataclass(slots=True)
class _BlockReader:
    """One content block between its start and its stop."""
    index: Any
    key: int                              #: its number in this answer, for providers repeat an index
    body: Json                            #: as it started
    input_text: str = ""                  #: input of a server tool
    called: bool = False                  #: arguments of a call have come as deltas
    signature: str = ""
    thought: bool = False                 #: more than blanks was thought
    cites: list[Json] = field(default_factory=list)
    began_at: int = 0                     #: characters of text before it
    waiting: list[Json] = field(default_factory=list)    #: deltas that came while another block was open
    stopped: bool = False


class MessagesStreamReader:
    """A provider's Messages stream as deltas.

    Blocks are taken in the order of their starts; one that begins while another is open waits until that one stops.
    `done`: the end mark or an error has come, close() may be called.
    """

    __slots__ = ("done", "_out", "_blocks", "_usage", "_n_blocks", "_n_chars", "_ended")

    def __init__(self, source: Source) -> None:
        self.done = False
        self._out = Serialiser(source)
        self._blocks: deque[_BlockReader] = deque()
        self._usage: Json = {}
        self._n_blocks = self._n_chars = 0
        self._ended = False

    @property
    def counted(self) -> Json:
        """What the provider has counted so far."""
        return self._out.counted

    def feed(self, event: Event) -> list[Json]:
        """The deltas of one event; events that are not known give none."""
        text = event.data.strip()
        if self.done or not text:
            return []
        if text == "[DONE]":
            self.done = self._ended = True
            return []
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            value = {"type": "error", "error": {"message": text[:200] if event.name == "error" else "provider sent something that is not JSON"}}
        return self.read(value, event.name)

    def read(self, value: Json, name: str = "") -> list[Json]:
        """The deltas of one event that is parsed already; `name` is its event line."""
        kind = "error" if name == "error" else value.get("type") or ("error" if value.get("error") else name)
        if kind == "content_block_delta":
            self._more(value)
        elif kind == "content_block_start":
            self._start_block(value.get("index"), value.get("content_block"))
        elif kind == "content_block_stop":
            self._stop_block(value.get("index"))
        elif kind == "message_start":
            self._start(value.get("message"))
        elif kind == "message_delta":
            self._finish(value)
        elif kind == "message_stop":
            self.done = self._ended = True
        elif kind == "error":
            self._stop_all()
            self._out.fail(read_error(value))
            self.done = True
        return self._out.take()

    def close(self) -> list[Json]:
        """What is owed at the end: usage and the stop, or an error when the stream was cut."""
        if not self._out.failed:
            self._stop_all()
        self.done = True
        return self._out.close(ended=self._ended)

    def _start(self, message: Any) -> None:
        message = _object(message)
        self._count(message.get("usage"))
        self._out.start(str(message.get("id") or ""), str(message.get("model") or ""), self._told())

    def _count(self, usage: Any) -> None:
        """Usage is cumulative and partial: each key that is not null replaces what was told before."""
        if isinstance(usage, dict):
            self._usage = merge_usage(self._usage, usage)
            self._out.usage(self._told())

    def _told(self) -> Json:
        """Usage in the hub's counts; an input of 0 means that a server does not count, never an empty prompt."""
        return {name: count for name, count in read_usage("messages", self._usage).items() if count or name != "input"}

    def _finish(self, value: Json) -> None:
        delta = _object(value.get("delta"))
        self._count(value.get("usage"))
        self._out.finish(read_stop_reason("messages", delta.get("stop_reason")), delta.get("stop_sequence"), _object(delta.get("stop_details")) or None)

    def _find(self, index: Any) -> _BlockReader | None:
        return next((block for block in reversed(self._blocks) if block.index == index and not block.stopped), None)

    def _start_block(self, index: Any, body: Any) -> None:
        if self._find(index) is not None:
            self._stop_block(index)
        self._n_blocks += 1
        self._blocks.append(_BlockReader(index, self._n_blocks, dict(_object(body))))
        if len(self._blocks) == 1:
            self._open(self._blocks[0])

    def _more(self, value: Json) -> None:
        index, delta = value.get("index"), value.get("delta")
        if not isinstance(delta, dict):
            return
        block = self._find(index)
        if block is None:
            kind = _UNSTARTED.get(str(delta.get("type")))
            if kind is None:
                return
            self._start_block(index, {"type": kind})
            block = self._blocks[-1]
        if block is self._blocks[0]:
            self._apply(block, delta)
        else:
            block.waiting.append(delta)

    def _stop_block(self, index: Any) -> None:
        block = self._find(index)
        if block is not None:
            block.stopped = True
        while self._blocks and self._blocks[0].stopped:
            self._end(self._blocks.popleft())
            if self._blocks:
                self._open(self._blocks[0])

    def _stop_all(self) -> None:
        for block in self._blocks:
            block.stopped = True
        self._stop_block(None)

    def _open(self, block: _BlockReader) -> None:
        """The block's turn has come: give out how it started, and what has come since."""
        body, kind = block.body, block.body.get("type")
        block.began_at = self._n_chars
        if kind == "text":
            self._apply(block, {"type": "text_delta", "text": body.get("text")})
            block.cites += _objects(body.get("citations"))
        elif kind == "thinking":
            self._apply(block, {"type": "thinking_delta", "thinking": body.get("thinking")})
            block.signature = str(body.get("signature") or "")
        elif kind == "redacted_thinking":
            self._out.seal({"field": "redacted", "data": str(body.get("data") or "")})
        elif kind == "tool_use":
            self._out.call(block.key, str(body.get("id") or ""), str(body.get("name") or ""))
        for delta in block.waiting:
            self._apply(block, delta)
        block.waiting.clear()

    def _apply(self, block: _BlockReader, delta: Json) -> None:
        kind = str(delta.get("type"))
        text = delta.get(_DELTA_FIELDS.get(kind, ""))
        if kind == "citations_delta" and isinstance(delta.get("citation"), dict):
            block.cites.append(delta["citation"])
        elif kind not in _DELTA_FIELDS:
            _fold_unknown(block.body, delta)
        elif not isinstance(text, str) or not text:
            return
        elif kind == "text_delta":
            self._n_chars += len(text)
            self._out.text(text)
        elif kind == "thinking_delta":
            block.thought = block.thought or not is_blank(text)
            self._out.think(text, "signature")
        elif kind == "signature_delta":
            block.signature = text
        elif block.body.get("type") == "tool_use":
            block.called = True
            self._out.args(block.key, text)
        else:
            block.input_text += text

    def _end(self, block: _BlockReader) -> None:
        kind = block.body.get("type")
        if kind == "text":
            for citation in block.cites:
                self._out.cite({**_read_citation(citation), "start": block.began_at, "end": self._n_chars})
        elif kind == "thinking":
            if block.signature or block.thought:
                self._out.seal({"field": "signature", **({"data": block.signature} if block.signature else {})})
        elif kind == "tool_use":
            if not block.called and block.body.get("input"):
                self._out.args(block.key, args_text(block.body["input"]))
            self._out.end_call(block.key)
        elif kind and kind != "redacted_thinking":
            self._out.opaque(_OWN, {**block.body, "input": args_object(block.input_text)} if block.input_text else block.body)


#: Where a delta holds its text, and the block it opens on servers that send no start.
_DELTA_FIELDS: Mapping[str, str] = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature", "input_json_delta": "partial_json"}
_UNSTARTED: Mapping[str, str] = {"text_delta": "text", "citations_delta": "text", "thinking_delta": "thinking", "signature_delta": "thinking"}


def _fold_unknown(body: Json, delta: Json) -> None:
    """Add a delta of a kind unknown here (compaction_delta among them) to its block: texts are joined, the rest replaced."""
    for name, value in delta.items():
        if name != "type" and value is not None:
            body[name] = body[name] + value if isinstance(value, str) and isinstance(body.get(name), str) else value


def messages_read_answer(body: Any, source: Source) -> list[Json]:
    """The deltas of a whole answer, by way of the events it would have been."""
    reader = MessagesStreamReader(source)
    deltas = [delta for event in _answer_events(body if isinstance(body, dict) else {}) for delta in reader.read(event)]
    return deltas + reader.close()


def _answer_events(body: Json) -> Iterator[Json]:
    if find_messages_error(body) is not None:
        yield {"type": "error", "error": body.get("error") or body}
        return
    if isinstance(body.get("content"), list):
        yield {"type": "message_start", "message": body}
        for index, block in enumerate(body["content"]):
            yield {"type": "content_block_start", "index": index, "content_block": block}
            yield {"type": "content_block_stop", "index": index}
        yield {"type": "message_delta", "delta": body, "usage": None}
    yield {"type": "message_stop"}


# ---- Answers: writing

def _delta_head(index: int, kind: str) -> bytes:
    """An event with a delta up to its text; _DELTA_END closes it.  The bytes are those that write_event gives."""
    return b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":"%s","%s":' % (index, kind.encode(), _DELTA_FIELDS[kind].encode())


_DELTA_END = b"}}\n\n"
_MESSAGE_STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
_PING = b'event: ping\ndata: {"type":"ping"}\n\n'
#: The delta of an open block, by the kind of hub delta that fills it.
_FILLS: Mapping[str, str] = {"text": "text_delta", "refuse": "text_delta", "think": "thinking_delta", "args": "input_json_delta"}


def messages_take_up(sent: bytes, asked: Asked) -> tuple[MessagesStreamWriter, str] | None:
    """(a writer that goes on with a stream that broke off inside its text, that text); None where it did not, or holds more than thinking and one text."""
    pieces: list[str] = []
    index, n_blocks, open_kind = -1, 0, ""
    for frame in split_frames(sent):
        event = read_frame(frame)
        value = json.loads(event.data) if event.data else {}
        kind, delta, block = value.get("type") or event.name, value.get("delta"), value.get("content_block")
        if kind == "content_block_start" and isinstance(block, dict) and not pieces and open_kind != "text":
            index, n_blocks, open_kind = value.get("index"), n_blocks + 1, str(block.get("type"))
            pieces += [str(block["text"])] if open_kind == "text" and block.get("text") else []
        elif kind == "content_block_delta" and isinstance(delta, dict) and value.get("index") == index and delta.get("type") in _TAKEN_UP_DELTAS.get(open_kind, ()):
            pieces += [str(delta.get("text") or "")] if open_kind == "text" else []
        elif kind == "content_block_stop" and open_kind not in ("", "text"):
            open_kind = ""
        elif kind and kind not in ("message_start", "ping"):
            return None
    if open_kind != "text" or index != n_blocks - 1 or not "".join(pieces):
        return None
    writer = MessagesStreamWriter(asked)
    writer.take_up(n_blocks - 1)
    return writer, "".join(pieces)


#: Deltas that may stand in a stream for it to be taken up, by kind of block.
_TAKEN_UP_DELTAS: Mapping[str, tuple[str, ...]] = {"text": ("text_delta",), "thinking": ("thinking_delta", "signature_delta"), "redacted_thinking": ()}


class MessagesStreamWriter:
    """Hub deltas as a Messages client's stream: one block open at a time, numbered without gaps."""

    __slots__ = ("_asked", "_index", "_kind", "_head", "_bare", "_cited", "_hides", "_thought", "_usage", "_started", "_ended")

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._index = -1
        self._kind = ""             #: the delta the open block takes: text_delta and so on, other for one that is whole, "" for none
        self._head = b""            #: such an event up to its text
        self._bare = False          #: a call without arguments so far
        self._cited = False         #: the open text has citations; more text gets a block of its own
        self._hides = (asked.hub.get("think") or {}).get("show") == "omitted"
        self._thought: list[str] = []
        self._usage: Json = {}
        self._started = self._ended = False

    def feed(self, delta: Json) -> list[bytes]:
        """The frames of one delta."""
        kind = delta["delta"]
        if _FILLS.get(kind) == self._kind and not self._cited and not (self._hides and kind == "think"):
            self._bare = False
            return [write_alike(self._head, delta.get("pieces") or (delta["text"],), _DELTA_END)]
        if "pieces" in delta:
            return [frame for text in delta["pieces"] for frame in self.feed(text_delta(text))]
        return [write_event(event, event["type"]) for event in self.events(delta)]

    def take_up(self, index: int) -> None:
        """Go on inside the text block of that number."""
        self._started, self._index, self._kind, self._head = True, index, "text_delta", _delta_head(index, "text_delta")

    def events(self, delta: Json) -> list[Json]:
        """The same, as objects."""
        if self._ended:
            return []
        begun = [] if self._started or delta["delta"] == "error" else self._begin(delta)
        write = self.WRITES.get(delta["delta"])
        return begun + (write(self, delta) if write else [])

    def close(self) -> list[bytes]:
        """What is owed when no more deltas come: nothing, unless they ended without a stop."""
        return [write_event(event, event["type"]) for event in self.cut()]

    def cut(self) -> list[Json]:
        """The same, as objects."""
        return [] if self._ended else self.events(error_delta(502, "upstream closed the stream before finishing"))

    def keep_alive(self) -> bytes:
        """A frame that says nothing, for silences."""
        return _PING

    def error(self, error: GatewayError) -> bytes:
        """The frame that ends a broken stream; the open block stays open, so that nobody takes it for whole."""
        return write_event(self._fail(error), "error")

    def _fail(self, error: GatewayError) -> Json:
        self._ended, self._kind = True, ""
        return messages_error(error)

    def _begin(self, delta: Json) -> list[Json]:
        self._started = True
        self._usage = dict(delta.get("usage") or {}) if delta["delta"] == "start" else {}
        message = {"id": mint("msg_", self._asked.seed), "type": "message", "role": "assistant", "model": self._asked.hub["model"], "content": [],
                   "stop_reason": None, "stop_sequence": None, "usage": write_usage("messages", self._usage)}
        return [{"type": "message_start", "message": message}]

    def _open(self, kind: str, block: Json) -> list[Json]:
        shut = self._shut()
        self._index += 1
        self._kind, self._head = kind, _delta_head(self._index, kind) if kind in _DELTA_FIELDS else b""
        return [*shut, {"type": "content_block_start", "index": self._index, "content_block": block}]

    def _shut(self) -> list[Json]:
        if not self._kind:
            return []
        owed = [self._fill("{}")] if self._bare else []
        self._kind, self._bare, self._cited = "", False, False
        return [*owed, {"type": "content_block_stop", "index": self._index}]

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _fill(self, text: str) -> Json:
        """More of what the open block takes."""
        self._bare = False
        return self._delta({"type": self._kind, _DELTA_FIELDS[self._kind]: text})

    def _write_text(self, delta: Json) -> list[Json]:
        opened = [] if self._kind == "text_delta" and not self._cited else self._open("text_delta", {"type": "text", "text": ""})
        return [*opened, self._fill(delta["text"])]

    def _open_thinking(self) -> list[Json]:
        self._thought = []
        return self._open("thinking_delta", {"type": "thinking", "thinking": "", "signature": ""})

    def _write_think(self, delta: Json) -> list[Json]:
        opened = [] if self._kind == "thinking_delta" else self._open_thinking()
        if self._hides:
            self._thought.append(delta["text"])
            return opened
        return [*opened, self._fill(delta["text"])]

    def _write_args(self, delta: Json) -> list[Json]:
        return [self._fill(delta["text"])] if self._kind == "input_json_delta" else []

    def _write_seal(self, delta: Json) -> list[Json]:
        """The signature, in one delta right before its block's stop; redacted thinking is a block without text."""
        record = {name: value for name, value in delta.items() if name != "delta"}
        if record.get("family") == _OWN and record.get("field") == "redacted":
            return [*self._open("other", {"type": "redacted_thinking", "data": record.get("data") or ""}), *self._shut()]
        opened = [] if self._kind == "thinking_delta" else self._open_thinking()
        signature = write_seal(record, _OWN, "".join(self._thought) or None)
        return [*opened, self._delta({"type": "signature_delta", "signature": signature}), *self._shut()]

    def _write_call(self, delta: Json) -> list[Json]:
        opened = self._open("input_json_delta", {"type": "tool_use", "id": delta["id"], "name": delta["name"], "input": {}})
        self._bare = True
        return opened

    def _write_cite(self, delta: Json) -> list[Json]:
        """A citation of the open text; one of another family is told as a search result, marked as ours by its empty index."""
        if self._kind != "text_delta":
            return []
        made = {"type": "web_search_result_location", "url": delta.get("url") or "", "title": delta.get("title") or "", "cited_text": "", "encrypted_index": ""}
        self._cited = True
        return [self._delta({"type": "citations_delta", "citation": delta["raw"] if delta.get("family") == _OWN and "raw" in delta else made})]

    def _write_opaque(self, delta: Json) -> list[Json]:
        block = delta.get("data")
        if delta.get("family") != _OWN or not isinstance(block, dict) or "type" not in block:
            return []
        if not block.get("input"):
            return [*self._open("other", block), *self._shut()]
        opened = self._open("input_json_delta", {**block, "input": {}})
        return [*opened, self._fill(compact(block["input"])), *self._shut()]

    def _write_usage(self, delta: Json) -> list[Json]:
        self._usage = merge_usage(self._usage, delta)
        return []

    def _write_stop(self, delta: Json) -> list[Json]:
        shut = self._shut()
        end = {"stop_reason": WRITE_STOPS["messages"][delta["reason"]], "stop_sequence": delta.get("sequence")}
        if delta.get("details"):
            end["stop_details"] = delta["details"]
        self._ended = True
        return [*shut, {"type": "message_delta", "delta": end, "usage": write_usage("messages", self._usage)}, {"type": "message_stop"}]

    def _write_error(self, delta: Json) -> list[Json]:
        return [self._fail(GatewayError(delta["message"], delta["status"], delta.get("code")))]

    #: Hub deltas by kind; start has been seen to, notes are for the memo alone.
    WRITES: Mapping[str, Callable[[MessagesStreamWriter, Json], list[Json]]] = {
        "text": _write_text, "refuse": _write_text, "think": _write_think, "args": _write_args, "seal": _write_seal, "call": _write_call, "cite": _write_cite, "opaque": _write_opaque,
        "usage": _write_usage, "stop": _write_stop, "error": _write_error,
    }


def messages_write_answer(deltas: Iterable[Json], asked: Asked) -> Json:
    """The body of an answer that is not streamed: the client's stream, folded as a client would; the error's envelope when there was one."""
    writer, message = MessagesStreamWriter(asked), {}
    for delta in _joined(deltas):
        for event in writer.events(delta):
            _fold_event(message, event)
    for event in writer.cut():
        _fold_event(message, event)
    return message


def _joined(deltas: Iterable[Json]) -> list[Json]:
    """The deltas with neighbours of one kind made one, which spares the folding of thousands of events."""
    joined: list[Json] = []
    for delta in deltas:
        last = joined[-1] if joined else {}
        if delta["delta"] == "note":
            continue
        if delta["delta"] in _FILLS and last.get("delta") == delta["delta"]:
            last["pieces"].append(delta["text"])
        else:
            joined.append({**delta, "pieces": [delta["text"]]} if delta["delta"] in _FILLS else delta)
    return [{"delta": delta["delta"], "text": "".join(delta["pieces"])} if "pieces" in delta else delta for delta in joined]


def _fold_event(message: Json, event: Json) -> None:
    """Put one event of our own stream into the message."""
    kind, delta = event["type"], event.get("delta") or {}
    block = message["content"][-1] if message.get("content") else {}
    if kind == "error":
        message.clear()
        message.update(event)
    elif kind == "message_start":
        message.update(event["message"])
    elif kind == "content_block_start":
        message["content"].append(event["content_block"])
    elif kind == "message_delta":
        message.update({**delta, "usage": event["usage"]})
    elif delta.get("type") == "citations_delta":
        block.setdefault("citations", []).append(delta["citation"])
    elif delta.get("type") == "input_json_delta":
        block["input"] = args_object(delta["partial_json"])
    elif delta:
        name = _DELTA_FIELDS[delta["type"]]
        block[name] += delta[name]


# ---- Errors

_MESSAGES_ERROR_TYPES: Mapping[int, str] = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error", 408: "timeout_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error", 529: "overloaded_error",
}


def messages_error(error: GatewayError, request_id: str = "") -> Json:
    """The envelope of an error, as a body and as an event in a stream."""
    kind = _MESSAGES_ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    inner: Json = {"type": kind, "message": error.message}
    if error.code == _THREAD_CODE:
        inner["details"] = {"error_code": _THREAD_CODE, "unsupported": [error.param]}
    return {"type": "error", "error": inner, **({"request_id": request_id} if request_id else {})}


def messages_status(error: GatewayError) -> int:
    """The HTTP status of an error for a Messages client: overload has one of its own there."""
    return 529 if error.code == "server_is_overloaded" else error.status


def find_messages_error(body: Any) -> Any:
    """The part of a 200 body or of a stream event that says it is an error, None when it is not one."""
    if isinstance(body, list) and len(body) == 1:
        return find_messages_error(body[0])
    if not isinstance(body, dict):
        return None
    return body if body.get("type") == "error" or (body.get("error") and "content" not in body and not body.get("type")) else None


# ---- Passing through

def messages_usage(told: Json) -> Usage | None:
    """Usage of a whole answer, a message_start or a message_delta; None when there is none.  Those of one stream are to be merged first."""
    message = told.get("message")
    usage = told.get("usage") or (message.get("usage") if isinstance(message, dict) else None)
    counts = read_usage("messages", usage)
    return Usage(**counts) if counts else None


#: Stops that may rightly come with nothing to show.
_SILENT_ENDS = frozenset({"max_tokens", "refusal", "pause_turn", "stop_sequence", "model_context_window_exceeded", "compaction"})
_PLAIN_DELTA = re.compile(rb'"(?:text|thinking|partial_json)"\s*:\s*"')
_DELTA_REST = re.compile(rb'(?:[^"\\]|\\.)*"[ }]*}\n\n\Z')


def judge_messages_answer(body: Any) -> tuple[str, Usage | None]:
    """Whether a whole body is a Messages answer: ("", usage) when it is, else why not (not_json, empty_answer); an empty one may have been counted."""
    if not isinstance(body, dict) or not isinstance(body.get("content"), list) or not all(isinstance(block, dict) for block in body["content"]):
        return "not_json", None
    if not any(map(_shows, body["content"])) and str(body.get("stop_reason")) not in _SILENT_ENDS:
        return "empty_answer", messages_usage(body)
    return "", messages_usage(body)


def _shows(block: Any) -> bool:
    """Whether a block, as it starts or as it is, holds something of an answer: all do but text and thinking without any."""
    return isinstance(block, dict) and (block.get("type") not in ("text", "thinking") or any(block.get(name) for name in ("text", "thinking", "signature")))


class MessagesPassage:
    """A provider's Messages stream on its way through: feed() and close() give what may go to the client, attributes tell what was seen.

    Only whole events leave.  Nothing leaves after the end, after an error, or after garbage.
    """

    __slots__ = ("content", "done", "finish", "usage", "error", "broken", "n_content_bytes", "n_signs", "frames", "_echo", "_prefix", "_raw_usage", "_called", "_open_call")

    def __init__(self, *, wants_usage: bool = True, echo_model: str | None = None, n_prompt_tokens: int = 0) -> None:
        """wants_usage is what other formats' passages ask; a Messages stream always carries its usage."""
        self.content = False                #: something of the answer itself has come
        self.done = False                   #: the end mark has come
        self.finish: str | None = None      #: the first stop reason
        self.usage: Usage | None = None
        self.error: Any = None              #: what find_messages_error found
        self.broken = ""                    #: why the stream cannot be trusted further: not_json, too_big, cut, empty_answer
        self.n_content_bytes = 0            #: for an estimate where no usage comes
        self.n_signs = 0                    #: grows with every sign of life: events, and comments once an event has come
        self._echo = echo_model
        self.frames = FrameSplitter()
        self._prefix = b""                  #: what the last plain delta had before its text
        self._raw_usage: Json = {}
        self._called = self._open_call = False

    @property
    def calling(self) -> bool:
        """Whether a tool call is open."""
        return self._open_call

    def keep_alive(self) -> bytes:
        """A frame that says nothing, for silences."""
        return _PING

    def feed(self, chunk: bytes) -> bytes:
        """What of `chunk`, and of what was kept before it, may go to the client now."""
        if self.done or self.error or self.broken:
            return b""
        try:
            block = self.frames.feed(chunk)
        except UpstreamFailure as failure:
            self.broken = failure.reason
            return b""
        return self._look(block) if block else b""

    def close(self) -> bytes:
        """The provider's connection has ended: what is still owed to the client. Sets `broken` to cut or empty_answer when it ended wrongly."""
        rest = self.frames.rest
        event = read_frame(rest)
        out = self._look(rest + b"\n\n") if not self.done and event.data and (event.data.strip() == "[DONE]" or whole_json(event.data)) else b""
        if self.done or self.error or self.broken:
            return out
        if self.finish is not None:
            self.done = True
            return out + _MESSAGE_STOP
        self.broken = "cut" if self.content else "empty_answer"
        return out

    def _look(self, block: bytes) -> bytes:
        """Every event of the block; one that begins like the plain delta before it needs no closer look. One loop kept whole: it runs per event."""
        out: list[bytes] = []
        prefix, n_plain_bytes = self._prefix, 0
        for frame in split_frames(block):
            if prefix and frame.startswith(prefix) and frame.endswith(b"}\n\n"):
                n_plain_bytes += frame.rfind(b'"') - len(prefix)
                out.append(frame)
                continue
            event = read_frame(frame)
            if event.data:
                out.append(self._take(event))
                prefix = self._prefix
                if self.done or self.error or self.broken:
                    break
            elif self.content:
                out.append(frame)
            else:
                self.n_signs += bool(self.n_signs)
        self.n_content_bytes += n_plain_bytes
        self.n_signs += self.content
        return b"".join(out)

    def _take(self, event: Event) -> bytes:
        """One event with data."""
        self.n_signs += 1
        try:
            value = json.loads(event.data)
        except (ValueError, RecursionError):
            value = None
        ended = event.data.strip() == "[DONE]" or (isinstance(value, dict) and (value.get("type") or event.name) == "message_stop")
        found = value or {"error": {"message": event.data}} if event.name == "error" else find_messages_error(value)
        if ended or (self.finish is not None and (found is not None or not isinstance(value, dict))):
            self.done = True                # an error behind a proper end changes nothing that was said
            return self._end(event.raw if ended and value and event.name else _MESSAGE_STOP) if self.finish is not None or self.content else b""
        if found is not None or not isinstance(value, dict):
            self.error, self.broken = found, "" if found is not None else "not_json"
            return b""
        return self._take_value(value, value.get("type") or event.name, event)

    def _take_value(self, value: Json, kind: str, event: Event) -> bytes:
        delta = value.get("delta")
        self._prefix = b""
        if kind in ("message_start", "message_delta"):
            self._count(value.get("message") if kind == "message_start" else value)
        if kind == "message_delta" and isinstance(delta, dict):
            self.finish = self.finish or str(delta.get("stop_reason") or "") or None
            self.content = self.content or self.finish in _SILENT_ENDS
        elif kind == "content_block_start":
            block = value.get("content_block")
            self.content = self.content or _shows(block)
            self._open_call = isinstance(block, dict) and block.get("type") == "tool_use"
            self._called = self._called or self._open_call
        elif kind == "content_block_stop":
            self._open_call = False
        elif kind == "content_block_delta" and isinstance(delta, dict):
            delta_type = str(delta.get("type"))
            text = delta.get(_DELTA_FIELDS.get(delta_type, ""))
            self.content = self.content or bool(text) or delta_type not in _DELTA_FIELDS
            if isinstance(text, str) and text and event.name:
                self.n_content_bytes += len(text.encode("utf-8", "replace"))
                self._learn(event.raw)
        return self._named(value, kind, event)

    def _count(self, told: Any) -> None:
        if isinstance(told, dict) and isinstance(told.get("usage"), dict):
            self._raw_usage = merge_usage(self._raw_usage, told["usage"])
            self.usage = messages_usage({"usage": self._raw_usage})

    def _learn(self, raw: bytes) -> None:
        """Keep what stands before the text of a delta whose text comes last, so that the next like it need no look."""
        start = _PLAIN_DELTA.search(raw)
        if start and raw.count(b"\n") == 3 and b"\r" not in raw and _DELTA_REST.match(raw, start.end()):
            self._prefix = raw[:start.end()]

    def _named(self, value: Json, kind: str, event: Event) -> bytes:
        """The frame: under the client's own model name when that is to be echoed, and with the event line without which the SDKs see nothing."""
        if self._echo and kind == "message_start" and isinstance(value.get("message"), dict):
            return write_event({**value, "message": {**value["message"], "model": self._echo}}, kind)
        return event.raw if event.name or not kind else b"event: " + str(kind).encode() + b"\n" + event.raw

    def _end(self, mark: bytes) -> bytes:
        """The end mark; before it the stop reason that a provider left out."""
        if self.finish is not None:
            return mark
        self.finish = "tool_use" if self._called else "end_turn"
        usage = {"output_tokens": self.usage.output if self.usage else 0}
        return write_event({"type": "message_delta", "delta": {"stop_reason": self.finish, "stop_sequence": None}, "usage": usage}, "message_delta") + mark


##############################################################################
# 13. Plain endpoints                                       pure | uses 1-2, 8-10
##############################################################################
# /v1/completions and /v1/embeddings, older than Chat.  Both pass through to providers that have them; a completion is asked of
# others too, as one user message.  A vector is asked of the model that was named and of no other: vectors of two models do not compare.
# Guarded by tests/test_plain.py.

_PROMPT_FIELDS = frozenset({"prompt", "suffix", "echo", "best_of", "logprobs"})       # what a Chat request has no place for
_COMPLETION_FIELDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    **{name: rule for name, rule in CHAT_FIELDS.items() if name not in _PROMPT_FIELDS},
    "suffix": ((str,), "a string"), "echo": ((bool,), "a boolean"), "best_of": ((int,), "an integer"), "logprobs": ((int,), "an integer"),
}
_EMBEDDING_FIELDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "dimensions": ((int,), "an integer"), "encoding_format": ((str,), "a string"), "user": ((str,), "a string"),
}


def _is_text_or_tokens(value: Any) -> bool:
    """A string, tokens, or a list that is not empty of either."""
    if isinstance(value, list) and value:
        return all(type(item) is int for item in value) or all(isinstance(item, str) or (isinstance(item, list) and item and all(type(one) is int for one in item)) for item in value)
    return isinstance(value, str)


def check_completions_request(body: Any) -> Json:
    """The body when it is a Completions request by its structure. Raises GatewayError 400."""
    check_fields(body, _COMPLETION_FIELDS)
    if not _is_text_or_tokens(body.get("prompt")):
        raise bad_request("prompt must be a string, a list of strings, or tokens.", param="prompt", code="invalid_type")
    return body


def check_embeddings_request(body: Any) -> Json:
    """The body when it is an Embeddings request by its structure. Raises GatewayError 400."""
    check_fields(body, _EMBEDDING_FIELDS)
    if not isinstance(body.get("model"), str) or not body["model"]:
        raise bad_request("model must name the embedding model: vectors of two models do not compare.", param="model", code="invalid_type")
    if not _is_text_or_tokens(body.get("input")) or not body["input"]:
        raise bad_request("input must be a string, a list of strings, or tokens, and not empty.", param="input", code="invalid_type")
    return body


def completions_read_request(body: Json) -> Json:
    """The hub request for a Completions body: its prompt as one user message. Raises UpstreamFailure("fit") where no message says the same."""
    prompt = body["prompt"][0] if isinstance(body["prompt"], list) and len(body["prompt"]) == 1 else body["prompt"]
    if not isinstance(prompt, str):
        raise unsupported("prompt: tokens and several prompts need a provider that has /completions itself")
    if body.get("suffix"):
        raise unsupported("suffix: filling in needs a provider that has /completions itself")
    hub = chat_read_request({**{name: value for name, value in body.items() if name not in _PROMPT_FIELDS}, "messages": [{"role": "user", "content": prompt}]})
    drop(hub, *(name for name in ("echo", "best_of", "logprobs") if body.get(name)))
    return hub


def embeddings_read_request(body: Json) -> Json:
    """Embeddings have no other form. Raises UpstreamFailure("fit")."""
    raise unsupported("embeddings: this provider is not spoken to in a format that has them")


def judge_completions_answer(body: Any) -> tuple[str, Usage | None]:
    """Whether a whole body is a Completions answer: ("", usage) when it is, else why not."""
    return judge_chat_answer(_as_chat(body))


def judge_embeddings_answer(body: Any) -> tuple[str, Usage | None]:
    """Whether a whole body holds vectors: ("", usage) when it does, else why not."""
    if not isinstance(body, dict) or not isinstance(body.get("data"), list) or not all(isinstance(row, dict) and row.get("embedding") for row in body["data"]):
        return "not_json", None
    return ("", chat_usage(body)) if body["data"] else ("empty_answer", None)


def _as_message(choice: Json) -> Json:
    return {"content": choice.get("text")}


class CompletionsPassage(ChatPassage):
    """A provider's stream of text completions on its way through."""

    __slots__ = ()

    @staticmethod
    def part_of(choice: Json) -> Any:
        """The text of a choice, as a Chat delta would hold it."""
        return _as_message(choice)

    @staticmethod
    def bare_choice(index: int, reason: str) -> Json:
        """A choice that says nothing but its end."""
        return {"index": index, "text": "", "logprobs": None, "finish_reason": reason}


def _as_chat(body: Any) -> Any:
    """A chunk or body of text completions as Chat has it."""
    if not isinstance(body, dict) or not isinstance(body.get("choices"), list):
        return body
    choices = [{**choice, "message": _as_message(choice), "delta": _as_message(choice), "logprobs": None} for choice in body["choices"] if isinstance(choice, dict)]
    return {**body, "choices": choices}


class CompletionsStreamReader(ChatStreamReader):
    """A provider's stream of text completions, read as Chat."""

    __slots__ = ()

    def feed(self, event: Event) -> list[Json]:
        """The deltas of one event."""
        if not whole_json(event.data):
            return super().feed(event)
        return super().feed(Event(event.name, dump_json(_as_chat(json.loads(event.data))).decode(), event.raw))


def completions_read_answer(body: Any, source: Source) -> list[Json]:
    """The deltas of a whole answer."""
    return chat_read_answer(_as_chat(body), source)


class CompletionsStreamWriter:
    """Hub deltas as a stream of text completions: text alone; thinking and calls have no place in it."""

    __slots__ = ("_stamp", "_wants_usage", "_usage", "_ended")

    def __init__(self, asked: Asked) -> None:
        self._stamp = {"id": mint("cmpl-", asked.seed), "object": "text_completion", "created": asked.created_s, "model": asked.hub["model"]}
        self._wants_usage = bool((asked.hub.get("meta") or {}).get("include_usage"))
        self._usage: Json = {}
        self._ended = False

    def feed(self, delta: Json) -> list[bytes]:
        """The frames of one delta."""
        kind = delta["delta"]
        if self._ended:
            return []
        if kind in ("text", "refuse"):
            return [self._chunk(text, None) for text in delta.get("pieces") or (delta["text"],)]
        if kind in ("start", "usage"):
            self._usage = merge_usage(self._usage, delta if kind == "usage" else delta.get("usage") or {})
        if kind == "error":
            return [self.error(GatewayError(delta["message"], delta["status"], delta["code"], delta["type"]))]
        if kind != "stop":
            return []
        self._ended = True
        usage = [write_event({**self._stamp, "choices": [], "usage": write_usage("chat", self._usage)})] if self._wants_usage else []
        return [self._chunk("", _completion_stop(delta)), *usage, b"data: [DONE]\n\n"]

    def close(self) -> list[bytes]:
        """What is owed when no more deltas come: nothing, unless they ended without a stop."""
        return [] if self._ended else self.feed(error_delta(502, "upstream closed the stream before finishing"))

    def keep_alive(self) -> bytes:
        """A comment, for silences."""
        return b": keep-alive\n\n"

    def error(self, error: GatewayError) -> bytes:
        """The event that ends a broken stream; no end mark follows it."""
        self._ended = True
        return write_event(chat_error(error))

    def _chunk(self, text: str, reason: str | None) -> bytes:
        return write_event({**self._stamp, "choices": [{"text": text, "index": 0, "logprobs": None, "finish_reason": reason}]})


def _completion_stop(stop: Json) -> str:
    return stop["reason"] if stop["reason"] == "length" else "content_filter" if stop["reason"] in ("filter", "refusal") else "stop"


def completions_write_answer(deltas: Iterable[Json], asked: Asked) -> Json:
    """The body of a completion that is not streamed: the fold of its stream."""
    told = list(deltas)
    text = "".join(delta["text"] for delta in told if delta["delta"] in ("text", "refuse"))
    usage: Json = {}
    for delta in told:
        usage = merge_usage(usage, delta if delta["delta"] == "usage" else delta.get("usage") or {}) if delta["delta"] in ("start", "usage") else usage
    reason = _completion_stop(told[-1])
    return {"id": mint("cmpl-", asked.seed), "object": "text_completion", "created": asked.created_s, "model": asked.hub["model"],
            "choices": [{"text": text, "index": 0, "logprobs": None, "finish_reason": reason}], "usage": write_usage("chat", usage)}


##############################################################################
# 14. Translation                                           pure | uses 1-3, 8-13
##############################################################################
# FORMATS is the one place where the three formats stand side by side: what the relay and the endpoints ask of a format is
# a field of its row.  A request passes through when client and provider speak the same format and nothing has to change
# but the model; else it goes read -> hub -> prepare -> write, and its answer reader -> holder -> filler -> writer.
# One more format: its section, and a row in FORMATS.  Guarded by tests/test_translation.py.

class WireFormat(NamedTuple):
    """What one format does for the others.  Passages and readers are made per attempt, writers per request."""
    path: str                                                   #: behind a provider's base URL
    check: Callable[[Any], Json]
    read_request: Callable[[Json], Json]
    write_request: Callable[[Json, Profile], Json] | None       #: None where no provider is asked in it but in a client's own bytes
    reader: Callable[[Source], Any] | None                      #: None where an answer has no other form than its own
    writer: Callable[[Asked], Any] | None
    read_answer: Callable[[Any, Source], list[Json]] | None
    write_answer: Callable[[Iterable[Json], Asked], Json] | None
    passage: Callable[..., Any] | None
    judge_answer: Callable[[Any], tuple[str, Usage | None]]
    find_error: Callable[[Any], Any]
    envelope: Callable[[GatewayError], Json]
    status: Callable[[GatewayError], int]
    call_prefix: str
    wants_usage: Callable[[Json], bool]
    take_up: Callable[[bytes, Asked], tuple[Any, str] | None] | None = None     #: None where a stream that broke off is not gone on with


def _own_status(error: GatewayError) -> int:
    return error.status


def _asks_usage(body: Json) -> bool:
    return bool((body.get("stream_options") or {}).get("include_usage"))


FORMATS: Mapping[ClientFormat, WireFormat] = {
    "chat": WireFormat("/chat/completions", check_chat_request, chat_read_request, chat_write_request, ChatStreamReader, ChatStreamWriter, chat_read_answer,
                       chat_write_answer, ChatPassage, judge_chat_answer, find_chat_error, chat_error, _own_status, "call_", _asks_usage, chat_take_up),
    "responses": WireFormat("/responses", check_responses_request, responses_read_request, responses_write_request, ResponsesStreamReader, ResponsesStreamWriter,
                            responses_read_answer, responses_write_answer, ResponsesPassage, judge_responses_answer, find_responses_error, chat_error, _own_status,
                            "call_", lambda body: True, responses_take_up),
    "messages": WireFormat("/messages", check_messages_request, messages_read_request, messages_write_request, MessagesStreamReader, MessagesStreamWriter,
                           messages_read_answer, messages_write_answer, MessagesPassage, judge_messages_answer, find_messages_error, messages_error, messages_status,
                           "toolu_", lambda body: True, messages_take_up),
    "completions": WireFormat("/completions", check_completions_request, completions_read_request, None, CompletionsStreamReader, CompletionsStreamWriter,
                              completions_read_answer, completions_write_answer, CompletionsPassage, judge_completions_answer, find_chat_error, chat_error,
                              _own_status, "call_", _asks_usage),
    "embeddings": WireFormat("/embeddings", check_embeddings_request, embeddings_read_request, None, None, None, None, None, None, judge_embeddings_answer,
                             find_chat_error, chat_error, _own_status, "", lambda body: True),
}


@functools.lru_cache(maxsize=4096)
def target_profile(preset_name: str, model: Model, wire_format: Format) -> Profile:
    """What one model of a provider takes, spoken to in `wire_format`."""
    profile = profile_for(preset_name, model.id, wire_format)
    return replace(profile, max_out_limit=model.max_output, images=profile.images and model.vision is not False)


class Needs:
    """What one request needs of a route that serves it; the costly parts are worked out when a route first makes them matter.

    windows: RoutingState's.  utc: now.  read_hub: from `body` to the hub's form.  ratio: what Calibration learned of a model.
    required: fields that must be taken as they are, for a client that asked so.
    """

    __slots__ = ("tools", "required", "n_overflows", "overflowed", "_raw", "_windows", "_utc", "_read_hub", "_ratio", "_body", "_hub", "_shows", "_counts")

    def __init__(self, raw: bytes, body: Json, windows: Mapping[str, ContextWindow], utc: float, read_hub: Callable[[Json], Json], ratio: Callable[[str], float],
                 required: frozenset[str] = frozenset()) -> None:
        self.tools = bool(body.get("tools")) and body.get("tool_choice") not in ("none", {"type": "none"})
        self.required = required
        self.n_overflows = 0            #: models that have refused it as too long
        self.overflowed = 0             #: tokens that the largest of them holds
        self._raw, self._windows, self._utc, self._read_hub, self._ratio = raw, windows, utc, read_hub, ratio
        self._body = body
        self._hub: Json | None = None           # read when first needed
        self._shows: bool | None = None
        self._counts: dict[Any, int] = {}       # by family: models of one are counted alike

    @property
    def images(self) -> bool:
        """Whether its last turn shows an image."""
        if self._shows is None:
            hub = self._readable_hub() if b"image" in self._raw else None
            self._shows = hub is not None and shows_image(hub)
        return self._shows

    def window(self, route: Route) -> int | None:
        """Tokens that the route's model holds, None where nobody knows."""
        learned = self._windows.get(route.keys[2])
        return learned.n_tokens if learned is not None and learned.until_utc > self._utc else route.model.context

    def room(self, route: Route) -> int | None:
        """Tokens that are left for the answer, where the prompt is known to take them away and may leave too few."""
        learned = self._windows.get(route.keys[2])
        if learned is None or not learned.shared or learned.until_utc <= self._utc:
            return None
        n_wanted = next((value for name in _MAX_FIELDS if type(value := self._body.get(name)) is int), 0)
        if len(self._raw) // _SAFE_BYTES_PER_TOKEN + n_wanted <= learned.n_tokens:
            return None
        return learned.n_tokens - self.n_tokens(route.model.id)

    def exceeds(self, window: int, model: str) -> bool:
        """Whether the prompt is too long for a window, by its estimate; most are so short that nothing has to be counted."""
        return len(self._raw) > _SAFE_BYTES_PER_TOKEN * window and self.n_tokens(model) > _DOUBT * window

    def n_tokens(self, model: str) -> int:
        """The prompt's tokens for a wire model, estimated; 0 where it is none that can be read."""
        family = count_family(model.lower())
        if family not in self._counts:
            hub = self._readable_hub()
            self._counts[family] = estimate_tokens(hub, model) if hub is not None else 0
        return round(self._counts[family] * self._ratio(model))

    def hub(self) -> Json:
        """The request in the hub's form. Raises GatewayError 400, and UpstreamFailure where only a provider of its own format understands it."""
        if self._hub is None:
            self._hub = self._read_hub(self._body)
        return self._hub

    def _readable_hub(self) -> Json | None:
        with contextlib.suppress(UpstreamFailure, GatewayError):
            return self.hub()
        return None

    def note_overflow(self, window: int | None) -> None:
        """A model that holds so much has refused the request as too long."""
        self.n_overflows += 1
        self.overflowed = max(self.overflowed, window or 0)


#: What clients call the longest answer they want.
_MAX_FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
#: Fewer bytes per token than this no prompt has.
_SAFE_BYTES_PER_TOKEN = 2
#: How far an estimate may be over before it is believed: to be refused by a provider costs less than to refuse what would have fitted.
_DOUBT = 1.1


def misfit(route: Route, needs: Needs) -> str:
    """Why `route` cannot serve a request, "" when it may: no_tools, no_vision, no_parameter, too_small."""
    model, preset = route.model, route.provider.preset
    if needs.tools and model.tools is False:
        return "no_tools"
    profile = target_profile(preset.name, model, route.provider.format)
    if not profile.images and needs.images:
        return "no_vision"
    if needs.required and not needs.required.isdisjoint((*preset.rejects, *profile.reject)):
        return "no_parameter"
    window = needs.window(route)
    if needs.n_overflows and (needs.n_overflows > 1 if window is None else window <= needs.overflowed):
        return "too_small"
    return "too_small" if window is not None and needs.exceeds(window, model.id) else ""


def may_pass(client: ClientFormat, raw: bytes, body: Json, profile: Profile, preset: Preset) -> bool:
    """Whether a request may go to this target in the client's own bytes: nothing in it has to change but the model and rejected fields."""
    if client == "completions":
        return preset.completions and profile.format == "chat"
    if client == "embeddings":
        return profile.format != "messages"
    if client != profile.format or profile.via_hub or b"aic1." in raw or (not profile.images and b"image" in raw):
        return False
    if profile.tool_schema and body.get("tools"):       # its subset of JSON Schema, and signatures on calls that the memo keeps
        return False
    if body.get("tool_choice") == "required" != profile.required_word:
        return False
    return not profile.call_id or all(fit_id(call_id, profile.call_id) == call_id for call_id in _call_ids(body) if isinstance(call_id, str))


def _call_ids(body: Json) -> Iterator[Any]:
    """Ids of the calls in a request's history, in whichever format it is; another provider may have made them."""
    items = body.get("messages") or body.get("input")
    for item in items if isinstance(items, list) else ():
        yield item.get("call_id")
        for name in ("tool_calls", "content"):
            blocks = item.get(name)
            for block in blocks if isinstance(blocks, list) else ():
                if isinstance(block, dict) and (name == "tool_calls" or block.get("type") == "tool_use"):
                    yield block.get("id")


def pass_request(raw: bytes, body: Json, wire_model: str, rejects: Collection[str], edits: Edits = NO_EDITS) -> tuple[bytes, tuple[str, ...]]:
    """The provider's body for a request that passes through with little more than its model changed, and what was left out or changed."""
    changes: Json = {} if body.get("model") == wire_model else {"model": wire_model}
    if body.get("stream") and "prompt" in body and not _asks_usage(body):
        changes["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
    dropped = tuple(name for name in rejects if name in body)
    return write_passing(raw, body, changes, {*dropped, *ROUTING_FIELDS.intersection(body)}, dropped, edits)


def translate_request(hub: Json, profile: Profile, edits: Edits = NO_EDITS) -> tuple[Json, tuple[str, ...]]:
    """A provider's body for a hub request, and what was lost or changed. Raises UpstreamFailure("fit") when the target cannot serve it."""
    ready = prepare(hub, profile)
    body, rejected = without_rejected(FORMATS[profile.format].write_request({**ready, "model": profile.model}, profile), profile)
    body, told = edit_body(body, edits) if edits else (body, ())
    return body, tuple(dict.fromkeys((*ready.get("dropped", ()), *rejected, *told)))


def count_request(raw: bytes, body: Json, hub: Json, profile: Profile) -> bytes:
    """The body that asks a provider that speaks Messages for the tokens of a Messages request. Raises UpstreamFailure("fit")."""
    if b"aic1." not in raw and not profile.via_hub:
        return pass_request(raw, body, profile.model, ())[0]
    made, _ = translate_request(hub, profile)
    return dump_json({name: value for name, value in made.items() if name in _COUNTED_FIELDS})


#: What /messages/count_tokens takes.
_COUNTED_FIELDS = frozenset({"model", "messages", "system", "tools", "tool_choice", "thinking", "output_config", "mcp_servers"})


class HeldPassage:
    """A passage whose tool calls wait until they are whole: while one is half-made nothing leaves, and if it dies none of it was seen.

    What came before a call does not wait with it, however the provider's bytes were cut: a chunk that may hold one is looked at frame by frame.
    """

    __slots__ = ("content", "_passage", "_held", "_shown")
    MAX_BYTES = 1 << 20
    _FRAME = re.compile(rb"(?<=\n\n)|(?<=\r\n\r\n)|(?<=\r\r)")

    def __init__(self, passage: Any) -> None:
        self.content = False
        self._passage = passage
        self._held = b""
        self._shown = 0         # number of the last event that left, where events have one

    def __getattr__(self, name: str) -> Any:
        return getattr(self._passage, name)

    def feed(self, chunk: bytes) -> bytes:
        """What may go to the client now."""
        if self._passage.calling or not (b"_call" in chunk or b"tool_use" in chunk):
            return self._release(self._passage.feed(chunk))
        return b"".join(self._release(self._passage.feed(part)) for part in self._FRAME.split(chunk) if part)

    def close(self) -> bytes:
        """What is still owed when the provider's connection has ended."""
        return self._release(self._passage.close())

    def _release(self, out: bytes) -> bytes:
        passage = self._passage
        if passage.error is not None or passage.broken:
            out, self._held = self._held + out if not passage.calling else b"", b""
            return out
        if passage.calling and not passage.done and len(self._held) + len(out) <= self.MAX_BYTES:
            self._held += out
            return b""
        out, self._held = self._held + out, b""
        self.content, self._shown = passage.content, getattr(passage, "sequence", 0)
        return out

    def failed(self, error: GatewayError) -> bytes:
        """The event that ends a broken stream of responses."""
        return self._passage.failed(error, self._shown)


class Translation:
    """A provider's stream on its way to a client of another format: a passage's interface around reader, holder, filler and writer.

    The writer is the request's own, since keep-alives may have gone through it; it is touched only once there is content, and then for good.
    """

    __slots__ = ("content", "done", "finish", "error", "broken", "n_content_bytes", "n_signs", "kept", "_usage", "_counted",
                 "frames", "_reader", "_holder", "_filler", "_writer", "_pending", "_writing", "_reads_runs")

    def __init__(self, reader: Any, writer: Any, *, n_prompt_tokens: int, live: bool = False) -> None:
        self.content = False
        self.done = False
        self.finish: str | None = None
        self._usage: Usage | None = None
        self._counted: Json = reader.counted
        self.error: Any = None
        self.broken = ""
        self.n_content_bytes = 0
        self.n_signs = 0
        self.kept: list[Json] = []              #: thinking and calls of the answer, for the memo
        self.frames = FrameSplitter()
        self._reader = reader
        self._holder = CallHolder(live)
        self._filler = UsageFiller(n_prompt_tokens)
        self._writer = writer
        self._pending: list[Json] = []
        self._writing = False
        self._reads_runs = hasattr(reader, "feed_run")

    @property
    def calling(self) -> bool:
        """Whether a tool call is kept back."""
        return self._holder.holding

    @property
    def usage(self) -> Usage | None:
        """What the provider has counted so far, with estimates for what it lacks at the end; None while there is nothing."""
        if self.finish is None and self._reader.counted is not self._counted:
            self._counted = self._reader.counted
            self._usage = _usage_of(self._counted) if any(self._counted.values()) else None
        return self._usage

    def feed(self, chunk: bytes) -> bytes:
        """What of `chunk`, and of what was kept before it, may go to the client now."""
        if self.done or self.error or self.broken:
            return b""
        try:
            block = self.frames.feed(chunk)
        except UpstreamFailure as failure:
            self.broken = failure.reason
            return b""
        frames = iter(split_frames(block)) if b"\r" in block else None
        position, n_tries = 0, _RUN_TRIES if self._reads_runs and frames is None else 0
        while position < len(block):
            deltas, end = self._reader.feed_run(block, position) if n_tries else ([], position)
            if end > position:
                self.n_signs += 1
                self._take(deltas)
            else:
                n_tries -= n_tries > 0
                end = position + len(next(frames)) if frames else block.find(b"\n\n", position) + 2
                self._take_frame(block[position:end])
            position = end
            if self._reader.done:
                self._take(self._reader.close())
                break
        return self._release()

    def close(self) -> bytes:
        """The provider's connection has ended: what is still owed to the client. Sets `broken` when it ended wrongly."""
        if self.done or self.error or self.broken:
            return b""
        rest = read_frame(self.frames.rest)
        if rest.data.strip() == "[DONE]" or whole_json(rest.data):
            self._take(self._reader.feed(rest))
        self._take(self._reader.close())
        if self.error is not None:
            self.error, self.broken = None, "cut" if self._writing or self.n_signs else "empty_answer"
        return self._release()

    def take_answer(self, deltas: Iterable[Json]) -> bytes:
        """A whole answer as a stream of one, for a provider that did not stream."""
        self._take(deltas)
        return self._release()

    def keep_alive(self) -> bytes:
        """A sign of life in the client's format."""
        return self._writer.keep_alive()

    def _take_frame(self, frame: bytes) -> None:
        event = read_frame(frame)
        if event.data:
            self.n_signs += 1
            self._take(self._reader.feed(event))
        else:
            self.n_signs += bool(self.n_signs)

    def _take(self, deltas: Iterable[Json]) -> None:
        for delta in deltas:
            for held in self._holder.feed(delta):
                for filled in self._filler.feed(held):
                    self._note(filled)

    def _note(self, delta: Json) -> None:
        """What one delta tells of the answer."""
        kind = delta["delta"]
        if kind == "error":
            self.error = {"error": {"message": delta["message"], "type": delta["type"], "code": delta["code"]}, "status_code": delta["status"]}
            return
        if kind in ("text", "think", "args", "refuse"):
            self.n_content_bytes += len(delta["text"])
        if kind in _SHOWN_DELTAS:
            self.content = True
        elif kind == "usage":
            self._usage = _usage_of(delta)
        elif kind == "stop":
            self.finish = delta["reason"]
            self.content = self.content or self.finish in _SILENT_REASONS
        if kind in ("think", "seal", "call", "args", "note"):
            self.kept.append(delta)
        self._pending.append(delta)

    def _release(self) -> bytes:
        """The client's bytes for what was noted; nothing before there is content, so that another route may still serve."""
        if (self.error is not None or self.broken) and not self._writing:
            return b""
        if not self.content:
            if self.finish is not None:
                self.broken = "empty_answer"
            return b""
        self._writing = True
        out = [piece for delta in self._pending for piece in self._writer.feed(delta)]
        self._pending = []
        if self.finish is not None:
            out += self._writer.close()
            self.done = True
        return b"".join(out)


#: How often a block is searched for a run of alike events in vain: each search reads all of the block.
_RUN_TRIES = 8
_SHOWN_DELTAS = frozenset({"text", "think", "call", "refuse", "opaque", "seal"})
#: Stops that may rightly come with nothing to show.
_SILENT_REASONS = frozenset({"length", "filter", "refusal", "pause", "context"})


def _usage_of(delta: Json) -> Usage:
    counts = {name: int(delta.get(name) or 0) for name in ("input", "output", "cached", "cache_write", "reasoning")}
    return Usage(**counts, estimated=bool(delta.get("estimated")))


def translate_answer(deltas: Sequence[Json], asked: Asked, client: ClientFormat, n_prompt_tokens: Callable[[], int]) -> tuple[Json, Usage | None, list[Json]]:
    """A whole answer in the client's format, its usage, and its deltas; the deltas hold no error. n_prompt_tokens estimates, where the provider told none."""
    told = [delta for delta in deltas if delta["delta"] == "usage"]
    whole = deltas
    if not (told and told[-1].get("input") and told[-1].get("output")):
        counted = any(delta.get("input") or (delta.get("usage") or {}).get("input") for delta in deltas if delta["delta"] in ("usage", "start"))
        filler = UsageFiller(0 if counted else n_prompt_tokens())
        whole = [filled for delta in deltas for filled in filler.feed(delta)]
        told = [delta for delta in whole if delta["delta"] == "usage"]
    return FORMATS[client].write_answer(whole, asked), _usage_of(told[-1]) if told else None, whole


def read_events(raw: bytes, reader: Any) -> list[Json]:
    """The deltas of a stream that came as one piece, for a provider that streamed unasked."""
    deltas: list[Json] = []
    for frame in split_frames(raw if raw.endswith(b"\n\n") else raw + b"\n\n"):
        event = read_frame(frame)
        if event.data and not reader.done:
            deltas += reader.feed(event)
    return deltas + reader.close()


# ---- Going on where a stream broke off

class Seam(NamedTuple):
    """A client's stream that broke off inside its text, and how it is gone on with."""
    writer: Any                     #: of the client's format, in the middle of that stream
    text: str                       #: what the client has
    how: str                        #: Profile.continues, or told: the model is asked to in words


#: Characters of a continuation that are judged before any of it is passed on.
_JUDGED_CHARS = 200
#: Letters by which a restart is known, and how many of the last characters a model is told to begin with.
_RESTART_CHARS = 16
_ANCHOR_CHARS = 60
#: How models begin when they answer a request instead of going on with a text.
_PREAMBLE = re.compile(r"[\s\"'*>#(\[]*(?:sure|certainly|of course|absolutely|okay|ok|alright|understood|got it|no problem|apolog\w*|(?:i'?m |i am )?(?:so |very )?sorry|as an ai|unfortunately|"
                       r"i (?:can(?:'?t|not)|won'?t|will not|don'?t|am unable|apologi[sz]e|see|will continue|understand)|i'(?:m|ll) (?:unable|not able|continue)|"
                       r"continu(?:ing|ation|ed)|let me (?:continue|go on|finish|pick)|to continue|here(?:'s| is| are)|picking up|resuming)\b", re.IGNORECASE)


def way_on(provider: Provider, model: Model, policy: str) -> str:
    """How a model goes on with an answer that broke off: Seam.how, "" where it may not be asked to. policy: off, safe or force."""
    profile = target_profile(provider.preset.name, model, provider.format)
    elsewhere = provider.preset.continue_url
    how = profile.continues if profile.prefill != "no" and (not elsewhere or provider.base_url in (elsewhere, provider.preset.base_url)) else ""
    return (how or "told") if policy == "force" else how if policy == "safe" else ""


def can_go_on(hub: Json, text: str) -> bool:
    """Whether the answer to a request, so far `text`, has an exact continuation at all."""
    if not text.strip() or re.search("[\ud800-\udfff]", text) or (hub.get("format") or {}).get("kind") in ("schema", "json"):
        return False                # a grammar begins anew with each request
    if hub["turns"] and hub["turns"][-1]["role"] == "assistant" or (hub.get("meta") or {}).get("logprobs"):
        return False
    return not any(text.endswith(stop[:n_chars]) for stop in hub.get("stop") or () for n_chars in range(1, len(stop)))


def _anchor(text: str) -> str:
    """The last words of a text; "" where they stand in it twice or repeat themselves, so that they might come once more."""
    start = text.rfind(" ", 0, max(0, len(text) - _ANCHOR_CHARS)) + 1
    anchor = text[start:]
    repeats = text.find(anchor) != start or any(anchor.startswith(anchor[n_chars:]) for n_chars in range(1, len(anchor) // 2 + 1))
    return "" if repeats or len(anchor) > 4 * _ANCHOR_CHARS else anchor


def continuation_request(hub: Json, seam: Seam, profile: Profile, edits: Edits = NO_EDITS) -> tuple[Json, tuple[str, ...]]:
    """A provider's body that asks for the rest of an answer, and what was lost or changed. Raises UpstreamFailure where it cannot be asked for."""
    text = seam.text.rstrip()       # Anthropic refuses a last turn that ends in white space, and tokens begin with it
    turns = [*hub["turns"], {"role": "assistant", "parts": [text_part(text)]}]
    if seam.how == "told":
        anchor = _anchor(text)
        if not anchor:
            raise UpstreamFailure("server", "no_seam", "the end of the text stands in it twice")
        turns.append({"role": "user", "parts": [text_part(
            "The connection broke off in the middle of your last answer. Write the rest of it, as if it had never been interrupted: no greeting, no comment, nothing that was said before. "
            f"Begin with exactly these last words of it, and go on directly behind them:\n{anchor}")]})
    spent = {"max_out": max(16, hub["max_out"] - len(text) // 4)} if hub.get("max_out") else {}
    body, dropped = translate_request({**hub, **spent, **({"think": {"mode": "off"}} if hub.get("think") else {}), "turns": turns}, profile, edits)
    if seam.how in ("prefix", "partial"):
        body["messages"][-1][seam.how] = True
    elif seam.how == "final":
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    return body, dropped


def _bare(text: str) -> str:
    """The letters and digits of a text, by which a restart is known however it is set."""
    return re.sub(r"\W+", "", text).casefold() or text


def judge_continuation(seam: Seam, begun: str) -> tuple[str, str]:
    """(what of a continuation that begins so follows the text, why it cannot be used): one of the two is "".

    That a model goes on where the text ends is believed only while nothing speaks against it: a beginning that repeats the last characters may be said
    twice or meant twice, nobody can tell, and so it is refused.  A model that was told where to begin must have begun there.
    """
    text = seam.text.rstrip()
    space = seam.text[len(text):]
    if seam.how == "told":
        anchor = _anchor(text)
        begun = begun.lstrip()
        if not begun.startswith(anchor):
            return "", "it does not begin with the words it was told"
        begun = begun[len(anchor):]
    else:
        why = _doubt(text, begun)
        if why:
            return "", why
    if not begun.startswith(space):
        return "", "it leaves out white space that was sent"
    rest = begun[len(space):]
    return (rest, "") if rest else ("", "it is empty")


def _doubt(text: str, begun: str) -> str:
    """Why a beginning may be no continuation of `text`, "" where nothing says so."""
    letters, known = _bare(begun), _bare(text)
    if _PREAMBLE.match(begun) or text[-1].islower() and begun[:1].isupper():
        return "it reads like an answer, not like the rest of one"
    n_alike = next((n for n, (one, other) in enumerate(zip(letters, known)) if one != other), min(len(letters), len(known)))
    if n_alike and n_alike >= min(_RESTART_CHARS, len(letters), len(known)) or len(known) >= _RESTART_CHARS and known[:_RESTART_CHARS] in letters:
        return "it begins the answer anew"
    plain = begun.lstrip()
    repeats = any(text.endswith(begun[:n_chars]) for n_chars in range(1, len(begun) + 1))
    repeats = repeats or any(text.endswith(plain[:n_chars]) and not text[-n_chars - 1:-n_chars].isalnum() for n_chars in range(1, len(plain) + 1))
    if repeats or len(begun) >= _JUDGED_CHARS and begun[:_JUDGED_CHARS] in text:
        return "it may repeat the end of the text"
    return ""


class SeamWriter:
    """The writer of a Translation whose answer goes on with a stream that broke off: what comes first is kept back until it was judged."""

    __slots__ = ("joined", "_seam", "_mark", "_begun")

    def __init__(self, seam: Seam, mark: str) -> None:
        """mark: what the comment at the seam says."""
        self.joined = False         #: it was found good, and goes out
        self._seam = seam
        self._mark = b": %b\n\n" % printable(mark).encode("ascii", "replace")
        self._begun = ""

    def feed(self, delta: Json) -> list[bytes]:
        """The frames of one delta. Raises UpstreamFailure where the answer does not go on with the text; none of it has left by then."""
        kind = delta["delta"]
        if kind in ("start", "think", "seal"):
            return []               # the client has seen the beginning, and its thinking is over
        if self.joined or kind == "usage":
            return self._seam.writer.feed(delta)
        if kind == "text":
            self._begun += delta["text"]
            return self._join() if len(self._begun) >= _JUDGED_CHARS else []
        if kind == "stop" and delta["reason"] in ("refusal", "filter") or kind not in ("stop", "call"):
            raise UpstreamFailure("server", "no_seam", f"instead of text came {delta.get('reason') or kind}")
        return [*self._join(), *self._seam.writer.feed(delta)]

    def close(self) -> list[bytes]:
        """What is owed when no more deltas come."""
        return self._seam.writer.close()

    def keep_alive(self) -> bytes:
        """A sign of life in the client's format."""
        return self._seam.writer.keep_alive()

    def error(self, error: GatewayError) -> bytes:
        """The event that ends a broken stream."""
        return self._seam.writer.error(error)

    def _join(self) -> list[bytes]:
        rest, why = judge_continuation(self._seam, self._begun)
        if why:
            raise UpstreamFailure("server", "no_seam", why)
        self.joined = True
        return [self._mark, *self._seam.writer.feed(text_delta(rest))]


# ---- Counting tokens without a tokenizer
# Words, digits, signs and lines are counted the way byte-pair tokenizers cut them; what a provider's prompt template adds to messages, calls,
# tools and schemas is a row per family.  Measured against recorded requests that carry real usage; tests/test_estimate.py holds the figure.

class _Count(NamedTuple):
    """What one family's prompt costs: factors on text and on tool schemas, and tokens for each thing that its template writes around them."""
    text: float = 1.0
    digits: int = 3                   #: of a number that make one token
    tools: float = 1.35               #: on the JSON of tools; on their rendering as TypeScript where `typescript`
    typescript: bool = False
    with_tools: int = 100             #: once, if there are tools
    always: int = 3
    turn: int = 4
    system: int = 4
    call: int = 20                    #: a call and its result
    thinking: int = 0                 #: thinking was asked for
    forced: int = 0                   #: a tool was forced
    schema: float = 1.0               #: on the output schema
    with_schema: int = 0
    hidden_none: bool = False         #: tools are left out when none may be called
    hosted: int = 1400                #: a tool that the provider runs
    deferred: bool = True             #: tools that wait to be searched for are shown all the same
    sealed: float = 0.0               #: tokens per letter of sealed thinking that goes back, beyond its head
    seal_head: int = 0
    old_thinking: bool = False        #: thinking from before the user's last words is billed too
    cuts_tags: bool = False           #: the template leaves out <think>...</think> that led to a call
    cited: int = 0                    #: once, where documents are to be cited
    image: str = "area"
    page: int = 2000                  #: a page of a PDF: its text and its picture


_OPENAI = _Count(tools=1.0, typescript=True, with_tools=9, call=8, schema=0.9, image="tiles", hosted=330, deferred=False, sealed=0.125, seal_head=690)
_CLAUDE = _Count(tools=1.25, with_tools=500, system=1, call=52, thinking=28, forced=92, schema=1.25, with_schema=125, cited=500)
_COUNTS: tuple[tuple[str, _Count], ...] = (
    ("*gpt-oss*", _Count(0.97, tools=1.0, typescript=True, with_tools=25, always=62, call=15, with_schema=60, cuts_tags=True)),
    ("*gpt-4.1-mini* *gpt-4.1-nano* *o4-mini* *gpt-5-mini* *gpt-5-nano* *gpt-5.?-mini* *gpt-5.?-nano*", _OPENAI._replace(image="patches")),
    ("*gpt-* o1* o3* o4* */o1* */o3* */o4* *chatgpt* computer-use*", _OPENAI),
    ("*claude-3-opus*", _CLAUDE._replace(with_tools=540, forced=0)),
    ("*claude-3* *claude-sonnet-4-2* *claude-opus-4-2* *claude-sonnet-4-0 *claude-opus-4-0 *claude-opus-4-1* *claude-sonnet-4 *claude-opus-4", _CLAUDE._replace(with_tools=350)),
    ("*claude-*-4-[56]* *claude-*-4.[56]*", _CLAUDE),
    ("*claude*", _CLAUDE._replace(text=1.3, tools=1.6, with_tools=370, image="large")),
    ("*deepseek-v4-flash* *deepseek-flash*", _Count(0.97, tools=1.45, with_tools=209, always=76, hidden_none=True, call=24)),
    ("*deepseek*", _Count(0.97, tools=1.43, with_tools=209, always=0, turn=3, system=3, call=22, hidden_none=True)),
    ("*grok*non-reasoning*", _Count(1.0, tools=1.43, with_tools=100, always=0, turn=2, call=25)),
    ("*grok*", _Count(1.0, tools=1.43, with_tools=17, always=187, call=25, sealed=0.131, old_thinking=True)),
    ("*mixtral*", _Count(digits=1, turn=8, system=3, always=1)),          # [INST] and [/INST] are text to it, four tokens each
    ("*mistral* *ministral* *codestral* *magistral* *pixtral* *devstral* *voxtral*",
     _Count(0.95, digits=1, with_tools=24, always=0, turn=3, system=3, call=16, thinking=20, old_thinking=True, page=900,   # pages are read, not shown
            schema=0.0, hidden_none=True, image="patches28")),
    ("*llama-4*", _Count(1.0, tools=1.3, with_tools=640)),
    ("*llama-3.[1-9]* *llama3.[1-9]*", _Count(always=31)),
    ("*gemini* *gemma*", _Count(0.85, tools=1.17, with_tools=0, always=1, turn=0, system=0, image="flat")),
    ("*glm*", _Count(always=5, thinking=2)),
    ("*qwen* *llama*", _Count(always=5)),
    ("*minimax*", _Count(always=34)),
    ("*sonar*", _Count(0.85, always=1, turn=2, system=2)),
    ("*", _Count()),
)
_MARGIN = 1.05
_SEARCH_TOOL = 100
_SAMPLE_CHARS, _SAMPLES = 4096, 32
_WORD = re.compile("[A-Za-z]+")
_NUMERALS = re.compile(" ?[0-9]+")                       # a blank before a number is a token of its own, unlike one before a word
_MARKS = re.compile(r"[!-/:-@\[-`{-~]+")
_LINES = re.compile(r"\n\s*|  +")
_WIDE = re.compile("[\u1100-\u11ff\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]")
_EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u27bf]")
_ASCII = re.compile("[\x00-\x7f]+")


def _up(tokens: float) -> int:
    return -int(-tokens // 1)


def _text_tokens(text: str, family: _Count) -> float:
    return family.text * estimate_text(text, family.digits)


def estimate_text(text: str, digits: int = 3) -> float:
    """Tokens of a text, `digits` of a number being one; one of more than a few hundred kilobytes is measured by samples."""
    if len(text) > 2 * _SAMPLES * _SAMPLE_CHARS:
        step = len(text) // _SAMPLES
        sample = "".join(text[start:start + _SAMPLE_CHARS] for start in range(0, step * _SAMPLES, step))
        return estimate_text(sample, digits) * len(text) / len(sample)
    count = sum(1.0 if len(word) <= 7 else 1 + (len(word) - 7) / 4.5 for word in _WORD.findall(text))
    count += sum(-(-len(number.lstrip()) // digits) + (number[0] == " ") for number in _NUMERALS.findall(text))
    count += sum(max(1.0, len(signs) / 2) for signs in _MARKS.findall(text)) + 0.7 * len(_LINES.findall(text))
    if not text.isascii():
        wide, emoji = len(_WIDE.findall(text)), len(_EMOJI.findall(text))
        count += 1.1 * wide + 2.0 * emoji + 0.6 * (len(_ASCII.sub("", text)) - wide - emoji)
    return count


def _typescript(schema: Any) -> str:
    """A schema as OpenAI's templates show it to the model, near enough to count it."""
    if not isinstance(schema, dict):
        return "any"
    schema = sound_schema(schema)
    if isinstance(schema.get("enum"), list):
        return " | ".join(map(compact, schema["enum"]))
    members = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(members, list):
        return " | ".join(map(_typescript, members))
    kind, required = schema.get("type"), schema.get("required", ())
    if kind == "array":
        return _typescript(schema.get("items")) + "[]"
    if not isinstance(schema.get("properties"), dict):
        return " | ".join(map(str, kind)) if isinstance(kind, list) else str(kind or "any")
    lines = []
    for name, value in schema["properties"].items():
        about = value if isinstance(value, dict) else {}
        lines.append(f"// {about['description']}\n" if about.get("description") else "")
        lines.append(f"{name}{'' if name in required else '?'}: {_typescript(value)},\n")
    return "{\n" + "".join(lines) + "}"


def _tool_tokens(tool: Json, family: _Count) -> float:
    if tool["kind"] == "hosted":
        return _SEARCH_TOOL if "tool_search" in str((tool.get("raw") or {}).get("type")) else family.hosted
    if tool.get("defer") and not family.deferred:
        return 0
    about, schema = tool.get("description") or "", tool.get("schema") or {}
    grammar = compact(tool["grammar"]) if tool.get("grammar") else ""
    if family.typescript:
        form = f"(_: {_typescript(schema)})" if schema.get("properties") else "()"
        return family.tools * estimate_text(f"{'// ' if about else ''}{about}\ntype {tool['name']} = {form} => any;{grammar}")
    return family.tools * estimate_text(" ".join((tool["name"], about, compact(schema), grammar)))


def _size_of_image(data: str) -> tuple[int, int] | None:
    """Width and height from the first bytes of a PNG, JPEG, GIF or WebP in base64."""
    try:
        head = base64.b64decode(data[:65536])
    except ValueError:
        return None
    if head[:4] == b"\x89PNG" and len(head) >= 24:
        return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    if head[:4] == b"GIF8" and len(head) >= 10:
        return int.from_bytes(head[6:8], "little"), int.from_bytes(head[8:10], "little")
    if head[:4] == b"RIFF" and len(head) >= 30:
        return _size_of_webp(head)
    return _size_of_jpeg(head) if head[:2] == b"\xff\xd8" else None


def _size_of_webp(head: bytes) -> tuple[int, int] | None:
    if head[12:16] == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3fff) + 1, (bits >> 14 & 0x3fff) + 1
    return int.from_bytes(head[26:28], "little") & 0x3fff, int.from_bytes(head[28:30], "little") & 0x3fff


def _size_of_jpeg(head: bytes) -> tuple[int, int] | None:
    position = 2
    while position + 9 <= len(head) and head[position] == 0xff:
        marker, length = head[position + 1], int.from_bytes(head[position + 2:position + 4], "big")
        if 0xc0 <= marker <= 0xcf and marker not in (0xc4, 0xc8, 0xcc):
            return int.from_bytes(head[position + 7:position + 9], "big"), int.from_bytes(head[position + 5:position + 7], "big")
        position += 2 + max(length, 2)
    return None


def _by_area(width: int, height: int, edge: int = 1568, cap: int = 1600) -> float:
    scale = min(1.0, edge / max(width, height))
    return min(cap, width * height * scale * scale / 750)


def _by_tiles(width: int, height: int) -> float:
    scale = min(1.0, 2048 / max(width, height))
    scale *= min(1.0, 768 / (min(width, height) * scale))
    return 85 + 170 * _up(width * scale / 512) * _up(height * scale / 512)


def _by_patches(width: int, height: int) -> float:
    return 1.7 * min(1536, _up(width / 32) * _up(height / 32))


#: Tokens of an image of known size, by the way a family cuts it up, and of one whose size nobody told.
_IMAGES: Mapping[str, tuple[Callable[[int, int], float], int]] = {
    "area": (_by_area, 1600),
    "large": (lambda width, height: _by_area(width, height, 2576, 4800), 1600),
    "tiles": (_by_tiles, 765),
    "patches": (_by_patches, 1600),
    "patches28": (lambda width, height: min(4096, _up(width / 28) * (_up(height / 28) + 1)), 1600),
    "flat": (lambda width, height: 258 if max(width, height) <= 384 else 258 * _up(width / 768) * _up(height / 768), 258),
}


def _image_tokens(part: Json, family: _Count) -> float:
    measure, unknown = _IMAGES[family.image]
    if part.get("detail") == "low":
        return 85
    size = _size_of_image(part["data"]) if "data" in part else None
    return measure(*size) if size and min(size) else unknown


def _file_tokens(part: Json, family: _Count) -> float:
    """So much for each page of a PDF; other files by size."""
    try:
        data = base64.b64decode(part.get("data", ""))
    except ValueError:
        data = b""
    if data and len(data) < 3000:
        return 300
    pages = len(re.findall(rb"/Type\s*/Page(?!s)", data))
    return family.page * (max(1, pages) if data[:4] == b"%PDF" or not data else max(1.0, len(data) / 1500))


def _part_tokens(part: Json, family: _Count) -> float:
    kind = part["type"]
    if kind == "image":
        return _image_tokens(part, family)
    if kind == "file" and "text" not in part:
        return _file_tokens(part, family)
    if kind == "think" and (part.get("seal") or {}).get("data"):
        return family.sealed * max(0, len(str(part["seal"]["data"])) - family.seal_head) or _text_tokens(part["text"], family)
    if kind == "result":
        found = "" if family.deferred else "".join(map(compact, (part.get("raw") or {}).get("tools") or ()))      # tools that a search brought in
        return sum(_part_tokens(inner, family) for inner in part["parts"]) + _text_tokens(found, family)
    if kind == "call":
        return family.call + _text_tokens(f"{part['name']} {part['args']}", family)
    if kind == "file":
        return _text_tokens(document_text(part), family)
    return _text_tokens(part.get("text") or (compact(part.get("data")) if kind == "opaque" else ""), family)


def _shown_parts(turn: Json, family: _Count) -> Iterable[Json]:
    """The parts of a turn as the template shows them."""
    if not family.cuts_tags or all(part["type"] != "call" for part in turn["parts"]):
        return turn["parts"]
    return ({**part, "text": part["text"].rpartition("</think>")[2]} if part["type"] == "text" else part for part in turn["parts"])


@functools.lru_cache(maxsize=4096)
def count_family(model: str) -> _Count:
    """How the prompts of a wire model are counted."""
    return next(family for globs, family in _COUNTS if any(fnmatch.fnmatchcase(model, glob) for glob in globs.split()))


def estimate_tokens(hub: Json, model: str = "", ratio: float = 1.0) -> int:
    """Prompt tokens of a hub request for a wire model, rather too many than too few; `ratio` is what Calibration learned.

    Counts system, turns, calls and results, images, documents, tools; not ids, marks, seals, nor thinking from before the user's last words.
    """
    family = count_family((model or hub["model"]).lower())
    turns, choice = hub["turns"], (hub.get("choice") or {}).get("mode")
    tools = () if choice == "none" and family.hidden_none else hub.get("tools", ())
    last_words = next((index for index in range(len(turns) - 1, -1, -1) if turns[index]["role"] == "user" and any(part["type"] != "result" for part in turns[index]["parts"])), 0)
    total = float(family.always)
    if hub.get("system"):
        total += family.system + sum(_text_tokens(part["text"], family) for part in hub["system"])
    for index, turn in enumerate(turns):
        total += family.turn + sum(_part_tokens(part, family) for part in _shown_parts(turn, family) if family.old_thinking or index >= last_words or part["type"] != "think")
    if tools:
        total += sum(_tool_tokens(tool, family) for tool in tools) + (family.forced if choice in ("any", "tool") else 0)
        total += family.with_tools if any(tool["kind"] != "hosted" for tool in tools) else 0
    if family.cited and any(part.get("citations") for turn in turns for part in turn["parts"]):
        total += family.cited
    if (hub.get("format") or {}).get("kind") == "schema" and family.schema:
        total += family.with_schema + family.schema * estimate_text(compact(hub["format"]["schema"]))
    if (hub.get("think") or {}).get("mode") in ("on", "auto"):
        total += family.thinking
    return _up(total * _MARGIN * ratio)


class Calibration:
    """How far estimates are off, per wire model: the running mean of actual / estimate, from 0.5 to 2.  Kept in memory only."""

    __slots__ = ("_ratios",)

    def __init__(self) -> None:
        self._ratios: dict[str, float] = {}

    def ratio(self, model: str) -> float:
        """What to multiply an estimate by."""
        return self._ratios.get(model, 1.0)

    def learn(self, model: str, estimated: int, actual: int) -> None:
        """One answer whose usage came from the provider; `estimated` is the plain estimate, without a ratio."""
        if estimated > 0 and actual > 0:
            observed = min(2.0, max(0.5, actual / estimated))
            self._ratios[model] = 0.8 * self._ratios.get(model, 1.0) + 0.2 * observed


class UsageFiller:
    """Gives every answer its token counts: the estimate at its start, and at its end what the provider did not tell."""

    __slots__ = ("_input_tokens", "_chars", "_seen")

    def __init__(self, input_tokens: int) -> None:
        self._input_tokens = input_tokens
        self._chars: list[str] = []
        self._seen: Json = {}

    def feed(self, delta: Json) -> list[Json]:
        """The delta, and before the stop what is missing."""
        kind = delta["delta"]
        if kind == "start":
            told = {name: count for name, count in (delta.get("usage") or {}).items() if count}
            self._seen = merge_usage(self._seen, told)
            return [{**delta, "usage": {"input": self._input_tokens, **told}}]
        if kind == "usage":
            self._seen = merge_usage(self._seen, {name: delta[name] for name in delta if name != "delta"})
        elif kind in ("text", "think", "args", "refuse"):
            self._chars.append(delta["text"])
        elif kind == "call":
            self._chars.append(delta["name"])
        elif kind == "stop":
            missing = self._missing()
            return [usage_delta({**self._seen, **missing, "estimated": True}), delta] if missing else [delta]
        return [delta]

    def _missing(self) -> Json:
        missing = {} if self._seen.get("input") else {"input": self._input_tokens}
        if "output" not in self._seen:
            missing["output"] = _up(estimate_text("".join(self._chars)) * _MARGIN) if self._chars else 0
        return missing


##############################################################################
# 15. World                                                 I/O | uses 1
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
# 16. HTTP                                                  I/O | uses 1-2
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
    if text.isascii() and text.isprintable():       # nearly every one
        return text.strip()
    return text.translate(_FIELD_JUNK).encode("latin-1", "replace").decode("latin-1").strip()


REASON_PHRASES: Mapping[int, str] = {
    200: "OK", 204: "No Content", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed",
    408: "Request Timeout", 411: "Length Required", 413: "Content Too Large", 415: "Unsupported Media Type", 417: "Expectation Failed", 421: "Misdirected Request",
    422: "Unprocessable Content", 426: "Upgrade Required", 429: "Too Many Requests", 431: "Request Header Fields Too Large", 500: "Internal Server Error",
    501: "Not Implemented", 502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout", 529: "Overloaded",
}


##############################################################################
# 17. Store                                                 I/O | uses 1-2
##############################################################################
# One SQLite file: gateway keys with their limits, and a row per request.  Routing never depends on it being healthy.  Keys are written
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
    # Classes of tokens no longer overlap: `input` was all of the prompt.  Going down keeps the limits: a key must not lose them unseen.
    _Migration("accounts", (
        """CREATE TABLE IF NOT EXISTS key_limits (
            key_id INTEGER PRIMARY KEY, admin INTEGER NOT NULL DEFAULT 0, expires_at INTEGER, rpm INTEGER, tpm INTEGER, concurrency INTEGER,
            usd_per_day REAL, usd_per_month REAL, models TEXT NOT NULL DEFAULT '')""",
        "ALTER TABLE usage ADD COLUMN price TEXT NOT NULL DEFAULT ''",
        "UPDATE usage SET input = max(0, input - cached - cache_write) WHERE cached > 0 OR cache_write > 0",
    ), (
        "UPDATE usage SET input = input + cached + cache_write WHERE cached > 0 OR cache_write > 0",
        "ALTER TABLE usage DROP COLUMN price",
    )),
    _Migration("learned", (
        "CREATE TABLE learned (kind TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, until_utc REAL NOT NULL, PRIMARY KEY (kind, key)) WITHOUT ROWID",
    ), ("DROP TABLE learned",)),
    # What routing has learned, as JSON that only sections 6 and 7 understand.
    _Migration("routing", ("CREATE TABLE routing (key TEXT PRIMARY KEY, state TEXT NOT NULL)",), ("DROP TABLE routing",)),
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
class KeyLimits:
    """What one key may use; None where nothing is set."""
    rpm: int | None = None             #: requests in any minute
    tpm: int | None = None             #: tokens in any minute
    concurrency: int | None = None     #: requests at a time
    usd_per_day: float | None = None   #: local days and months, as `stats` has them
    usd_per_month: float | None = None
    models: tuple[str, ...] = ()       #: globs; () for all


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
    admin: bool = False        #: may call /admin
    expires_at: int | None = None     #: seconds since 1970, None for never
    limits: KeyLimits | None = None   #: None where none is set


_KEY_COLUMNS = "id, key_prefix, name, created_at, last_used_at, is_active, usage_count"
_LIMIT_COLUMNS = ("admin", "expires_at", *KeyLimits.__dataclass_fields__)


def _hash_of(key: str) -> str:
    # surrogatepass: a header may hold anything, and no text may raise here
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _iso_utc(stored: str | None) -> str:
    """SQLite's `2026-01-31 10:00:00` as ISO 8601, "" for nothing."""
    return f"{stored.replace(' ', 'T')}Z" if stored and "T" not in stored else stored or ""


def _key_from(row: Sequence[Any]) -> GatewayKey:
    number, prefix, name, created, last_used, active, n_used, admin, expires_at, *numbers, models = row
    limits = KeyLimits(*numbers, tuple((models or "").split(",") if models else ()))
    return GatewayKey(number, prefix, name or "", _iso_utc(created), _iso_utc(last_used), bool(active), n_used or 0,
                      bool(admin), expires_at, None if limits == KeyLimits() else limits)


def _select_keys(connection: sqlite3.Connection, where: str, *values: Any) -> list[tuple[str, GatewayKey]]:
    """(hash, key) of the keys for which `where` holds, oldest first; of a schema before limits, too."""
    known = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'key_limits'").fetchone()
    limits, joined = (", ".join(_LIMIT_COLUMNS), "LEFT JOIN key_limits ON key_id = id") if known else (", ".join("NULL" for _ in _LIMIT_COLUMNS), "")
    rows = connection.execute(f"SELECT key_hash, {_KEY_COLUMNS}, {limits} FROM api_keys {joined} WHERE {where} ORDER BY id", values).fetchall()
    return [(row[0], _key_from(row[1:])) for row in rows]


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


def _checked_limits(limits: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of key_limits as they are stored; the names are those of _LIMIT_COLUMNS, None takes a limit away.  Raises ConfigError."""
    for name, value in limits.items():
        if name in ("rpm", "tpm", "concurrency") and value is not None and not 1 <= value <= _MAX_COUNT:
            raise ConfigError(f"key {name}", str(value), "a number from 1, or none for no limit")
        if name.startswith("usd_") and value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"key {name}", str(value), "US dollars, more than 0, or none for no limit")
        for glob in value or () if name == "models" else ():
            if not glob or not glob.isprintable() or "," in glob:
                raise ConfigError("key models", ascii(glob), "names or globs of models, as a comma list, or none for all")
    return {name: ",".join(value or ()) if name == "models" else value for name, value in limits.items()}


def _store_limits(connection: sqlite3.Connection, key_id: int, limits: Mapping[str, Any]) -> None:
    connection.execute("INSERT OR IGNORE INTO key_limits (key_id) VALUES (?)", (key_id,))
    for name, value in limits.items():
        connection.execute(f"UPDATE key_limits SET {name} = ? WHERE key_id = ?", (value, key_id))


def create_key(path: Path, name: str, *, length: int = 64, key: str | None = None, limits: Mapping[str, Any] = MappingProxyType({})) -> tuple[str, GatewayKey]:
    """A new gateway key and its row; durable and valid in running servers before this returns.

    length: hex characters after "sk-".  key: a secret to store instead of a drawn one.  limits: as set_limits takes them.
    """
    stored = _checked_limits(limits)
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
        if stored:
            _store_limits(connection, int(number or 0), stored)
        [(_, row)] = _select_keys(connection, "id = ?", number)
    return secret, row


def set_limits(path: Path, key_id: int, limits: Mapping[str, Any]) -> GatewayKey | None:
    """The key with some of its limits changed, None when there is no such key; in force in running servers before this returns.

    limits: names of KeyLimits, `expires_at` and `admin` -> value, None for no limit.  Raises ConfigError for one that cannot be.
    """
    stored = _checked_limits(limits)
    with _changing_keys(path) as connection:
        found = _select_keys(connection, "id = ?", min(key_id, _MAX_COUNT))
        if not found:
            return None
        _store_limits(connection, key_id, stored)
        return _select_keys(connection, "id = ?", key_id)[0][1]


def list_keys(path: Path) -> list[GatewayKey]:
    """All keys, revoked ones too, oldest first."""
    with _readable_database(path) as connection:
        return [key for _, key in _select_keys(connection, "1")]


def revoke_key(path: Path, key_id: int) -> bool:
    """Whether there is such a key; it is refused from now on and stays listed."""
    with _changing_keys(path) as connection:
        return connection.execute("UPDATE api_keys SET is_active = 0 WHERE id = ?", (min(key_id, _MAX_COUNT),)).rowcount > 0


def delete_key(path: Path, key_id: int) -> bool:
    """Whether there was such a key; it is gone, its usage rows stay."""
    with _changing_keys(path) as connection:
        connection.execute("DELETE FROM key_limits WHERE key_id = ?", (min(key_id, _MAX_COUNT),))
        return connection.execute("DELETE FROM api_keys WHERE id = ?", (min(key_id, _MAX_COUNT),)).rowcount > 0


def _read_active_keys(path: Path) -> dict[str, tuple[str, GatewayKey]]:
    """Hash -> (hash, key) of the keys that are valid; none when there is no database yet."""
    if not path.exists():
        return {}
    with contextlib.closing(_open_for_reading(path, _RING_BUSY_S)) as connection:
        return {digest: (digest, key) for digest, key in _select_keys(connection, "is_active")}


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
    """One request that ended, served or not; or an attempt whose answer was paid for and thrown away.  Field names are the columns of the table `usage`."""
    request_id: str            #: of a thrown away attempt with its number behind it
    at_utc: str                #: ISO 8601, when it ended
    key_id: int                #: GatewayKey.id, 0 for none
    key_name: str
    client_format: str
    model: str                 #: as the client asked
    provider: str              #: this and the next three: "" when no route served
    credential: str            #: its id
    wire_model: str
    route: str                 #: its id
    input: int                 #: tokens of the prompt that are in neither of the next two but one: no token is counted twice
    output: int
    cached: int                #: read from the provider's cache
    cache_write: int
    reasoning: int             #: a part of output
    cost_usd: float | None     #: None where no price is known
    estimated: bool            #: the counts are guesses
    status: int
    outcome: str               #: ok, error, client_closed; discarded for an attempt
    first_ms: int | None       #: until the first content, None when there was none
    total_ms: int
    attempts: int              #: of the whole request; 0 for an attempt
    streamed: bool
    price: str                 #: the price that was applied and where from, "" for none


class LearnedRow(NamedTuple):
    """Something that was learned of a provider and is worth keeping over a restart. Field names are the columns of the table `learned`."""
    kind: str
    key: str
    value: str                 #: JSON
    until_utc: float           #: seconds since 1970


_INSERT_LEARNED = "INSERT OR REPLACE INTO learned (kind, key, value, until_utc) VALUES (?, ?, ?, ?)"
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
        if row.outcome == "discarded":
            continue
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
        self.path, self._clock = path, clock
        self._queue: queue.SimpleQueue[UsageRow | LearnedRow | dict[str, str] | threading.Event | None] = queue.SimpleQueue()
        self._hurry = threading.Event()
        self.n_dropped = 0
        # What follows belongs to the thread.
        self._rows: deque[UsageRow] = deque()
        self._learned: dict[tuple[str, str], LearnedRow] = {}
        self._routing: dict[str, str] | None = None
        self._flushes: list[threading.Event] = []
        self._connection: sqlite3.Connection | None = None
        self._failing = self._stopping = False
        self._warned_at = float("-inf")
        self._thread = threading.Thread(target=self._run, name="usage-writer", daemon=True)
        self._thread.start()

    def put(self, row: UsageRow) -> None:
        """Queue `row`; never waits, never raises."""
        self._queue.put(row)

    def learn(self, row: LearnedRow) -> None:
        """Queue `row`, in the place of an older one of its kind and key; never waits, never raises."""
        self._queue.put(row)

    def learned(self, now_utc: float) -> list[LearnedRow]:
        """What was learned and still holds; nothing where the database cannot be read, since routing goes on without it."""
        try:
            with contextlib.closing(_open_for_reading(self.path, _RING_BUSY_S)) as connection:
                return [LearnedRow(*row) for row in connection.execute("SELECT kind, key, value, until_utc FROM learned WHERE until_utc > ?", (now_utc,))]
        except sqlite3.Error as error:
            _STORE_LOG.warning("learned.failed path=%s error=%s", self.path, error)
            return []

    def save_routing(self, rows: dict[str, str]) -> None:
        """Queue what routing knows, in place of what was saved before; the latest wins. Never waits, never raises."""
        self._queue.put(rows)

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
            if not self._rows and not self._learned and self._routing is None:
                self._take(self._queue.get())
            # Rows pile up in the queue meanwhile: a thread woken by each would cost a busy server more than the writing.
            self._hurry.wait(_RETRY_S if self._failing else _BATCH_S)
            self._hurry.clear()
            while not self._queue.empty() and (self._failing or len(self._rows) < _MAX_WAITING_ROWS):
                self._take(self._queue.get())
            self._settle()
        if self._rows:
            _STORE_LOG.warning("usage.lost path=%s rows=%d", self.path, len(self._rows))
        self._disconnect()

    def _take(self, item: UsageRow | LearnedRow | dict[str, str] | threading.Event | None) -> None:
        if item is None:
            self._stopping = True
        elif isinstance(item, dict):
            self._routing = item
        elif isinstance(item, UsageRow):
            self._rows.append(item)
        elif isinstance(item, LearnedRow):
            self._learned[item.kind, item.key] = item
        else:
            self._flushes.append(item)

    def _settle(self) -> None:
        """Write what was taken; on trouble keep it, within bounds."""
        self._failing = bool(self._rows or self._learned or self._routing is not None) and not self._write()
        while len(self._rows) > _MAX_WAITING_ROWS:
            self._rows.popleft()
            self.n_dropped += 1
        if not self._rows and not self._learned and self._routing is None:
            while self._flushes:
                self._flushes.pop().set()

    def _write(self) -> bool:
        try:
            if self._connection is None:
                self._connection = open_database(self.path, busy_s=_WRITER_BUSY_S)
            with _transaction(self._connection):
                _insert_usage(self._connection, self._rows)
                if self._learned:
                    self._connection.executemany(_INSERT_LEARNED, self._learned.values())
                    self._connection.execute("DELETE FROM learned WHERE until_utc < CAST(strftime('%s', 'now') AS REAL)")
                if self._routing is not None:
                    self._connection.execute("DELETE FROM routing")
                    self._connection.executemany("INSERT INTO routing VALUES (?, ?)", self._routing.items())
        except (sqlite3.Error, ConfigError) as error:
            self._disconnect()
            self._warn(error)
            return False
        self._rows.clear()
        self._learned.clear()
        self._routing = None
        return True

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _warn(self, error: sqlite3.Error | ConfigError) -> None:
        now = self._clock()
        if now - self._warned_at >= _WARN_EVERY_S:
            self._warned_at = now
            _STORE_LOG.warning("usage.failed path=%s error=%s waiting=%d dropped=%d", self.path, error, len(self._rows), self.n_dropped)


def load_routing(path: Path) -> dict[str, str]:
    """What save_routing() last wrote; nothing, with a warning, when the database does not give it: routing goes on without."""
    try:
        with _plain_trouble(path), contextlib.closing(_open_for_reading(path, _RING_BUSY_S)) as connection:
            return dict(connection.execute("SELECT key, state FROM routing").fetchall())
    except ConfigError as error:
        _STORE_LOG.warning("routing.lost path=%s error=%s", path, error)
        return {}


def totals(path: Path, day_utc: str | None = None) -> dict[str, int]:
    """Counts for `status`: keys, and requests and tokens of one UTC day (`2026-01-31`, default today) and of all days."""
    with _readable_database(path) as connection:
        active, revoked = connection.execute("SELECT coalesce(sum(is_active), 0), coalesce(sum(NOT is_active), 0) FROM api_keys").fetchone()
        n_ever = connection.execute("SELECT count(*) FROM usage WHERE outcome <> 'discarded'").fetchone()[0]
        n_today, n_input, n_output = connection.execute(
            "SELECT coalesce(sum(outcome <> 'discarded'), 0), coalesce(sum(input + cached + cache_write), 0), coalesce(sum(output), 0) FROM usage"
            " WHERE at_utc >= date(coalesce(?, 'now')) AND at_utc < date(coalesce(?, 'now'), '+1 day')", (day_utc, day_utc)).fetchone()
    return {"keys_active": active, "keys_revoked": revoked, "requests": n_ever, "requests_today": n_today, "input_today": n_input, "output_today": n_output}


# Statistics

#: What requests can be grouped by, as SQL over the usage table.
_GROUPS: Mapping[str, str] = {
    "key": "CASE WHEN key_id THEN printf('%s #%d', key_name, key_id) ELSE key_name END",
    "model": "wire_model",
    "provider": "provider",
    "day": "date(at_utc, 'localtime')",
}
GROUP_NAMES: tuple[str, ...] = tuple(_GROUPS)

_USED = "input + cached + cache_write + output > 0"
#: What is told of each group, as SQL; sums of nothing are null, which becomes 0.
_FIGURES: Mapping[str, str] = {
    "requests": "sum(outcome <> 'discarded')",
    "ok": "sum(outcome = 'ok')",
    "failed": "sum(outcome = 'error')",
    "client_closed": "sum(outcome = 'client_closed')",
    "attempts": "sum(attempts)",
    **{name: f"sum({name})" for name in ("input", "cached", "cache_write", "output", "reasoning")},
    "estimated_requests": "sum(estimated)",
    "estimated_input": "sum(estimated * (input + cached + cache_write))",
    "estimated_output": "sum(estimated * output)",
    "unpriced_requests": f"sum(cost_usd IS NULL AND {_USED})",
    "cost_usd": "sum(cost_usd)",
}


def local_midnight(utc_s: float, *, days_ago: int = 0) -> float:
    """When a local day began, in seconds since 1970."""
    today = datetime.fromtimestamp(utc_s).replace(hour=0, minute=0, second=0, microsecond=0)
    return (today - timedelta(days=days_ago)).timestamp()


def _utc_text(utc_s: float) -> str:
    """An instant as it compares with the column at_utc."""
    return datetime.fromtimestamp(utc_s, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")


def _figures_of(values: Sequence[Any]) -> Json:
    """A row of figures.  cost_usd is the sum of what is known, None where nothing but unknown prices was used."""
    figures = {name: value or 0 for name, value in zip(_FIGURES, values)}
    figures["cost_usd"] = None if figures["unpriced_requests"] and not figures["cost_usd"] else round(float(figures["cost_usd"]), 9)
    return figures


def read_stats(path: Path, *, since_utc_s: float, by: Sequence[str] = (), provider: str | None = None, model: str | None = None, heatmap: bool = False) -> Json:
    """What was used since an instant: {"since", "total": figures, "by", "groups": [{**group, **figures}], "hours"?: 7 x 24 requests, Monday first, local time}.

    by: names of GROUP_NAMES.  model: as the client asked or as the provider calls it.  Figures are those of _FIGURES.
    """
    conditions, values = ["at_utc >= ?"], [_utc_text(since_utc_s)]
    if provider is not None:
        conditions.append("provider = ?")
        values.append(provider)
    if model is not None:
        conditions.append("? IN (model, wire_model)")
        values.append(model)
    source, figures = f"FROM usage WHERE {' AND '.join(conditions)}", ", ".join(_FIGURES.values())
    stats: Json = {"since": f"{_utc_text(since_utc_s)}Z"}
    with _readable_database(path) as connection:
        connection.execute("BEGIN")       # one view for all of it
        stats["total"] = _figures_of(connection.execute(f"SELECT {figures} {source}", values).fetchone())
        stats["by"] = list(by)
        stats["groups"] = []
        if by:
            names, places = ", ".join(_GROUPS[name] for name in by), ", ".join(str(number + 1) for number in range(len(by)))
            for row in connection.execute(f"SELECT {names}, {figures} {source} GROUP BY {places} ORDER BY {places}", values):
                stats["groups"].append({**dict(zip(by, row)), **_figures_of(row[len(by):])})
        if heatmap:
            stats["hours"] = [[0] * 24 for _ in range(7)]
            for weekday, hour, count in connection.execute(
                    f"SELECT (strftime('%w', at_utc, 'localtime') + 6) % 7, CAST(strftime('%H', at_utc, 'localtime') AS INTEGER), sum(outcome <> 'discarded')"
                    f" {source} GROUP BY 1, 2", values):
                stats["hours"][weekday][hour] = count
    return stats


# What keys may use
#
# Decided before anything goes upstream, in memory: no request waits for a disk.  What a request may use at most is reserved together with the
# decision, on the one thread of the event loop, and settled with what it did use.  A limit is open while less than it is used or reserved,
# so parallel requests go over it by one estimate at most.

_WINDOW_S = 60
_HELD_RETRY_S = 5.0        #: when to come back where only reservations stand in the way: they end with their requests


@dataclass(slots=True)
class _Account:
    """What one key uses.  `seconds` holds [second, requests, tokens] of the last minute, oldest first; the sums are theirs."""
    seconds: deque[list[int]] = field(default_factory=deque)
    n_requests: int = 0
    n_tokens: int = 0
    n_running: int = 0
    held_usd: float = 0.0
    day_usd: float = 0.0
    month_usd: float = 0.0


@dataclass(slots=True)
class KeyHold:
    """What is reserved for one request, until it is settled."""
    account: _Account
    second: list[int]
    n_tokens: int
    usd: float
    settled: bool = False


def spent_by_key(path: Path, day_utc_s: float, month_utc_s: float) -> dict[int, tuple[float, float]]:
    """Key id -> known cost in USD since two instants, the second one earlier; none when there is no database.  Raises sqlite3.Error and ConfigError."""
    if not path.exists():
        return {}
    with _readable_database(path) as connection:
        rows = connection.execute("SELECT key_id, sum(CASE WHEN at_utc >= ? THEN cost_usd END), sum(cost_usd) FROM usage WHERE at_utc >= ? GROUP BY key_id",
                                  (_utc_text(day_utc_s), _utc_text(month_utc_s))).fetchall()
    return {number: (day or 0.0, month or 0.0) for number, day, month in rows}


class Accounts:
    """What each key uses and has spent.  Owner: the gateway; for the event loop's thread alone.

    Spend is read from the usage table once, here; where that fails it is logged and counting begins at nothing.
    """

    def __init__(self, path: Path, clock: Callable[[], float], utc: Callable[[], float]) -> None:
        self._clock, self._utc = clock, utc
        self._accounts: dict[int, _Account] = {}
        self._day_ends_at = self._month_ends_at = float("-inf")
        day_at, month_at = self._turn_over(utc())
        try:
            for key_id, (day_usd, month_usd) in spent_by_key(path, day_at, month_at).items():
                self._accounts[key_id] = _Account(day_usd=day_usd, month_usd=month_usd)
        except (sqlite3.Error, ConfigError) as error:
            _STORE_LOG.warning("spend.failed path=%s error=%s", path, error)

    def _turn_over(self, utc_s: float) -> tuple[float, float]:
        """Begin a new day, and a new month where it is one; the instants they began at."""
        day_at = local_midnight(utc_s)
        first = datetime.fromtimestamp(day_at).replace(day=1)
        new_month = utc_s >= self._month_ends_at
        self._day_ends_at = (datetime.fromtimestamp(day_at) + timedelta(days=1)).timestamp()
        self._month_ends_at = (first + timedelta(days=32)).replace(day=1).timestamp()
        for account in self._accounts.values():
            account.day_usd = 0.0
            account.month_usd = 0.0 if new_month else account.month_usd
        return day_at, first.timestamp()

    def _account(self, key_id: int) -> _Account:
        return self._accounts.get(key_id) or self._accounts.setdefault(key_id, _Account())

    def charge(self, key_id: int, usd: float) -> None:
        """A request of a key cost this much."""
        if self._utc() >= self._day_ends_at:
            self._turn_over(self._utc())
        account = self._account(key_id)
        account.day_usd += usd
        account.month_usd += usd

    def admit(self, key: GatewayKey, n_tokens: int = 0, usd: float = 0.0) -> KeyHold:
        """Reserve for one request of a key with limits: it is counted, and what it may use is held.  Raises GatewayError 429 with the time to come back."""
        limits, account, now = key.limits or KeyLimits(), self._account(key.id), self._clock()
        _forget_old(account, now)
        refusal = self._refusal(limits, account, now)
        if refusal is not None:
            raise refusal
        if not account.seconds or account.seconds[-1][0] != int(now):
            account.seconds.append([int(now), 0, 0])
        second = account.seconds[-1]
        second[1] += 1
        second[2] += n_tokens
        account.n_requests += 1
        account.n_tokens += n_tokens
        account.n_running += 1
        account.held_usd += usd
        return KeyHold(account, second, n_tokens, usd)

    def settle(self, hold: KeyHold, n_tokens: int) -> None:
        """The request of `hold` has ended and used this many tokens; what it cost is charged apart.  A second time does nothing."""
        if hold.settled:
            return
        hold.settled, account = True, hold.account
        account.n_running -= 1
        account.held_usd = max(0.0, account.held_usd - hold.usd) if account.n_running else 0.0
        _forget_old(account, self._clock())
        if hold.second[0] >= 0:             # its second is still in the window
            hold.second[2] += n_tokens - hold.n_tokens
            account.n_tokens += n_tokens - hold.n_tokens

    def headers(self, key: GatewayKey) -> Headers:
        """x-ratelimit-*: what is left of a key's requests and tokens per minute, and when all of it is back."""
        limits, account, now = key.limits or KeyLimits(), self._account(key.id), self._clock()
        _forget_old(account, now)
        whole_s = max(0, account.seconds[-1][0] + _WINDOW_S + 1 - int(now)) if account.seconds else 0
        found: Headers = []
        for name, limit, n_used in (("requests", limits.rpm, account.n_requests), ("tokens", limits.tpm, account.n_tokens)):
            if limit is not None:
                found += [(f"x-ratelimit-limit-{name}", str(limit)), (f"x-ratelimit-remaining-{name}", str(max(0, limit - n_used))),
                          (f"x-ratelimit-reset-{name}", f"{whole_s}s")]
        return found

    def _refusal(self, limits: KeyLimits, account: _Account, now: float) -> GatewayError | None:
        """Why nothing more may be asked with a key now, None when something may."""
        if limits.concurrency is not None and account.n_running >= limits.concurrency:
            return no_route(f"This key may ask {limits.concurrency} at a time, and does.", status=429, retry_after_s=1.0)
        if limits.rpm is not None and account.n_requests >= limits.rpm:
            return no_route(f"This key has used its {limits.rpm} requests per minute.", status=429, retry_after_s=_freed_after_s(account, 1, limits.rpm, now))
        if limits.tpm is not None and account.n_tokens >= limits.tpm:
            return no_route(f"This key has used its {limits.tpm} tokens per minute.", status=429, retry_after_s=_freed_after_s(account, 2, limits.tpm, now))
        if limits.usd_per_day is None and limits.usd_per_month is None:
            return None
        utc_s = self._utc()
        if utc_s >= self._day_ends_at:
            self._turn_over(utc_s)
        for limit, spent_usd, span, ends_at in ((limits.usd_per_day, account.day_usd, "day", self._day_ends_at),
                                                (limits.usd_per_month, account.month_usd, "month", self._month_ends_at)):
            if limit is not None and spent_usd + account.held_usd >= limit:
                spent = spent_usd >= limit
                error = no_route(f"This key has {'spent' if spent else 'spent or reserved'} its ${limit:g} of this {span}.", status=429,
                                 retry_after_s=ends_at - utc_s if spent else _HELD_RETRY_S)
                if spent:
                    error.code = error.type = "insufficient_quota"
                return error
        return None


def _forget_old(account: _Account, now: float) -> None:
    """Let go of what was used more than a minute ago; a second counts until all of it is that old."""
    while account.seconds and account.seconds[0][0] + _WINDOW_S + 1 <= now:
        second = account.seconds.popleft()
        account.n_requests -= second[1]
        account.n_tokens -= second[2]
        second[0] = -1


def _freed_after_s(account: _Account, place: int, limit: int, now: float) -> float:
    """How long until less than `limit` requests (place 1) or tokens (place 2) are left of the last minute."""
    left = account.n_requests if place == 1 else account.n_tokens
    for second in account.seconds:
        left -= second[place]
        if left < limit:
            return max(1.0, second[0] + _WINDOW_S + 1 - now)
    return float(_WINDOW_S)


##############################################################################
# 18. Transport                                             I/O | uses 1-2, 4-5, 15-16
##############################################################################
# The providers' side: one request, one Answer.  Every way a connection can fail leaves here as an UpstreamFailure and as
# nothing else.  Connections are pooled per (origin, proxy) and come back to the pool only when their answer was whole, its
# framing unambiguous and not one byte came after it; a byte or an end that arrives while a connection waits spoils it.
# Deadlines are one Alarm per connection: it aborts the transport, the pending read ends, and the phase tells what for.

_MAX_INFORMATIONAL = 20
_READ_BYTES = 128 * 1024


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
    if "SSL_CERT_FILE" not in os.environ:
        with contextlib.suppress(ImportError):      # the system's authorities alone then
            import certifi
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
        self._inflate = _make_inflater(fields["content-encoding"], transport.bounds.answer_bytes) if "content-encoding" in fields else None
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

    async def read_all(self, *, idle_s: float, within_s: float) -> bytes:
        """The whole body, in `within_s` at the most. Blank pieces are keep-alives; once something else came the rest must follow within `idle_s`."""
        pieces: list[bytes] = []
        n_bytes, max_bytes, ends_at = 0, self._transport.bounds.answer_bytes, self._transport.clock() + within_s
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


def _make_inflater(coding: str, max_bytes: int) -> Callable[[bytes], bytes] | None:
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
            plain = engine.decompress(piece, max_bytes - n_bytes + 1) if piece else b""
        except zlib.error as error:
            raise transport_failure("protocol", "body", "the answer is not compressed as it says") from error
        n_bytes += len(plain)
        if n_bytes > max_bytes:
            raise transport_failure("too_big", "body", f"an answer larger than {max_bytes} bytes when inflated")
        if engine.unused_data:
            raise transport_failure("protocol", "body", "something follows the compressed answer")
        return plain

    return inflate


class Transport:
    """All connections to providers; one for the life of the process."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.clock = world.clock
        self.bounds = Bounds()          #: as they are configured now
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
        line.alarm.set(self.bounds.pool_idle_s)
        line.phase = "parked"
        lines.append(line)
        if len(lines) > self.bounds.pool_size:
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
# 19. Server                                                I/O | uses 1-2, 4, 15-16
##############################################################################
# The clients' side: accept, read one request at a time, hand it to the application, write its answer.  What the server
# decides by itself is HTTP and nothing else: framing, limits, keep-alive, order of pipelined answers, draining.
# The application (section 22) gives `admit`, called with the head alone, so that a body nobody may send is never read,
# and `bounds`, looked at each time: an edit of models.json is in force from the next wait on.

MAX_TARGET_BYTES = 8 * 1024
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
    @property
    def bounds(self) -> Bounds: ...

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
            self._write_alarm.set(self.server.application.bounds.client_stall_s)
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
            max_bytes = self.server.application.bounds.body_bytes
            if framing.kind == "length" and framing.n_bytes > max_bytes:
                raise too_large(f"the body is larger than {max_bytes} bytes")
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
        bounds = self.server.application.bounds
        self.alarm.set(bounds.client_head_s if self._buffer else bounds.client_idle_s)
        while not (end := find_head_end(self._buffer)):
            data = await self.inbox.read(_READ_BYTES_CLIENT)
            if not data:
                return None
            if self._buffer:
                self._buffer += data
                continue
            self._buffer = data.lstrip(b"\r\n")
            if self._buffer and b"\r\n\r\n" not in data:
                self.alarm.set(bounds.client_head_s)
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
            self.alarm.set(self.server.application.bounds.client_body_s)
        pieces, n_bytes, max_bytes = [], 0, self.server.application.bounds.body_bytes
        while not reader.done:
            data, self._buffer = self._buffer or await self.inbox.read(_READ_BYTES_CLIENT), b""
            if not data:
                raise ConnectionResetError("the client left inside its request")
            piece = reader.feed(data)
            if reader.bad:
                raise BadHttp(reader.bad)
            n_bytes += len(piece)
            if n_bytes > max_bytes:
                raise too_large(f"the body is larger than {max_bytes} bytes")
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
            if not self._answered and (self.exchange is None or not self.exchange.head_sent):
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
        self._write_alarm.set(self.server.application.bounds.client_stall_s)
        await self.writer.drain()
        self._write_alarm.rest()
        if self.inbox.at_eof():
            return
        if self.writer.can_write_eof():
            try:
                self.writer.write_eof()
            except OSError:         # the client has reset the connection since
                return
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

    def __init__(self, application: Application, world: World) -> None:
        self.application = application
        self.clock = world.clock
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
        if len(self._links) >= self.application.bounds.connections or not self.open:
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
# 20. Relay                                                 I/O | uses 1-16, 18
##############################################################################
# One request from its plan to its settled usage.  Two marks are kept apart: head sent (keep-alives may have gone out) and
# committed (content went out).  Until commit every failure leads to the next route; after it a route that continues texts may
# have the rest (_go_on), else the client gets its format's error event and nothing is left looking complete.  Relay meets clients only through a Sink.
# Relay owns the routing state; the pure rules that change it are section 7's.

_AFTER_FINISH_S = 2.0           #: how long to wait for usage and [DONE] once a finish reason has come
_AFTER_END_S = 0.25             #: how long to wait for the end of the body once the end mark has come
_ERROR_BODY_BYTES = 64 * 1024
_ERROR_BODY_S = 5.0
_RETRY_PAUSE_S = 0.2
_COUNT_S = 5.0                  #: how long a provider may take to count tokens before they are estimated
_BYTES_PER_TOKEN = 4
_MAX_TARGETS = 4096
_MODELS_FRESH_S = 300.0
_MODELS_S = 20.0                #: how long a provider may take over its list
_MODELS_BYTES = 8 << 20
_MODELS_MAX = 5000
_MODELS_PATHS: Mapping[str, str] = MappingProxyType({"messages": "/models?limit=1000"})
_SECRET_MIN = 16                #: characters of a key whose last four tell nothing of the others
_WORTH_SAVING_S = 60.0          #: a cooldown that lasts longer than this should survive even a crash
_USUAL_OUTPUT = 500.0           #: tokens of an answer until some have been seen
_LONG_BYTES = 20_000            #: a request of this size may be long for its images, whose bytes are no tokens
_KEEP_ALIVE_COMMENT = b": keep-alive\n\n"
_RESUME_BYTES = 256 * 1024      #: of a stream that are kept for the case that it breaks off; a longer one is not gone on with
#: Texts on which Claude Code compacts.
_COMPACTS = re.compile(r"prompt is too long|exceed context limit")
#: Payload rules are for requests of a conversation, whose fields a provider's entry knows.
_RULED_PATHS = frozenset(FORMATS[name].path for name in FORMAT_NAMES)
#: Provider headers that clients may see.
_RELAYED_HEADERS = ("x-request-id", "request-id", "openai-processing-ms")
_RELAYED_PREFIXES = ("x-ratelimit-", "anthropic-ratelimit-")


@functools.lru_cache(256)
def _is_relayed(name: str) -> bool:
    return name in _RELAYED_HEADERS or name.startswith(_RELAYED_PREFIXES)


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
    client: ClientFormat = "chat"   #: the format the client speaks
    betas: str = ""                 #: its anthropic-beta header
    version: str = ""               #: its anthropic-version header
    blanks: bool = False            #: it wants blanks while it waits for an answer that is not streamed
    models: tuple[str, ...] = ()    #: globs of the models its key may use, () for all
    wish: Wish | None = None        #: what it said of its routing
    session: str = ""               #: its x-session-id header
    hold: Any = None                #: what is reserved for it, where its key has limits; the relay only passes it on


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
    passed_over: Sequence[tuple[Route, str]]        #: routes that could not serve it, and why: a word of misfit()
    plan: Plan | None
    facts: Facts
    waited_ms: int
    told: str = ""                  #: what the client was told when it was refused
    discarded: Sequence[tuple[Attempt, Usage]] = ()     #: attempts whose answers were counted by their providers and reached no client

    @property
    def route(self) -> Route | None:
        """The route that served, else the one tried last."""
        return self.attempts[-1].route if self.attempts else None


_NO_PROFILE = Profile()


def make_target(provider: Provider, credential: Credential, settings: Settings, user_agent: str, method: str, path: str) -> tuple[Origin, str]:
    """Where requests to `path` behind a provider's base URL go, and the lines of their head that are always the same."""
    scheme, host, port, base = split_url(provider.base_url)
    proxy = credential.proxy if credential.proxy is not None else provider.proxy
    if proxy is None:
        proxy = settings.https_proxy if scheme == "https" else settings.http_proxy
        proxy = "" if is_loopback(host) or no_proxy_covers(host, settings.no_proxy) else proxy
    name = f"[{host}]" if ":" in host else host
    name += "" if port == {"https": 443, "http": 80}[scheme] else f":{port}"
    secret = [(provider.preset.auth_header, f"{provider.preset.auth_scheme} {credential.secret}".strip())] if credential.secret else []
    fixed = [("Host", name), ("User-Agent", user_agent), ("Content-Type", "application/json"), ("Accept-Encoding", "identity"), *secret,
             *provider.preset.headers, *provider.headers, *credential.headers]
    lines = {label.lower(): f"{label}: {header_value(value)}\r\n" for label, value in fixed}    # later ones win
    return Origin(scheme, host, port, proxy or ""), f"{method} {base}{path} HTTP/1.1\r\n{''.join(lines.values())}"


class Relay:
    """Attempts, commit and pump for all requests; one for the life of the process."""

    def __init__(self, world: World, transport: Transport, settle: Callable[[Settled], None], keep: Callable[[str, str, Any], None], user_agent: str) -> None:
        self.world = world
        self.transport = transport
        self.settle = settle
        self.keep = keep                #: kind, key and JSON value of something that was learned
        self.state = RoutingState()
        self.config: Config
        self.catalogue: Catalogue
        self.memo = Memo()
        self.calibration = Calibration()
        self.lines: dict[str, deque[asyncio.Event]] = {}     #: by turn name, who waits for a free route, first come first
        self.usual_output = _USUAL_OUTPUT                    #: tokens of an answer, on the average of late
        self.has_news = False                                #: something was proven that rows() should be saved for
        self.resuming: frozenset[str] = frozenset()          #: providers that may go on with a stream that broke off
        self._user_agent = user_agent
        self._targets: dict[tuple[str, str], tuple[Provider, tuple[Origin, str]]] = {}
        self._allowed: dict[tuple[str, ...], Catalogue] = {}

    def configure(self, config: Config) -> None:
        """Route by `config` from now on; requests under way finish on what they began with."""
        self.config, self.catalogue = config, build_catalogue(config)
        self._targets = {}
        self._allowed = {}
        self.state.rules = failure_rules(config.carousel.limits)
        self.resuming = frozenset(provider.name for provider in config.active if any(way_on(provider, model, config.carousel.resume) for model in provider.models))
        prepare_ledger(self.state.ledger, config.active, utc_less_now=self.world.utc() - self.world.clock())
        self.wake()

    def choose(self, job: Job) -> tuple[Choice, Catalogue]:
        """What the job's model stands for, and all that its key may use. Raises GatewayError 403 and 404."""
        catalogue, choice = (self.catalogue, resolve(self.catalogue, job.model)) if job.wish is None else choose(self.catalogue, job.model, job.wish)
        if not job.models:
            return choice, catalogue
        if job.wish is not None:
            return allow_choice(choice, None if job.wish.models else job.model, job.models), allow_catalogue(catalogue, job.models)
        allowed = self._allowed.get(job.models)
        if allowed is None:
            if len(self._allowed) >= _MAX_TARGETS:
                self._allowed.clear()
            allowed = self._allowed[job.models] = allow_catalogue(catalogue, job.models)
        return allow_choice(choice, job.model, job.models), allowed

    def within_reach(self, job: Job) -> Iterator[Route]:
        """Every route that may come to serve the job, some more than once. Raises GatewayError 403 and 404."""
        choice, catalogue = self.choose(job)
        falls_back = choice.explicit and job.may_fall_back and self.config.carousel.fallback != "none"
        return (route for groups in (choice.groups, catalogue.whole if falls_back else ()) for group in groups for routes in group for route in routes)

    def wake(self) -> None:
        """Something has ended or changed: whoever is first in a line looks again."""
        for line in self.lines.values():
            line[0].set()

    def rows(self) -> dict[str, str]:
        """What routing knows that should outlive a restart, for save_routing()."""
        now = self.world.clock()
        kinds = (("bucket", ledger_rows(self.state.ledger, now)), ("cooldown", cooldown_rows(self.state, now)))
        return {f"{kind} {key}": dump_json(row).decode() for kind, rows in kinds for key, row in rows.items()}

    def load(self, rows: Mapping[str, str]) -> None:
        """Go on from what rows() gave another process."""
        found: dict[str, dict[str, Json]] = {"bucket": {}, "cooldown": {}}
        for name, text in rows.items():
            kind, _, key = name.partition(" ")
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(text)
                if kind in found and isinstance(row, dict):
                    found[kind][key] = row
        load_ledger(self.state.ledger, found["bucket"], self.world.clock())
        load_cooldowns(self.state, found["cooldown"], self.world.clock())

    def foresee(self, job: Job, sink: Sink) -> Decision:
        """What would be decided for a job as things are, without asking anybody. Raises GatewayError where its model's name leads nowhere."""
        return _Run(self, job, sink).foresee()

    async def run(self, job: Job, sink: Sink) -> None:
        """Answer one request. Raises only CancelledError and ConnectionError: the client has gone."""
        await _Run(self, job, sink).go()

    async def count_tokens(self, job: Job) -> tuple[int, bool]:
        """(prompt tokens of a Messages request, whether they are estimated). Raises GatewayError 400 and 404.

        A provider that speaks Messages is asked, once; whatever it fails by, it stays as healthy as it was and the answer is an estimate.
        """
        hub = FORMATS["messages"].read_request(job.body)
        choice, catalogue = self.choose(job)
        routes = plan(catalogue, choice, self.state, self.world.clock(), strategy=self.config.carousel.strategy, fallback=self.config.carousel.fallback).routes
        if not routes:
            return estimate_tokens(hub), True
        route = routes[0]
        profile = target_profile(route.provider.preset.name, route.model, route.provider.format)
        if profile.format == "messages":
            with contextlib.suppress(UpstreamFailure, ValueError, KeyError, TypeError):
                return await self._ask_count(job, route, count_request(job.raw, job.body, recall(hub, self.memo), profile)), False
        return estimate_tokens(hub, route.model.id, self.calibration.ratio(route.model.id)), True

    async def _ask_count(self, job: Job, route: Route, body: bytes) -> int:
        """What the provider itself counts. Raises UpstreamFailure, and ValueError, KeyError or TypeError for an answer that is no count."""
        origin, message = self.message(route, job, body, FORMATS["messages"].path + "/count_tokens")
        answer = await self.transport.request(origin, message, replace(route.provider.timeouts, connect_s=_COUNT_S, first_byte_s=_COUNT_S))
        try:
            told = json.loads(await answer.read_start(_ERROR_BODY_BYTES, idle_s=_ERROR_BODY_S))
            n_tokens = told["input_tokens"]
            if answer.status != 200 or type(n_tokens) is not int or n_tokens < 0:
                raise ValueError("no count")
            return n_tokens
        finally:
            answer.release()

    def message(self, route: Route, job: Job, body: bytes, path: str) -> tuple[Origin, bytes]:
        """Where a request goes and its bytes, head and body; `path` stands behind the base URL. The head's fixed part is written once per route and path."""
        known = self._targets.get((route.id, path))
        if known is not None and known[0] is route.provider:
            target = known[1]
        else:                           # a request under way may still be on the configuration before
            target = make_target(route.provider, route.credential, self.config.settings, self._user_agent, "POST", path)
            if len(self._targets) >= _MAX_TARGETS:
                self._targets.clear()
            self._targets[route.id, path] = route.provider, target
        own = f"Idempotency-Key: {job.idempotency_key}\r\n" if job.idempotency_key else ""
        if route.provider.format == "messages":
            own += f"anthropic-version: {job.version or '2023-06-01'}\r\n" + (f"anthropic-beta: {job.betas}\r\n" if job.betas else "")
        accept = "text/event-stream" if job.stream else "application/json"
        return target[0], f"{target[1]}{own}Accept: {accept}\r\nContent-Length: {len(body)}\r\n\r\n".encode("latin-1") + body

    async def ask_models(self, provider: Provider) -> tuple[Model, ...]:
        """What a provider says that it has, in its order. Raises UpstreamFailure."""
        origin, head = make_target(provider, provider.credentials[0], self.config.settings, self._user_agent, "GET", _MODELS_PATHS.get(provider.format, "/models"))
        own = "anthropic-version: 2023-06-01\r\n" if provider.format == "messages" else ""
        answer = await self.transport.request(origin, f"{head}{own}Accept: application/json\r\n\r\n".encode("latin-1"),
                                              replace(provider.timeouts, first_byte_s=_MODELS_S, total_s=_MODELS_S))
        try:
            body = await answer.read_start(_MODELS_BYTES, idle_s=_MODELS_S)
        finally:
            answer.release()
        found = read_models(body)
        if answer.status != 200 or not found:
            failure = classify(provider.preset.name, provider.preset.bucket, answer.status, dict(answer.headers), body[:_ERROR_BODY_BYTES], utc=self.world.utc())
            failure.detail = redact(failure.detail, self.config.secrets)
            raise failure
        return found


def read_models(body: bytes) -> tuple[Model, ...]:
    """The models of a provider's list in any of its shapes, with their context where it is told; () for what is no list."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        return ()
    rows = next((told[name] for name in ("data", "models") if isinstance(told.get(name), list)), ()) if isinstance(told, dict) else told if isinstance(told, list) else ()
    found: dict[str, Model] = {}
    for row in rows[:_MODELS_MAX]:
        name = row.get("id") or row.get("name") if isinstance(row, dict) else None
        if isinstance(name, str) and 0 < len(name) <= 200 and name.isprintable():
            sizes = (row.get(field) for field in ("context_length", "context_window", "max_context_length", "max_model_len", "max_input_tokens"))
            name = name.removeprefix("models/")         # as Gemini has them
            found[name] = Model(name, context=next((size for size in sizes if type(size) is int and size > 0), None))
    return tuple(found.values())


class ModelLists:
    """What providers with "*" among their models offer. Asked for in the background, never while a request waits; the last good list is kept."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._lists: dict[str, tuple[str, tuple[Model, ...]]] = {}       # by provider: its base URL, what it offers
        self._asked_at: dict[str, float] = {}
        self._task: asyncio.Task[Any] | None = None

    def of(self, provider: Provider) -> tuple[Model, ...]:
        """What is known to be offered, () where nothing is or configuration does not ask."""
        base_url, models = self._lists.get(provider.name, ("", ()))
        return models if provider.lists_models and base_url == provider.base_url else ()

    def look(self) -> None:
        """Have lists that are older than five minutes asked for again, and those that were never asked for."""
        now = self._relay.world.clock()
        due = [provider for provider in self._asking() if now - self._asked_at.get(provider.name, -_MODELS_FRESH_S) >= _MODELS_FRESH_S]
        if due and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._ask(due))

    async def refresh(self) -> Json:
        """Ask all of them now: {provider: {models: how many}, or {error: why} beside the number that is kept}."""
        told = await self._ask(self._asking())
        return {provider.name: {"models": len(self.of(provider)), **({"error": told[provider.name]} if told[provider.name] else {})} for provider in self._asking() if provider.name in told}

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _asking(self) -> list[Provider]:
        return [provider for provider in self._relay.config.active if provider.lists_models]

    async def _ask(self, providers: Sequence[Provider]) -> dict[str, str]:
        """Why each failed, "" where it did not; what a failed one offered before stays."""
        async def ask(provider: Provider) -> str:
            self._asked_at[provider.name] = self._relay.world.clock()
            try:
                self._lists[provider.name] = provider.base_url, await self._relay.ask_models(provider)
            except UpstreamFailure as failure:
                logging.getLogger("aicarousel.relay").warning("models.failed provider=%s reason=%s detail=%s", provider.name, failure.reason, log_text(failure.detail))
                return f"{failure.reason} {failure.detail}".strip()
            return ""
        return dict(zip((provider.name for provider in providers), await asyncio.gather(*map(ask, providers)), strict=True))


class _Run:
    """The work on one job."""

    __slots__ = ("_relay", "_job", "_sink", "_config", "_catalogue", "_keeper", "_attempts", "_failures", "_committed", "_usage", "_discarded", "_n_content_bytes",
                 "_first_ms", "_outcome", "_status", "_told", "_cooled", "_dropped", "_choice", "_sent_at", "_log",
                 "_facts", "_plan_seen", "_waited_s", "_hold", "_give_up_at", "_refusal", "_needs", "_passed_over", "_repaired", "_shrink", "_client", "_wire", "_n_asked", "_n_estimated", "_writer", "_spoke", "_carrier", "_passing", "_profile", "_names",
                 "_sent", "_n_sent", "_seam", "_owed", "_spent")

    def __init__(self, relay: Relay, job: Job, sink: Sink) -> None:
        self._relay, self._job, self._sink = relay, job, sink
        self._config = relay.config
        self._catalogue: Catalogue
        self._keeper = Alarm(self._keep_alive) if job.stream or job.blanks else None
        self._attempts: list[Attempt] = []
        self._failures: list[UpstreamFailure] = []
        self._committed = False
        self._usage: Usage | None = None
        self._discarded: list[tuple[Attempt, Usage]] = []
        self._n_content_bytes = 0
        self._first_ms = 0
        self._outcome, self._status, self._told = "error", 500, ""
        self._cooled: set[str] = set()
        self._dropped: tuple[str, ...] = ()
        self._choice: Choice
        self._facts = NO_FACTS
        self._plan_seen: Plan | None = None     # the plan that is being followed
        self._waited_s = 0.0                    # in line for a free route
        self._hold: Hold | None = None          # what this attempt has reserved
        self._give_up_at = 0.0                  # until when a free route is waited for
        self._refusal = ""                      # the body of an answer other than 200
        self._sent_at = 0.0
        self._log = logging.getLogger("aicarousel.relay")
        self._needs = Needs(job.raw if job.client != "embeddings" else b"", job.body, relay.state.windows, relay.world.utc(), FORMATS[job.client].read_request, relay.calibration.ratio,
                            frozenset(job.body) if job.wish is not None and job.wish.require_parameters else frozenset())
        self._passed_over: list[tuple[Route, str]] = []     # routes that could not serve this request, and why
        self._repaired = False                  # the refusal of this attempt has told how to ask again
        self._shrink: tuple[Route, Repair] | None = None    # where the request fits if its answer is shorter
        self._client = self._wire = FORMATS[job.client]     # what the client speaks, and what the provider of this attempt is asked in
        self._n_asked = 0                       # requests that went out
        self._n_estimated = 0                   # prompt tokens, where they had to be estimated
        self._writer: Any = None                # the request's own writer, for translated answers and keep-alives
        self._spoke = False                     # a keep-alive has gone through it
        self._carrier: Any = None               # what an answer under way goes through
        self._passing = True
        self._profile = _NO_PROFILE
        self._names = EMPTY_NAMES
        self._sent: list[bytes] | None = None   # what the client has got of a stream that may be gone on with if it breaks off
        self._n_sent = 0
        self._seam: Seam | None = None          # where it broke off, while it is gone on with
        self._owed: UpstreamFailure | None = None   # why it broke off, until the client has been told or the rest has come
        self._spent: Usage | None = None        # of the attempts before this one, whose answers the client has

    async def go(self) -> None:
        """Serve, and settle whatever happens."""
        if self._keeper is not None:
            self._keeper.set(self._config.carousel.limits.keep_alive_first_s)
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

    def foresee(self) -> Decision:
        """The plan and what does not fit, without an attempt."""
        job, relay = self._job, self._relay
        self._choice, self._catalogue = relay.choose(job)
        self._facts = self._read_facts()
        self._give_up_at = relay.world.clock() + self._config.carousel.max_wait_s
        with contextlib.suppress(GatewayError):         # why there is no route is what is asked
            self._look_for_routes()
        found = self._plan_seen
        misfits = [(route, why) for route in (found.routes if found else ()) if (why := misfit(route, self._needs))]
        return Decision(job.id, relay.world.utc(), job.client, (job.model or "")[:200], job.stream, self._facts, found, (), misfits, 0, "", wish=job.wish, models=job.models)

    def _note_leaving(self) -> None:
        """The client has gone; that says nothing of an answer that was whole by then."""
        if self._outcome != "ok":
            self._outcome, self._status = "client_closed", 499

    async def _serve(self) -> None:
        """Try the routes of the plan in order until one serves. Raises GatewayError when none does."""
        job, carousel = self._job, self._config.carousel
        self._choice, self._catalogue = self._relay.choose(job)
        if job.client == "embeddings":
            self._choice = same_model(self._choice)
        self._facts = self._read_facts()
        self._give_up_at = self._relay.world.clock() + carousel.max_wait_s
        waiting, retried = deque(self._willing((await self._plan()).routes)), False
        if self._relay.resuming and job.stream and self._client.take_up is not None and any(route.provider.name in self._relay.resuming for route in waiting):
            self._sent = []
        while (waiting or await self._replan(waiting)) and self._n_asked < carousel.max_attempts:
            route = waiting.popleft()
            if self._cooled.intersection(route.keys) or self._has_filled_up(route):
                continue                # another attempt of this request has just shown that it is out, or another request was there first
            why = misfit(route, self._needs)
            if why:
                self._passed_over.append((route, why))
                continue
            failure = await self._try(route)
            if self._owed is not None:
                return await self._go_on(route, waiting)
            if failure is None or self._committed:
                return
            self._failures.append(failure)
            rule = FAILURE_RULES[failure.kind]
            if self._repaired:
                waiting.appendleft(route)
                continue
            if not rule.goes_on and not (failure.reason == "content_policy" and carousel.content_fallback):
                break
            if rule.again and not waiting and not retried and len(self._attempts) == 1 and failure.reason != "timeout":
                retried = True
                self._cooled.clear()
                waiting.append(route)
                await self._relay.world.sleep(_RETRY_PAUSE_S * (0.5 + self._relay.world.random()))
        if self._shrink is not None and FAILURE_RULES[self._failures[-1].kind].goes_on:
            failure = await self._try(self._shrink[0])
            if self._owed is not None:
                return await self._go_on(self._shrink[0], waiting)
            if failure is None or self._committed:
                return
            self._failures.append(failure)
        failures = sorted(self._failures, key=lambda failure: failure.reason == "content_policy")       # what was said of the request itself counts
        raise self._in_clients_words(answer_for(failures or [self._misfit_failure(route, why) for route, why in self._passed_over], self._attempts))

    async def _go_on(self, broken: Route, waiting: Iterable[Route]) -> None:
        """A stream that broke off inside its text is gone on with by a route that can, unseen but for a comment; else the client gets its error event."""
        carousel, failure, n_before = self._config.carousel, self._owed, len(self._attempts) - 1
        assert failure is not None
        for route in (*sorted(waiting, key=lambda route: route.model.id != broken.model.id), broken):
            how = way_on(route.provider, route.model, carousel.resume)
            out = failure.reason == "timeout" if route is broken else not self._cooled.isdisjoint(route.keys)
            if not how or out or self._n_asked >= carousel.max_attempts or misfit(route, self._needs) or self._has_filled_up(route):
                continue
            found = self._take_up()
            if found is None:
                break
            self._seam, self._owed = Seam(*found, how), None
            self._spend()
            if await self._try(route) is None:
                clear(self._relay.state, route)
                self._log.info("resume.done req=%s route=%s after_chars=%d", self._job.id, route.id, len(found[1]))
                return
            failure = self._owed or failure
        if self._seam is not None:
            self._writer = self._seam.writer
        self._refuse(answer_for([failure], self._attempts[n_before:]))

    def _take_up(self) -> tuple[Any, str] | None:
        """What FORMATS says of the client's stream so far; None where it has no exact continuation."""
        with contextlib.suppress(UpstreamFailure, GatewayError, ValueError):        # a request that only its own format understands, events that no reader does
            found = self._client.take_up(b"".join(self._sent), self._asked()) if self._client.take_up is not None and self._sent and not self._carrier.calling else None
            return found if found is not None and can_go_on(self._needs.hub(), found[1]) else None
        return None

    def _spend(self) -> None:
        """What the attempt that broke off has used is counted besides what comes."""
        used, spent = self._usage, self._spent or Usage(estimated=True)
        if used is not None or self._n_content_bytes:
            n_input, n_output = (used.input, used.output) if used is not None else (len(self._job.raw) // _BYTES_PER_TOKEN, 0)
            self._spent = replace(spent, input=spent.input + n_input, output=spent.output + max(n_output, self._n_content_bytes // _BYTES_PER_TOKEN),
                                  cached=spent.cached + (used.cached if used is not None else 0), cache_write=spent.cache_write + (used.cache_write if used is not None else 0))
        self._usage, self._n_content_bytes = None, 0

    def _note_sent(self, out: bytes) -> None:
        """Keep what goes to the client, as long as it is little."""
        self._n_sent += len(out)
        if self._sent is not None:
            self._sent.append(out)
            if self._n_sent > _RESUME_BYTES:
                self._sent = None

    def _willing(self, routes: Sequence[Route]) -> Sequence[Route]:
        """The routes of a plan that the client wants tried."""
        wish = self._job.wish
        if wish is None or wish.allow_fallbacks or wish.order or not routes:
            return routes
        return [route for route in routes if route.provider is routes[0].provider]

    def _misfit_failure(self, route: Route, why: str) -> UpstreamFailure:
        """What a route that was passed over would have failed by."""
        name = f"{route.provider.name}/{route.model.id}"
        if why == "too_small":
            tokens = self._needs.n_tokens(route.model.id)
            return UpstreamFailure("fit", "context_overflow", overflow_message("chat", tokens, self._needs.window(route)), 400, "fit")
        if why == "no_vision":
            able = next((f"{provider.name}/{other.id}" for provider in self._config.active for other in provider.models if other.vision), "")
            return unsupported(f"{name} reads no images" + (f"; {able} does" if able else ""))
        return unsupported(f"{name} calls no tools" if why == "no_tools" else f"{name} does not take every field of the request")

    def _in_clients_words(self, error: GatewayError) -> GatewayError:
        """A request too long is told in the words by which its client begins to compact."""
        if error.code == "context_length_exceeded" and self._job.client == "messages" and not _COMPACTS.search(error.message):
            window = told_window(error.message)
            tokens = overflow_numbers(error.message)[0] if window else None         # what other numbers mean nobody knows
            error.message = overflow_message("messages", tokens or self._needs.n_tokens("*"), window, self._job.body.get("max_tokens"))
        return error

    def _read_facts(self) -> Facts:
        """How large the request is, cheaply, and which conversation it belongs to."""
        job, body = self._job, self._job.body
        n_input = len(job.raw) // _BYTES_PER_TOKEN
        if len(job.raw) > _LONG_BYTES and b"base64" in job.raw:
            n_input = self._needs.n_tokens("*") or n_input
        asked = body.get("max_completion_tokens") or body.get("max_tokens") or body.get("max_output_tokens")
        usual = round(self._relay.usual_output)
        session, sticks = find_session(body, job.session, job.key_id, self._config.carousel.affinity)
        return Facts(n_input, min(asked, usual) if type(asked) is int and asked > 0 else usual, session, sticks)

    async def _plan(self) -> Plan:
        """The plan; when nothing is free now but something soon, after a wait in line. Raises GatewayError when there is nothing to wait for."""
        lines, name = self._relay.lines, self._choice.turn_name
        if name not in lines:
            found = self._look_for_routes()
            if found.routes:
                return found
        line, turn = lines.setdefault(name, deque()), asyncio.Event()
        alarm = Alarm(turn.set)
        line.append(turn)
        began_at = self._relay.world.clock()
        try:
            while True:
                at = self._give_up_at
                if line[0] is turn or self._relay.world.clock() >= at:
                    found = self._look_for_routes()
                    if found.routes:
                        return found
                    at = min(at, found.free_at or at)
                turn.clear()
                alarm.set(max(at - self._relay.world.clock(), 0.01))
                await turn.wait()
        finally:
            self._waited_s += self._relay.world.clock() - began_at
            alarm.stop()
            line.remove(turn)
            if line:
                line[0].set()
            else:
                del lines[name]

    def _look_for_routes(self) -> Plan:
        """The plan as things are; without routes when waiting helps. Raises GatewayError when it does not."""
        relay, carousel = self._relay, self._config.carousel
        now = relay.world.clock()
        found = plan(self._catalogue, self._choice, relay.state, now, strategy=carousel.strategy, fallback=carousel.fallback if self._may_fall_back() else "none",
                     facts=self._facts, give_up_at=self._give_up_at)
        self._plan_seen = found
        if found.routes or (found.free_at is not None and now < found.free_at <= self._give_up_at):
            return found
        if not found.skipped:
            raise no_route("No provider takes part: " + ("; ".join(f"{provider.name}: {provider.why_out}" for provider in self._config.providers[:8] if provider.why_out)
                                                        or "none has a usable key") + ".")
        if all(is_withdrawn(relay.state, route, now) for route, _ in found.skipped):
            raise withdrawn((f"{route.provider.name}/{route.model.id}", relay.state.cooling[route.keys[SCOPES["model"]]].detail) for route, _ in found.skipped)
        why = "; ".join(f"{route.provider.name}/{route.model.id}: {reason}" for route, reason in found.skipped[:6])
        if found.free_at is None:
            raise bad_request(f"The request is larger than what any route grants at once ({why}).", code="context_length_exceeded")
        raise no_route(f"Every route is waiting for its limit to reset ({why}).", status=429, retry_after_s=max(found.free_at - now, 0.0))

    async def _replan(self, waiting: deque[Route]) -> bool:
        """Whether there are routes again, in `waiting`: where a limit ended the last attempt and its provider named a time that can be waited for."""
        if self._committed or not self._failures or not any(failure.kind == "rate" and failure.proven for failure in self._failures):
            return False
        try:
            found = await self._plan()
        except GatewayError:
            return False                # what the attempts have shown tells more
        self._cooled.clear()
        state, now = self._relay.state, self._relay.world.clock()
        waiting.extend(route for route in self._willing(found.routes) if hindrance(state, route, now) is None)     # last resorts have had their turn
        return bool(waiting)

    def _has_filled_up(self, route: Route) -> bool:
        """Has this route no room any more, since the plan was made?"""
        if not self._attempts:
            return False
        shortage = find_shortage(self._relay.state.ledger, route, self._facts.n_input, self._facts.n_output, self._relay.world.clock())
        return shortage is not None and not shortage.soft

    def _may_fall_back(self) -> bool:
        """Whether routes beyond those that were named may serve."""
        wish = self._job.wish
        return self._job.may_fall_back and (wish is None or not wish.models and wish.allow_fallbacks)

    async def _try(self, route: Route) -> UpstreamFailure | None:
        """One attempt: None when it served, else how it failed. After commit the client has been told by then."""
        relay, state = self._relay, self._relay.state
        attempt = Attempt(route, relay.world.clock())
        self._attempts.append(attempt)
        begin_attempt(state, self._choice, route)
        self._hold = reserve(state.ledger, route, self._facts.n_input, self._facts.n_output, attempt.started_at)
        answer: Answer | None = None
        body, self._repaired = b"", False
        try:
            body = self._request_body(route)
            attempt.changed = self._dropped
            origin, message = relay.message(*self._address(route), body, self._wire.path)
            self._sent_at = relay.world.clock()
            self._n_asked += 1
            answer = await relay.transport.request(origin, message, route.provider.timeouts)
            attempt.status = answer.status
            feed(state.ledger, route, answer.headers, relay.world.clock(), self._hold)
            if answer.status != 200:
                raise await self._read_failure(answer, route)
            await (self._relay_stream if self._job.stream else self._relay_whole)(answer, attempt)
            answer.release()
        except UpstreamFailure as failure:
            if answer is not None:
                answer.abort()
            self._note(attempt, failure)
            self._discard(attempt)
            if self._seam is None:
                self._learn(route, failure, body)
            return failure
        except BaseException:
            if answer is not None:
                answer.abort()
            end_probe(state, route)
            self._settle_hold()
            attempt.ms = self._ms_since(attempt.started_at)
            attempt.reason = "" if self._outcome == "ok" else "client_closed"
            raise
        self._settle_hold()
        attempt.ms = self._ms_since(attempt.started_at)
        self._outcome, self._status = "ok", 200
        return None

    def _discard(self, attempt: Attempt) -> None:
        """Before commit a failed attempt leaves nothing to the next one but what its provider has counted."""
        if not self._committed:
            if self._usage is not None and not self._usage.estimated and (self._usage.input or self._usage.output):
                self._discarded.append((attempt, self._usage))
            self._usage, self._n_content_bytes = None, 0

    def _settle_hold(self, failure: UpstreamFailure | None = None) -> None:
        """Count what the attempt really used; nothing where it never arrived or was refused for its limits."""
        relay, hold = self._relay, self._hold
        assert hold is not None
        now, usage = relay.world.clock(), self._usage
        if failure is not None and (failure.kind == "rate" or failure.reason == "request_over_tpm" or failure.phase == "connect"):
            release(relay.state.ledger, hold, now)
        elif usage is not None and (failure is None or self._committed):
            settle(relay.state.ledger, hold, usage.input, usage.output, now)
            relay.usual_output += (min(usage.output, 100_000) - relay.usual_output) * 0.05
        else:
            settle(relay.state.ledger, hold, 0 if failure is not None and failure.status >= 400 else hold.n_input, self._n_content_bytes // _BYTES_PER_TOKEN, now)
        relay.wake()

    def _address(self, route: Route) -> tuple[Route, Job]:
        """What the head of a request is made from: some providers go on with an answer at another address, and none as if it were the same request."""
        if self._seam is None:
            return route, self._job
        elsewhere = route.provider.preset.continue_url if self._seam.how != "told" else ""
        return replace(route, provider=replace(route.provider, base_url=elsewhere)) if elsewhere else route, replace(self._job, idempotency_key="")

    def _continuation_body(self, route: Route, seam: Seam) -> bytes:
        """The body that asks a route for the rest of an answer."""
        hub = recall(self._needs.hub(), self._relay.memo)
        self._passing, self._wire, self._names = False, FORMATS[route.provider.format], name_map(hub, self._profile)
        made, dropped = continuation_request(hub, seam, self._profile, self._edits(route))
        self._dropped = (*dropped, f"goes on after {len(seam.text)} characters")
        return dump_json(made)

    def _request_body(self, route: Route) -> bytes:
        """The body for one route, in the client's own bytes where they may pass. Raises UpstreamFailure("fit") when the target cannot serve it."""
        job, provider = self._job, route.provider
        self._profile = target_profile(provider.preset.name, route.model, provider.format)
        if self._seam is not None:
            return self._continuation_body(route, self._seam)
        self._passing = may_pass(job.client, job.raw, job.body, self._profile, provider.preset) and not (self._spoke and job.client == "responses")
        self._wire = self._client if self._passing else FORMATS[provider.format]
        edits = self._edits(route)
        if self._passing and job.client == "chat":
            body, self._dropped = chat_pass_request(job.raw, job.body, route.model.id, provider.preset, edits)
        elif self._passing:
            rejects = {"completions": provider.preset.rejects, "embeddings": ()}.get(job.client, self._profile.reject)
            body, self._dropped = pass_request(job.raw, job.body, route.model.id, rejects, edits)
        else:
            hub = recall(self._needs.hub(), self._relay.memo)
            self._names = name_map(hub, self._profile)
            made, self._dropped = translate_request(hub, self._profile, edits)
            body = dump_json(made)
        return body

    def _edits(self, route: Route) -> Edits:
        """What configuration, earlier refusals and the client's own wish change in requests to a route."""
        provider, wish, state = route.provider, self._job.wish, self._relay.state
        repairs = repairs_of(state, route, self._relay.world.utc()) if state.repairs else ()
        if self._shrink is not None and self._shrink[0] is route:
            repairs += self._shrink[1],
        elif state.windows and (room := self._needs.room(route)) is not None:
            repairs += shorten(room)
        rules = tuple(rule for rule in provider.rules if fnmatch.fnmatchcase(route.model.id, rule.models)) if self._wire.path in _RULED_PATHS else ()
        if wish is not None and provider.preset.name == "openrouter":
            others = models_for_openrouter(self._relay.catalogue, wish)
            told = {**({"provider": wish_for_openrouter(wish, provider.name)} if wish.provider is not None else {}), **({"models": others} if others else {})}
            rules += (PayloadRule("*", {}, told, ()),) if told else ()
        return Edits(rules, repairs)

    def _learn(self, route: Route, failure: UpstreamFailure, sent: bytes) -> None:
        """Take from a refusal what it teaches of the model: how to ask it again, how much it holds."""
        relay, key = self._relay, route.keys[2]
        if failure.reason == "context_overflow":
            shorter = find_shrink(failure, json.loads(sent)) if sent else None
            window = learn_window(relay.state, route, failure, relay.world.utc(), shared=shorter is not None)
            if window is not None:
                relay.keep("window", key, window)
            self._needs.note_overflow(self._needs.window(route))
            self._shrink = (route, shorter) if shorter is not None and self._shrink is None else self._shrink
        elif failure.kind == "parameter" and sent:
            before = relay.state.repairs.get(key)
            cure = learn_repair(relay.state, route, failure, json.loads(sent), relay.world.utc())
            self._repaired = cure is not None
            if relay.state.repairs.get(key) is not before:
                relay.keep("repairs", key, [repair_row(repair) for repair in relay.state.repairs[key]])
                self._log.warning("repair.%s req=%s route=%s field=%s how=%s to=%s", "learned" if cure else "useless", self._job.id, route.id,
                                  log_text(cure.field if cure else failure.param or "-"), cure.how if cure else "-", cure.to if cure else "-")

    def _asked(self) -> Asked:
        """What writers are told."""
        return Asked(self._needs.hub(), self._job.id, int(self._relay.world.utc()), self._names)

    def _source(self) -> Source:
        """What readers are told."""
        return Source(self._profile, f"{self._job.id}-{len(self._attempts)}", self._client.call_prefix, self._names)

    def _n_prompt_tokens(self) -> int:
        """The estimate for this attempt's model; what it learns from is the plain one."""
        self._n_estimated = estimate_tokens(self._needs.hub(), self._profile.model)
        return round(self._n_estimated * self._relay.calibration.ratio(self._profile.model))

    async def _read_failure(self, answer: Answer, route: Route) -> UpstreamFailure:
        """What an answer other than 200 means."""
        body = await answer.read_start(_ERROR_BODY_BYTES, idle_s=_ERROR_BODY_S)
        answer.release()
        self._refusal = body.decode("utf-8", "replace")
        return classify(route.provider.preset.name, route.provider.preset.bucket, answer.status, dict(answer.headers), body, utc=self._relay.world.utc())

    def _note(self, attempt: Attempt, failure: UpstreamFailure) -> None:
        """Write a failed attempt down and cool what it proves to be out."""
        relay, route = self._relay, attempt.route
        self._settle_hold(failure)
        learn_refusal(relay.state.ledger, route, failure, self._refusal or failure.detail, relay.world.clock(), self._hold)
        self._refusal = ""
        failure.detail = redact(failure.detail, self._config.secrets)
        if failure.reason == "model_gone" and (other := still_listed(route)):
            failure.detail = f"{failure.detail} Nearest that {route.provider.name} still lists: {other}.".strip()
        attempt.reason, attempt.detail = failure.reason, failure.detail
        attempt.status = failure.status or attempt.status
        attempt.ms = self._ms_since(attempt.started_at)
        lacks_endpoint = self._client.write_request is None and failure.status in (404, 405, 501)     # says nothing of what the route is for
        cooldown = None if lacks_endpoint else cool(relay.state, route, failure, relay.world.clock(), jitter=relay.world.random())
        if cooldown is not None:
            self._cooled.add(cooldown.key)
            relay.has_news = relay.has_news or (cooldown.proven and cooldown.until_at - relay.world.clock() > _WORTH_SAVING_S)
        self._log.warning("attempt.failed req=%s route=%s status=%s reason=%s detail=%s cools=%s", self._job.id, route.id, attempt.status or "-", failure.reason,
                          log_text(failure.detail), f"{cooldown.key} {cooldown.until_at - relay.world.clock():.0f}s" if cooldown else "-")

    async def _relay_whole(self, answer: Answer, attempt: Attempt) -> None:
        """A body that is not streamed: read whole, judged, then sent on as it came or in the client's format."""
        route = attempt.route
        body = await self._read_whole(answer, route)
        if body.lstrip()[:5] in (b"data:", b"event", b": kee") and self._wire.reader is not None:
            sent = self._translate_whole(read_events(body, self._wire.reader(self._source())), route)
        else:
            parsed = self._parse_answer(body, route)
            why, self._usage = self._wire.judge_answer(parsed)
            if why:
                raise self._bad_answer(route, why, "")
            if self._passing:
                sent = {**parsed, "model": self._job.model} if self._config.carousel.echo_model and self._job.model else None
            else:
                sent = self._translate_whole(self._wire.read_answer(parsed, self._source()), route)
        self._n_content_bytes = len(body)
        self._commit(route)
        self._respond(200, [("content-type", "application/json"), *self._headers(answer, attempt)], body if sent is None else dump_json(sent))

    async def _read_whole(self, answer: Answer, route: Route) -> bytes:
        timeouts = route.provider.timeouts
        return await answer.read_all(idle_s=timeouts.idle_s, within_s=max(timeouts.total_s - (self._relay.world.clock() - self._sent_at), 0.0))

    def _parse_answer(self, body: bytes, route: Route) -> Json:
        """A whole answer as JSON. Raises UpstreamFailure for what is not, and for an error inside a 200."""
        try:
            parsed = json.loads(body)
        except (ValueError, RecursionError):
            raise self._bad_answer(route, "not_json", error_text(body)[0]) from None
        error = self._wire.find_error(parsed)
        if error is not None:
            raise self._in_answer(route, error)
        return parsed

    def _translate_whole(self, deltas: list[Json], route: Route) -> Json:
        """A whole answer in the client's format. Raises UpstreamFailure when its deltas end in an error."""
        if deltas and deltas[-1]["delta"] == "error":
            last = deltas[-1]
            raise self._in_answer(route, {"error": {"message": last["message"], "type": last["type"], "code": last["code"]}, "status_code": last["status"]})
        made, self._usage, whole = translate_answer(deltas, self._asked(), self._job.client, self._n_prompt_tokens)
        remember(self._relay.memo, fold_deltas(whole))
        return made

    def _make_carrier(self) -> Any:
        """What a stream goes through: a passage in its own bytes, or a translation."""
        live = self._config.carousel.tool_stream == "live"
        if self._seam is not None:
            source = self._source()._replace(profile=replace(self._profile, think_open=False))
            route = self._attempts[-1].route
            return Translation(self._wire.reader(source), SeamWriter(self._seam, f"resumed by {route.provider.name}/{route.model.id}"), n_prompt_tokens=self._n_prompt_tokens(), live=live)
        if self._spoke and self._job.client == "responses":
            self._passing = False           # keep-alives have begun the answer, under an id and numbers of our own
        if not self._passing:
            self._writer = self._writer or self._client.writer(self._asked())
            return Translation(self._wire.reader(self._source()), self._writer, n_prompt_tokens=self._n_prompt_tokens(), live=live)
        passage = self._client.passage(wants_usage=self._client.wants_usage(self._job.body), n_prompt_tokens=len(self._job.raw) // _BYTES_PER_TOKEN,
                                       echo_model=self._job.model if self._config.carousel.echo_model else None)
        return passage if live or not self._job.body.get("tools") else HeldPassage(passage)

    async def _relay_stream(self, answer: Answer, attempt: Attempt) -> None:
        """Pump a stream: hold until content, then pass on what each read completes. One loop kept whole: it runs once per read."""
        sink, keeper, timeouts, keep_alive_s = self._sink, self._keeper, attempt.route.provider.timeouts, self._config.carousel.limits.keep_alive_s
        assert keeper is not None
        if answer.header("content-type").startswith("application/json"):
            return await self._relay_unstreamed(answer, attempt)
        self._carrier = carrier = self._make_carrier()
        carrier.frames.max_bytes = self._config.carousel.limits.event_bytes
        held, n_signs, ends_at = b"", 0, self._sent_at + timeouts.stream_total_s
        while not (carrier.done or carrier.error or carrier.broken):
            failure: UpstreamFailure | None = None
            try:
                chunk = await answer.read()
            except UpstreamFailure as caught:
                chunk, failure = b"", caught
            out = carrier.feed(chunk) if chunk else carrier.close()
            if carrier.n_signs != n_signs:
                n_signs = carrier.n_signs
                answer.watch("idle", min(timeouts.idle_s if carrier.finish is None else _AFTER_FINISH_S, max(ends_at - self._relay.world.clock(), 0.0)))
            if not self._committed and carrier.content and not carrier.error and not carrier.broken:
                out, held = held + out, b""
                self._start_stream(answer, attempt)
            if not self._committed:
                held += out
            elif out:
                sink.write(out)
                if self._sent is not None:
                    self._note_sent(out)
                keeper.set(keep_alive_s)
                await sink.flush()
            self._usage, self._n_content_bytes = carrier.usage, carrier.n_content_bytes
            if failure is not None and not carrier.done:
                self._break_off(failure, attempt)
        await self._end_stream(carrier, answer, attempt)

    def _start_stream(self, answer: Answer, attempt: Attempt) -> None:
        """Commit, and send the head if no keep-alive has."""
        self._commit(attempt.route)
        if not self._sink.head_sent:
            self._sink.start(200, [*EVENT_STREAM_HEADERS, *self._headers(answer, attempt)])

    async def _relay_unstreamed(self, answer: Answer, attempt: Attempt) -> None:
        """A whole answer where a stream was asked for: told as a stream of one."""
        route = attempt.route
        parsed = self._parse_answer(await self._read_whole(answer, route), route)
        why, self._usage = self._wire.judge_answer(parsed)
        if why:
            raise self._bad_answer(route, why, "")
        self._passing = False
        carrier = self._make_carrier()
        out = carrier.take_answer(self._wire.read_answer(parsed, self._source()))
        if carrier.error is not None or not carrier.done:
            raise self._in_answer(route, carrier.error) if carrier.error is not None else self._bad_answer(route, "empty_answer", "")
        self._usage, self._n_content_bytes = carrier.usage, carrier.n_content_bytes
        if not self._committed:
            self._start_stream(answer, attempt)
        self._sink.write(out)
        self._sink.finish()

    async def _end_stream(self, carrier: Any, answer: Answer, attempt: Attempt) -> None:
        """Finish a stream that ended rightly, or raise what was wrong with it."""
        if carrier.error is not None:
            self._break_off(self._in_answer(attempt.route, carrier.error), attempt)
        if carrier.broken or not self._committed:
            self._break_off(self._bad_answer(attempt.route, carrier.broken or "empty_answer", ""), attempt)
        if not self._passing and any(delta["delta"] == "call" for delta in carrier.kept):
            remember(self._relay.memo, fold_deltas(carrier.kept))
        self._sink.finish()
        self._outcome, self._status = "ok", 200         # whole, even if the client leaves before the provider's connection has ended too
        if self._keeper is not None:
            self._keeper.rest()
        answer.watch("idle", _AFTER_END_S)
        await answer.read_start(_ERROR_BODY_BYTES, idle_s=_AFTER_END_S)

    def _break_off(self, failure: UpstreamFailure, attempt: Attempt) -> None:
        """Raise `failure`; when content has gone out already, tell the client first, or owe it to it where another route may have the rest."""
        if self._committed:
            failure.detail = redact(failure.detail, self._config.secrets)
            attempt.reason, attempt.detail = failure.reason, failure.detail
            attempt.ms = self._ms_since(attempt.started_at)
            if self._sent is not None and FAILURE_RULES[failure.kind].goes_on:
                self._owed = failure
            else:
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
        relay, self._committed = self._relay, True
        clear(relay.state, route)
        note_served(relay.state, route, self._facts, (relay.world.clock() - self._sent_at) * 1000.0, relay.world.clock())
        self._first_ms = self._ms_since(self._job.received_at)

    def _headers(self, answer: Answer, attempt: Attempt) -> Headers:
        """The headers that tell what was decided, and the provider's that clients may see."""
        overhead_ms = (self._sent_at - self._job.received_at) * 1000.0 if len(self._attempts) == 1 else (attempt.started_at - self._job.received_at) * 1000.0
        headers = [("x-aicarousel-request-id", self._job.id), ("x-aicarousel-provider", attempt.route.provider.name),
                   ("x-aicarousel-model", header_value(attempt.route.model.id)), ("x-aicarousel-attempts", str(len(self._attempts))),
                   ("x-aicarousel-overhead-ms", f"{overhead_ms:.1f}")]
        if len(secret := attempt.route.credential.secret) >= _SECRET_MIN:
            headers.append(("x-aicarousel-key", header_value(secret[-4:])))
        if self._plan_seen is not None and self._plan_seen.session:
            headers.append(("x-aicarousel-session", self._plan_seen.session))
        if self._usage is not None and self._usage.cached:
            headers.append(("x-aicarousel-cache", f"{self._usage.cached}/{self._usage.input}"))
        if self._dropped:
            headers.append(("x-aicarousel-dropped", header_value(",".join(self._dropped))))
        if self._usage is None and not self._job.stream:
            headers.append(("x-aicarousel-estimated", "1"))
        relayed = _is_relayed if self._job.hold is None else _RELAYED_HEADERS.__contains__      # limits of the key are told under the same names
        return headers + [pair for pair in answer.headers if relayed(pair[0])]

    def _refuse(self, error: GatewayError) -> None:
        """Tell the client that it failed: by status while nothing went out, else by an event, and a proper end of the body."""
        error.redact(self._config.secrets)
        self._outcome, self._status, self._told = "error", self._client.status(error), error.message
        if self._sink.head_sent and self._job.stream:
            self._sink.write(self._error_event(error))
            self._sink.finish()
            return
        self._respond(self._status, [*error_headers(error), ("x-aicarousel-request-id", self._job.id), ("x-aicarousel-attempts", str(len(self._attempts)))],
                      dump_json(self._client.envelope(error)))

    def _respond(self, status: int, headers: Headers, body: bytes) -> None:
        """A whole answer; behind blanks its status and headers come too late."""
        if self._keeper is not None:
            self._keeper.rest()
        if self._sink.head_sent:
            self._sink.write(body)
            self._sink.finish()
        else:
            self._sink.respond(status, headers, body)

    def _error_event(self, error: GatewayError) -> bytes:
        """The event that ends a broken stream in the client's format."""
        if self._job.client != "responses":
            return write_event(self._client.envelope(error), "error" if self._job.client == "messages" else "")
        if self._committed and self._passing:
            return self._carrier.failed(error)
        self._writer = self._writer or self._client.writer(self._asked())
        return self._writer.error(error)

    def _keep_alive(self) -> None:
        """Nothing has gone out for a while: say that we are still here."""
        if not self._sink.head_sent:
            kind = EVENT_STREAM_HEADERS if self._job.stream else [("content-type", "application/json")]
            self._sink.start(200, [*kind, ("x-aicarousel-request-id", self._job.id)])
        sign = self._sign_of_life()
        self._sink.write(sign)
        if self._sent is not None:
            self._note_sent(sign)
        if self._keeper is not None:
            self._keeper.set(self._config.carousel.limits.keep_alive_s)

    def _sign_of_life(self) -> bytes:
        """A keep-alive in the client's format: by what the answer goes through once it has begun, else by the request's own writer; a blank before JSON."""
        if not self._job.stream:
            return b" "
        if self._seam is not None:
            return self._seam.writer.keep_alive()
        if self._committed and self._carrier is not None:
            return self._carrier.keep_alive()
        if self._job.client not in ("messages", "responses"):
            return _KEEP_ALIVE_COMMENT
        if self._job.client == "responses" and self._passing and self._carrier is not None:
            return _KEEP_ALIVE_COMMENT
        self._writer = self._writer or self._client.writer(self._asked())
        self._spoke = True
        return self._writer.keep_alive()

    def _settle(self) -> None:
        """One usage row and one log line, for every request that reached a plan."""
        if self._usage is None:
            served = self._committed and (self._spent is None or self._n_content_bytes > 0)
            self._usage = Usage(len(self._job.raw) // _BYTES_PER_TOKEN if served else 0, self._n_content_bytes // _BYTES_PER_TOKEN if served else 0, estimated=served)
        elif self._outcome != "ok" and self._wire is FORMATS["messages"] and self._carrier is not None and self._carrier.finish is None:
            # Messages tells of one token at its start, and of the others when they have all come.
            n_output = self._n_content_bytes // _BYTES_PER_TOKEN
            if n_output > self._usage.output:
                self._usage = replace(self._usage, output=n_output, estimated=True)
        if self._spent is not None:
            self._usage = Usage(*(getattr(self._usage, name) + getattr(self._spent, name) for name in ("input", "output", "cached", "cache_write", "reasoning")), estimated=True)
        if self._outcome == "ok" and not self._usage.estimated:
            self._relay.calibration.learn(self._profile.model, self._n_estimated, self._usage.input)
        self._relay.settle(Settled(self._job, self._attempts, self._outcome, self._status, self._usage, self._first_ms, self._ms_since(self._job.received_at),
                                    self._passed_over, self._plan_seen, self._facts, round(self._waited_s * 1000), self._told, self._discarded))

    def _ms_since(self, at: float) -> int:
        return round((self._relay.world.clock() - at) * 1000)


def error_headers(error: GatewayError) -> Headers:
    """Content type and, where the error says when to come back, Retry-After in whole seconds."""
    again = [("retry-after", str(max(1, -int(-error.retry_after_s // 1))))] if error.retry_after_s is not None else []
    return [("content-type", "application/json"), *again]


def log_text(text: str) -> str:
    """`text` as it may stand in a log line: one line, no control characters, not endless."""
    return printable(text[:300]) or "-"


##############################################################################
# 21. Pages                                                 pure | uses 1-4, 7
##############################################################################
# What is read by people and by tools rather than by models: the front page, the list of models.

FRONT_PAGE = """AICarousel {version}: one address for many LLM APIs.

  Chat Completions    POST /v1/chat/completions
  Responses           POST /v1/responses
  Messages            POST /v1/messages
  models              GET  /v1/models
  health              GET  /health

Point an OpenAI client at this address with /v1 behind it, an Anthropic client at the address itself, use a gateway key
(python aicarousel.py key create NAME) and the model name aicarousel.  README.md tells the rest.
"""

#: When the list of models was made up; clients want some number.
_CREATED_S = 1_790_000_000


Offers = Callable[[Provider], tuple[Model, ...]]


def list_models(config: Config, offers: Offers) -> list[Json]:
    """Every name a client may use: aicarousel, the aliases, and each provider/model that takes part, then what else it offers. Limits where they are known."""
    smallest = min((model.context for provider in config.active for model in provider.models[:1] if model.context), default=None)
    rows = [_model_row("aicarousel", "aicarousel", Model("aicarousel", context=smallest))]
    rows += [_model_row(alias, "aicarousel", Model(alias)) for alias in config.carousel.aliases if "*" not in alias]
    for provider in config.active:
        listed = {model.id for model in provider.models}
        rows += [_model_row(f"{provider.name}/{model.id}", provider.name, model) for model in (*provider.models, *(model for model in offers(provider) if model.id not in listed))
                 if any(may_use(credential, model.id) for credential in provider.credentials)]
    return rows


def _model_row(name: str, owner: str, model: Model) -> Json:
    limits = {"context_length": model.context, "max_input_tokens": model.context, "max_completion_tokens": model.max_output, "max_tokens": model.max_output}
    return {"id": name, "object": "model", "created": _CREATED_S, "owned_by": owner, **{label: value for label, value in limits.items() if value}}


def find_model(config: Config, offers: Offers, name: str) -> Json | None:
    """One row of the list; bare ids, aliases of models and provider names are known too."""
    for row in list_models(config, offers):
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


# Answers to why.

_EXPLAINED_MAX = 5          # routes listed of each kind: with the heads of the lists fifteen lines
_OUTCOMES: Mapping[str, str] = MappingProxyType({"ok": "served", "error": "failed", "client_closed": "the client left", "": "as things are now"})
_MISFITS: Mapping[str, str] = MappingProxyType({
    "too_small": "its context is too small", "no_vision": "reads no images", "no_tools": "calls no tools", "no_parameter": "does not take every field"})


def explain_lines(decision: Decision) -> list[str]:
    """Why a request went where it went, in at most 15 lines: routes tried, left out and free, each with the reason and the time."""
    plan, facts = decision.plan, decision.facts
    streamed = " streamed" if decision.streamed else ""
    lines = [f"{decision.id}: {decision.client}{streamed}, model {decision.model or 'not named'}, about {facts.n_input} tokens: {_OUTCOMES.get(decision.outcome, decision.outcome)}"
             + (f" with {decision.status} in {decision.total_ms} ms" + (f", first words after {decision.first_ms} ms" if decision.first_ms else "") if decision.outcome else "")]
    tried = [f"  {attempt.route.id}: {'served' if not attempt.reason else attempt.reason}" + (f" ({attempt.status})" if attempt.status else "") + f", {attempt.ms} ms"
             + (f", {attempt.detail[:120]}" if attempt.reason and attempt.detail else "") + (f"; changed: {', '.join(attempt.changed)[:120]}" if attempt.changed else "")
             for attempt in decision.attempts]
    misfits = {route.id: why for route, why in decision.passed_over}
    out = [f"  {route.id}: {_MISFITS.get(why, why)}" for route, why in decision.passed_over]
    out += [f"  {route.id}: {why}" for route, why in (plan.skipped if plan else ()) if route.id not in misfits]
    asked = {attempt.route.id for attempt in decision.attempts} | misfits.keys() | {route.id for route, _ in (plan.skipped if plan else ())}
    free = [route.id for route in (plan.routes if plan else ()) if route.id not in asked]
    notes = [f"waited {decision.waited_ms} ms in line"] if decision.waited_ms else []
    notes += [f"conversation: {plan.session}"] if plan and plan.session else []
    notes += [f"its key may use {', '.join(decision.models)[:120]} alone"] if decision.models else []
    notes += [_tell_wish(decision.wish)] if decision.wish is not None else []
    notes += [decision.told[:300] or "no route to this model"] if not (tried or out or free) else []
    lines += [_list_head("tried, in order", tried), *tried[:_EXPLAINED_MAX]] if tried else []
    lines += [_list_head("left out", out), *out[:_EXPLAINED_MAX]] if out else []
    lines += [f"{'free and not needed' if decision.attempts else 'in this order'}: " + ", ".join(free[:8]) + (f" and {len(free) - 8} more" if len(free) > 8 else "")] if free else []
    return [*lines, *(["; ".join(notes)] if notes else [])]


def _tell_wish(wish: Wish) -> str:
    """What a request said of its own routing."""
    names = [f"{label} {', '.join(value)}" for label, value in (("models", wish.models), ("order", wish.order), ("only", wish.only), ("without", wish.ignore)) if value]
    names += [label for label, is_so in (("no fallbacks", not wish.allow_fallbacks), ("all parameters", wish.require_parameters)) if is_so]
    return f"it wished for {'; '.join(names)[:200] or 'nothing that we know'}"


def _list_head(title: str, rows: Sequence[str]) -> str:
    return f"{title} ({_EXPLAINED_MAX} of {len(rows)}):" if len(rows) > _EXPLAINED_MAX else f"{title}:"


def span_text(seconds: float | None) -> str:
    """A span for people: 45 s, 12 min, 3.5 h, 2 d; - for none."""
    if seconds is None:
        return "-"
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"


def quota_lines(rows: Sequence[Json]) -> list[str]:
    """What describe_ledger found as a table."""
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:,.0f}"
    table = [["bucket", "what", "used", "limit", "left", "resets in", "burn/min", "empty in", "known from"]]
    table += [[row["bucket"], f"{row['measure']}/{row['per']}", number(row["used"]), number(row["limit"]), number(row["left"]), span_text(row["resets_in_s"]), f"{row['burn_per_minute']:,.1f}",
               span_text(row["empty_in_s"]), row["origin"]] for row in rows]
    return align_columns(table, 2) if rows else ["nothing was used and no limit is known"]


def route_lines(rows: Sequence[Json]) -> list[str]:
    """What describe_routes found as a table."""
    table = [["route", "state", "why", "for"]]
    table += [[row["route"], row["state"], row["why"] or "-", span_text(row["left_s"]) + ("" if row["proven"] is not False else " (a guess)")] for row in rows]
    return align_columns(table, 3) if rows else ["no provider takes part"]


# Statistics.

_STATS_COLUMNS: tuple[tuple[str, str], ...] = (
    ("requests", "requests"), ("failed", "failed"), ("left", "client_closed"), ("input", "input"), ("cached", "cached"), ("written", "cache_write"), ("output", "output"))
_SHADES = {True: " \u2591\u2592\u2593\u2588", False: " .+*#"}
_WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


def align_columns(rows: Sequence[Sequence[str]], n_left: int) -> list[str]:
    """Lines of a table, the first `n_left` columns to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) if column < n_left else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows]


def cost_text(figures: Json) -> str:
    """A cost in dollars, with how many requests have no known price."""
    unpriced = figures["unpriced_requests"]
    if figures["cost_usd"] is None:
        return "unknown"
    return f"${figures['cost_usd']:.4f}" + (f" + {unpriced} unknown" if unpriced else "")


def stats_lines(stats: Json) -> list[str]:
    """What read_stats found as a table: a line per group, the total last."""
    names = stats["by"]
    rows = [[*names, *(title for title, _ in _STATS_COLUMNS), "cost"]] if names else [["", *(title for title, _ in _STATS_COLUMNS), "cost"]]
    for figures in stats["groups"]:
        rows.append([*(str(figures[name]) or "-" for name in names), *(str(figures[name]) for _, name in _STATS_COLUMNS), cost_text(figures)])
    total = stats["total"]
    rows.append(["total", *("" for _ in names[1:]), *(str(total[name]) for _, name in _STATS_COLUMNS), cost_text(total)])
    lines = [f"since {stats['since']}", *align_columns(rows, max(1, len(names)))]
    if total["estimated_requests"]:
        lines.append(f"estimated: {total['estimated_input']} tokens in and {total['estimated_output']} out, of {total['estimated_requests']} requests whose providers did not count them")
    return lines


def heatmap_lines(hours: Sequence[Sequence[int]], *, blocks: bool) -> list[str]:
    """Requests by weekday and hour as a text map; the darker the more, read from a line below it. blocks: other than ASCII."""
    shades, most = _SHADES[blocks], max(max(row) for row in hours)
    steps = len(shades) - 1
    lines = ["     " + " ".join(f"{hour:02}" for hour in range(24))]
    for weekday, row in zip(_WEEKDAYS, hours):
        lines.append(f"{weekday}  " + " ".join(2 * shades[-(-count * steps // most) if most else 0] for count in row) + f"  {sum(row)}")
    # The least count of each shade: shade n begins above (n - 1)/steps of the most.
    legend = [f"{2 * shades[step]} {(step - 1) * most // steps + 1}+" for step in range(1, steps + 1) if step == 1 or (step - 1) * most // steps > (step - 2) * most // steps]
    return [*lines, "requests per hour, local time: " + "   ".join(legend) if most else "no requests"]


##############################################################################
# 22. Endpoints                                             I/O | uses 1-21
##############################################################################
# Gateway is the running whole; it is the Application a Server serves.  `admit` looks at the head alone: host, origin,
# path, method, content type, key, in this order.  A handler parses, calls, renders, and stays short.
# One more endpoint: a handler and a row in _ENDPOINTS; README and tests/test_docs.py name it.  A row whose path begins with
# /admin/ says `admin=True`: then only this machine gets in, and only with an admin key, whatever else is open.

MISSING_KEY = "Missing API key. Include it as 'Authorization: Bearer sk-xxx' or 'x-api-key: sk-xxx'"
INVALID_KEY = "Invalid API key"
EXPIRED_KEY = "This API key has expired"
_DECISIONS_MAX = 200        #: requests that can still be explained
_SAVE_S = 30.0              #: how often what routing has counted is saved; what a provider has proven is saved at once
_KEY_HEADERS = ("x-api-key", "api-key", "x-goog-api-key")
_JSON: Headers = [("content-type", "application/json")]
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,255})(?::([0-9]{1,5}))?")
_MIRROR = "/api/anthropic/"
_RAW_BYTES_PER_TOKEN = 4        #: where nothing but its bytes is known of a prompt
_USUAL_ANSWER = 4096            #: tokens reserved for an answer whose request sets no limit; few are longer
_FLUSH_S = 2.0
STATS_DAYS = 30
STATS_BY = "provider,model"
_ADDRESS = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}|\[[0-9A-Fa-f:.]+\]")


class _Endpoint(NamedTuple):
    """What answers a path: method -> handler name, and whether a gateway key is needed, or an admin key."""
    handlers: Mapping[str, str]
    needs_key: bool = True
    admin: bool = False


_ENDPOINTS: Mapping[str, _Endpoint] = {
    "/v1/chat/completions": _Endpoint({"POST": "chat_completions"}),
    "/v1/models": _Endpoint({"GET": "models", "HEAD": "models"}, False),
    "/v1/models/": _Endpoint({"GET": "model", "HEAD": "model"}, False),         # with an id behind it
    "/v1/messages": _Endpoint({"POST": "messages"}),
    "/v1/messages/count_tokens": _Endpoint({"POST": "count_tokens"}),
    "/v1/responses": _Endpoint({"POST": "responses", "GET": "refuse_websocket"}),
    "/v1/completions": _Endpoint({"POST": "completions"}),
    "/v1/embeddings": _Endpoint({"POST": "embeddings"}),
    "/chat": _Endpoint({"POST": "plain_chat"}),
    "/health": _Endpoint({"GET": "health", "HEAD": "health"}, False),
    "/admin/stats": _Endpoint({"GET": "admin_stats"}, admin=True),
    "/admin/explain": _Endpoint({"GET": "admin_explain", "POST": "admin_foresee"}, admin=True),
    "/admin/quota": _Endpoint({"GET": "admin_quota"}, admin=True),
    "/admin/routes": _Endpoint({"GET": "admin_routes"}, admin=True),
    "/admin/routes/reset": _Endpoint({"POST": "admin_reset"}, admin=True),
    "/admin/models/refresh": _Endpoint({"POST": "admin_refresh"}, admin=True),
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
        self.relay = Relay(world, self.transport, self._settle, self._keep, f"aicarousel/{__version__}")
        restore_learned(self.relay.state, ((row.kind, row.key, row.value) for row in usage.learned(world.utc())))
        self.relay.configure(config)
        self.transport.bounds = self.bounds
        self.lists = ModelLists(self.relay)
        self.lists.look()
        self.accounts = Accounts(usage.path, world.clock, world.utc)
        self._saved_at = world.clock()
        self.decisions: deque[Decision] = deque(maxlen=_DECISIONS_MAX)      #: of the requests that ended last
        self.n_requests = 0
        self._id_prefix = secrets.token_hex(4)      # with the count behind it: unique over restarts, and no system call per request
        self._good_hosts: set[str] = set()
        self._began_at = world.clock()
        self._log = logging.getLogger("aicarousel.relay")

    def reconfigure(self, config: Config) -> None:
        """Go on with another configuration; address, port and TLS stay what they were."""
        self._good_hosts.clear()
        self.keys.accept(config.settings.api_keys)
        forget_changed(self.relay.state, self.config.providers, config.providers)
        self.config = replace(config, settings=replace(config.settings, host=self.config.settings.host, port=self.config.settings.port))
        self.relay.configure(self.config)
        self.transport.bounds = self.bounds
        self.lists.look()

    def close(self) -> None:
        """Save what routing knows and let go of connections; the usage writer and the key ring belong to the caller."""
        self.usage.save_routing(self.relay.rows())
        self.lists.close()
        self.transport.close()

    @property
    def bounds(self) -> Bounds:
        """The limits the server keeps to."""
        return self.config.carousel.limits

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
        if endpoint.admin:
            request.key = self._authenticate_admin(request)
        elif endpoint.needs_key:
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
        """The row of a path, with or without /v1; what Anthropic's API has stands under /api/anthropic too."""
        if path.startswith(_MIRROR):
            path = path[len(_MIRROR) - 1:]
            if not path.startswith(("/v1/messages", "/v1/models")):
                return None
        if path.startswith(("/v1/models/", "/models/")) and not path.endswith("/"):
            return _ENDPOINTS["/v1/models/"]
        return None if path.endswith("/models/") else _ENDPOINTS.get(path) or _ENDPOINTS.get("/v1" + path)

    def _authenticate(self, request: Request) -> GatewayKey | None:
        """The gateway key of a request, None where none is asked for. Raises GatewayError 401."""
        return None if self.config.settings.no_auth else self._find_key(request)

    def _authenticate_admin(self, request: Request) -> GatewayKey:
        """The admin key of a request of this machine; --no-auth opens nothing here. Raises GatewayError 401 and 403."""
        key = self._find_key(request)
        if not key.admin:
            raise forbidden("This takes an admin key: python aicarousel.py key create --admin")
        if not is_loopback(request.peer):
            raise forbidden("Administration is for callers on this machine.")
        return key

    def _find_key(self, request: Request) -> GatewayKey:
        """The gateway key that a request shows. Raises GatewayError 401."""
        shown = request.headers.get("authorization", "")
        shown = shown[7:].strip() if shown[:7].lower() == "bearer " else ""
        shown = shown or next((request.headers[name].strip() for name in _KEY_HEADERS if request.headers.get(name)), "")
        if not shown:
            raise unauthorized(MISSING_KEY)
        key = self.keys.find(shown)
        if key is None:
            raise unauthorized(INVALID_KEY)
        if key.expires_at is not None and self.world.utc() >= key.expires_at:
            raise unauthorized(EXPIRED_KEY)
        return key

    def explain(self, request: Request | None, error: GatewayError) -> tuple[Headers, bytes]:
        """An error in the envelope of the path it was asked at."""
        error.redact(self.config.secrets)
        speaks_messages = request is not None and ("/messages" in request.path or request.path.startswith(_MIRROR))
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
        self.lists.look()
        rows = list_models(self.config, self.lists.of)
        if _wants_anthropic(request):
            data = [as_messages_model(row) for row in rows]
            body: Json = {"data": data, "has_more": False, "first_id": data[0]["id"], "last_id": data[-1]["id"]}
        else:
            body = {"object": "list", "data": rows}
        exchange.respond(200, _JSON, dump_json(body))

    async def model(self, request: Request, exchange: Exchange) -> None:
        """GET /v1/models/{id}; ids may hold slashes."""
        from urllib.parse import unquote
        name = unquote(request.path.partition("/models/")[2])
        row = find_model(self.config, self.lists.of, name)
        if row is None:
            error = unknown_model(f"The model {name[:200]!r} is not known here.")
            body = messages_error(error) if _wants_anthropic(request) else chat_error(error)
            return exchange.respond(404, _JSON, dump_json(body))
        exchange.respond(200, _JSON, dump_json(as_messages_model(row) if _wants_anthropic(request) else row))

    async def chat_completions(self, request: Request, exchange: Exchange) -> None:
        """POST /v1/chat/completions."""
        await self._serve_format(request, exchange, "chat")

    async def messages(self, request: Request, exchange: Exchange) -> None:
        """POST /v1/messages."""
        await self._serve_format(request, exchange, "messages")

    async def responses(self, request: Request, exchange: Exchange) -> None:
        """POST /v1/responses."""
        await self._serve_format(request, exchange, "responses")

    async def completions(self, request: Request, exchange: Exchange) -> None:
        """POST /v1/completions."""
        await self._serve_format(request, exchange, "completions")

    async def embeddings(self, request: Request, exchange: Exchange) -> None:
        """POST /v1/embeddings."""
        await self._serve_format(request, exchange, "embeddings")

    async def refuse_websocket(self, request: Request, exchange: Exchange) -> None:
        """GET /v1/responses: clients that try a websocket go on with HTTP at once after a 426."""
        error = GatewayError("Responses are served over HTTP: set supports_websockets = false for this provider in ~/.codex/config.toml.", 426, "upgrade_required", "invalid_request_error")
        exchange.respond(426, [("content-type", "application/json"), ("upgrade", "HTTP/1.1")], dump_json(chat_error(error)))

    async def count_tokens(self, request: Request, exchange: Exchange) -> None:
        """POST /v1/messages/count_tokens: asked of a provider that counts them itself, else estimated over system, messages, tools and images."""
        raw = request.body.removeprefix(b"\xef\xbb\xbf")
        try:
            parsed = parse_body(raw)
            body, wish = take_wish(check_messages_request(parsed))
            exchange.cancel_when_gone()
            n_tokens, estimated = await self._count(request, self._job(request, raw if body is parsed else dump_json(body), body, "messages", wish))
        except GatewayError as error:
            headers, answer = self.explain(request, error)
            return exchange.respond(messages_status(error), headers, answer)
        exchange.respond(200, [*_JSON, *([("x-aicarousel-estimated", "1")] if estimated else [])], dump_json({"input_tokens": n_tokens}))

    async def _count(self, request: Request, job: Job) -> tuple[int, bool]:
        """Relay.count_tokens under the limits of the key: it asks a provider, and uses no tokens. Raises GatewayError."""
        if request.key is None or request.key.limits is None:
            return await self.relay.count_tokens(job)
        hold = self._hold(request, 0, 0.0)
        try:
            return await self.relay.count_tokens(job)
        finally:
            self.accounts.settle(hold, 0)

    async def admin_stats(self, request: Request, exchange: Exchange) -> None:
        """GET /admin/stats: what the command `stats` prints as JSON, up to the request that ended last."""
        from urllib.parse import parse_qsl
        try:
            asked = dict(parse_qsl(request.query, keep_blank_values=True))
            unknown = set(asked) - {"days", "by", "provider", "model", "heatmap"}
            if unknown:
                raise ConfigError("query", ", ".join(sorted(unknown))[:100], "days, by, provider, model, heatmap")
            since_utc_s, by = stats_since(asked.get("days", str(STATS_DAYS)), self.world.utc()), stats_groups(asked.get("by", STATS_BY))
            stats = await asyncio.get_running_loop().run_in_executor(None, lambda: self._read_stats(
                since_utc_s, by, asked.get("provider"), asked.get("model"), asked.get("heatmap", "") not in ("", "0", "false")))
        except ConfigError as error:
            file_trouble = error.where == str(self.usage.path)
            headers, body = self.explain(request, no_route("The usage table cannot be read.") if file_trouble else bad_request(str(error)))
            return exchange.respond(503 if file_trouble else 400, headers, body)
        exchange.respond(200, _JSON, dump_json(stats))

    async def admin_explain(self, request: Request, exchange: Exchange) -> None:
        """GET /admin/explain?id=...: why a request of late went where it went; without an id the one that ended last."""
        from urllib.parse import parse_qs
        wanted = parse_qs(request.query).get("id", [""])[0]
        decision = next((one for one in reversed(self.decisions) if not wanted or one.id == wanted), None)
        if decision is None:
            error = GatewayError(f"No such request among the last {_DECISIONS_MAX} since the start.", 404, "request_not_found", "invalid_request_error", "id")
            headers, body = self.explain(request, error)
            return exchange.respond(404, headers, body)
        exchange.respond(200, _JSON, dump_json({"id": decision.id, "lines": [printable(redact(line, self.config.secrets)) for line in explain_lines(decision)]}))

    async def admin_foresee(self, request: Request, exchange: Exchange) -> None:
        """POST /admin/explain?format=chat: where this body would go, asking nobody."""
        from urllib.parse import parse_qs
        name = parse_qs(request.query).get("format", ["chat"])[0]
        try:
            if name not in FORMAT_NAMES:
                raise bad_request(f"format must be one of {', '.join(FORMAT_NAMES)}.", param="format")
            raw = request.body.removeprefix(b"\xef\xbb\xbf")
            parsed = FORMATS[name].check(parse_body(raw))           # type: ignore[index]
            body, wish = take_wish(parsed)
            decision = self.relay.foresee(self._job(request, raw, body, name, wish), exchange)      # type: ignore[arg-type]
        except GatewayError as error:
            headers, answer = self.explain(request, error)
            return exchange.respond(error.status, headers, answer)
        exchange.respond(200, _JSON, dump_json({"id": decision.id, "lines": [printable(redact(line, self.config.secrets)) for line in explain_lines(decision)]}))

    async def admin_quota(self, request: Request, exchange: Exchange) -> None:
        """GET /admin/quota: what is used and left of every limit."""
        exchange.respond(200, _JSON, dump_json({"windows": describe_ledger(self.relay.state.ledger, self.world.clock())}))

    async def admin_routes(self, request: Request, exchange: Exchange) -> None:
        """GET /admin/routes: every route and what keeps it out."""
        exchange.respond(200, _JSON, dump_json({"routes": describe_routes(self.config.active, self.relay.state, self.world.clock())}))

    async def admin_reset(self, request: Request, exchange: Exchange) -> None:
        """POST /admin/routes/reset {"route": glob}: use routes again, whatever was held against them."""
        try:
            body = parse_body(request.body)
            if not isinstance(body, dict) or not isinstance(body.get("route"), str):
                raise bad_request('Send {"route": "a route, a provider, or a glob over them"}.', param="route")
        except GatewayError as error:
            headers, answer = self.explain(request, error)
            return exchange.respond(error.status, headers, answer)
        found = reset_routes(self.config.active, self.relay.state, body["route"])
        self.relay.wake()
        self.usage.save_routing(self.relay.rows())
        exchange.respond(200, _JSON, dump_json({"reset": found}))

    async def admin_refresh(self, request: Request, exchange: Exchange) -> None:
        """POST /admin/models/refresh: ask providers with "*" among their models for their lists now."""
        exchange.respond(200, _JSON, dump_json({"providers": await self.lists.refresh()}))

    def _read_stats(self, since_utc_s: float, by: Sequence[str], provider: str | None, model: str | None, heatmap: bool) -> Json:
        """Statistics with all that was queued before; in a thread of its own, as it waits for the disk."""
        self.usage.flush(_FLUSH_S)
        return read_stats(self.usage.path, since_utc_s=since_utc_s, by=by, provider=provider, model=model, heatmap=heatmap)

    async def _serve_format(self, request: Request, exchange: Exchange, client: ClientFormat) -> None:
        """A request in one of the three formats: parsed, checked, handed to the relay."""
        raw = request.body.removeprefix(b"\xef\xbb\xbf")
        try:
            parsed = parse_body(raw)
            body, wish = take_wish(FORMATS[client].check(parsed))
        except GatewayError as error:
            headers, answer = self.explain(request, error)
            return exchange.respond(FORMATS[client].status(error), headers, answer)
        await self._relay(request, exchange, exchange, raw if body is parsed else dump_json(body), body, client, wish)

    async def plain_chat(self, request: Request, exchange: Exchange) -> None:
        """POST /chat: a bare list of messages in, text out."""
        try:
            body = check_chat_request({"messages": parse_body(request.body), "stream": True})
        except GatewayError as error:
            return exchange.respond(error.status, [("content-type", "text/plain; charset=utf-8")], error.message.encode())
        await self._relay(request, exchange, PlainTextSink(exchange), dump_json(body), body)

    async def _relay(self, request: Request, exchange: Exchange, sink: Sink, raw: bytes, body: Json, client: ClientFormat = "chat", wish: Wish | None = None) -> None:
        """Hand a checked request to the relay; when the client leaves, the work on it is cancelled."""
        job, key = self._job(request, raw, body, client, wish), request.key
        if key is not None and key.limits is not None:
            try:
                job.hold = self._reserve(request, job)
            except GatewayError as error:
                self._log.info("refused req=%s key=%s model=%s status=%d why=%s", job.id, log_text(job.key_name), log_text(job.model or "-"), error.status, log_text(error.message))
                headers, answer = self.explain(request, error)
                status = FORMATS[client].status(error)
                self.decisions.append(Decision(job.id, self.world.utc(), client, (job.model or "")[:200], job.stream, NO_FACTS, None, (), (), 0, "error", status,
                                               told=error.message, wish=wish, models=job.models))
                return sink.respond(status, [*headers, ("x-aicarousel-request-id", job.id)], answer)
        exchange.cancel_when_gone()
        await self.relay.run(job, sink)

    def _reserve(self, request: Request, job: Job) -> KeyHold:
        """Hold what a job of a key with limits may use at most, as far as can be told. Raises GatewayError 400, 403, 404 and 429."""
        limits: KeyLimits = request.key.limits
        if limits.models:
            self.relay.choose(job)              # refused here, what may not be asked for counts against nothing
        has_budget = limits.usd_per_day is not None or limits.usd_per_month is not None
        if limits.tpm is None and not has_budget:
            return self._hold(request, 0, 0.0)
        n_in, n_out = expected_tokens(job)
        usd = 0.0
        if has_budget:
            # Priced as written to a cache, the dearest class where it has a price, on the dearest route that may come to serve.
            tokens = TokenClasses(0, 0, n_in, n_out)
            costs = [cost for route in self.relay.within_reach(job) if (cost := cost_usd(tokens, price_for(route.provider, route.model))) is not None]
            if not costs:
                raise forbidden("This key has a budget, and no model it could be served by has a known price; models.json can state one.")
            usd = max(costs)
        return self._hold(request, n_in + n_out, usd)

    def _hold(self, request: Request, n_tokens: int, usd: float) -> KeyHold:
        """Reserve, and tell what is left, refused or not. Raises GatewayError 429."""
        try:
            return self.accounts.admit(request.key, n_tokens, usd)
        finally:
            request.answer_headers += self.accounts.headers(request.key)

    def _keep(self, kind: str, key: str, value: Any) -> None:
        """Have something that was learned written down."""
        self.usage.learn(LearnedRow(kind, key, json.dumps(value), self.world.utc() + LEARNED_S))

    def _job(self, request: Request, raw: bytes, body: Json, client: ClientFormat, wish: Wish | None) -> Job:
        """A checked request as the relay needs it."""
        self.n_requests += 1
        key = request.key
        name, told = body.get("model"), request.headers
        return Job(
            id=f"{self._id_prefix}{self.n_requests:08x}", raw=raw, body=body, model=plain_model(name) if client == "messages" and name else name,
            stream=body.get("stream") is True and client != "embeddings", received_at=request.received_at, key_id=key.id if key else 0, key_name=key.name if key else "",
            may_fall_back=told.get("x-aicarousel-no-fallback") not in ("1", "true"), idempotency_key=header_value(told.get("idempotency-key", ""))[:200], client=client,
            betas=header_value(told.get("anthropic-beta", ""))[:2000], version=header_value(told.get("anthropic-version", ""))[:40],
            blanks=told.get("x-aicarousel-keep-alive") in ("1", "true"), models=key.limits.models if key and key.limits else (), wish=wish,
            session=told.get("x-session-id", "")[:512])

    def _settle(self, settled: Settled) -> None:
        """One log line and one usage row per request, one more per discarded attempt; and what its key had reserved."""
        job, route, usage = settled.job, settled.route, settled.usage
        self._log.info("req=%s key=%s model=%s route=%s attempts=%d status=%d outcome=%s in=%d out=%d first_ms=%d total_ms=%d", job.id, log_text(job.key_name),
                       log_text(job.model or "-"), log_text(route.id) if route else "-", len(settled.attempts), settled.status, settled.outcome, usage.input, usage.output,
                       settled.first_ms, settled.total_ms)
        utc = self.world.utc()
        rows = [self._row(job, route, usage, utc, job.id, settled.status, settled.outcome, settled.first_ms or None, settled.total_ms, len(settled.attempts))]
        if settled.discarded:
            rows += [self._row(job, attempt.route, counted, utc, f"{job.id}-{number}", attempt.status, "discarded", None, attempt.ms, 0)
                     for number, (attempt, counted) in enumerate(settled.discarded, 1)]
        for row in rows:
            self.usage.put(row)
        unknown_usd = 0.0
        if job.hold is not None:
            self.accounts.settle(job.hold, sum(row.input + row.cached + row.cache_write + row.output for row in rows))
            # What nobody has a price for costs a key with a budget what was reserved for it, as long as this process remembers.
            unknown_usd = job.hold.usd if any(row.cost_usd is None for row in rows) else 0.0
        if job.key_id and (spent_usd := sum([row.cost_usd or 0.0 for row in rows]) + unknown_usd):
            self.accounts.charge(job.key_id, spent_usd)
        self.decisions.append(Decision(job.id, utc, job.client, (job.model or "")[:200], job.stream, settled.facts, settled.plan, settled.attempts, settled.passed_over,
                                       settled.waited_ms, settled.outcome, settled.status, settled.first_ms, settled.total_ms, settled.told, job.wish, job.models))
        if self.relay.has_news or self.world.clock() - self._saved_at >= _SAVE_S:
            self.relay.has_news, self._saved_at = False, self.world.clock()
            self.usage.save_routing(self.relay.rows())

    def _row(self, job: Job, route: Route | None, usage: Usage, utc: float, request_id: str, status: int, outcome: str, first_ms: int | None, total_ms: int,
             n_attempts: int) -> UsageRow:
        """A row of the usage table, with its cost."""
        tokens, price = token_classes(usage), price_for(route.provider, route.model) if route else None
        return UsageRow(
            request_id=request_id, at_utc=f"{_second_text(int(utc))}.{int(utc % 1.0 * 1000.0):03d}+00:00", key_id=job.key_id, key_name=job.key_name,
            client_format=job.client, model=job.model or "", provider=route.provider.name if route else "", credential=route.credential.id if route else "",
            wire_model=route.model.id if route else "", route=route.id if route else "", input=tokens.input, output=tokens.output, cached=tokens.cached,
            cache_write=tokens.cache_write, reasoning=usage.reasoning, cost_usd=cost_usd(tokens, price), estimated=usage.estimated, status=status, outcome=outcome,
            first_ms=first_ms, total_ms=total_ms, attempts=n_attempts, streamed=job.stream, price=price_text(price))


@functools.lru_cache(2)
def _second_text(utc_s: int) -> str:
    """A second of the UTC clock in ISO 8601; the requests that end in it share it."""
    return datetime.fromtimestamp(utc_s, timezone.utc).isoformat()[:19]


def expected_tokens(job: Job) -> tuple[int, int]:
    """(prompt, answer): what a request is expected to use at most; an answer without a limit of its own is taken for _USUAL_ANSWER. Raises GatewayError 400."""
    if job.client == "embeddings":
        return len(job.raw) // _RAW_BYTES_PER_TOKEN, 0
    try:
        hub = FORMATS[job.client].read_request(job.body)
    except UpstreamFailure:                     # a body that has no other form than its own
        return len(job.raw) // _RAW_BYTES_PER_TOKEN, job.body.get("max_tokens") or _USUAL_ANSWER
    return estimate_tokens(hub, job.model or "aicarousel"), (hub.get("max_out") or _USUAL_ANSWER) * (job.body.get("n") or 1)


def stats_since(days: str, utc_s: float) -> float:
    """When the first of the last `days` local days began, today being the last. Raises ConfigError."""
    if not (days.isascii() and days.isdigit() and 1 <= int(days[:6]) <= 36_600 and len(days) <= 6):
        raise ConfigError("days", days[:40] or "nothing", "a number of days from 1 to 36600, today being one")
    return local_midnight(utc_s, days_ago=int(days) - 1)


def stats_groups(by: str) -> tuple[str, ...]:
    """The groups of a comma list. Raises ConfigError."""
    names = tuple(name.strip() for name in by.split(",") if name.strip())
    if len(set(names)) != len(names) or not set(names) <= set(GROUP_NAMES):
        raise ConfigError("by", by[:100], "a comma list of " + ", ".join(GROUP_NAMES) + ", each once")
    return names


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


def _wants_anthropic(request: Request) -> bool:
    """Whether a list of models is wanted in Anthropic's shape."""
    return "anthropic-version" in request.headers or request.path.startswith(_MIRROR)


def _check_content_type(request: Request) -> None:
    """Only JSON: what a page can send without asking first is not JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise bad_request("Send the body as JSON, with the header Content-Type: application/json.", status=415)


def parse_body(raw: bytes) -> Any:
    """A request body as JSON, halves of surrogate pairs replaced. Raises GatewayError 400 for what is not JSON, NaN and Infinity included."""
    try:
        value = _DECODER.decode(raw.decode("utf-8"))
        if raw.count(b"[") + raw.count(b"{") > _MAX_DEPTH and _is_deeper(value, _MAX_DEPTH):
            raise RecursionError
        return mend_text(value) if b"\\ud" in raw or b"\\uD" in raw else value
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
        self.bounds = Bounds()

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
# 23. Accounts                                              I/O | uses 1-5, 8, 14-16, 18, 20
##############################################################################
# The home folder and changes to its files; provider keys: recognised, checked, stored; logins and their tokens.
# What changes a file takes the folder's lock, edits text (section 4, Edits), loads the result and only then puts it in place, whole.
# A key goes to the provider it was recognised for and to nobody else.  Guarded by tests/test_accounts_cli.py.
# One more change to models.json: a function that hands change_models() what to do with tree and text, and a row in README.

_COMMAND_S = 10.0           #: how long the program of a cmd: reference may take
_SECRET_MAX_BYTES = 16 * 1024
_ASKED_TIMEOUTS = Timeouts(first_byte_s=15.0)
_LIST_MAX_BYTES = 4 * 1024 * 1024
_WIDTH = 80
_PATIENCE_S = 1.0           #: longer than this nobody waits without being told for what


def program_path() -> Path:
    """The file that is run: this module, or the bundle that it stands in."""
    module = Path(__file__).resolve()
    return module.parent if is_bundled() else module


def is_bundled() -> bool:
    """Whether this module stands in a bundle."""
    return Path(__file__).resolve().parent.is_file()


def own_command() -> list[str]:
    """How to run this program once more; a bundle needs nothing that is installed, and takes nothing."""
    return [sys.executable, *(("-I", "-S") if is_bundled() else ()), str(program_path())]


def read_beside(name: str) -> bytes | None:
    """A file that stands beside this module, in its folder or in its bundle; None where there is none."""
    with contextlib.suppress(OSError):
        return __loader__.get_data(str(Path(__file__).with_name(name)))       # type: ignore[name-defined]
    return None


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
    program = program_path().parent
    if named or (program / "models.json").is_file():
        folder = Path(named).expanduser().resolve() if named else program
        return Home(folder, folder / "data")
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    state = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return Home(config / "aicarousel", state / "aicarousel")


def _read_text(path: Path) -> str | None:
    """The text of a configuration file, None when there is none. Raises ConfigError when it cannot be read."""
    try:
        return path.read_bytes().decode()       # line ends as they are
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), getattr(error, "strerror", None) or "bytes that are not UTF-8", "a readable text file") from error


def routing_text(home: Home) -> str | None:
    """The text of models.json: the home's, else the bundle's, None where there is neither. Raises ConfigError."""
    text = _read_text(home.models_path)
    if text is None and is_bundled() and (bundled := read_beside("models.json")) is not None:
        return bundled.decode("utf-8")
    return text


def read_config(home: Home, flags: Mapping[str, Any]) -> Config:
    """The configuration of a home folder. Raises ConfigError."""
    return _load_home(home, routing_text(home), _read_text(home.env_path), flags)


def _load_home(home: Home, models_text: str | None, env_text: str | None, flags: Mapping[str, Any] = MappingProxyType({})) -> Config:
    """The configuration of a home folder if its two files held these texts. Raises ConfigError."""
    return load_config(models_text, models_path=str(home.models_path), environment=os.environ, dotenv=parse_dotenv(env_text or ""), flags=flags, read_secret=read_secret)


def read_secret(reference: str) -> str:
    """What a file:/path holds or what the program of cmd:words prints. Raises ConfigError, which repeats neither."""
    import shlex
    import subprocess
    kind, _, target = reference.partition(":")
    try:
        if kind == "file":
            with open(target, encoding="utf-8") as file:
                return file.read(_SECRET_MAX_BYTES).strip()
        return subprocess.run(shlex.split(target), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=_COMMAND_S, check=True).stdout.decode().strip()
    except OSError as error:
        found = error.strerror or type(error).__name__
    except subprocess.CalledProcessError as error:
        found = f"exit status {error.returncode}"
    except subprocess.TimeoutExpired:
        found = f"no end within {_COMMAND_S:g} s"
    except ValueError:
        found = "words with an open quote, or what is no UTF-8 text"
    raise ConfigError(redact(reference), found, "a key")


# Changes.

class Refused(Exception):
    """What cannot be done as things are, in one line: exit status 1."""


@contextlib.contextmanager
def _locked(home: Home) -> Iterator[None]:
    """The home folder, made if missing, for one change at a time."""
    try:
        home.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(home.folder, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(str(home.folder), error.strerror or "no folder", "a folder that can be written") from error
    try:
        with contextlib.suppress(ImportError):      # no such lock on this system
            import fcntl
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def replace_file(path: Path, text: str, mode: int | None = None) -> None:
    """Put `text` in place of a file, whole or not at all. mode: None for that of the old file, and 0600 for a new one. Raises ConfigError."""
    path = path.resolve()               # a link stays one
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(mode if mode is not None else path.stat().st_mode & 0o777 if path.exists() else 0o600)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ConfigError(str(path), error.strerror or type(error).__name__, "a file that can be replaced") from error


def change_models(home: Home, change: Callable[[str, Json], str]) -> Config:
    """Change models.json by `change(text, tree)`, which gives the new text; without a file it begins as what is in force.

    The new text is loaded before it is put in place; the configuration that it makes.  Raises ConfigError and Refused.
    """
    with _locked(home):
        text, before = _read_text(home.models_path), read_config(home, {})      # on what is broken nothing is built
        start = routing_text(home) or _models_text(before)
        new = change(start, json.loads(start.removeprefix("\ufeff")))
        config = _load_home(home, new, _read_text(home.env_path))
        if new != text:
            replace_file(home.models_path, new)
    return config


def _models_text(config: Config) -> str:
    """A models.json that says what is in force without one."""
    return json.dumps({provider.name: _entry_of(provider.default, [model.id for model in provider.models]) for provider in config.providers}, indent=2, ensure_ascii=False) + "\n"


def _entry_of(default: str, models: Sequence[str]) -> Json:
    return {"default": default, "enableFallback": True, "models": list(models)}


def find_provider(config: Config, name: str) -> Provider:
    """The provider of a name. Raises Refused."""
    for provider in config.providers:
        if provider.name == name:
            return provider
    raise Refused(_no_provider(name, [provider.name for provider in config.providers]))


def _no_provider(name: str, names: Iterable[str]) -> str:
    names = [known for known in names if known != "carousel"]
    close = nearest(name, names)
    return f"there is no provider {ascii(name)[1:-1][:80]}; " + (f"did you mean {close}?" if close else f"there are: {', '.join(names) or 'none'}")


def _entry_in(tree: Json, name: str) -> Json:
    """A provider's entry in models.json. Raises Refused."""
    if name not in tree or name == "carousel":
        raise Refused(_no_provider(name, tree))
    return tree[name]


def _model_ids(entry: Json) -> list[str]:
    return [model if isinstance(model, str) else model["id"] for model in entry["models"]]


def _model_index(name: str, entry: Json, model: str) -> int:
    """Where a model stands in its provider's list. Raises Refused."""
    ids = _model_ids(entry)
    if model not in ids:
        close = nearest(model, ids)
        raise Refused(f"{name} has no model {ascii(model)[1:-1][:120]}" + (f"; did you mean {close}?" if close else ""))
    return ids.index(model)


def _overruled(config: Config, path: str) -> str:
    """What to add where something goes before models.json, "" where nothing does."""
    origin = config.origins.get(path, "")
    return f"; but {origin} goes before models.json" if origin.startswith(("environment ", ".env ")) else ""


def add_provider(home: Home, name: str, entry: Json) -> str:
    """A new entry at the end of models.json; what to tell."""
    def change(text: str, tree: Json) -> str:
        if name in tree or name == "carousel":
            raise Refused(f"{name} is {'a reserved name' if name == 'carousel' else 'there already'}")
        return set_json(text, [name], entry)

    provider = find_provider(change_models(home, change), name)
    return f"{name} added, with {len(provider.models)} models" + (f"; it takes no part yet: {provider.why_out}" if provider.why_out else "")


def remove_provider(home: Home, name: str) -> str:
    """models.json without an entry; its keys stay in .env."""
    def change(text: str, tree: Json) -> str:
        _entry_in(tree, name)
        if not tree.keys() - {name, "carousel"}:
            raise Refused(f"{name} is the last provider; disable it, or add another first")
        return cut_json(text, [name])

    change_models(home, change)
    return f"{name} removed"


def switch_provider(home: Home, name: str, on: bool) -> str:
    """Switch a provider on or off."""
    def change(text: str, tree: Json) -> str:
        return text if _entry_in(tree, name).get("enabled", True) is on else set_json(text, [name, "enabled"], on)

    config = change_models(home, change)
    provider = find_provider(config, name)
    told = f"{name} is {'on' if on else 'off'} in models.json" + (_overruled(config, f"{name}.enabled") if provider.enabled is not on else "")
    return told + (f"; it takes no part yet: {provider.why_out}" if on and provider.enabled and provider.why_out else "")


def order_providers(home: Home, names: Sequence[str]) -> str:
    """Put all providers in this order, which is that of rotation."""
    def change(text: str, tree: Json) -> str:
        known = [name for name in tree if name != "carousel"]
        for name in names:
            _entry_in(tree, name)
            if names.count(name) > 1:
                raise Refused(f"{name} stands there {names.count(name)} times")
        if len(names) < len(known):
            raise Refused(f"{len(names)} of {len(known)} providers are named; missing: {', '.join(name for name in known if name not in names)}")
        at, turn = list(tree), iter(names)
        return order_json(text, [], [at.index(name if name == "carousel" else next(turn)) for name in at])

    config = change_models(home, change)
    told = f"order: {', '.join(names)}"
    return told if [provider.name for provider in config.providers] == list(names) else told + "; but PROVIDERS_PRIORITY goes before models.json"


def add_model(home: Home, name: str, model: str) -> str:
    """A model more at the end of a provider's list."""
    def change(text: str, tree: Json) -> str:
        if model in _model_ids(_entry_in(tree, name)):
            raise Refused(f"{name} has {model} already")
        return set_json(text, [name, "models", len(tree[name]["models"])], model)

    warnings = change_models(home, change).warnings
    return f"{name} has {model} now" + "".join(f"; {warning}" for warning in warnings if f" {model} is withdrawn" in warning)


def remove_model(home: Home, name: str, model: str) -> str:
    """A provider's list without a model that is not its default."""
    def change(text: str, tree: Json) -> str:
        index = _model_index(name, _entry_in(tree, name), model)
        if tree[name]["default"] == model:
            raise Refused(f"{model} is the default of {name}; choose another first: model default {name} MODEL")
        return cut_json(text, [name, "models", index])

    change_models(home, change)
    return f"{name} has {model} no more"


def choose_default(home: Home, name: str, model: str) -> str:
    """The model of a provider's list that is asked first."""
    def change(text: str, tree: Json) -> str:
        _model_index(name, _entry_in(tree, name), model)
        return set_json(text, [name, "default"], model)

    config = change_models(home, change)
    return f"{name} begins with {model}" + (_overruled(config, f"{name}.default") if find_provider(config, name).default != model else "")


def switch_fallback(home: Home, name: str, on: bool) -> str:
    """Whether the others of a provider's models are tried after its default."""
    def change(text: str, tree: Json) -> str:
        _entry_in(tree, name)
        return set_json(text, [name, "enableFallback"], on)

    change_models(home, change)
    return f"{name} {'goes on to its other models' if on else 'is asked for its default alone'}"


def move_model(home: Home, name: str, model: str, place: int) -> str:
    """Put a model at a place, counted from 1, of its provider's list."""
    def change(text: str, tree: Json) -> str:
        index, n_models = _model_index(name, _entry_in(tree, name), model), len(tree[name]["models"])
        if not 1 <= place <= n_models:
            raise Refused(f"{name} has places 1 to {n_models}, not {place}")
        order = [number for number in range(n_models) if number != index]
        return order_json(text, [name, "models"], [*order[:place - 1], index, *order[place - 1:]])

    config = change_models(home, change)
    return f"{name}: {', '.join(found.id for found in find_provider(config, name).models)}"


def set_alias(home: Home, name: str, targets: Sequence[str]) -> str:
    """A name for other names, in order."""
    config = change_models(home, lambda text, tree: set_json(text, ["carousel", "aliases", name], targets[0] if len(targets) == 1 else list(targets)))
    return f"{name} stands for {', '.join(config.carousel.aliases[name])}"


def remove_alias(home: Home, name: str) -> str:
    """An alias less."""
    def change(text: str, tree: Json) -> str:
        aliases = tree.get("carousel", {}).get("aliases", {})
        if name not in aliases:
            raise Refused(f"there is no alias {ascii(name)[1:-1][:80]}; there are: {', '.join(aliases) or 'none'}")
        return cut_json(text, ["carousel", "aliases", name])

    change_models(home, change)
    return f"{name} is no alias any more"


# Keys.

class KeyPlace(NamedTuple):
    """Where a key of a provider goes, and what both files hold then."""
    provider: Provider          #: with the key
    credential: Credential      #: the key
    settings: Settings
    variable: str               #: "" when it is there already
    models_text: str | None
    env_text: str


def place_key(home: Home, name: str, key: str) -> KeyPlace:
    """Where a key would go; nothing is written. Raises Refused and ConfigError."""
    if not re.fullmatch(r"[!-+\--~]+", key):
        raise Refused("that is no key: it has blanks, commas or other characters inside that keys do not have" if key else "no key came")
    models_text, env_text = _read_text(home.models_path), _read_text(home.env_path) or ""
    models_text = _with_entry(models_text, name)
    before = _load_home(home, models_text, env_text)
    provider = next((provider for provider in before.providers if provider.name == name), None)
    there = next((credential for credential in provider.credentials if credential.secret == key), None) if provider else None
    if provider is not None and there is not None:
        return KeyPlace(provider, there, before.settings, "", models_text, env_text)
    variable, listed = _free_variable(name, models_text, env_text)
    if models_text is not None and listed is not None:
        models_text = set_json(models_text, [name, "keys", listed], f"env:{variable}")
    env_text = set_dotenv(env_text, variable, key)
    after = _load_home(home, models_text, env_text)
    provider = find_provider(after, name)
    credential = next(credential for credential in provider.credentials if credential.secret == key)
    return KeyPlace(provider, credential, after.settings, variable, models_text, env_text)


def _with_entry(models_text: str | None, name: str) -> str | None:
    """models.json with an entry of this name, which a built-in provider gets from its preset. Raises Refused."""
    if models_text is not None and not whole_json(models_text.removeprefix("\ufeff")):
        return models_text              # what is broken is told when it is loaded
    tree = json.loads(models_text.removeprefix("\ufeff")) if models_text is not None else {}
    if not isinstance(tree, dict) or name in tree and name != "carousel":
        return models_text
    preset = PRESETS.get(name)
    if preset is None or preset.gone or not preset.default:
        raise Refused(f"{_no_provider(name, [*tree, *(known for known, row in PRESETS.items() if not row.gone)])[:300]}; one of your own: provider add NAME --url URL")
    return set_json(models_text, [name], _entry_of(preset.default, [model.id for model in preset.models])) if models_text is not None else None


def _free_variable(name: str, models_text: str | None, env_text: str) -> tuple[str, int | None]:
    """(a variable that is not set, where a reference to it must be added to the entry's keys: None for nowhere). Raises Refused."""
    entry = json.loads(models_text.removeprefix("\ufeff"))[name] if models_text is not None else {}
    preset, taken = PRESETS.get(entry.get("preset", name), CUSTOM_PRESET), {variable for variable, value in parse_dotenv(env_text).items() if value} | os.environ.keys()
    if preset is PRESETS.get(name) and not preset.key_variables:
        raise Refused(f"{name} needs no key")
    base = preset.key_variables[0] if preset is PRESETS.get(name) else variable_name(name, "API_KEY")
    if "keys" in entry:
        references = [key if isinstance(key, str) else key["key"] for key in entry["keys"]]
        unset = [reference[4:] for reference in references if reference.startswith("env:") and reference[4:] not in taken]
        if unset:
            return unset[0], None
        taken |= {reference[4:] for reference in references}
    free = [variable for variable in (base, *(f"{base}_{number}" for number in range(2, 51))) if variable not in taken]
    if not free:
        raise Refused(f"{name} has 50 keys already")
    return free[0], len(entry["keys"]) if "keys" in entry else None


def store_key(home: Home, name: str, key: str) -> KeyPlace:
    """Keep a key in .env; the place it has then. Raises Refused and ConfigError."""
    with _locked(home):
        place = place_key(home, name, key)
        if place.variable:
            replace_file(home.env_path, place.env_text, 0o600)
        if place.models_text is not None and place.models_text != _read_text(home.models_path):
            replace_file(home.models_path, place.models_text)
    return place


def forget_keys(home: Home, name: str) -> str:
    """Take the keys of a provider (groq), or one of them (groq/2), out of .env. Raises Refused and ConfigError."""
    only, name = name if "/" in name else "", name.partition("/")[0]
    with _locked(home):
        env_text = _read_text(home.env_path) or ""
        config = _load_home(home, _with_entry(_read_text(home.models_path), name), env_text)
        credentials = [credential for provider in config.providers if provider.name == name for credential in provider.credentials
                       if credential.secret and only in ("", credential.id)]
        elsewhere, n_removed = [], 0
        for credential in credentials:
            source, _, variable = config.origins[f"{name}.keys.{credential.id.partition('/')[2]}"].partition(" ")
            if source != ".env":
                elsewhere.append(f"{source} {variable}".strip())
                continue
            left = [key for key in parse_dotenv(env_text)[variable].split(",") if key.strip() != credential.secret]
            env_text = set_dotenv(env_text, variable, ",".join(left)) if any(map(str.strip, left)) else cut_dotenv(env_text, variable)
            n_removed += 1
        if n_removed:
            replace_file(home.env_path, env_text, 0o600)
    kept = f"not removed, as it stands elsewhere: {', '.join(dict.fromkeys(elsewhere))}" if elsewhere else ""
    if not n_removed:
        raise Refused(kept or f"{only or name} has no key in .env")
    return f"{n_removed} key{'s' if n_removed > 1 else ''} of {name} removed from .env" + (f"; {kept}" if kept else "")


# Asking providers.

class Verdict(NamedTuple):
    """What a provider says of a key."""
    state: Literal["good", "poor", "unsure", "bad"]     #: works; has no credit; could not be told; is not accepted
    words: str


async def ask_provider(transport: Transport, provider: Provider, credential: Credential, settings: Settings, method: str, path: str, body: bytes = b"") -> tuple[int, Headers, bytes]:
    """One small request outside of routing: status, headers and body of its answer. Raises UpstreamFailure."""
    origin, head = make_target(provider, credential, settings, f"aicarousel/{__version__}", method, path)
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    answer = await transport.request(origin, f"{head}Accept: application/json\r\n{length}\r\n".encode("latin-1") + body, _ASKED_TIMEOUTS)
    try:
        return answer.status, answer.headers, await answer.read_start(_LIST_MAX_BYTES, idle_s=_ASKED_TIMEOUTS.first_byte_s)
    finally:
        answer.release()


def _cheap_call(provider: Provider) -> tuple[Provider, str, str, bytes]:
    """(where, method, path, body) of the cheapest request that proves a key of this provider."""
    (method, path), preset = provider.preset.check, provider.preset
    foreign = split_url(provider.base_url)[1] != split_url(preset.base_url)[1]
    if path.startswith("https:") and not foreign:
        scheme, host, _, _ = split_url(path)
        return replace(provider, base_url=f"{scheme}://{host}"), method, path.partition(host)[2], b""
    if path != "/chat/completions" or provider.format != "chat":
        return provider, "GET", "/models" if path.startswith("https:") else path if method == "GET" else "/models", b""
    return provider, method, path, dump_json({"model": provider.default, "messages": [{"role": "user", "content": "Hi"}], provider.preset.max_field or "max_tokens": 1})


async def check_key(transport: Transport, provider: Provider, credential: Credential, settings: Settings) -> Verdict:
    """Whether a provider takes a key, by the cheapest call that it has for that."""
    if h11 is None:
        return Verdict("unsure", "the Python package h11 is missing, so it was not checked")
    if "{" in provider.base_url and not provider.preset.check[1].startswith("https:"):
        return Verdict("unsure", provider.why_out)
    try:
        where, method, path, body = _cheap_call(provider)
        status, headers, answer = await ask_provider(transport, where, credential, settings, method, path, body)
    except UpstreamFailure as failure:
        return Verdict("unsure", f"not checked: {printable(str(failure))}")
    if 200 <= status < 300:
        return Verdict("good", "works")
    failure = classify(provider.preset.name, provider.preset.bucket, status, dict(headers), answer, utc=time.time())
    words = printable(redact(f"{provider.preset.title if provider.preset is not CUSTOM_PRESET else provider.name} answers {status} {failure.detail}".strip(), [credential.secret]))[:300]
    if failure.kind == "credential":
        return Verdict("bad", words)
    if failure.kind == "payment" or status in (402, 412):
        return Verdict("poor", f"no credit: {words}")
    return Verdict("good", f"works, but is at its limit: {words}") if failure.kind == "rate" else Verdict("unsure", f"not told: {words}")


async def list_offers(transport: Transport, provider: Provider, credential: Credential, settings: Settings) -> list[str]:
    """The models that a provider lists. Raises UpstreamFailure."""
    status, headers, answer = await ask_provider(transport, provider, credential, settings, "GET", "/models")
    if status != 200:
        raise classify(provider.preset.name, provider.preset.bucket, status, dict(headers), answer, utc=time.time())
    found = read_models(answer)
    if not found:
        raise transport_failure("not_json", "body", "no list of models")
    return [model.id for model in found]


def run_asking(asking: Callable[[Transport], Awaitable[Any]], words: str) -> Any:
    """Run something that asks providers; after a second a terminal is told what is waited for."""
    async def run() -> Any:
        transport = Transport(real_world())
        try:
            task = asyncio.ensure_future(asking(transport))
            await asyncio.wait([task], timeout=_PATIENCE_S)
            if not task.done() and sys.stderr.isatty():
                print(f"{words} ...", file=sys.stderr, flush=True)
            return await task
        finally:
            transport.close()

    return asyncio.run(run())


def take_key(home: Home, text: str, name: str | None = None) -> tuple[str, str, KeyPlace]:
    """Check a pasted key with the provider it belongs to, and keep it unless it is refused there.

    name: whose it is, None to tell by the key.  (what to tell, state of the Verdict, its place).  Raises Refused and ConfigError.
    """
    key = clean_key(text)
    form = key_form(key)
    if form is not None and form.sure and (name is None or PRESETS.get(name, CUSTOM_PRESET) is not CUSTOM_PRESET):
        [owner] = form.providers
        if form.why_not:
            raise Refused(f"this key is of {PRESETS[owner].title}, but {form.why_not}")
        if name not in (None, owner):
            raise Refused(f"this key is of {PRESETS[owner].title}, not of {PRESETS[name].title}; it was shown to nobody")
    if name is None and (form is None or not form.sure):
        maybe = f"it may be of {' or '.join(form.providers)}" if form is not None else "nothing is known of keys like it"
        raise Refused(f"whose key is this? {maybe}; name the provider: login PROVIDER" if key else "no key came")
    place = place_key(home, name or owner, key)
    verdict = run_asking(lambda transport: check_key(transport, place.provider, place.credential, place.settings), f"asking {place.provider.name}")
    if verdict.state == "bad":
        raise Refused(f"not kept: {verdict.words}")
    place = store_key(home, place.provider.name, key)
    kept = f"kept as {place.variable} in {home.env_path}" if place.variable else "it was there already"
    out = f"; {place.provider.name} takes no part yet: {place.provider.why_out}" if place.provider.why_out else ""
    return f"{place.credential.id} {mask_key(key)} {verdict.words}; {kept}{out}", verdict.state, place


def try_keys(providers: Iterable[Provider], settings: Settings) -> list[Json]:
    """What providers say of each of their keys: rows of key, state, words."""
    chosen = [(provider, credential) for provider in providers for credential in provider.credentials]

    async def ask(transport: Transport) -> list[Verdict]:
        return await asyncio.gather(*(check_key(transport, provider, credential, settings) for provider, credential in chosen))

    found = run_asking(ask, f"asking {len(chosen)} providers") if chosen else []
    return [{"key": credential.id, "state": verdict.state, "words": verdict.words} for (_, credential), verdict in zip(chosen, found)]


def compare_offers(providers: Iterable[Provider], settings: Settings) -> list[Json]:
    """What providers list, beside what is configured: rows of provider, listed, new, gone, trouble."""
    chosen = [provider for provider in providers if provider.credentials]

    async def ask(transport: Transport) -> list[Any]:
        return await asyncio.gather(*(list_offers(transport, provider, provider.credentials[0], settings) for provider in chosen), return_exceptions=True)

    rows = []
    for provider, found in zip(chosen, run_asking(ask, f"asking {len(chosen)} providers") if chosen else []):
        if isinstance(found, BaseException) and not isinstance(found, UpstreamFailure):
            raise found
        known, listed = [model.id for model in provider.models], [] if isinstance(found, BaseException) else found
        rows.append({"provider": provider.name, "listed": listed, "new": [name for name in listed if name not in known], "gone": [name for name in known if listed and name not in listed],
                     "trouble": printable(str(found)) if isinstance(found, BaseException) else ""})
    return rows


def make_entry(home: Home, name: str, given: Json) -> Json:
    """The entry of a new provider: what is given, and else its preset's models or, of one's own, those that it lists. Raises Refused and ConfigError."""
    preset = PRESETS.get(given.get("preset", name), CUSTOM_PRESET)
    models = given.get("models") or [model.id for model in preset.models]
    if not models:
        asked = _load_home(home, json.dumps({name: {**_entry_of("?", ["?"]), **given, "default": "?", "models": ["?"]}}), _read_text(home.env_path))
        provider = asked.providers[0]
        if not provider.credentials:
            raise Refused(f"{name} cannot be asked for its models: {provider.why_out}; login comes first for a key, --no-key where none is needed, or name them: --models LIST")
        try:
            models = run_asking(lambda transport: list_offers(transport, provider, provider.credentials[0], asked.settings), f"asking {name}")
        except UpstreamFailure as failure:
            raise Refused(f"{name} does not list its models ({printable(str(failure))}); name them: --models LIST") from failure
    default = given.get("default") or (preset.default if preset.default in models else models[0])
    return {**_entry_of(default, models), **{field: value for field, value in given.items() if field not in ("models", "default")}}


# As they are shown.

def provider_rows(config: Config) -> list[Json]:
    """Every provider, without its secrets."""
    return [{"name": provider.name, "title": provider.preset.title, "state": "out" if provider.why_out else "active", "why": provider.why_out, "enabled": provider.enabled,
             "base_url": provider.base_url, "format": provider.format, "default": provider.default, "fallback": provider.enable_fallback,
             "models": [model.id for model in provider.models],
             "keys": [{"id": credential.id, "from": config.origins.get(f"{provider.name}.keys.{credential.id.partition('/')[2]}", credential.source)}
                      for credential in provider.credentials if credential.secret]}
            for provider in config.providers]


def provider_lines(rows: Sequence[Json]) -> list[str]:
    """Providers in their order, each with what keeps it out."""
    import textwrap
    lines = []
    for number, row in enumerate(rows, 1):
        lines.append(f"{number:>3}  {row['name']:<16} {row['state']:<7} {len(row['models'])} models, {len(row['keys'])} keys, default {row['default'] or 'none'}"[:_WIDTH])
        lines += [f"     {line}" for line in textwrap.wrap(row["why"], _WIDTH - 5)]
    return list(map(printable, lines)) or ["there are no providers: login, or provider add NAME"]


def model_rows(providers: Iterable[Provider]) -> list[Json]:
    """Every model of some providers, in order."""
    return [{"provider": provider.name, "place": place, "id": model.id, "alias": model.alias, "default": model.id == provider.default, "asked": model.id == provider.default or provider.enable_fallback,
             "context": model.context, "max_output": model.max_output} for provider in providers for place, model in enumerate(provider.models, 1)]


def model_lines(rows: Sequence[Json]) -> list[str]:
    """Models by provider; * marks the default, - those that are asked for only by name."""
    lines = []
    for row in rows:
        lines += [row["provider"]] if row["place"] == 1 else []
        window = f"{row['context'] // 1000}k" if row["context"] else ""
        lines.append(f"{row['place']:>3} {'*' if row['default'] else ' ' if row['asked'] else '-'} {row['id']:<52} {window:>6}" + (f"  = {row['alias']}" if row["alias"] else ""))
    return [printable(line.rstrip()) for line in lines] or ["there are no models"]


def offer_lines(rows: Sequence[Json], new: bool) -> list[str]:
    """What providers list; `new`: also the names that are not configured."""
    lines = []
    for row in rows:
        lines.append(f"{row['provider']:<16} " + (row["trouble"] or f"lists {len(row['listed'])} models" + (f"; no more: {', '.join(row['gone'])}" if row["gone"] else "")))
        lines += [f"  {name}" for name in row["new"]] if new else []
    return list(map(printable, lines))


##############################################################################
# 25. Bundle                                                I/O | uses 1-2, 23
##############################################################################
# The zero-install copy: one file with the module, what it needs and nothing else, that any Python from 3.11 on runs.  Its bytes are the same for the same
# sources, wherever it is made: sorted names, one date, nothing compressed, nothing compiled.  Everything is read through the import system, so that a copy can make a copy.
# One more package: its name in _PACKAGES.  Guarded by tests/test_bundle.py.

_PACKAGES = ("h11", "certifi")
_PACKAGE_FILES = re.compile(r".*\.(?:py|pem)|py\.typed")
_LICENCE_FILES = re.compile(r"(?i)(?:LICEN[CS]E|COPYING|NOTICE|AUTHORS)[^/]*")
#: -I: no folder, no variable and no package of the user's; -S: no site-packages, so that no .pth file of it ever runs.
_SHEBANG = b"#!/usr/bin/env -S python3 -I -S\n"
_START = b"import sys\nfrom aicarousel import main\nsys.exit(main())\n"


def bundle_members(models: bytes | None) -> dict[str, bytes]:
    """Path and bytes of everything in a bundle, sorted by path; `models` is the models.json to go with it. Raises ConfigError where a package is missing."""
    own = {"aicarousel.py": read_beside(Path(__file__).name), "LICENSE": read_beside("LICENSE"), "models.json": models}
    members = {"__main__.py": _START, **{name: data for name, data in own.items() if data is not None}}
    for package in _PACKAGES:
        members |= _package_members(package)
    return dict(sorted(members.items()))


def _package_members(package: str) -> dict[str, bytes]:
    """The files of an installed package, its licence, and the little that tells its version. Raises ConfigError."""
    import importlib.metadata
    import importlib.resources
    try:
        about, top = importlib.metadata.distribution(package), importlib.resources.files(package)
    except (importlib.metadata.PackageNotFoundError, ModuleNotFoundError) as error:
        raise ConfigError(f"package {package}", "it is not installed", f"python -m pip install {package}") from error
    members = {f"{package}/{file.name}": file.read_bytes() for file in top.iterdir() if file.is_file() and _PACKAGE_FILES.fullmatch(file.name)}
    info = f"{package}-{about.version}.dist-info"
    members[f"{info}/METADATA"] = (about.read_text("METADATA") or about.read_text("PKG-INFO") or f"Name: {package}\nVersion: {about.version}\n").encode()
    for path in about.files or ():
        if _LICENCE_FILES.fullmatch(path.name):
            members[f"{info}/licenses/{path.name}"] = path.read_binary()
    # What a copy reads when it makes a copy; the installer's own list names files of one machine.
    members[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in sorted([*members, f"{info}/RECORD"])).encode()
    return members


def write_bundle(path: Path, members: Mapping[str, bytes]) -> str:
    """Write a bundle, in place of what was there only once it is whole; its SHA-256 in hex. Raises ConfigError."""
    import io
    import zipfile
    packed = io.BytesIO(_SHEBANG)
    packed.seek(len(_SHEBANG))
    with zipfile.ZipFile(packed, "a", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, data)
    whole, unfinished = packed.getvalue(), path.with_name(path.name + ".new")
    try:
        unfinished.write_bytes(whole)
        unfinished.chmod(0o755)
        unfinished.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise ConfigError(str(path), error.strerror or type(error).__name__, "a file that can be written") from error
    return hashlib.sha256(whole).hexdigest()


##############################################################################
# 26. Set-up                                                I/O | uses 1-4, 17, 23
##############################################################################
# The dialogue of `setup`: plain questions, one line for each wrong answer and the question again, Enter for back, Ctrl-C and
# Ctrl-D to leave.  It decides nothing: an answer becomes the words of a plain command (section 27), which is then run.
# Guarded by tests/test_setup.py, through a pseudo-terminal.  One more action: a row in _MENUS.

class _Question(NamedTuple):
    """What is asked for, and how an answer becomes words of the command: (home, answer, words so far) -> words. Raises Refused."""
    prompt: str
    read: Callable[[Home, str, Sequence[str]], list[str]]


class _Action(NamedTuple):
    """A line of a menu: the command's first words, and the questions that give the others."""
    label: str
    words: tuple[str, ...]
    questions: tuple[_Question, ...] = ()


class _Menu(NamedTuple):
    """A part of the set-up: the command that shows how things are, and what can be done."""
    label: str
    shown: tuple[str, ...]
    actions: tuple[_Action, ...]


def _pick(text: str, names: Sequence[str], what: str) -> str:
    """One of `names`, by itself or by its number. Raises Refused."""
    if text.isdecimal() and 1 <= int(text) <= len(names):
        return names[int(text) - 1]
    if text in names:
        return text
    close = nearest(text, names)
    raise Refused(f"there is no {what} {ascii(text)[1:-1][:80]}; " + (f"did you mean {close}?" if close else f"a number from 1 to {len(names)}, or a name" if names else "there are none"))


def _read_provider(home: Home, text: str, words: Sequence[str]) -> list[str]:
    return [_pick(text, [provider.name for provider in read_config(home, {}).providers], "provider")]


def _read_known_model(home: Home, text: str, words: Sequence[str]) -> list[str]:
    return [_pick(text, [model.id for model in find_provider(read_config(home, {}), words[-1]).models], "model")]


def _read_order(home: Home, text: str, words: Sequence[str]) -> list[str]:
    names = [provider.name for provider in read_config(home, {}).providers]
    return [",".join(_pick(part.strip(), names, "provider") for part in text.split(","))]


def _read_word(home: Home, text: str, words: Sequence[str]) -> list[str]:
    if text.startswith("-") or not text.isprintable():
        raise Refused("that is no name")
    return [text]


def _read_switch(home: Home, text: str, words: Sequence[str]) -> list[str]:
    if text.lower() not in ("on", "off"):
        raise Refused("on or off")
    return [text.lower()]


def _read_count(home: Home, text: str, words: Sequence[str]) -> list[str]:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise Refused("a number is wanted")
    return [text]


def _read_url(home: Home, text: str, words: Sequence[str]) -> list[str]:
    if text == "-" and words[-1] in PRESETS:
        return []
    if not re.fullmatch(r"https?://[!-~]+", text):
        raise Refused("an address like https://host/v1" + (", or - for its own" if words[-1] in PRESETS else ""))
    return ["--url", text]


def _read_models(home: Home, text: str, words: Sequence[str]) -> list[str]:
    return [] if text == "-" else ["--models", *_read_word(home, text, words)]


_PROVIDER = _Question("Provider (number or name)", _read_provider)
_MODEL = _Question("Model (number or name)", _read_known_model)
_KEY_ID = _Question("Id of the key", _read_count)

_MENUS: Mapping[str, _Menu] = {
    "2": _Menu("provider keys", ("provider", "list"), (
        _Action("add a key", ()),
        _Action("test all keys", ("provider", "test")),
        _Action("remove keys", ("logout",), (_Question("Whose keys (groq), or which one (groq/2)", _read_word),)),
    )),
    "3": _Menu("gateway keys", ("key", "list"), (
        _Action("make a key", ("key", "create"), (_Question("A name for it", _read_word),)),
        _Action("revoke a key", ("key", "revoke"), (_KEY_ID,)),
        _Action("delete a key", ("key", "delete"), (_KEY_ID,)),
    )),
    "4": _Menu("providers and their order", ("provider", "list"), (
        _Action("switch one on", ("provider", "enable"), (_PROVIDER,)),
        _Action("switch one off", ("provider", "disable"), (_PROVIDER,)),
        _Action("change the order", ("provider", "order"), (_Question("All of them in the new order (numbers or names, with commas)", _read_order),)),
        _Action("add one", ("provider", "add"), (_Question("Its name", _read_word), _Question("Its address (- for that of a built-in provider)", _read_url),
                                                 _Question("Its models, with commas (- for those that are known, or that it lists)", _read_models))),
        _Action("remove one", ("provider", "remove"), (_PROVIDER,)),
    )),
    "5": _Menu("models", ("model", "list"), (
        _Action("choose a default", ("model", "default"), (_PROVIDER, _MODEL)),
        _Action("try the others after the default, or not", ("model", "fallback"), (_PROVIDER, _Question("on or off", _read_switch))),
        _Action("add one", ("model", "add"), (_PROVIDER, _Question("Name of the model", _read_word))),
        _Action("remove one", ("model", "remove"), (_PROVIDER, _MODEL)),
        _Action("move one", ("model", "move"), (_PROVIDER, _MODEL, _Question("Its place, from 1", _read_count))),
        _Action("ask the providers what they list now", ("model", "refresh")),
    )),
}
_TOP = {"1": "set-up, step by step", **{number: menu.label for number, menu in _MENUS.items()}, "6": "status", "q": "leave"}


def _ask(prompt: str, read: Callable[[str], Any]) -> Any:
    """What `read` makes of the first answer that it takes; None for a mere Enter."""
    while True:
        text = input(f"{prompt}: ").strip()
        if not text:
            return None
        try:
            return read(text)
        except Refused as refused:
            print(f"  {printable(str(refused))}")


def _choose(choices: Mapping[str, str]) -> str | None:
    """The key of the choice that was made, None for a mere Enter."""
    def read(text: str) -> str:
        if text.lower() not in choices:
            raise Refused(f"one of {', '.join(choices)}")
        return text.lower()

    print("", *(f"  {key}  {label}" for key, label in choices.items()), sep="\n")
    return _ask("Number", read)


def ask_key(home: Home, name: str | None, prompt: str) -> str | None:
    """Asks for a provider's key, unseen, and for its owner where the key does not tell; what take_key() told, None for a mere Enter. Raises Refused and ConfigError."""
    import getpass
    key = getpass.getpass(f"{prompt}: ")
    form = key_form(clean_key(key))
    if key.strip() and name is None and (form is None or not form.sure):
        names = list(form.providers) if form is not None else [known for known, preset in PRESETS.items() if preset.key_variables and preset.default]
        print("  Whose key is it?", *(f"  {number:>2}  {owner}" for number, owner in enumerate(names, 1)), sep="\n")
        own = [provider.name for provider in read_config(home, {}).providers if provider.preset is CUSTOM_PRESET]
        name = _ask("Number or name", lambda text: _pick(text, names if text.isdecimal() else [*PRESETS, *own], "provider"))
    return take_key(home, key, name)[0] if key.strip() and (name or form) else None


def _take_keys(home: Home, prompt: str) -> None:
    """Takes provider keys until a mere Enter."""
    while True:
        try:
            told = ask_key(home, None, prompt)
        except (Refused, ConfigError) as refused:
            told = str(refused)
        if told is None:
            return
        print(f"  {printable(told)}")
        prompt = "One more key (Enter: that is all)"


def _go_step_by_step(home: Home, recipes: Callable[[str, str], list[str]]) -> None:
    """From nothing to what `serve` needs: a provider's key, and a key for clients."""
    free = [PRESETS[name] for name in DEFAULT_MODELS if PRESETS[name].key_page]
    print("", "1. A key of a provider. These have free plans:", *(f"   {preset.title}: {preset.key_page}" for preset in free), sep="\n")
    _take_keys(home, "Paste a key (it is not shown; Enter: none)")
    config = read_config(home, {})
    active = [provider.name for provider in config.active]
    print("", f"2. Providers that take part: {', '.join(active)}" if active else "2. No provider takes part yet; the built-in one answers offline: serve --demo", sep="\n")
    open_database(home.database_path).close()
    n_keys = sum(key.active for key in list_keys(home.database_path))
    key = "" if n_keys else create_key(home.database_path, "first")[0]
    print("", *([f"3. A key for your clients. It is shown only now:\n\n   {key}"] if key else [f"3. Keys for your clients: {n_keys} (part 3 of the set-up makes more)"]), sep="\n")
    print("", "Start it:", f"  python aicarousel.py serve{'' if active else ' --demo'}", "", *recipes(f"http://127.0.0.1:{config.settings.port}", key or "<key>"), sep="\n")


def _do(home: Home, action: _Action, run: Callable[[Sequence[str]], int]) -> None:
    """Asks for what an action lacks and runs its command; one that was refused is asked for again."""
    if not action.words:
        return _take_keys(home, "Paste a key (it is not shown; Enter: back)")
    while True:
        words = list(action.words)
        for question in action.questions:
            answer = _ask(f"{question.prompt} (Enter: back)", lambda text: question.read(home, text, words))
            if answer is None:
                return
            words += answer
        if run(words) == 0 or not action.questions:
            return


def run_setup(home: Home, run: Callable[[Sequence[str]], int], recipes: Callable[[str, str], list[str]]) -> int:
    """The dialogue; its exit status.

    run: does a plain command, printing what comes of it; its exit status.    recipes: lines that tell how to connect clients at an address with a key.
    """
    try:
        print(f"AICarousel {__version__}, home: {home.folder}", "Ctrl-D leaves; what was done by then stays.", sep="\n")
        if not any(credential.secret for provider in read_config(home, {}).providers for credential in provider.credentials):
            _go_step_by_step(home, recipes)
            print("", "`setup` shows all that can be set from now on.", sep="\n")
            return 0
        while (choice := _choose(_TOP)) not in (None, "q"):
            if choice in ("1", "6"):
                _go_step_by_step(home, recipes) if choice == "1" else run(["status"])
                continue
            menu = _MENUS[choice]
            labels = {str(number): action.label for number, action in enumerate(menu.actions, 1)}
            while run(menu.shown) == 0 and (number := _choose({**labels, "q": "back"})) not in (None, "q"):
                _do(home, menu.actions[int(number) - 1], run)
    except (EOFError, KeyboardInterrupt):
        print()
    return 0


##############################################################################
# 27. Command line                                          I/O | uses 1-5, 8, 15-23, 25-26
##############################################################################
# Arguments, commands, main.  A command reads its arguments, calls what does the work and prints; exit status 0 fine,
# 1 failed, 2 asked wrongly.  What is printed on stdout is the answer, what is printed on stderr is about it.
# One more command: a function, a row in _COMMANDS, its arguments in make_parser; README names it.

_WATCH_S = 0.5
_TRIM_AFTER_S = 0.3
_GC_THRESHOLD = 10_000          #: objects that may come to be before lost cycles are looked for
_LOG_BATCH_S = 0.1
_H11_AT_LEAST = (0, 16)


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
    seen += map(_stamp, map(Path, config.secret_files))
    logging.getLogger("aicarousel").setLevel(config.settings.log_level.upper())
    open_database(home.database_path).close()
    keys = KeyRing(home.database_path, config.settings.api_keys)
    _check_exposure(config, keys)
    context = _server_context(config.settings)
    sockets = bind(config.settings.host, config.settings.port)
    new_key = None if keys.any_key() or config.settings.no_auth else create_key(home.database_path, "first")[0]
    usage = UsageWriter(home.database_path)
    gateway = Gateway(config, keys, usage, world)
    gateway.relay.load(load_routing(home.database_path))
    server = Server(gateway, world)
    await server.listen(sockets, context)
    port = sockets[0].getsockname()[1]
    wanted = _handle_signals(stop)
    _announce(home, gateway, port, new_key)
    if ready is not None:
        ready(gateway, port)
    watcher = asyncio.create_task(_watch(home, flags, gateway, stop, wanted, seen))
    gc.freeze()                         # what is there by now stays; and requests leave nothing that only a collection could free,
    gc.set_threshold(_GC_THRESHOLD)     # so that looking for it after every few of them, as Python does by itself, is a tenth of all work
    asyncio.get_running_loop().call_later(_TRIM_AFTER_S, _trim_memory)
    again = False
    try:
        await stop.wait()
        again = watcher.done() and not watcher.cancelled() and watcher.result()
        logging.getLogger("aicarousel.server").info("draining connections=%d", server.n_connections())
        await server.drain(1.0 if again else gateway.bounds.drain_s)
    finally:
        watcher.cancel()
        if demo is not None:
            await demo.drain(0.0)
        gateway.close()
        await asyncio.get_running_loop().run_in_executor(None, usage.close)
        keys.close()
    if again:
        os.execv(sys.executable, [*own_command(), *sys.argv[1:]])
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
        "  supports_websockets = false",
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
    log, program = logging.getLogger("aicarousel.config"), program_path()
    seen_program = _stamp(program)
    while not stop.is_set():
        await gateway.world.sleep(_WATCH_S)
        gateway.keys.refresh()
        stamps = _stamps_of(home, gateway.config.secret_files)
        if stamps != seen or wanted.is_set():
            seen = stamps
            wanted.clear()
            try:
                gateway.reconfigure(await asyncio.to_thread(read_config, home, flags))       # a cmd: reference takes its time
                log.info("reloaded providers=%s", ",".join(provider.name for provider in gateway.config.active) or "none")
                for warning in gateway.config.warnings:
                    log.warning("%s", log_text(warning))
            except ConfigError as error:
                log.error("kept the old configuration: %s", error)
        if flags.get("reload") and _stamp(program) != seen_program:
            stop.set()
            return True
    return False


def _stamps_of(home: Home, secret_files: Sequence[str] = ()) -> list[tuple[int, int, int]]:
    """What changes when the configuration is edited, or a key that stands in a file of its own."""
    return [_stamp(path) for path in (home.models_path, home.env_path, *map(Path, secret_files))]


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

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record) if record.exc_info else f"{self.formatTime(record)} {record.levelname} {record.name} {record.getMessage()}"

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
    limits = _limits_of(arguments) if arguments.action in ("create", "set") else {}
    open_database(path).close()
    if arguments.action == "set":
        if not limits:
            raise ConfigError("key set", "nothing to set", "at least one of its options")
        changed = set_limits(path, arguments.id, limits)
        if changed is None:
            print(json.dumps({"id": arguments.id, "done": False}) if arguments.json else f"there is no key {arguments.id}", file=sys.stdout if arguments.json else sys.stderr)
            return 1
        return _print_keys([changed], arguments.json)
    if arguments.action == "create":
        key, row = create_key(path, arguments.name, length=arguments.length, limits=limits)
        print(json.dumps({"id": row.id, "name": row.name, "key": key}) if arguments.json else f"{key}\n(id {row.id}, name {row.name}; it is shown only now)", flush=True)
        return 0
    if arguments.action == "list":
        return _print_keys(list_keys(path), arguments.json)
    found = (revoke_key if arguments.action == "revoke" else delete_key)(path, arguments.id)
    done = "revoked" if arguments.action == "revoke" else "deleted"
    text = f"key {arguments.id} {done}" if found else f"there is no key {arguments.id}"
    print(json.dumps({"id": arguments.id, "done": found}) if arguments.json else text, file=sys.stdout if found or arguments.json else sys.stderr)
    return 0 if found else 1


def _limits_of(arguments: Any) -> dict[str, Any]:
    """The limits that the command line set, as set_limits takes them; the word none takes one away."""
    names = ("rpm", "tpm", "concurrency", "usd_per_day", "usd_per_month", "models")
    limits = {name: None if value == "none" else value for name in names if (value := getattr(arguments, name)) is not None}
    if limits.get("models"):
        limits["models"] = tuple(glob.strip() for glob in limits["models"].split(","))
    if arguments.expires is not None:
        limits["expires_at"] = None if arguments.expires == "none" else _read_expiry(arguments.expires, time.time())
    if getattr(arguments, "admin", False):
        limits["admin"] = 1
    return limits


def _read_expiry(text: str, now_utc_s: float) -> int:
    """The end of a key's life, in seconds since 1970: 30d or 12h from now, an ISO 8601 time, or the end of a day; local where no zone is named."""
    match = re.fullmatch(r"([0-9]{1,6})([dh])", text)
    try:
        if match:
            return int(now_utc_s) + int(match[1]) * {"d": 86_400, "h": 3_600}[match[2]]
        moment = datetime.fromisoformat(text)
        return int((moment + timedelta(days=1) if len(text) == 10 else moment).timestamp())
    except (ValueError, OverflowError, OSError) as error:
        raise ConfigError("--expires", ascii(text)[:60], "days or hours from now (30d, 12h), a day (2027-01-31) or a time (2027-01-31T18:00), or none") from error


def _print_keys(keys: Sequence[GatewayKey], as_json: bool) -> int:
    """Keys with their limits; in the table, limits that are not set are left out."""
    rows = [{"id": key.id, "prefix": key.prefix, "name": key.name, "created": key.created_utc, "last_used": key.last_used_utc, "active": key.active, "usage": key.n_used,
             "admin": key.admin, "expires": datetime.fromtimestamp(key.expires_at, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ") if key.expires_at is not None else None,
             "limits": _plain(key.limits or KeyLimits())} for key in keys]
    if as_json:
        print(json.dumps(rows, indent=1))
        return 0
    fields = ("id", "prefix", "name", "created", "last_used", "active", "usage", "admin", "expires", "limits")
    for row in rows:
        row["limits"] = " ".join(f"{name}={','.join(value) if isinstance(value, list) else f'{value:g}'}" for name, value in row["limits"].items() if value)
    cells = [fields, *(tuple("-" if row[name] in (None, "") else "yes" if row[name] is True else "no" if row[name] is False else str(row[name]) for name in fields) for row in rows)]
    print("\n".join(align_columns(cells, len(fields))))
    return 0


def _say_done(arguments: Any, text: str, done: bool = True, **facts: Any) -> int:
    """Print what was done, or why not; the exit status."""
    if arguments.json:
        print(json.dumps({"done": done, "message": text, **facts}))
    else:
        print(printable(text), file=sys.stdout if done else sys.stderr)
    return 0 if done else 1


def _provider_command(arguments: Any) -> int:
    """Providers of models.json: which there are, which take part, in which order, and whether their keys work."""
    home, action = find_home(arguments.home), arguments.action
    if action == "list":
        rows = provider_rows(read_config(home, {}))
        return _print_told(arguments, {"providers": rows}, provider_lines(rows))
    if action == "test":
        return _test_providers(arguments, home)
    if action == "add":
        return _say_done(arguments, add_provider(home, arguments.name, make_entry(home, arguments.name, _added(arguments))))
    if action == "order":
        return _say_done(arguments, order_providers(home, [name.strip() for name in arguments.names.split(",")]))
    if action == "remove":
        return _say_done(arguments, remove_provider(home, arguments.name))
    return _say_done(arguments, switch_provider(home, arguments.name, action == "enable"))


def _added(arguments: Any) -> Json:
    """The fields of models.json that the options of `provider add` name."""
    given = {"baseUrl": arguments.url, "preset": arguments.preset, "format": arguments.format, "default": arguments.default, "keys": [] if arguments.no_key else None,
             "models": [model.strip() for model in arguments.models.split(",")] if arguments.models else None}
    return {name: value for name, value in given.items() if value is not None}


def _test_providers(arguments: Any, home: Home) -> int:
    """Asks every provider that takes part, or the one that is named, with each of its keys."""
    config = read_config(home, {})
    chosen = [find_provider(config, arguments.name)] if arguments.name else config.active
    rows = try_keys(chosen, config.settings)
    for provider in chosen:
        rows += [{"key": provider.name, "state": "out", "words": provider.why_out}] if not provider.credentials else []
    _print_told(arguments, {"keys": rows}, [f"{row['key']:<16} {row['state']:<6} {row['words']}" for row in rows] or ["no provider takes part"])
    return 0 if rows and all(row["state"] == "good" for row in rows) else 1


def _login_command(arguments: Any) -> int:
    """Take a provider's key, check it there, and keep it in .env."""
    home = find_home(arguments.home)
    if not arguments.stdin and sys.stdin and sys.stdin.isatty():
        told = ask_key(home, arguments.provider, f"Key of {arguments.provider or 'a provider'} (it is not shown)")
        return _say_done(arguments, told or "no key came", told is not None)
    text, state, place = take_key(home, sys.stdin.readline() if sys.stdin else "", arguments.provider)
    return _say_done(arguments, text, provider=place.provider.name, key=place.credential.id, state=state)


def _logout_command(arguments: Any) -> int:
    return _say_done(arguments, forget_keys(find_home(arguments.home), arguments.provider))


def _model_command(arguments: Any) -> int:
    """The models of each provider."""
    home, action = find_home(arguments.home), arguments.action
    if action == "list":
        config = read_config(home, {})
        rows = model_rows([find_provider(config, arguments.provider)] if arguments.provider else config.providers)
        return _print_told(arguments, {"models": rows}, model_lines(rows))
    if action == "refresh":
        config = read_config(home, {})
        rows = compare_offers([find_provider(config, arguments.provider)] if arguments.provider else config.active, config.settings)
        _print_told(arguments, {"providers": rows}, offer_lines(rows, arguments.provider is not None) or ["no provider takes part"])
        return 0 if rows and not any(row["trouble"] or row["gone"] for row in rows) else 1
    if action == "fallback":
        return _say_done(arguments, switch_fallback(home, arguments.provider, arguments.switch == "on"))
    if action == "move":
        return _say_done(arguments, move_model(home, arguments.provider, arguments.model, arguments.place))
    return _say_done(arguments, {"add": add_model, "remove": remove_model, "default": choose_default}[action](home, arguments.provider, arguments.model))


def _alias_command(arguments: Any) -> int:
    """Names that stand for others."""
    home = find_home(arguments.home)
    if arguments.action == "list":
        aliases = read_config(home, {}).carousel.aliases
        return _print_told(arguments, {"aliases": {name: list(targets) for name, targets in aliases.items()}},
                           [printable(f"{name} = {', '.join(targets)}") for name, targets in aliases.items()] or ["there are no aliases"])
    return _say_done(arguments, set_alias(home, arguments.name, arguments.target) if arguments.action == "set" else remove_alias(home, arguments.name))


def _setup_command(arguments: Any) -> int:
    """The dialogue; where there is nobody to talk to, help."""
    if not (sys.stdin and sys.stdin.isatty() and sys.stdout.isatty()):
        make_parser().print_help(sys.stderr)
        print("\nsetup asks questions and needs a terminal; every action of it is also one of these commands", file=sys.stderr)
        return 2

    def run(words: Sequence[str]) -> int:
        try:
            return main([*words, *(["--home", arguments.home] if arguments.home else [])])
        except SystemExit:
            return 2                    # argparse has said why

    return run_setup(find_home(arguments.home), run, client_recipes)


def _stats_command(arguments: Any) -> int:
    """What was used, from the usage table; a running server writes it within a moment of each request's end."""
    path = find_home(arguments.home).database_path
    stats = read_stats(path, since_utc_s=stats_since(arguments.days, time.time()), by=stats_groups(arguments.by), provider=arguments.provider, model=arguments.model,
                       heatmap=arguments.heatmap)
    if arguments.json:
        print(json.dumps(stats, indent=1))
        return 0
    blocks = sys.stdout.isatty() and (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print("\n".join(map(printable, [*stats_lines(stats), *(["", *heatmap_lines(stats["hours"], blocks=blocks)] if arguments.heatmap else [])])))
    return 0


def _ask_admin(arguments: Any, method: str, path: str, body: Any = None) -> Json:
    """What the running gateway answers to an admin request, by a key made for it that is gone afterwards. Raises ConfigError."""
    home = find_home(arguments.home)
    settings = read_config(home, {}).settings
    address = arguments.server or f"{'https' if settings.tls_cert else 'http'}://127.0.0.1:{settings.port}"
    try:
        scheme, host, port, _ = split_url(address)
    except ValueError as error:
        raise ConfigError("--server", str(error), _OWN_GATEWAY) from error
    if scheme not in ("http", "https") or not is_loopback(host):        # the key below is for no one else to see
        raise ConfigError("--server", address, _OWN_GATEWAY)
    if not home.database_path.exists():
        raise ConfigError(str(home.database_path), "no database", "one that a gateway has made (python aicarousel.py serve)")
    key, row = create_key(home.database_path, f"command {arguments.command}", limits={"admin": True, "expires_at": int(time.time()) + _ADMIN_KEY_S})
    try:
        raw = None if body is None else body if isinstance(body, bytes) else dump_json(body)
        status, answer = _ask_http(scheme, host, port, method, path, raw, {"authorization": f"Bearer {key}", **({} if raw is None else {"content-type": "application/json"})}, 10.0)
    finally:
        delete_key(home.database_path, row.id)
    try:
        told = json.loads(answer)
    except (ValueError, RecursionError):
        raise ConfigError(f"gateway at {host}:{port}", "no answer", "one that runs with this home (python aicarousel.py serve)") from None
    if status != 200:
        message = told["error"]["message"] if isinstance(told, dict) and isinstance(told.get("error"), dict) else f"status {status}"
        raise ConfigError(f"gateway at {host}:{port}", f"{status}: {message}", "an answer")
    return told


def _print_told(arguments: Any, told: Json, lines: Sequence[str]) -> int:
    print(json.dumps(told, indent=1) if arguments.json else "\n".join(lines))
    return 0


def _explain_command(arguments: Any) -> int:
    """Why a request went where it went, by the running gateway's own memory of its last requests."""
    from urllib.parse import quote
    if arguments.dry is None:
        told = _ask_admin(arguments, "GET", "/admin/explain" + (f"?id={quote(arguments.id, safe='')}" if arguments.id else ""))
    else:
        try:
            body = sys.stdin.buffer.read() if arguments.dry == "-" else Path(arguments.dry).read_bytes()
        except OSError as error:
            raise ConfigError("--dry", f"{arguments.dry}: {error.strerror}", "a file with the body of a request") from error
        told = _ask_admin(arguments, "POST", f"/admin/explain?format={arguments.format}", body)
    return _print_told(arguments, told, told["lines"])


def _quota_command(arguments: Any) -> int:
    """What is used and left of every limit, as the running gateway counts."""
    told = _ask_admin(arguments, "GET", "/admin/quota")
    return _print_told(arguments, told, quota_lines(told["windows"]))


def _route_command(arguments: Any) -> int:
    """Every route and what keeps it out, or an end to that."""
    if arguments.action == "list":
        told = _ask_admin(arguments, "GET", "/admin/routes")
        return _print_told(arguments, told, route_lines(told["routes"]))
    told = _ask_admin(arguments, "POST", "/admin/routes/reset", {"route": arguments.route})
    if not told["reset"]:
        raise ConfigError("route", ascii(arguments.route)[:200], "a route's id, a provider's name, or a glob over them (python aicarousel.py route list)")
    return _print_told(arguments, told, [f"reset: {route}" for route in told["reset"]])


_ADMIN_KEY_S = 60           #: how long the key of a command lives if the command is killed
_OWN_GATEWAY = "the address of a gateway on this machine, such as http://127.0.0.1:7123"


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
    for group, record in (("settings", config.settings), ("carousel", config.carousel), ("carousel.limits", config.carousel.limits),
                          *((f"{provider.name}.timeouts", provider.timeouts) for provider in config.providers)):
        for name in record.__dataclass_fields__:
            value = getattr(record, name)
            if isinstance(value, Bounds):
                continue                # told one by one
            if name in ("api_keys", "https_proxy", "http_proxy"):
                value = "set, not shown" if value else ""
            rows.append((f"{group}.{name}", _plain(value), _origin_of(config, group, name)))
    for provider in config.providers:
        shown = {"base_url": provider.base_url, "format": provider.format, "enabled": provider.enabled, "default": provider.default, "enable_fallback": provider.enable_fallback,
                 "models": [model.id for model in provider.models], "keys": [credential.source or "none needed" for credential in provider.credentials],
                 "state": provider.why_out or "takes part"}
        rows += [(f"{provider.name}.{name}", value, _origin_of(config, provider.name, name)) for name, value in shown.items()]
    return rows


def _origin_of(config: Config, group: str, name: str) -> str:
    """Where a value comes from; origins are kept under the names of models.json."""
    if name == "keys":
        found = [origin for path, origin in config.origins.items() if path.startswith(f"{group}.keys.")]
        return ", ".join(dict.fromkeys(found)) or "default"
    if name == "state":
        return "-"
    return config.origins.get(f"{group}.{name}") or config.origins.get(f"{group}.{camel_name(name)}", "default")


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


def _bundle_command(arguments: Any) -> int:
    home, path = find_home(arguments.home), Path(arguments.output)
    models = routing_text(home)
    read_config(home, {})               # nobody is handed a models.json that does not load
    digest = write_bundle(path, bundle_members(models.encode() if models is not None else None))
    if arguments.json:
        print(json.dumps({"path": str(path), "sha256": digest, "models": models is not None}))
    else:
        print(f"{path}  {path.stat().st_size:,} bytes  sha256 {digest}\nIt runs on any Python from 3.11 on: python -I -S {path.name} serve"
              + (f"\nWithout a models.json beside it, it routes by {home.models_path if home.models_path.exists() else 'the one in this bundle'}." if models is not None else "")
              + "\nIt holds no key.")
    return 0


def _version_command(arguments: Any) -> int:
    told: Json = {"version": __version__, "python": ".".join(map(str, sys.version_info[:3])), "h11": getattr(h11, "__version__", None), "bundle": is_bundled()}
    if arguments.verify:
        home = find_home(arguments.home)
        own = {program_path().name: program_path().read_bytes()} if is_bundled() else {}
        members = own | bundle_members(read_beside("models.json") if is_bundled() else (text.encode() if (text := routing_text(home)) is not None else None))
        told["sha256"] = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
    if arguments.json:
        print(json.dumps(told))
    else:
        print(f"AICarousel {told['version']}, Python {told['python']}, {'a bundle with ' if is_bundled() else ''}h11 {told['h11'] or 'not installed'}")
        print("".join(f"{digest}  {name}\n" for name, digest in told.get("sha256", {}).items()), end="")
    return 0


_COMMANDS: Mapping[str, Callable[[Any], int]] = {
    "setup": _setup_command,
    "serve": _serve_command,
    "key": _key_command,
    "status": _status_command,
    "provider": _provider_command,
    "login": _login_command,
    "logout": _logout_command,
    "model": _model_command,
    "alias": _alias_command,
    "stats": _stats_command,
    "explain": _explain_command,
    "quota": _quota_command,
    "route": _route_command,
    "call": _call_command,
    "db": _database_command,
    "config": _config_command,
    "bundle": _bundle_command,
    "version": _version_command,
}


def _number_or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """A reader of numbers and of the word none."""
    def read(text: str) -> Any:
        return text if text == "none" else kind(text)
    read.__name__ = kind.__name__       # what argparse calls it in its complaint
    return read


def _add_key_parsers(commands: Any, common: Any, as_json: Any) -> None:
    """The command `key` and its actions."""
    actions = commands.add_parser("key", help="gateway keys").add_subparsers(dest="action", required=True, metavar="ACTION")
    created = actions.add_parser("create", parents=[common, as_json], help="make a key and print it once")
    created.add_argument("name", nargs="?", default="default")
    created.add_argument("--length", type=int, default=64, help="hex characters behind sk- (32 to 128, default 64)")
    created.add_argument("--admin", action="store_true", help="a key that may also call /admin")
    changed = actions.add_parser("set", parents=[common, as_json], help="change a key's limits; the word none takes one away")
    changed.add_argument("id", type=int)
    for limited in (created, changed):
        limited.add_argument("--rpm", type=_number_or_none(int), metavar="N", help="requests in any minute")
        limited.add_argument("--tpm", type=_number_or_none(int), metavar="N", help="tokens in any minute")
        limited.add_argument("--concurrency", type=_number_or_none(int), metavar="N", help="requests at a time")
        limited.add_argument("--usd-per-day", type=_number_or_none(float), metavar="X", help="what it may cost in a local day")
        limited.add_argument("--usd-per-month", type=_number_or_none(float), metavar="X", help="what it may cost in a local month")
        limited.add_argument("--models", metavar="LIST", help="names or globs of the models it may use, comma list")
        limited.add_argument("--expires", metavar="WHEN", help="30d, 12h, 2027-01-31, 2027-01-31T18:00")
    actions.add_parser("list", parents=[common, as_json], help="show all keys")
    for action, told in (("revoke", "refuse a key from now on"), ("delete", "remove a key")):
        actions.add_parser(action, parents=[common, as_json], help=told).add_argument("id", type=int)


def _add_provider_parsers(commands: Any, common: Any, as_json: Any) -> None:
    """The commands that change models.json and .env."""
    both = [common, as_json]
    actions = commands.add_parser("provider", help="providers of models.json").add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", parents=both, help="show all, and what keeps one out")
    added = actions.add_parser("add", parents=both, help="add a built-in provider, or one of your own")
    added.add_argument("name")
    added.add_argument("--url", metavar="URL", help="its address, the part before /chat/completions")
    added.add_argument("--preset", metavar="P", help="the built-in provider whose habits it has")
    added.add_argument("--format", choices=FORMAT_NAMES, help="what it is spoken to in (default: what it is known to speak, else chat)")
    added.add_argument("--models", metavar="LIST", help="its models, comma list (default: the known ones, else what it lists)")
    added.add_argument("--default", metavar="M", help="the model asked first (default: the first)")
    added.add_argument("--no-key", action="store_true", help="it needs no key")
    for action, told in (("remove", "take one out of models.json"), ("enable", "switch one on"), ("disable", "switch one off")):
        actions.add_parser(action, parents=both, help=told).add_argument("name")
    actions.add_parser("order", parents=both, help="the order of rotation").add_argument("names", help="all providers, comma list")
    actions.add_parser("test", parents=both, help="ask each provider whether its keys work").add_argument("name", nargs="?", help="one alone")
    taken = commands.add_parser("login", parents=both, help="check a provider's key and keep it in .env")
    taken.add_argument("provider", nargs="?", help="whose key it is (default: told by the key)")
    taken.add_argument("--stdin", action="store_true", help="read the key from standard input")
    commands.add_parser("logout", parents=both, help="take keys out of .env").add_argument("provider", help="a provider (groq), or one of its keys (groq/2)")
    actions = commands.add_parser("model", help="models of a provider").add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, told in (("list", "show them"), ("refresh", "ask providers which models they list now")):
        actions.add_parser(action, parents=both, help=told).add_argument("provider", nargs="?", help="of one provider alone")
    for action, told in (("add", "add one"), ("remove", "remove one"), ("default", "choose the one asked first"), ("move", "put one elsewhere in the list")):
        changed = actions.add_parser(action, parents=both, help=told)
        changed.add_argument("provider")
        changed.add_argument("model")
        if action == "move":
            changed.add_argument("place", type=int, help="from 1")
    switched = actions.add_parser("fallback", parents=both, help="whether the others are tried after the default")
    switched.add_argument("provider")
    switched.add_argument("switch", choices=("on", "off"))
    actions = commands.add_parser("alias", help="names that stand for others").add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", parents=both, help="show all")
    changed = actions.add_parser("set", parents=both, help="make one, or change it")
    changed.add_argument("name")
    changed.add_argument("target", nargs="+", help="what it stands for, in order")
    actions.add_parser("remove", parents=both, help="remove one").add_argument("name")


def _add_why_parsers(commands: Any, common: Any, as_json: Any) -> None:
    """The commands that ask a running gateway about itself."""
    import argparse
    server = argparse.ArgumentParser(add_help=False)
    server.add_argument("--server", metavar="URL", help="address of the gateway (default: this machine)")
    told = commands.add_parser("explain", parents=[common, as_json, server], help="why a request went where it went")
    asked = told.add_mutually_exclusive_group(required=True)
    asked.add_argument("id", nargs="?", help="its x-aicarousel-request-id")
    asked.add_argument("--last", action="store_true", help="the one that ended last")
    asked.add_argument("--dry", metavar="FILE", help="where the body in this file would go, asking no provider (- for standard input)")
    told.add_argument("--format", choices=FORMAT_NAMES, default="chat", help="what the body of --dry is in (default chat)")
    commands.add_parser("quota", parents=[common, as_json, server], help="what is used and left of every limit, and how it is known")
    actions = commands.add_parser("route", help="ways to a model").add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", parents=[common, as_json, server], help="every route and what keeps it out")
    actions.add_parser("reset", parents=[common, as_json, server], help="use routes again, whatever was held against them").add_argument(
        "route", help="a route's id, a provider's name, or a glob over them")


def make_parser() -> Any:
    """The command line, as argparse knows it."""
    import argparse
    parser = argparse.ArgumentParser(prog=program_path().name, description="AICarousel: one address for many LLM APIs.")
    parser.add_argument("--version", action="version", version=f"AICarousel {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--home", metavar="DIR", help="where models.json, .env and data/ live")
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print JSON")

    commands.add_parser("setup", parents=[common], help="asks what is needed to begin, and whatever else can be set")
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

    _add_key_parsers(commands, common, as_json)
    _add_provider_parsers(commands, common, as_json)
    commands.add_parser("status", parents=[common, as_json], help="what is configured and what runs")

    counted = commands.add_parser("stats", parents=[common, as_json], help="what was used, and what it cost")
    counted.add_argument("--days", default=str(STATS_DAYS), metavar="N", help=f"local days, today being the last (default {STATS_DAYS})")
    counted.add_argument("--by", default=STATS_BY, metavar="LIST", help=f"comma list of {', '.join(GROUP_NAMES)} (default {STATS_BY})")
    counted.add_argument("--provider", metavar="P", help="of one provider alone")
    counted.add_argument("--model", metavar="M", help="of one model alone, by the name asked for or the provider's")
    counted.add_argument("--heatmap", action="store_true", help="also a map of requests by weekday and hour")

    _add_why_parsers(commands, common, as_json)

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

    commands.add_parser("bundle", parents=[common, as_json], help="write the copy that needs nothing installed").add_argument(
        "-o", "--output", default="aicarousel.pyz", metavar="FILE", help="where to (default aicarousel.pyz)")
    commands.add_parser("version", parents=[common, as_json], help="which version this is").add_argument(
        "--verify", action="store_true", help="also the SHA-256 of all that a bundle is made of, and of the bundle that is run")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    os.umask(0o077)
    arguments = make_parser().parse_args(argv)
    try:
        return _COMMANDS[arguments.command](arguments)
    except Refused as refused:
        return _say_done(arguments, str(refused), False)
    except KeyboardInterrupt:
        return 1
    except ConfigError as error:
        print(f"aicarousel: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
