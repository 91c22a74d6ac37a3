"""Secrets in text: tokens, passwords and keys, recognised by name or form and replaced before anything is written."""

from __future__ import annotations

import html
import json
import os
import re
from urllib.parse import quote

HIDDEN = "(secret)"
_PART = "(?:token|secret|passw(?:or)?d|passphrase|(?:api|access|secret)[_-]?key|credentials?|authorization)"
SECRET_NAME = rf"[\w.-]*{_PART}"  # the end of an option that takes a secret
_VARIABLE = re.compile(rf"{_PART}(?:_|$)", re.IGNORECASE)
_QUOTES, _VALUE = r"[\\\"']*", r"[^\s\"'\\<>&;,{}\[\]]+"
_AFTER_NAMES = (
    r"(://)[^/\s@\"'<>]+(?=@)",  # the user and the password in an address
    rf"(authorization{_QUOTES}\s*[:=]\s*{_QUOTES})(?:(?:bearer|basic|token|digest)\s+)?{_VALUE}",
    r"(\bbearer\s+)(?=\S*\d)[\w.~+/=-]{16,}",
    rf"((?<!\S)--{SECRET_NAME}(?:=|\s+)[\"']?){_VALUE}",
    rf"((?:{_PART}|signature){_QUOTES}\s*=\s*{_QUOTES}){_VALUE}",
    # after a colon, captions have words and settings have numbers
    rf"({_PART}{_QUOTES}\s*:\s*{_QUOTES})(?=[^\s\"'\\<>&;,]*\d)(?![\d.]+\b){_VALUE}",
    rf"((?:api|access|secret)[_-]?key{_QUOTES}\s*:\s*{_QUOTES})(?!(?:[\d.]+|null|true|false)\b){_VALUE}",
)
_BY_FORM = (
    r"\bhf_[A-Za-z0-9]{10,}",  # of the Hub
    r"\bwandb_v\d_[\w-]{16,}",  # of Weights & Biases, and so is the next, which is no commit and no file's name
    r"(?<!\"revision\": \")(?<![\w./\\])(?:local-)?[0-9a-f]{40}(?![\w./\\])",
    r"\b(?:api_org_|gh[opsu]_|github_pat_|glpat-|sk-|xox[a-z]-|AKIA)(?=[\w-]*\d)[\w-]{12,}",
)
_PATTERNS = [(re.compile(p, re.IGNORECASE), rf"\1{HIDDEN}") for p in _AFTER_NAMES]
_PATTERNS += [(re.compile(p), HIDDEN) for p in _BY_FORM]


def without_secrets(text: str) -> str:
    """A text without what is secret: values of variables such as HF_TOKEN, users in addresses, `Authorization`, what
    is called a token, key or password, and keys of the Hub, of trackers and of others that are known by their form.

    Of variables, values of fewer than 12 characters without a digit, or of fewer than 8, are taken for words, and paths
    for places.
    """
    for name, value in os.environ.items():
        if _VARIABLE.search(name) and _is_secret(value):
            for form in {value, json.dumps(value)[1:-1], html.escape(value), quote(value, safe="")}:
                text = text.replace(form, HIDDEN)
    for pattern, shown in _PATTERNS:
        text = pattern.sub(shown, text)
    return text


def _is_secret(value: str) -> bool:
    return len(value) >= (8 if any(c.isdigit() for c in value) else 12) and not os.path.exists(value)
