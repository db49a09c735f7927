"""`megatron-hybrid data tokenize`: text files to an indexed file of tokens."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_hybrid.bounds import MOST_PROCESSES
from megatron_hybrid.commands.app import only_with
from megatron_hybrid.commands.options import ParseSpecialTokens


@only_with("chat", "chat_template")
@only_with("shuffle", "shuffle_seed", "shuffle_memory_gib")
def tokenize(
    inputs: Annotated[
        list[str],
        typer.Option("--input", help="a file or a glob; several may follow, or repeat the flag"),
    ],
    output: Annotated[
        Path, typer.Option(help="prefix of the files to write: PREFIX.bin, .idx and .meta.json")
    ],
    tokenizer_type: Annotated[Literal["sentencepiece", "huggingface", "null"], typer.Option()],
    tokenizer_model: Annotated[
        Path | None,
        typer.Option(help="a sentencepiece .model, or a tokenizer.json or its folder"),
    ] = None,
    more_inputs: Annotated[list[str] | None, typer.Argument(hidden=True, metavar="FILES")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="only for --tokenizer-type null")] = None,
    json_key: Annotated[
        str | None,
        typer.Option(help="key, or parquet column, of the text; by default text"),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="lines are conversations, with 'messages', or 'prompt' and 'completion': their "
            "text is by the chat template, and of it the assistant's turns are to be learnt",
        ),
    ] = False,
    chat_template: Annotated[
        Path | None, typer.Option(help="with --chat: a template's file, not the tokenizer's own")
    ] = None,
    parse_special_tokens: ParseSpecialTokens = False,
    encoder: Annotated[
        Literal["auto", "fastokens", "tokenizers"],
        typer.Option(help="library for huggingface; auto: the fastest that gives the same ids"),
    ] = "auto",
    append_eod: Annotated[
        bool | None,
        typer.Option(
            help="end each document with the tokenizer's end token; by default so, but for --chat"
        ),
    ] = None,
    shuffle: Annotated[bool, typer.Option(help="put the documents in a random order")] = True,
    shuffle_seed: Annotated[int, typer.Option(min=0, help="of that order")] = 1234,
    shuffle_memory_gib: Annotated[
        float, typer.Option(help="tokens held in memory while shuffling; what is more goes to disk")
    ] = 2.0,
    workers: Annotated[
        int | None,
        typer.Option(
            max=MOST_PROCESSES,
            help="processes that encode; by default one for each available CPU core",
        ),
    ] = None,
    max_rejected_fraction: Annotated[
        float, typer.Option(help="rejected lines per line above which nothing is written")
    ] = 0.001,
) -> None:
    """Tokenise JSONL (plain, gzip or zstd) and parquet into an indexed file.

    A document a line. The result depends neither on --workers nor on --shuffle-memory-gib. It
    appears whole or not at all; an older one of the same name stays until then (killed in that
    moment, it is put back by whatever reads it next). Files of other programs are not replaced.
    Lines that cannot be taken are listed, with reasons, in PREFIX_rejected.jsonl. With --chat a
    fourth file, PREFIX.mask, has a byte for each token: 1 where it is to be learnt.

    Disk: the output, beside the one it replaces; once more while documents are shuffled, if their
    tokens (2 bytes each below 65,500 ids, else 4) are more than --shuffle-memory-gib.
    """
    if chat and json_key is not None:
        raise typer.BadParameter("names a text; --chat reads whole lines", param_hint="--json-key")
    from megatron_hybrid.data.tokenizing.console import tokenize_on_console
    from megatron_hybrid.data.tokenizing.settings import TokenizeSettings

    tokenize_on_console(
        TokenizeSettings(
            inputs=(*inputs, *(more_inputs or ())),
            outputs={"messages" if chat else json_key or "text": output},
            rejected_path=Path(f"{output}_rejected.jsonl"),
            tokenizer_type=tokenizer_type,
            tokenizer_model=tokenizer_model,
            vocab_size=vocab_size,
            parse_special_tokens=parse_special_tokens,
            encoder=encoder,
            append_eod=not chat if append_eod is None else append_eod,
            shuffle_seed=shuffle_seed if shuffle else None,
            shuffle_memory_bytes=int(shuffle_memory_gib * 2**30),
            workers=workers if workers is not None else len(os.sched_getaffinity(0)),
            max_rejected_fraction=max_rejected_fraction,
            chat=chat,
            chat_template=chat_template,
        )
    )
