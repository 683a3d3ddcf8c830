"""`flextok compare`: two results, their numbers side by side and how they were made differently."""

from flextok_jax.evaluation import protocol
from flextok_jax.io import storage


def compare(args) -> None:
    """Prints the numbers that both have, then the differences of the stamps."""
    a, b = (_read(path) for path in (args.first, args.second))
    first, second = _numbers(a["metrics"]), _numbers(b["metrics"])
    print(f"{'':<26}{'first':>14}{'second':>14}{'difference':>14}")
    for name in (name for name in first if name in second):
        x, y = first[name], second[name]
        print(f"{name:<26}{x:>14.6g}{y:>14.6g}{y - x:>14.4g}")
    different = list(protocol.differences(a["stamp"], b["stamp"]))
    if not different:
        print("They were made in the same way.")
    else:
        print("They were made differently (first | second):")
        print("\n".join(f"  {line}" for line in different))


def _numbers(metrics: dict, path: str = "") -> dict[str, float]:
    """All numbers, those of an inner dictionary under "NAME KEY"."""
    found = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            found |= _numbers(value, f"{path}{name} ")
        elif isinstance(value, (int, float)):
            found[f"{path}{name}"] = value
    return found


def _read(path) -> dict:
    found = storage.read_json(path)
    if not all(isinstance(found.get(part), dict) for part in ("stamp", "metrics")):
        raise ValueError(f"{path} is no result of flextok evaluate: it has no stamp and metrics")
    return found
