"""Settings that ship with the package, one TOML file each, whose first comment line says what it is for."""

from pathlib import Path

from segnet_scratch.errors import ConfigError

_FOLDER = Path(__file__).parent


def recipes() -> dict[str, str]:
    """What each recipe is for, by its name, in alphabetical order."""
    return {path.stem: _first_line(path) for path in sorted(_FOLDER.glob("[!.]*.toml"))}


def find_config(config: str) -> Path:
    """The file of `--config`: a path, or the name of a recipe. A file of that name comes first.

    ConfigError with the names of the recipes where it is neither.
    """
    if Path(config).is_file():
        return Path(config)
    if config in recipes():
        return _FOLDER / f"{config}.toml"
    raise ConfigError(
        f"--config {config}: expected a TOML configuration file or the name of a recipe, found neither; the recipes "
        f"are {', '.join(recipes())}"
    )


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
