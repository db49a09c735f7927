"""Tasks of lm-eval: which, and the record of what a model makes of them."""

import contextlib
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from functools import partialmethod
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_hybrid.errors import UserError

if TYPE_CHECKING:
    from megatron_hybrid.data.tokenizer import Tokenizer
    from megatron_hybrid.evaluation.harness import HarnessModel
    from megatron_hybrid.generation import Generator

PACKAGE = "lm_eval"
INSTALL = "pip install 'megatron-hybrid[eval]'"
# As by lm-eval's own default: of what tasks draw, and of which examples come before a question.
_SEEDS = {"random": 0, "numpy": 1234, "examples": 1234}
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
            self._loaded = _load(asked)
        _refuse(self._loaded["tasks"])
        for task in self._loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if own is None or (asked.num_fewshot is not None and own != 0):
                task.set_config(key="num_fewshot", value=asked.num_fewshot or 0)

    @property
    def names(self) -> list[str]:
        """Of the single tasks."""
        return list(self._loaded["tasks"])

    def check(self, tokenizer: "Tokenizer", max_length: int) -> None:
        """Look for what no model of that tokenizer and length could be asked, before there is one.

        Raises:
            UserError: what it is, of all tasks.
        """
        model = self._model(tokenizer, max_length)
        problems = []
        with _apart(), _without_bars():
            for name, task in self._loaded["tasks"].items():
                task.set_fewshot_seed(seed=_SEEDS["examples"])
                place = f"task {name}"
                # What is raised comes from the files of a task.
                try:
                    chat = model.apply_chat_template if self._asked.apply_chat_template else None
                    task.build_all_requests(
                        limit=self._asked.limit, chat_template=chat, **self._prompts
                    )
                    for each in task.instances:
                        place = f"task {name}, document {each.doc_id}"
                        model.check(each.request_type, each.args)
                except Exception as error:
                    problems.append(f"{place}: {_reason(error)}")
        if problems:
            raise UserError("\n".join(problems))

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
        from lm_eval.evaluator import evaluate

        asked = self._asked
        model = self._model(generator.tokenizer, max_length, generator, told)
        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=_SEEDS["examples"])
        # Not `simple_evaluate`, which looks at the whole machine by programs that it starts.
        with _apart(), _without_bars():
            try:
                found: Any = evaluate(
                    lm=model, task_dict=self._loaded, limit=asked.limit, bootstrap_iters=_DRAWS,
                    log_samples=False, **self._prompts,
                )  # fmt: skip
            except Exception as error:
                if isinstance(error, UserError) or model.answering:
                    raise
                raise UserError(
                    f"tasks {', '.join(self.names)} cannot be asked: {_reason(error)}"
                ) from error
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

    @property
    def _prompts(self) -> dict[str, Any]:
        """How requests are made of documents."""
        return {
            "system_instruction": self._asked.system_instruction,
            "apply_chat_template": self._asked.apply_chat_template,
            "fewshot_as_multiturn": True,
        }

    def _model(
        self,
        tokenizer: "Tokenizer",
        max_length: int,
        generator: "Generator | None" = None,
        told: Told = lambda kind, done, total: None,
    ) -> "HarnessModel":
        from megatron_hybrid.evaluation.harness import HarnessModel

        special = self._asked.parse_special_tokens
        return HarnessModel(
            tokenizer, max_length, generator, parse_special_tokens=special, told=told
        )


def _prepare() -> None:
    """Before anything of lm-eval is imported: no threads or processes beside ranks."""
    for name, value in {"TOKENIZERS_PARALLELISM": "false", "DISABLE_MULTIPROC": "1"}.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """No bars of lm-eval's own while a model is asked, in logs or beside ours."""
    from tqdm import tqdm

    shown = tqdm.__init__
    tqdm.__init__ = partialmethod(shown, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = shown


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """What tasks draw and print is none of ours."""
    import torch

    drawn, numpy_drawn = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    random.seed(_SEEDS["random"])
    np.random.seed(_SEEDS["numpy"])
    with torch.random.fork_rng(devices), contextlib.redirect_stdout(sys.stderr):
        try:
            yield
        finally:
            random.setstate(drawn)
            np.random.set_state(numpy_drawn)


def _load(asked: AskedTasks) -> dict[str, Any]:
    """The tasks; of lm-eval's own only where need be, as their index takes it many seconds."""
    from lm_eval.tasks import TaskManager

    folders = [str(path) for path in asked.include_path]
    patterns = any(set(name) & set("*?[") for name in asked.names)  # which all of them may match
    for with_own in (True,) if patterns else (False, True):
        try:
            manager = TaskManager(include_path=folders, include_defaults=with_own)
        except Exception as error:
            raise UserError(f"tasks cannot be looked up: {_reason(error)}") from error
        names, strange = _resolved(asked.names, manager.all_tasks)
        if strange and not with_own:
            continue
        problems = [
            unread(manager, each, asked.include_path) or unknown(each, manager.all_tasks)
            for each in strange
        ]
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
        again = False
        for name in names:
            # Whatever is raised comes from a task's files, or from where its documents are.
            try:
                found = manager.load([name])
            except Exception as error:
                # A group of ours may have tasks of lm-eval's.
                again |= isinstance(error, KeyError) and not with_own
                problems.append(f"task {name} cannot be loaded: {_reason(error)}")
            else:
                problems += _merge(loaded, found, name)
        if again:
            continue
        if problems:
            raise UserError("\n".join(problems))
        return loaded
    raise AssertionError("the second time ends it")


def _merge(loaded: dict[str, Any], found: Mapping[str, Any], name: str) -> Iterator[str]:
    """Add what a name stands for; tells of tasks that are there already, but in another way."""
    for own, task in found["tasks"].items():
        there = loaded["tasks"].setdefault(own, task)
        if there is not task and _said(there) != _said(task):
            yield f"task {own} of {name} is asked for in another way, too: name one of them"
    loaded["groups"] |= found["groups"]


def _said(task: Any) -> str:
    """What a task's files say of it, wherever it is named."""
    said = dict(task.dump_config())
    return repr(sorted((key, repr(value)) for key, value in said.items() if key != "task_alias"))


def unread(manager: Any, name: str, folders: Sequence[Path]) -> str | None:
    """Why a file of that name, which is there, made no task."""
    for path in [path for folder in folders for path in sorted(folder.rglob(f"{name}.yaml"))]:
        try:
            manager.load([str(path)])
        except Exception as error:
            return f"{path} cannot be read as a task: {_reason(error)}"
    return None


def _reason(error: Exception) -> str:
    """What a library raised, on a line."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, StopIteration):  # by which datasets tell that they are empty
        return "it has no documents"
    text = " ".join(str(error).split())[:400]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


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
