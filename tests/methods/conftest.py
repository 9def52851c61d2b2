"""Random pipelines of every family, built from configurations in seconds, and a context without a Pod."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

torch = pytest.importorskip("torch", reason="the AI methods need the executors extra")

from executors.methods import device  # noqa: E402  (sets the libraries offline before they are imported)

device.resolve("cpu")

from diffusers import (  # noqa: E402
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image  # noqa: E402
from transformers import (  # noqa: E402
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from executors.methods.base import GivenAdapter, ModelRef  # noqa: E402
from executors.tiny import drawing, networks  # noqa: E402


@dataclass
class FakeContext:
    """Records progress, and says stop once `stop_at` units are behind the run."""

    output_dir: Path
    files: dict[str, Path] = field(default_factory=dict)
    stop_at: int | None = None
    checkpoint: Path | None = None
    device: str = "cpu"
    cache_dir: Path | None = None
    adapters: tuple[GivenAdapter, ...] = ()
    model: str = ""
    priority: int = 0
    previews: list[Image.Image] = field(default_factory=list)
    seen: list[tuple[int, int, str]] = field(default_factory=list)
    offered: list[Path] = field(default_factory=list)

    def progress(self, done: int, total: int, note: str = "") -> None:
        self.seen.append((done, total, note))

    def preview(self, picture: Image.Image) -> None:
        self.previews.append(picture)

    def offer_checkpoint(self, checkpoint: Path) -> None:
        self.offered.append(
            shutil.copytree(checkpoint, self.output_dir.parent / f"{self.output_dir.name}-offered-{len(self.offered)}")
        )

    def should_stop(self) -> bool:
        return self.stop_at is not None and (self.seen[-1][0] if self.seen else 0) >= self.stop_at

    def fetch(self, file_id: str) -> Path:
        if file_id not in self.files:
            raise FileNotFoundError(file_id)
        return self.files[file_id]

    def model_dir(self, model_id: str) -> Path:
        raise FileNotFoundError(model_id)


@pytest.fixture
def new_context(tmp_path: Path) -> Callable[..., FakeContext]:
    made = 0

    def make(**options: object) -> FakeContext:
        nonlocal made
        made += 1
        folder = tmp_path / f"output-{made}"
        folder.mkdir()
        return FakeContext(folder, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def subject_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four drawn pictures of one emblem, by file id."""
    folder = tmp_path_factory.mktemp("subject")
    files = {}
    for index, pixels in enumerate(drawing.subject_pictures(drawing.subject_scene(1), 4, seed=1)):
        path = folder / f"{index}.png"
        Image.fromarray(pixels).save(path)
        files[hashlib.sha256(path.read_bytes()).hexdigest()] = path
    return files


def _random_kl_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )


def _random_unet(cross_dim: int, **extra: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_dim,
        attention_head_dim=4,
        norm_num_groups=8,
        **extra,
    )


def _text_config(tokens: int, **extra: object) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        projection_dim=24,
        bos_token_id=tokens - 2,
        eos_token_id=tokens - 1,
        pad_token_id=tokens - 1,
        **extra,
    )


@pytest.fixture(scope="session")
def random_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of random pipelines: ``sd`` (KL autoencoder), ``sdxl``, ``sd3``, ``flux``; ``pag`` has no loop of ours.

    ``inpaint`` and ``inpaint-xl`` take masks; all but these have ControlNets beside them.
    """
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = networks.train_tokenizer(["a red star", "a blue house on a green background"] * 5, folder / "tokenizer")
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )
    parts = {
        "vae": _random_kl_vae(),
        "text_encoder": CLIPTextModel(_text_config(len(tokenizer))),
        "tokenizer": tokenizer,
        "unet": _random_unet(16),
        "scheduler": scheduler,
    }
    unsafe = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**parts, **unsafe).save_pretrained(folder / "sd")
    StableDiffusionPAGPipeline(**parts, **unsafe, pag_applied_layers="mid").save_pretrained(folder / "pag")
    wide = _random_unet(
        40, addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=8 * 6 + 24
    )
    large = {
        "vae": parts["vae"],
        "text_encoder": CLIPTextModel(_text_config(len(tokenizer))),
        "text_encoder_2": CLIPTextModelWithProjection(_second_config(len(tokenizer))),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "unet": wide,
        "scheduler": scheduler,
    }
    StableDiffusionXLPipeline(**large, add_watermarker=False).save_pretrained(folder / "sdxl")
    seeing = {"in_channels": 9}
    StableDiffusionInpaintPipeline(**{**parts, "unet": _random_unet(16, **seeing)}, **unsafe).save_pretrained(
        folder / "inpaint"
    )
    seeing |= {key: wide.config[key] for key in _ADDED}
    StableDiffusionXLInpaintPipeline(
        **{**large, "unet": _random_unet(40, **seeing)}, add_watermarker=False
    ).save_pretrained(folder / "inpaint-xl")
    _save_controlnets(folder, parts["unet"], wide)
    _save_sd3(folder, tokenizer)
    for name, distilled in (("flux", True), ("flux-fast", False)):
        _save_flux(folder / name, tokenizer, distilled)
    _save_flow_controlnets(folder)
    names = ("sd", "sdxl", "sd3", "flux", "flux-fast", "pag", "inpaint", "inpaint-xl")
    return {name: folder / name for name in names}


_ADDED = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")


def _save_controlnets(folder: Path, narrow: UNet2DConditionModel, wide: UNet2DConditionModel) -> None:
    for model, unet in (("sd", narrow), ("sdxl", wide)):
        for name in ("canny", "depth"):
            net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
            for block in (*net.controlnet_down_blocks, net.controlnet_mid_block):
                torch.nn.init.normal_(block.weight, std=0.05)  # Fresh ones are zero and would change nothing.
            torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=0.2)
            net.save_pretrained(folder / model / "controlnets" / name)
    shutil.copytree(folder / "sdxl" / "controlnets" / "canny", folder / "sd" / "controlnets" / "foreign")
    broken = shutil.copytree(folder / "sd" / "controlnets" / "canny", folder / "sd" / "controlnets" / "broken")
    weights = broken / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def _save_sd3(folder: Path, tokenizer: object) -> None:
    """A transformer without the third text encoder, as many run it."""
    vae = _random_wide_vae()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=40,
        caption_projection_dim=32,
        pooled_projection_dim=48,
        out_channels=16,
        pos_embed_max_size=32,
    )
    first = _second_config(len(tokenizer))  # type: ignore[arg-type]
    first.hidden_size, first.intermediate_size = 16, 32
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(first),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(_second_config(len(tokenizer))),  # type: ignore[arg-type]
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(folder / "sd3")


def _save_flow_controlnets(folder: Path) -> None:
    """``blind`` sees neither prompt nor places of its own, ``hinted`` its picture as it is; some do not fit."""
    joint = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32}
    joint |= {"sample_size": 16, "joint_attention_dim": 40, "pooled_projection_dim": 48, "pos_embed_max_size": 32}
    blind = {"joint_attention_dim": None, "use_pos_embed": False, "force_zeros_for_pooled_projection": False}
    packed = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    packed |= {"joint_attention_dim": 40, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6)}
    told = {"guidance_embeds": True}
    hinted = {"patch_size": 2, "num_single_layers": 0, "conditioning_embedding_channels": 16}
    nets = {
        "sd3/controlnets/canny": SD3ControlNetModel(**joint),
        "sd3/controlnets/depth": SD3ControlNetModel(**joint),
        "sd3/controlnets/blind": SD3ControlNetModel(**{**joint, **blind}),
        "sd3/controlnets/few": SD3ControlNetModel(**{**joint, "num_layers": 1}),
        "sd3/controlnets/masked": SD3ControlNetModel(**joint, extra_conditioning_channels=1),
        "sd3/controlnets/narrow": SD3ControlNetModel(
            **{**joint, "attention_head_dim": 4, "caption_projection_dim": 16}
        ),
        "flux/controlnets/canny": FluxControlNetModel(**packed, **told),
        "flux/controlnets/depth": FluxControlNetModel(**packed),
        "flux/controlnets/pose": FluxControlNetModel(**packed, **told),
        "flux/controlnets/union": FluxControlNetModel(**packed, num_mode=4),
        "flux-fast/controlnets/hinted": FluxControlNetModel(**{**packed, **hinted}),
    }
    for path, net in nets.items():
        # Fresh ones are zero and would change nothing.
        blocks = [*net.controlnet_blocks, *getattr(net, "controlnet_single_blocks", [])]
        seeing = net.pos_embed_input.proj if hasattr(net, "pos_embed_input") else net.controlnet_x_embedder
        for block in (*blocks, seeing):
            torch.nn.init.normal_(block.weight, std=0.3)
        if getattr(net, "input_hint_block", None) is not None:
            torch.nn.init.normal_(net.input_hint_block.conv_out.weight, std=0.2)
        net.save_pretrained(folder / path)
    shutil.copytree(folder / "sd3" / "controlnets" / "canny", folder / "flux" / "controlnets" / "foreign")


def _random_wide_vae(blocks: int = 2) -> AutoencoderKL:
    """One of 16 channels, of which each place is 2 pixels wide, or 8 with four blocks."""
    return AutoencoderKL(
        block_out_channels=(8, 16, 16, 16)[:blocks],
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=32,
        shift_factor=0.06,
        scaling_factor=1.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _save_flux(folder: Path, tokenizer: object, distilled: bool) -> None:
    """Bent by size and told its guidance, as the larger one, or neither, as the one of four steps."""
    words = ["<pad>", "</s>", "<unk>", "\u2581a", "\u2581red", "\u2581star", "\u2581blue", "\u2581house", "\u2581"]
    words += [chr(code) for code in range(ord("a"), ord("z") + 1)]
    text = T5Config(
        vocab_size=64, d_model=40, d_kv=8, d_ff=48, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=40,
        pooled_projection_dim=16,
        guidance_embeds=distilled,
        axes_dims_rope=(4, 6, 6),
    )
    FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if distilled else 1.0, use_dynamic_shifting=distilled),
        vae=_random_wide_vae(2 if distilled else 4),
        text_encoder=CLIPTextModel(_text_config(len(tokenizer))),  # type: ignore[arg-type]
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(text),
        tokenizer_2=T5TokenizerFast(vocab=[(word, -float(rank)) for rank, word in enumerate(words)], extra_ids=0),
    ).save_pretrained(folder)
    (folder / "defaults.json").write_text('{"prompt_tokens": 24}\n', encoding="utf-8")


def _second_config(tokens: int) -> CLIPTextConfig:
    config = _text_config(tokens)
    config.hidden_size = 24
    config.intermediate_size = 48
    return config


@pytest.fixture
def model_ref(random_models: dict[str, Path]) -> Callable[..., ModelRef]:
    def ref(name: str, adapter_dir: Path | None = None) -> ModelRef:
        return ModelRef(name, random_models[name], adapter_dir)

    return ref
