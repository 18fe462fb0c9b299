"""Batch norm by the statistics of all ranks' batches, on any device; nn.SyncBatchNorm refuses CPUs."""

from typing import Any

import torch
from torch import Tensor

from fastcifar.distributed import World

MAP = (0, 2, 3)  # dimensions of [N, C, H, W] over which a channel's statistics are taken


class SyncNorm(torch.autograd.Function):
    """Normalise feature maps [N, C, H, W], N alike on all ranks; returns (y, mean, var), the latter [C] over all ranks.

        mean = avg_r m_r        var = avg_r (v_r + (m_r - mean)^2)        m_r, v_r of rank r's maps
        h = (x - mean) / sqrt(var + eps)        y = weight h + bias

        dbias = sum dy        dweight = sum dy h        of this rank: the step adds up the ranks'
        dx = weight / sqrt(var + eps) (dy - avg dy - h avg (dy h))        averages over all ranks' maps

    Computed in float32, returned in x's dtype. One collective forward, one backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, world: World) -> tuple[Tensor, Tensor, Tensor]:
        own_var, own_mean = torch.var_mean(x.float(), MAP, correction=0)
        ranks = own_mean.new_zeros(world.size, 2, len(own_mean))
        ranks[world.rank] = torch.stack([own_mean, own_var])
        world.add([ranks])
        means, variances = ranks.unbind(1)
        mean = means.mean(0)
        var = (variances + (means - mean).square()).mean(0)
        scale = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.world = world
        ctx.mark_non_differentiable(mean, var)
        y = torch.addcmul(_wide(bias), _normalised(x, mean, scale), _wide(weight))
        return y.to(x.dtype), mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, mean, scale), dy = ctx.saved_tensors, gradients[0].float()
        h = _normalised(x, mean, scale)
        own = torch.stack([dy.sum(MAP), (dy * h).sum(MAP)])
        everyones = own.clone()
        ctx.world.add([everyones])
        dy_mean, dyh_mean = everyones / (ctx.world.size * x.numel() // len(mean))
        dx = _wide(weight * scale) * (dy - _wide(dy_mean) - h * _wide(dyh_mean))
        return dx.to(x.dtype), own[1], own[0], None, None


def _normalised(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return (x.float() - _wide(mean)) * _wide(scale)


def _wide(vector: Tensor) -> Tensor:
    """[C] to [C, 1, 1]."""
    return vector[:, None, None]
