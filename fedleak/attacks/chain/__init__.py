"""A feed-forward network as a chain of layers: one reader of any `nn.Module`, one file a kind of layer."""

from fedleak.attacks.chain.base import Layer
from fedleak.attacks.chain.products import Products
from fedleak.attacks.chain.reader import read_layers
from fedleak.attacks.chain.undo import Linear, Pointwise

__all__ = ["Layer", "Linear", "Pointwise", "Products", "read_layers"]
