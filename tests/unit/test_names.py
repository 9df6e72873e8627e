"""Steps, kinds and rates in the names that trainers give."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcsc.bank.names import Name, is_temporary, parse, parse_component, split_shard, split_suffix, step_of


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-1000", 1000),
        ("checkpoint-000100", 100),
        ("step_100", 100),
        ("global_step1000", 1000),
        ("iter_0005000", 5000),
        ("0050000", 50000),
        ("model840000", 840000),
        ("m50", 50),
        ("model-12", 12),
        ("model-100k", 100_000),
        ("lcm_8k-steps", 8000),
        ("name-step00006000", 6000),
        ("epoch=12-step=8000", 8000),
        ("epoch=12-step=8000-v1", 8000),
        ("sd15-epoch=01-step=200-val_loss=0.12", 200),
        ("step=100-fid=7.5", 100),
        ("sd-v1-5-step100", 100),
        ("my-v2-10", 10),
        ("run_20240101_1000", 1000),
        ("model-1000-fp16", 1000),
        ("unet_1000_fp16", 1000),
        ("run-iter=500-loss=2", 500),
        ("0123456789abcdef0123456789abcdef01234567", None),
        ("checkpoint_1000_ema", 1000),
        ("10000_net_G", 10000),
        ("net_g_10000", 10000),
        ("last", None),
        ("last-v1", None),
        ("sd-v1-5", None),
        ("v2-1_768-ema-pruned", None),
        ("sdxl_base_1.0", None),
        ("256x256_diffusion", None),
        ("model_256x256", None),
        ("model.fp16", None),
        ("version_0", None),
        ("loss=0.5", None),
        ("epoch=3-val_loss=0.123", None),
        ("diffusion_pytorch_model", None),
    ],
)
def test_steps(name, step):
    assert step_of(name) == step


@pytest.mark.parametrize(
    ("name", "kind", "rate", "step"),
    [
        ("ema_0.9999_840000", "ema", "0.9999", 840000),
        ("ema_0.9999432189950708_840000", "ema", "0.9999432189950708", 840000),
        ("EMA_0.999_100", "ema", "0.999", 100),
        ("model_ema_0.999_1000", "ema", "0.999", 1000),
        ("0.995_ema_20", "ema", "0.995", 20),
        ("step=100-ema=0.99", "ema", "0.99", 100),
        ("0.8000", "ema", "0", 8000),
        ("12.70000", "ema", "12", 70000),
        ("network-snapshot-0002048-0.050", "ema", "0.050", 2048),
        ("network-snapshot-002048", "ema", None, 2048),
        ("ema-1000", "ema", None, 1000),
        ("v1-5-pruned-emaonly", "ema", None, None),
        ("unet_non_ema_100", "raw", None, 100),
        ("cinema-100", None, None, 100),
        ("schema_5", None, None, 5),
    ],
)
def test_kinds_and_rates(name, kind, rate, step):
    found = parse(name)
    assert (found.kind, found.rate, found.step) == (kind, rate, step)


STATES = """
    opt840000 optimizer optimizer_1 optimizer-100 optim_100 scheduler lr_scheduler random_states_0 rng_state_3 scaler
    training_args training-state-0000100 target_model000100 teacher_model000100 custom_checkpoint_0 sampler
    mp_rank_00_model_states bf16_zero_pp_rank_0_mp_rank_00_optim_states unet_optimizer g_optim
"""
MODELS = "opt-125m-step100 optimal-5 model state_dict_5 unet tower_sampler_net"


def test_training_states_are_no_models():
    assert [name for name in STATES.split() if not parse(name).state] == []


def test_models_that_sound_like_states():
    assert [name for name in MODELS.split() if parse(name).state] == []


@pytest.mark.parametrize(
    ("names", "base"),
    [
        (["model840000", "ema_0.9999_840000", "ema_840000", "checkpoint-5", "0050000", "last"], ""),
        (["cat-step00006000", "cat-000004", "cat", "cat-last"], "cat"),
        (["sd15-epoch=01-step=200-val_loss=0.12", "sd15-epoch=02-step=400-v1", "sd15-ema-step=9"], "sd15"),
        (["sd-v1-5-step100", "sd-v1-5-step200", "sd-v1-5"], "sd-v1-5"),
        (["net_g_5", "net-g-10"], "net-g"),
    ],
)
def test_files_of_one_network_share_a_base(names, base):
    assert {parse(name).base for name in names} == {base}


def test_epochs_and_loose_numbers():
    assert parse("epoch=12-step=8000") == Name("", 8000, 12, marked=True)
    assert parse("name-000004") == Name("name", 4, loose=True)
    assert not parse("model000004").loose
    assert parse("checkpoint-epoch-5").epoch == 5
    assert parse("mylora-last").last


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unet", ("unet", None, None)),
        ("unet_ema", ("unet", "ema", None)),
        ("ema_unet", ("unet", "ema", None)),
        ("unet_ema_0.999", ("unet", "ema", "0.999")),
        ("text_encoder_2", ("text_encoder_2", None, None)),
        ("model", (None, None, None)),
        ("pytorch_lora_weights", (None, None, None)),
        ("pytorch_model_fsdp_0", (None, None, None)),
        ("model_1", ("model_1", None, None)),
        ("model_ema", (None, "ema", None)),
        ("ema", (None, "ema", None)),
    ],
)
def test_components(name, expected):
    assert parse_component(name) == expected


def test_endings_and_shards():
    assert split_suffix("a.b.safetensors") == ("a.b", ".safetensors")
    assert split_suffix("A.CKPT") == ("A", ".CKPT".lower())
    assert split_suffix("config.json") == ("config.json", "")
    assert split_shard("model-00002-of-00003") == ("model", (2, 3))
    assert split_shard("model-2-of-3") == ("model-2-of-3", None)


@pytest.mark.parametrize("name", [".cache", "checkpoint-5.tmp", "tmp-checkpoint-5", "x.part", "x.incomplete", "a~"])
def test_temporary_names(name):
    assert is_temporary(name)
    assert not is_temporary("checkpoint-5")


@given(st.integers(0, 10**12), st.integers(0, 8))
def test_zeros_before_a_step_change_nothing(step, zeros):
    text = "0" * zeros + str(step)
    for name in (f"model{text}", f"checkpoint-{text}", f"ema_0.9999_{text}", f"cat-step{text}", f"epoch=3-step={text}"):
        assert parse(name).step == step


@given(st.text(max_size=60))
def test_any_name_is_parsed(name):
    found = parse(name)
    assert found.step is None or found.step >= 0
    component, kind, _ = parse_component(name)
    assert component is None or kind is not None or component == name
