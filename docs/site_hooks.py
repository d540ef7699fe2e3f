"""MkDocs hooks: pages of the top folder become pages of the site, and links that leave docs/ lead to a copy of their file."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
TOP_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages of the top folder, and what they are called on the site."""
COPIES = "repository"
"""Folder of the site for files outside docs/ that a page links to."""
LINK = re.compile(r"(?<=\]\()(?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?(?=\))")

FETCHED = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^>]*>""")
"""A tag that makes a browser load something from another host; a link that a person follows is none."""
logger = get_plugin_logger(__name__)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the top folder; rewrite every link that does not stay inside docs/."""
    copied: set[str] = set()
    for page in files.documentation_pages():
        page.content_string = rewrite(page.content_string, source=f"docs/{page.src_uri}", copied=copied)
    for source, name in TOP_PAGES.items():
        text = rewrite((ROOT / source).read_text(encoding="utf-8"), source=source, copied=copied)
        files.append(File.generated(config, name, content=text))
    for path in sorted(copied):
        files.append(File.generated(config, f"{COPIES}/{path}", abs_src_path=str(ROOT / path)))
    return files


def rewrite(text: str, *, source: str, copied: set[str]) -> str:
    """The page with links as the site needs them; `source` and `copied` are paths from the top folder.

    A link to nothing stays as it is, for MkDocs to report.
    """

    def target(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link["path"]))
        anchor = link["anchor"] or ""
        if path in TOP_PAGES:
            return TOP_PAGES[path] + anchor
        if path.startswith("docs/"):
            return path.removeprefix("docs/") + anchor
        if path.startswith("..") or not (ROOT / path).is_file():
            return link[0]
        copied.add(path)
        return f"{COPIES}/{path}"

    return LINK.sub(target, text)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Warn, which --strict makes a failure, where a page would fetch anything."""
    for tag in FETCHED.findall(output):
        logger.warning("%s would load from another host: %s", page.file.src_uri, tag)
    return output
