"""The matrix of faults for clients that speak Chat; test_faults_messages.py and test_faults_responses.py have it for the other two.

    python tests/test_faults.py          runs all three and prints the table: fault x client format x streamed or not
    python tests/test_faults.py -k 429   the cases whose names hold 429
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent)]

import matrix  # noqa: E402  (after the path is set)
import pytest  # noqa: E402
from faults import *  # noqa: E402, F403  (the tests of every client format)
from faults import A_TEXT, B_TEXT, FAKE_KEY, PATIENT, MODES, entry  # noqa: E402
from fakes import Gateway, Provider, healthy  # noqa: E402

CLIENT = "chat"


def test_three_providers_take_turns(provider: Provider, gateway_factory) -> None:
    """Nine requests that name no model reach each of three providers three times, with its own model and key."""
    names = ["one", "two", "three"]
    gateway = gateway_factory({name: entry(provider.script(name, healthy(name)), name, PATIENT) for name in names}, {"FAKE_KEY": FAKE_KEY})
    replies = [gateway.chat(None, stream=bool(index % 2)) for index in range(9)]
    assert sorted(reply.text for reply in replies) == sorted(names * 3)
    for name in names:
        calls = provider.calls(name)
        assert len(calls) == 3
        assert {request.json["model"] for request in calls} == {f"m-{name}"}
        assert {request.headers["authorization"] for request in calls} == {f"Bearer {FAKE_KEY}"}
        assert not any(gateway.key in str(request.headers) for request in calls)


# ---------------------------------------------------------------- the table

COLUMNS = [f"{client} {mode}" for client in ("chat", "messages", "responses") for mode in MODES]
#: The groups of the table, and the tests whose parameters are cases of it.
GROUPS = {
    "test_before_commit": "", "test_after_commit": "mid", "test_when_all_fail": "allfail", "test_six_requests_in_a_row": "cooldown", "test_recovery": "recovery",
    "test_connection_closed_between_requests": "keepalive", "test_unasked_answer_is_never_delivered": "keepalive", "test_client_leaving_cancels_the_provider": "cancel",
    "test_client_that_stops_reading_holds_the_provider_back": "backpressure", "test_slow_provider_keeps_the_client_posted": "slow", "test_a_lone_provider_is_asked_once_more": "again",
    "test_a_refused_field_is_left_out_and_remembered": "repair", "test_afterwards_nothing_is_left_open": "after", "test_afterwards_all_is_well": "after",
}
OUTCOMES = {"next": "pre", "whole": "ok", "either": "ok", "refused": "relay"}


def place(item: pytest.Item) -> tuple[str, str] | None:
    """Where a test stands in the table."""
    name = getattr(item, "originalname", item.name)
    if name not in GROUPS:
        return None
    values = item.callspec.params if hasattr(item, "callspec") else {}
    case = values.get("case")
    mode = values.get("mode") or values.get("way") or ("json" if name.endswith("left_open") else "stream")
    what = case.name if case else values["broken"].id if "broken" in values else values.get("name") or values.get("recovering") or values.get("early") or name.removeprefix("test_").replace("_", "-")
    told = f"{OUTCOMES[case.outcome] if case else GROUPS[name]}: {what}".replace(f"own-{item.module.CLIENT}-", "own-")
    return told + (f" {values['leave']}" if "leave" in values else ""), f"{item.module.CLIENT} {mode}"


def test_the_table_is_printed_and_told_by_the_exit_status() -> None:
    """By the command itself, for two of the cases."""
    ran = subprocess.run([sys.executable, __file__, "-k", "own-messages-500"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr
    assert ["pre:", "own-500", "-", "-", "held", "held", "-", "-"] in [line.split() for line in ran.stdout.splitlines()], ran.stdout
    assert "1 cases, 2 cells: 2 held, 0 failed, 0 skipped" in ran.stdout


if __name__ == "__main__":
    raise SystemExit(matrix.show([HERE / name for name in ("test_faults.py", "test_faults_messages.py", "test_faults_responses.py")], place, COLUMNS, sys.argv[1:]))
