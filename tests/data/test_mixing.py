"""Mixup and CutMix: who is mixed with whom, what is drawn, and the arithmetic, which is timm's."""

import hashlib
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data.mixup import Mixup, mixup_target

from distill_cli.data.batches import Batches
from distill_cli.data.config import DataConfig, View
from distill_cli.data.idx import ArraySource
from distill_cli.data.loader import load
from distill_cli.data.mixing import DrawnPartners, Mix, Mixing, partners, together
from distill_cli.data.orders import ListingOrder, Order, TrainingOrder
from distill_cli.data.pixels import Mixture
from distill_cli.data.sources import UnreadableImage
from distill_cli.data.views import resolve_view, train_transform
from distill_cli.randomness import derive, preserved
from distill_cli.replay import StoredPartners
from distill_cli.store.dealing import Dealing, Following, splitmix
from distill_cli.store.plan import Generation, Plan
from distill_cli.store.reader import Store
from distill_cli.store.rows import Rows
from distill_cli.store.writer import StoreWriter

CPU = torch.device("cpu")
MODEL = {"input_size": (3, 24, 24), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}
KINDS = {"mixup": {"mixup": 0.8}, "cutmix": {"cutmix": 1.0}, "both": {"mixup": 0.8, "cutmix": 1.0, "mixup_prob": 0.8}}
SEED, VIEW = 3, 2


def _view(**fields: object) -> View:
    return resolve_view(DataConfig(**{"augment": "rrc", "reprob": 0.5, **fields}), MODEL)  # type: ignore[arg-type]


# Who.


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 2**63 - 1))
def test_pairs_of_tars_are_within_a_tar(sizes: list[int], seed: int) -> None:
    ids = np.arange(sum(sizes))
    tar = np.repeat(np.arange(len(sizes)), sizes)
    found = partners(Following(tuple(sizes)), seed, 0, ids)
    paired = found >= 0
    assert np.array_equal(found[found[paired]], ids[paired])
    assert np.array_equal(tar[found[paired]], tar[paired])
    assert (found != ids).all()
    assert np.array_equal(np.bincount(tar[~paired], minlength=len(sizes)), np.array(sizes) % 2)
    some = np.random.default_rng(seed).permutation(ids)[: len(ids) // 2]
    assert np.array_equal(partners(Following(tuple(sizes)), seed, 0, some), found[some])


@given(st.integers(1, 300), st.integers(1, 100), st.integers(0, 2**63 - 1), st.integers(0, 10))
def test_pairs_are_a_perfect_matching_within_each_shard(samples: int, rows: int, seed: int, view: int) -> None:
    dealing = Dealing(samples, rows)
    ids = np.arange(samples)
    found = partners(dealing, seed, view, ids)
    paired = found >= 0
    assert np.array_equal(found[found[paired]], ids[paired])
    assert not (found == ids).any()
    shards = dealing.place(ids) // rows
    assert np.array_equal(shards[found[paired]], shards[paired])
    assert np.array_equal(np.bincount(shards[~paired], minlength=shards.max() + 1), np.bincount(shards) % 2)


@given(st.integers(2, 200), st.lists(st.integers(0, 10**6), min_size=1, max_size=20))
def test_a_partner_does_not_depend_on_who_is_asked_for(samples: int, asked: list[int]) -> None:
    dealing, ids = Dealing(samples, 16), np.array(asked) % samples
    assert np.array_equal(partners(dealing, 1, 2, ids), partners(dealing, 1, 2, np.arange(samples))[ids])


def test_each_view_and_each_seed_has_its_own_pairs() -> None:
    found = {tuple(partners(Dealing(1000, 400), seed, view, np.arange(1000))) for seed in (0, 1) for view in range(3)}
    assert len(found) == 6
    one, other = (partners(Dealing(1000, 400), 0, view, np.arange(1000)) for view in (0, 1))
    assert (one == other).mean() < 0.02


def test_a_sample_meets_all_of_its_shard() -> None:
    """Over views, partners are as evenly spread as draws: each of 31 comes 32 times in a thousand, give or take."""
    met = np.bincount([int(partners(Dealing(64, 32), 0, view, np.array([5]))[0]) for view in range(1000)], minlength=64)
    shard = Dealing(64, 32).sample_ids(int(Dealing(64, 32).place(np.array([5]))[0]) // 32)
    assert met[shard].sum() == 1000
    assert met[5] == 0
    assert met[shard[shard != 5]].min() > 10


def test_the_pairs_of_the_format_s_example() -> None:
    """docs/store-format.md, section 8."""
    assert partners(Dealing(10, 4), 0, 0, np.arange(10)).tolist() == [7, 8, 4, 5, 2, 3, 9, 0, 1, 6]
    odd = partners(Dealing(9, 4), 0, 0, np.arange(9))
    assert (odd < 0).sum() == 1


@given(st.integers(1, 100), st.integers(1, 30), st.integers(0, 5), st.data())
def test_pairs_are_brought_together_and_all_else_is_left(
    samples: int, rows: int, view: int, data: st.DataObject
) -> None:
    ids = np.array(data.draw(st.permutations(range(samples))))[: data.draw(st.integers(0, samples))]
    other = partners(Dealing(samples, rows), 0, view, ids)
    found = together(ids, other).tolist()
    assert sorted(found) == sorted(ids.tolist())
    for sample_id, partner in zip(ids.tolist(), other.tolist(), strict=True):
        if partner in found:
            assert abs(found.index(sample_id) - found.index(partner)) == 1
    first = [i for i, p in zip(ids.tolist(), other.tolist(), strict=True) if p not in ids[: ids.tolist().index(i)]]
    assert [i for i in found if i in first] == first


# What.


def test_timm_s_mixup_of_a_pair_has_the_same_bits() -> None:
    """… and so has its target; its generator is seeded as ours is."""
    pictures = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    kinds = set()
    for name, kind in KINDS.items():
        view = _view(**kind)
        mixing = Mixing(view, 24)
        theirs = Mixup(view.mixup, view.cutmix, prob=view.mixup_prob, switch_prob=0.5, mode="pair", num_classes=5)
        for sample_id, partner in ((2 * i, 2 * i + 1) for i in range(30)):
            with preserved():
                mixes = [mixing(SEED, VIEW, *ids) for ids in ((sample_id, partner), (partner, sample_id))]
                np.random.seed(derive("mix", SEED, VIEW, sample_id) & 0xFFFFFFFF)
                expected, target = theirs(pictures.clone(), torch.tensor([1, 4]))
            pair = [sample_id, partner]
            there = {i: mix for i, mix in zip(pair, mixes, strict=True) if mix}
            found = Mixture.of(pair, pair, [there]).mixed(pictures)
            assert torch.equal(found, expected)
            lam = torch.tensor([mix.lam if mix else 1.0 for mix in mixes])[:, None]
            assert torch.equal(mixup_target(torch.tensor([1, 4]), 5, lam, 0.1), target)
            kinds.add((name, None if mixes[0] is None else mixes[0].box is None))
    assert kinds == {
        ("mixup", True), ("cutmix", False), ("both", True), ("both", False), ("both", None),
    }  # fmt: skip


def test_the_equations_in_float64() -> None:
    pictures = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    mixes = {4: Mix(7, 0.25), 5: Mix(9, 0.5, (2, 6, 0, 8))}
    found = Mixture.of([4, 5, 6, 7, 9], [4, 5, 6], [mixes]).mixed(torch.cat([pictures, pictures[:2] + 1]).float())
    expected = pictures.clone()
    expected[0] = 0.25 * pictures[0] + 0.75 * (pictures[0] + 1)
    expected[1, :, 2:6, 0:8] = pictures[1, :, 2:6, 0:8] + 1
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found[2], pictures[2].float())


def test_lambda_is_the_area_that_is_left() -> None:
    mixing = Mixing(_view(cutmix=1.0), 24)
    with preserved():
        mixes = [mixing(0, 0, 2 * i, 2 * i + 1) for i in range(50)]
    for mix in mixes:
        if mix is not None:
            assert mix.box is not None
            top, bottom, left, right = mix.box
            assert mix.lam == np.float32(1 - (bottom - top) * (right - left) / 24**2) < 1


@pytest.mark.parametrize("size", [12, 36, 7])
def test_a_student_s_box_is_the_teacher_s_in_proportion_and_lambda_stays(size: int) -> None:
    view = _view(cutmix=1.0, mixup=0.2)
    with preserved():
        for sample_id in range(30):
            theirs, ours = (Mixing(view, px)(0, 0, sample_id, 99) for px in (24, size))
            assert (theirs is None) == (ours is None)
            if theirs is not None and ours is not None:
                assert ours.lam == theirs.lam
                expected = theirs.box and tuple(round(edge * size / 24) for edge in theirs.box)
                assert ours.box == expected


def test_a_probability_leaves_pairs_as_they_are() -> None:
    with preserved():
        mixes = [Mixing(_view(mixup=1.0, mixup_prob=0.25), 24)(0, 0, i, 1000 + i) for i in range(400)]
    assert 60 < sum(mix is not None for mix in mixes) < 140
    assert not _view(mixup=1.0, mixup_prob=0.0).mixes
    assert not _view().mixes
    assert train_transform(_view()).mixing is None


def test_the_draws_of_the_format_s_example() -> None:
    """docs/store-format.md, section 8."""
    view = resolve_view(DataConfig(mixup=0.8, cutmix=1.0), {**MODEL, "input_size": (3, 224, 224)})
    assert splitmix(derive("pair", 0, 0), 3).tolist() == [
        5285481807969065259, 15639313361330283914, 12456675417868466952,
    ]  # fmt: skip
    with preserved():
        for partner, (own, other, box) in {
            7: (0, 0.3971819281578064, (21, 224, 75, 224)),
            8: (1, 0.5703020691871643, None),
            6: (9, 0.2512562572956085, None),
        }.items():
            assert Mixing(view, 224)(0, 0, own, partner) == Mix(partner, other, box)


def _pairs_by_the_format(seed: int, view: int, length: int) -> set[frozenset[int]]:
    """Section 8 of docs/store-format.md in plain integers."""
    digest = hashlib.blake2b(struct.pack("<2Q", seed, view), digest_size=8, person=b"pair").digest()
    first = int.from_bytes(digest, "little") >> 1

    def scrambled(value: int) -> int:
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    places = sorted(range(length), key=lambda i: scrambled((first + (i + 1) * 0x9E3779B97F4A7C15) % 2**64))
    return {frozenset(places[i : i + 2]) for i in range(0, length - 1, 2)}


def _mix_by_the_format(seed: int, view: int, smaller: int, size: int, fields: View) -> tuple[float, object] | None:
    digest = hashlib.blake2b(struct.pack("<3Q", seed, view, smaller), digest_size=8, person=b"mix").digest()
    rng = np.random.RandomState((int.from_bytes(digest, "little") >> 1) % 2**32)
    u = rng.rand(1) if fields.mixup and fields.cutmix else None
    cutmix = rng.beta(fields.cutmix, fields.cutmix, 1) if fields.cutmix else None
    mixup = rng.beta(fields.mixup, fields.mixup, 1) if fields.mixup else None
    cut = u < fields.mixup_switch_prob if u is not None else fields.cutmix > 0
    chosen = cutmix if cut else mixup
    assert chosen is not None
    lam = np.float32(chosen[0])
    if not rng.rand(1) < fields.mixup_prob or lam == 1:
        return None
    if not cut:
        return float(lam), None
    side = int(np.float32(size) * np.sqrt(np.float32(1) - lam))
    y, x = rng.randint(0, size), rng.randint(0, size)
    box = tuple(edge for middle in (y, x) for edge in (max(0, middle - side // 2), min(size, middle + (side + 1) // 2)))
    left = np.float32(1 - (box[1] - box[0]) * (box[3] - box[2]) / size**2)
    return None if left == 1 else (float(left), box)


@pytest.mark.parametrize("kind", KINDS)
def test_another_program_can_replay_what_is_mixed(kind: str) -> None:
    view = _view(**KINDS[kind])
    with preserved():
        for sample_id in range(200):
            mix = Mixing(view, 24)(SEED, VIEW, sample_id, sample_id + 1)
            assert (mix and (mix.lam, mix.box)) == _mix_by_the_format(SEED, VIEW, sample_id, 24, view)


@given(st.integers(0, 2**63 - 1), st.integers(0, 1000), st.integers(1, 60))
def test_another_program_can_find_the_pairs(seed: int, view: int, length: int) -> None:
    dealing = Dealing(length, 60)
    found = partners(dealing, seed, view, dealing.at(np.arange(length)))
    places = enumerate(np.where(found < 0, -1, dealing.place(np.maximum(found, 0))).tolist())
    assert {frozenset(pair) for pair in places if pair[1] >= 0} == _pairs_by_the_format(seed, view, length)


def test_the_checksum_goes_on_over_partner_lambda_and_box() -> None:
    crc = zlib.crc32(b"pixels")
    assert Mix(5, 0.25).checksum(crc) == zlib.crc32(b"pixels" + struct.pack("<Qf4i", 5, 0.25, 0, 0, 0, 0))
    assert Mix(5, 0.25, (1, 2, 3, 4)).checksum(crc) == zlib.crc32(b"pixels" + struct.pack("<Qf4i", 5, 0.25, 1, 2, 3, 4))


def test_old_plans_keep_their_bytes() -> None:
    assert not {"mixup", "cutmix", "mixup_prob", "mixup_switch_prob"} & _view().table.keys()
    assert _view(mixup=0, cutmix=0, mixup_prob=1, mixup_switch_prob=0.5).table == _view().table
    assert _view(mixup=0.8, mixup_switch_prob=0.25).table.items() >= {"mixup": 0.8, "mixup_switch_prob": 0.25}.items()


@pytest.mark.parametrize("field", [{"mixup": -1}, {"mixup_prob": 1.5}, {"cutmix": float("inf")}])
def test_values_out_of_range_are_refused(field: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        DataConfig(**field)  # type: ignore[arg-type]


# In batches.


@pytest.fixture(scope="module")
def source(images: ArraySource) -> ArraySource:
    assert images.labels is not None
    return ArraySource(images.images[:18], images.labels[:18], images.classes)


class _Reading:
    """A source that remembers what was read, and of which some cannot be."""

    def __init__(self, source: ArraySource, *unreadable: int) -> None:
        self.source, self.unreadable, self.asked = source, unreadable, list[int]()
        self.labels, self.keys, self.classes = source.labels, source.keys, source.classes

    def read(self, sample_id: int) -> Image.Image:
        self.asked.append(sample_id)
        if sample_id in self.unreadable:
            raise UnreadableImage(f"{sample_id}: cannot be decoded")
        return self.source.read(sample_id)

    def __len__(self) -> int:
        return 18


class _Final(DrawnPartners):
    """As of a store whose capture could read all."""

    final = True


MIXED = _view(mixup=0.8, cutmix=1.0)
SUPERVISED = DrawnPartners(Dealing(18, 9), 3)


def _batches(source: object, order: Order, partners: DrawnPartners = SUPERVISED, **more: object) -> Batches:
    return Batches(source, train_transform(MIXED), order, seed=3, partners=partners, **more)  # type: ignore[arg-type]


def _mixed_with(view: int = 0) -> dict[int, int]:
    """Of the samples that are mixed their partners."""
    with preserved():
        found = Batches._mixes(_batches(None, ListingOrder(np.arange(18), 6)), view, np.arange(18))
    return {sample_id: mix.partner for sample_id, mix in found.items()}


def test_an_epoch_of_even_batches_decodes_each_image_once_but_for_those_that_are_left_over(
    source: ArraySource,
) -> None:
    partners = DrawnPartners(Dealing(18, 18), 3)
    order = TrainingOrder(np.arange(18), 6, seed=0, views=5, partners=partners)
    for epoch in range(4):
        reading = _Reading(source)
        batches = _batches(reading, order, partners)
        for step in range(3):
            batch = batches.load(3 * epoch + step)
            assert batch.mixed is not None
            assert len(batch) == len(batch.images) == 6
        assert sorted(reading.asked) == list(range(18))


def test_a_partner_that_a_batch_lacks_is_read_too_and_not_given(source: ArraySource) -> None:
    sample_id, partner = next(iter(_mixed_with().items()))
    reading = _Reading(source)
    alone = _batches(reading, lambda _: (0, np.array([sample_id]))).load(0)
    both = _batches(source, lambda _: (0, np.array([partner, sample_id]))).load(0)
    assert reading.asked == [sample_id, partner]
    assert (alone.sample_ids.tolist(), len(alone.images)) == ([sample_id], 1)
    assert torch.equal(alone.images[0], both.images[1])
    assert alone.mixed is not None
    assert both.mixed is not None
    assert source.labels is not None
    assert alone.mixed.partner.tolist() == [source.labels[partner]] == both.labels[:1].tolist()
    assert alone.mixed.lam[0] == both.mixed.lam[1] == both.mixed.lam[0] < 1


def test_the_label_of_the_larger_share(source: ArraySource) -> None:
    batch = _batches(source, ListingOrder(np.arange(18), 18)).load(0)
    assert batch.mixed is not None
    for larger, label, other, lam in zip(
        batch.larger_labels, batch.labels, batch.mixed.partner, batch.mixed.lam, strict=True
    ):
        assert larger == (label if lam >= 0.5 else other)
    assert set((batch.mixed.lam >= 0.5).tolist()) == {True, False}


@pytest.mark.parametrize("final", [True, False])
def test_a_sample_whose_partner_cannot_be_read(source: ArraySource, final: bool) -> None:
    """In a capture, and where there is no store, it stays as it is; where a store has it mixed it is unreadable too."""
    sample_id, partner = next(iter(_mixed_with().items()))
    partners = (_Final if final else DrawnPartners)(Dealing(18, 9), 3)
    only: Order = lambda _: (0, np.array([sample_id]))  # noqa: E731
    with pytest.raises(UnreadableImage, match=f"{partner}: cannot be decoded"):
        _batches(_Reading(source, partner), only, partners).load(0)
    batch = _batches(_Reading(source, partner), only, partners, skip_unreadable=True).load(0)
    if final:
        assert (len(batch), batch.skipped) == (0, (f"{partner}: cannot be decoded",))
        return
    plain = Batches(source, train_transform(_view()), only, seed=3).load(0)
    assert batch.skipped == ()
    assert torch.equal(batch.images, plain.images)
    assert batch.mixed is not None
    assert (batch.mixed.lam.tolist(), batch.mixed.partner.tolist()) == ([1], batch.labels.tolist())


def test_both_of_a_pair_that_cannot_be_read_are_counted_once_each(source: ArraySource) -> None:
    sample_id, partner = next(iter(_mixed_with().items()))
    both: Order = lambda _: (0, np.array([sample_id, partner]))  # noqa: E731
    batch = _batches(_Reading(source, partner), both, _Final(Dealing(18, 9), 3), skip_unreadable=True).load(0)
    assert (len(batch), batch.skipped) == (0, 2 * (f"{partner}: cannot be decoded",))


def test_a_transform_that_mixes_does_not_go_without_partners(source: ArraySource) -> None:
    with pytest.raises(AssertionError, match="only what mixes needs partners"):
        Batches(source, train_transform(MIXED), ListingOrder(np.arange(18), 6)).load(0)


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 3), st.integers(0, 20), st.booleans())
def test_orders_of_pairs_have_what_the_orders_of_samples_have(
    count: int, batch_size: int, ranks: int, step: int, gaps: bool
) -> None:
    partners = DrawnPartners(Dealing(2 * count, 7), 3)
    ids = np.arange(count) * (1 + gaps)
    plain, paired = (TrainingOrder(ids, batch_size, 0, 4, partners=some) for some in (None, partners))
    steps = plain._steps_per_pass
    for order in (plain, paired):
        seen = np.concatenate([order(step // steps * steps + number)[1] for number in range(steps)])
        assert len(np.unique(seen)) == len(seen) == steps * plain.images_per_step
        assert set(seen) <= set(ids)
    assert plain(step)[0] == paired(step)[0]
    whole = [TrainingOrder(ids, batch_size, 0, 4, rank, ranks, partners=partners)(step)[1] for rank in range(ranks)]
    assert np.array_equal(np.concatenate(whole), paired(step)[1])
    listed = [ListingOrder(ids, batch_size, rank, ranks, partners) for rank in range(ranks)]
    seen = np.concatenate([order(number)[1] for order in listed for number in range(order.batches)] or [ids])
    assert np.array_equal(np.sort(seen), ids)


def test_pairs_are_in_one_batch_whatever_the_ranks_where_sizes_are_even() -> None:
    partners = DrawnPartners(Dealing(64, 16), 3)
    for ranks in (1, 2, 4):
        for rank in range(ranks):
            training = TrainingOrder(np.arange(64), 16, 0, 4, rank, ranks, partners=partners)
            listing = ListingOrder(np.arange(64), 8, rank, ranks, partners)
            for order, numbers in ((training, range(8)), (listing, range(listing.batches))):
                for view, ids in map(order, numbers):  # type: ignore[arg-type]
                    assert set(partners(view, ids)) == set(ids)


# Of a store.


@pytest.fixture(scope="module")
def store(
    make_plan: Callable[..., Plan], make_rows: Callable[..., Rows], tmp_path_factory: pytest.TempPathFactory
) -> Store:
    """18 samples in two generations of two views, in shards of 7 and of 5; sample 4 lacks views 1 and 2."""
    path, offset = tmp_path_factory.mktemp("store"), 0
    for number, rows in enumerate((7, 5)):
        plan = make_plan(samples=18, views=2, shard_rows=rows, seed=11, first_view=5 * number)
        writer = StoreWriter(path, Generation(number, plan, offset))
        for view, shard in plan.every_shard():
            skip = (4,) if offset + view in (1, 2) else ()
            found = make_rows(plan, view, shard, skip)
            writer.write(view, shard, found, np.zeros(min(4, len(found)), np.uint32))
        writer.finish()
        offset += 2
    return Store(path)


def test_each_generation_has_its_own_pairs_and_nobody_is_mixed_with_what_was_skipped(store: Store) -> None:
    ids = np.arange(18)
    for view, (rows, drawn) in enumerate([(7, 0), (7, 1), (5, 5), (5, 6)]):
        plain = partners(Dealing(18, rows), 11, drawn, ids)
        found = StoredPartners(store)(view, ids)
        alone = (plain == 4) & (view in (1, 2))
        assert np.array_equal(found, np.where(alone, -1, plain))
        assert store.lacks(view, ids).tolist() == [i == 4 and view in (1, 2) for i in range(18)]
        assert np.array_equal(StoredPartners(store, offset=1)(view - 1, ids), found)


@pytest.mark.parametrize("workers", [0, 2])
def test_several_views_a_read_are_each_as_alone(source: ArraySource, store: Store, workers: int) -> None:
    partners = StoredPartners(store)
    order = TrainingOrder(store.sample_ids, 6, 0, 4, views_per_read=2, partners=partners)
    batches = Batches(source, train_transform(MIXED), order, drawn=store.drawn, views_per_read=2, partners=partners)
    for number, batch in enumerate(load(batches, range(10), workers, CPU)):
        first, ids = order(number)
        alone = [
            replace(batches, order=lambda _, v=view, i=ids: (v % 4, i), views_per_read=1).load(0)  # type: ignore[misc]
            for view in (first, first + 1)
        ]
        assert torch.equal(batch.images, torch.cat([one.images for one in alone]))
        for part in ("partner", "lam"):
            assert torch.equal(getattr(batch.mixed, part), torch.cat([getattr(one.mixed, part) for one in alone]))
