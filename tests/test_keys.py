"""Gateway keys over a running server: made, used and taken back by other processes, without a restart."""

from __future__ import annotations

import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from fakes import FAKE_KEY, HANG_S, Gateway, Provider, chat_body, healthy, invocation, read_reply

KEY = re.compile(r"sk-[0-9a-f]{64}")
Start = Callable[..., Gateway]


def models(provider: Provider) -> dict[str, Any]:
    return {"well": {"baseUrl": provider.script("well", healthy()), "default": "m", "enableFallback": False, "models": ["m"], "keys": ["env:FAKE_KEY"]}}


@pytest.fixture(scope="module")
def gateway(module_provider: Provider, module_gateway_factory: Start) -> Gateway:
    return module_gateway_factory(models(module_provider), {"FAKE_KEY": FAKE_KEY})


def rows(gateway: Gateway) -> dict[int, dict[str, Any]]:
    """`key list --json` by id."""
    listed = gateway.command("key", "list", "--json")
    assert listed.returncode == 0, listed.stderr
    return {row["id"]: row for row in json.loads(listed.stdout)}


def status(gateway: Gateway, key: str) -> int:
    """What a chat completion with `key` is answered by."""
    return gateway.post("/v1/chat/completions", chat_body("well/m"), key=key).status


def run(gateway: Gateway, *words: str, home: bool = True) -> subprocess.CompletedProcess[str]:
    """A command that must fail by itself, also one that would serve."""
    return subprocess.run([*invocation(gateway.program), *words, *(["--home", str(gateway.home)] if home else [])], env=gateway.environment, cwd=gateway.folder,
                          capture_output=True, text=True, timeout=HANG_S, stdin=subprocess.DEVNULL)


# ---------------------------------------------------------------- while the server runs

def test_created_in_another_process_and_valid_at_once(gateway: Gateway) -> None:
    for number in range(3):
        assert status(gateway, gateway.create_key(f"key-{number}")) == 200


@pytest.mark.parametrize("action", ["revoke", "delete"])
def test_taken_back_in_another_process_and_refused_at_once(gateway: Gateway, action: str) -> None:
    made = json.loads(gateway.command("key", "create", action, "--json").stdout)
    with gateway.connect() as client:
        request = gateway.request_bytes("POST", "/v1/chat/completions", chat_body("well/m"), key=made["key"], close=False)
        client.send(request)
        client.read_until(lambda raw: read_reply(raw, "left").complete)
        assert client.reply().status == 200
        assert gateway.command("key", action, str(made["id"])).returncode == 0
        client.raw.clear()
        client.send(request)                 # the connection's good name does not help
        client.read_until(b"\r\n\r\n")
        assert client.reply().status == 401
    assert status(gateway, made["key"]) == 401
    assert status(gateway, gateway.key) == 200
    assert made["id"] not in rows(gateway) if action == "delete" else not rows(gateway)[made["id"]]["active"]


def test_uses_are_counted_and_dated(gateway: Gateway) -> None:
    made = json.loads(gateway.command("key", "create", "counted", "--json").stdout)
    assert rows(gateway)[made["id"]]["usage"] == 0 and not rows(gateway)[made["id"]]["last_used"]
    for _ in range(4):
        assert status(gateway, made["key"]) == 200
    deadline = time.monotonic() + 5.0
    while rows(gateway)[made["id"]]["usage"] < 4 and time.monotonic() < deadline:
        pass                    # rows are written in batches, within 0.3 s
    row = rows(gateway)[made["id"]]
    assert row["usage"] == 4 and row["last_used"] and row["name"] == "counted" and row["prefix"].startswith(made["key"][:6])


def test_keys_are_stored_as_hashes(gateway: Gateway) -> None:
    key = gateway.create_key("secret")
    data = [path for path in gateway.home.rglob("*") if path.is_file() and path.parent.name == "data"]
    assert data
    for path in data:
        assert key.encode() not in path.read_bytes() and key[3:].encode() not in path.read_bytes()
        assert path.stat().st_mode & 0o077 == 0, path
    assert key not in gateway.log and key not in gateway.command("key", "list").stdout


COMMANDS: list[tuple[tuple[str, ...], int]] = [
    (("key", "revoke", "99999"), 1), (("key", "delete", "99999"), 1), (("key", "revoke"), 2), (("key", "revoke", "x"), 2), (("key",), 2), (("key", "frobnicate"), 2),
    (("key", "create", "a", "--length", "8"), 2), (("key", "create", "a", "--length", "x"), 2), (("key", "list"), 0),
]


@pytest.mark.parametrize(("words", "code"), COMMANDS)
def test_exit_status(gateway: Gateway, words: tuple[str, ...], code: int) -> None:
    ended = run(gateway, *words, home=len(words) > 1 and words[1] in ("create", "list", "revoke", "delete"))
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr and bool(ended.stderr) == (code != 0)


@pytest.mark.parametrize("length", [32, 64, 128])
def test_length(gateway: Gateway, length: int) -> None:
    key = json.loads(gateway.command("key", "create", "long", "--length", str(length), "--json").stdout)["key"]
    assert re.fullmatch(rf"sk-[0-9a-f]{{{length}}}", key) and status(gateway, key) == 200


def test_change_of_the_database_alone_is_noticed_too(provider: Provider, gateway_factory: Start) -> None:
    """Also when it is made without our commands, as a restored backup or sqlite3 would, if not at once."""
    gateway = gateway_factory(models(provider), {"FAKE_KEY": FAKE_KEY})
    made = json.loads(gateway.command("key", "create", "--json", "other-tool").stdout)
    assert status(gateway, made["key"]) == 200
    [database] = gateway.home.rglob("aicarousel.db")
    copy = database.with_name("copy.db")
    with sqlite3.connect(database) as source, sqlite3.connect(copy) as target:
        source.backup(target)
    target.execute("PRAGMA journal_mode = DELETE")
    target.execute("DELETE FROM api_keys WHERE id = ?", (made["id"],))
    target.commit()
    target.close()
    source.close()
    for suffix in ("-wal", "-shm"):
        database.with_name(database.name + suffix).unlink(missing_ok=True)
    os.replace(copy, database)
    deadline = time.monotonic() + 5.0
    while status(gateway, made["key"]) == 200 and time.monotonic() < deadline:
        time.sleep(0.05)        # asks again and again; the wait only spares the machine
    assert status(gateway, made["key"]) == 401 and status(gateway, gateway.key) == 200


# ---------------------------------------------------------------- the first key

def start_bare(provider: Provider, **more: Any) -> Gateway:
    """A gateway that is started without any key made for it."""
    gateway = Gateway(models(provider), {"FAKE_KEY": FAKE_KEY}, **more)
    gateway.create_key = lambda name="test": ""     # type: ignore[method-assign]
    return gateway


def test_first_serve_makes_one_key_and_prints_it_once(provider: Provider) -> None:
    gateway = start_bare(provider)
    try:
        gateway.start()
        # Everything is printed in one go with the address, but the pipe may bring it in parts.
        deadline = time.monotonic() + 5.0
        while "curl" not in gateway.printed and time.monotonic() < deadline:
            time.sleep(0.01)
        [key] = set(KEY.findall(gateway.printed))
        assert all(name in gateway.printed for name in ("Claude Code", "Codex", "Cline", "curl")) and gateway.url in gateway.printed
        assert status(gateway, key) == 200 and key not in gateway.log
        assert [row["active"] for row in rows(gateway).values()] == [True]
        assert gateway.stop() == 0
        gateway.start()
        assert not KEY.search(gateway.printed) and status(gateway, key) == 200 and len(rows(gateway)) == 1
    finally:
        gateway.remove()


@pytest.mark.parametrize(("environment", "arguments"), [({"API_KEYS": "a-key-from-the-environment"}, ()), ({}, ("--no-auth",))], ids=["API_KEYS", "--no-auth"])
def test_no_first_key_where_none_is_needed(provider: Provider, environment: dict[str, str], arguments: tuple[str, ...]) -> None:
    gateway = start_bare(provider, environment=environment, arguments=arguments)
    try:
        gateway.start()
        assert not KEY.search(gateway.printed)
        assert status(gateway, environment.get("API_KEYS", "")) == 200 and status(gateway, "wrong") == (401 if environment else 200)
        assert gateway.stop() == 0 and rows(gateway) == {}
    finally:
        gateway.remove()


def test_revoking_the_last_key_opens_nothing(provider: Provider, gateway_factory: Start) -> None:
    gateway = gateway_factory(models(provider), {"FAKE_KEY": FAKE_KEY})
    [number] = rows(gateway)
    assert gateway.command("key", "revoke", str(number)).returncode == 0
    assert status(gateway, gateway.key) == 401 == status(gateway, "")


# ---------------------------------------------------------------- who may reach it

EXPOSED: dict[str, tuple[tuple[str, ...], dict[str, str], str]] = {
    "no key": (("--host", "0.0.0.0"), {}, "key create"),
    "no key, IPv6": (("--host", "::"), {}, "key create"),
    "no key, by environment": ((), {"AICAROUSEL_HOST": "0.0.0.0"}, "key create"),
    "no auth": (("--host", "0.0.0.0", "--no-auth"), {}, "--no-auth"),
    "no auth though there is a key": (("--host", "0.0.0.0", "--no-auth"), {"API_KEYS": "a-key-from-the-environment"}, "--no-auth"),
}


@pytest.mark.parametrize("name", EXPOSED)
def test_no_open_door_to_the_network(provider: Provider, name: str) -> None:
    arguments, environment, told = EXPOSED[name]
    gateway = start_bare(provider, environment=environment)
    try:
        ended = run(gateway, "serve", "--port", "0", *arguments)
        assert ended.returncode == 2 and told in ended.stderr and len(ended.stderr.strip().splitlines()) == 1
        assert "Traceback" not in ended.stderr and not KEY.search(ended.stdout + ended.stderr) and rows(gateway) == {}
    finally:
        gateway.remove()


def test_other_addresses_with_a_key(provider: Provider) -> None:
    gateway = Gateway(models(provider), {"FAKE_KEY": FAKE_KEY}, arguments=["--host", "0.0.0.0"])
    try:
        gateway.start()
        assert status(gateway, gateway.key) == 200 and status(gateway, "") == 401
    finally:
        gateway.remove()


def test_loopback_is_all_that_listens(gateway: Gateway) -> None:
    """On Linux, as the kernel has it."""
    with open(f"/proc/{gateway.pid}/net/tcp") as table:
        lines = [line.split() for line in table][1:]
    mine = [fields[1].split(":")[0] for fields in lines if fields[3] == "0A" and int(fields[1].split(":")[1], 16) == gateway.port]
    assert [socket.inet_ntoa(bytes.fromhex(address)[::-1]) for address in mine] == ["127.0.0.1"]
