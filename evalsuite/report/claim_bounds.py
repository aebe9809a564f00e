"""Claims held against physical bounds: what must lie on the GPU, be read, be copied, or fit.

At batch 1, per decoded token: tokens/s ≤ 1 / (weights read / memory bandwidth + experts copied / link
bandwidth). Bandwidths are the makers' figures, which no machine exceeds. Experts copied are (1 − hit rate) of
those that a token uses; a cache with fewer slots than a token has experts, or one that overflows in every
step, hits nothing.
"""

from collections.abc import Iterator

from evalsuite.core.units import si_bytes
from evalsuite.report.claim_findings import Finding, Rule, written
from evalsuite.report.claim_rules import experts_per_token, of_metric
from evalsuite.report.claims import Claim, Claims


def memory_for_weights(claims: Claims) -> Iterator[Finding]:
    """GPU memory is at least the weights that lie there."""
    for claim, _ in of_metric(claims, "vram"):
        shape, bounds = claims.shape(claim), claim.interval
        if shape is None or bounds is None or claim.cache is None:
            continue
        geometry, stored = shape
        slots = geometry.num_experts if claim.cache == "all" else claim.cache
        least = geometry.other_bytes(stored) + geometry.buffer_bytes(stored, slots)
        shown = f"≥ {si_bytes(least)}"
        if bounds[1] < least:
            yield Finding(claim.id, "impossible", f"the weights alone are {si_bytes(least)}", shown)
        else:
            yield Finding(claim.id, "agrees", f"the weights alone are {si_bytes(least)}", shown)


def memory_saved(claims: Claims) -> Iterator[Finding]:
    """A cache saves at most the experts that it moves off the GPU."""
    found = [(c, n) for c, n in of_metric(claims, "vram") if c.low is None]
    for claim, number in found:
        shape = claims.shape(claim)
        if shape is None or not isinstance(claim.cache, int):
            continue
        geometry, stored = shape
        movable = geometry.routed_bytes(stored) - geometry.buffer_bytes(stored, claim.cache)
        for whole, all_of_it in found:
            if whole.model != claim.model or whole.cache != "all" or whole.gpu != claim.gpu:
                continue
            assert whole.interval is not None
            assert claim.interval is not None
            least = whole.interval[0] - claim.interval[1]
            if least > movable:
                kind, how = "impossible", "it saves at least"
            elif all_of_it - number > movable:
                kind, how, least = "note", "taken as written it saves", all_of_it - number
            else:
                continue
            yield Finding(
                claim.id,
                kind,
                f"{how} {si_bytes(least)} against {written(whole)}; the experts that leave the GPU are "
                f"{si_bytes(movable)}",
                f"saves ≤ {si_bytes(movable)}" if kind == "impossible" else "",
            )
            break


def overflow_in_decode(claims: Claims) -> Iterator[Finding]:
    """One decoded token has exactly top-k distinct experts: as many slots hold them."""
    for claim, share in of_metric(claims, "overflow"):
        chosen = experts_per_token(claims, claim)
        if chosen is None or claim.phase == "prefill" or not isinstance(claim.cache, int):
            continue
        if share >= 1 and claim.cache >= chosen:
            yield Finding(
                claim.id,
                "impossible",
                f"a decode step at batch 1 has exactly {chosen} distinct experts, which {claim.cache} slots "
                "hold; only prefill can overflow",
                "0 % in decode",
            )


def slots_for_one_token(claims: Claims) -> Iterator[Finding]:
    """A cache must hold the experts of one token."""
    for claim, slots in of_metric(claims, "cache_slots"):
        chosen = experts_per_token(claims, claim)
        if chosen is None:
            continue
        if slots < chosen:
            yield Finding(
                claim.id,
                "impossible",
                f"a token uses {chosen} experts of every layer: {slots:.0f} slots overflow at every step "
                "and never hit",
                f"≥ {chosen}",
            )
        else:
            yield Finding(claim.id, "agrees", f"a token uses {chosen} experts of every layer", f"≥ {chosen}")


def hit_rate(claims: Claims, claim: Claim) -> float | None:
    """Stated, or forced to 0 by the cache size or by a claimed overflow in every step; else unknown."""
    chosen = experts_per_token(claims, claim)
    if claim.hit_rate is not None:
        return claim.hit_rate
    if not isinstance(claim.cache, int) or chosen is None:
        return None
    always = any(
        share >= 1 and other.cache == claim.cache and other.model == claim.model and other.phase != "prefill"
        for other, share in of_metric(claims, "overflow")
    )
    return 0.0 if always or claim.cache < chosen else None


def speed_bounds(claims: Claims) -> Iterator[Finding]:
    """Weights must be read, and missing experts copied, for every token."""
    for claim, _ in of_metric(claims, "speed"):
        shape, bounds = claims.shape(claim), claim.interval
        device = claims.gpus.get(claim.gpu or "")
        if shape is None or device is None or bounds is None or (claim.concurrency or 1) > 1:
            continue
        geometry, stored = shape
        seconds = geometry.token_bytes(stored) / (device.memory_gb_s * 1e9)
        hits = hit_rate(claims, claim)
        copied = 0.0 if hits is None else geometry.miss_bytes(stored, hits)
        seconds += copied / (device.link_gb_s * 1e9)
        limit = 1 / seconds
        how = f"reading {si_bytes(geometry.token_bytes(stored))}" + (
            f" and copying {si_bytes(copied)} of experts" if copied else ""
        )
        shown = f"≤ {limit:,.0f} tok/s"
        if bounds[0] > limit:
            yield Finding(
                claim.id, "impossible", f"{how} a token allows {limit:,.0f} tok/s on a {claim.gpu}", shown
            )
        else:
            yield Finding(claim.id, "agrees", f"{how} a token allows {limit:,.0f} tok/s", shown)


def capacities(claims: Claims) -> Iterator[Finding]:
    """What is taken is at most what is there; a GPU's memory is the maker's, in GB or in GiB."""
    installed = {"disk": "disk_installed", "host_ram": "host_ram_installed"}
    for claim, _ in of_metric(claims, "vram", "disk", "host_ram"):
        bounds = claim.interval
        assert bounds is not None
        if claim.metric == "vram":
            device = claims.gpus.get(claim.gpu or "")
            if device is not None and bounds[0] > device.memory_gib * 2**30:
                why = f"a {claim.gpu} has {device.memory_gib:g} GiB"
                yield Finding(claim.id, "impossible", why, f"≤ {device.memory_gib:g} GiB")
            continue
        for whole, there in of_metric(claims, installed[claim.metric]):
            if whole.model == claim.model and bounds[0] > there:
                yield Finding(claim.id, "impossible", f"the machine has {written(whole)}")
    for claim, number in of_metric(claims, "gpu_memory"):
        device = claims.gpus.get(claim.gpu or "")
        if device is None:
            continue
        shown = f"{device.memory_gib:g} GiB"
        if claim.allows(device.memory_gib * 2**30):
            yield Finding(claim.id, "holds", f"{shown} as its maker states", shown)
        elif claim.allows(device.memory_gib * 1e9):
            yield Finding(claim.id, "holds", f"{shown} as its maker states, written as GB", shown)
        else:
            why = f"its maker states {shown}, not {si_bytes(number)}"
            yield Finding(claim.id, "fails", why, shown)


def experts_on_disk(claims: Claims) -> Iterator[Finding]:
    """Files that back an expert cache hold every expert once, or as a whole number of copies."""
    for claim, number in of_metric(claims, "disk"):
        shape, bounds = claims.shape(claim), claim.interval
        if shape is None or bounds is None or claim.component != "expert cache":
            continue
        once = shape[0].routed_bytes(shape[1])
        if bounds[1] < once:
            yield Finding(claim.id, "impossible", f"the experts are {si_bytes(once)}", si_bytes(once))
            continue
        as_gib = number / 1e9 * 2**30
        copies = round(as_gib / once)
        if copies > 1 and abs(copies * once - as_gib) < 0.02 * as_gib:
            yield Finding(
                claim.id,
                "note",
                f"the experts are {si_bytes(once)}: {copies} copies, {copies * once / 2**30:.1f} GiB with GB "
                "written for it?",
            )
        yield Finding(claim.id, "agrees", f"the experts are {si_bytes(once)}", f"≥ {si_bytes(once)}")


RULES: tuple[Rule, ...] = (
    memory_for_weights,
    memory_saved,
    overflow_in_decode,
    slots_for_one_token,
    speed_bounds,
    capacities,
    experts_on_disk,
)
