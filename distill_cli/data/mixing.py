"""Mixup and CutMix of pairs: who is mixed with whom, and how, as a function of (seed, view, sample id).

Pairs lie within a shard of the dealing, so that a shard needs no image of another; each view has pairs of its own. What
is mixed are the normalised inputs, on the device (`pixels.py`).

Paper: Zhang et al. 2018, arXiv:1710.09412; Yun et al. 2019, arXiv:1905.04899; both of a pair with one lambda and one
box, as timm's mode `pair` and Wu et al. 2022, arXiv:2207.10666, whose pairs are neighbours in a batch.
"""

import functools
import itertools
import struct
import zlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from timm.data.mixup import Mixup, cutmix_bbox_and_lam

from distill_cli.data.config import View
from distill_cli.derive import derive
from distill_cli.store.dealing import Dealing, Following, splitmix
from distill_cli.store.plan import Plan

SHARD_ROWS = 16384
"""Where there is no store: samples among which pairs are drawn."""


class Partners(Protocol):
    """(view, sample ids) -> with whom each is mixed; -1 where it is with nobody."""

    @property
    def final(self) -> bool:
        """Whether nobody else may turn out to be unreadable: a sample whose partner cannot be read is not either."""

    def __call__(self, view: int, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]: ...


@dataclass(frozen=True)
class DrawnPartners:
    """The partners of views that are being drawn for the first time."""

    dealing: Dealing | Following
    seed: int
    first_view: int = 0
    final = False

    def __call__(self, view: int, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return partners(self.dealing, self.seed, self.first_view + view, sample_ids)


def capture_partners(plan: Plan, view: View) -> DrawnPartners | None:
    """The partners of a plan that is being captured; None where nothing is mixed."""
    return DrawnPartners(plan.dealing, plan.seed, plan.first_view) if view.mixes else None


def partners(dealing: Dealing | Following, seed: int, view: int, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """With whom each sample is mixed in view number `view`; -1 for the one that is left over in a shard of odd size.

    The order of the first L numbers of SplitMix64, seeded by ("pair", seed, view), is a permutation of the L places of
    a shard; its neighbours 2i and 2i + 1 are a pair. Shards of one size have the same permutation, and nothing is held
    of each sample.
    """
    number, places = derive("pair", seed, view), dealing.place(sample_ids)
    order = np.argsort(places, kind="stable")
    ascending = places[order]
    shards = dealing.shard_of(ascending)
    others = np.empty_like(places)
    first = np.flatnonzero(np.diff(shards, prepend=-1))
    for start, stop in itertools.pairwise([*first.tolist(), len(places)]):
        span = dealing.places(int(shards[start]))
        others[order[start:stop]] = span.start + _other_places(number, len(span))[ascending[start:stop] - span.start]
    return np.where(others == places, -1, dealing.at(others))


@functools.lru_cache(maxsize=64)
def _other_places(number: int, size: int) -> NDArray[np.int64]:
    """The place of each place's partner, its own where it has none."""
    pairs = np.argsort(splitmix(number, size))[: size - size % 2].reshape(-1, 2)
    others = np.arange(size)
    others[pairs] = pairs[:, ::-1]
    return others


def together(sample_ids: NDArray[np.int64], partner_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The samples in their order, but each directly behind its partner where that comes earlier."""
    pair = np.where(partner_ids < 0, sample_ids, np.minimum(sample_ids, partner_ids))
    earlier = np.empty(pair.max(initial=-1) + 1, np.int64)
    earlier[pair[::-1]] = np.arange(len(pair))[::-1]
    return sample_ids[np.argsort(earlier[pair], kind="stable")]


@dataclass(frozen=True)
class Mix:
    """What another image has to do with one."""

    partner: int
    """Its sample id."""
    lam: float
    """The share of one's own label, a float32."""
    box: tuple[int, int, int, int] | None = None
    """CutMix: top, bottom, left, right of what is the partner's, in pixels; None is Mixup, of all pixels."""

    def checksum(self, crc: int) -> int:
        """An image's CRC-32, continued over partner (uint64), lambda (float32) and box (four int32, 0 for Mixup)."""
        return zlib.crc32(struct.pack("<Qf4i", self.partner, self.lam, *(self.box or (0, 0, 0, 0))), crc)


@dataclass(frozen=True)
class Mixing:
    """What is drawn for a pair of images."""

    view: View
    size: int
    """Of the images; boxes are drawn in that of the view, and their edges rounded to this."""

    def __call__(self, seed: int, view: int, sample_id: int, partner: int) -> Mix | None:
        """What one of a pair gets of the other, by timm's draws; None where it stays as it is. `numpy.random` is left
        seeded."""
        if partner < 0:
            return None
        np.random.seed(derive("mix", seed, view, min(sample_id, partner)) & 0xFFFFFFFF)
        (lam,), (cut,) = self._timm._params_per_elem(1)
        box = None
        if cut and lam < 1:
            frame = self.view.image_size
            edges, lam = cutmix_bbox_and_lam((3, frame, frame), lam)
            top, bottom, left, right = (round(int(edge) * self.size / frame) for edge in edges)
            box = top, bottom, left, right
        return Mix(partner, float(np.float32(lam)), box) if lam < 1 else None

    @functools.cached_property
    def _timm(self) -> Mixup:
        view = self.view
        return Mixup(view.mixup, view.cutmix, prob=view.mixup_prob, switch_prob=view.mixup_switch_prob, mode="pair")
