"""The dropout mask: its generator against published vectors, and what it does and does not read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from packed_attn import DocumentLayout, attention
from packed_attn.dropout import WORD, drawn_seed, keep, philox, threshold

# Random123's known answers for philox4x32-10: counter, key, output.
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def _words(*values: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


def _plain_philox(counter: tuple[int, ...], key: tuple[int, int]) -> int:
    """The first word in Python's unbounded integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (second >> 32) ^ c1 ^ k0,
            second & WORD,
            (first >> 32) ^ c3 ^ k1,
            first & WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], answer: tuple) -> None:
    words = philox(_words(*key), _words(*counter))  # type: ignore[arg-type]
    assert tuple(int(word) for word in words) == answer
    assert _plain_philox(counter, key) == answer[0]


@pytest.mark.parametrize("seed", [0, 5, 0x0123_4567_89AB_CDEF, -1, -(2**63), 2**63 - 1])
def test_mask_by_definition(seed: int) -> None:
    """Both words of any int64 seed are the key; i, j and h are the counter, in that order."""
    i, j, h = torch.tensor([0, 3, 2**31 - 1]), torch.tensor([0, 9]), torch.tensor([0, 63])
    mask = keep(torch.tensor([seed]), i[:, None], j, h[:, None, None], 0.4)
    assert mask.dtype == torch.bool
    assert mask.shape == (2, 3, 2)
    key = (seed & WORD, (seed >> 32) & WORD)
    for a, head in enumerate(h.tolist()):
        for b, query in enumerate(i.tolist()):
            for c, token in enumerate(j.tolist()):
                word = _plain_philox((query, token, head, 0), key)
                assert bool(mask[a, b, c]) == (word >= round(0.4 * 2**32))


def test_threshold() -> None:
    assert threshold(0.5) == 2**31
    assert threshold(0.0) == 0
    assert threshold(1.0 - 2.0**-40) == WORD  # fits the word that it is compared with


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_share_of_kept_weights(p: float) -> None:
    """Within 5 standard deviations, over all and along each index."""
    i, j, h = torch.arange(200)[:, None], torch.arange(150), torch.arange(8)[:, None, None]
    kept = keep(torch.tensor([7]), i, j, h, p).double()
    for share in (kept.mean((1, 2)), kept.mean((0, 2)), kept.mean((0, 1)), kept.mean()[None]):
        deviation = (p * (1 - p) * share.numel() / kept.numel()) ** 0.5
        assert ((share - (1 - p)).abs() < 5 * deviation).all()


def test_unlike_seeds_draw_apart() -> None:
    i, j, h = torch.arange(64)[:, None], torch.arange(64), torch.zeros(1, dtype=torch.int64)
    masks = [keep(torch.tensor([seed]), i, j, h, 0.5) for seed in (1, 2, 1 << 32)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert 0.4 < (masks[a] == masks[b]).double().mean() < 0.6


LAYOUT = DocumentLayout.from_lengths([9, 14])


def _qkv() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(23, 2, 8, generator=generator).requires_grad_() for _ in range(3)]


def test_attention_draws_its_own_seed() -> None:
    """From torch's generator: the same again after the same manual_seed, and else another."""
    qkv = _qkv()
    torch.manual_seed(3)
    first = attention(*qkv, LAYOUT, dropout_p=0.5)
    second = attention(*qkv, LAYOUT, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(attention(*qkv, LAYOUT, dropout_p=0.5), first)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    seed = drawn_seed(torch.device("cpu"))
    assert torch.equal(attention(*qkv, LAYOUT, dropout_p=0.5, dropout_seed=seed), first)


def test_no_dropout_draws_nothing() -> None:
    qkv, seed = _qkv(), torch.tensor([4])
    state = torch.get_rng_state()
    out = attention(*qkv, LAYOUT, dropout_p=0.0, dropout_seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(out, attention(*qkv, LAYOUT))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_draws_the_same_again(use_reentrant: bool) -> None:
    """What is recomputed drops the same weights, or the gradients would belong to another mask."""
    gradients = []
    for checkpointed in (False, True):
        qkv = _qkv()
        torch.manual_seed(11)

        def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q * 1.5, k, v, LAYOUT, dropout_p=0.5).sin()

        if checkpointed:
            out = checkpoint(layer, *qkv, use_reentrant=use_reentrant)
        else:
            out = layer(*qkv)
        assert isinstance(out, Tensor)
        out.square().sum().backward()  # reentrant checkpointing knows no autograd.grad
        gradients.append([x.grad for x in qkv])
    for plain, recomputed in zip(*gradients):
        assert torch.equal(plain, recomputed)
