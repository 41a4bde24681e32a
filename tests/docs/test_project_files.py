"""CITATION.cff and CHANGELOG.md are well formed, and agree with the package and the README."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

import yaml

from detection_toolkit import __version__

ROOT = Path(__file__).resolve().parents[2]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_citation_has_what_the_format_requires():
    """Of version 1.2.0: https://github.com/citation-file-format/citation-file-format."""
    assert CITATION["cff-version"] == "1.2.0" and CITATION["type"] == "software"
    assert CITATION["title"] and CITATION["message"] and CITATION["authors"]
    assert CITATION["version"] == __version__
    assert CITATION["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    paper = CITATION["preferred-citation"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert paper["type"] == "conference-paper" and paper["conference"]["name"]
    for author in [*CITATION["authors"], *paper["authors"]]:
        assert set(author) in ({"name"}, {"family-names", "given-names"}), author


def test_the_citation_is_that_of_the_readme():
    (bibtex,) = re.findall(r"```bibtex\n(.*?)```", README, flags=re.DOTALL)
    entry = dict(re.findall(r"^ +(\w+) += \{(.*)\},?$", bibtex, flags=re.MULTILINE))
    paper = CITATION["preferred-citation"]
    names = [f"{a['family-names']}, {a['given-names']}" for a in paper["authors"]]
    assert entry["title"] == paper["title"]
    assert entry["author"].split(" and ") == names
    assert int(entry["year"]) == paper["year"]


def test_the_changelog_lists_its_versions_newest_first():
    headings = re.findall(r"^## (.*)$", CHANGELOG, flags=re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    released = [re.fullmatch(r"\[([\d.]+)\] - (\d{4}-\d{2}-\d{2})", text) for text in headings[1:]]
    assert released and all(released), headings
    dates = [date.fromisoformat(match[2]) for match in released]
    assert dates == sorted(dates, reverse=True)
    assert released[0][1] == __version__


def test_the_changelog_has_the_usual_kinds_of_changes():
    kinds = set(re.findall(r"^### (.*)$", CHANGELOG, flags=re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
