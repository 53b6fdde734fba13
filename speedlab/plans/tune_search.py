"""How Tune spends its minutes: which plans it makes images with, and which one it recommends. Pure.

Plans that differ by rounding share their distance, so that of each group the one predicted fastest is tried. First each
technique alone on one prompt, its settings by bisection; what their distances add up to predicts the stacks. Then the
stacks that are predicted to hold the floor, fastest first; then rounds over more prompts, in which the slower half
goes; last the held-out seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .tune_space import Candidate

# A stack is tried although its predicted distance is so many times the floor.
_SLACK = 1.6
_FINALISTS = 4
# One image tells a distance roughly: a plan whose first one is so many times the floor away gets another one.
_NEAR = 1.15
# No difference larger than this share is called noise.
_TIE = 0.03
# Ways that differ by rounding are all timed where their predictions are so many times the fastest one's at most.
_ALIKE = 1.1
# So many of the last images tell how fast the machine is now.
_PACES = 5
NO_TIME = "There was no time for even one plan: give more minutes."
# Of the time, what the first prompt may take; the rest is for more prompts and the held-out seeds.
_FIRST_SHARE = 0.6


@dataclass(frozen=True)
class Floor:
    """The most that an image may be away from the user's own: relative error of the latent, 1 - SSIM, mean squared
    error of the image (as PSNR in dB), and LPIPS, where that is installed."""

    latent: float = math.inf
    ssim: float = -1.0
    psnr: float = -math.inf
    lpips: float = math.inf


# Written by benchmarks/floors.py; until it has run, set by what the words are meant to say.
_TABLE = json.loads(Path(__file__).with_name("floors.json").read_text(encoding="utf-8"))
FLOORS: Mapping[str, Floor] = {**{name: Floor(**limits) for name, limits in _TABLE["floors"].items()}, "any": Floor()}
CALIBRATED: str = _TABLE["calibrated"]


@dataclass(frozen=True)
class Look:
    """One image: seconds from text to saved image, and how far it is from the user's own; of the model that draws the
    share of attributes that are right. `predicted`: the seconds that were expected before it was made."""

    seconds: float
    latent: float
    ssim: float
    psnr: float
    lpips: float | None = None
    attributes: float | None = None
    predicted: float | None = None


@dataclass
class Tried:
    """A candidate with its images by prompt; `predicted`: by the parts alone; `why` tells why it is out."""

    candidate: Candidate
    predicted: float
    looks: dict[int, Look] = field(default_factory=dict)
    why: str | None = None

    @property
    def seconds(self) -> float:
        """The median over its images."""
        return statistics.median(look.seconds for look in self.looks.values())

    @property
    def expected(self) -> float:
        """The seconds that were expected before each of its images: the median; by the parts alone before the first."""
        known = [look.predicted for look in self.looks.values() if look.predicted is not None]
        return statistics.median(known) if known else self.predicted

    @property
    def mean(self) -> Look:
        """The mean distance; of PSNR by the mean squared error."""
        looks = list(self.looks.values())
        known = [look.lpips for look in looks if look.lpips is not None]
        right = [look.attributes for look in looks if look.attributes is not None]
        return Look(
            self.seconds,
            statistics.fmean(look.latent for look in looks),
            statistics.fmean(look.ssim for look in looks),
            _psnr(statistics.fmean(_mse(look.psnr) for look in looks)),
            statistics.fmean(known) if known else None,
            statistics.fmean(right) if right else None,
        )


def holds(look: Look, floor: Floor, slack: float = 1.0) -> bool:
    """Whether a distance is within the floor, times `slack`."""
    return (
        look.latent <= floor.latent * slack
        and 1.0 - look.ssim <= (1.0 - floor.ssim) * slack + 1e-9
        and _mse(look.psnr) <= _mse(floor.psnr) * slack
        and (look.lpips is None or look.lpips <= floor.lpips * slack)
    )


def _mse(psnr: float) -> float:
    return 0.0 if psnr == math.inf else math.inf if psnr == -math.inf else 10.0 ** (-psnr / 10.0)


def _psnr(mse: float) -> float:
    return math.inf if mse == 0.0 else -10.0 * math.log10(mse)


class OutOfTime(Exception):  # noqa: N818 - no error: the minutes are over
    """The minutes do not allow one more image."""


@dataclass
class Found:
    """What a search found: the recommended plan, or None with the reason; those within the noise of it; all tried.
    `complete`: whether it ended before the minutes did."""

    best: Tried | None
    ties: list[Tried]
    tried: list[Tried]
    notes: list[str] = field(default_factory=list)
    complete: bool = False


class Search:
    """One search over candidates with their predicted seconds.

    `run` makes the image of a candidate on prompt number i, or raises an error that takes the candidate out; `left`
    tells the seconds that are left. `prompts` are for the choice, `held_out` more of them for its confirmation.
    """

    def __init__(
        self, predicted: Mapping[Candidate, float], user: Candidate, floor: Floor, prompts: int, held_out: int,
        run: Callable[[Candidate, int], Look], left: Callable[[], float],
    ) -> None:  # fmt: skip
        self.floor, self.prompts, self.held_out, self.run, self.left = floor, prompts, held_out, run, left
        self.user = user
        self.seconds = left()
        self.notes: list[str] = []
        # Of those that differ by rounding the one predicted fastest.
        self.pool: dict[tuple[str, ...], Tried] = {}
        self.alike: dict[tuple[str, ...], list[Tried]] = {}
        for candidate, seconds in sorted(predicted.items(), key=lambda pair: pair[1]):
            one = Tried(candidate, seconds)
            if candidate.lossy in self.pool:
                self.alike.setdefault(candidate.lossy, []).append(one)
            self.pool.setdefault(candidate.lossy, one)
        self.chains = self._chains()
        self.tried: list[Tried] = []
        self._kept = self.seconds * (1.0 - _FIRST_SHARE)
        self._paces: list[float] = []
        self._places: dict[tuple[Candidate, int], int] = {}

    @property
    def pace(self) -> float:
        """What the last images took by what the parts said: the machine drifts, and the parts were measured before."""
        return statistics.median(self._paces[-_PACES:]) if self._paces else 1.0

    def corrected_s(self, one: Tried) -> float:
        """Its seconds on a machine as fast as it was when the parts were measured, by the images around each of its
        own: images of other times are compared by this."""
        around = _PACES // 2
        places = {prompt: self._places[one.candidate, prompt] for prompt in one.looks}
        return statistics.median(
            one.looks[prompt].seconds / statistics.median(self._paces[max(place - around, 0) : place + around + 1])
            for prompt, place in places.items()
        )

    def see(self, candidate: Candidate, seconds: float) -> None:
        """Note what an image of a candidate took that this search has not asked for."""
        own = self.pool.get(candidate.lossy)
        same = [one for one in (own, *self.alike.get(candidate.lossy, ())) if one and one.candidate == candidate]
        if same and same[0].predicted > 0:
            self._paces.append(seconds / same[0].predicted)

    def _chains(self) -> dict[str, list[Tried]]:
        """What differs from the user's own in one thing, by that thing, the mildest setting first."""
        chains: dict[str, list[Tried]] = {}
        for lossy, one in sorted(self.pool.items(), key=lambda pair: -pair[1].predicted):
            places = [
                place for place, pair in enumerate(zip(lossy, self.user.lossy, strict=True)) if pair[0] != pair[1]
            ]
            if len(places) == 1:
                own = lossy[places[0]]
                # DeepCache, copying or extrapolating, and forecasts, fixed or adaptive, have an order each; of samplers
                # and weights none is the milder one.
                kind = "".join(word for word in ("fixed", "extrapolate") if word in own)
                ordered = own.partition("(")[0] + kind if places[0] in (1, 2) else ""
                chains.setdefault(f"{places[0]} {own if places[0] in (0, 5) else ordered}", []).append(one)
        return chains

    def find(self) -> Found:
        """Search until the minutes are over, or nothing faster is left to try. Raises what ends everything."""
        confirmed: list[Tried] = []
        complete = True
        try:
            self._singles()
            self._stacks()
        except OutOfTime:
            complete = False
            self.notes.append("The minutes were over before every plan that looked good was tried.")
        passing = self._passing()
        try:
            complete = self._rounds(passing, confirmed) and complete
        except OutOfTime:
            complete = False
            if not confirmed:
                self.notes.append("The minutes were over before the held-out seeds: the choice is not confirmed.")
                confirmed = [one for one in self._passing() if one in passing]
        return replace(self._chosen(confirmed), complete=complete)

    def _passing(self) -> list[Tried]:
        good = [one for one in self.tried if one.looks and one.why is None and holds(one.mean, self.floor)]
        # They were made at other times, between which the machine drifts.
        return sorted(good, key=self.corrected_s)

    def best_so_far(self) -> Tried | None:
        """The fastest one that holds the floor on all that was made of it."""
        return min(self._passing(), key=lambda one: one.seconds, default=None)

    def _look(self, one: Tried, prompt: int, keep_s: float = 0.0) -> bool:
        """Make one image, unless fewer than `keep_s` seconds were left then; whether the candidate is still in."""
        if one.why is not None or prompt in one.looks:
            return one.why is None
        expected = one.predicted * self.pace
        if self.left() - expected * 1.1 < keep_s:
            raise OutOfTime
        if one not in self.tried:
            self.tried.append(one)
        try:
            one.looks[prompt] = replace(self.run(one.candidate, prompt), predicted=expected)
            self._places[one.candidate, prompt] = len(self._paces)
            self._paces.append(one.looks[prompt].seconds / max(one.predicted, 1e-9))
        except Refused as error:
            one.why = str(error)
        return one.why is None

    def _singles(self) -> None:
        """The user's own settings in exact ways, then of each technique alone the strongest setting that holds."""
        for one in self.pool.values():
            if one.candidate.lossy == self.user.lossy:
                self._look(one, 0)
        ends = {name: [0, len(chain)] for name, chain in self.chains.items()}
        # One image of each chain after the other, so that none is left out where the minutes are few.
        while open_ones := [name for name, (low, high) in ends.items() if low < high]:
            for name in open_ones:
                low, high = ends[name]
                middle, chain = (low + high) // 2, self.chains[name]
                good = self._look(chain[middle], 0, self._kept) and holds(chain[middle].mean, self.floor)
                # A setting that cannot run tells nothing of the others, and goes.
                if not chain[middle].looks:
                    del chain[middle]
                    ends[name] = [low, high - 1]
                else:
                    ends[name] = [middle + 1, high] if good else [low, middle]

    def _stacks(self) -> None:
        """Stacks, the fastest first, until enough hold the floor: a slower one would not be recommended."""
        ratios: list[float] = []
        for one in sorted(self.pool.values(), key=lambda one: one.predicted):
            faster = [known for known in self._passing() if self.corrected_s(known) <= one.predicted]
            if len(faster) >= _FINALISTS:
                return
            estimate = None if one.looks or one.why is not None else self.estimate(one.candidate)
            # Where stacks turned out closer or farther than they added up to, so will the next ones.
            slack = _SLACK / statistics.median(ratios) if len(ratios) > 2 else _SLACK
            if estimate is None or not holds(estimate, self.floor, slack):
                continue
            if self._look(one, 0, self._kept) and estimate.latent > 0:
                ratios.append(max(one.mean.latent / estimate.latent, 0.1))

    def estimate(self, candidate: Candidate) -> Look | None:
        """The distance that the parts of a candidate add up to, as if they had nothing to do with each other."""
        reference = self.user.lossy
        parts = []
        for place, (own, plain) in enumerate(zip(candidate.lossy, reference, strict=True)):
            if own == plain:
                continue
            part = self._alone((*reference[:place], own, *reference[place + 1 :]))
            if part is None:
                return None
            parts.append(part)
        lpips = [look.lpips for look in parts if look.lpips is not None]
        return Look(
            0.0,
            math.sqrt(sum(look.latent**2 for look in parts)),
            1.0 - sum(1.0 - look.ssim for look in parts),
            _psnr(sum(_mse(look.psnr) for look in parts)),
            sum(lpips) if lpips else None,
        )

    def _alone(self, lossy: tuple[str, ...]) -> Look | None:
        """The distance of one technique alone: as seen, or in proportion to what it saves beside a stronger setting."""
        own = self.pool.get(lossy)
        if own is None:
            # Of plans that a user names there may be no single ones; then only the stack itself can tell.
            return Look(0.0, 0.0, 1.0, math.inf)
        if own.why is not None:
            return None
        if 0 in own.looks:
            return own.looks[0]
        plain = self.pool.get(self.user.lossy)
        chain = next((chain for chain in self.chains.values() if own in chain), [])
        stronger = [one for one in chain if one.looks and one.predicted <= own.predicted]
        if plain is None or not stronger or not holds(stronger[0].looks[0], self.floor):
            return None
        share = (plain.predicted - own.predicted) / max(plain.predicted - stronger[0].predicted, 1e-9)
        look = stronger[0].looks[0]
        lpips = None if look.lpips is None else look.lpips * share
        psnr = _psnr(_mse(look.psnr) * share**2)
        return Look(0.0, look.latent * share, 1.0 - (1.0 - look.ssim) * share, psnr, lpips)

    def _rounds(self, passing: Sequence[Tried], confirmed: list[Tried]) -> bool:
        """More prompts for fewer candidates, then the held-out seeds for the fastest that are left; whether there was
        time for every prompt."""
        alive, every = [*self._near(passing), *passing[:_FINALISTS]], True
        # On each held-out seed the user's own image is made too.
        own = self.pool[self.user.lossy].predicted if self.user.lossy in self.pool else 0.0
        confirming = self.held_out * (own + (alive[0].predicted if alive else 0.0)) * self.pace
        try:
            for prompt in range(1, self.prompts):
                for one in alive:
                    # One more than two prompts must not cost the confirmation.
                    self._look(one, prompt, confirming if prompt > 1 else 0.0)
                left = [one for one in self._passing() if one in alive]
                alive = left[: max(len(left) // 2, min(len(left), 2))]
        except OutOfTime:
            self.notes.append("The minutes did not allow every prompt: the choice is by the first of them.")
            alive = [one for one in self._passing() if one in alive]
            every = False
        rest = [one for one in self._passing() if one not in alive]
        for one in (*alive, *rest):
            # The second one may be as fast, and takes the first one's place where that fails.
            if len(confirmed) == 2 or not self._confirm(one, confirmed) or len(confirmed) > 1:
                continue
            # The parts may have told the wrong one of the ways that differ by rounding.
            for other in self.alike.get(one.candidate.lossy, ()):
                if other.predicted <= one.predicted * _ALIKE:
                    self._confirm(other, confirmed)
        return every

    def _near(self, passing: Sequence[Tried]) -> list[Tried]:
        """The fastest that just miss the floor and would be faster than all that hold it."""
        fastest = self.corrected_s(passing[0]) if passing else math.inf
        missing = [
            one for one in self.tried
            if one.looks and one.why is None and not holds(one.mean, self.floor)
            and holds(one.mean, self.floor, _NEAR) and self.corrected_s(one) < fastest
        ]  # fmt: skip
        return sorted(missing, key=self.corrected_s)[: _FINALISTS // 2]

    def _confirm(self, one: Tried, confirmed: list[Tried]) -> bool:
        held_out = range(self.prompts, self.prompts + self.held_out)
        if not all(self._look(one, prompt) for prompt in (0, *held_out)):
            return False
        held = {prompt: one.looks[prompt] for prompt in held_out}
        if held and not holds(Tried(one.candidate, 0.0, held).mean, self.floor):
            one.why = "it does not hold the floor on the held-out seeds"
            return False
        confirmed.append(one)
        return True

    def _chosen(self, confirmed: Sequence[Tried]) -> Found:
        if not confirmed:
            why = "No plan holds the floor." if self.tried else NO_TIME
            return Found(None, [], self.tried, [why, *self.notes])
        ranked = sorted(confirmed, key=lambda one: one.seconds)
        fastest = ranked[0]
        ties = [one for one in ranked if _is_tie(fastest, one)]
        # Of plans that are as fast the closest one: a technique that loses to fewer steps is not recommended.
        best = min(ties, key=lambda one: (one.mean.latent, one.seconds))
        return Found(best, [one for one in ties if one is not best], self.tried, self.notes)


class Refused(Exception):  # noqa: N818 - a result like any other
    """A candidate that cannot run: the text says why."""


def _is_tie(fastest: Tried, other: Tried) -> bool:
    """Whether the difference is within what the times of each swing by."""
    times = [[look.seconds for look in one.looks.values()] for one in (fastest, other)]
    noise = max((max(own) - min(own)) / 2.0 for own in times)
    return other.seconds - fastest.seconds <= min(noise, _TIE * fastest.seconds)
