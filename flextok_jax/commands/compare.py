"""`flextok compare`: the metrics of two results side by side, and how their setups differ."""

from flextok_jax.commands import options
from flextok_jax.io import storage


def compare(args: options.Compare) -> None:
    """Prints the metrics that both have, then the differences of their metadata."""
    a, b = storage.read_json(args.first), storage.read_json(args.second)
    for path, found in ((args.first, a), (args.second, b)):
        if not {"metadata", "metrics"} <= set(found):
            raise ValueError(f"{path} is no result of flextok evaluate: it has no metrics")
    first, second = storage.dotted(a["metrics"]), storage.dotted(b["metrics"])
    print(f"{'':<26}{'first':>14}{'second':>14}{'difference':>14}")
    for name, x in first.items():
        y = second.get(name)
        if isinstance(x, int | float) and isinstance(y, int | float):
            print(f"{name:<26}{x:>14.6g}{y:>14.6g}{y - x:>14.4g}")
    found = storage.differences(a["metadata"], b["metadata"], words=("first", "second"))
    print("Their setups differ:" if found else "Their setups are the same.")
    print("".join(f"  {line}\n" for line in found), end="")
