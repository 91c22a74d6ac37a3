"""HTML pages of reports: parsed, and checked to be one harmless file."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

LANGUAGES = ("en", "ja")
EVIL = '<img src=x onerror="alert(1)">\x1b[31m\u202eexe.gnp =cmd|x {{ 7*7 }} $x$'
VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Tags with their attributes, the text, and whether elements nest rightly."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"[ \n]+", " ", " ".join(self.words))

    def values(self, attribute: str) -> list[str]:
        return [a[attribute] or "" for _, a in self.tags if attribute in a]


def check_self_contained(page: Page, scripts: int = 0) -> None:
    assert not page.open
    tags = {t for t, _ in page.tags}
    assert [t for t, _ in page.tags].count("script") == scripts
    assert not tags & {"iframe", "object", "embed", "link", "base", "form"}
    assert not [k for _, a in page.tags for k in a if k.startswith("on")]
    for value in page.values("src"):
        assert value.startswith("data:image/png;base64,")
    for value in page.values("href"):
        assert value.startswith(("#", "./"))
    assert "url(" not in re.sub(r"url\(#c[0-9a-f]{10}-[\w.-]+\)", "", page.source)
    assert "@import" not in page.source
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    for value in [*page.values("href"), *page.values("clip-path")]:
        assert "#" not in value or value.strip("url()").removeprefix("#") in ids
