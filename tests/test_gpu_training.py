"""Training on a GPU: no wait for the device, CUDA graphs, compiled, checkpointed, in a Trainer."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_attn_kernels.rules import INTERPRETED
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import Trainer, TrainingArguments

from packed_attn import (
    DocumentLayout,
    PackedCollator,
    attention,
    audit,
    patch_model,
    unpatch_model,
)
from packed_attn.audit import leaks_between_documents
from packed_attn.callbacks import IsolationCallback, IsolationError, PackingCallback
from packed_attn.cli import main
from packed_attn.doctor import _verdict
from tests.exactness import (
    alone,
    close,
    documents,
    gradients,
    on_device,
    packed,
    relative,
    token_mean,
)
from tests.liger import ORDERS, Order, both, interpret_liger, keep_modeling
from tests.models import tiny_model

pytestmark = pytest.mark.gpu

# The backend that runs on a GPU wherever attention takes the layout.
KERNELS = "triton"
CAPACITY = 96
# As many documents in each, and a few of no token.
BOUNDARIES = [(10, 20, 30, 1, 5, 30), (96, 0, 0, 0, 0, 0), (1, 1, 1, 1, 1, 91), (16,) * 6]
STEPS, TOGETHER = 10, 4
CHECKPOINTED = [None, {"use_reentrant": False}, {"use_reentrant": True}]


@pytest.fixture
def split_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward that gives the same bits every time, whichever was measured to be faster."""
    monkeypatch.setattr("packed_attn_kernels.ops.FUSED_IS_FASTER", frozenset())


def model_on(device: str, family: str = "llama", **overrides: Any) -> Any:
    """A patched tiny model in train mode that may run on nothing but the kernels."""
    model = tiny_model(family, **overrides).to(device).train()
    return patch_model(model, backend=KERNELS)


def step_alone(model: nn.Module, docs: list[Tensor]) -> dict[str, Tensor]:
    """Loss and gradients of the documents one by one."""
    model.zero_grad()
    loss = token_mean(model, docs)
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def step_of(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Loss and gradients of one step."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], what: str) -> None:
    differing = [name for name, value in want.items() if not torch.equal(got[name], value)]
    assert not differing, f"{what}: not the same bits in {differing}"


# No wait for the device


@pytest.fixture
def no_waiting() -> Iterator[Callable[[], None]]:
    """Called, it makes every wait for the GPU an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("capacity", [None, 80], ids=["full", "padded"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_a_step_waits_for_nothing(
    family: str, capacity: int | None, device: str, no_waiting: Callable[[], None]
) -> None:
    """On a batch of the collator that is on the GPU, with boundaries that were never seen; by
    kernels and on documents batched by length."""
    model = model_on(device, family)
    padded = {} if capacity is None else {"capacity": capacity // 4}
    first, second = (
        packed([d.to(device) for d in documents(lengths=lengths)], **padded)
        for lengths in ((5, 1, 37, 22), (30, 20, 2, 13))
    )
    step_of(model, first)  # compiles kernels
    no_waiting()
    found = step_of(model, second)
    with pytest.raises(RuntimeError, match="synchronizing"):
        float(found["loss"])


def test_a_layout_made_on_the_device_waits_for_nothing(
    device: str, no_waiting: Callable[[], None]
) -> None:
    model = model_on(device)
    batch = packed([d.to(device) for d in documents()])
    want = step_of(model, batch)
    no_waiting()
    layout = DocumentLayout(batch["layout"].cu_seqlens, batch["layout"].total_tokens)
    names = ("input_ids", "labels", "position_ids")
    got = step_of(model, {"layout": layout, **{name: batch[name] for name in names}})
    torch.cuda.set_sync_debug_mode("default")
    assert_same(got, want, "layout of cu_seqlens on the device")


# CUDA graphs


def captured(step: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """A CUDA graph of `step`: runs it on what its inputs hold at the time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replayed() -> list[Tensor]:
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
        return results

    return replayed


def boundaries(lengths: tuple[int, ...]) -> Tensor:
    return DocumentLayout.from_lengths(lengths).cu_seqlens


def test_attention_in_a_graph(device: str) -> None:
    """Out and gradients of other boundaries, written into the same tensor, to the bit."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(CAPACITY, heads, 64, generator=generator)
        .to(device, torch.bfloat16)
        .requires_grad_()
        for heads in (4, 2, 2)
    )
    cu_seqlens = boundaries(BOUNDARIES[0]).to(device)
    sinks = torch.randn(4, generator=generator).to(device).requires_grad_()

    def step() -> list[Tensor]:
        layout = DocumentLayout(cu_seqlens, CAPACITY)
        out = attention(
            q, k, v, layout, window_size=(20, 0), softcap=20.0, sinks=sinks, deterministic=True,
            backend=KERNELS,
        )  # fmt: skip
        found = torch.autograd.grad(out.float().square().sum(), (q, k, v, sinks))
        return [out.detach(), *found]

    replayed = captured(step)
    seen: list[Tensor] = []
    for lengths in BOUNDARIES:
        cu_seqlens.copy_(boundaries(lengths))
        got = [x.clone() for x in replayed()]
        for name, x, want in zip(("out", "dq", "dk", "dv", "dsinks"), got, step(), strict=True):
            assert torch.equal(x, want), f"{name} of documents of {lengths} tokens"
        assert not any(torch.equal(got[0], other) for other in seen)
        seen.append(got[0])


def test_a_training_step_in_a_graph(device: str) -> None:
    """Forward and backward of a model captured once, run on other tokens and boundaries."""
    model = model_on(device)
    parameters = list(model.parameters())
    ids = torch.ones(1, CAPACITY, dtype=torch.long, device=device)
    cu_seqlens = boundaries(BOUNDARIES[0]).to(device)

    def step() -> list[Tensor]:
        output = model(input_ids=ids, labels=ids, layout=DocumentLayout(cu_seqlens, CAPACITY))
        found = torch.autograd.grad(output.loss, parameters)
        return [output.logits.detach(), output.loss.detach(), *found]

    replayed = captured(step)
    for seed, lengths in enumerate(BOUNDARIES):
        docs = documents(seed, lengths)
        ids.copy_(torch.cat(docs)[None])
        cu_seqlens.copy_(boundaries(lengths))
        got, want = [x.clone() for x in replayed()], step()
        assert torch.equal(got[0], want[0]), f"logits of documents of {lengths} tokens"
        assert torch.equal(got[1], want[1]), f"loss of documents of {lengths} tokens"
        for (name, _), x, y in zip(model.named_parameters(), got[2:], want[2:], strict=True):
            assert close(x, y, 1e-6), f"gradient of {name}, documents of {lengths} tokens"
        assert close(got[0][0], alone(model, [d.to(device) for d in docs if len(d)]))


# Compiled, checkpointed, in half precision, adapted


def test_compiled_for_any_boundaries(device: str) -> None:
    """No graph break, two recompilations over twenty batches; eager's loss and gradients."""
    torch._dynamo.reset()
    model = model_on(device, num_hidden_layers=1)
    counter = CompileCounterWithBackend("inductor")
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    compilations = []
    for seed in range(20):
        count = int(torch.randint(2, 9, (), generator=generator))
        cuts = 1 + torch.randperm(CAPACITY - 9, generator=generator)[:count]
        lengths = tuple(cuts.sort().values.diff(prepend=cuts.new_zeros(1)).tolist())
        feature = {"input_ids": torch.cat(documents(seed, lengths)), "seq_lengths": lengths}
        batch = on_device(PackedCollator(capacity=CAPACITY)([feature]), device)
        want = step_of(model, batch)
        model.zero_grad()
        loss = compiled(**batch).loss
        loss.backward()
        compilations.append(counter.frame_count)
        assert loss.item() == pytest.approx(want.pop("loss").item(), rel=1e-5), lengths
        assert relative(gradients(model), want) <= 1e-4, lengths
    torch._dynamo.reset()
    assert compilations[-1] <= 3 * compilations[0], compilations


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_checkpointing_gives_the_same_bits(family: str, device: str, split_backward: None) -> None:
    model = model_on(device, family)
    batch = packed([d.to(device) for d in documents()])
    want = step_of(model, batch)
    for settings in CHECKPOINTED:
        twin = copy.deepcopy(model)
        if settings is not None:
            twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
            twin.enable_input_require_grads()
        assert_same(step_of(twin, batch), want, f"checkpointing {settings}")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_autocast(family: str, device: str) -> None:
    """No further from float32 than documents alone are under autocast, loss and gradients."""
    model = tiny_model(family).to(device).train()
    docs = [d.to(device) for d in documents()]

    want = step_alone(model, docs)
    with torch.autocast(device, torch.bfloat16):
        stock = step_alone(model, docs)
        got = step_of(patch_model(model, backend=KERNELS), packed(docs))
    rounding = float((stock["loss"] - want["loss"]).abs())
    assert float((got["loss"] - want["loss"]).abs()) <= 2 * rounding + 2**-8
    assert relative(got, want) <= 2 * relative(stock, want)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora(checkpointing: bool, device: str) -> None:
    """Adapters on a frozen base: the gradients of the documents alone."""
    pytest.importorskip("peft")
    from tests.test_peft import lora

    model = lora(tiny_model("llama")).to(device).train()
    docs = [d.to(device) for d in documents()]
    loss = token_mean(model, docs)
    loss.backward()
    want = {"loss": loss.detach(), **gradients(model)}
    assert all("lora" in name for name in want if name != "loss")
    patch_model(model, backend=KERNELS)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTED[1])
        model.enable_input_require_grads()
    got = step_of(model, packed(docs))
    assert got["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert relative(got, want) <= 1e-4


@pytest.mark.parametrize("share_prefixes", [False, True])
def test_padded_rows_without_their_padding(share_prefixes: bool, device: str) -> None:
    """padding_free and share_prefixes: the rows of a preference pair as stock computes them."""
    model = tiny_model("llama").to(device)
    prompt, *answers = (d.to(device) for d in documents(lengths=(20, 7, 12)))
    ids = torch.zeros(2, 32, dtype=torch.long, device=device)
    for row, answer in zip(ids, answers):
        row[: 20 + len(answer)] = torch.cat([prompt, answer])
    mask = (ids != 0).long()
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask).logits
        patch_model(model, backend=KERNELS, padding_free=True, share_prefixes=share_prefixes)
        got = model(input_ids=ids, attention_mask=mask).logits
    assert close(got[mask.bool()], want[mask.bool()])


# Liger's kernels


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels run here: on the GPU, or interpreted on one that is none."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    if INTERPRETED:
        interpret_liger(monkeypatch)


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "gpt_oss"])
def test_liger(family: str, order: Order, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused loss, RoPE, norms and MLPs: a pack is its documents with the same kernels, whichever
    comes first, labels over boundaries taken out; and the model is as it was when unpatched."""
    model = tiny_model(family).to(device).train()
    docs = [d.to(device) for d in documents()]
    both(model, order, monkeypatch, backend=KERNELS)

    want = step_alone(model, docs)
    batch = packed(docs)
    assert model(**batch).logits is None, "the fused loss did not run"
    got = step_of(model, {**batch, "labels": batch["input_ids"]})
    assert got["loss"].item() == pytest.approx(want["loss"].item(), rel=1e-5)
    assert relative(got, want) <= 1e-4
    unpatch_model(model)
    assert relative(step_alone(model, docs), want) <= 1e-6


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_liger_in_a_trainer(
    tmp_path: Path, checkpointing: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """use_liger_kernel=True: the losses of the documents one by one without it, under a watch."""
    exact = trainer(tmp_path, device, pack=False)
    exact.train()
    keep_modeling(type(exact.model), monkeypatch)
    run = trainer(
        tmp_path, device, pack=True, use_liger_kernel=True, gradient_checkpointing=checkpointing
    )
    run.add_callback(IsolationCallback(run, every=5))
    run.train()
    assert "liger_kernel" in run.model.forward.__func__.__module__
    assert close(logged(run), logged(exact), 1e-4)
    assert logged(run, "isolation/largest_gradient").tolist() == [0.0] * 3


# In a Trainer, watched


def features() -> list[dict[str, list[int]]]:
    """Documents of 2 to 39 tokens, the first token of each without a label."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 40, (STEPS * TOGETHER,), generator=generator).tolist()
    docs = [torch.randint(3, 150, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": doc, "labels": [-100, *doc[1:]]} for doc in docs]


def rows(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """One document a batch, nothing else."""
    return {name: torch.tensor([batch[0][name]]) for name in batch[0]}


def trainer(folder: Path, device: str, *, pack: bool, model: Any = None, **settings: Any) -> Any:
    """Ten optimizer steps of four documents each, packed or one after the other."""
    model = tiny_model("llama") if model is None else model
    if pack:
        patch_model(model, backend=KERNELS)
        batches = {"per_device_train_batch_size": TOGETHER}
    else:
        batches = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": TOGETHER}
    arguments = {
        "output_dir": str(folder),
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": device == "cpu",
        "logging_steps": 1,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        **batches,
        **settings,
    }
    taken = TrainingArguments(**arguments)
    taken._n_gpu = min(taken.n_gpu, 1)  # of several, a Trainer in one process would take all
    return Trainer(
        model,
        taken,
        train_dataset=features(),  # type: ignore[arg-type]
        data_collator=PackedCollator("documents") if pack else rows,
    )


def logged(run: Any, name: str = "loss") -> Tensor:
    return torch.tensor([entry[name] for entry in run.state.log_history if name in entry])


def test_ten_steps_of_a_trainer(tmp_path: Path, device: str) -> None:
    """The losses of the same documents one by one: in float32 equal, in bfloat16 no further off."""
    losses = {}
    for pack in (False, True):
        for bf16 in (False, True):
            run = trainer(tmp_path, device, pack=pack, bf16=bf16)
            counted = PackingCallback(run) if pack else None
            if counted is not None:
                run.add_callback(counted)
            run.train()
            assert run.model.device.type == device
            losses[pack, bf16] = logged(run)
            if pack:
                assert logged(run, "packing/tokens_per_second").min() > 0
    assert len(losses[True, True]) == STEPS
    exact = losses[False, False]
    assert close(losses[True, False], exact, 1e-4), losses
    rounding = (losses[False, True] - exact).abs().max()
    assert (losses[True, True] - exact).abs().max() <= 2 * rounding + 2**-8, losses


def test_the_watch_finds_nothing_in_a_clean_run(tmp_path: Path, device: str) -> None:
    run = trainer(tmp_path, device, pack=True, bf16=True, max_steps=3)
    run.add_callback(IsolationCallback(run, every=2))
    run.train()
    assert logged(run, "isolation/largest_gradient").tolist() == [0.0, 0.0]


def test_the_watch_finds_a_leak(tmp_path: Path, device: str) -> None:
    """A layer whose output is a sum over the whole row is named."""
    run = trainer(tmp_path, device, pack=True, max_steps=3)

    def naive(module: Any, args: Any, kwargs: Any, output: Any) -> tuple[Tensor, None]:
        return kwargs["hidden_states"].cumsum(1), None

    run.model.model.layers[1].self_attn.register_forward_hook(naive, with_kwargs=True)
    run.add_callback(IsolationCallback(run))
    with pytest.raises(IsolationError, match=r"step 1: .*first in model\.layers\.1"):
        run.train()


def test_the_audit_on_the_device(device: str) -> None:
    """Isolated when patched, NaN and Inf too; stock leaks in its first attention."""
    stock = tiny_model("llama").to(device)
    leak = leaks_between_documents(stock)
    assert "layers.0.self_attn" in str(leak), leak
    model = patch_model(tiny_model("llama").to(device), backend=KERNELS, verify=True)
    report = audit(model)
    assert report.isolated, str(report)


# What the machine is told, and memory


def test_the_doctor_names_the_kernels_first(
    device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["doctor", "--no-run", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (told["device"], told["auto"]) == (device, KERNELS)
    verdict = _verdict(KERNELS, device, run=True)
    assert verdict.works, verdict


def test_memory_is_linear_in_tokens(device: str) -> None:
    """Forward and backward of 32k tokens in one document: outputs and documented workspaces, where
    one matrix of scores alone would take 2 GiB a head."""
    tokens, heads, kv_heads, head_dim = 1 << 15, 8, 2, 64
    q, k, v = (
        torch.randn(tokens, n, head_dim, device=device, dtype=torch.bfloat16).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )
    dout = torch.randn_like(q)
    layout = DocumentLayout.from_lengths([tokens], device=device)

    def step() -> None:
        out = attention(q, k, v, layout, backend=KERNELS, deterministic=True)
        torch.autograd.grad(out, (q, k, v), dout)

    step()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    used = torch.cuda.max_memory_allocated() - before
    results = sum(2 * x.numel() for x in (q, q, k, v))  # out, dq, dk, dv
    rows = 4 * heads * tokens * 3  # lse, and the two vectors of the backward
    # The allocator rounds each block, large ones by up to a MiB.
    assert used <= results + rows + 2**24, f"{used} bytes for {results} of results"
