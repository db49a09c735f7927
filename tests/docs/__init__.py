"""The documentation: where the pages are, and what they consist of."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
