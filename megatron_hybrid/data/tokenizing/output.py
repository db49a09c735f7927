"""The indexed file of one key: documents go in as they are encoded, and out in their order."""

import shutil
from collections.abc import Callable

from megatron_hybrid.data.facts import Facts, InputFacts, TokenizerFacts
from megatron_hybrid.data.indexed import IndexedFileWriter, masked_dtype, token_dtype
from megatron_hybrid.data.part_file import writing
from megatron_hybrid.data.tokenizer import Tokenizer
from megatron_hybrid.data.tokenizing.encoder import Documents
from megatron_hybrid.data.tokenizing.settings import TokenizeSettings
from megatron_hybrid.data.tokenizing.shuffle import DocumentShuffler, shuffle_folder


class Output:
    """Collects the documents of one key and writes its `.bin`, `.idx` and `.meta.json`.

    Attributes:
        writer: publishes the three, after `finish`.
        documents: taken so far.
        empty: lines whose text had no token.
    """

    def __init__(self, settings: TokenizeSettings, key: str, tokenizer: Tokenizer) -> None:
        """Raises DataError if another process writes the same, or no file can be made."""
        self.documents = 0
        self._bytes = 0
        self.empty = 0
        prefix = settings.outputs[key]
        self._settings = settings
        self._tokenizer = tokenizer
        self.writer = IndexedFileWriter(prefix, tokenizer.vocab_size, with_mask=settings.chat)
        token = (masked_dtype if settings.chat else token_dtype)(tokenizer.vocab_size)
        runs = shuffle_folder(prefix)
        shutil.rmtree(runs, ignore_errors=True)  # a killed run's: the writer holds the lock
        self._shuffler: DocumentShuffler | None = None
        if settings.shuffle_seed is not None:
            self._shuffler = DocumentShuffler(
                runs,
                token.itemsize,
                settings.shuffle_seed,
                settings.shuffle_memory_bytes // len(settings.outputs),
            )

    def add(self, documents: Documents) -> None:
        """Take the next documents of the input; DataError where the disk refuses."""
        self.documents += len(documents.lengths)
        self._bytes += len(documents.tokens)
        self.empty += documents.empty
        if self._shuffler is None:
            self.writer.add_documents(documents.tokens, documents.lengths)
        else:
            with writing(self.writer.prefix):
                self._shuffler.add_documents(documents.tokens, documents.lengths)

    def finish(
        self, make_input_facts: Callable[[int], InputFacts], on_shuffled: Callable[[int, int], None]
    ) -> Facts:
        """Write all that is left and make it durable; DataError where the disk refuses.

        Args:
            make_input_facts: what was read, given the count of lines without a token.
            on_shuffled: called with the bytes written so far and in all, if they are shuffled.
        """
        if self._shuffler is not None:
            with writing(self.writer.prefix):
                done = 0
                for tokens, lengths in self._shuffler.documents():
                    self.writer.add_documents(tokens, lengths)
                    done += len(tokens)
                    on_shuffled(done, self._bytes)
            self._shuffler.discard()
        tokenizer, settings = self._tokenizer, self._settings
        facts = Facts(
            **vars(self.writer.finish()),
            tokenizer=TokenizerFacts(
                type=settings.tokenizer_type,
                fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                eod=tokenizer.eod,
                parse_special_tokens=settings.parse_special_tokens,
            ),
            append_eod=settings.append_eod,
            shuffle_seed=settings.shuffle_seed,
            input=make_input_facts(self.empty),
            chat_template=settings.open_chat(tokenizer).sha256 if settings.chat else None,
        )
        self.writer.attach(facts)
        return facts

    def discard(self) -> None:
        """Leave no trace, unless it was published."""
        if self._shuffler is not None:
            self._shuffler.discard()
        self.writer.discard()
