"""
The keyboard of a chat: line editing and history at the prompt, and Ctrl-C that stops an answer.

Ctrl-C at a terminal signals every process of the job, torchrun's own too, which would then end all of them. So the
terminal's interrupt character is switched off for the time of the chat, and read as an ordinary key instead.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import threading
from pathlib import Path

from errors import InputError

try:
    import readline
    import termios
except ImportError:  # not on every system; then there is neither editing nor Ctrl-C as a key
    readline = termios = None

CTRL_C = b"\x03"
CTRL_D = b"\x04"
ESCAPES = re.compile(rb"\x1b(\[[0-9;]*[A-Za-z~]|O.|.)")  # arrows and other keys that are no character
HISTORY = Path(os.path.expanduser("~/.deepseek_v3_history"))


def typed_text(keys: bytes) -> str:
    """What a line of keys leaves behind, Backspace, Ctrl-W, Ctrl-U and Ctrl-C included."""
    text: list[str] = []
    for c in ESCAPES.sub(b"", keys).decode(errors="surrogateescape"):
        if c in "\x7f\b":
            del text[-1:]
        elif c == "\x17":
            kept = "".join(text).rstrip()
            del text[kept.rfind(" ") + 1 :]
        elif c in "\x15\x03":
            text.clear()
        elif c >= " " or c == "\t":
            text.append(c)
    return "".join(text)


class Terminal:
    """Use as a context manager; with `enabled` false (ranks without a keyboard) it reads and writes nothing."""

    def __init__(self, enabled: bool = True):
        if enabled and sys.stdin is None:
            raise InputError("--interactive: stdin is closed")
        self.enabled = enabled
        self.typed = b""  # while an answer was being printed
        self.is_tty = enabled and termios is not None and sys.stdin.isatty()
        self.edits = self.is_tty and sys.stdout is not None and sys.stdout.isatty()  # readline needs both
        self.at_prompt = False
        self.signalled = False

    def __enter__(self) -> Terminal:
        if self.enabled:
            sys.stdin.reconfigure(errors="surrogateescape")  # a strict decoder loses the lines after a bad one, too
        self.old_handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
        signal.signal(signal.SIGINT, self._on_signal)
        if self.is_tty:
            self.saved = termios.tcgetattr(sys.stdin)
            self._end_by_sigterm()
            quiet = termios.tcgetattr(sys.stdin)
            quiet[6][termios.VINTR] = b"\0"  # no key interrupts; Ctrl-\ still ends a program that hangs
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
            self.asking, self.answering = quiet, termios.tcgetattr(sys.stdin)
            self.answering[3] &= ~(termios.ICANON | termios.ECHO)
            readline.parse_and_bind(r'"\C-c": kill-whole-line')
            with contextlib.suppress(OSError):
                readline.read_history_file(HISTORY)
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_tty:
            self._restore()
        for number, handler in self.old_handlers:
            signal.signal(number, handler)
        if self.is_tty:
            os.close(signal.set_wakeup_fd(self.old_wakeup))

    def _restore(self) -> None:
        readline.set_history_length(1000)
        try:
            with contextlib.suppress(OSError):
                readline.write_history_file(HISTORY)
        finally:  # last: at SIGTERM the main thread may be setting it meanwhile
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self.saved)

    def _end_by_sigterm(self) -> None:
        """
        From now on SIGTERM, which torchrun sends when another rank has died, restores the terminal and ends this
        process. Not by a handler: Python's wait for the main thread, and that may wait for the dead rank for ever.
        """
        signals, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        self.old_wakeup = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda number, frame: None)

        def wait() -> None:
            with os.fdopen(signals, "rb", buffering=0) as arriving:
                while number := arriving.read(1):
                    if number[0] == signal.SIGTERM:
                        try:
                            self._restore()
                        finally:
                            os._exit(128 + signal.SIGTERM)

        threading.Thread(target=wait, daemon=True).start()

    def _on_signal(self, number: int, frame: object) -> None:
        self.signalled = True
        if self.at_prompt and not self.is_tty:  # a pipe that nothing comes out of
            raise KeyboardInterrupt

    def read_line(self) -> str | None:
        """The next line, stripped; None at the end of input."""
        if self.is_tty:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self.asking)
        self.at_prompt = True
        try:
            line, end, rest = self.typed.partition(b"\n")
            if end:
                line, self.typed = typed_text(line), rest
                print(f"> {line}")
            else:
                text, typed, self.typed = typed_text(self.typed), self.typed, b""
                if CTRL_D in typed and not text:  # after text it does nothing, as at the prompt
                    raise EOFError
                if self.edits:
                    readline.set_startup_hook(lambda: readline.insert_text(text.encode(errors="replace").decode()))
                    line = input("> ")
                elif self.is_tty:
                    line = typed_text((text + input("> " + text)).encode(errors="surrogateescape"))
                else:
                    line = input("")
            line.encode()
        except EOFError:
            if self.is_tty:
                print()
            return None
        except UnicodeEncodeError:
            self.note("that line is not UTF-8 text")
            return ""
        finally:
            self.at_prompt = self.signalled = False  # at the prompt there was nothing to interrupt
        if self.is_tty:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self.answering)
        return line.strip()

    def interrupted(self) -> bool:
        """Whether Ctrl-C was pressed, or SIGINT received, since the last line was read."""
        while self.is_tty and select.select([sys.stdin], [], [], 0)[0]:
            keys = os.read(sys.stdin.fileno(), 1024)
            self.typed += keys.replace(b"\r", b"\n")  # as pasted lines end that came while readline asked
            if CTRL_C in keys:
                self.signalled, self.typed = True, b""
            if not keys:
                break
        return self.signalled

    def write(self, text: str) -> None:
        if self.enabled:
            print(text, end="", flush=True)

    def note(self, text: str) -> None:
        """A remark of the program's own, apart from the answers."""
        if self.enabled:
            print(f"[{text}]", file=sys.stderr, flush=True)
