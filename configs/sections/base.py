"""What every config section is made of: its base class and the kinds of numbers and paths. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from configs.paths import clean_path

# The upper bounds are far beyond any real run; a typo's extra zeros end in a sentence, not in an endless plan.
PositiveInt = Annotated[int, Field(ge=1, le=10**12)]
NonNegativeInt = Annotated[int, Field(ge=0, le=10**12)]
Count = Annotated[int, Field(ge=1, le=10**5)]
Samples = Annotated[int, Field(ge=1, le=10**7)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class PathKind:
    """Marks a field that holds a path."""

    suffixes: tuple[str, ...] = ("",)
    """What follows the text in the names of the files; not only "" for a prefix."""
    words: tuple[str, ...] = ()
    """Values that are no path."""


PathText = Annotated[str, AfterValidator(clean_path), PathKind()]
DataPrefix = Annotated[str, AfterValidator(clean_path), PathKind(suffixes=(".bin", ".idx"))]


class Section(BaseModel):
    """Base of every section: immutable after validation, and a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())
