"""What a process that will be killed runs; imports nothing that a test needs."""

from megatron_hybrid.data.tokenizing import TokenizeSettings, chunks, tokenize


def run(settings: TokenizeSettings, chunk_bytes: int) -> None:
    """Tokenise in small chunks."""
    chunks.CHUNK_BYTES = chunk_bytes
    tokenize(settings)
