"""What every tokenizer does: text to ids and back."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.indexed import token_dtype
from megatron_hybrid.fileio import write_atomic

# "auto": fastokens where it can read the tokenizer's file and agrees with tokenizers.
ENCODERS = ("auto", "fastokens", "tokenizers")


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        vocab_size: ids lie in `[0, vocab_size)`.
        eod: the id that ends a document; `encode` never yields it.
        fingerprint: sha256 (hex) of the tokenizer's file.
    """

    file_name: str
    vocab_size: int
    eod: int
    fingerprint: str

    def __init__(self, files: dict[str, bytes]) -> None:
        self._files = files
        self.fingerprint = hashlib.sha256(files[self.file_name]).hexdigest()

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that `save_copy` writes."""
        return tuple(self._files)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without begin or end markers."""

    def around_texts(self) -> str | None:
        """What to say where transformers begins or ends each text with more; None: nothing."""
        return None

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; of one that it does not have, nothing, or what stands for unknown."""

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray, NDArray[np.int32]]:
        """What `encode` gives for each of many texts, in one thread.

        Returns:
            The ids of all texts end to end, `token_dtype(vocab_size)`, and `[len(texts)]` lengths
            in ids. No end-of-document ids are added. The arrays may be read-only.
        """
        rows = [self.encode(text) for text in texts]
        lengths = np.fromiter(map(len, rows), dtype=np.int32, count=len(rows))
        ids = np.array([token for row in rows for token in row], token_dtype(self.vocab_size))
        return ids, lengths

    def select_encoder(self, choice: str, sample: Sequence[str] = ()) -> str:
        """Choose the library behind `encode_batch`; until then it is that of `encode`.

        Args:
            choice: one of `ENCODERS`.
            sample: texts of the actual input, on which a faster library must agree as well.

        Returns:
            The name of the library chosen, which is a valid `choice` for another process.

        Raises:
            DataError: `choice` cannot be had for this tokenizer, or is unknown.
        """
        if choice not in ENCODERS:
            raise DataError(f"encoder={choice} is unknown; allowed: {', '.join(ENCODERS)}")
        if choice != "auto":
            raise DataError(f"encoder={choice} needs data.tokenizer_type=huggingface")
        return "auto"

    def save_copy(self, folder: Path) -> None:
        """Write what `load_tokenizer` needs into `folder`, byte for byte as it was read."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            write_atomic(folder / name, content)


def read_tokenizer_file(path: Path) -> bytes:
    """The content of `data.tokenizer_model`; DataError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read data.tokenizer_model={path}: {error.strerror}") from error
