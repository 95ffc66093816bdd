"""Whether a model fits a recipe's passes and exporters, found out before any tensor is read."""

from llmopt.optimizer.contracts import Exporter, QuantPass
from llmopt.optimizer.errors import UnsupportedError
from llmopt.optimizer.model import DECODERS_ONLY, Model, QuantWeight
from llmopt.optimizer.recipe import Recipe
from llmopt.optimizer.scheme import Scheme

__all__ = ["check_as_it_is", "check_model"]


def check_model(recipe: Recipe, model: Model) -> None:
    """Ask the passes, the targets and the exporters.

    Passes after the first are asked about names and widths; what passes before them make, when it is their turn.

    Raises:
        PassError: A pass refuses the model.
        UnsupportedError: A target cannot run what the recipe makes of the model, or an exporter cannot write it.
    """
    if model.is_encoder:
        _check_encoder(recipe, model)
    for step in recipe.passes[:1]:
        step.instance.requires(model)
    for step in recipe.passes[1:]:
        step.instance.fits(model)
    if not any(step.instance.dequantizes for step in recipe.passes):
        for item in recipe.export:
            check_as_it_is(model, item.instance)
    _check_modules(recipe, model)
    for item in recipe.export:
        item.instance.check(model)


def check_as_it_is(model: Model, exporter: Exporter) -> None:
    """Whether what is quantized in ``model`` can be written without quantizing it again.

    Raises:
        UnsupportedError: Naming the first linear that cannot.
    """
    experts = model.network.expert_linears
    for module in model.linears():
        weight = model.weights[model.weight_of(module)]
        if not isinstance(weight, QuantWeight):
            continue
        reason = exporter.refusal(weight.scheme, experts=module in experts, shape=weight.shape)
        if reason is not None:
            raise UnsupportedError(
                f"{module} is quantized to {weight.scheme.name} in the model: {reason}",
                hint="in a recipe, the pass dequantize before others quantizes it otherwise",
            )


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
    for i, step in enumerate(recipe.passes):
        if not isinstance(step.instance, QuantPass) or step.instance.leaves_floats:
            continue
        schemes = step.instance.schemes()
        for module, options in step.instance.possible(model).items():
            for option in options:
                if option in schemes:
                    _check_module(recipe, model, f"passes.{i}.{step.name}.{option}", module, schemes[option])


def _check_module(recipe: Recipe, model: Model, place: str, module: str, scheme: Scheme) -> None:
    shape, is_expert = model.weights[model.weight_of(module)].shape, module in model.network.expert_linears
    for item in recipe.export:
        reason = item.instance.refusal(scheme, experts=is_expert, shape=shape)
        if reason is not None:
            what = f"{module} is an expert" if is_expert else module
            hint = "leave experts out of that override, and the option experts decides about them"
            raise UnsupportedError(
                f"{place}: {what}: {reason}",
                hint=hint if is_expert else "give this module another scheme with overrides",
            )
