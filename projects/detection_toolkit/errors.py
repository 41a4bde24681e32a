"""Errors that a user can fix: a command prints them as one line, without a traceback."""

from __future__ import annotations

__all__ = ["MissingPackageError", "UnknownNameError", "UserError"]


class UserError(ValueError):
    """Wrong input. The message names the file, key or value, and what to do about it.

    Whatever else is raised, a plain ``ValueError`` too, is a defect of a program and keeps its
    traceback; ``OSError`` alone (a missing file, a full disk) is as much the user's.
    """


class UnknownNameError(UserError, KeyError):
    """A name that nothing has; the message tells the nearest ones."""

    # A KeyError shows the representation of its argument, with quotes and escapes.
    __str__ = Exception.__str__


class MissingPackageError(UserError, ImportError):
    """An optional package is missing; the message says how to install it."""
