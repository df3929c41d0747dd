"""What disks and clocks do to a gateway: every storage and clock case of the hostile matrix, by its name; and kill -9 under load.

    python tests/test_storage.py --kills 200      # random instants; every printed key works, every answer is in the usage table exactly once
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import random
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import aicarousel
from aicarousel import ConfigError, KeyRing, UsageRow, UsageWriter
from fakes import _SECRET_NAME, FAKE_KEY, HANG_S, ROOT, Gateway, InLoop, Provider, Reply, answer, chat_body, healthy, invocation, mode_of, rows_of, write_private
from house import entry

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes, signals and file locks are POSIX")

EARLY, LATE, REVOKED = (f"sk-{letter * 64}" for letter in "ace")      #: keys made before and after the backup, and one revoked after it
ROW = UsageRow(
    request_id="r1", at_utc="2026-01-31T10:00:00Z", key_id=1, key_name="early", client_format="chat", model="fast", provider="groq", credential="groq/1",
    wire_model="m", route="groq/1:m", input=8, output=4, cached=0, cache_write=0, reasoning=0, cost_usd=None, estimated=False,
    status=200, outcome="ok", first_ms=4, total_ms=30, attempts=1, streamed=True, price="")
N_ROWS = 400


def case(*names: str) -> pytest.MarkDecorator:
    """Gives a test the names of its cases."""
    return pytest.mark.parametrize((), [()] * len(names), ids=names)


class Served(InLoop, Gateway):
    """`serve` as it is, on a loop in this process: a start costs no process. Its requests are those of fakes.Gateway."""

    def __init__(self, home: Path) -> None:
        self.folder = self.home = home
        self.database, self.key, self.process = home / "data" / "aicarousel.db", EARLY, None
        self.lines: list[str] = []
        self._handler = logging.Handler(logging.INFO)
        self._handler.emit = lambda record: self.lines.append(f"{record.levelname} {record.getMessage()}")      # type: ignore[method-assign]

    def start(self) -> Served:
        """Raises what serve raises before it listens."""
        logging.getLogger("aicarousel").addHandler(self._handler)
        self.run_loop()
        listening = threading.Event()
        self._stop = asyncio.Event()

        def ready(gateway: aicarousel.Gateway, port: int) -> None:
            self.gateway, self.usage, self.port = gateway, gateway.usage, port
            listening.set()
        self._served = asyncio.run_coroutine_threadsafe(
            aicarousel.serve(aicarousel.Home(self.home, self.home / "data"), {"port": 0}, stop=self._stop, ready=ready), self.loop)
        self._served.add_done_callback(lambda _: listening.set())
        assert listening.wait(HANG_S)
        if self._served.done():
            self.end_loop()
            self._served.result()
        return self

    def end(self) -> int:
        """As SIGTERM does; the exit status."""
        self.loop.call_soon_threadsafe(self._stop.set)
        status = self._served.result(HANG_S)
        self.end_loop()
        logging.getLogger("aicarousel").removeHandler(self._handler)
        return status

    def ask(self, key: str | None = None) -> Reply:
        """One chat completion, within the time a client waits."""
        return self.post("/v1/chat/completions", chat_body("well/m"), key=key)

    def told(self, words: str) -> list[str]:
        """Lines of the log that hold `words`."""
        return [line for line in self.lines if words in line]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if _SECRET_NAME.search(name)]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def template(module_provider: Provider) -> Iterator[Path]:
    """A home with keys, usage and an hourly backup, older than the database by one key made and one revoked."""
    home = Path(tempfile.mkdtemp(prefix="aicarousel-test-"))
    path = home / "data" / "aicarousel.db"
    write_models(home, module_provider)
    aicarousel.create_key(path, "early", key=EARLY)
    aicarousel.create_key(path, "revoked", key=REVOKED)
    writer = UsageWriter(path)
    for number in range(N_ROWS):
        writer.put(ROW._replace(request_id=str(number)))
    assert writer.flush(HANG_S)
    writer.close()
    assert aicarousel.keep_hourly_backup(path, time.time())
    aicarousel.create_key(path, "late", key=LATE)
    aicarousel.revoke_key(path, 2)
    yield home
    shutil.rmtree(home)


def write_models(home: Path, provider: Provider) -> None:
    write_private(home / "models.json", json.dumps({"well": {**entry(provider.script("well", healthy())), "keys": ["env:FAKE_KEY"]}}))
    write_private(home / ".env", f"FAKE_KEY={FAKE_KEY}\n")


@pytest.fixture
def home(template: Path, tmp_path: Path) -> Path:
    """A copy of the template."""
    return Path(shutil.copytree(template, tmp_path / "home"))


@pytest.fixture
def path(home: Path) -> Path:
    return home / "data" / "aicarousel.db"


@pytest.fixture
def serve(home: Path) -> Iterator[Callable[[], Served]]:
    """A function that starts a gateway in `home`; what still runs is ended."""
    made: list[Served] = []

    def start() -> Served:
        made.append(Served(home))
        return made[-1].start()
    yield start
    for one in made:
        if not one._served.done():
            one.end()


# ---------------------------------------------------------------- damage, found at a start

def page_of(name: str) -> Callable[[Path], None]:
    """Overwrites the root page of a table or index."""
    def spoil(path: Path) -> None:
        [(number, size)] = rows_of(path, f"SELECT rootpage, (SELECT page_size FROM pragma_page_size) FROM sqlite_master WHERE name = '{name}'")
        overwrite(path, (number - 1) * size, b"\xff" * size)
    return spoil


def overwrite(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def garble(path: Path) -> None:
    """Single bytes all over the file."""
    content, chance = bytearray(path.read_bytes()), random.Random(5)
    for _ in range(len(content) // 50):
        content[chance.randrange(100, len(content))] ^= 0xFF
    path.write_bytes(content)


def cut(share: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(path.stat().st_size * share))


def backups_of(path: Path) -> list[Path]:
    return sorted(path.parent.glob("aicarousel-hourly-*.db"))


def spoil_all(path: Path) -> None:
    page_of("usage")(path)
    for copy in backups_of(path):
        garble(copy)


def spoil_newest(path: Path) -> None:
    """The newest backup is damaged, the one before is whole."""
    shutil.copy(*reversed([path.with_name(f"aicarousel-hourly-{number}.db") for number in (2, 1)]))
    page_of("usage")(path.with_name("aicarousel-hourly-1.db"))
    page_of("api_keys")(path)


def leave_a_backup_by_hand(path: Path) -> None:
    """There is none but one that a command made, a month ago."""
    backups_of(path)[0].rename(path.with_name("aicarousel-backup-20261021T120000Z-v5.db"))
    page_of("api_keys")(path)


def lose_backups(path: Path) -> None:
    page_of("usage")(path)
    for copy in backups_of(path):
        copy.unlink()


def lose_all(path: Path) -> None:
    lose_backups(path)
    page_of("api_keys")(path)


@dataclass(frozen=True)
class Damage:
    """What is done to the files of a stopped gateway, and what must be left of it after a start."""
    spoil: Callable[[Path], Any]
    found: str                      #: what is said of it, "" where nothing is wrong
    keys: str = "all"               #: all: as before the damage; backup: as they were an hour ago; none
    n_rows: int = N_ROWS


DAMAGE = {
    "storage-corrupt-header": Damage(lambda path: overwrite(path, 0, b"\xff" * 100), "a file that is not a database", "backup"),
    "storage-corrupt-schema-page": Damage(lambda path: overwrite(path, 100, b"\xff" * 3996), "a damaged database", "backup"),
    "storage-corrupt-keys": Damage(page_of("api_keys"), "a damaged database", "backup"),
    "storage-corrupt-key-index": Damage(page_of("idx_api_keys_hash"), "a damaged database", "backup"),
    "storage-corrupt-usage": Damage(page_of("usage"), "a damaged database"),
    "storage-corrupt-usage-index": Damage(page_of("idx_usage_at"), "a damaged database"),
    "storage-corrupt-free-list": Damage(lambda path: overwrite(path, 32, b"\0\0\0\x02\0\0\0\x03"), "a damaged database"),
    "storage-corrupt-everywhere": Damage(garble, "a damaged database", "backup"),
    "storage-truncated-to-half": Damage(cut(0.5), "a damaged database"),
    "storage-truncated-in-its-first-page": Damage(lambda path: os.truncate(path, 700), "a damaged database", "backup"),
    "storage-zero-bytes": Damage(lambda path: os.truncate(path, 0), "an empty database", "backup"),
    "storage-not-a-database": Damage(lambda path: path.write_bytes(b"this is no database " * 400), "a file that is not a database", "backup"),
    "storage-newest-backup-corrupt-too": Damage(spoil_newest, "a damaged database", "backup"),
    "storage-corrupt-with-a-backup-by-hand": Damage(leave_a_backup_by_hand, "a damaged database", "backup"),
    "storage-all-backups-corrupt-too": Damage(spoil_all, "a damaged database", "all", 0),
    "storage-corrupt-without-backup": Damage(lose_backups, "a damaged database", "all", 0),
    "storage-corrupt-keys-without-backup": Damage(lose_all, "a damaged database", "none", 0),
    "storage-wal-of-rubbish": Damage(lambda path: Path(f"{path}-wal").write_bytes(os.urandom(40_000)), ""),
    "storage-shm-of-rubbish": Damage(lambda path: Path(f"{path}-shm").write_bytes(os.urandom(32_768)), ""),
    "storage-journal-of-rubbish": Damage(lambda path: Path(f"{path}-journal").write_bytes(os.urandom(4096)), ""),
}
VALID = {"all": {EARLY, LATE}, "backup": {EARLY, REVOKED}, "none": set()}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_moved_aside_and_the_gateway_serves(case: str, path: Path, serve: Callable[[], Served], capsys: pytest.CaptureFixture[str]) -> None:
    damage = DAMAGE[case]
    damage.spoil(path)
    before = path.read_bytes()
    gateway = serve()
    lines = gateway.told("moved it to")
    aside = [file for file in path.parent.glob("aicarousel-damaged-*") if file.suffix == ".db"]
    if damage.found:
        assert len(lines) == 1 and f"found {damage.found}, moved it to {aside[0]}" in lines[0] and "\n" not in lines[0] and lines[0].startswith("ERROR")
        assert [file.read_bytes() for file in aside] == [before] and re.fullmatch(r"aicarousel-damaged-\d{8}T\d{6}Z\.db", aside[0].name)
    else:
        assert not lines and not aside
    valid = {key for key in (EARLY, LATE, REVOKED) if gateway.ask(key).status == 200}
    if damage.keys == "none":                    # as at the first start: one is made and shown
        [made] = set(re.findall(r"sk-[0-9a-f]{64}", capsys.readouterr().out))
        assert gateway.ask(made).status == 200
        gateway.key = made
    assert valid == VALID[damage.keys]
    assert gateway.usage.flush(HANG_S)
    assert rows_of(path, "SELECT count(*) FROM usage WHERE provider = 'well'")[0][0] == max(len(valid), 1)
    assert rows_of(path, "SELECT count(*) FROM usage WHERE provider = 'groq'") == [(damage.n_rows,)]
    assert gateway.health()["database"] == {"state": "ok", "waiting": 0, "dropped": 0, "mended": lines[0].partition(" ")[2] if lines else None}
    assert {mode_of(file) for file in path.parent.iterdir()} == {0o600}
    assert gateway.end() == 0
    assert rows_of(path, "PRAGMA integrity_check") == [("ok",)]
    again = serve()
    assert not again.told("moved it to") and (again.ask(gateway.key).status == 200)


@case("storage-damaged-while-running")
def test_a_gateway_mends_what_is_damaged_while_it_runs(path: Path, serve: Callable[[], Served]) -> None:
    """No row is lost that had not reached the disk."""
    gateway = serve()
    page_of("usage")(path)
    assert gateway.ask().status == 200
    wait_for(lambda: gateway.told("moved it to"))
    assert gateway.usage.flush(HANG_S)
    wait_for(lambda: gateway.ask(REVOKED).status == 401 and gateway.ask(LATE).status == 200)
    assert gateway.usage.flush(HANG_S) and rows_of(path, "SELECT count(*) > 1, count(DISTINCT request_id) = count(*) FROM usage WHERE provider = 'well'") == [(1, 1)]
    assert rows_of(path, "SELECT count(*) FROM usage WHERE provider = 'groq'") == [(N_ROWS,)] and rows_of(path, "PRAGMA integrity_check") == [("ok",)]


@case("storage-damaged-while-the-disk-is-full")
def test_what_cannot_be_mended_now_is_mended_later(path: Path, serve: Callable[[], Served], monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = serve()
    page_of("usage")(path)
    with monkeypatch.context() as patched:
        def refuse(fresh: Path, *_: object) -> None:
            fresh.write_bytes(b"as far as there was room")
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorname = "SQLITE_FULL"
            raise error
        patched.setattr(aicarousel, "_fill_anew", refuse)
        assert [gateway.ask().status for _ in range(5)] == [200] * 5
        wait_for(lambda: gateway.told("usage.failed"))
        assert gateway.ask().status == 200 and not gateway.usage.flush(0.05) and not gateway.told("moved it to")
    assert not list(path.parent.glob("aicarousel-restored*"))
    assert gateway.usage.flush(HANG_S) and len(gateway.told("moved it to")) == 1
    assert rows_of(path, "SELECT count(*) FROM usage WHERE provider = 'well'") == [(6,)] and rows_of(path, "PRAGMA integrity_check") == [("ok",)]


def wait_for(check: Callable[[], Any]) -> None:
    ends_at = time.monotonic() + HANG_S
    while not check():
        assert time.monotonic() < ends_at, "it did not happen"
        time.sleep(0.01)


# ---------------------------------------------------------------- trouble that passes

LOCKER = """if True:
    import sqlite3, sys
    connection = sqlite3.connect(sys.argv[1], isolation_level=None)
    connection.execute(sys.argv[2])
    connection.execute("BEGIN EXCLUSIVE")
    connection.execute("INSERT INTO api_keys (key_hash, key_prefix) VALUES ('h', 'p')")
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def locked_elsewhere(path: Path, pragma: str = "PRAGMA locking_mode = NORMAL") -> Iterator[None]:
    """Another process holds the write lock, or with locking_mode = EXCLUSIVE every lock."""
    with subprocess.Popen([sys.executable, "-c", LOCKER, str(path), pragma], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as locker:
        assert locker.stdout and locker.stdout.readline() == "locked\n"
        yield
        locker.kill()
        locker.wait()


@contextlib.contextmanager
def full_disk(path: Path, n_bytes: int = 32_768) -> Iterator[None]:
    """No file of this process may grow beyond what a -shm takes; what is longer already can be read."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def failing(code: str) -> Iterator[None]:
    """Every transaction fails with one of SQLite's result codes, as a broken disk or one that became read-only makes it."""
    begin = aicarousel.transact

    @contextlib.contextmanager
    def refuse(connection: sqlite3.Connection, **_: Any) -> Iterator[None]:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorname = code
        raise error
        yield
    aicarousel.transact = refuse
    try:
        yield
    finally:
        aicarousel.transact = begin


TROUBLE: dict[str, Callable[[Path], contextlib.AbstractContextManager[None]]] = {
    "storage-locked-for-long": locked_elsewhere,
    "storage-full-disk": full_disk,
    "storage-became-read-only": lambda path: failing("SQLITE_READONLY_DBMOVED"),
    "storage-input-output-error": lambda path: failing("SQLITE_IOERR_WRITE"),
}


@pytest.mark.parametrize("case", TROUBLE)
def test_trouble_neither_fails_nor_blocks_a_relay_and_loses_nothing(case: str, home: Path, path: Path, serve: Callable[[], Served], monkeypatch: pytest.MonkeyPatch,
                                                                    capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(aicarousel, "COMMAND_BUSY_S", 0.05)
    gateway = serve()
    capsys.readouterr()
    assert gateway.ask().status == 200 and gateway.usage.flush(HANG_S)
    with TROUBLE[case](path):
        replies = [gateway.ask() for _ in range(60)]
        assert {reply.status for reply in replies} == {200} and max(reply.elapsed_s for reply in replies) < 2
        wait_for(lambda: gateway.told("usage.failed"))
        state = gateway.health()["database"]
        assert state["state"] == "failing" and 0 < state["waiting"] <= 60 and state["dropped"] == 0
        assert not gateway.usage.flush(0.05)
        assert aicarousel.main(["key", "create", "x" * 40_000, "--home", str(home)]) == 2
        printed = capsys.readouterr()                   # a key is shown when it is on the disk, or not at all
        assert not printed.out and re.fullmatch(r"aicarousel: .*: found a .*; expected .*\n", printed.err)
    assert gateway.usage.flush(HANG_S)
    assert gateway.health()["database"]["state"] == "ok"
    assert len(gateway.told("usage.failed")) == 1 and not gateway.told("Traceback")
    assert rows_of(path, "SELECT count(*), count(DISTINCT request_id) FROM usage WHERE provider = 'well'") == [(61, 61)]
    assert rows_of(path, "PRAGMA integrity_check") == [("ok",)] and rows_of(path, "SELECT count(*) FROM api_keys") == [(3,)]


# ---------------------------------------------------------------- trouble at a start

@pytest.mark.parametrize("case", ["storage-locked-at-start", "storage-full-disk-at-start"])
@pytest.mark.parametrize("static", [True, False], ids=["API_KEYS", "stored-keys"])
def test_a_start_sits_out_what_passes_where_a_key_is_known(
        case: str, static: bool, home: Path, path: Path, serve: Callable[[], Served], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(aicarousel, "COMMAND_BUSY_S", 0.05)
    if static:
        monkeypatch.setenv("API_KEYS", "a-key-from-the-environment")
    trouble = locked_elsewhere(path, "PRAGMA locking_mode = EXCLUSIVE") if "locked" in case else full_disk(path, 0)
    with trouble:
        if "locked" in case and not static:              # nobody could be let in
            with pytest.raises(ConfigError, match="locked by another program"):
                serve()
            return
        gateway = serve()
        assert len(gateway.told("serving, while usage waits")) == 1
        assert gateway.ask("a-key-from-the-environment" if static else LATE).status == 200
        assert gateway.ask(REVOKED).status == 401
        wait_for(lambda: gateway.told("usage.failed"))
    assert gateway.usage.flush(HANG_S)
    wait_for(lambda: gateway.ask(LATE).status == 200)
    assert rows_of(path, "SELECT count(*) > 0, count(DISTINCT request_id) = count(*) FROM usage WHERE provider = 'well'") == [(1, 1)]


STARTER = """if True:
    import os, sys, aicarousel
    aicarousel.make_parser()            # has imported all it needs
    if sys.argv[1] == "nobody" and os.getuid() == 0:
        os.setuid(65534)
    raise SystemExit(aicarousel.main(["serve", "--port", "0", "--home", sys.argv[2]]))
"""


def make_newer(home: Path) -> None:
    rows_of(home / "data" / "aicarousel.db", "PRAGMA user_version = 99")


def replace(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Something else in the place of a file or folder of the home."""
    def spoil(home: Path) -> None:
        path = home / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)
    return spoil


HOPELESS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "storage-home-not-writable": (replace("data", lambda path: path.parent.chmod(0o555)), "may read and write"),
    "storage-database-not-writable": (lambda home: (home / "data").chmod(0o555), "may write"),
    "storage-database-not-readable": (lambda home: (home / "data").chmod(0o000), "may read and write"),
    "storage-data-is-a-file": (replace("data", Path.touch), "may read and write"),
    "storage-database-is-a-folder": (replace("data/aicarousel.db", Path.mkdir), "something that is no file"),
    "storage-database-is-a-pipe": (replace("data/aicarousel.db", os.mkfifo), "something that is no file"),
    "storage-database-of-a-newer-version": (make_newer, "schema version 99"),
    "storage-configuration-is-rubbish": (lambda home: (home / "models.json").write_bytes(os.urandom(900)), "not UTF-8"),
    "storage-configuration-is-cut": (lambda home: os.truncate(home / "models.json", 40), "models.json"),
    "storage-configuration-is-a-folder": (replace("models.json", Path.mkdir), "Is a directory"),
}


def test_commands_in_a_folder_that_tells_nothing_say_so(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stat_file = Path.stat

    def refuse(self: Path, **more: Any) -> os.stat_result:
        if self.name != "aicarousel.db":
            return stat_file(self, **more)
        raise PermissionError(13, "Permission denied", str(self))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "stat", refuse)
        assert [aicarousel.main([*words, "--home", str(home)]) for words in (["status"], ["db", "migrate"], ["quota"], ["key", "list"])] == [2, 2, 2, 2]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all("Permission denied" in line for line in lines)


@pytest.mark.parametrize("case", HOPELESS)
def test_a_start_that_cannot_be_ends_in_one_plain_line(case: str, home: Path) -> None:
    spoil, told = HOPELESS[case]
    user = "nobody" if "writable" in case or "readable" in case else ""
    with tempfile.TemporaryDirectory() as name:             # pytest's own folders let nobody in
        Path(name).chmod(0o755)
        place = Path(shutil.copytree(home, Path(name) / "home"))
        for file in (place, *place.rglob("*")) if user else ():
            file.chmod(0o755)
        spoil(place)
        ended = subprocess.run([sys.executable, "-c", STARTER, user, str(place)], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
                               stdin=subprocess.DEVNULL)
        for folder in (place, place / "data"):
            folder.chmod(0o755) if folder.is_dir() else None
    assert ended.returncode == 2 and not ended.stdout, ended
    [line] = ended.stderr.splitlines()
    assert line.startswith("aicarousel: ") and told in line and "Traceback" not in line


# ---------------------------------------------------------------- what is kept, and for how long

@pytest.fixture
def house(path: Path) -> Iterator[tuple[UsageWriter, list[float], list[float]]]:
    """A writer, its monotonic clock and its wall clock; hours pass when the test says so."""
    now, utc = [1000.0], [time.time()]
    writer = UsageWriter(path, clock=lambda: now[0], utc=lambda: utc[0])
    yield writer, now, utc
    writer.close()


def pass_hours(house: tuple[UsageWriter, list[float], list[float]], hours: float, *, wall_jumps_s: float = 0.0) -> None:
    """Until the housekeeping that falls due is done."""
    writer, now, utc = house
    now[0] += hours * 3600
    utc[0] += hours * 3600 + wall_jumps_s
    before = writer._house_seen
    writer.flush(HANG_S)
    wait_for(lambda: writer._house_seen != before and not [thread for thread in threading.enumerate() if thread.name == "usage-house"])


@case("storage-hourly-backup")
def test_a_backup_an_hour_and_two_are_kept(path: Path, house: tuple[UsageWriter, list[float], list[float]]) -> None:
    """Each is whole, private, and the last one and the one before."""
    for copy in backups_of(path):
        copy.unlink()
    path.with_name("aicarousel-hourly-99999.tmp").write_text("of a server that was killed here")
    old_umask = os.umask(0)
    try:
        for hour in range(4):
            house[0].put(ROW._replace(request_id=f"hour-{hour}"))
            assert house[0].flush(HANG_S)
            pass_hours(house, 1.0)
            newest = path.with_name("aicarousel-hourly-1.db")
            os.utime(newest, (house[2][0], house[2][0]))
            assert (f"hour-{hour}",) in rows_of(newest, "SELECT request_id FROM usage") and rows_of(newest, "PRAGMA integrity_check") == [("ok",)]
            assert len(backups_of(path)) == min(hour + 1, 2) and {mode_of(copy) for copy in backups_of(path)} == {0o600}
    finally:
        os.umask(old_umask)
    assert rows_of(backups_of(path)[1], "SELECT request_id FROM usage WHERE request_id LIKE 'hour-%'") == [("hour-0",), ("hour-1",), ("hour-2",)]
    assert not list(path.parent.glob("*.tmp"))
    pass_hours(house, 1.0)
    before = [copy.read_bytes() for copy in backups_of(path)]
    os.utime(newest, (house[2][0] + 3500, house[2][0] + 3500))          # another server made one just now
    pass_hours(house, 1.0)
    assert [copy.read_bytes() for copy in backups_of(path)] == before


def break_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is not what was read."""
    copy_whole = aicarousel._copy_whole

    def copy_and_break(connection: sqlite3.Connection, copy: Path) -> None:
        copy_whole(connection, copy)
        overwrite(copy, 4096, b"\xff" * 4096)
    monkeypatch.setattr(aicarousel, "_copy_whole", copy_and_break)


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(connection: sqlite3.Connection, copy: Path) -> None:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorname = "SQLITE_FULL"
        raise error
    monkeypatch.setattr(aicarousel, "_copy_whole", refuse)


@pytest.mark.parametrize("break_it", [break_copy, fill_disk], ids=["storage-backup-not-whole", "storage-backup-on-a-full-disk"])
def test_a_backup_that_is_not_whole_replaces_none(path: Path, house: tuple[UsageWriter, list[float], list[float]], monkeypatch: pytest.MonkeyPatch,
                                                  break_it: Callable[[pytest.MonkeyPatch], None]) -> None:
    before = [copy.read_bytes() for copy in backups_of(path)]
    break_it(monkeypatch)
    pass_hours(house, 2.0)
    assert [copy.read_bytes() for copy in backups_of(path)] == before and not list(path.parent.glob("*.tmp"))
    house[0].put(ROW._replace(request_id="after"))
    assert house[0].flush(HANG_S)


@case("storage-damage-found-by-the-backup")
def test_damage_that_the_hourly_backup_meets_is_mended(path: Path, house: tuple[UsageWriter, list[float], list[float]]) -> None:
    """In a place that nobody writes."""
    page_of("key_limits")(path)
    pass_hours(house, 2.0)
    assert "moved it to" in house[0].mended and rows_of(path, "PRAGMA integrity_check") == [("ok",)]
    assert KeyRing(path, ()).find(EARLY) is not None


RETENTION = {       # rows and days that are kept, how far the wall clock has just jumped, ids that are left of 2,500
    "all": (10 ** 9, 0, 0.0, range(2500)),
    "rows": (1000, 0, 0.0, range(1500, 2500)),
    "days": (10 ** 9, 20, 0.0, range(500, 2500)),
    "rows and days": (1500, 10, 0.0, range(1500, 2500)),
    "clock-retention-a-clock-that-jumps-ahead-deletes-nothing": (10 ** 9, 20, 4000 * 86_400.0, range(2500)),
    "clock-retention-a-clock-that-jumps-back-deletes-nothing": (10 ** 9, 20, -4000 * 86_400.0, range(2500)),
}


@pytest.mark.parametrize("case", RETENTION)
def test_old_rows_are_let_go_of(path: Path, house: tuple[UsageWriter, list[float], list[float]], case: str) -> None:
    keep_rows, keep_days, jump_s, left = RETENTION[case]
    writer, _, utc = house
    rows_of_usage(path, "DELETE FROM usage")
    for number in range(2500):          # of 25 days, a hundred a day; the last one is now
        writer.put(ROW._replace(request_id=str(number), at_utc=aicarousel.utc_text(utc[0] - (2499 - number) * 864) + ".000+00:00"))
    assert writer.flush(HANG_S)
    writer.keep_rows, writer.keep_days = keep_rows, keep_days
    pass_hours(house, 0.1, wall_jumps_s=jump_s)
    found = [int(row[0]) for row in rows_of(path, "SELECT request_id FROM usage ORDER BY id")]
    assert len(set(found) ^ set(left)) <= 1 and len(found) == len(set(found))       # on the edge of a day by six minutes


def rows_of_usage(path: Path, sql: str) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(sql)


def test_what_is_kept_can_be_set(serve: Callable[[], Served]) -> None:
    gateway = serve()
    assert (gateway.usage.keep_rows, gateway.usage.keep_days) == (1_000_000, 0)
    models = json.loads((gateway.home / "models.json").read_text())
    write_private(gateway.home / "models.json", json.dumps({**models, "carousel": {"limits": {"usageRows": 5000, "usageDays": 90}}}))
    wait_for(lambda: (gateway.usage.keep_rows, gateway.usage.keep_days) == (5000, 90))


# ---------------------------------------------------------------- files that come and go

@case("storage-too-long-locked")
def test_rows_beyond_what_memory_may_hold_are_counted(path: Path, serve: Callable[[], Served], monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest go, and it is said."""
    monkeypatch.setattr(aicarousel, "MAX_WAITING_ROWS", 5)
    gateway = serve()
    with failing("SQLITE_BUSY"):
        assert {gateway.ask().status for _ in range(12)} == {200}
        wait_for(lambda: gateway.usage.flush(0.01) or gateway.health()["database"]["dropped"] == 7)
        assert gateway.health()["database"] == {"state": "failing", "waiting": 5, "dropped": 7, "mended": None}
    assert gateway.usage.flush(HANG_S)
    assert rows_of(path, "SELECT count(*) FROM usage WHERE provider = 'well'") == [(5,)]


@case("storage-disk-that-hangs")
def test_a_disk_that_never_answers_holds_nobody_up(path: Path, serve: Callable[[], Served], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the thread that writes comes to count what waits."""
    monkeypatch.setattr(aicarousel, "MAX_QUEUED", 3)
    gateway, answers, begin = serve(), threading.Event(), aicarousel.transact
    monkeypatch.setattr(aicarousel, "transact", lambda connection, **more: (answers.wait(HANG_S), begin(connection, **more))[1])
    replies = [gateway.ask() for _ in range(12)]
    assert {reply.status for reply in replies} == {200} and max(reply.elapsed_s for reply in replies) < 2
    state = gateway.health()["database"]
    assert state["dropped"] > 0 and state["dropped"] + state["waiting"] <= 12
    answers.set()
    assert gateway.usage.flush(HANG_S)
    assert rows_of(path, "SELECT count(*) FROM usage WHERE provider = 'well'") == [(12 - gateway.usage.n_dropped,)]


@case("storage-replaced-while-running")
def test_a_database_that_was_deleted_or_restored_is_gone_on_with(path: Path, serve: Callable[[], Served]) -> None:
    """By `db restore`, with the keys of the copy, and what was there is kept."""
    gateway = serve()
    assert gateway.ask(LATE).status == 200 and gateway.usage.flush(HANG_S)
    assert aicarousel.main(["db", "restore", str(backups_of(path)[0]), "--home", str(gateway.home)]) == 0
    wait_for(lambda: gateway.ask(LATE).status == 401)
    assert gateway.ask(EARLY).status == 200 and gateway.usage.flush(HANG_S)
    assert rows_of(path, "SELECT count(*) > 0 FROM usage WHERE provider = 'well'") == [(1,)]
    [aside] = path.parent.glob("aicarousel-replaced-*.db")
    assert KeyRing(aside, ()).find(LATE) is not None and rows_of(aside, "SELECT count(*) FROM usage WHERE provider = 'well'") == [(1,)]
    for file in path.parent.glob("aicarousel.db*"):
        file.unlink()
    wait_for(lambda: gateway.ask(EARLY).status == 401)
    gateway.usage.put(ROW._replace(request_id="anew"))
    assert gateway.usage.flush(HANG_S) and rows_of(path, "SELECT count(*) FROM usage WHERE request_id = 'anew'") == [(1,)]


@case("storage-file-modes")
def test_what_holds_state_is_for_its_owner_alone(home: Path, path: Path, serve: Callable[[], Served]) -> None:
    for file in path.parent.iterdir():
        file.chmod(0o644)
    old_umask = os.umask(0)
    try:
        gateway = serve()
        assert gateway.ask().status == 200 and gateway.usage.flush(HANG_S)
        made = aicarousel.backup(path)
        modes = {file.name: mode_of(file) for file in path.parent.iterdir() if "hourly" not in file.name and file.name != "keys.epoch"}
        assert modes.keys() >= {path.name, f"{path.name}-wal", f"{path.name}-shm", made.name} and set(modes.values()) == {0o600}      # and whatever else stands there
    finally:
        os.umask(old_umask)


@case("storage-two-servers")
def test_two_servers_on_one_file(home: Path, path: Path, serve: Callable[[], Served]) -> None:
    """Each counts what it served, and both know every key at once."""
    gateways = [serve(), serve()]
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(gateways[number % 2].ask) for number in range(60)]
        made = [aicarousel.create_key(path, str(number))[0] for number in range(5)]
        assert {one.result().status for one in asked} == {200}
    assert {gateway.ask(key).status for gateway in gateways for key in made} == {200}
    aicarousel.revoke_key(path, 4)
    assert {gateway.ask(made[0]).status for gateway in gateways} == {401}
    assert all(gateway.usage.flush(HANG_S) for gateway in gateways)
    assert rows_of(path, "SELECT count(*), count(DISTINCT request_id) FROM usage WHERE provider = 'well'") == [(70, 70)]
    assert rows_of(path, "SELECT usage_count FROM api_keys WHERE id = 1") == [(60 + N_ROWS,)]
    assert [gateway.end() for gateway in gateways] == [0, 0] and rows_of(path, "PRAGMA integrity_check") == [("ok",)]


@case("storage-two-servers-start-on-damage")
def test_two_servers_that_start_on_a_damaged_file_mend_it_once(path: Path) -> None:
    page_of("usage")(path)
    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(lambda _: aicarousel.mend_database(path), range(4)))
    assert sum(map(bool, told)) == 1 and len(list(path.parent.glob("aicarousel-damaged-*.db"))) == 1
    assert KeyRing(path, ()).find(LATE) is not None


@case("storage-damaged-again-and-no-hard-links")
def test_aside_means_never_over_another_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    for number in range(3):
        page_of("usage")(path)
        kept.append(path.read_bytes())
        if number == 2:
            def refuse(*_: object) -> None:
                raise OSError(95, "Operation not supported")
            monkeypatch.setattr(os, "link", refuse)
        assert "moved it to" in aicarousel.mend_database(path)
    found = [file.read_bytes() for file in path.parent.glob("aicarousel-damaged-*.db")]
    assert sorted(found) == sorted(kept)
    assert {mode_of(file) for file in path.parent.iterdir()} == {0o600}


@case("storage-killed-while-mending")
def test_a_start_that_was_killed_while_it_mended_leaves_nothing_behind(path: Path) -> None:
    page_of("usage")(path)
    for suffix in ("", "-wal", "-shm", "-journal"):
        path.with_name(f"aicarousel-restored.db{suffix}").write_bytes(os.urandom(5000))
    assert "went on with aicarousel-hourly-1.db" in aicarousel.mend_database(path)
    assert rows_of(path, "PRAGMA integrity_check") == [("ok",)] and not list(path.parent.glob("aicarousel-restored*"))


COMMANDS = [      # words, exit status, what is printed
    (("check",), 0, r"\S*aicarousel\.db: whole"),
    (("backup",), 0, r"\S*aicarousel-backup-\d{8}T\d{6}Z-v\d+\.db"),
    (("restore", "{home}/data/aicarousel-hourly-1.db"), 0, r"restored \S+; what was there before is \S*aicarousel-replaced-\d{8}T\d{6}Z\.db"),
    (("restore", "{home}/data/aicarousel-hourly-1.db", "--home", "{home}/new"), 0, r"restored \S+"),
    (("restore", "{home}/missing.db"), 2, "aicarousel: .*missing.db: found no file; expected a backup made by .*"),
    (("restore", "{home}/models.json"), 2, "aicarousel: .*models.json: found no whole database; expected a backup made by .*"),
    (("restore", "{home}/newer.db"), 2, "aicarousel: .*newer.db: found no whole database; expected a backup made by .*"),
    (("restore", "{home}/empty.db"), 2, "aicarousel: .*empty.db: found no whole database; expected a backup made by .*"),
]


@pytest.mark.parametrize("words, code, told", COMMANDS, ids=[" ".join(row[0]) for row in COMMANDS])
def test_db_commands(home: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], code: int, told: str) -> None:
    (home / "empty.db").touch()
    shutil.copy(home / "data" / "aicarousel-hourly-1.db", home / "newer.db")
    rows_of(home / "newer.db", "PRAGMA user_version = 99")
    (home / "new" / "data").mkdir(parents=True)
    assert aicarousel.main(["db", *(word.format(home=home) for word in words), *(["--home", str(home)] if "--home" not in words else [])]) == code
    printed = capsys.readouterr()
    assert re.fullmatch(told + "\n", printed.out if code == 0 else printed.err)


def test_db_check_finds_what_a_start_does_not_look_for(path: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [(number, size)] = rows_of(path, "SELECT rootpage, (SELECT page_size FROM pragma_page_size) FROM sqlite_master WHERE name = 'idx_api_keys_active'")
    content = bytearray(path.read_bytes())
    content[number * size - 1] ^= 1                   # the index says otherwise than the table
    path.write_bytes(content)
    assert aicarousel.damage_of(path) == ""
    assert aicarousel.main(["db", "check", "--home", str(home)]) == 1
    assert capsys.readouterr().err.endswith("aicarousel.db: a damaged database\n")
    page_of("usage")(path)
    assert aicarousel.main(["db", "check", "--home", str(home)]) == 1
    shutil.rmtree(home / "data")
    assert aicarousel.main(["db", "check", "--home", str(home)]) == 2


# ---------------------------------------------------------------- clocks

DAY_S = 86_400.0


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """By how much the wall clock of gateways that are started from now on is wrong; the test moves it. Monotonic time is Served.loop's."""
    jump_s = [0.0]

    def world() -> aicarousel.World:
        loop = asyncio.get_running_loop()
        return aicarousel.World(loop.time, lambda: time.time() + jump_s[0], asyncio.sleep, random.random, loop.create_connection)
    monkeypatch.setattr(aicarousel, "real_world", world)
    return jump_s


def write_entries(home: Path, provider: Provider, **more: dict[str, Any]) -> None:
    """Providers in models.json, by name: script and further fields."""
    models = {name: {**entry(provider.script(name, fields.pop("script"))), **fields} for name, fields in more.items()}
    write_private(home / "models.json", json.dumps({**models, "carousel": {"maxWait": 0}}))


def refusing(retry_after_s: int) -> Any:
    return answer({"error": {"message": "Too many requests", "code": "rate_limit_exceeded"}}, 429, [("retry-after", str(retry_after_s))])


def left_s(gateway: Gateway, name: str) -> float:
    """How long a provider's longest cooldown lasts."""
    return max((row["until_s"] for row in gateway.cooling(name)), default=0.0)


JUMPS = {"ahead-a-day": 1, "ahead-40-days": 40, "ahead-70-years": 25_600, "back-a-day": -1, "back-40-days": -40, "back-before-1970": -21_900}


@pytest.mark.parametrize("days", JUMPS.values(), ids=[f"clock-{name}" for name in JUMPS])
def test_a_wall_clock_that_jumps_moves_no_cooldown_window_or_deadline(
        days: int, home: Path, path: Path, wall: list[float], provider: Provider, serve: Callable[[], Served]) -> None:
    write_entries(home, provider, sick={"script": refusing(600)}, few={"script": healthy("few"), "limits": {"rpd": 3}}, well={"script": healthy("well")})
    narrow, _ = aicarousel.create_key(path, "narrow", limits={"rpm": 2})
    gateway = serve()

    def ask(key: str = EARLY, model: str = "") -> Reply:
        return gateway.post("/v1/chat/completions", chat_body(model or None), key=key)
    assert [ask().status for _ in range(4)] == [200] * 4
    assert [ask(model="few/m").text for _ in range(4)][-1] == "well"
    assert [ask(narrow, "well/m").status for _ in range(3)] == [200, 200, 429]
    n_sick, n_few, uptime_s = len(provider.calls("sick")), len(provider.calls("few")), gateway.health()["uptime_s"]
    assert n_sick == 1 and n_few == 3 and 590 < left_s(gateway, "sick") <= 600
    wall[0] = days * DAY_S
    assert ask().text == "well" and ask(model="few/m").text == "well" and ask(narrow, "well/m").status == 429
    assert 590 < left_s(gateway, "sick") <= 600 and 0 <= gateway.health()["uptime_s"] - uptime_s < 60
    assert (len(provider.calls("sick")), len(provider.calls("few"))) == (n_sick, n_few)
    gateway.pass_time(61)
    assert ask(narrow, "well/m").status == 200
    gateway.pass_time(540)
    ask()
    ask()
    assert len(provider.calls("sick")) > n_sick
    gateway.pass_time(DAY_S)
    assert ask(model="few/m").text == "few"
    assert gateway.usage.flush(HANG_S)
    day = aicarousel.utc_text(time.time() + days * DAY_S)[:10]
    assert rows_of(path, f"SELECT count(*) FROM usage WHERE at_utc LIKE '{day}%'")[0][0] >= 5
    assert gateway.end() == 0 and not gateway.told("ERROR")


@case("clock-key-expiry")
def test_a_key_ends_by_the_wall_clock_and_lives_again_when_that_is_set_right(path: Path, wall: list[float], serve: Callable[[], Served]) -> None:
    key, _ = aicarousel.create_key(path, "ends", limits={"expires_at": int(time.time() + 3600)})
    gateway = serve()
    found = []
    for days in (0, 1, -400, 400, 0):
        wall[0] = days * DAY_S
        found.append(gateway.ask(key).status)
    assert found == [200, 401, 200, 401, 200]


@case("clock-budget")
def test_a_budget_is_for_the_day_the_wall_clock_shows(home: Path, path: Path, wall: list[float], provider: Provider, serve: Callable[[], Served]) -> None:
    """Each day has its own, however often the clock goes there and back; what was spent is not forgotten."""
    write_entries(home, provider, dear={"script": healthy(), "models": [{"id": "m", "price": {"input": 1e5, "output": 1e5}}]})
    key, _ = aicarousel.create_key(path, "poor", limits={"usd_per_day": 1.0})
    gateway = serve()

    def ask() -> tuple[int, bool]:
        reply = gateway.post("/v1/chat/completions", chat_body("dear/m", max_tokens=1), key=key)
        return reply.status, reply.status == 200 or 0 < int(reply.headers["retry-after"]) <= DAY_S
    assert [ask(), ask()] == [(200, True), (429, True)]
    for days, statuses in ((3, [200, 429]), (0, [429]), (-5, [200, 429]), (0, [429, 429]), (40, [200, 429]), (0, [429])):
        wall[0] = days * DAY_S
        assert [ask() for _ in statuses] == [(status, True) for status in statuses], days


@pytest.mark.parametrize("days", [40, -40], ids=["clock-restart-after-a-jump-ahead", "clock-restart-after-a-jump-back"])
def test_what_was_saved_lasts_no_longer_when_the_clock_was_set_in_between(
        days: int, home: Path, path: Path, wall: list[float], provider: Provider, serve: Callable[[], Served]) -> None:
    write_entries(home, provider, sick={"script": refusing(600)}, few={"script": healthy("few"), "limits": {"rpd": 3}}, well={"script": healthy("well")})
    gateway = serve()
    for model in (None, "sick/m", *["few/m"] * 4):
        assert gateway.chat(model).status == 200
    assert gateway.end() == 0
    wall[0] = days * DAY_S
    gateway = serve()
    assert left_s(gateway, "sick") <= 600 and (days > 0 or left_s(gateway, "sick") > 500)
    n_few = len(provider.calls("few"))
    assert gateway.chat("few/m").text == ("few" if days > 0 else "well")
    gateway.pass_time(DAY_S + 600)
    gateway.chat("sick/m")
    gateway.chat("sick/m")
    assert gateway.chat("few/m").text == "few" and len(provider.calls("few")) > n_few and len(provider.calls("sick")) >= 2


PROCESS = """if True:
    import pathlib, sys, time
    jump, now = pathlib.Path(sys.argv[1]), time.time
    time.time = lambda: now() + float(jump.read_text())
    import aicarousel
    raise SystemExit(aicarousel.main(["serve", "--port", "0", "--home", sys.argv[2]]))
"""
FAKETIME = next((str(path) for folder in ("/usr/lib", "/usr/local/lib", "/opt/homebrew/lib") for path in Path(folder).glob("**/faketime/libfaketimeMT.so.1")), "")


@pytest.mark.parametrize("way", ["clock-whole-process", *(["clock-whole-process-libfaketime"] if FAKETIME else [])])
def test_a_process_whose_wall_clock_jumps_while_it_serves(way: str, module_provider: Provider, tmp_path: Path) -> None:
    """Log, usage, keys and answers; the kernel's clock where libfaketime is installed, time.time() everywhere."""
    jump = tmp_path / "jump"
    jump.write_text("0")
    gateway = Gateway(environment={"LD_PRELOAD": FAKETIME, "FAKETIME_TIMESTAMP_FILE": str(jump), "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"} if "lib" in way else {})
    write_models(gateway.home, module_provider)
    gateway.key = aicarousel.create_key(gateway.home / "data" / "aicarousel.db", "test")[0]
    command = [*invocation(gateway.program), "serve", "--port", "0", "--home", str(gateway.home)] if "lib" in way else [sys.executable, "-c", PROCESS, str(jump), str(gateway.home)]
    try:
        with open(gateway.log_file, "ab") as log:
            gateway.process = subprocess.Popen(command, env=gateway.environment, cwd=gateway.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True)
        listening = threading.Event()
        threading.Thread(target=gateway._drain, args=(gateway.process.stdout, listening), daemon=True).start()
        assert listening.wait(HANG_S) and gateway.port, gateway.log
        for days in (0, 30, -30, 3650, -3650, 0):
            jump.write_text(f"{days}d" if "lib" in way else str(days * DAY_S))
            started = time.monotonic()
            assert gateway.chat("well/m").status == 200 and gateway.chat("well/m", stream=True).done and time.monotonic() - started < 5
        wait_for(lambda: rows_of(gateway.home / "data" / "aicarousel.db", "SELECT count(*), count(DISTINCT date(at_utc)) FROM usage") == [(12, 5)])
        assert gateway.stop() == 0 and "Traceback" not in gateway.log and " ERROR " not in gateway.log
    finally:
        gateway.remove()


# ---------------------------------------------------------------- kill -9

KEY_MAKER = """if True:
    import os, pathlib, sys, time, aicarousel
    while True:
        time.sleep(0.02)
        os.write(1, (aicarousel.create_key(pathlib.Path(sys.argv[1]), 'k')[0] + chr(10)).encode())
"""
WITHIN_S = 0.3          #: after the end of an answer its row is on the disk: README, Usage and cost


@dataclass
class Toll:
    """What was seen until the last kill."""
    keys: list[str]                                 #: printed
    answers: list[tuple[str, float]]                #: (request id, when its last byte had come) of whole answers
    n_kills: int = 0
    n_owed: int = 0                                 #: answers that had to be in the usage table


class Victim(Gateway):
    """A gateway that is killed and started again; started as a module, so that it is not compiled 200 times."""

    def revive(self, until_s: float | None) -> None:
        """Serving again; or on the way there, `until_s` after its start."""
        with open(self.log_file, "ab") as log:
            self.process = subprocess.Popen([*invocation(self.program), "serve", "--port", "0", "--home", str(self.home)], env=self.environment, cwd=self.folder,
                                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True)
        self.port, listening = 0, threading.Event()
        threading.Thread(target=self._drain, args=(self.process.stdout, listening), daemon=True).start()
        assert listening.wait(60 if until_s is None else until_s) and self.port or until_s is not None, self.log

    def load(self, toll: Toll, ended: threading.Event, streamed: bool) -> None:
        """Asks without a pause until the gateway is gone."""
        body = chat_body("well/m", stream=streamed)
        while not ended.is_set():
            with contextlib.suppress(OSError, ValueError):
                reply = self.post("/v1/chat/completions", body)
                if reply.status == 200 and reply.complete:
                    toll.answers.append((reply.headers["x-aicarousel-request-id"], time.monotonic()))


def kill_again_and_again(n_kills: int, seed: int, within_s: float, say: Callable[[str], None] = lambda line: None) -> Toll:
    """`n_kills` times: a gateway under load and a maker of keys, killed at a random instant. Raises AssertionError where anything is lost.

    within_s: an answer's row is owed when its end was longer ago.
    """
    chance, toll, owed = random.Random(seed), Toll([], []), set()
    provider, gateway = Provider(), Victim()
    database = gateway.home / "data" / "aicarousel.db"
    try:
        write_models(gateway.home, provider)
        gateway.key = aicarousel.create_key(database, "test")[0]
        for number in range(n_kills):
            maker = subprocess.Popen([sys.executable, "-c", KEY_MAKER, str(database)], env=gateway.environment, stdout=subprocess.PIPE, text=True)
            gateway.revive(None if chance.random() < 0.8 else chance.uniform(0.0, 0.5))
            ended = threading.Event()
            if gateway.port and toll.keys:
                assert gateway.post("/v1/chat/completions", chat_body("well/m"), key=chance.choice(toll.keys)).status == 200, f"seed {seed}, kill {number + 1}"
            clients = [threading.Thread(target=gateway.load, args=(toll, ended, streamed)) for streamed in (False, True, True)]
            for client in clients:
                client.start()
            time.sleep(chance.uniform(0.0, 1.5) if gateway.port else 0.0)
            killed_at = time.monotonic()
            gateway.process.kill()
            maker.kill()
            ended.set()
            gateway.process.wait()
            for client in clients:
                client.join(HANG_S)
            toll.keys += (maker.communicate()[0] or "").split("\n")[:-1]
            owed |= {name for name, at in toll.answers if at < killed_at - within_s}
            check_toll(database, toll, owed, number == n_kills - 1 or number % 10 == 9, f"seed {seed}, kill {number + 1}")
            toll.answers, toll.n_kills = [], number + 1
            if number % 10 == 9:
                say(f"{number + 1} kills: {len(owed)} answers owed and found, {len(toll.keys)} keys printed and valid")
    finally:
        gateway.remove()
        provider.close()
    toll.n_owed = len(owed)
    return toll


def check_toll(database: Path, toll: Toll, owed: set[str], whole: bool, when: str) -> None:
    """After each kill: the database is whole, each answer owed is there once, and counted; from time to time all keys."""
    with contextlib.closing(aicarousel.open_database(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)], when
        ids = [row[0] for row in connection.execute("SELECT request_id FROM usage WHERE status = 200 AND outcome = 'ok'")]
        counted = connection.execute("SELECT sum(usage_count) FROM api_keys").fetchone()[0]
        n_rows = connection.execute("SELECT count(*) FROM usage").fetchone()[0]
    assert len(ids) == len(set(ids)) and counted == n_rows, when
    assert owed <= set(ids), f"{when}: {len(owed - set(ids))} of {len(owed)} answers are not in the usage table"
    if whole:
        ring = KeyRing(database, ())
        assert [key for key in toll.keys if ring.find(key) is None] == [], when
        ring.close()


@case("storage-kill-9")
def test_kills_at_random_instants_lose_nothing() -> None:
    """A sample; the whole of it is `python tests/test_storage.py --kills 200`. Beside other tests a process may not run for longer than rows may take."""
    toll = kill_again_and_again(10, random.randrange(10 ** 6), 1.0 if "PYTEST_XDIST_WORKER" in os.environ else WITHIN_S)
    assert toll.n_kills == 10 and toll.n_owed > 0 and toll.keys


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a gateway under load, again and again; the exit status is 0 when nothing was lost.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(10 ** 6))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    toll = kill_again_and_again(arguments.kills, arguments.seed, WITHIN_S, lambda line: print(line, flush=True))
    print(f"{toll.n_kills} kills: all {len(toll.keys)} keys that were printed work, all {toll.n_owed} answers that had ended {WITHIN_S} s before are in the usage table exactly once, "
          "the database passed its integrity check after each")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
