"""transformers' module for a model, without memory for its weights, and with the tables that no checkpoint holds."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmopt.optimizer.errors import UnsupportedError
from llmopt.optimizer.model import Model

__all__ = ["Tables", "skeleton"]


def skeleton(model: Model, dtype: torch.dtype) -> Any:
    """The module that transformers makes for the model's config: parameters on the meta device, tables on the CPU.

    Raises:
        UnsupportedError: transformers has no such model type, or a table that it does not compute again.
    """
    kind = model.config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise UnsupportedError(f"transformers has no model type {kind!r}", hint="a newer transformers may have it")
    config = CONFIG_MAPPING[kind].from_dict(dict(model.config))
    # torch's fused attention has no cap of scores, and some versions of transformers leave the cap out silently.
    capped = any(layer.attention.softcap is not None for layer in model.decoder.layers)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="eager" if capped else "sdpa"
        )
    network.eval()
    for name, module in network.named_modules():
        _compute_tables(network, name, module)
    return network


def _compute_tables(network: Any, name: str, module: nn.Module) -> None:
    """Move the module's own buffers off the meta device, with the values transformers initializes them with."""
    buffers = dict(module.named_buffers(recurse=False))
    for key, buffer in buffers.items():
        unset = float("nan") if buffer.is_floating_point() else 0
        setattr(module, key, torch.full_like(buffer, unset, device="cpu"))
    if buffers:
        with torch.no_grad():
            network._init_weights(module)
    left = [key for key, buffer in module.named_buffers(recurse=False) if not _is_set(buffer)]
    if left:
        raise UnsupportedError(
            f"{network.config.model_type} keeps tables outside its checkpoint that transformers does not compute "
            f"again: {', '.join(f'{name}.{key}' for key in left)}",
            hint="llmopt judges engines by transformers, and cannot run this model in it",
        )


def _is_set(buffer: torch.Tensor) -> bool:
    return buffer.is_floating_point() and not bool(buffer.isnan().any())


class Tables:
    """The modules of a network that hold tables only, as they were at first.

    transformers' dynamic rope changes its frequencies with the longest sequence it has seen, and would compute a
    shorter one differently afterwards.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._modules = {
            name: copy.deepcopy(module)
            for name, module in network.named_modules()
            if list(module.named_buffers(recurse=False)) and not list(module.parameters())
        }

    def restore(self) -> None:
        """Forget what the network has seen."""
        for name, module in self._modules.items():
            self._network.set_submodule(name, copy.deepcopy(module))
