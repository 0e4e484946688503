"""Family B, learned query: the pooling query is asked once for every proposal, the tower before it is untouched.

SigLIP, SigLIP 2 and Perception Encoder (timm's `AttentionPoolLatent` inside open_clip's `TimmModel`), CoCa
(open_clip's `AttentionalPooler`) and transformers' `SiglipVisionModel`.

The query sees the patches of its mask. It does not see a class token among the keys (Perception Encoder, CoCa),
which speaks of the whole image. A mask without a patch would leave it nothing, so it sees all patches then.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from einops import rearrange
from torch import Tensor

from ..attention import project, projections, query_attention
from .base import MaskAwareTower, refuse_unknown, swap_class
from .layouts import (
    PoolingOpenClipViT,
    PoolingTimmViT,
    TransformersTower,
    check_clip_vit,
    check_timm_vit,
    check_transformers,
    is_clip_vit,
    patch_timm_vit,
    patch_transformers,
    patched_copy,
    prove_clip_vit,
    prove_pool,
    prove_timm_vit,
    prove_transformers,
    timm_trunk,
    transformers_inner,
)

SETTINGS = ("interpolation", "threshold")
POOLS = "pools its patches with a learned query"

_CELLS = (2, 3)  # that a proof runs on
_LATENT = ("latent", "q", "kv", "q_norm", "k_norm", "proj", "norm", "mlp")


def recognise(visual: Any) -> bool:
    """Whether `visual` pools its patches with a learned query."""
    if is_clip_vit(visual):
        return getattr(visual, "attn_pool", None) is not None
    trunk = timm_trunk(visual)
    if trunk is not None:
        return hasattr(getattr(trunk, "attn_pool", None), "latent")
    return hasattr(getattr(transformers_inner(visual), "head", None), "probe")


def check(visual: Any, start_layer: int) -> None:
    """Raise ValueError, naming what is unknown, unless `patch` computes exactly this tower."""
    tower: type
    if is_clip_vit(visual):
        check_clip_vit(visual)
        if visual.pool_type != "tok":
            raise ValueError(f"the tower gives {visual.pool_type!r} of its queries; expected the first one ('tok')")
        refuse_unknown(visual.attn_pool, ("query", "attn", "ln_q", "ln_k"), "attn_pool")
        _check_attention(visual.attn_pool.attn, "attn_pool.attn")
        tower, where, width = _CoCaTower, "attn_pool", visual.class_embedding.shape[-1]
    elif hasattr(visual, "trunk"):
        check_timm_vit(visual.trunk)
        pool = visual.trunk.attn_pool
        refuse_unknown(pool, _LATENT, "trunk.attn_pool")
        if pool.latent_len != 1 or pool.pool != "token":
            raise ValueError(f"trunk.attn_pool has {pool.latent_len} queries (pool {pool.pool!r}); expected one")
        tower, where, width = _TimmTower, "trunk.attn_pool", visual.trunk.num_features
    else:
        check_transformers(visual)
        head = transformers_inner(visual).head
        refuse_unknown(head, ("probe", "attention", "layernorm", "mlp"), "head")
        _check_attention(head.attention, "head.attention")
        tower, where, width = _TransformersTower, "head", head.probe.shape[-1]
    prove_pool(patched_copy(visual, tower), (1, _CELLS[0] * _CELLS[1], width), _CELLS, where)
    prove = {_CoCaTower: prove_clip_vit, _TimmTower: prove_timm_vit, _TransformersTower: prove_transformers}
    prove[tower](visual, tower)


def patch(visual: Any, start_layer: int) -> None:
    """Swap the classes of the tower and of what takes other sizes."""
    if is_clip_vit(visual):
        swap_class(visual, _CoCaTower)
    elif hasattr(visual, "trunk"):
        patch_timm_vit(visual, _TimmTower)
    else:
        patch_transformers(visual, _TransformersTower)


def _check_attention(attn: Any, where: str) -> None:
    projections = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "out_proj")
    refuse_unknown(attn, projections, where)
    if getattr(attn, "dropout", 0) or getattr(attn, "add_zero_attn", False):
        raise ValueError(f"{where} has dropout or an extra key, which CLIP's pools have not")


class _LearnedQueryTower(MaskAwareTower):
    """What the hosts share: the patches that are asked and their bias. Features are tokens (B, P+hw, width)."""

    settings = SETTINGS

    def _pool_masks(self, features: tuple[Tensor, ...], on_grid: Tensor) -> Tensor:
        empty = on_grid.isneginf().all(-1, keepdim=True)  # (B, 1, N, 1)
        patches = features[0][:, features[0].shape[1] - on_grid.shape[-1] :]  # (B, hw, width)
        return self._ask_pool(patches, on_grid.masked_fill(empty, 0))

    def _ask_pool(self, patches: Tensor, bias: Tensor) -> Tensor:
        """Patches (B, hw, width) and bias (B, 1, N, hw) -> embeddings (B, N, D)."""
        raise NotImplementedError


class _CoCaTower(PoolingOpenClipViT, _LearnedQueryTower):
    def _bypassed(self: Any) -> Iterator[tuple[str, Any]]:
        yield from (("attn_pool", self.attn_pool), ("attn_pool.attn", self.attn_pool.attn))

    def _ask_pool(self: Any, patches: Tensor, bias: Tensor) -> Tensor:
        pool = self.attn_pool
        query = pool.ln_q(pool.query[:1]).expand(len(patches), -1, -1)  # (B, 1, width): of all its queries CLIP's
        x = _multihead_attention(pool.attn, query, pool.ln_k(patches), bias)  # (B, N, width)
        return self._project(self.ln_post(x))


class _TimmTower(PoolingTimmViT, _LearnedQueryTower):
    def _bypassed(self: Any) -> Iterator[tuple[str, Any]]:
        yield from (*super()._bypassed(), ("trunk.attn_pool", self.trunk.attn_pool))

    def _ask_pool(self: Any, patches: Tensor, bias: Tensor) -> Tensor:
        trunk, pool = self.trunk, self.trunk.attn_pool
        q = pool.q_norm(rearrange(pool.q(pool.latent), "b q (h d) -> b h q d", h=pool.num_heads))  # (1, heads, 1, d)
        k, v = rearrange(pool.kv(patches), "b p (two h d) -> two b h p d", two=2, h=pool.num_heads)
        x = query_attention(q.expand(len(patches), -1, -1, -1), pool.k_norm(k), v, bias)  # (B, N, width)
        x = pool.proj_drop(pool.proj(x))
        if pool.mlp is not None:
            x = x + pool.mlp(pool.norm(x))
        return self.head(trunk.head(trunk.head_drop(trunk.fc_norm(x))))  # (B, N, D)


class _TransformersTower(TransformersTower, _LearnedQueryTower):
    def _features(self: Any, images: Tensor) -> tuple[Tensor, ...]:
        inner = transformers_inner(self)
        return (inner.post_layernorm(inner.encoder(inputs_embeds=inner.embeddings(images)).last_hidden_state),)

    def _ask_pool(self: Any, patches: Tensor, bias: Tensor) -> Tensor:
        head = transformers_inner(self).head
        probe = head.probe.expand(len(patches), -1, -1)  # (B, 1, width)
        x = _multihead_attention(head.attention, probe, patches, bias)  # (B, N, width)
        return x + head.mlp(head.layernorm(x))

    def _pool_image(self: Any, features: tuple[Tensor, ...], grid: tuple[int, int]) -> Tensor:
        return transformers_inner(self).head(features[0])

    def _bypassed(self: Any) -> Iterator[tuple[str, Any]]:
        inner = transformers_inner(self)
        yield from (("vision_model", inner),) if inner is not self else ()
        yield from (("head", inner.head), ("head.attention", inner.head.attention))


def _multihead_attention(attn: Any, query: Tensor, patches: Tensor, bias: Tensor) -> Tensor:
    """`attn` with one query (B, 1, width), asked for every row of bias (B, 1, N, hw) -> (B, N, width)."""
    parts = projections(attn)
    (q,), (k, v) = project(query, parts, 0, 1), project(patches, parts, 1, 3)
    return parts.out(query_attention(q, k, v, bias))
