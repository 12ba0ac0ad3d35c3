"""Bad input is reported in one line and exit code 2, never as a traceback."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Sequence
from typing import NoReturn


class InputError(Exception):
    """What the user gave cannot be used. The message says what is wrong, where, and what would work."""


class Arguments(ArgumentParser):
    """A command's flags. Wrong ones are bad input like any other."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the flags")


def problems(what: str, found: Sequence[str]) -> InputError:
    """One error for all problems of a kind: the first ten of them and how many more there are."""
    more = [f"and {len(found) - 10} more"] if len(found) > 10 else []
    return InputError(f"{what}: {'; '.join([*found[:10], *more])}")


def positive(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def is_first() -> bool:
    """Whether this is the only process, or torchrun's rank 0."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def answer_flags(parse: Callable[[], object]) -> None:
    """
    A command's first act: --help and wrong flags do not wait for imports of seconds. What the flags say is parsed again
    by the command's main. Until that runs Ctrl-C ends the process at once: amid the imports it would leave a traceback.
    """
    run_command(parse)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def drop_output() -> None:
    """What is still to be written to stdout, where nobody reads it any more, goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def run_command(main: Callable[[], object]) -> None:
    """
    Run a command's `main`: InputError -> one line on stderr, exit 2; Ctrl-C -> exit 130; a rank that is gone -> one
    line, exit 1; the rest is a bug.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("stdin", "stdout", "stderr"):  # closed by whoever started us: no file of ours shall get its number
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if name != "stdin":  # there is no reading that
                setattr(sys, name, os.fdopen(null, "w"))
    try:
        try:
            os.getcwd()  # libraries want one, and fail in ways of their own
        except OSError as error:
            raise InputError(f"the current directory: {error.strerror}; change to another") from None
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # a model may write what a terminal cannot
        main()
        sys.stdout.flush()  # here, where a reader that is gone can be dealt with
    except InputError as error:
        if not is_first():
            time.sleep(1)  # most errors occur on every rank: rank 0 tells, and torchrun ends the others meanwhile
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        # What a collective raises when its other end has died: gloo by message, NCCL by type.
        if "gloo/transport" not in str(error) and type(error).__name__ != "DistBackendError":
            raise
        print("error: the connection to another rank is lost: it was killed or failed, see above", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # whoever read our output has seen enough, `| head` say
        drop_output()
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        print(f"error: cannot write {error.filename or 'the output'}: {error.strerror}", file=sys.stderr)
        drop_output()
        sys.exit(1)
    except KeyboardInterrupt as stop:
        try:
            sys.stdout.flush()
        except OSError:  # the reader may be interrupted as well
            drop_output()
        if is_first():  # every rank is interrupted, and only rank 0 knows what is finished
            print(f"interrupted: {stop}" if str(stop) else "interrupted", file=sys.stderr)
        sys.exit(130)
