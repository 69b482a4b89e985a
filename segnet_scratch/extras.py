"""Libraries that only some features need, brought by the extras of pyproject.toml."""

from importlib import import_module
from types import ModuleType

from segnet_scratch.errors import MissingLibraryError


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Imports a library; MissingLibraryError with the command that installs it where that fails."""
    try:
        return import_module(module)
    except ImportError as error:
        problem = f"expected the library {module}, which cannot be imported ({error})"
        raise MissingLibraryError(f"{purpose}: {problem}; pip install 'segnet_scratch[{extra}]'") from error
