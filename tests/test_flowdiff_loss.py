"""The losses and the curriculum of phase 3."""

import dataclasses

import pytest
import torch

from config import FlowDiffTrainingConfig, UNetConfig
from flowdiff_loss import (
    generative_loss,
    identity_loss,
    identity_places,
    lambda_identity,
    loss_by_time,
    stratified_times,
)
from flowdiff_model import FlowDiffUNet
from flowdiff_process import velocity_target
from run_log import Meter

CONFIG = FlowDiffTrainingConfig(
    lambda_diff=2.0, lambda_flow=3.0, phase1_steps=10, total_steps=100, identity_warmup_start=20, identity_warmup_end=40
)


def batch():
    random = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 4, 8, 8, dtype=torch.float64, generator=random), torch.rand(3, dtype=torch.float64)


def test_perfect_heads_cost_nothing():
    (z, noise), t = batch()
    assert float(generative_loss(lambda z_t, t: (noise, velocity_target(z, noise)), z, noise, t, CONFIG).total) == 0


def test_heads_that_say_zero_cost_the_mean_squares_of_their_targets():
    (z, noise), t = batch()
    loss = generative_loss(lambda z_t, t: (torch.zeros_like(z), torch.zeros_like(z)), z, noise, t, CONFIG)
    expected = 2.0 * noise.square().mean() + 3.0 * (noise - z).square().mean()
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(loss.terms["weighted_diff"] + loss.terms["weighted_flow"], expected)
    torch.testing.assert_close(loss.terms["loss_diff"], noise.square().mean())
    torch.testing.assert_close(loss.terms["loss_flow"], (noise - z).square().mean())


def test_identity_loss_in_latents_and_on_decoded_images():
    (z, _), _ = batch()
    assert float(identity_loss(lambda z: z + 0.25, z, None)) == pytest.approx(0.25)
    assert float(identity_loss(lambda z: z + 0.25, z, lambda z: 4 * z)) == pytest.approx(1.0)


def test_identity_loss_trains_g_but_not_the_reference():
    shift = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (z, _), _ = batch()
    identity_loss(lambda z: z + shift + 0.5, z, lambda z: 2 * z).backward()
    assert float(shift.grad) == pytest.approx(2.0)


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (20, 0.0), (30, 0.5), (35, 0.75), (40, 1.0), (99, 1.0)])
def test_curriculum_rises_linearly_between_its_two_steps(step, share):
    assert lambda_identity(step, CONFIG) == pytest.approx(share * CONFIG.lambda_id_global)


def test_curriculum_without_warmup_switches_on():
    sudden = dataclasses.replace(CONFIG, identity_warmup_end=20)
    assert (lambda_identity(19, sudden), lambda_identity(20, sudden)) == (0.0, CONFIG.lambda_id_global)


def test_times_are_stratified():
    t = stratified_times(50, torch.Generator().manual_seed(3))
    assert torch.equal((t.sort().values * 50).floor() - (t.min() * 50).floor(), torch.arange(50.0))


@pytest.mark.parametrize(("batch_size", "share", "places"), [(8, 0.25, [0, 4]), (6, 0.5, [0, 2, 4]), (3, 0.01, [0])])
def test_the_identity_loss_sees_its_share_spread_over_the_batch(batch_size, share, places):
    assert identity_places(batch_size, share) == places


@pytest.mark.parametrize("share", [0.1, 0.25, 0.6, 1.0])
def test_every_process_sees_about_as_many(share):
    places = identity_places(4 * 7, share)
    seen = [sum(place // 7 == rank for place in places) for rank in range(4)]
    assert max(seen) - min(seen) <= 1 and len(set(places)) == len(places)


def test_loss_by_time_keeps_every_sample_in_one_bin_and_leaves_empty_ones_out():
    meter = Meter()
    meter.add(loss_by_time(torch.tensor([0.0, 0.1, 0.5, 0.99, 1.0]), torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0]), "flow"))
    assert meter.flush() == {"flow_t0.0-0.2": 2.0, "flow_t0.4-0.6": 5.0, "flow_t0.8-1.0": 8.0}


SMALL = UNetConfig(channels=(16, 32), layers_per_block=1, attention=(False, True), norm_groups=8, attention_head_dim=8)


@pytest.mark.parametrize("size", [(4, 8, 8), (4, 8, 16), (16, 6, 10)])
def test_heads_start_at_zero_on_squares_and_rectangles_of_any_depth(size):
    noise_hat, velocity_hat = FlowDiffUNet(SMALL, size[0])(torch.randn(2, *size), torch.tensor([0.1, 0.9]))
    assert noise_hat.shape == velocity_hat.shape == (2, *size)
    assert not noise_hat.any() and not velocity_hat.any()


def test_heads_are_two_and_every_weight_learns():
    torch.manual_seed(0)
    network = FlowDiffUNet(SMALL, 4)
    for head in (network.noise_head, network.velocity_head):
        torch.nn.init.normal_(head[-1].weight)
    noise_hat, velocity_hat = network(torch.randn(2, 4, 8, 8), torch.tensor([0.1, 0.9]))
    assert not torch.allclose(noise_hat, velocity_hat)
    (noise_hat.square().mean() + velocity_hat.square().mean()).backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in network.parameters())


def test_network_depends_on_time_and_on_place():
    torch.manual_seed(0)
    network = FlowDiffUNet(SMALL, 4).eval()
    torch.nn.init.normal_(network.noise_head[-1].weight)
    constant = torch.zeros(1, 4, 8, 8)
    early, late = (network(constant, torch.tensor([t]))[0] for t in (0.1, 0.9))
    assert not torch.allclose(early, late)
    assert float(early[0, 0, 2:6, 2:6].detach().std()) > 0


def test_network_reloads_to_the_same_answer():
    torch.manual_seed(0)
    first, second = FlowDiffUNet(SMALL, 4).eval(), FlowDiffUNet(SMALL, 4).eval()
    torch.nn.init.normal_(first.velocity_head[-1].weight)
    second.load_state_dict(first.state_dict())
    z, t = torch.randn(1, 4, 8, 8), torch.tensor([0.3])
    assert torch.equal(first(z, t)[1], second(z, t)[1])
