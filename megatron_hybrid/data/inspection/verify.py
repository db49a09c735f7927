"""Whether an indexed pair is whole, fits its facts, and holds ids that its tokenizer has."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.facts import Facts, FileFacts, facts_path, read_facts
from megatron_hybrid.data.index import Index
from megatron_hybrid.data.indexed import indexed_paths, mask_path
from megatron_hybrid.data.inspection.check_index import IndexSums, check_index
from megatron_hybrid.data.inspection.check_tokens import TokenCheck
from megatron_hybrid.data.inspection.verdict import Verdict
from megatron_hybrid.data.tokenizer import Tokenizer

_CHUNK_BYTES = 1 << 22

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Expected:
    """What is known of a pair from elsewhere; None: nothing.

    Attributes:
        tokenizer: that is said to have made it.
        vocab_size: ids must lie below; by default what the tokenizer or the facts say.
    """

    tokenizer: Tokenizer | None = None
    vocab_size: int | None = None


@dataclass(frozen=True)
class _Contents:
    """What was found in the files of a pair; None: they could not be read."""

    bin: FileFacts | None
    idx: FileFacts | None
    index: Index | None
    sums: IndexSums | None
    highest_token: int | None

    @property
    def bin_bytes(self) -> int | None:
        return self.bin.bytes if self.bin is not None else None


def verify(prefix: Path, expected: Expected, on_bytes: OnBytes) -> Verdict:
    """Read both files of a pair to their ends and hold them against each other and the facts.

    Memory does not depend on their size.

    Args:
        on_bytes: called with the number of bytes that have been read since the last call.
    """
    verdict = Verdict(prefix)
    facts = _tried(verdict, lambda: read_facts(prefix))
    if facts is None and not verdict.problems:
        verdict.unchecked.append(
            f"checksums, counts, end tokens and the tokenizer: there is no {facts_path(prefix)}"
        )
    contents = _read(verdict, expected, facts, on_bytes)
    _check_sizes(verdict, contents)
    if facts is not None:
        _check_facts(verdict, facts, contents)
        _check_mask(verdict, facts, on_bytes)
    if expected.tokenizer is not None and facts is not None:
        _check_tokenizer(verdict, expected.tokenizer, facts)
    return verdict


def _tried[T](verdict: Verdict, read: Callable[[], T]) -> T | None:
    try:
        return read()
    except DataError as error:
        verdict.problems.append(str(error))
        return None


def _read(
    verdict: Verdict, expected: Expected, facts: Facts | None, on_bytes: OnBytes
) -> _Contents:
    bin_path, idx_path = indexed_paths(verdict.prefix)
    index = _tried(verdict, lambda: Index(verdict.prefix))
    sums, tokens = None, None
    if index is not None:
        sums = check_index(index, verdict)
        verdict.documents, verdict.tokens = index.documents, sums.tokens
        if sums.shortest >= 0:
            vocab_size = _vocab_size(verdict, expected, facts)
            eod = facts.tokenizer.eod if facts is not None and facts.append_eod else None
            tokens = TokenCheck(index, vocab_size, eod)
    idx = _hash(verdict, idx_path, on_bytes, lambda content: None)
    bin = _hash(verdict, bin_path, on_bytes, tokens.take if tokens else lambda content: None)
    if tokens is not None:
        tokens.report(verdict)
    return _Contents(bin, idx, index, sums, tokens.highest if tokens else None)


def _vocab_size(verdict: Verdict, expected: Expected, facts: Facts | None) -> int | None:
    if expected.vocab_size is not None:
        return expected.vocab_size
    if expected.tokenizer is not None:
        return expected.tokenizer.vocab_size
    if facts is not None:
        return facts.tokenizer.vocab_size
    verdict.unchecked.append("that ids lie in the vocabulary: its size is not known")
    return None


def _hash(
    verdict: Verdict, path: Path, on_bytes: OnBytes, take: Callable[[bytes], None]
) -> FileFacts | None:
    """Size and checksum of a file whose content goes to `take`; None: it cannot be read."""
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while content := file.read(_CHUNK_BYTES):
                digest.update(content)
                size += len(content)
                take(content)
                on_bytes(len(content))
    except FileNotFoundError:
        problem = f"{path} is missing"
    except OSError as error:
        problem = f"cannot read {path}: {error.strerror}"
    else:
        return FileFacts(size, digest.hexdigest())
    if problem not in verdict.problems:  # of the index, which has been opened before
        verdict.problems.append(problem)
    return None


def _check_sizes(verdict: Verdict, contents: _Contents) -> None:
    """The pair without its facts."""
    bin_path, idx_path = indexed_paths(verdict.prefix)
    if contents.index is None or contents.sums is None:
        return
    if not contents.index.documents:
        verdict.problems.append(f"{idx_path} describes no document")
    described = contents.sums.tokens * contents.index.dtype.itemsize
    if contents.bin_bytes not in (None, described):
        verdict.problems.append(
            f"{bin_path} has {contents.bin_bytes} bytes; {idx_path.name} describes {described}: "
            "the two are not from one run, or one was cut short"
        )


def _check_facts(verdict: Verdict, facts: Facts, contents: _Contents) -> None:
    about = facts_path(verdict.prefix).name
    bin_path, idx_path = indexed_paths(verdict.prefix)
    for path, found, said in (
        (bin_path, contents.bin, facts.bin),
        (idx_path, contents.idx, facts.idx),
    ):
        if found is not None:
            _compare(verdict, path, found, said)
    counts: dict[str, tuple[object, object]] = {}
    if contents.index is not None and contents.sums is not None:
        counts["dtype"] = (contents.index.dtype.name, facts.dtype)
        counts["documents"] = (contents.index.documents, facts.documents)
        counts["tokens"] = (contents.sums.tokens, facts.tokens)
        counts["longest_document_tokens"] = (contents.sums.longest, facts.longest_document_tokens)
    # Of a .bin of another size it would only say so once more.
    if contents.highest_token is not None and contents.bin_bytes == facts.bin.bytes:
        counts["highest_token"] = (contents.highest_token, facts.highest_token)
    verdict.problems += [
        f"{about} says {name}={there}; the files have {here}"
        for name, (here, there) in counts.items()
        if here != there
    ]
    read = facts.input
    if read.lines != facts.documents + read.empty + read.rejected:
        verdict.problems.append(
            f"{about} says input.lines={read.lines}; it must be the sum of documents="
            f"{facts.documents}, input.empty={read.empty} and input.rejected={read.rejected}"
        )


def _check_mask(verdict: Verdict, facts: Facts, on_bytes: OnBytes) -> None:
    """What is beside conversations: a byte for each token, 0 or 1."""
    about = facts_path(verdict.prefix).name
    if facts.mask is None:
        if facts.learnt_tokens is not None:
            verdict.problems.append(
                f"{about} says learnt_tokens={facts.learnt_tokens}, and no mask"
            )
        return
    path, learnt, others = mask_path(verdict.prefix), 0, 0

    def take(content: bytes) -> None:
        nonlocal learnt, others
        ones = content.count(1)
        learnt, others = learnt + ones, others + len(content) - ones - content.count(0)

    found = _hash(verdict, path, on_bytes, take)
    if found is None:
        return
    _compare(verdict, path, found, facts.mask)
    if facts.mask.bytes != facts.tokens:
        verdict.problems.append(
            f"{about} says mask.bytes={facts.mask.bytes}; it must be tokens={facts.tokens}"
        )
    if others:
        verdict.problems.append(f"{path} has {others} bytes that are neither 0 nor 1")
    if learnt != facts.learnt_tokens:
        verdict.problems.append(
            f"{about} says learnt_tokens={facts.learnt_tokens}; the files have {learnt}"
        )


def _compare(verdict: Verdict, path: Path, found: FileFacts, said: FileFacts) -> None:
    """A file against what its facts say of it."""
    about = facts_path(verdict.prefix).name
    if found.bytes != said.bytes:
        verdict.problems.append(f"{path} has {found.bytes} bytes; {about} says {said.bytes}")
    elif found != said:
        verdict.problems.append(
            f"{path} has SHA-256 {found.sha256[:12]}…; {about} says {said.sha256[:12]}…: its "
            "content has changed since it was written"
        )


def _check_tokenizer(verdict: Verdict, tokenizer: Tokenizer, facts: Facts) -> None:
    if tokenizer.fingerprint != facts.tokenizer.fingerprint:
        verdict.problems.append(
            f"{verdict.prefix} was made with another tokenizer "
            f"({facts.tokenizer.type}, fingerprint {facts.tokenizer.fingerprint[:12]}…) than the "
            f"one given ({tokenizer.fingerprint[:12]}…)"
        )
        return
    about = facts_path(verdict.prefix).name
    # A fingerprint is of the file with the vocabulary, which need not name the end token.
    verdict.problems += [
        f"{about} says tokenizer.{name}={said}; the tokenizer given has {has}"
        for name, has, said in (
            ("eod", tokenizer.eod, facts.tokenizer.eod),
            ("vocab_size", tokenizer.vocab_size, facts.tokenizer.vocab_size),
        )
        if has != said
    ]
