"""What enters the linears of a model while it runs, also those of experts, which transformers computes together."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from llmopt.calibration.reference import Reference
from llmopt.optimizer.decoder import Experts
from llmopt.optimizer.errors import PassError

__all__ = ["Observer", "finite_rows", "observing"]

Observer = Callable[[str, Tensor], None]
"""Called with a linear's module name and what enters it, float32 ``[rows, in]``, in the order of the tokens."""


def finite_rows(module: str, rows: Tensor) -> Tensor:
    """``rows``, what an observer was shown of ``module``.

    Raises:
        PassError: A value is not finite.
    """
    if not rows.isfinite().all():
        raise PassError(
            f"what enters {module} has values that are not finite",
            hint="the model overflows on the calibration text, or its weights are damaged",
        )
    return rows


@contextmanager
def observing(
    reference: Reference, modules: Iterable[str], observer: Observer, *, mask: Tensor | None = None
) -> Iterator[None]:
    """Have ``observer`` see what the weights of ``modules`` multiply each time they run: behind an online rotation, and
    rounded where the model rounds it already.

    An expert is observed when its mixture runs, whether or not a row reached it.

    Args:
        reference: What runs.
        modules: Linears of decoder layers, by our names.
        observer: See ``Observer``.
        mask: bool ``[n, t]``, false where a token is padding, which is not observed; None: there is none.
    """
    wanted = set(modules)
    with ExitStack() as hooks:
        for layer in reference.model.decoder.layers:
            mlp = layer.mlp
            if isinstance(mlp, Experts) and not wanted.isdisjoint(mlp.linears):
                observed = _Mixture(mlp, wanted, observer, mask)
                handle = _mixture_module(reference, mlp).register_forward_pre_hook(observed, with_kwargs=True)
                hooks.callback(handle.remove)
                wanted -= set(mlp.linears)
        for name in wanted:
            hook = _linear_hook(name, observer, mask)
            hooks.callback(reference.module(name).register_forward_pre_hook(hook).remove)
        yield


def _linear_hook(name: str, observer: Observer, mask: Tensor | None) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        rows = inputs[0].reshape(-1, inputs[0].shape[-1])
        observer(name, rows if mask is None else rows[mask.reshape(-1)])

    return hook


def _mixture_module(reference: Reference, mlp: Experts) -> nn.Module:
    """The module that holds a layer's experts: in transformers the router's sibling."""
    return reference.module(f"{mlp.router.rpartition('.')[0]}.experts")


class _Mixture:
    """A hook before transformers' module of a layer's experts: who gets which tokens, and what enters each linear."""

    def __init__(self, mlp: Experts, wanted: set[str], observer: Observer, mask: Tensor | None) -> None:
        self._mlp = mlp
        self._wanted = frozenset(wanted)
        self._mask = mask
        self._observer = observer

    def __call__(self, module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden, chosen = (*inputs, *named.values())[:2]
        rows = hidden.reshape(-1, hidden.shape[-1])
        chosen = chosen.reshape(len(rows), -1)
        if self._mask is not None:
            rows, chosen = rows[self._mask.reshape(-1)], chosen[self._mask.reshape(-1)]
        for expert, (gate, up, down) in enumerate(self._mlp.experts):
            reached = rows[(chosen == expert).any(dim=-1)]
            for linear in (gate, up):
                if linear in self._wanted:
                    self._observer(linear, reached)
            if down in self._wanted:
                gated, upped = functional.linear(reached, module.gate_up_proj[expert]).chunk(2, dim=-1)
                self._observer(down, module.act_fn(gated) * upped)
