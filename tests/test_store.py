"""Section 30, Store: real files, real processes, real kills."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
import re
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import aicarousel
from aicarousel import ConfigError, KeyRing, UsageRow, UsageWriter
from fakes import mode_of, rows_of

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes, signals and file locks are POSIX")

SEED_SCHEMA = """
CREATE TABLE api_keys (id INTEGER PRIMARY KEY AUTOINCREMENT, key_hash TEXT NOT NULL UNIQUE, key_prefix TEXT NOT NULL, name TEXT,
    created_at TEXT DEFAULT (datetime('now')), last_used_at TEXT, is_active INTEGER DEFAULT 1, usage_count INTEGER DEFAULT 0);
CREATE INDEX idx_api_keys_hash ON api_keys(key_hash);
CREATE INDEX idx_api_keys_active ON api_keys(is_active);
CREATE TABLE provider_settings (id INTEGER PRIMARY KEY AUTOINCREMENT, provider_key TEXT NOT NULL UNIQUE, is_enabled INTEGER DEFAULT 1,
    priority INTEGER DEFAULT 0, created_at TEXT DEFAULT (datetime('now')), updated_at TEXT DEFAULT (datetime('now')));
CREATE INDEX idx_provider_settings_key ON provider_settings(provider_key);
CREATE TABLE _migrations (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, executed_at TEXT DEFAULT (datetime('now')));
INSERT INTO _migrations (name) VALUES ('001_create_api_keys'), ('002_create_provider_settings');
INSERT INTO provider_settings (provider_key, priority) VALUES ('groq', 7);
"""
STEPS = [migration.name for migration in aicarousel._MIGRATIONS]
N_STEPS = len(STEPS)
SEED_KEY = "sk-" + "0123456789abcdef" * 4
ROW = UsageRow(
    request_id="r1", at_utc="2026-01-31T10:00:00Z", key_id=1, key_name="ci", client_format="chat", model="fast", provider="groq", credential="groq/2",
    wire_model="kimi-k2", route="groq/2:kimi-k2", input=812, output=164, cached=100, cache_write=0, reasoning=7, cost_usd=0.0012, estimated=False,
    status=200, outcome="ok", first_ms=412, total_ms=3120, attempts=2, streamed=True, price="0.5/1/0.1/- 2026-11-21")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a database will be; neither it nor its folder exists."""
    return tmp_path / "data" / "aicarousel.db"


@pytest.fixture
def seed_path(path: Path) -> Path:
    """A database as the seed leaves it, readable by all."""
    path.parent.mkdir(mode=0o755)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(SEED_SCHEMA)
        digest = hashlib.sha256(SEED_KEY.encode()).hexdigest()
        connection.execute("INSERT INTO api_keys (key_hash, key_prefix, usage_count) VALUES (?, ?, 5)", (digest, "sk-0123..."))
        connection.commit()
    path.chmod(0o644)
    return path


@pytest.fixture
def writer(path: Path) -> Iterator[UsageWriter]:
    made = UsageWriter(path)
    yield made
    made.close()


def backups_of(path: Path) -> list[Path]:
    return sorted(path.parent.glob("aicarousel-backup-*.db"))


def run_python(code: str, *arguments: object, timeout_s: float = 60) -> str:
    """What `code` prints, run in a process of its own that can import the module."""
    environment = {**os.environ, "PYTHONPATH": str(Path(aicarousel.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def bump_epoch(path: Path) -> None:
    """Tell servers that keys changed, without changing any."""
    with open(path.with_name("keys.epoch"), "r+b") as file:
        count = int.from_bytes(file.read(8), "little")
        file.seek(0)
        file.write((count + 1).to_bytes(8, "little"))


# Opening, modes, schema

def test_a_missing_database_is_made_private(path: Path) -> None:
    old_umask = os.umask(0o000)
    try:
        with contextlib.closing(aicarousel.open_database(path)) as connection:
            connection.execute("INSERT INTO api_keys (key_hash, key_prefix) VALUES ('h', 'p')")
            modes = {file.name: mode_of(file) for file in path.parent.iterdir()}
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert connection.execute("PRAGMA foreign_keys").fetchone() == (1,)
            assert connection.execute("PRAGMA busy_timeout").fetchone()[0] >= 1000
    finally:
        os.umask(old_umask)
    assert modes == dict.fromkeys(("aicarousel.db", "aicarousel.db-wal", "aicarousel.db-shm", "keys.epoch"), 0o600)
    assert mode_of(path.parent) == 0o700
    assert backups_of(path) == []


def test_the_usage_table_has_the_fields_of_a_row(path: Path) -> None:
    aicarousel.open_database(path).close()
    columns = [row[1] for row in rows_of(path, "PRAGMA table_info(usage)")]
    assert columns == ["id", *UsageRow._fields]


def test_a_seed_database_opens_and_its_key_works(seed_path: Path) -> None:
    ring = KeyRing(seed_path, ())
    assert ring.find(SEED_KEY) is not None      # before anything was brought up to date, too
    aicarousel.open_database(seed_path).close()
    key = KeyRing(seed_path, ()).find(SEED_KEY)
    assert key is not None and (key.id, key.prefix, key.name, key.n_used, key.active) == (1, "sk-0123...", "", 5, True)
    assert aicarousel.schema_version(seed_path) == N_STEPS
    assert rows_of(seed_path, "SELECT provider_key, priority FROM provider_settings") == [("groq", 7)]
    assert len(rows_of(seed_path, "SELECT name FROM _migrations")) == 2
    assert mode_of(seed_path) == 0o600
    assert [re.sub(r"\d{8}T\d{6}Z", "STAMP", file.name) for file in backups_of(seed_path)] == ["aicarousel-backup-STAMP-v0.db"]


def test_migrate_and_rollback_make_backups_and_lose_no_key(seed_path: Path) -> None:
    assert aicarousel.schema_version(seed_path) == 0
    assert aicarousel.migrate(seed_path) == STEPS
    assert aicarousel.migrate(seed_path) == []
    assert len(backups_of(seed_path)) == 1
    made, _ = aicarousel.create_key(seed_path, "new")
    assert [aicarousel.rollback(seed_path) for _ in range(N_STEPS + 1)] == [*reversed(STEPS), None]
    assert aicarousel.schema_version(seed_path) == 0
    assert {row[0] for row in rows_of(seed_path, "SELECT name FROM sqlite_master WHERE type = 'table'")} >= {"api_keys", "provider_settings", "_migrations"}
    assert not rows_of(seed_path, "SELECT name FROM sqlite_master WHERE name = 'usage'")
    assert sorted(re.findall(r"-v\d", " ".join(file.name for file in backups_of(seed_path)))) == [f"-v{version}" for version in range(N_STEPS + 1)]
    assert {mode_of(file) for file in backups_of(seed_path)} == {0o600}
    for file in (seed_path, *(file for file in backups_of(seed_path) if "-v0" not in file.name)):
        assert KeyRing(file, ()).find(made) is not None and KeyRing(file, ()).find(SEED_KEY) is not None
    assert aicarousel.migrate(seed_path) == STEPS
    assert len(aicarousel.list_keys(seed_path)) == 2


def test_two_backups_in_one_second_do_not_overwrite_each_other(path: Path) -> None:
    key, _ = aicarousel.create_key(path, "a")
    copies = {aicarousel.backup(path) for _ in range(3)}
    assert len(copies) == 3
    for copy in copies:
        assert rows_of(copy, "PRAGMA integrity_check") == [("ok",)] and rows_of(copy, "PRAGMA user_version") == [(N_STEPS,)]
        assert KeyRing(copy, ()).find(key) is not None


def test_processes_that_make_the_database_together_all_succeed(path: Path) -> None:
    code = "import aicarousel, pathlib, sys; print(aicarousel.create_key(pathlib.Path(sys.argv[1]), 'x')[0])"
    environment = {**os.environ, "PYTHONPATH": str(Path(aicarousel.__file__).parent)}
    command = [sys.executable, "-c", code, str(path)]
    children = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(6)]
    answers = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0] * 6, answers
    ring = KeyRing(path, ())
    assert all(ring.find(key.strip()) for key, _ in answers)


# Trouble, in one plain line

def damage(path: Path) -> None:
    """Overwrite the first table's page; the header stays good."""
    content = bytearray(path.read_bytes())
    content[100:] = b"\xff" * (len(content) - 100)
    path.write_bytes(content)


TROUBLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "not a database": (lambda path: path.write_bytes(b"this is no database " * 400), "a file that is not a database"),
    "damaged": (damage, "a damaged database"),
    "newer": (lambda path: rows_of(path, "PRAGMA user_version = 99"), "schema version 99"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "something that is no file"),
}


@pytest.mark.parametrize("case", TROUBLE)
def test_an_unusable_file_is_refused_plainly_and_left_alone(path: Path, case: str) -> None:
    aicarousel.open_database(path).close()
    spoil, found = TROUBLE[case]
    spoil(path)
    before = path.read_bytes() if path.is_file() else b""
    commands: list[Callable[[], object]] = [
        lambda: aicarousel.open_database(path), lambda: aicarousel.list_keys(path), lambda: aicarousel.create_key(path, "x"), lambda: aicarousel.totals(path),
        lambda: aicarousel.schema_version(path), lambda: aicarousel.migrate(path), lambda: aicarousel.rollback(path), lambda: aicarousel.backup(path)]
    for command in commands:
        with pytest.raises(ConfigError) as caught:
            command()
        assert caught.value.found == found and caught.value.where == str(path) and "\n" not in str(caught.value)
    assert (path.read_bytes() if path.is_file() else b"") == before
    assert backups_of(path) == []


@pytest.mark.parametrize("command", ["list_keys", "totals", "schema_version", "migrate", "rollback", "backup"])
def test_commands_that_need_a_database_do_not_make_one(path: Path, command: str) -> None:
    with pytest.raises(ConfigError, match="no database"):
        getattr(aicarousel, command)(path)
    assert not path.exists()


def test_a_locked_database_is_refused_plainly(path: Path) -> None:
    aicarousel.open_database(path).close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as blocker:
        blocker.execute("PRAGMA locking_mode = EXCLUSIVE")
        blocker.execute("INSERT INTO api_keys (key_hash, key_prefix) VALUES ('h', 'p')")
        with pytest.raises(ConfigError, match="locked by another program"):
            aicarousel.open_database(path, busy_s=0.01)


def test_a_home_that_may_not_be_written_is_refused_plainly() -> None:
    code = """if True:
        import os, pathlib, sys, aicarousel
        path = pathlib.Path(sys.argv[1])
        if os.getuid() == 0:
            os.setuid(65534)
        for command, *more in ((aicarousel.open_database,), (aicarousel.create_key, 'x'), (aicarousel.list_keys,), (aicarousel.totals,)):
            try:
                command(path, *more)
            except aicarousel.ConfigError as error:
                print(str(error))
            else:
                print('worked')
    """
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "aicarousel.db"
        aicarousel.create_key(path, "a")
        path.chmod(0o444)
        path.parent.chmod(0o555)
        lines = run_python(code, path).splitlines()
        missing = run_python(code, path.with_name("sub") / "aicarousel.db").splitlines()
        path.parent.chmod(0o755)
    assert len(lines) == len(missing) == 4
    assert all("expected" in line for line in (*lines[:2], *missing)), (lines, missing)
    assert all("expected" in line or line == "worked" for line in lines[2:]), lines      # reading may still work
    assert all("no database" in line for line in missing[2:])


def test_a_failed_backup_leaves_no_half_file(path: Path) -> None:
    code = """if True:
        import pathlib, resource, sys, aicarousel
        path = pathlib.Path(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        try:
            aicarousel.backup(path)
        except aicarousel.ConfigError as error:
            print(error.found)
    """
    aicarousel.open_database(path).close()
    assert run_python(code, path) in ("a full disk", "a disk that fails to read or write")
    assert backups_of(path) == []


# Gateway keys

def test_a_key_is_shown_once_and_only_its_hash_is_stored(path: Path) -> None:
    secret, key = aicarousel.create_key(path, "laptop")
    assert re.fullmatch("sk-[0-9a-f]{64}", secret)
    assert (key.id, key.prefix, key.name, key.active, key.n_used, key.last_used_utc) == (1, secret[:7] + "...", "laptop", True, 0, "")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", key.created_utc)
    assert aicarousel.list_keys(path) == [key]
    assert {mode_of(file) for file in path.parent.iterdir()} == {0o600}      # reading leaves a -wal and -shm
    assert rows_of(path, "SELECT key_hash FROM api_keys") == [(hashlib.sha256(secret.encode()).hexdigest(),)]
    for file in path.parent.iterdir():
        assert secret.encode() not in file.read_bytes()


@pytest.mark.parametrize("length", [32, 33, 64, 128])
def test_a_key_has_the_length_asked_for(path: Path, length: int) -> None:
    secret, _ = aicarousel.create_key(path, "", length=length)
    assert re.fullmatch(f"sk-[0-9a-f]{{{length}}}", secret)


@pytest.mark.parametrize("arguments", [
    {"length": 31}, {"length": 129}, {"key": "short"}, {"key": "with space in it, long"}, {"key": "ünïcode-is-not-for-headers"}, {"key": "x" * 513},
    {"name": "two\nlines"}])
def test_a_bad_key_or_name_is_refused_without_repeating_it(path: Path, arguments: dict) -> None:
    with pytest.raises(ConfigError) as caught:
        aicarousel.create_key(path, **{"name": "x", **arguments})
    assert arguments.get("key", "\n") not in str(caught.value)
    assert not path.exists()


def test_a_chosen_key_works_once(path: Path) -> None:
    chosen = "team-secret-0123456789"
    assert aicarousel.create_key(path, "team", key=chosen)[0] == chosen
    assert KeyRing(path, ()).find(chosen) is not None
    with pytest.raises(ConfigError, match="exists already") as caught:
        aicarousel.create_key(path, "again", key=chosen)
    assert chosen not in str(caught.value)
    assert len(aicarousel.list_keys(path)) == 1


def test_another_process_changes_keys_and_the_ring_knows_at_once(path: Path) -> None:
    ring = KeyRing(path, ())
    assert not ring.any_key() and ring.find("sk-" + "0" * 64) is None
    code = "import aicarousel, pathlib, sys; path = pathlib.Path(sys.argv[1]); "
    first = run_python(code + "print(aicarousel.create_key(path, 'one')[0])", path)
    assert ring.any_key() and ring.find(first).name == "one"
    second = run_python(code + "print(aicarousel.create_key(path, 'two')[0])", path)
    assert ring.find(second).id == 2
    assert run_python(code + "print(aicarousel.revoke_key(path, 1), aicarousel.revoke_key(path, 9))", path) == "True False"
    assert ring.find(first) is None and ring.find(second) is not None
    assert run_python(code + "print(aicarousel.delete_key(path, 2), aicarousel.delete_key(path, 2))", path) == "True False"
    assert ring.find(second) is None and not ring.any_key()
    assert [(key.id, key.active) for key in aicarousel.list_keys(path)] == [(1, False)]
    ring.close()


@pytest.mark.parametrize("key", ["", "sk-", "\ud800", "ÿ" * 70, "x" * 100_000])
def test_odd_keys_are_unknown_and_raise_nothing(path: Path, key: str) -> None:
    aicarousel.create_key(path, "a")
    assert KeyRing(path, ("",)).find(key) is None


def test_static_keys_count_as_keys_and_survive_any_reload(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ring = KeyRing(path, ["hunter2-hunter2", ""])
    assert ring.any_key()
    made, _ = aicarousel.create_key(path, "a")
    found = ring.find("hunter2-hunter2")
    assert (found.id, found.name) == (0, "API_KEYS") and ring.find(made).id == 1
    assert "hunter2" not in repr(found) + caplog.text


def test_finding_a_key_touches_no_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = aicarousel.create_key(path, "a")
    ring = KeyRing(path, ())

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("file I/O in the request path")
    for module, name in ((sqlite3, "connect"), (os, "stat"), (os, "open"), (os, "read")):
        monkeypatch.setattr(module, name, refuse)
    found, unknown = ring.find(made), ring.find("sk-unknown")
    monkeypatch.undo()
    assert found is not None and unknown is None


def test_a_locked_database_keeps_the_old_keys_and_is_tried_once_a_second(
        path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = aicarousel.create_key(path, "a")
    now = [100.0]
    ring = KeyRing(path, (), clock=lambda: now[0])
    n_reads, connect = [0], sqlite3.connect

    def counting(*arguments: object, **named: object) -> sqlite3.Connection:
        n_reads[0] += 1
        return connect(*arguments, **named)
    with contextlib.closing(connect(path, isolation_level=None)) as blocker:
        blocker.execute("PRAGMA locking_mode = EXCLUSIVE")
        blocker.execute("UPDATE api_keys SET is_active = 0")
        bump_epoch(path)
        monkeypatch.setattr(sqlite3, "connect", counting)
        started = time.monotonic()
        assert [ring.find(made) is not None for _ in range(50)] == [True] * 50
        assert time.monotonic() - started < 2 and n_reads == [1]
        now[0] += 1.1
        assert ring.find(made) is not None and n_reads == [2]
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "locked" in caplog.text and made not in caplog.text
    assert ring.find(made) is not None and n_reads == [2]      # not yet time
    now[0] += 1.1
    assert ring.find(made) is None and n_reads == [3]
    assert ring.find(made) is None and n_reads == [3]


def test_a_damaged_database_keeps_the_old_keys(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made, _ = aicarousel.create_key(path, "a")
    ring = KeyRing(path, ())
    damage(path)
    bump_epoch(path)
    assert ring.find(made) is not None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert KeyRing(path, ("static-key",)).find("static-key") is not None


def test_a_folder_that_cannot_be_made_leaves_the_static_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "data").write_text("a file, not a folder")
    now = [0.0]
    path = tmp_path / "data" / "aicarousel.db"
    ring = KeyRing(path, ("static-key",), clock=lambda: now[0])
    assert ring.find("static-key") is not None
    (tmp_path / "data").unlink()
    made, _ = aicarousel.create_key(path, "a")
    now[0] += 1.1
    assert ring.find(made) is not None
    assert len(caplog.records) == 1


def test_refresh_notices_replaced_files(path: Path, tmp_path: Path) -> None:
    old, _ = aicarousel.create_key(path, "old")
    other_path = tmp_path / "other" / "aicarousel.db"
    new, _ = aicarousel.create_key(other_path, "new")
    ring = KeyRing(path, ())
    ring.refresh()
    assert ring.find(old) is not None
    for file in path.parent.glob("aicarousel.db-*"):
        file.unlink()
    os.replace(other_path, path)
    path.with_name("keys.epoch").unlink()
    ring.refresh()
    assert ring.find(old) is None and ring.find(new) is not None
    aicarousel.delete_key(path, 1)
    assert ring.find(new) is None
    ring.close()


# Children are forked from a process that has the module already, so that each of 100 costs milliseconds. How long they live follows from what they get done: however slow
# the machine is at the moment, kills hit the making of databases and of keys, and some keys are printed.
KILLER = """if True:
    import aicarousel, os, pathlib, random, signal, sys, time
    home, chance = pathlib.Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    longest_s, n_kills, n_printed = 0.03, 0, 0
    while n_kills < 100 or n_printed < 50:
        path = home / str(n_kills // 10) / 'data' / 'aicarousel.db'      # ten new databases: kills hit their making too
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            while True:
                os.write(writing, (str(path) + ' ' + aicarousel.create_key(path, 'k')[0] + chr(10)).encode())
        os.close(writing)
        time.sleep(chance.uniform(0.001, longest_s))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(reading) as pipe:
            lines = pipe.readlines()
        sys.stdout.writelines(lines)
        n_kills, n_printed = n_kills + 1, n_printed + len(lines)
        longest_s = max(0.03, longest_s * 0.8) if lines else longest_s * 1.3
"""


def test_a_hundred_kills_lose_no_key_that_was_printed(tmp_path: Path) -> None:
    seed = random.randrange(10 ** 6)
    printed: dict[Path, list[str]] = {}
    for line in run_python(KILLER, tmp_path, seed, timeout_s=240).splitlines():
        name, key = line.split()
        printed.setdefault(Path(name), []).append(key)
    assert sum(map(len, printed.values())) >= 50, f"seed {seed}"
    for path, keys in printed.items():
        aicarousel.open_database(path).close()
        assert rows_of(path, "PRAGMA integrity_check") == [("ok",)], f"seed {seed}"
        ring = KeyRing(path, ())
        assert [key for key in keys if ring.find(key) is None] == [], f"seed {seed}"
        ring.close()


# Usage

def test_a_row_is_stored_as_given_and_counted_for_its_key(path: Path, writer: UsageWriter) -> None:
    aicarousel.create_key(path, "ci")
    other, _ = aicarousel.create_key(path, "other")
    writer.put(ROW)
    writer.put(ROW._replace(request_id="r2", at_utc="2026-01-31T11:30:00.250Z", outcome="client_closed", cost_usd=None, first_ms=None))
    writer.put(ROW._replace(request_id="r3", key_id=0, key_name="API_KEYS"))
    assert writer.flush(10)
    stored = rows_of(path, "SELECT * FROM usage ORDER BY id")
    assert stored[0][1:] == tuple(ROW)
    assert [row[1] for row in stored] == ["r1", "r2", "r3"]
    assert rows_of(path, "SELECT cost_usd, first_ms, outcome FROM usage WHERE request_id = 'r2'") == [(None, None, "client_closed")]
    assert [(key.n_used, key.last_used_utc) for key in aicarousel.list_keys(path)] == [(2, "2026-01-31T11:30:00Z"), (0, "")]


def test_a_request_is_stored_and_counted_once(path: Path, writer: UsageWriter) -> None:
    aicarousel.create_key(path, "ci")
    writer.put(ROW)
    writer.put(ROW._replace(status=500))
    assert writer.flush(10)
    writer.put(ROW)
    assert writer.flush(10)
    assert rows_of(path, "SELECT status FROM usage") == [(200,)]
    assert aicarousel.list_keys(path)[0].n_used == 1


def test_last_use_never_goes_back(seed_path: Path) -> None:
    writer = UsageWriter(seed_path)
    for number, day in enumerate((20, 31, 5)):
        writer.put(ROW._replace(request_id=str(number), at_utc=f"2026-01-{day:02}T00:00:00Z"))
        assert writer.flush(10)
    writer.close()
    key = aicarousel.list_keys(seed_path)[0]
    assert (key.n_used, key.last_used_utc) == (8, "2026-01-31T00:00:00Z")


def test_rows_reach_the_disk_by_themselves_in_one_batch(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aicarousel.open_database(path).close()
    statements: list[str] = []
    opened = aicarousel.open_database

    def traced(*arguments: object, **named: object) -> sqlite3.Connection:
        connection = opened(*arguments, **named)
        connection.set_trace_callback(statements.append)
        return connection
    monkeypatch.setattr(aicarousel, "open_database", traced)
    writer = UsageWriter(path)
    started = time.monotonic()
    for number in range(50):
        writer.put(ROW._replace(request_id=str(number)))
    with contextlib.closing(sqlite3.connect(path)) as reader:
        pause = threading.Event()
        while reader.execute("SELECT count(*) FROM usage").fetchone()[0] < 50:
            assert time.monotonic() - started < 10
            pause.wait(0.005)
    assert time.monotonic() - started < 2      # 0.3 s on a machine that is not busy
    writer.close()
    assert [statement for statement in statements if statement.startswith(("BEGIN", "COMMIT"))] == ["BEGIN IMMEDIATE", "COMMIT"]


def test_many_rows_at_once_are_all_stored(path: Path, writer: UsageWriter) -> None:
    for number in range(12_000):
        writer.put(ROW._replace(request_id=str(number)))
    assert writer.flush(30)
    assert rows_of(path, "SELECT count(*) FROM usage") == [(12_000,)] and writer.n_dropped == 0


ODD = {
    "huge": ({"input": 10 ** 30}, "SELECT input FROM usage WHERE request_id = 'odd'", [(10 ** 12,)]),
    "half a surrogate pair": ({"model": "a\ud800b"}, "SELECT model FROM usage WHERE request_id = 'odd'", [("a?b",)]),
    "not text": ({"model": ["x"]}, "SELECT model FROM usage WHERE request_id = 'odd'", [("['x']",)]),
    "no number": ({"cost_usd": float("nan")}, "SELECT cost_usd FROM usage WHERE request_id = 'odd'", [(None,)]),
}


@pytest.mark.parametrize("n_others", [1, 60], ids=["few", "many"])
@pytest.mark.parametrize("case", ODD)
def test_an_odd_row_does_not_hold_up_the_others(path: Path, writer: UsageWriter, case: str, n_others: int) -> None:
    """Nor does one that came twice; many go in by one statement."""
    changes, sql, expected = ODD[case]
    aicarousel.create_key(path, "ci")
    writer.put(ROW._replace(request_id="odd", **changes))
    for number in (0, *range(n_others)):
        writer.put(ROW._replace(request_id=f"r{number}"))
    assert writer.flush(10)
    assert rows_of(path, sql) == expected and rows_of(path, "SELECT count(*) FROM usage WHERE request_id <> 'odd'") == [(n_others,)]
    assert aicarousel.list_keys(path)[0].n_used == n_others + 1


def test_a_locked_database_blocks_nobody_and_loses_nothing(path: Path, writer: UsageWriter) -> None:
    aicarousel.create_key(path, "ci")
    writer.put(ROW)
    assert writer.flush(10)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as blocker:
        blocker.execute("BEGIN EXCLUSIVE")
        started = time.monotonic()
        for number in range(200):
            writer.put(ROW._replace(request_id=f"locked-{number}"))
        assert time.monotonic() - started < 0.5
        assert not writer.flush(0.05)
    assert writer.flush(10)
    assert rows_of(path, "SELECT count(*) FROM usage") == [(201,)]
    assert aicarousel.list_keys(path)[0].n_used == 201 and writer.n_dropped == 0


def test_a_full_disk_blocks_nobody_and_loses_nothing(path: Path) -> None:
    code = """if True:
        import dataclasses, pathlib, resource, sys, aicarousel
        path = pathlib.Path(sys.argv[1])
        aicarousel.open_database(path).close()
        row = aicarousel.UsageRow('', '2026-01-31T10:00:00Z', 0, '', 'chat', 'm' * 2000, '', '', '', '', 1, 1, 0, 0, 0, None, False, 200, 'ok', 1, 1, 1, False, '')
        writer = aicarousel.UsageWriter(path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        for number in range(300):
            writer.put(row._replace(request_id=str(number)))
        print(writer.flush(0.5))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(writer.flush(20), writer.n_dropped)
        writer.close()
    """
    assert run_python(code, path) == "False\nTrue 0"
    assert rows_of(path, "SELECT count(*) FROM usage") == [(300,)] and rows_of(path, "PRAGMA integrity_check") == [("ok",)]


def test_while_nothing_can_be_written_the_oldest_rows_go_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "data"
    folder.write_text("a file, not a folder")
    path = folder / "aicarousel.db"
    writer = UsageWriter(path)
    writer.put(ROW._replace(request_id="0"))
    assert not writer.flush(0.01)
    for number in range(1, 10_050):
        writer.put(ROW._replace(request_id=str(number)))
    deadline = time.monotonic() + 30
    while writer.n_dropped < 50 and time.monotonic() < deadline:
        writer.flush(0.01)
    assert writer.n_dropped == 50
    folder.unlink()
    assert writer.flush(30)
    writer.close()
    assert rows_of(path, "SELECT count(*), min(CAST(request_id AS INTEGER)) FROM usage") == [(10_000, 50)]
    assert len([record for record in caplog.records if "usage.failed" in record.getMessage()]) == 1


def test_trouble_is_told_once_in_thirty_seconds(path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    tried, now = threading.Semaphore(0), [0.0]

    def refuse(*_: object, **__: object) -> None:
        tried.release()
        raise ConfigError("here", "a full disk", "room")
    monkeypatch.setattr(aicarousel, "open_database", refuse)
    writer = UsageWriter(path, clock=lambda: now[0])

    def try_again() -> None:
        """Three attempts begun, so that at least two are over."""
        for _ in range(3):
            writer.flush(0)
            assert tried.acquire(timeout=10)

    def n_told() -> int:
        return sum("usage.failed" in record.getMessage() and record.levelno == logging.WARNING for record in caplog.records)
    writer.put(ROW)
    try_again()
    assert n_told() == 1
    now[0] = 29.0
    try_again()
    assert n_told() == 1
    now[0] = 31.0
    try_again()
    assert n_told() == 2
    writer.close()
    assert "usage.lost" in caplog.text and "rows=1" in caplog.text


LEARNED = {"window model a:m": "[8192,9e9,true]", "repairs model a:m": "[]", "bucket credential a/1": '{"windows":[]}', "cooldown route a/1:m": "{}"}


def test_what_routing_has_learned_is_kept_and_the_latest_wins(path: Path, writer: UsageWriter) -> None:
    assert aicarousel.load_routing(path) == {}              # no database yet
    writer.save_routing({"window model old:m": "[1,2,false]"})
    assert writer.flush(10)
    writer.save_routing(LEARNED)
    assert writer.flush(10) and aicarousel.load_routing(path) == LEARNED


def test_a_database_with_two_tables_of_what_was_learned_goes_on_with_one(path: Path, writer: UsageWriter) -> None:
    writer.save_routing(LEARNED)
    assert writer.flush(10) and aicarousel.rollback(path) == "joined"
    assert sorted(rows_of(path, "SELECT kind, key, value, until_utc > strftime('%s', 'now') + 600000 FROM learned")) == [
        ("repairs", "model a:m", "[]", 1), ("window", "model a:m", "[8192,9e9,true]", 1)]
    assert rows_of(path, "SELECT count(*) FROM routing") == [(2,)]
    assert aicarousel.migrate(path) == ["joined"] and aicarousel.load_routing(path) == LEARNED


def test_a_rolled_back_schema_heals_itself(path: Path, writer: UsageWriter) -> None:
    writer.put(ROW)
    assert writer.flush(10)
    while aicarousel.rollback(path) != "usage":
        pass
    writer.put(ROW._replace(request_id="r2"))
    assert any(writer.flush(0.1) for _ in range(100))      # the first try finds no table
    assert rows_of(path, "SELECT request_id FROM usage") == [("r2",)]


def test_keys_can_be_changed_while_usage_is_written(path: Path, writer: UsageWriter) -> None:
    aicarousel.create_key(path, "first")
    ring = KeyRing(path, ())
    made = []
    for number in range(20):
        for part in range(50):
            writer.put(ROW._replace(request_id=f"{number}-{part}"))
        made.append(aicarousel.create_key(path, str(number))[0])
        assert ring.find(made[-1]) is not None
    assert writer.flush(10)
    assert aicarousel.list_keys(path)[0].n_used == 1000
    assert rows_of(path, "PRAGMA integrity_check") == [("ok",)]


def test_flush_with_nothing_queued_and_close(path: Path) -> None:
    writer = UsageWriter(path)
    assert writer.flush(10)
    assert not path.exists()
    writer.put(ROW)
    writer.close()
    assert rows_of(path, "SELECT request_id FROM usage") == [("r1",)]
    writer.put(ROW)
    assert not writer.flush(0.01)


def test_totals_count_keys_and_one_day(path: Path, writer: UsageWriter) -> None:
    for name in "abc":
        aicarousel.create_key(path, name)
    aicarousel.revoke_key(path, 2)
    for number, at_utc in enumerate(("2026-01-30T23:59:59Z", "2026-01-31T00:00:00Z", "2026-01-31T23:59:59.999Z", "2026-02-01T00:00:00Z")):
        writer.put(ROW._replace(request_id=str(number), at_utc=at_utc))
    assert writer.flush(10)
    assert aicarousel.totals(path, "2026-01-31") == {
        "keys_active": 2, "keys_revoked": 1, "requests": 4, "requests_today": 2, "input_today": 1824, "output_today": 328}
    assert aicarousel.totals(path)["requests_today"] == 0
