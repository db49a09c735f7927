"""Text to indexed files: read, encode in several processes, shuffle, write whole or not at all.

inputs      which files, of which format; did they change meanwhile
chunks      a file cut into pieces that end where a line ends
records     lines and rows to texts; what is wrong with the others
encoder     the texts of a chunk to ids
workers     chunks to ids in several processes, in the order of the input
shuffle     documents in a random order, within a bounded memory
quarantine  the lines that were not taken, and why
pipeline    all of it
"""

from megatron_hybrid.data.tokenizing.pipeline import tokenize
from megatron_hybrid.data.tokenizing.settings import TokenizeReport, TokenizeSettings

__all__ = ["TokenizeReport", "TokenizeSettings", "tokenize"]
