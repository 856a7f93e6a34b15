"""Fair queueing of rows: first come first served for each owner; between owners, the one with the fewest tokens is next.

Tokens of prompts and answers both count. A returning owner starts from the lowest current count, so idle time earns no credit
(the virtual token counter of Sheng et al. 2024, "Fairness in Serving Large Language Models").
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from posttrain.errors import BusyError
from posttrain.generate.requests import Row

# The share of a server's places that is reserved for owners that hold none. It is also the minimum share of one of many owners:
# a step with more rows takes longer for all, but often few owners want many rows.
MIN_SHARE = 1 / 8


def share_of_places(places: int, owners: int) -> int:
    """The number of places, and of rows of a step, that each of `owners` owners may have."""
    return max(1, int(places * (1 - MIN_SHARE) * max(MIN_SHARE, 1 / owners)))


class OwnerShares:
    """Places that owners hold. No owner can hold so many that another gets none.

    One owner holds at most `each`. More than two owners share twice as many equally. A reserve of an eighth of all places is
    for owners that hold none. `state` describes a held place in error texts: "completions wait".
    """

    def __init__(self, each: int, where: str, state: str) -> None:
        self._each, self._where, self._state = each, where, state
        self._open = 2 * each
        self._all = self._open + max(1, int(self._open * MIN_SHARE / (1 - MIN_SHARE)))
        self.held: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """The number of held places."""
        return self.held.total()

    def check(self, owner: str, count: int = 1) -> None:
        """Raise BusyError if an owner cannot take `count` more places."""
        held_by_owner, total = self.held[owner], self.held.total()
        share = max(1, min(self._each, self._open // (len(self.held) + (not held_by_owner))))
        owner_limit, total_limit = (share, self._open) if held_by_owner else (self._each, self._all)
        if held_by_owner + count > owner_limit:
            self._refuse(held_by_owner, count, owner_limit, f' of "{owner}"' if owner else "")
        if total + count > total_limit:
            self._refuse(total, count, total_limit, " of all")

    def _refuse(self, held: int, count: int, most: int, whose: str) -> None:
        problem = f"{held} {self._state} and {count} more are requested"
        raise BusyError(self._where, problem, allowed=f"at most {most}{whose}", do="try again later")

    def take(self, owner: str, count: int = 1) -> None:
        """Take `count` places. Raises BusyError as `check` does."""
        self.check(owner, count)
        self.held[owner] += count

    def give(self, owner: str, count: int = 1) -> None:
        """Return `count` places."""
        self.held[owner] -= count
        if not self.held[owner]:
            del self.held[owner]

    @contextmanager
    def hold(self, owner: str, count: int = 1) -> Iterator[None]:
        """Hold `count` places for the length of a block. Raises BusyError as `check` does."""
        self.take(owner, count)
        try:
            yield
        finally:
            self.give(owner, count)


class PromptDebts:
    """Limits how much the prompts of one owner delay the answers of others: to at most half of the time.

    A step with prompts takes longer for all rows. The extra time is a debt of their owner. Its next prompts wait until steps
    without them have paid the debt.
    """

    def __init__(self) -> None:
        # Seconds of a step without prompts, as a moving average with weight 1/4 for the last one.
        self._usual_seconds: float | None = None
        self._debts: dict[str, float] = {}

    def may_prefill(self, owner: str, decoding: Mapping[str, int]) -> bool:
        """Whether prompts of this owner may be computed in a step in which these owners have decoding rows."""
        return owner not in self._debts or not decoding.keys() - {owner}

    def pay(self, seconds: float, prompts: Mapping[str, int], decoding: Mapping[str, int]) -> None:
        """Account for a step of `seconds` with these prompt tokens by owner."""
        if not prompts:
            self._usual_seconds = seconds if self._usual_seconds is None else 0.75 * self._usual_seconds + 0.25 * seconds
        usual = seconds if self._usual_seconds is None else min(seconds, self._usual_seconds)
        self._debts = {owner: debt - usual for owner, debt in self._debts.items() if debt > usual}
        for owner, tokens in prompts.items():
            if decoding.keys() - {owner} and seconds > usual:
                self._debts[owner] = self._debts.get(owner, 0.0) + (seconds - usual) * tokens / sum(prompts.values())


class FairQueue:
    """Waiting groups of rows. The rows of a group share a prompt and start together."""

    def __init__(self) -> None:
        self._groups: dict[str, deque[list[Row]]] = {}
        self._tokens: Counter[str] = Counter()

    def __len__(self) -> int:
        """The number of waiting completions."""
        return sum(map(len, self))

    def __iter__(self) -> Iterator[list[Row]]:
        return (group for groups in self._groups.values() for group in groups)

    @property
    def counts(self) -> Counter[str]:
        """Waiting completions by owner."""
        return Counter({owner: sum(map(len, groups)) for owner, groups in self._groups.items()})

    @property
    def owners(self) -> set[str]:
        """Owners with waiting groups."""
        return set(self._groups)

    def add(self, group: list[Row]) -> None:
        """Append a group to its owner's queue."""
        owner = group[0].request.owner
        if owner not in self._groups:
            lowest = min((self._tokens[waiting_owner] for waiting_owner in self._groups), default=0)
            self._tokens[owner] = max(self._tokens[owner], lowest)
            self._groups[owner] = deque()
        self._groups[owner].append(group)

    def next(self, may: Callable[[str], bool]) -> list[Row] | None:
        """The next group among the owners for which `may` is true. It stays in the queue."""
        owners = [owner for owner in self._groups if may(owner)]
        return self._groups[min(owners, key=lambda owner: self._tokens[owner])][0] if owners else None

    def take(self, group: list[Row]) -> None:
        """Remove a group from the queue."""
        owner = group[0].request.owner
        self._groups[owner].remove(group)
        if not self._groups[owner]:
            del self._groups[owner]

    def charge(self, owner: str, tokens: int) -> None:
        """Add tokens to an owner's count."""
        self._tokens[owner] += tokens
        if len(self._tokens) > 10_000:  # dropped owners start again from the lowest count
            self._tokens = Counter({owner: used for owner, used in self._tokens.items() if owner in self._groups})

    def drop(self, number: int) -> list[Row]:
        """Remove a row from its group. Returns it in a list, which is empty if the row is not waiting."""
        for group in list(self):
            for row in group:
                if row.number == number:
                    if len(group) == 1:
                        self.take(group)
                    else:
                        group.remove(row)
                    return [row]
        return []
