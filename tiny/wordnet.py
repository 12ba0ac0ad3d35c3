"""
WordNet 3.0 from its database files, without rude senses.

Format: https://wordnet.princeton.edu/documentation/wndb5wn (data.*, index.*), cntlist5wn, and morphy7wn (noun.exc).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from errors import InputError

POS = {"n": "noun", "v": "verb", "a": "adjective", "r": "adverb"}
POS_FILE = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
SENSE_KEY_POS = {"1": "n", "2": "v", "3": "a", "4": "r", "5": "a"}

# Lexicographer files: animals, artifacts, bodies, objects, people, plants, shapes take an article; substances do not.
THINGS = {5, 6, 8, 17, 18, 20, 25}
FOOD, SUBSTANCE = 13, 27

# Senses that WordNet marks as rude are left out, and the words that are vulgar in their first sense are not answers.
RUDE = re.compile(
    r"\b(obscene|offensive|disparaging|derogatory|insulting|slang)( and disparaging)? (term|name|word)s?\b"
    r"|ethnic slur|slang for|\([^)]*offensive[^)]*\)"
)
VULGAR = re.compile(r"obscene (term|word)|ethnic slur|offensive (term|name|slang)|vulgar slang")
RUDE_USAGE, VULGAR_USAGE = {"obscenity", "ethnic_slur", "disparagement"}, {"obscenity", "ethnic_slur"}
VULGAR_WORDS = {"negro", "negroid", "negress", "mulatto", "squaw"}  # unmarked in WordNet

FREQUENT_NOUNS = 2000
MAX_GLOSS = 200  # characters


def with_article(word: str) -> str:
    vowel = r"(?!eu|ewe|one\b|once|u[bkrst][aeiou]|uni(?![nm])|unanim)[aeiou]|hour|honest|honou?r|heir"
    return ("an " if re.match(vowel, word.lower()) else "a ") + word


def regular_plural(word: str) -> str:
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search(r"(s|x|z|ch|sh)$", word) else "s")


class Pointer(NamedTuple):
    symbol: str  # @ is a kind of, ~ has kind, %p has part, #p is part of, ! antonym, ;u usage
    target: tuple[str, str]  # (pos, offset)
    source_word: int  # which word of this synset points, from 1; 0: all of them
    target_word: int


class Synset(NamedTuple):
    lexfile: int
    words: list[str]
    pointers: list[Pointer]
    gloss: str
    examples: list[str]


def trim(gloss: str) -> str:
    """`gloss` without its last clauses where it is longer than MAX_GLOSS; the first clause always stays whole."""
    while len(gloss) > MAX_GLOSS and "; " in gloss:
        gloss = gloss[: gloss.rindex("; ")]
    return gloss


def parse_synset(line: str) -> tuple[tuple[str, str], Synset]:
    """
    (pos, offset) and the synset of
    offset lexfile pos n_words (word lex_id)* n_pointers (symbol offset pos source/target)* ... | gloss; "example"; ...
    """
    head, _, text = line.partition(" | ")
    fields = head.split()
    n_words = int(fields[3], 16)
    words = [re.sub(r"\(\w+\)$", "", w) for w in fields[4 : 4 + 2 * n_words : 2]]  # galore(ip) -> galore
    start = 5 + 2 * n_words
    pointers = []
    for i in range(start, start + 4 * int(fields[start - 1]), 4):
        symbol, offset, pos, ends = fields[i : i + 4]
        pointers.append(Pointer(symbol, (pos.replace("s", "a"), offset), int(ends[:2], 16), int(ends[2:], 16)))
    gloss = re.split(r'\s*[;:]\s*:?"', text)[0].strip(" ;\n")
    examples = re.findall(r'[;:] *:?"([^"]+)"', text)
    key = (fields[2].replace("s", "a"), fields[0])  # s: satellite adjective
    return key, Synset(int(fields[1]), words, pointers, trim(gloss), examples)


class WordNet:
    """synsets[pos, offset]; senses[lemma, pos]: synsets, most frequent first; counts[lemma, pos]: tags in real text."""

    def __init__(self, folder: Path):
        names = [f"{kind}.{pos}" for kind in ("data", "index") for pos in POS_FILE.values()]
        for name in [*names, "cntlist.rev", "noun.exc"]:
            if not (folder / name).is_file():
                raise InputError(f"{folder / name}: no such file; install the package wordnet-base, or give --wordnet")

        self.synsets: dict[tuple[str, str], Synset] = {}
        index: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for pos, name in POS_FILE.items():
            self.synsets.update(map(parse_synset, self._lines(folder / f"data.{name}")))
            for line in self._lines(folder / f"index.{name}"):
                lemma, _, n_senses, *rest = line.split()
                index[lemma, pos] = [(pos, offset) for offset in rest[-int(n_senses) :]]

        self.counts: Counter[tuple[str, str]] = Counter()
        for line in self._lines(folder / "cntlist.rev"):  # lemma%pos:... sense_number count
            sense_key, _, count = line.split()
            lemma, _, rest = sense_key.partition("%")
            self.counts[lemma, SENSE_KEY_POS[rest[0]]] += int(count)
        irregular = [line.split()[:2] for line in self._lines(folder / "noun.exc")]
        self.irregular_plurals = {singular: plural for plural, singular in reversed(irregular)}

        vulgar = {key for key, s in self.synsets.items() if self._is_marked(s, VULGAR, VULGAR_USAGE)}
        self.vulgar_words = {lemma for (lemma, _), keys in index.items() if keys[0] in vulgar} | VULGAR_WORDS
        rude = {key for key, s in self.synsets.items() if self._is_marked(s, RUDE, RUDE_USAGE)}
        self.senses: dict[tuple[str, str], list[Synset]] = {}
        for (lemma, pos), keys in index.items():
            senses = [self.synsets[key] for key in keys if key not in rude]
            if senses and self.is_polite(lemma):
                self.senses[lemma, pos] = senses
        self._count_articles()

    @staticmethod
    def _lines(path: Path) -> Iterator[str]:
        with open(path, encoding="utf-8") as file:
            yield from (line for line in file if not line.startswith("  "))  # the licence is indented

    def _is_marked(self, synset: Synset, gloss: re.Pattern[str], usage: set[str]) -> bool:
        """Whether the gloss or a usage pointer says so."""
        labels = (self.synsets[p.target].words[0] for p in synset.pointers if p.symbol == ";u" and p.source_word == 0)
        return bool(gloss.search(synset.gloss)) or not usage.isdisjoint(labels)

    def is_polite(self, text: str) -> bool:
        return self.vulgar_words.isdisjoint(re.findall(r"[a-z]+", text.lower()))

    def _count_articles(self) -> None:
        """
        How often glosses and examples say w (used), a w (indefinite), of w (bare), and a w, the w or of w (mentions);
        all but the first where the noun phrase ends with it: not `a stone wall`.
        """
        noun_phrase = re.compile(
            r"\b(an?|the|of|with|from|into) ([A-Za-z]+)"
            r"(?=[;,.)\"!?]|$| (?:of|or|and|in|for|that|with|to|on|is|was|by|from|at|which|who|used|made)\b)"
        )
        self.used, self.mentions, self.indefinite, self.bare = Counter(), Counter(), Counter(), Counter()
        for synset in self.synsets.values():
            text = "; ".join((synset.gloss, *synset.examples))
            self.used.update(re.findall(r"[A-Za-z]+", text))
            for before, word in noun_phrase.findall(text):
                self.mentions[word] += 1
                if before != "the":
                    (self.indefinite if before in ("a", "an") else self.bare)[word] += 1

    def is_countable(self, lemma: str) -> bool:
        """Whether one says `a w` rather than `w`: judged by use, else by the first gloss."""
        word, sense = self.surface(lemma, "n"), self.senses[lemma, "n"][0]
        a, bare = self.indefinite[word], self.bare[word]
        if a == 0 and re.search(r"[^aisu]s$", word):  # a plural: boxers
            return False
        if a + bare >= 3:
            return a >= 0.25 * (a + bare)
        if sense.lexfile == SUBSTANCE or any(p.symbol == "@i" for p in sense.pointers):  # @i: a name
            return False
        return sense.lexfile in THINGS or sense.gloss.startswith(("a ", "an ", "any ", "either ", "one ", "someone "))

    def plural(self, lemma: str) -> str:
        return self.irregular_plurals.get(lemma) or regular_plural(self.surface(lemma, "n"))

    def familiarity(self, lemma: str) -> int:
        """How often glosses use a noun. What is no thing, mostly an adjective or a verb too, must look like a noun."""
        used = self.used if self.senses[lemma, "n"][0].lexfile in THINGS | {FOOD} else self.mentions
        return used[lemma] + used[self.plural(lemma)]

    def surface(self, lemma: str, pos: str) -> str:
        """The word as it is written: new_york -> New York."""
        words = self.senses[lemma, pos][0].words
        return next((w for w in words if w.lower() == lemma), lemma).replace("_", " ")

    def ranked(self, pos: str) -> list[str]:
        """Lemmas by tag count; most have none, so ties go to the words that glosses themselves use most."""
        lemmas = (lemma for lemma, p in self.senses if p == pos)
        return sorted(lemmas, key=lambda w: (-self.counts[w, pos], -self.mentions[w], w))


def frequent_nouns(wordnet: WordNet, n: int = FREQUENT_NOUNS) -> list[str]:
    """The n nouns with the highest summed tag counts, as they are written: house, New York."""
    return [wordnet.surface(lemma, "n") for lemma in wordnet.ranked("n")[:n]]


def glosses(wordnet: WordNet, word: str, pos: str = "n") -> list[str]:
    """The gloss of every sense of `word`, most frequent first."""
    return [s.gloss for s in wordnet.senses.get((word.lower().replace(" ", "_"), pos), [])]
