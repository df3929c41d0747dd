"""Section 3: the table of presets, held to itself and, where they are at hand, to the reference facts."""
import json
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import aicarousel

ROOT = Path(__file__).resolve().parent.parent
LIVE = {name: preset for name, preset in aicarousel.PRESETS.items() if not preset.gone}


@pytest.fixture(scope="module")
def reference():
    path = ROOT.parent / "shared" / "providers.json"
    if not path.exists():
        pytest.skip("the reference ../shared/providers.json is not on this machine; the table is checked against itself only")
    return json.loads(path.read_text(encoding="utf-8"))


def urls(preset):
    return [preset.base_url, *preset.other_urls.values()]


@pytest.mark.parametrize("name", aicarousel.PRESETS)
def test_addresses_are_https_or_this_machine_and_have_no_last_slash(name):
    for url in urls(aicarousel.PRESETS[name]):
        parts = urlsplit(url)
        assert parts.scheme == "https" or (parts.scheme == "http" and aicarousel.is_loopback(parts.hostname)), url
        assert not url.endswith("/") and not parts.query


@pytest.mark.parametrize("name", LIVE)
def test_a_row_is_whole(name):
    preset = LIVE[name]
    ids = [model.id for model in preset.models]
    assert preset.title and preset.name == name and preset.format in aicarousel.FORMAT_NAMES
    assert set(preset.other_urls) <= set(aicarousel.FORMAT_NAMES) - {preset.format}
    assert (preset.default in ids) if ids else preset.default == "" and preset.keyless
    assert len(ids) == len(set(ids))
    assert preset.key_variables or preset.keyless
    assert all(re.fullmatch(r"[A-Z][A-Z0-9_]*", variable) for variable in (*preset.key_variables, *preset.needs))
    assert preset.bucket == "machine" if preset.keyless else preset.bucket in ("account", "model")
    assert preset.first_byte_s > 0 and preset.idle_s > 0
    assert preset.check[0] in ("GET", "POST") and preset.check[1].startswith(("/", "https://"))
    assert all("{" + variable + "}" in preset.base_url for variable in preset.needs)


@pytest.mark.parametrize("name", LIVE)
def test_no_offered_model_is_retired(name):
    preset = LIVE[name]
    assert [model.id for model in preset.models if aicarousel.find_alias(model.id, preset.retired)] == []


@pytest.mark.parametrize("name", LIVE)
def test_what_is_rejected_is_never_what_a_request_is_made_of(name):
    profile = aicarousel.profile_for(name, LIVE[name].default)
    assert not {"model", "messages", "stream", "tools"} & set(profile.reject)
    assert not {"role", "content", "tool_calls", "tool_call_id"} & set(profile.message_reject)


def test_a_key_variable_belongs_to_one_provider():
    owners = [variable for preset in LIVE.values() for variable in preset.key_variables]
    assert len(owners) == len(set(owners))


def test_tokens_of_other_programs_are_not_taken_for_keys():
    taken = {variable for preset in LIVE.values() for variable in preset.key_variables}
    assert not taken & {"GITHUB_TOKEN", "ANTHROPIC_AUTH_TOKEN"}


def test_models_json_is_the_default():
    assert json.loads((ROOT / "models.json").read_text(encoding="utf-8")) == dict(aicarousel.DEFAULT_MODELS)
    assert (ROOT / "models.json").read_text(encoding="utf-8") == json.dumps(dict(aicarousel.DEFAULT_MODELS), indent=2) + "\n"


def test_env_example_names_every_variable_and_sets_none():
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    assert set(aicarousel.parse_dotenv(text).values()) == {""}
    for name, preset in LIVE.items():
        for variable in (*preset.key_variables, *preset.needs):
            assert re.search(rf"\b{variable}\b", text), f"{name}: {variable}"
    for row in aicarousel._SETTINGS:
        assert not row.variables or re.search(rf"^# {row.variables[-1]}=", text, re.MULTILINE), row


def test_every_provider_of_the_reference_that_speaks_chat_has_a_row(reference):
    speaking = {name for name, facts in reference["providers"].items() if facts["formats"].get("chat")}
    assert speaking - set(aicarousel.PRESETS) == set()
    assert set(aicarousel.PRESETS) <= set(reference["providers"])


def test_rows_say_what_the_reference_says(reference):
    #: known differences: a spelling of the same address, variables left out on purpose, one documented output limit
    same_place = {"ollama": "localhost", "deepseek": "https://api.deepseek.com"}
    for name, preset in LIVE.items():
        facts = reference["providers"][name]
        addresses = " ".join(facts["base_urls"].values())
        assert preset.base_url in addresses or same_place.get(name, "-") in addresses or preset.format == "messages", name
        assert aicarousel.profile_for(name, preset.default).completions is (facts["formats"].get("completions") is True), name
        assert set(preset.key_variables) <= {*facts["env"], "HUGGINGFACE_API_TOKEN"}, name
        for row in facts.get("models", []):
            model = next(model for model in preset.models if model.id == row["id"])
            price = row["usd_per_1m"]
            assert (model.context, model.tools, model.vision, model.reasoning) == (row["context"], row["tools"], row["vision"], row["reasoning"]), row["id"]
            assert (model.max_output == row["max_output"]) or row["id"] == "kimi-k3"
            assert (model.price.input, model.price.output, model.price.cache_read) == (price["input"], price["output"], price["cache_read"]), row["id"]


def test_default_lists_are_those_of_the_reference(reference):
    assert dict(aicarousel.DEFAULT_MODELS) == reference["default_models_json"]
    assert list(aicarousel.DEFAULT_MODELS) == list(reference["default_models_json"])
    for name, entry in reference["default_models_optional"].items():
        assert (LIVE[name].default, [model.id for model in LIVE[name].models]) == (entry["default"], entry["models"]), name


def test_firm_quirks_are_in_their_rows():
    rows, groq, mistral, openai = aicarousel.PRESETS, *(aicarousel.profile_for(name, aicarousel.PRESETS[name].default) for name in ("groq", "mistral", "openai"))
    assert {"logprobs", "logit_bias", "store"} <= set(groq.reject) and "name" in groq.message_reject
    assert mistral.max_fields == ("max_tokens",) and mistral.seed_field == "random_seed" and "stream_options" in mistral.reject
    assert openai.max_fields == ("max_completion_tokens",) and openai.developer
    assert (rows["anthropic"].auth_header, rows["anthropic"].auth_scheme, rows["anthropic"].format) == ("x-api-key", "", "messages")
    assert rows["groq"].bucket == "model" and rows["openrouter"].bucket == "account" and rows["ollama"].bucket == "machine"
    assert rows["groq"].free_limits == aicarousel.Limits(30, 1000, 8000, 200000)


def test_what_a_preset_says_of_a_models_eyes_holds_for_its_provider():
    """No provider is said to read no images in Chat while one of its models does."""
    for name, preset in aicarousel.PRESETS.items():
        for model in preset.models:
            if model.vision and preset.format == "chat":
                assert aicarousel.target_profile(name, model, "chat").images, (name, model.id)
