"""Expert slots: which of a few slots holds which weight of a stack, and the copies that fill them, as the reference.

`bigq_kernels.slots` has the kernels. Here the host reads the ids.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bigq.ops import checks

__all__ = ["assign_slots", "fill_slots"]


def assign_slots(ids: Tensor, held: Tensor, stamps: Tensor, weights: int) -> tuple[Tensor, Tensor]:
    """Give each weight that ids [R] hit a slot: (slots int32 [R], copies int32 [R, 2]).

    A weight that a slot holds keeps it. Each other one gets the slot that was not used for longest, of those that no id
    hits; of several, the first.

    Args:
        ids: int32 or int64. One that is none of the `weights` gets the slot -1.
        held: int32 [S], S >= R: the weight that each slot holds, or -1. It is updated.
        stamps: int64 [S]: the number of the call that used it last. It is updated.
        weights: how many there are.

    Returns:
        The slot of each id; and (weight, slot) of each copy to make, in the order of ids, with -1 behind the last.
    """
    checks.check_assign_slots(ids, held, stamps)
    hit = list(dict.fromkeys(id for id in ids.tolist() if 0 <= id < weights))
    slot_of = {weight: slot for slot, weight in enumerate(held.tolist()) if weight >= 0}
    ages = stamps.tolist()
    used = {slot_of[weight] for weight in hit if weight in slot_of}
    free = iter(sorted(set(range(len(ages))) - used, key=lambda slot: (ages[slot], slot)))
    made = [(weight, next(free)) for weight in hit if weight not in slot_of]
    slot_of |= made
    now = max(ages, default=0) + 1
    for weight, slot in made:
        held[slot] = weight
    for weight in hit:
        stamps[slot_of[weight]] = now
    of_ids = [slot_of[id] if 0 <= id < weights else -1 for id in ids.tolist()]
    copies = made + [(-1, -1)] * (len(of_ids) - len(made))
    slots = torch.tensor(of_ids, dtype=torch.int32, device=held.device)
    return slots, torch.tensor(copies, dtype=torch.int32, device=held.device).view(-1, 2)


def fill_slots(copies: Tensor, sources: Sequence[Tensor], pools: Sequence[Tensor]) -> None:
    """Copy row copies[i, 0] of each of `sources` to row copies[i, 1] of its pool, for each i; -1 is none.

    Args:
        copies: int32 [R, 2], as `assign_slots` gives them.
        sources: up to 8 parts of a stack, [E, n]: a row is that of one weight. Contiguous.
        pools: the same parts of the weights in the slots, [S, n].
    """
    checks.check_fill_slots(copies, sources, pools)
    for weight, slot in copies.tolist():
        if weight >= 0:
            for source, pool in zip(sources, pools, strict=True):
                pool[slot] = source[weight]
