"""Gateways elsewhere: remembered, asked by every command that takes --server."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fakes import Gateway, clean_environment, invocation, ROOT

KEY = "sk-" + "5" * 64


class Desk:
    """Another home, from which gateways elsewhere are asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "desk"

    def run(self, *words: str, typed: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run([*invocation(ROOT / "aicarousel.py"), *words, "--home", str(self.home)], env=clean_environment(self.folder), cwd=self.folder, input=typed,
                              capture_output=True, text=True, timeout=60)

    def json(self, *words: str) -> object:
        ran = self.run(*words, "--json")
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture(scope="module")
def far(module_gateway_factory: Callable[..., Gateway]) -> Iterator[tuple[Gateway, str]]:
    """A gateway that served one request, and an admin key of it."""
    gateway = module_gateway_factory(arguments=["--demo"])
    made = gateway.command("key", "create", "admin", "--admin", "--json")
    assert gateway.post("/v1/chat/completions", {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}).status == 200
    yield gateway, json.loads(made.stdout)["key"]


def test_a_context_in_use_answers_what_takes_a_server(desk: Desk, far: tuple[Gateway, str]) -> None:
    gateway, key = far
    added = desk.run("context", "add", "far", "--server", gateway.url, "--stdin", typed=key + "\n")
    assert added.returncode == 0 and key not in added.stdout + added.stderr
    assert desk.run("call", "Hello", "-m", "demo").returncode == 1, "nothing runs here, and no context is in use yet"
    assert desk.json("context", "use", "far") == [{"name": "far", "server": gateway.url, "key": f"...{key[-4:]}", "current": True}]
    called = desk.run("call", "Hello", "-m", "demo")
    assert called.returncode == 0 and "AICarousel" in called.stdout, called.stderr
    assert desk.json("stats")["total"]["requests"] >= 1           # type: ignore[index]
    assert "demo/1:demo" in desk.run("route", "list").stdout
    assert "served with 200" in desk.run("explain", "--last").stdout
    assert desk.run("quota").returncode == 0
    assert gateway.url in desk.run("config", "curl").stdout
    assert desk.run("context", "use", "none").returncode == 0 and desk.run("call", "Hello").returncode == 1
    assert not (desk.home / "data").exists(), "looking elsewhere makes no database here"


def test_contexts_are_kept_for_their_owner_alone_and_shown_without_keys(desk: Desk) -> None:
    assert desk.run("context", "list").stdout == "no context: commands ask the gateway of this home\n"
    desk.run("context", "add", "a", "--server", "https://gateway.example", "--stdin", typed=KEY)
    desk.run("context", "add", "b", "--server", "http://127.0.0.1:9", "--stdin", typed="\n")
    path = desk.home / "contexts.json"
    assert path.stat().st_mode & 0o777 == 0o600 and KEY in path.read_text()
    shown = desk.run("context", "list").stdout
    assert KEY not in shown and "https://gateway.example" in shown and f"...{KEY[-4:]}" in shown
    desk.run("context", "use", "b")
    assert desk.run("context", "remove", "b").returncode == 0
    assert desk.json("context", "list") == [{"name": "a", "server": "https://gateway.example:443", "key": f"...{KEY[-4:]}", "current": False}]


@pytest.mark.parametrize(("words", "typed", "status", "told"), [
    (["context", "use", "nowhere"], "", 1, "there is no context nowhere; none was added yet"),
    (["context", "remove", "nowhere"], "", 1, "there is no context nowhere"),
    (["context", "add", "x", "--server", "ftp://h"], "", 2, "--server"),
    (["context", "add", "none", "--server", "http://127.0.0.1:9"], "", 2, "context"),
    (["context", "add", "x", "--server", "http://127.0.0.1:9", "--stdin"], "two words\n", 1, "that is no key"),
    (["quota", "--server", "http://gateway.example", "--key", KEY], "", 2, "an https address"),
    (["quota", "--server", "http://127.0.0.1:9", "--key", KEY], "", 2, "gateway at 127.0.0.1:9"),
])
def test_what_cannot_be_is_told_in_one_line(desk: Desk, words: list[str], typed: str, status: int, told: str) -> None:
    ran = desk.run(*words, typed=typed)
    assert ran.returncode == status and told in ran.stderr and ran.stderr.count("\n") == 1 and KEY not in ran.stderr, ran.stderr


def test_a_broken_file_of_contexts_is_told_and_stops_no_other_command(desk: Desk) -> None:
    desk.home.mkdir()
    (desk.home / "contexts.json").write_text("{")
    ran = desk.run("call", "Hello")
    assert ran.returncode == 2 and "contexts.json" in ran.stderr and ran.stderr.count("\n") == 1
    assert desk.run("status").returncode == 0
