"""The vision transformer of architectures_report (experiment 3).

Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"; the encoder layers are
torch.nn.TransformerEncoderLayer's defaults (LayerNorm after each sum, ReLU). Names: the layers' own
in torch; to_patch_embedding, cls_token, pos_embedding and mlp_head as in vit-pytorch, whose patch
embedding (LayerNorm, linear, LayerNorm) the report uses.
"""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcifar.errors import UserError
from jaxcifar.models import layers, products


class SelfAttention(nn.Module):
    """torch.nn.MultiheadAttention on [N, L, width] attending to itself, dropout on its weights."""

    heads: int
    dropout: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        count, length, width = x.shape
        # One parameter for queries, keys and values, [3 width, width] as in torch.
        weight = self.param("in_proj_weight", _xavier_uniform, (3 * width, width))
        bias = self.param("in_proj_bias", nn.initializers.zeros, (3 * width,))
        qkv = products.linear(x.astype(self.dtype), weight.astype(self.dtype).T)
        qkv = layers.add_bias(qkv, bias)
        q, k, v = jnp.moveaxis(qkv.reshape(count, length, 3, self.heads, -1), 2, 0)
        scores = jnp.einsum("nqhd,nkhd->nhqk", q / math.sqrt(width // self.heads), k)
        weights = nn.softmax(scores.astype(jnp.float32)).astype(self.dtype)
        weights = layers.Dropout(self.dropout)(weights, train)
        x = jnp.einsum("nhqk,nkhd->nqhd", weights, v).reshape(count, length, width)
        return layers.Linear(width, dtype=self.dtype, bias_init=nn.initializers.zeros,
                             name="out_proj")(x)


class EncoderLayer(nn.Module):
    """torch.nn.TransformerEncoderLayer(width, heads, mlp_dim, dropout, batch_first=True)."""

    heads: int
    mlp_dim: int
    dropout: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        y = SelfAttention(self.heads, self.dropout, self.dtype, name="self_attn")(x, train)
        y = layers.Dropout(self.dropout)(y, train)
        x = layers.LayerNorm(dtype=self.dtype, name="norm1")(x + y)
        y = layers.relu(layers.Linear(self.mlp_dim, dtype=self.dtype, name="linear1")(x))
        y = layers.Dropout(self.dropout)(y, train)
        y = layers.Linear(x.shape[-1], dtype=self.dtype, name="linear2")(y)
        y = layers.Dropout(self.dropout)(y, train)
        return layers.LayerNorm(dtype=self.dtype, name="norm2")(x + y)


class ViT(nn.Module):
    """Patches, a class token, learned positions, encoder layers, and a head on the class token.

    patch: side of a patch in pixels; width: of a token; depth: number of encoder layers, 1 as in
    the report's code (132,774 parameters) or 6 as in its text (776,764); heads; mlp_dim: width of
    the feed-forward layers; dropout: within the encoder layers.
    """

    num_classes: int = 10
    depth: int = 1
    patch: int = 4
    width: int = 30
    heads: int = 6
    mlp_dim: int = 2048
    dropout: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        if self.width % self.heads:
            raise UserError(f"model options width = {self.width} and heads = {self.heads}: the "
                            "heads share the width equally, so it must be a multiple of them")
        x = _patches(images.astype(self.dtype), self.patch)
        x = layers.LayerNorm(dtype=self.dtype, name="to_patch_embedding.1")(x)
        x = layers.Linear(self.width, dtype=self.dtype, name="to_patch_embedding.2")(x)
        x = layers.LayerNorm(dtype=self.dtype, name="to_patch_embedding.3")(x)
        count, length, width = x.shape
        token = self.param("cls_token", nn.initializers.normal(1.0), (1, 1, width))
        positions = self.param("pos_embedding", nn.initializers.normal(1.0), (1, length + 1, width))
        token = jnp.broadcast_to(token, (count, 1, width)).astype(self.dtype)
        x = layers.add_bias(jnp.concatenate([token, x], axis=1), positions)
        for i in range(self.depth):
            x = EncoderLayer(self.heads, self.mlp_dim, self.dropout, self.dtype,
                             name=f"transformer.layers.{i}")(x, train)
        x = layers.LayerNorm(name="mlp_head.0")(x[:, 0])
        return layers.Linear(self.num_classes, name="mlp_head.1")(x)


def _patches(images, patch):
    """Return [N, rows * columns, patch * patch * C] from [N, H, W, C]: pixels row by row."""
    count, height, width, channels = images.shape
    if height % patch or width % patch:
        raise UserError(f"model option patch = {patch}: images of {height}x{width} pixels cannot "
                        "be cut into such patches; choose a divisor of both")
    x = images.reshape(count, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(count, -1, patch * patch * channels)


def _xavier_uniform(key, shape, dtype=jnp.float32):
    """torch.nn.init.xavier_uniform_ of a weight [out, in]."""
    return nn.initializers.xavier_uniform(in_axis=1, out_axis=0)(key, shape, dtype)
