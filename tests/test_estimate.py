"""The token estimate by its parts; the figure over the recordings is measured where readers turn their bodies into hub requests."""
import base64
import time

import aicarousel as a


def hub(*turns, **fields):
    return {**a.new_hub("chat", "m", False), "turns": list(turns), **fields}


def said(*parts):
    return {"role": "user", "parts": list(parts)}


def test_tools_calls_and_images_count():
    plain = a.estimate_tokens(hub(said(a.text_part("hi"))), "gpt-4o")
    tool = {"name": "f", "description": "reads a file", "kind": "function", "schema": {"type": "object", "properties": {"p": {"type": "string"}}}}
    png = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (1024).to_bytes(4, "big") + (1024).to_bytes(4, "big") + b"\0" * 20).decode()
    assert a.estimate_tokens(hub(said(a.text_part("hi")), tools=[tool]), "gpt-4o") > plain + 10
    assert a.estimate_tokens(hub(said({"type": "image", "data": png, "mime": "image/png"})), "gpt-4o") in range(765, 830)
    assert a.estimate_tokens(hub(said({"type": "image", "data": png, "mime": "image/png"})), "claude-sonnet-4-5") in range(1398, 1480)
    assert a.estimate_tokens(hub(said(a.text_part("hi")), tools=[tool]), "claude-sonnet-4-5") > 500


def test_the_ratio_is_learned_slowly_and_bounded():
    learned = a.Calibration()
    for _ in range(60):
        learned.learn("m", 100, 900)
    assert 1.9 < learned.ratio("m") <= 2.0 and learned.ratio("other") == 1.0


def test_a_megabyte_is_counted_quickly_and_like_its_samples():
    text = "def read(path): return open(path).read()  # 42 files\n" * 20_000
    began = time.perf_counter()
    whole = a.estimate_text(text)
    assert time.perf_counter() - began < 0.5
    assert abs(whole / (a.estimate_text(text[:5300]) * len(text) / 5300) - 1) < 0.05


def test_m27_missing_usage_is_filled_in_and_told_usage_is_kept():
    filler = a.UsageFiller(25)
    assert filler.feed(a.start_delta("i", "m"))[0]["usage"] == {"input": 25}
    assert filler.feed(a.text_delta("Hello there"))[0]["text"] == "Hello there"
    filled = filler.feed(a.stop_delta("end"))
    assert filled[0]["input"] == 25 and filled[0]["output"] > 0 and filled[0]["estimated"] and filled[1]["delta"] == "stop"
    filler = a.UsageFiller(25)
    filler.feed(a.usage_delta({"input": 9, "output": 1}))
    assert filler.feed(a.stop_delta("end")) == [a.stop_delta("end")]
