"""The table of named attention cases that tests, benchmarks and tuning share.

`SMALL` cases have at most a few hundred tokens and run in an interpreter; `COMBINED` cases are as
small and cross every modifier with every mask; `REAL` cases have the shapes of released models on
the layouts of real batches and are for GPUs and benchmarks.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from packed_attn import DocumentLayout


@dataclass(frozen=True, eq=False)
class Inputs:
    """The tensors of one call and of its backward pass.

    Shapes: q `[total_queries, num_heads, head_dim]`, k `[total_keys, num_kv_heads, head_dim]`,
    v `[total_keys, num_kv_heads, value_head_dim]`, grad_out `[total_queries, num_heads,
    value_head_dim]`, grad_lse `[num_heads, total_queries]` or None, sinks and alibi_slopes
    `[num_heads]` or None, bias and key_indices as in `attention` or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    bias: Tensor | None
    key_indices: Tensor | None

    def kwargs(self) -> dict[str, Tensor | None]:
        """The keyword arguments of `attention` that are tensors, sinks aside."""
        return {
            "alibi_slopes": self.alibi_slopes,
            "bias": self.bias,
            "key_indices": self.key_indices,
        }


@dataclass(frozen=True)
class Case:
    """One call of `attention`: a layout, a mask, score modifiers, a shape and a dtype.

    Fields are the arguments of `DocumentLayout.from_lengths` and `attention`; besides:

    key_lengths: cross attention with these documents on the key side.
    value_head_dim: None is head_dim.
    sinks, alibi: whether there are any.
    bias_reach: the largest position difference with a bias of its own.
    num_selected: keys that each query names, out of all and two that are none.
    lse_gradient: whether the loss depends on lse too.
    strided: q, k and v are views of one fused projection, and the gradient of out is not
        contiguous either.
    heavy_tailed: inputs are normal times log-normal.
    """

    name: str
    lengths: tuple[int, ...]
    parents: tuple[int, ...] | None = None
    padding: tuple[bool, ...] | None = None
    key_lengths: tuple[int, ...] | None = None
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    value_head_dim: int | None = None
    causal: bool = True
    window_size: tuple[int, int] = (-1, -1)
    chunk_size: int | None = None
    prefix_lengths: tuple[int, ...] | None = None
    softmax_scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    bias_reach: int | None = None
    num_selected: int | None = None
    dropout_p: float = 0.0
    lse_gradient: bool = False
    strided: bool = False
    heavy_tailed: bool = False
    dtype: torch.dtype = torch.float32

    def layout(self, device: torch.device | str = "cpu") -> DocumentLayout:
        """The documents of q, and of k and v without `key_lengths`."""
        return DocumentLayout.from_lengths(
            self.lengths, parents=self.parents, padding=self.padding, device=device
        )

    def key_layout(self, device: torch.device | str = "cpu") -> DocumentLayout | None:
        """The documents of k and v in cross attention."""
        if self.key_lengths is None:
            return None
        return DocumentLayout.from_lengths(self.key_lengths, padding=self.padding, device=device)

    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments of `attention` that are plain values."""
        return {
            "causal": self.causal,
            "window_size": self.window_size,
            "chunk_size": self.chunk_size,
            "prefix_lengths": self.prefix_lengths,
            "softmax_scale": self.softmax_scale,
            "softcap": self.softcap,
            "dropout_p": self.dropout_p,
        }

    def dropout_seed(self, device: torch.device | str = "cpu") -> Tensor | None:
        """One seed for all backends, with bits in both of its words."""
        if self.dropout_p == 0.0:
            return None
        return torch.tensor([0x0123_4567_89AB_CDEF], device=device)

    def inputs(
        self,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        drawn_on: torch.device | str = "cpu",
    ) -> Inputs:
        """Random tensors, drawn on the CPU so that every device gets the same values; a benchmark
        draws its hundreds of millions on the GPU."""
        dtype = self.dtype if dtype is None else dtype
        generator = torch.Generator(drawn_on).manual_seed(seed)
        total_queries = sum(self.lengths)

        def draw(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=generator, device=drawn_on)
            if self.heavy_tailed:
                x = x * torch.randn(shape, generator=generator, device=drawn_on).exp()
            # Rounded to the case's dtype first: an oracle in float64 reads the same numbers.
            return x.to(self.dtype).to(device=device, dtype=dtype)

        def per_head(values: Tensor, wanted: bool) -> Tensor | None:
            return values.to(device=device, dtype=torch.float32) if wanted else None

        q, k, v = self._draw_qkv(draw)
        grad_out = draw(self.num_heads, total_queries, v.shape[-1]).transpose(0, 1)
        grad_lse = draw(self.num_heads, total_queries).to(torch.promote_types(dtype, torch.float32))
        slopes = 2.0 ** (-8.0 * torch.arange(1, self.num_heads + 1) / self.num_heads)
        return Inputs(
            q,
            k,
            v,
            grad_out if self.strided else grad_out.contiguous(),
            grad_lse if self.lse_gradient else None,
            per_head(torch.randn(self.num_heads, generator=generator, device=drawn_on), self.sinks),
            per_head(slopes, self.alibi),
            *self._draw_sets(generator, k.shape[0], device),
        )

    def _draw_sets(
        self, generator: torch.Generator, keys: int, device: torch.device | str
    ) -> tuple[Tensor | None, Tensor | None]:
        """bias and key_indices."""
        bias = indices = None
        if self.bias_reach is not None:
            shape = self.num_heads, 2 * self.bias_reach + 1
            bias = torch.randn(shape, generator=generator, device=generator.device).to(device)
        if self.num_selected is not None:
            shape = sum(self.lengths), self.num_selected
            drawn = torch.randint(-1, keys + 1, shape, generator=generator, device=generator.device)
            indices = drawn.to(device)
        return bias, indices

    def _draw_qkv(self, draw: Any) -> tuple[Tensor, Tensor, Tensor]:
        queries = sum(self.lengths)
        keys = queries if self.key_lengths is None else sum(self.key_lengths)
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if self.strided:
            fused = draw(queries, heads + 2 * kv_heads, self.head_dim)
            q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
            return q, k, v
        value_head_dim = self.value_head_dim or self.head_dim
        return (
            draw(queries, heads, self.head_dim),
            draw(keys, kv_heads, self.head_dim),
            draw(keys, kv_heads, value_head_dim),
        )

    def first(self, documents: int) -> Case:
        """The same case with no more than its first documents."""

        def cut(values: tuple[Any, ...] | None) -> Any:
            return None if values is None else values[:documents]

        return replace(
            self,
            lengths=cut(self.lengths),
            parents=cut(self.parents),
            padding=cut(self.padding),
            key_lengths=cut(self.key_lengths),
            prefix_lengths=cut(self.prefix_lengths),
        )

    def shortened(self, divisor: int) -> Case:
        """The same case with documents, windows and chunks shorter by `divisor`, rounded up."""

        def short(n: int) -> int:
            return math.ceil(n / divisor) if n > 0 else n

        def each(ns: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(short(n) for n in ns)

        return replace(
            self,
            name=f"{self.name}/shortened",
            lengths=each(self.lengths),
            key_lengths=None if self.key_lengths is None else each(self.key_lengths),
            window_size=(short(self.window_size[0]), short(self.window_size[1])),
            chunk_size=None if self.chunk_size is None else short(self.chunk_size),
            prefix_lengths=None if self.prefix_lengths is None else each(self.prefix_lengths),
        )


def log_normal_lengths(total: int, median: float, sigma: float, seed: int = 0) -> tuple[int, ...]:
    """Log-normal document lengths that add to `total`; the last one is cut to fit."""
    rng = random.Random(seed)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(left, max(1, round(rng.lognormvariate(math.log(median), sigma)))))
    return tuple(lengths)


BF16, FP16 = torch.bfloat16, torch.float16

MIXED = (5, 1, 17, 64, 3, 33)
# A tree of trees: 0 continues to 1 (with 2 and 3 below it) and 4; then a plain document; then 6
# with the empty answer 7 and the answer 8 that goes on from an empty document.
NESTED = {
    "lengths": (20, 7, 9, 1, 13, 6, 11, 0, 5),
    "parents": (-1, 0, 1, 1, 0, -1, -1, 6, 7),
}
# No queries, no keys, more keys, more queries, equal, neither.
CROSS = {"lengths": (9, 0, 5, 21, 8, 0, 1), "key_lengths": (0, 6, 30, 4, 8, 0, 19)}

SMALL: tuple[Case, ...] = (
    # Layouts, causal.
    Case("mixed", MIXED),
    Case("one_document", (77,)),
    Case("one_token", (1,)),
    Case("length_one_documents", (1,) * 50),
    Case("hundreds_of_tiny", (1, 2) * 75),
    Case("longer_than_a_tile", (7, 150, 20)),
    Case("two_longer_than_a_tile", (131, 1, 129)),
    Case("empty_documents", (0, 9, 0, 0, 31, 1, 0)),
    Case("one_token_among_empty", (0, 0, 1, 0)),
    Case("no_tokens", (0, 0)),
    Case("no_documents", ()),
    Case("padding_last", (30, 11, 23), padding=(False, False, True)),
    Case("padding_between", (3, 25, 40, 14, 2), padding=(True, False, True, False, True)),
    Case("all_padding", (12, 5), padding=(True, True)),
    # Heads and head sizes.
    Case("multi_query", MIXED, num_kv_heads=1),
    Case("equal_heads", MIXED, num_heads=3, num_kv_heads=3),
    Case("group_of_three", MIXED, num_heads=6, num_kv_heads=2),
    Case("one_head", MIXED, num_heads=1, num_kv_heads=1),
    Case("head_dim_16", MIXED, head_dim=16),
    Case("head_dim_64", MIXED, num_heads=2, head_dim=64),
    Case("head_dim_72", MIXED, num_heads=2, num_kv_heads=1, head_dim=72),
    Case("head_dim_96", MIXED, num_heads=2, num_kv_heads=1, head_dim=96),
    Case("head_dim_128", MIXED, num_heads=2, num_kv_heads=1, head_dim=128),
    Case("head_dim_256", (40, 9), num_heads=2, num_kv_heads=1, head_dim=256),
    Case("value_head_dim_smaller", MIXED, head_dim=48, value_head_dim=32),
    Case("value_head_dim_larger", MIXED, head_dim=16, value_head_dim=64),
    Case("strided", MIXED, strided=True),
    Case("strided_one_kv_head", MIXED, strided=True, num_kv_heads=1, head_dim=64),
    # Masks.
    Case("bidirectional", MIXED, causal=False),
    Case("bidirectional_tiny", (1, 2) * 40, causal=False),
    Case("window_left", MIXED, window_size=(7, 0)),
    Case("window_left_long", (150, 30), window_size=(40, 0)),
    Case("window_of_one", MIXED, window_size=(0, 0)),
    Case("window_longer_than_all", MIXED, window_size=(1000, 0)),
    Case("window_both", MIXED, causal=False, window_size=(5, 3)),
    Case("window_right", MIXED, causal=False, window_size=(-1, 4)),
    Case("window_left_bidirectional", MIXED, causal=False, window_size=(6, -1)),
    Case("chunk", MIXED, chunk_size=16),
    Case("chunk_of_one", MIXED, chunk_size=1),
    Case("chunk_bidirectional", MIXED, causal=False, chunk_size=10),
    Case("chunk_window", MIXED, chunk_size=16, window_size=(9, 0)),
    Case("prefix", MIXED, prefix_lengths=(2, 0, 17, 20, 1, 40)),
    Case("prefix_window", MIXED, prefix_lengths=(2, 0, 17, 20, 1, 40), window_size=(9, 0)),
    Case("prefix_chunk", MIXED, prefix_lengths=(2, 0, 17, 20, 1, 40), chunk_size=12),
    # Score modifiers.
    Case("softmax_scale", MIXED, softmax_scale=0.31),
    Case("softcap", MIXED, softcap=3.0),
    Case("softcap_window", MIXED, softcap=3.0, window_size=(7, 0)),
    Case("sinks", MIXED, sinks=True),
    Case("sinks_window", MIXED, sinks=True, window_size=(7, 0)),
    Case("sinks_padding", (30, 11), padding=(False, True), sinks=True),
    Case("sinks_all_padding", (4, 11), padding=(True, True), sinks=True),
    Case("alibi", MIXED, alibi=True),
    Case("alibi_bidirectional", MIXED, alibi=True, causal=False),
    Case("bias", MIXED, bias_reach=6),
    Case("bias_bidirectional", MIXED, bias_reach=40, causal=False),
    Case("bias_softcap_sinks", MIXED, bias_reach=0, softcap=3.0, sinks=True),
    Case("key_sets", MIXED, num_selected=20),
    Case("key_sets_sinks", MIXED, num_selected=5, sinks=True, window_size=(20, 0)),
    Case("key_sets_bidirectional", (70, 150, 33), num_selected=40, causal=False),
    Case("everything", MIXED, window_size=(11, 0), softcap=5.0, sinks=True, softmax_scale=0.2),
    Case("dropout", MIXED, dropout_p=0.2),
    Case("dropout_long", (150, 30), dropout_p=0.5, causal=False),
    Case("dropout_everything", MIXED, dropout_p=0.1, window_size=(11, 0), softcap=5.0, sinks=True),
    Case("dropout_lse_gradient", MIXED, dropout_p=0.3, lse_gradient=True, num_kv_heads=1),
    Case("lse_gradient", MIXED, lse_gradient=True),
    Case("lse_gradient_sinks_softcap", MIXED, lse_gradient=True, sinks=True, softcap=3.0),
    Case("lse_gradient_padding", (19, 8, 6), padding=(False, True, False), lse_gradient=True),
    # Forests.
    Case("forest", (25, 8, 1, 14), parents=(-1, 0, 0, 0)),
    Case("forest_nested", **NESTED),
    Case("forest_of_roots", MIXED, parents=(-1,) * 6),
    Case("forest_chain", (9, 6, 1, 30), parents=(-1, 0, 1, 2)),
    Case("forest_many_answers", (33, *(5,) * 24), parents=(-1, *(0,) * 24)),
    Case("forest_long", (140, 9, 30, 12), parents=(-1, 0, 0, -1)),
    Case("forest_window", **NESTED, window_size=(10, 0)),
    Case("forest_chunk", **NESTED, chunk_size=8),
    Case("forest_window_both", **NESTED, causal=False, window_size=(6, 2)),
    Case("forest_bidirectional", **NESTED, causal=False),
    Case("forest_sinks_softcap", **NESTED, sinks=True, softcap=3.0),
    Case("forest_alibi", **NESTED, alibi=True),
    Case("forest_bias", **NESTED, bias_reach=5),
    Case("forest_key_sets", **NESTED, num_selected=12),
    Case("forest_dropout", **NESTED, dropout_p=0.2),
    Case(
        "forest_padding",
        (12, 5, 7, 9),
        parents=(-1, 0, -1, -1),
        padding=(False, False, True, False),
    ),
    # Cross attention.
    Case("cross", **CROSS),
    Case("cross_bidirectional", **CROSS, causal=False),
    Case("cross_window", **CROSS, window_size=(5, 0)),
    Case("cross_window_both", **CROSS, causal=False, window_size=(5, 2)),
    Case("cross_chunk", **CROSS, chunk_size=7),
    Case("cross_sinks", **CROSS, sinks=True),
    Case("cross_alibi", **CROSS, alibi=True),
    Case("cross_bias", **CROSS, bias_reach=4),
    Case("cross_key_sets", **CROSS, num_selected=9),
    Case("cross_dropout", **CROSS, dropout_p=0.2),
    Case("cross_no_keys", (9, 4), key_lengths=(0, 0)),
    Case("cross_no_queries", (0, 0), key_lengths=(9, 4)),
    Case(
        "cross_padding",
        (9, 4, 8),
        key_lengths=(5, 6, 9),
        padding=(False, True, False),
        causal=False,
    ),
    # Half precision.
    Case("bf16", MIXED, dtype=BF16),
    Case("bf16_long", (150, 30), dtype=BF16, head_dim=64),
    Case("bf16_gemma2", MIXED, dtype=BF16, head_dim=64, softcap=5.0, window_size=(7, 0)),
    Case("bf16_gpt_oss", MIXED, dtype=BF16, head_dim=64, sinks=True, window_size=(7, 0)),
    Case("bf16_forest", **NESTED, dtype=BF16),
    Case("bf16_bidirectional", MIXED, dtype=BF16, causal=False),
    Case("bf16_dropout", MIXED, dtype=BF16, dropout_p=0.1),
    Case("bf16_value_head_dim", MIXED, dtype=BF16, head_dim=48, value_head_dim=32),
    Case("fp16", MIXED, dtype=FP16),
    Case("fp16_window", MIXED, dtype=FP16, head_dim=64, window_size=(7, 0)),
    Case("heavy_tailed", MIXED, heavy_tailed=True),
    Case(
        "heavy_tailed_head_dim_256",
        (40, 9),
        num_heads=2,
        num_kv_heads=1,
        head_dim=256,
        heavy_tailed=True,
        dtype=BF16,
    ),
)

SHORT = (9, 1, 26, 14)
TREE = {"lengths": (12, 9, 1, 20, 7), "parents": (-1, 0, 0, -1, 3)}
MODIFIERS: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "dropout": {"dropout_p": 0.25},
    "lse_gradient": {"lse_gradient": True},
    "heavy_tailed": {"heavy_tailed": True},
}
MASKS: dict[str, dict[str, Any]] = {
    "window": {"lengths": SHORT, "window_size": (5, 0)},
    "window_both": {"lengths": SHORT, "causal": False, "window_size": (4, 3)},
    "bidirectional": {"lengths": SHORT, "causal": False},
    "chunk": {"lengths": SHORT, "chunk_size": 8},
    "prefix": {"lengths": SHORT, "prefix_lengths": (3, 1, 30, 0)},
    "forest": TREE,
    "forest_window": {**TREE, "window_size": (6, 0)},
    "forest_chunk": {**TREE, "chunk_size": 8},
    "cross": {"lengths": SHORT, "key_lengths": (4, 0, 31, 14)},
    "cross_window": {"lengths": SHORT, "key_lengths": (4, 0, 31, 14), "window_size": (6, 0)},
    "padding": {"lengths": SHORT, "padding": (False, True, False, True)},
}
MLA = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 192, "value_head_dim": 128}

# Every modifier on every mask, head sizes in steps of 8, and what they meet in models.
COMBINED: tuple[Case, ...] = (
    *(Case(f"{m}/{n}", **MASKS[n], **MODIFIERS[m]) for m in MODIFIERS for n in MASKS),
    *(Case(f"head_dim/{d}", SHORT, num_heads=2, head_dim=d) for d in range(8, 257, 24)),
    Case("alibi_dropout_softcap_window", SHORT, alibi=True, dropout_p=0.1, softcap=4.0,
         window_size=(7, 0)),
    Case("alibi_dropout_softcap_forest", **TREE, alibi=True, dropout_p=0.1, softcap=4.0),
    Case("alibi_dropout_softcap_forest_window", **TREE, alibi=True, dropout_p=0.1, softcap=4.0,
         window_size=(7, 0)),
    Case("mla", SHORT, **MLA),
    Case("mla_forest", **TREE, **MLA),
    Case("mla_bf16", SHORT, **MLA, dtype=BF16),
    Case("mla_heavy_tailed", SHORT, **MLA, heavy_tailed=True),
    Case("strided_forest", **TREE, strided=True),
    Case("strided_window_both", SHORT, strided=True, causal=False, window_size=(4, 3)),
    Case("strided_dropout", SHORT, strided=True, dropout_p=0.2),
    Case("bf16_prefix", SHORT, dtype=BF16, prefix_lengths=(3, 1, 30, 0)),
    Case("bf16_forest_window_sinks", **TREE, dtype=BF16, window_size=(6, 0), sinks=True),
    Case("fp16_cross_softcap", SHORT, key_lengths=(4, 0, 31, 14), dtype=FP16, softcap=3.0),
)  # fmt: skip

ONE_32K = (32768,)
UNIFORM_512 = (512,) * 64
UNIFORM_32 = (32,) * 1000
LOG_NORMAL = log_normal_lengths(32768, median=300, sigma=1.2)
ONE_LONG = (16384, *(64,) * 256)
LENGTH_ONE = (1,) * 8192
WITH_EMPTY = tuple(n for pair in zip(UNIFORM_512, (0,) * 64) for n in pair)
# Two prompts of 2048 tokens with 16 answers of 512 each, as in group-relative training.
ANSWERS = {
    "lengths": (2048, *(512,) * 16) * 2,
    "parents": (-1, *(0,) * 16, -1, *(17,) * 16),
}

LLAMA3_8B = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": BF16}
QWEN3_30B_A3B = {"num_heads": 32, "num_kv_heads": 4, "head_dim": 128, "dtype": BF16}
QWEN3_0_6B = {"num_heads": 16, "num_kv_heads": 8, "head_dim": 128, "dtype": BF16}
GEMMA2_9B = {"num_heads": 16, "num_kv_heads": 8, "head_dim": 256, "softcap": 50.0, "dtype": BF16}
GEMMA3_4B = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 256, "dtype": BF16}
GPT_OSS_20B = {"num_heads": 64, "num_kv_heads": 8, "head_dim": 64, "sinks": True, "dtype": BF16}
DEEPSEEK_V2_LITE = {
    "num_heads": 16,
    "num_kv_heads": 16,
    "head_dim": 192,
    "value_head_dim": 128,
    "dtype": BF16,
}
PHI3_MINI = {"num_heads": 32, "num_kv_heads": 32, "head_dim": 96, "dtype": BF16}
LLAMA4_SCOUT = {"num_heads": 40, "num_kv_heads": 8, "head_dim": 128, "dtype": BF16}
MODERNBERT_BASE = {
    "num_heads": 12,
    "num_kv_heads": 12,
    "head_dim": 64,
    "causal": False,
    "dtype": BF16,
}

REAL: tuple[Case, ...] = (
    Case("llama3_8b/one_32k", ONE_32K, **LLAMA3_8B),
    Case("llama3_8b/64x512", UNIFORM_512, **LLAMA3_8B),
    Case("llama3_8b/1000x32", UNIFORM_32, **LLAMA3_8B),
    Case("llama3_8b/log_normal", LOG_NORMAL, **LLAMA3_8B),
    Case("llama3_8b/one_16k_256x64", ONE_LONG, **LLAMA3_8B),
    Case("llama3_8b/length_one", LENGTH_ONE, **LLAMA3_8B),
    Case("llama3_8b/empty_documents", WITH_EMPTY, **LLAMA3_8B),
    Case("llama3_8b/forest", **ANSWERS, **LLAMA3_8B),
    Case("qwen3_30b_a3b/log_normal", LOG_NORMAL, **QWEN3_30B_A3B),
    Case("qwen3_30b_a3b/one_16k_256x64", ONE_LONG, **QWEN3_30B_A3B),
    Case("qwen3_0_6b/log_normal", LOG_NORMAL, **QWEN3_0_6B),
    Case("gemma2_9b_local/log_normal", LOG_NORMAL, window_size=(4095, 0), **GEMMA2_9B),
    Case("gemma2_9b_global/log_normal", LOG_NORMAL, **GEMMA2_9B),
    Case("gemma3_4b_local/log_normal", LOG_NORMAL, window_size=(1023, 0), **GEMMA3_4B),
    Case("gemma3_4b_local/one_32k", ONE_32K, window_size=(1023, 0), **GEMMA3_4B),
    Case("gemma3_4b_global/log_normal", LOG_NORMAL, **GEMMA3_4B),
    Case("gpt_oss_20b_local/log_normal", LOG_NORMAL, window_size=(127, 0), **GPT_OSS_20B),
    Case("gpt_oss_20b_local/one_32k", ONE_32K, window_size=(127, 0), **GPT_OSS_20B),
    Case("gpt_oss_20b_global/log_normal", LOG_NORMAL, **GPT_OSS_20B),
    Case("deepseek_v2_lite/log_normal", LOG_NORMAL, **DEEPSEEK_V2_LITE),
    Case("phi3_mini/log_normal", LOG_NORMAL, window_size=(2046, 0), **PHI3_MINI),
    Case("llama4_scout/one_32k", ONE_32K, chunk_size=8192, **LLAMA4_SCOUT),
    Case("llama4_scout/log_normal", LOG_NORMAL, chunk_size=8192, **LLAMA4_SCOUT),
    Case("modernbert_base_local/64x512", UNIFORM_512, window_size=(64, 64), **MODERNBERT_BASE),
    Case("modernbert_base_global/log_normal", LOG_NORMAL, **MODERNBERT_BASE),
)

BY_NAME: dict[str, Case] = {case.name: case for case in (*SMALL, *COMBINED, *REAL)}
