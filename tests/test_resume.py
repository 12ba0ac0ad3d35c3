"""
Converters that are stopped: by SIGKILL, a power cut, Ctrl-C, a full disk. The same command again must end with the
bytes of a run that was not stopped, and no command may take what was left for a checkpoint. Also --verify, SHA256SUMS,
and the memory that a conversion takes.

KILLS=1000 in the environment kills each converter as often; the default is 10.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import bf16_cast_fp8
import conversion
import convert
import fp8_cast_bf16
import generate
import output
from checkpoint import JOURNAL, Checkpoint
from checkpoints import SMALL, make_hf
from config import ModelArgs
from errors import InputError, run_command
from safetensors_io import INCOMPLETE

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
from converters import synthetic, v3_config  # noqa: E402

KILLS = int(os.environ.get("KILLS", "10"))

CONVERTERS: dict[str, tuple] = {  # name -> module, input, flags that name input and output, other flags
    "convert": (convert, "fp8", "--hf-ckpt-path", "--save-path", ["--model-parallel", "2"]),
    "to_hf": (convert, "shards", "--shards-path", "--save-path", ["--to-hf"]),
    "cast": (fp8_cast_bf16, "fp8", "--input-fp8-hf-path", "--output-bf16-hf-path", ["--device", "cpu"]),
    "quantise": (bf16_cast_fp8, "bf16", "--input-bf16-hf-path", "--output-fp8-hf-path", ["--device", "cpu"]),
}
each = pytest.mark.parametrize("name", CONVERTERS)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """The converters' inputs, and as out-NAME what each makes of it in one go, in pieces of ordinary size."""
    folder = tmp_path_factory.mktemp("inputs")
    make_hf(folder / "fp8", "v3", "fp8", mtp=1, shards=3, **SMALL)
    make_hf(folder / "bf16", "v3", "bf16", mtp=1, shards=3, **SMALL)
    convert.convert(folder / "fp8", folder / "shards", 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "MAX_FILE_BYTES", 300_000)
        for name in CONVERTERS:
            assert run(name, folder, folder / f"out-{name}")[0] == 0
    return folder


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(conversion, "PIECE_BYTES", 1 << 15)
    monkeypatch.setattr(conversion, "ROUND_BYTES", 1 << 15)
    monkeypatch.setattr(conversion, "AHEAD_BYTES", 1 << 17)
    monkeypatch.setattr(convert, "MAX_FILE_BYTES", 300_000)


def start(name: str, inputs: Path, target: Path, before: Callable[[], None] = lambda: None, *flags: str) -> int:
    """Start a converter in a process of its own, which calls `before` first and writes to {target}.log; its id."""
    module, source, from_, to, others = CONVERTERS[name]
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        log = os.open(f"{target}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        tqdm.set_lock(threading.RLock())  # its own is shared with forked processes, and one that is killed may hold it
        sys.argv = [module.__name__, from_, str(inputs / source), to, str(target), *others, *flags]
        before()
        run_command(module.main)
        code = 0
    except SystemExit as exit_:
        code = exit_.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(name: str, inputs: Path, target: Path, before: Callable[[], None] = lambda: None, *flags: str):
    """(exit code, what it printed but for the progress bar)"""
    code = wait(start(name, inputs, target, before, *flags))
    return code, re.sub(r"[^\n]*\r", "", Path(f"{target}.log").read_bytes().decode())


def unfinished(target: Path) -> bool:
    """Whether a run that was stopped had not yet come to its very end."""
    return (target / JOURNAL).exists() or not target.exists() or not any(target.iterdir())


def check_incomplete(target: Path) -> None:
    """If a run left a part, everything that reads checkpoints must refuse it with the reason."""
    if not (target / JOURNAL).exists():
        assert unfinished(target) or Checkpoint(target)
        return
    with pytest.raises(InputError, match="conversion was interrupted or is still running"):
        Checkpoint(target)


@pytest.fixture
def quick(tmp_path) -> Iterator[Path]:
    """A folder in memory, where there is one: a run then takes a fraction of the time, as a sync takes none."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


# --- stopped ----------------------------------------------------------------------------------------------------------


@each
def test_killed_at_random_moments(inputs, quick, name):
    random_ = random.Random(name)
    wanted, target = files_of(inputs / f"out-{name}"), quick / "out"
    began = time.perf_counter()
    assert run(name, inputs, target)[0] == 0
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    kills = resumed = 0
    while kills < KILLS or resumed < KILLS / 5:  # some die before they began
        assert kills < 20 * KILLS, "no run leaves anything to resume"
        pid = start(name, inputs, target)
        time.sleep(random_.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        if wait(pid) == -signal.SIGKILL:
            kills += 1
            check_incomplete(target)
            if random_.random() < 0.5:  # of the others the next run is killed too
                continue
        resumed += (target / JOURNAL).exists()
        if unfinished(target):
            code, text = run(name, inputs, target)
            assert code == 0, text
        assert files_of(target) == wanted
        shutil.rmtree(target)


CALLS = "open ftruncate pwrite fsync rename unlink close".split()


def stop_at(n: int, counted: list[int]) -> None:
    """Let the process end at its n-th call that concerns a file, and lose what was not synced till then."""
    real = {call: getattr(os, call) for call in CALLS}
    unsynced: dict[str, list[tuple[int, int]]] = {}
    renamed: list[tuple[str, str]] = []

    def end() -> None:
        for old, new in reversed(renamed):
            real["rename"](new, old)
            unsynced[old] = unsynced.pop(new, [])
        for path, spans in unsynced.items():
            fd = real["open"](path, os.O_RDWR) if os.path.exists(path) else None
            for offset, size in spans if fd is not None else ():
                real["pwrite"](fd, b"\xaa" * size, offset)
        os._exit(9)

    lock = threading.RLock()

    def counting(call: str):
        def wrapper(*args, **kwargs):
            with lock:
                return counted_call(*args, **kwargs)

        def counted_call(*args, **kwargs):
            counted[0] += 1
            if counted[0] == n:
                end()
            path = os.readlink(f"/proc/self/fd/{args[0]}") if type(args[0]) is int and args[0] > 2 else None
            result = real[call](*args, **kwargs)
            if call == "pwrite":
                unsynced.setdefault(path, []).append((args[2], result))
            elif call == "fsync":
                unsynced.pop(path, None)
                renamed[:] = [pair for pair in renamed if os.path.dirname(pair[1]) != path]
            elif call == "rename":
                renamed.append(tuple(map(str, args)))
                unsynced[str(args[1])] = unsynced.pop(str(args[0]), [])
            return result

        return wrapper

    for call in CALLS:
        setattr(os, call, counting(call))


@each
def test_a_power_cut_at_any_call(inputs, quick, name):
    """Every few file operations, so also between a file's last byte, its sync, the journal's line and the new name."""
    wanted, target = files_of(inputs / f"out-{name}"), quick / "out"
    number = quick / "number"

    def count() -> None:
        counted = [0]
        stop_at(-1, counted)
        real = os._exit
        os._exit = lambda code: (number.write_text(str(counted[0])), real(code))

    assert run(name, inputs, target, count)[0] == 0
    total = int(number.read_text())
    shutil.rmtree(target)
    assert total > 100
    # The first and last are the most different ones.
    moments = [*range(2, 12, 3), *range(12, total - 40, total // 8), *range(total - 40, total, 4)]
    stopped = 0
    for moment in moments:
        code, text = run(name, inputs, target, lambda moment=moment: stop_at(moment, [0]))
        assert code in (0, 9), text  # threads do not make the same number of calls each time
        if code == 9:
            stopped += 1
            check_incomplete(target)
            if unfinished(target):
                code, text = run(name, inputs, target)
                assert code == 0, text
        assert files_of(target) == wanted, moment
        shutil.rmtree(target)
    assert stopped > len(moments) / 2


@each
def test_ctrl_c(inputs, tmp_path, name, monkeypatch):
    wanted, target = files_of(inputs / f"out-{name}"), tmp_path / "out"

    def slow() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        real = os.pwrite
        os.pwrite = lambda *args: (time.sleep(0.01), real(*args))[1]

    pid = start(name, inputs, target, slow)
    while not list(target.glob("*" + INCOMPLETE)) or len((target / JOURNAL).read_text().splitlines()) < 3:
        time.sleep(0.01)
    os.kill(pid, signal.SIGINT)
    assert wait(pid) == 130
    text = Path(f"{target}.log").read_bytes().decode().rpartition("\r")[2]
    assert text == f"interrupted: the same command goes on from here, or remove {target}\n"
    check_incomplete(target)
    code, text = run(name, inputs, target)
    assert code == 0 and files_of(target) == wanted
    written = float(re.search(r"files, ([\d.]+) GB written", text)[1])
    assert written < sum(map(len, wanted.values())) / 1e9  # it did go on, and did not start over


def test_generate_says_why_it_refuses_a_part_of_a_folder(inputs, tmp_path, capsys, monkeypatch):
    shutil.copytree(inputs / "out-convert", tmp_path / "part")
    (tmp_path / "part" / JOURNAL).write_text("{}\n")
    for flags in ([], ["--config", str(inputs / "fp8" / "config.json")]):
        argv = ["generate.py", "--ckpt-path", str(tmp_path / "part"), "--interactive", "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as exit_:
            run_command(generate.main)
        assert exit_.value.code == 2
        assert "its conversion was interrupted or is still running" in capsys.readouterr().err


# --- a full disk ------------------------------------------------------------------------------------------------------


def small_disk(mount: Path, size: int) -> None:
    """Give this process, in a user namespace of its own, a tmpfs of so many bytes at `mount`."""
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x10000000 | 0x00020000):  # CLONE_NEWUSER | CLONE_NEWNS
        os._exit(77)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if libc.mount(b"none", str(mount).encode(), b"tmpfs", 0, f"size={size}".encode()):
        os._exit(77)


@each
def test_a_disk_that_is_too_small_or_fills_up(inputs, tmp_path, name):
    wanted = files_of(inputs / f"out-{name}")
    module, source, *_ = CONVERTERS[name]
    before = {path: path.stat().st_mtime_ns for path in (inputs / source).iterdir()}
    size = sum(map(len, wanted.values()))
    disk = tmp_path / "disk"
    disk.mkdir()

    def too_small() -> None:
        small_disk(disk, size // 2)

    code, text = run(name, inputs, disk, too_small)
    if code == 77:
        pytest.skip("no user namespaces with tmpfs here")
    needed, free = (int(n.replace(",", "")) for n in re.findall(r"[\d,]{7,}", text.rpartition("disk: ")[2]))
    assert code == 2 and text.count("\n") == 1 and "are to be written and only" in text
    assert size * 0.95 < needed < size * 1.2 and size * 0.4 < free <= size // 2 + 4096

    def fills_up() -> None:
        """A disk with room for it, until another file takes some; then that one goes, and the run goes on."""
        small_disk(disk, size * 2)
        filler = disk / "filler"
        (disk / "out").mkdir()
        if os.fork() == 0:  # looks at the same disk
            return fill(filler)
        _, status = os.wait()
        assert os.waitstatus_to_exitcode(status) == 2
        check_incomplete(disk / "out")
        filler.unlink()
        sys.argv = [str(disk / "out") if arg == str(disk) else arg for arg in sys.argv]
        run_command(module.main)
        assert files_of(disk / "out") == wanted
        print("the same bytes")
        sys.stdout.flush()
        os._exit(0)

    def fill(filler: Path) -> None:
        sys.argv = [str(disk / "out") if arg == str(disk) else arg for arg in sys.argv]
        real = conversion.Conversion._write_weights

        def write_weights(self) -> None:
            filler.write_bytes(bytes(size * 2 - size // 2))
            real(self)

        conversion.Conversion._write_weights = write_weights

    code, text = run(name, inputs, disk, fills_up)
    assert code == 0 and "the same bytes" in text, text
    error = re.search(
        r"error: .* cannot be written: No space left on device; ([\d,]+) bytes are still to be written and "
        r"([\d,]+) are free; the same command goes on from here, or remove .*/disk/out\n",
        text,
    )
    assert error and int(error[1].replace(",", "")) > int(error[2].replace(",", "")), text
    assert {path: path.stat().st_mtime_ns for path in (inputs / source).iterdir()} == before


@each
def test_a_limit_on_file_sizes(inputs, tmp_path, name):
    """As a full disk, for machines that grant no namespaces."""
    target = tmp_path / "out"
    largest = max(map(len, files_of(inputs / f"out-{name}").values()))
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, largest // 2))  # noqa: E731
    code, text = run(name, inputs, target, limit)
    assert code == 2 and text.count("\n") == 1 and "cannot be written: File too large" in text
    check_incomplete(target)
    assert run(name, inputs, target)[0] == 0 and files_of(target) == files_of(inputs / f"out-{name}")


# --- what a run may go on with ----------------------------------------------------------------------------------------


@pytest.fixture
def part(inputs, tmp_path) -> Path:
    """What convert.py leaves half-way."""
    target = tmp_path / "out"

    def half() -> None:
        real, rounds = output.Journal.append, []

        def append(self, record: dict) -> None:
            real(self, record)
            rounds.append(record)
            if len(rounds) == 10:
                os._exit(9)

        output.Journal.append = append

    assert run("convert", inputs, target, half)[0] == 9
    return target


def test_another_run_of_the_same_command_goes_on(inputs, part):
    lines = (part / JOURNAL).read_text().splitlines()
    assert len(lines) == 10
    with (part / JOURNAL).open("a") as journal:  # a line that was being written
        journal.write('{"pieces": 10')
    code, text = run("convert", inputs, part)
    assert code == 0 and files_of(part) == files_of(inputs / "out-convert"), text


def test_another_conversion_is_refused(inputs, part, tmp_path):
    before = files_of(part)
    for name, flags, message in (
        ("convert", ["--expert-parallel"], "an interrupted run with other flags or another input began this"),
        ("convert", ["--model-parallel", "1"], "an interrupted run with other flags or another input began this"),
        ("cast", [], "an interrupted run with other flags or another input began this"),
        ("to_hf", [], "an interrupted run with other flags or another input began this"),
    ):
        code, text = run(name, inputs, part, lambda: None, *flags)
        assert code == 2 and message in text and text.count("\n") == 1
        assert files_of(part) == before
    changed = shutil.copytree(inputs, tmp_path / "changed")
    os.utime(changed / "fp8" / "model-00001-of-000003.safetensors")
    code, text = run("convert", changed, part)
    assert code == 2 and "the input has changed since an interrupted run began this" in text
    assert files_of(part) == before


def test_two_runs_at_once_are_refused(inputs, part):
    journal = output.Journal(part, json.loads((part / JOURNAL).read_text().splitlines()[0]))
    code, text = run("convert", inputs, part)
    assert code == 2 and "another process is writing it" in text
    journal.__exit__()
    assert run("convert", inputs, part)[0] == 0


LINES = [
    "[]",
    '{"pieces":9999,"sha256":{},"results":[]}',
    '{"pieces":-1,"sha256":{},"results":[]}',
    '{"pieces":[],"sha256":7,"results":{}}',
    '{"pieces":0,"sha256":{"x":"y"},"results":[]}',
]
DAMAGE = [(lambda f, line=line: (f / JOURNAL).open("a").write(line + "\n"), "damaged; remove .* and") for line in LINES]
DAMAGE += [
    (lambda f: (f / JOURNAL).write_text("nonsense\n"), "damaged; remove .* and start over"),
    (lambda f: (f / f"model0-mp2.safetensors{INCOMPLETE}").unlink(), "changed since an interrupted run"),
    (lambda f: os.truncate(f / f"model0-mp2.safetensors{INCOMPLETE}", 99), "changed since an interrupted run"),
]


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_a_part_that_was_tampered_with_is_refused(inputs, part, number):
    damage, message = DAMAGE[number]
    damage(part)
    code, text = run("convert", inputs, part)
    assert code == 2 and re.search(message, text) and text.count("\n") == 1, text


def test_links_in_the_output_folder_are_not_followed(inputs, part, tmp_path):
    precious = tmp_path / "precious"
    for name in (f"model0-mp2.safetensors{INCOMPLETE}", f"tokenizer.json{INCOMPLETE}", JOURNAL):
        precious.write_text("precious")
        copied = Path(shutil.copytree(part, tmp_path / name))
        (copied / name).unlink(missing_ok=True)
        (copied / name).symlink_to(precious)
        code, text = run("convert", inputs, copied)
        assert code == 2 and text.count("\n") == 1, text
        assert precious.read_text() == "precious"


def test_a_scale_that_is_no_number_stops_the_cast_and_is_named(inputs, tmp_path):
    broken = Path(shutil.copytree(inputs / "fp8", tmp_path / "fp8"))
    path = broken / "model-00002-of-000003.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("_scale_inv"))
    tensors[name][0] = torch.nan
    save_file(tensors, path)
    code, text = run("cast", tmp_path, tmp_path / "out")
    assert code == 2 and text.count("\n") == 1
    assert text == f"error: {path}: {name} has a scale that is negative, NaN or infinite\n"
    assert not (tmp_path / "out").exists()


# --- checked ----------------------------------------------------------------------------------------------------------


@each
def test_checksums(inputs, name):
    folder = inputs / f"out-{name}"
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert {line.split(":")[0] for line in done.stdout.splitlines()} == set(os.listdir(folder)) - {"SHA256SUMS"}


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@each
def test_verify(inputs, tmp_path, name):
    target = tmp_path / "out"
    code, text = run(name, inputs, target, lambda: None, "--verify")
    assert code == 0 and re.search(r"GB written in .*\n.* GB verified in ", text)
    assert files_of(target) == files_of(inputs / f"out-{name}")
    code, text = run(name, inputs, target, lambda: None, "--verify")  # finished: now it only compares
    assert code == 0 and "written" not in text and " GB verified in " in text
    assert run(name, inputs, target)[0] == 2

    random_ = random.Random(0)
    for path in sorted(target.glob("*.safetensors")):
        tensors = load_file(path)
        damaged = random_.choice([name for name, tensor in tensors.items() if tensor.numel() > 1])
        good = path.read_bytes()
        start = len(good) - sum(tensor.nbytes for tensor in tensors.values())
        header = json.loads(good[8:start])
        first, last = header[damaged]["data_offsets"]
        flip(path, start + random_.randrange(first, last))
        code, text = run(name, inputs, target, lambda: None, "--verify")
        assert code == 2 and f"{damaged} in {path.name} has other values\n" in text
        path.write_bytes(good)
    for other in ("tokenizer.json", "config.json"):
        data = (target / other).read_bytes()
        (target / other).write_bytes(data + b" ")
        code, text = run(name, inputs, target, lambda: None, "--verify")
        assert code == 2 and text.endswith(f"becomes: {other}\n")
        (target / other).write_bytes(data)
    stray = target / "model7-mp9.safetensors"
    stray.write_bytes(b"")
    code, text = run(name, inputs, target, lambda: None, "--verify")
    assert code == 2 and text.endswith(f"becomes: {stray.name} does not belong here\n")
    stray.unlink()
    sums = target / "SHA256SUMS"
    data = sums.read_text()
    for wrong in (data + "0  x\n", data.split("\n", 1)[1]):
        sums.write_text(wrong)
        code, text = run(name, inputs, target, lambda: None, "--verify")
        assert code == 2 and text.endswith("becomes: SHA256SUMS lists other files\n")
    sums.write_text(re.sub(r"^.{5}(.*tokenizer.json)$", r"00000\1", data, flags=re.M))
    code, text = run(name, inputs, target, lambda: None, "--verify")
    assert code == 2 and text.endswith("becomes: SHA256SUMS has another checksum of tokenizer.json\n")
    sums.write_text(data)
    narrow = {key: value.view(torch.int8) if value.element_size() == 1 else value for key, value in tensors.items()}
    narrow = {key: value.flatten() for key, value in narrow.items()}
    save_file(narrow, path, {"format": "pt"})
    code, text = run(name, inputs, target, lambda: None, "--verify")
    assert code == 2 and f"{path.name} has other tensors, types, shapes or metadata" in text
    path.unlink()
    code, text = run(name, inputs, target, lambda: None, "--verify")
    assert code == 2 and "No such file" in text


def test_a_file_that_goes_while_the_weights_are_written(inputs, tmp_path, monkeypatch):
    source = Path(shutil.copytree(inputs / "fp8", tmp_path / "fp8"))
    write_weights = conversion.Conversion._write_weights

    def and_lose_one(job: conversion.Conversion) -> None:
        write_weights(job)
        (source / "tokenizer.json").unlink()

    monkeypatch.setattr(conversion.Conversion, "_write_weights", and_lose_one)
    with pytest.raises(InputError, match=r"tokenizer\.json: cannot be read"):
        convert.convert(source, tmp_path / "out", 1)
    assert (tmp_path / "out" / JOURNAL).exists()


def test_copies_that_differ_are_told_apart(inputs, tmp_path):
    """An MTP layer's embedding that is not the model's is not said to repeat it; shards that differ are refused."""
    source = Path(shutil.copytree(inputs / "fp8", tmp_path / "fp8"))
    name = "model.layers.2.embed_tokens.weight"
    path = next(path for path in source.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(path)
    tensors[name][5, 7] += 1
    save_file(tensors, path, {"format": "pt"})
    code, text = run("convert", tmp_path, tmp_path / "out")
    assert code == 0
    assert f"skipped {name}: differs from model.embed_tokens.weight, which the model uses in its place\n" in text
    assert "skipped model.layers.2.shared_head.head.weight: repeats lm_head.weight\n" in text

    shards = Path(shutil.copytree(inputs / "shards", tmp_path / "shards"))
    path = shards / "model1-mp2.safetensors"
    tensors = load_file(path)
    tensors["layers.1.ffn_norm.weight"][3] += 1
    save_file(tensors, path, {"format": "pt", "mp": "2", "rank": "1", "experts": "tensor"})
    code, text = run("to_hf", tmp_path, tmp_path / "back")
    assert code == 2 and "model1-mp2.safetensors: layers.1.ffn_norm.weight is not what it is in other" in text


# --- memory -----------------------------------------------------------------------------------------------------------

RUN_ALL = """
import subprocess, sys
for line in sys.stdin:
    done = subprocess.run([sys.executable, *line.split()], capture_output=True, text=True)
    sys.exit(done.stderr) if done.returncode else print(done.stdout)
"""


def test_memory_does_not_follow_the_size_of_the_model(tmp_path):
    """Four times the layers, tensors of the same size: less than 5 % more memory."""
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 512, "vocab_size": 8192, "num_attention_heads": 8}
    commands = []
    for layers in (3, 12):
        config = v3_config(layers, 16) | sizes
        folder = tmp_path / str(layers)
        synthetic(folder / "fp8", ModelArgs.from_hf(config), config)
        for name in ("convert", "cast", "quantise"):
            module, source, from_, to, others = CONVERTERS[name]
            source = "cast" if name == "quantise" else source
            script = ROOT / "inference" / f"{module.__name__}.py"
            commands.append([script, from_, folder / source, to, folder / name, *others])
    nbytes = [sum(path.stat().st_size for path in (tmp_path / n / "fp8").iterdir()) for n in ("3", "12")]
    assert nbytes[1] - nbytes[0] > 2 * 10**8
    # How many of a run's threads hold something at once is chance, and more so on a busy machine: what follows from the
    # size is there in every run, so the least of up to six counts.
    least: list[int] = []
    for _ in range(6):
        # Started from here, a process would count as its peak what this one has; so from a small one in between.
        done = subprocess.run(
            [sys.executable, "-c", RUN_ALL],
            input="\n".join(" ".join(map(str, command)) for command in commands),
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        peaks = [int(peak) for peak in re.findall(r"peak memory (\d+) MB", done.stdout)]
        assert len(peaks) == len(commands)
        least = [min(pair) for pair in zip(least or peaks, peaks, strict=True)]
        if all(large < 1.05 * small for small, large in zip(least[:3], least[3:], strict=True)):
            return
        for command in commands:
            shutil.rmtree(command[4])
    raise AssertionError(least)
