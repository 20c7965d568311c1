"""Fine-tuning a causal language model of Hugging Face transformers: its model, its data in packed blocks, its folder.

    python recipes/finetune_hf.py runs/tiny_llama     makes a small one with random weights, without a download

A block holds tokens of several documents, one after the other. Each token sees its own document only: positions begin
anew with each, the attention mask is block by block, and no token is asked to guess the first of another document.
"""

from __future__ import annotations

import json
import sys
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainfleet.deps import require
from trainfleet.errors import CheckpointError, DataError
from trainfleet.loss import LossSum

if TYPE_CHECKING:
    from torch import nn

    from trainfleet.mesh import Mesh

Split = Literal["train", "validation"]

STDLIB = "stdlib"
HELD_OUT_ONE_IN = 20
IGNORED = -100
SHARD_BYTES = 5_000_000_000


def causal_lm(path: str, **settings: Any) -> nn.Module:
    """The model that the folder or hub name `path` describes, in float32 with numbers yet to be loaded.

    Its weights come through `model.init_from`, so that no rank holds those of others. `settings` go into its config.
    """
    transformers: Any = require("transformers", "hf", purpose="Fine-tuning models of Hugging Face")
    config = transformers.AutoConfig.from_pretrained(path, **settings)
    config.dtype = "float32"
    config.use_cache = False
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model.name_or_path = path
    return model.float()  # type: ignore[no-any-return]


# ── data ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Blocks:
    """Blocks of `length` tokens, one behind the other through all documents of `data`.

    `data` is a file or folder of .txt, .md, .py and .jsonl, the name of a dataset on the hub, or `stdlib`: the sources
    of this Python's own library. `tokenizer` is a folder or hub name. About one document in twenty is held out as
    `validation`, where the dataset has no such split itself. All tokens are made when it is opened, and held in memory.
    """

    def __init__(
        self, data: str, tokenizer: str, *, length: int = 512, split: Split = "train", column: str = "text"
    ) -> None:
        transformers: Any = require("transformers", "hf", purpose="Fine-tuning models of Hugging Face")
        self.length = length
        made = transformers.AutoTokenizer.from_pretrained(tokenizer)
        end = made.eos_token_id
        if end is None:
            raise DataError(f"The tokenizer {tokenizer} has no end-of-text token, which parts documents. Give it one.")
        tokens: list[NDArray[np.int32]] = []
        for text in documents(data, split, column):
            numbers = made(text, add_special_tokens=False, verbose=False)["input_ids"]
            tokens.append(np.array([*numbers, end], np.int32))
        self._tokens = np.concatenate(tokens) if tokens else np.empty(0, np.int32)
        self._starts = np.cumsum([0, *map(len, tokens)])
        if len(self) < 1:
            raise DataError(
                f"The {split} split of {data} has {len(self._tokens)} tokens, fewer than a block: {length}."
            )

    def __len__(self) -> int:
        return len(self._tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int64]]:
        if not 0 <= index < len(self):
            raise IndexError(f"Block {index} of {len(self)}.")
        begin = index * self.length
        at = np.arange(begin, begin + self.length)
        document = np.searchsorted(self._starts, at, side="right") - 1
        first = np.maximum(self._starts[document], begin)  # what lies before the block is not seen
        tokens = self._tokens[begin : begin + self.length].astype(np.int64)
        labels = np.where(at == first, IGNORED, tokens)
        return {"input_ids": tokens, "labels": labels, "position_ids": at - first, "document": document - document[0]}


def collate(samples: Sequence[dict[str, NDArray[np.int64]]]) -> dict[str, Any]:
    """A batch of keyword arguments for the model: a token sees those before it in its own document."""
    import torch

    batch: dict[str, Any] = {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]}
    document = batch.pop("document")
    same = document[:, None, :, None] == document[:, None, None, :]  # [B, 1, T, T]
    batch["attention_mask"] = same & torch.ones(same.shape[-2:], dtype=torch.bool).tril()
    batch["num_items_in_batch"] = 1  # transformers then sums the loss over tokens, in place of a mean
    return batch


def loss_fn(output: Any, batch: dict[str, Any]) -> LossSum:
    """The sum over the tokens that have a label, and their number."""
    return LossSum(output.loss, (batch["labels"][:, 1:] != IGNORED).sum())


def documents(data: str, split: Split, column: str = "text") -> Iterator[str]:
    """The texts of one split, in a fixed order."""
    place = Path(sysconfig.get_paths()["stdlib"]) if data == STDLIB else Path(data)
    if not place.exists():
        yield from _of_hub(data, split, column)
        return
    files = [place] if place.is_file() else sorted(place.glob("*.py" if data == STDLIB else "**/*"))
    number = 0
    for file in files:
        if file.suffix in (".txt", ".md", ".py"):
            texts: Iterator[str] = iter([file.read_text(errors="replace")])
        elif file.suffix == ".jsonl":
            texts = (json.loads(line)[column] for line in file.open() if line.strip())
        else:
            continue
        for text in texts:
            held_out = zlib.crc32(f"{file.name}/{number}".encode()) % HELD_OUT_ONE_IN == 0
            number += 1
            if held_out == (split == "validation"):
                yield text


def _of_hub(name: str, split: Split, column: str) -> Iterator[str]:
    from trainfleet.data.huggingface import load_dataset

    for row in load_dataset(name, split=split, format=None):
        if column not in row:
            raise DataError(f"The dataset {name} has no column {column!r}; it has {', '.join(row)}.")
        yield row[column]


# ── what is left of the run ───────────────────────────────────────────────────────────────────────────────────────


def finish(model: nn.Module, mesh: Mesh, folder: Path) -> dict[str, str | float]:
    """Write the trained model as transformers do, into the run's folder `hf`: config, weights in shards, tokenizer.

    The weights come from the last checkpoint, an array at a time, so that no rank gathers the model.
    """
    if not mesh.is_main:
        return {}
    from trainfleet.checkpoint.catalog import open_place, read_step
    from trainfleet.checkpoint.export import arrays_of, export_folder, groups_of
    from trainfleet.checkpoint.whole import Whole

    transformers: Any = require("transformers", "hf", purpose="Fine-tuning models of Hugging Face")
    target = folder / "hf"
    store, _ = open_place(str(folder))
    manifest, indexes = read_step(store, None)
    if manifest is None:
        raise CheckpointError(f"There is no checkpoint in {folder} to take the weights from. Set checkpoint.every.")
    held: Any = model
    held.config.save_pretrained(target)
    if getattr(held, "generation_config", None) is not None:
        held.generation_config.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(held.name_or_path).save_pretrained(target)
    with Whole(store, indexes) as whole:
        export_folder(whole, groups_of(arrays_of(whole, "model"), None, SHARD_BYTES), target, None)
    return {"saved for transformers": str(target)}


# ── a small model to try it on ────────────────────────────────────────────────────────────────────────────────────


def make_small(
    folder: Path, *, vocabulary: int = 2048, width: int = 128, layers: int = 4, seed: int = 0, one_in: int = 4
) -> None:
    """A Llama with random weights, and a tokenizer of byte pairs trained on one in so many of the library's sources."""
    require("transformers", "hf", purpose="Making a model of Hugging Face")
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    texts = [text for number, text in enumerate(documents(STDLIB, "train")) if number % one_in == 0]
    trained.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=["<end>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<end>", pad_token="<end>")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1MB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Usage: python recipes/finetune_hf.py FOLDER")
    make_small(Path(sys.argv[1]))
    print(f"A small Llama with random weights and a tokenizer are in {sys.argv[1]}.")
