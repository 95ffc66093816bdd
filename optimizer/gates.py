"""The gates of a recipe: which measured loss is still acceptable."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

__all__ = ["COSINES", "SAMPLED_WINDOWS", "Gate", "Percent"]

COSINES = ("cosine", "min_cosine")
"""The metrics of encoders."""

_LINES = 256
"""Of a text that encoders are measured on."""

SAMPLED_WINDOWS = (16, 128)
"""Windows, and tokens of each, where nobody says: few decoding steps, because a model writes token by token."""


def _fraction(value: object) -> object:
    """``"3%"`` -> 0.03; numbers are fractions already."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip().removesuffix("%")) / 100
        except ValueError as error:
            raise ValueError(f"{value!r} is no percentage; write 3% or 0.03") from error
    return value


Percent = Annotated[float, BeforeValidator(_fraction, json_schema_input_type=float | str), Field(ge=0)]
"""A fraction, written as ``3%`` or ``0.03``."""

_LIMITS = {
    "kl": ("max",),
    "top1": ("min",),
    "perplexity": ("max", "max_increase"),
    "cosine": ("min",),
    "min_cosine": ("min",),
}


class Gate(BaseModel):
    """One limit: the build is rejected when the metric is beyond it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    metric: Literal["kl", "top1", "perplexity", "cosine", "min_cosine"] = Field(
        description="kl: mean KL divergence from the source model, in nats per token; top1: share of tokens whose "
        "most likely next token is the source model's; perplexity: of the engine on a text. Of encoders, cosine: mean "
        "cosine similarity of the engine's vectors to the source model's; min_cosine: the smallest."
    )
    max: float | None = Field(None, ge=0, description="Largest accepted value (kl, perplexity).")
    min: float | None = Field(None, ge=0, le=1, description="Smallest accepted value (top1, cosine, min_cosine).")
    max_increase: Percent | None = Field(None, description="Largest accepted increase over the source model's own.")
    data: Path | None = Field(
        None, description="A text file; omitted: text sampled from the source model. Relative to the recipe."
    )
    windows: PositiveInt = Field(
        SAMPLED_WINDOWS[0],
        description="How many windows of the text are used; for encoders, how many of its lines, omitted: 256.",
    )
    tokens: PositiveInt = Field(
        SAMPLED_WINDOWS[1], ge=2, description="Tokens per window; for encoders, what longer lines are cut to."
    )

    @model_validator(mode="before")
    @classmethod
    def _encoders_read_lines(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("metric") in COSINES:
            return {"windows": _LINES, **data}
        return data

    @model_validator(mode="after")
    def _limit_fits_metric(self) -> "Gate":
        allowed = _LIMITS[self.metric]
        given = [name for name in ("max", "min", "max_increase") if getattr(self, name) is not None]
        if len(given) != 1 or given[0] not in allowed:
            raise ValueError(f"metric {self.metric} takes exactly one of: {', '.join(allowed)}")
        if self.metric == "perplexity" and self.data is None:
            raise ValueError("perplexity needs data: on sampled text it says little; use kl or top1 there")
        if self.metric in COSINES and self.data is None:
            raise ValueError(f"{self.metric} needs data: an encoder writes no text to be measured on")
        return self

    def describe(self) -> dict[str, Any]:
        """The gate as written, for manifests and messages."""
        return self.model_dump(mode="json", exclude_none=True)
