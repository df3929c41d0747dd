"""The first two minutes: from an empty folder with aicarousel.py alone, README's first page leads to a streamed answer in Claude Code.

A person's terminal session, driven through pseudo-terminals; a scripted provider on loopback stands in for the real one. What was on the screen is compared with
the recording in data/session.txt, which is written by: TEST_RECORD=1 python -m pytest tests/test_two_minutes.py
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest

from fakes import ROOT, Provider, clean_environment, free_port, healthy
from terminal import Terminal
from test_accounts_cli import GROQ_KEY, vendor

CLAUDE = os.environ.get("TEST_CLAUDE") or shutil.which("claude")
RECORDING = Path(__file__).parent / "data" / "session.txt"
FIRST_PAGE = (ROOT / "README.md").read_text().split("\n## Client set-ups")[0]
ANSWER = "Hello from the carousel."


class Shell(Terminal):
    """A shell as a person has it open; what is typed into it is counted."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        super().__init__(["sh"], environment, folder)
        self.typed = 0

    def answer(self, prompt: str, line: str) -> str:
        self.typed += len(line) + 1
        return super().answer(prompt, line)

    def command(self, line: str, arguments: str = "") -> None:
        """Types a command of README's first page, and perhaps something behind it."""
        assert f"\n{line}\n" in FIRST_PAGE, line
        self.answer("$ ", line + arguments)


@pytest.mark.skipif(CLAUDE is None, reason="Claude Code is not installed (TEST_CLAUDE names it, or the path)")
def test_from_an_empty_folder_to_a_streamed_answer_in_claude_code(tmp_path: Path, provider: Provider) -> None:
    assert CLAUDE is not None
    folder, port = tmp_path / "new", free_port()
    folder.mkdir()
    shutil.copy(ROOT / "aicarousel.py", folder)
    check = vendor(good=GROQ_KEY)
    url = provider.script("groq", lambda request: check(request) if request.method == "GET" else healthy(ANSWER)(request))
    path = os.pathsep.join([str(Path(sys.executable).parent), str(Path(CLAUDE).parent), os.environ["PATH"]])
    environment = clean_environment(tmp_path) | {"PATH": path, "PS1": "$ ", "PORT": str(port), "GROQ_BASE_URL": url, "ENV": "", "PYTHONPATH": ""}
    began_at = time.monotonic()
    with Shell(folder, environment) as first, Shell(folder, environment) as second:
        first.command("python aicarousel.py setup")
        first.answer("Paste a key (it is not shown; Enter: none): ", GROQ_KEY)
        first.expect("works; kept as GROQ_API_KEY")
        first.answer("One more key (Enter: that is all): ", "")
        first.command("python aicarousel.py serve")
        first.expect("listening on")
        second.command("python aicarousel.py run -- claude", ' -p "Say hello"')
        second.expect(ANSWER, 60.0)
        took_s = time.monotonic() - began_at
        first.expect("outcome=ok")
        second.answer("$ ", "python aicarousel.py stop")
        second.expect("stopped: ")
        first.expect("$ ")
        second.expect("$ ")
        assert took_s < 120.0 and first.typed + second.typed - len(GROQ_KEY) < 200, "typing all this takes less than two minutes"
    asked = [request for request in provider.calls("groq") if request.method == "POST"]
    assert asked and asked[-1].streamed and "Say hello" in asked[-1].body.decode() and asked[-1].headers["authorization"] == f"Bearer {GROQ_KEY}"
    assert GROQ_KEY not in first.transcript + second.transcript
    assert sorted(entry.name for entry in folder.iterdir() if entry.name != "__pycache__") == ["aicarousel.py"], "nothing else comes into the folder"
    shown = plain(first.transcript, tmp_path, port) + "\n--- the second terminal ---\n" + plain(second.transcript, tmp_path, port)
    if os.environ.get("TEST_RECORD"):
        RECORDING.write_text(shown)
    assert shown == RECORDING.read_text()


def plain(screen: str, folder: Path, port: int) -> str:
    """A screen without what differs from run to run: keys, folders, the port, the log, what newer clients say of a model that they do not know."""
    screen = re.sub(r"sk-[0-9a-f]{64}", "sk-...", screen.replace(str(folder.resolve()), "~").replace(str(folder), "~").replace(f":{port}", ":7123"))
    lines = [line.rstrip() for line in screen.split("\n") if not re.match(r"\d{4}-\d\d-\d\d \d\d:|Claude Code doesn't recognize|\[claude-code:", line)]
    return "\n".join(lines).strip() + "\n"
