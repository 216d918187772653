"""Arguments of another type than a function takes, refused in words."""

from collections.abc import Mapping
from types import UnionType

from torch import Tensor

STATE = "names to tensors, such as module.state_dict()"


def require(given: object, kind: type | UnionType, who: str, cure: str) -> None:
    """Raise ValueError, saying what to give, unless this is of a kind."""
    if not isinstance(given, kind):
        raise ValueError(f"{who} is a {type(given).__name__}; give {cure}")


def require_mapping(given: object, who: str, to: str = STATE, kind: type = Tensor) -> None:
    """Raise ValueError, saying what it should map names to, unless these are of a kind."""
    require(given, Mapping, who, f"a mapping of {to}")
    for name, one in given.items():
        require(one, kind, f"{who}: {name}", f"a mapping of {to}")
