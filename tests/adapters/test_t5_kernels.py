"""A T5's layers as compiled loops against the same layers as torch's operations."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

from riskcal_adapters.torch import EarlyExitT5, blas, kernels, measures, t5_kernels
from riskcal_adapters.torch.t5_backbone import T5Backbone

LENGTH, SLOTS = 6, 5


@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(1, 7, 5), (3, 16, 40), (70, 33, 9), (0, 4, 4)]
)
@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_products_are_those_of_float64_and_write_nothing_else(rows, inner, columns, kept):
    rng = np.random.default_rng(rows + columns)
    a, c = (rng.normal(size=(rows, n)).astype(np.float32) for n in (inner, columns))
    wide = rng.normal(size=(inner, columns + 6)).astype(np.float32)
    room = rng.normal(size=(rows + 2, columns)).astype(np.float32)
    before = room.copy()
    room[1:-1] = c
    part = wide[:, 4 : columns + 4]
    blas.product(a, part, room[1:-1], np.float32(kept))
    expected = kept * c.astype(np.float64) + a.astype(np.float64) @ part.astype(np.float64)
    np.testing.assert_allclose(room[1:-1], expected, rtol=1e-4, atol=1e-4)
    assert (room[[0, -1]] == before[[0, -1]]).all()


def test_without_torchs_library_scipys_is_called(monkeypatch):
    monkeypatch.setattr(Path, "glob", lambda *_: [])
    reals, whole = ctypes.POINTER(ctypes.c_float), ctypes.POINTER(ctypes.c_int64)
    sgemm = ctypes.CFUNCTYPE(
        *(None, ctypes.c_char_p, ctypes.c_char_p, whole, whole, whole, reals, reals, whole),
        *(reals, whole, reals, reals, whole),
    )(blas._address())
    a, b = np.random.default_rng(0).normal(size=(2, 3, 3)).astype(np.float32)
    c, three, one, nought = (
        np.empty_like(a),
        ctypes.c_int64(3),
        ctypes.c_float(1),
        ctypes.c_float(0),
    )
    sizes, (at_a, at_b, at_c) = ctypes.byref(three), (m.ctypes.data_as(reals) for m in (a, b, c))
    size = ctypes.cast(sizes, whole)
    sgemm(b"N", b"N", size, size, size, ctypes.pointer(one), at_b, size, at_a, size,
          ctypes.pointer(nought), at_c, size)  # fmt: skip
    np.testing.assert_allclose(c, a @ b, rtol=1e-5)


def filled(backbone, prompts):
    cache = backbone.pool(SLOTS, 8, LENGTH)
    backbone.admit(cache, np.arange(len(prompts)), prompts)
    return cache


def test_a_layer_is_that_of_torch_with_the_gaps_of_rows_that_skipped_it(gated_t5, monkeypatch):
    backbone = EarlyExitT5(gated_t5)._backbone
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, backbone.vocabulary, n) for n in (3, 8, 1, 5, 8)]
    ours, plain = filled(backbone, prompts), filled(backbone, prompts)
    assert backbone.compiled
    gaps = 0
    with torch.inference_mode():
        for cache in (ours, plain):
            states = np.random.default_rng(1).normal(size=(LENGTH, SLOTS, backbone.width))
            cache.states.copy_(torch.from_numpy(states))
        position = np.zeros(SLOTS, dtype=np.int64)
        for turn in range(LENGTH):
            rows = (
                np.flatnonzero(rng.random(SLOTS) < 0.6) if turn < LENGTH - 1 else np.arange(SLOTS)
            )
            for index in range(backbone.n_layers):
                if rng.random() < 0.5 and turn < LENGTH - 1:
                    continue  # a layer that all skip
                state = torch.from_numpy(
                    rng.normal(size=(len(rows), backbone.width)).astype(np.float32)
                )
                gaps += int((position[rows] - ours.layers[index].filled_rows[rows]).sum())
                found = backbone.layer_of_rows(index, state, rows, position[rows], ours)
                with monkeypatch.context() as patched:
                    patched.setattr(T5Backbone, "compiled", False)
                    expected = backbone.layer_of_rows(index, state, rows, position[rows], plain)
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
            position[rows] += 1
        assert gaps > 5
        for index, own in ours.layers.items():
            other = plain.layers[index]
            assert own.filled_rows.tolist() == other.filled_rows.tolist()
            np.testing.assert_allclose(own.rows, other.rows, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(own.memory.rows, other.memory.rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("measure", kernels.OF_LOGITS)
def test_a_turn_looks_at_the_rows_that_are_asked_and_at_no_other(gated_t5, measure):
    backbone = EarlyExitT5(gated_t5)._backbone
    rng = np.random.default_rng(1)
    prompts = [rng.integers(2, backbone.vocabulary, n) for n in (4, 2, 7)]
    first, second = filled(backbone, prompts), filled(backbone, prompts)
    rows, positions, places = np.array([0, 2]), np.zeros(2, dtype=np.int64), np.array([1])
    number = kernels.OF_LOGITS.index(measure)
    with torch.inference_mode():
        entering = torch.from_numpy(rng.normal(size=(SLOTS, backbone.width)).astype(np.float32))
        state, sure, best = backbone.layer_and_surest(
            number, 0, entering, (rows, positions, places), first
        )
        expected = backbone.layer_of_rows(0, entering[rows], rows, positions, second)
        logits = backbone.logits(expected[1:])
        nobody = backbone.layer_and_surest(
            number, 0, entering, (rows, positions, places[:0]), filled(backbone, prompts)
        )
    np.testing.assert_allclose(state, expected, rtol=1e-5, atol=1e-5)
    assert sure == pytest.approx(measures.OF_LOGITS[measure](logits).tolist(), abs=1e-5)
    assert best.tolist() == logits.argmax(-1).tolist()
    assert [len(part) for part in nobody] == [2, 0, 0]


def test_the_encoder_is_that_of_torch(gated_t5, monkeypatch):
    backbone = EarlyExitT5(gated_t5)._backbone
    rng = np.random.default_rng(2)
    ids = torch.from_numpy(rng.integers(2, backbone.vocabulary, (3, 6)))
    mask = np.ones((3, 6), dtype=bool)
    mask[1, :2] = mask[2, 3:] = False
    calls = []
    compiled = t5_kernels.encode

    def encode(*given):
        calls.append(compiled(*given))
        return calls[-1]

    with monkeypatch.context() as patched:
        patched.setattr(t5_kernels, "encode", encode)
        found, _ = backbone._encode(ids, mask)
    monkeypatch.setattr(T5Backbone, "compiled", False)
    expected, _ = backbone._encode(ids, mask)
    assert calls
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
