"""What `data_tokenize.py` encodes, and with which tokenizer: both made on the machine that runs it.

The corpus is text that comes with any Python: sources and documentation. The tokenizer is Mistral's
tekken, of 131,072 ids and 1000 special tokens, from the wheel of mistral-common; without a package
index, a byte-pair encoding of as many ids is trained on the corpus.
"""

import base64
import gzip
import json
import random
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

VOCAB_SIZE = 131_072
SPECIAL_TOKENS = 1000
END_TOKEN = "</s>"
_WHEEL = "mistral-common==1.13.1"
_TEKKEN = "mistral_common/data/tekken_240718.json"
_TEXT_SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt", ".html", ".json", ".h", ".hpp", ".c", ".js",
                  ".css", ".toml", ".yaml", ".xml", ".po", ".gz"}  # fmt: skip
_SHORTEST, _LONGEST = 100, 300_000  # characters


def make_corpus(path: Path, megabytes: int) -> None:
    """Write about so many megabytes of text as JSONL, a file a document, in a fixed random order.

    SystemExit if the machine does not have as much.
    """
    roots = [sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"), "/usr/share", "/usr/lib"]
    files = [
        file
        for root in roots
        for file in sorted(Path(root).rglob("*"))
        if file.suffix in _TEXT_SUFFIXES and file.is_file() and not file.is_symlink()
    ]
    random.Random(0).shuffle(files)
    left = megabytes * 10**6
    with path.open("wb") as output:
        for text in _texts(files):
            line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
            output.write(line)
            left -= len(line)
            if left <= 0:
                return
    raise SystemExit(f"only {path.stat().st_size / 1e6:.0f} MB of text here; give --corpus")


def _texts(files: list[Path]) -> Iterator[str]:
    for file in files:
        try:
            content = file.read_bytes()
            text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode()
        except (OSError, EOFError, UnicodeDecodeError):
            continue
        if _SHORTEST <= len(text) <= _LONGEST:
            yield text


def make_tokenizer(folder: Path, corpus: Path) -> str:
    """Write a `tokenizer.json` of 131,072 ids into `folder`; gives what it is."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    if subprocess.run([*wheel, _WHEEL], check=False).returncode == 0:
        (archive,) = folder.glob("*.whl")
        with zipfile.ZipFile(archive) as file:
            tokenizer = _from_tekken(json.loads(file.read(_TEKKEN)))
        name = f"tekken of {_WHEEL}"
    else:
        tokenizer, name = _train(corpus), "trained on the corpus"
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_TOKEN}))
    return name


def _special_tokens() -> list[AddedToken]:
    named = ["<unk>", "<s>", END_TOKEN, "[INST]", "[/INST]"]
    numbered = [f"<SPECIAL_{number}>" for number in range(len(named), SPECIAL_TOKENS)]
    return [AddedToken(text, special=True, normalized=False) for text in (*named, *numbered)]


def _from_tekken(tekken: dict) -> tokenizers.Tokenizer:
    """Ranks of byte strings, as tiktoken has them, to a vocabulary and merges."""
    count = VOCAB_SIZE - SPECIAL_TOKENS
    tokens = [base64.b64decode(entry["token_bytes"]) for entry in tekken["vocab"][:count]]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    letters = bytes_to_unicode()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    special = _special_tokens()
    vocabulary = {token.content: number for number, token in enumerate(special)}
    vocabulary |= {spelled(token): SPECIAL_TOKENS + rank for token, rank in ranks.items()}
    pairs = [_last_merge(token, ranks) for token in tokens if len(token) > 1]
    merges = [(spelled(left), spelled(right)) for left, right in pairs]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    _set_up(tokenizer, tekken["config"]["pattern"])
    tokenizer.add_special_tokens(special)
    return tokenizer


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that a token is merged from, found by merging what is ranked before it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(parts[i] + parts[i + 1], VOCAB_SIZE) for i in range(len(parts) - 1)]
        first = pairs.index(min(pairs))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]


def _train(corpus: Path) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    # GPT-2's words, with numbers of up to three digits, as Llama 3 has them.
    _set_up(tokenizer, r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=_special_tokens(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with corpus.open("rb") as file:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in file), trainer)
    return tokenizer


def _set_up(tokenizer: tokenizers.Tokenizer, pattern: str) -> None:
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    tokenizer.decoder = decoders.ByteLevel()
