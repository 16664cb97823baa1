"""The one exception that a user meets: :class:`UserError`."""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the user's, told in one line: which file, key or row, and what is allowed."""

    def _render_traceback_(self) -> list[str]:  # IPython asks the exception how it wants to be shown
        return [f"error: {self}"]
