"""A teacher that runs on the job's own ranks, in the student's layout or in another one.

It runs up to its last hidden states; the logits are made of them where the student's are, by the
teacher's output layer in the student's parts of the vocabulary. So what goes from one layout to
another, or waits for the student's pipeline to come to a micro batch, is h numbers a token rather
than v.

Legend: b samples of the micro batch (with packed documents: one row), s tokens of a context
parallel rank, h the teacher's hidden size, v vocabulary of a tensor parallel rank of the student.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_hybrid.checkpoint.files import find_checkpoint
from megatron_hybrid.config import RunConfig
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.errors import ConfigError
from megatron_hybrid.layers.kl_divergence import Divergence, vocab_parallel_divergence
from megatron_hybrid.model.build import build_model_chunks
from megatron_hybrid.model.transformer_config import transformer_config
from megatron_hybrid.objectives.distillation import logits_of
from megatron_hybrid.platform import initialize
from megatron_hybrid.platform.engine_groups import further_groups, present_groups
from megatron_hybrid.teachers.config import shares_groups, teacher_config
from megatron_hybrid.teachers.head import OwnHead, load_head
from megatron_hybrid.teachers.relay import Relay, place
from megatron_hybrid.training.checkpoint import load_checkpoint
from megatron_hybrid.training.distributed import initialize_groups
from megatron_hybrid.training.step import local_batch, packed_seq_params, without_output_layer

if TYPE_CHECKING:
    from megatron_hybrid.objectives.distillation_options import Options, Teacher


@dataclass(frozen=True)
class FullAnswer:
    """The logits of every token, `[s, b, v]`."""

    logits: Tensor

    def divergence(
        self, logits: Tensor, labels: Tensor, tp_group: dist.ProcessGroup, options: "Options"
    ) -> Divergence:
        """As `objectives.distillation.Answer` says."""
        return vocab_parallel_divergence(
            logits, self.logits, labels, tp_group,
            forward_share=options.forward_share, temperature=options.temperature,
        )  # fmt: skip


class LiveTeacher:
    """The teacher of a run, built and loaded; it has no gradients and no optimizer.

    All ranks make it together, while the student's groups are in force. The run's random numbers
    stay as they were. Where the student has no pipeline and its layout is the teacher's, a micro
    batch is answered when the student comes to it; else all of a global batch are before.

    Args:
        offload: on a GPU, keep the weights in the host's memory but for the forward passes.
        layers: whose outputs are asked for; its layout is then the student's.
    """

    def __init__(
        self,
        config: RunConfig,
        options: "Teacher",
        backend: str,
        device: torch.device,
        *,
        offload: bool,
        layers: Sequence[int] = (),
    ) -> None:
        try:
            self.config = teacher_config(config, options, dist.get_world_size())
        except ConfigError as error:
            raise ConfigError(
                [f"the teacher {options.checkpoint}: {each}" for each in error.problems]
            ) from error
        self._backend, self._device = backend, device
        self._is_last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        assert options.checkpoint is not None
        folder, has_own = (
            find_checkpoint(options.checkpoint),
            not shares_groups(config, self.config),
        )
        if has_own:
            of_student = place()
            self._groups = further_groups(partial(initialize_groups, self.config, initialize()))
        else:
            self._groups = present_groups()
        with _same_random_numbers(), self._groups.in_force():
            engine_config = transformer_config(self.config, backend, device)
            [self._chunk] = build_model_chunks(self.config, engine_config, backend)
            load_checkpoint(self.config, folder, [self._chunk], None, weights_only=True)
            self._relay = (
                Relay(of_student, place(), device, split=self.config.parallel.sequence_parallel)
                if has_own
                else None
            )
        self._chunk.eval().requires_grad_(False)
        self._head: OwnHead | None = None
        if has_own:
            with _same_random_numbers():
                self._head = load_head(self.config, config, folder, backend, self._is_last_stage)
        self._offloads = offload and device.type == "cuda"
        self._host = {name: p.data.cpu().pin_memory() for name, p in self._weights()}
        if self._offloads:
            self._put_away()
        self._waits = not has_own and not self._offloads and self._stages() == 1
        self._asked: dict[tuple[int, ...], Batch] = {}
        self._hidden: dict[tuple[int, ...], Tensor] = {}
        self._states: dict[tuple[int, ...], dict[int, Tensor]] = {}
        self._running: tuple[int, ...] = ()  # the samples that are in the teacher
        for layer in unwrap_model(self._chunk).decoder.layers:
            if layer.layer_number in layers:
                layer.register_forward_hook(self._keep)

    @torch.no_grad()
    def look_ahead(self, micro_batches: Sequence[Batch], *, held_out: bool) -> None:
        """As `objectives.distillation.TeacherSource` says."""
        self._asked, self._hidden, self._states = {}, {}, {}
        names = [_samples(batch) for batch in micro_batches]
        if self._waits:
            self._asked = dict(zip(names, micro_batches, strict=True))
            return
        relay = self._relay
        own = list(micro_batches) if relay is None else relay.shared(micro_batches)
        with self._at_hand(), self._groups.in_force():
            found = self._run(own)
        if relay is not None:
            width = self.config.model.hidden_size
            found = relay.returned(found, micro_batches, width, self._dtype())
        if self._is_last_stage:
            self._hidden = dict(zip(names, found, strict=True))

    @torch.no_grad()
    def answer(self, samples: tuple[int, ...]) -> FullAnswer:
        """As `objectives.distillation.TeacherSource` says; of each micro batch once."""
        if self._head is not None:
            return FullAnswer(self._head(self._hidden.pop(samples)))
        self._run_asked(samples)
        with self._groups.in_force():
            hidden = self._hidden.pop(samples)
            return FullAnswer(logits_of(unwrap_model(self._chunk), hidden))

    @torch.no_grad()
    def state(self, samples: tuple[int, ...], layer: int) -> Tensor:
        """As `objectives.distillation.LayerSource` says; of each micro batch and layer once."""
        self._run_asked(samples)
        return self._states[samples].pop(layer)

    def _run_asked(self, samples: tuple[int, ...]) -> None:
        """Run the micro batch that is answered now, where it has not run."""
        if samples in self._asked:
            with self._groups.in_force():
                [self._hidden[samples]] = self._run([self._asked.pop(samples)])

    def _keep(self, layer: Any, inputs: Any, output: Any) -> None:
        """A forward hook of a layer: what it leaves, `[s, b, h]` or `[s / TP, b, h]`."""
        hidden = output[0] if isinstance(output, tuple) else output
        self._states.setdefault(self._running, {})[layer.layer_number] = hidden

    def _run(self, micro_batches: Sequence[Batch]) -> list[Tensor]:
        """Last hidden states of micro batches, on the teacher's last stage: `[s, b, h]`, or
        `[s / TP, b, h]`. Its groups are in force."""
        rows, length = micro_batches[0].tokens.shape
        found = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=iter(micro_batches),
            model=self._chunk,
            num_microbatches=len(micro_batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=True,
            collect_non_loss_data=True,
        )
        return list(found)

    def _forward(self, data: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
        """The engine's forward_step_func."""
        batch = next(data)
        self._running = _samples(batch)
        local = local_batch(batch, self._device)
        # What leaves the last stage stays of the model's own format.
        kept = {"fp32_output": False} if isinstance(model, Float16Module) else {}
        with without_output_layer(model):
            output = model(
                local.tokens, local.position_ids, None,
                packed_seq_params=packed_seq_params(batch, self._backend, self._device), **kept,
            )  # fmt: skip
        return output, _itself

    def _stages(self) -> int:
        return self.config.parallel.pipeline_model_parallel_size

    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.config.precision.weights == "bf16" else torch.float32

    def _weights(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return iter(self._chunk.named_parameters()) if self._offloads else iter(())

    def _put_away(self) -> None:
        for name, parameter in self._weights():
            parameter.data = self._host[name]

    @contextmanager
    def _at_hand(self) -> Iterator[None]:
        """Within it the weights are on the device."""
        for _, parameter in self._weights():
            parameter.data = parameter.data.to(self._device, non_blocking=True)
        try:
            yield
        finally:
            self._put_away()


def _itself(output: Tensor, non_loss_data: bool = False) -> Tensor:
    return output


def _samples(batch: Batch) -> tuple[int, ...]:
    assert batch.samples is not None, "the loader numbers samples"
    return batch.samples


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """What is drawn within leaves the run's generators as they were."""
    tracker = tensor_parallel.get_cuda_rng_tracker()
    states = tracker.get_states()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield
    tracker.set_states(states)
