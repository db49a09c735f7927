"""What a folder of cached answers is: `cache.json`, and which samples are in which of its files.

Answers are kept by what a sample is, never by rank, batch or step: the folder has the plan of the
samples (`megatron_hybrid.data.plan`), in whose order they lie in blocks of some samples of one
length, a file each.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_hybrid.config.describe import shown
from megatron_hybrid.data.plan import Plan
from megatron_hybrid.errors import UserError
from megatron_hybrid.json_text import parse_json
from megatron_hybrid.small_files import naming, read_json

CACHE_FILE = "cache.json"
_FORMAT = "megatron-hybrid teacher's answers"
_VERSION = 1
_FOLDER_BLOCKS = 1000
# So that a killed worker loses seconds to minutes, and a trillion tokens are a million files.
_BLOCK_BYTES = 256 << 20
Part = Literal["train", "valid"]
Dtype = Literal["bf16", "fp32"]


class CacheError(UserError):
    """A folder of answers, or a file of it, that cannot be used."""


@dataclass(frozen=True)
class CacheSpec:
    """All that the bytes of the answers depend on, but for how a layout rounds.

    Attributes:
        teacher: `teacher_fingerprint` of its checkpoint.
        tokenizer: `Tokenizer.fingerprint`; eod: its end token.
        vocab_size: words of the vocabulary.
        packed_documents: whether documents of a sample see each other: `data.packed_documents`.
        conversations: whether samples are rows of conversations.
        temperature: of the mass of the tail.
        top_k: the most tokens kept of each.
        top_p: the probability that kept tokens need not exceed; None: always `top_k` of them.
        min_k: the fewest that are kept, with `top_p`.
        dtype: of kept logits.
        block_samples: by length of the samples, how many are in a file.
    """

    teacher: str
    tokenizer: str
    eod: int
    vocab_size: int
    packed_documents: bool
    conversations: bool
    temperature: float
    top_k: int
    top_p: float | None
    min_k: int
    dtype: Dtype
    block_samples: Mapping[str, int]

    @property
    def value_bytes(self) -> int:
        return 2 if self.dtype == "bf16" else 4

    @property
    def id_planes(self) -> int:
        """Bits of an id above its lowest 16."""
        return max(0, (self.vocab_size - 1).bit_length() - 16)

    def token_bytes(self) -> float:
        """Of a token of text, at most: `top_k` ids of 16 bits and more, and as many logits; what
        all sum up to, the tail and the teacher's loss, 4 bytes each; with `top_p`, 4 for the number
        of them."""
        kept = self.top_k * (2 + self.id_planes / 8 + self.value_bytes)
        return kept + 12 + (0 if self.top_p is None else 4)

    def with_blocks(self, lengths: set[int], samples: int | None) -> "CacheSpec":
        """With a number of samples a block, for each length; None: by size."""
        sizes = {
            str(length): samples or max(1, int(_BLOCK_BYTES / (self.token_bytes() * length)))
            for length in sorted(lengths)
        }
        return replace(self, block_samples=sizes)


class Block(NamedTuple):
    """Samples of one file: `[first_sample, end_sample)` of a part's plan."""

    part: Part
    number: int
    first_sample: int
    end_sample: int
    seq_length: int


@dataclass(frozen=True)
class Cache:
    """A folder of answers.

    Attributes:
        plans: of training, and of evaluations where the run has any.
    """

    folder: Path
    spec: CacheSpec
    plans: Mapping[Part, Plan]

    @cached_property
    def _stretches(self) -> dict[Part, list[Block]]:
        """By part, its stretches as if each was one block; the number is that of its first."""
        found: dict[Part, list[Block]] = {}
        for part, plan in self.plans.items():
            number, rows = 0, []
            for each in plan.stretches:
                rows.append(
                    Block(part, number, each.first_sample, each.end_sample, each.seq_length)
                )
                number += math.ceil((each.end_sample - each.first_sample) / self._size(rows[-1]))
            found[part] = rows
        return found

    def _size(self, stretch: Block) -> int:
        return self.spec.block_samples[str(stretch.seq_length)]

    def blocks(self) -> Iterator[Block]:
        """All of them, in order."""
        for stretches in self._stretches.values():
            for stretch in stretches:
                for first in range(stretch.first_sample, stretch.end_sample, self._size(stretch)):
                    yield self._block(stretch, first)

    def block_of(self, part: Part, sample: int) -> Block:
        """The block that a sample of a part's plan is in."""
        stretch = next(each for each in self._stretches[part] if sample < each.end_sample)
        return self._block(stretch, sample)

    def _block(self, stretch: Block, sample: int) -> Block:
        size = self._size(stretch)
        number = (sample - stretch.first_sample) // size
        first = stretch.first_sample + number * size
        end = min(first + size, stretch.end_sample)
        return Block(stretch.part, stretch.number + number, first, end, stretch.seq_length)

    def path(self, block: Block) -> Path:
        """Its file."""
        return self.folder / self.name(block)

    def name(self, block: Block) -> str:
        """Of its file, below the folder."""
        folder = f"{block.number // _FOLDER_BLOCKS:05d}"
        return f"{block.part}/{folder}/{block.number:09d}.answers"

    @property
    def tokens(self) -> int:
        """Of all samples."""
        return sum(plan.tokens for plan in self.plans.values())

    def to_json(self) -> str:
        """The content of `cache.json`."""
        plans = {part: parse_json(plan.to_json()) for part, plan in self.plans.items()}
        content = {"format": _FORMAT, "version": _VERSION} | asdict(self.spec) | {"plans": plans}
        return json.dumps(content, indent=1) + "\n"

    @cached_property
    def digest(self) -> bytes:
        """Of `cache.json`, 32 bytes."""
        return hashlib.sha256(self.to_json().encode()).digest()

    def differences(self, other: "Cache") -> Iterator[str]:
        """What another one has otherwise: a sentence each."""
        ours, theirs = asdict(self.spec), asdict(other.spec)
        differ = (name for name in ours if ours[name] != theirs[name])
        yield from (f"{name}={shown(theirs[name])} was {shown(ours[name])}" for name in differ)
        if self.plans.keys() != other.plans.keys():
            yield f"parts {', '.join(other.plans)} were {', '.join(self.plans)}"
        for part in self.plans.keys() & other.plans.keys():
            was, now = self.plans[part], other.plans[part]
            if was != now:
                names = ("seed", "sources", "phases", "stretches")
                others = [name for name in names if getattr(was, name) != getattr(now, name)]
                yield f"the plan of {part} is of other samples: its {', '.join(others)} differ"


def read_cache(folder: Path) -> Cache:
    """A folder of answers, by its `cache.json`.

    Raises:
        CacheError: there is none, or it is damaged or of another version.
    """
    path = folder / CACHE_FILE
    if not path.exists():
        raise CacheError(
            f"{folder} has no {CACHE_FILE}: it is no folder of `megatron-hybrid distill cache`"
        )
    content: dict[str, Any] = read_json(path, CacheError)
    with naming(path, CacheError):
        made = content.pop("format"), content.pop("version")
        if made != (_FORMAT, _VERSION):
            raise ValueError(f"format and version {made}; allowed: {(_FORMAT, _VERSION)}")
        plans = {
            part: Plan.from_json(json.dumps(plan)) for part, plan in content.pop("plans").items()
        }
        spec = CacheSpec(**content)
        if set(plans) - {"train", "valid"} or "train" not in plans:
            raise ValueError(f"parts {', '.join(plans)}; allowed: train and valid")
        _refuse_what_no_spec_is(spec, plans)
        return Cache(folder, spec, plans)


def _refuse_what_no_spec_is(spec: CacheSpec, plans: Mapping[Any, Plan]) -> None:
    whole = (spec.eod, spec.vocab_size, spec.top_k, spec.min_k, *spec.block_samples.values())
    if any(type(each) is not int or each < 0 for each in whole):
        raise ValueError("a number is not whole, or below 0")
    if not 1 <= spec.min_k <= spec.top_k <= spec.vocab_size:
        raise ValueError(
            f"top_k={spec.top_k} of {spec.vocab_size} words, and at least {spec.min_k}"
        )
    if spec.dtype not in ("bf16", "fp32"):
        raise ValueError(f"dtype {spec.dtype!r}; allowed: bf16, fp32")
    if not isinstance(spec.temperature, int | float) or not spec.temperature > 0:
        raise ValueError(f"temperature {spec.temperature!r}")
    lengths = {str(each.seq_length) for plan in plans.values() for each in plan.stretches}
    if lengths - {name for name, size in spec.block_samples.items() if size}:
        raise ValueError(f"block_samples lacks lengths of {', '.join(sorted(lengths))}")
