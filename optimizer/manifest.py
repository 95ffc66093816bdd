"""What a build directory says about itself: ``manifest.json``, deterministic, and read by everything that uses a build.

Times, memory and host facts go to ``build-record.json``, so that two builds of one recipe have equal manifests.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmopt.optimizer.errors import InputError, VerificationError
from llmopt.optimizer.pooling import PoolingMode

__all__ = [
    "LORA_FEATURE",
    "MANIFEST_NAME",
    "SCHEMA",
    "CalibrationEntry",
    "Checkpoint",
    "EncoderEngine",
    "Engine",
    "FileEntry",
    "GateResult",
    "Layer",
    "LoraModule",
    "LoraSlots",
    "Manifest",
    "Measurement",
    "PassRecord",
    "SourceEntry",
    "TensorInfo",
    "Verdict",
    "sha256_of",
]

MANIFEST_NAME = "manifest.json"
SCHEMA = 1

LORA_FEATURE = "lora"
"""The feature of an engine whose sequences choose among adapters."""


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorInfo(_Entry):
    """One input or output of an engine; a dimension is a size or the name of one that varies."""

    name: str
    dtype: str
    dims: list[int | str]


class LoraModule(_Entry):
    """A linear that adapters may change; where its factors lie in an adapter's, in float32 numbers.

    ``down`` is ``[max_rank, inputs]``, ``up`` ``[max_rank, outputs]``, and behind it lies a bias ``[outputs]`` where
    the linear is ``biased``.
    """

    name: str
    inputs: int
    outputs: int
    down: int
    up: int
    biased: bool = Field(False, description="Whether adapters need a bias here, since a norm's bias was folded in.")


class LoraSlots(_Entry):
    """Which adapters an engine takes: the feature ``lora``."""

    max_rank: int
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Of factors in memory; files have float32.")
    slots: int = Field(description="Adapters in memory at the same time; 1 to slots, and 0 is none.")
    modules: list[LoraModule]

    @property
    def size(self) -> int:
        """Numbers of an adapter in memory, most of which a smaller rank leaves out."""
        last = self.modules[-1]
        return last.up + (self.max_rank + last.biased) * last.outputs


class Engine(_Entry):
    """What the runtime binds by. Version 1 of the contract is in docs/architecture.md."""

    exporter: str
    target: str
    path: str = Field(description="Relative to the build directory.")
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]
    num_layers: int
    kv_heads: int
    head_dim: int
    kv_dtype: str
    kv_layout: Literal["slots"] = "slots"
    vocab_size: int
    capacity: int = Field(description="The longest sequence, in tokens: the slot size may be anything up to it.")
    slots: int | None = Field(None, description="Most sequences in one decode call; null: any number.")
    max_chunk: int = Field(description="Most tokens in one prefill call.")
    min_chunk: int = Field(description="Fewest tokens in a prefill call that keep results bit-exact.")
    batch_invariant: bool = Field(
        True, description="Whether a row's results are the same bits whatever else is in its batch."
    )
    features: list[str] = []
    lora: LoraSlots | None = Field(None, description="Null where adapters cannot be added.")
    compiled: dict[str, str] = Field(
        {},
        description="What was compiled from the graph in path, by GPU, as sm89: files relative to the build directory.",
    )


class EncoderEngine(_Entry):
    """An engine that makes vectors of texts: ids and mask in, vectors out. The contract is in docs/encoders.md."""

    exporter: str
    target: str
    path: str = Field(description="Relative to the build directory; its folder is one of sentence-transformers.")
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]
    num_layers: int
    hidden_size: int
    vocab_size: int
    capacity: int = Field(description="What longer texts are cut to, in tokens, special ones included.")
    slots: int | None = Field(None, description="Most texts in one call; None: any number.")
    pad_token: int = Field(description="The id that stands where a text has no token.")
    pooling: PoolingMode = Field(description="How the tokens' vectors become one; see optimizer/pooling.py.")
    normalize: bool = Field(description="Whether vectors have length 1.")
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="What floats are computed in.")
    prompts: dict[str, str] = Field({}, description="What texts are read behind, by name.")
    default_prompt: str | None = Field(None, description="The name of the prompt where a caller names none.")
    features: list[str] = []
    compiled: dict[str, str] = Field({}, description="As of ``Engine``.")


class Checkpoint(_Entry):
    """A checkpoint that other programs load."""

    path: str = Field(description="Of its folder, relative to the build directory.")
    format: str = Field(description="As the recipe calls it.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(description="Of weights in float and of scales.")
    notes: list[str] = Field([], description="What is not as the passes left it.")


class PassRecord(_Entry):
    """What one pass did."""

    name: str
    options: dict[str, Any] = {}
    changed: bool
    notes: list[str] = []
    fallbacks: list[str] = []
    details: dict[str, Any] = {}


class Layer(_Entry):
    """One linear layer of the built model."""

    name: str
    shape: list[int]
    scheme: str
    bytes: int
    error: float | None = Field(None, description="Relative Frobenius norm of the weight's change.")


class Measurement(_Entry):
    """One metric of the engine against the source model, and the tokens it was taken on."""

    metric: str
    value: float
    source: float | None = Field(None, description="The source model's own value, for perplexity.")
    data: str = Field(description="Name of the text, or 'sampled' for text sampled from the source model.")
    data_digest: str
    tokens: int


class GateResult(_Entry):
    """One ``accept:`` entry, judged."""

    gate: dict[str, Any]
    value: float
    passed: bool


class Verdict(_Entry):
    """``accepted`` when every gate passed; ``unjudged`` when the recipe has none."""

    status: Literal["accepted", "rejected", "unjudged"]
    gates: list[GateResult] = []
    proxy: str | None = Field(
        None, description="What was measured in the engine's place; null: the engine itself, or the model without one."
    )


class SourceEntry(_Entry):
    """The model a build was made from."""

    spec: str
    digest: str
    files: dict[str, str]
    notes: list[str] = Field([], description="What of the files is not in the model.")


class CalibrationEntry(_Entry):
    """The text that passes looked at."""

    name: str = Field(description="The source as in the recipe, or 'sampled' for text sampled from the source model.")
    digest: str = Field(description="sha256 of the source's file, or of the sampled tokens.")
    samples: int
    tokens: int
    packing: Literal["concat", "pad"]
    seed: int

    def describe(self) -> str:
        """The entry in words."""
        cut = "" if self.packing == "concat" else ", one document each"
        return f"{self.name}: {self.samples} windows of {self.tokens} tokens{cut}, seed {self.seed}"


class FileEntry(_Entry):
    """Size and digest of a file of the build."""

    bytes: int
    sha256: str


class Manifest(_Entry):
    """The whole of ``manifest.json``."""

    schema_number: int = SCHEMA
    llmopt: str
    versions: dict[str, str]
    source: SourceEntry
    recipe: dict[str, Any]
    architecture: str
    calibration: CalibrationEntry | None = Field(None, description="None where no pass looked at text.")
    layers: list[Layer]
    sizes: dict[str, dict[str, int]] = Field({}, description="Part of the model -> scheme or dtype -> bytes.")
    passes: list[PassRecord]
    graph_passes: dict[str, list[PassRecord]] = {}
    engines: list[Engine] = Field([], description="Of decoders.")
    encoders: list[EncoderEngine] = []
    checkpoints: list[Checkpoint] = []
    measurements: list[Measurement] = []
    verdict: Verdict
    files: dict[str, FileEntry] = {}

    def bytes_of(self, engine: Engine | EncoderEngine) -> int:
        """What an engine takes on the disk where it is executed: its folder, or the largest file compiled of it.

        0 as long as no files are listed.
        """
        if engine.compiled:
            return max((self.files[path].bytes for path in engine.compiled.values() if path in self.files), default=0)
        folder = engine.path.rpartition("/")[0]
        return sum(entry.bytes for name, entry in self.files.items() if name.startswith(f"{folder}/"))

    @property
    def all_engines(self) -> list[Engine | EncoderEngine]:
        """Of decoders and of encoders."""
        return [*self.engines, *self.encoders]

    def save(self, directory: Path) -> None:
        """Write ``manifest.json``."""
        text = json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True)
        (directory / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(directory: Path, *, verify: bool = False) -> "Manifest":
        """Read and check a build directory.

        Args:
            directory: The build.
            verify: Whether to compare every file's sha256 as well; sizes are always compared.

        Raises:
            InputError: No build there, or one of another schema.
            VerificationError: A file is missing or is not what the manifest says.
        """
        path = directory / MANIFEST_NAME
        if not path.is_file():
            raise InputError(f"{directory} is not a build: it has no {MANIFEST_NAME}", hint="make one: llmopt build")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise VerificationError(f"{path} is damaged: {error}", hint="build it again") from error
        found = data.get("schema_number") if isinstance(data, dict) else None
        if found != SCHEMA:
            raise InputError(
                f"{path} has schema {found}, this llmopt reads {SCHEMA}", hint="build it again with this version"
            )
        try:
            manifest = Manifest.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise VerificationError(f"{path} is damaged: {where}: {first['msg']}", hint="build it again") from error
        manifest.check_files(directory, digests=verify)
        return manifest

    def check_files(self, directory: Path, *, digests: bool) -> None:
        """Compare sizes, and with ``digests`` contents, of all files listed with those in ``directory``.

        Raises:
            VerificationError: Naming every file that differs.
        """
        wrong = []
        for name, entry in self.files.items():
            path = directory / name
            if not path.is_file():
                wrong.append(f"{name} is missing")
            elif path.stat().st_size != entry.bytes:
                wrong.append(f"{name} has {path.stat().st_size} bytes instead of {entry.bytes}")
            elif digests and sha256_of(path) != entry.sha256:
                wrong.append(f"{name} was changed: its sha256 is not the manifest's")
        if wrong:
            raise VerificationError(
                f"{directory} was changed: {'; '.join(wrong)}", hint="build it again, or restore it"
            )


def sha256_of(path: Path) -> str:
    """sha256 of a file's contents, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
