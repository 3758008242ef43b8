"""Options that methods share, checked before anything loads.

See docs/concepts/target.md#methods, docs/guides/evaluate.md#bad-input.

Each method's module extends these with its own fields; unknown keys, wrong types and values out of range raise
a ConfigurationError that names the field, the value and what is allowed.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sdt_dist.errors import ConfigurationError, unknown_name

Model = TypeVar("Model", bound=BaseModel)


class StrictOptions(BaseModel):
    """Options that refuse unknown names and other types, but take 1 where 1.0 is meant."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _whole_floats(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        floats = {
            name
            for name, field in cls.model_fields.items()
            if field.annotation in (float, float | None)
        }
        return {k: float(v) if k in floats and type(v) is int else v for k, v in values.items()}


class SearchOptions(StrictOptions):
    """What every method takes: the tilt, how many samples to return, and the budget.

    A search ends when it has used `num_rollouts` or `max_nfe` (within one wave) or `time_budget_s`, whichever is
    first; with `max_nfe` given and `num_rollouts` not, rollouts are unlimited.
    """

    inverse_temperature: float = Field(
        1.0, gt=0, description="lambda of p(x) exp(lambda r(x)); larger is greedier"
    )
    num_samples: int = Field(8, ge=1, description="samples to return")
    num_rollouts: int | None = Field(None, ge=1, description="rollouts to pay for")
    max_nfe: int | None = Field(None, ge=1, description="next-token distributions to pay for")
    time_budget_s: float | None = Field(
        None, gt=0, description="stop cleanly after this many seconds"
    )

    @property
    def rollout_limit(self) -> int | None:
        """Rollouts allowed: as given, 100 when nothing bounds the search, None when nfe or time does."""
        if self.num_rollouts is None and self.max_nfe is None and self.time_budget_s is None:
            return 100
        return self.num_rollouts


class TreeOptions(SearchOptions):
    """What tree methods take besides."""

    wave_size: int = Field(
        8, ge=1, description="leaves evaluated per model call, all selected before backing up"
    )


class ValueTreeOptions(TreeOptions):
    """What trees of value estimates take besides, where a node's value may be any guess that walks improve on.

    A rollout that is cut by `rollout_max_new_tokens` ends at an open node, worth the reward's partial form of the
    unfinished sample until walks below it have values to back up. Such guesses are no soft values of rewards, so
    log_z is not claimed (None) when it is given; samples are finished ones with their own rewards, and their final
    walks pass only through nodes with a finished sample below. `num_rollouts` counts cut rollouts too. If none has
    finished when the budget ends, one more wave goes to the end; resuming a search that needed it goes on from there.
    A partial form should be on the reward's scale: where it is 0 for want of values (spectral, below 16) short samples
    look better than longer ones, and walks go wide before they go deep.
    """

    rollout_max_new_tokens: int | None = Field(
        None,
        ge=1,
        description="most tokens of a rollout, then valued by the reward's partial form; default: to the end",
    )


def parse_options(model: type[Model], values: dict[str, Any], owner: str) -> Model:
    """Validated options; ConfigurationError names each bad field, its value and what is allowed."""
    unknown = [name for name in values if name not in model.model_fields]
    if unknown:
        raise unknown_name(f"option of {owner}", unknown[0], model.model_fields)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(_problem(e["loc"], e["input"], e["msg"]) for e in error.errors())
        raise ConfigurationError(f"options of {owner}: {problems}.") from error


def _problem(place: tuple[int | str, ...], value: Any, text: str) -> str:
    """One thing that pydantic or one of our own validators says, within a sentence; those of a whole model name fields themselves."""
    message = text.removeprefix("Value error, ").rstrip(".")
    return f"{'.'.join(map(str, place))}: {value!r}, {message}" if place else message
