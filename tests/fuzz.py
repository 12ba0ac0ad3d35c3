"""
Damaged checkpoints, thousands of them: whatever is wrong with a folder, every command must end within seconds, with
exit code 0 or with 2 and one line, without taking memory that the folder does not account for, and without touching
anything outside its output folder.

    python tests/fuzz.py --seconds 3600 [--seed 0]        # random cases, until the time is up or one fails
    python tests/fuzz.py --seed 0 --case 123              # one of them again

A case is a small sound folder, one to three mutations of it, and a command. It is decided by seed and number alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its warning about forks would be a second line
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "inference"), str(ROOT / "tests")]

import bf16_cast_fp8  # noqa: E402
import convert  # noqa: E402
import fp8_cast_bf16  # noqa: E402
import generate  # noqa: E402
import llm  # noqa: E402, F401, imported here and not in every case
import plan  # noqa: E402
from checkpoint import JOURNAL, Checkpoint  # noqa: E402
from checkpoints import SMALL, make_hf  # noqa: E402
from errors import run_command  # noqa: E402

CPU_SECONDS, WALL_SECONDS = 10, 15
MAX_MEMORY = 128 << 20  # beyond what the process has before; the folders have 2 MB
MAX_FILE = 64 << 20

JUNK: list[Any] = [None, True, -1, 0, 1, 3, 127, 2**31, 2**63, 10**30, -0.5, 1e308, float("nan"), float("inf"), "", "x"]
JUNK += ["x" * 5000, "\u0000", "../x", "fp8", "float16", [], [[]], [None], [2**62, 2**62], {}, {"a": {}}, [0] * 9]
TEXTS = ["", " ", "[]", "null", "7", '"x"', "{", "[" * 100_000, '{"a":' * 50_000, '{"a":1,"a":2}', "\ufeff{}", "NaN"]
NAMES = ["../x.safetensors", "/etc/passwd", "/dev/zero", "a/b.safetensors", "..", "", ".", "\u0000", "x" * 300]
NAMES += ["~/x.safetensors", "model-00009-of-000003.safetensors", "config.json", "\n.safetensors", 7, None, []]


# --- mutations --------------------------------------------------------------------------------------------------------


def places(data: Any, depth: int = 8) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value, but for what is nested very deep."""
    if not isinstance(data, (dict, list)) or not depth:
        return []
    keys = list(data) if isinstance(data, dict) else range(len(data))
    return [place for key in keys for place in [(data, key), *places(data[key], depth - 1)]]


def mutate_json(random_: random.Random, data: Any) -> None:
    """Change, remove or move one value somewhere in it."""
    if not (found := places(data)):
        return
    container, key = random_.choice(found)
    value = container[key]
    kind = random_.randrange(4)
    if kind == 0:
        container[key] = copy.deepcopy(random_.choice(JUNK))
    elif kind == 1:
        del container[key]
    elif kind == 2 and type(value) in (int, float):
        container[key] = random_.choice([value + 1, value - 1, value * 2, -value, value // 2, float(value), str(value)])
    elif isinstance(container, dict):
        container[random_.choice([*NAMES[:9], "extra", *container])] = container.pop(key)


def mutate_text(random_: random.Random, text: bytes) -> bytes:
    kind = random_.randrange(4)
    if kind == 0:
        return random_.choice(TEXTS).encode()
    if kind == 1 or not text:
        return text[: random_.randrange(len(text) + 1)]
    if kind == 2:
        return flipped(random_, text)
    at = random_.randrange(len(text))
    return text[:at] + random_.randbytes(random_.randrange(1, 20)) + text[at:]


def flipped(random_: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random_.randrange(1, 8) if changed else 0):
        changed[random_.randrange(len(changed))] = random_.randrange(256)
    return bytes(changed)


def is_small(path: Path) -> bool:
    """Whether it is a file that can be changed here, and not what an earlier mutation put in its place."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size < MAX_FILE


def json_file(random_: random.Random, path: Path) -> None:
    if not is_small(path):
        return
    if random_.random() < 0.3:
        path.write_bytes(mutate_text(random_, path.read_bytes()))
        return
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return
    for _ in range(random_.randrange(1, 4)):
        mutate_json(random_, data)
    path.write_text(json.dumps(data))


def config(random_: random.Random, folder: Path) -> None:
    json_file(random_, folder / "config.json")


def tokenizer(random_: random.Random, folder: Path) -> None:
    json_file(random_, folder / random_.choice(["tokenizer.json", "tokenizer_config.json", "generation_config.json"]))


def index(random_: random.Random, folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    if not is_small(path) or random_.random() < 0.3:
        return json_file(random_, path)
    try:
        data = json.loads(path.read_bytes())
        weight_map = data["weight_map"]
        name = random_.choice(list(weight_map))
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    if not isinstance(weight_map, dict):  # of an earlier mutation
        return None
    if random_.random() < 0.5:
        weight_map[name] = random_.choice(NAMES)
    else:
        weight_map[random_.choice([*map(str, NAMES), name + "x"])] = random_.choice([*weight_map.values()])
    path.write_text(json.dumps(data))
    return None


def some_weights(random_: random.Random, folder: Path) -> Path | None:
    found = sorted(filter(is_small, folder.glob("*.safetensors")))
    return random_.choice(found) if found else None


def header(random_: random.Random, folder: Path) -> None:
    if (path := some_weights(random_, folder)) is None:
        return
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    text, rest = data[8 : 8 + size], data[8 + size :]
    kind = random_.randrange(6)
    if kind == 0:
        size = random_.choice([0, 1, 7, size + 1, size - 1, len(data), 2**31, 2**63 - 1, 2**64 - 1]) % 2**64
        path.write_bytes(struct.pack("<Q", size) + text + rest)
        return
    if kind == 1:
        text = mutate_text(random_, text)
    else:
        try:
            entries = json.loads(text)
            name = random_.choice(list(entries))
            if kind == 2:
                mutate_json(random_, entries)
            elif kind == 3:
                entries[name] = random_.choice([*JUNK, entries[random_.choice(list(entries))]])
            elif kind == 4:
                shape = entries[name]["shape"]
                shape[:] = random_.choice([shape[::-1], [*shape, 1], [], [2**40, 2**40], [0, *shape], [-1], shape * 5])
            else:
                entries[name]["dtype"] = random_.choice(["F8_E5M2", "F64", "I8", "U8", "F4", "BF16", "F16", "", None])
            text = json.dumps(entries).encode()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest)


def data(random_: random.Random, folder: Path) -> None:
    if (path := some_weights(random_, folder)) is None:
        return
    content = path.read_bytes()
    kind = random_.randrange(4)
    if kind == 0:
        content = flipped(random_, content)
    elif kind == 1:
        content = content[: random_.randrange(len(content) + 1)]
    elif kind == 2:
        content += random_.randbytes(random_.randrange(1, 5000))
    else:  # numbers that are none, infinite or negative
        at = random_.randrange(len(content) + 1)
        content = content[:at] + random_.choice([b"\xff", b"\x7f\x80", b"\x80"]) * 2000 + content[at + 4000 :]
    path.write_bytes(content)


def files(random_: random.Random, folder: Path) -> None:
    """One of the folder's files is missing or something else; or there is one more."""
    names = [path.name for path in sorted(folder.iterdir())]
    names += ["README.md", "model.safetensors", "model0-mp1.safetensors", "tokenizer.model", "x.jinja", JOURNAL]
    path = folder / random_.choice(names)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    kind = random_.randrange(7)
    kept = path.read_bytes() if is_small(path) else b"x"
    path.unlink(missing_ok=True)
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.symlink_to(random_.choice([path.name, "/dev/zero", "/dev/null", "/etc/passwd", "..", "nowhere", "/"]))
    elif kind == 4:  # sound, but elsewhere: as in the Hugging Face cache
        (folder.parent / "outside" / "kept").write_bytes(kept)
        path.symlink_to("../outside/kept")
    elif kind == 5:
        path.write_bytes(b"")
        os.truncate(path, random_.choice([0, 1, 10**5, 10**12]))
    elif kind == 6:
        path.write_bytes(random_.randbytes(random_.randrange(2000)))


MUTATIONS: list[Callable[[random.Random, Path], None]] = [config, tokenizer, index, header, data, files]


# --- cases ------------------------------------------------------------------------------------------------------------


def command(random_: random.Random, kind: str, folder: Path, out: Path) -> tuple[Callable[[], None], list]:
    """main and arguments of a command that reads a folder of this kind; now and then the flags are odd as well."""
    mp = random_.choice([1, 1, 2, 2, 2, 3, 4, 1024, 10**9])
    verify = ["--verify"] * (random_.random() < 0.3)
    experts = ["--expert-parallel"] * (random_.random() < 0.3)
    cpu = ["--device", "cpu"]
    run_model = ["--input-file", folder.parent / "outside" / "prompts", "--max-new-tokens", 2, "--max-seq-len", 32]
    commands = [
        (convert.main, ["--hf-ckpt-path", folder, "--save-path", out, "--model-parallel", mp, *experts, *verify]),
        (convert.main, ["--to-hf", "--shards-path", folder, "--save-path", out, *verify]),
        (fp8_cast_bf16.main, ["--input-fp8-hf-path", folder, "--output-bf16-hf-path", out, *cpu, *verify]),
        (bf16_cast_fp8.main, ["--input-bf16-hf-path", folder, "--output-fp8-hf-path", out, *cpu, *verify]),
        (plan.main, ["--ckpt-path", folder, "--model-parallel", mp, *experts]),
        (generate.main, ["--ckpt-path", folder, *run_model, "--output-file", out / "results.jsonl", *cpu]),
    ]
    suited = {"fp8": [0, 2, 4, 5], "bf16": [0, 3, 4, 5], "shards": [1, 1, 4, 5]}[kind]
    return commands[random_.choice(suited) if random_.random() < 0.9 else random_.randrange(len(commands))]


def snapshot(folder: Path) -> dict[str, tuple]:
    """Everything in a folder but its `out`: kind, size, time of change, and where a link leads."""
    found = {}
    for parent, folders, names in os.walk(folder):
        if parent == str(folder):
            folders.remove("out")
        for name in [*folders, *names]:
            path = os.path.join(parent, name)
            stat = os.lstat(path)
            link = os.readlink(path) if os.path.islink(path) else None
            found[path] = stat.st_mode, stat.st_size, stat.st_mtime_ns, link
    return found


def run_case(seed: int, number: int, sound: Path, work: Path) -> int:
    """Returns the exit code. Raises AssertionError when a rule is broken."""
    random_ = random.Random(f"{seed} {number}")
    for entry in work.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    kind = random_.choice(["fp8", "bf16", "shards"])
    folder, out = work / "in", work / "out"
    shutil.copytree(sound / kind, folder)
    (work / "outside").mkdir()
    (work / "outside" / "prompts").write_text("the fox\n")
    out.mkdir()
    mutations = random_.choices(MUTATIONS, k=random_.randrange(1, 4))
    for mutation in mutations:
        mutation(random_, folder)
    main, argv = command(random_, kind, folder, out)
    if random_.random() < 0.05:
        (out / JOURNAL).write_bytes(random_.choice([b"", b"{", b"{}\n", b"[]\n[]\n", random_.randbytes(50)]))
    what = f"{main.__module__} of {kind} after {', '.join(mutation.__name__ for mutation in mutations)}"
    before = snapshot(work)

    pid = os.fork()
    if not pid:
        run_child(main, argv, sound / "log")
    deadline = time.monotonic() + WALL_SECONDS
    while not (ended := os.wait4(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.wait4(pid, 0)
            raise AssertionError(f"{what}: hangs\n{(sound / 'log').read_bytes().decode(errors='replace')[-2000:]}")
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(ended[1])
    log = (sound / "log").read_bytes().decode(errors="replace")
    text = re.sub(r"[^\n]*\r", "", log)
    said = f"{what}: exit code {code}\n{text[-3000:]}"
    assert code in (0, 2), said
    assert "Traceback" not in text, said
    errors = [line for line in text.splitlines() if line.startswith("error: ") or ": error: " in line]
    assert len(errors) == (code == 2), said
    assert code == 0 or text.splitlines()[-1] == errors[0], said
    grown = int((sound / "grown").read_text())
    assert grown < MAX_MEMORY, f"{said}\ntook {grown >> 20} MiB"
    after = snapshot(work)
    changed = [path for path in before | after if before.get(path) != after.get(path)]
    assert not changed, f"{said}\nchanged {changed}"
    if code == 0 and main in (convert.main, fp8_cast_bf16.main, bf16_cast_fp8.main):
        Checkpoint(out)
    return code


def run_child(main: Callable[[], None], argv: list, log: Path) -> None:
    """Be the command, and end."""
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE, MAX_FILE))
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        tqdm.set_lock(threading.RLock())  # its own is shared with forked processes, and one that is killed may hold it
        sys.argv = [main.__module__, *map(str, argv)]
        at_first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run_command(main)
        code = 0
    except SystemExit as exit_:
        code = exit_.code or 0
    except BaseException:
        traceback.print_exc()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - at_first
    log.with_name("grown").write_text(str(grown * 1024))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the commands on damaged checkpoints.")
    parser.add_argument("--seconds", type=float, default=60, help="how long (default 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        sound, work = Path(temporary) / "sound", Path(temporary) / "work"
        make_hf(sound / "fp8", "v3", "fp8", mtp=1, shards=3, **SMALL)
        make_hf(sound / "bf16", "v2lite", "bf16", **SMALL | {"q_lora_rank": None})
        devnull = open(os.devnull, "w")  # noqa: SIM115
        sys.stdout, stdout = devnull, sys.stdout
        sys.stderr, stderr = devnull, sys.stderr
        convert.convert(sound / "fp8", sound / "shards", 2)
        sys.stdout, sys.stderr = stdout, stderr
        work.mkdir()
        began, number, failures = time.monotonic(), options.case or 0, 0
        counts: Counter[int] = Counter()
        while options.case is not None or time.monotonic() - began < options.seconds:
            try:
                counts[run_case(options.seed, number, sound, work)] += 1
            except AssertionError as error:
                failures += 1
                print(f"--seed {options.seed} --case {number}: {error}\n", flush=True)
                if failures == 20:
                    break
            number += 1
            if options.case is not None:
                break
        print(f"{number} cases: {counts[0]} with exit code 0, {counts[2]} with 2, {failures} failed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
