"""A smaller model's checkpoint, streamed: in memory are blocks of a few MiB, and what stays of each
axis. No model, no process group.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_hybrid.checkpoint import files
from megatron_hybrid.checkpoint.derived import (
    Advance,
    Beside,
    Written,
    nbytes,
    new_checkpoint,
    parts,
    written_tensors,
)
from megatron_hybrid.checkpoint.progress import COMPRESSION, Progress
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.checkpoint.threads import default_threads, in_threads
from megatron_hybrid.compression.choose import (
    hidden_channels,
    least_important_layers,
    of_kept,
    ranges,
)
from megatron_hybrid.compression.request import Request, depth_problems, problems, refusal
from megatron_hybrid.compression.scores import fingerprint_of, read_scores
from megatron_hybrid.compression.sizes import kept_layers, pruned_config, word_problems
from megatron_hybrid.compression.tensors import Made, PrunedTensors
from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.layers import layers
from megatron_hybrid.errors import UserError
from megatron_hybrid.fileio import write_atomic
from megatron_hybrid.model.counts import count_parameters
from megatron_hybrid.model.tensor_names import extra_states

PROVENANCE_FILE = "compression.json"


class Pruning:
    """A pruning of which everything is known but the bytes: nothing is written so far.

    Args:
        source: the parent's checkpoint, `.../iter_0000100`, saved by any layout.
        parent: what it holds.
        request: what is asked.
        save: the folder of checkpoints to be.
        words: changes of the config on top, as on a command line.
        scores: file of `compress score`, by which the most important stay.
        keep_first: without it, the first ones stay; the request is refused where neither is said.
        restart_schedule: the learning rate starts its schedule anew there.

    Attributes:
        kept: the layers that stay.
        config: of the smaller model.

    Raises:
        UserError: every reason why it cannot be done.
    """

    def __init__(
        self,
        source: Path,
        parent: RunConfig,
        request: Request,
        save: Path,
        words: Sequence[str] = (),
        *,
        scores: Path | None = None,
        keep_first: bool = False,
        restart_schedule: bool = True,
        threads: int | None = None,
    ) -> None:
        self.parent, self._request, self._save = parent, request, save
        self._threads = threads or default_threads()
        found = problems(parent.model, request, scored=scores is not None, keep_first=keep_first)
        found += word_problems(parent, words)
        with CheckpointReader(source) as reader:
            fingerprint = fingerprint_of(reader)
            self._scores = None
            if scores is not None:
                try:
                    self._scores = read_scores(scores, parent.model, fingerprint)
                except UserError as error:
                    found.append(str(error))
            if found:
                raise refusal(found)
            dropped = self._dropped()
            self.kept = kept_layers(parent.model, request, dropped)
            config = pruned_config(parent, request, self.kept, save, words)
            self._beside = Beside.find(
                reader, parent, config, restart_schedule=restart_schedule, threads=self._threads
            )
            self.config = self._beside.config
            hidden = hidden_channels(parent.model, self.config.model.hidden_size, self._scores)
            of_layers = {each.parent.number: of_kept(each, self._scores) for each in self.kept}
            self._tensors = PrunedTensors(
                reader, parent.model, self.config.model, self.kept, hidden, of_layers
            )
        self._provenance = {
            "from": str(source), "fingerprint": fingerprint,
            "scores": None if self._scores is None else str(scores),
            "parameters": [count_parameters(each.model).total for each in (parent, self.config)],
            "layers": [each.parent.number for each in self.kept],
            "hidden": ranges(hidden.tolist()),
            "of_layers": {
                str(number): {axis: ranges(each.tolist()) for axis, each in kept.items()}
                for number, kept in of_layers.items() if kept
            },
        }  # fmt: skip

    @property
    def progress(self) -> Progress | None:
        """Where the parent stood; None: unknown."""
        return self._beside.progress

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(nbytes(made) for made in self._tensors.made.values())

    def _dropped(self) -> set[int]:
        """Numbers of the layers that go."""
        request, count = self._request, len(layers(self.parent.model))
        if request.num_layers is None or request.num_layers == count:
            return set(request.drop_layers)
        assert self._scores is not None
        found = set(least_important_layers(self._scores, count - request.num_layers))
        what = f"--num-layers {request.num_layers}, which drops the least important ones,"
        if reasons := list(depth_problems(self.parent.model, found, what)):
            raise refusal(reasons)
        return found

    def write(self, advance: Advance = lambda done, total: None) -> Written:
        """Write the checkpoint, at the parent's step.

        Args:
            advance: told bytes written since the last call, and bytes in all.

        Raises:
            UserError: a file is damaged, or something is where it is to be; nothing that loads is
                left there.
        """
        tensors, save = self._tensors, self._save
        iteration = int(tensors.reader.common.get("iteration", 0))
        with tensors.reader as reader, new_checkpoint(save, iteration, "compress") as partial:
            self._write_tensors(partial, iteration, advance)
            reader.verify()
            text = json.dumps(self._provenance, indent=1) + "\n"
            write_atomic(partial / PROVENANCE_FILE, text)
            self._beside.write(partial, self._threads)
        return Written(files.iteration_folder(save, iteration), len(tensors.made), self.nbytes)

    def _write_tensors(self, folder: Path, iteration: int, advance: Advance) -> None:
        """All tensors and the index of them."""
        tensors, made = self._tensors, self._tensors.made
        origin = {name: self._provenance[name] for name in ("fingerprint", "scores")}
        common = self._beside.common(iteration, COMPRESSION, origin)
        states = extra_states(self.config.model)
        with written_tensors(folder, made, states, common, self._threads, advance) as write_part:

            def write(part: tuple[str, Made, int, int], file: int) -> None:
                name, each, start, stop = part
                write_part(file, name, start, stop, tensors.rows(each, start, stop))

            in_threads(parts(made.items()), write, self._threads)
