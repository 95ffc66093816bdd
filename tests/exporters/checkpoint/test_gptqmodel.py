"""GPTQ and AWQ checkpoints in their real loader, GPTQModel.

It is installed in an environment of its own for this, which takes minutes, so these tests run only when asked for:
``LLMOPT_GPTQMODEL=1 pytest -m gptqmodel``. The environment is kept in ``out/bench/loaders/gptqmodel``.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmopt.benchmarks.loaders.programs import LOADERS
from llmopt.benchmarks.peer import installed, run_script
from llmopt.calibration.reference import Reference
from llmopt.exporters.checkpoint.exporter import Checkpoint
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.sources import load_model
from llmopt.passes.round_to_nearest import RoundToNearest

pytestmark = [
    pytest.mark.gptqmodel,
    pytest.mark.skipif(os.environ.get("LLMOPT_GPTQMODEL") != "1", reason="installs GPTQModel: LLMOPT_GPTQMODEL=1"),
]

IDS = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def python() -> Path:
    folder = Path("out/bench/loaders")
    folder.mkdir(parents=True, exist_ok=True)
    return installed(LOADERS["gptqmodel"], folder / "gptqmodel")


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("gptq", {"scheme": "W4A16", "group_size": 32}),
        ("gptq", {"scheme": "W8A16", "group_size": 32}),
        ("gptq_v2", {"scheme": "W4A16_ASYM", "group_size": 32}),
        ("gptq_v2", {"scheme": "W4A16", "group_size": 32}),
        ("awq", {"scheme": "W4A16_ASYM", "group_size": 32}),
        ("awq", {"scheme": "W4A16", "group_size": 32}),
    ],
    ids=str,
)
def test_it_computes_what_the_reference_does(form: Any, options, python: Path, llama_of, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "tie_word_embeddings": False}
    source = load_model(str(llama_of(dtype="float16", **sizes)), cache=tmp_path / "cache")
    made = RoundToNearest(head="none", **options).run(source, PassContext())
    Checkpoint(format=form).write(made, tmp_path / "it", PassContext())
    np.save(tmp_path / "ids.npy", IDS.numpy())
    given = {"path": str(tmp_path / "it"), "ids": str(tmp_path / "ids.npy"), "format": form}
    run_script(python, LOADERS["gptqmodel"], given, output=tmp_path / "logits.npy", threads=1)
    written = load_model(str(tmp_path / "it"), cache=tmp_path / "cache")
    ours = Reference(written).logits(IDS)
    found = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    # It computes in float16, of 11 bits, through three layers.
    assert (found - ours).abs().max() < 0.02 * ours.std()
    assert (Reference(source).logits(IDS) - ours).abs().max() > 0.1 * ours.std()
