"""When examples that cannot be read are too many, and what is said then."""

from collections.abc import Mapping

MAX_UNREADABLE = 0.1  # What data.max_unreadable is in the configs.
MAX_LISTED = 1000  # Lines of an error.


def too_many(unreadable: int, count: int, share: float = MAX_UNREADABLE) -> bool:
    """Whether so many unreadable ones of `count` images are more than one and than that share."""
    return unreadable > max(1, share * count)


def complaint(unreadable: Mapping[str, str], count: int, which: str, remedy: str) -> str:
    """The text of an error.

    Args:
        unreadable: name -> reason.
        count: of all images.
        which: could not be read, in words.
        remedy: goes on after "Remove or repair them".
    """
    lines = [f"  {name} ({why})" for name, why in sorted(unreadable.items())]
    return (
        f"Of {count} images, {which} could not be read. Remove or repair them (`flextok data "
        f"check` names them all){remedy}. So far {len(lines)} were unreadable:\n"
        + "\n".join(lines[:MAX_LISTED])
    )
