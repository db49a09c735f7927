"""Which of a folder's files transformers takes the weights from, so that we take the same.

Its order, where no argument says otherwise (`PreTrainedModel.from_pretrained`): model.safetensors,
then the files of model.safetensors.index.json, then pickles, which are not opened here. Variants
(`model.fp16.safetensors`) are for who names them.
"""

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from checkpoints_converter.errors import ConversionError
from megatron_hybrid.small_files import naming, read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Merged into the weights by transformers where peft is installed, and not where it is not.
_ADAPTER_FILE = "adapter_config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Of any program: what of a folder holds weights, or says where they are.
WEIGHT_FILES = (
    *_PICKLES, "*.bin.index.json", "*.safetensors", "*.safetensors.index.json", "*.gguf", "*.ggml",
    "*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.npz", "*.distcp",
)  # fmt: skip


def weight_map(folder: Path) -> dict[str, str] | None:
    """Name -> file of the index; None where one file without an index holds all.

    Raises:
        ConversionError: there is neither, or the index is damaged.
    """
    if (folder / SINGLE_FILE).is_file():
        return None
    path = folder / INDEX_FILE
    if not path.is_file():
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        if pickles:
            raise ConversionError(
                f"{folder} holds {pickles[0]}, a pickle, which could run code and is not opened; "
                "make safetensors of it where you trust it: AutoModelForCausalLM.from_pretrained("
                "..., dtype='auto').save_pretrained(...)"
            )
        raise ConversionError(f"{folder} holds neither {INDEX_FILE} nor {SINGLE_FILE}")
    with naming(path, ConversionError):
        found = read_json(path, ConversionError)["weight_map"]
        places = {str(name): str(file) for name, file in found.items()}
    for file in set(places.values()):
        if Path(file).name != file:
            raise ConversionError(f"{path} names {file!r}, which is not in the folder")
    return places


def differences(file: str, places: Mapping[str, str], names: set[str]) -> list[str]:
    """Where a file holds other tensors than the index says."""
    expected = {name for name, place in places.items() if place == file}
    problems = []
    for text, odd in (("lacks", expected - names), ("also holds", names - expected)):
        if odd:
            first = ", ".join(sorted(odd)[:3]) + (f" and {len(odd) - 3} more" * (len(odd) > 3))
            problems.append(f"{file} is not the file of {INDEX_FILE}: it {text} {first}")
    return problems


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights."""
    return any(fnmatch(name, pattern) for pattern in WEIGHT_FILES)


def passed_over(folder: Path) -> list[str]:
    """Files of weights, or that say where they are, which are not taken; as they would not be."""
    places = weight_map(folder)
    taken = {SINGLE_FILE} if places is None else {INDEX_FILE, *places.values()}
    return sorted(
        path.name for path in folder.iterdir() if is_weights(path.name) and path.name not in taken
    )


def elsewhere(folder: Path, config: Mapping[str, object]) -> list[str]:
    """Why transformers' weights would be others than those of `weight_map`."""
    problems = []
    named = config.get("transformers_weights")
    places = {SINGLE_FILE} if (folder / SINGLE_FILE).is_file() else {INDEX_FILE}
    if named is not None and named not in places:
        problems.append(
            f"transformers_weights={named!r} must be {', '.join(places)}: transformers takes the "
            "weights from there, which is not read here"
        )
    if (folder / _ADAPTER_FILE).is_file():
        problems.append(
            f"{_ADAPTER_FILE} beside it: an adapter, which transformers adds to the weights where "
            "peft is installed; merge it into them, or take it away"
        )
    return problems
