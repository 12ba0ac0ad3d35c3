"""Text to tokens and back: the checkpoint's tokenizer and chat template, stop tokens, and decoding while streaming."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import read_json
from errors import InputError

if TYPE_CHECKING:  # a second to import; what needs no text should not wait for it
    from transformers import PreTrainedTokenizerFast

Message = dict[str, str]
ROLES = ("system", "user", "assistant")


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The folder's tokenizer.json. Never runs code from the folder. Raises InputError when there is none that works."""
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder}: no tokenizer.json; copy the tokenizer files of the model there")
    if (folder / "tokenizer_config.json").is_file():
        read_json(folder / "tokenizer_config.json")
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.set_verbosity_error()  # the released files name a class that this one replaces
    try:
        with hushed():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            tokenizer.encode("a")  # some of its settings are not looked at before
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever the library makes of a garbled file; its panics are no Exception
        raise InputError(f"{folder}: tokenizer does not load: {type(error).__name__}: {error}") from None


@contextmanager
def hushed() -> Iterator[None]:
    """Without the process's stderr, to which a library in Rust writes a page before its panic becomes an exception."""
    if sys.stderr is None:  # closed by whoever started us
        yield
        return
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def stop_ids(folder: str | Path, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """End-of-sequence ids of generation_config.json and config.json (one or a list each) and of the tokenizer."""
    ids = {tokenizer.eos_token_id} - {None}
    for name in ("generation_config.json", "config.json"):
        if (path := Path(folder) / name).is_file():
            found = read_json(path).get("eos_token_id")
            found = found if isinstance(found, list) else [found]
            if any(type(id) is not int and id is not None for id in found):
                raise InputError(f"{path}: eos_token_id is {found}, wanted an integer or a list of them")
            ids.update(id for id in found if id is not None)
    return frozenset(ids)


def check_messages(messages: Any, where: str) -> list[Message]:
    """`messages` as a list of {"role", "content"}, or InputError that begins with `where`."""
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: messages should be a list of {{role, content}}")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise InputError(f"{where}: a message needs a role, {' or '.join(ROLES)}: {json.dumps(message)[:80]}")
        if not isinstance(message.get("content"), str):
            raise InputError(f"{where}: a message's content should be text: {json.dumps(message)[:80]}")
    return messages


def encode(tokenizer: PreTrainedTokenizerFast, prompt: str | list[Message], system: str | None = None) -> list[int]:
    """
    Token ids of a conversation up to where the assistant speaks, by the checkpoint's own chat template; with `system`
    in front unless it brings a system message of its own. Text is the user's only message, and without a chat template
    (a base model) text to continue.
    """
    try:
        (prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)).encode()
    except UnicodeEncodeError:
        raise InputError("the prompt has half of a surrogate pair, which is no character") from None
    if isinstance(prompt, str) and not tokenizer.chat_template:
        if system:
            raise InputError("--system needs a chat template, and this checkpoint's tokenizer has none")
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat_template; only plain prompts work with this checkpoint")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system and all(message["role"] != "system" for message in messages):
        messages = [{"role": "system", "content": system}, *messages]
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except Exception as error:  # a template is a program of the checkpoint's; it may refuse a role or be broken
        raise InputError(f"the chat template does not take this conversation: {error}") from None


class StreamDecoder:
    """Tokens to text as they come. A character of several tokens is held back until it is whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.start = 0  # decoding starts here: at a character's boundary, a few tokens back for the context
        self.shown = 0  # tokens whose text has been returned

    def add(self, ids: list[int]) -> str:
        """The text that `ids` complete."""
        self.ids += ids
        before, after = self._decode(self.shown), self._decode(len(self.ids))
        if after.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self.start, self.shown = self.shown, len(self.ids)
        return after[len(before) :]

    def end(self) -> str:
        """What is still held back, broken characters and all."""
        return self._decode(len(self.ids))[len(self._decode(self.shown)) :]

    def _decode(self, end: int) -> str:
        return self.tokenizer.decode(
            self.ids[self.start : end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


class StopStrings:
    """Passes text on up to the first of some strings, holding back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]):
        self.stop = stop
        self.held = ""
        self.found = False

    def add(self, text: str) -> str:
        text = self.held + text
        if hits := [at for stop in self.stop if (at := text.find(stop)) >= 0]:
            self.found, self.held = True, ""
            return text[: min(hits)]
        lengths = ((stop, n) for stop in self.stop for n in range(1, min(len(stop), len(text) + 1)))
        held = max((n for stop, n in lengths if text.endswith(stop[:n])), default=0)
        self.held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """What was held back and was no beginning after all."""
        return self.held
