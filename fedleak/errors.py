"""The errors that fedleak raises on purpose; each message names the key, the value and the mend."""

from __future__ import annotations


class FedleakError(Exception):
    """Something went wrong that the user must hear about; the command line exits with 1."""


class UsageError(FedleakError):
    """The user asked for something impossible; raised before any work, and the command line exits with 2."""


def printable(text: object, most: int = 500) -> str:
    """Text from elsewhere on one line that a terminal can be given: control characters are shown, not obeyed."""
    line = " ".join(str(text).split())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in line)
    return shown if len(shown) <= most else f"{shown[:most]}…"
