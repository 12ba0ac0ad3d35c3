"""
The tiny model's tokenizer: byte-level BPE with DeepSeek-V3's special tokens and chat format.

    python tiny/tokenizer.py train.jsonl heldout.jsonl --out tiny/data

Trains on the first file, writes tiny/data/tokenizer/ and each file as tiny/data/<name>.npy: uint16, the conversations
one after the other, each from BOS to its last EOS. The same files give the same bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "inference"))

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm

from errors import Arguments, InputError, positive, run_command

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"  # ids 0, 1, 2
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
SPECIAL_TOKENS = [BOS, EOS, PAD, USER, ASSISTANT]

VOCAB_SIZE = 4096
MODEL_MAX_LENGTH = 2048
TRAINING_CONVERSATIONS = 100_000  # enough for the merges, few enough to hold in memory

# BOS system {<User> question <Assistant> answer EOS}*; system messages come first, wherever they are.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{{ messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\n\n') }}"
    "{% for message in messages %}"
    f"{{% if message['role'] == 'user' %}}{{{{ '{USER}' + message['content'] }}}}"
    f"{{% elif message['role'] == 'assistant' %}}{{{{ '{ASSISTANT}' + message['content'] + eos_token }}}}"
    "{% endif %}{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{ASSISTANT}' }}}}{{% endif %}}"
)


def render(messages: list[dict[str, str]]) -> str:
    """What CHAT_TEMPLATE gives, faster."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    turns = [
        USER + m["content"] if m["role"] == "user" else ASSISTANT + m["content"] + EOS
        for m in messages
        if m["role"] != "system"
    ]
    return BOS + system + "".join(turns)


def train(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Byte-level BPE with SPECIAL_TOKENS first; encoding plain text puts BOS before it, as DeepSeek's does."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """The two files that transformers' from_pretrained reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MODEL_MAX_LENGTH,
        "chat_template": CHAT_TEMPLATE,
    }
    with open(folder / "tokenizer_config.json", "w", encoding="utf-8") as file:
        json.dump(config, file, ensure_ascii=False, indent=2)
        file.write("\n")


def encode(conversations: Iterable[list[dict[str, str]]], tokenizer: Tokenizer) -> np.ndarray:
    """[n_tokens] uint16: the conversations, each <BOS ... EOS>."""
    texts, chunks = map(render, conversations), []
    while batch := list(islice(texts, 10_000)):
        ids = [e.ids for e in tokenizer.encode_batch_fast(batch, add_special_tokens=False)]
        chunks.append(np.fromiter((i for row in ids for i in row), np.uint16))
    return np.concatenate(chunks)


def read(path: Path) -> Iterator[list[dict[str, str]]]:
    with open(path, encoding="utf-8") as file:
        number = 0
        try:
            for number, line in enumerate(tqdm(file, desc=path.name, unit=" lines"), 1):  # noqa: B007, for the error
                yield json.loads(line)["messages"]
        except (ValueError, KeyError, TypeError):  # ValueError: also bytes that are no text, after that line
            raise InputError(f"{path} near line {number}: no conversation; tiny/corpus.py writes them") from None


def main() -> None:
    parser = Arguments(description="Train the tiny model's tokenizer and encode its training text.")
    parser.add_argument("corpora", type=Path, nargs="+", metavar="FILE", help="JSON lines; the first is trained on")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--vocab-size", type=positive, default=VOCAB_SIZE)
    options = parser.parse_args()
    if not all(path.is_file() and path.stat().st_size for path in options.corpora):
        raise InputError(f"{', '.join(map(str, options.corpora))}: missing or empty; tiny/corpus.py makes them")
    talks = islice(read(options.corpora[0]), TRAINING_CONVERSATIONS)
    tokenizer = train((message["content"] for talk in talks for message in talk), options.vocab_size)
    save(tokenizer, options.out / "tokenizer")
    for path in options.corpora:
        tokens = encode(read(path), tokenizer)
        np.save(options.out / f"{path.stem}.npy", tokens)
        print(f"{path}: {len(tokens):,} tokens, {np.count_nonzero(tokens == 0):,} conversations")


if __name__ == "__main__":
    run_command(main)
