"""The site builds without warnings, needs no other host, and nothing is left out of its menu."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# Where a browser would go by itself; a link that a reader may click is no such place.
LOADING = {
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src",),
    "img": ("src", "srcset"),
    "image": ("href", "xlink:href"),
    "input": ("src",),
    "link": ("href",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "track": ("src",),
    "use": ("href", "xlink:href"),
    "video": ("src", "poster"),
}
REMOTE = re.compile(r"(?:https?:)?//", flags=re.IGNORECASE)


def build(folder: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config)]
    return subprocess.run(
        [*command, "--site-dir", str(folder)],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    result = build(folder)
    assert result.returncode == 0, result.stdout
    return folder


class Loads(HTMLParser):
    """Collects what a page loads, its anchors and its links."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            if tag == "a" and name == "href" and value:
                self.links.append(value)
            if name in LOADING.get(tag, ()) and value:
                self.loaded.append(value)
            if name == "style" and value:
                self.loaded += re.findall(r"url\(['\"]?([^'\")]+)", value)


def read(page: Path) -> Loads:
    parser = Loads()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser


def test_no_page_loads_anything_from_another_host(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        remote = [url for url in read(page).loaded if REMOTE.match(url.strip())]
        assert not remote, f"{page.relative_to(site)} loads {remote}"
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        urls = re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", text)
        assert not [u for pair in urls for u in pair if REMOTE.match(u)], sheet


def test_the_check_above_notices_what_it_is_for(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        '<script src="https://a/x.js"></script><img src="//b/y.png"><a href="https://fine">x</a>'
        '<link href="https://c/z.css"><p style="background: url(https://d/w.png)">'
    )
    assert [bool(REMOTE.match(url)) for url in read(page).loaded] == [True] * 4


def test_every_link_within_the_site_leads_somewhere(site):
    """Also those that hooks have made, and to anchors of equations and docstrings."""
    pages = {page: read(page) for page in site.rglob("*.html") if page.name != "404.html"}
    for page, parsed in pages.items():
        for link in parsed.links:
            target, _, anchor = link.partition("#")
            if "://" in link or link.startswith("mailto:"):
                continue
            found = (page.parent / target).resolve() if target else page
            assert found.exists(), f"{page.relative_to(site)} links to {link}"
            if anchor and found in pages:
                assert anchor in pages[found].anchors, f"{page.relative_to(site)} links to {link}"


def test_every_page_of_docs_is_in_the_menu(site):
    (menu,) = re.findall(
        r'<nav class="md-nav md-nav--primary.*?</nav>\s*</div>',
        (site / "index.html").read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    listed = set(re.findall(r'href="([\w./-]+)\.html"', menu))
    assert {path.stem for path in DOCS.glob("*.md")} | {"tutorial"} <= listed | {"index"}


def test_equations_are_markup_and_none_is_left_as_text(site):
    text = (site / "method.html").read_text(encoding="utf-8")
    numbers = [int(n) for n in re.findall(r'id="eq-(\d+)"', text)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 12
    assert text.count("<math") > len(numbers)
    for page in site.rglob("*.html"):
        assert "arithmatex" not in page.read_text(encoding="utf-8"), page


def test_the_reference_holds_the_public_interface(site):
    anchors = read(site / "reference.html").anchors
    for name in (
        "detection_toolkit.config.get_config",
        "detection_toolkit.structures.StageOutput",
        "detection_toolkit.modeling.QueryDetector.forward",
        "stageinteractor.CrossStageMatcher",
        "detection_toolkit.data.DetectionMapper",
        "detection_toolkit.engine.Predictor",
        "detection_toolkit.evaluation.evaluate_stages",
        "detection_toolkit.visualization.trace_stages",
        "sqr.QueryRecollection",
    ):
        assert name in anchors
    assert ":class:" not in (site / "reference.html").read_text(encoding="utf-8")


def test_the_notebook_is_a_page(site):
    page = read(site / "tutorial.html")
    assert "img" in page.tags and "fine-tune" in page.anchors


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[there](nowhere.md)", "nowhere.md"),
        ("[there](index.md#no-such-heading)", "no-such-heading"),
        ("[there](../tools/no_such_tool.py)", "no_such_tool.py"),
        ("```math\n\\begin{nonsense} a & b \\end{nonsense}\n```", "nonsense"),
    ],
)
def test_what_leads_nowhere_fails_the_build(tmp_path, text, said):
    docs = tmp_path / "docs"
    (docs / "_hooks").mkdir(parents=True)
    (docs / "_hooks" / "site.py").write_bytes((DOCS / "_hooks" / "site.py").read_bytes())
    (docs / "index.md").write_text(f"# Heading\n\n{text}\n")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "tutorial.ipynb").write_text('{"cells": []}')
    # The settings of the site, but for its menu and the reference.
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    settings = re.sub(r"^nav:\n(?: .*\n)+", "", settings, flags=re.MULTILINE)
    settings = re.sub(r"^  - mkdocstrings:\n(?:    .*\n)+", "", settings, flags=re.MULTILINE)
    settings = re.sub(r"^extra_css:\n(?: .*\n)+", "", settings, flags=re.MULTILINE)
    config = tmp_path / "mkdocs.yml"
    config.write_text(settings)
    result = build(tmp_path / "site", config)
    assert result.returncode != 0
    assert said in result.stdout
