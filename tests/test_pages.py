"""Section 39, Pages: what `/` is to a browser and to others, and what it is told by /admin."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aicarousel
from fakes import FAKE_KEY, ROLE, Pause, Provider, Reply, answer, chat_body, content, healthy, stream
from house import House

Build = Callable[..., House]
SLOW_DOWN = answer({"error": {"message": f"Slow down, {FAKE_KEY}\x1b[2J", "code": "rate_limit_exceeded"}}, 429, [("retry-after", "120")])


def admin(house: House, path: str) -> Any:
    key, _ = aicarousel.create_key(house.database, "admin", limits={"admin": True})
    reply = house.request("GET", path, key=key)
    assert reply.status == 200, reply.raw
    return reply.json


def page(house: House) -> Reply:
    return house.get("/", headers={"accept": "text/html,application/xhtml+xml"}, key="")


def test_a_browser_gets_a_page_and_all_else_some_lines(build: Build) -> None:
    house = build(a=healthy())
    assert house.get("/", key="").headers["content-type"].startswith("text/plain")
    reply = page(house)
    assert reply.status == 200 and reply.headers["content-type"] == "text/html; charset=utf-8" and reply.headers["cache-control"] == "no-store"
    assert house.request("HEAD", "/", headers={"accept": "text/html"}, key="").status == 200


def test_the_page_runs_its_own_script_alone_and_loads_nothing(build: Build) -> None:
    house = build(a=healthy())
    reply = page(house)
    text = reply.body.decode()
    policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'" and policy["frame-ancestors"] == "'none'" and "unsafe" not in str(policy)
    for kind, name in (("style", "style-src"), ("script", "script-src")):
        [source] = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.S)
        assert policy[name] == f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
    assert not re.search(r"https?://(?!127\.0\.0\.1)|innerHTML|\son\w+=|\sstyle=|\bsrc=|url\(|@import|eval\(", text)
    assert set(re.findall(r'href="([^"]*)"', text)) == {"/docs", "data:,"}


def test_recipes_stand_in_the_page_as_data_that_cannot_end_it(build: Build) -> None:
    house = build(a=healthy())
    house.gateway.recipes = lambda: {"odd": "</script><script>alert(1)</script> {url} {key}"}
    text = page(house).body.decode()
    assert text.count("</script>") == 2 and "\\u003c/script>\\u003cscript>alert(1)" in text


def test_the_page_has_what_config_prints_of_every_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("CLAUDE_CONFIG_DIR", "CODEX_HOME", "CLINE_DATA_DIR", "XDG_CONFIG_HOME", "CONTINUE_GLOBAL_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, client in aicarousel.CLIENTS.items():
        assert aicarousel.main(["config", name, "--home", str(tmp_path), "--key", "sk-of-mine"]) == 0
        assert capsys.readouterr().out == aicarousel.page_recipes()[client.title].replace("{url}", "http://127.0.0.1:7123").replace("{key}", "sk-of-mine") + "\n"
    # The page is shown to anyone: of this machine's own places it says nothing.
    (tmp_path / ".config" / "opencode").mkdir(parents=True)
    (tmp_path / ".config" / "opencode" / "opencode.jsonc").write_text("{}")
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path))
    aicarousel.page_recipes.cache_clear()
    assert str(tmp_path) not in str(aicarousel.page_recipes())


def luminance(color: str) -> float:
    """Relative luminance after WCAG 2."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    parts = [int(digits[place:place + 2], 16) / 255 for place in (0, 2, 4)]
    return sum(share * (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4) for share, part in zip((0.2126, 0.7152, 0.0722), parts))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_everything_can_be_read_and_told_apart(theme: int) -> None:
    assert contrast("#000", "#ffffff") == pytest.approx(21.0)
    colors = dict(re.findall(r"--(\w+):(#[0-9a-f]+)", re.findall(r":root\{([^}]*)\}", aicarousel._PAGE_STYLE)[theme]))
    words = [(ink, ground) for ink in ("ink", "soft", "accent", "good", "warm", "bad") for ground in ("paper", "card")] + [("ink", "fill"), ("paper", "accent")]
    shapes = [(bar, ground) for bar in ("in", "out", "good", "warm", "bad") for ground in ("card", "fill")]
    assert not {pair: contrast(colors[pair[0]], colors[pair[1]]) for pair in words if contrast(colors[pair[0]], colors[pair[1]]) < 4.5}
    assert not {pair: contrast(colors[pair[0]], colors[pair[1]]) for pair in shapes if contrast(colors[pair[0]], colors[pair[1]]) < 3.0}


def test_requests_under_way_and_ended_are_listed(build: Build, provider: Provider) -> None:
    house = build(a=SLOW_DOWN, b=stream(Pause("head"), ROLE, content("one"), Pause("more")), carousel={"strategy": "priority"})
    with house.start_chat("aicarousel") as client:
        provider.wait_calls("b")
        [row] = admin(house, "/admin/requests")["live"]
        assert (row["format"], row["model"], row["streamed"], row["route"], row["attempts"], row["state"]) == ("chat", "aicarousel", True, "b/1:m", 2, "asking") and row["for_s"] >= 0
        provider.release("head")
        provider.wait_paused("more")
        house.settle()
        assert [row["state"] for row in admin(house, "/admin/requests")["live"]] == ["answering"]
        client.close()
    house.wait(lambda: not house.gateway.relay.running)
    shown = admin(house, "/admin/requests")
    assert shown["live"] == [] and shown["requests"] == 1 and shown["version"] == aicarousel.__version__
    [row] = shown["last"]
    assert (row["outcome"], row["status"], row["route"], row["attempts"]) == ("client_closed", 499, "b/1:m", 2) and row["total_ms"] >= row["first_ms"]


def test_no_more_than_a_hundred_are_listed_the_newest_first(build: Build) -> None:
    house = build(a=healthy())
    ids = [house.chat("aicarousel").headers["x-aicarousel-request-id"] for _ in range(103)]
    house.settle()
    assert [row["id"] for row in admin(house, "/admin/requests")["last"]] == ids[:2:-1]


def test_routes_tell_their_key_their_buckets_and_their_last_error(build: Build) -> None:
    house = build(a=SLOW_DOWN, b=healthy(), entries={"a": {"keys": [{"key": "env:FAKE_KEY", "label": "team"}]}}, carousel={"strategy": "priority"})
    assert house.chat("aicarousel").status == 200
    house.settle()
    first, second = admin(house, "/admin/routes")["routes"]
    assert (first["provider"], first["key"], first["model"], first["state"], first["proven"]) == ("a", "team", "m", "cooling", True)
    assert first["last_error"].startswith("rate") and "(429) Slow down" in first["last_error"] and FAKE_KEY not in str(first) and "\x1b" not in str(first)
    assert (second["key"], second["state"], second["last_error"]) == ("1", "free", None)
    windows = admin(house, "/admin/quota")["windows"]
    assert second["buckets"] and {row["bucket"] for row in windows} & set(second["buckets"])


def test_what_clients_call_their_models_is_shown_as_one_line_without_secrets(build: Build) -> None:
    house = build(a=healthy())
    house.post("/v1/chat/completions", chat_body(f"{FAKE_KEY}\n\x1b[31m<b>"))
    house.settle()
    [row] = admin(house, "/admin/requests")["last"]
    assert FAKE_KEY not in row["model"] and row["model"].isprintable() and "<b>" in row["model"]


# ---------------------------------------------------------------- the API described

def test_the_description_is_of_every_endpoint_and_is_valid(build: Build) -> None:
    validator = pytest.importorskip("openapi_spec_validator")
    house = build(a=healthy())
    reply = house.get("/openapi.json", key="")
    assert reply.status == 200 and reply.headers["content-type"] == "application/json"
    validator.validate(reply.json)
    told = {(method.upper(), path, "admin" if {"admin": []} in call["security"] else "key" if {"key": []} in call["security"] else "open")
            for path, methods in reply.json["paths"].items() for method, call in methods.items()}
    there = {(method, f"{path}{{id}}" if path.endswith("/models/") else path, "admin" if row.admin else "key" if row.needs_key else "open")
             for path, row in aicarousel._ENDPOINTS.items() for method in row.handlers if method != "HEAD"}
    assert told == there


def test_every_sample_can_be_sent_as_it_stands(build: Build) -> None:
    house = build(a=healthy())
    key, _ = aicarousel.create_key(house.database, "admin", limits={"admin": True})
    for path, methods in house.get("/openapi.json", key="").json["paths"].items():
        for method, call in methods.items():
            body = call.get("requestBody", {}).get("content", {}).get("application/json", {}).get("example")
            reply = house.request(method.upper(), path.replace("{id}", "aicarousel"), body, key=key)
            expected = {("post", "/v1/embeddings"): 404, ("get", "/v1/responses"): 426}.get((method, path), 200)       # no provider here has embeddings
            assert reply.status == expected, (path, reply.raw)


def test_the_docs_page_carries_the_description(build: Build) -> None:
    house = build(a=healthy())
    reply = house.get("/docs", headers={"accept": "text/html"}, key="")
    [written] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', reply.body.decode())
    assert json.loads(written) == house.get("/openapi.json", key="").json
    assert "script-src 'sha256-" in reply.headers["content-security-policy"]


# ---------------------------------------------------------------- metrics

LINE = re.compile(r'([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\]|\\.)*",?)*)\})? (-?[0-9.e+]+|\+Inf)')


def metrics(house: House) -> dict[str, float]:
    """Each sample of /metrics by name and labels; every line is a sample or a comment that announces one."""
    reply = house.get("/metrics")
    assert reply.status == 200 and reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples: dict[str, float] = {}
    kinds: dict[str, str] = {}
    for line in reply.body.decode().splitlines():
        if line.startswith("# "):
            _, word, name, rest = line.split(" ", 3)
            if word == "TYPE":
                assert name not in kinds
                kinds[name] = rest
            continue
        match = LINE.fullmatch(line)
        assert match, line
        assert match[1] in kinds or re.sub("_(bucket|sum|count)$", "", match[1]) in kinds, line
        assert line.rpartition(" ")[0] not in samples
        samples[line.rpartition(" ")[0]] = float(match[3])
    return samples


def test_metrics_count_what_happened(build: Build) -> None:
    house = build(a=SLOW_DOWN, b=healthy(), carousel={"strategy": "priority"})
    assert house.get("/metrics", key="").status == 401
    for _ in range(3):
        assert house.chat("aicarousel").status == 200
    assert house.post("/v1/messages", {"model": "nobody/knows", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}).status == 200
    house.settle()
    rows = house.wait_rows(4)
    told = metrics(house)
    assert told['aicarousel_requests_total{format="chat",outcome="ok"}'] == 3 and told['aicarousel_requests_total{format="messages",outcome="ok"}'] == 1
    assert told['aicarousel_attempts_total{provider="b",result="served"}'] == 4
    assert sum(value for name, value in told.items() if name.startswith('aicarousel_attempts_total{provider="a"')) == 1
    assert told['aicarousel_tokens_total{provider="b",kind="input"}'] == sum(row["input"] + row["cached"] + row["cache_write"] for row in rows)
    assert told['aicarousel_tokens_total{provider="b",kind="output"}'] == sum(row["output"] for row in rows)
    assert told["aicarousel_request_seconds_count"] == 4 == told['aicarousel_request_seconds_bucket{le="+Inf"}']
    counts = [value for name, value in told.items() if name.startswith("aicarousel_request_seconds_bucket")]
    assert counts == sorted(counts)
    assert told['aicarousel_routes{provider="a",state="cooling"}'] == 1 and told['aicarousel_routes{provider="b",state="free"}'] == 1
    assert told["aicarousel_running_requests"] == 0 and told[f'aicarousel_info{{version="{aicarousel.__version__}"}}'] == 1


def test_the_number_of_labels_does_not_grow_with_what_clients_send(build: Build) -> None:
    house = build(a=healthy())
    house.chat("aicarousel")
    house.settle()
    before = len(metrics(house))
    for number in range(30):
        house.post("/v1/chat/completions", chat_body(f"a/name-{number}"), headers={"x-session-id": f"s{number}"})
    house.settle()
    assert len(metrics(house)) == before


def test_odd_names_are_written_as_the_format_wants() -> None:
    tally = aicarousel.Tally()
    tally.counts["cost", 'a"b\\c\nd'] += 0.5
    text = aicarousel.metrics_text(tally, {})
    assert 'aicarousel_cost_usd_total{provider="a\\"b\\\\c\\nd"} 0.5\n' in text
