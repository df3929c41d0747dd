"""Section 6: what came back from a provider, judged.  One row per row of the providers' error tables and per form of a reset."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import aicarousel as ac

NOW = datetime(2026, 11, 21, 4, 0, 0, tzinfo=timezone.utc).timestamp()
DAY = 86400.0
TO_UTC_MIDNIGHT = 20 * 3600.0
TO_PACIFIC_MIDNIGHT = 4 * 3600.0          # 20:00 in California, winter time
BUCKETS = {"cerebras": "model", "groq": "model", "gemini": "model", "openai": "model", "anthropic": "model", "ollama": "machine", "vllm": "machine"}
RECORDINGS = Path(__file__).resolve().parents[2] / "shared" / "recordings"


def judge(preset: str, status: int, body: Any, headers: dict[str, str] | None = None) -> ac.UpstreamFailure:
    raw = body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else json.dumps(body).encode()
    return ac.classify(preset, BUCKETS.get(preset, "account"), status, headers or {}, raw, utc=NOW)


def err(message: str = "", **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, **fields}}


def anthropic(kind: str, message: str = "...") -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}


def gemini(code: int, status: str, message: str = "", *details: dict[str, Any]) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "status": status, "details": list(details)}}


def quota(quota_id: str, value: str = "20", delay: str = "54s") -> tuple[dict[str, Any], dict[str, Any]]:
    return ({"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [{"quotaMetric": "m", "quotaId": quota_id, "quotaValue": value}]},
            {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay})


GEMINI_QUOTA = ("You exceeded your current quota, please check your plan and billing details. For more information head to: https://ai.google.dev/gemini-api/docs/rate-limits. "
                "* Quota exceeded for metric: generativelanguage.googleapis.com/generate_content_free_tier_requests, limit: 20, model: gemini-2.5-flash-lite Please retry in 54.058356943s.")
GROQ_TPD = ("Rate limit reached for model `openai/gpt-oss-120b` in organization `org_01hx` service tier `on_demand` on tokens per day (TPD): Limit 100000, Used 97050, "
            "Requested 3619. Please try again in 9m38.016s. Need more tokens? Upgrade to Dev Tier today")
GROQ_TPM_413 = ("Request too large for model `openai/gpt-oss-120b` in organization `org_01hx` service tier `on_demand` on tokens per minute (TPM): Limit 8000, Requested 34041, "
                "please reduce your message size and try again.")
MISTRAL_EXTRA = {"object": "error", "message": {"detail": [{"type": "extra_forbidden", "loc": ["body", "max_completion_tokens"], "msg": "Extra inputs are not permitted", "input": 32000}]},
                 "type": "invalid_request_error", "param": None, "code": None}
OPENROUTER_UPSTREAM = {"error": {"message": "Provider returned error", "code": 429, "metadata": {
    "provider_name": "Google", "raw": "google/gemma is temporarily rate-limited upstream. Please retry shortly, or add your own key"}}, "user_id": "user_1"}


def openrouter_pool(which: str, reset: str | None) -> dict[str, Any]:
    headers = {"X-RateLimit-Limit": "50", "X-RateLimit-Remaining": "0", **({"X-RateLimit-Reset": reset} if reset else {})}
    return err(f"Rate limit exceeded: {which}. Add 10 credits to unlock 1000 free model requests per day", code=429, metadata={"headers": headers})


#: preset, status, body, reason, scope, proven seconds (None: a guess).  The kind follows from the reason.
SHEETS: list[tuple[str, int, Any, str, str, float | None]] = [
    ("cerebras", 400, {"message": "tools and response_format", "type": "invalid_request_error", "code": "wrong_api_format"}, "bad_param", "", None),
    ("cerebras", 400, b"", "context_overflow", "", None),
    ("cerebras", 401, {"message": "Wrong API Key", "type": "invalid_request_error", "param": "api_key", "code": "wrong_api_key"}, "auth_invalid", "credential", None),
    ("cerebras", 402, {"code": "payment_required"}, "billing", "credential", None),
    ("cerebras", 404, {"message": "Model x does not exist or you do not have access to it.", "type": "not_found_error", "param": "model", "code": "model_not_found"}, "model_gone", "model", None),
    ("cerebras", 413, b"", "context_overflow", "", None),
    ("cerebras", 413, {"message": "too big"}, "context_overflow", "", None),
    ("cerebras", 429, {"message": "Requests per minute limit exceeded - too many requests sent.", "type": "too_many_requests_error", "param": "quota", "code": "request_quota_exceeded"}, "rate_minute", "route", None),
    ("cerebras", 429, {"message": "Tokens per minute limit exceeded - too many tokens processed.", "type": "too_many_tokens_error", "param": "quota", "code": "token_quota_exceeded"}, "rate_minute", "route", None),
    ("cerebras", 429, {"message": "Tokens per day limit exceeded - too many tokens processed.", "type": "too_many_tokens_error", "code": "token_quota_exceeded"}, "rate_day", "route", None),
    ("cerebras", 429, {"message": "We're experiencing high traffic right now! Please try again soon.", "type": "too_many_requests_error", "param": "queue", "code": "queue_exceeded"}, "model_capacity", "route", None),
    ("cerebras", 500, b"", "server_error", "route", None),
    ("cerebras", 503, b"", "server_error", "route", None),
    ("groq", 400, err("Tool call validation failed: ...", type="invalid_request_error", code="tool_use_failed", failed_generation="rate limit"), "tool_generation_failed", "", None),
    ("groq", 400, err("The model `x` has been decommissioned and is no longer supported.", type="invalid_request_error", code="model_decommissioned"), "model_gone", "model", 86400),
    ("groq", 400, err("Please reduce the length of the messages or completion.", type="invalid_request_error", param="messages", code="context_length_exceeded"), "context_overflow", "", None),
    ("groq", 400, err("'messages.1' : for 'role:assistant' the following must be satisfied[('messages.1' : property 'reasoning_content' is unsupported)]", type="invalid_request_error"), "bad_param", "", None),
    ("groq", 401, err("Invalid API Key", type="invalid_request_error", code="invalid_api_key"), "auth_invalid", "credential", None),
    ("groq", 403, err("The model is blocked at the organization level.", type="permissions_error", code="model_permission_blocked_org"), "permission_model", "route", None),
    ("groq", 404, err("The model `x` does not exist or you do not have access to it.", type="invalid_request_error", code="model_not_found"), "model_gone", "model", None),
    ("groq", 413, err(GROQ_TPM_413, type="tokens", code="rate_limit_exceeded"), "request_over_tpm", "", None),
    ("groq", 422, b"", "bad_request", "", None),
    ("groq", 424, b"", "server_error", "route", None),
    ("groq", 429, err(GROQ_TPD, type="tokens", code="rate_limit_exceeded"), "rate_day", "route", 578.016),
    ("groq", 429, err(GROQ_TPD.replace("day (TPD)", "minute (TPM)").replace("9m38.016s", "7.66s"), type="tokens", code="rate_limit_exceeded"), "rate_minute", "route", 7.66),
    ("groq", 429, err("Rate limit reached on tokens per minute (TPM): Limit 8000, Requested 9000.", type="tokens", code="rate_limit_exceeded"), "request_over_tpm", "", None),
    ("groq", 498, err("", type="capacity", code="capacity_exceeded"), "tier_capacity", "route", None),
    ("groq", 499, b"", "client_cancelled", "", None),
    ("groq", 500, b"", "server_error", "route", None),
    ("groq", 502, b"", "server_error", "route", None),
    ("groq", 503, b"", "server_error", "route", None),
    ("openrouter", 400, err("This endpoint's maximum context length is 131072 tokens. However, you requested about 250000 tokens", code=400), "context_overflow", "", None),
    ("openrouter", 400, err("Input length 9 exceeds the maximum allowed input length of 8 tokens", code=400), "context_overflow", "", None),
    ("openrouter", 400, err("too much", code=400, metadata={"error_type": "context_length_exceeded"}), "context_overflow", "", None),
    ("openrouter", 400, err("bad role", code=400), "bad_request", "", None),
    ("openrouter", 400, err("foo/bar is not a valid model ID", code=400), "model_gone", "model", 86400),
    ("openrouter", 401, err("No cookie auth credentials found", code=401), "auth_invalid", "credential", None),
    ("openrouter", 401, err("User not found.", code=401), "auth_invalid", "credential", None),
    ("openrouter", 402, err("This request requires more credits, or fewer max_tokens. You requested up to 64000 tokens, but can only afford 2666.", code=402), "billing", "credential", None),
    ("openrouter", 402, err("Insufficient credits. Add more using https://openrouter.ai/credits", code=402), "billing", "credential", None),
    ("openrouter", 403, err("Input flagged", code=403, metadata={"reasons": ["violence"], "flagged_input": "quota", "provider_name": "OpenAI"}), "content_policy", "", None),
    ("openrouter", 403, err("Key limit exceeded (total limit).", code=403), "billing", "credential", None),
    ("openrouter", 404, err("No endpoints found for foo/bar.", code=404), "model_gone", "model", None),
    ("openrouter", 404, err("No endpoints found matching your data policy", code=404), "model_gone", "model", None),
    ("openrouter", 404, err("No endpoints found that support tool use.", code=404), "capability_missing", "", None),
    ("openrouter", 408, err("Operation timed out. Please try again later.", code=408), "server_error", "route", None),
    ("openrouter", 413, err("Request payload too large", code=413), "payload_too_large", "", None),
    ("openrouter", 429, openrouter_pool("free-models-per-day", str(int((NOW + 7200) * 1000))), "rate_day", "credential", 7200.0),
    ("openrouter", 429, openrouter_pool("free-models-per-day", None), "rate_day", "credential", TO_UTC_MIDNIGHT),
    ("openrouter", 429, openrouter_pool("free-models-per-day-high-balance", None), "rate_day", "credential", TO_UTC_MIDNIGHT),
    ("openrouter", 429, openrouter_pool("free-models-per-min", str(int((NOW + 30) * 1000))), "rate_minute", "credential", 30.0),
    ("openrouter", 429, OPENROUTER_UPSTREAM, "model_capacity", "model", None),
    ("openrouter", 500, b"", "server_error", "route", None),
    ("openrouter", 502, err("Provider returned error", code=502), "server_error", "route", None),
    ("openrouter", 503, err("Service temporarily unavailable", code=503), "model_capacity", "route", None),
    ("openrouter", 524, err("Request timed out. Please try again later.", code=524), "server_error", "route", None),
    ("openrouter", 529, err("Provider returned error", code=529), "model_capacity", "route", None),
    ("gemini", 400, gemini(400, "INVALID_ARGUMENT", "API key not valid. Please pass a valid API key.", {"reason": "API_KEY_INVALID"}), "auth_invalid", "credential", None),
    ("gemini", 400, [gemini(400, "INVALID_ARGUMENT", "API key not valid. Please pass a valid API key.", {"reason": "API_KEY_INVALID"})], "auth_invalid", "credential", None),
    ("gemini", 400, gemini(400, "INVALID_ARGUMENT", "The input token count (1250074) exceeds the maximum number of tokens allowed (1048576)."), "context_overflow", "", None),
    ("gemini", 400, gemini(400, "FAILED_PRECONDITION", "User location is not supported for the API use."), "region_blocked", "provider", None),
    ("gemini", 400, gemini(400, "INVALID_ARGUMENT", 'Invalid JSON payload received. Unknown name "seed": Cannot find field.'), "bad_param", "", None),
    ("gemini", 401, gemini(401, "UNAUTHENTICATED", "Request had invalid authentication credentials.", {"reason": "ACCESS_TOKEN_TYPE_UNSUPPORTED"}), "auth_invalid", "credential", None),
    ("gemini", 403, gemini(403, "PERMISSION_DENIED"), "auth_invalid", "credential", None),
    ("gemini", 404, gemini(404, "NOT_FOUND", "models/nope is not found for API version v1beta, or is not supported for generateContent."), "model_gone", "model", None),
    ("gemini", 429, gemini(429, "RESOURCE_EXHAUSTED", GEMINI_QUOTA, *quota("GenerateRequestsPerDayPerProjectPerModel-FreeTier")), "rate_day", "route", TO_PACIFIC_MIDNIGHT),
    ("gemini", 429, [gemini(429, "RESOURCE_EXHAUSTED", GEMINI_QUOTA, *quota("GenerateRequestsPerDayPerProjectPerModel-FreeTier"))], "rate_day", "route", TO_PACIFIC_MIDNIGHT),
    ("gemini", 429, gemini(429, "RESOURCE_EXHAUSTED", GEMINI_QUOTA, *quota("GenerateRequestsPerMinutePerProjectPerModel-FreeTier")), "rate_minute", "route", 54.058356943),
    ("gemini", 429, gemini(429, "RESOURCE_EXHAUSTED", GEMINI_QUOTA), "rate_minute", "route", 54.058356943),
    ("gemini", 429, gemini(429, "RESOURCE_EXHAUSTED", GEMINI_QUOTA.replace("limit: 20", "limit: 0"), *quota("GenerateRequestsPerDay", "0")), "permission_model", "route", None),
    ("gemini", 429, gemini(429, "RESOURCE_EXHAUSTED", "Resource has been exhausted (e.g. check quota)."), "model_capacity", "route", None),
    ("gemini", 499, b"", "client_cancelled", "", None),
    ("gemini", 500, gemini(500, "INTERNAL"), "server_error", "route", None),
    ("gemini", 503, gemini(503, "UNAVAILABLE", "The model is overloaded. Please try again later."), "model_capacity", "route", None),
    ("gemini", 504, gemini(504, "DEADLINE_EXCEEDED"), "server_error", "route", None),
    ("openai", 400, err("Invalid 'messages[3]'. Content blocks are expected to be either text or image_url type.", type="invalid_request_error", param="messages[3]", code="invalid_value"), "bad_request", "", None),
    ("openai", 400, err("Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.", type="invalid_request_error", param="max_tokens", code="unsupported_parameter"), "bad_param", "", None),
    ("openai", 400, err("Your input exceeds the context window of this model. Please adjust your input and try again.", type="invalid_request_error", code="context_length_exceeded"), "context_overflow", "", None),
    ("openai", 400, err("Invalid 'messages[0].content': string too long.", param="messages[0].content", code="string_above_max_length"), "context_overflow", "", None),
    ("openai", 400, err("Invalid 'user': string too long.", param="user", code="string_above_max_length"), "bad_request", "", None),
    ("openai", 400, err(code="content_policy_violation"), "content_policy", "", None),
    ("openai", 400, err("The requested model 'x' does not exist.", param="model", code="model_not_found"), "model_gone", "model", 86400),
    ("openai", 401, err("Incorrect API key provided: sk-.", type="invalid_request_error", param=None, code="invalid_api_key"), "auth_invalid", "credential", None),
    ("openai", 403, err("Country, region, or territory not supported", type="request_forbidden", code="unsupported_country_region_territory"), "region_blocked", "provider", None),
    ("openai", 404, err("The model `x` does not exist or you do not have access to it.", type="invalid_request_error", param=None, code="model_not_found"), "model_gone", "model", None),
    ("openai", 404, err("This is not a chat model and thus not supported in the v1/chat/completions endpoint."), "endpoint_unsupported", "model", None),
    ("openai", 429, err("You exceeded your current quota, please check your plan and billing details.", type="insufficient_quota", param=None, code="insufficient_quota"), "billing", "credential", None),
    ("openai", 429, err("Rate limit reached for gpt on tokens per min (TPM): Limit 30000, Used 20000, Requested 12000. Please try again in 4s.", type="tokens", code="rate_limit_exceeded"), "rate_minute", "route", 4.0),
    ("openai", 429, err("Rate limit reached for gpt on requests per day (RPD): Limit 200, Used 200, Requested 1. Please try again in 7m12s.", type="requests", code="rate_limit_exceeded"), "rate_day", "route", 432.0),
    ("openai", 429, err("Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 342389. The input or output tokens must be reduced.", type="tokens", code="rate_limit_exceeded"), "request_over_tpm", "", None),
    ("openai", 500, b"", "server_error", "route", None),
    ("openai", 502, b"", "server_error", "route", None),
    ("openai", 503, err("The server is currently overloaded with other requests.", type="server_error"), "model_capacity", "route", None),
    ("openai", 504, b"", "server_error", "route", None),
    ("anthropic", 400, anthropic("invalid_request_error", "prompt is too long: 3333404 tokens > 200000 maximum"), "context_overflow", "", None),
    ("anthropic", 400, anthropic("invalid_request_error", "input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000"), "context_overflow", "", None),
    ("anthropic", 400, anthropic("invalid_request_error", "Your credit balance is too low to access the Anthropic API."), "billing", "credential", None),
    ("anthropic", 400, anthropic("invalid_request_error", "temperature: Extra inputs are not permitted"), "bad_param", "", None),
    ("anthropic", 400, anthropic("invalid_request_error", "This model does not support effort level 'xhigh'."), "bad_param", "", None),
    ("anthropic", 400, anthropic("invalid_request_error", "messages: at least one message is required"), "bad_request", "", None),
    ("anthropic", 401, anthropic("authentication_error", "invalid x-api-key"), "auth_invalid", "credential", None),
    ("anthropic", 402, anthropic("billing_error"), "billing", "credential", None),
    ("anthropic", 403, anthropic("permission_error"), "permission_model", "route", None),
    ("anthropic", 404, anthropic("not_found_error", "model: claude-does-not-exist"), "model_gone", "model", None),
    ("anthropic", 408, anthropic("timeout_error"), "server_error", "route", None),
    ("anthropic", 409, anthropic("conflict_error"), "server_error", "route", None),
    ("anthropic", 413, anthropic("request_too_large", "Request exceeds the maximum size"), "payload_too_large", "", None),
    ("anthropic", 429, anthropic("rate_limit_error", "This request would exceed your organization's rate limit of 30,000 input tokens per minute"), "rate_minute", "route", None),
    ("anthropic", 500, anthropic("api_error", "Internal server error"), "server_error", "route", None),
    ("anthropic", 504, anthropic("timeout_error"), "server_error", "route", None),
    ("anthropic", 529, anthropic("overloaded_error", "Overloaded"), "model_capacity", "route", None),
    ("huggingface", 400, err("The requested model 'x' is not supported by any provider you have enabled.", type="invalid_request_error", param="model", code="model_not_supported"), "model_gone", "model", None),
    ("huggingface", 401, {"error": "Invalid username or password."}, "auth_invalid", "credential", None),
    ("huggingface", 402, {"error": "You have depleted your monthly included credits. Purchase pre-paid credits to continue using Inference Providers."}, "billing", "credential", None),
    ("huggingface", 402, {"error": "You have reached the free monthly usage limit for groq."}, "billing", "credential", None),
    ("huggingface", 403, {"error": "This authentication method does not have sufficient permissions to call Inference Providers on behalf of user x"}, "auth_invalid", "credential", None),
    ("huggingface", 404, b"", "model_gone", "model", None),
    ("huggingface", 429, b"", "rate_minute", "route", None),
    ("huggingface", 500, b"", "server_error", "route", None),
    ("huggingface", 503, b"", "server_error", "route", None),
    ("ollama", 400, err("prompt too long; exceeded max context length by 1119046 tokens (ref: 1)", type="invalid_request_error", param=None, code=None), "context_overflow", "", None),
    ("ollama", 400, err("registry.ollama.ai/library/gemma3:1b does not support tools", type="api_error"), "capability_missing", "", None),
    ("ollama", 404, {"error": "model 'nonexistent-model:latest' not found"}, "model_gone", "model", None),
    ("ollama", 503, {"error": "server busy, please try again.  maximum pending requests exceeded"}, "model_capacity", "route", None),
    ("ollama-cloud", 401, {"error": "unauthorized"}, "auth_invalid", "credential", None),
    ("ollama-cloud", 402, b"", "billing", "credential", None),
    ("ollama-cloud", 403, anthropic("permission_error", "this model requires a subscription, upgrade for access: ..."), "permission_model", "route", None),
    ("ollama-cloud", 429, {"error": "you (NAME) have reached your session usage limit, upgrade for higher limits: ..."}, "rate_day", "credential", None),
    ("ollama-cloud", 429, {"error": "you've reached your hourly usage limit"}, "rate_day", "credential", None),
    ("ollama-cloud", 502, b"", "server_error", "route", None),
    ("ollama-cloud", 503, b"", "server_error", "route", None),
    ("github-copilot", 400, err("prompt token count of 9000 exceeds the limit of 8000", code="model_max_prompt_tokens_exceeded"), "context_overflow", "", None),
    ("github-copilot", 400, err("model is not accessible via the /chat/completions endpoint", code="unsupported_api_for_model"), "endpoint_unsupported", "model", None),
    ("github-copilot", 400, err("The requested model is not supported.", code="model_not_supported"), "model_gone", "model", None),
    ("github-copilot", 401, "unauthorized: token expired", "auth_refreshable", "credential", None),
    ("github-copilot", 402, err(code="quota_exceeded"), "billing", "credential", None),
    ("github-copilot", 403, b"", "permission_model", "route", None),
    ("github-copilot", 413, {"message": "failed to parse request", "code": ""}, "context_overflow", "", None),
    ("github-copilot", 429, err("Sorry, you've exceeded your weekly rate limit. Try again in 2 days.", code="user_weekly_rate_limited"), "rate_day", "credential", 2 * DAY),
    ("github-copilot", 429, err("You've hit your global rate limit. Please wait 6 seconds before trying again.", code="user_global_rate_limited"), "rate_minute", "credential", 6.0),
    ("github-copilot", 500, b"", "server_error", "route", None),
    ("deepseek", 400, err("This model's maximum context length is 1048565 tokens. However, you requested 1250025 tokens.", type="invalid_request_error", code="invalid_request_error"), "context_overflow", "", None),
    ("deepseek", 401, err("Authentication Fails, Your api key: ****-key is invalid", type="authentication_error", param=None, code="invalid_request_error"), "auth_invalid", "credential", None),
    ("deepseek", 402, err("Insufficient Balance", type="unknown_error", param=None, code="invalid_request_error"), "billing", "credential", None),
    ("deepseek", 422, b"", "bad_request", "", None),
    ("deepseek", 429, b"", "rate_minute", "credential", None),
    ("deepseek", 500, b"", "server_error", "route", None),
    ("deepseek", 503, b"", "model_capacity", "route", None),
    ("mistral", 400, {"message": "Prompt contains 300000 tokens and 0 draft tokens, too large for model with 131072 maximum context length"}, "context_overflow", "", None),
    ("mistral", 401, {"message": "Unauthorized", "request_id": "1"}, "auth_invalid", "credential", None),
    ("mistral", 422, MISTRAL_EXTRA, "bad_param", "", None),
    ("mistral", 422, {"detail": [{"type": "missing", "loc": ["body", "messages"], "msg": "Field required", "input": {}}]}, "bad_request", "", None),
    ("mistral", 429, {"object": "error", "message": "Rate limit exceeded", "type": "rate_limited", "param": None, "code": "1300", "raw_status_code": 429}, "rate_minute", "credential", None),
    ("mistral", 429, {"message": "Requests rate limit exceeded"}, "rate_minute", "credential", None),
    ("mistral", 429, {"object": "error", "message": "Service tier capacity exceeded for this model.", "type": "service_tier_capacity_exceeded", "code": "3505"}, "model_capacity", "route", None),
    ("mistral", 503, {"object": "error", "message": "Service tier capacity exceeded for this model.", "type": "invalid_request_error", "code": "3505"}, "model_capacity", "route", None),
    ("xai", 400, {"code": "invalid-argument", "error": "Incorrect API key provided. You can obtain an API key from https://console.x.ai."}, "auth_invalid", "credential", None),
    ("xai", 400, {"error": "This model's maximum prompt length is 131072 but the request contains 537812 tokens."}, "context_overflow", "", None),
    ("xai", 403, {"error": "Your team 1 has either used all available credits or reached its monthly spending limit."}, "billing", "credential", None),
    ("xai", 429, {"error": "Your team 1 has either used all available credits or reached its monthly spending limit."}, "billing", "credential", None),
    ("xai", 404, b"", "model_gone", "model", None),
    ("xai", 429, b"", "rate_minute", "credential", None),
    ("together", 400, err("Unable to access non-serverless model", code="model_not_available"), "model_gone", "model", None),
    ("together", 400, err("The input (9 tokens) is longer than the model's context length (8 tokens)."), "context_overflow", "", None),
    ("together", 401, b"", "auth_invalid", "credential", None),
    ("together", 402, b"", "billing", "credential", None),
    ("together", 429, err("You have been rate limited. Your rate limit is 60 queries per minute.", type="credit_limit", param=None, code=None), "rate_minute", "credential", None),
    ("together", 503, b"", "model_capacity", "route", None),
    ("fireworks", 401, b"", "auth_invalid", "credential", None),
    ("fireworks", 404, err("Model not found, inaccessible, and/or not deployed", code="NOT_FOUND"), "model_gone", "model", None),
    ("fireworks", 412, err("Account x is suspended, possibly due to reaching the monthly spending limit or failure to pay past invoices.", code="PRECONDITION_FAILED", type="error"), "billing", "credential", None),
    ("fireworks", 429, {"error": "Too Many Requests", "message": "You have exceeded your usage limits."}, "rate_minute", "credential", None),
    ("fireworks", 500, b"", "model_capacity", "route", None),
    ("fireworks", 503, b"", "model_capacity", "route", None),
    ("nvidia", 401, {"status": 401, "title": "Unauthorized", "detail": "Authentication failed"}, "auth_invalid", "credential", None),
    ("nvidia", 402, b"", "billing", "credential", None),
    ("nvidia", 403, {"status": 403, "title": "Forbidden", "detail": "Authorization failed"}, "auth_invalid", "credential", None),
    ("nvidia", 404, {"status": 404, "title": "Not Found", "detail": "Function 'x': Not found for account 'y'"}, "model_gone", "model", None),
    ("nvidia", 410, {"detail": "The model 'minimaxai/minimax-m2.7' has reached its end of life on 2026-07-27T00:00:00Z and is no longer available."}, "model_gone", "model", 86400),
    ("nvidia", 429, {"status": 429, "title": "Too Many Requests"}, "rate_minute", "credential", None),
    ("nvidia", 500, {"detail": "ResourceExhausted: worker queue"}, "model_capacity", "route", None),
    ("nvidia", 500, b"", "server_error", "route", None),
    ("nvidia", 503, b"", "model_capacity", "route", None),
    ("nvidia", 504, b"", "model_capacity", "route", None),
    ("sambanova", 401, b"", "auth_invalid", "credential", None),
    ("sambanova", 402, b"", "billing", "credential", None),
    ("sambanova", 404, b"", "model_gone", "model", None),
    ("sambanova", 410, b"", "model_gone", "model", 86400),
    ("sambanova", 429, err("Rate limit exceeded", type="rate_limit_exceeded", param=None, code=None), "rate_minute", "credential", None),
    ("github-models", 410, b"", "provider_gone", "provider", None),
    ("cloudflare", 401, {"success": False, "errors": [{"code": 10000, "message": "Authentication error"}]}, "auth_invalid", "credential", None),
    ("cloudflare", 403, {"success": False, "errors": [{"code": 10000, "message": "Authentication error"}]}, "auth_invalid", "credential", None),
    ("cloudflare", 429, {"errors": [{"code": 4006, "message": "you have used up your daily free allocation of 10,000 neurons, please upgrade to Cloudflare's Workers Paid plan"}]}, "rate_day", "credential", TO_UTC_MIDNIGHT),
    ("cloudflare", 429, {"errors": [{"code": 3040, "message": "Capacity temporarily exceeded, please try again."}]}, "model_capacity", "route", None),
    ("cloudflare", 400, {"result": None, "success": False, "errors": [{"code": 5007, "message": "No such model @cf/x"}], "messages": []}, "model_gone", "model", 86400),
    ("cloudflare", 404, {"errors": [{"code": 5007, "message": "No such model @cf/x"}]}, "model_gone", "model", 86400),
    ("zai", 401, err(code="1001"), "auth_invalid", "credential", None),
    ("zai", 429, err("Insufficient balance or no resource package. Please recharge.", code="1113"), "billing", "credential", None),
    ("zai", 429, {"type": "error", "error": {"type": "rate_limit_error", "message": "[1113][Please recharge][id1]"}}, "billing", "credential", None),
    ("zai", 429, err("High concurrency usage of this API, please reduce concurrency or contact customer service to increase limits", code="1302"), "rate_minute", "credential", None),
    ("zai", 429, err(code="1305"), "model_capacity", "route", None),
    ("zai", 429, err("Usage limit reached for 5 hour. Your limit will reset at 2026-11-21 20:06:00", code="1308"), "rate_day", "credential", 8 * 3600.0 + 360.0),
    ("zai", 429, err("Weekly limit. Your limit will reset at 2026-11-26 12:00:00", code="1310"), "rate_day", "credential", 5 * DAY),
    ("zai", 400, err("Prompt too long", code="1261"), "context_overflow", "", None),
    ("zai", 400, err("Unknown Model, please check the model code.", code="1211"), "model_gone", "model", 86400),
    ("zai", 400, err(code="1301"), "content_policy", "", None),
    ("moonshot", 400, err("Your request exceeded model token limit: 8192 (requested: 9000)", type="invalid_request_error"), "context_overflow", "", None),
    ("moonshot", 401, err(type="invalid_authentication_error"), "auth_invalid", "credential", None),
    ("moonshot", 403, err("Your account x is not active, organization y exceeded current quota, please check your plan and billing details", type="exceeded_current_quota_error"), "billing", "credential", None),
    ("moonshot", 429, err("Your account x is not active, organization y exceeded current quota, please check your plan and billing details", type="exceeded_current_quota_error"), "billing", "credential", None),
    ("moonshot", 429, err("Your account x request reached max organization concurrency: 1, please try again after 1 seconds", type="rate_limit_reached_error"), "rate_minute", "credential", 1.0),
    ("moonshot", 429, err("Your account x request reached organization TPD rate limit, current: 1500001", type="rate_limit_reached_error"), "rate_day", "credential", None),
    ("moonshot", 429, err("The engine is currently overloaded, please try again later", type="engine_overloaded_error"), "model_capacity", "route", None),
    ("minimax", 401, {"type": "error", "error": {"type": "authorized_error", "message": "login fail: wrong key (1004)"}}, "auth_invalid", "credential", None),
    ("minimax", 400, {"base_resp": {"status_code": 2049, "status_msg": "invalid api key"}}, "auth_invalid", "credential", None),
    ("minimax", 429, {"error": {"http_code": "429", "message": "insufficient balance (1008)", "type": "insufficient_balance_error"}}, "billing", "credential", None),
    ("minimax", 500, {"error": {"http_code": "500", "message": "insufficient balance (1008)", "type": "insufficient_balance_error"}}, "billing", "credential", None),
    ("minimax", 429, {"type": "error", "error": {"type": "rate_limit_error", "message": "usage limit exceeded, 5-hour usage limit reached for Token Plan Starter (0/0 used), resets at 2026-11-21T15:00:00Z (2056)"}}, "rate_day", "credential", 11 * 3600.0),
    ("minimax", 429, err("rate limit (1002)"), "rate_minute", "credential", None),
    ("minimax", 429, err("token limit (1039)"), "rate_minute", "credential", None),
    ("minimax", 400, err("invalid params, context window exceeds limit (2013)"), "context_overflow", "", None),
    ("minimax", 500, err("unknown error, 999 (1000)"), "server_error", "route", None),
    ("minimax", 500, err("internal (1013)"), "server_error", "route", None),
    ("qwen", 400, err("Range of input length should be [1, 129024]", code="invalid_parameter_error"), "context_overflow", "", None),
    ("qwen", 400, err(code="data_inspection_failed"), "content_policy", "", None),
    ("qwen", 401, err("Incorrect API key provided.", type="invalid_request_error", code="invalid_api_key"), "auth_invalid", "credential", None),
    ("qwen", 403, err("Free quota used.", code="AllocationQuota.FreeTierOnly"), "billing", "route", None),
    ("qwen", 429, err("You exceeded your current quota, please check your plan and billing details. See error-code#token-limit", type="insufficient_quota", code="insufficient_quota"), "rate_minute", "credential", None),
    ("lmstudio", 400, {"error": "Trying to keep the first 9 tokens, number of tokens to keep from the initial prompt is greater than the context length"}, "context_overflow", "", None),
    ("vllm", 400, err("Input length (265330) exceeds model's maximum context length (262144).", type="BadRequestError", code=400), "context_overflow", "", None),
    ("vllm", 404, err("The model `x` does not exist.", type="NotFoundError", code=404), "model_gone", "model", None),
    ("openai", 400, err("max_tokens is too large: 100000. This model supports at most 16384 completion tokens.", param="max_tokens", code="invalid_value"), "bad_value", "", None),
    ("deepseek", 400, err("Invalid max_tokens value, the valid range of max_tokens is [1, 8192]", code="invalid_request_error"), "bad_value", "", None),
    ("groq", 400, err("`max_tokens` must be less than or equal to `32768`, the maximum value for `max_tokens` is less than the `context_window` for this model"), "bad_value", "", None),
    ("anthropic", 400, anthropic("invalid_request_error", "max_tokens: 100000 > 64000, which is the maximum allowed number of output tokens for claude-x"), "bad_value", "", None),
    ("mistral", 422, {"detail": [{"type": "less_than_equal", "loc": ["body", "temperature"], "msg": "Input should be less than or equal to 1.5"}]}, "bad_value", "", None),
    ("qwen", 400, err("Range of max_tokens should be [1, 8192]", code="invalid_parameter_error"), "bad_value", "", None),
    ("vllm", 400, err('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set', type="BadRequestError", code=400), "capability_missing", "", None),
    ("llamacpp", 400, {"error": {"code": 400, "message": "the request exceeds the available context size, try increasing it", "type": "exceed_context_size_error"}}, "context_overflow", "", None),
    ("llamacpp", 503, err("Loading model", type="unavailable_error", code=503), "model_capacity", "route", None),
    ("llamacpp", 500, err("Failed to parse tool call arguments as JSON: ..."), "tool_generation_failed", "", None),
    # no preset: status alone, and pages of things on the way
    ("", 302, b"", "server_error", "route", None),
    ("", 307, "moved", "server_error", "route", None),
    ("", 400, b"", "bad_request", "", None),
    ("", 400, "<html><body>Bad Request</body></html>", "server_error", "route", None),
    ("", 401, b"", "auth_invalid", "credential", None),
    ("", 402, b"", "billing", "credential", None),
    ("", 403, b"", "auth_invalid", "credential", None),
    ("", 403, "<!DOCTYPE html><title>Attention Required</title>", "server_error", "route", None),
    ("", 404, "<html>404</html>", "model_gone", "model", None),
    ("", 405, b"", "endpoint_unsupported", "model", None),
    ("", 408, b"", "server_error", "route", None),
    ("", 409, b"", "server_error", "route", None),
    ("", 410, b"", "model_gone", "model", 86400),
    ("", 412, b"", "billing", "credential", None),
    ("", 413, "<html>413 Request Entity Too Large</html>", "payload_too_large", "", None),
    ("", 415, b"", "bad_request", "", None),
    ("", 418, b"", "server_error", "route", None),
    ("", 422, b"", "bad_request", "", None),
    ("", 424, b"", "server_error", "route", None),
    ("", 425, b"", "server_error", "route", None),
    ("", 429, b"", "rate_minute", "credential", None),
    ("", 429, gemini(429, "RESOURCE_EXHAUSTED", "slow"), "rate_minute", "credential", None),
    ("", 429, "slow down", "rate_minute", "credential", None),
    ("", 451, b"", "region_blocked", "provider", None),
    ("", 498, b"", "tier_capacity", "credential", None),
    ("", 499, b"", "client_cancelled", "", None),
    ("", 500, b"", "server_error", "route", None),
    ("", 500, err("queue is at capacity"), "model_capacity", "route", None),
    ("", 500, err("rate limited", type="rate_limit_error"), "rate_minute", "credential", None),
    ("", 502, "<html><head><title>502 Bad Gateway</title></head></html>", "server_error", "route", None),
    ("", 503, b"", "model_capacity", "route", None),
    ("", 504, b"", "server_error", "route", None),
    ("", 520, b"", "server_error", "route", None),
    ("", 527, b"", "server_error", "route", None),
    ("", 529, b"", "model_capacity", "route", None),
    ("", 530, b"", "server_error", "route", None),
    ("", 999, b"", "server_error", "route", None),
    ("", 204, b"", "empty_answer", "route", None),
    ("", 200, "<html>welcome</html>", "not_json", "route", None),
    ("", 400, err("max context? context_length_exceeded, tokens per minute rate limit"), "bad_request", "", None),
]


@pytest.mark.parametrize(("preset", "status", "body", "reason", "scope", "proven_s"), SHEETS)
def test_every_row_of_the_provider_sheets(preset: str, status: int, body: Any, reason: str, scope: str, proven_s: float | None) -> None:
    failure = judge(preset, status, body)
    assert (failure.reason, failure.scope, failure.kind, failure.status) == (reason, scope, ac.REASONS[reason].kind, status)
    assert failure.proven == (proven_s is not None)
    if proven_s is not None:
        assert failure.cool_s == pytest.approx(proven_s)


def test_every_reason_has_a_rule_and_a_scope_routes_know() -> None:
    for name, reason in ac.REASONS.items():
        assert reason.kind in ac.FAILURE_RULES, name
        assert reason.scope in {"", "bucket", *ac.SCOPES}, name
        assert (reason.first_cool_s or 0) <= 600, name
        if not ac.FAILURE_RULES[reason.kind].scope:
            assert not reason.scope, f"{name} cools although its kind does not"


def test_the_rules_are_those_of_the_design() -> None:
    stops = {kind for kind, rule in ac.FAILURE_RULES.items() if not rule.goes_on}
    again = {kind for kind, rule in ac.FAILURE_RULES.items() if rule.again}
    assert (stops, again) == ({"request", "parameter"}, {"server"})
    guesses = {kind: (rule.scope, rule.first_cool_s, rule.cap_s) for kind, rule in ac.FAILURE_RULES.items()}
    assert guesses["rate"][1:] == (1, 600) and guesses["server"] == ("route", 5, 600) and guesses["network"] == ("provider", 5, 600)
    assert guesses["credential"] == guesses["payment"] == ("credential", 3600, 3600)
    assert all(rule.cap_s <= 600 for kind, rule in ac.FAILURE_RULES.items() if kind not in ("credential", "payment"))


@pytest.mark.parametrize(("bucket", "scope"), [("model", "route"), ("account", "credential"), ("machine", "credential")])
def test_a_rate_limit_cools_what_the_limit_counts(bucket: str, scope: str) -> None:
    assert ac.classify("x", bucket, 429, {}, b"", utc=NOW).scope == scope


@pytest.mark.parametrize(("preset", "status", "body", "cool_s"), [
    ("ollama", 410, b"", None),
    ("groq", 404, err("no such thing"), None),
    ("ollama-cloud", 429, {"error": "weekly limit"}, 600.0),
    ("groq", 429, b"", None),
    ("", 401, b"", None),
    ("github-copilot", 401, b"", 60.0),
])
def test_a_first_guess_of_its_own(preset: str, status: int, body: Any, cool_s: float | None) -> None:
    failure = judge(preset, status, body)
    assert (failure.cool_s, failure.proven) == (cool_s, False)


def test_the_provider_may_overrule_its_status() -> None:
    assert judge("openai", 400, err("odd"), {"x-should-retry": "true"}).kind == "server"
    assert judge("openai", 400, err("odd"), {"x-should-retry": "false"}).kind == "request"


@pytest.mark.parametrize(("preset", "status", "body", "param"), [
    ("mistral", 422, MISTRAL_EXTRA, "max_completion_tokens"),
    ("openai", 400, err("Unsupported value: 'temperature' does not support 0.2 with this model.", param="temperature", code="unsupported_value"), "temperature"),
    ("openai", 400, err("Unknown parameter: 'foo'.", param="foo", code="unknown_parameter"), "foo"),
    ("openai", 400, err("Web search options not supported with this model.", param="web_search_options", code=None), "web_search_options"),
    ("groq", 400, err("'messages.1' : property 'reasoning_content' is unsupported"), "reasoning_content"),
    ("gemini", 400, gemini(400, "INVALID_ARGUMENT", 'Invalid JSON payload received. Unknown name "seed": Cannot find field.'), "seed"),
    ("anthropic", 400, anthropic("invalid_request_error", "metadata.x: Extra inputs are not permitted"), "metadata.x"),
    ("xai", 400, {"code": "invalid-argument", "error": "Argument not supported on this model: presencePenalty"}, "presencePenalty"),
])
def test_a_field_the_provider_does_not_know_is_named(preset: str, status: int, body: Any, param: str) -> None:
    failure = judge(preset, status, body)
    assert (failure.kind, failure.reason, failure.param) == ("parameter", "bad_param", param)


# resets --------------------------------------------------------------------------------------------------------------

def reset(headers: dict[str, str] | None = None, text: str = "", body: Any = None) -> float | None:
    return ac.read_reset(headers or {}, body, text, utc=NOW)


def at(seconds: float, form: str = "%Y-%m-%dT%H:%M:%SZ") -> str:
    return datetime.fromtimestamp(NOW + seconds, timezone.utc).strftime(form)


@pytest.mark.parametrize(("headers", "seconds"), [
    ({"retry-after": "12"}, 12),
    ({"retry-after": " 11.38 "}, 11.38),
    ({"retry-after": format_datetime(datetime.fromtimestamp(NOW + 90, timezone.utc), usegmt=True)}, 90),
    ({"retry-after": "Saturday, 21-Nov-26 04:01:00 GMT"}, 60),
    ({"retry-after-ms": "1500"}, 1.5),
    ({"retry-after-ms": "0", "retry-after": "1"}, 1),
    ({"retry-after": "7.66s"}, 7.66),
    ({"retry-after": at(30)}, 30),
    ({"retry-after": str(int(NOW + 40))}, 40),
    ({"x-ratelimit-user-retry-after": "33"}, 33),
    ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "2m59.56s"}, 179.56),
    ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"}, 360),
    ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1h2m3s"}, 3723),
    ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "12ms"}, 0.012),
    ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "500us"}, 0.0005),
    ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "0s"}, None),
    ({"x-ratelimit-remaining-tokens": "7", "x-ratelimit-reset-tokens": "9s"}, None),
    ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "9s", "x-ratelimit-remaining-requests": "5", "x-ratelimit-reset-requests": "6h"}, 9),
    ({"x-ratelimit-remaining-tokens": "-3", "x-ratelimit-reset-tokens": "9s"}, 9),
    ({"x-ratelimit-remaining-requests-day": "0", "x-ratelimit-reset-requests-day": "33011.382867097855"}, 33011.382867097855),
    ({"x-ratelimit-remaining-tokens-minute": "0", "x-ratelimit-reset-tokens-minute": "11.38"}, 11.38),
    ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": str(int((NOW + 50) * 1000))}, 50),
    ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": str(int(NOW + 50))}, 50),
    ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "2"}, 2),
    ({"ratelimitbysize-remaining": "0", "ratelimitbysize-reset": "37"}, 37),
    ({"anthropic-ratelimit-requests-remaining": "0", "anthropic-ratelimit-requests-reset": at(20)}, 20),
    ({"anthropic-ratelimit-input-tokens-remaining": "0", "anthropic-ratelimit-input-tokens-reset": at(25), "retry-after": "24"}, 24),     # the reset is when all of it is back
    ({"x-ratelimit-reset-requests": "5h", "x-ratelimit-reset-tokens": "8s"}, 8),
    ({"retry-after": "3", "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"}, 3),
    ({"retry-after": "3", "x-ratelimit-remaining-requests-day": "0", "x-ratelimit-reset-requests-day": "6m0s"}, 360),     # a window of which the name says so
    ({"retry-after": "-5"}, None),
    ({"retry-after": "0"}, None),
    ({"retry-after": "soon"}, None),
    ({"retry-after": ""}, None),
    ({"retry-after": "NaN"}, None),
    ({"retry-after": "inf"}, None),
    ({"retry-after": "1_000"}, None),
    ({"retry-after": "999999999"}, None),
    ({"retry-after": "9" * 300}, None),
    ({"retry-after": "9999999999"}, None),
    ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, None),
    ({"retry-after": "Wed, 99 Foo 20266 07:28:00 GMT"}, None),
    ({"retry-after": "0000-00-00T00:00:00Z"}, None),
    ({"retry-after-ms": "x"}, None),
    ({"retry-after": str(int(DAY))}, DAY),
    ({"retry-after": str(int(DAY) + 1)}, None),
    ({}, None),
])
def test_reset_in_headers(headers: dict[str, str], seconds: float | None) -> None:
    found = reset(headers)
    assert found == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(("text", "seconds"), [
    ("Please try again in 9m38.016s.", 578.016),
    ("Please retry in 54.05s.", 54.05),
    ("Please try again in 4s. Visit", 4),
    ("Please try again in 6ms.", 0.006),
    ("try again in 2 hours", 7200),
    ("try again in 1 hour and 5 minutes", 3900),
    ("your weekly limit resets in 13 days", 13 * DAY),
    ("Please wait 6 seconds before", 6),
    ("wait 2 minutes, 30 seconds", 150),
    ("please try again after 1 seconds", 1),
    ("Retry after 20 secs", 20),
    ("Your limit will reset at 2026-11-21 13:00:00", 3600),
    ("您的限额将在 2026-11-21 13:00:00 重置", 3600),
    ("resets at 2026-11-21T15:00:00Z (2056)", 39600),
    ("resets at 2026-11-21 15:00:00 UTC", 39600),
    ("available again at 2026-11-21T06:00:00+01:00", 3600),
    ("monthly quota resets in 31 days", 31 * DAY),
    ("monthly quota resets in 40 days", None),
    ("try again in 48 hours", None),
    ("weekly limit, try again in 48 hours", 2 * DAY),
    ("try again in -5 seconds, retry in 0s", None),
    ("Your rate limit is 60 queries per minute", None),
    ("Requested 12000 tokens, please wait", None),
    ("resets at 2020-01-01T00:00:00Z", None),
    ("resets at 2026-99-99T00:00:00Z", None),
    ("try again later", None),
    ("", None),
])
def test_reset_in_words(text: str, seconds: float | None) -> None:
    found = reset(text=text)
    assert found == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(("body", "headers", "seconds"), [
    (gemini(429, "R", "", {"retryDelay": "39s"}), {}, 39),
    ([gemini(429, "R", "", {"retryDelay": "54.058356943s"})], {}, 54.058356943),
    (gemini(429, "R", "", {"retryDelay": "39s"}), {"retry-after": "50"}, 50),
    (gemini(429, "R", "", {"retryDelay": "39s"}), {"retry-after": "5"}, 39),
    (gemini(429, "R", "", *quota("GenerateRequestsPerDay")), {"retry-after": "5"}, TO_PACIFIC_MIDNIGHT),
    (err("x", retry_after=7), {}, 7),
    (err("x", retry_after_seconds=7.5), {}, 7.5),
    (openrouter_pool("free-models-per-day", None), {}, TO_UTC_MIDNIGHT),
    (openrouter_pool("free-models-per-day", str(int((NOW + 99) * 1000))), {}, 99),
    (openrouter_pool("free-models-per-day", "junk"), {}, TO_UTC_MIDNIGHT),
    ({"errors": [{"code": 4006, "message": "x"}]}, {}, TO_UTC_MIDNIGHT),
    ({"errors": [{"code": 4006, "message": "x"}]}, {"retry-after": "60"}, 60),
    (err("x", metadata={"headers": "junk"}), {}, None),
    (gemini(429, "R", "", {"retryDelay": True}), {}, None),
])
def test_reset_in_bodies(body: Any, headers: dict[str, str], seconds: float | None) -> None:
    found = reset(headers, body=body)
    assert found == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(("now", "hours"), [
    ("2026-11-21T04:00:00", 4), ("2026-11-21T07:59:59", 1 / 3600), ("2026-11-21T08:00:00", 24),
    ("2026-07-01T06:30:00", 0.5), ("2026-07-01T07:30:00", 23.5),
    ("2026-03-08T07:00:00", 1), ("2026-03-08T09:00:00", 22), ("2026-03-09T06:59:00", 1 / 60),      # the day is 23 hours long
    ("2026-11-01T06:00:00", 1), ("2026-11-01T07:30:00", 24.5), ("2026-11-02T07:30:00", 0.5),       # the day is 25 hours long
    ("2026-12-31T23:00:00", 9), ("2027-01-01T00:30:00", 7.5),
])
def test_the_next_midnight_in_california(now: str, hours: float) -> None:
    body = gemini(429, "R", "", *quota("RequestsPerDay"))
    assert ac.read_reset({}, body, "", utc=datetime.fromisoformat(now + "+00:00").timestamp()) == pytest.approx(hours * 3600)


def test_midnight_in_california_is_that_of_the_time_zone_data() -> None:
    zoneinfo = pytest.importorskip("zoneinfo")
    try:
        zone = zoneinfo.ZoneInfo("America/Los_Angeles")
    except zoneinfo.ZoneInfoNotFoundError:
        pytest.skip("this machine has no time zone data")
    body = gemini(429, "R", "", *quota("RequestsPerDay"))
    for hour in range(0, 366 * 24, 7):
        utc = NOW + hour * 3600 + 1800
        local = datetime.fromtimestamp(utc + ac.read_reset({}, body, "", utc=utc), zone)
        assert (local.hour, local.minute) == (0, 0), local


@pytest.mark.parametrize(("status", "body", "proven"), [(429, b"", True), (503, b"", True), (402, b"", True), (401, b"", False), (404, b"", False), (400, b"", False), (413, b"", False)])
def test_only_what_ends_by_itself_takes_the_named_time(status: int, body: bytes, proven: bool) -> None:
    assert judge("", status, body, {"retry-after": "77"}).proven is proven


def test_a_time_on_a_success_means_nothing() -> None:
    for body in (b"", b"<html>hi</html>", b'{"error": {"message": "overloaded", "code": 503}}'):
        assert not judge("huggingface", 200, body, {"retry-after": "30"}).proven


def test_a_spent_window_says_nothing_about_an_overload() -> None:
    headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6h"}
    assert not judge("openai", 500, b"", headers).proven
    assert judge("openai", 429, b"", headers).cool_s == 21600


# bodies --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("body", "expected"), [
    (err("m", code="c", param="p"), ("m", "c", "p")),
    ({"message": "m", "type": "t", "param": None, "code": "c"}, ("m", "c", None)),
    ([{"error": {"code": 400, "message": "m", "status": "INVALID_ARGUMENT"}}], ("m", "INVALID_ARGUMENT", None)),
    ({"error": "m"}, ("m", None, None)),
    ({"code": "invalid-argument", "error": "m"}, ("m", "invalid-argument", None)),
    ({"error": "Too Many Requests", "message": "m"}, ("m", None, None)),
    ({"status": 401, "title": "t", "detail": "m"}, ("m", None, None)),
    ({"status": 429, "title": "t"}, ("t", None, None)),
    ({"detail": "m"}, ("m", None, None)),
    ({"detail": [{"loc": ["body", "f"], "msg": "m"}]}, ("f: m", None, "f")),
    (MISTRAL_EXTRA, ("max_completion_tokens: Extra inputs are not permitted", None, "max_completion_tokens")),
    ({"success": False, "errors": [{"code": 4006, "message": "m"}]}, ("m", "4006", None)),
    ({"errors": ["m"]}, ("m", None, None)),
    (anthropic("overloaded_error", "m"), ("m", None, None)),
    ({"base_resp": {"status_code": 1008, "status_msg": "m"}}, ("m", "1008", None)),
    ({"type": "response.failed", "response": {"error": {"code": "c", "message": "m"}}}, ("m", "c", None)),
    (err("m", code=429), ("m", None, None)),
    (err("m", code=True), ("m", None, None)),
    (err("Provider returned error", metadata={"raw": '{"error": {"message": "m"}}'}), ("Provider returned error: m", None, None)),
    (err("Provider returned error", metadata={"raw": "m"}), ("Provider returned error: m", None, None)),
    (err("Provider returned error", metadata={}), ("Provider returned error", None, None)),
    (err("Incorrect API key provided: sk-abcdefgh12345678."), ("Incorrect API key provided: ***.", None, None)),
    (err("in organization `org_01abcdef` on"), ("in organization `***` on", None, None)),
    (err("x" * 5000), ("x" * 2000, None, None)),
    ("<html><head><style>a{}</style></head><body><h1>502 Bad Gateway</h1><hr>nginx</body></html>", ("502 Bad Gateway nginx", None, None)),
    ("plain words", ("plain words", None, None)),
    ("y" * 900, ("y" * 200, None, None)),
    ('event: error\ndata: {"error": {"message": "m"}}\n\n', ("m", None, None)),
    ('"m"', ("m", None, None)),
    (b"", ("", None, None)),
    (b"\xef\xbb\xbf{\"error\": \"m\"}", ("m", None, None)),
    (b"\xff\xfe", ("\ufffd\ufffd", None, None)),
    ("{}", ("", None, None)),
    ("[]", ("", None, None)),
    ('{"error": {}}', ("", None, None)),
    ('{"error": "\\ud800"}', ("?", None, None)),
])
def test_every_shape_of_body(body: Any, expected: tuple[str, str | None, str | None]) -> None:
    raw = body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else json.dumps(body).encode()
    assert ac.error_text(raw) == expected


def test_a_body_deeper_than_the_parser_is_plain_text() -> None:
    assert judge("", 500, b"[" * 60000).reason == "server_error"


def test_at_most_64_kib_are_read() -> None:
    body = b'{"error": {"message": "' + b"a" * 70000 + b'", "code": "insufficient_quota"}}'
    assert judge("", 429, body).reason == "rate_minute"


def test_what_the_client_wrote_decides_nothing() -> None:
    body = {"detail": [{"loc": ["body", "messages"], "msg": "Field required", "input": {"text": "insufficient_quota prompt is too long"}}]}
    assert judge("mistral", 422, body).reason == "bad_request"


# errors inside a 200 -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("preset", "error", "reason", "status"), [
    ("openrouter", {"id": "1", "error": {"code": 400, "message": "Token limit reached"}, "choices": []}, "context_overflow", 400),
    ("openrouter", {"error": {"code": 502, "message": "x", "metadata": {"error_type": "provider_unavailable"}}}, "model_capacity", 502),
    ("openrouter", {"error": {"code": 429, "message": "x", "metadata": {"error_type": "rate_limit_exceeded"}}}, "rate_minute", 429),
    ("groq", {"error": {"message": "Tool choice is required", "type": "invalid_request_error", "code": "tool_use_failed", "status_code": 400}}, "tool_generation_failed", 400),
    ("groq", {"message": "Tool choice is required", "type": "invalid_request_error", "code": "tool_use_failed", "status_code": 400}, "tool_generation_failed", 400),
    ("cerebras", {"error": {"message": "boom", "type": "server_error"}, "status_code": 500}, "server_error", 500),
    ("cerebras", {"error": {"message": "busy", "code": "queue_exceeded"}, "status_code": 429}, "model_capacity", 429),
    ("anthropic", anthropic("overloaded_error", "Overloaded"), "model_capacity", 529),
    ("anthropic", anthropic("rate_limit_error", "slow"), "rate_minute", 429),
    ("anthropic", anthropic("api_error", "Internal"), "server_error", 502),
    ("anthropic", anthropic("invalid_request_error", "bad"), "bad_request", 400),
    ("anthropic", anthropic("authentication_error", "bad"), "auth_invalid", 401),
    ("anthropic", anthropic("not_found_error", "model: x"), "model_gone", 404),
    ("minimax", {"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}, "choices": None}, "billing", 502),
    ("minimax", {"base_resp": {"status_code": 1002, "status_msg": "rate"}}, "rate_minute", 502),
    ("minimax", {"base_resp": {"status_code": 1000, "status_msg": "unknown"}}, "server_error", 502),
    ("openai", {"type": "error", "error": {"type": "insufficient_quota", "code": "insufficient_quota", "message": "You exceeded your current quota"}}, "billing", 429),
    ("openai", {"type": "response.failed", "response": {"error": {"code": "rate_limit_exceeded", "message": "Please try again in 12s."}}}, "rate_minute", 429),
    ("openai", {"type": "response.failed", "response": {"error": {"code": "server_error", "message": "x"}}}, "server_error", 502),
    ("gemini", {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}}, "content_policy", 502),
    ("gemini", gemini(503, "UNAVAILABLE", "The model is overloaded."), "model_capacity", 503),
    ("huggingface", {"error": "Model too busy"}, "server_error", 502),
    ("github-copilot", {"error": {"message": "x", "code": "content_filter"}}, "content_policy", 502),
    ("x", "overloaded", "model_capacity", 502),
    ("x", None, "server_error", 502),
    ("x", {}, "server_error", 502),
    ("x", {"error": {"code": 200}}, "server_error", 502),
    ("x", {"error": {"code": 1e9}}, "server_error", 502),
    ("x", 7, "server_error", 502),
])
def test_an_error_inside_a_success(preset: str, error: Any, reason: str, status: int) -> None:
    failure = ac.classify_error(preset, "model", error, utc=NOW)
    assert (failure.reason, failure.status, failure.kind) == (reason, status, ac.REASONS[reason].kind)


def test_an_error_inside_a_success_may_name_its_time() -> None:
    error = {"type": "response.failed", "response": {"error": {"code": "rate_limit_exceeded", "message": "Please try again in 12s."}}}
    failure = ac.classify_error("openai", "model", error, utc=NOW)
    assert (failure.cool_s, failure.proven, failure.scope) == (12, True, "route")


@pytest.mark.parametrize(("reason", "kind", "scope"), [
    ("refused", "network", "provider"), ("dns", "network", "provider"), ("tls", "network", "provider"), ("reset", "network", "provider"),
    ("timeout", "network", "provider"), ("protocol", "network", "provider"), ("cut", "server", "route"), ("too_big", "server", "route"),
    ("bad_stream", "server", "route"), ("empty_answer", "server", "route"), ("not_json", "server", "route"),
    ("no_descriptor", "network", ""),
])
def test_transport_failures(reason: str, kind: str, scope: str) -> None:
    failure = ac.transport_failure(reason, "head", "with Bearer abcdefghijklmn")
    assert (failure.kind, failure.scope, failure.phase, failure.status, failure.detail) == (kind, scope, "head", 0, "with Bearer ***")


# what the client is told ---------------------------------------------------------------------------------------------

def attempt(failure: ac.UpstreamFailure, provider: str = "groq", model: str = "m") -> ac.Attempt:
    entry = ac.Provider(provider, None, "http://127.0.0.1:1/v1", "chat", model, True, (), ())
    route = ac.make_route(entry, ac.Credential(f"{provider}/1"), ac.Model(model))
    return ac.Attempt(route, 0.0, failure.status, failure.reason, failure.detail, 3)


def answer(*failures: ac.UpstreamFailure) -> ac.GatewayError:
    return ac.answer_for(failures, [attempt(failure, f"p{number}") for number, failure in enumerate(failures)])


RATE, RATE_NAMED, OVERLOADED = judge("", 429, b""), judge("", 429, b"", {"retry-after": "40"}), judge("", 529, b"")
RATE_SOON, MONEY, KEY = judge("", 429, b"", {"retry-after": "7"}), judge("", 402, b""), judge("", 401, err("bad key sk-abcdefgh12345678"))
OURS = ac.transport_failure("no_descriptor", "connect", "Too many open files")
LATE, GONE, BROKEN = ac.transport_failure("timeout", "head"), judge("", 404, b""), judge("", 500, b"")
LONG = judge("anthropic", 400, anthropic("invalid_request_error", "prompt is too long: 9 tokens > 8 maximum"))
BYTES, TPM, NO_TOOLS = judge("", 413, b""), judge("groq", 413, err(GROQ_TPM_413)), judge("ollama", 400, err("x does not support tools"))
BUSY_429, TIER, REFUSED = judge("openrouter", 429, OPENROUTER_UPSTREAM), judge("", 498, b""), ac.transport_failure("refused", "connect")
REGION, DENIED = judge("gemini", 400, gemini(400, "F", "User location is not supported for the API use.")), judge("github-copilot", 403, b"")


@pytest.mark.parametrize(("failures", "status", "code", "retry_after_s"), [
    ([RATE], 429, "rate_limit_exceeded", 5),
    ([RATE, RATE_NAMED, RATE_SOON], 429, "rate_limit_exceeded", 7),
    ([RATE_NAMED, BUSY_429], 429, "rate_limit_exceeded", 40),
    ([MONEY, MONEY], 429, "insufficient_quota", 3600),
    ([RATE_NAMED, MONEY], 429, "rate_limit_exceeded", 40),
    ([TPM], 429, "rate_limit_exceeded", 5),
    ([RATE, BROKEN], 502, "upstream_failed", None),
    ([RATE_SOON, OVERLOADED], 503, "server_is_overloaded", 7),
    ([OVERLOADED, judge("", 503, b""), TIER], 503, "server_is_overloaded", 5),
    ([judge("cerebras", 503, b"")], 503, "server_is_overloaded", 5),
    ([LATE, LATE], 504, "timeout", None),
    ([LATE, judge("", 504, b""), judge("", 408, b"")], 504, "timeout", None),
    ([OURS, OURS], 503, "out_of_descriptors", 5),
    ([OURS, BROKEN], 502, "upstream_failed", None),
    ([LATE, REFUSED], 502, "upstream_failed", None),
    ([REFUSED], 502, "upstream_failed", None),
    ([BROKEN, BROKEN], 502, "upstream_failed", None),
    ([GONE, GONE], 404, "model_not_found", None),
    ([GONE, BROKEN], 502, "upstream_failed", None),
    ([KEY], 502, "credential_rejected", None),
    ([KEY, DENIED], 502, "credential_rejected", None),
    ([KEY, RATE], 502, "upstream_failed", None),
    ([LONG], 400, "context_length_exceeded", None),
    ([LONG, TPM, BYTES], 400, "context_length_exceeded", None),
    ([BYTES], 413, "request_too_large", None),
    ([NO_TOOLS], 400, "unsupported", None),
    ([REGION], 403, "region_blocked", None),
    ([], 502, "upstream_failed", None),
])
def test_answer_when_every_route_failed(failures: list[ac.UpstreamFailure], status: int, code: str, retry_after_s: float | None) -> None:
    error = answer(*failures)
    assert (error.status, error.code, error.retry_after_s) == (status, code, retry_after_s)
    assert error.attempts == [attempt(failure, f"p{number}").public() for number, failure in enumerate(failures)]
    assert error.message and "http" not in error.message and "sk-" not in error.message


@pytest.mark.parametrize("status", [400, 422])
def test_a_refused_request_keeps_the_providers_words(status: int) -> None:
    error = answer(judge("openai", status, err("Invalid 'n'.", param="n", code="invalid_value")))
    assert (error.status, error.message, error.code, error.param, error.type) == (status, "Invalid 'n'.", "invalid_value", "n", "invalid_request_error")


@pytest.mark.parametrize(("failure", "status"), [
    (judge("openrouter", 403, err("flagged", metadata={"reasons": ["x"]})), 403),
    (ac.classify_error("gemini", "model", {"promptFeedback": {"blockReason": "SAFETY"}}, utc=NOW), 400),
    (judge("", 415, b""), 415),
])
def test_a_refusal_has_a_status_for_the_client(failure: ac.UpstreamFailure, status: int) -> None:
    error = answer(RATE, failure)
    assert (error.status, error.retry_after_s, len(error.attempts)) == (status, None, 2)
    assert error.message


def test_the_message_says_what_happened() -> None:
    assert answer(judge("", 429, err("Slow down, see https://x.test/limits."))).message == (
        "Every provider tried is at its rate limit. p0/m: rate_minute (429). The provider said: Slow down, see (link)")
    assert answer(LATE, REFUSED).message == "No provider tried could answer. p0/m: timeout; p1/m: refused."
    assert answer(KEY).message.startswith("The provider rejected the gateway's credential.")
    assert answer(LONG).message == "prompt is too long: 9 tokens > 8 maximum"
    assert answer(*[BROKEN] * 8).message.count("server_error") == 6
    assert answer(*[BROKEN] * 8).message.endswith("; and 2 more.")


# recordings and chance -----------------------------------------------------------------------------------------------

#: What each recorded refusal means; the ids are the files' names.
RECORDED = {
    "count-tokens-json-error-404-3146d5c4": "model_gone", "messages-json-error-400-113631f7": "bad_param", "messages-json-error-400-1b31bcf4": "context_overflow",
    "messages-json-error-401-92e9b5bf": "auth_invalid", "messages-json-error-404-2cd601ff": "model_gone", "messages-json-error-404-8e4ac3a0": "model_gone",
    "chat-json-error-404-1ad8c4dc": "model_gone", "chat-json-error-404-5df2091a": "model_gone", "chat-json-error-429-68c31e76": "rate_minute",
    "chat-json-error-400-426e280b": "context_overflow", "chat-json-error-401-2730f874": "auth_invalid", "responses-json-error-400-f82d3e06": "bad_request",
    "embedContent-json-error-404-b8d1d234": "model_gone", "generateContent-json-error-404-5356d65c": "model_gone", "generateContent-json-error-404-ecd99a05": "model_gone",
    "generateContent-json-error-429-8056f6bc": "rate_minute", "chat-json-error-404-523a4603": "model_gone", "chat-json-error-400-cfcddc33": "context_overflow",
    "ollama-native-json-error-404-ea3b1e21": "model_gone", "chat-json-error-400-0bc32c11": "bad_param", "chat-json-error-400-38ef8ed5": "bad_request",
    "chat-json-error-401-0c837e0c": "auth_invalid", "chat-json-error-401-47dde188": "auth_invalid", "chat-json-error-404-163aed64": "model_gone",
    "chat-json-error-404-c54cab8b": "model_gone", "completions-json-error-400-3ba142ec": "bad_value", "completions-json-error-400-d808da7f": "bad_request",
    "embeddings-json-error-400-bdfef227": "bad_request", "embeddings-json-error-404-abc648b6": "model_gone", "embeddings-json-error-404-ee5a6289": "model_gone",
    "responses-json-error-400-bc3d22fa": "model_gone", "responses-json-error-400-ee0398a4": "bad_request", "responses-json-error-401-79d53b16": "auth_invalid",
    "chat-json-error-401-513e0f64": "auth_invalid", "chat-json-error-429-697b332f": "model_capacity", "chat-json-error-401-374eb32a": "auth_invalid",
    "responses-json-error-400-d06665aa": "auth_invalid",
}


@pytest.mark.skipif(not RECORDINGS.is_dir(), reason="the recordings are not beside this repository")
def test_recorded_refusals() -> None:
    seen = {}
    for path in sorted(RECORDINGS.glob("*/*.json")):
        exchange = json.loads(path.read_text(encoding="utf-8"))
        response = exchange["response"]
        if response["status"] >= 400:
            body = json.dumps(response["body"]) if "body" in response else response.get("text", "")
            seen[path.stem] = judge(exchange["provider"], response["status"], body, {name.lower(): str(value) for name, value in response["headers"].items()})
    assert {name: failure.reason for name, failure in seen.items() if name in RECORDED} == {name: RECORDED[name] for name in seen if name in RECORDED}
    assert set(RECORDED) <= set(seen)
    assert seen["generateContent-json-error-429-8056f6bc"].cool_s == pytest.approx(48.939935699)
    assert seen["chat-json-error-429-68c31e76"].cool_s == 1


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
    st.sampled_from(["error", "errors", "message", "code", "type", "param", "detail", "loc", "metadata", "raw", "headers", "status", "retryDelay", "quotaId", "base_resp", "status_code", "x"]),
    inner, max_size=5), max_leaves=12)
HEADERS = st.dictionaries(st.sampled_from(["retry-after", "retry-after-ms", "x-ratelimit-reset", "x-ratelimit-remaining", "x-ratelimit-reset-tokens", "anthropic-ratelimit-tokens-reset", "x-should-retry"]),
                          st.text(max_size=30) | st.integers().map(str) | st.floats().map(str) | st.from_regex(r"\d{1,20}(ms|s|m|h|d)?"), max_size=5)


def check(failure: ac.UpstreamFailure) -> None:
    assert failure.reason in ac.REASONS and failure.kind == ac.REASONS[failure.reason].kind
    assert failure.scope in {"", *ac.SCOPES} and len(failure.detail) <= 2000
    assert failure.code is None or isinstance(failure.code, str)
    assert failure.param is None or isinstance(failure.param, str)
    assert failure.cool_s is None or 0 < failure.cool_s <= 32 * DAY
    f"{failure}{failure.code}{failure.param}".encode()
    assert 400 <= ac.answer_for([failure], [attempt(failure)]).status <= 504


@settings(max_examples=300, deadline=None)
@example(429, {"retry-after-ms": "0\x1f"}, b"")
@example(429, {}, b'{"error": {"metadata": {"headers": {"retry-after-ms": "0\\u001f"}}}}')
@given(st.sampled_from([200, 204, 301, 400, 403, 404, 413, 422, 429, 500, 503, 999]), HEADERS, st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_body_and_no_header_breaks_the_judgement(status: int, headers: dict[str, str], body: bytes) -> None:
    for preset in ("openrouter", "zai", ""):
        check(ac.classify(preset, "model", status, headers, body, utc=NOW))


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_no_error_object_breaks_the_judgement(error: Any) -> None:
    check(ac.classify_error("minimax", "account", error, utc=NOW))


@settings(max_examples=300, deadline=None)
@given(HEADERS, JSON, st.text(max_size=200) | st.from_regex(r"try again in \d{1,12}(\.\d{1,5})? ?(ms|s|minutes|weeks|months)"))
def test_a_reset_is_none_or_within_bounds(headers: dict[str, str], body: Any, text: str) -> None:
    wait_s = ac.read_reset(headers, body, text, utc=NOW)
    assert wait_s is None or 0 < wait_s <= 32 * DAY
