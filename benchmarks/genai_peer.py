"""Makes the peer: onnxruntime-genai in an environment of its own, and the model built by its own builder."""

import shutil
import sys
from importlib.metadata import version
from pathlib import Path

from llmopt.benchmarks.child import run
from llmopt.benchmarks.plain_checkpoint import write_checkpoint
from llmopt.benchmarks.report import say
from llmopt.optimizer.cache import publish
from llmopt.optimizer.model import Model

__all__ = ["GENAI_VERSION", "genai_python", "make_peer"]

GENAI_VERSION = "0.18.0"

_FOLDER = Path("peers/genai")

_SHARED = ("onnxruntime", "onnx", "onnx-ir", "torch", "transformers", "numpy")
"""What the builder uses too, installed in our own versions: the same ONNX Runtime then runs both engines."""


def make_peer(model: Model, out: Path, *, precision: str = "int4") -> Path:
    """The folder with onnxruntime-genai's model.onnx for the CPU, with its builder's default options.

    Args:
        model: What to build.
        out: Everything is made below ``peers/genai`` in it, once; delete that folder to make it anew.
        precision: The builder's ``-p``.

    Raises:
        ChildError: The installation or the builder failed.
    """
    root = out / _FOLDER
    built = root / f"{precision}-{model.source.digest[:12]}"
    if built.is_dir():
        return built
    python = genai_python(out)
    checkpoint = write_checkpoint(model, root / "checkpoint")
    say(f"building the peer's {precision} engine")
    with publish(built) as partial:
        command = [str(python), "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(partial)]
        run([*command, "-p", precision, "-e", "cpu", "-c", str(root / "cache")], log=root / "builder.log")
    shutil.rmtree(checkpoint)
    return built


def genai_python(out: Path) -> Path:
    """The Python of the peer's environment, made once.

    Raises:
        ChildError: The installation failed.
    """
    directory = out / _FOLDER / f"env-{GENAI_VERSION}"
    python = directory / "bin" / "python"
    done = directory / "installed"
    if not done.is_file():
        say(f"installing onnxruntime-genai {GENAI_VERSION} in {directory}")
        run([sys.executable, "-m", "venv", "--clear", str(directory)], log=directory.with_name("venv.log"))
        shared = [f"{name}=={version(name).partition('+')[0]}" for name in _SHARED]
        install = [str(python), "-m", "pip", "install", "--quiet", f"onnxruntime-genai=={GENAI_VERSION}", *shared]
        run(install, log=directory.with_name("pip.log"))
        done.touch()
    return python
