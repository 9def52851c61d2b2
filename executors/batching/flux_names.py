"""Flux's layers as its first publication names and joins them: LoRA files of most scripts say them so."""

from __future__ import annotations

from collections.abc import Iterable

_IN_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_IN_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_WHOLE = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"} | {
    f"{theirs}.{end}": f"time_text_embed.{ours}.{layer}"
    for theirs, ours in (
        ("time_in", "timestep_embedder"),
        ("vector_in", "text_embedder"),
        ("guidance_in", "guidance_embedder"),
    )
    for end, layer in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
}
_BLOCKS = (
    ("transformer_blocks", "double_blocks", _IN_DOUBLE),
    ("single_transformer_blocks", "single_blocks", _IN_SINGLE),
)


def published(keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the layers ``transformer.<path>`` by the published name, in the order of their rows; empty for other networks."""
    known = set(keys)
    numbers = {tuple(key.split(".")[1:3]) for key in known if key.startswith("transformer.")}
    if not any(kind == "single_transformer_blocks" for kind, *_ in numbers):
        return {}
    found: dict[str, tuple[str, ...]] = {name: (f"transformer.{path}",) for name, path in _WHOLE.items()}
    for kind, theirs, inner in _BLOCKS:
        for number in (each[1] for each in numbers if each[0] == kind):
            for name, paths in inner.items():
                found[f"{theirs}.{number}.{name}"] = tuple(f"transformer.{kind}.{number}.{path}" for path in paths)
    return {name: layers for name, layers in found.items() if known.issuperset(layers)}
