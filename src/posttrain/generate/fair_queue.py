"""Rows that wait for a place: first come first served for each owner, and between owners whoever has had the least.

What an owner has had is counted in tokens, prompts and answers alike; one that comes anew starts at the least of those that
wait, so that nobody saves up (the virtual token counter of Sheng et al. 2024, "Fairness in Serving Large Language Models").
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from posttrain.errors import BusyError
from posttrain.generate.requests import Row

# Of the places of a server, what is kept for owners that come anew. It is also the least that one of many owners may have: a
# step with more rows takes longer for all, but few owners may want many.
LEAST_SHARE = 1 / 8


def share_of_places(places: int, owners: int) -> int:
    """How many places, and rows of a step, one of so many owners may have that want some."""
    return max(1, int(places * (1 - LEAST_SHARE) * max(LEAST_SHARE, 1 / owners)))


class Shares:
    """Places that owners hold, of which no owner can have so many that another gets none.

    One owner holds at most `each`, and an equal share of twice as many where there are more than two owners. Beyond these a
    reserve is kept, an eighth of all, for owners that hold none. `what` says of a number of them what they do: "completions
    wait".
    """

    def __init__(self, each: int, where: str, what: str) -> None:
        self._each, self._where, self._what = each, where, what
        self._open = 2 * each
        self._all = self._open + max(1, int(self._open * LEAST_SHARE / (1 - LEAST_SHARE)))
        self.held: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Places that are held."""
        return self.held.total()

    def check(self, owner: str, count: int = 1) -> None:
        """Raise BusyError where an owner cannot have so many more."""
        held, total = self.held[owner], self.held.total()
        share = max(1, min(self._each, self._open // (len(self.held) + (not held))))
        own, every = (share, self._open) if held else (self._each, self._all)
        if held + count > own:
            self._refuse(held, count, own, f' of "{owner}"' if owner else "")
        if total + count > every:
            self._refuse(total, count, every, " of all")

    def _refuse(self, held: int, count: int, most: int, whose: str) -> None:
        found = f"{held} {self._what} and {count} more are asked for"
        raise BusyError(self._where, found, allowed=f"at most {most}{whose}", do="ask again later")

    def take(self, owner: str, count: int = 1) -> None:
        """Hold so many more. Raises BusyError as `check` does."""
        self.check(owner, count)
        self.held[owner] += count

    def give(self, owner: str, count: int = 1) -> None:
        """Give back so many."""
        self.held[owner] -= count
        if not self.held[owner]:
            del self.held[owner]

    @contextmanager
    def hold(self, owner: str, count: int = 1) -> Iterator[None]:
        """Hold so many for the length of a block. Raises BusyError as `check` does."""
        self.take(owner, count)
        try:
            yield
        finally:
            self.give(owner, count)


class PromptTime:
    """What the prompts of one owner take of the time of others: while answers of others are under way, at most half.

    A step with prompts takes longer for all. By how much is its owner's debt, which the steps pay that it lets go by.
    """

    def __init__(self) -> None:
        # Seconds of a step without prompts, the last one's weighing a quarter.
        self._usual: float | None = None
        self._debts: dict[str, float] = {}

    def may(self, owner: str, decoding: Mapping[str, int]) -> bool:
        """Whether prompts of this owner are computed in a step in which rows of these owners get tokens."""
        return owner not in self._debts or not decoding.keys() - {owner}

    def pay(self, seconds: float, prompts: Mapping[str, int], decoding: Mapping[str, int]) -> None:
        """A step took so many seconds, with these tokens of prompts by owner."""
        if not prompts:
            self._usual = seconds if self._usual is None else 0.75 * self._usual + 0.25 * seconds
        usual = seconds if self._usual is None else min(seconds, self._usual)
        self._debts = {owner: debt - usual for owner, debt in self._debts.items() if debt > usual}
        for owner, tokens in prompts.items():
            if decoding.keys() - {owner} and seconds > usual:
                self._debts[owner] = self._debts.get(owner, 0.0) + (seconds - usual) * tokens / sum(prompts.values())


class FairQueue:
    """Groups of rows that share a prompt and join together."""

    def __init__(self) -> None:
        self._groups: dict[str, deque[list[Row]]] = {}
        self._had: Counter[str] = Counter()

    def __len__(self) -> int:
        """Completions that wait."""
        return sum(map(len, self))

    def __iter__(self) -> Iterator[list[Row]]:
        return (group for groups in self._groups.values() for group in groups)

    @property
    def counts(self) -> Counter[str]:
        """Completions that wait, by owner."""
        return Counter({owner: sum(map(len, groups)) for owner, groups in self._groups.items()})

    @property
    def owners(self) -> set[str]:
        """Who has something waiting."""
        return set(self._groups)

    def add(self, group: list[Row]) -> None:
        """Put a group behind the others of its owner."""
        owner = group[0].request.owner
        if owner not in self._groups:
            least = min((self._had[other] for other in self._groups), default=0)
            self._had[owner] = max(self._had[owner], least)
            self._groups[owner] = deque()
        self._groups[owner].append(group)

    def next(self, may: Callable[[str], bool]) -> list[Row] | None:
        """The group that comes next, which stays, among the owners that may have another place."""
        owners = [owner for owner in self._groups if may(owner)]
        return self._groups[min(owners, key=lambda owner: self._had[owner])][0] if owners else None

    def take(self, group: list[Row]) -> None:
        """The group leaves the queue."""
        owner = group[0].request.owner
        self._groups[owner].remove(group)
        if not self._groups[owner]:
            del self._groups[owner]

    def charge(self, owner: str, tokens: int) -> None:
        """Count what an owner had."""
        self._had[owner] += tokens
        if len(self._had) > 10_000:  # owners that were forgotten start at the least of those that wait
            self._had = Counter({owner: had for owner, had in self._had.items() if owner in self._groups})

    def drop(self, number: int) -> list[Row]:
        """Take one row out of its group; the row, where it waited."""
        for group in list(self):
            for row in group:
                if row.number == number:
                    if len(group) == 1:
                        self.take(group)
                    else:
                        group.remove(row)
                    return [row]
        return []
