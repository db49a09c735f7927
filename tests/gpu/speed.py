"""The steps of a check that measure: training beside the engine's specs, generation, the plan."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial

import torch

from benchmarks import gpu_step
from tests.gpu import runs
from tests.gpu.findings import OK, Findings, NeedsGpuError
from tests.gpu.layers import largest_error

# Each in a process of its own, which gives the memory back.
CASES = {
    f"step_{size}_{name}": gpu_step.Case(recipe=recipe, hidden_size=hidden_size)
    for size, hidden_size in (("400m", 1024), ("1200m", 2048))
    for name, recipe in (("bf16", "bf16"), ("fp8", "fp8_tensorwise"))
}
TOY = gpu_step.Case(
    layers="M-*M-", hidden_size=512, vocab_size=512, micro_batch_size=1, seq_length=64
)
ROUNDS, TOY_ROUNDS = 10, 2
PROMPT_TOKENS, NEW_TOKENS = 512, 64
TOY_PROMPT_TOKENS, TOY_NEW_TOKENS = 32, 8
# Log-probabilities of tokens by the cache against those of all at once, in bf16.
SAME_LOGITS = 0.05


def _measure(step: str, findings: Findings) -> None:
    """A training step of a case of ours beside megatron-core's own specs."""

    def compare(name: str, case: gpu_step.Case, sides: Sequence[str]) -> bool:
        rounds = TOY_ROUNDS if findings.toy else ROUNDS
        with findings.part(name) as found:
            found["case"] = asdict(case)
            measured = gpu_step.compare(case, rounds, gpu_step.device_peak_tflops(), sides)
            found |= {side: asdict(it) for side, it in measured.items()}
        return found["status"] == OK

    case, both = CASES[step], ["ours", "engine"]
    if findings.toy:
        case = replace(TOY, recipe=case.recipe)
        compare("ours alone", case, ["ours"])
        compare("without Mamba-2", replace(case, layers="-*-*-"), both)
        findings.skip("beside the engine", "megatron-core's Mamba-2 mixer needs mamba-ssm")
    elif not compare("beside the engine", case, both):
        compare("ours alone", case, ["ours"])


step_400m_bf16, step_400m_fp8, step_1200m_bf16, step_1200m_fp8 = (
    partial(_measure, step) for step in CASES
)


def generation(findings: Findings) -> None:
    """Tokens a second of one sequence, and whether the cache changes the logits."""
    from megatron_hybrid.config import load_config
    from megatron_hybrid.data.tokenizer import build_tokenizer
    from megatron_hybrid.generation import Generator, Limits, SamplingParams
    from megatron_hybrid.model.build import build_model_chunks
    from megatron_hybrid.model.transformer_config import transformer_config
    from megatron_hybrid.platform import initialize
    from megatron_hybrid.training.distributed import process_groups

    platform = initialize()
    words = [*(runs.TOY if findings.toy else runs.MODEL), "training.train_iters=1"]
    config = load_config(words, world_size=1, has_cuda=platform.has_cuda)
    prompt_tokens, new_tokens = (
        (TOY_PROMPT_TOKENS, TOY_NEW_TOKENS) if findings.toy else (PROMPT_TOKENS, NEW_TOKENS)
    )
    tokenizer = build_tokenizer("null", None, vocab_size=config.model.vocab_size)
    with process_groups(config, platform, alone=True):
        engine_config = transformer_config(config, "transformer_engine", platform.device)
        (model,) = build_model_chunks(config, engine_config, "transformer_engine")
        limits = Limits(max_sequences=1, max_tokens=prompt_tokens + new_tokens)
        generator = Generator.of_model(config, [model.eval()], tokenizer, limits=limits)
        asked = SamplingParams(max_new_tokens=new_tokens, ignore_eod=True, logprobs=1)
        draws = torch.Generator().manual_seed(1)
        prompt = torch.randint(config.model.vocab_size or 1, (prompt_tokens,), generator=draws)
        with findings.part("cache") as found:
            [[completion]] = generator.generate([prompt.tolist()], asked)
            told = completion.logprobs or []
            stepwise = torch.tensor([each.logprob for each in told])
            tokens = torch.tensor([[*prompt.tolist(), *completion.tokens]])
            at_once = generator.logits(tokens.to(platform.device))[0, :, : generator.vocab_size]
            at_once = at_once.log_softmax(-1)[prompt_tokens - 1 : -1].cpu()
            at_once = at_once.gather(1, tokens[0, prompt_tokens:, None]).squeeze(1)
            error, _ = largest_error({"logprobs": stepwise}, {"logprobs": at_once})
            found["error"] = error
            assert error < SAME_LOGITS, f"log-probabilities from the cache are off by {error:.2e}"
        with findings.part("speed") as found:
            for _ in range(2):  # the first to warm up
                _synchronize(platform.device)
                start, times = time.perf_counter(), []
                for _ in generator.events(prompt.tolist(), asked):
                    times.append(time.perf_counter() - start)
            found |= {"prompt_tokens": prompt_tokens, "new_tokens": len(times)}
            found["first_token_ms"] = 1e3 * times[0]
            found["tokens_per_s"] = (len(times) - 1) / (times[-1] - times[0])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def plan(findings: Findings) -> None:
    """What the planner says of each step that was measured."""
    from megatron_hybrid.planner.hardware import gpu_called
    from megatron_hybrid.planner.memory import rank_memory
    from megatron_hybrid.planner.step_time import step_time

    steps = json.loads(findings.summary.read_text())["steps"]
    name = torch.cuda.get_device_name()
    gpu = gpu_called(name)
    for step in CASES:
        for part in steps.get(step, {}).get("parts", ()):
            if "case" not in part:  # nothing of ours
                continue
            with findings.part(f"{step}, {part['name']}") as found:
                assert gpu is not None, f"the planner does not know {name}"
                config = gpu_step.config_of(gpu_step.Case(**part["case"]))
                predicted = step_time(config, 1, gpu)
                (memory,) = rank_memory(config, 1, fused=True)
                found |= {
                    "predicted_ms": 1e3 * predicted.seconds,
                    "predicted_tokens_per_s": predicted.tokens_per_s,
                    "predicted_gib": memory.total / 2**30,
                }
                if "ours" not in part:
                    raise NeedsGpuError(f"not measured: {part.get('why', part['status'])}")
                found |= {
                    "measured_ms": part["ours"]["step_ms"],
                    "measured_tokens_per_s": part["ours"]["tokens_per_s"],
                    "measured_gib": part["ours"]["memory_gib"],
                    "predicted_to_measured": 1e3 * predicted.seconds / part["ours"]["step_ms"],
                }
