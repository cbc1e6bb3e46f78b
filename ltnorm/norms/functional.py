"""The arithmetic that the batch statistics share: collect, spread, normalize.

Everything here takes x [N, C, L] (L positions an image) and responsibilities r that are constant
for the gradient: [N, K] a row an image, [N, K, L] one a position, or None, which is one component
that owns everything. Means are relative to `shift` [C], a point near the data, because squares
are expanded: around 0 they would lose their digits where the mean is large.

`normalize` is a custom autograd function with the analytic backward; `normalize_reference` is the
same by plain autograd, which the tests compare it with.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ltnorm.norms import distributed


class Sums(NamedTuple):
    """What a batch says of each component, around `shift`, in units of whole images.

    With the mean over its positions inside: count = sum_n r_nk [K], first = sum r x [K, C] and
    second = sum r x^2 [K, C].
    """

    count: Tensor
    first: Tensor
    second: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics of half-precision numbers are float32, of float64 ones float64."""
    return torch.promote_types(dtype, torch.float32)


def _matmul_is_exact() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by backend, in a way that has no one name
        return False


# What torch.compiler.assume_constant_result does, which imports the compiler first: seconds.
_matmul_is_exact._dynamo_marked_constant = True


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in full precision also where the user lets float32 products use TF32 or bf16."""
    if a.dtype == torch.float64 or _matmul_is_exact():
        return a @ b
    return (a.double() @ b.double()).to(a.dtype)


@torch.library.custom_op("ltnorm::hold", mutates_args=())
def hold(t: Tensor) -> Tensor:
    """t, for a compiled graph: a value to be kept for the backward.

    A compiler would rather compute cheap values again there, from a running state that the
    forward has changed meanwhile.
    """
    return t.clone()


@hold.register_fake
def _(t: Tensor) -> Tensor:
    return torch.empty_like(t)


# Numbers in a part: 4 MiB of float32. (Each operation on a part starts the threads anew.)
_PART = 2**20


def _in_parts(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The tensors, or on a CPU some images of them at a time.

    There a step's cost is its traffic with memory: what is computed on the way stays in the cache
    if it is small, and a temporary as large as x would want fresh pages besides.
    """
    if torch.compiler.is_compiling():  # the sizes may be symbols there
        return [tensors]
    images = len(tensors[0])
    part = max(1, _PART * images // max(1, *(t.numel() for t in tensors)))
    whole = tensors[0].device.type != "cpu" or torch.is_grad_enabled() or part >= images
    if whole:
        return [tensors]
    return list(zip(*(t.split(part) for t in tensors), strict=True))


def by_parts(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function(*tensors), each image of which depends on that image of the tensors alone."""
    parts = [function(*part) for part in _in_parts(*tensors)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def write_by_parts(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """As `by_parts`, with a result like the first tensor: each part is rounded as it is written."""
    parts = _in_parts(*tensors)
    if len(parts) == 1:
        y = function(*tensors)
        # No cast that would be none: compiled by torch 2.11, it cuts the gradient off.
        return y if y.dtype == tensors[0].dtype else y.to(tensors[0].dtype)
    out = torch.empty_like(tensors[0])
    for target, part in zip(out.split(len(parts[0][0])), parts, strict=True):
        target.copy_(function(*part))
    return out


def collect(r: Tensor | None, terms: Callable[..., list[Tensor]], *tensors: Tensor) -> Tensor:
    """sum_i r_ik t_i over images and positions: [T, K, C], for the T terms [N, C, L] of tensors."""
    if r is not None and r.dim() == 3:

        def by_position(r: Tensor, *part: Tensor) -> Tensor:
            return torch.stack([matmul(r, t.transpose(1, 2)) for t in terms(*part)], dim=1)

        return by_parts(by_position, r, *tensors).sum(0)

    def by_image(*part: Tensor) -> Tensor:
        return torch.stack([t.sum(2) for t in terms(*part)], dim=1)

    sums = by_parts(by_image, *tensors)
    if r is None:
        return sums.sum(0)[:, None]
    return matmul(r.T, sums.flatten(1)).unflatten(1, sums.shape[1:]).transpose(0, 1)


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


class ImageMoments(NamedTuple):
    """Mean and mean square over its positions of each image, around `shift` [C]: [N, C] each."""

    first: Tensor
    second: Tensor
    shift: Tensor

    @property
    def both(self) -> Tensor:
        """First and second, side by side: [N, 2 C]."""
        return torch.cat([self.first, self.second], dim=1)


def image_moments(x: Tensor, shift: Tensor | None = None) -> ImageMoments:
    """The moments of each image of x [N, C, L], around `shift` or a point near the batch's mean.

    That is the mean of the first image: D away from the mean of N images, it makes the variance
    at least D^2 / N, so that what cancels when squares are expanded around it stays bounded.
    (For one Gaussian. Components that lie D standard deviations apart lose D^2 of float32's
    precision in their variances: a thousandth at D = 100.)
    """
    dtype = accumulation_dtype(x.dtype)
    if shift is None:
        shift = x[0].detach().mean(1, dtype=dtype)
    target = shift[:, None]

    def square(x: Tensor) -> Tensor:
        # The squared difference in one pass; averaged by us, because mse_loss has no dim.
        return F.mse_loss(x.to(dtype), target.expand_as(x), reduction="none").mean(2)

    return ImageMoments(x.mean(2, dtype=dtype) - shift, by_parts(square, x), shift)


def plain_sums(moments: ImageMoments) -> Sums:
    """The sums of one component that owns everything."""
    count = moments.first.new_full((1,), len(moments.first))
    return Sums(count, *(t.sum(0, keepdim=True) for t in moments[:2]))


def as_affine(
    mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Scale and offset of weight * (x - mean) / sqrt(var + eps) + bias, of the type of var."""
    scale = weight.to(var.dtype) * torch.rsqrt(var + eps)
    return scale, bias.to(var.dtype) - mean * scale


def affine_map(x: Tensor, r: Tensor | None, scale: Tensor, offset: Tensor) -> Tensor:
    """x_i * sum_k r_ik scale_k + sum_k r_ik offset_k, for scale and offset [K, C].

    The result is of the type of scale and offset.
    """
    if r is None or r.dim() == 2:
        y, a = spread(r, torch.cat([offset, scale], dim=1), x).chunk(2, dim=-2)
        if x.stride(1) == 1:  # faster in one pass, unless broadcast along what lies together
            return torch.addcmul(y, x.to(a.dtype), a)
        return x.to(a.dtype) * a + y
    y = spread(r, offset, x)
    if torch.is_grad_enabled():
        return torch.addcmul(y, x.to(y.dtype), spread(r, scale, x))
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
        share: [K], or [N, K] with r [N, K], for images that do not count alike.
        mean, var: moments of the components, [K, C], means relative to `shift`.
        weight, bias: [K, C], or [1, C] for all components.
        shift: [C].
        eps: added to the variance.
        sync: the moments are those of all ranks together, and so is their gradient. Gradients
            of weight and bias stay local.
    """
    if torch.compiler.is_compiling():
        r = None if r is None else hold(r)
        share, mean, var, shift = map(hold, (share, mean, var, shift))
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
    scale, offset = as_affine(mean, var, weight, bias, eps)
    return (centred * spread(r, scale, x) + spread(r, offset, x)).to(x.dtype)


def _moments_of(
    centred: Tensor, r: Tensor | None, share: Tensor, mean: Tensor, var: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance with their values unchanged, as functions of the input."""
    q = r if share.dim() == 1 else r * share
    first, second = collect(q, lambda c: [c, c.square()], centred)
    if share.dim() == 1:
        first, second = share[:, None] * first, share[:, None] * second
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
        scale, offset = as_affine(mean + shift, var, weight, bias, eps)
        if r is not None and r.dim() == 3:
            # Never a view: an activation may write into what this returns.
            return write_by_parts(
                lambda x, r: torch.addcmul(
                    spread(r, offset, x), x.to(scale.dtype), spread(r, scale, x)
                ),
                x,
                r,
            )
        if x.dtype == scale.dtype:
            return affine_map(x, r, scale, offset)
        tensors = (x,) if r is None else (x, r)
        return write_by_parts(lambda x, r=None: affine_map(x, r, scale, offset), *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.eps, ctx.sync = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        backward = partial(_backward, grad, *ctx.saved_tensors, eps=ctx.eps, sync=ctx.sync)
        # Not in any case: in a compiled graph, whose backward has no autocast (see
        # `training.build.compiled`), switching it off is an error of torch's.
        if not torch.is_autocast_enabled(grad.device.type):
            return backward()
        with torch.autocast(grad.device.type, enabled=False):
            return backward()

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

    def terms(g: Tensor, x: Tensor) -> list[Tensor]:
        g = g.to(dtype)
        return [g, g * (x.to(dtype) - shift[:, None])]

    dbias, moment = collect(r, terms, grad, x)
    dweight = torch.addcmul(moment, mean, dbias, value=-1) * inverse
    # Parameter gradients are of this rank's images; what the moments pass on is of all.
    own = [d.sum_to_size(p.shape).to(p.dtype) for d, p in ((dweight, weight), (dbias, bias))]
    if sync:
        dweight, dbias = distributed.sum_over_ranks(torch.stack([dweight, dbias]))
    if share.dim() == 1:
        q, factor = r, share[:, None] * scale
    else:
        q, factor = r * share, scale
    slope = factor * inverse * -dweight
    level = -torch.addcmul(factor * dbias, slope, mean + shift)

    def dx(x: Tensor, g: Tensor, r: Tensor | None = None, q: Tensor | None = None) -> Tensor:
        through = affine_map(x, q, slope, level)
        if twice:
            return torch.addcmul(through, g.to(dtype), spread(r, scale, x))
        return through.addcmul_(g.to(dtype), spread(r, scale, x))

    tensors = (x, grad) if r is None else (x, grad, r, q)
    write = dx if x.dtype == dtype else partial(write_by_parts, dx)
    return (write(*tensors), None, None, None, None, *own, None, None, None)
