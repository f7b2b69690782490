"""Access tokens and passwords never reach what is recorded or said."""

from __future__ import annotations

import time

import pytest

from pipeline.flow.errors import UserError
from pipeline.flow.secrets import redact, require_none

FORMS = {
    "hugging face": "hf_" + "aB3" * 8,
    "openai": "sk-" + "proj-" + "x1" * 12,
    "github": "ghp_" + "Z9" * 12,
    "aws": "AKIA" + "ABCD1234EFGH5678",
    "slack": "xoxb-" + "1234567890-abc",
    "older openai": "sk-" + "A1b2" * 8,
    "web token": "eyJhbGciOi.eyJzdWIiOiIx.SflKxwRJSMeKKF",
}


@pytest.mark.parametrize("name", list(FORMS))
def test_a_token_is_known_by_its_form_wherever_it_stands(name: str) -> None:
    token = FORMS[name]
    assert redact(f"cannot read /data/{token}/x: {token}.") == "cannot read /data/<secret>/x: <secret>."
    with pytest.raises(UserError, match=r"^launch.deepspeed.a: this looks like a token") as refused:
        require_none({"launch": {"deepspeed": {"a": [1, f"x {token}"]}}})
    assert token not in str(refused.value)


@pytest.mark.parametrize("address", ["https://me:opensesame@host/x.jsonl", "/here/https:/me:opensesame@host/x.jsonl"])
def test_a_password_inside_an_address(address: str) -> None:
    assert "opensesame" not in redact(f"there is no file {address}")
    with pytest.raises(UserError, match="sources.pairs.path"):
        require_none({"sources": {"pairs": {"path": address}}})


def test_a_token_before_a_host_and_behind_bearer() -> None:
    assert redact("https://0123456789abcdef0123@host/x") == "https://<secret>@host/x"
    assert redact("Authorization: Bearer abcdefghijklmnop") == "Authorization: Bearer <secret>"
    for key in ("secret_key", "private_key", "auth_token", "authToken"):
        with pytest.raises(UserError, match=key):
            require_none({key: "opensesame1"})


def test_a_secret_is_known_by_the_name_of_its_key() -> None:
    assert redact("unknown key hub_token=opensesame1, 'api_key': 'letmein12345'") == (
        "unknown key hub_token=<secret>, 'api_key': '<secret>'"
    )
    with pytest.raises(UserError, match="stages.sft.hub_token"):
        require_none({"stages": {"sft": {"hub_token": "opensesame1"}}})


def test_the_environment_s_secrets_are_known_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASSWORD", "correct horse battery")
    assert redact("it was correct horse battery!") == "it was <secret>!"
    with pytest.raises(UserError, match="name"):
        require_none({"name": "correct horse battery"})


def test_ordinary_settings_and_messages_stay_as_they_are() -> None:
    plain = {
        "train": {"token_budget": 8192, "max_tokens": "512"},
        "path": "/data/hf_home/x",
        "tokenizer": "a/b",
        "k": "s3://b/k",
    }
    require_none(plain)
    require_none(
        {"path": ["data/sk-instructions-2024.jsonl", "en-sk-parallel-corpus-v2.jsonl"], "eos_token": "<|endoftext|>"}
    )
    assert redact("no such token: <|im_start|>") == "no such token: <|im_start|>"
    for text in (
        "ppo.train.token_budget: 4096 tokens a pass",
        "file.jsonl:12: 'prompt' is missing",
        "http://host:8080/path",
    ):
        assert redact(text) == text


@pytest.mark.parametrize(
    "piece", ["a.", "x-", "token", "password", "eyJaaaaaaa.", "a:/", "'\"", "bearer ", " ", "://a"]
)
def test_long_messages_are_looked_through_in_time(piece: str) -> None:
    """Messages quote what stands in files: 30,000 of anything take a fraction of a second, not its square."""
    began = time.process_time()
    redact("x password=" + piece * 30_000)
    redact(piece * 30_000)
    assert time.process_time() - began < 5
