"""The site builds without warnings, needs no other host and no server, and nothing is left out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browsers import chromium, open_tab

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PROJECTS = ROOT / "projects"
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


def build(folder: Path, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """As ``make docs`` does, from scratch."""
    options = ["-q", "-W", "--keep-going", "--no-color", "-c", root / "docs"]
    options += ["-d", folder / "doctrees"]
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            *options,
            "-d",
            folder / "doctrees",
            root,
            folder / "site",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=root,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    result = build(folder)
    assert result.returncode == 0, result.stdout
    return folder / "site"


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_every_link_within_the_site_leads_somewhere(site):
    """Also those that extensions have made, and to anchors of equations and docstrings."""
    pages = {page: read(page) for page in site.rglob("*.html")}
    for page, parsed in pages.items():
        for link in parsed.links:
            target, _, anchor = link.partition("#")
            if "://" in link or link.startswith("mailto:"):
                continue
            found = (page.parent / target).resolve() if target else page
            assert found.exists(), f"{page.relative_to(site)} links to {link}"
            if anchor and found in pages:
                assert anchor in pages[found].anchors, f"{page.relative_to(site)} links to {link}"


@pytest.mark.slow
def test_every_page_is_in_the_menu(site):
    page = (site / "docs" / "index.html").read_text(encoding="utf-8")
    menu = page[page.index('class="sidebar-tree"') : page.index('class="main"')]
    listed = set(re.findall(r'href="([\w./-]+)\.html"', menu))
    pages = {str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.rglob("*.md")}
    outside = {"../notebooks/tutorial", "../CONTRIBUTING", "../CHANGELOG", "../SECURITY"}
    assert (pages - {"index"}) | outside <= listed


@pytest.mark.slow
def test_equations_are_markup_and_none_is_left_as_text(site):
    text = (site / "docs" / "method.html").read_text(encoding="utf-8")
    numbers = [int(n) for n in re.findall(r'id="eq-(\d+)"', text)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 12
    assert text.count("<math") > len(numbers)
    for page in (site / "docs").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert 'class="math notranslate' not in text and "\\tag{" not in text, page


def packages() -> list[str]:
    """Methods, and the toolkit's packages."""
    toolkit = PROJECTS / "detection_toolkit"
    methods = {path.parent.name for path in PROJECTS.glob("*/__init__.py")} - {toolkit.name}
    parts = {f"{toolkit.name}.{path.parent.name}" for path in toolkit.glob("*/__init__.py")}
    return sorted(methods | parts)


@pytest.mark.parametrize("package", packages())
def test_the_reference_has_a_page_and_a_row_of_the_package(package):
    page = f"reference/{package.rpartition('.')[2]}.md"
    assert f"\n.. automodule:: {package}\n" in (DOCS / page).read_text(encoding="utf-8")
    assert f"\n| [{package}]({page}) | " in (DOCS / "reference.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "detection_toolkit.config.get_config",
        "detection_toolkit.structures.StageOutput",
        "detection_toolkit.modeling.QueryDetector.forward",
        "detection_toolkit.data.DetectionMapper",
        "detection_toolkit.engine.Predictor",
        "detection_toolkit.evaluation.evaluate_stages",
        "detection_toolkit.visualization.trace_stages",
        "stageinteractor.CrossStageMatcher",
        "sqr.QueryRecollection",
    ],
)
def test_the_reference_holds_the_public_interface(site, name):
    parts = name.split(".")
    page = site / "docs" / "reference" / f"{parts[parts[0] == 'detection_toolkit']}.html"
    assert name in read(page).anchors
    # Every page of the reference is of one package: its roles are links or code, and none is huge.
    assert ":class:" not in page.read_text(encoding="utf-8")
    assert page.stat().st_size < 1_000_000


@pytest.mark.slow
def test_a_docstring_leads_to_where_a_name_is_imported_from(site):
    """``:class:`~detection_toolkit.modeling.CascadeDecoder``` on another package's page."""
    links = read(site / "docs" / "reference" / "sqr.html").links
    assert "modeling.html#detection_toolkit.modeling.CascadeDecoder" in links


@pytest.mark.slow
def test_the_notebook_is_a_page(site):
    page = read(site / "notebooks" / "tutorial.html")
    assert "img" in page.tags and "fine-tune" in page.anchors


@pytest.mark.slow
def test_files_that_pages_link_to_are_shown(site):
    shown = (site / "source" / "tools" / "setup_env.py.html").read_text(encoding="utf-8")
    assert "def read_requirements" in re.sub(r"<[^>]+>", "", shown)


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


PAGES = ("docs/index", "docs/configs", "docs/method", "docs/parity", "docs/results",
         "docs/reference/modeling", "docs/reference/visualization", "notebooks/tutorial",
         "source/tools/setup_env.py")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 800, 1440])
def test_no_page_scrolls_sideways_or_asks_for_anything_else(site, browser, width):
    """Opened as files; on a phone, what is wide scrolls in itself."""
    tab = open_tab(browser, viewport={"width": width, "height": 800})
    asked, errors = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        for page in PAGES:
            tab.goto((site / f"{page}.html").as_uri())
            over = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert tab.evaluate(over) == 0, f"{page} at {width} pixels"
    assert not errors
    assert asked and not [url for url in asked if not url.startswith(("file:", "data:"))]
    tab.close()


@pytest.mark.slow
def test_the_search_works_without_a_server(site, browser):
    tab = open_tab(browser)
    tab.goto((site / "search.html").as_uri() + "?q=evaluate_stages")
    # One result after the other is shown.
    tab.locator("#search-results li a[href*='reference/evaluation.html']").first.wait_for()
    tab.close()


@pytest.mark.slow
def test_the_first_page_leads_to_the_documentation(site, browser):
    tab = open_tab(browser)
    tab.goto((site / "index.html").as_uri())
    tab.wait_for_url("**/docs/index.html")
    tab.close()


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> str:
    """What a build says of a small site in which much is wrong."""
    root = tmp_path_factory.mktemp("broken")
    for folder in ("_extensions", "_root", "_static"):
        shutil.copytree(DOCS / folder, root / "docs" / folder)
    # The settings of the site, but for its menu.
    settings = (DOCS / "conf.py").read_text(encoding="utf-8")
    menu = 'menu = {"Reference": ["/docs/toy"]}'
    settings, replaced = re.subn(r"^menu = \{.*?^\}$", menu, settings, flags=re.S | re.M)
    assert replaced == 1
    (root / "docs" / "conf.py").write_text(settings)
    (root / "docs" / "index.md").write_text(
        "# Heading\n\n[a](nowhere.md), [b](index.md#no-such-heading), [c](../tools/no_such_tool.py)"
        ", [d](#eq-7), [fine](#eq-1), [fine](../tools/tool.py), [fine](../tools)\n\n"
        "```math\nx \\tag{1}\n```\n\n```math\n\\begin{nonsense} a & b \\end{nonsense}\n```\n"
    )
    (root / "docs" / "toy.md").write_text("# Toy\n\n```{eval-rst}\n.. automodule:: toy\n```\n")
    (root / "docs" / "forgotten.md").write_text("# Forgotten\n")
    (root / "tools").mkdir()
    (root / "tools" / "tool.py").write_text("tool = 1\n")
    (root / "projects" / "toy").mkdir(parents=True)
    (root / "projects" / "toy" / "__init__.py").write_text(
        '"""A :class:`toy.Absent`, a :func:`fine`, a :func:`_private`."""\n'
        '__all__ = ["fine"]\n\n\ndef fine():\n    """Raises:\n\n        ValueError: always."""\n'
        '\n\ndef _private():\n    """Shown without a link."""\n'
    )
    result = build(root / "output", root)
    assert result.returncode != 0
    return result.stdout


@pytest.mark.parametrize(
    "what",
    ["nowhere.md", "no-such-heading", "no_such_tool.py", "eq-7", "nonsense", "forgotten.md",
     "toy.Absent"],
)  # fmt: skip
def test_what_leads_nowhere_fails_the_build(broken, what):
    assert what in broken


def test_what_is_right_is_not_warned_of(broken):
    assert "fine" not in broken and "tool.py" not in broken.replace("no_such_tool.py", "")
    assert "_private" not in broken and "ValueError" not in broken and "eq-1" not in broken
    assert broken.count("WARNING") == 7
