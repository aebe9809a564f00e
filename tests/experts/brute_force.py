"""The cache of `evalsuite.experts.policy`, written down once more from its rules, with lists and no hooks."""

from functools import cache
from itertools import combinations

import numpy as np


def replay(name, slots, steps):
    """Every event of a run: ("hit" | "load", step, expert, slot, evicted expert or None), in order."""
    cells = [None] * slots
    events = []
    loads = last_victim_key = 0

    def where(expert):
        return next((s for s, cell in enumerate(cells) if cell and cell["expert"] == expert), None)

    for now, wanted in enumerate(steps, 1):
        inside = [e for e in wanted if where(e) is not None]
        queue = sorted(inside) + sorted(set(wanted) - set(inside))
        while queue:
            group, queue = queue[:slots], queue[slots:]
            pinned = {where(e) for e in group if where(e) is not None}
            for expert in [e for e in group if where(e) is not None]:
                slot = where(expert)
                hit(cells, slot, now, last_victim_key)
                events.append(("hit", now, expert, slot, None))
            for expert in [e for e in group if where(e) is None]:
                if None in cells:
                    slot, evicted = cells.index(None), None
                else:
                    free = [s for s in range(slots) if s not in pinned]
                    slot = min(
                        free, key=lambda s: (worth(name, cells[s], now, steps), cells[s]["uses"][-1], s)
                    )
                    evicted, last_victim_key = cells[slot]["expert"], cells[slot]["key"]
                loads += 1
                cells[slot] = {
                    "expert": expert, "uses": [now], "loaded": loads, "key": 1 + last_victim_key,
                    "protected": False, "probation": now,
                }  # fmt: skip
                pinned.add(slot)
                events.append(("load", now, expert, slot, evicted))
    return events


def hit(cells, slot, now, age):
    cell = cells[slot]
    room = len(cells) // 2
    if room:
        others = [s for s, c in enumerate(cells) if c and c["protected"] and s != slot]
        if len(others) == room:
            oldest = cells[min(others, key=lambda s: (cells[s]["uses"][-1], s))]
            oldest["protected"], oldest["probation"] = False, now
        cell["protected"] = True
    else:
        cell["probation"] = now
    cell["uses"].append(now)
    cell["key"] = len(cell["uses"]) + age


def worth(name, cell, now, steps):
    last = cell["uses"][-1]
    if name == "lru":
        return last
    if name == "fifo":
        return cell["loaded"]
    if name == "lfu":
        return cell["key"]
    if name == "slru":
        return (1, last) if cell["protected"] else (0, cell["probation"])
    if name == "lfru":
        frequency = np.float32(1)
        for _ in cell["uses"][1:]:
            frequency = min(np.float32(0.95) * frequency + np.float32(1), np.float32(20))
        return frequency / np.float32(1 + now - last)
    later = (step for step in range(now + 1, len(steps) + 1) if cell["expert"] in steps[step - 1])
    return -next(later, len(steps) + 1)  # Belady


def fewest_misses(slots, steps):
    """The least number of loads of any choice of victims, by trying all; no step may overflow."""

    @cache
    def from_here(index, resident):
        if index == len(steps):
            return 0
        wanted = frozenset(steps[index])
        others = resident - wanted
        room = slots - len(wanted)
        kept = combinations(sorted(others), min(room, len(others)))
        return len(wanted - resident) + min(from_here(index + 1, wanted | set(k)) for k in kept)

    return from_here(0, frozenset())
