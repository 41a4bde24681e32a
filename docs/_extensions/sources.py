"""Links from pages to files and folders of the repository that are no pages.

Each such file gets a page that shows it, so that the site needs no repository at any address. A
link to a file that is not there is left to MyST, which warns.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

FOLDER = "source"
_LEXERS = {".json": "json", ".py": "python", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml"}


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_transform(LinkSources)
    app.connect("html-collect-pages", _pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


class LinkSources(SphinxTransform):
    """Leads links to the pages that :func:`_pages` makes."""

    default_priority = 300  # before Sphinx copies the files as downloads

    def apply(self, **kwargs: Any) -> None:
        sources = self.env.metadata[self.env.docname].setdefault("sources", [])
        for node in [*self.document.findall(_is_link)]:
            target = self._target(node)
            if target is None:
                continue
            sources.append(target)
            uri = self.app.builder.get_relative_uri(self.env.docname, f"{FOLDER}/{target}")
            node.replace_self(nodes.reference("", "", *node.children, refuri=uri, internal=True))

    def _target(self, node: nodes.Element) -> str | None:
        """Path in the repository of what a link leads to, unless it is a page or is not there."""
        if node.get("refdomain") == "doc":
            # Markdown, of which MyST knows the name only.
            name = node["reftarget"]
            return None if name in self.env.found_docs else f"{name}.md"
        path, _, _ = node["reftarget"].partition("#")
        relative, absolute = self.env.relfn2path(path, self.env.docname)
        return Path(relative).as_posix() if path and Path(absolute).exists() else None


def _is_link(node: nodes.Node) -> bool:
    is_link = isinstance(node, (addnodes.download_reference, addnodes.pending_xref))
    return is_link and node.get("reftype") == "myst"


def _pages(app: Sphinx) -> Iterator[tuple[str, dict[str, str], str]]:
    linked = chain.from_iterable(data.get("sources", ()) for data in app.env.metadata.values())
    for target in sorted(set(linked)):
        body = f"<h1><code>{html.escape(target)}</code></h1>" + _show(app, target)
        yield f"{FOLDER}/{target}", {"title": target, "body": body}, "page.html"


def _show(app: Sphinx, target: str) -> str:
    path = Path(app.srcdir) / target
    if path.is_dir():
        names = sorted(p.name + "/" * p.is_dir() for p in path.iterdir() if p.name[0] not in "._")
        items = "".join(f"<li><code>{html.escape(name)}</code></li>" for name in names)
        return f"<ul>{items}</ul>"
    text = path.read_text(encoding="utf-8")
    lexer = _LEXERS.get(path.suffix, "text")
    return app.builder.highlighter.highlight_block(text, lexer, location=target)
