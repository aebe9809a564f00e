"""Quantities as people read them. GB is 10⁹ bytes and GiB is 2³⁰; a column uses one of them."""

import math


def si_bytes(count: float) -> str:
    """Bytes in decimal units: 19.4 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        value = count / size
        if abs(value) >= 999.5:
            return f"{value:.0f} {unit}"  # three digits would be written with an exponent
        if abs(value) >= 1:
            return f"{value:.3g} {unit}"
    return f"{count:.0f} B"


def byte_unit(largest: float) -> tuple[str, float]:
    """The decimal unit of a column whose largest value this is, and its size in bytes."""
    if largest >= 1e9:
        return "GB", 1e9
    return ("MB", 1e6) if largest >= 1e6 else ("kB", 1e3)


def duration(seconds: float) -> str:
    """Seconds as 41 s, 3 min 20 s or 2 h 05 min."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    seconds = round(seconds)
    minutes = seconds // 60
    if minutes < 60:
        return f"{minutes} min {seconds % 60:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def decimals_for(uncertainty: float) -> int:
    """Decimal places that keep two significant digits of the uncertainty, at most six.

    The rounding rule of the Particle Data Group, simplified: 6.5613 ± 0.093 is written 6.561 ± 0.093.
    """
    if uncertainty <= 0 or not math.isfinite(uncertainty):
        return 4
    return min(6, max(0, 1 - math.floor(math.log10(uncertainty))))
