"""Section 10: rules that all formats share.  Ids like m64 are the numbers of the catalogue of known mistakes."""
import copy
import json

import pytest
from hypothesis import given, settings, strategies as st

import aicarousel as a
from deltas import check_deltas

ANTHROPIC = a.profile_for("anthropic", "claude-sonnet-4-5", "messages")
NEW_CLAUDE = a.profile_for("anthropic", "claude-opus-5", "messages")
OPENAI = a.profile_for("openai", "gpt-5.5", "responses")
GPT4 = a.profile_for("openai", "gpt-4o")
GROQ = a.profile_for("groq", "openai/gpt-oss-120b")
GEMINI3 = a.profile_for("gemini", "gemini-3.5-flash-lite")
DEEPSEEK = a.profile_for("deepseek", "deepseek-flash")
MISTRAL = a.profile_for("mistral", "mistral-large-latest")
KIMI = a.profile_for("moonshot", "kimi-k2")
PLAIN = a.Profile()
ALL = [ANTHROPIC, NEW_CLAUDE, OPENAI, GPT4, GROQ, GEMINI3, DEEPSEEK, MISTRAL, KIMI, PLAIN, a.profile_for("openrouter", "anthropic/claude-haiku-4.5"),
       a.profile_for("deepseek", "deepseek-flash", "messages"), a.profile_for("groq", "openai/gpt-oss-20b", "responses")]


def user(*parts):
    return {"role": "user", "parts": [a.text_part(part) if isinstance(part, str) else part for part in parts]}


def bot(*parts):
    return {**user(*parts), "role": "assistant"}


def call(call_id="call_A12345", name="f", args="{}", **more):
    return {**a.call_part(call_id, name, args), **more}


def result(call_id="call_A12345", *texts, **more):
    return {**a.result_part(call_id, [a.text_part(text) for text in texts or ("r",)]), **more}


def hub(*turns, client="chat", **fields):
    return {**a.new_hub(client, "m", False), "turns": list(turns) or [user("hi")], **fields}


def think(text="t", **seal):
    return {"type": "think", "text": text, **({"seal": seal} if seal else {})}


MEND = [
    ("m64 empty turn", [user("hi"), bot(""), user("ho")], [user("hi", "ho")]),
    ("m65 blanks beside a call", [bot(" \n", call()), user(result())], [bot(call()), user(result())]),
    ("m66 text before result", [bot(call()), user("x", result())], [bot(call()), user(result(), "x")]),
    ("m67 results over turns", [bot(call("a_1_long"), call("b_1_long")), user(result("b_1_long")), user(result("a_1_long"))],
     [bot(call("a_1_long"), call("b_1_long")), user(result("a_1_long"), result("b_1_long"))]),
    ("m68 Codex order", [bot(call()), bot("Searching."), user(result())], [bot("Searching.", call()), user(result())]),
    ("m69 unanswered", [bot(call()), user("stop")], [bot(call()), user(result("call_A12345", "No result was recorded for this tool call.", error=True), "stop")]),
    ("m69 unanswered at the end", [user("x"), bot(call())], [user("x"), bot(call()), user(result("call_A12345", "No result was recorded for this tool call.", error=True))]),
    ("m70 m71 orphan", [user(result("gone", "old"))], [user("[tool result gone]\nold")]),
    ("m72 no id", [bot(call()), user(result(), result("", "loose"))], [bot(call()), user(result(), "[tool result]\nloose")]),
    ("result before its call", [user(result()), bot(call()), user("x")],
     [user("[tool result call_A12345]\nr"), bot(call()), user(result("call_A12345", "No result was recorded for this tool call.", error=True), "x")]),
    ("result later moves back", [bot(call()), user("x"), bot("y"), user(result())], [bot(call()), user(result(), "x"), bot("y")]),
    ("two results, the last", [bot(call()), user(result(), result("call_A12345", "again"))], [bot(call()), user(result("call_A12345", "again"))]),
    ("m93 repeated ids", [bot(call("f:0")), user(result("f:0", "1")), bot(call("f:0")), user(result("f:0", "2"))],
     [bot(call("f:0")), user(result("f:0", "1")), bot(call("f:0_2")), user(result("f:0_2", "2"))]),
    ("calls behind text", [bot("a", call(), "b"), user(result())], [bot("a", "b", call()), user(result())]),
    ("prefill trimmed", [user("x"), bot("The answer: ")], [user("x"), bot("The answer:")]),
    ("system turn between call and result", [bot(call()), {"role": "system", "parts": [a.text_part("s")]}, user(result())],
     [bot(call()), user(result()), {"role": "system", "parts": [a.text_part("s")]}]),
]


@pytest.mark.parametrize("given_turns,wanted", [row[1:] for row in MEND], ids=[row[0] for row in MEND])
def test_mend(given_turns, wanted):
    before = copy.deepcopy(given_turns)
    assert a.mend(given_turns) == wanted
    assert given_turns == before
    assert a.mend(wanted) == wanted


def test_empty_ids_are_filled_by_place_and_always_alike():
    turns = [user("x"), bot(call(""), call("", "g")), user(result("", "1"), result("", "2"))]
    mended = a.mend(turns)
    ids = [part["id"] for part in mended[1]["parts"]]
    assert len(set(ids)) == 2 and [part["id"] for part in mended[2]["parts"]] == ids and mended == a.mend(turns)


def test_native_order_is_kept_for_its_own_family_only():
    own = [bot(think(family="anthropic", field="signature", data="Eq"), call("toolu_0001"), think(family="anthropic", field="signature", data="Er"), "x"), user(result("toolu_0001"))]
    assert a.mend(own, ANTHROPIC) == own
    assert [part["type"] for part in a.mend(own, GPT4)[0]["parts"]] == ["think", "think", "text", "call"]


FIT = [("m80", "openai64", "x" * 80, 64), ("m81", "mistral9", "call_abc", 9), ("m81 kept", "mistral9", "abcDEF123", 9), ("anthropic", "anthropic", "functions.Read:0", None), ("others", "", "a:b", 3)]


@pytest.mark.parametrize("rule,call_id,length", [row[1:] for row in FIT], ids=[row[0] for row in FIT])
def test_fit_id(rule, call_id, length):
    fitted = a.fit_id(call_id, rule)
    assert length is None or len(fitted) == length
    assert a.fit_id(fitted, rule) == fitted
    if rule == "anthropic":
        assert fitted.startswith("functions_Read_0_") and set(fitted) <= set(a.mint.__globals__["_BASE62"] + "_-")


@pytest.mark.parametrize("call_id", ["0", "call_0", "functions.Read:0", "list_dir:0", "a.12"])
def test_m93_m94_counting_ids_get_a_suffix_that_their_owner_never_sees(call_id):
    given_id = a.unique_id(call_id, (), "seed")
    assert given_id.startswith(call_id + "_u") and len(given_id) == len(call_id) + 10
    ready = a.prepare(hub(bot(call(given_id)), user(result(given_id))), KIMI)
    assert ready["turns"][0]["parts"][0]["id"] == call_id == ready["turns"][1]["parts"][0]["id"]


@pytest.mark.parametrize("call_id", ["", None, "null", 5])
def test_empty_ids_are_minted(call_id):
    assert a.unique_id(call_id, (), "s", "toolu_").startswith("toolu_") and len(a.unique_id(call_id, (), "s")) == 29


def test_good_ids_stay():
    assert a.unique_id("toolu_01AbCd", (), "s") == "toolu_01AbCd"


ENVELOPES = [("aic1.eyJvIjoiY2VyZWJyYXMiLCJtIjoicXdlbi0zIiwiZiI6InJlYXNvbmluZ19jb250ZW50In0", {"family": "cerebras", "model": "qwen-3", "field": "reasoning_content"}),
             ("aic1.eyJvIjoib3BlbmFpIiwibSI6ImdwdC01LjUiLCJmIjoiZW5jcnlwdGVkIiwiZCI6ImdBQUFBQUJvIn0", {"family": "openai", "model": "gpt-5.5", "field": "encrypted", "data": "gAAAAABo"}),
             ("aic1.eyJvIjoiYW50aHJvcGljIiwibSI6ImNsYXVkZS1vcHVzLTUiLCJmIjoic2lnbmF0dXJlIiwiZCI6IkVxUUJDa1lJIn0",
              {"family": "anthropic", "model": "claude-opus-5", "field": "signature", "data": "EqQBCkYI"})]


@pytest.mark.parametrize("text,record", ENVELOPES, ids=["E6", "E15", "E14"])
def test_envelopes_of_the_worked_examples(text, record):
    assert a.open_envelope(text) == record and a.seal_envelope(record) == text


@pytest.mark.parametrize("text", ["aic1.", "aic1.!!", "aic2.eyJvIjoi", "aic1.W10", "aic1.eyJvIjoxLCJmIjoyfQ", "aic1.eyJ"])
def test_damaged_envelopes_are_foreign(text):
    assert a.open_envelope(text)["family"] == "?" and "data" not in a.open_envelope(text)
    assert a.read_seal(text, "anthropic", "signature")["family"] == "?"


@given(st.text(), st.text(), st.text(), st.one_of(st.none(), st.text(), st.lists(st.dictionaries(st.text(), st.text()))))
def test_envelope_round_trip(family, model, field, data):
    record = {"family": family, "model": model, "field": field, **({} if data is None else {"data": data})}
    packed = a.seal_envelope(record)
    assert set(packed) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-.")
    if not any(0xd800 <= ord(letter) <= 0xdfff for letter in repr(record)):
        assert a.open_envelope(packed) == record


REPLAY = [
    ("m110 own", NEW_CLAUDE, think("t", family="anthropic", field="signature", data="Eq"), [think("t", family="anthropic", field="signature", data="Eq")]),
    ("m109 foreign", NEW_CLAUDE, think("t", family="openai", field="encrypted", data="gA"), []),
    ("m109 provenance", NEW_CLAUDE, think("t", family="cerebras", field="reasoning"), []),
    ("m111 own, text hidden", NEW_CLAUDE, think("", family="anthropic", field="signature", data="Eq"), [think("", family="anthropic", field="signature", data="Eq")]),
    ("m85 groq", GROQ, think("t", family="groq", field="reasoning"), []),
    ("m86 cerebras", a.profile_for("cerebras", "gpt-oss-120b"), think("t", family="cerebras", field="reasoning"), [think("t")]),
    ("m87 deepseek", DEEPSEEK, think("t", family="deepseek", field="reasoning_content"), [think("t")]),
    ("openai own", OPENAI, think("t", family="openai", field="encrypted", data="gA"), [think("t", family="openai", field="encrypted", data="gA")]),
    ("tag", a.profile_for("minimax", "m2"), think("t"), [a.text_part("<think>t</think>")]),
    ("default", PLAIN, think("t"), []),
]


@pytest.mark.parametrize("profile,part,wanted", [row[1:] for row in REPLAY], ids=[row[0] for row in REPLAY])
def test_thinking_goes_back_only_where_it_is_wanted(profile, part, wanted):
    turns = a.replay_thinking([user("x"), bot(part, call()), user(result())], profile)
    assert [part for part in turns[1]["parts"] if part["type"] != "call"] == wanted


def test_openrouter_gets_details_of_the_vendor_it_calls():
    part = {"type": "think", "text": "Look.", "seal": {"family": "openrouter", "model": "", "field": "reasoning_details",
            "data": [{"type": "reasoning.text", "signature": "Eq", "format": "anthropic-claude-v1", "index": 0}]}}
    claude, gpt = a.profile_for("openrouter", "anthropic/claude-haiku-4.5"), a.profile_for("openrouter", "openai/gpt-5")
    assert a.replay_thinking([bot(part)], claude)[0]["parts"][0]["details"] == [
        {"type": "reasoning.text", "signature": "Eq", "format": "anthropic-claude-v1", "index": 0, "text": "Look."}]
    assert a.replay_thinking([bot(part)], gpt)[0]["parts"] == []


def test_details_of_the_worked_examples():
    assert a.details_of({"family": "anthropic", "model": "m", "field": "signature", "data": "EqQBCkYI"}) == [
        {"type": "reasoning.text", "format": "anthropic-claude-v1", "index": 0, "text": "", "signature": "EqQBCkYI"}]
    assert a.details_of({"family": "openai", "model": "m", "field": "encrypted", "data": "gAAAAABo", "id": "rs_1"}) == [
        {"type": "reasoning.encrypted", "format": "openai-responses-v1", "index": 0, "id": "rs_1", "data": "gAAAAABo"}]
    assert a.read_details([{"type": "reasoning.text", "format": "anthropic-claude-v1", "text": "a", "signature": "Eq"}]) == [
        {"type": "think", "text": "a", "seal": {"family": "anthropic", "model": "", "field": "signature", "data": "Eq"}}]


def test_memo_repairs_what_a_client_lost():
    memo = a.Memo(2)
    answer = [think("plan", family="deepseek", field="reasoning_content"), call("call_000001", note={"family": "gemini", "data": {"google": {"thought_signature": "S"}}})]
    a.remember(memo, answer)
    lost = hub(user("x"), bot(call("call_000001")), user(result("call_000001")))
    assert a.recall(lost, memo)["turns"][1]["parts"] == answer
    for number in range(3):
        memo.put(f"k{number}", {})
    assert len(memo) == 2 and a.recall(lost, memo) is lost


def test_m84_gemini_gets_its_signature_or_the_documented_stand_in():
    noted = a.prepare(hub(user("x"), bot(call(note={"family": "gemini", "data": {"google": {"thought_signature": "S"}}})), user(result())), GEMINI3)
    lost = a.prepare(hub(user("x"), bot(call("call_A12345"), call("call_B12345")), user(result(), result("call_B12345"))), GEMINI3)
    assert noted["turns"][1]["parts"][0]["note"]["data"] == {"google": {"thought_signature": "S"}}
    assert [("note" in part) for part in lost["turns"][1]["parts"]] == [True, False]
    assert "note" not in a.prepare(hub(user("x"), bot(call(note={"family": "gemini", "data": {}})), user(result())), GPT4)["turns"][1]["parts"][0]


def test_deepseek_without_its_thinking_goes_on_without_thinking():
    lost = a.prepare(hub(user("x"), bot(call()), user(result()), think={"mode": "on", "effort": "high"}), DEEPSEEK)
    assert a.think_fields(lost.get("think"), DEEPSEEK) == {"thinking": {"type": "disabled"}}


def test_m105_billing_block_is_for_anthropic_only():
    system = [a.text_part("x-anthropic-billing-header: cc_version=1"), a.text_part("Say x-anthropic-billing-header: please.")]
    assert a.prepare(hub(system=system), GPT4)["system"] == system[1:]
    assert a.prepare(hub(client="messages", system=system), NEW_CLAUDE)["system"] == system


@pytest.mark.parametrize("profile,client,role", [(GPT4, "messages", "user"), (OPENAI, "chat", "system"), (NEW_CLAUDE, "messages", "system"), (NEW_CLAUDE, "chat", "user")])
def test_m106_late_system_text_stays_in_place(profile, client, role):
    ready = a.prepare(hub(user("a"), {"role": "system", "parts": [a.text_part("rule")]}, bot("b"), user("c"), client=client), profile)
    texts = [(turn["role"], part["text"]) for turn in ready["turns"] for part in turn["parts"]]
    assert texts[1] == ((role, "rule") if role == "system" else ("user", "<system-reminder>\nrule\n</system-reminder>"))
    assert "system" not in ready


def test_prefill_for_models_that_refuse_it():
    ready = a.prepare(hub(user("x"), bot("The ")), NEW_CLAUDE)
    assert ready["turns"][-1] == user("Continue.") and ready["dropped"] == ["prefill"]
    assert a.prepare(hub(user("x"), bot("The ")), ANTHROPIC)["turns"][-1] == bot("The")


def test_conversation_that_begins_with_the_assistant():
    assert a.prepare(hub(bot("x"), user("y")), ANTHROPIC)["turns"][0] == user("(conversation continues)")
    assert a.prepare(hub(bot("x"), user("y")), GPT4)["turns"][0] == bot("x")


def test_no_turns():
    with pytest.raises(a.GatewayError) as caught:
        a.prepare({**hub(), "turns": []}, GPT4)
    assert caught.value.status == 400 and caught.value.message == "messages: at least one message is required"


def test_m73_images_of_results_follow_the_last_result():
    image = {"type": "image", "url": "https://e.x/i.png"}
    turns = [user("x"), bot(call("call_A12345"), call("call_B12345")), user(a.result_part("call_A12345", [a.text_part("one"), image]), a.result_part("call_B12345", [image]), "go")]
    parts = a.prepare(hub(*turns), GPT4)["turns"][2]["parts"]
    assert [part["type"] for part in parts] == ["result", "result", "text", "text", "image", "text", "image", "text"]
    assert [[inner["text"] for inner in part["parts"]] for part in parts[:2]] == [["one", "[image 1]"], ["[image 2]"]]
    assert [part.get("text") for part in parts[2:]] == ["Images returned by tools:", "[image 1]", None, "[image 2]", None, "go"]
    assert a.prepare(hub(*turns), ANTHROPIC)["turns"][2]["parts"][0]["parts"][1] == image


def test_tool_errors_without_a_flag_are_marked_once():
    turns = [user("x"), bot(call()), user(result("call_A12345", "no such file", error=True))]
    ready = a.prepare(hub(*turns), GPT4)
    assert ready["turns"][2]["parts"][0]["parts"][0]["text"] == "[tool error] no such file"
    assert a.prepare(hub(*turns), ANTHROPIC)["turns"][2]["parts"][0]["error"] is True


MEDIA = [("audio", {"type": "audio", "data": "x", "format": "wav"}, ANTHROPIC, "audio input is not supported by this provider"),
         ("file id", {"type": "image", "file_id": "f"}, GPT4, "image file ids cannot be sent to this provider"),
         ("bmp", {"type": "image", "data": "x", "mime": "image/bmp"}, ANTHROPIC, "image type image/bmp is not supported"),
         ("pdf url", {"type": "file", "url": "https://e.x/a.pdf"}, GPT4, "file URLs cannot be sent to this provider")]


@pytest.mark.parametrize("part,profile,message", [row[1:] for row in MEDIA], ids=[row[0] for row in MEDIA])
def test_parts_no_route_takes(part, profile, message):
    with pytest.raises(a.UpstreamFailure) as caught:
        a.prepare(hub(user("x", part)), profile)
    assert (caught.value.kind, caught.value.status, caught.value.detail) == ("fit", 400, message)


def test_documents_become_text():
    ready = a.prepare(hub(user({"type": "file", "text": "body", "title": "T"})), GPT4)
    assert ready["turns"][0]["parts"] == [a.text_part('<document title="T">\nbody\n</document>')]


@pytest.mark.parametrize("url,wanted", [("data:image/png;base64,iV BO\n", ("image/png", "iVBO")), ("data:text/plain,a%20b", ("text/plain", "YSBi")),
                                        ("data:;base64,iVBORw0KGgo=", ("image/png", "iVBORw0KGgo="))])
def test_data_urls(url, wanted):
    assert a.read_data_url(url) == wanted


@pytest.mark.parametrize("url", ["data:image/png", "http://x,y", "data:;base64,QUJD"])
def test_bad_data_urls(url):
    with pytest.raises(a.GatewayError):
        a.read_data_url(url)


@pytest.mark.parametrize("raw,wanted", [(rb'{"a": "x\ud800y"}', {"a": "x\ufffdy"}), (rb'{"\uDC00": ["\ud83d\ude42", "\uD83D"]}', {"\ufffd": ["\U0001f642", "\ufffd"]}),
                                        (rb'{"a": "\\ud800"}', {"a": "\\ud800"})])
def test_m92_lone_surrogates(raw, wanted):
    assert a.parse_body(raw) == wanted


NAMES = [("search", "mcp__docs", "mcp__docs__search"), ("search", "mcp__", "mcp__search"), ("exec", "functions", "exec"), ("a.b c", "", "a_b_c"), ("x" * 80, "", None)]


@pytest.mark.parametrize("name,namespace,wanted", NAMES)
def test_m88_m89_m48_names_go_out_flat_and_come_back_whole(name, namespace, wanted):
    tool = {"name": name, "kind": "function", **({"namespace": namespace} if namespace else {})}
    names = a.name_map(hub(tools=[tool]), GPT4)
    wire = names.wire(name, namespace)
    assert len(wire) <= 64 and wire == (wanted or wire) and names.back(wire) == (name, namespace, "function")
    ready = a.prepare(hub(user("x"), bot(call(name=name, **({"namespace": namespace} if namespace else {}))), user(result()), tools=[tool]), GPT4)
    assert ready["turns"][1]["parts"][0]["name"] == wire == ready["tools"][0]["wire"]


def test_m46_m47_freeform_tools_become_functions():
    tool = {"name": "apply_patch", "description": "Edit files.", "kind": "custom", "grammar": {"syntax": "lark", "definition": "start: x"}}
    made = a.prepare(hub(client="responses", tools=[tool]), GROQ)["tools"][0]
    assert made["description"] == 'Edit files.\nThe whole text goes in "input".\nIt must match this lark grammar:\nstart: x'
    assert made["schema"] == {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"], "additionalProperties": False}
    assert a.name_map(hub(tools=[tool]), GROQ).back("apply_patch") == ("apply_patch", "", "custom")
    assert a.prepare(hub(client="responses", tools=[tool]), OPENAI)["tools"][0]["kind"] == "custom"


@pytest.mark.parametrize("args,text", [('{"input":"p"}', "p"), ('{"patch":"p"}', "p"), ('{"a":"x","b":"y"}', '{"a":"x","b":"y"}'), ("raw", "raw"), ('"s"', "s")])
def test_freeform_text(args, text):
    assert a.freeform_text(args) == text
    assert a.freeform_text(a.freeform_args(text)) == text


SCHEMAS = [("m82", None, {"type": "object", "properties": {}}), ("m82 empty", {}, {"type": "object", "properties": {}}),
           ("no type", {"properties": {"a": {}}}, {"type": "object", "properties": {"a": {}}}), ("dialect", {"$schema": "x", "type": "object", "properties": {}}, {"type": "object", "properties": {}})]


@pytest.mark.parametrize("schema,wanted", [row[1:] for row in SCHEMAS], ids=[row[0] for row in SCHEMAS])
def test_schemas(schema, wanted):
    assert a.clean_schema(schema, PLAIN) == wanted


GEMINI = [
    ("ref", {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "string", "default": "x"}}}, {"type": "object", "properties": {"a": {"type": "string"}}}),
    ("cycle", {"$ref": "#/$defs/A", "$defs": {"A": {"type": "object", "properties": {"n": {"$ref": "#/$defs/A"}}}}}, {"type": "object", "properties": {"n": {"type": "object", "properties": {}}}}),
    ("const", {"const": "v"}, {"enum": ["v"], "type": "string"}),
    ("enum of numbers", {"type": "integer", "enum": [1, 2]}, {"type": "integer"}),
    ("nullable", {"type": ["string", "null"]}, {"type": "string", "nullable": True}),
    ("two types", {"type": ["string", "integer"]}, {"anyOf": [{"type": "string"}, {"type": "integer"}]}),
    ("oneOf", {"oneOf": [{"type": "string"}, {"type": "integer"}]}, {"anyOf": [{"type": "string"}, {"type": "integer"}]}),
    ("anyOf null", {"anyOf": [{"type": "string"}, {"type": "null"}]}, {"type": "string", "nullable": True}),
    ("allOf", {"allOf": [{"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}, {"type": "object", "properties": {"b": {"type": "string"}}}]},
     {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "string"}}, "required": ["a"]}),
    ("m83", {"type": "number", "exclusiveMinimum": 0, "multipleOf": 2, "$comment": "x"}, {"type": "number", "minimum": 0}),
    ("array", {"type": "array"}, {"type": "array", "items": {"type": "string"}}),
    ("tuple", {"type": "array", "prefixItems": [{"type": "integer"}]}, {"type": "array", "items": {"type": "integer"}}),
    ("required", {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a", "z"]}, {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}),
    ("format", {"type": "string", "format": "uri"}, {"type": "string"}),
    ("closed", {"type": "object", "additionalProperties": False}, {"type": "object", "properties": {}}),
]


@pytest.mark.parametrize("schema,wanted", [row[1:] for row in GEMINI], ids=[row[0] for row in GEMINI])
def test_gemini_schemas(schema, wanted):
    before = copy.deepcopy(schema)
    made = a.gemini_schema(schema)
    assert {**made} == wanted or made == wanted
    assert a.gemini_schema(made) == made and schema == before


CHOICES = [
    ("m75", PLAIN, [], {"mode": "any"}, None), ("m76", PLAIN, ["f"], {"mode": "none"}, {"mode": "none"}), ("any", PLAIN, ["f"], {"mode": "any"}, {"mode": "any"}),
    ("kimi", KIMI, ["f"], {"mode": "any"}, {"mode": "auto"}), ("tool", PLAIN, ["f"], {"mode": "tool", "name": "f"}, {"mode": "tool", "name": "f"}),
    ("allowed filters", PLAIN, ["f", "g"], {"mode": "auto", "allowed": ["g"]}, {"mode": "auto"}), ("allowed kept", GPT4, ["f", "g"], {"mode": "auto", "allowed": ["g"]}, {"mode": "auto", "allowed": ["g"]}),
]


@pytest.mark.parametrize("profile,tools,choice,wanted", [row[1:] for row in CHOICES], ids=[row[0] for row in CHOICES])
def test_tool_choice(profile, tools, choice, wanted):
    ready = a.prepare(hub(tools=[{"name": name, "kind": "function"} for name in tools], choice=choice, parallel=False), profile)
    assert ready.get("choice") == wanted
    assert ("parallel" in ready) == bool(tools and wanted["mode"] != "none")


def test_m79_a_forced_tool_that_cannot_be_offered():
    search = {"name": "web_search", "kind": "hosted", "family": "openai", "raw": {"type": "web_search"}}
    with pytest.raises(a.UpstreamFailure) as caught:
        a.prepare(hub(client="responses", tools=[search], choice={"mode": "tool", "name": "web_search", "kind": "hosted"}), GROQ)
    assert caught.value.detail == 'the forced tool "web_search" cannot be offered by this provider'
    assert a.prepare(hub(client="responses", tools=[search, {"name": "f", "kind": "function"}]), GROQ)["dropped"] == ["tools.web_search"]
    assert a.prepare(hub(client="responses", tools=[search]), NEW_CLAUDE)["tools"][0]["raw"]["type"] == "web_search_20250305"


def test_m91_calls_without_tools_get_stubs_for_anthropic():
    ready = a.prepare(hub(user("x"), bot(call()), user(result())), ANTHROPIC)
    assert [tool["name"] for tool in ready["tools"]] == ["f"] and ready["choice"] == {"mode": "none"}
    assert "tools" not in a.prepare(hub(user("x"), bot(call()), user(result())), GPT4)


def test_m90_deferred_tools_are_kept_without_the_mark():
    assert "defer" not in a.prepare(hub(client="messages", tools=[{"name": "f", "kind": "function", "defer": True}]), GPT4)["tools"][0]


def test_client_run_tools_of_anthropic_become_functions():
    tool = {"name": "bash", "kind": "hosted", "family": "anthropic", "raw": {"type": "bash_20250124", "name": "bash"}}
    made = a.prepare(hub(client="messages", tools=[tool]), GPT4)["tools"][0]
    assert made["kind"] == "function" and list(made["schema"]["properties"]) == ["command", "restart"]


THINK = [
    ("m99 effort alone", NEW_CLAUDE, {"effort": "high"}, {"effort": "high"}),
    ("m100 effort", NEW_CLAUDE, {"mode": "on", "effort": "high"}, {"form": "adaptive", "effort": "high"}),
    ("m101 budget 500", ANTHROPIC, {"mode": "on", "budget": 500}, {"form": "enabled", "budget": 1024}),
    ("enabled from effort", ANTHROPIC, {"mode": "on", "effort": "low"}, {"form": "enabled", "budget": 2048}),
    ("off", ANTHROPIC, {"mode": "off"}, {"form": "disabled"}),
    ("display", NEW_CLAUDE, {"mode": "auto", "show": "omitted"}, {"form": "adaptive", "display": "omitted"}),
    ("budget to effort", GROQ, {"mode": "on", "budget": 8192}, {"mode": "on", "effort": "medium"}),
    ("down", GROQ, {"mode": "on", "effort": "max"}, {"mode": "on", "effort": "high"}),
    ("up only when nothing is lower", GROQ, {"mode": "on", "effort": "minimal"}, {"mode": "on", "effort": "low"}),
    ("auto implies no effort", GPT4, {"mode": "auto"}, {"mode": "auto"}),
]


@pytest.mark.parametrize("profile,asked,wanted", [row[1:] for row in THINK], ids=[row[0] for row in THINK])
def test_thinking(profile, asked, wanted):
    assert a.prepare(hub(client="messages", think=asked, max_out=32000), profile)["think"] == wanted


def test_m101_no_room_for_thinking():
    assert a.prepare(hub(think={"mode": "on", "budget": 5000}, max_out=1000), ANTHROPIC)["think"] == {"form": "disabled"}


def test_m102_thinking_off_and_effort():
    ready = a.prepare(hub(think={"mode": "off", "effort": "high"}), DEEPSEEK)
    assert a.think_fields(ready["think"], DEEPSEEK) == {"thinking": {"type": "disabled"}}


@pytest.mark.parametrize("effort", ["minimal", "low", "medium", "high"])
def test_budgets_and_efforts_round_trip(effort):
    assert a.effort_of(a.budget_of(effort)) in (effort, "low")


SAMPLING = [
    ("m103", ANTHROPIC, {"temperature": 1.7}, {"temperature": 1}, ["temperature"]),
    ("m104", ANTHROPIC, {"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5}, ["top_p"]),
    ("new claude", NEW_CLAUDE, {"temperature": 0.5, "top_k": 5}, None, ["temperature", "top_k"]),
    ("penalty 0", ANTHROPIC, {"presence_penalty": 0}, None, []),
    ("penalty", ANTHROPIC, {"presence_penalty": 1, "seed": 0}, None, ["presence_penalty", "seed"]),
    ("top_k", GPT4, {"top_k": 5, "seed": 3}, {"seed": 3}, ["top_k"]),
]


@pytest.mark.parametrize("profile,given_values,wanted,dropped", [row[1:] for row in SAMPLING], ids=[row[0] for row in SAMPLING])
def test_sampling(profile, given_values, wanted, dropped):
    ready = a.prepare(hub(sampling=given_values), profile)
    assert ready.get("sampling") == wanted and ready["dropped"] == dropped


def test_output_limits():
    assert a.prepare(hub(), ANTHROPIC)["max_out"] == 32000
    assert a.prepare(hub(max_out=1), OPENAI)["max_out"] == 16
    assert "max_out" not in a.prepare(hub(), GPT4)


def test_stop_strings():
    assert a.prepare(hub(stop=["a", "b", "c", "d", "e"]), GPT4)["stop"] == ["a", "b", "c", "d"]
    assert a.prepare(hub(stop=["a", " "]), ANTHROPIC)["stop"] == ["a"]
    assert a.prepare(hub(stop=["a"]), OPENAI)["dropped"] == ["stop"]
    assert a.read_stop(None) == [] and a.read_stop("x") == ["x"] and a.read_stop(["", "y"]) == ["y"]


def test_structured_output():
    asked = {"kind": "schema", "schema": {"type": "object", "properties": {"a": {"type": "string"}}}}
    assert a.prepare(hub(format=asked), NEW_CLAUDE)["format"]["schema"]["additionalProperties"] is False
    assert a.prepare(hub(format=asked), GPT4)["format"]["name"] == "output"
    weak = a.prepare(hub(format=asked), DEEPSEEK)
    assert weak["format"] == {"kind": "json"} and weak["dropped"] == ["json_schema"] and "JSON" in weak["system"][-1]["text"]
    spoken = a.prepare(hub(format={"kind": "json"}), ANTHROPIC)
    assert "format" not in spoken and spoken["dropped"] == ["response_format"] and spoken["system"][0]["text"].startswith("Answer with a single JSON")


def test_cache_marks():
    mark = {"type": "ephemeral"}
    request = hub(user(a.text_part("a", mark)), bot("b"), user(a.text_part("c", mark)), client="messages", system=[a.text_part("s", mark), a.text_part("t", mark)],
                  tools=[{"name": "f", "kind": "function", "cache": mark}])
    ready = a.prepare(request, ANTHROPIC)
    assert "cache" not in ready["tools"][0] and all("cache" in part for part in [*ready["system"], ready["turns"][0]["parts"][0], ready["turns"][2]["parts"][0]])
    assert "cache" not in json.dumps({**a.prepare(request, GPT4), "prepared": None, "extra": None, "meta": None})
    assert a.prepare(hub(), ANTHROPIC)["meta"]["cache_auto"] == mark


def test_m108_account_ids_stay_here():
    user_id = json.dumps({"device_id": "d", "account_uuid": "a", "session_id": "s-1"})
    meta = a.prepare(hub(client="messages", meta={"user": user_id}), OPENAI)["meta"]
    assert "user" not in meta and meta["cache_key"] == "s-1"
    assert a.session_of("user_ab_account_cd_session_12345678-9") == "12345678-9"
    assert a.user_id("me@example.org") != "me@example.org" and len(a.user_id("x" * 99)) == 64 and a.user_id("u1") == "u1"
    assert a.prepare(hub(client="messages", meta={"user": user_id}), NEW_CLAUDE)["meta"]["user"] == user_id


def test_n_above_one_needs_chat():
    with pytest.raises(a.UpstreamFailure):
        a.prepare(hub(meta={"n": 2}), ANTHROPIC)
    assert a.prepare(hub(meta={"n": 2}), GPT4)["meta"]["n"] == 2


def test_unknown_fields_are_named_unless_they_say_nothing():
    ready = a.prepare(hub(client="chat", extra={"chat": {"foo": 1, "bar": None, "baz": [], "store": True, "metadata": {"a": 1}}}), ANTHROPIC)
    assert ready["dropped"] == ["foo", "store"] and ready["extra"] == {}
    assert a.prepare(hub(extra={"chat": {"foo": 1}}), GPT4)["extra"] == {"chat": {"foo": 1}}


STOPS = [("chat", "stop", "end"), ("chat", "eos", "end"), ("chat", "", None), ("chat", None, None), ("chat", "brandnew", "end"), ("chat", "content_filter", "filter"),
         ("chat", "insufficient_system_resource", "error"), ("messages", "pause_turn", "pause"), ("messages", "model_context_window_exceeded", "context"), ("responses", "max_output_tokens", "length")]


@pytest.mark.parametrize("format,word,reason", STOPS)
def test_stop_words(format, word, reason):
    assert a.read_stop_reason(format, word) == reason


@pytest.mark.parametrize("reason,calls,wanted", [("end", 1, "tool"), ("tool", 0, "end"), ("length", 2, "length"), ("end", 0, "end")])
def test_m8_m9_stop_corrections(reason, calls, wanted):
    assert a.correct_stop(reason, calls) == wanted


@pytest.mark.parametrize("table", a.WRITE_STOPS.values(), ids=a.WRITE_STOPS)
def test_every_reason_has_its_word(table):
    assert set(table) == set("end length tool sequence filter refusal pause context".split())


USAGE = [
    ("m28", "chat", {"prompt_tokens": 120, "completion_tokens": 18, "prompt_tokens_details": {"cached_tokens": 100}}, {"input": 120, "cached": 100, "output": 18}),
    ("m62", "messages", {"input_tokens": 12, "cache_read_input_tokens": 100, "cache_creation_input_tokens": 8, "output_tokens": 1}, {"input": 120, "cached": 100, "cache_write": 8, "output": 1}),
    ("m119", "chat", {"prompt_tokens": 12, "completion_tokens": 1, "total_tokens": 303, "completion_tokens_details": {"reasoning_tokens": 290}}, {"input": 12, "output": 291, "reasoning": 290}),
    ("deepseek", "chat", {"prompt_tokens": "9", "completion_tokens": 2.0, "prompt_cache_hit_tokens": 4}, {"input": 9, "output": 2, "cached": 4}),
    ("strange", "responses", {"input_tokens": -3, "output_tokens": None, "input_tokens_details": None}, {"input": 0}),
]


@pytest.mark.parametrize("format,told,wanted", [row[1:] for row in USAGE], ids=[row[0] for row in USAGE])
def test_usage(format, told, wanted):
    assert a.read_usage(format, told) == wanted


OVERFLOWS = ["This model's maximum context length is 8192 tokens. However, you requested 9000 tokens", "prompt is too long: 210000 tokens > 200000 maximum",
             "Please reduce the length of the messages or completion.", "the request exceeds the available context size", "Range of input length should be [1, 2]"]


@pytest.mark.parametrize("text", OVERFLOWS)
def test_overflow_words(text):
    assert a.tells_overflow(text)


def test_m115_overflow_in_the_clients_words():
    assert a.overflow_numbers(OVERFLOWS[0]) == (9000, 8192) and a.overflow_numbers(OVERFLOWS[1]) == (210000, 200000)
    assert a.overflow_message("messages", 210000, 200000) == "prompt is too long: 210000 tokens > 200000 maximum"
    assert a.overflow_message("messages", 9, None) == "prompt is too long: 9 tokens > 8 maximum"
    assert a.overflow_message("messages", 190000, 200000, 32000).startswith("input length and `max_tokens` exceed context limit: 190000 + 32000 > 200000")
    assert not a.tells_overflow("Request too large for model: tokens per minute (TPM): Limit 8000, Requested 9000, please reduce the length of the messages")


ERRORS = [
    ("m117", [{"error": {"code": 400, "message": "bad", "status": "INVALID_ARGUMENT"}}], (400, "bad")),
    ("ollama", {"error": "no model", "status_code": 404}, (404, "no model")),
    ("E10", {"code": 502, "message": "Provider disconnected"}, (502, "Provider disconnected")),
    ("mistral 422", {"detail": [{"loc": ["a"], "msg": "nope"}], "status": 422}, (422, "nope")),
    ("m13 overloaded", {"type": "overloaded_error", "message": "Overloaded"}, (503, "Overloaded")),
    ("E17", {"code": "rate_limit_exceeded", "message": "slow"}, (429, "slow")),
    ("nothing", None, (502, "The provider reported an error.")),
]


@pytest.mark.parametrize("body,wanted", [row[1:] for row in ERRORS], ids=[row[0] for row in ERRORS])
def test_error_shapes(body, wanted):
    delta = a.read_error(body)
    assert (delta["status"], delta["message"]) == wanted
    assert delta["code"] is None or isinstance(delta["code"], str)


GROQ_FAILED = [('{"name":"read","arguments":{"p":1}}', ("read", '{"p":1}')), ('[{"name":"read","arguments":"{\\"p\\":1}"}]', ("read", '{"p":1}')), ('<function=read>{"p":1}</function>', ("read", '{"p":1}')),
               ('<function=read={"p":1}</function>', ("read", '{"p":1}')), ('<tool_call>{"name":"read","arguments":{}}</tool_call>', ("read", "{}")),
               ('{"name":"gone","arguments":{}}', None), ("I think", None), (None, None), ('{"name":"read","arguments":"{"}', None)]


@pytest.mark.parametrize("text,wanted", GROQ_FAILED)
def test_m40_failed_generation(text, wanted):
    assert a.recover_call(text, {"read"}) == wanted


def drive(script, **source):
    out = a.Serialiser(a.Source(**source))
    for method, *args in script:
        getattr(out, method)(*args)
    return out.close(ended=True)


def short(deltas):
    return [(delta["delta"], delta.get("text", delta.get("name", delta.get("reason", "")))) for delta in deltas]


SERIAL = [
    ("E3 m18", [("call", 0, "call_AAAAAA", "f"), ("args", 0, '{"a"'), ("call", 1, "call_BBBBBB", "g"), ("args", 1, '{"b"'), ("args", 1, ":2}"), ("args", 0, ":1}"), ("finish", "tool")],
     [("call", "f"), ("args", '{"a"'), ("args", ":1}"), ("call", "g"), ("args", '{"b"'), ("args", ":2}"), ("stop", "tool")]),
    ("E4 m21", [("call", 0, "call_CCCCCC", "now"), ("finish", "end")], [("call", "now"), ("stop", "tool")]),
    ("m6", [("text", "x"), ("call", 0, "call_CCCCCC", "f"), ("args", 0, "{}"), ("finish", "tool")], [("text", "x"), ("call", "f"), ("args", "{}"), ("stop", "tool")]),
    ("text after a whole call", [("call", 0, "call_CCCCCC", "f"), ("args", 0, "{}"), ("text", "y"), ("finish", "tool")], [("call", "f"), ("args", "{}"), ("text", "y"), ("stop", "tool")]),
    ("text waits", [("call", 0, "call_CCCCCC", "f"), ("args", 0, "{"), ("text", "y"), ("args", 0, "}"), ("finish", "tool")],
     [("call", "f"), ("args", "{"), ("args", "}"), ("text", "y"), ("stop", "tool")]),
    ("name later", [("call", 0, "call_CCCCCC"), ("args", 0, "{}"), ("text", "y"), ("call", 0, "", "f"), ("finish", "tool")], [("call", "f"), ("args", "{}"), ("text", "y"), ("stop", "tool")]),
    ("never a name", [("call", 0, "call_CCCCCC"), ("args", 0, "{}"), ("text", "y"), ("finish", "tool")], [("text", "y"), ("stop", "end")]),
    ("thinking is sealed", [("think", "a", "reasoning"), ("think", "b", "reasoning"), ("text", "x"), ("finish", "end")], [("think", "a"), ("think", "b"), ("seal", ""), ("text", "x"), ("stop", "end")]),
    ("blank thinking", [("think", "\n", "reasoning"), ("text", "x"), ("finish", "end")], [("text", "x"), ("stop", "end")]),
    ("m31", [("text", "x")], [("text", "x"), ("stop", "end")]),
    ("usage", [("usage", {"input": 1}), ("text", "x"), ("finish", "length"), ("usage", {"output": 2})], [("text", "x"), ("usage", ""), ("stop", "length")]),
    ("m41", [("text", "x"), ("finish", "length"), ("finish", "end"), ("fail", a.error_delta(400, "late"))], [("text", "x"), ("stop", "length")]),
    ("m32", [], [("error", "")]),
    ("fail", [("text", "x"), ("call", 0, "call_CCCCCC", "f"), ("call", 1, "call_DDDDDD", "g"), ("fail", a.error_delta(502, "x"))], [("text", "x"), ("call", "f"), ("error", "")]),
    ("end_call", [("call", 0, "call_CCCCCC", "f"), ("end_call", 0), ("text", "z"), ("finish", "end")], [("call", "f"), ("text", "z"), ("stop", "tool")]),
]


@pytest.mark.parametrize("script,wanted", [row[1:] for row in SERIAL], ids=[row[0] for row in SERIAL])
def test_serialiser(script, wanted):
    deltas = drive(script)
    assert short(deltas) == wanted and check_deltas(deltas) == []


def test_m30_m51_m61_a_cut_is_an_error():
    out = a.Serialiser(a.Source())
    out.text("x")
    assert short(out.take()) == [("text", "x")]
    assert out.close(ended=False) == [a.error_delta(502, "upstream closed the stream before finishing", "server_error")]


def test_serialiser_restores_names_and_mints_ids():
    names = a.name_map(hub(tools=[{"name": "search", "namespace": "mcp__docs", "kind": "function"}, {"name": "apply_patch", "kind": "custom"}]), GROQ)
    deltas = drive([("call", 0, "", "mcp__docs__search"), ("call", 1, "0", "apply_patch"), ("finish", "tool")], names=names, seed="s", call_prefix="toolu_")
    assert (deltas[0]["name"], deltas[0]["namespace"], deltas[0]["id"][:6]) == ("search", "mcp__docs", "toolu_")
    assert deltas[1]["kind"] == "custom" and deltas[1]["id"].startswith("0_u")


def test_seal_later_takes_the_place_of_the_provenance_seal():
    deltas = drive([("think", "a", "reasoning"), ("seal_later", {"field": "reasoning_details", "data": [1]}), ("text", "x"), ("finish", "end")], profile=a.profile_for("openrouter", "x/y"))
    assert deltas[1] == {"delta": "seal", "family": "openrouter", "model": "x/y", "field": "reasoning_details", "data": [1]}


steps = st.one_of(st.tuples(st.just("text"), st.sampled_from(["a", " ", ""])), st.tuples(st.just("think"), st.sampled_from(["t", "\n"]), st.just("reasoning")),
                  st.tuples(st.just("call"), st.integers(0, 2), st.sampled_from(["", "0", "call_XXXXXX"]), st.sampled_from(["", "f", "g"])),
                  st.tuples(st.just("args"), st.integers(0, 3), st.sampled_from(["{", "}", '{"a":1}', ""])), st.tuples(st.just("end_call"), st.integers(0, 2)),
                  st.tuples(st.just("seal"), st.just({"field": "f", "data": "d"})), st.tuples(st.just("seal_later"), st.just({"field": "f", "data": "d"})),
                  st.tuples(st.just("note"), st.integers(0, 2), st.just({"g": 1})), st.tuples(st.just("refuse"), st.just("no")), st.tuples(st.just("usage"), st.just({"input": 1})))


@settings(max_examples=500, deadline=None)
@given(st.lists(steps, max_size=14), st.sampled_from(["end", "tool", "length", None, "error"]))
def test_serialiser_keeps_the_contract_and_loses_no_text(script, reason):
    out = a.Serialiser(a.Source(seed="s"))
    deltas = []
    for method, *args in script:
        getattr(out, method)(*args)
        deltas += out.take()
    out.finish(reason)
    deltas += out.close(ended=True)
    assert check_deltas(deltas) == []
    if deltas[-1]["delta"] == "stop":
        assert "".join(delta["text"] for delta in deltas if delta["delta"] == "text") == "".join(step[1] for step in script if step[0] == "text")


@given(st.recursive(st.one_of(st.none(), st.text(max_size=6), st.integers()), lambda inner: st.dictionaries(st.text(max_size=4), inner, max_size=3) | st.lists(inner, max_size=3)).filter(
    lambda value: isinstance(value, dict)), st.data())
def test_json_scan_knows_the_end_and_only_the_end(value, data):
    text = json.dumps(value, ensure_ascii=data.draw(st.booleans()))
    scan, done = a.JsonScan(), []
    while text:
        size = data.draw(st.integers(1, len(text)))
        done.append(scan.feed(text[:size]))
        text = text[size:]
    assert done[-1] and not any(done[:-1])


TAGS = [("E8 m33", "<think>\nplan it</think>\n\nAnswer 4.", [("think", "plan it"), ("text", "Answer 4.")]), ("none", "plain <think>x</think>", [("text", "plain <think>x</think>")]),
        ("blank before", "\n <think>a</think>b", [("think", "a"), ("text", "b")]), ("quoted later", "<think>a</think>b <think>c</think>", [("think", "a"), ("text", "b <think>c</think>")]),
        ("never closed", "<think>abc</thin", [("think", "abc</thin")]), ("prefix only", "<thi", [("text", "<thi")]), ("nothing after", "<think>a</think> \n", [("think", "a")])]


def joined(pieces):
    done = []
    for kind, text in pieces:
        if done and done[-1][0] == kind:
            done[-1] = (kind, done[-1][1] + text)
        else:
            done.append((kind, text))
    return done


@pytest.mark.parametrize("text,wanted", [row[1:] for row in TAGS], ids=[row[0] for row in TAGS])
def test_tags_for_every_cut(text, wanted):
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            splitter = a.TagSplitter()
            pieces = [piece for chunk in (text[:first], text[first:second], text[second:]) for piece in splitter.feed(chunk)] + splitter.close()
            assert joined(pieces) == wanted, (first, second)


def hold(deltas, **options):
    holder = a.CallHolder(**options)
    return [delta for given_delta in deltas for delta in holder.feed(given_delta)], holder


def test_n1_a_half_made_call_never_gets_through():
    head = [a.text_delta("x"), a.call_delta("c", "f"), a.args_delta('{"a"')]
    seen, holder = hold(head)
    assert seen == head[:1] and holder.holding
    assert holder.feed(a.error_delta(502, "cut")) == [a.error_delta(502, "cut")] and not holder.holding
    seen, holder = hold([*head, a.args_delta(":1}"), a.note_delta("c", "google", {}), a.call_delta("d", "g"), a.args_delta("{}")])
    assert seen == head[:1] and holder.holding      # whole JSON, but the end of neither has come
    seen, holder = hold([*head, a.args_delta(":1}"), a.call_delta("d", "g"), a.stop_delta("tool")])
    assert seen == [*head, a.args_delta(":1}"), a.call_delta("d", "g"), a.stop_delta("tool")]
    assert hold(head, live=True)[0] == head
    assert hold([*head, a.args_delta("x" * 20)], max_bytes=10)[0][-1] == a.args_delta("x" * 20)


def test_fold():
    deltas = [a.think_delta("a"), a.seal_delta({"family": "x", "model": "m", "field": "f"}), a.text_delta("b"), a.text_delta("c"), a.cite_delta("u", "t"), a.call_delta("i", "n"), a.stop_delta("tool")]
    assert a.fold_deltas(deltas) == [{"type": "think", "text": "a", "seal": {"family": "x", "model": "m", "field": "f"}}, {"type": "text", "text": "bc", "cites": [{"url": "u", "title": "t"}]},
                                     a.call_part("i", "n", "{}")]


@pytest.mark.parametrize("preset", a.PRESETS)
@pytest.mark.parametrize("format", ["chat", "messages", "responses"])
def test_every_preset_has_a_profile_in_every_format(preset, format):
    profile = a.profile_for(preset, "some-model", format)
    assert profile.format == format and profile.family and profile.replay in ("", "native", "thinking", "reasoning_content", "reasoning", "reasoning_details", "think_tag")


def test_rejected_fields_are_named_unless_harmless():
    assert a.without_rejected({"model": "m", "store": True, "logprobs": True}, GROQ) == ({"model": "m"}, ("logprobs",))


def test_system_text_alone_is_said_by_the_user():
    ready = a.prepare({**hub(), "turns": [], "system": [a.text_part("be brief")]}, GPT4)
    assert ready["turns"] == [user("be brief")] and "system" not in ready


def test_tools_added_in_the_middle_join_the_list():
    change = {"role": "system", "parts": [{"type": "tool_change", "add": [{"name": "g", "kind": "function"}], "remove": ["f"]}]}
    ready = a.prepare(hub(user("x"), change, client="messages", tools=[{"name": "f", "kind": "function"}]), GPT4)
    assert [tool["wire"] for tool in ready["tools"]] == ["g"] and ready["dropped"] == ["mid_conv_tools"] and ready["turns"] == [user("x")]


TALK = {
    "one question": [user("a")],
    "back and forth": [user("a"), bot(a.text_part("b ")), user("c", " ", "d")],
    "begins with the assistant": [bot(a.text_part("b")), user("c")],
    "ends with the assistant": [user("a"), bot(a.text_part("b  "))],
    "two of one role": [user("a"), user("b"), bot(a.text_part("c")), user("d")],
    "nothing said": [user(" "), bot(a.text_part("b")), user("c")],
    "an empty turn": [user(), bot(a.text_part("b")), user("c")],
    "a system turn": [{"role": "system", "parts": [a.text_part("s")]}],
}


@pytest.mark.parametrize("row", TALK)
@pytest.mark.parametrize("profile", ALL)
def test_plain_talk_is_left_as_all_the_rules_would_leave_it(monkeypatch, row, profile):
    def prepared():
        try:
            return a.prepare(hub(*TALK[row]), profile)["turns"]
        except a.GatewayError as error:
            return error.message
    quick = prepared()
    monkeypatch.setattr(a, "_is_talk", lambda turns: False)
    assert quick == prepared()
