"""Strategies on images that start from clusters of nearby pixels."""

import pytest
import torch
from cases import MODELS, images
from sklearn.cluster import KMeans

from pnem.inference import RNNEM, BitFlip
from pnem.inference.errors import StrategyError
from pnem.inference.places import clustered_places
from pnem.models import Bernoulli, Normal, SpatialMixture, decoders

SHAPE = 12, 14, 1
CORNERS = [(slice(0, 3), slice(0, 3)), (slice(9, 12), slice(1, 3)), (slice(4, 7), slice(10, 14))]


def mixture(K=3, likelihood=None, pixel_prior=0.0, shape=SHAPE):
    return SpatialMixture(decoders.Linear(5, shape), likelihood or Bernoulli(), K, pixel_prior=pixel_prior)


def blobs(count, background=0.0, blob=1.0):
    """As many copies of an image (D, 1) of three rectangles far from one another, and which of them a pixel is of."""
    image, labels = torch.full(SHAPE, background), torch.full(SHAPE[:2], -1)
    for k, corner in enumerate(CORNERS):
        image[corner], labels[corner] = blob, k
    return image.reshape(1, -1, 1).repeat(count, 1, 1), labels.flatten()


@pytest.mark.parametrize(
    ("model", "background", "blob"),
    [(mixture(), 0.0, 1.0), (mixture(likelihood=Normal(0.3), pixel_prior=-2.0), -2.0, -5.0)],
)
def test_objects_far_from_one_another_are_clusters_from_nearly_all_seeds(model, background, blob):
    x, labels = blobs(200, background, blob)
    owner = clustered_places(model, x).argmax(1)
    first = torch.stack([owner[:, labels == k][:, 0] for k in range(3)], 1)
    apart = (first.sort(1).values == torch.arange(3)).all(1)
    for k in range(3):
        apart &= (owner[:, labels == k] == first[:, k, None]).all(1)
    assert apart.float().mean() > 0.9
    assert len(first[apart].unique(dim=0)) == 6, "components are exchangeable"


@pytest.mark.usefixtures("float64")
def test_clusters_of_grey_images_are_as_tight_as_scikit_learns_from_the_same_seeds():
    x = torch.rand(20, 168, 1) ** 4
    places = torch.cartesian_prod(torch.arange(12.0), torch.arange(14.0))
    for weight, gamma in zip(x.squeeze(-1), clustered_places(mixture(), x), strict=True):
        members = gamma * weight
        centres = members @ places / members.sum(1, keepdim=True)
        inertia = (members * (places - centres.unsqueeze(1)).square().sum(-1)).sum()
        settled = KMeans(3, init=centres.numpy(), n_init=1).fit(places.numpy(), sample_weight=weight.numpy())
        assert inertia.item() <= 1.1 * settled.inertia_


@pytest.mark.parametrize("K", [1, 3, 20])
@pytest.mark.parametrize("shape", [(3, 4, 1), (1, 1, 1), (2, 3, 3)])
def test_gamma_are_responsibilities_at_the_edges(K, shape):
    model = mixture(K, shape=shape)
    for x in (images(4, shape), torch.zeros(4, shape[0] * shape[1], shape[2])):
        gamma = clustered_places(model, x)
        torch.testing.assert_close(gamma.sum(1), torch.ones(4, shape[0] * shape[1]))
        assert bool((gamma >= 0).all())


def test_without_a_pixel_prior_all_pixels_weigh_the_same():
    gamma = []
    for x in (blobs(3)[0], images(3, SHAPE)):
        torch.manual_seed(0)
        gamma.append(clustered_places(mixture(pixel_prior=None), x))
    assert torch.equal(*gamma)


def test_a_strategy_starts_from_clusters_of_the_first_frame_without_noise():
    strategy = RNNEM(mixture(2), initial="k-means", noise=BitFlip(1.0), task="denoising", iterations=2)
    x = torch.stack([blobs(2)[0], images(2, SHAPE)])
    torch.manual_seed(0)
    state, x_in = strategy.start(x)
    assert torch.equal(x_in, 1 - x)
    torch.manual_seed(0)
    torch.rand_like(x)  # which pixels the noise hits
    assert torch.equal(state.gamma, clustered_places(strategy.model, x[0]))


def test_half_precision_of_the_networks_does_not_move_the_clusters():
    x = images(20, SHAPE)
    gamma = []
    for precision in (torch.bfloat16, None):
        torch.manual_seed(0)
        with torch.autocast("cpu", precision, enabled=precision is not None):
            gamma.append(clustered_places(mixture(), x))
    assert torch.equal(*gamma)


def test_restarts_draw_seeds_of_their_own_and_a_given_gamma_comes_first():
    strategy, x = RNNEM(mixture(), initial="k-means"), blobs(1)[0]
    assert len(strategy.init(x.repeat(30, 1, 1)).gamma.unique(dim=0)) > 1
    given = torch.rand(1, 3, 168).softmax(1)
    assert torch.equal(strategy.init(x, given).gamma, given)


def test_an_unknown_start_is_refused():
    with pytest.raises(StrategyError, match="initial must be one of random, k-means, but is 'nearest'"):
        RNNEM(MODELS["owned Bernoulli"](), initial="nearest")
