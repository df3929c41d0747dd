"""Section 4: models.json, variables and flags become one Config, or one complaint that says where, found, expected."""
import base64
import json
import re

import pytest

import aicarousel
from aicarousel import ConfigError, Limits, Price, find_alias, is_loopback, load_config, nearest, parse_dotenv

SECRET = "zq9-not-a-known-prefix-4711"
SEED = {"cerebras": {"default": "gpt-oss-120b", "enableFallback": True, "models": ["gpt-oss-120b", "qwen-3.8-27b"]},
        "groq": {"default": "openai/gpt-oss-120b", "enableFallback": False, "models": ["openai/gpt-oss-120b", "openai/gpt-oss-20b"]}}
LOCAL = {"baseUrl": "http://127.0.0.1:8000/v1", "default": "m", "enableFallback": True, "models": ["m"]}


def load(models=None, environment=None, dotenv=None, read_secret=None, **flags):
    text = models if models is None or isinstance(models, str) else json.dumps(models)
    return load_config(text, models_path="models.json", environment=environment or {}, dotenv=dotenv or {}, flags=flags, read_secret=read_secret)


def complaint(*args, **more):
    with pytest.raises(ConfigError) as caught:
        load(*args, **more)
    return caught.value


def one(config, name="x"):
    return next(provider for provider in config.providers if provider.name == name)


def entry(**fields):
    """A local provider x with these fields; None takes one away."""
    return {"x": {name: value for name, value in {**LOCAL, **fields}.items() if value is not None}}


# What loads.

def test_the_seeds_shape_loads_in_its_order():
    config = load(SEED, {"GROQ_API_KEY": "gsk_fake_1", "CEREBRAS_API_KEY": "csk-fake-1"})
    assert [provider.name for provider in config.active] == ["cerebras", "groq"]
    groq = one(config, "groq")
    assert (groq.default, groq.enable_fallback, [model.id for model in groq.models]) == (
        "openai/gpt-oss-120b", False, ["openai/gpt-oss-120b", "openai/gpt-oss-20b"])
    assert groq.base_url == "https://api.groq.com/openai/v1" and groq.models[0].context == 131072
    assert groq.timeouts == aicarousel.Timeouts(first_byte_s=30.0)
    assert config.carousel == aicarousel.Carousel() and config.settings == aicarousel.Settings() and config.warnings == ()


WHOLE = {
    "my-vllm": {
        "baseUrl": "http://127.0.0.1:8000/v1/", "preset": "groq", "format": "chat", "enabled": True, "default": "qwen3-coder", "enableFallback": False,
        "models": ["qwen3-coder", {"id": "big", "alias": "long", "context": 262144, "maxOutput": 32768, "vision": False, "tools": True, "reasoning": True, "audio": True, "pdf": False,
                                   "price": {"input": 0.25, "output": 1.0, "cacheRead": 0.03, "cacheWrite": 0.3},
                                   "limits": {"rpm": 30, "rpd": 1000, "tpm": 60000, "tpd": 1000000}}],
        "keys": ["env:VLLM_KEY", {"key": "env:VLLM_KEY_B", "label": "team-b", "proxy": "http://127.0.0.1:3128", "headers": {"X-Team": "b"},
                                  "models": ["*"], "excludedModels": ["*-preview"], "prefix": "teamB/", "disabled": False}],
        "headers": {"X-Title": "AICarousel"}, "proxy": "", "timeouts": {"connect": 10, "firstByte": 60.5, "idle": 60, "total": 5, "streamTotal": 7},
        "limits": {"rpm": 30}, "maxConcurrent": 8, "weight": 5,
        "rules": [{"models": "qwen*", "default": {"temperature": 0.7}, "override": {"top_p": 1}, "drop": ["logit_bias"]}]},
    "carousel": {"strategy": "fill-first", "affinity": "off", "fallback": "same-model", "maxAttempts": 3, "maxWait": 1.5, "toolStream": "live",
                 "unknownModel": "reject", "echoModel": True, "contentFallback": True, "aliases": {"fast": ["my-vllm/big", "my-vllm"], "claude-*": "aicarousel"}},
}


def test_every_optional_field_is_kept():
    config = load(WHOLE, {"VLLM_KEY": "key-one", "VLLM_KEY_B": "key-two"})
    provider = one(config, "my-vllm")
    big = provider.models[1]
    assert provider.base_url == "http://127.0.0.1:8000/v1" and provider.preset is aicarousel.PRESETS["groq"]
    assert (big.alias, big.context, big.max_output, big.vision, big.tools, big.reasoning, big.audio, big.pdf) == ("long", 262144, 32768, False, True, True, True, False)
    assert big.price == Price(0.25, 1.0, 0.03, 0.3) and big.limits == Limits(30, 1000, 60000, 1000000)
    first, second = provider.credentials
    assert (first.id, first.secret, first.source, first.proxy) == ("my-vllm/1", "key-one", "env:VLLM_KEY", None)
    assert (second.id, second.label, second.proxy, second.headers) == ("my-vllm/2", "team-b", "http://127.0.0.1:3128", (("X-Team", "b"),))
    assert (second.models, second.excluded_models, second.prefix) == (("*",), ("*-preview",), "teamB/")
    assert provider.headers == (("X-Title", "AICarousel"),) and provider.proxy == "" and provider.max_concurrent == 8 and provider.weight == 5
    assert provider.timeouts == aicarousel.Timeouts(10, 60.5, 60, 5, 7) and provider.limits == Limits(rpm=30)
    assert provider.rules == (aicarousel.PayloadRule("qwen*", {"temperature": 0.7}, {"top_p": 1}, ("logit_bias",)),)
    assert config.carousel == aicarousel.Carousel("fill-first", "off", "same-model", 3, 1.5, "live", "reject", True,
                                                  {"fast": ("my-vllm/big", "my-vllm"), "claude-*": ("aicarousel",)}, True)
    assert config.secrets == {"key-one", "key-two"}
    assert config.origins["my-vllm.timeouts"] == "models.json my-vllm.timeouts" and config.origins["carousel.strategy"] == "models.json carousel.strategy"


def test_a_listed_model_takes_what_the_preset_knows_but_not_the_limits_of_free_plans():
    config = load({"gemini": {"default": "gemini-3.8-flash", "enableFallback": True, "models": ["gemini-3.8-flash", {"id": "gemma-4-31b-it", "context": 5}]}})
    flash, gemma = one(config, "gemini").models
    assert flash.context == 1048576 and flash.limits is None and flash.price == Price(0.75, 3.75, 0.075, as_of=aicarousel.PRICES_AS_OF)
    assert gemma.context == 5 and gemma.tools is True


def test_every_limit_is_kept_at_both_ends_of_its_range():
    for end in ("low", "high"):
        limits = {name: aicarousel.Bounds.__dataclass_fields__[field.name].metadata[end] for name, field in aicarousel._BOUND_FIELDS.items()}
        config = load({**SEED, "carousel": {"limits": limits}})
        assert [getattr(config.carousel.limits, field.name) for field in aicarousel._BOUND_FIELDS.values()] == list(limits.values())
        assert {config.origins[f"carousel.limits.{name}"] for name in limits} == {f"models.json carousel.limits.{name}" for name in limits}
    assert load(SEED).carousel.limits == aicarousel.Bounds() and load(SEED).origins["carousel.limits.drain"] == "default"


def test_a_byte_order_mark_is_no_mistake():
    assert load("\ufeff" + json.dumps(SEED)).providers


# What is refused: models.json -> path, a part of found, a part of expected.

REFUSED = [
    ("[]", "", "a list of 0", "object"),
    ("null", "", "null", "object"),
    ("{}", "", "empty object", "at least one provider"),
    ('{"a": NaN}', "", "NaN", "ordinary JSON"),
    ('{"x": {"rules": [{"default": {"t": 1e999}}]}}', "", "beyond all measure", "ordinary JSON"),
    ("[" * 5000, "", "beyond all measure", "ordinary JSON"),
    ('{"a": 1, "a": 2}', "a", "twice", "once"),
    ('{"x": {"default": "m", "default": "n"}}', "x.default", "twice", "once"),
    ({"x": 5}, "x", "number 5", "an object"),
    ({"x": None}, "x", "null", "an object"),
    ({"Auto": LOCAL}, "Auto", "reserved", "another name"),
    ({"aicarousel": LOCAL}, "aicarousel", "reserved", "another name"),
    ({"a b": LOCAL}, '["a b"]', "cannot be", "letters, digits"),
    ({"a/b": LOCAL}, '["a/b"]', "cannot be", "letters, digits"),
    ({"": LOCAL}, '[""]', "cannot be", "letters, digits"),
    (entry(default=None), "x.default", "nothing", 'the field "default"'),
    (entry(enableFallback=None), "x.enableFallback", "nothing", 'the field "enableFallback"'),
    (entry(models=None), "x.models", "nothing", 'the field "models"'),
    (entry(default=""), "x.default", 'string ""', "not empty"),
    (entry(default="  "), "x.default", "string", "not empty"),
    (entry(default=3), "x.default", "number 3", "a string"),
    (entry(default="other"), "x.default", 'string "other"', 'a model of "models"'),
    (entry(default="M"), "x.default", 'string "M"', 'did you mean "m"?'),
    (entry(enableFallback="yes"), "x.enableFallback", 'string "yes"', "true or false"),
    (entry(enableFallback=1), "x.enableFallback", "number 1", "true or false"),
    (entry(models="m"), "x.models", "a string", "a list of at least 1"),
    (entry(models=[]), "x.models", "a list of 0", "a list of at least 1"),
    (entry(models=["m", ""]), "x.models[1]", 'string ""', "not empty"),
    (entry(models=["m", 7]), "x.models[1]", "number 7", "a string"),
    (entry(models=["m", "m"]), "x.models[1]", 'id "m"', "once"),
    (entry(models=["m", {"id": "n", "alias": "m"}]), "x.models[1]", 'alias "m"', "once"),
    (entry(models=["m", "a\nb"]), "x.models[1]", r"a\nb", "printable"),
    (entry(models=["m", "a\u0000"]), "x.models[1]", "string", "printable"),
    (entry(models=["m", {"alias": "n"}]), "x.models[1].id", "nothing", 'the field "id"'),
    (entry(models=["m", {"id": "n", "contxt": 5}]), "x.models[1].contxt", "unknown", 'did you mean "context"?'),
    (entry(models=["m", {"id": "n", "context": 0}]), "x.models[1].context", "number 0", "whole number from 1"),
    (entry(models=["m", {"id": "n", "context": "big"}]), "x.models[1].context", 'string "big"', "whole number"),
    (entry(models=["m", {"id": "n", "context": True}]), "x.models[1].context", "true", "whole number"),
    (entry(models=["m", {"id": "n", "maxOutput": 1.5}]), "x.models[1].maxOutput", "number 1.5", "whole number"),
    (entry(models=["m", {"id": "n", "vision": "no"}]), "x.models[1].vision", 'string "no"', "true or false"),
    (entry(models=["m", {"id": "n", "audio": 1}]), "x.models[1].audio", "number 1", "true or false"),
    (entry(models=["m", {"id": "n", "pdf": "no"}]), "x.models[1].pdf", 'string "no"', "true or false"),
    (entry(models=["m", {"id": "n", "price": {"input": -1}}]), "x.models[1].price.input", "number -1", "USD"),
    (entry(models=["m", {"id": "n", "price": {"inputs": 1}}]), "x.models[1].price.inputs", "unknown", 'did you mean "input"?'),
    (entry(models=["m", {"id": "n", "limits": {"rpm": 0}}]), "x.models[1].limits.rpm", "number 0", "from 1"),
    (entry(modles=["m"]), "x.modles", "unknown", 'did you mean "models"?'),
    (entry(baseurl="https://h"), "x.baseurl", "unknown", 'did you mean "baseUrl"?'),
    (entry(baseUrl=None), "x.baseUrl", "nothing", "not a built-in provider"),
    ({"x": {**LOCAL, "baseUrl": None}}, "x.baseUrl", "null", "https://host/v1"),
    ({"grok": {"default": "m", "enableFallback": True, "models": ["m"]}}, "grok.baseUrl", "nothing", 'did you mean the provider "groq"?'),
    (entry(baseUrl="ftp://h"), "x.baseUrl", "ftp", "https://host/v1"),
    (entry(baseUrl="h/v1"), "x.baseUrl", 'string "h/v1"', "https://host/v1"),
    (entry(baseUrl="https://"), "x.baseUrl", "string", "https://host/v1"),
    (entry(baseUrl="https://h:99999"), "x.baseUrl", "string", "https://host/v1"),
    (entry(baseUrl="https://h/v1#part"), "x.baseUrl", "string", "without user name, query or fragment"),
    (entry(baseUrl="https://h/a b"), "x.baseUrl", "string", "https://host/v1"),
    (entry(baseUrl="http://192.168.1.5:8000/v1"), "x.baseUrl", "http://192.168.1.5", '"allowHttp": true'),
    (entry(baseUrl="http://127.0.0.1.evil.example/v1"), "x.baseUrl", "evil", '"allowHttp": true'),
    (entry(preset="grok"), "x.preset", 'string "grok"', 'did you mean "groq"?'),
    (entry(preset="github-models"), "x", "GitHub Models", "2026-07-30"),
    ({"github-models": LOCAL}, "github-models", "GitHub Models", "2026-07-30"),
    (entry(format="openai"), "x.format", 'string "openai"', "one of: chat, responses, messages"),
    ({"groq": {"default": "m", "enableFallback": True, "models": ["m"], "format": "messages"}}, "groq.format", "GroqCloud", "one of: chat"),
    (entry(enabled=0), "x.enabled", "number 0", "true or false"),
    (entry(allowHttp="true"), "x.allowHttp", 'string "true"', "true or false"),
    (entry(keys="env:A"), "x.keys", "string", "a list"),
    (entry(keys=["A"]), "x.keys[0]", "not shown", 'write "env:X_API_KEY"'),
    (entry(keys=["env:1A"]), "x.keys[0]", "not shown", "env:NAME"),
    (entry(keys=["file:secret"]), "x.keys[0]", "not shown", "file:/path"),
    (entry(keys=["cmd: "]), "x.keys[0]", "not shown", "cmd:program"),
    (entry(keys=["keyring:groq"]), "x.keys[0]", "not shown", "keyring:service/name"),
    (entry(keys=["keyring:groq/"]), "x.keys[0]", "not shown", "keyring:service/name"),
    (entry(keys=["cmd:a\nb"]), "x.keys[0]", "not shown", "cmd:program"),
    (entry(keys=[{"label": "b"}]), "x.keys[0].key", "nothing", 'the field "key"'),
    (entry(keys=[{"key": "env:A", "lable": "b"}]), "x.keys[0].lable", "unknown", 'did you mean "label"?'),
    (entry(keys=[{"key": "env:A", "models": []}]), "x.keys[0].models", "a list of 0", "at least 1"),
    (entry(keys=[{"key": "env:A", "proxy": "socks5://h:1"}]), "x.keys[0].proxy", "not shown", "http://host:3128"),
    (entry(proxy="https://h:1"), "x.proxy", "not shown", "http://host:3128"),
    (entry(proxy="http://h:1/path"), "x.proxy", "not shown", "http://host:3128"),
    ({"x": {**LOCAL, "proxy": None}}, "x.proxy", "null", "http://host:3128"),
    (entry(headers=["a"]), "x.headers", "a list of 1", "an object of header names"),
    (entry(headers={"Host": "h"}), "x.headers.Host", "the gateway sets itself", "another header"),
    (entry(headers={"content-length": "1"}), "x.headers.content-length", "the gateway sets itself", "another header"),
    (entry(headers={"Transfer-Encoding": "chunked"}), "x.headers.Transfer-Encoding", "the gateway sets itself", "another header"),
    (entry(headers={"Authorization": "Bearer a"}), "x.headers.Authorization", "the gateway sets itself", '"keys"'),
    (entry(headers={"a b": "1"}), 'x.headers["a b"]', "no header name", "letters, digits"),
    (entry(headers={"X-A": "1", "x-a": "2"}), "x.headers.x-a", "twice", "once"),
    (entry(headers={"X-A": "1\r\nB: 2"}), "x.headers.X-A", "not shown", "one line of printable ASCII"),
    (entry(headers={"X-A": 1}), "x.headers.X-A", "number 1", "one line of printable ASCII"),
    (entry(timeouts={"connect": 0}), "x.timeouts.connect", "number 0", "seconds"),
    (entry(timeouts={"firstbyte": 1}), "x.timeouts.firstbyte", "unknown", 'did you mean "firstByte"?'),
    (entry(timeouts=5), "x.timeouts", "number 5", "an object"),
    (entry(limits={"rpm": "30"}), "x.limits.rpm", 'string "30"', "whole number"),
    (entry(weight=0), "x.weight", "number 0", "from 1 to 1000"),
    (entry(maxConcurrent=0), "x.maxConcurrent", "number 0", "from 1"),
    (entry(rules={}), "x.rules", "an object", "a list"),
    (entry(rules=[{"drop": ["messages"]}]), "x.rules[0].drop[0]", "messages", "other than model"),
    (entry(rules=[{"override": {"model": "y"}}]), "x.rules[0].override.model", "model", "other than model"),
    (entry(rules=[{"drop": ["messages.0"]}]), "x.rules[0].drop[0]", "messages.0", "other than model"),
    (entry(rules=[{"default": {"a..b": 1}}]), 'x.rules[0].default["a..b"]', "a..b", "with a dot before a name"),
    (entry(rules=[{"overide": {}}]), "x.rules[0].overide", "unknown", 'did you mean "override"?'),
    ({**SEED, "carousel": []}, "carousel", "a list", "an object"),
    ({**SEED, "carousel": {"strategy": "random"}}, "carousel.strategy", 'string "random"', "one of: round-robin"),
    ({**SEED, "carousel": {"strategy": "fastet"}}, "carousel.strategy", "fastet", 'did you mean "fastest"?'),
    ({**SEED, "carousel": {"affinity": True}}, "carousel.affinity", "true", "one of: auto"),
    ({**SEED, "carousel": {"fallback": "all"}}, "carousel.fallback", 'string "all"', "one of: chain"),
    ({**SEED, "carousel": {"maxAttempts": 0}}, "carousel.maxAttempts", "number 0", "from 1 to 50"),
    ({**SEED, "carousel": {"maxAttempts": 51}}, "carousel.maxAttempts", "number 51", "from 1 to 50"),
    ({**SEED, "carousel": {"maxWait": -1}}, "carousel.maxWait", "number -1", "seconds"),
    ({**SEED, "carousel": {"toolStream": "hold"}}, "carousel.toolStream", 'string "hold"', "held"),
    ({**SEED, "carousel": {"unknownModel": "404"}}, "carousel.unknownModel", 'string "404"', "one of: carousel, reject"),
    ({**SEED, "carousel": {"contentFallback": 1}}, "carousel.contentFallback", "number 1", "true or false"),
    ({**SEED, "carousel": {"echoModel": "yes"}}, "carousel.echoModel", 'string "yes"', "true or false"),
    ({**SEED, "carousel": {"resume": "on"}}, "carousel.resume", 'string "on"', "one of: off, safe, force"),
    ({**SEED, "carousel": {"limits": 5}}, "carousel.limits", "number 5", "an object"),
    ({**SEED, "carousel": {"limits": {"drian": 5}}}, "carousel.limits.drian", "unknown", 'did you mean "drain"?'),
    ({**SEED, "carousel": {"limits": {"client_idle_s": 5}}}, "carousel.limits.client_idle_s", "unknown", 'did you mean "clientIdle"?'),
    ({**SEED, "carousel": {"limits": {"bodyBytes": "32MB"}}}, "carousel.limits.bodyBytes", 'string "32MB"', "a whole number from 1024 to 1073741824"),
    ({**SEED, "carousel": {"limits": {"bodyBytes": 2048.5}}}, "carousel.limits.bodyBytes", "number 2048.5", "a whole number"),
    ({**SEED, "carousel": {"limits": {"retryBudget": -0.1}}}, "carousel.limits.retryBudget", "number -0.1", "of the requests under way, a number from 0 to 10"),
    *(({**SEED, "carousel": {"limits": {name: value}}}, f"carousel.limits.{name}", f"number {value}", f"from {row.metadata['low']:.10g} to ")
      for name, field in aicarousel._BOUND_FIELDS.items() for row in [aicarousel.Bounds.__dataclass_fields__[field.name]]
      for value in (-1, row.metadata["high"] + 1)),
    ({**SEED, "carousel": {"max_wait": 1}}, "carousel.max_wait", "unknown", 'did you mean "maxWait"?'),
    ({**SEED, "carousel": {"aliases": []}}, "carousel.aliases", "a list", "an object of names"),
    ({**SEED, "carousel": {"aliases": {"fast": []}}}, "carousel.aliases.fast", "a list of 0", "at least 1"),
    ({**SEED, "carousel": {"aliases": {"fast": 1}}}, "carousel.aliases.fast[0]", "number 1", "a string"),
    ({**SEED, "carousel": {"aliases": {"auto": "groq"}}}, "carousel.aliases.auto", "whole carousel", "another name"),
    ({**SEED, "carousel": {"aliases": {"a": "a"}}}, "carousel.aliases.a", "a -> a", "ends at"),
    ({**SEED, "carousel": {"aliases": {"a": ["groq", "b"], "b": "c", "c": ["a"]}}}, "carousel.aliases.a", "a -> b -> c -> a", "ends at"),
    ({**SEED, "carousel": {"aliases": {"gpt-*": "claude-x", "claude-*": "gpt-y"}}}, 'carousel.aliases["gpt-*"]', "circle", "ends at"),
    ({**SEED, "carousel": {"aliases": {f"a{n}": f"a{n + 1}" for n in range(2000)}}}, "carousel.aliases.a0", "chain too long", "ends at"),
]


@pytest.mark.parametrize("models, path, found, expected", REFUSED, ids=[f"{number}-{row[1]}" for number, row in enumerate(REFUSED)])
def test_refusals_name_place_found_and_expected(models, path, found, expected):
    error = complaint(models)
    assert error.where == (f"models.json: {path}" if path else "models.json")
    assert found in error.found, error
    assert expected in error.expected, error


def test_syntax_errors_name_line_and_column():
    error = complaint('{\n  "groq": {,}\n}')
    assert error.where == "models.json: line 2 column 12" and "comma" in error.expected


def test_aliases_that_share_an_end_are_no_circle_and_no_long_search():
    aliases = {f"a{n}": [f"a{n + 1}", f"a{n + 1}", f"a{n + 1}"] for n in range(20)}
    assert len(load({**SEED, "carousel": {"aliases": aliases}}).carousel.aliases) == 20


def test_a_glob_may_stand_for_a_name_it_matches():
    config = load({**SEED, "carousel": {"aliases": {"claude-*": "claude-haiku-5-5"}}})
    assert config.carousel.aliases == {"claude-*": ("claude-haiku-5-5",)}


@pytest.mark.parametrize("name, alias", [("claude-opus", "claude-*"), ("claude-haiku-4", "claude-haiku-*"), ("fast", "fast"), ("slow", ""), ("fa", "f?")])
def test_the_most_specific_alias_is_found(name, alias):
    assert find_alias(name, ["claude-*", "claude-haiku-*", "fast", "f?"]) == alias


def places(value, path=()):
    """The path of every value in a JSON tree."""
    yield path
    for step, member in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(member, (*path, step))


def with_value(tree, path, value):
    """The tree with `value` at `path`."""
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = with_value(tree[path[0]], path[1:], value)
    return copy


@pytest.mark.parametrize("odd", [None, True, 0, -1, 1.5, 10 ** 30, "", " ", SECRET, "\ud800", "http://[", "*[", [], [[]], [None], {}, {"": ""}, {"a": {}}],
                         ids=lambda odd: json.dumps(odd)[:20])
def test_an_odd_value_anywhere_is_taken_or_refused_in_our_words(odd):
    refused = 0
    for path in places(WHOLE):
        try:
            load(with_value(WHOLE, path, odd))
        except ConfigError as error:
            refused += 1
            assert error.where.startswith("models.json") and error.found and error.expected
            assert SECRET not in str(error) or not {"keys", "headers", "proxy"} & set(path), error
    assert refused > 10


# Credentials.

def credentials(config, name="groq"):
    return [(credential.id, credential.secret, credential.source) for credential in one(config, name).credentials]


def test_keys_come_from_numbered_variables_with_gaps_and_comma_lists_each_once():
    config = load(SEED, {"GROQ_API_KEY": "k-one, k-two,,k-one", "GROQ_API_KEY_3": "k-three", "GROQ_API_KEY_50": "k-fifty,k-two", "GROQ_API_KEY_51": "k-beyond"})
    assert credentials(config) == [("groq/1", "k-one", "env:GROQ_API_KEY"), ("groq/2", "k-two", "env:GROQ_API_KEY"),
                                   ("groq/3", "k-three", "env:GROQ_API_KEY_3"), ("groq/4", "k-fifty", "env:GROQ_API_KEY_50")]
    assert config.origins["groq.keys.3"] == "environment GROQ_API_KEY_3"
    assert config.secrets == {"k-one", "k-two", "k-three", "k-fifty"}


def test_every_variable_of_a_preset_is_read():
    config = load({"gemini": {"default": "m", "enableFallback": True, "models": ["m"]}},
                  {"GOOGLE_API_KEY": "k-b", "GEMINI_API_KEY": "k-a"}, {"GEMINI_API_KEY_2": "k-c"})
    assert [secret for _, secret, _ in credentials(config, "gemini")] == ["k-a", "k-c", "k-b"]


def test_without_a_key_a_provider_takes_no_part_and_says_why():
    config = load(SEED, {"GROQ_API_KEY": "k-one"})
    assert [provider.name for provider in config.active] == ["groq"]
    assert one(config, "cerebras").why_out == "no key: CEREBRAS_API_KEY is not set"
    assert config.looked_for == ("CEREBRAS_API_KEY",)


def test_a_custom_provider_has_a_variable_of_its_own_name():
    models = {"my.corp-1": {"baseUrl": "https://llm.example/v1", "default": "m", "enableFallback": True, "models": ["m"]}}
    assert one(load(models), "my.corp-1").why_out == "no key: MY_CORP_1_API_KEY is not set"
    assert credentials(load(models, {"MY_CORP_1_API_KEY": "k-one"}), "my.corp-1") == [("my.corp-1/1", "k-one", "env:MY_CORP_1_API_KEY")]


def test_a_borrowed_preset_lends_its_keys_to_its_own_host_only():
    def second(**fields):
        return {"groq-b": {"preset": "groq", "default": "m", "enableFallback": True, "models": ["m"], **fields}}
    keys = {"GROQ_API_KEY": "k-groq"}
    assert [row[1] for row in credentials(load(second(), keys), "groq-b")] == ["k-groq"]
    assert [row[1] for row in credentials(load(second(), {**keys, "GROQ_B_API_KEY": "k-own"}), "groq-b")] == ["k-own"]
    elsewhere = one(load(second(baseUrl="https://elsewhere.example/v1"), keys), "groq-b")
    assert elsewhere.credentials == () and elsewhere.why_out == "no key: GROQ_B_API_KEY is not set"


@pytest.mark.parametrize("models, name", [
    ({"ollama": {"default": "m", "enableFallback": True, "models": ["m"]}}, "ollama"),
    ({"ollama": {"default": "m", "enableFallback": True, "models": ["m"], "baseUrl": "http://192.168.1.5:11434/v1", "allowHttp": True}}, "ollama"),
    (entry(), "x"),
    (entry(baseUrl="http://[::1]:8000/v1"), "x"),
    (entry(baseUrl="https://open.example/v1", keys=[]), "x"),
    ({"groq": {**LOCAL}}, "groq"),
])
def test_who_needs_no_key(models, name):
    provider = load(models, {"OLLAMA_API_KEY": "k-of-the-cloud"}).active[0]
    assert credentials(load(models), name) == [(f"{name}/1", "", "")] and provider.credentials[0].secret == ""


def test_unset_references_are_left_out_and_noted():
    config = load(entry(keys=["env:A_KEY", "env:B_KEY"]), {"B_KEY": "k-b"})
    assert credentials(config, "x") == [("x/1", "k-b", "env:B_KEY")]
    assert config.warnings == ("x: A_KEY is not set; that key is left out",)
    nothing = load(entry(keys=["env:A_KEY"]))
    assert one(nothing).why_out == "no key: A_KEY is not set" and nothing.looked_for == ("A_KEY",) and nothing.active == ()


def reading(values):
    """What load_config asks for the keys of references: `values` by reference, a complaint where there is none."""
    def read(reference):
        if reference not in values:
            raise aicarousel.ConfigError(reference, "no such file", "a key")
        return values[reference]
    return read


def test_references_to_files_and_programs_are_read_and_never_shown():
    models = entry(keys=["file:/run/a", {"key": "cmd:pass show groq", "label": "b"}, "file:/run/gone", "env:C_KEY", "keyring:llm/my groq"])
    values = {"keyring:llm/my groq": "k-d", "file:/run/a": "k-a", "cmd:pass show groq": "k-b1,k-b2"}
    config = load(models, {"C_KEY": "k-c", "AICAROUSEL_SECRET_COMMANDS": "yes"}, read_secret=reading(values))
    assert credentials(config, "x") == [("x/1", "k-a", "file:/run/a"), ("x/2", "k-b1", "cmd:pass show groq"), ("x/3", "k-b2", "cmd:pass show groq"), ("x/4", "k-c", "env:C_KEY"), ("x/5", "k-d", "keyring:llm/my groq")]
    assert config.secrets == {"k-a", "k-b1", "k-b2", "k-c", "k-d"} and config.secret_files == ("/run/a", "/run/gone")
    assert config.warnings == ("file:/run/gone: found no such file; expected a key",)
    assert config.origins["x.keys.1"] == "file:/run/a"


@pytest.mark.parametrize("allowed", [{}, {"AICAROUSEL_SECRET_COMMANDS": "false"}])
def test_programs_run_only_where_the_environment_allows_it(allowed):
    def run(reference):
        raise AssertionError("it was run")
    config = load(entry(keys=["cmd:echo k-a"]), allowed, read_secret=run)
    assert credentials(config, "x") == [] and one(config).why_out == "no key: cmd:echo k-a is not set"
    [warning] = config.warnings
    assert "AICAROUSEL_SECRET_COMMANDS=true" in warning


def test_disabled_keys_are_left_out_and_stay_secret():
    config = load(entry(keys=[{"key": "env:A_KEY", "disabled": True}, "env:B_KEY"]), {"A_KEY": "k-a", "B_KEY": "k-b"})
    assert credentials(config, "x") == [("x/1", "k-b", "env:B_KEY")] and config.secrets == {"k-a", "k-b"}
    assert one(load(entry(keys=[{"key": "env:A_KEY", "disabled": True}]), {"A_KEY": "k-a"})).why_out == "no key: every key is disabled"


def test_an_account_that_fills_the_address():
    models = {"cloudflare": {"default": "m", "enableFallback": True, "models": ["m"]}}
    lacking = load(models, {"CLOUDFLARE_API_TOKEN": "k-one"})
    assert one(lacking, "cloudflare").why_out == "no account: CLOUDFLARE_ACCOUNT_ID is not set" and "CLOUDFLARE_ACCOUNT_ID" in lacking.looked_for
    whole = load(models, {"CLOUDFLARE_API_TOKEN": "k-one", "CLOUDFLARE_ACCOUNT_ID": "abc123"})
    assert whole.active[0].base_url == "https://api.cloudflare.com/client/v4/accounts/abc123/ai/v1"
    assert complaint(models, {"CLOUDFLARE_ACCOUNT_ID": "a/../b"}).where == "environment CLOUDFLARE_ACCOUNT_ID"


# Secrets never stand in a complaint.

@pytest.mark.parametrize("models, environment, dotenv, where", [
    (entry(keys=[SECRET]), {}, {}, "models.json: x.keys[0]"),
    (entry(keys=[{"key": SECRET}]), {}, {}, "models.json: x.keys[0].key"),
    (entry(keys=[{"key": "env:" + SECRET}]), {}, {}, "models.json: x.keys[0].key"),
    (entry(keys=SECRET), {}, {}, "models.json: x.keys"),
    (entry(apiKey=SECRET), {}, {}, "models.json: x.apiKey"),
    (entry(headers=SECRET), {}, {}, "models.json: x.headers"),
    (entry(headers={"X-Key": SECRET + "\n"}), {}, {}, "models.json: x.headers.X-Key"),
    (entry(headers={"Authorization": SECRET}), {}, {}, "models.json: x.headers.Authorization"),
    (entry(proxy=f"socks5://u:{SECRET}@h:1"), {}, {}, "models.json: x.proxy"),
    (entry(baseUrl=f"https://u:{SECRET}@h/v1"), {}, {}, "models.json: x.baseUrl"),
    (entry(baseUrl=f"https://h/v1?key={SECRET}"), {}, {}, "models.json: x.baseUrl"),
    (entry(default="gsk_abcdefghijklmnop4711"), {}, {}, "models.json: x.default"),
    (SEED, {"GROQ_API_KEY": f"{SECRET} x"}, {}, "environment GROQ_API_KEY"),
    (SEED, {}, {"GROQ_API_KEY_2": f"{SECRET}\u00e9"}, ".env GROQ_API_KEY_2"),
    (SEED, {"GROQ_API_KEY": f"{SECRET}\x00"}, {}, "environment GROQ_API_KEY"),
    (SEED, {"GROQ_BASE_URL": f"https://u:{SECRET}@h/v1"}, {}, "environment GROQ_BASE_URL"),
    (SEED, {"HTTPS_PROXY": f"https://u:{SECRET}@h:1"}, {}, "environment HTTPS_PROXY"),
    (SEED, {"API_KEYS": "4711abc"}, {}, "environment API_KEYS"),
    (SEED, {}, {"API_KEYS": f"{SECRET} {SECRET}"}, ".env API_KEYS"),
])
def test_no_complaint_holds_a_secret(models, environment, dotenv, where):
    error = complaint(models, environment, dotenv)
    assert error.where == where
    assert SECRET not in str(error) and "4711" not in str(error)


def test_a_secret_written_after_env_is_not_repeated_in_warnings():
    config = load(entry(keys=["env:gsk_abcdefghijklmnop4711"]))
    assert "4711" not in " ".join((*config.warnings, *config.looked_for, one(config).why_out))


def test_nothing_secret_stands_in_the_representation():
    config = load({**SEED, **entry(proxy=None)}, {"GROQ_API_KEY": SECRET, "API_KEYS": SECRET, "HTTPS_PROXY": f"http://u:{SECRET}@h:1"})
    assert SECRET not in repr(config) and SECRET in config.secrets and config.settings.api_keys == (SECRET,)


def test_passwords_of_proxies_and_telling_headers_are_known_as_secrets():
    config = load(entry(proxy="http://u:pass%40word@h:1", headers={"X-Title": "plain-title", "X-Auth-Thing": "header-secret"}),
                  {"http_proxy": "http://u:other-password@h:1"})
    assert config.secrets == {"pass@word", "header-secret", "other-password", *(base64.b64encode(login).decode() for login in (b"u:pass@word", b"u:other-password"))}


def test_what_else_is_known_as_a_secret() -> None:
    """Opaque header values under any name, and what .env calls a secret, used or not."""
    config = aicarousel.load_config(json.dumps(entry(headers={"X-Title": "a-plain-title-in-4-words", "X-Org": "9f8e7d6c5b4a39281706f5e4d", "Referer": "https://example.test/a1b2c3d4e5"})),
                                    models_path="models.json", environment={}, dotenv={"SOME_PASSWORD": "hunter2hunter2", "OTHER_TOKEN": "short", "PLAIN": "not-a-secret-at-all"}, flags={})
    assert config.secrets == {"9f8e7d6c5b4a39281706f5e4d", "hunter2hunter2"}


# Addresses.

@pytest.mark.parametrize("name, value, url", [
    ("groq", "https://proxy.example", "https://proxy.example/v1"),
    ("groq", "https://proxy.example/", "https://proxy.example/v1"),
    ("groq", "https://proxy.example/v1/", "https://proxy.example/v1"),
    ("groq", "https://proxy.example/groq", "https://proxy.example/groq"),
    ("groq", "http://127.0.0.1:9", "http://127.0.0.1:9/v1"),
    ("gemini", "https://proxy.example", "https://proxy.example"),
    ("openai", "https://proxy.example", "https://proxy.example/v1"),
    ("anthropic", "https://api.anthropic.com", "https://api.anthropic.com/v1"),
    ("anthropic", "https://api.deepseek.com/anthropic", "https://api.deepseek.com/anthropic/v1"),
])
def test_base_urls_from_variables_are_mended(name, value, url):
    models = {name: {"default": "m", "enableFallback": True, "models": ["m"]}}
    variable = name.upper() + "_BASE_URL"
    config = load(models, {variable: value})
    assert one(config, name).base_url == url and config.origins[f"{name}.baseUrl"] == f"environment {variable}"


def test_a_base_url_that_is_this_gateway_is_not_used():
    config = load(SEED, {"GROQ_BASE_URL": "http://localhost:7123/v1"})
    assert one(config, "groq").base_url == "https://api.groq.com/openai/v1"
    assert config.warnings == ("environment GROQ_BASE_URL leads to this gateway itself and is not used for groq",)
    assert one(load(SEED, {"GROQ_BASE_URL": "http://localhost:7123/v1"}, port=7124), "groq").base_url == "http://localhost:7123/v1"


def test_http_beyond_this_machine_is_refused_also_from_a_variable():
    error = complaint(SEED, {"GROQ_BASE_URL": "http://proxy.example/v1"})
    assert error.where == "environment GROQ_BASE_URL" and "allowHttp" in error.expected
    assert one(load(entry(baseUrl="http://10.0.0.2/v1", allowHttp=True))).base_url == "http://10.0.0.2/v1"


def test_a_format_takes_the_address_at_which_it_is_spoken():
    models = {"deepseek": {"default": "m", "enableFallback": True, "models": ["m"], "format": "messages"}}
    provider = one(load(models, {"DEEPSEEK_API_KEY": "k-one"}), "deepseek")
    assert (provider.format, provider.base_url) == ("messages", "https://api.deepseek.com/anthropic/v1")
    assert provider.why_out == ""


@pytest.mark.parametrize("host, here", [
    ("localhost", True), ("LOCALHOST", True), ("a.localhost", True), ("127.0.0.1", True), ("127.9.8.7", True), ("::1", True), ("[::1]", True),
    ("0.0.0.0", False), ("127.0.0.1.evil.example", False), ("localhost.evil.example", False), ("10.0.0.1", False), ("", False)])
def test_loopback(host, here):
    assert is_loopback(host) is here


# Without a file, and order.

def test_without_a_file_the_presets_whose_key_is_set_take_part():
    config = load(None, {"OPENAI_API_KEY": "k-o"}, {"GROQ_API_KEY_2": "k-g"})
    assert [provider.name for provider in config.active] == ["groq", "openai"]
    assert config.active[0].default == "openai/gpt-oss-120b" and config.active[0].enable_fallback
    assert config.origins["groq.default"] == "default" and "GEMINI_API_KEY" in config.looked_for and "GROQ_API_KEY" not in config.looked_for


def test_without_a_file_and_keys_it_says_what_it_looked_for():
    config = load()
    assert config.providers == () and config.active == ()
    assert {"GEMINI_API_KEY", "GROQ_API_KEY", "OPENROUTER_API_KEY", "CEREBRAS_API_KEY", "OPENAI_API_KEY"} <= set(config.looked_for)


def test_a_file_of_carousel_settings_alone_leaves_the_providers_to_the_environment():
    config = load({"carousel": {"maxWait": 1}}, {"GROQ_API_KEY": "k-g"})
    assert [provider.name for provider in config.active] == ["groq"] and config.carousel.max_wait_s == 1.0


@pytest.mark.parametrize("variables, names", [
    ({}, []),
    ({"OLLAMA_ENABLED": "true"}, ["ollama"]),
    ({"OLLAMA_BASE_URL": "http://127.0.0.1:1"}, ["ollama"]),
    ({"OLLAMA_MODEL": "gemma3:1b"}, ["ollama"]),
    ({"PROVIDERS_PRIORITY": "ollama"}, ["ollama"]),
    ({"VLLM_MODEL": "qwen"}, ["vllm"]),
])
def test_local_servers_take_part_without_a_file_only_when_spoken_of(variables, names):
    assert [provider.name for provider in load(None, variables).active] == names


def test_a_local_server_without_a_model_says_so():
    assert load(None, {"VLLM_BASE_URL": "http://127.0.0.1:1"}).providers[0].why_out == "no model: name one in models.json or in VLLM_MODEL"


@pytest.mark.parametrize("models, priority, names", [
    (SEED, "groq", ["groq", "cerebras"]),
    (SEED, "groq,cerebras", ["groq", "cerebras"]),
    (SEED, " groq , groq ", ["groq", "cerebras"]),
    (SEED, "openai,groq", ["groq", "cerebras"]),
    (None, "openai,groq", ["openai", "groq", "cerebras"]),
])
def test_providers_priority(models, priority, names):
    keys = {"GROQ_API_KEY": "k-g", "CEREBRAS_API_KEY": "k-c", "OPENAI_API_KEY": "k-o"}
    assert [provider.name for provider in load(models, {**keys, "PROVIDERS_PRIORITY": priority}).active] == names


@pytest.mark.parametrize("priority", ["gorq", "github-models"])
def test_unknown_names_in_providers_priority(priority):
    error = complaint(SEED, {}, {"PROVIDERS_PRIORITY": priority})
    assert error.where == ".env PROVIDERS_PRIORITY" and "groq" in error.expected


def test_a_model_from_a_variable_is_the_default_and_listed_first_if_new():
    config = load(SEED, {"GROQ_MODEL": "brand-new"}, {"CEREBRAS_MODEL": "qwen-3.8-27b"})
    groq, cerebras = one(config, "groq"), one(config, "cerebras")
    assert (groq.default, [model.id for model in groq.models]) == ("brand-new", ["brand-new", "openai/gpt-oss-120b", "openai/gpt-oss-20b"])
    assert (cerebras.default, [model.id for model in cerebras.models]) == ("qwen-3.8-27b", ["gpt-oss-120b", "qwen-3.8-27b"])
    assert config.origins["groq.default"] == "environment GROQ_MODEL" and config.origins["cerebras.default"] == ".env CEREBRAS_MODEL"
    assert config.origins["groq.models"] == "models.json groq.models" and config.origins["groq.timeouts"] == "default"


def test_switching_off():
    off = load(entry(enabled=False))
    assert one(off).why_out == "switched off in models.json" and off.active == ()
    assert one(load(entry(), {"X_ENABLED": "false"})).why_out == "switched off by X_ENABLED"
    assert load(entry(enabled=False), {"X_ENABLED": "1"}).active[0].name == "x"
    assert complaint(entry(), {"X_ENABLED": "maybe"}).where == "environment X_ENABLED"


def test_retired_models_are_warned_of_with_a_replacement():
    config = load({"groq": {"default": "openai/gpt-oss-20b", "enableFallback": True, "models": ["openai/gpt-oss-20b", "llama-3.3-70b-versatile"]},
                   "gemini": {"default": "gemini-1.5-pro", "enableFallback": True, "models": ["gemini-1.5-pro"]}})
    first, second = config.warnings
    assert first == "models.json: groq: model llama-3.3-70b-versatile is withdrawn (2026-08-16); try openai/gpt-oss-120b"
    assert re.match(r"models\.json: gemini: model gemini-1\.5-pro is withdrawn \(2025\); try gemini-3", second)


# The demo.

def test_the_demo_is_first_only_when_nothing_else_answers():
    alone = load(SEED, demo=True, demo_url="http://127.0.0.1:5/v1")
    assert [provider.name for provider in alone.providers] == ["demo", "cerebras", "groq"] and [provider.name for provider in alone.active] == ["demo"]
    assert (alone.active[0].base_url, alone.active[0].default, alone.active[0].credentials[0].secret) == ("http://127.0.0.1:5/v1", "demo", "")
    beside = load(SEED, {"GROQ_API_KEY": "k-g"}, demo=True, demo_url="http://127.0.0.1:5/v1")
    assert [provider.name for provider in beside.active] == ["groq", "demo"] and beside.settings.demo
    assert complaint({"demo": LOCAL}, demo=True).where == "flag --demo"


# Settings and precedence.

PRECEDENCE = [   # setting, flag, flag value, variable, text, value, default
    ("host", "host", "::1", "AICAROUSEL_HOST", "0.0.0.0", "0.0.0.0", "127.0.0.1"),
    ("port", "port", 8000, "PORT", "9000", 9000, 7123),
    ("log_level", "log_level", "error", "AICAROUSEL_LOG_LEVEL", "debug", "debug", "info"),
    ("request_log", "request_log", "a.jsonl", "AICAROUSEL_REQUEST_LOG", "b.jsonl", "b.jsonl", ""),
    ("cors_origins", "cors_origin", ["https://a.example", "https://b.example"], "AICAROUSEL_CORS_ORIGIN", "http://c.example:1, *",
     ("http://c.example:1", "*"), ()),
]


@pytest.mark.parametrize("name, flag, flag_value, variable, text, value, default", PRECEDENCE, ids=[row[0] for row in PRECEDENCE])
def test_flag_then_environment_then_dotenv_then_default(name, flag, flag_value, variable, text, value, default):
    dashed = "flag --" + flag.replace("_", "-")
    wanted = tuple(flag_value) if isinstance(flag_value, list) else flag_value
    rows = [
        (load(SEED, {variable: text}, {variable: "nonsense !"}, **{flag: flag_value}), wanted, dashed),
        (load(SEED, {variable: text}, {variable: "nonsense !"}, **{flag: None}), value, f"environment {variable}"),
        (load(SEED, {}, {variable: text}), value, f".env {variable}"),
        (load(SEED, {variable: " "}, {variable: text}), default, "default"),
        (load(SEED), default, "default"),
    ]
    for config, got, origin in rows:
        assert getattr(config.settings, name) == got and config.origins[f"settings.{name}"] == origin


def test_the_environment_stands_above_dotenv_for_keys():
    config = load(SEED, {"GROQ_API_KEY": "k-env"}, {"GROQ_API_KEY": "k-file", "CEREBRAS_API_KEY": "k-file"})
    assert credentials(config)[0][1] == "k-env" and config.origins["groq.keys.1"] == "environment GROQ_API_KEY"
    assert config.origins["cerebras.keys.1"] == ".env CEREBRAS_API_KEY"
    assert credentials(load(SEED, {"GROQ_API_KEY": ""}, {"GROQ_API_KEY": "k-file"})) == []


def test_settings_of_every_kind_load():
    settings = load(SEED, {"AICAROUSEL_ALLOWED_HOSTS": "Box.lan, 10.0.0.2", "API_KEYS": "sk-0123456789abcdef,sk-fedcba9876543210", "HTTPS_PROXY": "proxy:3128",
                           "NO_PROXY": "a.example, .b.example", "AICAROUSEL_TLS_CERT": "c.pem", "AICAROUSEL_TLS_KEY": "k.pem"}, no_auth=True).settings
    assert settings.allowed_hosts == ("box.lan", "10.0.0.2") and settings.api_keys == ("sk-0123456789abcdef", "sk-fedcba9876543210")
    assert (settings.https_proxy, settings.http_proxy, settings.no_proxy) == ("http://proxy:3128", "", ("a.example", ".b.example"))
    assert (settings.tls_cert, settings.tls_key, settings.no_auth, settings.demo) == ("c.pem", "k.pem", True, False)


@pytest.mark.parametrize("environment, flags, where, found, expected", [
    ({"PORT": "abc"}, {}, "environment PORT", 'string "abc"', "0 to 65535"),
    ({"PORT": "65536"}, {}, "environment PORT", "65536", "0 to 65535"),
    ({"PORT": "-1"}, {}, "environment PORT", "-1", "0 to 65535"),
    ({}, {"port": 70000}, "flag --port", "number 70000", "0 to 65535"),
    ({"AICAROUSEL_HOST": "http://h"}, {}, "environment AICAROUSEL_HOST", "http://h", "host name"),
    ({"AICAROUSEL_LOG_LEVEL": "verbose"}, {}, "environment AICAROUSEL_LOG_LEVEL", "verbose", "debug"),
    ({}, {"log_level": "inf"}, "flag --log-level", "inf", 'did you mean "info"?'),
    ({}, {"cors_origin": ["app.example"]}, "flag --cors-origin", "app.example", "https://app.example"),
    ({}, {"cors_origin": ["https://a.example/path"]}, "flag --cors-origin", "path", "without a path"),
    ({"AICAROUSEL_ALLOWED_HOSTS": "a b"}, {}, "environment AICAROUSEL_ALLOWED_HOSTS", "a b", "host names"),
    ({"API_KEYS": "test-key"}, {}, "environment API_KEYS", "test-key", "16 characters"),
    ({"API_KEYS": "sk-0123456789abcdef,short"}, {}, "environment API_KEYS", "5 characters", "16 characters"),
    ({"https_proxy": "socks5://h:1"}, {}, "environment https_proxy", "not shown", "http://host:3128"),
    ({"AICAROUSEL_LOG_BODIES": "some", "AICAROUSEL_REQUEST_LOG": "log"}, {}, "environment AICAROUSEL_LOG_BODIES", "some", "errors"),
    ({}, {"log_bodies": "all"}, "flag --log-bodies", "log_bodies without request_log", "a file for them"),
    ({"AICAROUSEL_TLS_CERT": "c.pem"}, {}, "environment AICAROUSEL_TLS_CERT", "tls_cert without tls_key", "both"),
    ({}, {"tls_key": "k.pem"}, "flag --tls-key", "tls_key without tls_cert", "both"),
])
def test_settings_that_are_refused(environment, flags, where, found, expected):
    error = complaint(SEED, environment, **flags)
    assert error.where == where and found in error.found and expected in error.expected


# .env and names.

@pytest.mark.parametrize("text, values", [
    ("", {}),
    ("A=1\nB=2\r\nC=3\rD=4", {"A": "1", "B": "2", "C": "3", "D": "4"}),
    ("\ufeffA=1", {"A": "1"}),
    ("# A=1\n\n   # x\nexport B = 2 ", {"B": "2"}),
    ("A=x#y # note", {"A": "x#y"}),
    ("A= # note\nB=\nC=#note", {"A": "", "B": "", "C": ""}),
    ('A="a # b" # note\nB="say \\"hi\\"\\n"', {"A": "a # b", "B": 'say "hi"\n'}),
    ("A='a \\n # b'", {"A": "a \\n # b"}),
    ("A=1\nA=2", {"A": "2"}),
    ("A=a=b==", {"A": "a=b=="}),
    ("A=$HOME", {"A": "$HOME"}),
])
def test_dotenv(text, values):
    assert parse_dotenv(text) == values


@pytest.mark.parametrize("line", [SECRET, f"A B={SECRET}", f'A="{SECRET}', f"A='{SECRET}", f'A="{SECRET}" more', f"1A={SECRET}", f"={SECRET}"])
def test_dotenv_refuses_by_line_without_repeating_it(line):
    with pytest.raises(ConfigError) as caught:
        parse_dotenv("# first\n" + line)
    assert caught.value.where == ".env line 2" and SECRET not in str(caught.value) and "NAME=value" in caught.value.expected


@pytest.mark.parametrize("name, near", [("gorq", "groq"), ("GROQ", "groq"), ("openia", "openai"), ("zzzzzz", ""), ("", "")])
def test_nearest(name, near):
    assert nearest(name, ["groq", "openai", "gemini"]) == near


def test_the_default_file_loads_without_warnings():
    config = load(dict(aicarousel.DEFAULT_MODELS), {f"{name}_API_KEY": f"k-{name}" for name in ("GEMINI", "GROQ", "OPENROUTER", "CEREBRAS")})
    assert [provider.name for provider in config.active] == ["gemini", "groq", "openrouter", "cerebras", "ollama"] and config.warnings == ()
