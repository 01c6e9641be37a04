"""R-NEM: the interactions of its components, and what they make of RNN-EM."""

import pytest
import torch
from cases import MODELS, images
from torch.nn import functional as F

from pnem.errors import StrategyError
from pnem.inference import RNEM, RNNEM, encoders
from pnem.inference.interactions import Interactions
from pnem.models import Bernoulli, SpatialMixture, decoders

pytestmark = pytest.mark.usefixtures("float64")
every_option = pytest.mark.parametrize(
    ("attention", "layer_norm"), [(False, False), (False, True), (True, False), (True, True)]
)


def layer(inputs, weight, bias, norm, act):
    """act(norm(W [inputs] + b)), written out."""
    y = inputs @ weight.T + bias
    if isinstance(norm, torch.nn.LayerNorm):
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, correction=0) + norm.eps).sqrt()
        y = norm.weight * y + norm.bias
    return act(y)


def of(sequential):
    """The weight, the bias and the norm, if any, of a layer."""
    return sequential[0].weight, sequential[0].bias, sequential[1]


def by_pairs(net: Interactions, theta):
    """θ̂ and E of one image (K, M), the equations of the paper one pair at a time."""
    K = len(theta)
    encoded = [layer(theta[k], *of(net.encoder), F.relu) for k in range(K)]
    weight = torch.cat([net.focus.weight, net.context.weight], 1)
    effects = [torch.zeros(net.focus.out_features) for _ in range(K)]
    for k in range(K):
        for i in range(K):
            if i == k:
                continue
            pair = layer(torch.cat([encoded[k], encoded[i]]), weight, net.focus.bias, net.norm, F.relu)
            effect = layer(pair, *of(net.effect), F.relu)
            if net.attention is not None:
                hidden = layer(pair, *of(net.attention[0]), torch.tanh)
                effect = effect * (net.attention[1].weight @ hidden + net.attention[1].bias).sigmoid()
            effects[k] = effects[k] + effect
    return torch.stack(encoded), torch.stack(effects)


def random_norms(net: torch.nn.Module) -> None:
    """Gains and offsets that are not 1 and 0."""
    for module in net.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)


@every_option
@pytest.mark.parametrize("K", [1, 2, 5])
def test_interactions_are_the_sum_over_pairs(K, attention, layer_norm):
    net = Interactions(4, 6, attention=attention, layer_norm=layer_norm)
    random_norms(net)
    theta = torch.randn(3, K, 4)
    encoded, effects = net(theta)
    for b in range(3):
        for ours, expected in zip((encoded[b], effects[b]), by_pairs(net, theta[b]), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@every_option
def test_interactions_of_permuted_components_are_permuted(attention, layer_norm):
    net = Interactions(4, 6, attention=attention, layer_norm=layer_norm)
    theta, order = torch.randn(2, 5, 4), torch.randperm(5)
    for straight, permuted in zip(net(theta), net(theta[:, order]), strict=True):
        torch.testing.assert_close(permuted, straight[:, order], rtol=1e-12, atol=1e-12)


def test_an_effect_depends_on_the_other_components_and_an_encoding_does_not():
    net = Interactions(4, 32)
    theta = torch.randn(1, 3, 4)
    moved = theta.clone()
    moved[:, 1] += 1
    (encoded, effects), (encoded_moved, effects_moved) = net(theta), net(moved)
    assert torch.equal(encoded[:, [0, 2]], encoded_moved[:, [0, 2]])
    assert bool((effects != effects_moved).any(-1).all())


def test_interactions_take_any_leading_axes():
    net = Interactions(4, 6)
    theta = torch.randn(2, 3, 5, 4)
    for ours, expected in zip(net(theta), net(theta.reshape(6, 5, 4)), strict=True):
        torch.testing.assert_close(ours, expected.reshape(2, 3, 5, 6))


@pytest.mark.parametrize("attention", [False, True])
def test_a_component_alone_has_no_effects_on_it(attention):
    _, effects = Interactions(4, 6, attention=attention)(torch.randn(2, 1, 4))
    assert torch.equal(effects, torch.zeros(2, 1, 6))


def test_the_attention_of_a_component_is_between_nothing_and_the_whole_effect():
    """So far apart that it is exactly 0 or 1: no effects, or those without attention."""
    with_attention, without = Interactions(4, 6), Interactions(4, 6, attention=False)
    shared = {name: value for name, value in with_attention.state_dict().items() if not name.startswith("attention")}
    without.load_state_dict(shared)
    theta, last = torch.randn(2, 4, 4), with_attention.attention[1]
    torch.nn.init.zeros_(last.weight)
    for bias, expected in ((1000.0, without(theta)[1]), (-1000.0, torch.zeros(2, 4, 6))):
        torch.nn.init.constant_(last.bias, bias)
        assert torch.equal(with_attention(theta)[1], expected)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("recurrence", ["sigmoid", "gated"])
def test_r_nem_whose_cell_ignores_interactions_is_rnn_em(recurrence, layer_norm):
    model = MODELS["owned Bernoulli"]()
    related = RNEM(model, interaction_features=6, recurrence=recurrence, layer_norm=layer_norm)
    plain = RNNEM(model, recurrence=recurrence, layer_norm=layer_norm)
    x, gamma = images(3), torch.rand(3, 3, 12).softmax(1)
    weights = related.cell.state_dict()
    plain.cell.load_state_dict(weights | {"inputs.weight": weights["inputs.weight"][:, :12]})
    found = related.infer(x, gamma=gamma).theta
    assert not torch.equal(found, plain.infer(x, gamma=gamma).theta)
    with torch.no_grad():
        related.cell.inputs.weight[:, 12:] = 0
    torch.testing.assert_close(related.infer(x, gamma=gamma).theta, plain.infer(x, gamma=gamma).theta)


def test_the_cell_sees_error_encoding_and_effects():
    model = MODELS["owned Bernoulli"]()
    strategy = RNEM(model, interaction_features=6)
    x, x_in = images(2), images(2)
    state = strategy.evaluate(strategy.init(x), torch.randn(2, 3, 5), x)
    error = (state.gamma.unsqueeze(-1) * (x_in.unsqueeze(1) - state.mean)).flatten(-2)
    encoded, effects = map(torch.stack, zip(*(by_pairs(strategy.interactions, t) for t in state.theta), strict=True))
    cell = strategy.cell
    seen = torch.cat([error, encoded, effects], -1) @ cell.inputs.weight.T + cell.inputs.bias
    expected = (seen + state.theta @ cell.recurrent.weight.T).sigmoid()
    torch.testing.assert_close(strategy.m_step(state, x_in), expected)


@every_option
def test_every_parameter_of_the_interactions_gets_a_gradient_in_one_step(attention, layer_norm):
    strategy = RNEM(MODELS["owned Bernoulli"](), interaction_features=8, attention=attention, layer_norm=layer_norm)
    x = images(4)
    state = strategy.evaluate(strategy.init(x), torch.randn(4, 3, 5), x)
    strategy.elbo(strategy.step(state, x, x)).sum().backward()
    for name, parameter in strategy.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name


def test_the_original_interactions_have_the_parameters_of_their_layers():
    """One layer of 250 each for encoding, embedding [θ̂_k, θ̂_i] and effect, and 100 and 1 for attention."""
    encoding, embedding = 251 * 250 + 500, 501 * 250 + 500
    effect, attention = 251 * 250 + 500, 251 * 100 + 200 + 101
    net = Interactions(250, 250, layer_norm=True)
    assert sum(parameter.numel() for parameter in net.parameters()) == encoding + embedding + effect + attention


def test_another_number_of_components_takes_the_same_weights():
    few, many = (RNEM(MODELS["owned Bernoulli"](K=K), interaction_features=6) for K in (2, 7))
    many.load_state_dict(few.state_dict())
    assert many.infer(images(2)).theta.shape == (2, 7, 5)


def test_along_a_sequence_each_step_sees_the_frame_before_and_what_the_others_were_then():
    strategy = RNEM(MODELS["owned Bernoulli"](), interaction_features=6, task="prediction", iterations=3)
    x, gamma = images(8).unflatten(0, (4, 2)), torch.rand(2, 3, 12).softmax(1)
    state = strategy.init(x[0], gamma)
    found = strategy.infer(x, gamma=gamma)
    for seen, target, theta in zip(x, x[1:], found.theta, strict=False):
        by_hand = [by_pairs(strategy.interactions, one) for one in state.theta]
        vectors = [torch.stack(v) for v in zip(*by_hand, strict=True)]
        state = strategy.evaluate(state, strategy.recur(state, seen, state.theta, *vectors), target)
        torch.testing.assert_close(theta, state.theta)
    rolled = strategy.rollout(found.state, x[-1], 5)
    assert rolled.theta.shape == (5, 2, 3, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interaction_features": 0}, "interaction_features must be at least 1, and whole, but is 0"),
        ({"interaction_features": -3}, "interaction_features must be at least 1"),
        ({"interaction_features": 2.5}, "whole, but is 2.5"),
        ({"recurrence": "lstm"}, "sigmoid, gated"),
        ({"encoder": encoders.MLP((5, 5, 1))}, "for images of shape"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"e_step": "hard"}, "consistent"),
        ({"task": "forecast"}, "static, denoising, prediction"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(StrategyError, match=message):
        RNEM(MODELS["owned Bernoulli"](), **options)


def test_a_constant_decoder_is_refused():
    model = SpatialMixture(decoders.Constant(2), Bernoulli(), 3)
    with pytest.raises(StrategyError, match="RNEM needs a decoder of images, not Constant: use ClassicalEM"):
        RNEM(model)
