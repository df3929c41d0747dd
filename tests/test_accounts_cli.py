"""Section 23, Accounts, by the plain commands: changes to models.json and .env, keys checked and stored, and a running server that sees them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aicarousel as a
from fakes import Gateway, Provider, healthy, write_private
from test_cli import Place, wait_for

Json = dict[str, Any]
APPLIED_S = 2.0                 #: a running server has taken a change over by then


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# ---------------------------------------------------------------- references

def test_a_reference_is_read_from_its_file_or_program(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(" k-of-a-file\n")
    assert a.read_secret(f"file:{tmp_path}/key") == "k-of-a-file"
    assert a.read_secret(f"cmd:cat '{tmp_path}/key'") == "k-of-a-file"


@pytest.mark.parametrize("reference,found", [
    ("file:/nothing/here", "No such file or directory"),
    ("file:{folder}/raw", "no UTF-8 text"),
    ("cmd:no-such-program-here", "No such file or directory"),
    ("cmd:false", "exit status 1"),
    ("cmd:echo 'open", "an open quote"),
    ("cmd:sleep 60", "no end within"),
])
def test_a_reference_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str, found: str) -> None:
    monkeypatch.setattr(a, "_COMMAND_S", 0.05)
    (tmp_path / "raw").write_bytes(b"\xff\xfe")
    with pytest.raises(a.ConfigError) as caught:
        a.read_secret(reference.format(folder=tmp_path))
    assert found in caught.value.found and "\n" not in str(caught.value)


def test_a_key_in_a_file_is_read_again_when_the_file_changes(gateway_factory: Callable[..., Gateway], provider: Provider, tmp_path: Path) -> None:
    """A key that is rotated by something else, as secrets of containers are."""
    write_private(tmp_path / "key", "k-before-the-change")
    url = provider.script("mine", healthy())
    gateway = gateway_factory({"mine": {"baseUrl": url, "default": "m", "enableFallback": False, "models": ["m"], "keys": [f"file:{tmp_path}/key"]}})
    assert gateway.chat().status == 200 and provider.calls("mine")[-1].headers["authorization"] == "Bearer k-before-the-change"
    write_private(tmp_path / "key", "k-after-the-change")
    changed_at = time.monotonic()
    assert wait_for(lambda: gateway.chat().status == 200 and provider.calls("mine")[-1].headers["authorization"] == "Bearer k-after-the-change", APPLIED_S)
    assert time.monotonic() - changed_at < APPLIED_S and "reloaded" in gateway.log
