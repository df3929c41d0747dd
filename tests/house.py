"""The gateway inside the test's process, on a loop whose time the test moves; and a shorthand for one provider of it."""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aicarousel
from fakes import FAKE_KEY, HANG_S, Client, Gateway, InLoop

KEY = "sk-" + "7" * 64


class House(InLoop, Gateway):
    """A Gateway and its Server in this process, in a thread of their own; its requests are those of fakes.Gateway."""

    def __init__(self, models: dict[str, Any]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="aicarousel-test-"))
        self.models, self.key, self.process = models, KEY, None
        self.lines: list[str] = []
        self._handler = logging.Handler(logging.INFO)
        self._handler.emit = lambda record: self.lines.append(f"{record.levelname} {record.getMessage()}")    # type: ignore[method-assign]
        self._logger = logging.getLogger("aicarousel")

    @staticmethod
    def read(models: dict[str, Any]) -> aicarousel.Config:
        """The configuration that `models` means, with one key for all."""
        return aicarousel.load_config(json.dumps(models), models_path="models.json", environment={"FAKE_KEY": FAKE_KEY, "API_KEYS": KEY}, dotenv={}, flags={})

    def start(self) -> House:
        self._logger.addHandler(self._handler)
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False
        self.run_loop()
        self.do(self._open)
        return self

    async def _open(self) -> None:
        path = self.folder / "data" / "aicarousel.db"
        aicarousel.open_database(path).close()
        world = aicarousel.real_world()
        self.keys, self.usage = aicarousel.KeyRing(path, [KEY]), aicarousel.UsageWriter(path)
        self.gateway = aicarousel.Gateway(self.read(self.models), self.keys, self.usage, world)
        self.server = aicarousel.Server(self.gateway, world)
        sockets = aicarousel.bind("127.0.0.1", 0)
        await self.server.listen(sockets)
        self.port = sockets[0].getsockname()[1]
        self.database = path

    def wait(self, check: Callable[[], object]) -> None:
        """Lets the loop turn until `check` holds."""
        ends_at = time.monotonic() + HANG_S
        while not check():
            assert time.monotonic() < ends_at, "it did not happen"
            time.sleep(0.002)
            self.settle()

    def wait_line(self, words: str) -> None:
        """Waits until something that holds `words` was logged."""
        self.wait(lambda: any(words in line for line in self.lines))

    def seen_by(self, client: Client) -> bytes:
        """What has reached the client so far."""
        self.settle()
        client.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            client.raw += client.socket.recv(1 << 18)
        return bytes(client.raw)

    def reconfigure(self, models: dict[str, Any]) -> None:
        """As an edit of models.json does."""
        config = self.read(models)
        self.do(lambda: self.gateway.reconfigure(config))

    def rows(self) -> list[dict[str, Any]]:
        """The usage table."""
        assert self.usage.flush(HANG_S)
        with sqlite3.connect(self.database) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute("SELECT * FROM usage ORDER BY id")]

    def wait_rows(self, count: int) -> list[dict[str, Any]]:
        """The usage table once the gateway has taken note of `count` requests."""
        self.settle()
        rows = self.rows()
        assert len(rows) == count, rows
        return rows

    def remove(self) -> None:
        self.do(lambda: self.server.drain(0.0))
        self.do(self.gateway.close)
        self.usage.close()
        self.keys.close()
        self.end_loop()
        self.loop.close()
        self._logger.removeHandler(self._handler)
        self._logger.propagate = True
        super().remove()


def entry(url: str, **more: Any) -> dict[str, Any]:
    """A provider in models.json."""
    return {"baseUrl": url, "default": "m", "enableFallback": False, "models": ["m"], "keys": ["env:FAKE_KEY"], **more}
