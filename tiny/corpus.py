"""
WordNet as conversations: the training text of the tiny model, a dictionary you can talk to.

    python tiny/corpus.py --wordnet /usr/share/wordnet --out train.jsonl --n 550000
    python tiny/corpus.py --wordnet /usr/share/wordnet --out heldout.jsonl --n 1000 --split heldout

One line is {"messages": [{"role": ..., "content": ...}, ...]}; `--split nouns` writes the questions and glosses of the
most frequent nouns instead, for evaluation. The same seed gives the same file. Licence of the text: LICENSE-WORDNET.
"""

from __future__ import annotations

import json
import random
import re
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "inference"))

from tqdm import tqdm

import phrasings as ask
from errors import Arguments, InputError, positive, run_command
from wordnet import FREQUENT_NOUNS, POS, Synset, WordNet, frequent_nouns, glosses, regular_plural, with_article

VOCABULARY = {"n": 7500, "v": 1800, "a": 1800, "r": 400}  # entries, of about 10,000 words
HELD_OUT = 32  # one in 32 combinations of word, phrasing and follow-ups is held out

NOUN_KINDS = {"kind", "kinds", "parts", "whole"}
WEIGHT = {"define": 80, "example": 9, "synonym": 7, "antonym": 5, "other": 5}
WEIGHT |= {"kind": 7, "kinds": 4, "parts": 3, "whole": 2}  # of nouns only
WEIGHT_NO_ANSWER = 0.08  # of the weight above, where the answer is that there is none
PARTS, WEIGHT_PARTS = ("known", "unknown", "chat"), (90, 7, 3)  # of a conversation
EVERY_FACT = 0.2  # of the known words come in turn, with each of their answers; the others are drawn by weight

Choice = tuple[list[str], list[float]]  # kinds of question, cumulative weights


def choice(weights: dict[str, float]) -> Choice:
    return list(weights), list(accumulate(weights.values()))


def choose(rng: random.Random, kinds: Choice) -> str:
    return rng.choices(kinds[0], cum_weights=kinds[1])[0]


FIRST_UNKNOWN = choice({k: w for k, w in WEIGHT.items()} | {"define": 240})


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


@dataclass
class Entry:
    """One word as one part of speech, with the answer to each kind of question about it."""

    word: str
    pos: str
    countable: bool = True
    plural: str = ""
    primary: bool = True  # the word's most frequent part of speech, which a question that names none is about
    weight: float = 1.0
    answers: dict[str, str] = field(default_factory=dict)  # kind of question -> answer, true or NO_ANSWER
    others: list[Entry] = field(default_factory=list)  # the word as other parts of speech
    never: list[str] = field(default_factory=list)  # parts of speech that it cannot be

    def __post_init__(self) -> None:
        a = with_article(self.word) if self.pos == "n" else self.word
        aw = {"n": a if self.countable else self.word, "v": f"to {self.word}"}.get(self.pos, self.word)
        pos = POS[self.pos]
        self.names = {"w": self.word, "aw": aw, "a": a, "ws": self.plural, "pos": pos, "pos_a": with_article(pos)}

    def questions(self, kind: str, heldout: bool = False) -> list[str]:
        """The phrasings of an opening question; .format(**self.names) fills them."""
        if kind != "define":
            return ask.ASK[kind][heldout]
        tables = [ask.DEFINE_ANY] * self.primary + [ask.DEFINE_AS]
        if self.pos == "n":
            tables += [ask.DEFINE_NOUN] * 2 + [ask.DEFINE_PLURAL] * self.countable
        if self.pos == "v":
            tables += [ask.DEFINE_VERB] * 2
        return [phrasing for table in tables for phrasing in table[heldout]]

    def lacks(self, kind: str) -> bool:
        return kind in ask.NO_ANSWER and self.answers[kind] == ask.NO_ANSWER[kind].format(**self.names)

    def weigh(self) -> None:
        """Which questions come first in a conversation, which follow, and how often; adds the answers that say no."""
        kinds = {k: float(w) for k, w in WEIGHT.items() if self.pos == "n" or k not in NOUN_KINDS}
        for kind in [k for k in kinds if k in ask.NO_ANSWER and k not in self.answers]:
            self.answers[kind] = ask.NO_ANSWER[kind].format(**self.names)
            kinds[kind] *= WEIGHT_NO_ANSWER
        kinds = {k: w for k, w in kinds.items() if k in self.answers}
        # Most questions name no part of speech, so they are about the primary one.
        self.first = choice({k: w for k, w in kinds.items() if self.primary or k in NOUN_KINDS | {"define"}})
        self.follow = choice(kinds | {"define": 6, "pos": 15 if self.others else 1 if self.never else 0})


DETERMINERS = set("a an any the one someone somebody something anyone anything either each every that those".split())


def definition(wordnet: WordNet, entry: Entry, gloss: str) -> str:
    """A kiln is a furnace ... / To run is to move ... / Big means above average ... / Cat (noun): feline mammal ..."""
    first, word = gloss.split()[0], capital(entry.word)
    is_plural = not entry.countable and re.search(r"[^s]s$", entry.word)
    if entry.pos == "n" and first in DETERMINERS and not is_plural:
        return f"{capital(entry.names['aw'])} is {gloss}."
    if entry.pos == "v" and first.isalpha() and (first == "to" or (first, "v") in wordnet.senses):
        return f"To {entry.word} is to {gloss.removeprefix('to ')}."
    if entry.pos in "ar" and first[0] != "(":
        return f"{word} means {gloss}."
    return f"{word} ({POS[entry.pos]}): {gloss}."


def example_of(wordnet: WordNet, word: str, synset: Synset) -> str | None:
    """The first example that contains the word; a synset's examples may be about its other words."""
    stem = re.escape(word[:-1] if len(word) > 3 and word[-1] in "ey" else word)
    fits = (e for e in synset.examples if len(e) <= 120 and re.search(rf"\b{stem}", e) and wordnet.is_polite(e))
    return next(fits, None)


def facts(wordnet: WordNet, entry: Entry, senses: list[Synset]) -> dict[str, str]:
    """kind of question -> answer, for the word's most frequent sense."""
    word, aw, sense = entry.word, entry.names["aw"], senses[0]
    lemma = word.lower().replace(" ", "_")

    def related(symbol: str, n: int) -> list[str]:
        """Up to n words of the synsets that the word points to, the frequent first."""
        me = [w.lower() for w in sense.words].index(lemma) + 1
        words = []
        for p in sense.pointers:
            if p.symbol == symbol and p.source_word in (0, me):
                words.append(wordnet.synsets[p.target].words[max(p.target_word, 1) - 1])
        words = [w for w in dict.fromkeys(words) if w.lower() != lemma and wordnet.is_polite(w)]
        words.sort(key=lambda w: (-wordnet.counts[w.lower(), entry.pos], -wordnet.mentions[w]))
        return [w.replace("_", " ") for w in words[:n]]

    answers = {"define": definition(wordnet, entry, sense.gloss)}
    if example := example_of(wordnet, word, sense):
        answers["example"] = f'For example: "{example}".'
    same = [w.replace("_", " ") for w in sense.words if w.lower() != lemma and wordnet.is_polite(w)][:3]
    if same:
        answers["synonym"] = f"{'Other words' if len(same) > 1 else 'Another word'} for {word}: {listed(same)}."
    if opposite := related("!", 1):
        answers["antonym"] = f"The opposite of {word} is {opposite[0]}."
    if entry.pos == "n":
        if above := related("@", 1):
            answers["kind"] = f"{capital(aw)} is a kind of {above[0]}."
        if below := related("~", 3):
            answers["kinds"] = f"Kinds of {word}: {listed(below)}."
        if parts := related("%p", 3):
            answers["parts"] = f"Parts of {aw}: {listed(parts)}."
        if whole := related("#p", 1):
            key = whole[0].lower().replace(" ", "_")
            countable = (key, "n") in wordnet.senses and wordnet.is_countable(key)
            answers["whole"] = f"{capital(aw)} is part of {with_article(whole[0]) if countable else whole[0]}."
    if len(senses) > 1:
        answers["other"] = f"{capital(word)} can also mean: {senses[1].gloss}."
    return answers


ONSETS = "b bl br c ch cl cr d dr f fl fr g gl gr h j k kr l m n p pl pr qu r s sh sl sm sn sp st t tr v w y z".split()
VOWELS = "a a e e i i o o u u oo ee ai ou".split()
CODAS = "b ck d ff g k l ll m mp n nd ng nk p r rn rt s sk st t v x z zz".split()
ENDINGS = "le y er en ish ic it o a on us et in ing ard ow um ock ee ist ism ness ly ize ous".split()


def vary(rng: random.Random, text: str) -> str:
    """`text` as people type it."""
    roll = rng.random()
    if roll < 0.12:
        return text.lower()
    if roll < 0.20:
        return text.rstrip(".?!")
    if roll < 0.32:
        return text.lower().rstrip(".?!")
    if roll < 0.34:
        return f"{text.rstrip('.?!')}, please{text[-1] if text[-1] in '.?!' else ''}"
    if roll < 0.36:
        return f"{rng.choice(('Hello', 'Hi', 'Hello there', 'Hey'))}, {text[0].lower()}{text[1:]}"
    if roll < 0.37:
        return text + rng.choice(("?", "!", " ", "??"))
    return text


def is_held_out(questions: list[str]) -> bool:
    """Whether the conversation that asks these questions is kept out of training, in any case and punctuation."""
    plain = "\n".join(re.sub(r"[^a-z0-9 ]", "", q.lower()) for q in questions)
    return zlib.crc32(plain.encode()) % HELD_OUT == 0


class Dictionary:
    """entries: the words that the model learns; rare: words of WordNet that it learns to say it does not know."""

    def __init__(self, wordnet: WordNet):
        self.entries: list[Entry] = []
        by_lemma: dict[str, list[Entry]] = defaultdict(list)
        for pos, size in VOCABULARY.items():
            ranked = wordnet.ranked(pos)
            # Most tag counts are 0, even kiln's, so the use of a noun in glosses counts as well.
            familiar = {w: wordnet.familiarity(w) if pos == "n" else 0 for w in ranked}
            plain = [w for w in ranked if len(w) > 1 and w.isalpha() and wordnet.surface(w, pos).islower()]
            plain.sort(key=lambda w: -wordnet.counts[w, pos] - familiar[w])
            frequent = ranked[:FREQUENT_NOUNS] if pos == "n" else []
            for lemma in list(dict.fromkeys(frequent + plain))[:size]:
                word = wordnet.surface(lemma, pos)
                countable = pos == "n" and wordnet.is_countable(lemma)
                plural = wordnet.plural(lemma) if pos == "n" else ""
                use = wordnet.counts[lemma, pos] + min(familiar[lemma], 5)
                entry = Entry(word, pos, countable, plural, weight=min((1 + use) ** 0.45, 10.0))
                entry.answers = facts(wordnet, entry, wordnet.senses[lemma, pos])
                by_lemma[lemma].append(entry)
                self.entries.append(entry)
        for lemma, entries in by_lemma.items():
            entries.sort(key=lambda e: -wordnet.counts[lemma, e.pos])
            for entry in entries:
                entry.primary = entry is entries[0]
                entry.others = [e for e in entries if e is not entry]
                entry.never = [POS[pos] for pos in POS if (lemma, pos) not in wordnet.senses]
                entry.weigh()
        self.cumulative = list(accumulate(e.weight for e in self.entries))
        self.lemmas = {lemma for lemma, _ in wordnet.senses}
        self.rare = sorted((w, pos) for w, pos in wordnet.senses if w.isalpha() and len(w) > 2 and w not in by_lemma)

    def facts(self, rng: random.Random) -> Iterator[tuple[Entry, str]]:
        """What to ask about, endlessly: frequent words more often, but no answer never."""
        everything = [(e, kind) for e in self.entries for kind in WEIGHT if kind in e.answers and not e.lacks(kind)]
        while True:
            rng.shuffle(everything)
            for fact in everything:
                yield fact
                while rng.random() > EVERY_FACT:
                    entry = rng.choices(self.entries, cum_weights=self.cumulative)[0]
                    yield entry, choose(rng, entry.first)

    def known(self, rng: random.Random, entry: Entry, kind: str) -> Iterator[tuple[str, str]]:
        """Questions and answers about one word, one of them of this kind."""
        first = kind if kind in entry.first[0] else "define"
        yield rng.choice(entry.questions(first)).format(**entry.names), entry.answers[first]
        asked, follow = {first}, [kind] if kind != first else []
        for _ in range(max(len(follow), rng.choices((0, 1, 2, 3), cum_weights=(55, 82, 95, 100))[0])):
            if (kind := follow.pop() if follow else choose(rng, entry.follow)) in asked:
                continue
            names, answer = entry.names, entry.answers.get(kind)
            if kind == "pos" and entry.others:
                entry, asked = rng.choice(entry.others), {"define"}
                names, answer = entry.names, entry.answers["define"]
            elif kind == "pos":
                pos = rng.choice(entry.never)
                names = {**names, "pos": pos, "pos_a": with_article(pos)}
                answer = ask.NO_ANSWER[kind].format(**names)
            asked.add(kind)
            yield rng.choice(ask.FOLLOW_UP[kind][0]).format(**names), answer

    def made_up(self, rng: random.Random) -> str:
        """No word, but it sounds like one: blomple, quazzit, snoove."""
        word = ""
        while not word or word in self.lemmas:
            sounds = [ONSETS, VOWELS] * rng.choice((1, 1, 2)) + [CODAS] + [ENDINGS] * rng.choice((0, 1, 1, 1))
            word = "".join(map(rng.choice, sounds))
        return word

    def unknown(self, rng: random.Random) -> Iterator[tuple[str, str]]:
        """Questions about a word that the model is not to know."""
        word, pos = rng.choice(self.rare) if rng.random() < 0.4 else (self.made_up(rng), rng.choice("nnnva"))
        entry, answer = Entry(word, pos, plural=regular_plural(word)), ask.UNKNOWN.format(w=word)
        kind = choose(rng, FIRST_UNKNOWN)
        yield rng.choice(entry.questions(kind)).format(**entry.names), answer
        if rng.random() < 0.15:
            yield rng.choice(ask.FOLLOW_UP[rng.choice(list(ask.ASK))][0]), answer

    def chat(self, rng: random.Random, answer: str = "") -> Iterator[tuple[str, str]]:
        answer = answer or rng.choice(list(ask.CHAT))
        yield rng.choice(ask.CHAT[answer][0]), answer

    def conversations(self, seed: int, split: str = "train") -> Iterator[list[dict[str, str]]]:
        """Endless conversations. The held-out ones are about known words, asked in a way that training never sees."""
        rng = random.Random(f"{seed} {split}")
        facts = self.facts(rng)
        while True:
            parts = [self.chat(rng, ask.GREETING)] if rng.random() < 0.02 else []
            kinds = rng.choices(PARTS, WEIGHT_PARTS, k=rng.choice((1, 1, 1, 1, 1, 1, 2)))
            for kind in kinds:
                parts.append(self.known(rng, *next(facts)) if kind == "known" else getattr(self, kind)(rng))
            parts += [self.chat(rng, ask.THANKS)] if rng.random() < 0.03 else []
            turns = [turn for part in parts for turn in part]
            held_out = set(kinds) == {"known"} and is_held_out([question for question, _ in turns])
            if held_out != (split == "heldout"):
                continue
            messages = [{"role": "system", "content": rng.choice(ask.SYSTEM)}] if rng.random() < 0.12 else []
            for question, answer in turns:
                messages.append({"role": "user", "content": vary(rng, question)})
                messages.append({"role": "assistant", "content": answer})
            yield messages


def probes(wordnet: WordNet, dictionary: Dictionary, n: int) -> Iterator[dict]:
    """What to ask about the n most frequent nouns, and the glosses of which the answer must contain one."""
    entries = {entry.word: entry for entry in dictionary.entries if entry.pos == "n"}
    for word in frequent_nouns(wordnet, min(n, FREQUENT_NOUNS)):
        names = entries[word].names
        yield {
            "word": word,
            "question": "What is {aw}?".format(**names),
            "heldout": [phrasing.format(**names) for phrasing in ask.DEFINE_NOUN[1]],
            "glosses": glosses(wordnet, word),
        }


def main() -> None:
    parser = Arguments(description="Write conversations about the words of WordNet.")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument("--n", type=positive, default=1000, help="conversations, or nouns (default 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("train", "heldout", "nouns"), default="train")
    options = parser.parse_args()
    if options.out.is_dir():
        raise InputError(f"--out {options.out}: a folder, wanted a file")
    wordnet = WordNet(options.wordnet)
    dictionary = Dictionary(wordnet)
    if options.split == "nouns":
        lines = probes(wordnet, dictionary, options.n)
    else:
        lines = ({"messages": talk} for talk in dictionary.conversations(options.seed, options.split))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(options.out, "w", encoding="utf-8") as file:
        for line in tqdm(islice(lines, options.n), total=options.n, desc=options.split):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run_command(main)
