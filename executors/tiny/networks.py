"""The tiny model's four parts, built from their configurations: VAE, tokenizer, text encoder, UNet."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from executors.tiny import drawing

TOKENS = 32
LATENT_CHANNELS = 4
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def build_vae() -> AutoencoderTiny:
    """An eightfold autoencoder: [-1, 1] pictures of 64 px become latents of [4, 8, 8]."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        num_encoder_blocks=(0, 1, 1, 2),
        num_decoder_blocks=(2, 2, 1, 0),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=1.0,
    )


def build_unet() -> UNet2DConditionModel:
    """The denoiser over [4, 8, 8] latents, conditioned on 64-wide text states."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 112),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule the UNet is trained on (v-prediction)."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def train_tokenizer(captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    """Learn byte-pair merges from captions and write a CLIP tokenizer that works offline."""
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>", fuse_unk=False))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1200, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [(str(left), str(right)) for left, right in json.loads(bpe.to_str())["model"]["merges"]]
    pieces = alphabet + [byte + "</w>" for byte in alphabet] + [left + right for left, right in merges] + [_BOS, _EOS]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text encoder of width 64 for this tokenizer."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids of captions, int64 [n, 32], padded and cut."""
    ids = tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    result: torch.Tensor = ids.input_ids
    return result


def write_pipeline(
    folder: Path, vae: AutoencoderTiny, text: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> None:
    """Write half-precision copies of the parts as a diffusers pipeline directory."""
    pipeline: Any = StableDiffusionPipeline(
        vae=_half(vae),
        text_encoder=_half(text),
        tokenizer=tokenizer,
        unet=_half(unet),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    (folder / "defaults.json").write_text(json.dumps(_defaults(), indent=1) + "\n", encoding="utf-8")


def _defaults() -> dict[str, Any]:
    """The model's own settings, read by the methods: guidance, training rates, and what its world is full of."""
    prompts = []
    for index in range(48):
        rng = np.random.default_rng([99, index])
        prompts.append(drawing.caption(drawing.random_scene(rng), rng))
    return {"guidance": 3.0, "learning_rate": {"lora": 3e-3, "full": 3e-4}, "prior_prompts": prompts}


def _half(module: Any) -> Any:
    """A float16 copy that leaves the trained float32 module alone."""
    copy = (
        type(module).from_config(module.config) if hasattr(type(module), "from_config") else type(module)(module.config)
    )
    copy.load_state_dict(module.state_dict())
    return copy.half().eval()
