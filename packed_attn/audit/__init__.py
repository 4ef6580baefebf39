"""The isolation proof: shows on the model itself whether packed documents see each other.

proof.py         audit: five checks by each convention that a batch may carry
probe.py         leaks_between_documents: the gradient check alone, for a live model and batch
conventions.py   which boundaries a batch carries, and how the model runs
subject.py       the model under audit: random documents, and its outputs by document
embeddings.py    embeddings as autograd leaves, or poisoned
modes.py         evaluation, train mode and checkpointing, each put back
trace.py         which module was the first to mix documents
terms.py         loss terms that mix documents by design
report.py        what an audit found
"""

from packed_attn.audit.conventions import CONVENTIONS, Convention
from packed_attn.audit.probe import Leak, OneDocument, leaks_between_documents
from packed_attn.audit.proof import audit
from packed_attn.audit.report import Check, IsolationReport

__all__ = [
    "CONVENTIONS",
    "Check",
    "Convention",
    "IsolationReport",
    "Leak",
    "OneDocument",
    "audit",
    "leaks_between_documents",
]
