"""The arithmetic that the batch statistics share: collect, spread, normalize.

Everything here takes x [N, C, L] (L positions an image) and responsibilities r that are constant
for the gradient: [N, K] a row an image, [N, K, L] one a position, or None, which is one component
that owns everything. Means are relative to `shift` [C], a point near the data, because squares
are expanded: around 0 they would lose their digits where the mean is large.

`normalize` is a custom autograd function with the analytic backward; `normalize_reference` is the
same by plain autograd, which the tests compare it with.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ltnorm.norms import distributed


class Sums(NamedTuple):
    """What a batch says of each component: sum_i r_ik [K], sum r x [K, C], sum r x^2 [K, C]."""

    count: Tensor
    first: Tensor
    second: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics of half-precision numbers are float32, of float64 ones float64."""
    return torch.promote_types(dtype, torch.float32)


@torch.compiler.assume_constant_result
def _matmul_is_exact() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by backend, in a way that has no one name
        return False


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in full precision also where the user lets float32 products use TF32 or bf16."""
    if a.dtype == torch.float64 or _matmul_is_exact():
        return a @ b
    return (a.double() @ b.double()).to(a.dtype)


# Numbers in a part: 2 MiB of float32.
_PART = 2**19


def _in_parts(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The tensors, or on a CPU some images of them at a time.

    There a temporary as large as x costs more in fresh memory pages than the arithmetic does.
    """
    images = len(tensors[0])
    part = max(1, _PART * images // max(t.numel() for t in tensors)) if images else 1
    if tensors[0].device.type != "cpu" or torch.compiler.is_compiling() or part >= images:
        return [tensors]
    return list(zip(*(t.split(part) for t in tensors), strict=True))


def by_parts(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function(*tensors), each image of which depends on that image of the tensors alone."""
    parts = [function(*part) for part in _in_parts(*tensors)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def collect(r: Tensor | None, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """sum_i r_ik t_i over images and positions: [K, C], for t = function(*tensors) [N, C, L]."""
    if r is not None and r.dim() == 3:
        return by_parts(lambda r, *p: matmul(r, function(*p).transpose(1, 2)), r, *tensors).sum(0)
    per_image = by_parts(lambda *p: function(*p).sum(2), *tensors)
    return per_image.sum(0, keepdim=True) if r is None else matmul(r.T, per_image)


def spread(r: Tensor | None, v: Tensor, like: Tensor) -> Tensor:
    """sum_k r_ik v_k for v [K, C]: [C, 1], [N, C, 1] or [N, C, L], broadcast against x.

    By position the result has the memory layout of `like`, so that no product strides.
    """
    if r is None:
        return v[0][:, None]
    if r.dim() == 2:
        return matmul(r, v)[:, :, None]
    if like.stride(1) == 1:  # channels_last
        return matmul(r.transpose(1, 2), v).transpose(1, 2)
    return matmul(v.T, r)


def image_moments(x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean square of x - shift for each image and channel, [N, C] each."""
    dtype = shift.dtype

    def mean_square(x: Tensor) -> Tensor:
        # The squared difference in one pass; summed up by us, because mse_loss has no dim.
        return F.mse_loss(x.to(dtype), shift[:, None].expand_as(x), reduction="none").mean(2)

    return x.mean(2, dtype=dtype) - shift, by_parts(mean_square, x)


def plain_sums(x: Tensor, shift: Tensor) -> Sums:
    """The sums of x - shift for one component that owns everything."""
    first, second = image_moments(x, shift)
    count = first.new_full((1,), x.shape[0] * x.shape[2])
    return Sums(count, *(x.shape[2] * t.sum(0, keepdim=True) for t in (first, second)))


def affine_map(x: Tensor, r: Tensor | None, scale: Tensor, offset: Tensor) -> Tensor:
    """x_i * sum_k r_ik scale_k + sum_k r_ik offset_k, for scale and offset [K, C].

    The result is of the type of scale and offset.
    """
    b = spread(r, offset, x)
    if r is not None and r.dim() == 3:
        return _add_product(b, x, r, scale)
    a = spread(r, scale, x)
    if x.stride(1) == 1:  # faster in one pass, unless broadcast along what lies together
        return torch.addcmul(b, x.to(a.dtype), a)
    return x.to(a.dtype) * a + b


def _add_product(y: Tensor, x: Tensor, r: Tensor | None, scale: Tensor) -> Tensor:
    """y + x_i * sum_k r_ik scale_k, into y [N, C, L] where nothing is to be differentiated."""
    if torch.is_grad_enabled():
        return torch.addcmul(y, x.to(y.dtype), spread(r, scale, x))
    if r is None or r.dim() == 2:
        return y.addcmul_(x.to(y.dtype), spread(r, scale, x))
    for part, values, share in _in_parts(y, x, r):
        part.addcmul_(values.to(y.dtype), spread(share, scale, values))
    return y


def normalize(
    x: Tensor,
    r: Tensor | None,
    share: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    eps: float,
    sync: bool = False,
) -> Tensor:
    """y_i = sum_k r_ik (weight_k (x_i - m_k) / sqrt(v_k + eps) + bias_k)

    `mean` and `var` come as numbers, and are differentiated as what they are, moments of x:
    dm_k / dx_i = q_ik and dv_k / dx_i = 2 q_ik (x_i - m_k), with q_ik = share_k r_ik the weight
    of position i in the moments of component k. With A_k = weight_k / sqrt(v_k + eps) and
    xhat_ik = (x_i - m_k) / sqrt(v_k + eps), channel by channel:

        dbias_k = sum_i r_ik g_i,  dweight_k = sum_i r_ik g_i xhat_ik,
        dx_i = sum_k r_ik A_k g_i - q_ik A_k (dbias_k + xhat_ik dweight_k)

    (For batch normalization q = 1 / M, and this is its well-known backward.)

    Args:
        x: [N, C, L], any float dtype; the result has the same.
        r: constant responsibilities, [N, K], [N, K, L] or None.
        share: [K], or [N, K] for image responsibilities whose images do not count alike.
        mean, var: moments of the components, [K, C], means relative to `shift`.
        weight, bias: [K, C], or [1, C] for all components.
        shift: [C].
        eps: added to the variance.
        sync: the moments are those of all ranks together, and so is their gradient. Gradients
            of weight and bias stay local.
    """
    return _Normalize.apply(x, r, share, mean, var, weight, bias, shift, eps, sync)


def normalize_reference(
    x: Tensor,
    r: Tensor | None,
    share: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    eps: float,
) -> Tensor:
    """`normalize` by plain autograd, for one process. Differentiable any number of times."""
    centred = x.to(shift.dtype) - shift[:, None]
    mean, var = _moments_of(centred, r, share, mean, var)
    scale = weight.to(var.dtype) * torch.rsqrt(var + eps)
    offset = bias.to(var.dtype) - mean * scale
    return (centred * spread(r, scale, x) + spread(r, offset, x)).to(x.dtype)


def _same(t: Tensor) -> Tensor:
    return t


def _moments_of(
    centred: Tensor, r: Tensor | None, share: Tensor, mean: Tensor, var: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance with their values unchanged, as functions of the input."""
    if share.dim() == 1:
        first, second = (share[:, None] * collect(r, f, centred) for f in (_same, torch.square))
    else:
        q = share if r is None else r * share
        first, second = (collect(q, f, centred) for f in (_same, torch.square))
    mean = mean + (first - first.detach())
    second = second - mean.square()
    return mean, var + (second - second.detach())


class _Normalize(torch.autograd.Function):
    """Saves x, r and [K, C] tensors. In half precision what is saved and passed on stays so."""

    @staticmethod
    def forward(
        x: Tensor,
        r: Tensor | None,
        share: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor,
        bias: Tensor,
        shift: Tensor,
        eps: float,
        sync: bool,
    ) -> Tensor:
        scale = weight.to(var.dtype) * torch.rsqrt(var + eps)
        offset = bias.to(var.dtype) - (mean + shift) * scale
        return affine_map(x, r, scale, offset).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.eps, ctx.sync = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            return _backward(grad, *ctx.saved_tensors, eps=ctx.eps, sync=ctx.sync)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        *inputs, eps, sync = args
        if sync:
            raise RuntimeError("vmap over statistics that are summed over ranks is not supported")
        mapped = torch.vmap(
            lambda *tensors: normalize_reference(*tensors, eps),
            in_dims=in_dims[:-2],
            randomness=info.randomness,
        )
        return mapped(*inputs), 0


def _backward(
    grad: Tensor,
    x: Tensor,
    r: Tensor | None,
    share: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    *,
    eps: float,
    sync: bool,
) -> tuple[Tensor | None, ...]:
    dtype = var.dtype
    twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if twice and sync:
        raise RuntimeError("second derivatives of statistics summed over ranks are not supported")
    if twice:
        mean, var = _moments_of(x.to(dtype) - shift[:, None], r, share, mean, var)
    inverse = torch.rsqrt(var + eps)
    scale = weight.to(dtype) * inverse
    dbias = collect(r, lambda g: g.to(dtype), grad)
    moment = collect(r, lambda g, x: g * (x.to(dtype) - shift[:, None]), grad, x)
    dweight = inverse * (moment - mean * dbias)
    # Parameter gradients are of this rank's images; what the moments pass on is of all.
    own = [d.sum_to_size(p.shape).to(p.dtype) for d, p in ((dweight, weight), (dbias, bias))]
    if sync:
        dweight, dbias = distributed.sum_over_ranks(torch.stack([dweight, dbias]))
    slope = -scale * inverse * dweight
    level = -scale * dbias - slope * (mean + shift)
    if share.dim() == 1:
        q, slope, level = r, share[:, None] * slope, share[:, None] * level
    else:
        q = share if r is None else r * share
    dx = _add_product(affine_map(x, q, slope, level), grad, r, scale)
    return (dx.to(x.dtype), None, None, None, None, *own, None, None, None)
