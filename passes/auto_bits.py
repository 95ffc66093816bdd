"""Chooses each module's scheme by what it costs in accuracy, within a budget, and has another pass quantize."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, PositiveInt, field_validator

from llmopt.calibration.input_maxima import input_maxima
from llmopt.calibration.sensitivity import Part, sensitivities, shortened
from llmopt.optimizer.assignment import Kept, Override, SchemeQuantPass
from llmopt.optimizer.cache import publish
from llmopt.optimizer.contracts import PassContext, QuantPass
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import Model
from llmopt.optimizer.scheme import Scheme, SchemeOption, name_of
from llmopt.passes._budget import Budget, Costs, Times
from llmopt.passes._candidates import Candidate, Method
from llmopt.passes._linear_times import refuse_untimed
from llmopt.passes._scheme_search import SchemeSearch, by_part, parts_of

__all__ = ["AutoBits"]

_TIMES = "times"


def _from_name(value: object) -> object:
    return {"scheme": value} if isinstance(value, str) else value


def _with_options(value: object) -> object:
    return {value: {}} if isinstance(value, str) else value


class AutoBits(QuantPass):
    """Give each module one of several schemes, so that the sum of what they cost in accuracy is least.

    What a scheme costs is measured: the KL divergence of the predictions on calibration text while only that module is
    rounded to nearest in it. The sum of these predicts what all of them lose together, the quantizer's gains aside.
    """

    needs_calibration: ClassVar[bool] = True

    budget: Budget = Field(description="What may be spent: bits, bytes or milliseconds.")
    candidates: tuple[
        Annotated[Candidate, BeforeValidator(_from_name, json_schema_input_type=str | Candidate)], ...
    ] = Field(
        min_length=2,
        description="The schemes to choose from, by name or with a group_size; none leaves modules in float.",
    )
    method: Annotated[Method, BeforeValidator(_with_options, json_schema_input_type=str | Method)] = Field(
        description="The quantizing pass and its options, as in gptq: {damping: 0.05}."
    )
    group: Literal["stage", "linear"] = Field(
        "stage",
        description="What gets one scheme: stage, linears that read the same input, which an engine then packs into "
        "one; or each linear by itself. Experts of a layer always share theirs.",
    )
    tokens: PositiveInt = Field(
        1024, description="Tokens of the calibration text that sensitivities are measured on, in windows of 256."
    )
    head: SchemeOption | Kept | None = Field(
        None,
        description="The output head's scheme, outside a budget of bits or milliseconds; none keeps it in float. "
        "Omitted: as the method chooses for the first scheme among the candidates.",
    )
    overrides: tuple[Override, ...] = Field(
        (), description="Schemes of some modules, which are then not searched; the first match wins."
    )

    @field_validator("candidates")
    @classmethod
    def _candidates_differ(cls, value: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
        names = [name_of(each.sized) for each in value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{twice} is given twice")
        return value

    @property
    def files(self) -> tuple[Path, ...]:
        """See ``WeightPass.files``: the method may be another distribution's."""
        file = self._quantizer(self._first).defined_in
        return () if file is None else (file,)

    @property
    def _schemes(self) -> dict[str, Scheme]:
        """Those of the candidates that are schemes, by their option; two candidates differ, so there is one."""
        found = {f"candidates.{i}": each.sized for i, each in enumerate(self.candidates)}
        return {option: scheme for option, scheme in found.items() if scheme is not None}

    @property
    def _first(self) -> Scheme:
        return next(iter(self._schemes.values()))

    def schemes(self) -> dict[str, Scheme]:
        """See ``QuantPass.schemes``."""
        fixed = self._quantizer(self._first).schemes()
        return self._schemes | {path: scheme for path, scheme in fixed.items() if path not in ("scheme", "experts")}

    def deciding(self, model: Model) -> dict[str, str]:
        """See ``QuantPass.deciding``. Of several candidates, the first scheme that fits stands for all."""
        fixed = self._quantizer(self._first).deciding(model)
        experts = model.decoder.expert_linears
        first = next(iter(self._schemes))
        weight_only = next((f"candidates.{i}" for i, each in enumerate(self.candidates) if each.suits_experts), first)
        searched = {module: weight_only if module in experts else first for module in fixed}
        return {
            module: option if option == "head" or option.startswith("overrides.") else searched[module]
            for module, option in fixed.items()
        }

    def possible(self, model: Model) -> dict[str, tuple[str, ...]]:
        """See ``QuantPass.possible``: experts get candidates that leave inputs in float."""
        experts = model.decoder.expert_linears
        every = tuple(f"candidates.{i}" for i in range(len(self.candidates)))
        weight_only = tuple(option for option, each in zip(every, self.candidates, strict=True) if each.suits_experts)
        return {
            module: (weight_only if module in experts else every) if option.startswith("candidates.") else (option,)
            for module, option in self.deciding(model).items()
        }

    def fits(self, model: Model) -> None:
        """See ``WeightPass.fits``. A budget of bits that no choice fits is refused here."""
        if self._quantizer(self._first).leaves_floats:
            raise PassError(
                "method only prepares weights, and leaves them in float", hint="give that pass before auto_bits instead"
            )
        if self.budget.kind == "milliseconds":
            for scheme in (*self._schemes.values(), *(each.scheme for each in self.overrides)):
                refuse_untimed(None if scheme == "none" else scheme)
        for scheme in self._schemes.values():
            self._quantizer(scheme).fits(model)
        parts = self._parts(model)
        if not parts:
            raise PassError("overrides decide about every linear", hint="leave some of them to auto_bits")
        if empty := next((part for part in parts if not part.schemes), None):
            raise PassError(
                f"{empty.modules[0]} is an expert, and every candidate quantizes activations",
                hint="add a candidate that does not, such as W8A16, or none",
            )
        if self.budget.kind == "bits":
            self._search(model, parts).check()

    def requires(self, model: Model) -> None:
        """See ``WeightPass.requires``. A budget of bytes that no choice fits is refused here."""
        super().requires(model)
        self._quantizer(self._first).requires(model)
        if self.budget.kind == "bytes":  # of which the tables are part, whether or not they are tied
            self._search(model, self._parts(model)).check()

    def run(self, model: Model, context: PassContext) -> Model:
        """See ``WeightPass.run``. Records sensitivities, the table of budgets and what the method records."""
        parts = self._parts(model)
        search = self._search(model, parts, threads=context.threads, times=_measured_times(context.work))
        if self.budget.kind == "milliseconds":
            _keep_times(context.work, search.costs.times)
            search.check()
            context.detail("milliseconds", search.costs.times)
            context.note("chosen by times measured on this machine: another one may choose otherwise")
        maxima = self._maxima(model, parts, context)
        text = shortened(context.calibration(), self.tokens)
        losses = sensitivities(
            model,
            parts,
            text,
            maxima=maxima,
            threads=context.threads,
            directory=context.shared("sensitivities", text[0].tolist(), text[1].tolist()),
            progress=_share(context, 20 if maxima else 0, 50),
        )
        chosen = search.choose(losses)
        context.detail("sensitivities", by_part(parts, losses))
        context.detail("predicted_kl", search.loss(chosen, losses))
        context.detail("pareto", search.table(losses, chosen))
        for line in search.lines(losses, chosen):
            context.note(line)
        return self._quantized(model, context, dict(zip(parts, chosen, strict=True)))

    def _maxima(self, model: Model, parts: Sequence[Part], context: PassContext) -> dict[str, float]:
        """What enters linears that may get a static scale of their inputs, in the float model on the whole text."""
        modules = [
            module
            for part in parts
            if any(scheme is not None and scheme.needs_input_scale for scheme in part.schemes)
            for module in part.modules
        ]
        if not modules:
            return {}
        return input_maxima(model, modules, context, progress=_share(context, 0, 20))

    def _quantized(self, model: Model, context: PassContext, chosen: Mapping[Part, Scheme | None]) -> Model:
        """What the method makes of the choice."""
        found = tuple(
            Override(match=module, scheme=scheme or "none")
            for part, scheme in chosen.items()
            for module in part.modules
        )
        quantizer = self._quantizer(self._first, *found)
        work = None if context.work is None else context.work / "method"
        return quantizer.run(model, replace(context, work=work, progress=_share(context, 50, 100)))

    def _quantizer(self, scheme: Scheme, *found: Override) -> SchemeQuantPass:
        """The method with one scheme for everything that the overrides, and then ``found``, do not decide about."""
        head = self.head
        if head is None:
            head = self.method.made(scheme=self._first).schemes().get("head", "none")
        return self.method.made(scheme=scheme, head=head, overrides=(*self.overrides, *found))

    def _parts(self, model: Model) -> list[Part]:
        """What is searched, in data order."""
        schemes = tuple(each.sized for each in self.candidates)
        fixed = {name for name in model.linears() if any(each.matches(name) for each in self.overrides)}
        return parts_of(model, schemes, fixed, by_linear=self.group == "linear")

    def _search(
        self, model: Model, parts: list[Part], *, threads: int | None = None, times: Times = MappingProxyType({})
    ) -> SchemeSearch:
        quantizer = self._quantizer(self._first)
        assigned = quantizer.assign(model)
        costs = Costs(self.budget, model, assigned.get(model.arch.head), threads=threads, times=times)
        searched = {module for part in parts for module in part.modules}
        fixed = {module: assigned.get(module) for module in model.linears()[:-1] if module not in searched}
        return SchemeSearch(self.budget, costs, parts, fixed)


def _measured_times(work: Path | None) -> Times:
    """What a build that was killed had measured: with other times, layers that it finished might get other schemes."""
    if work is None or not (work / _TIMES).is_dir():
        return {}
    times: Times = json.loads((work / _TIMES / "times.json").read_text(encoding="utf-8"))
    return times


def _keep_times(work: Path | None, times: Times) -> None:
    if work is not None and not (work / _TIMES).is_dir():
        with publish(work / _TIMES) as partial:
            (partial / "times.json").write_text(json.dumps(times), encoding="utf-8")


def _share(context: PassContext, first: int, last: int) -> Callable[[int, int], None]:
    """Progress of one of several steps, which takes from ``first`` to ``last`` percent of the pass."""
    return lambda done, total: context.progress(first + done * (last - first) // total, 100)
