"""What the tests that drive real clients share: a scripted model behind Chat, a child process for the client, its surroundings.

    model = Model(says("I write it.", calls=[call("Write", file_path=..., content=...)]), says("All ", "done."))
    house = build(first=model)                                      # conftest.py: a gateway whose only providers are these
    ran = run([CLAUDE, "-p", ...], surroundings(folder, ...), folder)

The clients are found by the variables TEST_CLAUDE and TEST_CODEX, else on PATH; a test whose client is not there is skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dialects import Telling
from fakes import DONE, Close, Json, Pause, Provider, Request, Reset, Script, answer, chat_answer, chat_chunk, frame, opened, pieces, stream
from house import House

RUN_S = 45.0                    #: a client that takes longer has failed


def program(name: str) -> str:
    """The path of a client, "" when it is not installed."""
    return os.environ.get(f"TEST_{name.upper()}") or shutil.which(name) or ""


CLAUDE, CODEX = program("claude"), program("codex")
needs_claude = pytest.mark.skipif(not CLAUDE, reason="Claude Code is not installed (npm install -g @anthropic-ai/claude-code, or TEST_CLAUDE names it)")
needs_codex = pytest.mark.skipif(not CODEX, reason="Codex is not installed (npm install -g @openai/codex, or TEST_CODEX names it)")


# ---------------------------------------------------------------- the model

def call(name: str, /, **arguments: Any) -> tuple[str, Json]:
    """A tool call that the model makes."""
    return name, arguments


def begin_answer(request: Request, texts: Sequence[str], think: str, calls: Sequence[tuple[str, Json]]) -> tuple[Telling, list[bytes]]:
    """An answer but for its end; its call ids differ from those of the conversation so far."""
    told = Telling("chat", f"t{n_answers(request)}x")
    return told, [*told.begin(), *told.think(*pieces(think)), *told.say(*texts), *(frame for name, arguments in calls for frame in told.call(name, *pieces(json.dumps(arguments))))]


def says(*texts: str, think: str = "", calls: Sequence[tuple[str, Json]] = ()) -> Script:
    """A whole answer, streamed or not, as it was asked."""
    def play(request: Request) -> Sequence[Any]:
        if request.streamed:
            told, frames = begin_answer(request, texts, think, calls)
            return stream(frames, told.end())
        made = [{"id": f"call_w{n_answers(request)}x{number}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}} for number, (name, arguments) in enumerate(calls)]
        return answer(chat_answer("".join(texts), tool_calls=made or None))
    return play


def dies(death: str, *texts: str, calls: Sequence[tuple[str, Json]] = ()) -> Script:
    """A streamed answer that breaks off inside its last call, or else in its text."""
    def play(request: Request) -> Sequence[Any]:
        assert request.streamed
        _, frames = begin_answer(request, texts, "", calls)
        return opened(frames[:-1] if calls else frames, Reset() if death == "reset" else Close())
    return play


def pausing(*texts: str) -> Script:
    """A streamed answer with the pauses "before" its head and "inside" its text, behind the first piece."""
    def play(request: Request) -> Sequence[Any]:
        told = Telling("chat")
        return [Pause("before"), *stream(told.begin(), told.say(texts[0]), Pause("inside"), told.say(*texts[1:]), told.end())]
    return play


def fills_up(tool: tuple[str, Json], asks: str, summaries: list[int], n_tokens: int) -> Script:
    """A first answer that calls a tool and says that the prompt has `n_tokens`; a summary where `asks` stands in the last words, noted in `summaries`; then a last word."""
    def play(request: Request) -> Sequence[Any]:
        if asks in text_of(request.json["messages"][-1]["content"]):
            summaries.append(n_answers(request))
            return says("<summary>A word was echoed.</summary>")(request)
        if summaries or n_answers(request):
            return says("All ", "done.")(request)
        _, frames = begin_answer(request, [], "", [tool])
        return stream(frames, frame(chat_chunk({}, "tool_calls", usage={"prompt_tokens": n_tokens, "completion_tokens": 9, "total_tokens": n_tokens + 9})), DONE)
    return play


def sit_out(drive: Callable[[House, Path], Ran], house: House, provider: Provider, folder: Path, *pauses: str) -> Ran:
    """Drives a client while half a minute passes in each pause, as the gateway's clock has it."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(drive, house, folder)
        for pause in pauses:
            provider.wait_paused(pause, timeout=RUN_S)
            for _ in range(6):
                house.pass_time(5.0)
            provider.release(pause)
        return running.result()


def outcomes(house: House) -> list[str]:
    """How the gateway's requests ended, by its log; none waits any more for the last bytes of a provider."""
    house.pass_time(1.0)
    return [line.rpartition("outcome=")[2].split()[0] for line in house.lines if " outcome=" in line]


def n_answers(request: Request) -> int:
    """How many of the model's answers the conversation holds."""
    return sum(message["role"] == "assistant" for message in request.json["messages"])


class Model:
    """A scripted model: what it says is told by how many of its answers the conversation holds, so asking again is answered again."""

    def __init__(self, *turns: Script) -> None:
        self.turns = turns

    def __call__(self, request: Request) -> Sequence[Any]:
        check_paired(request.json["messages"])
        script = self.turns[n_answers(request)]
        return script(request) if callable(script) else script


def check_paired(messages: Sequence[Json]) -> None:
    """Each call is answered once, right behind the message that makes it and in its order; no id comes twice."""
    due: list[str] = []
    seen: set[str] = set()
    for message in messages:
        if message["role"] == "tool":
            assert due and due.pop(0) == message["tool_call_id"], f"a result for {message['tool_call_id']}, due {due}"
            continue
        assert not due, f"no result for {due}"
        due = [call["id"] for call in message.get("tool_calls") or []]
        assert not seen.intersection(due) and len(set(due)) == len(due), f"{due} again"
        seen.update(due)
    assert not due, f"no result for {due}"


def results(request: Request) -> list[str]:
    """The text of the tool results at the end of the conversation, in order."""
    found: list[str] = []
    for message in reversed(request.json["messages"]):
        if message["role"] == "assistant":
            break
        if message["role"] == "tool":
            found.insert(0, text_of(message["content"]))
    return found


def text_of(content: Any) -> str:
    """The text of a message's content, whatever its form."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content or [])


def asked(provider: Provider, name: str) -> list[int]:
    """For each request that provider got, how many answers its conversation held."""
    return [n_answers(request) for request in provider.calls(name)]


# ---------------------------------------------------------------- the client

@dataclass
class Ran:
    """What a client did."""
    status: int
    lines: list[str] = field(default_factory=list)      #: of its standard output
    stderr: str = ""

    @property
    def events(self) -> list[Json]:
        """Its output, one JSON value a line."""
        return [json.loads(line) for line in self.lines if line.startswith("{")]


def surroundings(folder: Path, **variables: str) -> dict[str, str]:
    """A client's environment: a home of its own, the gateway's variables, and no way out of this machine."""
    home = folder.parent / "client-home"
    home.mkdir(exist_ok=True)
    nowhere = "http://127.0.0.1:1"
    return {"PATH": os.environ["PATH"], "HOME": str(home), "XDG_CONFIG_HOME": str(home / ".config"), "TMPDIR": str(home), "LANG": "C.UTF-8",
            "HTTP_PROXY": nowhere, "HTTPS_PROXY": nowhere, "ALL_PROXY": nowhere, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **variables}


def run(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> Ran:
    """Runs a client to its end."""
    with open(folder.parent / "client-stderr", "w+") as stderr:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True)
        overdue = threading.Timer(RUN_S, process.kill)
        overdue.start()
        ran = Ran(-1)
        try:
            ran.lines = [line.strip() for line in process.stdout or ()]
            ran.status = process.wait()
        finally:
            overdue.cancel()
            process.kill()
            process.wait()
        stderr.seek(0)
        ran.stderr = stderr.read()
    return ran
