"""One row after the other: quantized in a process of its own, read back, judged; a failure is a result too.

What was finished is kept: a comparison of hours that was stopped goes on at the row it was in.
"""

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmopt.benchmarks.child import Finished, last_line, run
from llmopt.benchmarks.quantizers.judge import (
    Figures,
    Judge,
    Size,
    Theirs,
    size_of,
    with_our_weights,
    with_rounded_tables,
    with_their_weights,
)
from llmopt.benchmarks.quantizers.peers import PEERS, make_environment, run_peer
from llmopt.benchmarks.quantizers.rows import OURS, Row
from llmopt.benchmarks.quantizers.subject import Subject
from llmopt.optimizer.cache import digest_of, sources_digest
from llmopt.optimizer.checkpoint import as_floats, open_checkpoint
from llmopt.optimizer.errors import InputError, LlmoptError
from llmopt.optimizer.hf_config import read_json
from llmopt.optimizer.manifest import sha256_of
from llmopt.optimizer.quantized.reader import quantization_of, read_quantized

__all__ = ["Bench", "Result"]


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a row.

    Attributes:
        row: The row.
        program: As printed.
        finished: Time and memory of its process; None where none ran, or it failed.
        figures: None where it failed.
        size: None where it failed.
        error: The last line of what it said; None where it ran.
    """

    row: Row
    program: str
    finished: Finished | None = None
    figures: Figures | None = None
    size: Size | None = None
    error: str | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        row, size = self.row, self.size
        found: dict[str, Any] = {"row": row.name, "program": self.program, "method": row.method, "scheme": row.scheme}
        found |= {"passes": list(row.passes)} if row.program == OURS else {"options": dict(row.options)}
        found["error"] = self.error
        found["figures"] = None if self.figures is None else self.figures.plain()
        found["size"] = None if size is None else {**asdict(size), "bits_per_weight": size.bits_per_weight}
        if self.finished is not None:
            found |= {"seconds": self.finished.seconds, "peak_bytes": self.finished.peak_bytes}
        return found


@dataclass(frozen=True)
class Bench:
    """What the rows share.

    Attributes:
        subject: The model and the text.
        judge: Of all rows.
        windows: The calibration text, a NumPy file.
        folder: Where everything is written.
        threads: Of every process.
    """

    subject: Subject
    judge: Judge
    windows: Path
    folder: Path
    threads: int

    def result(self, row: Row) -> Result:
        """Run and judge a row, or read what came of it before; one that failed is tried again."""
        path = self.folder / "finished" / f"{self._key(row)}.json"
        if path.is_file():
            return _from_plain(row, json.loads(path.read_text("utf-8")))
        result = self._new(row)
        if result.error is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result.plain()), encoding="utf-8")
        return result

    def _key(self, row: Row) -> str:
        """Of everything that the figures depend on."""
        subject, windows = self.subject, sha256_of(self.windows)
        program = sources_digest() if row.program == OURS else PEERS[row.program].title
        return digest_of(
            [asdict(row), program, subject.model.source.digest, subject.text.digest, windows, self.threads]
        )

    def _new(self, row: Row) -> Result:
        program = _program(row)
        output, theirs = self.folder / "quantized" / row.name, None
        shutil.rmtree(output, ignore_errors=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            if row.program == OURS:
                finished = self._run_passes(row, output)
                model = with_our_weights(self.subject.model, output) if row.passes else self.subject.model
            else:
                finished = self._run_peer(row, output)
                theirs = _read(row, output)
                model = with_their_weights(self.subject.model, theirs)
            size = size_of(model, theirs)
            figures = self.judge.figures(with_rounded_tables(model) if row.rounds_head else model)
        except LlmoptError as error:
            return Result(row, program, error=last_line(error))
        finally:
            shutil.rmtree(output, ignore_errors=True)
        return Result(row, program, finished, figures, size)

    def _run_passes(self, row: Row, output: Path) -> Finished | None:
        if not row.passes:
            return None
        command = [sys.executable, "-m", "llmopt.benchmarks.quantizers.run_passes", json.dumps(row.passes)]
        command += ["--checkpoint", str(self.subject.checkpoint), "--windows", str(self.windows)]
        command += ["--output", str(output), "--threads", str(self.threads)]
        return run(command, log=output.with_name(f"{row.name}.log"), environment=_threads(self.threads))

    def _run_peer(self, row: Row, output: Path) -> Finished:
        python = make_environment(row.program, self.folder / "peers")
        return run_peer(
            python,
            row.program,
            row.options,
            checkpoint=self.subject.checkpoint,
            windows=self.windows,
            output=output,
            threads=self.threads,
        )


def _program(row: Row) -> str:
    return "llmopt" if row.program == OURS else PEERS[row.program].title


def _from_plain(row: Row, plain: Mapping[str, Any]) -> Result:
    """A row that did not fail, out of ``Result.plain``."""
    figures = {name: plain["figures"][name] for name in ("perplexity", "source_perplexity", "kl", "top1")}
    size = Size(plain["size"]["bits"], plain["size"]["weights"])
    finished = Finished("", plain["seconds"], plain["peak_bytes"]) if "seconds" in plain else None
    return Result(row, plain["program"], finished, Figures(**figures), size)


def _read(row: Row, output: Path) -> Theirs:
    """What another program wrote.

    Raises:
        InputError: It cannot be read, or nothing is packed.
    """
    tensors, bits = open_checkpoint(output), output / "bits.json"
    if bits.is_file() and (counted := json.loads(bits.read_text("utf-8"))):
        return Theirs(as_floats(tensors), counted)
    quantization = None if bits.is_file() else quantization_of(read_json(output / "config.json"), output)
    if quantization is None:
        raise InputError(f"{row.name}: the program packed no weight at all")
    return Theirs(read_quantized(tensors, quantization, output).weights)


def _threads(count: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(count)}
