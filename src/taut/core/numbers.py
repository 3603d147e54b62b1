"""Numbers as people read them."""


def scaled(number: float, unit: str = "") -> str:
    """``number`` with three digits and a prefix for powers of 1000, as for storage devices: ``1.5 MB``, ``2 k``."""
    for prefix in ("", "k", "M", "G"):
        if abs(number) < 999.5:
            return f"{number:.3g} {prefix}{unit}".strip()
        number /= 1000
    return f"{number:.3g} T{unit}"
