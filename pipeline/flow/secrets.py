"""Access tokens and passwords: refused in a plan, which is recorded for good, and blotted out of every message.

    require_none(document)              UserError naming the key of a setting that holds one
    redact(text)                        the same text without them

Known by their form (Hugging Face, OpenAI and Anthropic, GitHub, AWS, Slack, web tokens, passwords inside addresses), by
the name of their key, and by being the value of an environment variable with such a name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.flow.errors import UserError

BLOT = "<secret>"
FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{12,}|\bsk-(?:proj|ant|svcacct)-[\w-]{16,}|\bsk-[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{16,}"
    r"|\bgithub_pat_\w{20,}|\bAKIA[0-9A-Z]{16}\b|\bxox[abprs]-[A-Za-z0-9-]{10,}"
    r"|\beyJ[\w-]{6,}\.[\w-]{6,}\.[\w-]{6,}|(?i:(?<=bearer ))[\w.~+/-]{12,}"
    r"|(?:(?<=://)|(?<=[a-z]:/))(?:[^/\s:@'\"]*:[^/\s@'\"]+|[\w-]{16,})(?=@)"
)
WORDS = (  # `eos_token` and its kind are none
    r"(?:hub|auth|access|api|bearer|hf|refresh|bot)[_-]?token|password|passwd|secret(?:[_-]?key)?|private[_-]?key|api[_-]?key"
    r"|access[_-]?key|credentials?"
)
NAMES = re.compile(rf"(?:^|[_-])(?:{WORDS})$|^token$", re.IGNORECASE)
NAMED = re.compile(rf"(?i)((?:(?:{WORDS})['\"]?\s*[=:]|\btoken\s*=)\s*['\"]?)([^\s'\",}}<]{{8,}})")
VARIABLES = re.compile(r"(?:^|_)(TOKEN|PASSWORD|PASSWD|SECRET|(?:API|ACCESS|SECRET|PRIVATE)_?KEY|CREDENTIALS?)$")
SHORTEST = 8  # characters; below that a value is a word, not a secret


def redact(text: str) -> str:
    """
    >>> redact("there is no file https://me:pass@host/x, token=abcdefghijk")
    'there is no file https://<secret>@host/x, token=<secret>'
    """
    for value in _of_environment():
        text = text.replace(value, BLOT)
    return NAMED.sub(rf"\1{BLOT}", FORMS.sub(BLOT, text))


def require_none(document: Any) -> None:
    """UserError where a value, or the key that it stands under, looks like a secret."""
    own = set(_of_environment())
    for keys, value in _strings(document, ()):
        key = keys[-1] if keys else ""
        named = NAMES.search(key) and len(value) >= SHORTEST
        if named or FORMS.search(value) or any(secret in value for secret in own):
            raise UserError(
                f"{'.'.join(keys)}: this looks like a token or a password, and a plan is recorded with all that it "
                "makes: take it out, and set it in the environment of the program that needs it"
            )


def _of_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        if VARIABLES.search(name.upper()) and len(value) >= SHORTEST:
            yield value


def _strings(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(item, (*keys, str(key)))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item, keys)
    elif isinstance(value, str):
        yield keys, value
