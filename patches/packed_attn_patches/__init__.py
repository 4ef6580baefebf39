"""How packed-attn meets transformers.

    interface.py   the attention and mask functions that transformers calls by name
    boundaries.py  what a batch says of its documents -> one DocumentLayout
    inputs.py      the forward pre-hook, by which the layout reaches the layers
    families.py    which model types are accepted, and how that was decided
    unpack.py      a whole model run on documents batched by length
    fast_mixers.py token mixers whose kernels get the documents' boundaries
    mixer_proof.py the proof of such a mixer on the device at hand
    pairs.py       encoder-decoders: the same with source and target documents
    noise.py       NEFTune's noise at each document's own scale
    foreign.py     code in a model that is not its type's, to be audited
    wrappers.py    what stands around a model: taken off, or refused
    adapters.py    PEFT's adapters that look at a row, refused by name
    apply.py       putting all of it on one model instance, and taking it off again
    tiny.py        tiny random models of every model type
    children.py    work on many types, each in a process of its own

Importing this package imports transformers and registers the attention names; `packed_attn` itself
imports it only when a model is patched.
"""

from packed_attn_patches.apply import (
    Settings,
    is_patched,
    is_tested_version,
    patch,
    patched_module,
    remains,
    route_of,
    unpatch,
)

__all__ = [
    "Settings",
    "is_patched",
    "is_tested_version",
    "patch",
    "patched_module",
    "remains",
    "route_of",
    "unpatch",
]
