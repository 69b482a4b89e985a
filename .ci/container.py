#!/usr/bin/env python3
"""container.py FOLDER [STAGE]: carries out the Dockerfile in Debian roots below FOLDER, without Docker, and tries it.

Each stage is a root of its own, made by debootstrap or copied from the stage that it begins with; needs root. What this
cannot show: that Docker reads the file as it is read here, and what its image of Debian has beyond debootstrap's.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

TREE = Path(__file__).resolve().parents[1]
# What this machine needs to reach packages, lent to the roots; Docker has ways of its own for that.
CERTIFICATES = os.environ.get("SSL_CERT_FILE", "")
LENT = {"/etc/resolv.conf": "etc/resolv.conf", "/etc/hosts": "etc/hosts", CERTIFICATES: "etc/lent.crt"}
NETWORK = {name: os.environ[name] for name in os.environ if re.search("(?i)_proxy$|^PIP_INDEX", name)}
if CERTIFICATES:
    NETWORK |= dict.fromkeys(("SSL_CERT_FILE", "PIP_CERT"), "/etc/lent.crt")


class Stage:
    """A root, and what the instructions so far say about processes in it."""

    def __init__(self, folder: Path, begin: "Stage | None") -> None:
        self.root = folder
        self.environment = {"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.user, self.place, self.entry = "0", "/", []
        if begin:
            self.environment |= begin.environment
            self.user, self.place, self.entry = begin.user, begin.place, begin.entry
            subprocess.run(["cp", "-a", "--reflink=auto", begin.root, folder], check=True)

    def run(self, command: list[str], user: str = "", mounts: str = "", **options: Any) -> subprocess.CompletedProcess:
        """The command in this root, with a /proc of its own; `mounts` are commands of the shell before it."""
        user = user or self.user
        inside = ["chroot", f"--userspec={user}:{user}", self.root, "/usr/bin/env", "-i", f"--chdir={self.place}"]
        inside += [f"{name}={value}" for name, value in {**NETWORK, **self.environment}.items()]
        apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", f"--mount-proc={self.root}/proc"]
        script = f"{mounts}\nexec {shlex.join(map(str, [*inside, *command]))}"
        return subprocess.run([*apart, "sh", "-euc", script], text=True, **options)

    def carry_out(self, instruction: str, rest: str, stages: "dict[str, Stage]") -> None:
        """One instruction but FROM."""
        if instruction == "RUN":
            self.run(["/bin/sh", "-c", rest], check=True, stdin=subprocess.DEVNULL)
        elif instruction == "ENV":
            for name, value in (word.split("=", 1) for word in shlex.split(rest)):
                self.environment[name] = re.sub(r"\$(\w+)", lambda found: self.environment[found[1]], value)
        elif instruction == "COPY":
            *words, target = shlex.split(rest)
            options = dict(word[2:].split("=") for word in words if word.startswith("--"))
            origin = stages[options["from"]].root if "from" in options else context(self.root.parent)
            (source,) = [word for word in words if not word.startswith("--")]
            goal = self.root / Path(self.place, target).relative_to("/")
            goal.parent.mkdir(parents=True, exist_ok=True)
            copied = f"{origin / source.lstrip('/')}{'/.' if (origin / source.lstrip('/')).is_dir() else ''}"
            subprocess.run(["cp", "-a", "--no-preserve=ownership", copied, goal], check=True)
            if "chmod" in options:
                goal.chmod(int(options["chmod"], 8))
        elif instruction == "USER":
            self.user = rest
        elif instruction == "WORKDIR":
            self.place = rest
            (self.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif instruction == "ENTRYPOINT":
            self.entry = json.loads(rest)
        elif instruction != "VOLUME":
            sys.exit(f"Dockerfile: {instruction} is not known here")


def context(folder: Path) -> Path:
    """What .dockerignore leaves of the tree: it excludes everything, then names what belongs to it."""
    lines = (TREE / ".dockerignore").read_text().splitlines()
    names = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert "*" in lines, "expected a .dockerignore that begins with everything"
    target = folder / "context"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    subprocess.run(["cp", "-a", *names, target], check=True, cwd=TREE)
    return target


def build(folder: Path, wanted: str) -> Stage:
    """The stage of this name, and those that it needs."""
    text = re.sub(r"^\s*#.*\n", "", (TREE / "Dockerfile").read_text(), flags=re.MULTILINE)
    parts = re.split(r"^FROM ", re.sub(r"\\\n\s*", "", text), flags=re.MULTILINE)[1:]
    bodies = {part.split()[2]: (part.split()[0], part.splitlines()[1:]) for part in parts}
    done: dict[str, Stage] = {}

    def make(name: str) -> Stage:
        if name in done:
            return done[name]
        if name not in bodies:
            suite = re.fullmatch(r"debian:(\w+)-slim", name)
            assert suite, f"{name}: expected an image of Debian"
            stage = done[name] = Stage(folder / suite[1], None)
            if not stage.root.exists():  # else of an earlier run
                command = ["debootstrap", "--variant=minbase", suite[1], stage.root]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            for path, target in LENT.items():
                if path:
                    shutil.copy(path, stage.root / target)
            return stage
        begin, lines = bodies[name]
        for other in re.findall(r"--from=(\S+)", "\n".join(lines)):
            make(other)
        stage = Stage(folder / name, make(begin))
        for line in filter(str.strip, lines):
            print(f"[{name}] {line}", flush=True)
            stage.carry_out(*line.split(None, 1), done)
        done[name] = stage
        return stage

    return make(wanted)


def attempt(stage: Stage, folder: Path) -> None:
    """The entry, as a user other than root, with nothing, with a small data set, with a model, with commands."""
    data, runs = folder / "data", stage.root / "runs"
    (stage.root / "data").mkdir()
    read_only = f"mount --bind {data} {stage.root}/data && mount -o remount,bind,ro {stage.root}/data"

    def entry(*arguments: str, mounts: str = read_only, **options: Any) -> str:
        finished = stage.run([*stage.entry, *arguments], mounts=mounts, stdout=subprocess.PIPE, **options)
        print(finished.stdout, flush=True)
        assert finished.returncode == 0, f"{stage.entry} {arguments}: exit code {finished.returncode}"
        return finished.stdout

    assert "Nothing lies in /data" in entry(mounts="true")
    assert entry("--version", mounts="true").startswith("segnet_scratch ")
    entry("data", "sample", "/runs/sample", "--train", "4", "--val", "2", mounts="true")
    shutil.move(runs / "sample", data)
    (data / "config.toml").write_text("width = 0.125\nsize = 32\nbatch = 2\nsteps = 2\n")
    entry()
    for name in ("best.safetensors", "eval.json", "report.html"):
        assert (runs / "segnet" / name).stat().st_uid == int(stage.user), name
    shutil.copy(runs / "segnet" / "best.safetensors", data / "model.safetensors")
    shutil.rmtree(runs / "segnet")
    assert "mean IoU" in entry()
    assert [path.name for path in (runs / "segnet").iterdir()] == ["eval.json"]
    assert "relu" in entry("gradcheck", "relu", "--device", "host")  # compiles by g++
    assert list((stage.root / "cache").iterdir())
    entry("doctor", user="4321")  # docker run --user: nobody that /etc/passwd knows


if __name__ == "__main__":
    place = Path(sys.argv[1]).resolve()
    place.mkdir(parents=True, exist_ok=True)
    attempt(build(place, sys.argv[2] if len(sys.argv) > 2 else "cpu"), place)
    print("the container's instructions and its entry work in a Debian root")
