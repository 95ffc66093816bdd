"""Whether a model fits a recipe's passes and exporters, found out before any tensor is read."""

from llmopt.optimizer.contracts import QuantPass
from llmopt.optimizer.errors import UnsupportedError
from llmopt.optimizer.model import DECODERS_ONLY, Model
from llmopt.optimizer.recipe import Recipe

__all__ = ["check_model"]


def check_model(recipe: Recipe, model: Model) -> None:
    """Ask the first pass, the targets and the exporters; passes after the first are asked when it is their turn.

    Raises:
        PassError: The first pass refuses the model.
        UnsupportedError: A target cannot run what the recipe makes of the model, or an exporter cannot write it.
    """
    if model.is_encoder:
        _check_encoder(recipe, model)
    for step in recipe.passes[:1]:
        step.instance.requires(model)
    _check_modules(recipe, model)
    for item in recipe.export:
        item.instance.check(model)


def _check_encoder(recipe: Recipe, model: Model) -> None:
    """Refuse what is made for decoders, by its place in the recipe."""
    named = [(f"passes.{i}.{each.name}", each.instance.for_encoders) for i, each in enumerate(recipe.passes)]
    named += [(f"export.{i}.{each.name}", each.instance.for_encoders) for i, each in enumerate(recipe.export)]
    for where, takes_encoders in named:
        if not takes_encoders:
            what = f"{where} is for decoders, and {model.source.spec} is an encoder ({model.family.name})"
            raise UnsupportedError(what, hint=DECODERS_ONLY)
    for i, step in enumerate(recipe.passes):
        if step.instance.needs_calibration:
            raise UnsupportedError(
                f"passes.{i}.{step.name}: input scales that are known in advance come from text that a decoder reads",
                hint="for an encoder take W8A8, whose scales are found per token while it runs",
            )


def _check_modules(recipe: Recipe, model: Model) -> None:
    """Experts run fewer schemes than linears do, some schemes need certain widths, and only the model shows them."""
    experts = model.network.expert_linears
    for i, step in enumerate(recipe.passes):
        if not isinstance(step.instance, QuantPass):
            continue
        schemes, deciding = step.instance.schemes(), step.instance.deciding(model)
        for module, option in deciding.items():
            if option not in schemes:
                continue
            shape, is_expert = model.weights[model.weight_of(module)].shape, module in experts
            for item in recipe.export:
                reason = item.instance.refusal(schemes[option], experts=is_expert, shape=shape)
                if reason is not None:
                    what = f"{module} is an expert" if is_expert else module
                    hint = "leave experts out of that override, and the option experts decides about them"
                    raise UnsupportedError(
                        f"passes.{i}.{step.name}.{option}: {what}: {reason}",
                        hint=hint if is_expert else "give this module another scheme with overrides",
                    )
