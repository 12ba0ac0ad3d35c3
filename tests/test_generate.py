"""The command line of generate.py: batches, chats by pipe and at a terminal, several ranks, and every bad input."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

import generate
from batch import Results
from checkpoint import Checkpoint
from checkpoints import CHAT_TEMPLATE, SMALL, make_hf
from config import ModelArgs
from convert import convert
from errors import InputError, run_command
from llm import LLM, check_memory
from sampling import SamplingParams
from terminal import Terminal

INFERENCE = Path(__file__).parents[1] / "inference"
SCRIPT = INFERENCE / "generate.py"
CONTEXT = 2560  # what the checkpoints' configs allow
PROMPTS = ["one two three", "the lazy dog", "a mixture", "jumps over the question"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint whose greedy answers are single lines that never stop of themselves."""
    folder = make_hf(tmp_path_factory.mktemp("generate") / "small", "v3", mtp=1, **SMALL)
    vocab = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    state = load_file(folder / "model.safetensors")
    for token in (1, vocab["Ċ"], vocab["č"]):  # the end, \n and \r: a logit of 0, and some other token's is above it
        state["lm_head.weight"][token] = 0
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def input_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("input") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture
def command(capsys, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """Run generate.py's main as the script does: (exit code, stdout, stderr)."""

    def run(*argv: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, argv)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        code = 0
        try:
            run_command(generate.main)
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return run


def environment(**extra: str) -> dict[str, str]:
    """For subprocesses: one thread each, no ranks, and output that is buffered unless flushed."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONUNBUFFERED")
    ours = {name: value for name, value in os.environ.items() if name not in dropped}
    return ours | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | extra


def torchrun(*argv: object, ranks: int = 2, nodes: tuple[str, ...] = ()) -> list[str]:
    where = nodes or ("--standalone",)
    return [sys.executable, "-m", "torch.distributed.run", *where, f"--nproc-per-node={ranks}", *map(str, argv)]


def read_results(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def quietly_convert(source: Path, target: Path, mp: int, expert_parallel: bool = False) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        convert(source, target, mp, expert_parallel)


# --- batch ------------------------------------------------------------------------------------------------------------


def test_batch_of_text(folder, tmp_path, command):
    """Every field of every line, in the order of the prompts, against the API."""
    source, target = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    lines = [PROMPTS[0], "", "  ", "line\N{LINE SEPARATOR}separator and\fform feed", PROMPTS[1], "äöü 世界"]
    source.write_text("\r\n".join(lines), encoding="utf-8-sig")
    code, out, err = command(
        *("--ckpt-path", folder, "--input-file", source, "--output-file", target, "--device", "cpu"),
        *("--temperature", 0, "--max-new-tokens", 9, "--max-batch-size", 2, "--system", "be brief"),
    )
    assert code == 0 and "starting" not in err  # of interest at a terminal only
    prompts = [line for line in lines if line.strip()]
    llm = LLM(folder, device="cpu", max_seq_len=256)
    expected = llm.generate([llm.encode(p, "be brief") for p in prompts], SamplingParams(0.0, max_tokens=9))
    assert read_results(target) == [
        {
            "index": index,
            "prompt": prompt,
            "completion": completion.text,
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": 9,
            "token_ids": completion.token_ids,
            "finish_reason": "length",
        }
        for index, (prompt, completion) in enumerate(zip(prompts, expected, strict=True))
    ]
    assert [line for line in out.split("\n") if line.startswith("Prompt: ")] == [f"Prompt: {p}" for p in prompts]
    assert all(f"Completion: {completion.text}\n" in out for completion in expected)
    tokens = sum(completion.prompt_tokens for completion in expected)
    status = rf"\[{tokens} \+ 36 tokens, [\d.]+ s, first after [\d.]+ s, [\d.]+ tokens/s, "
    status += r"[\d.]+ tokens a step, drafts accepted \d+%\]\n"
    assert re.search(status + r"\Z", err)
    assert not (tmp_path / "out.jsonl.incomplete").exists()


def test_batch_of_json_lines(folder, tmp_path, command):
    source, target = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    messages += [{"role": "user", "content": "three"}]
    with_system = [{"role": "system", "content": "of its own"}, *messages]
    items = [{"prompt": "the quick\nbrown fox"}, {"messages": messages}, {"messages": with_system}]
    source.write_text("\n\n".join(json.dumps(item, ensure_ascii=False) for item in items))
    argv = ["--ckpt-path", folder, "--input-file", source, "--output-file", target, "--device", "cpu", "--mtp", 0]
    code, out, err = command(*argv, "--temperature", 0, "--max-new-tokens", 5, "--system", "be brief")
    assert code == 0 and "drafts" not in err
    found = read_results(target)
    llm = LLM(folder, device="cpu", max_seq_len=256)
    system = {"role": "system", "content": "be brief"}
    conversations = [[system, {"role": "user", "content": items[0]["prompt"]}], [system, *messages], with_system]
    for item, result, conversation in zip(items, found, conversations, strict=True):
        completion = llm.chat(conversation, SamplingParams(0.0, max_tokens=5))
        assert result.items() >= item.items() and result["token_ids"] == completion.token_ids
        assert result["prompt_tokens"] == completion.prompt_tokens
    assert "Prompt: three\n" in out


def test_sampled_batches_repeat(folder, input_file, tmp_path, command):
    def run(name: str, *argv: object) -> list[list[int]]:
        target = tmp_path / name
        argv = ("--output-file", target, "--temperature", 1, "--max-new-tokens", 8, "--device", "cpu", *argv)
        assert command("--ckpt-path", folder, "--input-file", input_file, *argv)[0] == 0
        return [item["token_ids"] for item in read_results(target)]

    first = run("a", "--seed", 7)
    assert run("b", "--seed", 7) == first != run("c", "--seed", 8)
    assert run("d", "--seed", 7, "--max-batch-size", 1) == first
    assert run("e", "--seed", 7, "--prefill-chunk", 3) == first


def test_a_full_cache_ends_a_completion(folder, input_file, tmp_path, command):
    target = tmp_path / "out.jsonl"
    argv = ("--ckpt-path", folder, "--input-file", input_file, "--output-file", target, "--device", "cpu")
    assert command(*argv, "--max-seq-len", 40, "--temperature", 0)[0] == 0
    for item in read_results(target):
        assert item["prompt_tokens"] + item["completion_tokens"] == 40 and item["finish_reason"] == "length"


@pytest.mark.parametrize("mode", ["--interactive", "--input-file"])
def test_headers_and_tokenizer_are_read_once(folder, input_file, command, monkeypatch, mode):
    """For what is refused before loading, and for the model."""
    opened = []
    for owner, name in ((Checkpoint, "__init__"), (PreTrainedTokenizerFast, "from_pretrained")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, real=real, name=name, **k: (opened.append(name), real(*a, **k))[1])
    argv = (mode, input_file) if mode == "--input-file" else (mode,)
    assert command("--ckpt-path", folder, "--device", "cpu", "--max-new-tokens", 2, *argv)[0] == 0
    assert sorted(opened) == ["__init__", "from_pretrained"]


def test_folders_that_hold_the_same_model_answer_alike(folder, input_file, tmp_path, command):
    """Converted for one rank; and a Hugging Face folder without a config.json, whose config is given in our format."""
    quietly_convert(folder, tmp_path / "converted", 1)
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    args = ModelArgs.load(bare / "config.json")
    (bare / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(asdict(args)))
    results = []
    for path, *options in ((folder,), (tmp_path / "converted",), (bare, "--config", tmp_path / "config.json")):
        argv = ("--input-file", input_file, "--output-file", tmp_path / "out.jsonl", "--max-new-tokens", 6)
        assert command("--ckpt-path", path, *argv, "--device", "cpu", *options)[0] == 0
        results.append(read_results(tmp_path / "out.jsonl"))
    assert results[0] == results[1] == results[2]


# --- chat by pipe -----------------------------------------------------------------------------------------------------


def chat_argv(folder: Path, *options: object) -> list[str]:
    argv = ["--ckpt-path", folder, "--interactive", "--device", "cpu", "--temperature", 0, "--max-new-tokens", 12]
    return [*map(str, argv), *map(str, options)]


def answers(folder: Path, *conversations: list[str], system: str | None = None) -> list[str]:
    """What the API answers to each line of each conversation, 12 tokens at most."""
    llm, texts = LLM(folder, device="cpu", max_seq_len=1024), []
    for lines in conversations:
        messages = [{"role": "system", "content": system}] if system else []
        for line in lines:
            messages.append({"role": "user", "content": line})
            texts.append(llm.chat(messages, SamplingParams(0.0, max_tokens=12)).text)
            messages.append({"role": "assistant", "content": texts[-1]})
    return texts


def test_chat_by_pipe(folder, command):
    """Turns see those before them, /clear forgets them, and the end of input ends the chat well."""
    stdin = "one two\n\n  three  \n/nonsense now\n/clear x\n/clear\none two\n"
    code, out, err = command(*chat_argv(folder, "--system", "be brief"), stdin=stdin)
    expected = answers(folder, ["one two", "three"], ["one two"], system="be brief")
    assert code == 0 and out == "".join(text + "\n" for text in expected)
    notes = [re.sub(r"[\d.]+( \+| s| tokens/s| tokens a step|%)", r"#\1", line) for line in err.splitlines()]
    answer = "[# + 12 tokens, # s, first after # s, # tokens/s, # tokens a step, drafts accepted #%, cut at the limit]"
    assert [line for line in notes if line.startswith("[")] == [
        answer,
        answer,
        "[/nonsense is not a command; /clear starts over, /exit or Ctrl-D ends]",
        "[/clear takes nothing after it]",
        "[the conversation starts over]",
        answer,
    ]


def test_exit_ends_the_chat(folder, command):
    code, out, err = command(*chat_argv(folder), stdin="/exit\none two\n")
    assert (code, out) == (0, "") and "tokens/s" not in err


def test_a_conversation_too_long_for_the_cache_goes_on(folder, command):
    stdin = "one\n" + "the quick brown fox " * 20 + "\none\n/clear\none\n"
    code, out, err = command(*chat_argv(folder, "--max-seq-len", 64), stdin=stdin)
    notes = [line for line in err.splitlines() if line.startswith("[")]
    assert code == 0 and len(notes) == 5
    assert re.fullmatch(r"\[the prompt has \d+ tokens and the cache holds 64, .*\(/clear starts over\)\]", notes[1])
    assert [out.splitlines()[0], out.splitlines()[-1]] == answers(folder, ["one"]) * 2


def test_bytes_that_are_not_text_are_refused(folder):
    """And the whole of it as a process, which ends well when its input does."""
    process = subprocess.run(
        [sys.executable, SCRIPT, *chat_argv(folder)],
        input=b"\xff\xfe\none two\n",
        env=environment(PYTHONIOENCODING="utf-8:strict"),  # as it is in most locales, but not in POSIX
        capture_output=True,
        timeout=100,
    )
    assert process.returncode == 0, process.stderr.decode()
    assert process.stdout.decode() == answers(folder, ["one two"])[0] + "\n"
    assert process.stderr.count(b"[that line is not UTF-8 text]") == 1


# --- chat at a terminal -----------------------------------------------------------------------------------------------


class Screen:
    """The user's end of a pseudo-terminal: what is typed, and what was shown since the last look."""

    def __init__(self, master: int):
        self.master, self.text = master, ""

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def until(self, pattern: str, seconds: float = 60) -> str:
        """What is shown up to where `pattern` matches; the rest stays for the next look."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.text)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.text!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                self.text += os.read(self.master, 65536).decode(errors="replace")
        shown, self.text = self.text[: match.end()], self.text[match.end() :]
        return shown


@pytest.fixture
def terminal():
    """Both ends of a pseudo-terminal."""
    master, slave = pty.openpty()
    yield master, slave
    os.close(master)
    os.close(slave)


def test_chat_at_a_terminal(folder, tmp_path, terminal):
    master, slave = terminal
    before = termios.tcgetattr(slave)
    argv = chat_argv(folder, "--max-new-tokens", 2000)
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *argv],
        **dict.fromkeys(("stdin", "stdout", "stderr"), slave),
        env=environment(HOME=str(tmp_path), TERM="dumb"),
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C would signal it
    )
    try:
        screen = Screen(master)
        screen.until("> ")
        screen.type("one two\r")
        screen.until("one two\r\n")
        pieces = [screen.until(r"[^\r\n]{3}") for _ in range(20)]  # streamed: there long before the answer's end
        assert not any("tokens/s" in piece for piece in pieces)
        screen.type("lost\x03")
        shown = screen.until(r"interrupted\]\r\n", 10)
        assert "lost" not in shown and "^C" not in shown
        assert 10 < int(re.search(r" \+ (\d+) tokens", shown)[1]) < 1000
        screen.until("> ")
        assert termios.tcgetattr(slave)[6][termios.VINTR] == b"\0", "under torchrun SIGINT would end the job"
        screen.type("three\r")
        screen.until("three\r\n")
        screen.until(r"[^\r\n]{60}")
        screen.type("\x03")
        shown = screen.until(r"interrupted\]\r\n", 10)
        assert 10 < int(re.search(r" \+ (\d+) tokens", shown)[1]) < 1000, "the last Ctrl-C should be forgotten"
        screen.until("> ")
        screen.type("not this\x03/bogus\r")  # at the prompt Ctrl-C empties the line
        screen.until(r"\[/bogus is not a command")
        screen.until("> ")
        screen.type("\x1b[A\r")  # the line before
        screen.until(r"\[/bogus is not a command")
        screen.until("> ")
        assert process.poll() is None
        screen.type("\x04")
        assert process.wait(20) == 0
    finally:
        process.kill()
    assert termios.tcgetattr(slave) == before
    assert (tmp_path / ".deepseek_v3_history").read_text().splitlines()[-2:] == ["three", "/bogus"]


def test_lines_typed_during_an_answer_are_the_next_ones(terminal, monkeypatch, tmp_path, capsys):
    master, slave = terminal
    monkeypatch.setattr("terminal.HISTORY", tmp_path / "history")
    with open(slave, closefd=False) as keyboard:
        monkeypatch.setattr(sys, "stdin", keyboard)
        with Terminal() as chat:
            termios.tcsetattr(keyboard, termios.TCSADRAIN, chat.answering)
            for keys, typed in (("one\rtwo\rthr", b"one\ntwo\nthr"), ("ee\r", b"one\ntwo\nthree\n")):
                os.write(master, keys.encode())
                deadline = time.monotonic() + 10
                while chat.typed != typed:
                    assert not chat.interrupted() and time.monotonic() < deadline
            assert [chat.read_line(), chat.read_line()] == ["one", "two"]
            assert capsys.readouterr().out == "> one\n> two\n"
            os.write(master, b"x\x03")
            while not chat.interrupted():
                assert time.monotonic() < deadline
            assert chat.typed == b"", "Ctrl-C drops what was typed"
            chat.signalled = False
            os.write(master, b"no\x15\x1b[Axy\x7f\x1bOA no\x17\x1bb\r\x04")
            while chat.typed[-1:] != b"\x04":
                assert not chat.interrupted() and time.monotonic() < deadline
            assert chat.read_line() == "x", "keys that edit do so, and are no text"
            assert chat.read_line() is None, "Ctrl-D ends when its turn comes"
            without = [chat.answering[0] & ~termios.ICRNL, *chat.answering[1:]]  # as while readline asks
            termios.tcsetattr(keyboard, termios.TCSADRAIN, without)
            os.write(master, b"pasted\rlines\r")
            while chat.typed != b"pasted\nlines\n":
                assert not chat.interrupted() and time.monotonic() < deadline
            chat.typed = b"y\x04"
            # What is shown goes elsewhere, so there is no line editing.
            monkeypatch.setattr("builtins.input", lambda prompt: ", at the prompt")
            assert chat.read_line() == "y, at the prompt", "after text it ends nothing, and loses nothing"
            monkeypatch.setattr("builtins.input", lambda prompt: "wrong\x03right")
            assert chat.read_line() == "right", "Ctrl-C clears the line"


def test_a_signal_at_the_prompt(terminal, monkeypatch, tmp_path):
    """Stops no answer; where lines come from a pipe, it ends the wait for one."""
    monkeypatch.setattr("terminal.HISTORY", tmp_path / "history")
    monkeypatch.setattr("builtins.input", lambda prompt: (signal.raise_signal(signal.SIGINT), "hello")[1])
    with open(terminal[1], closefd=False) as keyboard:
        monkeypatch.setattr(sys, "stdin", keyboard)
        with Terminal() as chat:
            assert chat.read_line() == "hello" and not chat.interrupted()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    with Terminal() as chat, pytest.raises(KeyboardInterrupt):
        chat.read_line()


def test_a_chat_needs_a_keyboard(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="stdin is closed"):
        Terminal()


def test_the_terminal_is_restored_when_the_job_is_ended(terminal, tmp_path):
    """torchrun ends the ranks with SIGTERM when one of them dies, for which rank 0 may be waiting amid a collective."""
    program = f"""import sys; sys.path[:0] = [{str(INFERENCE)!r}]
import ctypes
from terminal import Terminal
with Terminal():
    pass
with Terminal():
    print("ready", flush=True)
    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
    lock(mutex), lock(mutex)"""
    _, slave = terminal
    before = termios.tcgetattr(slave)
    argv, env = [sys.executable, "-c", program], os.environ | {"HOME": str(tmp_path)}
    with subprocess.Popen(argv, stdin=slave, stdout=subprocess.PIPE, env=env) as process:
        try:
            assert process.stdout.readline() == b"ready\n" and termios.tcgetattr(slave) != before
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
            assert process.wait(5) == 128 + signal.SIGTERM
        finally:
            process.kill()
    assert termios.tcgetattr(slave) == before and (tmp_path / ".deepseek_v3_history").exists()


def test_signals_are_handled_as_before_after_a_chat(terminal, monkeypatch, tmp_path):
    monkeypatch.setattr("terminal.HISTORY", tmp_path / "history")

    def state() -> tuple:
        files = len(os.listdir("/proc/self/fd"))
        return signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), files, threading.active_count()

    with open(terminal[1], closefd=False) as keyboard:
        monkeypatch.setattr(sys, "stdin", keyboard)
        before = state()
        with Terminal() as chat:
            assert all(was != now for was, now in zip(before, state(), strict=True))
        deadline = time.monotonic() + 5
        while state() != before:  # its thread has to notice
            assert time.monotonic() < deadline
    assert signal.set_wakeup_fd(-1) == chat.old_wakeup == -1


# --- several ranks ----------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(folder, input_file, tmp_path, command) -> str:
    """The output file of one process."""
    target = tmp_path / "alone.jsonl"
    assert command(*batch_argv(folder, input_file, target))[0] == 0
    return target.read_text()


def batch_argv(folder: Path, source: Path, target: Path) -> list[str]:
    argv = ["--ckpt-path", folder, "--input-file", source, "--output-file", target, "--device", "cpu"]
    return [*map(str, argv), "--temperature", "1", "--top-p", "0.9", "--max-new-tokens", "10", "--max-batch-size", "2"]


def test_two_ranks_equal_one_process(folder, input_file, tmp_path, alone):
    target = tmp_path / "two.jsonl"
    argv = torchrun(SCRIPT, *batch_argv(folder, input_file, target))
    process = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr
    assert target.read_text() == alone
    assert process.stdout.count("Completion: ") == len(PROMPTS), "only one rank prints"


def test_two_nodes_equal_one_process(folder, input_file, tmp_path, alone):
    """Two torchrun agents with a rank each, the first alone has prompts and a folder for results; whole experts."""
    quietly_convert(folder, tmp_path / "converted", 2, expert_parallel=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    target = Path("results/out.jsonl")
    (tmp_path / "0" / target.parent).mkdir(parents=True)
    (tmp_path / "1").mkdir()
    agents = []
    for rank in range(2):
        nodes = "--nnodes=2", f"--node-rank={rank}", "--master-addr=127.0.0.1", f"--master-port={port}"
        arguments = batch_argv(tmp_path / "converted", input_file if rank == 0 else Path("missing.jsonl"), target)
        argv = torchrun(SCRIPT, *arguments, ranks=1, nodes=nodes)
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        agents.append(subprocess.Popen(argv, env=environment(), cwd=tmp_path / str(rank), **streams))
    try:
        outputs = [agent.communicate(timeout=200)[0].decode() for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert (tmp_path / "0" / target).read_text() == alone
    assert "Completion: " in outputs[0] and "Completion: " not in outputs[1]


# generate.py on a machine where collectives give up after 3 s: whatever group has the default limit gets this one.
IMPATIENT = f"""
import sys
from datetime import timedelta

sys.path.insert(0, {str(INFERENCE)!r})
import torch
import torch.distributed as dist

import generate
from errors import run_command

real_load = generate.load

def load(*args, **options):
    llm = real_load(*args, **options)
    for group in dist.distributed_c10d._world.pg_map:
        backend = group._get_backend(torch.device("cpu"))
        if backend.options._timeout == dist.distributed_c10d.default_pg_timeout:
            backend._set_default_timeout(timedelta(seconds=3))
    return llm

generate.load = load
run_command(generate.main)
"""


def test_two_ranks_chat_after_a_long_pause(folder, tmp_path):
    """The same answers as one process, also when nothing was asked for longer than collectives wait."""
    driver = tmp_path / "impatient.py"
    driver.write_text(IMPATIENT)
    process = subprocess.Popen(
        torchrun(driver, *chat_argv(folder)),
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        process.stdin.write(b"one two\n")
        process.stdin.flush()
        first = process.stdout.readline()
        time.sleep(6)
        rest, err = process.communicate(b"three\n/clear\none two\n", timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err.decode()
    assert (first + rest).decode() == "".join(f"{a}\n" for a in answers(folder, ["one two", "three"], ["one two"]))
    assert err.count(b"tokens/s") == 3


def rank_of(process: str) -> str | None:
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                return entry[5:].decode()
    return None


def test_one_rank_is_interrupted_then_one_killed(folder, tmp_path):
    """SIGINT at rank 0 stops the answer on all ranks and the chat goes on; a rank that dies ends it, without a hang."""
    with open(tmp_path / "err", "wb") as err:
        process = subprocess.Popen(
            torchrun(SCRIPT, *chat_argv(folder, "--max-new-tokens", 2400)),
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=err,
            start_new_session=True,
        )

    def ask() -> dict[str | None, int]:
        """Returns the processes by rank once the answer has begun."""
        process.stdin.write(b"one two\n")
        process.stdin.flush()
        assert process.stdout.read(20), "no answer began"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return {rank_of(child): int(child) for child in children}

    try:
        os.kill(ask()["0"], signal.SIGINT)
        process.stdout.readline()
        os.kill(ask()["1"], signal.SIGKILL)
        process.communicate(timeout=30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode > 0
    errors = (tmp_path / "err").read_text()
    assert re.findall(r"tokens a step.*(, .*)\]", errors) == [", interrupted"]
    assert "[rank0]: Traceback" not in errors  # torchrun's own report has one


# --- bad input --------------------------------------------------------------------------------------------------------


def copy(folder: Path, target: Path) -> Path:
    """A copy to spoil, all but the weights."""

    def link(source: str, name: str) -> None:
        os.link(source, name) if source.endswith(".safetensors") else shutil.copy2(source, name)

    return Path(shutil.copytree(folder, target, copy_function=link))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def without_mtp(folder: Path) -> None:
    edit_json(folder / "config.json", num_nextn_predict_layers=0)


def without_template(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def panicking(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    edit_json(folder / "tokenizer.json", model=model | {"continuing_subword_prefix": "BPE"})


def converted_for_two(folder: Path) -> None:
    quietly_convert(folder, folder.parent / "shards", 2)
    shutil.rmtree(folder)
    os.rename(folder.parent / "shards", folder)


def chat_template(text: str) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "tokenizer_config.json", chat_template=text)


# What is done to a copy of the checkpoint's folder -> what both modes should say.
BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "model: no such folder"),
    "empty": (emptied, "model: the folder is empty"),
    "no config": (without_config, "model: no config.json"),
    "garbled config": (lambda f: (f / "config.json").write_text("{"), "config.json: not readable as JSON"),
    "another architecture": (
        lambda f: edit_json(f / "config.json", architectures=["LlamaForCausalLM"], model_type="llama"),
        "'LlamaForCausalLM'.* is not supported; supported are DeepseekV2ForCausalLM, DeepseekV3ForCausalLM",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "model: no tokenizer.json"),
    "garbled tokenizer": (lambda f: (f / "tokenizer.json").write_text('{"model": 7'), "tokenizer does not load"),
    "tokenizer that makes its library panic": (
        panicking,
        "tokenizer does not load: PanicException",
    ),
    "truncated tokenizer": (lambda f: os.truncate(f / "tokenizer.json", 999), "tokenizer does not load"),
    "tokenizer_config is a list": (lambda f: (f / "tokenizer_config.json").write_text("[]"), "wanted a JSON object"),
    "stop token is text": (
        lambda f: edit_json(f / "generation_config.json", eos_token_id=["</s>"]),
        "generation_config.json: eos_token_id is",
    ),
    "converted for other ranks": (converted_for_two, "converted for 2 ranks and run with 1"),
}

# Lines of a .jsonl file -> what should be said about the last of them.
BAD_LINES = {
    "not JSON": ('{"prompt": "x"', "line 3: not JSON"),
    "twice": ('{"prompt": "x", "prompt": "y"}', "line 3: not JSON: a name appears twice"),
    "not an object": ('["x"]', 'line 3: wanted an object with either "prompt" or "messages"'),
    "neither": ('{"text": "x"}', "line 3: wanted an object"),
    "both": ('{"prompt": "x", "messages": []}', "line 3: wanted an object"),
    "a number": ('{"prompt": 5}', 'line 3: "prompt" should be text'),
    "empty": ('{"prompt": ""}', 'line 3: "prompt" should be text'),
    "no messages": ('{"messages": []}', "line 3: messages should be a list"),
    "a role": ('{"messages": [{"role": "tool", "content": "x"}]}', "line 3: a message needs a role, system or user"),
    "no role": ('{"messages": [{"content": "x"}]}', "line 3: a message needs a role"),
    "content": ('{"messages": [{"role": "user", "content": [1]}]}', "line 3: a message's content should be text"),
    "surrogate": (r'{"prompt": "\ud800"}', "line 3: .*surrogate"),
    "surrogate in a message": (r'{"messages": [{"role": "user", "content": "\ud800"}]}', "line 3: .*surrogate"),
    "deep": ("[" * 100_000, "line 3: not JSON"),
    "digits": ('{"prompt": "x", "n": ' + "1" * 5000 + "}", "line 3: not JSON"),
}

BAD_FLAGS = {
    "temperature": (["--temperature", -1], "--temperature is -1.0, wanted a number from 0"),
    "temperature nan": (["--temperature", "nan"], "--temperature is nan"),
    "top-p": (["--top-p", 0], "--top-p is 0.0, wanted a number above 0"),
    "seed": (["--seed", -1], "--seed is -1"),
    "stop": (["--stop", "x", "--stop", ""], "--stop: wanted text"),
    "gemm": (["--gemm", "fp8"], "--gemm fp8: the checkpoint's weights are fp32"),
    "max-seq-len": (["--max-seq-len", 5000], f"--max-seq-len 5000: wanted 2 to {CONTEXT}"),
    "cuda": (["--device", "cuda"], "--device cuda: no CUDA GPU is visible"),
    "config": (["--config", "nowhere.json"], "nowhere.json: no such file"),
}


def check_refusal(result: tuple[int, str, str], complaint: str) -> None:
    code, out, err = result
    line, *more = err.splitlines()
    assert (code, out, more) == (2, "", [])
    assert re.match(f"error: .*{complaint}", line), line


@pytest.fixture
def spoiled(folder, tmp_path) -> Path:
    return copy(folder, tmp_path / "model")


@pytest.fixture(params=["batch", "chat"])
def mode(request, input_file, tmp_path) -> list[object]:
    """The flags of either mode."""
    if request.param == "chat":
        return ["--interactive"]
    return ["--input-file", input_file, "--output-file", tmp_path / "out.jsonl"]


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_folders_that_cannot_be_used(spoiled, tmp_path, command, mode, case):
    spoil, complaint = BAD_FOLDERS[case]
    spoil(spoiled)
    check_refusal(command("--ckpt-path", spoiled, "--device", "cpu", *mode, stdin="one\n"), complaint)
    assert {*os.listdir(tmp_path)} <= {"model"}, "something was written"


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_flags_that_cannot_be_met(folder, tmp_path, command, mode, case, monkeypatch):
    flags, complaint = BAD_FLAGS[case]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_refusal(command("--ckpt-path", folder, *mode, *flags, stdin="one\n"), complaint)
    assert os.listdir(tmp_path) == []


def test_mtp_needs_modules(spoiled, command, mode):
    without_mtp(spoiled)
    argv = ("--ckpt-path", spoiled, *mode, "--mtp", 1, "--device", "cpu")
    check_refusal(command(*argv), "--mtp 1: the checkpoint has no MTP modules")


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_json_lines(folder, tmp_path, command, case):
    line, complaint = BAD_LINES[case]
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "fine"}\n\n' + line)
    argv = ("--ckpt-path", folder, "--input-file", source, "--output-file", tmp_path / "out", "--device", "cpu")
    check_refusal(command(*argv), f"{source} {complaint}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "contents, complaint",
    [
        (None, "in.txt: not readable as text: .*No such file"),
        (b"", "in.txt: no prompts in it"),
        (b" \n\r\n\t\n", "in.txt: no prompts in it"),
        (b"one\n\xff\xfe\n", "in.txt: not readable as text"),
        (b"one\n" + b"two " * 5000, rf"in.txt: prompt 2 has \d+ tokens and the cache holds {CONTEXT}"),
    ],
)
def test_bad_input_files(folder, tmp_path, command, contents, complaint):
    source = tmp_path / "in.txt"
    if contents is not None:
        source.write_bytes(contents)
    argv = ("--ckpt-path", folder, "--input-file", source, "--output-file", tmp_path / "out", "--device", "cpu")
    check_refusal(command(*argv), complaint)
    assert not (tmp_path / "out").exists()


def test_prompts_longer_than_the_cache(folder, input_file, command):
    argv = ("--ckpt-path", folder, "--input-file", input_file, "--max-seq-len", 5, "--device", "cpu")
    check_refusal(command(*argv), r"prompts.txt: prompt 1 has \d tokens and the cache holds 5")


@pytest.mark.parametrize("name, complaint", [("nowhere/out.jsonl", "no folder .*nowhere"), ("", "not a file")])
def test_output_files_are_checked_before_the_work(tmp_path, input_file, command, name, complaint):
    """Before the checkpoint is even looked at: there is none."""
    argv = ("--ckpt-path", tmp_path / "model", "--input-file", input_file, "--output-file", tmp_path / name)
    check_refusal(command(*argv), f"--output-file .*{complaint}")


def test_a_failed_write_leaves_the_old_results_and_the_new_ones(folder, input_file, tmp_path, command, monkeypatch):
    target = tmp_path / "out.jsonl"
    target.write_text("old\n")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    argv = ("--ckpt-path", folder, "--input-file", input_file, "--output-file", target, "--device", "cpu")
    code, out, err = command(*argv, "--max-new-tokens", 2)
    assert out.count("Completion: ") == len(PROMPTS), "at least they can be read"
    assert code == 2 and err.splitlines()[-1].startswith(f"error: --output-file {target}: ") and "No space" in err
    assert target.read_text() == "old\n"
    monkeypatch.undo()
    target.unlink()
    command(*argv, "--max-new-tokens", 2, "--resume")
    assert len(read_results(target)) == len(PROMPTS)
    check_refusal(command(*argv, "--resume", "--logprobs", 1), "--resume --logprobs: results in")


def test_chat_templates(spoiled, input_file, tmp_path, command):
    """Without one only plain prompts work; one that refuses or does not parse is an error, not a traceback."""
    without_template(spoiled)
    argv = ["--ckpt-path", spoiled, "--device", "cpu", "--max-new-tokens", 2]
    code, out, _ = command(*argv, "--input-file", input_file)
    assert code == 0 and out.count("Completion: ") == len(PROMPTS)
    check_refusal(command(*argv, "--input-file", input_file, "--system", "x"), "--system needs a chat template")
    source = tmp_path / "in.jsonl"
    source.write_text('{"messages": [{"role": "user", "content": "x"}]}')
    check_refusal(command(*argv, "--input-file", source), "the tokenizer has no chat_template")
    for template in ("{{ raise_exception('no\\nsuch role') }}", "{% if %}", CHAT_TEMPLATE + "{{ 1 / 0 }}"):
        chat_template(template)(spoiled)
        complaint = "the chat template does not take this conversation"
        check_refusal(command(*argv, "--input-file", source), complaint)
    code, _, err = command(*argv, "--interactive", stdin="x\ny\n")
    assert code == 0 and err.count("[the chat template does not take") == 2


def test_too_little_memory(monkeypatch):
    free = int(20e9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, int(80e9)))
    gpu = torch.device("cuda", 3)
    check_memory(int(15e9), int(4e9), int(0.9e9), gpu)
    monkeypatch.setattr(os, "sysconf", lambda name: 10**5)
    check_memory(int(9e9), int(0.5e9), 0, torch.device("cpu"))
    with pytest.raises(InputError, match=r"^cpu: needs 11\.0 GB .* 10\.0 GB are there; use fewer rows"):
        check_memory(int(9e9), int(2e9), 0, torch.device("cpu"))
    with pytest.raises(InputError, match=r"^cpu: needs 11\.0 GB .* are there; the weights alone want more memory$"):
        check_memory(int(10.5e9), int(0.5e9), 0, torch.device("cpu"))
    with pytest.raises(InputError, match=r"^cuda:3: needs 21\.5 GB \(15\.0 weights, 4\.0 cache, 2\.5 .*20\.0 GB are"):
        check_memory(int(15e9), int(4e9), int(2.5e9), gpu)


@pytest.mark.parametrize(
    "flags",
    [
        ["--interactive", "--max-new-tokens", "0"],
        ["--interactive", "--max-batch-size", "-3"],
        ["--interactive", "--prefill-chunk", "1.5"],
        ["--interactive", "--mtp", "-1"],
        ["--interactive", "--mtp", "17"],
        ["--interactive", "--output-file", "out"],
        ["--interactive", "--input-file", "in"],
        [],
    ],
)
def test_flags_that_make_no_sense(command, flags):
    code, out, err = command("--ckpt-path", "x", *flags)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert not flags or flags[-2] in err


def test_a_refusal_as_a_process(tmp_path):
    argv = [sys.executable, SCRIPT, "--ckpt-path", tmp_path / "none", "--interactive"]
    process = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=100)
    check_refusal((process.returncode, process.stdout, process.stderr), "none: no such folder")


def test_a_full_disk_under_stdout_is_one_line():
    program = f"import sys; sys.path[:0] = [{str(INFERENCE)!r}]; import errors; errors.run_command(lambda: print('x'))"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "error: cannot write the output: No space left on device\n")


@pytest.mark.parametrize("number", [errno.EFBIG, errno.EDQUOT])
def test_output_that_grows_too_large_is_one_line(number, monkeypatch, capsys):
    def main() -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("errors.drop_output", lambda: None)
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"error: cannot write the output: {os.strerror(number)}\n"


@pytest.mark.parametrize("flag", ["--system", "--stop"])
def test_flags_that_are_no_text(command, flag):
    check_refusal(command("--ckpt-path", "x", "--interactive", flag, "\udcff"), f"{flag}: not UTF-8 text")


def test_ctrl_c_that_ends_the_reader_too(folder, input_file, tmp_path, command, monkeypatch):
    """As with `| tee`; and again while the results are put in their place."""
    finish, dropped = Results.finish, []

    def write(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        raise BrokenPipeError

    def interrupted_finish(*arguments: object) -> None:
        signal.raise_signal(signal.SIGINT)
        finish(*arguments)

    monkeypatch.setattr("batch.tqdm.write", write)
    monkeypatch.setattr("batch.drop_output", lambda: dropped.append(True))
    monkeypatch.setattr(Results, "finish", interrupted_finish)
    code, _, err = command(*batch_argv(folder, input_file, tmp_path / "out.jsonl"))
    assert code == 130 and dropped and "--resume goes on" in err
    assert (tmp_path / "out.jsonl").read_text() and not (tmp_path / "out.jsonl.incomplete").exists()


@pytest.mark.parametrize("streams", [(0, 1), (2,), (0, 1, 2)])
def test_closed_streams(streams, tmp_path):
    """Nothing that is opened later stands in their place, and what is said goes nowhere."""
    program = f"""import sys; sys.path[:0] = [{str(INFERENCE)!r}]
import errors
def main():
    with open({str(tmp_path / "out")!r}, "w") as file:
        print("x"); print("y", file=sys.stderr)
        file.write(str(file.fileno() > 2))
        raise errors.InputError("z")
errors.run_command(main)"""
    closing = " ".join(f"{n}>&-" for n in streams)
    done = subprocess.run(["bash", "-c", f'exec "$0" -c "$1" {closing}', sys.executable, program], capture_output=True)
    assert done.returncode == 2 and (tmp_path / "out").read_text() == "True"
    assert (done.stdout, done.stderr) == (b"x\n" * (1 not in streams), b"y\nerror: z\n" * (2 not in streams))


def test_a_current_directory_that_is_gone(tmp_path):
    command = f"mkdir gone && cd gone && rmdir ../gone && exec {sys.executable} {INFERENCE}/plan.py --help"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: the current directory: No such")


def test_ctrl_c_amid_the_imports():
    """By the signal, without a traceback: what it stops may be C code that turns it into an error of its own."""
    program = f"""import sys; sys.path[:0] = [{str(INFERENCE)!r}]
import errors, os, signal
errors.answer_flags(lambda: None)
if sys.argv[1:]:
    errors.run_command(lambda: os.kill(os.getpid(), signal.SIGINT))
os.kill(os.getpid(), signal.SIGINT)"""
    for argv, code, message in (([], -signal.SIGINT, ""), (["in main"], 130, "interrupted\n")):
        done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (code, message)


COMMANDS = ["generate", "convert", "fp8_cast_bf16", "bf16_cast_fp8", "plan", "benchmark"]


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_are_answered_before_slow_imports(command, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    argv, env = [sys.executable, str(INFERENCE / f"{command}.py")], os.environ | {"PYTHONPATH": str(tmp_path)}
    shown = subprocess.run([*argv, "--help"], env=env, capture_output=True, text=True, check=True).stdout
    assert shown.startswith(f"usage: {command}.py")
    wrong = subprocess.run([*argv, "--no-such-flag"], env=env, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1, wrong
