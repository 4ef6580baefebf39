"""The model under audit: random documents that share no token, and its outputs by document."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from packed_attn.audit.conventions import AuditBatch, Convention, Document, Pair, packed_batch
from packed_attn.audit.embeddings import input_embeddings
from packed_attn.audit.precision import Computed

# Documents of the audit: odd lengths, one of a single token, a sum that is unlikely to be a width.
LENGTHS = (5, 1, 37, 24)
# Beside a verdict that then says nothing of the architecture.
BLIND = "no output depends on another token of its own document, so a leak could not be seen"


class NoRowPerDocument(Exception):
    """The model gives one output for several documents, so no document has its own."""


class Subject:
    """A model and the documents that it is given.

    Args:
        model: the model; wrappers that only watch gradients are taken off.
        lengths: tokens of each document; of an encoder-decoder those of its target, and its source
            has one more.
        seed: of the random tokens, and of whatever the model draws in train mode.

    Attributes:
        pools: token ids of each document, and one more pool for what completes a batch.
        documents, replacements: each document, and another that differs in every token.
        patched: whether `patch_model` holds on the model.

    Raises:
        ValueError: fewer than two documents, no token embeddings, too few tokens in the
            vocabulary, weights on the meta device, or a patch that holds by half.
    """

    def __init__(self, model: nn.Module, lengths: Sequence[int], seed: int) -> None:
        if len(lengths) < 2 or min(lengths) < 1:
            raise ValueError(
                f"an audit needs two documents of a token or more, got {tuple(lengths)}"
            )
        self.model = _watched(model)
        self.seed = seed
        self.lengths = tuple(lengths)
        _check_weights(self.model)
        self.patched = is_patched(self.model)
        self.pools = token_pools(self.model, len(lengths) + 1, seed)
        self.documents: Sequence[Document]
        self.replacements: Sequence[Document]
        if takes_targets(self.model):
            self.documents, self.replacements = _pairs(self.pools, lengths, seed)
        else:
            self.documents, self.replacements = _documents(self.pools, lengths, seed)
        self._alone: dict[bool, list[Tensor]] = {}
        self._computes_in: dict[bool, torch.dtype] = {}
        self._looks_beyond: dict[bool, bool] = {}
        self.per_token = True
        self.terms: list[str] | None = None

    def batch(self, documents: Sequence[Document], convention: Convention) -> AuditBatch:
        """The packed batch of `documents`; a stock model is not handed a layout."""
        pad_token = int(self.pools[-1][0])
        batch = packed_batch(documents, self.pools[-1], pad_token, convention)
        if not self.patched:
            batch.kwargs.pop("layout", None)
            batch.kwargs.pop("decoder_layout", None)
        if not accepts(self.model, "use_cache"):
            batch.kwargs.pop("use_cache", None)
        return batch

    def run(self, kwargs: Mapping[str, Any], *, seed: int | None = None) -> Tensor:
        """The model's output tensor; whatever it draws at random is drawn alike each time."""
        from packed_attn_patches.foreign import unwatched

        with torch.random.fork_rng(enabled=self.model.training), unwatched():
            if self.model.training:
                torch.manual_seed(self.seed if seed is None else seed)
            return output_tensor(self.model(**kwargs))

    def alone(self) -> list[Tensor]:
        """The outputs of each document by itself, `[length, width]`, or `[1, width]` of a model
        that pools a document."""
        training = self.model.training
        if training not in self._alone:
            with Computed(self.model) as computed:
                outputs = [self.run(kwargs_alone(d)) for d in self.documents]
            lengths = [_size(d) for d in self.documents]
            self.per_token = all(
                x.ndim >= 2 and x.shape[:2] == (1, n) for x, n in zip(outputs, lengths)
            )
            self._alone[training] = [self.flat(x) for x in outputs]
            self._computes_in[training] = computed.coarsest(outputs[0])
        return self._alone[training]

    def alone_again(self) -> list[Tensor]:
        """The same of a model that something was done to in between."""
        return [self.flat(self.run(kwargs_alone(d))) for d in self.documents]

    def computes_in(self) -> torch.dtype:
        """The coarsest dtype of what its modules return for a document alone."""
        self.alone()
        return self._computes_in[self.model.training]

    def looks_beyond(self) -> bool:
        """Whether an output of the longest document changes with tokens that are not its own.

        Its own is the middle one; with targets, all of them; where a model pools, which may be the
        first or the last.
        """
        training = self.model.training
        if training not in self._looks_beyond:
            self._looks_beyond[training] = self._sees_others()
        return self._looks_beyond[training]

    def _sees_others(self) -> bool:
        index = max(range(len(self.documents)), key=lambda i: _size(self.documents[i]))
        document, other = self.documents[index], self.replacements[index]
        alone = self.alone()[index]
        rows = slice(None)
        if isinstance(document, Pair):
            assert isinstance(other, Pair)
            changed: Document = document._replace(source=other.source)
        else:
            assert isinstance(other, Tensor)
            own = torch.tensor([len(document) // 2] if self.per_token else [0, -1])
            changed = other.clone()
            changed[own] = document[own]
            rows = own if self.per_token else rows
        now = self.flat(self.run(kwargs_alone(changed)))
        return not torch.equal(now[rows], alone[rows])

    def packed(self, batch: AuditBatch) -> Tensor:
        """The outputs of a packed batch: a row a token of its stream, or a row a document.

        Raises:
            NoRowPerDocument: a model that pools gives fewer rows than documents.
        """
        return self.rows(self.run(batch.kwargs), batch)

    def rows(self, output: Tensor, batch: AuditBatch) -> Tensor:
        """An output as rows of `[tokens]` or `[documents]`."""
        self.alone()
        stream = batch.output
        count = stream.rows * stream.tokens if self.per_token else stream.layout.num_documents
        rows = self.flat(output)
        if len(rows) < (count if self.per_token else max(batch.places) + 1):
            raise NoRowPerDocument(
                f"{type(self.model).__name__} gives outputs of shape {list(output.shape)} for "
                f"{len(batch.places)} documents of a packed batch: none of them has its own"
            )
        return rows

    def spans(self, batch: AuditBatch) -> list[tuple[int, int]]:
        """(start, stop) of each document in the rows of `packed`."""
        return batch.output.spans if self.per_token else [(p, p + 1) for p in batch.places]

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Runs eagerly what is compiled: compiled code does not call the hooks of an audit."""
        if not is_compiled(self.model):
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield

    def flat(self, output: Tensor) -> Tensor:
        """An output as rows: of tokens, or of documents where the model pools."""
        if not self.per_token:
            return output.flatten(1) if output.ndim > 1 else output[:, None]
        return output.flatten(0, 1).flatten(1) if output.ndim > 2 else output.reshape(-1, 1)


def _size(document: Document) -> int:
    return len(document.target if isinstance(document, Pair) else document)


def kwargs_alone(document: Document) -> dict[str, Tensor]:
    """What a model is given of one document by itself."""
    if isinstance(document, Pair):
        return {"input_ids": document.source[None], "decoder_input_ids": document.target[None]}
    return {"input_ids": document[None]}


def output_tensor(output: Any) -> Tensor:
    """Logits, else hidden states, else the first tensor of what a model returned.

    Raises:
        ValueError: there is none.
    """
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    values: Iterable[Any] = output.values() if isinstance(output, Mapping) else output
    for value in values if isinstance(values, Iterable) else ():
        if isinstance(value, Tensor):
            return value
    raise ValueError(f"an audit needs logits or hidden states, got a {type(output).__name__}")


def is_patched(model: nn.Module) -> bool:
    """Whether `patch_model` holds on the model or on the model inside its wrappers.

    Raises:
        ValueError: a patch that holds by half.
    """
    import sys

    patches: Any = sys.modules.get("packed_attn_patches")
    if patches is None:
        return False
    left = patches.remains(model)
    if left is not None:
        raise ValueError(
            f"{type(model).__name__} is half patched: {left}, and no record of it; load it again"
        )
    return patches.is_patched(model)


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of the model went through torch.compile."""
    from torch._dynamo.eval_frame import OptimizedModule

    return any(
        isinstance(m, OptimizedModule) or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )


def token_pools(model: nn.Module, count: int, seed: int) -> list[Tensor]:
    """`count` sets of token ids that share none and that no model treats specially."""
    special = _special_tokens(getattr(model, "config", None))
    table: Any = input_embeddings(model)
    size = getattr(table, "num_embeddings", None) or table.weight.shape[0]
    usual = torch.tensor([t for t in range(_vocabulary(model, int(size))) if t not in special])
    if len(usual) < 2 * count:
        raise ValueError(
            f"an audit of {count - 1} documents needs a vocabulary of {2 * count} plain "
            f"tokens, but the model has {len(usual)}"
        )
    order = torch.randperm(len(usual), generator=torch.Generator().manual_seed(seed))
    each = len(usual) // count
    device = _device(model, table)
    return [usual[order[i * each : (i + 1) * each]].to(device) for i in range(count)]


def replaced(tokens: Tensor, pool: Tensor, seed: int) -> Tensor:
    """Tokens of `pool` that differ from `tokens`, which are of it too, in every place."""
    generator = torch.Generator().manual_seed(seed)
    step = torch.randint(1, len(pool), tokens.shape, generator=generator).to(pool.device)
    place = (tokens[..., None] == pool).int().argmax(-1)
    return pool[(place + step) % len(pool)]


def takes_targets(model: nn.Module) -> bool:
    """Whether the model is an encoder-decoder: forward takes a target beside a source."""
    return "decoder_input_ids" in inspect.signature(model.forward).parameters


def _pairs(
    pools: Sequence[Tensor], lengths: Sequence[int], seed: int
) -> tuple[list[Pair], list[Pair]]:
    """As `_documents`, of sources and targets; the streams differ in length, so that a tensor's
    shape says of which it is."""
    sources = _documents(pools, [n + 1 for n in lengths], seed + 2)
    targets = _documents(pools, lengths, seed)
    documents, replacements = (
        [Pair(source, target) for source, target in zip(*sides)] for sides in zip(sources, targets)
    )
    return documents, replacements


def _documents(
    pools: Sequence[Tensor], lengths: Sequence[int], seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Random documents, and for each one another of its length that differs in every token."""
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for pool, length in zip(pools, lengths):
        choice = torch.randint(len(pool), (length,), generator=generator)
        documents.append(pool[choice.to(pool.device)])
    replacements = [replaced(d, pool, seed + 1) for d, pool in zip(documents, pools)]
    return documents, replacements


def _special_tokens(config: Any) -> set[int]:
    """Token ids that a config names, such as padding and images."""
    if config is None:
        return set()
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return {
        token
        for part in (config, text)
        for name, value in vars(part).items()
        if name.endswith(("token_id", "token_index"))
        for token in (value if isinstance(value, (list, tuple)) else [value])
        if isinstance(token, int)
    }


def _vocabulary(model: nn.Module, size: int) -> int:
    """Tokens that are certainly in range: some models embed fewer than their table holds."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return min(size, getattr(text, "vocab_size", None) or size)


def _device(model: nn.Module, table: nn.Module) -> torch.device:
    """Where token ids go; weights that a hook brings in when they are used rest on meta."""
    for parameter in (*table.parameters(), *model.parameters()):
        if parameter.device.type != "meta":
            return parameter.device
    return torch.device("cpu")


def _check_weights(model: nn.Module) -> None:
    """Weights must exist, or be brought in by accelerate's hooks."""
    for path, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.device.type == "meta":
                where = f"{path}.{name}" if path else name
                raise ValueError(
                    f"an audit runs the model, but {where} is on the meta device: load the weights "
                    "first, or give them random values with model.to_empty(device=...)"
                )


def accepts(model: nn.Module, name: str) -> bool:
    """Whether a model's forward takes an argument of that name."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _watched(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, which expects a full backward for each forward."""
    while isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return model
