"""Numbers as JSON has them: no truth values, no digits in quotes, or the document would promise less than is accepted."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator


def _number(value: object) -> object:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ValueError("give a number")
    return value


Whole = Annotated[int, BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number)]
