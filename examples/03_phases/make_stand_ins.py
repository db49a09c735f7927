#!/usr/bin/env python3
"""Make empty files of the sizes of a 15T-token run, to plan with before the data is there.

    python examples/03_phases/make_stand_ins.py [folder]      (default: data/nemotron_h)

The files are sparse: terabytes long, a few kilobytes on the disk. `megatron-hybrid data plan` looks
at sizes only, so it plans with them as with real ones; a run would train on zeros.
"""

import argparse
import os
import struct
from pathlib import Path

# Tokens of each source. The paper gives sft's; the others are made up, of a likely size.
SOURCES = {
    "web": 6_300 * 10**9,
    "crawl++": 500 * 10**9,
    "code": 1_100 * 10**9,
    "math": 250 * 10**9,
    "academic": 450 * 10**9,
    "multilingual": 600 * 10**9,
    "wiki": 25 * 10**9,
    "sft": 230 * 10**9,
}
SHARD_TOKENS = 10**12
DOCUMENT_TOKENS = 1000
BYTES_PER_TOKEN = 4  # int32, as for the 131,072 ids of the model's vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("data/nemotron_h"))
    folder = parser.parse_args().folder
    for name, tokens in SOURCES.items():
        shards = make_source(folder, name, tokens)
        print(f"{folder / name}_*: {tokens:,} tokens in {shards} shard{'s'[: shards - 1]}")


def make_source(folder: Path, name: str, tokens: int) -> int:
    """Make the shards of a source; their number."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [SHARD_TOKENS] * (tokens // SHARD_TOKENS)
    sizes += [tokens % SHARD_TOKENS] if tokens % SHARD_TOKENS else []
    for number, size in enumerate(sizes):
        make_shard(folder / f"{name}_{number}", size)
    return len(sizes)


def make_shard(prefix: Path, tokens: int) -> None:
    """A .bin that is a hole of `tokens` ids, and an .idx of two documents, the second short."""
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    bin_path.touch()
    os.truncate(bin_path, tokens * BYTES_PER_TOKEN)
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, 2, 3)
    # A document of more than 2**31 tokens has no length in this format; nobody asks for it here.
    lengths = struct.pack("<2i", min(tokens - DOCUMENT_TOKENS, 2**31 - 1), DOCUMENT_TOKENS)
    offsets = struct.pack("<2q", 0, (tokens - DOCUMENT_TOKENS) * BYTES_PER_TOKEN)
    idx_path.write_bytes(header + lengths + offsets + struct.pack("<3q", 0, 1, 2))


if __name__ == "__main__":
    main()
