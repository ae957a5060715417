"""The error that a user can put right."""

from __future__ import annotations


class UserError(ValueError):
    """Something about the input or the machine that the user can change, told in one line.

    The message names the file or the option, what was seen and what to do. The command line prints it without a
    traceback and ends with exit code 2.
    """
