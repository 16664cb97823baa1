"""The one exception that a user meets: :class:`UserError`."""

from __future__ import annotations


class UserError(Exception):
    """A user's mistake, in one line: which file, key or row is wrong, and what is allowed."""

    def _render_traceback_(self) -> list[str]:  # IPython shows an exception by this method
        return [f"error: {self}"]
