"""Small models of many families with random weights: of transformers, without a download, and written out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from proof.nets import NETS

from trainfleet.batch import Batch
from trainfleet.loss import LossSum
from trainfleet.training.proof.case import Case

_WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_SMALL = {**_WIDTHS, "vocab_size": 99}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
_WHISPER = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
_WHISPER |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_model": 32, "num_mel_bins": 8, "vocab_size": 99}
_WHISPER |= {"max_source_positions": 16, "max_target_positions": 32, "decoder_start_token_id": 1}
_WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
_WAV2VEC = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
_WAV2VEC |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "num_labels": 5}
# A dropped layer is drawn on each rank, and masks by NumPy: neither is a function of the micro-batch.
_WAV2VEC |= {"layerdrop": 0.0, "apply_spec_augment": False}
_VIT = {**_WIDTHS, "image_size": 16, "patch_size": 4, "num_labels": 5}

FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "bert": (hf.BertForMaskedLM, hf.BertConfig, _SMALL),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99}),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, _GROUPED),
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig, {**_GROUPED, "num_local_experts": 4}),
    "qwen": (hf.Qwen2ForCausalLM, hf.Qwen2Config, _GROUPED),
    "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig, {**_SMALL, "max_position_embeddings": 64}),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config, {**_T5, "decoder_start_token_id": 0}),
    "vit": (hf.ViTForImageClassification, hf.ViTConfig, _VIT),
    "wav2vec2": (hf.Wav2Vec2ForSequenceClassification, hf.Wav2Vec2Config, {**_WIDTHS, **_WAV2VEC}),
    "whisper": (hf.WhisperForConditionalGeneration, hf.WhisperConfig, _WHISPER),
}
SAMPLES = 3


def case_of(family: str) -> Case:
    """Of transformers' families, and of networks written out (nets.py)."""
    build, loss_fn, make_batch = NETS.get(family, (None, loss, None))
    return Case(
        build=functools.partial(_build, build or functools.partial(of_transformers, family)),
        loss_fn=loss_fn,
        micro_batch=functools.partial(_micro_batch, family, make_batch),
        optimizer=adamw,
        accumulation=2,
        keep_activations=True,
    )


def _build(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    torch.manual_seed(0)
    return make()


def of_transformers(family: str) -> torch.nn.Module:
    model, config, settings = FAMILIES[family]
    return model(config(**settings))  # type: ignore[no-any-return]


def _micro_batch(family: str, make: Callable[[torch.Generator], Batch] | None, number: int) -> Batch:
    draw = torch.Generator().manual_seed(number)
    if make is not None:
        return make(draw)
    tokens = torch.randint(3, 99, (SAMPLES, 12), generator=draw)
    classes = torch.randint(5, (SAMPLES,), generator=draw)
    if family == "vit":
        return {"pixel_values": torch.randn(SAMPLES, 3, 16, 16, generator=draw), "labels": classes}
    if family == "wav2vec2":
        return {"input_values": torch.randn(SAMPLES, 400, generator=draw), "labels": classes}
    if family == "whisper":
        return {"input_features": torch.randn(SAMPLES, 8, 32, generator=draw), "labels": tokens}
    return {"input_ids": tokens, "labels": tokens}


def loss(output: Any, batch: Batch) -> LossSum:
    return LossSum(output["loss"] * SAMPLES, SAMPLES)


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)
