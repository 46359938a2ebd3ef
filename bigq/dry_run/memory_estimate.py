"""MemoryEstimate: the memory that a model needs, item by item, each with how its number is made."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from bigq.dry_run.load_plan import LoadPlan
from bigq.system.text import bytes_text, format_table

__all__ = ["ITEM_COLUMNS", "PHASES", "SUM_COLUMNS", "MemoryEstimate", "MemoryItem"]

PHASES = ("always", "load", "generate", "train")
ITEM_COLUMNS = ("what", "when", "device", "bytes")
SUM_COLUMNS = ("device", "when", "needs", "has")


@dataclass(frozen=True, kw_only=True)
class MemoryItem:
    """Memory on one device.

    Args:
        name: what takes it.
        phase: when: "always", or only in "load", "generate" or "train".
        device: "cuda:0", "cpu" or "disk".
        nbytes: None if it is unknown.
        how: how the number is made, or why there is none.
        is_exact: whether the number is that of the tensors; otherwise it is the result of a formula.
    """

    name: str
    phase: str
    device: str
    nbytes: int | None
    how: str
    is_exact: bool = False


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """What `estimate_memory` says.

    Args:
        items: all memory, by device and phase.
        plan: what becomes of every tensor, and where it is stored.
        limits: {device: bytes} that each device has; empty if nothing is known of it.
        strategy: the device map, if it is automatic.
        max_memory: the argument for the load, if the device map is automatic: the limits without what is needed beside
            the weights.
        problem: why no device map fits; then the items are those of a single device.
    """

    items: tuple[MemoryItem, ...]
    plan: LoadPlan
    limits: Mapping[str, int] = field(default_factory=dict)
    strategy: str | None = None
    max_memory: Mapping[int | str, int] | None = None
    problem: str | None = None

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases that there are items of, without "always"."""
        return tuple(phase for phase in PHASES[1:] if any(item.phase == phase for item in self.items))

    def needed(self, device: str, phase: str) -> tuple[int, bool]:
        """(bytes, whether that is all) that `device` needs in `phase`; it is not all if an item is unknown."""
        own = [item for item in self.items if item.device == device and item.phase in ("always", phase)]
        return sum(item.nbytes or 0 for item in own), all(item.nbytes is not None for item in own)

    @property
    def fits(self) -> bool | None:
        """Whether every device has enough memory in every phase; None if that is not known."""
        if self.problem is not None:
            return False
        is_known = True
        for device in self.devices:
            if device not in self.limits:
                # a host that nothing is said of, and that stores nothing, is no reason for doubt
                stores = any(item.device == device and item.phase != "load" for item in self.items)
                is_known = is_known and (device == "disk" or not stores)
                continue
            for phase in self.phases:
                nbytes, is_all = self.needed(device, phase)
                if nbytes > self.limits[device]:
                    return False
                is_known = is_known and is_all
        return True if is_known else None

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices of the items, in their order."""
        return tuple(dict.fromkeys(item.device for item in self.items))

    def item_rows(self) -> list[tuple[str, ...]]:
        """(what, when, device, bytes) of each item, in words; "about" marks the results of formulas."""
        return [(item.name, item.phase, item.device, _amount(item)) for item in self.items]

    def sum_rows(self) -> list[tuple[str, ...]]:
        """(device, when, what it needs, what it has) of each device in each phase, in words."""
        rows: list[tuple[str, ...]] = []
        for device in self.devices:
            has = bytes_text(self.limits[device]) if device in self.limits else "unknown"
            for phase in self.phases:
                nbytes, is_all = self.needed(device, phase)
                rows.append((device, phase, f"{'' if is_all else 'more than '}{bytes_text(nbytes)}", has))
        return rows

    def table(self) -> str:
        """The items, the sums and whether it fits, as text."""
        items = format_table([ITEM_COLUMNS, *self.item_rows()])
        return f"{items}\n\n{format_table([SUM_COLUMNS, *self.sum_rows()])}\n\n{self.verdict()}"

    def verdict(self) -> str:
        """One line: whether it fits."""
        if self.problem is not None:
            return f"it does not fit: {self.problem}"
        words = {True: "it fits", False: "it does not fit", None: "whether it fits is unknown"}[self.fits]
        if self.fits is None:
            is_limited = all(device in self.limits for device in self.devices if device not in ("cpu", "disk"))
            words += ": an item is unknown" if is_limited else ": pass max_memory"
        if self.max_memory is not None and self.fits is not False:
            words += f'; load it with device_map="{self.strategy}", max_memory={dict(self.max_memory)}'
        return words

    def explanations(self) -> list[tuple[str, str]]:
        """(name, how its number is made) of each kind of item, once."""
        return list(dict.fromkeys((item.name, item.how) for item in self.items))

    def to_dict(self, *, with_tensors: bool = False) -> dict[str, object]:
        """The estimate as JSON can hold it; `with_tensors` also gives what becomes of every tensor."""
        sums: dict[str, dict[str, object]] = {device: {} for device in self.devices}
        for device in self.devices:
            for phase in self.phases:
                nbytes, is_all = self.needed(device, phase)
                sums[device][phase] = {"nbytes": nbytes, "is_all": is_all}
        said = self.plan.to_dict()
        if not with_tensors:
            del said["tensors"]
        return {
            "items": [asdict(item) for item in self.items],
            "needed": sums,
            "limits": dict(self.limits),
            "strategy": self.strategy,
            "max_memory": None if self.max_memory is None else {str(k): v for k, v in self.max_memory.items()},
            "fits": self.fits,
            "problem": self.problem,
            "plan": said,
        }


def _amount(item: MemoryItem) -> str:
    if item.nbytes is None:
        return "unknown"
    return f"{'' if item.is_exact else 'about '}{bytes_text(item.nbytes)}"
