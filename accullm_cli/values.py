"""The values that options take where a plain type does not say enough: fractions, bits, group sizes.

Each type is pydantic's, with a function that reads what was given or refuses it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    StringConstraints,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)


def parse_fraction(value: object) -> object:
    """'0.5%' and 0.005 mean the same."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            return value  # for pydantic to refuse, as any other text that is not a number
    return value


def check_group_size(value: int) -> int:
    if value == 0:
        raise ValueError("0 is not a group size; give -1 (one scale per output row), or 1 or more")
    return value


def check_scale_bits(value: int) -> int:
    if 8 < value < 16:
        raise ValueError(f"{value} is not a width of scales; give 4 to 8, or 16")
    return value


def digits_as_integer(value: object) -> object:
    """Flags and --set give text: '8' is 8."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


def as_it_is_written(value: object, to_number: ValidatorFunctionWrapHandler) -> float:
    """5 stays a whole number, and 5.0 a float: what is written with a decimal point is an average."""
    number: float = to_number(value)
    written_whole = "." not in value if isinstance(value, str) else isinstance(value, int)
    return int(number) if written_whole and float(number).is_integer() else number


def check_distinct(values: list[str]) -> list[str]:
    repeated = next((value for index, value in enumerate(values) if value in values[:index]), None)
    if repeated is not None:
        raise ValueError(f"{repeated} is given twice; give it once")
    return values


PercentText = Annotated[str, StringConstraints(pattern=r"^\s*[0-9]*\.?[0-9]+\s*%\s*$")]
Fraction = Annotated[float, BeforeValidator(parse_fraction, json_schema_input_type=float | PercentText)]
Bits = Annotated[
    float,
    WrapValidator(as_it_is_written),
    PlainSerializer(lambda bits: bits, return_type=int | float),  # pydantic's own would write 5 as 5.0
]
EmbeddingBits = Annotated[Literal[16, 8, 7, 6, 5, 4, 3, 2], BeforeValidator(digits_as_integer)]
GroupSize = Annotated[int, AfterValidator(check_group_size), Field(json_schema_extra={"not": {"const": 0}})]
ScaleBits = Annotated[int, AfterValidator(check_scale_bits)]
Distinct = AfterValidator(check_distinct)
