"""The demo's text: every documented function of the Python standard library on this machine.

The prompt is the function's signature and body with the docstring taken out, the completion is the
docstring. Nothing is downloaded and nobody made the text up.
"""

from __future__ import annotations

import ast
import os
import random
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from packed_attn.demo.settings import Settings

if TYPE_CHECKING:
    import datasets
    from tokenizers import Tokenizer

SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
)
# <pad> is id 0; a document is <code> prompt <doc> completion <end>.
SPECIAL_TOKENS = ("<pad>", "<code>", "<doc>", "<end>")
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Example:
    """One function: `prompt` is its code without the docstring, `completion` the docstring."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class CorpusFacts:
    """What the corpus turned out to be, for the demo to print."""

    files: int
    documents: int
    tokens: int
    longest: int
    left_out: int

    def __str__(self) -> str:
        mean = self.tokens / max(self.documents, 1)
        return (
            f"{self.documents} documented functions from {self.files} files of the standard "
            f"library, {self.tokens} tokens, {mean:.0f} a document on average, {self.longest} at "
            f"most ({self.left_out} longer ones left out for every row)"
        )


def prepare_corpus(settings: Settings) -> CorpusFacts:
    """Reads, tokenizes and stores the documents where the rows find them.

    Raises:
        RuntimeError: the library has fewer documented functions than are kept back from training.
    """
    import datasets
    from tqdm.auto import tqdm

    files = stdlib_files()[: settings.max_files]
    reading = tqdm(files, desc=f"{'reading the library':>28}", unit="file")
    examples = shuffled(extract_examples(reading), settings.seed)
    tokenizer = train_tokenizer(examples, settings.vocab_size)
    every = tokenize(examples, tokenizer)
    lengths = [len(ids) for ids in every["input_ids"]]
    kept = [i for i, length in enumerate(lengths) if length <= settings.capacity]
    if len(kept) <= settings.heldout_documents:
        raise RuntimeError(
            f"the demo keeps back {settings.heldout_documents} documents, but "
            f"{sysconfig.get_path('stdlib')} has only {len(kept)} functions with docstrings"
        )
    datasets.disable_progress_bars()
    first = settings.heldout_documents
    every.select(kept[:first]).save_to_disk(str(settings.heldout_folder))
    every.select(kept[first:]).save_to_disk(str(settings.train_folder))
    tokenizer.save(str(settings.output / "tokenizer.json"))
    real = [lengths[i] for i in kept]
    return CorpusFacts(len(files), len(kept), sum(real), max(real), len(lengths) - len(kept))


def stdlib_files(root: Path | None = None) -> list[Path]:
    """The library's .py files in a fixed order, tests and installed packages left out."""
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        found += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    return found


def extract_examples(files: Iterable[Path]) -> Iterator[Example]:
    """Every function with a docstring; a file that is not valid UTF-8 Python is passed over."""
    for file in files:
        try:
            source = file.read_text("utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                tree = ast.parse(source)
        except (OSError, SyntaxError, UnicodeDecodeError, ValueError):
            continue
        lines = source.split("\n")  # as ast counts them; splitlines also breaks at form feeds
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                example = _example(node, lines)
                if example is not None:
                    yield example


def shuffled(examples: Iterable[Example], seed: int) -> list[Example]:
    """Each different example once, in an order fixed by `seed`."""
    unique = list(dict.fromkeys(examples))
    random.Random(seed).shuffle(unique)
    return unique


def train_tokenizer(examples: Sequence[Example], vocab_size: int) -> Tokenizer:
    """A byte-level BPE: any text encodes, and decodes to itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for e in examples for text in (e.prompt, e.completion))
    tokenizer.train_from_iterator(texts, trainer, length=2 * len(examples))
    return tokenizer


def tokenize(examples: Sequence[Example], tokenizer: Tokenizer) -> datasets.Dataset:
    """A data set with `input_ids` and `labels`; the prompt's labels are -100."""
    import datasets

    code, doc, end = (tokenizer.token_to_id(token) for token in SPECIAL_TOKENS[1:])
    prompts = tokenizer.encode_batch([e.prompt for e in examples])
    completions = tokenizer.encode_batch([e.completion for e in examples])
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for prompt, completion in zip(prompts, completions):
        head, tail = [code, *prompt.ids, doc], [*completion.ids, end]
        columns["input_ids"].append(head + tail)
        columns["labels"].append([IGNORED_LABEL] * len(head) + tail)
    return datasets.Dataset.from_dict(columns)


def _example(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: Sequence[str]) -> Example | None:
    """The function without its docstring's lines, or None where it has none or nothing else."""
    completion = (ast.get_docstring(node) or "").strip()
    first = node.body[0]
    # A docstring that shares its line with code, as in `def f(): "text"`, cannot be cut by lines.
    on_own_lines = first.lineno > node.lineno and (
        len(node.body) == 1 or node.body[1].lineno > (first.end_lineno or first.lineno)
    )
    if not completion or not on_own_lines:
        return None
    begin = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    kept = [*lines[begin : first.lineno - 1], *lines[first.end_lineno : node.end_lineno]]
    return Example(textwrap.dedent("\n".join(kept)).strip(), completion)
