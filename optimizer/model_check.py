"""Whether a model fits a recipe's passes and exporters, found out before any tensor is read."""

from llmopt.optimizer.contracts import QuantPass
from llmopt.optimizer.errors import UnsupportedError
from llmopt.optimizer.model import Model
from llmopt.optimizer.recipe import Recipe

__all__ = ["check_model"]


def check_model(recipe: Recipe, model: Model) -> None:
    """Ask the first pass, the targets and the exporters; passes after the first are asked when it is their turn.

    Raises:
        PassError: The first pass refuses the model.
        UnsupportedError: A target cannot run what the recipe makes of the model, or an exporter cannot write it.
    """
    for step in recipe.passes[:1]:
        step.instance.requires(model)
    _check_experts(recipe, model)
    for item in recipe.export:
        item.instance.check(model)


def _check_experts(recipe: Recipe, model: Model) -> None:
    """Experts run fewer schemes than linears do, and only the model shows which modules an override means."""
    targets = [target for item in recipe.export for target in item.instance.targets()]
    experts = model.decoder.expert_linears
    for i, step in enumerate(recipe.passes):
        if not isinstance(step.instance, QuantPass):
            continue
        schemes, deciding = step.instance.schemes(), step.instance.deciding(model)
        for module in deciding:
            scheme = schemes.get(deciding[module]) if module in experts else None
            reasons = [] if scheme is None else [target.refusal(scheme, experts=True) for target in targets]
            for reason in filter(None, reasons):
                raise UnsupportedError(
                    f"passes.{i}.{step.name}.{deciding[module]}: {module} is an expert: {reason}",
                    hint="leave experts out of that override, and the option experts decides about them",
                )
