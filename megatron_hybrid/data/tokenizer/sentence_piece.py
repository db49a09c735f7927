"""sentencepiece models."""

from collections.abc import Sequence
from pathlib import Path

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.tokenizer.base import Tokenizer, read_tokenizer_file


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `.model`; `eod` is its eos piece.

    `encode_batch` is the plain loop: sentencepiece's own batch call measured no faster on one
    thread.
    """

    file_name = "tokenizer.model"

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        content = read_tokenizer_file(path)
        super().__init__({self.file_name: content})
        try:
            self._processor = SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(
                f"data.tokenizer_model={path} is not a sentencepiece model: {error}"
            ) from error
        self.vocab_size = self._processor.get_piece_size()
        self.eod = self._processor.eos_id()
        if self.eod < 0:
            raise DataError(
                f"data.tokenizer_model={path} has no eos piece, which must end documents; "
                "train it with eos_id >= 0"
            )

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        # A model may have more rows than the tokenizer has pieces.
        unknown = self._processor.unk_id()
        return self._processor.decode([i if 0 <= i < self.vocab_size else unknown for i in ids])
