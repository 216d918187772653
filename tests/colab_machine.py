"""A machine like Colab's: its Python, its packages, an empty folder, and nothing of this checkout.

    machine = Machine.like_colab(folder)  # builds the environment once, copies it every time
    machine.run(notebook, size="smoke")   # the notebook file alone

PyTorch on Colab is a CUDA build. Its wheel is installed as it is, but not the 2 GB of CUDA's
libraries, which compute nothing without a GPU: placeholders that can be loaded and not called
stand in their place. So the kernel's Python, PyTorch's version and everything on the CPU are
Colab's, and `torch.cuda.is_available()` is false, as on a Colab machine without a GPU.
"""

import hashlib
import inspect
import os
import re
import shutil
import subprocess
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "_build" / "colab"
LIST = ROOT / "tests" / "colab.txt"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CALLS = r"(?:cublas|cudnn|cufft|cuFile|curand|cusolver|cusparse|nccl|nvshmem)\w*"


class Missing(Exception):
    """What this machine lacks to be made like Colab's."""


def interpreter() -> Path:
    """A Python 3.13: COLAB_PYTHON, one on the path, or one that pyenv keeps."""
    kept = sorted(Path.home().glob(".pyenv/versions/3.13.*/bin/python3.13"))
    for found in (os.environ.get("COLAB_PYTHON"), shutil.which("python3.13"), *kept):
        version = ["-c", "import sys; print(*sys.version_info[:2])"]
        if found and subprocess.run([found, *version], capture_output=True).stdout == b"3 13\n":
            return Path(found)
    raise Missing("Colab runs Python 3.13, which is not here; COLAB_PYTHON may name one")


def call(*command: object, env: dict[str, str] | None = None) -> str:
    """What a command prints. Raises Missing, with its last words, where it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=env)
    if done.returncode:
        raise Missing(f"{' '.join(map(str, command))} failed:\n{done.stderr.strip()[-1500:]}")
    return done.stdout


def put_placeholders(libraries: Path) -> None:
    """Beside PyTorch's libraries, one for each of CUDA's that they need and that is not there."""
    here = {path.name for path in libraries.parent.parent.rglob("*.so*")}
    needed, used = set(), set()
    for path in libraries.glob("libtorch*.so"):
        needed |= set(re.findall(r"\[(lib(?:cu|nv|nccl)[^\]]*)\]", call("readelf", "-dW", path)))
        undefined = call("nm", "-D", "--undefined-only", path)
        used |= set(re.findall(rf" U ({CALLS})(?:@(\S+))?", undefined))
    for library in sorted(needed - here):
        versions: dict[str, list[str]] = {}  # symbols, by the version that they are asked for in
        for name, version in sorted(used):
            if version in ("", library) or (version == "NVSHMEM" and "nvshmem" in library):
                versions.setdefault(version, []).append(name)
        link(libraries / library, versions)


def link(library: Path, versions: dict[str, list[str]]) -> None:
    """A library of functions that stop the process when they are called."""
    names = [name for some in versions.values() for name in some]
    lines = [f"void {name}(void) {{ __builtin_trap(); }}\n" for name in names]
    listed = [f"{key} {{ {'; '.join(some)}; }};\n" for key, some in versions.items() if key]
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder, "empty.c"), Path(folder, "versions.map")
        source.write_text("".join(lines))
        script.write_text("".join(listed))
        options = [f"-Wl,-soname,{library.name}"]
        options += [f"-Wl,--version-script={script}"] if listed else []
        call("gcc", "-shared", "-fPIC", source, *options, "-o", library)


def build() -> Path:
    """The folder of an environment with Colab's packages, made once for every list of them."""
    recipe = LIST.read_text() + inspect.getsource(put_placeholders) + inspect.getsource(link)
    folder = BUILT / hashlib.sha256(recipe.encode()).hexdigest()[:12]
    if not (folder / ".complete").exists():
        shutil.rmtree(BUILT, ignore_errors=True)
        call(interpreter(), "-m", "venv", folder)
        python = folder / "bin" / "python"
        call(python, "-m", "pip", "install", "--no-deps", "-r", LIST)
        (libraries,) = folder.glob("lib/python*/site-packages/torch/lib")
        put_placeholders(libraries)
        call(python, "-c", "import torch; assert not torch.cuda.is_available()")
        (folder / ".complete").touch()
    return folder


def kernels_of(python: Path) -> type[AsyncKernelManager]:
    """Starts kernels of this interpreter, whatever kernels anybody has installed."""

    class Kernels(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=argv, language="python")

    return Kernels


@dataclass(frozen=True)
class Machine:
    """An environment that may be changed, a home with empty caches, and an empty folder."""

    python: Path
    home: Path
    content: Path

    @classmethod
    def like_colab(cls, folder: Path) -> "Machine":
        """A fresh one under `folder`. Raises Missing, saying what, where none can be made."""
        shutil.copytree(build(), folder / "venv", symlinks=True, copy_function=os.link)
        for name in ("home", "content"):
            (folder / name).mkdir()
        return cls(folder / "venv/bin/python", folder / "home", folder / "content")

    def environment(self) -> dict[str, str]:
        """Nothing of this checkout but git's redirect from the repository's address to it."""
        kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        path = f"{self.python.parent}{os.pathsep}{os.environ['PATH']}"
        kept |= {"PATH": path, "HOME": str(self.home), "OMP_WAIT_POLICY": "PASSIVE"}
        kept |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{ROOT}.insteadOf"}
        return kept | {"GIT_CONFIG_VALUE_0": PROJECT["urls"]["Repository"]}

    def packages(self) -> set[str]:
        """What pip says is installed, a line `name==version` each."""
        listed = call(self.python, "-m", "pip", "freeze", "--all", env=self.environment())
        return set(listed.splitlines())

    def run(self, notebook: Path, **parameters: object) -> nbformat.NotebookNode:
        """The executed notebook; `parameters` are typed into its cell, as Colab's users do."""
        book = nbformat.read(notebook, as_version=4)
        (cell,) = [c for c in book.cells if "parameters" in c.metadata.get("tags", [])]
        for name, value in parameters.items():
            cell.source, changed = re.subn(
                rf"(?m)^({name}: \S+ = ).*?(  #.*)$", rf"\g<1>{value!r}\g<2>", cell.source
            )
            assert changed == 1, f"{notebook} has no parameter {name}"
        nbformat.write(book, self.content / notebook.name)
        assert [path.name for path in self.content.iterdir()] == [notebook.name]
        options = {"kernel_manager_class": kernels_of(self.python), "allow_errors": False}
        options["resources"] = {"metadata": {"path": str(self.content)}}
        client = NotebookClient(book, timeout=900, **options)
        return client.execute(env=self.environment())
