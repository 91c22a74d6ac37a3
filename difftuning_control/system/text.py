"""Text from outside, made safe to show in a terminal, in Markdown and in Python source."""

from __future__ import annotations

import html
import json
import re
import unicodedata

JOINERS = "\u200c\u200d"  # part of some scripts and emoji; they hide nothing


def composed(text: str) -> str:
    """A text with each accent in one character with its letter (NFC), so that texts that look alike are equal."""
    return unicodedata.normalize("NFC", text)


def harmless(text: str) -> str:
    """Control characters, escapes of terminals and marks that reorder or hide text become visible signs."""
    return "".join(map(_show, text))


def _show(c: str) -> str:
    if c.isascii() and c.isprintable():
        return c
    code = ord(c)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    hidden = unicodedata.category(c) in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp") and c not in JOINERS
    return f"⟨U+{code:04X}⟩" if hidden else c


def file_stem(text: str, most: int = 60) -> str:
    """A name for a file made from a text: letters, marks and digits of every script, other characters as hyphens.

    At most `most` characters and 120 bytes, which encrypted folders take too; `empty` where nothing is left.
    """
    kept = [c if unicodedata.category(c)[0] in "LMN" else "-" for c in composed(text).lower()]
    name = re.sub(r"-+", "-", "".join(kept)).strip("-")[:most]
    return name.encode()[:120].decode(errors="ignore").strip("-") or "empty"


def portable_name(name: str) -> str:
    """A file's name that every system takes: what Windows forbids becomes a hyphen."""
    kept = re.sub(r'[<>:"/\\|?*\x00-\x1f]', "-", name).rstrip(". ") or "empty"
    return f"{kept}-" if is_device(kept) else kept


def is_device(name: str) -> bool:
    """Whether Windows has a device of this name, whatever stands after a dot."""
    return re.fullmatch(r"(con|prn|aux|nul|(com|lpt)[1-9])(\..*)?", name.lower()) is not None


def plain_markdown(text: str) -> str:
    """A text as Markdown that shows it as it is, on one line: no HTML, link or code comes out of it."""
    escaped = re.sub(r"([\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", harmless(text))  # a _ within a word is shown
    return html.escape(escaped, quote=False)


def code_span(text: str) -> str:
    """A text as code within a line of Markdown, where nothing is escaped."""
    text = harmless(text)
    fence = "`" * (max(map(len, re.findall(r"`+", text)), default=0) + 1)
    edge = " " if "`" in text else ""
    return f"{fence}{edge}{text}{edge}{fence}"


def python_text(text: str) -> str:
    """A text as a string of Python that stands in a code block of Markdown; what is not to be seen is escaped."""
    shown = json.dumps(text, ensure_ascii=False).replace("`", "\\x60")
    return "".join(c if harmless(c) == c else c.encode("unicode_escape").decode() for c in shown)
