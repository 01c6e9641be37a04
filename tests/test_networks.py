import pytest
import torch
from torch.nn import functional as F

from pnem.errors import ModelError, StrategyError
from pnem.inference import RNNEM, encoders
from pnem.models import Bernoulli, SpatialMixture, decoders
from pnem.models.config import build, describe
from pnem.models.decoders import upsample_convolve

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
    "conv, input norm": lambda shape: encoders.Convolutional(shape, channels=(3, 4), hidden=(7,), input_norm=True),
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


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_decoders_pull_a_gradient_back_to_theta(name, batch, float64):
    """It is what autograd finds, and so are its own gradients: by θ, by the gradient itself and by the weights."""
    decoder = DECODERS[name]((4, 8, 2))
    theta = torch.randn(*batch, 6, requires_grad=True)
    by_psi = torch.randn(*batch, 32, 2, requires_grad=True)
    (expected,) = torch.autograd.grad(decoder(theta), theta, by_psi, create_graph=True)
    found = decoder.pull_back(theta, by_psi)
    torch.testing.assert_close(found, expected)
    weights = [p for p in decoder.parameters() if p.dim() > 1]
    of_found, of_expected = (
        torch.autograd.grad(y.sin().sum(), [theta, by_psi, *weights], materialize_grads=True) for y in (found, expected)
    )
    assert of_found[1].abs().sum() > 0
    torch.testing.assert_close(of_found, of_expected)


def test_a_decoder_made_of_a_linear_one_pulls_back_through_its_own_network(float64):
    class Tripled(decoders.Linear):
        def forward(self, theta):
            return 3 * super().forward(theta)

    decoder, theta, by_psi = Tripled(6, (4, 8, 1)), torch.randn(2, 6), torch.randn(2, 32, 1)
    expected = torch.func.vjp(decoder, theta)[1](by_psi)[0]
    torch.testing.assert_close(decoder.pull_back(theta, by_psi), expected)


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_pull_back_in_bfloat16(name):
    decoder = DECODERS[name]((4, 8, 1)).requires_grad_(False)
    theta, by_psi = torch.randn(3, 6), torch.randn(3, 32, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = decoder.pull_back(theta, by_psi)
    assert found.dtype == torch.float32
    expected = decoder.pull_back(theta, by_psi)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


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


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5, 8])
@pytest.mark.usefixtures("float64")
def test_upsampling_and_convolution_in_one_is_one_after_the_other(kernel):
    """Values and gradients, against the nearest neighbour, zeros around it, and a plain convolution."""
    y = torch.randn(2, 3, 4, 5, requires_grad=True)
    weight, bias = torch.randn(6, 3, kernel, kernel, requires_grad=True), torch.randn(6, requires_grad=True)
    enlarged = F.pad(F.interpolate(y, scale_factor=2.0), ((kernel - 1) // 2, kernel // 2) * 2)
    expected, found = F.conv2d(enlarged, weight, bias), upsample_convolve(y, weight, bias)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    out = torch.randn_like(expected)
    for ours, theirs in zip(*(torch.autograd.grad(z, (y, weight, bias), out) for z in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-11)


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


# Channels of encoder and decoder, the coarsest grid, M, and the images' side.
ORIGINAL = {
    "flying shapes": ((32, 64), (64, 32), 7, 100, 28),
    "flying MNIST": ((32, 64, 128), (128, 64, 32), 3, 250, 24),
    "bouncing balls": ((16, 32, 64), (64, 32, 16), 8, 250, 64),
}


def full(width_in: int, width_out: int) -> int:
    """The parameters of a fully connected layer and of its layer norm."""
    return (width_in + 1) * width_out + 2 * width_out


def convolution(width_in: int, width_out: int) -> int:
    """Those of a 4×4 convolution and of its layer norm."""
    return (16 * width_in + 1) * width_out + 2 * width_out


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", ORIGINAL)
def test_the_original_networks_have_the_parameters_of_their_layers(name):
    down, up, grid, M, H = ORIGINAL[name]
    encoder = encoders.Convolutional((H, H, 1), channels=down, input_norm=name == "flying MNIST")
    decoder = decoders.Convolutional(M, (H, H, 1), channels=up)
    flat = grid * grid * down[-1]
    assert decoder.grid == (down[-1], grid, grid)
    assert size(encoder) == sum(map(convolution, (1, *down), down)) + full(flat, 512)
    pixels = 16 * up[-1] + 1
    assert size(decoder) == full(M, 512) + full(512, flat) + sum(map(convolution, up, up[1:])) + pixels
    cell = RNNEM(SpatialMixture(decoder, Bernoulli(), 3), encoder=encoder, layer_norm=True).cell
    assert size(cell) == full(512 + M, M)


def randomised(network):
    """With gains, offsets and biases that are not 1 or 0."""
    for parameter in network.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter)
    return network


def normalised(y):
    """To mean 0 and variance 1, sample by sample."""
    flat = y.flatten(1)
    spread = (flat.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    return ((flat - flat.mean(1, keepdim=True)) / spread).reshape(y.shape)


def weighted(parameters, apply):
    """A layer by its weight and bias, then normalised with a gain and an offset per channel."""
    weight, bias, gain, offset = (next(parameters) for _ in range(4))
    y = normalised(apply(weight, bias))
    to_channels = (-1, *(1,) * (y.dim() - 2))
    return gain.reshape(to_channels) * y + offset.reshape(to_channels)


def test_the_original_flying_mnist_encoder_layer_by_layer():
    """An even image and a 4×4 kernel with stride 2: one pixel of zeros on each side halves it."""
    encoder = randomised(encoders.Convolutional((24, 24, 1), channels=(32, 64, 128), input_norm=True))
    x, parameters = 3 + 5 * torch.randn(2, 576, 1), encoder.parameters()
    y = normalised(x).reshape(2, 1, 24, 24)
    for side in (12, 6, 3):
        y = F.elu(weighted(parameters, lambda w, b, y=y: F.conv2d(y, w, b, stride=2, padding=1)))
        assert y.shape[2:] == (side, side)
    y = F.elu(weighted(parameters, lambda w, b, y=y: y.flatten(1) @ w.T + b))
    torch.testing.assert_close(encoder(x), y, rtol=1e-4, atol=1e-4)


def test_the_original_flying_mnist_decoder_layer_by_layer():
    """A 4×4 kernel keeps the size with one pixel of zeros before and two after."""
    decoder = randomised(decoders.Convolutional(250, (24, 24, 1), channels=(128, 64, 32)))
    y, parameters = torch.randn(2, 250), decoder.parameters()
    psi = decoder(y)
    for _ in range(2):
        y = F.relu(weighted(parameters, lambda w, b, y=y: y @ w.T + b))
    y = y.reshape(2, 128, 3, 3)

    def upsampled(y):
        return F.pad(y.repeat_interleave(2, 2).repeat_interleave(2, 3), (1, 2, 1, 2))

    for _ in range(2):
        y = F.relu(weighted(parameters, lambda w, b, y=y: F.conv2d(upsampled(y), w, b)))
    y = F.conv2d(upsampled(y), *parameters)
    torch.testing.assert_close(psi, y.reshape(2, 576, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("float64")
def test_a_normalised_input_is_the_same_at_every_level_and_scale_and_image_by_image():
    plain, normal = (encoders.Convolutional((8, 8, 2), channels=(3,), hidden=(5,), input_norm=n) for n in (False, True))
    normal.load_state_dict(plain.state_dict())
    x = 100 * torch.randn(4, 64, 2)
    moved = x * torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1) + torch.arange(4.0).reshape(4, 1, 1)
    torch.testing.assert_close(normal(moved), normal(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(normal(x), plain(normalised(x)))
    assert not torch.allclose(plain(moved), plain(x))
    assert torch.equal(normal(torch.full((1, 64, 2), 3.0)), plain(torch.zeros(1, 64, 2)))


def test_an_input_norm_is_part_of_an_encoders_description():
    encoder = encoders.Convolutional((8, 8, 1), input_norm=True)
    assert build(describe(encoder)).input_norm
    before = {name: value for name, value in describe(encoder).items() if name != "input_norm"}
    assert not build(before).input_norm


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
