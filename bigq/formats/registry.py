"""The formats by name. This is the only list of them."""

from inspect import signature
from reprlib import repr as short

from bigq.errors import ConfigError
from bigq.formats.base import Format
from bigq.formats.block4 import FP4, NF4
from bigq.formats.int8 import Int8
from bigq.system.text import shortlist

__all__ = ["FORMATS", "make_format"]

FORMATS: dict[str, type[NF4] | type[FP4] | type[Int8]] = {"nf4": NF4, "fp4": FP4, "int8": Int8}


def make_format(name: object, /, **settings: object) -> Format:
    """Make the format `name` with these settings. Raises ConfigError for an unknown name or setting."""
    if not isinstance(name, str) or name not in FORMATS:
        *names, last = map(repr, FORMATS)
        raise ConfigError(f"format is {short(name)}; expected {', '.join(names)} or {last}")
    known = list(signature(FORMATS[name]).parameters)
    unknown = [setting for setting in settings if setting not in known]
    if unknown:
        raise ConfigError(f"format {name!r} has no {shortlist(unknown)}; expected {shortlist(known)}")
    return FORMATS[name](**settings)  # type: ignore[arg-type]
