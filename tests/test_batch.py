"""Stop strings, log-probabilities, sampling limits and penalties through the whole engine; jobs that are resumed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from batch import Results, read_prompts
from checkpoint import Checkpoint
from checkpoints import make_hf
from decode import Flight, Output
from engine import Request
from errors import InputError
from llm import LLM
from sampling import Sampling, SamplingParams, penalised, probabilities
from text import StopStrings

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tiny" / "checkpoint"
QUESTIONS = [f"What is a {word}?" for word in "kiln violin person furnace dog river song wheel".split()]


@pytest.fixture(scope="module", params=[0, 1], ids=["plain", "mtp"])
def tiny(request) -> LLM:
    return LLM(TINY, device="cpu", max_batch_size=4, max_seq_len=256, mtp=request.param)


@pytest.fixture(scope="module", params=[0, 2], ids=["plain", "mtp"])
def random_llm(request, tmp_path_factory) -> LLM:
    folder = make_hf(tmp_path_factory.mktemp("hf") / "model", "v3", "fp32", mtp=2)
    return LLM(folder, device="cpu", max_batch_size=4, max_seq_len=128, mtp=request.param)


# --- stop strings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("hello world", ("o w",), "hell"),
        ("hello world", ("xyz", "ld"), "hello wor"),
        ("hello world", ("world", "hello"), ""),
        ("aaab", ("aab",), "a"),
        ("hello wor", ("world",), "hello wor"),
        ("no end", (), "no end"),
    ],
)
def test_text_ends_before_the_first_stop_string(text, stop, expected, size):
    strings, out = StopStrings(stop), ""
    for i in range(0, len(text), size):
        piece = strings.add(text[i : i + size])
        out += piece
        assert not any(s in out for s in stop)
        if strings.found:
            break
    assert out + strings.end() == expected


def test_stop_strings_end_a_completion_and_what_follows_it(tiny):
    whole = tiny.generate(QUESTIONS[0], SamplingParams(temperature=0))[0]
    assert whole.finish_reason == "stop" and " or burning" in whole.text
    cut = tiny.generate(QUESTIONS, SamplingParams(temperature=0, stop=("zzz", " or burning")))
    assert cut[0].text == whole.text[: whole.text.index(" or burning")]
    assert cut[0].finish_reason == "stop" and cut[0].token_ids == whole.token_ids[: len(cut[0].token_ids)]
    decoded = tiny.tokenizer.decode(cut[0].token_ids)
    assert " or burning" in decoded and " or burning" not in tiny.tokenizer.decode(cut[0].token_ids[:-1])
    plain = tiny.generate(QUESTIONS[1:], SamplingParams(temperature=0))
    assert [c.text for c in cut[1:]] == [c.text for c in plain], "rows that go on are not disturbed"


# --- log-probabilities ------------------------------------------------------------------------------------------------


def test_logprobs_are_the_models(random_llm):
    prompts = [[5, 6, 7], list(range(20, 39)), [300]]
    params = SamplingParams(temperature=1.0, max_tokens=12, logprobs=3, top_k=50)
    for prompt, done in zip(prompts, random_llm.generate(prompts, params), strict=True):
        alone = random_llm.logprobs(prompt + done.token_ids)[len(prompt) - 1 :]
        assert len(done.logprobs) == len(done.token_ids)
        torch.testing.assert_close([own for own, _ in done.logprobs], alone, atol=1e-4, rtol=0)
        for token, (own, top) in zip(done.token_ids, done.logprobs, strict=True):
            assert len(top) == 3 and top == sorted(top, key=lambda pair: -pair[1])
            assert top[0][1] >= own - 1e-6
            assert all(value == own for i, value in top if i == token)


# --- limits and penalties ---------------------------------------------------------------------------------------------


def test_top_k_and_min_p_leave_out_what_they_say():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    for params, expected in (
        (SamplingParams(temperature=1, top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (SamplingParams(temperature=1, min_p=0.25), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]),
        (SamplingParams(temperature=1, top_k=3, top_p=0.8), [2 / 3, 1 / 3, 0, 0]),  # of what top_k leaves, 0.83
        (SamplingParams(temperature=1, top_k=1), [1, 0, 0, 0]),
        (SamplingParams(temperature=1, top_k=99), [0.5, 0.25, 0.15, 0.1]),
    ):
        probs = probabilities(logits, Sampling.of([params], torch.zeros(1).long()))
        torch.testing.assert_close(probs[0], torch.tensor(expected, dtype=torch.float32))


def test_repetition_penalty_is_for_tokens_already_there():
    logits = torch.tensor([[2.0, 1.9, -1.0, -1.1]])
    seen = torch.tensor([[True, False, True, False]])
    sampling = Sampling.of([SamplingParams(temperature=1, repetition_penalty=2.0)], torch.zeros(1).long())
    torch.testing.assert_close(penalised(logits, sampling, seen), torch.tensor([[1.0, 1.9, -2.0, -1.1]]))
    assert penalised(logits, sampling, None).equal(logits)


def test_repetition_penalty_with_drafts_is_that_of_one_token_at_a_time(random_llm):
    """Against a loop without cache, drafts or batch. Random models repeat themselves, so the penalty shows."""
    params = SamplingParams(temperature=0, max_tokens=24, repetition_penalty=1.3)
    prompts = [[9, 9, 8], list(range(40, 60))]
    for prompt, done in zip(prompts, random_llm.generate(prompts, params), strict=True):
        ids = list(prompt)
        for _ in range(24):
            with torch.inference_mode():
                logits = random_llm.model(torch.tensor([ids]))[0]
                seen = torch.tensor(sorted(set(ids)))
                logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 1.3, logits[seen] * 1.3)
            ids.append(int(logits.argmax()))
        n = len(done.token_ids)
        assert done.token_ids == ids[len(prompt) :][:n]
        assert n == 24 or ids[len(prompt) + n] in random_llm.stop_ids
    unpunished = random_llm.generate([prompts[-1]], SamplingParams(temperature=0, max_tokens=24))[0]
    assert unpunished.token_ids != done.token_ids


# --- jobs -------------------------------------------------------------------------------------------------------------


def job(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "inference/generate.py"), "--ckpt-path", str(TINY), *map(str, arguments)]


def test_an_interrupted_job_writes_what_is_finished_and_resumes(tmp_path):
    words = [json.loads(line)["word"] for line in (ROOT / "tiny/eval/nouns.jsonl").read_text().splitlines()[:160]]
    questions, output = tmp_path / "questions.txt", tmp_path / "out.jsonl"
    questions.write_text("\n".join(f"Tell me about {word}, please." for word in words))
    arguments = ["--input-file", questions, "--output-file", output, "--max-new-tokens", 30, "--device", "cpu"]
    arguments += ["--temperature", 0, "--logprobs", 1]
    process = subprocess.Popen(job(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    partial = Path(f"{output}.incomplete")
    end = time.monotonic() + 120
    while not (partial.exists() and len(partial.read_text().splitlines()) >= 20):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "--resume goes on" in errors.splitlines()[-1] and "Traceback" not in errors
    assert "\nstopping after this step ...\n" in errors and " tokens]" in errors
    first = [json.loads(line) for line in output.read_text().splitlines()]
    assert 20 <= len(first) < 160 and not partial.exists()
    assert [item["index"] for item in first] == sorted(item["index"] for item in first)

    # What is there is kept, not done again: a mark put into a result survives.
    first[0]["completion"] = "kept"
    kept, killed = first[:-3], first[-3:]
    last = {"index": 159, "prompt": questions.read_text().splitlines()[159]}
    others = [item | last | {"completion": "of a job before this one"} for item in first[:1]]
    output.write_text("".join(json.dumps(item) + "\n" for item in others))
    torn = '{"index": 3, "prompt": "ä'.encode()[:-1]  # as kill -9 may leave it
    partial.write_bytes("".join(json.dumps(item) + "\n" for item in [*kept, *killed]).encode() + torn)
    done = subprocess.run(job(*arguments, "--resume"), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [item["index"] for item in results] == list(range(160))
    assert results[first[0]["index"]]["completion"] == "kept"
    assert results[159]["completion"] != "of a job before this one"
    assert all(results[item["index"]] == item for item in first)
    assert f"Prompt: {first[1]['prompt']}\n" not in done.stdout
    assert all(len(item["logprobs"]) == item["completion_tokens"] for item in results)
    assert set(os.listdir(tmp_path)) == {"questions.txt", "out.jsonl"}
    again = subprocess.run(job(*arguments, "--resume"), capture_output=True, text=True, timeout=200, check=False)
    assert (again.returncode, again.stdout) == (0, "") and "there is nothing to do" in again.stderr
    assert "ready after" not in again.stderr, "a model was loaded"
    assert [json.loads(line) for line in output.read_text().splitlines()] == results
    assert set(os.listdir(tmp_path)) == {"questions.txt", "out.jsonl"}


def test_output_that_would_destroy_something_is_refused(tmp_path):
    prompts = [{"prompt": "x"}]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "in").write_text("x\n")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for output, source, why in (
        ("pipe", "in", "not a file that can be written"),
        ("in", "in", "it would overwrite"),
        ("link", "in", "it would overwrite"),
        ("out", "out.incomplete", "it would overwrite"),
        ("out", "out.incomplete.sorted", "it would overwrite"),
    ):
        with pytest.raises(InputError, match=why):
            Results(str(tmp_path / output), tmp_path / source, prompts, resume=False)
    (tmp_path / "used.incomplete").mkdir()
    for output, why in (("used", "not a file that can be written"), ("x" * 250, "name too long"), ("x" * 300, "name")):
        with pytest.raises(InputError, match=f"(?i){why}"):
            Results(str(tmp_path / output), tmp_path / "in", prompts, resume=False)
    (tmp_path / "out.incomplete").write_text("of a killed job\n")
    results = Results(str(tmp_path / "out"), tmp_path / "other", prompts, resume=False)
    assert (tmp_path / "out.incomplete").read_text(), "lost only once this job decodes"
    results.begin()
    assert (tmp_path / "out.incomplete").read_text() == ""
    results = Results(str(tmp_path / "link"), tmp_path / "other", prompts, resume=False)
    results.begin()
    results.add(0, {"index": 0})
    results.finish(interrupted=False)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "in").read_text() == '{"index": 0}\n'


def a_result(index: int) -> dict[str, object]:
    return {"index": index, "prompt": "xyz"[index], "completion": "c", "token_ids": []}


def lines_of(*indices: int) -> bytes:
    return b"".join(json.dumps(a_result(index)).encode() + b"\n" for index in indices)


def test_an_interrupted_job_leaves_the_results_of_an_earlier_one(tmp_path):
    """Unless it goes on from them, and so has them all."""
    prompts, output, partial = [{"prompt": c} for c in "xyz"], tmp_path / "out", tmp_path / "out.incomplete"
    output.write_bytes(lines_of(0, 1, 2))
    results = Results(str(output), tmp_path / "in", prompts, resume=False)
    results.begin()
    results.add(1, a_result(1))
    results.finish(interrupted=True)
    assert output.read_bytes() == lines_of(0, 1, 2) and partial.read_bytes() == lines_of(1)
    del results
    results = Results(str(output), tmp_path / "in", prompts, resume=True)  # FILE.incomplete comes first
    results.begin()
    results.add(0, a_result(0))
    results.finish(interrupted=False)
    assert output.read_bytes() == lines_of(0, 1) and not partial.exists()
    results = Results(str(output), tmp_path / "in", prompts, resume=True)
    results.begin()
    assert partial.read_bytes() == lines_of(0, 1), "killed from here on, it has them"
    results.add(2, a_result(2))
    results.finish(interrupted=True)
    assert output.read_bytes() == lines_of(0, 1, 2) and set(os.listdir(tmp_path)) == {"out"}
    output.write_bytes(b"")  # holds nobody's results
    results = Results(str(output), tmp_path / "in", prompts, resume=False)
    results.begin()
    results.add(1, a_result(1))
    results.finish(interrupted=True)
    assert output.read_bytes() == lines_of(1) and set(os.listdir(tmp_path)) == {"out"}


def test_two_jobs_do_not_write_one_file(tmp_path):
    prompts, partial = [{"prompt": c} for c in "xyz"], tmp_path / "out.incomplete"
    for before in (b"", lines_of(0)):  # a new FILE.incomplete, and one that takes up FILE
        (tmp_path / "out").write_bytes(before)
        first = Results(str(tmp_path / "out"), tmp_path / "in", prompts, resume=bool(before))
        late = Results(str(tmp_path / "out"), tmp_path / "in", prompts, resume=False)
        first.begin()
        first.add(1, a_result(1))
        for resume in (False, True):
            with pytest.raises(InputError, match=f"another job is writing {partial}"):
                Results(str(tmp_path / "out"), tmp_path / "in", prompts, resume)
        with pytest.raises(InputError, match="another job is writing"):
            late.begin()
        assert partial.read_bytes() == before + lines_of(1)
        first.finish(interrupted=False)
        del first, late


@pytest.mark.parametrize("end", ["finished", "killed"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_job_that_another_one_overtakes_is_refused(tmp_path, resume, end):
    """While it loads."""
    prompts, output, partial = [{"prompt": c} for c in "xyz"], tmp_path / "out", tmp_path / "out.incomplete"
    output.write_bytes(lines_of(0))
    late = Results(str(output), tmp_path / "in", prompts, resume)
    first = Results(str(output), tmp_path / "in", prompts, resume)
    first.begin()
    first.add(1, a_result(1))
    if end == "finished":
        first.finish(interrupted=False)
    del first
    left = {path: path.read_bytes() for path in (output, partial) if path.exists()}
    with pytest.raises(InputError, match="another job has written it meanwhile"):
        late.begin()
    del late
    assert {path: path.read_bytes() for path in (output, partial) if path.exists()} == left


def test_an_empty_incomplete_file_hides_nothing(tmp_path):
    """What a job leaves that is stopped before its first result."""
    prompts, output, partial = [{"prompt": c} for c in "xyz"], tmp_path / "out", tmp_path / "out.incomplete"
    output.write_bytes(lines_of(0, 1))
    results = Results(str(output), tmp_path / "in", prompts, resume=False)
    results.begin()
    results.finish(interrupted=True)
    assert not partial.exists() and output.read_bytes() == lines_of(0, 1)
    partial.write_bytes(b'{"index": 0')
    del results
    results = Results(str(output), tmp_path / "in", prompts, resume=True)
    assert results.done.keys() == {0, 1}
    results.begin()
    assert partial.read_bytes() == lines_of(0, 1)


def test_results_survive_a_resume_that_fails(tmp_path, monkeypatch):
    """What a killed job left is shortened by its torn line, never written anew."""
    partial = tmp_path / "out.incomplete"
    partial.write_bytes(lines_of(0, 1) + b'{"index": 2')

    def full(*_: object) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(Path, "write_bytes", full)
    results = Results(str(tmp_path / "out"), tmp_path / "in", [{"prompt": c} for c in "xyz"], resume=True)
    assert partial.read_bytes() == lines_of(0, 1) and results.done.keys() == {0, 1}
    del results
    monkeypatch.setattr(os, "truncate", full)
    with pytest.raises(InputError, match="File too large; it cannot be resumed"):
        Results(str(tmp_path / "out"), tmp_path / "in", [{"prompt": c} for c in "xyz"], resume=True)
    assert partial.read_bytes() == lines_of(0, 1)


def test_a_system_message_that_the_conversation_brings(tiny):
    talk = [{"role": "user", "content": "hi"}, {"role": "system", "content": "own"}, {"role": "user", "content": "x"}]
    assert tiny.encode(talk, "other") == tiny.encode(talk)
    assert tiny.encode(talk[:1], "other") != tiny.encode(talk[:1])


@pytest.mark.parametrize("other", ["system", "temperature", "id"])
def test_what_a_line_does_not_say_is_refused(tmp_path, other):
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "x", other: 1}))
    with pytest.raises(InputError, match=f'line 1: "{other}" is not known'):
        read_prompts(str(tmp_path / "in.jsonl"))


def test_json_lines_under_another_name_are_text_with_a_remark(tmp_path, capsys):
    source = tmp_path / "in.json"
    for text, remarked in (('{"prompt": "x"}', True), ('{ "messages": []}', True), ('{"a": "prompt"}', False)):
        source.write_text(text)
        assert read_prompts(str(source)) == [{"prompt": text}]
        assert (capsys.readouterr().err != "") == remarked


def test_a_result_is_written_before_it_is_printed(tmp_path):
    """To a reader that has gone, say."""
    (tmp_path / "in.txt").write_text("What is a kiln?\nWhat is a dog?\n")
    arguments = ["--input-file", tmp_path / "in.txt", "--output-file", tmp_path / "out.jsonl", "--device", "cpu"]
    process = subprocess.Popen(job(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(100) == 1 and "Traceback" not in errors and "Exception ignored" not in errors
    assert len((tmp_path / "out.jsonl.incomplete").read_text().splitlines()) == 1


def test_a_result_without_a_completion_is_none(tmp_path):
    (tmp_path / "out").write_text('{"index": 0, "prompt": "x"}\n')
    with pytest.raises(InputError, match="line 1 is no result"):
        Results(str(tmp_path / "out"), tmp_path / "in", [{"prompt": "x"}], resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gemm": "int8"}, "--gemm int8: wanted one of auto"),
        ({"device": "gpu"}, "--device gpu: wanted auto, cuda or cpu"),
        ({"max_batch_size": 0}, "--max-batch-size 0: wanted 1"),
        ({"prefill_chunk": 2.5}, "--prefill-chunk 2.5: wanted 1"),
        ({"mtp": 17}, "--mtp 17: wanted 0 to 16"),
        ({"max_batch_size": 10**8}, "are there; use fewer rows, a smaller --max-seq-len"),
        ({"max_seq_len": "5"}, "--max-seq-len '5': wanted 2"),
        ({"max_seq_len": 100.0}, "--max-seq-len 100.0: wanted 2"),
    ],
)
def test_options_that_no_model_can_have(options, message):
    with pytest.raises(InputError, match=message):
        LLM(TINY, **{"device": "cpu"} | options)


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": 2.5},
        {"temperature": "0"},
        {"top_k": None},
        {"top_k": 10**400},
        {"logprobs": 0.5},
        {"stop": ("x", 1)},
    ],
)
def test_settings_of_another_type(params):
    with pytest.raises(InputError, match=f"^{next(iter(params))} is "):
        SamplingParams(**params)
    assert SamplingParams(stop=["x"]).stop == SamplingParams(stop="x").stop == ("x",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"index": 0, "prompt": "What is a dog?", "completion": "x"}', " is no result of this input file"),
        ('{"index": 0, "prompt": "What is a ki', ": not JSON: "),
    ],
)
def test_results_of_other_prompts_are_not_resumed(tmp_path, line, message):
    (tmp_path / "in.txt").write_text("What is a kiln?\n")
    (tmp_path / "out.jsonl").write_text(line + "\n")
    arguments = ["--input-file", tmp_path / "in.txt", "--output-file", tmp_path / "out.jsonl", "--resume"]
    done = subprocess.run(job(*arguments), capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert f"out.jsonl line 1{message}" in last and last.endswith("; without --resume the job begins anew")
    assert (tmp_path / "out.jsonl").read_text() == line + "\n"


@pytest.mark.parametrize("given", [Path, Checkpoint])
def test_no_file_stays_open(tmp_path, given):
    folder = make_hf(tmp_path / "model", "v3", "fp32")
    llm = LLM(given(folder), device="cpu", max_batch_size=1, max_seq_len=16)
    opened = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    assert llm.model is not None and not any(path.startswith(str(folder.resolve())) for path in opened)


def test_weights_that_are_no_numbers_are_an_error(random_llm):
    weight = random_llm.model.norm.weight
    with torch.no_grad():
        before, weight[3] = weight[3].clone(), torch.nan
        try:
            for params in (SamplingParams(temperature=0), SamplingParams(temperature=1.0, logprobs=1)):
                with pytest.raises(InputError, match="NaN or infinite logits: weights are damaged"):
                    random_llm.generate([[5, 6, 7]], params)
        finally:
            weight[3] = before
    assert random_llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=2))[0].token_ids
    with pytest.raises(InputError, match="half of a surrogate pair"):
        random_llm.generate("What is a \ud800?")
    with pytest.raises(InputError, match="takes token ids, not text"):
        random_llm.logprobs("What is a kiln?")


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(temperature=1.0, logprobs=1)])
def test_a_step_that_gives_no_numbers_is_an_error(random_llm, params):
    """A weight that only a later token meets, as an expert's may be. What spare rows compute is no matter."""
    embed, prompt = random_llm.model.embed.weight, [5, 6, 7]
    with torch.no_grad():
        before = embed.clone()
        embed[8:] = torch.nan
        try:
            assert random_llm.generate([prompt], replace(params, max_tokens=1))[0].token_ids[0] >= 8
            with pytest.raises(InputError, match="NaN or infinite logits: weights are damaged"):
                random_llm.generate([prompt], replace(params, max_tokens=4))
        finally:
            embed.copy_(before)
    assert len(random_llm.generate([prompt], replace(params, max_tokens=5))[0].token_ids) == 5
    shared = torch.tensor([[0, 0, 4], [2, 0, 5]])
    assert Flight(Output(shared), 1).read() == (False, [[4], [5]])
    with pytest.raises(InputError, match="NaN or infinite logits"):
        Flight(Output(shared), 2).read()


def test_requests_of_any_kind(random_llm):
    """From a generator, of numbers of NumPy's; those that cannot be run are refused."""
    ids, params = [5, 6, 7], SamplingParams(temperature=1.0, max_tokens=3, seed=np.int64(4))
    wanted = random_llm.generate([ids], params)
    for prompts in (torch.tensor([ids]), np.array([ids]), [np.array(ids)], torch.tensor(ids)):
        assert random_llm.generate(prompts, params) == wanted
    for prompts in (np.array(5), [1.5], 7, [7.5, None]):
        with pytest.raises(InputError):
            random_llm.generate(prompts, params)
    assert random_llm.logprobs(torch.tensor(ids)) == random_llm.logprobs(ids)
    assert random_llm.generate([ids], [None]) == random_llm.generate([ids])
    requests = [Request(ids, params)]
    pieces = list(random_llm.run(request for request in requests))
    assert pieces and requests[0].tokens == wanted[0].token_ids
    twice = Request(ids, params)
    for wrong, message in (
        (requests, "a request is run once"),
        ([twice, twice], "a request is run once"),
        ([Request(ids, params, finish_reason="interrupted")], "a request is run once"),
        ([Request([], params)], "prompt 0 is empty"),
        ([Request(ids, params), Request(ids * 1000, params)], "prompt 1 has 3000 tokens .* raise --max-seq-len"),
    ):
        with pytest.raises(InputError, match=message):
            list(random_llm.run(wrong))


def test_a_request_can_be_ended_by_its_reader(tiny):
    params = SamplingParams(temperature=0)
    requests = [Request(tiny.encode(question), params, i) for i, question in enumerate(QUESTIONS)]
    for request, _ in tiny.engine.run(requests):
        if request.index == 2 and len(request.tokens) >= 3:
            request.finish_reason = "stop"
    assert len(requests[2].tokens) <= 5
    assert all(len(request.tokens) > 5 for request in requests if request.index != 2)
    assert sorted(tiny.engine.free) == [0, 1, 2, 3]
