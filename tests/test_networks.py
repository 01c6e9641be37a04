import pytest
import torch
from torch.nn import functional as F

from pnem.errors import ModelError, StrategyError
from pnem.inference import encoders
from pnem.models import decoders

DECODERS = {
    "linear": lambda shape: decoders.Linear(6, shape),
    "tied": lambda shape: decoders.Linear(6, shape, bias=False, input_activation="sigmoid"),
    "mlp": lambda shape: decoders.MLP(6, shape, hidden=(8, 9), layer_norm=True),
    "conv": lambda shape: decoders.Convolutional(6, shape, hidden=(8,), channels=(5, 4)),
}
ENCODERS = {
    "identity": lambda shape: encoders.Identity(shape),
    "mlp": lambda shape: encoders.MLP(shape, hidden=(8, 9), layer_norm=True),
    "conv": lambda shape: encoders.Convolutional(shape, channels=(3, 4), hidden=(7,)),
}


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("shape", [(4, 8, 1), (28, 28, 3)])
@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
def test_decoders_map_theta_to_every_pixel(name, shape, batch):
    decoder = DECODERS[name](shape)
    theta = torch.randn(*batch, 6)
    psi = decoder(theta)
    assert psi.shape == (*batch, shape[0] * shape[1], shape[2])
    psi.sum().backward()
    assert all(p.grad is not None for p in decoder.parameters())


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("shape", [(4, 8, 1), (28, 28, 3)])
@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
def test_encoders_map_images_to_features(name, shape, batch):
    encoder = ENCODERS[name](shape)
    features = encoder(torch.randn(*batch, shape[0] * shape[1], shape[2]))
    assert features.shape == (*batch, encoder.out_features)


def test_the_convolutional_decoder_keeps_pixels_in_row_major_order():
    """A convolution of ones of kernel 1 after upsampling repeats each coarse value in a 2×2 block."""
    decoder = decoders.Convolutional(
        2, (4, 6, 1), hidden=(), channels=(1,), kernel_size=1, activation="identity", layer_norm=False
    )
    with torch.no_grad():
        decoder.blocks[0].convolution.weight.fill_(1)
        decoder.blocks[0].convolution.bias.zero_()
    theta = torch.randn(3, 2)
    coarse = decoder.hidden(theta).reshape(3, 1, 2, 3)
    expected = F.interpolate(coarse, scale_factor=2).reshape(3, 24, 1)
    torch.testing.assert_close(decoder(theta), expected)


def test_the_convolutional_networks_see_the_image_the_right_way_round():
    encoder = encoders.Convolutional(
        (4, 4, 2), channels=(1,), hidden=(), kernel_size=2, activation="identity", layer_norm=False
    )
    x = torch.randn(1, 4, 4, 2)
    convolution = encoder.convolutions[0][1]
    expected = F.conv2d(x.permute(0, 3, 1, 2), convolution.weight, convolution.bias, stride=2).flatten(1)
    torch.testing.assert_close(encoder(x.reshape(1, 16, 2)), expected)


def test_layer_norm_of_images_is_over_channels_and_pixels():
    block = decoders.Convolutional(2, (4, 4, 1), channels=(2, 3)).blocks[0]
    y = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(block.norm(y), F.layer_norm(y, (3, 4, 4)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(30, 28, 1), (28, 27, 1)])
def test_a_size_that_the_convolutional_decoder_cannot_serve_is_refused(shape):
    with pytest.raises(ModelError, match="multiples of 4"):
        decoders.Convolutional(5, shape)


def test_an_image_too_small_for_the_convolutional_encoder_is_refused():
    with pytest.raises(StrategyError, match="at least 4 pixels"):
        encoders.Convolutional((3, 9, 1))


@pytest.mark.parametrize(("features", "shape"), [(0, (2, 2, 1)), (3, (2, 0, 1)), (3, (2, 2))])
def test_sizes_that_are_none_are_refused(features, shape):
    with pytest.raises(ModelError, match="image shape"):
        decoders.Linear(features, shape)


def test_an_unknown_activation_is_refused_with_those_there_are():
    with pytest.raises(ModelError, match="elu, identity, relu"):
        decoders.MLP(2, (2, 2, 1), activation="softmaxx")
