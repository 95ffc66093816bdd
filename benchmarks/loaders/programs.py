"""The programs that load checkpoints."""

from collections.abc import Mapping
from pathlib import Path

from llmopt.benchmarks.peer import Peer
from llmopt.benchmarks.quantizers.peers import GPTQMODEL

__all__ = ["LOADERS", "OWN"]

_HERE = Path(__file__).parent

OWN = "transformers"
"""It runs in this very environment."""

LOADERS: Mapping[str, Peer] = {
    OWN: Peer("transformers", _HERE / "run_transformers.py", ()),
    "gptqmodel": Peer(
        "GPTQModel 7.7.0",
        _HERE / "run_gptqmodel.py",
        GPTQMODEL,
        alone=("gptqmodel==7.7.0",),
        environment={"GPTQMODEL_CPU_WORKERS": "2"},
    ),
}
