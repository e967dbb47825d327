"""The path, the conversions, the solvers and G, in float64 against autograd, closed forms and diffusers' schedulers."""

from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from config import Solver
from flowdiff_process import (
    STEP,
    alphas_cumprod,
    at_unit_variance,
    clean_from_noise,
    clean_from_velocity,
    integrate,
    interpolate,
    normalizer,
    sample,
    two_heads,
    velocity_target,
)

SHAPE = (4, 4, 8, 8)


@pytest.fixture
def z_and_noise():
    return torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def exact_heads(z, noise):
    """Heads of a network that knows the one clean latent and its noise."""
    return lambda z_t, t: (noise, velocity_target(z, noise))


def gaussian_heads(variance):
    """The best possible heads when data are N(0, variance): the conditional means, in closed form."""

    def predict(z_t, t):
        t = t.reshape(-1, 1, 1, 1)
        total = (1 - t) ** 2 * variance + t**2
        noise_hat = t / total * z_t
        return noise_hat, noise_hat - (1 - t) * variance / total * z_t

    return predict


def test_every_solver_of_the_config_has_its_step():
    assert set(STEP) == set(get_args(Solver))


def test_two_heads_see_the_point_at_unit_variance_and_its_time(z_and_noise):
    z, noise = z_and_noise
    z_t, t = interpolate(z, noise, 0.4), torch.full((4,), 0.4, dtype=torch.float64)
    seen_z, seen_t = two_heads(lambda z, t: (z, t))(z_t, t)
    torch.testing.assert_close(seen_z * np.sqrt(0.6**2 + 0.4**2), z_t)
    assert torch.equal(seen_t, t)


def test_velocity_is_the_derivative_of_the_path(z_and_noise):
    z, noise = z_and_noise
    t = torch.rand(4, dtype=torch.float64)
    _, derivative = torch.autograd.functional.jvp(lambda s: interpolate(z, noise, s), t, torch.ones_like(t))
    torch.testing.assert_close(derivative, velocity_target(z, noise))


def test_path_starts_clean_and_ends_in_noise(z_and_noise):
    z, noise = z_and_noise
    torch.testing.assert_close(interpolate(z, noise, 0.0), z)
    torch.testing.assert_close(interpolate(z, noise, 1.0), noise)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.4, 0.9])
def test_both_heads_imply_the_same_clean_latent(z_and_noise, t):
    z, noise = z_and_noise
    z_t = interpolate(z, noise, t)
    torch.testing.assert_close(clean_from_velocity(z_t, noise - z, t), z)
    torch.testing.assert_close(clean_from_noise(z_t, noise, t), z)


def test_unit_variance_point_is_the_diffusion_of_diffusers(z_and_noise):
    z, noise = z_and_noise
    alphas = alphas_cumprod(torch.linspace(0.001, 0.98, 50, dtype=torch.float64))
    betas = 1 - alphas / torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    scheduler = DDIMScheduler(num_train_timesteps=50, trained_betas=betas.numpy().astype(np.float64))
    for timestep in (3, 20, 45):
        t = torch.linspace(0.001, 0.98, 50, dtype=torch.float64)[timestep]
        expected = scheduler.add_noise(z, noise, torch.tensor([timestep]))
        torch.testing.assert_close(at_unit_variance(interpolate(z, noise, t), t), expected, atol=1e-6, rtol=1e-6)


def test_ddim_walk_is_that_of_diffusers(z_and_noise):
    z, noise = z_and_noise
    predict = gaussian_heads(0.5)
    times = torch.linspace(0.0, 0.8, 9, dtype=torch.float64)
    alphas = alphas_cumprod(times[1:])
    betas = 1 - alphas / torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    scheduler = DDIMScheduler(
        num_train_timesteps=8, trained_betas=betas.numpy(), clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(8)
    point = at_unit_variance(interpolate(z, noise, 0.8), 0.8)
    for timestep in scheduler.timesteps:
        t = times[timestep + 1]
        z_t = point * torch.sqrt((1 - t) ** 2 + t**2)
        point = scheduler.step(predict(z_t, t.expand(4))[0], int(timestep), point, eta=0.0).prev_sample
    ours = integrate(predict, interpolate(z, noise, 0.8), 0.8, steps=8, solver="ddim")
    torch.testing.assert_close(ours, point, atol=1e-5, rtol=1e-5)


def test_euler_walk_is_that_of_diffusers(z_and_noise):
    _, noise = z_and_noise
    predict = gaussian_heads(0.3)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.1, 10))
    z_t = noise.float()
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        z_t = scheduler.step(predict(z_t, sigma.expand(4))[1], timestep, z_t).prev_sample
    torch.testing.assert_close(
        integrate(predict, noise.float(), 1.0, steps=10, solver="euler"), z_t, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("solver", ["one_step", "euler", "heun", "ddim"])
def test_normalizer_returns_z_when_the_heads_know_it(z_and_noise, solver):
    z, noise = z_and_noise
    torch.testing.assert_close(normalizer(exact_heads(z, noise), z, 0.4, noise, steps=5, solver=solver), z)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("ddim", 1)])
def test_solvers_converge_at_their_order(z_and_noise, solver, order):
    _, noise = z_and_noise
    variance, start = 0.25, 0.9
    exact = (
        noise * np.sqrt(variance) / np.sqrt((1 - start) ** 2 * variance + start**2)
    )  # the flow of a Gaussian scales it
    errors = [
        float((integrate(gaussian_heads(variance), noise, start, n, solver) - exact).abs().max()) for n in (32, 64)
    ]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


@pytest.mark.parametrize("solver", ["euler", "heun", "ddim"])
def test_samples_from_noise_have_the_variance_of_the_data(solver):
    noise = torch.randn(64, 4, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert float(sample(gaussian_heads(0.25), noise, 100, solver).var()) == pytest.approx(0.25, rel=0.05)


def test_normalizer_is_differentiable_to_the_input(z_and_noise):
    z, noise = (part[:1, :1, :3, :3].clone() for part in z_and_noise)
    heads = gaussian_heads(0.5)
    assert torch.autograd.gradcheck(lambda z: normalizer(heads, z, 0.4, noise, 3, "heun"), z.requires_grad_())


def test_normalizer_pulls_a_latent_outside_the_data_towards_them(z_and_noise):
    _, noise = z_and_noise
    far = torch.full(SHAPE, 5.0, dtype=torch.float64)
    mean = normalizer(gaussian_heads(0.25), far, 0.4, noise, 8, "euler").mean()
    assert mean < 4.0
