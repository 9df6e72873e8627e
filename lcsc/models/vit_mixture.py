"""A vision transformer some of whose layers are mixtures of experts that choose their tokens.

No class of transformers is one. Tensors have the names of transformers' ViT in files, so that a dense ViT and its
mixture differ in the mixtures alone. N = images, T = tokens of an image, D = width, E = experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lcsc.models.own_files import OwnFiles

ACTIVATIONS = {"gelu": nn.functional.gelu, "relu": nn.functional.relu, "silu": nn.functional.silu}


class MixtureViTOutput(NamedTuple):
    """`logits`: shape (N, labels)."""

    logits: Tensor


def _named(**modules: nn.Module) -> nn.Module:
    """Modules under one name."""
    return nn.ModuleDict(modules)


class _Block(nn.Module):
    """A feed-forward block, the whole of a dense layer or one expert."""

    def __init__(self, width: int, units: int, act: str) -> None:
        super().__init__()
        self.intermediate = _named(dense=nn.Linear(width, units))
        self.output = _named(dense=nn.Linear(units, width))
        self._act = ACTIVATIONS[act]

    def forward(self, x: Tensor) -> Tensor:
        return self.output["dense"](self._act(self.intermediate["dense"](x)))  # type: ignore


class ExpertChoice(nn.Module):
    """Each expert takes the tokens of an image that want it most (Expert Choice, arXiv:2202.09368).

    With R = softmax over the experts of x W^T, expert e takes the c = round(capacity T / E) tokens of largest R[:, e],
    at least 1 and at most T. A token becomes sum_e R[t, e] f_e(x_t) over the experts that took it; with `normalize`
    these weights are divided by their sum. A token that nobody took becomes 0: the layer's residual is all it has.

    Images do not share experts' room, so that an image's result does not depend on the others of its batch.
    """

    def __init__(self, width: int, units: int, act: str, num_experts: int, capacity: float, normalize: bool) -> None:
        super().__init__()
        self.router = nn.Linear(width, num_experts, bias=False)
        self.experts = nn.ModuleList(_Block(width, units, act) for _ in range(num_experts))
        self._capacity, self._normalize = capacity, normalize

    def chosen(self, x_NTD: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of all experts, shape (N, T, E), zero for tokens they did not take; and whom they took, (N, c, E)."""
        T, E = x_NTD.shape[1], len(self.experts)
        count = min(T, max(1, round(self._capacity * T / E)))
        probs_NTE = self.router(x_NTD).softmax(-1)
        taken_NcE = probs_NTE.topk(count, dim=1).indices
        weights_NTE = torch.zeros_like(probs_NTE).scatter(1, taken_NcE, probs_NTE.gather(1, taken_NcE))
        if self._normalize:
            total_NT1 = weights_NTE.sum(-1, keepdim=True)
            weights_NTE = weights_NTE / torch.where(total_NT1 > 0, total_NT1, torch.ones_like(total_NT1))
        return weights_NTE, taken_NcE

    def forward(self, x_NTD: Tensor) -> Tensor:
        weights_NTE, taken_NcE = self.chosen(x_NTD)
        out_NTD = torch.zeros_like(x_NTD)
        for e, expert in enumerate(self.experts):
            at_NcD = taken_NcE[:, :, e, None].expand(-1, -1, x_NTD.shape[2])
            own_Nc1 = weights_NTE[:, :, e].gather(1, taken_NcE[:, :, e])[..., None]
            out_NTD = out_NTD.scatter_add(1, at_NcD, own_Nc1 * expert(x_NTD.gather(1, at_NcD)))
        return out_NTD


class _Layer(_Block):
    """One layer; `mixture` stands in for the block where there is one."""

    def __init__(self, width: int, units: int, act: str, heads: int, eps: float, bias: bool, mixture: Any) -> None:
        super().__init__(width, units, act)
        if mixture is not None:
            del self.intermediate, self.output
        self.layernorm_before, self.layernorm_after = (nn.LayerNorm(width, eps=eps) for _ in range(2))
        projections = {name: nn.Linear(width, width, bias=bias) for name in ("query", "key", "value")}
        self.attention = _named(attention=_named(**projections), output=_named(dense=nn.Linear(width, width)))
        self.mixture = mixture
        self._heads = heads

    def forward(self, x_NTD: Tensor) -> Tensor:
        normed_NTD, own = self.layernorm_before(x_NTD), self.attention["attention"]  # type: ignore[index]
        heads = [own[name](normed_NTD).unflatten(2, (self._heads, -1)).transpose(1, 2) for name in own]
        mixed_NHTd = nn.functional.scaled_dot_product_attention(*heads)
        x_NTD = x_NTD + self.attention["output"]["dense"](mixed_NHTd.transpose(1, 2).flatten(2))  # type: ignore[index]
        after_NTD = self.layernorm_after(x_NTD)
        return x_NTD + (super().forward(after_NTD) if self.mixture is None else self.mixture(after_NTD))


class _Embeddings(nn.Module):
    def __init__(self, width: int, image_size: int, patch_size: int, channels: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2 + 1, width))
        self.patch_embeddings = _named(projection=nn.Conv2d(channels, width, patch_size, patch_size))

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        patches = self.patch_embeddings["projection"](pixels_NCHW).flatten(2).transpose(1, 2)  # type: ignore[index]
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1) + self.position_embeddings


class MixtureViT(OwnFiles, nn.Module):
    """A classifier of images. Arguments are those of transformers' `ViTConfig`, and of the mixtures.

    Args:
        num_labels: classes.
        num_experts: E.
        capacity: experts that take a token, on average.
        sparse_layers: layers that are mixtures, counted from 0.
        normalize: see `ExpertChoice`.
    """

    written: ClassVar[str] = "model{suffix}.safetensors"  # as transformers names them
    read: ClassVar[str] = "*.safetensors"

    def __init__(
        self,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-12,
        image_size: int = 224,
        patch_size: int = 16,
        num_channels: int = 3,
        qkv_bias: bool = True,
        num_labels: int = 2,
        num_experts: int = 8,
        capacity: float = 2.0,
        sparse_layers: Sequence[int] = (),
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.config = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        self.config["sparse_layers"] = list(sparse_layers)
        D, units, act = hidden_size, intermediate_size, hidden_act

        def layer(i: int) -> _Layer:
            sparse = i in self.config["sparse_layers"]
            mixture = ExpertChoice(D, units, act, num_experts, capacity, normalize) if sparse else None
            return _Layer(D, units, act, num_attention_heads, layer_norm_eps, qkv_bias, mixture)

        self.vit = _named(
            embeddings=_Embeddings(D, image_size, patch_size, num_channels),
            encoder=_named(layer=nn.ModuleList(layer(i) for i in range(num_hidden_layers))),
            layernorm=nn.LayerNorm(D, eps=layer_norm_eps),
        )
        self.classifier = nn.Linear(D, num_labels)

    def forward(self, pixel_values: Tensor) -> MixtureViTOutput:
        """Logits of images, shape (N, C, H, W), of the configured size."""
        x_NTD = self.vit["embeddings"](pixel_values)  # type: ignore[index]
        for layer in self.vit["encoder"]["layer"]:  # type: ignore[index]
            x_NTD = layer(x_NTD)
        return MixtureViTOutput(self.classifier(self.vit["layernorm"](x_NTD)[:, 0]))  # type: ignore[index]

    @property
    def settings(self) -> dict[str, Any]:
        """See `OwnFiles`."""
        return self.config
