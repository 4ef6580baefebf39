"""Who takes part in the attention benchmark: every backend, and torch's kernels used by hand.

A candidate is a function of q, k and v that gives out, or reasons why it takes no part. Ours and
flash-attn's come through `packed_attn.attention`, ours also with each of its two backwards: the
deterministic one is the split one. Beside them stand sdpa document by document, sdpa on the padded
batch, flash-attn 2 inside aten, and one dense causal kernel over the whole pack, which lets
documents see each other and is timed for scale only. cuDNN's ragged attention, which aten has for
nested tensors, takes no part: it faults on one document of 32k tokens (torch 2.11, cuDNN 9.19).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from packed_attn_kernels import interval_attention, plan_tiles, tile_problem
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from packed_attn import DocumentLayout, attention, backends
from packed_attn.request import checked_request
from packed_attn.visibility import Visibility
from tests.cases import Case, Inputs

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
OURS = "triton"
DETERMINISTIC, FUSED = "triton, deterministic", "triton, fused backward"
# Candidates that compile for a new shape, in groups that share kernels.
COMPILED = ((OURS, DETERMINISTIC, FUSED), ("flex",), ("flash4",))
# The padded batch of a skewed mix can be hundreds of times its tokens.
LARGEST_PADDED = 8
# A launch or more for each document: past this it measures the host.
MOST_DOCUMENTS = 256
# cuDNN builds a plan for each length, forward and backward, in a good part of a second.
MOST_LENGTHS = 8


@dataclass(frozen=True)
class Peer:
    """A candidate; `function` is None where there are reasons against it."""

    function: Function | None
    reasons: tuple[str, ...] = ()
    exact: bool = True


def peers(case: Case, inputs: Inputs, device: str) -> dict[str, Peer]:
    """All candidates for one case, by name."""
    layout = case.layout(device)
    found = {name: _backend(name, case, inputs, layout) for name in _backend_names(device)}
    ours = {
        OURS: found.pop(OURS),
        DETERMINISTIC: _backend(OURS, case, inputs, layout, deterministic=True),
    }
    ours[FUSED] = _fused(case, inputs, layout, ours[OURS].reasons)
    found["aten flash-attn 2"] = _aten(case, layout, device)
    found["sdpa per document"] = _per_document(case, layout, None)
    if device == "cuda":
        cudnn = _per_document(case, layout, SDPBackend.CUDNN_ATTENTION)
        found["cudnn per document"] = cudnn
    found["sdpa padded"] = _padded(case, layout)
    found["dense, contaminated"] = _contaminated(case)
    return ours | found


@contextmanager
def compiling_each_shape() -> Iterator[None]:
    """Lets torch.compile make a kernel for each shape, as a user with one shape would have it, and
    a backward that runs several times.

    By default it makes one with symbolic sizes from the second shape on, and after eight runs
    without compiling: FlexAttention would then hold all scores in memory.
    """
    import torch._functorch.config

    each_shape = torch._dynamo.config.patch(
        automatic_dynamic_shapes=False,
        recompile_limit=1000,
        accumulated_recompile_limit=1000,
        fail_on_recompile_limit_hit=True,
    )
    with each_shape, torch._functorch.config.patch(donated_buffer=False):
        yield


def _backend_names(device: str) -> list[str]:
    """The reference is far too slow for real lengths, and toys are for the code alone."""
    return [name for name in backends.BACKENDS if name != "reference" or device == "cpu"]


def _backend(
    name: str, case: Case, inputs: Inputs, layout: DocumentLayout, *, deterministic: bool = False
) -> Peer:
    options = {**case.kwargs(), **inputs.kwargs(), "sinks": inputs.sinks}
    options["deterministic"] = deterministic
    request = checked_request(
        inputs.q,
        inputs.k,
        inputs.v,
        layout,
        key_layout=None,
        return_lse=False,
        confine_nonfinite=False,
        **options,
    )
    reasons = backends.load(name).reasons_against(request)
    if reasons:
        return Peer(None, tuple(reasons))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, layout, backend=name, **options)

    return Peer(run)


def _fused(case: Case, inputs: Inputs, layout: DocumentLayout, reasons: tuple[str, ...]) -> Peer:
    """Our kernels with the fused backward, whichever one `attention` takes."""
    if reasons:
        return Peer(None, reasons)
    seen = case_mask(case, layout)
    vectors = (seen.key_start, seen.key_stop, seen.query_start, seen.query_stop)
    problem = tile_problem(inputs.q, inputs.k, inputs.v, halves=seen.halves, backward="fused")
    tiles = plan_tiles(*vectors, problem)
    slopes = inputs.alibi_slopes

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return interval_attention(
            q,
            k,
            v,
            *vectors,
            softmax_scale=case.softmax_scale or case.head_dim**-0.5,
            softcap=case.softcap,
            sinks=inputs.sinks,
            alibi_slopes=slopes,
            positions=(seen.query_position, seen.key_position),
            halves=seen.halves,
            backward="fused",
            tiles=tiles,
        )[0]

    return Peer(run)


def case_mask(case: Case, layout: DocumentLayout) -> Visibility:
    """The mask of a case as intervals."""
    return layout.visibility(
        case.causal,
        case.window_size,
        chunk_size=case.chunk_size,
        prefix_lengths=case.prefix_lengths,
    )


def _aten(case: Case, layout: DocumentLayout, device: str) -> Peer:
    """flash-attn 2 as torch carries it, with grouped queries, which torch < 2.12 hides."""
    reasons = _beyond_documents(case, windows=False)
    if device != "cuda":
        reasons.append("runs on CUDA only")
    if case.value_head_dim not in (None, case.head_dim):
        reasons.append("has one head_dim for q, k and v")
    if case.dtype == torch.float32:
        reasons.append("takes half precision only")
    if reasons:
        return Peer(None, tuple(reasons))
    cu, longest = layout.cu_seqlens, layout.max_seqlen
    left, right = case.window_size

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.aten._flash_attention_forward(
            q, k, v, cu, cu, longest, longest, 0.0, case.causal, False,
            scale=case.softmax_scale,
            window_size_left=None if left < 0 else left,
            window_size_right=None if right < 0 else right,
        )[0]  # fmt: skip

    return Peer(run)


def _per_document(case: Case, layout: DocumentLayout, kernel: SDPBackend | None) -> Peer:
    reasons = _beyond_documents(case, windows=True)
    if layout.num_documents > MOST_DOCUMENTS:
        reasons.append(f"launches for each of {layout.num_documents} documents")
    if kernel == SDPBackend.CUDNN_ATTENTION and len(set(layout.lengths)) > MOST_LENGTHS:
        reasons.append(f"builds a plan for each of {len(set(layout.lengths))} lengths")
    if reasons:
        return Peer(None, tuple(reasons))
    lengths = list(layout.lengths)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.split(lengths) for x in (q, k, v)))
        with _only(kernel):
            return torch.cat([_sdpa(case, *(x[None] for x in part))[0] for part in parts])

    return Peer(run)


def _padded(case: Case, layout: DocumentLayout) -> Peer:
    """Right padding cannot reach a causal document, so the kernel is as exact as it is alone."""
    reasons = _beyond_documents(case, windows=True)
    if not case.causal:
        reasons.append("padding reaches documents that look both ways")
    padded = layout.max_seqlen * layout.num_documents
    if padded > LARGEST_PADDED * layout.total_tokens:
        reasons.append(f"the padded batch has {padded} tokens for {layout.total_tokens}")
    if reasons:
        return Peer(None, tuple(reasons))
    place = layout.document_ids.long() * layout.max_seqlen + layout.position_ids

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = []
        for x in (q, k, v):
            rows = x.new_zeros(padded, *x.shape[1:]).index_copy(0, place, x)
            batch.append(rows.view(layout.num_documents, layout.max_seqlen, *x.shape[1:]))
        return _sdpa(case, *batch).flatten(0, 1).index_select(0, place)

    return Peer(run)


def _contaminated(case: Case) -> Peer:
    """One kernel over the pack as if it were one document: the speed of attending wrongly."""
    reasons = [] if case.softcap is None and not case.sinks else ["sdpa has no softcap, no sinks"]
    if reasons:
        return Peer(None, tuple(reasons), exact=False)
    return Peer(lambda q, k, v: _sdpa(case, q[None], k[None], v[None])[0], exact=False)


def _beyond_documents(case: Case, windows: bool) -> list[str]:
    """What of the case is more than a causal or full mask per document."""
    has = {
        "softcap": case.softcap is not None,
        "sinks": case.sinks,
        "ALiBi": case.alibi,
        "bias": case.bias_reach is not None,
        "key sets": case.num_selected is not None,
        "chunks": case.chunk_size is not None,
        "forests": case.parents is not None,
        "prefixes": case.prefix_lengths is not None,
        "windows": windows and any(side > 0 for side in case.window_size),
    }
    return [f"has no {what}" for what, wanted in has.items() if wanted]


def _sdpa(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`[batch, tokens, heads, dim]` in and out."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped: dict[str, Any] = {"enable_gqa": True} if case.num_heads != case.num_kv_heads else {}
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=case.causal, scale=case.softmax_scale, **grouped
    )
    return out.transpose(1, 2)


def _only(kernel: SDPBackend | None) -> AbstractContextManager[Any]:
    return nullcontext() if kernel is None else sdpa_kernel([kernel])
