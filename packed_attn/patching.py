"""patch_model and unpatch_model: one transformers model made exact on packed batches."""

from __future__ import annotations

from typing import Literal, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def patch_model(
    model: Model,
    *,
    backend: str = "auto",
    on_unknown: Literal["raise", "unpack"] = "raise",
    padding_free: bool = False,
    share_prefixes: bool = False,
    verify: bool = False,
) -> Model:
    """Makes a transformers model respect document boundaries in packed batches.

    A packed batch gets, for every document, the logits, loss and gradients that the document gets
    alone. Boundaries are read from `layout`, `cu_seq_lens_q`/`cu_seqlens`, `seq_idx`, an integer
    segment mask or `position_ids` that restart, whichever the batch carries; they must agree. A
    batch without boundaries (padded, generated, one document a row) runs as before.

    An encoder-decoder takes a pack of sources and a pack of as many targets: the boundaries of
    `decoder_input_ids` and `labels` have the same names behind `decoder_` (`decoder_layout`,
    `decoder_position_ids`, ...), and `PackedCollator(encoder_decoder=True)` writes both.

    Code in the model that is not its type's (a derived class, a layer put in another's place, a
    hook) is audited, which runs the model, in evaluation and train mode, and the model is refused
    where that mixes documents. What comes into it afterwards is not: call `patch_model` again.

    Only this instance changes: other models, also of the same config object, stay as they are.
    Patching twice is patching once. A deepcopy or a pickle of a patched model is patched too.

    Args:
        model: a model of an accepted architecture.
        backend: "auto", or a name of `packed_attn.backends.BACKENDS`.
        on_unknown: for an architecture that is not known to be exact, or holds code that mixes
            documents: "raise" refuses it, "unpack" runs it on documents batched by equal length,
            exact and slower.
        padding_free: also run padded batches (rows beside a 0/1 mask, as DPO and reward trainers
            make them) without their padding: the backbone computes their real tokens as one pack
            and returns rows, with zeros at padding. Generation stays as it is.
        share_prefixes: with `padding_free`, compute once what rows of a batch begin with in common
            (the prompt of a preference pair, of a group of rollouts), as a forest. A model that
            runs on documents batched by length gives the same and computes it in every row.
        verify: run `audit` on the patched model, and undo the patch if it leaks. A version of
            transformers outside the tested range is warned about and always audited.

    Returns:
        The same object.

    Raises:
        NotImplementedError: the model is not known to be exact; names it and the reason.
        RuntimeError: the audit found a leak; the model is as it was.
    """
    if on_unknown not in ("raise", "unpack"):
        raise ValueError(f"on_unknown must be 'raise' or 'unpack', got {on_unknown!r}")
    if share_prefixes and not padding_free:
        raise ValueError("share_prefixes=True needs padding_free=True: it is about padded rows")
    from packed_attn_patches import Settings, is_tested_version, patch, unpatch

    patch(model, Settings(backend, padding_free, share_prefixes), on_unknown)
    if verify or not is_tested_version():
        from packed_attn.audit import audit

        report = audit(model)
        if not report.isolated:
            unpatch(model)
            raise RuntimeError(f"patch_model undid its patch, because the model leaks:\n{report}")
    return model


def unpatch_model(model: Model) -> Model:
    """Undoes `patch_model` to the bit.

    Returns:
        The same object.

    Raises:
        ValueError: the model is not patched.
    """
    from packed_attn_patches import unpatch

    unpatch(model)
    return model
