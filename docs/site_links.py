"""Hooks of the site: files outside docs/ that pages link to become part of it, and nothing is loaded from elsewhere.

In the repository a page links to `../examples/sd15_lora.yaml`. On the site `docs/` is the root, so the link is
rewritten to `examples/sd15_lora.yaml`. A link to a folder leads to its README.md, or to a list of its files.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "NOTICE")
LINK = re.compile(r"(\]\()([^)#\s]+)")
LOADED = re.compile(r"<(?:script|img|iframe|link(?=[^>]*stylesheet))\b[^>]*?\b(?:src|href)=[\"'](?:https?:)?//[^>]*>")
log = get_plugin_logger("site")
# `__all__` takes the drop-in classes from their table, which a reader of source text cannot follow; api.md names them
logging.getLogger("mkdocs.plugins.griffe").addFilter(lambda record: "Unsupported item" not in record.getMessage())


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of the repository that lie outside docs/: pages, recipes, scripts and pictures."""
    examples = [p for p in sorted((ROOT / "examples").rglob("*")) if p.is_file() and "__pycache__" not in p.parts]
    for path in [ROOT / name for name in OUTSIDE] + examples:
        place = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, place, abs_src_path=str(path)))
    for folder in sorted({p.parent for p in examples}):
        if not (folder / "README.md").exists():
            files.append(File.generated(config, f"{_place(folder)}/README.md", content=_listing(folder)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links of the repository into those of the site."""
    at = page.file.src_uri
    home = ROOT if (ROOT / at).exists() else ROOT / "docs"  # what the page's place is relative to in the repository

    def rewrite(match: re.Match[str]) -> str:
        target = match[2]
        path = (home / at).parent / target
        if re.match(r"[a-z]+:|/", target) or not path.exists():
            return match[0]
        place = _place(path)
        if path.is_dir():
            place += "/README.md"
        return match[1] + posixpath.relpath(place, posixpath.dirname(at) or ".")

    return LINK.sub(rewrite, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Warn, which fails a strict build, about a page that loads something from elsewhere."""
    for found in LOADED.findall(output):
        log.warning("%s loads from elsewhere: %s", page.file.src_uri, found)
    return output


def _place(path: Path) -> str:
    """Where a file of the repository lies on the site."""
    path = path.resolve()
    return path.relative_to(ROOT / "docs" if path.is_relative_to(ROOT / "docs") else ROOT).as_posix()


def _listing(folder: Path) -> str:
    listed = [p for p in sorted(folder.iterdir()) if p.name != "__pycache__"]
    names = [f"{p.name}/README.md" if p.is_dir() else p.name for p in listed]
    lines = [f"- [{name.removesuffix('/README.md')}]({name})" for name in names]
    return "\n".join([f"# {_place(folder)}", "", *lines, ""])
