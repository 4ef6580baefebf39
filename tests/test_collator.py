"""PackedCollator: boundaries in, one exact batch out, and refusal where boundaries are missing."""

from __future__ import annotations

import pickle

import pytest
import torch

from packed_attn import DocumentLayout, PackedCollator
from packed_attn.collator import COMPILED_TOKENS, IGNORE_INDEX
from packed_attn.logps import without_first_labels


def pack(*lengths: int, first: int = 10) -> dict[str, list[int]]:
    ids = list(range(first, first + sum(lengths)))
    return {"input_ids": ids, "labels": list(ids), "seq_lengths": list(lengths)}


def test_emits_what_the_field_reads() -> None:
    batch = PackedCollator()([pack(3, 1), pack(2, first=50)])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 50, 51]]
    assert batch["labels"].tolist() == [[-100, 11, 12, -100, -100, 51]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["seq_idx"].tolist() == [[0, 0, 0, 1, 2, 2]]
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert batch[name].tolist() == [0, 3, 4, 6]
        assert batch[name].dtype == torch.int32
    assert (batch["max_length_q"], batch["max_length_k"]) == (3, 3)
    assert batch["layout"].lengths == (3, 1, 2)
    assert "attention_mask" not in batch
    dtypes = {name: batch[name].dtype for name in ("input_ids", "labels", "position_ids")}
    assert set(dtypes.values()) == {torch.int64}
    assert batch["seq_idx"].dtype == torch.int32


def test_position_ids_alone_are_boundaries() -> None:
    feature = {"input_ids": [1, 2, 3, 4], "position_ids": [0, 1, 0, 1]}
    assert PackedCollator()([feature])["layout"].lengths == (2, 2)


def test_refuses_features_without_boundaries() -> None:
    with pytest.raises(ValueError, match=r"feature 1 has no boundaries.*position_ids"):
        PackedCollator()([pack(2), {"input_ids": [1, 2, 3]}])


def test_features_as_documents() -> None:
    features = [{"input_ids": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    batch = PackedCollator("documents")(features)
    assert batch["layout"].lengths == (3, 1)
    assert batch["labels"].tolist() == [[-100, 2, 3, -100]]


def test_documents_lose_their_padding() -> None:
    feature = {"input_ids": [0, 7, 8, 0], "attention_mask": [0, 1, 1, 0]}
    batch = PackedCollator("documents")([feature])
    assert batch["input_ids"].tolist() == [[7, 8]]


@pytest.mark.parametrize("kwargs", [{"pad_to_multiple_of": 8}, {"capacity": 8}])
def test_padding_is_one_last_document(kwargs: dict[str, int]) -> None:
    batch = PackedCollator(**kwargs, pad_token_id=9)([pack(2, 3)])
    layout: DocumentLayout = batch["layout"]
    assert layout.lengths == (2, 3, 3)
    assert layout.padding is not None
    assert layout.padding.tolist() == [False, False, True]
    assert batch["input_ids"][0, 5:].tolist() == [9, 9, 9]
    assert batch["labels"][0, 5:].tolist() == [IGNORE_INDEX] * 3
    assert batch["position_ids"][0, 5:].tolist() == [0, 1, 2]


def test_capacity_counts_per_feature_and_is_a_bound() -> None:
    assert PackedCollator(capacity=4)([pack(2), pack(3)])["input_ids"].shape == (1, 8)
    with pytest.raises(ValueError, match="feature 0 has 5 tokens, over the capacity 4"):
        PackedCollator(capacity=4)([pack(5)])


def test_full_packs_get_no_padding_document() -> None:
    assert PackedCollator(capacity=4)([pack(4)])["layout"].padding is None


@pytest.mark.parametrize("mask", ["completion_mask", "assistant_masks"])
def test_masks_choose_what_is_learned(mask: str) -> None:
    feature = {"input_ids": [1, 2, 3, 4], "seq_lengths": [4], mask: [0, 0, 1, 1]}
    assert PackedCollator()([feature])["labels"].tolist() == [[-100, -100, 3, 4]]


def test_columns_of_another_length_are_named() -> None:
    feature = {"input_ids": [1, 2, 3], "labels": [1, 2], "seq_lengths": [3]}
    with pytest.raises(ValueError, match="feature 0 has 3 input_ids, but 2 labels"):
        PackedCollator()([feature])


def test_contradicting_boundaries_are_named() -> None:
    feature = {"input_ids": [1, 2, 3], "position_ids": [0, 1, 2], "seq_lengths": [1, 2]}
    with pytest.raises(ValueError, match=r"position_ids that contradict its seq_lengths"):
        PackedCollator()([feature])
    with pytest.raises(ValueError, match="seq_lengths add to 2"):
        PackedCollator()([{"input_ids": [1, 2, 3], "seq_lengths": [2]}])


def test_empty_documents_and_an_empty_batch() -> None:
    batch = PackedCollator()([{"input_ids": [1, 2], "seq_lengths": [0, 2, 0]}])
    assert batch["layout"].lengths == (0, 2, 0)
    assert PackedCollator()([])["input_ids"].shape == (1, 0)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"features": "rows"}, "features must be"),
        ({"capacity": 0}, "capacity must be at least 1"),
        ({"pad_to_multiple_of": -1}, "pad_to_multiple_of must be at least 1"),
    ],
)
def test_bad_settings(kwargs: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PackedCollator(**kwargs)


def test_missing_input_ids() -> None:
    with pytest.raises(ValueError, match=r"feature 0 has no input_ids, only \['text'\]"):
        PackedCollator()([{"text": "hello"}])


def test_crosses_process_boundaries() -> None:
    collator = pickle.loads(pickle.dumps(PackedCollator(capacity=8)))
    batch = pickle.loads(pickle.dumps(collator([pack(3, 2)])))
    assert batch["layout"].lengths == (3, 2, 3)


def test_dataloader_workers_hand_over_the_layout() -> None:
    rows = [pack(3, 2), pack(4)]
    loader = torch.utils.data.DataLoader(
        rows, batch_size=1, collate_fn=PackedCollator(), num_workers=1
    )
    assert [batch["layout"].lengths for batch in loader] == [(3, 2), (4,)]


def test_first_labels_of_several_rows() -> None:
    layout = DocumentLayout.from_lengths([2, 1, 3])
    labels = torch.arange(6).view(2, 3)
    assert without_first_labels(labels, layout).tolist() == [[-100, 1, -100], [-100, 4, 5]]


@pytest.mark.parametrize("mean", [2, 700])  # documents that are numbered all at once, or one by one
@pytest.mark.parametrize("tokens", [COMPILED_TOKENS // 2, COMPILED_TOKENS + 1])
def test_large_batches_number_their_tokens_alike(mean: int, tokens: int) -> None:
    lengths = torch.randint(0, 2 * mean, (2 * tokens // mean,)).cumsum(0).clamp(max=tokens).diff()
    lengths = [*lengths.tolist(), 0, tokens - int(lengths.sum()), 0]
    batch = PackedCollator()([pack(*lengths)])
    assert batch["position_ids"].tolist() == [[i for n in lengths for i in range(n)]]
    assert batch["seq_idx"].tolist() == [[d for d, n in enumerate(lengths) for _ in range(n)]]
    first = batch["position_ids"] == 0
    assert torch.equal(batch["labels"], batch["input_ids"].masked_fill(first, IGNORE_INDEX))
    assert batch["seq_idx"].dtype == torch.int32


def test_values_that_are_no_integers_are_named() -> None:
    with pytest.raises(ValueError, match="feature 0 must have integers as input_ids, got <U1"):
        PackedCollator("documents")([{"input_ids": ["a", "b"]}])
