"""The formats that are measured, by the names that the command line takes."""

from bigq.formats import FP4, NF4, Format, Int8

__all__ = ["BENCH_FORMATS"]

BENCH_FORMATS: dict[str, Format] = {
    "nf4": NF4(),
    "nf4-dq": NF4(double_quant=True),
    "fp4": FP4(),
    "int8": Int8(),
}
