"""What draws of labelled slides are taken from, and how much of its luck they all share.

Draws from one pool are not independent: between them one sees less than labelling anew, pool and all, would bring. Take
what one labelled item does to a score (to first order these add up) as a part of its site, a part of its patient and a
part of its own; `alike` is the share of that variance which items of one patient have in common (their site's with it),
`alike_site` the share which items of one site have. A draw takes b items per class, one of each patient before a second
of any, so that patient p has the share w_p of them and site s the sum w_s of its patients'. In units of one item's
variance, over n patients, m sites and N items per class

    one labelling, pool and all     site sum(w_s^2) + patient sum(w_p^2) + own / b
    what all draws have in common   site / m        + patient / n        + own / N      the pool's own luck: `floor`
    between draws of this pool      the difference of the two                           `spread`

where sum(w_p^2) is 1/b up to b = n and then about 1/n, and sum(w_s^2), for patients taken from sites at random, goes
from 1 at one patient to 1/m at all. With one item a patient and no sites this is the correction of Nadeau and Bengio
(2003) for training sets that overlap, 1 / D + f / (1 - f) for the share f of the pool that is labelled.

That effects add up is the cautious end of what may be: near the best head a score is flat, so its variance falls with
the square of what is above. With 5 patients of 20 alike tiles the truth lay between (a power of 1.4), the floor came
out twice what it was (a fifth of the whole variance in place of a tenth) and intervals held .98. Only draws of more
labels could show the power, and these are too alike to show anything; so it stays, and intervals there are wider than
need be. (The rest of that .98 is Wilson's interval with Student's quantile of 9 patients: with the true variance it
holds .975.)
"""

from __future__ import annotations

from dataclasses import dataclass


def twice_used(budget: float, share: float) -> float:
    """TWICE_USED: factor on the variance from patients (or sites) that are tested and trained on; measured, see
    resampling.py. `share` of what a head may use is labelled.

    How much a mean score hangs on a patient who may be labelled depends on the size of the head's training set, and in
    a large archive on nothing else (to first order, as of any mean over subsets); near all of a small one it dies out.
    """
    return 1.8 + 2.7 * (1 - share) / max(1.0, budget)


@dataclass(frozen=True)
class Pool:
    """What the draws are taken from: labelled items and patients per class (means over classes).

    With `num_folds` it is everything, each fold being left out in turn; with 0 the test set is fixed and not in it.
    None: unknown, and then intervals are about this very pool. `sites`: where whole sites are left out, as many sites
    of one size as would be worth these.
    """

    slides: float | None
    patients: float | None
    num_folds: int = 0
    sites: float | None = None

    @property
    def kept(self) -> float:
        """The share of the pool that one head may be trained on."""
        return 1 - 1 / self.num_folds if self.num_folds else 1.0

    def labelled_share(self, budget: float) -> float:
        """How much of what one head may use it is given, in patients (a budget takes new patients first)."""
        return min(1.0, budget / (self.patients * self.kept)) if self.patients else 0.0

    def spread(self, budget: float, alike: float = 1.0, alike_site: float = 0.0) -> float:
        """Variance between draws of one pool, in units of one labelled item's."""
        of_site, of_patient, own = _parted(alike, alike_site)
        per_patient = self._per_patient(budget)
        whole = of_site * self._per_site(per_patient) + of_patient * per_patient + own / budget
        return max(0.0, whole - self.floor(alike, alike_site))

    def floor(self, alike: float = 1.0, alike_site: float = 0.0) -> float:
        """What no number of draws averages away: the variance of the pool itself, in the same units."""
        if not self.patients:
            return 0.0
        of_site, of_patient, own = _parted(alike, alike_site)
        shared = of_site / self.sites if self.sites else 0.0
        return shared + of_patient / self.patients + own / max(self.slides or 0.0, self.patients)

    def _per_patient(self, budget: float) -> float:
        """Sum over patients of the squared share that each has of the labels: 1/b while each has one, then 1/n."""
        if not self.patients or budget <= self.patients:
            return 1 / budget
        turns, over = divmod(budget, self.patients)
        return (over * (turns + 1) ** 2 + (self.patients - over) * turns**2) / budget**2

    def _per_site(self, per_patient: float) -> float:
        """The same over sites: two labelled patients are of one site as often as chance has it."""
        if not self.sites or not self.patients or self.patients <= 1:
            return per_patient
        together = max(0.0, self.patients / self.sites - 1) / (self.patients - 1)
        return per_patient + (1 - per_patient) * together

    def patients_factor(self, budget: float) -> float:
        return twice_used(budget, self.labelled_share(budget)) if self.num_folds else 1.0


def _parted(alike: float, alike_site: float) -> tuple[float, float, float]:
    """An item's variance: of its site, of its patient beyond that, its own."""
    return alike_site, max(0.0, alike - alike_site), 1 - max(alike, alike_site)
