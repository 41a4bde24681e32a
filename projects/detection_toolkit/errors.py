"""Errors that a user can fix: a command prints them as one line, without a traceback."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["MissingPackageError", "NonFinitePredictionError", "UnknownNameError", "UserError"]


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


_AFTER_TRAINING_STEP = (
    "Training has diverged or an input is damaged: lower optimizer.lr (2.5e-5 at 16 images a step "
    "is the released value), keep train.clip_grad.enabled, or turn train.amp off."
)


class NonFinitePredictionError(UserError, FloatingPointError):
    """Predictions that are not finite, where there is no going on without them.

    Attributes:
        where: list of (stage, image in the batch), counted from 0; empty where another process
            has met it.
    """

    def __init__(
        self,
        where: list[tuple[int, int]],
        *,
        images: Sequence[str] | None = None,
        advice: str = _AFTER_TRAINING_STEP,
    ):
        """
        Args:
            where: see the class.
            images: names of the batch's images, where they are known.
            advice: what may be the reason, and what helps.
        """
        self.where = where
        places = ", ".join(
            f"stage {s} of image {b if images is None else images[b]}" for s, b in where[:4]
        )
        more = f" and {len(where) - 4} more" if len(where) > 4 else ""
        if not where:
            places = "images of another process"
        of_batch = " of the batch" if images is None else ""
        super().__init__(f"Predictions are NaN or infinite at {places}{more}{of_batch}. {advice}")
