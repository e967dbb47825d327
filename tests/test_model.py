"""The VAE: losses against other libraries, what the frozen encoder keeps, and the way back from a checkpoint."""

import copy
import json
import os

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from skimage.metrics import structural_similarity

from checks import UsageError
from config import VAEConfig
from files import load_checkpoint, save_checkpoint
from metrics import psnr as psnr_of_one
from model import RadiographVAE, kl_divergence, pretrained_vae, psnr, rebuild_vae, ssim, vae_loss

LEVELS = (8, 8, 16, 16)  # three halvings, as Stable Diffusion has


def kl_autoencoder(channels=1, levels=LEVELS):
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * len(levels),
        "up_block_types": ("UpDecoderBlock2D",) * len(levels),
    }
    return AutoencoderKL(channels, channels, **blocks, block_out_channels=levels, layers_per_block=1, norm_num_groups=4)


def tiny_autoencoder(channels=3):
    blocks = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    return AutoencoderTiny(
        channels, channels, **blocks, num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1)
    )


KINDS = pytest.mark.parametrize("build", [kl_autoencoder, tiny_autoencoder])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def radiographs(height=32, width=48):
    return torch.rand(2, 1, height, width) * 2 - 1


# ---------------------------------------------------------------- losses


def test_kl_is_that_of_torch_distributions():
    mean, logvar = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    posterior = torch.distributions.Normal(mean, torch.exp(0.5 * logvar))
    expected = torch.distributions.kl_divergence(
        posterior, torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    )
    torch.testing.assert_close(kl_divergence(mean, logvar), expected.sum((1, 2, 3)).mean(), rtol=1e-12, atol=0)


def test_kl_of_a_unit_gaussian_is_zero():
    assert float(kl_divergence(torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3))) == 0


@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_ssim_is_that_of_scikit_image(noise):
    """scikit-image leaves out the border of 5 pixels, ours mirrors the image there.

    1e-5 is float32 under a quotient of variances.
    """
    x = torch.nn.functional.interpolate(torch.rand(1, 1, 12, 16) * 2 - 1, (96, 128), mode="bicubic").clamp(-1, 1)
    y = (x + noise * torch.randn_like(x)).clamp(-1, 1)
    mirrored = (np.pad(image[0, 0].double().numpy() + 1, 5, mode="reflect") for image in (x, y))
    expected = structural_similarity(
        *mirrored, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=2
    )
    assert float(ssim(x, y)) == pytest.approx(expected, abs=1e-5)


def test_a_slightly_brighter_copy_is_similar_at_every_grey_level():
    """At mid-grey too, where a signed scale has its zero and would call it opposite."""
    grain = 0.001 * torch.randn(1, 1, 64, 64)
    for grey in (-0.9, 0.0, 0.5):
        assert float(ssim(grain + grey - 0.01, grain + grey + 0.01)) > 0.95


def test_a_perfect_copy_costs_only_its_kl():
    x, (mean, logvar) = radiographs(), torch.randn(2, 2, 4, 4, 6)
    config = VAEConfig(beta_kl=0.5)
    torch.testing.assert_close(
        vae_loss(x, x, mean, logvar, config).total, 0.5 * kl_divergence(mean, logvar), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("weights", [(1.0, 0.5, 0.3, 0.1, 1e-6), (0.0, 2.0, 0.0, 3.0, 0.1)])
def test_the_total_is_the_weighted_sum_of_the_terms(weights):
    names = ("lambda_pix", "lambda_grad", "lambda_hf", "lambda_ssim", "beta_kl")
    config = VAEConfig(**dict(zip(names, weights, strict=True)))
    loss = vae_loss(radiographs(), radiographs(), *torch.randn(2, 2, 4, 4, 6), config)
    unweighted, weighted = (
        [float(loss.terms[f"{kind}_{name}"]) for name in ("pix", "grad", "hf", "ssim", "kl")]
        for kind in ("loss", "weighted")
    )
    assert float(loss.total) == pytest.approx(np.dot(weights, unweighted), rel=1e-5)
    assert float(loss.total) == pytest.approx(sum(weighted), rel=1e-5)


def test_a_constant_offset_costs_its_size_in_pixels_and_nothing_in_edges():
    x = radiographs() * 0.5
    terms = vae_loss(x, x + 0.25, x, None, VAEConfig()).terms
    assert float(terms["loss_pix"]) == pytest.approx(0.25, rel=1e-5)
    assert float(terms["loss_grad"]) < 1e-6 and float(terms["loss_hf"]) < 1e-6


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_ssim_is_logged_with_its_value_also_at_weight_zero(weight):
    x, y = radiographs(), radiographs().requires_grad_()
    loss = vae_loss(x, y, x, None, VAEConfig(lambda_ssim=weight))
    loss.total.backward()
    assert float(loss.terms["loss_ssim"]) == pytest.approx(1 - float(ssim(x, y.detach())), abs=1e-6)
    assert float(loss.terms["weighted_ssim"]) == pytest.approx(weight * float(loss.terms["loss_ssim"]))
    assert y.grad.abs().sum() > 0


def test_an_autoencoder_without_a_posterior_has_no_kl():
    x, vae = radiographs(), RadiographVAE(tiny_autoencoder())
    terms = vae_loss(x, *vae(x), VAEConfig(beta_kl=1.0)).terms
    assert terms["loss_kl"] == terms["weighted_kl"] == "n/a"


def test_psnr_of_a_batch_is_that_of_each_image_alone():
    x = radiographs()
    y = x + torch.tensor([0.01, 0.3]).view(2, 1, 1, 1) * torch.randn_like(x)
    assert psnr(x, y).tolist() == pytest.approx([psnr_of_one(a, b) for a, b in zip(x, y, strict=True)], rel=1e-6)
    assert psnr(x, x).tolist() == [np.inf, np.inf]


# ---------------------------------------------------------------- encode and decode


@KINDS
@pytest.mark.parametrize("size", [(32, 32), (32, 64), (64, 24)])
def test_rectangles_shrink_by_eight_and_come_back(build, size):
    reconstruction, mean, logvar = RadiographVAE(build())(radiographs(*size))
    assert reconstruction.shape == (2, 1, *size) and mean.shape == (2, 4, size[0] // 8, size[1] // 8)
    assert logvar is None or logvar.shape == mean.shape


@KINDS
def test_a_colour_autoencoder_sees_grey_in_every_channel_and_gives_the_mean_of_its_colours(build):
    autoencoder, x = build(channels=3), radiographs()
    vae = RadiographVAE(autoencoder).eval()
    z, _ = vae.encode(x)
    encoded = autoencoder.encode(torch.cat([x, x, x], dim=1))
    torch.testing.assert_close(z, encoded.latent_dist.mode() if vae.has_posterior else encoded.latents)
    torch.testing.assert_close(vae.decode(z)[:, 0], autoencoder.decode(z).sample.mean(1))


def test_without_noise_z_is_the_mean_and_with_noise_a_draw_from_the_posterior():
    vae, x, noise = RadiographVAE(kl_autoencoder()).eval(), radiographs(), torch.randn(2, 4, 4, 6)
    mean, logvar = vae.encode(x)
    torch.testing.assert_close(vae(x)[0], vae.decode(mean))
    torch.testing.assert_close(vae(x, noise)[0], vae.decode(mean + torch.exp(logvar / 2) * noise))


# ---------------------------------------------------------------- the frozen encoder


def one_step(vae, config):
    optimizer = torch.optim.AdamW([weight for weight in vae.parameters() if weight.requires_grad], lr=1e-2)
    x = radiographs()
    vae_loss(x, *vae(x), config).total.backward()
    optimizer.step()


@KINDS
def test_a_frozen_encoder_keeps_its_bits_and_the_decoder_learns(build, tmp_path):
    build().save_pretrained(tmp_path)
    config = VAEConfig(pretrained=str(tmp_path), freeze_encoder=True)
    vae = pretrained_vae(config)
    before = copy.deepcopy(vae.state_dict())
    one_step(vae, config)
    moved = {name.split(".")[1] for name, weight in vae.state_dict().items() if not torch.equal(weight, before[name])}
    with_gradient = {name.split(".")[1] for name, weight in vae.named_parameters() if weight.grad is not None}
    assert moved == with_gradient == ({"decoder", "post_quant_conv"} if vae.has_posterior else {"decoder"})


@KINDS
def test_a_frozen_encoder_gives_the_same_latents_after_a_step(build, tmp_path):
    build().save_pretrained(tmp_path)
    config, x = VAEConfig(pretrained=str(tmp_path)), radiographs()
    vae = pretrained_vae(config)
    before = vae.encode(x)[0].detach()
    one_step(vae, config)
    assert torch.equal(vae.encode(x)[0], before)


def test_a_free_encoder_learns_too():
    config = VAEConfig(pretrained="scratch", freeze_encoder=False, scratch_channels=LEVELS)
    vae = pretrained_vae(config)
    one_step(vae, config)
    assert all(weight.grad is not None for name, weight in vae.named_parameters() if "encoder" in name)


def test_an_untrained_encoder_cannot_be_frozen():
    with pytest.raises(UsageError, match="--vae.freeze-encoder False"):
        pretrained_vae(VAEConfig(pretrained="scratch", freeze_encoder=True, scratch_channels=LEVELS))


# ---------------------------------------------------------------- where it comes from


@KINDS
def test_a_local_diffusers_folder_gives_its_own_weights(build, tmp_path):
    autoencoder = build()
    autoencoder.save_pretrained(tmp_path)
    loaded = pretrained_vae(VAEConfig(pretrained=str(tmp_path))).autoencoder
    assert type(loaded) is type(autoencoder)
    for name, weight in autoencoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_half_precision_weights_are_trained_in_float32(tmp_path):
    kl_autoencoder().half().save_pretrained(tmp_path)
    assert {weight.dtype for weight in pretrained_vae(VAEConfig(pretrained=str(tmp_path))).parameters()} == {
        torch.float32
    }


@KINDS
@pytest.mark.parametrize("channels", [1, 3])
def test_recipe_and_weights_rebuild_the_same_network(build, channels, tmp_path):
    vae, x = RadiographVAE(build(channels)).eval(), radiographs()
    save_checkpoint(tmp_path / "vae.pt", "vae", {"recipe": vae.recipe(), "weights": vae.state_dict()})
    again = rebuild_vae(load_checkpoint(tmp_path / "vae.pt", "vae", "phase 1"))
    assert not again.training and not any(weight.requires_grad for weight in again.parameters())
    for mine, theirs in zip(vae(x), again(x), strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)


@KINDS
def test_a_recipe_is_json_and_names_no_path(build, tmp_path):
    build().save_pretrained(tmp_path)
    recipe = json.dumps(pretrained_vae(VAEConfig(pretrained=str(tmp_path))).recipe(), allow_nan=False)
    assert str(tmp_path) not in recipe


@pytest.mark.parametrize("missing", ["./no/such/folder", "/no/such/folder", "nofolder", "a/b/c"])
def test_what_is_neither_folder_nor_hub_name_is_refused(missing):
    with pytest.raises(UsageError, match="is no folder: give a diffusers folder"):
        pretrained_vae(VAEConfig(pretrained=missing))


def empty(folder):
    pass


def of_another_class(folder):
    (folder / "config.json").write_text('{"_class_name": "UNet2DModel"}')


def without_weights(folder):
    kl_autoencoder().save_pretrained(folder)
    os.unlink(folder / "diffusion_pytorch_model.safetensors")


def with_damaged_weights(folder):
    kl_autoencoder().save_pretrained(folder)
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")


def with_pickled_weights(folder):
    kl_autoencoder().save_pretrained(folder, safe_serialization=False)


@pytest.mark.parametrize(
    "spoil", [empty, of_another_class, without_weights, with_damaged_weights, with_pickled_weights]
)
def test_a_folder_that_holds_no_vae_is_refused_by_name(spoil, tmp_path):
    spoil(tmp_path)
    with pytest.raises(UsageError, match=f"vae.pretrained = {tmp_path} "):
        pretrained_vae(VAEConfig(pretrained=str(tmp_path)))


@pytest.mark.parametrize("levels", [(8, 8, 16), (8, 8, 8, 16, 16)])
def test_a_vae_that_does_not_shrink_by_eight_is_refused(levels, tmp_path):
    kl_autoencoder(levels=levels).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=rf"shrinks images by {2 ** (len(levels) - 1)}, this pipeline needs 8"):
        pretrained_vae(VAEConfig(pretrained=str(tmp_path)))
    with pytest.raises(UsageError, match="needs 8"):
        pretrained_vae(VAEConfig(pretrained="scratch", freeze_encoder=False, scratch_channels=levels))
