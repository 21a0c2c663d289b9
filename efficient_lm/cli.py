"""What every door shares: flags of a config, and errors as one line with an exit code."""

import errno
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from efficient_lm import registry
from efficient_lm.config import Config, ModelConfig
from efficient_lm.errors import CheckpointError, ConfigError, UserError

USAGE_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, as shells report it
BROKEN_PIPE_EXIT_CODE = 141  # 128 + SIGPIPE
# What a file system refuses, which no check before could have told.
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)


def run_door(main: Callable[[], int | None]) -> NoReturn:
    """Parse the flags, call `main()` and exit with what it returns (None: 0).

    A UserError, a wrong flag, an unknown config field, an implementation of an op that cannot run
    here or a full disk becomes one line on stderr and its exit code; Ctrl-C exits with 130, a
    closed output pipe with 141. Other exceptions are bugs and keep their traceback.
    """
    _open_standard_streams()
    for name in ("config", "print_config"):  # so that --help shows them
        if name in flags.FLAGS:
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    logging.set_verbosity(logging.WARNING)  # libraries report each of their own steps as info
    app.run(lambda argv: _guarded(main), flags_parser=_parse)


def define_config_flag(default: str | None = None) -> Callable[[], Config]:
    """Define `--config=file.py[:argument]`, `--config.a.b=c` and `--print_config`.

    Returns a function for use in `main`: the checked Config, or exit 0 after printing it as JSON
    with `--print_config`. It raises ConfigError for a missing file or a bad field.
    """
    config_flags.DEFINE_config_file("config", default, "Config file, and fields to override.")
    flags.DEFINE_bool("print_config", False, "Print the config, overrides applied, and exit.")

    def read() -> Config:
        if flags.FLAGS["config"].value is None:
            raise ConfigError("no config is given; name a file: --config=configs/quickstart.py")
        values = flags.FLAGS.config
        if not isinstance(values, ConfigDict):
            raise ConfigError(
                f"get_config() of the --config file returned {values!r:.80}; it must return "
                "Config(...).to_config_dict()"
            )
        config = Config.from_config_dict(values)
        if flags.FLAGS.print_config:
            print(json.dumps(config.to_dict(), indent=2))
            raise SystemExit(0)
        return config

    return read


def define_override_flag() -> Callable[[Config], Config]:
    """Define `--config.a.b=c` alone, for doors that read the config of a run.

    Returns a function for use in `main`: the given Config with the overrides applied and checked.
    """
    methods = ModelConfig(
        mixers={name: {} for name in registry.MIXERS},
        ffns={name: {} for name in registry.FEED_FORWARDS},
    )
    fields = Config(model=methods).to_config_dict()  # of any run
    with _unknown_fields_named(sys.argv):  # this kind of flag reads its overrides at once
        config_flags.DEFINE_config_dict("config", fields, "Fields to override.")

    def override(config: Config) -> Config:
        values = config_flags.get_override_values(flags.FLAGS["config"])
        config_dict = config.to_config_dict()
        for path in values:
            group, _, rest = path.removeprefix("model.").partition(".")
            known = config_dict.model[group] if group in ("mixers", "ffns") else ()
            if known and rest.partition(".")[0] not in known:
                raise ConfigError(f"config.{path}: the {group} of the run are {', '.join(known)}")
        config_dict.update_from_flattened_dict(values)
        return Config.from_config_dict(config_dict)

    return override


def _parse(argv: Sequence[str]) -> list[str]:
    """flags.FLAGS(argv) with errors as one line; no positional arguments are allowed."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = argument.lstrip("-").partition("=")
        if name == "config" and argument.startswith("-"):
            _check_config_file(value if equals else following)
    with _unknown_fields_named(argv):
        rest = _guarded(lambda: flags.FLAGS(argv))
    if flags.FLAGS["verbosity"].using_default_value:
        # Warnings; the default would become what libraries tell of each of their own steps.
        flags.FLAGS.verbosity = -1
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}; flags start with --", USAGE_EXIT_CODE)
    return rest


@contextmanager
def _unknown_fields_named(argv: Sequence[str]) -> Iterator[None]:
    """Turn what ml_collections raises for a `--config.a.b` it does not know into a line."""
    try:
        yield
    except (AttributeError, KeyError) as error:
        line = _unknown_field(error, argv)
        if line is None:
            raise
        _fail(line, USAGE_EXIT_CODE)


def _guarded(function: Callable):
    """function(), with the errors that are the user's to mend turned into a line and an exit."""
    try:
        result = function()
        sys.stdout.flush()
        return result
    except UserError as error:
        _fail(str(error), error.exit_code)
    except flags.UnrecognizedFlagError as error:
        if error.flagname.startswith("config.") and "config" in flags.FLAGS:
            _fail(f"--{error.flagname} needs a config to change; add --config=...", USAGE_EXIT_CODE)
        _fail(
            re.sub(r"\. Did you mean: (.*?) *\?", r"; did you mean \1?", str(error)),
            USAGE_EXIT_CODE,
        )
    except flags.Error as error:
        cause = _user_error(error)
        # A config file that was given no argument, or one too many, comes with its traceback.
        line = re.sub(r"Error whilst.*TypeError: (?=get_config\(\) )", "", str(error), flags=re.S)
        _fail(str(cause or line), cause.exit_code if cause else USAGE_EXIT_CODE)
    except ValueError as error:
        if not _is_refused_implementation(error):
            raise
        _fail(str(error), USAGE_EXIT_CODE)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED_EXIT_CODE)
    except BrokenPipeError:
        _drop_output()
        raise SystemExit(BROKEN_PIPE_EXIT_CODE) from None
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        if error.filename is None:
            _drop_output()
        _fail(
            f"cannot use {error.filename or 'the output'}: {error.strerror}; free some space, or "
            "give a place that may be read and written",
            CheckpointError.exit_code,
        )


def _open_standard_streams() -> None:
    """Nothing to read and nowhere to write, in place of standard streams that are closed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, open to the end


def _drop_output() -> None:
    """Send stdout nowhere: the interpreter would complain again when it flushes it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_refused_implementation(error: ValueError) -> bool:
    """Whether an op refused the name of its implementation; doors without ops import none."""
    dispatch = sys.modules.get("pallas_kernels._core.dispatch")
    return dispatch is not None and isinstance(error, dispatch.ImplementationError)


def _user_error(error: BaseException | None) -> UserError | None:
    """The first UserError of a chain: a config file's own, which the flag library wraps."""
    first = None
    while error is not None:
        first = error if isinstance(error, UserError) else first
        error = error.__cause__ or error.__context__
    return first


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def _unknown_field(error: AttributeError | KeyError, argv: Sequence[str]) -> str | None:
    """The line for a `--config.a.b` that the config does not have; None for other errors."""
    if not _only_in(error, ("absl", "ml_collections")):
        return None
    if getattr(error, "name", None) == "get_config":
        return "the --config file has no function get_config()"
    quoted = re.findall(r"['\"]([\w.]+)['\"]", str(error).replace("\\'", "'"))
    if not quoted:
        return None
    name, near = quoted[0], quoted[1] if len(quoted) > 1 else None
    path = f"config.{name}"
    for argument in argv:
        parts = argument.lstrip("-").partition("=")[0].split(".")
        if parts[0] == "config" and name in parts:
            path = ".".join(parts[: parts.index(name) + 1])
    return f"unknown field {path}" + (f"; did you mean {near!r}?" if near else "")


def _only_in(error: BaseException, packages: tuple[str, ...]) -> bool:
    """Whether `error` was raised by one of `packages`, called from here without other code."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return all(f == __file__ or any(p in f for p in packages) for f in files)


def _check_config_file(value: str) -> None:
    """Exit with the files that are there when `value`, path[:argument], is no file."""
    path = Path(value.partition(":")[0])
    if not value or path.is_file():
        return
    names = sorted(f.name for f in path.parent.glob("*.py")) if path.parent.is_dir() else []
    files = f"; files there: {', '.join(names)}" if names else ""
    _fail(f"--config={value}: there is no file {path}{files}", USAGE_EXIT_CODE)
