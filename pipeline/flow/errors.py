"""What the program says to people when it cannot go on, and the exit code that goes with it.

UserError  2   bad input or settings: the message names file:line or key, what was expected, what mends it
RowFailed  1   a row's worker failed
Damaged    3   a stored file is not what its manifest says
NonFinite  4   a loss, gradient or score is not a number
Locked     5   another process works on the same row or run directory
"""

from __future__ import annotations


class UserError(Exception):
    """Shown without a traceback."""

    exit_code = 2


class RowFailed(UserError):
    exit_code = 1


class Damaged(UserError):
    exit_code = 3


class NonFinite(UserError):
    exit_code = 4


class Locked(UserError):
    exit_code = 5
