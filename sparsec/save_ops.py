"""What a saved graph may call: fixed tables, searched by name. Nothing else in a file names code."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from sparsec.errors import LoadError, SpecError, nearest

_GROUPS = """
_reshape_alias _to_copy _unsafe_view adjoint alias atleast_1d atleast_2d atleast_3d broadcast_tensors broadcast_to
cat channel_shuffle chunk clone concat concatenate constant_pad_nd contiguous detach diag diag_embed diagonal expand
expand_as flatten flip fliplr flipud hstack movedim moveaxis mH mT narrow numpy_T pad permute pixel_shuffle
pixel_unshuffle ravel reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat_interleave replication_pad1d
replication_pad2d replication_pad3d reshape reshape_as roll rot90 select select_scatter slice slice_scatter split
split_with_sizes squeeze stack swapaxes swapdims t tensor_split tile to transpose type_as unbind unflatten unfold
unsqueeze view view_as view_as_complex view_as_real vsplit vstack hsplit
_adaptive_avg_pool2d _adaptive_avg_pool3d _convolution _log_softmax _native_batch_norm_legit_no_training _softmax
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d addbmm addcdiv
addcmul addmm addmv addr alpha_dropout avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bilinear bmm cdist
chain_matmul col2im conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution
cosine_similarity cross dot dropout einsum embedding feature_dropout ger glu grid_sampler grid_sampler_2d
grid_sampler_3d group_norm im2col affine_grid_generator inner instance_norm kron layer_norm linalg_cross
linalg_matmul linalg_multi_dot linalg_norm linalg_vecdot linalg_vector_norm linear log_softmax matmul max_pool1d
max_pool2d max_pool2d_with_indices max_pool3d mm mv native_batch_norm native_dropout native_group_norm
native_layer_norm norm normalize one_hot outer rms_norm scaled_dot_product_attention softmax tensordot
upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d
upsample_trilinear3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
_upsample_bilinear2d_aa _upsample_bicubic2d_aa vdot
__and__ __or__ __xor__ __lshift__ __rshift__ abs absolute acos acosh add angle arccos arcsin arctan arctan2 asin
asinh atan atan2 atanh bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor
bucketize ceil celu clamp clamp_max clamp_min clip complex conj conj_physical copysign cos cosh deg2rad digamma div
divide elu eq equal erf erfc erfinv exp exp2 expm1 fix float_power floor floor_divide fmax fmin fmod frac gcd ge
gelu greater greater_equal gt hardshrink hardsigmoid hardswish hardtanh heaviside hypot imag isclose isfinite isin
isinf isnan isneginf isposinf lcm ldexp le leaky_relu lerp less less_equal lgamma log log10 log1p log2 log_sigmoid
logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt masked_fill maximum minimum mish mul
multiply nan_to_num ne neg negative nextafter not_equal polar positive pow prelu rad2deg real reciprocal relu relu6
remainder resolve_conj resolve_neg round rrelu rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc sinh softplus
softshrink softsign special_erf special_expit sqrt square sub subtract tan tanh threshold true_divide trunc where
xlogy
all amax amin aminmax any argmax argmin argsort bincount count_nonzero cummax cummin cumprod cumsum diff dist gather
histc index index_add index_copy index_fill index_put index_select kthvalue logcumsumexp logsumexp masked_scatter
max mean median min mode msort nanmean nanmedian nansum nonzero prod scatter scatter_add scatter_reduce searchsorted
sort std std_mean sum take take_along_dim topk trace tril triu tril_indices triu_indices unique_consecutive var
var_mean
arange empty_like eye fill full full_like linspace logspace meshgrid new_empty new_full new_ones new_zeros ones
ones_like rand rand_like randint randn randn_like bernoulli multinomial scalar_tensor zeros zeros_like _assert_async
_assert_scalar _assert_tensor_metadata is_floating_point is_same_size item lift_fresh_copy _local_scalar_dense
sym_constrain_range_for_size sym_constrain_range sym_numel sym_size sym_storage_offset sym_stride size numel dim
_weight_norm _weight_norm_interface norm_except_dim pairwise_distance max_unpool2d fractional_max_pool2d lp_pool2d
lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell embedding_bag multi_head_attention_forward
linalg_inv linalg_solve linalg_det linalg_svd linalg_eigh linalg_qr linalg_cholesky linalg_pinv linalg_matrix_norm
linalg_matrix_power inverse det matrix_exp matrix_power frobenius_norm nuclear_norm fft_fft fft_ifft fft_rfft fft_irfft
fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_fftshift fft_ifftshift stft istft
hann_window hamming_window special_erfc special_erfinv special_i0 special_log_softmax special_softmax
block_diag cartesian_prod column_stack dstack row_stack narrow_copy rad2deg unsafe_chunk unsafe_split alias_copy
_fused_rms_norm _scaled_dot_product_attention_math _scaled_dot_product_flash_attention_for_cpu
"""

ATEN: frozenset[str] = frozenset(_GROUPS.split())
"""Names of ATen ops, every overload without side effects included. Absent on purpose: whatever opens files
(`from_file`), hands out raw memory (`set_`, `as_strided`, `empty_strided`), runs in place, or leaves the process."""

WRITE_BACK = "aten.copy_.default"
"""How export spells the new value of a buffer that the model itself writes; its target must be a plain buffer."""

OPERATORS: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name)
    for name in (
        "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "invert", "and_", "or_", "xor",
        "lshift", "rshift", "eq", "ne", "lt", "le", "gt", "ge", "not_", "getitem", "matmul",
    )
}  # fmt: skip

ATTRIBUTES = ("shape", "dtype", "device", "ndim", "T", "mT", "H", "mH", "real", "imag")
"""What `getattr` nodes of traced graphs may read from a tensor."""

METHODS = (
    "size", "dim", "numel", "float", "double", "half", "bfloat16", "int", "long", "bool", "cpu", "nelement",
    "ndimension",
)  # fmt: skip
"""Tensor methods beyond the names in ATEN that traced graphs may call."""

_TORCH: dict[str, Any] = {"torch": torch, "functional": F}
_SYMBOLIC = ("sym_max", "sym_min", "sym_float", "sym_int", "sym_ite", "sym_not", "sym_sum")
SPARSEC = ("conv", "conv_buckets", "embedding", "linear", "linear_buckets", "linear_prepacked", "max_pool")
"""Ops of our own. Those that follow packed indices are tied to a validated weight by the loader."""


def name_of(op: str, target: Any) -> str:
    """How a file spells the target of a call; SpecError when no table holds it."""
    if op == "call_method":
        spelled = f"method:{target}"
    elif isinstance(target, torch._ops.OpOverload):
        spelled = f"{target.namespace}.{target._schema.name.partition('::')[2]}.{target._overloadname}"
    else:
        spelled = _python_name(target)
    try:
        found = target_of(op, spelled)
    except LoadError as error:
        raise SpecError(
            f"the graph calls {target}, which a saved model cannot hold ({error}); "
            "save sparsec.dense_state_dict(cm) instead and compile after loading it"
        ) from error
    if found is not target and found != target:
        raise SpecError(f"the graph calls {target}, but its name {spelled!r} means {found}; save the dense state dict")
    return spelled


def _python_name(target: Any) -> str:
    name = getattr(target, "__name__", "")
    if target is getattr:
        return "python:getattr"
    if OPERATORS.get(name) is target:
        return f"operator:{name}"
    for prefix, module in _TORCH.items():
        if getattr(module, name, None) is target:
            return f"{prefix}:{name}"
    return f"python:{name or type(target).__name__}"


def target_of(op: str, spelled: str) -> Any:
    """The target behind a name of `name_of`; LoadError for every name outside the tables."""
    if op == "call_method":
        name = spelled.removeprefix("method:")
        if spelled == f"method:{name}" and (name in ATEN or name in METHODS) and hasattr(torch.Tensor, name):
            return name
        raise LoadError(f"a saved graph may not call the method {spelled!r:.80}")
    prefix, colon, name = spelled.partition(":")
    if not colon:
        return _overload(spelled)
    if prefix == "operator" and name in OPERATORS:
        return OPERATORS[name]
    if spelled == "python:getattr":
        return getattr
    if prefix in _TORCH and (name in ATEN or name in _SYMBOLIC) and hasattr(_TORCH[prefix], name):
        return getattr(_TORCH[prefix], name)
    raise LoadError(f"a saved graph may not call {spelled!r:.80}")


def _overload(spelled: str) -> Any:
    parts = spelled.split(".")
    if len(parts) != 3 or parts[0] not in ("aten", "sparsec"):
        raise LoadError(
            f"a saved graph may not call {spelled!r:.80}; its ops are aten.<name>.<overload> and sparsec ops"
        )
    namespace, name, overload = parts
    known = ATEN if namespace == "aten" else SPARSEC
    if spelled != WRITE_BACK and name not in known:
        raise LoadError(f"a saved graph may not call {spelled!r:.80}; {nearest(name, sorted(known), 3)}")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    if packet is None or overload not in packet.overloads():
        raise LoadError(f"this torch {torch.__version__} has no op {spelled!r:.80}")
    found = getattr(packet, overload)
    if found._schema.is_mutable and spelled != WRITE_BACK:
        raise LoadError(f"a saved graph may not call {spelled!r:.80}, which writes its arguments")
    return found
