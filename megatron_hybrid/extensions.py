"""Classes of the user's own that a config names as `package.module:Class`."""

import sys
from importlib import import_module
from pathlib import Path

from megatron_hybrid.errors import UserError, in_words


def load_class[T](field: str, word: str, base: type[T]) -> type[T]:
    """The class that a config names.

    It is looked for where Python looks, and in the folder that the run was started in.

    Args:
        field: whose value the word is, such as "training.callbacks".
        base: what it must be a subclass of.

    Raises:
        UserError: there is no such module or class, or it is of another kind.
    """
    module_name, _, name = word.partition(":")
    wanted = f"{base.__module__.rpartition('.')[0]}.{base.__name__}"
    if not all(part.isidentifier() for part in (*module_name.split("."), name)):
        raise UserError(
            f"{field}={word} must be package.module:Class, the name of a subclass of {wanted}"
        )
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        module = import_module(module_name)
    except Exception as error:
        place = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise UserError(
            f"{field}={word}: {module_name} cannot be imported: {place}{in_words(error)}"
        ) from error
    found = getattr(module, name, None)
    if found is None:
        raise UserError(f"{field}={word}: {module_name} ({module.__file__}) has no {name}")
    if not isinstance(found, type) or not issubclass(found, base):
        kind = f"a subclass of {wanted}"
        raise UserError(f"{field}={word}: {name} in {module.__file__} is not {kind}")
    return found
