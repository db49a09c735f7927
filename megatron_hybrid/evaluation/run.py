"""An evaluation: a checkpoint's model in a layout, what it is asked about, and the record of it."""

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_hybrid.checkpoint.errors import CheckpointError
from megatron_hybrid.checkpoint.files import find_checkpoint
from megatron_hybrid.checkpoint.saved_here import saved_here
from megatron_hybrid.config import RunConfig, rules
from megatron_hybrid.config.flags import parse_command_line
from megatron_hybrid.config.rules.evaluation import EVALUATED_DATA, EVALUATED_LAYOUT, WINDOWS
from megatron_hybrid.data.tokenizer import Tokenizer, load_tokenizer
from megatron_hybrid.errors import UserError
from megatron_hybrid.evaluation.own_data import OwnData
from megatron_hybrid.evaluation.sources import Documents, Tokens, check_ids, find_texts, find_tokens
from megatron_hybrid.evaluation.windows import Row, rows_of
from megatron_hybrid.generation.checkpoint import check_words, loaded_model, read_layout
from megatron_hybrid.platform.backend import resolve_backend
from megatron_hybrid.training.metrics import METRICS_FILE

KIND = "evaluation"


@dataclass(frozen=True)
class Asked:
    """What is to be evaluated.

    Attributes:
        inputs: text files by name or glob.
        prefixes: token files by prefix or glob. With neither: what the run itself evaluates on.
        json_key: of the text in a line of JSON, or in a row.
        append_eod: end each text with the end token.
        overlap: tokens that a window shares with the one before it.
        batch_size: rows of a forward pass on a rank.
    """

    inputs: Sequence[str] = ()
    prefixes: Sequence[str] = ()
    json_key: str = "text"
    append_eod: bool = True
    overlap: int = 0
    batch_size: int = 8
    parse_special_tokens: bool = False

    @property
    def texts(self) -> dict[str, Any]:
        """How texts become tokens, as far as it is not as by default."""
        names = ("json_key", "append_eod", "parse_special_tokens")
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value != getattr(Asked, name)}


@dataclass(frozen=True)
class Opened:
    """What was found of it, before any model is loaded.

    Attributes:
        folder: the checkpoint itself.
        changed: fields of the data that were said, with their values.
        documents: a source each; empty where it is the run's own data.
    """

    asked: Asked
    config: RunConfig
    folder: Path
    tokenizer: Tokenizer
    changed: Mapping[str, Any]
    documents: Sequence[Documents] = ()
    own: OwnData | None = None

    @property
    def tokens(self) -> int | None:
        """How many there are to read; None: texts are among them, which are yet to be encoded."""
        if self.own is not None:
            return self.own.tokens
        known = [each.source.tokens for each in self.documents if isinstance(each, Tokens)]
        return sum(known) if len(known) == len(self.documents) else None


def open_evaluation(
    checkpoint: Path, asked: Asked, words: Sequence[str], *, world_size: int
) -> Opened:
    """Find everything, without the engine.

    Args:
        checkpoint: a run's folder, its checkpoints', or one of them.
        words: of the layout and the data, such as `parallel.context_parallel_size=2`.

    Raises:
        UserError: the checkpoint, the layout or what is to be evaluated cannot be used.
    """
    own = not asked.inputs and not asked.prefixes
    known = (*EVALUATED_LAYOUT, WINDOWS, *(EVALUATED_DATA if own else ()))
    check_words(words, known, "evaluation" if own else "evaluation of files")
    folder = find_checkpoint(checkpoint)
    which = (*rules.EVALUATION, *(rules.OWN_DATA if own else ()))
    config = read_layout(folder, words, world_size=world_size, which=which)
    # A layout of TP is one of sequence parallelism too, as the experts' layers ask for.
    split = config.parallel.tensor_model_parallel_size > 1
    parallel = config.parallel.model_copy(update={"sequence_parallel": split})
    config = config.model_copy(update={"parallel": parallel})
    seq_length = config.data.seq_length
    if asked.overlap >= seq_length:
        raise UserError(
            f"--overlap {asked.overlap} must be less than {WINDOWS}={seq_length}, the tokens of a "
            f"window; allowed: 0 to {seq_length - 1}"
        )
    tokenizer = load_tokenizer(folder, parse_special_tokens=asked.parse_special_tokens)
    config = config.with_vocab_size(tokenizer.vocab_size)
    changed = {
        name: value
        for name, value in parse_command_line(words).values
        if name.startswith((*EVALUATED_DATA, WINDOWS))
    }
    if own:
        found = OwnData.find(config, folder, tokenizer, said=changed)
        return Opened(asked, config, folder, tokenizer, changed, own=found)
    documents = [
        *find_texts(asked.inputs, asked.json_key, tokenizer, append_eod=asked.append_eod),
        *find_tokens(asked.prefixes, tokenizer),
    ]
    return Opened(asked, config, folder, tokenizer, changed, documents)


def evaluate(opened: Opened, *, ranks: int, told: Callable[[int], None]) -> dict[str, Any]:
    """Losses by source: the record, the same on every rank.

    Args:
        ranks: that evaluate.
        told: called with the tokens that were read since the last time.

    Raises:
        UserError: the checkpoint cannot be loaded, or a file cannot be read.
    """
    asked, folder = opened.asked, opened.folder
    with loaded_model(opened.config, folder, opened.tokenizer, alone=ranks == 1) as (
        config,
        chunks,
    ):
        from megatron_hybrid.evaluation.losses import TokenLosses  # the engine is ready for it

        losses = TokenLosses(config, chunks, resolve_backend("auto"), asked.batch_size)
        if opened.own is not None:
            names = opened.own.names
            sums = losses.sums_of_batches(
                opened.own.calls(config, asked.batch_size, told), len(names)
            )
            counts: list[dict[str, int]] = [{} for _ in names]
        else:
            names = [each.name for each in opened.documents]
            read = _Rows(opened, told)
            sums = losses.sums(iter(read), len(names))
            counts = [
                {"documents": documents, "tokens_without_context": documents}
                for documents in read.documents
            ]
    sources = {
        name: _figures(*row) | count
        for name, row, count in zip(names, sums.tolist(), counts, strict=True)
    }
    return {
        "kind": KIND,
        "iteration": iteration_of(folder),
        "checkpoint": folder.name,
        "seq_length": opened.config.data.seq_length,
        "overlap": asked.overlap,
        "changed": {**opened.changed, **asked.texts},
        "sources": sources,
        "total": _figures(*sums.sum(dim=0).tolist())
        | {
            key: sum(count[key] for count in counts)
            for key in ("documents", "tokens_without_context")
            if opened.own is None
        },
    }


class _Rows:
    """The windows of all documents, and how many documents there were."""

    def __init__(self, opened: Opened, told: Callable[[int], None]) -> None:
        self._opened, self._told = opened, told
        self.documents = [0] * len(opened.documents)

    def __iter__(self) -> Iterator[Row]:
        seq_length = self._opened.config.data.seq_length
        for number, source in enumerate(self._opened.documents):
            for ids in source.documents():
                check_ids(ids, source.name, self._opened.tokenizer.vocab_size)
                self.documents[number] += bool(len(ids))
                self._told(len(ids))
                yield from rows_of(ids, seq_length, self._opened.asked.overlap, number)


def _figures(loss_sum: float, count: float) -> dict[str, Any]:
    """What JSON has no number for, as the loss of no token, is null."""
    loss = loss_sum / count if count else None
    perplexity = None
    if loss is not None and loss < math.log(sys.float_info.max):
        perplexity = math.exp(loss)
    return {"loss": loss, "perplexity": perplexity, "tokens": int(count)}


def iteration_of(folder: Path) -> int:
    """Of a checkpoint, by the name of its folder; 0 where that does not say."""
    number = folder.name.rpartition("_")[2]
    return int(number) if number.isdigit() else 0


def keep(record: dict[str, Any], folder: Path) -> Path | None:
    """Append a record to the metrics of the run that saved a checkpoint.

    Args:
        folder: the checkpoint itself.

    Returns:
        The file; None: there is none that may be written, or a kill has left half a line at its
        end, which a start of the run takes away; or no run has saved the checkpoint where it is.
    """
    folder = folder.resolve()
    with suppress(CheckpointError):  # what the list says when it is damaged is the run's to hear
        if folder.name not in saved_here(folder.parent):
            return None
    for place in list(folder.parents)[:2]:
        path = place / METRICS_FILE
        if path.is_file() and os.access(path, os.W_OK):
            return path if _append(path, record) else None
    return None


def where_kept(path: Path | None) -> str:
    """What to say of what `keep` gave."""
    if path is None:
        return "not recorded: no whole metrics.jsonl of the run that saved it"
    return f"recorded in {path}"


def _append(path: Path, record: dict[str, Any]) -> bool:
    """Whether a record could follow a whole line. It is no sign of life of the run, which the time
    of the file's last change is."""
    line = orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
    with path.open("ab+", buffering=0) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                return False
        before = os.fstat(file.fileno())
        file.write(line)  # one write, whole beside a run's own
        after = os.fstat(file.fileno())
        if after.st_size == before.st_size + len(line):  # the run has written nothing meanwhile
            with suppress(PermissionError):  # of somebody else's run
                os.utime(file.fileno(), ns=(after.st_atime_ns, before.st_mtime_ns))
    return True
