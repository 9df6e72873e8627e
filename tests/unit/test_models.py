"""Preconditioning against diffusers, networks saved and loaded to the bit, hostile config files."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, EDMEulerScheduler, UNet2DModel
from torch import Tensor, nn

from lcsc.core import registry
from lcsc.core.errors import BankError, ConfigError, EvaluationError
from lcsc.models.consistency import Consistency
from lcsc.models.direct import Direct
from lcsc.models.edm import EDM
from lcsc.models.gaussian import GaussianDenoiser
from lcsc.models.network import NETWORKS, build_network, load_network, save_network

TINY_UNET = {
    "class": "UNet2DModel",
    "config": {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": [8, 16],
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    },
}
SIGMAS = [0.002, 0.1, 1.0, 80.0]


class Recorder(nn.Module):
    """A network with a known output that remembers what it was given."""

    def forward(self, x_NCHW: Tensor, time_N: Tensor, class_labels: Tensor | None = None) -> SimpleNamespace:
        self.x_NCHW, self.time_N, self.labels_N = x_NCHW, time_N, class_labels
        return SimpleNamespace(sample=torch.tanh(2 * x_NCHW) + time_N.reshape(-1, 1, 1, 1))


class Wide(nn.Module):
    def forward(self, x_NCHW: Tensor, time_N: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=torch.cat([x_NCHW, x_NCHW], dim=1))


@pytest.fixture
def x_NCHW() -> Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sigma", SIGMAS)
def test_edm_is_diffusers_preconditioning(x_NCHW: Tensor, sigma: float) -> None:
    scheduler, net = EDMEulerScheduler(sigma_data=0.5), Recorder()
    images = EDM(sigma_data=0.5).denoise(net, sigma * x_NCHW, sigma)
    torch.testing.assert_close(net.x_NCHW, scheduler.precondition_inputs(sigma * x_NCHW, sigma))
    torch.testing.assert_close(net.time_N, scheduler.precondition_noise(sigma).expand(4))
    output = torch.tanh(2 * net.x_NCHW) + net.time_N.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(images, scheduler.precondition_outputs(sigma * x_NCHW, output, sigma))


@pytest.mark.parametrize("sigma_data", [0.5, 0.25])
def test_consistency_is_diffusers_one_step(x_NCHW: Tensor, sigma_data: float) -> None:
    scheduler = CMStochasticIterativeScheduler(
        num_train_timesteps=40, sigma_data=sigma_data, sigma_min=0.002, sigma_max=80.0, clip_denoised=False
    )
    scheduler.set_timesteps(1)
    net, t, noisy_NCHW = Recorder(), scheduler.timesteps[0], 80 * x_NCHW
    scaled_NCHW = scheduler.scale_model_input(noisy_NCHW, t)
    output = net(scaled_NCHW, (t / 1000).float().expand(4)).sample  # diffusers' time is 1000 times the paper's
    expected = scheduler.step(output, t, noisy_NCHW).prev_sample
    images = Consistency(sigma_data=sigma_data).denoise(Recorder(), noisy_NCHW, 80.0)
    torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.002, torch.full((4,), 0.002)])
def test_consistency_boundary_is_the_identity_to_the_bit(x_NCHW: Tensor, sigma: float | Tensor) -> None:
    assert torch.equal(Consistency(sigma_min=0.002).denoise(Recorder(), x_NCHW, sigma), x_NCHW)
    assert not torch.equal(Consistency(sigma_min=0.002).denoise(Recorder(), x_NCHW, 0.003), x_NCHW)


@pytest.mark.parametrize("model", [EDM(), Consistency(), Direct()], ids=lambda m: type(m).__name__)
def test_sigma_may_differ_between_images(x_NCHW: Tensor, model: EDM | Consistency | Direct) -> None:
    together = model.denoise(Recorder(), x_NCHW, torch.tensor(SIGMAS))
    for i, sigma in enumerate(SIGMAS):
        torch.testing.assert_close(together[i : i + 1], model.denoise(Recorder(), x_NCHW[i : i + 1], sigma))


def test_direct_returns_what_the_network_says(x_NCHW: Tensor) -> None:
    net = Recorder()
    assert torch.equal(Direct().denoise(net, x_NCHW, 3.0), torch.tanh(2 * x_NCHW) + 3)
    assert net.time_N.tolist() == [3.0] * 4


def test_labels_reach_the_network_only_if_there_are_some(x_NCHW: Tensor) -> None:
    net, labels_N = Recorder(), torch.tensor([3, 1, 2, 0])
    EDM().denoise(net, x_NCHW, 1.0, labels_N)
    assert net.labels_N is labels_N
    EDM().denoise(net, x_NCHW, 1.0)
    assert net.labels_N is None


def test_network_dtype_may_differ_from_the_images(x_NCHW: Tensor) -> None:
    torch.manual_seed(0)
    net = build_network(TINY_UNET).eval()
    single = EDM().denoise(net, x_NCHW, 1.0)
    half = EDM().denoise(net.bfloat16(), x_NCHW, 1.0)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, single, rtol=0, atol=0.02)


def test_output_of_another_shape_is_refused(x_NCHW: Tensor) -> None:
    with pytest.raises(
        EvaluationError, match=r"`Wide` returned shape \(4, 2, 8, 8\) for images of shape \(4, 1, 8, 8\)"
    ):
        EDM().denoise(Wide(), x_NCHW, 1.0)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("edm", {"sigma_data": 0.0}, "model `edm` has `sigma_data` 0.0; it must be above 0"),
        ("consistency", {"sigma_data": -1.0}, "model `consistency` has `sigma_data` -1.0; it must be above 0"),
        ("consistency", {"sigma_min": 0.0}, "model `consistency` has `sigma_min` 0.0; it must be above 0"),
    ],
)
def test_model_fields_are_checked(name: str, fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        registry.build("model", name, **fields)


def test_gaussian_denoiser_is_the_regression_of_clean_on_noisy() -> None:
    """Least squares on a million draws finds the same line as the closed form."""
    generator = torch.Generator().manual_seed(0)
    net = GaussianDenoiser(shape=(1, 1, 2))
    net.mean_CHW.data = torch.tensor([[[0.3, -0.2]]])
    net.std_CHW.data = torch.tensor([[[0.5, 0.1]]])
    clean = net.mean_CHW + net.std_CHW * torch.randn(500_000, 1, 1, 2, generator=generator)
    noisy = clean + 0.4 * torch.randn(clean.shape, generator=generator)
    for pixel in range(2):
        x, y = noisy[:, 0, 0, pixel].double(), clean[:, 0, 0, pixel].double()
        slope = ((x - x.mean()) * (y - y.mean())).mean() / x.var()
        probe = torch.zeros(2, 1, 1, 2)
        probe[1] = 1
        at_0, at_1 = net(probe, 0.4).sample[:, 0, 0, pixel].detach().double()
        torch.testing.assert_close(at_1 - at_0, slope.detach(), rtol=0, atol=3e-3)
        torch.testing.assert_close(at_0, (y.mean() - slope * x.mean()).detach(), rtol=0, atol=3e-3)


@pytest.mark.parametrize("arch", [TINY_UNET, {"class": "GaussianDenoiser", "config": {"shape": [1, 3, 2]}}])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_save_and_load_give_the_same_bits(
    tmp_path: Path, arch: dict, max_shard_size: str, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*args: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    torch.manual_seed(0)
    net = build_network(arch)
    for parameter in net.parameters():
        parameter.data = torch.randn_like(parameter)
    save_network(net, tmp_path / "unet", max_shard_size=max_shard_size)
    loaded = load_network(tmp_path / "unet")
    assert type(loaded) is type(net)
    assert not loaded.training
    assert list(loaded.state_dict()) == list(net.state_dict())
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in net.state_dict().items())
    shards = len(list((tmp_path / "unet").glob("*.safetensors")))
    assert (shards > 1) == (max_shard_size == "20KB" and arch is TINY_UNET)
    assert capfd.readouterr() == ("", "")


def test_diffusers_loads_what_we_save(tmp_path: Path) -> None:
    net = build_network(TINY_UNET).eval()
    save_network(net, tmp_path)
    x_NCHW = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    theirs = UNet2DModel.from_pretrained(str(tmp_path), low_cpu_mem_usage=False).eval()
    with torch.no_grad():
        assert torch.equal(theirs(x_NCHW, 0.5).sample, net(x_NCHW, 0.5).sample)


def test_every_network_class_exists() -> None:
    import diffusers

    for name, module in NETWORKS.items():
        assert module != "diffusers" or issubclass(getattr(diffusers, name), diffusers.ModelMixin)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ({"class": "UNet2dModel"}, "no network class named `UNet2dModel`. Did you mean `UNet2DModel`?"),
        ({"class": "AutoencoderKL"}, "no network class named `AutoencoderKL`"),
        ({"config": {}}, r"`arch` has no `class`, only \['config'\]. Name one of: .*DiT"),
        (
            {"class": "UNet2DModel", "config": {"sample_sise": 8}},
            "`UNet2DModel` has no argument `sample_sise`. Did you mean `sample_size`",
        ),
        (
            {"class": "UNet2DModel", "config": {"block_out_channels": [8]}},
            "network `UNet2DModel` cannot be built from `arch.config`: Must provide the same number of `block_out_ch",
        ),
    ],
)
def test_bad_architectures_are_refused(arch: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_network(arch)


@pytest.mark.parametrize("name", ["os.system", "AutoencoderKL", "builtins.eval", "StableDiffusionPipeline"])
def test_config_json_cannot_name_other_classes(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name, "auto_map": {"AutoModel": "evil.Evil"}}))
    with pytest.raises(ConfigError, match=f"no network class named `{name}`"):
        load_network(tmp_path)


def test_unloadable_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(BankError, match=r"no `config.json` in"):
        load_network(tmp_path)
    config = tmp_path / "config.json"
    for text in ("{", "[]", "{}"):
        config.write_text(text)
        with pytest.raises(BankError, match=r"is no configuration of diffusers or transformers"):
            load_network(tmp_path)
    save_network(GaussianDenoiser((1, 2, 2)), tmp_path)
    good = json.loads(config.read_text())
    config.write_text(json.dumps(good | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(BankError, match=r"describes quantized weights"):
        load_network(tmp_path)
    config.write_text(json.dumps(good | {"shape": [1, 2, 3]}))
    with pytest.raises(BankError, match=r"GaussianDenoiser"):
        load_network(tmp_path)
    config.write_text(json.dumps(good))
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(BankError, match=r"cannot load `GaussianDenoiser` from"):
        load_network(tmp_path)
    weights.unlink()
    with pytest.raises(BankError, match=r"cannot load `GaussianDenoiser` from"):
        load_network(tmp_path)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_network(GaussianDenoiser((1, 2, 2)), tmp_path)
    save_file(
        {"mean_CHW": torch.zeros(1, 2, 2), "scale": torch.ones(3)}, tmp_path / "diffusion_pytorch_model.safetensors"
    )
    with pytest.raises(BankError, match=r"do not fit `GaussianDenoiser`.*'std_CHW'.*'scale'"):
        load_network(tmp_path)


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    net = GaussianDenoiser((1, 2, 2))
    save_network(net, tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(net.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(BankError, match=r"cannot load `GaussianDenoiser` from"):
        load_network(tmp_path)


def test_only_known_networks_are_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no network class named `Linear`"):
        save_network(nn.Linear(1, 1), tmp_path)
    impostor = type("UNet2DModel", (nn.Module,), {})()
    with pytest.raises(ConfigError, match=r"network `UNet2DModel` is not diffusers.UNet2DModel"):
        save_network(impostor, tmp_path)
    assert list(tmp_path.iterdir()) == []
