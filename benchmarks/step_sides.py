"""The sides of `train_step.py`, each built and run in a process of its own: ours, peer, GEMM."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from step_model import (
    ADAM_EPS,
    BETAS,
    CLIP_GRAD,
    DTYPES,
    LEARNING_RATE,
    PEERS,
    SEED,
    WEIGHT_DECAY,
    Case,
    batch,
    imported_config,
)

from megatron_hybrid.ops.linear import product

# A step, run once a call; returns its loss.
Step = Callable[[], float]
GEMM_SIZE, GEMM_REPEATS = 2048, 4
GEMM_FLOPS = 2.0 * GEMM_SIZE**3 * GEMM_REPEATS


def ours(case: Case, folder: Path, resources: ExitStack) -> Step:
    """Our trainer's step on one rank: DDP, distributed optimizer, clipping, AdamW.

    Args:
        folder: `run` in it holds the peer's weights, imported.
    """
    from megatron_hybrid.checkpoint.files import find_checkpoint
    from megatron_hybrid.data.batch import Batch
    from megatron_hybrid.model.build import build_model_chunks
    from megatron_hybrid.model.transformer_config import transformer_config
    from megatron_hybrid.platform import initialize
    from megatron_hybrid.training.checkpoint import load_checkpoint
    from megatron_hybrid.training.distributed import process_groups
    from megatron_hybrid.training.optimizer import (
        LearningRate,
        build_optimizer,
        wrap_data_parallel,
    )
    from megatron_hybrid.training.step import BatchShape, Stepper

    platform, checkpoint = initialize(), find_checkpoint(folder / "run")
    config = imported_config(case, checkpoint)
    resources.enter_context(process_groups(config, platform))
    engine_config = transformer_config(config, "torch", platform.device)
    (chunk,) = build_model_chunks(config, engine_config, "torch")
    load_checkpoint(config, checkpoint, [chunk], None, weights_only=True)
    model = wrap_data_parallel(config, engine_config, [chunk])
    optimizer = build_optimizer(config, engine_config, model)
    LearningRate(config, optimizer).set(0)
    stepper = Stepper(config, model, optimizer, "torch", platform.device)
    tokens, labels = batch(case)
    one = Batch(tokens, labels, torch.ones(1, case.length), torch.arange(case.length)[None])
    data: Iterator[Batch] = itertools.repeat(one)
    shape = BatchShape(1, case.length)
    return lambda: stepper.train(data, shape, float("inf"), []).loss


def peer(case: Case, folder: Path, resources: ExitStack) -> Step:
    """The same step with Hugging Face transformers: SDPA, clipping, torch's fused AdamW.

    In bf16 its parameters, gradients and AdamW states are bf16 altogether, the fastest and smallest
    that it can do; ours keeps main parameters, gradients and states in fp32.
    """
    del resources
    from transformers import AutoModelForCausalLM

    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(PEERS[case.model]())
    model.save_pretrained(folder / "hf")
    model.config.use_cache = False  # of no use in training
    model = model.to(DTYPES[case.dtype]).train()
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            # NemotronH would raise step sizes to 0.001, which ours does not.
            module.time_step_limit = (0.0, float("inf"))
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=ADAM_EPS,
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )
    tokens, labels = batch(case)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(tokens, labels=labels, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD, foreach=True)
        optimizer.step()
        return float(loss.detach())

    return step


def gemm(case: Case, folder: Path, resources: ExitStack) -> Step:
    """Square matrix products, `GEMM_FLOPS` a step, by torch.mm and by oneDNN in turns.

    In fp32 torch.mm is MKL's, which is not the fastest on every processor.
    """
    del folder, resources
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE).to(DTYPES[case.dtype]) for _ in range(2))
    products = itertools.cycle([lambda: torch.mm(a, b.t()), lambda: product(a, b)])

    def step() -> float:
        multiply = next(products)
        for _ in range(GEMM_REPEATS):
            multiply()
        return 0.0

    return step


SIDES = {"ours": ours, "peer": peer, "gemm": gemm}


def serve(side: str, case: Case, folder: Path, pipe: Connection) -> None:
    """Build a side; for each message of the pipe run a step and answer (seconds, loss, peak MiB).

    The peak is VmHWM less the process's VmRSS with everything imported, before the model is built:
    what building and training the model adds, weights and optimizer included.
    """
    torch.set_num_threads(case.threads)
    _import_libraries(side)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    baseline_mib = resident_mib("VmRSS")
    with ExitStack() as resources:
        step = SIDES[side](case, folder, resources)
        pipe.send("ready")
        while pipe.recv():
            start = time.perf_counter()
            loss = step()
            seconds = time.perf_counter() - start
            pipe.send((seconds, loss, resident_mib("VmHWM") - baseline_mib))


def _import_libraries(side: str) -> None:
    """What a side imports, ahead of the memory baseline."""
    if side == "ours":
        from megatron_hybrid.platform import initialize

        initialize()
        import megatron_hybrid.training.trainer  # noqa: F401
    elif side == "peer":
        from transformers import FalconH1ForCausalLM, NemotronHForCausalLM  # noqa: F401


def resident_mib(field: str) -> float:
    """A field of /proc/self/status: VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{field}:")[1].split()[0]) / 1024
