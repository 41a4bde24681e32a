"""The menu, from conf.py: it is kept out of the pages, which GitHub shows as well."""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

REFERENCE = "docs/reference"


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_config_value("menu", {}, "env", dict)
    app.connect("source-read", _add_menu)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _add_menu(app: Sphinx, name: str, source: list[str]) -> None:
    if name == app.config.root_doc:
        for caption, pages in app.config.menu.items():
            source[0] += _tree(caption, pages)
    elif name == REFERENCE:
        # As its table has them.
        pages = re.findall(rf"]\(({Path(REFERENCE).name}/\w+)\.md\)", source[0])
        source[0] += _tree("Packages", pages)


def _tree(caption: str, entries: list[str]) -> str:
    return f"\n\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(entries) + "\n```\n"
