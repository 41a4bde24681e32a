"""Parts of a stage: convolutions with norms, window attention, and the fusion behind it.

Shapes: maps of the convolutional parts are (B, C, H, W); tokens of the transformer blocks are kept
as maps with channels last, (B, h, w, C).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, get_norm
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from detection_toolkit.errors import UserError

__all__ = [
    "DualAttentionEnhancement",
    "FusedBlock",
    "SpaceToDepthModule",
    "WindowAttention",
    "conv_norm",
    "relative_position_index",
    "shift_mask",
]

MASKED = -100.0  # the trained weights know this number, not minus infinity


def conv_norm(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
    norm: str = "BN",
    activation: bool = True,
) -> Conv2d:
    """Convolution that keeps the size (over the stride), norm, and SiLU if ``activation``."""
    return Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        groups=groups,
        bias=bias,
        norm=get_norm(norm, out_channels),
        activation=nn.SiLU() if activation else None,
    )


class SpaceToDepthModule(nn.Module):
    """The spatial module: the local trunk at half the resolution, without losing a pixel.

    Four neighbours go into the channels, row offset fastest, and a depth-wise separable
    convolution without activation brings them back to C channels.
    """

    def __init__(self, channels: int, *, norm: str = "BN"):
        super().__init__()
        wide = 4 * channels
        self.depthwise = conv_norm(wide, wide, 3, groups=wide, norm=norm, activation=False)
        self.pointwise = conv_norm(wide, channels, 1, norm=norm, activation=False)

    def forward(self, local: Tensor) -> Tensor:
        """(B, C, 2h, 2w) -> (B, C, h, w)."""
        parts = [local[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.pointwise(self.depthwise(torch.cat(parts, dim=1)))


def relative_position_index(window_size: int) -> Tensor:
    """Row of the bias table for each pair of tokens of a window.

    Returns:
        (window_size**2, window_size**2) int64, [query, key]; for window size n and offsets
        query - key of (dy, dx) the row (dy + n - 1) * (2n - 1) + (dx + n - 1).
    """
    axis = torch.arange(window_size)
    rows, columns = (a.flatten() for a in torch.meshgrid(axis, axis, indexing="ij"))
    dy = rows[:, None] - rows[None, :] + window_size - 1
    dx = columns[:, None] - columns[None, :] + window_size - 1
    return dy * (2 * window_size - 1) + dx


def shift_mask(height: int, width: int, *, window_size: int, device=None) -> Tensor:
    """What is added to the scores of shifted windows, so that only neighbours attend.

    Args:
        height, width: of the padded map, multiples of ``window_size``.

    Returns:
        (windows, window_size**2, window_size**2) float32: 0 within a region of the shifted map,
        ``MASKED`` between two of them.
    """

    def classes(n: int) -> Tensor:
        position = torch.arange(n, device=device)
        shifted_in = position >= n - window_size // 2
        return (position >= n - window_size).long() + shifted_in.long()

    region = 3 * classes(height)[:, None] + classes(width)[None, :]
    region = _windows(region[None, :, :, None], window_size)[..., 0]
    differs = region[:, :, None] != region[:, None, :]
    return torch.zeros(differs.shape, device=device).masked_fill_(differs, MASKED)


def _windows(tokens: Tensor, size: int) -> Tensor:
    """(B, h, w, C) -> (B * windows, size**2, C)."""
    batch, height, width, channels = tokens.shape
    tokens = tokens.view(batch, height // size, size, width // size, size, channels)
    return tokens.permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, channels)


def _from_windows(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    """Inverse of :func:`_windows`."""
    channels = windows.shape[-1]
    tokens = windows.view(-1, height // size, width // size, size, size, channels)
    return tokens.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)


class WindowAttention(nn.Module):
    """Multi-head self-attention in (shifted) windows with relative position biases.

    As in Swin Transformer (Liu et al., ICCV 2021). Maps that no whole number of windows fits are
    padded with zeros at the bottom and right; padded tokens take part as keys and values.
    """

    bias_index: Tensor

    def __init__(self, channels: int, num_heads: int, *, window_size: int = 7):
        """
        Raises:
            ValueError: the heads cannot share the channels evenly.
        """
        super().__init__()
        if channels % num_heads:
            raise UserError(f"{num_heads} attention heads cannot share {channels} channels")
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.bias_table, std=0.02)
        self.register_buffer("bias_index", relative_position_index(window_size), persistent=False)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            tokens: (B, h, w, C), any h and w.
            mask: None for windows in place. Otherwise windows are shifted by half their size, and
                this is :func:`shift_mask` of the padded size.

        Returns:
            (B, h, w, C)
        """
        _, height, width, _ = tokens.shape
        size, shift = self.window_size, self.window_size // 2
        tokens = F.pad(tokens, (0, 0, 0, -width % size, 0, -height % size))
        _, padded_height, padded_width, _ = tokens.shape
        if mask is not None:
            tokens = tokens.roll((-shift, -shift), dims=(1, 2))
        windows = self._attend(_windows(tokens, size), mask)
        tokens = _from_windows(windows, size, padded_height, padded_width)
        if mask is not None:
            tokens = tokens.roll((shift, shift), dims=(1, 2))
        return tokens[:, :height, :width]

    def _attend(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        count, length, channels = windows.shape
        qkv = self.qkv(windows).view(count, length, 3, self.num_heads, channels // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = (q * (q.shape[-1] ** -0.5)) @ k.transpose(-2, -1)
        scores = scores + self.bias_table[self.bias_index].permute(2, 0, 1)
        if mask is not None:
            scores = scores.unflatten(0, (-1, len(mask))) + mask[:, None].to(scores.dtype)
            scores = scores.flatten(0, 1)
        out = scores.softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(count, length, channels))


class DualAttentionEnhancement(nn.Module):
    """DANE: a gate between context and spatial tokens, and what it lets through (fusion two).

    The gate is the sigmoid of a number per token, from the spatial tokens, plus a number per
    channel, from the mean of the context tokens.
    """

    def __init__(self, channels: int):
        super().__init__()
        hidden = channels // 16
        self.token_gate = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 1, bias=False))
        self.channel_gate = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.SiLU(),
            nn.LayerNorm(hidden),
            nn.Linear(hidden, channels, bias=False),
        )

    def forward(self, context: Tensor, spatial: Tensor) -> Tensor:
        """Both and the result (B, h, w, C)."""
        of_token = self.token_gate(spatial)  # (B, h, w, 1)
        of_channel = self.channel_gate(context.mean(dim=(1, 2), keepdim=True))  # (B, 1, 1, C)
        gate = (of_token + of_channel).sigmoid()
        return gate * spatial + (1 - gate) * context


class FusedBlock(nn.Module):
    """A transformer block, pre-norm, with DANE between attention and MLP.

    DANE replaces the tokens; it is no residual branch.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        hidden = int(channels * mlp_ratio)
        self.norm1 = nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, num_heads, window_size=window_size)
        self.dane = DualAttentionEnhancement(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels)
        )
        self.drop_path = (
            StochasticDepth(drop_path_rate, mode="row") if drop_path_rate > 0 else nn.Identity()
        )

    def forward(self, tokens: Tensor, spatial: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            tokens, spatial: (B, h, w, C).
            mask: see :meth:`WindowAttention.forward`.

        Returns:
            (B, h, w, C)
        """
        attended = tokens + self.drop_path(self.attention(self.norm1(tokens), mask))
        fused = self.dane(attended, spatial)
        return fused + self.drop_path(self.mlp(self.norm2(fused)))
