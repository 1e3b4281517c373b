"""What a user is told. Each error is one sentence or two: what was expected, what came, what to do. No traceback.

The command line turns a `UserError` into its text on stderr and its exit code; any other exception is a bug of ours.
"""

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_RESUMABLE = 75
"""Stopped on request: run the same command again (the batch script turns it into a requeue)."""


class UserError(Exception):
    """Base of the errors that a user can act on."""

    exit_code = EXIT_FAILED


class ConfigError(UserError):
    """The command line or a config file is wrong."""

    exit_code = EXIT_USAGE


class DataError(UserError):
    """A data file or a store is absent, damaged or not what it claims to be."""


class StoppedError(UserError):
    """Ended on request; the same command goes on."""

    exit_code = EXIT_RESUMABLE


class RunError(UserError):
    """A run cannot start or go on (launch mistake, non-finite training, a locked run directory)."""
