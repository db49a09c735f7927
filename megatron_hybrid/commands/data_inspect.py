"""`megatron-hybrid data verify | stats | show`: a look at indexed files."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from megatron_hybrid.data.inspection.show import Document
    from megatron_hybrid.data.inspection.verdict import Verdict
    from megatron_hybrid.data.tokenizer import Tokenizer

_TABLE_WIDTH = 118

Prefixes = Annotated[
    list[str],
    typer.Argument(
        metavar="PREFIX...",
        help="the files' path without .bin and .idx, or a glob",
        show_default=False,
    ),
]
TokenizerModel = Annotated[
    Path | None,
    typer.Option(help="sentencepiece .model, tokenizer.json or its folder, or a checkpoint"),
]
TokenizerType = Annotated[
    Literal["sentencepiece", "huggingface", "null"] | None,
    typer.Option(help="by default what the facts, or else the name of the model, say"),
]
VocabSize = Annotated[int | None, typer.Option(min=2, help="ids must lie below it")]


def verify(
    prefixes: Prefixes,
    tokenizer_model: TokenizerModel = None,
    tokenizer_type: TokenizerType = None,
    vocab_size: VocabSize = None,
) -> None:
    """Check that indexed files are whole and unchanged, reading every byte.

    Sizes, checksums and counts against the facts (.meta.json); lengths, offsets and document marks
    of the .idx against each other; ids against the vocabulary; end tokens. Every problem is listed
    with its file and place, and the exit code is 1 if there is one. Files without facts, as
    Megatron-LM writes them, are checked for what can be.
    """
    from megatron_hybrid.data.indexed import indexed_paths, mask_path
    from megatron_hybrid.data.inspection.prefixes import find_prefixes
    from megatron_hybrid.data.inspection.verify import Expected
    from megatron_hybrid.data.inspection.verify import verify as verify_pair
    from megatron_hybrid.data.progress import show_progress

    found = find_prefixes(prefixes)
    tokenizer = _open_tokenizer(tokenizer_model, tokenizer_type, vocab_size, found)
    files = [path for prefix in found for path in (*indexed_paths(prefix), mask_path(prefix))]
    total, done = sum(path.stat().st_size for path in files if path.is_file()), 0
    with show_progress("verify") as on_progress:

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            on_progress("verify", done, total)

        expected = Expected(tokenizer, vocab_size)
        verdicts = [verify_pair(prefix, expected, on_bytes) for prefix in found]
    for verdict in verdicts:
        _print_verdict(verdict)
    if any(verdict.problems for verdict in verdicts):
        raise typer.Exit(1)


def _print_verdict(verdict: "Verdict") -> None:
    count = len(verdict.problems)
    if count:
        print(f"{verdict.prefix}: {count} problem{'s'[: count - 1]}")
    else:
        print(
            f"{verdict.prefix}: good, {verdict.documents:,} documents of {verdict.tokens:,} tokens"
        )
    for problem in verdict.problems:
        print(f"  - {problem}")
    for unchecked in verdict.unchecked:
        print(f"  not checked: {unchecked}")


def stats(
    prefixes: Prefixes,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="where the picture goes, a PNG")
    ] = Path("document_lengths.png"),
) -> None:
    """Count documents and tokens, and draw how long the documents are."""
    from rich.console import Console

    from megatron_hybrid.data.inspection.plot import plot_lengths
    from megatron_hybrid.data.inspection.prefixes import find_prefixes
    from megatron_hybrid.data.inspection.stats import lengths_table, read_lengths
    from megatron_hybrid.data.part_file import writing

    lengths = read_lengths(find_prefixes(prefixes))
    console = Console(markup=False)  # of names of files
    # Wide enough for every column, where the output is a file too.
    console.width = max(console.width, _TABLE_WIDTH)
    console.print(lengths_table(lengths))
    with writing(output, "there is no picture"):
        plot_lengths(lengths, output)
    print(f"picture: {output}")


def show(
    prefix: Annotated[str, typer.Argument(help="the files' path without .bin and .idx")],
    numbers: Annotated[list[int], typer.Argument(metavar="N...", help="documents, from 0")],
    tokens: Annotated[bool, typer.Option("--tokens", help="ids instead of text")] = False,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="of conversations, tokens coloured by whether they are learnt; between "
            "⟦ and ⟧ are the learnt ones where there are no colours",
        ),
    ] = False,
    tokenizer_model: TokenizerModel = None,
    tokenizer_type: TokenizerType = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=2, help="only for --tokenizer-type null")
    ] = None,
) -> None:
    """Print documents, decoded with the tokenizer that made them."""
    from megatron_hybrid.data.inspection.prefixes import find_prefixes
    from megatron_hybrid.data.inspection.show import as_text, read_documents, tokenizer_of

    asked = {
        "--tokenizer-model": tokenizer_model, "--tokenizer-type": tokenizer_type,
        "--vocab-size": vocab_size,
    }  # fmt: skip
    for name, value in asked.items():
        if tokens and value is not None:
            raise typer.BadParameter("not with --tokens, which prints ids", param_hint=name)
    if vocab_size is not None and tokenizer_type != "null":
        raise typer.BadParameter("only with --tokenizer-type null", param_hint="--vocab-size")
    found = find_prefixes([prefix])
    if len(found) > 1:
        raise typer.BadParameter(f"{prefix} matches {len(found)} prefixes; name one")
    documents = read_documents(found[0], numbers)
    if chat and documents[0].learnt is None:
        raise typer.BadParameter(
            f"{found[0]} holds no conversations of `data tokenize --chat`", param_hint="--chat"
        )
    tokenizer = None
    if not tokens:
        given = _open_tokenizer(tokenizer_model, tokenizer_type, vocab_size, found)
        tokenizer = tokenizer_of(found[0], given)
    for document in documents:
        if chat:
            _print_conversation(document, tokenizer)
            continue
        if tokenizer is None:
            text = " ".join(map(str, document.ids.tolist()))
        else:
            text = as_text(document, tokenizer)
        print(f"document {document.number}: {len(document.ids):,} tokens", file=sys.stderr)
        print(_harmless(text) if sys.stdout.isatty() else text)


def _print_conversation(document: "Document", tokenizer: "Tokenizer | None") -> None:
    """A conversation, its learnt tokens apart from the others; as ids without a tokenizer."""
    from rich.console import Console
    from rich.text import Text

    from megatron_hybrid.data.inspection.show import check_ids

    assert document.learnt is not None
    if tokenizer is not None:
        check_ids(document, tokenizer)
    console = Console(soft_wrap=True, highlight=False)
    coloured = console.is_terminal and not console.no_color
    shown = Text()
    for ids, learnt in document.stretches():
        words = ids.tolist()
        text = tokenizer.decode(words) if tokenizer else " ".join(map(str, words)) + " "
        text = _harmless(text) if console.is_terminal else text
        if coloured:
            shown.append(text, "bold green" if learnt else "dim")
        else:
            shown.append(f"⟦{text}⟧" if learnt else text)
    learnt_tokens = int(document.learnt.sum())
    print(
        f"conversation {document.number}: {len(document.ids):,} tokens, {learnt_tokens:,} learnt",
        file=sys.stderr,
    )
    console.print(shown)


def _harmless(text: str) -> str:
    """Control characters as escapes: some of them tell a terminal to do things."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text
    )


def _open_tokenizer(
    model: Path | None, tokenizer_type: str | None, vocab_size: int | None, prefixes: list[Path]
) -> "Tokenizer | None":
    """The tokenizer of the options; None if there are none."""
    from megatron_hybrid.data.tokenizer import (
        SentencePieceTokenizer,
        build_tokenizer,
        load_tokenizer,
    )
    from megatron_hybrid.data.tokenizing.settings import naming_flags

    if model is None and tokenizer_type not in (None, "null"):
        raise typer.BadParameter(
            f"{tokenizer_type} needs --tokenizer-model", param_hint="--tokenizer-type"
        )
    if model is not None and tokenizer_type == "null":
        raise typer.BadParameter("reads ids: no --tokenizer-model", param_hint="--tokenizer-type")
    if model is None and tokenizer_type is None:
        return None
    said = tokenizer_type or _type_in_facts(prefixes)
    with naming_flags():
        if model is None:
            return build_tokenizer("null", None, vocab_size=vocab_size)
        if model.is_dir() and said != "huggingface":
            if tokenizer_type is None:
                return load_tokenizer(model)
            model = model / SentencePieceTokenizer.file_name
        if said in (None, "null"):  # facts of ids that were written as text, of no file
            said = "sentencepiece" if model.name.endswith(".model") else "huggingface"
        return build_tokenizer(said, model)


def _type_in_facts(prefixes: list[Path]) -> str | None:
    """The tokenizer's type that the facts of one of the prefixes give."""
    from megatron_hybrid.data.errors import DataError
    from megatron_hybrid.data.facts import read_facts

    for prefix in prefixes:
        # Damaged facts are for the command to report.
        with suppress(DataError):
            facts = read_facts(prefix)
            if facts is not None:
                return facts.tokenizer.type
    return None
