"""What is wrong with the name of a split, for `stoker check`: apart from the rest, since this imports nothing heavy."""

from stoker.data.selection import read_split
from stoker.errors import DataError, Problem


def problem(split: str, where: str) -> Problem | None:
    """Returns what is wrong with a split of the source at key `where`, None if it can be read."""
    try:
        read_split(split, where)
    except DataError as error:
        found = error.problems[0]
        return Problem(f"{where}.{found.what}", fix=found.fix)
    return None
