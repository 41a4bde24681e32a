"""Extension of Griffe, which reads the docstrings for the reference: Sphinx's roles become links.

``:class:`~stageinteractor.FilterBank``` is shown as ``FilterBank``, and leads there where
the reference has it.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|paper):`(~?)([^`]+)`")


class Roles(griffe.Extension):
    """Rewrites roles in all docstrings."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Called once all of a package has been read."""
        _rewrite(pkg)


def _rewrite(obj: griffe.Object) -> None:
    if obj.docstring is not None:
        obj.docstring.value = _ROLE.sub(lambda match: _link(match, obj), obj.docstring.value)
    for member in obj.members.values():
        if not member.is_alias:
            _rewrite(member)


def _link(match: re.Match[str], obj: griffe.Object) -> str:
    name = match[2].lstrip("~")
    shown = name.rsplit(".", 1)[-1] if match[1] else name
    # A name without a path belongs to the same module.
    target = name if "." in name else f"{obj.module.path}.{name}"
    return f'<autoref optional identifier="{target}"><code>{shown}</code></autoref>'
