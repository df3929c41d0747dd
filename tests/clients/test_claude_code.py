"""Claude Code against a gateway whose only providers speak Chat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aicarousel import CLAUDE_WINDOW
from driver import CLAUDE, Model, Ran, asked, call, dies, fills_up, n_answers, needs_claude, outcomes, pausing, results, run, says, sit_out, surroundings
from fakes import Provider
from house import House

pytestmark = needs_claude

QUIET = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1", "DISABLE_TELEMETRY": "1", "DISABLE_ERROR_REPORTING": "1", "DISABLE_BUG_COMMAND": "1"}


def drive(house: House, folder: Path, *, model: str = "aicarousel", **variables: str) -> Ran:
    """Runs `claude -p` in `folder` to its end."""
    environment = surroundings(folder, ANTHROPIC_BASE_URL=house.url, ANTHROPIC_AUTH_TOKEN=house.key, ANTHROPIC_MODEL=model, ANTHROPIC_DEFAULT_HAIKU_MODEL=model, IS_SANDBOX="1", **QUIET, **variables)
    words = ["-p", "Do it.", "--dangerously-skip-permissions", "--output-format", "stream-json", "--verbose", "--include-partial-messages"]
    return run([CLAUDE, *words], environment, folder)


def final(ran: Ran) -> dict[str, Any]:
    """The client's own verdict on its run."""
    assert ran.status == 0, (ran.status, ran.stderr, ran.lines[-3:])
    assert ran.events[-1]["type"] == "result" and not ran.events[-1]["is_error"], ran.lines[-3:]
    return ran.events[-1]


def streamed(ran: Ran) -> list[dict[str, Any]]:
    """The events of the gateway's streams, as the client passes them on."""
    return [event["event"] for event in ran.events if event["type"] == "stream_event"]


def streamed_text(ran: Ran, kind: str = "text") -> list[str]:
    """The pieces of text (or thinking, partial_json) that it was sent."""
    return [event["delta"][kind] for event in streamed(ran) if event["type"] == "content_block_delta" and kind in event["delta"]]


def test_a_session_of_twelve_tool_turns(build: Callable[..., House], provider: Provider, folder: Path, red_square: tuple[Path, str]) -> None:
    made, other, (picture, url) = folder / "made.txt", folder / "other.txt", red_square
    other.write_text("other text\n")
    edits = [says(calls=[call("Edit", file_path=str(made), old_string=f"step {step}", new_string=f"step {step + 1}")]) for step in range(7)]
    model = Model(
        says("I ", "write it.", think="A file is wanted.", calls=[call("Write", file_path=str(made), content="step 0\n")]),
        says("Two at once.", calls=[call("Read", file_path=str(made)), call("Read", file_path=str(other))]),
        says(calls=[call("Read", file_path=str(folder / "missing.txt"))]),
        says("I look.", calls=[call("Read", file_path=str(picture))]),
        *edits,
        says("A shell.", calls=[call("Bash", command="cat made.txt; exit 3", description="Shows the file")]),
        says("All ", "done."))
    house = build(first=model)
    ran = drive(house, folder)

    assert final(ran)["result"] == "All done." and final(ran)["num_turns"] >= 12
    assert made.read_text() == "step 7\n"
    requests = {n_answers(request): request for request in provider.calls("first")}
    assert sorted(requests) == list(range(13)) and all(request.streamed for request in requests.values())
    assert all({"Write", "Read", "Edit", "Bash"} <= {tool["function"]["name"] for tool in request.json["tools"]} for request in requests.values())
    assert "made.txt" in results(requests[1])[0]
    assert ["step 0" in results(requests[2])[0], "other text" in results(requests[2])[1]] == [True, True]
    assert len(results(requests[3])) == 1 and "not exist" in results(requests[3])[0]
    parts = [part for message in requests[4].json["messages"] if isinstance(message["content"], list) for part in message["content"]]
    assert [part["image_url"]["url"] for part in parts if part["type"] == "image_url"] == [url]
    assert "step 7" in results(requests[12])[0] and "3" in results(requests[12])[0]
    assert "".join(streamed_text(ran)).startswith("I write it.") and streamed_text(ran)[-2:] == ["All ", "done."]
    assert "".join(streamed_text(ran, "thinking")) == "A file is wanted."
    assert [event["content_block"]["name"] for event in streamed(ran) if event["type"] == "content_block_start" and event["content_block"]["type"] == "tool_use"] == [
        "Write", "Read", "Read", "Read", "Read", *["Edit"] * 7, "Bash"]


# ---------------------------------------------------------------- a provider that dies

def write(folder: Path) -> Any:
    """The call that makes the file."""
    return call("Write", file_path=str(folder / "made.txt"), content="made\n")


@pytest.mark.parametrize("death", ["reset", "closed"])
def test_a_provider_dies_in_text(build: Callable[..., House], provider: Provider, folder: Path, death: str) -> None:
    house = build(first=Model(dies(death, "Half of ", "this"), says("never")), spare=Model(says("I write it.", calls=[write(folder)]), says("All ", "done.")))
    ran = drive(house, folder)
    assert final(ran)["result"] == "All done." and (folder / "made.txt").read_text() == "made\n"
    assert asked(provider, "first") == [0] and asked(provider, "spare") == [0, 1]
    assert streamed_text(ran)[:2] == ["Half of ", "this"]
    assert outcomes(house) == ["error", "ok", "ok"]


@pytest.mark.parametrize("death", ["reset", "closed"])
def test_a_provider_dies_in_a_call(build: Callable[..., House], provider: Provider, folder: Path, death: str) -> None:
    """Nobody sees it: the spare one's answer is the first thing that the client gets."""
    house = build(first=Model(dies(death, calls=[write(folder)])), spare=Model(says("I write it.", calls=[write(folder)]), says("All ", "done.")))
    ran = drive(house, folder)
    assert final(ran)["result"] == "All done." and (folder / "made.txt").read_text() == "made\n"
    assert asked(provider, "first") == [0] and asked(provider, "spare") == [0, 1]
    assert streamed_text(ran) == ["I write it.", "All ", "done."]
    assert [event["type"] for event in streamed(ran)].count("message_start") == 2
    assert outcomes(house) == ["ok", "ok"]


@pytest.mark.parametrize("death", ["reset", "closed"])
def test_a_provider_dies_in_a_call_behind_text(build: Callable[..., House], provider: Provider, folder: Path, death: str) -> None:
    """The client is told, and asks again; of the call it has seen nothing."""
    half = call("Bash", command=f"touch {folder / 'wrong.txt'}", description="Never to be run")
    house = build(first=Model(dies(death, "I do ", "it.", calls=[half])), spare=Model(says("I write it.", calls=[write(folder)]), says("All ", "done.")))
    ran = drive(house, folder)
    assert final(ran)["result"] == "All done." and (folder / "made.txt").read_text() == "made\n" and not (folder / "wrong.txt").exists()
    assert asked(provider, "first") == [0] and asked(provider, "spare") == [0, 1]
    assert streamed_text(ran)[:2] == ["I do ", "it."]
    assert "Bash" not in [event["content_block"].get("name") for event in streamed(ran) if event["type"] == "content_block_start"]
    assert outcomes(house) == ["error", "ok", "ok"]


def test_a_silent_provider_is_waited_for(build: Callable[..., House], provider: Provider, folder: Path) -> None:
    """Half a minute without a word, before and inside the answer: the client takes the pings, also those before the message begins."""
    house = build(first=Model(pausing("Slow, ", "but whole.")))
    ran = sit_out(drive, house, provider, folder, "before", "inside")
    assert final(ran)["result"] == "Slow, but whole." and asked(provider, "first") == [0]
    assert [event["type"] for event in streamed(ran)].count("message_start") == 1


def test_it_compacts_within_the_window_that_it_was_told(build: Callable[..., House], folder: Path) -> None:
    """What `config claude-code` and `run` set: without it, it waits for a million tokens."""
    summaries: list[int] = []
    first = fills_up(call("Bash", command="echo word", description="Says a word"), "Do NOT call any tools", summaries, 80_000)
    ran = drive(build(first=first), folder, **{CLAUDE_WINDOW: "100000"})
    assert final(ran)["result"] == "All done." and final(ran)["modelUsage"]["aicarousel"]["contextWindow"] == 100_000
    if tuple(map(int, ran.events[0]["claude_code_version"].split("."))) < (2, 1, 330):
        pytest.skip("before 2.1.330 it knows the window, and compacts when it is told that a prompt is too long")
    assert summaries == [1], ran.lines[-3:]
