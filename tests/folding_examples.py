"""Small networks of one idea each: how a layer's input is made, and who else reads it."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch.nn import functional as F

from sedimo.graph.folding import Folding, find_folding
from sedimo.pipelines.weights import ModuleWeights
from sedimo.quant.activations import InputRange
from sedimo.treatments.smoothing import Smoothing, plan_smoothing
from tolerances import FLOAT64_SUM

C = 8


class Network(nn.Module):
    """Modules by name, and a forward of one argument that calls them."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            if isinstance(module, nn.Parameter):
                self.register_parameter(name, module)
            else:
                self.add_module(name, module)
        self._forward = forward

    def forward(self, sample, return_dict=True):
        return (self._forward(self, sample),)


def linear(n_in=C, n_out=C, bias=True):
    return nn.Linear(n_in, n_out, bias=bias)


def conv(n_in=C, n_out=C, size=3, **options):
    return nn.Conv2d(n_in, n_out, size, padding=size // 2, **options)


def heads(x):  # [B, T, C] -> [B, 2, T, C / 2]
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def merged(x):
    return x.transpose(1, 2).flatten(2)


def _qkv(net, x):
    y = net.norm(x)
    return net.q(y) * net.k(y).sigmoid() + net.v(y)


def _group_norm(net, x):  # tokens as an image, as in the attention of U-Nets
    image = x.transpose(1, 2).reshape(x.shape[0], C, 2, -1)
    y = net.norm(image).view(x.shape[0], C, -1).transpose(1, 2)
    return net.out(y)


def _rms_by_hand(net, x):
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return net.out(y * net.scale + net.shift)


def _attention(net, x):
    y = F.scaled_dot_product_attention(heads(net.q(x)), heads(net.k(x)), heads(net.v(x)))
    return net.out(merged(y).to(x.dtype))


def _attention_by_hand(net, x):
    weights = (net.q(x) @ net.k(x).transpose(-1, -2)).softmax(-1)
    return net.out(torch.bmm(weights, net.v(x)))


def _adaln(net, x):
    scale, shift, gate = net.modulation(x.mean(1)).chunk(3, dim=-1)
    y = F.layer_norm(x, (C,)) * (1 + scale[:, None]) + shift[:, None]
    return x + gate[:, None] * net.out(y)


def _table(net, x):  # AdaLN-single with a table, whose projection nobody else reads
    scale, shift = (net.table[None] + net.modulation(x.mean(1)).unflatten(-1, (2, -1))).chunk(2, dim=1)
    return net.out(F.layer_norm(x, (C,)) * (1 + scale) + shift)


def _geglu(net, x):
    value, gate = net.proj(x).chunk(2, dim=-1)
    return net.out(value * F.gelu(gate))


def _image(x):
    return x.transpose(1, 2).reshape(x.shape[0], C, 2, -1)


def _residual_of_convolutions(net, x):
    y = (net.shortcut(_image(x)) + net.conv(_image(x))) / 2.0
    return net.out(F.interpolate(y, scale_factor=2.0, mode="nearest"))


def _concatenation(net, x):
    return net.out(torch.cat([net.first(x), 3 * net.second(x)], dim=-1))


def _embedding(net, x):
    return net.out(net.first(x) + net.position)


FOLDED = {  # network, layers to smooth, parameters that take the factors
    "layer norm": (Network(_qkv, norm=nn.LayerNorm(C), q=linear(), k=linear(), v=linear()), "q k v", "norm"),
    "group norm": (Network(_group_norm, norm=nn.GroupNorm(4, C), out=linear()), "out", "norm"),
    "rms norm": (Network(lambda n, x: n.out(n.norm(x)), norm=nn.RMSNorm(C), out=linear()), "out", "norm"),
    "rms norm by hand": (
        Network(_rms_by_hand, scale=nn.Parameter(torch.ones(C)), shift=nn.Parameter(torch.ones(C)), out=linear()),
        "out",
        "scale shift",
    ),
    "linear": (Network(lambda n, x: n.out(n.first(x)), first=linear(), out=linear()), "out", "first"),
    "linear without bias": (
        Network(lambda n, x: n.out(-n.first(x)), first=linear(bias=False), out=linear()),
        "out",
        "first",
    ),
    "chain": (Network(lambda n, x: n.c(n.b(n.a(x))), a=linear(), b=linear(), c=linear()), "b c", "a b"),
    "convolution": (Network(lambda n, x: n.out(n.first(_image(x))), first=conv(), out=conv()), "out", "first"),
    "called twice": (
        Network(lambda n, x: n.out(n.first(x)) + n.out(n.first(x.flip(1))), first=linear(), out=linear()),
        "out",
        "first",
    ),
    "attention": (Network(_attention, q=linear(), k=linear(), v=linear(), out=linear()), "out", "v"),
    "attention by hand": (Network(_attention_by_hand, q=linear(), k=linear(), v=linear(), out=linear()), "out", "v"),
    "modulation": (Network(_adaln, modulation=linear(C, 3 * C), out=linear()), "out", "modulation"),
    "table": (
        Network(_table, table=nn.Parameter(torch.ones(2, C)), modulation=linear(C, 2 * C), out=linear()),
        "out",
        "table modulation",
    ),
    "geglu": (Network(_geglu, proj=linear(C, 2 * C), out=linear()), "out", "proj"),
    "residual": (
        Network(_residual_of_convolutions, shortcut=conv(size=1), conv=conv(), out=conv()),
        "out",
        "shortcut conv",
    ),
    "concatenation": (
        Network(_concatenation, first=linear(), second=nn.LayerNorm(C), out=linear(2 * C)),
        "out",
        "first second",
    ),
    "position": (
        Network(_embedding, first=linear(), position=nn.Parameter(torch.ones(1, 6, C)), out=linear()),
        "out",
        "first position",
    ),
}


def _scale_read_twice(net, x):
    scale = net.modulation(x)
    return net.out(F.layer_norm(x, (C,)) * (1 + scale)) + net.out(scale)


def _in_place(net, x):
    y = net.first(x)
    y[:, 0].add_(1.0)
    return net.out(y)


def _uneven(net, x):  # a channel of the input is different channels of the first layer at different positions
    y = net.first(x)
    return net.out(torch.cat([y[:, :3], y[:, 3:].flip(-1)], dim=1)) + net.out(x)


def _partly_foreign(net, x):  # out reads the denoiser's input, too, so that the first layer must stay as it is
    y = net.first(x)
    return net.second(y) + net.out(torch.cat([y, x], dim=-1))


def _without_gradients(net, x):
    y = net.first(x)
    with torch.autocast("cpu", enabled=False):
        z = y * 2
    return net.out(z) + y


DIVIDED = {  # network, layers to smooth; none of them may be folded
    "input of the denoiser": (Network(lambda n, x: n.out(x), out=linear()), "out"),
    "nonlinear": (Network(lambda n, x: n.out(F.silu(n.first(x))), first=linear(), out=linear()), "out"),
    "norm without weight": (
        Network(lambda n, x: n.out(F.layer_norm(n.first(x), (C,))), first=linear(), out=linear()),
        "out",
    ),
    "another reader": (Network(_qkv, norm=nn.LayerNorm(C), q=linear(), k=linear(), v=linear()), "q k"),
    "output of the denoiser": (
        Network(lambda n, x: (lambda y: y + n.out(y))(n.first(x)), first=linear(), out=linear()),
        "out",
    ),
    "square": (Network(lambda n, x: n.out(n.first(x) * n.first(x)), first=linear(), out=linear()), "out"),
    "square of one": (Network(lambda n, x: (lambda y: n.out(y * y))(n.first(x)), first=linear(), out=linear()), "out"),
    "self attention of one": (
        Network(
            lambda n, x: (lambda y: n.out(merged(F.scaled_dot_product_attention(y, y, y))))(heads(n.v(x))),
            v=linear(),
            out=linear(),
        ),
        "out",
    ),
    "scale read twice": (Network(_scale_read_twice, modulation=linear(), out=linear()), "out"),
    "scale without bias": (
        Network(
            lambda n, x: n.out(F.layer_norm(x, (C,)) * (1 + n.modulation(x))),
            modulation=linear(bias=False),
            out=linear(),
        ),
        "out",
    ),
    "in place": (Network(_in_place, first=linear(), out=linear()), "out"),
    "uneven": (Network(_uneven, first=linear(), out=linear()), "out"),
    "region": (Network(_without_gradients, first=linear(), out=linear()), "out"),
    "weight read elsewhere": (
        Network(lambda n, x: n.out(n.first(x)) + F.linear(x, n.first.weight * 2), first=linear(), out=linear()),
        "out",
    ),
    "norm shared with another reader": (
        Network(lambda n, x: n.out(n.norm(x)) + n.norm(x + 1), norm=nn.LayerNorm(C), out=linear()),
        "out",
    ),
    "reader that has to divide": (
        Network(_partly_foreign, first=linear(), second=linear(), out=linear(2 * C)),
        "second out",
    ),
    "power": (Network(lambda n, x: n.out(n.first(x).pow(1)), first=linear(), out=linear()), "out"),
}


class Scaled(nn.Linear):
    """A layer whose forward is its own."""

    def forward(self, x):
        return super().forward(2 * x)


REFUSED = {  # network, layers that cannot be smoothed at all, a word of the reason
    "grouped": (Network(lambda n, x: n.out(_image(x)), out=conv(groups=2)), "out", "grouped"),
    "unused": (Network(lambda n, x: n.out(x), out=linear(), unused=linear()), "unused", "not used"),
    "weight elsewhere": (Network(lambda n, x: n.out(x) + x @ n.out.weight.t(), out=linear()), "out", "outside"),
    "own forward": (Network(lambda n, x: n.out(x), out=Scaled(C, C)), "out", "plain layer"),
    "called by hand": (Network(lambda n, x: F.linear(x, n.out.weight, n.out.bias), out=linear()), "out", "plain layer"),
}


def randomised(network):
    """The network in float64 with random parameters."""
    network = network.double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return network


def example(n_tokens=6):
    """Tokens `[3, T, C]`."""
    return torch.randn(3, n_tokens, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def random_ranges(denoiser, layers):
    """Ranges that lie far apart, from a seed."""
    found = {}
    for layer in layers:
        generator = torch.Generator().manual_seed(sum(map(ord, layer)))
        n = denoiser.get_parameter(f"{layer}.weight").shape[1]
        largest = torch.exp(2 * torch.randn(n, generator=generator)).double().tolist()
        found[layer] = InputRange(tuple(-value for value in largest), tuple(largest))
    return found


def plan_for(denoiser, layers, alpha=0.7, **how) -> tuple[Folding, Smoothing]:
    folding = find_folding(denoiser, layers, **how)
    return folding, plan_smoothing(folding, random_ranges(denoiser, folding.inputs), ModuleWeights(denoiser), alpha)


@contextlib.contextmanager
def smoothed(denoiser, smoothing):
    """The denoiser smoothed; on leaving it is bit-exactly what it was."""
    restore = smoothing.enter(denoiser, is_stored=False)
    try:
        yield denoiser
    finally:
        restore()


def close(found, wanted, tolerance=FLOAT64_SUM):
    """Whether two tensors differ by at most so much of the second one's norm."""
    return float((found - wanted).detach().norm()) <= tolerance * float(wanted.detach().norm())
