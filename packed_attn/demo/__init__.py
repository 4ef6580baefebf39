"""The demo: four ways of batching real documents in one table, and a secret that only leaks tell.

packed-attn demo          or          python -m packed_attn.demo
"""

from packed_attn.demo.runner import run

__all__ = ["run"]
