"""The formats by name. This is the only list of them."""

from reprlib import repr as short

from bigq.errors import ConfigError
from bigq.formats.base import Format
from bigq.formats.block4 import FP4, NF4
from bigq.formats.int8 import Int8

__all__ = ["FORMATS", "make_format"]

FORMATS: dict[str, type[NF4] | type[FP4] | type[Int8]] = {"nf4": NF4, "fp4": FP4, "int8": Int8}


def make_format(name: object, /, **settings: object) -> Format:
    """Make the format `name` with these settings. Raises ConfigError for an unknown name or setting."""
    if not isinstance(name, str) or name not in FORMATS:
        *names, last = map(repr, FORMATS)
        raise ConfigError(f"format is {short(name)}; expected {', '.join(names)} or {last}")
    try:
        return FORMATS[name](**settings)  # type: ignore[arg-type]
    except TypeError as error:
        raise ConfigError(f"format {name!r}: {error}") from error
