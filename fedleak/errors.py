"""The errors that fedleak raises on purpose; each message names the key, the value and the mend."""

from __future__ import annotations


class FedleakError(Exception):
    """Something went wrong that the user must hear about; the command line exits with 1."""


class UsageError(FedleakError):
    """The user asked for something impossible; raised before any work, and the command line exits with 2."""
