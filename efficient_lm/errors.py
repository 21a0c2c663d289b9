"""Errors that are the user's to mend: one clear line and an exit code, no traceback."""


class UserError(Exception):
    """Something given is wrong. The message says what was given, what is allowed, what to do."""

    exit_code = 2


class ConfigError(UserError, ValueError):
    """A config field is unknown, ill-typed, out of range or at odds with another."""


class DataError(UserError):
    """Data or a tokenizer is missing, unreadable, empty or does not fit the model."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint or work directory is missing, damaged, unwritable or does not fit."""

    exit_code = 4


class NonFiniteError(UserError):
    """Loss or gradients stayed NaN or infinite for too many steps in a row."""

    exit_code = 5


class ProcessError(UserError):
    """Another process of the run cannot be reached, ended, or gives no sign of life."""

    exit_code = 6
