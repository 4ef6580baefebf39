"""Packs with shared prefixes: every document once, its path its tokens, and trained as alone."""

from __future__ import annotations

import functools
import json
import operator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer

from packed_attn import (
    DocumentLayout,
    PackedBatchSampler,
    PackedCollator,
    PackedDataset,
    PackedIterableDataset,
    PackedLoss,
    pack_dataset,
    pack_lengths,
    patch_model,
)
from packed_attn.audit import leaks_between_documents
from packed_attn.callbacks import IsolationCallback, PackingCallback
from packed_attn.packing import PackingReport, PackPart, compare
from packed_attn.packing.forest import plan_forest, plan_prompts
from tests.exactness import gradients, relative
from tests.models import tiny_model
from tests.shared_prompts import answered_questions, mean_alone
from tests.test_trainer import arguments

CAPACITY = 96
SHARED: dict[str, Any] = {"share_prefixes": True, "min_shared": 4}


def ignore(report: PackingReport) -> None:
    """For packing whose report is beside the point."""


def documents_of(row: dict[str, Any]) -> list[list[int]]:
    """The tokens of each document of a row, read along its path."""
    lengths, parents = list(row["seq_lengths"]), list(row["parents"])
    pieces = [list(p) for p in np.split(np.asarray(row["input_ids"]), np.cumsum(lengths)[:-1])]
    found = []
    for end in row["ends"]:
        tokens: list[int] = []
        while end >= 0:
            tokens, end = pieces[end] + tokens, parents[end]
        found.append(tokens)
    return found


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), max_size=30), max_size=25),
    st.integers(1, 6),
    st.sampled_from(["split", "truncate", "drop"]),
    st.sampled_from(["bfd", "next_fit"]),
    st.sampled_from([None, 0, 1]),
)
def test_every_document_is_in_one_pack(
    lists: list[list[int]], least: int, overflow: Any, strategy: Any, seed: int | None
) -> None:
    capacity = 12
    packs = pack_lengths(
        [len(ids) for ids in lists], capacity, overflow=overflow, strategy=strategy, seed=seed,
        share=lambda n: plan_forest([ids[:k] for ids, k in zip(lists, n)], min_shared=least),
    )  # fmt: skip
    trees, found = packs.trees, []
    assert trees is not None
    for p in range(packs.num_packs):
        pieces = slice(packs.offsets[p], packs.offsets[p + 1])
        assert packs.lengths[pieces].sum() <= capacity
        DocumentLayout.from_lengths(
            packs.lengths[pieces].tolist(), parents=trees.parents[pieces].tolist()
        )
        tokens = [
            lists[d][s : s + n]
            for d, s, n in zip(packs.order[pieces], packs.starts[pieces], packs.lengths[pieces])
        ]
        inside = slice(trees.offsets[p], trees.offsets[p + 1])
        row = {
            "input_ids": functools.reduce(operator.iadd, tokens, []),
            "seq_lengths": packs.lengths[pieces],
            "parents": trees.parents[pieces],
            "ends": trees.ends[inside],
        }
        got = documents_of(row)
        assert [len(ids) for ids in got] == trees.lengths[inside].tolist()
        found += list(zip(trees.documents[inside].tolist(), got))
    assert sorted(found) == sorted(parts(lists, capacity, overflow))
    report = packs.report
    assert report.shared_tokens == sum(len(ids) for _, ids in found) - report.packed_tokens
    squares = sum(len(ids) ** 2 for _, ids in found)
    assert report.attention_cost + report.shared_attention_cost == squares
    assert type(report).from_dict(json.loads(json.dumps(report.to_dict()))) == report


def parts(lists: list[list[int]], capacity: int, overflow: str) -> list[tuple[int, list[int]]]:
    """What each document brings: the document and tokens of each of its parts."""
    found = []
    for number, ids in enumerate(lists):
        if len(ids) > capacity and overflow == "drop":
            continue
        kept = ids[:capacity] if overflow == "truncate" else ids
        found += [(number, kept[i : i + capacity]) for i in range(0, len(kept), capacity)]
    return found


def test_a_tree_larger_than_a_pack_repeats_its_prefixes() -> None:
    """System prompt of 6, two questions of 2 below it, answers of 4: three packs of 16 for 6 + 4 +
    20 tokens, each with the prompts of its answers."""
    lists = [[1] * 6 + [q] * 2 + [10 * q + a] * 4 for q, n in ((2, 3), (3, 2)) for a in range(n)]
    packs = pack_lengths([12] * 5, 16, share=lambda n: plan_forest(lists))
    assert packs.pack_tokens.tolist() == [16, 16, 12]
    assert packs.trees is not None
    assert [packs.trees.documents[a:b].tolist() for a, b in ((0, 2), (2, 4), (4, 5))] == [
        [0, 1],
        [3, 4],
        [2],
    ]
    assert packs.report.shared_tokens == 60 - 44


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 4), st.integers(0, 6)), max_size=20), st.integers(1, 9))
def test_prompt_ids_give_the_forest_of_the_tokens(
    documents: list[tuple[int, int]], least: int
) -> None:
    """Prompts of unlike tokens, answers that share nothing: what is found is what was named."""
    prompts = [[100 + i] * (2 + i) for i in range(5)]
    lists = [
        (prompts[i] if i >= 0 else []) + [1000 + 10 * d + k for k in range(n)]
        for d, (i, n) in enumerate(documents)
    ]
    ids = [i for i, _ in documents]
    lengths = [0 if i < 0 else len(prompts[i]) for i in ids]
    named = plan_prompts([len(x) for x in lists], ids, lengths, min_shared=least)
    found = plan_forest(lists, min_shared=least)
    # Documents equal to their prompt are one document where it is found, and here if it is shared.
    saves = [(ids.count(i) - 1) * len(prompts[i]) >= least for i in range(5)]
    if all(n or (i >= 0 and saves[i]) for i, n in documents):
        for name in ("lengths", "parents", "starts"):
            assert getattr(named, name).tolist() == getattr(found, name).tolist(), name
    for i, tokens in enumerate(lists):
        path = named.path(i)
        spans = [
            lists[named.lists[d]][named.starts[d] : named.starts[d] + named.lengths[d]]
            for d in path
        ]
        assert functools.reduce(operator.iadd, spans, []) == tokens


@pytest.mark.parametrize(
    ("family", "weighting", "masks"),
    [
        ("llama", "token", True),
        ("llama", "token", False),
        ("llama", "document", True),
        ("llama", "document", False),
        ("mamba", "document", True),
    ],
)
def test_a_training_step_equals_the_documents_alone(
    tmp_path: Path, family: str, weighting: Any, masks: bool
) -> None:
    """All packs accumulated in one step: Trainer's loss, and the gradients that it leaves."""
    docs = answered_questions()
    if not masks:
        docs = [{"input_ids": d["input_ids"]} for d in docs]
    rows = PackedDataset(docs, CAPACITY, keep=(), **SHARED)
    assert rows.report.shared_tokens > 100
    assert len(rows) >= 2
    model = patch_model(tiny_model(family))
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=len(rows),
            max_grad_norm=0.0,
            learning_rate=0.0,
            remove_unused_columns=False,
        ),
        train_dataset=rows,
        data_collator=PackedCollator(loss_weighting=weighting),
        compute_loss_func=PackedLoss(model, weighting),
    )
    left: dict[str, torch.Tensor] = {}
    optimizer = trainer.create_optimizer()
    optimizer.register_step_pre_hook(lambda *_: left.update(gradients(model)))
    trainer.train()
    plain = tiny_model(family)
    want = mean_alone(plain, docs, weighting)
    want.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want.item(), rel=1e-6)
    assert relative(left, gradients(plain)) <= 1e-6


def test_evaluation_equals_the_documents_alone(tmp_path: Path) -> None:
    docs = answered_questions()
    model = patch_model(tiny_model("llama"))
    loss = PackedLoss(model)
    metrics = Trainer(
        model,
        arguments(tmp_path, per_device_eval_batch_size=1, remove_unused_columns=False),
        eval_dataset=PackedDataset(docs, CAPACITY, **SHARED),
        data_collator=PackedCollator(),
        compute_loss_func=loss,
        compute_metrics=loss.compute_metrics,
        preprocess_logits_for_metrics=loss.preprocess_logits_for_metrics,
    ).evaluate()
    with torch.no_grad():
        for weighting in ("token", "document"):
            want = mean_alone(tiny_model("llama"), docs, weighting)
            assert metrics[f"eval_loss_per_{weighting}"] == pytest.approx(want.item(), rel=1e-6)


def test_documents_share_no_further_than_their_labels() -> None:
    """One learns what the other does not, from the third token on."""
    first = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}
    second = {"input_ids": [5, 6, 7, 9], "labels": [5, 6, -100, 9]}
    (row,) = PackedDataset([first, second], 16, share_prefixes=True, min_shared=1)
    assert row["seq_lengths"].tolist() == [2, 2, 2]
    assert row["labels"].tolist() == [-100, 6, 7, 8, -100, 9]
    assert row["documents"].tolist() == [0, 1]


def test_rows_are_those_of_pack_dataset() -> None:
    docs = [{**d, "name": f"d{i}"} for i, d in enumerate(answered_questions())]
    options: dict[str, Any] = {**SHARED, "seed": 3, "learnable_only": True}
    rows = PackedDataset(docs, CAPACITY, keep=["documents", "name"], **options)
    written = pack_dataset(docs, CAPACITY, keep=["documents", "name"], **options)
    assert written.column_names == [
        "input_ids", "labels", "seq_lengths", "parents", "ends", "documents", "name",
    ]  # fmt: skip
    for row, other in zip(list(rows), written, strict=True):
        assert {k: np.asarray(v).tolist() for k, v in row.items()} == other
        assert documents_of(row) == [docs[d]["input_ids"] for d in row["documents"]]
        assert row["name"] == [f"d{d}" for d in row["documents"]]
    report = rows.report
    learned = sum((np.asarray(row["labels"]) != -100).sum() for row in rows)
    assert report.learned_tokens == learned
    assert report.unlearnable_documents == 3
    before = [row["documents"].tolist() for row in rows]
    later = []
    for epoch in range(1, 5):
        rows.set_epoch(epoch)
        later.append([row["documents"].tolist() for row in rows])
    assert any(documents != before for documents in later)


def test_columns_name_the_prompts() -> None:
    docs: list[dict[str, Any]] = [
        {**d, "group": g, "prompt": n}
        for d, g, n in zip(
            answered_questions(), [0, 1, 1, 2, 2, 2, 2], [25, 29, 29, 33, 33, 33, 33]
        )
    ]
    named = PackedDataset(docs, CAPACITY, prompt_ids="group", prompt_lengths="prompt")
    for row in named:
        assert documents_of(row) == [docs[d]["input_ids"] for d in row["documents"]]
    # The two of group 1 share 29 tokens, the four of group 2 33, three times.
    assert named.report.shared_tokens == 29 + 3 * 33
    docs[2]["input_ids"][28] += 1
    with pytest.raises(ValueError, match="same 29 tokens and labels, but documents 1 and 2 differ"):
        PackedDataset(docs, CAPACITY, prompt_ids="group", prompt_lengths="prompt")


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"prompt_ids": "group"}, ValueError, "must be given together and without share_prefixes"),
        ({"prompt_ids": "a", "prompt_lengths": "b"}, ValueError, "prompt_ids must name a column"),
        ({"min_shared": 0}, ValueError, "min_shared must be an integer of at least 1, got 0"),
        ({"align": 8}, NotImplementedError, "placed as whole trees, without align"),
        ({"max_documents": 2}, NotImplementedError, "as whole trees, without max_documents"),
        ({"strategy": "wrapped"}, NotImplementedError, "without strategy='wrapped'"),
    ],
)
def test_bad_options(options: dict[str, Any], kind: type[Exception], words: str) -> None:
    share = {} if "prompt_ids" in options and "prompt_lengths" in options else SHARED
    with pytest.raises(kind, match=words):
        PackedDataset(answered_questions(), CAPACITY, **{**share, **options})


def test_columns_that_are_not_compared_are_refused() -> None:
    docs = [{"input_ids": [1, 2, 3], "weights": [0.5, 1.0, 1.0]}]
    with pytest.raises(
        ValueError, match="must agree in all columns, and 'weights' is not compared"
    ):
        PackedDataset(docs, 16, share_prefixes=True)


def test_rows_that_lost_their_parents_are_refused() -> None:
    (row,) = PackedDataset([[1, 2, 3], [1, 2, 3, 4]], 16, share_prefixes=True, min_shared=1)
    kept = {name: row[name] for name in ("input_ids", "labels")}  # what Trainer would leave
    with pytest.raises(ValueError, match="has no boundaries"):
        PackedCollator()([kept])
    with pytest.raises(ValueError, match="must have parents and ends together, but has parents"):
        PackedCollator()([{**row, "ends": None}])
    with pytest.raises(ValueError, match="must have ends from 0 to 1, got 0 to 5"):
        PackedCollator()([{**row, "ends": [0, 5]}])
    with pytest.raises(ValueError, match="must have parents from -1 to 1, got -1 to 2"):
        PackedCollator()([{**row, "parents": [-1, 2]}])
    with pytest.raises(ValueError, match=r"point to an earlier document or be -1"):
        PackedCollator()([{**row, "parents": [1, 0]}])
    with pytest.raises(ValueError, match="has position_ids that contradict its seq_lengths"):
        PackedCollator()([{**row, "position_ids": [0, 1, 2, 0]}])
    with pytest.raises(ValueError, match="2 documents in seq_lengths, but 1 parents"):
        PackedCollator()([{**row, "parents": [-1]}])
    with pytest.raises(NotImplementedError, match="collate packs with shared prefixes without"):
        PackedCollator(align=8)([row])


def test_packs_are_not_cut() -> None:
    rows = PackedDataset(answered_questions(), CAPACITY, **SHARED)
    with pytest.raises(NotImplementedError, match="shares prefixes, which a part of it would lose"):
        rows[PackPart(0, 0, 1)]
    with pytest.raises(NotImplementedError, match="would cut packs with shared prefixes"):
        PackedBatchSampler(rows, world_size=len(rows) + 1)
    sampler = PackedBatchSampler(rows, remainder="drop")
    assert sorted(p for batch in sampler for p in batch) == list(range(len(rows)))  # type: ignore[type-var]


def test_a_model_with_labels_and_no_loss_of_ours_is_refused() -> None:
    (row, *_) = PackedDataset(answered_questions(), CAPACITY, **SHARED)
    batch = PackedCollator()([row])
    with pytest.raises(ValueError, match=r"pass compute_loss_func=PackedLoss\(model\)"):
        patch_model(tiny_model("llama"))(**batch)


@pytest.mark.parametrize(
    ("rows", "positions", "words"),
    [
        (2, None, "has document 1 in row 1, but what it continues, document 0, in row 0"),
        (1, [[0, 1, 2, 0, 1, 2]], "position_ids contradict layout"),
    ],
)
def test_a_forest_that_a_model_cannot_follow(rows: int, positions: Any, words: str) -> None:
    """A child in another row than its parent, and positions that do not go on."""
    ids = torch.arange(3, 9).view(rows, -1)
    batch: dict[str, Any] = {"layout": DocumentLayout.from_lengths([3, 3], parents=[-1, 0])}
    if positions is not None:
        batch["position_ids"] = torch.tensor(positions)
    with pytest.raises(ValueError, match=words):
        patch_model(tiny_model("llama"))(input_ids=ids, **batch)


def test_batches_of_several_rows_and_padding() -> None:
    """Rows with and without shared prefixes in one batch, filled up to the capacity."""
    docs = answered_questions()
    rows = [*PackedDataset(docs, CAPACITY, **SHARED), *PackedDataset([[5, 6, 7], [8, 9]], CAPACITY)]
    batch = PackedCollator(capacity=CAPACITY)(rows)
    model = patch_model(tiny_model("llama"))
    loss = PackedLoss(model)
    labels = batch.pop("labels")
    got = loss(model(**batch), labels)
    every = [*docs, {"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]
    want = mean_alone(tiny_model("llama"), every, "token")
    assert got.item() == pytest.approx(want.item(), rel=1e-6)


def test_the_report_says_what_was_saved() -> None:
    report = PackedDataset(answered_questions(), CAPACITY, **SHARED).report
    assert f"{report.shared_tokens:,} tokens computed once for several documents" in str(report)
    assert f"{report.packed_tokens:,} packed + {report.shared_tokens:,} shared" in str(report)
    assert report.to_dict()["shared_attention_cost"] == report.shared_attention_cost > 0


def test_comparison_counts_whole_documents() -> None:
    docs = answered_questions()
    packs = PackedDataset(docs, CAPACITY, **SHARED).packs
    lengths = [len(d["input_ids"]) for d in docs]
    assert compare(packs).padded.row_tokens == max(lengths)
    assert compare(packs).padded.tokens == sum(lengths)
    assert compare(packs).packed.attention_cost == packs.report.attention_cost


def test_worker_processes_plan_the_same_rows() -> None:
    rows = PackedDataset(answered_questions(), CAPACITY, seed=0, **SHARED)
    loader = torch.utils.data.DataLoader(rows, batch_size=None, num_workers=1)
    for row, other in zip(list(rows), loader, strict=True):
        assert torch.equal(torch.as_tensor(row["input_ids"]), torch.as_tensor(other["input_ids"]))


def test_streams_share_in_the_window() -> None:
    """The same documents and account as the whole set; the state continues from every row."""
    docs = answered_questions()

    def stream(reports: Any, **options: Any) -> PackedIterableDataset:
        return PackedIterableDataset(
            docs, CAPACITY, lookahead=8, on_report=reports, learnable_only=True,
            **{**SHARED, **options},
        )  # fmt: skip

    reports: list[Any] = []
    rows = list(stream(reports.append))
    wanted = [d["input_ids"] for d in docs if 1 in d["completion_mask"][1:]]
    assert sorted(ids for row in rows for ids in documents_of(row)) == sorted(wanted)
    report = reports[0]
    assert report.shared_tokens == sum(map(len, wanted)) - sum(
        row["input_ids"].size for row in rows
    )
    assert report.shared_tokens > 50
    assert report.learned_tokens == sum((row["labels"] != -100).sum() for row in rows)
    squares = sum(len(ids) ** 2 for ids in wanted)
    assert report.attention_cost + report.shared_attention_cost == squares
    for taken in range(len(rows)):
        first, second = stream(ignore), stream(ignore)
        iterator = iter(first)
        for _ in range(taken):
            next(iterator)
        second.load_state_dict(first.state_dict())
        for row, other in zip(list(second), rows[taken:], strict=True):
            assert {k: v.tolist() for k, v in row.items()} == {
                k: v.tolist() for k, v in other.items()
            }
    with pytest.raises(ValueError, match="state must be of a data set with min_shared=4"):
        stream(ignore).load_state_dict(stream(ignore, share_prefixes=False).state_dict())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=30), max_size=25), st.integers(1, 6))
def test_streams_keep_every_document(lists: list[list[int]], least: int) -> None:
    rows = list(
        PackedIterableDataset(
            lists, 12, lookahead=5, share_prefixes=True, min_shared=least, on_report=ignore
        )
    )
    assert all(row["input_ids"].size <= 12 for row in rows)
    found = [ids for row in rows for ids in documents_of(row)]
    assert sorted(found) == sorted(ids for _, ids in parts(lists, 12, "split"))


def test_streamed_rows_train_as_the_documents_alone() -> None:
    docs = answered_questions()
    rows = list(PackedIterableDataset(docs, CAPACITY, on_report=ignore, **SHARED))
    model = patch_model(tiny_model("llama"))
    loss, batch = PackedLoss(model), PackedCollator()(rows)
    labels = batch.pop("labels")
    want = mean_alone(tiny_model("llama"), docs, "token")
    assert loss(model(**batch), labels).item() == pytest.approx(want.item(), rel=1e-6)


def test_callbacks_watch_and_measure(tmp_path: Path) -> None:
    """Prefixes are shared and nothing else: a prefix is no leak, a sibling's token would be."""
    docs = answered_questions()
    rows = PackedDataset(docs, 512, **SHARED)
    assert len(rows) == 1
    model = patch_model(tiny_model("llama"))
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=1, remove_unused_columns=False),
        train_dataset=rows,
        data_collator=PackedCollator(),
        compute_loss_func=PackedLoss(model),
    )
    trainer.add_callback(PackingCallback(trainer))
    trainer.add_callback(IsolationCallback(trainer))
    trainer.train()
    logged = {k: v for entry in trainer.state.log_history for k, v in entry.items()}
    assert logged["isolation/largest_gradient"] == 0.0
    assert logged["packing/documents_per_step"] == len(docs)
    tokens = rows.report.packed_tokens
    longest = max(len(d["input_ids"]) for d in docs)
    assert logged["packing/padding_saved"] == pytest.approx(1 - tokens / (len(docs) * longest))
    flops = rows.report.attention_cost * 6 * 2 * 4 * 16 * 2 / 2
    assert logged["packing/attention_teraflop"] == pytest.approx(flops / 1e12)


def test_a_leak_between_answers_is_found() -> None:
    """A layer that mixes neighbours, whatever the layout says."""
    (row,) = PackedDataset(answered_questions(), 512, **SHARED)
    batch = PackedCollator()([row])
    model = patch_model(tiny_model("llama"))
    assert leaks_between_documents(model, batch) is None
    model.model.layers[0].mlp.register_forward_hook(lambda _, args, out: out + out.roll(1, 1))
    leak = leaks_between_documents(model, batch)
    assert leak is not None
    assert leak.module == "model.layers.0.mlp"


def test_a_leak_between_paths_is_found() -> None:
    """In a model that is unpacked answers are rows of a batch: a layer that mixes those."""
    prompt, *answers = torch.arange(3, 39).split([20, 5, 5, 6])
    docs = [torch.cat([prompt, answer]).tolist() for answer in answers]
    batch = PackedCollator()(list(PackedDataset(docs, 64, **SHARED)))
    assert batch["layout"].lengths == (20, 5, 5, 6)
    model = patch_model(tiny_model("mamba"))
    assert leaks_between_documents(model, batch) is None
    model.backbone.layers[0].mixer.register_forward_hook(lambda _, args, out: out + out.roll(1, 0))
    assert leaks_between_documents(model, batch) is not None


@pytest.mark.parametrize("name", ["input_ids", "labels"])
def test_values_that_32_bits_would_confuse_are_refused(name: str) -> None:
    """2^32 + 5 and 5 are not the same token."""
    shared = list(range(20, 60))
    rows = {"input_ids": [[*shared, 5], [*shared, 6]], "labels": [[*shared, 5], [*shared, 6]]}
    rows[name] = [[*shared, 5], [*shared, 2**32 + 5]]
    with pytest.raises(ValueError, match="tokens and labels of 32 bits, got"):
        PackedDataset(
            [dict(zip(rows, row)) for row in zip(*rows.values())], 128, share_prefixes=True
        )


def test_the_metrics_of_sft_have_one_target_a_token() -> None:
    """SFTTrainer asks for them beside any loss: the error says what to train with instead."""
    model = patch_model(tiny_model("llama"))
    layout = DocumentLayout.from_lengths([4, 2, 3], parents=[-1, 0, 0])
    ids = torch.arange(3, 12)[None]
    with pytest.raises(ValueError, match="train with transformers' Trainer"):
        model(input_ids=ids, labels=ids, layout=layout, fused_lm_head=True)
