"""The sides of `generate.py`, each in a process of its own: ours, and transformers' `generate`."""

import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from step_sides import resident_mib

SEED = 1234
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """Requests of one run.

    Attributes:
        prompt: tokens of each prompt, or of the longest where they are ragged.
        batch: sequences at once; ragged: of twice as many requests.
        ragged: prompts from an eighth of the length on, a quarter to all of the new tokens.
    """

    model: str
    dtype: str
    prompt: int
    batch: int
    ragged: bool
    new_tokens: int
    threads: int

    def requests(self, vocab_size: int) -> list[tuple[list[int], int]]:
        """Prompts and how many tokens follow each, the same on both sides."""
        draws = random.Random(f"{SEED}/{self.prompt}/{self.batch}/{self.ragged}")
        requests = []
        for _ in range(2 * self.batch if self.ragged else self.batch):
            length, new = self.prompt, self.new_tokens
            if self.ragged:
                length = draws.randint(max(length // 8, 1), length)
                new = draws.randint(max(new // 4, 1), new)
            requests.append(([draws.randrange(vocab_size) for _ in range(length)], new))
        return requests


@dataclass(frozen=True)
class Run:
    """One run: seconds to the first token of all (equal lengths only), and in all; the tokens."""

    prefill_s: float
    seconds: float
    tokens: list[list[int]]


# What it is asked for -> what answers that for a case: "run", and of ours "bound".
Side = dict[str, Callable[[Case], Any]]


def ours(folder: Path, dtype: str, resources: ExitStack) -> Side:
    """Our engine, with as many slots as the batch and room for its tokens."""
    from generate_bound import bound

    from megatron_hybrid.config.sections import PrecisionConfig
    from megatron_hybrid.generation import Generator, Limits, SamplingParams
    from megatron_hybrid.generation.checkpoint import loaded_model, read_checkpoint

    config, checkpoint, tokenizer = read_checkpoint(folder / "run")
    config = config.model_copy(update={"precision": PrecisionConfig(recipe=dtype)})
    config, chunks = resources.enter_context(loaded_model(config, checkpoint, tokenizer))

    def engine_for(case: Case) -> Any:
        page = Limits.page_tokens
        room = -(-(case.prompt + case.new_tokens) // page) * page
        limits = Limits(max_sequences=case.batch, max_tokens=case.batch * room)
        return Generator.of_model(config, chunks, tokenizer, limits=limits).engine

    def run(case: Case) -> Run:
        engine = engine_for(case)
        requests = case.requests(tokenizer.vocab_size)
        start = time.perf_counter()
        for prompt, new in requests:
            engine.submit(prompt, SamplingParams(max_new_tokens=new, ignore_eod=True))
        tokens: list[list[int]] = [[] for _ in requests]
        began, prefill_s = 0, 0.0
        while engine.busy:
            for event in engine.step():
                assert event.token is not None
                began += not tokens[event.request]
                tokens[event.request].append(event.token)
            if began == len(requests) and not prefill_s:
                prefill_s = time.perf_counter() - start
        return Run(prefill_s, time.perf_counter() - start, tokens)

    return {"run": run, "bound": lambda case: bound(engine_for(case), case)}


def peer(folder: Path, dtype: str, resources: ExitStack) -> Side:
    """transformers with its cache; ragged requests in batches as they come, padded on the left."""
    del resources
    import transformers
    from transformers import AutoModelForCausalLM, GenerationConfig

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder / "hf", dtype=DTYPES[dtype], local_files_only=True
    ).eval()
    model.generation_config = GenerationConfig()

    def batch(requests: list[tuple[list[int], int]]) -> tuple[float, list[list[int]]]:
        longest = max(len(prompt) for prompt, _ in requests)
        rows = [[0] * (longest - len(prompt)) + prompt for prompt, _ in requests]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in requests]
        first: list[float] = []

        def notice(_: Any, scores: Any) -> Any:
            first.append(time.perf_counter())
            return scores

        new = max(new for _, new in requests)
        whole = model.generate(
            torch.tensor(rows), attention_mask=torch.tensor(mask), max_new_tokens=new,
            min_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None,
            logits_processor=transformers.LogitsProcessorList([notice]),
        )  # fmt: skip
        follow = [
            row[longest : longest + n] for row, (_, n) in zip(whole.tolist(), requests, strict=True)
        ]
        return first[0], follow

    def run(case: Case) -> Run:
        requests = case.requests(model.config.vocab_size)
        start = time.perf_counter()
        tokens: list[list[int]] = []
        prefill_s = 0.0
        for at in range(0, len(requests), case.batch):
            first, found = batch(requests[at : at + case.batch])
            prefill_s += first - start if not at else 0.0
            tokens += found
        return Run(prefill_s, time.perf_counter() - start, tokens)

    return {"run": run}


SIDES = {"ours": ours, "peer": peer}


def serve(side: str, folder: Path, dtype: str, threads: int, pipe: Connection) -> None:
    """Build a side; for each (what, case) of the pipe answer (what came of it, peak MiB).

    The peak is VmHWM since the case began, less the process's VmRSS with everything imported and
    no model yet: weights, states and what generating adds.
    """
    torch.set_num_threads(threads)
    if side == "ours":
        from megatron_hybrid.platform import initialize

        initialize()
        import megatron_hybrid.generation.engine
        import megatron_hybrid.training.checkpoint  # noqa: F401
    else:
        from transformers import NemotronHForCausalLM  # noqa: F401
    baseline_mib = resident_mib("VmRSS")
    with ExitStack() as resources:
        built = SIDES[side](folder, dtype, resources)
        pipe.send("ready")
        while asked := pipe.recv():
            what, case = asked
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
            pipe.send((built[what](case), resident_mib("VmHWM") - baseline_mib))
