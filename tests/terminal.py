"""A program at a pseudo-terminal: what it prints is waited for, what a person types is sent, and all of it is kept as the transcript."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fakes import HANG_S

#: Gives the program the terminal for its own, as a login shell would; then it is that program.
_AT_TERMINAL = "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
_CONTROLS = re.compile(r"\x1b\[[0-9;?<>=]*[A-Za-z]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[()][A-Z0-9]|\x1b[=>78]|[\r\x0e\x0f]")


class Terminal:
    """`with Terminal(words, ...) as it`: it.expect("prompt: "); it.type("answer"); it.end()."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], folder: Path, columns: int = 80) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (40, columns))
        self.process = subprocess.Popen([sys.executable, "-S", "-c", _AT_TERMINAL, *words], stdin=slave, stdout=slave, stderr=slave, close_fds=True, cwd=folder, env={"TERM": "xterm", **environment})
        os.close(slave)
        self.n_colours = 0                      #: words that came in colour
        self.transcript, self._at = "", 0       #: what was on the screen, without control sequences; how much of it has been expected

    def expect(self, words: str, timeout: float = HANG_S) -> str:
        """Waits until `words` are on the screen, behind what was expected before; what came up to their end."""
        until = time.monotonic() + timeout
        while (found := self.transcript.find(words, self._at)) < 0:
            assert self._read(until), f"{words!r} did not come; the screen since then:\n{self.transcript[self._at:]}"
        start, self._at = self._at, found + len(words)
        return self.transcript[start:self._at]

    def type(self, line: str | bytes) -> None:
        """Types a line and Enter."""
        os.write(self._master, (line.encode() if isinstance(line, str) else line) + b"\n")

    def answer(self, prompt: str, line: str) -> str:
        """Waits for a prompt and types an answer; what came before it."""
        came = self.expect(prompt)
        self.type(line)
        return came

    def control(self, letter: str) -> None:
        """Types Control and a letter."""
        os.write(self._master, bytes([ord(letter) - 64]))

    def ended(self, within: float) -> bool:
        """Whether the program ends within so many seconds."""
        until = time.monotonic() + within
        while self._read(until):
            pass
        return self.process.poll() is not None

    def end(self, timeout: float = HANG_S) -> int:
        """Waits for the end of the program; its exit status."""
        until = time.monotonic() + timeout
        while self._read(until):
            pass
        return self.process.wait(max(until - time.monotonic(), 0.1))

    def _read(self, until: float) -> bool:
        """Takes what comes next; False at the end of it or of time."""
        ready, _, _ = select.select([self._master], [], [], max(until - time.monotonic(), 0.0))
        try:
            data = os.read(self._master, 65536) if ready else b""
        except OSError:                 # EIO: the other side is closed
            data = b""
        self.n_colours += len(re.findall(rb"\x1b\[3\dm", data))
        self.transcript += _CONTROLS.sub("", data.decode("utf-8", "replace"))
        return bool(data)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._master)
