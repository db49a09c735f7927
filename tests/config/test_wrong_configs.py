"""Wrong configs, each with every sentence that is reported for it: the tables are in wrong/."""

import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.config import build_config, load_config, presets, rules, validate
from megatron_hybrid.config.rules.files import writable
from megatron_hybrid.errors import ConfigError
from tests.config import GOOD
from tests.config.folder import make_folder

TABLES = sorted(Path(__file__).with_name("wrong").glob("*.txt"))


def read_table(path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Each entry of a table: its name, what is typed, and the problems below it."""
    for block in path.read_text(encoding="utf-8").split("\n\n")[1:]:
        head, *problems = block.strip().splitlines()
        name, _, typed = head.removeprefix("[").partition("]")
        yield name, typed.strip(), [problem.strip() for problem in problems]


ENTRIES = [
    pytest.param(typed, problems, id=name)
    for table in TABLES
    for name, typed, problems in read_table(table)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("files"))


# Of a good config whose pattern has none.
NO_EXPERTS = (
    "model.num_moe_experts=null model.moe_ffn_hidden_size=null model.moe_aux_loss_coeff=0 "
    "model.moe_shared_expert_intermediate_size=null model.moe_router_score_function=softmax"
)


def words(typed: str, folder: Path) -> list[str]:
    found = shlex.split(typed.replace("{tmp}", str(folder)).replace("{no experts}", NO_EXPERTS))
    return [*GOOD, *found[1:]] if found[:1] == ["..."] else found


def test_there_are_over_a_hundred() -> None:
    """The tables are found and read whole, under names of their own."""
    names = [entry.id for entry in ENTRIES]
    assert len(names) >= 250
    assert len(set(names)) == len(names)


def test_what_they_start_from_is_good() -> None:
    """Without this, an entry could be refused for another reason than its own."""
    load_config(GOOD, world_size=1, has_cuda=False)


@pytest.mark.parametrize(("typed", "problems"), ENTRIES)
def test_wrong_config(typed: str, problems: list[str], folder: Path) -> None:
    """Exactly these sentences: field, value, rule, what is allowed; nothing else beside them."""
    with pytest.raises(ConfigError) as caught:
        load_config(words(typed, folder))
    expected = [
        problem.replace("{tmp}", str(folder)).replace("{presets}", ", ".join(presets()))
        for problem in problems
    ]
    assert caught.value.problems == expected


OWN_LENGTHS = [f"data.phases[{number}].seq_length={256 << number // 2}" for number in range(3)]
OWN_SPLITS = [f"data.sources.{name}.split=8,1,1" for name in ("web", "code", "math")]
# Values that nothing reads, as they stand: of each, that it would be refused where it is read.
UNREAD = {
    "a length that each phase has": (
        ["{tmp}/phases.yaml", *OWN_LENGTHS, "--context-parallel-size", "2",
         "training.eval_interval=null", "data.seq_length=254"],
        "training.eval_interval=9",
    ),
    "a split that each source has": (
        ["{tmp}/phases.yaml", *OWN_SPLITS, "data.split=0,1,1"], "data.sources.web.split=null",
    ),
    "a split where the others are not read": (
        ["{tmp}/phases.yaml", *OWN_SPLITS[:2], "data.split=0,1,1", "data.phases[1].weights.math=0",
         "data.phases[2].weights.math=0"],
        "data.phases[1].weights.math=2",
    ),
    "a split of a source that waits": (
        ["{tmp}/phases.yaml", "data.sources.math.split=1,0,0", "data.phases[1].weights.math=0",
         "data.phases[2].weights.math=0"],
        "data.phases[1].weights.math=2",
    ),
    "a cache that is not written": (
        ["{tmp}/blend.yaml", "data.data_cache_path={tmp}/web.idx/x"],
        "data.sample_order=megatron",
    ),
    "a split of made-up tokens": (
        [*GOOD, "data.split=1,0,0"], "data.mock_data=false",
    ),
    "channels that rotate, of no layer": (
        [*GOOD, "model.hybrid_layer_pattern=MME", "model.position_embedding_type=rope",
         "model.kv_channels=30", "model.rotary_percent=0.5"],
        "model.hybrid_layer_pattern=M*E",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_what_nothing_reads_is_not_judged(name: str, folder: Path) -> None:
    """A field in whose place others are read, and which would be refused where it is read."""
    typed, reads = UNREAD[name]
    line = [word.replace("{tmp}", str(folder)) for word in typed]
    which = (*rules.NO_FILES, writable)
    load_config(line, which=which, world_size=2)
    with pytest.raises(ConfigError) as caught:
        load_config([*line, reads], which=which, world_size=2)
    assert len(caught.value.problems) == 1


TP, PP, CP = (
    f"parallel.{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "context")
)
ETP, EP = (f"parallel.{name}_parallel_size" for name in ("expert_tensor", "expert_model"))


@pytest.mark.parametrize(
    ("typed", "world_size", "has_cuda", "problem"),
    [
        pytest.param(
            "--pipeline-model-parallel-size 2", 3, None,
            f"the number of ranks, 3, must be a multiple of {TP}=1 * {PP}=2 * {CP}=1; "
            "allowed: 2, 4, 6, ...", id="ranks and layout",
        ),
        pytest.param(
            "--expert-model-parallel-size 4", 2, None,
            f"the number of ranks, 2, must be a multiple of {ETP}=1 * {EP}=4 * {PP}=1; "
            "allowed: 4, 8, 12, ...", id="ranks and experts",
        ),
        pytest.param(
            "--global-batch-size 20", 2, None,
            "training.global_batch_size=20 must be a multiple of training.micro_batch_size * "
            "data-parallel size=8; allowed: 16, 24, 32, ...", id="ranks and batch",
        ),
        pytest.param(
            "--expert-tensor-parallel-size 2", None, False,
            f"{ETP}=2 needs GPUs: gloo cannot gather shards of unequal size; allowed: 1",
            id="split experts on the CPU",
        ),
        pytest.param(
            "--reset-attention-mask --context-parallel-size 2 precision.recipe=bf16", None, True,
            f"{CP}=2 with data.packed_documents=true is not supported on GPUs; "
            "allowed: 1, or data.packed_documents=false", id="packed documents and CP on GPUs",
        ),
    ],
)  # fmt: skip
def test_wrong_for_these_ranks(
    typed: str, world_size: int | None, has_cuda: bool | None, problem: str
) -> None:
    """Rules about the ranks apply once those are known, also to a config that is already made."""
    args = [*GOOD, *typed.split()]
    with pytest.raises(ConfigError) as caught:
        load_config(args, world_size=world_size, has_cuda=has_cuda)
    assert caught.value.problems == [problem]
    config = load_config(args)
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size=world_size, has_cuda=has_cuda)
    assert caught.value.problems == [problem]


@pytest.mark.parametrize(
    ("typed", "facts", "problem"),
    [
        pytest.param(
            "--gradient-accumulation-fusion", {"fused_weight_gradients": False},
            "gpu.gradient_accumulation_fusion=true needs NVIDIA's apex with its extension "
            "fused_weight_gradient_mlp_cuda, which cannot be imported here; allowed: false",
            id="no apex",
        ),
        pytest.param(
            "--context-parallel-size 2 precision.recipe=fp32", {},
            f"precision.recipe=fp32 with {CP}=2 has no attention kernel on the transformer_engine "
            f"backend; allowed: precision.recipe=bf16, or {CP}=1", id="CP in fp32",
        ),
        pytest.param(
            "model.mamba_num_heads=3 model.mamba_head_dim=4 model.mamba_num_groups=1 "
            "model.mamba_state_dim=8", {},
            "model.mamba_num_heads=3, model.mamba_head_dim=4, model.mamba_num_groups=1 and "
            "model.mamba_state_dim=8 make 28 convolved channels on a rank, which must be a "
            "multiple of 8 on the transformer_engine backend", id="convolved channels",
        ),
    ],
)  # fmt: skip
def test_wrong_on_a_gpu(typed: str, facts: dict[str, Any], problem: str) -> None:
    """What Transformer Engine, or what is installed beside it, does not have."""
    config = load_config([*GOOD, *typed.split()])
    with pytest.raises(ConfigError) as caught:
        validate(config, has_cuda=True, **facts)
    assert caught.value.problems == [problem]


def test_all_problems_at_once() -> None:
    """Bad words, bad values and broken rules are reported together, and counted."""
    args = [*GOOD, "--bf17", "optimizer.lr=fast", "--num-query-groups", "3", "data.sequence=1"]
    with pytest.raises(ConfigError) as caught:
        load_config(args)
    assert caught.value.problems == [
        "--bf17 is not a flag; did you mean --bf16?",
        "data.sequence is not a field; did you mean data.seq_length?",
        "optimizer.lr='fast' must be a number above 0",
        "model.num_query_groups=3 must divide model.num_attention_heads=4; allowed: 1, 2, 4",
    ]
    assert str(caught.value).startswith("4 problems in the config:\n  - --bf17")


def test_a_bad_value_is_reported_once() -> None:
    """Rules and derived fields that read a bad value keep silent; other rules still speak."""
    with pytest.raises(ConfigError) as caught:
        load_config([*GOOD, "--hidden-size", "wide", "--kv-channels", "null", "--split", "1"])
    assert [problem.split("=")[0] for problem in caught.value.problems] == [
        "model.hidden_size",
        "data.split",
    ]


def test_what_was_typed_is_judged_even_without_its_base() -> None:
    """A missing file hides no wrong value; but what the file may hold is not called missing."""
    with pytest.raises(ConfigError) as caught:
        load_config(["nothing.yaml", "--lr", "-1", "--micro-batch-size", "4"])
    assert caught.value.problems == [
        "nothing.yaml: cannot be read: No such file or directory",
        "optimizer.lr=-1 must be a number above 0",
    ]


def test_missing_required_fields_are_named() -> None:
    """A config of plain values is held to the same rules."""
    with pytest.raises(ConfigError) as caught:
        build_config({"modle": {}, "training": 3})
    problems = "\n".join(caught.value.problems)
    assert "modle is not a section; did you mean model?" in problems
    assert "training=3 is a section; it must hold `field: value`" in problems
    assert "model.hidden_size is not set; it must be a whole number of at least 1" in problems
    assert "optimizer.lr is not set; it must be a number above 0" in problems


# The command, whose traceback says what it started, or loaded though it takes seconds to.
WATCHED = """
import sys
begun = []
starts = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.exec")
sys.addaudithook(lambda event, args: begun.append(event) if event in starts else None)
from megatron_hybrid.cli import main
try:
    main()
finally:
    begun += sorted({"torch", "megatron", "numpy", "transformers"} & set(sys.modules))
    assert not begun, begun
"""


@pytest.mark.parametrize(
    "name",
    ["unknown flag", "size zero", "pattern unknown symbol", "PP and layers", "file not YAML"],
)
def test_command_line_refuses_without_traceback(name: str, folder: Path) -> None:
    """The real command prints the same sentences, exits 1, starts nothing and loads no torch."""
    typed, problems = next(entry.values for entry in ENTRIES if entry.id == name)
    command = [sys.executable, "-c", WATCHED, "pretrain", "--nproc", "2"]
    done = subprocess.run(
        [*command, *words(str(typed), folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for problem in problems:
        assert problem.replace("{tmp}", str(folder)) in done.stderr
