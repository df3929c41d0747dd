"""Section 30, the request log: a line of JSON for every request that ended, within caps, without secrets, and never in a request's way."""

from __future__ import annotations

import json
import logging
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import aicarousel
from aicarousel import ConfigError, RequestLog, UsageRow
from fakes import FAKE_KEY, HANG_S, Gateway, Provider, answer, chat_body, healthy
from house import House, entry

Build = Callable[..., House]
DAY_S = 86_400.0
AT = time.time()        # files have the times of the file system
SLOW_DOWN = answer({"error": {"message": f"Slow down, {FAKE_KEY}", "code": "rate_limit_exceeded"}}, 429, [("retry-after", "120")])


def row(at: float = AT, **more: Any) -> UsageRow:
    """A request that ended."""
    text = aicarousel.datetime.fromtimestamp(at, aicarousel.timezone.utc).isoformat(timespec="milliseconds")
    told: dict[str, Any] = dict(request_id="r1", at_utc=text, key_id=1, key_name="ci", client_format="chat", model="fast", provider="a", credential="a/1", wire_model="m", route="a/1:m", input=5, output=3, cached=0,
                                cache_write=0, reasoning=0, cost_usd=None, estimated=False, status=200, outcome="ok", first_ms=4, total_ms=9, attempts=1, streamed=False, price="")
    return UsageRow(**{**told, **more})


class Log:
    """A request log on a clock of the test's."""

    def __init__(self, folder: Path, **more: Any) -> None:
        self.now, self.path = AT, folder / "requests.jsonl"
        self.log = RequestLog(self.path, utc=lambda: self.now, **more)

    def put(self, body: Any = None, n_bytes: int = 0, secrets: tuple[str, ...] = (), told: str = "", **more: Any) -> None:
        self.log.put(row(self.now, **more), (), told, body, n_bytes, secrets)

    def flush(self) -> None:
        assert self.log.flush(HANG_S)

    def write(self, *names: str, **more: Any) -> None:
        """A line each, on the disk one after the other."""
        for name in names:
            self.put(request_id=name, **more)
            self.flush()

    def files(self) -> dict[str, list[Any]]:
        """What stands in each file, by what its name ends with; its thread may move one just when it is read."""
        ends_at = time.monotonic() + HANG_S
        while True:
            try:
                return {path.name.removeprefix(self.path.name): [json.loads(line) for line in path.read_bytes().splitlines()]
                        for path in sorted(self.path.parent.iterdir()) if path.name.startswith(self.path.name)}
            except FileNotFoundError:
                assert time.monotonic() < ends_at

    def ids(self) -> dict[str, list[str]]:
        return {name: [line["request_id"] for line in lines] for name, lines in self.files().items()}


@pytest.fixture
def make_log(tmp_path: Path) -> Iterator[Callable[..., Log]]:
    made: list[Log] = []

    def make(**more: Any) -> Log:
        made.append(Log(tmp_path, **more))
        return made[-1]

    yield make
    for one in made:
        one.log.close()


# ---------------------------------------------------------------- lines

def test_a_line_has_the_usage_row_the_attempts_and_what_was_told(build: Build, tmp_path: Path) -> None:
    house = build(a=SLOW_DOWN, b=healthy(), carousel={"strategy": "priority", "maxWait": 0})
    house.gateway.request_log = log = RequestLog(tmp_path / "log")
    assert house.chat("aicarousel").status == 200 and house.chat("a/m").status == 200 and house.chat("nobody", provider={"only": ["a"]}).status == 429
    rows = house.wait_rows(3)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    for line, stored in zip(lines, rows, strict=True):
        stored.pop("id", None)
        assert {name: line[name] for name in stored} == {**stored, "estimated": bool(stored["estimated"]), "streamed": bool(stored["streamed"])}
    assert [(one["route"], one["status"], one["reason"]) for one in lines[0]["tried"]] == [("a/1:m", 429, "rate_minute"), ("b/1:m", 200, "served")]
    assert "Slow down, ***" in lines[0]["tried"][0]["detail"] and lines[0]["told"] == ""
    assert lines[2]["outcome"] == "error" and lines[2]["told"] and not any("body" in line for line in lines)
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600 and FAKE_KEY not in (tmp_path / "log").read_text()


def test_who_is_refused_for_the_limits_of_its_key_is_in_it(build: Build, tmp_path: Path) -> None:
    house = build(a=healthy())
    house.gateway.request_log = log = RequestLog(tmp_path / "log", bodies="errors")
    key, _ = aicarousel.create_key(house.database, "small", limits={"rpm": 1})
    assert [house.request("POST", "/v1/chat/completions", chat_body("a/m"), key=key).status for _ in range(2)] == [200, 429]
    house.settle()
    log.close()
    served, refused = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert "body" not in served and (refused["status"], refused["outcome"], refused["key_name"], refused["tried"]) == (429, "error", "small", [])
    assert "1 request per minute" in refused["told"] and refused["body"]["model"] == "a/m"


@pytest.mark.parametrize(("bodies", "expected"), [("", []), ("errors", ["bad"]), ("all", ["good", "bad"])])
def test_bodies_are_in_it_when_they_are_asked_for(make_log: Callable[..., Log], bodies: str, expected: list[str]) -> None:
    log = make_log(bodies=bodies)
    log.put({"name": "good"}, 10)
    log.put({"name": "bad"}, 10, outcome="error")
    log.flush()
    assert [line["body"]["name"] for line in log.files()[""] if "body" in line] == expected


def test_no_secret_comes_into_it(make_log: Callable[..., Log]) -> None:
    """By value, by what it looks like, and by what it is called; as keys, escaped, inside JSON inside a string, and across where a body is cut."""
    log, known = make_log(bodies="all"), 'not"like\\any/secret-0815'
    planted = [known, "sk-planted0123456789", "gsk_planted0123456789", "plantedpassword", "planted-access"]
    body = {"messages": [{"role": "user", "content": f"my key is {known}, Bearer {planted[1]}"}], planted[2]: known, known: 1, "password": planted[3], "deep": [[{"api_key": planted[3], "access_token": planted[4]}]],
            "arguments": json.dumps({"password": planted[3], "key": planted[1]})}
    log.put(body, 100, (known,), f"told {known}", model=f"{planted[1]} {known}", key_name=planted[2])
    cut = {"content": ""}
    for place in range(60_000, 66_000, 97):
        cut["content"] = "x" * (place - len(cut["content"])) + known
        log.put(dict(cut), 100, (known,))
    log.flush()
    text = log.path.read_text()
    assert not [secret for secret in planted if secret in text or json.dumps(secret)[1:-1] in text or "not\\" in text]
    [first, *others] = [json.loads(line) for line in text.splitlines()]
    assert first["body"]["messages"][0]["content"] == "my key is ***, Bearer ***" and first["told"] == "told ***" and first["body"]["password"] == "***"
    assert others and not [line for line in others if "not" in line["body"]["content"]]


@pytest.mark.parametrize("body", [
    {"content": "a" * 200_000}, {"content": "\u65e5\U0001f600\x00" * 50_000}, ["word"] * 50_000, {f"name{number}": number for number in range(50_000)}, {"n" * 100_000: 1}, [[["x" * 70_000]]] * 20, [1.5] * 100_000,
    [[[[[[{"a": "x" * 30_000}]]]]], {"b": "y" * 30_000}, {"c": "z" * 30_000}],
], ids=["one text", "wide letters", "many texts", "many names", "a long name", "nested", "numbers", "several"])
def test_bodies_are_cut_at_64_kb_and_stay_json(make_log: Callable[..., Log], body: Any) -> None:
    log = make_log(bodies="all")
    log.put(body, 1000)
    log.put({"content": "short"}, 10)
    log.flush()
    first, second = log.files()[""]
    written = json.dumps(first["body"], separators=(",", ":"))
    assert 50_000 < len(written) <= 64 << 10 or body == {"n" * 100_000: 1} and len(written) <= 64 << 10
    assert "..." in written and second["body"] == {"content": "short"}


def test_what_clients_and_providers_call_things_does_not_make_a_line_long(make_log: Callable[..., Log]) -> None:
    log = make_log()
    log.put(model="m" * 1_000_000, told="t" * 1_000_000)
    log.flush()
    [line] = log.files()[""]
    assert len(line["model"]) < 1100 and line["model"].endswith("...") and len(line["told"]) < 1100


# ---------------------------------------------------------------- caps

def test_files_move_on_by_size_and_all_together_stay_within_the_cap(make_log: Callable[..., Log], tmp_path: Path) -> None:
    log = make_log(max_bytes=8 * 2000)
    for number in range(200):
        log.put(request_id=f"r{number:03}")
        if number % 7 == 0:
            log.flush()
    log.flush()
    ids = log.ids()
    assert set(ids) == {"", *(f".{number}" for number in range(1, 8))}
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert max(sizes) <= 2000 and sum(sizes) <= 16_000 and min(sizes) > 0
    written = [name for number in range(7, 0, -1) for name in ids[f".{number}"]] + ids[""]
    assert written == [f"r{number:03}" for number in range(200)][-len(written):]


def test_a_smaller_cap_is_kept_to_at_once(make_log: Callable[..., Log], tmp_path: Path) -> None:
    log = make_log(max_bytes=8 * 2000)
    log.write(*(f"r{number}" for number in range(40)))
    log.log.max_bytes = 8 * 700
    log.write("last")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 8 * 700 and log.ids()[""][-1] == "last"


def test_files_move_on_by_age_and_no_line_stays_longer_than_it_may(make_log: Callable[..., Log]) -> None:
    log = make_log(max_days=8)
    for day in range(20):
        log.now = AT + day * DAY_S * 0.6
        log.write(f"r{day}")
        os.utime(log.path, (log.now, log.now))                      # as if the file system had that clock too
        stays = [line["at_utc"] for lines in log.files().values() for line in lines]
        assert all(log.now - aicarousel.datetime.fromisoformat(at).timestamp() <= 8 * DAY_S for at in stays)
    assert len(log.files()) > 3 and sum(map(len, log.ids().values())) < 16


def test_age_counts_from_a_start_before_and_where_nothing_is_written(make_log: Callable[..., Log], monkeypatch: pytest.MonkeyPatch) -> None:
    log = make_log(max_days=8)
    log.write("old")
    log.log.close()
    monkeypatch.setattr(aicarousel, "_LOG_LOOK_S", 0.01)
    os.utime(log.path, (AT, AT))
    again = make_log(max_days=8)
    again.now = AT + 1.5 * DAY_S
    ends_at = time.monotonic() + HANG_S
    while again.ids() != {".1": ["old"]}:
        assert time.monotonic() < ends_at
        time.sleep(0.01)
    again.now = AT + 7.5 * DAY_S
    while again.ids():
        assert time.monotonic() < ends_at
        time.sleep(0.01)


def test_what_others_move_away_or_leave_readable_is_no_trouble(make_log: Callable[..., Log]) -> None:
    log = make_log()
    log.write("one")
    log.path.rename(log.path.with_name("elsewhere"))
    log.write("two")
    log.path.chmod(0o644)
    log.write("three")
    assert log.ids() == {"": ["two", "three"]} and log.path.stat().st_mode & 0o777 == 0o600


# ---------------------------------------------------------------- disks

@pytest.fixture
def warned() -> Iterator[list[str]]:
    lines: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("aicarousel.store")
    handler.emit = lambda record: lines.append(record.getMessage())     # type: ignore[method-assign]
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def test_a_full_disk_is_said_once_and_leaves_no_half_line(make_log: Callable[..., Log], warned: list[str]) -> None:
    log = make_log()
    log.write("before")
    size, limits = log.path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + size // 2, limits[1]))        # half a line fits
        log.write("lost1", "lost2")
        assert log.path.stat().st_size == size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))                    # and now none of it
        log.write("lost3")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(warned) == 1 and warned[0].startswith(f"requests.failed path={log.path} error=")
    log.write("after")
    assert log.ids() == {"": ["before", "after"]} and warned[1:] == [f"requests.go_on path={log.path} lost=3"]


def test_requests_go_on_where_the_log_does_not(build: Build, tmp_path: Path) -> None:
    house = build(a=healthy())
    house.gateway.request_log = log = RequestLog(tmp_path / "gone" / "log")
    assert [house.chat("a/m").status for _ in range(3)] == [200, 200, 200]
    house.settle()
    assert log.flush(HANG_S) and len([line for line in house.lines if "requests.failed" in line]) == 1
    (tmp_path / "gone").mkdir()
    assert house.chat("a/m").status == 200
    house.settle()
    log.close()
    assert len((tmp_path / "gone" / "log").read_text().splitlines()) == 1
    assert len([line for line in house.lines if "requests.go_on" in line and "lost=3" in line]) == 1


def test_a_disk_that_hangs_costs_bounded_memory(make_log: Callable[..., Log], monkeypatch: pytest.MonkeyPatch, warned: list[str]) -> None:
    hangs, entered = threading.Event(), threading.Event()
    really = aicarousel._open_log

    def stuck(path: Path) -> int:
        entered.set()
        assert hangs.wait(HANG_S)
        return really(path)

    monkeypatch.setattr(aicarousel, "_open_log", stuck)
    log = make_log(bodies="all")
    log.put(request_id="first")
    assert entered.wait(HANG_S)
    began_at = time.monotonic()
    for number in range(40):
        log.put({"number": number}, 1 << 20, request_id="with body")
    for _ in range(aicarousel.MAX_WAITING_ROWS):
        log.put(request_id="more")
    assert log.log._queue.qsize() == aicarousel.MAX_WAITING_ROWS and time.monotonic() - began_at < HANG_S / 2
    hangs.set()
    log.flush()
    with_body = [line for lines in log.files().values() for line in lines if line["request_id"] == "with body"]
    assert [line["body"]["number"] for line in with_body if "body" in line] == list(range(32)) and len(with_body) == 40
    log.put({"number": -1}, 1 << 20, request_id="afterwards")
    log.flush()
    assert log.files()[""][-1]["body"] == {"number": -1}


# ---------------------------------------------------------------- what it can be written to

@pytest.mark.parametrize("what", ["folder", "pipe", "database", "text", "older", "broken", "nowhere"])
def test_what_can_be_no_request_log_is_refused_and_untouched(tmp_path: Path, what: str) -> None:
    path = tmp_path / "log"
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "nowhere":
        path = tmp_path / "no" / "log"
    else:
        name = path.with_name("log.3") if what == "older" else path
        name.write_bytes({"database": b"SQLite format 3\0" + bytes(100), "text": b'{"providers": 1}\n', "older": b"some text\n", "broken": b'{"at_utc":"2026-13-45T99:99:99.000+00:00",'}[what])
    before = {one.name: one.read_bytes() for one in tmp_path.iterdir() if one.is_file()}
    with pytest.raises(ConfigError) as told:
        aicarousel.check_request_log(path)
    assert str(path) in told.value.where and "request log" in told.value.expected
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir() if one.is_file() and one.name in before} == before


def test_a_log_of_before_is_gone_on_with(make_log: Callable[..., Log]) -> None:
    log = make_log()
    log.write("one")
    log.log.close()
    aicarousel.check_request_log(log.path)
    make_log().write("two")
    assert log.ids() == {"": ["one", "two"]}


# ---------------------------------------------------------------- serve

def test_serve_writes_it_where_it_is_told_and_takes_new_limits(provider: Provider, gateway_factory: Callable[..., Gateway], tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    models = {"a": entry(provider.listen("a", healthy()))}
    gateway = gateway_factory(models, {"FAKE_KEY": FAKE_KEY, "AICAROUSEL_LOG_BODIES": "all"}, arguments=["--request-log", str(path)])
    assert gateway.chat("a/m", "Say hello").status == 200
    assert gateway.stop() == 0
    [line] = [json.loads(text) for text in path.read_text().splitlines()]
    assert (line["route"], line["outcome"], line["body"]["messages"][0]["content"]) == ("a/1:m", "ok", "Say hello")


def test_serve_refuses_a_file_that_is_something_else(gateway_factory: Callable[..., Gateway]) -> None:
    gateway = gateway_factory({"a": entry("http://127.0.0.1:9/v1")}, {"FAKE_KEY": FAKE_KEY})
    before = (gateway.home / "models.json").read_bytes()
    done = gateway.command("serve", "--port", "0", "--request-log", str(gateway.home / "models.json"))
    assert done.returncode == 2 and "a file of its own for the request log" in done.stderr and "Traceback" not in done.stderr
    assert (gateway.home / "models.json").read_bytes() == before


def test_an_edit_changes_caps_and_bodies_of_a_running_log(build: Build, tmp_path: Path) -> None:
    house = build(a=healthy())
    house.gateway.request_log = log = RequestLog(tmp_path / "log")
    house.reconfigure({**house.models, "carousel": {"limits": {"requestLogBytes": 1 << 20, "requestLogDays": 3}}})
    assert (log.max_bytes, log.max_days, log.bodies) == (1 << 20, 3, "")
    log.close()
