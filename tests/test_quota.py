"""Section 7 and what section 7 makes of it: every style of telling limits leads to the right window, and room follows from what is counted."""
from __future__ import annotations

import json
import random
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

import aicarousel
from aicarousel import (Bucket, Facts, Ledger, Plan, Route, RoutingState, Window, begin_attempt, build_catalogue, cap_answer, classify, clear, cool, cooldown_rows, feed, find_buckets,
                        find_shortage, learn_refusal, ledger_rows, load_config, load_cooldowns, load_ledger, note_served, plan, prepare_ledger, read_limits, read_refusal, release, reserve, resolve,
                        settle, share_left, tell_shortage)

Json = dict[str, Any]
UTC = datetime(2026, 11, 20, 12, 0, 0, tzinfo=timezone.utc).timestamp()
DAY = 86_400.0
INF = float("inf")


def entry(*models: Any, **fields: Any) -> Json:
    first = models[0]["id"] if isinstance(models[0], dict) else models[0]
    return {"baseUrl": "http://127.0.0.1:9/v1", "default": first, "enableFallback": True, "models": list(models), "keys": ["env:KEY_1"], **fields}


def config_of(models: Json, **carousel: Any) -> aicarousel.Config:
    environment = {f"KEY_{number}": f"fake-key-number-{number}" for number in range(1, 6)}
    return load_config(json.dumps({**models, **({"carousel": carousel} if carousel else {})}), models_path="models.json", environment=environment, dotenv={}, flags={})


class Pool:
    """A configuration with its state, and shorthands for what the relay does."""

    def __init__(self, models: Json, *, strategy: str = "round-robin") -> None:
        self.config, self.strategy = config_of(models), strategy
        self.catalogue, self.state = build_catalogue(self.config), RoutingState()
        self.ledger, self.choice = self.state.ledger, resolve(self.catalogue, None)
        prepare_ledger(self.ledger, self.config.active, utc_less_now=UTC)

    def routes(self) -> list[Route]:
        return [route for group in self.choice.groups for routes in group for route in routes]

    def plan(self, now: float = 0.0, *, facts: Facts = Facts(), give_up_at: float = 0.0, name: str | None = None) -> Plan:
        choice = resolve(self.catalogue, name)
        return plan(self.catalogue, choice, self.state, now, strategy=self.strategy, fallback="chain", facts=facts, give_up_at=give_up_at)

    def go(self, now: float, facts: Facts = Facts(), *, used: tuple[int, int] | None = None, first_ms: float = 100.0) -> str:
        """One request that is served at once: the provider that served."""
        route = self.plan(now, facts=facts).routes[0]
        begin_attempt(self.state, self.choice, route)
        hold = reserve(self.ledger, route, facts.n_input, facts.n_output, now)
        clear(self.state, route)
        note_served(self.state, route, facts, first_ms, now)
        settle(self.ledger, hold, *(used or (facts.n_input, facts.n_output)), now)
        return route.credential.id


def pool_of(preset: str, **fields: Any) -> tuple[Pool, Route, Bucket]:
    """One provider with this preset, its route and its bucket."""
    pool = Pool({"p": entry("m", preset=preset, **fields)} if preset else {"p": entry("m", **fields)})
    route = pool.routes()[0]
    return pool, route, find_buckets(pool.ledger, route)[0]


def window_of(bucket: Bucket, measure: str, span_s: float) -> Window:
    return next(window for window in bucket.windows if (window.measure, window.span_s) == (measure, span_s))


# ------------------------------------------------------------------ headers

HEADERS: list[tuple[str, str, Json, list[tuple[str, float, float, float, float | None]]]] = [    # what, preset, headers, (measure, span, limit, left, reset)
    ("groq: requests a day, tokens a minute", "groq", {
        "x-ratelimit-limit-requests": "1000", "x-ratelimit-remaining-requests": "998", "x-ratelimit-reset-requests": "2m52.8s",
        "x-ratelimit-limit-tokens": "8000", "x-ratelimit-remaining-tokens": "6979", "x-ratelimit-reset-tokens": "7.66s"},
     [("requests", DAY, 1000, 998, 172.8), ("tokens", 60, 8000, 6979, 7.66)]),
    ("openai: a minute, by how soon it is full again", "openai", {
        "x-ratelimit-limit-requests": "5000", "x-ratelimit-remaining-requests": "4999", "x-ratelimit-reset-requests": "12ms",
        "x-ratelimit-limit-tokens": "2000000", "x-ratelimit-remaining-tokens": "1999990", "x-ratelimit-reset-tokens": "0s"},
     [("requests", 60, 5000, 4999, 0.012), ("tokens", 60, 2_000_000, 1_999_990, 0.0)]),
    ("openai: a day, by the same sign", "openai", {"x-ratelimit-limit-requests": "10000", "x-ratelimit-remaining-requests": "9999", "x-ratelimit-reset-requests": "8.64s"},
     [("requests", DAY, 10_000, 9999, 8.64)]),
    ("cerebras: the name says the span", "cerebras", {
        "x-ratelimit-limit-requests-day": "14400", "x-ratelimit-remaining-requests-day": "14399", "x-ratelimit-reset-requests-day": "33011.382867097855",
        "x-ratelimit-limit-tokens-minute": "30000", "x-ratelimit-remaining-tokens-minute": "29000", "x-ratelimit-reset-tokens-minute": "11.382867097855",
        "x-ratelimit-limit-tokens-hour": "1000000", "x-ratelimit-remaining-tokens-hour": "999000"},
     [("requests", DAY, 14_400, 14_399, 33011.38), ("tokens", 60, 30_000, 29_000, 11.38), ("tokens", 3600, 1_000_000, 999_000, None)]),
    ("openrouter: milliseconds since 1970, a day", "openrouter", {"x-ratelimit-limit": "50", "x-ratelimit-remaining": "7", "x-ratelimit-reset": f"{(UTC + 43_200) * 1000:.0f}"},
     [("requests", DAY, 50, 7, 43_200)]),
    ("openrouter: the same, a minute", "openrouter", {"x-ratelimit-limit": "20", "x-ratelimit-remaining": "0", "x-ratelimit-reset": f"{(UTC + 41) * 1000:.0f}"},
     [("requests", 60, 20, 0, 41)]),
    ("anthropic: four windows, RFC 3339", "anthropic", {
        "anthropic-ratelimit-requests-limit": "4000", "anthropic-ratelimit-requests-remaining": "3999", "anthropic-ratelimit-requests-reset": "2026-11-20T12:00:01Z",
        "anthropic-ratelimit-input-tokens-limit": "2000000", "anthropic-ratelimit-input-tokens-remaining": "1900000", "anthropic-ratelimit-input-tokens-reset": "2026-11-20T12:00:03Z",
        "anthropic-ratelimit-output-tokens-limit": "400000", "anthropic-ratelimit-output-tokens-remaining": "400000",
        "anthropic-ratelimit-output-tokens-reset": "2026-11-20T12:00:00Z",
        "anthropic-ratelimit-tokens-limit": "2400000", "anthropic-ratelimit-tokens-remaining": "2300000", "anthropic-ratelimit-tokens-reset": "2026-11-20T12:00:03Z"},
     [("requests", 60, 4000, 3999, 1.0), ("input", 60, 2_000_000, 1_900_000, 3.0), ("output", 60, 400_000, 400_000, 0.0), ("tokens", 60, 2_400_000, 2_300_000, 3.0)]),
    ("mistral: req, and spans of its own", "mistral", {
        "x-ratelimit-limit-req-minute": "100", "x-ratelimit-remaining-req-minute": "99", "x-ratelimit-limit-req-10-second": "20", "x-ratelimit-remaining-req-10-second": "19",
        "x-ratelimit-limit-tokens-minute": "100000", "x-ratelimit-remaining-tokens-minute": "99000", "x-ratelimit-limit-tokens-month": "1000000000",
        "x-ratelimit-remaining-tokens-month": "999000000", "x-ratelimit-tokens-query-cost": "32"},
     [("requests", 60, 100, 99, None), ("requests", 10, 20, 19, None), ("tokens", 60, 100_000, 99_000, None), ("tokens", 30 * DAY, 10 ** 9, 999_000_000, None)]),
    ("mistral: the older names", "mistral", {"ratelimitbysize-limit-minute": "500000", "ratelimitbysize-remaining-minute": "499000"}, [("tokens", 60, 500_000, 499_000, None)]),
    ("xai: no reset", "xai", {"x-ratelimit-limit-requests": "1800", "x-ratelimit-remaining-requests": "1799", "x-ratelimit-limit-tokens": "10000000",
                              "x-ratelimit-remaining-tokens": "10000000"},
     [("requests", 60, 1800, 1799, None), ("tokens", 60, 10 ** 7, 10 ** 7, None)]),
    ("together: a few seconds", "together", {"x-ratelimit-limit": "2", "x-ratelimit-remaining": "1", "x-ratelimit-reset": "2", "x-tokenlimit-limit": "5000", "x-tokenlimit-remaining": "4000"},
     [("requests", 10, 2, 1, 2.0), ("tokens", 60, 5000, 4000, None)]),
    ("fireworks", "fireworks", {"x-ratelimit-limit-requests": "600", "x-ratelimit-remaining-requests": "599", "x-ratelimit-over-limit": "no"}, [("requests", 60, 600, 599, None)]),
    ("sambanova: seconds since 1970", "sambanova", {
        "x-ratelimit-limit-requests": "20", "x-ratelimit-remaining-requests": "19", "x-ratelimit-reset-requests": f"{UTC + 60:.0f}",
        "x-ratelimit-limit-requests-day": "20", "x-ratelimit-remaining-requests-day": "3", "x-ratelimit-reset-requests-day": f"{UTC + 43_200:.0f}"},
     [("requests", 60, 20, 19, 60.0), ("requests", DAY, 20, 3, 43_200.0)]),
    ("azure: the period stands in a header", "", {
        "x-ratelimit-limit-requests": "250", "x-ratelimit-remaining-requests": "249", "x-ratelimit-renewalperiod-requests": "10", "x-ratelimit-reset-requests": "0"},
     [("requests", 10, 250, 249, 0.0)]),
    ("azure: and its resets are milliseconds", "", {
        "x-ratelimit-limit-requests": "120", "x-ratelimit-remaining-requests": "119", "x-ratelimit-renewalperiod-requests": "60", "x-ratelimit-reset-requests": "500",
        "x-ratelimit-limit-tokens": "120000", "x-ratelimit-remaining-tokens": "119986", "x-ratelimit-renewalperiod-tokens": "60", "x-ratelimit-reset-tokens": "7"},
     [("requests", 60, 120, 119, 0.5), ("tokens", 60, 120_000, 119_986, 0.007)]),
    ("openai: a project's tokens, where they are fewer", "openai", {
        "x-ratelimit-limit-tokens": "150000", "x-ratelimit-remaining-tokens": "149000", "x-ratelimit-reset-tokens": "400ms",
        "x-ratelimit-limit-project-tokens": "20000", "x-ratelimit-remaining-project-tokens": "18000", "x-ratelimit-reset-project-tokens": "6s"},
     [("tokens", 60, 20_000, 18_000, 6.0)]),
    ("openai: a project's tokens, where the account's are fewer", "openai", {
        "x-ratelimit-limit-tokens": "150000", "x-ratelimit-remaining-tokens": "1000", "x-ratelimit-reset-tokens": "59.6s",
        "x-ratelimit-limit-project-tokens": "200000", "x-ratelimit-remaining-project-tokens": "18000", "x-ratelimit-reset-project-tokens": "54.6s"},
     [("tokens", 60, 150_000, 1000, 59.6)]),
    ("mistral: the oldest names, with a reset", "mistral", {"ratelimitbysize-limit": "500000", "ratelimitbysize-remaining": "307190", "ratelimitbysize-reset": "46", "ratelimitbysize-query-cost": "32010"},
     [("tokens", 60, 500_000, 307_190, 46.0)]),
    ("mistral: seconds of sound are no window of ours", "mistral", {
        "x-ratelimit-limit-audio-seconds-minute": "2000", "x-ratelimit-remaining-audio-seconds-minute": "1993", "x-ratelimit-limit-req-minute": "360", "x-ratelimit-remaining-req-minute": "358"},
     [("requests", 60, 360, 358, None)]),
    ("anthropic: before there were input and output", "anthropic", {
        "anthropic-ratelimit-requests-limit": "5", "anthropic-ratelimit-requests-remaining": "1", "anthropic-ratelimit-requests-reset": "2026-11-20T12:00:48Z",
        "anthropic-ratelimit-tokens-limit": "10000", "anthropic-ratelimit-tokens-remaining": "10000", "anthropic-ratelimit-tokens-reset": "2026-11-20T12:00:00Z"},
     [("requests", 60, 5, 1, 48.0), ("tokens", 60, 10_000, 10_000, 0.0)]),
    ("anybody: the draft of the IETF", "", {"ratelimit-limit": "100", "ratelimit-remaining": "50", "ratelimit-reset": "50"}, [("requests", 60, 100, 50, 50.0)]),
    ("anybody: a reset that is hours away is that of a day", "", {"x-ratelimit-limit-requests": "900", "x-ratelimit-remaining-requests": "1", "x-ratelimit-reset-requests": "20000"},
     [("requests", DAY, 900, 1, 20_000.0)]),
]


@pytest.mark.parametrize(("preset", "headers", "windows"), [row[1:] for row in HEADERS], ids=[row[0] for row in HEADERS])
def test_every_header_style_tells_its_windows(preset: str, headers: Json, windows: list[tuple[str, float, float, float, float | None]]) -> None:
    told = read_limits(preset or "custom", headers.items(), UTC)
    assert [(one.measure, one.span_s, one.limit, one.left) for one in told] == [row[:4] for row in windows]
    assert [one.reset_s for one in told] == [None if row[4] is None else pytest.approx(row[4], abs=0.01) for row in windows]
    pool, route, bucket = pool_of(preset)
    hold = reserve(pool.ledger, route, 10, 10, 0.0)
    feed(pool.ledger, route, headers.items(), 0.0, hold)
    for measure, span_s, limit, left, _ in windows:
        window = window_of(bucket, measure, span_s)
        assert (window.limit, window.origin, window.known_utc) == (limit, "header", UTC) and window in bucket.limited
        assert limit - window.used - window.held <= left, "never more room than was told"
    assert bucket.key == {"model": "route p/1:m", "account": "credential p/1"}[route.provider.preset.bucket]


JUNK: list[Json] = [
    {"x-ratelimit-limit-requests": "X-RATELIMIT-LIMIT-REQUESTS-XXX", "x-ratelimit-remaining-requests": "many"}, {"x-ratelimit-limit-requests": "0", "x-ratelimit-remaining-requests": "0"},
    {"x-ratelimit-limit-requests": "-5"}, {"x-ratelimit-limit-requests": "1e9"}, {"x-ratelimit-limit-requests": "9" * 15}, {"x-ratelimit-reset-requests": "12s"}, {"x-ratelimit-abusepenalty-active": "True"},
    {"x-ratelimit-limit-": "5"}, {"anthropic-ratelimit-unified-limit": "5"}, {"x-ratelimit-limit-requests": ""}, {"content-type": "x-ratelimit-limit-requests"},
]


@pytest.mark.parametrize("headers", JUNK, ids=[str(row)[:60] for row in JUNK])
def test_junk_in_headers_is_passed_over(headers: Json) -> None:
    pool, route, bucket = pool_of("")
    feed(pool.ledger, route, headers.items(), 0.0)
    assert bucket.limited == () and find_shortage(pool.ledger, route, 10 ** 6, 10 ** 6, 0.0) is None


def test_a_provider_cannot_make_windows_without_end() -> None:
    pool, route, bucket = pool_of("")
    for number in range(2, 200):
        feed(pool.ledger, route, [(f"x-ratelimit-limit-requests-{number}-second", "5"), (f"x-ratelimit-remaining-requests-{number}-second", "5")], 0.0)
    assert len(bucket.windows) == 16


# ------------------------------------------------------------------ refusals

GEMINI_DAY = {"error": {"code": 429, "message": "You exceeded your current quota, ... Please retry in 54.058356943s.", "status": "RESOURCE_EXHAUSTED", "details": [
    {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [{
        "quotaMetric": "generativelanguage.googleapis.com/generate_content_free_tier_requests", "quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier",
        "quotaDimensions": {"location": "global", "model": "gemini-2.5-flash-lite"}, "quotaValue": "20"}]},
    {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "54s"}]}}
GEMINI_MINUTE = json.loads(json.dumps(GEMINI_DAY).replace("PerDay", "PerMinute").replace('"20"', '"5"'))
GEMINI_TOKENS = json.loads(json.dumps(GEMINI_DAY).replace("GenerateRequestsPerDayPerProjectPerModel", "GenerateContentInputTokensPerModelPerMinute").replace('"20"', '"250000"'))


def said(message: str, **more: Any) -> Json:
    return {"error": {"message": message, **more}}


REFUSALS: list[tuple[str, str, int, Json, str, Json, list[tuple[str, float, float | None]], float | None]] = [
    # what, preset, status, headers, reason, body, windows named, the instant proven (s from now)
    ("groq tokens a day", "groq", 429, {}, "rate_day", said(
        "Rate limit reached for model 'x' on tokens per day (TPD): Limit 200000, Used 197050, Requested 3619. Please try again in 9m38.016s.", type="tokens", code="rate_limit_exceeded"),
     [("tokens", DAY, 200_000)], 578.016),
    ("groq requests a minute", "groq", 429, {"retry-after": "2"}, "rate_minute", said(
        "Rate limit reached for model 'x' on requests per minute (RPM): Limit 30, Used 30, Requested 1. Please try again in 2s.", type="requests", code="rate_limit_exceeded"),
     [("requests", 60, 30)], 2.0),
    ("groq larger than a minute", "groq", 413, {}, "request_over_tpm", said(
        "Request too large for model 'x' on tokens per minute (TPM): Limit 8000, Requested 34041, please reduce your message size", type="tokens", code="rate_limit_exceeded"),
     [("tokens", 60, 8000)], None),
    ("openai tokens a minute", "openai", 429, {"retry-after-ms": "4000"}, "rate_minute", said(
        "Rate limit reached for x on tokens per min (TPM): Limit 30000, Used 20000, Requested 12000. Please try again in 4s.", type="tokens", code="rate_limit_exceeded"),
     [("tokens", 60, 30_000)], 4.0),
    ("openai requests a day", "openai", 429, {}, "rate_day", said(
        "Rate limit reached for x on requests per day (RPD): Limit 200, Used 200, Requested 1. Please try again in 7m12s.", type="requests", code="rate_limit_exceeded"),
     [("requests", DAY, 200)], 432.0),
    ("gemini a day: midnight in California, whatever retryDelay says", "gemini", 429, {}, "rate_day", GEMINI_DAY, [("requests", DAY, 20)], 20 * 3600.0),
    ("gemini a minute", "gemini", 429, {}, "rate_minute", GEMINI_MINUTE, [("requests", 60, 5)], 54.06),
    ("gemini input tokens", "gemini", 429, {}, "rate_minute", GEMINI_TOKENS, [("input", 60, 250_000)], 54.06),
    ("cerebras requests", "cerebras", 429, {}, "rate_minute", {"message": "Requests per minute limit exceeded - too many requests sent.", "type": "too_many_requests_error",
                                                               "param": "quota", "code": "request_quota_exceeded"}, [("requests", 60, None)], None),
    ("cerebras tokens", "cerebras", 429, {"retry-after": "11"}, "rate_minute", {"message": "Tokens per minute limit exceeded - too many tokens processed.",
                                                                               "type": "too_many_tokens_error", "param": "quota", "code": "token_quota_exceeded"}, [("tokens", 60, None)], 11.0),
    ("openrouter's free day: the next midnight of UTC", "openrouter", 429, {}, "rate_day", said("Rate limit exceeded: free-models-per-day. Add 10 credits to unlock more", code=429),
     [("requests", DAY, None)], 12 * 3600.0),
    ("openrouter's free minute", "openrouter", 429, {}, "rate_minute", said("Rate limit exceeded: free-models-per-min.", code=429, metadata={"headers": {
        "X-RateLimit-Limit": "20", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": f"{(UTC + 33) * 1000:.0f}"}}), [("requests", 60, None)], 33.0),
    ("together", "together", 429, {}, "rate_minute", said("You have been rate limited. Your rate limit is 60 queries per minute.", type="credit_limit"), [("requests", 60, 60)], None),
    ("anthropic", "anthropic", 429, {"retry-after": "7"}, "rate_minute", {"type": "error", "error": {
        "type": "rate_limit_error", "message": "This request would exceed your organization's rate limit of 20000 input tokens per minute"}}, [("input", 60, 20_000)], 7.0),
    ("mistral says little", "mistral", 429, {}, "rate_minute", {"object": "error", "message": "Rate limit exceeded", "type": "rate_limited", "code": "1300"}, [("requests", 60, None)], None),
    ("sambanova says less", "sambanova", 429, {}, "rate_minute", said("Rate limit exceeded", type="rate_limit_exceeded"), [("requests", 60, None)], None),
    ("zai: Beijing time", "zai", 429, {}, "rate_day", {"error": {"code": "1308", "message": "Usage limit reached. Your limit will reset at 2026-11-21 20:06:00"}},
     [("requests", DAY, None)], 24 * 3600 + 360.0),
    ("nothing at all", "nvidia", 429, {}, "rate_minute", {}, [("requests", 60, None)], None),
]


@pytest.mark.parametrize(("preset", "status", "headers", "reason", "body", "windows", "proven_s"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS])
def test_every_refusal_finds_its_bucket_its_window_and_its_end(preset: str, status: int, headers: Json, reason: str, body: Json, windows: list[tuple[str, float, float | None]],
                                                              proven_s: float | None) -> None:
    pool, route, bucket = pool_of(preset)
    now, raw = 100.0, json.dumps(body).encode() if body else b""
    for _ in range(3):                                              # what counts so far
        settle(pool.ledger, reserve(pool.ledger, route, 100, 50, now), 100, 50, now)
    hold = reserve(pool.ledger, route, 100, 50, now)
    pool.ledger.utc_less_now = UTC - now
    failure = classify(preset, route.provider.preset.bucket, status, headers, raw, utc=UTC)
    release(pool.ledger, hold, now)
    learn_refusal(pool.ledger, route, failure, raw.decode(), now)
    cooldown = cool(pool.state, route, failure, now, jitter=0.5)
    assert failure.reason == reason and read_refusal(raw.decode(), reason) == windows
    for measure, span_s, limit in windows:
        window = window_of(bucket, measure, span_s)
        counted = {"requests": 3.0, "tokens": 450.0, "input": 300.0}[measure]
        assert (window.limit, window.origin) == ((limit, "refusal") if limit else (counted, "learned"))
    if reason == "request_over_tpm":
        assert cooldown is None and find_shortage(pool.ledger, route, 34_041, 0, now).at == INF, "never, for a request this large"       # type: ignore[union-attr]
        assert find_shortage(pool.ledger, route, 100, 0, now) is None
        return
    assert cooldown is not None and cooldown.key == bucket.key and cooldown.proven == (proven_s is not None)
    assert cooldown.until_at - now == pytest.approx(proven_s, abs=0.1) if proven_s else cooldown.until_at - now <= 600.0
    assert find_shortage(pool.ledger, route, 100, 50, now) is not None


GEMINI_PAID = {"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": (
    "You exceeded your current quota, please check your plan and billing details.\n* Quota exceeded for metric: generate_content_paid_tier_input_token_count, limit: 1000000, model: m\nPlease retry in 48.9s."),
    "details": [{"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [{
        "quotaMetric": "generativelanguage.googleapis.com/generate_content_paid_tier_input_token_count", "quotaId": "GenerateContentPaidTierInputTokensPerModelPerMinute",
        "quotaDimensions": {"model": "m", "location": "somewhere"}, "quotaValue": "1000000"}]}, {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "48s"}]}}
UPSTREAM = {"error": {"code": 429, "message": "Provider returned error", "metadata": {"provider_name": "Google", "raw": "m is temporarily rate-limited upstream. Please retry shortly."}}}
COPILOT_WEEK = said("Sorry, you've exceeded your weekly rate limit. Try again in 2 days.", code="user_weekly_rate_limited")
ACCOUNT, MODEL = "credential p/1", "route p/1:m"
#: Every form in which a time is told, and every refusal that names a limit by other means: preset, status, headers, body -> kind, reason, what cools, for how long (None: a guess of so many seconds at most).
TOLD: list[tuple[str, str, int, Json, Json | bytes, str, str, str, float | None]] = [
    ("seconds", "nvidia", 429, {"retry-after": "12"}, b"", "rate", "rate_minute", ACCOUNT, 12.0),
    ("parts of a second", "cerebras", 429, {"retry-after": "11.38"}, b"", "rate", "rate_minute", MODEL, 11.38),
    ("seconds to the day's end", "cerebras", 429, {"x-ratelimit-remaining-requests-day": "0", "x-ratelimit-reset-requests-day": "33011.382867097855"}, b"", "rate", "rate_minute", MODEL, 33011.38),
    ("together's seconds", "together", 429, {"x-ratelimit-limit": "2", "x-ratelimit-remaining": "0", "x-ratelimit-reset": "2"}, b"", "rate", "rate_minute", ACCOUNT, 2.0),
    ("mistral's seconds", "mistral", 429, {"ratelimitbysize-remaining": "0", "ratelimitbysize-reset": "46"}, b"", "rate", "rate_minute", ACCOUNT, 46.0),
    ("a date", "xai", 429, {"retry-after": "Fri, 20 Nov 2026 12:01:30 GMT"}, b"", "rate", "rate_minute", ACCOUNT, 90.0),
    ("milliseconds", "openai", 429, {"retry-after-ms": "1500", "retry-after": "1"}, b"", "rate", "rate_minute", MODEL, 1.5),
    ("azure, whose milliseconds are none", "", 429, {"retry-after": "1", "retry-after-ms": "0"}, said("Your requests to m in westeurope have exceeded rate limit.", code="RateLimitReached"),
     "rate", "rate_minute", ACCOUNT, 1.0),
    ("azure's reset", "", 429, {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "60000", "x-ratelimit-renewalperiod-requests": "60"}, b"", "rate", "rate_minute", ACCOUNT, 60.0),
    ("Go's span", "groq", 429, {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1h2m3s"}, b"", "rate", "rate_minute", MODEL, 3723.0),
    ("Go's span in words", "groq", 429, {}, said("Rate limit reached on tokens per day (TPD): Limit 200000, Used 197050, Requested 3619. Please try again in 9m38.016s."), "rate", "rate_day", MODEL, 578.016),
    ("RFC 3339", "anthropic", 429, {"anthropic-ratelimit-requests-remaining": "0", "anthropic-ratelimit-requests-reset": "2026-11-20T12:00:20Z"}, b"", "rate", "rate_minute", MODEL, 20.0),
    ("RFC 3339 beside the time to wait", "anthropic", 429, {"anthropic-ratelimit-tokens-remaining": "0", "anthropic-ratelimit-tokens-reset": "2026-11-20T12:00:50Z", "retry-after": "24"}, b"",
     "rate", "rate_minute", MODEL, 24.0),
    ("RFC 3339 in words", "minimax", 429, {}, {"type": "error", "error": {"type": "rate_limit_error", "message": "usage limit exceeded, 5-hour usage limit reached, resets at 2026-11-20T15:00:00Z (2056)"}},
     "rate", "rate_day", ACCOUNT, 3 * 3600.0),
    ("a span of protobuf", "gemini", 429, {}, GEMINI_MINUTE, "rate", "rate_minute", MODEL, 54.06),
    ("the same of a paid plan", "gemini", 429, {}, GEMINI_PAID, "rate", "rate_minute", MODEL, 48.9),
    ("a day of California", "gemini", 429, {}, GEMINI_DAY, "rate", "rate_day", MODEL, 20 * 3600.0),
    ("milliseconds since 1970", "openrouter", 429, {"x-ratelimit-limit": "20", "x-ratelimit-remaining": "0", "x-ratelimit-reset": f"{(UTC + 41) * 1000:.0f}"}, b"", "rate", "rate_minute", ACCOUNT, 41.0),
    ("the same inside the body", "openrouter", 429, {}, said("Rate limit exceeded: free-models-per-min.", code=429, metadata={"headers": {
        "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": f"{(UTC + 33) * 1000:.0f}"}}), "rate", "rate_minute", ACCOUNT, 33.0),
    ("a day of UTC", "openrouter", 429, {}, said("Rate limit exceeded: free-models-per-day.", code=429), "rate", "rate_day", ACCOUNT, 12 * 3600.0),
    ("a day of UTC, by its number", "cloudflare", 429, {}, {"errors": [{"code": 4006, "message": "you have used up your daily free allocation of 10,000 neurons"}]}, "rate", "rate_day", ACCOUNT, 12 * 3600.0),
    ("seconds since 1970", "sambanova", 429, {"x-ratelimit-remaining-requests-day": "0", "x-ratelimit-reset-requests-day": f"{UTC + 43_200:.0f}"}, b"", "rate", "rate_minute", None, 43_200.0),
    ("Beijing's time", "zai", 429, {}, {"error": {"code": "1308", "message": "Usage limit reached for 5 hour. Your limit will reset at 2026-11-21 20:06:00"}}, "rate", "rate_day", ACCOUNT, DAY + 360.0),
    ("words: days", "github-copilot", 429, {}, COPILOT_WEEK, "rate", "rate_day", ACCOUNT, 2 * DAY),
    ("words: seconds", "github-copilot", 429, {}, said("You've hit your global rate limit. Please wait 6 seconds before trying again.", code="user_global_rate_limited"), "rate", "rate_minute", ACCOUNT, 6.0),
    ("words: hours", "ollama-cloud", 429, {}, {"error": "you've reached your hourly usage limit, try again in 2 hours"}, "rate", "rate_day", ACCOUNT, 7200.0),
    ("a header of copilot's", "github-copilot", 429, {"x-ratelimit-user-retry-after": "33"}, b"", "rate", "rate_minute", ACCOUNT, 33.0),
    ("nothing", "deepseek", 429, {}, b"", "rate", "rate_minute", ACCOUNT, None),
    ("no more than that it was upstream", "openrouter", 429, {}, UPSTREAM, "server", "model_capacity", "model p:m", None),
    ("a tier that is full", "groq", 498, {}, said("", type="capacity", code="capacity_exceeded"), "rate", "tier_capacity", MODEL, None),
    ("a queue that is full", "cerebras", 429, {}, {"message": "We're experiencing high traffic right now!", "type": "too_many_requests_error", "param": "queue", "code": "queue_exceeded"},
     "server", "model_capacity", MODEL, None),
    ("overloaded, with a time", "anthropic", 529, {"retry-after": "8"}, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, "server", "model_capacity", MODEL, 8.0),
    ("a day's tokens", "moonshot", 429, {}, said("Your account x request reached organization TPD rate limit, current: 1500001", type="rate_limit_reached_error"), "rate", "rate_day", ACCOUNT, None),
    ("money", "openai", 429, {}, said("You exceeded your current quota, please check your plan and billing details.", type="insufficient_quota", code="insufficient_quota"), "payment", "billing", ACCOUNT, None),
    ("a plan without it", "gemini", 429, {}, said("limit: 0, model: m", code=429, status="RESOURCE_EXHAUSTED"), "model", "permission_model", MODEL, None),
    ("larger than a minute", "groq", 413, {"retry-after": "5"}, said("Request too large on tokens per minute (TPM): Limit 8000, Requested 34041", type="tokens", code="rate_limit_exceeded"),
     "fit", "request_over_tpm", "", None),
    ("larger than a minute, as 429", "openai", 429, {}, said("Request too large for m on tokens per min (TPM): Limit 30000, Requested 342389.", type="tokens", code="rate_limit_exceeded"),
     "fit", "request_over_tpm", "", None),
    ("too many bytes", "anthropic", 413, {}, {"type": "error", "error": {"type": "request_too_large", "message": "Request exceeds the maximum size"}}, "fit", "payload_too_large", "", None),
    ("too many tokens", "cerebras", 413, {}, b"", "fit", "context_overflow", "", None),
]


@pytest.mark.parametrize(("preset", "status", "headers", "body", "kind", "reason", "key", "proven_s"), [row[1:] for row in TOLD], ids=[row[0] for row in TOLD])
def test_every_form_of_a_time_leads_to_what_cools_until_when_and_why(preset: str, status: int, headers: Json, body: Json | bytes, kind: str, reason: str, key: str | None, proven_s: float | None) -> None:
    pool, route, bucket = pool_of(preset)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    failure = classify(preset or "custom", route.provider.preset.bucket, status, headers, raw, utc=UTC)
    cooldown = cool(pool.state, route, failure, 0.0, jitter=1.0)
    assert (failure.kind, failure.reason) == (kind, reason)
    if key == "":
        assert cooldown is None and not pool.state.cooling
        return
    assert cooldown is not None and cooldown.key == (key or bucket.key) and cooldown.proven == (proven_s is not None)
    assert cooldown.until_at == pytest.approx(proven_s, abs=0.05) if proven_s else cooldown.until_at <= (3600.0 if kind == "payment" else 600.0)


SHARED = Path(__file__).resolve().parents[2] / "shared" / "recordings"
#: Headers of recordings that speak of limits and are no limit of requests or tokens, or whose values were blotted out.
STRANGERS = ("query-cost", "audio-seconds", "input-images", "abusepenalty", "ratelimit-key", "unified", "should-retry")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the recordings are not here")
def test_recorded_headers_are_understood_and_recorded_refusals_have_their_kind() -> None:
    n_headers, kinds = 0, Counter()
    for path in sorted(SHARED.glob("*/*.json")):
        told = json.loads(path.read_text()).get("response") or {}
        headers = {name.lower(): value for name, value in (told.get("headers") or {}).items()}
        windows = read_limits(path.parent.name, headers.items(), UTC)
        limits = [name for name, value in headers.items() if "limit" in name and "limit-" in name + "-" and value.isdigit() and int(value) and not any(word in name for word in STRANGERS)
                  and ("-limit-" in name.removeprefix("x-ratelimit") or name.endswith("-limit"))]
        n_headers += bool(limits)
        assert not limits or windows, (path.name, limits)
        assert all(one.limit is not None or one.left is not None for one in windows)
        if told.get("status") in (429, 413, 498, 529):
            failure = classify(path.parent.name, "account", told["status"], headers, json.dumps(told.get("body")).encode(), utc=UTC)
            kinds[path.parent.name, failure.reason, failure.cool_s and round(failure.cool_s)] += 1
    assert n_headers > 50 and kinds == {("azure", "rate_minute", 1): 1, ("gemini", "rate_minute", 49): 1, ("openrouter", "model_capacity", None): 1}


@pytest.mark.parametrize(("preset", "body", "cap"), [
    ("moonshot", said("Your account x request reached max organization concurrency: 1, please try again after 1 seconds", type="rate_limit_reached_error"), 1),
    ("zai", {"error": {"code": "1302", "message": "High concurrency usage of this API, please reduce concurrency"}}, 2),
])
def test_a_refusal_for_concurrency_caps_it_and_the_cap_grows_back(preset: str, body: Json, cap: int) -> None:
    pool, route, bucket = pool_of(preset)
    holds = [reserve(pool.ledger, route, 1, 1, 0.0) for _ in range(3)]
    failure = classify(preset, "account", 429, {}, json.dumps(body).encode(), utc=UTC)
    release(pool.ledger, holds.pop(), 0.0)
    learn_refusal(pool.ledger, route, failure, json.dumps(body), 0.0)
    assert bucket.learned_open == cap and failure.reason == "rate_minute"
    short = find_shortage(pool.ledger, route, 1, 1, 1.0)
    assert short is not None and short.window is None and "at a time" in tell_shortage(short, 1.0)
    while len(holds) >= cap:
        settle(pool.ledger, holds.pop(), 1, 1, 2.0)
    assert find_shortage(pool.ledger, route, 1, 1, 3.0) is None
    for hold in holds:
        settle(pool.ledger, hold, 1, 1, 3.0)
    holds = [reserve(pool.ledger, route, 1, 1, 4.0) for _ in range(cap)]
    assert find_shortage(pool.ledger, route, 1, 1, 5.0) is not None and find_shortage(pool.ledger, route, 1, 1, 61.0) is None


# ------------------------------------------------------------------ reserve, settle, release

def test_a_burst_is_spread_by_what_is_reserved() -> None:
    pool = Pool({name: entry("m", limits={"rpm": limit}) for name, limit in (("a", 3), ("b", 5), ("c", 2))})
    sent: Counter[str] = Counter()
    while routes := pool.plan(0.0).routes:
        begin_attempt(pool.state, pool.choice, routes[0])
        reserve(pool.ledger, routes[0], 1, 1, 0.0)
        sent[routes[0].provider.name] += 1
    assert sent == {"a": 3, "b": 5, "c": 2}
    found = pool.plan(1.0, give_up_at=100.0)
    assert found.routes == () and found.free_at == pytest.approx(60.5) and found.proven
    assert [why for _, why in found.skipped] == [f"quota: {limit} requests a minute (configured), 60 s left" for limit in (2, 3, 5)] or len(found.skipped) == 3


def test_tokens_are_reserved_and_settled_with_what_was_used() -> None:
    pool, route, bucket = pool_of("", limits={"tpm": 1000})
    hold = reserve(pool.ledger, route, 300, 400, 0.0)
    window = window_of(bucket, "tokens", 60.0)
    assert (window.used, window.held) == (300.0, 400.0) and find_shortage(pool.ledger, route, 301, 0, 0.0) is not None
    settle(pool.ledger, hold, 250, 100, 5.0)
    assert (window.used, window.held) == (350.0, 0.0) and find_shortage(pool.ledger, route, 301, 300, 5.0) is None
    settle(pool.ledger, hold, 250, 100, 6.0)
    release(pool.ledger, hold, 6.0)
    assert window.used == 350.0 and bucket.n_open == 0, "a second call does nothing"
    assert share_left(pool.ledger, route, 6.0) == pytest.approx(0.65)
    settle(pool.ledger, reserve(pool.ledger, route, 100, 0, 6.0), 400, 0, 6.0)
    assert window.used == 750.0, "more than was estimated"
    assert find_shortage(pool.ledger, route, 800, 9000, 6.0).at < INF, "the length of an answer is a guess and rules nothing out"      # type: ignore[union-attr]
    assert find_shortage(pool.ledger, route, 1001, 0, 6.0).at == INF        # type: ignore[union-attr]


def test_what_never_went_out_counts_for_nothing() -> None:
    pool, route, bucket = pool_of("", limits={"rpm": 1, "tpm": 10})
    for _ in range(100):
        release(pool.ledger, reserve(pool.ledger, route, 5, 5, 0.0), 1.0)
    assert find_shortage(pool.ledger, route, 5, 5, 1.0) is None and all(window.used == window.held == 0.0 for window in bucket.windows)


def test_memory_is_bounded_whatever_is_counted() -> None:
    pool, route, bucket = pool_of("", limits={"rpm": 10 ** 6})
    for number in range(20_000):
        settle(pool.ledger, reserve(pool.ledger, route, 1, 1, number * 0.01), 1, 1, number * 0.01)
    assert max(len(window.entries) for window in bucket.windows) <= 256 and len(bucket.windows) == 4
    assert len(pool.ledger.buckets) == 1
    made_up = resolve(pool.catalogue, "p/made-up-by-a-client").groups[0][0][0]
    assert find_buckets(pool.ledger, made_up) == (bucket,), "its account's"


def test_where_limits_stand() -> None:
    """By account or by model, as the preset has it; a model's own limits beside its account's; what is configured caps what is told."""
    pool = Pool({"acc": entry({"id": "m", "limits": {"rpm": 3}}, "n", limits={"rpm": 5}), "mod": entry("m", "n", preset="groq", limits={"rpm": 7}),
                 "box": entry("m", preset="ollama", keys=["env:KEY_1", "env:KEY_2"], maxConcurrent=2)})
    keys = {route.id: [bucket.key for bucket in find_buckets(pool.ledger, route)] for route in pool.routes()}
    assert keys == {"acc/1:m": ["credential acc/1", "route acc/1:m"], "acc/1:n": ["credential acc/1"], "mod/1:m": ["route mod/1:m"], "mod/1:n": ["route mod/1:n"],
                    "box/1:m": ["provider box"], "box/2:m": ["provider box"]}
    route = pool.routes()[1]
    feed(pool.ledger, route, [("x-ratelimit-limit-requests", "100"), ("x-ratelimit-remaining-requests", "100")], 0.0)
    window = window_of(find_buckets(pool.ledger, route)[0], "requests", 60.0)
    assert (window.limit, window.origin, window.known) == (5.0, "configured", 100.0)
    feed(pool.ledger, route, [("x-ratelimit-limit-requests", "2"), ("x-ratelimit-remaining-requests", "2")], 0.0)
    assert (window.limit, window.origin) == (2.0, "header")
    before = window
    prepare_ledger(pool.ledger, config_of({"acc": entry("n", limits={"rpm": 50})}).active, utc_less_now=UTC)
    after = window_of(pool.ledger.buckets["credential acc/1"], "requests", 60.0)
    assert after is before and (after.configured, after.known, len(pool.ledger.buckets)) == (50.0, 2.0, 1), "a reload keeps what was learned"


def test_concurrency_is_capped_per_provider() -> None:
    pool = Pool({"a": entry("m", "n", keys=["env:KEY_1", "env:KEY_2"], maxConcurrent=2), "b": entry("m")})
    holds = [reserve(pool.ledger, route, 1, 1, 0.0) for route in pool.routes()[:2]]
    assert {route.provider.name for route in pool.plan(0.0).routes} == {"b"}
    settle(pool.ledger, holds[0], 1, 1, 1.0)
    assert {route.provider.name for route in pool.plan(1.0).routes} == {"a", "b"}


# ------------------------------------------------------------------ kinds of windows

def test_a_rolling_window_frees_what_is_a_span_old() -> None:
    pool, route, _ = pool_of("", limits={"rpm": 2})
    for at in (0.0, 30.0):
        reserve(pool.ledger, route, 1, 1, at)
    assert [find_shortage(pool.ledger, route, 1, 1, now) is None for now in (30.0, 60.0, 60.5, 61.0)] == [False, False, True, True]
    reserve(pool.ledger, route, 1, 1, 61.0)
    assert find_shortage(pool.ledger, route, 1, 1, 61.0).at == 90.5         # type: ignore[union-attr]


@pytest.mark.parametrize(("preset", "midnight_s"), [("gemini", 20 * 3600.0), ("openrouter", 12 * 3600.0)])
def test_a_day_ends_at_its_midnight(preset: str, midnight_s: float) -> None:
    pool, route, _ = pool_of(preset, limits={"rpd": 2})
    for _ in range(2):
        settle(pool.ledger, reserve(pool.ledger, route, 1, 1, 0.0), 1, 1, 0.0)
    short = find_shortage(pool.ledger, route, 1, 1, 100.0)
    assert short is not None and short.at == pytest.approx(midnight_s + 0.5) and short.proven
    assert find_shortage(pool.ledger, route, 1, 1, midnight_s + 1.0) is None
    for _ in range(2):
        settle(pool.ledger, reserve(pool.ledger, route, 1, 1, midnight_s + 1.0), 1, 1, midnight_s + 1.0)
    assert find_shortage(pool.ledger, route, 1, 1, midnight_s + 2.0).at == pytest.approx(midnight_s + DAY + 0.5)       # type: ignore[union-attr]


def test_a_window_that_refills_has_room_again_bit_by_bit() -> None:
    pool, route, _ = pool_of("groq", limits={"tpm": 6000})
    settle(pool.ledger, reserve(pool.ledger, route, 6000, 0, 0.0), 6000, 0, 0.0)
    short = find_shortage(pool.ledger, route, 1000, 0, 0.0)
    assert short is not None and short.at == pytest.approx(12.16) and find_shortage(pool.ledger, route, 1000, 0, 11.67) is None, "a sixth more than is estimated"


def test_a_fixed_window_is_found_out_by_its_reset() -> None:
    def told(left: int, reset_s: float) -> list[tuple[str, str]]:
        return [("x-ratelimit-limit-requests", "5"), ("x-ratelimit-remaining-requests", str(left)), ("x-ratelimit-reset-requests", str(reset_s))]
    pool, route, bucket = pool_of("")
    for number in range(5):
        hold = reserve(pool.ledger, route, 1, 1, float(number))
        feed(pool.ledger, route, told(4 - number, 20.0 - number), number + 0.5, hold)
        settle(pool.ledger, hold, 1, 1, number + 0.6)
    short = find_shortage(pool.ledger, route, 1, 1, 10.0)
    assert short is not None and short.at == pytest.approx(21.0, abs=0.1), "the reset it named, sooner than a span after the first"
    assert find_shortage(pool.ledger, route, 1, 1, 22.0) is None
    hold = reserve(pool.ledger, route, 1, 1, 22.0)
    assert find_shortage(pool.ledger, route, 1, 1, 22.0) is not None, "one finds out"
    feed(pool.ledger, route, told(4, 58.0), 22.5, hold)
    window = window_of(bucket, "requests", 60.0)
    assert (window.kind, window.used) == ("rolling", 1.0) and find_shortage(pool.ledger, route, 1, 1, 22.6) is None, "a sliding one may seem so once"
    settle(pool.ledger, hold, 1, 1, 22.7)
    settle(pool.ledger, reserve(pool.ledger, route, 1, 1, 70.0), 1, 1, 70.0)
    feed(pool.ledger, route, told(3, 10.0), 71.0)
    feed(pool.ledger, route, told(4, 55.0), 85.5, reserve(pool.ledger, route, 1, 1, 85.0))
    assert (window.kind, window.used, window.resets_at) == ("fixed", 1.0, 140.5)


def test_what_others_use_of_an_account_counts_too() -> None:
    pool, route, _ = pool_of("")
    hold = reserve(pool.ledger, route, 1, 1, 0.0)
    feed(pool.ledger, route, [("x-ratelimit-limit-requests", "10"), ("x-ratelimit-remaining-requests", "0"), ("x-ratelimit-reset-requests", "25")], 1.0, hold)
    settle(pool.ledger, hold, 1, 1, 1.0)
    short = find_shortage(pool.ledger, route, 1, 1, 2.0)
    assert short is not None and short.proven and short.at == pytest.approx(26.5, abs=0.1)


# ------------------------------------------------------------------ what is learned

def refuse(pool: Pool, route: Route, now: float, body: str = "") -> None:
    failure = classify(route.provider.preset.name, route.provider.preset.bucket, 429, {}, body.encode(), utc=UTC + now)
    learn_refusal(pool.ledger, route, failure, body, now)


def test_a_limit_is_learned_from_refusals_and_grows_back_slowly() -> None:
    pool, route, bucket = pool_of("")
    for _ in range(12):
        settle(pool.ledger, reserve(pool.ledger, route, 1, 1, 0.0), 1, 1, 0.0)
    refuse(pool, route, 1.0)
    window = window_of(bucket, "requests", 60.0)
    assert (window.limit, window.origin) == (12.0, "learned") and not find_shortage(pool.ledger, route, 1, 1, 1.0).proven       # type: ignore[union-attr]
    now = 61.0
    grown = []
    for _ in range(4):
        while window.grows_at > now:
            now += 60.0
        while find_shortage(pool.ledger, route, 1, 1, now) is None:
            settle(pool.ledger, reserve(pool.ledger, route, 1, 1, now), 1, 1, now)
        grown.append(window.limit)
        now += 61.0
    assert grown == [pytest.approx(value) for value in (13.2, 14.52, 15.972, 17.5692)] and now > 360.0
    for _ in range(9):
        settle(pool.ledger, reserve(pool.ledger, route, 1, 1, now), 1, 1, now)
    refuse(pool, route, now)
    assert window.limit == 9.0 and window.patience_s == 360.0, "twice as patient"
    refuse(pool_of("")[0], route, 0.0)


def test_the_figures_of_a_free_plan_order_but_do_not_bind() -> None:
    pool = Pool({"n": entry("m", preset="nvidia"), "z": entry("m", limits={"rpm": 50})})
    free, other = pool.routes()
    bucket = find_buckets(pool.ledger, free)[0]
    assert window_of(bucket, "requests", 60.0).origin == "preset" and window_of(bucket, "requests", 60.0).limit == 40.0
    for _ in range(40):
        settle(pool.ledger, reserve(pool.ledger, free, 1, 1, 0.0), 1, 1, 0.0)
    assert [route.provider.name for route in pool.plan(1.0).routes] == ["z", "n"], "behind those that have room"
    hold = reserve(pool.ledger, free, 1, 1, 1.0)
    assert [route.provider.name for route in pool.plan(1.0).routes] == ["z"], "one at a time finds out"
    settle(pool.ledger, hold, 1, 1, 2.0)
    for number in range(44):
        assert bucket.limited, f"{41 + number} in a minute may have been two fixed ones that meet"
        settle(pool.ledger, reserve(pool.ledger, free, 1, 1, 2.0), 1, 1, 2.0)
    assert window_of(bucket, "requests", 60.0).limit == INF and bucket.limited == (), "this key has more than the free plan"


def test_who_configures_a_limit_knows_it_better_than_the_free_plan() -> None:
    """A paid key's `limits` are no longer capped by what the free plan has, and the other figures still order; a reload changes both ways."""
    for where in ({"limits": {"tpm": 300_000}}, {}):
        pool = Pool({"p": entry({"id": "m", **({} if where else {"limits": {"tpm": 300_000}})}, preset="groq", **where)})
        bucket = find_buckets(pool.ledger, pool.routes()[0])[0]
        minute, day = window_of(bucket, "tokens", 60.0), window_of(bucket, "requests", DAY)
        assert (minute.limit, minute.origin, day.origin) == (300_000.0, "configured", "preset") and find_shortage(pool.ledger, pool.routes()[0], 100_000, 100, 0.0) is None
    for limits, told_of in (({}, (8000.0, "preset")), ({"limits": {"tpm": 300_000}}, (300_000.0, "configured"))):
        prepare_ledger(pool.ledger, config_of({"p": entry("m", preset="groq", **limits)}).active, utc_less_now=UTC)
        assert (minute.limit, minute.origin) == told_of
    feed(pool.ledger, pool.routes()[0], told(9000, 9000, "0s"), 0.0)
    prepare_ledger(pool.ledger, config_of({"p": entry("m", preset="groq")}).active, utc_less_now=UTC)
    assert (minute.limit, minute.origin) == (9000.0, "header"), "what its provider told stays"


@pytest.mark.parametrize("status", [400, 401, 404, 500, 503])
def test_a_failure_that_is_no_limit_teaches_none(status: int) -> None:
    pool, route, bucket = pool_of("")
    for _ in range(3):
        settle(pool.ledger, reserve(pool.ledger, route, 1, 1, 0.0), 1, 1, 0.0)
    body = json.dumps(said("It failed. Requested 5 of 100 requests per minute."))
    assert not learn_refusal(pool.ledger, route, classify("custom", "account", status, {}, body.encode(), utc=UTC), body, 0.1)
    assert not bucket.limited and all(window.limit == INF for window in bucket.windows)


def test_a_header_that_tells_more_than_the_free_plan_ends_its_figures() -> None:
    pool, route, bucket = pool_of("groq")
    assert len(bucket.limited) == 4
    feed(pool.ledger, route, [("x-ratelimit-limit-tokens", "250000"), ("x-ratelimit-remaining-tokens", "249000"), ("x-ratelimit-reset-tokens", "1s")], 0.0)
    assert [(window.measure, window.span_s, window.origin) for window in bucket.limited] == [("tokens", 60.0, "header")]


def test_a_figure_from_a_refusal_is_believed_for_a_week() -> None:
    pool, route, _ = pool_of("together")
    body = json.dumps(said("Your rate limit is 2 queries per minute."))
    refuse(pool, route, 0.0, body)
    assert find_shortage(pool.ledger, route, 1, 1, 1.0) is not None
    for now in (6 * DAY, 8 * DAY):
        for _ in range(2):
            settle(pool.ledger, reserve(pool.ledger, route, 1, 1, now), 1, 1, now)
        assert (find_shortage(pool.ledger, route, 1, 1, now) is None) == (now > 7 * DAY)


def test_a_provider_that_refuses_what_should_have_refilled_rolls() -> None:
    pool, route, bucket = pool_of("groq", limits={"rpm": 30})
    for number in range(3):
        settle(pool.ledger, reserve(pool.ledger, route, 1, 1, 20.0 * number), 1, 1, 20.0 * number)
        refuse(pool, route, 20.0 * number, json.dumps(said("Rate limit reached on requests per minute (RPM): Limit 30, Used 30, Requested 1.")))
    assert window_of(bucket, "requests", 60.0).kind == "rolling"


def told(limit: int, left: int, reset: str, measure: str = "tokens") -> list[tuple[str, str]]:
    return [(f"x-ratelimit-{name}-{measure}", str(value)) for name, value in (("limit", limit), ("remaining", left), ("reset", reset))]


def test_a_reset_tells_whether_a_window_refills_as_its_preset_says() -> None:
    """Of a window that fills up all the time it is when all is back; three others in a row and the window rolls, until twelve more say otherwise than do not."""
    pool, route, bucket = pool_of("groq")
    window = window_of(bucket, "tokens", 60.0)
    for number, (left, reset, kind) in enumerate([
            (7900, "50s", "refill"), (4000, "30.5s", "refill"), (4000, "5s", "refill"), (2000, "46s", "refill"), (4000, "5s", "refill"), (2000, "4s", "refill"), (1000, "3s", "rolling"),
            *[(4000, "30s", "rolling")] * 20,           # the end of what was counted first as well
            (2000, "4s", "rolling"), *[(2000, "45s", "rolling")] * 11, (2000, "45s", "refill")]):
        feed(pool.ledger, route, told(8000, left, reset), number * 0.01)
        assert (window.kind, round(window.used)) == (kind, 8000 - left), number
    window.kind = "refill"
    settle(pool.ledger, reserve(pool.ledger, route, 3000, 0, 2.0), 3000, 0, 2.0)
    for number in range(3):
        feed(pool.ledger, route, told(8000, 0, "2s"), 3.0 + number)
    assert window.kind == "rolling" and window.used == pytest.approx(sum(amount for _, amount in window.entries)) == pytest.approx(8000.0)
    assert find_shortage(pool.ledger, route, 500, 0, 5.1).at == pytest.approx(7.5), "not bit by bit: four seconds"      # type: ignore[union-attr]
    reserve(pool.ledger, route, 100, 0, 7.6)
    assert find_shortage(pool.ledger, route, 500, 0, 7.6) is not None, "one asks whether all of it ended at the reset that was named"


def test_a_window_that_has_slid_twice_is_not_asked_at_the_reset_it_names() -> None:
    """A reset that is sooner than what counts would end may be that of a fixed window. Twice it passes and nothing has ended: the third is not believed."""
    pool, route, bucket = pool_of("")
    window = window_of(bucket, "requests", 60.0)
    for at in (0.0, 9.0):
        for _ in range(10):
            settle(pool.ledger, reserve(pool.ledger, route, 1, 0, at), 1, 0, at)
    seen = []
    for at in (10.0, 14.0, 18.0):
        feed(pool.ledger, route, told(30, 10, "3s", "requests"), at)
        seen.append((window.kind, window.n_slid, window.resets_at))
    assert seen == [("rolling", 0, 13.0), ("rolling", 1, 17.0), ("rolling", 2, INF)]


def test_a_limit_is_learned_from_what_was_served_and_not_from_what_went_out() -> None:
    """A burst of 50 at a limit of 20: the 30 refusals come first, and teach patience once."""
    pool, route, bucket = pool_of("")
    window, holds = window_of(bucket, "requests", 60.0), [reserve(pool.ledger, route, 10, 0, 0.0) for _ in range(50)]
    for hold in holds[20:]:
        release(pool.ledger, hold, 0.2)
        learn_refusal(pool.ledger, route, classify("custom", "account", 429, {}, b"", utc=UTC), "", 0.2, hold)
    assert (window.limit, window.origin, window.patience_s, bucket.n_unseen) == (1.0, "learned", 180.0, 20)
    short = find_shortage(pool.ledger, route, 10, 0, 0.3)
    assert short is not None and short.at == 0.8, "those under way may prove that there is more"
    for hold in holds[:20]:
        feed(pool.ledger, route, [], 1.0, hold)
    assert (window.limit, window.known, bucket.n_unseen, bucket.unseen_input) == (20.0, 20.0, 0, 0)
    for hold in holds[:20]:
        settle(pool.ledger, hold, 10, 5, 2.0)
    assert find_shortage(pool.ledger, route, 10, 0, 3.0).at == pytest.approx(60.5), (bucket.n_unseen, bucket.n_open)       # type: ignore[union-attr]


def test_a_refusal_that_a_known_limit_explains_teaches_no_other() -> None:
    pool, route, bucket = pool_of("", limits={"tpm": 1000})
    settle(pool.ledger, reserve(pool.ledger, route, 900, 0, 0.0), 900, 0, 0.0)
    for n_input, learned in ((200, INF), (50, 1.0)):
        hold = reserve(pool.ledger, route, n_input, 0, 1.0)
        release(pool.ledger, hold, 1.1)
        learn_refusal(pool.ledger, route, classify("custom", "account", 429, {}, b"", utc=UTC), "", 1.1, hold)
        assert window_of(bucket, "requests", 60.0).limit == learned


def test_a_refusal_leaves_room_for_what_is_smaller() -> None:
    """Refused with 3,000 tokens: less than that was left, which may do for others."""
    pool, route, bucket = pool_of("together")
    hold = reserve(pool.ledger, route, 3000, 0, 0.0)
    release(pool.ledger, hold, 0.1)
    body = json.dumps(said("Rate limit reached on tokens per minute (TPM): Limit 8000, Used 6000, Requested 3000."))
    learn_refusal(pool.ledger, route, classify("together", "account", 429, {}, body.encode(), utc=UTC), body, 0.1, hold)
    assert find_shortage(pool.ledger, route, 3000, 0, 0.2) is not None and find_shortage(pool.ledger, route, 2000, 0, 0.2) is None


def test_what_an_answer_may_become_counts_from_the_start_where_its_provider_counts_so() -> None:
    """Groq reserves what a request names as the most tokens of its answer: a modest part of a minute is named, is lent until the answer ends, and comes back."""
    pool, route, bucket = pool_of("groq")
    feed(pool.ledger, route, told(8000, 8000, "0s"), 0.0)
    window = window_of(bucket, "tokens", 60.0)
    assert [cap_answer(pool.ledger, route, n_input, n_cap) for n_input, n_cap in ((1000, 32_000), (6000, 32_000), (7900, 32_000), (1000, 500))] == [4096, 2000, 256, 500]
    hold = reserve(pool.ledger, route, 1000, 300, 0.0, 32_000)
    assert (hold.n_output, window.used, window.held, window.lent) == (4096, 1000.0, 0.0, 4096.0)
    assert find_shortage(pool.ledger, route, 2000, 300, 0.0, 32_000).at == pytest.approx(5.0), "soon: most of what is lent comes back"     # type: ignore[union-attr]
    assert find_shortage(pool.ledger, route, 2000, 300, 0.0) is None, "who names nothing counts his prompt alone"
    feed(pool.ledger, route, told(8000, 2931, "38.02s"), 0.2, hold)
    assert (round(window.used), window.lent, window.kind) == (1000 - 27, 4096.0, "refill"), "what is lent is no use by others"
    settle(pool.ledger, hold, 1000, 200, 0.2)
    assert (round(window.used), window.lent) == (1200 - 27, 0.0) and find_shortage(pool.ledger, route, 2000, 300, 0.2, 32_000) is None
    hold = reserve(pool.ledger, route, 1000, 300, 0.2, 4096)
    release(pool.ledger, hold, 0.2)
    assert (round(window.used), window.lent, bucket.unseen_lent) == (1200 - 27, 0.0, 0)
    other, route, bucket = pool_of("together")
    assert cap_answer(other.ledger, route, 1000, 32_000) == 32_000
    bucket.counts_caps = True
    assert cap_answer(other.ledger, route, 1000, 32_000) == 8192 and cap_answer(other.ledger, route, 1000, 100) == 100, "modest, while no limit is known"


def test_that_an_answers_cap_counts_is_learned_from_a_refusal_and_survives_a_restart() -> None:
    pool, route, bucket = pool_of("together")
    for asks, counts in ((3000, False), (35_000, True)):
        body = json.dumps(said(f"Rate limit reached on tokens per minute (TPM): Limit 60000, Used 50000, Requested {asks}."))
        hold = reserve(pool.ledger, route, 3000, 300, 0.0, 32_000)
        release(pool.ledger, hold, 0.1)
        learn_refusal(pool.ledger, route, classify("together", "account", 429, {}, body.encode(), utc=UTC), body, 0.1, hold)
        assert bucket.counts_caps is counts
    again, route, bucket = pool_of("together")
    load_ledger(again.ledger, json.loads(json.dumps(ledger_rows(pool.ledger, 0.2))), 0.0)
    assert bucket.counts_caps and cap_answer(again.ledger, route, 3000, 32_000) == 15_000, "a quarter of a minute"


def test_a_prompts_estimate_is_corrected_by_what_its_provider_counts() -> None:
    pool, route, bucket = pool_of("", limits={"tpm": 1000})
    for number in range(100):
        settle(pool.ledger, reserve(pool.ledger, route, 100, 0, 61.0 * number), 80, 0, 61.0 * number)
    assert bucket.ratio == pytest.approx(0.8, abs=0.01) and find_shortage(pool.ledger, route, 1200, 0, 6200.0) is None
    for n_input in (10 ** 9, 1):
        for number in range(1000):
            settle(pool.ledger, reserve(pool.ledger, route, 100, 0, 0.0), n_input, 0, 0.0)
        assert bucket.ratio == (4.0 if n_input > 1 else 0.25), "within bounds"


def test_who_would_be_refused_for_a_learned_limit_may_ask_whether_it_holds() -> None:
    """Once in 25 served: a success that does not fit the window as it is thought to be shows that it ends all at once, a refusal of that that it does not."""
    pool, route, bucket = pool_of("")
    for number in range(5):
        settle(pool.ledger, reserve(pool.ledger, route, 1, 1, 10.0 * number), 1, 1, 10.0 * number)
    refuse(pool, route, 41.0)
    window = window_of(bucket, "requests", 60.0)
    assert (window.known, window.source, window.kind, bucket.n_tests) == (5.0, "learned", "rolling", 1.0)
    found = pool.plan(42.0)
    assert found.routes == (route,) and found.free_at == pytest.approx(60.5)
    assert pool.plan(42.0, give_up_at=70.0).routes == (), "who can wait for room waits"
    hold = reserve(pool.ledger, route, 1, 1, 42.0)
    assert bucket.n_tests == 0.0 and pool.plan(42.0).routes == (), "one at a time"
    feed(pool.ledger, route, [], 42.1, hold)
    assert (window.kind, window.used, window.known, window.resets_at) == ("fixed", 1.0, 5.0, 102.0) and pool.plan(42.2).routes == (route,)
    refuse(pool, route, 43.0)
    assert (window.kind, window.used, window.known, window.n_slid) == ("rolling", 6.0, 5.0, 2), "it is none, and is taken for none again"
    for number in range(26):
        settle(pool.ledger, reserve(pool.ledger, route, 1, 1, 200.0 + 61 * number), 1, 1, 200.0 + 61 * number)
    assert bucket.n_tests == 1.0


def test_what_was_refused_is_in_no_count_of_its_providers() -> None:
    """The headers of a refusal tell what others use: the request that was refused is taken back once, not twice."""
    pool, route, bucket = pool_of("", limits={"tpm": 100_000})
    window = window_of(bucket, "tokens", 60.0)
    settle(pool.ledger, reserve(pool.ledger, route, 5000, 0, 0.0), 5000, 0, 0.0)
    hold = reserve(pool.ledger, route, 3000, 0, 10.0)
    feed(pool.ledger, route, told(7000, 2000, "50s"), 10.1, hold, refused=True)
    assert window.used == 8000.0
    release(pool.ledger, hold, 10.1)
    assert window.used == 5000.0
    feed(pool.ledger, route, told(7000, 1500, "49s"), 11.0)
    assert window.used == 5500.0, "and what others use is noticed behind what is under way"


def test_a_refused_requests_cap_is_in_no_count_either() -> None:
    pool, route, bucket = pool_of("groq")
    feed(pool.ledger, route, told(8000, 8000, "0s"), 0.0)
    window = window_of(bucket, "tokens", 60.0)
    hold = reserve(pool.ledger, route, 500, 0, 0.0, 4096)
    feed(pool.ledger, route, told(8000, 4000, "30s"), 0.0, hold, refused=True)
    assert (window.used, window.lent) == (4500.0, 4096.0)
    release(pool.ledger, hold, 0.0)
    assert (window.used, window.lent) == (4000.0, 0.0), "what others use, and nothing of its own"


def test_a_refusal_takes_nothing_from_what_was_counted_and_a_proven_day_ends_at_once() -> None:
    pool, route, bucket = pool_of("together")
    hold = reserve(pool.ledger, route, 8000, 0, 0.0)
    settle(pool.ledger, hold, 8000, 0, 0.0)
    refused = reserve(pool.ledger, route, 500, 0, 0.1)
    release(pool.ledger, refused, 0.2)
    body = json.dumps(said("Rate limit reached on tokens per minute (TPM): Limit 8000, Used 8000, Requested 500."))
    learn_refusal(pool.ledger, route, classify("together", "account", 429, {}, body.encode(), utc=UTC), body, 0.2, refused)
    assert window_of(bucket, "tokens", 60.0).used == 8000.0
    body = json.dumps(said("Rate limit reached on requests per day (RPD): Limit 1000, Used 1000, Requested 1. Please try again in 2h."))
    learn_refusal(pool.ledger, route, classify("together", "account", 429, {}, body.encode(), utc=UTC), body, 10.0)
    day = window_of(bucket, "requests", DAY)
    assert (day.kind, day.resets_at, day.limit) == ("fixed", pytest.approx(7210.0), 1000.0)
    assert find_shortage(pool.ledger, route, 1, 0, 7211.0) is None, "all of it is back"


def test_a_header_may_tell_little() -> None:
    """What is left without a limit corrects a limit that is known, and makes none; what may be on its way is neither added nor taken away."""
    pool, route, bucket = pool_of("")
    window = window_of(bucket, "requests", 60.0)
    feed(pool.ledger, route, [("x-ratelimit-remaining-requests", "3")], 0.0)
    assert (window.known, window.used) == (INF, 0.0)
    feed(pool.ledger, route, told(10, 10, "0s", "requests"), 0.0)
    feed(pool.ledger, route, [("x-ratelimit-remaining-requests", "6")], 0.0)
    assert (window.known, window.used) == (10.0, 4.0)
    first, *_ = [reserve(pool.ledger, route, 1, 1, 10.0) for _ in range(3)]
    feed(pool.ledger, route, [("x-ratelimit-remaining-requests", "5")], 10.1, first)
    assert window.used == 7.0, "two have perhaps not arrived"


def test_a_window_nearly_empty_says_nothing_of_its_kind() -> None:
    """Anthropic rounds to thousands of tokens and whole seconds."""
    pool, route, bucket = pool_of("groq")
    window = window_of(bucket, "tokens", 60.0)
    for number in range(5):
        feed(pool.ledger, route, told(8000, 7900, "20s"), 0.1 * number)
    assert (window.kind, window.n_wrong) == ("refill", 0)


def test_a_burst_over_a_reset_counts_in_the_window_where_it_arrived() -> None:
    """Five go out together, three arrive before the reset: once all have answered, only what is still on its way may be unknown to the provider."""
    pool, route, bucket = pool_of("")
    window = window_of(bucket, "requests", 60.0)
    holds = [reserve(pool.ledger, route, 1, 1, 0.0) for _ in range(5)]
    for left, reset, hold in zip((2, 1, 0, 4, 3), ("0.1s", "0.1s", "0.1s", "60s", "60s"), holds, strict=True):
        feed(pool.ledger, route, told(5, left, reset, "requests"), 0.2, hold)
    assert window.used == 2.0 and find_shortage(pool.ledger, route, 1, 1, 0.3) is None


def test_what_a_header_rules_out_is_no_older_use() -> None:
    """Its reset says since when the provider counts: a rest of an estimate from before must not hide that the window may be a fixed one."""
    pool, route, bucket = pool_of("")
    window = window_of(bucket, "tokens", 60.0)
    for at, n_input in ((0.0, 4000), (50.0, 1000)):
        settle(pool.ledger, reserve(pool.ledger, route, n_input, 0, at), n_input, 0, at)
    feed(pool.ledger, route, told(8000, 6900, "55s"), 50.0)
    assert (window.used, [at for at, _ in window.entries], window.resets_at) == (1100.0, [50.0], 105.0)
    feed(pool.ledger, route, told(8000, 6850, "54s"), 51.0)
    assert window.entries == [[50.0, 1100.0], [51.0, 50.0]], "a little more than was counted is what was estimated too low"
    feed(pool.ledger, route, told(8000, 4000, "53s"), 52.0)
    assert window.entries[0][0] == 45.0, "much more is what others used, from the beginning of the window on"


def test_room_that_answers_under_way_may_leave_is_waited_for() -> None:
    pool, route, _ = pool_of("", limits={"tpm": 1000})
    settle(pool.ledger, reserve(pool.ledger, route, 300, 0, 0.0), 300, 0, 0.0)
    hold = reserve(pool.ledger, route, 100, 400, 0.0)
    assert [find_shortage(pool.ledger, route, n_input, 0, 0.0).at for n_input in (400, 401)] == [5.0, 60.5]      # type: ignore[union-attr]
    settle(pool.ledger, hold, 100, 200, 4.0)
    assert find_shortage(pool.ledger, route, 400, 0, 4.0) is None


def test_what_is_lent_does_not_count_for_how_long_a_window_is_full() -> None:
    """Most of a cap comes back when its answer ends: what is waited for is the rest."""
    pool, route, bucket = pool_of("groq")
    feed(pool.ledger, route, told(8000, 8000, "0s"), 0.0)
    settle(pool.ledger, reserve(pool.ledger, route, 3500, 0, 0.0), 3500, 0, 0.0)
    reserve(pool.ledger, route, 60, 0, 0.0, 4096)
    short = find_shortage(pool.ledger, route, 6000, 0, 0.0)
    assert short is not None and short.at == pytest.approx((3560 + 7000 - 8000) / 8000 * 60 + 0.5)
    pool, route, bucket = pool_of("", limits={"tpm": 1000})
    reserve(pool.ledger, route, 300, 700, 0.0)
    assert find_shortage(pool.ledger, route, 900, 0, 0.0).at == 5.0, "more than has been counted is under way: nobody can tell"     # type: ignore[union-attr]


def test_a_request_that_asks_for_much_of_a_window_says_nothing_of_smaller_ones() -> None:
    pool, route, bucket = pool_of("groq")
    feed(pool.ledger, route, told(8000, 4000, "30s"), 0.0)
    for n_cap, large in ((32_000, True), (0, False)):
        hold = reserve(pool.ledger, route, 500, 300, 0.1, n_cap)
        release(pool.ledger, hold, 0.2)
        asked = 500 + (hold.n_output if n_cap else 0)
        for body in (json.dumps(said(f"Rate limit reached on tokens per minute (TPM): Limit 8000, Used 7900, Requested {asked}. Please try again in 40s.")), ""):
            window_of(bucket, "tokens", 60.0).used = 7900.0
            failure = classify("groq", "model", 429, {}, body.encode(), utc=UTC)
            assert learn_refusal(pool.ledger, route, failure, body, 0.2, hold) is large, (n_cap, body)


def test_a_line_is_not_let_loose_on_a_provider_of_unknown_limits() -> None:
    """While others are full, and somebody waits: four unanswered, then half as many as are served a minute. Without pressure, or without time, all of it goes."""
    pool = Pool({"a": entry("m", limits={"rpm": 1}), "b": entry("m")})
    unknown = pool.routes()[1]
    assert [len(pool.plan(0.0, give_up_at=30.0).routes), pool.go(0.0)] == [2, "a/1"]
    holds = [reserve(pool.ledger, unknown, 1, 1, 1.0) for _ in range(3)]
    assert pool.plan(1.0, give_up_at=30.0).routes == (unknown,)
    holds.append(reserve(pool.ledger, unknown, 1, 1, 1.0))
    found = pool.plan(1.0, give_up_at=30.0)
    assert (found.routes, found.free_at, found.proven) == ((), 1.5, False) and any("unknown" in why for _, why in found.skipped)
    assert pool.plan(1.0).routes == pool.plan(1.0, give_up_at=1.4).routes == (unknown,), "who cannot wait is not held up"
    for hold in holds:
        feed(pool.ledger, unknown, [], 1.1, hold)
    for hold in [reserve(pool.ledger, unknown, 1, 1, 1.1) for _ in range(8)]:
        feed(pool.ledger, unknown, [], 1.15, hold)
    for number in range(6):
        assert pool.plan(1.2, give_up_at=30.0).routes == (unknown,), number
        reserve(pool.ledger, unknown, 1, 1, 1.2)
    assert pool.plan(1.2, give_up_at=30.0).routes == () and len(pool.plan(61.0, give_up_at=90.0).routes) == 2, "no pressure any more"


def test_a_route_that_refused_and_is_counted_full_is_no_last_resort() -> None:
    pool, route, bucket = pool_of("")
    for _ in range(5):
        settle(pool.ledger, reserve(pool.ledger, route, 1, 1, 0.0), 1, 1, 0.0)
    refuse(pool, route, 0.5)
    cool(pool.state, route, classify("custom", "account", 429, {}, b"", utc=UTC), 0.5, jitter=0.5)
    found = pool.plan(0.6)
    assert found.routes == () and found.free_at == pytest.approx(60.5)


# ------------------------------------------------------------------ across restarts

def test_a_restart_forgets_nothing_that_was_proven() -> None:
    models = {"g": entry("m", preset="gemini"), "c": entry("m", preset="github-copilot"), "t": entry("m", preset="together")}
    pool = Pool(models)
    gemini, copilot, together = pool.routes()
    for _ in range(3):
        settle(pool.ledger, reserve(pool.ledger, gemini, 10, 10, 50.0), 10, 10, 50.0)
    raw = json.dumps(GEMINI_DAY)
    learn_refusal(pool.ledger, gemini, classify("gemini", "model", 429, {}, raw.encode(), utc=UTC + 50), raw, 50.0)
    refuse(pool, together, 50.0, json.dumps(said("Your rate limit is 60 queries per minute.")))
    week = classify("github-copilot", "account", 429, {"retry-after": str(6 * 86_400)}, json.dumps(said("Sorry, you've exceeded your weekly rate limit.", code="user_weekly_rate_limited")).encode(),
                    utc=UTC + 50)
    assert cool(pool.state, copilot, week, 50.0, jitter=0.5).proven          # type: ignore[union-attr]
    ledger, cooldowns = json.loads(json.dumps(ledger_rows(pool.ledger, 60.0))), json.loads(json.dumps(cooldown_rows(pool.state, 60.0)))

    later = Pool(models)                    # another process, an hour on, whose clock began anew
    prepare_ledger(later.ledger, later.config.active, utc_less_now=UTC + 3600.0 - 5.0)
    load_ledger(later.ledger, ledger, 5.0)
    load_cooldowns(later.state, cooldowns, 5.0)
    found = later.plan(5.0, give_up_at=35.0)
    assert [route.provider.name for route in found.routes] == ["t"], [why for _, why in found.skipped]
    assert later.state.cooling["credential c/1"].until_at == pytest.approx(5.0 + 6 * 86_400 + 50 - 3600)
    short = find_shortage(later.ledger, later.routes()[0], 1, 1, 5.0)
    assert short is not None and short.proven and short.at == pytest.approx(5.0 + 20 * 3600.0 - 3600.0 + 0.5), "midnight in California"
    assert window_of(find_buckets(later.ledger, later.routes()[2])[0], "requests", 60.0).limit == 60.0
    assert {route.provider.name for route in later.plan(5.0 + 7 * DAY).routes} == {"g", "c", "t"}, "and all of it ends"


@pytest.mark.parametrize("row", [{}, {"windows": [{}]}, {"windows": [{"measure": "requests"}]}, {"windows": [None]}, {"windows": [{
    "measure": "requests", "span_s": "x", "kind": "rolling", "known": None, "source": "", "known_utc": 0, "used": 0, "at_utc": 0, "resets_utc": None, "grows_utc": None, "patience_s": 0, "entries": []}]}])
def test_rows_of_another_version_are_passed_over(row: Json) -> None:
    pool, route, bucket = pool_of("")
    load_ledger(pool.ledger, {bucket.key: row, "credential gone/1": row}, 0.0)
    load_cooldowns(pool.state, {"route p/1:m": row, "x": {"until_utc": UTC + 9, "kind": "unheard of", "reason": "", "strikes": 1}, "y": {"until_utc": "soon"}}, 0.0)
    assert find_shortage(pool.ledger, route, 1, 1, 0.0) is None and not pool.state.cooling and set(pool.ledger.buckets) == {bucket.key}


# ------------------------------------------------------------------ choice: strategies, affinity, rotation, probes

THREE = {name: entry("m") for name in "abc"}


def test_a_thousand_single_requests_rotate_evenly() -> None:
    pool = Pool({"a": entry("m", keys=["env:KEY_1", "env:KEY_2"]), "b": entry("m"), "c": entry("m")})
    served = Counter(pool.go(float(number), Facts(10, 10, f"single {number}")) for number in range(1200))
    assert served == {"a/1": 200, "a/2": 200, "b/1": 400, "c/1": 400}


def test_a_conversation_stays_while_its_route_is_healthy() -> None:
    pool = Pool(THREE)
    pool.go(0.0, Facts(10, 10, "other"))
    first = pool.go(0.0, Facts(10, 10, "talk"))
    for turn in range(1, 6):
        pool.go(turn, Facts(10, 10, "other"))
        assert pool.plan(turn, facts=Facts(10, 10, "talk", True)).session == "hit"
        assert pool.go(turn, Facts(10, 10, "talk", True)) == first == "b/1"
    pinned = next(route for route in pool.routes() if route.credential.id == first)
    cool(pool.state, pinned, aicarousel.UpstreamFailure("server", "server_error", scope="route"), 6.0, jitter=0.5)
    assert pool.plan(6.0, facts=Facts(10, 10, "talk", True)).session == "moved"
    second = pool.go(6.0, Facts(10, 10, "talk", True))
    assert second != first and pool.go(20.0, Facts(10, 10, "talk", True)) == second, "its cache is there now"
    assert pool.plan(20.0 + 3601.0, facts=Facts(10, 10, "talk", True)).session == "new"
    assert pool.plan(20.0, facts=Facts(10, 10, "talk", False)).session == ""


def test_a_conversation_leads_to_no_other_route_than_was_asked_for() -> None:
    """A model that the client names goes before what served the conversation last, unless that is one of its routes too."""
    pool = Pool({"a": entry("m", "n"), "b": entry("o")})
    for name, wanted in (("a/m", "a/1:m"), ("b/o", "b/1:o"), ("a/n", "a/1:n"), ("a/m", "a/1:m")):
        choice = aicarousel.resolve(pool.catalogue, name)
        found = aicarousel.plan(pool.catalogue, choice, pool.state, 1.0, strategy="round-robin", fallback="chain", facts=Facts(10, 10, "talk", True))
        assert found.routes[0].id == wanted and len(found.routes) > 1
        note_served(pool.state, found.routes[0], Facts(session="talk"), 1.0, 1.0)


def test_a_conversation_moves_when_its_route_has_no_room() -> None:
    pool = Pool({"a": entry("m", limits={"rpm": 1}), "b": entry("m")})
    assert [pool.go(float(turn), Facts(10, 10, "talk", True)) for turn in range(3)] == ["a/1", "b/1", "b/1"]


def test_ten_thousand_conversations_are_remembered() -> None:
    pool = Pool(THREE)
    route = pool.routes()[0]
    for number in range(10_050):
        note_served(pool.state, route, Facts(session=f"s{number}"), 1.0, 0.0)
    note_served(pool.state, route, Facts(session="s60"), 1.0, 1.0)
    assert len(pool.state.sessions) == 10_000 and "s49" not in pool.state.sessions and list(pool.state.sessions)[-1] == "s60"


STRATEGIES: list[tuple[str, Json, dict[str, int]]] = [        # 300 requests, one a second; who serves how many
    ("round-robin", THREE, {"a/1": 100, "b/1": 100, "c/1": 100}),
    ("fill-first", {"a": entry("m", keys=["env:KEY_1", "env:KEY_2"], limits={"rpm": 20}), "b": entry("m")}, {"a/1": 100, "a/2": 100, "b/1": 100}),
    ("priority", {"a": entry("m", keys=["env:KEY_1", "env:KEY_2"], limits={"rpm": 25}), "b": entry("m")}, {"a/1": 125, "a/2": 125, "b/1": 50}),
    ("cheapest", {"a": entry({"id": "m", "price": {"input": 2, "output": 2}}), "b": entry({"id": "m", "price": {"input": 1, "output": 2}}, limits={"rpm": 30}), "c": entry("m")},
     {"b/1": 150, "a/1": 150}),
    ("fastest", {"a": entry("m"), "b": entry("m", limits={"rpm": 30}), "c": entry("m")}, {"b/1": 150, "c/1": 149, "a/1": 1}),
    ("most-quota", {"a": entry("m", limits={"rpm": 20}), "b": entry("m", limits={"rpm": 60}), "c": entry("m", limits={"rpm": 40})}, {"a/1": 50, "b/1": 150, "c/1": 100}),
    ("weighted", {"a": entry("m", weight=3), "b": entry("m"), "c": entry("m", weight=2)}, {"a/1": 150, "b/1": 50, "c/1": 100}),
    ("least-busy", THREE, {"a/1": 100, "b/1": 100, "c/1": 100}),
]


@pytest.mark.parametrize(("strategy", "models", "expected"), STRATEGIES, ids=[row[0] for row in STRATEGIES])
def test_strategies_by_simulation(strategy: str, models: Json, expected: dict[str, int]) -> None:
    pool, dice, first_ms = Pool(models, strategy=strategy), random.Random(4), {"a": 900.0, "b": 100.0, "c": 300.0}
    served: Counter[str] = Counter()
    for number in range(300):
        at = number * 1.0
        provider = pool.plan(at, facts=Facts(500, 100)).routes[0].provider.name
        served[pool.go(at, Facts(500, 100), first_ms=first_ms[provider] * dice.uniform(0.8, 1.2))] += 1
    assert served.keys() == expected.keys() and all(abs(served[name] - count) <= 12 for name, count in expected.items()), served


def test_aliases_keep_their_order_whatever_the_strategy() -> None:
    config = config_of({"a": entry({"id": "m", "price": {"input": 9, "output": 9}}), "b": entry({"id": "m", "price": {"input": 1, "output": 1}})}, aliases={"mine": ["a", "b"]})
    catalogue = build_catalogue(config)
    found = plan(catalogue, resolve(catalogue, "mine"), RoutingState(), 0.0, strategy="cheapest", fallback="none")
    assert [route.provider.name for route in found.routes] == ["a", "b"]


def test_a_recovered_route_serves_within_one_probe_and_no_guess_lasts_over_ten_minutes() -> None:
    pool, route, _ = pool_of("")
    now = 0.0
    for _ in range(12):
        begin_attempt(pool.state, pool.choice, route)
        cooldown = cool(pool.state, route, classify("custom", "account", 429, {}, b"", utc=UTC), now, jitter=1.0)
        assert cooldown is not None and cooldown.until_at - now <= 600.0
        found = pool.plan(now, give_up_at=now + 700.0)
        assert found.routes == () and found.free_at == cooldown.until_at, "a refusal that is still fresh is waited for"
        assert pool.plan(now).routes == (route,), "unless nobody can wait"
        now = cooldown.until_at
    assert pool.go(now) == "p/1" and not pool.state.cooling


def test_a_proven_time_is_kept_but_for_one_probe_in_each_quarter_when_all_is_out() -> None:
    """A weekly quota: asked after 25, 50 and 75 % of it, when nothing else is left; by one request at a time, and the time stays what it was."""
    pool = Pool({"a": entry("m"), "b": entry("m")})
    first, second = pool.routes()
    week_s, body = 400_000.0, json.dumps(said("Sorry, you've exceeded your weekly rate limit.", code="user_weekly_rate_limited")).encode()

    def refused(now: float) -> None:
        cooldown = cool(pool.state, first, classify("github-copilot", "account", 429, {"retry-after": f"{week_s - now:.0f}"}, body, utc=UTC + now), now, jitter=0.5)
        assert cooldown is not None and cooldown.until_at == pytest.approx(week_s) and cooldown.proven
    refused(0.0)
    assert pool.plan(0.3 * week_s).routes == (second,), "not while another one is there"
    cool(pool.state, second, classify("custom", "account", 404, {}, b'{"error": {"message": "The model m is decommissioned."}}', utc=UTC), 0.0, jitter=0.5)
    asked = []
    for percent in range(1, 100):
        now = week_s * percent / 100.0
        if (found := pool.plan(now)).routes and now < DAY or found.routes[:1] == (first,):
            assert found.routes == (first,) and found.free_at is not None
            asked.append(percent)
            begin_attempt(pool.state, pool.choice, first)
            assert first not in pool.plan(now).routes, "one at a time"
            refused(now)
        cool(pool.state, second, classify("custom", "account", 404, {}, b'{"error": {"message": "The model m is decommissioned."}}', utc=UTC), now, jitter=0.5)
    assert asked == [25, 50, 75]
    pool.state.cooling["credential a/1"].n_asked = 2
    begin_attempt(pool.state, pool.choice, first)
    clear(pool.state, first)
    assert pool.plan(0.8 * week_s).routes == (first,) and "credential a/1" not in pool.state.cooling, "and a success ends it"


def test_a_short_proven_time_is_simply_kept() -> None:
    pool, route, _ = pool_of("")
    cool(pool.state, route, classify("custom", "account", 429, {"retry-after": "59"}, b"", utc=UTC), 0.0, jitter=0.5)
    assert not any(pool.plan(float(now)).routes for now in range(59)) and pool.plan(59.0).routes == (route,)


def test_while_a_limit_is_probed_the_others_wait() -> None:
    pool, route, _ = pool_of("")
    cool(pool.state, route, classify("custom", "account", 429, {}, b"", utc=UTC), 0.0, jitter=0.5)
    begin_attempt(pool.state, pool.choice, route)
    found = pool.plan(2.0, give_up_at=30.0)
    assert found.routes == () and found.free_at == 2.5 and not found.proven
    assert len(Ledger().buckets) == 0
