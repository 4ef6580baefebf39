"""A small tokenizer, trained on the spot: none can be downloaded."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
# Answers between {% generation %} marks, and the same text without them.
MARKED = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}</s>{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# Leaves out what answers before the last one thought, so an earlier text is no prefix of a later.
FORGETFUL = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if not loop.last %}{{ message.content.split('#')[-1] }}{% else %}{{ message.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tokenizer(folder: Path, *, chat_template: str | None = PLAIN, begin: bool = False) -> str:
    """Trains a byte-level tokenizer on this repository's prose and saves it; returns the folder.

    Args:
        chat_template: None for a tokenizer without one.
        begin: whether it writes `<s>` before a text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(prose(), trainer)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=chat_template
    )
    fast.save_pretrained(folder)
    return str(folder)


@cache
def prose() -> tuple[str, ...]:
    """The paragraphs of README and design notes, read once: they may be edited meanwhile."""
    texts = [(ROOT / name).read_text() for name in ("README.md", "docs/design.md")]
    return tuple(paragraph for text in texts for paragraph in text.split("\n\n"))
