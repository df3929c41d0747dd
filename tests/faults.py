"""What becomes of a request when a provider misbehaves, end to end on real sockets: the cases, and what must hold of them.

A case is two providers behind an alias: A plays the fault, B is healthy. Every case runs streamed and not, where that makes
a difference, each against its own pair, so no cooldown of one case touches another. Two gateways serve the whole table, one
for each mode; a thread pool asks in the background, so a case costs no more than its own waiting.
The tests below are those of every client format: test_faults.py, test_faults_messages.py and test_faults_responses.py take them
in and name the format, one file each, so that they can run side by side. A speaks Chat, and the client's own format besides.
One more fault: a row in one of the tables.
"""

from __future__ import annotations

import contextlib
import email.utils
import functools
import gzip
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import answers
import pytest
from dialects import PATHS, Telling, read_stream
from fakes import (DONE, FAKE_KEY, FINISH, ROLE, TLS, Chunk, Client, Close, EachByte, End, Gateway, Head, Pause, Provider, Repeat, Reply, Reset, Script, Send, Silence, Sleep,
                   answer, chat_answer, chat_body, chat_chunk, chat_stream, content, flatten, frame, head_bytes, healthy, in_turn, opened, pieces, stream)

A_TEXT = "All of this came from the first provider."
B_TEXT = "This is the whole answer of the second: caf\u00e9, \u65e5\u672c."
TIMEOUTS = {"connect": 0.5, "firstByte": 1.0, "idle": 1.0}
STALLING = {"connect": 5, "firstByte": 10, "idle": 1.5}
PATIENT = {"connect": 5, "firstByte": 10, "idle": 10}

# What a case may cool; "" is nothing. Where the references leave it open which of two scopes fits, both are listed.
NOTHING, PROVIDER, CREDENTIAL, MODEL, ROUTE = ("",), ("provider",), ("credential",), ("model",), ("route",)
BROKEN = ("provider", "route")          # the connection's fault or the answer's: a matter of view
BUCKET = ("route", "credential")        # what the provider counts by


@dataclass(frozen=True)
class Case:
    """One fault. outcome: next (B's whole answer), whole (A's), either, refused (the client's own mistake)."""
    name: str
    script: Script                              #: what A plays
    outcome: str = "next"
    scopes: tuple[str, ...] = ROUTE
    modes: tuple[str, ...] = ("json", "stream")
    until_s: tuple[float, float] | None = None  #: bounds of the cooldown
    proven: bool | None = None
    preset: str = ""                            #: whose error forms apply
    reach: Callable[[Provider, str], str] | None = None     #: A's base URL; None: a port of its own that reads requests
    timeouts: dict[str, float] = field(default_factory=dict)    #: {}: short where A hangs, long where it does not, so that a busy machine changes nothing
    text: str = A_TEXT
    wire: str = "chat"                          #: what A speaks
    status: int = 0                             #: of a refusal
    says: str = ""                              #: part of its message
    heavy: bool = False                         #: runs after the others, alone

    def __post_init__(self) -> None:
        if not self.timeouts:
            object.__setattr__(self, "timeouts", TIMEOUTS if self.outcome == "next" and self.hangs else PATIENT)

    @property
    def hangs(self) -> bool:
        """Whether A may leave the gateway waiting."""
        steps = [] if callable(self.script) else flatten(self.script)
        return self.reach is not None or any(isinstance(step, (Silence, EachByte, Repeat)) for step in steps)


# ---------------------------------------------------------------- small builders

JSON_ONLY, STREAM_ONLY = ("json",), ("stream",)
WHOLE = json.dumps(chat_answer(A_TEXT)).encode()
A_FRAMES = chat_stream(*pieces(A_TEXT))
A_SSE = b"".join(A_FRAMES)
HTML = b"<!DOCTYPE html><html><head><title>502 Bad Gateway</title></head><body><h1>Bad gateway</h1> cloudflare</body></html>"


def html(status: int) -> list[Any]:
    """A proxy's error page."""
    return answer(HTML, status, [("content-type", "text/html; charset=UTF-8")])


def error(message: str, code: Any = None, type: str = "invalid_request_error", **more: Any) -> dict[str, Any]:
    """An error body in OpenAI's shape."""
    return {"error": {"message": message, "type": type, "param": None, "code": code, **more}}


def by_mode(whole: list[Any], streamed: list[Any]) -> Script:
    """A script for an answer that is not streamed, and one for a stream."""
    return lambda request: streamed if request.streamed else whole


def raw_answer(headers: list[tuple[str, str]], body: bytes = WHOLE, *then: Any) -> list[Any]:
    """A 200 with exactly these headers (and a JSON content type), and what follows the body."""
    return [Send(head_bytes(200, [("content-type", "application/json"), *headers]) + body), *then]


def chunked(*parts: Any, then: tuple[Any, ...] = (End(),)) -> list[Any]:
    """A JSON answer in chunks, and how it ends."""
    return [Head(200, [("content-type", "application/json"), ("transfer-encoding", "chunked")]), *(Chunk(part) if isinstance(part, bytes) else part for part in parts), *then]


def at_once(provider: Provider, name: str) -> str:
    """A port that speaks before it is asked."""
    return provider.listen(name, at_once=True)


def over_tls(certificate: str) -> Callable[[Provider, str], str]:
    """A port that speaks TLS with one of the test certificates."""
    return lambda provider, name: provider.listen(name, tls=TLS / f"{certificate}.pem")


def http_date(seconds: float) -> str:
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


def iso_time(seconds: float, zone_s: float = 0.0, form: str = "%Y-%m-%dT%H:%M:%SZ") -> str:
    return time.strftime(form, time.gmtime(time.time() + zone_s + seconds))


def rate(name: str, body: Any, headers: Callable[[], list[tuple[str, str]]] | None = None, *, until_s: tuple[float, float], proven: bool, scopes: tuple[str, ...] = BUCKET,
         preset: str = "", status: int = 429) -> Case:
    """A case of a limit; body and headers may be functions, for times that count from now."""
    def play(_: Any) -> list[Any]:
        return answer(body() if callable(body) else body, status, headers() if headers else [("content-type", "text/plain")] if isinstance(body, bytes) else [])
    return Case(f"429-{name}", play, "next", scopes, until_s=until_s, proven=proven, preset=preset)


# ---------------------------------------------------------------- the tables

CONNECTING = [
    Case("refused", [], scopes=PROVIDER, reach=lambda provider, name: provider.refusing(name)),
    Case("syn-never-accepted", [], scopes=PROVIDER, reach=lambda provider, name: provider.unaccepting(name)),
    Case("dns", [], scopes=PROVIDER, reach=lambda provider, name: "https://nowhere.invalid/v1"),
    Case("tls-untrusted", healthy(A_TEXT), scopes=PROVIDER, reach=over_tls("untrusted")),
    Case("tls-expired", healthy(A_TEXT), scopes=PROVIDER, reach=over_tls("expired")),
    Case("tls-wrong-name", healthy(A_TEXT), scopes=PROVIDER, reach=over_tls("wrong_name")),
    Case("tls-on-plain-port", healthy(A_TEXT), scopes=PROVIDER, reach=lambda provider, name: provider.listen(name).replace("http:", "https:")),
    Case("tls-handshake-silence", [Silence()], scopes=PROVIDER, reach=lambda provider, name: provider.listen(name, at_once=True).replace("http:", "https:")),
    Case("tls-handshake-cut", [Close()], scopes=PROVIDER, reach=lambda provider, name: provider.listen(name, at_once=True).replace("http:", "https:")),
    Case("plain-on-tls-port", healthy(A_TEXT), scopes=BROKEN, reach=lambda provider, name: provider.listen(name, tls=TLS / "good.pem").replace("https:", "http:")),
    Case("tls-good", healthy(A_TEXT), "whole", reach=over_tls("good"), timeouts=PATIENT),
    Case("silence", [Silence()], scopes=PROVIDER),
    Case("silence-before-request", [Silence()], scopes=PROVIDER, reach=at_once),
    Case("slow-headers", [EachByte(head_bytes(200, [("content-type", "application/json")]), every_s=0.1)], scopes=PROVIDER),
    Case("close-on-connect", [Close()], scopes=BROKEN, reach=at_once),
    Case("reset-on-connect", [Reset()], scopes=BROKEN, reach=at_once),
    Case("close-before-headers", [Close()], scopes=BROKEN),
    Case("reset-before-headers", [Reset()], scopes=BROKEN),
    Case("close-in-headers", [Send(b"HTTP/1.1 200 OK\r\ncontent-type: appl"), Close()], scopes=BROKEN),
    Case("reset-in-headers", [Send(b"HTTP/1.1 200 OK\r\ncontent-type: appl"), Reset()], scopes=BROKEN),
    Case("endless-informational", [Repeat([Send(b"HTTP/1.1 102 Processing\r\n\r\n")])], scopes=BROKEN),
    Case("switching-protocols", [Send(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n"), Silence()], scopes=BROKEN),
]

STATUSES = [
    Case("401", answer(error(f"Incorrect API key provided: {FAKE_KEY}.", "invalid_api_key"), 401), scopes=CREDENTIAL, until_s=(1800, 90000)),
    Case("402", answer(error("Insufficient credits.", 402), 402), scopes=CREDENTIAL, until_s=(1800, 90000)),
    Case("403", answer(error("Your key lacks the scope for this.", "forbidden"), 403), scopes=("credential", "route"), until_s=(240, 90000)),
    Case("403-html", html(403), scopes=("credential", "route")),
    Case("404-model", answer(error("The model 'm' does not exist or you do not have access to it.", "model_not_found"), 404), scopes=MODEL),
    Case("404-html", html(404), scopes=MODEL),
    Case("405", answer(error("Method not allowed."), 405), scopes=("model", "route")),
    Case("408", answer(error("Operation timed out. Please try again later.", 408), 408), scopes=BROKEN),
    Case("409", answer(error("Conflict."), 409), scopes=ROUTE),
    Case("410-model", answer(error("This model has reached its end of life.", "model_gone"), 410), scopes=MODEL),
    Case("413", answer(error("Request Entity Too Large"), 413), scopes=NOTHING),
    Case("413-html", html(413), scopes=NOTHING),
    Case("413-groq-allowance", answer(error("Request too large for model 'm' in organization 'org_01abcdef' service tier 'on_demand' on tokens per minute (TPM): Limit 8000, Requested 34041,"
                                            " please reduce your message size and try again.", "rate_limit_exceeded", "tokens"), 413), scopes=NOTHING, preset="groq"),
    Case("424", answer(error("Failed dependency."), 424), scopes=ROUTE),
    Case("425", answer(error("Too early."), 425), scopes=ROUTE),
    Case("498", answer(error("Flex tier is full.", "capacity_exceeded"), 498), scopes=("route", "credential", "model")),
    Case("500", answer(error("The server had an error.", None, "server_error"), 500), until_s=(2, 600), proven=False),
    Case("500-text", answer(b"Internal Server Error", 500, [("content-type", "text/plain")])),
    Case("500-empty", answer(b"", 500)),
    Case("502-html", html(502), until_s=(2, 600), proven=False),
    Case("502-json", answer(error("Provider returned error", 502), 502)),
    Case("503", answer(error("The server is currently overloaded with other requests.", None, "server_error"), 503), scopes=("route", "model")),
    Case("503-retry-after", answer(error("Overloaded."), 503, [("retry-after", "45")]), scopes=("route", "model"), until_s=(2, 47)),
    Case("504", answer(error("Deadline exceeded."), 504), scopes=BROKEN),
    Case("520-html", html(520)),
    Case("529", answer({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, 529), scopes=("route", "model")),
    Case("999", answer(error("No."), 999)),
    Case("204", [Send(head_bytes(204))], scopes=BROKEN),
    Case("299-with-error", answer(error("Something went wrong.", None, "server_error"), 299), scopes=BROKEN),
    Case("302", lambda request: answer(b"", 302, [("location", f"http://{request.headers['host']}/elsewhere")]), scopes=BROKEN),
    Case("307-to-itself", lambda request: answer(b"", 307, [("location", request.path)]), scopes=BROKEN),
    Case("400-html", html(400), scopes=BROKEN),       # a proxy's page is no verdict on the request
    Case("400-bad-key-gemini", answer([{"error": {"code": 400, "message": "API key not valid. Please pass a valid API key.", "status": "INVALID_ARGUMENT",
                                                  "details": [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}]}}], 400), scopes=CREDENTIAL, preset="gemini"),
    Case("400-bad-key-xai", answer({"code": "invalid-argument", "error": "Incorrect API key provided: xa***. You can obtain an API key from the console."}, 400), scopes=CREDENTIAL, preset="xai"),
    Case("400-no-money-anthropic", answer({"type": "error", "error": {"type": "invalid_request_error", "message": "Your credit balance is too low to access the API."}}, 400),
         scopes=CREDENTIAL),
    Case("400-model-decommissioned", answer(error("The model 'm' has been decommissioned and is no longer supported.", "model_decommissioned"), 400), scopes=MODEL, preset="groq"),
    Case("400-context", answer(error("This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens.", "context_length_exceeded"), 400), scopes=NOTHING),
    Case("412-suspended", answer(error("Account suspended."), 412), scopes=CREDENTIAL, preset="fireworks"),
]

DAY_S = 86400.0
PACIFIC_MIDNIGHT = (1.0, DAY_S + 7200)
GUESSED = (0.0, 720.0)
GEMINI_QUOTA = "You exceeded your current quota. * Quota exceeded for metric: generate_content_free_tier_requests, limit: 20, model: m Please retry in 54.058356943s."


def gemini_429(quota_id: str, delay: str) -> list[dict[str, Any]]:
    """Gemini's error on its OpenAI path: an array of one, with typed details."""
    return [{"error": {"code": 429, "message": GEMINI_QUOTA, "status": "RESOURCE_EXHAUSTED", "details": [
        {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [{"quotaId": quota_id, "quotaValue": "20"}]},
        {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}]}}]


RATES = [
    rate("retry-after-seconds", error("Slow down."), lambda: [("retry-after", "12")], until_s=(8, 12), proven=True),
    rate("retry-after-float", error("Slow down."), lambda: [("retry-after", "11.38")], until_s=(8, 11.4), proven=True),
    rate("retry-after-ms", error("Slow down."), lambda: [("retry-after-ms", "15000")], until_s=(11, 15), proven=True),
    rate("retry-after-date", error("Slow down."), lambda: [("retry-after", http_date(30))], until_s=(24, 31), proven=True),
    rate("retry-after-absurd", error("Slow down."), lambda: [("retry-after", "99999999999")], until_s=(0.3, 26 * 3600), proven=None),
    rate("retry-after-negative", error("Slow down."), lambda: [("retry-after", "-5")], until_s=GUESSED, proven=False),
    rate("retry-after-junk", error("Slow down."), lambda: [("retry-after", "soon \u00b5")], until_s=GUESSED, proven=False),
    rate("bare-text", b"Too many requests", until_s=GUESSED, proven=False),
    rate("empty", b"", until_s=GUESSED, proven=False),
    rate("html", HTML, until_s=GUESSED, proven=False),
    rate("cerebras-minute", {"message": "Requests per minute limit exceeded - too many requests sent.", "type": "too_many_requests_error", "param": "quota", "code": "request_quota_exceeded"},
         lambda: [("x-ratelimit-remaining-tokens-minute", "0"), ("x-ratelimit-reset-tokens-minute", "11.38"), ("x-ratelimit-remaining-requests-day", "100"),
                  ("x-ratelimit-reset-requests-day", "33011.382867097855")], until_s=(7, 11.4), proven=True, scopes=BUCKET, preset="cerebras"),
    rate("cerebras-queue", {"message": "We're experiencing high traffic right now! Please try again soon.", "type": "too_many_requests_error", "param": "queue", "code": "queue_exceeded"},
         until_s=GUESSED, proven=False, scopes=("route", "model"), preset="cerebras"),
    rate("groq-day", error("Rate limit reached for model 'm' in organization 'org_01abcdef' service tier 'on_demand' on tokens per day (TPD): Limit 100000, Used 97050, Requested 3619."
                           " Please try again in 9m38.016s.", "rate_limit_exceeded", "tokens"), until_s=(570, 579), proven=True, preset="groq"),
    rate("groq-minute", error("Rate limit reached for model 'm' on tokens per minute (TPM): Limit 8000, Used 7900, Requested 300. Please try again in 7.66s.", "rate_limit_exceeded", "tokens"),
         lambda: [("retry-after", "8"), ("x-ratelimit-remaining-tokens", "0"), ("x-ratelimit-reset-tokens", "7.66s")], until_s=(4, 8), proven=True, preset="groq"),
    rate("go-duration-header", error("Rate limit reached."), lambda: [("x-ratelimit-remaining-requests", "0"), ("x-ratelimit-reset-requests", "2m59.56s")], until_s=(170, 180), proven=True,
         preset="openai"),
    rate("openrouter-day", lambda: error("Rate limit exceeded: free-models-per-day. Add 10 credits to unlock 1000 free model requests per day", 429, metadata={
        "headers": {"X-RateLimit-Limit": "50", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": str(int((time.time() + 5000) * 1000))}}),
        until_s=(4900, 5001), proven=True, scopes=CREDENTIAL, preset="openrouter"),
    rate("openrouter-day-no-time", error("Rate limit exceeded: free-models-per-day. Add 10 credits to unlock 1000 free model requests per day", 429), until_s=(0.1, DAY_S + 1), proven=None,
         scopes=CREDENTIAL, preset="openrouter"),
    rate("openrouter-upstream", error("Provider returned error", 429, metadata={"provider_name": "Google", "raw": "m is temporarily rate-limited upstream. Please retry shortly."}),
         until_s=GUESSED, proven=False, scopes=("route", "model"), preset="openrouter"),
    rate("gemini-minute", gemini_429("GenerateRequestsPerMinutePerProjectPerModel-FreeTier", "39s"), until_s=(33, 55), proven=True, preset="gemini"),
    rate("gemini-day", gemini_429("GenerateRequestsPerDayPerProjectPerModel-FreeTier", "39s"), until_s=PACIFIC_MIDNIGHT, proven=True, preset="gemini"),
    rate("gemini-exhausted", [{"error": {"code": 429, "message": "Resource has been exhausted (e.g. check quota).", "status": "RESOURCE_EXHAUSTED"}}], until_s=GUESSED, proven=False,
         scopes=("route", "model", "credential"), preset="gemini"),
    rate("openai-minute", error("Rate limit reached for m on tokens per min (TPM): Limit 30000, Used 20000, Requested 12000. Please try again in 24s.", "rate_limit_exceeded", "tokens"),
         until_s=(19, 24), proven=True, preset="openai"),
    rate("openai-no-quota", error("You exceeded your current quota, please check your plan and billing details.", "insufficient_quota", "insufficient_quota"), until_s=(1800, 90000), proven=None,
         scopes=CREDENTIAL, preset="openai"),
    rate("openai-too-large", error("Request too large for m on tokens per min (TPM): Limit 30000, Requested 342389. The input or output tokens must be reduced in order to run successfully.",
                                   "rate_limit_exceeded", "tokens"), until_s=(0, 0), proven=None, scopes=NOTHING, preset="openai"),
    rate("anthropic-date", {"type": "error", "error": {"type": "rate_limit_error", "message": "This request would exceed your organization's rate limit of 50,000 input tokens per minute."}},
         lambda: [("anthropic-ratelimit-input-tokens-remaining", "0"), ("anthropic-ratelimit-input-tokens-reset", iso_time(40))], until_s=(33, 41), proven=True),
    rate("together-seconds", error("You have been rate limited.", None, "credit_limit"), lambda: [("x-ratelimit-remaining", "0"), ("x-ratelimit-reset", "22")], until_s=(17, 22), proven=True,
         preset="together"),
    rate("epoch-seconds", error("Rate limit exceeded"), lambda: [("x-ratelimit-remaining", "0"), ("x-ratelimit-reset", str(int(time.time()) + 60))], until_s=(53, 60), proven=True),
    rate("mistral", {"object": "error", "message": "Rate limit exceeded", "type": "rate_limited", "param": None, "code": "1300", "raw_status_code": 429}, until_s=GUESSED, proven=False,
         preset="mistral"),
    rate("mistral-capacity", {"object": "error", "message": "Service tier capacity exceeded for this model.", "type": "service_tier_capacity_exceeded", "param": None, "code": "3505"},
         until_s=GUESSED, proven=False, scopes=("route", "model"), preset="mistral"),
    rate("zai-no-money", error("Insufficient balance or no resource package. Please recharge.", "1113"), until_s=(1800, 90000), proven=None, scopes=CREDENTIAL, preset="zai"),
    rate("zai-beijing-time", lambda: error("Usage limit reached for 5 hour. Your limit will reset at " + iso_time(3000, 8 * 3600, "%Y-%m-%d %H:%M:%S"), "1308"), until_s=(2980, 3001), proven=True,
         preset="zai"),
    rate("minimax-iso-time", lambda: {"type": "error", "error": {"type": "rate_limit_error", "message":
         f"usage limit exceeded, 5-hour usage limit reached for Token Plan Starter (0/0 used), resets at {iso_time(2000)} (2056)"}}, until_s=(1980, 2001), proven=True, preset="minimax"),
    rate("cloudflare-day", {"success": False, "errors": [{"code": 4006, "message": "you have used up your daily free allocation of 10,000 neurons"}]}, until_s=(0.1, DAY_S + 1), proven=None,
         scopes=CREDENTIAL, preset="cloudflare"),
    rate("moonshot-overloaded", error("The engine is currently overloaded, please try again later", None, "engine_overloaded_error"), until_s=GUESSED, proven=False, scopes=("route", "model"),
         preset="moonshot"),
    rate("ollama-words", {"error": "you (someone) have reached your session usage limit, try again in 2 hours"}, until_s=(7100, 7200), proven=True, preset="ollama-cloud"),
    rate("words-seconds", error("You've hit your global rate limit. Please wait 6 seconds.", "user_global_rate_limited"), until_s=(2, 6), proven=True),
    rate("nvidia", {"status": 429, "title": "Too Many Requests"}, until_s=GUESSED, proven=False, scopes=("route", "credential", "model"), preset="nvidia"),
]

BAD_HEADS = [
    Case("garbage", [Send(bytes(range(256)) * 8), Silence()], scopes=BROKEN),
    Case("tls-alert", [Send(b"\x15\x03\x01\x00\x02\x02\x28"), Close()], scopes=BROKEN),
    Case("ssh-banner", [Send(b"SSH-2.0-OpenSSH_9.6\r\n"), Silence()], scopes=BROKEN, reach=at_once),
    Case("bad-status-line", [Send(b"HTTP/1.1 abc OK\r\ncontent-length: 0\r\n\r\n")], scopes=BROKEN),
    Case("http-2-preface", [Send(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00"), Silence()], scopes=BROKEN),
    Case("header-of-1-mb", [Send(b"HTTP/1.1 200 OK\r\nx-long: " + b"x" * 1048576 + b"\r\ncontent-length: %d\r\n\r\n%b" % (len(WHOLE), WHOLE))], scopes=BROKEN),
    Case("headers-without-end", [Send(b"HTTP/1.1 200 OK\r\n"), Repeat([Send(b"x-more: and more\r\n" * 64)])], scopes=BROKEN),
    Case("20000-headers", [Send(b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20000 + b"content-length: %d\r\n\r\n%b" % (len(WHOLE), WHOLE))], scopes=BROKEN),
    Case("nul-in-header", raw_answer([("x-odd", "a\0b"), ("content-length", str(len(WHOLE)))]), scopes=BROKEN),
    Case("two-lengths", raw_answer([("content-length", str(len(WHOLE))), ("content-length", str(len(WHOLE) - 5))]), scopes=BROKEN),
    Case("length-and-chunked", raw_answer([("content-length", str(len(WHOLE))), ("transfer-encoding", "chunked")], b"%x\r\n%b\r\n0\r\n\r\n" % (len(WHOLE), WHOLE)), scopes=BROKEN),
    Case("length-invalid", raw_answer([("content-length", "12abc")]), scopes=BROKEN),
    Case("length-negative", raw_answer([("content-length", "-1")]), scopes=BROKEN),
    Case("unknown-transfer-coding", raw_answer([("transfer-encoding", "quantum")]), scopes=BROKEN),
]

BODIES = [
    Case("length-too-long-then-close", raw_answer([("content-length", str(len(WHOLE) + 50))], WHOLE, Close()), scopes=BROKEN, modes=JSON_ONLY),
    Case("length-too-long-then-silence", raw_answer([("content-length", str(len(WHOLE) + 50))], WHOLE, Silence()), scopes=PROVIDER, modes=JSON_ONLY),
    Case("length-too-short", raw_answer([("content-length", str(len(WHOLE) - 20))]), scopes=BROKEN, modes=JSON_ONLY),
    Case("cut-by-length", raw_answer([("content-length", str(len(WHOLE)))], WHOLE[:60], Close()), scopes=BROKEN, modes=JSON_ONLY),
    Case("cut-by-reset", raw_answer([("content-length", str(len(WHOLE)))], WHOLE[:60], Sleep(0.05), Reset()), scopes=BROKEN, modes=JSON_ONLY),
    Case("cut-by-eof", raw_answer([("connection", "close")], WHOLE[:60], Close()), scopes=BROKEN, modes=JSON_ONLY),
    Case("cut-in-chunks", chunked(WHOLE[:60], then=(Close(),)), scopes=BROKEN, modes=JSON_ONLY),
    Case("last-chunk-missing", chunked(WHOLE, then=(Close(),)), scopes=BROKEN, modes=JSON_ONLY),
    Case("last-chunk-never-comes", chunked(WHOLE, then=(Silence(),)), scopes=PROVIDER, modes=JSON_ONLY),
    Case("chunk-size-bad", chunked(WHOLE[:60], Send(b"zz\r\nmore\r\n"), Silence(), then=()), scopes=BROKEN, modes=JSON_ONLY),
    Case("chunk-size-huge", chunked(Send(b"fffffffffffffffff\r\n" + WHOLE), Silence(), then=()), scopes=BROKEN, modes=JSON_ONLY),
    Case("chunk-end-wrong", chunked(Send(b"5\r\n" + WHOLE[:60]), Silence(), then=()), scopes=BROKEN, modes=JSON_ONLY),
    Case("body-trickles", raw_answer([("content-length", str(len(WHOLE)))], b"", EachByte(WHOLE, every_s=0.05)), scopes=PROVIDER, modes=JSON_ONLY),
    Case("stall-in-body", raw_answer([("content-length", str(len(WHOLE)))], WHOLE[:60], Silence()), scopes=PROVIDER, modes=JSON_ONLY),
    Case("empty-200", answer(b"", 200, [("content-type", "application/json")])),
    Case("null", answer(None)),
    Case("empty-object", answer({})),
    Case("list", answer([])),
    Case("number", answer(42)),
    Case("wrong-shape", answer({"object": "list", "data": []})),
    Case("choices-empty", answer({**chat_answer(A_TEXT), "choices": []})),
    Case("choices-a-word", answer({**chat_answer(A_TEXT), "choices": "none"})),
    Case("message-a-word", answer({**chat_answer(A_TEXT), "choices": [{"index": 0, "message": "text", "finish_reason": "stop"}]})),
    Case("html-200", html(200)),
    Case("text-200", answer(b"OK", 200, [("content-type", "text/plain")])),
    Case("error-in-200", answer(error("Upstream is down.", 502))),
    Case("error-text-in-200", answer({"error": "Upstream is down."})),
    Case("error-in-200-minimax", answer({"id": "1", "choices": None, "base_resp": {"status_code": 1000, "status_msg": "unknown error"}}), preset="minimax"),
    Case("rate-error-in-200", answer(error("Slow down, too many requests.", 429)), scopes=("route", "credential", "model")),
    Case("gzip-lie", raw_answer([("content-encoding", "gzip"), ("content-length", str(len(WHOLE)))]), scopes=BROKEN),
    Case("gzip-cut", raw_answer([("content-encoding", "gzip"), ("content-length", str(len(gzip.compress(WHOLE)) - 20))], gzip.compress(WHOLE)[:-20]), scopes=BROKEN, modes=JSON_ONLY),
    Case("deep-json", answer(b"[" * 100000, 200, [("content-type", "application/json")])),
    Case("gzip-bomb", lambda request: raw_answer([("content-encoding", "gzip"), ("connection", "close")], gzip.compress(b" " * (1 << 27), 1), Close()), scopes=BROKEN, heavy=True),
    Case("body-of-100-mb", raw_answer([("content-length", str(100 << 20))], b'{"id": "', Repeat([Send(b"x" * 65536)], 1600)), scopes=BROKEN, heavy=True, timeouts=PATIENT),
    Case("endless-body", chunked(Repeat([Chunk(b'"' + b"x" * 65536)]), then=()), scopes=BROKEN, heavy=True, timeouts=PATIENT),
]

CONTENT_FRAME = content(A_TEXT)
STREAM_STARTS = [
    Case("stream-html", stream(HTML), modes=STREAM_ONLY),
    Case("stream-empty", stream(), modes=STREAM_ONLY),
    Case("stream-only-done", stream(DONE), modes=STREAM_ONLY),
    Case("stream-role-then-done", stream(ROLE, DONE), modes=STREAM_ONLY),
    Case("stream-role-then-end", stream(ROLE), modes=STREAM_ONLY),
    Case("stream-role-then-close", opened(ROLE, Close()), scopes=BROKEN, modes=STREAM_ONLY),
    Case("stream-role-then-reset", opened(ROLE, Sleep(0.05), Reset()), scopes=BROKEN, modes=STREAM_ONLY),
    Case("stream-role-then-stall", opened(ROLE, Silence()), scopes=PROVIDER, modes=STREAM_ONLY),
    Case("stream-headers-then-silence", opened(Silence()), scopes=PROVIDER, modes=STREAM_ONLY),
    Case("stream-headers-then-close", opened(Close()), scopes=BROKEN, modes=STREAM_ONLY),
    Case("stream-cut-in-first-event", opened(CONTENT_FRAME[:50], Close()), scopes=BROKEN, modes=STREAM_ONLY),
    Case("stream-first-event-trickles", opened(EachByte(CONTENT_FRAME, chunked=True, every_s=0.05)), scopes=PROVIDER, modes=STREAM_ONLY),
    Case("stream-comments-only", opened(Repeat([Chunk(b": PROCESSING\n\n"), Sleep(0.1)])), scopes=PROVIDER, modes=STREAM_ONLY),
    Case("stream-chunk-size-bad", opened(Send(b"zz\r\nmore\r\n"), Silence()), scopes=BROKEN, modes=STREAM_ONLY),
    Case("stream-chunk-size-huge", opened(Send(b"fffffffffffffffff\r\n" + A_SSE), Silence()), scopes=BROKEN, modes=STREAM_ONLY),
    Case("stream-not-json", stream(frame("<html>busy</html>"), DONE), modes=STREAM_ONLY),
    Case("stream-wrong-shape", stream(frame({"foo": 1}), DONE), modes=STREAM_ONLY),
    Case("stream-error-first", stream(frame(error("Upstream is down.", 502))), scopes=BROKEN, modes=STREAM_ONLY),
    Case("stream-error-after-role", stream(ROLE, frame(error("Upstream is down.", 502)), DONE), scopes=BROKEN, modes=STREAM_ONLY),
    Case("stream-error-named", stream(frame(error("Over capacity.", None, "server_error", status_code=503), "error")), scopes=("route", "model"), modes=STREAM_ONLY, preset="groq"),
    Case("stream-error-named-text", stream(frame("something broke", "error")), modes=STREAM_ONLY),
    Case("stream-error-cerebras", stream(ROLE, frame({"error": {"message": "Internal error", "type": "server_error", "param": None, "code": "x"}, "status_code": 500})), modes=STREAM_ONLY,
         preset="cerebras"),
    Case("stream-error-openrouter", stream(frame({"id": "gen-1", "provider": "X", "error": {"code": 502, "message": "Provider disconnected"}, "choices": [
        {"index": 0, "delta": {"content": ""}, "finish_reason": "error"}]}), DONE), scopes=("route", "model"), modes=STREAM_ONLY, preset="openrouter"),
    Case("stream-error-rate", stream(frame(error("Rate limit exceeded, too many requests.", 429))), scopes=("route", "credential", "model"), modes=STREAM_ONLY),
    Case("stream-error-text", stream(frame({"error": "out of memory"})), modes=STREAM_ONLY),
    Case("stream-event-too-large", opened(Chunk(b"data: "), Repeat([Chunk(b"x" * 65536)])), scopes=BROKEN, modes=STREAM_ONLY, heavy=True, timeouts=PATIENT),
    Case("stream-gzip-lie", [Head(200, [("content-type", "text/event-stream"), ("content-encoding", "gzip"), ("transfer-encoding", "chunked")]), Chunk(A_SSE), End()], scopes=BROKEN,
         modes=STREAM_ONLY),
]

GZIP_SSE = [Head(200, [("content-type", "text/event-stream"), ("content-encoding", "gzip"), ("transfer-encoding", "chunked")]), Chunk(gzip.compress(A_SSE)), End()]
INFORMATIONAL = Send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </x>; rel=preload\r\n\r\n")
BAD_UTF8 = WHOLE.replace(b"All of this", b"All \xff of \xe3\x81")
BAD_UTF8_TEXT = "All \ufffd of \ufffd came from the first provider."
FOREIGN_HEADERS = [("set-cookie", "session=1"), ("access-control-allow-origin", "*"), ("server", "secret-server"), ("alt-svc", 'h3=":443"'), ("openai-organization", "org-secret123"),
                   ("retry-after", "30"), ("location", "http://secret.example/"), ("x-powered-by", "secret")]
ODD = [
    Case("slow", by_mode([Sleep(0.9), *answer(chat_answer(A_TEXT))], [*opened(Sleep(0.4), ROLE, Sleep(0.4)), *map(Chunk, A_FRAMES[1:]), End()]), "whole", timeouts=PATIENT),
    Case("informational-first", by_mode([INFORMATIONAL, *answer(chat_answer(A_TEXT))], [INFORMATIONAL, *stream(A_FRAMES)]), "whole"),
    Case("gzip-unasked", by_mode(raw_answer([("content-encoding", "gzip"), ("content-length", str(len(gzip.compress(WHOLE, mtime=0))))], gzip.compress(WHOLE, mtime=0)), GZIP_SSE), "whole"),
    Case("invalid-utf-8", by_mode(raw_answer([("content-length", str(len(BAD_UTF8)))], BAD_UTF8), stream(A_SSE.replace(b"All of this", b"All \xff of \xe3\x81"))), "either", text=BAD_UTF8_TEXT),
    Case("headers-not-relayed", by_mode(answer(chat_answer(A_TEXT), 200, FOREIGN_HEADERS), stream(A_FRAMES, headers=FOREIGN_HEADERS)), "whole"),
    Case("json-for-a-stream", answer(chat_answer(A_TEXT)), "either", modes=STREAM_ONLY),
    Case("stream-for-json", stream(A_FRAMES), "either", modes=JSON_ONLY),
    Case("wrong-media-type", by_mode(answer(WHOLE, 200, [("content-type", "text/plain")]), [Head(200, [("content-type", "text/plain"), ("transfer-encoding", "chunked")]), Chunk(A_SSE), End()]),
         "either"),
    Case("close-delimited", by_mode(raw_answer([("connection", "close")], WHOLE, Close()), [Head(200, [("content-type", "text/event-stream")]), Send(A_SSE), Close()]), "whole"),
    Case("http-1.0", by_mode([Send(head_bytes(200, [("content-type", "application/json")], "1.0") + WHOLE), Close()],
                             [Send(head_bytes(200, [("content-type", "text/event-stream")], "1.0") + A_SSE), Close()]), "whole"),
    Case("each-byte-a-chunk", by_mode([Head(200, [("content-type", "application/json"), ("transfer-encoding", "chunked")]), EachByte(WHOLE, chunked=True), End()],
                                      [*opened(EachByte(A_SSE, chunked=True)), End()]), "whole", timeouts=PATIENT),
    Case("each-byte-a-write", by_mode([EachByte(head_bytes(200, [("content-type", "application/json"), ("content-length", str(len(WHOLE)))]) + WHOLE)],
                                      [EachByte(head_bytes(200, [("content-type", "text/event-stream"), ("connection", "close")]) + A_SSE), Close()]), "whole", timeouts=PATIENT),
    Case("chunk-extensions-and-trailers", by_mode(chunked(Send(b"%x;a=b\r\n%b\r\n0\r\nx-sum: 1\r\n\r\n" % (len(WHOLE), WHOLE)), then=()),
                                                  opened(Send(b"%x;a=b\r\n%b\r\n0\r\nx-sum: 1\r\n\r\n" % (len(A_SSE), A_SSE)))), "either"),
    Case("blank-lines-first", chunked(b"\n\n", Sleep(0.2), b"\n \n", Sleep(0.2), WHOLE), "whole", modes=JSON_ONLY),
    Case("bom-json", answer(b"\xef\xbb\xbf" + WHOLE, 200, [("content-type", "application/json")]), "either", modes=JSON_ONLY),
    Case("stream-all-in-one-chunk", stream(A_SSE), "whole", modes=STREAM_ONLY),
    Case("stream-length-too-long", [Send(head_bytes(200, [("content-type", "text/event-stream"), ("content-length", str(len(A_SSE) + 99))]) + A_SSE), Silence()], "whole", modes=STREAM_ONLY),
    Case("stream-last-chunk-missing", opened(A_FRAMES, Close()), "whole", modes=STREAM_ONLY),
    Case("stream-last-chunk-never-comes", opened(A_FRAMES, Silence()), "whole", modes=STREAM_ONLY),
    Case("stream-bom", stream(b"\xef\xbb\xbf" + A_SSE), "whole", modes=STREAM_ONLY),
    Case("stream-crlf", stream(*(one.replace(b"\n", b"\r\n") for one in A_FRAMES)), "whole", modes=STREAM_ONLY),
    Case("stream-crlf-torn", stream(*(part for one in A_FRAMES for part in (one.replace(b"\n", b"\r\n")[:-1], b"\n"))), "whole", modes=STREAM_ONLY),
    Case("stream-cr", stream(*(one.replace(b"\n", b"\r") for one in A_FRAMES)), "whole", modes=STREAM_ONLY),
    Case("stream-no-space", stream(*(one.replace(b"data: ", b"data:") for one in A_FRAMES)), "whole", modes=STREAM_ONLY),
    Case("stream-extra-fields", stream(*(b"id: 7\nevent: message\nretry: 1000\nfoo: bar\n: note\n" + one for one in A_FRAMES)), "whole", modes=STREAM_ONLY),
    Case("stream-data-in-two-lines", stream(*(one.replace(b', "choices"', b',\ndata: "choices"') for one in A_FRAMES)), "whole", modes=STREAM_ONLY),
    Case("stream-comment-of-1-mb", stream(b": " + b"x" * 1048576 + b"\n\n", A_FRAMES), "whole", modes=STREAM_ONLY, timeouts=PATIENT),
    Case("stream-event-of-1-mb", stream(ROLE, content(A_TEXT + "x" * 1048576), FINISH, DONE), "whole", modes=STREAM_ONLY, timeouts=PATIENT, text=A_TEXT + "x" * 1048576),
    Case("stream-no-done", stream(A_FRAMES[:-1]), "whole", modes=STREAM_ONLY),
    Case("stream-no-done-then-close", opened(A_FRAMES[:-1], Close()), "whole", modes=STREAM_ONLY),
    Case("stream-done-without-finish", stream(ROLE, CONTENT_FRAME, DONE), "whole", modes=STREAM_ONLY),
    Case("stream-last-blank-line-missing", [*opened(A_FRAMES[:-1], b"data: [DONE]"), End()], "whole", modes=STREAM_ONLY),
    Case("stream-last-blank-line-missing-at-finish", [*opened(ROLE, CONTENT_FRAME, FINISH.rstrip()), End()], "whole", modes=STREAM_ONLY),
    Case("stream-done-spaced", stream(A_FRAMES[:-1], b"data:   [DONE]  \n\n"), "whole", modes=STREAM_ONLY),
    Case("stream-data-after-the-end", stream(A_FRAMES, content(" And poison."), DONE), "whole", modes=STREAM_ONLY),
    Case("stream-error-after-finish", stream(ROLE, CONTENT_FRAME, frame(chat_chunk({}, "length")), frame(error("Token limit reached", 400)), DONE), "whole", modes=STREAM_ONLY),
    Case("stream-usage-after-finish", stream(ROLE, CONTENT_FRAME, frame(chat_chunk({}, "stop")), frame({**chat_chunk({}), "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2,
         "total_tokens": 5}}), DONE), "whole", modes=STREAM_ONLY),
    Case("stream-choices-empty-first", stream(frame({**chat_chunk({}), "choices": [], "prompt_filter_results": []}), A_FRAMES), "whole", modes=STREAM_ONLY),
    Case("stream-comments-keep-it-alive", stream(A_FRAMES[:2], Repeat([Chunk(b": still here\n\n"), Sleep(0.2)], 5), A_FRAMES[2:]), "whole", modes=STREAM_ONLY,
         timeouts={**PATIENT, "idle": 0.8}),
    Case("stream-comments-between", stream(b": OPENROUTER PROCESSING\n\n", ROLE, b": OPENROUTER PROCESSING\n\n", A_FRAMES[1:]), "whole", modes=STREAM_ONLY),
]

REFUSED = [
    Case("400", answer(error("Invalid 'messages[0]': content is required.", "invalid_value", param="messages[0]"), 400), "refused", NOTHING, status=400, says="content is required"),
    Case("400-flat", answer({"message": "temperature must be at most 2", "type": "invalid_request_error", "code": "wrong"}, 400), "refused", NOTHING, status=400, says="temperature must be at most 2"),
    Case("400-array", answer([{"error": {"code": 400, "message": "contents is not specified", "status": "INVALID_ARGUMENT"}}], 400), "refused", NOTHING, status=400, says="contents is not specified"),
    Case("400-text", answer({"error": "messages must not be empty"}, 400), "refused", NOTHING, status=400, says="messages must not be empty"),
    Case("400-with-key", answer(error(f"The request with {FAKE_KEY} is malformed."), 400), "refused", NOTHING, status=400, says="is malformed"),
    Case("422", answer({"detail": [{"type": "missing", "loc": ["body", "messages"], "msg": "Field required", "input": {}}]}, 422), "refused", NOTHING, status=422, says="Field required"),
    Case("400-policy", answer(error("Rejected by the safety system.", "content_policy_violation"), 400), "refused", NOTHING, status=400, says="Rejected by the safety system"),
]

CASES = [*CONNECTING, *STATUSES, *RATES, *BAD_HEADS, *BODIES, *STREAM_STARTS, *ODD, *REFUSED]


def own_starts(wire: str) -> list[Case]:
    """Faults before any content, of a provider that speaks the client's own format."""
    preamble, name = b"".join(Telling(wire).begin()), f"own-{wire}"
    words = Telling(wire).half_say(A_TEXT)
    stopped = Telling(wire).end() if wire == "messages" else [write_responses("response.completed", status="completed")]

    def case(what: str, script: Script, scopes: tuple[str, ...] = ROUTE, **more: Any) -> Case:
        return Case(f"{name}-{what}", script, scopes=scopes, wire=wire, **{"modes": STREAM_ONLY, **more})

    return [
        case("html", stream(HTML)),
        case("empty", stream()),
        case("nothing-and-its-end", stream(preamble, *stopped)),
        case("preamble-then-end", stream(preamble)),
        case("preamble-then-close", opened(preamble, Close()), BROKEN),
        case("preamble-then-reset", opened(preamble, Sleep(0.05), Reset()), BROKEN),
        case("preamble-then-stall", opened(preamble, Silence()), PROVIDER),
        case("headers-then-silence", opened(Silence()), PROVIDER),
        case("headers-then-close", opened(Close()), BROKEN),
        case("cut-in-first-event", opened(preamble[:50], Close()), BROKEN),
        case("cut-in-first-content", opened(preamble, words[-1][:-20], Close()), BROKEN),
        case("comments-only", opened(Repeat([Chunk(b": PROCESSING\n\n"), Sleep(0.1)])), PROVIDER),
        case("signs-of-life-only", opened(preamble, Repeat([Chunk(SIGNS_OF_LIFE[wire]), Sleep(0.1)], 4), Silence()), PROVIDER),
        case("not-json", stream(preamble, frame("<html>busy</html>", "response.output_text.delta"))),
        case("wrong-shape", stream(frame({"foo": 1}))),
        *(case(f"{what}-{place}", stream(before, error_frame(wire, *told)), scopes)
          for what, (scopes, *told) in OWN_ERRORS.items() for place, before in (("first", b""), ("after-preamble", preamble))),
        case("error-in-200", answer(own_error(wire, "api_error", "Upstream is down.")), modes=("json", "stream")),
        case("empty-200", answer(b"", 200, [("content-type", "application/json")]), modes=("json", "stream")),
        case("wrong-shape-200", answer({"object": "list", "data": []}), modes=("json", "stream")),
        case("html-200", html(200), modes=("json", "stream")),
        case("cut-by-length", raw_answer([("content-length", "5000")], b'{"id": "x", "type": "mess', Close()), BROKEN, modes=JSON_ONLY),
        case("500", answer(own_error(wire, "api_error", "Oops."), 500), modes=("json", "stream")),
        case("529", answer(own_error(wire, "overloaded_error", "Overloaded"), 529), ("route", "model"), modes=("json", "stream")),
        case("429-retry-after", answer(own_error(wire, "rate_limit_error", "Slow down."), 429, [("retry-after", "12")]), BUCKET, modes=("json", "stream"), until_s=(8, 12), proven=True),
        case("401", answer(own_error(wire, "authentication_error", f"invalid x-api-key {FAKE_KEY}"), 401), CREDENTIAL, modes=("json", "stream"), until_s=(1800, 90000)),
    ]


#: An error that a provider tells of inside its stream: what it cools, its type and its words.
OWN_ERRORS = {
    "error": (("route", "model"), "overloaded_error", "Overloaded"),
    "error-rate": (("route", "credential", "model"), "rate_limit_error", "Rate limit exceeded, too many requests."),
    "error-server": (ROUTE, "api_error", "Upstream is down."),
}
SIGNS_OF_LIFE = {"messages": frame({"type": "ping"}, "ping"), "responses": frame({"type": "keepalive", "sequence_number": 2}, "keepalive")}


def write_responses(kind: str, **fields: Any) -> bytes:
    """The last event of a Responses stream, number 2."""
    response = {**Telling._response("in_progress"), **fields}
    return frame({"type": kind, "sequence_number": 2, "response": response}, kind)


def own_error(wire: str, kind: str, message: str) -> dict[str, Any]:
    """An error body in the form of a format."""
    return {"type": "error", "error": {"type": kind, "message": message}} if wire == "messages" else error(message, None, kind)


def error_frame(wire: str, kind: str, message: str) -> bytes:
    """The event by which a provider breaks off."""
    if wire == "messages":
        return frame(own_error(wire, kind, message), "error")
    code = {"overloaded_error": "server_is_overloaded", "rate_limit_error": "rate_limit_exceeded"}.get(kind, "server_error")
    return write_responses("response.failed", status="failed", error={"code": code, "message": message})


@dataclass(frozen=True)
class Break:
    """A fault after content went out: what A does once the client has seen its first words."""
    name: str
    fault: list[Any]
    scopes: tuple[str, ...] = BROKEN
    head: tuple[tuple[str, str], ...] = ()      #: of the answer, instead of a chunked event stream
    heavy: bool = False
    wire: str = "chat"                          #: what A speaks
    says: str = ""                              #: what the client must be told

    @property
    def id(self) -> str:
        return self.name if self.wire == "chat" else f"own-{self.wire}-{self.name}"


SEEN = "The first words"
SSE_HEAD = ("content-type", "text/event-stream")
EXPLODED = "The engine exploded"


def words_of(wire: str) -> tuple[list[bytes], bytes, list[bytes]]:
    """What A says first, the frame that would come next, and those that would end the answer."""
    told = Telling(wire)
    begun, said = told.begin(), told.half_say("The first", " words", A_TEXT)
    rest = Telling(wire)
    rest.n_events = told.n_events
    return [*begun, *said[:-1]], said[-1], rest.end()


def breaks(wire: str) -> list[Break]:
    """Faults after content that every format can have."""
    words, more, end = words_of(wire)
    long_frame = Telling(wire).half_say(" and no more, as the length says" * 9)[-1]
    rows = [
        ("cut-between-events", [Close()]),
        ("cut-in-an-event", [Chunk(more[:60]), Close()]),
        ("cut-in-a-chunk", [Send(b"500\r\n" + more[:60]), Close()]),
        ("clean-end-without-finish", [End()]),
        ("clean-end-in-an-event", [Chunk(more[:60]), End()]),
        ("close-delimited", [Close()], BROKEN, (SSE_HEAD, ("connection", "close"))),
        ("length-too-long", [Close()], BROKEN, (SSE_HEAD, ("content-length", "100000"))),
        ("length-too-short", [Send(long_frame), Silence()], BROKEN, (SSE_HEAD, ("content-length", str(len(b"".join(words)) + 200)))),
        ("reset", [Reset()]),
        ("reset-in-an-event", [Chunk(more[:60]), Sleep(0.05), Reset()]),
        ("stall", [Silence()], PROVIDER),
        ("stall-in-an-event", [Chunk(more[:60]), Silence()], PROVIDER),
        ("trickle", [EachByte(long_frame, chunked=True, every_s=0.05)], PROVIDER),
        ("chunk-size-bad", [Send(b"zz\r\nmore\r\n"), Silence()]),
        ("garbage-on-the-wire", [Send(bytes(range(128, 256)) * 8), Silence()]),
        ("garbage-in-an-event", [Chunk(b"data: \x00\x01\xff\xfe garbage\n\n"), Chunk(more), *map(Chunk, end), End()]),
        ("html-in-an-event", [Chunk(b"data: " + HTML + b"\n\n"), *map(Chunk, end), End()]),
        ("html-after-events", [Chunk(HTML), Close()]),
        ("json-torn", [Chunk(more[:-30] + b"\n\n"), Chunk(more), *map(Chunk, end), End()]),
        ("line-of-64-mb", [Send(b"4000000\r\ndata: "), Repeat([Send(b"x" * 65536)], 1024)]),
    ]
    return [Break(*row, wire=wire, heavy=row[0] == "line-of-64-mb") for row in rows]


CHAT_BREAKS = [
    *breaks("chat"),
    Break("cut-after-usage", [Chunk(frame({**chat_chunk({}), "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}})), Close()]),
    Break("error", [Chunk(frame(error(EXPLODED, 502))), End()], says=EXPLODED),
    Break("error-then-done", [Chunk(frame(error(EXPLODED, 502))), Chunk(DONE), End()], says=EXPLODED),
    Break("error-named", [Chunk(frame(error(EXPLODED, None, "server_error"), "error")), End()], says=EXPLODED),
    Break("error-openrouter", [Chunk(frame({"id": "g", "error": {"code": 502, "message": EXPLODED}, "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}]})),
                               Chunk(DONE), End()], ("route", "model", "provider"), says=EXPLODED),
    Break("error-cerebras", [Chunk(frame({**error(EXPLODED), "status_code": 500})), Silence()], says=EXPLODED),
    Break("error-text", [Chunk(frame({"error": EXPLODED})), Close()], says=EXPLODED),
    Break("error-rate", [Chunk(frame(error("Rate limit exceeded, too many requests.", 429))), Chunk(DONE), End()], ("route", "credential", "model")),
    Break("error-with-key", [Chunk(frame(error(f"{EXPLODED} near {FAKE_KEY}", 500))), End()], says=EXPLODED),
]


def own_breaks(wire: str) -> list[Break]:
    """Faults after content of a provider that speaks the client's own format."""
    closed = Telling(wire)
    n_shown = len(closed.begin()) + len(closed.half_say("The first", " words"))
    whole = Telling(wire)
    block_end = [*whole.begin(), *whole.say("The first", " words")][n_shown:]
    end = {"messages": [frame({"type": "message_stop"}, "message_stop")], "responses": [write_responses("response.completed", status="completed")]}[wire]
    made = [
        *breaks(wire),
        Break("cut-after-the-block", [Chunk(b"".join(block_end)), Close()]),
        Break("end-after-the-block", [Chunk(b"".join(block_end)), End()]),
        Break("error", [Chunk(error_frame(wire, "api_error", EXPLODED)), End()], says=EXPLODED),
        Break("error-then-end-mark", [Chunk(error_frame(wire, "api_error", EXPLODED)), *map(Chunk, end), End()], says=EXPLODED),
        Break("error-then-silence", [Chunk(error_frame(wire, "api_error", EXPLODED)), Silence()], says=EXPLODED),
        Break("error-overloaded", [Chunk(error_frame(wire, "overloaded_error", EXPLODED)), Close()], ("route", "model"), says=EXPLODED),
        Break("error-rate", [Chunk(error_frame(wire, "rate_limit_error", "Rate limit exceeded, too many requests.")), End()], ("route", "credential", "model")),
        Break("error-with-key", [Chunk(error_frame(wire, "api_error", f"{EXPLODED} near {FAKE_KEY}")), End()], says=EXPLODED),
        *([Break("error-event", [Chunk(frame({"type": "error", "code": "server_error", "message": EXPLODED, "param": None, "sequence_number": 6}, "error")), End()], says=EXPLODED)]
          if wire == "responses" else []),
    ]
    return [replace(one, wire=wire) for one in made]


def break_script(broken: Break, gate: str) -> list[Any]:
    """The preamble and some words, a pause until the client has seen them, the fault."""
    words = words_of(broken.wire)[0]
    begin = [Head(200, broken.head), *map(Send, words)] if broken.head else opened(*words)
    return [*begin, Pause(gate), *broken.fault]


@functools.cache
def cases_for(client: str) -> list[Case]:
    """The faults before content, for clients of one format."""
    return CASES if client == "chat" else [*CASES, *own_starts(client)]


@functools.cache
def breaks_for(client: str) -> list[Break]:
    """The faults after content, for clients of one format."""
    return CHAT_BREAKS if client == "chat" else [*CHAT_BREAKS, *own_breaks(client)]


# ---------------------------------------------------------------- the floor: two gateways and all results

@dataclass(frozen=True)
class Result:
    """What a case came to."""
    reply: Reply
    cooling_a: list[dict[str, Any]]
    cooling_b: list[dict[str, Any]]
    asked_a: int
    asked_b: int
    logged: str                     #: the scope that the log says A cools by, "" for none


def entry(url: str, name: str, timeouts: dict[str, float], preset: str = "", wire: str = "chat") -> dict[str, Any]:
    """A provider's entry in models.json."""
    return {"baseUrl": url, "format": wire, "default": f"m-{name}", "enableFallback": False, "models": [f"m-{name}"], "keys": ["env:FAKE_KEY"], "timeouts": timeouts,
            **({"preset": preset} if preset else {})}


POISON = answer(chat_answer("POISON"))

#: Scripts of the tests below the tables, each a provider by itself; a name ending in -b stands behind the one ending in -a.
ALONE: dict[str, tuple[Script, dict[str, float]]] = {
    "early-a": ([*opened(Sleep(6), Close())], PATIENT),
    "early-b": (healthy(B_TEXT), PATIENT),
    "late-a": ([*opened(Sleep(6), Close())], PATIENT),
    "late-b": (answer(error("The server had an error."), 500), PATIENT),
    "stale-close": (lambda request: healthy(A_TEXT)(request) if request.turn == 1 else [Close()], PATIENT),
    "stale-reset": (lambda request: healthy(A_TEXT)(request) if request.turn == 1 else [Reset()], PATIENT),
    "stale-idle": (lambda request: [*healthy(A_TEXT)(request), Close()], PATIENT),
    "unasked-at-once": (lambda request: [*healthy(A_TEXT)(request), *POISON, Pause("unasked-at-once sent")], PATIENT),
    "unasked-later": (lambda request: [*healthy(A_TEXT)(request), Pause("unasked-later"), *POISON, Pause("unasked-later sent")], PATIENT),
    "leave-streaming": ([*opened(ROLE, Repeat([Chunk(content("word ")), Sleep(0.02)]))], PATIENT),
    "leave-stalled": ([*opened(ROLE, content("word"), Silence())], PATIENT),
    "leave-waiting": ([Silence()], PATIENT),
    "leave-in-body": (by_mode(raw_answer([("content-length", "9999")], b"{", Silence()), opened(ROLE, Silence())), PATIENT),
    "firehose": ([*opened(ROLE, Repeat([Chunk(content("x" * 4000) * 8)]))], PATIENT),
}

#: The same for each mode: they are counted, or answer in turn.
PER_MODE: dict[str, Callable[[], Script]] = {
    "again": lambda: in_turn(answer(error("Oops."), 500), healthy(A_TEXT)),
    "sole": lambda: answer(error("Oops."), 500),
    "repair": lambda: lambda request: answer(error("Unsupported parameter: 'top_p' is not supported with this model.", "unsupported_parameter", param="top_p"), 400)
              if "top_p" in request.json else healthy(A_TEXT)(request),
}

IN_A_ROW = {    # what A answers six times, and how often it may be asked
    "429-with-time": (answer(error("Slow down."), 429, [("retry-after", "60")]), 1),
    "quota": (answer(error("You exceeded your current quota.", "insufficient_quota", "insufficient_quota"), 429), 1),
    "401": (answer(error("Invalid API key.", "invalid_api_key"), 401), 1),
    "402": (answer(error("Insufficient credits.", 402), 402), 1),
    "403": (answer(error("Forbidden."), 403), 2),
    "429-bare": (answer(b"", 429), 2),
    "500": (answer(error("Oops."), 500), 5),
}

RECOVERING = {      # A's first answer; then it is healthy
    "back-429": answer(b"", 429),
    "back-429-with-time": answer(error("Slow down."), 429, [("retry-after", "2")]),
    "back-500": answer(error("Oops."), 500),
    "back-silent": [Silence()],
}

LATER, SOONER = answer(error("Slow down."), 429, [("retry-after", "50")]), answer(error("Slow down."), 429, [("retry-after", "40")])
ALL_FAIL: dict[str, tuple[Script, Script, tuple[int, ...], str]] = {     # A, B, statuses the client may get, its error type
    "all-429": (LATER, SOONER, (429,), "rate_limit_error"),
    "429-and-500": (LATER, answer(error("Oops."), 500), (502, 503), "server_error"),
    "all-silent": ([Silence()], [Silence()], (504,), "server_error"),
    "all-401": (answer(error(f"Incorrect API key provided: {FAKE_KEY}"), 401), answer(error(f"Incorrect API key provided: {FAKE_KEY}"), 401), (502,), "server_error"),
    "all-403": (answer(error("Forbidden."), 403), html(403), (502, 503), "server_error"),
    "all-500": (answer(error("Oops."), 500), answer(error("Oops."), 500), (500, 502, 503), "server_error"),
    "all-html": (html(502), html(502), (502, 503), "server_error"),
    "all-cut": ([Close()], [Close()], (502, 503), "server_error"),
    "all-overloaded": (answer(error("Overloaded."), 529), answer(error("Overloaded."), 503), (503,), "server_error"),
    "all-404": (answer(error("No such model.", "model_not_found"), 404), answer(error("No such model.", "model_not_found"), 404), (404, 502), ""),
    "all-413": (html(413), html(413), (413,), "invalid_request_error"),
}


MODES = ("json", "stream")


def ask(client: str, model: str, streamed: bool, **fields: Any) -> dict[str, Any]:
    """A request as a client of that format sends it."""
    said = {"input": "Hi"} if client == "responses" else chat_body()
    return {"model": model, **said, **({"max_tokens": 1000} if client == "messages" else {}), **({"stream": True} if streamed else {}), **fields}


class Floor:
    """The provider, a gateway for each mode, and the results of all cases under way; for clients of one format."""

    def __init__(self, provider: Provider, make_gateway: Callable[..., Gateway], client: str) -> None:
        self.provider = provider
        self.client = client
        entries: dict[str, Any] = {}
        aliases: dict[str, list[str]] = {}

        def add(name: str, url: str, timeouts: dict[str, float] = TIMEOUTS, preset: str = "", wire: str = "chat") -> None:
            entries[name] = entry(url, name, timeouts, preset, wire)

        def pair(name: str, url: str, b: Script | None = None, timeouts: dict[str, float] = TIMEOUTS, preset: str = "", wire: str = "chat") -> None:
            add(f"{name}-a", url, timeouts, preset, wire)
            add(f"{name}-b", provider.script(f"{name}-b", b or healthy(B_TEXT)), TIMEOUTS if timeouts is TIMEOUTS and b else PATIENT)
            aliases[name] = [f"{name}-a", f"{name}-b"]

        for case in cases_for(client):
            provider.scripts[f"{case.name}-a"] = case.script
            pair(case.name, (case.reach or Provider.listen)(provider, f"{case.name}-a"), None, case.timeouts, case.preset, case.wire)
        for broken in breaks_for(client):
            name = f"mid-{broken.id}"
            pair(name, provider.listen(f"{name}-a", break_script(broken, name)), None, STALLING, wire=broken.wire)
        for mode in MODES:              # a provider for each mode, where it matters how often one is asked
            for name, (script, _) in IN_A_ROW.items():
                pair(f"row-{name}-{mode}", provider.listen(f"row-{name}-{mode}-a", script))
            for name, script in RECOVERING.items():
                pair(f"{name}-{mode}", provider.listen(f"{name}-{mode}-a", in_turn(script, healthy(A_TEXT))))
            for name in PER_MODE:
                add(f"{name}-{mode}", provider.listen(f"{name}-{mode}", PER_MODE[name]()), PATIENT)
        for name, (a, b, _, _) in ALL_FAIL.items():
            pair(name, provider.listen(f"{name}-a", a), b)
        for name, (script, timeouts) in ALONE.items():
            add(name, provider.listen(name, script), timeouts)
        aliases |= {name[:-2]: [name, f"{name[:-2]}-b"] for name in ALONE if name.endswith("-a")}
        models = {**entries, "carousel": {"aliases": aliases, "fallback": "same-model", "maxAttempts": 6, "maxWait": 0}}
        self.gateways = {mode: make_gateway(models, {"FAKE_KEY": FAKE_KEY}, {"SSL_CERT_FILE": str(TLS / "ca.pem")}) for mode in MODES}
        self.n_sockets_before = self.n_sockets()
        self.futures: dict[str, Future[Any]] = {}

    def post(self, name: str, mode: str, **fields: Any) -> Reply:
        """One request, answered whole."""
        return self.gateways[mode].post(PATHS[self.client], ask(self.client, name, mode == "stream", **fields))

    def start(self, name: str, mode: str, receive_buffer: int = 0) -> Client:
        """A client that has asked and not read yet."""
        gateway = self.gateways[mode]
        connection = gateway.connect(receive_buffer)
        connection.send(gateway.request_bytes("POST", PATHS[self.client], ask(self.client, name, mode == "stream")))
        return connection

    def run_case(self, case: Case, mode: str) -> Result:
        """Asks once, and reads the cooldowns before they end."""
        return self.result(case.name, mode, self.post(case.name, mode))

    def run_break(self, broken: Break) -> Result:
        """Asks, lets A break once its words have come, reads the rest."""
        name = f"mid-{broken.id}"
        with self.start(name, "stream") as client:
            client.read_until(b'" words"')
            self.provider.release(name)
            return self.result(name, "stream", client.read_all())

    def run_early(self, name: str) -> Any:
        """A streamed request to a slow provider; the client itself, with the times of arrival."""
        client = self.start(name, "stream")
        client.read_all()
        return client

    def run_recovery(self, name: str, mode: str) -> list[tuple[float, str]]:
        """Asks until A serves again: the answers and when each was there."""
        began, seen = time.monotonic(), [(0.0, "")]
        while seen[-1][1] != A_TEXT and seen[-1][0] < 25:
            seen.append((time.monotonic() - began, self.told(self.post(f"{name}-{mode}", mode)).text))
            time.sleep(0.1)         # asks again and again; the wait only spares the machine
        return seen[1:]

    def n_sockets(self) -> int:
        """How many sockets both gateways have open, on Linux; the files of the database come and go."""
        found = 0
        for gateway in self.gateways.values():
            for entry in Path(f"/proc/{gateway.pid}/fd").iterdir():
                with contextlib.suppress(OSError):          # closed meanwhile
                    found += os.readlink(entry).startswith("socket:")
        return found

    @staticmethod
    def n_threads(gateway: Gateway) -> int:
        """How many threads a gateway has, on Linux."""
        return len(os.listdir(f"/proc/{gateway.pid}/task"))

    def told(self, reply: Reply) -> answers.Said:
        """What the client understands of a good answer."""
        if self.client != "chat":
            return answers.read(self.client, reply)
        return answers.Said(reply.text, stop=reply.finish)

    def result(self, name: str, mode: str, reply: Reply) -> Result:
        rows = {row["name"]: row["cooling"] for row in self.gateways[mode].health()["providers"]}
        asked = [sum(request.streamed == (mode == "stream") for request in self.provider.calls(f"{name}-{side}")) for side in "ab"]
        logged = re.search(rf"attempt\.failed req={reply.headers.get('x-aicarousel-request-id')} .* cools=(\w*)", self.gateways[mode].log)
        return Result(reply, rows[f"{name}-a"], rows[f"{name}-b"], *asked, logged[1] if logged else "")


@pytest.fixture(scope="module")
def floor(request: pytest.FixtureRequest, module_provider: Provider, module_gateway_factory: Callable[..., Gateway]) -> Iterator[Floor]:
    """The floor, with the selected cases under way: the slowest first, the heavy ones last and alone."""
    floor = Floor(module_provider, module_gateway_factory, request.module.CLIENT)
    light: list[tuple[str, Callable[[], Any]]] = []
    heavy: list[tuple[str, Callable[[], Any]]] = []
    for item in request.session.items:
        chosen = getattr(item, "callspec", None)
        values = chosen.params if chosen and item.path == request.path else {}
        if "case" in values:
            case, mode = values["case"], values["mode"]
            (heavy if case.heavy else light).append((f"{case.name}-{mode}", lambda case=case, mode=mode: floor.run_case(case, mode)))
        elif "broken" in values:
            broken = values["broken"]
            (heavy if broken.heavy else light).append((f"mid-{broken.id}", lambda broken=broken: floor.run_break(broken)))
        elif "early" in values:
            light.insert(0, (values["early"], lambda name=values["early"]: floor.run_early(name)))
        elif "recovering" in values:
            name, mode = values["recovering"], values["mode"]
            light.insert(0, (f"{name}-{mode}", lambda name=name, mode=mode: floor.run_recovery(name, mode)))
    with ThreadPoolExecutor(12) as pool, ThreadPoolExecutor(1) as alone:
        floor.futures |= {name: pool.submit(job) for name, job in light}
        under_way = list(floor.futures.values())
        alone.submit(lambda: [future.exception() for future in under_way])
        floor.futures |= {name: alone.submit(job) for name, job in heavy}
        yield floor
        pool.shutdown(cancel_futures=True)
        alone.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- what must hold

CLEAN_WORDS = (FAKE_KEY.encode(), b"set-cookie", b"access-control", b"secret", b"POISON", b"poison", b"127.0.0.1", b"Traceback")
END_MARKS = {"chat": (b"[DONE]",), "messages": (b'"message_stop"', b'"message_delta"'), "responses": (b'"response.completed"', b'"response.incomplete"')}
#: The type of an error by its status, where the format says it so.
MESSAGES_TYPES = {400: "invalid_request_error", 404: "not_found_error", 413: "request_too_large", 422: "invalid_request_error", 429: "rate_limit_error", 500: "api_error", 502: "api_error",
                  503: "overloaded_error", 504: "timeout_error", 529: "overloaded_error"}


def check_cooldown(result: Result, scopes: tuple[str, ...]) -> None:
    """A's cooldowns are of one of `scopes`, "" meaning that there are none; one of a second may be over by now and is in the log."""
    found = {row["scope"] for row in result.cooling_a} or {result.logged}
    assert found <= set(scopes), f"cooling {result.cooling_a}, logged {result.logged!r}, expected scope {scopes}"


def check_clean(reply: Reply) -> None:
    """Nothing of the provider's private side shows."""
    for word in CLEAN_WORDS:
        assert word not in reply.raw, f"{word!r} in {reply.raw[:2000]!r}"


def check_whole(floor: Floor, reply: Reply, texts: tuple[str, ...], streamed: bool) -> answers.Said:
    """One complete answer in the form that was asked for; what it says."""
    assert reply.status == 200, (reply.status, reply.body[:2000])
    assert reply.streamed == streamed, reply.headers
    assert reply.complete and reply.ended == "eof", f"not ended properly ({reply.ended}): {reply.raw[-300:]!r}"
    said = floor.told(reply)
    assert said.text in texts, f"{said.text[:300]!r} is none of {[text[:100] for text in texts]}"
    assert not said.error and b'"error":{' not in reply.body, reply.raw[-500:]
    if floor.client != "chat":          # a Chat provider's own bytes are as odd as they came
        assert answers.faults(floor.client, replace(reply, body=reply.body.replace(PING, b""))) == []
    assert "content-encoding" not in reply.headers
    check_clean(reply)
    return said


def check_error(client: str, error: Any) -> str:
    """An error as the format has it, in a body or in its event; its message."""
    assert isinstance(error, dict) and isinstance(error["message"], str) and error["message"], error
    if client == "messages":
        assert error["type"] in MESSAGES_TYPES.values(), error
    else:
        assert isinstance(error["type"], str) and "param" in error and isinstance(error["code"], (str, type(None))), error
    return error["message"]


def check_error_body(client: str, reply: Reply) -> dict[str, Any]:
    """An error as a whole answer; what it says."""
    assert reply.headers["content-type"].startswith("application/json") and reply.complete
    body = reply.json
    assert client != "messages" or body["type"] == "error" and body["error"]["type"] == MESSAGES_TYPES[reply.status], (reply.status, body)
    assert body.get("request_id") == (reply.headers.get("x-aicarousel-request-id") if client == "messages" else None)
    check_error(client, body["error"])
    check_clean(reply)
    return body["error"]


def check_broken_off(client: str, reply: Reply, text: str) -> str:
    """`text`, then one error event as the last one, no end mark, a proper end of the body; the error's message."""
    assert reply.status == 200 and reply.streamed
    assert reply.complete and reply.ended == "eof", f"not ended properly ({reply.ended}): {reply.raw[-300:]!r}"
    seen = read_stream(client, reply)
    assert seen.text == text and not seen.ended and not reply.done, reply.raw
    assert len(seen.errors) == 1 and not seen.after_error, reply.raw
    for mark in END_MARKS[client]:
        assert mark not in reply.body, reply.raw
    name, last = answers.frames(reply)[-1]
    check_clean(reply)
    if client == "responses":
        assert name == last["type"] == "response.failed" and last["response"]["status"] == "failed", last
        assert isinstance(last["response"]["error"]["code"], str)
        return last["response"]["error"]["message"]
    assert name == ("error" if client == "messages" else "") and (client == "chat" or last["type"] == "error"), (name, last)
    assert last.get("request_id") == (reply.headers["x-aicarousel-request-id"] if client == "messages" else None)
    return check_error(client, last["error"])


def check_next(floor: Floor, case: Case, result: Result, streamed: bool) -> None:
    """B's whole answer, A asked once and left out for the right reason."""
    reply = result.reply
    said = check_whole(floor, reply, (B_TEXT,), streamed)
    assert said.stop == "stop" and (reply.done or not streamed or floor.client != "chat")
    assert b"first provider" not in reply.body
    assert reply.headers["x-aicarousel-provider"] == f"{case.name}-b"
    assert reply.headers["x-aicarousel-model"] == f"m-{case.name}-b"
    assert reply.headers["x-aicarousel-attempts"] == "2"
    assert reply.headers["x-aicarousel-request-id"]
    assert result.asked_b == 1 and result.asked_a == (0 if case.reach else 1) or case.hangs and not result.asked_a, "on a busy machine the time may be over before A has read its request"
    check_cooldown(result, case.scopes)
    assert result.cooling_b == []
    assert reply.elapsed_s < sum((case.timeouts if case.heavy else TIMEOUTS).values()) + 3.5
    for row in result.cooling_a:
        assert row["kind"] and row["reason"] and row["key"]
        if case.until_s:
            assert case.until_s[0] <= row["until_s"] <= case.until_s[1], row
        if case.proven is not None:
            assert row["proven"] is case.proven, row


def check_kept(floor: Floor, case: Case, result: Result, streamed: bool) -> None:
    """A's whole answer, odd as it came."""
    said = check_whole(floor, result.reply, (case.text,), streamed)
    assert result.reply.headers["x-aicarousel-provider"] == f"{case.name}-a"
    assert (result.asked_a, result.asked_b) == (1, 0)
    assert result.cooling_a == []
    assert said.stop or not streamed or case.name == "stream-done-without-finish"


def check_either(floor: Floor, case: Case, result: Result, streamed: bool) -> None:
    """A's whole answer, or B's."""
    check_whole(floor, result.reply, (case.text, B_TEXT), streamed)
    assert result.asked_a == 1


def check_refused(floor: Floor, case: Case, result: Result, streamed: bool) -> None:
    """The provider's complaint about the request, in the client's form, after exactly one call."""
    reply = result.reply
    assert reply.status == case.status, (reply.status, reply.body[:2000])
    message = check_error_body(floor.client, reply)["message"]
    assert case.says in message and "<" not in message
    assert (result.asked_a, result.asked_b) == (1, 0)
    assert result.cooling_a == [] == result.cooling_b


PING = b'event: ping\ndata: {"type":"ping"}\n\n'         # SDKs pass over it; their types do not know it
CHECKS = {"next": check_next, "whole": check_kept, "either": check_either, "refused": check_refused}
#: How each format says that a slow answer is still to come.
SIGNS = {"chat": b": keep-alive\n\n", "messages": b"event: ping\n", "responses": b"event: response.in_progress\n"}


@pytest.mark.parametrize("early", ["early", "late"])
def test_slow_provider_keeps_the_client_posted(floor: Floor, early: str) -> None:
    """Silence turns into keep-alives within 5 s; then comes B's answer, or the error as an event."""
    connection = floor.futures[early].result()
    reply = connection.reply()
    assert connection.arrivals[0][0] - connection.began < 5.5
    assert SIGNS[floor.client] in reply.body
    if early == "early":
        assert check_whole(floor, reply, (B_TEXT,), True).stop == "stop"
    else:
        check_broken_off(floor.client, reply, "")
        rows = answers.frames(reply)[-1][1].get("error", {}).get("attempts", [])
        assert [row["provider"] for row in rows] == ([] if floor.client == "responses" else ["late-a", "late-b"]), "its response.failed has no room for them"


def test_before_commit(floor: Floor, case: Case, mode: str) -> None:
    """Each fault that comes before any content leads where its row says."""
    CHECKS[case.outcome](floor, case, floor.futures[f"{case.name}-{mode}"].result(), mode == "stream")


def test_after_commit(floor: Floor, broken: Break) -> None:
    """Everything that came, then one error event, a proper end of the body, and never an end mark."""
    result = floor.futures[f"mid-{broken.id}"].result()
    assert broken.says in check_broken_off(floor.client, result.reply, SEEN)
    closes = {"messages": b"content_block_stop", "responses": b"response.output_item.done"}.get(floor.client)
    assert not closes or "after-the-block" in broken.name or closes not in result.reply.body, "what was open stays open: it is not whole"
    assert (result.asked_a, result.asked_b) == (1, 0)
    check_cooldown(result, broken.scopes)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A row per case, for the tests that take one."""
    client = metafunc.module.CLIENT
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case,mode", [pytest.param(case, mode, id=f"{case.name}-{mode}") for case in cases_for(client) for mode in case.modes])
    elif "broken" in metafunc.fixturenames:
        metafunc.parametrize("broken", [pytest.param(broken, id=broken.id) for broken in breaks_for(client)])
    elif "mode" in metafunc.fixturenames and "floor" in metafunc.fixturenames:
        metafunc.parametrize("mode", MODES)


# ---------------------------------------------------------------- when nothing works, and what is remembered

@pytest.mark.parametrize("name", ALL_FAIL)
def test_when_all_fail(floor: Floor, name: str, mode: str) -> None:
    """The status tells what went wrong with all of them, never the provider's 401; the attempts are listed without secrets."""
    _, _, statuses, kind = ALL_FAIL[name]
    reply = floor.post(name, mode)
    assert reply.status in ((529,) if (name, floor.client) == ("all-overloaded", "messages") else statuses), (reply.status, reply.body)
    error = check_error_body(floor.client, reply)
    assert not kind or floor.client == "messages" or error["type"] == kind
    rows = error["attempts"]
    assert [row["provider"] for row in rows] == [f"{name}-a", f"{name}-b"]
    assert all(row["model"] == f"m-{row['provider']}" and row["reason"] and row["ms"] >= 0 and "status" in row for row in rows)
    assert b"http://" not in reply.body and b"<html" not in reply.body.lower()
    if name == "all-429":
        assert 30 <= int(reply.headers["retry-after"]) <= 40


@pytest.mark.parametrize("name", IN_A_ROW)
def test_six_requests_in_a_row(floor: Floor, name: str, mode: str) -> None:
    """A provider that has failed is left alone: six requests, all answered, and A asked no more often than its row says."""
    at_most = IN_A_ROW[name][1]
    replies = [floor.post(f"row-{name}-{mode}", mode) for _ in range(6)]
    assert [floor.told(reply).text for reply in replies] == [B_TEXT] * 6
    assert 1 <= len(floor.provider.calls(f"row-{name}-{mode}-a")) <= at_most


@pytest.mark.parametrize("recovering", RECOVERING)
def test_recovery(floor: Floor, recovering: str, mode: str) -> None:
    """A provider that is well again is asked again within 25 s, and every request meanwhile was answered by B."""
    seen = floor.futures[f"{recovering}-{mode}"].result()
    assert seen[0][1] == B_TEXT and seen[-1][1] == A_TEXT
    assert {text for _, text in seen[:-1]} == {B_TEXT}
    assert len(floor.provider.calls(f"{recovering}-{mode}-a")) == 2
    assert floor.gateways[mode].cooling(f"{recovering}-{mode}-a") == []
    if recovering == "back-429-with-time":
        assert seen[-1][0] > 1.5


def test_a_lone_provider_is_asked_once_more(floor: Floor, mode: str) -> None:
    """A server error with nothing else left gets a second try; cooling is no reason to refuse when there is no other."""
    provider = floor.provider
    assert floor.told(floor.post(f"again-{mode}", mode)).text == A_TEXT
    assert len(provider.calls(f"again-{mode}")) == 2
    first = floor.post(f"sole-{mode}", mode)
    n_first = len(provider.calls(f"sole-{mode}"))
    second = floor.post(f"sole-{mode}", mode)
    assert {first.status, second.status} <= {500, 502, 503}
    assert n_first == 2 < len(provider.calls(f"sole-{mode}"))


def test_a_refused_field_is_left_out_and_remembered(floor: Floor, mode: str) -> None:
    """A 400 that names one unsupported field costs one more call, once."""
    first, second = (floor.post(f"repair-{mode}", mode, top_p=0.5) for _ in range(2))
    assert (floor.told(first).text, floor.told(second).text) == (A_TEXT, A_TEXT)
    assert ["top_p" in request.json for request in floor.provider.calls(f"repair-{mode}")] == [True, False, False]
    assert floor.gateways[mode].cooling(f"repair-{mode}") == []


# ---------------------------------------------------------------- connections that are kept

@pytest.mark.parametrize("name", ["stale-close", "stale-reset", "stale-idle"])
def test_connection_closed_between_requests(floor: Floor, name: str, mode: str) -> None:
    """A provider that hangs up just as the next request arrives, or while idle: 8 of 8 answered, nothing cools."""
    replies = [floor.post(name, mode) for _ in range(8)]
    assert [floor.told(reply).text for reply in replies] == [A_TEXT] * 8
    assert [reply.headers["x-aicarousel-attempts"] for reply in replies] == ["1"] * 8
    assert floor.gateways[mode].cooling(name) == []


@pytest.mark.parametrize("name", ["unasked-at-once", "unasked-later"])
def test_unasked_answer_is_never_delivered(floor: Floor, name: str, mode: str) -> None:
    """A second response left in a kept connection belongs to nobody."""
    provider, replies = floor.provider, []
    for _ in range(4):
        n_poisoned = provider.paused.count(f"{name} sent")
        replies.append(floor.post(name, mode))
        provider.release(name)
        provider.wait_paused(f"{name} sent", n_poisoned + 1)
        floor.gateways[mode].get("/health")          # once this is answered, the gateway has seen what came before it
    assert [(floor.told(reply).text, reply.headers["x-aicarousel-attempts"]) for reply in replies] == [(A_TEXT, "1")] * 4


# ---------------------------------------------------------------- clients that leave or do not read

LEAVING = {"leave-streaming": ("stream",), "leave-stalled": ("stream",), "leave-waiting": MODES, "leave-in-body": MODES}


@pytest.mark.parametrize("leave", ["close", "reset"])
@pytest.mark.parametrize(("name", "way"), [(name, way) for name, ways in LEAVING.items() for way in ways])
def test_client_leaving_cancels_the_provider(floor: Floor, name: str, way: str, leave: str) -> None:
    """The provider's connection is closed within a second, and the provider is not blamed."""
    before = len(floor.provider.calls(name))
    client = floor.start(name, way)
    connection = floor.provider.wait_calls(name, before + 1)[before].connection
    if name in ("leave-streaming", "leave-stalled"):
        client.read_until(b"word")
    assert connection.closed_at is None
    getattr(client, leave)()
    assert floor.provider.wait_closed(connection, 1.0)
    assert connection.closed_by == "peer"
    assert floor.gateways[way].cooling(name) == []


def test_client_that_stops_reading_holds_the_provider_back(floor: Floor) -> None:
    """A firehose waits in the provider, not in the gateway's memory."""
    gateway = floor.gateways["stream"]
    with floor.start("firehose", "stream", receive_buffer=16384) as client:
        client.read_until(b"xxxx")
        connection = floor.provider.links("firehose")[-1]
        before, sent, still_since = gateway.rss_bytes(), -1, time.monotonic()
        deadline = still_since + 10
        while time.monotonic() < min(deadline, still_since + 1.0):
            if connection.n_sent != sent:
                sent, still_since = connection.n_sent, time.monotonic()
            time.sleep(0.02)
        assert time.monotonic() < deadline, f"the provider was never held back, {connection.n_sent} bytes sent"
        assert gateway.rss_bytes() - before < 32 << 20
        assert gateway.health()["providers"]
    assert floor.provider.wait_closed(connection, 1.0)


# ---------------------------------------------------------------- afterwards

def test_afterwards_nothing_is_left_open(floor: Floor) -> None:
    """What is open now and was not at the start are connections that wait for the next request, each known to its provider; no thread for each of them."""
    def n_left() -> int:
        parked = sum(connection.closed_at is None for connection in floor.provider.connections)
        return floor.n_sockets() - floor.n_sockets_before - parked
    ends_at = time.monotonic() + 5
    while abs(n_left()) > 10 and time.monotonic() < ends_at:
        time.sleep(0.05)                # the provider hears of a close a moment later
    assert abs(n_left()) <= 10
    assert all(floor.n_threads(gateway) <= 12 for gateway in floor.gateways.values())


def test_afterwards_all_is_well(floor: Floor, mode: str) -> None:
    """After everything above: healthy, no traceback, no secret in the log, and a proper end on SIGTERM."""
    gateway = floor.gateways[mode]
    assert gateway.get("/health", key="").status == 200
    assert floor.told(floor.post("stale-close", mode)).text == A_TEXT
    assert gateway.stop() == 0
    assert "Traceback" not in gateway.log, gateway.log[gateway.log.index("Traceback"):][:3000]
    for secret in (FAKE_KEY, gateway.key, "org_01abcdef"):
        assert secret not in gateway.log
    assert not re.search(r"Task (exception|was destroyed)|never retrieved", gateway.log)
