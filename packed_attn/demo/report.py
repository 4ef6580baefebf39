"""What a demo run found, in words, as Markdown and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from packed_attn.demo.corpus import CorpusFacts
from packed_attn.demo.rows import RowResult
from packed_attn.demo.secret import SecretResult
from packed_attn.demo.settings import Settings
from packed_attn.demo.table import render_ratios, render_table


@dataclass
class Report:
    """Filled as the demo goes on; rows in the table's order."""

    settings: Settings
    machine: dict[str, str]
    corpus: CorpusFacts
    rows: list[RowResult] = field(default_factory=list)
    secret: SecretResult | None = None
    seconds: float = 0.0

    def introduction(self) -> str:
        """The machine and the documents."""
        facts = [f"{name:>12}  {fact}" for name, fact in self.machine.items()]
        return "\n".join(["", *facts, "", f"{self.corpus}.", ""])

    def comparison(self, *, markdown: bool = False) -> str:
        """The table, the ratios and what the columns mean."""
        table = render_table(self.rows, markdown=markdown)
        return f"\n{table}\n\n{render_ratios(self.rows)}\n\n{self._legend()}\n"

    def ending(self) -> str:
        """The secret, and where to look."""
        picture = self.settings.output / "secret.png"
        return f"\n{self.secret}\nThe curves are in {picture}. The demo took {self.seconds:.0f} s."

    def save(self) -> None:
        """Writes `results.json` and `table.md` to the output folder."""
        output = self.settings.output
        found = {
            "machine": self.machine,
            "corpus": asdict(self.corpus),
            "settings": {**asdict(self.settings), "output": output.name},
            "rows": [
                {**asdict(row), "tokens_per_second": row.tokens_per_second} for row in self.rows
            ],
            "secret": None if self.secret is None else asdict(self.secret),
            "seconds": self.seconds,
        }
        (output / "results.json").write_text(json.dumps(found, indent=2))
        (output / "table.md").write_text(render_table(self.rows, markdown=True) + "\n")

    def _legend(self) -> str:
        row, settings = self.rows[0], self.settings
        return (
            f"The same model and HF Trainer for {settings.train_seconds:.0f} s a row, on "
            f"{row.device} with {row.threads} threads, packs of {settings.capacity} tokens.\n"
            "  real tokens     padding is not counted\n"
            "  peak            of training, above the peak after imports and model build\n"
            "  loss            nats per docstring token, on "
            f"{settings.heldout_documents} documents kept back, each run by itself\n"
            "  gradient error  of a batch of fixed documents, against those documents run one by "
            "one\n"
            "  saw another     logits that changed when the other documents' tokens were replaced"
        )
