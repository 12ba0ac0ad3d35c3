"""The tiny model's text and tokenizer, from a WordNet of 20 synsets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

import corpus
import phrasings
import tokenizer as bpe
import wordnet

TINY = Path(corpus.__file__).parent

# offset lexfile type n_words (word lex_id)* n_pointers (symbol offset pos source/target)* frames? | gloss; "example"
DATA = {
    "noun": """\
00000100 06 n 01 furnace 0 002 @ 00000900 n 0000 ~ 00000200 n 0000 | an enclosed chamber in which heat is produced
00000200 06 n 02 kiln 0 brick_oven 0 001 @ 00000100 n 0000 | a furnace for firing such things as porcelain or bricks
00000300 15 n 01 New_York 0 001 @i 00000400 n 0000 | a city on the Hudson River
00000400 15 n 02 city 0 metropolis 0 000 | a large and densely populated urban area; "the city of New York"
00000500 27 n 01 water 0 000 | a clear liquid; freezes into ice; {long}; boils into steam
00000600 04 n 01 run 0 000 | a score in baseball; "the Yankees scored 3 runs"; "a house by the water"
00000700 06 n 01 house 0 002 @ 00000900 n 0000 %p 00000800 n 0000 | a dwelling for a family; "a roof and a house"
00000800 06 n 01 roof 0 001 #p 00000700 n 0000 | the covering on top of a house
00000900 06 n 01 artifact 0 002 ~ 00000100 n 0000 ~ 00000700 n 0000 | a man-made object taken as a whole
00001000 18 n 01 zounder 0 000 | offensive term for a person who zounds
00001100 06 n 02 tool 0 zounder 0 000 | an implement; "a tool of a zounder"; "a tool in a house"
00001200 18 n 01 tool 1 001 ;u 00001300 n 0000 | someone who is used
00001300 10 n 01 disparagement 0 000 | the act of speaking contemptuously of
00001400 05 n 01 cat 0 000 | feline mammal usually having thick soft fur
00001500 18 n 01 child 0 000 | a young person
""",
    "verb": """\
00000100 38 v 02 run 0 sprint 0 000 01 + 02 00 | move fast by using one's feet; "run for your life"
00000200 38 v 01 run 1 000 01 + 02 00 | to flow; "the faucet runs"
00000300 38 v 01 move 0 000 01 + 02 00 | to change position
""",
    "adj": """\
00000100 00 a 01 hot 0 002 ! 00000200 a 0101 & 00000300 s 0000 | having a high temperature; "hot stove"
00000200 00 a 01 cold 0 001 ! 00000100 a 0101 | (of weather) having a low temperature; "a cold climate"
00000300 00 s 02 burning(p) 0 torrid 0 001 & 00000100 a 0000 | intensely hot; "a torrid city"
00000400 01 a 01 Kafkaesque 0 000 | relating to Kafka
""",
    "adv": """\
00000100 02 r 01 quickly 0 000 | with speed
""",
}
SENSES = {  # in the order of index.*
    "noun": "furnace 100|kiln 200|brick_oven 200|new_york 300|city 400|metropolis 400|water 500|run 600|house 700"
    "|roof 800|artifact 900|zounder 1000 1100|tool 1100 1200|disparagement 1300|cat 1400|child 1500",
    "verb": "run 100 200|sprint 100|move 300",
    "adj": "hot 100|cold 200|burning 300|torrid 300|kafkaesque 400",
    "adv": "quickly 100",
}
COUNTS = """\
city%1:15:00:: 1 9
house%1:06:00:: 1 7
kiln%1:06:00:: 1 2
new_york%1:15:00:: 1 9
run%1:04:00:: 1 1
run%2:38:00:: 1 30
run%2:38:01:: 2 5
torrid%5:00:00:hot:00 1 3
water%1:27:00:: 1 4
water%1:27:01:: 2 4
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wordnet")
    licence = "  1 This software and database is being provided to you | for any purpose\n"
    for pos, text in DATA.items():
        (folder / f"data.{pos}").write_text(licence + text.replace("{long}", "x" * wordnet.MAX_GLOSS))
        index = [line.split() for line in SENSES[pos].split("|")]
        lines = [f"{w} {pos[0]} {len(s)} 1 @ {len(s)} 0 {' '.join(f'{int(i):08}' for i in s)}  \n" for w, *s in index]
        (folder / f"index.{pos}").write_text(licence + "".join(lines))
    (folder / "cntlist.rev").write_text(COUNTS)
    (folder / "noun.exc").write_text("children child\n")
    return folder


@pytest.fixture(scope="session")
def net(folder: Path) -> wordnet.WordNet:
    return wordnet.WordNet(folder)


@pytest.fixture(scope="session")
def dictionary(net: wordnet.WordNet) -> corpus.Dictionary:
    return corpus.Dictionary(net)


@pytest.fixture(scope="session")
def talks(dictionary: corpus.Dictionary) -> list[list[dict[str, str]]]:
    return list(islice(dictionary.conversations(seed=0), 10_000))


@pytest.fixture(scope="session")
def held_out(dictionary: corpus.Dictionary) -> list[list[dict[str, str]]]:
    return list(islice(dictionary.conversations(seed=0, split="heldout"), 500))


def entry(dictionary: corpus.Dictionary, word: str, pos: str) -> corpus.Entry:
    return next(e for e in dictionary.entries if (e.word, e.pos) == (word, pos))


def asked(talk: list[dict[str, str]]) -> tuple[str, ...]:
    """The questions without case and punctuation."""
    return tuple(re.sub(r"[^a-z0-9 ]", "", m["content"].lower()).strip() for m in talk if m["role"] == "user")


def test_parse(net: wordnet.WordNet):
    cold = net.synsets["a", "00000200"]
    assert cold == (
        0,
        ["cold"],
        [("!", ("a", "00000100"), 1, 1)],
        "(of weather) having a low temperature",
        ["a cold climate"],
    )
    assert net.synsets["a", "00000100"].pointers[1].target == ("a", "00000300")
    assert net.synsets["a", "00000300"].words == ["burning", "torrid"]  # a satellite, and without the marker (p)
    assert net.synsets["v", "00000100"].gloss == "move fast by using one's feet"
    assert net.synsets["n", "00000600"].examples == ["the Yankees scored 3 runs", "a house by the water"]
    assert [s.gloss for s in net.senses["run", "v"]] == ["move fast by using one's feet", "to flow"]
    assert net.counts["run", "v"] == 35 and net.counts["torrid", "a"] == 3


def test_long_gloss_ends_with_a_clause(net: wordnet.WordNet):
    assert wordnet.glosses(net, "water") == ["a clear liquid; freezes into ice"]
    assert wordnet.trim("x" * 300) == "x" * 300
    assert wordnet.trim("a; " + "x" * 197) == "a; " + "x" * 197  # just short enough
    assert wordnet.trim("a; " + "x" * 198) == "a"


def test_frequent_nouns(net: wordnet.WordNet):
    # By count (water's are of two senses), then by mentions (`of New York` is none, the phrase goes on), then A to Z.
    assert wordnet.frequent_nouns(net, 6) == ["city", "New York", "water", "house", "kiln", "run"]
    tied = wordnet.frequent_nouns(net, 100)[6:]
    assert tied[:3] == ["tool", "furnace", "roof"] and tied[3:] == sorted(tied[3:]) and "zounder" not in tied


def test_rude_senses_are_left_out(net: wordnet.WordNet, talks: list[list[dict[str, str]]]):
    assert ("zounder", "n") not in net.senses  # its first sense is vulgar
    assert wordnet.glosses(net, "tool") == ["an implement"]  # the other is marked by a usage pointer
    assert "zound" not in json.dumps(talks)  # neither as synonym nor in an example


@pytest.mark.parametrize(
    "phrase",
    "a kiln|an apple|an hour|an honest man|a unit|a use|an umbrella|a university|an uninvited guest|a European"
    "|a one-off|an onion|an heir|a house|a ewe|an uncle|a ukulele".split("|"),
)
def test_article(phrase: str):
    assert wordnet.with_article(phrase.split(maxsplit=1)[1]) == phrase


def test_plural(net: wordnet.WordNet):
    words = ["kiln", "box", "church", "city", "day", "child"]
    assert [net.irregular_plurals.get(w) or wordnet.regular_plural(w) for w in words] == [
        *("kilns", "boxes", "churches", "cities", "days", "children")
    ]


def test_countable(net: wordnet.WordNet, monkeypatch):
    assert [net.is_countable(w) for w in ("kiln", "roof", "child", "water", "new_york")] == [True] * 3 + [False] * 2
    monkeypatch.setitem(net.bare, "kiln", 2)  # too little to tell
    assert net.is_countable("kiln")
    monkeypatch.setitem(net.bare, "kiln", 3)  # three times `of kiln`
    assert not net.is_countable("kiln")
    monkeypatch.setitem(net.indefinite, "kiln", 1)  # and once `a kiln`
    assert net.is_countable("kiln")


@pytest.mark.parametrize(
    ("word", "pos", "kind", "answer"),
    [
        ("kiln", "n", "define", "A kiln is a furnace for firing such things as porcelain or bricks."),
        ("water", "n", "define", "Water is a clear liquid; freezes into ice."),
        ("New York", "n", "define", "New York is a city on the Hudson River."),
        ("cat", "n", "define", "Cat (noun): feline mammal usually having thick soft fur."),
        ("run", "v", "define", "To run is to move fast by using one's feet."),
        ("run", "v", "other", "Run can also mean: to flow."),
        ("move", "v", "define", "To move is to change position."),
        ("run", "v", "example", 'For example: "run for your life".'),
        ("run", "v", "synonym", "Another word for run: sprint."),
        ("sprint", "v", "example", "I have no example of sprint."),  # the example is about run
        ("hot", "a", "define", "Hot means having a high temperature."),
        ("hot", "a", "antonym", "The opposite of hot is cold."),
        ("cold", "a", "define", "Cold (adjective): (of weather) having a low temperature."),
        ("quickly", "r", "define", "Quickly means with speed."),
        ("kiln", "n", "kind", "A kiln is a kind of furnace."),
        ("kiln", "n", "synonym", "Another word for kiln: brick oven."),
        ("artifact", "n", "kinds", "Kinds of artifact: house and furnace."),  # house is more frequent
        ("house", "n", "parts", "Parts of a house: roof."),
        ("roof", "n", "whole", "A roof is part of a house."),
        ("roof", "n", "define", "A roof is the covering on top of a house."),
        ("roof", "n", "antonym", "I know no opposite of roof."),
    ],
)
def test_answers(dictionary: corpus.Dictionary, word: str, pos: str, kind: str, answer: str):
    assert entry(dictionary, word, pos).answers[kind] == answer


def test_every_kind_of_conversation(dictionary: corpus.Dictionary, talks: list[list[dict[str, str]]]):
    answers = {m["content"] for talk in talks for m in talk if m["role"] == "assistant"}
    assert {a for e in dictionary.entries for kind, a in e.answers.items() if not e.lacks(kind)} <= answers
    assert set(phrasings.CHAT) <= answers
    unknown = {a for a in answers if a.startswith("I do not know the word ")}
    assert len(unknown) > 100 and "I do not know the word kafkaesque." in unknown  # made up, and rare
    assert "I do not know kiln as a verb." in answers

    followed = {(asked(talk)[1], talk[-1]["content"]) for talk in talks if len(talk) == 4}
    assert ("and as a verb", "To run is to move fast by using one's feet.") in followed
    assert ("use it in a sentence", 'For example: "run for your life".') in followed
    for talk in talks:
        roles = [m["role"] for m in talk]
        turns = roles[roles[0] == "system" :]
        assert turns == ["user", "assistant"] * (len(turns) // 2)
    assert 0.08 < sum(talk[0]["role"] == "system" for talk in talks) / len(talks) < 0.16


def test_questions_as_people_type_them(talks: list[list[dict[str, str]]], held_out: list[list[dict[str, str]]]):
    kiln = "A kiln is a furnace for firing such things as porcelain or bricks."
    questions = {talk[0]["content"] for talk in talks + held_out if talk[1]["content"] == kiln}
    expected = {"What is a kiln?", "what is a kiln", "What's a kiln?", "Define kiln.", "kiln", "What are kilns?"}
    assert expected <= questions


def test_a_question_without_part_of_speech_is_about_the_frequent_one(
    talks: list[list[dict[str, str]]], held_out: list[list[dict[str, str]]]
):
    noun, verb = "A run is a score in baseball.", "To run is to move fast by using one's feet."
    about = {(asked(talk)[0], talk[-1]["content"]) for talk in talks + held_out if len(talk) == 2}
    assert {a for q, a in about if q in ("run", "define run", "what does run mean")} == {verb}
    assert {a for q, a in about if q.endswith(("what is a run", "the noun run", "run as a noun"))} == {noun}


def test_same_seed_same_conversations(dictionary: corpus.Dictionary, talks: list[list[dict[str, str]]]):
    assert list(islice(dictionary.conversations(seed=0), 500)) == talks[:500]
    assert list(islice(dictionary.conversations(seed=1), 500)) != talks[:500]


def test_held_out_conversations_are_not_in_training(
    dictionary: corpus.Dictionary, talks: list[list[dict[str, str]]], held_out: list[list[dict[str, str]]]
):
    trained = {asked(talk) for talk in [*talks, *islice(dictionary.conversations(seed=1), 10_000)]}
    assert not trained & {asked(talk) for talk in held_out}
    answers = {m["content"] for talk in held_out for m in talk if m["role"] == "assistant"}
    assert answers <= {m["content"] for talk in talks for m in talk}  # known words, new combinations


def test_held_out_phrasings_are_not_in_training(dictionary: corpus.Dictionary, talks: list[list[dict[str, str]]]):
    questions = {q for talk in talks for q in asked(talk)}
    for e in dictionary.entries:
        for kind in e.answers:
            phrases = e.questions(kind, heldout=True)
            assert len(phrases) >= 2
            assert not {asked([{"role": "user", "content": p.format(**e.names)}])[0] for p in phrases} & questions
    follow_ups = {asked([{"role": "user", "content": p}])[0] for _, held in phrasings.FOLLOW_UP.values() for p in held}
    assert len(follow_ups) >= 2 * len(phrasings.FOLLOW_UP) and not follow_ups & questions


def run(*command: str | Path, seed: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment)


def test_missing_wordnet_is_one_line(tmp_path: Path):
    result = run(TINY / "corpus.py", "--wordnet", tmp_path, "--out", tmp_path / "out.jsonl")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and "wordnet-base" in result.stderr and str(tmp_path) in result.stderr


def test_commands_write_the_same_bytes_again(folder: Path, tmp_path: Path):
    files = {}
    for seed in (1, 2):  # of Python's hashes, which must not matter
        out = tmp_path / str(seed)
        for split, n in (("train", 600), ("heldout", 20), ("nouns", 5)):
            result = run(
                *(TINY / "corpus.py", "--wordnet", folder, "--out", out / f"{split}.jsonl", "--split", split, "--n", n),
                seed=seed,
            )
            assert result.returncode == 0, result.stderr
        result = run(
            *(TINY / "tokenizer.py", out / "train.jsonl", out / "heldout.jsonl", "--out", out, "--vocab-size", 512),
            seed=seed,
        )
        assert result.returncode == 0, result.stderr
        files[seed] = {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    assert files[1] == files[2] and len(files[1]) == 7

    tokens = np.load(tmp_path / "1" / "heldout.npy")
    assert tokens.dtype == np.uint16 and (tokens == 0).sum() == 20 and tokens[0] == 0 and tokens[-1] == 1
    noun = json.loads((tmp_path / "1" / "nouns.jsonl").read_text().splitlines()[0])
    assert "So what is a city, exactly?" in noun["heldout"]
    assert noun["question"] == "What is a city?" and noun["glosses"] == ["a large and densely populated urban area"]


@pytest.fixture(scope="session")
def trained(talks: list[list[dict[str, str]]], tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe.save(bpe.train((m["content"] for talk in talks for m in talk), vocab_size=512), folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_tokenizer(trained: PreTrainedTokenizerFast):
    assert len(trained) == 512 and trained.model_max_length == 2048
    assert [trained.bos_token, trained.eos_token, trained.pad_token] == trained.convert_ids_to_tokens([0, 1, 2])
    assert trained.convert_tokens_to_ids(bpe.SPECIAL_TOKENS) == [0, 1, 2, 3, 4]
    assert bpe.SPECIAL_TOKENS[0] == "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
    text = 'A kiln isn\'t "naïve": 漢字 🙂 12345\t\n\n  end '
    ids = trained.encode(text)
    assert ids[0] == 0 and 0 not in ids[1:]
    assert trained.decode(ids[1:]) == text
    assert trained.encode("What is a kiln?", add_special_tokens=False)[0] > 260  # a merged token


def test_chat_template(trained: PreTrainedTokenizerFast):
    user, assistant = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
    messages = [
        {"role": "system", "content": "You are a dictionary."},
        {"role": "user", "content": "Define kiln."},
        {"role": "assistant", "content": "A kiln is a furnace."},
        {"role": "user", "content": "Thanks"},
    ]
    text = (
        f"{trained.bos_token}You are a dictionary.{user}Define kiln.{assistant}A kiln is a furnace.{trained.eos_token}"
        f"{user}Thanks"
    )
    assert trained.apply_chat_template(messages, tokenize=False) == text == bpe.render(messages)
    ids = trained.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert trained.decode(ids) == text + assistant and ids.count(0) == ids.count(1) == 1 and ids[-1] == 4
    two = [messages[0], {"role": "system", "content": "Be kind."}, *messages[1:]]
    joined = text.replace("dictionary.", "dictionary.\n\nBe kind.", 1)
    assert trained.apply_chat_template(two, tokenize=False) == joined == bpe.render(two)


def test_encode_is_the_chat_template(trained: PreTrainedTokenizerFast, talks: list[list[dict[str, str]]]):
    expected = [i for talk in talks[:200] for i in trained.apply_chat_template(talk, return_dict=False)]
    tokens = bpe.encode(talks[:200], trained.backend_tokenizer)
    assert tokens.dtype == np.uint16 and tokens.tolist() == expected
