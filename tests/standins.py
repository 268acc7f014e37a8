# pyright: basic, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportCallIssue=false
"""Stand-ins for packages that need a GPU: the signatures of the real ones, checks of what they are given, and attention
in tensor operations, so that an adapter's output and gradients can be checked on a CPU."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import torch


def attend(q_BHNd, k_BGMd, v_BGMd, causal, scale):
    """Attention in float32, mask to the bottom right; zeros for queries that see no key."""
    group, scale = q_BHNd.shape[1] // k_BGMd.shape[1], q_BHNd.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = q_BHNd.float(), k_BGMd.float().repeat_interleave(group, 1), v_BGMd.float().repeat_interleave(group, 1)
    scores = q @ k.transpose(-2, -1) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(k.shape[-2] - q.shape[-2] + 1)
        blind = hidden.all(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(hidden & ~blind, -math.inf), -1) * ~blind
        return (weights @ v).to(q_BHNd.dtype)
    return (torch.softmax(scores, -1) @ v).to(q_BHNd.dtype)


def attend_BNHd(q, k, v, causal, scale):
    for tensor in (q, k, v):
        assert tensor.dim() == 4
        assert tensor.stride(-1) == 1
    assert q.shape[0] == k.shape[0]
    assert k.shape == v.shape
    return attend(*(x.transpose(1, 2) for x in (q, k, v)), causal, scale).transpose(1, 2)


def sixteen_bit(*tensors):
    assert all(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors)


# --- flash-attention: flash_attn/flash_attn_interface.py, hopper/flash_attn_interface.py, flash_attn/cute/interface.py ---

asked: list[dict] = []


def flash_attn_2(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    sixteen_bit(q, k, v)
    asked.append({"deterministic": deterministic})
    return attend_BNHd(q, k, v, causal, softmax_scale)


def flash_attn_3(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False,
):  # fmt: skip
    sixteen_bit(q, k, v)
    asked.append({"deterministic": deterministic})
    return attend_BNHd(q, k, v, causal, softmax_scale)


def flash_attn_4(
    q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
    learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
    score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
    block_sparse_tensors_bwd=None, return_lse=False,
):  # fmt: skip
    sixteen_bit(q, k, v)
    asked.append({"deterministic": deterministic})
    return attend_BNHd(q, k, v, causal, softmax_scale), None


# --- xFormers: xformers/ops/fmha/__init__.py and attn_bias.py ---------------------------------------------------------


class LowerTriangularMask:
    pass


class LowerTriangularFromBottomRightMask(LowerTriangularMask):
    pass


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    assert query.dim() == key.dim() == value.dim()
    assert query.shape[2:-1] == key.shape[2:-1], "heads are not broadcast"
    if type(attn_bias) is LowerTriangularMask:
        assert query.shape[1] == key.shape[1], "it is aligned to the top left"
    flat = (x.flatten(2, -2) for x in (query, key, value))
    return attend_BNHd(*flat, attn_bias is not None, scale).reshape(query.shape)


# --- Transformer Engine: transformer_engine/pytorch/attention/dot_product_attention/dot_product_attention.py ----------


class DotProductAttention(torch.nn.Module):
    def __init__(
        self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0, qkv_format="sbhd",
        attn_mask_type="causal", window_size=None, bottom_right_diagonal=None, sequence_parallel=False, tp_size=1,
        get_rng_state_tracker=None, tp_group=None, layer_number=None, attention_type="self", cp_group=None,
        cp_global_ranks=None, cp_stream=None, cp_comm_type="p2p", softmax_scale=None, softmax_type="vanilla",
        return_max_logit=False, name=None,
    ):  # fmt: skip
        super().__init__()
        assert attn_mask_type in ("no_mask", "causal", "causal_bottom_right")
        assert attention_dropout == 0.0
        self.shape = (num_attention_heads, num_gqa_groups, kv_channels)
        self.format, self.mask, self.kind, self.scale = qkv_format, attn_mask_type, attention_type, softmax_scale

    def forward(self, query_layer=None, key_layer=None, value_layer=None, attention_mask=None, qkv_format=None):
        assert self.format == "bshd"
        assert self.shape == (query_layer.shape[2], key_layer.shape[2], query_layer.shape[3])
        equal = query_layer.shape[1] == key_layer.shape[1]
        assert self.kind == ("self" if equal else "cross")
        assert equal or self.mask != "causal", "it is aligned to the top left"
        return attend_BNHd(query_layer, key_layer, value_layer, self.mask != "no_mask", self.scale).flatten(2)


# --- FlashInfer: flashinfer/prefill.py --------------------------------------------------------------------------------


class BatchPrefillWithRaggedKVCacheWrapper:
    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, backend="auto"):
        assert float_workspace_buffer.dtype == torch.uint8
        assert float_workspace_buffer.numel() >= 128 << 20
        assert kv_layout == "NHD"

    def plan(
        self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo=None, custom_mask=None,
        packed_custom_mask=None, causal=False, pos_encoding_mode="NONE", use_fp16_qk_reduction=False, window_left=-1,
        logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None, q_data_type="float16", kv_data_type=None,
    ):  # fmt: skip
        assert not hasattr(self, "causal"), "planned once"
        assert qo_indptr.dtype == kv_indptr.dtype == torch.int32
        self.starts = (qo_indptr.tolist(), kv_indptr.tolist())
        self.heads, self.causal, self.scale, self.dtype = (num_qo_heads, num_kv_heads), causal, sm_scale, q_data_type

    def run(self, q, k, v, *args, out=None, lse=None, return_lse=False):
        assert q.dtype == self.dtype
        assert (q.shape[1], k.shape[1]) == self.heads
        pieces = []
        for i in range(len(self.starts[0]) - 1):
            rows, keys = (slice(*starts[i : i + 2]) for starts in self.starts)
            pieces.append(attend_BNHd(q[None, rows], k[None, keys], v[None, keys], self.causal, self.scale)[0])
        return torch.cat(pieces)


# --- cuDNN's frontend: python/cudnn/__init__.py, python/pygraph/sdpa.cpp, samples/python/50 and 51 --------------------


@dataclass(eq=False)
class Node:
    """A tensor of a graph: what is set of it, in the frontend's chained style."""

    dim: tuple = ()
    stride: tuple = ()
    data_type: object = None
    output: bool = False

    def set_output(self, value):
        self.output = value
        return self

    def set_dim(self, dim):
        self.dim = tuple(dim)
        return self

    def set_stride(self, stride):
        self.stride = tuple(stride)
        return self

    def set_data_type(self, data_type):
        self.data_type = data_type
        return self


REFUSED_HEAD_DIM = 248


@dataclass(eq=False)
class pygraph:  # noqa: N801 - its name there
    io_data_type: object = None
    intermediate_data_type: object = None
    compute_data_type: object = None
    handle: object = None
    done: list = field(default_factory=list)
    inputs: tuple = ()
    out: Node | None = None
    stats: Node | None = None
    grads: tuple = ()
    causal: bool = False
    scale: float = 0.0

    def tensor(
        self, dim, stride, data_type=None, is_virtual=False, is_pass_by_value=False, ragged_offset=None,
        reordering_type=None, name="", uid=-1,
    ):  # fmt: skip
        return Node(tuple(dim), tuple(stride), data_type)

    def sdpa(
        self, q, k, v, is_inference=None, attn_scale=None, bias=None, block_mask=None, use_alibi_mask=False,
        use_padding_mask=False, seq_len_q=None, seq_len_kv=None, use_causal_mask=False,
        use_causal_mask_bottom_right=False, sliding_window_length=None, name="",
    ):  # fmt: skip
        self.inputs, self.scale = (q, k, v), attn_scale
        self.causal = self._mask(use_causal_mask, use_causal_mask_bottom_right)
        self.out, self.stats = Node(), None if is_inference else Node()
        return self.out, self.stats

    def sdpa_backward(
        self, q, k, v, o, dO, stats, attn_scale=None, bias=None, dBias=None, use_alibi_mask=False,
        use_padding_mask=False, seq_len_q=None, seq_len_kv=None, max_total_seq_len_q=None, max_total_seq_len_kv=None,
        use_causal_mask=False, use_causal_mask_bottom_right=False, sliding_window_length=None,
        use_deterministic_algorithm=False, name="",
    ):  # fmt: skip
        asked.append({"deterministic": use_deterministic_algorithm})
        self.inputs, self.scale = (q, k, v, o, dO, stats), attn_scale
        self.causal = self._mask(use_causal_mask, use_causal_mask_bottom_right)
        self.grads = tuple(Node() for _ in range(3))
        return self.grads

    def _mask(self, top_left, bottom_right):
        assert not (top_left and bottom_right)
        q, k = self.inputs[:2]
        assert not top_left or q.dim[2] == k.dim[2]
        return top_left or bottom_right

    def validate(self):
        self.done.append("validate")

    def build_operation_graph(self):
        self.done.append("build_operation_graph")

    def create_execution_plans(self, heuristics):
        self.done.append("create_execution_plans")

    def build_plans(self):
        self.done.append("build_plans")

    def check_support(self):
        if self.inputs[0].dim[3] == REFUSED_HEAD_DIM:
            raise RuntimeError("No valid engine configs\nfor this graph")
        self.done.append("check_support")

    def get_workspace_size(self):
        return 16

    def execute(self, tensor_to_device_buffer, workspace, handle=None):
        assert self.done == [
            "validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans",
        ]  # fmt: skip
        assert handle == "handle"
        assert workspace.numel() == 16
        for node, tensor in tensor_to_device_buffer.items():
            assert node.dim == tuple(tensor.shape)
            assert node.stride == tensor.stride()
        given = [tensor_to_device_buffer[node] for node in self.inputs]
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in given[:3])
            out = attend(q, k, v, self.causal, self.scale)
        if len(given) == 3:
            tensor_to_device_buffer[self.out].copy_(out.detach())
            if self.stats:
                assert self.stats.output
                tensor_to_device_buffer[self.stats].zero_()
            return
        torch.testing.assert_close(given[3], out.detach(), rtol=2e-2, atol=2e-2)
        for node, grad in zip(self.grads, torch.autograd.grad(out, (q, k, v), given[4]), strict=True):
            assert node.output
            tensor_to_device_buffer[node].copy_(grad)


def module(name: str, **contents: object) -> ModuleType:
    found = ModuleType(name)
    found.__dict__.update(contents, __version__="9.9")
    return found


def install(monkeypatch) -> None:
    """Puts all of them in the place of the real ones, until the test ends."""
    asked.clear()
    types = SimpleNamespace(HALF="half", BFLOAT16="bfloat16", FLOAT="float")
    cudnn = {
        "data_type": types,
        "heur_mode": SimpleNamespace(A="a", FALLBACK="fallback"),
        "pygraph": pygraph,
        "create_handle": lambda: "handle",
        "set_stream": lambda handle, stream: None,
    }
    bias = {kind.__name__: kind for kind in (LowerTriangularMask, LowerTriangularFromBottomRightMask)}
    modules = [
        module("flash_attn", flash_attn_func=flash_attn_2),
        module("flash_attn.flash_attn_interface", flash_attn_func=flash_attn_2),
        module("flash_attn_interface", flash_attn_func=flash_attn_3),
        module("flash_attn.cute", flash_attn_func=flash_attn_4),
        module("xformers"),
        module("xformers._cpp_lib", _cpp_library_load_exception=None),
        module("xformers.ops", memory_efficient_attention=memory_efficient_attention),
        module("xformers.ops.fmha"),
        module("xformers.ops.fmha.attn_bias", **bias),
        module("transformer_engine"),
        module("transformer_engine.pytorch", DotProductAttention=DotProductAttention),
        module("flashinfer", BatchPrefillWithRaggedKVCacheWrapper=BatchPrefillWithRaggedKVCacheWrapper),
        module("cudnn", **cudnn),
    ]
    for found in modules:
        monkeypatch.setitem(sys.modules, found.__name__, found)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
