import dataclasses

import pytest

from open_agentrl_jax.config import Config
from open_agentrl_jax.telemetry.redact import redact


@pytest.mark.parametrize(
    "text, shown",
    [
        ("http://me:pass@host:80/a?token=s3cret&x=1", "http://***@host:80/a?token=***&x=1"),
        ("https://s3cret@host", "https://***@host"),
        ("mcp:npx server --api-key s3cret --port 80", "mcp:npx server --api-key *** --port 80"),
        ("mcp:env OPENAI_API_KEY=s3cret python -m server", "mcp:env OPENAI_API_KEY=*** python -m server"),
        ("Authorization: Bearer abcdefgh12345678", "Authorization: Bearer ***"),
        ("password=s3cret; user=me", "password=***; user=me"),
        ("sk-abcdefghijklmnop1234", "***"),
        # no secrets
        ("http://127.0.0.1:30000/v1", "http://127.0.0.1:30000/v1"),
        ("a token=", "a token="),
        (
            "monkey=3, max_tool_tokens=5, tokenizer=Qwen/Qwen3-4B",
            "monkey=3, max_tool_tokens=5, tokenizer=Qwen/Qwen3-4B",
        ),
        ("mail me@host", "mail me@host"),
    ],
)
def test_secrets_in_text_are_hidden(text, shown):
    assert redact(text) == shown
    assert redact(shown) == shown


def test_secrets_by_name_are_hidden_at_any_depth():
    nested = {"a": [{"api_key": "s3cret", "HF_TOKEN": "x", "tokens": "5"}], "t": ("http://u:p@h",), "key": ""}
    assert redact(nested) == {
        "a": [{"api_key": "***", "HF_TOKEN": "***", "tokens": "5"}],
        "t": ("http://***@h",),
        "key": "",
    }


def test_a_config_without_secrets_is_unchanged():
    config = dataclasses.asdict(Config())
    assert redact(config) == config
