"""`flextok compare`: the metrics of two results side by side, and how their setups differ."""

from flextok_jax.io import storage


def compare(args) -> None:
    """Prints the metrics that both have, then the differences of their metadata."""
    a, b = (_read(path) for path in (args.first, args.second))
    first, second = storage.dotted(a["metrics"]), storage.dotted(b["metrics"])
    print(f"{'':<26}{'first':>14}{'second':>14}{'difference':>14}")
    for name, x in first.items():
        y = second.get(name)
        if isinstance(x, int | float) and isinstance(y, int | float):
            print(f"{name:<26}{x:>14.6g}{y:>14.6g}{y - x:>14.4g}")
    found = storage.differences(a["metadata"], b["metadata"], words=("first", "second"))
    print("Their setups differ:" if found else "Their setups are the same.")
    print("".join(f"  {line}\n" for line in found), end="")


def _read(path) -> dict:
    found = storage.read_json(path)
    if not all(isinstance(found.get(part), dict) for part in ("metadata", "metrics")):
        raise ValueError(f"{path} is no result of flextok evaluate: no metadata and metrics in it")
    return found
