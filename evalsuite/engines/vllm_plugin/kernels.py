"""The expert cache on the GPU: one kernel decides, another copies, and the host learns nothing of it.

`place` is one program that follows the rules of `evalsuite.experts.policy` for one group of a step. It has
no loop over experts: the victims of a group are the first of an order that does not change while the group is
placed, so each slot counts how many come before it. `fetch` reads the missing experts from host memory that
is mapped into the GPU's address space, with as many bytes under way as PCIe takes. Where they are in a file,
`request` asks the threads of `file_readers` for them, and `take` copies each piece as soon as it was read.

All read what they need to know from device memory, so that a CUDA graph can hold them: a step then costs no
synchronization with the host, whatever was routed.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportOptionalSubscript=false

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

POLICY_CODES = {"lru": 0, "lfu": 1, "fifo": 2, "slru": 3, "lfru": 4}
LRU, LFU, FIFO, SLRU, LFRU = (tl.constexpr(code) for code in POLICY_CODES.values())


@triton.jit(do_not_specialize=["id_count", "top_k", "group_index"])
def place(
    ids, id_count, token_limit, top_k, slots_out, expert_map,
    slot_of, expert_in, last_used, worth, count, frequency, scalars, counters,
    position_of, flag_of, load_expert, load_slot, load_count, group_index,
    is_first: tl.constexpr, is_alone: tl.constexpr, slot_count: tl.constexpr, expert_count: tl.constexpr,
    SLOTS: tl.constexpr, EXPERTS: tl.constexpr, IDS: tl.constexpr, policy: tl.constexpr,
):  # fmt: skip
    """Place one group of a step.

    Args:
        ids: routed experts, int [id_count], top_k of each token; negative ones are nobody's.
        token_limit: tokens of the step, int32 [1]; the others only pad it to the shape that a graph has.
        slots_out: the slot of each of them, written where the step is one group.
        expert_map: the slot of each expert of the group and -1 elsewhere, written where there are several.
        slot_of, expert_in, last_used: as in `Policy`; int32.
        worth: FIFO's number of the load, LFU's key, SLRU's protection; int32 [slots].
        count: LFU's count, SLRU's step of coming on probation; int32 [slots].
        frequency: LFRU's, float32 [slots].
        scalars: step, loads, age; int32.  counters: steps, hits, misses, overflow steps; int64.
        position_of, flag_of: the step's order of experts, and room to look things up; int32 [experts].
        load_expert, load_slot, load_count: what has to be copied, for `fetch`; int32.
        group_index: which group of the step this is; the first one is told of by is_first as well, and a step
            of one group by is_alone.
        SLOTS, EXPERTS: the powers of two that hold slot_count and expert_count.
    """
    e = tl.arange(0, EXPERTS)
    is_expert = e < expert_count
    s = tl.arange(0, SLOTS)
    is_slot = s < slot_count
    where_is = tl.load(slot_of + e, mask=is_expert, other=-1)
    holds = tl.load(expert_in + s, mask=is_slot, other=-1)
    last = tl.load(last_used + s, mask=is_slot, other=0)
    value = tl.load(worth + s, mask=is_slot, other=0)
    uses = tl.load(count + s, mask=is_slot, other=0)
    often = tl.load(frequency + s, mask=is_slot, other=0.0)
    id_limit = tl.minimum(tl.load(token_limit).to(tl.int64) * top_k, id_count)
    step = tl.load(scalars + 0)
    loads = tl.load(scalars + 1)
    age = tl.load(scalars + 2)

    if is_first:
        wanted = tl.zeros([EXPERTS], tl.int32)
        for start in range(0, id_limit, IDS):
            at = start + tl.arange(0, IDS)
            some = tl.load(ids + at, mask=at < id_limit, other=-1).to(tl.int32)
            wanted |= tl.max((e[:, None] == some[None, :]).to(tl.int32), axis=1)
        resident = tl.where(where_is >= 0, wanted, 0)
        absent = wanted - resident
        residents = tl.sum(resident)
        distinct = residents + tl.sum(absent)
        position = tl.where(resident == 1, tl.cumsum(resident, 0) - 1, residents + tl.cumsum(absent, 0) - 1)
        position = tl.where(wanted == 1, position, -1)
        step += 1
        if not is_alone:
            tl.store(position_of + e, position, mask=is_expert)
    else:
        position = tl.load(position_of + e, mask=is_expert, other=-1)
        resident = tl.zeros([EXPERTS], tl.int32)
        residents = 0
        distinct = 0
    first = group_index * slot_count
    in_group = (position >= first) & (position < first + slot_count)
    missing = tl.where(in_group, 1 - resident, 0)
    misses = tl.sum(missing)
    tl.store(flag_of + e, resident, mask=is_expert)
    tl.store(load_expert + tl.cumsum(missing, 0) - 1, e, mask=missing == 1)
    tl.debug_barrier()  # every thread has read the state; what was stored above can be looked up

    empty = is_slot & (holds < 0)
    hit = tl.load(flag_of + holds, mask=is_slot & (holds >= 0), other=0) == 1
    if policy == LFU:
        uses = tl.where(hit, uses + 1, uses)
        value = tl.where(hit, uses + age, value)
    if policy == LFRU:
        often = tl.where(hit, tl.minimum(often * 0.95 + 1.0, 20.0), often)
    if policy == SLRU:  # a hit may send another slot back on probation, so hits come one by one
        room = slot_count // 2
        uses = tl.where(hit, step, uses)
        if room > 0:
            for i in range(residents):
                mine = tl.sum(tl.where(position == i, where_is, 0))
                value = tl.where(s == mine, 1, value)
                if tl.sum(value) > room:
                    other = is_slot & (value == 1) & (s != mine)
                    oldest = tl.min(tl.where(other, last, 2147483647))
                    loser = tl.min(tl.where(other & (last == oldest), s, SLOTS))
                    value = tl.where(s == loser, 0, value)
                    uses = tl.where(s == loser, step, uses)
                last = tl.where(s == mine, step, last)
    last = tl.where(hit, step, last)

    if policy == LFRU:
        score = tl.div_rn(often, (1 + step - last).to(tl.float32))
    elif policy == LRU:
        score = last
    elif policy == SLRU:
        score = tl.where(value == 1, last + step + 1, uses)
    else:
        score = value
    free = is_slot & (hit == 0)
    # how many free slots come before each: empty ones by number, then the lowest score, the oldest use
    t = s[:, None]
    lower = score[:, None] < score[None, :]
    tied = score[:, None] == score[None, :]
    older = last[:, None] < last[None, :]
    as_old = last[:, None] == last[None, :]
    by_score = lower | (tied & (older | (as_old & (t < s[None, :]))))
    both_empty = empty[:, None] & empty[None, :]
    before = (empty[:, None] & (empty[None, :] == 0)) | (both_empty & (t < s[None, :]))
    before = before | ((empty[:, None] == 0) & (empty[None, :] == 0) & by_score)
    rank = tl.sum((before & free[:, None]).to(tl.int32), axis=0)

    taken = free & (rank < misses)
    displaces = taken & (holds >= 0)
    newcomer = tl.load(load_expert + rank, mask=taken, other=-1)
    if policy == LFU:
        grown = tl.where(displaces, value, age)
        last_victim = tl.max(tl.where(displaces, value, -1))  # victims leave in the order of their keys
        age = tl.where(last_victim >= 0, last_victim, age)
        value = tl.where(taken, 1 + grown, value)
        uses = tl.where(taken, 1, uses)
    if policy == FIFO:
        value = tl.where(taken, loads + 1 + rank, value)
    if policy == SLRU:
        value = tl.where(taken, 0, value)
        uses = tl.where(taken, step, uses)
    if policy == LFRU:
        often = tl.where(taken, 1.0, often)
    last = tl.where(taken, step, last)

    tl.store(slot_of + holds, -1, mask=displaces)
    tl.store(slot_of + newcomer, s, mask=taken)
    tl.store(load_slot + rank, s, mask=taken)
    tl.store(expert_in + s, newcomer, mask=taken)
    tl.store(last_used + s, last, mask=is_slot)
    tl.store(worth + s, value, mask=is_slot)
    tl.store(count + s, uses, mask=is_slot)
    tl.store(frequency + s, often, mask=is_slot)
    tl.store(scalars + 0, step)
    tl.store(scalars + 1, loads + misses)
    tl.store(scalars + 2, age)
    tl.store(load_count, misses)
    if is_first:
        tl.store(counters + 0, tl.load(counters + 0) + 1)
        tl.store(counters + 1, tl.load(counters + 1) + residents)
        tl.store(counters + 3, tl.load(counters + 3) + (distinct > slot_count).to(tl.int64))
    tl.store(counters + 2, tl.load(counters + 2) + misses)
    tl.debug_barrier()

    if not is_alone:
        slot = tl.load(slot_of + e, mask=is_expert & in_group, other=-1)
        tl.store(expert_map + e, slot, mask=is_expert)
    else:
        for start in range(0, id_count, IDS):
            at = start + tl.arange(0, IDS)
            some = tl.load(ids + at, mask=at < id_limit, other=-1)
            slot = tl.load(slot_of + some, mask=some >= 0, other=0)  # padding computes with any
            tl.store(slots_out + at, slot.to(slots_out.dtype.element_ty), mask=at < id_count)


@triton.jit
def fetch(
    load_count, load_expert, load_slot, store, slots,
    row_words: tl.constexpr, words: tl.constexpr, programs: tl.constexpr,
):  # fmt: skip
    """Copy the experts that `place` found missing, in pieces that the programs share out.

    Args:
        store, slots: tuples of the experts' parts in host memory and on the device, int32 [rows, row_words].
        row_words: words of one expert in each part.
        words: words that a program copies at once.
    """
    count = tl.load(load_count)
    program = tl.program_id(0)
    for part in tl.static_range(len(row_words)):
        pieces = (row_words[part] + words - 1) // words
        for piece in range(program, count * pieces, programs):
            load = piece // pieces
            expert = tl.load(load_expert + load).to(tl.int64)
            slot = tl.load(load_slot + load).to(tl.int64)
            at = (piece % pieces) * words + tl.arange(0, words)
            source = store[part] + expert * row_words[part] + at
            target = slots[part] + slot * row_words[part] + at
            if row_words[part] % words == 0:
                tl.store(target, tl.load(source))
            else:
                inside = at < row_words[part]
                tl.store(target, tl.load(source, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["first", "row"])
def request(load_count, load_expert, first, row, number, mailbox, ROOM: tl.constexpr):
    """Ask for the records of the loads from `first` on, ROOM at most; where there are none, for nothing.

    Args:
        row: the layer's first record in the file.
        number: of the last request, int32 [1].
        mailbox: int64 [1 + ROOM] in host memory, as `file_readers` reads it.
    """
    count = tl.minimum(tl.load(load_count) - first, ROOM)
    if count > 0:
        next_number = tl.load(number) + 1
        tag = next_number.to(tl.int64) << 32
        i = tl.arange(0, ROOM)
        expert = tl.load(load_expert + first + i, mask=i < count, other=0)
        tl.store(mailbox + 1 + i, tag | (row + expert).to(tl.int64), mask=i < count)
        tl.store(mailbox, tag | count.to(tl.int64))
        tl.store(number, next_number)


@triton.jit(do_not_specialize=["first"])
def take(
    load_count, load_slot, first, number, marks, buffers, slots,
    starts: tl.constexpr, row_words: tl.constexpr, record_words: tl.constexpr, piece_words: tl.constexpr,
    mark_words: tl.constexpr, words: tl.constexpr, programs: tl.constexpr, ROOM: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Copy what `request` asked for into the slots, each piece once it is marked with the request's number.

    Args:
        marks: int32 in host memory, one every mark_words for each piece.
        buffers: the records, int32 [ROOM, record_words] in host memory.
        slots: a tuple of the experts' parts, int32 [slots, row_words]; in a record they begin at starts.
        LANES: threads of a program, of which one looks at the mark.
    """
    count = tl.minimum(tl.load(load_count) - first, ROOM)
    wanted = tl.load(number)
    pieces: tl.constexpr = (record_words + piece_words - 1) // piece_words
    lane = tl.arange(0, LANES)
    for piece in range(tl.program_id(0), count * pieces, programs):
        mark = marks + piece * mark_words + lane
        seen = tl.sum(tl.load(mark, mask=lane == 0, other=0, volatile=True), 0)
        while seen != wanted:
            seen = tl.sum(tl.load(mark, mask=lane == 0, other=0, volatile=True), 0)
        tl.debug_barrier()
        load = piece // pieces
        slot = tl.load(load_slot + first + load).to(tl.int64)
        begin = (piece % pieces) * piece_words
        end = tl.minimum(begin + piece_words, record_words)
        for part in tl.static_range(len(row_words)):
            low = tl.maximum(begin, starts[part])
            high = tl.minimum(end, starts[part] + row_words[part])
            source = buffers + load * record_words
            target = slots[part] + slot * row_words[part] - starts[part]
            for at in range(low, high, words):
                i = at + tl.arange(0, words)
                value = tl.load(source + i, mask=i < high, cache_modifier=".cv")
                tl.store(target + i, value, mask=i < high)


@triton.jit(do_not_specialize=["count"])
def relabel(expert_ids, count, slot_of, expert_count: tl.constexpr, BLOCK: tl.constexpr):
    """Put slots in the place of experts, in place; what names no expert, or one without a slot, becomes 0."""
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        expert = tl.load(expert_ids + at, mask=at < count, other=-1)
        slot = tl.load(slot_of + expert, mask=(expert >= 0) & (expert < expert_count), other=0)
        tl.store(expert_ids + at, tl.maximum(slot, 0), mask=at < count)
