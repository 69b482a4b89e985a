"""Prints the oldest versions that pyproject.toml allows, one `name==version` a line, for pip's --constraint."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
optional = [one for name in ("test", "sbd", "report", "tensorboard", "video", "onnx", "serve") for one in extras[name]]
for requirement in project["dependencies"] + optional:
    name, version = re.fullmatch(r"([\w-]+)(?:>=|==)([\w.]+).*", requirement).groups()
    print(f"{name}=={version}")
