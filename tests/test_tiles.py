"""Tiles of a latent: they cover it, say where they lie, and are put together to what was cut."""

from types import SimpleNamespace

import pytest
import torch
from pipeline import sources

from config import Config, UNetConfig
from files import load_checkpoint
from flowdiff_batch import draw, tiles_of
from flowdiff_model import FlowDiffUNet
from normalizer import Normalizer
from tiles import corners, cut, fits, places_of, random_corners, stitched

SMALL = UNetConfig(
    channels=(16, 32), layers_per_block=1, attention=(False, True), norm_groups=8, attention_head_dim=8, tile=8
)
SIZES = [((64, 64), 32), ((8, 16), 8), ((20, 33), 8), ((8, 40), 16), ((9, 9), 8)]


@pytest.mark.parametrize(("size", "side"), SIZES)
def test_tiles_cover_the_latent_and_neighbours_share_half(size, side):
    seen = torch.zeros(size)
    for row, column in corners(size, side):
        assert 0 <= row <= max(0, size[0] - side) and 0 <= column <= max(0, size[1] - side)
        seen[row : row + side, column : column + side] += 1
    assert seen.min() >= 1
    for starts in zip(*corners(size, side), strict=True):
        steps = torch.tensor(sorted(set(starts))).diff()
        assert not len(steps) or steps.max() <= side / 2


@pytest.mark.parametrize(("size", "side"), SIZES)
def test_tiles_of_a_map_are_stitched_to_that_map(size, side):
    maps, at = torch.randn(2, 3, *size), corners(size, side)
    tiles = [cut(maps, [corner] * 2, side) for corner in at]
    torch.testing.assert_close(stitched(tiles, at, size), maps)


def test_between_two_tiles_the_one_whose_middle_is_nearer_counts_more():
    tiles = [torch.full((1, 1, 4, 8), value) for value in (0.0, 1.0)]
    row = stitched(tiles, [(0, 0), (0, 4)], (4, 12))[0, 0, 0]
    assert row[:4].eq(0).all() and row[8:].eq(1).all() and row.diff().ge(0).all() and 0 < row[4] < 0.5 < row[7] < 1


@pytest.mark.parametrize(("size", "side"), SIZES)
def test_tiles_to_learn_on_lie_at_a_border_about_as_often_as_those_that_are_read(size, side):
    drawn = random_corners(6000, size, side, torch.Generator().manual_seed(0))
    read = corners(size, side)
    for axis, last in enumerate(max(0, length - side) for length in size):
        for end in (0, last):
            learnt, seen = (sum(at[axis] == end for at in some) / len(some) for some in (drawn, read))
            assert 0.5 * seen < learnt <= 1.5 * seen
        assert {at[axis] for at in drawn} == set(range(last + 1))


def test_a_tile_is_cut_with_its_position_in_the_whole():
    z, random = torch.randn(6, 4, 20, 30), torch.Generator().manual_seed(0)
    tile, (places,) = tiles_of(z, 8, random)
    at = random_corners(6, (20, 30), 8, torch.Generator().manual_seed(0))
    whole = places_of((20, 30), z.device)
    assert tile.shape == (6, 4, 8, 8) and places.shape == (6, 2, 8, 8) and len(set(at)) > 1
    for number, (row, column) in enumerate(at):
        assert tile[number].equal(z[number, :, row : row + 8, column : column + 8])
        assert places[number, 0, 0, 0] == whole[0, row, 0] and places[number, 1, -1, -1] == whole[1, 0, column + 7]


@pytest.mark.parametrize("side", [0, 8, 16])
def test_a_latent_that_is_one_tile_stays_as_it_is(side):
    z = torch.randn(2, 4, 8, 8)
    assert fits((8, 8), side) and tiles_of(z, side, torch.Generator()) == (z, ())


def test_processes_share_the_tiles_that_one_would_draw():
    config = Config(unet=SMALL)
    z = torch.randn(4, 4, 16, 16)

    def batch(part, rank, ranks):
        process = SimpleNamespace(process_index=rank, num_processes=ranks, device=torch.device("cpu"))
        return draw(part, 3, config, process)

    one, two = batch(z, 0, 1), [batch(z[:2], 0, 2), batch(z[2:], 1, 2)]
    for name in ("z", "noise", "t", "seen", "walk"):
        assert getattr(one, name).equal(torch.cat([getattr(part, name) for part in two]))
    for name in ("places", "seen_places"):
        assert getattr(one, name)[0].equal(torch.cat([getattr(part, name)[0] for part in two]))
    assert one.z.shape[-2:] == one.places[0].shape[-2:] == (8, 8)


def network():
    torch.manual_seed(0)
    made = FlowDiffUNet(SMALL, 4).eval()
    for head in (made.noise_head, made.velocity_head):
        torch.nn.init.normal_(head[-1].weight)
    return made


@torch.no_grad()
def test_a_larger_latent_is_read_by_tiles_each_with_its_position():
    made, z, t = network(), torch.randn(2, 4, 8, 16), torch.tensor([0.2, 0.7])
    read = made.heads_and_features(z, t)
    places = places_of((8, 16), "cpu").expand(2, -1, -1, -1)
    left = made.heads_and_features(z[..., :8], t, places[..., :8])
    right = made.heads_and_features(z[..., 8:], t, places[..., 8:])
    for whole, first, last in zip(read, left, right, strict=True):
        assert whole.shape[-2:] == (8, 16)  # tiles begin at columns 0, 4 and 8: the outer four see one of them
        torch.testing.assert_close(whole[..., :4], first[..., :4])
        torch.testing.assert_close(whole[..., 12:], last[..., 4:])
        assert not torch.allclose(whole[..., 4:8], first[..., 4:8])


@torch.no_grad()
def test_of_the_whole_as_one_tile_nothing_changes():
    made, z, t = network(), torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7])
    by_itself = made(z, t)
    given = made(z, t, places_of((8, 8), "cpu").expand(2, -1, -1, -1))
    assert all(one.equal(other) for one, other in zip(by_itself, given, strict=True))


def test_a_normalizer_trained_on_tiles_reads_whole_radiographs(call, made, tmp_path):
    few = ["--flowdiff.validate-every", 8, "--flowdiff.sample-every", 8]
    result = call("train_flowdiff", *sources("train_flowdiff", made), "--unet.tile", 8, *few)
    assert result.code == 0 and (tmp_path / "phase3_flowdiff" / "samples_000008.png").is_file()
    flow = tmp_path / "phase3_flowdiff" / "checkpoint_best.pt"
    assert load_checkpoint(flow, "flowdiff", "")["config"]["unet"]["tile"] == 8
    G = Normalizer.load(made.phase1 / "checkpoint_best.pt", flow)
    size = (G.artefact["preprocessing"][side] for side in ("height", "width"))
    x = torch.rand(1, 1, *size) * 2 - 1
    assert G.network.tile == 8 and G(x).shape == x.shape and max(G.encode(x).shape[-2:]) > 8
    again = call("train_flowdiff", *sources("train_flowdiff", made), *few)
    assert again.code == 2 and "unet.tile was 8, now" in again.error
