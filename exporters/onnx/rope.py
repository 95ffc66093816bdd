"""Rotary position embedding: the tables of cosines and sines an engine carries."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from llmopt.optimizer.errors import UnsupportedError

__all__ = ["SUPPORTED", "check_rope", "rope_tables"]

SUPPORTED = ("default", "linear", "llama3", "yarn")
"""Rope types whose frequencies do not depend on the length of the sequence."""


def check_rope(config: Mapping[str, Any]) -> None:
    """Raise ``UnsupportedError`` when the config's rope type cannot be exported."""
    rope_type = config["rope_parameters"].get("rope_type", "default")
    if rope_type not in SUPPORTED:
        raise UnsupportedError(
            f"rope type {rope_type!r} is not supported", hint=f"supported rope types: {', '.join(SUPPORTED)}"
        )


def rope_tables(config: Mapping[str, Any], positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of every position's angles.

    Angles are computed in float64 and rounded once: at position 8,000 a float32 product would be off by up to 5e-4.

    Args:
        config: The checkpoint's, with ``rope_parameters``.
        positions: How many.

    Returns:
        Two float32 arrays ``[positions, head_dim / 2]``, times the variant's attention factor.
    """
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config["rope_parameters"]
    rope_type = parameters.get("rope_type", "default")
    head_dim = config["head_dim"]
    if rope_type == "default":
        exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
        frequencies, factor = 1.0 / parameters["rope_theta"] ** exponents, 1.0
    else:
        hf_config = AutoConfig.for_model(**config)
        inverse, factor = ROPE_INIT_FUNCTIONS[rope_type](hf_config, "cpu")
        frequencies = inverse.double().numpy()
    angles = np.arange(positions, dtype=np.float64)[:, None] * frequencies[None]
    return (np.cos(angles) * factor).astype(np.float32), (np.sin(angles) * factor).astype(np.float32)
