from __future__ import annotations

import numpy as np

from pipeline.rollout.noise import GAMMA, NoiseKey, content_names, fold, mix, streams, uniforms

KEY = NoiseKey(seed=0, row="ppo", iteration=3)


def test_the_published_sequence_of_splitmix64():
    states = np.uint64(1234567) + np.arange(1, 6, dtype=np.uint64) * np.uint64(GAMMA)
    assert mix(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_uniforms_are_the_top_24_bits_of_that_sequence():
    got = uniforms(np.array([1234567], np.uint64), 1, 2)[0]
    assert got.tolist() == [(3203168211198807973 >> 40) / 2**24, (9817491932198370423 >> 40) / 2**24]


def test_positions_can_be_asked_for_piecewise():
    s = streams(KEY, ["a", "b"], 3)
    whole = uniforms(s, 0, 10)
    assert whole.shape == (2, 3, 10)
    assert (np.concatenate([uniforms(s, 0, 4), uniforms(s, 4, 6)], -1) == whole).all()


def test_every_part_of_the_key_matters_and_nothing_else_does():
    base = streams(KEY, ["a", "b", 7], 2)
    assert (streams(KEY, ["b"], 5)[0, :2] == base[1]).all()  # neither its neighbours nor K
    others = [
        streams(NoiseKey(1, "ppo", 3), ["a"], 1),
        streams(NoiseKey(0, "sft", 3), ["a"], 1),
        streams(NoiseKey(0, "ppo", 4), ["a"], 1),
        streams(KEY, ["7"], 1),
        base,
    ]
    flat = [int(x) for s in others for x in s.ravel()]
    assert len(set(flat)) == len(flat)


def test_fold_is_ordered_and_tells_numbers_from_text():
    assert len({fold(1, 2), fold(2, 1), fold("1", 2), fold(1), fold(1, 0), fold()}) == 6
    assert fold(-1) == fold(2**64 - 1)


def test_equal_prompts_get_different_names_and_keep_them():
    one, two = [5, 6], [7]
    names = content_names([one, two, one])
    assert len(set(names)) == 3
    assert content_names([two, one])[1] == names[0]


def test_uniform_and_uncorrelated():
    u = uniforms(streams(KEY, [f"p{i}" for i in range(200)], 10), 0, 50)
    assert u.min() >= 0.0 and u.max() < 1.0
    counts = np.histogram(u, bins=64, range=(0, 1))[0]
    expected = u.size / 64
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 63 + 5 * np.sqrt(2 * 63)
    for a, b in ((u[:, :, :-1], u[:, :, 1:]), (u[:, :-1], u[:, 1:]), (u[:-1], u[1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)
