"""Walking a model block by block: load one, run it over all windows, free it.

The whole model is never in memory: peak use is the embedding table, or two blocks (the next is
read while one runs), and the windows' hidden states. Shapes: B windows in a batch, T tokens,
D hidden size, H query heads times head_dim, F FFN channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bipdeploy.errors import InputError
from bipdeploy.model import loading
from bipdeploy.model.activations import Batches, Keep, turn
from bipdeploy.model.checkpoint import Checkpoint, require_finite
from bipdeploy.recipe.model import ModelSection

if TYPE_CHECKING:
    import torch


Read = TypeVar("Read")


def compute_device(section: ModelSection) -> torch.device:
    """The device a recipe asks for. Raises InputError where it asks for CUDA and there is none."""
    import torch

    if section.device == "cuda" and not torch.cuda.is_available():
        raise InputError("model.device: cuda was asked for, and PyTorch finds no CUDA GPU here; "
                         "use auto or cpu")
    cuda = section.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


def devices_of(section: ModelSection) -> list[torch.device]:
    """The devices that scoring may use. Raises InputError where there are not as many as the recipe
    asks for."""
    import torch

    device, count = compute_device(section), section.devices
    there = torch.cuda.device_count() if device.type == "cuda" else 1
    if count > there:
        raise InputError(f"model.devices: {count} are asked for, and here "
                         + (f"CUDA shows {there}" if device.type == "cuda" else
                            "the model runs on the CPU") + "; lower it")
    return [torch.device("cuda", n) for n in range(count)] if device.type == "cuda" else [device]


def compute_dtype(section: ModelSection, config: Mapping[str, Any],
                  device: torch.device) -> torch.dtype:
    """The type a recipe computes in; see `model.dtype`."""
    import torch

    if section.dtype != "auto":
        return getattr(torch, section.dtype)
    if device.type == "cpu":
        return torch.float32
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float16")
    return getattr(torch, stored.removeprefix("torch."), torch.float16)


@dataclass
class AttentionOutput:
    """What a block's attention made of a batch. z: input of o_proj [B, T, H]; u: [B, T, D]."""

    z: torch.Tensor
    u: torch.Tensor


class Block:
    """One decoder layer, split where groups couple: at z (o_proj's input) and h (down_proj's)."""

    def __init__(self, layer: Any, arguments: dict[str, Any]):
        self.layer, self._arguments = layer, arguments

    @property
    def has_attention(self) -> bool:
        return self.layer.self_attn is not None

    @property
    def has_ffn(self) -> bool:
        return self.layer.mlp is not None

    @property
    def output(self) -> torch.nn.Linear:
        return self.layer.self_attn.o_proj

    @property
    def down(self) -> torch.nn.Linear:
        return self.layer.mlp.down_proj

    def attention(self, x: torch.Tensor) -> AttentionOutput:
        """Attention and its residual on block input x [B, T, D]."""
        caught: dict[str, torch.Tensor] = {}

        def catch(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            caught["z"] = inputs[0]

        handle = self.output.register_forward_pre_hook(catch)
        try:
            attended, _ = self.layer.self_attn(
                hidden_states=self.layer.input_layernorm(x), **self._arguments)
        finally:
            handle.remove()
        return AttentionOutput(caught["z"], x + attended)

    def ffn_parts(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """silu(gate) and up [B, T, F] on attention output u [B, T, D]; their product is h."""
        n = self.layer.post_attention_layernorm(u)
        return self.layer.mlp.act_fn(self.layer.mlp.gate_proj(n)), self.layer.mlp.up_proj(n)

    def ffn(self, u: torch.Tensor) -> torch.Tensor:
        """The whole FFN on u, without the residual: [B, T, D]."""
        return self.layer.mlp(self.layer.post_attention_layernorm(u))

    def on(self, device: torch.device) -> Block:
        """A copy for another device."""
        return Block(copy.deepcopy(self.layer).to(device), _moved(self._arguments, device))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The block's output y [B, T, D]."""
        u = self.attention(x).u if self.has_attention else x
        return u + self.ffn(u) if self.has_ffn else u


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors on another device, in whatever holds them."""
    if isinstance(value, dict):
        return {name: _moved(part, device) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    return value.to(device) if hasattr(value, "to") else value


def ahead(count: int, read: Callable[[int], Read]) -> Iterator[Read]:
    """What `read` gives of 0, 1, … While one is used the next is read, on a thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="next-block") as reader:
        following = reader.submit(read, 0)
        for index in range(1, count + 1):
            own = following.result()
            if index < count:
                following = reader.submit(read, index)
            else:
                del following
            yield own
            del own


class BlockWalker:
    """Reads a checkpoint one block at a time, to one device and in one type.

    `devices` are all that windows may be shared out to; `device` is the first of them.
    """

    def __init__(self, source: Path | Checkpoint, section: ModelSection):
        import torch

        self.devices = devices_of(section)
        self.device = self.devices[0]
        self.checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
        self.architecture = self.checkpoint.architecture
        self.family = self.architecture.family
        self.dtype = compute_dtype(section, self.checkpoint.config, self.device)
        self.config = loading.load_config(self.checkpoint.folder,
                                          trust_remote_code=section.trust_remote_code)
        self.config._attn_implementation = "sdpa"
        self.trusted = section.trust_remote_code
        self._torch = torch

    def __len__(self) -> int:
        return len(self.architecture.blocks)

    def embed(self, batches: list[torch.Tensor], keep: Keep = list, *,
              shared: bool = False) -> Batches:
        """Hidden states [B, T, D] of batches of token windows [B, T], on the compute device, or
        `shared` out to all devices."""
        name = "model.embed_tokens.weight"
        # Rows are looked up as stored: the table is large, and few of them are needed.
        table = self.checkpoint.tensors([name])
        require_finite(table, self.checkpoint.folder)
        devices = self.devices if shared else [self.device]
        return keep(self._torch.nn.functional.embedding(windows, table[name])
                    .to(devices[turn(number, len(devices))], self.dtype)
                    for number, windows in enumerate(batches))

    def bytes_of(self, windows: list[torch.Tensor]) -> int:
        """Bytes of the hidden states of all windows."""
        tokens = sum(batch.numel() for batch in windows)
        return tokens * self.architecture.hidden * self.dtype.itemsize

    def head(self) -> torch.nn.Module:
        """The final norm and the output layer: hidden states [B, T, D] → logits [B, T, V]."""
        names = {"0.weight": "model.norm.weight", "1.weight": (
            "model.embed_tokens.weight" if self.architecture.tied else "lm_head.weight")}
        norm = getattr(loading.family_module(self.family), f"{self.family.class_prefix}RMSNorm")
        with self._torch.device("meta"):
            head = self._torch.nn.Sequential(
                norm(self.architecture.hidden, eps=self.config.rms_norm_eps),
                self._torch.nn.Linear(self.architecture.hidden, self.architecture.vocabulary,
                                      bias=False))
        head.load_state_dict({own: self._placed(name) for own, name in names.items()}, assign=True)
        return head.eval().requires_grad_(False)

    def block(self, index: int, tokens: int) -> Block:
        """Load block `index`, ready for windows of `tokens` tokens."""
        prefix = f"model.layers.{index}."
        return self.built({name.removeprefix(prefix): self._placed(name)
                           for name in self.checkpoint.block_names(index)}, index, tokens)

    def built(self, tensors: dict[str, torch.Tensor], index: int, tokens: int) -> Block:
        """Block `index` with these tensors, by their names within it, where they already are."""
        with self._torch.device("meta"):
            layer = loading.layer_class(self.family, self.config)(self.config, index)
        report = layer.load_state_dict(tensors, strict=False, assign=True)
        if report.missing_keys:
            raise InputError(f"{self.checkpoint.folder}: tensor model.layers.{index}."
                             f"{report.missing_keys[0]} is missing")
        return Block(layer.eval(), self._forward_arguments(layer, tokens))

    def placed(self, stored: Mapping[str, torch.Tensor], index: int, tokens: int) -> Block:
        """As `block`, from its tensors as they are stored. Raises InputError where one is not
        finite."""
        tensors = {name: tensor.to(self.device).to(self.dtype) for name, tensor in stored.items()}
        require_finite(tensors, self.checkpoint.folder, f"model.layers.{index}.")
        return self.built(tensors, index, tokens)

    def blocks(self, tokens: int) -> Iterator[Block]:
        """All blocks in order. While one is used the next is read; let go of it when you ask for
        that."""
        return ahead(len(self), lambda index: self.block(index, tokens))

    def _placed(self, name: str) -> torch.Tensor:
        """A tensor on the compute device and in its type. Raises InputError where it is not
        finite."""
        tensor = self.checkpoint.entry(name).read(pinned=self.device.type == "cuda")
        placed = tensor.to(self.device, non_blocking=True).to(self.dtype)
        require_finite({name: placed}, self.checkpoint.folder)
        return placed

    def _forward_arguments(self, layer: torch.nn.Module, tokens: int) -> dict[str, Any]:
        """Position embeddings and mask of a layer, as the family's own model makes them."""
        from transformers.masking_utils import create_sliding_window_causal_mask

        positions = self._torch.arange(tokens, device=self.device)[None]
        example = self._torch.zeros(1, tokens, 1, dtype=self.dtype, device=self.device)
        rotary = getattr(loading.family_module(self.family),
                         f"{self.family.class_prefix}RotaryEmbedding")(self.config).to(self.device)
        mask = None  # sdpa masks causally by itself where there is no mask
        if layer.self_attn is not None:
            window = getattr(layer.self_attn, "sliding_window",
                             getattr(self.config, "sliding_window", None))
            if window is not None and window < tokens:
                mask = create_sliding_window_causal_mask(
                    config=self.config, inputs_embeds=example, attention_mask=None,
                    past_key_values=None, position_ids=positions)
        return {"position_embeddings": rotary(example, positions), "attention_mask": mask,
                "position_ids": positions}
