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
    with pytest.raises(ValueError, match="feature 0 must have integers as labels, got float64"):
        PackedCollator("documents")([{"input_ids": [1, 2], "labels": [1.5, 2.0]}])


def test_a_column_of_a_reserved_name_is_named() -> None:
    row = {"input_ids": [1, 2], "seq_lengths": [2], "parents": [0, 1]}
    with pytest.raises(ValueError, match=r"has parents alone: .* needs another name"):
        PackedCollator()([row])


def pairs(sources: tuple[int, ...], targets: tuple[int, ...]) -> dict[str, list[int]]:
    """A pack of two streams."""
    return {
        "input_ids": list(range(10, 10 + sum(sources))),
        "labels": list(range(50, 50 + sum(targets))),
        "seq_lengths": list(sources),
        "decoder_seq_lengths": list(targets),
    }


def test_labels_of_a_decoder_have_lengths_of_their_own() -> None:
    """The first label of each document stays: a decoder's are not shifted away."""
    batch = PackedCollator(encoder_decoder=True)([pairs((3, 1), (1, 2)), pairs((2,), (4,))])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 10, 11]]
    assert batch["labels"].tolist() == [[50, 51, 52, 50, 51, 52, 53]]
    assert batch["layout"].lengths == (3, 1, 2)
    assert batch["decoder_layout"].lengths == (1, 2, 4)
    assert "decoder_input_ids" not in batch


def test_decoder_inputs_are_shifted_by_document() -> None:
    feature = pairs((3, 1), (2, 3))
    feature["labels"][3] = -100
    collator = PackedCollator(encoder_decoder=True, decoder_start_token_id=0, pad_token_id=7)
    batch = collator([feature])
    assert batch["labels"].tolist() == [[50, 51, 52, -100, 54]]
    assert batch["decoder_input_ids"].tolist() == [[0, 50, 0, 52, 7]]


def test_both_sides_are_padded_to_their_capacity() -> None:
    collator = PackedCollator(encoder_decoder=True, capacity=8, decoder_capacity=6)
    batch = collator([pairs((3, 1), (2, 3))])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[50, 51, 52, 53, 54, -100]]
    for name, lengths in {"layout": (3, 1, 4), "decoder_layout": (2, 3, 1)}.items():
        assert batch[name].lengths == lengths
        assert batch[name].padding.tolist() == [False, False, True]


def test_documents_of_two_sides() -> None:
    features = [
        {"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0], "labels": [5]},
        {"input_ids": [3], "labels": [6, 7]},
    ]
    batch = PackedCollator("documents", encoder_decoder=True)(features)
    assert batch["input_ids"].tolist() == [[1, 2, 3]]
    assert batch["labels"].tolist() == [[5, 6, 7]]
    assert batch["decoder_layout"].lengths == (1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, r"feature 0 has no labels"),
        ({"decoder_seq_lengths": None}, "feature 0 has no boundaries"),
        ({"decoder_seq_lengths": [4]}, "feature 0 has 5 input_ids, but seq_lengths add to 4"),
        ({"decoder_seq_lengths": [5]}, "feature 0 has 1 documents, but its input_ids have 2"),
    ],
)
def test_decoder_sides_that_fit_no_source_are_refused(
    change: dict[str, object], message: str
) -> None:
    feature = {**pairs((3, 1), (2, 3)), **change}
    with pytest.raises(ValueError, match=f"of labels, the input_ids of a decoder: {message}"):
        PackedCollator(encoder_decoder=True)([feature])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"decoder_capacity": 4}, "decoder_capacity needs encoder_decoder=True"),
        ({"decoder_start_token_id": 0}, "decoder_start_token_id needs encoder_decoder=True"),
        (
            {"encoder_decoder": True, "loss_weighting": "document"},
            "loss_weighting='document' is of one stream",
        ),
    ],
)
def test_arguments_of_a_decoder(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedCollator(**kwargs)  # type: ignore[arg-type]
