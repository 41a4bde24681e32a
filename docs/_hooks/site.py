"""Hooks of the site: equations without scripts, and links to files outside of docs/.

- Equations are written as GitHub reads them: ``$...$`` in a line, and a fenced block ``math`` with
  an optional ``\\tag{3}`` for a numbered one. Both become MathML here, which browsers draw
  themselves. A numbered equation has the anchor ``eq-3``.
- A relative link to a file outside of docs/ gets a page that shows this file, so that the site
  needs no repository at any address. A link to a file that is not there fails the build, as MkDocs'
  own check does for links within docs/.
- A notebook's page shows its cells.

MkDocs calls these functions by their names: https://www.mkdocs.org/user-guide/plugins/#events.
"""

from __future__ import annotations

import html
import json
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

# Below MkDocs' own logger: a warning fails a strict build.
logger = logging.getLogger("mkdocs.hooks.site")

SOURCE_FOLDER = "source"
NOTEBOOKS = {"tutorial.md": "notebooks/tutorial.ipynb"}
"""Pages of the site that are made of notebooks."""

_FENCE = re.compile(r"^ *(`{3,}|~{3,})")
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
_INLINE_CODE = re.compile(r"(`+)(?:(?!\1).)+?\1")
_LEXERS = {".py": "python", ".json": "json", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml"}
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)
_TAG = re.compile(r"\s*\\tag\{(\d+)\}")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of notebooks, and of files outside of docs/ that a page links to."""
    docs = Path(config.docs_dir)
    root = docs.parent
    for name, notebook in NOTEBOOKS.items():
        text = notebook_to_markdown(root / notebook)
        files.append(File.generated(config, name, content=text))
    waiting = [
        (f"{docs.name}/{file.src_uri}", file.content_string)
        for file in files.documentation_pages()
        if file.src_uri not in NOTEBOOKS
    ]
    while waiting:
        path, text = waiting.pop()
        for target in sorted(set(_outside_links(text, path, docs.name))):
            name = source_page(target)
            if files.get_file_from_path(name) is not None or not (root / target).exists():
                continue
            content = show_source(root, target)
            page = File.generated(
                config, name, content=content, inclusion=InclusionLevel.NOT_IN_NAV
            )
            files.append(page)
            if target.endswith(".md"):
                waiting.append((target, content))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links out of docs/ to the pages that :func:`on_files` has made."""
    docs = Path(config.docs_dir)
    here = page.file.src_uri
    is_source = here.startswith(f"{SOURCE_FOLDER}/")
    path = here[len(SOURCE_FOLDER) + 1 : -len(".md")] if is_source else f"{docs.name}/{here}"
    if here in NOTEBOOKS:
        path = NOTEBOOKS[here]

    def lead(link: str) -> str:
        target, anchor = _resolve(link, path)
        if target is None:
            return link
        if target == docs.name or target.startswith(f"{docs.name}/"):
            destination = posixpath.relpath(target, docs.name)
        elif target in NOTEBOOKS.values():
            destination = next(name for name, t in NOTEBOOKS.items() if t == target)
        else:
            destination = source_page(target)
            if files.get_file_from_path(destination) is None:
                logger.warning("%s links to %s, which does not exist", path, target)
                return link
        return posixpath.relpath(destination, posixpath.dirname(here) or ".") + anchor

    return _map_links(markdown, lead)


def on_page_content(content: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the equations into MathML."""

    def replace(match: re.Match[str]) -> str:
        tex = html.unescape(match[2])
        display = match[1] == "div"
        number = _TAG.search(tex)
        try:
            math = convert(_TAG.sub("", tex).strip(), display="block" if display else "inline")
        except Exception as error:
            logger.warning("%s: equation %r: %r", page.file.src_uri, tex, error)
            return match[0]
        if "<mi>&</mi>" in math or "\\" in math:
            # What the converter does not know, it passes through.
            logger.warning("%s: equation %r was not understood", page.file.src_uri, tex)
        if not display:
            return math
        if number is None:
            return f'<div class="equation">{math}</div>'
        n = number[1]
        if page.present_anchor_ids is not None:
            page.present_anchor_ids.add(f"eq-{n}")  # for the check of links, which comes next
        return f'<div class="equation" id="eq-{n}">{math}<span>({n})</span></div>'

    return _EQUATION.sub(replace, content)


def source_page(target: str) -> str:
    """Name of the page that shows a file or folder of the repository."""
    return f"{SOURCE_FOLDER}/{target}.md"


def show_source(root: Path, target: str) -> str:
    """Markdown of such a page."""
    path = root / target
    header = f"---\ntitle: {target}\nsearch:\n  exclude: true\n---\n\n"
    if path.is_dir():
        names = sorted(p.name + "/" * p.is_dir() for p in path.iterdir() if p.name[0] not in "._")
        return header + f"# `{target}/`\n\n" + "".join(f"- `{name}`\n" for name in names)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return header + text
    fence = "`" * (max(map(len, re.findall("`{3,}", text)), default=2) + 1)
    lexer = _LEXERS.get(path.suffix, "text")
    return f"{header}# `{target}`\n\n{fence}{lexer}\n{text.rstrip()}\n{fence}\n"


def notebook_to_markdown(path: Path) -> str:
    """The cells of a notebook: text as it is, code as fenced blocks, printed output below."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    parts = []
    for cell in document["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source:
            parts.append(f"```python\n{source}\n```")
            parts += filter(None, map(_show_output, cell.get("outputs", ())))
    return "\n\n".join(parts) + "\n"


def _show_output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    for kind in ("image/jpeg", "image/png"):
        if kind in data:
            encoded = "".join(data[kind]).replace("\n", "")
            return f'<img alt="output of the cell above" src="data:{kind};base64,{encoded}">'
    text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
    return f"```text\n{text}\n```" if text else ""


def _outside_links(markdown: str, path: str, docs: str) -> list[str]:
    found: list[str] = []

    def note(link: str) -> str:
        target, _ = _resolve(link, path)
        inside = target is None or target == docs or target.startswith(f"{docs}/")
        if target is not None and not inside and target not in NOTEBOOKS.values():
            found.append(target)
        return link

    _map_links(markdown, note)
    return found


def _resolve(link: str, path: str) -> tuple[str | None, str]:
    """Path in the repository and anchor of a relative link; None for any other."""
    target, mark, anchor = link.partition("#")
    if not target or "://" in target or target.startswith(("mailto:", "/", "data:")):
        return None, ""
    resolved = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    return (None, "") if resolved.startswith("..") else (resolved, mark + anchor)


def _map_links(markdown: str, change: Any) -> str:
    """Replace the targets of links outside of code."""
    lines, fence = [], ""
    for line in markdown.split("\n"):
        mark = _FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence):
            fence = ""
        elif not fence:
            code = [m.span() for m in _INLINE_CODE.finditer(line)]

            def replace(match: re.Match[str], code: list[tuple[int, int]] = code) -> str:
                # A link within code is none; code within a link's text is.
                if any(start < match.start() < end for start, end in code):
                    return match[0]
                return match[1] + change(match[2]) + match[3]

            line = _LINK.sub(replace, line)
        lines.append(line)
    return "\n".join(lines)
