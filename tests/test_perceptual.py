import hashlib
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from skimage.metrics import structural_similarity
from torch import Tensor, nn
from torch.nn.functional import normalize

import autoencoder.runtime.torchvision_operators  # noqa: F401  (before lpips)
from autoencoder.lpips_weights import SMALLEST, TORCHVISION, backbone_bands, lpips_weights_path
from autoencoder.objective_config import PerceptualConfig
from autoencoder.perceptual import LPIPSDistance, SSIMDistance, build_perceptual
from autoencoder.runtime.errors import ConfigError, UsageError

import lpips  # isort: skip
import torchvision  # isort: skip

NETS = SMALLEST


def pair(side: int = 32, channels: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, channels, side, side, generator=generator, dtype=torch.float64) * 2 - 1
    return images.to(dtype), (0.7 * images + 0.3 * torch.randn(images.shape, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.fixture(scope="module")
def alex() -> LPIPSDistance:
    return LPIPSDistance("alex", "random")


def package(distance: LPIPSDistance, net: str) -> nn.Module:
    """The lpips package's own model with the same backbone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    model.net.load_state_dict(distance.backbone.state_dict())
    return model


def directional_derivatives(distance: nn.Module, images: Tensor, reconstruction: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """By autograd and by central differences, along a random direction."""
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=images.dtype)
    reconstruction = reconstruction.clone().requires_grad_()
    distance(images, reconstruction).sum().backward()
    assert reconstruction.grad is not None
    with torch.no_grad():
        ahead, behind = (distance(images, reconstruction + sign * step * direction).sum() for sign in (1, -1))
    return (reconstruction.grad * direction).sum(), (ahead - behind) / (2 * step)


@pytest.mark.parametrize("net", list(NETS))
def test_lpips_equals_the_package_and_its_gradient_matches_finite_differences(net: str) -> None:
    distance = LPIPSDistance(net, "random").double()
    images, reconstruction = pair(max(NETS[net], 32), dtype=torch.float64)
    theirs = package(distance, net).double()
    ours_at, theirs_at = (reconstruction.clone().requires_grad_() for _ in range(2))
    actual, expected = distance(images, ours_at), theirs(images, theirs_at).flatten()
    assert (expected > 1e-4).all()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    ours_gradient, theirs_gradient = (torch.autograd.grad(v.sum(), x)[0] for v, x in ((actual, ours_at), (expected, theirs_at)))
    assert (ours_gradient - theirs_gradient).norm() < 1e-6 * theirs_gradient.norm()
    # A longer step crosses the kinks of some of the many thousand rectifiers.
    derivative, numeric = directional_derivatives(distance, images, reconstruction, step=1e-8)
    torch.testing.assert_close(derivative, numeric, rtol=1e-5, atol=0)


def test_lpips_gradient_is_finite_for_identical_images_and_for_zero_features(alex: LPIPSDistance) -> None:
    images, reconstruction = pair(35)
    dead = LPIPSDistance("alex", "random")
    for name, value in dead.backbone.named_parameters():
        value.data.fill_(-1.0 if name.endswith("bias") else 0.0)  # every feature is relu(-1) = 0
    for model, target in ((alex, reconstruction), (dead, images)):
        x = reconstruction.clone().requires_grad_()
        value = model(target, x)
        value.sum().backward()
        assert x.grad is not None and x.grad.isfinite().all()
        assert torch.equal(value, torch.zeros(2))


def test_lpips_gives_a_gradient_to_the_reconstruction_alone(alex: LPIPSDistance) -> None:
    images, reconstruction = (x.requires_grad_() for x in pair(35))
    alex(images, reconstruction).sum().backward()
    assert images.grad is None
    assert reconstruction.grad is not None and reconstruction.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in alex.parameters())


def test_lpips_is_the_same_in_training_mode_and_leaves_the_global_generator_alone(alex: LPIPSDistance) -> None:
    images, reconstruction = pair(35)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    assert torch.equal(alex.train()(images, reconstruction), LPIPSDistance("alex", "random")(images, reconstruction))
    assert torch.equal(before, torch.get_rng_state())


def test_lpips_under_autocast_does_all_but_the_backbone_in_fp32(alex: LPIPSDistance) -> None:
    images, reconstruction = pair(35)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        value = alex(images, reconstruction.bfloat16())
        assert torch.equal(alex(images, images), torch.zeros(2))
        first, second = (alex.backbone(alex.scaling(x)) for x in (images, reconstruction.bfloat16().float()))
    assert first[0].dtype == torch.bfloat16
    expected = torch.zeros(2, dtype=torch.float64)
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        squared = (normalize(a.double()) - normalize(b.double())).square()
        expected += (squared * alex.get_buffer(f"head{number}")).sum(1).mean((1, 2))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(value, alex(images, reconstruction), rtol=0.05, atol=0)


def test_lpips_shows_grey_images_as_three_equal_channels(alex: LPIPSDistance) -> None:
    images, reconstruction = pair(35, channels=1)
    expected = alex(images.repeat(1, 3, 1, 1), reconstruction.repeat(1, 3, 1, 1))
    torch.testing.assert_close(alex(images, reconstruction), expected)


@pytest.mark.parametrize(
    ("channels", "bands", "seen"), [(4, None, (0, 1, 2)), (13, (3, 2, 1), (3, 2, 1)), (13, (7,), (7, 7, 7)), (3, (2, 1, 0), (2, 1, 0))]
)
def test_lpips_sees_the_bands_that_it_is_to_see(channels: int, bands: tuple[int, ...] | None, seen: tuple[int, ...]) -> None:
    distance = build_perceptual(PerceptualConfig(name="lpips", net="squeeze", weights="random", bands=bands), channels)
    images, reconstruction = pair(20, channels=channels)
    reconstruction.requires_grad_()
    assert distance is not None
    value = distance(images, reconstruction)
    picked = [x[:, list(seen)] for x in (images, reconstruction)]
    torch.testing.assert_close(value, LPIPSDistance("squeeze", "random")(*picked))
    (gradient,) = torch.autograd.grad(value.sum(), reconstruction)
    assert {band for band in range(channels) if gradient[:, band].abs().sum() > 0} == set(seen)


@pytest.mark.parametrize(("channels", "bands"), [(13, None), (2, None), (4, (0, 1)), (4, (4,)), (3, (-1,))])
def test_channels_without_a_rule_and_bands_that_are_not_there_are_refused(channels: int, bands: tuple[int, ...] | None) -> None:
    with pytest.raises(ConfigError, match=r"^objective\.perceptual\.bands: "):
        backbone_bands(bands, channels)


def test_the_log_tells_the_weights_by_hash(alex: LPIPSDistance) -> None:
    said = alex.described()
    assert said == LPIPSDistance("alex", "random").described()
    backbone, heads = re.findall("[0-9a-f]{64}", said)
    digest = hashlib.sha256()
    for name, tensor in sorted(alex.backbone.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    assert backbone == digest.hexdigest()
    other = LPIPSDistance("alex", "random")
    next(iter(other.backbone.state_dict().values())).view(-1)[0] += 1
    assert other.described() != said and heads in other.described()


@pytest.mark.parametrize("net", list(NETS))
def test_the_least_side_is_the_least_that_leaves_features(net: str) -> None:
    distance = LPIPSDistance(net, "random")
    assert distance(*pair(NETS[net])).isfinite().all()
    with pytest.raises(RuntimeError):
        distance(*pair(NETS[net] - 1))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_saved_torchvision_backbone_gives_the_distance_of_the_original(suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    original = torchvision.models.squeezenet1_1()
    path = tmp_path / f"backbone{suffix}"
    (torch.save if suffix == ".pth" else save_file)(original.state_dict(), path)
    distance = LPIPSDistance("squeeze", str(path))
    images, reconstruction = pair()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    for part in model.net.children():
        for number, module in part.named_children():
            module.load_state_dict(original.features[int(number)].state_dict())
    torch.testing.assert_close(distance(images, reconstruction), model(images, reconstruction).flatten(), rtol=1e-4, atol=1e-6)


def test_weights_are_found_in_the_cache_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for variable, value in (("XDG_CACHE_HOME", tmp_path / "cache"), ("TORCH_HOME", tmp_path / "home")):
        monkeypatch.setenv(variable, str(value))
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        assert tmp_path in folder.parents
        folder.mkdir(parents=True)
        for net, (model, filename) in TORCHVISION.items():
            assert torchvision.models.get_model_weights(model).IMAGENET1K_V1.url.endswith(f"/{filename}")
            (folder / filename).touch()
            assert lpips_weights_path(net, None) == folder / filename


@pytest.mark.parametrize("given", [None, "missing.pth"])
def test_missing_weights_name_cache_and_file_as_remedies(given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UsageError) as error:
        build_perceptual(PerceptualConfig(name="lpips", net="alex", weights=given))
    message = str(error.value)
    assert str(tmp_path / "hub" / "checkpoints") in message and "alexnet-owt-7be5be79.pth" in message
    assert "torchvision.models.alexnet(weights='IMAGENET1K_V1')" in message
    assert "set objective.perceptual.weights to a file" in message


def test_the_key_in_a_refusal_is_the_callers(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ConfigError, match=r"^lpips_weights: .*neither \.pth nor \.safetensors"):
        lpips_weights_path("vgg", str(tmp_path / "weights.bin"), key="lpips_weights")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not weights", "cannot be read"),
        ({"features.0.weight": torch.zeros(64, 3, 3, 3)}, "features.0.bias is missing"),
        ({"features.0.weight": torch.zeros(1)}, r"features.0.weight is of shape \(1,\)"),
        ({"features.0.weight": Path("/")}, "cannot be read"),
    ],
)
def test_files_that_are_not_the_backbone_are_refused(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UsageError, match=message):
        LPIPSDistance("squeeze", str(path))


def test_looking_for_weights_imports_no_torch() -> None:
    code = "import sys, autoencoder.lpips_weights as w; w.lpips_weights_path('vgg', 'random'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ssim_distance_is_one_minus_that_of_scikit_image() -> None:
    images, reconstruction = pair()
    a, b = (x.permute(0, 2, 3, 1).double().numpy() for x in (images, reconstruction))
    # scikit-image's window is 2 * int(3.5 sigma + 0.5) + 1 pixels wide: 7 for this sigma.
    options = {"channel_axis": 2, "gaussian_weights": True, "sigma": 1.5 * 7 / 11, "use_sample_covariance": False, "data_range": 2}
    expected = torch.tensor([1 - structural_similarity(x, y, **options) for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(SSIMDistance(7)(images, reconstruction), expected.float(), rtol=0, atol=1e-5)


def test_ssim_gradient_matches_finite_differences() -> None:
    actual, numeric = directional_derivatives(SSIMDistance(5), *pair(12, dtype=torch.float64), step=1e-6)
    torch.testing.assert_close(actual, numeric, rtol=1e-6, atol=0)


@pytest.mark.parametrize("level", [-1.0, 0.0, 0.3, 1.0])
def test_ssim_of_constant_images_is_the_luminance_term_with_a_finite_gradient(level: float) -> None:
    images = torch.full((2, 3, 16, 16), level, dtype=torch.float64)
    reconstruction = torch.full_like(images, 0.5, requires_grad=True)
    distance = SSIMDistance()(images, reconstruction)
    distance.sum().backward()
    assert reconstruction.grad is not None and reconstruction.grad.isfinite().all()
    c1 = 0.02**2
    expected = 1 - (2 * level * 0.5 + c1) / (level**2 + 0.25 + c1)
    # The library's window sums to 1 in fp32: constant images keep a variance of that size, which c2 stands beside.
    rounding = 4 * torch.finfo(torch.float32).eps / 0.06**2
    torch.testing.assert_close(distance, torch.full((2,), expected, dtype=torch.float64), rtol=0, atol=rounding)


def test_ssim_of_identical_images_is_zero_with_a_zero_gradient() -> None:
    images = pair()[0]
    reconstruction = images.clone().requires_grad_()
    distance = SSIMDistance()(images, reconstruction)
    distance.sum().backward()
    torch.testing.assert_close(distance, torch.zeros(2))
    assert reconstruction.grad is not None and reconstruction.grad.abs().max() < 1e-6


def test_ssim_under_autocast_is_that_of_fp32() -> None:
    images, reconstruction = pair()
    expected = SSIMDistance()(images, reconstruction.bfloat16().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = SSIMDistance()(images, reconstruction.bfloat16())
    assert torch.equal(actual, expected)


def test_build_perceptual_follows_the_configuration() -> None:
    assert build_perceptual(PerceptualConfig(name="none")) is None
    ssim = build_perceptual(PerceptualConfig(name="ssim", window=5))
    assert isinstance(ssim, SSIMDistance) and ssim.window == 5
    assert isinstance(build_perceptual(PerceptualConfig(name="lpips", net="squeeze", weights="random")), LPIPSDistance)
