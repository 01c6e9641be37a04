"""Where strategies on images start: γ of nearby pixels, clustered by weighted k-means of their places."""

import torch
from torch import Tensor

from pnem.inference.starts import seeds
from pnem.models import SpatialMixture

__all__ = ["clustered_places"]

# Enough for the few objects of an image: from seeds far from one another k-means has mostly converged.
LLOYD = 5


def clustered_places(model: SpatialMixture, x: Tensor) -> Tensor:
    """γ (B, K, D) of one for the nearest of K centres and zero for the others, for images x (B, D, C).

    Where several are as near, they share the pixel.

    The centres are those of k-means on the pixels' rows and columns, from seeds far from one another (k-means++:
    Arthur & Vassilvitskii 2007). A pixel weighs as much as it differs from the pixel prior, over its channels; without
    a pixel prior, or in an image that does not differ from it at all, all weigh the same.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _clustered(model, x)


def _clustered(model: SpatialMixture, x: Tensor) -> Tensor:
    H, W, _ = model.decoder.image_shape
    rows, columns = torch.arange(H, dtype=x.dtype, device=x.device), torch.arange(W, dtype=x.dtype, device=x.device)
    places = torch.cartesian_prod(rows, columns)
    weight = x.new_ones(x.shape[:-1]) if model.pixel_prior is None else (x - model.pixel_prior).abs().sum(-1)
    weight = torch.where(weight.sum(-1, keepdim=True) > 0, weight, 1)
    centres = seeds(places.expand(len(x), -1, -1), weight, model.num_components, far=True)
    for _ in range(LLOYD):
        members = weight.unsqueeze(-2) * _nearest(places, centres)
        total = members.sum(-1, keepdim=True)
        # A centre that no pixel with weight is near to stays.
        centres = torch.where(total > 0, members @ places / total.clamp_min(torch.finfo(x.dtype).tiny), centres)
    return _nearest(places, centres)


def _nearest(places: Tensor, centres: Tensor) -> Tensor:
    """γ (B, K, D) of one for the centre (B, K, 2) nearest to a place (D, 2), shared where several are as near."""
    distance = centres.square().sum(-1, keepdim=True) - centres @ (2 * places.T)  # less |p|²
    owner = (distance == distance.amin(-2, keepdim=True)).to(places.dtype)
    return owner / owner.sum(-2, keepdim=True)
