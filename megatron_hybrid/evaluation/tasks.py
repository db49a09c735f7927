"""Tasks of lm-eval: which, and the record of what a model makes of them."""

import contextlib
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_hybrid.errors import UserError

if TYPE_CHECKING:
    from megatron_hybrid.generation import Generator

PACKAGE = "lm_eval"
INSTALL = "pip install 'megatron-hybrid[eval]'"
_SEED = 1234  # of which examples come before a question: lm-eval's own default
_DRAWS = 1000  # of the bootstrap, for metrics whose error has no formula
_YAML = (".yaml", ".yml")

Told = Callable[[str, int, int], None]


@dataclass(frozen=True)
class AskedTasks:
    """What a model is to do.

    Attributes:
        names: of tasks, groups and tags; patterns such as `mmlu_*`, and paths of a task's YAML.
        include_path: folders of more tasks, whose Python is run as that of lm-eval's own.
        limit: documents of each task, its first; None: all.
        num_fewshot: examples before each question; None: as each task says.
        apply_chat_template: prompts are messages, by the tokenizer's template.
        system_instruction: before each prompt.
        parse_special_tokens: the text of a special token in a task becomes its id.
    """

    names: Sequence[str]
    include_path: Sequence[Path] = ()
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    parse_special_tokens: bool = False


class Tasks:
    """Tasks with their documents, which any number of models may be asked.

    Raises:
        UserError: lm-eval is not there, or a task is not known, cannot be loaded, or is none that a
            model of texts may do; all of them at once.
    """

    def __init__(self, asked: AskedTasks) -> None:
        if find_spec(PACKAGE) is None:
            raise UserError(f"tasks need the package {PACKAGE}; allowed: {INSTALL}")
        _prepare()
        problems = [
            f"{path} is no folder of tasks" for path in asked.include_path if not path.is_dir()
        ]
        if problems:
            raise UserError("\n".join(problems))
        self._asked = asked
        with _apart():
            self._manager, self._loaded = _load(asked)
        _refuse(self._loaded["tasks"])

    @property
    def names(self) -> list[str]:
        """Of the single tasks."""
        return list(self._loaded["tasks"])

    def ask(self, generator: "Generator", max_length: int, told: Told) -> dict[str, Any]:
        """The record of a model's answers: figures by task, and by group where there are some.

        Args:
            generator: on the rank that leads; the others `follow`.
            max_length: tokens of a text at most.
            told: called with a kind of request, those that are done and all there are of it.

        Raises:
            UserError: a task asks what the model cannot be asked.
        """
        from lm_eval import __version__
        from lm_eval.evaluator import simple_evaluate

        from megatron_hybrid.evaluation.harness import HarnessModel

        asked = self._asked
        model = HarnessModel(
            generator, max_length, parse_special_tokens=asked.parse_special_tokens, told=told
        )
        with _apart():
            found: Any = simple_evaluate(
                model=model, tasks=self._roots(), task_manager=self._manager,
                num_fewshot=asked.num_fewshot, limit=asked.limit, log_samples=False,
                bootstrap_iters=_DRAWS, apply_chat_template=asked.apply_chat_template,
                system_instruction=asked.system_instruction, random_seed=_SEED,
                numpy_random_seed=_SEED, torch_random_seed=None, fewshot_random_seed=_SEED,
            )  # fmt: skip
        counts = {name: each["effective"] for name, each in found["n-samples"].items()}
        return {
            "lm_eval": __version__,
            "max_length": max_length,
            "limit": asked.limit,
            "apply_chat_template": asked.apply_chat_template,
            "system_instruction": asked.system_instruction,
            "parse_special_tokens": asked.parse_special_tokens,
            "tasks": {
                name: {
                    "metrics": _figures(found["results"][name]),
                    "samples": counts[name],
                    "num_fewshot": found["n-shot"].get(name),
                    "version": found["versions"].get(name),
                }
                for name in self.names
            },
            "groups": {
                name: {"metrics": _figures(each)} for name, each in found.get("groups", {}).items()
            },
        }

    def _roots(self) -> list[Any]:
        """What was asked for, as it was loaded: groups, and tasks that are in none of them."""
        groups = self._loaded["groups"]
        inner = {name for names in self._loaded["group_map"].values() for name in names}
        within = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
        tasks = self._loaded["tasks"].items()
        return [
            *(group for name, group in groups.items() if name not in inner),
            *(task for name, task in tasks if name not in within),
        ]


def _prepare() -> None:
    """Before anything of lm-eval is imported: no bars, no threads or processes beside ranks."""
    for name, value in {
        "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "DISABLE_MULTIPROC": "1",
    }.items():  # fmt: skip
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """What tasks draw and print is none of ours."""
    import torch

    drawn, numpy_drawn = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), contextlib.redirect_stdout(sys.stderr):
        try:
            yield
        finally:
            random.setstate(drawn)
            np.random.set_state(numpy_drawn)


def _load(asked: AskedTasks) -> tuple[Any, Any]:
    """The tasks; of lm-eval's own only where need be, as their index takes it many seconds."""
    from lm_eval.tasks import TaskManager

    folders = [str(path) for path in asked.include_path]
    patterns = any(set(name) & set("*?[") for name in asked.names)  # which all of them may match
    for with_own in (True,) if patterns else (False, True):
        try:
            manager = TaskManager(include_path=folders, include_defaults=with_own)
            names, strange = _resolved(asked.names, manager.all_tasks)
            if strange and not with_own:
                continue
            if strange:
                raise UserError("\n".join(unknown(each, manager.all_tasks) for each in strange))
            return manager, manager.load(names)
        except UserError:
            raise
        except Exception as error:
            # A group of ours may have tasks of lm-eval's. Whatever is raised comes from a task's
            # files, or from where its documents are.
            if isinstance(error, KeyError) and not with_own:
                continue
            text = " ".join(str(error).split())[:400]
            raise UserError(
                f"tasks {', '.join(asked.names)} cannot be loaded: {type(error).__name__}: {text}"
            ) from error
    raise AssertionError("the second time ends it")


def _resolved(names: Sequence[str], known: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of tasks that are known, each once, and those of none."""
    found: dict[str, None] = {}
    unknown = []
    for name in names:
        if name.endswith(_YAML) and Path(name).is_file():
            matching = [name]
        else:
            matching = [name] if name in known else [k for k in known if fnmatch(k, name)]
        found |= dict.fromkeys(matching)
        if not matching:
            unknown.append(name)
    return list(found), unknown


def unknown(name: str, known: Sequence[str]) -> str:
    """The sentence for a name that is no task's."""
    close = get_close_matches(name, known, n=5)
    hint = f"; similar: {', '.join(close)}" if close else ""
    return (
        f"no task, group or tag is called {name}, and no file{hint}; allowed: those of lm-eval, of "
        "an included folder, or a .yaml"
    )


def _refuse(tasks: Mapping[str, Any]) -> None:
    """What would be refused, or go wrong, after the model has answered."""
    problems = []
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            problems.append(f"task {name} runs what a model writes as a program, which is not done")
        if getattr(task, "MULTIMODAL", False):
            problems.append(f"task {name} asks about more than text, which is all the model reads")
    if problems:
        raise UserError("\n".join(problems))


def _figures(found: Mapping[str, Any]) -> dict[str, float | None]:
    """Metrics by name, with the filter of answers where there is one: acc, acc_stderr, ...

    What lm-eval has no figure for, as the error of a single answer, is None.
    """
    figures: dict[str, float | None] = {}
    for key, value in found.items():
        metric, _, rest = key.partition(",")
        if not rest:  # the name and its like
            continue
        name = metric if rest == "none" else key
        figures[name] = float(value) if isinstance(value, int | float | np.number) else None
    return figures
