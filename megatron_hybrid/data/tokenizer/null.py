"""Text that already is ids."""

import json
from collections.abc import Sequence

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.tokenizer.base import Tokenizer


class NullTokenizer(Tokenizer):
    """Text that already is ids, separated by spaces; `eod` is the last id of the vocabulary."""

    file_name = "null_tokenizer.json"

    def __init__(self, vocab_size: int) -> None:
        super().__init__({self.file_name: json.dumps({"vocab_size": vocab_size}).encode()})
        self.vocab_size = vocab_size
        self.eod = vocab_size - 1

    def encode(self, text: str) -> list[int]:
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            raise DataError(
                f"data.tokenizer_type=null needs ids separated by spaces: {error}"
            ) from error
        outside = next((token for token in ids if not 0 <= token < self.eod), None)
        if outside is not None:
            raise DataError(
                f"data.tokenizer_type=null: id {outside} must lie in 0 … {self.eod - 1} "
                f"(model.vocab_size={self.vocab_size}, its last id ends documents)"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(token) for token in ids)
