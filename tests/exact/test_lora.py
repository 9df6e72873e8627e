"""Combining LoRA updates: exact where it can be, optimal where it cannot, and not what combining factors gives."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lcsc.bank import CheckpointBank
from lcsc.bank.lora import (
    LoraPair,
    adapter_settings,
    combine_products,
    is_lora,
    lora_pairs,
    lora_scale,
    product_gram,
    refuse_lora,
)
from lcsc.core.errors import BankError, ConfigError
from lcsc.core.registry import build
from lcsc.export.lora import combine_adapter
from lcsc.operators.lora import FACTOR_SPACE, Lora, update_view


def factors(seed, K, r, out, inner, conv=()):
    rng = np.random.default_rng(seed)
    A_K = [rng.standard_normal((r, inner, *conv)) for _ in range(K)]
    B_K = [rng.standard_normal((out, r, *(1 for _ in conv))) for _ in range(K)]
    return A_K, B_K, rng.uniform(-3, 3, K), rng.uniform(0.1, 4, K)


def product(A, B):
    return B.reshape(len(B), -1) @ A.reshape(len(A), -1)


def update(A_K, B_K, coef_K, scale_K):
    """The combined update, formed in full."""
    return sum(c * s * product(A, B) for A, B, c, s in zip(A_K, B_K, coef_K, scale_K, strict=True))


# ------------------------------------------------------------------------------------------------ the factors


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), *(st.integers(1, n) for n in (5, 4, 12, 12)), st.floats(0.1, 5))
def test_exact_when_the_rank_suffices(seed, K, r, out, inner, scale):
    A_K, B_K, coef_K, scale_K = factors(seed, K, r, out, inner)
    wanted = update(A_K, B_K, coef_K, scale_K)
    A, B, error = combine_products(A_K, B_K, coef_K, scale_K, K * r, scale=scale)
    assert A.shape == (K * r, inner)
    assert B.shape == (out, K * r)
    np.testing.assert_allclose(scale * B @ A, wanted, atol=1e-11 * np.abs(wanted).max())
    assert error < 1e-12
    np.testing.assert_allclose(B.T @ B, A @ A.T, atol=1e-9 * np.abs(wanted).max())  # balanced


def test_a_truncation_is_the_best_one_and_its_error_is_true():
    A_K, B_K, coef_K, scale_K = factors(0, 6, 4, 30, 20)
    wanted = update(A_K, B_K, coef_K, scale_K)
    S = np.linalg.svd(wanted)[1]
    errors = []
    for rank in (1, 4, 10, 19, 20, 24):
        A, B, error = combine_products(A_K, B_K, coef_K, scale_K, rank)
        assert error == pytest.approx(np.linalg.norm(B @ A - wanted) / np.linalg.norm(wanted), abs=1e-13)
        assert error == pytest.approx(np.linalg.norm(S[rank:]) / np.linalg.norm(S), abs=1e-13)  # Eckart-Young
        errors.append(error)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.5
    assert errors[-2] < 1e-13


def test_convolutions_and_mixed_ranks():
    A_K, B_K, coef_K, scale_K = factors(1, 3, 2, 5, 4, (3, 3))
    more_A, more_B, *_ = factors(2, 1, 7, 5, 4, (3, 3))
    A_K, B_K = [*A_K, *more_A], [*B_K, *more_B]
    coef_K, scale_K = [*coef_K, -2.0], [*scale_K, 0.5]
    A, B, error = combine_products(A_K, B_K, coef_K, scale_K, 13)
    assert A.shape == (13, 4, 3, 3)
    assert B.shape == (5, 13, 1, 1)
    layer = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    wanted = sum(
        c * s * torch.conv2d(torch.conv2d(layer, torch.from_numpy(a)), torch.from_numpy(b))
        for a, b, c, s in zip(A_K, B_K, coef_K, scale_K, strict=True)
    )  # what the adapter does to an image
    found = torch.conv2d(torch.conv2d(layer, torch.from_numpy(A)), torch.from_numpy(B))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert error < 1e-12


def test_zero_coefficients_and_updates_that_cancel():
    A_K, B_K, _, scale_K = factors(3, 3, 2, 6, 5)
    A, B, error = combine_products(A_K, B_K, [0, 1, 0], scale_K, 2)
    np.testing.assert_allclose(B @ A, scale_K[1] * product(A_K[1], B_K[1]), atol=1e-12)
    assert error < 1e-14
    A, B, error = combine_products(A_K, B_K, [0, 0, 0], scale_K, 2)
    assert not A.any()
    assert not B.any()
    assert error == 0
    with pytest.raises(ConfigError, match="the rank of a combined adapter is 0; it must be at least 1"):
        combine_products(A_K, B_K, [1, 0, 0], scale_K, 0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))
def test_inner_products_of_updates(seed, K, r, out, inner):
    A_K, B_K, _, scale_K = factors(seed, K, r, out, inner)
    flat = np.stack([s * product(A, B).ravel() for A, B, s in zip(A_K, B_K, scale_K, strict=True)])
    np.testing.assert_allclose(product_gram(A_K, B_K, scale_K), flat @ flat.T, atol=1e-9 * np.square(flat).sum())


def test_how_far_factor_space_is_from_the_updates():
    """The numbers that the docstring of lcsc/bank/lora.py states."""
    rng, (K, r, out, inner) = np.random.default_rng(0), (16, 16, 64, 48)

    def walk(*shape):
        start, steps = rng.standard_normal(shape), rng.standard_normal((K - 1, *shape))
        return np.concatenate([start[None], start + np.cumsum(steps, 0) * 0.5 / np.sqrt(K - 1)])

    A_K, B_K = walk(r, inner), walk(out, r)

    def difference(coef_K):
        wanted = update(A_K, B_K, coef_K, np.ones(K))
        apart = np.tensordot(coef_K, B_K, 1) @ np.tensordot(coef_K, A_K, 1)
        return np.linalg.norm(apart - wanted) / np.linalg.norm(wanted)

    alternating = np.resize([3.3, -3.3], K)
    alternating[-1] += 1
    draws = []
    for seed in range(4):
        coef_K = np.random.default_rng(seed).uniform(-3.3, 3.3, K)
        draws.append(difference(coef_K + (1 - coef_K.sum()) / K))
    assert difference(np.full(K, 1 / K)) == pytest.approx(0.026, abs=5e-4)
    assert difference(alternating) == pytest.approx(0.70, abs=5e-3)
    assert (min(draws), max(draws)) == (pytest.approx(0.44, abs=5e-3), pytest.approx(1.13, abs=5e-3))


# ----------------------------------------------------------------------------------------------------- the names


NAMES = {
    "base_model.model.a.q.lora_A.weight": "base_model.model.a.q.lora_B.weight",
    "base_model.model.a.q.lora_A.default.weight": "base_model.model.a.q.lora_B.default.weight",
    "base_model.model.emb.lora_embedding_A": "base_model.model.emb.lora_embedding_B",
    "base_model.model.emb.lora_embedding_A.default": "base_model.model.emb.lora_embedding_B.default",
    "unet.a.to_q.lora.down.weight": "unet.a.to_q.lora.up.weight",
    "unet.a.processor.to_q_lora.down.weight": "unet.a.processor.to_q_lora.up.weight",
    "text_encoder.a.lora_linear_layer.down.weight": "text_encoder.a.lora_linear_layer.up.weight",
    "lora_unet_a_to_q.lora_down.weight": "lora_unet_a_to_q.lora_up.weight",
}


def test_names_of_all_writers():
    for a, b in NAMES.items():
        (pair,) = lora_pairs({a: (2, 3), b: (4, 2), "other.weight": (3, 3)})
        assert (pair.A, pair.B, pair.alpha) == (a, b, None)
        assert is_lora([b, a])
        assert not is_lora([b, "other.weight"])
    shapes = {"m.lora_down.weight": (2, 3, 3, 3), "m.lora_up.weight": (4, 2, 1, 1), "m.alpha": ()}
    assert lora_pairs(shapes) == (LoraPair("m", "m.lora_down.weight", "m.lora_up.weight", "m.alpha"),)
    assert lora_pairs({"a.weight": (3, 3), "lora.weight": (2, 2)}) == ()


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        ({"m.lora_A.weight": (2, 3)}, r"`m.lora_A.weight` has no partner `m.lora_B.weight`"),
        ({"m.lora_up.weight": (3, 2)}, r"`m.lora_up.weight` has no partner A"),
        ({"m.lora_A.weight": (2, 3), "m.lora_B.weight": (4, 3)}, r"\(2, 3\) and `m.lora_B.weight` \(4, 3\) do not fit"),
        ({"m.lora_A.weight": (2, 3, 3, 3), "m.lora_B.weight": (4, 2, 3, 3)}, "do not fit"),
        ({"m.lora_A.weight": (2,), "m.lora_B.weight": (4, 2)}, "do not fit"),
        ({"m.lora_magnitude_vector.weight": (3,)}, "belongs to DoRA magnitudes, and such an adapter is more than"),
        ({"m.dora_scale": (3,)}, "`m.dora_scale` belongs to DoRA magnitudes"),
        ({"m.lora_mid.weight": (2, 2, 3, 3)}, "a LoCon middle factor"),
        ({"m.hada_w1_a": (2, 2)}, "LoHa factors"),
        ({"m.lokr_w1": (2, 2)}, "LoKr factors"),
        ({"m.lora_B.bias": (2,)}, "LoRA biases"),
    ],
)
def test_what_is_no_plain_lora_is_refused(shapes, text):
    with pytest.raises(BankError, match=text):
        lora_pairs(shapes)


def test_direct_combination_of_factors_is_refused(tmp_path):
    refuse_lora(["a.weight"], tmp_path)
    with pytest.raises(BankError, match=r"holds LoRA factors.*Use operator=lora, which combines the updates"):
        refuse_lora(["a.weight", "m.lora_A.weight"], tmp_path)


def test_scales():
    peft, kohya = (
        LoraPair("base_model.model.a.q", "A", "B", None),
        LoraPair("lora_unet_a", "A", "B", "lora_unet_a.alpha"),
    )
    assert lora_scale(kohya, 8, 4.0, None) == 0.5
    assert lora_scale(kohya, 8, 4.0, {"lora_alpha": 100, "use_rslora": True}) == 0.5  # the file's own number counts
    assert lora_scale(peft, 8, None, {"lora_alpha": 16}) == 2
    assert lora_scale(peft, 4, None, {"lora_alpha": 16, "use_rslora": True}) == 8
    assert lora_scale(peft, 4, None, {"lora_alpha": 16, "alpha_pattern": {"q": 2}}) == 0.5
    assert lora_scale(peft, 4, None, {"lora_alpha": 16, "alpha_pattern": {"b.q": 2, ".*a.*": 8}}) == 2
    assert lora_scale(LoraPair("unet.a.q", "A", "B", None), 4, None, {"unet.lora_alpha": 2, "vae.lora_alpha": 9}) == 0.5
    assert lora_scale(LoraPair("unet.a.q", "A", "B", None), 4, None, None) == 1
    with pytest.raises(BankError, match=r"no `adapter_config.json` with `lora_alpha` lies beside the weights"):
        lora_scale(peft, 4, None, None)
    for alpha in (0.0, float("nan"), float("inf")):
        with pytest.raises(BankError, match="must be a finite number other than 0"):
            lora_scale(kohya, 4, alpha, None)
    for bad in ({"lora_alpha": "many"}, {"lora_alpha": 1, "alpha_pattern": {"(": 2}}, {"alpha_pattern": [1]}):
        with pytest.raises(BankError, match="settings for `base_model.model.a.q` cannot be used"):
            lora_scale(peft, 4, None, bad)


def test_settings_from_files(tmp_path):
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(1)}, file)
    assert adapter_settings([file]) is None
    save_file({"a": torch.ones(1)}, file, metadata={"lora_adapter_metadata": json.dumps({"unet.r": 4})})
    assert adapter_settings([file]) == {"unet.r": 4}
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    assert adapter_settings([file]) == {"r": 8}
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(BankError, match="are no JSON object"):
        adapter_settings([file])


# -------------------------------------------------------------------------------------------------- the operator


def kohya(folder, K=4, seed=0, alpha=4.0, dtype=torch.float32):
    """A run of kohya files: two linear layers and a convolution of rank 3, each with its alpha."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": ((3, 10), (8, 3)), "b": ((3, 6), (7, 3)), "c": ((3, 4, 3, 3), (5, 3, 1, 1))}
    start = {f"lora_unet_{m}.lora_{s}.weight": torch.randn(shape, generator=generator)
             for m, pair in shapes.items() for s, shape in zip(("down", "up"), pair, strict=True)}  # fmt: skip
    for k in range(K):
        for tensor in start.values():
            tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
        alphas = {f"lora_unet_{m}.alpha": torch.tensor(alpha, dtype=dtype) for m in shapes}
        state = {name: tensor.to(dtype if dtype.is_floating_point else torch.float32) for name, tensor in start.items()}
        save_file({**state, **alphas}, folder / f"style-step{1000 * (k + 1):08d}.safetensors")
    return CheckpointBank.open(folder)


def updates_of(bank, weights=None, rank=3):
    """Every module's update, per checkpoint or of a candidate's weights, straight from the files' definition."""
    rows = [bank.layout.views(row.double()) for row in bank.matrix()] if weights is None else [weights]
    return [
        {
            m: (float(row[f"lora_unet_{m}.alpha"]) / rank)
            * product(row[f"lora_unet_{m}.lora_down.weight"].double(), row[f"lora_unet_{m}.lora_up.weight"].double())
            for m in "abc"
        }
        for row in rows
    ]


SIGNED = np.array([2.5, -1.75, -1.0, 1.25])


def test_the_candidate_is_the_combination_of_the_updates(tmp_path):
    bank = kohya(tmp_path / "bank")
    lora = Lora(rank=12)
    candidate = lora.apply(bank, lora.point(bank, SIGNED))
    weights = candidate.weights()
    parts = updates_of(bank)
    for m, found in updates_of(bank, weights, rank=12)[0].items():
        wanted = sum(c * part[m] for c, part in zip(SIGNED, parts, strict=True))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert weights["lora_unet_c.lora_down.weight"].shape == (12, 4, 3, 3)
    assert weights["lora_unet_c.alpha"] == 12  # so that the scale is 1
    recipe = candidate.recipe
    assert (recipe["operator"], recipe["space"], recipe["rank"]) == ("lora", "product", 12)
    np.testing.assert_allclose(recipe["coef"], SIGNED, atol=1e-9)
    assert recipe["error"]["max"] < 1e-12
    assert json.loads(json.dumps(recipe)) == recipe
    assert build("operator", "lora", rank=12) == lora


def test_the_banks_own_rank_is_kept_with_its_scale_and_the_loss_is_told(tmp_path):
    bank = kohya(tmp_path / "bank")
    lora = Lora()
    candidate = lora.apply(bank, lora.point(bank, SIGNED))
    assert candidate.layout == bank.layout
    weights = candidate.weights()
    parts, errors = updates_of(bank), {}
    for m, found in updates_of(bank, weights)[0].items():
        wanted = sum(c * part[m] for c, part in zip(SIGNED, parts, strict=True))
        U, S, Vh = torch.linalg.svd(wanted)
        torch.testing.assert_close(found, (U[:, :3] * S[:3]) @ Vh[:3], rtol=1e-5, atol=1e-5)
        errors[f"lora_unet_{m}"] = float(S[3:].norm() / S.norm())
    assert weights["lora_unet_a.alpha"] == 4
    worst = max(errors, key=errors.get)
    told = candidate.recipe["error"]
    assert told["max_module"] == worst
    assert told["max"] == pytest.approx(errors[worst], rel=1e-6)
    assert told["mean"] == pytest.approx(np.mean(list(errors.values())), rel=1e-6)


def test_one_checkpoint_alone_comes_back_bit_for_bit_and_every_time(tmp_path):
    bank = kohya(tmp_path / "bank")
    lora = Lora()
    last = next(row for row in lora.baselines(bank) if row.family == "last")
    theta_P = torch.empty(bank.layout.num_parameters)
    lora.apply(bank, last.point).write(theta_P)
    assert theta_P.numpy().tobytes() == bank.matrix()[-1].numpy().tobytes()
    candidate = lora.apply(bank, lora.point(bank, SIGNED))
    before = bank.matrix().clone()
    first, again = torch.empty_like(theta_P), torch.empty_like(theta_P)
    candidate.write(first)
    lora.apply(bank, lora.point(bank, SIGNED)).write(again)
    assert first.numpy().tobytes() == again.numpy().tobytes()
    assert torch.equal(bank.matrix(), before)


def test_integer_alphas_and_half_precision(tmp_path):
    bank = kohya(tmp_path / "bank", alpha=6, dtype=torch.int64)
    assert bank.constants["lora_unet_a.alpha"] == 6
    for lora, alpha in ((Lora(), 6), (Lora(rank=12), 12)):
        weights = lora.apply(bank, lora.point(bank, SIGNED)).weights()
        assert weights["lora_unet_a.alpha"] == alpha
        assert weights["lora_unet_a.alpha"].dtype == torch.int64
    parts = [bank.layout.views(row.double()) for row in bank.matrix()]
    for m in "abc":
        names = [f"lora_unet_{m}.lora_{s}.weight" for s in ("down", "up")]
        wanted = sum(2 * c * product(*(row[n] for n in names)) for c, row in zip(SIGNED, parts, strict=True))
        found = product(*(weights[n].double() for n in names))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    half = kohya(tmp_path / "half", dtype=torch.bfloat16)
    lora = Lora(rank=12)
    weights = lora.apply(half, lora.point(half, SIGNED)).weights()
    found, parts = updates_of(half, weights, rank=12)[0], updates_of(half)
    torch.testing.assert_close(
        found["b"], sum(c * p["b"] for c, p in zip(SIGNED, parts, strict=True)), rtol=1e-5, atol=1e-5
    )


def calls_to_combine(folder, modules: int) -> int:
    """Python functions that are called to combine a bank of torch files whose alphas are integers."""
    folder.mkdir()
    for step in (1, 2):
        state = {f"lora_unet_{m}.lora_{s}.weight": torch.ones(2, 2) for m in range(modules) for s in ("down", "up")}
        state |= {f"lora_unet_{m}.alpha": torch.tensor(2) for m in range(modules)}
        torch.save(state, folder / f"style-step{step:08d}.pt")
    bank, count = CheckpointBank.open(folder, storage="streamed"), 0

    def watch(frame, event, arg):
        nonlocal count
        count += event == "call"

    sys.setprofile(watch)
    try:
        combine_adapter(bank, np.array([0.5, 0.5]), None, "float32")
    finally:
        sys.setprofile(None)
    return count


def test_combining_takes_work_in_proportion_to_the_modules(tmp_path):
    calls = [calls_to_combine(tmp_path / str(modules), modules) for modules in (8, 16, 24)]
    assert calls[2] - calls[1] < 1.1 * (calls[1] - calls[0])


def test_the_search_space_measures_updates(tmp_path):
    bank = kohya(tmp_path / "bank")
    flat = np.stack([np.concatenate([v.numpy().ravel() for v in part.values()]) for part in updates_of(bank)])
    view = update_view(bank)
    centred = flat - flat.mean(0)
    np.testing.assert_allclose(view.W_KD @ view.W_KD.T, centred @ centred.T, atol=1e-9 * np.square(flat).sum())
    lora = Lora(whitening=1.0)
    assert lora.space(bank).boxes[0].size == 3
    origin = lora.coefficients(bank, {"z": np.zeros(3)})
    np.testing.assert_allclose(origin, 0.25)
    steps = [lora.coefficients(bank, {"z": np.eye(3)[i]}) - origin for i in range(3)]
    lengths = [np.linalg.norm(step @ flat) for step in steps]
    np.testing.assert_allclose(lengths, lengths[0], rtol=1e-6)  # equally long moves of the update
    np.testing.assert_allclose(lora.coefficients(bank, lora.point(bank, SIGNED)), SIGNED, atol=1e-9)
    assert {row.family for row in lora.baselines(bank)} == {"last", "best_single", "ema", "power_ema", "uniform", "wsm"}


def test_factor_space_is_named_and_is_something_else(tmp_path):
    bank = kohya(tmp_path / "bank")
    lora = Lora(factors=True)
    candidate = lora.apply(bank, lora.point(bank, SIGNED))
    assert candidate.recipe["space"] == "factor space: not the combination of the updates" == FACTOR_SPACE
    assert all(row.label.endswith(f"({FACTOR_SPACE})") for row in lora.baselines(bank))
    weights = candidate.weights()
    rows = bank.matrix().double().numpy()
    wanted = bank.layout.views(torch.from_numpy(SIGNED @ rows))
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-5, atol=1e-5)
    assert weights["lora_unet_a.alpha"] == 4
    true = sum(c * part["a"] for c, part in zip(SIGNED, updates_of(bank), strict=True))
    away = (updates_of(bank, weights)[0]["a"] - true).norm() / true.norm()
    assert away > 0.1


def test_modules_trained_in_full_are_combined_as_weights(tmp_path):
    folder = tmp_path / "bank"
    folder.mkdir()
    heads = torch.randn(3, 4, 5)
    for k, head in enumerate(heads):
        state = {"unet.q.lora_A.weight": torch.randn(2, 6), "unet.q.lora_B.weight": torch.randn(5, 2)}
        save_file({**state, "unet.head.weight": head.clone()}, folder / f"a-{k + 1}.safetensors")
    bank, lora = CheckpointBank.open(folder), Lora(rank=4)
    coef = np.array([2.0, -1.5, 0.5])
    weights = lora.apply(bank, lora.point(bank, coef)).weights()
    torch.testing.assert_close(weights["unet.head.weight"], torch.tensordot(torch.tensor(coef).float(), heads, 1))


def test_wrong_settings_and_banks(tmp_path):
    with pytest.raises(ConfigError, match="`operator.rank` is 0; it must be at least 1, or null"):
        Lora(rank=0)
    with pytest.raises(ConfigError, match="`operator.rank` is 4, but factors keep their rank"):
        Lora(rank=4, factors=True)
    with pytest.raises(ConfigError, match=r"`operator.whitening` is 2; it must lie in \[0, 1\]"):
        Lora(whitening=2)
    folder = tmp_path / "weights"
    folder.mkdir()
    for k in range(2):
        save_file({"w": torch.randn(3)}, folder / f"a-{k + 1}.safetensors")
    for lora in (Lora(), Lora(factors=True)):
        with pytest.raises(BankError, match="holds no LoRA factors.*Use operator=linear for weights"):
            lora.space(CheckpointBank.open(folder))
    with pytest.raises(BankError, match="holds 1 checkpoint; a combination needs at least 2"):
        Lora().space(kohya(tmp_path / "one", K=1))


def test_checkpoints_with_one_update_in_different_factors_are_one_point(tmp_path):
    folder = tmp_path / "bank"
    folder.mkdir()
    A, B = torch.randn(2, 6), torch.randn(5, 2)
    for k in range(3):
        state = {"unet.q.lora_A.weight": A * 2.0**k, "unet.q.lora_B.weight": B / 2.0**k}
        save_file(state, folder / f"a-{k + 1}.safetensors")
    bank = CheckpointBank.open(folder)
    with pytest.raises(BankError, match=r"all 3 checkpoints of `.*` are identical; there is nothing to combine"):
        Lora().apply(bank, {"z": np.zeros(2)})
    assert Lora(factors=True).apply(bank, {"z": np.ones(2)}).recipe["space"] == FACTOR_SPACE
