"""The path from a clean latent to noise, the two heads' estimates along it, solvers, the normalizer G; pure functions.

Convention: t in [0, 1] measures noise, t = 0 clean, t = 1 noise. `z` is a standardized clean latent (B, C, h, w),
`noise` is standard Gaussian of the same shape, `t` has shape (B,) or is a number. The one path of both heads is

    z_t = (1 - t) z + t noise                                 (flow matching: Lipman et al. 2023, eq. 22, sigma_min = 0)

and z_t / sqrt((1 - t)^2 + t^2) is the point of a variance-preserving diffusion (Ho et al. 2020, eq. 4) with
alphas_cumprod(t) = (1 - t)^2 / ((1 - t)^2 + t^2). A `predict` callable maps (z_t, t) to (noise_hat, velocity_hat).
Everything is differentiable, nothing draws its own noise.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from config import Solver

Predict = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# Where diffusion sampling starts: at t = 1 the noise head says nothing about z (alphas_cumprod = 0).
T_MAX_DIFFUSION = 0.98


def expand_like(t: Tensor | float, z: Tensor) -> Tensor:
    """t as (B, 1, 1, 1) in the dtype and on the device of z."""
    if not isinstance(t, Tensor):  # filled in where z is: a tensor made on the host would have to be waited for
        return torch.full((z.shape[0], *[1] * (z.ndim - 1)), t, dtype=z.dtype, device=z.device)
    return t.to(z).expand(z.shape[0]).reshape(-1, *[1] * (z.ndim - 1))


def interpolate(z: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """The point t of the way from z to noise."""
    t = expand_like(t, z)
    return (1 - t) * z + t * noise


def velocity_target(z: Tensor, noise: Tensor) -> Tensor:
    """d z_t / d t, the same all along the straight path (Lipman et al. 2023, eq. 23)."""
    return noise - z


def alphas_cumprod(t: Tensor) -> Tensor:
    """Share of signal variance at t, as diffusion schedules state it."""
    return (1 - t) ** 2 / ((1 - t) ** 2 + t**2)


def at_unit_variance(z_t: Tensor, t: Tensor | float) -> Tensor:
    """z_t as the network sees it: the variance-preserving point of the same t."""
    t = expand_like(t, z_t)
    return z_t / torch.sqrt((1 - t) ** 2 + t**2)


def two_heads(network: Callable[..., tuple[Tensor, Tensor]], *places: Tensor) -> Predict:
    """`predict` by a network that wants its input at unit variance; autocast is the caller's business.

    places: of tiles, where they lie, for a network that asks for it.
    """
    return lambda z_t, t: network(at_unit_variance(z_t, t), t, *places)


def clean_from_velocity(z_t: Tensor, velocity: Tensor, t: Tensor | float) -> Tensor:
    """The clean latent that the flow head implies: follow the velocity back to t = 0."""
    return z_t - expand_like(t, z_t) * velocity


def clean_from_noise(z_t: Tensor, noise_hat: Tensor, t: Tensor | float) -> Tensor:
    """The clean latent that the diffusion head implies; t < 1."""
    t = expand_like(t, z_t)
    return (z_t - t * noise_hat) / (1 - t)


def euler_step(predict: Predict, z_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """From t down to s along the velocity at t."""
    _, velocity = predict(z_t, t)
    return z_t + expand_like(s - t, z_t) * velocity


def heun_step(predict: Predict, z_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """From t down to s along the mean of the velocities at both ends (the explicit trapezoidal rule, second order)."""
    _, velocity = predict(z_t, t)
    proposal = z_t + expand_like(s - t, z_t) * velocity
    _, velocity_ahead = predict(proposal, s)
    return z_t + expand_like(s - t, z_t) * (velocity + velocity_ahead) / 2


def ddim_step(predict: Predict, z_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """From t down to s with the diffusion head (Song et al. 2021, eq. 12 with sigma = 0, written on this path)."""
    noise_hat, _ = predict(z_t, t)
    return interpolate(clean_from_noise(z_t, noise_hat, t), noise_hat, s)


# One step of the walk back, from t down to s, by the name a config gives it.
STEP: dict[Solver, Callable[[Predict, Tensor, Tensor, Tensor], Tensor]] = {
    "one_step": euler_step,
    "euler": euler_step,
    "heun": heun_step,
    "ddim": ddim_step,
}


def integrate(predict: Predict, z_t: Tensor, t_start: float, steps: int, solver: Solver) -> Tensor:
    """Walk z_t (B, C, h, w) from t_start to 0 in equal steps; one_step is a single Euler step whatever `steps` says.

    One step of ddim, and of euler, is the clean estimate of its head.
    """
    times = torch.linspace(t_start, 0.0, 2 if solver == "one_step" else steps + 1, device=z_t.device, dtype=z_t.dtype)
    for t, s in zip(times[:-1], times[1:], strict=True):
        z_t = STEP[solver](predict, z_t, t.expand(z_t.shape[0]), s.expand(z_t.shape[0]))
    return z_t


def normalizer(
    predict: Predict, z: Tensor, t_start: float, noise: Tensor, steps: int = 8, solver: Solver = "euler"
) -> Tensor:
    """G: push z out to t_start with the given noise, then walk back to the nearest normal latent. Shape of z."""
    return integrate(predict, interpolate(z, noise, t_start), t_start, steps, solver)


def sample(predict: Predict, noise: Tensor, steps: int, solver: Solver) -> Tensor:
    """New latents from pure noise (B, C, h, w); ddim starts at T_MAX_DIFFUSION, noise being within 2 % of the path."""
    return integrate(predict, noise, T_MAX_DIFFUSION if solver == "ddim" else 1.0, steps, solver)
