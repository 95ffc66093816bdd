"""Merges LoRA adapters into the weights, several at once, and into quantized weights too."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llmopt.optimizer.cache import digest_of
from llmopt.optimizer.contracts import PassContext, WeightPass
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.lora.adapter import Adapter, read_adapter
from llmopt.optimizer.lora.config import CONFIG_NAME, WEIGHTS_NAME, AdapterPath
from llmopt.optimizer.manifest import sha256_of
from llmopt.optimizer.model import DenseWeight, Model, QuantWeight, Weight
from llmopt.passes._combining import Combination, Method, Sign
from llmopt.passes._merged import merged_weights, untied
from llmopt.passes._preparing import refuse_quantized_cache
from llmopt.passes._requantizing import Requantizer, cost_of, linear_of, requantized, with_calibration

__all__ = ["MergeLora"]


class MergedAdapter(BaseModel):
    """One adapter and its share."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    path: AdapterPath = Field(description="A folder that PEFT's save_pretrained wrote, relative to the recipe.")
    weight: float = Field(1.0, description="What its changes are multiplied with; below 0 they are taken away.")


class MergeLora(WeightPass):
    """Add what adapters change to the weights, so that the engine is as fast as the base.

    LoRA, rsLoRA and DoRA in PEFT's files, with biases, tables, modules that were saved whole, and experts. Weights
    become float32, and quantized ones are rounded again to their own scheme: the record says what that costs. Source:
    Hu et al. 2021, LoRA, arXiv:2106.09685, section 4.1.
    """

    trained_on_source: ClassVar[bool] = True

    adapters: tuple[MergedAdapter, ...] = Field(min_length=1, description="What is merged.")
    combine: Method = Field(
        "linear",
        description="How several changes of a weight become one: their sum (linear), or only their largest elements "
        "(magnitude_prune), those that also agree in sign (ties), or random elements (dare_linear, dare_ties).",
    )
    density: float | None = Field(
        None, gt=0, le=1, description="Share of each change's elements that is kept, where combine is not linear."
    )
    majority_sign_method: Sign = Field(
        "total", description="The sign that ties and dare_ties keep: that of the sum, or the most frequent."
    )
    requantize: Requantizer = Field(
        "round_to_nearest",
        description="How weights that were quantized are rounded again; gptq and awq look at calibration text.",
    )

    @model_validator(mode="after")
    def _density_goes_with_pruning(self) -> "MergeLora":
        if self.combine != "linear" and self.density is None:
            raise ValueError(f"combine: {self.combine} needs a density; such as density: 0.5")
        if self.combine == "linear" and self.density is not None:
            raise ValueError("density is of no use to combine: linear; remove it, or choose another combine")
        return self

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]  # the class alone does not know
        """Whether weights are rounded again by what enters them."""
        return self.requantize != "round_to_nearest"

    @property
    def files(self) -> tuple[Path, ...]:
        """See ``WeightPass.files``."""
        return tuple(each.path.place / name for each in self.adapters for name in (CONFIG_NAME, WEIGHTS_NAME))

    def requires(self, model: Model) -> None:
        """See ``WeightPass.requires``. Reads the headers of the adapters.

        Raises:
            InputError: An adapter does not fit the model.
        """
        refuse_quantized_cache(model, "merge_lora")
        adapters = self._read(model)
        changed = {name for adapter in adapters for name in adapter.changes}
        if self.needs_calibration and not any(isinstance(model.weights.get(name), QuantWeight) for name in changed):
            raise PassError(
                f"requantize is {self.requantize}, and nothing that the adapters change is quantized",
                hint="remove it, and quantize behind merge_lora",
            )
        if model.bases:
            self._refuse_behind_others(adapters)

    def run(self, model: Model, context: PassContext) -> Model:
        """See ``WeightPass.run``. Records the adapters, and of weights that were rounded again what that cost."""
        adapters = self._read(model)
        self._describe(adapters, model, context)
        model, merged = self._merged(model, adapters, context)
        quantized = {name: each for name, each in merged.items() if isinstance(model.weights[name], QuantWeight)}
        floats = {name: each for name, each in merged.items() if name not in quantized}
        for done, name in enumerate(floats, start=1):
            model = model.with_weights(context.keep({name: floats[name]}))
            context.progress(done, len(merged))
        return self._requantized(model, quantized, context) if quantized else model

    def yardstick(self, source: Model, seed: int) -> Model:
        """See ``WeightPass.yardstick``. In float also what is quantized in ``source``; made when it is read."""
        model, merged = self._merged(source, self._read(source), PassContext(seed=seed))
        digest = digest_of([source.source.digest, self.model_dump(mode="json"), list(map(sha256_of, self.files)), seed])
        return replace(model.with_weights(merged), source=replace(source.source, digest=digest))

    def _merged(
        self, model: Model, adapters: list[Adapter], context: PassContext
    ) -> tuple[Model, Mapping[str, DenseWeight]]:
        """The model with a head of its own where it needs one, and every weight that adapters change."""
        combination = Combination(self.combine, self.density or 1.0, self.majority_sign_method, context.seed)
        weighted = [(option.weight, adapter) for option, adapter in zip(self.adapters, adapters, strict=True)]
        return untied(model, merged_weights(model, weighted, combination), context)

    def _read(self, model: Model) -> list[Adapter]:
        return [read_adapter(each.path.place, model) for each in self.adapters]

    def _refuse_behind_others(self, adapters: list[Adapter]) -> None:
        """Products of factors follow what passes did to the model; nothing else that an adapter may hold does."""
        for option, adapter in zip(self.adapters, adapters, strict=True):
            if self.combine != "linear" or not adapter.is_low_rank:
                what = (
                    f"combine: {self.combine}" if self.combine != "linear" else f"all that {option.path.text} changes"
                )
                raise PassError(
                    f"the model was rotated or scaled, and {what} needs the weights that the adapters were trained on",
                    hint="put merge_lora in front of all other passes",
                )

    def _describe(self, adapters: list[Adapter], model: Model, context: PassContext) -> None:
        for option, adapter in zip(self.adapters, adapters, strict=True):
            text, config = option.path.text, adapter.config
            kind = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
            context.note(f"{text}: {kind} of rank {config.r}, changes {len(adapter.changes)} weights")
            if (other := adapter.other_base(model.source.spec)) is not None:
                context.note(f"{text} says that it was trained on {other}; its shapes fit {model.source.spec}")
        context.note("the build is measured against the source model with this in it")
        context.detail("files", list(map(sha256_of, self.files)))

    def _requantized(self, model: Model, merged: Mapping[str, DenseWeight], context: PassContext) -> Model:
        """The model with the merged weights, rounded as they were in ``model``."""
        changed: dict[str, Weight] = {}
        if self.requantize != "round_to_nearest":
            changed |= with_calibration(model, merged, self.requantize, context)
        errors: dict[str, float] = {}
        shares: dict[str, float] = {}
        for done, (name, weight) in enumerate(merged.items(), start=1):
            base, values, module = model.weights[name], weight.dense(), linear_of(model, name)
            assert isinstance(base, QuantWeight)
            if name not in changed:
                changed |= context.keep({name: requantized(base, values)})
            errors[module], shares[module] = cost_of(base, values, changed[name])
            context.progress(done, len(merged))
        context.detail("errors", errors)
        context.detail("adapter_kept", shares)
        worst, least = max(errors, key=errors.__getitem__), min(shares, key=shares.__getitem__)
        context.note(
            f"{len(errors)} weights were rounded again by {self.requantize}: against the float merge they differ by "
            f"{sum(errors.values()) / len(errors):.2%} in the mean, {errors[worst]:.2%} at most ({worst}); of the "
            f"adapters' change {sum(shares.values()) / len(shares):.1%} is kept, {shares[least]:.1%} at least ({least})"
        )
        return model.with_weights(changed)
